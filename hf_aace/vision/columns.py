# SPDX-License-Identifier: Apache-2.0
"""Which columns of a data set hold the images and the labels, and the labels as classes."""

from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Where no column is a `ClassLabel`, the first of these is taken for the labels. Others may be anything: an id, a caption.
_LABEL_NAMES = ("label", "labels", "class", "cls", "category", "target", "json.label", "json.class", "json.cls")


def find_columns(
    name: str, features: Features, image_column_name: str | None = None, label_column_name: str | None = None
) -> tuple[str, str]:
    """
    Finds the columns of the images and of the labels.

    Args:
        name (`str`):
            The name of the data set, for messages.
        features (`Features`):
            Its columns. Fields of a column of dictionaries have the name of that column, a dot, and their own.
        image_column_name (`str`, *optional*):
            The column of the images. Defaults to `image`, or else the first that holds images.
        label_column_name (`str`, *optional*):
            The column of the labels. Defaults to one of type [`~datasets.ClassLabel`], or else one with a usual name, such as
            `label` or `cls`.

    Returns:
        `tuple[str, str]`: The two names.

    Raises:
        `ValueError`: If there is no such column, or its type is another.
    """
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    images = images or [column for column, feature in features.items() if _is_image(feature)]
    classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    usual = [column for column in _LABEL_NAMES if column in features]
    image = _column(name, features, "image_column_name", image_column_name, images, "image")
    label = _column(name, features, "label_column_name", label_column_name, classes or usual[:1], "label")
    if not _is_image(features[image]):
        raise _wrong_type(name, features, image, "image_column_name", "encoded images")
    if not _is_label(features[label]):
        raise _wrong_type(name, features, label, "label_column_name", "one class, string or integer for each image")
    return image, label


def _column(name: str, features: Features, argument: str, given: str | None, found: list[str], usual: str) -> str:
    columns = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())
    if given is not None:
        if given not in features:
            raise ValueError(f"`{argument}` is {given!r}, but the columns of the data set {name!r} are: {columns}.")
        return given
    if not found:
        raise ValueError(
            f"No column of {usual}s was found in the data set {name!r}. Its columns are: {columns}. Say which by "
            f"`{argument}`."
        )
    if usual in found:
        return usual
    if len(found) > 1:
        logger.warning(
            f"The data set {name!r} has several columns of {usual}s, {', '.join(found)}: using {found[0]!r}. Say which by "
            f"`{argument}`."
        )
    return found[0]


def _wrong_type(name: str, features: Features, column: str, argument: str, content: str) -> ValueError:
    return ValueError(
        f"The column {column!r} of the data set {name!r} must hold {content}, but its type is {_kind(features[column])}. "
        f"Name another by `{argument}`, or convert it."
    )


def untyped_images(features: Features) -> list[str]:
    """The columns that hold encoded images but are not typed so: other programs than `datasets` leave that out."""
    return [
        name for name, feature in features.items() if isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    ]


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))


def _is_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value)
        and (feature.dtype in ("string", "large_string", "bool") or feature.dtype.startswith(("int", "uint")))
    )


def _kind(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def with_classes(name: str, splits: DatasetDict) -> DatasetDict:
    """
    Gives all splits labels of one type [`~datasets.ClassLabel`], that of the training images.

    Args:
        name (`str`): The name of the data set, for messages.
        splits (`DatasetDict`): The splits, `train` among them, with a column `label` of classes, strings or integers.

    Returns:
        `DatasetDict`: The splits. Strings and integers are the names of classes, in ascending order. A label that is missing
        is `None`; of integers in the other splits also -1, unless a training image has it.

    Raises:
        `ValueError`: If a training image has no label, every one has its own, or another split has a class that training
            lacks.
    """
    train = splits["train"]
    feature = train.features["label"]
    if not isinstance(feature, ClassLabel):
        values = train["label"][:]
        if any(value is None for value in values):
            raise ValueError(f"Some training images of the data set {name!r} have no label. Leave them out.")
        classes = sorted(set(values))
        if len(classes) == len(values) > 2:
            raise ValueError(
                f"Every training image of the data set {name!r} has a label of its own, such as {classes[0]!r}: that is no "
                "class. Name another column by `label_column_name`."
            )
        feature = ClassLabel(names=[str(value) for value in classes])
    return DatasetDict({split: _with_class_label(name, split, part, feature) for split, part in splits.items()})


def _with_class_label(name: str, split: str, dataset: Dataset, feature: ClassLabel) -> Dataset:
    own = dataset.features["label"]
    if own == feature:
        return dataset
    if not _is_label(own):
        raise ValueError(
            f"The labels of the split `{split}` of the data set {name!r} are of type {_kind(own)}, unlike those of `train`."
        )
    names = [class_name(value, own, feature) for value in dataset["label"]]
    unseen = sorted({label for label in names if label is not None and label not in feature.names})
    if unseen:
        raise unseen_classes(name, split, unseen)
    numbers = [None if label is None else feature.str2int(label) for label in names]
    return dataset.remove_columns("label").add_column("label", numbers, feature=feature)


def class_name(value: Any, own: Any, feature: ClassLabel) -> str | None:
    """The name of the class that a label of the type `own` stands for, `None` for one that is missing."""
    if value is None or (isinstance(own, ClassLabel) and value < 0):
        return None
    if isinstance(own, ClassLabel):
        return own.int2str(value)
    # As competitions do whose test labels are withheld.
    return None if value == -1 and "-1" not in feature.names else str(value)


def unseen_classes(name: str, split: str, classes: list[str]) -> ValueError:
    """The error for a split with classes that no training image has."""
    several = "classes" if len(classes) > 1 else "class"
    return ValueError(
        f"The split `{split}` of the data set {name!r} has images of the {several} {', '.join(map(repr, classes[:5]))}"
        f"{', ...' if len(classes) > 5 else ''}, of which `train` has none. Add some there, or leave these out."
    )
