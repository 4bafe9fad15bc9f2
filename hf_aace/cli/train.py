# SPDX-License-Identifier: Apache-2.0
"""`hf-aace train`: trains an image classifier, in one process or in several."""

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import DatasetDict, Image, IterableDatasetDict
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import HfArgumentParser, TrainerCallback, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import HubStrategy, PredictionOutput
from transformers.utils import logging

from ..analysis.plots import plot_training_curves
from ..config import AACEConfig
from ..trainer import AACETrainer
from ..vision.augmentation import Augmentation, AugmentedAACETrainer
from ..vision.datasets import load_image_dataset
from ..vision.images import image_transform
from ..vision.metrics import compute_metrics_fn, load_metric, predicted_classes
from ..vision.models import add_lora, freeze_backbone, load_model_and_processor, merge_lora
from ..vision.streaming import stream_image_dataset, transform_stream
from ..vision.weighted_loss import WeightedCrossEntropy, balanced_class_weights
from .options import (
    DataArguments,
    ModelArguments,
    checkpoints_in,
    last_part,
    option,
    options_of_run,
    train_options,
    training_parser,
    write_train_options,
)


logger = logging.get_logger(__name__)

# Set in the processes that `--accelerate_config` starts.
_LAUNCHED = "HF_AACE_LAUNCHED"


@dataclass
class LaunchArguments:
    """Which processes to train in, as for `accelerate launch`. Without a configuration, the present process."""

    accelerate_config: str | None = option(
        None,
        "Start the processes that a configuration of accelerate asks for: `single_gpu`, `ddp`, `fsdp2`, or the "
        "path of a file that `accelerate config` wrote.",
    )
    num_processes: int | None = option(
        None, "With `accelerate_config`: number of processes, on all machines. One for each GPU by default."
    )
    num_machines: int = option(1, "With `accelerate_config`: number of machines.")
    machine_rank: int = option(0, "With `accelerate_config`: number of this machine, from 0.")
    main_process_ip: str | None = option(None, "With `accelerate_config`: address of machine 0.")
    main_process_port: int | None = option(None, "With `accelerate_config`: a free port on machine 0.")


def _launch(options: argparse.Namespace, argv: list[str]) -> int:
    """Runs `hf-aace train` with the options `argv` in the processes that `options` ask for."""
    shipped = Path(__file__).with_name("accelerate_configs")
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
    if not training_args.do_train:
        raise ValueError(
            "`do_train` is false, but training is what this command does. See `hf-aace evaluate`, `predict`."
        )
    if options.num_processes is not None and options.accelerate_config is None:
        raise ValueError("`num_processes` needs `accelerate_config`, `ddp` say, which starts them. Or use `torchrun`.")
    if training_args.gradient_accumulation_steps < 1:
        raise ValueError(
            f"`gradient_accumulation_steps` must be at least 1, got {training_args.gradient_accumulation_steps}."
        )
    run_options = options_of_run(model_args, data_args, training_args)
    checkpoint = _resume_from(training_args.resume_from_checkpoint, training_args.output_dir)
    if checkpoint is not None:
        _check_options(checkpoint, run_options)
    with training_args.main_process_first(desc="loading the data set"):
        dataset = _load_data(data_args, training_args)
    trainer, dataset = _prepare(dataset, model_args, data_args, training_args)
    trainer.add_callback(_KeepOptions(run_options))
    train_metrics = _train_and_save(trainer, model_args, checkpoint, argv)
    if trainer.is_world_process_zero():
        write_train_options(run_options, training_args.output_dir)
    picture = Path(training_args.output_dir) / "training_curves.png"
    drawn = trainer.is_world_process_zero() and plot_training_curves(trainer.state.log_history, picture)
    metrics = _evaluate(trainer, dataset, data_args)
    card = _card(model_args, data_args)
    trainer.create_model_card(**card)
    if training_args.push_to_hub:
        _push(trainer, card)
    if trainer.is_world_process_zero():
        print(_summary(metrics, train_metrics["train_runtime"], training_args.output_dir, picture if drawn else None))
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            print(
                "hf-aace: the loss on the test images is not finite: the training diverged. Try a smaller "
                "`learning_rate` or `rho`.",
                file=sys.stderr,
            )
        if training_args.push_to_hub:
            print(f"Pushed:  {trainer.hub_model_id}")
    return 0


