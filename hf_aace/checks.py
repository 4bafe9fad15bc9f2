# SPDX-License-Identifier: Apache-2.0
"""Checks of trainers and batches: each refuses what cannot be trained, before any weight moves, and names the fix."""

import inspect
import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import unwrap_peft_model
from transformers.training_args import OptimizerNames, ParallelMode
from transformers.utils import logging

from ._compat import BATCH_NORM, BATCH_OR_INSTANCE_NORM
from .config import AACEArguments
from .tensor_checks import check_label_values, check_precision


logger = logging.get_logger(__name__)

_WITHOUT_SHARDING = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_INSTEAD = (
    "Use DDP (the default of `torchrun` and `accelerate launch --multi_gpu`), FSDP2 (`fsdp_version: 2` in the configuration "
    "of accelerate), or plain training (`rho=0`)."
)


def check_trainer(trainer: Trainer, args: AACEArguments, parameters: list[nn.Parameter]) -> None:
    """
    Refuse a trainer whose processes, devices, optimizer or model cannot train with these settings, or whose parameters to
    perturb are not float32 or float64.
    """
    _check_processes(trainer)
    if trainer.accelerator.is_fsdp2 and not args.sync_ascent and trainer.is_world_process_zero():
        logger.warning_once(
            "`sync_ascent=False` is taken as True with FSDP2: the shards of each weight live on many processes, which "
            "can only perturb it together."
        )
    optimizer = OptimizerNames(trainer.args.optim).value
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise ValueError(
            f"`optim={optimizer!r}` updates the weights inside the backward pass, while they are perturbed, so that "
            "the update would be lost. Use an optimizer that steps after it, such as `adamw_torch`."
        )
    if trainer.args.fp16 and trainer.args.device.type == "cpu":
        logger.warning_once(
            "`fp16=True` has no effect on a CPU: Transformers trains in 32 bits there. Use `bf16=True`."
        )
    _warn_of_lost_statistics(trainer)
    config = getattr(trainer.model, "config", None)  # any `nn.Module` may be trained
    problem_type, num_labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    if problem_type in ("regression", "multi_label_classification") or num_labels == 1:
        raise ValueError(
            "Sharpness-aware training needs a single-label classifier with at least 2 classes, got a model with "
            f"`problem_type={problem_type!r}` and `num_labels={num_labels}`. Use plain training (`rho=0`), or a model "
            "with one score for each class."
        )
    check_precision(parameters)


def _warn_of_lost_statistics(trainer: Trainer) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if unwrap_peft_model(model) is model:
        return
    lost = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BATCH_OR_INSTANCE_NORM) and module.track_running_stats
        # neither peft's trained copy, which is saved, nor the original, which no longer runs
        if "modules_to_save" not in name and "original_module" not in name
    ]
    if lost:
        logger.warning_once(
            f"Training changes the running statistics of {len(lost)} layers such as {lost[0]!r}, which no checkpoint of the adapters "
            "holds: a resumed run and the adapters have other ones. Name these layers in `modules_to_save` of the configuration "
            "of peft."
        )


def warn_of_rare_statistics(trainer: Trainer, args: AACEArguments, steps: int) -> None:
    """
    Warn if `steps` optimizer steps, the whole training, are too few for BatchNorm. With `ascent_every` it updates its running
    statistics on steps with an ascent pass only; more than a tenth of their values would remain as they were before.
    """
    if args.rho == 0 or args.ascent_every == 1 or args.perturb_every > 1:  # plain steps update the statistics, too
        return
    layers = [m for m in trainer.model.modules() if isinstance(m, BATCH_NORM) and m.running_mean is not None]
    momenta = [layer.momentum for layer in layers if layer.momentum is not None and 0 < layer.momentum < 1]
    passes, batches = math.ceil(steps / args.ascent_every), trainer.args.gradient_accumulation_steps
    if momenta and (rest := (1 - min(momenta)) ** (passes * batches)) > 0.1 and trainer.is_world_process_zero():
        most = int(steps * batches * math.log(1 - min(momenta)) / math.log(0.1))
        logger.warning(
            f"`ascent_every` is {args.ascent_every}, so that BatchNorm updates its running statistics on {passes} of {steps} steps "
            f"only. Unless it is frozen, {rest:.0%} of them would still be those from before the training, and evaluations may be "
            f"wrong. {f'Take at most `ascent_every={most}`, or train' if most > 0 else 'Train'} for longer."
        )


