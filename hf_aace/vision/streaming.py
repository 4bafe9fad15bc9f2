# SPDX-License-Identifier: Apache-2.0
"""Stream datasets while training on them, from the Hub or from WebDataset or parquet files."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Features, Image, IterableDataset, IterableDatasetDict
from torch.utils.data import get_worker_info
from transformers.image_processing_utils import BaseImageProcessor

from .columns import TEST_SPLITS, class_name, image_and_label
from .folders import load_splits, warn_of_unused_images
from .images import image_transform
from .messages import first_few
from .value_range import check_image_range


# Encoded images: about 100 MB if an image has 100 kB.
_SHUFFLE_BUFFER = 1000
_DECODED_AT_ONCE = 16


def stream_image_dataset(
    name: str,
    *,
    seed: int,
    train_size: int | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    image_range: Sequence[float] | None = None,
) -> IterableDatasetDict:
    """
    Open a dataset for image classification without reading it.

    Args:
        name (`str`):
            The id of a dataset on the Hub; or a file, or a folder of files, in parquet or as WebDataset shards (`.tar`).
        seed (`int`):
            Shuffles the shards, and the images through a buffer of 1000, anew for each pass.
        train_size (`int`, *optional*):
            Train on the first images up to this number. Defaults to all.
        image_column_name (`str`, *optional*):
            The column of the images. Defaults to what [`~hf_aace.vision.columns.find_columns`] finds.
        label_column_name (`str`, *optional*):
            The column of the labels, found by default too. The classes of strings or integers are those of the test images,
            whose labels are read for that.
        image_range (`Sequence[float]`, *optional*):
            The values that become black and white, which the first images are compared with; see
            [`~hf_aace.vision.images.decode_image`].

    Returns:
        `IterableDatasetDict`: The splits `train` and `test`, with the columns `image` (encoded) and `label`
        ([`~datasets.ClassLabel`]). If the type of the column does not tell the classes, a training image of a class that no
        test image has raises a `ValueError` when it is met.

    Raises:
        `ValueError`: If the dataset cannot be streamed, or lacks the columns, a split `train`, or a labeled split `test` or
            `validation` (to set training images apart, all would have to be read).
    """
    if train_size is not None and train_size < 1:
        raise ValueError(f"`train_size` must be at least 1, got {train_size}.")
    loaded = load_splits(name, streaming=True)
    splits = image_and_label(name, loaded, image_column_name, label_column_name)
    tests = ((split, _classes(splits[split])) for split in TEST_SPLITS if split in splits)
    split, classes = next(((split, classes) for split, classes in tests if classes is not None), (None, None))
    if split is None:
        raise ValueError(
            f"`streaming` needs a labeled split `test` or `validation`, but the dataset {name!r} has only: "
            f"{', '.join(loaded)}. Add one, or leave out `streaming` to have a fifth of the images set apart."
        )
    warn_of_unused_images(name, loaded, ("train", split))
    check_image_range(name, [splits["train"], splits[split]], image_range)
    train = splits["train"] if train_size is None else splits["train"].take(train_size)
    train = train.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    return IterableDatasetDict(
        train=_with_classes(name, "train", train, classes), test=_with_classes(name, split, splits[split], classes)
    )


class RepeatedStream(torch.utils.data.IterableDataset):
    """
    Repeat a stream for ever, each pass in another order. Trainer repeats streams too, but finds its place in the first pass
    only, so that a resumed run would go on with other images than a run that was never stopped.

    Args:
        stream (`IterableDataset`): The dataset of one pass.
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
    dataset: IterableDatasetDict,
    processor: BaseImageProcessor,
    skip_corrupt_images: bool = False,
    image_range: Sequence[float] | None = None,
) -> dict[str, torch.utils.data.IterableDataset]:
    """
    Turn the images into what a model takes while they are read; see [`~hf_aace.vision.images.image_transform`].

    Args:
        dataset (`IterableDatasetDict`): With the columns `image` and `label`.
        processor (`BaseImageProcessor`): The image processor of the model.
        skip_corrupt_images (`bool`, *optional*, defaults to `False`):
            Leave out images that cannot be decoded, with a warning for each. By default they are an error.
        image_range (`Sequence[float]`, *optional*):
            The values that become black and white, see [`~hf_aace.vision.images.decode_image`].

    Returns:
        `dict[str, IterableDataset]`: `train`, without end (see [`RepeatedStream`]), and `test`.
    """
    transform = image_transform(processor, skip_corrupt_images=skip_corrupt_images, image_range=image_range)
    dataset = dataset.map(transform, batched=True, batch_size=_DECODED_AT_ONCE, remove_columns=["image", "label"])
    return {"train": RepeatedStream(dataset["train"]), "test": dataset["test"]}


def _classes(test: IterableDataset) -> ClassLabel | None:
    """Read the classes of a split, `None` if it has no labels."""
    feature = test.features["label"]
    labels = (row["label"] for row in test.select_columns(["label"]))
    if isinstance(feature, ClassLabel):
        first = next(labels, None)
        return None if first is None or first < 0 else feature
    found = set(labels) - {None}
    # Competitions that withhold the test labels write -1.
    return None if found <= {-1} else ClassLabel(names=[str(value) for value in sorted(found)])


def _with_classes(name: str, split: str, dataset: IterableDataset, classes: ClassLabel) -> IterableDataset:
    own = dataset.features["label"]

    def number(label: Any) -> dict[str, int]:
        known = class_name(label, own, classes)
        if known is None:
            raise ValueError(f"An image of the split `{split}` of the dataset {name!r} has no label. Leave it out.")
        if known not in classes.names:
            raise ValueError(
                f"The split `{split}` of the dataset {name!r} has an image of the class {known!r}, which no test image has: "
                f"{first_few(classes.names)}. Leave it out, or leave out `streaming`."
            )
        return {"label": classes.str2int(known)}

    features = Features(image=Image(decode=False), label=classes)
    return dataset.map(number, input_columns=["label"], features=features)
