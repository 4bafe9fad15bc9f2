# SPDX-License-Identifier: Apache-2.0
"""Augment training images at random, batch by batch and on their device, and train on them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer
from transformers.image_processing_utils import BaseImageProcessor

from ..trainer import AACETrainer


# Not torchvision's 0.08: the crop is taken from what the processor made of the image, not from the image, so that a small
# crop is blurred. The smallest of these is enlarged by a factor of 1.7.
_CROP_SCALE = (0.35, 1.0)
# The usual setting of RandAugment: two operations at magnitude 9 (of 30).
_OPERATIONS, _MAGNITUDE = 2, 9
# Kornia draws the operations once for all images that it is given, so it is given groups of this many.
_RANDAUGMENT_GROUP = 8


class Augmentation:
    """
    Change a batch at random, by [kornia](https://kornia.readthedocs.io), on the device of the batch.

    Args:
        policy (`str`):
            `"none"`; `"default"`, a crop of at least 35 % of the image, enlarged to the size of the image, and a horizontal
            flip of half of the images; or `"randaugment"`, which adds RandAugment
            ([arXiv 1909.13719](https://huggingface.co/papers/1909.13719)) with two operations of magnitude 9, drawn anew for
            every eight images.
        processor (`BaseImageProcessor`):
            The image processor of the model. Its normalization is undone for the changes and then repeated.
        num_classes (`int`):
            The number of classes.
        mixup (`float`, *optional*, defaults to `0.0`):
            Above 0, blend each image and its label with another of the batch, in a ratio drawn for the batch from
            `Beta(mixup, mixup)` ([arXiv 1710.09412](https://huggingface.co/papers/1710.09412)).
        cutmix (`float`, *optional*, defaults to `0.0`):
            Above 0, replace a rectangle of each image by that of another of the batch, and the same share of its label; the
            share is drawn for each image from `Beta(cutmix, cutmix)` ([arXiv
            1905.04899](https://huggingface.co/papers/1905.04899)). With `mixup` too, each batch gets one of the two.

    The ascent by the AACE loss leads away from both classes of a mixed image. With few classes that may *lower* the loss of
    the mixture, and for two classes in equal shares it does. Then use `perturbation_loss="cross_entropy"`.

    Raises:
        `ValueError`: If there is no such policy, a number is negative, or the processor does not make images of one size.
    """

    def __init__(
        self,
        policy: str,
        *,
        processor: BaseImageProcessor,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ):
        if policy not in ("none", "default", "randaugment"):
            raise ValueError(f"`augmentation` must be `none`, `default` or `randaugment`, got {policy!r}.")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if not value >= 0:
                raise ValueError(f"`{name}` must be 0 (off) or more, got {value}. Common values are 0.2 to 1.")
        import kornia.augmentation as K  # slow to import

        self._policy, self._num_classes, self._mixup, self._cutmix = policy, num_classes, mixup, cutmix
        if policy != "none":
            self._black, self._white = _processed(processor, 0), _processed(processor, 255)
        self._flip = K.RandomHorizontalFlip()
        self._randaugment = K.auto.RandAugment(n=_OPERATIONS, m=_MAGNITUDE)
        if cutmix > 0:
            self._cut = K.RandomCutMixV2(beta=cutmix, use_correct_lambda=True, data_keys=["input", "class"])
        self._make_crop = K.RandomResizedCrop

    @property
    def soft_labels(self) -> bool:
        """Tell whether labels become probabilities, which need a `compute_loss_func` such as [`WeightedCrossEntropy`]."""
        return self._mixup > 0 or self._cutmix > 0

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        """
        Change a batch.

        Args:
            batch (`dict[str, torch.Tensor]`):
                With `pixel_values` of shape `(batch, channels, height, width)` and `labels` of shape `(batch,)`. Not modified.
            seed (`int`):
                Draws the changes. The global random number generators are left as they are.

        Returns:
            `dict[str, torch.Tensor]`: The batch with changed `pixel_values`, and with `labels` of shape `(batch, classes)` if
            `soft_labels`.

        Raises:
            `ValueError`: If `pixel_values` are of another shape.
        """
        _check_images(batch)
        images, labels = batch["pixel_values"], batch["labels"]
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            if self._policy != "none":
                images = self._changed(images)
            if self.soft_labels:
                images, labels = self._mixed(images, labels)
        return {**batch, "pixel_values": images, "labels": labels}

    def _changed(self, images: torch.Tensor) -> torch.Tensor:
        black, scale = self._black.to(images), (self._white - self._black).to(images)
        # Not with `slice`, which is a loop over the images.
        height, width = images.shape[-2:]
        # Times the shape of the image, which a crop so stretches by a third at most.
        ratio = (3 / 4 * width / height, 4 / 3 * width / height)
        crop = self._make_crop((height, width), scale=_CROP_SCALE, ratio=ratio, cropping_mode="resample")
        images = self._flip(crop(((images - black) / scale).clamp(0, 1)))
        if self._policy == "randaugment":
            images = torch.cat([self._randaugment(group) for group in images.split(_RANDAUGMENT_GROUP)])
        return images * scale + black

    def _mixed(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        soft = F.one_hot(labels, self._num_classes).to(images.dtype)
        if self._cutmix > 0 and (self._mixup == 0 or torch.rand(()) < 0.5):
            images, mixed = self._cut(images, labels)
            # Kornia returns the label of the other image, and the share that the image keeps of itself.
            others, own = F.one_hot(mixed[0, :, 1].long(), self._num_classes), mixed[0, :, 2:].to(images.dtype)
            return images, own * soft + (1 - own) * others
        # Kornia has MixUp too, but draws the ratio from a uniform distribution.
        ratio = torch.distributions.Beta(self._mixup, self._mixup).sample().to(images)
        order = torch.randperm(len(images)).to(images.device)
        return ratio * images + (1 - ratio) * images[order], ratio * soft + (1 - ratio) * soft[order]


def _processed(processor: BaseImageProcessor, level: int) -> torch.Tensor:
    """Process an image of one gray level; return what its pixels become, of shape `(channels, 1, 1)`."""
    # Measured, not read from the settings: EfficientNet's processor normalizes twice, and timm's has settings of its own.
    mean = getattr(processor, "image_mean", None)
    one_channel = isinstance(mean, (list, tuple)) and len(mean) == 1
    image = PIL.Image.new("L", (512, 512), level)
    inputs = processor([image if one_channel else image.convert("RGB")], return_tensors="pt")
    _check_images(inputs)
    return inputs["pixel_values"][0].flatten(1).median(dim=1).values.view(-1, 1, 1)  # ignores a margin that it adds


def _check_images(batch: Mapping[str, torch.Tensor]) -> None:
    if "pixel_values" not in batch or batch["pixel_values"].dim() != 4:
        raise ValueError(
            "Augmentation needs `pixel_values` of shape (batch, channels, height, width), got "
            f"{ {name: tuple(value.shape) for name, value in batch.items()} }. Set `augmentation` to `none`, and leave out "
            "`mixup` and `cutmix`."
        )


class AugmentedTrainer(Trainer):
    """
    Train as [`~transformers.Trainer`] does, on augmented batches; evaluation and prediction are left as they are.

    Each batch is changed once, on the device, before the step. Both passes of a sharpness-aware step must see the same batch,
    so put [`SharpnessAwareMixin`] before this class, as [`AugmentedAACETrainer`] does. The changes depend only on the seed of the
    arguments, the step, and the number of the process, so that a resumed run makes the same changes as a run that was never
    stopped. If labels become soft, `num_items_in_batch` is the number of all entries of the labels, as Trainer counts the soft
    labels of a collator.

    Args:
        augmentation (`Callable[[dict, int], dict]`, *optional*):
            Makes, from a batch and a seed, the batch to train on, such as an [`Augmentation`]. By default, batches are not changed.
        *args, **kwargs:
            Everything else that [`~transformers.Trainer`] takes.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *args,
        augmentation: Callable[[dict[str, Any], int], dict[str, Any]] | None = None,
        **kwargs,
    ):
        super().__init__(model, *args, **kwargs)
        self._augmentation = augmentation

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self._augmentation is not None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            place = [seed, self.state.global_step, self.args.process_index]
            plain = batches
            batches = [
                self._augmentation(
                    self._prepare_inputs(batch), int(np.random.SeedSequence([*place, index]).generate_state(1)[0])
                )
                for index, batch in enumerate(plain)
            ]
            if num_items_in_batch is not None and batches and "labels" in batches[0]:
                # Trainer counts the entries of labels, and soft labels have more of them.
                before, now = (each[0]["labels"].numel() for each in (plain, batches))
                num_items_in_batch = num_items_in_batch * now // before
        return batches, num_items_in_batch


class AugmentedAACETrainer(AACETrainer, AugmentedTrainer):
    """Train as [`AACETrainer`] does, on augmented batches; see [`AugmentedTrainer`]."""
