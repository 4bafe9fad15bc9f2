# SPDX-License-Identifier: Apache-2.0
"""A logged number means what its name says."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    VANISHING,
    batch,
    convnext,
    digits,
    learning_curve,
    logged,
    trainer_for_single_steps,
    training_arguments,
    vit,
)

from hf_aace import AACEConfig, AACETrainer, aace_loss


def test_logged_keys_are_what_they_say(tmp_path):
    """One step, with the learning rate 0, so that everything can be computed again from the outside."""
    arguments = training_arguments(
        AACEConfig, tmp_path, max_steps=1, logging_steps=1, rho=0.2, learning_rate=0.0, label_smoothing_factor=0.1
    )
    model = vit()
    trainer = AACETrainer(model, arguments, train_dataset=digits(16))
    trainer.train()
    log = trainer.state.log_history[0]

    inputs = batch(16)
    model.train()
    logits = model(inputs["pixel_values"]).logits
    gradients = torch.autograd.grad(aace_loss(logits, inputs["labels"]), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert log["ascent_loss"] == pytest.approx(aace_loss(logits, inputs["labels"]).item(), rel=1e-5)
    smoothed = F.cross_entropy(logits, inputs["labels"], label_smoothing=0.1).item()
    assert log["clean_loss"] == pytest.approx(smoothed, rel=1e-5)
    assert log["sharpness"] == pytest.approx(log["loss"] - log["clean_loss"], abs=1e-6)
    assert log["ascent_grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert log["perturbation_norm"] == pytest.approx(0.2 * norm, rel=1e-4)
    assert log["rho"] == 0.2
    assert log["skipped_perturbations"] == 0
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p -= 0.2 * g
    perturbed = F.cross_entropy(model(inputs["pixel_values"]).logits, inputs["labels"], label_smoothing=0.1).item()
    assert log["loss"] == pytest.approx(perturbed, rel=1e-5)


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_logged_values_are_means_over_the_logging_interval(scope, tmp_path):
    """Logging every 6 steps gives the means of what logging every step gives, accumulation included."""
    logs = {}
    for every in (1, 6):
        arguments = training_arguments(
            AACEConfig,
            tmp_path,
            max_steps=6,
            logging_steps=every,
            rho=0.1,
            ascent_scope=scope,
            gradient_accumulation_steps=2,
        )
        trainer = AACETrainer(convnext(), arguments, train_dataset=digits())
        trainer.train()
        logs[every] = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs[1]) == 6 and len(logs[6]) == 1
    own = ("clean_loss", "clean_accuracy", "sharpness", "ascent_loss", "ascent_grad_norm", "perturbation_norm", "rho")
    for log in logs[1]:
        assert log["sharpness"] == pytest.approx(log["loss"] - log["clean_loss"], abs=1e-5)
    for key in ("loss", *own):
        assert logs[6][0][key] == pytest.approx(sum(log[key] for log in logs[1]) / 6, rel=1e-4, abs=1e-7), key


def test_evaluations_leave_the_training_logs_their_averages(tmp_path):
    """An evaluation is logged, too, in the middle of what they are averages of."""
    logs = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        arguments = training_arguments(AACEConfig, tmp_path, max_steps=6, logging_steps=6, rho=0.1, **evaluation)
        trainer = AACETrainer(convnext(), arguments, train_dataset=digits(), eval_dataset=digits(32))
        trainer.train()
        logs.append(next(log for log in trainer.state.log_history if "loss" in log))
    assert logs[0] == logs[1] and "clean_loss" in logs[0]
    assert not any("rho" in log for log in trainer.state.log_history if "eval_loss" in log)


@pytest.mark.parametrize("labels", ["indices", "ignored", "probabilities"])
def test_clean_accuracy_is_that_at_the_unperturbed_weights(labels, tmp_path):
    inputs = batch(32)
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=5.0)
    right = trainer.model(inputs["pixel_values"]).logits.argmax(1) == inputs["labels"]
    expected = right.float().mean().item()
    if labels == "ignored":
        inputs["labels"][:8] = -100
        expected = right[8:].float().mean().item()
    if labels == "probabilities":
        inputs["labels"] = 0.6 * F.one_hot(inputs["labels"], 10) + 0.04
        trainer.compute_loss_func = lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels)
    trainer.training_step(trainer.model, inputs)
    assert 0 < expected < 1
    assert logged(trainer)["clean_accuracy"] == pytest.approx(expected)


def test_clean_loss_is_the_training_loss_that_compute_loss_func_computes(tmp_path):
    def focal(outputs, labels, num_items_in_batch=None):
        losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
        losses = (1 - torch.exp(-losses)) ** 2 * losses
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=1, logging_steps=1, rho=VANISHING)
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits(16), compute_loss_func=focal)
    trainer.train()
    assert trainer.state.log_history[0]["clean_loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)


def test_sharpness_is_of_the_steps_that_took_an_ascent_pass(tmp_path):
    """Not of all: the loss falls in the course of the steps that reuse its gradient, and would be taken for flatness."""
    reports = []
    for logging_steps in (1, 6):
        arguments = training_arguments(
            AACEConfig, tmp_path, max_steps=6, ascent_every=6, logging_steps=logging_steps, rho=0.1
        )
        trainer = AACETrainer(convnext(), arguments, train_dataset=digits())
        trainer.train()
        reports.append(trainer.state.log_history[0])
    each, together = reports
    assert together["sharpness"] == pytest.approx(each["sharpness"]) and together["loss"] < each["loss"]


def test_logs_of_a_second_training_are_its_own(tmp_path):
    """The sixth step of the first one was never logged."""
    # Without momentum, which the first training would leave behind.
    arguments = training_arguments(AACEConfig, tmp_path, max_steps=6, optim="sgd")
    trainer = AACETrainer(vit(), arguments, train_dataset=digits(64))
    trainer.train()
    fresh = AACETrainer(copy.deepcopy(trainer.model), arguments, train_dataset=digits(64))
    trainer.train()
    fresh.train()
    assert learning_curve(trainer)[0] == learning_curve(fresh)[0]
