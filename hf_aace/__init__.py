# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware training for the Hugging Face Trainer, with the AACE loss in its ascent step."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import AACEArguments, AACEConfig
    from .losses import aace_loss
    from .perturbation import perturbed
    from .trainer import AACETrainer, SharpnessAwareMixin


# peft imports bitsandbytes where it is installed, which warns that it lacks 4-bit kernels: nothing here uses them, and the first
# lines on a user's screen are to be about the user's run.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

__version__ = "0.1.0"

__all__ = ["AACEArguments", "AACEConfig", "AACETrainer", "SharpnessAwareMixin", "aace_loss", "perturbed"]

_MODULES = {
    "AACEArguments": "config",
    "AACEConfig": "config",
    "AACETrainer": "trainer",
    "SharpnessAwareMixin": "trainer",
    "aace_loss": "losses",
    "perturbed": "perturbation",
}


def __getattr__(name: str):
    # Imported when first used: torch and transformers take seconds, which `hf-aace --help` need not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
