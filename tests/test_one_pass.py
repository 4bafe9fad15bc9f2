# SPDX-License-Identifier: Apache-2.0
"""`one_pass`: the ascent gradient of normalization layers, read off the backward pass of the descent before."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import run, train
from tiny import (
    MODELS,
    InOrder,
    activation_checkpointing,
    batch,
    convnext,
    digits,
    identical,
    record_ascents,
    resnet,
    training_arguments,
    vit,
    weights,
)
from tiny_configs import IMAGE_CLASSIFIERS, image_classifier, inputs
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_aace import AACEConfig, AACETrainer, aace_loss
from hf_aace._compat import BATCH_NORM
from hf_aace.isolation import replayed_rng
from hf_aace.one_pass import DescentReader
from hf_aace.parameters import parameters_to_perturb


def logits_of(outputs) -> torch.Tensor:
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def both_gradients(model, columns, labels, used=None, scale=1.0, loss_of=aace_loss):
    """The gradient of the mean ascent loss by autograd, and the one read off a backward pass of cross-entropy, flattened."""
    used = len(labels) if used is None else used
    parameters = parameters_to_perturb(model, "norm")
    model.train()
    for layer in batch_norms(model):
        layer.eval()  # frozen: in training it is refused
    with replayed_rng(set()):
        loss = loss_of(logits_of(model(**columns))[:used], labels[:used])
        exact = torch.autograd.grad(loss, parameters, allow_unused=True)
    reader = DescentReader(lambda logits, labels: loss_of(logits, labels, reduction="sum"), logits_of)
    with reader.read(model, labels, used, parameters):
        (scale * F.cross_entropy(logits_of(model(**columns)), labels, reduction="sum")).backward()
    pairs = zip(exact, reader.gradient(), strict=True)
    kept = [(e, r) for e, r in pairs if e is not None]
    assert all(r is not None for _, r in kept), "no layer is passed over"
    return torch.cat([e.flatten() for e, _ in kept]), torch.cat([r.flatten() for _, r in kept])


def deviation(exact, read) -> float:
    return float((read - exact).norm() / exact.norm())


def in_64_bits(columns) -> dict:
    return {key: value.double() if value.is_floating_point() else value for key, value in columns.items()}


def batch_norms(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BATCH_NORM)]


WITHOUT_NORM = ["ShieldGemma2ForImageClassification"]


@pytest.mark.parametrize("name", [name for name in IMAGE_CLASSIFIERS if name not in WITHOUT_NORM])
def test_equals_autograd_for_every_image_classifier(name):
    """In both precisions, whatever the layout of the layer's input; BatchNorm is frozen."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = image_classifier(name).to(dtype)
        torch.manual_seed(1)
        columns = inputs(name, 6) if dtype == torch.float32 else in_64_bits(inputs(name, 6))
        labels = torch.arange(6) % model.config.num_labels
        exact, read = both_gradients(model, columns, labels, used=5, scale=100.0)
        assert deviation(exact, read) < tolerance


def by_hand(model, batches, rho, steps, learning_rate, loss_func, normalize=False, adaptive=False):
    """
    The same training, written down without the library: the first step perturbs by the ascent gradient at its own weights, each
    later one by that which autograd takes at the perturbed weights of the step before, over its whole window.
    """
    model = model.train()
    chosen = parameters_to_perturb(model, "norm")
    everything = list(model.parameters())

    def ascent(window):
        counts = sum((b["labels"] != -100).sum() for b in window)
        losses = [aace_loss(model(b["pixel_values"]).logits, b["labels"], reduction="sum") for b in window]
        return torch.autograd.grad(sum(losses) / counts, chosen)

    gradient = None
    for window in batches[:steps]:
        total = [torch.zeros_like(p) for p in everything]
        items = sum((b["labels"] != -100).sum() for b in window)
        clean = [p.detach().clone() for p in chosen]
        own = gradient is None
        perturbed_at = []
        for b in window:
            g = ascent([b]) if own else gradient
            with torch.no_grad():
                scaled = [p**2 * v if adaptive else v for p, v in zip(chosen, g, strict=True)]
                length = torch.cat(
                    [((p.abs() if adaptive else 1) * v).flatten() for p, v in zip(chosen, g, strict=True)]
                ).norm()
                for p, v in zip(chosen, scaled, strict=True):
                    p -= rho * (v / length if normalize else v)
            part = ascent([b])
            count = (b["labels"] != -100).sum()
            perturbed_at.append((count, part))
            loss = loss_func(model(b["pixel_values"]), b["labels"], num_items_in_batch=items)
            for t, v in zip(total, torch.autograd.grad(loss, everything), strict=True):
                t += v
            with torch.no_grad():
                for p, v in zip(chosen, clean, strict=True):
                    p.copy_(v)
        whole = sum(count for count, _ in perturbed_at)
        gradient = [sum(count * part[i] for count, part in perturbed_at) / whole for i in range(len(chosen))]
        with torch.no_grad():
            for p, v in zip(everything, total, strict=True):
                p -= learning_rate * v
    return model


