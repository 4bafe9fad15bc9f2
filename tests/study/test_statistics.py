# SPDX-License-Identifier: Apache-2.0
"""Comparisons over seeds: which settings a method has, which are chosen by which images, and what the numbers mean."""

import statistics

import pandas as pd
import pytest
from scipy.stats import ttest_rel

from hf_aace import AACEConfig
from hf_aace.config import METHODS
from hf_aace.study.statistics import candidates_of, choose, recommend_rho, rho_values, summarize


# ---- Methods ---------------------------------------------------------------


def test_values_of_an_option_make_as_many_candidates():
    candidates = candidates_of("aace:ascent_fraction=0.125:rho=0.01|0.1")
    assert [dict(candidate.settings) for candidate in candidates] == [
        {"method": "aace", "ascent_fraction": "0.125", "rho": rho} for rho in ("0.01", "0.1")
    ]
    assert len(candidates_of("trainer:learning_rate=1e-3|1e-2:weight_decay=0|0.1")) == 4
    assert len(candidates_of("aace:rho=0.1|0.2|0.1")) == 2, "one that comes twice would be made twice in one folder"


@pytest.mark.parametrize(
    ("method", "rhos"), [("trainer", ["0"]), ("sam", ["0.1", "1"]), ("aace", ["0.1", "1"]), ("aace:rho=3", ["3"])]
)
def test_values_of_rho_are_for_what_perturbs_and_gives_none_itself(method, rhos):
    assert [dict(candidate.settings)["rho"] for candidate in candidates_of(method, ["0.1", "1"])] == rhos


