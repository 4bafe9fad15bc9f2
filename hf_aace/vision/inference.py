# SPDX-License-Identifier: Apache-2.0
"""Classify images batch by batch, so that memory stays flat however many there are."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.pool import ThreadPool

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .images import image_transform


def classify(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Iterable[PIL.Image.Image | dict],
    *,
    batch_size: int = 32,
    image_range: Sequence[float] | None = None,
) -> Iterator[np.ndarray | ValueError]:
    """
    Compute the probabilities of the classes for each image, decoded and processed as for training.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The classifier, on its device. It is put into evaluation mode.
        processor (`BaseImageProcessor`):
            Its image processor.
        images (iterable of `PIL.Image.Image` or `dict`):
            Images; or encoded images as `datasets` gives them, with `bytes` and `path`, of which one may be `None`.
        batch_size (`int`, *optional*, defaults to `32`):
            The number of images at a time. They are decoded in threads.
        image_range (`Sequence[float]`, *optional*):
            The values that become black and white, as in training; see [`~hf_aace.vision.images.decode_image`].

    Yields:
        `np.ndarray` of shape `(classes,)`, or `ValueError`: The probabilities, or the error for an image that cannot be decoded.

    Raises:
        `ValueError`: If the logits of an image are not finite, or the processor leaves a batch images of several sizes.
    """
    transform = image_transform(processor, image_range=image_range)

    def prepare(image: PIL.Image.Image | dict) -> dict[str, torch.Tensor] | ValueError:
        try:
            inputs = transform({"image": [image], "label": [0]})
        except ValueError as error:
            return error
        return {name: torch.as_tensor(value) for name, value in inputs.items() if name != "labels"}

    model.eval()
    images = iter(images)
    with ThreadPool() as pool:
        while batch := list(islice(images, batch_size)):
            prepared = pool.map(prepare, batch)
            readable = [inputs for inputs in prepared if not isinstance(inputs, ValueError)]
            probabilities = iter(_probabilities(model, readable) if readable else ())
            for inputs in prepared:
                yield inputs if isinstance(inputs, ValueError) else next(probabilities)


@torch.inference_mode()
def _probabilities(model: PreTrainedModel, samples: list[dict[str, torch.Tensor]]) -> np.ndarray:
    inputs = {}
    for name in samples[0]:
        shapes = sorted({tuple(sample[name].shape[1:]) for sample in samples})
        if len(shapes) > 1:
            raise ValueError(
                f"The image processor leaves images of several sizes, such as {shapes[0]} and {shapes[-1]}: set `do_resize` in "
                "the model's preprocessor_config.json, or classify them one at a time (`batch_size` 1)."
            )
        inputs[name] = torch.cat([sample[name] for sample in samples]).to(model.device)
    probabilities = model(**inputs).logits.float().softmax(dim=-1).cpu().numpy()
    if not np.isfinite(probabilities).all():
        raise ValueError(
            "The model gives no finite logits for some image. Its training may have diverged: take an earlier checkpoint, or "
            "train it again at a lower learning rate."
        )
    return probabilities
