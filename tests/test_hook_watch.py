# SPDX-License-Identifier: Apache-2.0
"""A method that the ascent hangs on and that is not called any more, by a subclass or a later Transformers, stops the run."""

import pytest
import torch
from comparison import Linear, check_goes_on_working, train
from tiny import VANISHING, batch, convnext, digits, identical, training_arguments, weights
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_aace import AACEConfig, AACETrainer, SharpnessAwareMixin


ACCUMULATION = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}


class WithoutTrainingStep(AACETrainer):
    def training_step(self, *args, **kwargs):
        return Trainer.training_step(self, *args, **kwargs)


class TrainerThatCallsAnotherStep(Trainer):
    """As a later Transformers might: the step has another name there."""

    def _run_epoch(self, *args, **kwargs):
        ours, self.training_step = self.training_step, lambda *step, **rest: Trainer.training_step(self, *step, **rest)
        try:
            return super()._run_epoch(*args, **kwargs)
        finally:
            self.training_step = ours


class OverAnotherStep(SharpnessAwareMixin, TrainerThatCallsAnotherStep):
    pass


class WithoutWindow(AACETrainer):
    def get_batch_samples(self, *args, **kwargs):
        return Trainer.get_batch_samples(self, *args, **kwargs)


class WindowOfAnotherLength(AACETrainer):
    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        return [*batches, batches[0]], items


class OneMicroBatchAtATime(AACETrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.get_batch_samples(iter([inputs]), 1, self.args.device)
        self.current_gradient_accumulation_steps = 1
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("cls", "method", "settings"),
    [
        (WithoutTrainingStep, "training_step", {}),
        (WithoutTrainingStep, "training_step", ACCUMULATION),
        (OverAnotherStep, "training_step", {}),
        (WithoutWindow, "get_batch_samples", ACCUMULATION),
        (WithoutWindow, "get_batch_samples", {**ACCUMULATION, "ascent_scope": "full_batch"}),
        (WindowOfAnotherLength, "get_batch_samples", {**ACCUMULATION, "ascent_scope": "full_batch"}),
        (OneMicroBatchAtATime, "get_batch_samples", ACCUMULATION),
    ],
)
def test_a_call_that_is_taken_away_stops_the_run_before_the_second_step(cls, method, settings, tmp_path):
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    with pytest.raises(RuntimeError, match=rf"`{method}` of SharpnessAwareMixin .*\({cls.__name__}\)"):
        train(cls, AACEConfig, convnext(), tmp_path, rho=0.1, callbacks=[Count()], **settings)
    assert len(steps) <= 1


