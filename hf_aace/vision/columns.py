# SPDX-License-Identifier: Apache-2.0
"""Find the columns of images and labels in a dataset, and number the classes alike in all splits."""

from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value
from transformers.utils import logging

from .messages import first_few


logger = logging.get_logger(__name__)

TEST_SPLITS = ("test", "validation")
# Names that a column of labels usually has. Columns with other names may hold anything: ids, captions.
_LABEL_NAMES = ("label", "labels", "class", "cls", "category", "target", "json.label", "json.class", "json.cls")


def image_and_label(
    name: str,
    splits: DatasetDict | IterableDatasetDict,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
) -> dict[str, Dataset | IterableDataset]:
    """
    Select, in the splits `train`, `test` and `validation` that have both, the columns of images and labels, as [`find_columns`]
    finds them, and call them `image` ([`~datasets.Image`], left encoded if they are streamed) and `label` (of the type that it
    has). Refuse a dataset without `train` or without such columns; `name` is for messages.
    """
    if "train" not in splits:
        raise ValueError(f"The dataset {name!r} must have a split named `train`, but has: {', '.join(splits)}.")
    selected, columns = {}, None
    for split in ("train", *TEST_SPLITS):
        if split not in splits:
            continue
        part = splits[split]
        if part.features is None:
            raise ValueError(
                f"The columns of the dataset {name!r} are not known before it is read. Leave out `streaming`."
            )
        # Programs other than `datasets` write encoded images without their type.
        for column, feature in part.features.items():
            if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
                part = part.cast_column(column, Image())
        flat = part.features.flatten()
        columns = columns or find_columns(name, flat, image_column_name, label_column_name)
        if set(columns) <= set(flat):  # a test split may lack labels
            selected[split] = _select(part, *columns)
    return selected


def _select(dataset: Dataset | IterableDataset, image: str, label: str) -> Dataset | IterableDataset:
    streamed = isinstance(dataset, IterableDataset)
    # First, since a stream decodes its images to rename or map their columns.
    dataset = dataset.cast_column(image, Image(decode=False)) if streamed else dataset.flatten()
    if label not in dataset.features:  # a field of a JSON column, which a stream does not flatten
        column, _, field = label.partition(".")
        features = Features({image: Image(decode=False), label: dataset.features[column][field]})
        others = [other for other in dataset.features if other != image]
        dataset = dataset.map(
            lambda row: {label: row[column] and row[column][field]}, remove_columns=others, features=features
        )
    dataset = dataset.select_columns([image, label])
    new_names = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    dataset = dataset.rename_columns(new_names)
    return dataset if streamed else dataset.cast_column("image", Image())


def find_columns(
    name: str, features: Features, image_column_name: str | None = None, label_column_name: str | None = None
) -> tuple[str, str]:
    """
    Find the column of the images, by default `image` or else the first that holds images, and that of the labels, by default
    one of type [`~datasets.ClassLabel`] or else one with a usual name, such as `label` or `cls`. Refuse a dataset without such
    a column, and a type that does not serve. A field of a JSON column is named by the column, a dot, and the field.
    """
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    images = images or [column for column, feature in features.items() if _is_image(feature)]
    classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    usual = [column for column in _LABEL_NAMES if column in features]
    image = _column(name, features, "image_column_name", image_column_name, images, "image")
    label = _column(name, features, "label_column_name", label_column_name, classes or usual[:1], "label")
    for column, serves, argument, content in (
        (image, _is_image, "image_column_name", "encoded images"),
        (label, _is_label, "label_column_name", "one class, string or integer for each image"),
    ):
        if not serves(features[column]):
            raise ValueError(
                f"The column {column!r} of the dataset {name!r} must hold {content}, but its type is "
                f"{_type_name(features[column])}. Name another by `{argument}`, or convert it."
            )
    return image, label


