"""Reading a COCO annotation file: JSON, its layout, its categories and its images; one sentence for each mistake."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from swin_dense.datasets.folders import describe_folder, first_existing, split_names
from swin_dense.datasets.images import image_size_hw
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.shared_arrays import FileNames, SharedArrays
from swin_dense.errors import AnnotationError, ConfigError, DataError

_SECTIONS = ("images", "annotations", "categories")
_LARGEST_ID = 2**63 - 1


@dataclass(frozen=True)
class CocoImages(SharedArrays):
    """The images of an annotation file, in file order.

    Attributes:
        ids: (N,) int64.
        file_names: N paths relative to the image folder.
        sizes_hw: (N, 2) int64, (height, width) as the file states them.
    """

    ids: np.ndarray
    file_names: FileNames
    sizes_hw: np.ndarray


def read_coco_json(path: str | Path) -> dict[str, Any]:
    """Reads the file and checks that it has COCO's three sections.

    Raises:
        AnnotationError: the file is missing, no JSON, cut short, or no COCO annotation file; says which and what to do.
    """
    path = Path(path)
    text = read_json_text(path)
    try:
        with collection_paused():
            content = json.loads(text, object_pairs_hook=_refuse_repeated_keys)
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: {describe_bad_json(text, error)}") from None
    except RecursionError:
        raise AnnotationError(f"{path}: brackets are nested too deeply; this is no COCO annotation file.") from None
    except ValueError as error:  # a number of thousands of digits
        raise AnnotationError(f"{path}: cannot be read ({str(error).partition(';')[0]}).") from None
    except AnnotationError as error:
        raise AnnotationError(f"{path}: {error}") from None
    _check_sections(path, content)
    return content


def read_categories(path: str | Path, categories: list[Any]) -> LabelMap:
    """Builds the label map: categories in the order of their ids, whatever the gaps between them.

    Raises:
        AnnotationError: an entry lacks its id or name, or two have the same.
    """
    for position, category in enumerate(categories):
        if not isinstance(category, dict) or not is_id(category.get("id")):
            raise AnnotationError(f"{path}: categories[{position}] needs a whole number as id, got {category!r}.")
        if not isinstance(category.get("name"), str):
            raise AnnotationError(f"{path}: category id={category['id']} needs a name, got {category.get('name')!r}.")
    ordered = sorted(categories, key=lambda category: category["id"])
    try:
        return LabelMap(tuple(category["name"] for category in ordered), tuple(category["id"] for category in ordered))
    except ConfigError as error:
        raise AnnotationError(f"{path}: categories: {error}") from None


def read_images(path: str | Path, images: list[Any], image_folder: Path) -> CocoImages:
    """Reads the image entries; a missing width or height is taken from the picture's header.

    Raises:
        AnnotationError: an entry lacks its id or file name, is repeated, has no valid size, or its file name leads out
            of the image folder.
    """
    ids: list[int] = []
    file_names: list[str] = []
    sizes_hw: list[tuple[int, int]] = []
    for position, image in enumerate(images):
        if not isinstance(image, dict) or not is_id(image.get("id")):
            got = image.get("id") if isinstance(image, dict) else image
            raise AnnotationError(f"{path}: images[{position}]: id must be a whole number, got {got!r}.")
        where = f"{path}: image id={image['id']}"
        ids.append(image["id"])
        file_names.append(_checked_file_name(where, image.get("file_name")))
        if image.get("width") is None or image.get("height") is None:
            sizes_hw.append(image_size_hw(image_folder / file_names[-1]))
        else:
            sizes_hw.append((_checked_side(where, image, "height"), _checked_side(where, image, "width")))
    repeated = repeated_values(np.array(ids))
    if repeated:
        raise AnnotationError(f"{path}: images: every id must be there once, repeated are {repeated}. Renumber them.")
    return CocoImages(np.array(ids, np.int64), FileNames(file_names), np.array(sizes_hw, np.int64))


@contextmanager
def collection_paused() -> Iterator[None]:
    """Stops the search for cyclic garbage: among the millions of values of a large file there is none to find.

    Every new value would count towards the next search through all of them, which takes as long as the reading.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_id(value: object) -> bool:
    """Tells whether a value is an id: a whole number of 64 bits, no text, no float, no bool."""
    return type(value) is int and -_LARGEST_ID <= value <= _LARGEST_ID


def repeated_values(values: np.ndarray, limit: int = 10) -> list[int]:
    """Returns the first values that occur more than once, in ascending order."""
    unique, counts = np.unique(values, return_counts=True)
    return [int(value) for value in unique[counts > 1][:limit]]


