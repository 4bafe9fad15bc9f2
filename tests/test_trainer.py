# SPDX-License-Identifier: Apache-2.0
"""The swap: what AACETrainer takes, logs and refuses."""

import copy
import inspect
import pickle
from dataclasses import asdict, dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    VANISHING,
    InOrder,
    alive,
    batch,
    convnext,
    digits,
    identical,
    learning_curve,
    resnet,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_aace import AACEArguments, AACEConfig, AACETrainer, SharpnessAwareMixin, aace_loss, perturbed


# ---- What it takes --------------------------------------------------------------------------------------------------


def test_swapping_the_class_name_works_with_plain_arguments(tmp_path):
    """Every AACE field then has its default, the arguments stay the caller's, and the run is sharpness-aware."""
    arguments = training_arguments(TrainingArguments, tmp_path, max_steps=5)
    trainer = AACETrainer(model=convnext(), args=arguments, train_dataset=digits())
    trainer.train()
    assert trainer.args is arguments
    assert trainer.state.log_history[0]["rho"] == AACEConfig(output_dir=str(tmp_path)).rho
    configured = AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, max_steps=5), train_dataset=digits())
    configured.train()
    assert identical(weights(trainer.model), weights(configured.model))


def test_constructor_has_the_signature_of_trainer():
    assert inspect.signature(AACETrainer) == inspect.signature(Trainer)


def test_model_may_be_the_path_of_a_saved_one(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "vit")
    trainer = AACETrainer(str(tmp_path / "vit"), training_arguments(AACEConfig, tmp_path))
    assert identical(weights(trainer.model), weights(model))


def test_config_is_training_arguments_plus_the_aace_fields(tmp_path):
    ours = {field.name for field in fields(AACEConfig)}
    assert ours - {field.name for field in fields(TrainingArguments)} == {
        "rho",
        "perturbation_loss",
        "normalize_perturbation",
        "adaptive_perturbation",
        "aace_target",
        "ascent_fraction",
        "ascent_scope",
        "sync_ascent",
        "perturb_every",
        "ascent_every",
        "perturb_modules",
    }
    config = AACEConfig(str(tmp_path), rho=0.3)  # the first positional argument is still the output directory
    assert config.output_dir == str(tmp_path)
    assert pickle.loads(pickle.dumps(config)).rho == 0.3
    assert config.to_dict()["rho"] == 0.3


def test_defaults_are_aace_as_published():
    """With the step size that the README's results have."""
    assert asdict(AACEArguments()) == {
        "rho": 0.01,
        "perturbation_loss": "aace",
        "normalize_perturbation": False,
        "adaptive_perturbation": False,
        "aace_target": "adaptive",
        "ascent_fraction": 1.0,
        "ascent_scope": "micro_batch",
        "sync_ascent": False,
        "perturb_every": 1,
        "ascent_every": 1,
        "perturb_modules": None,
    }


def test_every_field_is_a_command_line_option(tmp_path):
    command_line = (
        f"--output_dir {tmp_path} --rho 0.2 --perturbation_loss cross_entropy --normalize_perturbation "
        "--adaptive_perturbation true --aace_target uniform --ascent_fraction 0.5 --ascent_scope full_batch "
        "--sync_ascent false --perturb_every 2 --ascent_every 3 --perturb_modules classifier"
    )
    (config,) = HfArgumentParser(AACEConfig).parse_args_into_dataclasses(command_line.split())
    assert (config.rho, config.perturbation_loss, config.normalize_perturbation) == (0.2, "cross_entropy", True)
    assert (config.adaptive_perturbation, config.aace_target, config.ascent_fraction) == (True, "uniform", 0.5)
    assert (config.ascent_scope, config.perturb_modules) == ("full_batch", "classifier")
    assert (config.perturb_every, config.ascent_every) == (2, 3)
    help_text = HfArgumentParser(AACEConfig).format_help()
    assert all(f"--{field.name}" in help_text for field in fields(AACEArguments))


