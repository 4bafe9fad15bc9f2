# SPDX-License-Identifier: Apache-2.0
"""`hf-aace evaluate` and `hf-aace predict`: what they measure and write, and what they say when the input is bad."""

import csv
import json
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import set_seed

from hf_aace.cli import main
from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.inference import classify
from hf_aace.vision.models import load_model_and_processor


COLOURS = ["black", "grey", "white"]


def save_model(folder, classes):
    """A model that was never trained, so that it errs."""
    set_seed(1)
    model, processor = load_model_and_processor("convnext-tiny-digits", dict(enumerate(classes)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def save_images(folder, classes=COLOURS, count=8):
    for number, name in enumerate(classes):
        (Path(folder) / name).mkdir(parents=True)
        for index in range(count):
            image = PIL.Image.new("L", (8, 8), min(255, 120 * number + index))
            image.save(Path(folder) / name / f"{index}.png")


def message(capsys, *argv):
    capsys.readouterr()
    assert main(list(argv)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-aace: error: ")
    return error


def table(path="predictions.csv"):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- evaluate --------------------------------------------------------------


def test_results_are_those_of_the_model_on_the_test_images(capsys, drawn):
    model, processor = save_model("model", [str(digit) for digit in range(10)])
    argv = ["evaluate", "--model_name_or_path", "model", "--dataset_name", "digits", "--num_mistakes", "7"]
    assert main(argv) == 0
    folder = Path("runs/evaluate-model-digits")
    results = json.loads((folder / "evaluation.json").read_text())

    test = load_image_dataset("digits", seed=0)["test"]
    inputs = processor([image.convert("RGB") for image in test["image"]], return_tensors="pt")
    with torch.no_grad():
        probabilities = model.eval()(**inputs).logits.softmax(-1).numpy()
    labels, predicted = np.array(test["label"][:]), probabilities.argmax(-1)
    matrix = np.zeros((10, 10), dtype=int)
    np.add.at(matrix, (labels, predicted), 1)
    assert results["images"] == 500
    assert results["accuracy"] == pytest.approx((labels == predicted).mean())
    assert np.array_equal(results["confusion_matrix"], matrix)
    assert {"macro_f1", "samples_per_second", "total_time_in_seconds"} <= set(results)

    # The worst mistakes: wrong, and of all that are wrong with the least probability of the truth, in order.
    truth = np.sort(probabilities[np.arange(500), labels][labels != predicted])
    mistakes = results["worst_mistakes"]
    assert [row["label_score"] for row in mistakes] == pytest.approx(truth[:7].tolist(), abs=1e-5)
    assert all(row["label"] != row["prediction"] for row in mistakes)

    # The table of all images begins with those whose label the model believes least: there wrong labels would be.
    answers = table(folder / "predictions.csv")
    rows = [int(row["image"].removeprefix("image ")) for row in answers]
    believed = [float(row["label_score"]) for row in answers]
    assert sorted(rows) == list(range(500)) and believed == sorted(believed)
    assert believed == pytest.approx(probabilities[rows, labels[rows]].tolist(), abs=1e-5)
    assert [int(row["label"]) for row in answers] == labels[rows].tolist()
    assert [int(row["prediction"]) for row in answers] == predicted[rows].tolist()
    for name in ("confusion_matrix.png", "mistakes.png"):
        with PIL.Image.open(folder / name) as picture:
            picture.load()
    assert f"accuracy {results['accuracy']:.4f}" in capsys.readouterr().out


def test_a_run_is_evaluated_on_the_data_that_it_was_trained_on(capsys):
    """Read as it was then, unless the command line says otherwise; the columns of one data set are not those of another."""
    save_model("model", COLOURS)
    save_images("images")
    Path("images/black/broken.png").write_bytes(b"no image")
    trained = {"dataset_name": "images", "image_column_name": "image", "skip_corrupt_images": True, "rho": 0.1}
    Path("model/train_options.json").write_text(json.dumps(trained))
    argv = ["evaluate", "--model_name_or_path", "model", "--split", "all"]
    assert main(argv) == 0
    results = json.loads(Path("runs/evaluate-model-images/evaluation.json").read_text())
    assert (results["dataset"], results["images"]) == ("images", 24)
    assert "broken.png" in message(capsys, *argv, "--skip_corrupt_images", "false")

    save_model("model/checkpoint-1", COLOURS)  # of this run
    assert main(["evaluate", "--model_name_or_path", "model/checkpoint-1", "--output_dir", "checkpoint"]) == 0
    assert json.loads(Path("checkpoint/evaluation.json").read_text())["dataset"] == "images"

    rows = {"picture": [PIL.Image.new("L", (8, 8))] * 6, "colour": [0, 1, 2] * 2}
    features = datasets.Features(picture=datasets.Image(), colour=datasets.ClassLabel(names=COLOURS))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk("saved")
    other = [*argv, "--dataset_name", "saved", "--label_column_name", "colour"]
    assert main([*other, "--output_dir", "out"]) == 0
    assert json.loads(Path("out/evaluation.json").read_text())["images"] == 6
    assert "shade" in message(capsys, *argv, "--dataset_name", "saved", "--label_column_name", "shade")


def test_classes_are_matched_by_name_whatever_their_order():
    model, processor = save_model("model", ["white", "unseen", "black", "grey"])
    save_images("images")
    argv = ["evaluate", "--model_name_or_path", "model", "--dataset_name", "images", "--split", "all"]
    assert main([*argv, "--output_dir", "out", "--metrics", "accuracy"]) == 0
    results = json.loads(Path("out/evaluation.json").read_text())
    assert results["classes"] == ["white", "unseen", "black", "grey"]
    assert results["images"] == 24
    assert np.sum(results["confusion_matrix"], axis=1).tolist() == [8, 0, 8, 8]
    right = 0
    for path in Path("images").rglob("*.png"):
        inputs = processor([PIL.Image.open(path).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            right += model.config.id2label[model.eval()(**inputs).logits.argmax().item()] == path.parent.name
    assert results["accuracy"] == pytest.approx(right / 24)
    assert all(Path(row["image"]).is_file() for row in results["worst_mistakes"])


def test_classes_are_told_by_their_numbers_in_whatever_order_the_file_lists_them():
    """As texts, 10 comes before 2."""
    save_model("model", COLOURS)
    save_images("images")
    path = Path("model/config.json")
    config = json.loads(path.read_text())
    config["id2label"] = {key: config["id2label"][key] for key in ("2", "0", "1")}
    path.write_text(json.dumps(config))
    argv = ["evaluate", "--model_name_or_path", "model", "--dataset_name", "images", "--split", "all"]
    assert main([*argv, "--output_dir", "out"]) == 0
    assert json.loads(Path("out/evaluation.json").read_text())["classes"] == COLOURS
    assert all(row["label"] == Path(row["image"]).parent.name for row in table("out/predictions.csv"))


def test_all_images_are_those_of_every_split():
    save_model("model", COLOURS)
    for split, count in {"train": 3, "validation": 2, "test": 1}.items():
        save_images(f"images/{split}", count=count)
    argv = ["evaluate", "--model_name_or_path", "model", "--dataset_name", "images", "--split", "all"]
    assert main([*argv, "--output_dir", "out"]) == 0
    assert len(table("out/predictions.csv")) == 18


def test_the_training_images_of_a_run_are_those_that_it_saw_with_their_labels():
    """Where labels were replaced at random, the list of wrong labels is to find these; `sharpness` looks at the same images."""
    save_model("model", [str(digit) for digit in range(10)])
    drawn = {"seed": 3, "train_size": 50, "label_noise": 0.4, "validation_size": 0.2}
    Path("model/train_options.json").write_text(json.dumps({"dataset_name": "digits", **drawn}))
    argv = ["evaluate", "--model_name_or_path", "model", "--output_dir", "out", "--split"]
    assert main([*argv, "train"]) == 0
    expected = load_image_dataset("digits", **drawn)["train"]
    rows = table("out/predictions.csv")
    assert len(rows) == 50
    labels = {int(row["image"].removeprefix("image ")): int(row["label"]) for row in rows}
    assert [labels[row] for row in range(50)] == expected["label"][:]
    for split, count in (("test", 500), ("all", 1797)):
        assert main([*argv, split]) == 0
        assert json.loads(Path("out/evaluation.json").read_text())["images"] == count


def test_to_evaluate_takes_no_more_than_an_image_of_one_class(capsys):
    """Nothing is trained on them or set apart, and the model knows the other classes."""
    save_model("model", COLOURS)
    argv = ["evaluate", "--model_name_or_path", "model", "--output_dir", "out", "--split"]
    save_images("each", count=1)
    save_images("grey", ["grey"], count=4)
    save_images("pink", ["pink"])
    for folder, count in (("each", 3), ("grey", 4)):
        assert main([*argv, "all", "--dataset_name", folder]) == 0
        report = json.loads(Path("out/evaluation.json").read_text())
        assert report["images"] == np.sum(report["confusion_matrix"]) == count
        assert "Add some" in message(capsys, *argv, "test", "--dataset_name", "each")
    assert "does not know these classes of the data: pink" in message(capsys, *argv, "all", "--dataset_name", "pink")


def test_images_that_are_left_out_for_want_of_a_test_split_are_told(warnings):
    """Of a folder that the model never saw, all could be used."""
    save_model("model", COLOURS)
    save_images("images", count=10)
    argv = ["evaluate", "--model_name_or_path", "model", "--dataset_name", "images", "--output_dir", "out"]
    assert main(argv) == 0
    assert warnings == [
        "'images' has no test split, so that 6 of its 30 images are used. Give `--split all` to use all, unless the "
        "model was trained on some of them."
    ]
    warnings.clear()
    assert main([*argv, "--split", "all"]) == 0
    Path("model/train_options.json").write_text(json.dumps({"dataset_name": "images"}))
    assert main(argv) == 0 and not warnings


def test_a_model_that_gives_nan_is_told(capsys):
    model, _ = save_model("model", COLOURS)
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    model.save_pretrained("model")
    save_images("images")
    told = "gives no finite logits for some image. Its training may have diverged"
    assert told in message(capsys, "evaluate", "--model_name_or_path", "model", "--dataset_name", "images")
    assert told in message(capsys, "predict", "--model_name_or_path", "model", "--images", "images")


def test_files_with_names_that_are_no_text_are_named(capsys, caplog, monkeypatch):
    """As archives of older systems have them: no table can hold such a name."""
    monkeypatch.setattr(logging.getLogger("hf_aace.cli.predict"), "propagate", True)
    save_model("model", COLOURS)
    save_images("images")
    try:
        os.rename(b"images/grey/0.png", b"images/grey/stra\xdfe.png")
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    assert main(["predict", "--model_name_or_path", "model", "--images", "images"]) == 0
    assert len(table()) == 23
    assert (
        r"The names of 1 files in 'images' are not in UTF-8, and they are left out: 'grey/stra\udcdfe.png'"
        in caplog.text
    )
    error = message(capsys, "evaluate", "--model_name_or_path", "model", "--dataset_name", "images")
    assert (
        r"such as 'images/grey/stra\udcdfe.png', are not in UTF-8, so that they cannot be read. Rename them." in error
    )


def test_mistakes_are_drawn_in_the_range_that_the_model_got_them(monkeypatch):
    """Pillow shows nearly all of 12 bits as white."""
    drawn = []
    monkeypatch.setattr("hf_aace.cli.evaluate.plot_image_grid", lambda images, *args: drawn.extend(images))
    save_model("model", COLOURS)
    for number, name in enumerate(COLOURS):
        Path("images", name).mkdir(parents=True)
        for index in range(8):
            pixels = np.full((8, 8), 2000 * number + index, dtype=np.uint16)
            pixels[0] = 4095
            PIL.Image.fromarray(pixels).save(f"images/{name}/{index}.png")
    argv = ["evaluate", "--model_name_or_path", "model", "--dataset_name", "images", "--split", "all"]
    assert main([*argv, "--image_range", "0", "4095", "--output_dir", "out"]) == 0
    levels = {image.getpixel((4, 4))[0] for image in drawn}
    assert all(image.mode == "RGB" for image in drawn) and 100 < max(levels) < 255


def test_a_perfect_model_has_no_mistakes_to_draw(monkeypatch):
    save_model("model", COLOURS)
    save_images("images")
    truth = {name: index for index, name in enumerate(COLOURS)}

    def perfect(model, processor, images, **options):
        for image in images:
            yield np.eye(3)[truth[Path(image["path"]).parent.name]]

    monkeypatch.setattr("hf_aace.cli.evaluate.classify", perfect)
    Path("out").mkdir()
    Path("out/mistakes.png").write_bytes(b"of an earlier call")
    argv = ["evaluate", "--model_name_or_path", "model", "--dataset_name", "images", "--output_dir", "out"]
    assert main(argv) == 0
    assert json.loads(Path("out/evaluation.json").read_text())["accuracy"] == 1
    assert not Path("out/mistakes.png").exists()


def test_classes_that_the_model_does_not_know_are_named(capsys):
    save_model("model", ["black", "white", "red"])
    save_images("images")
    error = message(capsys, "evaluate", "--model_name_or_path", "model", "--dataset_name", "images")
    assert "does not know these classes of the data: grey. It knows black, white, red" in error


def test_classes_without_names_are_matched_by_number_if_as_many(capsys):
    save_images("images")
    save_model("three", ["LABEL_0", "LABEL_1", "LABEL_2"])
    argv = ["--dataset_name", "images", "--output_dir", "out"]
    assert main(["evaluate", "--model_name_or_path", "three", *argv]) == 0
    save_model("two", ["LABEL_0", "LABEL_1"])
    error = message(capsys, "evaluate", "--model_name_or_path", "two", *argv)
    assert "2 classes without names, the data 3" in error


# ---- predict ---------------------------------------------------------------


def test_table_has_the_likeliest_classes_of_each_image():
    model, processor = save_model("model", COLOURS)
    save_images("images", count=3)
    PIL.Image.fromarray(np.full((9, 7, 4), 200, dtype=np.uint8)).save("images/transparent.webp")
    argv = ["predict", "--model_name_or_path", "model", "--images", "images", "--top_k", "2", "--batch_size", "4"]
    assert main([*argv, "--output_file", "tables/p.csv"]) == 0
    rows = table("tables/p.csv")
    assert [row["image"] for row in rows] == sorted(
        path.relative_to("images").as_posix() for path in Path("images").rglob("*.*")
    )
    for row in rows[:-1]:
        inputs = processor([PIL.Image.open(Path("images") / row["image"]).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            probabilities = model.eval()(**inputs).logits.softmax(-1)[0]
        scores, classes = probabilities.topk(2)
        assert [row["label_1"], row["label_2"]] == [model.config.id2label[index] for index in classes.tolist()]
        assert [float(row["score_1"]), float(row["score_2"])] == pytest.approx(scores.tolist(), abs=1e-5)
        assert row["error"] == ""


def test_unreadable_images_are_named_and_do_not_stop_it(capsys):
    save_model("model", COLOURS)
    save_images("images", count=2)
    Path("images/black/broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    for name in ("notes.txt", "scan.pdf"):  # Pillow writes pdf, but does not read it
        Path("images", name).write_text("not an image, and not taken for one")
    assert main(["predict", "--model_name_or_path", "model", "--images", "images"]) == 0
    captured = capsys.readouterr()
    assert "cannot read black/broken.jpg" in captured.err
    assert "7 images, of which 1 could not be read" in captured.out
    bad = [row for row in table() if row["error"]]
    assert [row["image"] for row in bad] == ["black/broken.jpg"]
    assert bad[0]["label_1"] == "" and "broken.jpg" in bad[0]["error"]
    assert sum(row["label_1"] in COLOURS for row in table()) == 6


def test_images_that_are_left_out_or_read_in_part_are_told(caplog, monkeypatch):
    """As `train` and `evaluate` tell it."""
    monkeypatch.setattr(logging.getLogger("hf_aace"), "propagate", True)
    save_model("model", COLOURS)
    save_images("images", count=2)
    Path("images/black/0.png").rename("images/black/0")
    Path("images/photo.heic").write_bytes(b"of a telephone")
    Path("images/notes.txt").write_text("not an image")
    frames = [PIL.Image.new("L", (8, 8), value) for value in (0, 128, 255)]
    frames[0].save("images/pages.tiff", save_all=True, append_images=frames[1:])
    dark = np.random.default_rng(0).integers(0, 4096, (8, 8)).astype(np.uint16)
    for index in range(4):
        PIL.Image.fromarray(dark).save(f"images/dark-{index}.png")
    assert main(["predict", "--model_name_or_path", "model", "--images", "images"]) == 0
    assert len(table()) == 10
    assert "2 images in 'images' are of a kind that is not read, or have no ending" in caplog.text
    assert "black/0" in caplog.text and "photo.heic" in caplog.text and "notes.txt" not in caplog.text
    assert (
        "1 of the images in 'images' have more than one page or frame" in caplog.text and "pages.tiff" in caplog.text
    )
    assert "The images of 16 bits in 'images'" in caplog.text


def test_images_behind_links_to_folders_are_found():
    """As in training."""
    save_model("model", COLOURS)
    save_images("images", count=2)
    Path("linked").mkdir()
    Path("linked/all").symlink_to(Path("images").resolve())
    assert main(["predict", "--model_name_or_path", "model", "--images", "linked"]) == 0
    assert len(table()) == 6


@pytest.mark.parametrize("from_run", [False, True])
def test_values_of_twelve_bits_are_scaled_as_the_option_or_the_run_says(from_run):
    save_model("model", COLOURS)
    pattern = np.random.default_rng(0).integers(0, 2, (8, 8))
    for folder, image in (
        ("deep", PIL.Image.fromarray((4095 * pattern).astype(np.uint16))),
        ("usual", PIL.Image.fromarray((255 * pattern).astype(np.uint8))),
    ):
        Path(folder).mkdir()
        image.save(Path(folder, "1.png"))
    argv = ["predict", "--model_name_or_path", "model", "--top_k", "3"]
    assert main([*argv, "--images", "usual", "--output_file", "usual.csv"]) == 0
    assert main([*argv, "--images", "deep", "--output_file", "dark.csv"]) == 0
    if from_run:
        Path("model/train_options.json").write_text(json.dumps({"image_range": [0, 4095]}))
    else:
        argv += ["--image_range", "0", "4095"]
    assert main([*argv, "--images", "deep", "--output_file", "deep.csv"]) == 0
    assert table("deep.csv") == table("usual.csv") != table("dark.csv")


def test_a_single_image_is_enough():
    save_model("model", COLOURS)
    PIL.Image.new("RGB", (5, 5)).save("one.png")
    assert main(["predict", "--model_name_or_path", "model", "--images", "one.png"]) == 0
    assert [row["image"] for row in table()] == ["one.png"]


def test_images_are_read_when_they_are_needed():
    """However many there are: memory stays flat."""
    model, processor = save_model("model", COLOURS)
    asked = []

    def images():
        for index in range(100):
            asked.append(index)
            yield PIL.Image.new("RGB", (8, 8))

    answers = classify(model, processor, images(), batch_size=4)
    next(answers)
    assert len(asked) == 4


def test_probabilities_are_those_of_a_model_in_evaluation_mode():
    """Whatever mode it is in: one may classify in the middle of a training."""
    model, processor = save_model("model", COLOURS)
    images = [PIL.Image.new("L", (8, 8), value) for value in (0, 120, 240)]
    model.classifier = torch.nn.Sequential(torch.nn.Dropout(0.9), model.classifier)
    first, again = (list(classify(model.train(), processor, images)) for _ in range(2))
    assert np.array_equal(first, again) and not model.training


def test_probabilities_are_of_32_bits_whatever_the_scores():
    """In 16 bits they would not sum to 1, and many would be equal."""
    model, processor = save_model("model", COLOURS)
    with torch.autocast("cpu", torch.bfloat16):
        (probabilities,) = classify(model, processor, [PIL.Image.new("L", (8, 8), 120)])
    assert probabilities.dtype == np.float32 and probabilities.sum() == pytest.approx(1, abs=1e-6)


ON_IMAGES = ["--dataset_name", "images"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["evaluate"], "`model_name_or_path` is needed"),
        (["predict", "--images", "images"], "`model_name_or_path` is needed"),
        (["predict", "--model_name_or_path", "model"], "`images` is needed"),
        (["predict", "--model_name_or_path", "model", "--images", "none"], "there is no 'none'"),
        (["predict", "--model_name_or_path", "model", "--images", "model"], "holds no images"),
        (
            ["predict", "--model_name_or_path", "model", "--images", "bad"],
            "None of the 1 images in 'bad' could be read",
        ),
        (
            ["predict", "--model_name_or_path", "model", "--images", "images", "--top_k", "4"],
            "`top_k` must lie between",
        ),
        (["predict", "--model_name_or_path", "model", "--images", "images", "--device", "tpu"], "`device` must be"),
        (["evaluate", "--model_name_or_path", "missing", *ON_IMAGES], "`model_name_or_path` is 'missing'"),
        (
            ["evaluate", "--model_name_or_path", "headless", *ON_IMAGES],
            "no trained weights for classifier.bias, classifier.weight",
        ),
        (["evaluate", "--model_name_or_path", "adapter", *ON_IMAGES], "holds an adapter"),
        (
            ["evaluate", "--model_name_or_path", "vit-tiny-digits", *ON_IMAGES],
            "a model to train that knows nothing yet",
        ),
        (["evaluate", "--model_name_or_path", "model", "--metrics", "nonsense", *ON_IMAGES], "no metric 'nonsense'"),
        # The images of a model that does not say which it was trained on are not guessed.
        (["evaluate", "--model_name_or_path", "model"], "`dataset_name` is needed, since model does not say"),
        (
            ["evaluate", "--model_name_or_path", "./modle", *ON_IMAGES],
            "`model_name_or_path` is './modle', but there is no such folder or file (did you mean 'model'?)",
        ),
        (
            ["predict", "--model_name_or_path", "images/blakc", "--images", "images"],
            "`model_name_or_path` is 'images/blakc', but there is no such folder (did you mean 'images/black'?), nor could it",
        ),
        (
            ["evaluate", "--model_name_or_path", "model", "--dataset_name", "./fotos"],
            "`dataset_name` is './fotos', but there is no such folder or file",
        ),
        (
            ["evaluate", "--model_name_or_path", "model", *ON_IMAGES, "--output_dir", "bad/1.png"],
            "`output_dir` is 'bad/1.png', but 'bad/1.png' is no folder",
        ),
        (
            ["predict", "--model_name_or_path", "model", "--images", "images", "--output_file", "bad/1.png/a.csv"],
            "`output_file` is 'bad/1.png', but 'bad/1.png' is no folder",
        ),
        (
            ["predict", "--model_name_or_path", "model", "--images", "images", "--output_file", "bad"],
            "`output_file` is 'bad', which is a folder",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(capsys, argv, expected):
    model, processor = save_model("model", COLOURS)
    save_images("images", count=1)
    Path("bad").mkdir()
    Path("bad/1.png").write_bytes(b"")
    model.convnext.save_pretrained("headless")
    processor.save_pretrained("headless")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    assert expected in message(capsys, *argv)


def test_options_come_from_a_file_too():
    save_model("model", COLOURS)
    save_images("images", count=1)
    Path("predict.yaml").write_text("model_name_or_path: model\nimages: images\ntop_k: 2\noutput_file: a.csv\n")
    assert main(["predict", "--config", "predict.yaml", "--output_file", "b.csv"]) == 0
    assert not Path("a.csv").exists()
    assert "label_2" in table("b.csv")[0]


@pytest.mark.parametrize("path", ["./runs/nothing", "runs/nothing"])
def test_a_mistyped_folder_of_a_model_is_named(path, capsys):
    """Not the dataset, which the folder would have said."""
    assert main(["evaluate", "--model_name_or_path", path]) == 1
    error = capsys.readouterr().err
    assert "there is no" in error and path in error
