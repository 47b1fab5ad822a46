"""A cleaned copy of checked images with label pictures, which `find_semantic_split` finds.

images/<split>/ and annotations/<split>/ have one link for each file; changed label pictures are new PNG files.
classes.txt has the names, where the classes are known.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.check_copy import (
    UNUSABLE_PICTURES,
    Change,
    first_of,
    place_file,
    require_new_folder,
    write_changes,
)
from swin_dense.datasets.check_semantic import (
    LabelFacts,
    SemanticCheck,
    SemanticSplit,
    count_values,
    unknown_values,
    whole_label_values,
)
from swin_dense.datasets.images import read_label
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

_UNUSABLE_PAIRS = {*UNUSABLE_PICTURES, "label-size"}


def fix_semantic(check: SemanticCheck, out: str | Path, *, copy_pictures: bool = False) -> list[Change]:
    """Writes a cleaned copy of images with label pictures.

    Args:
        check: The checked data.
        out: A new or empty folder.
        copy_pictures: Copies instead of links.

    Raises:
        ConfigError: `out` is not empty, or lies in the input.
        DataError: Nothing usable is left of a split.
    """
    out = Path(out)
    require_new_folder(out, [folder for split in check.splits for folder in (split.image_folder, split.label_folder)])
    changes = [
        Change(finding.kind, finding.file, "left out")
        for finding in check.report.findings
        if finding.kind in ("partner-missing", "name-repeated", "label-lossy")
    ]
    kinds: dict[str, set[str]] = {}
    for finding in check.report.findings:
        kinds.setdefault(finding.file, set()).add(finding.kind)
    for split in check.splits:
        subfolder = "" if split.name == "all" else split.name
        changes += _copy_pairs(split, kinds, check.label_map, out, subfolder, copy_pictures)
    if check.label_map is not None:
        (out / "classes.txt").write_text("".join(f"{name}\n" for name in check.label_map.names), encoding="utf-8")
    return write_changes(out, changes)


def _copy_pairs(
    split: SemanticSplit,
    kinds: dict[str, set[str]],
    label_map: LabelMap | None,
    out: Path,
    subfolder: str,
    copy_pictures: bool,
) -> list[Change]:
    changes = []
    folders = [out / kind / subfolder for kind in ("images", "annotations")]
    for folder in folders:
        folder.mkdir(parents=True)
    num_pairs = 0
    for stem, (picture, label) in split.pairs.items():
        found = kinds.get(picture.path, set()) | kinds.get(label.path, set())
        unusable = first_of(found, _UNUSABLE_PAIRS)
        values, kind, done = _clean_label(label, label_map)
        if unusable is not None or (kind and values is None):
            changes.append(Change(unusable or kind, label.path, "pair removed"))
            continue
        num_pairs += 1
        place_file(Path(picture.path), folders[0] / Path(picture.path).name, copy_pictures)
        if values is None:
            place_file(Path(label.path), folders[1] / Path(label.path).name, copy_pictures)
        else:
            dtype = np.uint8 if values.max(initial=0) <= 255 else np.uint16
            Image.fromarray(values.astype(dtype)).save(folders[1] / f"{stem}.png")
            changes.append(Change(kind, label.path, done))
    if not num_pairs:
        raise DataError(f"{split.image_folder}: nothing usable is left of it, so there is no cleaned copy.")
    return changes


def _clean_label(label: LabelFacts, label_map: LabelMap | None) -> tuple[np.ndarray | None, str, str]:
    """(new values or None, kind of the finding or "", what was done); values None with a kind: unusable."""
    values, kind, done = None, label.fault or "", []
    if kind:
        values = whole_label_values(label.path) if kind in ("label-colours", "label-mode") else None
        if values is None:
            return None, kind, ""
        label = LabelFacts(label.path, values=count_values(values))
        done.append("saved as one number per pixel")
    unknown = {} if label_map is None else unknown_values(label, label_map)
    if unknown:
        assert label_map is not None
        kind = kind or "label-values"
        ignored = [IGNORED_LABEL, *label_map.ignored_values]
        free = [value for value in ignored if value not in label_map.raw_ids]
        if not free:
            return None, kind, ""
        values = read_label(label.path) if values is None else values
        values = np.where(np.isin(values, list(unknown)), free[0], values)
        done.append(f"{sum(unknown.values())} pixels of the values {', '.join(map(str, list(unknown)[:10]))} ignored")
    return values, kind, "; ".join(done)