def test_mixin_over_a_trainer_and_arguments_of_ones_own(tmp_path):
    @dataclass
    class MyArguments(AACEArguments, TrainingArguments):
        scale: float = 2.0

    class MyTrainer(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return self.args.scale * super().compute_loss(model, inputs, *args, **kwargs)

        def log(self, logs, *args, **kwargs):
            super().log({**logs, "mine": 1.0}, *args, **kwargs)

    class Mine(SharpnessAwareMixin, MyTrainer):
        pass

    arguments = training_arguments(MyArguments, tmp_path, max_steps=5, rho=0.1)
    trainer = Mine(convnext(), arguments, train_dataset=digits())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["mine"] == 1.0 and log["rho"] == 0.1
    assert log["loss"] == pytest.approx(2 * log["clean_loss"], rel=0.1)


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_mixin_over_a_trainer_with_a_constructor_of_its_own(how, tmp_path):
    """Whose first argument need not be the model; one given by its path is loaded all the same."""

    class MyTrainer(Trainer):
        def __init__(self, class_weights, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.class_weights = class_weights

    class Mine(SharpnessAwareMixin, MyTrainer):
        pass

    vit().save_pretrained(tmp_path / "vit")
    arguments = training_arguments(AACEConfig, tmp_path)
    if how == "positional":
        trainer = Mine("heavy", model=str(tmp_path / "vit"), args=arguments)
    else:
        trainer = Mine(class_weights="heavy", args=arguments, model=str(tmp_path / "vit"))
    assert trainer.class_weights == "heavy" and identical(weights(trainer.model), weights(vit()))


def test_a_string_that_is_not_the_model_is_not_loaded(tmp_path):
    class MyTrainer(Trainer):
        def __init__(self, name, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.name = name

    class Mine(SharpnessAwareMixin, MyTrainer):
        pass

    trainer = Mine("heavy", vit(), training_arguments(AACEConfig, tmp_path))
    assert trainer.name == "heavy" and identical(weights(trainer.model), weights(vit()))


def test_mixin_behind_the_trainer_is_refused(tmp_path):
    """Its methods would never be called: that would train plainly, without a word."""
    with pytest.raises(TypeError, match="Late would train plainly: put SharpnessAwareMixin before"):

        class Late(Trainer, SharpnessAwareMixin):
            pass


# ---- What the settings do -------------------------------------------------------------------------------------------


def ascents(monkeypatch):
    """Records the logits' batch size of every ascent pass."""
    import hf_aace.trainer

    sizes = []

    def recorded(logits, labels, **kwargs):
        sizes.append(len(logits))
        return aace_loss(logits, labels, **kwargs)

    monkeypatch.setattr(hf_aace.trainer, "aace_loss", recorded)
    return sizes


@pytest.mark.parametrize(("fraction", "used"), [(1.0, 16), (0.5, 8), (0.1, 2), (0.001, 1)])
def test_ascent_fraction_uses_the_first_samples_at_least_one(fraction, used, tmp_path, monkeypatch):
    sizes = ascents(monkeypatch)
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1, ascent_fraction=fraction)
    with trainer.perturbed_weights(trainer.model, batch(16)):
        moved = weights(trainer.model)
    assert sizes == [used]
    whole = trainer_for_single_steps(convnext(), tmp_path, rho=0.1)
    with whole.perturbed_weights(whole.model, {key: value[:used] for key, value in batch(16).items()}):
        assert identical(weights(whole.model), moved)


def test_perturb_every_takes_plain_steps_between(tmp_path, monkeypatch):
    sizes = ascents(monkeypatch)
    arguments = training_arguments(
        AACEConfig, tmp_path, max_steps=7, perturb_every=3, gradient_accumulation_steps=2, logging_steps=1
    )
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits())
    trainer.train()
    assert len(sizes) == 2 * 3, "two micro-batches in each of the steps 0, 3 and 6"
    assert ["sharpness" in log for log in trainer.state.log_history[:7]] == [True, False, False] * 2 + [True]


@pytest.mark.parametrize(("normalize", "adaptive"), [(False, False), (True, True)])
def test_ascent_every_reuses_the_gradient(normalize, adaptive, tmp_path):
    """Against a loop by hand: a new gradient on the steps 0 and 3, and a step along it from the weights of the day."""
    rows = digits(7 * 16, torch.float64)
    settings = {"rho": 0.1, "normalize_perturbation": normalize, "adaptive_perturbation": adaptive}
    arguments = training_arguments(
        AACEConfig,
        tmp_path,
        max_steps=7,
        ascent_every=3,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        **settings,
    )
    trainer = InOrder(convnext().double(), arguments, train_dataset=rows)
    trainer.train()

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
    assert trainer._aace_kept is None, "the memory is let go of"


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_ascent_every_takes_fewer_ascent_passes(scope, tmp_path, monkeypatch):
    """And logs of them what there is: the training loss at the clean weights is known on their steps only."""
    sizes = ascents(monkeypatch)
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
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits())
    trainer.train()
    assert len(sizes) == 2 * 3, "two micro-batches in each of the steps 0, 3 and 6"
    logs = trainer.state.log_history[:7]
    assert ["clean_loss" in log for log in logs] == [True, False, False] * 2 + [True]
    assert all(("sharpness" in log) == ("clean_loss" in log) for log in logs)
    assert all(log["perturbation_norm"] > 0 and log["skipped_perturbations"] == 0 for log in logs)


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


