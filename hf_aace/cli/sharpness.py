# SPDX-License-Identifier: Apache-2.0
"""`hf-aace sharpness`: how sharp the minima are that runs found."""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from ..analysis.figures import plot_margins, plot_sharpness
from ..analysis.sharpness import measure_sharpness
from .output import HelpFormatter, table
from .runs import Run, RunArguments, open_runs


# What is left in the folder of each run, for `hf-aace plot`.
MEASURES_NAME = "sharpness.json"

_ROWS = (
    ("accuracy", "accuracy"),
    ("cross_entropy", "cross-entropy (nats)"),
    ("aace", "AACE loss (nats)"),
    ("cross_entropy_grad_norm", "its gradient: cross-entropy"),
    ("aace_grad_norm", "its gradient: AACE"),
    ("sam_sharpness", "worst case, radius {rho:g}"),
    ("adaptive_worst_case_rise", "worst case, adaptive, {adaptive_rho:g}"),
    ("m_sharpness", "m-sharpness, m {m}, radius {rho:g}"),
    ("average_sharpness", "average, radius {average_rho:g}"),
    ("top_eigenvalue", "top Hessian eigenvalue"),
    ("hessian_trace", "Hessian trace"),
)


@dataclass
class SharpnessArguments:
    """
    What to measure, as for [`~hf_aace.analysis.sharpness.measure_sharpness`].

    Args:
        rho (`float`, *optional*, defaults to `0.05`):
            Radius of the ball for the worst case, and for m-sharpness.
        adaptive_rho (`float`, *optional*, defaults to `0.5`):
            Radius of the adaptive ball.
        average_rho (`float`, *optional*, defaults to `1.0`):
            Radius of the sphere for the average.
        m (`int`, *optional*, defaults to `16`):
            Samples in a group, for m-sharpness. 0 leaves it out.
        steps (`int`, *optional*, defaults to `20`):
            Gradients for each worst case.
        directions (`int`, *optional*, defaults to `20`):
            Random directions for the average.
        eigenvalues (`int`, *optional*, defaults to `5`):
            How many of the Hessian. 0 leaves out its trace too.
        products (`int`, *optional*, defaults to `30`):
            Products with the Hessian for its trace.
        checkpoints (`bool`, *optional*, defaults to `False`):
            Measure every checkpoint of each run too, for `hf-aace plot` to draw over time.
        output_dir (`str`, *optional*, defaults to `"runs/sharpness"`):
            Where the numbers and the pictures go.
    """

    rho: float = field(default=0.05, metadata={"help": "Radius of the ball for the worst case, and for m-sharpness."})
    adaptive_rho: float = field(default=0.5, metadata={"help": "Radius of the adaptive ball."})
    average_rho: float = field(default=1.0, metadata={"help": "Radius of the sphere for the average."})
    m: int = field(default=16, metadata={"help": "Samples in a group, for m-sharpness. 0 leaves it out."})
    steps: int = field(default=20, metadata={"help": "Gradients for each worst case."})
    directions: int = field(default=20, metadata={"help": "Random directions for the average."})
    eigenvalues: int = field(default=5, metadata={"help": "How many of the Hessian. 0 leaves out its trace too."})
    products: int = field(default=30, metadata={"help": "Products with the Hessian for its trace."})
    checkpoints: bool = field(
        default=False,
        metadata={"help": "Measure every checkpoint of each run too, for `hf-aace plot` to draw over time."},
    )
    output_dir: str = field(
        default="runs/sharpness",
        metadata={"help": "Where sharpness.json, and the pictures sharpness and margins as .png and .svg, go."},
    )


