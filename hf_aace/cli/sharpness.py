# SPDX-License-Identifier: Apache-2.0
"""`hf-aace sharpness` measures how sharp the minima are that runs found."""

import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import sem

from ..analysis.figures import plot_margins, plot_minimum, plot_sharpness
from ..analysis.sharpness import measure_sharpness
from .checks import check_folder
from .output import table, write_report
from .parser import option
from .runs import Run, RunArguments, progress, read_runs


# The file in the folder of each run that `hf-aace plot` reads.
MEASURES_NAME = "sharpness.json"

_ROWS = (
    ("accuracy", "accuracy"),
    ("cross_entropy", "cross-entropy (nats)"),
    ("aace", "AACE loss (nats)"),
    ("cross_entropy_grad_norm", "gradient norm, cross-entropy"),
    ("aace_grad_norm", "gradient norm, AACE"),
    ("sam_sharpness", "SAM sharpness, radius {rho:g}"),
    ("adaptive_worst_case_rise", "adaptive sharpness, {adaptive_rho:g}"),
    ("m_sharpness", "m-sharpness, m {m}, radius {rho:g}"),
    ("average_sharpness", "average sharpness, {average_rho:g}"),
    ("top_eigenvalue", "top Hessian eigenvalue"),
    ("hessian_trace", "Hessian trace"),
)


@dataclass
class SharpnessArguments:
    """The options that say what to measure, as for [`~hf_aace.analysis.sharpness.measure_sharpness`]."""

    rho: float = option(0.05, "Radius of the ball for SAM sharpness and m-sharpness.")
    adaptive_rho: float = option(0.5, "Radius of the ball for adaptive sharpness (ASAM).")
    average_rho: float = option(1.0, "Radius of the sphere for the average sharpness.")
    m: int = option(16, "Samples in a group, for m-sharpness. 0 leaves it out.")
    steps: int = option(20, "Gradients to find the highest loss in a ball.")
    directions: int = option(20, "Random directions for the average sharpness.")
    eigenvalues: int = option(5, "Number of Hessian eigenvalues. 0 leaves out the trace too.")
    products: int = option(30, "Products with the Hessian for its trace.")
    checkpoints: bool = option(
        False, "Measure every checkpoint of each run too, for `hf-aace plot` to draw over time."
    )
    output_dir: str = option(
        "runs/sharpness", "Where sharpness.json, and the pictures sharpness and margins as .png and .svg, go."
    )


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    description = "Measures how sharp the minima are that runs of `hf-aace train` found, on their own data."
    run_args, options, groups = read_runs("sharpness", description, SharpnessArguments, argv)
    check_folder("output_dir", options.output_dir)
    settings = {name: value for name, value in asdict(options).items() if name not in ("checkpoints", "output_dir")}
    settings |= {"m": options.m or None, "seed": run_args.seed}
    # What the measures depend on beside the weights: kept with them, so that they are taken again if it changes.
    basis = {"settings": settings, "data": {k: v for k, v in asdict(run_args).items() if k != "names"}}
    every = [each for runs in groups.values() for each in runs]
    for each in every:
        for part in [each, *(each.checkpoints() if options.checkpoints else [])]:
            part.check(run_args)
    print(f"Measuring {len(every)} run{'s' * (len(every) > 1)}.", flush=True)
    measured: dict[str, list[dict[str, Any]]] = {}
    for name, runs in groups.items():
        for each in runs:
            parts = [*(each.checkpoints() if options.checkpoints else []), each]
            present = {weights_key(part) for part in (*each.checkpoints(), each)}
            known = {key: entry for key, entry in _measured_before(each, basis).items() if key in present}
            reused = sum(weights_key(part) in known for part in parts)
            for part in parts:
                key = weights_key(part)
                known[key] = known.get(key) or _measure(part, run_args, settings)
                if each.is_writable():  # for `hf-aace plot`, and for a later call if this one is interrupted
                    write_report(basis | {"measures": list(known.values())}, each.folder / MEASURES_NAME)
            measured.setdefault(name, []).append(known[weights_key(each)])
            before = f", {reused} of them before" if reused else ""
            print(f"{each.folder}: {name}, {len(parts)} measured{before}.", flush=True)

    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(_table(measured, settings))
    versions = {package: version(package) for package in ("hf-aace", "torch", "transformers", "scipy")}
    write_report(basis | {"versions": versions, "runs": measured}, folder / "sharpness.json")
    pictures = [folder / "sharpness.png", folder / "sharpness.svg"]
    if len(every) == 1:
        plot_minimum(*next(iter(measured.values())), pictures)
    else:
        plot_sharpness(measured, pictures)
    margins = {name: np.concatenate([run["margins"] for run in runs]) for name, runs in measured.items()}
    plot_margins(margins, [folder / "margins.png", folder / "margins.svg"])
    print(f"Numbers:  {folder / 'sharpness.json'}\nPictures: {folder / 'sharpness.png'}, {folder / 'margins.png'}")
    return 0


def weights_key(run: Run) -> tuple[str, int]:
    """Identify the weights of a run or checkpoint: by its folder, and the time at which they were written."""
    return str(run.folder), max((path.stat().st_mtime_ns for path in run.folder.glob("*.safetensors")), default=0)


def _measured_before(run: Run, basis: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Read what an earlier call measured of the run and its checkpoints, with the same settings on the same data."""
    path = run.folder / MEASURES_NAME
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"measures": []}
    if basis != {key: earlier.get(key) for key in basis}:
        return {}
    return {(entry["run"], entry.get("weights_written_ns")): entry for entry in earlier["measures"]}


def _measure(run: Run, args: RunArguments, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure one run or checkpoint. The entry also says at which epoch and step of the training it was saved."""
    model, batches = run.load_model(args), run.load_batches(args)
    with progress(model, str(run.folder), _count_batches(batches, **settings)):
        measures = measure_sharpness(model, batches, **settings)
    when = {}
    if (run.folder / "trainer_state.json").is_file():
        state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
        when = {"epoch": state["epoch"], "step": state["global_step"]}
    folder, written = weights_key(run)
    return {"run": folder, "weights_written_ns": written, **when, "samples": len(measures["margins"]), **measures}


def _count_batches(batches, *, steps, m, directions, eigenvalues, products, **others) -> int:
    """Estimate how many batches the model sees. The search for eigenvalues takes as many as it needs."""
    passes = 3 + 2 * (steps + 1) + (1 + 2 * directions) + 1
    if eigenvalues:
        passes += 20 + 4 * eigenvalues + products // 3 * 3
    groups = sum(math.ceil(len(batch["labels"]) / m) * (steps + 1) for batch in batches) + len(batches) if m else 0
    return passes * len(batches) + groups


def _table(measured: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> str:
    """Make a table of the means over the runs of each name, with standard errors."""
    rows = [["runs", *(str(len(runs)) for runs in measured.values())]]
    for key, label in _ROWS:
        if all(key in run for runs in measured.values() for run in runs):
            rows.append([label.format(**settings), *(_cell(runs, key) for runs in measured.values())])
    return table(["", *measured], rows)


def _cell(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    # A single run has no error over runs, but some measures are estimates with an error of their own.
    error = sem(values) if len(values) > 1 else runs[0].get(f"{key}_standard_error")
    return f"{np.mean(values):.4g}" if error is None else f"{np.mean(values):.4g} ± {error:.1g}"