def test_other_parameters_take_a_new_ascent_pass(tmp_path, monkeypatch):
    """A gradient of those that were trainable before says nothing of the others."""
    sizes = ascents(monkeypatch)

    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.convnext.requires_grad_(state.global_step >= 2)

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, ascent_every=4, rho=0.1)
    AACETrainer(convnext(), arguments, train_dataset=digits(), callbacks=[Unfreeze()]).train()
    assert len(sizes) == 2


def test_other_parameters_in_the_same_number_take_a_new_ascent_pass(tmp_path, monkeypatch):
    """Or the gradient of the one would move the other."""
    sizes = ascents(monkeypatch)

    class Alternate(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.classifier.weight.requires_grad_(state.global_step < 2)
            model.classifier.bias.requires_grad_(state.global_step >= 2)

    model = convnext()
    model.convnext.requires_grad_(False)
    model.classifier.bias.requires_grad_(False)
    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, ascent_every=4, rho=0.1)
    AACETrainer(model, arguments, train_dataset=digits(), callbacks=[Alternate()]).train()
    assert len(sizes) == 2


def test_an_epoch_that_ends_within_a_step_leaves_the_next_step_its_own_ascent(tmp_path, monkeypatch):
    """The gradient over the batches of the one says nothing of those of the other."""
    sizes = ascents(monkeypatch)

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
    AACETrainer(convnext(), arguments, train_dataset=digits(32), callbacks=[EndEpoch()]).train()
    assert sizes == [8] * (4 + 4)


def test_the_ascent_is_in_training_mode_after_an_evaluation(tmp_path):
    """Or dropout would differ between the passes, and BatchNorm not count the batch."""
    modes = []

    class Look(AACETrainer):
        def ascent_outputs(self, model, inputs):
            modes.append(model.training)
            return super().ascent_outputs(model, inputs)

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1)
    trainer = Look(resnet(), arguments, train_dataset=digits(), eval_dataset=digits(32))
    trainer.train()
    counts = {int(b) for name, b in trainer.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {4} and modes == [True] * 4


def test_another_loss_takes_a_new_ascent_pass(tmp_path, monkeypatch):
    """The gradient of the one is to be descended, that of the other climbed."""
    sizes = ascents(monkeypatch)

    class Switch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.perturbation_loss = "aace" if state.global_step < 1 else "cross_entropy"

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, ascent_every=4, rho=0.01, logging_steps=1)
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits(), callbacks=[Switch()])
    trainer.train()
    assert len(sizes) == 1
    assert ["sharpness" in log for log in trainer.state.log_history[:4]] == [True, True, False, False]
    assert all(log["sharpness"] > 0 for log in trainer.state.log_history[:2])


def test_perturb_modules_moves_what_matches_and_nothing_else(tmp_path):
    pattern = r"layernorm|classifier\.weight"
    trainer = trainer_for_single_steps(convnext().double(), tmp_path, rho=0.5, perturb_modules=pattern)
    before = weights(trainer.model)
    with trainer.perturbed_weights(trainer.model, batch(dtype=torch.float64)):
        moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "layernorm" in name or name == "classifier.weight"}


def test_the_ascent_takes_no_gradient_of_weights_that_it_does_not_move(tmp_path):
    """It is then two thirds of a plain step, forward and back through the layers, and not all of it."""

    def operations(**settings):
        trainer = trainer_for_single_steps(vit(), tmp_path, **settings)
        with FlopCounterMode(display=False) as counter:
            trainer.training_step(trainer.model, batch())
        return counter.get_total_flops()

    plain = operations(rho=0)
    assert operations(rho=0.1) == 2 * plain
    assert operations(rho=0.1, perturb_modules="norm") == pytest.approx((1 + 2 / 3) * plain, rel=0.01)


