# SPDX-License-Identifier: Apache-2.0
"""Finished runs of `hf-aace train` for the commands that look at them: their names, models and data."""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.utils import logging

from ..config import AACEArguments, method_and_settings
from ..tensor_checks import check_at_least
from ..vision.datasets import load_image_dataset, without_cache_files
from ..vision.images import image_transform
from ..vision.messages import first_few
from ..vision.models import load_classifier, model_classes
from .options import TRAIN_OPTIONS_NAME, checkpoints_in, is_same_data, last_part, pick_device, train_options
from .parser import OptionParser, option


@dataclass
class RunArguments:
    """The options that say how to read runs: their names, and which images to use."""

    names: list[str] | None = option(  # noqa: RUF009
        None,
        "A name for each run, in their order; runs of one name are averaged. By default the method and its rho, "
        "or the name of the folder.",
    )
    split: str = option("train", "The images: `train`, with the labels that the run saw, or `test`.")
    max_samples: int = option(1000, "Use this many images at most, drawn at random; they are held in memory.")
    dataset_name: str | None = option(
        None,
        "The dataset, if not that of the run, or if the run does not say. Of another one all images are used, with their own "
        "labels, unless `train_size` or `label_noise` says otherwise.",
    )
    train_size: int | None = option(None, "As for `hf-aace train`, if not that of the run.")
    label_noise: float | None = option(None, "As for `hf-aace train`, if not that of the run.")
    data_seed: int | None = option(None, "The seed that drew `train_size` and `label_noise`, if not that of the run.")
    batch_size: int = option(200, "Images at a time.")
    device: str = option("auto", "`cpu`, `cuda`, or `auto`: a GPU if there is one.")
    seed: int = option(0, "Draws images, directions and starting vectors, the same for all runs.")

    def check(self) -> None:
        """Refuse a field with a value outside its range."""
        if self.split not in ("train", "test"):
            raise ValueError(f"`split` must be `train` or `test`, got {self.split!r}.")
        check_at_least(1, max_samples=self.max_samples, batch_size=self.batch_size)
        pick_device(self.device)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide, as a context manager or decorator, the progress bars of the libraries: several for each run, over in no time."""
    shown_by_datasets, shown_by_transformers = not are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_by_datasets:
            enable_progress_bars()
        if shown_by_transformers:
            logging.enable_progress_bar()


@contextmanager
def progress(model: PreTrainedModel, description: str, total: int) -> Iterator[None]:
    """Show inside this context manager how many of about `total` batches a model has seen, if there is a terminal."""
    with tqdm(total=total, desc=description, unit="batch", leave=False, disable=None) as bar:

        def count(*_) -> None:  # what a hook returns would become the output of the model
            bar.update()

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def read_runs(
    command: str, description: str, kind: type, argv: list[str]
) -> tuple[RunArguments, Any, dict[str, list["Run"]]]:
    """
    Read and check the command line of a command that looks at runs; the dataclass `kind` has its own options. Return how to
    read the runs, the own options, and the runs by name, as [`open_runs`] gives them.
    """
    parser = OptionParser((RunArguments, kind), prog=f"hf-aace {command}", description=description)
    folder = "The output_dir of a run, or a checkpoint in it."
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help=folder)
    args, options, positional = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    args.check()
    return args, options, open_runs(positional.run_dirs, args.names)


class Run:
    """
    A folder that `hf-aace train` left, or one of its checkpoints; one that does not exist is refused. `options` are the
    contents of its `train_options.json`, empty if there is none; `name` is its method with `rho` and other settings, or without
    options the name of the folder.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"There is no folder {folder!r}. Give the `output_dir` of `hf-aace train`.")
        self.options = train_options(self.folder)
        self.name = _name_by_method(self.options) if self.options else last_part(folder)

    def is_writable(self) -> bool:
        """Return whether results can be kept in the folder, which may be another user's."""
        return os.access(self.folder, os.W_OK)

    def checkpoints(self) -> list["Run"]:
        """List its checkpoints, in the order of training."""
        return [Run(str(path)) for path in checkpoints_in(self.folder)]

    def log_history(self) -> list[dict[str, Any]]:
        """Read its log. Raises a `ValueError` if the folder has no `trainer_state.json`."""
        path = self.folder / "trainer_state.json"
        if not path.is_file():
            raise ValueError(
                f"The folder {str(self.folder)!r} has no trainer_state.json, so no log to draw. `hf-aace train` writes it; in a "
                "script of your own, call `trainer.save_state()` after `trainer.train()`, or give one of its checkpoints."
            )
        return json.loads(path.read_text(encoding="utf-8"))["log_history"]

    def check(self, args: RunArguments) -> None:
        """Raise a `ValueError` if the folder holds no model, or nothing says which data to use."""
        if (self.folder / "adapter_config.json").is_file():
            raise ValueError(
                f"The folder {str(self.folder)!r} has the adapters of LoRA only. The merged model is in the folder of its run, when that "
                "has ended: give that, without `--checkpoints`."
            )
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"The folder {str(self.folder)!r} has no config.json, so no model to look at.")
        if args.dataset_name is not None:
            return
        if self.options.get("dataset_name") is None:
            raise ValueError(
                f"The folder {str(self.folder)!r} has no {TRAIN_OPTIONS_NAME} that says which data the run was trained on. "
                "Give it by `--dataset_name` (and `--train_size`, `--label_noise`, `--data_seed`)."
            )
        if self.options.get("streaming"):
            raise ValueError(
                f"The run in {str(self.folder)!r} streamed its images. Say by `--dataset_name` (and `--train_size`) which to "
                "look at."
            )

    @_without_progress_bars()
    def load_model(self, args: RunArguments) -> PreTrainedModel:
        """Load the model, in 32 bits, on the device. Raises a `ValueError` as [`check`]."""
        self.check(args)
        model, _ = load_classifier(str(self.folder))
        return model.to(pick_device(args.device))

    @_without_progress_bars()
    def load_batches(self, args: RunArguments) -> list[dict[str, torch.Tensor]]:
        """
        Load the images and labels that the arguments ask for, prepared by the run's own image processor. Raises a `ValueError`
        as [`check`], or if the model does not know the classes of the data.
        """
        self.check(args)
        given = {name: getattr(args, name) for name in ("dataset_name", "train_size", "label_noise")}
        given["seed"] = args.data_seed
        names = ["image_range"]
        # Other data have other columns and sizes.
        if args.dataset_name is None or is_same_data(args.dataset_name, self.options.get("dataset_name")):
            names += ["image_column_name", "label_column_name", "skip_corrupt_images", "validation_size", *given]
        options = {"seed": 42} | {name: self.options[name] for name in names if self.options.get(name) is not None}
        options |= {name: value for name, value in given.items() if value is not None}
        dataset = load_image_dataset(options.pop("dataset_name"), **options)[args.split]
        dataset = in_the_classes_of(AutoConfig.from_pretrained(self.folder).id2label, dataset)
        if len(dataset) > args.max_samples:
            with without_cache_files():
                dataset = dataset.shuffle(seed=args.seed).select(range(args.max_samples))
        processor = AutoImageProcessor.from_pretrained(self.folder)
        transform = image_transform(processor, image_range=self.options.get("image_range"))
        # Encoded, as in training.
        dataset = dataset.cast_column("image", Image(decode=False)).with_transform(transform)
        return [{**part, "labels": torch.tensor(part["labels"])} for part in dataset.iter(args.batch_size)]


