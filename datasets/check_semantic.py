"""The data check of images with label pictures: all splits together, every finding of each, and what the values are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.check_findings import Finding, Report, listed, printable, shown
from swin_dense.datasets.check_images import (
    OPEN_ERRORS,
    PictureFacts,
    Progress,
    in_processes,
    opened,
    picture_findings,
    read_picture_facts,
    read_picture_header,
    repeated_pictures,
    size_range,
)
from swin_dense.datasets.folders import describe_folder, files_ending_in, find_semantic_split
from swin_dense.datasets.images import IMAGE_SUFFIXES, read_label
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError, ImageError

_LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
_LABEL_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in _LOSSY_SUFFIXES)
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_ADE20K_VALUES = 150


@dataclass(frozen=True)
class LabelFacts:
    """What the file of a label picture holds.

    Attributes:
        path: The file.
        fault: Kind of finding that makes it unusable, or None.
        reason: Why, in words.
        mode: Pillow's colour mode.
        size_hw: (height, width); None where unknown.
        values: Value -> how many pixels have it.
    """

    path: str
    fault: str | None = None
    reason: str = ""
    mode: str = ""
    size_hw: tuple[int, int] | None = None
    values: dict[int, int] = field(default_factory=dict)


@dataclass
class SemanticSplit:
    """The pairs of one split.

    Attributes:
        name: Of the split.
        image_folder: Folder of the images.
        label_folder: Folder of the label pictures.
        pairs: File name without ending -> what image and label picture hold.
    """

    name: str
    image_folder: Path
    label_folder: Path
    pairs: dict[str, tuple[PictureFacts, LabelFacts]] = field(default_factory=dict)


@dataclass
class SemanticCheck:
    """What `check_semantic` has read and found; `label_map` is the one that was given."""

    splits: list[SemanticSplit]
    report: Report
    label_map: LabelMap | None


def find_semantic_folders(root: str | Path) -> list[tuple[str, Path, Path]]:
    """(split, image folder, label folder) of the splits that a data folder has; one, "all", where it has no splits.

    Raises:
        DataError: It has neither; says what was looked for.
    """
    found: list[tuple[str, Path, Path]] = []
    errors = []
    for split in ("train", "val"):
        try:
            found.append((split, *find_semantic_split(root, split)))
        except DataError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    if len(found) == 2 and found[0][1:] == found[1][1:]:
        return [("all", *found[0][1:])]
    return found


def check_semantic(
    folders: Sequence[tuple[str, Path, Path]],
    label_map: LabelMap | None = None,
    *,
    decode: bool = True,
    workers: int = 0,
    progress: Callable[[str], Progress] = lambda title: lambda done, total: None,
) -> SemanticCheck:
    """Checks images, their label pictures, and what splits have in common.

    Args:
        folders: (name of the split, image folder, label folder) of each; training first.
        label_map: The classes and the value of each; without it the values are listed, and none is unknown.
        decode: False reads the headers of images only; label pictures are always read whole.
        workers: Processes that read pictures; 0 reads them in this one.
        progress: Gets a title, returns what is told how much is done of how much.

    Raises:
        DataError: A folder is missing or empty.
    """
    report = Report()
    splits = [SemanticSplit(*folder) for folder in folders]
    places, paths = [], []
    for split in splits:
        for stem, pair in _matched_files(split, report).items():
            places.append((split, stem))
            paths.append(pair)
    read = partial(_read_pair, decode=decode)
    for (split, stem), facts in zip(places, in_processes(read, paths, workers, progress("pictures")), strict=True):
        split.pairs[stem] = facts
    for split in splits:
        for picture, label in split.pairs.values():
            _check_pair(split, picture, label, label_map, report)
        report.statistics[split.name] = _statistics(split, label_map, report)
    _check_repeated_pictures(splits, report)
    if any(finding.kind == "label-colours" for finding in report.findings):
        report.remarks.append("colours become numbers with: swin-dense convert LABELS --from palette; see its --help.")
    if label_map is None:
        values = Counter[int]()
        for split in splits:
            for _, label in split.pairs.values():
                values.update(label.values)
        report.remarks.append(_fitting_map(sorted(values)))
    return SemanticCheck(splits, report, label_map)


def unknown_values(label: LabelFacts, label_map: LabelMap) -> dict[int, int]:
    """Value -> number of pixels, for the values of a label picture that the classes do not know."""
    known = {IGNORED_LABEL, *label_map.raw_ids, *label_map.ignored_values}
    return {value: count for value, count in label.values.items() if value not in known}


def read_label_facts(path: str) -> LabelFacts:
    """Reads a label picture as the loader does."""
    header = read_picture_header(path)
    try:
        values = read_label(path)
    except ImageError as error:
        facts = LabelFacts(path, header.fault or "picture-damaged", header.reason, header.mode, header.stored_hw)
        if header.fault is not None:
            return facts
        if header.mode in _COLOUR_MODES:
            return replace(facts, fault="label-colours", reason=_describe_colours(path, header.mode))
        if header.mode in ("F", "LA", "La", "PA"):
            return replace(facts, fault="label-mode", reason=f"colour mode {header.mode}; wanted one number per pixel")
        return replace(facts, reason=str(error).removeprefix(f"{Path(path)}: ").rstrip("."))
    return LabelFacts(path, None, "", header.mode, (values.shape[0], values.shape[1]), count_values(values))


def count_values(values: np.ndarray) -> dict[int, int]:
    """Value -> how many pixels of a label picture (H, W) have it."""
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        unique, counts = np.unique(values, return_counts=True)
        return dict(zip(unique.tolist(), counts.tolist(), strict=True))
    per_value = np.bincount(values.ravel())  # no sorting: many times faster
    return {int(value): int(per_value[value]) for value in np.flatnonzero(per_value)}


def whole_label_values(path: str) -> np.ndarray | None:
    """The values (H, W) int32 of a label picture that the loader refuses for its mode, where they are plain.

    That is grey saved as colours (R = G = B), grey with transparency, or whole numbers from 0 to 65535 saved as
    floating point; None for any other.
    """
    try:
        with opened(path) as image:
            if image.mode == "F":
                values = np.asarray(image)
                whole = np.isfinite(values).all() and (values == np.round(values)).all()
                return values.astype(np.int32) if whole and values.min() >= 0 and values.max() <= 65535 else None
            if image.mode in ("LA", "La", "PA"):
                return np.asarray(image)[..., 0].astype(np.int32)
            if image.mode not in ("RGB", "RGBA", "RGBX"):
                return None
            colours = np.asarray(image)[..., :3]
    except OPEN_ERRORS:
        return None
    return colours[..., 0].astype(np.int32) if (colours == colours[..., :1]).all() else None


def _read_pair(paths: tuple[str, str], decode: bool) -> tuple[PictureFacts, LabelFacts]:
    image_path, label_path = paths
    return (read_picture_facts if decode else read_picture_header)(image_path), read_label_facts(label_path)


def _matched_files(split: SemanticSplit, report: Report) -> dict[str, tuple[str, str]]:
    images = _files_by_stem(split, split.image_folder, IMAGE_SUFFIXES, report)
    labels = _files_by_stem(split, split.label_folder, _LABEL_SUFFIXES, report)
    lossy = {path.stem: path for path in files_ending_in(split.label_folder, _LOSSY_SUFFIXES)}
    for found, others, folder, what in (
        (images, labels, split.label_folder, "label picture"),
        (labels, images, split.image_folder, "image"),
    ):
        for stem in sorted(found.keys() - others.keys()):
            if found is images and stem in lossy:
                text = f"{lossy[stem].suffix} is no format for labels: it changes values. Use PNG"
                report.findings.append(
                    Finding("label-lossy", split.name, str(lossy[stem]), text, other=str(found[stem]))
                )
            else:
                near = _nearest(stem, others)
                example = "" if near is None else f"; there is for example {printable(others[near].name)}"
                text = f"there is no {what} named {shown(stem)} in {folder}{example}"
                report.findings.append(Finding("partner-missing", split.name, str(found[stem]), text))
    return {stem: (str(images[stem]), str(labels[stem])) for stem in sorted(images.keys() & labels.keys())}


def _nearest(stem: str, others: Collection[str]) -> str | None:
    """The name that begins like this one, as "a_mask" does like "a"; else any."""
    return next((name for name in others if name.startswith(stem) or stem.startswith(name)), next(iter(others), None))


def _files_by_stem(split: SemanticSplit, folder: Path, suffixes: tuple[str, ...], report: Report) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: wanted a folder of pictures; there is none.")
    files: dict[str, Path] = {}
    for path in files_ending_in(folder, suffixes):
        if path.stem in files:
            text = f"{files[path.stem].name} has the same name without ending"
            report.findings.append(Finding("name-repeated", split.name, str(path), text, other=str(files[path.stem])))
        else:
            files[path.stem] = path
    if not files and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir()):
        raise DataError(
            f"{folder}: wanted pictures ({', '.join(suffixes)}) directly in it, subfolders are not searched; "
            f"got: {describe_folder(folder)}."
        )
    return files


def _check_pair(
    split: SemanticSplit, picture: PictureFacts, label: LabelFacts, label_map: LabelMap | None, report: Report
) -> None:
    def add(kind: str, path: str, reason: str, other: str | None = None) -> None:
        report.findings.append(Finding(kind, split.name, path, reason, other=other))

    for kind, reason in picture_findings(picture, label.size_hw):
        if kind == "image-size-differs":
            assert picture.stored_hw is not None and label.size_hw is not None
            sizes = [f"{height} x {width}" for height, width in (label.size_hw, picture.stored_hw)]
            add("label-size", label.path, f"height x width {sizes[0]}, the image is {sizes[1]}", picture.path)
        else:
            add(kind, picture.path, reason)
    if label.fault is not None:
        add(label.fault, label.path, label.reason, picture.path)
        return
    if label_map is None:
        return
    unknown = unknown_values(label, label_map)
    if unknown:
        pixels = listed([f"{value} ({count} px)" for value, count in unknown.items()])
        low, high = min(label_map.raw_ids), max(label_map.raw_ids)
        add(
            "label-values",
            label.path,
            f"not among {len(label_map)} classes, values {low} to {high}: {pixels}",
            picture.path,
        )
    if not label.values.keys() & set(label_map.raw_ids):
        add("label-ignored", label.path, "no pixel has a class", picture.path)


def _statistics(split: SemanticSplit, label_map: LabelMap | None, report: Report) -> dict[str, Any]:
    values = Counter[int]()
    for _, label in split.pairs.values():
        values.update(label.values)
    total = sum(values.values())
    sizes = [label.size_hw for _, label in split.pairs.values() if label.size_hw is not None]
    modes = Counter(label.mode for _, label in split.pairs.values())
    statistics = {
        "images": len(split.pairs),
        "image_sides_px": size_range(np.array(sizes, np.int64).reshape(-1, 2)),
        "label_modes": dict(modes),
        "values": {str(value): values[value] for value in sorted(values)},
    }
    if label_map is None:
        return statistics
    per_class = {name: values[raw_id] for name, raw_id in zip(label_map.names, label_map.raw_ids, strict=True)}
    unused = [name for name, pixels in per_class.items() if not pixels]
    if unused:
        text = f"no pixel of: {listed(unused)}"
        report.findings.append(Finding("class-unused", split.name, str(split.label_folder), text, count=len(unused)))
    labelled = sum(per_class.values())
    return {**statistics, "classes": per_class, "unlabelled_share": 1 - labelled / total if total else 0.0}


def _check_repeated_pictures(splits: list[SemanticSplit], report: Report) -> None:
    places = [(number, picture) for number, split in enumerate(splits) for picture, _ in split.pairs.values()]
    facts = [picture for _, picture in places]
    for kind, number, other in repeated_pictures(facts, [number for number, _ in places]):
        split, other_split = splits[places[number][0]], splits[places[other][0]]
        text = f"shows the same as {shown(Path(facts[other].path).name)} of {other_split.name}"
        report.findings.append(Finding(kind, split.name, facts[number].path, text, other=facts[other].path))


def _describe_colours(path: str, mode: str) -> str:
    if whole_label_values(path) is not None:
        return f"colour mode {mode}, though red, green and blue are equal: grey saved as colours"
    try:
        with opened(path) as image:
            colours = image.convert("RGB").getcolors(maxcolors=256)
    except OPEN_ERRORS:
        colours = None
    if colours is None:
        return f"colour mode {mode} with over 256 colours; wanted one number per pixel, the class"
    examples = listed([str(colour) for _, colour in sorted(colours, reverse=True)], 3)
    return f"colour mode {mode} with {len(colours)} colours, such as {examples}; wanted one number per pixel"


def _fitting_map(values: Sequence[int]) -> str:
    used = [value for value in values if value != IGNORED_LABEL]
    if not values:
        return "no label picture could be read."
    if not used:
        return "no label picture has a value but 255, which is ignored."
    low, high = used[0], used[-1]
    ranges = listed([f"{first}" if first == last else f"{first} to {last}" for first, last in _runs(values)])
    if len(used) > IGNORED_LABEL or high > IGNORED_LABEL:
        return f"the label pictures hold {len(values)} values ({ranges}): numbers of objects rather than classes?"
    first_value = min(low, 1)
    fits = f"--classes {high - first_value + 1}" + (f" --first-value {first_value}" if first_value else "")
    if _ADE20K_VALUES // 2 < high <= _ADE20K_VALUES:
        fits += ", or --classes ade20k, where 0 is ignored"
    return f"the label pictures hold the values {ranges}; what fits, if they are classes: {fits}."


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][1] == value - 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return runs
