# SPDX-License-Identifier: Apache-2.0
"""Comparisons of training methods over seeds: what is to be run, which settings are chosen, what the results say."""

import csv
import itertools
import os
import re
import statistics
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scipy.stats import ttest_rel

from ..config import METHODS


# What each name stands for, as options of `hf-aace train`. The values of rho are those of the papers of SAM and ASAM for
# small images, and the default of this library.
PRESETS = {
    "trainer": {"rho": "0"},
    "sam": {"perturbation_loss": "cross_entropy", "normalize_perturbation": "true", "rho": "0.05"},
    "asam": {
        "perturbation_loss": "cross_entropy",
        "normalize_perturbation": "true",
        "adaptive_perturbation": "true",
        "rho": "0.5",
    },
    "aace": {"rho": str(METHODS["aace"]["rho"])},
}


@dataclass(frozen=True)
class Candidate:
    """
    One setting of a method.

    Args:
        method (`str`):
            The method, as it was written.
        options (`tuple[tuple[str, str], ...]`):
            Names and values of options of `hf-aace train`.
        varied (`tuple[str, ...]`, *optional*):
            The names of those options that have other values in other candidates of the method.
    """

    method: str
    options: tuple[tuple[str, str], ...]
    varied: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """A name for its files, unlike that of any other candidate of a study."""
        fixed = [part for part in self.method.split(":") if "|" not in part]
        preset = PRESETS[fixed[0]]
        chosen = [
            f"{name}={value}"
            for name, value in self.options
            # A single `rho` for all methods is in none of their names.
            if name in self.varied or (f"{name}={value}" not in fixed and preset.get(name) != value)
        ]
        name = " ".join([*fixed, *chosen])
        # `norm.` and `norm$` are two regular expressions, though no names of folders.
        suffix = f"-{zlib.crc32(name.encode()):x}" if re.search(r"[^\w.=+ -]", name) else ""
        return re.sub(r"[^\w.=+-]+", "-", name) + suffix

    @property
    def choice(self) -> str:
        """The values of the options that vary, for people."""
        return ", ".join(f"{name}={value}" for name, value in self.options if name in self.varied)


def candidates_of(method: str, rhos: list[str] | None = None) -> list[Candidate]:
    """
    Reads a method as the command line has it.

    Args:
        method (`str`):
            One of `trainer`, `sam`, `asam`, `aace`, perhaps followed by options of `hf-aace train`, each as `:name=value`.
            Several values, separated by `|`, make as many candidates: `aace:ascent_fraction=0.125:rho=0.01|0.1`.
        rhos (`list[str]`, *optional*):
            Values of `rho` for a method that perturbs and does not say any itself. Defaults to one, the preset.

    Returns:
        `list[Candidate]`: All combinations of the values.

    Raises:
        `ValueError`: If there is no such method, or an option is not written as `name=value`.
    """
    name, *settings = method.split(":")
    if name not in PRESETS:
        raise ValueError(
            f"`methods` must be of {', '.join(PRESETS)}, each perhaps with `:option=value`, got {method!r}."
        )
    grid = {option: [value] for option, value in PRESETS[name].items()}
    if rhos is not None and name != "trainer":
        grid["rho"] = rhos
    for setting in settings:
        option, equals, values = setting.partition("=")
        if not (option and equals and values):
            raise ValueError(f"`methods` must give each option as `:name=value`, got {setting!r} in {method!r}.")
        grid[option] = values.split("|")
    varied = tuple(option for option, values in grid.items() if len(values) > 1)
    return [
        Candidate(method, tuple(zip(grid, values, strict=True)), varied)
        for values in itertools.product(*grid.values())
    ]


def rho_values(text: str) -> list[str]:
    """
    Reads values of rho, numbers separated by commas, and leaves them as they are written.

    Raises:
        `ValueError`: If one is no number.
    """
    values = list(dict.fromkeys(text.split(",")))
    for value in values:
        try:
            float(value)
        except ValueError as error:
            raise ValueError(f"`rho` must be numbers separated by commas, got {value!r} in {text!r}.") from error
    return values


@dataclass(frozen=True)
class Result:
    """
    What a run came to.

    Args:
        candidate ([`Candidate`]): The setting.
        seed (`int`): The seed, which gave data, initial weights and order.
        test (`float`): Accuracy on the test images.
        validation (`float`, *optional*): Accuracy on the validation images.
        seconds (`float`): Time that the training took.
    """

    candidate: Candidate
    seed: int
    test: float
    validation: float | None
    seconds: float


_COLUMNS = ["method", "options", "seed", "validation_accuracy", "test_accuracy", "seconds"]


def write_results(results: Iterable[Result], path: str | os.PathLike) -> None:
    """
    Writes results as CSV, one run in a line.

    Args:
        results (iterable of [`Result`]): The results.
        path (`str` or `os.PathLike`): The file.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for run in results:
            options = " ".join(f"{name}={value}" for name, value in run.candidate.options)
            writer.writerow([run.candidate.method, options, run.seed, run.validation, run.test, run.seconds])


def read_results(path: str | os.PathLike) -> list[Result]:
    """
    Reads what [`write_results`] wrote, as `hf-aace compare` does into `runs.csv`.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `list[Result]`: The results, for [`summarize`].
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    options = [tuple(tuple(part.split("=", 1)) for part in row["options"].split(" ")) for row in rows]
    values = defaultdict(set)  # of each option of each method
    for row, own in zip(rows, options, strict=True):
        for name, value in own:
            values[row["method"], name].add(value)
    return [
        Result(
            Candidate(row["method"], own, tuple(name for name, _ in own if len(values[row["method"], name]) > 1)),
            int(row["seed"]),
            float(row["test_accuracy"]),
            float(row["validation_accuracy"]) if row["validation_accuracy"] else None,
            float(row["seconds"]),
        )
        for row, own in zip(rows, options, strict=True)
    ]


