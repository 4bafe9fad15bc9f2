#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# datasets 5.2.0 with Pillow 13.0.0.
# Expected: what the function of `Dataset.map` returns is stored, also an image that was changed in place, as Pillow's
#   `Image.thumbnail` and everything in `ImageDraw` do.
# Seen: an image that Pillow opened from a file is stored as the path of that file. The edit is dropped, silently. The same
#   change through a method that returns a new image (`resize`) is stored.
# Consequence: a dataset shrunk by `thumbnail` stays as large as it was, and what was painted over (a burnt-in name, a ruler that
#   gives the class away) is back when the dataset is read. `{"image": edited.copy()}` is stored.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$work"
export HF_HOME="$work/home"
"$work/venv/bin/python" - <<'PY'
import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw

print("datasets", datasets.__version__, "Pillow", PIL.__version__)
datasets.disable_progress_bars()
PIL.Image.new("RGB", (100, 100), "white").save("white.png")
data = datasets.Dataset.from_dict({"image": ["white.png"]}).cast_column("image", datasets.Image())


def shrunk(row):
    row["image"].thumbnail((20, 20))
    return row


def painted_over(row):
    PIL.ImageDraw.Draw(row["image"]).rectangle((0, 0, 99, 99), fill="black")
    return row


def brightest(image):
    return int(np.asarray(image).max())


in_place = data.map(shrunk)[0]["image"].size, brightest(data.map(painted_over)[0]["image"])
new_image = data.map(lambda row: {"image": row["image"].resize((20, 20))})[0]["image"].size
copied = brightest(data.map(lambda row: {"image": painted_over(row)["image"].copy()})[0]["image"])
print(f"thumbnail((20, 20)) of 100 x 100 pixels is stored as {in_place[0]}, resize((20, 20)) as {new_image}")
print(f"white painted black is stored with a brightest pixel of {in_place[1]}, a copy of it with {copied}")
if (in_place, new_image, copied) != (((100, 100), 255), (20, 20), 0):
    raise SystemExit("Changed: images edited in place are stored in another way than stated.")
print("As stated: edits in place are dropped.")
PY
