# SPDX-License-Identifier: Apache-2.0
"""The command: its options, what it leaves behind, and what it says when the input is bad."""

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import accelerate.commands.launch
import datasets
import evaluate
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, pipeline

import hf_aace
from hf_aace import AACEArguments, AACEConfig, AACETrainer
from hf_aace.cli import main
from hf_aace.cli.options import DataArguments, ModelArguments
from hf_aace.cli.train import train_parser
from hf_aace.vision.datasets import load_image_dataset


# Small enough for a second; a step is an epoch, so that each is logged, evaluated and saved.
TINY = ["train", "--max_steps", "3", "--train_size", "40", "--disable_tqdm", "true"]
# Where neither the evaluations on the way matter nor that the weights are those of another run.
BARE = [*TINY, "--eval_strategy", "no"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with the defaults, shortened: its folder."""
    folder = tmp_path_factory.mktemp("run")
    assert main([*TINY, "--output_dir", str(folder)]) == 0
    return folder


def parse(*argv):
    model_args, data_args, _, training_args = train_parser(argv).read(argv)
    return model_args, data_args, training_args


# ---- What a run leaves -----------------------------------------------------


def test_model_loads_as_any_model_does(run):
    model = AutoModelForImageClassification.from_pretrained(run)
    assert model.config.model_type == "convnext"
    assert (run / "model.safetensors").is_file()
    scan = PIL.Image.fromarray(np.zeros((8, 8), dtype=np.uint8))
    answers = pipeline("image-classification", model=str(run), device="cpu", top_k=10)(scan)
    assert {answer["label"] for answer in answers} == {str(digit) for digit in range(10)}


def test_results_are_those_of_the_saved_model(run):
    results = json.loads((run / "all_results.json").read_text())
    matrix = np.array(results["eval_confusion_matrix"])
    test = load_image_dataset("digits", seed=0)["test"]
    inputs = AutoImageProcessor.from_pretrained(run)(
        [image.convert("RGB") for image in test["image"]], return_tensors="pt"
    )
    with torch.no_grad():
        predicted = AutoModelForImageClassification.from_pretrained(run)(**inputs).logits.argmax(-1).numpy()
    expected = np.zeros((10, 10), dtype=int)
    np.add.at(expected, (test["label"][:], predicted), 1)
    assert np.array_equal(matrix, expected)
    assert results["eval_accuracy"] == pytest.approx(np.trace(matrix) / 500)
    assert {"train_loss", "train_runtime", "eval_loss", "eval_macro_f1"} <= set(results)


def test_options_are_there_that_load_the_data_again(run):
    options = json.loads((run / "train_options.json").read_text())
    assert {
        "dataset_name": "digits",
        "train_size": 40,
        "label_noise": 0.0,
        "rho": 0.01,
        "seed": 42,
    }.items() <= options.items()


def test_a_run_that_fails_leaves_the_model_that_was_there_its_options(run):
    """They are those of the model, by which it is told from others and its data are loaded again."""
    folder = shutil.copytree(run, "here")
    for checkpoint in Path(folder).glob("checkpoint-*"):
        os.utime(checkpoint, (0, 0))  # Trainer goes by step, not by time, where all were made within a second
    assert interrupted([*BARE, "--rho", "7", "--train_size", "50", "--output_dir", folder], step=2) == 130
    assert (Path(folder) / "train_options.json").read_bytes() == (run / "train_options.json").read_bytes()
    options = json.loads((Path(folder) / "checkpoint-1" / "train_options.json").read_text())
    assert (options["rho"], options["train_size"]) == (7, 50)


def test_the_model_card_says_what_was_changed_in_the_data(run):
    argv = [*BARE, "--label_noise", "0.1", "--mixup", "0.2", "--output_dir", "mixed"]
    assert main(argv) == 0
    for folder, changes in ((run, "train_size=40"), (Path("mixed"), "train_size=40, label_noise=0.1, mixup=0.2")):
        card = ModelCard.load(folder / "README.md")
        assert f"on the dataset digits with {changes}." in " ".join(card.text.split())


def test_the_model_card_says_that_the_results_are_of_test_images(tmp_path):
    """Also where they were set apart of those to train on; and has nothing of an earlier model in the folder."""
    for label in ("a", "b"):
        for index in range(12):
            path = Path("images", label, f"{index}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.full((8, 8), 9 * index, dtype=np.uint8)).save(path)
    argv = ["train", "--dataset_name", "images", "--max_steps", "1", "--disable_tqdm", "true", "--output_dir", "out"]
    assert main([*argv, "--rho", "0.1"]) == 0
    assert main([*argv, "--rho", "0"]) == 0
    card = ModelCard.load("out/README.md")
    assert card.data.eval_results[0].dataset_split == "test"
    assert "sharpness-aware-minimization" not in card.data.tags


def test_state_and_picture_are_there(run):
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    for key in ("loss", "clean_loss", "sharpness", "eval_accuracy"):
        assert sum(key in entry for entry in logs) == 3, key
    # A matrix is no curve: it belongs to the end.
    assert not any("eval_confusion_matrix" in entry for entry in logs)
    with PIL.Image.open(run / "training_curves.png") as picture:
        picture.load()


def test_the_last_lines_say_accuracy_time_model_and_picture(capsys, tmp_path):
    assert main([*TINY, "--rho", "0", "--metrics", "accuracy", "--model_name_or_path", "vit-tiny-digits"]) == 0
    folder = os.path.join("runs", "vit-tiny-digits-digits")
    results = json.loads((tmp_path / folder / "all_results.json").read_text())
    assert "eval_confusion_matrix" not in results
    assert capsys.readouterr().out.splitlines()[-4:] == [
        f"Test:    accuracy {results['eval_accuracy']:.4f}",
        f"Time:    {timedelta(seconds=round(results['train_runtime']))} for training",
        f"Model:   {folder}",
        f"Picture: {os.path.join(folder, 'training_curves.png')}",
    ]


def test_a_run_that_logs_nothing_still_ends_well(capsys):
    options = ["--logging_strategy", "no", "--eval_strategy", "no", "--save_strategy", "no"]
    assert main([*TINY, *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Picture: none, since nothing was logged"


def test_a_training_that_came_to_grief_says_so(capsys):
    assert main([*BARE, "--learning_rate", "1e30", "--max_grad_norm", "0"]) == 0
    assert "the loss on the test images is not finite" in capsys.readouterr().err


def test_nothing_of_an_earlier_run_in_the_folder_is_taken_for_results(capsys):
    assert main([*TINY, "--validation_size", "0.1", "--output_dir", "here"]) == 0
    quiet = ["--logging_strategy", "no", "--eval_strategy", "no", "--prediction_loss_only", "true"]
    assert main([*TINY, *quiet, "--output_dir", "here"]) == 0
    results = json.loads(Path("here/all_results.json").read_text())
    assert "eval_loss" in results
    assert not any(name.startswith("validation_") or "accuracy" in name for name in results)
    assert not Path("here/validation_results.json").exists() and not Path("here/training_curves.png").exists()


def test_a_run_whose_checkpoints_trainer_deletes_at_once_ends_well():
    """It takes those of an earlier run in the folder for younger where the clock of the disk cannot be trusted."""
    tomorrow = time.time() + 86400
    for step in (100, 200):
        earlier = Path("here", f"checkpoint-{step}")
        earlier.mkdir(parents=True)
        os.utime(earlier, (tomorrow, tomorrow))
    assert main([*BARE, "--save_total_limit", "2", "--load_best_model_at_end", "false", "--output_dir", "here"]) == 0
    assert sorted(path.name for path in Path("here").glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-200"]
    assert Path("here/model.safetensors").is_file()


@pytest.mark.parametrize("model", ["resnet-tiny-digits", "convnext-tiny-digits"])
@pytest.mark.parametrize("rho", ["0.05", "0"])
def test_the_loss_is_the_mean_over_the_images_under_accumulation(model, rho):
    """ResNet leaves out the division that Trainer leaves to it: loss and gradient were four times as large."""
    argv = (
        f"train --model_name_or_path {model} --rho {rho} --output_dir run --train_size 96 --num_train_epochs 1 "
        "--eval_strategy no --save_strategy no --logging_strategy steps --logging_steps 1 "
        "--gradient_accumulation_steps 4 --per_device_train_batch_size 8"
    ).split()
    assert main(argv) == 0
    first = json.loads(Path("run/trainer_state.json").read_text(encoding="utf-8"))["log_history"][0]
    assert 1.5 < first["loss"] < 4, "about log(10) before anything is learned"
    if rho != "0":
        assert first["loss"] == pytest.approx(first["clean_loss"] + first["sharpness"], abs=1e-4)


def test_with_validation_images_the_test_images_are_for_the_end(tmp_path, capsys):
    assert main([*TINY, "--validation_size", "0.1", "--output_dir", "here"]) == 0
    results = json.loads(Path("here/all_results.json").read_text())
    logs = json.loads(Path("here/trainer_state.json").read_text())["log_history"]
    in_training = [entry["eval_accuracy"] for entry in logs if "eval_accuracy" in entry]
    assert len(in_training) == 3 and in_training[-1] == results["validation_accuracy"]
    validation_images = results["validation_runtime"] * results["validation_samples_per_second"]
    assert validation_images == pytest.approx(130, rel=0.05)  # a tenth of the 1297 training images
    assert np.sum(results["eval_confusion_matrix"]) == 500
    assert results["train_processor_seconds"] > 0


def test_a_trained_model_trains_on_with_a_folder_of_images(run, tmp_path, capsys):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{index}.jpg")
    argv = ["train", "--model_name_or_path", str(run), "--dataset_name", "pets", "--max_steps", "2"]
    assert main([*argv, "--metrics", "macro_f1"]) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "runs" / f"{run.name}-pets")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert "Test:    macro_f1 " in capsys.readouterr().out
    assert main([*argv, "--metrics", "confusion_matrix"]) == 0
    assert "Test:    loss " in capsys.readouterr().out


def test_the_same_seed_gives_the_same_model(run, tmp_path):
    first = load_file(run / "model.safetensors")
    for name, seed in (("again", "42"), ("other", "43")):
        assert main([*TINY, "--output_dir", str(tmp_path / name), "--seed", seed]) == 0
    again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


# ---- Interruption ----------------------------------------------------------


def interrupted(argv, step):
    """Runs the command, with what Ctrl-C raises in the training step of that number."""
    original = AACETrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AACETrainer, "training_step", training_step)
        return main(argv)


def test_after_an_interruption_it_is_told_whether_anything_was_saved(capsys, monkeypatch):
    argv = [*BARE, "--output_dir", "here"]
    assert interrupted(argv, step=3) == 130
    assert f"Interrupted. Saved up to {Path('here/checkpoint-2')}. To go on" in capsys.readouterr().err
    # Gone on with, and interrupted before the next checkpoint: the earlier one is still what to go on from.
    assert interrupted([*argv, "--resume_from_checkpoint", "true", "--save_strategy", "no"], step=3) == 130
    error = capsys.readouterr().err
    assert f"Nothing was saved after {Path('here/checkpoint-2')}." in error
    assert error.rstrip().endswith(f"--resume_from_checkpoint {Path('here/checkpoint-2')}")
    assert interrupted([*BARE, "--output_dir", "there"], step=1) == 130
    assert "Interrupted. Nothing was saved." in capsys.readouterr().err

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(AACETrainer, "predict", stop)
    assert main([*BARE, "--output_dir", "there"]) == 130
    assert capsys.readouterr().err.endswith("hf-aace evaluate --model_name_or_path there\n")
    monkeypatch.setattr("hf_aace.cli.train.load_data", stop)
    assert main([*BARE, "--output_dir", "there"]) == 130
    assert "Training had not begun, and nothing was saved." in capsys.readouterr().err


@pytest.mark.parametrize("resume_from", ["path", "True"])
def test_an_interrupted_run_is_resumed_as_it_says(run, tmp_path, capsys, resume_from):
    folder = os.path.join("runs", "convnext-tiny-digits-digits")
    assert interrupted(TINY, step=3) == 130
    command = capsys.readouterr().err.splitlines()[-1].split()
    assert command == ["hf-aace", *TINY, "--resume_from_checkpoint", os.path.join(folder, "checkpoint-2")]
    assert main(command[1:] if resume_from == "path" else [*command[1:-1], resume_from]) == 0
    logs = json.loads((tmp_path / folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logs if "loss" in entry] == [1, 2, 3]
    whole, resumed = load_file(run / "model.safetensors"), load_file(tmp_path / folder / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_checkpoint_of_another_run_is_not_resumed_from(capsys):
    assert main([*BARE, "--output_dir", "here"]) == 0
    # File times may be coarser than these runs are apart.
    for state in Path("here").glob("checkpoint-*/trainer_state.json"):
        os.utime(state, (0, 0))
    capsys.readouterr()
    assert interrupted([*BARE, "--output_dir", "here"], step=1) == 130
    assert "no checkpoint of this run" in capsys.readouterr().err


def test_copies_of_checkpoints_under_other_names_are_let_alone(run):
    folder = Path(shutil.copytree(run, "here"))
    for name in ("checkpoint-3-copy", "checkpoint-best"):
        shutil.copytree(folder / "checkpoint-3", folder / name)
    assert main([*BARE, "--output_dir", "here", "--resume_from_checkpoint", "true"]) == 0
    assert (
        main(["sharpness", "here", "--checkpoints", "true", "--eigenvalues", "0", "--m", "0", "--max_samples", "5"])
        == 0
    )
    assert len(json.loads((folder / "sharpness.json").read_text())["measures"]) == 3


def test_a_run_is_resumed_with_its_own_images_only(run, capsys, monkeypatch):
    """Or images of the validation would be trained on, and the card tell of half of the training."""
    shutil.copytree(run, "here")
    argv = [*BARE, "--output_dir", "here", "--resume_from_checkpoint", "true"]
    error = message(capsys, *argv, "--label_noise", "0.3", "--seed", "1")
    assert "checkpoint-3 had `label_noise=0.0`, now 0.3, `seed=42`, now 1. It would go on with other images" in error
    for name, before, now in (
        ("weight_decay", "0.0", "0.5"),
        ("learning_rate", "0.003", "0.1"),
        ("optim", "adamw_torch", "sgd"),
    ):
        error = message(capsys, *argv, f"--{name}", now, "--rho", "0.5")
        assert f"had `{name}={before}`, now {now}. It goes on with its own optimizer: give what it had" in error
    said = []
    monkeypatch.setattr("hf_aace.cli.checkpoints.logger.warning", said.append)
    assert main([*argv[:-1], os.path.join("here", "checkpoint-2"), "--rho", "0.5"]) == 0
    assert said == [
        f"{Path('here/checkpoint-2')}, from which this run goes on, had other settings: `rho=0.01`, now 0.5."
    ]


def test_a_run_is_resumed_with_its_folder_spelled_otherwise(tmp_path):
    for name in ("dark", "light"):
        Path("photos", name).mkdir(parents=True)
        for index in range(10):
            PIL.Image.new("L", (8, 8), 10 * index + 100 * (name == "light")).save(Path("photos", name, f"{index}.png"))
    argv = ["train", "--max_steps", "2", "--save_steps", "1", "--save_strategy", "steps", "--output_dir", "here"]
    argv += ["--eval_strategy", "no", "--dataset_name"]
    assert main([*argv, "photos"]) == 0
    assert main([*argv, str(tmp_path / "photos"), "--resume_from_checkpoint", "here/checkpoint-1"]) == 0


def test_a_checkpoint_that_is_chosen_by_the_test_images_is_warned_of(warnings):
    """It looks better on them than on new ones. With validation images these choose."""
    best = ["--load_best_model_at_end", "true", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    for size, expected in (("0", 1), ("0.2", 0)):
        assert main([*TINY, *best, "--validation_size", size, "--output_dir", f"of-{size}"]) == 0
        assert len([said for said in warnings if "chooses the checkpoint by the test images" in said]) == expected
        warnings.clear()


def test_a_checkpoint_without_an_optimizer_goes_on_at_another_rate(run):
    """As `save_only_model` leaves it: nothing of the old rate is kept."""
    shutil.copytree(run, "here")
    for path in Path("here").glob("checkpoint-*/*"):
        if path.name in ("optimizer.pt", "scheduler.pt"):
            path.unlink()
    argv = [*BARE, "--output_dir", "here", "--resume_from_checkpoint", os.path.join("here", "checkpoint-2")]
    assert main([*argv, "--learning_rate", "0.1"]) == 0


def test_a_run_is_not_resumed_from_checkpoints_of_another_method_that_are_farther(run, warnings):
    """As an earlier run in the same folder leaves them: its model would get the name of a method that trained no step of it."""
    argv = [*BARE, "--output_dir", "here", "--method", "sam"]
    assert interrupted(argv, step=3) == 130
    shutil.copytree(run / "checkpoint-3", "here/checkpoint-3", dirs_exist_ok=True)
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert not [said for said in warnings if "had other settings" in said]
    assert main([*argv[:-4], "--output_dir", "there", "--method", "sam"]) == 0
    resumed, whole = load_file("here/model.safetensors"), load_file("there/model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_finished_run_that_is_resumed_stays_as_it_is(run, capsys):
    """A job that is queued again asks for it. Its results would be those of a training of no step."""
    folder = Path(shutil.copytree(run, "here"))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    argv = [*TINY, "--output_dir", "here", "--resume_from_checkpoint", "true"]
    assert main([*argv, "--method", "aace"]) == 0  # the default, by its name
    assert "No step is left to train. The finished run in here stays as it is." in capsys.readouterr().out
    error = message(capsys, *argv, "--method", "sam")
    assert "checkpoint-3, no step is left to train. It had `method=None`, now sam" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    (folder / "eval_results.json").unlink()  # as if it had been killed after its last checkpoint
    assert main(argv) == 0
    assert json.loads((folder / "eval_results.json").read_text())["eval_accuracy"] > 0


def test_a_resumed_run_outlives_the_checkpoint_that_it_began_from(run):
    """Trainer deletes it, as it keeps the last two. And the number of steps is that of now."""
    folder = Path(shutil.copytree(run, "here"))
    argv = [*BARE, "--output_dir", "here", "--resume_from_checkpoint", "true", "--max_steps", "6"]
    assert main(argv) == 0
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6
    assert not (folder / "checkpoint-3").exists() and (folder / "eval_results.json").is_file()
    # One that ends within an epoch, of which Trainer would make a step more.
    short = [*BARE, "--output_dir", "short", "--per_device_train_batch_size", "16", "--max_steps", "2"]
    assert main(short) == 0
    assert main([*short, "--resume_from_checkpoint", "true"]) == 0
    assert json.loads(Path("short/trainer_state.json").read_text())["global_step"] == 2


def test_a_run_that_replaces_another_says_so(run, warnings):
    shutil.copytree(run, "here")
    assert main([*BARE, "--output_dir", "here", "--rho", "0.5"]) == 0
    (said,) = [said for said in warnings if "holds a finished run" in said]
    assert said.startswith(
        "here holds a finished run, which this one replaces. It had `rho=0.01`, now 0.5. To keep it"
    )


def test_resuming_from_nothing_is_refused(capsys):
    assert main([*TINY, "--resume_from_checkpoint", "true"]) == 1
    assert "No valid checkpoint found" in capsys.readouterr().err


def test_a_finished_run_is_no_checkpoint(run, capsys):
    """It has a state, but neither optimizer nor schedule, which would begin anew without a word."""
    error = message(capsys, *TINY, "--resume_from_checkpoint", str(run))
    assert "which is no checkpoint" in error and f"The newest that is whole is {run / 'checkpoint-'}" in error


# ---- A disk that fills -----------------------------------------------------


@contextlib.contextmanager
def disk_full(at_step):
    """The disk fills while the optimizer of that step's checkpoint is being written: the weights already are."""
    original = torch.save

    def save(data, path, *args, **kwargs):
        original(data, path, *args, **kwargs)
        if str(path).endswith(os.path.join(f"checkpoint-{at_step}", "optimizer.pt")):
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        yield


def test_a_full_disk_loses_nothing(run, capsys):
    with disk_full(at_step=3):
        error = message(capsys, *TINY, "--output_dir", "full")
    last = os.path.join("full", "checkpoint-2")
    assert "Saving full/checkpoint-3 failed" in error and "No space left on device" in error
    assert error.endswith(f"hf-aace {' '.join(TINY)} --output_dir full --resume_from_checkpoint {last}")
    # What was written is kept, but nothing resumes from it, plain Trainer neither.
    assert Path("full/_incomplete-checkpoint-3/model.safetensors").is_file()
    assert transformers.trainer_utils.get_last_checkpoint("full") == last
    assert main([*TINY, "--output_dir", "full", "--resume_from_checkpoint", "true"]) == 0
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (run, Path("full")))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_full_disk_before_the_first_checkpoint(capsys):
    with disk_full(at_step=1):
        error = message(capsys, *BARE, "--output_dir", "full")
    assert error.endswith("There is no checkpoint of this run to resume from.")


