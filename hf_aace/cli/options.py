# SPDX-License-Identifier: Apache-2.0
"""The options that several commands share: which model, which images; the defaults of a training; what a run records."""

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import AACEArguments, AACEConfig
from ..vision.models import BUILTIN_MODELS
from .parser import option


TRAIN_OPTIONS_NAME = "train_options.json"
# What changes the result of a training most.
_OF_TRAINING = [
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "label_smoothing_factor",
]


@dataclass
class PretrainedArguments:
    """The model to load."""

    model_name_or_path: str | None = option(None, "The model: a local folder, or a model id on the Hub. Needed.")
    model_revision: str = option("main", "Branch, tag or commit of a model on the Hub, to pin what is loaded.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model. Only for a model whose code you have read."
    )
    allow_pickle: bool = option(False, "Load weights from `pytorch_model.bin` too, not only from safetensors.")

    def source(self) -> dict[str, Any]:
        """Return how to load the model, as the functions of [`~hf_aace.vision.models`] take it."""
        return {
            "revision": self.model_revision,
            "trust_remote_code": self.trust_remote_code,
            "allow_pickle": self.allow_pickle,
        }


@dataclass
class ModelArguments(PretrainedArguments):
    """The model to train, and which part of it."""

    model_name_or_path: str = option(
        "convnext-tiny-digits",
        "The model: `convnext-tiny-digits`, `vit-tiny-digits` or `resnet-tiny-digits` (small, from scratch, for 8x8 "
        "images), a local folder, or a model id on the Hub. The built-in three have other defaults of learning rate, batch "
        "size, epochs and the like, which are those shown here, than models to fine-tune.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "Dtype of the loaded weights. 16 bits save memory with `lora` or `freeze_backbone`, which train in 32 bits, and "
        "need `bf16` or `fp16`. Other training in 16-bit weights is refused unless `rho` is 0, since their rounding "
        "removes the perturbation. To train faster, set `bf16` alone.",
    )
    freeze_backbone: bool = option(
        False, "Train the classification head only. BatchNorm statistics still follow the images."
    )
    lora: bool = option(
        False,
        "Train low-rank adapters, the head and BatchNorm layers, whose statistics change in any case (pip install "
        "'hf-aace[peft]'). They are merged into the saved model, which loads like any other, and also saved by themselves "
        "in `adapter/`.",
    )
    lora_rank: int = option(16, "With `lora`: rank of the adapters.")
    lora_alpha: float = option(16.0, "With `lora`: the adapters are scaled by `lora_alpha / lora_rank`.")
    lora_target_modules: list[str] = option(  # noqa: RUF009
        ["all-linear"],
        "With `lora`: the layers to adapt, by the ends of their names, such as `q_proj v_proj`. `all-linear` "
        "is every linear layer but the head. A network of convolutions (ResNet) has none: name some.",
    )


@dataclass
class ImagesArguments:
    """The labeled images."""

    dataset_name: str = option(
        "digits",
        "The images: `digits` (8x8 scans, bundled with scikit-learn), a folder with one sub-folder of "
        "images for each class (perhaps below `train` and `test`), a folder written by `save_to_disk`, a file or folder "
        "in parquet or of WebDataset shards (.tar), or the id of a dataset on the Hub.",
    )
    image_column_name: str | None = option(
        None, "The column of the images. By default `image`, else the first that holds images."
    )
    label_column_name: str | None = option(
        None,
        "The column of the labels: classes, strings or integers (a field of a JSON column as `json.label`). By "
        "default one that is typed as classes, or is called `label` or the like.",
    )
    skip_corrupt_images: bool = option(
        False,
        "Decode all images before training, and name, count and leave out those that cannot be decoded. Without it they "
        "are an error.",
    )
    image_range: list[float] | None = option(  # noqa: RUF009
        None,
        "The values of black and of white in the image files, such as `0 4095` for 12 bits in files of 16. By default all "
        "that the type of the file can hold, or for 32-bit files from the lowest to the highest value of each image.",
    )


