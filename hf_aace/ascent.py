# SPDX-License-Identifier: Apache-2.0
"""Takes the ascent gradient, decides how long it is reused, and collects the metrics."""

import operator
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
from ._compat import BATCH_NORM
from .callbacks import PerturbationCallback
from .config import AACEArguments, aace_arguments, perturbs
from .distributed import average_gradients, outside_ddp, reshard
from .hook_watch import HookWatch
from .interval_metrics import IntervalMetrics
from .isolation import (
    frozen_running_statistics,
    gradients_set_aside,
    in_training,
    modules_in_eval,
    replayed_rng,
    unchanged_attributes,
    unchanged_buffers,
)
from .loss_meter import LossMeter
from .losses import aace_loss, count_correct, count_labels, in_full_precision
from .parameters import parameters_to_perturb
from .pass_checks import (
    images_given_to,
    no_optimizer_steps,
    refuse_changed_parameters,
    refuse_lost_changes,
    warn_of_other_images,
)
from .perturbation import perturbed
from .tensor_checks import check_classification, explained_labels


@dataclass
class _Gradient:
    """An ascent gradient, and the data that decide when it may be reused."""

    step: int  # the optimizer step that it was taken in
    window: list | None  # the window that it was taken over; None when the next one begins
    loss: str
    parameters: list[nn.Parameter]
    values: list[torch.Tensor | None]
    scale: torch.Tensor | None  # `values` are multiplied by this fp16 loss scale