def test_values_of_rho_that_come_twice_are_one():
    """Or two runs would write into one folder."""
    assert rho_values("0.1,0.2,1e-1,0.1") == ["0.1", "0.2"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_those_of_the_table_in_the_configuration(method, tmp_path):
    """Or a comparison would be with another method under the name of a known one."""
    (candidate,) = candidates_of(method)
    settings = AACEConfig(output_dir=str(tmp_path), **dict(candidate.settings))
    assert {name: getattr(settings, name) for name in METHODS[method]} == METHODS[method]
    assert dict(candidates_of("trainer")[0].settings) == {"rho": "0"}


def test_candidates_share_a_folder_only_if_their_settings_are_the_same():
    methods = [
        "trainer",
        "sam",
        "aace",
        "aace:rho=0.1",
        "aace:rho=0.1|0.2",
        "aace:rho=0.2|0.3:weight_decay=1|2",
        "aace:rho=.2:weight_decay=1",
        "aace:perturb_modules=norm$",
        "aace:perturb_modules=norm?",
    ]
    candidates = [candidate for method in methods for candidate in candidates_of(method)]
    candidates += candidates_of("aace", ["0.3"]) + candidates_of("aace", ["0.4"])  # two studies of one folder
    # The same settings, written in two ways, may share their runs.
    assert len({candidate.folder for candidate in candidates}) == len({candidate.settings for candidate in candidates})


@pytest.mark.parametrize("method", ["adam", "aace:rho", "aace:rho=", "", "aace:=1"])
def test_a_method_that_cannot_be_read_is_named(method):
    with pytest.raises(ValueError, match="`methods` must"):
        candidates_of(method)


# ---- Choice and statistics -------------------------------------------------


PLAIN = ("trainer", "rho=0")
LOW, HIGH = (("aace:rho=1|2", f"method=aace rho={rho}") for rho in ("1", "2"))


def results(candidate, tests, validations, seconds=1.0):
    """Runs of a candidate with the seeds 0, 1, ..."""
    method, options = candidate
    return pd.DataFrame(
        {
            "method": method,
            "options": options,
            "seed": range(len(tests)),
            "validation_accuracy": pd.Series(validations, dtype=float),
            "test_accuracy": tests,
            "seconds": seconds,
        }
    )


def test_settings_are_chosen_by_the_validation_images():
    """Though the test images prefer the other one."""
    runs = pd.concat([results(LOW, [0.9, 0.9], [0.5, 0.6]), results(HIGH, [0.1, 0.1], [0.7, 0.6])])
    assert choose(runs) == dict([HIGH])


def test_more_seeds_of_the_chosen_setting_do_not_change_the_choice():
    """They are not compared with what was not run on them."""
    runs = pd.concat([results(LOW, [0, 0], [0.5, 0.6]), results(HIGH, [0, 0, 0], [0.7, 0.6, 0.0])])
    assert choose(runs) == dict([HIGH])


def test_the_choice_is_by_the_mean_over_the_seeds():
    """The median would choose the other one."""
    runs = pd.concat([results(LOW, [0, 0, 0], [0.5, 0.6, 0.7]), results(HIGH, [0, 0, 0], [0.1, 0.65, 0.7])])
    assert choose(runs) == dict([LOW])


@pytest.mark.parametrize("accuracies", [[0.5, 0.6], [0.7, 0.6, 0.4], [0.2, 0.7, 0.1, 0.8]])
def test_of_equal_settings_the_first_is_chosen(accuracies):
    """Whatever the test images say, and in whichever order the sum of equal accuracies is rounded."""
    runs = pd.concat(
        [
            results(HIGH, [0.1] * len(accuracies), accuracies),
            results(LOW, [0.9] * len(accuracies), accuracies[::-1]),
        ]
    )
    assert choose(runs) == dict([HIGH])


def test_summary_is_paired_over_the_seeds_that_both_have():
    plain, ours = [0.5, 0.6, 0.8, 0.7], [0.6, 0.8, 0.9]
    runs = pd.concat([results(PLAIN, plain, [None] * 4), results(LOW, ours, [0] * 3, 3.0)])
    first, second = summarize(runs, "trainer").to_dict("records")
    assert pd.isna(first["gain"]) and pd.isna(first["p_value"]) and first["ratio"] == 1
    assert first["standard_error"] == pytest.approx(statistics.stdev(plain) / 2)
    assert (second["seeds"], second["ratio"]) == (3, 3)
    assert second["gain"] == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert second["gain_standard_error"] == pytest.approx(statistics.stdev([0.1, 0.2, 0.1]) / 3**0.5)
    assert second["p_value"] == pytest.approx(ttest_rel(ours, plain[:3]).pvalue)


def test_summary_is_of_the_chosen_setting_alone():
    """The runs of the others, on the same seeds, only served to choose it."""
    runs = pd.concat(
        [
            results(PLAIN, [0.5, 0.6], [None] * 2),
            results(HIGH, [0.7, 0.9], [0.8, 0.8], 2.0),
            results(LOW, [0.1, 0.2], [0.1, 0.1], 5.0),
        ]
    )
    row = summarize(runs, "trainer").iloc[1]
    assert (row["choice"], row["accuracy"]) == ("rho=2", pytest.approx(0.8))
    assert (row["gain"], row["ratio"]) == (pytest.approx(0.25), 2)


def test_times_are_medians():
    """A run that had to share the machine says nothing about the method."""
    runs = pd.concat(
        [
            results(PLAIN, [0.5] * 3, [None] * 3, [2.0, 2.0, 20.0]),
            results(LOW, [0.5] * 3, [None] * 3, [6.0, 4.0, 100.0]),
        ]
    )
    first, second = summarize(runs, "trainer").to_dict("records")
    assert (first["seconds"], second["seconds"], second["ratio"]) == (2, 6, 3)


@pytest.mark.parametrize("right", [[250, 125], [439, 403, 409], [411, 446, 450]])
def test_gains_that_are_all_the_same_have_no_p_value(right):
    """The t-test divides by their scatter, which would be that of the last bits."""
    plain, more = ([(count + gain) / 500 for count in right] for gain in (0, 10))
    runs = pd.concat([results(PLAIN, plain, [None] * len(right)), results(LOW, more, [0] * len(right))])
    row = summarize(runs, "trainer").iloc[1]
    assert row["gain"] == pytest.approx(0.02) and pd.isna(row["p_value"])


def test_a_single_seed_has_no_error_and_no_p_value():
    runs = pd.concat([results(PLAIN, [0.5], [None]), results(LOW, [0.75], [0])])
    row = summarize(runs, "trainer").iloc[1]
    assert row["gain"] == 0.25 and pd.isna(row["gain_standard_error"]) and pd.isna(row["p_value"])


# ---- Which rho -------------------------------------------------------------


def search(accuracies):
    """Runs whose test accuracies say the opposite of the validation accuracies."""
    return pd.concat(
        results(("aace", f"rho={rho}"), [1 - validation for validation in own], own) for rho, own in accuracies.items()
    )


@pytest.mark.parametrize(
    ("accuracies", "best", "rho", "gain", "said", "not_said"),
    [
        (
            {"0": [0.5, 0.6], "0.1": [0.7, 0.81], "1": [0.6, 0.6]},
            0.1,
            0.1,
            0.205,
            ["Take --rho 0.1: +20.5 ± 0.5"],
            ["chance", "larg"],
        ),
        ({"0": [0.5, 0.6], "0.1": [0.5, 0.7]}, 0.1, 0, 0.05, ["(--rho 0)", "0.1, has +5.0 ± 5.0", "chance"], ["Take"]),
        ({"0": [0.5, 0.6], "0.1": [0.6, 0.7], "1": [0.7, 0.81]}, 1, 1, 0.205, ["try larger ones"], ["chance"]),
        ({"0": [0.5, 0.6], "0.1": [0.1, 0.2]}, 0, 0, 0, ["(--rho 0): no value did better"], ["Take", "larg"]),
        ({"0": [0.5], "0.1": [0.7], "1": [0.6]}, 0.1, 0, 0.2, ["chance"], ["Take"]),  # one seed says nothing of chance
        # More than one standard error is not enough; and the values may come in any order.
        ({"0.1": [0.54, 0.76], "1": [0.4, 0.5], "0": [0.5, 0.6]}, 0.1, 0, 0.1, ["+10.0 ± 6.0", "chance"], ["larg"]),
        ({"1": [0.7, 0.81], "0": [0.5, 0.6], "0.1": [0.4, 0.5]}, 1, 1, 0.205, ["try larger ones"], ["chance"]),
    ],
)
def test_advice_is_by_the_validation_images_and_to_perturb_only_on_evidence(
    accuracies, best, rho, gain, said, not_said
):
    advice = recommend_rho(search(accuracies))
    assert (advice["best"], advice["rho"]) == (best, rho) and advice["gain"] == pytest.approx(gain)
    assert [row["rho"] for row in advice["values"]] == sorted(map(float, accuracies))
    assert all(part in advice["text"] for part in said) and not any(part in advice["text"] for part in not_said)
