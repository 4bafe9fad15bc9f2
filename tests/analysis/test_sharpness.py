# SPDX-License-Identifier: Apache-2.0
"""The measures of sharpness against exact values, and the model afterwards as it was."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import MODELS, Small, batch, identical, resnet, small_data, vit, weights
from torch import nn

from hf_aace import aace_loss
from hf_aace.analysis.sharpness import (
    average_sharpness,
    hessian_eigenvalues,
    hessian_trace,
    losses_and_gradient_norms,
    margins,
    measure_sharpness,
    sam_sharpness,
)


def joint(batches):
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


def exact_hessian(model, batches):
    data = joint(batches)
    model = model.double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def loss(vector):
        parts = vector.split(sizes)
        values = {name: part.view_as(p) for part, (name, p) in zip(parts, parameters.items(), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (data["x"].double(),)), data["labels"])

    vector = torch.cat([p.reshape(-1) for p in parameters.values()])
    return torch.func.hessian(loss)(vector).numpy()


class Quadratic(nn.Module):
    """Two weights, of which the logits are such that the loss is known in closed form: softplus(w . x)."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x):
        return torch.stack((torch.zeros(len(x)), x @ self.w), dim=1)


def test_eigenvalues_and_trace_are_those_of_the_exact_hessian():
    data = small_data()
    values, vectors = hessian_eigenvalues(Small(), data, 4)
    trace = hessian_trace(Small(), data)
    hessian = exact_hessian(Small(), data)
    assert sum(p.numel() for p in Small().parameters()) == len(hessian) == 303
    expected = np.linalg.eigvalsh(hessian)[::-1]
    np.testing.assert_allclose(values, expected[:4], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    for value, vector in zip(values, vectors, strict=True):
        assert np.linalg.norm(hessian @ vector - value * vector) < 1e-2 * value
    assert (vectors[np.arange(4), np.abs(vectors).argmax(axis=1)] > 0).all(), "or pictures of them would be mirrored"
    assert abs(trace.value - np.trace(hessian)) < 4 * trace.standard_error


def test_the_trace_is_exact_where_the_subspace_holds_the_hessian():
    """Cross-entropy of a linear layer on 2 samples: a Hessian of rank 4 at most, so 4 vectors span its range."""
    torch.manual_seed(0)
    model, data = nn.Linear(20, 3), [{"input": b["x"][:1], "labels": b["labels"][:1]} for b in small_data((2, 2))]
    values, _ = hessian_eigenvalues(model, data, 4)
    trace = hessian_trace(model, data, products=12)
    assert trace.value == pytest.approx(values.sum(), rel=1e-4)
    assert trace.standard_error < 1e-4 * trace.value


def test_the_standard_error_of_the_trace_is_that_over_seeds():
    """If it were too small, or of something else, the estimates would scatter by more."""
    data = small_data()
    model = Small()
    estimates = [hessian_trace(model, data, products=15, seed=seed) for seed in range(20)]
    exact = np.trace(exact_hessian(Small(), data))
    scaled = [(estimate.value - exact) / estimate.standard_error for estimate in estimates]
    assert 0.5 < np.sqrt(np.mean(np.square(scaled))) < 2.5


def test_losses_gradients_and_margins_are_over_all_samples():
    model, data = Small(), small_data()
    found = losses_and_gradient_norms(model, data)
    whole = joint(data)
    logits = model(whole["x"])
    for name, loss in (("cross_entropy", F.cross_entropy), ("aace", aace_loss)):
        value = loss(logits, whole["labels"])
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
        assert found[name] == pytest.approx(value.item(), rel=1e-5)
        assert found[f"{name}_grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    right = logits.argmax(1) == whole["labels"]
    assert found["accuracy"] == pytest.approx(right.float().mean().item())
    assert np.array_equal(margins(model, data) > 0, right.numpy())


def test_a_tie_is_no_right_answer():
    """Or a model that says the same of all images would be right on each of them."""
    data = [{"x": torch.zeros(2, 2), "labels": torch.tensor([0, 1])}]
    assert losses_and_gradient_norms(Quadratic([1.0, 1.0]), data)["accuracy"] == 0


def test_ignored_samples_do_not_count():
    data = small_data((20,))
    kept = [{"x": data[0]["x"][5:], "labels": data[0]["labels"][5:]}]
    data[0]["labels"][:5] = -100
    for measure in (
        losses_and_gradient_norms,
        lambda m, d: sam_sharpness(m, d, 0.1),
        lambda m, d: sam_sharpness(m, d, 0.1, m=5),
        lambda m, d: hessian_eigenvalues(m, d)[0][0],
        lambda m, d: average_sharpness(m, d, 10.0).value,
    ):
        assert measure(Small(), data) == pytest.approx(measure(Small(), kept), rel=1e-5)
    assert len(margins(Small(), data)) == 15


# ---- The rise in a ball ------------------------------------------------------


def test_worst_case_of_one_step_is_sams():
    data = [joint(small_data())]
    model = Small()
    loss = F.cross_entropy(model(data[0]["x"]), data[0]["labels"])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    moved = Small()
    with torch.no_grad():
        for p, g in zip(moved.parameters(), gradients, strict=True):
            p += 0.3 * g / norm
        expected = F.cross_entropy(moved(data[0]["x"]), data[0]["labels"]) - loss
    assert sam_sharpness(model, data, 0.3, steps=1) == pytest.approx(expected.item(), rel=1e-4)


def test_worst_case_is_the_greatest_in_the_ball():
    """Of two weights the whole circle can be searched; the gradient at the weights points elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=generator) * torch.tensor([3.0, 0.5])
    data = [{"x": x, "labels": (x @ torch.tensor([1.0, 2.0]) < 0.3).long()}]
    model = Quadratic([-0.9, -1.5])
    for adaptive in (False, True):
        angle = torch.linspace(0, 2 * torch.pi, 2000)
        scale = model.w.detach().abs() if adaptive else torch.ones(2)
        circle = model.w.detach() + 0.8 * scale * torch.stack((angle.cos(), angle.sin()), dim=1)
        losses = [F.cross_entropy(Quadratic(w.tolist())(x), data[0]["labels"]).item() for w in circle]
        expected = max(losses) - F.cross_entropy(model(x), data[0]["labels"]).item()
        many = sam_sharpness(model, data, 0.8, adaptive=adaptive)
        assert many == pytest.approx(expected, rel=1e-3)
        assert sam_sharpness(model, data, 0.8, adaptive=adaptive, steps=1) < 0.99 * expected


class Wave(nn.Module):
    """One weight, whose loss has its greatest value inside the ball, not on its edge."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x):
        return torch.stack((torch.zeros(len(x)), 3 * self.w.sin() * x), dim=1)


def test_worst_case_inside_the_ball_is_found():
    """By halving the steps that overshoot it."""
    data = [{"x": torch.ones(2), "labels": torch.zeros(2, dtype=torch.long)}]
    expected = np.logaddexp(0, 3) - np.log(2)  # at w = pi / 2
    assert sam_sharpness(Wave(), data, 3.0) == pytest.approx(expected, rel=1e-4)


def test_the_adaptive_rise_does_not_change_when_layers_are_rescaled():
    """The reason for it: the network computes the same function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    data = [{"input": b["x"], "labels": b["labels"]} for b in small_data()]
    before = sam_sharpness(model, data, 0.5, adaptive=True), sam_sharpness(model, data, 0.5)
    with torch.no_grad():
        model[0].weight *= 8
        model[2].weight /= 8
    after = sam_sharpness(model, data, 0.5, adaptive=True), sam_sharpness(model, data, 0.5)
    assert after[0] == pytest.approx(before[0], rel=1e-3)
    assert after[1] > 1.5 * before[1]


def test_m_sharpness_is_the_mean_over_groups():
    model, data = Small(), small_data((7, 4))
    whole = joint(data)
    groups = [slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 10), slice(10, 11)]
    rises = [sam_sharpness(model, [{k: v[g] for k, v in whole.items()}], 0.2) for g in groups]
    sizes = [len(whole["x"][g]) for g in groups]
    assert sam_sharpness(model, data, 0.2, m=3) == pytest.approx(np.average(rises, weights=sizes), rel=1e-5)
    assert sam_sharpness(model, data, 0.2, m=3) > sam_sharpness(model, data, 0.2), "each has its own worst case"


def test_what_is_not_of_the_samples_is_not_cut_into_groups():
    """A weight for each feature, or a temperature, is the same for all groups."""

    class Scaled(Small):
        def forward(self, x, scale, temperature):
            return super().forward(x * scale) / temperature

    (data,) = small_data((7,))
    extra = {"scale": torch.linspace(0.5, 2, 20), "temperature": torch.tensor(0.5)}
    groups = [{key: value[start : start + 3] for key, value in data.items()} for start in (0, 3, 6)]
    rises = [sam_sharpness(Scaled(), [group | extra], 0.2) for group in groups]
    found = sam_sharpness(Scaled(), [data | extra], 0.2, m=3)
    assert found == pytest.approx(np.average(rises, weights=[3, 3, 1]), rel=1e-5)


def test_average_rise_follows_the_trace():
    data = small_data()
    model = Small()
    hessian = exact_hessian(Small(), data)
    expected = 0.1**2 / 2 * np.trace(hessian) / len(hessian)
    found = average_sharpness(model, data, 0.1, directions=200)
    assert abs(found.value - expected) < 4 * found.standard_error
    assert found.standard_error < 1e-3, "or the comparison says nothing"
    assert found == average_sharpness(model, data, 0.1, directions=200)
    assert found != average_sharpness(model, data, 0.1, directions=200, seed=1)


def test_each_direction_is_taken_both_ways():
    """Near the weights the slope of the loss is far above its curvature, and is to cancel."""
    model, data = Quadratic([3.0, -3.0]), [{"x": torch.eye(2), "labels": torch.tensor([0, 1])}]
    expected = 0.01**2 / 2 * hessian_eigenvalues(model, data)[0][0]  # which is the same in all directions
    assert average_sharpness(model, data, 0.01, directions=10).value == pytest.approx(expected, rel=0.05)


def test_the_standard_error_of_the_average_rise_is_that_over_seeds():
    """Of two directions: an error that is too small, for being divided by their number, is so by a factor here."""
    model, (data,) = Quadratic([1.0, -2.0]), small_data((20,))
    data = [{"x": data["x"][:, :2], "labels": data["labels"] % 2}]
    values, errors = np.array([average_sharpness(model, data, 2.0, directions=2, seed=seed) for seed in range(300)]).T
    assert np.mean(errors**2) == pytest.approx(np.var(values), rel=0.25)


def test_all_measures_are_those_of_the_functions():
    """Each with its own radius, or a number would stand under the name of another measure."""
    model, data = Small(), small_data()
    average = average_sharpness(model, data, 0.7, directions=5, seed=1)
    trace = hessian_trace(model, data, products=9, seed=1)
    found = measure_sharpness(
        model,
        data,
        rho=0.1,
        adaptive_rho=0.3,
        average_rho=0.7,
        m=4,
        steps=3,
        directions=5,
        eigenvalues=2,
        products=9,
        seed=1,
    )
    assert found == losses_and_gradient_norms(model, data) | {
        "sam_sharpness": sam_sharpness(model, data, 0.1, steps=3, seed=1),
        "adaptive_worst_case_rise": sam_sharpness(model, data, 0.3, adaptive=True, steps=3, seed=1),
        "m_sharpness": sam_sharpness(model, data, 0.1, m=4, steps=3, seed=1),
        "average_sharpness": average.value,
        "average_sharpness_standard_error": average.standard_error,
        "hessian_eigenvalues": hessian_eigenvalues(model, data, 2, seed=1)[0].tolist(),
        "top_eigenvalue": hessian_eigenvalues(model, data, 2, seed=1)[0][0],
        "hessian_trace": trace.value,
        "hessian_trace_standard_error": trace.standard_error,
        "margins": margins(model, data).tolist(),
    }


def test_a_vanished_gradient_still_has_a_worst_case():
    model = Quadratic([0.0, 0.0])
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    data = [{"x": x, "labels": torch.tensor([0, 1])}]  # the gradients cancel; the Hessian does not
    assert losses_and_gradient_norms(model, data)["cross_entropy_grad_norm"] == 0
    expected = (np.logaddexp(0, 2) + np.logaddexp(0, -2)) / 2 - np.log(2)
    assert sam_sharpness(model, data, 2.0) == pytest.approx(expected, rel=1e-4)


# ---- What is left behind -----------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_measure_runs_and_leaves_the_model_as_it_was(name):
    model = MODELS[name]().train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    list(model.modules())[1].eval()  # a mode that is not the model's
    frozen = list(model.parameters())[-1].requires_grad_(False)
    data = [batch(6), batch(5, start=6)]
    before, modes = weights(model), [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    options = {"m": 4, "steps": 3, "directions": 2, "eigenvalues": 2, "products": 6}
    first_report, second_report = (measure_sharpness(model, data, **options) for _ in range(2))
    assert first_report == second_report
    assert all(np.isfinite(value).all() for value in first_report.values())
    assert identical(weights(model), before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(first.grad, torch.ones_like(first)) and not frozen.requires_grad
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_batches_that_draw_random_numbers_do_not_disturb_the_run():
    loader = torch.utils.data.DataLoader(list(zip(*batch(8).values(), strict=True)), shuffle=True)

    class Batches:
        def __iter__(self):
            np.random.rand()
            return iter([{"pixel_values": x, "labels": y} for x, y in loader])

    model = resnet()
    states = torch.get_rng_state(), np.random.get_state()[2]
    sam_sharpness(model, Batches(), 0.1, steps=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[2] == states[1]


def test_measures_do_not_depend_on_whether_gradients_are_on():
    """They may be called where a model is only evaluated."""
    model, data = Small(), small_data()
    with torch.no_grad():
        found = losses_and_gradient_norms(model, data)
    assert found == losses_and_gradient_norms(model, data)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_it_was_after_an_exception(error):
    model = resnet().train()
    before = weights(model)
    calls = []

    class Batches:
        """Raises in the third pass, at moved weights."""

        def __iter__(self):
            calls.append(identical(weights(model), before))
            if len(calls) == 3:
                raise error
            yield batch(4)

        __len__ = None

    with pytest.raises(error):
        sam_sharpness(model, Batches(), 0.5)
    assert calls[-1] is False
    assert identical(weights(model), before) and model.training


def test_batchnorm_is_measured_by_its_running_statistics():
    """One sample by itself has the loss that it has in a batch."""
    model, data = resnet().train(), batch(4)
    single = [{key: value[i : i + 1] for key, value in data.items()} for i in range(4)]
    together, apart = losses_and_gradient_norms(model, [data]), losses_and_gradient_norms(model, single)
    assert together == pytest.approx(apart, rel=1e-4)


def test_attention_has_second_derivatives_whatever_its_kernel():
    for implementation in ("sdpa", "eager"):
        model = vit()
        model.set_attn_implementation(implementation)
        value = hessian_eigenvalues(model, [batch(8)])[0][0]
        if implementation == "sdpa":
            expected = value
    assert value == pytest.approx(expected, rel=1e-3)


def test_a_compiled_model_is_measured_as_the_model_that_it_is():
    model = Small()
    compiled = torch.compile(model, backend="aot_eager")  # whose backward pass has no derivative
    assert hessian_eigenvalues(compiled, small_data())[0] == hessian_eigenvalues(model, small_data())[0]


# ---- Bad input -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: sam_sharpness(m, d, 0.0), "`rho` must be a finite number > 0, got 0.0"),
        (lambda m, d: sam_sharpness(m, d, float("nan")), "got nan"),
        (lambda m, d: sam_sharpness(m, d, 0.1, m=0), "`m` must be at least 1, got 0"),
        (lambda m, d: sam_sharpness(m, d, 0.1, steps=0), "`steps` must be at least 1"),
        (lambda m, d: average_sharpness(m, d, 0.1, directions=1), "`directions` must be at least 2"),
        (lambda m, d: hessian_eigenvalues(m, d, 303), "between 1 and 302"),
        (lambda m, d: hessian_trace(m, d, products=5), "`products` must be at least 6"),
        (lambda m, d: margins(m, iter(d)), "Pass a list"),
        (lambda m, d: margins(m, []), "no sample"),
        (lambda m, d: sam_sharpness(m, [{"x": d[0]["x"]}], 0.1, m=2), "needs `labels`"),
        (lambda m, d: margins(m, [{**d[0], "labels": d[0]["labels"] + 3}]), "Labels must lie in"),
        (lambda m, d: margins(m.half(), d), "float32"),
        (lambda m, d: margins(m.requires_grad_(False), d), "no parameter that requires a gradient"),
        (lambda m, d: losses_and_gradient_norms(m, [{**d[0], "x": d[0]["x"] * float("nan")}]), "diverged"),
        (lambda m, d: hessian_eigenvalues(m, [{**d[0], "x": d[0]["x"] * float("nan")}]), "diverged"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(Small(), small_data())
