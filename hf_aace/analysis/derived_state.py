# SPDX-License-Identifier: Apache-2.0
"""
State that a model derives from its weights and keeps in evaluation mode: it must not outlive a move of the weights.

What a model keeps outside of its modules, in a closure or a cache of a function, is not seen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._compat import BATCH_OR_INSTANCE_NORM
from ..isolation import unchanged_attributes
from ..perturbation import perturbed


# The attributes that every module has and that are not its state: hooks and the like.
_NO_STATE = vars(nn.Module()).keys() - {"training", "_parameters", "_buffers", "_modules"}

_KEPT = (
    ": the model keeps something that it derived from its weights. Its sharpness can be measured if each forward pass derives "
    "that anew."
)


def switching_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules with a `train` method of their own: `train()` may drop derived state, `eval()` derive it anew."""
    return [module for module in model.modules() if type(module).train not in (nn.Module.train, PreTrainedModel.train)]


@contextmanager
def unchanged_state(model: nn.Module) -> Iterator[None]:
    """
    Context manager after which modes, buffers and attributes of all modules are what they were before it, and also the weights
    of modules with a `train` method of their own, which may rewrite them.

    Args:
        model (`nn.Module`): The model.
    """
    registered = [(module._parameters, module._parameters.copy()) for module in model.modules()]
    rewritten = [p for module in switching_modules(model) for p in module.parameters()]
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *rewritten)]
    try:
        with unchanged_attributes(model):
            yield
    finally:
        for parameters, before in registered:
            parameters.clear()
            parameters.update(before)
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)


def versions(model: nn.Module) -> dict[int, int]:
    """Note for each parameter and buffer, by its `id`, how often it was written to."""
    return {id(tensor): tensor._version for tensor in (*model.parameters(), *model.buffers())}


def derive_anew(modules: Sequence[nn.Module]) -> None:
    """Let modules drop what they derived from earlier weights, or what holds a graph that was used up."""
    for module in modules:
        module.train()
        module.eval()


def check_logits_follow_weights(
    model: nn.Module, parameters: Sequence[nn.Parameter], run: Callable[[], torch.Tensor]
) -> None:
    """
    Check that the logits of a model in evaluation mode follow its weights. Each parameter is moved a little: the logits,
    projected on a random direction, must change if and only if their gradient says so. If moving a parameter changes nothing, its
    gradient must be zero with its module in training mode, too.

    Args:
        model (`nn.Module`): The model, after a forward pass in evaluation mode.
        parameters (sequence of `nn.Parameter`): Its trainable parameters.
        run (`Callable`): Computes the logits of a few samples, with their graph.

    Raises:
        `ValueError`: If they do not follow. The message names the parameter and its module.
    """
    switching = switching_modules(model)

    def projected() -> torch.Tensor:
        derive_anew(switching)
        logits = run()
        return logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)

    def change_and_prediction(p: nn.Parameter, gradient: torch.Tensor, share: float) -> list[float]:
        """Move a parameter by a share of its norm. Returns the change of the projected logits and its prediction, sorted."""
        direction = gradient if gradient.norm() else torch.ones_like(p)
        size = share * max(float(p.detach().norm()), 0.1 * p.numel() ** 0.5) / float(direction.norm())
        for module in switching:
            module.train()  # takes weights that were merged into others out of them, before they move
        with perturbed([p], [direction], size, maximize=True), torch.no_grad():
            change = float((projected() - base).sum())
            for module in switching:
                module.train()
        return sorted((abs(change), size * abs(float((gradient * direction).sum()))))

    def gradient_in_training(name: str, p: nn.Parameter) -> float:
        """Compute the norm of a gradient with training mode in the module of the parameter and in those around it only."""
        path = name.split(".")[:-1]
        around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
        derive_anew(switching)
        for module in around:
            module.training = not isinstance(module, BATCH_OR_INSTANCE_NORM)
        with torch.enable_grad():
            (gradient,) = _gradients(run().sum(), [p])
        model.eval()
        return float(gradient.norm())

    with torch.enable_grad():
        gradients = _gradients(projected().sum(), parameters)
    with torch.no_grad():  # as below: something may be kept in this mode only
        base = projected()
    noise = 1e-5 * float(base.norm())
    visible = 1e-6 * max(float(gradient.norm()) for gradient in gradients)
    for p, gradient in zip(parameters, gradients, strict=True):
        # Some parameters, such as a token of zeros before a LayerNorm, follow their gradient for tiny steps only.
        moves = (change_and_prediction(p, gradient, share) for share in (1e-2, 1e-4, 1e-6))
        less, more = next(moves)
        name = next(name for name, q in model.named_parameters() if q is p)
        if more == 0:
            stale = gradient_in_training(name, p) > visible
        else:
            stale = more > noise and less < 0.1 * more and all(less < 0.1 * more for less, more in moves)
        if stale:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"In evaluation mode, the logits do not follow the parameter {name!r} of {owner} as their gradient says{_KEPT}"
            )


def _gradients(value: torch.Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[torch.Tensor]:
    if not value.requires_grad:  # derived from the weights without a graph, all of it
        return [torch.zeros_like(p) for p in parameters]
    return torch.autograd.grad(value, parameters, materialize_grads=True)


def may_keep_derived_state(model: nn.Module, state: dict[int, int]) -> bool:
    """
    Tell whether a module has a `train` method of its own, holds a tensor beside the state or has written to the state, or has
    trainable parameters together with a buffer that may be derived from them.
    """
    for module in model.modules():
        held = _tensors([value for name, value in vars(module).items() if name not in _NO_STATE])
        buffers = not isinstance(module, BATCH_OR_INSTANCE_NORM) and any(
            b.is_floating_point() for b in module.buffers(recurse=False)
        )
        if (buffers and any(p.requires_grad for p in module.parameters(recurse=False))) or any(
            state.get(id(tensor)) != tensor._version for tensor in held
        ):
            return True
    return bool(switching_modules(model))


def _tensors(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict | list | tuple | set):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry, depth - 1)
