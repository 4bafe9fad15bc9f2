# SPDX-License-Identifier: Apache-2.0
"""Which columns are taken for images and labels, what becomes of labels of every type, and the formats that are read."""

import io
import json
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_aace.data import load_image_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(value):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{value}.png"}


def made(labels, column="label", feature=None, **others):
    """A data set with an image for each label, of the grey value of its index."""
    columns = {"image": [encoded(index) for index in range(len(labels))], column: labels, **others}
    dataset = Dataset.from_dict(columns).cast_column("image", Image())
    return dataset if feature is None else dataset.cast_column(column, feature)


def saved(folder, **splits):
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def named(dataset):
    """From the grey value of each image, the name of its class."""
    names = dataset.features["label"].names
    return {np.asarray(row["image"]).flat[0].item(): names[row["label"]] for row in dataset}


# ---- Labels ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["dog", "cat", "dog", "cat"], ["cat", "dog"]),
        ([10, 9, 10, 9], ["9", "10"]),  # numbers in their own order, not that of their digits
        ([-1, 1, -1, 1], ["-1", "1"]),
        ([True, False, True, False], ["False", "True"]),
    ],
)
def test_labels_of_other_types_become_classes(tmp_path, labels, names):
    name = saved(tmp_path / "set", train=made(labels), test=made(labels[::-1]))
    dataset = load_image_dataset(name, seed=0)
    assert dataset["train"].features["label"] == dataset["test"].features["label"] == ClassLabel(names=names)
    assert named(dataset["train"]) == {index: str(label) for index, label in enumerate(labels)}
    assert named(dataset["test"]) == {index: str(label) for index, label in enumerate(labels[::-1])}


def test_classes_numbered_otherwise_in_the_test_split_keep_their_names(tmp_path):
    train = made([0, 1, 0, 1], feature=ClassLabel(names=["cat", "dog"]))
    test = made([0, 1], feature=ClassLabel(names=["dog", "cat"]))
    dataset = load_image_dataset(saved(tmp_path / "set", train=train, test=test), seed=0)
    assert named(dataset["test"]) == {0: "dog", 1: "cat"}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (made(["cat", "dog", "cat"]), made(["dog", "eel"])),
        (
            made([0, 1, 0], feature=ClassLabel(names=["cat", "dog", "eel"])),
            made([2, 1], feature=ClassLabel(names=["cat", "dog", "eel"])),
        ),
        (made([0, 1, 0], feature=ClassLabel(names=["cat", "dog"])), made([0], feature=ClassLabel(names=["eel"]))),
    ],
)
def test_a_class_that_training_never_saw_is_refused(tmp_path, train, test):
    name = saved(tmp_path / "set", train=train, test=test)
    with pytest.raises(
        ValueError, match=r"The split `test` of .* has images of the class 'eel', of which `train` has none"
    ):
        load_image_dataset(name, seed=0)


@pytest.mark.parametrize("withheld", [-1, None])
def test_withheld_test_labels_are_no_class(tmp_path, withheld):
    test = made([withheld, withheld], feature=Value("int64"))
    dataset = load_image_dataset(saved(tmp_path / "set", train=made([0, 1] * 10), test=test), seed=0)
    assert (len(dataset["train"]), len(dataset["test"])) == (16, 4)


@pytest.mark.parametrize(("labels", "kind"), [([0.5, 1.5], "float64"), ([[0], [0, 1]], "List")])
def test_labels_of_a_wrong_type_are_refused(tmp_path, labels, kind):
    name = saved(tmp_path / "set", train=made(labels))
    with pytest.raises(
        ValueError, match=rf"column 'label' .* one class, string or integer .* its type is {kind}\. .*`label_"
    ):
        load_image_dataset(name, seed=0)


def test_a_label_for_each_image_is_no_class(tmp_path):
    with pytest.raises(ValueError, match=r"Every training image .* a label of its own, such as 'a'"):
        load_image_dataset(saved(tmp_path / "set", train=made(["c", "b", "a"])), seed=0)
