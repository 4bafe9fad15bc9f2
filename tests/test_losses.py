# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_aace import aace_loss
from hf_aace.tensor_checks import check_label_values


def definition(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(t || p) of each sample from its definition, in float64, in logarithms throughout."""
    logits = logits.double()
    log_p = logits.log_softmax(dim=1)
    log_t = logits.scatter(1, labels.unsqueeze(1), -torch.inf).log_softmax(dim=1)
    t = log_t.exp()
    return torch.where(t > 0, t * (log_t - log_p), 0.0).sum(dim=1)


@st.composite
def classifications(draw):
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(2, 12) | st.just(1000))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(classes, (batch,), generator=generator)
    return logits, labels


@given(classifications())
@settings(deadline=None, max_examples=200)
def test_equals_its_definition_at_every_size_and_margin(data):
    logits, labels = data
    torch.testing.assert_close(
        aace_loss(logits, labels, reduction="none"), definition(logits, labels), rtol=1e-9, atol=1e-9
    )
    # In 32 bits: as good as the rounding of the logits themselves allows.
    rounding = 4 * torch.finfo(torch.float32).eps * (1 + logits.abs().max().item())
    torch.testing.assert_close(
        aace_loss(logits.float(), labels, reduction="none").double(),
        definition(logits, labels),
        rtol=1e-5,
        atol=rounding,
    )


@given(classifications())
@settings(deadline=None, max_examples=100)
def test_gradient_is_p_minus_t_and_finite(data):
    logits, labels = data
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(aace_loss(logits, labels, reduction="sum"), logits)
    t = logits.scatter(1, labels.unsqueeze(1), -torch.inf).softmax(dim=1)
    torch.testing.assert_close(gradient, logits.softmax(dim=1) - t, rtol=1e-7, atol=1e-12)


@given(classifications())
@settings(deadline=None, max_examples=200)
def test_gradient_is_that_of_cross_entropy_times_the_odds_of_the_label(data):
    """
    Up to the sign, `p_y / (1 - p_y)`: the ascent of AACE is SAM's with each sample weighted. Where the label is all but certain the
    gradient of cross-entropy is written in its stable form, `-(1 - p_y) (onehot(y) - t)`: as `p - onehot(y)` it has lost its bits.
    """
    logits, labels = data
    logits, index = logits.double().requires_grad_(), labels.unsqueeze(1)
    (gradient,) = torch.autograd.grad(aace_loss(logits, labels, reduction="sum"), logits)
    with torch.no_grad():
        margins = logits.gather(1, index) - logits.scatter(1, index, -torch.inf).logsumexp(dim=1, keepdim=True)
        others = logits.scatter(1, index, -torch.inf).softmax(dim=1)
        of_cross_entropy = -torch.sigmoid(-margins) * (torch.zeros_like(logits).scatter(1, index, 1.0) - others)
        tame = margins.abs().squeeze(1) < 700  # beyond, the odds are no finite number
        weighted = -margins[tame].exp() * of_cross_entropy[tame]
        torch.testing.assert_close(gradient[tame], weighted, rtol=1e-7, atol=1e-12)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(plain, of_cross_entropy, rtol=1e-7, atol=1e-12)


@given(classifications(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_soft_labels_are_the_expectation_over_the_label(data, seed):
    logits, _ = data
    soft = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    soft = soft / soft.sum(dim=1, keepdim=True)
    expected = sum(soft[:, c] * definition(logits, torch.full((len(logits),), c)) for c in range(logits.shape[1]))
    torch.testing.assert_close(aace_loss(logits, soft, reduction="none"), expected, rtol=1e-9, atol=1e-9)
    gradient = torch.autograd.grad(aace_loss(logits.requires_grad_(), soft), logits)[0]
    assert gradient.isfinite().all()


@given(classifications())
@settings(deadline=None, max_examples=50)
def test_one_hot_soft_labels_equal_hard_labels(data):
    logits, labels = data
    one_hot = F.one_hot(labels, logits.shape[1]).double()
    torch.testing.assert_close(aace_loss(logits, one_hot), aace_loss(logits, labels), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_its_last_bits_on_both_sides(dtype):
    # softplus(d), relative error: confident (grows linearly), wrong (falls exponentially, where log(1 - p) would give 0).
    for d in (-80.0, -30.0, -10.0, 0.0, 10.0, 19.0, 21.0, 30.0, 100.0):
        exact = d + math.log1p(math.exp(-d)) if d > 0 else math.log1p(math.exp(d))
        loss = aace_loss(torch.tensor([[d, 0.0]], dtype=dtype), torch.tensor([0])).item()
        assert loss == pytest.approx(exact, rel=4 * torch.finfo(dtype).eps)


def test_gradient_grows_with_confidence_where_that_of_cross_entropy_vanishes():
    norms = {"aace": [], "cross_entropy": []}
    for margin in (0.0, 2.0, 5.0, 10.0, 20.0):
        logits = torch.tensor([[margin, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
        label = torch.tensor([0])
        norms["aace"].append(torch.autograd.grad(aace_loss(logits, label), logits)[0].norm().item())
        norms["cross_entropy"].append(torch.autograd.grad(F.cross_entropy(logits, label), logits)[0].norm().item())
    assert norms["aace"] == sorted(norms["aace"]) and norms["aace"][-1] > 1
    assert norms["cross_entropy"] == sorted(norms["cross_entropy"], reverse=True) and norms["cross_entropy"][-1] < 1e-8


def test_with_two_classes_every_target_is_the_other_class():
    logits, labels = torch.randn(8, 2), torch.randint(2, (8,))
    expected = F.cross_entropy(logits, 1 - labels)
    for target in ("adaptive", "uniform", "random"):
        torch.testing.assert_close(aace_loss(logits, labels, target=target), expected)


def test_uniform_target_is_the_divergence_from_the_uniform_distribution_over_wrong_classes():
    logits, labels = torch.randn(8, 5, dtype=torch.float64), torch.randint(5, (8,))
    t = torch.full_like(logits, 0.25).scatter(1, labels.unsqueeze(1), 0.0)
    expected = torch.where(t > 0, t * (t.clamp(min=1e-300).log() - logits.log_softmax(1)), 0.0).sum(1)
    torch.testing.assert_close(aace_loss(logits, labels, target="uniform", reduction="none"), expected)


def test_random_target_draws_each_wrong_class_and_never_the_true_one():
    logits, labels = torch.arange(4.0).log().clamp(min=-9).repeat(4000, 1), torch.full((4000,), 2)
    losses = aace_loss(logits, labels, target="random", reduction="none")
    of_each_class = -logits[0].log_softmax(0)
    drawn = (losses.unsqueeze(1) - of_each_class).abs().argmin(dim=1).bincount(minlength=4)
    assert drawn[2] == 0
    assert (drawn[[0, 1, 3]] > 4000 / 3 * 0.8).all()


def test_ignored_samples_do_not_count():
    logits, labels = torch.randn(6, 4), torch.tensor([0, -100, 3, -100, 1, 2])
    counted = labels != -100
    torch.testing.assert_close(aace_loss(logits, labels), aace_loss(logits[counted], labels[counted]))
    assert (aace_loss(logits, labels, reduction="none")[~counted] == 0).all()


def test_the_index_of_ignored_samples_can_be_another():
    """Then 255 is out of range no longer, and -100 is."""
    logits, labels = torch.randn(6, 4), torch.tensor([0, 255, 3, 255, 1, 2])
    counted = labels != 255
    expected = aace_loss(logits[counted], labels[counted])
    torch.testing.assert_close(aace_loss(logits, labels, ignore_index=255), expected)
    for wrong, found in ((4, "0 .. 4"), (-100, "-100 .. 2")):
        with pytest.raises(ValueError, match=rf"must lie in \[0, 4\).*got {found}"):
            aace_loss(logits, labels.where(labels != 3, wrong), ignore_index=255)


def test_a_batch_of_ignored_samples_has_no_mean_and_is_no_error():
    """As cross-entropy has it."""
    logits, labels = torch.randn(4, 3), torch.full((4,), -100)
    check_label_values(labels, 3)
    assert aace_loss(logits, labels).isnan() and F.cross_entropy(logits, labels).isnan()
    assert aace_loss(logits, labels, reduction="sum") == 0


def test_labels_of_8_bits_are_the_classes_that_they_say():
    """156 is -100 in 8 bits, which would be left out."""
    logits = torch.randn(2, 200)
    labels = torch.tensor([156, 3])
    assert torch.equal(aace_loss(logits, labels.to(torch.uint8)), aace_loss(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_32_bits(dtype):
    logits, labels = torch.randn(6, 4).to(dtype), torch.randint(4, (6,))
    loss = aace_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, aace_loss(logits.float(), labels))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (
            torch.randn(4, 3, 2),
            torch.zeros(4, dtype=torch.long),
            r"logits of shape \(batch, classes\), got \(4, 3, 2\)",
        ),
        (torch.randn(4, 1), torch.zeros(4, dtype=torch.long), "at least 2 classes"),
        (torch.randn(4, 3), torch.zeros(4), "class probabilities of shape"),
        (torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.long), "multi-label"),
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 3]), r"must lie in \[0, 3\).*got 0 .. 3"),
        (torch.randn(4, 3), torch.tensor([0, 1, 2, -1]), r"must lie in \[0, 3\).*got -1 .. 2"),
    ],
)
def test_what_is_no_classification_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        aace_loss(logits, labels)


def test_what_is_no_probability_is_refused_and_rounding_is_not():
    """Of soft labels that were made in 16 bits, a third thrice is more than 1."""
    check_label_values(torch.full((4, 3), 1 / 3).bfloat16().float(), 3)
    for bad in ([0.5, 0.4, 0.4], [1.5, -0.5, 0.0], [0.3, 0.3, 0.3]):
        with pytest.raises(ValueError, match="must be class probabilities"):
            check_label_values(torch.tensor([bad]), 3)


def test_unknown_choices_are_refused():
    logits, labels = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`target` must be .* got 'nearest'"):
        aace_loss(logits, labels, target="nearest")
    with pytest.raises(ValueError, match=r"`reduction` must be .* got 'max'"):
        aace_loss(logits, labels, reduction="max")
