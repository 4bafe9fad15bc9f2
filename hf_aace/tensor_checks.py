# SPDX-License-Identifier: Apache-2.0
"""Checks of tensors and numbers, which need no trainer: each refuses what cannot be used, and names the fix."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch


def check_classification(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """
    Refuse logits that are not of shape `(batch, classes)`, with at least two classes, and labels that are neither integers of
    shape `(batch,)` nor floating-point numbers of shape `(batch, classes)`. No value is read, so that no device is waited for.
    """
    if logits.dim() != 2:
        raise ValueError(
            f"Sharpness-aware training needs logits of shape (batch, classes), got {tuple(logits.shape)}. Use a model "
            "with one score for each class, such as any `AutoModelForImageClassification`."
        )
    batch, classes = logits.shape
    if classes < 2:
        raise ValueError(
            f"AACE needs at least 2 classes, got logits of shape {tuple(logits.shape)}. A model with one output is a "
            "regression: give a binary classifier two classes (`num_labels=2`)."
        )
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"Floating-point labels must be class probabilities of shape {tuple(logits.shape)}, like the logits, "
                f"got {tuple(labels.shape)}. For class indices use an integer dtype; regression has no AACE loss."
            )
    elif labels.shape != (batch,):
        raise ValueError(
            f"Integer labels must have shape ({batch},), one class for each sample, got {tuple(labels.shape)}. For "
            "soft labels (mixup, cutmix) use floating-point probabilities; multi-label targets have no AACE loss."
        )


def check_label_values(labels: torch.Tensor, classes: int, ignore_index: int = -100) -> None:
    """
    Refuse classes outside `[0, classes)`, except `ignore_index`, and probabilities that are negative or do not sum to one. This
    reads the labels, which waits for the device: call it once, or after a failure.
    """
    if labels.is_floating_point():
        sums = labels.sum(dim=1)
        if bool((labels < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            raise ValueError(
                "Floating-point labels must be class probabilities, none negative and each row summing to 1, got rows "
                f"that sum to {sums.min().item():g} .. {sums.max().item():g}. Multi-label targets have no AACE loss: "
                "give each sample one label, or probabilities, or train plainly (`rho=0`)."
            )
        return
    valid = labels[labels != ignore_index]
    if valid.numel() > 0 and (int(valid.min()) < 0 or int(valid.max()) >= classes):
        raise ValueError(
            f"Labels must lie in [0, {classes}) for a model with {classes} classes, got {int(valid.min())} .. "
            f"{int(valid.max())}. Set `num_labels` of the model to the number of classes in the data."
        )


@contextmanager
def explained_labels(labels: torch.Tensor, classes: int, ignore_index: int = -100) -> Iterator[None]:
    """
    Turn an error of indexing in a loss into one of [`check_label_values`], inside this context manager, if the labels are its
    reason.
    """
    try:
        yield
    except (IndexError, RuntimeError):
        check_label_values(labels, classes, ignore_index)
        raise


def check_perturbation(
    parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], rho: float
) -> None:
    """
    Refuse a `rho` that is negative or not finite, gradients that are not one for each parameter or are all `None`, and a
    parameter with a gradient that is not float32 or float64.
    """
    if not 0 <= rho < float("inf"):
        raise ValueError(f"`rho` must be a finite number >= 0, got {rho}.")
    if len(parameters) != len(gradients):
        raise ValueError(
            f"`gradients` must hold one entry for each parameter, got {len(gradients)} for {len(parameters)}."
        )
    moved = [p for p, g in zip(parameters, gradients, strict=True) if g is not None]
    if not moved:
        raise ValueError(
            "None of the parameters has a gradient, so there is no direction to perturb in. Pass parameters that "
            "the loss depends on."
        )
    check_precision(moved)


def check_precision(parameters: Iterable[torch.Tensor]) -> None:
    """
    Refuse parameters to perturb that are not float32 or float64: a step of 5e-6, for example, on a weight of 0.02 is rounded
    away in 16 bits.
    """
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The parameters to perturb must be float32 (or float64), got {parameter.dtype}: its rounding would "
                "swallow the perturbation. Load the model with `dtype=torch.float32` and train with `bf16=True` or "
                "`fp16=True` for mixed precision. (`bf16_full_eval` and `fp16_full_eval` cast it, too, if it is evaluated "
                "before it is trained.)"
            )


def check_at_least(least: int, **arguments: int) -> None:
    """Raise a `ValueError` for an argument below `least`."""
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_positive(**arguments: float) -> None:
    """Raise a `ValueError` for an argument that is not a positive finite number."""
    for name, value in arguments.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"`{name}` must be a finite number > 0, got {value}.")
