# SPDX-License-Identifier: Apache-2.0
"""The data sets: what they hold, what `seed`, `train_size` and `label_noise` change, and what is refused."""

import json
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from sklearn.datasets import load_digits
from transformers import ViTImageProcessorPil, default_data_collator

import hf_aace.vision.folders
from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.images import image_transform


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_images(folder, counts, suffix=".png", seed=0):
    """Writes `counts[sub_folder]` images into each sub-folder."""
    generator = np.random.default_rng(seed)
    for sub_folder, count in counts.items():
        (folder / sub_folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / sub_folder / f"{index}{suffix}")
    return str(folder)


def labels(dataset):
    return np.array(dataset["label"][:])


def pixels(dataset):
    return [image.tobytes() for image in dataset["image"]]


# ---- digits ----------------------------------------------------------------


def test_digits_are_all_the_scans_of_scikit_learn_scaled_to_bytes():
    dataset = load_image_dataset("digits", seed=0)
    assert (len(dataset["train"]), len(dataset["test"])) == (1297, 500)
    assert dataset["train"].features == Features(image=Image(), label=ClassLabel(names=[str(i) for i in range(10)]))
    image = dataset["train"][0]["image"]
    assert (image.mode, image.size) == ("L", (8, 8))
    # Each scan is in exactly one of the splits, with its own label.
    ours = [*zip(pixels(dataset["train"]), labels(dataset["train"]), strict=True)]
    ours += zip(pixels(dataset["test"]), labels(dataset["test"]), strict=True)
    digits = load_digits()
    scaled = np.round(digits.images / 16 * 255).astype(np.uint8)
    assert scaled.max() == 255
    assert sorted(ours) == sorted(zip([scan.tobytes() for scan in scaled], digits.target, strict=True))


def test_test_images_do_not_depend_on_any_argument():
    plain = load_image_dataset("digits", seed=0)
    other = load_image_dataset("digits", seed=1, train_size=100, label_noise=0.5, validation_size=0.3)
    assert pixels(plain["test"]) == pixels(other["test"])
    assert np.array_equal(labels(plain["test"]), labels(other["test"]))
    assert set(np.bincount(labels(plain["test"]))) <= {48, 49, 50, 51, 52}  # stratified


def test_validation_images_are_training_images_that_are_not_trained_on():
    """Drawn before `train_size`, so that they are as many with few training images; with labels as noisy."""
    every = load_image_dataset("digits", seed=0)
    split = load_image_dataset("digits", seed=3, train_size=100, validation_size=0.2, label_noise=0.5)
    assert (len(split["train"]), len(split["validation"])) == (100, round(0.2 * 1297))
    assert set(pixels(split["train"])) <= set(pixels(every["train"])) - set(pixels(split["validation"]))
    assert set(pixels(split["validation"])) <= set(pixels(every["train"]))
    assert set(np.bincount(labels(load_image_dataset("digits", seed=3, validation_size=0.2)["validation"]))) <= {
        25,
        26,
        27,
    }
    truth = dict(zip(pixels(every["train"]), labels(every["train"]), strict=True))
    for name in ("train", "validation"):
        wrong = [truth[scan] != label for scan, label in zip(pixels(split[name]), labels(split[name]), strict=True)]
        assert sum(wrong) == round(0.5 * len(wrong))
    other = load_image_dataset("digits", seed=4, validation_size=0.2)
    assert pixels(other["validation"]) != pixels(split["validation"])
    assert len(load_image_dataset("digits", seed=0, validation_size=0.1)["validation"]) == 130, "129.7 are 130"


def test_validation_size_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"`validation_size` must lie in \[0, 1\), got 1.2"):
        load_image_dataset("digits", seed=0, validation_size=1.2)


@pytest.mark.parametrize("train_size", [10, 100, 403, 1297])
def test_train_size_keeps_the_shares_of_the_classes(train_size):
    every = load_image_dataset("digits", seed=0)["train"]
    train = load_image_dataset("digits", seed=0, train_size=train_size)["train"]
    assert len(train) == train_size
    shares = np.bincount(labels(every)) * train_size / len(every)
    assert np.abs(np.bincount(labels(train), minlength=10) - shares).max() <= 1
    assert np.bincount(labels(train), minlength=10).min() >= 1


