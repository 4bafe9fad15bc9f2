# SPDX-License-Identifier: Apache-2.0
"""Data sets that are read while they are trained on: from the Hub, or from WebDataset or parquet files."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from datasets import ClassLabel, Features, Image, IterableDataset, IterableDatasetDict
from torch.utils.data import get_worker_info
from transformers.image_processing_utils import BaseImageProcessor

from .columns import class_name, find_columns, untyped_images
from .datasets import TEST_SPLITS, load_splits
from .images import image_transform


# Of encoded images: about 100 MB, if an image has 100 kB.
_SHUFFLE_BUFFER = 1000
_DECODED_AT_ONCE = 16


def stream_image_dataset(
    name: str,
    *,
    seed: int,
    train_size: int | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
) -> IterableDatasetDict:
    """
    Opens a data set for image classification without reading it.

    Args:
        name (`str`):
            The id of a data set on the Hub; or a file, or a folder of files, in parquet or as WebDataset shards (`.tar`).
        seed (`int`):
            Shuffles the shards, and the images through a buffer of 1000, anew for each pass.
        train_size (`int`, *optional*):
            Train on the first so many images. Defaults to all.
        image_column_name (`str`, *optional*):
            The column of the images. Found if left out, see [`~hf_aace.vision.columns.find_columns`].
        label_column_name (`str`, *optional*):
            The column of the labels. Found if left out. If it is of strings or integers, the classes are those of the test
            images, whose labels are read for that.

    Returns:
        `IterableDatasetDict`: The splits `train` and `test`, with the columns `image` (encoded) and `label`
        ([`~datasets.ClassLabel`]). A training image of a class that the test split lacks raises a `ValueError` when it is met,
        unless the classes are known from the type of the column.

    Raises:
        `ValueError`: If the data set cannot be streamed, or has no `train` split, or no labelled `test` or `validation` split
            (a share of the training images cannot be set apart without reading them all), or not the columns.
    """
    if train_size is not None and train_size < 1:
        raise ValueError(f"`train_size` must be at least 1, got {train_size}.")
    splits = load_splits(name, streaming=True)
    if "train" not in splits:
        raise ValueError(f"The data set {name!r} must have a split named `train`, but has: {', '.join(splits)}.")
    train = _columns(name, splits["train"], image_column_name, label_column_name)
    classes = None
    for split in TEST_SPLITS:
        if split in splits and set(splits["train"].column_names) <= set(splits[split].column_names or ()):
            test = _columns(name, splits[split], image_column_name, label_column_name)
            classes = _classes(test)
        if classes is not None:
            break
    else:
        raise ValueError(
            f"`streaming` needs a labelled split `test` or `validation`, but the data set {name!r} has only: "
            f"{', '.join(splits)}. Add one, or leave out `streaming` to have a fifth of the images set apart."
        )
    if train_size is not None:
        train = train.take(train_size)
    train = train.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    return IterableDatasetDict(
        train=_with_classes(name, "train", train, classes), test=_with_classes(name, split, test, classes)
    )


class RepeatedStream(torch.utils.data.IterableDataset):
    """
    A stream that begins anew when it ends, in another order, for ever. Trainer would do that too, but it can find its place
    in the first pass only, and a resumed run would go on with other images than the whole one.

    Args:
        stream (`IterableDataset`): The data set of one pass.
    """

    def __init__(self, stream: IterableDataset):
        self._stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            self._stream.set_epoch(number)
            row = None
            for row in self._stream:
                yield row
            if row is None and (worker := get_worker_info()) and worker.id >= self._stream.num_shards:
                return  # there are more workers than shards, which `datasets` warns of
            if row is None:
                raise ValueError(
                    "There are no training images in the stream (or not in the share of a data loader worker)."
                )


def transform_stream(
    dataset: IterableDatasetDict, processor: BaseImageProcessor, skip_corrupt_images: bool = False
) -> dict[str, torch.utils.data.IterableDataset]:
    """
    Turns the images into what a model takes, as they are read; see [`~hf_aace.vision.images.image_transform`].

    Args:
        dataset (`IterableDatasetDict`): With the columns `image` and `label`.
        processor (`BaseImageProcessor`): The image processor of the model.
        skip_corrupt_images (`bool`, *optional*, defaults to `False`):
            Whether to leave out images that cannot be decoded, with a warning for each. Otherwise they are an error.

    Returns:
        `dict[str, IterableDataset]`: `train`, without end (see [`RepeatedStream`]), and `test`.
    """
    transform = image_transform(processor, skip_corrupt_images=skip_corrupt_images)
    dataset = dataset.map(transform, batched=True, batch_size=_DECODED_AT_ONCE, remove_columns=["image", "label"])
    return {"train": RepeatedStream(dataset["train"]), "test": dataset["test"]}


def _columns(
    name: str, dataset: IterableDataset, image_column_name: str | None, label_column_name: str | None
) -> IterableDataset:
    """The data set with the columns `image`, encoded, and `label`, as it is."""
    if dataset.features is None:
        raise ValueError(
            f"The data set {name!r} does not say what its columns are until it is read. Leave out `streaming`."
        )
    for column in untyped_images(dataset.features):
        dataset = dataset.cast_column(column, Image())
    features = dataset.features.flatten()
    image, label = find_columns(name, features, image_column_name, label_column_name)
    if isinstance(features[image], Image):
        dataset = dataset.cast_column(image, Image(decode=False))
    parent, _, field = label.partition(".") if label not in dataset.features else (label, "", "")
    dataset = dataset.select_columns([image, parent])

    def choose(batch: dict[str, list]) -> dict[str, list]:
        images = [
            value if value is None or isinstance(value, dict) else {"bytes": value, "path": None}
            for value in batch[image]
        ]
        labels = [value[field] if field and value is not None else value for value in batch[parent]]
        return {"image": images, "label": labels}

    return dataset.map(
        choose,
        batched=True,
        batch_size=_DECODED_AT_ONCE,
        remove_columns=[image, parent],
        features=Features(image=Image(decode=False), label=features[label]),
    )


def _classes(test: IterableDataset) -> ClassLabel | None:
    """The classes of a split, `None` if it has no labels."""
    feature = test.features["label"]
    labels = (row["label"] for row in test.select_columns(["label"]))
    if isinstance(feature, ClassLabel):
        first = next(labels, None)
        return None if first is None or first < 0 else feature
    found = set(labels)
    if found <= {None, -1}:  # withheld, as competitions do
        return None
    return ClassLabel(names=[str(value) for value in sorted(found - {None})])


def _with_classes(name: str, split: str, dataset: IterableDataset, classes: ClassLabel) -> IterableDataset:
    own = dataset.features["label"]

    def number(label: Any) -> int:
        known = class_name(label, own, classes)
        if known is None:
            raise ValueError(f"An image of the split `{split}` of the data set {name!r} has no label. Leave it out.")
        if known not in classes.names:
            raise ValueError(
                f"The split `{split}` of the data set {name!r} has an image of the class {known!r}, which is none of its test "
                f"images: {', '.join(classes.names[:5])}{', ...' if len(classes.names) > 5 else ''}."
            )
        return classes.str2int(known)

    return dataset.map(
        lambda label: {"label": number(label)},
        input_columns=["label"],
        features=Features(image=Image(decode=False), label=classes),
    )
