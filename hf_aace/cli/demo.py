# SPDX-License-Identifier: Apache-2.0
"""`hf-aace demo`: show in a minute what sharpness-aware training is for, on images of which many have wrong labels."""

import argparse
import json
from pathlib import Path

from . import compare
from .checks import check_folder
from .output import HelpFormatter


# The study `convnext-noisier` of the notebooks: each method with the learning rate that did best on validation images, since
# at a rate that suits plain training badly the gain would be many times as large.
_PLAIN, _AACE = "trainer:learning_rate=3e-4", "aace:learning_rate=1e-3:rho=0.3"
_TRAINING = ["--label_noise", "0.4", "--train_size", "400", "--num_train_epochs", "40", "--validation_size", "0"]


def run(argv: list[str]) -> int:
    """Run the command with the arguments `argv`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="hf-aace demo",
        description="Trains a small ConvNeXt on 400 scans of digits, of which 40 % have a wrong label: plainly and with AACE, each at "
        "its best learning rate, over a few seeds. Prints what was gained, with its standard error, and draws it.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="How many seeds.")
    parser.add_argument(
        "--output_dir", default="runs/demo", metavar="TEXT", help="Where runs, numbers and picture go."
    )
    options = parser.parse_args(argv)
    if options.seeds < 2:
        raise ValueError(f"`seeds` must be at least 2, to tell a gain from chance, got {options.seeds}.")
    check_folder("output_dir", options.output_dir)
    methods = ["--methods", f"{_PLAIN},{_AACE}", "--seeds", str(options.seeds)]
    compare.run([*methods, *_TRAINING, "--output_dir", options.output_dir])
    plain, aace = json.loads(Path(options.output_dir, "summary.json").read_text(encoding="utf-8"))["methods"]
    gain, error = aace["gain"], aace["gain_standard_error"]
    if abs(gain) < 2 * error:
        verdict = f"a difference of {100 * gain:+.1f} points, which may be chance"
    else:
        verdict = f"{100 * abs(gain):.1f} points {'more' if gain > 0 else 'less'}"
    print(
        f"\nWith 40 % of the training labels wrong, plain training classifies {100 * plain['accuracy']:.1f} % of the test images "
        f"correctly, AACE {100 * aace['accuracy']:.1f} %: {verdict} (standard error {100 * error:.1f}, "
        f"{options.seeds} seeds). The picture is {Path(options.output_dir, 'accuracy.png')}.\n"
        "To train on your own images: hf-aace train --dataset_name FOLDER --model_name_or_path MODEL"
    )
    return 0
