"""The batch that needs the most memory of all that a recipe can draw: a plan that fits it fits every later batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from swin_dense.datasets.coco import CocoDataset, InstanceSample, detector_target
from swin_dense.datasets.geometry import Resize, channels_first, keep_ratio_size_hw
from swin_dense.datasets.instances import Instances
from swin_dense.datasets.transforms import CROP_RANGE, LARGEST_SHORT_EDGE
from swin_dense.heads.roi_heads import POSITIVE_FRACTION
from swin_dense.tools.recipe import AugmentationSettings
from swin_dense.windows import missing_to_multiple

STRIDE = 32
"""Detection batches are padded to multiples of it, where four stages follow patches of 4 pixels."""


@dataclass(frozen=True)
class WorstBatch:
    """Copies of one sample, which together are the worst batch.

    Attributes:
        sample: What the task collates, `images` times.
        images: How many.
        objects: Of each image, regions to ignore among them; None where a task has no objects.
    """

    sample: Any
    images: int
    objects: int | None

    @property
    def size_hw(self) -> tuple[int, int]:
        """(height, width) of each image in pixels."""
        height, width = self.sample.image.shape[1:]
        return height, width


def worst_batch(
    augmentation: AugmentationSettings,
    dataset: Any,  # noqa: ANN401 - the task's own
    groups: np.ndarray | None,
    model: nn.Module,
    images: int,
) -> WorstBatch:
    """The worst batch of so many images.

    Crops of one size are all alike: any of them is the worst. For a detector every image has the largest size that the
    augmentation can give to a batch, see `largest_size_hw`, and as many objects as any image can have: those of the
    image with the most, twice where copy-paste may add an image's own to it. They are repeated until they fill the part
    of the sampled boxes that is for objects: later in training proposals fill it, with random weights they do not.

    Args:
        augmentation: What images go through.
        dataset: The training set.
        groups: As `Task.batch_groups` gives them.
        model: The task's.
        images: Of one micro-batch.

    Raises:
        ImageError: The picture that is copied cannot be read.
    """
    if not isinstance(dataset, CocoDataset):
        return WorstBatch(dataset[0, 0], images, None)
    size_hw = largest_size_hw(augmentation, dataset.sizes_hw, groups, images)
    index, most = most_objects(dataset)
    least = most * (2 if augmentation.copy_paste_probability > 0 else 1)
    sample = _crowded_sample(dataset, index, size_hw, max(least, sampled_objects(model)))
    return WorstBatch(sample, images, len(sample.target["boxes"]))


def most_objects(dataset: CocoDataset) -> tuple[int, int]:
    """The index of the image with the most objects, and how many: objects and regions to ignore."""
    counts = dataset.objects_per_image
    index = int(counts.argmax())
    return index, int(counts[index])


def sampled_objects(model: nn.Module) -> int:
    """The most boxes of one image that a detector's heads are trained on as objects."""
    architecture: Any = model.architecture
    return int(architecture["samples_per_image"] * POSITIVE_FRACTION)


def largest_size_hw(
    augmentation: AugmentationSettings, sizes_hw: np.ndarray, groups: Sequence[int] | np.ndarray | None, images: int
) -> tuple[int, int]:
    """The size of the largest batch that a detector can be trained on; no batch has more pixels after padding.

    One image is at most as large as the largest; a batch is as high as its highest image and as wide as its widest,
    which lie in one group.

    Args:
        augmentation: What images go through.
        sizes_hw: (N, 2) of the images in the files.
        groups: (N,) numbers; a batch holds images of one group. None is one group.
        images: Of one batch.

    Returns:
        (height, width) in pixels before padding.
    """
    if augmentation.jitter_size is not None:
        return augmentation.jitter_size, augmentation.jitter_size
    of_images = np.zeros(len(sizes_hw), np.int64) if groups is None else np.asarray(groups)
    candidates: set[tuple[int, int]] = set()
    for group in np.unique(of_images):
        # Sizes repeat: a hundred thousand pictures of COCO have some thousand.
        unique = np.unique(sizes_hw[of_images == group], axis=0).tolist()
        possible = {size for height, width in unique for size in _largest_sizes_hw(augmentation, (height, width))}
        candidates |= possible if images == 1 else {_bounding(possible)}
    return max(candidates, key=_padded_pixels)


def _largest_sizes_hw(augmentation: AugmentationSettings, size_hw: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes such that no image or batch of one and the same file is larger than the largest of them."""
    tile = max(size_hw) if augmentation.tile_size is None else augmentation.tile_size
    height, width = (min(tile, side) for side in size_hw)
    short, long = max(augmentation.short_edges), augmentation.max_long_edge
    whole = keep_ratio_size_hw((height, width), (short, long))
    if not augmentation.crop_branch:
        return [whole]
    least, most = (side * short / LARGEST_SHORT_EDGE for side in CROP_RANGE)
    # A crop is as long for its width as this, or as the image where that is longer still.
    ratio = math.ceil(most) / max(1, math.floor(least))
    tall, wide = (math.ceil(short * max(ratio, of_image)) for of_image in (height / width, width / height))
    return [whole, (min(long, tall), short), (short, min(long, wide))]


def _bounding(sizes_hw: Iterable[tuple[int, int]]) -> tuple[int, int]:
    heights, widths = zip(*sizes_hw, strict=True)
    return max(heights), max(widths)


def _padded_pixels(size_hw: tuple[int, int]) -> int:
    height, width = (side + missing_to_multiple(side, STRIDE) for side in size_hw)
    return height * width


def _crowded_sample(dataset: CocoDataset, index: int, size_hw: tuple[int, int], least: int) -> InstanceSample:
    image, instances = dataset.raw(index)
    resize = Resize(size_hw)
    target = detector_target(_repeated(resize.instances(instances).drawn(), least))
    pixels = torch.from_numpy(channels_first(resize.image(image)))
    return InstanceSample(pixels, target, dataset.image_ids[index], index, instances.size_hw)


def _repeated(instances: Instances, least: int) -> Instances:
    """The objects followed by copies, not of regions to ignore, until there are as many as wanted."""
    objects = np.flatnonzero(~instances.is_crowd)
    missing = max(0, least - len(instances)) if len(objects) else 0
    return instances.select(np.concatenate([np.arange(len(instances)), np.resize(objects, missing)]))
