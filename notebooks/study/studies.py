# SPDX-License-Identifier: Apache-2.0
"""
Make the studies of `studies.yaml` again. Without a name, list them.

    python notebooks/study/studies.py                                  # the list
    python notebooks/study/studies.py convnext-noisy-tuned             # one: minutes to hours on two CPU cores
    python notebooks/study/studies.py --collect convnext-noisy-tuned   # put its runs into runs.parquet
    python notebooks/study/studies.py cost                             # the cost of a step by size: a quarter of an hour
    python notebooks/study/studies.py cost-of-ascents                  # ... by the kind of ascent: ten minutes
    python notebooks/study/studies.py cost-of-photographs              # ... on the models of the photographs: five minutes

A study that was stopped goes on where it was. Its tables and pictures are in runs/study/NAME. Fine-tuning starts from two models
that are trained first; those of photographs from what `photographs.py prepare` makes. `cost` leaves runs/study/cost.csv, and so on.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import yaml
from datasets import ClassLabel, DatasetDict, Features, Image
from transformers import PreTrainedModel, set_seed

from hf_aace import AACEArguments, AACEConfig
from hf_aace.study.cost import measure, random_batch, summarize
from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.lora import add_lora
from hf_aace.vision.models import load_model_and_processor, model_from_architecture


HERE = Path(__file__).parent
FOLDER = Path("runs/study")


def settings() -> dict[str, dict]:
    """Read `studies.yaml`: for each setting its `options`, and those of its `studies` by name."""
    return yaml.load((HERE / "studies.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)


def commands() -> dict[str, list[str]]:
    """Read the command of each study, by name."""
    found = {}
    for setting in settings().values():
        for name, options in setting["studies"].items():
            command = "find-rho" if name.startswith("find-rho-") else "compare"
            options = shlex.split(f"{setting['options']} {options}")
            found[name] = ["hf-aace", command, "--output_dir", f"{FOLDER}/{name}", *options]
    return found


def digits_between(first: int, last: int) -> DatasetDict:
    """Make a dataset of the digits from `first` to `last` alone."""
    digits = load_image_dataset("digits", seed=0)
    digits = digits.filter(lambda label: first <= label <= last, input_columns="label")
    names = [str(name) for name in range(first, last + 1)]
    features = Features(image=Image(), label=ClassLabel(names=names))
    return digits.map(lambda label: {"label": label - first}, input_columns="label", features=features)


def pretrain() -> None:
    """Train the two models that fine-tuning starts from on the digits 0 to 5, and leave the digits 6 to 9 beside them."""
    if (FOLDER / "pretrained-vit" / "all_results.json").is_file():
        return
    digits_between(0, 5).save_to_disk(FOLDER / "digits-0-5")
    digits_between(6, 9).save_to_disk(FOLDER / "digits-6-9")
    train = f"hf-aace train --rho 0 --dataset_name {FOLDER}/digits-0-5 --augmentation none --save_strategy no"
    for model in ("convnext", "vit"):
        folder = FOLDER / f"pretrained-{model}"
        subprocess.run(
            [*train.split(), "--model_name_or_path", f"{model}-tiny-digits", "--output_dir", folder], check=True
        )
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if weights not in (HERE / "pretrained.sha256").read_text():
            print(f"{folder} is another model than that of runs.parquet, perhaps as it was made on another processor:")
            print("compare what is fine-tuned from it with new runs only.")


def cost() -> None:
    """Measure the cost of a step by the size of the model and of the batch."""

    def vit(width, depth):
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
        return "vit", {**sizes, "num_hidden_layers": depth, "image_size": 64, "patch_size": 8}

    def convnext(width, depths):
        return "convnext", {"hidden_sizes": [width * 2**i for i in range(4)], "depths": depths, "image_size": 64}

    models = [(vit(192, 12), batch) for batch in (16, 64, 256)]
    models += [(convnext(48, [2, 2, 8, 2]), batch) for batch in (16, 64, 256)]
    models += [(vit(width, depth), 16) for width, depth in ((128, 5), (384, 12), (768, 12))]
    models += [(convnext(24, [2, 2, 6, 2]), 16), (convnext(96, [3, 3, 9, 3]), 16), (convnext(128, [3, 3, 27, 3]), 16)]
    rows = []
    for number, ((model, overrides), batch) in enumerate(models):
        folder = FOLDER / f"cost-{number}"
        options = f"--fractions 0.125 --rounds 9 --warmup 2 --model_name_or_path {model} --batch_size {batch}"
        command = ["hf-aace", "benchmark", *options.split(), "--config_overrides", json.dumps(overrides)]
        subprocess.run([*command, "--output_dir", folder], check=True)
        report = json.loads((folder / "benchmark.json").read_text())
        size = {"model": model, "parameters": report["parameters"], "batch": batch}
        for row in report["methods"]:
            low, high = row["ratio_quartiles"]
            times = {"seconds": row["seconds"], "ratio": row["ratio"], "lower_quartile": low, "upper_quartile": high}
            rows.append({**size, "method": row["name"], **times})
    pd.DataFrame(rows).to_csv(FOLDER / "cost.csv", index=False, float_format="%.4g")


def _norm(share: float) -> AACEArguments:
    return AACEArguments(perturb_modules="norm", ascent_fraction=share)


def cost_of_ascents() -> None:
    """Measure the cost of a step by the kind of ascent, on models of 5.4 M parameters in batches of 64."""
    methods = {"plain Trainer": AACEArguments(rho=0.0), "AACE": AACEArguments()}
    methods["AACE, 1/4"] = AACEArguments(ascent_fraction=0.25)
    methods |= {f"norm, 1/{part}": _norm(1 / part) for part in (4, 8, 16, 32)}
    vit = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}
    convnext = {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 8, 2]}
    models = {
        "ViT, 64 pixels": ("vit", vit, 64),
        "ConvNeXt, 64 pixels": ("convnext", convnext, 64),
        "ConvNeXt, 128 pixels": ("convnext", convnext, 128),
    }
    rows = []
    for title, (name, sizes, pixels) in models.items():
        set_seed(0)
        rows += _costs(title, model_from_architecture(name, sizes), 64, pixels, methods)
        pd.DataFrame(rows).to_csv(FOLDER / "cost-of-ascents.csv", index=False, float_format="%.4g")


def cost_of_photographs() -> None:
    """Measure the cost of a step on the models of the photographs, in the batches that they are trained in."""
    all_weights = {"plain": AACEArguments(rho=0.0), "AACE": AACEArguments(), "SAM": AACEArguments(method="sam")}
    all_weights["AACE, every 16 steps"] = AACEArguments(ascent_every=16)
    methods = all_weights | {"norm, 1/4": _norm(1 / 4), "norm, 1/16": _norm(1 / 16)}
    classes = {index: str(index) for index in range(10)}
    rows = []
    for title, name, batch, pixels in (
        ("efficientnet", f"{FOLDER}/photographs-efficientnet", 16, 64),
        ("resnet", "resnet-tiny-digits", 64, 32),
        ("convnext", f"{FOLDER}/others-convnext", 32, 32),
        ("vit", f"{FOLDER}/others-vit", 32, 32),
    ):
        model, _ = load_model_and_processor(name, classes)
        rows += _costs(title, model, batch, pixels, methods)
    with_adapters = add_lora(load_model_and_processor(f"{FOLDER}/others-vit", classes)[0])
    rows += _costs("lora", with_adapters, 32, 32, all_weights)
    pd.DataFrame(rows).to_csv(FOLDER / "cost-of-photographs.csv", index=False, float_format="%.4g")


def _costs(
    title: str, model: PreTrainedModel, batch: int, pixels: int, methods: dict[str, AACEArguments]
) -> list[dict]:
    args = AACEConfig(FOLDER / "cost", use_cpu=True, dataloader_pin_memory=False)
    measured = measure(model, random_batch(model, batch, pixels), args, methods, rounds=16, warmup=1)
    rows = []
    for row in summarize(measured, batch):
        low, high = row["ratio_quartiles"]
        memory = row["extra_peak_bytes"] / measured[0].peak_bytes
        quartiles = {"lower_quartile": low, "upper_quartile": high}
        rows.append({"model": title, "method": row["name"], "ratio": row["ratio"], **quartiles, "memory": memory})
    return rows


def collect(names: list[str]) -> None:
    """Replace the runs of studies in runs.parquet, and their measures in measures.csv, by those in runs/study."""
    runs = pd.read_parquet(HERE / "runs.parquet")
    new = [pd.read_csv(FOLDER / name / "runs.csv").assign(study=name)[runs.columns] for name in names]
    runs = pd.concat([runs[~runs["study"].isin(names)], *new])
    runs.to_parquet(HERE / "runs.parquet", index=False, compression="zstd")
    measures = pd.read_csv(HERE / "measures.csv")
    measured = [path for name in names if (path := FOLDER / name / "measures.csv").is_file()]
    measures = measures[~measures["study"].isin([path.parent.name for path in measured])]
    measures = pd.concat([measures, *map(pd.read_csv, measured)])
    measures.to_csv(HERE / "measures.csv", index=False, float_format="%.5g")


COSTS = {"cost": cost, "cost-of-ascents": cost_of_ascents, "cost-of-photographs": cost_of_photographs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="Names of studies.")
    parser.add_argument("--collect", action="store_true", help="Put their runs into runs.parquet.")
    options = parser.parse_args()
    studies = commands()
    if unknown := [name for name in options.names if name not in (*studies, *COSTS)]:
        parser.error(f"There is no study {unknown[0]!r}. Without a name this command lists them.")
    if not options.names:
        print("\n".join(f"{name}: {shlex.join(command)}" for name, command in studies.items()))
    if options.collect:
        collect(options.names)
        return
    for name in options.names:
        if name in COSTS:
            FOLDER.mkdir(parents=True, exist_ok=True)
            COSTS[name]()
            continue
        os.environ["OMP_NUM_THREADS"] = "1"  # as for runs.parquet: with more, sums have other last bits
        if "finetune" in name:
            pretrain()
        subprocess.run(studies[name], check=True)


if __name__ == "__main__":
    main()
