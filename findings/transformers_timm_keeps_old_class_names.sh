#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# transformers 5.24.0: the configuration of a timm model that was fine-tuned on cats and dogs, and then on flowers.
# Expected: as for every model of Transformers, the saved configuration names the classes of the last training.
# Seen: a timm configuration is written with `label_names` in place of `id2label`. One that was read from such a file keeps that list as
#   an attribute beside the new `id2label`, and writes the old list again. In memory the classes are flowers. Loaded from the file
#   two flowers are `cat` and `dog`, and three are `LABEL_0`, `LABEL_1` and `LABEL_2`.
# Consequence: whoever loads the model reads wrong class names or none, without a warning. Delete `model.config.label_names` first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import transformers
from transformers import TimmWrapperConfig, ViTConfig

print("transformers", transformers.__version__)
folder = Path(sys.argv[1])
pets = dict(enumerate(["cat", "dog"]))


def names_after_two_trainings(kind, flowers, **settings):
    kind(id2label=pets, **settings).save_pretrained(folder / "first")
    flowers = dict(enumerate(flowers))
    config = kind.from_pretrained(folder / "first", id2label=flowers, num_labels=len(flowers))
    if config.id2label != flowers:
        raise SystemExit(f"Changed: in memory the classes are {config.id2label}.")
    config.save_pretrained(folder / "second")
    return list(kind.from_pretrained(folder / "second").id2label.values())


as_stated = True
for flowers, stated in (
    (["rose", "tulip"], ["cat", "dog"]),
    (["rose", "tulip", "daisy"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
):
    vit = names_after_two_trainings(ViTConfig, flowers)
    timm = names_after_two_trainings(TimmWrapperConfig, flowers, architecture="resnet18")
    print(f"{flowers}: ViT has {vit}, timm {timm}")
    as_stated &= vit == flowers and timm == stated
if not as_stated:
    raise SystemExit("Changed: other names than stated.")
print("As stated: the timm model has lost the names of its classes.")
PY