def run(argv: list[str]) -> int:
    """Runs the command with the arguments `argv`; returns the exit code."""
    parser = HfArgumentParser(
        (RunArguments, SharpnessArguments),
        prog="hf-aace sharpness",
        description="Measures how sharp the minima are that runs of `hf-aace train` found, on their own data.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="The output_dir of a run, or a checkpoint in it."
    )
    run_args, options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    run_args.check()
    groups = open_runs(positional.run_dirs, run_args.names)
    settings = {
        name: getattr(options, name)
        for name in ("rho", "adaptive_rho", "average_rho", "steps", "directions", "eigenvalues", "products")
    } | {"m": options.m or None, "seed": run_args.seed}
    print(f"Measuring {sum(map(len, groups.values()))} runs.", flush=True)
    measured: dict[str, list[dict[str, Any]]] = {}
    for name, runs in groups.items():
        for each in runs:
            known, entries = _measures_of(each, run_args, settings), []
            parts = [*(each.checkpoints() if options.checkpoints else []), each]
            for part in parts:
                entries.append(known.get(weights_key(part)) or _measure(part, run_args, settings))
                if each.is_writable():  # for `hf-aace plot`, and not to be measured again if it is interrupted
                    content = {"settings": settings, "data": _data(run_args), "measures": entries}
                    _write(each.folder / MEASURES_NAME, content)
            measured.setdefault(name, []).append(entries[-1])
            reused = sum(weights_key(part) in known for part in parts)
            print(
                f"{each.folder}: {name}, {len(entries)} measured{f', {reused} of them before' * (reused > 0)}.",
                flush=True,
            )

    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(_table(measured, settings))
    report = {
        "settings": settings,
        "data": _data(run_args),
        "versions": {package: version(package) for package in ("hf-aace", "torch", "transformers", "scipy")},
        "runs": measured,
    }
    _write(folder / "sharpness.json", report)
    plot_sharpness(measured, [folder / "sharpness.png", folder / "sharpness.svg"])
    margins = {name: np.concatenate([run["margins"] for run in runs]) for name, runs in measured.items()}
    plot_margins(margins, [folder / "margins.png", folder / "margins.svg"])
    print(f"Numbers:  {folder / 'sharpness.json'}\nPictures: {folder / 'sharpness.png'}, {folder / 'margins.png'}")
    return 0


def _data(args: RunArguments) -> dict[str, Any]:
    """What the measures depend on beside their settings."""
    return {name: value for name, value in asdict(args).items() if name != "names"}


def weights_key(run: Run) -> tuple[str, int]:
    """What tells the weights of a run or checkpoint from others: its folder, and when they were written."""
    return str(run.folder), max((path.stat().st_mtime_ns for path in run.folder.glob("*.safetensors")), default=0)


def _measures_of(run: Run, args: RunArguments, settings: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """What an earlier call has measured of the run and its checkpoints, with the same settings on the same data."""
    path = run.folder / MEASURES_NAME
    if not path.is_file():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if (earlier["settings"], earlier["data"]) != (settings, _data(args)):
        return {}
    return {(entry["run"], entry.get("weights_written_ns")): entry for entry in earlier["measures"]}


def _measure(run: Run, args: RunArguments, settings: dict[str, Any]) -> dict[str, Any]:
    """The measures of one run or checkpoint, and when in training it was."""
    model, batches = run.load_model(args), run.load_batches(args)
    measures = measure_sharpness(model, batches, **settings)
    if "hessian_eigenvalues" in measures:
        measures["top_eigenvalue"] = measures["hessian_eigenvalues"][0]
    when = {}
    if (run.folder / "trainer_state.json").is_file():
        state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
        when = {"epoch": state["epoch"], "step": state["global_step"]}
    folder, written = weights_key(run)
    return {"run": folder, "weights_written_ns": written, **when, "samples": len(measures["margins"]), **measures}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _table(measured: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> str:
    """Means over the runs of each name, with their standard errors; of a single run, its own standard error if it has one."""
    lines = [["", *measured], ["runs", *(str(len(runs)) for runs in measured.values())]]
    for key, label in _ROWS:
        if all(key in run for runs in measured.values() for run in runs):
            lines.append([label.format(**settings), *(_cell(runs, key) for runs in measured.values())])
    return table(lines[0], lines[1:])


def _cell(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    mean = float(np.mean(values))
    if len(values) > 1:
        error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    else:
        error = runs[0].get(f"{key}_standard_error")
    return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.1g}"
