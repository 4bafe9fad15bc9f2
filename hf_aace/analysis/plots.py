# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training run, and of what a classifier confuses."""

import math
import os
import textwrap
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from .style import BLUE, GREEN, ORANGE, PURPLE, SCREEN, log_scale


# The lines of the training curves: title of the panel, label of its y axis, key in the log, label, color, dashes.
_LINES = (
    ("Loss", "loss", "loss", r"training, perturbed weights $w'$", BLUE, "-"),
    ("Loss", "loss", "clean_loss", r"training, weights $w$", ORANGE, "--"),
    ("Loss", "loss", "eval_loss", "evaluation", GREEN, "-."),
    ("Accuracy", "score", "clean_accuracy", r"training, weights $w$", ORANGE, "--"),
    ("Accuracy", "score", "eval_accuracy", "evaluation", GREEN, "-."),
    ("Accuracy", "score", "eval_macro_f1", "evaluation, macro F1", PURPLE, ":"),
    ("Sharpness", r"loss at $w'$ less loss at $w$", "sharpness", "sharpness", BLUE, "-"),
    ("Ascent loss", r"ascent loss at $w$", "ascent_loss", "ascent loss", ORANGE, "-"),
    ("Gradient of the ascent loss", "norm", "ascent_grad_norm", "gradient", ORANGE, "-"),
    (r"Perturbation $w' - w$", "norm", "perturbation_norm", "perturbation", BLUE, "-"),
    ("Consistency of the perturbations", "cosine", "perturbation_consistency", "to the one before", PURPLE, "-"),
)


@rc_context(SCREEN)
def training_curves(log_history: list[dict[str, Any]]) -> Figure | None:
    """
    Draw losses, accuracy, sharpness and perturbation over the epochs of a run. What the run did not log is left out: a
    plain run has no sharpness.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`.

    Returns:
        `Figure`: The picture, or `None` if there is nothing to draw.
    """
    curves = {key: curve(log_history, key) for _, _, key, *_ in _LINES}
    lines = [line for line in _LINES if curves[line[2]]]
    titles = list(dict.fromkeys(title for title, *_ in lines))
    if not titles:
        return None
    columns = min(len(titles), 3)
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.3 * rows))
    for index, name in enumerate(titles):
        axes = figure.add_subplot(rows, columns, index + 1, title=name, xlabel="epoch")
        for title, unit, key, label, color, dashes in lines:
            if title == name:
                label = "training" if key == "loss" and not curves["clean_loss"] else label
                # A line through a single point would be invisible.
                marker = "o" if len(curves[key]) == 1 else None
                axes.plot(*zip(*curves[key], strict=True), label=label, color=color, linestyle=dashes, marker=marker)
                axes.set_ylabel(unit)
        if name == "Loss":
            log_scale(axes)
        if all(epoch.is_integer() for line in axes.lines for epoch in map(float, line.get_xdata())):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(axes.lines) > 1:
            axes.legend()
    return figure


@rc_context(SCREEN)
def plot_training_curves(log_history: list[dict[str, Any]], path: str | os.PathLike) -> bool:
    """
    Write the picture that [`training_curves`] draws.

    Args:
        log_history (`list[dict]`):
            `trainer.state.log_history`.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.

    Returns:
        `bool`: `False` if there is nothing to draw. Then no file is written.
    """
    figure = training_curves(log_history)
    if figure is not None:
        figure.savefig(path)
    return figure is not None


def curve(log_history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """
    Read one quantity from a log.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        key (`str`): The name of the quantity.

    Returns:
        `list[tuple[float, float]]`: Epochs and values.
    """
    return [(entry["epoch"], entry[key]) for entry in log_history if key in entry]


# More classes than these leave no room for counts, or for the name of each class.
_MAX_COUNTS, _MAX_NAMES = 20, 60
_LONGEST_NAME = 24


@rc_context(SCREEN | {"axes.grid": False})
def plot_confusion_matrix(matrix: list[list[int]], classes: list[str], path: str | os.PathLike) -> None:
    """
    Draw a confusion matrix. The color is the share of the row, so that small classes show as well as large ones.

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
    figure = Figure(figsize=(size + 1, size))
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(shares).plot(
        ax=axes,
        cmap="Blues",
        colorbar=False,
        im_kw={"vmin": 0, "vmax": 1},
        include_values=len(classes) <= _MAX_COUNTS,
        text_kw={"fontsize": "small"},
    )
    if display.text_ is not None:
        for text, count in zip(display.text_.flat, counts.flat, strict=True):
            text.set_text(str(count))
    every = math.ceil(len(classes) / _MAX_NAMES)
    # Shortened in the middle: long names of classes often begin alike.
    half = (_LONGEST_NAME - 3) // 2
    names = [name if len(name) <= _LONGEST_NAME else f"{name[:half]}...{name[-half:]}" for name in map(str, classes)]
    ticks = {"ticks": range(0, len(names), every), "labels": names[::every], "fontsize": "small", "parse_math": False}
    axes.set_xticks(**ticks, rotation=90)
    axes.set_yticks(**ticks)
    axes.set(title="Confusion matrix", xlabel="predicted class", ylabel="true class")
    figure.colorbar(display.im_, label="share of the true class", shrink=0.8)
    figure.savefig(path)


@rc_context(SCREEN)
def plot_image_grid(images: list[PIL.Image.Image], captions: list[str], title: str, path: str | os.PathLike) -> None:
    """
    Draw images in a grid, each below its caption.

    Args:
        images (`list[PIL.Image.Image]`):
            The images.
        captions (`list[str]`):
            The caption of each.
        title (`str`):
            The title of the picture.
        path (`str` or `os.PathLike`):
            The file to write; its suffix gives the format.
    """
    columns = min(len(images), 5)
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.4 * columns, 0.5 + 2.8 * rows))
    figure.suptitle(title, fontweight="bold")
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        shown = image.convert("RGB")
        shown.thumbnail((300, 300))
        axes.imshow(np.asarray(shown), interpolation="nearest")
        lines = [textwrap.fill(line, 32, max_lines=2, placeholder=" ...") for line in caption.splitlines()]
        axes.set_title("\n".join(lines), loc="center", fontsize="small", fontweight="normal", parse_math=False)
        axes.set_axis_off()
    figure.savefig(path)
