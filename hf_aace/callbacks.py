# SPDX-License-Identifier: Apache-2.0
"""A callback for the trainer: the consistency of the perturbations."""

import torch

from .perturbation import perturbed
from .trainer import PerturbationCallback


class PerturbationConsistencyCallback(PerturbationCallback):
    """
    Logs `perturbation_consistency`, the cosine of the angle between each perturbation and the one before it, averaged like
    the trainer's own values. The authors of AACE find it to be higher than that of SAM near convergence
    ([arXiv 2406.14329](https://huggingface.co/papers/2406.14329)). A perturbation that was skipped counts for nothing.

    It keeps the gradients of one ascent pass, which take as much memory as the perturbed parameters.

    Example:

    ```python
    trainer = AACETrainer(..., callbacks=[PerturbationConsistencyCallback()])
    ```
    """

    def __init__(self):
        self._previous = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = []

    def on_train_end(self, args, state, control, **kwargs):
        self._previous = []

    def on_perturbation(self, perturbation: perturbed) -> dict[str, torch.Tensor] | None:
        previous = self._previous
        self._previous = [tensor.clone() for tensor in perturbation.direction]  # a CUDA graph's outputs do not last
        # Others after the first step, or when a callback has unfrozen some of the parameters.
        if [tensor.shape for tensor in previous] != [tensor.shape for tensor in self._previous]:
            return None
        return {"perturbation_consistency": perturbation.cosine(previous)}
