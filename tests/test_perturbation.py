# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_aace import aace_loss, perturbed
from hf_aace.isolation import frozen_running_statistics
from hf_aace.perturbation import PROFILED


def parameters_and_gradients(dtype=torch.float32):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in ((5, 3), (7,), (2, 3, 4))]
    return parameters, [torch.randn_like(p) for p in parameters]


def step(parameters, gradients, rho, normalize, adaptive):
    """The table of the docstring, on all parameters as one float64 vector."""
    w = torch.cat([p.detach().flatten().double() for p in parameters])
    g = torch.cat([g.flatten().double() for g in gradients])
    direction = w**2 * g if adaptive else g
    length = (w.abs() * g if adaptive else g).norm() if normalize else 1.0
    return rho * direction / length


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_step_is_the_formula_and_is_undone_exactly(normalize, adaptive, maximize, dtype):
    parameters, gradients = parameters_and_gradients(dtype)
    before, given = [p.detach().clone() for p in parameters], [g.clone() for g in gradients]
    addresses = [p.data_ptr() for p in parameters]
    expected = step(parameters, gradients, 0.3, normalize, adaptive) * (1 if maximize else -1)
    with perturbed(
        parameters, gradients, 0.3, normalize=normalize, adaptive=adaptive, maximize=maximize
    ) as perturbation:
        torch.testing.assert_close(flat(parameters) - flat(before), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(perturbation.norm.double(), expected.norm())
    torch.testing.assert_close(perturbation.grad_norm.double(), flat(given).norm())
    assert perturbation.skipped == 0
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(torch.equal(g, b) for g, b in zip(gradients, given, strict=True)), "the gradients are the caller's"
    assert [p.data_ptr() for p in parameters] == addresses, "compiled graphs and flat buffers rely on them"


def test_step_is_the_formula_whatever_the_memory_layout():
    # The fused kernel walks memory linearly: transposed, channels-last and expanded tensors must not be mixed up.
    torch.manual_seed(0)
    transposed = nn.Parameter(torch.randn(3, 5).t())
    channels_last = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    contiguous = nn.Parameter(torch.randn(5, 3))
    parameters = [transposed, channels_last, contiguous]
    gradients = [torch.randn(5, 3), torch.randn(4, 3, 2, 2), torch.randn(1, 3).expand(5, 3)]
    before = flat(parameters)
    with perturbed(parameters, gradients, 0.5):
        torch.testing.assert_close(flat(parameters), before - 0.5 * flat(gradients))
    assert torch.equal(flat(parameters), before)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_grad_scale_divides_the_gradient(normalize, adaptive):
    parameters, gradients = parameters_and_gradients()
    settings = {"normalize": normalize, "adaptive": adaptive}
    with perturbed(parameters, gradients, 0.3, **settings) as plain:
        expected = flat(parameters)
    scaled = [g * 1024 for g in gradients]
    with perturbed(parameters, scaled, 0.3, grad_scale=torch.tensor(1024.0), **settings) as perturbation:
        torch.testing.assert_close(flat(parameters), expected)
    torch.testing.assert_close(perturbation.grad_norm, plain.grad_norm)
    torch.testing.assert_close(perturbation.norm, plain.norm)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gradient_that_is_not_finite_gives_no_step(value, layout):
    parameters, gradients = parameters_and_gradients()
    if layout == "transposed":
        parameters[0] = nn.Parameter(torch.randn(3, 5).t())
    gradients[1][2] = value
    before = flat(parameters)
    for normalize in (False, True):
        with perturbed(parameters, gradients, 0.3, normalize=normalize) as perturbation:
            assert torch.equal(flat(parameters), before)
        assert perturbation.skipped == 1 and perturbation.norm == 0


def test_zero_gradient_gives_no_step_rather_than_nan():
    parameters, gradients = parameters_and_gradients()
    zeros = [torch.zeros_like(g) for g in gradients]
    before = flat(parameters)
    for adaptive in (False, True):
        with perturbed(parameters, zeros, 0.3, normalize=True, adaptive=adaptive) as perturbation:
            assert torch.equal(flat(parameters), before)
        assert perturbation.skipped == 0 and perturbation.norm == 0


def test_a_step_that_is_not_finite_is_not_made():
    """`rho` times the norm may overflow where neither does."""
    parameters = [nn.Parameter(torch.ones(3))]
    with perturbed(parameters, [torch.full((3,), 1e15)], 1e30) as perturbation:
        assert torch.equal(parameters[0], torch.ones(3))
    assert perturbation.skipped == 1 and perturbation.norm == 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_normalized_step_has_its_length_however_small_the_gradient(adaptive):
    """As that of SAM is near the end of a training."""
    parameters, gradients = parameters_and_gradients()
    settings = {"normalize": True, "adaptive": adaptive}
    with perturbed(parameters, [g * 1e-6 for g in gradients], 0.3, **settings):
        moved = flat(parameters)
    with perturbed(parameters, gradients, 0.3, **settings):
        torch.testing.assert_close(moved, flat(parameters), rtol=0, atol=1e-6)


def test_rho_0_is_no_step():
    """And none that was skipped: nothing was wrong with the gradient."""
    parameters, gradients = parameters_and_gradients()
    before = flat(parameters)
    with perturbed(parameters, gradients, 0.0) as perturbation:
        assert torch.equal(flat(parameters), before)
    assert perturbation.norm == 0 and perturbation.skipped == 0


def test_parameters_without_gradient_stay():
    parameters, gradients = parameters_and_gradients()
    gradients[1] = None
    before = parameters[1].detach().clone()
    with perturbed(parameters, gradients, 0.3):
        assert torch.equal(parameters[1], before)


def test_restores_after_an_exception_inside():
    parameters, gradients = parameters_and_gradients()
    before = flat(parameters)
    for error in (RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError):
        with pytest.raises(error), perturbed(parameters, gradients, 0.3):
            assert not torch.equal(flat(parameters), before)
            raise error
        assert torch.equal(flat(parameters), before)


def test_is_used_up_after_one_entry():
    parameters, gradients = parameters_and_gradients()
    perturbation = perturbed(parameters, gradients, 0.3)
    with perturbation:
        pass
    before = flat(parameters)
    with pytest.raises(RuntimeError, match="make another one"), perturbation:
        pass
    assert torch.equal(flat(parameters), before)


def test_second_pass_of_one_autocast_region_sees_the_moved_weights():
    # Autocast keeps the 16-bit copies of weights until the region ends: the second pass would not see the step.
    torch.manual_seed(0)
    layer, inputs = nn.Linear(8, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        clean = layer(inputs)
        gradients = torch.autograd.grad(clean.float().sum(), layer.parameters())
        with perturbed(layer.parameters(), gradients, 1.0):
            moved = layer(inputs)
        restored = layer(inputs)
    with torch.autocast("cpu", torch.bfloat16), perturbed(layer.parameters(), gradients, 1.0):
        assert torch.equal(moved, layer(inputs))
    assert not torch.equal(moved, clean)
    assert torch.equal(restored, clean)


def test_hand_written_loop_ascends_the_training_loss():
    torch.manual_seed(0)
    model, inputs, labels = nn.Linear(4, 3), torch.randn(32, 4), torch.randint(3, (32,))
    clean = F.cross_entropy(model(inputs), labels)
    parameters = list(model.parameters())
    aace = torch.autograd.grad(aace_loss(model(inputs), labels), parameters)
    cross_entropy = torch.autograd.grad(clean, parameters)
    with perturbed(parameters, aace, 0.1):
        assert F.cross_entropy(model(inputs), labels) > clean
    with perturbed(parameters, cross_entropy, 0.1, maximize=True, normalize=True):
        assert F.cross_entropy(model(inputs), labels) > clean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": -0.1}, "`rho` must be a finite number >= 0, got -0.1"),
        ({"rho": float("nan")}, "got nan"),
        ({"rho": float("inf")}, "got inf"),
        ({"gradients": [None]}, "one entry for each parameter, got 1 for 3"),
        ({"gradients": [None] * 3}, "None of the parameters has a gradient"),
        ({"dtype": torch.bfloat16}, r"float32.*got torch.bfloat16.*dtype=torch.float32"),
        ({"dtype": torch.float16}, "got torch.float16"),
    ],
)
def test_bad_input_is_refused_before_any_weight_moves(change, message):
    parameters, gradients = parameters_and_gradients(change.pop("dtype", torch.float32))
    before = flat(parameters)
    with pytest.raises(ValueError, match=message):
        perturbed(**{"parameters": parameters, "gradients": gradients, "rho": 0.1, **change})
    assert torch.equal(flat(parameters), before)


