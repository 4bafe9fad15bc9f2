# SPDX-License-Identifier: Apache-2.0
"""`hf-aace predict`: write the classes of the images in a folder into a table."""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image
from datasets.utils import tqdm
from transformers.utils import logging

from ..tensor_checks import check_at_least
from ..vision.folders import files_in, is_image, is_utf8
from ..vision.images import IMAGE_SUFFIXES, has_more_pages
from ..vision.inference import classify
from ..vision.messages import first_few
from ..vision.value_range import check_image_range
from .checks import check_folder
from .loading import load_pretrained
from .options import PretrainedArguments, pick_device, required, train_options
from .parser import command_parser, option


logger = logging.get_logger(__name__)


@dataclass
class PredictionArguments:
    """The images to classify."""

    images: str | None = option(None, "A folder, whose images are taken at any depth, or a single image. Needed.")
    output_file: str = option(
        "predictions.csv",
        "The table to write (CSV): a row for each image, with its path in the folder, the classes and their "
        "probabilities, and in the last column why it could not be read.",
    )
    top_k: int = option(1, "How many classes to name for each image, the likeliest first.")
    batch_size: int = option(32, "Images at a time.")
    image_range: list[float] | None = option(  # noqa: RUF009
        None,
        "The values of black and of white in the image files, as for `hf-aace train`. By default those of the run that "
        "trained the model.",
    )
    device: str = option("auto", "`cpu`, `cuda`, or `auto`: a GPU if there is one.")


def _defaults(chosen: argparse.Namespace) -> dict[str, Any]:
    options = train_options(Path(chosen.model_name_or_path)) if chosen.model_name_or_path else {}
    return {"image_range": options.get("image_range")}


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    parser = command_parser(
        "predict",
        "Names the classes of the images in a folder. Images that cannot be read are named, and do not stop it.",
        (PretrainedArguments, PredictionArguments),
        argv,
        _defaults,
    )
    source, options = parser.read(argv)
    required("model_name_or_path", source.model_name_or_path)
    images = required("images", options.images)
    check_at_least(1, batch_size=options.batch_size)
    device = pick_device(options.device)
    if Path(options.output_file).is_dir():
        raise ValueError(f"`output_file` is {options.output_file!r}, which is a folder. Give a file in it.")
    check_folder("output_file", Path(options.output_file).parent)
    root, paths = _find_images(images)
    encoded = [{"path": str(path), "bytes": None} for path in paths]
    features = Features(image=Image(decode=False))
    check_image_range(images, [Dataset.from_dict({"image": encoded}, features)], options.image_range)
    model, processor = load_pretrained(source)
    if not 1 <= options.top_k <= model.config.num_labels:
        raise ValueError(
            f"`top_k` must lie between 1 and the number of classes, {model.config.num_labels}, got {options.top_k}."
        )
    answers = classify(
        model.to(device),
        processor,
        encoded,
        batch_size=options.batch_size,
        image_range=options.image_range,
    )
    Path(options.output_file).parent.mkdir(parents=True, exist_ok=True)
    unreadable, paged = [], []
    with Path(options.output_file).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        ranks = range(1, options.top_k + 1)
        table.writerow(["image", *(f"{column}_{rank}" for rank in ranks for column in ("label", "score")), "error"])
        progress = tqdm(answers, total=len(paths), desc="Predicting", unit="image")
        for path, answer in zip(paths, progress, strict=True):
            image = path.relative_to(root).as_posix()
            if isinstance(answer, ValueError):
                unreadable.append(image)
                table.writerow([image, *[""] * (2 * options.top_k), answer])
            else:
                table.writerow([image, *_best(answer, model.config.id2label, options.top_k), ""])
                paged += [image] * has_more_pages({"path": str(path), "bytes": None})
    if paged:
        logger.warning(
            f"{len(paged)} of the images in {images!r} have more than one page or frame, of which the first is taken: {first_few(paged)}."
        )
    for image in unreadable:
        print(f"hf-aace: cannot read {image}", file=sys.stderr)
    if len(unreadable) == len(paths):
        raise ValueError(
            f"None of the {len(paths)} images in {images!r} could be read; {options.output_file} says why."
        )
    print(f"Table:   {options.output_file}, {len(paths)} images, of which {len(unreadable)} could not be read")
    return 0


def _find_images(name: str) -> tuple[Path, list[Path]]:
    """Return the folder and the images in it, in alphabetical order."""
    path = Path(name)
    if path.is_file():
        return path.parent, [path]
    if not path.is_dir():
        raise ValueError(f"`images` must be a folder or an image, but there is no {name!r}.")
    every = sorted(files_in(path))
    files = [file for file in every if is_utf8(file)]
    if odd := [ascii(str(file.relative_to(path))) for file in every if not is_utf8(file)]:
        logger.warning(
            f"The names of {len(odd)} files in {name!r} are not in UTF-8, and they are left out: {first_few(odd)}. Rename them."
        )
    found = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = [
        file.relative_to(path).as_posix()
        for file in files
        if file.suffix.lower() not in IMAGE_SUFFIXES and is_image(file)
    ]
    if others:
        logger.warning(
            f"{len(others)} images in {name!r} are of a kind that is not read, or have no ending, and are left out: {first_few(others)}. "
            "Convert them to PNG or JPEG, or give them the ending of their kind."
        )
    if not found:
        raise ValueError(f"The folder {name!r} given as `images` holds no images that can be read.")
    return path, found


def _best(probabilities: np.ndarray, id2label: dict[int, str], count: int) -> list[str]:
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [cell for index in best for cell in (id2label[int(index)], f"{probabilities[index]:.6f}")]