def choose(results: Iterable[Result]) -> dict[str, Candidate]:
    """
    The candidate of each method with the highest mean accuracy on the validation images. Only seeds that all candidates of
    the method have count; the test images are not looked at.

    Args:
        results (iterable of [`Result`]): The results so far.

    Returns:
        `dict[str, Candidate]`: By method. Of equals, the first.
    """
    chosen = {}
    for method, runs in _by(results, lambda run: run.candidate.method).items():
        candidates = _by(runs, lambda run: run.candidate)
        shared = set.intersection(*({run.seed for run in own} for own in candidates.values()))
        if len(candidates) > 1:
            score = {
                candidate: statistics.fmean(run.validation for run in own if run.seed in shared)
                for candidate, own in candidates.items()
            }
            chosen[method] = max(score, key=score.get)
        else:
            chosen[method] = next(iter(candidates))
    return chosen


def summarize(results: Iterable[Result], baseline: str) -> list[dict[str, Any]]:
    """
    The comparison, by the chosen candidate of each method.

    Args:
        results (iterable of [`Result`]): The results of all runs.
        baseline (`str`): The method that the others are compared with.

    Returns:
        `list[dict]`: For each method, in the order in which they come: `method`, `choice` (the options that were chosen on
        the validation images), `seeds`, `accuracy` on the test images and its `standard_error`, `seconds` (median), `ratio`
        (of the seconds to those of the baseline); and over the seeds that both have, paired: `gain`, `gain_standard_error`,
        and `p_value` of a t-test that there is none (each `None` for the baseline).
    """
    results = list(results)
    chosen = choose(results)
    runs = {
        method: {run.seed: run for run in results if run.candidate == candidate}
        for method, candidate in chosen.items()
    }
    base = runs[baseline]
    base_seconds = statistics.median(run.seconds for run in base.values())
    rows = []
    for method, own in runs.items():
        accuracy, error = mean_and_error([run.test for run in own.values()])
        seconds = statistics.median(run.seconds for run in own.values())
        gain = gain_error = p_value = None
        shared = sorted(own.keys() & base.keys())
        if method != baseline and shared:
            first, second = [own[seed].test for seed in shared], [base[seed].test for seed in shared]
            gain, gain_error = mean_and_error([a - b for a, b in zip(first, second, strict=True)])
            if len(shared) > 1 and gain_error > 0:
                p_value = float(ttest_rel(first, second).pvalue)
        rows.append(
            {
                "method": method,
                "choice": chosen[method].choice,
                "seeds": len(own),
                "accuracy": accuracy,
                "standard_error": error,
                "gain": gain,
                "gain_standard_error": gain_error,
                "p_value": p_value,
                "seconds": seconds,
                "ratio": seconds / base_seconds,
            }
        )
    return rows


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error (NaN for a single value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def _by(results: Iterable[Result], key) -> dict[Any, list[Result]]:
    groups = {}
    for run in results:
        groups.setdefault(key(run), []).append(run)
    return groups


def recommend_rho(results: Iterable[Result]) -> dict[str, Any]:
    """
    Which rho to take, by the validation images: the best, if what it gains over plain training is more than twice the
    standard error, and else 0. The best of several values looks good by luck alone, and plain training is the cheaper.

    Args:
        results (iterable of [`Result`]): Runs with several values of rho, 0 among them, on the same seeds.

    Returns:
        `dict`: `values`, for each rho the mean `accuracy` and its `standard_error`; `best`, the rho with the highest mean;
        its `gain` over rho 0, paired over the seeds, and the `gain_standard_error`; `rho`, the one to take; and a `text`
        for people that says so, and also whether the best value is the last one tried.
    """
    runs = _by(results, lambda run: float(dict(run.candidate.options)["rho"]))
    values, accuracies = [], {}
    for rho, own in sorted(runs.items()):
        accuracies[rho] = {run.seed: run.validation for run in own}
        mean, error = mean_and_error(list(accuracies[rho].values()))
        values.append({"rho": rho, "accuracy": mean, "standard_error": error})
    best = max(values, key=lambda row: row["accuracy"])["rho"]
    gain, error = mean_and_error([accuracies[best][seed] - plain for seed, plain in accuracies[0.0].items()])
    rho = best if gain > 2 * error else 0.0  # 0 also for a single seed, whose error is unknown
    points = f"{100 * gain:+.1f} ± {100 * error:.1f} points over plain training"
    if best == 0:
        text = "Train plainly (--rho 0): no value did better. Smaller ones might."
    elif rho > 0:
        text = f"Take --rho {rho:g}: {points}."
    else:
        text = f"Train plainly (--rho 0), or add seeds to know: the best value, {best:g}, has {points}, which may be chance."
    if 0 < best == values[-1]["rho"]:
        text += " It is the largest that was tried: try larger ones."
    return {"values": values, "best": best, "gain": gain, "gain_standard_error": error, "rho": rho, "text": text}
