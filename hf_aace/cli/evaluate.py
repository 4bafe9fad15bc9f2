# SPDX-License-Identifier: Apache-2.0
"""`hf-aace evaluate`: measure how good a trained classifier is, and where it errs."""

import argparse
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset, Image, concatenate_datasets
from datasets.utils import tqdm
from sklearn.metrics import confusion_matrix
from transformers import EvalPrediction, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..analysis.plots import plot_confusion_matrix, plot_image_grid
from ..tensor_checks import check_at_least
from ..vision.datasets import SET_APART
from ..vision.images import decode_image
from ..vision.inference import classify
from ..vision.metrics import compute_metrics_fn
from .checks import check_exists, check_folder
from .loading import load_images, load_pretrained
from .options import (
    ImagesArguments,
    PretrainedArguments,
    is_same_data,
    last_part,
    pick_device,
    required,
    train_options,
)
from .output import write_report
from .parser import command_parser, option
from .runs import in_the_classes_of


logger = logging.get_logger(__name__)


@dataclass
class EvaluationArguments(ImagesArguments):
    """The images to evaluate on, and what to measure."""

    dataset_name: str | None = option(
        None,
        "The images, as for `hf-aace train`. By default those of the run that trained the model; needed for other models.",
    )
    split: Literal["test", "train", "all"] = option(
        "test",
        "The test images, which `hf-aace train` sets apart if the dataset does not; the training images, those of the run with "
        "the labels that it saw; or all, for images that the model was not trained on (of a single class, too).",
    )
    metrics: list[str] = option(  # noqa: RUF009
        ["accuracy", "macro_f1"], "Metrics: `accuracy`, `macro_f1`, or any that `evaluate.load` finds on the Hub."
    )
    num_mistakes: int = option(25, "How many of the worst mistakes to list and to draw.")
    batch_size: int = option(32, "Images at a time.")
    device: str = option("auto", "`cpu`, `cuda`, or `auto`: a GPU if there is one.")
    output_dir: str | None = option(
        None,
        "Where evaluation.json, predictions.csv, confusion_matrix.png and mistakes.png go. By default a folder in `runs` named by "
        "model and data.",
    )


