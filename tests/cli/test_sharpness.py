# SPDX-License-Identifier: Apache-2.0
"""`hf-aace sharpness` and `hf-aace plot`: what they read of runs, what they leave, and what they say of bad input."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tiny import png_of_16_bits
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_aace.analysis.sharpness import losses_and_gradient_norms, measure_sharpness
from hf_aace.cli import main
from hf_aace.vision.datasets import load_image_dataset


TINY = (
    "train --train_size 40 --label_noise 0.2 --max_steps 2 --disable_tqdm true --metrics accuracy --eval_strategy no "
    "--load_best_model_at_end false"
).split()
SAM = ["--perturbation_loss", "cross_entropy", "--normalize_perturbation", "true"]
QUICK = ["--steps", "1", "--directions", "2", "--m", "20", "--eigenvalues", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four runs: plain with two seeds, SAM and AACE."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {
        "plain-0": ["--rho", "0", "--seed", "0"],
        "plain-1": ["--rho", "0", "--seed", "1"],
        "sam": ["--rho", "0.1", *SAM],
        "aace": ["--rho", "0.1"],
    }.items():
        assert main([*TINY, *options, "--output_dir", str(folder / name)]) == 0
    return folder


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory):
    """The folder that `hf-aace sharpness` leaves."""
    out = tmp_path_factory.mktemp("sharpness")
    folders = [str(runs / name) for name in ("plain-0", "plain-1", "aace")]
    assert main(["sharpness", *folders, *QUICK, "--output_dir", str(out)]) == 0
    return out


def said(capsys, *argv):
    """Return stderr of a command that refuses its arguments."""
    capsys.readouterr()
    assert main(list(argv)) == 1
    return capsys.readouterr().err


def test_runs_are_measured_on_the_data_that_they_were_trained_on(runs, measured):
    """The same images with the same wrong labels."""
    report = json.loads((measured / "sharpness.json").read_text())
    assert {name: len(group) for name, group in report["runs"].items()} == {"Trainer": 2, "AACE, rho 0.1": 1}
    for seed, entry in enumerate(report["runs"]["Trainer"]):
        folder = runs / f"plain-{seed}"
        data = load_image_dataset("digits", seed=seed, train_size=40, label_noise=0.2)["train"]
        images = [image.convert("RGB") for image in data["image"]]
        inputs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
        model = AutoModelForImageClassification.from_pretrained(folder)
        expected = losses_and_gradient_norms(model, [{**inputs, "labels": torch.tensor(data["label"][:])}])
        assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        assert entry["samples"] == 40 and entry["step"] == 2


def test_the_table_and_the_pictures_are_there(runs, measured, tmp_path, capsys):
    for name in ("sharpness", "margins"):
        with PIL.Image.open(measured / f"{name}.png") as picture:
            picture.load()
        assert (measured / f"{name}.svg").read_text().startswith("<?xml")
    folders = [str(runs / name) for name in ("plain-0", "plain-1", "sam")]
    before = load_file(runs / "sam" / "model.safetensors")
    assert main(["sharpness", *folders, *QUICK, "--output_dir", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "out" / "sharpness.json").read_text())["runs"]
    rows = {
        line[:35].strip(): line[35:].split() for line in lines if line.startswith(("SAM sharpness, radius", "runs"))
    }
    values = [run["sam_sharpness"] for run in report["Trainer"]]
    assert f"{np.mean(values):.4g}" in rows["SAM sharpness, radius 0.05"]
    assert f"{np.std(values, ddof=1) / 2**0.5:.1g}" in rows["SAM sharpness, radius 0.05"]
    assert not any("Hessian" in line for line in lines)
    after = load_file(runs / "sam" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_was_measured_is_not_measured_again(runs, tmp_path, capsys, monkeypatch):
    """Be it that it was interrupted, or that a run is added; but with other settings, or of other weights."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "aace", folder, ignore=shutil.ignore_patterns("checkpoint-*", "sharpness.json"))
    calls = []

    def count(*args, **kwargs):
        calls.append(1)
        return measure_sharpness(*args, **kwargs)

    monkeypatch.setattr("hf_aace.cli.sharpness.measure_sharpness", count)
    argv = ["sharpness", str(folder), *QUICK, "--max_samples", "10"]
    for options, expected in [([], 1), ([], 1), (["--rho", "0.1"], 2), (["--rho", "0.1", "--split", "test"], 3)]:
        assert main([*argv, *options, "--output_dir", "out"]) == 0
        assert len(calls) == expected
    report = json.loads((tmp_path / "out" / "sharpness.json").read_text())
    (folder / "model.safetensors").touch()
    assert main([*argv, "--rho", "0.1", "--split", "test", "--output_dir", "again"]) == 0
    assert len(calls) == 4
    again = json.loads((tmp_path / "again" / "sharpness.json").read_text())
    assert again["runs"]["AACE, rho 0.1"][0]["margins"] == report["runs"]["AACE, rho 0.1"][0]["margins"]
    assert "1 measured, 1 of them before." in capsys.readouterr().out


