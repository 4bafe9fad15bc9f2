# SPDX-License-Identifier: Apache-2.0
"""What several processes ask of the ascent pass: DDP kept out of it, gradients averaged, shards put back, the rest refused."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, is_compiled_module
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.training_args import ParallelMode


_WITHOUT_SHARDING = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_INSTEAD = (
    "Use DDP (the default of `torchrun` and `accelerate launch --multi_gpu`), FSDP2 (`fsdp_version: 2` in the configuration "
    "of accelerate), or plain training (`rho=0`)."
)


def check_distributed(trainer: Trainer) -> None:
    """
    Checks that the ascent pass is right on the processes and devices that a trainer uses.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.

    Raises:
        `ValueError`: If it is not: with anything but one device for each process, DDP and FSDP2.
    """
    accelerator = trainer.accelerator
    # `n_gpu` may be changed by hand after construction, `parallel_mode` follows it.
    if trainer.args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        raise ValueError(
            f"torch.nn.DataParallel over {trainer.args.n_gpu} GPUs does not go with sharpness-aware training. Start one "
            "process for each (`torchrun --nproc_per_node`), or show the process one GPU: `CUDA_VISIBLE_DEVICES=0`."
        )
    if trainer.args.parallel_mode not in (ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED):
        raise ValueError(f"Sharpness-aware training does not go with {trainer.args.parallel_mode}. {_INSTEAD}")
    if trainer.is_deepspeed_enabled or accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "Sharpness-aware training does not go with DeepSpeed, whose backward pass updates the weights: the ascent "
            f"pass would train. {_INSTEAD}"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError(
                "Sharpness-aware training does not go with FSDP1, which is deprecated. Use FSDP2: `fsdp_version: 2` in the "
                'configuration of accelerate, or `fsdp_config={"version": 2}` in the training arguments.'
            )
    elif accelerator.distributed_type not in _WITHOUT_SHARDING:
        raise ValueError(f"Sharpness-aware training is untested with {accelerator.distributed_type}. {_INSTEAD}")
    elif any(isinstance(p, DTensor) for p in trainer.model.parameters()):
        raise ValueError(
            "The model was loaded as shards (`tp_plan`, `distributed_config` or `device_mesh`), which sharpness-aware "
            f"training does not go with. Load it whole. {_INSTEAD}"
        )
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"Sharpness-aware training does not go with tensor, context or sequence parallelism. {_INSTEAD}"
        )


@contextmanager
def outside_ddp(model: nn.Module) -> Iterator[nn.Module]:
    """
    Context manager that gives the model to call for a pass whose gradients DDP must neither average nor await.

    Args:
        model (`nn.Module`): The model as prepared by accelerate.

    Returns:
        `nn.Module`: The model inside `DistributedDataParallel`, or `model` itself.
    """
    if isinstance(model, DistributedDataParallel):
        yield model.module
    elif is_compiled_module(model) and isinstance(model._orig_mod, DistributedDataParallel):
        with model.no_sync():  # what is inside is not compiled by itself
            yield model
    else:
        yield model


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, as a new one; with a single process, the tensor."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, as a new one; with a single process, the tensor."""
    return sum_over_processes(tensor) / (dist.get_world_size() if dist.is_initialized() else 1)


def average_gradients(
    gradients: list[torch.Tensor | None], parameters: list[nn.Parameter]
) -> list[torch.Tensor | None]:
    """
    The means over all processes, by a single collective. A gradient that one process lacks counts as zero there.

    Args:
        gradients (`list[torch.Tensor | None]`): The gradients of this process.
        parameters (`list[nn.Parameter]`): Their parameters, the same on all processes and all on one device.

    Returns:
        `list[torch.Tensor | None]`: The averaged gradients; with a single process, `gradients`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return gradients
    flat = torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, gradients, strict=True)]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([p.numel() for p in parameters])
    return [part.view_as(p).to(p.dtype) for part, p in zip(parts, parameters, strict=True)]


def reshard(model: nn.Module) -> None:
    """
    Makes the modules of FSDP2 forget the weights that they have gathered, so that their parameters are the shards. A pass
    without gradients leaves some gathered, as does an exception. Nothing else is touched.

    Args:
        model (`nn.Module`): The model as prepared by accelerate.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
