#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# loss_landscapes 3.0.6 with torch 2.13.0: the points at which it evaluates a model, a linear layer of 220 weights.
# Expected: `random_line(..., distance=d)` goes from the model to a distance of d (whatever its unit), as its documentation says, so that
#   ten times the distance is a line ten times as long. `random_plane` evaluates a grid, all of whose rows begin alike.
# Seen: the line ends at the norm of the weights divided by d. Ten times the distance is a tenth of the line. On the plane every second row
#   is shifted by one step along itself: rows are walked to and fro, and each point is evaluated after a step in the direction of the walk.
# Consequence: who doubles `distance` to see whether a minimum is wide sees half as far, and takes it for twice as wide. In the picture of a
#   plane a smooth bowl has the teeth of a saw.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy loss_landscapes==3.0.6
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import numpy as np
import torch
from loss_landscapes import random_line, random_plane
from loss_landscapes.metrics import Metric
from torch import nn

print("torch", torch.__version__, "loss_landscapes", version("loss_landscapes"))


class Offset(Metric):
    """Where the model stands, from where it stood at first."""

    def __init__(self, model):
        self.start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def __call__(self, wrapper):
        here = torch.cat([parameter.detach().flatten() for parameter in wrapper.get_module_parameters()])
        return (here - self.start).numpy()


torch.manual_seed(0)
model = nn.Linear(21, 10).double()
offset = Offset(model)
norm = offset.start.norm().item()
print(f"norm of the weights: {norm:.3f}")
for distance in (0.1, 1, 10):
    end = np.linalg.norm(random_line(model, offset, distance, steps=10, deepcopy_model=True)[-1])
    print(f"random_line(distance={distance}) ends {end:.3f} from the model")
    if not np.isclose(end, norm / distance):
        raise SystemExit("Changed: a line is not as long as the norm divided by the distance.")

grid = random_plane(model, offset, distance=1, steps=4, deepcopy_model=True)
along_rows, along_columns = grid[0, 1] - grid[0, 0], (grid[2, 0] - grid[0, 0]) / 2
axes = np.stack([along_rows, along_columns], axis=1)
for number, row in enumerate(grid):
    steps = np.linalg.lstsq(axes, row.T, rcond=None)[0].T
    print(f"row {number}, in steps from the model:", "  ".join(f"({a:+.0f}, {b:+.0f})" for a, b in steps))
    first, inner = (-1, 1) if number % 2 == 0 else (-2, 1)
    if not np.allclose(steps, [(first + inner * each, number - 2) for each in range(4)], atol=1e-6):
        raise SystemExit("Changed: every second row of a plane is not shifted by one step.")
print("As stated: distance divides, and every second row is shifted.")
PY