@without_cache_files()
def in_the_classes_of(id2label: dict[int, str], data: Dataset) -> Dataset:
    """
    Give the images of a dataset, by their column `label`, the label numbers that a model uses. The names of the classes say
    which is which; without names in the model the numbers stay. Refuse classes that the model does not know.
    """
    names, known = data.features["label"].names, model_classes(id2label)
    if known is None:  # the model's classes have no names
        if len(names) != len(id2label):
            raise ValueError(
                f"The model has {len(id2label)} classes without names, the data {len(names)}: nothing says which "
                "is which. Set `id2label` in the model's configuration."
            )
        return data
    if names == known:
        return data
    # Not `align_labels_with_mapping`, which takes names that differ only in case for one class.
    labels = [names[label] for label in data["label"]]
    unknown = sorted(set(labels) - set(known), key=names.index)
    if unknown:
        raise ValueError(
            f"The model does not know these classes of the data: {first_few(unknown)}. It "
            f"knows {first_few(known)}. Evaluate it on images of its own classes."
        )
    numbers = {name: known.index(name) for name in set(labels)}
    return data.remove_columns("label").add_column("label", [numbers[label] for label in labels])


def open_runs(folders: Sequence[str], names: Sequence[str] | None) -> dict[str, list[Run]]:
    """
    Group the runs in the folders by name, in the order in which the names first appear; by default a run has its own, see [`Run`]. Refuse
    a folder that does not exist, names that are not as many, and, without `names`, runs of one name that differ in anything but
    the seed, or not even in that.
    """
    if names is not None and len(names) != len(folders):
        raise ValueError(f"`names` must hold one for each run: {len(folders)}, got {len(names)}: {list(names)}.")
    groups: dict[str, list[Run]] = {}
    for index, folder in enumerate(folders):
        run = Run(folder)
        groups.setdefault(run.name if names is None else names[index], []).append(run)
    for name, runs in groups.items() if names is None else ():
        for first, other in itertools.combinations(runs, 2):
            keys = sorted(first.options.keys() | other.options.keys())
            different = [k for k in keys if first.options.get(k) != other.options.get(k)]
            if different != ["seed"]:
                why = f"differ in {first_few(different)}" if different else "do not differ, not even in the seed"
                if not first.options and not other.options:
                    why = f"have no {TRAIN_OPTIONS_NAME} that says how they were trained"
                raise ValueError(
                    f"The runs in {str(first.folder)!r} and {str(other.folder)!r} would both be called {name!r}, as runs of one method with "
                    f"several seeds, but they {why}. Say by `--names` what to call each run."
                )
    return groups


def _name_by_method(options: dict[str, Any]) -> str:
    known = {each.name: options[each.name] for each in fields(AACEArguments) if each.name in options}
    return method_and_settings(AACEArguments(**known))
