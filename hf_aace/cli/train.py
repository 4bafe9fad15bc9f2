# SPDX-License-Identifier: Apache-2.0
"""`hf-aace train`: trains an image classifier, in one process or in several."""

import argparse
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import DatasetDict, Image, IterableDatasetDict
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import HfArgumentParser, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import PredictionOutput

from ..augmentation import Augmentation, AugmentedAACETrainer
from ..config import AACEConfig
from ..data import load_image_dataset
from ..images import image_transform
from ..metrics import compute_metrics_fn, load_metric, predicted_classes
from ..models import load_model_and_processor
from ..plots import plot_training_curves
from ..streaming import stream_image_dataset, transform_stream
from ..training_loss import TrainingLoss, balanced_class_weights
from .options import DataArguments, training_parser, write_train_options


# Set in the processes that `--accelerate_config` starts.
_LAUNCHED = "HF_AACE_LAUNCHED"


@dataclass
class LaunchArguments:
    """
    Which processes to train in, as for `accelerate launch`. Without a configuration, the present process.

    Args:
        accelerate_config (`str`, *optional*):
            `"single_gpu"`, `"ddp"`, `"fsdp2"`, or the path of a configuration file of accelerate.
        num_processes (`int`, *optional*):
            Number of processes on all machines together. Defaults to one for each GPU, taking each machine to have as
            many as this one.
        num_machines (`int`, *optional*, defaults to `1`):
            Number of machines. The command is started on each.
        machine_rank (`int`, *optional*, defaults to `0`):
            The number of this machine, from 0.
        main_process_ip (`str`, *optional*):
            The address of machine 0.
        main_process_port (`int`, *optional*):
            A free port on machine 0. Defaults to any, for one machine.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Start the processes that a configuration of accelerate asks for: `single_gpu`, `ddp`, `fsdp2`, or the "
            "path of a file that `accelerate config` wrote."
        },
    )
    num_processes: int | None = field(
        default=None,
        metadata={
            "help": "With `accelerate_config`: number of processes, on all machines. One for each GPU by default."
        },
    )
    num_machines: int = field(default=1, metadata={"help": "With `accelerate_config`: number of machines."})
    machine_rank: int = field(
        default=0, metadata={"help": "With `accelerate_config`: number of this machine, from 0."}
    )
    main_process_ip: str | None = field(
        default=None, metadata={"help": "With `accelerate_config`: address of machine 0."}
    )
    main_process_port: int | None = field(
        default=None, metadata={"help": "With `accelerate_config`: a free port on machine 0."}
    )


def _launch(options: argparse.Namespace, argv: list[str]) -> int:
    """Runs `hf-aace train` with the options `argv` in the processes that `options` ask for."""
    shipped = Path(__file__).parents[1] / "accelerate_configs"
    config = shipped / f"{options.accelerate_config}.yaml"
    if not config.is_file():
        config = Path(options.accelerate_config)
    if not config.is_file():
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
        raise ValueError(f"`accelerate_config` must be one of {known}, or a file, got {options.accelerate_config!r}.")
    launch = [
        "--config_file",
        str(config),
        "--num_machines",
        options.num_machines,
        "--machine_rank",
        options.machine_rank,
    ]
    if options.num_processes is not None or options.accelerate_config in ("ddp", "fsdp2"):
        num_processes = options.num_processes or torch.cuda.device_count() * options.num_machines
        if num_processes < 1:
            raise ValueError("There are no GPUs here to start a process for. Say how many by `num_processes`.")
        launch += ["--num_processes", num_processes]
    if options.main_process_ip is not None:
        launch += ["--main_process_ip", options.main_process_ip]
    if options.main_process_port is not None or options.num_machines == 1:
        launch += ["--main_process_port", options.main_process_port or 0]  # 0 is any free one
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(launch_command_parser().parse_args([*map(str, launch), "--module", "hf_aace", "train", *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # The process has said why, unless it was killed.
        print(f"hf-aace: process {rank} failed first, with exit code {failure.exitcode}.", file=sys.stderr)
        return 1
    except CalledProcessError as error:
        return error.returncode
    except SignalException:
        return 130
    finally:
        del os.environ[_LAUNCHED]
    return 0


def train_parser(argv: list[str]) -> HfArgumentParser:
    """The parser of `hf-aace train`, with the defaults that depend on its arguments `argv`."""
    return training_parser(
        "train",
        "Trains an image classifier with AACETrainer and leaves model, results and curves in output_dir.",
        (LaunchArguments,),
        argv,
    )


def run(argv: list[str]) -> int:
    """Runs the command with the arguments `argv`; returns the exit code."""
    parser = train_parser(argv)
    options = parser.parse_args(argv)
    if options.accelerate_config is not None and _LAUNCHED not in os.environ and "LOCAL_RANK" not in os.environ:
        return _launch(options, argv)
    model_args, data_args, _, training_args, *_ = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )

    # The transform makes the columns that the model takes only when a batch is read.
    training_args.remove_unused_columns = False
    compute_metrics = compute_metrics_fn([name for name in data_args.metrics if name != "confusion_matrix"])
    with training_args.main_process_first(desc="loading the data set"):
        dataset = _load_data(data_args, training_args)
    set_seed(training_args.seed)
    id2label = dict(enumerate(dataset["train"].features["label"].names))
    model, processor = load_model_and_processor(model_args.model_name_or_path, id2label)
    compute_loss_func = None  # the model's own
    augmentation = _augmentation(data_args, processor, len(id2label))
    weights = None
    if data_args.class_weights == "balanced":
        weights = balanced_class_weights(dataset["train"]["label"][:], len(id2label))
    if weights is not None or (augmentation is not None and augmentation.soft_labels):
        compute_loss_func = TrainingLoss(weights, training_args.label_smoothing_factor)
    if data_args.streaming:
        dataset = transform_stream(dataset, processor, data_args.skip_corrupt_images)
    else:
        # Left encoded, an image that cannot be decoded is named by the transform.
        dataset = dataset.cast_column("image", Image(decode=False)).with_transform(image_transform(processor))
    trainer = AugmentedAACETrainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset.get("validation", dataset["test"]),
        processing_class=processor,
        compute_metrics=compute_metrics,
        compute_loss_func=compute_loss_func,
        augmentation=augmentation,
    )
    if trainer.is_world_process_zero():
        write_train_options(model_args, data_args, training_args)

    started, processor_started = time.time(), time.process_time()
    try:
        result = trainer.train(resume_from_checkpoint=_resume_from(training_args.resume_from_checkpoint))
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            print(f"\n{_how_to_resume(training_args.output_dir, started, argv)}", file=sys.stderr)
        return 130
    # Unlike the time on the clock, it does not depend on what else the machine is doing.
    result.metrics["train_processor_seconds"] = time.process_time() - processor_started
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)

    if "validation" in dataset:
        metrics = trainer.evaluate(metric_key_prefix="validation")
        trainer.save_metrics("validation", metrics)
    prediction = trainer.predict(dataset["test"], metric_key_prefix="eval")
    metrics = dict(prediction.metrics)
    trainer.log_metrics("eval", metrics)
    if "confusion_matrix" in data_args.metrics:
        metrics |= _confusion_matrix(prediction, len(id2label))
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        picture = Path(training_args.output_dir) / "training_curves.png"
        drawn = plot_training_curves(trainer.state.log_history, picture)
        print(_summary(metrics, result.metrics["train_runtime"], training_args.output_dir, picture if drawn else None))
    return 0


def _load_data(options: DataArguments, training_args: AACEConfig) -> DatasetDict | IterableDatasetDict:
    columns = {name: getattr(options, name) for name in ("image_column_name", "label_column_name")}
    if not options.streaming:
        return load_image_dataset(
            options.dataset_name,
            seed=training_args.seed,
            train_size=options.train_size,
            label_noise=options.label_noise,
            validation_size=options.validation_size,
            skip_corrupt_images=options.skip_corrupt_images,
            **columns,
        )
    if training_args.max_steps <= 0:
        raise ValueError("`streaming` needs `max_steps`, as the number of images is not known: say how long to train.")
    for name, off in (("label_noise", 0), ("validation_size", 0), ("class_weights", "none")):
        if getattr(options, name) != off:
            raise ValueError(
                f"`{name}` needs all training labels beforehand, which `streaming` does not read: leave out one of the two."
            )
    return stream_image_dataset(
        options.dataset_name, seed=training_args.seed, train_size=options.train_size, **columns
    )


def _augmentation(options: DataArguments, processor: BaseImageProcessor, num_classes: int) -> Augmentation | None:
    if options.augmentation == "none" and options.mixup == options.cutmix == 0:
        return None
    return Augmentation(
        options.augmentation,
        processor=processor,
        num_classes=num_classes,
        mixup=options.mixup,
        cutmix=options.cutmix,
    )


def _confusion_matrix(prediction: PredictionOutput, num_classes: int) -> dict[str, list[list[int]]]:
    counts = load_metric("confusion_matrix").compute(
        predictions=predicted_classes(prediction.predictions), references=prediction.label_ids, num_classes=num_classes
    )
    return {"eval_confusion_matrix": counts["confusion_matrix"]}


def _resume_from(value: str | None) -> str | bool | None:
    """Reads the option `resume_from_checkpoint`, which comes as a string, for `Trainer.train`."""
    words = {"true": True, "false": None, "": None}
    return value if value is None else words.get(value.lower(), value)


def _how_to_resume(output_dir: str, started: float, argv: list[str]) -> str:
    # The state is what a checkpoint is given last: with it, the checkpoint is whole. Older ones are of another run.
    states = [state for state in Path(output_dir).glob("checkpoint-*/trainer_state.json") if _time(state) >= started]
    if not states:
        return "Interrupted before the first checkpoint: there is nothing to resume from."
    resume = ["--resume_from_checkpoint", str(max(states, key=_time).parent)]
    if "LOCAL_RANK" in os.environ and _LAUNCHED not in os.environ:  # the launcher's part of the command is not known
        return f"Interrupted. To go on from the last checkpoint, add to the command:\n{shlex.join(resume)}"
    command = shlex.join(["hf-aace", "train", *argv, *resume])
    return f"Interrupted. To go on from the last checkpoint:\n{command}"


def _time(path: Path) -> float:
    return path.stat().st_mtime


def _summary(metrics: dict[str, Any], seconds: float, output_dir: str, picture: Path | None) -> str:
    bookkeeping = (
        "eval_loss",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "eval_model_preparation_time",
    )
    scores = [
        f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in metrics.items()
        if isinstance(value, float) and name not in bookkeeping
    ]
    return "\n".join(
        (
            f"Test:    {', '.join(scores)}",
            f"Time:    {timedelta(seconds=round(seconds))} for training",
            f"Model:   {output_dir}",
            f"Picture: {picture or 'none, since nothing was logged'}",
        )
    )
