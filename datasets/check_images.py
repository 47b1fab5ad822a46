"""What the data check says about picture files: each is read once, decoded whole, in worker processes."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from swin_dense.datasets.images import image_size_hw, max_pixels, read_image
from swin_dense.errors import DataError, ImageError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]

OPEN_ERRORS = (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, EOFError, struct.error, zlib.error)
"""What Pillow raises on files that are no pictures, or damaged ones."""

_CHUNK = 16
# Fewer pictures than this for each further process are read sooner than it starts.
_LEAST_SHARE = 100
_EXIF_ORIENTATION = 0x0112
_TURNS_SIDES = (5, 6, 7, 8)


@dataclass(frozen=True)
class PictureFacts:
    """What the file of a picture holds.

    Attributes:
        path: The file.
        fault: Kind of finding that makes it unusable, or None.
        reason: Why, in words.
        mode: Pillow's colour mode; "" where the header cannot be read.
        stored_hw: (height, width) in the file; None where the header cannot be read.
        turned_hw: The same after the EXIF orientation.
        orientation: EXIF orientation, 1 where there is none.
        content_hash: Of the decoded pixels, equal for equal pictures whatever their format; None where not decoded.
    """

    path: str
    fault: str | None = None
    reason: str = ""
    mode: str = ""
    stored_hw: tuple[int, int] | None = None
    turned_hw: tuple[int, int] | None = None
    orientation: int = 1
    content_hash: bytes | None = None


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Opens a picture whatever its size, so that one that is too large still tells what it is.

    Raises:
        One of `OPEN_ERRORS`: it is no picture, or its header is damaged.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_picture_facts(path: str) -> PictureFacts:
    """Reads a picture as the loaders do, all its pixels."""
    return _read_facts(path, decode=True)


def read_picture_header(path: str) -> PictureFacts:
    """Reads only what stands before the pixels: fast, but blind for damage and repetition."""
    return _read_facts(path, decode=False)


def _read_facts(path: str, decode: bool) -> PictureFacts:
    try:
        mode, stored_hw, orientation, num_frames = _header(path)
    except OPEN_ERRORS as error:
        return PictureFacts(path, _fault_of(path), _reason(path, error))
    turned_hw = stored_hw[::-1] if orientation in _TURNS_SIDES else stored_hw
    header = PictureFacts(path, None, "", mode, stored_hw, turned_hw, orientation)
    try:
        if decode:
            return replace(header, content_hash=pixel_hash(read_image(path)))
        image_size_hw(path)
    except ImageError as error:
        fault = "picture-animated" if num_frames > 1 else "picture-foreign" if mode == "F" else "picture-damaged"
        if stored_hw[0] * stored_hw[1] > max_pixels():
            fault = "picture-too-large"
        return replace(header, fault=fault, reason=_without_path(path, str(error)))
    return header


def pixel_hash(pixels: np.ndarray) -> bytes:
    """A hash of an array's size and values; equal pictures have equal ones."""
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return digest.digest()


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, progress: Progress
) -> Iterator[Result]:
    """Applies a function to every item, in order, in processes of their own where that pays.

    Args:
        function: Picklable.
        items: Its arguments.
        workers: The most processes to use; 0 and 1 stay in this one.
        progress: Is called with how much is done and how much there is.

    Raises:
        DataError: A process was ended from outside, as the system does when memory runs out.
    """
    workers = min(workers, len(items) // _LEAST_SHARE)
    if workers < 2:
        for done, item in enumerate(items, start=1):
            yield function(item)
            progress(done, len(items))
        return
    # Not forked: a process with running threads, such as a progress bar's, must not be.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _leave_interrupts_to_the_parent)
    try:
        for done, result in enumerate(pool.map(function, items, chunksize=_CHUNK), start=1):
            yield result
            progress(done, len(items))
    except BrokenProcessPool:
        raise DataError("a process that reads pictures was ended, perhaps for memory: try --workers 1.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def picture_findings(facts: PictureFacts, size_hw: tuple[int, int] | None = None) -> list[tuple[str, str]]:
    """What is to be said about one picture.

    Args:
        facts: The picture.
        size_hw: (height, width) that its annotations or its label picture have, or None.

    Returns:
        (kind, reason) of each finding.
    """
    if facts.fault is not None:
        return [(facts.fault, facts.reason)]
    assert facts.stored_hw is not None and facts.turned_hw is not None
    found = []
    fits_stored, fits_turned = size_hw == facts.stored_hw, size_hw == facts.turned_hw
    if size_hw is not None and not (fits_stored or fits_turned):
        swapped = ", with height and width swapped" if size_hw == facts.stored_hw[::-1] else ""
        found.append(
            ("image-size-differs", f"{_by(size_hw)} is stated, the picture is {_by(facts.stored_hw)}{swapped}")
        )
    if facts.orientation != 1:
        if size_hw is None or (fits_stored and fits_turned):
            frame = "it is turned on reading, as viewers do; annotations drawn on the unturned one would not fit"
        else:
            frame = "the stated size is that of the picture " + ("as stored" if fits_stored else "when turned")
        found.append(("picture-turned", f"EXIF orientation {facts.orientation}: {frame}"))
    if facts.mode != "RGB":
        found.append(("picture-converted", f"colour mode {facts.mode}"))
    return found


def repeated_pictures(facts: Sequence[PictureFacts], splits: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Finds pictures that show the same.

    Args:
        facts: The pictures.
        splits: Number of the split of each; training first.

    Yields:
        (kind of finding, number of a picture, number of the other one). A picture that the last split of its like has
        too is told there, the others of one split are told but the first.
    """
    groups: dict[bytes, list[int]] = {}
    for number, picture in enumerate(facts):
        if picture.content_hash is not None:
            groups.setdefault(picture.content_hash, []).append(number)
    for group in groups.values():
        last = max(splits[number] for number in group)
        kept = next(number for number in group if splits[number] == last)
        for number in group:
            if splits[number] != last:
                yield "picture-in-two-splits", number, kept
            elif number != kept:
                yield "picture-repeated", number, kept


def size_range(sizes_hw: np.ndarray) -> dict[str, list[int]]:
    """Least, middle and greatest [height, width] of (N, 2), each side by itself; nothing of none."""
    if not len(sizes_hw):
        return {}
    low, middle, high = np.quantile(sizes_hw, (0, 0.5, 1), axis=0).astype(int).tolist()
    return {"min": low, "median": middle, "max": high}


def _header(path: str) -> tuple[str, tuple[int, int], int, int]:
    with opened(path) as image:
        try:
            orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
        except OPEN_ERRORS:
            orientation = 1
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        return image.mode, (image.height, image.width), orientation if 1 <= orientation <= 8 else 1, frames


def _fault_of(path: str) -> str:
    """The kind of a file whose header cannot be read."""
    # os.path answers False where pathlib raises: for names that no file system can hold.
    if not os.path.exists(path):
        return "picture-missing"
    if os.path.isdir(path):
        return "picture-foreign"
    if not os.path.getsize(path):
        return "picture-empty"
    try:
        with opened(path):
            pass
    except Image.UnidentifiedImageError:
        return "picture-foreign"
    except OPEN_ERRORS:
        pass
    return "picture-damaged"


def _reason(path: str, error: BaseException) -> str:
    try:
        image_size_hw(path)
    except ImageError as better:
        return _without_path(path, str(better))
    except (OSError, ValueError) as better:
        return str(better.strerror if isinstance(better, OSError) else better)
    return str(error)


def _without_path(path: str, message: str) -> str:
    return message.removeprefix(f"{Path(path)}: ").rstrip(".")


def _by(size_hw: tuple[int, int]) -> str:
    return f"height x width {size_hw[0]} x {size_hw[1]}"


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
