"""COCO's three ways to write a mask: polygons, run lengths as numbers, run lengths as text.

Run lengths are decoded here in numpy and checked on the way: pycocotools never ends, or crashes the process, on text
that is not one. Polygons, once checked, are drawn by pycocotools, whose raster is the one that scores are taken with.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from swin_dense.errors import AnnotationError

LEAST_CHARACTER, CONTINUES = 48, 0x20
"""Of run lengths as text: the character that stands for 0, and the bit that says that the next one belongs to it."""

# Five bits a character, so no run of a picture that can be read needs more.
_MAX_CHARACTERS = 7
_SIGN = 0x10


def decode_text_counts(text: str | bytes) -> np.ndarray:
    """Decodes COCO's compressed run lengths.

    Args:
        text: the "counts" of a compressed segmentation.

    Returns:
        (R,) int64, lengths of runs of 0 and 1 in turn, column by column. They may still be negative or wrong in sum:
        `check_counts` tells.

    Raises:
        AnnotationError: the text is no such encoding; the message begins with what is wrong, without file or id.
    """
    try:
        characters = np.frombuffer(text if isinstance(text, bytes) else text.encode("ascii"), np.uint8)
    except UnicodeEncodeError:
        raise AnnotationError("counts holds characters that COCO's run-length text does not use") from None
    values = characters.astype(np.int64) - LEAST_CHARACTER
    if not len(values) or values.min() < 0 or values.max() > 63:
        raise AnnotationError("counts is empty or holds characters that COCO's run-length text does not use")
    last = np.flatnonzero(values & CONTINUES == 0)
    if not len(last) or last[-1] != len(values) - 1:
        raise AnnotationError("counts is cut short: its last number does not end")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _MAX_CHARACTERS:
        raise AnnotationError("counts holds a number that is too large for any picture")
    shifts = 5 * (np.arange(len(values)) - np.repeat(first, lengths))
    counts = np.add.reduceat((values & 0x1F) << shifts, first)
    negative = values[last] & _SIGN != 0
    counts -= negative * (1 << (5 * lengths))
    # From the fourth number on, each is the difference to the one before the last.
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def check_counts(counts: np.ndarray, size_hw: tuple[int, int]) -> None:
    """Checks that run lengths fill a picture exactly.

    Raises:
        AnnotationError: a run is negative, or the sum is not height × width; the message has no file or id.
    """
    height, width = size_hw
    if counts.min(initial=0) < 0:
        raise AnnotationError(f"counts holds a negative run length ({counts.min()})")
    # Each run is compared first, so that no sum can overflow.
    if counts.max(initial=0) > height * width or counts.sum() != height * width:
        raise AnnotationError(
            f"counts must add up to height x width = {height * width}, got {sum(int(n) for n in counts)}"
        )


def parse_run_lengths(segmentation: dict[str, Any], size_hw: tuple[int, int]) -> np.ndarray:
    """Reads a run-length segmentation, as text or as numbers.

    Args:
        segmentation: {"size": [height, width], "counts": text or list of numbers}.
        size_hw: (height, width) of the image.

    Returns:
        (R,) uint32 run lengths that fill the picture exactly.

    Raises:
        AnnotationError: a key is missing, a type or the size is wrong, or the counts do not fill the picture; the
            message has no file or id.
    """
    if "size" not in segmentation or "counts" not in segmentation:
        raise AnnotationError(f"segmentation needs the keys size and counts, got {sorted(map(str, segmentation))}")
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, list | tuple) or list(size) != list(size_hw):
        raise AnnotationError(
            f"segmentation size must be the image's [height, width] {list(size_hw)}, got {_shorten(size)}"
        )
    if isinstance(counts, str | bytes):
        runs = decode_text_counts(counts)
    elif isinstance(counts, list) and counts and all(type(n) is int and abs(n) < 2**40 for n in counts):
        runs = np.array(counts, np.int64)
    else:
        raise AnnotationError(f"counts must be text or a list of whole numbers, got {_shorten(counts)}")
    check_counts(runs, size_hw)
    return runs.astype(np.uint32)


def polygon_run_lengths(polygons: Sequence[np.ndarray], size_hw: tuple[int, int]) -> np.ndarray:
    """Rasterises the union of checked polygons exactly as pycocotools does.

    Args:
        polygons: each (2 P,) float64, x and y in turn, in pixels.
        size_hw: (height, width) of the image.

    Returns:
        (R,) run lengths that fill the picture.
    """
    from pycocotools import mask as coco_mask

    # In the full frame: the raster is cheap, but in a shifted one some edge pixels round differently.
    parts = coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], *size_hw)
    return decode_text_counts(coco_mask.merge(parts)["counts"])


def crop_of_run_lengths(runs: np.ndarray, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Draws checked run lengths inside the bounding box of their mask; nothing as large as the picture is made.

    Args:
        runs: (R,) run lengths that fill the picture.
        height: of the picture.

    Returns:
        (h, w) uint8 mask, h = w = 0 without a pixel; and (x, y), its left column and top row in the picture.
    """
    ends = np.cumsum(runs, dtype=np.int64)[: len(runs) // 2 * 2].reshape(-1, 2)
    starts, stops = ends[ends[:, 1] > ends[:, 0]].T
    if not len(starts):
        return np.zeros((0, 0), np.uint8), (0, 0)
    columns, rows = np.divmod(np.stack([starts, stops - 1]), height)
    left, right = columns[0, 0], columns[1, -1] + 1
    # A run that goes on in the next column covers the last row of one and the first row of the other.
    top, bottom = (0, height) if (columns[0] < columns[1]).any() else (rows[0].min(), rows[1].max() + 1)
    changes = (columns - left) * (bottom - top) + rows - top + [[0], [1]]
    values = np.zeros(2 * len(starts) + 1, np.uint8)
    values[1::2] = 1
    lengths = np.diff(changes.T.ravel(), prepend=0, append=(right - left) * (bottom - top))
    crop = np.repeat(values, lengths).reshape(right - left, bottom - top).T
    return np.ascontiguousarray(crop), (int(left), int(top))


def draw_run_lengths(runs: np.ndarray, mask: np.ndarray) -> None:
    """Draws checked run lengths into an empty mask.

    Args:
        runs: (R,) run lengths that fill the picture.
        mask: (H, W) uint8 zeros; it is written to.
    """
    crop, (left, top) = crop_of_run_lengths(runs, mask.shape[0])
    mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop


def _shorten(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
