# SPDX-License-Identifier: Apache-2.0
"""The mixin over a Trainer of the user's own, with its constructor, its `compute_loss`, its batches and its logs."""

import copy
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from comparison import Linear, check_goes_on_working, train, weighted_cross_entropy
from tiny import (
    batch,
    convnext,
    digits,
    identical,
    learning_curve,
    trainer_for_single_steps,
    training_arguments,
    vit,
    weights,
)
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler
from transformers import (
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_aace import AACEArguments, AACEConfig, AACETrainer, SharpnessAwareMixin
from hf_aace.vision.weighted_loss import WeightedCrossEntropy


def test_mixin_over_a_trainer_and_arguments_of_ones_own(tmp_path):
    @dataclass
    class MyArguments(AACEArguments, TrainingArguments):
        scale: float = 2.0

    class MyTrainer(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return self.args.scale * super().compute_loss(model, inputs, *args, **kwargs)

        def log(self, logs, *args, **kwargs):
            super().log({**logs, "mine": 1.0}, *args, **kwargs)

    class Mine(SharpnessAwareMixin, MyTrainer):
        pass

    arguments = training_arguments(MyArguments, tmp_path, max_steps=5, rho=0.1)
    trainer = Mine(convnext(), arguments, train_dataset=digits())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["mine"] == 1.0 and log["rho"] == 0.1
    assert "ascent_loss" in log and "clean_loss" not in log, (
        "the loss that is trained on is another one than is measured"
    )


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_mixin_over_a_trainer_with_a_constructor_of_its_own(how, tmp_path):
    """The first argument of its constructor need not be the model; one given by its path is loaded all the same."""

    class MyTrainer(Trainer):
        def __init__(self, class_weights, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.class_weights = class_weights

    class Mine(SharpnessAwareMixin, MyTrainer):
        pass

    vit().save_pretrained(tmp_path / "vit")
    arguments = training_arguments(AACEConfig, tmp_path)
    if how == "positional":
        trainer = Mine("heavy", model=str(tmp_path / "vit"), args=arguments)
    else:
        trainer = Mine(class_weights="heavy", args=arguments, model=str(tmp_path / "vit"))
    assert trainer.class_weights == "heavy" and identical(weights(trainer.model), weights(vit()))


def test_a_string_that_is_not_the_model_is_not_loaded(tmp_path):
    class MyTrainer(Trainer):
        def __init__(self, name, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.name = name

    class Mine(SharpnessAwareMixin, MyTrainer):
        pass

    trainer = Mine("heavy", vit(), training_arguments(AACEConfig, tmp_path))
    assert trainer.name == "heavy" and identical(weights(trainer.model), weights(vit()))


def test_mixin_behind_the_trainer_is_refused(tmp_path):
    """Its methods would never be called: that would train plainly, without a word."""
    with pytest.raises(TypeError, match="Late would train plainly: put SharpnessAwareMixin before"):

        class Late(Trainer, SharpnessAwareMixin):
            pass


def test_overridden_compute_loss_keeps_working(tmp_path):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")  # as the examples of Transformers do
            outputs = model(**inputs)
            loss = weighted_cross_entropy(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    class Ours(AACETrainer, Weighted):
        pass

    check_goes_on_working(vit, tmp_path, trainer=Weighted, ours=Ours)


def compiled():
    return torch.compile(Linear(), backend="eager")


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(Linear(), peft.LoraConfig(target_modules=["linear"], init_lora_weights=False))


@pytest.mark.parametrize("make_model", [Linear, compiled, adapted])
def test_what_a_batch_holds_for_an_overridden_compute_loss_is_kept_from_the_model(make_model, tmp_path):
    """Also where the model is inside another, whose `forward` takes anything."""

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            sample_weights, labels = inputs.pop("sample_weights"), inputs.pop("labels")
            outputs = model(**inputs)
            loss = (sample_weights * F.cross_entropy(outputs[0], labels, reduction="none")).mean()
            return (loss, outputs) if return_outputs else loss

    class Ours(AACETrainer, Weighted):
        pass

    def with_weights(rows):
        return default_data_collator(rows) | {"sample_weights": torch.linspace(0, 1, len(rows))}

    kwargs = {"data_collator": with_weights, "remove_unused_columns": False, "label_names": ["labels"]}

    def seeded():
        torch.manual_seed(0)
        return make_model()

    check_goes_on_working(seeded, tmp_path, trainer=Weighted, ours=Ours, **kwargs)


def test_a_model_that_takes_anything_gets_all_of_the_batch(tmp_path):
    """In both passes."""

    class Anything(Linear):
        def forward(self, labels=None, **inputs):
            return super().forward(inputs["pixel_values"] * inputs["contrasts"], labels)

    def with_contrasts(rows):
        return default_data_collator(rows) | {"contrasts": torch.linspace(0.5, 2, len(rows)).view(-1, 1, 1, 1)}

    check_goes_on_working(Anything, tmp_path, data_collator=with_contrasts, remove_unused_columns=False)


def test_a_model_that_is_called_otherwise_than_by_the_names_of_the_batch(tmp_path):
    """As those of torchvision are, by an overridden `compute_loss`."""

    class Positional(Linear):
        def forward(self, x):
            return super().forward(x)[0]

    class Calls(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(inputs["pixel_values"])
            loss = F.cross_entropy(logits, inputs["labels"])
            return (loss, {"logits": logits}) if return_outputs else loss

    class Ours(AACETrainer, Calls):
        def ascent_outputs(self, model, inputs):
            return model(inputs["pixel_values"])

    check_goes_on_working(Positional, tmp_path, trainer=Calls, ours=Ours, remove_unused_columns=False)

    class WithoutIt(AACETrainer, Calls):
        pass

    with pytest.raises(
        ValueError, match=r"needs \['x'\], got .*\['labels', 'pixel_values'\].* `ascent_outputs` of WithoutIt"
    ):
        train(WithoutIt, AACEConfig, Positional(), tmp_path, remove_unused_columns=False)


def test_a_wrapper_that_names_an_argument_and_takes_the_images_among_the_others(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, output_attentions=None, labels=None, **inputs):
            return self.inner(inputs["pixel_values"], labels=labels, output_attentions=output_attentions)

    check_goes_on_working(Wrapper, tmp_path, remove_unused_columns=False)


def test_an_argument_with_label_in_its_name_need_not_be_the_labels(tmp_path):
    """Trainer takes it for them, but gives those of the batch to `compute_loss_func`."""

    class Weighing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, pixel_values, label_weights=None):
            return self.inner(pixel_values)

    for rows in (digits(64), [{**row, "label_weights": torch.tensor(0.5)} for row in digits(64)]):
        check_goes_on_working(
            Weighing, tmp_path, rows=rows, remove_unused_columns=False, compute_loss_func=WeightedCrossEntropy()
        )


def test_the_ascent_is_by_the_batch_that_the_trainer_has_prepared(tmp_path):
    """One that changes images on the device is to be perturbed by those that it trains on."""

    class Doubled(AACETrainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "pixel_values": 2 * inputs["pixel_values"]}

    moved = []
    for cls, factor in ((Doubled, 1), (AACETrainer, 2)):
        trainer = trainer_for_single_steps(convnext(), tmp_path, cls, rho=0.1)
        inputs = batch()
        inputs["pixel_values"] *= factor
        with trainer.perturbed_weights(trainer.model, inputs):
            moved.append(weights(trainer.model))
    assert identical(*moved)


def test_inputs_that_are_not_copied_keep_their_labels(tmp_path):
    """A Trainer of one's own may prepare its inputs beforehand."""

    class Prepared(AACETrainer):
        def _prepare_inputs(self, inputs):
            return inputs

    trainer = trainer_for_single_steps(vit(), tmp_path, Prepared, rho=0.1)
    inputs = batch()
    trainer.training_step(trainer.model, inputs)
    assert set(inputs) == {"pixel_values", "labels"}


def test_the_users_batch_is_not_modified(tmp_path):
    for kwargs in ({}, {"label_smoothing_factor": 0.1}):
        trainer = trainer_for_single_steps(vit(), tmp_path, ascent_fraction=0.5, **kwargs)
        inputs = batch()
        before = copy.deepcopy(inputs)
        trainer.training_step(trainer.model, inputs)
        assert identical(inputs, before)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_batch_that_is_changed_where_it_is_prepared_is_changed_once(in_place, tmp_path):
    """Both passes prepare it."""

    class Scales(Trainer):
        def _prepare_inputs(self, inputs):
            inputs.pop("index")
            if in_place:
                inputs["pixel_values"].mul_(3)
            else:
                inputs["pixel_values"] = 3 * inputs["pixel_values"]
            return super()._prepare_inputs(inputs)

    class Mine(SharpnessAwareMixin, Scales):
        pass

    rows = [{**row, "index": index} for index, row in enumerate(digits(64))]
    check_goes_on_working(
        convnext, tmp_path, trainer=Scales, ours=Mine, rows=rows, remove_unused_columns=False, rho=0.5
    )


def test_a_model_that_looks_for_its_labels_among_all_arguments_is_told_how(tmp_path):
    class TakesAll(Linear):
        def forward(self, **inputs):
            return super().forward(inputs["pixel_values"], inputs["labels"])

    class CallsItWithLabels(AACETrainer):
        def ascent_outputs(self, model, inputs):
            return model(**inputs)[1:]

    settings = {"remove_unused_columns": False, "label_names": ["labels"], "rho": 0.1}
    with pytest.raises(ValueError, match=r"`forward` of TakesAll needs `labels`.* override `ascent_outputs`"):
        train(AACETrainer, AACEConfig, TakesAll(), tmp_path, **settings)
    assert train(CallsItWithLabels, AACEConfig, TakesAll(), tmp_path, **settings).state.global_step == 6


class SparseImages(Linear):
    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values.to_dense(), labels)


class ReturnsADefault(Linear):
    """Returns a dictionary that cannot be made again from its items alone."""

    def forward(self, pixel_values, labels=None):
        outputs = super().forward(pixel_values, labels)
        made = defaultdict(lambda: None, logits=outputs[-1])
        if labels is not None:
            made["loss"] = outputs[0]
        return made


class OfWords(nn.Module):
    """A classifier with an embedding whose gradients are sparse."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.EmbeddingBag(20, 16, sparse=True), nn.Linear(16, 10)

    def forward(self, pixel_values, labels=None):
        logits = self.linear(self.embedding((16 * pixel_values).flatten(1).round().long()))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("method", ["aace", "asam"])
def test_sparse_gradients_perturb_as_dense_ones(method, tmp_path):
    """A step of the optimizer is not made: with torch 2.13 plain Trainer cannot clip sparse gradients."""
    moved = []
    for is_sparse in (True, False):
        trainer = trainer_for_single_steps(OfWords(), tmp_path, method=method, optim="sgd", rho=0.1)
        trainer.model.embedding.sparse = is_sparse
        with trainer.perturbed_weights(trainer.model, batch()):
            moved.append(weights(trainer.model))
    torch.testing.assert_close(*moved)
    assert not identical(moved[0], weights(OfWords()))


def sparse(rows):
    dense = default_data_collator(rows)
    return {**dense, "pixel_values": dense["pixel_values"].to_sparse()}


def with_missing_values(rows):
    dense = default_data_collator(rows)
    return {**dense, "pixel_values": dense["pixel_values"].where(dense["pixel_values"] > 0, torch.nan)}


class IgnoresMissing(Linear):
    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values.nan_to_num(), labels)


@pytest.mark.parametrize(
    ("model", "collator"),
    [(SparseImages, sparse), (IgnoresMissing, with_missing_values), (ReturnsADefault, default_data_collator)],
)
def test_what_is_looked_at_for_warnings_and_the_log_cannot_end_a_run(model, collator, tmp_path, monkeypatch):
    said, told = [], []
    monkeypatch.setattr("hf_aace.pass_checks.logger.warning", said.append)
    monkeypatch.setattr("hf_aace.loss_meter.logger.warning", told.append)
    check_goes_on_working(model, tmp_path, data_collator=collator)
    left_out = [text for text in told if "the outputs of the model cannot be copied" in text]
    assert not said and bool(left_out) == (model is ReturnsADefault)


def test_lists_of_images_are_cut_by_ascent_fraction(tmp_path):
    class OfLists(AACETrainer):
        def ascent_outputs(self, model, inputs):
            return model(torch.stack(inputs["images"]))

    trainer = trainer_for_single_steps(convnext(), tmp_path, OfLists, rho=0.1, ascent_fraction=0.25)
    whole = batch(16)
    with trainer.perturbed_weights(trainer.model, {"images": list(whole["pixel_values"]), "labels": whole["labels"]}):
        moved = weights(trainer.model)
    reference = trainer_for_single_steps(convnext(), tmp_path, rho=0.1)
    with reference.perturbed_weights(reference.model, batch(4)):
        assert identical(weights(reference.model), moved)


class TimeFirst(Linear):
    """Takes images with the samples in the second dimension."""

    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values.transpose(0, 1), labels)


def test_inputs_that_ascent_fraction_cannot_cut_are_told(tmp_path):
    def collate(rows):
        columns = default_data_collator(rows)
        return {**columns, "pixel_values": columns["pixel_values"].transpose(0, 1)}

    settings = {"data_collator": collate, "rho": 0.1}
    with pytest.raises(ValueError, match=r"`ascent_fraction` takes 8 of the 16 samples .* Set `ascent_fraction=1`"):
        train(AACETrainer, AACEConfig, TimeFirst(), tmp_path, ascent_fraction=0.5, **settings)
    assert train(AACETrainer, AACEConfig, TimeFirst(), tmp_path, **settings).state.global_step == 6


class FeaturesFirst(nn.Module):
    """Returns features before the logits."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.first, self.last = config, nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, pixel_values):
        features = self.first(pixel_values.flatten(1)).tanh()
        return features, self.last(features)


@pytest.mark.parametrize("mended", [False, True])
def test_features_that_are_taken_for_the_logits_are_told(mended, tmp_path, monkeypatch):
    """The perturbation would silently be of another loss."""

    class Mended(AACETrainer):
        def ascent_logits(self, outputs):
            return outputs[1]

    def loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs[1], labels)

    said = []
    monkeypatch.setattr("hf_aace.checks.logger.warning", said.append)
    model = FeaturesFirst(PreTrainedConfig(num_labels=10))
    settings = {"compute_loss_func": loss, "remove_unused_columns": False}
    train(Mended if mended else AACETrainer, AACEConfig, model, tmp_path, rho=0.1, **settings)
    assert len(said) == (not mended)
    assert all("32 columns" in text and "`num_labels=10`" in text and "`ascent_logits`" in text for text in said)


def test_custom_sampler_and_overridden_log_keep_working(tmp_path):
    class Mine(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def log(self, logs, *args, **kwargs):
            logs["mine"] = 1.0
            super().log(logs, *args, **kwargs)

    class Ours(AACETrainer, Mine):
        pass

    plain, vanishing, _ = check_goes_on_working(vit, tmp_path, trainer=Mine, ours=Ours)
    assert all(log["mine"] == 1.0 for log in vanishing.state.log_history)
    assert [log["loss"] for log in learning_curve(plain)[:1]] == [log["loss"] for log in learning_curve(vanishing)[:1]]


def test_a_loss_logged_within_a_step_is_no_error(tmp_path):
    """With one perturbation for several micro-batches there is nothing to add to it in the later ones."""

    class Logs(AACETrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.log({"loss": float(loss.detach())})
            return loss

    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "ascent_scope": "full_batch", "logging_steps": 1}
    trainer = Logs(convnext(), training_arguments(AACEConfig, tmp_path, **options), train_dataset=digits())
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 2 * (2 + 1)
    assert all(log["skipped_perturbations"] == 0 for log in logged if "perturbation_norm" in log)


def test_a_sampler_of_ones_own_is_in_step_without_use_seedable_sampler_alone():
    """With the option, which Trainer sets, accelerate leaves such a sampler's generator to each process."""

    def loader(process, seedable):
        torch.manual_seed(0)
        torch.rand(process)  # the second process has drawn one number more
        data = DataLoader(range(64), batch_size=8, sampler=SubsetRandomSampler(range(64)))
        return prepare_data_loader(data, num_processes=2, process_index=process, use_seedable_sampler=seedable)

    assert TrainingArguments().accelerator_config.use_seedable_sampler
    assert len(torch.cat([*loader(0, True), *loader(1, True)]).unique()) < 64
    assert loader(0, False).synchronized_generator is not None


def flipped(inputs):
    return {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}


class ChangesInTrainingStep(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, flipped(inputs), *args, **kwargs)


class ChangesInComputeLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, flipped(inputs), *args, **kwargs)


class InTrainingStep(SharpnessAwareMixin, ChangesInTrainingStep):
    pass


class InComputeLoss(SharpnessAwareMixin, ChangesInComputeLoss):
    pass


class InFront(AACETrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, flipped(inputs), *args, **kwargs)


class InBoth(InComputeLoss):
    def ascent_outputs(self, model, inputs):
        return super().ascent_outputs(model, flipped(inputs))


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("cls", [InTrainingStep, InComputeLoss, InFront, InBoth, AACETrainer])
def test_a_batch_that_only_the_descent_sees_changed_is_told(cls, fraction, tmp_path, monkeypatch):
    """The perturbation would silently be that of other images."""
    said = []
    monkeypatch.setattr("hf_aace.pass_checks.logger.warning", said.append)
    train(cls, AACEConfig, convnext(), tmp_path, rho=0.1, ascent_fraction=fraction)
    assert len(said) == (cls in (InTrainingStep, InComputeLoss))
    assert all("gets another `pixel_values`" in warning and cls.__name__ in warning for warning in said)
