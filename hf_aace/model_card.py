# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: what was trained on what, with which settings, what it reached, what it cost, how to load it."""

import dataclasses
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
from transformers.modelcard import TrainingSummary, make_markdown_table

from .config import AACEArguments


_AACE = """@inproceedings{ratchatorn2024aace,
    title     = {Adaptive Adversarial Cross-Entropy Loss for Sharpness-Aware Minimization},
    author    = {Ratchatorn, Tanapat and Tanaka, Masayuki},
    booktitle = {IEEE International Conference on Image Processing (ICIP)},
    year      = {2024}
}"""
_SAM = """@inproceedings{foret2021sam,
    title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
    author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
    booktitle = {International Conference on Learning Representations (ICLR)},
    year      = {2021}
}"""
_ASAM = """@inproceedings{kwon2021asam,
    title     = {ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks},
    author    = {Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon},
    booktitle = {International Conference on Machine Learning (ICML)},
    year      = {2021}
}"""


def model_card_text(
    summary: TrainingSummary,
    settings: AACEArguments,
    *,
    model_id: str,
    log_history: list[dict[str, Any]],
    hardware: str,
) -> str:
    """
    The text of a model card, below its metadata.

    Args:
        summary ([`~transformers.modelcard.TrainingSummary`]):
            What Transformers knows about the run.
        settings ([`AACEArguments`]):
            The settings of sharpness-aware training.
        model_id (`str`):
            What to load the model by.
        log_history (`list[dict]`):
            `trainer.state.log_history`.
        hardware (`str`):
            What it was trained on.

    Returns:
        `str`: The text, in Markdown.
    """
    paragraphs = [
        f"# {summary.model_name}",
        _origin(summary) + " " + _method(settings),
        "## Use",
        _usage(_first(summary.tasks), model_id),
        "## Results",
        _results(summary),
        "## Training",
        _settings_table(settings),
        _cost(log_history, hardware),
        "### Hyperparameters",
        "\n".join(f"- {name}: {value}" for name, value in summary.hyperparameters.items()),
    ]
    if summary.eval_lines is not None:
        paragraphs += ["### Evaluations during training", make_markdown_table(summary.eval_lines).rstrip()]
    packages = ("hf-aace", "transformers", "torch", "datasets", "accelerate")
    paragraphs += [
        "### Versions",
        "\n".join(f"- {package} {version(package)}" for package in packages),
        "## Citation",
        f"```bibtex\n{_citations(settings)}\n```",
    ]
    return "\n\n".join(paragraphs) + "\n"


def describe_hardware(device: torch.device, processes: int) -> str:
    """What a run with so many processes on such devices is trained on, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return (
        f"{processes} x {name}"
        if processes > 1 or device.type != "cpu"
        else f"a CPU with {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    )


def _origin(summary: TrainingSummary) -> str:
    names = [name for name in _as_list(summary.dataset) if name]
    data = f"the data set {' and '.join(names)}" if names else "images of its author"
    base = summary.finetuned_from
    # None from scratch, or of a local folder, whose path is nobody's business: Transformers tells them not apart.
    if not base:
        return f"This model was trained on {data}."
    return f"This model was fine-tuned from [{base}](https://huggingface.co/{base}) on {data}."


def _method(settings: AACEArguments) -> str:
    trainer = "It was trained by the `AACETrainer` of hf_aace,"
    if settings.rho == 0:
        return f"{trainer} with `rho=0`, which is the plain `Trainer` of Transformers."
    if settings.perturbation_loss == "aace":
        loss = "the Adaptive Adversarial Cross-Entropy loss ([paper](https://huggingface.co/papers/2406.14329))"
    else:
        loss = "cross-entropy, as in SAM ([paper](https://huggingface.co/papers/2010.01412))"
    return f"{trainer} with sharpness-aware training whose perturbation follows {loss}."


def _usage(task: str | None, model_id: str) -> str:
    if task is None:
        return f'```python\nfrom transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{model_id}")\n```'
    example = "image.jpg" if task.startswith("image-") else "..."
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'classifier = pipeline("{task}", model="{model_id}")\nclassifier("{example}")\n```'
    )


def _results(summary: TrainingSummary) -> str:
    if not summary.eval_results:
        return "It has not been evaluated."
    rows = [f"| {name} | {_number(value)} |" for name, value in summary.eval_results.items()]
    return "\n".join(["Last evaluation, on the evaluation set:", "", "| | |", "|---|---|", *rows])


def _settings_table(settings: AACEArguments) -> str:
    rows = [
        f"| `{option.name}` | `{getattr(settings, option.name)}` |" for option in dataclasses.fields(AACEArguments)
    ]
    return "\n".join(["Settings of sharpness-aware training:", "", "| | |", "|---|---|", *rows])


def _cost(log_history: list[dict[str, Any]], hardware: str) -> str:
    finished = [entry for entry in log_history if "train_runtime" in entry]
    if not finished:
        return f"Trained on {hardware}."
    time = timedelta(seconds=round(finished[-1]["train_runtime"]))
    speed = finished[-1].get("train_samples_per_second")
    return f"Training took {time} on {hardware}" + (f" ({_number(speed)} samples a second)." if speed else ".")


def _citations(settings: AACEArguments) -> str:
    citations = [_AACE if settings.perturbation_loss == "aace" else _SAM]
    return "\n\n".join(citations + [_ASAM] * settings.adaptive_perturbation)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _first(value: str | list[str] | None) -> str | None:
    return next(iter(_as_list(value)), None)
