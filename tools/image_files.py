"""Pictures named on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swin_dense.datasets.images import IMAGE_SUFFIXES
from swin_dense.errors import DataError


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, and all pictures in and below folders, sorted.

    Raises:
        DataError: A path does not exist, or nothing was found.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: there is no such picture or folder.")
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no pictures found; looked for {', '.join(IMAGE_SUFFIXES)}.")
    return found


def named_apart(paths: Sequence[Path]) -> list[str]:
    """A file name without ending for each picture, numbered where two would be the same."""
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name)
        names.append(name)
    return names
