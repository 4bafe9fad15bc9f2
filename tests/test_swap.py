# SPDX-License-Identifier: Apache-2.0
"""The swap: what `AACETrainer` and `AACEConfig` take."""

import copy
import inspect
import pickle
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from tiny import (
    convnext,
    digits,
    identical,
    training_arguments,
    vit,
    weights,
)
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_aace import AACEArguments, AACEConfig, AACETrainer


def test_swapping_the_class_name_works_with_plain_arguments(tmp_path):
    """Every AACE field then has its default, the arguments stay the caller's, and the run is sharpness-aware."""
    arguments = training_arguments(TrainingArguments, tmp_path, max_steps=5)
    trainer = AACETrainer(model=convnext(), args=arguments, train_dataset=digits())
    trainer.train()
    assert trainer.args is arguments
    assert trainer.state.log_history[0]["rho"] == AACEConfig(output_dir=str(tmp_path)).rho
    configured = AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, max_steps=5), train_dataset=digits())
    configured.train()
    assert identical(weights(trainer.model), weights(configured.model))


def test_constructor_has_the_signature_of_trainer():
    assert inspect.signature(AACETrainer) == inspect.signature(Trainer)


def test_model_may_be_the_path_of_a_saved_one(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "vit")
    trainer = AACETrainer(str(tmp_path / "vit"), training_arguments(AACEConfig, tmp_path))
    assert identical(weights(trainer.model), weights(model))


def test_models_given_by_name_are_loaded_in_32_bits(tmp_path):
    convnext().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    trainer = AACETrainer(str(tmp_path / "model"), training_arguments(AACEConfig, tmp_path))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert Path(trainer.args.output_dir) == tmp_path


def test_config_is_training_arguments_plus_the_aace_fields(tmp_path):
    ours = {field.name for field in fields(AACEConfig)}
    assert ours - {field.name for field in fields(TrainingArguments)} == {
        "method",
        "rho",
        "perturbation_loss",
        "normalize_perturbation",
        "adaptive_perturbation",
        "aace_target",
        "ascent_fraction",
        "ascent_scope",
        "sync_ascent",
        "perturb_every",
        "ascent_every",
        "perturb_modules",
    }
    config = AACEConfig(str(tmp_path), rho=0.3)  # the first positional argument is still the output directory
    assert config.output_dir == str(tmp_path)
    assert pickle.loads(pickle.dumps(config)).rho == 0.3
    assert config.to_dict()["rho"] == 0.3


def test_defaults_are_aace_as_published():
    """With the step size that the README's results have."""
    assert asdict(AACEArguments()) == {
        "method": None,
        "rho": 0.01,
        "perturbation_loss": "aace",
        "normalize_perturbation": False,
        "adaptive_perturbation": False,
        "aace_target": "adaptive",
        "ascent_fraction": 1.0,
        "ascent_scope": "micro_batch",
        "sync_ascent": False,
        "perturb_every": 1,
        "ascent_every": 1,
        "perturb_modules": None,
    }


def test_every_field_is_a_command_line_option(tmp_path):
    command_line = (
        f"--output_dir {tmp_path} --rho 0.2 --perturbation_loss cross_entropy --normalize_perturbation "
        "--adaptive_perturbation true --aace_target uniform --ascent_fraction 0.5 --ascent_scope full_batch "
        "--sync_ascent false --perturb_every 2 --ascent_every 3 --perturb_modules classifier"
    )
    (config,) = HfArgumentParser(AACEConfig).parse_args_into_dataclasses(command_line.split())
    assert (config.rho, config.perturbation_loss, config.normalize_perturbation) == (0.2, "cross_entropy", True)
    assert (config.adaptive_perturbation, config.aace_target, config.ascent_fraction) == (True, "uniform", 0.5)
    assert (config.ascent_scope, config.perturb_modules) == ("full_batch", "classifier")
    assert (config.perturb_every, config.ascent_every) == (2, 3)
    help_text = HfArgumentParser(AACEConfig).format_help()
    assert all(f"--{field.name}" in help_text for field in fields(AACEArguments))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("aace", ("aace", False, False, 0.01)),
        ("sam", ("cross_entropy", True, False, 0.05)),
        ("asam", ("cross_entropy", True, True, 0.5)),
    ],
)
def test_a_method_sets_what_its_paper_sets_and_a_field_beside_it_wins(method, settings, tmp_path):
    def settings_of(config):
        return (
            config.perturbation_loss,
            config.normalize_perturbation,
            config.adaptive_perturbation,
            config.rho,
        )

    config = AACEConfig(str(tmp_path), method=method)
    assert settings_of(config) == settings and config.method == method
    assert settings_of(AACEConfig(str(tmp_path), method=method, rho=0.3)) == (*settings[:3], 0.3)
    plain = AACEConfig(str(tmp_path), method=method, rho=0.0)
    assert settings_of(plain) == (*settings[:3], 0.0), "0 is a value, not one left out"


@pytest.mark.parametrize("rho", [0.01, 0.05, 0.3])
def test_a_method_that_is_set_later_keeps_what_was_given(rho, tmp_path):
    """As a hyperparameter search sets both: a trial that trains with another `rho` than it records is lost."""
    config = AACEConfig(str(tmp_path))
    for method in ("sam", "aace", "sam", "asam", "aace"):
        config.method, config.rho = method, rho
        config.check_aace_arguments()
        assert config.rho == rho and config.normalize_perturbation == (method != "aace")
    config.rho = None
    config.check_aace_arguments()
    assert config.rho == 0.01, "None is left out"


def test_rho_follows_the_method_and_the_layers_unless_it_was_given(tmp_path):
    config = AACEConfig(str(tmp_path))
    for method, modules, rho in [("aace", "norm", 10), ("sam", "norm", 1), ("sam", None, 0.05), ("aace", "norm", 10)]:
        config.method, config.perturb_modules = method, modules
        config.check_aace_arguments()
        assert config.rho == rho, (method, modules)
    copied = copy.copy(config)
    copied.rho = 3.0
    config.method = "sam"
    config.check_aace_arguments()
    assert (config.rho, copied.rho) == (1, 3), "a copy has its own"


def test_an_unknown_method_is_refused_by_the_names_that_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"`method` must be one of \['aace', 'sam', 'asam'\].* got 'gsam'"):
        AACEConfig(str(tmp_path), method="gsam")
