# SPDX-License-Identifier: Apache-2.0
"""`hf-aace compare`: trains methods side by side over seeds, each run by `hf-aace train`."""

import argparse
import json
import os
import shlex
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..study.plots import plot_accuracies, plot_accuracy_by_rho, plot_accuracy_by_time
from ..study.statistics import Candidate, Result, candidates_of, choose, rho_values, summarize, write_results
from . import main
from .options import config_as_options, last_part
from .output import HelpFormatter, table, write_report
from .train import train_parser


# For every run unless the user says otherwise: the curves are not needed, and checkpoints would fill the disk.
_DEFAULTS = ["--eval_strategy", "no", "--save_strategy", "no", "--validation_size", "0.2", "--metrics", "accuracy"]


def run(argv: list[str]) -> int:
    """Runs the command with the arguments `argv`; returns the exit code."""
    parser = study_parser(
        "compare",
        "Trains methods side by side over seeds: each seed gives all of them the same images, wrong labels, initial weights "
        "and order of the images. Settings are chosen on validation images; results are of the test images.",
    )
    parser.add_argument(
        "--methods",
        default="trainer,sam,aace,aace:ascent_fraction=0.125",
        help="The methods, separated by commas: `trainer` (plain), `sam`, `asam`, `aace`, each perhaps with options of `hf-aace "
        "train` as `:name=value`. Several values, separated by `|`, are tried, and the one best on the validation images is "
        "taken: 'trainer:learning_rate=1e-3|3e-3,aace:rho=0.01|0.1'.",
    )
    parser.add_argument(
        "--rho",
        help="Values of rho to try, separated by commas, for methods that do not give their own. By default 0.01 for aace, "
        "0.05 for sam, 0.5 for asam.",
    )
    parser.add_argument(
        "--search_seeds",
        type=int,
        default=3,
        help="With how many of the seeds to try the values; the chosen one gets all.",
    )
    parser.add_argument("--baseline", help="The method to compare the others with. By default the first.")
    options, common = parser.parse_known_args(argv)

    methods = list(dict.fromkeys(options.methods.split(",")))
    rhos = None if options.rho is None else rho_values(options.rho)
    candidates = {method: candidates_of(method, rhos) for method in methods}
    baseline = methods[0] if options.baseline is None else options.baseline
    if baseline not in methods:
        raise ValueError(f"`baseline` must be one of the methods, {', '.join(methods)}, got {baseline!r}.")
    if options.search_seeds < 1:
        raise ValueError(f"`search_seeds` must be at least 1, got {options.search_seeds}.")

    study = Study(options, common, [candidate for own in candidates.values() for candidate in own])
    seeds, tried_on = study.seeds, study.seeds[: options.search_seeds]
    search = [
        (candidate, seed)
        for own in candidates.values()
        for seed in (tried_on if len(own) > 1 else seeds)
        for candidate in own
    ]
    # Known beforehand: the chosen candidate of each method runs on the seeds that were not tried.
    total = len(search) + sum(len(seeds) - len(tried_on) for own in candidates.values() if len(own) > 1)
    with study, tqdm(total=total, desc="runs") as bar:
        results = study.train(search, bar)
        chosen = choose(results).values()
        results += study.train(
            [(candidate, seed) for candidate in chosen for seed in seeds if candidate.varied and seed not in tried_on],
            bar,
        )
    _report(study, results, baseline, ["hf-aace", "compare", *argv])
    return 0


