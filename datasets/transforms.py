"""Training augmentation and test-time resizing, every random number drawn from the sample's own seed.

A sample's parameters depend on (seed, epoch, index) alone: not on the worker that happens to load it, nor on what was
loaded before. Drawing comes first and gives a list of operations; applying them is exact and repeatable.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from swin_dense.conventions import IGNORED_LABEL, IMAGENET_MEAN
from swin_dense.datasets.geometry import (
    Crop,
    Flip,
    Operation,
    Pad,
    Resize,
    keep_ratio_size_hw,
    load_albumentations,
    scaled_size_hw,
)
from swin_dense.datasets.instances import Instances
from swin_dense.datasets.photometric import draw_photometric
from swin_dense.datasets.tiles import TrainingTile
from swin_dense.errors import ConfigError

# The ImageNet mean as a colour. Published models pad with 0 after normalising, which is the mean colour; padding comes
# before normalising here, so it uses that colour itself.
PAD_RGB = (round(255 * IMAGENET_MEAN[0]), round(255 * IMAGENET_MEAN[1]), round(255 * IMAGENET_MEAN[2]))

_CROP_TRIES = 10
_PUBLISHED_SHORT_EDGE = 800

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
        return _draw_crop(size_hw, (crop_hw[0], crop_hw[1]), generator)


@dataclass(frozen=True)
class TileDraw:
    """Cuts a tile out of a large image, anywhere with the same probability; one that is no larger stays whole."""

    tile_size: int
    least_share: float

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
    _require_probability("flip_probability", flip_probability)
    _require_edges("short_edges", short_edges, max_long_edge)
    in_proportion = max(short_edges) / _PUBLISHED_SHORT_EDGE
    if crop_short_edges is None:
        crop_short_edges = [max(1, round(edge * in_proportion)) for edge in (400, 500, 600)]
    if crop_range is None:
        crop_range = (max(1, round(384 * in_proportion)), max(1, round(600 * in_proportion)))
    if crop_branch:
        _require_edges("crop_short_edges", crop_short_edges, max_long_edge)
    _require_lengths("crop_range", crop_range)
    if crop_range[0] > crop_range[1]:
        raise ConfigError(f"augmentation: crop_range must be (least, most), got {crop_range}")
    crop_resize = MultiScaleResize(tuple(crop_short_edges), max_long_edge) if crop_branch else None
    return InstanceTransform(
        _InstanceTrainingDraw(
            _TileAndFlip(_tile_draw(tile_size, tile_least_share), flip_probability),
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
    _require_lengths("jitter_size", [side])
    _require_probability("flip_probability", flip_probability)
    _require_positive_range("jitter_range", scale_range)
    first = _TileAndFlip(_tile_draw(tile_size, tile_least_share), flip_probability)
    return InstanceTransform(_LargeScaleJitterDraw(first, SquareJitter(side, scale_range)))


def instance_inference(short_edge: int, max_long_edge: int) -> InstanceTransform:
    """Builds the test-time resize: short edge to a length in pixels, long edge capped, ratio kept.

    Raises:
        ConfigError: a length is not positive, or the cap is below the short edge.
    """
    _require_edges("short_edge", [short_edge], max_long_edge)
    return InstanceTransform(_FixedResizeDraw((short_edge, max_long_edge)))


class SemanticTransform:
    """Transforms an image and its label map; build it with `semantic_training` or `semantic_inference`.

    Args:
        scale: (long, short) edge bounds in pixels, order free; the ratio is kept.
        ratio_range: both bounds are multiplied by a number drawn from this range.
        crop_size_hw: size of the result, cut out or filled up; None leaves the size and the label map as they are.
        max_category_ratio: a crop is drawn again, up to 10 times, while one class covers this share of it or more.
        flip_probability: probability of mirroring.
        photometric: also distort the colours.
        tile_size: side in pixels of a tile that is cut out of the image before everything else; None takes all of it.
    """

    def __init__(
        self,
        scale: tuple[int, int],
        ratio_range: tuple[float, float] = (1.0, 1.0),
        crop_size_hw: tuple[int, int] | None = None,
        max_category_ratio: float = 1.0,
        flip_probability: float = 0.0,
        photometric: bool = False,
        tile_size: int | None = None,
    ) -> None:
        _require_lengths("scale", scale)
        _require_probability("flip_probability", flip_probability)
        _require_probability("max_category_ratio", max_category_ratio)
        _require_positive_range("ratio_range", ratio_range)
        if crop_size_hw is not None:
            _require_lengths("crop_size_hw", crop_size_hw)
        self._scale = scale
        self._ratio_range = ratio_range
        self._crop_size_hw = crop_size_hw
        self._max_category_ratio = max_category_ratio
        self._flip_probability = flip_probability
        self._photometric = photometric
        self._tile = _tile_draw(tile_size)
        load_albumentations()

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Transforms one sample.

        Args:
            image: (H, W, 3) uint8 RGB.
            label: (H, W) uint8 class indices, 255 ignored.
            seed: as `sample_seed` gives it.

        Returns:
            new image and label map. For training both have `crop_size_hw`. For inference the label map is returned as
            it is: predictions are compared at the original size, as published scores are.
        """
        generator = np.random.default_rng(seed)
        if self._tile is not None:
            tile = self._tile((image.shape[0], image.shape[1]), generator)
            image, label = tile.image(image), tile.label(label)
        ratio = generator.uniform(*self._ratio_range)
        edges = (int(self._scale[0] * ratio), int(self._scale[1] * ratio))
        resize = Resize(keep_ratio_size_hw((image.shape[0], image.shape[1]), (max(1, edges[0]), max(1, edges[1]))))
        if self._crop_size_hw is None:
            return resize.image(image), label
        label = resize.label(label)
        crop = choose_crop(label, self._crop_size_hw, self._max_category_ratio, generator)
        operations: list[Operation] = [crop]
        if generator.random() < self._flip_probability:
            operations.append(Flip())
        image = resize.image(image)
        for operation in operations:
            image, label = operation.image(image), operation.label(label)
        if self._photometric:
            image = draw_photometric(generator)(image)
        # Last, so that the fill keeps the mean colour.
        pad = Pad(self._crop_size_hw, PAD_RGB, IGNORED_LABEL)
        return pad.image(image), pad.label(label)


