# SPDX-License-Identifier: Apache-2.0
"""The cost of a training step: plain, sharpness-aware and by other implementations, measured in turns in one run."""

import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TimmWrapperConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..config import AACEArguments, AACEConfig
from ..perturbation import PROFILED
from ..trainer import AACETrainer


def default_methods(
    fractions: Sequence[float], ascent_every: Sequence[int] = (1,), perturb_modules: str | None = None
) -> dict[str, AACEArguments]:
    """
    Name the settings of plain training, AACE with the whole batch and with parts of it, and SAM.

    Args:
        fractions (`Sequence[float]`):
            Values of `ascent_fraction` below 1.
        ascent_every (`Sequence[int]`, *optional*, defaults to `(1,)`):
            Values of `ascent_every`, for the whole batch and for each part.
        perturb_modules (`str`, *optional*):
            If given, each AACE method comes once more with this value of `perturb_modules`.
    """
    methods = {"plain Trainer": AACEArguments(rho=0.0)}
    for modules, every, fraction in itertools.product(
        [None, perturb_modules] if perturb_modules else [None], ascent_every, [1.0, *fractions]
    ):
        name = "AACE"
        name += f", {modules} only" if modules else ""
        name += f", {fraction:.3g} of the batch" if fraction < 1 else ""
        name += f", every {every} steps" if every > 1 else ""
        methods[name] = AACEArguments(ascent_fraction=fraction, ascent_every=every, perturb_modules=modules)
    return methods | {"SAM": AACEArguments(method="sam")}


