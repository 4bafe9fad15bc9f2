# SPDX-License-Identifier: Apache-2.0
"""`hf-aace compare`: train methods side by side over seeds, and test which is better."""

import shlex
import sys
from dataclasses import fields

import pandas as pd

from ..config import AACEArguments
from ..study.plots import plot_accuracies, plot_accuracy_by_rho, plot_accuracy_by_time
from ..study.statistics import Candidate, candidates_of, choose, rho_values, short_name, summarize
from ..tensor_checks import check_at_least
from .output import table, write_report
from .studies import Study, read_study, study_parser


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    parser = study_parser(
        "compare",
        "Trains methods side by side over seeds: each seed gives all of them the same images, label noise, initial weights "
        "and order of the images. Settings are chosen on validation images; results are of the test images.",
    )
    parser.add_argument(
        "--methods",
        default="trainer,sam,aace,aace:ascent_fraction=0.125",
        help="The methods, separated by commas: `trainer` (plain), `sam`, `asam`, `aace`, each optionally with options of "
        "`hf-aace train` as `:name=value`. Several values, separated by `|`, are tried, and the one best on the validation "
        "images is taken. Search the same for all, above all the learning rate: "
        "'trainer:learning_rate=1e-3|3e-3,aace:learning_rate=1e-3|3e-3:rho=0.01|0.1'.",
    )
    parser.add_argument(
        "--rho",
        help="Values of rho to try, separated by commas, for methods that do not give their own. By default that of the "
        "method: 0.01 for aace, 0.05 for sam, 0.5 for asam; with `--perturb_modules norm` 10, 1 and 1.",
    )
    parser.add_argument(
        "--search_seeds", type=int, default=3, help="Number of seeds to try the values with; the chosen one gets all."
    )
    parser.add_argument("--baseline", help="The method to compare the others with. By default the first.")
    options, common = read_study(parser, argv)

    methods = list(dict.fromkeys(options.methods.split(",")))
    rhos = None if options.rho is None else rho_values(options.rho)
    candidates = [candidate for method in methods for candidate in candidates_of(method, rhos)]
    baseline = methods[0] if options.baseline is None else options.baseline
    if baseline not in methods:
        raise ValueError(f"`baseline` must be one of the methods, {', '.join(methods)}, got {baseline!r}.")
    check_at_least(1, search_seeds=options.search_seeds)

    study = Study(options, common, candidates)
    seeds, tried_on = study.seeds, study.seeds[: options.search_seeds]
    search = [(each, seed) for each in candidates for seed in (tried_on if each.method in study.searched else seeds)]
    for option, (searching, without) in unequal_search(candidates).items():
        print(
            f"hf-aace: warning: `{option}` is searched for {', '.join(searching)}, but not for {', '.join(without)}. The comparison "
            f"favors what is searched: give each method values of `{option}` to try, as `:{option}=A|B`.",
            file=sys.stderr,
        )
    # Known beforehand: the chosen candidate of each method runs with the seeds that were not tried.
    with study.runner(total=len(search) + len(study.searched) * (len(seeds) - len(tried_on))) as runner:
        runs = runner.run(search)
        chosen = choose(runs)
        winners = [candidate for candidate in candidates if chosen[candidate.method] == candidate.options]
        if rest := [(each, seed) for each in winners for seed in seeds if (each, seed) not in search]:
            runs = pd.concat([runs, runner.run(rest)])
    _report(study, runs, baseline, ["hf-aace", "compare", *argv])
    return 0


def unequal_search(candidates: list[Candidate]) -> dict[str, tuple[list[str], list[str]]]:
    """
    List the options that are searched for some methods only, which makes a comparison unfair, each with the methods for which
    it is, and those for which it is not. Plain training is not expected to search options of the perturbation.
    """
    settings = pd.DataFrame([dict(each.settings) for each in candidates], index=[each.method for each in candidates])
    values = settings.groupby(level=0, sort=False).nunique()
    of_perturbation = {option.name for option in fields(AACEArguments)}
    unequal = {}
    for option in values.columns[(values > 1).any()]:
        could = [name for name in values.index if option not in of_perturbation or not name.startswith("trainer")]
        searching = [method for method in could if values.loc[method, option] > 1]
        if without := [method for method in could if method not in searching]:
            unequal[option] = searching, without
    return unequal


def _report(study: Study, runs: pd.DataFrame, baseline: str, command: list[str]) -> None:
    summary = summarize(runs, baseline)
    print(f"{study.title}, test accuracy in per cent, against {baseline}")
    print(_comparison_table(summary))
    runs.to_csv(study.folder / "runs.csv", index=False)
    report = {"command": shlex.join(command), "baseline": baseline, "methods": summary.to_dict("records")}
    write_report(report, study.folder / "summary.json")
    pictures = [study.folder / f"{name}.png" for name in ("accuracy", "time", "rho")]
    plot_accuracies(summary, runs, study.title, pictures[0])
    plot_accuracy_by_time(summary, study.title, pictures[1])
    if not plot_accuracy_by_rho(runs, study.title, pictures[2]):
        pictures.pop().unlink(missing_ok=True)  # of an earlier call
    print(f"Numbers:  {study.folder / 'summary.json'}, {study.folder / 'runs.csv'}")
    print(f"Pictures: {', '.join(map(str, pictures))}")


def _comparison_table(summary: pd.DataFrame) -> str:
    header = ["", "chosen", "seeds", "accuracy", "gain", "p", "seconds", "ratio"]
    lines = [
        [
            short_name(row.method),
            row.choice or "-",
            str(row.seeds),
            f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}",
            "" if pd.isna(row.gain) else f"{100 * row.gain:+.1f} ± {100 * row.gain_standard_error:.1f}",
            "" if pd.isna(row.p_value) else f"{row.p_value:.2g}",
            f"{row.seconds:.1f}",
            f"{row.ratio:.2f}",
        ]
        for row in summary.itertuples()
    ]
    return table(header, lines)
