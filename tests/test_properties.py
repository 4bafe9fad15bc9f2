# SPDX-License-Identifier: Apache-2.0
"""The properties that sharpness-aware training promises, one section each, on one process."""

import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import (
    MODELS,
    VANISHING,
    InOrder,
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_aace import AACEConfig, AACETrainer


class Augmented(torch.utils.data.Dataset):
    """Augments from the three global random number generators, as image augmentations do."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        image = self.rows[index]["pixel_values"]
        noise = torch.randn_like(image) + random.random() + float(np.random.rand())
        return {"pixel_values": image + 0.1 * noise, "labels": self.rows[index]["labels"]}


def run(cls, config, make_model, output_dir, *, steps=30, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    trainer = cls(
        make_model().to(dtype),
        training_arguments(config, output_dir, max_steps=steps, **kwargs),
        train_dataset=Augmented(digits(dtype=dtype)),
    )
    trainer.train()
    return trainer


# ---- 1. Off is off -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, VANISHING], ids=["off", "vanishing"])
@pytest.mark.parametrize("name", MODELS)
def test_off_is_off(name, rho, tmp_path):
    """`rho=0` is plain Trainer; with a step that vanishes, even the ascent pass leaves no trace but its own log entries."""

    def make_model():
        return MODELS[name](dropout=0.2)

    kwargs = {"save_strategy": "steps", "save_steps": 30, "gradient_accumulation_steps": 2}
    plain = run(Trainer, TrainingArguments, make_model, tmp_path / "plain", **kwargs)
    plain_rng = torch.get_rng_state(), np.random.get_state(), random.getstate()
    ours = run(AACETrainer, AACEConfig, make_model, tmp_path / "ours", rho=rho, **kwargs)
    ours_rng = torch.get_rng_state(), np.random.get_state(), random.getstate()

    assert identical(weights(plain.model), weights(ours.model))
    if rho == 0:
        assert learning_curve(ours) == learning_curve(plain)
    else:
        shared = [
            {key: entry[key] for key in expected}
            for entry, expected in zip(ours.state.log_history, learning_curve(plain), strict=True)
        ]
        assert shared == learning_curve(plain)
    assert torch.equal(plain_rng[0], ours_rng[0])
    assert np.array_equal(plain_rng[1][1], ours_rng[1][1]) and plain_rng[1][2:] == ours_rng[1][2:]
    assert plain_rng[2] == ours_rng[2]

    plain_files, our_files = (tmp_path / run / "checkpoint-30" for run in ("plain", "ours"))
    assert sorted(p.name for p in plain_files.iterdir()) == sorted(p.name for p in our_files.iterdir())
    for file in ("model.safetensors", "config.json"):
        assert (plain_files / file).read_bytes() == (our_files / file).read_bytes(), file
    plain_states = torch.load(plain_files / "optimizer.pt")
    our_states = torch.load(our_files / "optimizer.pt")
    torch.testing.assert_close(our_states, plain_states, rtol=0, atol=0)


def test_both_passes_see_the_same_dropout_mask(tmp_path):
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(64, 10), nn.Dropout(0.5)

        def forward(self, pixel_values, labels=None):
            dropped = self.dropout(torch.ones(64))
            seen.append(dropped)
            logits = self.linear(pixel_values.flatten(1) * dropped)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}

    run(AACETrainer, AACEConfig, Model, tmp_path, steps=3)
    assert len(seen) == 6
    for ascent, descent in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(ascent, descent)
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()).item(), random.random, np.random.rand], ids=["torch", "python", "numpy"]
)
def test_both_passes_see_the_same_random_numbers(draw, tmp_path):
    """Some models draw which layer to drop from Python or NumPy."""
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, pixel_values, labels=None):
            seen.append(draw())
            logits = seen[-1] * self.linear(pixel_values.flatten(1))
            return (
                {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}
            )

    trainer = trainer_for_single_steps(Model(), tmp_path)
    for _ in range(3):
        trainer.training_step(trainer.model, batch())
    assert seen[::2] == seen[1::2] and len(set(seen)) == 3


# ---- 2. Exact restore (test_faults.py drives failures into every stage) ---------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_exact_restore(name, tmp_path):
    trainer = trainer_for_single_steps(MODELS[name](), tmp_path, rho=0.5)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    addresses = [p.data_ptr() for p in trainer.model.parameters()]
    for start in (0, 16, 32):
        trainer.training_step(trainer.model, batch(start=start))
        assert identical(dict(trainer.model.named_parameters()), before)
    assert [p.data_ptr() for p in trainer.model.parameters()] == addresses


# ---- 3. Faithful ----------------------------------------------------------------------------------------------------

VARIANTS = {
    "aace": {},
    "aace-normalized": {"normalize_perturbation": True},
    "aace-adaptive": {"adaptive_perturbation": True},
    "aace-adaptive-normalized": {"adaptive_perturbation": True, "normalize_perturbation": True},
    "sam": {"perturbation_loss": "cross_entropy", "normalize_perturbation": True},
    "asam": {
        "perturbation_loss": "cross_entropy",
        "normalize_perturbation": True,
        "adaptive_perturbation": True,
    },
}


def reference(model, steps, rho, perturbation_loss="aace", normalize_perturbation=False, adaptive_perturbation=False):
    """Section 1 of the method, written down in float64 without the library: SGD with momentum and weight decay."""
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
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_faithful(name, variant, tmp_path):
    rho = 0.05
    # In 64 bits the method stands alone; in 32 bits training multiplies rounding with each step, so it is given fewer.
    for dtype, count, tolerance in ((torch.float64, 40, 1e-8), (torch.float32, 10, 1e-5)):
        steps = [batch(32, start=32 * i) for i in range(count)]
        expected = weights(reference(MODELS[name](), steps, rho, **VARIANTS[variant]))
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
            **VARIANTS[variant],
        )
        trainer = InOrder(model, arguments, train_dataset=digits(1280, dtype), optimizers=(optimizer, None))
        trainer.train()
        ours = weights(trainer.model)
        error = sum((ours[key].double() - expected[key]).square().sum() for key in expected).sqrt()
        size = sum(value.double().square().sum() for value in expected.values()).sqrt()
        assert error / size < tolerance, f"{dtype}: relative error {error / size:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_training_loss_rises_from_the_weights_to_the_perturbed_weights(name, variant, tmp_path):
    """Of a model that has learnt something: at first AACE, whose gradient grows with confidence, is mostly noise."""
    kwargs = {"dtype": torch.float64, "steps": 20, "learning_rate": 3e-3}
    trained = run(Trainer, TrainingArguments, MODELS[name], tmp_path, **kwargs).model
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


# ---- 4. rho means one thing -----------------------------------------------------------------------------------------


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
def test_rho_means_one_thing(change, tmp_path):
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


# ---- 6. BatchNorm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_batch_norm_statistics_are_updated_once_per_step_from_the_clean_weights(scope, tmp_path):
    """With the learning rate 0 the weights stay clean, so plain Trainer's statistics are those of the clean weights."""
    kwargs = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "steps": 10}
    plain = run(Trainer, TrainingArguments, resnet, tmp_path, **kwargs)
    ours = run(AACETrainer, AACEConfig, resnet, tmp_path, rho=0.5, ascent_scope=scope, **kwargs)
    buffers = dict(ours.model.named_buffers())
    assert identical(buffers, dict(plain.model.named_buffers()))
    counts = [int(value) for name, value in buffers.items() if name.endswith("num_batches_tracked")]
    assert counts and set(counts) == {20}


