"""The dtype of a precision, and whether this card and this build of torch compute in it.

system/hardware.py has asked nvidia-smi, before torch was imported; here torch, which knows, is asked.
"""

import torch

from grpo_ds.errors import UsageError
from grpo_ds.system.hardware import Precision

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check_card(precision: Precision) -> None:
    """Raise UsageError if torch has no kernels for this card, or if the card would have to emulate bf16."""
    if not torch.cuda.is_available():
        return
    capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not runs_on(capability, built_for):
        raise UsageError(
            f"torch {torch.__version__} has no kernels for this card, {torch.cuda.get_device_name()} "
            f"(sm_{capability[0]}{capability[1]});\nit was built for {', '.join(built_for)}.\n"
            "Up to torch 2.14 the builds for CUDA 12.6 (cu126) have sm_70, a V100;\n"
            "those for CUDA 13 begin with sm_75, a T4 or RTX 20xx."
        )
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError(
            f"{torch.cuda.get_device_name()} has no bf16. Remove bf16 from the DeepSpeed JSON and write "
            '"fp16": {"enabled": true}.'
        )


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """True if one of the architectures that torch was built for runs on a card of this capability.

    sm_75 runs on 7.5 and later ones of 7; compute_75 is compiled for any later card when it is first used.
    """
    for kind, _, number in (name.partition("_") for name in built_for):
        digits = "".join(filter(str.isdigit, number))
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False
