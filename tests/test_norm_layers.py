# SPDX-License-Identifier: Apache-2.0
"""`perturb_modules="norm"` perturbs the parameters of normalization layers: all of them and no others, whatever their names."""

import pytest
import torch
import transformers
from comparison import train
from tiny import digits, resnet, training_arguments
from tiny_configs import image_classifier, inputs
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_aace import AACEConfig, AACETrainer


# Layers that hold parameters called `weight` or `bias` in the image classifiers of Transformers. A layer of neither list is new:
# look whether the rule is right for it.
NORMALIZATION = {
    "BatchNorm1d", "BatchNorm2d", "BitGroupNormActivation", "ConvNextLayerNorm", "ConvNextV2LayerNorm", "CvtLayerNorm",
    "FocalNetLayerNorm", "GroupNorm", "ImageGPTLayerNorm", "LayerNorm", "PoolFormerGroupNorm", "RMSNorm",
}  # fmt: skip
OTHER = {
    "BitConv2d", "Conv1D", "Conv2d", "Conv2dSamePadding", "ConvNextV2GRN", "EfficientNetDepthwiseConv2d", "Embedding", "Linear",
    "NonDynamicallyQuantizableLinear", "WeightStandardizedConv2d",
}  # fmt: skip
# `DiNAT` needs the library natten, TimmWrapper timm.
CLASSES = sorted(
    {
        name
        for names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
        for name in ([names] if isinstance(names, str) else names)
    }
    - {"DinatForImageClassification", "TimmWrapperForImageClassification", "ShieldGemma2ForImageClassification"}
)


def perturbed_in_one_step(model, columns, output_dir, **kwargs) -> dict[str, bool]:
    """Tell for each parameter, by name, whether the descent saw it moved."""
    seen = {}

    class Spy(AACETrainer):
        def compute_loss(self, model, inputs, **kwargs):
            seen.update({name: p.detach().clone() for name, p in model.named_parameters()})
            return super().compute_loss(model, inputs, **kwargs)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = len(next(iter(columns.values())))
    rows = [{**{key: value[i] for key, value in columns.items()}, "labels": i % 4} for i in range(count)]
    arguments = training_arguments(
        AACEConfig, output_dir, rho=1e3, max_steps=1, per_device_train_batch_size=count, **kwargs
    )
    Spy(model, arguments, train_dataset=rows).train()
    return {name: not torch.equal(before[name], seen[name]) for name in before}


@pytest.mark.parametrize("name", CLASSES)
def test_every_normalization_layer_of_the_default_configuration_is_told_by_its_type(name, tmp_path):
    """Without memory, on the meta device: the small configurations of the other tests leave some kinds of blocks out."""
    from hf_aace.parameters import parameters_to_perturb

    cls = getattr(transformers, name)
    with torch.device("meta"):
        # The default number of heads does not go with the default number of channels.
        model = cls(cls.config_class(**{"num_cross_attention_heads": 1} if name.startswith("Perceiver") else {}))
    chosen = {id(p) for p in parameters_to_perturb(model, "norm")}
    assert chosen, "every image classifier has normalization layers"
    for module in model.modules():
        own = [p for key, p in module.named_parameters(recurse=False) if key in ("weight", "bias")]
        if own:
            kind = type(module).__name__
            assert kind in NORMALIZATION | OTHER, "a new kind of layer: is the rule right for it?"
            assert {id(p) in chosen for p in own} == {kind in NORMALIZATION}, kind


# Models in which a regular expression `norm` over the names of parameters misses some.
@pytest.mark.parametrize(
    "name",
    ["ConvNextForImageClassification", "EfficientNetForImageClassification", "SwiftFormerForImageClassification",
     "ImageGPTForImageClassification"],
)  # fmt: skip
def test_all_normalization_layers_are_perturbed_and_nothing_else(name, tmp_path):
    torch.manual_seed(0)
    model = image_classifier(name)
    moved = perturbed_in_one_step(model, inputs(name, 16), tmp_path, perturb_modules="norm")
    norm = {
        f"{path}.{key}"
        for path, module in model.named_modules()
        if type(module).__name__ in NORMALIZATION
        for key, _ in module.named_parameters(recurse=False)
    }
    assert any("norm" not in path for path in norm), "or the test says nothing that the names do not"
    assert not [path for path, was_moved in moved.items() if was_moved and path not in norm]
    # Not all: a layer on a path that was dropped has no gradient.
    assert any(moved[path] for path in norm if "norm" not in path)


def test_layers_of_ones_own_are_told_by_their_class(tmp_path):
    """As many projects write their own RMSNorm; the weights of a convolution that normalizes them are no such parameters."""

    class MyRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return x * x.square().mean(1, keepdim=True).rsqrt() * self.weight * self.scale

    class WeightNormConv(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.head = WeightNormConv(1, 8, 3, bias=False), MyRMSNorm(), nn.Linear(8, 10)

        def forward(self, pixel_values, labels=None):
            logits = self.head(self.a(self.conv(pixel_values).mean((2, 3))))
            return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)

    columns = {"pixel_values": torch.stack([row["pixel_values"] for row in digits(16)])}
    moved = perturbed_in_one_step(Mine(), columns, tmp_path, perturb_modules="norm")
    assert [name for name, was_moved in moved.items() if was_moved] == ["a.weight"]


