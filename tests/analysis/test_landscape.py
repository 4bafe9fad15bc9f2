# SPDX-License-Identifier: Apache-2.0
"""Grids of the loss: what lies at known points of them, and that they are computed once."""

import numpy as np
import pytest
import torch
from tiny import MODELS, Small, batch, identical, resnet, small_data, weights
from torch import nn

import hf_aace.analysis.landscape
from hf_aace.analysis.landscape import loss_path, loss_surface
from hf_aace.analysis.sharpness import hessian_eigenvalues, losses_and_gradient_norms


def loss_at(model, data):
    return losses_and_gradient_norms(model, data)["cross_entropy"]


@pytest.mark.parametrize("name", MODELS)
def test_a_path_joins_two_models_and_moves_neither(name):
    """Also with BatchNorm, whose statistics belong to a model as its weights do."""
    data = [batch(8)]
    first, second = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.1)
    for _ in range(3):
        second.train()(batch(8, start=8)["pixel_values"] * 3)
    before = weights(first), weights(second)
    path = loss_path(first, second, data, start=0, stop=1, points=5)
    assert path.loss[[0, -1]] == pytest.approx([loss_at(first, data), loss_at(second, data)], rel=1e-5)
    assert path.position.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert identical(weights(first), before[0]) and identical(weights(second), before[1])


def test_the_middle_and_the_outside_of_a_path():
    first, second, between = Small(), Small(), Small()
    with torch.no_grad():
        for p in second.parameters():
            p += torch.randn(p.shape)
    data = small_data()
    path = loss_path(first, second, data, start=-1, stop=1.5, points=6)
    for position, loss in zip(path.position, path.loss, strict=True):
        between.load_state_dict(
            {k: torch.lerp(v, second.state_dict()[k], float(position)) for k, v in first.state_dict().items()}
        )
        assert loss == pytest.approx(loss_at(between, data), rel=1e-4)


def test_a_path_goes_beyond_models_whose_variances_differ_much():
    """Those of BatchNorm stay as at the ends: extrapolated, they would be negative."""
    first, second = MODELS["resnet"](), MODELS["resnet"]()
    for module in second.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(10)
    losses = loss_path(first, second, [batch(8)], points=5).loss
    assert np.isfinite(losses).all() and losses[0] == pytest.approx(losses[1])  # -0.5 and 0 differ in statistics alone


class TwoLayers(nn.Module):
    def __init__(self, order, tied=False):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(10, 10, bias=False))
        if tied:
            self.a.weight = self.b.weight

    def forward(self, pixel_values, labels=None):
        return (self.b(self.a(pixel_values.flatten(1)[:, :10]).tanh()),)


def test_a_path_pairs_weights_by_their_names():
    """Models of the same names and shapes may hold their layers in another order."""
    torch.manual_seed(0)
    first, second, data = TwoLayers("ab"), TwoLayers("ba"), [batch(8)]
    path = loss_path(first, second, data, start=0, stop=1, points=2)
    assert path.loss == pytest.approx([loss_at(first, data), loss_at(second, data)], rel=1e-5)
    with pytest.raises(ValueError, match=r"same architecture.* tie different weights"):
        loss_path(first, TwoLayers("ab", tied=True), data)


def test_no_path_between_architectures():
    with pytest.raises(ValueError, match=r"same architecture.*net"):
        loss_path(Small(), resnet(), small_data())


def test_a_surface_has_the_model_in_its_middle_and_leaves_it_as_it_was():
    model, data = resnet(), [batch(8), batch(4, start=8)]
    before = weights(model)
    for directions in ("random", "eigenvectors"):
        surface = loss_surface(model, data, directions=directions, radius=0.2, points=3)
        assert surface.loss.shape == (3, 3)
        assert surface.loss[1, 1] == pytest.approx(loss_at(model, data), rel=1e-6)
        assert identical(weights(model), before)


