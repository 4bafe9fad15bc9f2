# SPDX-License-Identifier: Apache-2.0
"""The training loss before and after the perturbation, measured alike for the log, and compared with the loss that is trained on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from .losses import count_labels


logger = logging.get_logger(__name__)

_NOT_LOGGED = "`clean_loss` and `sharpness` are not logged: "


class LossMeter:
    """
    Measures the training loss by the logits: the cross-entropy, with the label smoothing of the arguments, or what
    `compute_loss_func` returns. Trainer's own number will not do: for many models it grows with accumulation and processes.

    Nothing here can end a run. What cannot be measured is left out of the log, which is said once.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Begin anew, as when training begins."""
        self._measurable, self._compared, self._told, self._outputs = True, False, False, None

    def loss(self, outputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Measure the training loss, summed over the samples; NaN if that fails.

        Args:
            outputs (`Any`): The outputs of the model, for `compute_loss_func`.
            logits (`torch.Tensor` of shape `(batch, classes)`): The logits in them.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, classes)`): The labels.
        """
        loss_func, smoothing = self._trainer.compute_loss_func, self._trainer.args.label_smoothing_factor
        try:
            with torch.no_grad():
                if loss_func is None:
                    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
                # As Trainer counts them: of probabilities every entry.
                items = labels.numel() if labels.is_floating_point() else count_labels(labels)
                return loss_func(outputs, labels, num_items_in_batch=items).detach() * count_labels(labels)
        except Exception as error:
            self._leave_out(f"measuring it without gradients failed ({type(error).__name__}: {error}).")
            return torch.full((), math.nan, device=logits.device)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """
        Keep a copy of what the model returns inside this context manager, as losses may change it in place.

        Args:
            model (`nn.Module`): The model that the training step got.
        """

        def keep(module: nn.Module, args: tuple, outputs: Any) -> None:
            self._outputs = recursively_apply(lambda tensor: tensor.detach().clone(), outputs)

        self._outputs = None
        handle = model.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def perturbed_loss(
        self,
        loss: torch.Tensor,
        labels: torch.Tensor,
        used: int,
        micro_batches: int,
        num_items: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """
        Measure the training loss at the perturbed weights, summed over the samples of the ascent. The first time this compares
        it with the loss that is trained on, and waits for the device.

        Args:
            loss (`torch.Tensor`): The loss that the training step returned.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, classes)`): The labels of its batch.
            used (`int`): The number of samples, from the first on, that the ascent used.
            micro_batches (`int`): The number of micro-batches in the optimizer step.
            num_items (`torch.Tensor` or `int`, *optional*): `num_items_in_batch` of the training step.
        """
        outputs, self._outputs = self._outputs, None
        try:
            if isinstance(outputs, tuple) and outputs[0] is not None and outputs[0].dim() == 0:
                outputs = outputs[1:]  # without the loss
            logits = self._trainer.ascent_logits(outputs)
            total = self.loss(outputs, logits, labels)
        except Exception as error:
            self._leave_out(f"the outputs of the training step have no logits ({type(error).__name__}: {error}).")
            return torch.full((), math.nan, device=loss.device)
        count = count_labels(labels)
        if not self._compared:
            self._compare(loss.item(), (total / count).item(), count, micro_batches, num_items)
        if used == len(labels):
            return total
        batch = len(labels)
        outputs = recursively_apply(lambda x: x[:used] if x.dim() > 0 and len(x) == batch else x, outputs)
        return self.loss(outputs, logits[:used], labels[:used])

    def _compare(self, trained: float, measured: float, samples: Any, micro_batches: int, num_items: Any) -> None:
        """Check that the loss that is trained on equals the measured one, possibly scaled; warn otherwise."""
        if not (math.isfinite(trained) and math.isfinite(measured)):
            return
        self._compared = True
        processes = self._trainer.args.world_size
        # As Trainer divides: by the micro-batches, or by `num_items_in_batch`, of this process or of all.
        right = [measured / micro_batches]
        if num_items is not None:
            share = measured * float(samples) / float(num_items)
            right += [share, share * processes]
        if any(math.isclose(trained, value, rel_tol=0.02, abs_tol=1e-6) for value in right):
            return
        if any(math.isclose(trained, measured * factor, rel_tol=0.02) for factor in (1, processes)):
            logger.warning(
                f"{type(self._trainer.model).__name__} ignores `num_items_in_batch`, by which Trainer leaves the division by "
                f"{micro_batches} micro-batches and {processes} processes to the model: its `loss`, and so the gradient, is "
                f"{trained / right[0]:.3g} times the mean over the batch (huggingface/transformers#47688). Pass "
                "`compute_loss_func=WeightedCrossEntropy()` of hf_aace.vision.weighted_loss, which divides by it."
            )
            return
        self._leave_out(
            f"the loss that is trained on ({trained:.4g}) is not the cross-entropy of the model's logits ({right[0]:.4g}). "
            "Give your loss as `compute_loss_func` instead of overriding `compute_loss` to have them."
        )

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """
        Leave out of the log what could not be measured. At the first log, tell of a perturbation that does next to nothing or
        much too much.

        Args:
            metrics (`dict[str, float]`): The averages for the log.
        """
        if not self._measurable:
            return {name: value for name, value in metrics.items() if name not in ("clean_loss", "sharpness")}
        if "sharpness" in metrics and not self._told and self._trainer.is_world_process_zero():
            self._told = True
            clean, rise = metrics["clean_loss"], metrics["sharpness"]
            if abs(rise) < 1e-3 * clean:
                logger.warning(
                    f"The perturbation changes the training loss of {clean:.4g} by {rise:.2g} only: this is nearly plain "
                    "training, at a higher price. The un-normalized step of AACE grows as the model becomes confident; if "
                    "`sharpness` in the log stays as small, try a `rho` ten times as large."
                )
            elif rise > max(1.0, clean):
                logger.warning(
                    f"The perturbation raises the training loss from {clean:.4g} to {clean + rise:.4g}: the model can hardly "
                    "learn from that. Try a `rho` a tenth as large."
                )
        return metrics

    def _leave_out(self, why: str) -> None:
        if self._measurable and self._trainer.is_world_process_zero():
            logger.warning(_NOT_LOGGED + why)
        self._measurable = False