def test_frozen_parameters_are_not_perturbed(tmp_path):
    model = convnext()
    model.convnext.requires_grad_(False)
    trainer = trainer_for_single_steps(model, tmp_path, rho=0.5)
    before = weights(model)
    with trainer.perturbed_weights(model, batch()):
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("target", ["uniform", "random"])
def test_aace_target_changes_the_direction(target, tmp_path):
    moved = []
    for choice in ("adaptive", target):
        trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.5, aace_target=choice)
        with trainer.perturbed_weights(trainer.model, batch()):
            moved.append(weights(trainer.model))
    assert not identical(*moved)


# ---- What it logs ---------------------------------------------------------------------------------------------------


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
    assert trainer._aace_metrics.pop()["clean_accuracy"] == pytest.approx(expected)


def test_clean_loss_is_the_training_loss_that_compute_loss_func_computes(tmp_path):
    def focal(outputs, labels, num_items_in_batch=None):
        losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
        losses = (1 - torch.exp(-losses)) ** 2 * losses
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=1, logging_steps=1, rho=VANISHING)
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits(16), compute_loss_func=focal)
    trainer.train()
    assert trainer.state.log_history[0]["clean_loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)


# ---- What it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rho", -0.1, r"`rho` must be a finite number >= 0, got -0.1"),
        ("rho", float("nan"), "`rho` .* got nan"),
        ("rho", float("inf"), "`rho` .* got inf"),
        ("ascent_fraction", 0.0, r"`ascent_fraction` must lie in \(0, 1\], got 0.0"),
        ("ascent_fraction", 1.5, r"`ascent_fraction` .* got 1.5"),
        ("ascent_fraction", float("nan"), r"`ascent_fraction` .* got nan"),
        ("perturb_every", 0, "`perturb_every` must be a whole number of steps >= 1, got 0"),
        ("ascent_every", 0, "`ascent_every` must be a whole number of steps >= 1, got 0"),
        ("perturb_every", 1.5, "`perturb_every` .* got 1.5"),
        ("perturbation_loss", "mse", r"`perturbation_loss` must be one of \['aace', 'cross_entropy'\], got 'mse'"),
        ("aace_target", "x", r"`aace_target` must be one of \['adaptive', 'uniform', 'random'\], got 'x'"),
        ("ascent_scope", "x", r"`ascent_scope` must be one of \['micro_batch', 'full_batch'\], got 'x'"),
        ("perturb_modules", "(", r"`perturb_modules` must be a regular expression, got '\('"),
        ("rho", "1e-2", r"`rho` must be a number, got '1e-2'"),  # as YAML reads it
    ],
)
def test_bad_settings_are_refused(field, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AACEConfig(str(tmp_path), **{field: value})
    arguments = training_arguments(AACEConfig, tmp_path, max_steps=1)
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits(16))
    before = weights(trainer.model)
    setattr(arguments, field, value)  # by a hyperparameter search, say
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert identical(weights(trainer.model), before)


def test_perturb_modules_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`perturb_modules='encoderr'` matches none of the .* parameters, such as"):
        AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, perturb_modules="encoderr"))


@pytest.mark.parametrize(
    "change", [{"problem_type": "regression"}, {"problem_type": "multi_label_classification"}, {"num_labels": 1}]
)
def test_models_that_are_no_single_label_classifiers_are_refused(change, tmp_path):
    model = convnext()
    model.config.update(change)
    with pytest.raises(ValueError, match=r"single-label classifier with at least 2 classes.*`rho=0`"):
        AACETrainer(model, training_arguments(AACEConfig, tmp_path))
    AACETrainer(model, training_arguments(AACEConfig, tmp_path, rho=0))


