# SPDX-License-Identifier: Apache-2.0
"""The pictures of studies: they have room for what they show, and compare only what can be compared."""

import warnings

import pandas as pd
import pytest
from matplotlib.axes import Axes

from hf_aace.study.plots import plot_accuracies, plot_accuracy_by_rho, plot_accuracy_by_time
from hf_aace.study.statistics import candidates_of, summarize


def runs_of(methods, seeds=2):
    return pd.DataFrame(
        {
            "method": candidate.method,
            "options": candidate.options,
            "seed": seed,
            "validation_accuracy": 0.7,
            "test_accuracy": 0.8 + 0.01 * seed,
            "seconds": 1.0,
        }
        for method in methods
        for candidate in candidates_of(method)
        for seed in range(seeds)
    )


@pytest.mark.parametrize("extra", ["", ":adaptive_perturbation=true"])
def test_pictures_have_room_for_long_names(extra, tmp_path):
    """As in published tables; matplotlib warns where nothing is left for the axes."""
    long = f"aace:perturb_modules=norm:ascent_fraction=0.5:ascent_every=4{extra}:learning_rate=1e-3|3e-3:rho=10|30"
    runs = runs_of(["trainer", "sam:rho=0.1|0.2", long])
    summary = summarize(runs, "trainer")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "constrained_layout not applied")
        plot_accuracies(summary, runs, "a", tmp_path / "accuracy.png")
        plot_accuracy_by_time(summary, "a", tmp_path / "time.png")
        assert plot_accuracy_by_rho(runs, "a", tmp_path / "rho.png")


def test_an_expression_in_a_name_is_not_taken_for_mathematics(tmp_path):
    """Between two dollars matplotlib knows no `\\w`, and would end the command after all runs were made."""
    runs = runs_of(["trainer", r"aace:perturb_modules=a$\w$:rho=0.1|0.2"])
    summary = summarize(runs, "trainer")
    plot_accuracies(summary, runs, "a", tmp_path / "accuracy.png")
    plot_accuracy_by_time(summary, "a", tmp_path / "time.png")
    assert plot_accuracy_by_rho(runs, "a", tmp_path / "rho.png")


def test_there_is_no_picture_by_rho_where_no_rho_was_searched(tmp_path):
    """Neither of methods that have their default rho, nor of options other than rho."""
    runs = runs_of(["trainer:learning_rate=1e-3|3e-3", "sam", "aace:rho=0.1", "aace:ascent_fraction=0.25|0.5"])
    assert not plot_accuracy_by_rho(runs, "a", tmp_path / "rho.png")
    assert not list(tmp_path.iterdir())


def test_there_is_no_picture_by_rho_without_validation_images(tmp_path):
    runs = runs_of(["trainer", "aace:rho=0.1|0.2"]).assign(validation_accuracy=float("nan"))
    assert not plot_accuracy_by_rho(runs, "a", tmp_path / "rho.png")


def test_lines_and_band_of_the_picture_by_rho_are_of_the_same_seeds(tmp_path, monkeypatch):
    """Those on which all values were tried: plain training ran on more."""
    drawn = {}
    monkeypatch.setattr(Axes, "legend", lambda axes, **kwargs: None)  # nothing is drawn that it could name
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **kwargs: drawn.update(plain=y))
    monkeypatch.setattr(Axes, "errorbar", lambda axes, x, y, **kwargs: drawn.update(aace=(list(x), list(y))))
    accuracies = {
        ("trainer", "rho=0"): [0.5, 0.7, 0.9],
        ("aace:rho=2|1", "method=aace rho=2"): [0.8, 0.6, 0.1],
        ("aace:rho=2|1", "method=aace rho=1"): [0.6, 0.6],
    }
    runs = pd.DataFrame(
        {"method": method, "options": options, "seed": seed, "validation_accuracy": accuracy}
        for (method, options), own in accuracies.items()
        for seed, accuracy in enumerate(own)
    )
    assert plot_accuracy_by_rho(runs, "a", tmp_path / "rho.png")
    assert drawn == {"plain": pytest.approx(60), "aace": ([1, 2], [pytest.approx(60), pytest.approx(70)])}