class Unusual(nn.Module):
    """Has normalization layers whose parameters have other names, or several dimensions, beside usual ones."""

    class ChannelNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return self.gamma * x / x.norm(dim=-1, keepdim=True) + self.beta

    class NormLinear(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)

    def __init__(self):
        super().__init__()
        self.image_norm, self.usual = nn.LayerNorm((1, 8, 8)), nn.LayerNorm(8)
        self.first, self.own, self.head = nn.Linear(64, 8), self.ChannelNorm(), self.NormLinear(8, 10)

    def forward(self, pixel_values, labels=None):
        hidden = self.first(self.image_norm(pixel_values).flatten(1))
        logits = self.head(self.own(self.usual(hidden)))
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


def test_parameters_of_normalization_layers_that_are_left_out_are_named_with_an_expression(tmp_path, warnings):
    columns = {"pixel_values": torch.stack([row["pixel_values"] for row in digits(16)])}
    moved = perturbed_in_one_step(Unusual(), columns, tmp_path, perturb_modules="norm")
    assert {name for name, was_moved in moved.items() if was_moved} == {"usual.weight", "usual.bias", "head.bias"}
    (text,) = [text for text in warnings if "leaves out" in text]
    assert "leaves out 4 parameters of normalization layers, such as ['image_norm.weight', " in text
    assert "if the names of the others hold `norm`" in text
    expression = text.partition('names: `perturb_modules="')[2].partition('"')[0]
    moved = perturbed_in_one_step(Unusual(), columns, tmp_path, perturb_modules=expression)
    named = {"image_norm.weight", "image_norm.bias", "own.gamma", "own.beta"}
    assert {name for name, was_moved in moved.items() if was_moved} == named
    warnings.clear()
    perturbed_in_one_step(resnet(), columns, tmp_path, perturb_modules="norm")
    assert not [text for text in warnings if "leaves out" in text]


def test_the_weight_of_a_normalization_layer_is_perturbed_where_a_parametrization_has_moved_it(tmp_path):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = Unusual()
    nn.utils.parametrize.register_parametrization(model.usual, "weight", Doubled())
    columns = {"pixel_values": torch.stack([row["pixel_values"] for row in digits(16)])}
    moved = perturbed_in_one_step(model, columns, tmp_path, perturb_modules="norm")
    assert {name for name, was_moved in moved.items() if was_moved} == {
        "usual.parametrizations.weight.original",
        "usual.bias",
        "head.bias",
    }


def test_frozen_normalization_layers_stay(tmp_path):
    model = resnet()
    frozen = [p for name, p in model.named_parameters() if "embedder" in name]
    for p in frozen:
        p.requires_grad = False
    columns = {"pixel_values": torch.stack([row["pixel_values"] for row in digits(16)])}
    moved = perturbed_in_one_step(model, columns, tmp_path, perturb_modules="norm")
    assert any(moved.values()) and not any(moved[name] for name in moved if "embedder" in name)


def test_other_values_are_regular_expressions_over_the_names(tmp_path):
    columns = {"pixel_values": torch.stack([row["pixel_values"] for row in digits(16)])}
    moved = perturbed_in_one_step(resnet(), columns, tmp_path, perturb_modules=r"norm.*\.bias$")
    assert {name for name, was_moved in moved.items() if was_moved} == {
        name for name in moved if "normalization" in name and name.endswith("bias")
    }


def test_a_model_without_normalization_layers_is_refused_by_the_option(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(
        ValueError, match=r"perturb_modules='norm'.*none of the 2 trainable parameters.*means the normalization layers"
    ):
        train(AACETrainer, AACEConfig, model, tmp_path, perturb_modules="norm")


@pytest.mark.parametrize(
    ("settings", "rho"),
    [
        ({}, 0.01),
        ({"perturb_modules": "norm"}, 10.0),
        ({"perturb_modules": "norm", "method": "sam"}, 1.0),
        ({"perturb_modules": "norm", "perturbation_loss": "cross_entropy", "normalize_perturbation": True}, 1.0),
        ({"perturb_modules": "norm", "rho": 0.3}, 0.3),
        ({"perturb_modules": "norm", "normalize_perturbation": True}, 0.01),  # a length, of no method: not 10
        ({"perturb_modules": "norm|bn"}, 0.01),
    ],
    ids=str,
)
def test_default_rho_follows_what_is_perturbed(settings, rho, tmp_path):
    """A rho for all weights moves next to nothing of normalization layers: plain training at the price of two passes."""
    assert AACEConfig(str(tmp_path), **settings).rho == rho


def test_families_of_timm_that_name_their_layers_otherwise(tmp_path):
    timm = pytest.importorskip("timm")
    from hf_aace.parameters import parameters_to_perturb

    for name in (
        "efficientnet_b0",
        "mobilenetv3_small_050",
        "levit_128s",
        "coatnet_pico_rw_224",
        "resnetv2_50",
        "mixer_s32_224",
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        chosen = {id(p) for p in parameters_to_perturb(model, "norm")}
        for module in model.modules():
            own = [p for key, p in module.named_parameters(recurse=False) if key in ("weight", "bias")]
            if own and isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
                assert all(id(p) in chosen for p in own), (name, module)
            elif own and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                assert not any(id(p) in chosen for p in own), (name, module)
