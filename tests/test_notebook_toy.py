# SPDX-License-Identifier: Apache-2.0
"""The model of two weights in notebook 2 shows what the notebook says."""

from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_aace.analysis.sharpness import hessian_eigenvalues


def _toy():
    """Execute the cell of the notebook that is tagged `toy`."""
    path = Path(__file__).parents[1] / "notebooks" / "02_what_aace_does.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    (source,) = (cell.source for cell in cells if "toy" in cell.metadata.get("tags", []))
    names = {}
    exec(compile(source, "notebook 2", "exec"), names)
    return SimpleNamespace(**names)


toy = _toy()
METHODS, TwoWeights, train_toy = toy.METHODS, toy.TwoWeights, toy.train_toy
toy_data, toy_loss, toy_minimum = toy.toy_data, toy.toy_loss, toy.toy_minimum


@pytest.fixture(scope="module")
def runs():
    return {method: train_toy(method) for method in METHODS}


def balance(run):
    """The share of the way from the sharp end (0) to the flat minimum (1), by `a**2 - b**2`."""
    differences = run.weights[:, 0] ** 2 - run.weights[:, 1] ** 2
    return 1 - differences[-1] / differences[0]


def test_the_numbers_of_a_run_are_those_of_the_network(runs):
    x, labels = toy_data()
    for run in runs.values():
        for step in (0, 3, -1):
            model = TwoWeights(*run.weights[step])
            value = hessian_eigenvalues(model, [{"x": x, "labels": labels}])[0][0]
            assert run.sharpness[step] == pytest.approx(value, rel=1e-6)
        for step in (0, 3):
            loss = F.cross_entropy(TwoWeights(*run.weights[step])(x), labels).item()
            assert run.loss[step] == pytest.approx(loss)
            assert toy_loss(*run.weights[step]) == pytest.approx(loss)


def test_plain_training_stays_at_the_sharp_minimum(runs):
    run = runs["plain"]
    assert run.weights[-1].prod() == pytest.approx(toy_minimum(), abs=1e-3)
    assert abs(balance(run)) < 0.1
    assert np.array_equal(run.perturbed, run.weights[:-1])


def test_sam_walks_along_the_minima_and_stops_if_its_step_vanishes(runs):
    sam, unnormalised = runs["sam"], runs["sam_not_normalized"]
    assert sam.weights[-1].prod() == pytest.approx(toy_minimum(), abs=0.1)
    assert balance(sam) > 0.5 > 0.25 > balance(unnormalised)
    np.testing.assert_allclose(np.linalg.norm(sam.perturbed - sam.weights[:-1], axis=1), 0.2, rtol=1e-5)
    assert unnormalised.ascent_grad_norm[-1] < 1e-6
    assert np.array_equal(unnormalised.weights[-1], unnormalised.weights[-2])
    assert sam.sharpness[-1] < 0.7 * runs["plain"].sharpness[-1]


def test_aace_comes_to_rest_with_the_perturbed_weights_at_a_minimum(runs):
    run = runs["aace"]
    assert run.ascent_grad_norm[-1] > 4 * run.ascent_grad_norm[0]
    assert run.perturbed[-1].prod() == pytest.approx(toy_minimum(), abs=1e-3)
    assert run.weights[-1].prod() > 1.5 * toy_minimum()
    assert run.sharpness[-1] < 0.5 * runs["plain"].sharpness[-1]
    assert run.loss[-1] > runs["plain"].loss[-1]


def test_every_method_but_the_plain_one_takes_the_gradient_where_the_loss_is_higher():
    """With a step so small that the loss is linear on it, at weights that are sure of their answers."""
    x, labels = toy_data()
    for method in METHODS:
        run = train_toy(method, rho=1e-3, start=(2.0, 1.0), steps=3)
        for weights, loss in zip(run.perturbed, run.loss, strict=True):
            rise = F.cross_entropy(TwoWeights(*weights)(x), labels).item() - loss
            assert rise == 0 if method == "plain" else rise > 0, method


def test_the_curve_of_minima_is_sharp_at_its_ends_and_flat_in_the_middle():
    x, labels = toy_data()
    middle = toy_minimum() ** 0.5
    for factor in (1, 2, 0.5):
        a, b = middle * factor, middle / factor
        value = hessian_eigenvalues(TwoWeights(a, b), [{"x": x, "labels": labels}])[0][0]
        if factor == 1:
            flattest = value
        assert value / flattest == pytest.approx((a**2 + b**2) / (2 * middle**2), rel=1e-3)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"`method` must be one of .*got 'gsam'"):
        train_toy("gsam")
    assert torch.is_grad_enabled()
