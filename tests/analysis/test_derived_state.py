# SPDX-License-Identifier: Apache-2.0
"""Models that keep in evaluation mode what they derive from weights: measured rightly or refused by name, and left as they were."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import identical, small_data, weights
from tiny_configs import image_classifier, inputs
from torch import nn

from hf_aace.analysis.landscape import loss_path, loss_surface
from hf_aace.analysis.sharpness import hessian_eigenvalues, measure_sharpness, sam_sharpness


QUICK = {"m": 4, "steps": 3, "directions": 3, "eigenvalues": 1, "products": 6}


class Scaled(nn.Module):
    """Computes the scale of its hidden layer anew in each forward pass. The others keep it in evaluation mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(20, 8), nn.Linear(8, 3)
        self.v = nn.Parameter(0.5 * torch.randn(8))
        self.kept, self.cache = None, {}

    def forward(self, x):
        return self.head(F.gelu(self.first(x)) * self.scale())

    def scale(self):
        return self.v.exp()


class KeptUntilTrain(Scaled):
    """Keeps the scale with its graph, which is used up by one backward pass."""

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def scale(self):
        if self.training:
            return self.v.exp()
        if self.kept is None:
            self.kept = self.v.exp()
        return self.kept


class KeptByDevice(Scaled):
    """Keeps the scale in a dictionary, as LeViT keeps its biases."""

    def train(self, mode=True):
        self.cache.clear()
        return super().train(mode)

    def scale(self):
        return self.v.exp() if self.training else self.cache.setdefault(str(self.v.device), self.v.exp())


class FusedInEval(Scaled):
    """Keeps the product of two layers, as re-parametrized networks do."""

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.head(self.first(x) * self.v)
        if self.kept is None:
            weight = self.head.weight * self.v
            self.kept = weight @ self.first.weight, weight @ self.first.bias + self.head.bias
        return F.linear(x, *self.kept)


class Unfused(Scaled):
    """Computes what `FusedInEval` does."""

    def forward(self, x):
        return self.head(self.first(x) * self.v)


class DerivedByEval(Scaled):
    """Derives the scale in `eval()`, without a gradient."""

    def train(self, mode=True):
        self.kept = None if mode else self.v.detach().exp()
        return super().train(mode)

    def scale(self):
        return self.v.exp() if self.kept is None else self.kept


class DroppedByForward(Scaled):
    """Drops the scale in a forward pass in training mode only."""

    def scale(self):
        if self.training:
            self.kept = None
        elif self.kept is None:
            self.kept = self.v.exp()
        return self.v.exp() if self.kept is None else self.kept


class InBuffer(Scaled):
    """Writes the scale to a buffer at the first forward pass in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", torch.zeros(8), persistent=False)
        self.written = False

    def scale(self):
        if not self.training and not self.written:
            self.buffer.copy_(self.v.detach().exp())
        self.written = not self.training
        return self.v.exp() if self.training else self.buffer


class Merged(Scaled):
    """Adds two low-rank factors to a frozen weight in `eval()` and takes them out in `train()`, in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(0.3 * torch.randn(2, 20)), nn.Parameter(0.3 * torch.randn(8, 2))
        self.first.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode=True):
        if mode == self.merged:
            self.first.weight.data += (-1 if mode else 1) * (self.b.data @ self.a.data)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        weight = self.first.weight if self.merged else self.first.weight + self.b @ self.a
        return self.head(F.gelu(F.linear(x, weight, self.first.bias)))


class ModulePutInPlace(Scaled):
    """Puts a layer in place of two at the first forward pass in evaluation mode."""

    def train(self, mode=True):
        self._modules.pop("fused", None)
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.head(self.first(x))
        if "fused" not in self._modules:
            self.fused = nn.Linear(20, 3)
            self.fused.weight.data = self.head.weight.data @ self.first.weight.data
            self.fused.bias.data = self.head(self.first.bias).data
        return self.fused(x)


class ExportedByEval(Scaled):
    """Answers in evaluation mode by a copy that `eval()` makes of the whole network."""

    def train(self, mode=True):
        self.kept = None if mode else {name: p.detach().clone() for name, p in self.named_parameters()}
        return super().train(mode)

    def forward(self, x):
        if self.kept is None:
            return super().forward(x)
        hidden = F.linear(x, self.kept["first.weight"], self.kept["first.bias"])
        return F.linear(F.gelu(hidden) * self.kept["v"].exp(), self.kept["head.weight"], self.kept["head.bias"])


def evaluated(model):
    """Bring a model into the state after an evaluation. Returns its answers."""
    with torch.no_grad():
        return model.eval()(small_data()[0]["x"])


def attributes(model):
    return {name: value for name, value in vars(model).items() if not name.startswith("_")} | {
        "cache": {**model.cache}
    }