def test_a_full_disk_at_the_end_names_the_last_checkpoint(capsys, monkeypatch):
    original = AACETrainer.save_model

    def save_model(self, output_dir=None, **kwargs):
        if output_dir is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, output_dir, **kwargs)

    monkeypatch.setattr(AACETrainer, "save_model", save_model)
    error = message(capsys, *BARE, "--output_dir", "full")
    assert "The trained model could not be saved" in error
    assert error.endswith(f"--resume_from_checkpoint {os.path.join('full', 'checkpoint-3')}")


def test_a_checkpoint_that_is_not_whole_is_not_resumed_from(run, tmp_path, capsys):
    """As a kill in the middle of saving leaves it."""
    assert interrupted([*TINY, "--output_dir", "here"], step=3) == 130
    Path("here/checkpoint-3").mkdir()
    Path("here/checkpoint-3/trainer_state.json").write_text('{"global_step": 3, "log_his')
    for given in ("here/checkpoint-3", "here/checkpoint-9"):
        error = message(capsys, *TINY, "--output_dir", "here", "--resume_from_checkpoint", given)
        assert f"The newest that is whole is {os.path.join('here', 'checkpoint-2')}" in error
    assert main([*TINY, "--output_dir", "here", "--resume_from_checkpoint", "true"]) == 0
    whole, resumed = load_file(run / "model.safetensors"), load_file(tmp_path / "here" / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_other_failures_are_not_taken_for_a_full_disk(monkeypatch):
    def training_step(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(AACETrainer, "training_step", training_step)
    with pytest.raises(RuntimeError, match="something else"):
        main([*TINY, "--output_dir", "full"])


# ---- Parts of a model ------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_lora_leaves_a_model_like_any_other_and_the_adapters(run, capsys):
    argv = [*BARE, "--model_name_or_path", str(run), "--lora", "true", "--lora_rank", "4", "--output_dir", "lora"]
    assert interrupted([*argv, "--learning_rate", "0.01"], step=3) == 130
    assert not Path("lora/checkpoint-2/model.safetensors").exists()  # adapters only
    assert main([*argv, "--learning_rate", "0.01", "--resume_from_checkpoint", "true"]) == 0
    results = json.loads(Path("lora/all_results.json").read_text())
    assert not list(Path("lora").glob("adapter_*"))
    before, after = load_file(run / "model.safetensors"), load_file("lora/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("pwconv" in name for name in changed) and not any("dwconv" in name for name in changed)
    assert main(["evaluate", "--model_name_or_path", "lora", "--output_dir", "evaluated"]) == 0
    evaluated = json.loads(Path("evaluated/evaluation.json").read_text())
    assert evaluated["accuracy"] == pytest.approx(results["eval_accuracy"])

    # The adapters by themselves give the same model again.
    base = AutoModelForImageClassification.from_pretrained(run)
    from peft import PeftModel

    again = PeftModel.from_pretrained(base, "lora/adapter").merge_and_unload().state_dict()
    for name, tensor in after.items():
        torch.testing.assert_close(again[name], tensor, msg=name)


def test_only_the_head_is_trained_if_the_backbone_is_frozen(run):
    argv = [*BARE, "--model_name_or_path", str(run), "--freeze_backbone", "true", "--dtype", "bfloat16"]
    assert main([*argv, "--bf16", "true", "--use_cpu", "true", "--output_dir", "frozen"]) == 0
    before, after = load_file(run / "model.safetensors"), load_file("frozen/model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert {name for name in before if not torch.equal(before[name].bfloat16().float(), after[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--lora", "true", "--freeze_backbone", "true"], "leave out `freeze_backbone`"),
        # The whole remedy at once, whatever else is missing.
        (["--dtype", "bfloat16"], "give `--dtype bfloat16 --bf16 true --lora true`"),
        (["--dtype", "float16", "--fp16", "--use_cpu"], "give `--bf16 true` instead of `dtype`"),
        (
            ["--dtype", "float16", "--fp16", "--rho", "0", "--use_cpu"],
            "needs mixed precision, as the images are of 32 bits",
        ),
        (
            ["--dtype", "bfloat16", "--rho", "0"],
            "needs mixed precision, as the images are of 32 bits: give `--bf16 true` too",
        ),
        (["--dtype", "bfloat16", "--freeze_backbone", "true"], "give `--bf16 true` too"),
        (["--gradient_accumulation_steps", "0"], "`gradient_accumulation_steps` must be at least 1, got 0"),
        (["--per_device_train_batch_size", "0"], "`per_device_train_batch_size` must be at least 1, got 0"),
        (["--num_train_epochs", "-1"], "`num_train_epochs` must be a number from 0, got -1.0"),
        (["--num_train_epochs", "nan"], "`num_train_epochs` must be a number from 0, got nan"),
        (["--learning_rate", "inf"], "`learning_rate` must be a number from 0, got inf"),
        (["--label_smoothing_factor", "1.5"], "`label_smoothing_factor` must be a number from 0 to 1, got 1.5"),
        (["--label_smoothing_factor", "-0.5"], "`label_smoothing_factor` must be a number from 0 to 1, got -0.5"),
        (["--seed", "-1"], "`seed` must be a number from 0 to 4294967295, got -1"),
        (
            ["--metric_for_best_model", "none", "--load_best_model_at_end", "true"],
            "`metric_for_best_model` is 'none', which this run does not measure. Give one of accuracy, loss, macro_f1, or add",
        ),
        (["--lr_scheduler_type", "warmup_stable_decay"], "`lr_scheduler_type=SchedulerType.WARMUP_STABLE_DECAY`"),
        (["--streaming", "true"], "The digits are in memory anyway"),
        (["--do_train", "false"], "training is what this command does"),
        (["--num_processes", "2"], "`num_processes` needs `accelerate_config`"),
        (["--dtype", "bfloat16", "--bf16", "true", "--use_cpu", "true"], "parameters to perturb must be float32"),
    ],
)
def test_what_cannot_be_trained_so_is_told(capsys, argv, expected):
    assert expected in message(capsys, *TINY, *argv)


