# SPDX-License-Identifier: Apache-2.0
"""Images of every kind brought to what a model takes: decoding, and the transform of batches."""

import io
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps
from datasets import Dataset, Image
from datasets.utils import tqdm
from transformers import TimmWrapperImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What Pillow reads: some that it has too, it only writes, or knows by name.
IMAGE_SUFFIXES = frozenset(PIL.Image.registered_extensions()) - {".pdf", ".palm", ".h5", ".hdf"}

# JPEG is decoded at a fraction of its size only where this many times what the model takes is left: the processor then
# still averages over pixels, and the result is close to that of the whole image.
_DRAFT_MARGIN = 2
_CHECKED_AT_ONCE = 256


def decode_image(image: PIL.Image.Image | dict[str, Any] | None, min_size: int | None = None) -> PIL.Image.Image:
    """
    Decodes an image and brings it to 8 bits of red, green and blue.

    - Turned upright, as its EXIF data say.
    - Transparent parts become white.
    - 16 bits of grey are scaled by their range, 65535 becoming 255; 32 bits (whole or floating-point numbers, where they do
      not fit into 16) by the lowest and the highest value of the image.
    - Palettes, grey and CMYK are converted; of an animation the first frame is taken.

    Args:
        image (`PIL.Image.Image` or `dict`):
            The image; or encoded, as a column of [`~datasets.Image`] with `decode=False` has it: with `bytes`, or with the
            `path` of a file or a URL.
        min_size (`int`, *optional*):
            Height and width that suffice. A JPEG at least twice as large is decoded at a half, a quarter or an eighth of
            its size, whatever is still as large as this, in a fraction of the time and the memory. Defaults to all of it.

    Returns:
        `PIL.Image.Image`: The image, of mode `RGB`.

    Raises:
        `ValueError`: If it cannot be decoded, or has more pixels than Pillow takes for a decompression bomb
            (`2 * PIL.Image.MAX_IMAGE_PIXELS`, 179 millions); the message names the file.
    """
    if image is None:
        raise ValueError("A row of the data set has no image. Leave it out, or set `skip_corrupt_images`.")
    if not isinstance(image, dict):
        return _to_rgb(image)
    try:
        with _open(image) as file, PIL.Image.open(file) as opened:
            if min_size is not None:
                opened.draft(None, (min_size, min_size))  # of no effect on what is not JPEG
            return _to_rgb(opened)
    # Pillow's decoders raise what they stumble on: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        problem = str(error) or type(error).__name__
        raise ValueError(f"The image {image['path'] or ''!r} cannot be decoded: {problem}") from error


def _open(image: dict[str, Any]) -> Any:
    if image["bytes"] is not None:
        return io.BytesIO(image["bytes"])
    if "://" in image["path"]:  # of a streamed data set
        return fsspec.open(image["path"], "rb")
    return open(image["path"], "rb")


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return PIL.Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Grey of 16 or 32 bits, scaled to 8."""
    if not np.isfinite(pixels).all():
        raise ValueError("some of its pixels are not finite")
    whole_numbers = np.issubdtype(pixels.dtype, np.integer)
    pixels = pixels.astype(np.float64)
    low, high = pixels.min(), pixels.max()
    if whole_numbers and low >= 0 and high <= 65535:  # Pillow opens some files of 16 bits in 32
        return np.round(pixels * (255 / 65535)).astype(np.uint8)
    return np.round((pixels - low) * (255 / (high - low) if high > low else 0.0)).astype(np.uint8)


def image_transform(
    processor: BaseImageProcessor, *, skip_corrupt_images: bool = False
) -> Callable[[dict[str, list]], dict[str, Any]]:
    """
    Makes the function that turns a batch of images and labels into what a model takes, for
    [`~datasets.Dataset.with_transform`]. The training arguments need `remove_unused_columns=False`.

    Args:
        processor (`BaseImageProcessor`):
            The image processor of the model.
        skip_corrupt_images (`bool`, *optional*, defaults to `False`):
            Whether to leave out images that cannot be decoded, with a warning that names and counts them. Only for
            [`~datasets.IterableDataset.map`]: other data sets are to keep their length.

    Returns:
        `Callable`: A function from a batch with `image` and `label` to one with `labels` and what the processor makes of the
        images, `pixel_values` and for some models more. Images may be decoded or, from a column cast to
        `Image(decode=False)`, still be encoded; see [`decode_image`] for what becomes of them. It raises a `ValueError` for an
        encoded image that cannot be decoded, and names the file.
    """
    min_size = _sufficient_size(processor)
    skipped = []

    # On the fly rather than mapped beforehand: the same one way serves data sets that do not fit into memory. A digit costs
    # about 0.1 ms this way, an epoch of the digits 0.2 s.
    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images, labels = [], []
        for image, label in zip(batch["image"], batch["label"], strict=True):
            try:
                images.append(decode_image(image, min_size))
            except ValueError as error:
                if not skip_corrupt_images:
                    raise
                skipped.append(error)
                logger.warning(f"{error}: left out, number {len(skipped)} of this process.")
            else:
                labels.append(label)
        inputs = processor(images, return_tensors="pt") if images else {"pixel_values": []}
        return {**inputs, "labels": labels}

    return transform


def _sufficient_size(processor: BaseImageProcessor) -> int | None:
    """Height and width of images from which the processor still shrinks to what the model takes."""
    if isinstance(processor, TimmWrapperImageProcessor):
        return _DRAFT_MARGIN * max(processor.data_config["input_size"][1:])
    if not processor.do_resize or processor.size is None:
        return None
    sizes = [dict(processor.size)]
    if getattr(processor, "do_center_crop", None):
        sizes.append(dict(processor.crop_size))
    known = [value for size in sizes for value in size.values() if value is not None]
    return _DRAFT_MARGIN * max(known) if known else None


def find_corrupt(dataset: Dataset) -> dict[int, str]:
    """
    Decodes every image of a data set, in threads, a few at a time.

    Args:
        dataset (`Dataset`): A data set with a column `image`.

    Returns:
        `dict[int, str]`: For each image that cannot be decoded, by its index, the file (or the row) and the reason.
    """
    encoded = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    problems = {}
    with ThreadPool() as pool, tqdm(total=len(encoded), desc="Checking the images", delay=1) as bar:
        # In batches, as the pool takes in all that it is given before it is through with the first.
        for batch in encoded.iter(_CHECKED_AT_ONCE):
            images = batch["image"]
            for index, (image, problem) in enumerate(
                zip(images, pool.map(_problem, images), strict=True), start=bar.n
            ):
                if problem:
                    problems[index] = f"{(image and image['path']) or f'row {index}'} ({problem})"
            bar.update(len(images))
    return problems


def _problem(image: dict[str, Any] | None) -> str | None:
    if image is None:
        return "no image"
    try:
        decode_image(image, min_size=1)  # a JPEG at an eighth of the size still reads, and so checks, the whole file
    except ValueError as error:
        return str(error.__cause__) or type(error.__cause__).__name__
    return None


def first_few(items: list[str]) -> str:
    """The first five, for a message."""
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")
