# SPDX-License-Identifier: Apache-2.0
"""A watch on the methods of Trainer that the ascent hangs on: one that is no longer called stops the run, never trains plainly."""

from typing import Any

from transformers import Trainer, TrainerCallback

from .config import aace_arguments, perturbs


_INSTEAD = (
    "Call it by `super()` where you override it, and change the micro-batches in a class that comes after SharpnessAwareMixin in the "
    "bases. If you do not override it, this Transformers calls other methods: use an older one."
)


class HookWatch(TrainerCallback):
    """
    Stop the training by a `RuntimeError` if `training_step` of [`SharpnessAwareMixin`] was not called by the end of the first
    perturbed step, or if `get_batch_samples`, under gradient accumulation, was not called before a step for all of its
    micro-batches.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._expected = False  # the step that began is to be perturbed
        self._called = False  # `training_step` was called since
        self._ever_called = False
        self._micro_batches = 0  # in the present optimizer step

    def note_training_step(self) -> None:
        """Note that `training_step` was called."""
        self._called = self._ever_called = True
        # Trainer has this number from what its `get_batch_samples` returned. With one micro-batch nothing depends on it.
        if self._expected and 1 < self._trainer.current_gradient_accumulation_steps != self._micro_batches:
            self._raise("get_batch_samples", "does not know the micro-batches of the optimizer step")

    def note_window(self, batches: list[Any]) -> None:
        """Note that `get_batch_samples` was called, and the micro-batches that it returned."""
        steps = self._trainer.args.gradient_accumulation_steps
        within_a_step = self._called and not self._trainer.accelerator.sync_gradients
        # A stream without a length ends in an empty window.
        if batches and self._expected and within_a_step and self._micro_batches == 1 < steps:
            self._raise("get_batch_samples", f"was called for one micro-batch of {steps}, not for all of them")
        self._micro_batches = len(batches)

    def on_train_begin(self, args, state, control, **kwargs):
        self._expected, self._called, self._ever_called, self._micro_batches = False, False, False, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._called = False  # the last, short window of a stream goes on in the next epoch

    def on_step_begin(self, args, state, control, **kwargs):
        self._expected, self._called = perturbs(aace_arguments(args), state.global_step), False

    def on_step_end(self, args, state, control, **kwargs):
        # Later steps may leave it out: a subclass may skip a batch. Looked at twice: a callback may have changed `rho` meanwhile.
        if self._expected and not self._ever_called and perturbs(aace_arguments(args), state.global_step - 1):
            self._raise("training_step", "was not called, so that this would be plain training")

    def _raise(self, method: str, what: str) -> None:
        raise RuntimeError(f"`{method}` of SharpnessAwareMixin {what} ({type(self._trainer).__name__}). {_INSTEAD}")
