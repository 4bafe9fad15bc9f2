# SPDX-License-Identifier: Apache-2.0
"""
Compute the published tables from the runs in `runs.parquet`. `python notebooks/study/results.py` prints those of README.md here.

Means with standard errors, in per cent; gains are paired over the seeds. The setting of each method was chosen on the validation
images.
"""

import json
import math
from pathlib import Path

import pandas as pd
import studies

from hf_aace.study.statistics import settings_of, short_name, summarize


HERE = Path(__file__).parent
RUNS = pd.read_parquet(HERE / "runs.parquet")
NAMES = set(RUNS["study"])

SETTINGS = {  # * of 16 seeds, the others of eight
    "convnext-noisy": "ConvNeXt, 400 images, 20 % wrong *",
    "convnext-noisier": "ConvNeXt, 400 images, 40 % wrong",
    "convnext-noisy-all": "ConvNeXt, 1297 images, 20 % wrong",
    "convnext-clean": "ConvNeXt, 200 images, clean",
    "finetune-convnext-noisy": "ConvNeXt fine-tuned, 100 images, 20 % wrong",
    "finetune-convnext-clean": "ConvNeXt fine-tuned, 50 images, clean",
    "resnet-noisy": "ResNet, 400 images, 20 % wrong",
    "vit-noisy": "ViT, 600 images, 20 % wrong *",
    "vit-noisier": "ViT, 600 images, 40 % wrong",
    "vit-noisy-all": "ViT, 1297 images, 20 % wrong",
    "vit-clean-long": "ViT, 300 images, clean",
    "finetune-vit-lora-noisy": "ViT with LoRA, 100 images, 20 % wrong *",
    "finetune-vit-lora-clean": "ViT with LoRA, 50 images, clean *",
}
PHOTOGRAPHS = {
    "photographs-efficientnet-right": "EfficientNet-Lite0, 1000 photographs, right labels",
    "photographs-efficientnet-person": "EfficientNet-Lite0, 1000 photographs, one person's labels (17 % wrong)",
    "photographs-efficientnet-worst": "EfficientNet-Lite0, 1000 photographs, the worst labels (41 % wrong)",
    "photographs-convnext-right": "ConvNeXt fine-tuned, 800 photographs, right labels",
    "photographs-convnext-person": "ConvNeXt fine-tuned, 800 photographs, one person's labels (12 % wrong)",
    "photographs-convnext-worst": "ConvNeXt fine-tuned, 800 photographs, the worst labels (28 % wrong)",
    "photographs-vit-right": "ViT fine-tuned, 800 photographs, right labels",
    "photographs-vit-person": "ViT fine-tuned, 800 photographs, one person's labels (12 % wrong)",
    "photographs-vit-worst": "ViT fine-tuned, 800 photographs, the worst labels (28 % wrong)",
    "photographs-lora-right": "ViT with LoRA, 800 photographs, right labels",
    "photographs-lora-person": "ViT with LoRA, 800 photographs, one person's labels (12 % wrong)",
    "photographs-lora-worst": "ViT with LoRA, 800 photographs, the worst labels (28 % wrong)",
    "photographs-resnet-right": "ResNet, 2000 photographs, right labels",
    "photographs-resnet-person": "ResNet, 2000 photographs, one person's labels (17 % wrong)",
    "photographs-resnet-worst": "ResNet, 2000 photographs, the worst labels (41 % wrong)",
    "photographs-resnet-worst-unaugmented": "ResNet, the same without augmentation",
    "photographs-resnet-all-right": "ResNet, 18000 photographs, right labels",
    "photographs-resnet-all-person": "ResNet, 18000 photographs, one person's labels (17 % wrong)",
    "photographs-resnet-all-worst": "ResNet, 18000 photographs, the worst labels (41 % wrong)",
    "photographs-vit-all-right": "ViT, 18000 photographs, right labels",
    "photographs-vit-all-person": "ViT, 18000 photographs, one person's labels (17 % wrong)",
    "photographs-vit-all-worst": "ViT, 18000 photographs, the worst labels (41 % wrong)",
}
# The settings and the columns in the README of the repository.
README = ["convnext-noisy", "vit-noisy"]
README += [f"photographs-{name}" for name in ("efficientnet-right", "efficientnet-person", "convnext-worst")]
README_COLUMNS = ["plain", "clean labels", "2x epochs", "early stopping", "SAM", "AACE", "norm layers"]
# The fixed option by which a method of these studies is known, with its title in the tables.
_TITLES = {
    "load_best_model_at_end=true": "early stopping",
    "num_train_epochs=4:": "AACE, half the epochs",
    "num_train_epochs": "2x epochs",
    "label_smoothing_factor": "label smoothing",
    "freeze_backbone=true": "head alone",
    "one_pass=true": "one pass",
    "perturb_modules=norm": "norm layers",
    "ascent_every=16": "AACE, every 16 steps",
    "ascent_every=32": "AACE, every 32 steps",
}


