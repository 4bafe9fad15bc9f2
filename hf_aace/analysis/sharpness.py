# SPDX-License-Identifier: Apache-2.0
"""
Measures of sharpness: the rise of a classifier's loss around its weights, its Hessian, its gradients and margins, each over
a whole dataset. The weights move only inside [`perturbed`], so they end bit for bit as they were.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from scipy.stats import sem
from torch import nn

from ..losses import aace_loss, count_labels
from ..tensor_checks import check_at_least, check_positive
from .empirical_risk import Batches, EmpiricalRisk, measuring, samples_in_groups


class Estimate(NamedTuple):
    """A mean over random draws, and its standard error."""

    value: float
    standard_error: float


def losses_and_gradient_norms(model: nn.Module, batches: Batches) -> dict[str, float]:
    """
    Compute the mean losses of a classifier on a dataset, and the norms of their gradients.

    Since AACE is cross-entropy plus the mean margin `d` of [`aace_loss`], its gradient stays where that of cross-entropy
    vanishes.

    Args:
        model (`nn.Module`):
            A classifier that returns logits of shape `(batch, classes)`, as a tensor, as `outputs.logits` or as
            `outputs[0]`. It is evaluated in `eval()` mode: no dropout, BatchNorm by its running statistics. The gradients
            are those of the parameters that require one. After training in mixed precision, load the model anew: accelerate
            leaves the `forward` of the trainer's model in 16 bits, which are too few for small differences.
        batches (iterable of mappings):
            The dataset in batches with `labels`, the same ones each time: a list, or a `DataLoader` that neither shuffles nor
            augments. Labels of -100 do not count. Everything else in a batch goes to the model.

    Returns:
        `dict[str, float]`: `cross_entropy` and `aace` in nats, `cross_entropy_grad_norm` and `aace_grad_norm` in nats per
        unit of weight, and `accuracy`.

    Raises:
        `ValueError`: If there are no samples, labels or float32 parameters, or the loss is not finite.
    """
    with measuring(model, batches) as risk:
        cross_entropy, gradient = risk.loss_and_gradient()
        aace, aace_gradient = risk.loss_and_gradient(loss=aace_loss)
        scores = risk.margins()
        return {
            "cross_entropy": cross_entropy,
            "accuracy": float((scores > 0).mean()),
            "cross_entropy_grad_norm": float(gradient.norm()),
            "aace": aace,
            "aace_grad_norm": float(aace_gradient.norm()),
        }


def margins(model: nn.Module, batches: Batches) -> np.ndarray:
    """
    Compute the margin of each sample: the logit of its true class less the greatest of the others. Positive means right.

    Args:
        model (`nn.Module`): The classifier, as for [`losses_and_gradient_norms`].
        batches (iterable of mappings): The dataset, as there, with class indices as labels.

    Returns:
        `np.ndarray` of shape `(samples,)`: The margins, in logits, in the order of the samples that count.

    Raises:
        `ValueError`: As [`losses_and_gradient_norms`]; also if the labels are probabilities.
    """
    with measuring(model, batches) as risk:
        return risk.margins()


def sam_sharpness(
    model: nn.Module,
    batches: Batches,
    rho: float,
    *,
    adaptive: bool = False,
    m: int | None = None,
    steps: int = 20,
    seed: int = 0,
) -> float:
    """
    Compute SAM's sharpness: how far the mean cross-entropy can rise within a ball around the weights `w`,
    `max over norm(e) <= rho of L(w + e) - L(w)`, found by projected gradient ascent.

    The ascent starts with SAM's single step, `rho * g / norm(g)`, and goes on in steps of the ball's radius, projected back
    onto it; a step that does not raise the loss is undone and halved. The result is therefore a lower bound, never below the
    rise by the single step.

    Args:
        model (`nn.Module`): The classifier, as for [`losses_and_gradient_norms`].
        batches (iterable of mappings): The dataset, as there.
        rho (`float`): Radius of the ball, in units of weight, `> 0`.
        adaptive (`bool`, *optional*, defaults to `False`):
            ASAM's ball ([arXiv 2102.11600](https://huggingface.co/papers/2102.11600)), `norm(e / abs(w)) <= rho`: it does
            not change when a layer is scaled up and the next one down.
        m (`int`, *optional*):
            m-sharpness: each batch is cut into groups of `m` samples (the last may be smaller), each group has its own worst
            case, and the result is the mean over the samples. By default the whole dataset has a single worst case.
        steps (`int`, *optional*, defaults to `20`): Number of gradients. 1 is SAM's single step.
        seed (`int`, *optional*, defaults to `0`): Draws the first direction where the gradient is exactly zero.

    Returns:
        `float`: The rise, in nats, `>= 0`.

    Raises:
        `ValueError`: As [`losses_and_gradient_norms`]; also if an argument is out of range.
    """
    check_at_least(1, steps=steps, m=1 if m is None else m)
    check_positive(rho=rho)
    with measuring(model, batches) as risk:
        scale = risk.ball_scale(adaptive)
        if m is None:
            return _climb(risk, batches, rho, scale, steps, seed)
        risk.loss()  # its checks
        total = count = 0
        for batch in batches:
            for group in samples_in_groups(batch, m):
                size = int(count_labels(group["labels"]))
                if size:
                    total += size * _climb(risk, [group], rho, scale, steps, seed)
                    count += size
        return total / count


def average_sharpness(
    model: nn.Module, batches: Batches, rho: float, *, directions: int = 20, seed: int = 0
) -> Estimate:
    """
    Compute the mean rise of the cross-entropy over random directions of one length: the mean of `L(w + e) - L(w)` with `e`
    uniform on the sphere of radius `rho`. Each direction is taken both ways, which cancels the slope. For a small radius it is
    `rho**2 / 2` times the trace of the Hessian, divided by the number of weights.

    Args:
        model (`nn.Module`): The classifier, as for [`losses_and_gradient_norms`].
        batches (iterable of mappings): The dataset, as there.
        rho (`float`):
            Radius of the sphere, in units of weight, `> 0`. It must be far greater than that of the worst case for a visible
            rise: each of `n` weights moves by about `rho / sqrt(n)`.
        directions (`int`, *optional*, defaults to `20`): Number of directions, at least 2.
        seed (`int`, *optional*, defaults to `0`): Draws the directions, the same ones on every device.

    Returns:
        [`Estimate`]: The mean rise and its standard error, in nats.

    Raises:
        `ValueError`: As [`losses_and_gradient_norms`]; also if an argument is out of range.
    """
    check_positive(rho=rho)
    check_at_least(2, directions=directions)  # or there is no standard error
    generator = torch.Generator().manual_seed(seed)
    with measuring(model, batches) as risk:
        base = risk.loss()
        rises = []
        for _ in range(directions):
            direction = risk.random_vector(generator)
            direction *= rho / direction.norm()
            both = 0.0
            for sign in (1, -1):
                with risk.moved(sign * direction):
                    both += risk.loss() / 2
            rises.append(both - base)
        return _estimate(rises)


def hessian_eigenvalues(
    model: nn.Module, batches: Batches, count: int = 1, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """
    Compute the greatest eigenvalues of the Hessian of the mean cross-entropy, and their eigenvectors, by Lanczos iteration
    (`scipy.sparse.linalg.eigsh`), to a relative accuracy of 1e-4. The Hessian is never stored: each product with it costs two
    backward passes over the dataset.

    Args:
        model (`nn.Module`):
            The classifier, as for [`losses_and_gradient_norms`]. Its layers need second derivatives: torch's own attention
            is run by a kernel that has them; the Flash Attention of another package has none.
        batches (iterable of mappings): The dataset, as there.
        count (`int`, *optional*, defaults to `1`): Number of eigenvalues.
        seed (`int`, *optional*, defaults to `0`): Draws the vector that it starts from.

    Returns:
        `tuple[np.ndarray, np.ndarray]` of shapes `(count,)` and `(count, parameters)`: The eigenvalues, in nats per squared
        unit of weight, the greatest first; and eigenvectors of length 1 over the trainable parameters, one after the other, with
        the sign that makes the entry of greatest size positive. The iteration keeps about 20 such vectors in memory, in 64 bits.

    Raises:
        `ValueError`: As [`losses_and_gradient_norms`]; also if `count` is not below the number of parameters, or the iteration
            does not converge.
    """
    with measuring(model, batches) as risk:
        if not 1 <= count < risk.size:
            raise ValueError(
                f"`count` must lie between 1 and {risk.size - 1}, one less than the number of parameters, got {count}."
            )
        start = np.random.default_rng(seed).standard_normal(risk.size)
        operator = LinearOperator((risk.size,) * 2, matvec=risk.hessian_product, dtype=np.float64)
        try:
            values, vectors = eigsh(operator, k=count, which="LA", v0=start, tol=1e-4)
        except ArpackNoConvergence as error:
            raise ValueError(
                f"The Lanczos iteration found only {len(error.eigenvalues)} of `count={count}` eigenvalues of the Hessian to "
                "a relative accuracy of 1e-4. Ask for fewer."
            ) from error
    values, vectors = values[::-1].copy(), vectors.T[::-1].copy()
    largest = np.abs(vectors).argmax(axis=1, keepdims=True)
    return values, vectors * np.sign(np.take_along_axis(vectors, largest, axis=1))


def hessian_trace(model: nn.Module, batches: Batches, *, products: int = 30, seed: int = 0) -> Estimate:
    """
    Estimate the trace of the Hessian of the mean cross-entropy, the sum of its eigenvalues, by Hutch++ (Meyer et al.,
    [arXiv 2010.09649](https://huggingface.co/papers/2010.09649)): exact on a subspace that holds most of it, and an average over
    random vectors on the rest.

    Args:
        model (`nn.Module`): The classifier, as for [`hessian_eigenvalues`].
        batches (iterable of mappings): The dataset, as there.
        products (`int`, *optional*, defaults to `30`):
            Number of products with the Hessian, at least 6: a third for the subspace, a third for the trace on it, a third for
            the rest. A third as many vectors of the parameters' length are kept in memory, in 64 bits.
        seed (`int`, *optional*, defaults to `0`): Draws the vectors.

    Returns:
        [`Estimate`]: The trace, in nats per squared unit of weight, and its standard error.

    Raises:
        `ValueError`: As [`losses_and_gradient_norms`]; also if `products` is too small.
    """
    check_at_least(6, products=products)
    third = products // 3
    generator = np.random.default_rng(seed)
    with measuring(model, batches) as risk:

        def signs() -> np.ndarray:
            return generator.choice([-1.0, 1.0], size=risk.size)

        basis = np.empty((risk.size, third), order="F")
        for index in range(third):
            basis[:, index] = risk.hessian_product(signs())
        # Not by `numpy.linalg`, which makes two more copies.
        basis, _ = scipy.linalg.qr(basis, mode="economic", overwrite_a=True, check_finite=False)
        exact = sum(float(column @ risk.hessian_product(column)) for column in basis.T)
        samples = []
        for _ in range(third):
            vector = signs()
            vector -= basis @ (basis.T @ vector)
            samples.append(exact + float(vector @ risk.hessian_product(vector)))
    return _estimate(samples)


def measure_sharpness(
    model: nn.Module,
    batches: Batches,
    *,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    average_rho: float = 1.0,
    m: int | None = 16,
    steps: int = 20,
    directions: int = 20,
    eigenvalues: int = 5,
    products: int = 30,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Take all measures of this module.

    Args:
        model (`nn.Module`): The classifier, as for [`hessian_eigenvalues`].
        batches (iterable of mappings): The dataset, as for [`losses_and_gradient_norms`], with class indices as labels.
        rho (`float`, *optional*, defaults to `0.05`): Radius for [`sam_sharpness`], also of groups.
        adaptive_rho (`float`, *optional*, defaults to `0.5`): Radius for its adaptive variant.
        average_rho (`float`, *optional*, defaults to `1.0`): Radius for [`average_sharpness`].
        m (`int`, *optional*, defaults to `16`): Size of the groups for m-sharpness. `None` leaves it out.
        steps (`int`, *optional*, defaults to `20`): Gradients for each worst case.
        directions (`int`, *optional*, defaults to `20`): Directions for [`average_sharpness`].
        eigenvalues (`int`, *optional*, defaults to `5`): Number of Hessian eigenvalues. 0 leaves out the trace too.
        products (`int`, *optional*, defaults to `30`): Products for [`hessian_trace`].
        seed (`int`, *optional*, defaults to `0`): Draws directions and starting vectors.

    Returns:
        `dict[str, Any]`: What [`losses_and_gradient_norms`] returns, `sam_sharpness`, `adaptive_worst_case_rise`,
        `m_sharpness`, `average_sharpness`, `hessian_eigenvalues` (a list), `top_eigenvalue` (the first of them), `hessian_trace`,
        `margins` (a list), and for the average and the trace also their `_standard_error`. All of it can be written as JSON.

    Raises:
        `ValueError`: As the functions that it calls.
    """
    measures: dict[str, Any] = losses_and_gradient_norms(model, batches)
    ascent = {"steps": steps, "seed": seed}
    measures["sam_sharpness"] = sam_sharpness(model, batches, rho, **ascent)
    measures["adaptive_worst_case_rise"] = sam_sharpness(model, batches, adaptive_rho, adaptive=True, **ascent)
    if m is not None:
        measures["m_sharpness"] = sam_sharpness(model, batches, rho, m=m, **ascent)
    average = average_sharpness(model, batches, average_rho, directions=directions, seed=seed)
    measures["average_sharpness"], measures["average_sharpness_standard_error"] = average
    if eigenvalues > 0:
        values, _ = hessian_eigenvalues(model, batches, eigenvalues, seed=seed)
        measures["hessian_eigenvalues"], measures["top_eigenvalue"] = values.tolist(), float(values[0])
        trace = hessian_trace(model, batches, products=products, seed=seed)
        measures["hessian_trace"], measures["hessian_trace_standard_error"] = trace
    measures["margins"] = margins(model, batches).tolist()
    return measures


def _climb(
    risk: EmpiricalRisk, batches: Batches, rho: float, scale: torch.Tensor | float, steps: int, seed: int
) -> float:
    """Raise the loss by projected gradient ascent in the ball, whose points are `scale * offset`. Returns the rise."""
    base, gradient = risk.loss_and_gradient(batches)
    best, offset, length = base, torch.zeros_like(gradient), rho
    gradient = scale * gradient
    if not gradient.any():  # a flat spot, or saturated: any direction is as good
        gradient = risk.random_vector(torch.Generator().manual_seed(seed))
    for _ in range(steps):
        candidate = offset + gradient * (length / gradient.norm())
        candidate *= rho / max(rho, float(candidate.norm()))
        with risk.moved(scale * candidate):
            loss, slope = risk.loss_and_gradient(batches)
        if loss > best:
            best, offset, gradient = loss, candidate, scale * slope
            if not gradient.any():
                break
        else:
            length /= 2
    return best - base


def _estimate(samples: list[float]) -> Estimate:
    return Estimate(float(np.mean(samples)), float(sem(samples)))