def find_coco_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """Finds annotation file and image folder of a split in the usual folder layouts.

    Looks for `instances_{train2017,train,training}.json` (val accordingly) in `root/annotations` and `root`, and for
    the images in `root/<name>`, `root/images/<name>` and `root/images`.

    Args:
        root: the data set's folder.
        split: "train" or "val".

    Returns:
        (annotation file, image folder).

    Raises:
        DataError: not found; lists what was looked for and what is there.
    """
    root = Path(root)
    names = split_names(split)
    files = [folder / f"instances_{name}.json" for folder in (root / "annotations", root) for name in names]
    folders = [root / name for name in names] + [root / "images" / name for name in names] + [root / "images"]
    annotation_file = first_existing(files, Path.is_file)
    image_folder = first_existing(folders, Path.is_dir)
    if annotation_file is None:
        raise DataError(_not_found(root, f"annotation file of split {split!r}", files))
    if image_folder is None:
        raise DataError(_not_found(root, f"image folder of split {split!r}", folders))
    return annotation_file, image_folder


def _not_found(root: Path, what: str, candidates: list[Path]) -> str:
    looked_for = ", ".join(str(candidate.relative_to(root)) for candidate in candidates)
    return f"{root}: {what} not found. Looked for: {looked_for}. Got: {describe_folder(root)}. Check the folder."


def read_json_text(path: Path) -> str:
    """Reads the text of a JSON file.

    Raises:
        AnnotationError: the file is missing, a folder, unreadable or not in UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise AnnotationError(f"{path}: there is no such file. Check the path.") from None
    except IsADirectoryError:
        raise AnnotationError(f"{path}: wanted a JSON file, got a folder.") from None
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        # Some editors put a byte order mark first.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(
            f"{path}: wanted JSON in UTF-8, byte {error.start} is not. Save it as UTF-8, or unpack it first."
        ) from None


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise AnnotationError(f"the key {repeated!r} stands twice in one object; only one can be meant. Remove one.")
    return values


def describe_bad_json(text: str, error: json.JSONDecodeError) -> str:
    """Says what a text that is no JSON seems to be, and what to do."""
    start = text.lstrip()[:1]
    if not start:
        return "the file is empty. Copy or download it again."
    if start == "<":
        return "wanted JSON, got a web page or XML. Download it again."
    if text.startswith("version https://git-lfs"):
        return "wanted JSON, got a Git LFS pointer. Run 'git lfs pull'."
    if error.pos >= len(text.rstrip()) - 1 or "Unterminated" in error.msg:
        return f"the JSON is cut short at line {error.lineno} ({len(text)} characters). Copy or download it again."
    return f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}. Correct it there."


def _check_sections(path: Path, content: Any) -> None:  # noqa: ANN401 - whatever the JSON holds
    if isinstance(content, list):
        first = content[0] if content else None
        kind = "a results file" if isinstance(first, dict) and "score" in first else "a list"
        raise AnnotationError(f"{path}: wanted a COCO annotation file with {', '.join(_SECTIONS)}, got {kind}.")
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: wanted a COCO annotation file, got {type(content).__name__} at the top.")
    for section in _SECTIONS:
        if section not in content:
            raise AnnotationError(
                f"{path}: the key {section!r} is missing; a COCO annotation file has {', '.join(_SECTIONS)}. "
                f"Got {', '.join(map(repr, list(content)[:10])) or 'none'}."
            )
        if not isinstance(content[section], list) or not content[section]:
            got = "an empty list" if content[section] == [] else type(content[section]).__name__
            raise AnnotationError(f"{path}: {section!r} must be a list with at least one entry, got {got}.")


def _checked_file_name(where: str, name: object) -> str:
    if not isinstance(name, str) or not name or "\0" in name:
        raise AnnotationError(f"{where}: file_name must be the path of a picture, got {name!r}.")
    if name[0] != "/" and ".." not in name and ":" not in name and "\\" not in name:
        return name
    # Both kinds of path, so that a file made on another system cannot lead out either.
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if any(path.is_absolute() or path.drive or ".." in path.parts for path in paths):
        raise AnnotationError(
            f"{where}: file_name must stay inside the image folder, got {name!r}. "
            f"Write it relative to the image folder, without '..'."
        )
    return name


def _checked_side(where: str, image: dict[str, Any], field: str) -> int:
    value = image[field]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 1 <= value < 2**31:
        raise AnnotationError(f"{where}: {field} must be a whole number of pixels, at least 1, got {value!r}.")
    return value
