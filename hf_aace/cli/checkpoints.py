# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `hf-aace train`: from which one to go on, what else goes into them, and what to do when saving fails."""

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from ..config import AACEArguments
from ..vision.messages import first_line
from .launch import is_launched
from .options import checkpoints_in, is_same_data, train_options, write_train_options


logger = logging.get_logger(__name__)

_NUMBER_OF_STEPS = {"num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"}


class KeepOptions(TrainerCallback):
    """
    Write the options of a run, from [`~hf_aace.cli.options.options_of_run`], into its checkpoints. The folder of the run gets
    them with the model, at the end.
    """

    def __init__(self, options: dict[str, Any]):
        self._options = options

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        # `save_total_limit` deletes it at once if checkpoints of an earlier run in the folder look younger.
        if state.is_world_process_zero and checkpoint.is_dir():
            write_train_options(self._options, checkpoint)


def checkpoint_to_resume(value: str | None, output_dir: str, options: dict[str, Any]) -> str | None:
    """
    Find the checkpoint that the option `resume_from_checkpoint` means: a path, or for true the newest in `output_dir` that is
    whole, of a run with the same `options` if there is one; `None` if it is false or not given. Refuse a checkpoint that does
    not exist or is not whole.
    """
    if value is None or value.lower() in ("false", ""):
        return None
    whole = [path for path in checkpoints_in(output_dir) if _is_whole(path)]
    if value.lower() == "true":
        if not whole:
            raise ValueError(f"`resume_from_checkpoint`: No valid checkpoint found in {output_dir}. Leave it out.")
        # An earlier run in the folder may have left some of more steps.
        of_this_run = [path for path in whole if not changed_options(path, options)]
        return str((of_this_run or whole)[-1])
    # A finished run has a state too, but no optimizer: training would begin anew.
    if not _is_whole(Path(value)) or Path(value, "all_results.json").is_file():
        whole = whole or [path for path in checkpoints_in(value) if _is_whole(path)]
        hint = f" The newest that is whole is {whole[-1]}." if whole else ""
        raise ValueError(f"`resume_from_checkpoint` is {value!r}, which is no checkpoint, or not a whole one.{hint}")
    return value


def check_options(checkpoint: str, options: dict[str, Any]) -> None:
    """
    Warn of options of a run that differ from those recorded in the checkpoint that it goes on from. Refuse those that mean
    other images, or that the optimizer of the checkpoint would override.
    """
    earlier, changed = train_options(Path(checkpoint)), changed_options(checkpoint, options)
    images = ("dataset_name", "image_range", "train_size", "label_noise", "validation_size", "seed")
    with_optimizer = any(Path(checkpoint).glob("optimizer*"))  # not with `save_only_model`
    kept = ("learning_rate", "weight_decay", "optim", "optim_args") if with_optimizer else ()
    for names, why in ((images, "It would go on with other images"), (kept, "It goes on with its own optimizer")):
        if told := _told(earlier, options, [name for name in changed if name in names]):
            raise ValueError(
                f"`resume_from_checkpoint`: {checkpoint} had {told}. {why}: give what it had, or leave `resume_from_checkpoint` out."
            )
    if changed:
        told = _told(earlier, options, changed)
        logger.warning(f"{checkpoint}, from which this run goes on, had other settings: {told}.")


def warn_of_replacing(output_dir: str, options: dict[str, Any]) -> None:
    """Warn if the folder holds a finished run, which a new one replaces."""
    if Path(output_dir, "all_results.json").is_file():
        told = _told(train_options(Path(output_dir)), options, changed_options(output_dir, options))
        logger.warning(
            f"{output_dir} holds a finished run, which this one replaces{f'. It had {told}' if told else ''}. To keep it, give "
            "another `output_dir`."
        )


