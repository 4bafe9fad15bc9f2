# SPDX-License-Identifier: Apache-2.0
"""A run that was killed and resumed ends bit for bit as one that never was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from resumable_run import CASES, folder_of, make_trainer
from safetensors.torch import load_file, save_file
from tiny import convnext, digits, identical, learning_curve, training_arguments, vit, weights
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForSequenceClassification,
    TrainerCallback,
    TrainerState,
    ViTForImageClassification,
)
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_aace import AACEConfig, AACETrainer


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder in which each killed run has left one."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("resumable_run.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES, ids=folder_of)
def test_killed_and_resumed_run_ends_as_one_never_killed(case, killed, tmp_path):
    """
    In the middle of an epoch and of an accumulation; ViT too, whose weights Trainer of transformers 5.23 loses; and with
    an ascent gradient that is reused, which no checkpoint holds.
    """
    folder = killed / folder_of(case)
    assert (folder / "checkpoint-8").is_dir()
    assert not (folder / "checkpoint-12").exists()

    uninterrupted = make_trainer(case, tmp_path)
    uninterrupted.train()
    uninterrupted_rng = torch.get_rng_state()
    resumed = make_trainer(case, folder)
    resumed.train(resume_from_checkpoint=True)

    assert identical(weights(resumed.model), weights(uninterrupted.model))
    assert torch.equal(torch.get_rng_state(), uninterrupted_rng)
    first, second = (torch.load(run / "checkpoint-20" / "optimizer.pt") for run in (tmp_path, folder))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    # Trainer averages its logs from the resumed step on, so the entry that spans the kill differs; later ones do not.
    assert learning_curve(resumed)[-3:-1] == learning_curve(uninterrupted)[-3:-1]


def test_a_run_told_to_terminate_saves_unperturbed_weights(tmp_path):
    """By Trainer's `enable_jit_checkpoint`, and with the weights perturbed when the signal comes."""

    def trainer(output_dir):
        arguments = training_arguments(AACEConfig, output_dir, max_steps=4, rho=0.05, enable_jit_checkpoint=True)
        return AACETrainer(convnext(), arguments, train_dataset=digits())

    uninterrupted = trainer(tmp_path / "uninterrupted")
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = weights(model)

    uninterrupted.add_callback(Keep())
    uninterrupted.train()

    told = trainer(tmp_path / "told")
    (manager,) = [c.jit_manager for c in told.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
    manager.kill_wait = 0

    def tell(module, arguments):
        if told.state.global_step == 2 and not identical(weights(module), kept[2]):
            hook.remove()
            os.kill(os.getpid(), signal.SIGTERM)
            while not manager.is_checkpoint_requested:
                time.sleep(0.001)

    hook = told.model.register_forward_pre_hook(tell)
    told.train()
    assert told.state.global_step == 3
    checkpoint = tmp_path / "told" / "checkpoint-2"
    saved = convnext()
    saved.load_state_dict(load_file(checkpoint / "model.safetensors"))
    assert identical(weights(saved), kept[2])
    resumed = trainer(tmp_path / "told")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert identical(weights(resumed.model), weights(uninterrupted.model))


def bfloat16_in_its_configuration(model):
    """As one loaded from a checkpoint of 16 bits and made `float()`."""
    model.config.dtype = torch.bfloat16
    return model


def own_head(model):
    model.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 10))
    return model


