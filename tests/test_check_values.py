import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swin_dense.datasets.check_values import id_for_report, mask_box, read_area, read_box, read_id, read_segmentation

SIZE_HW = (41, 67)


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


@pytest.mark.parametrize("value", [None, 1.0, "1", True, 2**63, [], {}])
def test_only_whole_numbers_of_64_bits_are_ids(value):
    assert read_id(value) is None and read_id(-7) == -7


def test_boxes_and_areas_are_finite():
    assert read_box([1, 2.5, 0, 3]) == ([1.0, 2.5, 0.0, 3.0], "")
    for value in ([1, 2, 3], None, [1, 2, 3, 10**400], [1, 2, -3, 4], [1, 2, float("inf"), 3], {"x": 1}):
        box, reason = read_box(value)
        assert box is None and reason.startswith("bbox")
    assert read_area(3) == 3.0 and read_area(0) == 0.0
    assert all(read_area(value) is None for value in (-1, float("nan"), 10**400, "3", None, [3]))


def test_ids_are_reported_as_they_are_and_anything_else_as_short_text():
    assert id_for_report(7) == 7 and id_for_report(None) is None
    assert id_for_report(7.0) == "7.0" and id_for_report("7") == "'7'" and len(id_for_report("x" * 5000)) < 99


def test_usable_polygons_survive_their_neighbours():
    found = read_segmentation([[1, 2], square(3, 5, 11), "x", square(20, 5, 7)], SIZE_HW)
    assert [kind for kind, _ in found.faults] == ["polygon-short", "polygon-invalid"]
    assert [polygon.tolist() for polygon in found.polygons] == [square(3, 5, 11), square(20, 5, 7)]
    assert not read_segmentation([[1, 2]], SIZE_HW).is_usable


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_box_of_run_lengths_is_that_of_the_mask(data):
    height, width = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(width, height).T
    changes = np.flatnonzero(np.diff([0, *bits, 1 - bits[-1]]))
    runs = np.diff([0, *changes])
    box = mask_box(runs, height)
    rows, columns = np.nonzero(mask)
    if len(rows):
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    else:
        assert np.isnan(box).all()
