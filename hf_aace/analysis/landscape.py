# SPDX-License-Identifier: Apache-2.0
"""
The loss of a classifier around its weights, on a grid: along the line to another model, or on a plane. Grids take hundreds of
passes over the data, so they can be kept in files.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import nn

from ..perturbation import perturbed
from ..tensor_checks import check_at_least, check_positive
from .empirical_risk import Batches, EmpiricalRisk, measuring
from .sharpness import hessian_eigenvalues


class LossPath(NamedTuple):
    """
    The loss along the line between two models.

    Args:
        position (`np.ndarray` of shape `(points,)`): 0 at the first model, 1 at the second.
        loss (`np.ndarray` of shape `(points,)`): The mean cross-entropy there, in nats.
    """

    position: np.ndarray
    loss: np.ndarray


class LossSurface(NamedTuple):
    """
    The loss on a plane through the weights of a model.

    Args:
        x (`np.ndarray` of shape `(points,)`): Coordinates along the first direction, 0 at the model.
        y (`np.ndarray` of shape `(points,)`): Coordinates along the second.
        loss (`np.ndarray` of shape `(points, points)`): The mean cross-entropy, in nats; `loss[i, j]` is that at `x[j]`, `y[i]`.
    """

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray


def loss_path(
    model: nn.Module,
    other: nn.Module,
    batches: Batches,
    *,
    start: float = -0.5,
    stop: float = 1.5,
    points: int = 41,
    cache_dir: str | os.PathLike | None = None,
) -> LossPath:
    """
    Compute the mean cross-entropy along the straight line from one model to another of the same architecture. Buffers, such as
    the running statistics of BatchNorm, are interpolated too, so that the ends are the two models; beyond the ends they stay, as
    a variance must not become negative.

    Args:
        model (`nn.Module`): The classifier at 0, as for [`~hf_aace.analysis.sharpness.losses_and_gradient_norms`]. It moves, and is
            afterwards as it was.
        other (`nn.Module`): The classifier at 1.
        batches (iterable of mappings): The dataset, as there.
        start (`float`, *optional*, defaults to `-0.5`): Position of the first point.
        stop (`float`, *optional*, defaults to `1.5`): Position of the last point.
        points (`int`, *optional*, defaults to `41`): Number of points, at least 2.
        cache_dir (`str` or `os.PathLike`, *optional*):
            A folder for the result, as a `.npz` file. It is read from there if it was computed from the same models, data and
            settings, bit for bit.

    Returns:
        [`LossPath`]: The line.

    Raises:
        `ValueError`: If the models differ in names or shapes, an argument is out of range, or the loss is not finite.
    """
    check_at_least(2, points=points)
    shapes, others = ({key: value.shape for key, value in m.state_dict().items()} for m in (model, other))
    different = sorted(key for key in shapes.keys() | others.keys() if shapes.get(key) != others.get(key))
    if different:
        raise ValueError(
            f"Models of a line must have the same architecture. These differ in {', '.join(different[:3])}."
        )
    if _ties(model) != _ties(other):
        raise ValueError("Models of a line must have the same architecture. These tie different weights.")

    def compute() -> LossPath:
        position = np.linspace(start, stop, points)
        # By name: models of one architecture may hold their layers in another order.
        parameters, ends = list(model.parameters()), dict(other.named_parameters(remove_duplicate=False))
        steps = [ends[name].detach().to(p.device) - p.detach() for name, p in model.named_parameters()]
        others = dict(other.named_buffers(remove_duplicate=False))
        buffers = [
            (b, b.detach().clone(), others[name].detach().to(b.device))
            for name, b in model.named_buffers()
            if b.is_floating_point()
        ]
        losses = []
        with measuring(model, batches) as risk:
            for t in position.tolist():
                for buffer, first, second in buffers:
                    buffer.copy_(torch.lerp(first, second, min(max(t, 0.0), 1.0)))
                with perturbed(parameters, steps, abs(t), maximize=t > 0):
                    losses.append(risk.loss())
        return LossPath(position, np.array(losses))

    settings = {"start": start, "stop": stop, "points": points, "buffers": "beyond the ends as at them"}
    return _cached(LossPath, cache_dir, settings, [model, other], batches, compute)


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Return the groups of names that each stand for one parameter."""
    groups = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return {frozenset(names) for names in groups.values()}


