# SPDX-License-Identifier: Apache-2.0
"""Context managers that keep a second pass through a model from leaving traces: random numbers, buffers, modes, gradients."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # the one base of all BatchNorm layers, SyncBatchNorm's too


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """
    Context manager inside which BatchNorm layers normalize by the batch, as always in training, but leave their running
    statistics alone. The descent, at the perturbed weights, runs inside it.

    Args:
        model (`nn.Module`): The model whose BatchNorm layers (`SyncBatchNorm` too) are frozen.
    """
    # Not `momentum = 0`, the usual trick: that still counts the batch, and breaks layers with `momentum=None`.
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
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
    Context manager after which the buffers of a model are what they were before it. Forward passes update the running
    statistics of BatchNorm, for example, and the vectors of spectral normalization.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `list[tuple[nn.Module, torch.Tensor, torch.Tensor]]`: Filled on leaving, with an entry for each buffer of BatchNorm: the
        layer, the buffer, and the value that the buffer had come to.
    """
    kept, layers, buffers = [], [], []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if isinstance(module, _BatchNorm):
                layers.append(module)
                buffers.append(buffer)
            else:
                kept.append((module, name, buffer, buffer.clone(), buffer._version))
    before = [buffer.clone() for buffer in buffers]
    statistics = []
    try:
        yield statistics
    finally:
        with torch.no_grad():
            statistics += zip(layers, buffers, [buffer.clone() for buffer in buffers], strict=True)
            if buffers:
                torch._foreach_copy_(buffers, before)
            for module, name, buffer, value, version in kept:
                if buffer._version != version:
                    buffer.copy_(value)
                setattr(module, name, buffer)  # the model may have put another in its place


@contextmanager
def in_training(model: nn.Module, but: Sequence[nn.Module]) -> Iterator[None]:
    """
    Context manager inside which a model is in training mode, and after which every module has the mode of before.

    Args:
        model (`nn.Module`): The model.
        but (sequence of `nn.Module`): Its modules that are in evaluation mode; each stands for itself, without those inside it.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for module in but:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def gradients_set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """
    Context manager inside which parameters have no gradients yet, and after which they have those of before.

    Args:
        parameters (sequence of `nn.Parameter`): The parameters.
    """
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
    Context manager after which every global random number generator is where it was before it.

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