# ---- 7. Nobody sees w' ----------------------------------------------------------------------------------------------


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


# ---- 8. Checkpoints (test_resume.py kills and resumes) --------------------------------------------------------------


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


# ---- 9. No host synchronisation -------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python, each of which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default) or (
            function is torch.ops.aten.nonzero.default
        ):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_host_synchronisation_per_step(variant, scope, tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1, ascent_scope=scope, **VARIANTS[variant])
    inputs = batch()
    trainer._aace_window = [inputs, inputs]
    trainer.training_step(trainer.model, inputs)  # the first step reads the labels once, to check them
    with HostReads() as reads:
        for _ in range(3):
            trainer.training_step(trainer.model, inputs)
    assert reads.names == []
    with HostReads() as reads:  # the counter does count
        float(torch.ones(()))
    assert len(reads.names) == 1


class DeviceCrossings(TorchDispatchMode):
    """Counts the operations that tensors of several devices take part in: the host waits for those copied to a GPU, too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, outputs)) if isinstance(t, torch.Tensor)}
        if len(devices) > 1:
            self.names.append(str(function))
        return outputs


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_stays_on_its_device(variant, scope, tmp_path, monkeypatch):
    """On the meta device, which stands here for a GPU: it holds no values, so reading one is an error, too."""
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1, ascent_scope=scope, **VARIANTS[variant])
    model = trainer.model.to("meta")
    inputs = {key: value.to("meta") for key, value in batch().items()}
    trainer._aace_window = [inputs, inputs]
    monkeypatch.setattr(trainer, "_prepare_inputs", dict)  # instead of moving them to the CPU
    monkeypatch.setattr("hf_aace.trainer.replayed_rng", lambda devices: nullcontext())  # there is no generator for it
    trainer._aace_first_step = False  # which reads the labels once, to check them
    with DeviceCrossings() as crossings:
        for _ in range(2):
            trainer.training_step(model, inputs)
    assert crossings.names == []
    assert all(p.grad is not None for p in model.parameters())
    with DeviceCrossings() as crossings:  # the counter does count
        inputs["pixel_values"] * torch.ones(())
        torch.ones(2).to("meta")
    assert len(crossings.names) == 2


# ---- 11. Finite -----------------------------------------------------------------------------------------------------


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


# ---- 12. Low precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_are_refused_with_the_fix(dtype, tmp_path):
    arguments = training_arguments(AACEConfig, tmp_path)
    with pytest.raises(ValueError, match=r"must be float32.*dtype=torch.float32.*bf16=True"):
        AACETrainer(convnext().to(dtype), arguments)
    frozen = convnext().to(dtype).requires_grad_(False)
    frozen.classifier = nn.Linear(32, 10)
    AACETrainer(frozen, arguments)  # what is not trained may be of any precision
    AACETrainer(convnext().to(dtype), training_arguments(AACEConfig, tmp_path, rho=0))


def test_models_given_by_name_are_loaded_in_32_bits(tmp_path):
    convnext().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    trainer = AACETrainer(str(tmp_path / "model"), training_arguments(AACEConfig, tmp_path))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert Path(trainer.args.output_dir) == tmp_path
