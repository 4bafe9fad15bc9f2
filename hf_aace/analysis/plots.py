# SPDX-License-Identifier: Apache-2.0
"""The pictures: of a training run, of what steps cost, of what a classifier confuses, and of runs side by side."""

import itertools
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .landscape import LossPath, LossSurface


# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"

# Title, label of the y axis, its scale, and the lines: key in the log, label, colour, dashes.
_PANELS = (
    (
        "Loss",
        "loss",
        "log",
        (
            ("loss", r"training, at $w'$", BLUE, "-"),
            ("clean_loss", r"training, at $w$", ORANGE, "--"),
            ("eval_loss", "evaluation", GREEN, "-."),
        ),
    ),
    (
        "Accuracy",
        "score",
        "linear",
        (
            ("clean_accuracy", r"training, at $w$", ORANGE, "--"),
            ("eval_accuracy", "evaluation", GREEN, "-."),
            ("eval_macro_f1", "evaluation, macro F1", PURPLE, ":"),
        ),
    ),
    ("Sharpness", r"loss at $w'$ less loss at $w$", "linear", (("sharpness", "sharpness", BLUE, "-"),)),
    ("Ascent loss", r"ascent loss at $w$", "linear", (("ascent_loss", "ascent loss", ORANGE, "-"),)),
    ("Gradient of the ascent loss", "norm", "linear", (("ascent_grad_norm", "gradient", ORANGE, "-"),)),
    (r"Perturbation $w' - w$", "norm", "linear", (("perturbation_norm", "perturbation", BLUE, "-"),)),
    (
        "Consistency of the perturbations",
        "cosine",
        "linear",
        (("perturbation_consistency", "to the one before", PURPLE, "-"),),
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
        if scale == "log":
            _log_scale(axes)
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
            What [`~hf_aace.study.cost.summarize`] returns.
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
    colours = [BLUE if name.startswith("AACE") else ORANGE if name.startswith("SAM") else "0.6" for name in names]
    bars = axes.barh(names, ratios, xerr=spread, color=colours, ecolor="0.3", capsize=3)
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=8)
    axes.axvline(1, color="0.3", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.15 * max(row["ratio_quartiles"][1] for row in rows))
    axes.invert_yaxis()
    # Over the names too, which are long.
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontweight="bold", fontsize="medium")
    axes.set_xlabel("time of a step, relative to plain training\n(median and quartiles)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# Beyond these numbers of classes, counts or names would not be legible.
_MAX_COUNTS, _MAX_NAMES = 20, 60
_LONGEST_NAME = 24


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
        names = [
            name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..." for name in map(str, classes)
        ]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize="small", parse_math=False)
        axes.set_yticks(range(len(classes)), names, fontsize="small", parse_math=False)
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
        axes.set_title("\n".join(lines), fontsize="small", parse_math=False)
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


# ---- Runs side by side, for a paper ------------------------------------------

_COLUMN = 3.4  # inches, of one column of a page in two
_TITLE_WIDTH = 20  # characters, of a panel of half a column

# Readable in gray too: the lines of each group differ in dashes and markers, the fillings in their lightness.
_GROUP_STYLES = (
    ("0.35", "--", "s"),
    (ORANGE, "-.", "^"),
    (BLUE, "-", "o"),
    (GREEN, ":", "D"),
    (PURPLE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#56B4E9", (0, (1, 1)), "P"),
)
_PAPER = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "svg.hashsalt": "hf_aace",  # the same picture is the same file
}

# Key in the log, title, label of the y axis, its scale. Where a plain run logs `loss`, others log `clean_loss` for the same.
_DYNAMICS = (
    ("clean_loss", r"Training loss at $w$", "nats", "log"),
    ("eval_loss", "Evaluation loss", "nats", "linear"),
    ("eval_accuracy", "Evaluation accuracy", "accuracy", "linear"),
    ("ascent_loss", r"Ascent loss at $w$", "nats", "linear"),
    ("ascent_grad_norm", "Ascent gradient", "nats / weight", "log"),
    ("grad_norm", "Descent gradient", "nats / weight", "log"),
    ("perturbation_norm", r"Perturbation norm", "weight", "log"),
    ("sharpness", r"Rise from $w$ to $w'$", "nats", "linear"),
    ("perturbation_consistency", "Direction of ascent", "cosine with\nprevious", "linear"),
    ("sam_sharpness", "Worst-case rise", "nats", "log"),
    ("top_eigenvalue", "Top eigenvalue", r"nats / weight$^2$", "log"),
)

