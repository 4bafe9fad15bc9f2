#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# safetensors 0.8.0 with torch 2.13.0: tensors that torch conjugates or negates lazily.
# Expected: `save` and `load` give back equal tensors.
# Seen: torch does not compute `z.conj()`, it sets a bit; and the imaginary part of that, a real tensor, has a bit that says
#   "negative". safetensors writes the memory and neither bit: imaginary parts come back with the wrong sign. torch.save keeps them.
#   (Of more than one number an imaginary part is not contiguous, which safetensors refuses.)
# Consequence: complex weights (of spectral layers, learned filters) that were conjugated before they were saved are other weights
#   after loading, without an error. Save `tensor.resolve_conj().resolve_neg()`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import io

import safetensors
import torch
from safetensors.torch import load, save

print("torch", torch.__version__, "safetensors", safetensors.__version__)
torch.manual_seed(0)
z = torch.randn(4, dtype=torch.complex64)


def by_torch(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


cases = {
    "conjugate": z.conj(),
    "imaginary part of the conjugate": z[:1].conj().imag,
    "conjugate, resolved": z.conj().resolve_conj(),
    "imaginary part, resolved": z[:1].conj().imag.resolve_neg(),
}
equal = []
for name, tensor in cases.items():
    loaded = load(save({"weight": tensor}))["weight"]
    equal.append(torch.equal(loaded, tensor))
    print(f"{name}: {tensor[0].item():.3f} comes back as {loaded[0].item():.3f}")
    if not torch.equal(by_torch(tensor), tensor):
        raise SystemExit("Changed: torch.save does not keep the tensor either.")
if equal != [False, False, True, True] or not torch.equal(load(save({"weight": z.conj()}))["weight"], z):
    raise SystemExit(f"Changed: which of the four come back equal is now {equal}.")
print("As stated: conjugation and negation are lost.")
PY