@dataclass
class DataArguments(ImagesArguments):
    """The images to train on, and what to measure."""

    streaming: bool = option(
        False,
        "Read the images during training, rather than download and prepare all of them before. For Hub ids, parquet and "
        "WebDataset. Needs `max_steps` and a labeled test split; `train_size` then takes the first images.",
    )
    train_size: int | None = option(
        None, "Train on this many images only, drawn with `seed`, each class keeping its share."
    )
    label_noise: float = option(
        0.0, "Share of the training labels, in [0, 1), replaced by wrong ones drawn with `seed`."
    )
    validation_size: float = option(
        0.0,
        "Share of the training images, in [0, 1), set apart with `seed` (before `train_size`) as validation images: the "
        "evaluations during training then use these, and the test images are used once, at the end.",
    )
    class_weights: Literal["none", "balanced"] = option(
        "none",
        "`balanced` weights the training loss of each class inversely to its number of training images, so that "
        "rare classes count as much as frequent ones. The ascent is not weighted. `eval_loss` is, being the same loss.",
    )
    augmentation: Literal["none", "default", "randaugment"] = option(
        "none",
        "Random changes of the training images, on the device: `default` crops "
        "and flips, `randaugment` also turns, shears, darkens and so on. `none` by default for the built-in models and for "
        "digits, `default` for models to fine-tune.",
    )
    mixup: float = option(
        0.0, "Blend pairs of images, and their labels, in a ratio from Beta(mixup, mixup). 0 is off."
    )
    cutmix: float = option(
        0.0,
        "Put a rectangle of one image into another, and the same share of its label, from Beta(cutmix, cutmix). 0 is "
        "off. With `mixup` too, each batch gets one of the two.",
    )
    metrics: list[str] = option(  # noqa: RUF009
        ["accuracy", "macro_f1", "confusion_matrix"],
        "Metrics: `accuracy`, `macro_f1`, `confusion_matrix` (once, at the end), or any that "
        "`evaluate.load` finds on the Hub.",
    )


def training_defaults(chosen: argparse.Namespace) -> dict[str, Any]:
    """
    Choose defaults for the options of a training by the model and the images `chosen`: those of training from scratch for a
    built-in model, those of fine-tuning for others.
    """
    model, dataset = chosen.model_name_or_path, chosen.dataset_name
    defaults = {
        "output_dir": str(Path("runs") / f"{last_part(model)}-{last_part(dataset)}"),
        "lr_scheduler_type": "cosine",
        "logging_strategy": "epoch",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "report_to": "none",
        "do_train": True,
        "use_cpu": not torch.accelerator.is_available(),  # Transformers wants it for `bf16`, and pins memory without it
    }
    if chosen.streaming:  # an epoch may have no end: shares of `max_steps`
        defaults |= dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "steps")
        defaults |= {"logging_steps": 0.02, "eval_steps": 0.2, "save_steps": 0.2}
    if model in BUILTIN_MODELS:
        return defaults | {
            "learning_rate": 3e-3,
            "num_train_epochs": 30,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 256,
        }
    return defaults | {
        "learning_rate": 5e-5,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "augmentation": "none" if dataset == "digits" else "default",  # a mirrored digit is another character
    }


def required(name: str, value: str | None, why: str | None = None) -> str:
    """Return the value of an option that has no default. The parser cannot ask for it, as it may come from a file."""
    if value is None:
        because = f", since {why}" if why else ""
        raise ValueError(f"`{name}` is needed{because}: --{name} on the command line, or in the configuration file.")
    return value


def pick_device(name: str) -> torch.device:
    """Return the device that an option `device` names: `cpu`, `cuda`, or `auto`, a GPU if there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"`device` must be `auto`, `cpu` or `cuda`, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is `cuda`, but torch finds no GPU here. Use `cpu`.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the checkpoints of Trainer in a folder, the newest last; copies of other names (`checkpoint-best`) do not count."""
    found = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


def is_same_data(first: str, second: str | None) -> bool:
    """Return whether two names of datasets mean the same: they are equal, or paths of one file or folder."""
    if first == second:
        return True
    return second is not None and Path(first).exists() and Path(second).exists() and Path(first).samefile(second)


def last_part(name: str) -> str:
    """Return the name of a folder or file, or of a model or dataset without its owner."""
    return Path(name).resolve().name if Path(name).is_dir() else Path(name).name


def options_of_run(model_args: ModelArguments, data_args: DataArguments, training_args: AACEConfig) -> dict[str, Any]:
    """
    Return the options that load the data of a run again and tell the run from others: those of model, data and method, those
    of the training that change its result most, and the seed.
    """
    training = training_args.to_dict()  # which has names instead of enumerations
    training["optim"] = training["optim"].removesuffix("_fused")  # the same, and the default by the version of torch
    names = [*(option.name for option in fields(AACEArguments)), *_OF_TRAINING, "seed"]
    return asdict(model_args) | asdict(data_args) | {name: training[name] for name in names}


def write_train_options(options: dict[str, Any], folder: str | Path) -> None:
    """Write what [`options_of_run`] returns beside the model in a folder, as `train_options.json`."""
    Path(folder, TRAIN_OPTIONS_NAME).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def train_options(folder: Path) -> dict[str, Any]:
    """Read the `train_options.json` of a checkpoint or of its run. Empty if there is none."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    found = [path for place in places if (path := place / TRAIN_OPTIONS_NAME).is_file()]
    return json.loads(found[0].read_text(encoding="utf-8")) if found else {}