def _check_processes(trainer: Trainer) -> None:
    """Refuse all but one device for each process, DDP and FSDP2."""
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


def check_mixin_order(cls: type, mixin: type) -> None:
    """Refuse, by a `TypeError`, a subclass with the mixin behind the Trainer class among its bases: it would train plainly."""
    order = cls.__mro__
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        raise TypeError(
            f"{cls.__name__} would train plainly: put {mixin.__name__} before the Trainer class among its bases."
        )


def check_parameters(trainable: Mapping[str, nn.Parameter], chosen: list[nn.Parameter], pattern: str | None) -> None:
    """Refuse a model without trainable parameters, and a `perturb_modules` (`pattern`) that chooses none of them."""
    if not trainable:
        raise ValueError(
            "The model has no parameter that requires a gradient, so there is nothing to train. To evaluate it only, "
            "set `rho=0`."
        )
    if not chosen:
        meaning = (
            "means the normalization layers" if pattern == "norm" else "is a regular expression, searched in the names"
        )
        raise ValueError(
            f"`perturb_modules={pattern!r}` matches none of the {len(trainable)} trainable parameters, such as "
            f"{list(trainable)[:3]}. It {meaning}; leave it out to perturb them all."
        )


def warn_of_unusual_norm_parameters(names: list[str]) -> None:
    """Warn, once, of the parameters of normalization layers with these names, which `perturb_modules="norm"` does not take."""
    if names:
        ends = sorted({".".join(name.split(".")[-2:]) for name in names})
        logger.warning_once(
            f'`perturb_modules="norm"` takes `weight` and `bias` of one dimension, which leaves out {len(names)} parameters of '
            f"normalization layers, such as {names[:3]}. To perturb them too, choose all by a regular expression over the names: "
            f'`perturb_modules="norm|{"|".join(ends[:8])}"`, if the names of the others hold `norm`.'
        )


def uses_reentrant_checkpointing(loss: torch.Tensor) -> bool:
    """
    Tell whether a loss was computed with reentrant activation checkpointing: `autograd.grad` then takes no gradients of what is
    inside, often without an error, while `backward()` does.
    """
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def check_static_graph(trainer: Trainer) -> None:
    """Refuse an ascent by `backward()` if DDP has a static graph: it would count the ascent pass."""
    if trainer.args.ddp_static_graph:
        raise ValueError(
            "`ddp_static_graph` does not go with sharpness-aware training of layers that run a backward pass of their own, such as those of "
            "reentrant activation checkpointing: DDP would count the ascent pass too. Leave it out, or set "
            '`activation_checkpointing_kwargs={"use_reentrant": False}`.'
        )


def check_window(inputs: Any, window: list[Any]) -> None:
    """
    Refuse a batch that is not itself one of the micro-batches that the ascent over the whole accumulated batch takes: the two
    passes would see different batches.
    """
    if not any(inputs is batch for batch in window):
        raise ValueError(
            '`ascent_scope="full_batch"` takes its ascent from the batches as `get_batch_samples` returned them, but '
            "`training_step` got another: change batches in the `get_batch_samples` of a class behind "
            'SharpnessAwareMixin, or in the data collator, or set `ascent_scope="micro_batch"`.'
        )


