#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# transformers 5.24.0 with torch 2.13.0: the gradients of a Reformer by `torch.autograd.grad`.
# Expected: those that `loss.backward()` gives, and no `.grad` is touched, as `autograd.grad` promises; or an error, as reentrant
#   activation checkpointing raises for the same reason.
# Seen: `autograd.grad(..., allow_unused=True)` returns None for every parameter of the layers (24 of 32), without an error. Their gradients
#   are added to `.grad`, since the reversible layers run `torch.autograd.backward` inside their own backward pass.
# Consequence: a gradient penalty, a meta-learner or a sharpness-aware ascent that takes gradients so sees the embeddings and the head
#   alone, and leaves gradients behind that the next `optimizer.step()` takes for those of its batch. `backward(inputs=...)`
#   leaves them there, too. Take the gradients by `loss.backward()`, with the old `.grad` set aside.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import ReformerConfig, ReformerForSequenceClassification

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = ReformerConfig(
    attn_layers=["local", "local"],
    hidden_size=16,
    feed_forward_size=16,
    num_attention_heads=2,
    attention_head_size=8,
    local_attn_chunk_length=4,
    axial_pos_embds=False,
    max_position_embeddings=16,
    vocab_size=50,
    num_labels=3,
    is_decoder=False,
    hidden_dropout_prob=0.0,
    local_attention_probs_dropout_prob=0.0,
)
model = ReformerForSequenceClassification(config).train()
names, parameters = zip(*model.named_parameters())
batch = {"input_ids": torch.randint(0, 50, (4, 16)), "labels": torch.tensor([0, 1, 2, 0])}


def with_gradient(tensors):
    return {name for name, tensor in zip(names, tensors) if tensor is not None}


model(**batch).loss.backward()
by_backward = [p.grad for p in parameters]
for p in parameters:
    p.grad = None
returned = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
left = [p.grad for p in parameters]
for p in parameters:
    p.grad = None
embeddings = {name: p for name, p in model.named_parameters() if "embeddings" in name}
model(**batch).loss.backward(inputs=list(embeddings.values()))
also_left = with_gradient(p.grad for p in parameters) - set(embeddings)

print(f"backward():      gradients of {len(with_gradient(by_backward))} of {len(names)} parameters")
print(f"autograd.grad(): {len(with_gradient(returned))} returned, {len(with_gradient(left))} left in `.grad`")
print(f"backward(inputs=the embeddings): {len(also_left)} others left in `.grad`")
layers = {name for name in names if ".layers." in name}
as_stated = (
    len(with_gradient(by_backward)) == 32
    and with_gradient(returned) == set(names) - layers
    and with_gradient(left) == layers
    and len(layers) == 24
    and also_left == layers
    and all(torch.allclose(one, other) for one, other in zip(left, by_backward) if one is not None)
)
if not as_stated:
    raise SystemExit("Changed: other gradients than stated.")
print("As stated: the gradients of the layers are not returned, but added to `.grad`.")
PY
