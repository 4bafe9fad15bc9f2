# SPDX-License-Identifier: Apache-2.0
"""What a Trainer user can switch on goes on working: the rows of the README's compatibility table."""

import copy

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from tiny import (
    VANISHING,
    activation_checkpointing,
    batch,
    convnext,
    digits,
    identical,
    learning_curve,
    resnet,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_aace import AACEConfig, AACETrainer, aace_loss
from hf_aace.callbacks import PerturbationConsistencyCallback


def train(cls, config, model, output_dir, *, steps=6, rows=None, **kwargs):
    trainer_kwargs = {
        key: kwargs.pop(key)
        for key in ("callbacks", "compute_loss_func", "eval_dataset", "data_collator", "optimizers", "model_init")
        if key in kwargs
    }
    arguments = training_arguments(config, output_dir, max_steps=steps, **kwargs)
    trainer = cls(model, arguments, train_dataset=digits(64) if rows is None else rows, **trainer_kwargs)
    trainer.train()
    return trainer


def check_goes_on_working(make_model, output_dir, *, trainer=Trainer, ours=AACETrainer, steps=6, rho=0.2, **kwargs):
    """
    The ascent pass leaves no trace (a vanishing step gives plain training, bit for bit), and a real step has an effect.
    """
    plain = train(trainer, TrainingArguments, make_model(), output_dir, steps=steps, **kwargs)
    vanishing = train(ours, AACEConfig, make_model(), output_dir, steps=steps, rho=VANISHING, **kwargs)
    real = train(ours, AACEConfig, make_model(), output_dir, steps=steps, rho=rho, **kwargs)
    assert identical(weights(plain.model), weights(vanishing.model))
    assert not identical(weights(plain.model), weights(real.model))
    assert all(value.isfinite().all() for value in weights(real.model).values())
    assert next(log for log in real.state.log_history if "loss" in log)["perturbation_norm"] > 0
    return plain, vanishing, real


# ---- Precision ------------------------------------------------------------------------------------------------------


def test_bf16_autocast(tmp_path):
    check_goes_on_working(lambda: vit(0.1), tmp_path, bf16=True)


@pytest.mark.parametrize("outer", [False, True], ids=["trainer", "outer autocast"])
def test_second_pass_sees_the_perturbation_under_autocast(outer, tmp_path):
    """Autocast caches the 16-bit copies of the weights: a stale one would give another loss."""
    trainer = trainer_for_single_steps(vit(), tmp_path, rho=2.0, bf16=not outer)
    trainer.model, _ = trainer.accelerator.prepare(trainer.model, torch.optim.SGD(trainer.model.parameters()))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        loss = trainer.training_step(trainer.model, batch())
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        perturbation = trainer.perturbed_weights(trainer.model, batch())
    # A new region has no copies yet.
    with perturbation, torch.autocast("cpu", torch.bfloat16, enabled=outer):
        assert trainer.compute_loss(trainer.model, batch()).item() == loss.item()


@pytest.mark.parametrize("overflow", ["neither", "ascent", "descent"])
def test_fp16_loss_scale(overflow, tmp_path):
    """
    GradScaler, emulated on the CPU: the ascent gradient is unscaled; an overflow in the ascent skips the perturbation, one
    in the descent skips the optimizer step and halves the scale, as Trainer does; the scale still grows.
    """
    overflowing_step = 3

    class Fp16(AACETrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)

        def ascent_logits(self, outputs):
            logits = super().ascent_logits(outputs)
            return logits * float("inf") if (overflow, self.state.global_step) == ("ascent", 3) else logits

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("inf") if (overflow, self.state.global_step) == ("descent", 3) else loss

    class Look(TrainerCallback):
        changed = ()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.before = weights(model)

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.changed += (not identical(weights(model), self.before),)

    look = Look()
    trainer = train(
        Fp16, AACEConfig, vit(), tmp_path, rho=0.2, callbacks=[look], logging_steps=1, logging_nan_inf_filter=False
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    skipped = [log["skipped_perturbations"] for log in logs]
    assert skipped == [int(overflow == "ascent" and step == overflowing_step) for step in range(6)]
    assert look.changed == tuple(not (overflow == "descent" and step == overflowing_step) for step in range(6))
    scale = trainer.accelerator.scaler.get_scale()
    assert scale == (2.0**9 if overflow == "descent" else 2.0**11)
    assert all(value.isfinite().all() for value in weights(trainer.model).values())
    reference = train(AACETrainer, AACEConfig, vit(), tmp_path, rho=0.2, logging_steps=1)
    expected = [log for log in reference.state.log_history if "loss" in log]
    for key in ("ascent_grad_norm", "perturbation_norm"):
        assert logs[0][key] == pytest.approx(expected[0][key], rel=1e-5)


# ---- Loss and labels ------------------------------------------------------------------------------------------------


def test_label_smoothing_is_the_descents_alone(tmp_path):
    check_goes_on_working(vit, tmp_path, label_smoothing_factor=0.1)
    moved = []
    for smoothing in (0.0, 0.3):
        trainer = trainer_for_single_steps(vit(), tmp_path, rho=0.2, label_smoothing_factor=smoothing)
        with trainer.perturbed_weights(trainer.model, batch()):
            moved.append(weights(trainer.model))
    assert identical(*moved)


def weighted_cross_entropy(outputs, labels, num_items_in_batch=None):
    class_weights = torch.linspace(0.5, 2.0, 10)
    losses = F.cross_entropy(outputs["logits"], labels, weight=class_weights, reduction="none")
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_compute_loss_func_with_class_weights(accumulate, tmp_path):
    check_goes_on_working(
        vit, tmp_path, compute_loss_func=weighted_cross_entropy, gradient_accumulation_steps=accumulate
    )


def test_compute_loss_func_that_needs_the_number_of_labels(tmp_path):
    """Trainer gives it one whenever a batch has labels, so it may rely on that."""

    def mean(outputs, labels, num_items_in_batch):
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    _, _, real = check_goes_on_working(convnext, tmp_path, compute_loss_func=mean, gradient_accumulation_steps=2)
    log = next(log for log in real.state.log_history if "loss" in log)
    assert log["loss"] - log["clean_loss"] == pytest.approx(log["sharpness"], abs=1e-4) and 0 < log["sharpness"] < 1


def test_overridden_compute_loss(tmp_path):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")  # as the examples of Transformers do
            outputs = model(**inputs)
            loss = weighted_cross_entropy(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    class Ours(AACETrainer, Weighted):
        pass

    check_goes_on_working(vit, tmp_path, trainer=Weighted, ours=Ours)


def test_the_users_batch_is_not_modified(tmp_path):
    for kwargs in ({}, {"label_smoothing_factor": 0.1}):
        trainer = trainer_for_single_steps(vit(), tmp_path, ascent_fraction=0.5, **kwargs)
        inputs = batch()
        before = copy.deepcopy(inputs)
        trainer.training_step(trainer.model, inputs)
        assert identical(inputs, before)


class Linear(nn.Module):
    """Takes nothing but images and labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 10)

    def forward(self, pixel_values, labels=None):
        logits = self.linear(pixel_values.flatten(1))
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


def test_models_without_loss_kwargs(tmp_path):
    """Trainer then divides the loss by the number of micro-batches itself."""
    check_goes_on_working(Linear, tmp_path, gradient_accumulation_steps=2)


def test_models_whose_loss_is_none_without_labels(tmp_path):
    class Pair(Linear):
        def forward(self, pixel_values, labels=None):
            loss, logits = super().forward(pixel_values, labels) if labels is not None else (None, None)
            return loss, super().forward(pixel_values)[0] if logits is None else logits

    check_goes_on_working(Pair, tmp_path)


class InPlace(Linear):
    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values.sub_(0.3).div_(0.5), labels)


def test_a_model_that_changes_its_images_in_place(tmp_path):
    """They are the batch's, which the descent pass is to get unchanged."""
    check_goes_on_working(InPlace, tmp_path)


def test_compute_loss_func_that_changes_the_logits_in_place(tmp_path):
    """The adjustment of logits by the frequencies of the classes, say."""

    def adjusted(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"]
        logits += torch.linspace(-1, 1, 10)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    check_goes_on_working(convnext, tmp_path, compute_loss_func=adjusted)


def test_soft_labels_in_a_loss_that_is_the_models_own(tmp_path):
    """Not one of Transformers, which would take them for multi-label."""

    def soft(rows):
        inputs = default_data_collator(rows)
        return inputs | {"labels": 0.9 * F.one_hot(inputs["labels"], 10).float() + 0.01}

    check_goes_on_working(Linear, tmp_path, data_collator=soft)


class MovingMean(nn.Module):
    def __init__(self, rebinds):
        super().__init__()
        self.rebinds = rebinds
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        if self.rebinds:
            self.mean = mean
        else:
            self.mean.copy_(mean)
        return x - self.mean[:, None, None]


@pytest.mark.parametrize("accumulate", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.InstanceNorm2d(8, track_running_stats=True, affine=True),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
        lambda: MovingMean(rebinds=False),
        lambda: MovingMean(rebinds=True),
        lambda: nn.BatchNorm2d(8),
    ],
    ids=["instance norm", "spectral norm", "moving mean", "moving mean, another tensor", "batch norm"],
)
def test_what_a_forward_pass_keeps_is_updated_once(layer, accumulate, tmp_path):
    check_goes_on_working(lambda: Convolutional(layer), tmp_path, **accumulate)


class Convolutional(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.layer, self.linear = nn.Conv2d(1, 8, 3), layer(), nn.Linear(8, 10)

    def forward(self, pixel_values, labels=None):
        features = self.layer(self.convolution(pixel_values)).relu().mean((2, 3))
        logits = self.linear(features)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("where", ["compute_loss", "training_step"])
def test_layers_that_the_trainer_puts_into_evaluation_mode(where, tmp_path):
    """Frozen BatchNorm: the ascent pass neither normalises by its batch there nor counts it, from the first step on."""

    class Frozen(Trainer):
        def compute_loss(self, model, *args, **kwargs):
            if where == "compute_loss":
                model.layer.eval()
            return super().compute_loss(model, *args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            if where == "compute_loss":
                return super().training_step(model, inputs, *args, **kwargs)
            model.eval()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    class Ours(AACETrainer, Frozen):
        pass

    _, _, real = check_goes_on_working(
        lambda: Convolutional(lambda: nn.BatchNorm2d(8)), tmp_path, trainer=Frozen, ours=Ours
    )
    assert real.model.layer.num_batches_tracked == 0


def test_random_changes_of_a_batch_on_the_device_are_the_same_in_both_passes(tmp_path):
    """Or the perturbation would be by other images, and the run draw other numbers than a plain one."""

    class Noisy(Trainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "pixel_values": inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])}

    class Ours(AACETrainer, Noisy):
        pass

    check_goes_on_working(vit, tmp_path, trainer=Noisy, ours=Ours)


def test_the_ascent_is_by_the_batch_that_the_trainer_has_prepared(tmp_path):
    """One that changes images on the device is to be perturbed by those that it trains on."""

    class Doubled(AACETrainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "pixel_values": 2 * inputs["pixel_values"]}

    moved = []
    for cls, factor in ((Doubled, 1), (AACETrainer, 2)):
        trainer = trainer_for_single_steps(convnext(), tmp_path, cls, rho=0.1)
        inputs = batch()
        inputs["pixel_values"] *= factor
        with trainer.perturbed_weights(trainer.model, inputs):
            moved.append(weights(trainer.model))
    assert identical(*moved)


def compiled():
    return torch.compile(Linear(), backend="eager")


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(Linear(), peft.LoraConfig(target_modules=["linear"], init_lora_weights=False))


@pytest.mark.parametrize("make_model", [Linear, compiled, adapted])
def test_what_a_batch_holds_for_an_overridden_compute_loss_is_kept_from_the_model(make_model, tmp_path):
    """Also where the model is inside another, whose `forward` takes anything."""

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            sample_weights, labels = inputs.pop("sample_weights"), inputs.pop("labels")
            outputs = model(**inputs)
            loss = (sample_weights * F.cross_entropy(outputs[0], labels, reduction="none")).mean()
            return (loss, outputs) if return_outputs else loss

    class Ours(AACETrainer, Weighted):
        pass

    def with_weights(rows):
        return default_data_collator(rows) | {"sample_weights": torch.linspace(0, 1, len(rows))}

    kwargs = {"data_collator": with_weights, "remove_unused_columns": False, "label_names": ["labels"]}

    def seeded():
        torch.manual_seed(0)
        return make_model()

    check_goes_on_working(seeded, tmp_path, trainer=Weighted, ours=Ours, **kwargs)


def test_a_model_that_takes_anything_gets_all_of_the_batch(tmp_path):
    """In both passes."""

    class Anything(Linear):
        def forward(self, labels=None, **inputs):
            return super().forward(inputs["pixel_values"] * inputs["contrasts"], labels)

    def with_contrasts(rows):
        return default_data_collator(rows) | {"contrasts": torch.linspace(0.5, 2, len(rows)).view(-1, 1, 1, 1)}

    check_goes_on_working(Anything, tmp_path, data_collator=with_contrasts, remove_unused_columns=False)


def test_a_model_that_is_called_otherwise_than_by_the_names_of_the_batch(tmp_path):
    """As those of torchvision are, by an overridden `compute_loss`."""

    class Positional(Linear):
        def forward(self, x):
            return super().forward(x)[0]

    class Calls(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(inputs["pixel_values"])
            loss = F.cross_entropy(logits, inputs["labels"])
            return (loss, {"logits": logits}) if return_outputs else loss

    class Ours(AACETrainer, Calls):
        def ascent_outputs(self, model, inputs):
            return model(inputs["pixel_values"])

    check_goes_on_working(Positional, tmp_path, trainer=Calls, ours=Ours, remove_unused_columns=False)

    class WithoutIt(AACETrainer, Calls):
        pass

    with pytest.raises(
        ValueError, match=r"needs \['x'\], got .*\['labels', 'pixel_values'\].* `ascent_outputs` of WithoutIt"
    ):
        train(WithoutIt, AACEConfig, Positional(), tmp_path, remove_unused_columns=False)


def mixup(rows):
    inputs = {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": F.one_hot(torch.tensor([row["labels"] for row in rows]), 10).float(),
    }
    share = torch.rand(()).item()
    return {key: share * value + (1 - share) * value.flip(0) for key, value in inputs.items()}


def soft_cross_entropy(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize("loss", ["aace", "cross_entropy"])
def test_soft_labels_of_mixup(loss, tmp_path):
    kwargs = {"compute_loss_func": soft_cross_entropy, "data_collator": mixup}
    plain = train(Trainer, TrainingArguments, vit(), tmp_path, **kwargs)
    for rho, same in ((VANISHING, True), (0.2, False)):
        ours = train(AACETrainer, AACEConfig, vit(), tmp_path, rho=rho, perturbation_loss=loss, **kwargs)
        assert identical(weights(plain.model), weights(ours.model)) is same


def test_soft_labels_in_an_overridden_compute_loss(tmp_path):
    """Which may know what to do with them where the model does not."""

    class Soft(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = soft_cross_entropy(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    class Ours(AACETrainer, Soft):
        pass

    check_goes_on_working(vit, tmp_path, trainer=Soft, ours=Ours, data_collator=mixup)


def test_ignored_labels_count_in_neither_pass(tmp_path):
    inputs = batch(16)
    inputs["labels"][::3] = -100
    counted = inputs["labels"] != -100
    trainer = trainer_for_single_steps(vit(), tmp_path, rho=0.2)
    with trainer.perturbed_weights(trainer.model, inputs):
        moved = weights(trainer.model)
    with trainer.perturbed_weights(trainer.model, {key: value[counted] for key, value in inputs.items()}):
        for name, value in trainer.model.state_dict().items():
            torch.testing.assert_close(value, moved[name])


# ---- Memory and speed switches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(use_reentrant, tmp_path):
    """Reentrant checkpointing rules out `autograd.grad`; with accumulation, to see that no gradient is lost to it."""
    check_goes_on_working(
        lambda: vit(0.1), tmp_path, gradient_accumulation_steps=2, **activation_checkpointing(use_reentrant)
    )


class CheckpointedBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.classifier = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, pixel_values, labels=None):
        hidden = checkpoint(self.norm, self.convolution(pixel_values), use_reentrant=True)
        logits = self.classifier(hidden.relu().mean((2, 3)))
        outputs = {"logits": logits}
        return outputs if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **outputs}


def test_reentrant_checkpointing_of_batch_norm(tmp_path):
    """The ascent pass that finds out about it, on the first step, has already counted the batch: that is undone."""

    def make_model():
        torch.manual_seed(0)
        return CheckpointedBatchNorm()

    plain, *_ = check_goes_on_working(make_model, tmp_path)
    assert plain.model.norm.num_batches_tracked == 2 * 6  # PyTorch counts each forward pass, recomputed ones too


@pytest.mark.parametrize("which", ["ascent", "descent"])
@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_auto_find_batch_size_retries_from_unperturbed_weights(scope, which, tmp_path):
    """Out of memory with more than 30 images in one of the passes of the third step; the weights are those of step two."""
    seen = []

    class Small(AACETrainer):
        def _inner_training_loop(self, *args, **kwargs):
            seen.append(weights(self.model))
            return super()._inner_training_loop(*args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            if which == "descent":
                self.exhaust(inputs["pixel_values"])
            return super().compute_loss(model, inputs, *args, **kwargs)

        def ascent_logits(self, outputs):
            logits = super().ascent_logits(outputs)
            if which == "ascent":
                self.exhaust(logits)
            return logits

        def exhaust(self, samples):
            if len(samples) > 30 and self.state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2 and len(seen) == 1:
                self.left = weights(model)

    remember = Remember()
    trainer = train(
        Small,
        AACEConfig,
        convnext(),
        tmp_path,
        rho=0.2,
        ascent_scope=scope,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=32,
        auto_find_batch_size=True,
        rows=digits(256),
        callbacks=[remember],
    )
    assert len(seen) == 2 and identical(seen[1], remember.left)
    assert trainer.state.global_step == 6 and trainer._train_batch_size == 28


def test_torch_compile_does_not_compile_again_after_the_first_steps(tmp_path):
    from torch._dynamo.utils import counters

    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    counters.clear()
    kwargs = {"torch_compile": True, "torch_compile_backend": "aot_eager", "rows": digits(96)}
    train(Trainer, TrainingArguments, vit(), tmp_path, callbacks=[Count()], **kwargs)
    plain = graphs.pop()
    graphs.clear()
    torch._dynamo.reset()
    counters.clear()
    train(AACETrainer, AACEConfig, vit(), tmp_path, rho=0.2, callbacks=[Count()], **kwargs)
    assert graphs[1] == graphs[-1], "everything is compiled within two steps"
    assert graphs[-1] <= plain + 1, "one graph more, for the pass without labels"


def test_torch_compile_trains_as_without(tmp_path):
    eager = train(AACETrainer, AACEConfig, resnet(), tmp_path, rho=0.1)
    torch._dynamo.reset()
    compiled = train(
        AACETrainer, AACEConfig, resnet(), tmp_path, rho=0.1, torch_compile=True, torch_compile_backend="aot_eager"
    )
    for name, value in weights(eager.model).items():
        torch.testing.assert_close(weights(compiled.model)[name], value, rtol=1e-4, atol=1e-5)


def backend_whose_gradients_do_not_last():
    """Does with memory what CUDA graphs do: the gradients of a backward pass are good until the next forward pass."""
    lent = []

    def forward(graph, example_inputs):
        def run(*args):
            for tensor in lent:
                tensor.fill_(float("nan"))
            lent.clear()
            return graph(*args)

        return make_boxed_func(run)

    def backward(graph, example_inputs):
        def run(*args):
            gradients = graph(*args)
            lent.extend(g for g in gradients if g is not None)  # which autograd copies then, and does not take over
            return gradients

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=forward, bw_compiler=backward)


@pytest.mark.parametrize(
    "switch",
    [
        {"ascent_every": 2},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "ascent_scope": "full_batch"},
        {"callbacks": [PerturbationConsistencyCallback()]},
    ],
    ids=["ascent_every", "micro_batch", "full_batch", "consistency"],
)
def test_nothing_is_kept_in_memory_that_cuda_graphs_use_again(switch, tmp_path):
    """As with `torch_compile_mode="reduce-overhead"`, which needs a GPU."""
    torch._dynamo.reset()
    model = vit()
    model.forward = torch.compile(model.forward, backend=backend_whose_gradients_do_not_last())
    kwargs = {"rho": 0.2, "rows": digits(256), "logging_steps": 2, **switch}
    eager, compiled = (train(AACETrainer, AACEConfig, m, tmp_path, **kwargs) for m in (vit(), model))
    for name, value in weights(eager.model).items():
        torch.testing.assert_close(weights(compiled.model)[name], value, rtol=1e-4, atol=1e-5)
    logs = [[log for log in t.state.log_history if "perturbation_norm" in log] for t in (eager, compiled)]
    for expected, log in zip(*logs, strict=True):
        assert log == pytest.approx(expected, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize(
    "switch",
    [
        {"torch_empty_cache_steps": 2},
        {"dataloader_num_workers": 1},
        {"dataloader_drop_last": True},
        {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
        {"max_grad_norm": 0.1},
        {"average_tokens_across_devices": False},
        {"include_num_input_tokens_seen": "all"},
        {"full_determinism": True},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_switches(switch, tmp_path):
    try:
        check_goes_on_working(lambda: vit(0.1), tmp_path, **switch)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- Parameters -----------------------------------------------------------------------------------------------------


def frozen_backbone():
    model = vit(0.1)
    model.vit.requires_grad_(False)
    return model


def test_frozen_backbone(tmp_path):
    _, _, real = check_goes_on_working(frozen_backbone, tmp_path, rho=10.0)
    start, end = weights(frozen_backbone()), weights(real.model)
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_unfreezing_during_training_perturbs_what_was_unfrozen(tmp_path):
    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.vit.requires_grad_(True)

    model = frozen_backbone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kwargs = {"callbacks": [Unfreeze()], "optimizers": (optimizer, None), "logging_steps": 1, "rho": 0.2}
    trainer = train(AACETrainer, AACEConfig, model, tmp_path, **kwargs)
    norms = [log["ascent_grad_norm"] for log in trainer.state.log_history if "loss" in log]
    assert min(norms[3:]) > max(norms[:3]), "the gradient is over more parameters from there on"


def lora():
    from peft import LoraConfig, get_peft_model

    model = vit(0.1)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_lora_perturbs_the_adapters_alone(tmp_path):
    pytest.importorskip("peft")
    _, _, real = check_goes_on_working(lora, tmp_path, rho=10.0)
    trainer = trainer_for_single_steps(lora(), tmp_path, rho=10.0)
    nn.init.normal_(next(p for name, p in trainer.model.named_parameters() if "lora_B" in name))
    before = weights(trainer.model)
    with trainer.perturbed_weights(trainer.model, batch()):
        moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("lora_" in name for name in moved)
    real.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


class Tied(nn.Module):
    """One weight, used twice under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first.weight

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.second(self.first(pixel_values.flatten(1)).relu()).relu())
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)} if labels is not None else logits


def test_tied_weights_are_perturbed_once_and_stay_tied(tmp_path):
    model = Tied()
    trainer = trainer_for_single_steps(model, tmp_path, rho=0.2)
    inputs = batch()
    gradient = torch.autograd.grad(aace_loss(model(inputs["pixel_values"]), inputs["labels"]), model.first.weight)[0]
    before = model.first.weight.detach().clone()
    with trainer.perturbed_weights(model, inputs):
        torch.testing.assert_close(model.first.weight.detach(), before - 0.2 * gradient)
        assert model.first.weight is model.second.weight
    assert torch.equal(model.first.weight, before)


def test_several_parameter_groups_keep_their_settings(tmp_path):
    def optimizer(model):
        head = [p for name, p in model.named_parameters() if name.startswith("classifier")]
        rest = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
        return torch.optim.SGD([{"params": head, "lr": 0.1}, {"params": rest, "lr": 0.0}])

    plain_model, our_model, real_model = vit(), vit(), vit()
    plain = train(Trainer, TrainingArguments, plain_model, tmp_path, optimizers=(optimizer(plain_model), None))
    ours = train(AACETrainer, AACEConfig, our_model, tmp_path, rho=VANISHING, optimizers=(optimizer(our_model), None))
    real = train(AACETrainer, AACEConfig, real_model, tmp_path, rho=0.2, optimizers=(optimizer(real_model), None))
    assert identical(weights(plain.model), weights(ours.model))
    start, end = weights(vit()), weights(real.model)
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


# ---- Optimizers and schedules ---------------------------------------------------------------------------------------

LOW_RANK = {"optim_target_modules": ["attention", "mlp"], "optim_args": "rank=4, update_proj_gap=2"}
CONSTANT = {"lr_scheduler_type": "constant"}


@pytest.mark.parametrize(
    ("optim", "package", "kwargs"),
    [
        ("sgd", "torch", {}),
        ("adamw_torch", "torch", {}),
        ("adamw_torch_fused", "torch", {}),
        ("adafactor", "torch", {}),
        ("adagrad", "torch", {}),
        ("rmsprop", "torch", {}),
        ("lion_32bit", "bitsandbytes", {}),
        ("adamw_8bit", "bitsandbytes", {}),
        ("ademamix", "bitsandbytes", {}),
        ("galore_adamw", "galore_torch", LOW_RANK),
        ("galore_adafactor", "galore_torch", LOW_RANK),
        ("apollo_adamw", "apollo_torch", LOW_RANK),
        ("schedule_free_adamw", "schedulefree", CONSTANT),
        ("schedule_free_sgd", "schedulefree", CONSTANT),
        ("schedule_free_radam", "schedulefree", CONSTANT),
        ("stable_adamw", "optimi", {}),
        ("grokadamw", "grokadamw", {}),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of those packages
def test_optimizers(optim, package, kwargs, tmp_path):
    """With evaluations, for which the schedule-free ones move the weights, to move them back before the next step."""
    pytest.importorskip(package)
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": digits(16)}
    check_goes_on_working(vit, tmp_path, optim=optim, steps=10, rho=0.5, **evaluation, **kwargs)


@pytest.mark.parametrize("kwargs", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_fused_and_foreach_optimizers(kwargs, tmp_path):
    runs = []
    for cls, config, rho in ((Trainer, TrainingArguments, {}), (AACETrainer, AACEConfig, {"rho": VANISHING})):
        model = vit()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **kwargs)
        runs.append(weights(train(cls, config, model, tmp_path, optimizers=(optimizer, None), **rho).model))
    assert identical(*runs)


def test_schedules_reach_the_optimizer(tmp_path):
    kwargs = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 1, "steps": 8}
    rates = []
    for cls, config in ((Trainer, TrainingArguments), (AACETrainer, AACEConfig)):
        trainer = train(cls, config, vit(), tmp_path, **kwargs)
        rates.append([log["learning_rate"] for log in trainer.state.log_history if "loss" in log])
    assert rates[0] == rates[1] and len(set(rates[0])) > 4


# ---- Trainer features -----------------------------------------------------------------------------------------------


def test_evaluation_saving_and_early_stopping(tmp_path):
    trainer = train(
        AACETrainer,
        AACEConfig,
        convnext(),
        tmp_path,
        steps=40,
        learning_rate=0.0,  # nothing improves: early stopping must stop it
        eval_dataset=digits(32),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    assert trainer.state.global_step == 8
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]


def test_moving_average_callback_averages_clean_weights(tmp_path):
    """With the learning rate 0 the average of clean weights is the start itself; perturbed ones would be averaged in."""

    class Average(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.average = torch.optim.swa_utils.AveragedModel(model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.average.update_parameters(model)

        on_substep_end = on_step_end

    average = Average()
    kwargs = {"rho": 0.5, "learning_rate": 0.0, "gradient_accumulation_steps": 2, "ascent_scope": "full_batch"}
    train(AACETrainer, AACEConfig, vit(), tmp_path, callbacks=[average], **kwargs)
    assert identical(weights(average.average.module), weights(vit()))


def test_evaluate_and_predict_see_the_clean_weights(tmp_path):
    trainer = train(AACETrainer, AACEConfig, vit(), tmp_path, rho=0.5)
    twin = Trainer(trainer.model, trainer.args)
    assert trainer.evaluate(digits(32))["eval_loss"] == twin.evaluate(digits(32))["eval_loss"]
    assert (trainer.predict(digits(32)).predictions == twin.predict(digits(32)).predictions).all()


def test_training_twice_goes_on_as_trainer_does(tmp_path):
    runs = []
    for cls, config, kwargs in ((Trainer, TrainingArguments, {}), (AACETrainer, AACEConfig, {"rho": VANISHING})):
        trainer = train(cls, config, vit(0.1), tmp_path, **kwargs)
        trainer.train()
        runs.append(weights(trainer.model))
    assert identical(*runs)


def test_rho_may_follow_a_schedule(tmp_path):
    class Schedule(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.rho = 0.1 * state.global_step

    trainer = train(AACETrainer, AACEConfig, vit(), tmp_path, logging_steps=1, callbacks=[Schedule()])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert "rho" not in logs[0], "the first step, with rho 0, is a plain one"
    assert [log["rho"] for log in logs[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    for log in logs[1:]:
        assert log["perturbation_norm"] == pytest.approx(log["rho"] * log["ascent_grad_norm"], rel=1e-5)


def test_hyperparameter_search_over_rho(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    used = []

    class Watching(AACETrainer):
        def training_step(self, *args, **kwargs):
            used.append(self.args.rho)
            return super().training_step(*args, **kwargs)

    trainer = Watching(
        args=training_arguments(AACEConfig, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2),
        model_init=lambda: vit(),
        train_dataset=digits(64),
        eval_dataset=digits(32),
    )
    best = trainer.hyperparameter_search(
        backend="optuna", n_trials=3, hp_space=lambda trial: {"rho": trial.suggest_float("rho", 0.01, 0.5, log=True)}
    )
    assert len(set(used)) == 3
    assert best.hyperparameters["rho"] in used


def test_data_parallel_is_refused(tmp_path):
    arguments = training_arguments(AACEConfig, tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel over 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        AACETrainer(vit(), arguments)


def test_custom_sampler_and_log_of_ones_own(tmp_path):
    class Mine(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def log(self, logs, *args, **kwargs):
            logs["mine"] = 1.0
            super().log(logs, *args, **kwargs)

    class Ours(AACETrainer, Mine):
        pass

    plain, vanishing, _ = check_goes_on_working(vit, tmp_path, trainer=Mine, ours=Ours)
    assert all(log["mine"] == 1.0 for log in vanishing.state.log_history)
    assert [log["loss"] for log in learning_curve(plain)[:1]] == [log["loss"] for log in learning_curve(vanishing)[:1]]