def _prepare(
    dataset: DatasetDict | IterableDatasetDict,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: AACEConfig,
) -> tuple[AugmentedAACETrainer, DatasetDict | IterableDatasetDict]:
    """The trainer, and the data as its model takes them."""
    # The transform makes the columns that the model takes only when a batch is read.
    training_args.remove_unused_columns = False
    compute_metrics = compute_metrics_fn([name for name in data_args.metrics if name != "confusion_matrix"])
    set_seed(training_args.seed)
    id2label = dict(enumerate(dataset["train"].features["label"].names))
    model, processor = _load_model(model_args, training_args, id2label)
    augmentation = _augmentation(data_args, processor, len(id2label))
    weights = None
    if data_args.class_weights == "balanced":
        weights = balanced_class_weights(dataset["train"]["label"][:], len(id2label))
    compute_loss_func = None  # the model's own
    if weights is not None or (augmentation is not None and augmentation.soft_labels):
        compute_loss_func = WeightedCrossEntropy(weights, training_args.label_smoothing_factor)
    if data_args.streaming:
        dataset = transform_stream(dataset, processor, data_args.skip_corrupt_images)
    else:
        # Left encoded, an image that cannot be decoded is named by the transform.
        dataset = dataset.cast_column("image", Image(decode=False)).with_transform(image_transform(processor))
    try:
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
    except (HTTPError, LocalTokenNotFoundError) as error:
        raise OSError(
            f"The repository to push to could not be made on the Hub: {_first_line(error)}. "
            "Log in with `hf auth login`, or set `hub_token`."
        ) from error
    if model_args.lora and trainer.is_fsdp_enabled:
        raise ValueError("`lora` does not go with FSDP, whose shards it could not merge. Use `ddp`.")
    return trainer, dataset


class _KeepOptions(TrainerCallback):
    """Puts the options of the run into its checkpoints; beside the model in the folder they come with the model."""

    def __init__(self, options: dict[str, Any]):
        self._options = options

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        # Trainer may take it for older than those of an earlier run in the folder, and have deleted it (`save_total_limit`).
        if state.is_world_process_zero and checkpoint.is_dir():
            write_train_options(self._options, checkpoint)


def _train_and_save(
    trainer: AACETrainer, model_args: ModelArguments, checkpoint: str | None, argv: list[str]
) -> dict[str, float]:
    """Trains, and leaves the model; returns what Trainer measured."""
    started, processor_started = time.time(), time.process_time()
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as interrupt:
        how = _how_to_resume(trainer.args.output_dir, started, argv)
        raise KeyboardInterrupt(f"\nInterrupted. {how}") from interrupt
    except Exception as error:
        _raise_if_save_failed(error, trainer, started, argv)
        if isinstance(error, KeyError) and "metric_for_best_model" in str(error):
            raise ValueError(error.args[0]) from error
        if isinstance(error, TypeError) and "_schedule" in str(error):
            raise ValueError(
                f"The learning-rate schedule cannot be made of `lr_scheduler_type={trainer.args.lr_scheduler_type}` and "
                f"`lr_scheduler_kwargs={trainer.args.lr_scheduler_kwargs}`: {error}."
            ) from error
        raise
    # It depends less than the time on the clock on what else the machine is doing.
    result.metrics["train_processor_seconds"] = time.process_time() - processor_started
    if model_args.lora:
        _merge_adapters(trainer)
    elif model_args.freeze_backbone:
        trainer.model.float()  # what loads it gives all weights one dtype, and 16 bits would round the head
    try:
        trainer.save_model(_internal_call=True)  # pushed below, with its results
    except Exception as error:
        resume = _how_to_resume(trainer.args.output_dir, started, argv)
        raise OSError(
            f"The trained model could not be saved: {_first_line(error)}. {resume}".replace("\n", " ")
        ) from error
    trainer.save_state()
    if trainer.is_world_process_zero():  # those of an earlier run here, which ours would be added to
        names = (
            "all_results.json",
            "validation_results.json",
            "eval_results.json",
            "training_curves.png",
            "README.md",
        )
        for name in names:
            Path(trainer.args.output_dir, name).unlink(missing_ok=True)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    return result.metrics


