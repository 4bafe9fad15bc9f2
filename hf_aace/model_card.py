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
from transformers.modelcard import TrainingSummary, make_markdown_table

from .config import AACEArguments, method_title


_TAGS = ("hf_aace", "sharpness-aware-minimization")
_PACKAGES = ("hf-aace", "transformers", "torch", "datasets", "accelerate")


def write_model_card(
    trainer: Trainer, settings: AACEArguments, tags: str | list[str] | None = None, **metadata: Any
) -> None:
    """
    Write the model card, `README.md` in the output directory of a trainer.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        settings ([`AACEArguments`]): Its settings of sharpness-aware training.
        tags (`str` or `list[str]`, *optional*): Tags besides those of the trainer and those of a card that is there.
        **metadata: What else [`~transformers.Trainer.create_model_card`] takes.
    """
    path = Path(trainer.args.output_dir, "README.md")
    present = ModelCard.load(path).data if path.is_file() else ModelCardData()
    own = _TAGS if settings.rho > 0 else ()
    kept = (present.tags or []) if own or tags is not None else []  # Trainer drops them unless it is given others
    tags = [*([tags] if isinstance(tags, str) else tags or []), *own, *kept]
    summary = TrainingSummary.from_trainer(trainer, tags=list(dict.fromkeys(tags)), **metadata)
    text = model_card_text(
        summary,
        settings,
        model_id=trainer.hub_model_id or summary.model_name,
        log_history=trainer.state.log_history,
        hardware=describe_hardware(trainer.args.device, trainer.args.world_size),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"---\n{yaml.dump(summary.create_metadata(), sort_keys=False)}---\n\n{text}", encoding="utf-8")
    if present.library_name == "peft":  # peft wrote it when it saved the adapters, and completes it
        trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(trainer.args.output_dir)


def model_card_text(
    summary: TrainingSummary,
    settings: AACEArguments,
    *,
    model_id: str,
    log_history: list[dict[str, Any]],
    hardware: str,
) -> str:
    """
    Fill in the template of the model card, `model_card_template.md`.

    Args:
        summary ([`~transformers.modelcard.TrainingSummary`]): What Transformers knows about the run.
        settings ([`AACEArguments`]): The settings of sharpness-aware training.
        model_id (`str`): The name to load the model by.
        log_history (`list[dict]`): `trainer.state.log_history`.
        hardware (`str`): The hardware that it was trained on, in words.

    Returns:
        `str`: The text below the metadata, in Markdown.
    """
    names = [option.name for option in dataclasses.fields(AACEArguments)]
    finished = [entry for entry in log_history if "train_runtime" in entry][-1:]
    time = timedelta(seconds=round(finished[0]["train_runtime"])) if finished else None
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["number"] = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    template = environment.from_string(Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8"))
    return template.render(
        name=summary.model_name,
        base=summary.finetuned_from,  # none from scratch, or of a local folder, whose path is nobody's business
        datasets=[name for name in _as_list(summary.dataset) if name],
        settings=settings,
        method=method_title(settings),
        fields={name: getattr(settings, name) for name in names if name != "method"},
        task=next(iter(_as_list(summary.tasks)), None),
        model_id=model_id,
        results=summary.eval_results,
        time=time,
        speed=finished[0].get("train_samples_per_second") if finished else None,
        hardware=hardware,
        hyperparameters=summary.hyperparameters,
        evaluations=None if summary.eval_lines is None else make_markdown_table(summary.eval_lines).rstrip(),
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
