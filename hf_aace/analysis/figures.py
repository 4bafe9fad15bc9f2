# SPDX-License-Identifier: Apache-2.0
"""Figures of runs side by side, sized for a paper: how they trained, and the loss around the weights that they found."""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.stats import sem

from .landscape import LossPath, LossSurface
from .plots import curve
from .style import BLUE, GROUP_STYLES, ORANGE, PAPER, group_styles, lines_of, log_scale


Paths = Iterable[str | os.PathLike]

_COLUMN = 3.4  # inches: the width of one of two columns on a page
_LETTER, _LINE = 0.055, 0.5  # inches, in a legend: of a letter, of a line with its margins

# Key in the log, title, label of the y axis, its scale. What a plain run logs as `loss`, the others log as `clean_loss`.
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
    ("sam_sharpness", "SAM sharpness", "nats", "log"),
    ("top_eigenvalue", "Top eigenvalue", r"nats / weight$^2$", "log"),
)

# Key of `measure_sharpness`, title, unit.
_MEASURES = (
    ("sam_sharpness", "SAM sharpness", "nats"),
    ("adaptive_worst_case_rise", "Adaptive sharpness", "nats"),
    ("m_sharpness", "m-sharpness", "nats"),
    ("average_sharpness", "Average sharpness", "nats"),
    ("top_eigenvalue", "Top eigenvalue", r"nats / weight$^2$"),
    ("hessian_trace", "Hessian trace", r"nats / weight$^2$"),
    ("cross_entropy_grad_norm", "Gradient norm", "nats / weight"),
    ("aace_grad_norm", "AACE gradient norm", "nats / weight"),
)


