# SPDX-License-Identifier: Apache-2.0
"""The model card says what was trained, how, what it reached and cost, and how to load it."""

import dataclasses

import pytest
from huggingface_hub import ModelCard
from tiny import digits, training_arguments, vit
from transformers import Trainer, TrainerCallback, TrainingArguments

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


def test_an_expression_with_a_bar_stays_in_its_cell(tmp_path):
    """A bar would end the cell, even inside code."""
    written, _ = card(tmp_path, perturb_modules="norm|classifier")
    assert r"| `perturb_modules` | `norm\|classifier` |" in written.text


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
        trainer.create_model_card("en", "mit", ["second"], "Sorter", "google/vit", dataset="beans")

    written, _ = card(tmp_path, write=write)
    assert written.text.strip().startswith("# Sorter")
    assert "fine-tuned from [google/vit](https://huggingface.co/google/vit) on the dataset beans" in written.text
    assert (written.data.license, written.data.base_model) == ("mit", "google/vit")
    assert {"first", "second"} <= set(written.data.tags)  # those of the card that was there are kept


@pytest.mark.parametrize("tags", [None, "own"])
def test_tags_at_rho_0_are_those_of_plain_trainer(tags, tmp_path):
    """Plain Trainer keeps the tags of a card that is there only if it is given others."""
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


def resumed_card(output_dir, **kwargs):
    """The card of a run of four epochs that was stopped after two and resumed."""

    class Stop(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.epoch >= 2

    settings = {"num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    for callbacks, resume in (([Stop()], None), ([], True)):
        trainer = AACETrainer(
            vit(),
            training_arguments(AACEConfig, output_dir, **settings, **kwargs),
            train_dataset=digits(64),
            eval_dataset=digits(32),
            compute_metrics=compute_metrics_fn(["accuracy"]),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume)
    trainer.create_model_card()
    return ModelCard.load(output_dir / "README.md").text, trainer


def test_evaluations_before_and_after_a_resume_stand_in_the_same_columns(tmp_path):
    """Those before come from a file whose keys are sorted: their accuracy stood under the loss."""
    text, trainer = resumed_card(tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.count("|") > 4]
    header, values = rows[0], rows[2:]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(values) == len(evaluations) == 4
    for row, entry in zip(values, evaluations, strict=True):
        shown = dict(zip(header, row, strict=True))
        assert float(shown["Validation Loss"]) == pytest.approx(entry["eval_loss"], abs=1e-4)
        assert float(shown["Accuracy"]) == pytest.approx(entry["eval_accuracy"], abs=1e-4)


def test_time_of_a_resumed_run_says_from_where(tmp_path):
    assert "This is the time since it was resumed at step 8." in resumed_card(tmp_path)[0]
    assert "resumed" not in card(tmp_path / "whole")[0].text


@pytest.mark.parametrize("which", ["first", "second"])
def test_results_are_those_of_the_weights_that_are_saved(which, tmp_path):
    """With `load_best_model_at_end` they are not those of the last evaluation."""
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": which == "first"}
    text, trainer = resumed_card(tmp_path, learning_rate=1e-3, **settings)
    best = trainer.state.best_global_step
    entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == best)
    assert f"| Loss | {entry['eval_loss']:.4g} |" in text and "Best evaluation" in text
    assert trainer.evaluate()["eval_loss"] == pytest.approx(entry["eval_loss"], rel=1e-4)
    trainer.create_model_card()
    assert "Last evaluation" in ModelCard.load(tmp_path / "README.md").text


def test_card_lists_the_facts_that_it_is_given(tmp_path):
    facts = {"Images": "64 for training, 32 for the test", "Steps": "2 of 16 images"}
    text = card(tmp_path, write=lambda trainer: trainer.create_model_card(facts=facts))[0].text
    assert "- Images: 64 for training, 32 for the test\n- Steps: 2 of 16 images\n" in text
