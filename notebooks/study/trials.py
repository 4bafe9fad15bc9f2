# SPDX-License-Identifier: Apache-2.0
"""
Trials of what might be in the library, most of which did not earn its place, and of the paper's claims over several seeds.

    python notebooks/study/trials.py mechanisms    # ways to be spared the choice of rho
    python notebooks/study/trials.py overfitting   # one more, in twelve settings (after `study.sh finetune-convnext-noisy`)
    python notebooks/study/trials.py candidates    # ascent steps cheaper than a part of the batch
    python notebooks/study/trials.py reuse         # the one of them that did: a gradient that several steps use
    python notebooks/study/trials.py norm          # perturbing the normalisation layers only
    python notebooks/study/trials.py when          # perturbing during a part of the training only
    python notebooks/study/trials.py claims        # what the paper says of gradients and directions

Each leaves a line for each run in `runs/trials/NAME.jsonl`, goes on where it was, and prints means with their standard errors;
`claims` also leaves its curves in `claims.csv`.
`--shard 0/2` and `--shard 1/2` make half of the runs each, for two processes.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Image
from transformers import Trainer, TrainerCallback, set_seed

from hf_aace import aace_loss, perturbed
from hf_aace.callbacks import PerturbationConsistencyCallback
from hf_aace.cli.train import train_parser
from hf_aace.perturbation import replayed_rng
from hf_aace.study.statistics import mean_and_error
from hf_aace.trainer import AACETrainer
from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.images import image_transform
from hf_aace.vision.metrics import compute_metrics_fn
from hf_aace.vision.models import load_model_and_processor


TUNING = (
    "--model_name_or_path runs/study/pretrained-convnext --dataset_name runs/study/digits-6-9 --augmentation none "
    "--num_train_epochs 40"
)
SETTINGS = {
    "ConvNeXt, noisy": "--label_noise 0.2 --train_size 400 --num_train_epochs 40",
    "ConvNeXt, clean": "--train_size 200 --num_train_epochs 60",
    "ViT, noisy": "--model_name_or_path vit-tiny-digits --learning_rate 1e-3 --label_noise 0.2 --train_size 600 "
    "--num_train_epochs 40",
    "ViT, noisy, 3e-4": "--model_name_or_path vit-tiny-digits --learning_rate 3e-4 --label_noise 0.2 --train_size 600 "
    "--num_train_epochs 80",
    "ViT, noisy, 1e-3": "--model_name_or_path vit-tiny-digits --learning_rate 1e-3 --label_noise 0.2 --train_size 600 "
    "--num_train_epochs 80",
    "ViT, clean, 3e-4": "--model_name_or_path vit-tiny-digits --learning_rate 3e-4 --train_size 300 --num_train_epochs 160",
    "ViT, clean": "--model_name_or_path vit-tiny-digits --learning_rate 1e-3 --train_size 300 --num_train_epochs 80",
    "ConvNeXt, 40 % wrong": "--label_noise 0.4 --train_size 400 --num_train_epochs 40",
    "ConvNeXt, all, noisy": "--label_noise 0.2 --num_train_epochs 30",
    "ConvNeXt, all, clean": "--num_train_epochs 20",
    "ConvNeXt, tuned, noisy": f"{TUNING} --train_size 100 --label_noise 0.2",
    "ConvNeXt, tuned, clean": f"{TUNING} --train_size 50",
    "ResNet, noisy": "--model_name_or_path resnet-tiny-digits --label_noise 0.2 --train_size 400 --num_train_epochs 40",
    "ViT, 40 % wrong": "--model_name_or_path vit-tiny-digits --label_noise 0.4 --train_size 600 --num_train_epochs 80",
    "ViT, all, noisy": "--model_name_or_path vit-tiny-digits --label_noise 0.2 --num_train_epochs 30",
}
SAM = "--perturbation_loss cross_entropy --normalize_perturbation true"


# ---- To be spared the choice of rho ----------------------------------------


class FollowLearningRate(TrainerCallback):
    """Lets `rho` fall with the learning rate."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.rho = args.rho

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        args.rho = max(self.rho * lr_scheduler.get_last_lr()[0] / args.learning_rate, 1e-9)


