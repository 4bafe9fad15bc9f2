# SPDX-License-Identifier: Apache-2.0
"""Every image classifier of Transformers trains, and so does whatever else returns logits `(batch, classes)`."""

import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import VANISHING, identical, training_arguments, weights
from tiny_configs import IMAGE_CLASSIFIERS, NUM_LABELS, image_classifier, inputs
from torch import nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_aace import AACEConfig, AACETrainer


# The image classifiers that are not trained here, and why.
NOT_TRAINED = {
    "DinatForImageClassification": "needs the library natten",
    "TimmWrapperForImageClassification": "needs the library timm",  # where it is installed, in test_processors.py
}
REAL = 0.05
STEPS = 2
BATCH = 4


def rows(columns: dict[str, torch.Tensor], num_labels: int = NUM_LABELS) -> list[dict]:
    count = STEPS * BATCH
    return [{**{key: value[i] for key, value in columns.items()}, "labels": i % num_labels} for i in range(count)]


def train(cls, config, model, dataset, output_dir, *, label_names=None, compute_loss_func=None, **kwargs):
    arguments = training_arguments(
        config,
        output_dir,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        logging_steps=1,
        label_names=label_names,
        **kwargs,
    )
    trainer = cls(copy.deepcopy(model), arguments, train_dataset=dataset, compute_loss_func=compute_loss_func)
    trainer.train()
    return trainer


def step_logs(trainer) -> list[dict]:
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == STEPS
    return logs


def check_trains(model, dataset, output_dir, *, ours=AACETrainer, **kwargs):
    untrained = weights(model)
    expected = weights(train(Trainer, TrainingArguments, model, dataset, output_dir, **kwargs).model)
    assert not identical(expected, untrained), "plain training moves nothing, so equality with it would show nothing"

    off = train(ours, AACEConfig, model, dataset, output_dir, rho=0, **kwargs)
    assert identical(weights(off.model), expected), "rho=0 is plain training"

    vanishing = train(ours, AACEConfig, model, dataset, output_dir, rho=VANISHING, **kwargs)
    assert identical(weights(vanishing.model), expected), "the ascent pass leaves no trace but its step"
    assert all(log["ascent_grad_norm"] > 0 for log in step_logs(vanishing)), "there was an ascent pass"

    real = train(ours, AACEConfig, model, dataset, output_dir, rho=REAL, **kwargs)
    trained = weights(real.model)
    assert not identical(trained, expected), "a real step has an effect"
    assert all(value.isfinite().all() for value in trained.values())
    for log in step_logs(real):
        assert math.isfinite(log["ascent_loss"])
        assert log["perturbation_norm"] > 0
        assert log["skipped_perturbations"] == 0


# ---- Image classifiers ----------------------------------------------------------------------------------------------


def mapped_classes() -> set[str]:
    """The names of the classes that `AutoModelForImageClassification` may give."""
    entries = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}


