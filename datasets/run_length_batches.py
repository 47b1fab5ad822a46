"""The masks of an image checked and measured at once: one by one, that takes longer than scoring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swin_dense.datasets.segmentations import CONTINUES, LEAST_CHARACTER, decode_text_counts, parse_run_lengths
from swin_dense.errors import AnnotationError


def compress_masks(masks: Sequence[Mapping[str, Any]], size_hw: tuple[int, int]) -> list[dict[str, Any]]:
    """Brings run lengths into the form that pycocotools takes; those that are text already are not changed.

    Args:
        masks: N of {"size": [height, width], "counts": text, bytes or list of numbers}.
        size_hw: (height, width) of the image.

    Returns:
        N of {"size": [height, width], "counts": bytes}. The text is not checked: `measure_masks` does that, and
        pycocotools never ends, or crashes the process, on what does not pass it.

    Raises:
        AnnotationError: a key is missing, or a type, the size or a list of numbers is wrong; begins with "mask" and its
            place, without file or id.
    """
    from pycocotools import mask as coco_mask

    compressed = []
    for place, mask in enumerate(masks):
        counts = mask.get("counts")
        if isinstance(counts, str) and counts.isascii():
            counts = counts.encode()
        if not isinstance(counts, bytes) or not isinstance(mask.get("size"), list | tuple):
            _parse(mask, size_hw, place)
            counts = coco_mask.frPyObjects(dict(mask), *size_hw)["counts"]
        elif list(mask["size"]) != list(size_hw):
            _parse(mask, size_hw, place)
        compressed.append({"size": list(size_hw), "counts": counts})
    return compressed


def measure_masks(masks: Sequence[Mapping[str, Any]], size_hw: tuple[int, int]) -> np.ndarray:
    """Counts the pixels of masks, and checks on the way that each fills its picture.

    Args:
        masks: N of {"size", "counts": bytes}.
        size_hw: (height, width) of all.

    Returns:
        (N,) int64 areas in pixels.

    Raises:
        AnnotationError: the text of a mask is wrong; begins with "mask" and its place, without file or id.
    """
    areas = _areas([mask["counts"] for mask in masks], size_hw)
    if areas is None:  # one by one, the wrong one is named
        return np.array([_parse(mask, size_hw, place)[1::2].sum() for place, mask in enumerate(masks)], np.int64)
    return areas


def _parse(mask: Mapping[str, Any], size_hw: tuple[int, int], place: int) -> np.ndarray:
    try:
        return parse_run_lengths(dict(mask), size_hw)
    except AnnotationError as error:
        raise AnnotationError(f"mask {place}: {error}") from None


def _areas(texts: Sequence[bytes], size_hw: tuple[int, int]) -> np.ndarray | None:
    if not texts:
        return np.zeros(0, np.int64)
    joined = b"".join(texts)
    is_last = (np.frombuffer(joined, np.uint8) - LEAST_CHARACTER) & CONTINUES == 0
    text_ends = np.cumsum([len(text) for text in texts])
    if not all(texts) or not is_last[text_ends - 1].all():
        return None
    try:
        differences = _undone(decode_text_counts(joined))
    except AnnotationError:
        return None
    starts = np.concatenate([[0], np.cumsum(is_last)[text_ends[:-1] - 1]])
    runs, is_mask = _summed(differences, starts)
    picture = size_hw[0] * size_hw[1]
    # Each run is compared first, so that no sum can overflow.
    if runs.min() < 0 or runs.max() > picture or (np.add.reduceat(runs, starts) != picture).any():
        return None
    return np.add.reduceat(np.where(is_mask, runs, 0), starts)


def _undone(counts: np.ndarray) -> np.ndarray:
    """The numbers as they stand in the text: from the fourth on, each is the difference to the one before the last."""
    differences = counts.copy()
    differences[3:] -= counts[1:-2]
    return differences


def _summed(differences: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adds the differences up again, text by text: the runs, and which of them are of the mask."""
    lengths = np.diff(starts, append=len(differences))
    positions = np.arange(len(differences)) - np.repeat(starts, lengths)
    is_mask = positions % 2 == 1
    is_gap = ~is_mask & (positions > 0)
    runs = differences.copy()
    for chosen in (is_mask, is_gap):
        sums = np.cumsum(np.where(chosen, differences, 0))
        runs = np.where(chosen, sums - np.repeat(sums[starts], lengths), runs)
    return runs, is_mask
