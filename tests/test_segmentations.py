import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from swin_dense.datasets.segmentations import (
    crop_of_run_lengths,
    decode_text_counts,
    draw_run_lengths,
    parse_run_lengths,
    polygon_run_lengths,
)
from swin_dense.errors import AnnotationError

masks = hnp.arrays(np.uint8, st.tuples(st.integers(1, 19), st.integers(1, 23)), elements=st.integers(0, 1))


def draw(runs, size_hw):
    mask = np.zeros(size_hw, np.uint8)
    draw_run_lengths(runs, mask)
    return mask


@given(masks)
def test_crops_are_the_masks_inside_their_bounding_boxes(mask):
    runs = decode_text_counts(coco_mask.encode(np.asfortranarray(mask))["counts"])
    crop, (left, top) = crop_of_run_lengths(runs, mask.shape[0])
    rows, columns = np.nonzero(mask)
    if not len(rows):
        assert crop.shape == (0, 0)
        return
    assert (left, top) == (columns.min(), rows.min()) and crop.dtype == np.uint8
    assert np.array_equal(crop, mask[top : rows.max() + 1, left : columns.max() + 1])


def test_runs_of_no_pixel_count_for_nothing():
    wanted = crop_of_run_lengths(np.array([5, 4, 3]), 3)
    for runs in ([0, 0, 5, 4, 3], [5, 2, 0, 2, 3], [5, 4, 3, 0], [5, 4, 1, 0, 2]):
        crop, corner_xy = crop_of_run_lengths(np.array(runs), 3)
        assert np.array_equal(crop, wanted[0]) and corner_xy == wanted[1] == (1, 0)


@given(masks)
def test_text_counts_round_trip_through_pycocotools(mask):
    text = coco_mask.encode(np.asfortranarray(mask))["counts"]
    for counts in (text, text.decode()):
        runs = parse_run_lengths({"size": list(mask.shape), "counts": counts}, mask.shape)
        assert np.array_equal(draw(runs, mask.shape), mask)


def test_text_counts_of_a_large_mask_round_trip():
    mask = np.zeros((1500, 2003), np.uint8, order="F")
    mask[700:1400, 900:1900:3] = 1
    text = coco_mask.encode(mask)["counts"]
    assert np.array_equal(draw(parse_run_lengths({"size": [1500, 2003], "counts": text}, mask.shape), mask.shape), mask)


@given(masks)
def test_counts_as_numbers_equal_counts_as_text(mask):
    runs = decode_text_counts(coco_mask.encode(np.asfortranarray(mask))["counts"])
    again = parse_run_lengths({"size": list(mask.shape), "counts": runs.tolist()}, mask.shape)
    assert np.array_equal(again, runs)


@given(st.text(alphabet=st.characters(max_codepoint=300), max_size=40))
def test_any_text_is_decoded_or_refused(text):
    try:
        parse_run_lengths({"size": [7, 11], "counts": text}, (7, 11))
    except AnnotationError as error:
        assert "counts" in str(error)


# Raised inside pycocotools' own decode.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@given(st.lists(st.tuples(st.floats(-20, 60), st.floats(-20, 60)), min_size=3, max_size=9))
def test_polygons_have_pycocotools_raster(points):
    polygon = np.array(points).ravel()
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon.tolist()], 31, 37)))
    assert np.array_equal(draw(polygon_run_lengths([polygon], (31, 37)), (31, 37)), expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"counts": [77]}, r"needs the keys size and counts, got \['counts'\]"),
        ({"size": [11, 7], "counts": [77]}, r"size must be the image's \[height, width\] \[7, 11\], got \[11, 7\]"),
        ({"size": [1000000, 1000000], "counts": "0"}, "size must be"),
        ({"size": [7, 11], "counts": [70]}, "height x width = 77, got 70"),
        ({"size": [7, 11], "counts": [80, -3]}, r"negative run length \(-3\)"),
        ({"size": [7, 11], "counts": [2**39, 2**39]}, "height x width = 77, got"),
        ({"size": [7, 11], "counts": ["77"]}, "text or a list of whole numbers"),
        ({"size": [7, 11], "counts": None}, "text or a list of whole numbers, got None"),
        ({"size": [7, 11], "counts": "garbage äöü"}, "characters that COCO's run-length text does not use"),
        ({"size": [7, 11], "counts": ""}, "is empty"),
        ({"size": [7, 11], "counts": "ooooooooooooo0"}, "too large for any picture"),
        ({"size": [7, 11], "counts": "`"}, "cut short"),
    ],
)
def test_wrong_run_lengths_are_refused(segmentation, message):
    with pytest.raises(AnnotationError, match=message):
        parse_run_lengths(segmentation, (7, 11))
