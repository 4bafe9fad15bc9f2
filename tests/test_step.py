# SPDX-License-Identifier: Apache-2.0
"""One step is the published one and is undone exactly; `rho` means the same under all other settings."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import VARIANTS, run
from tiny import (
    MODELS,
    batch,
    convnext,
    digits,
    identical,
    record_ascents,
    resnet,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_aace import AACEConfig, AACETrainer, aace_loss


def reference(model, steps, rho, perturbation_loss="aace", normalize_perturbation=False, adaptive_perturbation=False):
    """
    The papers' step, written down in float64 without the library: SGD with momentum and weight decay. Yields all that the
    model holds after each step.
    """
    model = model.double().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    momentum = [torch.zeros_like(p) for p in parameters]
    for inputs in steps:
        x, y = inputs["pixel_values"].double(), inputs["labels"]
        logits = model(pixel_values=x).logits
        p = logits.softmax(1)
        if perturbation_loss == "aace":
            wrong = F.one_hot(y, logits.shape[1]) == 0
            t = (p / (1 - p.gather(1, y.unsqueeze(1)))).detach()
            loss = (t[wrong] * (t[wrong] / p[wrong]).log()).sum() / len(y)
            sign = -1
        else:
            loss = -p.log().gather(1, y.unsqueeze(1)).mean()
            sign = 1
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        used = [(w, g) for w, g in zip(parameters, gradients, strict=True) if g is not None]
        length = 1.0
        if normalize_perturbation:
            length = sum(((w.detach() if adaptive_perturbation else 1) * g).square().sum() for w, g in used).sqrt()
        clean = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            for w, g in used:
                w += sign * rho / length * (w**2 if adaptive_perturbation else 1) * g
        loss = F.cross_entropy(model(pixel_values=x).logits, y)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        model.load_state_dict(clean)  # the weights, and the BatchNorm statistics of the first pass only
        with torch.no_grad():
            for w, g, v in zip(parameters, gradients, momentum, strict=True):
                if g is not None:
                    v.mul_(0.9).add_(g + 5e-4 * w)
                    w -= 0.05 * v
        yield weights(model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_step_matches_float64_reference(name, variant, tmp_path):
    rho = 0.05
    steps = [batch(32, start=32 * i) for i in range(16)]
    references = list(reference(MODELS[name](), steps, rho, **VARIANTS[variant]))
    # In 64 bits the method stands alone; in 32 bits training multiplies rounding with each step, so it is given fewer.
    for dtype, count, tolerance in ((torch.float64, 16, 1e-8), (torch.float32, 8, 1e-5)):
        expected = references[count - 1]
        model = MODELS[name]().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        arguments = training_arguments(
            AACEConfig,
            tmp_path,
            rho=rho,
            max_steps=count,
            per_device_train_batch_size=32,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            **VARIANTS[variant],
        )
        trainer = AACETrainer(model, arguments, train_dataset=digits(512, dtype), optimizers=(optimizer, None))
        trainer.train()
        ours = weights(trainer.model)
        error = sum((ours[key].double() - expected[key]).square().sum() for key in expected).sqrt()
        size = sum(value.double().square().sum() for value in expected.values()).sqrt()
        assert error / size < tolerance, f"{dtype}: relative error {error / size:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_step_restores_the_weights_bit_for_bit(name, tmp_path):
    trainer = trainer_for_single_steps(MODELS[name](), tmp_path, rho=0.5)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    addresses = [p.data_ptr() for p in trainer.model.parameters()]
    for start in (0, 16, 32):
        trainer.training_step(trainer.model, batch(start=start))
        assert identical(dict(trainer.model.named_parameters()), before)
    assert [p.data_ptr() for p in trainer.model.parameters()] == addresses


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_training_loss_rises_from_the_weights_to_the_perturbed_weights(name, variant, plain_run, tmp_path):
    """For a trained model: before training AACE, whose gradient grows with confidence, is mostly noise."""
    kwargs = {"dtype": torch.float64, "steps": 20, "learning_rate": 3e-3}
    trained = copy.deepcopy(plain_run(name, **kwargs).trainer.model)
    arguments = training_arguments(AACEConfig, tmp_path, rho=0.01, **VARIANTS[variant])
    trainer = AACETrainer(trained, arguments)
    inputs = batch(64, dtype=torch.float64)

    def loss():
        return trainer.compute_loss(trainer.model, dict(inputs)).item()

    trainer.model.train()
    clean = loss()
    with trainer.perturbed_weights(trainer.model, inputs):
        assert loss() > clean
    if name != "resnet":  # whose statistics have moved
        assert loss() == clean


def perturbation(trainer, inputs):
    """w' - w of one training step, seen from inside its descent pass."""
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    with trainer.perturbed_weights(trainer.model, inputs):
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_accumulation_steps": 4},
        {"label_smoothing_factor": 0.2},
        {"max_grad_norm": 0.01},
        {"learning_rate": 1.0},
        {"bf16": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_perturbation_does_not_depend_on_training_settings(change, tmp_path):
    plain = AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, rho=0.1))
    changed = AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, rho=0.1, **change))
    for trainer in (plain, changed):  # autocast is put around the forward pass here
        trainer.model, _ = trainer.accelerator.prepare(trainer.model, torch.optim.SGD(trainer.model.parameters()))
    expected, found = perturbation(plain, batch()), perturbation(changed, batch())
    assert expected.norm() > 0
    if "bf16" in change:  # the gradient is rounded, and the step with it
        assert 0 < (found - expected).norm() < 0.03 * expected.norm()
    else:
        assert torch.equal(found, expected)


