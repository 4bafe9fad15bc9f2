# SPDX-License-Identifier: Apache-2.0
"""
Try what might close the gap in gain between one pass and an ascent pass, and SAM in the last part of the training.

    python notebooks/study/one_pass_trials.py convnext-noisy     # or vit-noisy

Each run leaves a row in runs/trials/SETTING-one-pass.csv, and the same command goes on where it was. Learning rate and rho are chosen on
the validation images over the first seeds, and the chosen pair is run with all eight. Seeds are those of the studies to compare with.

- "corrected": the gradient that one pass read is scaled to the norm of the gradient at clean weights, which an ascent pass measures at
  each step. No estimate of that norm from the confidence lost at the perturbed weights can do better.
- "and biases, layer scales", "all layers": one pass reads these too.
- "SAM from 0.8": plain training, and from that share of the training on SAM, by a schedule (warmup, stable, decay) that decays there.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from trials import SETTINGS, During, train

from hf_aace import checks
from hf_aace.ascent import Ascent


SEEDS, SEEDS_OF_TAIL = range(10, 18), range(8)  # those of the studies to compare with
STEPS = {"convnext-noisy": 40 * 7, "vit-noisy": 80 * 10}  # in batches of 64
# The rate at which one pass was measured, pairs of rho, and the normalization layers by name.
READ = {
    "convnext-noisy": ("3e-3", (10, 30), (0.1, 0.3), r"layernorm|downsampling_layer\.0|norm\."),
    "vit-noisy": ("3e-4", (3, 10), (0.003, 0.01), "layernorm"),
}
# Rates and values of rho of SAM.
TAIL = {
    "convnext-noisy": (("3e-4", "1e-3"), (0.1, 0.2, 0.5)),
    "vit-noisy": (("1e-4", "3e-4"), (0.01, 0.05)),
}
SETTINGS["vit-noisy"] = SETTINGS["vit-noisy"].replace("--learning_rate 3e-4 ", "")

prepare = Ascent.prepare_perturbation
correcting = False


def corrected(ascent: Ascent, model: torch.nn.Module, inputs: dict):
    kept = ascent._gradient
    if correcting and kept is not None:
        right, *_ = ascent._gradients(model, [inputs], kept.parameters, in_sync=False)
        factor = norm(right) / norm(kept.values)
        kept.values = [None if value is None else value * factor for value in kept.values]
    return prepare(ascent, model, inputs)


def norm(values: list[torch.Tensor | None]) -> torch.Tensor:
    return torch.stack([value.square().sum() for value in values if value is not None]).sum().sqrt()


def candidates(setting: str) -> dict[str, list[str]]:
    rate, rhos, rhos_of_all, layers = READ[setting]
    eighth = f"--learning_rate {rate} --one_pass true --ascent_fraction 0.125"
    found = {
        "one pass, 1/8, corrected": [f"{eighth} --rho {rho}" for rho in rhos],
        "one pass, 1/8, and biases, layer scales": [
            f"{eighth} --perturb_modules {layers}|bias|layer_scale --rho {rho}" for rho in rhos
        ],
        "one pass, 1/4, all layers": [
            f"--learning_rate {rate} --one_pass true --ascent_fraction 0.25 --perturb_modules (weight|bias)$ --rho {rho}"
            for rho in rhos_of_all
        ],
    }
    rates, rhos = TAIL[setting]
    schedule = f"--lr_scheduler_type warmup_stable_decay --warmup_steps {round(0.05 * STEPS[setting])}"
    for start in (0.8, 0.6):
        decay = f'--lr_scheduler_kwargs {{"num_decay_steps":{round((1 - start) * STEPS[setting])}}}'
        found[f"SAM from {start}"] = [
            f"--learning_rate {rate} --method sam --rho {rho} {schedule} {decay}" for rate in rates for rho in rhos
        ]
    found["plain, that schedule"] = [f"--learning_rate {rate} --rho 0 {schedule} {decay}" for rate in rates]
    return found


def main() -> None:
    global correcting
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=list(READ))
    parser.add_argument("--search_seeds", type=int, default=3)
    options = parser.parse_args()
    path = Path("runs/trials") / f"{options.setting}-one-pass.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    checks.check_one_pass = lambda *_: None  # other layers can be read as well
    Ascent.prepare_perturbation = corrected
    for name, choices in candidates(options.setting).items():
        correcting, all_seeds = name.endswith("corrected"), SEEDS if name.startswith("one pass") else SEEDS_OF_TAIL

        def run(choice: str, seeds: range, name: str = name) -> pd.DataFrame:
            for seed in seeds:
                key = {"method": name, "options": choice, "seed": seed}
                if not any(key.items() <= row.items() for row in rows):
                    callbacks = [During(float(name.split()[-1]), 1)] if name.startswith("SAM") else []
                    rows.append(key | train(options.setting, choice, seed, callbacks))
                    pd.DataFrame(rows).to_csv(path, index=False)
            return pd.DataFrame([row for row in rows if row["options"] == choice and row["seed"] in seeds])

        searched = {choice: run(choice, all_seeds[: options.search_seeds])["validation"].mean() for choice in choices}
        run(max(searched, key=searched.get), all_seeds)


if __name__ == "__main__":
    main()
