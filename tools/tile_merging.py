"""From the objects found in overlapping tiles to the objects of the image.

Two tiles see the zone that they share independently of each other: where they found the same object, its masks agree
in there. Work and memory follow the outlines of the objects; no mask of the image's size ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_dense.datasets.geometry import Crop
from swin_dense.datasets.segmentations import decode_text_counts
from swin_dense.datasets.tiles import cut_by_inner_border
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.windows import SizeHW

SAME_OBJECT_IOU = 0.5
"""Two masks are of one object from this overlap on, as in the published suppression and in the loosest AP."""
FRAGMENT_SHARE = 0.5
"""A part that was left alone is dropped where a better object covers this share of it."""
CUT_MARGIN = 1 / 32
"""A box ends at a border within this share of the tile's side: about one cell (1 / 28) of a mask as large as it."""

MaskCode = dict[str, Any]


def merge_predictions(
    predictions: Sequence[InstancePrediction],
    tiles: Sequence[Crop],
    size_hw: SizeHW,
    max_detections: int | None = None,
) -> InstancePrediction:
    """The objects of an image from those of its tiles.

    Parts of one class whose masks agree in the zone that their tiles share are one object, with the highest of their
    scores; each tile gives it one part at most, and the best agreement comes first. Where a tile saw all of the object,
    its part is taken as it is; else all parts are united. A part that a border cut and that found no other part is
    dropped where a better object of its class, from other tiles, covers most of it. What one tile keeps apart stays
    apart. One tile alone comes back as it is.

    Args:
        predictions: Of each tile, in pixels of the tile.
        tiles: Where each tile lies.
        size_hw: (H, W) of the image.
        max_detections: The most objects, best first; None keeps all.
    """
    parts = _Parts.of_tiles(predictions, tiles, size_hw)
    objects = [_united(parts, members) for members in _same_objects(parts, tiles, size_hw)]
    objects.sort(key=lambda found: -found.score)  # stable: what came first stays first
    kept = _without_fragments(objects, parts)[:max_detections]
    return InstancePrediction(
        np.array([found.box_xyxy for found in kept], np.float32).reshape(-1, 4),
        np.array([found.label for found in kept], np.int64),
        np.array([found.score for found in kept], np.float32),
        [found.mask for found in kept],
    )


@dataclass(frozen=True)
class _Parts:
    """All detections of all tiles, in pixels of the image: row i of every field is part i, tile after tile."""

    boxes_xyxy: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: list[MaskCode]
    tile_numbers: np.ndarray
    is_cut: np.ndarray

    @classmethod
    def of_tiles(cls, predictions: Sequence[InstancePrediction], tiles: Sequence[Crop], size_hw: SizeHW) -> _Parts:
        boxes, cut, masks = [], [], []
        for prediction, tile in zip(predictions, tiles, strict=True):
            boxes.append(prediction.boxes_xyxy + np.array([tile.left, tile.top] * 2, np.float32))
            margin = CUT_MARGIN * min(tile.size_hw)
            cut.append(cut_by_inner_border(prediction.boxes_xyxy, tile, size_hw, margin))
            masks += [move_mask(code, tile.top, tile.left, size_hw) for code in prediction.masks_rle]
        counts = [len(prediction.scores) for prediction in predictions]
        return cls(
            np.concatenate(boxes),
            np.concatenate([prediction.labels for prediction in predictions]),
            np.concatenate([prediction.scores for prediction in predictions]),
            masks,
            np.repeat(np.arange(len(tiles)), counts),
            np.concatenate(cut),
        )


@dataclass(frozen=True)
class _Object:
    box_xyxy: np.ndarray
    label: int
    score: float
    mask: MaskCode
    members: list[int]


def _same_objects(parts: _Parts, tiles: Sequence[Crop], size_hw: SizeHW) -> list[list[int]]:
    """The parts of each object, by their numbers; the best agreements are made first, one part from each tile."""
    agreements = sorted(_agreements(parts, tiles, size_hw), key=lambda match: -match[0])
    members = {part: [part] for part in range(len(parts.scores))}
    group_of = list(members)
    for _, first, second in agreements:
        one, other = group_of[first], group_of[second]
        if set(parts.tile_numbers[members[one]]) & set(parts.tile_numbers[members[other]]):
            continue  # the same object already, or two that a tile told apart
        members[one] += members.pop(other)
        for part in members[one]:
            group_of[part] = one
    return [sorted(group) for group in members.values()]


def _agreements(parts: _Parts, tiles: Sequence[Crop], size_hw: SizeHW) -> Iterator[tuple[float, int, int]]:
    """(IoU in the shared zone, part, part) of all parts of one class from two tiles that may be one object."""
    from pycocotools import mask as coco_mask

    starts = np.searchsorted(parts.tile_numbers, np.arange(len(tiles) + 1))
    for *pair, zone in _shared_zones(tiles):
        corners_xyxy = np.array([zone.left, zone.top, zone.left + zone.size_hw[1], zone.top + zone.size_hw[0]])
        rows, others = (
            starts[tile] + np.flatnonzero(_intersect(parts.boxes_xyxy[starts[tile] : starts[tile + 1]], corners_xyxy))
            for tile in pair
        )
        if not len(rows) or not len(others):
            continue
        zone_mask = move_mask(_full_mask(zone.size_hw), zone.top, zone.left, size_hw)
        seen, seen_by_other = (
            [coco_mask.merge([parts.masks[part], zone_mask], intersect=True) for part in found.tolist()]
            for found in (rows, others)
        )
        overlaps = coco_mask.iou(seen, seen_by_other, [0] * len(others))
        overlaps[parts.labels[rows][:, None] != parts.labels[others]] = 0
        for first, second in np.argwhere(overlaps >= SAME_OBJECT_IOU):
            yield float(overlaps[first, second]), int(rows[first]), int(others[second])


