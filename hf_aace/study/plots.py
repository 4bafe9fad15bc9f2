# SPDX-License-Identifier: Apache-2.0
"""The pictures of studies: accuracy by method, by time and by rho, and the cost of a step."""

import itertools
import os
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.style import BLUE, ORANGE, PURPLE, SCREEN, lines_of
from .statistics import searched_settings, settings_of, short_name


_STYLE = SCREEN | {"axes.titlesize": "medium"}
_LABEL_WIDTH = 32  # characters: leaves room for the axes
_COLORS = {"trainer": "0.45", "sam": ORANGE, "asam": PURPLE, "aace": BLUE}
_MARKERS = "osD^vP*Xhd<>"  # several settings of a method have the same color
_DASHES = ["--", ":", "-.", (0, (9, 3)), (0, (1, 4)), (0, (9, 3, 1, 3, 1, 3))]


@rc_context(_STYLE)
def plot_accuracies(summary: pd.DataFrame, runs: pd.DataFrame, title: str, path: str | os.PathLike) -> None:
    """
    Draw the test accuracy of each method: mean, standard error, and a dot for each seed.

    Args:
        summary (`pd.DataFrame`): The summary of the runs by [`~hf_aace.study.statistics.summarize`].
        runs (`pd.DataFrame`): The runs.
        title (`str`): The title: which model, on which images.
        path (`str` or `os.PathLike`): The file to write; its suffix gives the format.
    """
    labels = [_label(row) for row in summary.itertuples()]
    lines = sum(max(2, 1 + label.count("\n")) for label in labels)
    axes = _axes(1.2 + 0.23 * lines, title, "test accuracy in per cent\n(mean and standard error; each seed)")
    for place, row in enumerate(summary.itertuples()):
        own = runs[(runs["method"] == row.method) & (runs["options"] == row.options)]
        color = _color(row.method)
        axes.plot(100 * own["test_accuracy"], [place + 0.2] * len(own), ".", color=color, alpha=0.5, markersize=5)
        style = {"fmt": "o", "color": color, "capsize": 3, "markersize": 6}
        axes.errorbar(100 * row.accuracy, place, xerr=100 * row.standard_error, **style)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.figure.savefig(path)


@rc_context(_STYLE)
def plot_accuracy_by_time(summary: pd.DataFrame, title: str, path: str | os.PathLike) -> None:
    """
    Draw the test accuracy of each method against its training time.

    Args:
        summary (`pd.DataFrame`): The summary of the runs by [`~hf_aace.study.statistics.summarize`].
        title (`str`): The title: which model, on which images.
        path (`str` or `os.PathLike`): The file to write; its suffix gives the format.
    """
    axes = _axes(4.2, title, "training time, relative to the baseline", "test accuracy in per cent")
    for row, marker in zip(summary.itertuples(), itertools.cycle(_MARKERS), strict=False):
        style = {"fmt": marker, "color": _color(row.method), "capsize": 3, "markersize": 7}
        axes.errorbar(row.ratio, 100 * row.accuracy, yerr=100 * row.standard_error, label=_label(row), **style)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.figure.savefig(path)


