# SPDX-License-Identifier: Apache-2.0
"""The training loss before and after the perturbation, measured alike for the log, and compared with the loss that is trained on."""

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from .isolation import replayed_rng
from .losses import count_labels, in_full_precision


logger = logging.get_logger(__name__)

_NOT_LOGGED = "`clean_loss` and `sharpness` are not logged: "


class LossMeter:
    """
    Measure the training loss by the logits: the cross-entropy, with the label smoothing of the arguments, or what
    `compute_loss_func` returns. Trainer's own number will not do: for many models it grows with accumulation and processes.

    Nothing here can end a run. What cannot be measured is left out of the log, which is said once.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Begin anew, as when training begins."""
        self._measurable, self._first_step, self._told = True, True, False
        self._outputs, self._forwards, self._sums, self._micro_batches = None, 0, 0.0, 1

    def loss(self, outputs: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Measure the training loss, summed over the samples; NaN if that fails. `logits` are those in `outputs`, which
        `compute_loss_func` gets; labels of shape `(batch, classes)` are probabilities.
        """
        loss_func, smoothing = self._trainer.compute_loss_func, self._trainer.args.label_smoothing_factor
        if not self._measurable:
            return torch.full((), math.nan, device=logits.device)
        try:
            if loss_func is None:
                logits = in_full_precision(logits)  # sums of 16 bits would be too coarse to subtract
                with torch.no_grad():
                    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            # As Trainer counts them: of probabilities every entry.
            items = labels.numel() if labels.is_floating_point() else count_labels(labels)
            # It may draw random numbers, which would be missing in later steps.
            with torch.no_grad(), replayed_rng({logits.device}):
                own = self._copy(loss_func)
                return own(outputs, labels, num_items_in_batch=items).detach() * count_labels(labels)
        except Exception as error:
            self._leave_out(f"measuring it without gradients failed ({type(error).__name__}: {error}).")
            return torch.full((), math.nan, device=logits.device)

    def _copy(self, loss_func: Any) -> Any:
        """
        Copy an object that is called as a function, as a call may change it. Shared are the trainer, all parameters, and models in
        evaluation mode (a teacher, for example).
        """
        state = getattr(loss_func, "__dict__", None)
        if not state or isinstance(loss_func, (FunctionType, MethodType, functools.partial)):
            return loss_func
        tensors, modules = [], []
        recursively_apply(tensors.append, dict(state))
        recursively_apply(modules.append, dict(state), test_type=lambda value: isinstance(value, nn.Module))
        modules = [inner for module in modules for inner in module.modules()]
        shared = [self._trainer, self._trainer.model, *(module for module in modules if not module.training)]
        shared += [p for module in (loss_func, *modules) if isinstance(module, nn.Module) for p in module.parameters()]
        memo = {id(value): value for value in shared}
        # A loss of an earlier step that it keeps has a graph, with which it cannot be copied.
        memo |= {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
        return copy.deepcopy(loss_func, memo)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Keep a copy of what the model returns inside this context manager, as losses may change it in place."""

        def keep(module: nn.Module, args: tuple, outputs: Any) -> None:
            self._forwards += 1
            try:
                self._outputs = recursively_apply(lambda tensor: tensor.detach().clone(), outputs)
            except Exception as error:  # such as of a dictionary with a constructor of its own
                self._leave_out(f"the outputs of the model cannot be copied ({type(error).__name__}: {error}).")

        self._outputs, self._forwards = None, 0
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
        Measure the training loss at the perturbed weights, summed over the first `used` samples, those of the ascent; NaN if
        that fails. Compare the measured loss of all samples with `loss`, which the training step returned, in the first step,
        which waits for the device, and at each log. Trainer scales it by `num_items` or by the number of `micro_batches` in the
        optimizer step.
        """
        outputs, self._outputs, self._micro_batches = self._outputs, None, micro_batches
        try:
            if self._forwards > 1:
                raise ValueError(f"the model was called {self._forwards} times")
            if isinstance(outputs, tuple) and outputs[0] is not None and outputs[0].dim() == 0:
                outputs = outputs[1:]  # without the loss
            logits = self._trainer.ascent_logits(outputs)
            total = self.loss(outputs, logits, labels)
        except Exception as error:
            self._leave_out(f"the training step does not give the logits of its batch ({error}).")
            return torch.full((), math.nan, device=loss.device)
        mean = total / count_labels(labels)
        # The loss that is trained on, and the measured one as Trainer divides it: by the micro-batches, or by
        # `num_items_in_batch`, of this process or of all; and as it is if the model leaves out the division.
        processes = self._trainer.args.world_size
        share = mean / micro_batches if num_items is None else total / num_items
        losses = [loss.detach(), mean / micro_batches, share, share * processes, mean, mean * processes]
        self._sums = self._sums + torch.stack([value.float() for value in losses])
        if self._first_step:
            self._compare()
        if used == len(labels):
            return total
        batch = len(labels)
        outputs = recursively_apply(lambda x: x[:used] if x.dim() > 0 and len(x) == batch else x, outputs)
        return self.loss(outputs, logits[:used], labels[:used])

    def _compare(self) -> None:
        """Check that the loss that is trained on equals the measured one, possibly scaled; warn otherwise."""
        if not isinstance(self._sums, torch.Tensor) or not self._measurable:
            return
        trained, *right, unscaled, unscaled_in_all = self._sums.tolist()
        self._sums = 0.0
        if not (math.isfinite(trained) and math.isfinite(right[0])):
            return
        first, self._first_step = self._first_step, False
        if any(math.isclose(trained, value, rel_tol=0.01, abs_tol=1e-6) for value in right):
            return
        if any(math.isclose(trained, value, rel_tol=0.01) for value in (unscaled, unscaled_in_all)):
            if first and self._trainer.is_world_process_zero():
                self._warn_of_scale(trained / right[0])
            return
        if self._trainer.compute_loss_func is None:
            self._leave_out(
                f"the loss that is trained on ({trained:.4g}) is not the cross-entropy of the model's logits ({right[0]:.4g}). "
                "Give your loss as `compute_loss_func` instead of overriding `compute_loss` to have them."
            )
        else:
            self._leave_out(
                f"the loss that is trained on ({trained:.4g}) is not what `compute_loss_func` returns when it is called again "
                f"({right[0]:.4g}), as if it draws random numbers, keeps a state, or `compute_loss` adds to it."
            )

    def _warn_of_scale(self, factor: float) -> None:
        trainer, cure = self._trainer, "Divide the sum of the losses by it."
        if trainer.compute_loss_func is not None:
            source = "Your `compute_loss_func`"
        elif type(trainer).compute_loss is not Trainer.compute_loss:
            source = f"`compute_loss` of {type(trainer).__name__}"
        else:
            source = type(trainer.model).__name__
            cure = (
                "Pass `compute_loss_func=WeightedCrossEntropy()` of hf_aace.vision.weighted_loss, which divides by it "
                "(huggingface/transformers#47688)."
            )
        logger.warning(
            f"{source} ignores `num_items_in_batch`, by which Trainer leaves the division by {self._micro_batches} micro-batches and "
            f"{trainer.args.world_size} processes to the loss: `loss`, and so the gradient, is {factor:.3g} times the mean over "
            f"the batch. {cure}"
        )

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """
        Leave out of the averages for the log what could not be measured. At the first log, tell of a perturbation that does
        next to nothing or much too much.
        """
        self._compare()
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
