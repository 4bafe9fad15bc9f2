# SPDX-License-Identifier: Apache-2.0
"""Checks of what happens in the passes: both get the same images, and nothing but the perturbation changes parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer
from transformers.utils import logging

from .checks import main_input_name


logger = logging.get_logger(__name__)


@contextmanager
def images_given_to(model: nn.Module, trainer: Trainer) -> Iterator[list[torch.Tensor]]:
    """
    Keep a copy of the main input of the first forward pass inside this context manager.

    Args:
        model (`nn.Module`): The model that is called.
        trainer ([`~transformers.Trainer`]): Its trainer.

    Returns:
        `list[torch.Tensor]`: Empty until the model is called with a tensor.
    """
    seen, name = [], main_input_name(trainer)

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        images = kwargs.get(name, args[0] if args else None)
        # Not a sparse or a nested tensor, which cannot be cut to the samples of the ascent.
        if not seen and isinstance(images, torch.Tensor) and images.layout == torch.strided and not images.is_nested:
            seen.append(images.detach().clone())

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def warn_of_other_images(trainer: Trainer, ascent: list[torch.Tensor], descent: list[torch.Tensor]) -> None:
    """
    Warn if the first images of the descent are not those of the ascent. This waits for the device.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        ascent (`list[torch.Tensor]`): What the model got in the ascent pass, perhaps of a part of the batch.
        descent (`list[torch.Tensor]`): What it got in the descent.
    """
    if not ascent or not descent or not trainer.is_world_process_zero():
        return
    first, second = ascent[0], descent[0][: len(ascent[0])]
    if first.shape != second.shape or not torch.equal(first.nan_to_num(), second.to(first).nan_to_num()):
        cls = type(trainer).__name__
        logger.warning(
            f"The model gets another `{main_input_name(trainer)}` in the descent than in the ascent pass, so that the perturbation is that of "
            "other images. If `training_step` of a class behind SharpnessAwareMixin changes the batch, change it in the data "
            f"collator instead, or in `training_step` of {cls}. If `compute_loss` changes it, let `ascent_outputs` of {cls} do so too."
        )


@contextmanager
def refuse_changed_parameters(model: nn.Module) -> Iterator[None]:
    """
    Refuse a forward pass that changes frozen parameters: it runs twice in a step, the second time at the perturbed weights. This waits
    for the device.

    Args:
        model (`nn.Module`): The model that is run inside this context manager.

    Raises:
        `ValueError`: If a frozen parameter has changed on leaving. The message names it.
    """
    before = _bits({name: p for name, p in model.named_parameters() if not p.requires_grad})
    yield
    after = _bits({name: p for name, p in model.named_parameters() if not p.requires_grad})
    changed = [name for name, bits in before.items() if bits != after.get(name, bits)]
    if changed:
        raise ValueError(
            f"The forward pass of {type(model).__name__} changes {len(changed)} frozen parameters such as {changed[0]!r}. It runs twice in "
            "a step, so that they would change twice, by perturbed weights too. Make them buffers (`register_buffer`), or "
            "change them in a callback (`on_step_end`)."
        )


@contextmanager
def refuse_lost_changes(trainer: Trainer, model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """
    Refuse a training step that changes the weights while they are perturbed, unless the forward pass does it. This waits for the
    device.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, whose step is run inside this context manager.
        model (`nn.Module`): The model that the step got.
        parameters (`list[nn.Parameter]`): The perturbed parameters.

    Raises:
        `ValueError`: If one of them has changed on leaving. The message names it.
    """
    perturbed, changed = {id(p) for p in parameters}, []
    own = {name: p for name, p in trainer.model.named_parameters() if id(p) in perturbed}
    before = _bits(own)

    def compare(*_) -> None:
        changed.extend(name for name, bits in _bits(own).items() if bits != before[name])

    # What the forward pass changes (weights of a limited norm, for example), that of the ascent has changed at the clean weights.
    handles = [
        model.register_forward_pre_hook(compare),
        model.register_forward_hook(lambda *_: before.update(_bits(own))),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    compare()
    if changed:
        raise ValueError(
            f"`training_step` of {type(trainer).__name__}, or what it calls, changes {len(set(changed))} parameters such as "
            f"{changed[0]!r} while the weights are perturbed: the change would be lost. Change them in a callback (`on_step_end`)."
        )


def _bits(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    # Sums, not copies, which take memory: with adapters nearly all of a large model is frozen. Of the bits, as these show the
    # least change.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(p.detach().view(integer[p.element_size()]).sum(dtype=torch.int64))
        for name, p in parameters.items()
        if p.is_floating_point() and p.element_size() in integer
    }


@contextmanager
def no_optimizer_steps(trainer: Trainer, parameters: list[nn.Parameter]) -> Iterator[None]:
    """
    Refuse steps of an optimizer of perturbed weights inside this context manager: they would be put back over the update.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, which the message names.
        parameters (`list[nn.Parameter]`): The perturbed parameters.

    Raises:
        `RuntimeError`: If an optimizer steps that holds one of them.
    """
    perturbed = {id(p) for p in parameters}

    def refuse(optimizer, args, kwargs):
        if perturbed.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            return  # of a discriminator, for example
        raise RuntimeError(
            f"`training_step` of {type(trainer).__name__} steps {type(optimizer).__name__} itself, while the weights are perturbed: "
            "the update would be lost. Leave the step to Trainer, or make it in a callback (`on_step_end`)."
        )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
