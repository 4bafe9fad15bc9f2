# SPDX-License-Identifier: Apache-2.0
"""The perturbation: moves weights along a gradient and restores them exactly. Needs parameters and gradients only, no Trainer."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.utils import get_total_norm
from torch.profiler import record_function

from .tensor_checks import check_perturbation


# Prefix of the profiler labels of the perturbation; `hf-aace benchmark` adds up their times.
PROFILED = "perturbation: "

# Keeps the step of a zero gradient zero instead of 0/0; far below any gradient norm that matters.
_EPSILON = 1e-12


class perturbed:
    r"""
    Move weights along a gradient inside this context manager. Afterwards they are, bit for bit, what they were before,
    whatever happened inside. It is the ascent step of sharpness-aware training:

    | `normalize` | `adaptive` | step                               |
    |-------------|------------|------------------------------------|
    | `False`     | `False`    | `rho * g` (AACE)                   |
    | `True`      | `False`    | `rho * g / norm(g)` (SAM)          |
    | `False`     | `True`     | `rho * w**2 * g`                   |
    | `True`      | `True`     | `rho * w**2 * g / norm(abs(w) * g)` (ASAM) |

    The step is subtracted, so that the loss with gradient `g` falls, unless `maximize=True`. A gradient that is not finite
    gives no step, without an error. Nothing waits for the device.

    Some models keep in evaluation mode what they derive from their weights (LeViT its attention biases, for example), and so
    do not see the move. Use them in training mode, or call `model.train()` and `model.eval()` inside, and again after it.

    Args:
        parameters (iterable of `torch.Tensor`):
            The weights to move, in place: their storage stays where it is. Float32 or float64. If they are sharded
            over processes (`DTensor`, as FSDP2 makes them), each process moves its own shards, by norms that are those
            of the whole.
        gradients (sequence of `torch.Tensor` or `None`):
            The gradient for each of them, `None` for a parameter that the loss does not depend on. Not modified.
        rho (`float`):
            Size of the step, `>= 0`: a step size, or with `normalize` a length.
        normalize (`bool`, *optional*, defaults to `False`):
            Divide the step by the norm of the gradient over all parameters.
        adaptive (`bool`, *optional*, defaults to `False`):
            Scale the step by the squared weights, element by element (ASAM,
            [arXiv 2102.11600](https://huggingface.co/papers/2102.11600)).
        maximize (`bool`, *optional*, defaults to `False`):
            Add the step instead of subtracting it: for SAM, whose gradient is that of the training loss itself.
        grad_scale (`torch.Tensor`, *optional*):
            The factor, a scalar, by which `gradients` are too large (the loss scale of fp16).

    Attributes:
        grad_norm (`torch.Tensor`): Norm of the gradient, a scalar on the device.
        norm (`torch.Tensor`): Norm of the step, a scalar on the device; 0 if it is skipped.
        skipped (`torch.Tensor`): 1 if the gradient was not finite and no step was made, else 0; a scalar on the device.
        direction (`list[torch.Tensor]`): The direction of the step up to a positive factor and the sign, as this process holds
            it. Empty after the weights have moved; clone what is to last longer.

    Raises:
        `ValueError`: If `rho` is negative or not finite, the lengths differ, there is no gradient at all, or a
            parameter with a gradient is neither float32 nor float64, so that rounding would swallow the step.
        `RuntimeError`: If it is entered a second time.

    Example:

    ```python
    >>> import torch
    >>> from hf_aace import aace_loss, perturbed

    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> inputs, labels = torch.randn(8, 4), torch.randint(3, (8,))

    >>> parameters = list(model.parameters())
    >>> gradients = torch.autograd.grad(aace_loss(model(inputs), labels), parameters)
    >>> with perturbed(parameters, gradients, rho=0.1):
    ...     torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()
    ```
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        rho: float,
        *,
        normalize: bool = False,
        adaptive: bool = False,
        maximize: bool = False,
        grad_scale: torch.Tensor | None = None,
    ):
        parameters = list(parameters)
        check_perturbation(parameters, gradients, rho)
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        self._backup, self._maximize = [], maximize
        with torch.no_grad():
            first = pairs[0][0]
            self._sharding = (first.device_mesh, first.placements) if isinstance(first, DTensor) else None
            self._parameters = [_shard(p) for p, _ in pairs]
            # Dense, as the weights that move: of an embedding with `sparse=True` they are sparse.
            dense = [g if g.layout == torch.strided else g.to_dense() for _, g in pairs]
            self._measure([_shard(g) for g in dense], rho, normalize, adaptive, grad_scale)

    @record_function(PROFILED + "norm")
    def _measure(self, gradients: list, rho: float, normalize: bool, adaptive: bool, grad_scale: torch.Tensor | None):
        """Set the direction of the step, its factor, and the norms."""
        scale = 1.0 if grad_scale is None else 1.0 / grad_scale
        self.grad_norm = length = direction_norm = self._norm(gradients) * scale
        if adaptive:
            weighted = torch._foreach_mul(self._parameters, gradients)
            length = self._norm(weighted) * scale
            gradients = torch._foreach_mul(self._parameters, weighted)
            direction_norm = self._norm(gradients) * scale
        factor = rho / (length + _EPSILON) if normalize else torch.full_like(length, rho)
        self._finite = torch.isfinite(factor * direction_norm)
        self.norm = torch.where(self._finite, factor * direction_norm, 0.0)
        self.skipped = (~self._finite).float()
        self.direction, self._factor = gradients, factor * scale

    def cosine(self, direction: list[torch.Tensor]) -> torch.Tensor:
        """
        Compute the cosine of the angle between this step, before it is made, and an earlier one. Waits for no device.

        Args:
            direction (`list[torch.Tensor]`): The `direction` of the earlier one, over the same parameters.

        Returns:
            `torch.Tensor`: The cosine, a scalar on the device. NaN if one of the two is zero or not finite.
        """
        product = sum(torch.sum(a * b) for a, b in zip(self.direction, direction, strict=True))
        return self._sum_over_shards(product) / (self._norm(self.direction) * self._norm(direction))

    def _norm(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The norm over all tensors, and over the processes that hold their shards."""
        norm = get_total_norm(tensors)
        return norm if self._sharding is None else self._sum_over_shards(norm.square()).sqrt()

    def _sum_over_shards(self, value: torch.Tensor) -> torch.Tensor:
        if self._sharding is None:
            return value
        mesh, placements = self._sharding
        # It adds up over the shards, not over copies of them (HSDP).
        summed = [Partial() if placement.is_shard() else Replicate() for placement in placements]
        return DTensor.from_local(value, mesh, summed, run_check=False).full_tensor()

    @record_function(PROFILED + "step")
    def __enter__(self) -> "perturbed":
        if not self.direction:
            raise RuntimeError("This perturbation was used up: make another one to perturb again.")
        with torch.no_grad():
            self._backup = [p.detach().clone() for p in self._parameters]
            try:
                _step_(self._parameters, self.direction, self._factor, self._finite, self._maximize)
                self.direction = []  # as large as the weights: free it before the descent
                torch.clear_autocast_cache()  # or an autocast region around both passes goes on with the old weights
            except BaseException:
                self._restore()
                raise
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    @record_function(PROFILED + "restore")
    def _restore(self) -> None:
        with torch.no_grad():
            try:
                torch._foreach_copy_(self._parameters, self._backup)
            except BaseException:  # a Ctrl-C in the middle of it, for example: the copy must be whole
                torch._foreach_copy_(self._parameters, self._backup)
                raise
            finally:
                torch.clear_autocast_cache()
        self._backup = []


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds: all of it, or its shard (which shares the memory of the `DTensor`)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _step_(parameters: list, gradients: list, factor: torch.Tensor, finite: torch.Tensor, maximize: bool) -> None:
    """`parameters -= factor * gradients` (`+=` if `maximize`) in place, or nothing where `finite` is false."""
    groups = defaultdict(lambda: ([], []))
    for p, g in zip(parameters, gradients, strict=True):
        if p.device.type in ("cpu", "cuda") and p.is_contiguous() and p.dtype == torch.float32:
            groups[p.device][0].append(p)
            groups[p.device][1].append(g.contiguous())
        else:  # the fused kernel takes 32-bit factors and walks memory linearly; other devices may lack it
            step = torch.where(finite.to(p.device), factor.to(p.device) * g, 0.0)
            p.add_(step) if maximize else p.sub_(step)
    # The kernel of SGD(fused=True): one pass over memory, left out by the device itself if the gradient is bad.
    plain = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False}
    for device, (group, group_gradients) in groups.items():
        skip, lr = (~finite).to(device, torch.float32), factor.to(device, torch.float32)
        torch._fused_sgd_(
            group, group_gradients, [], lr=lr, maximize=maximize, grad_scale=None, found_inf=skip, **plain
        )