class Scores(nn.Module):
    """Returns logits of any shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.weight = shape, nn.Parameter(torch.ones(()))

    def forward(self, pixel_values, labels=None):
        return {"loss": self.weight, "logits": self.weight * torch.randn(len(pixel_values), *self.shape)}


@pytest.mark.parametrize("loss", ["aace", "cross_entropy"])
@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (Scores(10, 4, 4), {}, r"logits of shape \(batch, classes\), got \(16, 10, 4, 4\)"),
        (Scores(1), {}, "at least 2 classes, got logits of shape"),
        (Scores(10), {"labels": None}, r"needs the labels of each batch under `labels`.*only \['pixel_values'\]"),
        (Scores(10), {"labels": torch.randint(10, (16,)) + 5}, r"Labels must lie in \[0, 10\) .* Set `num_labels`"),
        (Scores(10), {"labels": torch.full((16,), -1)}, r"Labels must lie in \[0, 10\) .*got -1 .. -1"),
        (Scores(10), {"labels": torch.randn(16)}, "regression has no AACE loss"),
        (Scores(10), {"labels": torch.randint(2, (16, 10))}, "multi-label targets have no AACE loss"),
        (Scores(10), {"labels": torch.ones(16, 10)}, r"sum to 10 .. 10. Multi-label targets"),
        (convnext(), {"labels": torch.full((16, 10), 0.1)}, "pass a `compute_loss_func`"),
    ],
)
def test_batches_that_are_no_classification_are_refused(model, change, message, loss, tmp_path):
    trainer = trainer_for_single_steps(model, tmp_path, perturbation_loss=loss)
    before = weights(model)
    inputs = {key: value for key, value in {**batch(16), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        trainer.training_step(model, inputs)
    assert identical(weights(model), before)


def test_a_label_without_a_batch_is_refused_whatever_the_share_of_the_batch(tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, ascent_fraction=0.5)
    with pytest.raises(ValueError, match=r"Integer labels must have shape \(1,\).* got \(\)"):
        trainer.training_step(trainer.model, batch(1) | {"labels": torch.tensor(1)})


def test_batches_that_are_no_dictionaries_are_refused(tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path)
    with pytest.raises(ValueError, match=r"dictionaries, got a tuple\. Let the `data_collator` .* under `labels`"):
        trainer.training_step(trainer.model, tuple(batch().values()))


def test_what_rho_0_allows_is_refused_when_a_callback_raises_it(tmp_path):
    """As at the start, before any weight moves by it."""

    class Raise(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.rho = 0.1 if state.global_step == 2 else 0.0

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, rho=0.0)
    trainer = AACETrainer(vit(), arguments, train_dataset=digits(), callbacks=[Raise()])
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel over 2 GPUs"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("loss", ["aace", "cross_entropy"])
def test_labels_out_of_range_are_refused_in_later_steps_too(loss, tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, perturbation_loss=loss)
    trainer.training_step(trainer.model, batch())
    with pytest.raises(ValueError, match=r"Labels must lie in \[0, 10\)"):
        trainer.training_step(trainer.model, {**batch(), "labels": torch.full((16,), 10)})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_random_targets_are_drawn_anew_for_each_batch_and_alike_in_each_run(accumulate, tmp_path, monkeypatch):
    """Also where the model draws no random numbers; and without an effect on the others of the run."""
    drawn, runs = [], []

    def randint(high, size, **kwargs):
        drawn.append(torch_randint(high, size, **kwargs))
        return drawn[-1]

    torch_randint = torch.randint
    for target in ("random", "random", "uniform"):
        drawn.clear()
        arguments = training_arguments(
            AACEConfig, tmp_path, max_steps=4, gradient_accumulation_steps=accumulate, aace_target=target
        )
        trainer = AACETrainer(convnext(), arguments, train_dataset=digits())
        with monkeypatch.context() as patch:
            patch.setattr("hf_aace.losses.torch.randint", randint)
            trainer.train()
        runs.append(({tuple(classes.flatten().tolist()) for classes in drawn}, torch.get_rng_state()))
    assert len(runs[0][0]) == 4 * accumulate and runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[2][1])


def test_outputs_without_logits_are_refused_naming_the_method_to_override(tmp_path):
    class Model(Scores):
        def forward(self, pixel_values, labels=None):
            return {"loss": self.weight, "scores": self.weight * torch.randn(len(pixel_values), 10)}

    trainer = trainer_for_single_steps(Model(), tmp_path)
    with pytest.raises(ValueError, match=r"hold no `logits`, only \['loss', 'scores'\]. Override `ascent_logits`"):
        trainer.training_step(trainer.model, batch())

    class WithScores(AACETrainer):
        def ascent_logits(self, outputs):
            return outputs["scores"]

    trainer = trainer_for_single_steps(Model(), tmp_path, cls=WithScores)
    trainer.training_step(trainer.model, batch())


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=rf"`optim='{optim}'` updates the weights inside the backward pass"):
        AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, optim=optim))


def test_hooks_that_run_inside_backward_are_refused(tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path)
    next(trainer.model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="register_post_accumulate_grad_hook"):
        trainer.training_step(trainer.model, batch())


def test_a_second_training_is_checked_as_the_first(tmp_path):
    """The model may have got hooks in between."""
    trainer = AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, max_steps=1), train_dataset=digits(16))
    trainer.train()
    next(trainer.model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="register_post_accumulate_grad_hook"):
        trainer.train()


@pytest.mark.parametrize("loss", ["aace", "cross_entropy"])
def test_labels_of_8_bits_are_the_classes_that_they_say(loss, tmp_path):
    """156 is -100 in 8 bits, which would be left out."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(64, 200)

        def forward(self, pixel_values):
            return {"logits": self.linear(pixel_values.flatten(1))}

    trainer = trainer_for_single_steps(Model(), tmp_path, rho=0.1, perturbation_loss=loss)
    trainer.compute_loss_func = lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels.long())
    moved = []
    for dtype in (torch.long, torch.uint8):
        inputs = batch(2) | {"labels": torch.tensor([156, 3], dtype=dtype)}
        with trainer.perturbed_weights(trainer.model, inputs):
            moved.append(weights(trainer.model))
    assert identical(*moved)


