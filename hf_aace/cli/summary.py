# SPDX-License-Identifier: Apache-2.0
"""Describe a run before it trains: its images, classes, model, method and steps."""

from io import BytesIO

import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..config import method_and_settings
from ..vision.datasets import SET_APART


logger = logging.get_logger(__name__)

# Below this size in pixels, what a model sees of larger images may be too little to tell them apart.
_SMALL = 100


class Summary(TrainerCallback):
    """
    Print the facts from [`describe_run`] when training begins, with its number of epochs and steps, which is added to them.
    """

    def __init__(self, facts: dict[str, str]):
        self._facts = facts

    def on_train_begin(self, args, state, control, **kwargs):
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = f"{state.max_steps} of {batch} images"
        if args.max_steps <= 0:
            steps += f", in {args.num_train_epochs:g} {'epoch' if args.num_train_epochs == 1 else 'epochs'}"
        if state.global_step > 0:
            steps += f", {state.global_step} of them done before"
        self._facts["Steps"] = steps
        if state.is_world_process_zero:
            print("\n".join(f"{name + ':':8} {fact}" for name, fact in self._facts.items()), flush=True)


def describe_run(trainer: Trainer, dataset: DatasetDict | IterableDatasetDict, model: str) -> dict[str, str]:
    """
    Describe a run, for the screen and the model card, in sentences by title: `"Images"`, `"Classes"`, `"Pixels"` (unless
    streamed), `"Model"` and `"Method"`. `dataset` is as the trainer, which has an [`AACEConfig`], gets it; `model` is a name.
    Warn if images are shrunk to very few pixels.
    """
    classes = [trainer.model.config.id2label[index] for index in range(trainer.model.config.num_labels)]
    if isinstance(dataset, DatasetDict):
        labels = np.array(dataset["train"].with_format(None)["label"][:])
        facts = {
            "Images": _images(dataset),
            "Classes": _classes(classes, np.bincount(labels, minlength=len(classes))),
            "Pixels": _pixels(dataset["train"]),
        }
    else:
        facts = {"Images": "streamed", "Classes": str(len(classes))}
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    facts["Model"] = f"{model}, {total:,} parameters, {'all' if trained == total else f'{trained:,}'} trained"
    facts["Method"] = "plain training (rho 0)" if trainer.args.rho == 0 else method_and_settings(trainer.args)
    return facts


def _images(dataset: DatasetDict) -> str:
    parts = [f"{len(dataset['train']):,} for training"]
    if "validation" in dataset:
        parts.append(f"{len(dataset['validation']):,} for validation")
    apart = " (set apart from the training images)" if dataset["test"].info.description == SET_APART else ""
    return ", ".join([*parts, f"{len(dataset['test']):,} for the test{apart}"])


def _classes(names: list[str], counts: np.ndarray) -> str:
    if counts.max() <= 1.5 * counts.min():
        return str(len(names))
    order = np.argsort(-counts, kind="stable")
    told = [f"{names[index]} {counts[index]}" for index in order]
    if len(told) > 10:
        told = [*told[:5], "...", *told[-5:]]
    return f"{len(names)}, with uneven numbers of training images: {', '.join(told)}"


def _pixels(images: Dataset) -> str:
    """Tell the size of the first image, and the size that the model sees."""
    encoded = images.with_format(None)[0]["image"]
    with PIL.Image.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"])) as image:
        size = image.size
    told, seen = f"{size[0]}x{size[1]} (the first image)", images[0].get("pixel_values")
    if seen is None or seen.dim() != 3:  # ImageGPT takes colors by number, SigLIP 2 flattened patches
        return told
    height, width = seen.shape[-2:]
    if size == (width, height):
        return told
    if min(size) >= 2 * min(height, width) and min(height, width) < _SMALL:
        logger.warning(
            f"Images of {size[0]}x{size[1]} pixels are shrunk to {width}x{height}, which may leave too little to tell them apart. "
            "Take a model for larger images (`model_name_or_path`), or set `size` in its preprocessor_config.json."
        )
    return f"{told}, resized to {width}x{height} for the model"
