# SPDX-License-Identifier: Apache-2.0
"""What a step costs: plain training, sharpness-aware training and other implementations of it, measured in turns in one run."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TimmWrapperConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..config import AACEArguments, AACEConfig
from ..perturbation import PROFILED
from ..trainer import AACETrainer


@dataclass
class Method:
    """
    A way to make training steps.

    Args:
        name (`str`):
            What the tables call it.
        settings (`AACEArguments`):
            The settings of the steps; `rho=0` is plain training.
    """

    name: str
    settings: AACEArguments


PLAIN = Method("plain Trainer", AACEArguments(rho=0.0))


def default_methods(
    fractions: Sequence[float], ascent_every: Sequence[int] = (1,), perturb_modules: str | None = None
) -> list[Method]:
    """
    Plain training, SAM, and AACE with the whole batch and with parts of it.

    Args:
        fractions (`Sequence[float]`):
            Values of `ascent_fraction` below 1.
        ascent_every (`Sequence[int]`, *optional*, defaults to `(1,)`):
            Values of `ascent_every`, for the whole batch and for each part.
        perturb_modules (`str`, *optional*):
            Each AACE method once more, with only the parameters perturbed that this regular expression matches.
    """
    sam = AACEArguments(rho=0.05, perturbation_loss="cross_entropy", normalize_perturbation=True)
    aace = [
        Method(
            "AACE"
            + (f", {pattern} only" if pattern else "")
            + (f", {fraction:.3g} of the batch" if fraction < 1 else "")
            + (f", every {every} steps" if every > 1 else ""),
            AACEArguments(ascent_fraction=fraction, ascent_every=every, perturb_modules=pattern),
        )
        for pattern in ([None, perturb_modules] if perturb_modules else [None])
        for every in ascent_every
        for fraction in [1.0, *fractions]
    ]
    return [PLAIN, *aace, Method("SAM", sam)]


@dataclass
class Measurement:
    """
    What was measured of a method.

    Args:
        name (`str`): The method.
        seconds (`list[float]`):
            The time of a step in each round, optimizer included, data loading not; with `ascent_every` the mean over a step
            with an ascent pass and those that reuse its gradient.
        ratios (`list[float]`): Each of them over the plain step of the same round.
        peak_bytes (`int`, *optional*):
            The most memory that was allocated at a time in the course of a step, on top of what was allocated before it.
        perturbation_share (`float`, *optional*):
            The part of a step's time that its perturbation takes beside the two passes: norm, step, copy and restoring. Not
            known on a GPU, nor of the peers.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    perturbation_share: float | None = None


def measure(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    args: AACEConfig,
    methods: list[Method],
    *,
    rounds: int,
    warmup: int,
    peers: bool = False,
) -> list[Measurement]:
    """
    Trains `model` on one batch over and over, each round by every method in turn, so that whatever drifts, in the machine
    or in the model, hits all of them alike.

    Args:
        model (`nn.Module`):
            The model. It is trained, by all methods one after the other.
        batch (`dict[str, torch.Tensor]`):
            The batch, on the CPU.
        args ([`AACEConfig`]):
            Optimizer, precision, compilation and device; `disable_tqdm` leaves out the progress bar. Batch size, number of
            steps and reporting are set here.
        methods (`list[Method]`):
            The methods; the first of them is the one that the others are compared with.
        rounds (`int`):
            How often each method is timed.
        warmup (`int`):
            Rounds before that.
        peers (`bool`, *optional*, defaults to `False`):
            Whether to measure pytorch_optimizer's SAM too, in the loop that its documentation recommends.

    Returns:
        `list[Measurement]`: A measurement for each method, then one for each peer.
    """
    show_progress = not args.disable_tqdm
    samples = [{name: values[i] for name, values in batch.items()} for i in range(len(batch["labels"]))]
    args = replace(
        args,
        per_device_train_batch_size=len(samples),
        max_steps=sum(method.settings.ascent_every for method in methods) * (warmup + rounds + 1),
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
    )
    trainer = AACETrainer(model, args, train_dataset=samples)
    trainer.remove_callback(PrinterCallback)
    stopwatch = _Stopwatch(
        trainer, methods, rounds, warmup, [_SamOfPytorchOptimizer()] if peers else [], show_progress
    )
    trainer.add_callback(stopwatch)
    trainer.train()
    return stopwatch.measurements


