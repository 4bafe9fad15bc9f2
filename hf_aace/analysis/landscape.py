# SPDX-License-Identifier: Apache-2.0
"""
The loss of a classifier around its weights, on a grid: along the line to another model, or on a plane. Grids are kept in files,
as they take hundreds of passes over the data.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..perturbation import perturbed
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
    Computes the mean cross-entropy along the straight line from one model to another of the same architecture. What BatchNorm
    keeps is interpolated too, so that the ends are the two models.

    Args:
        model (`nn.Module`): The classifier at 0, as for [`~hf_aace.analysis.sharpness.losses_and_gradient_norms`]. It moves, and is
            afterwards as it was.
        other (`nn.Module`): The one at 1.
        batches (iterable of mappings): The data set, as there.
        start (`float`, *optional*, defaults to `-0.5`): Where the line begins.
        stop (`float`, *optional*, defaults to `1.5`): Where it ends.
        points (`int`, *optional*, defaults to `41`): Number of points on it, at least 2.
        cache_dir (`str` or `os.PathLike`, *optional*):
            A folder for the result, as a `.npz` file. It is read from there if models, data and settings are bit for bit those
            that it was computed from.

    Returns:
        [`LossPath`]: The line.

    Raises:
        `ValueError`: If the models differ in names or shapes, an argument is out of range, or the loss is not finite.
    """
    _check_points(points)
    tensors, others = model.state_dict(), other.state_dict()
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in others.items()}:
        different = sorted(
            k
            for k in tensors.keys() | others.keys()
            if k not in tensors or k not in others or tensors[k].shape != others[k].shape
        )
        raise ValueError(
            f"There is a line between models of the same architecture only; these two differ in: {', '.join(different[:3])}."
        )

    def compute() -> LossPath:
        position = np.linspace(start, stop, points)
        parameters = list(model.parameters())
        steps = [(q.detach().to(p.device) - p.detach()) for p, q in zip(parameters, other.parameters(), strict=True)]
        buffers = [
            (b, b.detach().clone(), c.detach().to(b.device))
            for b, c in zip(model.buffers(), other.buffers(), strict=True)
            if b.is_floating_point()
        ]
        losses = []
        with measuring(model, batches) as objective:
            for t in position.tolist():
                for buffer, first, second in buffers:
                    buffer.copy_(torch.lerp(first, second, t))
                with perturbed(parameters, steps, abs(t), maximize=t > 0):
                    losses.append(objective.loss())
        return LossPath(position, np.array(losses))

    settings = {"start": start, "stop": stop, "points": points}
    return _cached(LossPath, compute, cache_dir, "path", settings, [model, other], batches)


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
    Computes the mean cross-entropy on a square around the weights of a model, in the plane of two directions.

    Args:
        model (`nn.Module`): The classifier, as for [`~hf_aace.analysis.sharpness.losses_and_gradient_norms`]. It moves, and is
            afterwards as it was.
        batches (iterable of mappings): The data set, as there.
        directions (`str`, *optional*, defaults to `"random"`):
            `"random"`: normally distributed, each filter scaled to the norm of the model's (Li et al. 2018,
            [arXiv 1712.09913](https://huggingface.co/papers/1712.09913)), vectors such as biases left out. A coordinate of 1 is then
            a step as long as the weights, so that models can be compared. With the same `seed` the draws are the same for each
            model. `"eigenvectors"`: those of the two greatest eigenvalues of the Hessian; coordinates are lengths in weight space.
        radius (`float`, *optional*, defaults to `1.0`): Half the side of the square, `> 0`.
        points (`int`, *optional*, defaults to `21`): Number of points on a side, at least 2. The data set is read `points**2` times.
        seed (`int`, *optional*, defaults to `0`): Draws the directions, or the start of the search for eigenvectors.
        cache_dir (`str` or `os.PathLike`, *optional*): A folder for the result, as for [`loss_path`].

    Returns:
        [`LossSurface`]: The plane.

    Raises:
        `ValueError`: If an argument is out of range, or the loss is not finite.
    """
    _check_points(points)
    if directions not in ("random", "eigenvectors"):
        raise ValueError(f"`directions` must be 'random' or 'eigenvectors', got {directions!r}.")
    if not 0 < radius < float("inf"):
        raise ValueError(f"`radius` must be a finite number > 0, got {radius}.")

    def compute() -> LossSurface:
        if directions == "eigenvectors":
            _, vectors = hessian_eigenvalues(model, batches, 2, seed=seed)
        coordinates = np.linspace(-radius, radius, points)
        losses = np.empty((points, points))
        with measuring(model, batches) as objective:
            if directions == "eigenvectors":
                first, second = torch.as_tensor(vectors).to(objective.device, objective.dtype)
            else:
                generator = torch.Generator().manual_seed(seed)
                first, second = (_filter_normalized(objective, generator) for _ in range(2))
            for i, y in enumerate(coordinates.tolist()):
                for j, x in enumerate(coordinates.tolist()):
                    with objective.moved(x * first + y * second):
                        losses[i, j] = objective.loss()
        return LossSurface(coordinates, coordinates.copy(), losses)

    settings = {"directions": directions, "radius": radius, "points": points, "seed": seed}
    return _cached(LossSurface, compute, cache_dir, "surface", settings, [model], batches)


def _filter_normalized(objective: EmpiricalRisk, generator: torch.Generator) -> torch.Tensor:
    drawn = objective.parts(objective.random_vector(generator))
    for direction, p in zip(drawn, objective.parameters, strict=True):
        if p.dim() < 2:
            direction.zero_()
        else:
            norms = [t.detach().reshape(len(t), -1).norm(dim=1) for t in (p, direction)]
            direction *= (norms[0] / norms[1]).view(-1, *[1] * (p.dim() - 1))
    return objective.flat(drawn)


def _cached(
    kind: type,
    compute: Callable[[], Any],
    cache_dir: str | os.PathLike | None,
    name: str,
    settings: dict[str, Any],
    models: list[nn.Module],
    batches: Batches,
) -> Any:
    """What `compute` returns, from a file if it was computed from the same before. The name of the file says from what."""
    if cache_dir is None:
        return compute()
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for model in models:
        _update(digest, model.state_dict().items())
        digest.update(str([p.requires_grad for p in model.parameters()]).encode())
    with measuring(models[0], batches):  # it keeps the random numbers that reading the batches may draw
        for batch in batches:
            _update(digest, batch.items())
    path = Path(cache_dir) / f"{name}-{digest.hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return kind(**arrays)
    result = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **result._asdict())
    os.replace(partial, path)  # a file of that name is whole
    return result


def _update(digest: Any, items: Iterable[tuple[str, Any]]) -> None:
    for key, value in items:
        digest.update(key.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())


def _check_points(points: int) -> None:
    if points < 2:
        raise ValueError(f"`points` must be at least 2, got {points}.")
