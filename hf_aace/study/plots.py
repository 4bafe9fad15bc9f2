# SPDX-License-Identifier: Apache-2.0
"""The pictures of studies: accuracy by method, by time and by rho."""

import itertools
import os
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.plots import BLUE, ORANGE, PURPLE
from .statistics import Result, choose, mean_and_error


_LABEL_WIDTH = 32  # characters: as wide as leaves room for the axes
_COLOURS = {"trainer": "0.45", "sam": ORANGE, "asam": PURPLE, "aace": BLUE}


def plot_accuracies(rows: list[dict[str, Any]], results: list[Result], title: str, path: str | os.PathLike) -> None:
    """
    Draws the test accuracy of each method: mean, standard error, and a dot for each seed.

    Args:
        rows (`list[dict]`):
            What [`~hf_aace.study.statistics.summarize`] returns.
        results (`list[Result]`):
            The results of the runs.
        title (`str`):
            The title: which model, on what.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.
    """
    chosen = choose(results)
    lines = sum(max(2, 1 + _method_label(row).count("\n")) for row in rows)
    figure = Figure(figsize=(7.5, 1.2 + 0.23 * lines), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        method = row["method"]
        own = [100 * result.test for result in results if result.candidate == chosen[method]]
        colour = _method_colour(method)
        axes.plot(own, [place + 0.2] * len(own), ".", color=colour, alpha=0.5, markersize=5)
        axes.errorbar(
            100 * row["accuracy"],
            place,
            xerr=100 * row["standard_error"],
            fmt="o",
            color=colour,
            capsize=3,
            markersize=6,
        )
    axes.set_yticks(range(len(rows)), [_method_label(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    _finish(figure, axes, title, "test accuracy in per cent\n(mean and standard error; each seed)", None, path)


def plot_accuracy_by_time(rows: list[dict[str, Any]], title: str, path: str | os.PathLike) -> None:
    """
    Draws the test accuracy of each method against the time that it takes to train.

    Args:
        rows (`list[dict]`):
            What [`~hf_aace.study.statistics.summarize`] returns.
        title (`str`):
            The title: which model, on what.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    markers = itertools.cycle("osD^vP*Xhd<>")  # the same colour stands for several settings of a method
    for row, marker in zip(rows, markers, strict=False):
        axes.errorbar(
            row["ratio"],
            100 * row["accuracy"],
            yerr=100 * row["standard_error"],
            fmt=marker,
            color=_method_colour(row["method"]),
            capsize=3,
            markersize=7,
            label=_method_label(row),
        )
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(figure, axes, title, "training time, relative to the baseline", "test accuracy in per cent", path)


def plot_accuracy_by_rho(results: list[Result], title: str, path: str | os.PathLike) -> bool:
    """
    Draws, for each method of which several values of rho were tried, the validation accuracy by rho; and as a band that of
    the methods without perturbation.

    Args:
        results (`list[Result]`):
            The results of the runs.
        title (`str`):
            The title: which model, on what.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.

    Returns:
        `bool`: Whether there was anything to draw. If not, no file is written.
    """
    points = {}  # of each line, the accuracies by rho
    for result in results:
        options = dict(result.candidate.options)
        rho = float(options.pop("rho"))
        if result.validation is not None and (rho == 0 or "rho" in result.candidate.varied):
            others = [f"{name}={options[name]}" for name in result.candidate.varied if name != "rho"]
            name = ":".join([*(part for part in result.candidate.method.split(":") if "|" not in part), *others])
            points.setdefault(name, {}).setdefault(rho, {})[result.seed] = 100 * result.validation
    if not any(rho > 0 for line in points.values() for rho in line):
        return False
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    markers = itertools.cycle("osD^vP*Xhd<>")
    dashes = itertools.cycle(["--", ":", "-.", (0, (9, 3)), (0, (1, 4)), (0, (9, 3, 1, 3, 1, 3))])
    # Those of plain training, and of the setting that was chosen, would else be of more seeds than the others.
    everywhere = set.intersection(*(set(own) for line in points.values() for own in line.values()))
    for name, line in points.items():
        shared = everywhere or set.intersection(*map(set, line.values()))
        means = {rho: mean_and_error([own[seed] for seed in shared]) for rho, own in sorted(line.items())}
        colour = _method_colour(name)
        if set(line) == {0}:
            mean, error = means[0]
            axes.axhline(mean, color=colour, linestyle=next(dashes), linewidth=1, label=_wrapped(name))
            axes.axhspan(mean - error, mean + error, color=colour, alpha=0.12, linewidth=0)
        else:
            axes.errorbar(
                list(means),
                [mean for mean, _ in means.values()],
                yerr=[error for _, error in means.values()],
                fmt=f"{next(markers)}-",
                color=colour,
                capsize=3,
                label=_wrapped(name),
            )
    axes.set_xscale("log", nonpositive="mask")
    tried = sorted({rho for line in points.values() for rho in line if rho > 0})
    steps = [second / first for first, second in itertools.pairwise(tried)]
    crowded = len(tried) > 6 or (tried[-1] / tried[0]) ** 0.05 > min(steps, default=10)
    axes.set_xticks(tried, [f"{rho:g}" for rho in tried], rotation=45 if crowded else 0)
    axes.minorticks_off()
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(figure, axes, title, r"$\rho$", "validation accuracy in per cent", path)
    return True


def _method_colour(method: str) -> str:
    return _COLOURS[method.partition(":")[0]]


def _method_label(row: dict[str, Any]) -> str:
    name = _wrapped(":".join(part for part in row["method"].split(":") if "|" not in part))
    return f"{name}\n{textwrap.fill(row['choice'], _LABEL_WIDTH)}" if row["choice"] else name


def _wrapped(method: str) -> str:
    return textwrap.fill(method.replace(":", ": "), _LABEL_WIDTH)


def _finish(figure: Figure, axes: Axes, title: str, x: str, y: str | None, path: str | os.PathLike) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
