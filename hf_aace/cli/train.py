# SPDX-License-Identifier: Apache-2.0
"""`hf-aace train`: train an image classifier, and leave model, results, curves and model card."""

import math
import shlex
import sys
import time
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from datasets import DatasetDict, IterableDatasetDict
from huggingface_hub.errors import HTTPError
from sklearn.metrics import confusion_matrix

from ..analysis.plots import plot_training_curves
from ..config import AACEArguments, AACEConfig
from ..trainer import AACETrainer
from ..vision.messages import first_line
from ..vision.metrics import predicted_classes
from .checkpoints import (
    Attempt,
    KeepOptions,
    check_options,
    checkpoint_to_resume,
    if_interrupted,
    is_finished,
    warn_of_replacing,
)
from .checks import check_training
from .launch import LaunchArguments, is_one_of_several, launch
from .loading import load_data, make_trainer
from .options import DataArguments, ModelArguments, last_part, options_of_run, training_defaults, write_train_options
from .parser import OptionParser, command_parser
from .summary import Summary, describe_run


# The options of TrainingArguments that people use, for the first screens of `--help`.
_COMMON = """
output_dir seed num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps weight_decay optim bf16
per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps dataloader_num_workers eval_strategy
save_strategy load_best_model_at_end resume_from_checkpoint report_to push_to_hub
"""


def train_parser(argv: list[str]) -> OptionParser:
    """
    Make the parser of `hf-aace train`, with the defaults that depend on the options given.

    Args:
        argv (`list[str]`): The arguments of the command line.
    """
    return command_parser(
        "train",
        "Trains an image classifier with AACETrainer and leaves model, results and curves in output_dir.",
        (ModelArguments, DataArguments, LaunchArguments, AACEConfig),
        argv,
        training_defaults,
        sections={
            "model": _names(ModelArguments),
            "images": _names(DataArguments),
            "sharpness-aware training": _names(AACEArguments),
            "several processes": _names(LaunchArguments),
            "training (options of transformers.TrainingArguments)": _COMMON.split(),
        },
    )


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    parser = train_parser(argv)
    options = parser.parse_args(argv)
    if options.accelerate_config is not None and not is_one_of_several():
        return launch(options, argv)
    if options.num_processes is not None and options.accelerate_config is None:
        raise ValueError(
            "`num_processes` needs `accelerate_config`, for example `ddp`, which starts them. Or use `torchrun`."
        )
    if options.ddp_backend is not None and not is_one_of_several():
        raise ValueError("`ddp_backend` is for several processes: leave it out, or give `accelerate_config` too.")
    model_args, data_args, _, training_args = parser.read(argv)
    check_training(model_args, data_args, training_args)
    run_options = options_of_run(model_args, data_args, training_args)
    output_dir = training_args.output_dir
    checkpoint = checkpoint_to_resume(training_args.resume_from_checkpoint, output_dir, run_options)
    if checkpoint is not None:
        check_options(checkpoint, run_options)
        if is_finished(output_dir, checkpoint, run_options):
            if training_args.process_index == 0:
                print(f"No step is left to train. The finished run in {output_dir} stays as it is.")
            return 0
    elif training_args.process_index == 0:
        warn_of_replacing(output_dir, run_options)
    with if_interrupted("Training had not begun, and nothing was saved."):
        with training_args.main_process_first(desc="loading the dataset"):
            dataset = load_data(data_args, training_args)
        trainer, dataset = make_trainer(dataset, model_args, data_args, training_args)
        facts = {}
        if trainer.is_world_process_zero():
            facts = describe_run(trainer, dataset, last_part(model_args.model_name_or_path))
    trainer.add_callback(KeepOptions(run_options))
    trainer.add_callback(Summary(facts))
    train_metrics = _train_and_save(trainer, model_args, checkpoint, argv)
    if trainer.is_world_process_zero():
        write_train_options(run_options, output_dir)
    picture = Path(output_dir) / "training_curves.png"
    drawn = trainer.is_world_process_zero() and plot_training_curves(trainer.state.log_history, picture)
    evaluate = shlex.join(["hf-aace", "evaluate", "--model_name_or_path", output_dir])
    with if_interrupted(f"The trained model is saved. To measure it on the test images:\n{evaluate}"):
        metrics = _evaluate(trainer, dataset, data_args)
    card = {**_card(model_args, data_args), "facts": facts}
    trainer.create_model_card(**card)
    if training_args.push_to_hub:
        _push(trainer, card)
    if trainer.is_world_process_zero():
        print(_results(metrics, train_metrics["train_runtime"], output_dir, picture if drawn else None))
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            print(
                "hf-aace: the loss on the test images is not finite: the training diverged. Try a smaller "
                "`learning_rate` or `rho`.",
                file=sys.stderr,
            )
        if training_args.push_to_hub:
            print(f"Pushed:  {trainer.hub_model_id}")
    # Or threads of torch's may still run when Python ends, which then ends with an error now and then.
    trainer.accelerator.end_training()
    return 0