@rc_context(_STYLE)
def plot_accuracy_by_rho(runs: pd.DataFrame, title: str, path: str | os.PathLike) -> bool:
    """
    Draw the validation accuracy by rho: a line for each method of which several values were tried, a band for each setting
    without perturbation.

    Args:
        runs (`pd.DataFrame`): The runs.
        title (`str`): The title: which model, on which images.
        path (`str` or `os.PathLike`): The file to write; its suffix gives the format.

    Returns:
        `bool`: Whether there was anything to draw. If not, no file is written.
    """
    table = _accuracy_by_rho(runs)
    tried = sorted({rho for _, rho in table.columns if rho > 0})
    if not tried:
        return False
    axes = _axes(4.2, title, r"$\rho$", "validation accuracy in per cent")
    markers, dashes = itertools.cycle(_MARKERS), itertools.cycle(_DASHES)
    # Plain training, and a setting that was chosen, have run with more seeds than the others.
    shared = table.dropna()
    for name in table.columns.unique("line"):
        line = shared[name] if len(shared) else table[name].dropna()
        line = line.sort_index(axis="columns")
        mean, error, color = line.mean(), line.sem(), _color(name)
        if set(line) == {0}:
            axes.axhline(mean[0], color=color, linestyle=next(dashes), linewidth=1, label=_wrapped(name))
            axes.axhspan(mean[0] - error[0], mean[0] + error[0], color=color, alpha=0.12, linewidth=0)
        else:
            style = {"fmt": f"{next(markers)}-", "color": color, "capsize": 3, "label": _wrapped(name)}
            axes.errorbar(list(line), list(mean), yerr=list(error), **style)
    axes.set_xscale("log", nonpositive="mask")
    steps = [second / first for first, second in itertools.pairwise(tried)]
    crowded = len(tried) > 6 or (tried[-1] / tried[0]) ** 0.05 > min(steps, default=10)
    axes.set_xticks(tried, [f"{rho:g}" for rho in tried], rotation=45 if crowded else 0)
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.figure.savefig(path)
    return True


@rc_context(SCREEN | {"axes.grid": False})
def plot_costs(rows: list[dict[str, Any]], title: str, path: str | os.PathLike) -> None:
    """
    Draw the cost of a step by each method, relative to plain training, with the quartiles over the rounds.

    Args:
        rows (`list[dict]`):
            The rows that [`~hf_aace.study.cost.summarize`] returns.
        title (`str`):
            The title: which model, on what.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.
    """
    axes = _axes(1.2 + 0.42 * len(rows), "", "time of a step, relative to plain training\n(median and quartiles)")
    names, ratios = [row["name"] for row in rows], np.array([row["ratio"] for row in rows])
    low, high = np.array([row["ratio_quartiles"] for row in rows]).T
    colors = [BLUE if name.startswith("AACE") else ORANGE if name.startswith("SAM") else "0.6" for name in names]
    bars = axes.barh(names, ratios, xerr=[ratios - low, high - ratios], color=colors, ecolor="0.3", capsize=3)
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=8)
    axes.axvline(1, color="0.3", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.15 * max(high))
    axes.invert_yaxis()
    # Also above the names, which are long.
    axes.figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold", fontsize="medium")
    axes.figure.savefig(path)


def _accuracy_by_rho(runs: pd.DataFrame) -> pd.DataFrame:
    """The validation accuracy in per cent, a row for each seed, with columns by `line` of the picture and `rho`."""
    points = {}
    for method, own in runs.dropna(subset="validation_accuracy").groupby("method", sort=False):
        searched = searched_settings(own)
        for options, same in own.groupby("options", sort=False):
            settings = settings_of(options)
            rho = float(settings.get("rho", "nan"))
            if rho == 0 or "rho" in searched:
                others = [f"{name}={settings[name]}" for name in searched if name != "rho" and name in settings]
                name = ":".join([short_name(method), *others])
                points[name, rho] = 100 * same.set_index("seed")["validation_accuracy"]
    return pd.DataFrame(points, columns=pd.MultiIndex.from_tuples(points, names=["line", "rho"]) if points else None)


def _color(method: str) -> str:
    return _COLORS[method.partition(":")[0]]


def _label(row) -> str:
    name = _wrapped(short_name(row.method))
    return f"{name}\n{lines_of(row.choice, _LABEL_WIDTH)}" if row.choice else name


def _wrapped(method: str) -> str:
    return lines_of(method.replace(":", ": "), _LABEL_WIDTH)


def _axes(height: float, title: str, x: str, y: str | None = None) -> Axes:
    return Figure(figsize=(7.5, height)).add_subplot(title=title, xlabel=x, ylabel=y)
