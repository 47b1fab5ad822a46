"""Writing a converted data set in the folders that the loaders look in; all of it appears, or nothing.

```
OUT/images/{train,val}/…    OUT/annotations/instances_{train,val}.json                 objects, for CocoDataset
OUT/images/{train,val}/…    OUT/annotations/{train,val}/*.png    OUT/classes.txt       classes, for SemanticDataset
OUT/convert.json            what is there and where it came from
```
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.class_names import read_class_names
from swin_dense.datasets.convert_labels import ConvertedLabel
from swin_dense.datasets.convert_objects import ConvertedImage, coco_content
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import ConfigError, DataError

RECORD = "convert.json"
CLASS_FILE = "classes.txt"
_IGNORED = "(ignored)"


@dataclass(frozen=True)
class Splits:
    """Which split an image belongs to.

    Attributes:
        name: "train" or "val".
        held_out: share of "val", taken from the images by a hash of their names, so that an image keeps its split when
            others are added, and has the same one in every conversion; 0 puts all into `name`.

    Raises:
        ConfigError: the share is not from 0 to below 1, or the images would be held out from val.
    """

    name: Literal["train", "val"] = "train"
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"--held-out must be a share from 0 to below 1, got {self.held_out:g}.")
        if self.held_out and self.name != "train":
            raise ConfigError("--held-out makes both splits; leave out --split.")

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that are written."""
        return ("train", "val") if self.held_out else (self.name,)

    def of(self, file_name: str) -> str:
        """Returns the split of an image."""
        draw = int.from_bytes(hashlib.sha256(file_name.encode()).digest()[:8], "big") / 2**64
        return "val" if draw < self.held_out else self.name


@dataclass
class SplitCounts:
    """What was written of one split.

    Attributes:
        images: how many.
        empty_images: how many without an object, or without a pixel that is not ignored.
        classes: class name -> objects or pixels.
    """

    images: int = 0
    empty_images: int = 0
    classes: Counter[str] = field(default_factory=Counter)


