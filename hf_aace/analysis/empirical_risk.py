# SPDX-License-Identifier: Apache-2.0
"""The mean loss of a classifier over a dataset as a function of its weights, which are one vector here, and its derivatives."""

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

from ..isolation import replayed_rng
from ..losses import count_labels, in_full_precision
from ..perturbation import perturbed
from ..tensor_checks import check_classification, check_label_values, check_precision
from .derived_state import (
    check_logits_follow_weights,
    derive_anew,
    may_keep_derived_state,
    switching_modules,
    unchanged_state,
    versions,
)


Batches = Iterable[Mapping[str, Any]]


class EmpiricalRisk:
    """
    The mean loss of a model over batches as a function of its trainable parameters, one vector with `size` entries.

    Args:
        model (`nn.Module`): A classifier.
        batches (iterable of mappings): The dataset in batches with `labels`, the same ones each time.

    Raises:
        `ValueError`: If the model has no trainable parameter, is sharded over processes, or is of 16 bits.
    """

    def __init__(self, model: nn.Module, batches: Batches):
        self.model, self.batches = model, batches
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("The model has no parameter that requires a gradient, so no sharpness to measure.")
        if any(isinstance(p, DTensor) for p in self.parameters):
            raise ValueError("The model is sharded over processes. Save it, and measure it whole in a single one.")
        check_precision(self.parameters)
        self.sizes = [p.numel() for p in self.parameters]
        self.size = sum(self.sizes)
        self.device = self.parameters[0].device
        self._switching = switching_modules(model)
        self._checked = False
        # Sums over many batches need 64 bits, which Apple's accelerator does not have.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64

    def logits_and_labels(self, batches: Batches | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Run the model on each batch and check what it returns."""
        for batch in self.batches if batches is None else batches:
            state = None if self._checked else versions(self.model)
            self._checked = True
            derive_anew(self._switching)
            logits, labels = self._run(batch)
            if state and may_keep_derived_state(self.model, state):
                # Of a single sample, timm's LeViT has a wrong gradient (torch 2.13).
                two = next(samples_in_groups(batch, 2))
                check_logits_follow_weights(self.model, self.parameters, lambda two=two: self._run(two)[0])
                derive_anew(self._switching)
                logits, labels = self._run(batch)  # the weights have moved meanwhile
            yield logits, labels

    def _run(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = send_to_device(dict(batch), self.device)
        labels = inputs.pop("labels", None)
        if not isinstance(labels, torch.Tensor):
            raise ValueError(f"Each batch needs `labels`, a tensor; got one with only {sorted(inputs)}.")
        outputs = self.model(**inputs)
        if isinstance(outputs, Mapping):
            if "logits" not in outputs:
                raise ValueError(f"{type(self.model).__name__} returns no `logits`, only {sorted(outputs)}.")
            outputs = outputs["logits"]
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        check_classification(logits, labels)
        check_label_values(labels, logits.shape[1])
        labels = labels if labels.is_floating_point() else labels.long()
        return in_full_precision(logits), labels

    @torch.no_grad()
    def loss(self, batches: Batches | None = None) -> float:
        """Compute the mean cross-entropy."""
        total = count = 0
        for logits, labels in self.logits_and_labels(batches):
            total += F.cross_entropy(logits, labels, reduction="sum").to(self.dtype)
            count += count_labels(labels)
        return float(_mean(total, count))

    def loss_and_gradient(
        self, batches: Batches | None = None, loss: Callable[..., torch.Tensor] = F.cross_entropy
    ) -> tuple[float, torch.Tensor]:
        """Compute a mean loss and its gradient, of shape `(size,)`."""
        total = count = gradient = 0
        for logits, labels in self.logits_and_labels(batches):
            value = loss(logits, labels, reduction="sum")
            gradient += self.flat(torch.autograd.grad(value, self.parameters, materialize_grads=True))
            total += value.detach().to(self.dtype)
            count += count_labels(labels)
        return float(_mean(total, count)), _mean(gradient, count)

    def hessian_product(self, vector: np.ndarray) -> np.ndarray:
        """Multiply the Hessian of the mean cross-entropy by a vector, both of shape `(size,)`."""
        direction = self.parts(torch.as_tensor(vector.reshape(-1)).to(self.device, self.dtype))
        product = count = 0
        for logits, labels in self.logits_and_labels():
            value = F.cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(value, self.parameters, create_graph=True, materialize_grads=True)
            slope = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
            product += self.flat(torch.autograd.grad(slope, self.parameters, materialize_grads=True))
            count += count_labels(labels)
        return _mean(product, count).cpu().double().numpy()

    @torch.no_grad()
    def margins(self) -> np.ndarray:
        """Compute for each sample that counts the logit of its true class less the greatest of the others."""
        found = []
        for logits, labels in self.logits_and_labels():
            if labels.is_floating_point():
                raise ValueError("Margins need labels that are class indices, got probabilities.")
            kept = labels != -100
            logits, labels = logits[kept], labels[kept].unsqueeze(1)
            others = logits.scatter(1, labels, -torch.inf).amax(dim=1)
            found.append((logits.gather(1, labels).squeeze(1) - others).cpu().numpy())
        _mean(0.0, sum(map(len, found)))  # its check
        return np.concatenate(found)

    def moved(self, vector: torch.Tensor) -> perturbed:
        """Return the context inside which the parameters have `vector` added."""
        return perturbed(self.parameters, self.parts(vector), 1.0, maximize=True)

    def ball_scale(self, adaptive: bool) -> torch.Tensor | float:
        """Return the factor of the unit ball, element by element: 1, or for ASAM's ball the size of each weight."""
        return self.flat([p.detach().abs() for p in self.parameters]) if adaptive else 1.0

    def random_vector(self, generator: torch.Generator) -> torch.Tensor:
        """Draw a normally distributed vector of shape `(size,)`, the same on every device."""
        return torch.randn(self.size, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def flat(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Join one tensor for each parameter to a vector."""
        return torch.cat([tensor.reshape(-1).to(self.dtype) for tensor in tensors])

    def parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Cut a vector into tensors with the shapes of the parameters."""
        parts = vector.split(self.sizes)
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]


@contextmanager
def measuring(model: nn.Module, batches: Batches) -> Iterator[EmpiricalRisk]:
    """
    Context manager that gives the empirical risk of a model in evaluation mode. Afterwards modes, buffers, attributes of
    modules and random number generators are what they were. Gradients of the parameters are never touched.

    Args:
        model (`nn.Module`): A classifier, also compiled or wrapped for several processes.
        batches (iterable of mappings): The dataset in batches with `labels`, the same ones each time.

    Raises:
        `ValueError`: If `batches` can be read only once; and as [`EmpiricalRisk`].
    """
    if isinstance(batches, Iterator):
        raise ValueError("`batches` is read several times, but is an iterator, which can be read once. Pass a list.")
    model = extract_model_from_parallel(model, keep_torch_compile=False)  # a compiled one has no second derivatives
    risk = EmpiricalRisk(model, batches)
    # Of the attention kernels, only this one has second derivatives.
    with unchanged_state(model), replayed_rng({risk.device}), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()
        yield risk


def samples_in_groups(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Cut a batch into groups of `size` samples. Entries that do not have one row for each sample are kept whole."""
    samples = len(batch["labels"])
    for start in range(0, samples, size):
        yield {
            key: value[start : start + size]
            if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == samples
            else value
            for key, value in batch.items()
        }


def _mean(total: torch.Tensor | int, count: torch.Tensor | int) -> torch.Tensor:
    """Divide a sum over samples, a number or a vector, by their count."""
    if not int(count):
        raise ValueError("`batches` holds no sample with a label, so there is nothing to measure on.")
    mean = torch.as_tensor(total) / int(count)
    if not mean.norm().isfinite():
        raise ValueError(
            f"The loss, or a derivative of it, is {mean.norm():g}: has training diverged, or is a radius too great?"
        )
    return mean