def study_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command that makes a study, with the options that all such commands have."""
    parser = argparse.ArgumentParser(
        prog=f"hf-aace {command}",
        usage=f"hf-aace {command} [options of this command or of hf-aace train]",
        description=f"{description} A study that was stopped goes on where it was when the same command is given again.",
        epilog="All other options are those of `hf-aace train`, the same for every run: model, data, epochs, learning rate and "
        "so on (see hf-aace train --help). Here `validation_size` is 0.2 by default, and there are no evaluations and no "
        "checkpoints in the course of a run.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=5, help="How many seeds.")
    parser.add_argument("--first_seed", type=int, default=0, help="The first of them.")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="How many runs at a time, each in a process with its share of the CPU cores (or OMP_NUM_THREADS of them).",
    )
    parser.add_argument("--output_dir", default=f"runs/{command}", help="Where the runs, tables and pictures go.")
    parser.add_argument(
        "--config",
        help="A YAML or JSON file with options of hf-aace train by name; the command line overrides it.",
    )
    return parser


class Study:
    """
    Runs of `hf-aace train`, several at a time. Those that are there already are not made again. A context manager, for as
    long as which there are processes to run in.

    Args:
        options (`argparse.Namespace`): What a parser of [`study_parser`] has read.
        common (`list[str]`): Options of `hf-aace train` for all runs.
        candidates (iterable of [`Candidate`]): All that may be run: their options are checked.

    Raises:
        `ValueError`: If an option is bad, or the folder holds a study with other options.
    """

    def __init__(self, options: argparse.Namespace, common: list[str], candidates: Iterable[Candidate]):
        for name in ("seeds", "jobs"):
            if getattr(options, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(options, name)}.")
        self.folder, self._jobs = Path(options.output_dir), options.jobs
        self.seeds = list(range(options.first_seed, options.first_seed + options.seeds))
        if options.config is not None:  # read here and now: the file may be another one when the study goes on
            common = [*config_as_options(options.config), *common]
        candidates = list(candidates)
        own = [option for option, *_ in _by_option(common)]
        own += [f"--{name}" for candidate in candidates for name, _ in candidate.options]
        if "--seed" in own:
            raise ValueError("`seed` is another one for each run: say by `first_seed` and `seeds` which.")
        if "--output_dir" in own:
            raise ValueError("`output_dir` is another one for each run: give that of the study on the command line.")
        self._common = common
        for candidate in candidates:
            # Bad options are to be told before the first run, not by the last one.
            argv = self._argv(candidate, self.seeds[0])
            model, data, *_ = train_parser(argv).parse_args_into_dataclasses(
                argv, return_remaining_strings=True, look_for_args_file=False
            )
            if candidate.varied and data.validation_size == 0:
                raise ValueError("`validation_size` is 0, but it takes validation images to choose between settings.")
            if "accuracy" not in data.metrics:
                raise ValueError(f"`metrics` must have `accuracy`, which the study is about, got {data.metrics}.")
            if data.streaming and data.validation_size > 0:
                raise ValueError(
                    "`streaming` reads no images beforehand, so that none can be set apart to choose settings by. Leave it "
                    "out, or compare methods of one setting each with `--validation_size 0`."
                )
        self.title = f"{last_part(model.model_name_or_path)} on {last_part(data.dataset_name)}"
        record = self.folder / "study.json"
        begun_with = json.loads(record.read_text(encoding="utf-8"))["options"] if record.is_file() else common
        if _by_option(begun_with) != _by_option(common):
            raise ValueError(
                f"The folder {str(self.folder)!r} holds a study with other options of `hf-aace train` than "
                f"`{shlex.join(common)}`: `{shlex.join(begun_with)}`. Give those, or another `output_dir`."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"options": common}, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> "Study":
        # Not forked: torch's threads do not survive it, and neither does CUDA.
        self._pool = ProcessPoolExecutor(self._jobs, get_context("spawn"), _begin_process, (self._jobs,))
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is not None:  # Ctrl-C, say: what was begun will be made again, not ended
            for process in active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def train(self, runs: list[tuple[Candidate, int]], bar: tqdm) -> list[Result]:
        """
        Makes the runs, pairs of a candidate and a seed, and counts them on the bar.

        Raises:
            `ValueError`: If some failed, when all others are through.
        """
        results = {run: self._result(*run) for run in runs}
        missing = [run for run, result in results.items() if result is None]
        bar.update(len(runs) - len(missing))
        failures, futures = [], {}
        for run in missing:
            folder = self._folder(*run)
            folder.mkdir(parents=True, exist_ok=True)
            futures[self._pool.submit(_train, self._argv(*run), folder / "output.txt")] = run
        try:
            for future in as_completed(futures):
                run = futures[future]
                if future.result() == 0:
                    results[run] = self._result(*run)
                else:
                    failures.append(self._folder(*run) / "output.txt")
                bar.update()
        except BrokenProcessPool as error:
            raise ValueError(
                "The process of a run was killed, perhaps for want of memory. Give the same command again to go on, "
                f"perhaps with fewer `jobs` than {self._jobs}."
            ) from error
        if failures:
            last = failures[0].read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ValueError(
                f"{len(failures)} of the runs failed, the first with: {''.join(last)} (see {failures[0]})"
            )
        return list(results.values())

    def _folder(self, candidate: Candidate, seed: int) -> Path:
        return self.folder / candidate.folder / f"seed-{seed}"

    def _argv(self, candidate: Candidate, seed: int) -> list[str]:
        own = [part for name, value in candidate.options for part in (f"--{name}", value)]
        last = ["--seed", str(seed), "--output_dir", str(self._folder(candidate, seed))]
        return [*_DEFAULTS, *self._common, *own, *last, "--disable_tqdm", "true"]

    def _result(self, candidate: Candidate, seed: int) -> Result | None:
        """What the run came to, `None` if it has not ended."""
        path = self._folder(candidate, seed) / "all_results.json"
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "eval_accuracy" not in metrics:  # the last thing that a run writes
            return None
        # The clock of a CPU is that of all processes on it.
        seconds = metrics["train_runtime" if torch.cuda.is_available() else "train_processor_seconds"]
        return Result(candidate, seed, metrics["eval_accuracy"], metrics.get("validation_accuracy"), seconds)


def _by_option(argv: list[str]) -> list[list[str]]:
    """Options with their values, sorted by name: neither their order matters nor how they are written."""
    argv = [word for part in argv for word in (part.split("=", 1) if part.startswith("--") else [part])]
    starts = [index for index, part in enumerate(argv) if part.startswith("--")]
    return sorted((argv[start:end] for start, end in pairwise([*starts, len(argv)])), key=lambda option: option[0])


def _begin_process(jobs: int) -> None:
    # Of its own one would leave a semaphore behind when it is terminated, of which Python then warns.
    tqdm.set_lock(threading.RLock())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // jobs))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A command that was killed cannot end its processes, which would wait for work forever."""
    parent_process().join()
    os._exit(1)


