"""From the mask head's small squares to masks of the image.

Sampled bilinearly between the pixel centres of the float box, as the published models do; torchvision rounds the box
to whole pixels first, which costs small objects up to a third of their overlap.

Bilinear is linear along x, then linear along y. The first step gives each column of pixels its profile, one value per
row of the mask, and from one of them to the next the mask rises or falls in a straight line. Masks of the image are
profiles sampled at pixels; run lengths are where profiles cross one half, for which no pixel is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from swin_dense.heads.precision import at_least_float32

_VALUES_AT_ONCE = 2**20  # of profiles: 4 bytes each as float32, 16 while they are made

Window = tuple[int, int, int, int]


def paste_masks(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Masks in the frame of the image.

    Args:
        masks: (N, 1, M, M) probabilities, each relative to its box.
        boxes: (N, 4) xyxy in pixels of the image.
        size_hw: (H, W) of the image.

    Returns:
        (N, 1, H, W) float probabilities, at least float32; 0 from half a cell of the mask beyond the box. 0.5 is the
        published threshold, from which on a pixel belongs to the object.
    """
    masks, boxes = at_least_float32(masks), _with_extent(boxes)
    rows = _samples(boxes[:, 1::2], masks.shape[2], size_hw[0])
    columns = _samples(boxes[:, 0::2], masks.shape[3], size_hw[1])
    profiles = _profiles(masks[:, 0], columns).split(columns.counts)
    cells = rows.cells.to(masks.device).split(rows.counts)
    fractions = rows.fractions.to(masks)[:, None].split(rows.counts)
    pasted = masks.new_zeros(len(masks), 1, *size_hw)
    for index, (profile, cell, fraction) in enumerate(zip(profiles, cells, fractions, strict=True)):
        lines = profile.T.contiguous()
        window = torch.lerp(lines[cell], lines[cell + 1], fraction)
        pasted[index, 0, rows.slices[index], columns.slices[index]] = window
    return pasted


def paste_window(mask: Tensor, box: Tensor, window: Window) -> Tensor:
    """One mask, only inside a window of the image: the definition, which the fast functions of this file equal.

    Args:
        mask: (M, M) probabilities.
        box: (4,) xyxy.
        window: (top, left, bottom, right) in whole pixels.

    Returns:
        (bottom - top, right - left) float.
    """
    top, left, bottom, right = window
    x1, y1, x2, y2 = box.unbind()
    y = _relative(torch.arange(top, bottom, device=mask.device, dtype=mask.dtype) + 0.5, y1, y2)
    x = _relative(torch.arange(left, right, device=mask.device, dtype=mask.dtype) + 0.5, x1, x2)
    grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
    return functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