def semantic_training(
    scale: tuple[int, int] = (2048, 512),
    ratio_range: tuple[float, float] = (0.5, 2.0),
    *,
    crop_size_hw: tuple[int, int],
    max_category_ratio: float = 0.75,
    flip_probability: float = 0.5,
    photometric: bool = True,
    tile_size: int | None = None,
) -> SemanticTransform:
    """Builds the augmentation of the published segmenters: random scale, crop, flip, colours; see `SemanticTransform`.

    Raises:
        ConfigError: a length is not positive, or a probability or ratio is out of range.
    """
    return SemanticTransform(
        scale, ratio_range, crop_size_hw, max_category_ratio, flip_probability, photometric, tile_size
    )


def semantic_inference(scale: tuple[int, int] = (2048, 512)) -> SemanticTransform:
    """Builds the test-time resize: ratio kept within (long, short) edge bounds; the label map keeps its size.

    Raises:
        ConfigError: a length is not positive.
    """
    return SemanticTransform(scale)


def choose_crop(
    label: np.ndarray, size_hw: tuple[int, int], max_category_ratio: float, generator: np.random.Generator
) -> Crop:
    """Draws a crop in which no class covers too much, or the last one drawn after 10 tries.

    Args:
        label: (H, W) uint8, 255 does not count.
        size_hw: size of the crop; where the label map is smaller, its whole side is taken.
        max_category_ratio: a class must cover less than this share; 1 accepts every crop.
        generator: source of random numbers.
    """
    full_hw = (label.shape[0], label.shape[1])
    crop_hw = (min(size_hw[0], full_hw[0]), min(size_hw[1], full_hw[1]))
    crop = _draw_crop(full_hw, crop_hw, generator)
    if max_category_ratio >= 1 or crop_hw == full_hw:
        return crop
    for _ in range(_CROP_TRIES):
        counts = np.bincount(crop.label(label).ravel(), minlength=256)[:IGNORED_LABEL]
        # A crop of one class alone has the ratio 1, an ignored one none: both are drawn again.
        if counts.any() and counts.max() / counts.sum() < max_category_ratio:
            break
        crop = _draw_crop(full_hw, crop_hw, generator)
    return crop