def test_a_subclass_may_skip_a_batch(tmp_path):
    class Skips(AACETrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                return torch.zeros(())
            return super().training_step(*args, **kwargs)

    assert train(Skips, AACEConfig, convnext(), tmp_path, rho=0.1).state.global_step == 6


@pytest.mark.parametrize("cls", [WithoutTrainingStep, OverAnotherStep, WithoutWindow, OneMicroBatchAtATime])
def test_plain_training_is_not_watched(cls, tmp_path):
    plain = train(Trainer, TrainingArguments, convnext(), tmp_path, steps=3)
    ours = train(cls, AACEConfig, convnext(), tmp_path, steps=3, rho=0.0)
    assert identical(weights(plain.model), weights(ours.model))


class StepsItself(Trainer):
    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        self.optimizer.step()
        model.zero_grad()
        return loss


class StepsASecondOptimizer(Trainer):
    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        torch.optim.SGD(model.classifier.parameters(), lr=0.1).step()
        return loss


@pytest.mark.parametrize("base", [StepsItself, StepsASecondOptimizer])
def test_an_optimizer_that_steps_while_the_weights_are_perturbed_is_refused(base, tmp_path):
    """The weights would be put back over its update: nothing would be trained, with plausible logs."""

    class Mine(SharpnessAwareMixin, base):
        pass

    model = convnext()
    before = weights(model)
    with pytest.raises(
        RuntimeError, match=r"`training_step` of Mine steps \w+ itself, .* while the weights are perturbed"
    ):
        train(Mine, AACEConfig, model, tmp_path, rho=0.5)
    assert identical(before, weights(model))
    assert train(Mine, AACEConfig, convnext(), tmp_path, rho=0.0).state.global_step == 6


def test_what_steps_outside_the_perturbation_is_not_refused(tmp_path):
    """The hook is on every optimizer of the process, but only for as long as the weights are perturbed."""

    class Other(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            parameter = torch.nn.Parameter(torch.ones(2))
            parameter.sum().backward()
            torch.optim.SGD([parameter], lr=0.1).step()

    assert train(AACETrainer, AACEConfig, convnext(), tmp_path, rho=0.1, callbacks=[Other()]).state.global_step == 6


class WithDiscriminator(Trainer):
    """Trains a second network, by an optimizer of its own, on the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if not self.state.global_step:
            self.discriminator = torch.nn.Linear(10, 1)
            self.its_optimizer = torch.optim.SGD(self.discriminator.parameters(), lr=0.1)
        self.discriminator(outputs.logits.detach()).square().mean().backward()
        self.its_optimizer.step()
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OverWithDiscriminator(SharpnessAwareMixin, WithDiscriminator):
    pass


def test_an_optimizer_of_another_network_may_step_in_compute_loss(tmp_path):
    trainer = train(OverWithDiscriminator, AACEConfig, convnext(), tmp_path, rho=0.1)
    assert trainer.state.global_step == 6 and trainer.discriminator.weight.grad is not None


class Clamps(Trainer):
    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for parameter in model.classifier.parameters():
            parameter.data.clamp_(-0.01, 0.01)
        return loss


def test_weights_that_the_trainer_changes_while_they_are_perturbed_are_refused(tmp_path):
    """The change would be lost, without a word."""

    class Mine(SharpnessAwareMixin, Clamps):
        pass

    model = convnext()
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"Mine.* changes 1 parameters such as 'classifier.weight' while .* perturbed"
    ):
        train(Mine, AACEConfig, model, tmp_path, rho=0.5)
    assert identical(before, weights(model))
    # Parameters that are not perturbed keep the change.
    kept = train(Mine, AACEConfig, convnext(), tmp_path, rho=0.5, perturb_modules="embeddings", learning_rate=0.0)
    assert kept.model.classifier.weight.abs().max() <= 0.01 < before["classifier.weight"].abs().max()


class LimitsItsWeights(Linear):
    """In the forward pass, as `nn.Embedding` with a `max_norm` does."""

    def forward(self, pixel_values, labels=None):
        self.linear.weight.data.clamp_(-0.05, 0.05)
        return super().forward(pixel_values, labels)


def test_weights_that_the_forward_pass_limits_are_no_alarm(tmp_path):
    """The ascent pass limits them, too, at the clean weights: nothing is lost."""
    trainer = train(AACETrainer, AACEConfig, LimitsItsWeights(), tmp_path, rho=0.1, learning_rate=0.0)
    assert trainer.state.global_step == 6 and trainer.model.linear.weight.abs().max() <= 0.05


def test_frozen_vectors_of_a_limited_norm_are_no_alarm(tmp_path):
    """The first pass limits them, and the second finds nothing to limit."""

    class WithVectors(Linear):
        def __init__(self):
            super().__init__()
            self.vectors = nn.Embedding.from_pretrained(torch.ones(10, 4), freeze=True, max_norm=1.0)

        def forward(self, pixel_values, labels=None):
            scale = self.vectors(torch.arange(10)).sum()
            return super().forward(pixel_values * scale, labels)

    check_goes_on_working(WithVectors, tmp_path)


def test_a_trainer_may_evaluate_and_save_in_its_constructor_and_at_weights_that_its_user_perturbs(tmp_path):
    class Base(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.before = self.evaluate()["eval_loss"]
            self.save_model()

    class Mine(SharpnessAwareMixin, Base):
        pass

    arguments = training_arguments(AACEConfig, tmp_path, rho=1.0)
    trainer = Mine(convnext(), arguments, train_dataset=digits(16), eval_dataset=digits(16))
    trainer.create_optimizer_and_scheduler(1)
    with trainer.perturbed_weights(trainer.model, batch()):
        assert trainer.evaluate()["eval_loss"] > trainer.before


@pytest.mark.parametrize("method", ["evaluate", "predict", "save_model"])
def test_what_is_to_see_the_clean_weights_is_refused_while_they_are_perturbed(method, tmp_path):
    class Base(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            getattr(self, method)(*([digits(16)] if method != "save_model" else []))
            return loss

    class Mine(SharpnessAwareMixin, Base):
        pass

    with pytest.raises(RuntimeError, match=rf"`{method}` was called .* weights are perturbed"):
        train(Mine, AACEConfig, convnext(), tmp_path, rho=0.5)
    assert train(Mine, AACEConfig, convnext(), tmp_path, rho=0.0, steps=2).state.global_step == 2


class Raises(TrainerCallback):
    """Raises `rho` from 0, or sets it to 0, in the course of training."""

    def __init__(self, event, rho):
        self.rho = rho
        setattr(self, event, self.change)

    def change(self, args, state, control, **kwargs):
        if state.global_step >= 2:
            args.rho = self.rho


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end"])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_callbacks_that_change_rho_raise_no_alarm(event, rho, tmp_path):
    trainer = train(
        AACETrainer, AACEConfig, convnext(), tmp_path, rho=0.1 - rho, callbacks=[Raises(event, rho)], **ACCUMULATION
    )
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_an_epoch_that_ends_within_an_optimizer_step_raises_no_alarm(scope, tmp_path):
    class Stop(TrainerCallback):
        stopped = ()

        def on_substep_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step in (1, 2) and state.global_step not in self.stopped
            self.stopped += (state.global_step,)

    trainer = train(
        AACETrainer, AACEConfig, convnext(), tmp_path, rho=0.1, callbacks=[Stop()], ascent_scope=scope,
        rows=digits(40), **ACCUMULATION,
    )  # fmt: skip
    assert trainer.state.global_step == 2  # of the two epochs' 6 steps


class Stream(torch.utils.data.IterableDataset):
    """Three micro-batches of four, without a length."""

    def __iter__(self):
        return iter(digits(12))


class ShorterThanItSays(Stream):
    def __len__(self):
        return 16


@pytest.mark.parametrize("stream", [Stream, ShorterThanItSays])
@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_a_stream_that_ends_within_an_optimizer_step_trains_as_plain(scope, stream, tmp_path):
    """Trainer goes on with the step in the next epoch."""
    settings = {"rows": stream(), "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    plain = train(Trainer, TrainingArguments, convnext(), tmp_path, **settings)
    ours = train(AACETrainer, AACEConfig, convnext(), tmp_path, rho=VANISHING, ascent_scope=scope, **settings)
    assert ours.state.global_step == plain.state.global_step >= 3 and identical(
        weights(plain.model), weights(ours.model)
    )
