#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# datasets 5.2.0.
# Expected: `DatasetDict.class_encode_column("label")` turns the names of classes into numbers, the same in all splits.
# Seen: each split is numbered by the names that occur in it. If one lacks a class, the same name has another number there. And
#   numbers are sorted as text (0, 1, 10, 11, 2, ...), so that a column of numbers is numbered anew.
# Consequence: a classifier that is right in every case has an accuracy of 0 on a split that lacks a class, and a head that was
#   trained with the original numbers does not fit any more. `cast_column("label", ClassLabel(names=[...]))` numbers all alike.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
export HF_HOME="$work/home"
"$work/venv/bin/python" - <<'PY'
import datasets

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
names = {"train": ["cat", "dog", "fox"], "test": ["dog", "fox", "fox"]}
splits = datasets.DatasetDict({split: datasets.Dataset.from_dict({"label": names[split]}) for split in names})
encoded = splits.class_encode_column("label")
number = dict(zip(names["train"], encoded["train"]["label"], strict=True))
right = sum(number[name] == label for name, label in zip(names["test"], encoded["test"]["label"], strict=True))
for split in names:
    print(f"{split}: {names[split]} became {encoded[split]['label'][:]}")
print(f"perfect predictions on the test split, counted as right: {right} of 3")

numbers = datasets.Dataset.from_dict({"label": list(range(12))}).class_encode_column("label")["label"][:]
print(f"the numbers 0 to 11 became {numbers}")

if right != 0 or encoded["test"]["label"][:] != [0, 1, 1] or numbers != [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]:
    raise SystemExit("Changed: classes are numbered in another way than stated.")
print("As stated: each split is numbered by itself, and numbers are sorted as text.")
PY