def test_train_size_is_drawn_with_the_seed():
    first, again, other = (pixels(load_image_dataset("digits", seed=s, train_size=100)["train"]) for s in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("train_size", "label_noise"), [(None, 0.2), (400, 0.2), (33, 0.1), (None, 0.999)])
def test_label_noise_changes_exactly_the_share_asked_for(train_size, label_noise):
    clean = load_image_dataset("digits", seed=3, train_size=train_size)["train"]
    noisy = load_image_dataset("digits", seed=3, train_size=train_size, label_noise=label_noise)["train"]
    assert pixels(clean) == pixels(noisy)
    assert noisy.features["label"] == clean.features["label"]
    assert (labels(clean) != labels(noisy)).sum() == round(label_noise * len(clean))


def test_label_noise_is_uniform_over_the_other_classes():
    clean = labels(load_image_dataset("digits", seed=0)["train"])
    noisy = labels(load_image_dataset("digits", seed=0, label_noise=0.9)["train"])
    shifts = np.bincount((noisy - clean) % 10, minlength=10)[1:]
    expected = round(0.9 * 1297) / 9
    assert np.abs(shifts - expected).max() < 4.5 * np.sqrt(expected)


def test_label_noise_is_drawn_with_the_seed():
    first, again, other = (labels(load_image_dataset("digits", seed=s, label_noise=0.3)["train"]) for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("label_noise", [-0.1, 1.0, 20, float("nan")])
def test_label_noise_out_of_range_is_refused(label_noise):
    with pytest.raises(ValueError, match=rf"`label_noise` must lie in \[0, 1\), got {label_noise}"):
        load_image_dataset("digits", seed=0, label_noise=label_noise)


@pytest.mark.parametrize("train_size", [0, 9, 1298])
def test_train_size_out_of_range_is_refused(train_size):
    with pytest.raises(ValueError, match=rf"`train_size` must lie between .* 10, .* 1297, got {train_size}"):
        load_image_dataset("digits", seed=0, train_size=train_size)


# ---- Folders ---------------------------------------------------------------


def test_folder_without_a_test_split_has_a_fifth_set_apart(tmp_path):
    name = write_images(tmp_path, {"cat": 20, "dog": 40})
    dataset, other = load_image_dataset(name, seed=0), load_image_dataset(name, seed=1)
    assert np.bincount(labels(dataset["train"])).tolist() == [16, 32]
    assert labels(dataset["train"]).tolist() == [0] * 16 + [1] * 32, "in the order of the folder"
    assert np.bincount(labels(dataset["test"])).tolist() == [4, 8]
    assert dataset["train"].features["label"].names == ["cat", "dog"]
    assert not set(pixels(dataset["train"])) & set(pixels(dataset["test"]))
    assert pixels(dataset["test"]) == pixels(other["test"])


def test_folder_with_train_and_test_keeps_them(tmp_path):
    name = write_images(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 2})
    dataset = load_image_dataset(name, seed=0)
    assert labels(dataset["train"]).tolist() == [0, 0, 0, 1, 1, 1]
    assert labels(dataset["test"]).tolist() == [0, 1, 1]


def test_names_that_look_like_splits_are_classes_where_they_hold_images(tmp_path):
    """And so do names of files; none is left out for that."""
    folder = tmp_path / "vehicles [old]"
    write_images(folder, {"train": 5, "val": 5, "car": 5})
    (folder / "car" / "0.png").rename(folder / "car" / "test_0.png")
    dataset = load_image_dataset(str(folder), seed=0)
    assert dataset["train"].features["label"].names == ["car", "train", "val"]
    assert len(dataset["train"]) + len(dataset["test"]) == 15


def test_splits_lie_in_a_folder_of_their_own_as_in_an_archive(tmp_path, warnings):
    write_images(tmp_path / "pets" / "pets", {f"{split}/{name}": 3 for split in ("Train", "val") for name in "ab"})
    for folder in ("pets", "pets/pets"):
        (tmp_path / folder / "__MACOSX").mkdir()
    (tmp_path / "pets" / "LICENSE").write_text("Free.")
    dataset = load_image_dataset(str(tmp_path / "pets"), seed=0)
    assert (len(dataset["train"]), len(dataset["test"])) == (6, 6)
    assert not warnings, "nothing is left out that could hold images"


