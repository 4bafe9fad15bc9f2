# SPDX-License-Identifier: Apache-2.0
"""
Sharpness-aware training for the Hugging Face Trainer, with the AACE loss in its ascent step.

The files stand in an order in which each imports only what is above it. To follow a step, begin at `training_step` in trainer.py.

    _compat.py           work-arounds for defects of other libraries
    config.py            `AACEConfig`; the methods AACE, SAM and ASAM by name
    tensor_checks.py     checks of logits, labels and weights
    checks.py            checks of a trainer and of its batches, before any weight moves
    losses.py            the AACE loss
    perturbation.py      moves weights along a gradient, and puts them back bit for bit
    parameters.py        which parameters are perturbed
    isolation.py         lets a pass leave no traces: random numbers, buffers, attributes, modes, gradients
    distributed.py       the ascent under DDP and FSDP2
    interval_metrics.py  averages of what is logged
    loss_meter.py        the loss before and after the perturbation, for the log
    callbacks.py         callbacks that are called after each ascent pass
    hook_watch.py        notices when the methods of the trainer are no longer called
    pass_checks.py       checks of what happens in the passes
    ascent.py            the ascent pass, and how long its gradient is used
    model_card.py        the model card
    trainer.py           `SharpnessAwareMixin` and `AACETrainer`
    vision/              images: datasets, augmentation, models, metrics
    analysis/            sharpness, loss landscapes, plots
    study/               comparisons of methods over seeds: runs, statistics, cost
    cli/                 the command `hf-aace`
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import AACEArguments, AACEConfig
    from .losses import aace_loss
    from .perturbation import perturbed
    from .trainer import AACETrainer, SharpnessAwareMixin


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
