#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# transformers 5.24.0 with torch 2.13.0 and accelerate 1.15.0: gradient accumulation over 4 micro-batches, epochs of 5 of them.
# Expected: each update has the gradient of the mean over its samples. All samples are alike here, so that its norm is always 1; and
#   a data set that has no length, a stream, trains like one that has.
# Seen: with a length the fifth micro-batch makes an update of its own, of norm 1. In a stream it makes none. Its gradient, already the
#   mean over its own window, stays where it is, and the first update of the next epoch, a mean over four, is added: norm 2. The
#   loss in the log is that of one window, so it does not show.
# Consequence: on a stream that ends, one update in each epoch has up to twice the gradient, unless `max_grad_norm` cuts it. Let
#   the number of micro-batches be a multiple of the accumulation steps, or let the stream begin again by itself and set `max_steps`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
"$work/venv/bin/python" - "$work/out" <<'PY'
import sys

import torch
import transformers
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

print("transformers", transformers.__version__, "torch", torch.__version__)
SAMPLE = {"x": torch.ones(()), "labels": torch.zeros(())}


class WithLength(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return SAMPLE


class Stream(IterableDataset):
    def __iter__(self):
        return iter([SAMPLE] * 20)


class Slope(torch.nn.Module):
    """The gradient of its loss is 1 for every sample, whatever the weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, labels, num_items_in_batch=None):
        losses = self.weight * x - labels
        return {"loss": losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch}


def gradient_norms(rows):
    arguments = TrainingArguments(
        sys.argv[1],
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(Slope(), arguments, train_dataset=rows)
    trainer.train()
    return [round(entry["grad_norm"], 4) for entry in trainer.state.log_history if "grad_norm" in entry]


seen = {type(rows).__name__: gradient_norms(rows) for rows in (WithLength(), Stream())}
for name, norms in seen.items():
    print(f"{name}: norms of the gradients of the updates {norms}")
if seen != {"WithLength": [1.0, 1.0, 1.0, 1.0], "Stream": [1.0, 2.0, 2.0, 2.0]}:
    raise SystemExit("Changed: other norms than stated.")
print("As stated: the end of each pass over the stream is added to the next update.")
PY
