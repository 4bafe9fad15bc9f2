# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: what was trained on what, with which settings, what it reached, what it cost, how to load it."""

import dataclasses
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer
from transformers.modelcard import TrainingSummary, make_markdown_table, parse_log_history

from .config import AACEArguments, method_title


_TAGS = ("hf_aace", "sharpness-aware-minimization")
_PACKAGES = ("hf-aace", "transformers", "torch", "datasets", "accelerate")


def write_model_card(
    trainer: Trainer,
    settings: AACEArguments,
    first_step: int = 0,
    tags: str | list[str] | None = None,
    facts: dict[str, str] | None = None,
    **metadata: Any,
) -> None:
    """
    Write the model card, `README.md` in the output directory of a trainer.

    Args:
        first_step (`int`, *optional*, defaults to 0): The step that the last training began at; above 0 it was resumed.
        tags (`str` or `list[str]`, *optional*): Tags besides those of the trainer and those of a card that is there.
        facts (`dict[str, str]`, *optional*): Facts about the run by title, for the section on the training.
        **metadata: Passed on to [`~transformers.modelcard.TrainingSummary.from_trainer`].
    """
    path = Path(trainer.args.output_dir, "README.md")
    present = ModelCard.load(path).data if path.is_file() else ModelCardData()
    own = _TAGS if settings.rho > 0 else ()
    kept = (present.tags or []) if own or tags is not None else []  # Trainer drops them unless it is given others
    tags = [*([tags] if isinstance(tags, str) else tags or []), *own, *kept]
    summary = TrainingSummary.from_trainer(trainer, tags=list(dict.fromkeys(tags)), **metadata)
    history, best_step = trainer.state.log_history, trainer.state.best_global_step
    if best := bool(trainer.args.load_best_model_at_end and best_step and "train_runtime" in history[-1]):
        # The weights are those of the best evaluation, after which others may have come.
        up_to_best = [entry for entry in history if entry["step"] <= best_step and "train_runtime" not in entry]
        *_, summary.eval_results = parse_log_history([*up_to_best, history[-1]])
    text = _text(trainer, summary, settings, first_step, best, facts or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"---\n{yaml.dump(summary.create_metadata(), sort_keys=False)}---\n\n{text}", encoding="utf-8")
    if present.library_name == "peft":  # peft wrote it when it saved the adapters, and completes it
        trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(trainer.args.output_dir)


def _text(
    trainer: Trainer,
    summary: TrainingSummary,
    settings: AACEArguments,
    first_step: int,
    best: bool,
    facts: dict[str, str],
) -> str:
    """Fill in `model_card_template.md`. With `best` the results are those of the best evaluation, not of the last one."""
    names = [option.name for option in dataclasses.fields(AACEArguments)]
    finished = [entry for entry in trainer.state.log_history if "train_runtime" in entry][-1:]
    time = timedelta(seconds=round(finished[0]["train_runtime"])) if finished else None
    # Entries that were read from a checkpoint have their keys in another order than those made since.
    lines = summary.eval_lines or []
    columns = list(dict.fromkeys(key for line in lines for key in line))
    lines = [{key: line.get(key, "") for key in columns} for line in lines]
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["number"] = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    template = environment.from_string(Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8"))
    return template.render(
        name=summary.model_name,
        base=summary.finetuned_from,  # none from scratch, or of a local folder, whose path is nobody's business
        datasets=[name for name in _as_list(summary.dataset) if name],
        settings=settings,
        facts=facts,
        method=method_title(settings),
        fields={name: getattr(settings, name) for name in names if name != "method"},
        task=next(iter(_as_list(summary.tasks)), None),
        model_id=trainer.hub_model_id or summary.model_name,
        results=summary.eval_results,
        best=best,
        time=time,
        speed=finished[0].get("train_samples_per_second") if finished else None,
        hardware=describe_hardware(trainer.args.device, trainer.args.world_size),
        hyperparameters=summary.hyperparameters,
        first_step=first_step,
        evaluations=make_markdown_table(lines).rstrip() if lines else None,
        versions={package: version(package) for package in _PACKAGES},
    )


def describe_hardware(device: torch.device, processes: int) -> str:
    """Name the hardware of a run with so many processes on such devices."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    threads = torch.get_num_threads()
    if processes > 1 or device.type != "cpu":
        return f"{processes} x {name}"
    return f"a CPU with {threads} thread{'s' * (threads > 1)}"


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []
