"""What is meant where ids and file names of a COCO file are written in another form: each is told, then read so."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swin_dense.datasets.check_findings import shown
from swin_dense.datasets.check_values import read_id
from swin_dense.datasets.images import IMAGE_SUFFIXES

_ID_FIELDS = {"categories": ("id",), "images": ("id",), "annotations": ("id", "image_id", "category_id")}
_WHOLE_NUMBER = re.compile(r"-?\d{1,19}", re.ASCII)


def whole_id(value: object) -> int | None:
    """The id that a float or a text such as 7.0 or "7" stands for; None for ids and for anything else."""
    if isinstance(value, float) and value.is_integer():
        return read_id(int(value))
    return read_id(int(value)) if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value) else None


def write_whole_ids(content: Mapping[str, list[Any]], tell: Callable[[str, int, str], None]) -> None:
    """Puts whole numbers where floats or texts stand for ids, as other programs write them.

    Args:
        content: The three sections of an annotation file, each a list of anything; it is changed.
        tell: Is called with section, position and reason.
    """
    for section, fields in _ID_FIELDS.items():
        for position, entry in enumerate(content[section]):
            if not isinstance(entry, dict):
                continue
            for field in fields:
                value = entry.get(field)
                if type(value) is int or (meant := whole_id(value)) is None:
                    continue
                tell(section, position, f"{field} must be a whole number, got {shown(value)}; taken as {meant}")
                entry[field] = meant


def find_misnamed(wanted: Mapping[int, str], folder: Path, used: Iterable[str]) -> dict[int, str]:
    """Finds pictures whose file names in the annotation file differ in folder, ending or case.

    Args:
        wanted: Position of an image -> its file name, under which there is no file.
        folder: The image folder.
        used: Paths of pictures that other entries name.

    Returns:
        Position -> path relative to the folder, where exactly one file that nothing else names fits.
    """
    if not wanted:
        return {}
    taken = {os.path.normpath(path) for path in used}
    free: dict[str, list[str]] = {}
    for path in pictures_below(folder):
        if os.path.normpath(path) not in taken:
            free.setdefault(_stem(path), []).append(os.path.relpath(path, folder))
    times_wanted = Counter(_stem(name) for name in wanted.values())
    fitting = {position: free.get(_stem(name), []) for position, name in wanted.items()}
    return {
        position: paths[0].replace(os.sep, "/")
        for position, paths in fitting.items()
        if len(paths) == 1 and times_wanted[_stem(wanted[position])] == 1
    }


def pictures_below(folder: Path) -> Iterator[str]:
    """Paths of the files in a folder and its subfolders that are named as pictures; hidden ones are none of them."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def _stem(name: str) -> str:
    """File name without folder and ending, however it is written."""
    base = name.replace("\\", "/").rpartition("/")[2]
    return unicodedata.normalize("NFC", os.path.splitext(base)[0]).casefold()