def plain_cross_entropy(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def weighted_cross_entropy(outputs, labels, num_items_in_batch):
    weight = torch.linspace(0.5, 2.0, 10, dtype=torch.float64)
    return F.cross_entropy(outputs["logits"], labels, weight, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("make_model", "case"),
    [
        (convnext, {}),
        (vit, {}),
        (convnext, {"normalize_perturbation": True}),
        (vit, {"adaptive_perturbation": True}),
        (convnext, {"gradient_accumulation_steps": 3}),
        (vit, {"gradient_accumulation_steps": 3, "loss_func": weighted_cross_entropy}),
        (convnext, {"gradient_accumulation_steps": 2, "ignored": True}),
        (vit, {"gradient_accumulation_steps": 2, **activation_checkpointing(use_reentrant=False)}),
        (vit, {"gradient_accumulation_steps": 2, **activation_checkpointing(use_reentrant=True)}),
    ],
    ids=[
        "convnext",
        "vit",
        "normalized",
        "adaptive",
        "accumulated",
        "weights",
        "ignored labels",
        "checkpointing",
        "reentrant",
    ],
)
def test_training_matches_float64_reference(make_model, case, tmp_path):
    """Checkpointing runs every layer twice, and counts once."""
    case = {"loss_func": plain_cross_entropy, **case}
    loss_func, ignored = case.pop("loss_func"), case.pop("ignored", False)
    steps, accumulated = 5, case.get("gradient_accumulation_steps", 1)
    rows = digits(16 * steps * accumulated, torch.float64)
    if ignored:
        for row in rows[::3]:
            row["labels"] = -100
    settings = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "learning_rate": 0.1,
        "max_steps": steps,
    }
    arguments = training_arguments(AACEConfig, tmp_path, one_pass=True, rho=0.5, **settings, **case)
    trainer = InOrder(make_model().double(), arguments, train_dataset=rows, compute_loss_func=loss_func)
    trainer.train()

    batches = [
        {key: torch.stack([torch.as_tensor(row[key]) for row in rows[i : i + 16]]) for key in rows[0]}
        for i in range(0, len(rows), 16)
    ]
    windows = [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)]
    kinds = {key.split("_")[0]: value for key, value in case.items() if key.endswith("_perturbation")}
    expected = by_hand(
        make_model().double(),
        windows,
        0.5,
        steps,
        0.1,
        loss_func,
        normalize=kinds.get("normalize", False),
        adaptive=kinds.get("adaptive", False),
    )
    for ours, right in zip(trainer.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-9)
    untouched = train(
        InOrder,
        AACEConfig,
        make_model().double(),
        tmp_path,
        rho=0,
        rows=rows,
        steps=steps,
        **{
            key: value
            for key, value in {**settings, **case, "compute_loss_func": loss_func}.items()
            if key not in ("max_steps", "rho")
        },
    )
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(trainer.model.parameters(), untouched.model.parameters(), strict=True)]
    )
    assert moved.norm() > 1e-6, "the perturbation has an effect that the comparison could have missed"


