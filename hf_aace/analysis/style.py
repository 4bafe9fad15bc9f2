# SPDX-License-Identifier: Apache-2.0
"""The style that all pictures share: colors, fonts, axes, and how groups of runs are told apart."""

import itertools
import textwrap
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter


# The colors of Okabe and Ito, which people with any kind of color vision can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"

_AXES = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
# For `matplotlib.rc_context`: pictures for a screen, and small ones for a column of a paper.
SCREEN = _AXES | {"axes.titleweight": "bold", "grid.linewidth": 0.6, "legend.fontsize": "small", "savefig.dpi": 150}
PAPER = _AXES | {
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "font.size": 8,
    "grid.linewidth": 0.4,
    "legend.fontsize": 7,
    "legend.handlelength": 3,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "savefig.dpi": 300,
    "svg.hashsalt": "hf_aace",  # the same picture is the same file
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}

# Readable in gray too: the lines of the groups differ in dashes and markers, their bars in lightness.
GROUP_STYLES = (
    ("0.35", "--", "s"),
    (ORANGE, "-.", "^"),
    (BLUE, "-", "o"),
    (GREEN, ":", "D"),
    (PURPLE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    (SKY, (0, (1, 1)), "P"),
)


def group_styles(names: Iterable[str]) -> list[tuple]:
    """
    Choose a style for each group of runs. Plain training has the first one, wherever it stands in the order.

    Args:
        names (iterable of `str`): The names of the groups.

    Returns:
        `list[tuple]`: For each group its color, dashes and marker.
    """
    names = list(names)
    plain = next((name for name in names if name.lower().startswith(("trainer", "plain"))), None)
    others = itertools.cycle(GROUP_STYLES[1:])
    return [GROUP_STYLES[0] if name == plain else next(others) for name in names]


def log_scale(axes: Axes) -> None:
    """
    Make the y axis logarithmic, with numbers instead of powers, and enough of them where it spans less than two decades.

    Args:
        axes (`Axes`): The axes, with everything drawn.
    """
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    if highest < 2 * lowest:  # `LogLocator` would put no number there
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    elif highest < 10 * lowest:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if highest > 100 * lowest else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def lines_of(text: str, letters: int) -> str:
    """
    Break a text into lines, and keep matplotlib from taking dollars in it, as of a regular expression, for mathematics.

    Args:
        text (`str`): The text, such as the name of a run.
        letters (`int`): The greatest number of letters in a line.
    """
    return textwrap.fill(text, letters).replace("$", r"\$")
