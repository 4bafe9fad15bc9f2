# SPDX-License-Identifier: Apache-2.0
"""
Exact restore: whatever fails, at whatever stage of a training step, the weights are afterwards bit for bit what
they were, the gradients accumulated so far are still there, and the next step is the one that would have been taken.
"""

import pytest
import torch
from tiny import batch, convnext, hand_out, identical, logged, resnet, trainer_for_single_steps, weights

from hf_aace import AACETrainer


ERRORS = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]


def fail_once(error, function, *, at_call=1, after=False):
    """`function`, but its `at_call`-th call raises, before or after doing its work; later calls are as ever."""
    calls = 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != at_call:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        raise error("injected")

    return failing


def half_done(function):
    """An in-place foreach operation that stops in the middle of its list of tensors."""

    def half(tensors, others, *args, **kwargs):
        middle = len(tensors) // 2
        function(tensors[:middle], others[:middle], *args, **kwargs)

    return half


def inject(stage, error, trainer, monkeypatch):
    model = trainer.model
    if stage == "ascent forward":
        monkeypatch.setattr(model, "forward", fail_once(error, model.forward))
    elif stage == "ascent forward, at its end":
        monkeypatch.setattr(model, "forward", fail_once(error, model.forward, after=True))
    elif stage == "ascent backward":
        monkeypatch.setattr(torch.autograd, "grad", fail_once(error, torch.autograd.grad))
    elif stage == "ascent backward, at its end":
        monkeypatch.setattr(torch.autograd, "grad", fail_once(error, torch.autograd.grad, after=True))
    elif stage == "scaling":
        monkeypatch.setattr(torch.linalg, "vector_norm", fail_once(error, torch.linalg.vector_norm))
    elif stage == "copying":
        monkeypatch.setattr(torch.Tensor, "clone", fail_once(error, torch.Tensor.clone, at_call=3))
    elif stage == "applying, half done":
        real = torch._fused_sgd_
        half = fail_once(error, half_done(real), after=True)
        monkeypatch.setattr(torch, "_fused_sgd_", half)
    elif stage == "applying, at its end":
        monkeypatch.setattr(torch, "_fused_sgd_", fail_once(error, torch._fused_sgd_, after=True))
    elif stage == "descent forward":
        monkeypatch.setattr(model, "forward", fail_once(error, model.forward, at_call=2))
    elif stage == "descent backward":
        monkeypatch.setattr(trainer.accelerator, "backward", fail_once(error, trainer.accelerator.backward))
    elif stage == "restoring":
        monkeypatch.setattr(torch, "_foreach_copy_", fail_once(error, torch._foreach_copy_))
    elif stage == "restoring, half done":
        real = torch._foreach_copy_
        first = iter([True])

        def copy(tensors, others):
            if next(first, False):
                half_done(real)(tensors, others)
                raise error("injected")
            real(tensors, others)

        monkeypatch.setattr(torch, "_foreach_copy_", copy)
    else:
        raise AssertionError(stage)


STAGES = [
    "ascent forward",
    "ascent forward, at its end",
    "ascent backward",
    "ascent backward, at its end",
    "scaling",
    "copying",
    "applying, half done",
    "applying, at its end",
    "descent forward",
    "descent backward",
    "restoring",
    "restoring, half done",
]


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", STAGES)
def test_failure_at_any_stage_leaves_the_weights_and_the_next_step_works(stage, error, scope, tmp_path, monkeypatch):
    window = [batch(16, start=16), batch(16, start=32)]

    def prepared():
        trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.05, ascent_scope=scope)
        trainer.training_step(trainer.model, batch(16))  # something is accumulated already
        hand_out(trainer, window)
        return trainer

    reference = prepared()
    trainer = prepared()
    before, accumulated = state(trainer.model), gradients(trainer.model)

    with monkeypatch.context() as patches:
        inject(stage, error, trainer, patches)
        with pytest.raises(error, match="injected"):
            trainer.training_step(trainer.model, window[0])
    assert identical(state(trainer.model), before)
    if "restoring" not in stage:  # after which the descent had ended well
        assert identical(gradients(trainer.model), accumulated)

        for one in (reference, trainer):
            for inputs in hand_out(one, window):
                one.training_step(one.model, inputs)
        assert identical(state(trainer.model), before)
        assert identical(gradients(trainer.model), gradients(reference.model))


@pytest.mark.parametrize("error", ERRORS)
def test_failure_in_the_middle_of_an_accumulation_leaves_the_weights(error, tmp_path, monkeypatch):
    """`full_batch` swaps the weights for each micro-batch: the second of three fails, the third still works."""
    window = [batch(16, start=start) for start in (0, 16, 32)]
    trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.05, ascent_scope="full_batch")
    hand_out(trainer, window)
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    before = state(trainer.model)
    trainer.training_step(trainer.model, window[0])
    assert identical(state(trainer.model), before)
    with monkeypatch.context() as patches:
        inject("descent backward", error, trainer, patches)
        with pytest.raises(error, match="injected"):
            trainer.training_step(trainer.model, window[1])
    assert identical(state(trainer.model), before)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.training_step(trainer.model, window[2])
    assert identical(state(trainer.model), before)


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("which", ["ascent", "descent"])
def test_nan_in_either_pass_leaves_the_weights_and_the_next_step_works(which, scope, tmp_path):
    class Poisoned(AACETrainer):
        poison = None

        def ascent_logits(self, outputs):
            logits = super().ascent_logits(outputs)
            return logits * float("nan") if self.poison == "ascent" else logits

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.poison == "descent" else loss

    trainer = trainer_for_single_steps(resnet(), tmp_path, cls=Poisoned, rho=0.05, ascent_scope=scope)
    before = state(trainer.model)
    trainer.poison = which
    loss = trainer.training_step(trainer.model, batch())
    assert identical(state(trainer.model), before)
    assert loss.isfinite() == (which == "ascent"), "a bad ascent makes the step a plain one"
    assert logged(trainer)["skipped_perturbations"] == (which == "ascent")
    trainer.poison = None
    trainer.model.zero_grad()
    assert trainer.training_step(trainer.model, batch()).isfinite()
    assert identical(state(trainer.model), before)
    assert all(g.isfinite().all() for g in gradients(trainer.model).values())


def test_batch_norm_goes_on_after_a_failure(tmp_path, monkeypatch):
    """The descent pass freezes the running statistics: a failure inside it must not leave them frozen."""
    trainer = trainer_for_single_steps(resnet(), tmp_path, rho=0.05)
    with monkeypatch.context() as patches:
        inject("descent forward", RuntimeError, trainer, patches)
        with pytest.raises(RuntimeError, match="injected"):
            trainer.training_step(trainer.model, batch())
    before = weights(trainer.model)
    trainer.training_step(trainer.model, batch())
    counts = [name for name in before if name.endswith("num_batches_tracked")]
    assert counts and all(trainer.model.state_dict()[name] == before[name] + 1 for name in counts)