# ---- Options ---------------------------------------------------------------


def test_defaults_are_a_recipe_for_the_kind_of_model():
    _, _, scratch = parse()
    _, _, vit = parse("--model_name_or_path", "vit-tiny-digits")
    _, _, fine_tuning = parse(
        "--model_name_or_path", "google/vit-base-patch16-224-in21k", "--dataset_name", "AI/beans"
    )
    assert scratch.learning_rate == vit.learning_rate == 3e-3
    assert fine_tuning.learning_rate == 5e-5
    assert scratch.output_dir == os.path.join("runs", "convnext-tiny-digits-digits")
    assert fine_tuning.output_dir == os.path.join("runs", "vit-base-patch16-224-in21k-beans")
    # The method's own fields keep the defaults that the library gives them.
    plain = AACEConfig(output_dir="x")
    own = {field.name for field in fields(AACEConfig)} - {field.name for field in fields(TrainingArguments)}
    assert {name: getattr(scratch, name) for name in own} == {name: getattr(plain, name) for name in own}


def test_every_field_of_the_method_is_an_option():
    given = {
        "rho": 0.2,
        "perturbation_loss": "cross_entropy",
        "normalize_perturbation": True,
        "adaptive_perturbation": True,
        "aace_target": "uniform",
        "ascent_fraction": 0.5,
        "ascent_scope": "full_batch",
        "sync_ascent": True,
        "perturb_every": 2,
        "ascent_every": 3,
        "perturb_modules": "classifier",
    }
    own = {field.name for field in fields(AACEConfig)} - {field.name for field in fields(TrainingArguments)}
    assert set(given) == own - {"method"}
    _, _, config = parse(*(f"--{name}={value}" for name, value in given.items()))
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    "name", ["normalize_perturbation", "adaptive_perturbation", "eval_on_start", "ddp_static_graph"]
)
def test_a_flag_without_a_value_says_true(name):
    """Also where the option has no default, and `None` leaves it to something else."""
    assert getattr(parse(f"--{name}")[2], name) is True
    assert getattr(parse(f"--{name}", "false")[2], name) is False


