# SPDX-License-Identifier: Apache-2.0
"""The options that the commands share: which model, which data, and how they are read from the command line and files."""

import argparse
import difflib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser

from ..config import AACEArguments, AACEConfig
from ..vision.models import BUILTIN_MODELS
from .output import HelpFormatter


TRAIN_OPTIONS_NAME = "train_options.json"


def option(default: Any, help: str) -> Any:
    """
    Make a field of a dataclass that is an option of a command.

    Args:
        default (`Any`): The default. A list is copied for each instance.
        help (`str`): The text of the option in `--help`.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class PretrainedArguments:
    """Which model to load, and what it may bring with it."""

    model_name_or_path: str | None = option(None, "The model: a local folder, or a model id on the Hub. Needed.")
    model_revision: str = option("main", "Branch, tag or commit of a model on the Hub, to pin what is loaded.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model. Only for a model whose code you have read."
    )
    allow_pickle: bool = option(False, "Load weights also from `pytorch_model.bin`, not only from safetensors.")


@dataclass
class ModelArguments(PretrainedArguments):
    """Which model to train, and what of it."""

    model_name_or_path: str = option(
        "convnext-tiny-digits",
        "The model: `convnext-tiny-digits`, `vit-tiny-digits` or `resnet-tiny-digits` (small, from scratch, for 8x8 "
        "images), a local folder, or a model id on the Hub. Learning rate, batch size, epochs and the like have other "
        "defaults for the built-in three, shown here, than for models to fine-tune.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "Dtype of the loaded weights. 16 bits save memory with `lora` or `freeze_backbone`, where what is trained "
        "stays in 32 bits, and need `bf16` or `fp16`; other training in 16-bit weights is refused unless `rho` is 0, as "
        "their rounding swallows the perturbation. For speed, set `bf16` alone.",
    )
    freeze_backbone: bool = option(
        False, "Train the classification head only. BatchNorm statistics still follow the images."
    )
    lora: bool = option(
        False,
        "Train low-rank adapters and the head (pip install 'hf-aace[peft]'). They are merged into the saved "
        "model, which loads like any other, and saved by themselves in `adapter/`.",
    )
    lora_rank: int = option(16, "With `lora`: rank of the adapters.")
    lora_alpha: float = option(16.0, "With `lora`: the adapters are scaled by `lora_alpha / lora_rank`.")
    lora_target_modules: list[str] = option(  # noqa: RUF009
        ["all-linear"],
        "With `lora`: the layers to adapt, by the ends of their names, such as `q_proj v_proj`. `all-linear` "
        "is every linear layer but the head; a network of convolutions (ResNet) has none, so name some.",
    )

    def __post_init__(self):
        if isinstance(self.lora_target_modules, str):  # a single name in a configuration file
            self.lora_target_modules = [self.lora_target_modules]


@dataclass
class ImagesArguments:
    """Which labelled images."""

    dataset_name: str = option(
        "digits",
        "The images: `digits` (8x8 scans, bundled with scikit-learn), a folder with one sub-folder of "
        "images for each class (perhaps below `train` and `test`), a folder written by `save_to_disk`, a file or folder "
        "in parquet or of WebDataset shards (.tar), or the id of a data set on the Hub.",
    )
    image_column_name: str | None = option(None, "The column of the images. By default the first that holds images.")
    label_column_name: str | None = option(
        None,
        "The column of the labels: classes, strings or integers (a field of a JSON column as `json.label`). By "
        "default one that is typed as classes, or is called `label` or the like.",
    )
    skip_corrupt_images: bool = option(
        False,
        "Decode all images beforehand, and name, count and leave out those that cannot be. Without it they are an "
        "error.",
    )


@dataclass
class DataArguments(ImagesArguments):
    """What to train on, and what to measure."""

    streaming: bool = option(
        False,
        "Read the images in the course of training, rather than download and prepare them all beforehand. For hub "
        "ids, parquet and WebDataset. Needs `max_steps` and a labelled test split; `train_size` then takes the first ones.",
    )
    train_size: int | None = option(
        None, "Train on this many images only, drawn with `seed`, each class keeping its share."
    )
    label_noise: float = option(
        0.0, "Share of the training labels, in [0, 1), replaced by wrong ones drawn with `seed`."
    )
    validation_size: float = option(
        0.0,
        "Share of the training images, in [0, 1), set apart with `seed` (before `train_size`): the evaluations "
        "before the end then use these, and the test images are for the end alone.",
    )
    class_weights: Literal["none", "balanced"] = option(
        "none",
        "`balanced` weights the training loss of each class inversely to its number of training images, so that "
        "rare ones count as much as frequent ones. The ascent is not weighted. `eval_loss` is, as it is the same loss.",
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

    def __post_init__(self):
        if isinstance(self.metrics, str):  # a single name in a configuration file
            self.metrics = [self.metrics]


def training_parser(command: str, description: str, kinds: tuple[type, ...], argv: list[str]) -> HfArgumentParser:
    """
    The parser of a command that trains models, as [`command_parser`] makes it.

    Args:
        command (`str`): The name of the command.
        description (`str`): What it does, for `--help`.
        kinds (`tuple[type, ...]`): The dataclasses whose fields are options beside those of model, data and training.
        argv (`list[str]`): The arguments of the command line.
    """
    kinds = (ModelArguments, DataArguments, *kinds, AACEConfig)
    return command_parser(
        command,
        description,
        kinds,
        argv,
        lambda chosen: _recipe(chosen.model_name_or_path, chosen.dataset_name, chosen.streaming),
    )


def command_parser(
    command: str,
    description: str,
    kinds: tuple[type, ...],
    argv: list[str],
    defaults: Callable[[argparse.Namespace], dict[str, Any]] = lambda chosen: {},
) -> HfArgumentParser:
    """
    The parser of a command whose options are the fields of dataclasses, from the command line and from the file that
    `--config` names. Has answered `--help` and unknown options.

    Args:
        command (`str`): The name of the command.
        description (`str`): What it does, for `--help`.
        kinds (`tuple[type, ...]`): The dataclasses.
        argv (`list[str]`): The arguments of the command line.
        defaults (`Callable`, *optional*): From the options chosen, the defaults that depend on them.
    """
    names = [option.name for kind in kinds for option in fields(kind) if option.init]
    parser = HfArgumentParser(
        kinds,
        prog=f"hf-aace {command}",
        usage=f"hf-aace {command} [--config FILE] [options]",  # all of them would fill pages, at every usage error
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # an abbreviation would take a misspelt option for another one
    )
    parser.add_argument("--config", help="A YAML or JSON file with options by name; the command line overrides it.")
    # Once without `--help`, which is to show the defaults for what else is given.
    known = [argument for argument in argv if argument not in ("-h", "--help")]
    config_path = parser.parse_known_args(known)[0].config
    config = {} if config_path is None else _read_config(config_path)
    for key in config:
        if key not in names:
            raise ValueError(
                f"The configuration file {config_path} has an unknown key, {key!r}.{_did_you_mean(str(key), names)}"
            )
    if config_path is not None:
        parser.parse_args(config_as_options(config_path))  # of what is no choice, or has too many values, it tells
    # The defaults depend on what the configuration or the command line chooses.
    parser.set_defaults(**config)
    parser.set_defaults(**defaults(parser.parse_known_args(known)[0]) | config)
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = _did_you_mean(unknown[0].partition("=")[0].lstrip("-").replace("-", "_"), names, prefix="--")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
    return parser


def _recipe(model_name_or_path: str, dataset_name: str, streaming: bool = False) -> dict[str, Any]:
    """Defaults of the options: from scratch for a built-in model, fine-tuning for others."""
    recipe = {
        "output_dir": str(Path("runs") / f"{last_part(model_name_or_path)}-{last_part(dataset_name)}"),
        "lr_scheduler_type": "cosine",
        "logging_strategy": "epoch",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "report_to": "none",
        "do_train": True,
        "dataloader_pin_memory": torch.cuda.is_available(),  # elsewhere it only warns
    }
    if streaming:  # an epoch may have no end: shares of `max_steps`
        recipe |= dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "steps")
        recipe |= {"logging_steps": 0.02, "eval_steps": 0.2, "save_steps": 0.2}
    if model_name_or_path in BUILTIN_MODELS:
        return recipe | {
            "learning_rate": 3e-3,
            "num_train_epochs": 30,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 256,
        }
    return recipe | {
        "learning_rate": 5e-5,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        # A mirrored digit is another sign.
        "augmentation": "none" if dataset_name == "digits" else "default",
    }


def required(name: str, value: str | None) -> str:
    """The value of an option that has no default. It may come from a file, so that the parser cannot ask for it."""
    if value is None:
        raise ValueError(f"`{name}` is needed: --{name} on the command line, or in the configuration file.")
    return value


def pick_device(name: str) -> torch.device:
    """The device that an option `device` names: `cpu`, `cuda`, or `auto`, a GPU if there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"`device` must be `auto`, `cpu` or `cuda`, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is `cuda`, but torch finds no GPU here. Use `cpu`.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints that Trainer left in a folder, the newest last; others, as a copy `checkpoint-best`, do not count."""
    found = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


