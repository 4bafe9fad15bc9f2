# SPDX-License-Identifier: Apache-2.0
"""
Comparisons of training methods over seeds: which settings to try, which to choose, and what the results say.

The runs of a comparison are a `DataFrame` with a row for each run and the columns `method` (as it was written), `options` (of
`hf-aace train`, as `name=value name=value`), `seed` (which gives data, initial weights and order), `validation_accuracy` (NaN if
no images were set apart), `test_accuracy` and `seconds` (of training).
"""

import itertools
import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_rel

from ..config import METHODS


RUN_COLUMNS = ["method", "options", "seed", "validation_accuracy", "test_accuracy", "seconds"]


@dataclass(frozen=True)
class Candidate:
    """
    One setting of a method.

    Args:
        method (`str`): The method, as it was written.
        settings (`tuple[tuple[str, str], ...]`): Names and values of options of `hf-aace train`.
    """

    method: str
    settings: tuple[tuple[str, str], ...]

    @property
    def options(self) -> str:
        """Return the settings as the column `options` of the runs has them."""
        return " ".join(f"{name}={value}" for name, value in self.settings)

    @property
    def folder(self) -> str:
        """A folder name for its runs. Two candidates share it only if their settings are the same."""
        fixed = [part for part in self.method.split(":") if "|" not in part]
        implied = [*fixed, *(f"{name}={value}" for name, value in _implied(fixed[0]).items())]
        own = [f"{name}={value}" for name, value in self.settings]
        name = " ".join([*fixed, *(part for part in own if part not in implied)])
        # `norm.` and `norm$` are two regular expressions, but neither can be the name of a folder.
        suffix = f"-{zlib.crc32(name.encode()):x}" if re.search(r"[^\w.=+ -]", name) else ""
        return re.sub(r"[^\w.=+-]+", "-", name) + suffix


def _implied(name: str) -> dict[str, str]:
    """Return the options that the name of a method stands for."""
    return {"rho": "0"} if name == "trainer" else {"method": name}