@rc_context(PAPER)
def plot_dynamics(
    histories: Mapping[str, Sequence[list[dict[str, Any]]]], paths: Paths, *, width: float = _COLUMN
) -> bool:
    """
    Draw how runs trained, side by side: losses, gradients, perturbations and sharpness over the epochs. A quantity that no run
    logged has no panel.

    Args:
        histories (`Mapping[str, Sequence[list[dict]]]`):
            By the name of each group (a method), the `log_history` of its runs. Of several runs, the mean is drawn, and its
            standard error as a band. Entries may also hold measures of checkpoints: `sam_sharpness`, `top_eigenvalue`.
        paths (iterable of `str` or `os.PathLike`):
            The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `3.4`):
            Width of the figure in inches. A row holds as many panels as fit.

    Returns:
        `bool`: `False` if there is nothing to draw. Then no file is written.
    """
    panels = []
    for key, title, unit, scale in _DYNAMICS:
        curves = [_mean_curve(runs, key) for runs in histories.values()]
        if any(len(each) for each in curves):
            panels.append((curves, title, unit, scale))
    if not panels:
        return False
    figure, grid = _panels(len(panels), width)
    for axes, (curves, title, unit, scale) in zip(grid, panels, strict=True):
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        for name, each, (color, dashes, marker) in zip(histories, curves, group_styles(histories), strict=True):
            if len(each):
                every = max(1, len(each) // 6)
                axes.plot(each["mean"], label=name, c=color, ls=dashes, marker=marker, markevery=every)
                low, high = each["mean"] - each["sem"], each["mean"] + each["sem"]
                axes.fill_between(each.index, low, high, color=color, alpha=0.2, linewidth=0)
        if scale == "log":
            log_scale(axes)
    _legend_above(figure, histories)
    _save(figure, paths)
    return True


@rc_context(PAPER)
def plot_sharpness(measures: Mapping[str, Sequence[dict[str, Any]]], paths: Paths, *, width: float = _COLUMN) -> None:
    """
    Draw measures of sharpness, side by side: for each group a bar at the mean, with its standard error, and each run as a point.

    Args:
        measures (`Mapping[str, Sequence[dict]]`):
            By the name of each group, what [`~hf_aace.analysis.sharpness.measure_sharpness`] returned for its runs.
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `3.4`): Width of the figure in inches.
    """
    shown = [panel for panel in _MEASURES if all(panel[0] in run for runs in measures.values() for run in runs)]
    figure, grid = _panels(len(shown), width)
    for axes, (key, title, unit) in zip(grid, shown, strict=True):
        axes.set(title=title, ylabel=unit, xticks=[])
        for position, (runs, (color, _, marker)) in enumerate(
            zip(measures.values(), group_styles(measures), strict=True)
        ):
            values = np.array([run[key] for run in runs])
            error = sem(values) if len(values) > 1 else None
            axes.bar(position, values.mean(), yerr=error, color=color, alpha=0.35, edgecolor=color, capsize=3)
            offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else 0
            axes.plot(position + offsets + 0 * values, values, ls="", marker=marker, color=color, markersize=2.5)
    _legend_above(figure, measures)
    _save(figure, paths)


@rc_context(PAPER)
def plot_minimum(measures: dict[str, Any], paths: Paths, *, width: float = 2 * _COLUMN) -> None:
    """
    Draw the sharpness of a single run: how far the loss rises from its value at the weights, the greatest eigenvalues of the
    Hessian, and the margins.

    Args:
        measures (`dict`): What [`~hf_aace.analysis.sharpness.measure_sharpness`] returned for the run.
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `6.8`): Width of the figure in inches.
    """
    loss, eigenvalues = measures["cross_entropy"], measures.get("hessian_eigenvalues")
    rises = {title: measures[key] for key, title, unit in _MEASURES if unit == "nats" and key in measures}
    figure = Figure(figsize=(width, 0.32 * width))
    left, *others = figure.subplots(1, 3 if eigenvalues else 2, width_ratios=(1.4, 1, 1) if eigenvalues else (1, 1))
    names, heights = list(rises), np.array(list(rises.values()))
    left.barh(names, loss, color="0.75", label="at the weights")
    bars = left.barh(names, heights, left=loss, color=ORANGE, label="rise around them")
    left.bar_label(bars, [f"+{height:.2g}" for height in heights], padding=2, fontsize=7)
    left.set(title="Loss", xlabel="cross-entropy (nats)", xlim=(0, 1.25 * (loss + max(heights.max(), 1e-12))))
    left.invert_yaxis()
    figure.legend(loc="outside upper left", ncols=2)
    if eigenvalues:
        others[0].stem(range(1, len(eigenvalues) + 1), eigenvalues, linefmt=BLUE, basefmt=" ")
        others[0].set(title="Hessian eigenvalues", xlabel="the greatest, in order", ylabel=r"nats / weight$^2$")
        others[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    margins = np.array(measures["margins"])
    edges = np.histogram_bin_edges(np.append(margins, 0), bins=30)
    for side, color in ((margins <= 0, ORANGE), (margins > 0, BLUE)):
        others[-1].hist(margins[side], edges, color=color)
    others[-1].set(title=f"Margins ({(margins <= 0).mean():.0%} wrong)", ylabel="samples")
    others[-1].set_xlabel("logit of the label less\nthe greatest other")
    _save(figure, paths)


@rc_context(PAPER)
def plot_margins(margins: Mapping[str, np.ndarray], paths: Paths, *, width: float = _COLUMN) -> None:
    """
    Draw histograms of margins, all in the same bins.

    Args:
        margins (`Mapping[str, np.ndarray]`):
            By the name of each group, its margins, as [`~hf_aace.analysis.sharpness.margins`] returns them.
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `3.4`): Width of the figure in inches.
    """
    figure, (axes,) = _panels(1, width)
    axes.set(xlabel="margin: logit of the label less the greatest other", ylabel="samples (%)")
    bins = np.histogram_bin_edges(np.concatenate(list(margins.values())), bins=40)
    for (name, values), (color, dashes, _) in zip(margins.items(), group_styles(margins), strict=True):
        share = np.histogram(values, bins)[0] / len(values)
        axes.stairs(100 * share, bins, color=color, linestyle=dashes, linewidth=1.2, label=_lines_of(name, width))
    axes.axvline(0, color="0.6", linewidth=0.6)
    figure.legend(loc="outside upper center", ncols=1 if width < 5 else len(margins))
    _save(figure, paths)


@rc_context(PAPER)
def plot_paths(curves: Mapping[str, LossPath], paths: Paths, *, width: float = _COLUMN) -> None:
    """
    Draw the loss along lines between models.

    Args:
        curves (`Mapping[str, LossPath]`): By the name of each line, its [`~hf_aace.analysis.landscape.LossPath`].
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `3.4`): Width of the figure in inches.
    """
    figure, (axes,) = _panels(1, width)
    axes.set(xlabel="position on the line", ylabel="cross-entropy (nats)")
    styles = itertools.cycle(GROUP_STYLES[1:])  # the first style is that of the model at 0, which all lines share
    for (name, line), (color, dashes, marker) in zip(curves.items(), styles, strict=False):
        every = max(1, len(line.position) // 8)
        axes.plot(*line, color=color, linestyle=dashes, marker=marker, markevery=every, label=_lines_of(name, width))
    for end in (0, 1):
        axes.axvline(end, color="0.6", linewidth=0.6)
    log_scale(axes)
    figure.legend(loc="outside upper center")  # in one column: the names are long
    _save(figure, paths)


@rc_context(PAPER)
def plot_landscapes(
    surfaces: Mapping[str, LossSurface],
    paths: Paths,
    *,
    kind: str = "contour",
    unit: str = "step / filter norm",
    width: float = _COLUMN,
) -> None:
    """
    Draw the loss on planes through models, all on one logarithmic scale of colors and heights.

    Args:
        surfaces (`Mapping[str, LossSurface]`): By the name of each model, its [`~hf_aace.analysis.landscape.LossSurface`].
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        kind (`str`, *optional*, defaults to `"contour"`): `"contour"` or `"surface"`.
        unit (`str`, *optional*, defaults to `"step / filter norm"`): The unit of the coordinates.
        width (`float`, *optional*, defaults to `3.4`): Width of the figure in inches.

    Raises:
        `ValueError`: If `kind` is unknown.
    """
    if kind not in ("contour", "surface"):
        raise ValueError(f"`kind` must be 'contour' or 'surface', got {kind!r}.")
    logs = {name: np.log10(np.maximum(surface.loss, 1e-8)) for name, surface in surfaces.items()}
    lowest, highest = min(map(np.min, logs.values())), max(map(np.max, logs.values()))
    colors = {"cmap": "cividis", "norm": Normalize(lowest, highest)}
    digits = 2 if highest - lowest > 0.5 else 3
    nats = FuncFormatter(lambda value, _: f"{10**value:.{digits}g}")
    decades = highest - lowest > 2
    ratio, projection = (1.0, None) if kind == "contour" else (1.25, "3d")
    figure, grid = _panels(len(surfaces), width, ratio, projection)
    for axes, (name, surface) in zip(grid, surfaces.items(), strict=True):
        title = _lines_of(name, _COLUMN / 2)
        if kind == "contour":
            levels = np.linspace(lowest, highest + 1e-9, 13)
            plane = (surface.x, surface.y, logs[name], levels)
            drawn = axes.contourf(*plane, **colors)
            axes.contour(*plane, colors="white", linewidths=0.4, linestyles="solid")
            axes.plot(0, 0, marker="+", color="white", markersize=6)
            axes.set(title=title, xlabel=unit, ylabel=unit, aspect="equal")
            axes.grid(False)
        else:
            plane = (*np.meshgrid(surface.x, surface.y), logs[name])
            drawn = axes.plot_surface(*plane, **colors, linewidth=0, rcount=60, ccount=60)
            axes.set_zlim(lowest, highest)
            axes.zaxis.set(major_formatter=nats, major_locator=MaxNLocator(4, integer=decades))
            axes.set_title(title, loc="center", y=0.98, pad=0)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_tick_params(pad=-3)
                axis.set_label_text(unit, fontsize=6.5)
                axis.labelpad = -6
            axes.set_box_aspect((4, 4, 3), zoom=0.85)
    pad = 0.04 if kind == "contour" else 0.1  # the layout does not know how far labels in three dimensions reach
    bar = figure.colorbar(drawn, ax=grid, location="bottom", shrink=0.8, aspect=30, pad=pad, format=nats)
    bar.ax.xaxis.set_major_locator(MaxNLocator(5, integer=decades))
    bar.set_label("cross-entropy (nats)")
    _save(figure, paths)


def _panels(count: int, width: float, ratio: float = 0.82, projection: str | None = None) -> tuple[Figure, list[Axes]]:
    """Make a figure with `count` panels of about 1.7 inches each, or with a single one of the whole width."""
    columns = max(1, min(count, int(width / (_COLUMN / 2 if count > 1 else _COLUMN))))
    rows = math.ceil(count / columns)
    height = rows * width / columns * (ratio if count > 1 else 0.7) + (0.35 if count > 1 else 0)
    figure = Figure(figsize=(width, height))
    return figure, [figure.add_subplot(rows, columns, i + 1, projection=projection) for i in range(count)]


def _legend_above(figure: Figure, names: Iterable[str]) -> None:
    names = list(names)
    lines = [Line2D([], [], color=color, ls=dashes, marker=marker) for color, dashes, marker in group_styles(names)]
    width = figure.get_figwidth()
    columns = int(width / (_LETTER * max(map(len, names)) + _LINE))
    texts = [_lines_of(name, width) for name in names]
    figure.legend(lines, texts, loc="outside upper center", ncols=max(1, min(columns, len(names))))


def _lines_of(name: str, width: float) -> str:
    """Break the name of a run into lines that fit into a legend of a width in inches."""
    return lines_of(name, int((width - _LINE) / _LETTER))


def _save(figure: Figure, paths: Paths) -> None:
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _mean_curve(runs: Sequence[list[dict[str, Any]]], key: str) -> pd.DataFrame:
    """Average a quantity over the runs that logged it: columns `mean` and `sem` by epoch."""
    points = []
    for history in runs:
        plain = key == "clean_loss" and not any(key in entry for entry in history)
        points += [point for point in curve(history, "loss" if plain else key) if math.isfinite(point[1])]
    values = pd.DataFrame(points, columns=["epoch", "value"], dtype=float).groupby("epoch")["value"]
    return values.agg(["mean", "sem"]).fillna(0)  # a single run has no standard error