def _train_and_save(
    trainer: AACETrainer, model_args: ModelArguments, checkpoint: str | None, argv: list[str]
) -> dict[str, float]:
    """Train, and save the model; return the metrics of Trainer."""
    attempt, processor_started = Attempt(trainer.args.output_dir, argv, checkpoint), time.process_time()
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"\nInterrupted. {attempt.how_to_resume()}") from interrupt
    except Exception as error:
        if trainer.is_world_process_zero():
            attempt.raise_if_save_failed(error)
        if isinstance(error, TypeError) and "_schedule" in str(error):
            raise ValueError(
                f"The learning-rate schedule cannot be made of `lr_scheduler_type={trainer.args.lr_scheduler_type}` and "
                f"`lr_scheduler_kwargs={trainer.args.lr_scheduler_kwargs}`: {error}."
            ) from error
        if model_args.lora and isinstance(error, AttributeError):
            raise ValueError(
                f"`lora_target_modules` is {model_args.lora_target_modules}, which {model_args.model_name_or_path} cannot be trained "
                f"with, as its code looks into these layers ({first_line(error)}). Name other layers; if there are none, give "
                "`--freeze_backbone true` instead of `lora`, or train all."
            ) from error
        if "pickle" in str(error) and trainer.args.dataloader_num_workers > 0:
            raise ValueError(
                "`dataloader_num_workers` needs processes that are forked here, as the images cannot be sent to others: give "
                f"`--dataloader_multiprocessing_context fork`, or leave it out ({first_line(error)})."
            ) from error
        raise
    # It depends less than the time on the clock on what else the machine is doing.
    result.metrics["train_processor_seconds"] = time.process_time() - processor_started
    if model_args.lora:
        if trainer.is_world_process_zero():
            trainer.model.save_pretrained(Path(trainer.args.output_dir) / "adapter")
        # In 32 bits, as 16 would round the adapters away. What is saved then loads without peft.
        trainer.model = trainer.model_wrapped = trainer.model.float().merge_and_unload()
    elif model_args.freeze_backbone:
        trainer.model.float()  # from_pretrained gives all weights one dtype, and 16 bits would round the head
    try:
        trainer.save_model(_internal_call=True)  # pushed later, with its results
    except Exception as error:
        raise OSError(
            f"The trained model could not be saved: {first_line(error)}. {attempt.how_to_resume()}".replace("\n", " ")
        ) from error
    trainer.save_state()
    if trainer.is_world_process_zero():  # Trainer would add our results to those of an earlier run in the folder
        results = ("all_results.json", "validation_results.json", "eval_results.json")
        for name in (*results, "training_curves.png", "README.md"):
            Path(trainer.args.output_dir, name).unlink(missing_ok=True)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    return result.metrics


def _evaluate(
    trainer: AACETrainer, dataset: DatasetDict | IterableDatasetDict, options: DataArguments
) -> dict[str, Any]:
    """Save and return the metrics on the test images."""
    if "validation" in dataset:
        metrics = trainer.evaluate(metric_key_prefix="validation")
        trainer.save_metrics("validation", metrics)
    prediction = trainer.predict(dataset["test"], metric_key_prefix="eval")
    metrics = dict(prediction.metrics)
    trainer.log({name: value for name, value in metrics.items() if isinstance(value, float)})  # for the model card
    trainer.log_metrics("eval", metrics)
    if "confusion_matrix" in options.metrics and prediction.predictions is not None:  # not with `prediction_loss_only`
        predicted, classes = predicted_classes(prediction.predictions), range(trainer.model.config.num_labels)
        metrics["eval_confusion_matrix"] = confusion_matrix(prediction.label_ids, predicted, labels=classes).tolist()
    trainer.save_metrics("eval", metrics)
    return metrics


def _push(trainer: AACETrainer, card: dict[str, Any]) -> None:
    """Push the output directory, model card included."""
    try:
        trainer.push_to_hub(**card)
    except (HTTPError, OSError, RuntimeError) as error:
        folder = trainer.args.output_dir
        command = shlex.join(["hf", "upload", str(trainer.hub_model_id), folder, ".", "--exclude", "checkpoint-*"])
        raise OSError(
            f"The model is trained and whole in {folder}, but pushing it failed: {first_line(error)}. "
            f"To push it: {command}"
        ) from error


def _card(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """Return what Trainer cannot know for the model card. Of local folders only the names, as it may be published."""
    names = ("train_size", "label_noise", "class_weights", "augmentation", "mixup", "cutmix")
    changes = [f"{name}={value}" for name in names if (value := getattr(data_args, name)) not in (None, 0, "none")]
    how = f" with {', '.join(changes)}" if changes else ""
    card = {
        "tasks": "image-classification",
        "dataset_metadata": [{"config": "default", "split": "test"}],  # Trainer would name the split of origin
        "dataset": last_part(data_args.dataset_name) + how,
        "tags": ["image-classification", "vision"] + ["lora"] * model_args.lora,
    }
    if data_args.dataset_name != "digits" and not Path(data_args.dataset_name).exists():
        card |= {"dataset": data_args.dataset_name + how, "dataset_tags": data_args.dataset_name}
    return card


def _results(metrics: dict[str, Any], seconds: float, output_dir: str, picture: Path | None) -> str:
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    scores = {name.removeprefix("eval_"): value for name, value in metrics.items() if isinstance(value, float)}
    told = {name: f"{name} {value:.4f}" for name, value in scores.items() if name not in timings}
    if len(told) > 1:
        told.pop("loss", None)
    return "\n".join(
        (
            f"Test:    {', '.join(told.values())}",
            f"Time:    {timedelta(seconds=round(seconds))} for training",
            f"Model:   {output_dir}",
            f"Picture: {picture or 'none, since nothing was logged'}",
        )
    )
