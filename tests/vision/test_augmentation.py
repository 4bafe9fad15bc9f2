# SPDX-License-Identifier: Apache-2.0
"""Augmentation: what becomes of images and labels, and that each training batch, and no other, is changed once."""

import kornia.augmentation as K
import PIL.Image
import pytest
import torch
import transformers
from kornia.augmentation.auto.rand_augment.rand_augment import default_policy
from tiny import convnext, digits, identical, training_arguments, vit, weights
from torch import nn
from transformers import Siglip2ImageProcessorPil, TrainingArguments, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_aace import AACEConfig
from hf_aace.cli import main
from hf_aace.cli.train import train_parser
from hf_aace.vision.augmentation import Augmentation, AugmentedAACETrainer, AugmentedTrainer
from hf_aace.vision.weighted_loss import WeightedCrossEntropy


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


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64), (96, 32)])
def test_a_crop_changes_the_ratio_of_width_to_height_by_a_third_at_most(height, width):
    """Of an image of any shape. How far it was stretched is read off two ramps, one along each side."""
    across = torch.linspace(0, 1, width).expand(height, width)
    down = torch.linspace(0, 1, height).unsqueeze(1).expand(height, width)
    images = torch.stack([across, down, down]).expand(64, 3, height, width)
    plain = augmentation("default", mean=[0.0] * 3, std=[1.0] * 3)
    changed = plain({"pixel_values": images, "labels": torch.zeros(64, dtype=torch.long)}, seed=0)["pixel_values"]
    share_of_width = changed[:, 0].diff(dim=2).abs().mean(dim=(1, 2)) * (width - 1)
    share_of_height = changed[:, 1].diff(dim=1).abs().mean(dim=(1, 2)) * (height - 1)
    stretched = share_of_height / share_of_width
    assert 0.7 < stretched.min() < 0.9 and 1.1 < stretched.max() < 1.4
    assert (share_of_width * share_of_height > 0.3).all(), "a crop has at least 35 % of the image"


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


@pytest.mark.parametrize("policy", ["none", "default"])
def test_flat_images_stay_as_they_are(policy):
    """They are cut and flipped on the scale of pixels, and normalised again."""
    images = flat()
    changed = augmentation(policy)(images, 0)["pixel_values"]
    torch.testing.assert_close(changed, images["pixel_values"], rtol=0, atol=1e-5)


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
    """Compare what is done to copies of one image in two groups."""
    one = pictures(1)["pixel_values"]
    images = augmentation("randaugment")({"pixel_values": one.expand(64, 3, 32, 32), "labels": torch.zeros(64)}, 0)
    plain = augmentation("default")({"pixel_values": one.expand(64, 3, 32, 32), "labels": torch.zeros(64)}, 0)
    changes = (images["pixel_values"] - plain["pixel_values"]).abs().mean(dim=(1, 2, 3)).view(8, 8)
    assert changes.mean(dim=1).unique().numel() > 4
    # Of a grey image the operations of a group leave so many versions.
    grey = {"pixel_values": torch.full((64, 3, 32, 32), 0.3), "labels": torch.zeros(64)}
    images = augmentation("randaugment", mean=[0.0] * 3, std=[1.0] * 3)(grey, 0)["pixel_values"]
    assert len({len(group.mul(1e4).round().flatten(1).unique(dim=0)) for group in images.split(8)}) > 2


def test_randaugment_has_magnitude_9_of_30(monkeypatch):
    """Solarize alone inverts what is lighter than 9 / 30."""
    (solarize,) = [entry for entry in default_policy if entry[0][0] == "solarize"]
    randaugment = K.auto.RandAugment
    monkeypatch.setattr(K.auto, "RandAugment", lambda n, m: randaugment(n=1, m=m, policy=[solarize]))
    images = torch.linspace(0, 1, 64).view(64, 1, 1, 1).expand(64, 3, 32, 32)
    augment = augmentation("randaugment", mean=[0.0] * 3, std=[1.0] * 3)
    changed = augment({"pixel_values": images, "labels": torch.zeros(64)}, 0)["pixel_values"]
    torch.testing.assert_close(changed, torch.where(images < 0.3, images, 1 - images))