YAML = """
model_name_or_path: vit-tiny-digits
learning_rate: 3e-4        # text to PyYAML
rho: 1e-1
num_train_epochs: 7
eval_strategy: no          # False to PyYAML
save_strategy: epoch
normalize_perturbation: true
train_size:                # the default
metrics: [accuracy]
lr_scheduler_kwargs: {min_lr: 1e-5}
output_dir: 2026
"""


def test_configuration_file_gives_defaults_that_the_command_line_overrides(tmp_path):
    (tmp_path / "run.yaml").write_text(YAML)
    model, data, config = parse("--config", "run.yaml", "--num_train_epochs", "9")
    assert model.model_name_or_path == "vit-tiny-digits"
    assert (config.learning_rate, config.rho, config.num_train_epochs) == (3e-4, 0.1, 9)
    assert (config.eval_strategy, config.save_strategy) == ("no", "epoch")
    assert config.normalize_perturbation is True
    assert (data.train_size, data.metrics) == (None, ["accuracy"])
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert config.output_dir == "2026"
    # What the file leaves open comes from the recipe of the model that it names.
    assert config.per_device_train_batch_size == 64


def test_json_says_the_same_as_yaml(tmp_path):
    options = {"learning_rate": 3e-4, "eval_strategy": "no", "metrics": "accuracy", "bf16": False, "train_size": None}
    (tmp_path / "run.json").write_text(json.dumps(options, indent="\t"))
    (tmp_path / "run.yml").write_text("learning_rate: 3e-4\neval_strategy: no\nmetrics: accuracy\nbf16: false\n")
    from_json, from_yaml = parse("--config", "run.json"), parse("--config", "run.yml")
    assert from_json[1] == from_yaml[1]
    assert from_json[1].metrics == ["accuracy"]
    assert from_json[2].to_dict() == from_yaml[2].to_dict()


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("train_size: null", "train_size", None),
        ("train_size: ~", "train_size", None),
        ("class_weights: none", "class_weights", "none"),
        ("lora_target_modules: convolution", "lora_target_modules", ["convolution"]),
        ("metrics: [accuracy, 'f1']", "metrics", ["accuracy", "f1"]),
        ("lora: yes", "lora", True),
        ("normalize_perturbation: false", "normalize_perturbation", False),
        ("perturb_modules: -x", "perturb_modules", "-x"),  # no option, though it begins like one
        (
            "lr_scheduler_kwargs: {num_cycles: .5, min_lr: 1e-5}",
            "lr_scheduler_kwargs",
            {"num_cycles": 0.5, "min_lr": 1e-5},
        ),
        (
            "liger_kernel_config: {rope: false}",
            "liger_kernel_config",
            {"rope": False},
        ),
    ],
)
def test_values_of_a_configuration_file_mean_what_they_say(line, name, value):
    Path("run.yaml").write_text(line)
    (found,) = {
        id(part): getattr(part, name) for part in parse("--config", "run.yaml") if hasattr(part, name)
    }.values()
    assert found == value


