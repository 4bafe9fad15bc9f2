# SPDX-License-Identifier: Apache-2.0
"""Compare the values in images with the range that they are scaled from."""

from collections.abc import Iterable, Sequence
from math import isfinite

import numpy as np
from datasets import Dataset, Image, IterableDataset
from transformers.utils import logging

from .images import value_range


logger = logging.get_logger(__name__)

_IMAGES_OF_EACH_SPLIT = 32


def check_image_range(
    name: str, splits: Iterable[Dataset | IterableDataset], image_range: Sequence[float] | None = None
) -> None:
    """
    Warn if some images of a dataset, in the column `image` of its splits, hold values that do not fit the range that they are
    scaled from, see [`~hf_aace.vision.images.decode_image`]; refuse a range that is not two numbers in ascending order.

    The type of a file does not tell the range of its values: of 12 bits in files of 16, 4095 is white, but is scaled as if
    65535 were, and the image becomes nearly black.
    """
    if image_range is not None and not (
        len(image_range) == 2 and all(map(isfinite, image_range)) and image_range[0] < image_range[1]
    ):
        raise ValueError(
            f"`image_range` must be two numbers, the value of black and a higher one of white, got {image_range}. Use 0 and 4095 "
            "for 12 bits."
        )
    found: dict[str, list[float]] = {}
    for split in splits:
        for image in _sample(split):
            try:
                depth, *values = value_range(image)
            except ValueError:
                continue  # is named when the image is used
            found.setdefault(depth, []).extend(values)
    if "32 bits" in found:  # those that fit into 16 are of the same kind, such as CT images without air
        found["32 bits"] += found.pop("16 bits", [])
    for depth, values in found.items():
        problem = _unlike(depth, values[1::2]) if image_range is None else None
        problem = problem or _problem(depth, min(values), max(values), image_range)
        aside = "" if depth == "8 bits" else ", a few pixels of each aside,"
        if problem:
            logger.warning(
                f"The images of {depth} in {name!r}{aside} hold values from {min(values):g} to {max(values):g}{problem}"
            )


def _sample(split: Dataset | IterableDataset) -> list:
    """Take some encoded images: the first of a stream, or from all over a dataset, which may be sorted by class."""
    if isinstance(split, IterableDataset):
        return [row["image"] for row in split.take(_IMAGES_OF_EACH_SPLIT)]
    rows = np.unique(np.linspace(0, len(split) - 1, _IMAGES_OF_EACH_SPLIT).astype(int))
    return split.select(rows).cast_column("image", Image(decode=False))["image"][:]


def _unlike(depth: str, highest: list[float]) -> str | None:
    """Tell of images of 16 bits of which some fill the range and others a small part of it only."""
    narrow = [value for value in highest if value < max(highest) / 8]
    if depth == "8 bits" or depth == "32 bits" or max(highest) < 32768 or len(narrow) < len(highest) / 4:
        return None
    return (
        f", but {len(narrow)} of the {len(highest)} images that were looked at only up to {max(narrow):g}: these become dark "
        "beside the others. Convert them to one range."
    )


def _problem(depth: str, low: float, high: float, image_range: Sequence[float] | None) -> str | None:
    highest = 255 if depth == "8 bits" else 65535
    lost = " Convert them to 8 bits rather, since Pillow reads the upper 8 bits only." if "color" in depth else ""
    if image_range is not None and (depth != "8 bits" or image_range[1] <= 255):
        if not (image_range[0] <= low and high <= image_range[1]):
            return f": those outside of `image_range`, {image_range[0]:g} to {image_range[1]:g}, are clipped."
        levels = max(1, round((image_range[1] - image_range[0]) / 256))
        return (
            f": no more than {levels} levels between black and white are told apart.{lost}"
            if lost and levels < 128
            else None
        )
    if low == high:
        return f": each of them is of one color.{lost}"
    if depth == "32 bits":
        return (
            ". Each image is scaled from its own lowest and highest value, so that their brightness does not compare"
            " (unless its values fit into 16 bits). Set "
            f"`image_range` to the values of black and white, such as {low:g} {high:g}, to scale all alike."
        )
    # Photographs fill the range; of 8 bits some do not, at night.
    if high - low > highest / (4 if depth == "8 bits" else 2):
        return None
    white = 2 ** int(high).bit_length() - 1
    likely = f"{low:g} {high:g}" if low > white / 4 else f"0 {white}"
    return (
        f", a small part of the range 0 to {highest} that they are scaled from, so that they become dark or dull. Set "
        f"`image_range` to the values of black and white, perhaps {likely}.{lost}"
    )
