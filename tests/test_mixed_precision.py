# SPDX-License-Identifier: Apache-2.0
"""Autocast, and the loss scale of fp16."""

import pytest
import torch
from comparison import check_goes_on_working, train
from tiny import (
    batch,
    identical,
    trainer_for_single_steps,
    vit,
    weights,
)
from transformers import TrainerCallback

from hf_aace import AACEConfig, AACETrainer


def test_bf16_autocast_trains(tmp_path):
    check_goes_on_working(lambda: vit(0.1), tmp_path, bf16=True)


@pytest.mark.parametrize("outer", [False, True], ids=["trainer", "outer autocast"])
def test_second_pass_sees_the_perturbation_under_autocast(outer, tmp_path):
    """Autocast caches the 16-bit copies of the weights: a stale one would give another loss."""
    trainer = trainer_for_single_steps(vit(), tmp_path, rho=2.0, bf16=not outer)
    trainer.model, _ = trainer.accelerator.prepare(trainer.model, torch.optim.SGD(trainer.model.parameters()))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        loss = trainer.training_step(trainer.model, batch())
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=outer),
        trainer.perturbed_weights(trainer.model, batch()),
        torch.autocast("cpu", torch.bfloat16, enabled=outer, cache_enabled=False),  # each use makes a new copy
    ):
        assert trainer.compute_loss(trainer.model, batch()).item() == loss.item()


@pytest.mark.parametrize("overflow", ["neither", "ascent", "descent"])
def test_fp16_loss_scale_is_not_in_the_perturbation_and_overflows_are_skipped(overflow, tmp_path):
    """
    GradScaler, emulated on the CPU: the ascent gradient is unscaled; an overflow in the ascent skips the perturbation, one
    in the descent skips the optimizer step and halves the scale, as Trainer does; the scale still grows.
    """
    overflowing_step = 3

    class Fp16(AACETrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)

        def ascent_logits(self, outputs):
            logits = super().ascent_logits(outputs)
            return logits * float("inf") if (overflow, self.state.global_step) == ("ascent", 3) else logits

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("inf") if (overflow, self.state.global_step) == ("descent", 3) else loss

    class Look(TrainerCallback):
        changed = ()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.before = weights(model)

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.changed += (not identical(weights(model), self.before),)

    look = Look()
    trainer = train(
        Fp16, AACEConfig, vit(), tmp_path, rho=0.2, callbacks=[look], logging_steps=1, logging_nan_inf_filter=False
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    skipped = [log["skipped_perturbations"] for log in logs]
    assert skipped == [int(overflow == "ascent" and step == overflowing_step) for step in range(6)]
    assert look.changed == tuple(not (overflow == "descent" and step == overflowing_step) for step in range(6))
    scale = trainer.accelerator.scaler.get_scale()
    assert scale == (2.0**9 if overflow == "descent" else 2.0**11)
    assert all(value.isfinite().all() for value in weights(trainer.model).values())
    reference = train(AACETrainer, AACEConfig, vit(), tmp_path, rho=0.2, logging_steps=1)
    expected = [log for log in reference.state.log_history if "loss" in log]
    for key in ("ascent_grad_norm", "perturbation_norm"):
        assert logs[0][key] == pytest.approx(expected[0][key], rel=1e-5)