def test_rho_does_not_depend_on_the_number_of_samples(tmp_path):
    """The ascent loss is a mean: the same samples twice give the same step."""
    inputs = batch()
    twice = {key: torch.cat([value, value]) for key, value in inputs.items()}
    trainer = AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, rho=0.1))
    torch.testing.assert_close(perturbation(trainer, twice), perturbation(trainer, inputs))


def test_rho_does_not_depend_on_the_loss_scale(tmp_path):
    """The scaler of fp16, emulated on the CPU, where accelerate makes none."""
    trainer = AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, rho=0.1))
    expected = perturbation(trainer, batch())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    torch.testing.assert_close(perturbation(trainer, batch()), expected)


@pytest.mark.parametrize(("fraction", "used"), [(1.0, 16), (0.5, 8), (0.1, 2), (0.001, 2)])
def test_ascent_fraction_uses_the_first_samples_at_least_two(fraction, used, tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1, ascent_fraction=fraction)
    sizes = record_ascents(trainer.model)
    with trainer.perturbed_weights(trainer.model, batch(16)):
        moved = weights(trainer.model)
    assert sizes == [used]
    whole = trainer_for_single_steps(convnext(), tmp_path, rho=0.1)
    with whole.perturbed_weights(whole.model, {key: value[:used] for key, value in batch(16).items()}):
        assert identical(weights(whole.model), moved)


@pytest.mark.parametrize(("size", "used"), [(16, 12), (13, 12), (8, 8), (2, 2)])
def test_batch_norm_gets_a_dozen_samples_or_the_whole_batch(size, used, tmp_path):
    """Its running statistics come from the ascent: from fewer they are noise, and of one sample it cannot train."""
    trainer = trainer_for_single_steps(resnet(), tmp_path, rho=0.1, ascent_fraction=0.25)
    sizes = record_ascents(trainer.model)
    with trainer.perturbed_weights(trainer.model, batch(size)):
        pass
    assert sizes == [used]


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("make_model", [convnext, vit, resnet], ids=["convnext", "vit", "resnet"])
def test_a_small_last_batch_trains(make_model, last, tmp_path):
    """As with plain Trainer, which cannot train BatchNorm on one sample either."""
    if make_model is resnet and last == 1:
        pytest.skip("plain Trainer fails, too")
    arguments = training_arguments(
        AACEConfig, tmp_path, rho=0.1, ascent_fraction=0.25, num_train_epochs=2, per_device_train_batch_size=16
    )
    trainer = AACETrainer(make_model(), arguments, train_dataset=digits(32 + last))
    trainer.train()
    assert trainer.state.global_step == 6
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


@pytest.mark.parametrize("target", ["uniform", "random"])
def test_aace_target_changes_the_direction(target, tmp_path):
    moved = []
    for choice in ("adaptive", target):
        trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.5, aace_target=choice)
        with trainer.perturbed_weights(trainer.model, batch()):
            moved.append(weights(trainer.model))
    assert not identical(*moved)


def test_perturb_modules_moves_what_matches_and_nothing_else(tmp_path):
    pattern = r"layernorm|classifier\.weight"
    trainer = trainer_for_single_steps(convnext().double(), tmp_path, rho=0.5, perturb_modules=pattern)
    before = weights(trainer.model)
    with trainer.perturbed_weights(trainer.model, batch(dtype=torch.float64)):
        moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "layernorm" in name or name == "classifier.weight"}


@pytest.mark.parametrize("pattern", ["first", "second", "first|second|bias"])
def test_a_tied_weight_is_perturbed_once_by_each_of_its_names(pattern, tmp_path):
    moved = []
    for choice in (pattern, None):
        trainer = trainer_for_single_steps(Tied(), tmp_path, rho=0.5, perturb_modules=choice)
        with trainer.perturbed_weights(trainer.model, batch()):
            moved.append(trainer.model.first.weight.detach().clone())
    assert torch.equal(*moved) and not torch.equal(moved[0], trainer.model.first.weight)


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


class Tied(nn.Module):
    """One weight, used twice under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first.weight

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.second(self.first(pixel_values.flatten(1)).relu()).relu())
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)} if labels is not None else logits


def test_tied_weights_are_perturbed_once_and_stay_tied(tmp_path):
    model = Tied()
    trainer = trainer_for_single_steps(model, tmp_path, rho=0.2)
    inputs = batch()
    gradient = torch.autograd.grad(aace_loss(model(inputs["pixel_values"]), inputs["labels"]), model.first.weight)[0]
    before = model.first.weight.detach().clone()
    with trainer.perturbed_weights(model, inputs):
        torch.testing.assert_close(model.first.weight.detach(), before - 0.2 * gradient)
        assert model.first.weight is model.second.weight
    assert torch.equal(model.first.weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_skips_the_perturbation_and_is_counted(value, tmp_path, monkeypatch):
    """Two of six ascent gradients are broken: those two steps are plain ones, the others are not, and all is logged."""
    broken, real = {2, 4}, torch.autograd.grad
    calls = iter(range(100))

    def grad(*args, **kwargs):
        gradients = real(*args, **kwargs)
        if next(calls) in broken:
            gradients[0].view(-1)[0] = value
        return gradients

    moved = []

    class Trainer(AACETrainer):
        def compute_loss(self, model, *args, **kwargs):
            moved.append(not identical(weights(model), self.clean))
            return super().compute_loss(model, *args, **kwargs)

        def training_step(self, model, *args, **kwargs):
            self.clean = weights(model)
            return super().training_step(model, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    trainer = run(Trainer, AACEConfig, convnext, tmp_path, steps=6, rho=0.5, logging_steps=6)
    assert moved == [True, True, False, True, False, True]
    log = trainer.state.log_history[0]
    assert log["skipped_perturbations"] == 2
    assert all(np.isfinite(entry) for entry in log.values())
    assert all(tensor.isfinite().all() for tensor in weights(trainer.model).values())