def loss_surface(
    model: nn.Module,
    batches: Batches,
    *,
    directions: str = "random",
    radius: float = 1.0,
    points: int = 21,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> LossSurface:
    """
    Compute the mean cross-entropy on a square around the weights of a model, in the plane of two directions.

    Args:
        model (`nn.Module`): The classifier, as for [`~hf_aace.analysis.sharpness.losses_and_gradient_norms`]. It moves, and is
            afterwards as it was.
        batches (iterable of mappings): The dataset, as there.
        directions (`str`, *optional*, defaults to `"random"`):
            `"random"`: normally distributed, each filter scaled to the norm of the model's (Li et al. 2018,
            [arXiv 1712.09913](https://huggingface.co/papers/1712.09913)), without vectors such as biases. A coordinate of 1 is then
            a step as long as the weights, so that models can be compared. With the same `seed` the draws are the same for each
            model. `"eigenvectors"`: those of the two greatest eigenvalues of the Hessian; coordinates are lengths in weight space.
        radius (`float`, *optional*, defaults to `1.0`): Half the side of the square, `> 0`.
        points (`int`, *optional*, defaults to `21`): Number of points on a side, at least 2. The dataset is read `points**2` times.
        seed (`int`, *optional*, defaults to `0`): Draws the directions, or the start of the search for eigenvectors.
        cache_dir (`str` or `os.PathLike`, *optional*): A folder for the result, as for [`loss_path`].

    Returns:
        [`LossSurface`]: The plane.

    Raises:
        `ValueError`: If an argument is out of range, or the loss is not finite.
    """
    check_at_least(2, points=points)
    if directions not in ("random", "eigenvectors"):
        raise ValueError(f"`directions` must be 'random' or 'eigenvectors', got {directions!r}.")
    check_positive(radius=radius)

    def compute() -> LossSurface:
        if directions == "eigenvectors":
            _, vectors = hessian_eigenvalues(model, batches, 2, seed=seed)
        coordinates = np.linspace(-radius, radius, points)
        losses = np.empty((points, points))
        with measuring(model, batches) as risk:
            if directions == "eigenvectors":
                first, second = torch.as_tensor(vectors).to(risk.device, risk.dtype)
            else:
                generator = torch.Generator().manual_seed(seed)
                first, second = (_filter_normalized(risk, generator) for _ in range(2))
            for i, y in enumerate(coordinates.tolist()):
                for j, x in enumerate(coordinates.tolist()):
                    with risk.moved(x * first + y * second):
                        losses[i, j] = risk.loss()
        return LossSurface(coordinates, coordinates.copy(), losses)

    settings = {"directions": directions, "radius": radius, "points": points, "seed": seed}
    return _cached(LossSurface, cache_dir, settings, [model], batches, compute)


def _filter_normalized(risk: EmpiricalRisk, generator: torch.Generator) -> torch.Tensor:
    """Draw a random direction, each filter as long as that of the model."""
    drawn = risk.parts(risk.random_vector(generator))
    for direction, p in zip(drawn, risk.parameters, strict=True):
        if p.dim() < 2:
            direction.zero_()
        else:
            norms = [t.detach().reshape(len(t), -1).norm(dim=1) for t in (p, direction)]
            direction *= (norms[0] / norms[1]).view(-1, *[1] * (p.dim() - 1))
    return risk.flat(drawn)


def _cached(
    kind: type, cache_dir: str | os.PathLike | None, settings: dict, models: list, batches: Batches, compute: Callable
) -> Any:
    """Return what `compute` returns, from a file if there is one. Its name is a hash of all that the grid depends on."""
    if cache_dir is None:
        return compute()
    hasher = Hasher()
    for part in (settings, *[(dict(m.state_dict()), [p.requires_grad for p in m.parameters()]) for m in models]):
        hasher.update(part)
    with measuring(models[0], batches):  # reading the batches may draw random numbers, which it gives back
        for batch in batches:
            hasher.update(dict(batch))
    path = Path(cache_dir) / f"{kind.__name__.removeprefix('Loss').lower()}-{hasher.hexdigest()}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return kind(**arrays)
    result = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **result._asdict())
    os.replace(partial, path)  # a file of that name is whole
    return result
