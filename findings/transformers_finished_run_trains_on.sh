#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# transformers 5.24.0 with torch 2.13.0 and accelerate 1.15.0: the command of a finished training given again, with
#   `resume_from_checkpoint=True`, as a cluster does that puts a job back into its queue.
# Expected: the last checkpoint is at `max_steps`, so no step is left, and the weights are those of the checkpoint.
# Seen: where `max_steps` lies at the end of an epoch, it is so. Elsewhere each restart trains one step beyond `max_steps`, and saves a
#   checkpoint of it, from which the next restart goes on, up to the end of the epoch. The steps are as large as the schedule has
#   them there: with a constant learning rate the weights move on as before.
# Consequence: the weights depend on how often the job was restarted, and `save_total_limit` may delete the checkpoint of the training
#   that was asked for. Compare `global_step` and `max_steps` in the `trainer_state.json` of the checkpoint before you resume.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import torch
import transformers
from transformers import Trainer, TrainingArguments

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
ROWS = [{"x": torch.randn(4), "labels": torch.tensor(index % 3)} for index in range(12)]  # an epoch is three batches


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.linear(x), labels)}


def train(max_steps, resume):
    arguments = TrainingArguments(
        f"{sys.argv[1]}/{max_steps}",
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(Linear(), arguments, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.global_step, trainer.model.linear.weight.detach().clone()


seen = {}
for max_steps in (3, 4):
    runs = [train(max_steps, resume) for resume in (None, True, True)]
    moved = max(float((weight - runs[0][1]).abs().max()) for _, weight in runs)
    seen[max_steps] = [step for step, _ in runs]
    print(f"max_steps={max_steps}: step after the training and after each restart {seen[max_steps]}, a weight moved by {moved:.2f}")
    if (moved > 0.05) != (max_steps == 4):
        raise SystemExit("Changed: other weights than stated.")
if seen != {3: [3, 3, 3], 4: [4, 5, 6]}:
    raise SystemExit("Changed: other numbers of steps than stated.")
print("As stated: a finished training goes on if it ends within an epoch.")
PY
