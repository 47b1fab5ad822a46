"""Overlapping tiles of an image that is too large to be seen at once: where they lie, and what their borders mean.

Tiles are rectangles to cut out when they are needed; nothing is copied to disk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from swin_dense.datasets.geometry import Crop, clip_boxes
from swin_dense.datasets.instances import Instances
from swin_dense.errors import ConfigError


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one image, all of one size, in rows and columns.

    Attributes:
        tops: first pixel row of each row of tiles, rising from 0.
        lefts: first pixel column of each column of tiles, rising from 0.
        tile_size_hw: (height, width) of every tile; that of the image where the image is smaller.
    """

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    tile_size_hw: tuple[int, int]

    def tiles(self) -> list[Crop]:
        """Returns the tiles, row by row."""
        return [Crop(top, left, self.tile_size_hw) for top in self.tops for left in self.lefts]


def tile_grid(size_hw: tuple[int, int], tile_size_hw: tuple[int, int], overlap: int) -> TileGrid:
    """Covers an image with as few tiles as overlap enough.

    The first tile touches one border of the image, the last one the other; between them the tiles are spread evenly, so
    that no two neighbours overlap much more than others do.

    Args:
        size_hw: (height, width) of the image.
        tile_size_hw: (height, width) of a tile; a side of the image that is no longer is covered by one tile.
        overlap: pixels that neighbours share at least.

    Raises:
        ConfigError: a tile has no pixel, or neighbours would overlap by all of it.
    """
    if not 0 <= overlap < min(tile_size_hw):
        raise ConfigError(
            f"tiles: tile_overlap must be 0 or more pixels and less than the side of a tile, "
            f"got {overlap} for tiles of {tile_size_hw[0]} x {tile_size_hw[1]}"
        )
    tile_hw = (min(size_hw[0], tile_size_hw[0]), min(size_hw[1], tile_size_hw[1]))
    return TileGrid(_starts(size_hw[0], tile_hw[0], overlap), _starts(size_hw[1], tile_hw[1], overlap), tile_hw)


def _starts(side: int, tile_side: int, overlap: int) -> tuple[int, ...]:
    if side == tile_side:
        return (0,)
    steps = math.ceil((side - tile_side) / (tile_side - overlap))
    return tuple((side - tile_side) * step // steps for step in range(steps + 1))


def blending_weights(starts: Sequence[int], tile_side: int) -> list[np.ndarray]:
    """Weights of the pixels of each tile along one axis: 1 where no neighbour sees them, falling towards a neighbour.

    Where two tiles overlap, the weight of one falls in a straight line as that of the other rises, and both sum to 1.
    A pixel's weight is the product of its weights along both axes; it is positive everywhere.

    Args:
        starts: first pixel of each tile, rising: `TileGrid.tops` or `TileGrid.lefts`.
        tile_side: length of every tile.

    Returns:
        one (tile_side,) float32 array for each tile, values in (0, 1].
    """
    weights = [np.ones(tile_side, np.float32) for _ in starts]
    for index, start in enumerate(starts[1:]):
        shared = starts[index] + tile_side - start
        rising = ((np.arange(shared) + 0.5) / max(shared, 1)).astype(np.float32)
        # Of tiles that overlap by more than half, the middle falls on both sides.
        weights[index][tile_side - shared :] = np.minimum(weights[index][tile_side - shared :], rising[::-1])
        weights[index + 1][:shared] = rising
    return weights


def cut_by_inner_border(
    boxes_xyxy: np.ndarray, tile: Crop, image_size_hw: tuple[int, int], margin: float
) -> np.ndarray:
    """Tells which boxes may go on in the next tile, because they end at a border that is none of the image.

    Args:
        boxes_xyxy: (N, 4) in pixels of the tile.
        tile: where the tile lies in the image.
        image_size_hw: (height, width) of the image.
        margin: a box that ends within so many pixels of the border ends at it.

    Returns:
        (N,) bool.
    """
    (height, width), (image_height, image_width) = tile.size_hw, image_size_hw
    x1, y1, x2, y2 = np.moveaxis(boxes_xyxy, 1, 0)
    return (
        ((x1 < margin) & (tile.left > 0))
        | ((y1 < margin) & (tile.top > 0))
        | ((x2 > width - margin) & (tile.left + width < image_width))
        | ((y2 > height - margin) & (tile.top + height < image_height))
    )


@dataclass(frozen=True)
class TrainingTile(Crop):
    """A rectangle to train on: objects that it cuts too far become regions that take no part.

    What remains of such an object is too little to learn it from, but it is no background either.

    Attributes:
        least_share: an object stays one while at least this share of its box's area remains; 0 keeps all objects, 1
            only those that are not cut.
    """

    least_share: float = 0.5

    def instances(self, instances: Instances) -> Instances:
        """Clips boxes to the rectangle, and marks in `is_crowd` what takes no part."""
        corner = np.array([self.left, self.top] * 2, np.float32)
        remaining = clip_boxes(instances.boxes_xyxy - corner, self.size_hw)
        cut_off = mostly_cut_off(_areas(instances.boxes_xyxy), _areas(remaining), self.least_share)
        return super().instances(replace(instances, is_crowd=instances.is_crowd | cut_off))


def mostly_cut_off(whole_areas: np.ndarray, remaining_areas: np.ndarray, least_share: float) -> np.ndarray:
    """Tells which objects keep less than a share of their areas.

    Args:
        whole_areas: (N,) before the cut.
        remaining_areas: (N,) after it, in the same unit.
        least_share: in 0..1.

    Returns:
        (N,) bool.
    """
    # A ten-thousandth of slack: shifted corners are rounded, up to 1/256 pixel beyond 32768.
    return remaining_areas < (least_share - 1e-4) * whole_areas


def _areas(boxes_xyxy: np.ndarray) -> np.ndarray:
    areas: np.ndarray = np.prod(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], axis=1)
    return areas
