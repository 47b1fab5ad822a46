"""Polygons and boxes by the million, in numpy: crossings, areas, extents."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

MAX_CORNERS = 20_000
"""A polygon with more corners is not searched for crossings: the pairs of its edges could be billions."""

# Edges that pass each other by less are drawn the same either way; annotators' corners repeat and touch.
_LEAST_CROSSING_PX = 0.1
_EDGES_AT_ONCE = 100_000
_PAIRS_AT_ONCE = 2_000_000
_NUMBERS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class PolygonMeasures:
    """What is known of polygons without their corners.

    Attributes:
        num_corners: (P,).
        extents_xyxy: (P, 4) boxes around them.
        areas: (P,) as `polygon_areas` gives them.
        crossing: (P,) bool, as `crossing_polygons` gives them.
    """

    num_corners: np.ndarray
    extents_xyxy: np.ndarray
    areas: np.ndarray
    crossing: np.ndarray


class PolygonMeasurer:
    """Measures polygons as they come, so that the corners of a large file are never all held twice."""

    def __init__(self) -> None:
        self._numbers = array("d")
        self._num_corners = array("q")
        self._measured: list[PolygonMeasures] = []

    def add(self, polygon: array) -> None:
        """Takes a polygon, x and y in turn, finite."""
        self._numbers.extend(polygon)
        self._num_corners.append(len(polygon) // 2)
        if len(self._numbers) >= _NUMBERS_AT_ONCE:
            self._measure()

    def measures(self) -> PolygonMeasures:
        """All polygons so far, in their order."""
        self._measure()
        return PolygonMeasures(
            np.concatenate([some.num_corners for some in self._measured]),
            np.concatenate([some.extents_xyxy for some in self._measured]),
            np.concatenate([some.areas for some in self._measured]),
            np.concatenate([some.crossing for some in self._measured]),
        )

    def _measure(self) -> None:
        corners = np.array(self._numbers, np.float64).reshape(-1, 2)
        counts = np.array(self._num_corners, np.int64)
        found = (polygon_extents(corners, counts), polygon_areas(corners, counts), crossing_polygons(corners, counts))
        self._measured.append(PolygonMeasures(counts, *found))
        self._numbers, self._num_corners = array("d"), array("q")


def crossing_polygons(corners: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Tells which polygons cross themselves.

    Two edges cross where each has its ends on both sides of the other, 0.1 px or more away from it; touching does not
    count.

    Args:
        corners: (N, 2) x and y of the corners of all polygons in turn, finite.
        counts: (P,) corners of each polygon.

    Returns:
        (P,) bool; False for a polygon of more than `MAX_CORNERS`.
    """
    crossing = np.zeros(len(counts), np.bool_)
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        start = ends[first] - counts[first]
        last = max(first + 1, int(np.searchsorted(ends, start + _EDGES_AT_ONCE, "right")))
        small = np.where(counts[first:last] <= MAX_CORNERS, counts[first:last], 0)
        kept = np.repeat(small > 0, counts[first:last])
        numbers = _crossing_numbers(corners[start : ends[last - 1]][kept], small)
        crossing[first + numbers] = True
        first = last
    return crossing


def polygon_areas(corners: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Areas (P,) of polygons by the shoelace formula; of one that crosses itself, parts cancel."""
    following = corners[_next_corner(counts)]
    # From each polygon's first corner, so that large coordinates cost no digits.
    origin = np.repeat(corners[np.cumsum(counts) - counts], counts, axis=0)
    products = _cross(corners - origin, following - origin)
    return np.abs(np.bincount(np.repeat(np.arange(len(counts)), counts), products, len(counts))) / 2


def polygon_extents(corners: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Boxes (P, 4) x1, y1, x2, y2 around polygons, each of one corner or more."""
    if not len(counts):
        return np.zeros((0, 4))
    starts = np.cumsum(counts) - counts
    return np.concatenate([np.minimum.reduceat(corners, starts), np.maximum.reduceat(corners, starts)], axis=1)


def paired_iou(boxes_xyxy: np.ndarray, others_xyxy: np.ndarray) -> np.ndarray:
    """Intersection over union of each box (N, 4) with the one in the same row of the others; 0 for empty ones."""
    sides = np.minimum(boxes_xyxy[:, 2:], others_xyxy[:, 2:]) - np.maximum(boxes_xyxy[:, :2], others_xyxy[:, :2])
    shared = sides.clip(min=0).prod(axis=1)
    union = sum((box[:, 2:] - box[:, :2]).clip(min=0).prod(axis=1) for box in (boxes_xyxy, others_xyxy)) - shared
    return np.divide(shared, union, out=np.zeros(len(shared)), where=union > 0)


def _crossing_numbers(corners: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers of the polygons that cross themselves, perhaps repeated."""
    polygon = np.repeat(np.arange(len(counts)), counts)
    ahead = corners[_next_corner(counts)]
    left, right = np.minimum(corners[:, 0], ahead[:, 0]), np.maximum(corners[:, 0], ahead[:, 0])
    order = np.lexsort((left, polygon))
    polygon, left, right = polygon[order], left[order], right[order]
    tails, heads = corners[order], ahead[order]
    low, high = np.minimum(tails[:, 1], heads[:, 1]), np.maximum(tails[:, 1], heads[:, 1])
    # One axis for all polygons, each with a stretch of its own: an edge can only meet those that begin before its end.
    stretch = float(np.ptp(corners)) + 1 if corners.size else 1.0
    origin = left.min(initial=0)
    begins = polygon * stretch + (left - origin)
    partners = np.searchsorted(begins, polygon * stretch + (right - origin), "right") - np.arange(len(begins)) - 1
    partners = partners.clip(min=0)
    found = []
    totals = np.cumsum(partners)
    first = 0
    while first < len(partners):
        done = totals[first] - partners[first]
        last = max(first + 1, int(np.searchsorted(totals, done + _PAIRS_AT_ONCE, "right")))
        one = np.repeat(np.arange(first, last), partners[first:last])
        other = (
            one
            + 1
            + np.arange(len(one))
            - np.repeat(totals[first:last] - partners[first:last] - done, partners[first:last])
        )
        near = (low[one] < high[other]) & (low[other] < high[one])
        one, other = one[near], other[near]
        crosses = _separates(tails[one], heads[one], tails[other], heads[other])
        crosses &= _separates(tails[other], heads[other], tails[one], heads[one])
        found.append(polygon[one[crosses & (polygon[one] == polygon[other])]])
        first = last
    return np.concatenate([np.zeros(0, np.int64), *found])


def _separates(tails: np.ndarray, heads: np.ndarray, points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether the line through each edge has the two points clearly on either side."""
    direction = heads - tails
    side, other_side = _cross(direction, points - tails), _cross(direction, others - tails)
    least = _LEAST_CROSSING_PX * np.hypot(direction[:, 0], direction[:, 1])
    return (side * other_side < 0) & (np.minimum(np.abs(side), np.abs(other_side)) >= least)


def _next_corner(counts: np.ndarray) -> np.ndarray:
    following = np.arange(1, counts.sum() + 1)
    ends = np.cumsum(counts)
    following[ends[counts > 0] - 1] = (ends - counts)[counts > 0]
    return following


def _cross(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]
