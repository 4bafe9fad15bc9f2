# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says; how fast it is here is no test."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import batch, convnext, resnet, training_arguments, vit, weights
from torch import nn

from hf_aace import AACEArguments, AACEConfig
from hf_aace.cli import main
from hf_aace.config import METHODS
from hf_aace.perturbation import PROFILED
from hf_aace.study.cost import Measurement, default_methods, measure, random_batch, summarize
from hf_aace.vision.models import model_from_architecture


def bytes_of(parameters):
    return sum(p.numel() * p.element_size() for p in parameters)


def test_every_method_has_its_turn_in_every_round(tmp_path):
    """Each with its own settings, and none with those of another: plain steps make no ascent pass."""
    model, passes = vit(), []
    model.register_forward_hook(lambda module, inputs, outputs: passes.append(len(outputs.logits)))
    methods = default_methods([0.25])
    result = measure(model, batch(16), training_arguments(AACEConfig, tmp_path), methods, rounds=3, warmup=1)
    assert [measurement.name for measurement in result] == [
        "plain Trainer",
        "AACE",
        "AACE, 0.25 of the batch",
        "SAM",
    ]
    # Turn by turn, each round begins with another method.
    steps = {0: [16], 1: [16, 16], 2: [4, 16], 3: [16, 16]}
    order = [(index + turn) % 4 for turn in range(5) for index in range(4)]
    assert passes == [size for index in order for size in steps[index]]
    for measurement in result:
        assert len(measurement.seconds) == 3
        assert all(seconds > 0 for seconds in measurement.seconds)
    assert summarize(result, 16)[0]["ratio_quartiles"] == [1, 1]
    shares = [measurement.perturbation_share for measurement in result]
    assert shares[0] == 0 and all(0 < share < 1 for share in shares[1:])


def test_steps_that_share_an_ascent_pass_are_measured_together(tmp_path):
    """A time for each round, the mean over the step with an ascent pass and those without; no gradient of an earlier round."""
    model, passes = vit(), []
    model.register_forward_hook(lambda module, inputs, outputs: passes.append(len(outputs.logits)))
    methods = dict(list(default_methods([0.25], [1, 3, 4]).items())[:7])  # without SAM
    result = measure(model, batch(16), training_arguments(AACEConfig, tmp_path), methods, rounds=2, warmup=1)
    assert [measurement.name for measurement in result] == [
        "plain Trainer",
        "AACE",
        "AACE, 0.25 of the batch",
        "AACE, every 3 steps",
        "AACE, 0.25 of the batch, every 3 steps",
        "AACE, every 4 steps",
        "AACE, 0.25 of the batch, every 4 steps",
    ]
    steps = [[16], [16] * 2, [4, 16], [16] * 4, [4] + [16] * 3, [16] * 5, [4] + [16] * 4]
    order = [(index + turn) % 7 for turn in range(4) for index in range(7)]
    assert passes == [size for index in order for size in steps[index]]
    assert all(len(measurement.seconds) == 2 for measurement in result)
    assert all(measurement.peak_bytes > 0 for measurement in result)


