# SPDX-License-Identifier: Apache-2.0
"""The perturbed weights are seen by nobody: not by evaluation, saving, callbacks or the optimizer."""

import pytest
import torch
from comparison import run, train
from tiny import (
    convnext,
    digits,
    identical,
    training_arguments,
    vit,
    weights,
)
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_aace import AACEConfig, AACETrainer


class Onlooker(TrainerCallback):
    """Compares the weights at every event with those that the optimizer left, and remembers the events."""

    def __init__(self):
        self.left, self.events = None, set()

    def look(self, event, model):
        self.events.add(event)
        if self.left is not None:
            assert identical({n: p.detach() for n, p in model.named_parameters()}, self.left), event

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.look("step begin", model)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.look("substep end", model)

    def on_log(self, args, state, control, model=None, **kwargs):
        self.look("log", model)

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.look("prediction step", model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self.look("save", model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.left = {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_nobody_sees_the_perturbed_weights(scope, tmp_path):
    onlooker = Onlooker()

    class LookingSGD(torch.optim.SGD):
        def step(self, closure=None):
            onlooker.look("optimizer", model)
            return super().step(closure)

    model = convnext()
    trainer = AACETrainer(
        model,
        training_arguments(
            AACEConfig,
            tmp_path,
            rho=0.5,
            ascent_scope=scope,
            max_steps=6,
            gradient_accumulation_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
        ),
        train_dataset=digits(100),
        eval_dataset=digits(32),
        callbacks=[onlooker],
        optimizers=(LookingSGD(model.parameters(), lr=0.1), None),
    )
    trainer.train()
    assert onlooker.events == {"optimizer", "step begin", "substep end", "log", "prediction step", "save"}
    saved = type(model).from_pretrained(tmp_path / "checkpoint-6")
    assert identical(weights(saved), weights(model))


def test_checkpoints_hold_nothing_of_the_perturbation(tmp_path):
    kwargs = {"steps": 4, "save_strategy": "steps", "save_steps": 4}
    run(Trainer, TrainingArguments, vit, tmp_path / "plain", **kwargs)
    run(AACETrainer, AACEConfig, vit, tmp_path / "ours", **kwargs)

    def shape(thing):
        if isinstance(thing, dict):
            return {key: shape(value) for key, value in thing.items()}
        if isinstance(thing, (list, tuple)):
            return [shape(value) for value in thing]
        return tuple(thing.shape) if isinstance(thing, torch.Tensor) else type(thing)

    plain, ours = (tmp_path / name / "checkpoint-4" for name in ("plain", "ours"))
    assert {p.name for p in plain.iterdir()} == {p.name for p in ours.iterdir()}
    for file in ("optimizer.pt", "scheduler.pt"):
        assert shape(torch.load(plain / file)) == shape(torch.load(ours / file))
    assert (plain / "model.safetensors").stat().st_size == (ours / "model.safetensors").stat().st_size


def test_evaluation_saving_and_early_stopping(tmp_path):
    trainer = train(
        AACETrainer,
        AACEConfig,
        convnext(),
        tmp_path,
        steps=40,
        learning_rate=0.0,  # nothing improves: early stopping must stop it
        eval_dataset=digits(32),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    assert trainer.state.global_step == 8
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]


def test_moving_average_callback_averages_clean_weights(tmp_path):
    """With the learning rate 0 the average of clean weights is the start itself; perturbed ones would be averaged in."""

    class Average(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.average = torch.optim.swa_utils.AveragedModel(model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.average.update_parameters(model)

        on_substep_end = on_step_end

    average = Average()
    kwargs = {"rho": 0.5, "learning_rate": 0.0, "gradient_accumulation_steps": 2, "ascent_scope": "full_batch"}
    train(AACETrainer, AACEConfig, vit(), tmp_path, callbacks=[average], **kwargs)
    assert identical(weights(average.average.module), weights(vit()))


def test_evaluate_and_predict_see_the_clean_weights(tmp_path):
    trainer = train(AACETrainer, AACEConfig, vit(), tmp_path, rho=0.5)
    twin = Trainer(trainer.model, trainer.args)
    assert trainer.evaluate(digits(32))["eval_loss"] == twin.evaluate(digits(32))["eval_loss"]
    assert (trainer.predict(digits(32)).predictions == twin.predict(digits(32)).predictions).all()
