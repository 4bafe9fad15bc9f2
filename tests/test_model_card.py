# SPDX-License-Identifier: Apache-2.0
"""The model card says what was trained, how, what it reached and cost, and how to load it."""

import dataclasses

import pytest
from huggingface_hub import ModelCard
from tiny import digits, training_arguments, vit
from transformers import Trainer, TrainingArguments

from hf_aace import AACEArguments, AACEConfig, AACETrainer
from hf_aace.vision.metrics import compute_metrics_fn


def card(output_dir, model=None, cls=AACEConfig, write=lambda trainer: trainer.create_model_card(), **kwargs):
    arguments = training_arguments(cls, output_dir, max_steps=2, eval_strategy="steps", eval_steps=1, **kwargs)
    trainer = AACETrainer(
        model or vit(),
        arguments,
        train_dataset=digits(64),
        eval_dataset=digits(32),
        compute_metrics=compute_metrics_fn(["accuracy"]),
    )
    trainer.train()
    write(trainer)
    return ModelCard.load(output_dir / "README.md"), trainer


def test_card_has_settings_results_cost_and_citation(tmp_path):
    written, trainer = card(tmp_path / "mine", rho=0.07, ascent_fraction=0.5)
    assert "| method | AACE |" in written.text
    for option in dataclasses.fields(AACEArguments):
        assert (
            option.name == "method" or f"| `{option.name}` | `{getattr(trainer.args, option.name)}` |" in written.text
        )
    accuracy = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    assert f"| Accuracy | {accuracy:.4g} |" in written.text
    speed = next(entry for entry in trainer.state.log_history if "train_runtime" in entry)["train_samples_per_second"]
    assert f"on a CPU with 1 thread ({speed:.4g} samples a second)" in written.text
    assert 'pipeline("image-classification", model="mine")' in written.text
    assert "ratchatorn2024aace" in written.text and "foret2021sam" not in written.text
    assert {"hf_aace", "sharpness-aware-minimization", "generated_from_trainer"} <= set(written.data.tags)
    assert written.data.library_name == "transformers"
    assert str(tmp_path) not in written.content


def test_card_cites_the_method_that_was_used(tmp_path):
    settings = {"perturbation_loss": "cross_entropy", "normalize_perturbation": True, "adaptive_perturbation": True}
    written, _ = card(tmp_path, **settings)
    assert "foret2021sam" in written.text and "kwon2021asam" in written.text
    assert "ratchatorn2024aace" not in written.text


@pytest.mark.parametrize("kwargs", [{"rho": 0.0}, {"cls": TrainingArguments}])
def test_card_of_plain_arguments(tmp_path, kwargs):
    written, _ = card(tmp_path, **kwargs)
    plain = "rho" in kwargs
    assert ("`rho=0`, which is the plain `Trainer`" in written.text) == plain
    assert ("hf_aace" in written.data.tags) != plain


def test_card_takes_what_trainer_takes(tmp_path):
    def write(trainer):
        trainer.create_model_card(tags="first", dataset="beans", dataset_tags="AI/beans", finetuned_from="google/vit")
        trainer.create_model_card(
            "en", "mit", ["second"], model_name="Sorter", dataset="beans", finetuned_from="google/vit"
        )

    written, _ = card(tmp_path, write=write)
    assert written.text.strip().startswith("# Sorter")
    assert "fine-tuned from [google/vit](https://huggingface.co/google/vit) on the dataset beans" in written.text
    assert (written.data.license, written.data.base_model) == ("mit", "google/vit")
    assert {"first", "second"} <= set(written.data.tags)  # those of the card that was there are kept


@pytest.mark.parametrize("tags", [None, "own"])
def test_tags_at_rho_0_are_those_of_plain_trainer(tags, tmp_path):
    """Which keeps those of a card that is there only if it is given others."""
    found = []
    for cls, config, rho in ((Trainer, TrainingArguments, {}), (AACETrainer, AACEConfig, {"rho": 0.0})):
        path = tmp_path / cls.__name__ / "README.md"
        ModelCard("---\ntags: [present]\n---\n").save(path)
        cls(vit(), training_arguments(config, path.parent, **rho)).create_model_card(tags=tags)
        found.append(sorted(ModelCard.load(path).data.tags))
    assert found[0] == found[1]
    assert ("present" in found[0]) == (tags is not None)


def test_card_does_not_tell_a_local_path(tmp_path):
    vit().save_pretrained(tmp_path / "secret")
    written, _ = card(tmp_path / "run", model=str(tmp_path / "secret"))
    assert "secret" not in written.content
    assert "from scratch" not in written.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_card_of_a_peft_model_stays_one(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(vit(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    written, _ = card(tmp_path, model=model, write=lambda t: (t.save_model(), t.create_model_card()))
    assert written.data.library_name == "peft"
    assert "Settings of sharpness-aware training" in written.text
