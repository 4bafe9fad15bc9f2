# SPDX-License-Identifier: Apache-2.0
"""A logged number means what its name says."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import train
from tiny import (
    VANISHING,
    batch,
    convnext,
    digits,
    learning_curve,
    logged,
    resnet,
    trainer_for_single_steps,
    training_arguments,
    vit,
)
from tiny_configs import NUM_LABELS, image_classifier, inputs
from torch import nn

from hf_aace import AACEConfig, AACETrainer, aace_loss
from hf_aace.vision.weighted_loss import WeightedCrossEntropy


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


def test_logits_of_16_bits_do_not_round_the_sharpness_away(tmp_path):
    """The sum of a batch would be rounded to quarters, and the difference of two sums be 0."""

    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, pixel_values, labels=None):
            logits = self.inner(pixel_values).logits.bfloat16()
            return (
                {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}
                if labels is not None
                else {"logits": logits}
            )

    trainer = train(AACETrainer, AACEConfig, Short(), tmp_path, rho=0.1, logging_steps=1)
    logs = [log for log in trainer.state.log_history if "sharpness" in log]
    assert len(logs) == 6
    for log in logs:
        assert log["sharpness"] == pytest.approx(log["loss"] - log["clean_loss"], abs=1e-4)
        assert log["sharpness"] != 0


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


def test_sharpness_weighs_the_steps_as_the_loss_before_them_does(tmp_path):
    """The last step of an epoch has fewer micro-batches. A vanishing perturbation leaves nothing of the difference."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "ascent_scope": "full_batch"}
    arguments = training_arguments(
        AACEConfig, tmp_path, max_steps=6, logging_steps=6, learning_rate=1e-2, rho=VANISHING, **settings
    )
    trainer = AACETrainer(vit(), arguments, train_dataset=digits(20))
    trainer.train()
    log = trainer.state.log_history[0]
    assert abs(log["sharpness"]) < 1e-5 * log["clean_loss"]


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


def warnings_of(monkeypatch) -> list[str]:
    """The warnings about the log from here on."""
    said = []
    monkeypatch.setattr("hf_aace.loss_meter.logger.warning", said.append)
    return said


