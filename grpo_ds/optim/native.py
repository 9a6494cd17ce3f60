"""The compiled steps of 8-bit AdamW and SGD: adamw8bit.cpp, built at first use (system/compiled.py)."""

import ctypes
import functools
import logging
import math
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_ds.system.compiled import build, reason

NAME = "grpo_ds_adamw8bit"
SOURCE = Path(__file__).with_name("adamw8bit.cpp")
# No -march: every machine that shares the cache can use the file. No contraction: it would change the codes.
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
PATHS = ("portable", "avx2", "avx512")

logger = logging.getLogger(__name__)


class _Job(ctypes.Structure):
    """struct Job of adamw8bit.cpp."""

    _fields_ = [
        ("elements", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("gradient", "parameter", "residual", "codes1", "codes2")),
        *((name, ctypes.c_void_p) for name in ("absmax1", "absmax2", "qmap1", "qmap2", "grid1", "grid2")),
        *((name, ctypes.c_float) for name in ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2")),
        *((name, ctypes.c_float) for name in ("decay", "step_size", "eps")),
        *(
            (name, ctypes.c_int32)
            for name in ("gradient_is_bf16", "parameter_is_bf16", "threads", "path", "stochastic", "residual_bits")
        ),
        ("key", ctypes.c_uint32),
    ]


def native_step(
    parameter: Tensor,
    gradient: Tensor,
    state: dict,
    group: dict,
    *,
    noise_key: int | None = None,
    path: str | None = None,
) -> None:
    """Update [N] elements in place with the blockwise 8-bit update.

    The moments' codes are bitsandbytes' if the state has their maps, otherwise computed. With state["residual"] (int16
    or int8) a bf16 parameter is the upper half of an fp32 one; what they do not hold is rounded with `noise_key`.

    path: one of PATHS, for tests; None: the best one.
    """
    beta1, beta2 = group["betas"]
    correction1, correction2 = 1 - beta1 ** state["step"], math.sqrt(1 - beta2 ** state["step"])
    maps = [state[name] for name in ("qmap1", "qmap2") if name in state]
    tables = {
        f"{kind}{number}": address
        for number, qmap in enumerate(maps, 1)
        for kind, address in (("qmap", qmap.data_ptr()), ("grid", ctypes.addressof(_grid(qmap.numpy().tobytes()))))
    }
    job = _Job(
        **_tensors(parameter, gradient, state, noise_key, path),
        codes1=state["state1"].data_ptr(),
        codes2=state["state2"].data_ptr(),
        **{name: state[name].data_ptr() for name in ("absmax1", "absmax2")},
        **tables,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        decay=1 - group["lr"] * group["weight_decay"],
        # The second moment's bias correction is applied to the step size, not to the root: one division less.
        step_size=-group["lr"] * correction2 / correction1,
        eps=group["eps"] * correction2,
    )
    _kernels().grpo_ds_step(ctypes.byref(job))


def native_sgd_step(
    parameter: Tensor,
    gradient: Tensor,
    state: dict,
    group: dict,
    *,
    noise_key: int | None = None,
    path: str | None = None,
) -> None:
    """Update [N] elements in place by SGD; arguments as for `native_step`."""
    job = _Job(
        **_tensors(parameter, gradient, state, noise_key, path),
        decay=1 - group["lr"] * group["weight_decay"],
        step_size=-group["lr"],
    )
    _kernels().grpo_ds_step(ctypes.byref(job))


def _tensors(
    parameter: Tensor, gradient: Tensor, state: dict, noise_key: int | None, path: str | None
) -> dict[str, Any]:
    """Return the fields of a job that do not depend on the optimizer."""
    residual = state.get("residual")
    return {
        "elements": parameter.numel(),
        "gradient": gradient.data_ptr(),
        "parameter": parameter.data_ptr(),
        "residual": None if residual is None else residual.data_ptr(),
        "gradient_is_bf16": gradient.dtype == torch.bfloat16,
        "parameter_is_bf16": parameter.dtype == torch.bfloat16,
        "threads": torch.get_num_threads(),
        "path": -1 if path is None else PATHS.index(path),
        "stochastic": noise_key is not None,
        "residual_bits": 0 if residual is None else 8 * residual.element_size(),
        "key": noise_key or 0,
    }


def native_first_bad_element(gradient: Tensor) -> int | None:
    """Like slices.first_bad_element, but reads the gradient once."""
    is_bf16 = int(gradient.dtype == torch.bfloat16)
    found = _kernels().grpo_ds_first_bad(gradient.data_ptr(), gradient.numel(), is_bf16, torch.get_num_threads())
    return None if found < 0 else found


def best_path() -> str:
    """Return the entry of PATHS that this processor uses."""
    return PATHS[_kernels().grpo_ds_best_path()]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None (with one warning and the reason) if this machine cannot build them."""
    try:
        loaded = ctypes.CDLL(str(build(NAME, SOURCE, FLAGS)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("The optimizer's step runs on slower kernels: %s", reason(error))
        return None
    loaded.grpo_ds_first_bad.restype = ctypes.c_int64
    loaded.grpo_ds_first_bad.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return loaded


def _kernels() -> ctypes.CDLL:
    kernels = library()
    assert kernels is not None, "callers ask library() first"
    return kernels


@functools.cache
def _grid(qmap: bytes) -> ctypes.Array:
    """uint8[65536]: the code that bitsandbytes gives to each grid point between -1 and 1."""
    grid = (ctypes.c_uint8 * 65536)()
    _kernels().grpo_ds_build_grid(qmap, grid)
    return grid
