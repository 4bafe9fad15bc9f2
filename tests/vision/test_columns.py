# SPDX-License-Identifier: Apache-2.0
"""The columns taken for images and labels, labels of every type, and the formats that are read."""

import io
import json
import tarfile

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value

from hf_aace.vision.datasets import load_image_dataset


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
    # Of faces there may be one each to train on; the test images show that they are classes.
    faces = saved(tmp_path / "faces", train=made(["c", "b", "a"]), test=made(["a", "b", "b"]))
    assert named(load_image_dataset(faces, seed=0)["test"]) == {0: "a", 1: "b", 2: "b"}


# ---- Columns ---------------------------------------------------------------


def test_columns_are_those_that_are_named(tmp_path):
    labels = ["cat", "dog"] * 5
    dataset = made(labels, "species", size=[0, 1] * 5, other=[encoded(0)] * 10).cast_column("other", Image())
    name = saved(tmp_path / "set", train=dataset)
    with pytest.raises(
        ValueError, match=r"No column of labels .* columns are: image \(Image\), species \(string\).*`label_"
    ):
        load_image_dataset(name, seed=0)
    by_species = load_image_dataset(name, seed=0, label_column_name="species")["train"]
    assert by_species.features["label"].names == ["cat", "dog"]
    assert len(named(by_species)) == 8
    other = load_image_dataset(name, seed=0, image_column_name="other", label_column_name="size")["train"]
    assert other.features["label"].names == ["0", "1"]
    assert {np.asarray(image).max().item() for image in other["image"]} == {0}


@pytest.mark.parametrize(
    ("argument", "column", "complaint"),
    [
        ("image_column_name", "picture", "is 'picture', but the columns of .* are: image .*, label"),
        ("label_column_name", "species", "is 'species', but the columns of .* are: image .*, label"),
        ("image_column_name", "label", "must hold encoded images, but its type is int64"),
        ("label_column_name", "image", "must hold one class, string or integer for each image, but its type is Image"),
    ],
)
def test_a_named_column_that_does_not_serve_is_refused(tmp_path, argument, column, complaint):
    name = saved(tmp_path / "set", train=made([0, 1] * 5))
    with pytest.raises(ValueError, match=complaint) as error:
        load_image_dataset(name, seed=0, **{argument: column})
    assert f"`{argument}`" in str(error.value)


# ---- Formats ---------------------------------------------------------------


def write_shard(path, labels, start=0, field="cls"):
    """A WebDataset shard; the label as text in a file of its own, or as the field `label` of a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for index, label in enumerate(labels, start=start):
            text = str(label) if field == "cls" else json.dumps({"label": label, "height": 4})
            for suffix, content in (("png", encoded(index)["bytes"]), (field, text.encode())):
                member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def write_parquet(path, dataset, typed):
    path.parent.mkdir(parents=True, exist_ok=True)
    if typed:
        dataset.to_parquet(path)
    else:  # as other programs write it: bytes and paths, but nothing that says they are images
        pyarrow.parquet.write_table(dataset.data.table.replace_schema_metadata(None), path)


LABELS = ["cat", "dog"] * 5


@pytest.mark.parametrize("form", ["folder", "file", "untyped", "splits"])
def test_parquet(tmp_path, form):
    if form == "splits":
        write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet", made(LABELS[:5]), typed=True)
        write_parquet(tmp_path / "set" / "train-00001-of-00002.parquet", made(LABELS[5:]), typed=True)
        write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", made(LABELS), typed=True)
    else:
        write_parquet(tmp_path / "set" / "images.parquet", made(LABELS), typed=form != "untyped")
    name = tmp_path / "set" / "images.parquet" if form == "file" else tmp_path / "set"
    dataset = load_image_dataset(str(name), seed=0)
    assert (len(dataset["train"]), len(dataset["test"])) == ((10, 10) if form == "splits" else (8, 2))
    assert form == "splits" or named(dataset["train"]) | named(dataset["test"]) == dict(enumerate(LABELS))


def test_a_single_saved_data_set(tmp_path):
    made(LABELS).save_to_disk(tmp_path / "set")
    dataset = load_image_dataset(str(tmp_path / "set"), seed=0)
    assert named(dataset["train"]) | named(dataset["test"]) == dict(enumerate(LABELS))


@pytest.mark.parametrize(("field", "labels"), [("cls", [3, 7] * 5), ("json", LABELS)])
def test_webdataset_shards(tmp_path, field, labels):
    for shard in range(2):
        write_shard(tmp_path / "train" / f"{shard}.tar", labels[5 * shard : 5 * shard + 5], 5 * shard, field)
    write_shard(tmp_path / "test" / "0.tar", labels, field=field)
    dataset = load_image_dataset(str(tmp_path), seed=0)
    assert named(dataset["train"]) == named(dataset["test"]) == {i: str(label) for i, label in enumerate(labels)}


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "images.csv").write_text("image,label")
    with pytest.raises(ValueError, match=r"is the file .*images.csv', but a file must be of .parquet or .tar"):
        load_image_dataset(str(tmp_path / "images.csv"), seed=0)