def _column(name: str, features: Features, argument: str, given: str | None, found: list[str], usual: str) -> str:
    columns = ", ".join(f"{column} ({_type_name(feature)})" for column, feature in features.items())
    if given is not None:
        if given not in features:
            raise ValueError(f"`{argument}` is {given!r}, but the columns of the dataset {name!r} are: {columns}.")
        return given
    if not found:
        raise ValueError(
            f"No column of {usual}s was found in the dataset {name!r}. Its columns are: {columns}. Name one by `{argument}`."
        )
    if usual in found:
        return usual
    if len(found) > 1:
        logger.warning(
            f"The dataset {name!r} has several columns of {usual}s, {', '.join(found)}: using {found[0]!r}. Name another by "
            f"`{argument}`."
        )
    return found[0]


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))


def _is_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value)
        and (feature.dtype in ("string", "large_string", "bool") or feature.dtype.startswith(("int", "uint")))
    )


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def with_classes(name: str, splits: dict[str, Dataset], to_train: bool = True) -> DatasetDict:
    """
    Give the labels of all splits, classes, strings or integers, the type [`~datasets.ClassLabel`] of the training images.
    Strings and integers become the names of classes, in ascending order. A missing label is `None`; in the other splits -1 is one
    too, unless a training image has it. A split that has the classes of `train` already is left as it is, -1 included.

    Refuse classes of other splits that no training image has. If the training labels are strings or integers, refuse missing ones,
    and `to_train` on more than two that all differ and of which the other splits have none.

    `class_encode_column` and `align_labels_with_mapping` of `datasets` do not serve: the one sorts numbers by their digits and
    encodes each split by itself, the other takes names that differ only in case for one.
    """
    feature = splits["train"].features["label"]
    if not isinstance(feature, ClassLabel):
        labels = splits["train"]["label"][:]
        if None in labels:
            raise ValueError(
                f"Some training images of the dataset {name!r} have no label. Leave them out. If their class is called None, NA or null, a "
                "metadata.csv takes it for a missing value: write a metadata.jsonl, or rename the class."
            )
        classes = sorted(set(labels))
        elsewhere = {label for split, part in splits.items() if split != "train" for label in part["label"]}
        if to_train and len(classes) == len(labels) > 2 and elsewhere.isdisjoint(classes):
            raise ValueError(
                f"Every training image of the dataset {name!r} has a label of its own, such as {classes[0]!r}: these are no "
                "classes. Name another column by `label_column_name`."
            )
        feature = ClassLabel(names=[str(value) for value in classes])
    return DatasetDict({split: _with_class_label(name, split, part, feature) for split, part in splits.items()})


def _with_class_label(name: str, split: str, dataset: Dataset, feature: ClassLabel) -> Dataset:
    own = dataset.features["label"]
    if own == feature:
        return dataset
    if not _is_label(own):
        raise ValueError(
            f"The labels of the split `{split}` of the dataset {name!r} are of type {_type_name(own)}, unlike those of `train`."
        )
    names = [class_name(value, own, feature) for value in dataset["label"]]
    if unseen := sorted(set(names) - {None, *feature.names}):
        raise unseen_classes(name, split, unseen)
    numbers = [None if label is None else feature.str2int(label) for label in names]
    return dataset.remove_columns("label").add_column("label", numbers, feature=feature)


def class_name(value: Any, own: Any, classes: ClassLabel) -> str | None:
    """
    Give the name of the class that a label in a column of type `own` stands for, `None` for a missing one. The name need not be
    among the `classes` of the training images.
    """
    if value is None or (isinstance(own, ClassLabel) and value < 0):
        return None
    if isinstance(own, ClassLabel):
        return own.int2str(value)
    # Competitions that withhold the test labels write -1.
    return None if value == -1 and "-1" not in classes.names else str(value)


def unseen_classes(name: str, split: str, classes: list[str]) -> ValueError:
    """Make the error for a split with images of classes that no training image has."""
    return ValueError(
        f"The split `{split}` of the dataset {name!r} has images of the {'classes' if len(classes) > 1 else 'class'} "
        f"{first_few([repr(label) for label in classes])}, of which `train` has none. Add some there, or leave these out."
    )