def last_part(name: str) -> str:
    """The name of a folder or file, or of a model or data set without its owner."""
    return Path(name).resolve().name if Path(name).is_dir() else Path(name).name


def options_of_run(model_args: ModelArguments, data_args: DataArguments, training_args: AACEConfig) -> dict[str, Any]:
    """
    What a run needs to have its data loaded again and to be told from others: the options of model and data, those of the
    method, and the seed.
    """
    method = {option.name: getattr(training_args, option.name) for option in fields(AACEArguments)}
    return asdict(model_args) | asdict(data_args) | method | {"seed": training_args.seed}


def write_train_options(options: dict[str, Any], folder: str | Path) -> None:
    """Writes what [`options_of_run`] returns beside the model in a folder, as `train_options.json`."""
    Path(folder, TRAIN_OPTIONS_NAME).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def train_options(folder: Path) -> dict[str, Any]:
    """What is in the `train_options.json` of a run or of a checkpoint, else in that of the run; empty if there is none."""
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    found = [path for place in places if (path := place / TRAIN_OPTIONS_NAME).is_file()]
    return json.loads(found[0].read_text(encoding="utf-8")) if found else {}


class _YamlLoader(yaml.SafeLoader):
    """Reads `3e-3` as a number and `no` as a word, as YAML 1.2 does; PyYAML keeps to YAML 1.1, which has both otherwise."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [
            resolver
            for resolver in resolvers
            if resolver[0] not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), "tTfF")
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), "-+.0123456789"
)


def config_as_options(path: str) -> list[str]:
    """
    The options in a configuration file, as the command line would have them.

    Args:
        path (`str`): The file, in YAML or JSON.
    """
    argv = []
    for name, value in _read_config(path).items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{name}", *map(str, values)]
    return argv


def _read_config(path: str) -> dict[str, Any]:
    """Reads a configuration file into defaults for a parser."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration file {path} cannot be read: {error}") from error
    try:
        config = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, Loader=_YamlLoader)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The configuration file {path} is neither valid YAML nor, by its suffix, JSON: {error}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"The configuration file {path} must hold options as `name: value`, got {config!r}.")
    for key, value in config.items():
        if isinstance(value, list) and any(isinstance(entry, list | dict) for entry in value):
            raise ValueError(
                f"The configuration file {path} has lists within the list of {key!r}: {value}. Write one list."
            )
    # The parser converts defaults that are strings as it converts the command line, so all scalars go to it as such.
    # A key without a value leaves the default.
    return {
        key: value if isinstance(value, list | dict) else str(value)
        for key, value in config.items()
        if value is not None
    }


def _did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f" Did you mean {prefix}{close[0]}?" if close else ""
