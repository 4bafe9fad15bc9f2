# SPDX-License-Identifier: Apache-2.0
"""Decode images of every kind, and turn batches of them into what a model takes."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
from transformers import TimmWrapperImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The formats that Pillow reads. The others that it knows by name it only writes.
IMAGE_SUFFIXES = frozenset(PIL.Image.registered_extensions()) - {".pdf", ".palm", ".h5", ".hdf"}

# A JPEG is decoded at a fraction of its size only if this many times the size that the model takes is left: the processor
# then still averages over pixels, and the result is close to that of the whole image.
_DRAFT_MARGIN = 2


def decode_image(
    image: PIL.Image.Image | dict[str, Any] | None,
    min_size: int | None = None,
    image_range: Sequence[float] | None = None,
) -> PIL.Image.Image:
    """
    Decode an image and convert it to 8 bits of red, green and blue.

    - The image is turned upright, by its EXIF data.
    - Transparent parts become white.
    - Gray of 16 bits is scaled so that 65535 becomes 255, and gray of 32 bits (floating-point numbers, and integers that do not
      fit into 16) from the lowest and the highest value of the image to 0 and 255; unless `image_range` says otherwise.
    - Palettes, gray and CMYK are converted; of an animation the first frame is taken.

    Args:
        image (`PIL.Image.Image` or `dict`):
            The image; or an encoded image, as a column of [`~datasets.Image`] with `decode=False` holds it: with `bytes`, or
            with the `path` of a file or a URL.
        min_size (`int`, *optional*):
            Height and width that suffice, in pixels. A JPEG at least twice as large is decoded at the smallest of a half, a
            quarter or an eighth of its size that still has them, in a fraction of the time and the memory. By default, images
            are decoded whole.
        image_range (`Sequence[float]`, *optional*):
            Two values, which become 0 (black) and 255; others are clipped. `(0, 4095)` is for 12 bits in files of 16. Images
            of 8 bits are scaled only if the second value is at most 255. Of color in 16 bits Pillow reads the upper 8 only.
            Gray of 12 bits in JPEG 2000 Pillow scales to 16 by itself: leave the range out.

    Returns:
        `PIL.Image.Image`: The image, of mode `RGB`.

    Raises:
        `ValueError`: If the image cannot be decoded, or Pillow takes it for a decompression bomb, since it has more than
            `2 * PIL.Image.MAX_IMAGE_PIXELS` (179 million) pixels. The message names the file.
    """
    if isinstance(image, PIL.Image.Image):
        return _to_rgb(image, image_range)
    with _opened(image, min_size) as opened:
        return _to_rgb(opened, image_range)


def value_range(image: dict[str, Any]) -> tuple[str, float, float]:
    """
    Read the range of the values in an encoded image, before they are scaled; refuse one that cannot be decoded.

    Return how the values are stored (`"8 bits"`, `"16 bits"`, `"16 bits of color"`, or `"32 bits"` for floating-point numbers
    and for integers that are not in `[0, 65535]`), the lowest value and the highest. Of more than 8 bits each end leaves out
    0.5 % of the values, at least one if there are 64 or more: defects of the sensor and burned-in marks.
    """
    with _opened(image, min_size=1) as opened:
        factor = 257 if _is_deep_color(opened) else 1
        pixels = _pixels(opened if _is_deep_gray(opened) else opened.convert("RGB"))
    shallow = pixels.dtype == np.uint8 and factor == 1
    outliers = 0 if shallow or pixels.size < 64 else max(1, pixels.size // 200)
    ordered = np.partition(pixels, [outliers, pixels.size - 1 - outliers], axis=None)
    low, high = float(ordered[outliers]) * factor, float(ordered[-1 - outliers]) * factor
    if pixels.dtype == np.uint8:
        return ("8 bits" if shallow else "16 bits of color"), low, high
    return ("16 bits" if _fits_16_bits(pixels) else "32 bits"), low, high


def has_more_pages(image: dict[str, Any]) -> bool:
    """
    Tell whether an encoded image has more pages or frames than the first, the one that [`decode_image`] takes; refuse one that
    cannot be opened.
    """
    with _opened(image, min_size=None) as opened:
        # Photographs of telephones are of the format MPO, with previews as further pages.
        return opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1


@contextmanager
def _opened(image: dict[str, Any] | None, min_size: int | None) -> Iterator[PIL.Image.Image]:
    """Open an encoded image, and raise a `ValueError` with its name if it cannot be decoded inside the block."""
    if image is None:
        raise ValueError("A row of the dataset has no image. Leave it out, or set `skip_corrupt_images`.")
    try:
        with _file(image) as file, PIL.Image.open(file) as opened:
            if min_size is not None:
                opened.draft(None, (min_size, min_size))  # without effect unless it is a JPEG
            yield opened
    # Pillow's decoders raise errors of many kinds: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        problem = str(error) or type(error).__name__
        raise ValueError(f"The image {image['path'] or ''!r} cannot be decoded: {problem}") from error


def _file(image: dict[str, Any]) -> Any:
    if image["bytes"] is not None:
        return io.BytesIO(image["bytes"])
    if "://" in image["path"]:  # in a streamed dataset
        return fsspec.open(image["path"], "rb")
    return open(image["path"], "rb")


def _is_deep_gray(image: PIL.Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _is_deep_color(image: PIL.Image.Image) -> bool:
    """Tell whether the file holds 16 bits, of which Pillow reads the upper 8; not known once the image is loaded."""
    return not _is_deep_gray(image) and ";16" in str(image.tile)


def _pixels(image: PIL.Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    if not np.isfinite(pixels).all():
        raise ValueError("some of its pixels are not finite")
    return pixels


def _fits_16_bits(pixels: np.ndarray) -> bool:
    """Tell whether these are integers of 16 bits; Pillow opens some files of 16 bits in 32."""
    return np.issubdtype(pixels.dtype, np.integer) and pixels.min() >= 0 and pixels.max() <= 65535


def _to_rgb(image: PIL.Image.Image, image_range: Sequence[float] | None) -> PIL.Image.Image:
    deep_color = isinstance(image, PIL.ImageFile.ImageFile) and _is_deep_color(image)
    image = PIL.ImageOps.exif_transpose(image)
    if _is_deep_gray(image):
        return PIL.Image.fromarray(_to_bytes(_pixels(image), image_range)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image_range is None or (image_range[1] > 255 and not deep_color):
        return image
    values = np.arange(256) * (257 if deep_color else 1)
    return image.point(_to_bytes(values, image_range).tolist() * 3)


def _to_bytes(pixels: np.ndarray, image_range: Sequence[float] | None) -> np.ndarray:
    """Scale values of 16 or 32 bits to 8."""
    low, high = image_range or ((0, 65535) if _fits_16_bits(pixels) else (float(pixels.min()), float(pixels.max())))
    scale = 255 / (high - low) if high > low else 0.0
    return np.round((pixels.astype(np.float64) - low) * scale).clip(0, 255).astype(np.uint8)


def image_transform(
    processor: BaseImageProcessor, *, skip_corrupt_images: bool = False, image_range: Sequence[float] | None = None
) -> Callable[[dict[str, list]], dict[str, Any]]:
    """
    Make the function that turns a batch of images and labels into what a model takes, for
    [`~datasets.Dataset.with_transform`]. The training arguments need `remove_unused_columns=False`.

    Args:
        processor (`BaseImageProcessor`):
            The image processor of the model.
        skip_corrupt_images (`bool`, *optional*, defaults to `False`):
            Leave out images that cannot be decoded, with a warning that names and counts them. Only for
            [`~datasets.IterableDataset.map`], since other datasets must keep their length.
        image_range (`Sequence[float]`, *optional*):
            The values that become black and white, see [`decode_image`]. A model needs the same in training and afterwards.

    Returns:
        `Callable`: A function from a batch with `image` and `label` to a batch with `labels` and the outputs of the processor:
        `pixel_values`, and more for some models. Images may be decoded, or encoded in a column cast to `Image(decode=False)`;
        [`decode_image`] converts them, and raises a `ValueError` with the name of a file that cannot be decoded.
    """
    # Not a local function, which worker processes that are not forked could not be sent.
    skipped = [] if skip_corrupt_images else None
    return partial(_transform, processor, _sufficient_size(processor), image_range, skipped)


# On the fly rather than mapped beforehand, which serves datasets that do not fit into memory too. A digit takes about 0.1 ms, an
# epoch of the digits 0.2 s.
def _transform(
    processor: BaseImageProcessor,
    min_size: int | None,
    image_range: Sequence[float] | None,
    skipped: list[ValueError] | None,
    batch: dict[str, list],
) -> dict[str, Any]:
    images, labels = [], []
    for image, label in zip(batch["image"], batch["label"], strict=True):
        try:
            images.append(decode_image(image, min_size, image_range))
        except ValueError as error:
            if skipped is None:
                raise
            skipped.append(error)
            logger.warning(f"{error}: left out, number {len(skipped)} of this process.")
        else:
            labels.append(label)
    inputs = processor(images, return_tensors="pt") if images else {"pixel_values": []}
    return {**inputs, "labels": labels}


def _sufficient_size(processor: BaseImageProcessor) -> int | None:
    """Give a height and width, in pixels, from which the processor still shrinks images to what the model takes."""
    if isinstance(processor, TimmWrapperImageProcessor):
        return _DRAFT_MARGIN * max(processor.data_config["input_size"][1:])
    if not processor.do_resize or processor.size is None:
        return None
    sizes = [dict(processor.size)]
    if getattr(processor, "do_center_crop", None):
        sizes.append(dict(processor.crop_size))
    known = [value for size in sizes for value in size.values() if value is not None]
    return _DRAFT_MARGIN * max(known) if known else None
