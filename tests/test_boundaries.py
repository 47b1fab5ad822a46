import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from swin_dense.datasets.boundaries import boundary_distance, boundary_of_labels, boundary_rle
from swin_dense.errors import AnnotationError

SIZES = st.tuples(st.integers(1, 31), st.integers(1, 37))


def encoded(mask):
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}


def boundary_in_whole_image(mask, distance):
    """The definition, pixel by pixel of a square around each, zeros beyond the image."""
    padded = np.pad(mask, distance)
    side = 2 * distance + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    return mask * (1 - windows.min(axis=(2, 3)))


def random_blobs(seed, size_hw, num_classes):
    """Classes in rectangles of random places, the last ones on top."""
    random = np.random.default_rng(seed)
    labels = np.zeros(size_hw, np.uint8)
    for number in range(6):
        (top, bottom), (left, right) = (np.sort(random.integers(0, side + 1, 2)) for side in size_hw)
        labels[top:bottom, left:right] = number % num_classes
    return labels


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**32 - 1), st.sampled_from([0.001, 0.02, 0.05, 0.2]))
def test_boundary_rle_equals_the_definition_in_the_whole_image(size_hw, seed, ratio):
    mask = random_blobs(seed, size_hw, 2)
    distance = boundary_distance(size_hw, ratio)
    assert boundary_rle(encoded(mask), ratio) == encoded(boundary_in_whole_image(mask, distance))


@pytest.mark.parametrize("size_hw", [(97, 131), (211, 83)])
def test_boundary_rle_equals_repeated_erosion_of_the_padded_image(size_hw):
    mask = np.zeros(size_hw, np.uint8)
    cv2.ellipse(mask, (40, 60), (70, 35), 20, 0, 360, 1, -1)  # beyond the left border
    distance = boundary_distance(size_hw, 0.05)
    inside = np.pad(mask, 1)
    for _ in range(distance):
        inside = cv2.erode(inside, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    expected = mask - inside[1:-1, 1:-1]
    assert 0 < expected.sum() < mask.sum()
    assert boundary_rle(encoded(mask), 0.05) == encoded(expected)


def test_boundary_rle_reads_every_way_to_write_run_lengths():
    mask = random_blobs(7, (23, 29), 2)
    code = encoded(mask)
    numbers = np.diff(np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=2, append=2))).tolist()
    numbers = numbers if mask[0, 0] == 0 else [0, *numbers]
    for counts in (code["counts"].encode("ascii"), numbers):
        assert boundary_rle({"size": [23, 29], "counts": counts}) == boundary_rle(code)


@pytest.mark.parametrize("value", [0, 1])
def test_boundary_of_an_empty_and_of_a_full_mask(value):
    mask = np.full((11, 13), value, np.uint8)
    assert boundary_rle(encoded(mask)) == encoded(boundary_in_whole_image(mask, 1))


def test_boundary_rle_makes_nothing_as_large_as_the_image():
    # 3.6 * 10^9 pixels would take longer than this test may, if they fit at all.
    side = 60_000
    start = 50_000 * side + 50_000
    counts = [start, *[3, side - 3] * 4]
    counts[-1] = side * side - sum(counts[:-1])
    boundary = boundary_rle({"size": [side, side], "counts": counts})
    assert coco_mask.area(boundary) == 12 and coco_mask.toBbox(boundary).tolist() == [50_000, 50_000, 4, 3]


def test_boundary_rle_refuses_run_lengths_that_do_not_fill_the_image():
    with pytest.raises(AnnotationError, match="add up to height x width = 15, got 14"):
        boundary_rle({"size": [3, 5], "counts": [4, 10]})


@pytest.mark.parametrize(("size_hw", "distance"), [((480, 640), 16), ((3, 4), 1), ((1080, 1920), 44)])
def test_boundary_distance_is_a_fiftieth_of_the_diagonal(size_hw, distance):
    assert boundary_distance(size_hw) == distance


def brute_force_boundary(classes, label, distance):
    boundary = np.zeros(label.shape, bool)
    height, width = label.shape
    for y, x in np.argwhere(label != 255):
        top, bottom, left, right = y - distance, y + distance + 1, x - distance, x + distance + 1
        beyond = top < 0 or left < 0 or bottom > height or right > width
        window = slice(max(top, 0), bottom), slice(max(left, 0), right)
        others = (classes[window] != classes[y, x]) & (label[window] != 255)
        boundary[y, x] = beyond or others.any()
    return boundary


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_boundary_of_labels_equals_the_definition_with_ignored_pixels(size_hw, seed, distance):
    random = np.random.default_rng(seed)
    label, classes = random_blobs(seed, size_hw, 4), random_blobs(seed + 1, size_hw, 4).astype(np.int64)
    label[random.random(size_hw) < 0.1] = 255
    classes[label == 255] = random.integers(-1000, 1000)
    for each in (classes, label):
        expected = brute_force_boundary(each, label, distance)
        assert np.array_equal(boundary_of_labels(each, label, distance), expected)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_boundary_of_labels_is_that_of_each_class_as_a_mask(size_hw, seed, distance):
    label = random_blobs(seed, size_hw, 4)
    boundary = boundary_of_labels(label, label, distance)
    for index in range(4):
        expected = boundary_in_whole_image((label == index).astype(np.uint8), distance)
        assert np.array_equal(boundary & (label == index), expected)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 7))
def test_bands_of_rows_make_the_whole_boundary(size_hw, seed, distance, band):
    label = random_blobs(seed, size_hw, 4)
    label[np.random.default_rng(seed).random(size_hw) < 0.1] = 255
    bands = [boundary_of_labels(label, label, distance, slice(top, top + band)) for top in range(0, size_hw[0], band)]
    assert np.array_equal(np.concatenate(bands), boundary_of_labels(label, label, distance))