def _relative(centres: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Pixel centres in the frame of a box, -1 to 1 inside; 2 is far outside, as all are of a box without extent."""
    return torch.where(end > start, (centres - start) / (end - start) * 2 - 1, 2).clamp(-2, 2)


def masks_to_rle(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> list[dict[str, object]]:
    """Binary masks of the image in COCO's run-length code, made on the CPU; how large the image is costs nothing.

    Args:
        masks: (N, 1, M, M) probabilities, each relative to its box.
        boxes: (N, 4) xyxy in pixels of the image.
        size_hw: (H, W) of the image.

    Returns:
        N dicts {"size": [H, W], "counts": str}, equal to encoding `paste_masks(…) >= 0.5`, but for pixels whose value
        is 0.5 up to rounding.
    """
    from pycocotools import mask as coco_mask

    height, width = size_hw
    # M x M floats are less to transfer than the pixels of any but small boxes.
    masks, boxes = at_least_float32(masks.detach())[:, 0].cpu(), _with_extent(boxes)
    step = max(1, _VALUES_AT_ONCE // (width * (masks.shape[2] + 2)))
    codes: list[dict[str, object]] = []
    for some_masks, some_boxes in zip(masks.split(step), boxes.split(step), strict=True):
        intervals = _joined(*_intervals(some_masks, some_boxes, size_hw))
        for counts in _run_lengths(*intervals, len(some_masks), height * width):
            code = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
            codes.append({"size": [height, width], "counts": code["counts"].decode("ascii")})
    return codes


def _intervals(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The first pixels of (N, M, M) masks and the first after them, column by column, some empty or touching the next.

    They are counted in one line of all images, each column by column, with one pixel between an image and the next.
    """
    height, width = size_hw
    columns = _samples(boxes[:, 0::2], masks.shape[2], width)
    column, cells_down = _crossings(_profiles(masks, columns).numpy())
    box = columns.boxes.numpy()[column]
    top, bottom = boxes[:, 1::2].numpy().T
    y = cells_down * ((bottom - top) / masks.shape[1])[box] + top[box]
    origin = box * (height * width + 1) + columns.pixels.numpy()[column] * height
    # In turn into the mask and out of it; a centre at one half belongs to it.
    starts = origin[0::2] + np.ceil(y[0::2] - 0.5).clip(0, height).astype(np.int64)
    stops = origin[1::2] + np.floor(y[1::2] + 0.5).clip(0, height).astype(np.int64)
    return starts, stops


def _crossings(profiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where (P, M + 2) profiles reach and leave one half: (C,) which profile, (C,) cells from the mask's upper edge."""
    # In one piece: every profile begins and ends with a zero, so that nothing crosses from one to the next.
    values = profiles.ravel()
    is_inside = values >= 0.5
    before = np.flatnonzero(is_inside[1:] != is_inside[:-1])
    way = (0.5 - values[before]) / (values[before + 1] - values[before])
    column, cell = np.divmod(before, profiles.shape[1])
    return column, cell - 0.5 + np.nan_to_num(way)


def _joined(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intervals without those that are empty, and as one where they touch."""
    starts, stops = starts[starts < stops], stops[starts < stops]
    is_apart = starts[1:] > stops[:-1]
    return starts[np.append(True, is_apart)[: len(starts)]], stops[np.append(is_apart, True)[: len(stops)]]


def _run_lengths(starts: np.ndarray, stops: np.ndarray, num_images: int, num_pixels: int) -> Iterator[np.ndarray]:
    """For each image the (R,) lengths of runs outside and inside in turn; intervals as in `_intervals`, apart."""
    borders = np.stack((starts, stops), axis=1).ravel()
    images = np.arange(num_images)
    image_ends = images * (num_pixels + 1) + num_pixels
    places = np.searchsorted(borders, image_ends, side="right")
    runs = np.diff(np.insert(borders, places, image_ends), prepend=-1)
    for counts in np.split(runs, places + images + 1)[:-1]:
        counts[0] -= 1  # the pixel between images
        yield counts if counts[-1] else counts[:-1]


@dataclass(frozen=True)
class _Samples:
    """The pixels along one axis that boxes reach, box after box, and where they lie between the cells of the masks.

    Attributes:
        slices: N, the pixels of each box.
        counts: N, their numbers; the sum is P.
        boxes: (P,) int64, whose pixel it is.
        pixels: (P,) int64, in the image.
        cells: (P,) int64, the last cell whose centre is not behind the pixel's; 0 are zeros in front of the mask.
        fractions: (P,) float64, how far it is from there to the centre of the next cell, 0 to 1.
    """

    slices: list[slice]
    counts: list[int]
    boxes: Tensor
    pixels: Tensor
    cells: Tensor
    fractions: Tensor


def _samples(spans: Tensor, num_cells: int, num_pixels: int) -> _Samples:
    """Along an axis with so many pixels, of boxes that reach (N, 2) from and to and whose masks have so many cells."""
    starts, ends = spans.unbind(dim=1)
    extents = ends - starts
    reach = extents / (2 * num_cells)
    first = (starts - reach).floor().clamp(0, num_pixels).nan_to_num(0).long()
    stop = (ends + reach).ceil().clamp(0, num_pixels).nan_to_num(0).long()
    counts = stop - first
    boxes = torch.repeat_interleave(counts)
    pixels = torch.arange(len(boxes)) + (stop - counts.cumsum(dim=0))[boxes]
    positions = ((pixels + 0.5 - starts[boxes]) * num_cells / extents[boxes] + 0.5).clamp(0, num_cells + 1)
    cells = positions.floor().clamp(max=num_cells)
    slices = [slice(*each) for each in zip(first.tolist(), stop.tolist(), strict=True)]
    return _Samples(slices, counts.tolist(), boxes, pixels, cells.long(), positions - cells)


def _with_extent(boxes: Tensor) -> Tensor:
    """Boxes in float64, so that centres are found to far less than a value's rounding; NaN those without extent."""
    boxes = boxes.detach().cpu().double()
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes.where(((sides > 0) & sides.isfinite()).all(dim=1, keepdim=True), torch.nan)


def _profiles(masks: Tensor, columns: _Samples) -> Tensor:
    """Masks (N, M, M) at columns of pixels: (P, M + 2), with a zero in front of each profile and one behind."""
    padded = functional.pad(masks.mT, (1, 1, 1, 1))
    lines = padded.flatten(0, 1)
    before = (columns.boxes * padded.shape[1] + columns.cells).to(masks.device)
    return torch.lerp(lines[before], lines[before + 1], columns.fractions.to(masks)[:, None])