@pytest.mark.parametrize(
    ("train", "test"),
    [("training_set", "test_set"), ("seg_train", "seg_test"), ("train2017", "val2017"), ("Train 80", "Test 20")],
)
def test_splits_are_known_by_a_word_in_their_name(train, test, tmp_path, warnings):
    write_images(tmp_path, {f"{split}/{name}": count for split, count in ((train, 6), (test, 3)) for name in "ab"})
    write_images(tmp_path, {"seg_pred": 4})
    dataset = load_image_dataset(str(tmp_path), seed=0)
    assert (len(dataset["train"]), len(dataset["test"])) == (12, 6)
    assert "4 outside the folders of the splits" in warnings[0] and "(seg_pred/0.png)" in warnings[0], "it is said"


def test_of_several_folders_with_the_word_the_one_called_so_is_the_split(tmp_path, warnings):
    folders = {"train": 5, "train_extra": 3, "train_masks": 5, "test": 2, "test_old": 4}
    name = write_images(tmp_path, {f"{folder}/{c}": count for folder, count in folders.items() for c in "ab"})
    dataset = load_image_dataset(name, seed=0)
    assert {split: len(part) for split, part in dataset.items()} == {"train": 10, "test": 4}
    assert "24 outside the folders of the splits, train, test" in warnings[0]
    assert all(f"{folder}/a/0.png" in warnings[0] for folder in ("test_old", "train_extra", "train_masks"))
    (tmp_path / "train").rename(tmp_path / "train_1")
    with pytest.raises(ValueError, match=r"Which of the folders train_1, train_extra, train_masks .* to train on"):
        load_image_dataset(name, seed=0)


def test_two_versions_of_a_data_set_are_not_mixed(tmp_path):
    """Or the images of the test would be trained on."""
    places = [f"{size}/{split}/{c}" for size in ("small", "large") for split in ("train", "test") for c in "ab"]
    name = write_images(tmp_path, dict.fromkeys(places, 2))
    with pytest.raises(ValueError, match=r"Several folders in .* have splits: large, small"):
        load_image_dataset(name, seed=0)


@pytest.mark.parametrize("inside", [".ipynb_checkpoints", "@eaDir", "__MACOSX"])
def test_a_class_called_as_a_split_is_one_whatever_programs_put_beside_its_images(inside, tmp_path):
    name = write_images(tmp_path, {"car": 10, "plane": 10, "train": 10})
    (tmp_path / "train" / inside).mkdir()
    assert load_image_dataset(name, seed=0)["train"].features["label"].names == ["car", "plane", "train"]


def test_a_data_set_with_validation_and_test_images_keeps_them_apart(tmp_path, warnings):
    """Models are chosen on the ones and judged by the others."""
    name = write_images(
        tmp_path, {f"{split}/{c}": n for split, n in (("train", 9), ("val", 4), ("test", 3)) for c in "ab"}
    )
    sizes = {split: len(part) for split, part in load_image_dataset(name, seed=0).items()}
    assert sizes == {"train": 18, "validation": 8, "test": 6} and not warnings
    sizes = {split: len(part) for split, part in load_image_dataset(name, seed=0, validation_size=0.5).items()}
    assert sizes == {"train": 9, "validation": 9, "test": 6}
    assert "The validation images" in warnings[0] and "Leave it out" in warnings[0]


def test_images_of_a_kind_that_is_not_read_are_counted(tmp_path, warnings):
    name = write_images(tmp_path, {"a": 6, "b": 6})
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "0.avif")
    load_image_dataset(name, seed=0)
    assert len(warnings) == 1 and "1 of a kind that is not read, .avif (a/0.avif)" in warnings[0]
    for path in tmp_path.rglob("*.png"):
        path.rename(path.with_suffix(".avif"))
    with pytest.raises(ValueError, match=r"12 of a kind that is not read, .avif \(a/0.avif, b/0.avif\)"):
        load_image_dataset(name, seed=0)


def test_an_archive_among_the_images_is_named(tmp_path):
    """The one that they came in, say."""
    name = write_images(tmp_path, {"a": 4, "b": 4})
    shutil.make_archive(str(tmp_path / "pets"), "zip", tmp_path)
    with pytest.raises(ValueError, match=r"What is in pets.zip counts too: move it away"):
        load_image_dataset(name, seed=0)