def _evaluate(
    trainer: AACETrainer, dataset: DatasetDict | IterableDatasetDict, options: DataArguments
) -> dict[str, Any]:
    """Leaves, and returns, the metrics on the test images."""
    if "validation" in dataset:
        metrics = trainer.evaluate(metric_key_prefix="validation")
        trainer.save_metrics("validation", metrics)
    prediction = trainer.predict(dataset["test"], metric_key_prefix="eval")
    metrics = dict(prediction.metrics)
    trainer.log({name: value for name, value in metrics.items() if isinstance(value, float)})  # for the model card
    trainer.log_metrics("eval", metrics)
    if "confusion_matrix" in options.metrics and prediction.predictions is not None:  # not with `prediction_loss_only`
        metrics |= _confusion_matrix(prediction, trainer.model.config.num_labels)
    trainer.save_metrics("eval", metrics)
    return metrics


def _push(trainer: AACETrainer, card: dict[str, Any]) -> None:
    """Pushes what is in the output directory, model card included."""
    try:
        trainer.push_to_hub(**card)
    except (HTTPError, OSError, RuntimeError) as error:
        folder = trainer.args.output_dir
        command = shlex.join(["hf", "upload", str(trainer.hub_model_id), folder, ".", "--exclude", "checkpoint-*"])
        raise OSError(
            f"The model is trained and whole in {folder}, but pushing it failed: {_first_line(error)}. "
            f"To push it: {command}"
        ) from error


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
    if options.dataset_name == "digits":
        raise ValueError("The digits are in memory anyway: leave out `streaming`, or name another data set.")
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