class Ascent(TrainerCallback):
    """
    Hold the state of sharpness-aware training that is kept between micro-batches and steps: the window (the micro-batches of
    one optimizer step), the ascent gradient, BatchNorm's statistics between the two passes, and the metrics since the last log.

    The trainer, with [`SharpnessAwareMixin`], calls [`Ascent.prepare_perturbation`] before each of its training steps, runs the
    step inside [`Ascent.descent`], and calls [`Ascent.log_descent`] after it.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.metrics, self.meter, self.watch = IntervalMetrics(), LossMeter(trainer), HookWatch(trainer)
        self.first_step = 0
        self.reset()

    def reset(self) -> None:
        """Forget all batches and gradients: when training begins, and when it ends."""
        self._window: list[Any] = []
        self._gradient: _Gradient | None = None
        self._last_step = -1  # the optimizer step of the last ascent pass
        self._random_draws = 0  # micro-batches of this optimizer step that random targets were drawn for
        self._checked: list[str] | None = None  # the trainable parameters that the checks were done with
        self.training = False  # a training step is run at perturbed weights
        self._parameters: list[nn.Parameter] = []  # those of the present perturbation
        self._descents = 0  # since training began
        self._passes = 0  # ascent passes so far
        self.label_name = "labels"  # the key of the labels in the present batch
        self._uses_backward = False  # take gradients by `backward()`: `autograd.grad` gives none for some models
        self._modules_in_eval: set[nn.Module] | None = None  # in the last descent; not known before the first
        self._images: list[torch.Tensor] | None = None  # of the first ascent pass, until the descent after it
        # BatchNorm: the ascent updates the running statistics at the clean weights, `unchanged_buffers` takes the update back and
        # returns it, the descent runs with frozen statistics, and `_apply_statistics` makes the update, except in layers that the
        # descent has in evaluation mode. Which layers these are is known after a descent only: an ascent goes by the descent
        # before it.
        self._statistics: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # layer, buffer, new value
        self._ascent_batches: list[tuple[Any, torch.Tensor, int]] = []  # micro-batch, labels, samples used
        self._perturbed_losses: list[torch.Tensor] = []  # in the descents of these micro-batches
        self._label_count: torch.Tensor | int = 0  # labels other than -100 among these samples

    @property
    def args(self) -> AACEArguments:
        return aace_arguments(self.trainer.args)

    @property
    def in_sync(self) -> bool:
        """Tell whether all processes perturb by one gradient."""
        return self.trainer.args.world_size > 1 and (self.args.sync_ascent or self.trainer.accelerator.is_fsdp2)

    def check(self) -> None:
        """Raise a `ValueError` for what cannot be trained, before any weight moves."""
        self.args.check_aace_arguments()
        if self.args.rho > 0:
            parameters = parameters_to_perturb(self.trainer.model, self.args.perturb_modules)
            checks.check_trainer(self.trainer, self.args, parameters)

    # ---- Events ----------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self.check()  # the model or the arguments may have changed since construction
        self.first_step = state.global_step  # above 0 after a resume
        checks.warn_of_rare_statistics(self.trainer, self.args, state.max_steps)
        self.reset()
        self.metrics.reset()
        self.meter.reset()

    def on_save(self, args, state, control, **kwargs):
        # A resumed run knows neither the gradient nor the modules in evaluation mode: without them this run goes on alike.
        self.forget()
        self._modules_in_eval = None

    def begin_window(self, batches: list[Any]) -> None:
        """Take the micro-batches of the next optimizer step."""
        self._window, self._random_draws, self._ascent_batches, self._perturbed_losses = batches, 0, [], []
        if self._gradient is not None:
            self._gradient.window = None  # to free the batches

    def forget(self) -> None:
        """Make the next perturbed step take an ascent pass of its own."""
        self._gradient = None

    # ---- The step --------------------------------------------------------------

    def prepare_perturbation(self, model: nn.Module, inputs: Any) -> perturbed | None:
        """
        Return the perturbation for one micro-batch, not applied yet, or `None` in a plain step. The micro-batch is not modified.
        Run an ascent pass unless the kept gradient may be reused.
        """
        args, trainer = self.args, self.trainer
        if not perturbs(args, trainer.state.global_step):
            return None
        window = [inputs]
        if args.ascent_scope == "full_batch" and len(self._window) > 1:
            window = self._window
            checks.check_window(inputs, window)
        # Before the weights are read, as both calls can change them: those of a schedule-free optimizer, and layers that merge
        # adapters in `eval()`. `in_training` leaves each module in the mode of before.
        if isinstance(trainer.optimizer, AcceleratedOptimizer):
            trainer.optimizer.train()
        with in_training(model, except_modules=()):
            pass
        reshard(model)  # evaluation may leave full weights gathered; the optimizer updates the shards
        self._parameters = parameters = parameters_to_perturb(trainer.model, args.perturb_modules)
        new = self._gradient is None or not self._may_reuse(self._gradient, window, parameters)
        if new:
            self._gradient = None  # free it before the next one is made
            self._gradient = self._ascend(model, window, parameters)
        gradient = self._gradient
        perturbation = perturbed(
            parameters,
            gradient.values,
            args.rho,
            normalize=args.normalize_perturbation,
            adaptive=args.adaptive_perturbation,
            maximize=args.perturbation_loss == "cross_entropy",
            grad_scale=gradient.scale,
        )
        if inputs is window[0]:  # the micro-batches of a window share one gradient
            norms = {"ascent_grad_norm": perturbation.grad_norm, "perturbation_norm": perturbation.norm}
            self.metrics.add({**norms, "skipped_perturbations": perturbation.skipped})
        if new:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, PerturbationCallback) and (values := callback.on_perturbation(perturbation)):
                    device = perturbation.norm.device
                    self.metrics.add({name: torch.as_tensor(value, device=device) for name, value in values.items()})
        if args.ascent_every == 1 and inputs is window[-1]:
            self._gradient = None
        return perturbation

    def _may_reuse(self, gradient: _Gradient, window: list[Any], parameters: list[nn.Parameter]) -> bool:
        """
        Tell whether a gradient serves again: for the same loss and parameters, within the window that it was taken over, and in
        the next `ascent_every - 1` optimizer steps.
        """
        age = self.trainer.state.global_step - gradient.step  # in optimizer steps
        # With `micro_batch` each micro-batch makes a list of its own, which no other shares.
        in_its_time = gradient.window is window or 0 < age < self.args.ascent_every
        same_parameters = len(parameters) == len(gradient.parameters) and all(
            map(operator.is_, parameters, gradient.parameters)
        )
        return in_its_time and gradient.loss == self.args.perturbation_loss and same_parameters

    @contextmanager
    def descent(self, model: nn.Module) -> Iterator[None]:
        """
        Run the descent at the perturbed weights inside this context manager. It leaves the statistics of BatchNorm alone, which
        get those of the ascent afterwards.
        """
        try:
            ascended = self._last_step == self.trainer.state.global_step
            check = self._descents < 2 and not self.trainer.accelerator.is_fsdp2
            with (
                modules_in_eval(model) as in_eval,
                no_optimizer_steps(self.trainer, self._parameters),
                refuse_lost_changes(self.trainer, model, self._parameters) if check else nullcontext(),
                frozen_running_statistics(model),
                self.meter.watch(model) if ascended else nullcontext(),
                nullcontext() if self._images is None else images_given_to(model, self.trainer) as images,
            ):
                yield
            if self._images is not None:
                warn_of_other_images(self.trainer, self._images, images)
                self._images = None
        except BaseException:
            reshard(model)  # or FSDP2 might go on with the perturbed weights that it gathered
            raise
        finally:
            self._parameters = []
        # A layer that the descent has in evaluation mode, frozen by `compute_loss`, for example, keeps its statistics, and the
        # next ascent leaves it in evaluation mode.
        self._modules_in_eval = in_eval
        self._descents += 1
        self._apply_statistics()

    @contextmanager
    def only_training(self, perturbed: bool) -> Iterator[None]:
        """Set `training` inside this context manager if the weights are perturbed: the trainer then refuses to evaluate and to save."""
        self.training = perturbed
        try:
            yield
        finally:
            self.training = False

    def _apply_statistics(self) -> None:
        """Give BatchNorm the running statistics that the ascent came to."""
        for layer, buffer, updated in self._statistics:
            if layer not in self._modules_in_eval:
                buffer.copy_(updated)
        self._statistics = []

    def log_descent(self, inputs: Any, loss: torch.Tensor, num_items: torch.Tensor | int | None) -> None:
        """
        Add the loss at the perturbed weights to the metrics, if there is a `clean_loss` of the same step to compare it with.
        `loss` is what the training step returned, `num_items` the `num_items_in_batch` that it got.
        """
        if self._last_step != self.trainer.state.global_step:
            return
        for batch, labels, used in self._ascent_batches:
            if batch is inputs:
                self._perturbed_losses.append(
                    self.meter.perturbed_loss(loss, labels, used, max(1, len(self._window)), num_items)
                )
                # Once, as `clean_loss`.
                if len(self._perturbed_losses) == len(self._ascent_batches):
                    self.metrics.add({"perturbed_loss": sum(self._perturbed_losses) / self._label_count})
                return

    def pop_metrics(self) -> dict[str, float]:
        """Average the metrics since the last call over steps and processes. This waits for the device."""
        metrics = self.metrics.pop()
        # Each process counted those that they skipped together.
        if self.in_sync and "skipped_perturbations" in metrics:
            metrics["skipped_perturbations"] //= self.trainer.args.world_size
        return self.meter.finish(metrics)

    # ---- The ascent pass -------------------------------------------------------

    def _ascend(self, model: nn.Module, window: list[Any], parameters: list[nn.Parameter]) -> _Gradient:
        """Take the gradient of the mean ascent loss over the micro-batches of the window."""
        trainer = self.trainer
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        first = trained != self._checked  # in the first ascent, and where layers have been frozen or unfrozen
        if first:
            self.check()  # a callback may have raised a `rho` of 0
        values = self._pass(model, window, parameters, first)
        self._checked, self._last_step = trained, trainer.state.global_step
        scaler = trainer.accelerator.scaler
        scale = None if scaler is None else scaler.scale(torch.ones((), device=trainer.args.device))
        return _Gradient(self._last_step, window, self.args.perturbation_loss, parameters, values, scale)

    def _pass(
        self, model: nn.Module, window: list[Any], parameters: list[nn.Parameter], first: bool
    ) -> list[torch.Tensor | None]:
        """
        Run the window forward and backward, with checks if it is the `first`. Keep its samples, losses and statistics; return the
        gradients (times the fp16 loss scale).
        """
        trainer, scaler, sharded = self.trainer, self.trainer.accelerator.scaler, self.trainer.accelerator.is_fsdp2
        # `autograd.grad` leaves `p.grad` and its hooks alone, and what earlier micro-batches have added there. Three cases need
        # `backward()`: FSDP2; reentrant checkpointing, found at the first loss; and layers that run a backward pass of their own
        # (reversible ones), which fill `p.grad` and give `grad` none. They are found after the first pass, which is then repeated.
        draws, use_backward = self._random_draws, sharded or self._uses_backward
        keep = len(window) > 1 or self.args.ascent_every > 1
        devices = {p.device for p in trainer.model.parameters()}
        gradients: list[torch.Tensor | None] = [None] * len(parameters)
        losses: dict[str, Any] = {"clean_loss": 0.0, "clean_accuracy": 0.0, "ascent_loss": 0.0}
        # The generators are put back after the ascent: the descent draws the same numbers, and later steps what plain training draws.
        with (
            replayed_rng(devices),
            # Hooks of parameters could step one.
            no_optimizer_steps(trainer, [p for p in trainer.model.parameters() if p.requires_grad]),
            outside_ddp(model) as inner,
            unchanged_attributes(trainer.model),
            unchanged_buffers(trainer.model) as statistics,
            in_training(model, except_modules=self._modules_in_eval or ()),
            gradients_set_aside(trainer.model) if use_backward or first else nullcontext(),
            images_given_to(inner, trainer) if first else nullcontext() as images,
            # In the first two: a momentum teacher that begins as a copy of the model moves in the second only.
            refuse_changed_parameters(trainer.model) if self._passes < 2 and not sharded else nullcontext(),
        ):
            # An own `_prepare_inputs` may draw random numbers: it is called to count the labels, and again before each forward
            # pass, in the order of the descents.
            prepare_again = len(window) > 1 and type(trainer)._prepare_inputs is not Trainer._prepare_inputs
            with replayed_rng(devices) if prepare_again else nullcontext():
                samples = [self._samples(inputs) for inputs in window]
            self._ascent_batches, self._perturbed_losses = [], []
            count = divisor = sum(count_labels(labels) for _, labels, _ in samples)
            self._label_count = count
            if self.in_sync:  # with this divisor the mean over the processes is that over all their samples
                count_here = torch.as_tensor(count, dtype=torch.float32, device=trainer.args.device)
                divisor = trainer.accelerator.reduce(count_here, "mean")
            for index, batch in enumerate(window):
                inputs, labels, whole = self._samples(batch) if prepare_again else samples[index]
                self._ascent_batches.append((batch, whole, labels.shape[:1].numel()))
                if sharded:
                    model.set_requires_gradient_sync(index == len(window) - 1)
                with trainer.compute_loss_context_manager():
                    # A copy: some models change their inputs in place, and the descent is to get them unchanged.
                    outputs = trainer.ascent_outputs(inner, recursively_apply(torch.clone, inputs))
                    logits = trainer.ascent_logits(outputs)
                    checks.check_part(logits, labels.shape[:1].numel(), whole.shape[:1].numel())
                    loss = self._loss(logits, labels, first)
                if first and index == 0 and self._passes == 0:
                    checks.warn_of_other_width(trainer, logits.shape[1])
                if first and not sharded and checks.uses_reentrant_checkpointing(loss):
                    checks.check_static_graph(trainer)
                    self._uses_backward = use_backward = True
                losses["ascent_loss"] += loss.detach() / count
                loss = loss / divisor if scaler is None else scaler.scale(loss / divisor)
                if use_backward:
                    loss.backward()
                else:
                    new = torch.autograd.grad(loss, parameters, allow_unused=True)
                    # Copies if they are kept: a CUDA graph (`torch_compile_mode="reduce-overhead"`) writes its outputs again.
                    gradients = _sum(gradients, new) if keep else list(new)
                    del new
                # Now that the gradient is there: a `compute_loss_func` may change the logits in place.
                losses["clean_accuracy"] += count_correct(logits, labels) / count
                losses["clean_loss"] += self.meter.loss(outputs, logits, labels) / count
                del outputs, logits
            if use_backward:
                gradients = [p.grad for p in parameters]
            repeat_by_backward = (
                first and not use_backward and any(p.grad is not None for p in trainer.model.parameters())
            )
        if repeat_by_backward:
            checks.check_static_graph(trainer)
            self._uses_backward, self._random_draws = True, draws
            return self._pass(model, window, parameters, first)
        self._passes += 1
        if first:
            self._images = images
        self._statistics = statistics
        if self._modules_in_eval is not None:  # else it is known only after the descent which layers train
            self._apply_statistics()
        self.metrics.add(losses)
        if sharded and self.args.ascent_scope == "full_batch":
            # As Trainer has it. With `micro_batch` it stays on: the next ascent would reduce gradients that FSDP2 had deferred.
            model.set_requires_gradient_sync(trainer.accelerator.sync_gradients)
        return average_gradients(gradients, parameters) if self.in_sync and not sharded else gradients

    def _samples(self, inputs: Any) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        """Prepare one micro-batch on the device: the samples that the ascent uses, their labels, and the labels of all."""
        if type(self.trainer)._prepare_inputs is not Trainer._prepare_inputs:
            inputs = _copy(inputs)  # it may change the batch in place, and the descent prepares it again
        inputs = self.trainer._prepare_inputs(inputs)
        # A model without an argument for labels leaves them to `compute_loss_func`, which looks for `labels`. And Trainer takes
        # every argument with "label" in its name for one, such as weights of labels.
        names = self.trainer.label_names
        self.label_name = names[0] if names and "labels" not in names else "labels"
        guessed = self.trainer.args.label_names is None
        if isinstance(inputs, Mapping) and "labels" in inputs and (guessed or self.label_name not in inputs):
            self.label_name = "labels"
        checks.check_batch(inputs, self.label_name)
        labels = inputs[self.label_name]
        if not labels.is_floating_point():
            # As models flatten them; and -100 is no class, which in 8 bits it might look like.
            labels = (labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels).long()
        batch = labels.shape[:1].numel()  # not len(), which fails on a scalar before a check names the fix
        # BatchNorm takes its running statistics from these samples, and cannot train on one.
        least = 12 if any(isinstance(m, BATCH_NORM) and m.training for m in self.trainer.model.modules()) else 2
        used = min(batch, max(least, round(self.args.ascent_fraction * batch)))
        if used == batch:
            return inputs, labels, labels
        return {key: _first(value, used, batch) for key, value in inputs.items()}, labels[:used], labels

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, first: bool) -> torch.Tensor:
        """Compute the ascent loss, summed over the samples."""
        check_classification(logits, labels)
        if first:
            checks.check_labels(self.trainer, labels, logits.shape[1])
        if self.args.perturbation_loss == "aace":
            generator = self._new_generator(logits.device) if self.args.aace_target == "random" else None
            return aace_loss(logits, labels, target=self.args.aace_target, reduction="sum", generator=generator)
        with explained_labels(labels, logits.shape[1]):
            return F.cross_entropy(in_full_precision(logits), labels, reduction="sum")

    def _new_generator(self, device: torch.device) -> torch.Generator:
        """Seed a new generator for each micro-batch. The global one is reset after each ascent, so it would repeat itself."""
        args = self.trainer.args
        place = (args.seed, self.trainer.state.global_step, args.process_index, self._random_draws)
        self._random_draws += 1
        return torch.Generator(device).manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))


def _copy(inputs: Any) -> Any:
    try:
        return recursively_apply(torch.clone, inputs)
    except Exception:  # of a kind of batch that only the Trainer of the user knows
        return inputs


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
