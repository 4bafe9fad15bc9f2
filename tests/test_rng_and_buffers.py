# SPDX-License-Identifier: Apache-2.0
"""Both passes of a step see the same random numbers; BatchNorm statistics and other buffers are updated once."""

import random
from collections import Counter, defaultdict, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import check_goes_on_working, run, train
from tiny import (
    VANISHING,
    batch,
    convnext,
    digits,
    identical,
    resnet,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

from hf_aace import AACEConfig, AACETrainer, SharpnessAwareMixin


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


def test_random_changes_of_a_batch_on_the_device_are_the_same_in_both_passes(tmp_path):
    """Or the perturbation would be by other images, and the run draw other numbers than a plain one."""

    class Noisy(Trainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "pixel_values": inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])}

    class Ours(AACETrainer, Noisy):
        pass

    check_goes_on_working(vit, tmp_path, trainer=Noisy, ours=Ours)
    arguments = training_arguments(
        AACEConfig, tmp_path, max_steps=1, gradient_accumulation_steps=3, ascent_scope="full_batch"
    )
    trainer, seen = Ours(vit(dropout=0.1), arguments, train_dataset=digits(64)), []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
    )
    trainer.train()
    assert len(seen) == 6 and all(map(torch.equal, seen[:3], seen[3:]))
    assert not torch.equal(seen[0], seen[1])


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
            patch.setattr(torch, "randint", randint)
            trainer.train()
        runs.append(({tuple(classes.flatten().tolist()) for classes in drawn}, torch.get_rng_state()))
    assert len(runs[0][0]) == 4 * accumulate and runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[2][1])


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_batch_norm_statistics_are_updated_once_per_step_from_the_clean_weights(scope, plain_run, tmp_path):
    """With the learning rate 0 the weights stay clean, so plain Trainer's statistics are those of the clean weights."""
    kwargs = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "steps": 10}
    plain = plain_run("resnet", **kwargs).trainer
    ours = run(AACETrainer, AACEConfig, resnet, tmp_path, rho=0.5, ascent_scope=scope, **kwargs)
    buffers = dict(ours.model.named_buffers())
    assert identical(buffers, dict(plain.model.named_buffers()))
    counts = [int(value) for name, value in buffers.items() if name.endswith("num_batches_tracked")]
    assert counts and set(counts) == {20}


class MovingMean(nn.Module):
    def __init__(self, rebinds):
        super().__init__()
        self.rebinds = rebinds
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        if self.rebinds:
            self.mean = mean
        else:
            self.mean.copy_(mean)
        return x - self.mean[:, None, None]


class MovingMeanByData(nn.Module):
    """As codebooks and observers of quantization keep theirs: without autograd's knowledge, and empty at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(0))

    def forward(self, x):
        if len(self.mean) == 0:
            self.mean.resize_(8).zero_()
        self.mean.data.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.mean[:, None, None].clone()


class FilledWhenNeeded(nn.Module):
    """Has a buffer that the first forward pass fills, or makes."""

    def __init__(self, registered):
        super().__init__()
        if registered:
            self.register_buffer("mean", None)

    def forward(self, x):
        mean = x.detach().mean((0, 2, 3))
        if not hasattr(self, "mean"):
            self.register_buffer("mean", mean)
        else:
            self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return x - self.mean[:, None, None]


class OwnBatchNorm(nn.BatchNorm2d):
    """Updates its running statistics itself, as some batch norms over several processes do."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        self.running_mean += self.momentum * (mean.detach() - self.running_mean)
        self.running_var = self.running_var + self.momentum * (variance.detach() - self.running_var)
        self.num_batches_tracked += 1
        scale, shift = self.weight[:, None, None], self.bias[:, None, None]
        return (x - mean[:, None, None]) * (variance[:, None, None] + self.eps).rsqrt() * scale + shift


class MadeForASize(nn.Module):
    """Makes a buffer for the size of its images, which it notes, as tables of positions are made."""

    def __init__(self):
        super().__init__()
        self.size = None

    def forward(self, x):
        if self.size != x.shape[-2:]:
            self.size = x.shape[-2:]
            self.register_buffer("table", torch.linspace(0, 1, self.size.numel()).view(self.size))
        return x + self.table