@contextmanager
def new_output(root: Path, splits: Splits, to: str) -> Iterator[Path]:
    """A folder to write into, whose content moves to `root` when the block ends without an error.

    Args:
        root: a folder that is missing, empty, or holds the other split, converted before to the same format.
        splits: what will be written.
        to: the format, for the record.

    Yields:
        A folder inside `root`.

    Raises:
        DataError: `root` holds something else. Nothing in it is ever replaced.
    """
    _require_room(root, splits, to)
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".convert-", dir=root))
    try:
        yield staging
        _move_into(staging, root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(root.iterdir()):
            root.rmdir()


def read_record(root: Path) -> dict[str, Any] | None:
    """Returns what convert.json says, None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = root / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"to": record["to"], "classes": record["classes"], "splits": record["splits"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Choose another folder.") from None


def write_coco(
    staging: Path,
    root: Path,
    images: Iterable[ConvertedImage],
    label_map: LabelMap,
    splits: Splits,
    *,
    copy_images: bool = False,
) -> dict[str, SplitCounts]:
    """Writes annotation files and images.

    Args:
        staging: what `new_output` gave.
        root: where it will move to.
        images: with their objects.
        label_map: the categories.
        splits: which image goes where.
        copy_images: copy the pictures; otherwise they are relative links to the source.

    Returns:
        What was written, by split.
    """
    chosen: dict[str, list[ConvertedImage]] = {name: [] for name in splits.names}
    for image in images:
        split = splits.of(image.file_name)
        chosen[split].append(image)
        _place_image(image.path, Path("images") / split / image.file_name, staging, root, copy_images)
    counts = {}
    for split, members in chosen.items():
        counts[split] = SplitCounts(len(members), sum(not image.objects for image in members))
        counts[split].classes.update({name: 0 for name in label_map.names})
        counts[split].classes.update(label_map.names[each.label] for image in members for each in image.objects)
        path = staging / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco_content(members, label_map)), encoding="utf-8")
    return counts


def write_labels(
    staging: Path,
    root: Path,
    labels: Iterable[ConvertedLabel],
    label_map: LabelMap,
    splits: Splits,
    *,
    copy_images: bool = False,
) -> dict[str, SplitCounts]:
    """Writes label pictures, images and class names; arguments and result as for `write_coco`, counted in pixels.

    Raises:
        DataError: a class name cannot stand in a line of a text file.
    """
    counts = {name: SplitCounts() for name in splits.names}
    for split in counts:
        counts[split].classes.update({name: 0 for name in label_map.names})
        (staging / "annotations" / split).mkdir(parents=True, exist_ok=True)
    name_of = dict(zip(label_map.raw_ids, label_map.names, strict=True))
    for label in labels:
        split = splits.of(label.file_name)
        _place_image(label.path, Path("images") / split / label.file_name, staging, root, copy_images)
        path = (staging / "annotations" / split / label.file_name).with_suffix(".png")
        Image.fromarray(label.values).save(path)
        pixels = np.bincount(label.values.ravel(), minlength=IGNORED_LABEL + 1)
        counts[split].images += 1
        counts[split].empty_images += int(pixels[IGNORED_LABEL] == label.values.size)
        counts[split].classes.update({name: int(pixels[value]) for value, name in name_of.items()})
        counts[split].classes[_IGNORED] += int(pixels[IGNORED_LABEL])
    _write_class_names(staging / CLASS_FILE, label_map.names)
    return counts


def require_content(counts: dict[str, SplitCounts], what: str) -> None:
    """Checks that every split got images, and something to learn in them.

    Raises:
        DataError: one did not.
    """
    for split, count in counts.items():
        if not count.images:
            raise DataError(f"no image is in split {split!r}. Choose another --held-out, or add images.")
        if count.empty_images == count.images:
            raise DataError(
                f"none of the {count.images} images of split {split!r} has {what}. Look at the values of the source, "
                f"and at the options that say what they mean."
            )


def write_record(
    staging: Path, root: Path, source: str, to: str, classes: Sequence[str], counts: dict[str, SplitCounts]
) -> None:
    """Writes convert.json of this and, where there was one, the earlier conversion.

    Raises:
        DataError: the earlier one has other classes.
    """
    earlier = read_record(root) or {"splits": {}, "classes": list(classes)}
    if earlier["classes"] != list(classes):
        raise DataError(
            f"{root}: the split that is there has the classes {earlier['classes']}, this one {list(classes)}. Give "
            f"both the same with --classes, or choose another folder."
        )
    written = {name: {"from": source, "images": count.images} for name, count in counts.items()}
    record = {"to": to, "classes": list(classes), "splits": {**earlier["splits"], **written}}
    (staging / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _require_room(root: Path, splits: Splits, to: str) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise DataError(f"{root}: wanted a new folder, got a file. Choose another one.")
    if not any(root.iterdir()):
        return
    record = read_record(root)
    advice = "Choose a new folder, or delete this one first."
    if record is None:
        raise DataError(f"{root}: the folder is not empty, and nothing in it is replaced. {advice}")
    if record["to"] != to:
        raise DataError(f"{root}: the folder holds a conversion to {record['to']}, wanted {to}. {advice}")
    there = [name for name in splits.names if name in record["splits"]]
    if there:
        raise DataError(f"{root}: the split {there[0]!r} is there already, and nothing is replaced. {advice}")


def _place_image(source: Path, place: Path, staging: Path, root: Path, copy_images: bool) -> None:
    target = staging / place
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.exists():
        raise DataError(f"{source}: a second picture of the name {place.name!r}. Rename one of the two.")
    if copy_images:
        shutil.copyfile(source, target)
        return
    # From where the link will lie at the end; both resolved, because a link's ".." are those of the real folders.
    link = os.path.relpath(source.resolve(), (root / place).parent.resolve())
    try:
        target.symlink_to(link)
    except OSError as error:
        raise DataError(f"{target}: no link can be made there ({error.strerror}). Pass --copy-images.") from None


def _write_class_names(path: Path, names: tuple[str, ...]) -> None:
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    if read_class_names(path) != names:
        raise DataError(f"the class names {list(names)} cannot stand one in each line of {path.name}. Rename classes.")


def _move_into(source: Path, target: Path) -> None:
    """Moves the content of a folder into another one; folders that are in both are joined."""
    # The record last: where it stands, everything is there.
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == RECORD, entry.name)):
        place = target / entry.name
        if entry.is_dir() and not entry.is_symlink() and place.is_dir():
            _move_into(entry, place)
        else:
            os.replace(entry, place)