@dataclass
class Measurement:
    """
    The measurements of a method.

    Args:
        name (`str`):
            The method.
        seconds (`list[float]`):
            The time of a step in each round, optimizer included, data loading not; with `ascent_every` the mean over a step
            with an ascent pass and those that reuse its gradient.
        peak_bytes (`int`, *optional*):
            The most memory allocated at a time during a step, on top of what was allocated before it.
        perturbation_share (`float`, *optional*):
            The part of a step's time that its perturbation takes beside the two passes: norm, step, copy and restoring. `None`
            on a GPU and for other implementations.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    perturbation_share: float | None = None


def measure(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    args: AACEConfig,
    methods: dict[str, AACEArguments],
    *,
    rounds: int,
    warmup: int,
    peers: bool = False,
) -> list[Measurement]:
    """
    Train a model on one batch over and over, each round by every method in turn, so that a drift of the machine or of the model
    affects all of them alike.

    Args:
        model (`nn.Module`):
            The model. It is trained, by all methods one after the other.
        batch (`dict[str, torch.Tensor]`):
            The batch, on the CPU.
        args ([`AACEConfig`]):
            Optimizer, precision, compilation and device; `disable_tqdm` leaves out the progress bar. Batch size, number of
            steps and reporting are set here.
        methods (`dict[str, AACEArguments]`):
            The settings of each method by name; `rho=0` is plain training. The others are compared with the first.
        rounds (`int`):
            The number of times that each method is timed.
        warmup (`int`):
            The number of rounds before that.
        peers (`bool`, *optional*, defaults to `False`):
            Measure pytorch_optimizer's SAM too, in the loop that its documentation recommends.

    Returns:
        `list[Measurement]`: A measurement for each method, then one for each peer.
    """
    bar = tqdm(total=rounds + warmup + 1, desc="rounds", leave=False, disable=args.disable_tqdm)
    samples = [{name: values[i] for name, values in batch.items()} for i in range(len(batch["labels"]))]
    args = replace(
        args,
        per_device_train_batch_size=len(samples),
        max_steps=sum(settings.ascent_every for settings in methods.values()) * (warmup + rounds + 1),
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        **dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "no"),
    )
    trainer = AACETrainer(model, args, train_dataset=samples)
    trainer.remove_callback(PrinterCallback)
    stopwatch = _Stopwatch(trainer, methods, rounds, warmup, [_SamOfPytorchOptimizer()] if peers else [], bar)
    trainer.add_callback(stopwatch)
    with bar:
        trainer.train()
    return stopwatch.measurements


class _Stopwatch(TrainerCallback):
    """
    Give each step its method and time it. In each round every method has a turn: one step, or as many as share an ascent pass. A
    last round is profiled: memory, and the time of the perturbation.
    """

    def __init__(
        self, trainer: AACETrainer, methods: dict[str, AACEArguments], rounds: int, warmup: int, peers: list, bar: tqdm
    ):
        self._trainer, self._settings, self._peers, self._bar = trainer, list(methods.values()), peers, bar
        self._warmup, self._rounds = warmup, rounds
        self.measurements = [Measurement(name) for name in [*methods, *(peer.name for peer in peers)]]

        count = len(self._settings)
        # Each round begins with another method, as one may leave caches in a state that the next one feels.
        self._turns = ((i // count, (i + i // count) % count, i % count == count - 1) for i in itertools.count())
        self._remaining = 0  # steps of the present method

    def on_step_begin(self, args, state, control, **kwargs):
        if self._remaining == 0:
            self._round, self._index, self._is_last = next(self._turns)
            settings = self._settings[self._index]
            self._remaining = settings.ascent_every
            for option in fields(settings):
                setattr(args, option.name, getattr(settings, option.name))
            self._trainer.forget_ascent()  # the gradient of another method
            self._begin()
        self._start()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._stop()
        self._remaining -= 1
        if self._remaining > 0:
            return
        self._end(self._index, self._settings[self._index].ascent_every)
        if not self._is_last:
            return
        samples = [self._trainer.train_dataset[i] for i in range(args.train_batch_size)]
        inputs = {name: values.to(args.device) for name, values in self._trainer.data_collator(samples).items()}
        for index, peer in enumerate(self._peers, start=len(self._settings)):
            peer.prepare(model, args)
            self._begin()
            self._start()
            peer.step(self._trainer.model_wrapped, inputs)
            self._stop()
            self._end(index, 1)
        self._bar.update()

    def _begin(self):
        """Prepare for the steps of a method."""
        is_profiled = self._round == self._warmup + self._rounds
        self._seconds, self._profile = 0.0, _Profile(self._trainer.args.device) if is_profiled else None

    def _start(self):
        _synchronize(self._trainer.args.device)
        self._started = time.perf_counter()

    def _stop(self):
        _synchronize(self._trainer.args.device)
        self._seconds += time.perf_counter() - self._started

    def _end(self, index, steps):
        """Note what the steps of a method took."""
        measurement = self.measurements[index]
        if self._profile is not None:
            measurement.peak_bytes, perturbation_seconds = self._profile.stop()
            if perturbation_seconds is not None and index < len(self._settings):
                measurement.perturbation_share = perturbation_seconds / self._seconds
        elif self._round >= self._warmup:
            measurement.seconds.append(self._seconds / steps)


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
        """Make the optimizer at the first call: the model is on its device by then."""
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
    """Count memory, and on a CPU the time of perturbations, from when it is made until `stop`."""

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:  # the allocator of the CPU counts for the profiler only
            self._profiler = torch.profiler.profile(profile_memory=True)
            self._profiler.start()

    def stop(self) -> tuple[int, float | None]:
        """Return the most bytes allocated at a time, on top of those before, and the seconds of perturbations if known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before, None
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
        peak_bytes = max(itertools.accumulate((change for _, change in changes), initial=0))
        microseconds = [event["dur"] for event in events if event.get("name", "").startswith(PROFILED)]
        return peak_bytes, sum(microseconds) / 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(measurements: list[Measurement], batch_size: int) -> list[dict[str, Any]]:
    """
    Compute the numbers to report.

    Args:
        measurements (`list[Measurement]`): The measurements, that of plain training first.
        batch_size (`int`): Images in a step.

    Returns:
        `list[dict]`: For each method its `name`, the median `seconds` of a step, `images_per_second`, the `ratio` to plain
        training (median of the ratios in each round) with its quartiles, `peak_bytes`, `extra_peak_bytes` over plain, and the
        `perturbation_share`.
    """
    plain, rows = measurements[0], []
    for measurement in measurements:
        seconds = float(np.median(measurement.seconds))
        low, ratio, high = np.quantile(np.divide(measurement.seconds, plain.seconds), [0.25, 0.5, 0.75]).tolist()
        rows.append(
            {
                "name": measurement.name,
                "seconds": seconds,
                "images_per_second": batch_size / seconds,
                "ratio": ratio,
                "ratio_quartiles": [low, high],
                "peak_bytes": measurement.peak_bytes,
                "extra_peak_bytes": measurement.peak_bytes - plain.peak_bytes,
                "perturbation_share": measurement.perturbation_share,
            }
        )
    return rows


def random_batch(model: nn.Module, batch_size: int, image_size: int | None = None) -> dict[str, torch.Tensor]:
    """
    Make noise of the shape that an image classifier takes, with random labels.

    Args:
        model (`nn.Module`): The model, whose `config` has the number of classes and, unless it is 3, of channels.
        batch_size (`int`): Number of images.
        image_size (`int`, *optional*): Height and width in pixels. Defaults to those of the configuration.

    Returns:
        `dict[str, torch.Tensor]`: `pixel_values` of shape `(batch_size, channels, height, width)` and `labels` of shape
        `(batch_size,)`.

    Raises:
        `ValueError`: If neither the configuration nor the argument has the size of the images.
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
