"""Finding the parts of a data set in the folder layouts that are in use, and saying what is there instead."""

from collections.abc import Callable
from pathlib import Path

from swin_dense.datasets.images import IMAGE_SUFFIXES
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


def find_semantic_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """Finds image and label folder of a split in the usual layouts.

    Looks for `images/{training,train}` with `annotations/{training,train}` (val accordingly). A root whose `images` and
    `annotations` hold files directly has no splits: both are that pair.

    Args:
        root: the data set's folder.
        split: "train" or "val".

    Returns:
        (image folder, label folder).

    Raises:
        DataError: not found; lists what was looked for and what is there.
    """
    root = Path(root)
    names = split_names(split)
    found = [first_existing([root / kind / name for name in names], Path.is_dir) for kind in ("images", "annotations")]
    image_folder, label_folder = found
    if image_folder is not None and label_folder is not None:
        return image_folder, label_folder
    flat = (root / "images", root / "annotations")
    if image_folder is None and label_folder is None and all(_holds_pictures(folder) for folder in flat):
        return flat
    raise DataError(
        f"{root}: split {split!r} not found. Looked for images/<name> and annotations/<name> with the name "
        f"{' or '.join(names)}, or pictures directly in images and annotations. Got: {describe_folder(root)}; "
        f"in images: {describe_folder(root / 'images')}. Check the folder."
    )


def describe_folder(root: Path) -> str:
    """Returns what is in a folder, for messages."""
    if not root.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in root.iterdir())[:20]) or "an empty folder"


def _holds_pictures(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
