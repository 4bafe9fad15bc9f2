# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation in both scopes."""

import pytest
import torch
from tiny import (
    MODELS,
    batch,
    convnext,
    digits,
    hand_out,
    identical,
    resnet,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from torch import nn
from transformers import TrainerCallback

from hf_aace import AACEConfig, AACETrainer, aace_loss, perturbed


def train(model, output_dir, rows, *, batch_size, accumulate, steps, scope="full_batch", callbacks=None, **kwargs):
    arguments = training_arguments(
        AACEConfig,
        output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        ascent_scope=scope,
        optim="sgd",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **{"rho": 0.05, "learning_rate": 0.05, **kwargs},
    )
    trainer = AACETrainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"normalize_perturbation": True},
        {"adaptive_perturbation": True},
        {"perturbation_loss": "cross_entropy", "normalize_perturbation": True},
    ],
    ids=["aace", "normalized", "adaptive", "sam"],
)
@pytest.mark.parametrize("name", ["convnext", "vit"])
def test_full_batch_accumulation_equals_one_large_batch(name, variant, tmp_path):
    """4 x 4 and 2 x 8 equal 1 x 16, on the epoch's last, shorter step too: 40 rows are steps of 16, 16 and 8."""
    rows = digits(40)
    whole = train(MODELS[name](), tmp_path, rows, batch_size=16, accumulate=1, steps=6, **variant)
    for batch_size, accumulate in ((4, 4), (8, 2)):
        parts = train(MODELS[name](), tmp_path, rows, batch_size=batch_size, accumulate=accumulate, steps=6, **variant)
        for key, value in weights(parts.model).items():
            torch.testing.assert_close(value, weights(whole.model)[key], rtol=0, atol=1e-6)


def test_full_batch_accumulation_weighs_samples_equally_when_the_last_micro_batch_is_smaller(tmp_path):
    """22 rows in micro-batches of 8, 8 and 6."""
    rows = digits(22)
    whole = train(vit(), tmp_path, rows, batch_size=22, accumulate=1, steps=4)
    parts = train(vit(), tmp_path, rows, batch_size=8, accumulate=3, steps=4)
    for key, value in weights(parts.model).items():
        torch.testing.assert_close(value, weights(whole.model)[key], rtol=0, atol=1e-6)


def test_full_batch_accumulation_does_not_count_ignored_labels(tmp_path):
    rows = digits(16)
    for row in rows[:6]:
        row["labels"] = -100
    whole = train(vit(), tmp_path, rows, batch_size=16, accumulate=1, steps=3)
    parts = train(vit(), tmp_path, rows, batch_size=4, accumulate=4, steps=3)
    assert whole.state.log_history[-1]["train_loss"] > 0
    for key, value in weights(parts.model).items():
        torch.testing.assert_close(value, weights(whole.model)[key], rtol=0, atol=1e-6)


def test_full_batch_accumulation_logs_what_one_large_batch_does(tmp_path):
    """In micro-batches of 8, 8 and 6 samples, of which some do not count."""
    rows = digits(22)
    for row in rows[:5]:
        row["labels"] = -100
    whole = train(vit(), tmp_path, rows, batch_size=22, accumulate=1, steps=2, logging_steps=1)
    parts = train(vit(), tmp_path, rows, batch_size=8, accumulate=3, steps=2, logging_steps=1)
    keys = (
        "loss",
        "clean_loss",
        "clean_accuracy",
        "sharpness",
        "ascent_loss",
        "ascent_grad_norm",
        "perturbation_norm",
    )
    for log, expected in zip(parts.state.log_history[:2], whole.state.log_history[:2], strict=True):
        for key in keys:
            assert log[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_nothing_accumulated_so_far_is_lost(scope, tmp_path):
    """After each micro-batch `p.grad` is the sum of the descent gradients, computed here without the library's Trainer."""
    window = [batch(8, start=start) for start in (0, 8, 16)]
    model = convnext()
    trainer = trainer_for_single_steps(model, tmp_path, rho=0.05, ascent_scope=scope)
    trainer.current_gradient_accumulation_steps = len(window)

    twin = convnext().train()
    parameters = list(twin.parameters())

    def ascent_gradients(inputs):
        return torch.autograd.grad(aace_loss(twin(inputs["pixel_values"]).logits, inputs["labels"]), parameters)

    whole = {key: torch.cat([inputs[key] for inputs in window]) for key in window[0]}
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    for inputs in hand_out(trainer, window):
        trainer.training_step(model, inputs)
        with perturbed(parameters, ascent_gradients(whole if scope == "full_batch" else inputs), 0.05):
            (twin(**inputs).loss / 3).backward()
        for ours, expected in zip(model.parameters(), parameters, strict=True):
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_a_stop_in_the_middle_of_an_accumulation_leaves_clean_weights(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                control.should_training_stop = True

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.left = weights(model)

    stop = Stop()
    trainer = train(convnext(), tmp_path, digits(64), batch_size=8, accumulate=4, steps=9, callbacks=[stop])
    assert trainer.state.global_step == 1
    assert identical(weights(trainer.model), stop.left)


@pytest.mark.parametrize("target", ["adaptive", "random"])
def test_full_batch_ascent_sees_the_dropout_masks_of_the_descent(target, tmp_path):
    """Also where the ascent loss of a micro-batch draws numbers itself."""
    masks = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(64, 10), nn.Dropout(0.5)

        def forward(self, pixel_values, labels=None):
            mask = self.dropout(torch.ones(64))
            masks.append(mask)
            logits = self.linear(pixel_values.flatten(1) * mask)
            return (
                {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
                if labels is not None
                else logits
            )

    train(Model(), tmp_path, digits(32), batch_size=8, accumulate=3, steps=1, aace_target=target)
    assert len(masks) == 6 and len({tuple(mask.tolist()) for mask in masks}) == 3
    for ascent, descent in zip(masks[:3], masks[3:], strict=True):
        assert torch.equal(ascent, descent)


def test_full_batch_refuses_batches_that_its_ascent_has_not_seen(tmp_path):
    """It would perturb by other images than those that are trained on. One batch at a time, it sees the very one."""

    class Brighter(AACETrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            return super().training_step(
                model, {**inputs, "pixel_values": inputs["pixel_values"] + 1}, *args, **kwargs
            )

    def trainer(accumulate):
        options = {"gradient_accumulation_steps": accumulate, "ascent_scope": "full_batch", "logging_steps": 1}
        arguments = training_arguments(AACEConfig, tmp_path, max_steps=1, rho=1e-6, **options)
        return Brighter(convnext(), arguments, train_dataset=digits(64))

    with pytest.raises(ValueError, match="`training_step` got another: change batches in the `get_batch_samples`"):
        trainer(2).train()
    alone = trainer(1)
    alone.train()
    assert abs(alone.state.log_history[0]["sharpness"]) < 1e-3


def test_full_batch_can_be_entered_twice_by_hand(tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.05, ascent_scope="full_batch")
    moved = []
    for start in (0, 16):
        with trainer.perturbed_weights(trainer.model, batch(16, start)):
            moved.append(weights(trainer.model))
    assert not identical(*moved)


def test_full_batch_counts_each_batch_once_whatever_mode_a_callback_leaves(tmp_path):
    """For example one that evaluates between micro-batches: BatchNorm must not see the perturbed weights."""

    class Evaluate(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            model.eval()

    trainer = train(resnet(), tmp_path, digits(32), batch_size=8, accumulate=2, steps=3, callbacks=[Evaluate()])
    counts = {int(b) for name, b in trainer.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2 * 3}
