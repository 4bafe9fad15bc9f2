# SPDX-License-Identifier: Apache-2.0
"""`hf-aace find-rho`: which rho to train with, by a search on validation images."""

import shlex

from tqdm.auto import tqdm

from ..study.plots import plot_accuracy_by_rho
from ..study.statistics import Candidate, recommend_rho, rho_values
from .compare import Study, study_parser
from .output import table, write_report


def run(argv: list[str]) -> int:
    """Runs the command with the arguments `argv`; returns the exit code."""
    parser = study_parser(
        "find-rho",
        "Trains with several values of rho, and without perturbation, and says which to take, by the accuracy on validation "
        "images: the best, if it is ahead of plain training by more than twice the standard error of that, or else none. The "
        "test images play no part. The best rho depends on model, data, learning rate, length of training, "
        "perturb_modules and ascent_fraction: give them as they will be.",
    )
    parser.add_argument(
        "--rho",
        default="0.003,0.01,0.03,0.1,0.3",
        help="The values to try, separated by commas. The default is for all weights: with `--perturb_modules norm` try "
        "3,10,30,100, with `--adaptive_perturbation true` 1,3,10,30.",
    )
    parser.set_defaults(seeds=3)
    options, common = parser.parse_known_args(argv)
    values = [value for value in rho_values(options.rho) if float(value) != 0]
    if not values:
        raise ValueError(f"`rho` must have a value to compare with 0, which is tried anyway, got {options.rho!r}.")
    plain = Candidate("trainer", (("rho", "0"),))
    candidates = [plain, *(Candidate("aace", (("rho", value),), ("rho",)) for value in values)]

    study = Study(options, common, candidates)
    runs = [(candidate, seed) for seed in study.seeds for candidate in candidates]
    with study, tqdm(total=len(runs), desc="runs") as bar:
        results = study.train(runs, bar)
    advice = recommend_rho(results)

    print(f"{study.title}, accuracy on validation images in per cent")
    lines = [
        [f"{row['rho']:g}", f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}"]
        for row in advice["values"]
    ]
    print(table(["rho", "accuracy"], lines))
    print(advice["text"])
    report = {"command": shlex.join(["hf-aace", "find-rho", *argv]), **advice}
    write_report(report, study.folder / "find_rho.json")
    plot_accuracy_by_rho(results, study.title, study.folder / "rho.png")
    print(f"Numbers: {study.folder / 'find_rho.json'}\nPicture: {study.folder / 'rho.png'}")
    return 0
