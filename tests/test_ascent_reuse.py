# SPDX-License-Identifier: Apache-2.0
"""`perturb_every` and `ascent_every`: which steps take an ascent pass, and which gradient the others use."""

import re

import pytest
import torch
from comparison import train
from tiny import (
    alive,
    batch,
    convnext,
    digits,
    record_ascents,
    resnet,
    training_arguments,
)
from transformers import TrainerCallback

from hf_aace import AACEConfig, AACETrainer, aace_loss, perturbed


def test_perturb_every_takes_plain_steps_between(tmp_path):
    arguments = training_arguments(
        AACEConfig, tmp_path, max_steps=7, perturb_every=3, gradient_accumulation_steps=2, logging_steps=1
    )
    model = convnext()
    sizes = record_ascents(model)
    trainer = AACETrainer(model, arguments, train_dataset=digits())
    trainer.train()
    assert len(sizes) == 2 * 3, "two micro-batches in each of the steps 0, 3 and 6"
    assert ["sharpness" in log for log in trainer.state.log_history[:7]] == [True, False, False] * 2 + [True]


@pytest.mark.parametrize(("normalize", "adaptive"), [(False, False), (True, True)])
def test_ascent_every_reuses_the_gradient(normalize, adaptive, tmp_path):
    """Against a loop by hand: a new gradient on the steps 0 and 3, and a step along it from the weights of the day."""
    rows = digits(7 * 16, torch.float64)
    model = convnext().double()
    before = alive(*model.classifier.weight.shape)
    settings = {"rho": 0.1, "normalize_perturbation": normalize, "adaptive_perturbation": adaptive}
    arguments = training_arguments(
        AACEConfig,
        tmp_path,
        max_steps=7,
        ascent_every=3,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        **settings,
    )
    trainer = AACETrainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert alive(*model.classifier.weight.shape) == before, "the memory is let go of"

    model = convnext().double().train()
    parameters = list(model.parameters())
    for step in range(7):
        inputs = batch(16, 16 * step, torch.float64)
        if step % 3 == 0:
            gradients = torch.autograd.grad(
                aace_loss(model(inputs["pixel_values"]).logits, inputs["labels"]), parameters
            )
        with perturbed(parameters, gradients, 0.1, normalize=normalize, adaptive=adaptive):
            descent = torch.autograd.grad(model(**inputs).loss, parameters)
        with torch.no_grad():
            torch._foreach_sub_(parameters, torch._foreach_mul(descent, arguments.learning_rate))
    for ours, by_hand in zip(trainer.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_ascent_every_takes_fewer_ascent_passes(scope, tmp_path):
    """And logs of them what there is: the training loss at the clean weights is known on their steps only."""
    arguments = training_arguments(
        AACEConfig,
        tmp_path,
        max_steps=7,
        ascent_every=3,
        ascent_scope=scope,
        gradient_accumulation_steps=2,
        logging_steps=1,
        rho=0.1,
    )
    model = convnext()
    sizes = record_ascents(model)
    trainer = AACETrainer(model, arguments, train_dataset=digits())
    trainer.train()
    assert len(sizes) == 2 * 3, "two micro-batches in each of the steps 0, 3 and 6"
    logs = trainer.state.log_history[:7]
    assert ["clean_loss" in log for log in logs] == [True, False, False] * 2 + [True]
    assert all(("sharpness" in log) == ("clean_loss" in log) for log in logs)
    assert all(log["perturbation_norm"] > 0 and log["skipped_perturbations"] == 0 for log in logs)


def test_other_parameters_take_a_new_ascent_pass(tmp_path):
    """A gradient of those that were trainable before says nothing of the others."""

    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.convnext.requires_grad_(state.global_step >= 2)

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, ascent_every=4, rho=0.1)
    model = convnext()
    sizes = record_ascents(model)
    AACETrainer(model, arguments, train_dataset=digits(), callbacks=[Unfreeze()]).train()
    assert len(sizes) == 2


def test_other_parameters_in_the_same_number_take_a_new_ascent_pass(tmp_path):
    """Or the gradient of the one would move the other."""

    class Alternate(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.classifier.weight.requires_grad_(state.global_step < 2)
            model.classifier.bias.requires_grad_(state.global_step >= 2)

    model = convnext()
    model.convnext.requires_grad_(False)
    model.classifier.bias.requires_grad_(False)
    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, ascent_every=4, rho=0.1)
    sizes = record_ascents(model)
    AACETrainer(model, arguments, train_dataset=digits(), callbacks=[Alternate()]).train()
    assert len(sizes) == 2


def test_another_loss_takes_a_new_ascent_pass(tmp_path):
    """The gradient of the one is to be descended, that of the other climbed."""

    class Switch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.perturbation_loss = "aace" if state.global_step < 1 else "cross_entropy"

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, ascent_every=4, rho=0.01, logging_steps=1)
    model = convnext()
    sizes = record_ascents(model)
    trainer = AACETrainer(model, arguments, train_dataset=digits(), callbacks=[Switch()])
    trainer.train()
    assert len(sizes) == 2
    assert ["sharpness" in log for log in trainer.state.log_history[:4]] == [True, True, False, False]
    assert all(log["sharpness"] > 0 for log in trainer.state.log_history[:2])


def test_an_epoch_that_ends_within_a_step_leaves_the_next_step_its_own_ascent(tmp_path):
    """The gradient over the batches of the one says nothing of those of the other."""

    class EndEpoch(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.epoch < 1 and state.global_step == 0

    arguments = training_arguments(
        AACEConfig,
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        ascent_scope="full_batch",
    )
    model = convnext()
    sizes = record_ascents(model)
    AACETrainer(model, arguments, train_dataset=digits(32), callbacks=[EndEpoch()]).train()
    assert sizes == [8] * (4 + 4)


def test_a_training_too_short_for_the_statistics_of_batch_norm_warns(warnings, tmp_path):
    """They begin at 0 and 1 and move with each ascent pass only. With the number that the warning names it is gone."""

    def told(model, steps=44, **settings):
        warnings.clear()
        train(AACETrainer, AACEConfig, model, tmp_path, steps=steps, rho=0.1, **settings)
        return [text for text in warnings if "running statistics" in text]

    (text,) = told(resnet(), ascent_every=16)
    assert "on 3 of 44 steps" in text and "73%" in text
    (most,) = re.findall(r"`ascent_every=(\d+)`", text)
    assert not told(resnet(), ascent_every=int(most)) and told(resnet(), ascent_every=int(most) + 1)
    assert not told(resnet(), ascent_every=16, perturb_every=2), "plain steps update the statistics, too"
    assert not told(resnet(), ascent_every=16, gradient_accumulation_steps=8), "each micro-batch counts"
    assert not told(convnext(), ascent_every=16)
    (text,) = told(resnet(), steps=4, ascent_every=2)
    assert text.endswith("Train for longer."), "no `ascent_every` would do"
    without = resnet()
    for layer in without.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    assert not told(without, ascent_every=16)