def test_takes_an_ascent_pass_at_the_first_step_and_after_a_save_only(tmp_path):
    """The first step's comparison with an exact gradient is one more."""
    model = convnext()
    sizes = record_ascents(model)
    train(AACETrainer, AACEConfig, model, tmp_path, steps=8, one_pass=True, save_strategy="steps", save_steps=4)
    assert len(sizes) == 3


def test_log_has_what_there_is_without_an_ascent_pass(tmp_path):
    trainer = train(AACETrainer, AACEConfig, convnext(), tmp_path, steps=5, one_pass=True, logging_steps=1)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 5
    for log in logs:
        assert log["perturbation_norm"] == pytest.approx(10 * log["ascent_grad_norm"], rel=1e-5) and log["rho"] == 10
        assert "sharpness" not in log and "clean_loss" not in log


def test_rho_zero_is_plain_trainer_bit_for_bit(plain_run, tmp_path):
    plain = plain_run("convnext", 0.2)
    off = run(AACETrainer, AACEConfig, lambda: convnext(0.2), tmp_path, rho=0, one_pass=True)
    assert identical(weights(plain.trainer.model), weights(off.model))


def test_a_vanishing_step_leaves_no_trace_of_what_is_read(plain_run, tmp_path):
    """Random numbers and modes are those of plain training; the first step takes two ascent passes, too."""
    for name in ("convnext", "vit"):
        plain = plain_run(name, 0.2)
        ours = run(AACETrainer, AACEConfig, lambda name=name: MODELS[name](0.2), tmp_path, rho=1e-50, one_pass=True)
        assert identical(weights(plain.trainer.model), weights(ours.model)), name


