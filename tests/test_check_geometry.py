from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swin_dense.datasets import check_geometry
from swin_dense.datasets.check_geometry import (
    PolygonMeasurer,
    crossing_polygons,
    paired_iou,
    polygon_areas,
    polygon_extents,
)

SQUARE = [(0, 0), (7, 0), (7, 7), (0, 7)]
BOWTIE = [(0, 0), (7, 7), (7, 0), (0, 7)]
STAR = [(10 + 10 * np.cos(0.8 * np.pi * k), 10 + 10 * np.sin(0.8 * np.pi * k)) for k in range(5)]
KEYHOLE = [(0, 0), (9, 0), (9, 9), (0, 9), (0, 5), (3, 5), (3, 6), (6, 6), (6, 3), (3, 3), (3, 5), (0, 5)]
SPIKE = [(0, 0), (7, 0), (7, 7), (3, 7), (3, 12), (3, 7), (0, 7)]
REPEATED = [(0, 0), (0, 0), (7, 0), (7, 7), (7, 7), (0, 7), (0, 0)]
SHALLOW = [(0, 0), (7, 0), (7, 7), (3, -0.05), (0, 7)]


def flat(polygons):
    counts = np.array([len(polygon) for polygon in polygons], np.int64)
    return np.concatenate([np.asarray(polygon, float).reshape(-1, 2) for polygon in polygons]), counts


@pytest.mark.parametrize(
    ("polygon", "crosses"),
    [(SQUARE, 0), (BOWTIE, 1), (STAR, 1), (KEYHOLE, 0), (SPIKE, 0), (REPEATED, 0), (SHALLOW, 0), ([(1, 1)] * 3, 0)],
)
def test_crossing_is_found_and_touching_is_none(polygon, crosses):
    assert crossing_polygons(*flat([polygon])).tolist() == [bool(crosses)]
    moved = np.asarray(polygon, float)[::-1] + np.array([1234.5, -77.25])
    assert crossing_polygons(*flat([moved])).tolist() == [bool(crosses)]


def crosses_by_definition(polygon):
    def side(a, b, c):
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    def separates(a, b, c, d):
        one, other = side(a, b, c), side(a, b, d)
        return one * other < 0 and min(abs(one), abs(other)) >= 0.1 * np.hypot(b[0] - a[0], b[1] - a[1])

    edges = list(zip(polygon, polygon[1:] + polygon[:1], strict=True))
    pairs = ((one, other) for number, one in enumerate(edges) for other in edges[:number])
    return any(separates(*one, *other) and separates(*other, *one) for one, other in pairs)


@settings(max_examples=100, deadline=None)
@given(
    polygons=st.lists(
        st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=8), min_size=1, max_size=7
    )
)
def test_crossings_of_many_polygons_are_those_of_each_pair_of_edges(polygons):
    assert crossing_polygons(*flat(polygons)).tolist() == [crosses_by_definition(polygon) for polygon in polygons]


def test_crossings_do_not_depend_on_how_many_are_looked_at_at_once(monkeypatch):
    random = np.random.default_rng(0)
    polygons = [random.integers(0, 40, (count, 2)) for count in random.integers(3, 6, 57)]
    expected = crossing_polygons(*flat(polygons))
    assert 0 < expected.sum() < len(polygons)
    monkeypatch.setattr(check_geometry, "_EDGES_AT_ONCE", 11)
    monkeypatch.setattr(check_geometry, "_PAIRS_AT_ONCE", 3)
    assert (crossing_polygons(*flat(polygons)) == expected).all()


def test_polygons_of_too_many_corners_are_passed_by(monkeypatch):
    monkeypatch.setattr(check_geometry, "MAX_CORNERS", 4)
    assert crossing_polygons(*flat([STAR, BOWTIE, STAR, SQUARE])).tolist() == [False, True, False, False]


def test_areas_and_extents_are_those_of_each_alone():
    random = np.random.default_rng(1)
    polygons = [random.uniform(-50, 90, (count, 2)) for count in (3, 7, 4, 11)]
    x_y = [(polygon[:, 0], polygon[:, 1]) for polygon in polygons]
    shoelace = [abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 for x, y in x_y]
    assert polygon_areas(*flat(polygons)) == pytest.approx(shoelace)
    extents = [[*polygon.min(axis=0), *polygon.max(axis=0)] for polygon in polygons]
    assert polygon_extents(*flat(polygons)).tolist() == extents
    nothing = np.zeros((0, 2)), np.zeros(0, np.int64)
    assert len(polygon_areas(*nothing)) == len(polygon_extents(*nothing)) == len(crossing_polygons(*nothing)) == 0


def test_iou_is_that_of_drawn_boxes():
    random = np.random.default_rng(2)
    low, size = random.integers(0, 9, (2, 2, 13, 2))
    one, other = np.concatenate([low, low + size], axis=2)
    for box, second, iou in zip(one, other, paired_iou(one.astype(float), other.astype(float)), strict=True):
        drawn = np.zeros((2, 20, 20), bool)
        for canvas, (x1, y1, x2, y2) in zip(drawn, (box, second), strict=True):
            canvas[y1:y2, x1:x2] = True
        assert iou == pytest.approx(drawn.all(axis=0).sum() / max(1, drawn.any(axis=0).sum()))
    empty = np.zeros((1, 4))
    assert paired_iou(empty, empty).tolist() == [0.0]


@pytest.mark.parametrize("numbers_at_once", [1, 13, 16, 10**6])
def test_polygons_measured_as_they_come_are_those_measured_together(numbers_at_once, monkeypatch):
    monkeypatch.setattr(check_geometry, "_NUMBERS_AT_ONCE", numbers_at_once)
    polygons = [SQUARE, BOWTIE, STAR, KEYHOLE, SPIKE, REPEATED, SHALLOW, [(1, 1)] * 3]
    measurer = PolygonMeasurer()
    for polygon in polygons:
        measurer.add(array("d", np.ravel(polygon)))
    measures, (corners, counts) = measurer.measures(), flat(polygons)
    assert (measures.num_corners == counts).all()
    assert (measures.extents_xyxy == polygon_extents(corners, counts)).all()
    assert (measures.areas == polygon_areas(corners, counts)).all()
    assert (measures.crossing == crossing_polygons(corners, counts)).all()


def test_no_polygon_has_no_measures():
    measures = PolygonMeasurer().measures()
    assert measures.extents_xyxy.shape == (0, 4) and len(measures.areas) == len(measures.crossing) == 0