def _train(argv: list[str], log: Path) -> int:
    """A run, in a process for runs only; what it prints goes to a file."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        return main(["train", *argv])


def _report(study: Study, results: list[Result], baseline: str, command: list[str]) -> None:
    rows = summarize(results, baseline)
    print(f"{study.title}, test accuracy in per cent, against {baseline}")
    print(_comparison_table(rows))
    write_results(results, study.folder / "runs.csv")
    report = {"command": shlex.join(command), "baseline": baseline, "methods": rows}
    write_report(report, study.folder / "summary.json")
    pictures = [study.folder / f"{name}.png" for name in ("accuracy", "time", "rho")]
    plot_accuracies(rows, results, study.title, pictures[0])
    plot_accuracy_by_time(rows, study.title, pictures[1])
    if not plot_accuracy_by_rho(results, study.title, pictures[2]):
        pictures.pop().unlink(missing_ok=True)  # of an earlier call
    print(f"Numbers:  {study.folder / 'summary.json'}, {study.folder / 'runs.csv'}")
    print(f"Pictures: {', '.join(map(str, pictures))}")


def _comparison_table(rows: list[dict[str, Any]]) -> str:
    header = ["", "chosen", "seeds", "accuracy", "gain", "p", "seconds", "ratio"]
    lines = [
        [
            ":".join(part for part in row["method"].split(":") if "|" not in part),
            row["choice"] or "-",
            str(row["seeds"]),
            f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}",
            "" if row["gain"] is None else f"{100 * row['gain']:+.1f} ± {100 * row['gain_standard_error']:.1f}",
            "" if row["p_value"] is None else f"{row['p_value']:.2g}",
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return table(header, lines)
