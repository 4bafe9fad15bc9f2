#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pillow 13.0.0 and rasterio 1.4.4 (GDAL) on a TIFF of four bands, red, green, blue and near infrared, as tifffile 2026.3.3 writes
# it from an array of shape (height, width, 4).
# Expected: four bands are read, and shrinking the image shrinks each of them by itself.
# Seen: the fourth band is taken for transparency. Pillow's `resize` (but for nearest neighbour) weights the colors by it, and where
#   it is 0 they become black; `read(masked=True)` of rasterio masks these pixels in all bands.
# Consequence: water hardly reflects near infrared: lakes become black as soon as a tile is resized, and along the shore the land
#   outweighs the water. `tifffile.imwrite(..., extrasamples="unspecified")` writes a band that is no transparency, which Pillow
#   leaves out.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    pillow==13.0.0 tifffile==2026.3.3 rasterio==1.4.4 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import numpy as np
import PIL.Image
import rasterio
import tifffile
from PIL.Image import Resampling

print("Pillow", PIL.__version__, "tifffile", tifffile.__version__, "rasterio", rasterio.__version__)
tile = np.zeros((64, 64, 4), np.uint8)
tile[..., :3] = 40, 80, 120  # the same color everywhere
tile[:, :32, 3] = 200  # land on the left; on the right water, dark in near infrared
tifffile.imwrite("tile.tif", tile, photometric="rgb")
image = PIL.Image.open("tile.tif")
half = np.asarray(image.resize((32, 32), Resampling.BILINEAR))
alone = np.asarray(PIL.Image.fromarray(tile[..., :3].copy()).resize((32, 32), Resampling.BILINEAR))
with rasterio.open("tile.tif") as file:
    masked = file.read(1, masked=True).mask
land, water = half[16, 4, :3].tolist(), half[16, 28, :3].tolist()
print(f"mode {image.mode}; resized by Pillow: land {land}, water {water}; without the fourth band water {alone[16, 28].tolist()}")
print(f"masked by rasterio: {masked[:, :32].mean():.0%} of the land, {masked[:, 32:].mean():.0%} of the water")
if image.mode != "RGBA" or water != [0, 0, 0] or land == water or masked[:, :32].any() or not masked[:, 32:].all():
    raise SystemExit("Changed: the fourth band is read in another way than stated.")
tifffile.imwrite("tile.tif", tile, photometric="rgb", extrasamples="unspecified")
if PIL.Image.open("tile.tif").mode != "RGB":
    raise SystemExit("Changed: an unspecified fourth band is not left out any more.")
print("As stated: near infrared is taken for transparency.")
PY