def test_labels_in_a_column_are_those_in_a_row(tmp_path):
    """Models flatten them, so that plain training takes them too."""
    trainer = trainer_for_single_steps(vit(), tmp_path, rho=0.1)
    moved = []
    for inputs in (batch(), batch() | {"labels": batch()["labels"].unsqueeze(1)}):
        with trainer.perturbed_weights(trainer.model, inputs):
            moved.append(weights(trainer.model))
    assert identical(*moved)


def test_lists_of_images_are_cut_by_ascent_fraction(tmp_path):
    class OfLists(AACETrainer):
        def ascent_outputs(self, model, inputs):
            return model(torch.stack(inputs["images"]))

    trainer = trainer_for_single_steps(convnext(), tmp_path, OfLists, rho=0.1, ascent_fraction=0.25)
    whole = batch(16)
    with trainer.perturbed_weights(trainer.model, {"images": list(whole["pixel_values"]), "labels": whole["labels"]}):
        moved = weights(trainer.model)
    reference = trainer_for_single_steps(convnext(), tmp_path, rho=0.1)
    with reference.perturbed_weights(reference.model, batch(4)):
        assert identical(weights(reference.model), moved)


def test_inputs_that_are_not_copied_keep_their_labels(tmp_path):
    """A Trainer of one's own may prepare its inputs beforehand."""

    class Prepared(AACETrainer):
        def _prepare_inputs(self, inputs):
            return inputs

    trainer = trainer_for_single_steps(vit(), tmp_path, Prepared, rho=0.1)
    inputs = batch()
    trainer.training_step(trainer.model, inputs)
    assert set(inputs) == {"pixel_values", "labels"}


def test_a_loss_logged_within_a_step_is_no_error(tmp_path):
    """With one perturbation for several micro-batches there is nothing to add to it in the later ones."""

    class Logs(AACETrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.log({"loss": float(loss.detach())})
            return loss

    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "ascent_scope": "full_batch", "logging_steps": 1}
    trainer = Logs(convnext(), training_arguments(AACEConfig, tmp_path, **options), train_dataset=digits())
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 2 * (2 + 1)
    assert all(log["skipped_perturbations"] == 0 for log in logged if "perturbation_norm" in log)


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


# ---- What it keeps in memory ----------------------------------------------------------------------------------------


def test_a_perturbation_that_was_made_holds_no_copies(tmp_path):
    """The optimizer comes next, which takes memory itself."""
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1)
    shape = trainer.model.classifier.weight.shape
    before = alive(*shape)
    perturbation = trainer.perturbed_weights(trainer.model, batch())
    assert alive(*shape) == before + 1, "the ascent gradient"
    with perturbation:
        assert alive(*shape) == before + 1, "the backup"
    assert alive(*shape) == before


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("stop", [False, True], ids=["to the end", "stopped within an accumulation"])
def test_no_more_is_kept_than_by_plain_training(stop, scope, tmp_path):
    """Neither in the optimizer step nor, for as long as the trainer lives, after the training."""

    def kept(rho):
        counts, before = [], alive(16, 1, 8, 8)

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                counts.append(alive(*model.classifier.weight.shape))

            def on_substep_end(self, args, state, control, **kwargs):
                control.should_training_stop = stop and state.global_step == 1

        arguments = training_arguments(
            AACEConfig, tmp_path, max_steps=2, gradient_accumulation_steps=2, ascent_scope=scope, rho=rho
        )
        trainer = AACETrainer(convnext(), arguments, train_dataset=digits(64), callbacks=[Look()])
        trainer.train()
        assert alive(16, 1, 8, 8) == before, "no batch"
        return [*counts, alive(*trainer.model.classifier.weight.shape)]

    assert kept(0.1) == kept(0)
