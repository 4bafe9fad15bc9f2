# SPDX-License-Identifier: Apache-2.0
"""Short runs to compare with one another, plain and sharpness-aware."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from tiny import (
    VANISHING,
    digits,
    identical,
    training_arguments,
    weights,
)
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_aace import AACEConfig, AACETrainer


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


class Augmented(torch.utils.data.Dataset):
    """Augments from the three global random number generators, as image augmentations do."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        image = self.rows[index]["pixel_values"]
        noise = torch.randn_like(image) + random.random() + float(np.random.rand())
        return {"pixel_values": image + 0.1 * noise, "labels": self.rows[index]["labels"]}


def run(cls, config, make_model, output_dir, *, steps=30, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    trainer = cls(
        make_model().to(dtype),
        training_arguments(config, output_dir, max_steps=steps, **kwargs),
        train_dataset=Augmented(digits(dtype=dtype)),
    )
    trainer.train()
    return trainer


def rng_states() -> tuple:
    """The states of the three global random number generators."""
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2:], random.getstate()


def weighted_cross_entropy(outputs, labels, num_items_in_batch=None):
    class_weights = torch.linspace(0.5, 2.0, 10)
    losses = F.cross_entropy(outputs["logits"], labels, weight=class_weights, reduction="none")
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


class Linear(nn.Module):
    """Takes nothing but images and labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 10)

    def forward(self, pixel_values, labels=None):
        logits = self.linear(pixel_values.flatten(1))
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


VARIANTS = {
    "aace": {},
    "aace-normalized": {"normalize_perturbation": True},
    "aace-adaptive": {"adaptive_perturbation": True},
    "aace-adaptive-normalized": {"adaptive_perturbation": True, "normalize_perturbation": True},
    "sam": {"perturbation_loss": "cross_entropy", "normalize_perturbation": True},
    "asam": {
        "perturbation_loss": "cross_entropy",
        "normalize_perturbation": True,
        "adaptive_perturbation": True,
    },
}
