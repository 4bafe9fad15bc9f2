# SPDX-License-Identifier: Apache-2.0
"""Load image classifiers with their image processors: small built-in ones for 8x8 scans, or any from the Hub or a folder."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .._compat import forget_old_class_names
from .messages import first_line


logger = logging.get_logger(__name__)

_BUILTIN_IMAGE_SIZE = 8
_BUILTIN_CONFIGS = {
    "convnext-tiny-digits": {
        "model_type": "convnext",
        "image_size": _BUILTIN_IMAGE_SIZE,
        "patch_size": 2,
        "num_stages": 2,
        "depths": [2, 2],
        "hidden_sizes": [48, 96],
        # The default of 1e-6 is for networks of dozens of blocks: it would keep four from learning for epochs.
        "layer_scale_init_value": 0.1,
    },
    "vit-tiny-digits": {
        "model_type": "vit",
        "image_size": _BUILTIN_IMAGE_SIZE,
        "patch_size": 2,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    },
    "resnet-tiny-digits": {
        "model_type": "resnet",
        "embedding_size": 32,
        "hidden_sizes": [32, 64],
        "depths": [2, 2],
        "layer_type": "basic",
    },
}
BUILTIN_MODELS = tuple(_BUILTIN_CONFIGS)


def load_model_and_processor(
    model_name_or_path: str,
    id2label: dict[int, str],
    *,
    revision: str = "main",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    Load an image classifier to train, and the image processor that belongs to it.

    Args:
        model_name_or_path (`str`):
            One of `BUILTIN_MODELS`, which are small, made for 8x8 scans and initialized at random from the current
            torch seed; or a local folder, or a model id on the Hub. The head of a loaded model is kept if its classes are
            `id2label`, or as many as those and without names of their own (`LABEL_0`, ...). For other classes, or the same in
            another order, the head is initialized anew.
        id2label (`dict[int, str]`):
            Maps the number of each class to its name.
        revision (`str`, *optional*, defaults to `"main"`):
            The branch, tag or commit on the Hub.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            The dtype of the weights, whatever that of the checkpoint is.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run Python code that comes with the model.
        allow_pickle (`bool`, *optional*, defaults to `False`):
            Load weights that are not safetensors.

    Returns:
        `tuple[PreTrainedModel, BaseImageProcessor]`: The model and its image processor.

    Raises:
        `ValueError`: If there is no such model, or it is no image classifier.
    """
    labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    if model_name_or_path in BUILTIN_MODELS:
        config = AutoConfig.for_model(**_BUILTIN_CONFIGS[model_name_or_path], **labels)
        model = AutoModelForImageClassification.from_config(config, dtype=dtype)
        # The stem of a ResNet shrinks images to a quarter of their height: it would leave two of 8 pixels.
        size = 4 * _BUILTIN_IMAGE_SIZE if model_name_or_path == "resnet-tiny-digits" else _BUILTIN_IMAGE_SIZE
        # Below 384 pixels, ConvNeXt's own processor enlarges images and crops their border; this one only resizes.
        size = {"height": size, "width": size}
        return model, ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(model_name_or_path, allow_pickle):
        known = AutoConfig.from_pretrained(model_name_or_path, **source).id2label
        model = AutoModelForImageClassification.from_pretrained(
            model_name_or_path,
            dtype=dtype,
            num_labels=len(id2label),
            problem_type="single_label_classification",  # whatever it was trained for
            ignore_mismatched_sizes=True,
            use_safetensors=None if allow_pickle else True,
            **labels,
            **source,
        )
        processor = AutoImageProcessor.from_pretrained(model_name_or_path, **source)
        _check_channels(model)
    forget_old_class_names(model.config)
    if len(known) == len(id2label) and known != id2label and model_classes(known):
        logger.warning(
            f"The classes of {model_name_or_path} differ from those of the data, or are in another order: its head is "
            "initialized anew."
        )
        _renew_head(model)
    return model, processor


