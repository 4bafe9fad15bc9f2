#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# pytorch_optimizer 4.1.0 with torch 2.13.0: LookSAM, used as its documentation shows.
# Expected: LookSAM (arXiv 2203.02714) is SAM at a lower price. It perturbs the weights on every k-th step only, and reuses a part of that
#   gradient on the others, which need one forward and backward pass each. With k=5, ten steps need 12 passes where SAM needs 20.
# Seen: 20 passes, as SAM. On steps without a perturbation `step(closure)` throws away the gradient that the caller has to compute
#   beforehand, and calls the closure again, at the same weights: both gradients are equal, bit for bit.
# Consequence: LookSAM here takes the time of SAM, and is the coarser approximation. To save what it promises, call `first_step` and
#   `second_step` yourself, with a second pass between them on every k-th step only.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 pytorch_optimizer==4.1.0
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from pytorch_optimizer import SAM, LookSAM
from torch import nn

print("torch", torch.__version__, "pytorch_optimizer", version("pytorch_optimizer"))


def passes_of_ten_steps(kind, **options):
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    inputs, labels = torch.randn(64, 8), torch.randint(3, (64,))
    optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, **options)
    gradients = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        gradients.append(model.weight.grad.clone())
        return loss

    for _ in range(10):  # as the documentation shows it
        closure()
        optimizer.step(closure)
    twice = sum(torch.equal(first, second) for first, second in zip(gradients[::2], gradients[1::2], strict=True))
    print(f"{kind.__name__} {options}: {len(gradients)} passes; in {twice} of 10 steps both give the same gradient")
    return len(gradients), twice


if passes_of_ten_steps(SAM) != (20, 0):
    raise SystemExit("Changed: SAM does not take two passes at different weights.")
if passes_of_ten_steps(LookSAM, k=5) != (20, 8):
    raise SystemExit("Changed: LookSAM does not take as many passes as SAM.")
print("As stated: LookSAM takes as many passes as SAM, eight of twenty for nothing.")
PY
