# SPDX-License-Identifier: Apache-2.0
"""The mean loss of a classifier over a data set as a function of its weights, which are one vector here; its derivatives."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import check_classification, check_label_values, check_precision
from ..isolation import replayed_rng
from ..losses import count_labels
from ..perturbation import perturbed


Batches = Iterable[Mapping[str, Any]]


class EmpiricalRisk:
    """The mean loss of a model over batches as a function of its trainable parameters, one vector of `size` entries."""

    def __init__(self, model: nn.Module, batches: Batches):
        self.model, self.batches = model, batches
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "The model has no parameter that requires a gradient, so there is no sharpness to measure."
            )
        if any(isinstance(p, DTensor) for p in self.parameters):
            raise ValueError("The model is sharded over processes. Save it, and measure it whole in a single one.")
        check_precision(self.parameters)
        self.sizes = [p.numel() for p in self.parameters]
        self.size = sum(self.sizes)
        self.device = self.parameters[0].device
        # Sums over many batches; the accelerator of Apple has no 64 bits.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64

    def logits_and_labels(self, batches: Batches | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each batch, after checks."""
        for batch in self.batches if batches is None else batches:
            inputs = send_to_device(dict(batch), self.device)
            labels = inputs.pop("labels", None)
            if not isinstance(labels, torch.Tensor):
                raise ValueError(f"Each batch needs `labels`, a tensor; got one with only {sorted(inputs)}.")
            outputs = self.model(**inputs)
            if isinstance(outputs, Mapping):
                if "logits" not in outputs:
                    raise ValueError(
                        f"The outputs of {type(self.model).__name__} hold no `logits`, only {sorted(outputs)}."
                    )
                outputs = outputs["logits"]
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            check_classification(logits, labels)
            check_label_values(labels, logits.shape[1])
            labels = labels if labels.is_floating_point() else labels.long()
            yield logits if logits.dtype == torch.float64 else logits.float(), labels

    @torch.no_grad()
    def loss(self, batches: Batches | None = None) -> float:
        """The mean cross-entropy."""
        total = count = 0
        for logits, labels in self.logits_and_labels(batches):
            total += F.cross_entropy(logits, labels, reduction="sum").to(self.dtype)
            count += count_labels(labels)
        return _mean(total, count)

    def loss_and_gradient(
        self, batches: Batches | None = None, loss: Callable[..., torch.Tensor] = F.cross_entropy
    ) -> tuple[float, torch.Tensor]:
        """A mean loss and its gradient, of shape `(size,)`."""
        total = count = 0
        gradient = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for logits, labels in self.logits_and_labels(batches):
            value = loss(logits, labels, reduction="sum")
            gradient += self.flat(torch.autograd.grad(value, self.parameters, allow_unused=True))
            total += value.detach().to(self.dtype)
            count += count_labels(labels)
        _mean(gradient.norm(), count)  # its checks
        return _mean(total, count), gradient / count

    def hessian_product(self, vector: np.ndarray) -> np.ndarray:
        """The Hessian of the mean cross-entropy times a vector, both of shape `(size,)`."""
        direction = self.parts(torch.as_tensor(vector.reshape(-1)).to(self.device, self.dtype))
        product = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        count = 0
        for logits, labels in self.logits_and_labels():
            value = F.cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(value, self.parameters, create_graph=True, allow_unused=True)
            slope = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True) if g is not None)
            product += self.flat(torch.autograd.grad(slope, self.parameters, allow_unused=True))
            count += count_labels(labels)
        _mean(product.norm(), count)  # its checks
        return (product / count).cpu().double().numpy()

    @torch.no_grad()
    def margins(self) -> np.ndarray:
        """Of each sample that counts, the logit of its true class less the greatest of the others."""
        found = []
        for logits, labels in self.logits_and_labels():
            if labels.is_floating_point():
                raise ValueError("Margins need labels that are class indices, got probabilities.")
            kept = labels != -100
            logits, labels = logits[kept], labels[kept].unsqueeze(1)
            others = logits.scatter(1, labels, -torch.inf).amax(dim=1)
            found.append((logits.gather(1, labels).squeeze(1) - others).cpu().numpy())
        _mean(torch.zeros(()), sum(map(len, found)))  # its checks
        return np.concatenate(found)

    def moved(self, vector: torch.Tensor) -> perturbed:
        """The context inside which the parameters have `vector` added."""
        return perturbed(self.parameters, self.parts(vector), 1.0, maximize=True)

    def ball_scale(self, adaptive: bool) -> torch.Tensor | float:
        """What the unit ball is scaled by, element by element."""
        return self.flat([p.detach().abs() for p in self.parameters]) if adaptive else 1.0

    def random_vector(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(self.size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def flat(self, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """One vector of what there is for each parameter; `None` stands for zeros."""
        return torch.cat(
            [
                torch.zeros_like(p, dtype=self.dtype).reshape(-1) if t is None else t.reshape(-1).to(self.dtype)
                for t, p in zip(tensors, self.parameters, strict=True)
            ]
        )

    def parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The vector in the shapes of the parameters."""
        parts = vector.split(self.sizes)
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]


@contextmanager
def measuring(model: nn.Module, batches: Batches) -> Iterator[EmpiricalRisk]:
    """
    Context manager that gives the objective, with the model in evaluation mode; afterwards modes, buffers and random number
    generators are what they were. Gradients of the parameters are never touched.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            "`batches` is read several times, but is an iterator, which can be read once. Pass a list of it."
        )
    model = extract_model_from_parallel(model, keep_torch_compile=False)  # a compiled one has no second derivatives
    objective = EmpiricalRisk(model, batches)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        model.eval()
        # Of the attention kernels, only this one has second derivatives.
        with replayed_rng({objective.device}), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield objective
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _mean(total: torch.Tensor, count: torch.Tensor | int) -> float:
    if not int(count):
        raise ValueError("`batches` holds no sample with a label, so there is nothing to measure on.")
    mean = float(total) / int(count)
    if not np.isfinite(mean):
        raise ValueError(
            f"The loss, or a derivative of it, is {mean}: has training diverged, or is a radius too great?"
        )
    return mean
