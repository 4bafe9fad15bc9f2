# SPDX-License-Identifier: Apache-2.0
"""`rho=0` is plain Trainer, bit for bit, and an ascent pass leaves no trace but its step."""

import pytest
import torch
from comparison import rng_states, run
from tiny import (
    MODELS,
    VANISHING,
    identical,
    learning_curve,
    weights,
)

from hf_aace import AACEConfig, AACETrainer


@pytest.mark.parametrize("rho", [0.0, VANISHING], ids=["off", "vanishing"])
@pytest.mark.parametrize("name", MODELS)
def test_rho_0_and_a_vanishing_step_are_plain_training_bit_for_bit(name, rho, plain_run, tmp_path):
    """`rho=0` is plain Trainer; with a step that vanishes, even the ascent pass leaves no trace but its own log entries."""
    kwargs = {"save_strategy": "steps", "save_steps": 30, "gradient_accumulation_steps": 2}
    made = plain_run(name, dropout=0.2, **kwargs)
    plain = made.trainer
    ours = run(AACETrainer, AACEConfig, lambda: MODELS[name](dropout=0.2), tmp_path, rho=rho, **kwargs)

    assert rng_states() == made.rng
    assert identical(weights(plain.model), weights(ours.model))
    if rho == 0:
        assert learning_curve(ours) == learning_curve(plain)
    else:
        shared = [
            {key: entry[key] for key in expected}
            for entry, expected in zip(ours.state.log_history, learning_curve(plain), strict=True)
        ]
        assert shared == learning_curve(plain)

    plain_files, our_files = (folder / "checkpoint-30" for folder in (made.folder, tmp_path))
    assert sorted(p.name for p in plain_files.iterdir()) == sorted(p.name for p in our_files.iterdir())
    for file in ("model.safetensors", "config.json"):
        assert (plain_files / file).read_bytes() == (our_files / file).read_bytes(), file
    plain_states = torch.load(plain_files / "optimizer.pt")
    our_states = torch.load(our_files / "optimizer.pt")
    torch.testing.assert_close(our_states, plain_states, rtol=0, atol=0)