def test_numbers_of_steps_that_share_an_ascent_pass_are_those_of_one_step(tmp_path, monkeypatch):
    """By a clock on which a step takes a second, and in each round twice as long as in the one before."""
    # Which is looked at twice for each of the four steps of a round.
    looks = itertools.accumulate(2 ** (look // 8) for look in itertools.count())

    class Profile:
        """Saw 100 bytes come and go, and 12 seconds of perturbations."""

        def start(self):
            pass

        stop = start

        def export_chrome_trace(self, path):
            memory = [{"name": "[memory]", "ts": time, "args": {"Bytes": 100 - 200 * time}} for time in range(2)]
            steps = [{"name": PROFILED + name, "ts": 0, "dur": 4e6} for name in ("norm", "step", "restore")]
            Path(path).write_text(json.dumps({"traceEvents": [*memory, *steps]}))

    monkeypatch.setattr("hf_aace.study.cost.time", SimpleNamespace(perf_counter=looks.__next__))
    monkeypatch.setattr("torch.profiler.profile", lambda **kwargs: Profile())
    methods = {"plain": AACEArguments(rho=0), "AACE": AACEArguments(ascent_every=3)}
    arguments = training_arguments(AACEConfig, tmp_path)
    plain, shared = measure(vit(), batch(16), arguments, methods, rounds=3, warmup=1)
    assert plain.seconds == shared.seconds == [2, 4, 8]
    assert plain.peak_bytes == shared.peak_bytes == 100
    assert shared.perturbation_share == 12 / (3 * 16)


def test_methods_are_what_they_are_called():
    """Or the table would tell the cost of one under the name of another."""
    plain, aace, sam = default_methods([]).values()
    assert plain.rho == 0
    assert aace == AACEArguments()
    assert {name: getattr(sam, name) for name in METHODS["sam"]} == METHODS["sam"]


def test_perturbing_a_part_of_the_model_is_measured_too():
    methods = default_methods([0.25], [1, 4], "norm")
    assert list(methods)[5:] == [
        "AACE, norm only",
        "AACE, norm only, 0.25 of the batch",
        "AACE, norm only, every 4 steps",
        "AACE, norm only, 0.25 of the batch, every 4 steps",
        "SAM",
    ]
    assert [settings.perturb_modules for settings in methods.values()] == [None] * 5 + ["norm"] * 4 + [None]


class Wide(nn.Module):
    """Many weights and few activations, so that a copy of the weights shows."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 4000), nn.Linear(4000, 10)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values.flatten(1)).relu())
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


@pytest.mark.parametrize("part", ["all", "body"])
@pytest.mark.parametrize("make_model", [Wide, vit, convnext])
def test_memory_over_plain_is_at_most_a_copy_of_what_is_perturbed(make_model, part, tmp_path):
    """The backup. What else is allocated goes before the descent pass begins."""
    model = make_model()
    pattern = {"all": None, "body": "body|layers"}[part]
    perturbed = [p for name, p in model.named_parameters() if pattern is None or "body" in name or "layers" in name]
    methods = {"plain": AACEArguments(rho=0), "AACE": AACEArguments(perturb_modules=pattern)}
    result = measure(model, batch(16), training_arguments(AACEConfig, tmp_path), methods, rounds=2, warmup=1)
    extra = result[1].peak_bytes - result[0].peak_bytes
    assert result[0].peak_bytes > 0
    assert extra <= 1.02 * bytes_of(perturbed)


def test_summary_is_of_medians():
    rows = summarize(
        [
            Measurement("plain", [1.0, 1.0, 10.0], 100),
            Measurement("other", [2.0, 1.0, 30.0], 150),
            Measurement("third", [2.0, 3.0, 20.0], 150),
        ],
        batch_size=8,
    )
    assert rows[1]["seconds"] == 2.0
    assert rows[1]["images_per_second"] == 4.0
    assert rows[1]["ratio"] == 2
    assert rows[1]["ratio_quartiles"] == [1.5, 2.5]
    assert rows[1]["extra_peak_bytes"] == 50
    assert rows[2]["ratio"] == 2, "within the rounds: a slow time of the machine is that of both"


def test_command_leaves_numbers_and_a_picture(tmp_path, capsys):
    pytest.importorskip("pytorch_optimizer")
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    argv = "benchmark --model_name_or_path vit --batch_size 4 --rounds 2 --warmup 1 --device cpu --peers true"
    overrides = json.dumps(size)
    assert main([*argv.split(), "--config_overrides", overrides, "--output_dir", str(tmp_path / "cost")]) == 0
    screen = capsys.readouterr().out
    report = json.loads((tmp_path / "cost" / "benchmark.json").read_text())
    names = [row["name"] for row in report["methods"]]
    assert names[0] == "plain Trainer" and names[-1] == "SAM of pytorch_optimizer" and len(names) == 7
    assert all(name in screen for name in names)
    assert (tmp_path / "cost" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path(tmp_path / "cost").glob("checkpoint-*"))


def test_command_measures_a_model_with_batch_norm(tmp_path, capsys):
    argv = "benchmark --model_name_or_path resnet-tiny-digits --batch_size 4 --rounds 2 --warmup 0 --device cpu --image_size 8"
    assert main([*argv.split(), "--output_dir", str(tmp_path)]) == 0
    assert "AACE, 0.25 of the batch" in capsys.readouterr().out


def test_a_peer_makes_two_passes_the_second_at_perturbed_weights(tmp_path):
    """Or the comparison would be with less than what it does."""
    pytest.importorskip("pytorch_optimizer")
    model, seen = vit(), []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(weights(model)))
    measure(
        model,
        batch(16),
        training_arguments(AACEConfig, tmp_path),
        {"plain": AACEArguments(rho=0)},
        rounds=2,
        warmup=0,
        peers=True,
    )
    assert len(seen) == 3 * 3, "a plain step, then the two passes of the peer"
    for clean, perturbed in zip(seen[1::3], seen[2::3], strict=True):
        step = torch.cat([(perturbed[name] - clean[name]).flatten() for name in clean])
        assert step.norm() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--rounds", "1"], "`rounds` must be at least 2, got 1"),
        (["--device", "tpu"], "`device` must be `auto`, `cpu` or `cuda`, got 'tpu'"),
        (["--model_name_or_path", "bert"], "`model_name_or_path` is 'bert', from which no image classifier"),
        (["--model_name_or_path", "vit", "--config_overrides", '{"width": 3}'], "no field 'width'"),
        (["--config_overrides", '{"depths": 0}'], "from which no image classifier can be made"),
        (["--config_overrides", "{width"], "`config_overrides` must be a JSON object, got '{width'"),
        (["--config_overrides", "[1]"], "`config_overrides` must be a JSON object, got '[1]'"),
        (["--warmup", "-1"], "`warmup` must be at least 0, got -1"),
        (["--fractions", "0.5", "2"], "`ascent_fraction` must lie in (0, 1], got 2.0"),
        (["--ascent_every", "1", "0"], "`ascent_every` must be"),
        (["--perturb_modules", "norm("], "`perturb_modules` must be 'norm' or a regular expression"),
        (["--perturb_modules", "nothing", "--rounds", "2"], "`perturb_modules='nothing'` matches none"),
    ],
)
def test_bad_input_is_told_in_one_sentence(argv, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "--device", "cpu", *argv]) == 1
    assert expected in capsys.readouterr().err


def test_peers_that_are_not_installed_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert main(["benchmark", "--device", "cpu", "--peers", "true"]) == 1
    assert "`pip install pytorch-optimizer`" in capsys.readouterr().err


def test_noise_is_of_the_shape_that_the_model_takes():
    model = vit()
    images = random_batch(model, 3)
    assert images["pixel_values"].shape == (3, 1, 8, 8)
    assert images["labels"].max() < 10
    assert random_batch(model, 3, 16)["pixel_values"].shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match=r"no `image_size`: say it by `--image_size`"):
        random_batch(resnet(), 3)  # takes images of any size


def test_a_model_type_gives_its_default_size():
    with torch.device("meta"):
        model = model_from_architecture("vit")
    assert sum(p.numel() for p in model.parameters()) > 85e6  # ViT-B/16
