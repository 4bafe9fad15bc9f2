# SPDX-License-Identifier: Apache-2.0
"""The picture of a training run."""

import math
import os
from typing import Any

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
