# SPDX-License-Identifier: Apache-2.0
"""Load labeled images to train and test on: scikit-learn's digits, a folder, files, or a dataset on the Hub."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    disable_caching,
    enable_caching,
    is_caching_enabled,
)
from sklearn.datasets import load_digits
from transformers.utils import logging

from .columns import TEST_SPLITS, image_and_label, unseen_classes, with_classes
from .corrupt import without_corrupt_images
from .folders import load_splits, metadata_hint, warn_of_unused_images
from .messages import first_few
from .value_range import check_image_range


logger = logging.get_logger(__name__)

_DIGITS_TEST_SIZE = 500
_TEST_FRACTION = 0.2
# The description of test images that the dataset did not have.
SET_APART = "Set apart from the training images."
# Test images stay the same whatever the seed of a run, or the runs could not be compared.
_SPLIT_SEED = 0


def load_image_dataset(
    name: str,
    *,
    seed: int,
    train_size: int | None = None,
    label_noise: float = 0.0,
    validation_size: float = 0.0,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    skip_corrupt_images: bool = False,
    image_range: Sequence[float] | None = None,
    to_train: bool = True,
) -> DatasetDict:
    """
    Load a dataset for image classification.

    Args:
        name (`str`):
            `"digits"` for the 1797 scans of 8x8 pixels that come with scikit-learn; or a folder of images with one
            sub-folder for each class, or these below `train` and `test`; or a folder written by `save_to_disk`; or a file,
            or a folder of files, in parquet or as WebDataset shards (`.tar`); or the id of a dataset on the Hub. A local
            folder goes before the Hub, except for `"digits"`: write `"./digits"` for a folder of that name.
        seed (`int`):
            Draws the images that `train_size` and `validation_size` take and those that `label_noise` changes. The test
            images do not depend on it.
        train_size (`int`, *optional*):
            Keep this many training images. Each class keeps about its share, and at least one image. Defaults to all.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Share of the training images, in `[0, 1)`, whose label is replaced by another class, drawn uniformly; and of the
            validation images, which come from the same source. Test labels are never changed.
        validation_size (`float`, *optional*, defaults to `0.0`):
            Share of the training images, in `[0, 1)`, to set apart as validation images. They are set apart before
            `train_size` is taken from the rest.
        image_column_name (`str`, *optional*):
            The column of the images. Defaults to what [`~hf_aace.vision.columns.find_columns`] finds.
        label_column_name (`str`, *optional*):
            The column of the labels: classes, strings or integers. Defaults to what
            [`~hf_aace.vision.columns.find_columns`] finds. A field of a JSON column is named `json.field`.
        skip_corrupt_images (`bool`, *optional*, defaults to `False`):
            Decode every image beforehand and leave out those that cannot be decoded, with a warning that names and counts
            them. By default they are an error: local images beforehand, images of the Hub when a batch is made.
        image_range (`Sequence[float]`, *optional*):
            The values that become black and white when the images are decoded, see
            [`~hf_aace.vision.images.decode_image`]. Some images are compared with it, or with what the type of their files
            can hold, and a warning says if they do not fit. The images themselves are not changed.
        to_train (`bool`, *optional*, defaults to `True`):
            `False` for images that a trained model is evaluated on: the labeled splits are returned as they are, and they may be
            of one class, or of one image for each. `train_size`, `label_noise` and `validation_size` are then not used. The digits
            are always split.

    Returns:
        `DatasetDict`: The splits `train` and `test`, and `validation` if `validation_size` asks for it or the dataset has
        it beside `test`, with the columns `image` ([`~datasets.Image`]) and `label` ([`~datasets.ClassLabel`]). A dataset
        without a labeled split `test` has its split `validation` as `test`, and without either a fifth of its images.

    Raises:
        `ValueError`: If an argument is out of range; or if the dataset cannot be found, lacks images, labels or classes, or
            has a local image that cannot be read. The message names it and the fix.
    """
    if not 0 <= label_noise < 1:
        raise ValueError(f"`label_noise` must lie in [0, 1), got {label_noise}. Use 0 for the labels as they are.")
    if not 0 <= validation_size < 1:
        raise ValueError(
            f"`validation_size` must lie in [0, 1), got {validation_size}. Use 0 for no validation images."
        )
    if name == "digits":
        splits = _load_digits()
    else:
        splits = _load(name, image_column_name, label_column_name, skip_corrupt_images, to_train)
        check_image_range(name, splits.values(), image_range)
        if not to_train:
            return splits
    test = splits.pop("test")
    if validation_size > 0:
        if splits.pop("validation", None) is not None:
            logger.warning(
                f"The validation images of {name!r} are not used, since `validation_size` sets others apart. Leave it out."
            )
        size = round(validation_size * len(splits["train"]))
        if not 1 <= size <= len(splits["train"]) - len(np.unique(_labels(splits["train"]))):
            raise ValueError(
                f"`validation_size={validation_size}` of the {len(splits['train'])} training images are {size}: that must "
                "be one at least, and leave one of each class to train on."
            )
        splits = _split(splits["train"], size, seed)
        splits["validation"] = splits.pop("test")
    if train_size is not None:
        splits["train"] = _take(splits["train"], train_size, seed)
    if label_noise > 0:
        splits = DatasetDict({name: _with_label_noise(split, label_noise, seed) for name, split in splits.items()})
    return DatasetDict(**splits, test=test)


def _load_digits() -> DatasetDict:
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    dataset = Dataset.from_dict(
        {"image": [PIL.Image.fromarray(array) for array in pixels], "label": digits.target},
        features=Features(image=Image(), label=ClassLabel(names=[str(name) for name in digits.target_names])),
    )
    return _split(dataset, _DIGITS_TEST_SIZE, _SPLIT_SEED)


def _load(
    name: str, image_column_name: str | None, label_column_name: str | None, skip_corrupt: bool, to_train: bool
) -> DatasetDict:
    """Load the splits that are labeled and readable; those to train on are `train`, `test` and perhaps `validation`."""
    loaded = load_splits(name, one_class=not to_train)
    try:
        splits = with_classes(name, image_and_label(name, loaded, image_column_name, label_column_name), to_train)
    except ValueError as error:
        raise ValueError(f"{error}{metadata_hint(name)}") from error
    for split in TEST_SPLITS:  # public competitions often withhold the test labels
        if split in splits and not _is_labeled(splits[split]):
            del splits[split]
    warn_of_unused_images(name, loaded, splits)
    if skip_corrupt or Path(name).exists():  # to check all images of the Hub may take longer than to train on them
        splits = without_corrupt_images(name, splits, skip_corrupt)
    if not _is_labeled(splits["train"]):
        raise ValueError(f"Some training images of the dataset {name!r} have no label. Leave them out.")
    if to_train:
        return _train_and_test(name, splits)
    if not any(map(len, splits.values())):
        raise ValueError(f"The dataset {name!r} has no image that could be read.{metadata_hint(name)}")
    return splits


def _train_and_test(name: str, splits: DatasetDict) -> DatasetDict:
    """Choose the test and validation images, or set some apart, and check that all classes can be learned."""
    train = splits["train"]
    names, present = train.features["label"].names, np.unique(_labels(train))
    if len(present) < 2:
        found = f"of one class, {names[present[0]]!r}" if len(present) else "gone: there is none"
        raise ValueError(
            f"All training images of the dataset {name!r} are {found}. Classification needs two classes at least."
            f"{metadata_hint(name)}"
        )
    tests = [split for split in TEST_SPLITS if split in splits]
    for split in tests:
        if unseen := np.setdiff1d(_labels(splits[split]), present).tolist():
            raise unseen_classes(name, split, [names[index] for index in unseen])
        if len(splits[split]) == 0:
            raise ValueError(
                f"The split `{split}` of the dataset {name!r} has no image that could be read.{metadata_hint(name)}"
            )
    if tests:
        parts = DatasetDict(
            zip(("train", "test", "validation"), (splits[split] for split in ("train", *tests)), strict=False)
        )
    else:
        size = max(1, round(_TEST_FRACTION * len(train)))
        if len(train) - size < len(present):
            raise ValueError(
                f"The dataset {name!r} has {len(train)} images of {len(present)} classes and no test split: too few to set "
                "some apart for the test. Add some."
            )
        parts = _split(train, size, _SPLIT_SEED)
        parts["test"].info.description = SET_APART
    if missing := np.setdiff1d(present, _labels(parts["test"])).tolist():
        logger.warning(
            f"No test image of {name!r} is of the classes {first_few([names[index] for index in missing])}. The results on the "
            "test images say nothing about them."
        )
    return parts


def _labels(dataset: Dataset) -> np.ndarray:
    return np.array(dataset["label"][:])


def _is_labeled(dataset: Dataset) -> bool:
    return all(label is not None and label >= 0 for label in dataset["label"])


def _split(dataset: Dataset, test_size: int, seed: int) -> DatasetDict:
    train = _draw_stratified(_labels(dataset), len(dataset) - test_size, seed)
    test = np.setdiff1d(np.arange(len(dataset)), train)
    return DatasetDict(train=dataset.select(train), test=dataset.select(test))


def _take(train: Dataset, train_size: int, seed: int) -> Dataset:
    labels = _labels(train)
    classes = len(np.unique(labels))
    if not classes <= train_size <= len(train):
        raise ValueError(
            f"`train_size` must lie between the number of classes, {classes}, and that of training images, "
            f"{len(train)}, got {train_size}."
        )
    return train.select(_draw_stratified(labels, train_size, seed))


def _draw_stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """
    Draw `size` indices, in ascending order, so that each class keeps about its share. Unlike scikit-learn's splitter,
    take at least one of each class if `size` allows it, and accept classes of a single image.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = np.arange(len(members)) / len(members)
    # The drawn order breaks the ties between classes.
    return np.sort(order[np.argsort(place[order], kind="stable")[:size]])


@contextmanager
def without_cache_files() -> Iterator[None]:
    """
    Context manager and decorator that lets `datasets` write what it makes into its temporary folder, not beside the files of a
    dataset of `save_to_disk`, where the user may not even be allowed to write.
    """
    enabled = is_caching_enabled()
    disable_caching()
    try:
        yield
    finally:
        if enabled:
            enable_caching()


@without_cache_files()
def _with_label_noise(train: Dataset, label_noise: float, seed: int) -> Dataset:
    feature = train.features["label"]
    labels = _labels(train)
    generator = np.random.default_rng(seed)
    changed = generator.choice(len(labels), size=round(label_noise * len(labels)), replace=False)
    shift = generator.integers(1, feature.num_classes, size=len(changed))
    labels[changed] = (labels[changed] + shift) % feature.num_classes
    return train.remove_columns("label").add_column("label", labels, feature=feature)
