# SPDX-License-Identifier: Apache-2.0
"""Read the options of a command: the fields of dataclasses, from the command line and from a configuration file."""

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, get_origin

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .output import HelpFormatter


# Options, and what people type who mean them.
_MEANT = {
    "augmentation": ("augment",),
    "bf16": ("amp", "half", "mixed_precision", "precision"),
    "dataloader_num_workers": ("num_workers", "workers"),
    "dataset_name": ("data", "data_dir", "data_path", "dataset", "image_folder", "train_dir", "train_file"),
    "freeze_backbone": ("freeze",),
    "gradient_accumulation_steps": ("accumulation_steps", "grad_accum"),
    "label_noise": ("noise",),
    "label_smoothing_factor": ("label_smoothing",),
    "learning_rate": ("lr",),
    "lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "max_steps": ("steps",),
    "model_name_or_path": ("arch", "model", "model_name"),
    "num_processes": ("gpus", "num_gpus"),
    "num_train_epochs": ("epoch", "epochs", "n_epochs", "num_epochs"),
    "optim": ("optimizer",),
    "output_dir": ("out", "output"),
    "per_device_eval_batch_size": ("eval_batch_size",),
    "per_device_train_batch_size": ("batch", "batch_size", "batchsize", "bs", "train_batch_size"),
    "resume_from_checkpoint": ("checkpoint", "resume"),
    "train_size": ("max_train_samples",),
    "validation_size": ("train_val_split", "val_size", "val_split", "validation_split"),
    "warmup_steps": ("warmup", "warmup_ratio"),
    "weight_decay": ("wd",),
}
# What people type who mean something that is no option, and where it is.
_ELSEWHERE = {
    ("image_size", "img_size", "input_size", "resolution"): (
        "No option sets the size of the images: it is `size` in the preprocessor_config.json of the model."
    ),
    ("num_classes", "num_labels"): "The classes are those of the dataset.",
    ("momentum",): "It is an argument of the optimizer: `optim` sgd, `optim_args` momentum=0.9.",
    ("test_dir", "val_dir", "validation_dir"): (
        "Put the splits into one folder, as `train`, `validation` and `test`: its path is `dataset_name`."
    ),
    ("ignore_mismatched_sizes", "overwrite_output_dir"): "It is always so: leave it out.",
    ("cuda", "device", "gpu"): "A GPU is used if there is one, unless `use_cpu` is true.",
}