def test_classes_without_test_images_are_named(tmp_path, warnings):
    load_image_dataset(write_images(tmp_path, {"many": 40, "few": 2, "one": 1}), seed=0)
    assert "No test image of" in warnings[0] and "is of the classes few, one" in warnings[0]


def test_an_empty_test_folder_is_said_to_be(tmp_path, warnings):
    name = write_images(tmp_path, {"train/a": 9, "train/b": 9})
    (tmp_path / "test" / "a").mkdir(parents=True)
    assert len(load_image_dataset(name, seed=0)["test"]) == 4
    assert "has no split `test`" in warnings[0]


def test_a_test_split_of_which_nothing_can_be_read_is_refused(tmp_path):
    name = write_images(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 1, "test/b": 1})
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"The split `test` of .* has no image that could be read"):
        load_image_dataset(name, seed=0, skip_corrupt_images=True)


def test_classes_in_several_places_are_one_and_said_to_be(tmp_path, warnings):
    """They may be splits that are called otherwise, whose test images would be trained on."""
    folder = write_images(tmp_path, {f"{place}/{name}": 3 for place in ("uno", "due") for name in "ab"})
    assert len(load_image_dataset(folder, seed=0)["train"]) == 10
    assert "The images of the class 'a'" in warnings[0]


def test_splits_below_the_classes_are_refused(tmp_path):
    folder = write_images(tmp_path, {f"{name}/{split}": 3 for split in ("train", "test") for name in "ab"})
    with pytest.raises(ValueError, match="would be test, train"):
        load_image_dataset(folder, seed=0)


def test_links_to_folders_above_are_not_followed(tmp_path):
    folder = write_images(tmp_path / "images", {"a": 5, "b": 5})
    (tmp_path / "images" / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "images" / "up").symlink_to(tmp_path)
    assert len(load_image_dataset(folder, seed=0)["train"]) == 8


def test_links_to_folders_are_followed(tmp_path):
    write_images(tmp_path / "elsewhere", {"a": 5, "b": 5})
    (tmp_path / "linked").mkdir()
    for name in "ab":
        (tmp_path / "linked" / name).symlink_to(tmp_path / "elsewhere" / name)
    dataset = load_image_dataset(str(tmp_path / "linked"), seed=0)
    assert (len(dataset["train"]), len(dataset["test"])) == (8, 2)
    assert dataset["train"].features["label"].names == ["a", "b"]