def _shared_zones(tiles: Sequence[Crop]) -> Iterator[tuple[int, int, Crop]]:
    """Two tiles by their numbers, and the rectangle that both see, for all that share one."""
    tops, lefts = np.array([tile.top for tile in tiles]), np.array([tile.left for tile in tiles])
    bottoms, rights = np.array([[tile.top + tile.size_hw[0], tile.left + tile.size_hw[1]] for tile in tiles]).T
    for one in range(len(tiles)):
        top, left = np.maximum(tops, tops[one]), np.maximum(lefts, lefts[one])
        bottom, right = np.minimum(bottoms, bottoms[one]), np.minimum(rights, rights[one])
        for other in np.flatnonzero((bottom > top) & (right > left) & (np.arange(len(tiles)) > one)).tolist():
            size_hw = (int(bottom[other] - top[other]), int(right[other] - left[other]))
            yield one, other, Crop(int(top[other]), int(left[other]), size_hw)


def _united(parts: _Parts, members: list[int]) -> _Object:
    from pycocotools import mask as coco_mask

    by_score = sorted(members, key=lambda part: -parts.scores[part])
    seen_whole = [part for part in by_score if not parts.is_cut[part]]
    used = seen_whole[:1] or by_score
    masks = [parts.masks[part] for part in used]
    mask = masks[0] if len(masks) == 1 else _as_text(coco_mask.merge(masks))
    boxes = parts.boxes_xyxy[used]
    box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    return _Object(box, int(parts.labels[by_score[0]]), float(parts.scores[by_score[0]]), mask, members)


def _without_fragments(objects: Sequence[_Object], parts: _Parts) -> list[_Object]:
    """Drops cut parts that a better object covers; objects come by falling score."""
    from pycocotools import mask as coco_mask

    boxes = np.array([found.box_xyxy for found in objects]).reshape(-1, 4)
    labels = np.array([found.label for found in objects])
    tile_numbers = [set(parts.tile_numbers[found.members]) for found in objects]
    is_kept = np.ones(len(objects), np.bool_)
    for rank, found in enumerate(objects):
        if len(found.members) > 1 or not parts.is_cut[found.members[0]]:
            continue
        better = is_kept[:rank] & (labels[:rank] == found.label) & _intersect(boxes[:rank], found.box_xyxy)
        covering = [
            objects[row].mask for row in np.flatnonzero(better).tolist() if not tile_numbers[row] & tile_numbers[rank]
        ]
        if covering:
            # To a "crowd" the overlap is measured as a share of the first mask.
            shares = coco_mask.iou([found.mask], covering, [1] * len(covering))
            is_kept[rank] = shares.max() < FRAGMENT_SHARE
    return [objects[row] for row in np.flatnonzero(is_kept).tolist()]


def _intersect(boxes_xyxy: np.ndarray, box_xyxy: np.ndarray) -> np.ndarray:
    low, high = np.maximum(boxes_xyxy[:, :2], box_xyxy[:2]), np.minimum(boxes_xyxy[:, 2:], box_xyxy[2:])
    overlaps: np.ndarray = (low < high).all(axis=1)
    return overlaps


def move_mask(code: MaskCode, top: int, left: int, size_hw: SizeHW) -> MaskCode:
    """A mask in another frame, where what lies outside is cut off; runs are moved, no pixel is drawn.

    Args:
        code: {"size": [h, w], "counts": str}.
        top: Where row 0 of the mask lies in the new frame; negative above it.
        left: Where column 0 lies; negative left of it.
        size_hw: (H, W) of the new frame.

    Returns:
        {"size": [H, W], "counts": str}, as encoding the moved pixels gives it.
    """
    from pycocotools import mask as coco_mask

    height, width = size_hw
    old_height = code["size"][0]
    runs = decode_text_counts(code["counts"])
    starts, ends = np.cumsum(runs)[: len(runs) // 2 * 2].reshape(-1, 2).T
    # Run lengths go down the columns: each run is cut where it goes on in the next one.
    first_columns = starts // old_height
    pieces = (ends - 1) // old_height - first_columns + 1
    run = np.repeat(np.arange(len(starts)), pieces)
    column = first_columns[run] + np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first_row = np.maximum(starts[run] - column * old_height, 0) + top
    end_row = np.minimum(ends[run] - column * old_height, old_height) + top
    column, first_row, end_row = column + left, first_row.clip(0, height), end_row.clip(0, height)
    inside = (column >= 0) & (column < width) & (end_row > first_row)
    bounds = np.stack([column * height + first_row, column * height + end_row], axis=1)[inside]
    # An end that is a start as well is none: the run goes on in the next column of the new frame.
    edges, times = np.unique(bounds, return_counts=True)
    edges = edges[times == 1]
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(edges) and not counts[-1]:
        counts = counts[:-1]
    return _as_text(coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width))


def _full_mask(size_hw: SizeHW) -> MaskCode:
    from pycocotools import mask as coco_mask

    return _as_text(coco_mask.frPyObjects({"size": list(size_hw), "counts": [0, size_hw[0] * size_hw[1]]}, *size_hw))


def _as_text(code: MaskCode) -> MaskCode:
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}