class MadeForTheLast(MadeForASize):
    """Puts another table in place for each batch, unless it is the one that it noted last."""

    def forward(self, x):
        number = float(x.detach().mean())
        if self.size != number:
            self.size = number
            table = torch.full((8, 1, 1), number)
            if "table" in self._buffers:
                self.table = table
            else:
                self.register_buffer("table", table)
        return x + self.table


class FilledByAFlag(nn.Module):
    """Fills its buffer in place with the first batch, which a flag tells."""

    def __init__(self):
        super().__init__()
        self.ready = False
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if not self.ready:
            self.mean.copy_(x.detach().mean((0, 2, 3)))
            self.ready = True
        return x - self.mean[:, None, None]


class Counting(nn.Module):
    """Counts its calls, in a number and in containers, and anneals by them."""

    def __init__(self):
        super().__init__()
        self.calls, self.noted, self.last = 0, [], deque(maxlen=4)
        self.counter, self.by_name = Counter(), defaultdict(int)

    def forward(self, x):
        self.calls += 1
        self.noted.append(self.calls)
        self.last.append(self.calls)
        self.counter.update(["forward"])
        self.by_name["forward"] += 1
        counted = len(self.noted) + sum(self.last) + self.counter["forward"] + self.by_name["forward"]
        return x * (1 + 0.1 * self.calls + 0.01 * counted)


class WithUnusualBuffers(nn.Module):
    """Expanded or made in inference mode, which no pass can write to, sparse, and conjugate."""

    def __init__(self):
        super().__init__()
        self.register_buffer("expanded", torch.ones(1).expand(8))
        with torch.inference_mode():
            self.register_buffer("of_inference", torch.ones(8))
        self.register_buffer("sparse", torch.eye(8).to_sparse(), persistent=False)
        self.register_buffer("conjugate", torch.ones(8, dtype=torch.complex64).conj(), persistent=False)

    def forward(self, x):
        return x * self.expanded[:, None, None]


class Convolutional(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.layer, self.linear = nn.Conv2d(1, 8, 3), layer(), nn.Linear(8, 10)

    def forward(self, pixel_values, labels=None):
        features = self.layer(self.convolution(pixel_values)).relu().mean((2, 3))
        logits = self.linear(features)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("accumulate", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.InstanceNorm2d(8, track_running_stats=True, affine=True),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
        lambda: MovingMean(rebinds=False),
        lambda: MovingMean(rebinds=True),
        MovingMeanByData,
        lambda: FilledWhenNeeded(registered=True),
        lambda: FilledWhenNeeded(registered=False),
        MadeForASize,
        MadeForTheLast,
        FilledByAFlag,
        Counting,
        WithUnusualBuffers,
        lambda: nn.BatchNorm2d(8),
        lambda: OwnBatchNorm(8),
    ],
    ids=[
        "instance norm",
        "spectral norm",
        "moving mean",
        "moving mean, another tensor",
        "moving mean, by data",
        "filled when needed",
        "made when needed",
        "made for a size",
        "made for the last batch",
        "filled by a flag",
        "counting",
        "unusual buffers",
        "batch norm",
        "batch norm with a forward of its own",
    ],
)
def test_what_a_forward_pass_keeps_is_updated_once(layer, accumulate, tmp_path):
    check_goes_on_working(lambda: Convolutional(layer), tmp_path, **accumulate)


def test_hooks_that_a_first_pass_registers_are_there_once(tmp_path):
    """Transformers notes in the model that it has registered those that collect hidden states."""
    model = vit()
    model.config.output_hidden_states = True
    number = len(vit()(batch()["pixel_values"], output_hidden_states=True).hidden_states)
    trainer = train(AACETrainer, AACEConfig, model, tmp_path, steps=2, rho=0.1)
    assert len(trainer.model(batch()["pixel_values"]).hidden_states) == number


