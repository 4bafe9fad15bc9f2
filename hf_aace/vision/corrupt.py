# SPDX-License-Identifier: Apache-2.0
"""Find the images of a dataset that cannot be decoded, and leave them out or refuse them; tell of those with several pages."""

from multiprocessing.pool import ThreadPool
from typing import Any

from datasets import Dataset, DatasetDict, Image
from datasets.utils import tqdm
from transformers.utils import logging

from .images import decode_image, has_more_pages
from .messages import first_few


logger = logging.get_logger(__name__)

_CHECKED_AT_ONCE = 256


def without_corrupt_images(name: str, splits: DatasetDict, skip: bool) -> DatasetDict:
    """
    Decode every image of a dataset, and leave out those that cannot be decoded.

    Args:
        name (`str`): The name of the dataset, for messages.
        splits (`DatasetDict`): Its splits, with a column `image`.
        skip (`bool`): Leave corrupt images out, with a warning that names and counts them, rather than raise an error.

    Returns:
        `DatasetDict`: The splits without corrupt images.

    Raises:
        `ValueError`: If an image cannot be decoded and `skip` is false.
    """
    paged: list[str] = []
    corrupt = {split: _find_corrupt(dataset, paged) for split, dataset in splits.items()}
    if paged:
        logger.warning(
            f"{len(paged)} of the images of {name!r} have more than one page or frame, of which the first is taken: "
            f"{first_few(paged)}. To use the others too, save each as an image of its own."
        )
    problems = [problem for found in corrupt.values() for problem in found.values()]
    if not problems:
        return splits
    found = f"{len(problems)} of the {sum(map(len, splits.values()))} images of {name!r} cannot be read"
    if not skip:
        raise ValueError(
            f"{found}: {first_few(problems)}. Replace or delete them, or set `skip_corrupt_images` to leave them out."
        )
    logger.warning(f"{found} and are left out: {', '.join(problems)}.")  # the one list of them
    return DatasetDict(
        {
            split: dataset.select([index for index in range(len(dataset)) if index not in corrupt[split]])
            for split, dataset in splits.items()
        }
    )


def _find_corrupt(dataset: Dataset, paged: list[str]) -> dict[int, str]:
    """
    Map the index of each image that cannot be decoded to the file (or the row) and the reason. Adds the images with several
    pages to `paged`.
    """
    encoded = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    problems, done = {}, 0
    with ThreadPool() as pool, tqdm(total=len(encoded), desc="Checking the images", delay=1) as bar:
        # In batches, since the pool takes in all that it is given before the first is done.
        for batch in encoded.iter(_CHECKED_AT_ONCE):
            images = batch["image"]
            looked_at = zip(images, pool.map(_look, images), strict=True)
            for index, (image, (problem, more)) in enumerate(looked_at, start=done):
                where = (image and image["path"]) or f"row {index}"
                if problem:
                    problems[index] = f"{where} ({problem})"
                elif more:
                    paged.append(where)
            done += len(images)  # not that of the bar, which does not count where bars are switched off
            bar.update(len(images))
    return problems


def _look(image: dict[str, Any] | None) -> tuple[str | None, bool]:
    """Return the reason why an image cannot be decoded, and whether it has several pages."""
    if image is None:
        return "no image", False
    try:
        # This reads the whole file, also of a JPEG that is decoded at an eighth of its size.
        decode_image(image, min_size=1)
        return None, has_more_pages(image)
    except ValueError as error:
        return str(error.__cause__) or type(error.__cause__).__name__, False
