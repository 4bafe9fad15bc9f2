# SPDX-License-Identifier: Apache-2.0
"""Tiny models and data that the tests share. Small enough that a training step takes milliseconds."""

import gc
import struct
import zlib
from dataclasses import fields

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_aace import AACEConfig, AACETrainer


# So small that the whole ascent pass runs, but 32 bits hold the step as 0. A subnormal one would still move weights
# that are exactly 0, and break ties: HGNetV2 pools the greatest of zero padding and of zeros of a ReLU plus a bias.
VANISHING = 1e-50


def convnext(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return ConvNextForImageClassification(
        ConvNextConfig(
            num_channels=1,
            patch_size=2,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_stages=2,
            num_labels=10,
            drop_path_rate=dropout,
        )
    )


def vit(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=10,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def resnet(dropout: float = 0.0) -> nn.Module:
    """With BatchNorm; it has no dropout."""
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
        )
    )


MODELS = {"convnext": convnext, "vit": vit, "resnet": resnet}


_IMAGES, _LABELS = (torch.from_numpy(array) for array in load_digits(return_X_y=True))  # reading them takes 20 ms


def digits(count: int = 256, dtype: torch.dtype = torch.float32) -> list[dict]:
    images = (_IMAGES[:count] / 16).to(dtype).view(-1, 1, 8, 8)
    return [
        {"pixel_values": image.clone(), "labels": label}
        for image, label in zip(images, _LABELS[:count].tolist(), strict=True)
    ]


def batch(size: int = 16, start: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    chosen = slice(start, start + size)
    return {"pixel_values": (_IMAGES[chosen] / 16).to(dtype).view(-1, 1, 8, 8), "labels": _LABELS[chosen].clone()}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything the model holds, buffers included."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Returns True if two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def alive(*shape: int) -> int:
    """Count the tensors of a shape that are in memory, parameters and gradients among them."""
    gc.collect()
    return sum(type(thing) in (torch.Tensor, nn.Parameter) and thing.shape == shape for thing in gc.get_objects())


def training_arguments(cls, output_dir, **kwargs):
    """Arguments of a short, silent run on the CPU."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(**{**defaults, **kwargs})


def activation_checkpointing(use_reentrant: bool) -> dict:
    """The training arguments that switch it on, by their name in the Transformers that is installed."""
    known = {field.name for field in fields(AACEConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


def learning_curve(trainer) -> list[dict]:
    """The log history without the entries that depend on the clock."""
    clocks = ("runtime", "per_second")
    return [
        {key: value for key, value in entry.items() if not key.endswith(clocks)} for entry in trainer.state.log_history
    ]


def trainer_for_single_steps(model, output_dir, cls=None, **kwargs):
    """An `AACETrainer` whose `training_step` can be called outside `train()`."""
    trainer = (cls or AACETrainer)(model, training_arguments(AACEConfig, output_dir, **kwargs))
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def hand_out(trainer, batches) -> list[dict]:
    """Gives a trainer the micro-batches of an optimizer step, as `train()` does before it steps through them."""
    device = next(trainer.model.parameters()).device
    return trainer.get_batch_samples(iter(batches), len(batches), device)[0]


def step_through(trainer, batches) -> None:
    """Calls `training_step` for each micro-batch of an optimizer step, as `train()` does."""
    for inputs in hand_out(trainer, batches):
        trainer.accelerator.gradient_state._set_sync_gradients(inputs is batches[-1])
        trainer.training_step(trainer.model, inputs)


def logged(trainer) -> dict:
    """The entry that a trainer logs for the steps since its last log."""
    trainer.log({"loss": 0.0})
    return trainer.state.log_history[-1]


def record_ascents(model) -> list[int]:
    """A list that will hold the batch size of each ascent pass of a model, which is called without labels there."""
    sizes = []

    def record(module, args, kwargs):
        if "labels" not in kwargs:
            sizes.append(len(kwargs["pixel_values"]))

    model.register_forward_pre_hook(record, with_kwargs=True)
    return sizes


class Small(nn.Module):
    """A classifier of 303 parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x):
        return self.net(x)


def small_data(sizes=(10, 7, 3)):
    """Batches of unequal sizes, as the last one of a dataset is."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(size, 20, generator=generator),
            "labels": torch.randint(3, (size,), generator=generator),
        }
        for size in sizes
    ]


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_16_bits(values, color_type=2):
    """A PNG of 16 bits with several channels, by default color, which Pillow reads and does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color_type, 0, 0, 0)
    content = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content
