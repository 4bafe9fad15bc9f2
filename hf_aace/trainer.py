# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware training as a mixin for the Hugging Face Trainer, and the Trainer that has it."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer

from ._compat import TrainerWorkarounds
from .ascent import Ascent
from .checks import bare_model, check_inputs_of_model, check_mixin_order
from .model_card import write_model_card
from .perturbation import perturbed


class SharpnessAwareMixin(TrainerWorkarounds):
    r"""
    Add sharpness-aware training to a subclass of [`~transformers.Trainer`]:

    ```python
    class MyAACETrainer(SharpnessAwareMixin, MyTrainer): ...
    ```

    By default each training step first computes the gradient of the mean ascent loss at the weights `w`, moves the weights by
    it to `w'`, where the training loss is higher (down AACE's loss, or up SAM's), lets `MyTrainer.training_step` do at `w'` what
    it would have done at `w`, and puts the weights back, bit for bit, whatever happened. Both passes start from the same state of
    the random number generators, so that on the whole batch they draw the same dropout masks. BatchNorm statistics are updated
    from `w` only, and `rho=0` is `MyTrainer` itself.

    Put the mixin first among the bases. The settings are the fields of [`AACEConfig`]; `args` that is a plain
    [`~transformers.TrainingArguments`] gives each of them its default. With `model` a string, the model is loaded by
    `AutoModelForImageClassification.from_pretrained`, in 32 bits.

    Besides what `MyTrainer` logs, each training log holds averages over the steps since the last log (over their micro-batches, where
    each of these perturbs by itself) and over the processes. `clean_loss`, `clean_accuracy`, `sharpness` and `ascent_loss` are those
    of the steps that took an ascent pass only.

    - `clean_loss`: the mean training loss at `w`, on the samples of the ascent: cross-entropy with the label smoothing of the
      arguments, or what `compute_loss_func` returns,
    - `clean_accuracy`: the share of these samples that the model classifies at `w` as their labels say,
    - `sharpness`: the mean training loss at `w'` on the same samples minus `clean_loss`. If these are not
      the loss that is trained on (an overridden `compute_loss`, for example), both are left out and a warning is logged,
    - `ascent_loss`, `ascent_grad_norm`: the ascent loss at `w` and the norm of its gradient,
    - `perturbation_norm`: the distance from `w` to `w'`,
    - `rho`: its present value,
    - `skipped_perturbations`: the number (not an average) of perturbations left out because the ascent gradient was
      not finite; if each process perturbs by itself, the sum over them.

    Raises:
        `ValueError`: When it is made, when training starts or in its first steps, if the model, the data or another setting cannot be
            trained so; the message says what was found and how to mend it. Not with `rho=0`.
        `TypeError`: When a class puts it behind the Trainer among its bases.
        `RuntimeError`: In training, if its `training_step` or `get_batch_samples` is not called, or an optimizer of the perturbed
            weights steps, or the trainer evaluates, predicts or saves, while they are perturbed.
    """

    _ascent: Ascent | None = None  # until the Trainer is made: its constructor may evaluate or save

    def __init__(self, *args, **kwargs):
        if isinstance(kwargs.get("model"), str):
            kwargs["model"] = _load_model(kwargs["model"])
        elif args and isinstance(args[0], str):
            first = next(iter(inspect.signature(super().__init__).parameters.values()))
            # In a custom Trainer the first argument may be another string.
            if first.name == "model" or first.kind is first.VAR_POSITIONAL:
                args = (_load_model(args[0]), *args[1:])
        super().__init__(*args, **kwargs)
        self._ascent = Ascent(self)
        self.add_callback(self._ascent)
        self.add_callback(self._ascent.watch)
        self._ascent.check()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        check_mixin_order(cls, SharpnessAwareMixin)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self._ascent.watch.note_training_step()
        with (
            self.perturbed_weights(model, inputs) as perturbation,
            self._ascent.only_training(perturbation is not None),
        ):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._ascent.log_descent(inputs, loss, num_items_in_batch)
        return loss

    @contextmanager
    def perturbed_weights(self, model: nn.Module, inputs: dict[str, torch.Tensor | Any]) -> Iterator[perturbed | None]:
        """
        Perturb the weights inside this context manager, as a training step needs it.

        Args:
            model (`nn.Module`): The model that the training step got.
            inputs (`dict[str, torch.Tensor | Any]`): The micro-batch that the training step got. Not modified.

        Returns:
            [`perturbed`]: The perturbation, or `None` if this step is a plain one.
        """
        perturbation = self._ascent.prepare_perturbation(model, inputs)
        if perturbation is None:
            yield None
        else:
            with perturbation, self._ascent.descent(model):
                yield perturbation

    def forget_ascent(self) -> None:
        """Make the next perturbed step take an ascent pass of its own, whatever `ascent_every` says. Call it between steps."""
        self._ascent.forget()

    def ascent_outputs(self, model: nn.Module, inputs: Mapping[str, torch.Tensor | Any]) -> Any:
        """
        Compute the model's outputs in the ascent pass. By default the model gets of the batch what its `forward` has an argument for,
        by name (all of it, if that takes any keyword), but no labels unless it demands them. Override it for a model that your
        `compute_loss` calls otherwise, as one of torchvision: `return model(inputs["pixel_values"])`; and for one whose logits depend
        on the labels, as those with a margin do: `return model(**inputs)`.

        Args:
            model (`nn.Module`): The model to call.
            inputs (`Mapping[str, torch.Tensor | Any]`):
                The samples of the ascent pass, with their labels and all else that batches hold.

        Returns:
            `Any`: The outputs, for [`~SharpnessAwareMixin.ascent_logits`]. A tuple begins with the logits.

        Raises:
            `ValueError`: If `forward` needs what the batch does not hold.
        """
        label = self._ascent.label_name
        accepted = dict(inspect.signature(bare_model(self).forward).parameters)
        anything = any(argument.kind is argument.VAR_KEYWORD for argument in accepted.values())
        needs_label = label in accepted and accepted[label].default is inspect.Parameter.empty
        if not needs_label:
            accepted.pop(label, None)
        # The rest, sample weights, for example, is for an overridden `compute_loss`.
        kept = {
            key: value
            for key, value in inputs.items()
            if (anything or key in accepted) and (needs_label or key != label)
        }
        check_inputs_of_model(self, accepted, kept.keys(), inputs.keys())
        try:
            outputs = model(**kept)
        except KeyError as error:
            if error.args != (label,):
                raise
            raise ValueError(
                f"`forward` of {type(self.model).__name__} needs `{label}`, for which it has no argument of that name. Give it one, or "
                f"override `ascent_outputs` of {type(self).__name__} to call the model with the labels."
            ) from error
        return outputs[1:] if needs_label and isinstance(outputs, tuple) else outputs

    def ascent_logits(self, outputs: Any) -> torch.Tensor:
        """
        Return the logits that the ascent loss is computed from. Override it for a model that returns them elsewhere.

        Args:
            outputs (`Any`): What [`~SharpnessAwareMixin.ascent_outputs`] returned.

        Returns:
            `torch.Tensor` of shape `(batch, classes)`: The logits.

        Raises:
            `ValueError`: If there are none.
        """
        logits, found = outputs, f"a {type(outputs).__name__}"
        if isinstance(outputs, Mapping):
            logits, found = outputs.get("logits"), sorted(outputs)
        elif isinstance(outputs, (tuple, list)):
            # Some have a loss that is None without labels.
            logits = next((value for value in outputs[:2] if value is not None), None)
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f"The outputs of {type(self.model).__name__} hold no tensor `logits`, only {found}. Override "
                f"`ascent_logits` of {type(self).__name__} to return them."
            )
        return logits

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._ascent.reset()

    def evaluate(self, *args, **kwargs):
        self._check_unperturbed("evaluate")
        return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        self._check_unperturbed("predict")
        return super().predict(*args, **kwargs)

    def save_model(self, *args, **kwargs):
        self._check_unperturbed("save_model")
        return super().save_model(*args, **kwargs)

    def _check_unperturbed(self, method: str) -> None:
        if self._ascent is not None and self._ascent.training:
            raise RuntimeError(
                f"`{method}` was called inside `training_step` or `compute_loss`, where the weights are perturbed. Call it in a "
                f"callback (`on_step_end`), or in `training_step` of {type(self).__name__}, after `super().training_step`."
            )

    def get_batch_samples(self, *args, **kwargs):
        batch_samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._ascent.watch.note_window(batch_samples)
        self._ascent.begin_window(batch_samples)
        return batch_samples, num_items_in_batch

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and (metrics := self._ascent.pop_metrics()):
            logs = {**logs, **metrics, "rho": self._ascent.args.rho}
        super().log(logs, *args, **kwargs)