def test_frozen_running_statistics_changes_the_statistics_and_nothing_else():
    torch.manual_seed(0)
    layer, inputs = nn.BatchNorm1d(3, momentum=None), torch.randn(8, 3)
    layer(inputs)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with frozen_running_statistics(layer):
        inside = layer(inputs * 5 + 2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert torch.equal(inside, layer(inputs * 5 + 2)), "the output is that of training mode"
    assert layer.num_batches_tracked == 2, "and afterwards it counts again"


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d()],
    ids=lambda layer: type(layer).__name__,
)
def test_frozen_running_statistics_is_for_every_kind_of_batch_norm(layer):
    """Or they would be those of the perturbed weights, too."""
    with frozen_running_statistics(nn.Sequential(layer)):
        assert not layer.track_running_stats
    assert layer.track_running_stats


def test_frozen_running_statistics_leaves_layers_that_keep_none_so():
    """They may have been frozen by hand."""
    layer = nn.BatchNorm1d(3)
    layer.track_running_stats = False
    with frozen_running_statistics(layer):
        pass
    assert not layer.track_running_stats


def test_frozen_running_statistics_leaves_layers_in_evaluation_mode_alone():
    layer, inputs = nn.BatchNorm1d(3).eval(), torch.randn(8, 3)
    with frozen_running_statistics(layer):
        assert torch.equal(layer(inputs), inputs / (1 + layer.eps) ** 0.5)


def test_profilers_see_all_that_a_step_takes_beside_its_passes():
    """`hf-aace benchmark` adds it up."""
    weights = [torch.randn(3)]
    with torch.profiler.profile() as profile, perturbed(weights, [torch.ones(3)], 0.1):
        pass
    seen = [event.name for event in profile.events() if event.name.startswith(PROFILED)]
    assert sorted(seen) == [PROFILED + part for part in ("norm", "restore", "step")]
