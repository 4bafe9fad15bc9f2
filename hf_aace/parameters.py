# SPDX-License-Identifier: Apache-2.0
"""The parameters to perturb: all, those of the normalization layers, or those whose names match."""

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ._compat import BATCH_OR_INSTANCE_NORM
from .checks import check_parameters, warn_of_unusual_norm_parameters


_NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH_OR_INSTANCE_NORM)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def parameters_to_perturb(model: nn.Module, perturb_modules: str | None) -> list[nn.Parameter]:
    """
    List the trainable parameters that `perturb_modules` chooses.

    Args:
        model (`nn.Module`): The model, without the wrappers of accelerate.
        perturb_modules (`str`, *optional*): As in [`AACEConfig`]. Defaults to all parameters.

    Returns:
        `list[nn.Parameter]`: The parameters, each once, in the order of the model.

    Raises:
        `ValueError`: If there are none.
    """
    # FSDP2's activation checkpointing and compilation put their wrappers into the names. A tied weight may be chosen by each.
    trainable = {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): p
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad
    }
    if perturb_modules == "norm":
        layers = [m for m in model.modules() if isinstance(m, _NORM_LAYERS) or "norm" in type(m).__name__.lower()]
        norm = {
            id(p)
            for module in layers
            for name, p in _own_parameters(module)
            # A convolution that normalizes its own weights may have "norm" in its name: its weights have several dimensions.
            if name in ("weight", "bias") and sum(size > 1 for size in p.shape) <= 1
        }
        chosen = [p for p in trainable.values() if id(p) in norm]
        others = {id(p) for m in layers if not isinstance(m, _LINEAR) for _, p in _own_parameters(m)} - norm
        warn_of_unusual_norm_parameters([name for name, p in trainable.items() if id(p) in others])
    else:
        chosen = [p for name, p in trainable.items() if perturb_modules is None or re.search(perturb_modules, name)]
    check_parameters(trainable, chosen, perturb_modules)
    return list({id(p): p for p in chosen}.values())


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """List the parameters that a module holds itself, also those that `torch.nn.utils.parametrize` has moved below it."""
    yield from module.named_parameters(recurse=False)
    if is_parametrized(module):
        yield from ((name, p) for name, made in module.parametrizations.items() for p in made.parameters())
