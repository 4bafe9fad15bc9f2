# SPDX-License-Identifier: Apache-2.0
"""Every image that lies in a dataset and is not used is counted, in one warning, by the reason; nothing else is."""

import io
import json
import os
import tarfile

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from packaging.version import Version

from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.streaming import stream_image_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(value, form="PNG"):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.arange(value, value + 192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, form)
    return buffer.getvalue()


def write(folder, *files):
    for index, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(encoded(index))


def classes(folder, *names, count=5):
    write(folder, *(f"{name}/{index}.png" for name in names for index in range(count)))


def unused(folder, warnings):
    """The one warning, after its beginning, and the number of images that are used."""
    dataset = load_image_dataset(str(folder), seed=0)
    found = [text for text in warnings if "are not used" in text]
    assert len(found) == 1, warnings
    count, text = found[0].split(f" of the images of {str(folder)!r} are not used: ")
    return int(count), text, sum(map(len, dataset.values()))


@pytest.mark.parametrize(
    ("files", "text"),
    [
        # Hidden, for `datasets`.
        ([".new/0.png", ".new/1.png"], "2 hidden, as a name in their path begins with `.` or `__` (.new/0.png)."),
        (["cat/.0.png"], "1 hidden, as a name in their path begins with `.` or `__` (cat/.0.png)."),
        (
            ["__a/0.png", "__b/0.png"],
            "2 hidden, as a name in their path begins with `.` or `__` (__a/0.png, __b/0.png).",
        ),
        (["cat/.ipynb_checkpoints/0-checkpoint.png"], "1 hidden,"),
        # Of another ending, or none, whatever a person or a camera calls it.
        (["cat/9.avif"], "1 of a kind that is not read, .avif (cat/9.avif)."),
        (["cat/9.HEIC"], "1 of a kind that is not read, .HEIC (cat/9.HEIC)."),
        (["cat/9", "dog/9"], "2 of a kind that is not read, without an ending (cat/9, dog/9)."),
        (["cat/9.img"], "1 of a kind that is not read, .img (cat/9.img)."),
        # For several reasons.
        (["__a/0.png", "cat/9.avif"], "1 hidden,"),
    ],
)
def test_images_that_are_hidden_or_have_another_ending_are_counted(files, text, tmp_path, warnings):
    classes(tmp_path, "cat", "dog")
    write(tmp_path, *files)
    count, found, used = unused(tmp_path, warnings)
    assert (count, used) == (len(files), 10)
    assert text in found


def test_several_reasons_are_in_one_warning_with_the_sum(tmp_path, warnings):
    classes(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog", "unlabelled", "train/__old")
    write(tmp_path, "cover.png", "train/cat/9.avif")
    count, text, used = unused(tmp_path, warnings)
    assert (count, used) == (12, 20)
    assert "5 hidden" in text and "(train/__old/0.png)" in text
    assert "1 of a kind that is not read, .avif (train/cat/9.avif)" in text
    assert "6 outside the folders of the splits, train, test (cover.png, unlabelled/0.png)" in text


def test_a_split_whose_folder_holds_images_alone_is_counted(tmp_path, warnings):
    """As competitions give test images without their labels."""
    classes(tmp_path, "train/cat", "train/dog", "test")
    count, text, used = unused(tmp_path, warnings)
    assert (count, used) == (5, 10) and "5 outside the folders of the splits, train (test/0.png)" in text


def test_links_that_lead_nowhere_are_counted(tmp_path, warnings):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "elsewhere.png")
    count, text, used = unused(tmp_path, warnings)
    assert (count, used) == (1, 10) and "broken links" in text and "cat/gone.png" in text


def write_metadata(path, rows):
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_images_that_a_metadata_file_does_not_list_are_counted(name, tmp_path, warnings):
    write(tmp_path, *(f"{index}.png" for index in range(13)), ".hidden.png")
    write_metadata(tmp_path / name, [{"file_name": f"{i}.png", "label": "ab"[i % 2]} for i in range(10)])
    count, text, used = unused(tmp_path, warnings)
    assert (count, used) == (4, 10)
    assert f"3 not listed, or without a label, in {name} (10.png)" in text and "1 hidden" in text


def test_a_metadata_file_in_one_folder_hides_the_others(tmp_path, warnings):
    classes(tmp_path, "cat", "dog", count=10)
    write_metadata(
        tmp_path / "cat" / "metadata.csv", [{"file_name": f"{i}.png", "label": "ab"[i % 2]} for i in range(10)]
    )
    count, text, used = unused(tmp_path, warnings)
    assert (count, used) == (10, 10) and "10 not listed, or without a label, in cat/metadata.csv (dog/0.png)" in text


def test_images_in_the_metadata_of_a_split_without_labels_are_counted(tmp_path, warnings):
    write(tmp_path, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(10)))
    for split, label in (("train", "ab"), ("test", [None, None])):
        rows = [{"file_name": f"{i}.png", "label": label[i % 2]} for i in range(10)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"The columns come from .*metadata.jsonl"):
        load_image_dataset(str(tmp_path), seed=0)
    rows = [{"file_name": f"{i}.png", "label": "a" if i else None} for i in range(10)]
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    count, text, used = unused(tmp_path, warnings)
    assert (count, used) == (10, 10) and "10 not listed, or without a label" in text and "(test/0.png)" in text


# ---- Datasets that are no folders of images --------------------------------


def table(labels, names=("a", "b")):
    return Dataset.from_dict(
        {"image": [{"bytes": encoded(index), "path": None} for index in range(len(labels))], "label": labels},
        features=Features(image=Image(), label=ClassLabel(names=list(names))),
    )


def shard(path, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for index in range(count):
            for suffix, content in (("png", encoded(index)), ("cls", str(index % 2).encode())):
                member = tarfile.TarInfo(f"{index}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "saved"])
def test_images_beside_the_files_of_a_dataset_are_counted(kind, tmp_path, warnings):
    if kind == "parquet":
        (tmp_path / "set").mkdir()
        table([0, 1] * 5).to_parquet(tmp_path / "set" / "images.parquet")
    elif kind == "webdataset":
        shard(tmp_path / "set" / "0.tar", 10)
    else:
        table([0, 1] * 5).save_to_disk(tmp_path / "set")
    write(tmp_path / "set", "logo.png", "assets/figure.jpg", "assets/other.heic")
    count, text, used = unused(tmp_path / "set", warnings)
    assert (count, used) == (3, 10)
    assert text == "3 beside the files that hold the dataset (assets/figure.jpg, logo.png)."


@pytest.mark.parametrize(
    ("split", "labels"), [("test", [-1] * 4), ("test", [None] * 4), ("Test", [0, 1] * 2), ("extra", [0, 1] * 2)]
)
def test_splits_without_labels_or_of_another_name_are_counted(split, labels, tmp_path, warnings):
    DatasetDict({"train": table([0, 1] * 5), split: table(labels)}).save_to_disk(tmp_path / "set")
    count, text, used = unused(tmp_path / "set", warnings)
    assert (count, used) == (4, 10) and f"4 of the split `{split}`, which has no labels or is not called" in text


def test_a_stream_counts_the_images_beside_its_files_too(tmp_path, warnings):
    for split in ("train", "test"):
        shard(tmp_path / "shards" / split / "0.tar", 10)
    write(tmp_path / "shards", "cover.jpg")
    stream_image_dataset(str(tmp_path / "shards"), seed=0)
    assert len(warnings) == 1 and "1 beside the files that hold the dataset (cover.jpg)" in warnings[0]


# ---- What is not counted ---------------------------------------------------


def test_files_that_are_no_images_are_not_counted(tmp_path, warnings):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    for file in (
        "README.md",
        "cat/0.json",
        "cat/0.xml",
        "cat/notes",
        ".DS_Store",
        "cat/._0.png",
        "__MACOSX/cat/._0.png",
    ):
        (tmp_path / file).write_bytes(b"\x00\x05\x16\x07 nothing to see")
    assert sum(map(len, load_image_dataset(str(tmp_path), seed=0).values())) == 10
    assert not warnings


def test_images_behind_links_and_in_relative_folders_are_not_counted(tmp_path, warnings, monkeypatch):
    classes(tmp_path / "elsewhere", "cat", "dog")
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "elsewhere" / name)
    monkeypatch.chdir(tmp_path)
    for name in ("linked", "./linked/", "elsewhere/../linked", os.path.abspath("linked")):
        assert sum(map(len, load_image_dataset(name, seed=0).values())) == 10
    assert not warnings


# ---- Errors ----------------------------------------------------------------


def test_a_folder_of_which_every_image_is_hidden_says_so(tmp_path):
    classes(tmp_path, "__cat__", ".dog")
    with pytest.raises(ValueError, match=r"holds no images but 10 hidden, .* \(.dog/0.png, __cat__/0.png\)"):
        load_image_dataset(str(tmp_path), seed=0)


def cut(*columns):
    """A metadata file of the first images with these columns, of which `caption` has a sentence for each image."""
    rows = [
        {"file_name": f"{name}/{i}.png", "caption": f"{name} {i}", "kind": "animal"}
        for name in ("cat", "dog")
        for i in range(5)
    ]
    return pd.DataFrame(rows)[list(columns)].to_csv(index=False)


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        (cut("file_name", "caption"), {}, "No column of labels was found"),
        (cut("file_name", "caption"), {"label_column_name": "caption"}, "has a label of its own"),
        (cut("file_name", "kind"), {"label_column_name": "kind"}, "are of one class, 'animal'"),
        (cut("file_name", "kind"), {"label_column_name": "label"}, "is 'label', but the columns of"),
        (cut("caption"), {}, "cannot be read: .*file_name"),
        ("file_name,label\n", {}, "cannot be read"),
        ("", {}, "cannot be read"),
        pytest.param(
            "file_name,label\n/etc/0.png,a\n",
            {},
            "cannot be read: Invalid metadata file_name",
            marks=pytest.mark.skipif(
                Version(datasets.__version__) < Version("5.1"), reason="datasets has another message"
            ),
        ),
    ],
)
def test_an_error_for_which_a_metadata_file_is_to_blame_names_it(content, options, problem, tmp_path):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "metadata.csv").write_text(content)
    hint = "The columns come from .*metadata.csv', which hides the names of the folders: move it away"
    with pytest.raises(ValueError, match=rf"{problem}.* {hint}".replace("metadata.csv'", "metadata.csv")):
        load_image_dataset(str(tmp_path), seed=0, **options)


