"""The data check of COCO files: all splits together, every finding of each, and how they compare."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.datasets.check_annotations import AnnotationChecker, AnnotationFacts
from swin_dense.datasets.check_findings import Finding, Report, listed, printable, shown
from swin_dense.datasets.check_images import (
    PictureFacts,
    Progress,
    in_processes,
    picture_findings,
    read_picture_facts,
    read_picture_header,
    repeated_pictures,
    size_range,
)
from swin_dense.datasets.check_meant import find_misnamed, pictures_below, write_whole_ids
from swin_dense.datasets.check_values import id_for_report, read_id
from swin_dense.datasets.coco_json import collection_paused, find_coco_split, read_coco_json, read_images
from swin_dense.datasets.images import max_pixels
from swin_dense.errors import AnnotationError, DataError

_SECTIONS = ("images", "annotations", "categories")

# COCO's bounds of small, medium and large: 32² and 96² square pixels (cocoapi, cocoeval.py).
_SMALL_AREA, _LARGE_AREA = 32**2, 96**2


@dataclass
class CocoSplit:
    """One annotation file with its images, as far as they could be read.

    Attributes:
        name: Of the split.
        annotation_file: The file.
        image_folder: What file names are relative to.
        content: The file's three sections, each a list of whatever stands there.
        pictures: Position of an image in the file -> what its picture holds; of entries that name one only.
        sizes_hw: (height, width) of each image: the file's, or the picture's where that has none; None without both.
        renamed: Position of an image whose file name is wrong -> the file that is meant, relative to the folder.
    """

    name: str
    annotation_file: Path
    image_folder: Path
    content: dict[str, list[Any]]
    pictures: dict[int, PictureFacts] = field(default_factory=dict)
    sizes_hw: list[tuple[int, int] | None] = field(default_factory=list)
    renamed: dict[int, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The annotation file, as it stands in findings."""
        return str(self.annotation_file)


@dataclass
class CocoCheck:
    """What `check_coco` has read and found."""

    splits: list[CocoSplit]
    report: Report


def find_coco_files(root: str | Path) -> list[tuple[str, Path, Path]]:
    """(split, annotation file, image folder) of the splits that a data folder has; none where it is no COCO folder.

    Raises:
        DataError: There is an annotation file without an image folder.
    """
    found = []
    for split in ("train", "val"):
        try:
            found.append((split, *find_coco_split(root, split)))
        except DataError as error:
            if f"image folder of split {split!r} not found" in str(error):
                raise
    return found


def check_coco(
    files: Sequence[tuple[str, Path, Path]],
    *,
    decode: bool = True,
    workers: int = 0,
    progress: Callable[[str], Progress] = lambda title: lambda done, total: None,
) -> CocoCheck:
    """Checks annotation files, their pictures, and what splits have in common.

    Args:
        files: (name of the split, annotation file, image folder) of each; training first.
        decode: False reads the headers of pictures only.
        workers: Processes that read pictures; 0 reads them in this one.
        progress: Gets a title, returns what is told how much is done of how much.

    Raises:
        AnnotationError: No file could be read; says why the first one could not.
        DataError: An image folder is missing.
    """
    report = Report()
    splits = _read_splits(files, report, progress("annotation files"))
    rows_of_images = [_check_image_entries(split, report) for split in splits]
    _read_pictures(splits, decode, workers, progress("pictures"))
    for split, row_of_image in zip(splits, rows_of_images, strict=True):
        _check_pictures(split, report)
        index_of_category = _check_categories(split, report)
        # Annotations of another picture, or of one that was resized, would be wrong all at once.
        sizes_hw = [
            None if position in split.pictures and _differs(split.pictures[position], size_hw) else size_hw
            for position, size_hw in enumerate(split.sizes_hw)
        ]
        checker = AnnotationChecker(split.name, split.file, row_of_image, sizes_hw, index_of_category)
        facts = checker.check(split.content["annotations"], progress(f"annotations of {split.name}"))
        report.findings += checker.findings
        names = {index: _name_of(split, raw_id) for raw_id, index in index_of_category.items()}
        _check_use(split, facts, names, report)
        report.statistics[split.name] = _statistics(split, facts, names)
    _compare_categories(splits, report)
    _check_repeated_pictures(splits, report)
    _check_unlisted(splits, report)
    return CocoCheck(splits, report)