class FollowOverfitting(TrainerCallback):
    """
    Lets each evaluation take the share of `rho` that overfitting asks for: 80 times the gap between the accuracies on training
    and validation images, times the square of the error on the latter; averaged with what it was before, at most the whole,
    and in the first half of the training less.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.rho, self.share = args.rho, None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        training = [entry["clean_accuracy"] for entry in state.log_history if "clean_accuracy" in entry][-1]
        error = 1 - metrics["eval_accuracy"]
        share = 80 * max(0.0, training + error - 1) * error**2
        self.share = share if self.share is None else (self.share + share) / 2

    def on_step_begin(self, args, state, control, **kwargs):
        share = min(1.0, 2 * state.global_step / state.max_steps) * min(1.0, self.share or 0.0)
        # Not 0, at which there would be no ascent pass, and so no accuracy on training images.
        args.rho = max(self.rho * share, 1e-50)


class During(TrainerCallback):
    """Perturbs from one share of the training to another, as from 0.75 to 1, and trains plainly before and after."""

    def __init__(self, start, end):
        self.start, self.end = start, end

    def on_train_begin(self, args, state, control, **kwargs):
        self.rho = args.rho

    def on_step_begin(self, args, state, control, **kwargs):
        args.rho = self.rho if self.start <= state.global_step / state.max_steps < self.end else 0.0


class OnlyFitted(AACETrainer):
    """The ascent leaves out the samples that the model does not classify as their labels say."""

    def _ascent_loss(self, logits, labels):
        return super()._ascent_loss(logits, labels.masked_fill(logits.detach().argmax(1) != labels, -100))


class ByConfidence(AACETrainer):
    """The ascent weighs each sample by the probability that the model gives its label."""

    def _ascent_loss(self, logits, labels):
        confidence = logits.detach().softmax(1).gather(1, labels[:, None])[:, 0]
        return (confidence * aace_loss(logits, labels, reduction="none")).sum()


# ---- To make the ascent cheaper --------------------------------------------


class HighestLoss(AACETrainer):
    """The ascent takes the eighth of the batch with the highest AACE loss, which costs a forward pass over all of it."""

    def _losses(self, logits, labels):
        return aace_loss(logits, labels, reduction="none")

    def _ascent_samples(self, inputs):
        inputs, labels = super()._ascent_samples(inputs)
        with torch.no_grad(), replayed_rng(set()):
            losses = self._losses(self.model(**inputs).logits, labels)
        chosen = losses.topk(max(1, round(len(labels) / 8))).indices
        return {key: value[chosen] for key, value in inputs.items()}, labels[chosen]


class HighestCrossEntropy(HighestLoss):
    """The same, by cross-entropy."""

    def _losses(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="none")


class HalfResolution(AACETrainer):
    """The ascent sees the images at half their height and width."""

    def _ascent_samples(self, inputs):
        inputs, labels = super()._ascent_samples(inputs)
        return {**inputs, "pixel_values": F.avg_pool2d(inputs["pixel_values"], 2)}, labels


class _Kept(AACETrainer):
    """For perturbations that take no ascent pass of their own: then there is nothing to log of one."""

    def training_step(self, model, inputs, *args, **kwargs):
        with self.perturbed_weights(model, inputs):
            return Trainer.training_step(self, model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        Trainer.log(self, logs, *args, **kwargs)


class PreviousGradient(_Kept):
    """One pass: SAM's step by the gradient of the step before."""

    previous = None

    def perturbed_weights(self, model, inputs):
        model.train()
        parameters = self._perturbed_parameters()
        previous = self.previous or [torch.zeros_like(p) for p in parameters]
        return perturbed(parameters, previous, self.args.rho, normalize=True, maximize=True)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.previous = [p.grad.clone() for p in self._perturbed_parameters()]
        return loss


class TowardsAverage(_Kept):
    """One pass: a step of length `rho` towards the exponential average of the weights, where the loss is higher as a rule."""

    average, decay, towards = None, 0.9, True

    def perturbed_weights(self, model, inputs):
        model.train()
        parameters = self._perturbed_parameters()
        weights = [p.detach() for p in parameters]
        self.average = self.average or [w.clone() for w in weights]
        torch._foreach_lerp_(self.average, weights, 1 - self.decay)
        direction = torch._foreach_sub(self.average, weights)
        return perturbed(parameters, direction, self.args.rho, normalize=True, maximize=self.towards)


class FromAverage(TowardsAverage):
    """One pass: away from it."""

    towards = False


class TowardsAverage99(TowardsAverage):
    """Towards a slower average."""

    decay = 0.99


class FromAverage99(FromAverage):
    """Away from a slower average."""

    decay = 0.99


# ---- Runs ------------------------------------------------------------------


