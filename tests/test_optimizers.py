# SPDX-License-Identifier: Apache-2.0
"""Optimizers, their parameter groups and frozen parameters, and learning-rate schedules."""

import pytest
import torch
from comparison import check_goes_on_working, train
from tiny import (
    VANISHING,
    batch,
    digits,
    identical,
    resnet,
    vit,
    weights,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_aace import AACEConfig, AACETrainer


LOW_RANK = {"optim_target_modules": ["attention", "mlp"], "optim_args": "rank=4, update_proj_gap=2"}


CONSTANT = {"lr_scheduler_type": "constant"}


@pytest.mark.parametrize(
    ("optim", "package", "kwargs"),
    [
        ("sgd", "torch", {}),
        ("adamw_torch", "torch", {}),
        ("adamw_torch_fused", "torch", {}),
        ("adafactor", "torch", {}),
        ("adagrad", "torch", {}),
        ("rmsprop", "torch", {}),
        ("lion_32bit", "bitsandbytes", {}),
        ("adamw_8bit", "bitsandbytes", {}),
        ("ademamix", "bitsandbytes", {}),
        ("galore_adamw", "galore_torch", LOW_RANK),
        ("galore_adafactor", "galore_torch", LOW_RANK),
        ("apollo_adamw", "apollo_torch", LOW_RANK),
        ("schedule_free_adamw", "schedulefree", CONSTANT),
        ("schedule_free_sgd", "schedulefree", CONSTANT),
        ("schedule_free_radam", "schedulefree", CONSTANT),
        ("stable_adamw", "optimi", {}),
        ("grokadamw", "grokadamw", {}),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of those packages
def test_optimizers_keep_working(optim, package, kwargs, tmp_path):
    """With evaluations, for which the schedule-free ones move the weights, to move them back before the next step."""
    pytest.importorskip(package)
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": digits(16)}
    check_goes_on_working(vit, tmp_path, optim=optim, steps=10, rho=0.5, **evaluation, **kwargs)


@pytest.mark.parametrize("kwargs", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_fused_and_foreach_optimizers_keep_working(kwargs, tmp_path):
    runs = []
    for cls, config, rho in ((Trainer, TrainingArguments, {}), (AACETrainer, AACEConfig, {"rho": VANISHING})):
        model = vit()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **kwargs)
        runs.append(weights(train(cls, config, model, tmp_path, optimizers=(optimizer, None), **rho).model))
    assert identical(*runs)


def test_schedules_reach_the_optimizer(tmp_path):
    kwargs = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 1, "steps": 8}
    rates = []
    for cls, config in ((Trainer, TrainingArguments), (AACETrainer, AACEConfig)):
        trainer = train(cls, config, vit(), tmp_path, **kwargs)
        rates.append([log["learning_rate"] for log in trainer.state.log_history if "loss" in log])
    assert rates[0] == rates[1] and len(set(rates[0])) > 4


def test_several_parameter_groups_keep_their_settings(tmp_path):
    def optimizer(model):
        head = [p for name, p in model.named_parameters() if name.startswith("classifier")]
        rest = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
        return torch.optim.SGD([{"params": head, "lr": 0.1}, {"params": rest, "lr": 0.0}])

    plain_model, our_model, real_model = vit(), vit(), vit()
    plain = train(Trainer, TrainingArguments, plain_model, tmp_path, optimizers=(optimizer(plain_model), None))
    ours = train(AACETrainer, AACEConfig, our_model, tmp_path, rho=VANISHING, optimizers=(optimizer(our_model), None))
    real = train(AACETrainer, AACEConfig, real_model, tmp_path, rho=0.2, optimizers=(optimizer(real_model), None))
    assert identical(weights(plain.model), weights(ours.model))
    start, end = weights(vit()), weights(real.model)
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


def frozen_backbone():
    model = vit(0.1)
    model.vit.requires_grad_(False)
    return model


def test_frozen_backbone_stays_as_it_is(tmp_path):
    _, _, real = check_goes_on_working(frozen_backbone, tmp_path, rho=10.0)
    start, end = weights(frozen_backbone()), weights(real.model)
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_unfreezing_during_training_perturbs_what_was_unfrozen(tmp_path):
    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.vit.requires_grad_(True)

    model = frozen_backbone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kwargs = {"callbacks": [Unfreeze()], "optimizers": (optimizer, None), "logging_steps": 1, "rho": 0.2}
    trainer = train(AACETrainer, AACEConfig, model, tmp_path, **kwargs)
    norms = [log["ascent_grad_norm"] for log in trainer.state.log_history if "loss" in log]
    assert min(norms[3:]) > max(norms[:3]), "the gradient is over more parameters from there on"


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_schedule_free_evaluates_with_batch_norm_statistics_of_other_weights(rho, tmp_path):
    """
    Those of the weights that it trains, not of their average, by which it evaluates: plain training's too. After
    `trainer.optimizer.eval()` let `update_bn` of torch take them anew.
    """
    pytest.importorskip("schedulefree")
    trainer = train(
        AACETrainer, AACEConfig, resnet(), tmp_path, steps=10, optim="schedule_free_adamw", rho=rho, **CONSTANT
    )

    def statistics():
        return {name: b.clone() for name, b in trainer.model.named_buffers() if "running" in name}

    batches = [batch(16, start=start)["pixel_values"] for start in range(0, 64, 16)]
    trained = statistics()
    found = trainer.evaluate(digits(64))["eval_loss"]
    assert identical(statistics(), trained), "an evaluation leaves them as they are"
    trainer.optimizer.eval()
    torch.optim.swa_utils.update_bn(batches, trainer.model)
    of_the_average = statistics()
    assert trainer.evaluate(digits(64))["eval_loss"] < found
    trainer.optimizer.train()
    torch.optim.swa_utils.update_bn(batches, trainer.model)
    assert not identical(statistics(), of_the_average), "other weights have other statistics"
