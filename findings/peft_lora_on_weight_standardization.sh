#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# peft 0.21.2 with transformers 5.23.0 and torch 2.13.0: LoRA on the convolutions of BiT, which standardize their weights.
# Expected: LoRA adds `B A x` to what a layer gives: ten times the `B`, ten times the change; and `merge_and_unload` gives a model
#   with the same outputs.
# Seen: peft makes both convolutions of an adapter of the class of the layer that it adapts. That of BiT standardizes its weights
#   at each call, those of the adapter, too: the change hardly depends on the size of `B`, and jumps from nothing (`B` is 0 at
#   first) to its full size with the first step of training. Merging adds the raw product to weights that are standardized
#   afterwards, and gives another model. No warning comes.
# Consequence: a small learning rate does not make a small first step, and the merged model, which is what gets deployed, is not
#   the one that was evaluated.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
"$work/venv/bin/python" -W ignore - <<'PY'
import copy

import peft
import torch
import transformers
from transformers import BitConfig, BitForImageClassification, ResNetConfig, ResNetForImageClassification

print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
torch.manual_seed(0)
sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 3}
images = torch.randn(4, 3, 64, 64)


@torch.no_grad()
def measure(model, targets):
    """Give the change of the logits by a `B` of size 1e-3 and one of 1e-2, and that which merging makes, relative to the latter."""
    plain = model.eval()(images).logits
    changes = []
    for size in (1e-3, 1e-2):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=targets)).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=size)
        logits = adapted(images).logits
        changes.append((logits - plain).abs().mean().item())
    by_merging = (adapted.merge_and_unload()(images).logits - logits).abs().mean().item()
    return *changes, by_merging / changes[-1]


resnet = measure(ResNetForImageClassification(ResNetConfig(**sizes)), ["convolution"])
bit = measure(BitForImageClassification(BitConfig(num_groups=2, **sizes)), ["conv1", "conv2", "conv3"])
for name, (small, large, by_merging) in {"ResNet": resnet, "BiT": bit}.items():
    ratio = large / small
    print(f"{name}: ten times the B changes the logits {ratio:.2f} times as much; merging takes back {by_merging:.1%} of it")
if not (resnet[1] > 5 * resnet[0] and resnet[2] < 0.01):
    raise SystemExit("Changed: LoRA on plain convolutions is not proportional to B, or not merged exactly.")
if not (bit[1] < 2 * bit[0] and bit[2] > 0.5):
    raise SystemExit("Changed: LoRA on the convolutions of BiT does not behave as stated.")
print("As stated: the adapters of BiT are standardized as well, and merging gives another model.")
PY
