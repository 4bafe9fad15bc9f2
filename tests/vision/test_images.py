# SPDX-License-Identifier: Apache-2.0
"""Images of every mode and size come out as the picture that a person sees; what cannot be decoded is named."""

import io
import pickle
import struct
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import Image
from tiny import png_chunk, png_of_16_bits
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

from hf_aace.cli import main
from hf_aace.vision.datasets import load_image_dataset
from hf_aace.vision.images import decode_image, image_transform
from hf_aace.vision.inference import classify
from hf_aace.vision.models import load_model_and_processor


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return {"bytes": buffer.getvalue(), "path": f"picture.{form.lower()}"}


def decoded(image, form="PNG", **options):
    """The pixels, and those of the same image handed over decoded, which must be no others."""
    pixels = np.asarray(decode_image(encoded(image, form, **options)))
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    with PIL.Image.open(io.BytesIO(encoded(image, form, **options)["bytes"])) as opened:
        assert np.array_equal(np.asarray(decode_image(opened)), pixels)
    return pixels.astype(int)


COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = COLOURS[:, :, 0]


def test_colours_and_grey_are_kept():
    assert np.array_equal(decoded(PIL.Image.fromarray(COLOURS)), COLOURS)
    assert np.array_equal(decoded(PIL.Image.fromarray(GREY)), np.stack([GREY] * 3, axis=2))
    assert np.array_equal(decoded(PIL.Image.fromarray(GREY > 99)), np.stack([(GREY > 99) * 255] * 3, axis=2))


def test_a_palette_gives_its_colours():
    image = PIL.Image.fromarray(COLOURS).quantize(64)
    assert np.array_equal(decoded(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    """Not black, and not the colour that the file happens to have there."""
    alpha = np.zeros_like(GREY)
    alpha[:, 2:] = 255
    if mode == "P":
        image = PIL.Image.fromarray((GREY > 99).astype(np.uint8) + 1, "L")
        image = PIL.Image.fromarray(np.where(alpha == 0, 0, np.asarray(image)).astype(np.uint8)).convert("P")
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        pixels = decoded(image, transparency=0)
        visible = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])[np.asarray(image)]
    else:
        image = PIL.Image.fromarray(COLOURS).convert(mode)
        image.putalpha(PIL.Image.fromarray(alpha))
        pixels = decoded(image)
        visible = np.asarray(PIL.Image.fromarray(COLOURS).convert(mode[:-1]).convert("RGB"))
    assert (pixels[:, :2] == 255).all()
    assert np.array_equal(pixels[:, 2:], visible[:, 2:])


def test_half_transparent_is_half_way_to_white():
    image = PIL.Image.fromarray(COLOURS).convert("RGBA")
    image.putalpha(128)
    assert np.abs(decoded(image) - (255.0 + COLOURS) / 2).max() <= 1.5


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("highest", [1, 200, 4095, 65535])
def test_16_bits_are_scaled_by_their_range(form, highest):
    """Clipping, which is what Pillow's own conversion does, would leave all but the darkest 256 values white."""
    deep = np.linspace(0, highest, 30).round().astype(np.uint16).reshape(5, 6)
    pixels = decoded(PIL.Image.fromarray(deep), form)
    assert np.abs(pixels - deep[:, :, None] / 65535 * 255).max() <= 0.5


@pytest.mark.parametrize("values", [np.linspace(-3, 7, 30), np.linspace(0, 2**30, 30).astype(np.int32)])
def test_32_bits_are_scaled_from_their_lowest_to_their_highest_value(values):
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    pixels = decoded(PIL.Image.fromarray(values.reshape(5, 6)), "TIFF")
    assert np.abs(pixels[:, :, 0] - np.linspace(0, 255, 30).reshape(5, 6)).max() <= 0.51


RAMP = np.linspace(0, 1, 30).reshape(5, 6)


def stored(kind, highest):
    """A ramp from 0 to `highest`, stored in a file of the kind, and what its values are rounded to."""
    values = RAMP * highest
    deep = values.round().astype(np.uint16)
    opaque = np.full_like(deep, 65535)
    if kind == "color":
        return {"bytes": png_of_16_bits(np.stack([deep] * 3, axis=2), 2), "path": "deep.png"}, 256
    if kind == "gray with alpha":
        return {"bytes": png_of_16_bits(np.stack([deep, opaque], axis=2), 4), "path": "deep.png"}, 256
    if kind == "color with alpha":
        return {"bytes": png_of_16_bits(np.stack([deep, deep, deep, opaque], axis=2), 6), "path": "deep.png"}, 256
    if kind == "float":
        return encoded(PIL.Image.fromarray(values.astype(np.float32)), "TIFF"), 0
    if kind == "int32":
        return encoded(PIL.Image.fromarray(deep.astype(np.int32)), "TIFF"), 1
    if kind == "big-endian":
        return encoded(PIL.Image.frombytes("I;16B", (6, 5), deep.astype(">u2").tobytes()), "TIFF"), 1
    if kind == "uint8":
        return encoded(PIL.Image.fromarray(deep.astype(np.uint8))), 1
    return encoded(PIL.Image.fromarray(deep), kind), 1


