# SPDX-License-Identifier: Apache-2.0
"""Labelled images as `datasets`: scikit-learn's digits, a folder, or the Hub; checked before training starts."""

from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.utils import tqdm
from sklearn.datasets import load_digits
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging


logger = logging.get_logger(__name__)

_DIGITS_TEST_SIZE = 500
_TEST_FRACTION = 0.2
# Test images stay the same whatever the seed of a run, or the runs could not be compared.
_SPLIT_SEED = 0
_TEST_SPLITS = ("test", "validation")


def load_image_dataset(
    name: str,
    *,
    seed: int,
    train_size: int | None = None,
    label_noise: float = 0.0,
    validation_size: float = 0.0,
) -> DatasetDict:
    """
    Loads a data set for image classification.

    Args:
        name (`str`):
            `"digits"` for the 1797 scans of 8x8 pixels that come with scikit-learn; or a folder of images in one
            sub-folder for each class, perhaps below `train` and `test`; or the id of a data set on the Hub. Anything
            that is a folder here is read as one, save `"digits"`: write `"./digits"` for a folder of that name.
        seed (`int`):
            Draws the images that `train_size` and `validation_size` take and those that `label_noise` changes. The test
            images do not depend on it.
        train_size (`int`, *optional*):
            Keep this many training images, with about the shares that the classes have, and each class at least once.
            Defaults to all.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Share of the training images, in `[0, 1)`, whose label is replaced by another class, drawn uniformly; of the
            validation images too, as they come from the same source. Test labels are never changed.
        validation_size (`float`, *optional*, defaults to `0.0`):
            Share of the training images, in `[0, 1)`, to set apart as validation images, before `train_size` is taken of
            the rest.

    Returns:
        `DatasetDict`: The splits `train` and `test`, and `validation` if `validation_size` asks for it, with the columns `image` ([`~datasets.Image`]) and `label`
        ([`~datasets.ClassLabel`]). A data set without a labelled `test` or `validation` split has a fifth of its images
        set apart as test images.

    Raises:
        `ValueError`: If an argument is out of range, or the data set cannot be found, lacks images, labels or classes,
            or a local image cannot be read; the message names it and says how to mend it.
    """
    if not 0 <= label_noise < 1:
        raise ValueError(f"`label_noise` must lie in [0, 1), got {label_noise}. Use 0 for the labels as they are.")
    if not 0 <= validation_size < 1:
        raise ValueError(
            f"`validation_size` must lie in [0, 1), got {validation_size}. Use 0 for no validation images."
        )
    if name == "digits":
        splits = _load_digits()
    elif Path(name).is_dir():
        splits = _load_folder(name)
    else:
        splits = _load_from_hub(name)
    test = splits.pop("test")
    if validation_size > 0:
        splits = _split(splits["train"], round(validation_size * len(splits["train"])), seed)
        splits["validation"] = splits.pop("test")
    if train_size is not None:
        splits["train"] = _take(splits["train"], train_size, seed)
    if label_noise > 0:
        splits = DatasetDict({name: _with_label_noise(split, label_noise, seed) for name, split in splits.items()})
    return DatasetDict(**splits, test=test)


def image_transform(processor: BaseImageProcessor) -> Callable[[dict[str, list]], dict[str, Any]]:
    """
    Makes the function that turns a batch of images and labels into what a model takes, for
    [`~datasets.Dataset.with_transform`]. The training arguments need `remove_unused_columns=False`.

    Args:
        processor (`BaseImageProcessor`):
            The image processor of the model.

    Returns:
        `Callable`: A function from a batch with `image` and `label` to one with `pixel_values` and `labels`. Images may
        be decoded or, from a column cast to `Image(decode=False)`, still be encoded. It raises a `ValueError` for an
        encoded image that cannot be decoded, and names the file.
    """

    # On the fly rather than mapped beforehand: the same one way serves data sets that do not fit into memory, and
    # augmentation. A digit costs about 0.1 ms this way, an epoch of the digits 0.2 s.
    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images = [_decode(image).convert("RGB") for image in batch["image"]]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": batch["label"]}

    return transform


def _load_digits() -> DatasetDict:
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    dataset = Dataset.from_dict(
        {"image": [PIL.Image.fromarray(array) for array in pixels], "label": digits.target},
        features=Features(image=Image(), label=ClassLabel(names=[str(name) for name in digits.target_names])),
    )
    return _split(dataset, _DIGITS_TEST_SIZE, _SPLIT_SEED)


def _load_folder(name: str) -> DatasetDict:
    extensions = PIL.Image.registered_extensions()
    if not any(path.suffix.lower() in extensions for path in Path(name).rglob("*")):
        raise ValueError(
            f"The folder {name!r} given as `dataset_name` holds no images. Put them into one sub-folder for each class."
        )
    splits = load_dataset("imagefolder", data_dir=name)
    # `imagefolder` leaves the labels out, of the column or altogether, where it finds no two classes at one depth. With
    # a metadata file there are columns of its own instead.
    if any(
        set(split.column_names) <= {"image", "label"} and not ("label" in split.column_names and _is_labelled(split))
        for split in splits.values()
    ):
        folders = sorted({str(Path(path).parent) for path in _paths(splits)})
        raise ValueError(
            f"The folder {name!r} given as `dataset_name` must have one sub-folder for each class, at least two of "
            f"them to train on and all at the same depth, but its images lie in: {_first_few(folders)}."
        )
    splits = _train_and_test(name, splits)
    _check_images(name, splits)
    return splits


