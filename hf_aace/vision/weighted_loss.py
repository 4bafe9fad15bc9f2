# SPDX-License-Identifier: Apache-2.0
"""Compute the training loss with weighted classes and soft labels, for which the model's own does not serve."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from ..losses import count_labels


class WeightedCrossEntropy:
    """
    Compute cross-entropy with weighted classes, soft labels, or both, as the `compute_loss_func` of a
    [`~transformers.Trainer`], which then leaves label smoothing to it. Sharpness-aware training uses it in the descent only;
    the ascent loss does not change, so that `rho` keeps its meaning.

    Args:
        class_weights (`Sequence[float]`, *optional*):
            A factor for each class. The sum of the weighted losses is divided by the number of images, not by the sum of their
            weights, so that the loss of a batch does not depend on how it is cut into micro-batches, and an image of a class
            weighs the same in every batch. Defaults to 1 for all.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share of the target that is spread evenly over all classes.

    Example:

    ```python
    weights = balanced_class_weights(dataset["label"][:], num_classes=10)
    trainer = AACETrainer(..., compute_loss_func=WeightedCrossEntropy(weights, args.label_smoothing_factor))
    ```
    """

    def __init__(self, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0):
        self._weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self._label_smoothing = label_smoothing

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        Compute the loss of a batch.

        Args:
            outputs (`ModelOutput`, `tuple` or `torch.Tensor`):
                The outputs of the model: with `logits` of shape `(batch, classes)`, a tuple that begins with them, or the
                logits themselves.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, classes)`):
                Class indices, where -100 does not count, or probabilities of the classes.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                The number of labels of all micro-batches and processes that make up an optimizer step, as Trainer counts
                them: of probabilities, one for each class of each image. Defaults to the number in `labels`.

        Returns:
            `torch.Tensor`: The sum of the losses divided by the number of images, a scalar.
        """
        logits = outputs
        if not isinstance(outputs, torch.Tensor):
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self._weights is not None:
            self._weights = self._weights.to(logits.device)  # moved once
        total = F.cross_entropy(
            logits.float(), labels, weight=self._weights, reduction="sum", label_smoothing=self._label_smoothing
        )
        if num_items_in_batch is None:
            return total / count_labels(labels)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / (num_items_in_batch / labels.shape[1] if labels.is_floating_point() else num_items_in_batch)


def balanced_class_weights(labels: Sequence[int], num_classes: int) -> list[float]:
    """
    Compute weights with which every class counts as much as any other, however many images it has.

    Args:
        labels (`Sequence[int]`): The labels of the training images. -100 does not count.
        num_classes (`int`): The number of classes.

    Returns:
        `list[float]`: For each class the number of images, divided by the number of classes that occur and by the number of
        images of this class (scikit-learn's `"balanced"`), so that the mean over the images is 1; 1 for a class that does not
        occur.
    """
    labels = np.asarray(labels)
    labels = labels[labels != -100]
    present = np.unique(labels)
    weights = np.ones(num_classes)
    weights[present] = compute_class_weight("balanced", classes=present, y=labels)
    return weights.tolist()