def image_processors():
    """Those of the image classifiers that come with settings, and make pictures of one size."""
    types = {
        kind
        for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        for kind in dict(IMAGE_PROCESSOR_MAPPING_NAMES.get(name, {})).values()
        if kind.endswith("Pil")
    }
    return sorted(types - {"ImageGPTImageProcessorPil", "Siglip2ImageProcessorPil", "TextNetImageProcessorPil"})


@pytest.mark.parametrize("name", image_processors())
def test_a_plain_colour_stays_as_it_is_whatever_the_processor_does_to_it(name):
    """Kornia takes pixels between 0 and 1. Some processors do not normalise, that of EfficientNet does it twice."""
    try:
        processor = getattr(transformers, name)()
    except ImportError:  # that of Segformer in Transformers 5.19
        pytest.skip("needs torchvision")
    augment = Augmentation("default", processor=processor, num_classes=2)
    for level in (0, 100, 255):
        image = PIL.Image.new("RGB", (48, 48), (level, 255 - level, level))
        images = processor([image], return_tensors="pt")["pixel_values"][:, :, 190:200, 190:200]  # without a margin
        changed = augment({"pixel_values": images, "labels": torch.tensor([0])}, 0)["pixel_values"]
        torch.testing.assert_close(changed, images, atol=1e-4, rtol=0)


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


def test_the_ratio_of_mixup_is_of_its_beta_distribution():
    """The parameter of the distribution says how far most images are mixed: `mixup` is no mere switch."""
    augment = augmentation(mixup=0.1)
    ratios = torch.stack([augment(flat(), seed)["labels"].diagonal().min() for seed in range(400)])
    assert ratios.mean() == pytest.approx(0.5, abs=0.08)
    assert ratios.var() == pytest.approx(1 / (4 * (2 * 0.1 + 1)), abs=0.03)  # 0.21; of evenly drawn ones 0.08


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
    """As patches are: in the batch, or already by the model's processor."""
    complaint = (
        r"shape \(batch, channels, height, width\), got .*'pixel_values': \({}\).* Set `augmentation` to `none`"
    )
    with pytest.raises(ValueError, match=complaint.format("16, 9, 48")):
        augmentation("default")({"pixel_values": torch.rand(16, 9, 48), "labels": torch.arange(16)}, 0)
    with pytest.raises(ValueError, match=complaint.format("1, 256, 768")):
        Augmentation("default", processor=Siglip2ImageProcessorPil(), num_classes=2)


# ---- In the trainer --------------------------------------------------------


def grey(policy="default", **mixing):
    return Augmentation(policy, processor=processor([0.0], [1.0]), num_classes=10, **mixing)


