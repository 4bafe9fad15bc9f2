# SPDX-License-Identifier: Apache-2.0
"""Settings, models and batches that cannot be trained are refused before any weight moves; the message names the fix."""

import pytest
import torch
from comparison import Linear
from tiny import (
    batch,
    convnext,
    digits,
    identical,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from hf_aace import AACEConfig, AACETrainer


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rho", -0.1, r"`rho` must be a finite number >= 0, got -0.1"),
        ("rho", float("nan"), "`rho` .* got nan"),
        ("rho", float("inf"), "`rho` .* got inf"),
        ("ascent_fraction", 0.0, r"`ascent_fraction` must lie in \(0, 1\], got 0.0"),
        ("ascent_fraction", 1.5, r"`ascent_fraction` .* got 1.5"),
        ("ascent_fraction", float("nan"), r"`ascent_fraction` .* got nan"),
        ("perturb_every", 0, "`perturb_every` must be a whole number of steps >= 1, got 0"),
        ("ascent_every", 0, "`ascent_every` must be a whole number of steps >= 1, got 0"),
        ("perturb_every", 1.5, "`perturb_every` .* got 1.5"),
        ("perturb_every", float("inf"), "`perturb_every` .* got inf"),  # for never
        ("perturbation_loss", "mse", r"`perturbation_loss` must be one of \['aace', 'cross_entropy'\], got 'mse'"),
        ("aace_target", "x", r"`aace_target` must be one of \['adaptive', 'uniform', 'random'\], got 'x'"),
        ("ascent_scope", "x", r"`ascent_scope` must be one of \['micro_batch', 'full_batch'\], got 'x'"),
        ("perturb_modules", "(", r"`perturb_modules` must be 'norm' or a regular expression, got '\('"),
        (
            "perturb_modules",
            ["norm"],
            r"`perturb_modules` must be .*, got \['norm'\]",
        ),  # as peft has its `target_modules`
        ("rho", "1e-2", r"`rho` must be a number, got '1e-2'"),  # as YAML reads it
    ],
)
def test_bad_settings_are_refused(field, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AACEConfig(str(tmp_path), **{field: value})
    arguments = training_arguments(AACEConfig, tmp_path, max_steps=1)
    trainer = AACETrainer(convnext(), arguments, train_dataset=digits(16))
    before = weights(trainer.model)
    setattr(arguments, field, value)  # as a hyperparameter search does
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert identical(weights(trainer.model), before)


def test_perturb_modules_that_match_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`perturb_modules='encoderr'` matches none of the .* parameters, such as"):
        AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, perturb_modules="encoderr"))


