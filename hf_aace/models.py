# SPDX-License-Identifier: Apache-2.0
"""Image classifiers with their image processors: two small built-in ones for 8x8 scans, or any from the Hub or a folder."""

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor


BUILTIN_MODELS = ("convnext-tiny-digits", "vit-tiny-digits", "resnet-tiny-digits")

_BUILTIN_IMAGE_SIZE = 8


def _builtin_config(name: str, labels: dict) -> PreTrainedConfig:
    if name == "convnext-tiny-digits":
        return ConvNextConfig(
            image_size=_BUILTIN_IMAGE_SIZE,
            patch_size=2,
            num_stages=2,
            depths=[2, 2],
            hidden_sizes=[48, 96],
            # The default of 1e-6 is for networks of dozens of blocks: it would keep four from learning for epochs.
            layer_scale_init_value=0.1,
            **labels,
        )
    if name == "resnet-tiny-digits":
        return ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic", **labels)
    return ViTConfig(
        image_size=_BUILTIN_IMAGE_SIZE,
        patch_size=2,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        **labels,
    )


def load_model_and_processor(
    model_name_or_path: str, id2label: dict[int, str]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    Loads an image classifier and the image processor that belongs to it.

    Args:
        model_name_or_path (`str`):
            One of `BUILTIN_MODELS`, which are small, made for 8x8 scans and initialised at random from the current
            torch seed; or a local folder, or a model id on the Hub. If the classes of a loaded model are not as many
            as `id2label`, its head is initialised anew.
        id2label (`dict[int, str]`):
            The names of the classes by their number.

    Returns:
        `tuple[PreTrainedModel, BaseImageProcessor]`: The model, its weights in 32 bits, and its image processor.

    Raises:
        `ValueError`: If there is no such model, or it is no image classifier.
    """
    labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    if model_name_or_path in BUILTIN_MODELS:
        model = AutoModelForImageClassification.from_config(_builtin_config(model_name_or_path, labels))
        # A ResNet's stem shrinks the image to a quarter of its height, and of 8 pixels it would leave two.
        size = 4 * _BUILTIN_IMAGE_SIZE if model_name_or_path == "resnet-tiny-digits" else _BUILTIN_IMAGE_SIZE
        # ConvNeXt's own processor enlarges and crops the border away below 384 pixels; this one only resizes.
        processor = ViTImageProcessorPil(
            size={"height": size, "width": size},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            do_convert_rgb=True,
        )
        return model, processor
    try:
        model = AutoModelForImageClassification.from_pretrained(
            model_name_or_path,
            # Weights in 16 bits would round the perturbation away.
            dtype=torch.float32,
            num_labels=len(id2label),
            ignore_mismatched_sizes=True,
            **labels,
        )
        processor = AutoImageProcessor.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path` is {model_name_or_path!r}: not a built-in model ({', '.join(BUILTIN_MODELS)}), and "
            "no image classifier with its image processor could be loaded from a folder or from the Hub under that "
            f"name: {str(error).strip().splitlines()[0]}"
        ) from error
    return model, processor


def model_from_architecture(name: str, overrides: dict[str, Any] | None = None) -> PreTrainedModel:
    """
    An image classifier with random weights, for what its weights do not matter to.

    Args:
        name (`str`):
            One of `BUILTIN_MODELS`; a model type of Transformers in its default size (`"vit"` is ViT-B/16, `"convnext"`
            ConvNeXt-T, both for 224 pixels); or a folder or a model id on the Hub, of which only the configuration is read.
        overrides (`dict[str, Any]`, *optional*):
            Fields of the configuration to change.

    Raises:
        `ValueError`: If there is no such architecture, it is none of an image classifier, or has no such field.
    """
    try:
        if name in BUILTIN_MODELS:
            config = _builtin_config(name, {})
        elif name in CONFIG_MAPPING:
            config = AutoConfig.for_model(name)
        else:
            config = AutoConfig.from_pretrained(name)
        known = config.to_dict()
        for key, value in (overrides or {}).items():
            if key not in known:
                raise ValueError(f"its configuration has no field {key!r}")
            setattr(config, key, value)
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path` is {name!r}, from which no image classifier can be made. Give a built-in model "
            f"({', '.join(BUILTIN_MODELS)}), a model type such as `vit` or `convnext`, a folder, or a model id on the Hub: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
