# SPDX-License-Identifier: Apache-2.0
"""`hf-aace compare` and `find-rho`: what is run, what is chosen by which images, and what the numbers say."""

import contextlib
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import Executor, Future

import psutil
import pytest
from matplotlib.axes import Axes
from scipy.stats import ttest_rel

from hf_aace.cli import main
from hf_aace.cli.output import write_report
from hf_aace.study.plots import plot_accuracies, plot_accuracy_by_rho, plot_accuracy_by_time
from hf_aace.study.statistics import (
    PRESETS,
    Candidate,
    Result,
    candidates_of,
    choose,
    read_results,
    recommend_rho,
    rho_values,
    summarize,
    write_results,
)


# ---- Methods ---------------------------------------------------------------


def test_values_of_an_option_make_as_many_candidates():
    candidates = candidates_of("aace:ascent_fraction=0.125:rho=0.01|0.1")
    assert [dict(candidate.options) for candidate in candidates] == [
        {"rho": rho, "ascent_fraction": "0.125"} for rho in ("0.01", "0.1")
    ]
    assert [candidate.choice for candidate in candidates] == ["rho=0.01", "rho=0.1"]
    assert len(candidates_of("trainer:learning_rate=1e-3|1e-2:weight_decay=0|0.1")) == 4


@pytest.mark.parametrize(
    ("method", "rhos"), [("trainer", ["0"]), ("sam", ["0.1", "1"]), ("aace", ["0.1", "1"]), ("aace:rho=3", ["3"])]
)
def test_values_of_rho_are_for_what_perturbs_and_says_none_itself(method, rhos):
    assert [dict(candidate.options)["rho"] for candidate in candidates_of(method, ["0.1", "1"])] == rhos


def test_values_of_rho_that_come_twice_are_one():
    """Or two runs would write into one folder."""
    assert rho_values("0.1,0.2,0.1") == ["0.1", "0.2"]


def test_presets_are_those_of_the_papers():
    """Or the table would compare with another method under the name of a known one."""
    assert {name: dict(candidates_of(name)[0].options) for name in PRESETS} == {
        "trainer": {"rho": "0"},
        "sam": {"perturbation_loss": "cross_entropy", "normalize_perturbation": "true", "rho": "0.05"},
        "asam": {
            "perturbation_loss": "cross_entropy",
            "normalize_perturbation": "true",
            "adaptive_perturbation": "true",
            "rho": "0.5",
        },
        "aace": {"rho": "0.01"},
    }


