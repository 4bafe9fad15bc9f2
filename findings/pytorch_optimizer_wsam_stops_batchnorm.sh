#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# pytorch_optimizer 4.1.0 with torch 2.13.0: a model with BatchNorm that was trained with WSAM, and then with another optimizer.
# Expected: WSAM keeps the second of its two passes from updating the running statistics, and leaves the model as it found it, as GSAM
#   of the same package does.
# Seen: WSAM sets the momentum of each BatchNorm layer to 0 for its second pass, and back only when its next step begins. After the last
#   step it stays 0. Whatever trains the model next never updates the running statistics: here the inputs have a mean of 5, and after
#   200 steps of SGD the running mean is still the one that WSAM left.
# Consequence: a second stage of training (on other data, for example) has a falling loss, and is evaluated with the statistics of the
#   first, without a word. Set `momentum` of the layers again after WSAM.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 pytorch_optimizer==4.1.0
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from pytorch_optimizer import GSAM, WSAM, ProportionScheduler
from torch import nn

print("torch", torch.__version__, "pytorch_optimizer", version("pytorch_optimizer"))
loss_of = nn.CrossEntropyLoss()


def after_two_stages(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    labels = torch.randint(3, (64,))
    first, second = torch.randn(64, 8), 5 + torch.randn(64, 8)
    if kind == "WSAM":
        optimizer = WSAM(model, model.parameters(), torch.optim.SGD, lr=0.01)
    else:
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        schedule = ProportionScheduler(torch.optim.lr_scheduler.ConstantLR(base, 1.0), 0.01, 0.01, 0.05, 0.05)
        optimizer = GSAM(model.parameters(), base, model, schedule)
    for _ in range(5):
        if kind == "WSAM":

            def closure():
                optimizer.zero_grad()
                loss = loss_of(model(first), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
        else:
            optimizer.set_closure(loss_of, first, labels)
            optimizer.step()
    before = model[1].running_mean.clone()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(200):
        sgd.zero_grad()
        loss = loss_of(model(second), labels)
        loss.backward()
        sgd.step()
    evaluated = loss_of(model.eval()(second), labels)
    moved = not torch.equal(before, model[1].running_mean)
    print(
        f"{kind}: momentum {model[1].momentum}, the running mean {'moved' if moved else 'did not move'} in the second stage, whose "
        f"loss is {loss.item():.2f} in training mode, {evaluated.item():.2f} in evaluation mode"
    )
    return model[1].momentum, moved


if after_two_stages("GSAM") != (0.1, True):
    raise SystemExit("Changed: GSAM does not leave BatchNorm as it was.")
if after_two_stages("WSAM") != (0, False):
    raise SystemExit("Changed: WSAM leaves BatchNorm as it was.")
print("As stated: after WSAM the running statistics stand still.")
PY