def _defaults(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the data that a run of `hf-aace train` was trained on, unless other data are chosen."""
    options = train_options(Path(chosen.model_name_or_path)) if chosen.model_name_or_path else {}
    own = chosen.dataset_name is None or is_same_data(chosen.dataset_name, options.get("dataset_name"))
    names = [option.name for option in fields(ImagesArguments)] if own else ["image_range"]
    return {name: options[name] for name in names if name in options}


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    parser = command_parser(
        "evaluate",
        "Measures how good an image classifier is, and leaves metrics, the confusion matrix, the worst mistakes and all "
        "predictions in output_dir. With --split train the first predictions are those of the training images whose label the model believes "
        "least, which is where to look for wrong labels.",
        (PretrainedArguments, EvaluationArguments),
        argv,
        _defaults,
    )
    source, options = parser.read(argv)
    name = required("model_name_or_path", source.model_name_or_path)
    which = name if Path(name).exists() else f"there is no folder {name!r} here, and a model of the Hub"
    dataset_name = required(
        "dataset_name", options.dataset_name, f"{which} does not say which images it was trained on"
    )
    check_at_least(0, num_mistakes=options.num_mistakes)
    check_at_least(1, batch_size=options.batch_size)
    device = pick_device(options.device)
    default = Path("runs") / f"evaluate-{last_part(name)}-{last_part(dataset_name)}"
    folder = Path(options.output_dir or default)
    check_folder("output_dir", folder)
    check_exists("dataset_name", dataset_name)
    compute_metrics = compute_metrics_fn([name for name in options.metrics if name != "confusion_matrix"])
    model, processor = load_pretrained(source)
    trained, drawn = train_options(Path(name)), {"seed": 0}
    is_own = is_same_data(dataset_name, trained.get("dataset_name"))
    if options.split == "train" and is_own and not trained.get("streaming"):
        names = ("seed", "train_size", "label_noise", "validation_size")  # which say what the run trained on
        drawn |= {name: trained[name] for name in names if name in trained}
    splits = load_images(options, **drawn, to_train=options.split != "all")
    data = concatenate_datasets(list(splits.values())) if options.split == "all" else splits[options.split]
    if data.info.description == SET_APART and not is_own:
        logger.warning(
            f"{dataset_name!r} has no test split, so that {len(data)} of its {sum(map(len, splits.values()))} images are used. Give "
            "`--split all` to use all, unless the model was trained on some of them."
        )
    data = in_the_classes_of(model.config.id2label, data).cast_column("image", Image(decode=False))

    started = time.perf_counter()
    probabilities = _classify(model.to(device), processor, data, options)
    seconds = time.perf_counter() - started
    labels, predicted = np.array(data["label"][:]), probabilities.argmax(axis=-1)
    scores = compute_metrics(EvalPrediction(probabilities, labels))
    # By number, as the file of a configuration may list them in another order.
    classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
    matrix = confusion_matrix(labels, predicted, labels=range(len(classes))).tolist()
    predictions = _predictions(data, probabilities, labels, classes)
    wrong = (predicted != labels)[predictions.index]  # not by the names: two classes may share one
    mistakes = predictions[wrong].head(options.num_mistakes)

    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "model": name,
        "dataset": dataset_name,
        "split": options.split,
        "images": len(data),
        **scores,
        "total_time_in_seconds": seconds,
        "samples_per_second": len(data) / seconds,
        "latency_in_seconds": seconds / len(data),
        "classes": classes,
        "confusion_matrix": matrix,
        "worst_mistakes": mistakes.to_dict("records"),
    }
    write_report(report, folder / "evaluation.json")
    predictions.to_csv(folder / "predictions.csv", index=False, float_format="%.6f")
    plot_confusion_matrix(matrix, classes, folder / "confusion_matrix.png")
    (folder / "mistakes.png").unlink(missing_ok=True)  # of an earlier call
    if len(mistakes):
        plot_image_grid(
            [decode_image(image, image_range=options.image_range) for image in data[mistakes.index.tolist()]["image"]],
            [
                f"{row.label} ({row.label_score:.2f})\ntaken for {row.prediction} ({row.score:.2f})"
                for row in mistakes.itertuples()
            ],
            "The worst mistakes",
            folder / "mistakes.png",
        )
    told = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if isinstance(value, float))
    print(f"Result:  {told} on {len(data)} images")
    print(f"Speed:   {len(data) / seconds:.0f} images a second")
    print(f"Numbers: {folder / 'evaluation.json'}")
    print(f"Table:   {folder / 'predictions.csv'}, an image a line, the least probable label first")
    print(f"Drawn:   {folder / 'confusion_matrix.png'}" + (f", {folder / 'mistakes.png'}" if len(mistakes) else ""))
    return 0


def _classify(
    model: PreTrainedModel, processor: BaseImageProcessor, data: Dataset, options: EvaluationArguments
) -> np.ndarray:
    """Return the probabilities of the classes, of shape `(images, classes)`."""
    predictions = classify(
        model, processor, data["image"], batch_size=options.batch_size, image_range=options.image_range
    )
    probabilities = []
    for prediction in tqdm(predictions, total=len(data), desc="Evaluating", unit="image"):
        if isinstance(prediction, ValueError):
            raise prediction
        probabilities.append(prediction)
    return np.stack(probabilities)


def _predictions(data: Dataset, probabilities: np.ndarray, labels: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """Tabulate label and prediction of each image with their probabilities, the least probable label first."""
    every, predicted = np.arange(len(labels)), probabilities.argmax(axis=-1)
    predictions = pd.DataFrame(
        {
            "image": [image["path"] or f"image {row}" for row, image in enumerate(data["image"])],
            "label": np.array(classes)[labels],
            "label_score": probabilities[every, labels].astype(float),
            "prediction": np.array(classes)[predicted],
            "score": probabilities[every, predicted].astype(float),
        }
    )
    return predictions.sort_values("label_score", kind="stable")
