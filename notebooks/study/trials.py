# SPDX-License-Identifier: Apache-2.0
"""
Runs that `hf-aace compare` cannot make, as a callback takes part in them.

    python notebooks/study/trials.py when      # perturbing during a part of the training only (notebook 5)
    python notebooks/study/trials.py claims    # the paper's claims about gradients and directions (notebook 2)

Each leaves a line for each run in `runs/trials/NAME.jsonl` and goes on where it was. `claims` also leaves its curves in
`runs/trials/claims.csv`; `when` prints the gains over plain training.
"""

import argparse
import json
import os
import time
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"  # as for runs.parquet: with more, sums have other last bits

import pandas as pd
import torch
from transformers import TrainerCallback

from hf_aace.callbacks import PerturbationConsistencyCallback
from hf_aace.cli.loading import load_data, make_trainer
from hf_aace.cli.train import train_parser


SETTINGS = {
    "convnext-noisy": "--label_noise 0.2 --train_size 400 --num_train_epochs 40",
    "convnext-clean": "--train_size 200 --num_train_epochs 60",
    "vit-noisy": "--model_name_or_path vit-tiny-digits --learning_rate 3e-4 --label_noise 0.2 --train_size 600 "
    "--num_train_epochs 80",
    "vit-clean": "--model_name_or_path vit-tiny-digits --learning_rate 1e-3 --train_size 300 --num_train_epochs 80",
    "vit-clean-long": "--model_name_or_path vit-tiny-digits --learning_rate 3e-4 --train_size 300 --num_train_epochs 160",
}


class During(TrainerCallback):
    """Perturb from one share of the training to another, such as from 0.75 to 1, and train plainly before and after."""

    def __init__(self, start, end):
        self.start, self.end = start, end

    def on_train_begin(self, args, state, control, **kwargs):
        self.rho = args.rho

    def on_step_begin(self, args, state, control, **kwargs):
        args.rho = self.rho if self.start <= state.global_step / state.max_steps < self.end else 0.0


class Travel(TrainerCallback):
    """Log the length of the path of the weights, from epoch to epoch."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.last, self.path, self.paths = _weights(model), 0.0, []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        now = _weights(model)
        self.path += float((now - self.last).norm())
        self.last = now
        self.paths.append(self.path)


def _weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def when():
    settings = {"convnext-noisy": (0.3, 0.5), "vit-noisy": (0.01, 0.01), "vit-clean-long": (0.01, 0.01)}
    for setting, (rho, sam) in settings.items():
        for seed in range(4):
            yield setting, "trainer", "--rho 0", seed, []
            for name, options in {"AACE": f"--rho {rho}", "SAM": f"--method sam --rho {sam}"}.items():
                yield setting, name, options, seed, []
                for start, end in ((0, 0.5), (0.25, 1), (0.5, 1), (0.75, 1)):
                    yield setting, f"{name} from {start} to {end}", options, seed, [During(start, end)]


def claims():
    methods = {
        "SAM": "--method sam --rho 0.1",
        "AACE": "--rho 0.03",
        "AACE, normalised": "--normalize_perturbation true --rho 0.1",
    }
    for seed in range(5):
        for setting in ("convnext-clean", "vit-clean"):  # near convergence, which is what the paper is about
            for name, options in methods.items():
                yield setting, name, options, seed, [PerturbationConsistencyCallback(), Travel()]


def train(setting, options, seed, callbacks):
    """Train as `hf-aace train` does with these options; return the accuracies, and of `claims` what was logged."""
    argv = (
        f"--eval_strategy no --save_strategy no --validation_size 0.2 {SETTINGS[setting]} --seed {seed} {options} "
        "--output_dir runs/trials/run --disable_tqdm true"
    ).split()
    model_args, data_args, _, training_args = train_parser(argv).read(argv)
    trainer, dataset = make_trainer(load_data(data_args, training_args), model_args, data_args, training_args)
    for callback in callbacks:
        trainer.add_callback(callback)
    started = time.process_time()
    trainer.train()
    row = {
        "seconds": time.process_time() - started,
        "validation": trainer.evaluate()["eval_accuracy"],
        "test": trainer.evaluate(dataset["test"])["eval_accuracy"],
    }
    for callback in callbacks:
        if isinstance(callback, Travel):
            epochs = [entry for entry in trainer.state.log_history if "loss" in entry]
            row["epochs"] = [{**log, "path": path} for log, path in zip(epochs, callback.paths, strict=True)]
    return row


def write_curves(rows, path):
    """Write the curves of `claims`: for each epoch the means over the seeds, and their standard errors."""
    titles = {"convnext-clean": "ConvNeXt, clean", "vit-clean": "ViT, clean"}
    names = ["ascent_loss", "ascent_grad_norm", "perturbation_consistency", "path"]
    epochs = pd.DataFrame(
        {
            "setting": titles[row["setting"]],
            "method": row["name"],
            "epoch": number,
            **{name: entry[name] for name in names},
        }
        for row in rows
        for number, entry in enumerate(row["epochs"], start=1)
    )
    curves = epochs.melt(["setting", "method", "epoch"], names, var_name="quantity")
    groups = curves.groupby(["setting", "method", "epoch", "quantity"], sort=False)["value"]
    groups.agg(mean="mean", standard_error="sem").reset_index().to_csv(path, index=False, float_format="%.4g")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", choices=["when", "claims"])
    name = parser.parse_args().trials
    path = Path("runs/trials") / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for setting, method, options, seed, callbacks in {"when": when, "claims": claims}[name]():
        key = {"setting": setting, "name": method, "seed": seed}
        if not any(key.items() <= row.items() for row in rows):
            rows.append(key | train(setting, options, seed, callbacks))
            with open(path, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if name == "claims":
        write_curves(rows, path.with_suffix(".csv"))
    else:
        test = pd.DataFrame(rows).pivot(index=["setting", "seed"], columns="name", values="test")
        gains = 100 * test.sub(test["trainer"], axis="index")
        print(gains.groupby("setting").agg(["mean", "sem"]).T.round(1).to_string())


if __name__ == "__main__":
    main()
