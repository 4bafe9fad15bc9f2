# SPDX-License-Identifier: Apache-2.0
"""Streamed data sets: what is trained and tested on, in which order, and what is refused."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Image
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

from hf_aace.cli import main
from hf_aace.vision.streaming import stream_image_dataset, transform_stream


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # At the end of each pass over parquet; older versions have no such pause.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def encoded(value):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{value}.png"}


def shard(path, numbers, label, field="cls", broken=()):
    """A WebDataset shard with an image of the grey value of each number."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for number in numbers:
            text = str(label(number)) if field == "cls" else json.dumps({"label": label(number)})
            image = b"no image" if number in broken else encoded(number)["bytes"]
            for suffix, content in (("png", image), (field, text.encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def webdataset(folder="shards", label=lambda number: number % 3, **kwargs):
    for index in range(4):
        shard(f"{folder}/train/{index}.tar", range(20 * index, 20 * index + 20), label, **kwargs)
    shard(f"{folder}/test/0.tar", range(80, 92), label, **kwargs)
    return folder


def parquet(folder="tables", feature=None):
    for split, numbers in (("train", range(80)), ("test", range(80, 92))):
        columns = {"picture": [encoded(n) for n in numbers], "cls": [n % 3 for n in numbers]}
        dataset = Dataset.from_dict(columns).cast_column("picture", Image())
        dataset = dataset if feature is None else dataset.cast_column("cls", feature)
        Path(folder).mkdir(exist_ok=True)
        dataset.to_parquet(f"{folder}/{split}-0.parquet")
    return folder


def content(dataset):
    """For each image, in their order, its grey value and the name of its class."""
    names = dataset.features["label"].names
    return [
        (PIL.Image.open(io.BytesIO(row["image"]["bytes"])).getpixel((0, 0))[0], names[row["label"]]) for row in dataset
    ]


def next_of(dataset, count):
    return list(itertools.islice(dataset, count))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (webdataset, "012"),
        (lambda: webdataset(field="json", label=lambda number: "abc"[number % 3]), "abc"),
        (parquet, "012"),
        (lambda: parquet(feature=ClassLabel(names=["x", "y", "z"])), "xyz"),
    ],
)
def test_every_image_comes_once_with_its_label_in_an_order_of_the_seed(make, names):
    name = make()
    stream = stream_image_dataset(name, seed=1)
    train, test = content(stream["train"]), content(stream["test"])
    assert sorted(train) == [(number, names[number % 3]) for number in range(80)]
    assert test == [(number, names[number % 3]) for number in range(80, 92)]
    assert train != sorted(train)
    assert content(stream_image_dataset(name, seed=1)["train"]) == train
    assert content(stream_image_dataset(name, seed=2)["train"]) != train
    stream["train"].set_epoch(1)
    assert content(stream["train"]) != train


def test_training_goes_round_in_another_order():
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    train = transform_stream(stream_image_dataset(webdataset(), seed=0), processor)["train"]
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(train, batch_size=10, num_workers=workers)
        images = (
            torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in next_of(loader, 24)]).mul(255).round().tolist()
        )
        rounds = [images[start : start + 80] for start in (0, 80, 160)]
        if workers == 0:  # several are not all at the same round
            assert all(sorted(images) == list(range(80)) for images in rounds)
        assert rounds[0] != rounds[1] != rounds[2]


def test_a_stream_without_images_is_an_error_not_a_wait():
    stream = stream_image_dataset(webdataset(broken=range(80)), seed=0)
    train = transform_stream(stream, ViTImageProcessorPil(), skip_corrupt_images=True)["train"]
    with pytest.raises(ValueError, match="no training images in the stream"):
        next(iter(train))


def test_more_workers_than_shards_read_every_image_once():
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    stream = transform_stream(stream_image_dataset(parquet(), seed=0), processor)["train"]
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    values = [row["pixel_values"].mean().item() for row in itertools.islice(loader, 80)]
    assert len(set(values)) == 80


def test_train_size_takes_the_first():
    train = content(stream_image_dataset(webdataset(), seed=0, train_size=30)["train"])
    assert sorted(number for number, _ in train) == list(range(30))


def test_the_transform_gives_what_a_model_takes():
    stream = stream_image_dataset(webdataset(), seed=0)
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    rows = list(transform_stream(stream, processor)["test"])
    assert [row["labels"] for row in rows] == [number % 3 for number in range(80, 92)]
    for number, row in enumerate(rows, start=80):
        torch.testing.assert_close(row["pixel_values"], torch.full((3, 4, 4), number / 255))