def candidates_of(method: str, rhos: list[str] | None = None) -> list[Candidate]:
    """
    Read a method as the command line has it.

    Args:
        method (`str`):
            `trainer` (plain training) or the name of a method in [`~hf_aace.config.METHODS`], optionally followed by options of
            `hf-aace train`, each as `:name=value`. Values separated by `|` make as many candidates:
            `aace:ascent_fraction=0.125:rho=0.01|0.1`.
        rhos (`list[str]`, *optional*):
            Values of `rho` for a method that perturbs and does not give its own. Defaults to the method's.

    Returns:
        `list[Candidate]`: All combinations of the values.

    Raises:
        `ValueError`: If there is no such method, or an option is not written as `name=value`.
    """
    name, *settings = method.split(":")
    if name not in ("trainer", *METHODS):
        known = ", ".join(["trainer", *METHODS])
        raise ValueError(f"`methods` must be of {known}, each optionally with `:option=value`, got {method!r}.")
    grid = {option: [value] for option, value in _implied(name).items()}
    if rhos is not None and name != "trainer":
        grid["rho"] = rhos
    for setting in settings:
        option, equals, values = setting.partition("=")
        if not (option and equals and values):
            raise ValueError(f"`methods` must give each option as `:name=value`, got {setting!r} in {method!r}.")
        grid[option] = list(dict.fromkeys(values.split("|")))
    return [Candidate(method, tuple(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]


def rho_values(text: str) -> list[str]:
    """
    Read values of rho, numbers separated by commas, and keep each as it is first written.

    Raises:
        `ValueError`: If one is not a number.
    """
    values = {}
    for value in text.split(","):
        try:
            values.setdefault(float(value), value)
        except ValueError as error:
            raise ValueError(f"`rho` must be numbers separated by commas, got {value!r} in {text!r}.") from error
    return list(values.values())


def settings_of(options: str) -> dict[str, str]:
    """Read the column `options` of a run: names and values."""
    return dict(part.split("=", 1) for part in options.split(" ") if "=" in part)


def searched_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the options of one method's runs that have several values, a column for each and a row for each run."""
    settings = pd.DataFrame(runs["options"].map(settings_of).tolist(), index=runs.index)
    return settings.loc[:, settings.nunique(dropna=False) > 1]


def short_name(method: str) -> str:
    """Return the name of a method without the values that were searched."""
    return ":".join(part for part in method.split(":") if "|" not in part)


def choose(runs: pd.DataFrame) -> dict[str, str]:
    """
    Choose the setting of each method: the one with the highest mean accuracy on the validation images. Only seeds that all
    settings of the method have count. The test images are not looked at.

    Args:
        runs (`pd.DataFrame`): The runs so far.

    Returns:
        `dict[str, str]`: The chosen options of each method. Of equal ones, the first.
    """
    chosen = {}
    for method, own in runs.groupby("method", sort=False):
        settings = own["options"].unique()
        accuracy = own.pivot(index="seed", columns="options", values="validation_accuracy")[settings]
        # Rounded, or the last bits of the sums would decide between equal ones.
        chosen[method] = accuracy.dropna().mean().round(12).idxmax() if len(settings) > 1 else settings[0]
    return chosen


def summarize(runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """
    Compare the methods, each with its chosen setting.

    Args:
        runs (`pd.DataFrame`): All runs.
        baseline (`str`): The method that the others are compared with.

    Returns:
        `pd.DataFrame`: A row for each method, in the order in which they come: `method`; `options`, the chosen setting, and
        `choice`, the part of it that was searched; the number of `seeds`; the mean test `accuracy` with its `standard_error`;
        the median `seconds` and their `ratio` to those of the baseline; and over the seeds that both have, paired: `gain`,
        `gain_standard_error`, and the `p_value` of a t-test against no gain. What cannot be computed is NaN: the gain of the
        baseline, the error of a single seed, the p-value of gains that are all the same.
    """
    rows, chosen = [], choose(runs)
    by_seed = {
        method: runs[(runs["method"] == method) & (runs["options"] == chosen[method])].set_index("seed")
        for method in chosen
    }
    base = by_seed[baseline]
    for method, own in by_seed.items():
        searched = searched_settings(runs[runs["method"] == method])
        setting = settings_of(chosen[method])
        pairs = pd.concat(
            [own["test_accuracy"], base["test_accuracy"]], axis="columns", join="inner", keys=["own", "base"]
        )
        gains = (pairs["own"] - pairs["base"]) if method != baseline else pd.Series(dtype=float)
        all_the_same = gains.round(12).nunique() < 2  # rounded, as equal gains may differ in their last bits
        rows.append(
            {
                "method": method,
                "options": chosen[method],
                "choice": ", ".join(f"{name}={setting[name]}" for name in searched if name in setting),
                "seeds": len(own),
                "accuracy": own["test_accuracy"].mean(),
                "standard_error": own["test_accuracy"].sem(),
                "gain": gains.mean(),
                "gain_standard_error": gains.sem(),
                "p_value": np.nan if all_the_same else ttest_rel(pairs["own"], pairs["base"]).pvalue,
                "seconds": own["seconds"].median(),
                "ratio": own["seconds"].median() / base["seconds"].median(),
            }
        )
    return pd.DataFrame(rows)


def recommend_rho(runs: pd.DataFrame) -> dict[str, Any]:
    """
    Recommend a rho by the validation images: the best, if it gains more over plain training than twice the standard error, else
    0. The best of several values looks good by luck alone, and plain training is cheaper.

    Args:
        runs (`pd.DataFrame`): Runs with several values of rho, 0 among them, on the same seeds.

    Returns:
        `dict`: `values`, for each rho the mean `accuracy` and its `standard_error`; `best`, the rho with the highest mean; its
        `gain` over rho 0, paired over the seeds, and the `gain_standard_error`; the recommended `rho`; and a `text` that says so
        and tells if the best value is the largest one tried.
    """
    rho = runs["options"].map(lambda options: float(settings_of(options)["rho"]))
    accuracy = runs.assign(rho=rho).pivot(index="seed", columns="rho", values="validation_accuracy")
    means, errors = accuracy.mean(), accuracy.sem()
    best = float(means.round(12).idxmax())
    gains = accuracy[best] - accuracy[0.0]
    gain, error = float(gains.mean()), float(gains.sem())
    rho = best if gain > 2 * error else 0.0  # 0 also for a single seed, whose error is unknown
    points = f"{100 * gain:+.1f} ± {100 * error:.1f} points over plain training"
    if best == 0:
        text = "Train plainly (--rho 0): no value did better. Smaller ones might."
    elif rho > 0:
        text = f"Take --rho {rho:g}: {points}."
    else:
        text = f"Train plainly (--rho 0), or add seeds to know: the best value, {best:g}, has {points}, which may be chance."
    if 0 < best == means.index[-1]:
        text += " It is the largest that was tried: try larger ones."
    values = [{"rho": value, "accuracy": means[value], "standard_error": errors[value]} for value in means.index]
    return {"values": values, "best": best, "gain": gain, "gain_standard_error": error, "rho": rho, "text": text}
