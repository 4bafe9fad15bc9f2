#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pillow 13.0.0: gray images of 16 bits, as microscopes and X-ray detectors write them.
# Expected: `rotate` and `transform` with bilinear or bicubic interpolation keep a constant image constant, as `resize` does in
#   this mode, or say that they cannot do it.
# Seen: of an image whose every pixel is 1000, they make values below 256, rotation even a pattern of them, without a word. Nearest
#   neighbour, `resize` and the mode I are right.
# Consequence: augmentation by small rotations, which takes bilinear interpolation, turns 16-bit images into noise that a model is
#   then trained on. Convert to the mode "I" or "F" first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import numpy as np
import PIL.Image
from PIL.Image import Resampling

print("Pillow", PIL.__version__)
image = PIL.Image.fromarray(np.full((33, 33), 1000, np.uint16))
half_a_pixel = (1, 0, 0.5, 0, 1, 0)


def inner(result):
    """Give the range of the values far from the border."""
    pixels = np.asarray(result)[12:21, 12:21]
    return int(pixels.min()), int(pixels.max())


good = 1000, 1000
for method in (Resampling.NEAREST, Resampling.BILINEAR, Resampling.BICUBIC):
    turned = inner(image.rotate(45, method))
    moved = inner(image.transform(image.size, PIL.Image.Transform.AFFINE, half_a_pixel, method))
    resized, in_mode_i = inner(image.resize((66, 66), method)), inner(image.convert("I").rotate(45, method))
    print(f"{method.name}, lowest and highest: rotated {turned}, moved {moved}, resized {resized}, rotated in mode I {in_mode_i}")
    if resized != good or in_mode_i != good:
        raise SystemExit("Changed: resize, or rotation in mode I, is not right any more.")
    if (turned, moved) != (good, good) if method == Resampling.NEAREST else max(*turned, *moved) > 255:
        raise SystemExit("Changed: 16-bit images are rotated in another way than stated.")
print("As stated: interpolated rotations of 16-bit images are noise below 256.")
PY
