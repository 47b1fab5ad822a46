"""A cleaned copy of a checked COCO data set, which `find_coco_split` finds.

annotations/<name of the annotation file> is the cleaned file; each image folder is a link to the original one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.datasets.check_coco import CocoCheck, CocoSplit
from swin_dense.datasets.check_copy import (
    UNUSABLE_PICTURES,
    Change,
    first_of,
    place_folder,
    require_new_folder,
    write_changes,
)
from swin_dense.datasets.check_findings import KINDS, kinds_by_position
from swin_dense.datasets.check_values import (
    Segmentation,
    id_for_report,
    mask_box,
    read_area,
    read_box,
    read_id,
    segmentation_of,
)
from swin_dense.errors import DataError

_UNUSABLE_IMAGES = {
    *UNUSABLE_PICTURES,
    "image-invalid",
    "image-repeated-id",
    "image-outside-folder",
    "image-size-differs",
}
_UNUSABLE_ANNOTATIONS = {
    "annotation-invalid",
    "annotation-image-unknown",
    "annotation-category-unknown",
    "annotation-repeated",
    "mask-empty",
}
_BOX_FROM_MASK = {
    "box-invalid",
    "box-xyxy",
    "box-normalised",
    "box-outside",
    "box-degenerate",
    "box-thin",
    "box-off-mask",
}
_CORRECTED_ON_READING = {"json-repeated-key": "the last value kept", "id-not-whole": "the whole number written"}
_NUMBERED_ANEW = {"annotation-id-invalid", "annotation-id-repeated", "annotation-id-zero"}


def fix_coco(
    check: CocoCheck, out: str | Path, root: str | Path | None = None, *, copy_pictures: bool = False
) -> list[Change]:
    """Writes a cleaned copy of a COCO data set.

    Args:
        check: The checked data.
        out: A new or empty folder.
        root: The data folder whose layout is kept; None puts each image folder under its own name.
        copy_pictures: Copies instead of a link.

    Raises:
        ConfigError: `out` is not empty, or lies in the input.
        DataError: Nothing usable is left of a split.
    """
    out = Path(out)
    require_new_folder(out, [split.image_folder for split in check.splits])
    cleaned = _CleanedCategories(check.splits)
    contents, changes = [], list(cleaned.changes)
    for split in check.splits:
        content, changed = _clean_coco(split, check, cleaned)
        contents.append(content)
        changes += changed
    for split, content in zip(check.splits, contents, strict=True):
        target = out / "annotations" / split.annotation_file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", encoding="utf-8") as file:
            file.writelines(_json_pieces(content))
        folder = split.image_folder
        inside = Path(os.path.relpath(folder, root)) if root is not None else Path(folder.resolve().name or "images")
        if inside.parts[0] in ("annotations", "..", "."):
            inside = Path("images")
        place_folder(folder, out / inside, [image["file_name"] for image in content["images"]], copy_pictures)
    return write_changes(out, changes)


def _json_pieces(content: Mapping[str, Any]) -> Iterator[str]:
    """The text of a file entry by entry: as a whole, that of a large file takes as much memory as its values."""
    for number, (key, value) in enumerate(content.items()):
        yield f"{', ' if number else '{'}{json.dumps(key)}: "
        if not isinstance(value, list):
            yield json.dumps(value)
            continue
        for place, entry in enumerate(value):
            yield f"{', ' if place else '['}{json.dumps(entry)}"
        yield "]" if value else "[]"
    yield "}"


class _CleanedCategories:
    """Categories that are the same in every split.

    Attributes:
        entries: The cleaned section.
        changes: What was done to it.
    """

    def __init__(self, splits: list[CocoSplit]) -> None:
        self.changes: list[Change] = []
        per_split = [self._one_file(split) for split in splits]
        merged = {entry["name"]: entry for entry in per_split[0].values()}
        taken = set(per_split[0])
        self._new_ids: list[dict[int, int]] = []
        for split, entries in zip(splits, per_split, strict=True):
            new_ids = {}
            for raw_id, entry in entries.items():
                if entry["name"] not in merged:
                    new_id = raw_id if raw_id not in taken else max(taken) + 1
                    taken.add(new_id)
                    merged[entry["name"]] = {**entry, "id": new_id}
                new_ids[raw_id] = merged[entry["name"]]["id"]
                if new_ids[raw_id] != raw_id:
                    done = f"category {entry['name']!r}: id {raw_id} is now {new_ids[raw_id]}"
                    self.changes.append(Change("categories-differ", split.file, done))
            self._new_ids.append(new_ids)
        for split, entries in zip(splits, per_split, strict=True):
            for name in sorted(merged.keys() - {entry["name"] for entry in entries.values()}):
                self.changes.append(Change("categories-differ", split.file, f"category {name!r} added"))
        self.entries = list(merged.values())
        self._names = [split.name for split in splits]

    def new_ids(self, split: CocoSplit) -> dict[int, int]:
        """Id in the input -> id in the copy."""
        return self._new_ids[self._names.index(split.name)]

    def _one_file(self, split: CocoSplit) -> dict[int, dict[str, Any]]:
        entries: dict[int, dict[str, Any]] = {}
        names: set[str] = set()
        for position, category in enumerate(split.content["categories"]):
            raw_id = read_id(category.get("id")) if isinstance(category, dict) else None
            if raw_id is None or raw_id in entries:
                kind = "category-invalid" if raw_id is None else "category-repeated-id"
                self.changes.append(Change(kind, split.file, f"categories[{position}] removed"))
                continue
            name = category.get("name")
            if not isinstance(name, str) or not name.strip():
                kind, name = "category-unnamed", f"category {raw_id}"
            else:
                kind = "category-repeated-name"
            while name in names:
                name = f"{name} {raw_id}"
            if name != category.get("name"):
                self.changes.append(Change(kind, split.file, f"category id {raw_id} named {name!r}"))
            names.add(name)
            entries[raw_id] = {**category, "name": name}
        return entries


def _clean_coco(
    split: CocoSplit, check: CocoCheck, categories: _CleanedCategories
) -> tuple[dict[str, Any], list[Change]]:
    findings = check.report.findings
    changes = [
        Change(finding.kind, finding.file, done, finding.image_id, finding.annotation_id)
        for finding in findings
        if finding.split == split.name and (done := _CORRECTED_ON_READING.get(finding.kind)) is not None
    ]
    images, sizes_hw = _clean_images(split, kinds_by_position(findings, split.name, "images"), changes)
    kinds_of = kinds_by_position(findings, split.name, "annotations")
    anew = any(kinds & _NUMBERED_ANEW for kinds in kinds_of.values())
    if anew:
        kind = next(kind for kinds in kinds_of.values() for kind in kinds if kind in _NUMBERED_ANEW)
        changes.append(Change(kind, split.file, "annotations numbered anew from 1"))
    annotations: list[dict[str, Any]] = []
    new_ids = categories.new_ids(split)
    for position, annotation in enumerate(split.content["annotations"]):
        cleaned = _clean_annotation(split, annotation, kinds_of.get(position, set()), sizes_hw, changes)
        if cleaned is not None:
            cleaned["category_id"] = new_ids[cleaned["category_id"]]
            cleaned["id"] = len(annotations) + 1 if anew else cleaned["id"]
            annotations.append(cleaned)
    if not annotations:
        raise DataError(f"{split.file}: nothing usable is left of it, so there is no cleaned copy.")
    return {**split.content, "images": images, "annotations": annotations, "categories": categories.entries}, changes


def _clean_images(
    split: CocoSplit,
    kinds_of: Mapping[int, set[str]],
    changes: list[Change],
) -> tuple[list[dict[str, Any]], dict[int, tuple[int, int]]]:
    """The usable images, and id -> (height, width)."""
    images: list[dict[str, Any]] = []
    sizes_hw: dict[int, tuple[int, int]] = {}
    for position, image in enumerate(split.content["images"]):
        kinds, size_hw = kinds_of.get(position, set()), split.sizes_hw[position]
        there = split.renamed.get(position)
        unusable = first_of(kinds, _UNUSABLE_IMAGES - ({"image-outside-folder"} if there is not None else set()))
        image_id = id_for_report(image.get("id") if isinstance(image, dict) else None)
        if unusable is not None or size_hw is None:
            done = "image removed with its annotations"
            changes.append(Change(unusable or "image-size-invalid", split.file, done, image_id))
            continue
        if there is not None:
            image = {**image, "file_name": there}
            wrong = "image-outside-folder" if "image-outside-folder" in kinds else "picture-misnamed"
            changes.append(Change(wrong, split.file, f"file_name is {there!r}", image_id))
        kind = first_of(kinds, {"image-size-missing", "image-size-invalid"})
        if kind is not None:
            image = {**image, "height": size_hw[0], "width": size_hw[1]}
            done = f"height x width set to the picture's, {size_hw[0]} x {size_hw[1]}"
            changes.append(Change(kind, split.file, done, image_id))
        images.append(image)
        sizes_hw[image["id"]] = size_hw
    return images, sizes_hw


def _clean_annotation(
    split: CocoSplit,
    annotation: Any,  # noqa: ANN401 - whatever the JSON holds
    kinds: set[str],
    sizes_hw: dict[int, tuple[int, int]],
    changes: list[Change],
) -> dict[str, Any] | None:
    """A cleaned copy of an annotation, or None where it cannot be used."""
    known = annotation if isinstance(annotation, dict) else {}
    ids = (id_for_report(known.get("image_id")), id_for_report(known.get("id")))

    def tell(kind: str, done: str) -> None:
        changes.append(Change(kind, split.file, done, *ids))

    unusable = first_of(kinds, _UNUSABLE_ANNOTATIONS)
    if unusable is not None:
        tell(unusable, "annotation removed")
        return None
    size_hw = sizes_hw.get(annotation["image_id"])
    if size_hw is None:
        return None  # told with its image
    segmentation = segmentation_of(annotation, size_hw)
    if not segmentation.is_usable:
        tell(segmentation.faults[0][0], "annotation removed")
        return None
    cleaned = dict(annotation)
    if segmentation.faults:
        cleaned["segmentation"] = [polygon.tolist() for polygon in segmentation.polygons]
        for kind, _ in segmentation.faults:
            tell(kind, KINDS[kind].cleaned)
    if _clean_numbers(cleaned, kinds, segmentation, size_hw, tell):
        return cleaned
    tell("mask-empty", "annotation removed")
    return None


def _clean_numbers(
    annotation: dict[str, Any],
    kinds: set[str],
    segmentation: Segmentation,
    size_hw: tuple[int, int],
    tell: Callable[[str, str], None],
) -> bool:
    """Corrects iscrowd, bbox and area, in place; False where a mask is needed and has no pixel."""
    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
        tell("crowd-missing", "iscrowd is 0")
    elif "crowd-invalid" in kinds:
        annotation["iscrowd"] = 1
        tell("crowd-invalid", "iscrowd is 1: neither learned nor counted")
    if "ignore-invalid" in kinds:
        annotation["ignore"] = 1
        tell("ignore-invalid", "ignore is 1: neither learned nor counted")
    box, _ = read_box(annotation.get("bbox"))
    no_box = first_of(kinds, _BOX_FROM_MASK) or (None if box is not None else "box-missing")
    no_area = first_of(kinds, {"area-invalid", "area-differs"})
    if read_area(annotation.get("area")) is None:
        no_area = no_area or "area-missing"
    if no_box or no_area:
        runs = segmentation.run_lengths(size_hw)
        area = int(runs[1::2].sum())
        if not area:
            return False
    if no_box:
        x1, y1, x2, y2 = mask_box(runs, size_hw[0]).tolist()
        if no_box == "box-normalised" and max(x2, y2) <= 1:  # its segmentation holds shares of the image too
            return False
        annotation["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        tell(no_box, f"bbox is {annotation['bbox']}, from the segmentation")
    elif "box-partly-outside" in kinds and box is not None:
        low = np.clip(box[:2], 0, size_hw[::-1])
        high = np.clip(np.add(box[:2], box[2:]), 0, size_hw[::-1])
        annotation["bbox"] = [*low.tolist(), *(high - low).tolist()]
        tell("box-partly-outside", f"bbox clipped to {annotation['bbox']}")
    if no_area:
        annotation["area"] = area
        tell(no_area, f"area is {area}, from the segmentation")
    return True
