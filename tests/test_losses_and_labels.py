# SPDX-License-Identifier: Apache-2.0
"""Training losses and labels of every kind that a Trainer user may have."""

import pytest
import torch
import torch.nn.functional as F
from comparison import Linear, check_goes_on_working, train, weighted_cross_entropy
from tiny import (
    VANISHING,
    batch,
    convnext,
    identical,
    trainer_for_single_steps,
    vit,
    weights,
)
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_aace import AACEConfig, AACETrainer


def test_label_smoothing_is_the_descents_alone(tmp_path):
    check_goes_on_working(vit, tmp_path, label_smoothing_factor=0.1)
    moved = []
    for smoothing in (0.0, 0.3):
        trainer = trainer_for_single_steps(vit(), tmp_path, rho=0.2, label_smoothing_factor=smoothing)
        with trainer.perturbed_weights(trainer.model, batch()):
            moved.append(weights(trainer.model))
    assert identical(*moved)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_compute_loss_func_with_class_weights_keeps_working(accumulate, tmp_path):
    check_goes_on_working(
        vit, tmp_path, compute_loss_func=weighted_cross_entropy, gradient_accumulation_steps=accumulate
    )


def test_a_compute_loss_func_that_draws_random_numbers_keeps_working(tmp_path):
    """It is called for the log too, which is not to move the generators."""

    def of_some(outputs, labels, num_items_in_batch):
        losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
        return (losses * (torch.rand(len(labels)) < 0.8)).sum() / num_items_in_batch

    def make_model():
        return vit(dropout=0.1)

    check_goes_on_working(make_model, tmp_path, compute_loss_func=of_some)


class EarlyLearning(nn.Module):
    """Keeps a moving average of the predictions, which it pulls new ones to (ELR, arXiv 2007.00151)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("target", torch.zeros(10))

    def forward(self, outputs, labels, num_items_in_batch=None):
        probabilities = outputs["logits"].softmax(1)
        self.target = 0.7 * self.target + 0.3 * probabilities.detach().mean(0)
        return F.cross_entropy(outputs["logits"], labels) + 3 * (probabilities.mean(0) * self.target).sum()


class LaterDoubled:
    """Doubles the loss after six calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls += 1
        return (2 if self.calls > 6 else 1) * F.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize("make_loss", [EarlyLearning, LaterDoubled])
def test_a_compute_loss_func_that_keeps_a_state_counts_each_step_once(make_loss, tmp_path):
    """The log is not to change what is trained."""
    plain = train(Trainer, TrainingArguments, convnext(), tmp_path, compute_loss_func=make_loss(), steps=9)
    ours = train(AACETrainer, AACEConfig, convnext(), tmp_path, compute_loss_func=make_loss(), steps=9, rho=VANISHING)
    assert identical(weights(plain.model), weights(ours.model))
    logs = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (plain, ours)]
    assert logs[0] == logs[1]


class KeepsItsParts:
    """Notes its last value, with its graph, and holds a model that no step changes."""

    def __init__(self):
        self.parts, self.teachers = {}, [Counting().eval()]

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.parts["loss"] = F.cross_entropy(outputs["logits"], labels)
        return self.parts["loss"] + 0 * self.teachers[0](outputs["logits"].detach()).sum()


class Counting(nn.Module):
    copies = 0

    def __deepcopy__(self, memo):
        Counting.copies += 1
        return Counting()

    def forward(self, x):
        return x


def test_the_log_has_the_loss_of_an_object_that_keeps_its_parts_and_copies_no_teacher(tmp_path):
    trainer = train(AACETrainer, AACEConfig, convnext(), tmp_path, compute_loss_func=KeepsItsParts(), rho=0.1)
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] - log["clean_loss"] == pytest.approx(log["sharpness"], abs=1e-4)
    assert Counting.copies == 0


def test_compute_loss_func_gets_the_number_of_labels(tmp_path):
    """Trainer gives it one whenever a batch has labels, so it may rely on that."""

    def mean(outputs, labels, num_items_in_batch):
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    _, _, real = check_goes_on_working(convnext, tmp_path, compute_loss_func=mean, gradient_accumulation_steps=2)
    log = next(log for log in real.state.log_history if "loss" in log)
    assert log["loss"] - log["clean_loss"] == pytest.approx(log["sharpness"], abs=1e-4) and 0 < log["sharpness"] < 1


def test_compute_loss_func_that_changes_the_logits_in_place(tmp_path):
    """For example to adjust them by the frequencies of the classes."""

    def adjusted(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"]
        logits += torch.linspace(-1, 1, 10)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    check_goes_on_working(convnext, tmp_path, compute_loss_func=adjusted)


def test_models_without_loss_kwargs_keep_working(tmp_path):
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
def test_soft_labels_of_mixup_keep_working(loss, tmp_path):
    kwargs = {"compute_loss_func": soft_cross_entropy, "data_collator": mixup}
    plain = train(Trainer, TrainingArguments, vit(), tmp_path, **kwargs)
    for rho, same in ((VANISHING, True), (0.2, False)):
        ours = train(AACETrainer, AACEConfig, vit(), tmp_path, rho=rho, perturbation_loss=loss, **kwargs)
        assert identical(weights(plain.model), weights(ours.model)) is same


def test_soft_labels_in_an_overridden_compute_loss(tmp_path):
    """It can handle them where the model cannot."""

    class Soft(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = soft_cross_entropy(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    class Ours(AACETrainer, Soft):
        pass

    check_goes_on_working(vit, tmp_path, trainer=Soft, ours=Ours, data_collator=mixup)


def test_soft_labels_in_a_loss_that_is_the_models_own(tmp_path):
    """Not one of Transformers, which would take them for multi-label."""

    def soft(rows):
        inputs = default_data_collator(rows)
        return inputs | {"labels": 0.9 * F.one_hot(inputs["labels"], 10).float() + 0.01}

    check_goes_on_working(Linear, tmp_path, data_collator=soft)


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


@pytest.mark.parametrize("loss", ["aace", "cross_entropy"])
def test_labels_of_8_bits_are_the_classes_that_they_say(loss, tmp_path):
    """156 is -100 in 8 bits, which would be left out."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(64, 200)

        def forward(self, pixel_values):
            return {"logits": self.linear(pixel_values.flatten(1))}

    trainer = trainer_for_single_steps(Model(), tmp_path, rho=0.1, perturbation_loss=loss)
    trainer.compute_loss_func = lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels.long())
    moved = []
    for dtype in (torch.long, torch.uint8):
        inputs = batch(2) | {"labels": torch.tensor([156, 3], dtype=dtype)}
        with trainer.perturbed_weights(trainer.model, inputs):
            moved.append(weights(trainer.model))
    assert identical(*moved)


def test_labels_in_a_column_are_those_in_a_row(tmp_path):
    """Models flatten them, so that plain training takes them too."""
    trainer = trainer_for_single_steps(vit(), tmp_path, rho=0.1)
    moved = []
    for inputs in (batch(), batch() | {"labels": batch()["labels"].unsqueeze(1)}):
        with trainer.perturbed_weights(trainer.model, inputs):
            moved.append(weights(trainer.model))
    assert identical(*moved)
