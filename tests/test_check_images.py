import math
import os

import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.check_images import (
    PictureFacts,
    in_processes,
    picture_findings,
    pixel_hash,
    read_picture_facts,
    read_picture_header,
    repeated_pictures,
    size_range,
)
from swin_dense.datasets.images import read_image
from swin_dense.errors import DataError


def noise(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_facts_are_what_the_loader_sees(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(noise((13, 17))).save(path, exif=exif)
    facts = read_picture_facts(str(path))
    assert (facts.fault, facts.mode, facts.stored_hw, facts.orientation) == (None, "RGB", (13, 17), orientation)
    assert facts.turned_hw == read_image(path).shape[:2]
    assert facts.content_hash == pixel_hash(read_image(path))
    header = read_picture_header(str(path))
    assert header.content_hash is None and (header.stored_hw, header.turned_hw) == (facts.stored_hw, facts.turned_hw)


def test_hash_tells_pixels_and_shapes_apart_but_not_formats(tmp_path):
    pixels = noise((13, 17))
    for suffix in ("png", "bmp"):
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    one, other = (read_picture_facts(str(tmp_path / f"a.{suffix}")).content_hash for suffix in ("png", "bmp"))
    assert one == other == pixel_hash(pixels)
    changed = pixels.copy()
    changed[5, 7, 1] ^= 1
    assert len({pixel_hash(array) for array in (pixels, changed, pixels.reshape(17, 13, 3))}) == 3


def test_no_content_makes_reading_fail(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise((13, 17))).save(path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole[: random.integers(0, len(whole) + 1)])
        for place in random.integers(0, 60, 3):
            if place < len(damaged):
                damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        facts = read_picture_facts(str(path))
        assert facts.fault is None or facts.reason
        if facts.fault is None:
            read_image(path)


@pytest.mark.parametrize("name", ["none.png", "x" * 300 + ".png", "\ud800.png", "a\0b.png"])
def test_impossible_names_are_missing(name, tmp_path):
    assert read_picture_facts(str(tmp_path / name)).fault == "picture-missing"


def facts(split_hash):
    return PictureFacts("p", content_hash=split_hash)


def test_repeated_pictures_are_told_once_each():
    pictures = [facts(content) for content in (b"a", b"b", b"a", b"c", b"b", b"a", None, None, b"d", b"d")]
    splits = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1]
    assert sorted(repeated_pictures(pictures, splits), key=lambda found: found[1]) == [
        ("picture-in-two-splits", 0, 5),
        ("picture-in-two-splits", 1, 4),
        ("picture-in-two-splits", 2, 5),
        ("picture-repeated", 9, 8),
    ]


def test_size_that_fits_either_way_is_none_that_differs():
    turned = PictureFacts("p", mode="RGB", stored_hw=(13, 17), turned_hw=(17, 13), orientation=6, content_hash=b"a")
    for size_hw in ((13, 17), (17, 13), None):
        assert [kind for kind, _ in picture_findings(turned, size_hw)] == ["picture-turned"]
    assert [kind for kind, _ in picture_findings(turned, (13, 18))] == ["image-size-differs", "picture-turned"]


def test_processes_give_the_same_results_in_the_same_order():
    told = []
    numbers = list(range(211))
    for workers in (0, 2):
        # A function that new processes find without knowing where the tests lie.
        found = list(in_processes(math.factorial, numbers, workers, lambda *so_far: told.append(so_far)))
        assert found == [math.factorial(number) for number in numbers]
    assert told == [(done, 211) for done in range(1, 212)] * 2


def test_process_that_is_ended_is_one_message():
    with pytest.raises(DataError, match="a process that reads pictures was ended"):
        list(in_processes(os._exit, [1] * 211, 2, lambda *so_far: None))


def test_size_range_takes_each_side_by_itself():
    assert size_range(np.array([[3, 50], [9, 20], [5, 30]])) == {"min": [3, 20], "median": [5, 30], "max": [9, 50]}
    assert size_range(np.zeros((0, 2))) == {}