def logits_of(outputs) -> torch.Tensor:
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def cross_entropy(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    return F.cross_entropy(logits_of(outputs), labels)


class LogitsElsewhereTrainer(AACETrainer):
    """For a model that calls its logits `last_hidden_state`."""

    def ascent_logits(self, outputs):
        return super().ascent_logits({"logits": logits_of(outputs)})


# These compute no loss of those logits. Without an argument for labels, Trainer must be told to pass them on.
WITHOUT_LOSS = {
    "DeiTForImageClassificationWithTeacher": {"label_names": ["labels"]},
    "LevitForImageClassificationWithTeacher": {"label_names": ["labels"]},
    "PPLCNetForImageClassification": {"label_names": ["labels"], "ours": LogitsElsewhereTrainer},
    "ShieldGemma2ForImageClassification": {},
}


@pytest.mark.parametrize("name", IMAGE_CLASSIFIERS)
def test_image_classifier_trains(name, tmp_path):
    model = image_classifier(name)
    kwargs = {"compute_loss_func": cross_entropy, **WITHOUT_LOSS[name]} if name in WITHOUT_LOSS else {}
    dataset = rows(inputs(name, STEPS * BATCH), model.config.num_labels)
    check_trains(model, dataset, tmp_path, **kwargs)


def test_no_image_classifier_is_left_out():
    listed, mapped = IMAGE_CLASSIFIERS.keys() | NOT_TRAINED.keys(), mapped_classes()
    assert not IMAGE_CLASSIFIERS.keys() & NOT_TRAINED.keys(), "a class is either trained or not"
    assert not mapped - listed, (
        f"Transformers {transformers.__version__} has new image classifiers: {sorted(mapped - listed)}. Add a tiny "
        "configuration of each to IMAGE_CLASSIFIERS of tiny_configs.py, or, if it cannot be trained, its reason to "
        "NOT_TRAINED of test_every_model.py."
    )
    gone = listed - mapped
    assert not gone, f"Transformers {transformers.__version__} has no {sorted(gone)}: remove them from there."


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_reason_for_not_training_is_true(name):
    library = NOT_TRAINED[name].removeprefix("needs the library ")
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed here")
    cls = getattr(transformers, name)
    with pytest.raises(ImportError, match=library):
        cls(cls.config_class())


# ---- Others ---------------------------------------------------------------------------------------------------------


def test_text_classifier(tmp_path):
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=NUM_LABELS,
    )
    mask = torch.ones(STEPS * BATCH, 8, dtype=torch.long)
    mask[::2, 5:] = 0  # sentences of two lengths
    columns = {"input_ids": torch.randint(1, 32, mask.shape) * mask, "attention_mask": mask}
    check_trains(BertForSequenceClassification(config), rows(columns), tmp_path)


def test_audio_classifier_that_draws_from_numpy(tmp_path):
    """Wav2Vec2 draws the layers to drop and the spans of SpecAugment from NumPy, and dropout from PyTorch."""
    config = Wav2Vec2Config(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8, 8],
        conv_stride=[4, 4],
        conv_kernel=[8, 4],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        layerdrop=0.5,
        mask_time_prob=0.3,
        mask_time_length=2,
        mask_feature_prob=0.3,
        mask_feature_length=2,
        num_labels=NUM_LABELS,
    )
    columns = {"input_values": torch.randn(STEPS * BATCH, 320)}
    check_trains(Wav2Vec2ForSequenceClassification(config), rows(columns), tmp_path)


def test_audio_classifier_of_spectrograms(tmp_path):
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=16,
        num_mel_bins=8,
        num_labels=NUM_LABELS,
    )
    columns = {"input_values": torch.randn(STEPS * BATCH, 16, 8)}
    check_trains(ASTForAudioClassification(config), rows(columns), tmp_path)


class Network(nn.Module):
    """Not of Transformers: no config; it returns the bare logits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, NUM_LABELS)
        )

    def forward(self, x):
        return self.layers(x)


class NetworkWithLoss(Network):
    """It returns a tuple, in which the loss comes first when there are labels."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


def test_module_that_returns_a_tuple(tmp_path):
    check_trains(NetworkWithLoss(), rows({"x": torch.randn(STEPS * BATCH, 8)}), tmp_path)


class NetworkThatDemandsLabels(Network):
    """It cannot be called without labels."""

    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x, labels):
        logits = super().forward(x)
        loss = F.cross_entropy(logits, labels)
        return (loss, logits) if self.as_tuple else {"loss": loss, "logits": logits}


@pytest.mark.parametrize("as_tuple", [True, False])
def test_module_that_demands_labels(as_tuple, tmp_path):
    model, dataset = NetworkThatDemandsLabels(as_tuple), rows({"x": torch.randn(STEPS * BATCH, 8)})
    check_trains(model, dataset, tmp_path)

    twin = NetworkWithLoss()
    twin.load_state_dict(model.state_dict())
    settings = {"rho": REAL, "bf16": True, "ascent_fraction": 0.5}
    first, second = (train(AACETrainer, AACEConfig, each, dataset, tmp_path, **settings) for each in (model, twin))
    assert identical(weights(first.model), weights(second.model)), (
        "the loss that it computes plays no part in the ascent"
    )


def test_module_that_returns_logits(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs, labels)

    dataset = rows({"x": torch.randn(STEPS * BATCH, 8)})
    check_trains(Network(), dataset, tmp_path, label_names=["labels"], compute_loss_func=loss)