def test_recipe_follows_the_model_of_the_configuration_file(tmp_path):
    (tmp_path / "run.yaml").write_text("model_name_or_path: someone/model\n")
    assert parse("--config", "run.yaml")[2].learning_rate == 5e-5


# ---- Bad input -------------------------------------------------------------


def message(capsys, *argv):
    """Return the last line of a command that ends with exit code 1."""
    capsys.readouterr()
    assert main(list(argv)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("hf-aace: error: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("learning_rat: 1", "unknown key, 'learning_rat'. Did you mean learning_rate?"),
        ("perturbation_los: aace", "unknown key, 'perturbation_los'. Did you mean perturbation_loss?"),
        ("lr: 1", "unknown key, 'lr'. Did you mean learning_rate?"),
        ("dataset: photos", "unknown key, 'dataset'. Did you mean dataset_name?"),
        ("optimizer: sgd", "unknown key, 'optimizer'. Did you mean optim?"),
        ("training:\n  rho: 1", "unknown key, 'training'. Write the options without sections."),
        ("training:\nrho: 1", "unknown key, 'training'. Write the options without sections."),
        ("image_size: 224", "unknown key, 'image_size'. No option sets the size of the images: it is `size` in"),
        ("- rho", "must hold options as `name: value`, got ['rho']"),
        ("", "must hold options as `name: value`, got None"),
        ("rho: -1", "`rho` must be a finite number >= 0, got -1.0"),
        ("metrics: [accuracy, [macro_f1]]", "has lists within the list of 'metrics'"),
    ],
)
def test_bad_configuration_file_is_told(tmp_path, capsys, content, expected):
    (tmp_path / "run.yaml").write_text(content)
    assert expected in message(capsys, "train", "--config", "run.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("class_weights: balance", "--class-weights: invalid choice: 'balance'"),
        ("aace_target: adaptve", "--aace-target: invalid choice: 'adaptve'"),
        ("rho: [1, 2]", "unrecognized arguments: 2"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
    ],
)
def test_values_of_a_configuration_file_are_checked_as_those_of_the_command_line(content, expected, capsys):
    Path("run.yaml").write_text(content)
    with pytest.raises(SystemExit):
        main(["train", "--config", "run.yaml"])
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_configuration_file_that_cannot_be_parsed_is_named(tmp_path, name):
    (tmp_path / name).write_text("{rho: ")
    with pytest.raises(ValueError, match=f"configuration file {name} is neither valid YAML nor"):
        parse("--config", name)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config", "missing.yaml"], "The configuration file missing.yaml cannot be read"),
        (["--config", "."], "The configuration file . cannot be read"),
        (["--label_noise", "1.5"], "`label_noise` must lie in [0, 1), got 1.5"),
        (["--train_size", "5"], "`train_size` must lie between"),
        (["--rho", "nan"], "`rho` must be a finite number"),
        (["--dataset_name", "/missing"], "`dataset_name` is '/missing'"),
        (["--model_name_or_path", "/missing"], "`model_name_or_path` is '/missing'"),
        (["--dataset_name", "./fotos"], "but there is no such folder or file (did you mean 'photos'?)"),
        (["--dataset_name", "photos/a/b"], "`dataset_name` is 'photos/a/b', but there is no such folder or file"),
        (
            ["--dataset_name", "photos/tarin"],
            "but there is no such folder (did you mean 'photos/train'?), nor could it be",
        ),
        (["--model_name_or_path", "runs/vit"], "`model_name_or_path` is 'runs/vit', but there is no such folder (did"),
        (["--output_dir", "file"], "`output_dir` is 'file', but 'file' is no folder"),
        (["--output_dir", "file/a/b"], "`output_dir` is 'file/a/b', but 'file' is no folder"),
        (["--output_dir", "/proc/none/a"], "`output_dir` is '/proc/none/a', which cannot be written"),
        (["--metrics", "accuracy", "broken"], "`metrics`: they cannot be computed for 10 classes: no binary task"),
    ],
)
def test_bad_input_is_told_in_one_sentence_before_the_model_is_loaded(capsys, argv, expected, monkeypatch):
    monkeypatch.setattr("hf_aace.vision.models.AutoModelForImageClassification", None)
    for folder in ("photos/train/a", "photos/train/b", "runs/vit-1"):
        Path(folder).mkdir(parents=True)
    Path("file").touch()
    original = evaluate.load
    monkeypatch.setattr(
        evaluate, "load", lambda name, **kwargs: Broken(**kwargs) if name == "broken" else original(name)
    )
    assert expected in message(capsys, "train", *argv)