def test_labels_of_a_metadata_file_are_classes(tmp_path):
    folder = write_images(tmp_path, {"images": 10})
    rows = ["file_name,label", *(f"images/{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(10))]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    dataset = load_image_dataset(folder, seed=0)
    assert dataset["train"].features["label"].names == ["cat", "dog"]
    assert (len(dataset["train"]), len(dataset["test"])) == (8, 2)


def test_each_split_may_have_a_metadata_file_but_not_one_for_all(tmp_path):
    """Then the folders have nothing to do with the classes."""
    name = write_images(tmp_path, {"train": 8, "test": 4})
    for split, count in (("train", 8), ("test", 4)):
        rows = ["file_name,label", *(f"{index}.png,{'ab'[index % 2]}" for index in range(count))]
        (tmp_path / split / "metadata.csv").write_text("\n".join(rows))
    assert {split: len(part) for split, part in load_image_dataset(name, seed=0).items()} == {"train": 8, "test": 4}
    for split in ("train", "test"):
        (tmp_path / split / "metadata.csv").unlink()
    rows = ["file_name,label", *(f"train/{index}.png,{'ab'[index % 2]}" for index in range(8))]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="looks like splits, test, train, which would be one"):
        load_image_dataset(name, seed=0)


def test_a_picture_beside_parquet_files_is_none_of_the_images(tmp_path):
    Dataset.from_dict(
        {"image": [PIL.Image.new("L", (8, 8))] * 10, "label": [0, 1] * 5},
        features=Features(image=Image(), label=ClassLabel(names=["a", "b"])),
    ).to_parquet(tmp_path / "data" / "train.parquet")
    PIL.Image.new("L", (8, 8)).save(tmp_path / "data" / "logo.png")
    dataset = load_image_dataset(str(tmp_path / "data"), seed=0)
    assert len(dataset["train"]) + len(dataset["test"]) == 10


def test_too_few_images_to_set_some_apart_are_refused(tmp_path):
    folder = write_images(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="2 images of 2 classes and no test split: too few"):
        load_image_dataset(folder, seed=0)
    dataset = load_image_dataset(write_images(tmp_path, {"a": 2, "b": 1}), seed=0)
    assert (len(dataset["train"]), len(dataset["test"])) == (2, 1)


@pytest.mark.parametrize("size", [0.0001, 0.999])
def test_validation_images_that_would_be_none_or_all_are_refused(size):
    with pytest.raises(ValueError, match=f"`validation_size={size}` of the 1297 training images are"):
        load_image_dataset("digits", seed=0, validation_size=size)


def test_a_class_of_one_image_is_trained_on(tmp_path):
    dataset = load_image_dataset(write_images(tmp_path, {"often": 30, "once": 1}), seed=0)
    once = dataset["train"].features["label"].str2int("once")
    assert once in labels(dataset["train"])


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images.*one sub-folder for each class"):
        load_image_dataset(str(tmp_path), seed=0)


@pytest.mark.parametrize(
    "counts",
    [{".": 3}, {"cat": 3}, {"cat": 3, "dog/small": 3}, {"train/cat": 3, "test/cat": 2, "test/dog": 2}],
)
def test_folder_without_at_least_two_class_folders_is_refused(tmp_path, counts):
    name = write_images(tmp_path, counts)
    found = ", ".join(sorted(str(tmp_path / sub_folder) for sub_folder in counts))
    with pytest.raises(ValueError, match=f"one sub-folder for each class, at least two .* lie in: {found}"):
        load_image_dataset(name, seed=0)


def test_unreadable_images_are_named(tmp_path):
    name = write_images(tmp_path, {"cat": 4, "dog": 4}, suffix=".jpg")
    whole = (tmp_path / "cat" / "1.jpg").read_bytes()
    (tmp_path / "cat" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "2.jpg").write_text("not a JPEG")
    (tmp_path / "dog" / "3.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 of the 8 images of .* cannot be read") as error:
        load_image_dataset(name, seed=0)
    for file in ("cat/1.jpg", "dog/2.jpg", "dog/3.jpg"):
        assert str(tmp_path / file) in str(error.value)
    assert "cat/0.jpg" not in str(error.value)


def test_of_many_unreadable_images_the_first_few_are_named(tmp_path):
    name = write_images(tmp_path, {"cat": 4, "dog": 4})
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="8 of the 8 images") as error:
        load_image_dataset(name, seed=0)
    assert str(error.value).count(".png") == 5


# ---- The Hub (without it) --------------------------------------------------


def hub_split(size=10, image="img", label="fine_label", labels=None):
    scans = [PIL.Image.fromarray(np.full((4, 4), index, dtype=np.uint8)) for index in range(size)]
    return Dataset.from_dict(
        {image: scans, label: [index % 2 for index in range(size)] if labels is None else labels, "id": range(size)},
        features=Features({image: Image(), label: ClassLabel(names=["a", "b"]), "id": Value("int64")}),
    )


@pytest.fixture
def hub(monkeypatch):
    def serve(**splits):
        monkeypatch.setattr(hf_aace.vision.folders, "load_dataset", lambda name: DatasetDict(splits))

    return serve


def test_columns_are_found_by_their_type(hub):
    hub(train=hub_split(), test=hub_split(4))
    dataset = load_image_dataset("someone/something", seed=0)
    assert {split: part.column_names for split, part in dataset.items()} == {
        "train": ["image", "label"],
        "test": ["image", "label"],
    }


def test_validation_serves_where_test_labels_are_withheld(hub):
    hub(train=hub_split(), test=hub_split(6, labels=[-1] * 6), validation=hub_split(4))
    assert len(load_image_dataset("someone/something", seed=0)["test"]) == 4


def test_a_labelled_test_split_goes_before_validation(hub):
    """By which settings may have been chosen."""
    hub(train=hub_split(), test=hub_split(6), validation=hub_split(4))
    assert len(load_image_dataset("someone/something", seed=0)["test"]) == 6


