"""Crops, ranges, atomic files, grids and folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.tokenizer_image.images import (
    ImageError,
    center_crop,
    from_uint8,
    image_grid,
    image_to_tensor,
    list_image_folder,
    load_rgb,
    save_image_atomic,
    to_uint8,
)


def test_to_uint8_clamps_and_truncates():
    x = torch.tensor([-2.0, -1.0, -0.005, 0.0, 0.004, 0.9999, 1.0, 2.0]).view(1, 1, 1, -1).expand(1, 3, 1, 8)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 127, 128, 128, 255, 255, 255]


def test_uint8_survives_the_round_trip():
    array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    x = from_uint8(array)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert np.abs(to_uint8(x).astype(int) - array).max() <= 1
    torch.testing.assert_close(image_to_tensor(Image.fromarray(array[0])), x[0])


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 300), (65, 129), (500, 64), (20, 30)])
def test_center_crop_size(width, height):
    assert center_crop(Image.new("RGB", (width, height)), 64).size == (64, 64)


def test_center_crop_takes_the_centre_and_leaves_exact_sizes_alone():
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(array), 32), array)
    wide = np.concatenate([np.zeros_like(array), array, np.zeros_like(array)], 1)
    assert np.array_equal(center_crop(Image.fromarray(wide), 32), array)


def test_center_crop_halves_by_boxes_first():
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    boxes = array.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(Image.fromarray(array), 32)) - boxes).max() <= 1


def test_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(tmp_path / "a.png")
    array = np.asarray(load_rgb(tmp_path / "a.png"))
    assert array[0, 0].tolist() == [255, 0, 0]
    assert array[1:].min() == 255


def test_save_is_atomic(tmp_path, monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    save_image_atomic(tmp_path / "a.png", array)
    assert np.array_equal(load_rgb(tmp_path / "a.png"), array)

    def fail(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_image_atomic(tmp_path / "b.png", array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "cut.png", "empty.png", "missing.png"):
        with pytest.raises(ImageError, match=name):
            load_rgb(tmp_path / name)


def test_grid_places_images_and_fits_captions():
    images = [np.full((16, 16, 3), i * 40, np.uint8) for i in range(5)]
    grid = image_grid(images, 3, padding=2)
    assert grid.size == (3 * 18 + 2, 2 * 18 + 2)
    assert grid.getpixel((2 + 18 + 8, 2 + 18 + 8)) == (160, 160, 160)  # the fifth: second row, second column
    assert image_grid(images, 3, ["a very long caption"] * 5, padding=2).size[1] > grid.size[1]
    with pytest.raises(ValueError, match="captions"):
        image_grid(images, 3, ["one"])
    with pytest.raises(ValueError, match="columns"):
        image_grid([], 3)


def test_image_folder(tmp_path):
    for name in ("b", "a", "empty"):
        (tmp_path / name).mkdir()
    for name in ("a/2.png", "a/1.png", "b/1.JPG"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, format="PNG")
    (tmp_path / "a" / "notes.txt").write_text("")
    files, labels, classes = list_image_folder(tmp_path)
    assert [str(f.relative_to(tmp_path)) for f in files] == ["a/1.png", "a/2.png", "b/1.JPG"]
    assert labels == [0, 0, 1]
    assert classes == ["a", "b", "empty"]
    with pytest.raises(ImageError, match="no images"):
        list_image_folder(tmp_path / "empty")
    with pytest.raises(ImageError, match="no such folder"):
        list_image_folder(tmp_path / "absent")