# ---- Runs ------------------------------------------------------------------


def runs_of(study: str, kind: str = "") -> pd.DataFrame:
    """Take the runs of a study whose methods begin with `kind`."""
    return RUNS[(RUNS["study"] == study) & RUNS["method"].str.startswith(kind)]


def _with_parts(name: str, *parts: str) -> pd.DataFrame:
    return RUNS[RUNS["study"].isin([name, *(f"{name}-{part}" for part in parts)])]


def _with_rho(runs: pd.DataFrame, *values: str) -> pd.DataFrame:
    return runs[runs["options"].map(lambda options: settings_of(options)["rho"] in values)]


def tuned(name: str) -> pd.DataFrame:
    """Plain training, SAM and AACE with the learning rate searched for each, and plain training for twice the epochs."""
    runs = runs_of(f"{name}-tuned")
    if name == "vit-clean-long":  # plain training is in another study
        runs = pd.concat([runs_of(name, "trainer"), runs])
    plain = runs["method"].iloc[0]
    chosen = summarize(runs[runs["method"] == plain], plain)["choice"][0]
    names = {}
    for method in runs["method"].unique():
        kind, _, options = method.partition(":")
        if method == plain:
            names[method] = "plain"
        elif kind == "trainer" and options.startswith((f"{chosen}:num_train_epochs", "num_train_epochs")):
            names[method] = "2x epochs"  # at the learning rate that plain training has
        elif kind in ("sam", "aace") and "|" in method:
            names[method] = kind.upper()
    runs = runs[runs["method"].isin(names)]
    return runs.assign(method=runs["method"].map(names))


def adaptive(name: str) -> pd.DataFrame:
    """AACE with `adaptive_perturbation` at a rho of 10, the learning rate searched."""
    return _with_rho(runs_of(f"{name}-adaptive", "aace"), "10").assign(method="adaptive")


def norm_layers(name: str) -> pd.DataFrame:
    """AACE on the normalization layers by a quarter of the batch, the learning rate and rho, 10 or 30, searched."""
    study = f"{name}-norm-rates" if f"{name}-norm-rates" in NAMES else f"{name}-norm"
    return _with_rho(runs_of(study), "10", "30").assign(method="norm layers")


def clean_labels(name: str) -> pd.DataFrame:
    """Plain training on the same images with clean labels, the learning rate searched."""
    return runs_of(f"{name.replace('noisier', 'noisy')}-clean-labels").assign(method="clean labels")


def asam(name: str) -> pd.DataFrame:
    """ASAM, the learning rate and rho searched."""
    study = f"{name}-asam" if f"{name}-asam" in NAMES else f"{name}-adaptive"
    return runs_of(study, "asam").assign(method="ASAM")


# ---- Tables ----------------------------------------------------------------


def percent(mean: float, error: float, sign: str = "") -> str:
    """Format a share in per cent, with its standard error unless a single seed has none."""
    return f"{_rounded(mean):{sign}.1f}" + ("" if math.isnan(error) else f" ± {_rounded(error):.1f}")


def _rounded(share: float) -> float:
    """In per cent, with a half rounded away from zero, whichever way the last bits of a sum fall."""
    return 100 * share + math.copysign(1e-9, share)


