#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# accelerate 1.15.0 with torch 2.13.0, two processes on the CPU.
# Expected: `Accelerator.prepare` shares the samples of a DataLoader among the processes, whatever random sampler it has: an epoch
#   sees each sample once. `use_seedable_sampler=True`, which Transformers' Trainer sets, makes that reproducible on top.
# Seen: with `use_seedable_sampler=True` only `RandomSampler` is brought into step. The generator of every other sampler
#   (`SubsetRandomSampler`, `WeightedRandomSampler`) is left alone; each process draws an order of its own and takes every other
#   batch of it. With `use_seedable_sampler=False`, which sounds less safe, all samplers are in step.
# Consequence: two processes with the same seed, of which one has drawn one number more (it augmented once more, say), train on some
#   samples twice and on others never, without a word.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0

cat > "$work/run.py" <<'PY'
import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

samplers = {
    "RandomSampler": lambda: RandomSampler(range(64)),
    "SubsetRandomSampler": lambda: SubsetRandomSampler(range(64)),
    "WeightedRandomSampler": lambda: WeightedRandomSampler([1.0] * 64, 64, replacement=False),
}
seen = {}
for seedable in (True, False):
    options = DataLoaderConfiguration(use_seedable_sampler=seedable)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=options)
    if seedable and accelerator.is_main_process:
        print("torch", torch.__version__, "accelerate", accelerate.__version__)
    for name, make in samplers.items():
        torch.manual_seed(0)
        torch.rand(accelerator.process_index)  # the second process has drawn one number more
        loader = accelerator.prepare(DataLoader(range(64), batch_size=8, sampler=make()))
        mine = torch.cat(list(loader))
        parts = [torch.zeros_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine)
        seen[name, seedable] = len(torch.cat(parts).unique())
        if accelerator.is_main_process:
            print(f"{name}, use_seedable_sampler={seedable}: an epoch saw {seen[name, seedable]} of 64 samples")
dist.destroy_process_group()
wrong = {case for case, count in seen.items() if count < 64}
if wrong != {("SubsetRandomSampler", True), ("WeightedRandomSampler", True)}:
    raise SystemExit(f"Changed: samples are missing for {sorted(wrong)}.")
PY
"$work/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$work/run.py" 2> "$work/errors" ||
    { cat "$work/errors"; exit 1; }
echo "As stated: with use_seedable_sampler=True each process draws an order of its own, unless the sampler is a RandomSampler."