class Broken(evaluate.Metric):
    """A metric of the Hub that is for two classes only, as `f1` is by default."""

    def _info(self):
        features = datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64"))
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        raise ValueError("no binary task")


def test_unreadable_image_is_named_before_training(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (9, 9)).save(tmp_path / "pets" / name / "1.png")
    (tmp_path / "pets" / "dog" / "2.png").write_bytes(b"\x89PNG")
    assert os.path.join("pets", "dog", "2.png") in message(capsys, "train", "--dataset_name", "pets")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required"),
        (["trian"], "invalid choice"),
        (["env", "--rho"], "unrecognized arguments: --rho"),
        (["train", "--rhoo", "1"], "unrecognized arguments: --rhoo 1. Did you mean --rho?"),
        (["train", "--lable-noise=1"], "Did you mean --label_noise?"),
        (["train", "--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["train", "--lr", "1"], "Did you mean --learning_rate?"),
        (["train", "--dataset=photos", "--epochs", "3"], "Did you mean --dataset_name, --num_train_epochs?"),
        (["train", "--model", "x"], "Did you mean --model_name_or_path?"),
        (["train", "--batch-size", "8"], "Did you mean --per_device_train_batch_size?"),
        (["train", "--workers", "8"], "Did you mean --dataloader_num_workers?"),
        (["train", "--train_dir", "photos"], "Did you mean --dataset_name?"),
        (["train", "--train_val_split=0.2"], "Did you mean --validation_size?"),
        (["train", "--validation_dir", "photos/val"], "Put the splits into one folder"),
        (["train", "--overwrite_output_dir"], "It is always so: leave it out."),
        (["train", "--bs", "8", "--RHO", "1"], "Did you mean --per_device_train_batch_size, --rho?"),
        (["train", "--precision", "16"], "Did you mean --bf16?"),
        (["train", "--image_size", "224"], "No option sets the size of the images: it is `size` in"),
        (
            ["train", "--momentum=0.9", "--lr", "1"],
            "Did you mean --learning_rate? It is an argument of the optimizer: `optim`",
        ),
        (["train", "--device", "cpu"], "A GPU is used if there is one, unless `use_cpu` is true."),
        (["evaluate", "--model", "x"], "Did you mean --model_name_or_path?"),
        (["compare", "--lr", "1"], "Did you mean --learning_rate?"),
        (["train", "photos"], "unrecognized arguments: photos."),
    ],
)
def test_usage_errors_exit_with_2(capsys, argv, expected):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) <= 3  # not pages of options


