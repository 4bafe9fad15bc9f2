# SPDX-License-Identifier: Apache-2.0
"""A step reads nothing from the device and copies nothing to it, and keeps no memory once it is over."""

from contextlib import nullcontext

import pytest
import torch
from comparison import VARIANTS
from tiny import (
    alive,
    batch,
    convnext,
    digits,
    logged,
    step_through,
    trainer_for_single_steps,
    training_arguments,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from hf_aace import AACEConfig, AACETrainer


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python, each of which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default) or (
            function is torch.ops.aten.nonzero.default
        ):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_host_synchronization_per_step(variant, scope, tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1, ascent_scope=scope, **VARIANTS[variant])
    window = [batch(), batch(start=16)]
    step_through(trainer, window)  # the first step reads the labels once, to check them
    with HostReads() as reads:
        for _ in range(3):
            step_through(trainer, window)
    assert reads.names == []
    with HostReads() as reads:  # the counter does count
        float(torch.ones(()))
    assert len(reads.names) == 1


class DeviceCrossings(TorchDispatchMode):
    """Counts the operations that tensors of several devices take part in: the host waits for those copied to a GPU, too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, outputs)) if isinstance(t, torch.Tensor)}
        if len(devices) > 1:
            self.names.append(str(function))
        return outputs


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_stays_on_its_device(variant, scope, tmp_path, monkeypatch):
    """On the meta device, which stands here for a GPU: it holds no values, so reading one is an error, too."""
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1, ascent_scope=scope, **VARIANTS[variant])
    window = [batch(), batch(start=16)]
    step_through(trainer, window)  # the first step reads the labels once, to check them
    logged(trainer)  # what was added up on the CPU
    trainer.model.zero_grad()
    trainer.model.to("meta")
    window = [{key: value.to("meta") for key, value in inputs.items()} for inputs in window]
    monkeypatch.setattr(trainer, "_prepare_inputs", dict)  # instead of moving them to the CPU
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda *args, **kwargs: nullcontext()
    )  # there is no generator for it
    with DeviceCrossings() as crossings:
        for _ in range(2):
            step_through(trainer, window)
    assert crossings.names == []
    assert all(p.grad is not None and p.grad.is_meta for p in trainer.model.parameters())
    with DeviceCrossings() as crossings:  # the counter does count
        window[0]["pixel_values"] * torch.ones(())
        torch.ones(2).to("meta")
    assert len(crossings.names) == 2


def test_a_perturbation_that_was_made_holds_no_copies(tmp_path):
    """The optimizer comes next, which takes memory itself."""
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1)
    shape = trainer.model.classifier.weight.shape
    before = alive(*shape)
    with trainer.perturbed_weights(trainer.model, batch()) as perturbation:
        assert alive(*shape) == before + 1, "the backup, and no gradient any more"
    assert perturbation.norm > 0 and alive(*shape) == before


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("stop", [False, True], ids=["to the end", "stopped within an accumulation"])
def test_no_more_is_kept_than_by_plain_training(stop, scope, tmp_path):
    """Neither in the optimizer step nor, for as long as the trainer lives, after the training."""

    def kept(rho):
        counts, before = [], alive(16, 1, 8, 8)

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                counts.append(alive(*model.classifier.weight.shape))

            def on_substep_end(self, args, state, control, **kwargs):
                control.should_training_stop = stop and state.global_step == 1

        arguments = training_arguments(
            AACEConfig, tmp_path, max_steps=2, gradient_accumulation_steps=2, ascent_scope=scope, rho=rho
        )
        trainer = AACETrainer(convnext(), arguments, train_dataset=digits(64), callbacks=[Look()])
        trainer.train()
        assert alive(16, 1, 8, 8) == before, "no batch"
        return [*counts, alive(*trainer.model.classifier.weight.shape)]

    assert kept(0.1) == kept(0)