def test_a_metadata_file_for_the_training_images_alone_is_named(tmp_path):
    """The class folders of the test images no longer count."""
    classes(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")
    rows = [{"file_name": f"{name}/{i}.png", "label": name} for name in ("cat", "dog") for i in range(5)]
    write_metadata(tmp_path / "train" / "metadata.csv", rows)
    with pytest.raises(
        ValueError, match=r'"test" corresponds to no data.* The columns come from .*train/metadata.csv'
    ):
        load_image_dataset(str(tmp_path), seed=0)


@pytest.mark.parametrize("file", ["train.parquet", "shard-0.tar", "cat/more.parquet", "dog/0.npy"])
def test_files_with_images_beside_the_folders_of_images_are_told(file, tmp_path, warnings):
    """What they hold is not read; metadata, which describes the images that are, is no such file."""
    classes(tmp_path, "cat", "dog")
    (tmp_path / file).write_bytes(b"what they hold is not looked at")
    count, text, used = unused(tmp_path, warnings)
    assert (count, used) == (1, 10) and f"1 in files beside the folders of images ({file})" in text


@pytest.mark.parametrize(
    ("images", "table"),
    [("images/{}.png", "labels.csv"), ("{}.png", "train_labels.CSV"), ("photos/{}.png", "photos/list.jsonl")],
)
def test_a_table_of_labels_that_is_not_read_is_named_and_what_to_do_helps(images, table, tmp_path):
    write(tmp_path, *(images.format(i) for i in range(10)))
    rows = [{"image_id": i, "breed": "ab"[i % 2]} for i in range(10)]
    table = tmp_path / table
    write_metadata(table.with_suffix(table.suffix.lower()), rows)
    table.with_suffix(table.suffix.lower()).rename(table)
    with pytest.raises(ValueError, match=rf"If {table.relative_to(tmp_path)} holds the labels: name it metadata.csv"):
        load_image_dataset(str(tmp_path), seed=0)
    table.unlink()
    rows = [
        {"file_name": os.path.relpath(tmp_path / images.format(i), table.parent), "label": "ab"[i % 2]}
        for i in range(10)
    ]
    write_metadata(table.parent / f"metadata{table.suffix.lower()}", rows)
    dataset = load_image_dataset(str(tmp_path), seed=0)
    assert dataset["train"].features["label"].names == ["a", "b"] and len(dataset["train"]) == 8


def test_tables_of_labels_beside_the_folders_of_splits_are_named(tmp_path):
    """As competitions lay them out; each folder alone would be a class."""
    write(tmp_path, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(10)))
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("id,label\n")
    with pytest.raises(ValueError, match=r"If test.csv, train.csv holds the labels.* Each split needs one of its own"):
        load_image_dataset(str(tmp_path), seed=0)
    for split in ("train", "test"):
        rows = [{"file_name": f"{i}.png", "label": "ab"[i % 2]} for i in range(10)]
        write_metadata(tmp_path / split / "metadata.csv", rows)
    assert {name: len(split) for name, split in load_image_dataset(str(tmp_path), seed=0).items()} == {
        "train": 10,
        "test": 10,
    }