def test_weights_are_restored_and_evaluation_between_changes_nothing(tmp_path):
    class Unperturbed(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            assert self.norm_weight(model) == self.before, "nobody sees the perturbed weights"

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = self.norm_weight(model)

        def norm_weight(self, model):
            return [p.detach().clone().tolist() for p in parameters_to_perturb(model, "norm")]

    settings = {
        "steps": 6,
        "one_pass": True,
        "rho": 1.0,
        "gradient_accumulation_steps": 2,
        "callbacks": [Unperturbed()],
    }
    alone = train(AACETrainer, AACEConfig, vit(), tmp_path, **settings)
    evaluated = train(
        AACETrainer,
        AACEConfig,
        vit(),
        tmp_path,
        **settings,
        eval_dataset=digits(32),
        eval_strategy="steps",
        eval_steps=1,
    )
    assert identical(weights(alone.model), weights(evaluated.model))


def test_a_later_step_uses_what_the_last_one_was_read_for(tmp_path):
    """`perturb_every=2`: the step before each perturbed one is read, plain steps are plain."""
    trainer = train(
        AACETrainer, AACEConfig, convnext(), tmp_path, steps=6, one_pass=True, perturb_every=2, logging_steps=1
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["perturbation_norm" in log for log in logs] == [True, False] * 3


def test_fp16_loss_scale_and_a_gradient_that_is_not_finite(tmp_path):
    """The scale cancels; an overflow in one descent skips the perturbation of the next, is counted, and training goes on."""

    class Fp16(AACETrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("inf") if self.state.global_step == 3 else loss

    settings = {"steps": 6, "one_pass": True, "rho": 1.0, "logging_steps": 1, "logging_nan_inf_filter": False}
    scaled = train(Fp16, AACEConfig, vit(), tmp_path, **settings)
    reference = train(AACETrainer, AACEConfig, vit(), tmp_path, **settings)
    logs, expected = ([log for log in t.state.log_history if "loss" in log] for t in (scaled, reference))
    assert [log["skipped_perturbations"] for log in logs] == [0, 0, 0, 0, 1, 0]
    for step in range(2):
        assert logs[step]["perturbation_norm"] == pytest.approx(expected[step]["perturbation_norm"], rel=0.01)
    assert all(value.isfinite().all() for value in weights(scaled.model).values())


def test_bf16_autocast_reads_nearly_the_same(tmp_path):
    """Accelerate hands out a copy of the logits that the loss is not taken of."""
    settings = {"steps": 3, "one_pass": True, "rho": 1.0, "logging_steps": 1}
    low, full = (train(AACETrainer, AACEConfig, vit(), tmp_path, bf16=bf16, **settings) for bf16 in (True, False))
    for first, second in zip(low.state.log_history[:3], full.state.log_history[:3], strict=True):
        assert first["ascent_grad_norm"] == pytest.approx(second["ascent_grad_norm"], rel=0.05)


def test_an_approximation_is_told_with_its_cosine(tmp_path, caplog, monkeypatch):
    logging.set_verbosity_warning()
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    train(AACETrainer, AACEConfig, vit(), tmp_path, one_pass=True, label_smoothing_factor=0.5)
    assert "approximates the ascent gradient" in caplog.text
    caplog.clear()
    train(AACETrainer, AACEConfig, vit(), tmp_path, one_pass=True)
    assert "approximates" not in caplog.text


class Functional(nn.Module):
    """Uses the weight of a normalization layer without calling the layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.head = nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, pixel_values, labels=None):
        x = F.layer_norm(self.linear(pixel_values.flatten(1)), (16,), self.norm.weight, self.norm.bias)
        logits = self.head(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class FeaturesFirst(Functional):
    """Calls it on a tensor that begins with something else than the batch."""

    def forward(self, pixel_values, labels=None):
        x = self.norm(self.linear(pixel_values.flatten(1)).unsqueeze(0).expand(3, -1, -1)).mean(0)
        logits = self.head(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def compiled_by_its_owner():
    """Hooks that come later are not seen inside."""
    model = vit()
    model.compile(backend="eager")
    return model


class TwoCalls(AACETrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        model(inputs["pixel_values"])
        return super().compute_loss(model, inputs, *args, **kwargs)


class OtherLogits(AACETrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        outputs = model(inputs["pixel_values"])
        return F.cross_entropy(
            self.model.classifier.weight.sum(1)[None] + 0 * outputs.logits.detach(), inputs["labels"]
        )


@pytest.mark.parametrize(
    ("trainer", "make_model", "settings", "message"),
    [
        (AACETrainer, vit, {"torch_compile": True}, "torch_compile=False"),
        (AACETrainer, vit, {"perturb_modules": "norm|classifier"}, "classifier.weight"),
        (AACETrainer, vit, {"ascent_every": 4}, "ascent_every=4"),
        (AACETrainer, vit, {"aace_target": "uniform"}, "aace_target='uniform'"),
        (AACETrainer, resnet, {}, r"statistics of 'resnet\..*BatchNorm2d.*ascent_fraction=0\.125"),
        (AACETrainer, compiled_by_its_owner, {}, "does not go with compiled modules"),
        (AACETrainer, Functional, {}, r"norm\.weight.*without being called"),
        (AACETrainer, FeaturesFirst, {}, "'norm' .*begins with the samples"),
        (TwoCalls, vit, {}, "calls the model 2 times"),
        (OtherLogits, vit, {}, "backward 0 times"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_before_any_weight_moves(
    trainer, make_model, settings, message, tmp_path
):
    model = make_model()
    before = copy.deepcopy(weights(model))
    with pytest.raises(ValueError, match=message):
        train(trainer, AACEConfig, model, tmp_path, one_pass=True, **settings)
    assert identical(weights(model), before)


def test_labels_that_the_model_fits_perfectly_count_nothing(tmp_path):
    """Where the gradient at the logits is zero there is no direction: the sample is left out, without a NaN."""
    model = convnext().double()
    columns = batch(8, dtype=torch.float64)
    parameters = parameters_to_perturb(model, "norm")
    reader = DescentReader(lambda logits, labels: aace_loss(logits, labels, reduction="sum"), logits_of)
    with reader.read(model, columns["labels"], 8, parameters):
        losses = F.cross_entropy(model(columns["pixel_values"]).logits, columns["labels"], reduction="none")
        losses[:4].sum().backward()
    half = {key: value[:4] for key, value in columns.items()}
    exact, _ = both_gradients(convnext().double(), {"pixel_values": half["pixel_values"]}, half["labels"])
    read = torch.cat([g.flatten() for g in reader.gradient()])
    assert deviation(exact / 2, read) < 1e-10, "the mean is over eight"
