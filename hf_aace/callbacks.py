# SPDX-License-Identifier: Apache-2.0
"""Callbacks that are called after each ascent pass; one logs how consistent the perturbations are."""

import torch
from transformers import TrainerCallback

from .perturbation import perturbed


class PerturbationCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that is also called after each ascent pass:

    ```python
    class LargestStep(PerturbationCallback):
        def on_perturbation(self, perturbation):
            return {"largest_step": torch.stack([d.abs().max() for d in perturbation.direction]).max()}
    ```
    """

    def on_perturbation(self, perturbation: perturbed) -> dict[str, torch.Tensor] | None:
        """
        Called after each ascent pass, before the weights move; not on steps that reuse an earlier one (`ascent_every`).

        Args:
            perturbation ([`perturbed`]): The step that is about to be made.

        Returns:
            `dict[str, torch.Tensor]`, *optional*: Scalars, best on the device (reading them would wait for it), which are averaged
            over the steps and the processes and logged beside those of the trainer. All processes must return the same names.
        """


class PerturbationConsistencyCallback(PerturbationCallback):
    """
    Log `perturbation_consistency`, the cosine of the angle between each perturbation and the one before it, averaged like
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
