# SPDX-License-Identifier: Apache-2.0
"""`hf-aace find-rho`: search for the best rho on validation images."""

import shlex

from ..config import AACEConfig, method_title
from ..study.plots import plot_accuracy_by_rho
from ..study.statistics import Candidate, recommend_rho, rho_values
from .output import table, write_report
from .studies import Study, read_study, study_parser
from .train import train_parser


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    parser = study_parser(
        "find-rho",
        "Trains with several values of rho, and without perturbation, and says which to take, by the accuracy on validation "
        "images: the best, if it is ahead of plain training by more than twice the standard error of that, or else none. The "
        "test images play no part. The best rho depends on model, data, learning rate, length of training, "
        "perturb_modules and ascent_fraction: give them as they will be.",
    )
    parser.add_argument(
        "--rho",
        help="The values to try, separated by commas. By default 0.003,0.01,0.03,0.1,0.3; with `--perturb_modules norm` "
        "3,10,30,100; with `--adaptive_perturbation true` 1,3,10,30; with either of them and a normalized step, as in sam and "
        "asam, 0.1,0.3,1,3,10.",
    )
    parser.set_defaults(seeds=3)
    options, common = read_study(parser, argv)
    *_, settings = train_parser(common).read(common)
    tried = default_values(settings) if options.rho is None else options.rho
    values = [value for value in rho_values(tried) if float(value) != 0]
    if not values:
        raise ValueError(f"`rho` must have a value to compare with 0, which is tried anyway, got {tried!r}.")
    method = method_title(settings).split(",")[0].lower()
    candidates = [Candidate("trainer", (("rho", "0"),)), *(Candidate(method, (("rho", value),)) for value in values)]

    study = Study(options, common, candidates, chooses=True)
    todo = [(candidate, seed) for seed in study.seeds for candidate in candidates]
    with study.runner(len(todo)) as runner:
        runs = runner.run(todo)
    advice = recommend_rho(runs)

    print(f"{study.title}, accuracy on validation images in per cent")
    lines = [
        [f"{row['rho']:g}", f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}"]
        for row in advice["values"]
    ]
    print(table(["rho", "accuracy"], lines))
    print(advice["text"])
    report = {"command": shlex.join(["hf-aace", "find-rho", *argv]), **advice}
    write_report(report, study.folder / "find_rho.json")
    plot_accuracy_by_rho(runs, study.title, study.folder / "rho.png")
    print(f"Numbers: {study.folder / 'find_rho.json'}\nPicture: {study.folder / 'rho.png'}")
    return 0


def default_values(settings: AACEConfig) -> str:
    """Choose the values of rho to try by what is perturbed: what is right for all weights hardly moves the norm layers."""
    if settings.perturb_modules != "norm" and not settings.adaptive_perturbation:
        return "0.003,0.01,0.03,0.1,0.3"
    if settings.normalize_perturbation:
        return "0.1,0.3,1,3,10"
    return "1,3,10,30" if settings.adaptive_perturbation else "3,10,30,100"
