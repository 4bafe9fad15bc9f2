# SPDX-License-Identifier: Apache-2.0
"""`hf-aace compare`: trains methods side by side over seeds, each run by `hf-aace train`."""

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch

from ..config import AACEArguments, AACEConfig
from ..study.plots import plot_accuracies, plot_accuracy_by_rho, plot_accuracy_by_time
from ..study.runner import Runner, run_options
from ..study.statistics import Candidate, candidates_of, choose, rho_values, short_name, summarize
from ..tensor_checks import check_at_least
from . import main
from .checks import check_training
from .options import DataArguments, ModelArguments, last_part
from .output import HelpFormatter, table, write_report
from .parser import config_as_options
from .train import train_parser


# For every run unless the user says otherwise: the curves are not needed, and checkpoints would fill the disk.
_DEFAULTS = ["--eval_strategy", "no", "--save_strategy", "no", "--validation_size", "0.2", "--metrics", "accuracy"]


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    parser = study_parser(
        "compare",
        "Trains methods side by side over seeds: each seed gives all of them the same images, label noise, initial weights "
        "and order of the images. Settings are chosen on validation images; results are of the test images.",
    )
    parser.add_argument(
        "--methods",
        default="trainer,sam,aace,aace:ascent_fraction=0.125",
        help="The methods, separated by commas: `trainer` (plain), `sam`, `asam`, `aace`, each optionally with options of "
        "`hf-aace train` as `:name=value`. Several values, separated by `|`, are tried, and the one best on the validation "
        "images is taken. Search the same for all, above all the learning rate: "
        "'trainer:learning_rate=1e-3|3e-3,aace:learning_rate=1e-3|3e-3:rho=0.01|0.1'.",
    )
    parser.add_argument(
        "--rho",
        help="Values of rho to try, separated by commas, for methods that do not give their own. By default that of the "
        "method: 0.01 for aace, 0.05 for sam, 0.5 for asam; with `--perturb_modules norm` 10, 1 and 1.",
    )
    parser.add_argument(
        "--search_seeds", type=int, default=3, help="Number of seeds to try the values with; the chosen one gets all."
    )
    parser.add_argument("--baseline", help="The method to compare the others with. By default the first.")
    options, common = parser.parse_known_args(argv)

    methods = list(dict.fromkeys(options.methods.split(",")))
    rhos = None if options.rho is None else rho_values(options.rho)
    candidates = [candidate for method in methods for candidate in candidates_of(method, rhos)]
    baseline = methods[0] if options.baseline is None else options.baseline
    if baseline not in methods:
        raise ValueError(f"`baseline` must be one of the methods, {', '.join(methods)}, got {baseline!r}.")
    check_at_least(1, search_seeds=options.search_seeds)

    study = Study(options, common, candidates)
    seeds, tried_on = study.seeds, study.seeds[: options.search_seeds]
    search = [(each, seed) for each in candidates for seed in (tried_on if each.method in study.searched else seeds)]
    for option, without in unequal_search(candidates).items():
        searching = next(method for method in methods if method not in without)
        print(
            f"hf-aace: warning: `{option}` is searched for {searching}, but not for {', '.join(without)}. The comparison "
            f"favors what is searched: give each method values of `{option}` to try, as `:{option}=A|B`.",
            file=sys.stderr,
        )
    # Known beforehand: the chosen candidate of each method runs with the seeds that were not tried.
    with study.runner(total=len(search) + len(study.searched) * (len(seeds) - len(tried_on))) as runner:
        runs = runner.run(search)
        chosen = choose(runs)
        winners = [candidate for candidate in candidates if chosen[candidate.method] == candidate.options]
        if rest := [(each, seed) for each in winners for seed in seeds if (each, seed) not in search]:
            runs = pd.concat([runs, runner.run(rest)])
    _report(study, runs, baseline, ["hf-aace", "compare", *argv])
    return 0


def unequal_search(candidates: list[Candidate]) -> dict[str, list[str]]:
    """
    Find what is searched for some methods only, which makes a comparison unfair.

    Args:
        candidates (`list[Candidate]`): The candidates of all methods.

    Returns:
        `dict[str, list[str]]`: For each option that is searched for some methods only, the methods for which it is not.
        Plain training is not expected to search options of the perturbation.
    """
    settings = pd.DataFrame([dict(each.settings) for each in candidates], index=[each.method for each in candidates])
    values = settings.groupby(level=0, sort=False).nunique()
    of_perturbation = {option.name for option in fields(AACEArguments)}
    unequal = {}
    for option in values.columns[(values > 1).any()]:
        could = [name for name in values.index if option not in of_perturbation or not name.startswith("trainer")]
        if without := [method for method in could if values.loc[method, option] <= 1]:
            unequal[option] = without
    return unequal


