# SPDX-License-Identifier: Apache-2.0
"""Augmentation: what becomes of images and labels, and that each training batch, and no other, is changed once."""

import sys

import pytest
import torch
from tiny import convnext, digits, identical, training_arguments, vit, weights
from torch import nn
from transformers import TrainingArguments, ViTImageProcessorPil

from hf_aace import AACEConfig
from hf_aace.augmentation import Augmentation, AugmentedAACETrainer, AugmentedTrainer
from hf_aace.cli import main
from hf_aace.cli.train import train_parser
from hf_aace.training_loss import TrainingLoss


MEAN, STD = [0.2, 0.5, 0.6], [0.3, 0.25, 0.2]


def processor(mean=MEAN, std=STD):
    return ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=mean, image_std=std)


def pictures(count=16):
    """Normalised as `processor` does; no two pixels of an image are alike."""
    values = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {
        "pixel_values": (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1),
        "labels": torch.arange(count) % 4,
    }


def flat(count=16):
    """Image i is i / count all over, and of class i: what of which image is where can be read off."""
    values = (torch.arange(count) / count).view(count, 1, 1, 1).expand(count, 3, 32, 32)
    return {"pixel_values": values, "labels": torch.arange(count)}


def augmentation(policy="none", num_classes=16, mean=None, std=None, **kwargs):
    return Augmentation(policy, processor=processor(mean or MEAN, std or STD), num_classes=num_classes, **kwargs)


CHOICES = [
    ("default", {}),
    ("randaugment", {}),
    ("none", {"mixup": 0.5}),
    ("none", {"cutmix": 1.0}),
    ("randaugment", {"mixup": 0.5, "cutmix": 1.0}),
]


@pytest.mark.parametrize(("policy", "mixing"), CHOICES)
def test_a_batch_depends_on_the_seed_alone(policy, mixing):
    augment, batch = augmentation(policy, **mixing), pictures()
    before, state = {name: value.clone() for name, value in batch.items()}, torch.get_rng_state()
    first, again, other = augment(batch, 1), augment(batch, 1), augment(batch, 2)
    assert identical(first, again)
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert identical(batch, before) and torch.equal(torch.get_rng_state(), state)
    assert first["pixel_values"].shape == batch["pixel_values"].shape and first["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("policy", ["default", "randaugment"])
def test_images_stay_in_the_range_that_the_model_knows(policy):
    """A fault in the normalisation would show here: the changes are made between 0 and 1."""
    low, high = ((torch.tensor([0.0, 1.0])[:, None] - torch.tensor(MEAN)) / torch.tensor(STD)).split(1)
    for seed in range(10):
        images = augmentation(policy)(pictures(), seed)["pixel_values"]
        assert (images >= low.view(3, 1, 1) - 1e-5).all() and (images <= high.view(3, 1, 1) + 1e-5).all()


def test_the_default_crops_and_flips():
    """Of a horizontal ramp: half of the images end up falling, and all span the width or a part of at least 35 % * 3/4."""
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)
    images = augmentation("default", mean=[0.0] * 3, std=[1.0] * 3)(
        {"pixel_values": ramp, "labels": torch.zeros(64)}, 0
    )
    spans = images["pixel_values"][:, 0, 16, -1] - images["pixel_values"][:, 0, 16, 0]
    assert 16 < (spans < 0).sum() < 48
    assert 0.4 < spans.abs().min() < 0.75 and spans.abs().max() <= 1 + 1e-5


def test_randaugment_draws_other_operations_for_every_eight_images():
    """What is done to two copies of one image in two groups."""
    one = pictures(1)["pixel_values"]
    images = augmentation("randaugment")({"pixel_values": one.expand(64, 3, 32, 32), "labels": torch.zeros(64)}, 0)
    plain = augmentation("default")({"pixel_values": one.expand(64, 3, 32, 32), "labels": torch.zeros(64)}, 0)
    changes = (images["pixel_values"] - plain["pixel_values"]).abs().mean(dim=(1, 2, 3)).view(8, 8)
    assert changes.mean(dim=1).unique().numel() > 4


# ---- Mixing ----------------------------------------------------------------


def test_mixup_blends_images_and_labels_in_one_ratio():
    ratios = set()
    for seed in range(40):
        mixed = augmentation(mixup=0.5)(flat(), seed)
        # Each image is flat, with the value of the class that its label expects on average.
        expected = (mixed["labels"] * torch.arange(16) / 16).sum(dim=1)
        torch.testing.assert_close(mixed["pixel_values"], expected.view(16, 1, 1, 1).expand(16, 3, 32, 32))
        torch.testing.assert_close(mixed["labels"].sum(dim=1), torch.ones(16))
        ratios.add(round(mixed["labels"].max().item(), 3))
    assert len(ratios) > 10


def test_cutmix_gives_labels_by_the_area():
    changed = 0
    for seed in range(10):
        mixed = augmentation(cutmix=1.0)(flat(), seed)
        for image, label in zip(mixed["pixel_values"], mixed["labels"], strict=True):
            area = torch.bincount((image[0] * 16).round().long().flatten(), minlength=16) / 32**2
            torch.testing.assert_close(label, area)
            changed += len(label.nonzero()) == 2
    assert changed > 100


def test_with_both_each_batch_gets_one():
    kinds = set()
    for seed in range(20):
        images = augmentation(mixup=1.0, cutmix=1.0)(flat(), seed)["pixel_values"]
        kinds.add(bool((images == images[:, :, :1, :1]).all()))
    assert kinds == {True, False}


# ---- What is refused -------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "mixing", "complaint"),
    [
        ("strong", {}, "`augmentation` must be .* got 'strong'"),
        ("none", {"mixup": -0.1}, r"`mixup` must be 0 \(off\) or more, got -0.1"),
        ("none", {"cutmix": float("nan")}, r"`cutmix` must be 0 \(off\) or more, got nan"),
    ],
)
def test_bad_settings_are_refused(policy, mixing, complaint):
    with pytest.raises(ValueError, match=complaint):
        augmentation(policy, **mixing)


def test_pixels_that_are_no_images_are_refused():
    with pytest.raises(ValueError, match=r"shape \(batch, channels, height, width\), got \(16, 9, 48\)"):
        augmentation("default")({"pixel_values": torch.rand(16, 9, 48), "labels": torch.arange(16)}, 0)


def test_without_kornia_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    argv = ["train", "--max_steps", "1", "--mixup", "0.2", "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 1
    assert "Augmentation needs kornia: pip install 'hf-aace[augmentation]'" in capsys.readouterr().err
    assert main(argv[:3] + argv[5:] + ["--save_strategy", "no", "--eval_strategy", "no"]) == 0  # needed for that alone
