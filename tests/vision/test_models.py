# SPDX-License-Identifier: Apache-2.0
"""The built-in models and the loading of others."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import resnet
from tiny_configs import IMAGE_CLASSIFIERS, image_classifier
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    pipeline,
    set_seed,
)

from hf_aace.vision.lora import add_lora
from hf_aace.vision.models import (
    BUILTIN_MODELS,
    freeze_backbone,
    head_parameters,
    load_classifier,
    load_model_and_processor,
)


ID2LABEL = {0: "zero", 1: "one", 2: "two"}


def scan(mode):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).convert(mode)


def build(name, seed=0, id2label=ID2LABEL):
    set_seed(seed)
    return load_model_and_processor(name, id2label)


def configured(folder, **config):
    """A trained classifier of three classes, with changes to its configuration."""
    model, processor = build("vit-tiny-digits")
    for part in (model, processor):
        part.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def test_a_model_for_several_classes_at_once_is_trained_for_one_and_not_evaluated_as_it_is(tmp_path):
    name = configured(tmp_path, problem_type="multi_label_classification")
    model, processor = load_model_and_processor(name, {0: "well", 1: "ill"})
    loss = model(**processor([scan("RGB")], return_tensors="pt"), labels=torch.tensor([1])).loss
    assert loss.isfinite() and model.config.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match="`problem_type` is 'multi_label_classification', so that it does not give"):
        load_classifier(name)


@pytest.mark.parametrize("load", [load_classifier, lambda name: load_model_and_processor(name, {0: "well", 1: "ill"})])
def test_a_model_of_one_channel_is_refused_by_name(load, tmp_path):
    model, processor = build("vit-tiny-digits")
    model.config.num_channels = 1
    type(model)(model.config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_channels` is 1, but images are read as red, green and blue"):
        load(str(tmp_path))


def test_class_numbers_with_gaps_are_refused_and_serve_to_train_others(tmp_path):
    """As conversion scripts of ImageNet-22k leave them. Nothing says whether the head has the gaps too."""
    name = configured(tmp_path, id2label={"0": "zero", "1": "one", "3": "three"})
    with pytest.raises(ValueError, match="`id2label` does not number the 3 classes from 0 on"):
        load_classifier(name)
    assert load_model_and_processor(name, ID2LABEL)[0].config.id2label == ID2LABEL


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


# ---- Whose head is kept ----------------------------------------------------


def saved(folder, id2label, dtype=torch.float32):
    model, processor = build("vit-tiny-digits", id2label=id2label)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        (["zero", "one", "two"], ["zero", "one", "two"], True),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["zero", "one", "two"], True),  # no names are no other names
        (["cat", "dog", "cow"], ["zero", "one", "two"], False),
        (["one", "zero", "two"], ["zero", "one", "two"], False),
        (["zero", "one", "two", "three"], ["zero", "one", "two"], False),
        (["LABEL_0", "LABEL_1"], ["zero", "one", "two"], False),
    ],
)
def test_the_head_is_kept_for_the_same_classes_only(tmp_path, before, now, kept):
    """As many classes of other names are another task, though the weights would fit."""
    model = saved(tmp_path, dict(enumerate(before)))
    with torch.no_grad():
        model.classifier.bias.fill_(1.0)
    model.save_pretrained(tmp_path)
    loaded, _ = build(str(tmp_path), id2label=dict(enumerate(now)))
    assert list(loaded.config.id2label.values()) == now
    assert bool((loaded.classifier.bias == 1).all()) == kept
    if kept:
        assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    else:  # as a model that is made anew has it
        assert (loaded.classifier.bias == 0).all() and 0.01 < loaded.classifier.weight.std() < 0.03
    assert torch.equal(loaded.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize("name", [name for name in IMAGE_CLASSIFIERS if not name.startswith("ShieldGemma2")])
def test_the_last_layer_of_every_classifier_is_found(name):
    """ShieldGemma2 answers in words, and has none."""
    model = image_classifier(name)
    random_state = torch.get_rng_state()
    head = head_parameters(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert head
    parameters = dict(model.named_parameters())
    assert all(model.config.num_labels in parameters[name].shape for name in head)
    freeze_backbone(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert head <= trained
    assert sum(parameters[name].numel() for name in trained) < 0.5 * sum(p.numel() for p in parameters.values())


# ---- What is loaded, and what is not ---------------------------------------


def test_weights_that_are_not_safetensors_are_loaded_only_if_asked(tmp_path):
    model = saved(tmp_path, ID2LABEL)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors.*set `allow_pickle`"):
        build(str(tmp_path))
    loaded, _ = load_model_and_processor(str(tmp_path), ID2LABEL, allow_pickle=True)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_code_that_comes_with_a_model_is_not_run_unless_trusted(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mine",
                "auto_map": {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.M"},
            }
        )
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        build(str(tmp_path))
    with pytest.raises(SystemExit, match="this code was run"):
        load_model_and_processor(str(tmp_path), ID2LABEL, trust_remote_code=True)


# ---- LoRA ------------------------------------------------------------------

pytest_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it


@pytest_peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_and_head_are_trained_in_32_bits_and_merge(dtype):
    model, processor = build("vit-tiny-digits")
    model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = add_lora(model, rank=2)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert any("lora_A" in name for name in trained) and any("classifier" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {dtype}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = processor([scan("RGB")], return_tensors="pt")
    expected = adapted.eval().float()(**inputs).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model) and merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(merged.eval()(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert not torch.equal(merged.vit.layers[0].mlp.fc1.weight, before["vit.layers.0.mlp.fc1.weight"].float())


@pytest_peft
def test_layers_to_adapt_must_exist():
    with pytest.raises(ValueError, match=r"`lora_target_modules` is \['all-linear'\].*no layers of ResNet"):
        add_lora(resnet())
    with pytest.raises(ValueError, match=r"`lora_target_modules` is \['nothing'\]"):
        add_lora(build("vit-tiny-digits")[0], target_modules=["nothing"])
    with pytest.raises(ValueError, match="`lora_rank` must be at least 1, got 0"):
        add_lora(resnet(), rank=0)
    adapted = add_lora(resnet(), rank=2, target_modules=["convolution"])
    assert any("lora_A" in name for name, p in adapted.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("names", [["rose", "tulip"], ["rose", "tulip", "daisy"]])
def test_a_timm_model_that_was_trained_before_is_saved_with_its_new_classes(names, tmp_path):
    """Transformers itself would write those of the training before."""
    timm = pytest.importorskip("timm")
    settings = timm.create_model("test_resnet").pretrained_cfg
    config = TimmWrapperConfig(architecture="test_resnet", pretrained_cfg=settings, id2label={0: "cat", 1: "dog"})
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "first")
    model, _ = load_model_and_processor(str(tmp_path / "first"), dict(enumerate(names)))
    model.save_pretrained(tmp_path / "second")
    assert list(load_classifier(str(tmp_path / "second"))[0].config.id2label.values()) == names
