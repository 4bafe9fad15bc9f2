# SPDX-License-Identifier: Apache-2.0
"""Options and features of Trainer keep working."""

import pytest
import torch
from comparison import Linear, check_goes_on_working, train
from tiny import (
    VANISHING,
    activation_checkpointing,
    batch,
    convnext,
    digits,
    identical,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_aace import AACEConfig, AACETrainer, aace_loss


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_keeps_working(use_reentrant, tmp_path):
    """Reentrant checkpointing rules out `autograd.grad`; with accumulation, to see that no gradient is lost to it."""
    check_goes_on_working(
        lambda: vit(0.1), tmp_path, gradient_accumulation_steps=2, **activation_checkpointing(use_reentrant)
    )


@pytest.mark.parametrize("modules", ["norm", "layers"])
def test_reentrant_checkpointing_perturbs_what_is_inside(modules, tmp_path):
    """Of parameters inside, `autograd.grad` takes no gradient, without an error if others are outside."""
    norms = []
    for options in ({}, activation_checkpointing(use_reentrant=True)):
        settings = {"rho": 0.5, "perturb_modules": modules, "logging_steps": 1, "steps": 2}
        trainer = train(AACETrainer, AACEConfig, vit(), tmp_path, **settings, **options)
        norms.append([log["ascent_grad_norm"] for log in trainer.state.log_history[:2]])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("which", ["ascent", "descent"])
@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_auto_find_batch_size_retries_from_unperturbed_weights(scope, which, tmp_path):
    """Out of memory with more than 30 images in one of the passes of the third step; the weights are those of step two."""
    seen = []

    class Small(AACETrainer):
        def _inner_training_loop(self, *args, **kwargs):
            seen.append(weights(self.model))
            return super()._inner_training_loop(*args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            if which == "descent":
                self.exhaust(inputs["pixel_values"])
            return super().compute_loss(model, inputs, *args, **kwargs)

        def ascent_logits(self, outputs):
            logits = super().ascent_logits(outputs)
            if which == "ascent":
                self.exhaust(logits)
            return logits

        def exhaust(self, samples):
            if len(samples) > 30 and self.state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2 and len(seen) == 1:
                self.left = weights(model)

    remember = Remember()
    trainer = train(
        Small,
        AACEConfig,
        convnext(),
        tmp_path,
        rho=0.2,
        ascent_scope=scope,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=32,
        auto_find_batch_size=True,
        rows=digits(256),
        callbacks=[remember],
    )
    assert len(seen) == 2 and identical(seen[1], remember.left)
    assert trainer.state.global_step == 6 and trainer.state.train_batch_size == 28


@pytest.mark.parametrize(
    "switch",
    [
        {"torch_empty_cache_steps": 2},
        {"dataloader_num_workers": 1},
        {"dataloader_drop_last": True},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
        {"max_grad_norm": 0.1},
        {"average_tokens_across_devices": False},
        {"include_num_input_tokens_seen": "all"},
        {"full_determinism": True},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_options_of_trainer_keep_working(switch, tmp_path):
    try:
        check_goes_on_working(lambda: vit(0.1), tmp_path, **switch)
    finally:
        torch.use_deterministic_algorithms(False)


def test_training_twice_goes_on_as_trainer_does(tmp_path):
    runs = []
    for cls, config, kwargs in ((Trainer, TrainingArguments, {}), (AACETrainer, AACEConfig, {"rho": VANISHING})):
        trainer = train(cls, config, vit(0.1), tmp_path, **kwargs)
        trainer.train()
        runs.append(weights(trainer.model))
    assert identical(*runs)


def test_rho_may_follow_a_schedule(tmp_path):
    class Schedule(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.rho = 0.1 * state.global_step

    trainer = train(AACETrainer, AACEConfig, vit(), tmp_path, logging_steps=1, callbacks=[Schedule()])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert "rho" not in logs[0], "the first step, with rho 0, is a plain one"
    assert [log["rho"] for log in logs[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    for log in logs[1:]:
        assert log["perturbation_norm"] == pytest.approx(log["rho"] * log["ascent_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("rho", [None, 1])
def test_hyperparameter_search_sets_rho(rho, tmp_path):
    """Trainer gives it the type of the value before it, which a user may have written as a whole number."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    used = []

    class Watching(AACETrainer):
        def training_step(self, *args, **kwargs):
            used.append(self.args.rho)
            return super().training_step(*args, **kwargs)

    trainer = Watching(
        args=training_arguments(AACEConfig, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, rho=rho),
        model_init=lambda: vit(),
        train_dataset=digits(64),
        eval_dataset=digits(32),
    )
    best = trainer.hyperparameter_search(
        backend="optuna", n_trials=3, hp_space=lambda trial: {"rho": trial.suggest_float("rho", 0.01, 0.5, log=True)}
    )
    assert len(set(used)) == 3 and min(used) >= 0.01
    assert best.hyperparameters["rho"] in used


def test_hooks_of_ones_own_see_both_passes_of_a_step(tmp_path):
    """Those on parameters get the gradient of the ascent loss, too, in the first of two calls."""
    model = convnext()
    forwards, gradients = [], []
    model.register_forward_hook(lambda *args: forwards.append(1))
    weight = model.classifier.weight
    weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    ascent = torch.autograd.grad(aace_loss(model(batch()["pixel_values"]).logits, batch()["labels"]), weight)[0]
    forwards.clear()
    gradients.clear()
    trainer = trainer_for_single_steps(model, tmp_path, rho=0.1)
    trainer.training_step(model, batch())
    assert len(forwards) == len(gradients) == 2
    torch.testing.assert_close(gradients[0], ascent)
    assert torch.equal(gradients[1], weight.grad)
    plain = trainer_for_single_steps(model, tmp_path, rho=0)
    plain.training_step(model, batch())
    assert len(forwards) == len(gradients) == 3


def test_a_generator_that_the_model_holds_draws_in_both_passes(tmp_path):
    """Only the global ones are set back after the ascent."""

    class Noisy(Linear):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, pixel_values, labels=None):
            seen.append(torch.rand((), generator=self.generator).item())
            return super().forward(pixel_values, labels)

    seen = []
    trainer = trainer_for_single_steps(Noisy(), tmp_path, rho=0.1)
    trainer.training_step(trainer.model, batch())
    assert len(set(seen)) == 2
