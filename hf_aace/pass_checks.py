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
    Keep a copy of the first dense tensor that the model gets as its main input inside this context manager, in a list that is
    empty until then.
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
    Warn if the images of the descent do not begin with those of the ascent, which may be of a part of the batch;
    [`images_given_to`] kept both. This waits for the device.
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
    Refuse a forward pass inside this context manager that changes frozen parameters: it runs twice in a step, the second time
    at the perturbed weights. This waits for the device.
    """
    # Embeddings whose vectors have a limited norm have the same after one pass and after two.
    limited = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm}

    def frozen() -> dict[str, int]:
        return _bits({name: p for name, p in model.named_parameters() if not p.requires_grad and id(p) not in limited})

    before = frozen()
    yield
    after = frozen()
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
    Refuse a training step inside this context manager that changes the perturbed `parameters`, unless the forward pass of
    `model` does it: the change would be lost. This waits for the device.
    """
    perturbed, changed = {id(p) for p in parameters}, []
    own = {name: p for name, p in trainer.model.named_parameters() if id(p) in perturbed}
    before = _bits(own)

    def compare(*_) -> None:
        changed.extend(name for name, bits in _bits(own).items() if bits != before[name])

    # The forward pass may change weights itself, limit their norm, for example: that of the ascent made the same change.
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
    # Sums of the bits, in which the least change shows; copies would take the memory of a whole frozen model.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(p.detach().view(integer[p.element_size()]).sum(dtype=torch.int64))
        for name, p in parameters.items()
        # Not of sparse and quantized ones, whose bits lie elsewhere.
        if type(p.data) is torch.Tensor
        and p.layout is torch.strided
        and p.is_floating_point()
        and p.element_size() in integer
    }


@contextmanager
def no_optimizer_steps(trainer: Trainer, parameters: list[nn.Parameter]) -> Iterator[None]:
    """
    Refuse, by a `RuntimeError`, steps of an optimizer of these `parameters` inside this context manager. In the descent the update
    would be lost when the weights are put back; in the ascent, where a hook may step the optimizer, it would follow the gradient
    of the ascent loss.
    """
    perturbed = {id(p) for p in parameters}

    def refuse(optimizer, args, kwargs):
        if perturbed.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            return  # of a discriminator, for example
        raise RuntimeError(
            f"`training_step` of {type(trainer).__name__} steps {type(optimizer).__name__} itself, or a hook in the backward pass does, "
            "while the weights are perturbed: the update would be lost, or follow the gradient of the ascent loss. Leave the step to "
            "Trainer, or make it in a callback (`on_step_end`)."
        )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