def trained(output_dir, model=None, cls=AugmentedAACETrainer, augment=None, resume=None, **kwargs):
    config = AACEConfig if cls is AugmentedAACETrainer else TrainingArguments
    augment = grey(mixup=0.4, cutmix=1.0) if augment is None else augment
    arguments = training_arguments(config, output_dir, **{"max_steps": 6, **kwargs})
    trainer = cls(
        model or convnext(0.1),
        arguments,
        train_dataset=digits(64),
        eval_dataset=digits(64),
        augmentation=augment,
        compute_loss_func=WeightedCrossEntropy(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Spy(nn.Module):
    """Keeps the images that the model sees, by whether it is being trained."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.seen = model, model.config, {True: [], False: []}

    def forward(self, pixel_values, labels=None, **kwargs):
        self.seen[self.training].append(pixel_values.clone())
        return self.model(pixel_values, labels, **kwargs)


@pytest.mark.parametrize("scope", ["micro_batch", "full_batch"])
def test_both_passes_see_the_same_augmented_batch(tmp_path, scope):
    spy = Spy(convnext())
    trained(tmp_path, spy, gradient_accumulation_steps=2, max_steps=2, ascent_scope=scope)
    seen = spy.seen[True]
    assert len(seen) == 8  # two steps of two micro-batches, two passes
    order = [(0, 1), (2, 3)] if scope == "micro_batch" else [(0, 2), (1, 3)]
    for step in (seen[:4], seen[4:]):
        assert all(torch.equal(step[ascent], step[descent]) for ascent, descent in order)
        assert not torch.equal(step[order[0][0]], step[order[1][0]])
    known = {row["pixel_values"].numpy().tobytes() for row in digits(64)}
    assert not any(image.numpy().tobytes() in known for batch in seen for image in batch)


def test_evaluation_and_prediction_see_the_images_as_they_are(tmp_path):
    spy = Spy(convnext())
    trainer = trained(tmp_path, spy, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.predict(digits(64))
    expected = torch.stack([row["pixel_values"] for row in digits(64)])
    assert torch.equal(torch.cat(spy.seen[False]), expected.repeat(3, 1, 1, 1))


def test_rho_0_is_plain_training_with_the_same_augmentation(tmp_path):
    ours, plain = trained(tmp_path, rho=0.0), trained(tmp_path, cls=AugmentedTrainer)
    assert identical(weights(ours.model), weights(plain.model))
    assert not identical(weights(ours.model), weights(trained(tmp_path).model))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_makes_the_changes_of_the_whole_one(tmp_path, workers):
    """Stopped in the middle of the second epoch; the ViT has dropout, whose random numbers must not have moved either."""
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": workers,
    }
    whole = trained(tmp_path, vit(0.1), **options)
    resumed = trained(tmp_path, vit(0.1), resume=str(tmp_path / "checkpoint-3"), **options)
    assert identical(weights(whole.model), weights(resumed.model))


def test_every_micro_batch_has_a_seed_of_its_own(tmp_path, monkeypatch):
    """By the seed of the run, the step, the place in it and the process: no two of which may be alike."""

    def seeds(process=0, **kwargs):
        found = []
        monkeypatch.setattr(TrainingArguments, "process_index", property(lambda self: process))
        trained(tmp_path, augment=lambda batch, seed: found.append(seed) or batch, **kwargs)
        return found

    first = seeds(gradient_accumulation_steps=2)
    assert len(set(first)) == len(first) == 12
    assert first == seeds(gradient_accumulation_steps=2)
    others = [seeds(gradient_accumulation_steps=2, seed=7), seeds(gradient_accumulation_steps=2, data_seed=8)]
    others.append(seeds(process=1, gradient_accumulation_steps=2))
    assert len(set(first).union(*others)) == 4 * 12


def test_soft_labels_count_as_images_not_as_numbers(tmp_path):
    """Soft labels that say the same as hard ones train the same, also where a mean is made over micro-batches."""

    def soften(batch, seed):
        return {**batch, "labels": nn.functional.one_hot(batch["labels"], 10).float()}

    for accumulate in (1, 2):
        options = {"gradient_accumulation_steps": accumulate, "optim": "sgd", "max_steps": 3, "logging_steps": 1}
        soft = trained(tmp_path, vit(), augment=soften, **options)
        hard = trained(tmp_path, vit(), augment=lambda batch, seed: batch, **options)
        # A loss that is greater by a factor shows here alone: the gradient is clipped.
        for log, expected in zip(soft.state.log_history[:3], hard.state.log_history[:3], strict=True):
            assert log["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        for name, value in weights(soft.model).items():
            torch.testing.assert_close(value, weights(hard.model)[name], rtol=0, atol=1e-6)


# ---- In the command --------------------------------------------------------


def chosen(*argv):
    return train_parser(list(argv)).parse_args(list(argv)).augmentation


def test_what_is_fine_tuned_is_augmented_by_default():
    assert chosen() == "none"
    assert chosen("--model_name_or_path", "vit-tiny-digits", "--dataset_name", "AI/beans") == "none"
    assert chosen("--model_name_or_path", "google/vit-base-patch16-224", "--dataset_name", "AI/beans") == "default"
    assert chosen("--model_name_or_path", "google/vit-base-patch16-224") == "none"  # a mirrored digit is another sign
    fine_tuning = ["--model_name_or_path", "google/vit-base-patch16-224", "--dataset_name", "AI/beans"]
    assert chosen(*fine_tuning, "--augmentation", "randaugment") == "randaugment"


def test_the_command_trains_with_all_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--max_steps", "2", "--train_size", "40", "--disable_tqdm", "true", "--save_strategy", "no"]
    options = ["--augmentation", "randaugment", "--mixup", "0.2", "--cutmix", "1", "--class_weights", "balanced"]
    assert main([*argv, *options, "--label_smoothing_factor", "0.1", "--output_dir", "out"]) == 0