def test_each_candidate_has_a_folder_of_its_own():
    methods = [
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
    assert len({candidate.folder for candidate in candidates}) == len({candidate.options for candidate in candidates})


@pytest.mark.parametrize("method", ["adam", "aace:rho", "aace:rho=", "", "aace:=1"])
def test_a_method_that_cannot_be_read_is_told(method):
    with pytest.raises(ValueError, match="`methods` must"):
        candidates_of(method)


# ---- Choice and statistics -------------------------------------------------

PLAIN = Candidate("trainer", (("rho", "0"),))
LOW, HIGH = (Candidate("aace:rho=1|2", (("rho", rho),), ("rho",)) for rho in ("1", "2"))


def results(candidate, tests, validations, seconds=1.0):
    return [
        Result(candidate, seed, test, validation, seconds)
        for seed, (test, validation) in enumerate(zip(tests, validations, strict=True))
    ]


def test_settings_are_chosen_by_the_validation_images():
    """Though the test images prefer the other one."""
    runs = results(LOW, [0.9, 0.9], [0.5, 0.6]) + results(HIGH, [0.1, 0.1], [0.7, 0.6])
    assert choose(runs) == {LOW.method: HIGH}


def test_more_seeds_of_the_chosen_one_do_not_change_the_choice():
    """They are not compared with what was not run on them."""
    runs = results(LOW, [0, 0], [0.5, 0.6]) + results(HIGH, [0, 0, 0], [0.7, 0.6, 0.0])
    assert choose(runs) == {LOW.method: HIGH}


def test_the_choice_is_by_the_mean_over_the_seeds():
    """The median would choose the other one."""
    runs = results(LOW, [0, 0, 0], [0.5, 0.6, 0.7]) + results(HIGH, [0, 0, 0], [0.1, 0.65, 0.7])
    assert choose(runs) == {LOW.method: LOW}


def test_of_equal_candidates_the_first_is_chosen():
    """Whatever the test images say."""
    runs = results(HIGH, [0.1, 0.9], [0.5, 0.6]) + results(LOW, [0.9, 0.9], [0.6, 0.5])
    assert choose(runs) == {LOW.method: HIGH}


def test_results_are_read_as_they_were_written(tmp_path):
    """So that a table of a study can be made anew from its `runs.csv` alone."""
    runs = results(PLAIN, [0.1, 0.2], [None] * 2) + results(LOW, [0.1], [0.4]) + results(HIGH, [0.3, 0.2], [0.5, 0.1])
    write_results(runs, tmp_path / "runs.csv")
    assert read_results(tmp_path / "runs.csv") == runs
    assert summarize(read_results(tmp_path / "runs.csv"), "trainer") == summarize(runs, "trainer")


def test_a_report_is_json_whatever_the_numbers(tmp_path):
    """Or a study of hours would end in an error, or in a file that other programs cannot read."""
    write_report({"ratio": float("inf"), "rows": [{"error": float("nan"), "mean": 0.5}]}, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"ratio": None, "rows": [{"error": None, "mean": 0.5}]}


def test_summary_is_paired_over_the_seeds_that_both_have():
    plain, ours = [0.5, 0.6, 0.8, 0.7], [0.6, 0.8, 0.9]
    runs = results(PLAIN, plain, [None] * 4) + results(LOW, ours, [0] * 3, 3.0)
    first, second = summarize(runs, "trainer")
    assert first["gain"] is None and first["p_value"] is None and first["ratio"] == 1
    assert first["standard_error"] == pytest.approx(statistics.stdev(plain) / 2)
    assert (second["seeds"], second["ratio"]) == (3, 3)
    assert second["gain"] == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert second["gain_standard_error"] == pytest.approx(statistics.stdev([0.1, 0.2, 0.1]) / 3**0.5)
    assert second["p_value"] == pytest.approx(ttest_rel(ours, plain[:3]).pvalue)


def test_summary_is_of_the_chosen_candidate_alone():
    """The runs of the others, on the same seeds, only served to choose it."""
    runs = results(PLAIN, [0.5, 0.6], [None] * 2)
    runs += results(HIGH, [0.7, 0.9], [0.8, 0.8], 2.0) + results(LOW, [0.1, 0.2], [0.1, 0.1], 5.0)
    row = summarize(runs, "trainer")[1]
    assert (row["choice"], row["accuracy"]) == ("rho=2", pytest.approx(0.8))
    assert (row["gain"], row["ratio"]) == (pytest.approx(0.25), 2)


def test_times_are_medians():
    """A run that had to share the machine says nothing of the method."""
    runs = [Result(PLAIN, seed, 0.5, None, seconds) for seed, seconds in enumerate([2.0, 2.0, 20.0])]
    runs += [Result(LOW, seed, 0.5, None, seconds) for seed, seconds in enumerate([6.0, 4.0, 100.0])]
    first, second = summarize(runs, "trainer")
    assert (first["seconds"], second["seconds"], second["ratio"]) == (2, 6, 3)


def test_gains_that_are_all_the_same_have_no_p_value():
    """The t-test divides by their scatter."""
    runs = results(PLAIN, [0.5, 0.25], [None] * 2) + results(LOW, [0.75, 0.5], [0] * 2)
    row = summarize(runs, "trainer")[1]
    assert row["gain"] == 0.25 and row["p_value"] is None


# ---- The command -----------------------------------------------------------

TINY = [
    "compare",
    "--max_steps",
    "2",
    "--train_size",
    "40",
    "--seeds",
    "2",
    "--search_seeds",
    "1",
    "--jobs",
    "1",
    "--output_dir",
    "study",
]


class Here(Executor):
    """Makes the runs in this process: a new one takes its time to import torch."""

    def __init__(self, *args):
        pass

    def submit(self, function, argv, log):
        future = Future()
        future.set_result(main(["train", *argv]))
        return future


def in_other_order(argv):
    """The command with the last of its options first."""
    command, *options = argv
    return [command, *(part for i in range(len(options) - 2, -1, -2) for part in options[i : i + 2])]


def test_a_study_is_made_told_and_not_made_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.cli.compare.ProcessPoolExecutor", Here)
    argv = [*TINY, "--methods", "trainer,aace:rho=0.1|0.2"]
    assert main(argv) == 0
    screen = capsys.readouterr().out
    runs = sorted(
        str(path.parent.relative_to(tmp_path / "study")) for path in (tmp_path / "study").rglob("model.safetensors")
    )
    rows = json.loads((tmp_path / "study" / "summary.json").read_text())["methods"]
    chosen = rows[1]["choice"]
    # Both values with one seed, the chosen one with both.
    assert len(runs) == 2 + 2 + 1 and f"aace-{chosen}/seed-1" in runs
    assert [row["seeds"] for row in rows] == [2, 2]
    assert chosen in screen and f"{100 * rows[0]['accuracy']:.1f} ±" in screen
    for name in ("accuracy", "time", "rho"):
        assert (tmp_path / "study" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "study" / "runs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        folder = "trainer" if row["method"] == "trainer" else "aace-" + row["options"].split()[0]
        saved = json.loads((tmp_path / "study" / folder / f"seed-{row['seed']}" / "all_results.json").read_text())
        assert float(row["test_accuracy"]) == saved["eval_accuracy"]
        assert float(row["validation_accuracy"]) == saved["validation_accuracy"]

    # A run that was cut short is made again, and nothing else.
    lost, kept = tmp_path / "study" / "trainer" / "seed-1", tmp_path / "study" / "trainer" / "seed-0"
    results = json.loads((lost / "all_results.json").read_text())
    (lost / "all_results.json").write_text(json.dumps({"train_runtime": 1}))
    before = (kept / "all_results.json").stat().st_mtime_ns
    assert main(in_other_order(argv)) == 0
    again = json.loads((lost / "all_results.json").read_text())
    assert again["eval_accuracy"] == results["eval_accuracy"]
    assert (kept / "all_results.json").stat().st_mtime_ns == before

    # However an option is written.
    assert main([("--train_size=40" if part == "--train_size" else part) for part in argv if part != "40"]) == 0

    # Other options would mix two studies in one folder.
    assert main([*argv, "--label_noise", "0.5"]) == 1
    error = capsys.readouterr().err
    assert "holds a study with other options" in error and "--label_noise 0.5`: `" in error
    assert main(["50" if part == "40" else part for part in argv]) == 1
    assert "--train_size 50`: `" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_are_made(tmp_path, monkeypatch, capsys):
    """In processes of their own."""
    monkeypatch.chdir(tmp_path)
    argv = [
        "compare",
        "--max_steps",
        "2",
        "--train_size",
        "40",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--output_dir",
        "study",
    ]
    # Resuming from what is not there is found out by the run alone.
    assert main([*argv, "--methods", "trainer:resume_from_checkpoint=nothing,trainer"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of the runs failed" in error and "nothing" in error and "output.txt" in error
    assert (tmp_path / "study" / "trainer" / "seed-0" / "all_results.json").is_file()


def test_options_of_a_file_are_those_of_every_run(tmp_path, monkeypatch, capsys):
    """They come before what `compare` has otherwise, after what the command line says; and a file that was changed is told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.cli.compare.ProcessPoolExecutor", Here)
    options = "validation_size: 0.5\neval_strategy: epoch\nmetrics: [accuracy, macro_f1]\nlabel_noise: 0.4\n"
    (tmp_path / "options.yaml").write_text(options)
    argv = [*TINY, "--methods", "trainer", "--config", "options.yaml", "--label_noise", "0.1"]
    assert main(argv) == 0
    run = tmp_path / "study" / "trainer" / "seed-0"
    options = json.loads((run / "train_options.json").read_text())
    assert (options["validation_size"], options["label_noise"]) == (0.5, 0.1)
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in log for log in logs[:-1])
    (tmp_path / "options.yaml").write_text("validation_size: 0.4\n")
    assert main(argv) == 1
    assert "holds a study with other options" in capsys.readouterr().err
    (tmp_path / "options.yaml").write_text("validation_sise: 0.4\n")
    with pytest.raises(SystemExit):
        main(argv)
    assert "Did you mean --validation_size?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_a_study_that_is_stopped_leaves_no_process_behind(how, tmp_path):
    """And does not wait for runs that the same command would make again."""
    command = [
        sys.executable,
        "-m",
        "hf_aace",
        "compare",
        "--jobs",
        "1",
        "--methods",
        "trainer",
        "--num_train_epochs",
        "5000",
    ]
    study = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.rglob("output.txt")):
            assert study.poll() is None
            time.sleep(0.1)
        if how == "Ctrl-C":  # which the terminal sends to all of them
            os.killpg(study.pid, signal.SIGINT)
            _, error = study.communicate(timeout=30)
            assert study.returncode == 130
            assert error.strip().splitlines()[-1] == "hf-aace: interrupted."  # no warnings of what leaked
        else:  # by an out-of-memory killer, say: it can do nothing any more
            study.kill()
            study.wait()
        group = [process for process in psutil.process_iter() if os.getpgid(process.pid) == study.pid]
        assert not psutil.wait_procs(group, timeout=10)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seeds", "0"], "`seeds` must be at least 1, got 0"),
        (["--methods", "adam"], "`methods` must be of trainer, sam, asam, aace"),
        (["--baseline", "sam", "--methods", "trainer"], "`baseline` must be one of the methods, trainer, got 'sam'"),
        (["--methods", "aace:ascent_fraction=2"], "`ascent_fraction` must lie in (0, 1], got 2.0"),
        (["--rho", "0.1,0.2", "--validation_size", "0"], "`validation_size` is 0"),
        (["--streaming", "true", "--dataset_name", "x"], "with `--validation_size 0`"),
        (["--seed", "1"], "`seed` is another one for each run"),
        (["--seed=1"], "`seed` is another one for each run"),
        (["--methods", "aace:seed=3"], "`seed` is another one for each run"),
        (["--methods", "aace:output_dir=x"], "`output_dir` is another one for each run"),
        (["--metrics", "macro_f1"], "`metrics` must have `accuracy`"),
    ],
)
def test_bad_input_is_told_before_the_first_run(argv, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *argv]) == 1
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.rglob("seed-*"))


# ---- Pictures --------------------------------------------------------------


@pytest.mark.parametrize("extra", ["", ":adaptive_perturbation=true"])
def test_pictures_have_room_for_long_names(extra, tmp_path):
    """As the methods of the README have; matplotlib warns where nothing is left for the axes."""
    long = f"aace:perturb_modules=norm:ascent_fraction=0.5:ascent_every=4{extra}:learning_rate=1e-3|3e-3:rho=10|30"
    runs = [
        Result(candidate, seed, 0.8 + 0.01 * seed, 0.7, 1.0)
        for method in ("trainer", "sam:rho=0.1|0.2", long)
        for candidate in candidates_of(method)
        for seed in range(2)
    ]
    rows = summarize(runs, "trainer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_accuracies(rows, runs, "a", tmp_path / "accuracy.png")
        plot_accuracy_by_time(rows, "a", tmp_path / "time.png")
        assert plot_accuracy_by_rho(runs, "a", tmp_path / "rho.png")


def test_lines_and_band_of_the_picture_by_rho_are_of_the_same_seeds(tmp_path, monkeypatch):
    """Those on which all values were tried: plain training ran on more."""
    drawn = {}
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **kwargs: drawn.update(plain=y))
    monkeypatch.setattr(Axes, "errorbar", lambda axes, x, y, **kwargs: drawn.update(aace=y))
    runs = [Result(PLAIN, seed, 0.0, validation, 1.0) for seed, validation in enumerate([0.5, 0.7, 0.9])]
    runs += results(LOW, [0, 0], [0.6, 0.6]) + results(HIGH, [0, 0, 0], [0.8, 0.6, 0.1])
    assert plot_accuracy_by_rho(runs, "a", tmp_path / "rho.png")
    assert drawn == {"plain": pytest.approx(60), "aace": [pytest.approx(60), pytest.approx(70)]}


def test_a_picture_that_is_not_drawn_again_does_not_stay(tmp_path):
    argv = [*TINY, "--seeds", "1", "--output_dir", str(tmp_path)]
    assert main([*argv, "--methods", "trainer,aace:rho=0.1|0.2"]) == 0
    assert (tmp_path / "rho.png").is_file()
    assert main([*argv, "--methods", "trainer,aace:rho=0.1"]) == 0
    assert not (tmp_path / "rho.png").exists()


# ---- Finding rho -----------------------------------------------------------


def search(accuracies):
    """Results whose test accuracies say the opposite of the validation accuracies."""
    return [
        Result(Candidate("aace", (("rho", rho),), ("rho",)), seed, 1 - validation, validation, 1.0)
        for rho, own in accuracies.items()
        for seed, validation in enumerate(own)
    ]


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


def test_find_rho_trains_with_each_value_and_plainly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_aace.cli.compare.ProcessPoolExecutor", Here)
    argv = ["find-rho", "--max_steps", "2", "--train_size", "40", "--seeds", "1", "--jobs", "1", "--rho", "0.1,0.2"]
    assert main(argv) == 0
    text = (tmp_path / "runs" / "find-rho" / "find_rho.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["values"][0]["standard_error"] is None  # of one seed
    assert [row["rho"] for row in report["values"]] == [0, 0.1, 0.2]
    screen = capsys.readouterr().out
    assert report["text"] in screen
    for row in report["values"]:
        folder = "aace-rho={rho:g}".format(**row) if row["rho"] else "trainer"
        path = tmp_path / "runs" / "find-rho" / folder / "seed-0" / "all_results.json"
        assert row["accuracy"] == json.loads(path.read_text())["validation_accuracy"]
    assert (tmp_path / "runs" / "find-rho" / "rho.png").read_bytes().startswith(b"\x89PNG")


def test_to_find_rho_takes_one_to_try(capsys):
    assert main(["find-rho", "--rho", "0"]) == 1
    assert "`rho` must have a value to compare with 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "find-rho"])
def test_a_rho_that_is_no_number_is_told(command, capsys):
    assert main([command, "--rho", "0.1,large"]) == 1
    assert "`rho` must be numbers separated by commas, got 'large' in '0.1,large'" in capsys.readouterr().err
