# SPDX-License-Identifier: Apache-2.0
"""The ascent in several processes: run it outside DDP, average its gradients, put back the shards of FSDP2."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.utils import is_compiled_module
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def outside_ddp(model: nn.Module) -> Iterator[nn.Module]:
    """
    Give, by this context manager, the model to call for a pass whose gradients DDP neither averages nor waits for: the one
    inside `DistributedDataParallel`, or `model` itself.
    """
    if isinstance(model, DistributedDataParallel):
        yield model.module
    elif is_compiled_module(model) and isinstance(model._orig_mod, DistributedDataParallel):
        with model.no_sync():  # what is inside is not compiled by itself
            yield model
    else:
        yield model


def average_gradients(gradients: list[torch.Tensor | None], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """
    Average gradients over all processes, by a single collective. A gradient that one process lacks counts as zero there; the
    parameters are the same on all processes, and all on one device.
    """
    flat = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g).reshape(-1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([p.numel() for p in parameters])
    return [part.view_as(p).to(p.dtype) for part, p in zip(parts, parameters, strict=True)]


def reshard(model: nn.Module) -> None:
    """
    Make the modules of FSDP2 forget the weights that they have gathered, so that their parameters are the shards. A pass
    without gradients leaves some gathered, as does an exception. Nothing else is touched.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
