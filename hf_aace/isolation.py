# SPDX-License-Identifier: Apache-2.0
"""Context managers that keep a second pass through a model from leaving traces: random numbers, buffers, modes, gradients."""

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ._compat import BATCH_NORM


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
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


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
    kept, layers, buffers = [], [], []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if isinstance(module, BATCH_NORM):
                layers.append(module)
                buffers.append(buffer)
            else:
                kept.append((module, name, buffer, buffer.clone()))
    before = [buffer.clone() for buffer in buffers]
    statistics = []
    try:
        yield statistics
    finally:
        with torch.no_grad():
            statistics += zip(layers, buffers, [buffer.clone() for buffer in buffers], strict=True)
            if buffers:
                torch._foreach_copy_(buffers, before)
            for module, name, buffer, value in kept:
                if _is_writable(buffer):
                    # Always, as a write to `buffer.data` leaves no sign; observers of quantization change the shape too.
                    if buffer.shape != value.shape:
                        buffer.resize_(value.shape)
                    buffer.copy_(value)
                setattr(module, name, buffer)  # the model may have put another in its place


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
