# SPDX-License-Identifier: Apache-2.0
"""LoRA and its kin: the adapters are what trains, and what is perturbed."""

import pytest
import torch
from comparison import check_goes_on_working
from tiny import (
    batch,
    trainer_for_single_steps,
    vit,
    weights,
)
from torch import nn


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
