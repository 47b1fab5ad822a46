"""YOLO's text files into objects: a file for each image, a line for each object, coordinates as shares of the size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.convert_objects import ConvertedImage, ConvertedObject, object_from_polygons
from swin_dense.datasets.convert_pictures import pictures_by_stem
from swin_dense.datasets.images import image_size_hw
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import AnnotationError, DataError

# Rounded coordinates may stand so far outside 0 to 1, which YOLO's own reader allows too.
_TOLERANCE = 0.01


def read_data_yaml(path: Path) -> tuple[str, ...]:
    """Reads the class names of a data.yaml: its `names`, a list or a mapping from 0 on.

    Raises:
        DataError: it cannot be read, has no such names, or `nc` is another number.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not a YAML file that can be read ({error}).") from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise DataError(f"{path}: names must be numbered from 0 without gaps, got {list(names)}.")
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: wanted the key names with the class names, got {names!r}.")
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{path}: nc is {content['nc']!r}, but there are {len(names)} names. Correct one of the two.")
    return tuple(str(name) for name in names)


def yolo_classes(names: tuple[str, ...]) -> LabelMap:
    """Returns the classes; the COCO id of a class is its number in the text files plus 1."""
    return LabelMap(names, tuple(range(1, len(names) + 1)))


def read_yolo(
    image_folder: Path,
    label_folder: Path,
    num_classes: int,
    findings: Findings,
    *,
    boxes_as_masks: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Iterator[ConvertedImage]:
    """Reads images with text files of the same names; an image without one is background.

    Args:
        image_folder: folder of images.
        label_folder: folder of text files.
        num_classes: classes count from 0 to one less.
        findings: takes faults and notes.
        boxes_as_masks: take a box without a polygon for the mask of its object, instead of a fault.
        report: called as `report(done, in_all)`.

    Yields:
        The images in the order of their names.

    Raises:
        DataError: a folder is missing or empty.
    """
    images = pictures_by_stem(image_folder, "images", findings)
    labels = {path.stem: path for path in sorted(label_folder.glob("*.txt")) if path.stem != "classes"}
    if not labels:
        raise DataError(f"{label_folder}: wanted a folder of YOLO's text files, found none there.")
    for stem in sorted(set(labels) - set(images)):
        findings.faults.append(f"{labels[stem]}: there is no image {stem} in {image_folder}.")
    for done, (stem, image_path) in enumerate(images.items(), start=1):
        with findings.collected():
            size_hw = image_size_hw(image_path)
            objects: tuple[ConvertedObject, ...] = ()
            if stem in labels:
                objects = _read_file(labels[stem], size_hw, num_classes, findings, boxes_as_masks)
            else:
                findings.notes["images without a text file (background)"] += 1
            yield ConvertedImage(image_path, image_path.name, size_hw, objects)
        if report is not None:
            report(done, len(images))


def parse_yolo_line(line: str, num_classes: int) -> tuple[int, list[float], bool]:
    """Reads one line: "class x y width height", or "class x1 y1 x2 y2 x3 y3 …".

    Args:
        line: the text.
        num_classes: classes count from 0 to one less.

    Returns:
        (class index, polygon of x and y in turn as shares of width and height within 0 to 1, whether it was a box).

    Raises:
        AnnotationError: the line is wrong; the message has no file or line.
    """
    words = line.split()
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise AnnotationError(
            f"wanted a class with x, y, width, height, or with x and y of at least 3 points, got {len(words)} numbers"
        )
    if not words[0].isascii() or not words[0].isdigit():
        raise AnnotationError(f"the class must be a whole number, got {words[0]!r}")
    label = int(words[0])
    if label >= num_classes:
        raise AnnotationError(f"class {label} is beyond the {num_classes} names, which count from 0")
    try:
        numbers = [float(word) for word in words[1:]]
    except ValueError:
        raise AnnotationError(f"coordinates must be numbers, got {' '.join(words[1:])!r}") from None
    for number in numbers:
        # Written so that NaN fails too.
        if not -_TOLERANCE <= number <= 1 + _TOLERANCE:
            raise AnnotationError(f"coordinates are shares of width and height from 0 to 1, got {number:g}")
    is_box = len(numbers) == 4
    if is_box:
        x, y, width, height = numbers
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        numbers = [left, top, right, top, right, bottom, left, bottom]
    return label, [min(max(number, 0.0), 1.0) for number in numbers], is_box


def _read_file(
    path: Path, size_hw: tuple[int, int], num_classes: int, findings: Findings, boxes_as_masks: bool
) -> tuple[ConvertedObject, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: the file cannot be read as text ({error}).") from None
    height, width = size_hw
    objects: list[ConvertedObject] = []
    boxes: list[int] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if line.strip() in seen:
            findings.notes["repeated lines (left out)"] += 1
            continue
        seen.add(line.strip())
        try:
            label, shares, is_box = parse_yolo_line(line, num_classes)
        except AnnotationError as error:
            findings.faults.append(f"{path}: line {number}: {error}.")
            continue
        boxes += [number] if is_box else []
        polygon = [share * (height if position % 2 else width) for position, share in enumerate(shares)]
        found = object_from_polygons(label, [polygon], size_hw)
        if found is None:
            findings.notes["objects without a pixel (left out)"] += 1
        else:
            objects.append(found)
    if boxes and not boxes_as_masks:
        raise AnnotationError(
            f"{path}: {len(boxes)} boxes have no polygon, the first in line {boxes[0]}; a mask cannot be made up. "
            f"Take polygons, or pass --boxes-as-masks to take each box for the mask of its object."
        )
    return tuple(objects)