DEEP = ["PNG", "TIFF", "JPEG2000", "PPM", "big-endian", "int32", "float"]


@pytest.mark.parametrize("highest", [255, 1023, 4095, 16383])
@pytest.mark.parametrize("kind", [*DEEP, "color", "gray with alpha", "color with alpha"])
def test_image_range_scales_whatever_the_file_stores_the_values_in(kind, highest):
    image, step = stored(kind, highest)
    pixels = np.asarray(decode_image(image, image_range=(0, highest))).astype(float)
    # Pillow reads the upper 8 bits of color, so that the values are known to a step of 256.
    tolerance = 0.51 + 255 * step / highest
    assert np.abs(pixels - 255 * RAMP[:, :, None]).max() <= tolerance


@pytest.mark.parametrize(
    ("image_range", "expected"), [((0.25, 0.75), (2 * RAMP - 0.5) * 255), ((-1, 1), (RAMP + 1) * 127.5)]
)
def test_values_outside_of_image_range_are_clipped(image_range, expected):
    pixels = np.asarray(decode_image(stored("float", 1)[0], image_range=image_range)).astype(float)
    assert np.abs(pixels[:, :, 0] - expected.clip(0, 255)).max() <= 0.51


def test_images_of_8_bits_are_scaled_by_a_range_of_8_bits_only():
    image = stored("uint8", 15)[0]
    assert np.abs(np.asarray(decode_image(image, image_range=(0, 15)))[:, :, 0] - 255 * RAMP).max() <= 255 / 15
    assert np.asarray(decode_image(image, image_range=(0, 4095))).max() == 15
    assert np.asarray(decode_image(image, image_range=(0, 255))).max() == 15


def write_images_of(folder, kind, highest):
    for name in ("left", "right"):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            (folder / name / f"{index}.png").write_bytes(stored(kind, highest)[0]["bytes"])
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "highest", "likely"),
    [(kind, highest, f"0 {highest}") for kind in DEEP[:-1] for highest in (255, 1023, 4095, 16383)]
    + [("uint8", 15, "0 15"), ("uint8", 1, "0 1"), ("PNG", 3000, "0 4095")],
)
def test_values_that_leave_most_of_their_range_unused_are_told(kind, highest, likely, tmp_path, warnings):
    """The images become nearly black: the type of the file does not tell that the values have fewer bits."""
    name = write_images_of(tmp_path / "images", kind, highest)
    load_image_dataset(name, seed=0)
    assert len(warnings) == 1
    assert f"hold values from 0 to {highest}, a small part of" in warnings[0]
    assert f"Set `image_range` to the values of black and white, perhaps {likely}." in warnings[0]
    warnings.clear()
    load_image_dataset(name, seed=0, image_range=(0, int(likely.split()[1])))
    assert not warnings


@pytest.mark.parametrize("kind", ["color", "gray with alpha", "color with alpha"])
def test_color_of_16_bits_of_which_pillow_reads_a_dark_part_is_told(kind, tmp_path, warnings):
    name = write_images_of(tmp_path / "images", kind, 4095)
    load_image_dataset(name, seed=0)
    assert len(warnings) == 1 and "16 bits of color" in warnings[0] and "perhaps 0 4095" in warnings[0]
    assert "Pillow reads the upper 8 bits only" in warnings[0]


@pytest.mark.parametrize("highest", [255, 4095])
def test_a_range_of_which_pillow_leaves_few_levels_is_told(highest, tmp_path, warnings):
    """It reads nothing of 8 bits in 16, and 16 levels of 12 bits; no range brings the others back."""
    name = write_images_of(tmp_path / "images", "color", highest)
    load_image_dataset(name, seed=0, image_range=(0, highest))
    assert len(warnings) == 1 and f"no more than {(highest + 1) // 256} levels" in warnings[0]
    assert "Convert them to 8 bits" in warnings[0]
    if highest == 255:
        load_image_dataset(name, seed=0)
        assert "each of them is of one color. Convert them to 8 bits" in warnings[1]
        assert "image_range" not in warnings[1]


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("offset", [0, 30000])
def test_a_defect_of_the_sensor_does_not_hide_the_range(side, offset, tmp_path, warnings):
    generator = np.random.default_rng(0)
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        for index in range(8):
            pixels = (offset + generator.integers(0, 4096, (side, side))).astype(np.uint16)
            pixels[1, index], pixels[2, index] = 65535, 0
            PIL.Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    load_image_dataset(str(tmp_path), seed=0)
    assert len(warnings) == 1 and ", a few pixels of each aside, hold values from" in warnings[0]
    assert ("perhaps 0 4095" if offset == 0 else "perhaps 300") in warnings[0]


def test_integers_with_and_without_negative_values_are_given_one_range(tmp_path, warnings):
    """As computed tomography has them: without air, an image has none."""
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        for index in range(8):
            values = RAMP * 3000 - (1000 if index % 2 else 0)
            PIL.Image.fromarray(values.round().astype(np.int32)).save(tmp_path / name / f"{index}.tiff")
    load_image_dataset(str(tmp_path), seed=0)
    assert len(warnings) == 1 and "black and white, such as -1000 3000," in warnings[0]


def test_values_with_an_offset_are_told(tmp_path, warnings):
    for index in range(8):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        values = (30000 + RAMP * 4095).round().astype(np.uint16)
        PIL.Image.fromarray(values).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    load_image_dataset(str(tmp_path), seed=0)
    assert "perhaps 30000 34095." in warnings[0]


def test_images_scaled_by_their_own_range_are_told(tmp_path, warnings):
    """Two classes that differ in brightness alone would look alike."""
    for name, brightness in (("dark", 0.3), ("light", 0.9)):
        (tmp_path / name).mkdir()
        for index in range(4):
            PIL.Image.fromarray((RAMP * brightness).astype(np.float32)).save(tmp_path / name / f"{index}.tiff")
    load_image_dataset(str(tmp_path), seed=0)
    assert len(warnings) == 1 and "their brightness does not compare" in warnings[0] and "such as 0 0.9" in warnings[0]
    load_image_dataset(str(tmp_path), seed=0, image_range=(0, 0.5))
    assert "outside of `image_range`, 0 to 0.5, are clipped" in warnings[1]
    load_image_dataset(str(tmp_path), seed=0, image_range=(0, 1))
    assert len(warnings) == 2


def test_only_one_class_of_low_values_is_seen_in_a_dataset_sorted_by_class(tmp_path, warnings):
    for name, kind, highest in (("a", "uint8", 255), ("b", "PNG", 4095)):
        (tmp_path / name).mkdir()
        for index in range(100):
            (tmp_path / name / f"{index}.png").write_bytes(stored(kind, highest)[0]["bytes"])
    load_image_dataset(str(tmp_path), seed=0)
    assert len(warnings) == 1 and "images of 16 bits" in warnings[0]


@pytest.mark.parametrize(
    ("kind", "highest"), [("uint8", 255), ("PNG", 65535), ("PNG", 40000), ("color", 65535), ("int32", 65535)]
)
def test_images_that_fill_their_range_are_left_in_peace(kind, highest, tmp_path, warnings):
    load_image_dataset(write_images_of(tmp_path / "images", kind, highest), seed=0)
    assert not warnings


@pytest.mark.parametrize("image_range", [(0,), (0, 0), (4095, 0), (0, float("nan")), (0, 1, 2)])
def test_a_range_that_is_none_is_refused(image_range, tmp_path):
    name = write_images_of(tmp_path / "images", "PNG", 4095)
    with pytest.raises(ValueError, match=r"`image_range` must be two numbers, .* Use 0 and 4095 for 12 bits"):
        load_image_dataset(name, seed=0, image_range=image_range)


def test_the_transform_scales_as_the_range_says():
    image, _ = stored("PNG", 4095)
    processor = ViTImageProcessorPil(size={"height": 5, "width": 6}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    made = image_transform(processor, image_range=(0, 4095))({"image": [image], "label": [0]})
    assert np.abs(made["pixel_values"][0, 0].numpy() - RAMP).max() < 0.003


def test_images_are_classified_in_the_range_that_the_model_was_trained_in():
    model, processor = load_model_and_processor("vit-tiny-digits", {0: "a", 1: "b"})
    shallow = PIL.Image.fromarray((RAMP * 255).round().astype(np.uint8))
    (expected,) = classify(model, processor, [shallow])
    (scaled,) = classify(model, processor, [stored("PNG", 4095)[0]], image_range=(0, 4095))
    (unscaled,) = classify(model, processor, [stored("PNG", 4095)[0]])
    assert np.abs(scaled - expected).max() < 0.01 < np.abs(unscaled - expected).max()


def test_cmyk_is_converted():
    red = PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decoded(red, "JPEG", quality=95) - [255, 0, 0]).max() < 12
    assert np.array_equal(decoded(red, "TIFF"), np.broadcast_to([255, 0, 0], (16, 16, 3)))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, lambda p: p), (3, lambda p: p[::-1, ::-1]), (6, lambda p: np.rot90(p, -1)), (8, np.rot90), (2, np.fliplr)],
)
def test_the_camera_orientation_is_undone(orientation, upright):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(PIL.Image.fromarray(COLOURS), exif=exif), upright(COLOURS))


# ---- Huge images -----------------------------------------------------------


def photograph(width, height):
    """Smooth shapes, as photographs have."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * a + y / height * b) for a, b in ((9, 4), (3, 12), (16, 7))]
    return PIL.Image.fromarray(np.round(127.5 + 120 * np.stack(waves, axis=2)).astype(np.uint8))


@pytest.mark.parametrize(
    ("processor", "smallest"),
    [
        (ViTImageProcessorPil(size={"height": 32, "width": 32}), 64),
        (ConvNextImageProcessorPil(size={"shortest_edge": 32}), 64),
        (ViTImageProcessorPil(size={"height": 32, "width": 32}, do_resize=False), 512),
    ],
)
def test_a_huge_jpeg_is_decoded_at_a_size_that_suffices(processor, smallest, monkeypatch):
    """Of 1024 x 512 pixels, 128 x 64 leave the processor twice what it needs, and it comes to nearly the same picture."""
    seen = []
    original = type(processor).__call__
    monkeypatch.setattr(
        type(processor),
        "__call__",
        lambda self, images, **kwargs: seen.extend(images) or original(self, images, **kwargs),
    )
    image = encoded(photograph(1024, 512), "JPEG", quality=95)
    ours = image_transform(processor)({"image": [image], "label": [0]})["pixel_values"]
    assert seen[0].size == (2 * smallest, smallest)
    whole = original(processor, [decode_image(image)], return_tensors="pt")["pixel_values"]
    assert ours.shape == whole.shape
    assert (ours - whole).abs().mean() < 0.01 * (whole.max() - whole.min())


def test_an_image_that_is_not_huge_is_decoded_whole():
    image = encoded(photograph(127, 127), "JPEG")
    assert decode_image(image, min_size=64).size == (127, 127)
    assert decode_image(encoded(photograph(512, 512)), min_size=64).size == (512, 512)  # PNG cannot


def png_of_size(width, height):
    """A PNG that says it has so many pixels, in a few bytes."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_name(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(3):
            PIL.Image.fromarray(COLOURS).save(tmp_path / name / f"{index}.png")
    (tmp_path / "cat" / "bomb.png").write_bytes(png_of_size(100_000, 100_000))
    with pytest.raises(ValueError, match=r"1 of the 7 images .*cat/bomb.png \(Image size .* decompression bomb"):
        load_image_dataset(str(tmp_path), seed=0)
    bomb = {"bytes": None, "path": str(tmp_path / "cat" / "bomb.png")}
    with pytest.raises(ValueError, match=r"The image '.*cat/bomb.png' cannot be decoded: .* decompression bomb"):
        decode_image(bomb)


# ---- Corrupt images --------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Ten images of each of two classes, two of which are no images; and their names."""
    broken = ["cat/3.png", "dog/7.png"]
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(10):
            PIL.Image.fromarray(COLOURS + np.uint8(index)).save(tmp_path / "pets" / name / f"{index}.png")
    for name in broken:
        whole = (tmp_path / "pets" / name).read_bytes()
        (tmp_path / "pets" / name).write_bytes(whole[:-40])
    return tmp_path / "pets", broken


def test_the_right_image_is_left_out_where_progress_bars_are_switched_off(tmp_path):
    """Among so many that they are looked at in several batches; and with a bar that does not count."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(150):
            PIL.Image.fromarray(COLOURS).save(tmp_path / name / f"{index:03}.png")
    broken = tmp_path / "dog" / "149.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = load_image_dataset(str(tmp_path), seed=0, skip_corrupt_images=True)
    finally:
        if shown:
            datasets.enable_progress_bars()
    files = [
        image["path"]
        for split in dataset.cast_column("image", Image(decode=False)).values()
        for image in split["image"]
    ]
    assert len(files) == 299 and not any("149.png" in name and "dog" in name for name in files)


def test_corrupt_images_are_left_out_and_counted_if_asked(folder, warnings):
    path, broken = folder
    dataset = load_image_dataset(str(path), seed=0, skip_corrupt_images=True)
    assert len(dataset["train"]) + len(dataset["test"]) == 18
    for split in dataset.values():
        assert all(np.asarray(image).size for image in split["image"])  # decodes each
    assert len(warnings) == 1 and "2 of the 20 images" in warnings[0] and "left out" in warnings[0]
    assert all(name in warnings[0] for name in broken) and "cat/2.png" not in warnings[0]


def test_many_corrupt_images_are_told_in_one_sentence_with_the_first_names(folder, warnings):
    path, _ = folder
    for index in range(10):
        (path / "cat" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"11 of the 20 images .*cat/0.png .*cat/4.png \([^,]*\), \.\.\.\. Replace"):
        load_image_dataset(str(path), seed=0)
    assert not warnings
    with pytest.raises(ValueError, match="of one class"):
        load_image_dataset(str(path), seed=0, skip_corrupt_images=True)
    assert len(warnings) == 1 and "cat/9.png" in warnings[0], "what is left out is listed"


@pytest.mark.parametrize("form", ["TIFF", "GIF"])
def test_images_with_several_pages_are_counted_once(form, folder, warnings):
    """A photograph of a telephone in the format MPO holds previews, and is none."""
    path, broken = folder
    first = PIL.Image.fromarray(COLOURS)
    for name in broken:
        (path / name).unlink()
    for name in ("cat", "dog"):
        first.save(
            path / name / f"pages.{form.lower()}", save_all=True, append_images=[PIL.Image.new("RGB", (5, 6))] * 2
        )
    first.save(path / "cat" / "telephone.jpg", "MPO", save_all=True, append_images=[first])
    load_image_dataset(str(path), seed=0)
    assert len(warnings) == 1 and "2 of the images" in warnings[0] and "telephone" not in warnings[0]
    assert all(f"{name}/pages.{form.lower()}" in warnings[0] for name in ("cat", "dog"))


def test_corrupt_images_inside_parquet_are_found_too(folder, tmp_path, warnings):
    path, _ = folder
    rows = [
        {"image": {"bytes": file.read_bytes(), "path": file.name}, "label": file.parent.name}
        for file in sorted(path.rglob("*.png"))
    ]
    rows.append({"image": None, "label": "cat"})
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "table" / "images.parquet")
    with pytest.raises(ValueError, match=r"3 of the 21 images .*: 3.png \(.*\), 7.png \(.*\), row 20 \(no image\)"):
        load_image_dataset(str(tmp_path / "table"), seed=0)
    dataset = load_image_dataset(str(tmp_path / "table"), seed=0, skip_corrupt_images=True)
    assert len(dataset["train"]) + len(dataset["test"]) == 18


def test_the_command_skips_corrupt_images(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--dataset_name", "pets", "--max_steps", "1", "--output_dir", "out", "--disable_tqdm", "true"]
    assert main(argv) == 1
    assert "2 of the 20 images of 'pets' cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--skip_corrupt_images", "true"]) == 0


def test_the_transform_can_be_sent_to_worker_processes():
    """As it must be where they are not forked: on macOS, on Windows, and everywhere from Python 3.14 on."""
    transform = image_transform(ViTImageProcessorPil(size={"height": 8, "width": 8}))
    batch = {"image": [PIL.Image.new("RGB", (16, 16), "red")], "label": [3]}
    sent = pickle.loads(pickle.dumps(transform))(batch)
    assert sent["pixel_values"].equal(transform(batch)["pixel_values"]) and sent["labels"] == [3]


@pytest.mark.parametrize("narrow", ["a class", "some of each class"])
def test_images_of_12_and_of_16_bits_in_one_dataset_are_told(narrow, tmp_path, warnings):
    """The lowest and highest value of all would hide the dark ones; a class could be told by its brightness."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(8):
            highest = 4096 if (name == "cat" if narrow == "a class" else index % 2) else 65536
            pixels = generator.integers(0, highest, (16, 16), dtype=np.uint16)
            PIL.Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    load_image_dataset(str(tmp_path), seed=0)
    assert any("images that were looked at only up to 4" in text and "one range" in text for text in warnings)
