# SPDX-License-Identifier: Apache-2.0
"""The facts that the train command tells before it trains."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import load_dataset

from hf_aace import AACETrainer
from hf_aace.cli import main


def stop(*args):
    raise KeyboardInterrupt


def save_images(counts, folder="images", size=8):
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        Path(folder, name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (size, size), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(Path(folder, name, f"{index}.png"))


def told(capsys, *argv):
    """The facts that a run of one step tells before it trains, by their titles."""
    capsys.readouterr()
    options = ["--max_steps", "1", "--disable_tqdm", "true", "--save_strategy", "no", "--eval_strategy", "no"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AACETrainer, "training_step", stop)
        assert main(["train", *options, "--output_dir", "out", *argv]) == 130
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def test_images_and_what_was_set_apart_are_counted(capsys):
    facts = told(capsys, "--train_size", "40", "--validation_size", "0.1")
    assert facts["Images"].strip() == "40 for training, 130 for validation, 500 for the test"
    save_images({"a": 10, "b": 10})
    facts = told(capsys, "--dataset_name", "images")
    assert facts["Images"].strip() == "16 for training, 4 for the test (set apart from the training images)"
    save_images({"a": 6, "b": 6}, "both/train")
    save_images({"a": 2, "b": 3}, "both/test")
    assert told(capsys, "--dataset_name", "both")["Images"].strip() == "12 for training, 5 for the test"


def test_whether_images_were_set_apart_is_told_of_saved_datasets_too(capsys):
    save_images({"a": 10, "b": 10})
    loaded = load_dataset("imagefolder", data_dir="images")["train"]
    loaded.train_test_split(0.25, seed=0).save_to_disk("split")
    loaded.save_to_disk("whole")
    assert told(capsys, "--dataset_name", "split")["Images"].strip() == "15 for training, 5 for the test"
    facts = told(capsys, "--dataset_name", "whole")
    assert facts["Images"].strip() == "16 for training, 4 for the test (set apart from the training images)"


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"a": 10, "b": 10, "c": 12}, "3"),
        ({"a": 4, "b": 40, "c": 10}, "3, with uneven numbers of training images: b 40, c 10, a 4"),
        (
            {f"c{index:02}": 2 + index for index in range(12)},
            "12, with uneven numbers of training images: c11 13, c10 12, c09 11, c08 10, c07 9, ..., c04 6, c03 5, c02 4, c01 3, "
            "c00 2",
        ),
    ],
)
def test_classes_are_counted_if_they_are_uneven(counts, expected, capsys):
    save_images(counts, "images/train")
    save_images(dict.fromkeys(counts, 1), "images/test")
    assert told(capsys, "--dataset_name", "images")["Classes"].strip() == expected


@pytest.mark.parametrize(
    ("size", "model", "pixels", "warned"),
    [
        (8, "convnext-tiny-digits", "8x8 (the first image)", False),
        (8, "resnet-tiny-digits", "8x8 (the first image), resized to 32x32 for the model", False),
        (32, "vit-tiny-digits", "32x32 (the first image), resized to 8x8 for the model", True),
        (100, "resnet-tiny-digits", "100x100 (the first image), resized to 32x32 for the model", True),
    ],
)
def test_images_that_are_shrunk_to_few_pixels_are_warned_of(size, model, pixels, warned, capsys, monkeypatch):
    save_images({"a": 8, "b": 8}, size=size)
    said = []
    monkeypatch.setattr("hf_aace.cli.summary.logger.warning", said.append)
    facts = told(capsys, "--dataset_name", "images", "--model_name_or_path", model)
    assert facts["Pixels"].strip() == pixels
    assert bool(said) == warned and all("may leave too little to tell them apart" in words for words in said)


@pytest.mark.parametrize(
    ("argv", "method"),
    [
        (["--rho", "0"], "plain training (rho 0)"),
        ([], "AACE, rho 0.01"),
        (["--method", "sam"], "SAM, rho 0.05"),
        (["--ascent_fraction", "0.25", "--ascent_every", "4"], "AACE, rho 0.01, ascent_fraction 0.25, ascent_every 4"),
    ],
)
def test_method_model_and_steps_are_told(argv, method, capsys):
    facts = told(capsys, "--train_size", "40", *argv)
    assert facts["Method"].strip() == method
    assert facts["Model"].strip() == "convnext-tiny-digits, 221,530 parameters, all trained"
    assert facts["Steps"].strip() == "1 of 64 images"
    for epochs, steps in (("1", "2 of 64 images, in 1 epoch"), ("2", "4 of 64 images, in 2 epochs")):
        longer = [*argv, "--train_size", "100", "--max_steps", "-1", "--num_train_epochs", epochs]
        assert told(capsys, *longer, "--freeze_backbone")["Steps"].strip() == steps


def test_half_precision_that_has_no_effect_is_told(capsys, monkeypatch):
    said = []
    monkeypatch.setattr("hf_aace.checks.logger.warning_once", said.append)
    told(capsys, "--train_size", "40", "--fp16", "--use_cpu")
    assert set(said) == {"`fp16=True` has no effect on a CPU: Transformers trains in 32 bits there. Use `bf16=True`."}
    told(capsys, "--train_size", "40", "--bf16", "--use_cpu")
    assert len(set(said)) == 1