def option(default: Any, help: str) -> Any:
    """
    Make a field of a dataclass that is an option of a command, with its text in `--help`. A default that is a list is copied
    for each instance.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


class OptionParser(HfArgumentParser):
    """
    Parse options that are fields of the dataclasses `kinds`. `sections` are those of the help by their titles, in order, with
    the names of their options; if there are any, options in none of them are left out of the help. `config_words` are the
    options of a configuration file as words of a command line, read before those of the command line, which so override them.
    """

    def __init__(self, kinds: Sequence[type], sections: Mapping[str, Sequence[str]] | None = None, **kwargs):
        self.config_words: list[str] = []
        self._titles = {name: title for title, names in (sections or {}).items() for name in names}
        self._groups: dict[str, Any] = {}
        super().__init__(kinds, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def add_argument(self, *flags, **kwargs):
        kind = kwargs.get("type")
        # A flag without a value means true. HfArgumentParser has this for `bool`, but not for `bool | None`.
        if kind is string_to_bool:
            kwargs |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif kind in (int, float, str):
            kwargs.setdefault("metavar", {int: "N", float: "X", str: "TEXT"}[kind])
        elif get_origin(kind) is dict:
            kwargs |= {"type": json.loads, "metavar": "JSON"}
        title = self._titles.get(kwargs.get("dest", flags[0].lstrip("-")))
        if title is not None:
            if not self._groups:
                self._groups = {
                    title: self.add_argument_group(title) for title in dict.fromkeys(self._titles.values())
                }
            return self._groups[title].add_argument(*flags, **kwargs)
        if self._titles and (kind is not None or "dest" in kwargs):  # the field of a dataclass
            kwargs["help"] = argparse.SUPPRESS
        return super().add_argument(*flags, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([*self.config_words, *args], namespace)

    def read(self, argv: Sequence[str]) -> tuple:
        """Read the options in `argv` into instances of the dataclasses; refuse a value that cannot be used."""
        try:
            instances = self.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        except TypeError as error:  # by a class that an option in JSON is made into
            raise ValueError(f"An option has a value that cannot be used: {error}.") from error
        return instances[: len(self.dataclass_types)]


def command_parser(
    command: str,
    description: str,
    kinds: Sequence[type],
    argv: Sequence[str],
    defaults: Callable[[argparse.Namespace], dict[str, Any]] = lambda chosen: {},
    sections: Mapping[str, Sequence[str]] | None = None,
) -> OptionParser:
    """
    Make the parser of a command, with the options of the file that `--config` names read already. Answer `--help`, and refuse
    unknown options. `defaults` gives, from the options chosen, the defaults that depend on them; with `sections`, `--help`
    shows only the options in these, and `--help-all` all.
    """
    names = [field.name for kind in kinds for field in fields(kind) if field.init]
    shown = dict(sections or {})
    if sections and "--help-all" in argv:
        shown["all other options of transformers.TrainingArguments"] = sorted(
            set(names).difference(*sections.values())
        )
    parser = OptionParser(
        kinds,
        shown,
        prog=f"hf-aace {command}",
        usage=f"hf-aace {command} [--config FILE] [options]",  # all of them would fill pages, at every usage error
        description=description,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="A YAML or JSON file with options by name; the command line overrides it."
    )
    if sections:
        parser.add_argument(
            "--help-all", action="help", help="Show all options, those of TrainingArguments that few need too."
        )
    # Once without `--help`, which is to show the defaults for what else is given.
    known = [argument for argument in argv if argument not in ("-h", "--help", "--help-all")]
    config_path = parser.parse_known_args(known)[0].config
    if config_path is not None:
        config = _read_config(config_path)
        for key, value in config.items():
            if key not in names:
                hint = "" if isinstance(value, dict) else _did_you_mean([key], names)
                if not hint and (isinstance(value, dict) or not value):
                    hint = " Write the options without sections."
                raise ValueError(f"The configuration file {config_path} has an unknown key, {key!r}.{hint}")
        config_words = _as_words(config)
        parser.parse_args(config_words)  # refuses bad values, and several for one option
        parser.config_words = config_words
    parser.set_defaults(**defaults(parser.parse_known_args(known)[0]))
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        typed = [word.partition("=")[0].lstrip("-").replace("-", "_") for word in unknown if word.startswith("-")]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}.{_did_you_mean(typed, names, prefix='--')}")
    return parser


def config_as_options(path: str) -> list[str]:
    """
    Read a configuration file, in YAML or JSON, into words of a command line; refuse one that holds anything but options by
    name. Keys without a value, or with `null`, are left out.
    """
    return _as_words(_read_config(path))


def _as_words(config: dict[str, Any]) -> list[str]:
    words = []
    for name, value in config.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words += [f"--{name}", json.dumps(_typed(value))]
        elif value is not None and str(value).lower() not in ("", "~", "null"):
            words.append(f"--{name}={value}")
    return words


def _read_config(path: str) -> dict[str, Any]:
    """Read a configuration file, all scalars as strings, since the parser converts them as those of the command line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration file {path} cannot be read: {error}") from error
    try:
        if Path(path).suffix == ".json":
            config = json.loads(text, parse_float=str, parse_int=str)
        else:
            config = yaml.load(text, Loader=yaml.BaseLoader)
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
    return config


def _typed(value: Any) -> Any:
    """Convert the strings in the value of an option that takes JSON into numbers, booleans and null where they are such."""
    if isinstance(value, dict):
        return {key: _typed(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_typed(entry) for entry in value]
    try:
        return json.loads(str(value).lower())
    except json.JSONDecodeError:
        return value


def _did_you_mean(typed: list[str], known: list[str], prefix: str = "") -> str:
    meant, notes = [], []
    for name in map(str.lower, typed):
        usual = [option for option, others in _MEANT.items() if name in others and option in known]
        elsewhere = [note for names, note in _ELSEWHERE.items() if name in names and "optim" in known]
        notes += elsewhere
        meant += usual or ([] if elsewhere else difflib.get_close_matches(name, known, n=1, cutoff=0.72))
    suggestion = f" Did you mean {', '.join(prefix + name for name in dict.fromkeys(meant))}?" if meant else ""
    return " ".join((suggestion, *notes))
