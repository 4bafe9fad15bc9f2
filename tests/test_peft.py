# SPDX-License-Identifier: Apache-2.0
"""LoRA and its kin: the adapters are what trains, and what is perturbed."""

import pytest
import torch
from comparison import check_goes_on_working
from tiny import (
    batch,
    resnet,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from tiny_configs import image_classifier
from torch import nn

from hf_aace import AACEConfig, AACETrainer
from hf_aace.vision.lora import add_lora


def lora():
    from peft import LoraConfig, get_peft_model

    model = vit(0.1)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_lora_perturbs_the_adapters_alone(tmp_path):
    pytest.importorskip("peft")
    _, _, real = check_goes_on_working(lora, tmp_path, rho=10.0)
    trainer = trainer_for_single_steps(lora(), tmp_path, rho=10.0)
    nn.init.normal_(next(p for name, p in trainer.model.named_parameters() if "lora_B" in name))
    before = weights(trainer.model)
    with trainer.perturbed_weights(trainer.model, batch()):
        moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("lora_" in name for name in moved)
    real.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_the_folder_of_an_adapter_as_model_trains_the_head_alone(tmp_path):
    """Transformers loads adapters frozen, and only what peft saved whole is trainable. `is_trainable=True` trains both."""
    peft = pytest.importorskip("peft")
    vit().save_pretrained(tmp_path / "base")
    adapted = lora()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")

    def trainable(model):
        return {name for name, p in model.named_parameters() if p.requires_grad}

    arguments = training_arguments(AACEConfig, tmp_path)
    by_name = AACETrainer(str(tmp_path / "adapter"), arguments).model
    assert any("lora_" in name for name, _ in by_name.named_parameters())
    head = {f"classifier.modules_to_save.default.{name}" for name in ("weight", "bias")}
    assert trainable(by_name) == head
    loaded = peft.PeftModel.from_pretrained(vit(), tmp_path / "adapter", is_trainable=True)
    assert trainable(AACETrainer(loaded, arguments).model) == trainable(lora())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_lora_on_swiftformer_trains_every_layer_called_norm():
    """They are BatchNorms, whose statistics training changes: all of these are saved with the adapters."""
    pytest.importorskip("peft")
    model = image_classifier("SwiftFormerForImageClassification")
    called_norm = {name for name, _ in model.named_modules() if name.split(".")[-1] == "norm"}
    with_statistics = {name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    adapted = add_lora(model, rank=2)
    whole = {
        name.removeprefix("base_model.model.").split(".modules_to_save")[0]
        for name, p in adapted.named_parameters()
        if p.requires_grad and "lora_" not in name
    }
    assert whole == with_statistics | {"head", "dist_head"} and called_norm < whole


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
@pytest.mark.parametrize("saved", [["classifier"], ["classifier", "normalization"]])
def test_statistics_that_the_adapters_do_not_hold_are_told(saved, tmp_path, monkeypatch):
    """Training changes them, and a resumed run would have other ones."""
    from peft import LoraConfig, get_peft_model

    said = []
    monkeypatch.setattr("hf_aace.checks.logger.warning_once", said.append)
    config = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=saved)
    AACETrainer(get_peft_model(resnet(), config), training_arguments(AACEConfig, tmp_path, rho=0.1))
    told = [text for text in said if "running statistics" in text and "modules_to_save" in text]
    assert bool(told) == ("normalization" not in saved)
