# SPDX-License-Identifier: Apache-2.0
"""Reads the ascent gradient of normalization layers off the backward pass of the descent."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .checks import check_descent_read, check_layers_keep_no_statistics, check_readable_layer
from .loss_meter import without_loss
from .losses import count_labels


class DescentReader:
    """
    Sums the gradient that the ascent loss has in the parameters of normalization layers while another loss runs backward.

    A loss `L` and the ascent loss `A`, both sums over samples `i`, have gradients at the logits `z_i` that are parallel if `L` is
    cross-entropy: `dA/dz_i = f_i * dL/dz_i`. If the samples do not depend on each other, the same factor `f_i` holds at
    every layer. So the gradient of `A` in the parameters `v` of a layer with outputs `y_i` is `sum_i f_i * (dL/dy_i) (dy_i/dv)`: what
    arrives at the layer, each sample times its factor. A scale of `L` (accumulation, fp16, weights of samples) cancels in
    `f_i`. If the two are not parallel (label smoothing), `f_i` projects the one on the other, and the result is an approximation.

    Args:
        loss (`Callable`): The ascent loss, summed over the samples, of logits of shape `(batch, classes)` and labels.
        find_logits (`Callable`): Returns the logits in the outputs of the model.
    """

    def __init__(
        self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], find_logits: Callable[[Any], torch.Tensor]
    ):
        self._loss, self._find_logits = loss, find_logits
        self.reset()

    def reset(self) -> None:
        """Begin a new sum."""
        self.parameters: list[nn.Parameter] | None = None  # those that were read
        self.count: torch.Tensor | int = 0  # the samples summed over, without those labelled -100
        self._sums: dict[nn.Parameter, torch.Tensor] = {}

    def gradient(self, divisor: torch.Tensor | int | None = None) -> list[torch.Tensor | None]:
        """
        Return the gradient of the ascent loss in each of `parameters`, averaged over the samples since the last reset. It is `None`
        where the layer did not run.

        Args:
            divisor (`torch.Tensor` or `int`, *optional*): What to divide the sum by. Defaults to `count`.
        """
        divisor = self.count if divisor is None else divisor
        return [self._sums[p] / divisor if p in self._sums else None for p in self.parameters]

    @contextmanager
    def read(
        self, model: nn.Module, labels: torch.Tensor, used: int, parameters: list[nn.Parameter]
    ) -> Iterator[None]:
        """
        Read one forward and backward pass that run inside this context manager.

        Args:
            model (`nn.Module`): The model, inside of DDP.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, classes)`): The labels of the batch, on its device.
            used (`int`): The number of samples to sum over, from the first on.
            parameters (`list[nn.Parameter]`): The parameters, all held by normalization layers.

        Raises:
            `ValueError`: If a layer is of a kind that cannot be read, BatchNorm among them, or if the model is not called and run
                backward through its logits exactly once.
        """
        self._labels, self._used, self._batch = labels[:used], used, len(labels)
        self._factors, self._calls, self._arrivals, self._kept = None, 0, 0, []
        chosen, handles = set(parameters), [model.register_forward_hook(self._at_logits)]
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p in chosen]
            if own:
                handles.append(
                    module.register_forward_hook(functools.partial(self._at_layer, name, own), with_kwargs=True)
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        check_descent_read(self._calls, self._arrivals)
        for kept in self._kept:  # not in the backward pass, where each would find cold caches: a third of the time
            self._add(*kept)
        self._kept = []
        self.parameters, self.count = parameters, self.count + count_labels(self._labels)

    def _at_logits(self, model: nn.Module, args: tuple, outputs: Any) -> None:
        self._calls += 1
        check_layers_keep_no_statistics(model)  # now that the modules are in the modes of the descent
        logits = self._find_logits(without_loss(outputs))
        with torch.enable_grad():
            values = (
                logits.detach()[: self._used].to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
            )
            slopes = torch.autograd.grad(self._loss(values, self._labels), values)[0]
        node, index = logits.grad_fn, logits.output_nr
        # Under autocast accelerate returns a copy in 32 bits of the logits that the model takes its loss of.
        while node is not None and node.name() == "ToCopyBackward0":
            ((node, index),) = node.next_functions
        if node is not None:
            node.register_prehook(functools.partial(self._set_factors, slopes, index))

    def _set_factors(self, slopes: torch.Tensor, index: int, grads: tuple[torch.Tensor | None, ...]) -> None:
        if grads[index] is None:
            return
        self._arrivals += 1
        arrived = grads[index][: self._used].to(slopes.dtype)
        size = arrived.abs().amax(dim=1, keepdim=True)
        unit = torch.where(size > 0, arrived / size, 0.0)  # its square cannot underflow
        factors = (slopes * unit).sum(dim=1) / (unit.square().sum(dim=1) * size.squeeze(1))
        self._factors = torch.where(size.squeeze(1) > 0, factors, 0.0)

    def _at_layer(
        self, name: str, own: list[nn.Parameter], module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        values = [*args, *kwargs.values()]
        check_readable_layer(name, module, values, output, self._batch)
        if output.requires_grad:  # reentrant checkpointing runs it without gradients first
            output.register_hook(functools.partial(self._keep, own, module, [values[0].detach()]))

    def _keep(
        self, own: list[nn.Parameter], module: nn.Module, held: list[torch.Tensor], arrived: torch.Tensor
    ) -> None:
        if not held:
            return  # a second backward pass, which is refused when both are over
        inputs = held.pop()  # or this hook would hold it until the end of the backward pass
        # Windows may be folded into the first dimension, sample by sample.
        rows = self._used * (len(inputs) // self._batch)
        self._kept.append((own, module, inputs[:rows].clone(), arrived[:rows].clone()))

    def _add(self, own: list[nn.Parameter], module: nn.Module, inputs: torch.Tensor, arrived: torch.Tensor) -> None:
        factors = self._factors.repeat_interleave(len(inputs) // self._used).view(-1, *[1] * (arrived.dim() - 1))
        with torch.enable_grad():
            outputs = module.forward(inputs.to(own[0].dtype))
        gradients = torch.autograd.grad(outputs, own, arrived.to(outputs.dtype) * factors.to(outputs.dtype))
        for p, gradient in zip(own, gradients, strict=True):
            self._sums[p] = self._sums[p] + gradient if p in self._sums else gradient
