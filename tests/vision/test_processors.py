# SPDX-License-Identifier: Apache-2.0
"""The commands with models whose images become something else than square pictures, and with those of timm."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from test_every_model import check_trains, rows
from tiny import identical, weights
from tiny_configs import image_classifier
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    ImageGPTImageProcessorPil,
    Siglip2ImageProcessorPil,
)

from hf_aace.cli import main
from hf_aace.vision.images import image_transform
from hf_aace.vision.lora import add_lora
from hf_aace.vision.models import freeze_backbone, load_model_and_processor


@pytest.fixture(autouse=True)
def _pictures(tmp_path, monkeypatch):
    """Of two classes, dark and light."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for name, level in (("dark", 0), ("light", 150)):
        Path("pets", name).mkdir(parents=True)
        for index in range(12):
            pixels = (level + generator.integers(0, 100, (20 + index, 30, 3))).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(Path("pets", name, f"{index}.png"))


def save(kind):
    """A model that the commands know as `kind`: with an image processor of its own, or as timm uploads it."""
    if kind == "siglip2":  # patches, a mask of them, and their number in both directions
        image_classifier("Siglip2ForImageClassification").save_pretrained(kind)
        Siglip2ImageProcessorPil(patch_size=4, max_num_patches=4).save_pretrained(kind)
    elif kind == "imagegpt":  # colours by number, one after the other
        image_classifier("ImageGPTForImageClassification").save_pretrained(kind)
        clusters = np.random.default_rng(0).uniform(-1, 1, (16, 3)).tolist()
        ImageGPTImageProcessorPil(clusters=clusters, size={"height": 4, "width": 4}).save_pretrained(kind)
    else:
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        model = timm.create_model(kind)
        Path(kind).mkdir()
        known = ("input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "pool_size", "first_conv")
        settings = {name: model.pretrained_cfg[name] for name in known if name in model.pretrained_cfg}
        config = {"architecture": kind, "num_classes": 1000, "num_features": 1, "pretrained_cfg": settings}
        Path(kind, "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), Path(kind, "model.safetensors"), metadata={"format": "pt"})


TIMM = ["test_resnet", "test_vit"]


@pytest.mark.parametrize("kind", ["siglip2", "imagegpt", *TIMM])
def test_all_commands_take_it(kind):
    save(kind)
    changes = [] if kind in TIMM else ["--augmentation", "none"]
    options = ["--max_steps", "3", "--per_device_train_batch_size", "8", "--disable_tqdm", "true", "--rho", "0.1"]
    data = ["--dataset_name", "pets", "--output_dir", "run", "--save_strategy", "steps", "--save_steps", "2"]
    assert main(["train", "--model_name_or_path", kind, *data, *options, *changes]) == 0
    results = json.loads(Path("run/all_results.json").read_text())

    assert main(["evaluate", "--model_name_or_path", "run", "--output_dir", "evaluation"]) == 0
    evaluation = json.loads(Path("evaluation/evaluation.json").read_text())
    assert evaluation["accuracy"] == results["eval_accuracy"]

    assert main(["predict", "--model_name_or_path", "run", "--images", "pets"]) == 0
    predictions = list(csv.DictReader(Path("predictions.csv").read_text().splitlines()))
    assert len(predictions) == 24 and {"dark", "light"} >= {row["label_1"] for row in predictions}

    few = ["--eigenvalues", "0", "--steps", "1", "--directions", "2", "--max_samples", "8"]
    assert main(["sharpness", "run", *few, "--output_dir", "sharpness"]) == 0
    assert Path("sharpness/sharpness.json").is_file()


def test_what_kornia_cannot_change_is_told_before_training(capsys):
    save("siglip2")
    assert main(["train", "--model_name_or_path", "siglip2", "--dataset_name", "pets", "--max_steps", "3"]) == 1
    assert "Set `augmentation` to `none`" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", TIMM)
def test_a_model_of_timm_trains(kind, tmp_path):
    save(kind)
    model, _ = load_model_and_processor(kind, dict(enumerate("abc")))
    check_trains(model, rows({"pixel_values": torch.randn(8, 3, 160, 160)}, 3), tmp_path)


@pytest.mark.parametrize("kind", TIMM)
def test_the_head_of_a_model_of_timm_is_found(kind):
    save(kind)
    names = dict(enumerate("abc"))
    model, processor = load_model_and_processor(kind, names)
    freeze_backbone(model)
    head = {"test_resnet": "timm_model.fc", "test_vit": "timm_model.head"}[kind]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{head}.weight", f"{head}.bias"}

    model.save_pretrained("trained")
    processor.save_pretrained("trained")
    assert AutoConfig.from_pretrained("trained").id2label == names
    assert type(AutoImageProcessor.from_pretrained("trained")) is type(processor)
    same, _ = load_model_and_processor("trained", names)
    assert identical(weights(same), weights(model))
    other, _ = load_model_and_processor("trained", dict(enumerate("bac")))
    changed = {name for name, value in weights(other).items() if not torch.equal(value, weights(model)[name])}
    assert f"{head}.weight" in changed <= {f"{head}.weight", f"{head}.bias"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_a_transformer_of_timm_gets_adapters():
    save("test_vit")
    model, _ = load_model_and_processor("test_vit", dict(enumerate("abc")))
    trainable = [name for name, p in add_lora(model).named_parameters() if p.requires_grad]
    assert any(".qkv.lora_A." in name for name in trainable)
    assert all(".lora_" in name or "timm_model.head." in name for name in trainable)


def test_a_huge_jpeg_is_decoded_smaller_for_timm_too(monkeypatch):
    save("test_vit")
    processor = AutoImageProcessor.from_pretrained("test_vit")
    seen, original = [], type(processor).__call__
    monkeypatch.setattr(
        type(processor),
        "__call__",
        lambda self, images, **kwargs: (seen.extend(images), original(self, images, **kwargs))[1],
    )
    PIL.Image.new("RGB", (4096, 4096)).save("huge.jpg")
    image = {"path": "huge.jpg", "bytes": Path("huge.jpg").read_bytes()}
    assert image_transform(processor)({"image": [image], "label": [0]})["pixel_values"].shape == (1, 3, 160, 160)
    assert [image.size for image in seen] == [(512, 512)]


def test_the_benchmark_finds_the_size_of_timm():
    save("test_vit")
    options = ["--batch_size", "2", "--rounds", "2", "--warmup", "1", "--fractions", "0.5", "--output_dir", "cost"]
    assert main(["benchmark", "--model_name_or_path", "test_vit", *options]) == 0
