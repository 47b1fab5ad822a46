"""Augmentation and test-time resizing of images with objects; seeds, tiles and checks for every kind of sample.

A sample's parameters depend on (seed, epoch, index) alone: not on the worker that happens to load it, nor on what was
loaded before. Drawing comes first and gives a list of operations; applying them is exact and repeatable.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from swin_dense.conventions import IGNORED_LABEL, IMAGENET_MEAN
from swin_dense.datasets.geometry import (
    Crop,
    Flip,
    Operation,
    Pad,
    Resize,
    draw_crop,
    keep_ratio_size_hw,
    load_albumentations,
    scaled_size_hw,
)
from swin_dense.datasets.instances import Instances
from swin_dense.datasets.tiles import TrainingTile
from swin_dense.errors import ConfigError

# The ImageNet mean as a colour. Published models pad with 0 after normalising, which is the mean colour; padding comes
# before normalising here, so it uses that colour itself.
PAD_RGB = (round(255 * IMAGENET_MEAN[0]), round(255 * IMAGENET_MEAN[1]), round(255 * IMAGENET_MEAN[2]))

# The published "multi-scale crop" schedule of DETR and Swin, all in pixels: an image is resized to one of these short
# edges, a rectangle with sides in this range is cut out, and resized to a short edge of at most 800.
CROP_SHORT_EDGES = (400, 500, 600)
CROP_RANGE = (384, 600)
LARGEST_SHORT_EDGE = 800

InstanceDraw = Callable[[tuple[int, int], np.random.Generator], Sequence[Operation]]
"""Draws the operations for an image of a (height, width)."""


class InstanceTransform:
    """Transforms an image and its objects.

    Build it with `instance_training`, `large_scale_jitter` or `instance_inference`.

    Args:
        draw: draws the operations of one sample.
    """

    def __init__(self, draw: InstanceDraw) -> None:
        self._draw = draw
        # Imported before workers start, so that they need not spend seconds on it each.
        load_albumentations()

    def operations(self, size_hw: tuple[int, int], seed: int) -> list[Operation]:
        """Returns what this seed does to an image of a (height, width), in order, all parameters fixed."""
        return list(self._draw(size_hw, np.random.default_rng(seed)))

    def __call__(self, image: np.ndarray, instances: Instances, seed: int) -> tuple[np.ndarray, Instances]:
        """Transforms one sample.

        Args:
            image: (H, W, 3) uint8 RGB.
            instances: its objects, boxes in its pixels.
            seed: as `sample_seed` gives it.

        Returns:
            new image and objects of its size, without those whose box vanished.
        """
        for operation in self.operations((image.shape[0], image.shape[1]), seed):
            image = operation.image(image)
            instances = operation.instances(instances)
        return image, instances


@dataclass(frozen=True)
class MultiScaleResize:
    """Keeps the ratio; short edge drawn from a list, long edge capped (picklable, so that it can go to workers)."""

    short_edges: tuple[int, ...]
    max_long_edge: int

    def __call__(self, size_hw: tuple[int, int], generator: np.random.Generator) -> Resize:
        """Draws the size for an image of a (height, width)."""
        short_edge = self.short_edges[int(generator.integers(len(self.short_edges)))]
        return Resize(keep_ratio_size_hw(size_hw, (short_edge, self.max_long_edge)))


@dataclass(frozen=True)
class RangeCrop:
    """Cuts out a rectangle whose sides are drawn between two bounds, or the whole side where the image is smaller."""

    min_side: int
    max_side: int

    def __call__(self, size_hw: tuple[int, int], generator: np.random.Generator) -> Crop:
        """Draws the rectangle for an image of a (height, width)."""
        crop_hw = tuple(
            int(generator.integers(min(side, self.min_side), min(side, self.max_side) + 1)) for side in size_hw
        )
        return draw_crop(size_hw, (crop_hw[0], crop_hw[1]), generator)


@dataclass(frozen=True)
class TileDraw:
    """Cuts a tile out of a large image, anywhere with the same probability; one that is no larger stays whole.

    Attributes:
        tile_size: side in pixels.
        least_share: see `TrainingTile`.

    Raises:
        ConfigError: the side is not positive, or the share lies outside 0..1.
    """

    tile_size: int
    least_share: float = 0.5

    def __post_init__(self) -> None:
        require_lengths("tile_size", [self.tile_size])
        require_probability("tile_least_share", self.least_share)

    def __call__(self, size_hw: tuple[int, int], generator: np.random.Generator) -> TrainingTile:
        """Draws the tile of an image of a (height, width)."""
        crop = RangeCrop(self.tile_size, self.tile_size)(size_hw, generator)
        return TrainingTile(crop.top, crop.left, crop.size_hw, self.least_share)


@dataclass(frozen=True)
class SquareJitter:
    """Scales to a drawn multiple of what fits a square, then cuts out or fills up to the square.

    What is filled up shows the mean colour and is background as any other, as published.
    """

    side: int
    scale_range: tuple[float, float]

    def __call__(self, size_hw: tuple[int, int], generator: np.random.Generator) -> list[Operation]:
        """Draws scale and place for an image of a (height, width)."""
        scale = self.side / max(size_hw) * generator.uniform(*self.scale_range)
        resize = Resize(scaled_size_hw(size_hw, scale))
        crop = RangeCrop(self.side, self.side)(resize.size_hw, generator)
        return [resize, crop, Pad((self.side, self.side), PAD_RGB, IGNORED_LABEL)]


@dataclass(frozen=True)
class _TileAndFlip:
    tile: TileDraw | None
    flip_probability: float

    def __call__(
        self, size_hw: tuple[int, int], generator: np.random.Generator
    ) -> tuple[list[Operation], tuple[int, int]]:
        """The operations that come first, and the (height, width) after them."""
        operations: list[Operation] = []
        if self.tile is not None:
            tile = self.tile(size_hw, generator)
            operations.append(tile)
            size_hw = tile.size_hw
        if generator.random() < self.flip_probability:
            operations.append(Flip())
        return operations, size_hw


@dataclass(frozen=True)
class _LargeScaleJitterDraw:
    first: _TileAndFlip
    jitter: SquareJitter

    def __call__(self, size_hw: tuple[int, int], generator: np.random.Generator) -> list[Operation]:
        operations, size_hw = self.first(size_hw, generator)
        return operations + self.jitter(size_hw, generator)


@dataclass(frozen=True)
class _InstanceTrainingDraw:
    first: _TileAndFlip
    resize: MultiScaleResize
    crop_resize: MultiScaleResize | None
    crop: RangeCrop

    def __call__(self, size_hw: tuple[int, int], generator: np.random.Generator) -> list[Operation]:
        operations, size_hw = self.first(size_hw, generator)
        if self.crop_resize is not None and generator.random() < 0.5:
            first = self.crop_resize(size_hw, generator)
            crop = self.crop(first.size_hw, generator)
            operations += [first, crop]
            size_hw = crop.size_hw
        return [*operations, self.resize(size_hw, generator)]


@dataclass(frozen=True)
class _FixedResizeDraw:
    edges: tuple[int, int]

    def __call__(self, size_hw: tuple[int, int], generator: np.random.Generator) -> list[Operation]:
        return [Resize(keep_ratio_size_hw(size_hw, self.edges))]


def instance_training(
    short_edges: Sequence[int],
    max_long_edge: int,
    flip_probability: float = 0.5,
    crop_branch: bool = False,
    crop_short_edges: Sequence[int] | None = None,
    crop_range: tuple[int, int] | None = None,
    tile_size: int | None = None,
    tile_least_share: float = 0.5,
) -> InstanceTransform:
    """Builds the augmentation of the published detectors: flip, then multi-scale resize, optionally by way of a crop.

    Args:
        short_edges: lengths in pixels that the short edge is drawn from, for example 480, 512, … 800.
        max_long_edge: cap of the long edge in pixels, for example 1333.
        flip_probability: probability of mirroring.
        crop_branch: with probability one half, first resize the short edge to one of `crop_short_edges` and cut out a
            rectangle with sides in `crop_range` (the "multi-scale crop" schedule of DETR and Swin).
        crop_short_edges: see `crop_branch`; None takes the published 400, 500 and 600, which belong to a largest short
            edge of 800, in proportion to the largest short edge here.
        crop_range: (least, most), see `crop_branch`; None takes the published 384 to 600 in the same proportion.
        tile_size: side in pixels of a tile that is cut out of the image before everything else; None takes all of it.
        tile_least_share: see `TrainingTile`.

    Raises:
        ConfigError: a length is not positive, a list is empty, the long edge is capped below a short edge, or a
            probability lies outside 0..1.
    """
    require_probability("flip_probability", flip_probability)
    _require_edges("short_edges", short_edges, max_long_edge)
    in_proportion = max(short_edges) / LARGEST_SHORT_EDGE
    if crop_short_edges is None:
        crop_short_edges = [max(1, round(edge * in_proportion)) for edge in CROP_SHORT_EDGES]
    if crop_range is None:
        crop_range = (max(1, round(CROP_RANGE[0] * in_proportion)), max(1, round(CROP_RANGE[1] * in_proportion)))
    if crop_branch:
        _require_edges("crop_short_edges", crop_short_edges, max_long_edge)
    require_lengths("crop_range", crop_range)
    if crop_range[0] > crop_range[1]:
        raise ConfigError(f"augmentation: crop_range must be (least, most), got {crop_range}")
    crop_resize = MultiScaleResize(tuple(crop_short_edges), max_long_edge) if crop_branch else None
    return InstanceTransform(
        _InstanceTrainingDraw(
            _tile_and_flip(tile_size, tile_least_share, flip_probability),
            MultiScaleResize(tuple(short_edges), max_long_edge),
            crop_resize,
            RangeCrop(*crop_range),
        )
    )


def large_scale_jitter(
    side: int = 1024,
    scale_range: tuple[float, float] = (0.1, 2.0),
    flip_probability: float = 0.5,
    tile_size: int | None = None,
    tile_least_share: float = 0.5,
) -> InstanceTransform:
    """Builds large-scale jitter: flip, then a random scale of a square, cut out or filled up to that square.

    The numbers are those of Ghiasi et al., "Simple Copy-Paste" (2021), section 3, and of detectron2's `new_baselines`.
    As there, objects get the bounding boxes of what is left of their masks, and what is filled up is background.

    Args:
        side: of the square in pixels.
        scale_range: the image, ratio kept, is scaled to fit the square times a number from this range.
        flip_probability: probability of mirroring.
        tile_size: side in pixels of a tile that is cut out of the image before everything else; None takes all of it.
        tile_least_share: see `TrainingTile`.

    Raises:
        ConfigError: a length is not positive, a scale is not positive, or a probability lies outside 0..1.
    """
    require_lengths("jitter_size", [side])
    require_probability("flip_probability", flip_probability)
    require_positive_range("jitter_range", scale_range)
    first = _tile_and_flip(tile_size, tile_least_share, flip_probability)
    return InstanceTransform(_LargeScaleJitterDraw(first, SquareJitter(side, scale_range)))


def instance_inference(short_edge: int, max_long_edge: int) -> InstanceTransform:
    """Builds the test-time resize: short edge to a length in pixels, long edge capped, ratio kept.

    Raises:
        ConfigError: a length is not positive, or the cap is below the short edge.
    """
    _require_edges("short_edge", [short_edge], max_long_edge)
    return InstanceTransform(_FixedResizeDraw((short_edge, max_long_edge)))


def _tile_and_flip(tile_size: int | None, tile_least_share: float, flip_probability: float) -> _TileAndFlip:
    tile = None if tile_size is None else TileDraw(tile_size, tile_least_share)
    return _TileAndFlip(tile, flip_probability)


def _require_edges(name: str, short_edges: Sequence[int], max_long_edge: int) -> None:
    require_lengths(name, short_edges)
    require_lengths("max_long_edge", [max_long_edge])
    if max(short_edges) > max_long_edge:
        raise ConfigError(
            f"augmentation: max_long_edge must be at least the largest of {name} ({max(short_edges)}), "
            f"got {max_long_edge}"
        )


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Mixes (seed, epoch, index) into one number in 0..2**64 - 1, so that near inputs give unrelated seeds.

    The mixing step is SplitMix64 (Steele, Lea, Flood 2014).
    """
    state = 0
    for value in (seed, epoch, index):
        state = (state ^ (value & _MASK_64)) + 0x9E3779B97F4A7C15 & _MASK_64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return state


_MASK_64 = 2**64 - 1


def require_lengths(name: str, lengths: Sequence[int]) -> None:
    """Checks a setting of an augmentation.

    Raises:
        ConfigError: there is no length, or one is not a whole number of pixels, at least 1.
    """
    if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
        raise ConfigError(f"augmentation: {name} must be whole numbers of pixels, at least 1, got {tuple(lengths)}")


def require_probability(name: str, value: float) -> None:
    """Checks a setting of an augmentation.

    Raises:
        ConfigError: the value lies outside 0..1.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"augmentation: {name} must lie in 0..1, got {value}")


def require_positive_range(name: str, bounds: tuple[float, float]) -> None:
    """Checks a setting of an augmentation.

    Raises:
        ConfigError: a bound is not positive and finite, or the first is above the second.
    """
    if not 0 < bounds[0] <= bounds[1] < math.inf:
        raise ConfigError(f"augmentation: {name} must be (least, most), both positive, got {bounds}")