class ClassificationTransform:
    """Transforms an image; build it with `classification_training` or `classification_inference`.

    Args:
        size_hw: (height, width) of the result.
        area_range: a share of the image's area drawn from this range is cut out and resized; None takes the middle of
            the image, see `centre_crop`.
        aspect_range: width over height of what is cut out, drawn from this range on a logarithmic scale.
        padding: without `area_range`, the middle is cut out of again at random, this many black pixels around it.
        flip_probability: probability of mirroring.
        photometric: also distort the colours.
    """

    def __init__(
        self,
        size_hw: tuple[int, int],
        area_range: tuple[float, float] | None = None,
        aspect_range: tuple[float, float] = (1.0, 1.0),
        padding: int = 0,
        flip_probability: float = 0.0,
        photometric: bool = False,
    ) -> None:
        _require_lengths("crop_size_hw", size_hw)
        _require_probability("flip_probability", flip_probability)
        if area_range is not None and not 0 < area_range[0] <= area_range[1] <= 1:
            raise ConfigError(f"augmentation: area_range must be (least, most), both in 0..1, got {area_range}")
        _require_positive_range("aspect_range", aspect_range)
        if padding < 0:
            raise ConfigError(f"augmentation: padding must be 0 or more pixels, got {padding}")
        self._size_hw = size_hw
        self._area_range = area_range
        self._aspect_range = aspect_range
        self._padding = padding
        self._flip_probability = flip_probability
        self._photometric = photometric

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Transforms one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            seed: as `sample_seed` gives it.

        Returns:
            new image of `size_hw`.
        """
        generator = np.random.default_rng(seed)
        if self._area_range is not None:
            full_hw = (image.shape[0], image.shape[1])
            crop = choose_area_crop(full_hw, self._area_range, self._aspect_range, generator)
            image = resize_bicubic(crop.image(image), self._size_hw)
        else:
            image = centre_crop(image, self._size_hw)
            if self._padding:
                border = (self._padding, self._padding)
                image = np.pad(image, (border, border, (0, 0)))
                image = _draw_crop((image.shape[0], image.shape[1]), self._size_hw, generator).image(image)
        if generator.random() < self._flip_probability:
            image = Flip().image(image)
        return draw_photometric(generator)(image) if self._photometric else image


def classification_training(
    crop_size_hw: tuple[int, int],
    *,
    area_range: tuple[float, float] = (0.08, 1.0),
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3),
    padding: int | None = None,
    flip_probability: float = 0.5,
    photometric: bool = False,
) -> ClassificationTransform:
    """Builds the crops of the published classifiers, with flip and colours: a random share of the image, resized.

    Args:
        crop_size_hw: size of the result in pixels.
        area_range: see `ClassificationTransform`; published: 0.08 to 1.
        aspect_range: likewise; published: 3/4 to 4/3.
        padding: for images of the result's own size, as CIFAR-10's are: instead of a share, the whole image is moved by
            up to this many pixels, black at the border. Published for images up to 32 pixels: 4.
        flip_probability: probability of mirroring.
        photometric: also distort the colours.

    Raises:
        ConfigError: a length, range or probability is out of range.
    """
    if padding is not None:
        return ClassificationTransform(
            crop_size_hw, padding=padding, flip_probability=flip_probability, photometric=photometric
        )
    return ClassificationTransform(
        crop_size_hw, area_range, aspect_range, flip_probability=flip_probability, photometric=photometric
    )


def classification_inference(crop_size_hw: tuple[int, int]) -> ClassificationTransform:
    """Builds the test-time crop of the published classifiers, see `centre_crop`.

    Raises:
        ConfigError: a length is not positive.
    """
    return ClassificationTransform(crop_size_hw)


def centre_crop(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resizes an image to 256/224 of a size, ratio kept, and cuts that size out of the middle, as published.

    Args:
        image: (H, W, 3) uint8 RGB; one of the wanted size is returned as it is.
        size_hw: (height, width) wanted.
    """
    height, width = full_hw = (image.shape[0], image.shape[1])
    if full_hw == size_hw:
        return image
    least_height, least_width = (side * 256 // 224 for side in size_hw)
    # Whole numbers, so that the side that fits is met exactly and the other is rounded down, as published.
    if least_height * width >= least_width * height:
        resized_hw = (least_height, least_height * width // height)
    else:
        resized_hw = (least_width * height // width, least_width)
    top, left = (round((side - wanted) / 2) for side, wanted in zip(resized_hw, size_hw, strict=True))
    return Crop(top, left, size_hw).image(resize_bicubic(image, resized_hw))


def choose_area_crop(
    size_hw: tuple[int, int],
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
    generator: np.random.Generator,
) -> Crop:
    """Draws a rectangle of a share of the image's area, as the published classifiers were trained on.

    Args:
        size_hw: (height, width) of the image.
        area_range: its area over the image's.
        aspect_range: its width over its height.
        generator: source of random numbers.

    Returns:
        the first of ten rectangles that fits; where none does, the largest one in the middle within `aspect_range`.
    """
    height, width = size_hw
    for _ in range(_CROP_TRIES):
        area = height * width * generator.uniform(*area_range)
        aspect = math.exp(generator.uniform(math.log(aspect_range[0]), math.log(aspect_range[1])))
        crop_hw = (round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect)))
        if 0 < crop_hw[0] <= height and 0 < crop_hw[1] <= width:
            return _draw_crop(size_hw, crop_hw, generator)
    aspect = min(max(width / height, aspect_range[0]), aspect_range[1])
    crop_hw = (max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect))))
    return Crop((height - crop_hw[0]) // 2, (width - crop_hw[1]) // 2, crop_hw)


def resize_bicubic(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resizes (H, W, 3) uint8 with Pillow's antialiased bicubic filter, that of the published classifiers."""
    resized = Image.fromarray(image).resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC)
    return np.array(resized)


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


def _tile_draw(tile_size: int | None, least_share: float = 0.5) -> TileDraw | None:
    if tile_size is None:
        return None
    _require_lengths("tile_size", [tile_size])
    _require_probability("tile_least_share", least_share)
    return TileDraw(tile_size, least_share)


def _draw_crop(full_hw: tuple[int, int], crop_hw: tuple[int, int], generator: np.random.Generator) -> Crop:
    top = int(generator.integers(full_hw[0] - crop_hw[0] + 1))
    left = int(generator.integers(full_hw[1] - crop_hw[1] + 1))
    return Crop(top, left, crop_hw)


def _require_lengths(name: str, lengths: Sequence[int]) -> None:
    if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
        raise ConfigError(f"augmentation: {name} must be whole numbers of pixels, at least 1, got {tuple(lengths)}")


def _require_edges(name: str, short_edges: Sequence[int], max_long_edge: int) -> None:
    _require_lengths(name, short_edges)
    _require_lengths("max_long_edge", [max_long_edge])
    if max(short_edges) > max_long_edge:
        raise ConfigError(
            f"augmentation: max_long_edge must be at least the largest of {name} ({max(short_edges)}), "
            f"got {max_long_edge}"
        )


def _require_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"augmentation: {name} must lie in 0..1, got {value}")


def _require_positive_range(name: str, bounds: tuple[float, float]) -> None:
    if not 0 < bounds[0] <= bounds[1] < math.inf:
        raise ConfigError(f"augmentation: {name} must be (least, most), both positive, got {bounds}")