# Key of `measure_sharpness`, title, unit.
_MEASURES = (
    ("sam_sharpness", "Worst-case rise", "nats"),
    ("adaptive_worst_case_rise", "Adaptive worst case", "nats"),
    ("m_sharpness", "m-sharpness", "nats"),
    ("average_sharpness", "Average rise", "nats"),
    ("top_eigenvalue", "Top eigenvalue", r"nats / weight$^2$"),
    ("hessian_trace", "Hessian trace", r"nats / weight$^2$"),
    ("cross_entropy_grad_norm", "Gradient norm", "nats / weight"),
    ("aace_grad_norm", "AACE gradient norm", "nats / weight"),
)


def plot_dynamics(
    histories: Mapping[str, Sequence[list[dict[str, Any]]]],
    paths: Iterable[str | os.PathLike],
    *,
    width: float = _COLUMN,
) -> bool:
    """
    Draws how runs trained, side by side: losses, gradients, perturbations and sharpness over the epochs. What no run has is left
    out, as is what a run did not log.

    Args:
        histories (`Mapping[str, Sequence[list[dict]]]`):
            By the name of each group (a method), the `log_history` of its runs. Of several, the mean is drawn, and its standard
            error as a band. Entries may also hold measures of checkpoints: `sam_sharpness`, `top_eigenvalue`.
        paths (iterable of `str` or `os.PathLike`):
            The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `3.4`):
            Width of the figure in inches; the panels are as many in a row as it holds.

    Returns:
        `bool`: Whether there was anything to draw. If not, no file is written.
    """
    panels = []
    for key, title, unit, scale in _DYNAMICS:
        curves = {name: _mean_curve(runs, key) for name, runs in histories.items()}
        if any(len(curve[0]) for curve in curves.values()):
            panels.append((curves, title, unit, scale))
    if not panels:
        return False
    with rc_context(_PAPER):
        figure, grid = _panels(len(panels), width)
        for axes, (curves, title, unit, scale) in zip(grid, panels, strict=True):
            for (name, (epochs, means, errors)), (colour, dashes, marker) in zip(
                curves.items(), _styles(curves), strict=True
            ):
                if len(epochs):
                    every = max(1, len(epochs) // 6)
                    axes.plot(
                        epochs, means, label=name, color=colour, linestyle=dashes, marker=marker, markevery=every
                    )
                    axes.fill_between(epochs, means - errors, means + errors, color=colour, alpha=0.2, linewidth=0)
            if scale == "log":
                _log_scale(axes)
            _decorate_for_paper(axes, title, "epoch", unit)
        _legend_above(figure, histories)
        _save(figure, paths)
    return True


def plot_sharpness(
    measures: Mapping[str, Sequence[dict[str, Any]]], paths: Iterable[str | os.PathLike], *, width: float = _COLUMN
) -> None:
    """
    Draws measures of sharpness, side by side: for each group a bar at the mean, with its standard error, and each run as a point.

    Args:
        measures (`Mapping[str, Sequence[dict]]`):
            By the name of each group, what [`~hf_aace.analysis.sharpness.measure_sharpness`] returned for its runs.
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `3.4`): Width of the figure in inches.
    """
    rows = {name: [_with_top_eigenvalue(run) for run in runs] for name, runs in measures.items()}
    shown = [panel for panel in _MEASURES if all(panel[0] in run for runs in rows.values() for run in runs)]
    with rc_context(_PAPER):
        figure, grid = _panels(len(shown), width)
        for axes, (key, title, unit) in zip(grid, shown, strict=True):
            for position, (runs, (colour, _, marker)) in enumerate(zip(rows.values(), _styles(rows), strict=True)):
                values = np.array([run[key] for run in runs])
                error = _standard_error(values) if len(values) > 1 else None
                axes.bar(position, values.mean(), yerr=error, color=colour, alpha=0.35, edgecolor=colour, capsize=3)
                offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [0]
                axes.plot(
                    position + np.array(offsets), values, linestyle="", marker=marker, color=colour, markersize=2.5
                )
            _decorate_for_paper(axes, title, "", unit)
            axes.set_xticks([])
        _legend_above(figure, rows)
        _save(figure, paths)


def plot_margins(
    margins: Mapping[str, np.ndarray], paths: Iterable[str | os.PathLike], *, width: float = _COLUMN
) -> None:
    """
    Draws histograms of margins, in the same bins for all.

    Args:
        margins (`Mapping[str, np.ndarray]`): By the name of each group, its margins, as [`~hf_aace.analysis.sharpness.margins`] gives them.
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `3.4`): Width of the figure in inches.
    """
    with rc_context(_PAPER):
        figure, (axes,) = _panels(1, width)
        bins = np.histogram_bin_edges(np.concatenate(list(margins.values())), bins=40)
        for (name, values), (colour, dashes, _) in zip(margins.items(), _styles(margins), strict=True):
            share = np.histogram(values, bins)[0] / len(values)
            axes.stairs(100 * share, bins, color=colour, linestyle=dashes, linewidth=1.2, label=name)
        axes.axvline(0, color="0.6", linewidth=0.6)
        _decorate_for_paper(axes, "", "margin: logit of the label less the greatest other", "samples (%)")
        figure.legend(
            loc="outside upper center", frameon=False, handlelength=3, ncols=1 if width < 5 else len(margins)
        )
        _save(figure, paths)


def plot_paths(curves: Mapping[str, LossPath], paths: Iterable[str | os.PathLike], *, width: float = _COLUMN) -> None:
    """
    Draws the loss along lines between models.

    Args:
        curves (`Mapping[str, LossPath]`): By what to call each line, the [`~hf_aace.analysis.landscape.LossPath`].
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `3.4`): Width of the figure in inches.
    """
    with rc_context(_PAPER):
        figure, (axes,) = _panels(1, width)
        # The first style is the model at 0, which all the lines have in common.
        for (name, curve), (colour, dashes, marker) in zip(
            curves.items(), itertools.cycle(_GROUP_STYLES[1:]), strict=False
        ):
            every = max(1, len(curve.position) // 8)
            axes.plot(*curve, color=colour, linestyle=dashes, marker=marker, markevery=every, label=name)
        for end in (0, 1):
            axes.axvline(end, color="0.6", linewidth=0.6)
        _log_scale(axes)
        _decorate_for_paper(axes, "", "position on the line", "cross-entropy (nats)")
        figure.legend(loc="outside upper center", frameon=False, handlelength=3)  # the names are long
        _save(figure, paths)


def plot_landscapes(
    surfaces: Mapping[str, LossSurface],
    paths: Iterable[str | os.PathLike],
    *,
    kind: str = "contour",
    unit: str = "step / filter norm",
    width: float = _COLUMN,
) -> None:
    """
    Draws the loss on planes through models, all on one scale of colours and heights, which is logarithmic.

    Args:
        surfaces (`Mapping[str, LossSurface]`): By the name of each model, its [`~hf_aace.analysis.landscape.LossSurface`].
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        kind (`str`, *optional*, defaults to `"contour"`): `"contour"` or `"surface"`.
        unit (`str`, *optional*, defaults to `"step / filter norm"`): What the coordinates are.
        width (`float`, *optional*, defaults to `3.4`): Width of the figure in inches.

    Raises:
        `ValueError`: If `kind` is unknown.
    """
    if kind not in ("contour", "surface"):
        raise ValueError(f"`kind` must be 'contour' or 'surface', got {kind!r}.")
    logs = {name: np.log10(np.maximum(surface.loss, 1e-8)) for name, surface in surfaces.items()}
    lowest, highest = min(map(np.min, logs.values())), max(map(np.max, logs.values()))
    levels = np.linspace(lowest, highest + 1e-9, 13)
    colours = Normalize(lowest, highest)
    digits = 2 if highest - lowest > 0.5 else 3
    nats = FuncFormatter(lambda value, _: f"{10**value:.{digits}g}")
    with rc_context(_PAPER):
        figure, grid = _panels(
            len(surfaces),
            width,
            ratio=1.0 if kind == "contour" else 1.25,
            projection="3d" if kind == "surface" else None,
        )
        for axes, (name, surface) in zip(grid, surfaces.items(), strict=True):
            if kind == "contour":
                drawn = axes.contourf(surface.x, surface.y, logs[name], levels, cmap="cividis", norm=colours)
                axes.contour(
                    surface.x, surface.y, logs[name], levels, colors="white", linewidths=0.4, linestyles="solid"
                )
                axes.plot(0, 0, marker="+", color="white", markersize=6)
                axes.set_aspect("equal")
                _decorate_for_paper(axes, textwrap.fill(name, _TITLE_WIDTH), unit, unit)
                axes.grid(False)
            else:
                drawn = axes.plot_surface(
                    *np.meshgrid(surface.x, surface.y),
                    logs[name],
                    cmap="cividis",
                    norm=colours,
                    linewidth=0,
                    rcount=60,
                    ccount=60,
                )
                axes.set_zlim(lowest, highest)
                axes.zaxis.set_major_formatter(nats)
                axes.zaxis.set_major_locator(MaxNLocator(4, integer=highest - lowest > 2))
                axes.tick_params(axis="x", pad=-3)
                axes.tick_params(axis="y", pad=-3)
                axes.set_title(textwrap.fill(name, _TITLE_WIDTH), y=0.98, pad=0)
                axes.set_xlabel(unit, labelpad=-6, fontsize=6.5)
                axes.set_ylabel(unit, labelpad=-6, fontsize=6.5)
                axes.set_box_aspect((4, 4, 3), zoom=0.85)
        pad = 0.04 if kind == "contour" else 0.1  # of the labels of three dimensions the layout does not know
        bar = figure.colorbar(drawn, ax=grid, location="bottom", shrink=0.8, aspect=30, pad=pad)
        bar.locator = MaxNLocator(5, integer=highest - lowest > 2)
        bar.formatter = nats
        bar.update_ticks()
        bar.set_label("cross-entropy (nats)")
        _save(figure, paths)


def _panels(count: int, width: float, ratio: float = 0.82, projection: str | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels, about 1.7 inches wide each, unless there is one, which has a column."""
    columns = max(1, min(count, int(width / (_COLUMN / 2 if count > 1 else _COLUMN))))
    rows = math.ceil(count / columns)
    height = rows * width / columns * (ratio if count > 1 else 0.7) + (0.35 if count > 1 else 0)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1, projection=projection) for i in range(count)]


def _styles(groups: Iterable[str]) -> list[tuple]:
    """A style for each group: the first for plain training, the others, in order, for what it is compared with."""
    plain = next((name for name in groups if name.lower().startswith(("trainer", "plain"))), None)
    others = itertools.cycle(_GROUP_STYLES[1:])
    return [_GROUP_STYLES[0] if name == plain else next(others) for name in groups]


def _decorate_for_paper(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis with numbers, not powers, and enough of them where it spans less than two decades."""
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    if highest < 2 * lowest:  # `LogLocator` would put none there
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    elif highest < 10 * lowest:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if highest > 100 * lowest else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_above(figure: Figure, groups: Mapping[str, Any]) -> None:
    lines = [
        Line2D([], [], color=colour, linestyle=dashes, marker=marker) for colour, dashes, marker in _styles(groups)
    ]
    # In inches at this size of letters: 0.055 for one, 0.5 for a line with its margins.
    columns = int(figure.get_figwidth() / (0.055 * max(map(len, groups)) + 0.5))
    figure.legend(
        lines,
        list(groups),
        loc="outside upper center",
        ncols=max(1, min(columns, len(groups))),
        frameon=False,
        handlelength=3,
    )


def _save(figure: Figure, paths: Iterable[str | os.PathLike]) -> None:
    for path in paths:
        figure.savefig(path, dpi=300, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _mean_curve(runs: Sequence[list[dict[str, Any]]], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, means over the runs that have the key there, and standard errors."""
    values: dict[float, list[float]] = {}
    for history in runs:
        plain = key == "clean_loss" and not any(key in entry for entry in history)
        for epoch, value in _curve(history, "loss" if plain else key):
            if math.isfinite(value):
                values.setdefault(epoch, []).append(value)
    epochs = sorted(values)
    means = np.array([np.mean(values[epoch]) for epoch in epochs])
    return np.array(epochs), means, np.array([_standard_error(np.array(values[epoch])) for epoch in epochs])


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _with_top_eigenvalue(measures: dict[str, Any]) -> dict[str, Any]:
    values = measures.get("hessian_eigenvalues")
    return measures if values is None else measures | {"top_eigenvalue": values[0]}
