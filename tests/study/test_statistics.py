# SPDX-License-Identifier: Apache-2.0
"""The measured claims of the README: `pytest -m slow`."""

import json

import pytest

from hf_aace.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["--rho 0.1", "--rho 30 --perturb_modules norm --ascent_fraction 0.25"])
def test_aace_beats_plain_training_by_six_points_on_noisy_digits(settings, tmp_path):
    """ConvNeXt, 400 images, a fifth of the labels wrong, mean over five seeds."""
    means = {}
    for method in ("--rho 0", settings):
        accuracies = []
        for seed in range(5):
            output_dir = tmp_path / f"{len(means)}-{seed}"
            options = (
                f"train {method} --seed {seed} --label_noise 0.2 --train_size 400 --num_train_epochs 40 "
                f"--eval_strategy no --save_strategy no --disable_tqdm true --output_dir {output_dir}"
            )
            assert main(options.split()) == 0
            accuracies.append(json.loads((output_dir / "all_results.json").read_text())["eval_accuracy"])
        means[method] = sum(accuracies) / len(accuracies)
    assert means[settings] - means["--rho 0"] >= 0.06
