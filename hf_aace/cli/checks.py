# SPDX-License-Identifier: Apache-2.0
"""Refuse what a command cannot do, before it loads or trains anything."""

import difflib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.utils import logging

from ..config import AACEConfig
from ..tensor_checks import check_at_least
from .options import DataArguments, ModelArguments


logger = logging.get_logger(__name__)

_TIMINGS = {"runtime", "samples_per_second", "steps_per_second"}  # Trainer adds them to the metrics


def check_training(model_args: ModelArguments, data_args: DataArguments, args: AACEConfig) -> None:
    """Refuse options of `hf-aace train` that do not go together or that the command cannot follow."""
    if not args.do_train:
        raise ValueError(
            "`do_train` is false, but training is what this command does. See `hf-aace evaluate` and `hf-aace predict`."
        )
    at_least_1 = ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size")
    check_at_least(1, **{name: getattr(args, name) for name in at_least_1})
    for name, highest in (
        ("num_train_epochs", math.inf),
        ("learning_rate", math.inf),
        ("label_smoothing_factor", 1),
        ("seed", 2**32 - 1),
    ):
        value = getattr(args, name)
        if not 0 <= value <= highest or math.isinf(value):
            raise ValueError(
                f"`{name}` must be a number from 0{f' to {highest}' * (highest < math.inf)}, got {value}."
            )
    if not args.eval_do_concat_batches:
        raise ValueError(
            "`eval_do_concat_batches` false gives lists of batches, which no metric here takes: leave it out."
        )
    if args.batch_eval_metrics:
        raise ValueError(
            "`batch_eval_metrics` gives the metrics one batch at a time, but those of this command need all predictions: "
            "leave it out. To save memory of the GPU in evaluations, set `eval_accumulation_steps`."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(
            f"`label_names` is {args.label_names}, but this command gives the labels as `labels`, whatever the dataset calls "
            "them: leave it out. The column of the dataset is `label_column_name`."
        )
    if any("=" not in pair for pair in (args.optim_args or "").split(",") if pair):
        raise ValueError(f"`optim_args` must be `name=value`, several separated by commas, got {args.optim_args!r}.")
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name) and not _is_mixed(args):
            raise ValueError(f"`{name}` needs `bf16` (or on a GPU `fp16`) too, as the images are of 32 bits.")
    if model_args.lora and model_args.freeze_backbone:
        raise ValueError("`lora` freezes the backbone itself: leave out `freeze_backbone`.")
    _check_dtype(model_args, args)
    check_folder("output_dir", args.output_dir)
    check_exists("model_name_or_path", model_args.model_name_or_path)
    check_exists("dataset_name", data_args.dataset_name)


def _check_dtype(model_args: ModelArguments, args: AACEConfig) -> None:
    if model_args.dtype == "float32":
        return
    amp = "fp16" if model_args.dtype == "float16" and args.device.type != "cpu" else "bf16"
    if args.rho > 0 and not (model_args.lora or model_args.freeze_backbone):
        raise ValueError(
            f"`dtype={model_args.dtype}` is for `lora`, `freeze_backbone` or `rho` 0: the parameters to perturb must be float32, "
            f"since 16 bits round the perturbation away. To train in mixed precision, give `--{amp} true` instead of `dtype`. "
            f"To save memory, give `--dtype {model_args.dtype} --{amp} true --lora true` (or `--freeze_backbone true`)."
        )
    if not _is_mixed(args):
        raise ValueError(
            f"`dtype={model_args.dtype}` needs mixed precision, as the images are of 32 bits: give `--{amp} true` too."
        )


def _is_mixed(args: AACEConfig) -> bool:
    """Return whether training is in mixed precision: Transformers ignores `fp16` on a CPU."""
    return args.bf16 or (args.fp16 and args.device.type != "cpu")


def check_metrics(compute_metrics: Callable[[EvalPrediction], dict[str, Any]], classes: int, args: AACEConfig) -> None:
    """
    Refuse metrics that cannot be computed, tried on made-up predictions of so many classes, and a `metric_for_best_model` that
    is none of them or is missing, before the command trains.
    """
    known = {"loss"}
    if not args.prediction_loss_only:
        try:
            known |= set(compute_metrics(EvalPrediction(np.eye(classes, dtype=np.float32), np.arange(classes))))
        except Exception as error:  # of any kind: it is the code of a metric from the Hub
            raise ValueError(
                f"`metrics`: they cannot be computed for {classes} classes: {error}. Leave that metric out."
            ) from error
    best = args.metric_for_best_model
    if best is None and args.save_strategy == "best":
        raise ValueError(
            "`save_strategy` best needs `metric_for_best_model`, for example `--metric_for_best_model accuracy`."
        )
    if best is not None and args.eval_strategy != "no" and best.removeprefix("eval_") not in known | _TIMINGS:
        raise ValueError(
            f"`metric_for_best_model` is {best!r}, which this run does not measure. Give one of {', '.join(sorted(known))}, or "
            "add it to `metrics`."
        )


def check_folder(name: str, folder: str | os.PathLike) -> None:
    """
    Refuse a folder for results that cannot be made or written. It need not exist, and is not made; `name` is the option that
    names it.
    """
    path = Path(folder)
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"`{name}` is {str(folder)!r}, but {str(nearest)!r} is no folder. Give another folder.")
    try:
        with TemporaryDirectory(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"`{name}` is {str(folder)!r}, which cannot be written: {error.strerror}. Give another folder."
        ) from error


def check_exists(option: str, name: str) -> None:
    """Refuse a value that can only be a path, such as `./photos`, if nothing is there, rather than ask the Hub for it."""
    only_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    if only_a_path and not Path(name).exists():
        raise ValueError(f"`{option}` is {name!r}, but there is no such folder or file{_similar(name)}.")


@contextmanager
def naming_the_folder(option: str, name: str) -> Iterator[None]:
    """
    Add to the error of loading a model or dataset that there is no such folder, if the name looks like one: `runs/photos`, where
    there is a folder `runs`, may still be an id on the Hub.
    """
    try:
        yield
    except ValueError as error:
        path = Path(name)
        if path.exists() or len(path.parts) != 2 or not path.parent.is_dir():
            raise
        raise ValueError(
            f"`{option}` is {name!r}, but there is no such folder{_similar(name)}, nor could it be loaded from the Hub: {error}"
        ) from error


def _similar(name: str) -> str:
    """Name the entries of the folder that are most like the last part of a path."""
    path = Path(name)
    try:
        entries = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (nor {str(path.parent)!r})"
    close = difflib.get_close_matches(path.name, entries, n=3)
    return f" (did you mean {', '.join(repr(str(path.parent / entry)) for entry in close)}?)" if close else ""
