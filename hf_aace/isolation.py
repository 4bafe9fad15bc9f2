# SPDX-License-Identifier: Apache-2.0
"""Context managers that keep a second pass through a model from leaving traces: random numbers, buffers, modes, gradients."""

import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ._compat import BATCH_NORM


_FORWARD_OF_BATCH_NORM = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """
    Freeze the running statistics of BatchNorm inside this context manager. The layers normalize by the batch, as always in
    training. The descent, at the perturbed weights, runs inside it.

    Args:
        model (`nn.Module`): The model whose BatchNorm layers (`SyncBatchNorm` too) are frozen.
    """
    # Not `momentum = 0`, the usual trick: that still counts the batch, and breaks layers with `momentum=None`.
    layers = [module for module in model.modules() if isinstance(module, BATCH_NORM) and module.track_running_stats]
    # A subclass may update them by a `forward` of its own, whatever `track_running_stats` says.
    kept = _values_of_buffers(layer for layer in layers if type(layer).forward not in _FORWARD_OF_BATCH_NORM)
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        _restore(kept)


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[list[tuple[nn.Module, torch.Tensor, torch.Tensor]]]:
    """
    Restore the buffers of a model after this context manager. Forward passes update the running statistics of BatchNorm, for
    example, and the vectors of spectral normalization.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `list[tuple[nn.Module, torch.Tensor, torch.Tensor]]`: Filled on leaving, with an entry for each buffer of BatchNorm: the
        layer, the buffer, and the value that the buffer had come to.
    """
    modules = list(model.modules())
    kept = _values_of_buffers(modules)
    registered = [(module, dict(module._buffers), dict(vars(module))) for module in modules]
    statistics = []
    try:
        yield statistics
    finally:
        statistics += [
            (module, buffer, getattr(module, name).clone())
            for module, name, buffer, _ in kept
            if isinstance(module, BATCH_NORM)
        ]
        _restore(kept)
        for module, buffers, attributes in registered:
            _forget_new_buffers(module, buffers, attributes)


def _forget_new_buffers(
    module: nn.Module, buffers_before: dict[str, torch.Tensor | None], attributes_before: dict[str, Any]
) -> None:
    """Take away what the pass filled or made, so that the next one fills or makes it."""
    new = [name for name, buffer in module._buffers.items() if buffer is not None and buffers_before.get(name) is None]
    for name in new:
        if name in buffers_before:
            setattr(module, name, None)
        else:
            delattr(module, name)
    if new:  # and what the module noted of them, such as the size of the images that they are for
        vars(module).clear()
        # With the same dictionary of buffers, from which the loop has taken the new ones.
        vars(module).update(attributes_before)


def _values_of_buffers(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]:
    return [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


@torch.no_grad()
def _restore(kept: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]]) -> None:
    """Give buffers the values of before."""
    together = []
    for module, name, buffer, value in kept:
        if getattr(module, name) is not buffer:
            setattr(module, name, buffer)
        if not _is_writable(buffer):
            continue
        if buffer.shape != value.shape:
            buffer.resize_(value.shape)  # as observers of quantization do
        # Always, as a write to `buffer.data` leaves no sign.
        if type(buffer) is torch.Tensor and not (buffer.is_nested or buffer.is_conj() or buffer.is_neg()):
            together.append((buffer, value))
        else:
            buffer.copy_(value)
    if together:
        torch._foreach_copy_(*map(list, zip(*together, strict=True)))


def _is_writable(buffer: torch.Tensor) -> bool:
    """False for a tensor that no forward pass can write to either: an expanded one, or one made in inference mode."""
    expanded = buffer.layout == torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
    return not expanded and not buffer.is_inference()


@contextmanager
def in_training(model: nn.Module, except_modules: Collection[nn.Module]) -> Iterator[None]:
    """
    Put a model into training mode inside this context manager. Afterwards every module has the mode of before.

    Args:
        model (`nn.Module`): The model.
        except_modules (collection of `nn.Module`): Modules to have in evaluation mode; their submodules are not affected.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for module in except_modules:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """
    Take the gradients off the trainable parameters inside this context manager. Afterwards they have those of before.

    Args:
        model (`nn.Module`): The model.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    accumulated = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        yield
    finally:
        for p, grad in zip(parameters, accumulated, strict=True):
            p.grad = grad


@contextmanager
def replayed_rng(devices: set[torch.device]) -> Iterator[None]:
    """
    Set every global random number generator back to where it was, after this context manager.

    Args:
        devices (`set[torch.device]`): The devices whose generators are set back, beside those of the CPU.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # some models draw from these two
    accelerators = [device for device in devices if device.type != "cpu"]
    try:
        with torch.random.fork_rng(accelerators, device_type=accelerators[0].type if accelerators else "cuda"):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