@pytest.mark.parametrize(
    "change", [{"problem_type": "regression"}, {"problem_type": "multi_label_classification"}, {"num_labels": 1}]
)
def test_models_that_are_no_single_label_classifiers_are_refused(change, tmp_path):
    model = convnext()
    model.config.update(change)
    with pytest.raises(ValueError, match=r"single-label classifier with at least 2 classes.*`rho=0`"):
        AACETrainer(model, training_arguments(AACEConfig, tmp_path))
    AACETrainer(model, training_arguments(AACEConfig, tmp_path, rho=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_are_refused_with_the_fix(dtype, tmp_path):
    arguments = training_arguments(AACEConfig, tmp_path)
    with pytest.raises(ValueError, match=r"must be float32.*dtype=torch.float32.*bf16=True"):
        AACETrainer(convnext().to(dtype), arguments)
    frozen = convnext().to(dtype).requires_grad_(False)
    frozen.classifier = nn.Linear(32, 10)
    AACETrainer(frozen, arguments)  # what is not trained may be of any precision
    AACETrainer(convnext().to(dtype), training_arguments(AACEConfig, tmp_path, rho=0))


class Scores(nn.Module):
    """Returns logits of any shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.weight = shape, nn.Parameter(torch.ones(()))

    def forward(self, pixel_values, labels=None):
        return {"loss": self.weight, "logits": self.weight * torch.randn(len(pixel_values), *self.shape)}


@pytest.mark.parametrize("loss", ["aace", "cross_entropy"])
@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (Scores(10, 4, 4), {}, r"logits of shape \(batch, classes\), got \(16, 10, 4, 4\)"),
        (Scores(1), {}, "at least 2 classes, got logits of shape"),
        (Scores(10), {"labels": None}, r"needs the labels of each batch under `labels`.*only \['pixel_values'\]"),
        (Scores(10), {"labels": torch.randint(10, (16,)) + 5}, r"Labels must lie in \[0, 10\) .* Set `num_labels`"),
        (Scores(10), {"labels": torch.full((16,), -1)}, r"Labels must lie in \[0, 10\) .*got -1 .. -1"),
        (Scores(10), {"labels": torch.randn(16)}, "regression has no AACE loss"),
        (Scores(10), {"labels": torch.randint(2, (16, 10))}, "multi-label targets have no AACE loss"),
        (Scores(10), {"labels": torch.ones(16, 10)}, r"sum to 10 .. 10. Multi-label targets"),
        (convnext(), {"labels": torch.full((16, 10), 0.1)}, "pass a `compute_loss_func`"),
    ],
)
def test_batches_that_are_no_classification_are_refused(model, change, message, loss, tmp_path):
    trainer = trainer_for_single_steps(model, tmp_path, perturbation_loss=loss)
    before = weights(model)
    inputs = {key: value for key, value in {**batch(16), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        trainer.training_step(model, inputs)
    assert identical(weights(model), before)


def test_a_label_without_a_batch_is_refused_whatever_the_share_of_the_batch(tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, ascent_fraction=0.5)
    with pytest.raises(ValueError, match=r"Integer labels must have shape \(1,\).* got \(\)"):
        trainer.training_step(trainer.model, batch(1) | {"labels": torch.tensor(1)})


def test_batches_that_are_no_dictionaries_are_refused(tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path)
    with pytest.raises(ValueError, match=r"dictionaries, got a tuple\. Let the `data_collator` .* under `labels`"):
        trainer.training_step(trainer.model, tuple(batch().values()))


@pytest.mark.parametrize("loss", ["aace", "cross_entropy"])
def test_labels_out_of_range_are_refused_in_later_steps_too(loss, tmp_path):
    trainer = trainer_for_single_steps(convnext(), tmp_path, perturbation_loss=loss)
    trainer.training_step(trainer.model, batch())
    with pytest.raises(ValueError, match=r"Labels must lie in \[0, 10\)"):
        trainer.training_step(trainer.model, {**batch(), "labels": torch.full((16,), 10)})


def test_outputs_without_logits_are_refused_naming_the_method_to_override(tmp_path):
    class Model(Scores):
        def forward(self, pixel_values, labels=None):
            return {"loss": self.weight, "scores": self.weight * torch.randn(len(pixel_values), 10)}

    trainer = trainer_for_single_steps(Model(), tmp_path)
    with pytest.raises(
        ValueError, match=r"hold no tensor `logits`, only \['loss', 'scores'\]. Override `ascent_logits`"
    ):
        trainer.training_step(trainer.model, batch())

    for outputs, kind in [
        ((None, None), "a tuple"),
        ([], "a list"),
        (None, "a NoneType"),
        ({"logits": [1]}, "logits"),
    ]:
        with pytest.raises(ValueError, match=rf"hold no tensor `logits`, only .*{kind}"):
            trainer.ascent_logits(outputs)

    class WithScores(AACETrainer):
        def ascent_logits(self, outputs):
            return outputs["scores"]

    trainer = trainer_for_single_steps(Model(), tmp_path, cls=WithScores)
    trainer.training_step(trainer.model, batch())


def test_what_rho_0_allows_is_refused_when_a_callback_raises_it(tmp_path):
    """As at the start, before any weight moves by it."""

    class Raise(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.rho = 0.1 if state.global_step == 2 else 0.0

    arguments = training_arguments(AACEConfig, tmp_path, max_steps=4, rho=0.0)
    trainer = AACETrainer(vit(), arguments, train_dataset=digits(), callbacks=[Raise()])
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel over 2 GPUs"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=rf"`optim='{optim}'` updates the weights inside the backward pass"):
        AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, optim=optim))


class Reentrant(Linear):
    """Has activation checkpointing with which the ascent, too, runs `backward()`."""

    def forward(self, pixel_values, labels=None):
        logits = checkpoint(self.linear, pixel_values.flatten(1).requires_grad_(), use_reentrant=True)
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("make_model", [Linear, Reentrant])
def test_hooks_inside_backward_may_look_but_not_step_an_optimizer(make_model, tmp_path):
    model = make_model()
    trainer, norms = trainer_for_single_steps(model, tmp_path), []
    bias = model.linear.bias
    bias.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))
    trainer.training_step(trainer.model, batch())
    assert norms
    before = weights(model)
    optimizer = torch.optim.SGD([bias], lr=0.1)
    bias.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(RuntimeError, match=r"steps SGD itself, or a hook in the backward pass does"):
        trainer.training_step(trainer.model, batch())
    assert identical(weights(model), before)


def test_a_second_training_is_checked_as_the_first(tmp_path):
    """The model may have changed in between."""
    trainer = AACETrainer(convnext(), training_arguments(AACEConfig, tmp_path, max_steps=1), train_dataset=digits(16))
    trainer.train()
    trainer.model.bfloat16()
    with pytest.raises(ValueError, match="bfloat16"):
        trainer.train()


def test_data_parallel_is_refused(tmp_path):
    arguments = training_arguments(AACEConfig, tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel over 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        AACETrainer(vit(), arguments)


@pytest.mark.parametrize("column", ["image", "pixels"])
@pytest.mark.parametrize("make_model", [vit, Linear], ids=["of Transformers", "of one's own"])
def test_a_batch_without_the_input_of_the_model_names_the_columns(make_model, column, tmp_path):
    """Transformers itself says "You have to specify pixel_values", and not what there is."""
    rows = [{column: row["pixel_values"], "labels": row["labels"]} for row in digits(16)]
    arguments = training_arguments(AACEConfig, tmp_path, max_steps=1, rho=0.1, remove_unused_columns=False)
    with pytest.raises(ValueError, match=rf"needs \['pixel_values'\], got a batch with \[.*'{column}'"):
        AACETrainer(make_model(), arguments, train_dataset=rows).train()