@pytest.mark.parametrize("name", ["CLIPForImageClassification", "SiglipForImageClassification"])
def test_sharpness_means_the_same_under_accumulation_for_models_that_drop_num_items(name, tmp_path, monkeypatch):
    """Their loss, and Trainer's `loss`, is as many times too large as there are micro-batches (transformers#47688)."""
    said, columns, logs = warnings_of(monkeypatch), inputs(name, 16), {}
    rows = [{**{key: value[i] for key, value in columns.items()}, "labels": i % NUM_LABELS} for i in range(16)]
    for size, count in ((16, 1), (4, 4)):
        model = image_classifier(name)
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # or the masks of the smaller batches would be others
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "rho": 0.03}
        trainer = train(
            AACETrainer,
            AACEConfig,
            model,
            tmp_path,
            steps=1,
            rows=rows,
            logging_steps=1,
            ascent_scope="full_batch",
            **settings,
        )
        logs[count] = trainer.state.log_history[0]
    assert logs[4]["loss"] == pytest.approx(4 * logs[1]["loss"], rel=1e-3), "or there is nothing to mend any more"
    assert logs[4]["clean_loss"] == pytest.approx(logs[1]["clean_loss"], rel=1e-5)
    assert logs[4]["sharpness"] == pytest.approx(logs[1]["sharpness"], rel=1e-3, abs=1e-6)
    assert logs[1]["sharpness"] > 0
    (warning,) = said
    assert f"{name} ignores `num_items_in_batch`" in warning and "is 4 times the mean" in warning
    assert "compute_loss_func=WeightedCrossEntropy()" in warning


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_sharpness_of_batch_norm_under_accumulation_is_no_multiple_of_the_loss(scope, tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "ascent_scope": scope, "rho": 0.01}
    log = train(AACETrainer, AACEConfig, resnet(), tmp_path, steps=1, logging_steps=1, **settings).state.log_history[0]
    assert log["loss"] > 3 * log["clean_loss"] and 0 <= log["sharpness"] < 0.5 * log["clean_loss"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("make_model", [vit, convnext])
def test_models_that_divide_rightly_are_not_warned_of(make_model, smoothing, tmp_path, monkeypatch):
    said = warnings_of(monkeypatch)
    settings = {
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
        "label_smoothing_factor": smoothing,
    }
    trainer = train(AACETrainer, AACEConfig, make_model(), tmp_path, steps=2, logging_steps=1, rho=0.1, **settings)
    log = trainer.state.log_history[0]
    assert not said
    assert log["sharpness"] == pytest.approx(log["loss"] - log["clean_loss"], abs=1e-5)


def test_the_cure_that_is_named_cures(tmp_path, monkeypatch):
    said = warnings_of(monkeypatch)
    settings = {
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 4,
        "compute_loss_func": WeightedCrossEntropy(),
    }
    log = train(
        AACETrainer, AACEConfig, resnet(), tmp_path, steps=1, logging_steps=1, rho=0.1, **settings
    ).state.log_history[0]
    assert not said and log["loss"] == pytest.approx(log["clean_loss"] + log["sharpness"], abs=1e-5)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_sharpness_compares_the_same_samples(fraction, tmp_path):
    """With a vanishing step it is zero, whatever the samples that the ascent does not use."""
    trainer = train(
        AACETrainer,
        AACEConfig,
        convnext(),
        tmp_path,
        steps=1,
        logging_steps=1,
        rho=VANISHING,
        ascent_fraction=fraction,
    )
    assert trainer.state.log_history[0]["sharpness"] == 0


def class_weighted(model, inputs):
    outputs = model(**inputs)
    return F.cross_entropy(outputs.logits, inputs["labels"], weight=torch.linspace(0.1, 3, 10)), outputs


def with_penalty(model, inputs):
    outputs = model(**inputs)
    return outputs.loss + 0.1 * sum(p.square().sum() for p in model.parameters()), outputs


@pytest.mark.parametrize("loss", [class_weighted, with_penalty])
def test_losses_that_are_not_the_one_trained_on_are_left_out_and_said_once(loss, tmp_path, monkeypatch):
    """Two different losses compared would be logged as a sharpness."""
    said = warnings_of(monkeypatch)

    class Mine(AACETrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            value, outputs = loss(model, inputs)
            return (value, outputs) if return_outputs else value

    trainer = train(Mine, AACEConfig, convnext(), tmp_path, steps=4, logging_steps=1, rho=1e-9)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 and all("clean_loss" not in log and "sharpness" not in log for log in logs)
    assert all(log["ascent_loss"] > 0 and log["clean_accuracy"] >= 0 for log in logs)
    (warning,) = said
    assert "is not the cross-entropy of the model's logits" in warning and "compute_loss_func" in warning


def test_an_overridden_loss_that_is_the_same_is_logged(tmp_path, monkeypatch):
    said = warnings_of(monkeypatch)

    class Mine(AACETrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = train(Mine, AACEConfig, convnext(), tmp_path, steps=1, logging_steps=1, rho=0.1)
    assert not said and trainer.state.log_history[0]["sharpness"] > 0


def gradient_penalty(outputs, labels, num_items_in_batch=None):
    value = F.cross_entropy(outputs.logits, labels)
    (gradient,) = torch.autograd.grad(value, outputs.logits, create_graph=True)
    return value + 0.1 * gradient.square().sum()


def needs_gradients(outputs, labels, num_items_in_batch=None):
    assert torch.is_grad_enabled(), "only for training"
    return F.cross_entropy(outputs.logits, labels)


def shape_is_fixed(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits.view(16, 10), labels)


@pytest.mark.parametrize("loss_func", [gradient_penalty, needs_gradients, shape_is_fixed])
def test_what_is_done_for_the_log_cannot_end_a_run(loss_func, tmp_path, monkeypatch):
    """These losses train with plain Trainer; only the number for the log cannot be had."""
    said = warnings_of(monkeypatch)
    trainer = train(
        AACETrainer,
        AACEConfig,
        convnext(),
        tmp_path,
        logging_steps=2,
        rho=0.1,
        ascent_fraction=0.5,
        compute_loss_func=loss_func,
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and all("clean_loss" not in log and log["ascent_grad_norm"] > 0 for log in logs)
    assert len(said) == 1 and "`clean_loss` and `sharpness` are not logged" in said[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rho": 1e-9}, "nearly plain training"),
        ({"rho": 1e-6, "method": "sam"}, "nearly plain training"),
        ({"rho": 100.0, "method": "sam"}, "a `rho` a tenth as large"),
        ({"rho": 100.0}, "a `rho` a tenth as large"),
        ({"rho": 0.3}, None),
        ({"method": "sam"}, None),
    ],
    ids=str,
)
def test_a_perturbation_far_too_small_or_too_large_is_told_at_the_first_log(settings, sentence, tmp_path, monkeypatch):
    said = warnings_of(monkeypatch)
    train(AACETrainer, AACEConfig, resnet(), tmp_path, steps=6, logging_steps=2, **settings)
    assert len(said) == (sentence is not None) and all(sentence in warning for warning in said)


def test_sharpness_of_a_part_of_the_batch_with_a_loss_of_ones_own(tmp_path):
    """Both losses are of the samples that the ascent used: with a vanishing step they are the same."""
    settings = {
        "ascent_fraction": 0.25,
        "compute_loss_func": lambda o, y, num_items_in_batch: F.cross_entropy(o.logits, y),
    }
    trainer = train(AACETrainer, AACEConfig, convnext(), tmp_path, steps=2, logging_steps=1, rho=VANISHING, **settings)
    assert [log["sharpness"] for log in trainer.state.log_history[:2]] == [0, 0]


def smoothed(model, inputs):
    return F.cross_entropy(model(**inputs).logits, inputs["labels"], label_smoothing=0.3)


def of_two_views(model, inputs):
    """As losses for consistency between two views of an image do."""
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] + 0.5}
    return (model(**inputs).loss + model(**noisy).loss) / 2


@pytest.mark.parametrize("loss", [smoothed, of_two_views])
def test_a_loss_that_looks_alike_before_anything_is_learned_is_told_at_a_later_log(loss, tmp_path, monkeypatch):
    """At a new head nearly every kind of cross-entropy is about the logarithm of the number of classes."""
    said = warnings_of(monkeypatch)

    class Mine(AACETrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return loss(model, inputs)

    model = vit()
    torch.nn.init.zeros_(model.classifier.weight)
    settings = {"rho": 1e-7, "method": "sam", "learning_rate": 1e-2, "rows": digits(32)}
    trainer = train(Mine, AACEConfig, model, tmp_path, steps=60, logging_steps=20, **settings)
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert "clean_loss" not in last and "sharpness" not in last
    assert len([warning for warning in said if "are not logged" in warning]) == 1


@pytest.mark.parametrize("how", ["compute_loss_func", "compute_loss"])
def test_a_loss_of_ones_own_that_drops_num_items_is_named(how, tmp_path, monkeypatch):
    """Not the model, which is innocent."""
    said = warnings_of(monkeypatch)

    class Mine(AACETrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return F.cross_entropy(model(**inputs).logits, inputs["labels"])

    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "rho": 0.1}
    if how == "compute_loss_func":
        own = lambda outputs, labels, num_items_in_batch: F.cross_entropy(outputs.logits, labels)  # noqa: E731
        train(AACETrainer, AACEConfig, vit(), tmp_path, steps=1, compute_loss_func=own, **settings)
    else:
        train(Mine, AACEConfig, vit(), tmp_path, steps=1, **settings)
    assert (
        f"`{how}`" in said[0] and "ignores `num_items_in_batch`" in said[0] and "WeightedCrossEntropy" not in said[0]
    )