@pytest.mark.parametrize("write", [lambda a, b: a.lerp_(b, 1e-3), lambda a, b: a.data.lerp_(b.data, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_teacher_that_the_forward_pass_moves_is_refused(dtype, write, tmp_path):
    """It would move twice in a step, the second time towards the perturbed weights."""

    class WithTeacher(Convolutional):
        def __init__(self):
            super().__init__(nn.Identity)
            self.teacher = nn.Linear(8, 10, dtype=dtype).requires_grad_(False)

        def forward(self, pixel_values, labels=None):
            with torch.no_grad():
                write(self.teacher.weight, self.linear.weight.to(dtype))
            return super().forward(pixel_values, labels)

    message = r"forward pass of WithTeacher changes 1 frozen .*'teacher.weight'"
    trainer = trainer_for_single_steps(WithTeacher(), tmp_path)
    before = weights(trainer.model)["linear.weight"]
    with pytest.raises(ValueError, match=message):
        trainer.training_step(trainer.model, batch())
    assert torch.equal(trainer.model.linear.weight, before)

    copied = WithTeacher()
    copied.teacher.load_state_dict(copied.linear.state_dict())
    copied.linear.to(dtype).float()  # so that both are equal, and the first step moves nothing
    with pytest.raises(ValueError, match=message):
        train(AACETrainer, AACEConfig, copied, tmp_path, steps=2, rho=0.1)


@pytest.mark.parametrize("where", ["compute_loss", "training_step"])
def test_layers_that_the_trainer_puts_into_evaluation_mode(where, tmp_path):
    """Frozen BatchNorm: the ascent pass neither normalizes by its batch there nor counts it, from the first step on."""

    class Frozen(Trainer):
        def compute_loss(self, model, *args, **kwargs):
            if where == "compute_loss":
                model.layer.eval()
            return super().compute_loss(model, *args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            if where == "compute_loss":
                return super().training_step(model, inputs, *args, **kwargs)
            model.eval()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    class Ours(AACETrainer, Frozen):
        pass

    _, _, real = check_goes_on_working(
        lambda: Convolutional(lambda: nn.BatchNorm2d(8)), tmp_path, trainer=Frozen, ours=Ours
    )
    assert real.model.layer.num_batches_tracked == 0


def test_layers_that_the_training_step_leaves_in_evaluation_mode(tmp_path):
    """As a loss does that logs the accuracy: Trainer puts the model into training mode again, so the step trained BatchNorm."""

    class LogsAccuracy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss = super().compute_loss(model, dict(inputs), return_outputs, **kwargs)
            model.eval()
            with torch.no_grad():
                model(inputs["pixel_values"])
            return loss

    class Ours(AACETrainer, LogsAccuracy):
        pass

    plain, vanishing, _ = check_goes_on_working(
        lambda: Convolutional(lambda: nn.BatchNorm2d(8)), tmp_path, trainer=LogsAccuracy, ours=Ours
    )
    assert identical(dict(plain.model.named_buffers()), dict(vanishing.model.named_buffers()))
    assert vanishing.model.layer.num_batches_tracked == 6


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


class MergesInEvaluation(nn.Module):
    """Adds an adapter to its weights in evaluation mode, and takes it off in training mode, as loralib does."""

    def __init__(self, as_buffer):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(10, 64)
        if as_buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(2, 64)), nn.Parameter(torch.randn(10, 2)), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, pixel_values, labels=None):
        x = pixel_values.flatten(1)
        logits = F.linear(x, self.weight) + (0 if self.merged else x @ self.a.T @ self.b.T)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("ascent_every", [1, 3])
@pytest.mark.parametrize("as_buffer", [False, True])
def test_layers_that_change_their_weights_with_the_mode_are_in_training_mode_first(as_buffer, ascent_every, tmp_path):
    """Or after an evaluation the frozen weights would lose the adapter as it is at the perturbed weights."""
    model = MergesInEvaluation(as_buffer)
    before = model.weight.detach().clone()
    settings = {"rho": 0.5, "ascent_every": ascent_every, "eval_strategy": "steps", "eval_steps": 1}
    train(AACETrainer, AACEConfig, model, tmp_path, eval_dataset=digits(16), **settings)
    assert torch.allclose(model.train().weight, before, atol=1e-5)


class KeepsInEvaluation(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        model.train()
        model.layer.eval()


class CheckpointedBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.classifier = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, pixel_values, labels=None):
        hidden = checkpoint(self.norm, self.convolution(pixel_values), use_reentrant=True)
        logits = self.classifier(hidden.relu().mean((2, 3)))
        outputs = {"logits": logits}
        return outputs if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **outputs}


def test_reentrant_checkpointing_of_batch_norm(tmp_path):
    """The ascent pass that finds out about it, on the first step, has already counted the batch: that is undone."""

    def make_model():
        torch.manual_seed(0)
        return CheckpointedBatchNorm()

    plain, *_ = check_goes_on_working(make_model, tmp_path)
    assert plain.model.norm.num_batches_tracked == 2 * 6  # PyTorch counts each forward pass, recomputed ones too


class Reversible(torch.autograd.Function):
    """Runs a backward pass of its own inside the backward pass, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x.detach())
        return x.detach() + layer(x.detach()).detach()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.requires_grad_()
            torch.autograd.backward(ctx.layer(x), gradient)
        return gradient + x.grad, None


class WithReversibleLayer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.reversible, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, pixel_values, labels=None):
        logits = self.last(Reversible.apply(self.first(pixel_values.flatten(1)), self.reversible).tanh())
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


def test_layers_that_run_a_backward_pass_of_their_own_are_perturbed_and_keep_their_gradients(tmp_path):
    """`autograd.grad` gets none of their gradients: these would be added to those that the optimizer gets."""
    check_goes_on_working(WithReversibleLayer, tmp_path, gradient_accumulation_steps=2)
    trainer = trainer_for_single_steps(WithReversibleLayer(), tmp_path, rho=0.5)
    before = weights(trainer.model)
    with trainer.perturbed_weights(trainer.model, batch()):
        moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved == set(before)


def test_reversible_layers_that_are_unfrozen_on_the_way(tmp_path):
    class Unfreezes(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.reversible.requires_grad_(state.global_step >= 2)

    def make_model():
        model = WithReversibleLayer()
        model.reversible.requires_grad_(False)
        return model

    check_goes_on_working(make_model, tmp_path, callbacks=[Unfreezes()])


@pytest.mark.parametrize("rho", [VANISHING, 0.1])
def test_layers_in_evaluation_mode_stay_so_in_a_training_step_of_ones_own(rho, tmp_path):
    """Trainer's puts the model into training mode; one that does not leaves that to the user."""
    seen = []

    class Base(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append([model.training, model.layer.training])
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    class Mine(SharpnessAwareMixin, Base):
        pass

    model = Convolutional(lambda: nn.BatchNorm2d(8))
    model.layer.eval()
    trainer = Mine(model, training_arguments(AACEConfig, tmp_path, max_steps=3, rho=rho), train_dataset=digits(64))
    trainer.add_callback(KeepsInEvaluation())
    trainer.train()
    assert seen == [[True, False]] * 3


def test_a_resumed_run_with_frozen_batch_norm_is_the_uninterrupted_one(tmp_path):
    """Which layers `compute_loss` freezes is known after the first descent only: the step after a save forgets it too."""

    class Frozen(AACETrainer):
        def compute_loss(self, model, *args, **kwargs):
            model.layer.eval()
            return super().compute_loss(model, *args, **kwargs)

    def run(folder, resume=None):
        arguments = training_arguments(
            AACEConfig, tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=3, rho=0.5
        )
        model = Convolutional(lambda: nn.BatchNorm2d(8))
        trainer = Frozen(model, arguments, train_dataset=digits(64))
        trainer.train(resume_from_checkpoint=resume)
        return weights(model)

    assert identical(run("whole"), run("resumed", str(tmp_path / "whole" / "checkpoint-3")))