def markdown(table: pd.DataFrame) -> str:
    """Write a table of strings in Markdown."""
    rows = [[table.index.name or "", *table.columns], ["---"] * (len(table.columns) + 1)]
    rows += [[index, *row] for index, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Format a summary for reading."""
    gains = [
        "" if pd.isna(row.gain) else percent(row.gain, row.gain_standard_error, "+") for row in summary.itertuples()
    ]
    table = {
        "chosen": summary["choice"],
        "seeds": summary["seeds"],
        "accuracy": [percent(row.accuracy, row.standard_error) for row in summary.itertuples()],
        "gain": gains,
        "p": ["" if pd.isna(p) else f"{p:.2g}" for p in summary["p_value"]],
        "time": ["" if pd.isna(ratio) else f"{ratio:.2f}" for ratio in summary["ratio"]],
    }
    return pd.DataFrame(table).set_index(pd.Index(summary["method"].map(short_name), name="method"))


def study(name: str, baseline: str = "trainer") -> pd.DataFrame:
    """The comparison that `hf-aace compare` printed for a study."""
    return shown(summarize(runs_of(name), baseline))


COLUMNS = ["plain", "clean labels", "2x epochs", "SAM", "AACE", "adaptive", "norm layers"]


def gains(name: str) -> pd.DataFrame:
    """The summary of all methods in a setting, by their titles in the tables."""
    if name in PHOTOGRAPHS:
        runs, right = photograph_runs(name), f"{name.removesuffix('-worst').removesuffix('-person')}-right"
        if right in NAMES and right != name:
            clean = photograph_runs(right)
            runs = pd.concat([runs, clean[clean["method"] == "plain"].assign(method="clean labels")])
        summary = summarize(runs, "plain").set_index("method")
        return summary.assign(ratio=_times(name).reindex(summary.index))
    runs = pd.concat([tuned(name), adaptive(name), norm_layers(name), clean_labels(name), asam(name)])
    return summarize(runs, "plain").set_index("method")


def main_table(names=tuple(SETTINGS), columns=tuple(COLUMNS)) -> pd.DataFrame:
    """Accuracy of plain training at its best learning rate, and gains of the others over it; the best in bold."""
    table = []
    for name in names:
        rows = gains(name).reindex(columns)
        pairs = zip(rows["gain"], rows["gain_standard_error"], strict=True)
        cells = ["" if pd.isna(gain) else percent(gain, error, "+") for gain, error in pairs]
        cells[0] = percent(rows["accuracy"].iloc[0], rows["standard_error"].iloc[0])
        best = rows["gain"].fillna(0.0).where(rows["seeds"] > 0).drop("clean labels", errors="ignore").idxmax()
        place = list(columns).index(best)
        cells[place] = f"**{cells[place]}**"
        table.append([{**SETTINGS, **PHOTOGRAPHS}[name], f"`{name}`", *cells])
    return pd.DataFrame(table, columns=["model, training images, labels", "study", *columns]).set_index(
        "model, training images, labels"
    )


def over_sam() -> pd.DataFrame:
    """The gains of AACE's two variants over SAM on all weights, with p after Holm's correction for all comparisons."""
    rows = []
    for name in SETTINGS:
        for runs in (adaptive(name), norm_layers(name)):
            if len(runs):
                row = summarize(pd.concat([tuned(name), runs]), "SAM").iloc[-1]
                gain = percent(row["gain"], row["gain_standard_error"], "+")
                rows.append({"study": f"`{name}`", "method": row["method"], "over SAM": gain, "p": row["p_value"]})
    table = pd.DataFrame(rows).sort_values("p", ignore_index=True)
    table["p, corrected"] = holm(table["p"])
    for column in ("p", "p, corrected"):
        table[column] = table[column].map("{:.2g}".format)
    return table.set_index("study")


def with_asam() -> pd.DataFrame:
    """ASAM: its accuracy, the chosen setting, and its gains over the other methods."""
    table = {}
    for name in SETTINGS:
        runs = pd.concat([tuned(name), norm_layers(name), asam(name)])
        rows = summarize(runs, "ASAM").set_index("method")
        own = rows.loc["ASAM"]
        table[f"`{name}`"] = {"ASAM": percent(own["accuracy"], own["standard_error"]), "chosen": own["choice"]} | {
            f"over {other}": percent(-rows["gain"][other], rows["gain_standard_error"][other], "+")
            for other in ("plain", "SAM", "AACE", "norm layers")
            if other in rows.index
        }
    return pd.DataFrame(table).T.fillna("").rename_axis("study")


def sam_on_norm_layers() -> pd.DataFrame:
    """SAM on the normalization layers by the whole batch, beside AACE on them by a quarter."""
    table = {}
    for name in SETTINGS:
        sam = runs_of(f"{name}-norm-sam")
        if len(sam):
            ours, theirs = summarize(pd.concat([norm_layers(name), sam]), sam["method"].iloc[0]).to_dict("records")
            table[f"`{name}`"] = {
                "SAM": percent(theirs["accuracy"], theirs["standard_error"]),
                "chosen": theirs["choice"],
                "AACE, a quarter": percent(ours["accuracy"], ours["standard_error"]),
                "over SAM": percent(ours["gain"], ours["gain_standard_error"], "+"),
                "p": f"{ours['p_value']:.2g}",
            }
    return pd.DataFrame(table).T.rename_axis("study")


def at_the_rate_of_plain() -> pd.DataFrame:
    """Accuracy of what was run at the learning rate that is best for plain training, on the ViT; the first four seeds."""
    table = {}
    for name, rate in {"vit-noisy": "1e-4", "vit-noisier": "1e-4", "vit-noisy-all": "3e-4"}.items():
        runs = pd.concat([tuned(name), adaptive(name), norm_layers(name)])
        settings = runs["options"].map(settings_of)
        runs = runs[(settings.str["learning_rate"] == rate) & (runs["seed"] < 4) & (runs["method"] != "2x epochs")]
        labels = runs["method"] + settings[runs.index].map(
            lambda own: "" if own["rho"] == "0" else f", rho {own['rho']}"
        )
        table[f"`{name}`, {rate}"] = runs.groupby(labels, sort=False)["test_accuracy"].mean()
    return pd.DataFrame(table).map(lambda mean: "" if pd.isna(mean) else f"{_rounded(mean):.1f}").rename_axis("method")


def advice(of_norm_layers: bool) -> pd.DataFrame:
    """
    Compare the advice of `hf-aace find-rho` with its gain on the test images over plain training at the same learning rate, in the
    runs of other studies.
    """
    reports = json.loads((HERE / "find-rho.json").read_text(encoding="utf-8"))
    commands = studies.commands()
    settings = {name: _train_options(command) for name, command in commands.items()}
    in_full = [
        _comparable(settings.get(run.study, {}) | settings_of(run.options)) for run in RUNS.itertuples(index=False)
    ]
    table = {}
    for name, report in reports.items():
        if name.endswith("-norm") != of_norm_layers:
            continue
        row = table[f"`{name}`"] = {
            "best rho": f"{report['best']:g}",
            "gain (validation)": percent(report["gain"], report["gain_standard_error"], "+"),
            "recommended rho": f"{report['rho']:g}",
            "gain (test)": "",
        }
        if report["rho"] > 0:
            wanted = [_comparable(settings[name] | {"rho": rho}) for rho in ("0", f"{report['rho']:g}")]
            plain, own = (
                RUNS[[each == one for each in in_full]].drop_duplicates("seed").set_index("seed")["test_accuracy"]
                for one in wanted
            )
            difference = (own - plain).dropna()
            row["gain (test)"] = f"{percent(difference.mean(), difference.sem(), '+')} ({len(difference)} seeds)"
    return pd.DataFrame(table).T.rename_axis("study")


def _train_options(command: list[str]) -> dict[str, str]:
    """The options of `hf-aace train` in the command of a study."""
    options = dict(zip(command[2::2], command[3::2], strict=True))
    of_study = ("--output_dir", "--methods", "--first_seed", "--seeds", "--search_seeds", "--rho")
    return {name.removeprefix("--"): value for name, value in options.items() if name not in of_study}


def _comparable(options: dict[str, str]) -> dict[str, str]:
    """The options without those that make no difference."""
    options = {"learning_rate": "3e-3", **options}
    unused = ["perturb_modules", "ascent_fraction"] if options["rho"] == "0" else []
    unused += ["label_noise"] if options.get("label_noise") == "0" else []
    return {name: value for name, value in options.items() if name not in unused}


def beside_plain(studies: dict[str, str]) -> pd.DataFrame:
    """For each method the gain over plain training and the median ratio of their times, seed by seed; by title of the study."""
    table = {}
    for title, name in studies.items():
        by_seed = runs_of(name).set_index(["method", "seed"])
        base = by_seed.loc["trainer"]
        for method in by_seed.index.unique("method").drop("trainer"):
            own = by_seed.loc[method]
            difference = (own["test_accuracy"] - base["test_accuracy"]).dropna()
            row = table.setdefault(_ascent(method), {})
            row[title] = percent(difference.mean(), difference.sem(), "+")
            row[f"{title}: time"] = f"{(own['seconds'] / base['seconds']).median():.2f}"
    return pd.DataFrame(table).T.rename_axis("ascent")


def _ascent(method: str) -> str:
    """The options of AACE's ascent, without rho and the choice of the layers. Other methods keep their name."""
    if not method.startswith("aace:"):
        return method
    options = [part for part in method.split(":")[1:] if not part.startswith(("rho=", "perturb_modules="))]
    return ", ".join(options) or "whole batch"


def overfitting() -> pd.DataFrame:
    """A rho that follows the overfitting, beside plain training and the best fixed rho on the same layers."""
    table = {}
    for name in [*SETTINGS, "convnext-clean-all"]:
        own = runs_of(f"{name}-overfitting")
        if len(own):
            others = runs_of(name, "trainer") if name == "convnext-clean-all" else tuned(name)
            if name == "convnext-clean-all":
                others = others[others["method"].str.contains("|", regex=False)].assign(method="plain")
            rows = summarize(pd.concat([others, norm_layers(name), own]), own["method"].iloc[0]).set_index("method")
            row = rows.loc[own["method"].iloc[0]]
            table[f"`{name}`"] = {"accuracy": percent(row["accuracy"], row["standard_error"])} | {
                f"over {other}": percent(-rows["gain"][other], rows["gain_standard_error"][other], "+")
                for other in ("plain", "norm layers")
            }
    return pd.DataFrame(table).T.rename_axis("study")


CANDIDATES = {
    "whole batch": "the whole batch",
    "ascent_fraction=0.125": "the first eighth, that is, a random one",
    "ascent_fraction=0.125, perturb_every=2": "... on every second step (`perturb_every=2`)",
    "HighestCrossEntropy": "the eighth of the highest cross-entropy",
    "HighestLoss": "the eighth of the highest AACE loss",
    "HalfResolution": "images at half the resolution",
    "ascent_every=2": "the whole batch's gradient, reused for 2 steps",
    "ascent_every=4": "the whole batch's gradient, reused for 4 steps",
    "ascent_fraction=0.125, ascent_every=4": "an eighth's gradient, reused for 4 steps",
    "PreviousGradient, rho 0.1": "SAM's step (0.1) by the gradient of the step before",
    "PreviousGradient, rho 0.5": "SAM's step (0.5) by the gradient of the step before",
    "FromAverage, rho 0.5": "a step (0.5) away from the moving average of the weights",
    "TowardsAverage, rho 0.5": "a step (0.5) towards it",
}


def candidates() -> pd.DataFrame:
    """Cheap ascent steps on the noisy ConvNeXt, at a rho of 0.3 unless another is named."""
    return beside_plain({"ConvNeXt": "convnext-noisy-candidates"}).loc[list(CANDIDATES)].rename(CANDIDATES)


SMALL_ASCENTS = {"ConvNeXt": "convnext-noisy-small-ascents", "ViT": "vit-noisy-small-ascents"}


def ascents_beside_plain() -> pd.DataFrame:
    """Ascent passes over small parts of the batch, and one pass, which earlier code had: each setting that was run."""
    rows = []
    for title, name in SMALL_ASCENTS.items():
        runs = _with_parts(name, "more", "variants")
        runs = runs.drop_duplicates(["options", "seed"]).set_index("seed")
        plain = runs.loc[runs["method"] == "trainer", "test_accuracy"]
        for options, own in runs[runs["method"] != "trainer"].groupby("options", sort=False):
            settings, gain = settings_of(options), (own["test_accuracy"] - plain).dropna()
            kind = "one pass" if "one_pass" in settings else "norm"
            share, variant = float(settings.get("ascent_fraction", 1)), settings.get("variant")
            name_of_share = "all" if share == 1 else f"1/{round(1 / share)}"
            every = f", every {settings['ascent_every']} steps" if "ascent_every" in settings else ""
            rows.append(
                {
                    "model": title,
                    "ascent": f"{kind}, {name_of_share}{every}"
                    + (f", {variant.replace('_', ' ')}" if variant else ""),
                    "rho": settings["rho"],
                    "seeds": len(gain),
                    "validation": own["validation_accuracy"].mean(),
                    "gain": gain.mean(),
                    "error": gain.sem(),
                }
            )
    return pd.DataFrame(rows)


def small_ascents() -> pd.DataFrame:
    """The table of `ascents_beside_plain`."""
    table = ascents_beside_plain()
    table["gain"] = [percent(*pair, "+") for pair in zip(table["gain"], table.pop("error"), strict=True)]
    table["validation"] = table["validation"].map(lambda share: f"{_rounded(share):.1f}")
    return table.set_index("model")


def tail() -> pd.DataFrame:
    """SAM in the last part of the training only, the rate and rho searched, beside the methods that perturb all the time; eight seeds."""
    rows = []
    for name in ("convnext-noisy", "vit-noisy"):
        runs = pd.concat([tuned(name), norm_layers(name), runs_of(f"{name}-tail-variants")])
        table = shown(summarize(runs[runs["seed"] < 8], "plain")).drop(columns=["seeds", "time"])
        rows.append(table.reset_index().assign(study=f"`{name}`"))
    return pd.concat(rows).set_index("study")


def frontier() -> pd.DataFrame:
    """Cost, relative to plain training, and gain of each ascent at the chosen rho, which has the most seeds."""
    table = ascents_beside_plain().sort_values(["seeds", "validation"])
    table = table.groupby(["model", "ascent"], sort=False).tail(1).sort_index()
    costs = pd.read_csv(HERE / "cost-of-ascents.csv").rename(columns={"method": "ascent"})
    costs["model"] = costs["model"].str.removesuffix(", 64 pixels")
    return table.merge(costs, on=["model", "ascent"])


_OLD_SAM = "perturbation_loss=cross_entropy normalize_perturbation=true"  # as older runs have it
SINGLE_RATES = {  # right labels, and the learning rate that is best for plain training
    "convnext-clean": "3e-3",
    "convnext-clean-all": "3e-3",
    "finetune-convnext-clean": "3e-3",
    "vit-clean-long": "3e-4",
    "finetune-vit-lora-clean": "1e-2",
    "photographs-efficientnet-right": "1e-3",
    "photographs-convnext-right": "3e-3",
    "photographs-vit-right": "1e-3",
    "photographs-lora-right": "1e-3",
}


def single_settings() -> pd.DataFrame:
    """Settings as they are, with right labels and at the learning rate that is best for plain training: the gain over it."""
    wanted = {f"AACE, rho {rho}": {"rho": rho} for rho in ("0.003", "0.01", "0.03")}
    wanted["SAM, rho 0.05"] = {"method": "sam", "rho": "0.05"}
    wanted["norm layers, rho 10"] = {"perturb_modules": "norm", "ascent_fraction": "0.25", "rho": "10"}
    wanted["a sixteenth, rho 3"] = {"perturb_modules": "norm", "ascent_fraction": "0.0625", "rho": "3"}
    table = {}
    for name, rate in SINGLE_RATES.items():
        runs = RUNS[RUNS["study"].isin(studies.settings()[name]["studies"])]
        commands = {study: _train_options(studies.commands()[study]) for study in runs["study"].unique()}
        common = {**commands[name], "learning_rate": rate}
        written = runs["options"].str.replace("method=aace ", "").str.replace(_OLD_SAM, "method=sam")
        options = [
            _comparable({**common, **commands[study], **settings_of(own)})
            for study, own in zip(runs["study"], written, strict=True)
        ]

        def accuracy(own, runs=runs, options=options, common=common):
            chosen = [each == _comparable({**common, **own}) for each in options]
            return runs[chosen].drop_duplicates("seed").set_index("seed")["test_accuracy"]

        row = table[f"`{name}`"] = {"plain": f"{_rounded(accuracy({'rho': '0'}).mean()):.1f}"}
        for title, own in wanted.items():
            gain = (accuracy(own) - accuracy({"rho": "0"})).dropna()
            row[title] = f"{percent(gain.mean(), gain.sem(), '+')} ({len(gain)} seeds)" if len(gain) else ""
    return pd.DataFrame(table).T.rename_axis("study")


# ---- Photographs -----------------------------------------------------------


def photograph_runs(name: str) -> pd.DataFrame:
    """Take the runs of a study of photographs and of those that add to it, each method by its title."""
    runs = _with_parts(name, "more", "opponents", "cheap", "cheap-more", "variants", "half")
    return runs.assign(method=runs["method"].map(_title))


def _times(name: str) -> pd.Series:
    """The time of a method of a study of photographs, relative to plain training: of a step, measured in one run, times the steps."""
    model = name.split("-")[1]
    costs = pd.read_csv(HERE / "cost-of-photographs.csv").set_index(["model", "method"])["ratio"][model]
    norm = costs.get("norm, 1/4" if model in ("efficientnet", "resnet") else "norm, 1/16")
    times = {"early stopping": 1.0, "label smoothing": 1.0, "2x epochs": 2.0, "norm layers": norm}
    return pd.Series({**costs, **times, "AACE, half the epochs": costs["AACE"] / 2})


def _title(method: str) -> str:
    kind = method.partition(":")[0]
    otherwise = "plain" if kind == "trainer" else kind.upper()
    return next((title for option, title in _TITLES.items() if f":{option}" in method), otherwise)


def photographs() -> pd.DataFrame:
    """The comparisons with plain training on photographs, with p after Holm's correction for all of them."""
    rows = []
    for name in PHOTOGRAPHS:
        summary = gains(name).drop("clean labels", errors="ignore")
        table = shown(summary.reset_index())
        rows.append(table.reset_index().assign(study=f"`{name}`", p=summary["p_value"].to_numpy()))
    table = pd.concat(rows).set_index("study")
    table["p"] = ["" if pd.isna(p) else f"{p:.2g}" for p in holm(table["p"].reset_index(drop=True))]
    return table


def aace_over() -> pd.DataFrame:
    """Gains of AACE on all weights over the other methods on photographs, paired over the seeds, with p after Holm's correction."""
    opponents, rows = ("plain", "2x epochs", "early stopping", "SAM"), []
    for name in PHOTOGRAPHS:
        runs = photograph_runs(name)
        if "AACE" not in set(runs["method"]):
            continue
        summary = summarize(runs, "AACE").set_index("method")
        for opponent in opponents:
            if opponent in summary.index:
                gain, error, p_value = summary.loc[opponent, ["gain", "gain_standard_error", "p_value"]]
                rows.append((f"`{name}`", f"over {opponent}", -gain, error, p_value))
    table = pd.DataFrame(rows, columns=["study", "opponent", "gain", "error", "p"]).dropna()  # of no seed in common
    cells = zip(table["gain"], table["error"], holm(table["p"]), strict=True)
    table["cell"] = [f"{percent(gain, error, '+')} (p {p:.2g})" for gain, error, p in cells]
    table = table.set_index(["study", "opponent"])["cell"].unstack(sort=False).fillna("")
    return table[[f"over {opponent}" for opponent in opponents]]


def settings_of_efficientnet() -> pd.DataFrame:
    """Each setting that was run in fine-tuning EfficientNet, beside plain training at 1e-3."""
    measured, rows = ["validation_accuracy", "test_accuracy"], []
    for labels in ("right", "person", "worst"):
        names = studies.settings()[f"photographs-efficientnet-{labels}"]["studies"]
        runs = RUNS[RUNS["study"].isin(names)].set_index("seed")
        plain = runs.loc[runs["options"].isin(["rho=0", "rho=0 learning_rate=1e-3"]), measured]
        for options, own in runs.groupby("options", sort=False):
            gains = (own[measured] - plain).dropna()
            cells = [percent(gains[column].mean(), gains[column].sem(), "+") for column in measured]
            rows.append((labels, f"`{options}`", f"{gains.index.min()} to {gains.index.max()}", *cells))
    columns = ["labels", "setting", "seeds", "validation", "test"]
    return pd.DataFrame(rows, columns=columns).set_index("labels")


def holm(p_values: pd.Series) -> pd.Series:
    """Correct p-values for their number, by Holm's method. NaN stays."""
    ordered = p_values.dropna().sort_values()
    corrected = (ordered * list(range(len(ordered), 0, -1))).cummax().clip(upper=1)
    return corrected.reindex(p_values.index)


def worth() -> pd.DataFrame:
    """
    What else the models of the studies of photographs are worth, by `photographs.py measure`: means of plain training, and the
    differences of the others from it, paired over the seeds, in bold if p < 0.05 after Holm's correction for the whole table.
    """
    runs = pd.read_csv(HERE / "measures.csv").drop(columns="options")
    settings = {study: name for name, setting in studies.settings().items() for study in setting["studies"]}
    runs["method"], runs["study"] = runs["method"].map(_title), "`" + runs["study"].map(settings) + "`"
    runs = runs.melt(["study", "method", "seed"], var_name="measure", value_name="test_accuracy").dropna()
    runs = runs.assign(options="", validation_accuracy=math.nan, seconds=math.nan)
    compared = pd.concat(
        summarize(own, "plain").assign(study=study, measure=measure)
        for (study, measure), own in runs.groupby(["study", "measure"], sort=False)
    ).reset_index(drop=True)
    compared["significant"] = holm(compared["p_value"]) < 0.05
    compared["cell"] = [_difference(row) for row in compared.itertuples()]
    rows = compared.set_index(["study", "method", "seeds", "measure"])["cell"]
    return rows.unstack(sort=False).fillna("").reset_index(["method", "seeds"])


def _difference(row) -> str:
    """A cell of `worth`: the mean of plain training, or the difference from it."""
    mean, error, sign = row.gain, row.gain_standard_error, "+"
    if row.method == "plain":
        mean, error, sign = row.accuracy, row.standard_error, ""
    cell = f"{mean:{sign}.2f} ± {error:.2f}" if row.measure == "log loss" else percent(mean, error, sign)
    return f"**{cell}**" if row.significant else cell


CHEAP = {"ConvNeXt": "convnext-noisy-cheap", "ViT, 1e-3": "vit-noisy-1e-3-cheap", "ViT, 3e-4": "vit-noisy-cheap"}
CHEAP_NORM = {title: f"{name}-norm" for title, name in CHEAP.items()}
WHEN = {"ConvNeXt": "convnext-noisy-when", "ViT": "vit-noisy-when", "ViT, clean labels": "vit-clean-long-when"}


def published() -> dict[str, pd.DataFrame]:
    """All tables of README.md in this folder, by name."""
    return {
        "results": main_table(),
        "photographs": main_table(PHOTOGRAPHS, README_COLUMNS),
        "photographs, in full": photographs(),
        "AACE over the others": aace_over(),
        "settings of EfficientNet": settings_of_efficientnet(),
        "photographs, what else the models are worth": worth(),
        "over SAM": over_sam(),
        "ASAM": with_asam(),
        "SAM on the normalization layers": sam_on_norm_layers(),
        "variants": study("convnext-noisy-more").drop(columns="time"),
        "at the learning rate of plain training": at_the_rate_of_plain(),
        "single settings, clean labels": single_settings(),
        "find-rho, all weights": advice(of_norm_layers=False),
        "find-rho, normalization layers": advice(of_norm_layers=True),
        "overfitting": overfitting(),
        "candidates": candidates(),
        "small ascents": small_ascents(),
        "SAM in the last part of the training": tail(),
    }


if __name__ == "__main__":
    for name, table in {"README of the repository": main_table(README, README_COLUMNS), **published()}.items():
        print(f"\n{name}\n\n{markdown(table)}")
