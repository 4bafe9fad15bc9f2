# SPDX-License-Identifier: Apache-2.0
"""Context managers that keep a second pass through a model from leaving traces: random numbers, buffers, attributes, modes, gradients."""

import operator
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ._compat import BATCH_NORM


_CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict, Counter)
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
    Restore the buffers of a model after this context manager: forward passes update the running statistics of BatchNorm, for
    example, and the vectors of spectral normalization. On leaving, fill the list that it gives with an entry for each buffer of
    BatchNorm: the layer, the buffer, and a copy of the value that the buffer had come to.
    """
    kept = _values_of_buffers(model.modules())
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


@contextmanager
def unchanged_attributes(model: nn.Module) -> Iterator[None]:
    """
    Give all modules back, after this context manager, the attributes that they had before it: counters, flags, what they note of
    the last batch. Lists, deques, dictionaries and sets among them, those of hooks too, get back their entries, one level deep. Tensors
    that are no buffers, and other objects, are not copied: what is changed inside them stays changed.
    """
    before = [(module, type(module), vars(module).copy()) for module in model.modules()]
    contents = [
        (module, cls, value, value.copy())
        for module, cls, attributes in before
        for name, value in attributes.items()
        if type(value) in _CONTAINERS and name != "_parameters"  # which FSDP2 exchanges
    ]
    try:
        yield
    finally:
        # A lazy layer becomes one of another class in its first pass, and stays so.
        for module, cls, attributes in before:
            if type(module) is cls and not _holds_the_same(vars(module), attributes):
                vars(module).clear()
                vars(module).update(attributes)
        for module, cls, value, entries in contents:
            if not value and not entries:  # most hooks
                continue
            if type(module) is cls and not (isinstance(value, dict) and _holds_the_same(value, entries)):
                value.clear()
                value.extend(entries) if isinstance(value, (list, deque)) else value.update(entries)


def _holds_the_same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(map(operator.is_, first.values(), second.values()))


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
    """Tell whether a forward pass could write to a tensor: not to an expanded one, nor to one made in inference mode."""
    expanded = buffer.layout == torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
    return not expanded and not buffer.is_inference()


@contextmanager
def in_training(model: nn.Module, except_modules: Collection[nn.Module]) -> Iterator[None]:
    """
    Put a model into training mode inside this context manager, and `except_modules`, not their submodules, into evaluation
    mode. Afterwards every module has the mode of before.
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
def modules_in_eval(model: nn.Module) -> Iterator[set[nn.Module]]:
    """
    Find the modules that are in evaluation mode at every forward pass of the model inside this context manager (at its end, if
    there is none). The set that it gives is filled on leaving.
    """
    found, forwards = set(), []

    def note(*_) -> None:
        forwards.append({module for module in model.modules() if not module.training})

    handle = model.register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()
        if not forwards:
            note()
        found |= set.intersection(*forwards)


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Take the gradients off the trainable parameters inside this context manager. Afterwards they have those of before."""
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
    """Set every global random number generator of the CPU and of these devices back after this context manager."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # some models draw from these two
    accelerators = [device for device in devices if device.type != "cpu"]
    try:
        with torch.random.fork_rng(accelerators, device_type=accelerators[0].type if accelerators else "cuda"):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
