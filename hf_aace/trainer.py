# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware training as a mixin for the Hugging Face Trainer, and the Trainer that has it."""

import functools
import inspect
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate.optimizer import AcceleratedOptimizer
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer, TrainerCallback
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging

from ._compat import load_converted_weights, needs_conversion, without_input_embeddings
from .config import AACEArguments
from .distributed import (
    average_gradients,
    check_distributed,
    mean_over_processes,
    outside_ddp,
    reshard,
    sum_over_processes,
)
from .losses import aace_loss, check_classification, check_label_values, count_correct, count_labels
from .model_card import describe_hardware, model_card_text
from .perturbation import (
    check_precision,
    frozen_running_statistics,
    in_training,
    perturbed,
    replayed_rng,
    unchanged_buffers,
)


logger = logging.get_logger(__name__)


class PerturbationCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that is also told of each perturbation:

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
            `dict[str, torch.Tensor]`, *optional*: Scalars on the device (reading them would wait for it), which are averaged
            over the steps and the processes and logged beside those of the trainer. All processes must return the same names.
        """


class SharpnessAwareMixin:
    r"""
    Gives sharpness-aware training to a subclass of [`~transformers.Trainer`]:

    ```python
    class MyAACETrainer(SharpnessAwareMixin, MyTrainer): ...
    ```

    Each training step first computes the gradient of the mean ascent loss (AACE by default) at the weights `w`, moves
    the weights along it to `w'`, lets `MyTrainer.training_step` do at `w'` what it would have done at `w`, and puts
    the weights back, bit for bit, whatever happened. Both passes see the same random numbers, BatchNorm statistics are
    updated from `w` only, and `rho=0` is `MyTrainer` itself.

    Put the mixin first among the bases. The settings are the fields of [`AACEConfig`]; `args` that is a plain
    [`~transformers.TrainingArguments`] gives each of them its default. With `model` a string, the model is loaded by
    `AutoModelForImageClassification.from_pretrained`, in 32 bits.

    Besides what `MyTrainer` logs, each training log holds, averaged over the steps since the last log (the first four over
    those that took an ascent pass) and over the processes:

    - `clean_loss`: the training loss at `w`, on the samples of the ascent pass: cross-entropy with the label smoothing
      of the arguments, or what `compute_loss_func` returns (not what an overridden `compute_loss` does),
    - `clean_accuracy`: the share of these samples that the model classifies at `w` as their labels say,
    - `sharpness`: the training loss at `w'` (Trainer's own `loss`) minus `clean_loss`,
    - `ascent_loss`, `ascent_grad_norm`: the ascent loss at `w` and the norm of its gradient,
    - `perturbation_norm`: the distance from `w` to `w'`,
    - `rho`: its present value,
    - `skipped_perturbations`: the number (not an average) of perturbations left out because the ascent gradient was
      not finite; if each process perturbs by itself, the sum over them.

    Raises:
        `ValueError`: When it is made, or when training starts, if the model, the data or another setting cannot be
            trained so; the message says what was found and how to mend it. Not with `rho=0`.
        `TypeError`: When a class puts it behind the Trainer among its bases.
    """

    def __init__(self, *args, **kwargs):
        if isinstance(kwargs.get("model"), str):
            kwargs["model"] = _load_model(kwargs["model"])
        elif args and isinstance(args[0], str):
            first = next(iter(inspect.signature(super().__init__).parameters.values()))
            if first.name == "model" or first.kind is first.VAR_POSITIONAL:  # else a string of a Trainer of one's own
                args = (_load_model(args[0]), *args[1:])
        super().__init__(*args, **kwargs)
        self._aace_metrics = _IntervalMetrics()
        self._aace_window = []  # the micro-batches of the present optimizer step
        self._aace_perturbation = None  # what `ascent_scope="full_batch"` shares among them
        self._aace_kept = None  # the ascent gradient, for the steps that reuse it
        self._aace_first_step = True
        self._aace_uses_backward = False
        self._aace_evaluating = []  # the modules that the last descent pass had in evaluation mode
        self._aace_statistics = []  # those of BatchNorm that wait for the first descent pass
        self._aace_draws = 0
        self._check_sharpness_aware()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(SharpnessAwareMixin):
            raise TypeError(
                f"{cls.__name__} would train plainly: put SharpnessAwareMixin before the Trainer class among its bases."
            )

    @property
    def _aace_args(self) -> AACEArguments:
        return self.args if isinstance(self.args, AACEArguments) else AACEArguments()

    # ---- The step --------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], *args, **kwargs) -> torch.Tensor:
        with self.perturbed_weights(model, inputs) as perturbation:
            if perturbation is None:
                return super().training_step(model, inputs, *args, **kwargs)
            try:
                with frozen_running_statistics(model):
                    loss = super().training_step(model, inputs, *args, **kwargs)
            except BaseException:
                reshard(model)  # or FSDP2 might go on with the perturbed weights that it gathered
                raise
        # What the descent does not train, BatchNorm that `compute_loss` freezes, say, the next ascent is not to train either.
        self._aace_evaluating = [module for module in model.modules() if not module.training]
        for layer, buffer, updated in self._aace_statistics:
            if layer.training:
                buffer.copy_(updated)
        self._aace_statistics = []
        if self.accelerator.sync_gradients:  # the last micro-batch of the optimizer step
            self._aace_perturbation = None
        if self._aace_kept is None or self._aace_kept.step == self.state.global_step:
            # There is a `clean_loss` of the same step to compare it with. Trainer's loss is this micro-batch's share of the
            # optimizer step's mean.
            self._aace_metrics.add({"perturbed_loss": loss * max(1, len(self._aace_window))})
        return loss

    def perturbed_weights(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any]) -> perturbed | nullcontext:
        """
        The ascent pass of a training step.

        Args:
            model (`nn.Module`): The model that the training step got.
            inputs (`dict[str, torch.Tensor | Any]`): The micro-batch that the training step got. Not modified.

        Returns:
            [`perturbed`]: The context inside which the weights are the perturbed ones; or one that gives `None` and
            does nothing if this step is a plain one.
        """
        args = self._aace_args
        if args.rho == 0 or self.state.global_step % args.perturb_every != 0:
            return nullcontext()
        if args.ascent_scope == "micro_batch" or len(self._aace_window) < 2:
            return self._perturbation(model, [inputs])
        if not any(inputs is batch for batch in self._aace_window):
            raise ValueError(
                '`ascent_scope="full_batch"` takes its ascent from the batches as `get_batch_samples` returned them, but '
                "`training_step` got another: change batches in the `get_batch_samples` of a class behind "
                'SharpnessAwareMixin, or in the data collator, or set `ascent_scope="micro_batch"`.'
            )
        if self._aace_perturbation is None:
            self._aace_perturbation = self._perturbation(model, self._aace_window)
        return self._aace_perturbation

    def forget_ascent(self) -> None:
        """Makes the next perturbed step take an ascent pass of its own, whatever `ascent_every` says."""
        self._aace_kept = None

    def ascent_outputs(self, model: nn.Module, inputs: Mapping[str, torch.Tensor | Any]) -> Any:
        """
        The model's outputs in the ascent pass. By default the model gets of the batch what its `forward` has an argument for,
        by name, but no labels unless it demands them. Override it for a model that your `compute_loss` calls otherwise, as
        one of torchvision: `return model(inputs["pixel_values"])`.

        Args:
            model (`nn.Module`): The model to call.
            inputs (`Mapping[str, torch.Tensor | Any]`):
                The samples of the ascent pass, with their labels and all else that batches hold.

        Returns:
            `Any`: What [`~SharpnessAwareMixin.ascent_logits`] finds the logits in, without a loss at the head of a tuple.

        Raises:
            `ValueError`: If `forward` needs what the batch does not hold.
        """
        label = self._aace_label_name
        inner = unwrap_peft_model(self._unwrapped_model())
        accepted = inspect.signature(inner.forward).parameters
        anything = any(argument.kind is argument.VAR_KEYWORD for argument in accepted.values())
        demanded = {
            name
            for name, argument in accepted.items()
            if argument.default is argument.empty
            and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
        }
        if missing := sorted(demanded - inputs.keys()):
            raise ValueError(
                f"`forward` of {type(self.model).__name__} needs {missing}, got a batch with {sorted(inputs)}. Name the "
                f"columns alike, or override `ascent_outputs` of {type(self).__name__} to call the model."
            )
        # What is not accepted, sample weights say, is for an overridden `compute_loss`.
        kept = {key: value for key, value in inputs.items() if key != label and (anything or key in accepted)}
        if label not in demanded:
            return model(**kept)
        outputs = model(**kept, **{label: inputs[label]})
        return outputs[1:] if isinstance(outputs, tuple) else outputs

    def ascent_logits(self, outputs: Any) -> torch.Tensor:
        """
        The logits that the ascent loss is computed from. Override it for a model that returns them elsewhere.

        Args:
            outputs (`Any`): What [`~SharpnessAwareMixin.ascent_outputs`] returned.

        Returns:
            `torch.Tensor` of shape `(batch, classes)`: The logits.

        Raises:
            `ValueError`: If there are none.
        """
        if isinstance(outputs, torch.Tensor):
            return outputs
        if not isinstance(outputs, Mapping):
            return outputs[1] if outputs[0] is None else outputs[0]  # some have a loss that is None without labels
        if "logits" not in outputs:
            raise ValueError(
                f"The outputs of {type(self.model).__name__} hold no `logits`, only {sorted(outputs)}. Override "
                f"`ascent_logits` of {type(self).__name__} to return them."
            )
        return outputs["logits"]

    def _perturbation(self, model: nn.Module, window: list[dict[str, torch.Tensor | Any]]) -> perturbed:
        """The perturbation by the gradient of the mean ascent loss over the micro-batches of `window`, or by an earlier one."""
        args = self._aace_args
        if isinstance(self.optimizer, AcceleratedOptimizer):
            self.optimizer.train()  # a schedule-free one moves the weights here: before we look at them
        reshard(model)  # evaluation leaves some weights gathered: those are not the ones that the optimizer has
        parameters = self._perturbed_parameters()
        ascent = self._aace_kept
        if new := ascent is None or not ascent.serves(self.state.global_step, args, parameters):
            ascent = self._ascend(model, window, parameters)
            self._aace_kept = ascent if args.ascent_every > 1 else None
        perturbation = perturbed(
            parameters,
            ascent.gradients,
            args.rho,
            normalize=args.normalize_perturbation,
            adaptive=args.adaptive_perturbation,
            maximize=args.perturbation_loss == "cross_entropy",
            grad_scale=ascent.grad_scale,
            reusable=len(window) > 1,
        )
        self._aace_metrics.add(
            {
                "ascent_grad_norm": perturbation.grad_norm,
                "perturbation_norm": perturbation.norm,
                "skipped_perturbations": perturbation.skipped,
            }
        )
        if new:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, PerturbationCallback) and (values := callback.on_perturbation(perturbation)):
                    self._aace_metrics.add(values)
        return perturbation

    def _ascend(
        self, model: nn.Module, window: list[dict[str, torch.Tensor | Any]], parameters: list[nn.Parameter]
    ) -> "_Ascent":
        """The ascent pass over the micro-batches of `window`."""
        if self._aace_first_step:
            self._check_sharpness_aware()  # a callback may have raised a `rho` of 0
            self._check_no_step_inside_backward(parameters)
        buffers = [b.clone() for b in self.model.buffers()] if self._aace_first_step else []
        try:
            gradients, losses = self._ascent_pass(model, window, parameters)
        except RuntimeError as error:
            # Reentrant activation checkpointing cannot serve `autograd.grad`, and says so only in the backward pass.
            if self._aace_uses_backward or "use_reentrant=True" not in str(error):
                raise
            if self.args.ddp_static_graph:
                raise ValueError(
                    "Reentrant activation checkpointing with `ddp_static_graph` does not go with sharpness-aware training: "
                    'DDP would count the ascent pass too. Set `activation_checkpointing_kwargs={"use_reentrant": False}`.'
                ) from error
            self._aace_uses_backward = True
            for buffer, before in zip(self.model.buffers(), buffers, strict=False):  # no copies after the first step
                buffer.copy_(before)  # BatchNorm counts each batch once
            gradients, losses = self._ascent_pass(model, window, parameters)
        if self._aace_first_step:
            # Which layers the descent pass trains is not known yet, so their statistics wait for it.
            layers = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            self._aace_statistics = [(layer, b, b.clone()) for layer in layers for b in layer.buffers()]
            for buffer, before in zip(self.model.buffers(), buffers, strict=False):
                buffer.copy_(before)
        self._aace_first_step = False
        self._aace_metrics.add(losses)
        scaler = self.accelerator.scaler
        return _Ascent(
            step=self.state.global_step,
            loss=self._aace_args.perturbation_loss,
            parameters=parameters,
            gradients=gradients,
            grad_scale=None if scaler is None else scaler.scale(torch.ones((), device=losses["ascent_loss"].device)),
        )

    def _ascent_pass(
        self, model: nn.Module, window: list[dict[str, torch.Tensor | Any]], parameters: list[nn.Parameter]
    ) -> tuple[list[torch.Tensor | None], dict[str, torch.Tensor]]:
        """The gradients of the mean ascent loss (times the fp16 loss scale), and the mean losses at these weights."""
        synced, sharded = self._perturbs_in_sync(), self.accelerator.is_fsdp2
        use_backward = sharded or self._aace_uses_backward
        keep = len(window) > 1 or self._aace_args.ascent_every > 1
        gradients = [None] * len(parameters)
        losses = {"clean_loss": 0.0, "clean_accuracy": 0.0, "ascent_loss": 0.0}
        # The descent pass is to draw the same random numbers, and the run those that it would without an ascent pass.
        with (
            replayed_rng({p.device for p in self.model.parameters()}),
            outside_ddp(model) as inner,
            unchanged_buffers(self.model),
            in_training(model, but=self._aace_evaluating),
            _gradients_set_aside(self.model) if use_backward else nullcontext(),
        ):
            samples = [self._ascent_samples(inputs) for inputs in window]
            count = share = sum(count_labels(labels) for _, labels in samples)
            if synced:  # what the processes divide by, so that the mean over them is that over all their samples
                share = mean_over_processes(torch.as_tensor(count, dtype=torch.float32, device=self.args.device))
            for index, (inputs, labels) in enumerate(samples):
                if sharded:
                    model.set_requires_gradient_sync(index == len(samples) - 1)
                with self.compute_loss_context_manager():
                    outputs = self.ascent_outputs(inner, _copy(inputs))
                    logits = self.ascent_logits(outputs)
                    ascent_loss = self._ascent_loss(logits, labels)
                losses["ascent_loss"] += ascent_loss.detach() / count
                ascent_loss = ascent_loss / share
                if self.accelerator.scaler is not None:
                    ascent_loss = self.accelerator.scaler.scale(ascent_loss)
                if use_backward:
                    ascent_loss.backward()
                else:
                    # Not `backward()`: that would add to the gradients of earlier micro-batches and run what is hooked
                    # to them.
                    new = torch.autograd.grad(ascent_loss, parameters, allow_unused=True)
                    # Unless they are used up before the next pass, copies: what a CUDA graph
                    # (`torch_compile_mode="reduce-overhead"`) returned lasts no longer.
                    gradients = _sum(gradients, new) if keep else new
                # Now that the gradient is there: a `compute_loss_func` may change the logits in place.
                with torch.no_grad():
                    losses["clean_accuracy"] += count_correct(logits, labels) / count
                    losses["clean_loss"] += self._clean_loss(outputs, logits, labels) / count
                del outputs, logits
            if use_backward:
                gradients = [p.grad for p in parameters]
        if sharded and self._aace_args.ascent_scope == "full_batch":
            # As Trainer has it. For micro-batches that perturb by themselves it stays on: what FSDP2 puts off to the last
            # one, it would reduce in the next ascent pass.
            model.set_requires_gradient_sync(self.accelerator.sync_gradients)
        if synced and not sharded:
            gradients = average_gradients(gradients, parameters)
        return gradients, losses

    def _unwrapped_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _perturbs_in_sync(self) -> bool:
        """Whether all processes perturb by one gradient."""
        return self.args.world_size > 1 and (self._aace_args.sync_ascent or self.accelerator.is_fsdp2)

    @property
    def _aace_label_name(self) -> str:
        # A model without an argument for labels leaves them to `compute_loss_func`, which looks for `labels`.
        names = self.label_names
        return names[0] if names and "labels" not in names else "labels"

    def _ascent_samples(self, inputs: dict[str, torch.Tensor | Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """The samples of one micro-batch for the ascent pass, on the device, and their labels."""
        inputs, name = self._prepare_inputs(inputs), self._aace_label_name
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"Sharpness-aware training needs batches that are dictionaries, got a {type(inputs).__name__}. Let the "
                f"`data_collator` return one, with the labels under `{name}`."
            )
        labels = inputs.get(name)
        if not isinstance(labels, torch.Tensor):
            others = sorted(key for key in inputs if key != name)
            raise ValueError(
                f"Sharpness-aware training needs the labels of each batch under `{name}`, got a batch with only {others}. "
                "Add them to the data set, or set `label_names` of the training arguments."
            )
        fraction = self._aace_args.ascent_fraction
        if fraction < 1 and labels.dim() > 0:
            batch = labels.shape[0]
            used = max(1, round(fraction * batch))
            inputs = {key: _first(value, used, batch) for key, value in inputs.items()}
        labels = inputs[name]
        if labels.is_floating_point():
            return inputs, labels
        # As models flatten them; and -100 is no class, which in 8 bits it might look like.
        return inputs, (labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels).long()

    def _ascent_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The ascent loss, summed over the samples."""
        check_classification(logits, labels)
        if self._aace_first_step:
            check_label_values(labels, logits.shape[1])
            self._check_soft_labels_are_trained_on(labels)
        if self._aace_args.perturbation_loss == "aace":
            target = self._aace_args.aace_target
            generator = self._new_generator(logits.device) if target == "random" else None
            return aace_loss(logits, labels, target=target, reduction="sum", generator=generator)
        try:
            return F.cross_entropy(logits, labels, reduction="sum")
        except IndexError:
            check_label_values(labels, logits.shape[1])  # a clearer error, if the labels are the reason
            raise

    def _new_generator(self, device: torch.device) -> torch.Generator:
        """For each micro-batch another. Not the global one: it is set back after every ascent, and would draw the same again."""
        place = (self.args.seed, self.state.global_step, self.args.process_index, self._aace_draws)
        self._aace_draws += 1
        return torch.Generator(device).manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _clean_loss(self, outputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The training loss at the present weights, summed over the samples."""
        if self.compute_loss_func is not None:
            # As Trainer counts them: of probabilities every entry.
            items = labels.numel() if labels.is_floating_point() else count_labels(labels)
            return self.compute_loss_func(outputs, labels, num_items_in_batch=items) * count_labels(labels)
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.args.label_smoothing_factor)

    def _perturbed_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that `perturb_modules` matches; looked up anew, as callbacks may unfreeze some."""
        pattern = self._aace_args.perturb_modules
        # FSDP2's activation checkpointing and compilation put their wrappers into the names.
        trainable = {
            name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): p
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        parameters = [p for name, p in trainable.items() if pattern is None or re.search(pattern, name)]
        if not trainable:
            raise ValueError(
                "The model has no parameter that requires a gradient, so there is nothing to train. To evaluate it only, "
                "set `rho=0`."
            )
        if not parameters:
            names = list(trainable)
            raise ValueError(
                f"`perturb_modules={pattern!r}` matches none of the {len(names)} trainable parameters, such as "
                f"{names[:3]}. It is a regular expression, searched in the parameter names; leave it out to perturb them "
                "all."
            )
        return parameters

    # ---- What Trainer calls ----------------------------------------------------

    def _inner_training_loop(self, *args, **kwargs):
        self._check_sharpness_aware()  # the model or the arguments may be others than at construction
        self._aace_metrics.reset()
        self._aace_first_step = True
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:  # batches, weights and gradients: let go of the memory
            self._aace_window, self._aace_perturbation, self._aace_kept = [], None, None
            self._aace_evaluating, self._aace_statistics = [], []

    def get_batch_samples(self, *args, **kwargs):
        batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._aace_window, self._aace_perturbation, self._aace_draws = batch_samples, None, 0
        return batch_samples, num_items_in_batch

    def _save_checkpoint(self, *args, **kwargs) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.forget_ascent()  # a run that goes on from the checkpoint has none either: both are to do the same

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and (metrics := self._aace_metrics.pop()):
            # Each process counted what they skipped together.
            if self._perturbs_in_sync() and "skipped_perturbations" in metrics:
                metrics["skipped_perturbations"] //= self.args.world_size
            logs = {**logs, **metrics, "rho": self._aace_args.rho}
        super().log(logs, *args, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        with without_input_embeddings(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled and needs_conversion(self.model, resume_from_checkpoint):
            load_converted_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled and needs_conversion(self.model, self.state.best_model_checkpoint):
            load_converted_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    # ---- What cannot work ------------------------------------------------------

    def _check_sharpness_aware(self) -> None:
        """Raises an error that names the fix for what cannot be trained, before any weight moves."""
        args = self._aace_args
        args.check_aace_arguments()
        if args.rho == 0:
            return
        check_distributed(self)
        if self.accelerator.is_fsdp2 and not args.sync_ascent and self.is_world_process_zero():
            logger.warning_once(
                "`sync_ascent=False` is taken as True with FSDP2: the shards of each weight live on many processes, which "
                "can only perturb it together."
            )
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optimizer or "layerwise" in optimizer:
            raise ValueError(
                f"`optim={optimizer!r}` updates the weights inside the backward pass, while they are perturbed, so that "
                "the update would be lost. Use an optimizer that steps after it, such as `adamw_torch`."
            )
        config = getattr(self.model, "config", None)  # any `nn.Module` may be trained
        problem_type, num_labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
        if problem_type in ("regression", "multi_label_classification") or num_labels == 1:
            raise ValueError(
                "Sharpness-aware training needs a single-label classifier with at least 2 classes, got a model with "
                f"`problem_type={problem_type!r}` and `num_labels={num_labels}`. Use plain training (`rho=0`), or a model "
                "with one score for each class."
            )
        check_precision(self._perturbed_parameters())

    def _check_no_step_inside_backward(self, parameters: list[nn.Parameter]) -> None:
        if any(p._post_accumulate_grad_hooks for p in parameters):
            raise ValueError(
                "Some parameters have hooks that run inside the backward pass (`register_post_accumulate_grad_hook`), as "
                "optimizers that step there do: they would act on the perturbed weights. Step the optimizer after it."
            )

    def _check_soft_labels_are_trained_on(self, labels: torch.Tensor) -> None:
        own_loss = self.compute_loss_func is not None or type(self).compute_loss is not Trainer.compute_loss
        inner = unwrap_peft_model(self._unwrapped_model())
        if labels.is_floating_point() and isinstance(inner, PreTrainedModel) and not own_loss:
            raise ValueError(
                f"The labels are floating-point, of shape {tuple(labels.shape)}, which the model itself takes for "
                "multi-label targets. For soft labels (mixup, cutmix) pass a `compute_loss_func` that computes their "
                "cross-entropy."
            )


class AACETrainer(SharpnessAwareMixin, Trainer):
    r"""
    [`~transformers.Trainer`] with sharpness-aware training: swap the one class name, and [`AACEConfig`] for
    [`~transformers.TrainingArguments`] to change a setting.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `nn.Module`, *optional*):
            The model, or the hub id or path of an image classifier, which is then loaded in 32 bits.
        args ([`AACEConfig`] or [`~transformers.TrainingArguments`], *optional*):
            The arguments. With plain ones every field of [`AACEConfig`] has its default.
        **kwargs:
            Everything else that [`~transformers.Trainer`] takes.

    See [`SharpnessAwareMixin`] for what it does, logs and raises.

    Example:

    ```python
    from hf_aace import AACEConfig, AACETrainer

    trainer = AACETrainer(
        model="google/vit-base-patch16-224",
        args=AACEConfig(output_dir="vit", rho=0.01, bf16=True),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ("hf_aace", "sharpness-aware-minimization")

    @functools.wraps(Trainer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def create_model_card(
        self, language: str | None = None, license: str | None = None, tags: str | list[str] | None = None, **kwargs
    ) -> None:
        """
        Writes the model card, `README.md` in the output directory: Trainer's metadata, and a text that tells the settings,
        the results, the cost, and how to load and to cite the model. `push_to_hub` calls it.

        Args:
            language (`str`, *optional*): The language of the model, if it has one.
            license (`str`, *optional*): The licence. Defaults to that of the model on the Hub that it started from.
            tags (`str` or `list[str]`, *optional*): Tags besides those of the trainer and those of a card that is there.
            **kwargs: What else [`~transformers.Trainer.create_model_card`] takes.
        """
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, "README.md")
        present = ModelCard.load(path).data if path.is_file() else ModelCardData()
        own = self._tag_names if self._aace_args.rho > 0 else ()
        kept = (present.tags or []) if own or tags is not None else []  # Trainer drops them unless it is given others
        tags = [*([tags] if isinstance(tags, str) else tags or []), *own, *kept]
        summary = TrainingSummary.from_trainer(
            self, language=language, license=license, tags=list(dict.fromkeys(tags)), **kwargs
        )
        text = model_card_text(
            summary,
            self._aace_args,
            model_id=self.hub_model_id or summary.model_name,
            log_history=self.state.log_history,
            hardware=describe_hardware(self.args.device, self.args.world_size),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"---\n{yaml.dump(summary.create_metadata(), sort_keys=False)}---\n\n{text}", encoding="utf-8")
        if present.library_name == "peft":  # peft wrote it when it saved the adapters, and completes it
            self.accelerator.unwrap_model(self.model).create_or_update_model_card(self.args.output_dir)


@dataclass
class _Ascent:
    """What an ascent pass gave, and when."""

    step: int
    loss: str
    parameters: list[nn.Parameter]
    gradients: list[torch.Tensor | None]
    grad_scale: torch.Tensor | None

    def serves(self, step: int, args: AACEArguments, parameters: list[nn.Parameter]) -> bool:
        """Whether this later step is to reuse it, as one of the `ascent_every` from its own on. Callbacks may have changed the rest."""
        same = len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))
        return 0 < step - self.step < args.ascent_every and self.loss == args.perturbation_loss and same


class _IntervalMetrics:
    """Sums of scalars on the device since the last log, which is when they are read and the device is waited for."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._sums = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        device = next(iter(values.values())).device
        stacked = torch.stack([value.detach().to(device, torch.float32) for value in values.values()])
        finite = torch.isfinite(stacked)
        total, count = self._sums.get(tuple(values), (0.0, 0))
        self._sums[tuple(values)] = (total + torch.where(finite, stacked, 0.0), count + finite.int())

    def pop(self) -> dict[str, float]:
        """
        The averages, over the steps since the last call and over the processes, of what was added; `{}` if nothing was.
        Only finite values count.
        """
        if not self._sums:
            return {}
        names = [name for group in self._sums for name in group]
        totals = torch.cat([torch.stack((total, count.float())) for total, count in self._sums.values()], dim=1)
        self.reset()
        sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for name, total, count in zip(names, *sum_over_processes(totals).tolist(), strict=True):
            sums[name] += total  # a callback may return a name now with others and now without
            counts[name] += count
        means = {name: total / counts[name] if counts[name] else math.nan for name, total in sums.items()}
        if "clean_loss" in means:  # some steps of these took an ascent pass
            means["sharpness"] = means.pop("perturbed_loss", math.nan) - means["clean_loss"]
        if "skipped_perturbations" in means:
            means["skipped_perturbations"] = round(sums["skipped_perturbations"])
        first = ["clean_loss", "clean_accuracy", "sharpness", "ascent_loss"]
        return {name: means[name] for name in first if name in means} | means


@contextmanager
def _gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Context manager inside which the parameters have no gradients yet, and after which they have those of before."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    accumulated = [p.grad for p in trainable]
    try:
        for p in trainable:
            p.grad = None
        yield
    finally:
        for p, grad in zip(trainable, accumulated, strict=True):
            p.grad = grad


def _load_model(name: str) -> PreTrainedModel:
    # The checkpoint may be in 16 bits, which cannot hold a perturbation.
    return AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)


def _first(data: Any, used: int, batch: int) -> Any:
    """The first `used` samples of whatever in `data` has one entry for each of the `batch` samples."""
    if isinstance(data, Mapping):
        return {key: _first(value, used, batch) for key, value in data.items()}
    if isinstance(data, torch.Tensor):
        return data[:used] if data.dim() > 0 and data.shape[0] == batch else data
    if isinstance(data, (tuple, list)):
        parts = type(data)(_first(value, used, batch) for value in data)
        whole = all(part is value for part, value in zip(parts, data, strict=True))
        return data[:used] if whole and len(data) == batch else parts
    return data


def _copy(data: Any) -> Any:
    """A copy of the tensors in a batch, as some models change theirs in place, and the descent pass is to get it unchanged."""
    if isinstance(data, Mapping):
        return {key: _copy(value) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return type(data)(map(_copy, data))
    return data.clone() if isinstance(data, torch.Tensor) else data


def _sum(total: list[torch.Tensor | None], new: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Adds `new` to `total`, entry by entry, in place where there is something, else to a copy; `None` stands for zero."""
    return [a if b is None else b.clone() if a is None else a.add_(b) for a, b in zip(total, new, strict=True)]
