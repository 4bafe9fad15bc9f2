# SPDX-License-Identifier: Apache-2.0
"""The pictures: of a training run, of what steps cost, and of what a classifier confuses."""

import math
import os
import textwrap
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure


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
    (
        "Consistency of the perturbations",
        "cosine",
        "linear",
        (("perturbation_consistency", "to the one before", _PURPLE, "-"),),
    ),
)


def training_curves(log_history: list[dict[str, Any]]) -> Figure | None:
    """
    Draws losses, accuracy, sharpness and perturbation over the epochs of a run. What the run did not log is left out,
    so a plain run has no sharpness.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`.

    Returns:
        `Figure`: The picture, or `None` if there is nothing to draw.
    """
    curves = {key: _curve(log_history, key) for *_, lines in _PANELS for key, *_ in lines}
    plain = not curves["clean_loss"]
    panels = [panel for panel in _PANELS if any(curves[key] for key, *_ in panel[-1])]
    if not panels:
        return None
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
    return figure


def plot_training_curves(log_history: list[dict[str, Any]], path: str | os.PathLike) -> bool:
    """
    Writes the picture that [`training_curves`] draws.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.

    Returns:
        `bool`: Whether there was anything to draw. If not, no file is written.
    """
    figure = training_curves(log_history)
    if figure is not None:
        figure.savefig(path, dpi=150)
    return figure is not None


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
    axes.set_title(title, loc="left", fontweight="bold", fontsize="medium")
    axes.set_xlabel("time of a step, relative to plain training (median and quartiles)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# Beyond these numbers of classes, counts or names would not be legible.
_MAX_COUNTS, _MAX_NAMES = 20, 60


def plot_confusion_matrix(matrix: list[list[int]], classes: list[str], path: str | os.PathLike) -> None:
    """
    Draws a confusion matrix; the colour is the share of the row, so that small classes show as well as large ones.

    Args:
        matrix (`list[list[int]]`):
            Counts of images by true class (rows) and predicted class (columns).
        classes (`list[str]`):
            The names of the classes.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.
    """
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(3.0 + 0.45 * len(classes), 16.0)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= _MAX_COUNTS:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.6 else "black" if count else "0.7"
            axes.text(column, row, f"{count}", ha="center", va="center", color=colour, fontsize="small")
    if len(classes) <= _MAX_NAMES:
        names = [textwrap.shorten(str(name), 24, placeholder="...") for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize="small")
        axes.set_yticks(range(len(classes)), names, fontsize="small")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("Confusion matrix", loc="left", fontweight="bold")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    figure.savefig(path, dpi=150)


def plot_image_grid(images: list[PIL.Image.Image], captions: list[str], title: str, path: str | os.PathLike) -> None:
    """
    Draws images in a grid, each below its caption.

    Args:
        images (`list[PIL.Image.Image]`):
            The images.
        captions (`list[str]`):
            What to write above each.
        title (`str`):
            What to write above all.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.
    """
    columns = min(len(images), 5)
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.4 * columns, 0.5 + 2.8 * rows), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        shown = image.convert("RGB")
        shown.thumbnail((300, 300))
        axes.imshow(np.asarray(shown), interpolation="nearest")
        lines = [textwrap.fill(line, 32, max_lines=2, placeholder=" ...") for line in caption.splitlines()]
        axes.set_title("\n".join(lines), fontsize="small")
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


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
