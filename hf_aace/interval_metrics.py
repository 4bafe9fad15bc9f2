# SPDX-License-Identifier: Apache-2.0
"""The metrics of training, averaged over the logging interval and over the processes."""

import math

import torch
from accelerate.utils import reduce


class IntervalMetrics:
    """Sums scalars on the device. Reading them, for a log, waits for the device."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self._sums = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add one value, a scalar, of each metric. One that is not finite does not enter the average."""
        device = next(iter(values.values())).device
        stacked = torch.stack([value.detach().to(device, torch.float32) for value in values.values()])
        finite = torch.isfinite(stacked)
        total, count = self._sums.get(tuple(values), (0.0, 0))
        self._sums[tuple(values)] = (total + torch.where(finite, stacked, 0.0), count + finite.int())

    def pop(self) -> dict[str, float]:
        """
        Average what was added, over the steps since the last call and over the processes; `{}` if nothing was. Only finite
        values count.
        """
        if not self._sums:
            return {}
        names = [name for group in self._sums for name in group]
        totals = torch.cat([torch.stack((total, count.float())) for total, count in self._sums.values()], dim=1)
        self.reset()
        sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for name, total, count in zip(names, *reduce(totals, "sum").tolist(), strict=True):
            sums[name] += total  # a name may be in several groups: a callback returns it with others or alone
            counts[name] += count
        means = {name: total / counts[name] if counts[name] else math.nan for name, total in sums.items()}
        if "clean_loss" in means:  # some of the steps took an ascent pass
            means["sharpness"] = means.pop("perturbed_loss", math.nan) - means["clean_loss"]
        if "skipped_perturbations" in means:
            means["skipped_perturbations"] = round(sums["skipped_perturbations"])
        first = ["clean_loss", "clean_accuracy", "sharpness", "ascent_loss"]
        return {name: means[name] for name in first if name in means} | means
