# SPDX-License-Identifier: Apache-2.0
"""LoRA on models with BatchNorm: whatever training changes is saved with the adapters."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_configs import image_classifier
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, set_seed

from hf_aace import AACETrainer
from hf_aace.cli import main
from hf_aace.vision.lora import add_lora
from hf_aace.vision.models import load_model_and_processor


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
# Convolutions, and the linear layers that are adapted by default.
TARGETS = {
    "resnet": ["--lora_target_modules", "convolution"],
    "LevitForImageClassification": [],
    "CvtForImageClassification": [],
}
# A step is an epoch, so that each is evaluated and saved.
TINY = "train --train_size 40 --max_steps 3 --per_device_train_batch_size 64 --disable_tqdm true".split()
LORA = ["--model_name_or_path", "base", "--lora", "true", "--lora_rank", "2", "--learning_rate", "0.01"]


@pytest.fixture(scope="module", params=TARGETS)
def run(request, tmp_path_factory):
    """The command for a model that is saved as `base`, in a folder in which it has left `whole`."""
    folder = tmp_path_factory.mktemp(request.param)
    set_seed(0)
    if request.param == "resnet":
        model, processor = load_model_and_processor("resnet-tiny-digits", dict(enumerate("0123456789")))
    else:
        model = image_classifier(request.param)
        processor = ViTImageProcessorPil(size={"height": 64, "width": 64})
    base = str(folder / "base")
    model.save_pretrained(base)
    processor.save_pretrained(base)
    argv = [*TINY, *LORA, *TARGETS[request.param], "--model_name_or_path", base]
    assert main([*argv, "--output_dir", str(folder / "whole")]) == 0
    return SimpleNamespace(folder=folder, argv=argv)


def from_adapter(base, folder):
    """The weights and statistics of the base with an adapter, as peft loads them."""
    from peft import PeftModel

    model = AutoModelForImageClassification.from_pretrained(base, num_labels=10, ignore_mismatched_sizes=True)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()


def assert_same_model(state, saved):
    assert state.keys() == saved.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(state[name], tensor, msg=name)


def test_a_resumed_run_ends_with_the_same_weights_and_statistics(run):
    shutil.copytree(run.folder / "whole/checkpoint-2", "resumed/checkpoint-2")
    assert main([*run.argv, "--output_dir", "resumed", "--resume_from_checkpoint", "true"]) == 0
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (run.folder / "whole", Path("resumed")))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    before = load_file(run.folder / "base/model.safetensors")
    assert any("running_mean" in name and not torch.equal(before[name], whole[name]) for name in before)


def test_the_adapter_folder_is_the_trained_model(run):
    whole = run.folder / "whole"
    assert_same_model(from_adapter(run.folder / "base", whole / "adapter"), load_file(whole / "model.safetensors"))


def test_the_best_model_is_that_of_its_checkpoint(run, monkeypatch):
    """Not its adapters with the statistics of the last step."""
    original = AACETrainer.evaluate

    def evaluate(self, *args, **kwargs):
        return original(self, *args, **kwargs) | {"eval_loss": float(self.state.global_step)}  # the first is the best

    monkeypatch.setattr(AACETrainer, "evaluate", evaluate)
    assert main([*run.argv, "--load_best_model_at_end", "true", "--output_dir", "out"]) == 0
    first, last = (from_adapter(run.folder / "base", f"out/checkpoint-{step}") for step in (1, 3))
    assert_same_model(first, load_file("out/model.safetensors"))
    assert any("running_mean" in name and not torch.equal(last[name], tensor) for name, tensor in first.items())


def test_adapters_of_a_model_in_16_bits_are_merged_in_32(tmp_path):
    """Or its weights would round them away."""
    options = "--model_name_or_path vit-tiny-digits --lora true --dtype bfloat16 --bf16 true --use_cpu true"
    assert main([*TINY, *options.split(), "--output_dir", "out"]) == 0
    saved = load_file("out/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    adapted = [tensor for name, tensor in saved.items() if tensor.dim() == 2 and "classifier" not in name]
    assert adapted and not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapted)


def test_layers_whose_model_looks_into_them_are_refused_in_a_sentence(capsys):
    """MobileNetV2 reads the stride of its convolutions, which peft's wrappers do not have."""
    image_classifier("MobileNetV2ForImageClassification").save_pretrained("base")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("base")
    assert main([*TINY, *LORA, "--lora_target_modules", "reduce_1x1.convolution"]) == 1
    error = capsys.readouterr().err
    assert "`lora_target_modules` is ['reduce_1x1.convolution']" in error and "Name other layers" in error
    assert "`--freeze_backbone true` instead of `lora`" in error
    assert "Traceback" not in error


def base(name):
    image_classifier(name).save_pretrained("base")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("base")


def test_convolutions_in_groups_get_no_adapters_which_could_not_be_merged(capsys, warnings):
    base("RegNetForImageClassification")
    assert main([*TINY, *LORA, "--lora_target_modules", "convolution", "--output_dir", "out"]) == 0
    assert any("convolutions in groups, such as 'regnet." in text and "get no adapters" in text for text in warnings)
    assert any("lora_A" in name for name in load_file("out/adapter/adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("name", "target"),
    [("MobileNetV2ForImageClassification", "conv_3x3.convolution"), ("ConvNextForImageClassification", "dwconv")],
)
def test_convolutions_in_groups_alone_are_refused(name, target, capsys):
    base(name)
    assert main([*TINY, *LORA, "--lora_target_modules", target]) == 1
    assert "names no other layers of" in capsys.readouterr().err


def test_layers_whose_adapters_could_not_be_merged_are_refused_before_training():
    """peft would say nothing and merge into another function."""
    message = "could not be merged into it: it normalizes its weights.*Name other layers"
    with pytest.raises(ValueError, match=message):
        add_lora(image_classifier("BitForImageClassification"), target_modules=["conv1"])
