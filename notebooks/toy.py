# SPDX-License-Identifier: Apache-2.0
"""
The smallest classifier that has sharp and flat minima: two weights, on which what an ascent step does can be watched.

A linear network with one hidden unit, whose logit is `a * b * x`, tells two overlapping classes of numbers `x` apart. Any weights
with the right product are a minimum, so the minima are a curve, and the top eigenvalue of the Hessian on it is proportional to
`a**2 + b**2`: sharp where one weight is large and the other small, flattest where they are equal. What can be seen:

- Plain gradient descent stays at the sharp minimum next to where it starts.
- SAM's step has the same length everywhere, so it never comes to rest, and walks along the curve towards the flat minimum.
- The same step by cross-entropy's own gradient, not normalised, vanishes at the minimum: it stops early.
- The gradient of AACE grows instead. The weights come to rest where the *perturbed* weights are a minimum, which is beyond the
  curve: where the model is more confident, the curvature is less, and the loss a little more than at the minimum.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import nn

from hf_aace import aace_loss, perturbed
from hf_aace.analysis.plots import _COLUMN, _PAPER, _decorate_for_paper, _legend_above, _save, _styles


METHODS = ("plain", "sam", "sam_not_normalized", "aace")


class ToyRun(NamedTuple):
    """
    What training on the toy passed through.

    Args:
        weights (`np.ndarray` of shape `(steps + 1, 2)`): The weights `(a, b)` before each step, and at the end.
        perturbed (`np.ndarray` of shape `(steps, 2)`): The weights that the gradient of each step was taken at.
        loss (`np.ndarray` of shape `(steps,)`): The cross-entropy at the weights before each step, in nats.
        ascent_grad_norm (`np.ndarray` of shape `(steps,)`): The norm of the ascent loss's gradient there; 0 for plain training.
        sharpness (`np.ndarray` of shape `(steps + 1,)`): The greatest eigenvalue of the Hessian at `weights`.
    """

    weights: np.ndarray
    perturbed: np.ndarray
    loss: np.ndarray
    ascent_grad_norm: np.ndarray
    sharpness: np.ndarray


class TwoWeights(nn.Module):
    """
    The network: logits `(0, a * b * x)`.

    Args:
        a (`float`): The weight of the hidden unit.
        b (`float`): The weight of the output.
    """

    def __init__(self, a: float, b: float):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(samples,)`): The numbers.

        Returns:
            `torch.Tensor` of shape `(samples, 2)`: The logits.
        """
        scores = self.weights.prod() * x
        return torch.stack((torch.zeros_like(scores), scores), dim=1)


