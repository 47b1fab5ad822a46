"""LabelMe's JSON files into objects: one file for each image, shapes with a label, parts of one object by group_id."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from swin_dense.datasets.convert_findings import Findings, listed_values
from swin_dense.datasets.convert_objects import ConvertedImage, ConvertedObject, object_from_polygons
from swin_dense.datasets.convert_pictures import require_size
from swin_dense.datasets.images import image_size_hw
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import AnnotationError, DataError

# LabelMe's own words in its list of classes; neither is a class.
_NO_CLASSES = ("__ignore__", "_background_")
# A circle becomes a polygon that is nowhere further from it than this.
_CIRCLE_TOLERANCE_PX = 0.1


@dataclass(frozen=True)
class LabelMeShape:
    """One shape that has an area.

    Attributes:
        label: its class name.
        group_id: shapes of one number, not None, are parts of one object.
        polygon: x and y in turn of at least 3 points, in pixels.
    """

    label: str
    group_id: int | None
    polygon: list[float]


@dataclass(frozen=True)
class LabelMeFile:
    """What a JSON file says.

    Attributes:
        path: the JSON file.
        image_path: the picture.
        size_hw: (height, width) of the frame that the shapes are drawn in.
        shapes: in file order.
    """

    path: Path
    image_path: Path
    size_hw: tuple[int, int]
    shapes: tuple[LabelMeShape, ...]


def read_labelme_folder(
    folder: Path,
    image_folder: Path | None,
    findings: Findings,
    *,
    skip_unsupported: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> list[LabelMeFile]:
    """Reads all JSON files directly in a folder.

    Args:
        folder: of the JSON files.
        image_folder: where the pictures lie under the names that the files say; None finds them from the JSON file.
        findings: takes faults and notes.
        skip_unsupported: leave out shapes without an area (points, lines) and stored masks, instead of a fault.
        report: called as `report(done, in_all)`.

    Returns:
        The files that can be used, in the order of their names.

    Raises:
        DataError: there is no such folder, or no JSON file in it.
    """
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise DataError(f"{folder}: wanted a folder of LabelMe's JSON files, found none there.")
    files: list[LabelMeFile] = []
    owner: dict[Path, Path] = {}
    for done, path in enumerate(paths, start=1):
        with findings.collected():
            file = _read_file(path, image_folder, findings, skip_unsupported)
            other = owner.setdefault(file.image_path, path)
            if other != path:
                raise AnnotationError(f"{path}: imagePath {file.image_path.name!r} is that of {other.name} too.")
            files.append(file)
        if report is not None:
            report(done, len(paths))
    return files


def labelme_classes(files: list[LabelMeFile], names: tuple[str, ...] | None) -> LabelMap:
    """Returns the classes: those given, or all that occur, sorted; ids count from 1.

    Raises:
        DataError: there is none.
    """
    if names is None:
        names = tuple(sorted({shape.label for file in files for shape in file.shapes}))
    names = tuple(name for name in names if name not in _NO_CLASSES)
    if not names:
        raise DataError("no shape has a label, so there is no class.")
    return LabelMap(names, tuple(range(1, len(names) + 1)))


def labelme_images(files: list[LabelMeFile], label_map: LabelMap, findings: Findings) -> Iterator[ConvertedImage]:
    """Joins the shapes of each file into objects.

    Args:
        files: what `read_labelme_folder` returned.
        label_map: what `labelme_classes` returned.
        findings: takes faults and notes.

    Yields:
        The images in the order of the files.
    """
    for file in files:
        with findings.collected():
            objects = _objects(file, label_map, findings)
            yield ConvertedImage(file.image_path, file.image_path.name, file.size_hw, objects)


def _objects(file: LabelMeFile, label_map: LabelMap, findings: Findings) -> tuple[ConvertedObject, ...]:
    parts: dict[object, list[LabelMeShape]] = {}
    for number, shape in enumerate(file.shapes):
        # A shape without a group is one of its own.
        parts.setdefault(("alone", number) if shape.group_id is None else shape.group_id, []).append(shape)
    unknown = sorted({shape.label for shape in file.shapes} - set(label_map.names))
    if unknown:
        raise AnnotationError(
            f"{file.path}: label {listed_values([repr(name) for name in unknown])} is not among the classes "
            f"{listed_values(list(label_map.names), 20)}. Add it to --classes, or correct the label."
        )
    objects = []
    for group, shapes in parts.items():
        labels = sorted({shape.label for shape in shapes})
        if len(labels) > 1:
            raise AnnotationError(
                f"{file.path}: group_id {group} joins the labels {', '.join(map(repr, labels))}; one object has one."
            )
        index = label_map.names.index(labels[0])
        found = object_from_polygons(index, [shape.polygon for shape in shapes], file.size_hw)
        if found is None:
            findings.notes["objects without a pixel (left out)"] += 1
        else:
            objects.append(found)
    return tuple(objects)


def _read_file(path: Path, image_folder: Path | None, findings: Findings, skip_unsupported: bool) -> LabelMeFile:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"{path}: the file cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: not a JSON file: {error}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise AnnotationError(f"{path}: wanted a file of LabelMe, with imagePath and a list of shapes.")
    image_path = _image_path(path, content.get("imagePath"), image_folder)
    size_hw = _size_hw(path, content, image_path)
    shapes = []
    wrong: list[str] = []
    for position, shape in enumerate(content["shapes"]):
        if skip_unsupported and isinstance(shape, dict) and _kind(shape) in _UNSUPPORTED:
            findings.notes[f"shapes of type {_kind(shape)} (left out)"] += 1
            continue
        try:
            shapes.append(_read_shape(shape, size_hw))
        except AnnotationError as error:
            wrong.append(f"{path}: shapes[{position}]: {error}.")
    # All but the last are kept here and the last is raised, so that the file itself is left out.
    findings.faults += wrong[:-1]
    if wrong:
        raise AnnotationError(wrong[-1])
    return LabelMeFile(path, image_path, size_hw, tuple(shapes))


def _image_path(path: Path, name: object, image_folder: Path | None) -> Path:
    if not isinstance(name, str) or not name or "\0" in name:
        raise AnnotationError(f"{path}: imagePath must be the path of a picture, got {name!r}.")
    forms = (PurePosixPath(name), PureWindowsPath(name))
    if image_folder is not None:
        return image_folder / forms[1].name
    if any(form.is_absolute() or form.drive or ".." in form.parts for form in forms):
        raise AnnotationError(
            f"{path}: imagePath {name!r} leads out of the folder. Pass --images DIR, where the picture "
            f"{forms[1].name!r} lies."
        )
    return path.parent / PurePosixPath(name.replace("\\", "/"))


def _size_hw(path: Path, content: dict[str, Any], image_path: Path) -> tuple[int, int]:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if height is None or width is None:
        return image_size_hw(image_path)
    for field, value in (("imageHeight", height), ("imageWidth", width)):
        if type(value) is not int or value < 1:
            raise AnnotationError(f"{path}: {field} must be a whole number of pixels, at least 1, got {value!r}.")
    require_size(image_path, (height, width))
    return height, width


def _kind(shape: dict[str, Any]) -> object:
    return shape.get("shape_type") or "polygon"


def _read_shape(shape: object, size_hw: tuple[int, int]) -> LabelMeShape:
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
        got = shape.get("label") if isinstance(shape, dict) else shape
        raise AnnotationError(f"a shape needs a label that is not empty, got {got!r}")
    kind = _kind(shape)
    if kind in _UNSUPPORTED:
        raise AnnotationError(
            f"shape_type {kind!r} of label {shape['label']!r} {_UNSUPPORTED[str(kind)]}. Remove it, or pass "
            f"--skip-unsupported"
        )
    if kind not in _POLYGON_OF:
        raise AnnotationError(f"shape_type must be one of {', '.join(_POLYGON_OF)}, got {kind!r}")
    group_id = shape.get("group_id")
    if group_id is not None and type(group_id) is not int:
        raise AnnotationError(f"group_id must be a whole number or null, got {group_id!r}")
    polygon = _POLYGON_OF[str(kind)](_points(shape.get("points"), size_hw))
    return LabelMeShape(shape["label"].strip(), group_id, [number for point in polygon for number in point])


Points = list[tuple[float, float]]


def _points(value: object, size_hw: tuple[int, int]) -> Points:
    if not isinstance(value, list):
        raise AnnotationError(f"points must be a list of [x, y], got {value!r}")
    points = []
    for number, point in enumerate(value):
        if not isinstance(point, list) or len(point) != 2 or not all(type(each) in (int, float) for each in point):
            raise AnnotationError(f"points[{number}] must be [x, y] in pixels, got {point!r}")
        for name, coordinate, side in (("x", point[0], size_hw[1]), ("y", point[1], size_hw[0])):
            # Written so that NaN fails too.
            if not -side <= coordinate <= 2 * side:
                raise AnnotationError(
                    f"points[{number}]: {name} {coordinate!r} is not finite or far outside the image of height "
                    f"{size_hw[0]} and width {size_hw[1]}"
                )
        points.append((float(point[0]), float(point[1])))
    return points


def _polygon(points: Points) -> Points:
    if len(points) < 3:
        raise AnnotationError(f"a polygon needs at least 3 points, got {len(points)}")
    return points


def _rectangle(points: Points) -> Points:
    if len(points) == 4:
        return points
    if len(points) != 2:
        raise AnnotationError(f"a rectangle needs 2 opposite corners or all 4, got {len(points)} points")
    (x1, y1), (x2, y2) = points
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def _circle(points: Points) -> Points:
    if len(points) != 2:
        raise AnnotationError(f"a circle needs its centre and a point on it, got {len(points)} points")
    (x, y), edge = points
    radius = math.dist((x, y), edge)
    # A side of angle 2a stays within radius * (1 - cos a) of the circle.
    half_angle = math.acos(max(1 - _CIRCLE_TOLERANCE_PX / radius, 0.5)) if radius else math.pi / 3
    count = math.ceil(math.pi / half_angle)
    angles = [2 * math.pi * number / count for number in range(count)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


_POLYGON_OF: dict[str, Callable[[Points], Points]] = {"polygon": _polygon, "rectangle": _rectangle, "circle": _circle}
_UNSUPPORTED = {
    "point": "has no area",
    "points": "has no area",
    "line": "has no area",
    "linestrip": "has no area",
    "mask": "is a picture inside the JSON file, which is not read",
}