def _load_from_hub(name: str) -> DatasetDict:
    try:
        splits = load_dataset(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`dataset_name` is {name!r}: neither `digits`, nor a folder, nor a data set that could be loaded from the "
            f"Hub: {error}"
        ) from error
    return _train_and_test(name, splits)


def _train_and_test(name: str, splits: DatasetDict) -> DatasetDict:
    """Brings loaded splits into the form that [`load_image_dataset`] returns, or says why it cannot."""
    if "train" not in splits:
        raise ValueError(f"The data set {name!r} must have a split named `train`, but has: {', '.join(splits)}.")
    splits = DatasetDict({split: _image_and_label(name, dataset) for split, dataset in splits.items()})
    train = splits["train"]
    if not _is_labelled(train):
        raise ValueError(f"Some training images of the data set {name!r} have no label. Leave them out.")
    present = np.unique(_labels(train))
    if len(present) < 2:
        raise ValueError(
            f"All training images of the data set {name!r} are of one class, "
            f"{train.features['label'].int2str(int(present[0]))!r}. Classification needs two classes at least."
        )
    # The test labels of a public competition are often withheld.
    labelled = [split for split in _TEST_SPLITS if split in splits and _is_labelled(splits[split])]
    if labelled:
        return DatasetDict(train=train, test=splits[labelled[0]])
    return _split(train, round(_TEST_FRACTION * len(train)), _SPLIT_SEED)


def _image_and_label(name: str, dataset: Dataset) -> Dataset:
    image, label = _find_column(name, dataset, Image, "image"), _find_column(name, dataset, ClassLabel, "label")
    dataset = dataset.select_columns([image, label])
    return dataset.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def _find_column(name: str, dataset: Dataset, kind: type, preferred: str) -> str:
    found = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if not found:
        raise ValueError(
            f"The data set {name!r} must have a column of type `{kind.__name__}`, but its columns are: "
            f"{dict(dataset.features)}. Cast one of them and save the data set."
        )
    if preferred in found:
        return preferred
    if len(found) > 1:
        logger.warning(f"The data set {name!r} has several {kind.__name__} columns, {found}: using {found[0]!r}.")
    return found[0]


def _labels(dataset: Dataset) -> np.ndarray:
    return np.array(dataset["label"][:])


def _is_labelled(dataset: Dataset) -> bool:
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
    Draws `size` indices, in ascending order, such that each class keeps about its share. Unlike scikit-learn's splitter
    it takes at least one of each class if `size` allows, and a class may have a single image.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = np.arange(len(members)) / len(members)
    # The drawn order breaks the ties between classes.
    return np.sort(order[np.argsort(place[order], kind="stable")[:size]])


def _with_label_noise(train: Dataset, label_noise: float, seed: int) -> Dataset:
    feature = train.features["label"]
    labels = _labels(train)
    generator = np.random.default_rng(seed)
    changed = generator.choice(len(labels), size=round(label_noise * len(labels)), replace=False)
    shift = generator.integers(1, feature.num_classes, size=len(changed))
    labels[changed] = (labels[changed] + shift) % feature.num_classes
    return train.remove_columns("label").add_column("label", labels, feature=feature)


def _paths(splits: DatasetDict) -> list[str]:
    encoded = splits.cast_column("image", Image(decode=False))
    return [image["path"] for split in encoded.values() for image in split["image"]]


def _check_images(name: str, splits: DatasetDict) -> None:
    paths = _paths(splits)
    with ThreadPool() as pool:
        problems = list(
            tqdm(pool.imap(_problem, paths, chunksize=16), total=len(paths), desc="Checking the images", delay=1)
        )
    unreadable = [f"{path} ({problem})" for path, problem in zip(paths, problems, strict=True) if problem]
    if unreadable:
        raise ValueError(
            f"{len(unreadable)} of the {len(paths)} images in the folder {name!r} cannot be read: "
            f"{_first_few(unreadable)}. Replace or delete them."
        )


def _problem(path: str) -> str | None:
    """Says why the image cannot be read, or returns `None` if it can."""
    try:
        with PIL.Image.open(path) as image:
            # Lets JPEG decode at an eighth of the size, which still reads, and so checks, the whole file.
            image.draft("L", (1, 1))
            image.load()
    except Exception as error:  # Pillow's decoders raise what they stumble on: OSError, SyntaxError, struct.error, ...
        return str(error) or type(error).__name__
    return None


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")


def _decode(image: PIL.Image.Image | dict) -> PIL.Image.Image:
    if not isinstance(image, dict):
        return image
    try:
        return Image().decode_example(image)
    except Exception as error:  # As above.
        raise ValueError(f"The image {image['path'] or ''!r} cannot be decoded: {error}") from error