def toy_data(samples: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Numbers of two classes that overlap: evenly spaced quantiles of normal distributions around -1 and +1.

    Args:
        samples (`int`, *optional*, defaults to `50`): Number in each class.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The numbers and their classes, both of shape `(2 * samples,)`.
    """
    levels = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(levels)
    return torch.cat((quantiles - 1, quantiles + 1)), torch.arange(2).repeat_interleave(samples)


def train_toy(
    method: str,
    *,
    rho: float = 0.2,
    start: tuple[float, float] = (3.2, -0.2),
    learning_rate: float = 0.3,
    steps: int = 400,
) -> ToyRun:
    """
    Trains [`TwoWeights`] on [`toy_data`] by gradient descent over all samples, with the library's own ascent step. Takes less than
    a second.

    Args:
        method (`str`):
            `"plain"`, `"sam"`, `"sam_not_normalized"` (cross-entropy's gradient as it is) or `"aace"`.
        rho (`float`, *optional*, defaults to `0.2`): Size of the ascent step.
        start (`tuple[float, float]`, *optional*, defaults to `(3.2, -0.2)`): The weights to start from.
        learning_rate (`float`, *optional*, defaults to `0.3`): Size of the descent step.
        steps (`int`, *optional*, defaults to `400`): How many.

    Returns:
        [`ToyRun`]: What it passed through.

    Raises:
        `ValueError`: If the method is unknown or `rho` out of range.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}.")
    x, labels = toy_data()
    model = TwoWeights(*start)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    ascent_loss = aace_loss if method == "aace" else F.cross_entropy
    weights, moved, losses, norms = [_now(model)], [], [], []
    for _ in range(steps):
        gradients = torch.autograd.grad(ascent_loss(model(x), labels), list(model.parameters()))
        losses.append(F.cross_entropy(model(x), labels).item())
        with perturbed(
            model.parameters(),
            gradients,
            0.0 if method == "plain" else rho,
            normalize=method == "sam",
            maximize=method != "aace",
        ) as perturbation:
            moved.append(_now(model))
            F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(_now(model))
        norms.append(0.0 if method == "plain" else perturbation.grad_norm.item())
    weights = np.array(weights)
    return ToyRun(weights, np.array(moved), np.array(losses), np.array(norms), _top_eigenvalues(weights))


def toy_loss(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """
    The cross-entropy of the toy, for a picture.

    Args:
        a (`np.ndarray`): First weights.
        b (`np.ndarray`): Second weights, of the same shape.

    Returns:
        `np.ndarray` of that shape: The losses, in nats.
    """
    x, labels = toy_data()
    margins = np.multiply.outer(a * b, (x * (2 * labels - 1)).numpy())
    return np.logaddexp(0, -margins).mean(axis=-1)


def toy_minimum() -> float:
    """The product `a * b` at which the loss of the toy is least."""
    products = np.linspace(0, 5, 50001)
    return float(products[toy_loss(products, np.ones_like(products)).argmin()])


def _now(model: TwoWeights) -> list[float]:
    return model.weights.tolist()


def _top_eigenvalues(weights: np.ndarray) -> np.ndarray:
    """The greatest eigenvalue of the Hessian `L'' * [[b*b, a*b], [a*b, a*a]] + L' * [[0, 1], [1, 0]]`, with `L` of `a * b`."""
    x, labels = toy_data()
    signed = (x * (2 * labels - 1)).numpy()
    a, b = weights.T
    wrong = 1 / (1 + np.exp(np.multiply.outer(a * b, signed)))
    slope, curvature = -(wrong * signed).mean(axis=1), (wrong * (1 - wrong) * signed**2).mean(axis=1)
    mixed = curvature * a * b + slope
    return curvature * (a**2 + b**2) / 2 + np.sqrt((curvature * (a**2 - b**2) / 2) ** 2 + mixed**2)


def plot_toy(runs: Mapping[str, ToyRun], paths: Iterable[str | os.PathLike], *, width: float = 2 * _COLUMN) -> None:
    """
    Draws how methods trained the toy: their way over its loss, and what became of the ascent gradient and the sharpness.

    Args:
        runs (`Mapping[str, ToyRun]`): By the name of each method, what [`~toy.train_toy`] returned.
        paths (iterable of `str` or `os.PathLike`): The files to write; their suffixes give the formats.
        width (`float`, *optional*, defaults to `6.8`): Width of the figure in inches.
    """
    ways = np.concatenate([run.weights for run in runs.values()])
    low, high = np.minimum(ways.min(axis=0), 0) - 0.3, np.maximum(ways.max(axis=0), 3) + 0.3
    a, b = np.meshgrid(np.linspace(low[0], high[0], 150), np.linspace(low[1], high[1], 150))
    loss = toy_loss(a, b)
    lowest = np.linspace(0.5, high[0], 200)
    with rc_context(_PAPER):
        figure = Figure(figsize=(width, 0.47 * width), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
        axes = left.add_subplot()
        drawn = axes.contourf(a, b, np.log10(loss), 14, cmap="cividis")
        bar = left.colorbar(drawn, ax=axes, aspect=30)
        bar.locator = MaxNLocator(5)
        bar.formatter = FuncFormatter(lambda value, _: f"{10**value:.2g}")
        bar.update_ticks()
        bar.set_label("cross-entropy (nats)")
        product = toy_minimum()
        axes.plot(lowest, product / lowest, color="white", linewidth=0.8, linestyle="--")
        axes.plot([low[0], high[0]], [low[0], high[0]], color="white", linewidth=0.4, linestyle=":")
        panels = right.subplots(2, 1, sharex=True)
        for run, (colour, dashes, marker) in zip(runs.values(), _styles(runs), strict=True):
            style = {
                "color": colour,
                "linestyle": dashes,
                "marker": marker,
                "markeredgecolor": "white",
                "markeredgewidth": 0.4,
            }
            axes.plot(*run.weights.T, **style, markevery=[0, -1], markersize=6)
            # The last ascent step: where the gradient of the descent is taken.
            axes.plot(
                *np.array([run.weights[-2], run.perturbed[-1]]).T,
                color=colour,
                linewidth=0.6,
                marker="x",
                markevery=[1],
                markersize=6,
                markeredgewidth=1.2,
                markeredgecolor="white",
                zorder=3,  # not hidden by the end of another way
            )
            every = max(1, len(run.weights) // 8)
            if run.ascent_grad_norm.any():
                panels[0].plot(run.ascent_grad_norm, **style, markevery=every)
            panels[1].plot(run.sharpness, **style, markevery=every)
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
        _decorate_for_paper(axes, "", "weight a", "weight b")
        axes.grid(False)
        _decorate_for_paper(panels[0], "Ascent gradient norm", "", "nats / weight")
        _decorate_for_paper(panels[1], "Top Hessian eigenvalue", "step", r"nats / weight$^2$")
        panels[1].set_ylim(0, 1.5 * max(run.sharpness[len(run.sharpness) // 10 :].max() for run in runs.values()))
        _legend_above(figure, runs)
        _save(figure, paths)
