# SPDX-License-Identifier: Apache-2.0
"""The README: its example runs, its commands have the options that it names, and its results are those of the study."""

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest

from hf_aace.cli import main
from hf_aace.cli.compare import unequal_search
from hf_aace.study.statistics import candidates_of


_ROOT = Path(__file__).parents[1]
_STUDY = _ROOT / "notebooks" / "study"
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", _README, flags=re.DOTALL | re.MULTILINE)


def _commands():
    """Each `hf-aace` command in the README, as words."""
    lines = "\n".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(part, comments=True) for line in lines for part in re.split("&&|;", line)]
    return [words[words.index("hf-aace") + 1 :] for words in commands if "hf-aace" in words]


def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """But for one epoch instead of three."""
    monkeypatch.chdir(tmp_path)
    (example,) = (block.replace("num_train_epochs=3", "num_train_epochs=1") for block in _blocks("python"))
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert "eval_accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted({words[0] for words in _commands()}))
def test_every_option_that_is_named_exists(command, capsys):
    also = ["train"] if command in ("compare", "find-rho") else []  # they take its options too
    for each in [command, *also]:
        with pytest.raises(SystemExit):
            main([each, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    named = {word for words in _commands() if words[0] == command for word in words if word.startswith("--")}
    assert named <= known


def test_comparisons_search_the_same_options_for_all_methods():
    """Or users copy a comparison in which one method alone has a good learning rate."""
    compared = [words[words.index("--methods") + 1] for words in _commands() if words[0] == "compare"]
    assert compared
    for methods in compared:
        assert unequal_search([each for method in methods.split(",") for each in candidates_of(method)]) == {}


@pytest.fixture(scope="module")
def results():
    """The module that computes the published tables from the runs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(_STUDY)
        return importlib.import_module("results")


def test_every_number_of_the_results_table_is_computed_from_the_runs(results):
    """The last digit may be rounded either way where the mean lies in the middle."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _README.splitlines() if line.startswith("|")]
    titles, compared = None, 0
    for cells in lines:
        if "plain" in cells:
            titles = cells
        if titles is None or len(cells) != len(titles) or not re.fullmatch("`[a-z]+(-[a-z]+)+`", cells[1]):
            continue
        computed = results.gains(cells[1].strip("`"))
        row = {title: cell for title, cell in zip(titles[2:], cells[2:], strict=True) if cell}
        for title, cell in row.items():
            columns = ["accuracy", "standard_error"] if title == "plain" else ["gain", "gain_standard_error"]
            written = [float(number) for number in cell.strip("*").split(" ± ")]
            assert 100 * computed.loc[title, columns].to_numpy() == pytest.approx(written, abs=0.0501)
            compared += 1
        gains = computed["gain"].fillna(0)[[title for title in row if title != "clean labels"]]
        bold = [title for title, cell in row.items() if cell.startswith("**")]
        assert bold == [gains.idxmax()], "the best is in bold"
    assert compared >= 20, "there is a results table, with the study's name in the second column"


def test_what_a_small_ascent_is_said_to_keep_of_the_gain_is_what_was_measured(results):
    (rho,) = re.findall(
        r"It kept all of this gain on a noisy ConvNeXt, three quarters of it on a noisy ViT \(`rho=(\d+)`\)",
        " ".join(_README.split()),
    )
    gain = results.ascents_beside_plain().set_index(["model", "ascent", "rho"])["gain"]
    assert gain["ConvNeXt", "norm, 1/16", "30"] / gain["ConvNeXt", "norm, 1/4", "30"] == pytest.approx(1, abs=0.005)
    assert gain["ViT", "norm, 1/16", rho] / gain["ViT", "norm, 1/4", "10"] == pytest.approx(0.75, abs=0.005)


def test_what_fine_tuning_is_said_to_gain_is_what_was_measured(results):
    number = r"([\d.]+ ± [\d.]+\d)"
    (said,) = re.findall(
        rf"AACE on all weights gained {number} points .*? with right labels, {number} with one person's .*? and {number} with the worst .*? Twice "
        rf"the epochs .*? gained {number}, {number} and {number}\. Paired by seed AACE is {number}, {number} and {number} ahead of it: with wrong "
        rf"labels significantly, after Holm's correction\. For half the epochs, in the time of plain training, it lost {number} \(one person's\)",
        " ".join(_README.split()),
    )
    studies = [f"photographs-efficientnet-{labels}" for labels in ("right", "person", "worst")]
    measured = [results.gains(name) for name in studies]
    rows = [table.loc[method] for method in ("AACE", "2x epochs") for table in measured]
    over = results.aace_over()["over 2x epochs"][[f"`{name}`" for name in studies]]
    ahead, p_values = zip(*(cell.strip("+)").split(" (p ") for cell in over), strict=True)
    assert [float(p) < 0.05 for p in p_values] == [False, True, True]
    half = measured[1].loc["AACE, half the epochs"]
    assert list(said) == [
        *(results.percent(row["gain"], row["gain_standard_error"]) for row in rows),
        *ahead,
        results.percent(-half["gain"], half["gain_standard_error"]),
    ]


def test_costs_are_those_of_the_study():
    costs = pd.read_csv(_STUDY / "cost-of-ascents.csv").set_index(["method", "model"])["ratio"]
    rows = {
        "AACE on all weights": "AACE",
        "`--ascent_fraction 0.25` on all weights": "AACE, 1/4",
        "`--perturb_modules norm --ascent_fraction 0.25`": "norm, 1/4",
        "`--perturb_modules norm --ascent_fraction 0.0625`": "norm, 1/16",
    }
    (titles,) = re.findall(r"^\| \| (ViT.*) \|$", _README, flags=re.MULTILINE)
    for title, method in rows.items():
        (cells,) = re.findall(rf"^\| {re.escape(title)} \| (.*) \|$", _README, flags=re.MULTILINE)
        measured = [costs[method, model] for model in titles.split(" | ")]
        assert [float(cell) for cell in cells.split(" | ")] == pytest.approx(measured, abs=0.00501)


def test_tables_of_the_study_are_computed_from_the_runs(results):
    text = (_STUDY / "README.md").read_text(encoding="utf-8")
    missing = [name for name, table in results.published().items() if results.markdown(table) not in text]
    assert not missing, "python notebooks/study/results.py prints them"


def test_studies_compare_the_methods_that_the_runs_have(results):
    """Or a study made again would be another one than that of the published tables."""
    commands = results.studies.commands()
    compared = {name: words for name, words in commands.items() if words[1] == "compare"}
    runs = results.RUNS.groupby("study")
    for name, words in compared.items():
        own = runs.get_group(name)
        methods, seeds = (words[len(words) - words[::-1].index(option)] for option in ("--methods", "--seeds"))
        assert set(methods.split(",")) == set(own["method"])
        first = int(words[words.index("--first_seed") + 1]) if "--first_seed" in words else 0
        assert set(own["seed"]) == set(range(first, first + int(seeds)))
    of_trials = {name for name in runs.groups if name not in compared}
    assert {re.sub(".*-", "", name) for name in of_trials} == {"when", "overfitting", "candidates", "variants"}


def test_studies_without_a_name_are_listed_and_none_begins(tmp_path, monkeypatch, capsys):
    """One of them takes hours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["studies.py"])
    runpy.run_path(_STUDY / "studies.py", run_name="__main__")
    told = "convnext-noisy-tuned: hf-aace compare --output_dir runs/study/convnext-noisy-tuned"
    assert told in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["studies.py", "nothing"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(_STUDY / "studies.py", run_name="__main__")
    assert stop.value.code == 2 and "There is no study 'nothing'" in capsys.readouterr().err