class OwnForImageClassification(ViTForImageClassification):
    def __init__(self, config, something):
        super().__init__(config)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        bfloat16_in_its_configuration,
        own_head,
        lambda model: OwnForImageClassification(model.config, 1),
    ],
    ids=["vit", "bfloat16", "own head", "own class"],
)
def test_best_vit_is_loaded_at_the_end(change, tmp_path):
    """Trainer of transformers 5.23 would keep most of the last weights instead, silently."""
    arguments = training_arguments(
        AACEConfig,
        tmp_path,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first checkpoint is the "best"
    )
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[f"{tmp_path}/checkpoint-{state.global_step}"] = weights(model)

    trainer = AACETrainer(
        change(vit()), arguments, train_dataset=digits(), eval_dataset=digits(32), callbacks=[Keep()]
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-8")
    assert identical(weights(trainer.model), kept[best])


def test_a_vit_that_the_user_compiled_is_resumed(tmp_path):
    """Its checkpoints have the names of the model inside."""

    def trainer(steps):
        arguments = training_arguments(
            AACEConfig, tmp_path, max_steps=steps, save_strategy="steps", save_steps=2, remove_unused_columns=False
        )
        return AACETrainer(torch.compile(vit(), backend="eager"), arguments, train_dataset=digits())

    whole = trainer(4)
    whole.train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert identical(weights(resumed.model), weights(whole.model))


def mixtral():
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_labels=3,
    )
    return MixtralForSequenceClassification(config)


def tied():
    model = vit()
    model.same_classifier = model.classifier
    model._tied_weights_keys = {f"same_classifier.{name}": f"classifier.{name}" for name in ("weight", "bias")}
    return model


class Loaded(Exception):
    """Ends a training where its first step would begin."""


class StopWhenLoaded(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise Loaded


def weights_after_resuming(model, checkpoint):
    """Returns the weights with which a training that is resumed from a checkpoint takes its first step."""
    TrainerState(max_steps=2, global_step=1, train_batch_size=16).save_to_json(str(checkpoint / "trainer_state.json"))
    arguments = training_arguments(AACEConfig, checkpoint / "run", max_steps=2)
    trainer = AACETrainer(model, arguments, train_dataset=digits(16), callbacks=[StopWhenLoaded()])
    with pytest.raises(Loaded):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return weights(model)


def saved_and_other(make):
    saved, other = make(), make()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert not identical(weights(saved), weights(other))
    return saved, other


@pytest.mark.parametrize("max_shard_size", ["5GB", "9KB"])
@pytest.mark.parametrize("make", [vit, tied, mixtral], ids=["renamed", "tied", "merged"])
def test_weights_saved_under_other_names_are_found(make, max_shard_size, tmp_path):
    """
    Renamed only (ViT), also with weights of two names, of which one is saved, or merged from several (the experts of a
    mixture); in one file or in several.
    """
    saved, other = saved_and_other(make)
    saved.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) is (max_shard_size == "9KB")
    assert not {name for file in files for name in load_file(file)} <= set(other.state_dict()), "there are other names"
    assert identical(weights_after_resuming(other, tmp_path), weights(saved))


@pytest.mark.parametrize(("make", "head"), [(vit, "classifier"), (mixtral, "score")], ids=["renamed", "merged"])
def test_of_what_a_checkpoint_holds_beside_the_weights_nothing_is_taken(make, head, tmp_path):
    """And what it lacks is told, not drawn at random."""
    saved, other = saved_and_other(make)
    saved.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"something.else": torch.zeros(3)}, file, metadata={"format": "pt"})
    assert identical(weights_after_resuming(other, tmp_path), weights(saved))
    del tensors[f"{head}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=rf"lacks weights of {type(other).__name__}: \['{head}.weight'\]"):
        weights_after_resuming(other, tmp_path)
    assert identical(weights(other), weights(saved))


def test_checkpoint_that_lacks_weights_is_refused(tmp_path):
    trainer = AACETrainer(
        vit(),
        training_arguments(AACEConfig, tmp_path, max_steps=2, save_strategy="steps", save_steps=2),
        train_dataset=digits(),
    )
    trainer.train()
    saved = weights(trainer.model)
    smaller = vit()
    smaller.vit.layers = smaller.vit.layers[:1]
    smaller.save_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(RuntimeError, match="lacks weights of ViTForImageClassification"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert identical(weights(trainer.model), saved)
