import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.images import MAX_PIXELS, image_size_hw, max_pixels, pixel_limit, read_image, read_label
from swin_dense.errors import ConfigError, ImageError

RGB = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def save_turned(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, RGB, exif=exif)


def test_read_image_gives_the_pixels_of_the_file(tmp_path):
    image = read_image(save(tmp_path / "a.png", RGB), (13, 7))
    assert image.dtype == np.uint8 and np.array_equal(image, RGB)
    image[:] = 0


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_read_image_turns_every_mode_into_rgb(tmp_path, mode):
    path = save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), RGB, mode)
    assert read_image(path).shape == (13, 7, 3)


def test_read_image_scales_16_bit_by_257(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert read_image(save(tmp_path / "a.png", values))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_read_image_applies_exif_unless_the_annotations_used_the_stored_frame(tmp_path, orientation):
    path = save_turned(tmp_path / "a.png", orientation)
    turned = read_image(path)
    assert image_size_hw(path) == turned.shape[:2]
    assert not np.array_equal(turned, RGB)
    assert np.array_equal(read_image(path, turned.shape[:2]), turned)
    if orientation >= 5:
        assert turned.shape[:2] == (7, 13)
        assert np.array_equal(read_image(path, (13, 7)), RGB)


def test_read_image_names_all_sizes_when_none_fits(tmp_path):
    path = save_turned(tmp_path / "a.png", 6)
    with pytest.raises(ImageError, match=r"a\.png: .* 14 x 7, the picture is 13 x 7, 7 x 13 when turned"):
        read_image(path, (14, 7))


def test_read_image_refuses_every_broken_file(tmp_path):
    whole = save(tmp_path / "whole.jpg", np.repeat(RGB, 9, axis=0)).read_bytes()
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    cases = {
        "cut.jpg": (whole[: len(whole) // 2], "damaged or cut short"),
        "empty.jpg": (b"", r"empty \(0 bytes\)"),
        "page.jpg": (b"<!doctype html><html>", "got a web page"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        "noise.jpg": (b"\x01\x02" * 99, "not a picture"),
        "moving.gif": (None, "got 2 frames"),
    }
    for name, (data, message) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}: .*{message}"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="there is no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="got a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("side", [9500, 14000])
def test_read_image_refuses_bombs_from_the_header(tmp_path, side):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    with pytest.raises(ImageError, match="more than 89 megapixels"):
        read_image(path)


def test_pixel_limit_allows_more_for_as_long_as_it_holds(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("1", (14000, 13000)).save(path)  # over twice Pillow's own limit too
    with pixel_limit(14000 * 13000):
        assert image_size_hw(path) == (13000, 14000)
        with pixel_limit(None):
            assert image_size_hw(path) == (13000, 14000)
        with pixel_limit(14000 * 13000 - 1), pytest.raises(ImageError, match=r"more than 182 megapixels.*--max-pixels"):
            image_size_hw(path)
    assert max_pixels() == MAX_PIXELS
    with pytest.raises(ImageError, match="SWIN_DENSE_MAX_PIXELS"):
        image_size_hw(path)
    monkeypatch.setenv("SWIN_DENSE_MAX_PIXELS", "200000000")
    assert image_size_hw(path) == (13000, 14000)


def test_pixel_limit_may_be_lower(tmp_path):
    path = save(tmp_path / "a.png", RGB)
    with pixel_limit(90), pytest.raises(ImageError, match="more than 9e-05 megapixels"):
        read_image(path)
    with pixel_limit(91):
        assert np.array_equal(read_image(path), RGB)


@pytest.mark.parametrize("count", [0, -5])
def test_pixel_limit_is_positive(count):
    with pytest.raises(ConfigError, match=f"whole number of 1 or more, got '{count}'"), pixel_limit(count):
        pass
    assert max_pixels() == MAX_PIXELS


@pytest.mark.parametrize("height", [255, 256, 257, 600])
def test_read_image_gives_every_band(tmp_path, height):
    values = np.random.default_rng(1).integers(0, 256, (height, 5, 3), dtype=np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "a.png", values)), values)


def test_read_label_gives_the_values_of_the_file(tmp_path):
    small = np.arange(6, dtype=np.uint8).reshape(2, 3)
    wide = (np.arange(6, dtype=np.uint16) * 9999).reshape(2, 3)
    palette = Image.fromarray(small)
    palette.putpalette([7, 7, 7] * 256)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_label(save(tmp_path / "l.png", small)), small)
    assert np.array_equal(read_label(save(tmp_path / "i.png", wide)), wide)
    assert np.array_equal(read_label(tmp_path / "p.png"), small)
    assert read_label(tmp_path / "p.png").dtype == np.int32


def test_read_label_refuses_colours(tmp_path):
    with pytest.raises(ImageError, match=r"got colour mode RGB\. Convert it to one number per pixel"):
        read_label(save(tmp_path / "a.png", RGB))


def test_damaged_exif_does_not_stop_the_reading(tmp_path):
    path = save(tmp_path / "a.png", RGB, exif=b"Exif\x00\x00garbage")
    assert np.array_equal(read_image(path, (13, 7)), RGB)


def test_float_and_out_of_range_grey_are_refused(tmp_path):
    with pytest.raises(ImageError, match="got floating point"):
        read_image(save(tmp_path / "f.tif", np.ones((5, 7), np.float32)))
    with pytest.raises(ImageError, match=r"must lie in 0\.\.65535, got -1\.\.70000"):
        read_image(save(tmp_path / "i.tif", np.array([[-1, 70000]], np.int32)))


def test_palette_with_transparency_becomes_rgb(tmp_path):
    image = Image.fromarray(RGB).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert np.array_equal(read_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")))