def read_any_coco_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads an annotation file whose entries may be anything.

    Returns:
        (its content, keys that stand twice in one object).

    Raises:
        AnnotationError: It is no annotation file at all, in the words of `read_coco_json`.
    """
    repeated: list[str] = []

    def keep_last(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.extend(key for key, count in counts.items() if count > 1)
        return values

    try:
        with collection_paused():
            content = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=keep_last)
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and all(content.get(name) and isinstance(content[name], list) for name in _SECTIONS):
        return content, repeated
    try:
        return read_coco_json(path), repeated  # which says what is wrong
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: the JSON cannot be read ({error}). Correct or download it again.") from None


def _read_splits(files: Sequence[tuple[str, Path, Path]], report: Report, progress: Progress) -> list[CocoSplit]:
    splits: list[CocoSplit] = []
    errors: list[AnnotationError] = []
    for number, (name, annotation_file, image_folder) in enumerate(files):
        progress(number, len(files))
        if not image_folder.is_dir():
            raise DataError(f"{image_folder}: wanted the folder of the images of {annotation_file}; there is none.")
        try:
            content, repeated = read_any_coco_json(annotation_file)
        except AnnotationError as error:
            errors.append(error)
            reason = str(error).removeprefix(f"{annotation_file}: ").rstrip(".")
            report.findings.append(Finding("file-unreadable", name, str(annotation_file), reason))
            continue
        splits.append(CocoSplit(name, annotation_file, image_folder, content))
        _check_id_types(splits[-1], report)
        for key, count in Counter(repeated).items():
            reason = f"the key {shown(key)} stands twice in one object; only one can be meant"
            report.findings.append(Finding("json-repeated-key", name, str(annotation_file), reason, count=count))
    progress(len(files), len(files))
    if not splits:
        raise errors[0]
    return splits


def _check_id_types(split: CocoSplit, report: Report) -> None:
    def tell(section: str, position: int, reason: str) -> None:
        entry = split.content[section][position]
        image_id = entry.get({"images": "id", "annotations": "image_id"}.get(section))
        annotation_id = entry.get("id") if section == "annotations" else None
        ids = (id_for_report(image_id), id_for_report(annotation_id))
        report.findings.append(Finding("id-not-whole", split.name, split.file, reason, *ids, entry=(section, position)))

    write_whole_ids(split.content, tell)


def _check_image_entries(split: CocoSplit, report: Report) -> dict[int, int]:
    """Fills `sizes_hw`, `pictures` and `renamed`; returns image id -> position."""
    row_of_image: dict[int, int] = {}
    outside: dict[int, str] = {}

    def add(kind: str, position: int, reason: str, image_id: object) -> None:
        entry = ("images", position)
        report.findings.append(Finding(kind, split.name, split.file, reason, id_for_report(image_id), entry=entry))

    for position, image in enumerate(split.content["images"]):
        split.sizes_hw.append(None)
        if not isinstance(image, dict):
            add("image-invalid", position, f"wanted a JSON object, got {shown(image)}", None)
            continue
        image_id = read_id(image.get("id"))
        if image_id is None:
            add("image-invalid", position, f"id must be a whole number, got {shown(image.get('id'))}", image.get("id"))
            continue
        if image_id in row_of_image:
            first = split.content["images"][row_of_image[image_id]].get("file_name")
            add("image-repeated-id", position, f"the id is that of {shown(first)} already", image_id)
            continue
        row_of_image[image_id] = position
        name = image.get("file_name")
        fault = _file_name_fault(name)
        if fault == "image-outside-folder":
            outside[position] = str(name)
        elif fault is not None:
            add(fault, position, f"file_name is {shown(name)}", image_id)
        elif isinstance(name, str):
            split.pictures[position] = PictureFacts(os.path.join(split.image_folder, name))
        _check_size(split, position, image, add)
    _look_for_misnamed(split, outside, add)
    return row_of_image


def _look_for_misnamed(split: CocoSplit, outside: dict[int, str], add: Callable[[str, int, str, object], None]) -> None:
    images, paths = split.content["images"], {row: facts.path for row, facts in split.pictures.items()}
    missing = {row: images[row]["file_name"] for row, path in paths.items() if not os.path.lexists(path)}
    # A path upwards means a certain file elsewhere, not one of that name in here.
    absolute = {row: name for row, name in outside.items() if ".." not in name}
    used = [path for row, path in paths.items() if row not in missing]
    split.renamed = find_misnamed({**missing, **absolute}, split.image_folder, used)
    for row, name in {**outside, **missing}.items():
        there = split.renamed.get(row)
        text = f"file_name is {shown(name)}" + ("" if there is None else f"; taken as {shown(there)}, which is there")
        if row in outside:
            add("image-outside-folder", row, text, images[row]["id"])
        elif there is not None:
            add("picture-misnamed", row, text, images[row]["id"])
        if there is not None:
            split.pictures[row] = PictureFacts(os.path.join(split.image_folder, there))


def _check_size(
    split: CocoSplit, position: int, image: dict[str, Any], add: Callable[[str, int, str, object], None]
) -> None:
    width, height = image.get("width"), image.get("height")
    if width is None or height is None:
        add("image-size-missing", position, "width or height is missing", image["id"])
        return
    width_px, height_px = _side(width), _side(height)
    if width_px is None or height_px is None or width_px * height_px > max_pixels():
        text = f"width is {shown(width)}, height is {shown(height)}; wanted whole numbers of pixels"
        add("image-size-invalid", position, text, image["id"])
    else:
        split.sizes_hw[position] = (height_px, width_px)


def _side(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 1 <= value <= max_pixels() else None


def _file_name_fault(name: object) -> str | None:
    try:
        # The loader's own rule, asked for one entry.
        read_images("", [{"id": 0, "file_name": name, "width": 1, "height": 1}], Path())
    except AnnotationError:
        is_path = isinstance(name, str) and name and "\0" not in name
        return "image-outside-folder" if is_path else "image-invalid"
    return None


def _read_pictures(splits: list[CocoSplit], decode: bool, workers: int, progress: Progress) -> None:
    places = [(split, position) for split in splits for position in split.pictures]
    paths = [split.pictures[position].path for split, position in places]
    read = read_picture_facts if decode else read_picture_header
    for (split, position), facts in zip(places, in_processes(read, paths, workers, progress), strict=True):
        split.pictures[position] = facts
        if split.sizes_hw[position] is None:
            split.sizes_hw[position] = facts.turned_hw


def _differs(picture: PictureFacts, size_hw: tuple[int, int] | None) -> bool:
    return any(kind == "image-size-differs" for kind, _ in picture_findings(picture, size_hw))


def _check_pictures(split: CocoSplit, report: Report) -> None:
    inside = os.path.realpath(split.image_folder) + os.sep
    for position, facts in split.pictures.items():
        found = picture_findings(facts, split.sizes_hw[position])
        if facts.fault is None and not os.path.realpath(facts.path).startswith(inside):
            found.append(("picture-linked-out", f"it is a link to {printable(os.path.realpath(facts.path))}"))
        for kind, reason in found:
            image_id = split.content["images"][position]["id"]
            entry = ("images", position)
            report.findings.append(Finding(kind, split.name, facts.path, reason, image_id, entry=entry))


def _check_categories(split: CocoSplit, report: Report) -> dict[int, int]:
    """Returns category id -> class index, in the order of the file."""
    index_of_category: dict[int, int] = {}
    names: dict[str, int] = {}
    for position, category in enumerate(split.content["categories"]):
        raw_id, name = (category.get("id"), category.get("name")) if isinstance(category, dict) else (None, None)
        category_id = read_id(raw_id)
        found = None
        if category_id is None:
            got = raw_id if isinstance(category, dict) else category
            found = ("category-invalid", f"wanted a whole number as id, got {shown(got)}")
        elif category_id in index_of_category:
            found = (
                "category-repeated-id",
                f"category id {category_id} ({shown(name)}) stands for another one already",
            )
        else:
            index_of_category[category_id] = len(index_of_category)
            if category_id == 0:
                entry = ("categories", position)
                text = f"{shown(name)} has the id 0"
                report.findings.append(Finding("category-id-zero", split.name, split.file, text, entry=entry))
            if not isinstance(name, str) or not name.strip():
                found = ("category-unnamed", f"category id {category_id} has the name {shown(name)}")
            elif name in names:
                found = ("category-repeated-name", f"{shown(name)} is the name of {names[name]} and {category_id}")
            else:
                names[name] = category_id
        if found is not None:
            entry = ("categories", position)
            report.findings.append(Finding(found[0], split.name, split.file, found[1], entry=entry))
    return index_of_category


def _name_of(split: CocoSplit, category_id: int) -> str:
    for category in split.content["categories"]:
        if isinstance(category, dict) and read_id(category.get("id")) == category_id:
            name = category.get("name")
            return name if isinstance(name, str) and name.strip() else f"category {category_id}"
    raise KeyError(category_id)


def _check_use(split: CocoSplit, facts: AnnotationFacts, names: dict[int, str], report: Report) -> None:
    unused = sorted(set(names) - set(facts.used_labels.tolist()))
    if unused:
        text = f"never used: {listed([names[index] for index in unused])}"
        report.findings.append(Finding("category-unused", split.name, split.file, text, count=len(unused)))
    empty = len(split.pictures) - len(set(facts.used_rows.tolist()) & set(split.pictures))
    if empty:
        text = f"{empty} of {len(split.pictures)} images have no annotation; they are background"
        report.findings.append(Finding("image-without-objects", split.name, split.file, text, count=empty))


def _compare_categories(splits: list[CocoSplit], report: Report) -> None:
    def classes(split: CocoSplit) -> dict[int, str]:
        entries = [category for category in split.content["categories"] if isinstance(category, dict)]
        return {
            entry["id"]: shown(entry.get("name")) for entry in reversed(entries) if read_id(entry.get("id")) is not None
        }

    first = classes(splits[0])
    for split in splits[1:]:
        got = classes(split)
        differing = sorted(raw_id for raw_id in first.keys() | got.keys() if first.get(raw_id) != got.get(raw_id))
        if differing:
            pairs = [f"id {raw_id}: {first.get(raw_id, 'none')} / {got.get(raw_id, 'none')}" for raw_id in differing]
            text = f"{splits[0].name} / {split.name}: {listed(pairs)}"
            report.findings.append(
                Finding("categories-differ", split.name, split.file, text, other=splits[0].file, count=len(differing))
            )


def _check_repeated_pictures(splits: list[CocoSplit], report: Report) -> None:
    places = [(number, position) for number, split in enumerate(splits) for position in split.pictures]
    facts = [splits[number].pictures[position] for number, position in places]
    for kind, number, other in repeated_pictures(facts, [number for number, _ in places]):
        split, position = splits[places[number][0]], places[number][1]
        other_split, path = splits[places[other][0]], facts[other].path
        text = f"shows the same as {shown(os.path.basename(path))} of {other_split.name}"
        image_id, entry = split.content["images"][position]["id"], ("images", position)
        report.findings.append(Finding(kind, split.name, facts[number].path, text, image_id, entry=entry, other=path))


def _check_unlisted(splits: list[CocoSplit], report: Report) -> None:
    for folder in dict.fromkeys(split.image_folder for split in splits):
        sharing = [split for split in splits if split.image_folder == folder]
        used = {os.path.normpath(facts.path) for split in sharing for facts in split.pictures.values()}
        unlisted = [path for path in pictures_below(folder) if os.path.normpath(path) not in used]
        if unlisted:
            text = f"not used: {listed([os.path.relpath(path, folder) for path in sorted(unlisted)])}"
            split_name = sharing[0].name
            report.findings.append(Finding("image-not-listed", split_name, str(folder), text, count=len(unlisted)))


def _statistics(split: CocoSplit, facts: AnnotationFacts, names: dict[int, str]) -> dict[str, Any]:
    areas = facts.areas[~facts.is_crowd]
    sizes = np.array([size for size in split.sizes_hw if size is not None], np.int64).reshape(-1, 2)
    per_image = np.unique(facts.used_rows, return_counts=True)[1]
    with_crowd = len(np.unique(facts.image_rows[facts.is_crowd]))
    per_class = np.bincount(facts.used_labels[facts.used_labels >= 0], minlength=len(names))
    num_images, num_annotations = len(split.content["images"]), len(split.content["annotations"])
    return {
        "images": num_images,
        "annotations": num_annotations,
        "annotations_per_image": {"mean": num_annotations / num_images, "max": int(per_image.max(initial=0))},
        "image_sides_px": size_range(sizes),
        "classes": {names[index]: int(per_class[index]) for index in sorted(names)},
        "sizes": {
            "small": int((areas < _SMALL_AREA).sum()),
            "medium": int(((areas >= _SMALL_AREA) & (areas < _LARGE_AREA)).sum()),
            "large": int((areas >= _LARGE_AREA).sum()),
        },
        "crowd": {
            "annotations": int(facts.is_crowd.sum()),
            "share_of_annotations": float(facts.is_crowd.mean()) if len(facts.is_crowd) else 0.0,
            "share_of_images": with_crowd / num_images,
        },
    }
