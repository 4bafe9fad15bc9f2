# SPDX-License-Identifier: Apache-2.0
"""The built-in models and the loading of others."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline, set_seed

from hf_aace.models import BUILTIN_MODELS, load_model_and_processor


ID2LABEL = {0: "zero", 1: "one", 2: "two"}


def scan(mode):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).convert(mode)


def build(name, seed=0, id2label=ID2LABEL):
    set_seed(seed)
    return load_model_and_processor(name, id2label)


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_builtin_models_are_small_and_know_their_classes(name):
    model, processor = build(name)
    assert 50_000 < sum(parameter.numel() for parameter in model.parameters()) < 300_000
    assert (model.config.id2label, model.config.label2id) == (ID2LABEL, {"zero": 0, "one": 1, "two": 2})
    logits = model(**processor([scan("RGB")], return_tensors="pt")).logits
    assert logits.shape == (1, 3)


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_builtin_models_are_drawn_from_the_torch_seed(name):
    first, again, other = (build(name, seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["convnext-tiny-digits", "vit-tiny-digits"])
def test_every_pixel_reaches_a_builtin_model_unchanged(name):
    """8x8 scans have no pixel to spare: no resizing, no cropping. (What the ResNet sees is enlarged.)"""
    pixel_values = build(name)[1]([scan("L")], return_tensors="pt")["pixel_values"]
    expected = torch.tensor(np.asarray(scan("L")) / 255 * 2 - 1, dtype=torch.float32).expand(1, 3, 8, 8)
    torch.testing.assert_close(pixel_values, expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_saved_builtin_models_load_as_any_model_does(name, mode, tmp_path):
    model, processor = build(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    inputs = AutoImageProcessor.from_pretrained(tmp_path)([scan(mode)], return_tensors="pt")
    with torch.no_grad():
        probabilities = loaded(**inputs).logits.softmax(-1)[0]
        torch.testing.assert_close(
            probabilities, model.eval()(**processor([scan(mode)], return_tensors="pt")).logits.softmax(-1)[0]
        )
    answers = pipeline("image-classification", model=str(tmp_path), device="cpu")(scan(mode))
    assert {answer["label"]: answer["score"] for answer in answers} == {
        label: pytest.approx(probabilities[index].item(), abs=1e-6) for index, label in ID2LABEL.items()
    }


def test_a_folder_loads_with_its_weights_and_another_head(tmp_path):
    model, processor = build("vit-tiny-digits")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = build(str(tmp_path), id2label={0: "cat", 1: "dog"})
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    assert loaded.classifier.out_features == 2
    # Weights in 16 bits cannot be perturbed.
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    saved = model.state_dict()
    for key, value in loaded.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(value, saved[key].float()), key


@pytest.mark.parametrize("content", [None, {}, {"model_type": "gpt2"}])
def test_what_is_no_image_classifier_is_refused(tmp_path, content):
    name = tmp_path / "model"
    if content is not None:
        name.mkdir()
        (name / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`model_name_or_path` is .*convnext-tiny-digits, vit-tiny-digits") as error:
        load_model_and_processor(str(name), ID2LABEL)
    assert str(name) in str(error.value)
    assert "\n" not in str(error.value)