class _Stopwatch(TrainerCallback):
    """
    Gives each step its method, and times it: in each round one step by each method, or as many as share an ascent pass. A
    last round is profiled: memory, and what the perturbation takes.
    """

    def __init__(
        self,
        trainer: AACETrainer,
        methods: list[Method],
        rounds: int,
        warmup: int,
        peers: list["_SamOfPytorchOptimizer"],
        show_progress: bool,
    ):
        self._trainer, self._methods, self._peers = trainer, methods, peers
        self._rounds, self._warmup = rounds, warmup
        self.measurements = [Measurement(method.name) for method in [*methods, *peers]]
        self._bar = tqdm(total=rounds + warmup + 1, desc="rounds", leave=False, disable=not show_progress)

    def on_train_begin(self, args, state, control, **kwargs):
        self._turn = -1
        self._waiting = []  # the methods that still have a turn in this round, with how many steps
        self._remaining = 0  # steps of the present method

    def on_step_begin(self, args, state, control, **kwargs):
        if self._remaining == 0:
            if not self._waiting:
                self._turn += 1
                indices = range(len(self._methods))
                # From another one in each round, as a method may leave caches in a state that the next one feels.
                self._waiting = [(index + self._turn) % len(self._methods) for index in indices]
            self._index = self._waiting.pop(0)
            settings = self._methods[self._index].settings
            self._remaining = settings.ascent_every
            for name, value in vars(settings).items():
                setattr(args, name, value)
            self._trainer.forget_ascent()  # the gradient of another method
            self._begin()
        self._start()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._stop()
        self._remaining -= 1
        if self._remaining > 0:
            return
        self._end(self._index, self._methods[self._index].settings.ascent_every)
        if self._waiting:
            return
        inputs = self._trainer._prepare_inputs(self._batch(args))
        for index, peer in enumerate(self._peers, start=len(self._methods)):
            peer.prepare(model, args)
            self._begin()
            self._start()
            peer.step(self._trainer.model_wrapped, inputs)
            self._stop()
            self._end(index, 1)
        if self._warmup <= self._turn < self._warmup + self._rounds:
            plain = self.measurements[0].seconds[-1]
            for measurement in self.measurements:
                measurement.ratios.append(measurement.seconds[-1] / plain)
        self._bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()

    def _batch(self, args):
        return self._trainer.data_collator([self._trainer.train_dataset[i] for i in range(args.train_batch_size)])

    def _begin(self):
        """Before the steps of a method."""
        self._seconds = 0.0
        self._profile = _Profile(self._trainer.args.device) if self._turn == self._warmup + self._rounds else None
        if self._profile is not None:
            self._profile.__enter__()

    def _start(self):
        _synchronize(self._trainer.args.device)
        self._started = time.perf_counter()

    def _stop(self):
        _synchronize(self._trainer.args.device)
        self._seconds += time.perf_counter() - self._started

    def _end(self, index, steps):
        """After the steps of a method."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self.measurements[index].peak_bytes = self._profile.peak_bytes
            if self._profile.perturbation_seconds is not None and index < len(self._methods):
                self.measurements[index].perturbation_share = self._profile.perturbation_seconds / self._seconds
        elif self._turn >= self._warmup:
            self.measurements[index].seconds.append(self._seconds / steps)


class _SamOfPytorchOptimizer:
    """The two passes by hand that the documentation of pytorch_optimizer recommends, with AdamW below."""

    name = "SAM of pytorch_optimizer"

    def __init__(self):
        try:
            from pytorch_optimizer import SAM
        except ImportError as error:
            raise ImportError("To measure peers too, install them: `pip install pytorch-optimizer`.") from error
        self._make_optimizer, self._optimizer = SAM, None

    def prepare(self, model: nn.Module, args: AACEConfig) -> None:
        """Makes the optimizer, at the first call: the model is on its device by then."""
        if self._optimizer is None:
            settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
            self._optimizer = self._make_optimizer(model.parameters(), torch.optim.AdamW, rho=0.05, **settings)
            self._max_grad_norm = args.max_grad_norm

    def step(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        model(**inputs).loss.backward()
        self._optimizer.first_step(zero_grad=True)
        model(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), self._max_grad_norm)
        self._optimizer.second_step(zero_grad=True)


class _Profile:
    """
    Context manager: the most bytes allocated at a time inside, on top of those on entering; and on a CPU the time that
    perturbations took.
    """

    peak_bytes: int | None = None
    perturbation_seconds: float | None = None

    def __init__(self, device: torch.device):
        self._device = device

    def __enter__(self):
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:  # the allocator of the CPU counts for the profiler only
            self._profiler = torch.profiler.profile(profile_memory=True)
            self._profiler.__enter__()
        return self

    def __exit__(self, *exception):
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._profiler.__exit__(*exception)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
        self.peak_bytes = max(itertools.accumulate((change for _, change in changes), initial=0))
        microseconds = [event["dur"] for event in events if event.get("name", "").startswith(PROFILED)]
        self.perturbation_seconds = sum(microseconds) / 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(measurements: list[Measurement], batch_size: int) -> list[dict[str, Any]]:
    """
    The numbers to report.

    Args:
        measurements (`list[Measurement]`): The measurements, that of plain training first.
        batch_size (`int`): Images in a step.

    Returns:
        `list[dict]`: For each method its `name`, the median `seconds` of a step, `images_per_second`, the `ratio` to plain
        training (median of the ratios in each round) with its quartiles, `peak_bytes`, `extra_peak_bytes` over plain, and the
        `perturbation_share`.
    """
    rows = []
    for measurement in measurements:
        seconds = statistics.median(measurement.seconds)
        low, ratio, high = statistics.quantiles(measurement.ratios, n=4, method="inclusive")
        rows.append(
            {
                "name": measurement.name,
                "seconds": seconds,
                "images_per_second": batch_size / seconds,
                "ratio": ratio,
                "ratio_quartiles": [low, high],
                "peak_bytes": measurement.peak_bytes,
                "extra_peak_bytes": measurement.peak_bytes - measurements[0].peak_bytes,
                "perturbation_share": measurement.perturbation_share,
            }
        )
    return rows


def random_batch(model: nn.Module, batch_size: int, image_size: int | None = None) -> dict[str, torch.Tensor]:
    """
    Noise of the shape that an image classifier takes, with random labels.

    Args:
        model (`nn.Module`): The model, whose `config` says the number of classes and, unless it is 3, of channels.
        batch_size (`int`): Number of images.
        image_size (`int`, *optional*): Height and width in pixels. Defaults to what the configuration says.

    Raises:
        `ValueError`: If neither the configuration nor the argument says how large the images are.
    """
    config = model.config
    channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    if isinstance(config, TimmWrapperConfig) and config.pretrained_cfg is not None:
        channels, *size = config.pretrained_cfg["input_size"]
    size = size if image_size is None else image_size
    if size is None:
        raise ValueError(f"The configuration of {type(model).__name__} has no `image_size`: say it by `--image_size`.")
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(batch_size, channels, height, width, generator=generator),
        "labels": torch.randint(config.num_labels, (batch_size,), generator=generator),
    }