class Travel(TrainerCallback):
    """Notes at the end of each epoch how far the weights are from where they started, and how long their way was."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = self.last = self._weights(model)
        self.rows, self.path = [], 0.0

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        now = self._weights(model)
        self.path += float((now - self.last).norm())
        self.last = now
        self.rows.append({"distance": float((now - self.start).norm()), "path": self.path})

    def _weights(self, model):
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def mechanisms():
    for setting in ("ConvNeXt, noisy", "ConvNeXt, clean", "ViT, noisy", "ViT, clean"):
        for seed in range(4):
            yield setting, "rho 0.1 with the learning rate", AACETrainer, "--rho 0.1", seed, [FollowLearningRate()]
            yield setting, "rho 0.1 on fitted samples", OnlyFitted, "--rho 0.1", seed, []
            yield setting, "rho 0.3 by confidence", ByConfidence, "--rho 0.3", seed, []


def overfitting():
    step = "--perturb_modules norm --ascent_fraction 0.25 --rho 50 --eval_strategy epoch"
    for setting, rate, seeds in (  # the rates that validation images chose with it
        ("ConvNeXt, noisy", "1e-2", 16),
        ("ConvNeXt, 40 % wrong", "1e-3", 8),
        ("ConvNeXt, all, noisy", "3e-3", 8),
        ("ConvNeXt, clean", "1e-3", 8),
        ("ConvNeXt, all, clean", "3e-3", 8),
        ("ConvNeXt, tuned, noisy", "1e-3", 8),
        ("ConvNeXt, tuned, clean", "3e-3", 8),
        ("ResNet, noisy", "3e-3", 8),
        ("ViT, noisy, 3e-4", "3e-4", 16),
        ("ViT, 40 % wrong", "3e-4", 8),
        ("ViT, all, noisy", "1e-3", 8),
        ("ViT, clean, 3e-4", "3e-4", 8),
    ):
        for seed in range(seeds):
            options = f"{step} --learning_rate {rate}"
            yield setting, "rho by overfitting", AACETrainer, options, seed, [FollowOverfitting()]


def candidates():
    setting, eighth = "ConvNeXt, noisy", "--rho 0.3 --ascent_fraction 0.125"
    for seed in range(8):
        yield setting, "plain", AACETrainer, "--rho 0", seed, []
        yield setting, "whole batch", AACETrainer, "--rho 0.3", seed, []
        yield setting, "an eighth", AACETrainer, eighth, seed, []
        yield setting, "an eighth, every second step", AACETrainer, f"{eighth} --perturb_every 2", seed, []
        yield setting, "an eighth, reused for 4 steps", AACETrainer, f"{eighth} --ascent_every 4", seed, []
        for every in (2, 4):
            yield setting, f"reused for {every} steps", AACETrainer, f"--rho 0.3 --ascent_every {every}", seed, []
        for kind in (HighestLoss, HighestCrossEntropy, HalfResolution):
            yield setting, kind.__name__, kind, "--rho 0.3", seed, []
        if seed < 3:
            for rho in (0.1, 0.5):
                for kind in (PreviousGradient, TowardsAverage, FromAverage, TowardsAverage99, FromAverage99):
                    yield setting, f"{kind.__name__}, rho {rho}", kind, f"--rho {rho}", seed, []


def reuse():
    for setting, rho in {"ConvNeXt, noisy": 0.3, "ViT, noisy, 1e-3": 0.1, "ViT, noisy, 3e-4": 0.01}.items():
        for seed in range(8):
            yield setting, "plain", AACETrainer, "--rho 0", seed, []
            yield setting, "whole batch", AACETrainer, f"--rho {rho}", seed, []
            yield setting, "an eighth", AACETrainer, f"--rho {rho} --ascent_fraction 0.125", seed, []
            for every in (4, 8):
                yield (
                    setting,
                    f"reused for {every} steps",
                    AACETrainer,
                    f"--rho {rho} --ascent_every {every}",
                    seed,
                    [],
                )
            for name, fraction in {"a half": 0.5, "a quarter": 0.25}.items():
                options = f"--rho {rho} --ascent_fraction {fraction} --ascent_every 4"
                yield setting, f"{name}, reused for 4", AACETrainer, options, seed, []


def norm():
    for setting, rho in {"ConvNeXt, noisy": 30, "ViT, noisy, 1e-3": 10, "ViT, noisy, 3e-4": 10}.items():
        for seed in range(8):
            yield setting, "plain", AACETrainer, "--rho 0", seed, []
            for name, options in {
                "whole batch": "",
                "a quarter": "--ascent_fraction 0.25",
                "an eighth": "--ascent_fraction 0.125",
                "a half, reused for 4": "--ascent_fraction 0.5 --ascent_every 4",
            }.items():
                yield setting, name, AACETrainer, f"--perturb_modules norm --rho {rho} {options}", seed, []


def when():
    for setting, rho, sam in (
        ("ConvNeXt, noisy", 0.3, 0.5),
        ("ViT, noisy, 3e-4", 0.01, 0.01),
        ("ViT, clean, 3e-4", 0.01, 0.01),
    ):
        for seed in range(4):
            yield setting, "plain", AACETrainer, "--rho 0", seed, []
            for name, options in {"AACE": f"--rho {rho}", "SAM": f"{SAM} --rho {sam}"}.items():
                yield setting, name, AACETrainer, options, seed, []
                for start, end in ((0, 0.5), (0.25, 1), (0.5, 1), (0.75, 1)):
                    yield setting, f"{name} from {start} to {end}", AACETrainer, options, seed, [During(start, end)]


def claims():
    for seed in range(5):
        for setting in ("ConvNeXt, clean", "ViT, clean"):  # near convergence, which is what the paper speaks of
            for name, options in {
                "SAM": f"{SAM} --rho 0.1",
                "AACE": "--rho 0.03",
                "AACE, normalised": "--normalize_perturbation true --rho 0.1",
            }.items():
                yield setting, name, AACETrainer, options, seed, [PerturbationConsistencyCallback(), Travel()]


def train(setting, kind, options, seed, callbacks):
    """As `hf-aace train` does with these options, and returns the accuracies and, with callbacks, what was logged."""
    argv = (
        f"--eval_strategy no --save_strategy no --validation_size 0.2 {SETTINGS[setting]} --seed {seed} {options} "
        "--output_dir runs/trials/run --disable_tqdm true"
    ).split()
    model_args, data_args, _, training_args, *_ = train_parser(argv).parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    training_args.remove_unused_columns = False
    dataset = load_image_dataset(
        data_args.dataset_name,
        seed=seed,
        train_size=data_args.train_size,
        label_noise=data_args.label_noise,
        validation_size=data_args.validation_size,
    )
    set_seed(seed)
    model, processor = load_model_and_processor(
        model_args.model_name_or_path, dict(enumerate(dataset["train"].features["label"].names))
    )
    dataset = dataset.cast_column("image", Image(decode=False)).with_transform(image_transform(processor))
    trainer = kind(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        processing_class=processor,
        compute_metrics=compute_metrics_fn(["accuracy"]),
        callbacks=callbacks,
    )
    started = time.process_time()
    trainer.train()
    row = {
        "seconds": time.process_time() - started,
        "validation": trainer.evaluate()["eval_accuracy"],
        "test": trainer.evaluate(dataset["test"])["eval_accuracy"],
    }
    for callback in callbacks:
        if isinstance(callback, Travel):
            row |= {"travel": callback.rows, "log": [entry for entry in trainer.state.log_history if "loss" in entry]}
    return row


def write_curves(rows, path):
    """The claims' curves: for each epoch the means over the seeds, and their standard errors."""
    names = ["ascent_loss", "ascent_grad_norm", "perturbation_consistency", "path"]
    groups = {}
    for row in rows:
        epochs = [log | travel for log, travel in zip(row["log"], row["travel"], strict=True)]
        groups.setdefault((row["setting"], row["name"]), []).append(epochs)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "method", "epoch", "quantity", "mean", "standard_error"])
        for group, runs in groups.items():
            for epoch, same in enumerate(zip(*runs, strict=True), start=1):
                for name in names:
                    mean, error = mean_and_error([entry[name] for entry in same])
                    writer.writerow([*group, epoch, name, f"{mean:.4g}", f"{error:.2g}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "trials", choices=[f.__name__ for f in (mechanisms, overfitting, candidates, reuse, norm, when, claims)]
    )
    parser.add_argument("--shard", default="0/1", help="Which part of the runs to make, of how many.")
    options = parser.parse_args()
    shard, shards = map(int, options.shard.split("/"))
    path = Path("runs/trials") / f"{options.trials}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    torch.set_num_threads(max(1, torch.get_num_threads() // shards))

    def rows():
        return [json.loads(line) for line in path.read_text().splitlines()]

    for index, (setting, name, kind, settings, seed, callbacks) in enumerate(globals()[options.trials]()):
        key = {"setting": setting, "name": name, "seed": seed}
        if index % shards == shard and not any(key.items() <= row.items() for row in rows()):
            row = key | train(setting, kind, settings, seed, callbacks)
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
    if options.trials == "claims":
        write_curves(rows(), path.with_suffix(".csv"))
    groups = {}
    for row in rows():
        groups.setdefault((row["setting"], row["name"]), []).append(row)
    for (setting, name), group in groups.items():
        accuracy, error = mean_and_error([100 * row["test"] for row in group])
        seconds = sorted(row["seconds"] for row in group)[len(group) // 2]
        print(f"{setting:16} {name:32} {len(group)} seeds, test {accuracy:.1f} ± {error:.1f}, {seconds:.1f} s")


if __name__ == "__main__":
    main()
