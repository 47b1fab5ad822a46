"""Prediction of images of any size in overlapping tiles, cut out one after the other and merged as they come.

    image (H, W, 3) -> tile (h, w, 3) -> model -> class scores, blended into the label map row by row of tiles
                                               -> objects, moved into the image and merged across borders

Beside the image and the result, memory holds one tile and what later tiles still touch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swin_dense.datasets.geometry import Crop, Resize, scaled_size_hw
from swin_dense.datasets.tiles import TileGrid, blending_weights, tile_grid
from swin_dense.errors import ConfigError
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.recipe import InferenceSettings
from swin_dense.tools.tile_merging import merge_predictions
from swin_dense.windows import SizeHW


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        side: Of a tile, in pixels of the image.
        overlap: Of neighbours at least, in pixels of the image.
        scale: The model sees each tile this many times as large; 1 at the image's own pixels.

    Raises:
        ConfigError: A number is out of range.
    """

    side: int
    overlap: int
    scale: float

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"tiles: tile_scale must be more than 0, got {self.scale}")
        self.grid((1, 1))  # refuses a wrong overlap now, and not after hours of training

    def grid(self, size_hw: SizeHW) -> TileGrid:
        """The tiles of an image of (H, W)."""
        return tile_grid(size_hw, (self.side, self.side), self.overlap)

    def cut(self, image: np.ndarray, tile: Crop) -> Tensor:
        """One tile of an image (H, W, 3) as the model sees it: (3, h, w) uint8."""
        pixels = tile.image(image)
        if self.scale != 1:
            pixels = Resize(scaled_size_hw(tile.size_hw, self.scale)).image(pixels)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def tiling_of(settings: InferenceSettings) -> Tiling | None:
    """The tiling of a recipe, or None where images are predicted whole.

    Raises:
        ConfigError: A number is out of range.
    """
    if settings.tile_size is None:
        return None
    return Tiling(settings.tile_size, settings.tile_overlap, settings.tile_scale)


@torch.inference_mode()
def label_tiles(
    image: np.ndarray,
    tiling: Tiling,
    scores_of: Callable[[Tensor, SizeHW], Tensor],
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """The class of each pixel, from scores that are blended where tiles overlap.

    Only the scores of a strip are kept from one row of tiles to the next: K x overlap x W floats on the CPU. The
    weights need not be divided by their sum: that changes no maximum.

    Args:
        image: (H, W, 3) uint8 RGB.
        tiling: How to cut it.
        scores_of: A tile (3, h, w) and the (height, width) wanted to (K, height, width) class scores, K <= 256.
        labels: (H, W) unsigned integers to write into, such as a `numpy.memmap`; None makes uint8 ones.

    Returns:
        The labels, (H, W). Where one tile covers the image they are the scores' own maxima, bit for bit.
    """
    size_hw = (image.shape[0], image.shape[1])
    grid = tiling.grid(size_hw)
    height, width = grid.tile_size_hw
    row_weights = blending_weights(grid.tops, height)
    column_weights = blending_weights(grid.lefts, width)
    # How much of a tile no later row or column touches.
    own_heights = np.diff([*grid.tops, size_hw[0]]).tolist()
    own_widths = np.diff([*grid.lefts, size_hw[1]]).tolist()
    strip_height = height - min(own_heights)
    if labels is None:
        labels = np.empty(size_hw, np.uint8)
    strip = torch.empty(0)
    for row, top in enumerate(grid.tops):
        beside = torch.empty(0)
        for column, left in enumerate(grid.lefts):
            tile = Crop(top, left, grid.tile_size_hw)
            weights = torch.from_numpy(row_weights[row][:, None] * column_weights[column])
            scores = scores_of(tiling.cut(image, tile), tile.size_hw)
            scores = scores * weights.to(scores)
            if row == column == 0:
                strip = scores.new_empty(len(scores), strip_height, size_hw[1], device="cpu")
            if column:
                scores[:, :, : beside.shape[2]] += beside
            own_height, own_width = own_heights[row], own_widths[column]
            beside = scores[:, :, own_width:]
            scores = scores[:, :, :own_width]
            columns = slice(left, left + own_width)
            if row:
                above = grid.tops[row - 1] + height - top
                scores[:, :above] += strip[:, :above, columns].to(scores)
            labels[top : top + own_height, columns] = scores[:, :own_height].argmax(dim=0).cpu().numpy()
            strip[:, : height - own_height, columns] = scores[:, own_height:].cpu()
    return labels


def detect_tiles(
    image: np.ndarray,
    tiling: Tiling,
    detect: Callable[[Tensor, SizeHW], InstancePrediction],
    max_detections: int | None = None,
) -> InstancePrediction:
    """The objects of an image from those of its tiles; see `merge_predictions`.

    Args:
        image: (H, W, 3) uint8 RGB.
        tiling: How to cut it.
        detect: A tile (3, h, w) and the (height, width) of its frame to the objects in that frame.
        max_detections: The most objects, best first; None keeps all.
    """
    size_hw = (image.shape[0], image.shape[1])
    tiles = tiling.grid(size_hw).tiles()
    predictions = [detect(tiling.cut(image, tile), tile.size_hw) for tile in tiles]
    return merge_predictions(predictions, tiles, size_hw, max_detections)
