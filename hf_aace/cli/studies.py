# SPDX-License-Identifier: Apache-2.0
"""Studies, which make many runs of `hf-aace train`: their options, their folder, and the runs."""

import argparse
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch

from ..study.runner import Runner, run_options
from ..study.statistics import Candidate
from ..tensor_checks import check_at_least
from . import main
from .checks import check_training
from .options import last_part
from .output import HelpFormatter
from .parser import config_as_options
from .train import train_parser


# For every run unless the user says otherwise: the curves are not needed, and checkpoints would fill the disk.
_DEFAULTS = ["--eval_strategy", "no", "--save_strategy", "no", "--validation_size", "0.2", "--metrics", "accuracy"]


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


def read_study(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the options of a study, and those of `hf-aace train` for all its runs: of its `config`, then of the command line."""
    options, common = parser.parse_known_args(argv)
    # The options, not the file: it may be another one when the study goes on.
    return options, [*([] if options.config is None else config_as_options(options.config)), *common]


class Study:
    """
    The folder, seeds and options of a study, and which methods have several settings to choose from (`searched`). `options` and
    `common` come from [`read_study`]; with `chooses` the study needs validation images even if no method has several settings.
    Refuse bad options of any candidate, before the first run, and a folder that holds a study with other options.
    """

    def __init__(
        self, options: argparse.Namespace, common: list[str], candidates: list[Candidate], chooses: bool = False
    ):
        check_at_least(1, seeds=options.seeds, jobs=options.jobs)
        self.folder, self._jobs = Path(options.output_dir), options.jobs
        self.seeds = list(range(options.first_seed, options.first_seed + options.seeds))
        own = [option for option, *_ in _by_option(common)]
        own += [f"--{name}" for candidate in candidates for name, _ in candidate.settings]
        if "--seed" in own:
            raise ValueError("`seed` is another one for each run: set `first_seed` and `seeds`.")
        if "--output_dir" in own:
            raise ValueError("`output_dir` is another one for each run: give that of the study on the command line.")
        self._options = [*_DEFAULTS, *common]
        models, datasets = {}, {}  # as ordered sets
        self.searched = {method for method, count in Counter(each.method for each in candidates).items() if count > 1}
        for candidate in candidates:
            # Bad options are to be told before the first run, not by the last one.
            argv = run_options(self.folder, self._options, candidate, self.seeds[0])
            model, data, processes, training = train_parser(argv).read(argv)
            check_training(model, data, training)
            models[last_part(model.model_name_or_path)] = datasets[last_part(data.dataset_name)] = True
            if training.n_gpu > 1 and processes.accelerate_config in (None, "single_gpu"):
                raise ValueError(
                    f"Plain runs would train on {training.n_gpu} GPUs at once, in batches {training.n_gpu} times as large, and methods that "
                    "perturb are refused there. Let the study see one GPU, by `CUDA_VISIBLE_DEVICES=0`, or give `--accelerate_config ddp`."
                )
            chooses_here = chooses or candidate.method in self.searched or training.load_best_model_at_end
            if chooses_here and data.validation_size == 0:
                raise ValueError(
                    "`validation_size` is 0, but it takes validation images to choose between settings or checkpoints. A study sets "
                    "its own apart, even if the dataset has some."
                )
            if "accuracy" not in data.metrics:
                raise ValueError(f"`metrics` must have `accuracy`, which the study is about, got {data.metrics}.")
            if data.streaming and data.validation_size > 0:
                raise ValueError(
                    "`streaming` reads no images beforehand, so none can be set apart to choose settings by. Leave it "
                    "out, or compare methods of one setting each with `--validation_size 0`."
                )
        self.title = f"{', '.join(models)} on {', '.join(datasets)}"
        self._record = record = self.folder / "study.json"
        begun_with = json.loads(record.read_text(encoding="utf-8"))["options"] if record.is_file() else common
        if _by_option(begun_with) != _by_option(common):
            raise ValueError(
                f"The folder {str(self.folder)!r} holds a study with other options of `hf-aace train` than "
                f"`{shlex.join(common)}`: `{shlex.join(begun_with)}`. Give those, or another `output_dir`."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"options": common}, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def runner(self, total: int) -> Iterator[Runner]:
        """Give, by this context manager, what makes the runs of this study, `total` of them."""
        try:
            with Runner(self.folder, _train, self._options, self._jobs, total) as runner:
                yield runner
        finally:
            if not any(self.folder.glob("*/*/all_results.json")):
                self._record.unlink(missing_ok=True)  # without a run it may begin anew with other options


def _by_option(argv: list[str]) -> list[list[str]]:
    """Split options with their values and sort them by name: neither their order matters nor how they are written."""
    argv = [word for part in argv for word in (part.split("=", 1) if part.startswith("--") else [part])]
    starts = [index for index, part in enumerate(argv) if part.startswith("--")]
    return sorted((argv[start:end] for start, end in pairwise([*starts, len(argv)])), key=lambda option: option[0])


def _train(argv: list[str]) -> int:
    return main(["train", *argv])