def _load_model(
    options: ModelArguments, training_args: AACEConfig, id2label: dict[int, str]
) -> tuple[nn.Module, BaseImageProcessor]:
    """The model with what is to be trained of it, and its image processor."""
    if options.lora and options.freeze_backbone:
        raise ValueError("`lora` freezes the backbone itself: leave out `freeze_backbone`.")
    if options.dtype != "float32" and not (training_args.bf16 or training_args.fp16):
        raise ValueError(
            f"`dtype={options.dtype}` needs mixed precision, as the images are of 32 bits: set `bf16` or `fp16` too."
        )
    model, processor = load_model_and_processor(
        options.model_name_or_path,
        id2label,
        revision=options.model_revision,
        dtype=getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    if options.freeze_backbone:
        freeze_backbone(model)
    if options.lora:
        model = add_lora(
            model, rank=options.lora_rank, alpha=options.lora_alpha, target_modules=options.lora_target_modules
        )
        # What is pushed on the way would be adapters beside which the merged model could not be loaded.
        training_args.hub_strategy = HubStrategy.END
    return model, processor


def _merge_adapters(trainer: AACETrainer) -> None:
    """Saves the adapters by themselves and goes on with the whole model."""
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(Path(trainer.args.output_dir) / "adapter")
    trainer.model = trainer.model_wrapped = merge_lora(trainer.model)


def _card(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """What Trainer cannot know for the model card. Of local folders only the names."""
    names = ("train_size", "label_noise", "class_weights", "augmentation", "mixup", "cutmix")
    changes = [f"{name}={value}" for name in names if (value := getattr(data_args, name)) not in (None, 0, "none")]
    how = f" with {', '.join(changes)}" if changes else ""
    tags = ["image-classification", "vision"] + ["lora"] * model_args.lora
    # Trainer would name the split that the test images were set apart of.
    tested_on = [{"config": "default", "split": "test"}]
    card = {
        "tasks": "image-classification",
        "dataset_metadata": tested_on,
        "dataset": last_part(data_args.dataset_name) + how,
        "tags": tags,
    }
    if data_args.dataset_name != "digits" and not Path(data_args.dataset_name).exists():
        card |= {"dataset": data_args.dataset_name + how, "dataset_tags": data_args.dataset_name}
    return card


def _raise_if_save_failed(error: Exception, trainer: AACETrainer, started: float, argv: list[str]) -> None:
    """
    If a checkpoint was being written when training failed (a full disk, say), sets what there is of it aside, where no run
    resumes from it, and says from where one can.
    """
    output_dir = trainer.args.output_dir
    broken = [path for path in checkpoints_in(output_dir) if not _is_whole(path) and _time(path) >= started]
    if not broken or not trainer.is_world_process_zero():
        return
    aside = broken[0].with_name(f"_incomplete-{broken[0].name}")  # Trainer pushes nothing that begins with `_`
    shutil.rmtree(aside, ignore_errors=True)
    broken[0].rename(aside)
    raise OSError(
        f"Saving {broken[0]} failed, with {shutil.disk_usage(output_dir).free / 1e6:.0f} MB free on its disk, and what there "
        f"is of it was renamed to {aside.name}: {_first_line(error)}. "
        f"{_how_to_resume(output_dir, started, argv)}".replace("\n", " ")
    ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _confusion_matrix(prediction: PredictionOutput, num_classes: int) -> dict[str, list[list[int]]]:
    counts = load_metric("confusion_matrix").compute(
        predictions=predicted_classes(prediction.predictions), references=prediction.label_ids, num_classes=num_classes
    )
    return {"eval_confusion_matrix": counts["confusion_matrix"]}


def _resume_from(value: str | None, output_dir: str) -> str | None:
    """Reads the option `resume_from_checkpoint`: a path, or a truth value, for the newest checkpoint that is whole."""
    if value is None or value.lower() in ("false", ""):
        return None
    whole = [path for path in checkpoints_in(output_dir) if _is_whole(path)]
    if value.lower() == "true":
        if not whole:
            raise ValueError(f"`resume_from_checkpoint`: No valid checkpoint found in {output_dir}. Leave it out.")
        return str(whole[-1])
    # A finished run has a state too, but no optimizer: it would begin anew.
    if not _is_whole(Path(value)) or Path(value, "all_results.json").is_file():
        whole = whole or [path for path in checkpoints_in(value) if _is_whole(path)]
        hint = f" The newest that is whole is {whole[-1]}." if whole else ""
        raise ValueError(f"`resume_from_checkpoint` is {value!r}, which is no checkpoint, or not a whole one.{hint}")
    return value


def _check_options(checkpoint: str, options: dict[str, Any]) -> None:
    """Refuses to go on with other images, and says what else is not as it was."""
    earlier = train_options(Path(checkpoint))
    changed = [name for name, value in options.items() if name in earlier and earlier[name] != value]
    told = ", ".join(f"`{name}={earlier[name]}`, now {options[name]}" for name in changed)
    if {"dataset_name", "train_size", "label_noise", "validation_size", "seed"} & set(changed):
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} had {told}. It would go on with other images: give what it had, or leave "
            "`resume_from_checkpoint` out."
        )
    if changed:
        logger.warning(f"Not as it was for {checkpoint}, from which this run goes on: {told}.")


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has its state, which it is given last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _how_to_resume(output_dir: str, started: float, argv: list[str]) -> str:
    # Older ones are of another run.
    checkpoints = [
        path
        for path in checkpoints_in(output_dir)
        if _is_whole(path) and _time(path / "trainer_state.json") >= started
    ]
    if not checkpoints:
        return "There is no checkpoint of this run to resume from."
    resume = ["--resume_from_checkpoint", str(checkpoints[-1])]
    if "LOCAL_RANK" in os.environ and _LAUNCHED not in os.environ:  # the launcher's part of the command is not known
        return f"To go on from the last checkpoint, add to the command:\n{shlex.join(resume)}"
    return f"To go on from the last checkpoint:\n{shlex.join(['hf-aace', 'train', *argv, *resume])}"


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