class AACETrainer(SharpnessAwareMixin, Trainer):
    r"""
    [`~transformers.Trainer`] with sharpness-aware training. Swap the one class name; to change a setting, swap
    [`~transformers.TrainingArguments`] for [`AACEConfig`] too.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `nn.Module`, *optional*):
            The model, or the hub id or path of an image classifier, which is then loaded in 32 bits, with the classes that it
            has. For other classes load it yourself, with `num_labels`.
        args ([`AACEConfig`] or [`~transformers.TrainingArguments`], *optional*):
            The arguments. With plain ones every field of [`AACEConfig`] has its default.
        **kwargs:
            Everything else that [`~transformers.Trainer`] takes.

    See [`SharpnessAwareMixin`] for what it does, logs and raises.

    Example:

    ```python
    from transformers import AutoModelForImageClassification
    from hf_aace import AACEConfig, AACETrainer

    trainer = AACETrainer(
        model=AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=3),
        args=AACEConfig(output_dir="vit", rho=0.01, bf16=True),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    @functools.wraps(Trainer.__init__)  # for the signature that help and editors show
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def create_model_card(self, *args, facts: dict[str, str] | None = None, **metadata) -> None:
        """
        Write the model card, `README.md` in the output directory: Trainer's metadata, and a text that tells the settings,
        the results, the cost, and how to load and to cite the model. `push_to_hub` calls it.

        Args:
            *args: Positional arguments of [`~transformers.Trainer.create_model_card`]: language, licence, tags and so on.
            facts (`dict[str, str]`, *optional*): Facts about the run by title, for the section on the training.
            **metadata:
                Keyword arguments of [`~transformers.Trainer.create_model_card`], and what else
                [`~transformers.modelcard.TrainingSummary.from_trainer`] takes, such as `dataset_metadata`.
        """
        if self.is_world_process_zero():
            named = inspect.signature(super().create_model_card).bind_partial(*args).arguments
            write_model_card(self, self._ascent.args, self._ascent.first_step, facts=facts, **named, **metadata)


def _load_model(name: str) -> PreTrainedModel:
    # The checkpoint may be in 16 bits, which cannot hold a perturbation.
    return AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
