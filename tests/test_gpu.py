# SPDX-License-Identifier: Apache-2.0
"""Properties that need a CUDA device: `pytest -m gpu`."""

import gc

import pytest
import torch
from tiny import VANISHING, batch, convnext, digits, hand_out, identical, training_arguments, vit, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_aace import AACEConfig, AACETrainer


pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _switches_of_this_test_only(monkeypatch):
    """
    `tf32=True` and `full_determinism=True` hold for the process. Left on, the one would spoil comparisons with the CPU and
    make the compiler raise, the other check indices on the host.
    """
    monkeypatch.setattr(torch.backends, "fp32_precision", torch.backends.fp32_precision)
    yield
    torch.use_deterministic_algorithms(False)


def train(cls, config, model, output_dir, callbacks=None, **kwargs):
    arguments = training_arguments(config, output_dir, **{"use_cpu": False, "max_steps": 10, **kwargs})
    trainer = cls(model, arguments, train_dataset=digits(), callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}, {"tf32": True}], ids=str)
@pytest.mark.parametrize("make_model", [convnext, vit])
def test_ascent_pass_leaves_no_trace(make_model, precision, tmp_path):
    """As on the CPU; the generator of the GPU is replayed too."""
    runs, states = [], []
    for cls, config, rho in ((Trainer, TrainingArguments, {}), (AACETrainer, AACEConfig, {"rho": VANISHING})):
        trainer = train(cls, config, make_model(0.2), tmp_path, full_determinism=True, **precision, **rho)
        runs.append(weights(trainer.model))
        states.append(torch.cuda.get_rng_state())
    assert identical(*runs)
    assert torch.equal(*states)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_step_is_that_of_the_cpu(precision, tmp_path, monkeypatch):
    """The first perturbation's norm and sharpness, to the precision of the pass: loss scale and autocast included."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")  # convolutions take TF32 unasked
    kwargs = {"max_steps": 1, "logging_steps": 1, "rho": 0.2}
    cpu = train(AACETrainer, AACEConfig, vit(), tmp_path, use_cpu=True, **kwargs).state.log_history[0]
    gpu = train(AACETrainer, AACEConfig, vit(), tmp_path, **precision, **kwargs).state.log_history[0]
    for key in ("clean_loss", "ascent_loss", "ascent_grad_norm", "perturbation_norm"):
        assert gpu[key] == pytest.approx(cpu[key], rel=2e-2 if precision else 1e-3), key


@pytest.mark.parametrize("which", ["ascent", "descent"])
def test_fp16_overflow(which, tmp_path):
    """Of the ascent: the perturbation is skipped and the step taken. Of the descent: the step is skipped, the scale halved."""

    class Overflow(AACETrainer):
        def ascent_logits(self, outputs):
            logits = super().ascent_logits(outputs)
            return logits * float("inf") if which == "ascent" and self.state.global_step == 3 else logits

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("inf") if which == "descent" and self.state.global_step == 3 else loss

    class Look(TrainerCallback):
        changed, scales = (), ()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.before = weights(model)

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.changed += (not identical(weights(model), self.before),)
            self.scales += (trainer_of_run[0].accelerator.scaler.get_scale(),)

    look, trainer_of_run = Look(), []
    arguments = training_arguments(
        AACEConfig,
        tmp_path,
        use_cpu=False,
        fp16=True,
        rho=0.2,
        max_steps=6,
        logging_steps=1,
        logging_nan_inf_filter=False,
    )
    trainer = Overflow(vit(), arguments, train_dataset=digits(), callbacks=[look])
    trainer_of_run.append(trainer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)  # so low that nothing else overflows
    trainer.train()
    assert look.changed[3] == (which == "ascent")
    assert look.scales[3] == look.scales[2] / (2 if which == "descent" else 1)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["skipped_perturbations"] for log in logs] == [
        int(which == "ascent" and step == 3) for step in range(6)
    ]
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_no_host_synchronisation_per_step(precision, scope, tmp_path):
    arguments = training_arguments(AACEConfig, tmp_path, use_cpu=False, rho=0.1, ascent_scope=scope, **precision)
    trainer = AACETrainer(convnext(), arguments)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare(trainer.model)
    inputs = {key: value.cuda() for key, value in batch().items()}
    first, *others = hand_out(trainer, [dict(inputs) for _ in range(4)])
    trainer.training_step(model, first)  # the first step reads the labels and the loss once, to check them
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in others:
            trainer.training_step(model, each)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "switch",
    [{}, {"ascent_every": 2}, {"gradient_accumulation_steps": 2, "ascent_scope": "full_batch"}],
    ids=["", "ascent_every", "full_batch"],
)
def test_cuda_graphs(switch, tmp_path):
    """They write each pass's gradients where those of the last one were. On the CPU: tests/test_compile.py."""

    class StableGradients(TrainerCallback):
        """Under accumulation, plain Trainer's too, torch demands gradients that no graph has made."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    kwargs = {"max_steps": 4, "logging_steps": 1, "rho": 0.2, "callbacks": [StableGradients()], **switch}
    eager = train(AACETrainer, AACEConfig, vit(), tmp_path, **kwargs).state.log_history
    graphs = train(
        AACETrainer, AACEConfig, vit(), tmp_path, torch_compile=True, torch_compile_mode="reduce-overhead", **kwargs
    ).state.log_history
    for expected, log in zip(eager[:4], graphs[:4], strict=True):
        for key in ("loss", "ascent_grad_norm", "perturbation_norm"):
            assert log[key] == pytest.approx(expected[key], rel=1e-2), key


def test_peak_memory_is_at_most_one_copy_of_the_weights_above_plain(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    def peak(cls, config, **kwargs):
        model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_hidden_layers=4, num_labels=10))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(64)]
        arguments = training_arguments(config, tmp_path, use_cpu=False, max_steps=4, **kwargs)
        gc.collect()  # the trainer of the last run, a cycle
        torch.cuda.reset_peak_memory_stats()
        cls(model, arguments, train_dataset=rows).train()
        return torch.cuda.max_memory_allocated(), size

    plain, size = peak(Trainer, TrainingArguments)
    for kwargs in ({}, {"normalize_perturbation": True}, {"ascent_scope": "full_batch"}):
        ours, _ = peak(AACETrainer, AACEConfig, rho=0.1, **kwargs)
        assert ours - plain < 1.1 * size