def is_finished(output_dir: str, checkpoint: str, options: dict[str, Any]) -> bool:
    """
    Tell whether no step is left to train after a checkpoint, and its run has left its results in `output_dir`. Refuse it if no
    step is left and the perturbation was another: what that has trained would get the name of this one.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    changed = changed_options(checkpoint, options)
    if state.global_step < state.max_steps or not _NUMBER_OF_STEPS.isdisjoint(changed):
        return False
    perturbation = {option.name for option in fields(AACEArguments)} - {"method"}  # which sets others of them
    if not perturbation.isdisjoint(changed):
        told = _told(train_options(Path(checkpoint)), options, changed)
        raise ValueError(
            f"`resume_from_checkpoint`: after {checkpoint}, no step is left to train. It had {told}. Leave `resume_from_checkpoint` "
            "out to train anew."
        )
    return Path(output_dir, "eval_results.json").is_file() and set(changed_options(output_dir, options)) <= {"method"}


def changed_options(folder: str | Path, options: dict[str, Any]) -> list[str]:
    """Return the names of the options that differ from those recorded in a checkpoint or in the folder of a run."""
    earlier = train_options(Path(folder))
    changed = [name for name, value in options.items() if name in earlier and earlier[name] != value]
    if "dataset_name" in changed and is_same_data(earlier["dataset_name"], options["dataset_name"]):
        changed.remove("dataset_name")  # another spelling of the path
    return changed


def _told(earlier: dict[str, Any], options: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"`{name}={earlier[name]}`, now {options[name]}" for name in names)


class Attempt:
    """
    Know what a training that ends early has left, and the command that goes on from it. `checkpoint` is the one that the
    training itself went on from.
    """

    def __init__(self, output_dir: str, argv: list[str], checkpoint: str | None):
        self._output_dir, self._argv, self._checkpoint = output_dir, argv, checkpoint
        self._started = time.time()

    def how_to_resume(self) -> str:
        """Tell what was saved, and the command that goes on from there."""
        # Older checkpoints are those of another run.
        saved = [
            path
            for path in checkpoints_in(self._output_dir)
            if _is_whole(path) and _time(path / "trainer_state.json") >= self._started
        ]
        if not saved and self._checkpoint is None:
            return "Nothing was saved. There is no checkpoint of this run to resume from."
        resume = ["--resume_from_checkpoint", str(saved[-1] if saved else self._checkpoint)]
        told = f"Saved up to {saved[-1]}." if saved else f"Nothing was saved after {self._checkpoint}."
        # `torchrun ...` started the command, with options that are not known here.
        if "LOCAL_RANK" in os.environ and not is_launched():
            return f"{told} To go on from there, add to the command:\n{shlex.join(resume)}"
        return f"{told} To go on from there:\n{shlex.join(['hf-aace', 'train', *self._argv, *resume])}"

    def raise_if_save_failed(self, error: Exception) -> None:
        """
        If a checkpoint was being written when training failed (the disk was full, for example), rename what there is of it, so
        that no run resumes from it, and raise an `OSError` that says how to go on.
        """
        broken = [
            path for path in checkpoints_in(self._output_dir) if not _is_whole(path) and _time(path) >= self._started
        ]
        if not broken:
            return
        aside = broken[0].with_name(f"_incomplete-{broken[0].name}")  # Trainer pushes nothing that begins with `_`
        shutil.rmtree(aside, ignore_errors=True)
        broken[0].rename(aside)
        free = shutil.disk_usage(self._output_dir).free / 1e6
        raise OSError(
            f"Saving {broken[0]} failed, with {free:.0f} MB free on its disk, and what there "
            f"is of it was renamed to {aside.name}: {first_line(error)}. {self.how_to_resume()}".replace("\n", " ")
        ) from error


@contextmanager
def if_interrupted(told: str) -> Iterator[None]:
    """Tell on Ctrl-C what was saved."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"\nInterrupted. {told}") from interrupt


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has its state, which is written last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _time(path: Path) -> float:
    return path.stat().st_mtime