@pytest.mark.parametrize("before", ["training", "evaluation", "evaluated"])
@pytest.mark.parametrize(
    ("model", "reference"),
    [(KeptUntilTrain, Scaled), (KeptByDevice, Scaled), (FusedInEval, Unfused)],
    ids=lambda cls: cls.__name__,
)
def test_what_train_drops_is_derived_from_the_moved_weights(model, reference, before):
    """The measures and the grids are those of a model that keeps nothing."""
    model, reference, data = model(), reference(), small_data()
    if before == "evaluated":
        evaluated(model)
    model.train(before == "training")
    found, expected = measure_sharpness(model, data, **QUICK), measure_sharpness(reference, data, **QUICK)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=1e-6, err_msg=name)
    grids = [loss_surface(each, data, points=3).loss for each in (model, reference)]
    np.testing.assert_allclose(*grids, rtol=1e-5)
    ends = type(reference)()
    with torch.no_grad():
        ends.v += 1
    lines = [loss_path(each, ends, data, points=3).loss for each in (model, reference)]
    np.testing.assert_allclose(*lines, rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [KeptUntilTrain, KeptByDevice, FusedInEval, DerivedByEval, ExportedByEval, InBuffer, Merged, ModulePutInPlace],
)
def test_afterwards_the_model_answers_as_before_and_keeps_what_it_kept(model):
    model = model()
    answers = evaluated(model)
    before, state = attributes(model), weights(model)
    for measure in (
        lambda: sam_sharpness(model, small_data(), 0.5),
        lambda: loss_surface(model, small_data(), points=2),
    ):
        try:
            measure()
        except ValueError:
            assert not isinstance(model, KeptUntilTrain | KeptByDevice | FusedInEval)
        assert attributes(model) == before and identical(weights(model), state)
        with torch.no_grad():
            assert torch.equal(model(small_data()[0]["x"]), answers)


@pytest.mark.parametrize("name", ["LevitForImageClassification", "LevitForImageClassificationWithTeacher"])
def test_levit_is_measured_with_the_biases_of_the_moved_weights(name):
    """A step of SAM raises the loss by what it does in a model that is loaded with the moved weights."""
    model, fresh = image_classifier(name), image_classifier(name).eval()
    data = inputs(name, 4)
    labels = torch.arange(4)
    with torch.no_grad():
        for each in (model, fresh):
            for p in each.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(fresh(**data).logits, labels)
    gradients = torch.autograd.grad(loss, list(fresh.parameters()), materialize_grads=True)
    length = torch.cat([g.reshape(-1) for g in gradients]).norm()
    fresh.train().eval()
    with torch.no_grad():
        for p, g in zip(fresh.parameters(), gradients, strict=True):
            p += 0.2 * g / length
        rise = float(F.cross_entropy(fresh(**data).logits, labels) - loss)
    assert sam_sharpness(model, [data | {"labels": labels}], 0.2, steps=1) == pytest.approx(rise, rel=1e-4)
    assert sam_sharpness(model, [data | {"labels": labels}], 0.2, steps=1) == pytest.approx(rise, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "parameter"),
    [
        (DerivedByEval, "'v' of DerivedByEval"),
        (ExportedByEval, "'v' of ExportedByEval"),
        (DroppedByForward, "'v' of DroppedByForward"),
        (InBuffer, "'v' of InBuffer"),
        (Merged, "'a' of Merged"),
        (ModulePutInPlace, "'first.weight' of Linear"),
    ],
)
@pytest.mark.parametrize("evaluate", [False, True], ids=["new", "evaluated"])
def test_what_no_change_of_mode_drops_is_refused_by_name(model, parameter, evaluate):
    model = model()
    if evaluate:
        evaluated(model)
    for measure in (
        lambda: sam_sharpness(model, small_data(), 0.5),
        lambda: hessian_eigenvalues(model, small_data()),
        lambda: loss_surface(model, small_data(), points=2),
    ):
        with pytest.raises(ValueError, match=f"do not follow the parameter {parameter}"):
            measure()


class Unused(KeptUntilTrain):
    """Has parameters that no forward pass uses: in a module that keeps something, and beside a buffer."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("constant", torch.ones(3))
        self.auxiliary = KeptUntilTrain()
        evaluated(self.auxiliary)
        self.norm = nn.BatchNorm1d(8)

    def scale(self):
        return self.norm(super().scale().expand(2, -1))[:1]


def test_parameters_that_no_pass_uses_are_no_reason_to_refuse():
    model = Unused()
    before = weights(model)
    assert sam_sharpness(model, small_data(), 0.5) > 0
    assert identical(weights(model), before), "also the running statistics"


class SteepToken(KeptUntilTrain):
    """Normalizes a token of zeros, whose effect follows its gradient for tiny steps only."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))

    def scale(self):
        return super().scale() + F.layer_norm(self.token, (8,), eps=1e-12)


def test_a_parameter_with_a_steep_effect_is_no_reason_to_refuse():
    assert sam_sharpness(SteepToken(), small_data(), 0.5) > 0


def test_parametrizations_are_not_refused():
    model = Scaled()
    nn.utils.parametrizations.weight_norm(model.first)
    assert sam_sharpness(model, small_data(), 0.5) > 0


def test_a_list_that_a_module_fills_is_afterwards_the_same_list_with_what_it_held():
    """Somebody may hold it: a recorder of activations."""
    model = Scaled()
    model.recorded = recorded = [0]
    model.register_forward_hook(lambda module, *_: module.recorded.append(1))
    sam_sharpness(model, small_data(), 0.5)
    assert model.recorded is recorded and recorded == [0]


def test_weights_that_a_hook_computes_are_afterwards_those_of_the_model():
    """The older `weight_norm` leaves the weight of the last forward pass as an attribute of the layer."""
    model = Scaled()
    nn.utils.weight_norm(model.first)
    weight = model.first.weight.detach().clone()
    assert sam_sharpness(model, small_data(), 0.5) > 0
    assert torch.equal(model.first.weight, weight)


def test_a_parameter_that_only_training_uses_is_no_reason_to_refuse():
    """As Wav2Vec2 has one for what it masks, beside a convolution with weight normalization."""

    class WithMask(Scaled):
        def __init__(self):
            super().__init__()
            self.mask = nn.Parameter(torch.ones(8))
            nn.utils.parametrizations.weight_norm(self.first)

        def scale(self):
            return super().scale() + (self.mask if self.training else 0)

    assert sam_sharpness(WithMask(), small_data(), 0.5) > 0
