# SPDX-License-Identifier: Apache-2.0
"""The descent loss with class weights and soft labels: against the formula, and inside the trainer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    batch,
    convnext,
    digits,
    identical,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from transformers.trainer_pt_utils import LabelSmoother

from hf_aace import AACEConfig, AACETrainer
from hf_aace.cli import main
from hf_aace.vision.weighted_loss import WeightedCrossEntropy, balanced_class_weights


LOGITS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 0, -100, 0])
WEIGHTS = [0.5, 1.0, 2.0, 4.0]


def by_hand(logits, labels, class_weights=(1, 1, 1, 1), smoothing=0.0):
    """The sum over the images, in float64, one by one."""
    total = 0.0
    for row, label in zip(logits.double(), labels, strict=True):
        if label.dim() == 0 and label == -100:
            continue
        target = label.double() if label.dim() else torch.eye(4, dtype=torch.float64)[label]
        target = (1 - smoothing) * target + smoothing / 4
        total -= (target * torch.tensor(class_weights, dtype=torch.float64) * row.log_softmax(0)).sum()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("items", [None, 30, torch.tensor(30)])
def test_it_is_the_formula(smoothing, class_weights, soft, items):
    labels = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)).softmax(1) if soft else LABELS
    expected = by_hand(LOGITS, labels, class_weights or [1] * 4, smoothing) / (items or (12 if soft else 11))
    loss = WeightedCrossEntropy(class_weights, smoothing)
    if soft and items is not None:
        items = items * 4  # Trainer counts every entry of the labels
    for outputs in ({"logits": LOGITS}, (LOGITS, None), LOGITS):
        torch.testing.assert_close(loss(outputs, labels, items).double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("items", [None, torch.tensor(30)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_without_weights_it_is_the_loss_of_transformers(items, smoothing):
    ours = WeightedCrossEntropy(None, smoothing)({"logits": LOGITS}, LABELS, items)
    theirs = LabelSmoother(epsilon=smoothing)({"logits": LOGITS}, LABELS.clone(), num_items_in_batch=items)
    torch.testing.assert_close(ours, theirs)


def test_one_hot_soft_labels_are_hard_ones():
    hard, loss = LABELS[:10], WeightedCrossEntropy(WEIGHTS, 0.1)
    soft = torch.nn.functional.one_hot(hard, 4).float()
    torch.testing.assert_close(loss({"logits": LOGITS[:10]}, soft), loss({"logits": LOGITS[:10]}, hard))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_have_a_loss_in_32_bits(dtype):
    """A sum over many images would lose its last ones."""
    logits, loss = LOGITS.to(dtype), WeightedCrossEntropy(WEIGHTS)
    assert loss(logits, LABELS).dtype == torch.float32
    torch.testing.assert_close(loss(logits, LABELS), loss(logits.float(), LABELS))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_soft_labels_of_a_collator_train_as_hard_ones(accumulate, tmp_path):
    """Where they come from does not matter: the mean is over images."""

    def soften(rows):
        labels = torch.nn.functional.one_hot(torch.tensor([row["labels"] for row in rows]), 10).float()
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}

    ends = []
    for collate in (None, soften):
        arguments = training_arguments(
            AACEConfig,
            tmp_path,
            max_steps=4,
            rho=0.1,
            optim="sgd",
            gradient_accumulation_steps=accumulate,
            logging_steps=1,
        )
        trainer = AACETrainer(
            vit(),
            arguments,
            train_dataset=digits(128),
            compute_loss_func=WeightedCrossEntropy(),
            data_collator=collate,
        )
        trainer.train()
        ends.append((weights(trainer.model), [log["sharpness"] for log in trainer.state.log_history[:4]]))
    for name in ends[0][0]:
        torch.testing.assert_close(ends[0][0][name], ends[1][0][name], rtol=0, atol=1e-6)
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-5)


def test_balanced_weights_leave_out_what_has_no_label():
    assert balanced_class_weights([0, 1, 1, -100], 2) == balanced_class_weights([0, 1, 1], 2)


def test_balanced_weights_give_every_class_the_same_say():
    labels = [0] * 60 + [1] * 30 + [3] * 10
    found = balanced_class_weights(labels, 4)
    counts = np.bincount(labels, minlength=4)
    assert np.ptp((counts * found)[[0, 1, 3]]) < 1e-12
    assert np.mean([found[label] for label in labels]) == pytest.approx(1)
    assert found[2] == 1


CLASS_WEIGHTS = [0.2, 3.0, 1.0, 1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_accumulation_equals_one_large_batch(tmp_path, smoothing):
    """It would not if each micro-batch were divided by its own weights."""
    ends = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        arguments = training_arguments(
            AACEConfig,
            tmp_path,
            max_steps=5,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            ascent_scope="full_batch",
            rho=0.05,
            optim="sgd",
            learning_rate=0.05,
            train_sampling_strategy="sequential",
        )
        trainer = AACETrainer(
            vit(),
            arguments,
            train_dataset=digits(40),
            compute_loss_func=WeightedCrossEntropy(CLASS_WEIGHTS, smoothing),
        )
        trainer.train()
        ends.append(weights(trainer.model))
    for key in ends[0]:
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=0, atol=1e-6)


def test_the_ascent_is_not_weighted(tmp_path):
    """Or `rho` would mean another thing for every set of weights."""

    def perturbed_weights(class_weights):
        trainer = trainer_for_single_steps(convnext(), tmp_path, rho=0.1)
        trainer.compute_loss_func = None if class_weights is None else WeightedCrossEntropy(class_weights)
        trainer.create_optimizer()
        with trainer.perturbed_weights(trainer.model, batch()):
            return weights(trainer.model)

    assert identical(perturbed_weights(None), perturbed_weights(CLASS_WEIGHTS))
    assert not identical(perturbed_weights(None), weights(convnext()))


def test_the_command_weights_the_classes(tmp_path, monkeypatch):
    """Of the digits all classes are about as frequent, so the first loss is near the plain one, but not equal to it."""
    monkeypatch.chdir(tmp_path)
    losses = {}
    for choice in ("none", "balanced"):
        argv = ["train", "--max_steps", "1", "--train_size", "64", "--disable_tqdm", "true", "--output_dir", choice]
        assert main([*argv, "--class_weights", choice, "--save_strategy", "no", "--eval_strategy", "no"]) == 0
        losses[choice] = json.loads(Path(choice, "all_results.json").read_text())["train_loss"]
    assert losses["balanced"] != losses["none"]
    assert losses["balanced"] == pytest.approx(losses["none"], rel=0.1)
