# SPDX-License-Identifier: Apache-2.0
"""A folder of many images of mixed modes and sizes, some broken: all of those are named, and memory stays flat over an epoch."""

import io
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import psutil
import pytest
from datasets import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil, default_data_collator

from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.images import image_transform


GLIBC = "MALLOC_MMAP_THRESHOLD_"


def encoded(size, mode, form, **options):
    generator = np.random.default_rng(size[0])
    # Coarse noise, enlarged: compresses as photographs do.
    image = PIL.Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        size, PIL.Image.BICUBIC
    )
    if mode == "I;16":
        image = PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "P":
        image = image.quantize(64)
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def files(sizes):
    """Encoded images, of each size one of each kind, as pairs of a suffix and the content."""
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    kinds = [("RGB", "JPEG", {}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"exif": turned})]
    kinds += [(mode, "PNG", {}) for mode in ("RGB", "L", "P", "RGBA", "LA", "I;16", "1")] + [("RGB", "WEBP", {})]
    return [(form.lower(), encoded(size, mode, form, **options)) for size in sizes for mode, form, options in kinds]


def write_folder(folder, count, sizes, every, huge):
    """Writes `count` images of two classes, one in `every` of them broken, and returns the paths of those; `huge` times two of 6
    megapixels for every twelve of each size."""
    contents, broken = files(sizes), set()
    contents += [("jpeg", encoded((3000, 2000), "RGB", "JPEG")), ("png", encoded((3000, 2000), "RGB", "PNG"))] * huge
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        suffix, content = contents[index % len(contents)]
        path = folder / ("cat", "dog")[index % 2] / f"{index:05d}.{suffix}"
        if index % every == every - 1:
            ruins = (b"", b"no image", content[: len(content) // 2])
            content = ruins[index // every % 3]
            broken.add(str(path))
        path.write_bytes(content)
    return broken


def epoch(dataset, workers, processor):
    """Resident memory, in MB, after each batch of an epoch of the loader, and the number of images."""
    seen = dataset.cast_column("image", Image(decode=False)).with_transform(image_transform(processor))
    loader = DataLoader(seen, 32, shuffle=True, num_workers=workers, collate_fn=default_data_collator)
    process, memory, count = psutil.Process(), [], 0
    for batch in loader:
        count += len(batch["labels"])
        memory.append(sum(p.memory_info().rss for p in (process, *process.children())) / 1e6)
    return memory, count


def growth(tmp_path, monkeypatch, count, sizes, every, size, workers, huge=0):
    """Checks that the broken images are named, and returns by how many MB memory grows over an epoch of the others."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    broken = write_folder(tmp_path / "pets", count, sizes, every, huge)
    said = []
    monkeypatch.setattr("hf_aace.vision.corrupt.logger.warning", said.append)
    dataset = load_image_dataset(str(tmp_path / "pets"), seed=0, skip_corrupt_images=True)
    assert said[0].startswith(f"{len(broken)} of the {count} images")
    assert set(re.findall(rf"{tmp_path}/pets/\w+/\d+\.\w+", said[0])) == broken
    memory, seen = epoch(dataset["train"], workers, ViTImageProcessorPil(size={"height": size, "width": size}))
    assert seen == len(dataset["train"])
    # Past the first batches, what is held at a time is all that there is.
    return max(memory[len(memory) // 5 :]) - max(memory[: len(memory) // 5])


def test_bad_files_are_named_and_memory_stays_flat(tmp_path, monkeypatch):
    """The decoded images of this epoch, PNGs mostly, have 250 MB: were they kept, it would be seen."""
    sizes = [(1024, 1024), (40, 300), (17, 9)]
    assert growth(tmp_path, monkeypatch, 200, sizes, every=21, size=32, workers=0) < 60


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_thousand_images(workers, tmp_path, monkeypatch):
    """With workers, with the setting that notebook 3 names: glibc reads it when a process begins, so in one of its own."""
    if workers and os.environ.get(GLIBC) is None:
        argv = [sys.executable, *"-m pytest -q -m slow".split(), f"{__file__}::test_ten_thousand_images[{workers}]"]
        subprocess.run(argv, check=True, env={**os.environ, GLIBC: "1000000"})
        return
    sizes = [(17, 9), (64, 64), (320, 240), (500, 375), (640, 480), (1024, 768)]
    assert growth(tmp_path, monkeypatch, 10_000, sizes, every=199, size=224, workers=workers, huge=1) < 100
