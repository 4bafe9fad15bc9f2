# SPDX-License-Identifier: Apache-2.0
"""The Adaptive Adversarial Cross-Entropy (AACE) loss."""

import math

import torch
import torch.nn.functional as F

from .tensor_checks import check_classification, explained_labels


def in_full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in 32 bits, or in the 64 that they have."""
    return logits if logits.dtype == torch.float64 else logits.float()


def count_labels(labels: torch.Tensor) -> torch.Tensor | int:
    """
    Count the samples, but not those with the index -100, which cross-entropy ignores too.

    Args:
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, classes)`): Class indices, or class probabilities.
    """
    return labels.shape[0] if labels.is_floating_point() else (labels != -100).sum()


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Count the samples whose label has the highest score. Those with the index -100 do not count; of probabilities the
    highest is the label.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): The scores.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, classes)`): Class indices, or class probabilities.
    """
    return (logits.argmax(dim=1) == (labels.argmax(dim=1) if labels.is_floating_point() else labels)).sum()


def aace_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    target: str = "adaptive",
    ignore_index: int = -100,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""
    The Adaptive Adversarial Cross-Entropy loss of Ratchatorn & Tanaka,
    [arXiv 2406.14329](https://huggingface.co/papers/2406.14329): the divergence `KL(t || p)` of the model's
    probabilities `p = softmax(logits)` from an adversarial target `t`, which has no mass on the true class. Descending
    it drives the model away from the true class, so the ascent step of sharpness-aware training follows its *negative*
    gradient.

    With the adaptive target `t = softmax(logits without the true class)` it has the closed form `softplus(d)`, where
    `d = logit of the true class - logsumexp(the other logits)`: finite for all finite logits, and growing as the
    model grows confident. Its gradient in the logits is that of cross-entropy times `-p_y / (1 - p_y)`, sample by sample, with
    `p_y` the probability of the true class: the ascent is that of SAM, not normalized, with every sample weighted by the odds of
    its label. Half-precision logits are computed in 32 bits.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`):
            Unnormalized scores, at least two classes.
        labels (`torch.Tensor` of shape `(batch,)` or `(batch, classes)`):
            Integer class indices, or probabilities of the classes (mixup, cutmix). For probabilities the loss is its
            expectation over the label, `sum_c labels[c] * loss(c)`.
        target (`str`, *optional*, defaults to `"adaptive"`):
            The adversarial target over the wrong classes: `"adaptive"` (the model's own probabilities), `"uniform"`,
            or `"random"` (one wrong class for each sample).
        ignore_index (`int`, *optional*, defaults to `-100`):
            Samples with this class index do not count.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over the samples that count (NaN if there is none, as in PyTorch), `"sum"`, or `"none"`.
        generator (`torch.Generator`, *optional*):
            Generator of the random targets, on the device of the logits. Defaults to torch's global generator.

    Returns:
        `torch.Tensor`: The loss, a scalar, or of shape `(batch,)` for `reduction="none"` (0 where ignored).

    Raises:
        `ValueError`: If the shapes or dtypes are not those of a single-label classifier, a choice is unknown, or (on a CPU) a class
            index lies outside `[0, classes)`.

    Example:

    ```python
    >>> import torch
    >>> from hf_aace import aace_loss

    >>> aace_loss(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))  # log(1 + exp(2 - log 2))
    tensor(1.5461)
    ```
    """
    check_classification(logits, labels)
    if target not in ("adaptive", "uniform", "random"):
        raise ValueError(f"`target` must be 'adaptive', 'uniform' or 'random', got {target!r}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` must be 'mean', 'sum' or 'none', got {reduction!r}.")
    logits = in_full_precision(logits)

    if labels.is_floating_point():
        every_class = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        losses = (labels.to(logits.dtype) * _loss_of_classes(logits, every_class, target, generator)).sum(dim=1)
        return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()

    labels = labels.long()  # or 156, in 8 bits, would be -100
    counts = labels != ignore_index
    with explained_labels(labels, logits.shape[1], ignore_index):
        classes = torch.where(counts, labels, 0).unsqueeze(1)
        losses = _loss_of_classes(logits, classes, target, generator).squeeze(1)
    losses = torch.where(counts, losses, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def _loss_of_classes(
    logits: torch.Tensor, classes: torch.Tensor, target: str, generator: torch.Generator | None
) -> torch.Tensor:
    """The loss that each sample would have if its true class were `classes`, both of shape `(batch, n)`."""
    true_logits = logits.gather(1, classes)
    if target == "adaptive":
        margins = true_logits - _logsumexp_without(logits, classes)
        return -F.logsigmoid(-margins)  # softplus, but exact beyond 20, where F.softplus cuts off
    others = logits.shape[1] - 1
    log_normalizer = logits.logsumexp(dim=1, keepdim=True)
    if target == "uniform":
        return log_normalizer - (logits.sum(dim=1, keepdim=True) - true_logits) / others - math.log(others)
    drawn = torch.randint(others, classes.shape, device=logits.device, generator=generator)
    drawn = drawn + (drawn >= classes)  # any class but the true one
    return log_normalizer - logits.gather(1, drawn)


def _logsumexp_without(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """`logsumexp` over all classes but one, for each of `classes`, of shape `(batch, 1)` or every class in order."""
    if classes.shape[1] == 1:
        return logits.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
    # log(1 - p) loses bits only where p > 1/2, so at most for the top class: that one is computed by leaving it out.
    top = logits.argmax(dim=1, keepdim=True)
    probabilities = logits.softmax(dim=1).scatter(1, top, 0.0)
    without = logits.logsumexp(dim=1, keepdim=True) + torch.log1p(-probabilities)
    return without.scatter(1, top, logits.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True))
