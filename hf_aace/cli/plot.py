# SPDX-License-Identifier: Apache-2.0
"""`hf-aace plot` draws runs side by side."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.figures import plot_dynamics, plot_landscapes, plot_paths
from ..analysis.landscape import loss_path, loss_surface
from .checks import check_folder
from .parser import option
from .runs import Run, progress, read_runs
from .sharpness import MEASURES_NAME, weights_key


_FIGURES = ("dynamics", "contour", "surface", "path")
_POINTS_OF_PATH = 41


@dataclass
class PlotArguments:
    """The options that say what to draw."""

    figures: list[str] = option(  # noqa: RUF009
        list(_FIGURES),
        "`dynamics`: the logs of the runs, and what `hf-aace sharpness` measured of their checkpoints; `contour`, "
        "`surface`: the loss around the first run of each name; `path`: the loss on the line from the first run of the first "
        "name to that of each other.",
    )
    directions: str = option(
        "random", "The plane of contour and surface: `random` (filter-normalized) or `eigenvectors` (Hessian)."
    )
    radius: float | None = option(
        None, "Half the side of the plane. By default 1 (times the norm of each filter), or 0.3 along eigenvectors."
    )
    points: int = option(21, "Points on a side of the plane; the images are read points**2 times.")
    formats: list[str] = option(["png", "svg"], "Formats of the pictures.")  # noqa: RUF009
    width: float = option(3.4, "Width of the pictures in inches: 3.4 is one column of a page, 7 two.")
    output_dir: str = option("runs/plot", "Where the pictures go.")


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    description = (
        "Draws runs of `hf-aace train` side by side: how they trained, and the loss around the weights they found."
    )
    run_args, options, groups = read_runs("plot", description, PlotArguments, argv)
    for figure in options.figures:
        if figure not in _FIGURES:
            raise ValueError(f"`figures` must be of {', '.join(_FIGURES)}, got {figure!r}.")
    if not options.width >= 2:
        raise ValueError(f"`width` must be at least 2 inches, got {options.width}.")
    check_folder("output_dir", options.output_dir)
    firsts = {name: runs[0] for name, runs in groups.items()}
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    drawn = []

    def paths(figure: str) -> list[Path]:
        drawn.append(folder / f"{figure}.{options.formats[0]}")
        return [folder / f"{figure}.{suffix}" for suffix in options.formats]

    if "dynamics" in options.figures:
        histories = {name: [_history(each) for each in runs] for name, runs in groups.items()}
        if not plot_dynamics(histories, paths("dynamics"), width=options.width):
            drawn.pop()  # nothing was logged
    if {"contour", "surface"} & set(options.figures):
        radius, unit = (
            (1.0, "step / filter norm") if options.directions == "random" else (0.3, "step along eigenvector")
        )
        plane = {"directions": options.directions, "points": options.points, "seed": run_args.seed}
        plane["radius"] = radius if options.radius is None else options.radius
        surfaces = {}
        for name, each in firsts.items():
            model, batches = each.load_model(run_args), each.load_batches(run_args)
            with progress(model, f"landscape of {name}", options.points**2 * len(batches)):
                surfaces[name] = loss_surface(model, batches, **plane, cache_dir=_cache_dir(each))
        for kind in ("contour", "surface"):
            if kind in options.figures:
                plot_landscapes(surfaces, paths(kind), kind=kind, unit=unit, width=options.width)
    if "path" in options.figures and len(firsts) > 1:
        (start, begin), *others = firsts.items()
        curves = {}
        for name, end in others:
            model, batches = begin.load_model(run_args), begin.load_batches(run_args)
            with progress(model, f"path to {name}", _POINTS_OF_PATH * len(batches)):
                line = loss_path(
                    model, end.load_model(run_args), batches, points=_POINTS_OF_PATH, cache_dir=_cache_dir(begin)
                )
            curves[f"{start} (0) to {name} (1)"] = line
        plot_paths(curves, paths("path"), width=options.width)
    print("\n".join(f"Picture: {path}" for path in drawn) or "There was nothing to draw.")
    return 0


def _cache_dir(run: Run) -> Path | None:
    return run.folder / "landscapes" if run.is_writable() else None


def _history(run: Run) -> list[dict[str, Any]]:
    """Read the log of a run, and the measures of its checkpoints."""
    measures = run.folder / MEASURES_NAME
    entries = json.loads(measures.read_text(encoding="utf-8"))["measures"] if measures.is_file() else []
    # Of its checkpoints: not of an earlier run in the folder, nor of the run itself, whose weights may be those of the best of them.
    written = {weights_key(each)[1] for each in run.checkpoints()}
    entries = [entry for entry in entries if entry.get("weights_written_ns") in written]
    # A single entry is no curve.
    return run.log_history() + [entry for entry in entries if "epoch" in entry and len(entries) > 1]