def test_corrupt_images_are_named_or_left_out(monkeypatch):
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    stream = stream_image_dataset(webdataset(broken=[3, 50, 81]), seed=0)
    with pytest.raises(ValueError, match=r"The image '00(03|50).png' cannot be decoded"):
        next_of(transform_stream(stream, processor)["train"], 80)
    said = []
    monkeypatch.setattr("hf_aace.vision.images.logger.warning", said.append)
    next_of(transform_stream(stream, processor, skip_corrupt_images=True)["train"], 78)
    assert len(said) == 2 and all(any(name in text for text in said) for name in ("0003.png", "0050.png"))
    assert "number 2" in said[1]


def test_values_of_12_bits_are_told_and_scaled_as_the_range_says(warnings):
    tables = {"train": range(0, 4080, 51), "test": range(0, 4080, 340)}
    Path("deep").mkdir()
    for split, values in tables.items():
        images = [io.BytesIO() for _ in values]
        for value, buffer in zip(values, images, strict=True):
            PIL.Image.fromarray(np.full((8, 8), value, dtype=np.uint16)).save(buffer, "PNG")
        rows = {"image": [{"bytes": buffer.getvalue(), "path": None} for buffer in images]}
        rows["label"] = [index % 3 for index in range(len(images))]
        Dataset.from_dict(rows).cast_column("image", Image()).to_parquet(f"deep/{split}-0.parquet")
    stream_image_dataset("deep", seed=0)
    assert len(warnings) == 1 and "perhaps 0 4095." in warnings[0]
    stream = stream_image_dataset("deep", seed=0, image_range=(0, 4095))
    assert len(warnings) == 1
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    rows = list(transform_stream(stream, processor, image_range=(0, 4095))["test"])
    values = torch.stack([row["pixel_values"].mean() for row in rows])
    torch.testing.assert_close(values, torch.tensor(tables["test"]) / 4095, atol=0.003, rtol=0)


# ---- What is refused -------------------------------------------------------


def test_a_stream_without_labelled_test_images_is_refused():
    shard("one/train/0.tar", range(10), lambda number: number % 2)
    with pytest.raises(ValueError, match=r"needs a labeled split `test` or `validation`, but .*'one' has only: train"):
        stream_image_dataset("one", seed=0)
    webdataset("withheld", label=lambda number: -1 if number >= 80 else number % 3)
    with pytest.raises(ValueError, match=r"needs a labeled split .* has only: train, test"):
        stream_image_dataset("withheld", seed=0)


def test_a_class_that_is_in_no_test_image_is_named_when_met():
    stream = stream_image_dataset(webdataset(label=lambda number: 7 if number == 33 else number % 3), seed=0)
    with pytest.raises(
        ValueError, match=r"`train` .* has an image of the class '7', which no test image has: 0, 1, 2"
    ):
        list(stream["train"])


def test_a_folder_of_images_is_not_streamed():
    for name in ("cat", "dog"):
        Path("pets", name).mkdir(parents=True)
        PIL.Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(f"pets/{name}/0.png")
    with pytest.raises(ValueError, match=r"`streaming` is for datasets on the Hub and for files of .parquet or .tar"):
        stream_image_dataset("pets", seed=0)


# ---- The command -----------------------------------------------------------


ARGV = ["train", "--dataset_name", "shards", "--streaming", "true", "--disable_tqdm", "true"]
ARGV += ["--per_device_train_batch_size", "16", "--logging_steps", "1"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "`streaming` needs `max_steps`"),
        (["--max_steps", "4", "--label_noise", "0.2"], "`label_noise` needs all training labels"),
        (["--max_steps", "4", "--validation_size", "0.2"], "`validation_size` needs all training labels"),
        (["--max_steps", "4", "--class_weights", "balanced"], "`class_weights` needs all training labels"),
        (["--max_steps", "4", "--train_size", "0"], "`train_size` must be at least 1, got 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(options, complaint, capsys):
    webdataset()
    assert main([*ARGV, *options]) == 1
    assert complaint in capsys.readouterr().err


def test_the_command_trains_on_a_stream_and_resumes_exactly():
    """Over the end of the first pass (five steps), with augmentation; resumed in the middle of the second."""
    webdataset()
    argv = [*ARGV, "--max_steps", "8", "--save_steps", "7", "--eval_steps", "4", "--augmentation", "default"]
    assert main([*argv, "--output_dir", "whole"]) == 0
    results = json.loads(Path("whole/all_results.json").read_text())
    assert np.sum(results["eval_confusion_matrix"]) == 12
    resume = ["--resume_from_checkpoint", "whole/checkpoint-7"]
    assert main([*argv, "--output_dir", "resumed", *resume]) == 0
    whole, resumed = load_file("whole/model.safetensors"), load_file("resumed/model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