def load_classifier(
    model_name_or_path: str, *, revision: str = "main", trust_remote_code: bool = False, allow_pickle: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    Load an image classifier as it was trained, and the image processor that belongs to it.

    Args:
        model_name_or_path (`str`):
            A local folder, or a model id on the Hub.
        revision (`str`, *optional*, defaults to `"main"`):
            The branch, tag or commit on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run Python code that comes with the model.
        allow_pickle (`bool`, *optional*, defaults to `False`):
            Load weights that are not safetensors.

    Returns:
        `tuple[PreTrainedModel, BaseImageProcessor]`: The model, its weights in 32 bits, and its image processor.

    Raises:
        `ValueError`: If there is no such model, it is no image classifier, or a part of it, such as the head, is not trained.
    """
    if model_name_or_path in BUILTIN_MODELS:
        raise ValueError(
            f"`model_name_or_path` is {model_name_or_path!r}, a model to train that knows nothing yet: give the folder of a "
            "run of `hf-aace train`."
        )
    if Path(model_name_or_path, "adapter_config.json").is_file():
        raise ValueError(
            f"The folder {model_name_or_path!r} given as `model_name_or_path` holds an adapter, without the names of the "
            "classes. Give the folder of the whole run, where the adapter is merged into the model; or merge it yourself, "
            "with `merge_and_unload` of peft."
        )
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(model_name_or_path, allow_pickle):
        model, report = AutoModelForImageClassification.from_pretrained(
            model_name_or_path,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **source,
        )
        if report["missing_keys"]:
            raise ValueError(
                f"it has no trained weights for {', '.join(sorted(report['missing_keys'])[:3])}. Train it first: "
                "`hf-aace train`"
            )
        if model.config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"its `problem_type` is {model.config.problem_type!r}, so that it does not give an image one class. Train it for that: "
                "`hf-aace train`"
            )
        if sorted(model.config.id2label) != list(range(model.config.num_labels)):
            raise ValueError(
                f"its `id2label` does not number the {model.config.num_labels} classes from 0 on, so that nothing says which is which. "
                "Mend it in the config.json"
            )
        processor = AutoImageProcessor.from_pretrained(model_name_or_path, **source)
        _check_channels(model)
    return model, processor


def _check_channels(model: PreTrainedModel) -> None:
    """Refuse a model that does not take the three channels in which images are read."""
    channels = getattr(model.config, "num_channels", 3)
    if channels != 3:
        raise ValueError(
            f"its `num_channels` is {channels}, but images are read as red, green and blue. Take a model of 3"
        )


@contextmanager
def _explained(model_name_or_path: str, allow_pickle: bool) -> Iterator[None]:
    """Replace the errors of loading a model by one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        reason = f"{first_line(error)}."
        if "trust_remote_code" in str(error):
            reason += " If you trust it, set `trust_remote_code`."
        elif not allow_pickle and "safetensors" in reason:
            reason += " If its weights are in another format and you trust them, set `allow_pickle`."
        raise ValueError(
            f"`model_name_or_path` is {model_name_or_path!r}: not a built-in model ({', '.join(BUILTIN_MODELS)}), and "
            "no image classifier with its image processor could be loaded from a folder or from the Hub under that "
            f"name: {reason}"
        ) from error


def model_classes(id2label: dict[int, str]) -> list[str] | None:
    """List the names of a classifier's classes in the order of their numbers, `None` if they have no names of their own."""
    unnamed = all(name == f"LABEL_{index}" for index, name in id2label.items())  # as Transformers names them
    return None if unnamed else [id2label[index] for index in sorted(id2label)]


def head_parameters(model: PreTrainedModel) -> set[str]:
    """
    Find the parameters of the last layer, whose shape depends on the number of classes.

    Args:
        model ([`~transformers.PreTrainedModel`]): An image classifier.

    Returns:
        `set[str]`: The names of the parameters.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):  # no memory, no random numbers
        larger = {name: p.shape for name, p in type(model)(config).named_parameters()}
    return {name for name, p in model.named_parameters() if p.shape != larger[name]}


def _renew_head(model: PreTrainedModel) -> None:
    """Initialize the last layer anew, in place."""
    fresh = dict(type(model)(copy.deepcopy(model.config)).named_parameters())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in head_parameters(model):
            parameters[name].copy_(fresh[name])


def head_and_last_layer(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters outside the backbone and of the last layer, which in a few models lies inside it."""
    backbone = {id(p) for p in model.base_model.parameters()}
    return head_parameters(model) | {name for name, p in model.named_parameters() if id(p) not in backbone}


def freeze_backbone(model: PreTrainedModel) -> None:
    """
    Freeze all parameters but the head (all outside `base_model`, and the last layer), which is trained in 32 bits.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, modified in place.
    """
    head = head_and_last_layer(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    cast_trainable_to_float32(model)


def cast_trainable_to_float32(model: nn.Module) -> None:
    """Cast the parameters that require a gradient to 32 bits, in place."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def model_from_architecture(name: str, overrides: dict[str, Any] | None = None) -> PreTrainedModel:
    """
    Make an image classifier with random weights, for measurements that do not depend on the weights.

    Args:
        name (`str`):
            One of `BUILTIN_MODELS`; a model type of Transformers in its default size (`"vit"` is ViT-B/16, `"convnext"`
            ConvNeXt-T, both for 224 pixels); or a folder or a model id on the Hub, of which only the configuration is read.
        overrides (`dict[str, Any]`, *optional*):
            Fields of the configuration to change.

    Raises:
        `ValueError`: If there is no such architecture or field, or no image classifier of the architecture.
    """
    try:
        if name in BUILTIN_MODELS:
            config = AutoConfig.for_model(**_BUILTIN_CONFIGS[name])
        elif name in CONFIG_MAPPING:
            config = AutoConfig.for_model(name)
        else:
            config = AutoConfig.from_pretrained(name)
        known = config.to_dict()
        for key, value in (overrides or {}).items():
            if key not in known and key != "num_labels":
                raise ValueError(f"its configuration has no field {key!r}")
            setattr(config, key, value)
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except Exception as error:  # values that make no sense raise errors of any kind
        raise ValueError(
            f"`model_name_or_path` is {name!r}, from which no image classifier can be made. Give a built-in model "
            f"({', '.join(BUILTIN_MODELS)}), a model type such as `vit` or `convnext`, a folder, or a model id on the Hub: "
            f"{first_line(error)}"
        ) from error