def check_batch(inputs: Any, label_name: str) -> None:
    """Refuse a batch that is not a dictionary with a tensor of labels under `label_name`."""
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"Sharpness-aware training needs batches that are dictionaries, got a {type(inputs).__name__}. Let the "
            f"`data_collator` return one, with the labels under `{label_name}`."
        )
    if not isinstance(inputs.get(label_name), torch.Tensor):
        others = sorted(key for key in inputs if key != label_name)
        raise ValueError(
            f"Sharpness-aware training needs the labels of each batch under `{label_name}`, got a batch with only {others}. "
            "Add them to the dataset, or set `label_names` of the training arguments."
        )


def check_inputs_of_model(
    trainer: Trainer, accepted: Mapping[str, inspect.Parameter], kept: Set[str], batch: Set[str]
) -> None:
    """
    Refuse a batch that lacks an argument that the model's `forward` needs, or holds none that it takes. `accepted` are the
    parameters of `forward`, `kept` the keys that the model is given, `batch` all keys.
    """
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: argument for name, argument in accepted.items() if argument.kind not in variable}
    missing = sorted(
        name for name, argument in named.items() if argument.default is argument.empty and name not in kept
    )
    # Its images may be among the other keywords that it takes, unless it says how they are called.
    takes_others = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in accepted.values())
    images_are_named = not takes_others or getattr(bare_model(trainer), "main_input_name", None) in named
    if named and not missing and images_are_named and not kept & named.keys():
        missing = [main_input_name(trainer)]
    if missing:
        raise ValueError(
            f"`forward` of {type(trainer.model).__name__} needs {missing}, got a batch with {sorted(batch)}. Name the "
            f"columns alike, or override `ascent_outputs` of {type(trainer).__name__} to call the model."
        )


def check_part(logits: torch.Tensor, used: int, batch: int) -> None:
    """Refuse logits of all `batch` samples where `ascent_fraction` takes `used` of them."""
    if used < batch and logits.dim() > 0 and len(logits) == batch:
        raise ValueError(
            f"`ascent_fraction` takes {used} of the {batch} samples of a batch, but the model returned {batch}: its inputs do not have the "
            "samples in their first dimension. Set `ascent_fraction=1`, or override `ascent_outputs` to cut them."
        )


def warn_of_other_width(trainer: Trainer, classes: int) -> None:
    """
    Warn if what was taken for logits has `classes` columns, but the configuration of the model another number of classes, other
    than its default of 2.
    """
    num_labels = getattr(getattr(bare_model(trainer), "config", None), "num_labels", classes)
    if num_labels not in (classes, 2) and trainer.is_world_process_zero():  # 2 is the default of a configuration
        logger.warning(
            f"The ascent takes a tensor of {classes} columns for the logits, but the configuration of the model has `num_labels={num_labels}`. If "
            f"its outputs hold the logits elsewhere, override `ascent_logits` of {type(trainer).__name__}; if its head has been replaced, set "
            "`num_labels`."
        )


def check_labels(trainer: Trainer, labels: torch.Tensor, classes: int) -> None:
    """
    Refuse labels that are no classes of the model, and soft labels that its own loss would take for multi-label targets. This
    reads them, which waits for the device.
    """
    check_label_values(labels, classes)
    own_loss = trainer.compute_loss_func is not None or type(trainer).compute_loss is not Trainer.compute_loss
    if labels.is_floating_point() and isinstance(bare_model(trainer), PreTrainedModel) and not own_loss:
        raise ValueError(
            f"The labels are floating-point, of shape {tuple(labels.shape)}, which the model itself takes for "
            "multi-label targets. For soft labels (mixup, cutmix) pass a `compute_loss_func` that computes their "
            "cross-entropy."
        )


def bare_model(trainer: Trainer) -> nn.Module:
    """Return the model of a trainer without the wrappers of accelerate, `torch.compile` and peft."""
    return unwrap_peft_model(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))


def main_input_name(trainer: Trainer) -> str:
    """Return the name of the argument of `forward` that gets the images: the model's `main_input_name`, or its first argument."""
    model = bare_model(trainer)
    return getattr(model, "main_input_name", None) or next(iter(inspect.signature(model.forward).parameters), "")
