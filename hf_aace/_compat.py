# SPDX-License-Identifier: Apache-2.0
"""
Work-arounds for defects of other libraries, each with the condition for its removal; and all that hf_aace uses of other libraries
though they promise nothing about it, for want of a public name. If one goes, the tests fail or the run stops; then:

- `_fused_sgd_` (torch; perturbation.py): let `_step_` take its other branch for all parameters.
- `_foreach_copy_`, `_foreach_mul` (torch; perturbation.py, isolation.py): loop over the tensors. It is only slower.
- `_version` (torch; analysis/derived_state.py): compare values with a copy.
- `_parameters`, `_buffers`, `_modules` (torch; isolation.py, analysis/derived_state.py): the names of the attributes that hold a module's state.
- `_orig_mod` (torch; distributed.py, parameters.py): what a compiled module holds, and what compilation puts into names.
- `_checkpoint_wrapped_module` (torch; parameters.py): what FSDP2's activation checkpointing puts into names.
- `_prepare_inputs` (transformers; ascent.py, vision/augmentation.py): move the batch by `accelerate.utils.send_to_device`.
- `_prepare_for_training`, `_load_from_checkpoint`, `_load_best_model` (transformers; here): see at each which defect it serves.
- `core_model_loading.revert_weight_conversion` (transformers; here): load by `from_pretrained`, as the other branch does.
- `CheckpointFunctionBackward` (torch; checks.py): take the gradients of every ascent by `backward()`, as reentrant checkpointing needs it.
- `_get_help_string` (argparse; cli/output.py): give each option its help with the default.

These are public by name, in modules without documentation: `transformers.modelcard`, `transformers.hf_argparser`,
`transformers.trainer_utils.unwrap_peft_model`, `accelerate.commands.launch`, `torch.distributed.elastic.multiprocessing.api`,
`datasets.data_files`, `datasets.packaged_modules`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TimmWrapperConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


# The base classes of these have no public names.
_LAZY_BATCH_NORM = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *_LAZY_BATCH_NORM)
BATCH_OR_INSTANCE_NORM = (*BATCH_NORM, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class TrainerWorkarounds:
    """Overrides of methods of [`~transformers.Trainer`] that serve work-arounds only."""

    # For FSDP2, accelerate 1.15 shards what `get_input_embeddings()` returns by itself. Some image classifiers have none and
    # raise (ConvNeXt, ResNet); in others it lies in a module that is sharded already (ViT, with the default wrapping): plain
    # Trainer fails on both. Remove when the oldest supported accelerate passes tests/test_distributed.py without.
    def _prepare_for_training(self, *args, **kwargs):
        with _without_input_embeddings(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    # Trainer of transformers 5 loads the weights of a checkpoint by their names in the file. For models whose names in the file
    # are not those in memory (ViT, DeiT, BEiT, DINOv2, I-JEPA, SegFormer, Swin, ViT-MSN) it so keeps old weights, silently, on
    # `resume_from_checkpoint` and `load_best_model_at_end`: huggingface/transformers#43701, #48805. Remove the two methods, and
    # what only they use, when the oldest supported transformers has the fix (PR #48822).
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled and _needs_conversion(self.model, resume_from_checkpoint):
            _load_converted_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled and _needs_conversion(self.model, self.state.best_model_checkpoint):
            _load_converted_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


# A timm configuration that was read with class names of its own writes these again, whatever the classes are now
# (findings/transformers_timm_keeps_old_class_names.sh). Remove when the oldest supported transformers does not.
def forget_old_class_names(config: PreTrainedConfig) -> None:
    """Let the configuration of a timm model be saved with the names of its present classes."""
    if isinstance(config, TimmWrapperConfig):
        vars(config).pop("label_names", None)


def _needs_conversion(model: nn.Module, checkpoint: str | None) -> bool:
    """Tell if a checkpoint holds weights under other names than the model's."""
    if checkpoint is None or not isinstance(_inside_compiled(model), PreTrainedModel):
        return False
    names = [name for path in _weight_files(checkpoint) for name in _names(path)]
    return not set(names) <= set(model.state_dict())


def _load_converted_weights(model: nn.Module, checkpoint: str) -> None:
    """
    Load the weights of a checkpoint in place, converted as `from_pretrained` converts them.

    Raises:
        `RuntimeError`: If the checkpoint does not hold all the weights of the model.
    """
    inner, own = _inside_compiled(model), model.state_dict()
    own_names = {id(tensor): name for name, tensor in own.items()}
    as_saved = revert_weight_conversion(inner, dict(own))
    if all(id(tensor) in own_names for tensor in as_saved.values()):  # renamed only, as for every image classifier
        files = [load_file(path) for path in _weight_files(checkpoint)]
        loaded = {
            own_names[id(as_saved[name])]: tensor
            for file in files
            for name, tensor in file.items()
            if name in as_saved
        }
    else:
        copy, report = type(inner).from_pretrained(
            checkpoint, config=inner.config, dtype=inner.dtype, output_loading_info=True
        )
        loaded = {name: t for name, t in copy.state_dict().items() if name not in report["missing_keys"]}
    # Of weights that are one tensor, a checkpoint holds one.
    held = {own[name].data_ptr() for name in loaded}
    if missing := sorted(name for name, tensor in own.items() if tensor.data_ptr() not in held):
        raise RuntimeError(
            f"The checkpoint {checkpoint} lacks weights of {type(inner).__name__}: {missing}. Resume from another one."
        )
    model.load_state_dict(loaded, strict=False)


def _inside_compiled(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _weight_files(checkpoint: str) -> list[Path]:
    """List the files of a checkpoint that hold its weights, if they are safetensors."""
    weights, index = (Path(checkpoint, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if weights.is_file():
        return [weights]
    if not index.is_file():
        return []
    return [
        weights.with_name(name)
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    ]


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


@contextmanager
def _without_input_embeddings(model: nn.Module) -> Iterator[None]:
    """Make a model that takes images say that it has no input embeddings, inside this context manager."""
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "pixel_values":
        yield
        return
    model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings
