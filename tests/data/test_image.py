"""Images as arrays: equal to those of the reference's processors, and changed at random by (seed, epoch, image) alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest

from jaxft.data.examples import Encoded, make_split
from jaxft.data.loader import Batches
from jaxft.data.processors import augment, image
from jaxft.data.processors.augment import Augmentation
from jaxft.data.processors.image import ImageProcessor
from jaxft.data.sources.media import BrokenFile
from jaxft.errors import UserError
from jaxft.tasks.image_classification import Rendering, stored_fields

SQUARE, CROP = {"height": 24, "width": 20}, {"height": 16, "width": 18}
SETTINGS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("ViTImageProcessor", {"size": SQUARE}, (24, 20)),
    "deit": ("DeiTImageProcessor", {"size": SQUARE, "crop_size": CROP, "resample": 3}, (16, 18)),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 21}, "crop_size": CROP, "resample": 3}, (16, 18)),
    "odd": ("BitImageProcessor", {"size": {"shortest_edge": 10}, "crop_size": {"height": 13, "width": 15}}, (13, 15)),
    "lanczos": ("ViTImageProcessor", {"size": SQUARE, "resample": 1, "image_mean": [0.1, 0.2, 0.3]}, (24, 20)),
    "unscaled": ("ViTImageProcessor", {"size": SQUARE, "do_rescale": False}, (24, 20)),
    "plain": ("ViTImageProcessor", {"size": SQUARE, "do_normalize": False}, (24, 20)),
    "other": (
        "ViTImageProcessor",
        {"size": SQUARE, "rescale_factor": 1 / 127.5, "image_std": [2.0, 1.0, 0.5]},
        (24, 20),
    ),
}


def write(folder: Path, said: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / image.FILE).write_text(json.dumps(said))
    return folder


def opened(folder: Path, said: dict[str, Any], size: tuple[int, int], channels: int = 3) -> ImageProcessor:
    return image.open_processor(write(folder, said), *size, channels)


@pytest.mark.parametrize("case", SETTINGS)
def test_pixels_are_those_of_the_reference(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from PIL import Image

    name, said, size = SETTINGS[case]
    theirs = getattr(transformers, f"{name}Pil")(do_convert_rgb=True, **said)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = image.open_processor(tmp_path / "theirs", *size, 3)
    ours.save(tmp_path)
    again = image.open_processor(tmp_path, *size, 3)
    assert again.digest() == ours.digest()
    rng = np.random.default_rng(0)
    for height, width in ((30, 40), (41, 17), (12, 12), (24, 20), (7, 90)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        wanted = np.asarray(theirs(picture)["pixel_values"][0]).transpose(1, 2, 0)
        np.testing.assert_allclose(ours([picture])["pixels"][0], wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
        file = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        same = np.asarray(file(picture)["pixel_values"][0]).transpose(1, 2, 0)
        np.testing.assert_allclose(same, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_images_of_every_kind_are_decoded(tmp_path: Path) -> None:
    from PIL import Image

    processor = image.fresh_processor(tmp_path, 9, 8, 3)
    pixels = images.picture(np.random.default_rng(0), (200, 20, 30), 9, 8)
    grey = Image.fromarray(pixels).convert("L")
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        found = processor.pixels(processor.decoded(images.file_of(pixels, kind), "row 1"))
        np.testing.assert_array_equal(found, pixels)
    for kind in ("JPEG", "WEBP", "GIF"):
        found = processor.pixels(processor.decoded(images.file_of(pixels, kind), "row 1"))
        assert found.shape == (9, 8, 3)
    grey.save(tmp_path / "grey.png")
    found = processor.pixels(processor.decoded(str(tmp_path / "grey.png"), "row 1"))
    np.testing.assert_array_equal(found, np.repeat(np.asarray(grey)[..., None], 3, -1))
    one = image.fresh_processor(tmp_path, 9, 8, 1)
    np.testing.assert_array_equal(one.pixels(one.decoded(images.file_of(pixels), "row 1"))[..., 0], np.asarray(grey))
    clear = np.concatenate([pixels, np.full((9, 8, 1), 128, np.uint8)], -1)
    assert processor.pixels(processor.decoded(images.file_of(clear), "row 1")).shape == (9, 8, 3)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"size": {"height": 12, "width": 10}}, "makes images of 12x10 pixels, the model reads 24x20"),
        ({"size": {"longest_edge": 24}}, "size is"),
        ({"size": SQUARE, "resample": 9}, "resample is 9"),
        ({"size": SQUARE, "image_mean": [0.5]}, "image_mean has 1 numbers for 3 channels"),
        ({"size": SQUARE, "image_std": [0.5, 0, 1]}, "image_std has a 0"),
        ({"size": SQUARE, "rescale_factor": "much"}, "rescale_factor is 'much'"),
    ],
)
def test_a_file_that_says_something_else_is_refused(said: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        opened(tmp_path, said, (24, 20))


def test_a_folder_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        image.open_processor(tmp_path, 8, 8, 3)


def test_a_model_of_another_size_is_shown_images_of_its_size(tmp_path: Path) -> None:
    said = {"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}
    bigger = image.open_processor(write(tmp_path, said), 56, 42, 3, (28, 28, 3))
    assert (bigger.resize, bigger.crop, bigger.height, bigger.width) == ((64, 48), True, 56, 42)
    edge = image.open_processor(write(tmp_path, said | {"size": {"shortest_edge": 32}}), 56, 56, 3, (28, 28, 3))
    assert edge.resize == 64


def test_photographs_stand_upright_and_deep_pixels_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    pixels = images.picture(np.random.default_rng(0), (10, 200, 30), 6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(image.decoded(str(tmp_path / "turned.png"), "RGB", "")), np.rot90(pixels, -1)
    )
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    with pytest.raises(BrokenFile, match=r"deep\.png: pixels of more than 8 bits"):
        image.decoded(str(tmp_path / "deep.png"), "L", "")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    whole = images.file_of(images.picture(np.random.default_rng(0), (9, 9, 9), 40, 40))
    for value, problem in ((whole[:300], "a broken image"), (b"hello", "no image that can be read"), (b"", "no image")):
        with pytest.raises(BrokenFile, match=f"row 3.*{problem}"):
            image.decoded(value, "RGB", "row 3")
    (tmp_path / "cut.png").write_bytes(whole[:300])
    with pytest.raises(BrokenFile, match=r"cut\.png: a broken image"):
        image.decoded(str(tmp_path / "cut.png"), "RGB", "row 3")
    with pytest.raises(UserError, match=r"row 3: the file .* does not exist"):
        image.decoded(str(tmp_path / "none.png"), "RGB", "row 3")


# -------------------------------------------------------------------------------------------------------- random changes

EVERYTHING = Augmentation("resized", flip=0.5, augment="trivial", erase=0.5)


def batches(rendering: Rendering, seed: int | None, part: tuple[int, int] | None = None) -> Batches:
    rng = np.random.default_rng(0)
    rows = [
        Encoded(
            {
                "image": np.frombuffer(images.file_of(images.picture(rng, (99, 50, i), 14, 15)), np.uint8),
                "labels": np.asarray(i % 3, np.int32),
            },
            i,
        )
        for i in range(21)
    ]
    return Batches(make_split("train", rows, stored_fields()), 8, (1,), seed, part, rendering=rendering)


@pytest.fixture(scope="module")
def rendering() -> Rendering:
    return Rendering(image.fresh_processor(Path(), 12, 12, 3), EVERYTHING)


def test_batches_are_the_same_on_any_number_of_hosts_and_from_any_step(rendering: Rendering) -> None:
    whole = batches(rendering, 3)
    for step in (0, 2, 7):  # the third has fewer rows than a batch; another epoch
        expected = whole[step]
        assert expected["pixels"].shape == (8, 12, 12, 3)
        for hosts in (2, 4):
            each = 8 // hosts
            parts = [batches(rendering, 3, (i * each, (i + 1) * each))[step] for i in range(hosts)]
            for name, value in expected.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)
    assert {str(shape) for shape in whole.shapes()} == {"8x12x12x3"}


def test_an_image_is_changed_anew_in_each_epoch_and_by_each_seed(rendering: Rendering) -> None:
    def shown(seed: int, epoch: int) -> dict[int, np.ndarray]:
        found, made = {}, batches(rendering, seed)
        for step in range(3 * epoch, 3 * epoch + 3):
            found |= dict(zip(made.rows_of(step).tolist(), made[step]["pixels"], strict=False))
        return found

    first, second, other = shown(3, 0), shown(3, 1), shown(4, 0)
    assert sorted(first) == list(range(21))
    for later in (second, other):
        assert sum(np.array_equal(first[row], later[row]) for row in first) < 3


def test_rows_that_are_scored_are_not_changed(rendering: Rendering) -> None:
    made, plain = batches(rendering, None), rendering.processor
    for row, pixels in zip(made.rows_of(0), made[0]["pixels"], strict=True):
        stored = made.split[int(row)]["image"].tobytes()
        np.testing.assert_array_equal(pixels, plain.pixels(plain.decoded(stored, "")))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(augment._OPERATIONS))
def test_operations_keep_the_kind_of_image(name: str, channels: int) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (13, 11, 3), np.uint8)
    before = Image.fromarray(pixels).convert(image.MODES[channels])
    for table in (augment._WIDE, augment._USUAL):
        for share in (-1.0, 0.0, 1.0):
            operation, signed = augment._OPERATIONS[name]
            after = operation(before, table[name](before) * (share if signed else abs(share)))
            assert (after.size, after.mode) == (before.size, before.mode)
            if share == 0.0 and name not in ("equalize", "auto_contrast", "sharpness"):
                limit = 255 if name == "solarize" else 256
                same = np.asarray(after)[np.asarray(before) < limit]
                np.testing.assert_array_equal(same, np.asarray(before)[np.asarray(before) < limit])


def test_parts_lie_within_the_image_and_have_the_shares_asked_for() -> None:
    from PIL import Image

    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    shares, shapes = [], []
    for number in range(400):
        part = augment.random_part(whole, (0.2, 0.7), (0.5, 2.0), np.random.default_rng(number))
        shares.append(part.width * part.height / 4800)
        shapes.append(part.width / part.height)
    assert 0.17 < min(shares) < 0.23
    assert 0.66 < max(shares) < 0.73
    assert 0.42 < np.mean(shares) < 0.48
    assert 0.47 < min(shapes) < 0.6
    assert 1.7 < max(shapes) < 2.2
    long = augment.random_part(Image.new("RGB", (10, 4000)), (0.9, 1.0), (0.75, 4 / 3), np.random.default_rng(0))
    assert long.size == (10, 13)  # ten tries did not fit: the middle


def test_moving_and_erasing_change_what_they_say() -> None:
    pixels = np.full((12, 10, 3), 200, np.uint8)
    places = set()
    for number in range(300):
        moved = augment.moved(pixels, 2, np.random.default_rng(number))
        assert moved.shape == pixels.shape
        rows, columns = (np.flatnonzero(moved.any((axis, 2))) for axis in (1, 0))
        places.add((rows[0] - (11 - rows[-1]), columns[0] - (9 - columns[-1])))
    assert places == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    shares = [(augment.erased(pixels, np.random.default_rng(i)) != pixels).any(-1).mean() for i in range(200)]
    assert 0.0 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.4
    untouched = dataclasses.replace(EVERYTHING, crop="none", flip=0.0, augment="none", erase=0.0)
    how = image.fresh_processor(Path(), 12, 10, 3)
    from PIL import Image

    np.testing.assert_array_equal(untouched.changed(Image.fromarray(pixels), how, np.random.default_rng(0)), pixels)
