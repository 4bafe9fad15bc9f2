# SPDX-License-Identifier: Apache-2.0
"""Train low-rank adapters of an image classifier, by peft."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .._compat import BATCH_OR_INSTANCE_NORM
from .messages import first_line
from .models import cast_trainable_to_float32, head_and_last_layer


logger = logging.get_logger(__name__)


def add_lora(
    model: PreTrainedModel, *, rank: int = 16, alpha: float = 16.0, target_modules: Sequence[str] = ("all-linear",)
) -> nn.Module:
    """
    Add low-rank adapters (LoRA, Hu et al., [arXiv 2106.09685](https://huggingface.co/papers/2106.09685)) to a classifier.
    They, the head and the layers that keep running statistics (BatchNorm) are trained, in 32 bits; all else is frozen.

    Training changes running statistics whether or not a layer is frozen, and an adapter without them is another model. So
    these layers belong to what is saved, in `modules_to_save` of peft, as its documentation advises.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, modified in place.
        rank (`int`, *optional*, defaults to `16`): Rank of the adapters.
        alpha (`float`, *optional*, defaults to `16.0`): The adapters are scaled by `alpha / rank`.
        target_modules (`Sequence[str]`, *optional*, defaults to `("all-linear",)`):
            The ends of the names of the layers to adapt; `"all-linear"` means every linear layer but the head. Convolutions in
            groups get no adapters, as peft cannot merge these; a warning counts them.

    Returns:
        [`~peft.PeftModel`]: The model with its adapters.

    Raises:
        `ImportError`: If peft is not installed.
        `ValueError`: If the model has no such layers, their adapters could not be merged, or the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"`lora_rank` must be at least 1, got {rank}.")
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ImportError("`lora` needs the package peft: pip install 'hf-aace[peft]'.") from error
    head = {name.rpartition(".")[0] for name in head_and_last_layer(model)} - {""}
    with_statistics = {name for name, module in model.named_modules() if _keeps_statistics(module)}
    grouped = [
        name
        for name, module in model.named_modules()
        if getattr(module, "groups", 1) > 1 and any(f".{name}".endswith(f".{end}") for end in target_modules)
    ]
    if grouped:
        logger.warning(
            f"`lora_target_modules`: {len(grouped)} convolutions in groups, such as {grouped[0]!r}, get no adapters, as peft "
            "cannot merge these into the model."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear" if list(target_modules) == ["all-linear"] else list(target_modules),
        exclude_modules=sorted(head | set(grouped)),
        modules_to_save=sorted(head | with_statistics),
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"`lora_target_modules` is {list(target_modules)}, which names no {'other ' if grouped else ''}layers of "
            f"{type(model).__name__} that can be adapted. Give the ends of the names of some, as `model.named_modules()` lists them (in a ResNet, "
            f"`convolution`). peft says: {first_line(error)}."
        ) from error
    cast_trainable_to_float32(adapted)
    for module in adapted.modules():
        if _keeps_statistics(module):
            module.float()  # the statistics too: small updates of a running mean would be rounded away
    for name, layer in adapted.named_modules():
        # Now, since merging comes after hours of training.
        if isinstance(layer, LoraLayer) and (problem := _why_not_mergeable(layer)):
            raise ValueError(
                f"`lora_target_modules` is {list(target_modules)}, and the adapter of {name.removeprefix('base_model.model.')!r}, of "
                f"the class {type(layer.get_base_layer()).__name__}, could not be merged into it: {problem}. Name other layers."
            )
    return adapted


def _why_not_mergeable(layer: nn.Module) -> str | None:
    """Tell why merging the adapter would change what the layer computes; `None` if it would not."""
    (down,) = layer.lora_A.values()  # of the class of the adapted layer, if that is a convolution
    if not isinstance(down, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    with torch.no_grad():
        ramp = torch.linspace(-1, 1, down.weight[0].numel(), device=down.weight.device).view_as(down.weight[:1])
        once = down(ramp)
        down.weight *= 2
        twice = down(ramp)
        down.weight /= 2
    return None if torch.allclose(twice, 2 * once) else "it normalizes its weights at each call"


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, BATCH_OR_INSTANCE_NORM) and module.running_mean is not None