# ---- Help ------------------------------------------------------------------


def test_help_shows_every_option_with_the_default_of_the_recipe(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help-all"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(AACEConfig):
        if field.init:
            assert f"--{field.name}" in text
    assert "The initial learning rate for the optimizer. (default: 0.003)" in text


def test_help_begins_with_our_own_options_and_then_has_twenty_of_the_trainer(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = [line.split()[0].rstrip(",") for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    names = [name.removeprefix("--") for name in shown]
    trainer = {field.name for field in fields(TrainingArguments)}
    assert [name for name in names if name in trainer] == names[-20:]
    own = {field.name for kind in (ModelArguments, DataArguments, AACEArguments) for field in fields(kind)}
    assert own <= set(names) and {"config", "help-all"} <= set(names)


@pytest.mark.parametrize(
    "command", ["demo", "train", "compare", "find-rho", "evaluate", "predict", "benchmark", "sharpness", "plot"]
)
def test_help_names_no_default_where_there_is_none(command, capsys):
    """`None` is a word of Python, and says nothing of what happens then."""
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: " in text and "default: None" not in text


def test_env_says_the_versions(capsys):
    assert main(["env"]) == 0
    report = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert report["torch"] == torch.__version__
    assert report["transformers"] == transformers.__version__
    assert {"hf-aace", "accelerate", "datasets", "evaluate", "python", "platform", "CPU threads", "GPUs"} <= set(
        report
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_needs_no_torch_does_not_import_it(option):
    # Its import takes seconds.
    code = f"""
import sys
import time
from hf_aace.cli import main
try:
    main([{option!r}])
except SystemExit as stop:
    assert not stop.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hf-aace" in done.stdout


def command(*argv):
    """In a process group of its own, as a user types it."""
    program = [sys.executable, "-m", "hf_aace", *argv]
    return subprocess.run(
        program, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_an_error_is_all_that_is_printed():
    """Nothing of the libraries that are loaded on the way, such as bitsandbytes' word on kernels that it lacks."""
    done = command("predict", "--model_name_or_path", "model", "--images", "nowhere")
    assert done.returncode == 1
    assert done.stderr == "hf-aace: error: `images` must be a folder or an image, but there is no 'nowhere'.\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "heard"),
    [
        ("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", False),
        ("Failed to load the library of this GPU.", True),
    ],
)
def test_only_the_words_on_4_bit_kernels_are_not_heard(words, heard, caplog):
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning(words)
    assert (words in [record.msg for record in caplog.records]) == heard


# ---- Several processes -----------------------------------------------------

TWO_ON_CPU = ["--accelerate_config", "ddp", "--num_processes", "2", "--use_cpu", "true", "--ddp_backend", "gloo"]


def test_two_processes_train_one_model():
    done = command(*TINY, *TWO_ON_CPU, "--output_dir", "two")
    assert done.returncode == 0, done.stderr
    # Ours are the first lines on screen. With bitsandbytes installed, as here, Transformers imports it, and on some processors
    # it warns of kernels.
    assert done.stdout.startswith("Images:  40 for training, 500 for the test\n")
    assert "kernels" not in done.stderr
    # 40 images in two shares: one step of 2 x 20 an epoch, told and written by the main process alone.
    assert done.stdout.count("Test:") == done.stdout.count("Picture:") == 1
    assert done.stdout.count("'clean_loss'") == 3
    state = json.loads(Path("two/trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (3, 3.0)
    assert Path("two/training_curves.png").is_file()
    logged = json.loads(Path("two/all_results.json").read_text())
    answers = pipeline("image-classification", model="two", device="cpu")(PIL.Image.new("L", (8, 8)))
    assert all(0 <= answer["score"] <= 1 for answer in answers)
    assert 0 <= logged["eval_accuracy"] <= 1


def test_bad_input_of_several_processes_is_told_without_a_traceback(capfd):
    assert main([*TINY, *TWO_ON_CPU, "--rho", "nan"]) == 1
    error = capfd.readouterr().err
    assert "error: `rho` must be a finite number >= 0, got nan" in error
    assert "failed first, with exit code 1" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--accelerate_config", "single_gpu"], {"num_processes": None, "multi_gpu": False, "use_fsdp": False}),
        (["--accelerate_config", "ddp"], {"num_processes": 4, "main_process_port": 0}),
        (["--accelerate_config", "fsdp2", "--num_processes", "3"], {"num_processes": 3}),
    ],
)
def test_accelerate_is_asked_for_these_processes(argv, expected, monkeypatch):
    """One for each GPU, if no number is given."""
    launched = []
    monkeypatch.setattr("hf_aace.cli.launch.launch_command", launched.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert main([*TINY, *argv]) == 0
    (arguments,) = launched
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert (arguments.module, arguments.training_script) == (True, "hf_aace")
    assert arguments.training_script_args == [*TINY, *argv]


@pytest.mark.parametrize("own", [[], ["--num_processes", "6"]])
def test_a_file_of_accelerate_says_which_machines_and_which_port(own, tmp_path, monkeypatch):
    """As `accelerate config` wrote it on the second of two machines. Only a number of processes that is given wins."""
    path = tmp_path / "second.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 2\nmachine_rank: 1\nnum_processes: 8\n"
        "main_process_ip: 10.0.0.1\nmain_process_port: 29501\nsame_network: true\n"
    )
    launched = []
    monkeypatch.setattr("hf_aace.cli.launch.launch_command", launched.append)
    assert main([*TINY, "--accelerate_config", str(path), *own]) == 0
    arguments, *_ = accelerate.commands.launch._validate_launch_command(launched[0])
    assert (arguments.num_machines, arguments.machine_rank) == (2, 1)
    assert (arguments.main_process_ip, str(arguments.main_process_port)) == ("10.0.0.1", "29501")
    assert arguments.num_processes == (6 if own else 8)
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 8\n")
    assert main([*TINY, "--accelerate_config", str(path), *own]) == 0
    assert launched[1].main_process_port == 0, "or two runs at a time would take one port"
    for text in ("", "- a list", "a: b: c"):
        path.write_text(text)
        assert main([*TINY, "--accelerate_config", str(path)]) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single_gpu", {"multi_gpu": False, "use_fsdp": False}),
        ("ddp", {"multi_gpu": True, "use_fsdp": False}),
        (
            "fsdp2",
            {"multi_gpu": False, "use_fsdp": True, "fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"},
        ),
    ],
)
def test_shipped_configurations_are_what_accelerate_understands(name, expected):
    path = Path(hf_aace.__file__).with_name("cli") / "accelerate_configs" / f"{name}.yaml"
    parser = accelerate.commands.launch.launch_command_parser()
    parsed = parser.parse_args(["--config_file", str(path), "--num_processes", "2", "script.py"])
    arguments, *_ = accelerate.commands.launch._validate_launch_command(parsed)
    assert {key: getattr(arguments, key) for key in expected} == expected