def test_which_class_has_an_image_more_is_drawn(hub):
    """Where the shares do not come out even; always the same one would be preferred."""
    hub(train=hub_split(20, labels=[0] * 10 + [1] * 10), test=hub_split(4))
    drawn = [load_image_dataset("someone/something", seed=seed, train_size=3)["train"] for seed in range(10)]
    assert {int(labels(train).sum()) for train in drawn} == {1, 2}


def test_training_images_without_label_are_refused(hub):
    hub(train=hub_split(4, labels=[0, 1, None, 1]))
    with pytest.raises(ValueError, match=r"Some training images of .* have no label"):
        load_image_dataset("someone/something", seed=0)


def test_a_class_that_a_csv_takes_for_a_missing_value_is_told_how_to_be_read(tmp_path):
    """Leaving its images out, as where labels are missing, would lose it."""
    write_images(tmp_path, {".": 4})
    rows = {f"{index}.png": ("None", "scratch")[index % 2] for index in range(4)}
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"{k},{v}\n" for k, v in rows.items()))
    with pytest.raises(ValueError, match=r"called None, NA or null, a metadata\.csv takes it for a missing value"):
        load_image_dataset(str(tmp_path), seed=0)
    (tmp_path / "metadata.csv").unlink()
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert load_image_dataset(str(tmp_path), seed=0)["train"].features["label"].names == ["None", "scratch"]


def test_training_images_of_one_class_are_refused(hub):
    hub(train=hub_split(4, labels=[1, 1, 1, 1]), test=hub_split())
    with pytest.raises(ValueError, match=r"All training images of .* are of one class, 'b'"):
        load_image_dataset("someone/something", seed=0)


def test_data_set_without_classes_is_refused(hub):
    hub(train=hub_split().remove_columns("fine_label"))
    with pytest.raises(ValueError, match=r"No column of labels was found .* columns are: img .*`label_column_name`"):
        load_image_dataset("someone/something", seed=0)


def test_data_set_without_training_split_is_refused(hub):
    hub(test=hub_split())
    with pytest.raises(ValueError, match="must have a split named `train`, but has: test"):
        load_image_dataset("someone/something", seed=0)


@pytest.mark.parametrize("with_cause", [False, True])
def test_a_dataset_of_the_hub_that_cannot_be_made_is_told_in_a_sentence(with_cause, monkeypatch):
    """One that is a script raises a RuntimeError; one that fails on the way an error that says nothing but its cause."""

    def load_dataset(*args, **kwargs):
        if not with_cause:
            raise RuntimeError("Dataset scripts are no longer supported")
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from TypeError("Couldn't cast")

    monkeypatch.setattr(hf_aace.vision.folders, "load_dataset", load_dataset)
    why = "Couldn't cast" if with_cause else "Dataset scripts are no longer supported"
    with pytest.raises(ValueError, match=f"neither `digits`, nor .*: {why}"):
        load_image_dataset("someone/something", seed=0)


def test_what_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`dataset_name` is .*neither `digits`, nor a folder or file, nor a dataset"):
        load_image_dataset(str(tmp_path / "missing"), seed=0)


# ---- The transform ---------------------------------------------------------


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@pytest.mark.parametrize("decode", [True, False])
def test_transform_gives_what_the_collator_and_the_model_take(processor, decode):
    train = load_image_dataset("digits", seed=0)["train"]
    seen = train.cast_column("image", Image(decode=decode)).with_transform(image_transform(processor))
    batch = default_data_collator(seen.__getitems__([5, 6, 7]))
    assert set(batch) == {"pixel_values", "labels"}
    scans = np.stack([np.asarray(image) for image in train[5:8]["image"]])
    expected = torch.tensor(scans / 255 * 2 - 1, dtype=torch.float32)[:, None].expand(3, 3, 8, 8)
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == train[5:8]["label"]


def test_transform_names_the_image_that_it_cannot_decode(tmp_path, processor):
    name = write_images(tmp_path, {"cat": 5, "dog": 5})
    train = load_image_dataset(name, seed=0)["train"].cast_column("image", Image(decode=False))
    broken = train[0]["image"]["path"]
    with open(broken, "w") as file:
        file.write("no longer an image")
    with pytest.raises(ValueError, match=f"The image '{broken}' cannot be decoded"):
        train.with_transform(image_transform(processor))[0]
