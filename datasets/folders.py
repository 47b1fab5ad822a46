"""Finding the parts of a data set in the folder layouts that are in use, and saying what is there instead."""

from collections.abc import Callable
from pathlib import Path

from swin_dense.errors import DataError


def split_names(split: str) -> tuple[str, ...]:
    """Returns the folder names that are in use for "train" or "val".

    Raises:
        DataError: another split is asked for.
    """
    known = {"train": ("train2017", "train", "training"), "val": ("val2017", "val", "validation")}
    if split not in known:
        raise DataError(f"split must be 'train' or 'val', got {split!r}")
    return known[split]


def first_existing(paths: list[Path], exists: Callable[[Path], bool]) -> Path | None:
    """Returns the first path for which `exists` says yes, or None."""
    return next((path for path in paths if exists(path)), None)


def files_ending_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the files directly in a folder with one of the suffixes, in either case; sorted, no hidden ones."""
    return [
        path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes and not path.name.startswith(".")
    ]


def describe_folder(root: Path) -> str:
    """Returns what is in a folder, for messages."""
    if not root.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in root.iterdir())[:20]) or "an empty folder"