def test_runs_that_cannot_be_written_to_are_measured_and_drawn(runs, tmp_path, monkeypatch):
    """Another user's, say: then nothing is kept in them. (Not by `chmod`, which does not hold the superuser back.)"""
    folder = tmp_path / "run"
    shutil.copytree(
        runs / "aace", folder, ignore=shutil.ignore_patterns("checkpoint-*", "sharpness.json", "landscapes")
    )
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    before = set(folder.iterdir())
    assert main(["sharpness", str(folder), *QUICK]) == 0
    assert main(["plot", str(folder), "--points", "2", "--max_samples", "10", "--figures", "contour"]) == 0
    assert set(folder.iterdir()) == before
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"sharpness", "plot"}


def test_only_our_lines_are_on_the_screen(runs, capsys):
    """Not the libraries' progress bars, several for each run."""
    assert main(["sharpness", str(runs / "plain-0"), *QUICK, "--max_samples", "10"]) == 0
    assert "%|" not in capsys.readouterr().err


def test_progress_is_shown_in_a_terminal(runs, capsys, monkeypatch, tmp_path):
    """With an end that it reaches: a bar that ends at half its way would say that something is missing."""
    folders = []
    for name in ("plain-0", "sam"):
        folders.append(str(tmp_path / name))
        shutil.copytree(runs / name, folders[-1], ignore=shutil.ignore_patterns("sharpness.json", "landscapes"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bars = []

    class Recorded(tqdm):
        def __exit__(self, *exception):
            bars.append((self.n, self.total))
            super().__exit__(*exception)

    monkeypatch.setattr("hf_aace.cli.runs.tqdm", Recorded)
    options = ["--max_samples", "10", "--batch_size", "4"]
    for argv in (["sharpness", *QUICK, "--m", "3"], ["plot", "--points", "2", "--figures", "contour", "path"]):
        bars.clear()
        assert main([argv[0], *folders, *argv[1:], *options]) == 0
        assert "batch/s" in capsys.readouterr().err
        assert len(bars) >= 2 and all(seen == total >= 12 for seen, total in bars)


def test_the_picture_of_a_single_run_shows_loss_eigenvalues_and_margins(runs, monkeypatch):
    """Bars of one run beside nothing would be no picture."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    folder = str(runs / "sam")
    options = ["--steps", "1", "--directions", "2", "--m", "0", "--products", "6", "--max_samples", "10"]
    for eigenvalues, titles in (("2", ["Loss", "Hessian eigenvalues", "Margins"]), ("0", ["Loss", "Margins"])):
        figures.clear()
        assert main(["sharpness", folder, *options, "--eigenvalues", eigenvalues]) == 0
        assert [axes.get_title(loc="left").split(" (")[0] for axes in figures[0].axes] == titles
        report = json.loads(Path("runs/sharpness/sharpness.json").read_text())["runs"]["SAM, rho 0.1"][0]
        bars = figures[0].axes[0].containers
        assert {bar.get_width() for bar in bars[0]} == {report["cross_entropy"]}
        assert bars[1][0].get_width() == report["sam_sharpness"]
        counts = sum(bar.get_height() for bar in figures[0].axes[-1].patches)
        assert counts == report["samples"] == 10


def test_checkpoints_are_measured_for_the_course(runs, capsys):
    options = ["--steps", "1", "--directions", "2", "--m", "0", "--eigenvalues", "1", "--products", "6"]
    options += ["--max_samples", "10"]
    assert main(["sharpness", str(runs / "aace"), *options, "--checkpoints", "true"]) == 0
    assert "top Hessian eigenvalue" in capsys.readouterr().out
    entries = json.loads((runs / "aace" / "sharpness.json").read_text())["measures"]
    assert [entry["step"] for entry in entries] == [1, 2, 2]
    assert entries[0]["cross_entropy"] != entries[1]["cross_entropy"]
    assert entries[1]["sam_sharpness"] == entries[2]["sam_sharpness"], "the last checkpoint is the model"
    assert main(["sharpness", str(runs / "aace"), *options]) == 0
    assert json.loads((runs / "aace" / "sharpness.json").read_text())["measures"] == entries, "they took their time"


def test_the_course_ends_with_the_last_checkpoint(runs, tmp_path, monkeypatch):
    """The run itself may have the weights of the best one, and they were no second run."""
    shutil.copytree(runs / "aace", tmp_path / "mine")
    options = [*QUICK, "--m", "0", "--max_samples", "10", "--checkpoints", "true"]
    assert main(["sharpness", "mine", *options]) == 0
    report = json.loads(Path("mine/sharpness.json").read_text())
    values = [entry["sam_sharpness"] for entry in report["measures"]]
    report["measures"][-1]["sam_sharpness"] = 1000.0
    Path("mine/sharpness.json").write_text(json.dumps(report))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    assert main(["plot", str(tmp_path / "mine"), "--figures", "dynamics"]) == 0
    (axes,) = [each for each in drawn[0].axes if each.get_title(loc="left") == "SAM sharpness"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx(values[:-1])


def test_images_are_decoded_as_in_training(runs, tmp_path):
    """Those of 16 bits in color too, of which a decoded image does not tell any more that it was one."""
    for name, highest in (("0", 4095), ("1", 8191)):
        (tmp_path / "deep" / name).mkdir(parents=True)
        for index in range(6):
            values = np.linspace(0, highest, 64 * 3).reshape(8, 8, 3).astype(np.uint16)
            (tmp_path / "deep" / name / f"{index}.png").write_bytes(png_of_16_bits(values))
    data = ["--dataset_name", "deep", "--image_range", "0", "8191", "--model_name_or_path", "vit-tiny-digits"]
    assert (
        main(["train", *data, "--rho", "0", "--max_steps", "1", "--disable_tqdm", "true", "--output_dir", "of-deep"])
        == 0
    )
    assert main(["evaluate", "--model_name_or_path", "of-deep", "--split", "train", "--output_dir", "evaluated"]) == 0
    assert main(["sharpness", "of-deep", *QUICK, "--m", "0"]) == 0
    expected = json.loads(Path("evaluated/evaluation.json").read_text())["accuracy"]
    measured = json.loads(Path("runs/sharpness/sharpness.json").read_text())["runs"]["Trainer"][0]
    assert measured["accuracy"] == expected
    with open("evaluated/predictions.csv", newline="") as file:
        believed = sorted(float(row["label_score"]) for row in csv.DictReader(file))
    assert sorted(torch.tensor(measured["margins"]).sigmoid().tolist()) == pytest.approx(believed, abs=1e-4)


def test_plot_draws_runs_side_by_side_and_keeps_the_grids(runs, tmp_path, capsys, drawn):
    folders = [str(runs / name) for name in ("plain-0", "plain-1", "sam", "aace")]
    options = ["--points", "2", "--formats", "png", "--max_samples", "10"]
    assert main(["plot", *folders, *options]) == 0
    names = {path.name for path in (tmp_path / "runs" / "plot").iterdir()}
    assert names == {"dynamics.png", "contour.png", "surface.png", "path.png"}
    assert capsys.readouterr().out.count("Picture: ") == 4
    grids = {path: path.stat().st_mtime_ns for path in runs.glob("*/landscapes/*.npz")}
    assert sorted(path.name.split("-")[0] for path in grids) == ["path"] * 2 + ["surface"] * 3
    assert main(["plot", *folders, *options, "--figures", "contour", "path"]) == 0
    assert grids == {path: path.stat().st_mtime_ns for path in runs.glob("*/landscapes/*.npz")}


def test_names_and_data_can_be_given_for_runs_that_do_not_say(runs, tmp_path, capsys):
    shutil.copytree(runs / "sam", tmp_path / "mine")
    (tmp_path / "mine" / "train_options.json").unlink()
    assert "Give it by `--dataset_name`" in said(capsys, "sharpness", "mine")
    given = ["--dataset_name", "digits", "--split", "test", "--max_samples", "30", "--names", "My method"]
    assert main(["sharpness", "mine", *given, *QUICK, "--m", "0"]) == 0
    report = json.loads((tmp_path / "runs" / "sharpness" / "sharpness.json").read_text())
    assert report["runs"]["My method"][0]["samples"] == 30


@pytest.mark.parametrize("command", ["sharpness", "plot", "benchmark"])
def test_a_folder_for_results_that_cannot_be_one_is_told(command, runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = [command] if command == "benchmark" else [command, str(runs / "sam")]
    assert "`output_dir` is 'file', but 'file' is no folder" in said(capsys, *argv, "--output_dir", "file")


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged_unasked(runs, tmp_path, capsys):
    shutil.copytree(runs / "plain-0", tmp_path / "other")
    options = json.loads((runs / "plain-0" / "train_options.json").read_text())
    (tmp_path / "other" / "train_options.json").write_text(json.dumps(options | {"train_size": 30}))
    message = said(capsys, "plot", str(runs / "plain-0"), "other")
    assert "both be called 'Trainer'" in message and "train_size" in message and "--names" in message


def test_runs_that_were_trained_otherwise_or_with_one_seed_are_not_averaged_unasked(runs, tmp_path, capsys):
    assert main([*TINY, "--rho", "0", "--seed", "1", "--learning_rate", "0.1", "--output_dir", "faster"]) == 0
    assert "they differ in learning_rate, seed." in said(capsys, "plot", str(runs / "plain-0"), "faster")
    assert "they differ in learning_rate." in said(capsys, "plot", str(runs / "plain-1"), "faster")
    options = json.loads(Path("faster/train_options.json").read_text())
    del options["learning_rate"]  # as an older version wrote them
    Path("faster/train_options.json").write_text(json.dumps(options))
    assert "they differ in learning_rate, seed." in said(capsys, "plot", str(runs / "plain-0"), "faster")
    again = [str(runs / name) for name in ("plain-0", "plain-1", "plain-0")]
    assert "they do not differ, not even in the seed." in said(capsys, "plot", *again)


def test_other_data_are_read_by_their_own_columns_and_sizes(runs, tmp_path):
    shutil.copytree(runs / "sam", tmp_path / "mine")
    options = json.loads((tmp_path / "mine" / "train_options.json").read_text())
    options |= {"label_column_name": "fine_label", "validation_size": 0.2}
    (tmp_path / "mine" / "train_options.json").write_text(json.dumps(options))
    digits = load_image_dataset("digits", seed=0, train_size=20)["train"]  # the run had 40
    DatasetDict(train=digits, test=digits).save_to_disk(tmp_path / "others")
    for split in ("train", "test"):
        assert main(["sharpness", "mine", "--dataset_name", "others", "--split", split, *QUICK, "--m", "0"]) == 0
        report = json.loads((tmp_path / "runs" / "sharpness" / "sharpness.json").read_text())
        assert report["runs"]["SAM, rho 0.1"][0]["samples"] == 20
    files = sorted((tmp_path / "others").rglob("*"))
    for noise in ("0", "0.2"):
        data = ["--dataset_name", "others", "--label_noise", noise, "--max_samples", "10"]
        assert main(["sharpness", "mine", *data, *QUICK, "--m", "0"]) == 0
    assert sorted((tmp_path / "others").rglob("*")) == files, "the folder is the user's"


def test_adapters_alone_are_refused_before_anything_is_measured(runs, tmp_path, capsys):
    """As the checkpoints of a run with LoRA hold them."""
    shutil.copytree(runs / "sam", tmp_path / "lora")
    (tmp_path / "lora" / "checkpoint-2").mkdir(exist_ok=True)
    (tmp_path / "lora" / "checkpoint-2" / "adapter_config.json").write_text("{}")
    assert main(["sharpness", str(runs / "plain-0"), "lora", "--checkpoints", "true", *QUICK]) == 1
    printed = capsys.readouterr()
    assert "has the adapters of LoRA only" in printed.err and "Measuring" not in printed.out


def test_nothing_is_measured_before_a_folder_of_which_nothing_says_the_data(runs, tmp_path, capsys):
    """As a script of one's own leaves it."""
    shutil.copytree(runs / "sam", tmp_path / "script")
    (tmp_path / "script" / "train_options.json").unlink()
    assert main(["sharpness", str(runs / "plain-0"), str(tmp_path / "script"), *QUICK]) == 1
    printed = capsys.readouterr()
    assert "no train_options.json that says which data" in printed.err and "Measuring" not in printed.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sharpness", "nowhere"], "There is no folder 'nowhere'"),
        (["plot", "empty", "--figures", "dynamics"], "no trainer_state.json"),
        (["plot", "empty", "--figures", "dynamics"], "`trainer.save_state()`"),
        (["sharpness", "empty"], "no config.json"),
        (["sharpness", "empty", "--names", "a", "b"], "`names` must hold one for each run: 1, got 2"),
        (["sharpness", "empty", "--split", "valid"], "`split` must be `train` or `test`, got 'valid'"),
        (["sharpness", "empty", "--max_samples", "0"], "`max_samples` must be at least 1, got 0"),
        (["sharpness", "empty", "--device", "tpu"], "`device` must be"),
        (["plot", "empty", "--figures", "pie"], "`figures` must be of dynamics"),
        (["plot", "empty", "--width", "0"], "`width` must be at least 2"),
    ],
)
def test_bad_input_is_told_in_a_sentence(argv, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert message in said(capsys, *argv)


def test_other_classes_than_the_models_are_refused(runs, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(5):
            PIL.Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "pets" / name / f"{index}.png")
    message = said(capsys, "sharpness", str(runs / "sam"), "--dataset_name", "pets", "--train_size", "4")
    assert "does not know these classes of the data: cat, dog" in message


def test_classes_in_another_order_are_the_same(runs, tmp_path):
    """Their names say what they are, not their numbers."""
    digits = load_image_dataset("digits", seed=0, train_size=60)["train"]
    names = [str(name) for name in reversed(range(10))]
    turned = {"image": digits["image"][:], "label": [9 - label for label in digits["label"]]}
    features = Features(image=Image(), label=ClassLabel(names=names))
    for name, data in {"same": digits, "turned": Dataset.from_dict(turned, features=features)}.items():
        DatasetDict(train=data, test=data).save_to_disk(name)
        data = ["--dataset_name", name, "--train_size", "60", "--label_noise", "0"]
        assert main(["sharpness", str(runs / "sam"), *data, *QUICK, "--output_dir", f"of-{name}"]) == 0
    losses = [
        json.loads((tmp_path / f"of-{name}" / "sharpness.json").read_text())["runs"]["SAM, rho 0.1"][0][
            "cross_entropy"
        ]
        for name in ("same", "turned")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_streamed_images_are_to_be_named(runs, tmp_path, capsys):
    """No other reading can tell which images were streamed."""
    shutil.copytree(runs / "sam", tmp_path / "streamed")
    options = json.loads((runs / "sam" / "train_options.json").read_text())
    (tmp_path / "streamed" / "train_options.json").write_text(json.dumps(options | {"streaming": True}))
    assert "streamed its images. Say by `--dataset_name`" in said(capsys, "sharpness", "streamed")


def test_measures_of_an_earlier_run_in_the_folder_are_not_drawn(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "sam", tmp_path / "again")
    assert main(["sharpness", "again", *QUICK, "--checkpoints", "true"]) == 0
    drawn = []
    monkeypatch.setattr("hf_aace.cli.plot.plot_dynamics", lambda histories, *args, **kwargs: drawn.append(histories))
    assert main(["plot", "again", "--figures", "dynamics"]) == 0
    for path in (tmp_path / "again").rglob("*.safetensors"):
        path.touch()  # trained anew
    assert main(["plot", "again", "--figures", "dynamics"]) == 0
    assert [any("sam_sharpness" in entry for entry in each["SAM, rho 0.1"][0]) for each in drawn] == [True, False]
