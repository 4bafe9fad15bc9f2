# SPDX-License-Identifier: Apache-2.0
"""The callbacks, and what trackers get to see."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import (
    alive,
    batch,
    convnext,
    digits,
    identical,
    logged,
    trainer_for_single_steps,
    training_arguments,
    weights,
)
from transformers import TrainerCallback, TrainerState

import hf_aace.analysis.live_curves
from hf_aace import AACEConfig, AACETrainer, aace_loss
from hf_aace.analysis.live_curves import LiveCurvesCallback
from hf_aace.callbacks import PerturbationCallback, PerturbationConsistencyCallback


OWN_KEYS = {
    "clean_loss",
    "clean_accuracy",
    "sharpness",
    "ascent_loss",
    "ascent_grad_norm",
    "perturbation_norm",
    "rho",
    "skipped_perturbations",
}


def train(output_dir, callbacks=(), **kwargs):
    arguments = training_arguments(AACEConfig, output_dir, max_steps=6, logging_steps=3, **kwargs)
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits(), callbacks=list(callbacks))
    trainer.train()
    return trainer


# ---- Consistency of the perturbations --------------------------------------


def ascent_gradient(model, inputs):
    parameters = list(model.parameters())
    loss = aace_loss(model(inputs["pixel_values"]).logits, inputs["labels"])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None]).double()


def test_what_a_callback_returns_is_averaged_by_name(tmp_path):
    """Also if it returns other names on some steps only."""

    class Sometimes(PerturbationCallback):
        count = 0

        def on_perturbation(self, perturbation):
            self.count += 1
            return {"x": torch.tensor(float(self.count))} | ({"y": torch.tensor(1.0)} if self.count == 3 else {})

    first = train(tmp_path, [Sometimes()]).state.log_history[0]
    assert (first["x"], first["y"]) == (2.0, 1.0)


@pytest.mark.parametrize("normalize", [False, True])
def test_consistency_is_the_cosine_between_successive_steps(tmp_path, normalize):
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.05, normalize_perturbation=normalize)
    trainer.add_callback(PerturbationConsistencyCallback())
    first, second = batch(16), batch(16, start=16)
    expected = torch.cosine_similarity(
        ascent_gradient(trainer.model, first), ascent_gradient(trainer.model, second), dim=0
    )
    trainer.training_step(trainer.model, first)
    assert "perturbation_consistency" not in logged(trainer), "there is none before the first"
    trainer.training_step(trainer.model, second)
    assert logged(trainer)["perturbation_consistency"] == pytest.approx(expected.item(), abs=1e-5)
    trainer.training_step(trainer.model, second)
    assert logged(trainer)["perturbation_consistency"] == pytest.approx(1, abs=1e-5)


def test_consistency_is_logged_and_changes_nothing(tmp_path):
    plain = train(tmp_path / "plain", rho=0.05)
    told = train(tmp_path / "told", [PerturbationConsistencyCallback()], rho=0.05)
    assert identical(weights(plain.model), weights(told.model))
    logged = [entry["perturbation_consistency"] for entry in told.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(-1 <= value <= 1 for value in logged)
    assert not any("perturbation_consistency" in entry for entry in plain.state.log_history)


def test_a_skipped_perturbation_counts_for_nothing(tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.05)
    trainer.add_callback(PerturbationConsistencyCallback())
    bad = batch(16)
    bad["pixel_values"] = bad["pixel_values"] * float("nan")
    for inputs in (batch(16), bad, batch(16), batch(16)):
        trainer.training_step(trainer.model, inputs)
    # Only the last has a predecessor that was made.
    assert logged(trainer)["perturbation_consistency"] == pytest.approx(1, abs=1e-5)


def test_consistency_starts_anew_when_more_is_trained(tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.05)
    trainer.add_callback(PerturbationConsistencyCallback())
    frozen = next(trainer.model.parameters()).requires_grad_(False)
    trainer.training_step(trainer.model, batch(16))
    frozen.requires_grad_(True)
    trainer.training_step(trainer.model, batch(16))
    assert "perturbation_consistency" not in logged(trainer)


def test_a_callback_of_ones_own_sees_each_perturbation(tmp_path):
    class LargestStep(PerturbationCallback):
        def on_perturbation(self, perturbation):
            return {"largest_step": torch.stack([d.abs().max() for d in perturbation.direction]).max(), "number": 0.5}

    trainer = train(tmp_path, [LargestStep()], rho=0.05)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(entry["largest_step"] > 0 and entry["number"] == 0.5 for entry in logged)


def test_a_callback_hears_of_new_ascents_only(tmp_path):
    """A gradient that is used again agrees with itself, which says nothing."""
    steps = []

    class Note(PerturbationCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.step = state.global_step

        def on_perturbation(self, perturbation):
            steps.append(self.step)

    train(tmp_path, [Note()], ascent_every=4)
    assert steps == [0, 4]


def test_consistency_of_a_second_training_begins_anew(tmp_path):
    """With the step after its first; and no gradients are kept between the two."""

    def trained(callbacks):
        arguments = training_arguments(AACEConfig, tmp_path, max_steps=1, logging_steps=1)
        trainer = AACETrainer(convnext(), arguments, train_dataset=digits(16), callbacks=callbacks)
        trainer.train()
        return trainer, alive(*trainer.model.classifier.weight.shape)

    plain = trained([])[1]
    trainer, kept = trained([PerturbationConsistencyCallback()])
    assert kept == plain
    trainer.train()
    assert not any("perturbation_consistency" in log for log in trainer.state.log_history)


def test_consistency_begins_anew_after_a_training_that_failed(tmp_path):
    """Its last perturbation was of other weights."""

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    fail = Fail()
    arguments = training_arguments(AACEConfig, tmp_path, max_steps=1, logging_steps=1)
    callbacks = [PerturbationConsistencyCallback(), fail]
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits(16), callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(fail)
    trainer.train()
    assert not any("perturbation_consistency" in log for log in trainer.state.log_history)


# ---- Curves in a notebook --------------------------------------------------


class Notebook:
    """Stands in for what IPython shows: the pictures of one display, each renewing the one before."""

    def __init__(self, monkeypatch):
        self.shown, self.renewed = [], []
        monkeypatch.setattr(hf_aace.analysis.live_curves, "is_in_notebook", lambda: True)
        monkeypatch.setattr("IPython.display.display", self.display)

    def display(self, picture, display_id):
        self.shown.append(picture)
        return self

    def update(self, picture):
        self.renewed.append(picture)


def test_curves_are_one_picture_that_is_renewed(tmp_path, monkeypatch):
    notebook = Notebook(monkeypatch)
    train(tmp_path, [LiveCurvesCallback(min_seconds=0)], rho=0.05)
    assert len(notebook.shown) == 1
    assert len(notebook.renewed) == 3  # the second log, the summary and the end
    assert all(picture.data.startswith(b"\x89PNG") for picture in notebook.shown + notebook.renewed)


def test_curves_are_not_drawn_more_often_than_asked(tmp_path, monkeypatch):
    notebook = Notebook(monkeypatch)
    train(tmp_path, [LiveCurvesCallback(min_seconds=1e6)], rho=0.05)
    assert (len(notebook.shown), len(notebook.renewed)) == (1, 1)  # the first, and the last in any case


def test_a_second_training_has_a_picture_of_its_own(tmp_path, monkeypatch):
    """Drawn at once, though the last one of the first was not long ago."""
    notebook = Notebook(monkeypatch)
    trainer = train(tmp_path, [LiveCurvesCallback(min_seconds=1e6)])
    trainer.train()
    assert (len(notebook.shown), len(notebook.renewed)) == (2, 2)


def test_a_training_without_logs_has_no_curves_and_ends_well(tmp_path, monkeypatch):
    notebook = Notebook(monkeypatch)
    arguments = training_arguments(AACEConfig, tmp_path, max_steps=1, logging_strategy="no")
    AACETrainer(convnext(), arguments, train_dataset=digits(16), callbacks=[LiveCurvesCallback()]).train()
    assert not notebook.shown


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_draws(first, monkeypatch):
    """All of them have the same logs."""
    notebook = Notebook(monkeypatch)
    state = TrainerState(log_history=[{"loss": 1.0, "step": 1, "epoch": 1.0}], is_world_process_zero=first)
    LiveCurvesCallback().on_log(None, state, None)
    assert len(notebook.shown) == first


def test_outside_of_notebooks_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: pytest.fail("drawn"))
    train(tmp_path, [LiveCurvesCallback(min_seconds=0)])


# ---- Trackers --------------------------------------------------------------


def test_tensorboard_has_our_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(tmp_path, [PerturbationConsistencyCallback()], report_to="tensorboard", rho=0.05)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {f"train/{key}" for key in OWN_KEYS | {"perturbation_consistency"}} <= set(events.Tags()["scalars"])
    logged = [entry["sharpness"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/sharpness")] == pytest.approx(logged)


def test_any_tracker_gets_our_keys_as_numbers(tmp_path):
    """Those of wandb, trackio and the rest are callbacks too, and send what `on_log` gets."""

    class Tracker(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.logs.append(logs.copy())

    tracker = Tracker()
    train(tmp_path, [tracker], rho=0.05)
    steps = [logs for logs in tracker.logs if "loss" in logs]
    assert len(steps) == 2
    for logs in steps:
        assert set(logs) >= OWN_KEYS
        assert all(isinstance(logs[key], int | float) for key in OWN_KEYS)
        json.dumps(logs)
