#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pillow 13.0.0 with imagecodecs 2026.3.6, rasterio 1.4.4 (GDAL) and tifffile 2026.3.3: gray images of 12 and 15 bits.
# Expected: Pillow gives the numbers that the file holds, as it does for a TIFF of the same values, and as GDAL does.
# Seen: from a JPEG 2000 file of n bits, Pillow gives the values times 2 ** (16 - n), in the same mode (I;16) as from the TIFF,
#   and nothing in the image tells which it was.
# Consequence: bands of satellites, which come as JPEG 2000 of 12 or 15 bits, are 16 or 2 times as bright through Pillow as through
#   GDAL; a model that was trained on one of the formats sees the other so.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    pillow==13.0.0 imagecodecs==2026.3.6 rasterio==1.4.4 tifffile==2026.3.3 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import imagecodecs
import numpy as np
import PIL.Image
import rasterio
import tifffile

print("Pillow", PIL.__version__, "imagecodecs", imagecodecs.__version__, "rasterio", rasterio.__version__)
values = np.kron(np.array([[0, 1, 1000], [2000, 3000, 4095]], np.uint16), np.ones((16, 16), np.uint16))
tifffile.imwrite("gray.tif", values)
as_tiff = PIL.Image.open("gray.tif")
print(f"as TIFF: the brightest value, 4095, is {np.asarray(as_tiff).max()} in Pillow")
factors = {}
for bits in (12, 15, 16):
    with open("gray.jp2", "wb") as file:
        file.write(imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="jp2", bitspersample=bits))
    with rasterio.open("gray.jp2") as file:
        by_gdal = file.read(1)
    image = PIL.Image.open("gray.jp2")
    pixels = np.asarray(image)
    print(f"as JPEG 2000 of {bits} bits: {pixels.max()} in Pillow, {by_gdal.max()} in GDAL; mode {image.mode}")
    factors[bits] = pixels.max() / 4095
    if not np.array_equal(by_gdal, values) or not np.array_equal(pixels, values * factors[bits]):
        raise SystemExit("Changed: GDAL does not give the values, or Pillow not a multiple of them.")
if factors != {12: 16, 15: 2, 16: 1} or not np.array_equal(np.asarray(as_tiff), values) or image.mode != as_tiff.mode:
    raise SystemExit(f"Changed: Pillow multiplies JPEG 2000 by {factors}, or the TIFF too.")
print("As stated: Pillow scales JPEG 2000 to 16 bits, and not TIFF.")
PY