def test_random_directions_scale_with_the_filters():
    """Why they are normalised: the picture does not change when a layer is scaled up and the next one down."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    torch.nn.init.zeros_(model[0].bias)
    data = [{"input": b["x"], "labels": b["labels"]} for b in small_data()]
    before = loss_surface(model, data, points=3)
    with torch.no_grad():
        model[0].weight *= 16
        model[2].weight /= 16
    np.testing.assert_allclose(loss_surface(model, data, points=3).loss, before.loss, rtol=1e-4)


def test_each_filter_of_a_random_direction_is_as_long_as_that_of_the_model():
    """As Li et al. have it; vectors, such as biases, stay."""
    model, seen = Small(), []
    model.register_forward_hook(lambda *_: seen.append(weights(model)))
    loss_surface(model, small_data((5,)), points=3)
    clean = weights(model)
    assert len(seen) == 9
    for moved in (seen[5], seen[7]):  # by 1 along one of the directions, and by 0 along the other
        for name, value in clean.items():
            step = moved[name] - value
            if value.dim() < 2:
                assert not step.any()
            else:
                torch.testing.assert_close(step.norm(dim=1), value.norm(dim=1))


def test_along_the_eigenvectors_the_curvature_is_the_eigenvalue():
    model, data, step = Small().double(), [{"x": b["x"].double(), "labels": b["labels"]} for b in small_data()], 1e-3
    values, _ = hessian_eigenvalues(model, data, 2)
    loss = loss_surface(model, data, directions="eigenvectors", radius=step, points=3).loss
    curvatures = [(loss[1, 2] + loss[1, 0] - 2 * loss[1, 1]), (loss[2, 1] + loss[0, 1] - 2 * loss[1, 1])]
    assert np.array(curvatures) / step**2 == pytest.approx(values, rel=1e-3)


def test_the_seed_draws_the_directions():
    model, data = Small(), small_data()
    first, again, other = (loss_surface(model, data, points=3, seed=seed).loss for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_grid_is_computed_once_for_the_same_model_data_and_settings(tmp_path, monkeypatch):
    calls = []
    loss = hf_aace.analysis.landscape.EmpiricalRisk.loss
    monkeypatch.setattr(hf_aace.analysis.landscape.EmpiricalRisk, "loss", lambda self: calls.append(0) or loss(self))

    def computed(model=None, data=None, **settings):
        calls.clear()
        surface = loss_surface(model or Small(), data or small_data(), points=2, cache_dir=tmp_path, **settings)
        assert calls or np.array_equal(surface.loss, first.loss)
        return bool(calls)

    first = loss_surface(Small(), small_data(), points=2, cache_dir=tmp_path)
    assert not computed()
    changed = Small()
    with torch.no_grad():
        changed.net[0].bias[0] += 1e-6
    other_data = small_data()
    other_data[1]["labels"] = (other_data[1]["labels"] + 1) % 3
    assert computed(changed) and computed(data=other_data) and computed(seed=1) and computed(radius=0.5)
    assert not computed()
    assert all(path.suffixes == [".npz"] for path in tmp_path.iterdir())
    paths = [loss_path(Small(), changed, small_data(), points=2, cache_dir=tmp_path) for _ in range(2)]
    assert np.array_equal(paths[0].loss, paths[1].loss)


def test_a_grid_of_other_settings_is_computed_anew(tmp_path):
    """Or a picture would be that of another plane, or of another part of the line."""

    def surface(model=None, **settings):
        return loss_surface(model or Small(), small_data(), cache_dir=tmp_path, **{"points": 2, **settings})

    def path(**settings):
        return loss_path(Small(), Small(), small_data(), cache_dir=tmp_path, **{"points": 2, **settings})

    frozen = Small()
    frozen.net[0].requires_grad_(False)
    made = [surface(), surface(directions="eigenvectors"), surface(points=3), surface(frozen)]
    made += [path(), path(start=0), path(stop=1), path(points=3)]
    assert len(list(tmp_path.iterdir())) == len(made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 1}, "`points` must be at least 2, got 1"),
        ({"radius": 0.0}, "`radius` must be a finite number > 0, got 0.0"),
        ({"directions": "pca"}, "`directions` must be 'random' or 'eigenvectors', got 'pca'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        loss_surface(Small(), small_data(), **settings)
