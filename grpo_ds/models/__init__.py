"""Models: presets, shapes, policy, reference, and both as functions from packed rows to log-probs."""

import logging


def _not_of_the_4bit_kernel(record: logging.LogRecord) -> bool:
    """Hide that bitsandbytes looks for a package that we do not use: its own kernel does the same product."""
    return "Failed to load CPU gemm_4bit_forward" not in record.getMessage()


# Here, as peft loads bitsandbytes, and before any module of this folder loads peft.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_of_the_4bit_kernel)
