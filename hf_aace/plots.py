# SPDX-License-Identifier: Apache-2.0
"""The pictures: of a training run, of what steps cost, and of studies."""

import itertools
import math
import os
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .study import Result, choose, mean_and_error


# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"

# Title, label of the y axis, its scale, and the lines: key in the log, label, colour, dashes.
_PANELS = (
    (
        "Loss",
        "loss",
        "log",
        (
            ("loss", r"training, at $w'$", _BLUE, "-"),
            ("clean_loss", r"training, at $w$", _ORANGE, "--"),
            ("eval_loss", "evaluation", _GREEN, "-."),
        ),
    ),
    (
        "Evaluation",
        "score",
        "linear",
        (("eval_accuracy", "accuracy", _GREEN, "-"), ("eval_macro_f1", "macro F1", _PURPLE, "--")),
    ),
    ("Sharpness", r"loss at $w'$ less loss at $w$", "linear", (("sharpness", "sharpness", _BLUE, "-"),)),
    ("Ascent loss", r"ascent loss at $w$", "linear", (("ascent_loss", "ascent loss", _ORANGE, "-"),)),
    ("Gradient of the ascent loss", "norm", "linear", (("ascent_grad_norm", "gradient", _ORANGE, "-"),)),
    (r"Perturbation $w' - w$", "norm", "linear", (("perturbation_norm", "perturbation", _BLUE, "-"),)),
)


def plot_training_curves(log_history: list[dict[str, Any]], path: str | os.PathLike) -> bool:
    """
    Draws losses, accuracy, sharpness and perturbation over the epochs of a run. What the run did not log is left out,
    so a plain run has no sharpness.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.

    Returns:
        `bool`: Whether there was anything to draw. If not, no file is written.
    """
    curves = {key: _curve(log_history, key) for *_, lines in _PANELS for key, *_ in lines}
    plain = not curves["clean_loss"]
    panels = [panel for panel in _PANELS if any(curves[key] for key, *_ in panel[-1])]
    if not panels:
        return False
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.3 * rows), layout="constrained")
    for index, (title, unit, scale, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for key, label, colour, dashes in lines:
            if curves[key]:
                label = "training" if key == "loss" and plain else label
                # A line through a single point would be invisible.
                marker = "o" if len(curves[key]) == 1 else None
                axes.plot(*zip(*curves[key], strict=True), label=label, color=colour, linestyle=dashes, marker=marker)
        axes.set_yscale(scale)
        _decorate(axes, title, unit)
    figure.savefig(path, dpi=150)
    return True


def plot_costs(rows: list[dict[str, Any]], title: str, path: str | os.PathLike) -> None:
    """
    Draws what a step costs by each method, relative to plain training, with the quartiles over the rounds.

    Args:
        rows (`list[dict]`):
            What [`~hf_aace.benchmark.summarize`] returns.
        title (`str`):
            The title: which model, on what.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.
    """
    figure = Figure(figsize=(7.5, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names, ratios = [row["name"] for row in rows], [row["ratio"] for row in rows]
    spread = [
        [row["ratio"] - row["ratio_quartiles"][0] for row in rows],
        [row["ratio_quartiles"][1] - row["ratio"] for row in rows],
    ]
    colours = [_BLUE if name.startswith("AACE") else _ORANGE if name.startswith("SAM") else "0.6" for name in names]
    bars = axes.barh(names, ratios, xerr=spread, color=colours, ecolor="0.3", capsize=3)
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=8)
    axes.axvline(1, color="0.3", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.15 * max(row["ratio_quartiles"][1] for row in rows))
    axes.invert_yaxis()
    _finish(figure, axes, title, "time of a step, relative to plain training (median and quartiles)", None, path)


def _curve(log_history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["epoch"], entry[key]) for entry in log_history if key in entry]


def _decorate(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize="small")


# ---- Studies ----------------------------------------------------------------

_COLOURS = {"trainer": "0.45", "sam": _ORANGE, "asam": _PURPLE, "aace": _BLUE}


def plot_accuracies(rows: list[dict[str, Any]], results: list[Result], title: str, path: str | os.PathLike) -> None:
    """
    Draws the test accuracy of each method: mean, standard error, and a dot for each seed.

    Args:
        rows (`list[dict]`):
            What [`~hf_aace.study.summarize`] returns.
        results (`list[Result]`):
            The results of the runs.
        title (`str`):
            The title: which model, on what.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.
    """
    chosen = choose(results)
    figure = Figure(figsize=(7.5, 1.2 + 0.45 * len(rows)), layout="constrained")
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
    _finish(figure, axes, title, "test accuracy in per cent (mean and standard error; each seed)", None, path)


def plot_accuracy_by_time(rows: list[dict[str, Any]], title: str, path: str | os.PathLike) -> None:
    """
    Draws the test accuracy of each method against the time that it takes to train.

    Args:
        rows (`list[dict]`):
            What [`~hf_aace.study.summarize`] returns.
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
            label=_method_label(row).replace("\n", ", "),
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
            points.setdefault(name, {}).setdefault(rho, []).append(100 * result.validation)
    if not any(rho > 0 for line in points.values() for rho in line):
        return False
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    markers = itertools.cycle("osD^vP*Xhd<>")
    for (name, line), marker in zip(points.items(), markers, strict=False):
        means = {rho: mean_and_error(accuracies) for rho, accuracies in sorted(line.items())}
        colour = _method_colour(name)
        if set(line) == {0}:
            mean, error = means[0]
            axes.axhline(mean, color=colour, linestyle="--", linewidth=1, label=name)
            axes.axhspan(mean - error, mean + error, color=colour, alpha=0.12, linewidth=0)
        else:
            axes.errorbar(
                list(means),
                [mean for mean, _ in means.values()],
                yerr=[error for _, error in means.values()],
                fmt=f"{marker}-",
                color=colour,
                capsize=3,
                label=name,
            )
    axes.set_xscale("log")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(figure, axes, title, r"$\rho$", "validation accuracy in per cent", path)
    return True


def _method_colour(method: str) -> str:
    return _COLOURS[method.partition(":")[0]]


def _method_label(row: dict[str, Any]) -> str:
    name = ":".join(part for part in row["method"].split(":") if "|" not in part)
    return f"{name}\n{row['choice']}" if row["choice"] else name


def _finish(figure: Figure, axes: Axes, title: str, x: str, y: str | None, path: str | os.PathLike) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