def study_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a command that makes a study, with the options that all such commands have."""
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
    parser.add_argument("--seeds", type=int, default=5, help="Number of seeds.")
    parser.add_argument("--first_seed", type=int, default=0, help="The first of them.")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="Number of runs at a time, each in a process with its share of the CPU cores (or OMP_NUM_THREADS of them).",
    )
    parser.add_argument("--output_dir", default=f"runs/{command}", help="The folder of the runs, tables and pictures.")
    parser.add_argument(
        "--config", help="A YAML or JSON file with options of hf-aace train by name; the command line overrides it."
    )
    return parser


class Study:
    """
    The folder, seeds and options of a study, and which methods have several settings to choose from (`searched`).

    Args:
        options (`argparse.Namespace`): The options that a parser of [`study_parser`] has read.
        common (`list[str]`): Options of `hf-aace train` for all runs.
        candidates (`list[Candidate]`): All that may be run; their options are checked before the first run.
        chooses (`bool`, *optional*, defaults to `False`): The study chooses by validation images, whatever the candidates.

    Raises:
        `ValueError`: If an option is bad, or the folder holds a study with other options.
    """

    def __init__(
        self, options: argparse.Namespace, common: list[str], candidates: list[Candidate], chooses: bool = False
    ):
        check_at_least(1, seeds=options.seeds, jobs=options.jobs)
        self.folder, self._jobs = Path(options.output_dir), options.jobs
        self.seeds = list(range(options.first_seed, options.first_seed + options.seeds))
        if options.config is not None:  # read here and now: the file may be another one when the study goes on
            common = [*config_as_options(options.config), *common]
        own = [option for option, *_ in _by_option(common)]
        own += [f"--{name}" for candidate in candidates for name, _ in candidate.settings]
        if "--seed" in own:
            raise ValueError("`seed` is another one for each run: set `first_seed` and `seeds`.")
        if "--output_dir" in own:
            raise ValueError("`output_dir` is another one for each run: give that of the study on the command line.")
        self._options = [*_DEFAULTS, *common]
        self.searched = {method for method, count in Counter(each.method for each in candidates).items() if count > 1}
        for candidate in candidates:
            # Bad options are to be told before the first run, not by the last one.
            model, data, training = train_arguments(run_options(self.folder, self._options, candidate, self.seeds[0]))
            check_training(model, data, training)
            if (chooses or candidate.method in self.searched) and data.validation_size == 0:
                raise ValueError("`validation_size` is 0, but it takes validation images to choose between settings.")
            if "accuracy" not in data.metrics:
                raise ValueError(f"`metrics` must have `accuracy`, which the study is about, got {data.metrics}.")
            if data.streaming and data.validation_size > 0:
                raise ValueError(
                    "`streaming` reads no images beforehand, so none can be set apart to choose settings by. Leave it "
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

    def runner(self, total: int) -> Runner:
        """Make the context manager that makes the runs of this study, `total` of them."""
        return Runner(self.folder, _train, self._options, self._jobs, total)


def train_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, AACEConfig]:
    """Read options of `hf-aace train`, with their defaults."""
    model, data, _, training = train_parser(argv).read(argv)
    return model, data, training


def _by_option(argv: list[str]) -> list[list[str]]:
    """Split options with their values and sort them by name: neither their order matters nor how they are written."""
    argv = [word for part in argv for word in (part.split("=", 1) if part.startswith("--") else [part])]
    starts = [index for index, part in enumerate(argv) if part.startswith("--")]
    return sorted((argv[start:end] for start, end in pairwise([*starts, len(argv)])), key=lambda option: option[0])


def _train(argv: list[str]) -> int:
    return main(["train", *argv])


def _report(study: Study, runs: pd.DataFrame, baseline: str, command: list[str]) -> None:
    summary = summarize(runs, baseline)
    print(f"{study.title}, test accuracy in per cent, against {baseline}")
    print(_comparison_table(summary))
    runs.to_csv(study.folder / "runs.csv", index=False)
    report = {"command": shlex.join(command), "baseline": baseline, "methods": summary.to_dict("records")}
    write_report(report, study.folder / "summary.json")
    pictures = [study.folder / f"{name}.png" for name in ("accuracy", "time", "rho")]
    plot_accuracies(summary, runs, study.title, pictures[0])
    plot_accuracy_by_time(summary, study.title, pictures[1])
    if not plot_accuracy_by_rho(runs, study.title, pictures[2]):
        pictures.pop().unlink(missing_ok=True)  # of an earlier call
    print(f"Numbers:  {study.folder / 'summary.json'}, {study.folder / 'runs.csv'}")
    print(f"Pictures: {', '.join(map(str, pictures))}")


def _comparison_table(summary: pd.DataFrame) -> str:
    header = ["", "chosen", "seeds", "accuracy", "gain", "p", "seconds", "ratio"]
    lines = [
        [
            short_name(row.method),
            row.choice or "-",
            str(row.seeds),
            f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}",
            "" if pd.isna(row.gain) else f"{100 * row.gain:+.1f} ± {100 * row.gain_standard_error:.1f}",
            "" if pd.isna(row.p_value) else f"{row.p_value:.2g}",
            f"{row.seconds:.1f}",
            f"{row.ratio:.2f}",
        ]
        for row in summary.itertuples()
    ]
    return table(header, lines)
