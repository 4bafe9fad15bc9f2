# SPDX-License-Identifier: Apache-2.0
"""The ascent: where its gradient comes from, how long it serves, what it logs."""

import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import recursively_apply
from torch import nn
from transformers import Trainer, TrainerCallback

from . import checks
from .callbacks import PerturbationCallback
from .config import AACEArguments
from .distributed import average_gradients, mean_over_processes, outside_ddp, reshard
from .interval_metrics import IntervalMetrics
from .isolation import frozen_running_statistics, gradients_set_aside, in_training, replayed_rng, unchanged_buffers
from .losses import aace_loss, count_correct, count_labels
from .perturbation import perturbed


@dataclass
class _Gradient:
    """An ascent gradient, and what decides which steps it serves."""

    step: int  # the optimizer step that it was taken in
    window: list | None  # the micro-batches that it was taken over, until the next window begins
    loss: str
    parameters: list[nn.Parameter]
    values: list[torch.Tensor | None]
    scale: torch.Tensor | None  # the fp16 loss scale, by which the values are too large


class Ascent(TrainerCallback):
    """
    All of sharpness-aware training that outlives a step: the window of micro-batches that make up the optimizer step, the
    ascent gradient and how long it serves, BatchNorm's statistics between the two passes, and the metrics since the last log.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer with [`SharpnessAwareMixin`], which calls [`Ascent.perturbation`] before
            each of its training steps, runs the step inside [`Ascent.descent`], and calls [`Ascent.log_descent`] after it.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.metrics = IntervalMetrics()
        self._defaults = AACEArguments()
        self._uses_backward = False  # reentrant activation checkpointing cannot serve `autograd.grad`
        self.release()

    def release(self) -> None:
        """Let go of batches and gradients, as when training ends."""
        self._window: list[Any] = []
        self._gradient: _Gradient | None = None
        self._last_step = -1  # the optimizer step of the last ascent pass
        self._passes = 0  # micro-batches that went through an ascent pass in this optimizer step
        self._checked = False
        self._evaluating: list[nn.Module] = []  # the modules that the last descent had in evaluation mode
        self._statistics: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # of BatchNorm, from the ascent

    @property
    def args(self) -> AACEArguments:
        args = self.trainer.args
        return args if isinstance(args, AACEArguments) else self._defaults

    @property
    def in_sync(self) -> bool:
        """True if all processes perturb by one gradient."""
        return self.trainer.args.world_size > 1 and (self.args.sync_ascent or self.trainer.accelerator.is_fsdp2)

    def check(self) -> None:
        """Raise a `ValueError` for what cannot be trained, before any weight moves."""
        self.args.check_aace_arguments()
        if self.args.rho > 0:
            checks.check_trainer(self.trainer, self.args, self.perturbed_parameters())

    # ---- Events ----------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self.check()  # the model or the arguments may be others than at construction
        self.release()
        self.metrics.reset()

    def on_save(self, args, state, control, **kwargs):
        self.forget()  # a run that goes on from the checkpoint has no gradient either: both are to do the same

    def begin_window(self, batches: list[Any]) -> None:
        """Take the micro-batches of the next optimizer step."""
        self._window, self._passes = batches, 0
        if self._gradient is not None:
            self._gradient.window = None

    def forget(self) -> None:
        """Make the next perturbed step take an ascent pass of its own."""
        self._gradient = None

    # ---- The step --------------------------------------------------------------

    def perturbation(self, model: nn.Module, inputs: Any) -> perturbed | None:
        """
        The perturbation of a training step, by a new ascent gradient or one that still serves.

        Args:
            model (`nn.Module`): The model that the training step got.
            inputs (`dict[str, torch.Tensor | Any]`): The micro-batch that the training step got. Not modified.

        Returns:
            [`perturbed`]: The perturbation, not made yet; `None` if the step is a plain one.
        """
        args, trainer, step = self.args, self.trainer, self.trainer.state.global_step
        if args.rho == 0 or step % args.perturb_every != 0:
            return None
        window = [inputs]
        if args.ascent_scope == "full_batch" and len(self._window) > 1:
            window = self._window
            checks.check_window(inputs, window)
        if isinstance(trainer.optimizer, AcceleratedOptimizer):
            trainer.optimizer.train()  # a schedule-free one moves the weights here: before we look at them
        reshard(model)  # evaluation leaves some weights gathered: those are not the ones that the optimizer has
        parameters = self.perturbed_parameters()
        gradient = self._gradient
        if new := gradient is None or not self._serves(gradient, window, parameters):
            gradient = self._ascend(model, window, parameters)
        perturbation = perturbed(
            parameters,
            gradient.values,
            args.rho,
            normalize=args.normalize_perturbation,
            adaptive=args.adaptive_perturbation,
            maximize=args.perturbation_loss == "cross_entropy",
            grad_scale=gradient.scale,
        )
        if inputs is window[0]:  # the micro-batches of a window share one perturbation
            names = {"ascent_grad_norm": "grad_norm", "perturbation_norm": "norm", "skipped_perturbations": "skipped"}
            self.metrics.add({name: getattr(perturbation, value) for name, value in names.items()})
        if new:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, PerturbationCallback) and (values := callback.on_perturbation(perturbation)):
                    self.metrics.add(values)
        more_to_come = len(window) > 1 and inputs is not window[-1]
        self._gradient = gradient if args.ascent_every > 1 or more_to_come else None
        return perturbation

    def _serves(self, gradient: _Gradient, window: list[Any], parameters: list[nn.Parameter]) -> bool:
        """True for the window that the gradient was taken over, and for less than `ascent_every` steps after its own."""
        later = self.trainer.state.global_step - gradient.step
        return (
            (gradient.window is window or 0 < later < self.args.ascent_every)
            and gradient.loss == self.args.perturbation_loss
            and len(parameters) == len(gradient.parameters)
            and all(map(operator.is_, parameters, gradient.parameters))
        )

    @contextmanager
    def descent(self, model: nn.Module) -> Iterator[None]:
        """
        Context manager for the descent at the perturbed weights: BatchNorm keeps the statistics of the ascent.

        Args:
            model (`nn.Module`): The model that the training step got.
        """
        try:
            with frozen_running_statistics(model):
                yield
        except BaseException:
            reshard(model)  # or FSDP2 might go on with the perturbed weights that it gathered
            raise
        # A layer that the descent has in evaluation mode, frozen by `compute_loss`, for example, keeps its statistics, and the
        # next ascent leaves it in evaluation mode.
        self._evaluating = [module for module in model.modules() if not module.training]
        for layer, buffer, updated in self._statistics:
            if layer.training:
                buffer.copy_(updated)
        self._statistics = []

    def log_descent(self, loss: torch.Tensor) -> None:
        """Add the loss of a training step to the metrics, if there is a `clean_loss` of the same step to compare it with."""
        if self._last_step == self.trainer.state.global_step:
            # Trainer's loss is this micro-batch's share of the optimizer step's mean.
            self.metrics.add({"perturbed_loss": loss * max(1, len(self._window))})

    def pop_metrics(self) -> dict[str, float]:
        """Average the metrics since the last call over steps and processes. This waits for the device."""
        metrics = self.metrics.pop()
        if (
            self.in_sync and "skipped_perturbations" in metrics
        ):  # each process counted those that they skipped together
            metrics["skipped_perturbations"] //= self.trainer.args.world_size
        return metrics

    # ---- The ascent pass -------------------------------------------------------

    def perturbed_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that `perturb_modules` chooses; looked up anew, as callbacks may unfreeze some."""
        pattern = self.args.perturb_modules
        # FSDP2's activation checkpointing and compilation put their wrappers into the names.
        trainable = {
            name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): p
            for name, p in self.trainer.model.named_parameters()
            if p.requires_grad
        }
        chosen = [p for name, p in trainable.items() if pattern is None or re.search(pattern, name)]
        checks.check_parameters(trainable, chosen, pattern)
        return chosen

    def _ascend(self, model: nn.Module, window: list[Any], parameters: list[nn.Parameter]) -> _Gradient:
        """Take the gradient of the mean ascent loss over the micro-batches of the window."""
        trainer = self.trainer
        if not self._checked:
            self.check()  # a callback may have raised a `rho` of 0
            checks.check_backward_hooks(parameters)
        try:
            values = self._pass(model, window, parameters)
        except RuntimeError as error:
            if self._uses_backward:
                raise
            checks.check_reentrant(trainer, error)
            self._uses_backward = True
            values = self._pass(model, window, parameters)
        self._checked, self._last_step = True, trainer.state.global_step
        scaler = trainer.accelerator.scaler
        scale = None if scaler is None else scaler.scale(torch.ones((), device=trainer.args.device))
        return _Gradient(self._last_step, window, self.args.perturbation_loss, parameters, values, scale)

    def _pass(self, model: nn.Module, window: list[Any], parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        """Run the window forward and backward; return the gradients (times the fp16 loss scale)."""
        trainer, scaler, sharded = self.trainer, self.trainer.accelerator.scaler, self.trainer.accelerator.is_fsdp2
        use_backward = sharded or self._uses_backward
        keep = len(window) > 1 or self.args.ascent_every > 1
        gradients: list[torch.Tensor | None] = [None] * len(parameters)
        losses: dict[str, Any] = {"clean_loss": 0.0, "clean_accuracy": 0.0, "ascent_loss": 0.0}
        trainable = [p for p in trainer.model.parameters() if p.requires_grad]
        # The descent is to draw the same random numbers, and the run those that it would without an ascent.
        with (
            replayed_rng({p.device for p in trainer.model.parameters()}),
            outside_ddp(model) as inner,
            unchanged_buffers(trainer.model) as statistics,
            in_training(model, but=self._evaluating),
            gradients_set_aside(trainable) if use_backward else nullcontext(),
        ):
            samples = [self._samples(inputs) for inputs in window]
            count = share = sum(count_labels(labels) for _, labels in samples)
            if self.in_sync:  # what the processes divide by, so that the mean over them is that over all their samples
                share = mean_over_processes(torch.as_tensor(count, dtype=torch.float32, device=trainer.args.device))
            for index, (inputs, labels) in enumerate(samples):
                if sharded:
                    model.set_requires_gradient_sync(index == len(samples) - 1)
                with trainer.compute_loss_context_manager():
                    # A copy: some models change their inputs in place, and the descent is to get them unchanged.
                    outputs = trainer.ascent_outputs(inner, recursively_apply(torch.clone, inputs))
                    logits = trainer.ascent_logits(outputs)
                    loss = self._loss(logits, labels)
                losses["ascent_loss"] += loss.detach() / count
                loss = loss / share if scaler is None else scaler.scale(loss / share)
                if use_backward:
                    loss.backward()
                else:
                    # Not `backward()`: that would add to the gradients of earlier micro-batches and run their hooks.
                    new = torch.autograd.grad(loss, parameters, allow_unused=True)
                    # Copies, unless they are used up before the next pass: what a CUDA graph
                    # (`torch_compile_mode="reduce-overhead"`) returned lasts no longer.
                    gradients = _sum(gradients, new) if keep else list(new)
                # Now that the gradient is there: a `compute_loss_func` may change the logits in place.
                with torch.no_grad():
                    losses["clean_accuracy"] += count_correct(logits, labels) / count
                    losses["clean_loss"] += self._clean_loss(outputs, logits, labels) / count
                del outputs, logits
            if use_backward:
                gradients = [p.grad for p in parameters]
        self._statistics = statistics
        self.metrics.add(losses)
        if sharded and self.args.ascent_scope == "full_batch":
            # As Trainer has it. For micro-batches that perturb by themselves it stays on: what FSDP2 puts off to the last
            # one, it would reduce in the next ascent.
            model.set_requires_gradient_sync(trainer.accelerator.sync_gradients)
        return average_gradients(gradients, parameters) if self.in_sync and not sharded else gradients

    def _samples(self, inputs: Any) -> tuple[dict[str, Any], torch.Tensor]:
        """Prepare the samples of one micro-batch that the ascent uses, on the device, and their labels."""
        inputs, name = self.trainer._prepare_inputs(inputs), self.label_name
        checks.check_batch(inputs, name)
        labels, fraction = inputs[name], self.args.ascent_fraction
        if fraction < 1 and labels.dim() > 0:
            batch = labels.shape[0]
            inputs = {key: _first(value, max(1, round(fraction * batch)), batch) for key, value in inputs.items()}
            labels = inputs[name]
        if labels.is_floating_point():
            return inputs, labels
        # As models flatten them; and -100 is no class, which in 8 bits it might look like.
        return inputs, (labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels).long()

    @property
    def label_name(self) -> str:
        """The key of the labels in a batch."""
        # A model without an argument for labels leaves them to `compute_loss_func`, which looks for `labels`.
        names = self.trainer.label_names
        return names[0] if names and "labels" not in names else "labels"

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The ascent loss, summed over the samples."""
        checks.check_classification(logits, labels)
        if not self._checked:
            checks.check_labels(self.trainer, labels, logits.shape[1])
        if self.args.perturbation_loss == "aace":
            generator = self._new_generator(logits.device) if self.args.aace_target == "random" else None
            return aace_loss(logits, labels, target=self.args.aace_target, reduction="sum", generator=generator)
        with checks.explained_labels(labels, logits.shape[1]):
            return F.cross_entropy(logits, labels, reduction="sum")

    def _new_generator(self, device: torch.device) -> torch.Generator:
        """Make another generator for each micro-batch: the global one is set back after every ascent, and would repeat itself."""
        args = self.trainer.args
        place = (args.seed, self.trainer.state.global_step, args.process_index, self._passes)
        self._passes += 1
        return torch.Generator(device).manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _clean_loss(self, outputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The training loss at the present weights, summed over the samples."""
        if self.trainer.compute_loss_func is not None:
            # As Trainer counts them: of probabilities every entry.
            items = labels.numel() if labels.is_floating_point() else count_labels(labels)
            loss = self.trainer.compute_loss_func(outputs, labels, num_items_in_batch=items)
            return loss * count_labels(labels)
        smoothing = self.trainer.args.label_smoothing_factor
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


def _first(data: Any, used: int, batch: int) -> Any:
    """Take the first `used` samples of whatever in `data` has one entry for each of the `batch` samples."""
    if isinstance(data, Mapping):
        return {key: _first(value, used, batch) for key, value in data.items()}
    if isinstance(data, torch.Tensor):
        return data[:used] if data.dim() > 0 and data.shape[0] == batch else data
    if isinstance(data, (tuple, list)):
        parts = type(data)(_first(value, used, batch) for value in data)
        whole = all(part is value for part, value in zip(parts, data, strict=True))
        return data[:used] if whole and len(data) == batch else parts
    return data


def _sum(total: list[torch.Tensor | None], new: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    """Add `new` to `total`, entry by entry, in place where there is something, else as a copy; `None` stands for zero."""
    return [a if b is None else b.clone() if a is None else a.add_(b) for a, b in zip(total, new, strict=True)]
