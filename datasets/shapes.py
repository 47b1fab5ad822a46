"""Drawn shapes on textured ground: a small data set made on the spot, in the COCO and the ADE20K layout at once.

It stands in for real data in the demo, the tests and first experiments, and needs no download. Every picture follows
from the seed, the split and its number alone, so a larger set begins with the pictures of a smaller one.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.shape_scenes import (
    BACKGROUND_NAMES,
    MIN_IMAGE_SIDE,
    SHAPE_NAMES,
    Mask,
    SceneObject,
    draw_scene,
)
from swin_dense.errors import ConfigError, DataError

CATEGORY_IDS = (1, 3, 7, 12, 20, 90)
"""COCO category ids of SHAPE_NAMES: with gaps, as in COCO itself."""
SHAPES_LABELS = LabelMap(names=BACKGROUND_NAMES + SHAPE_NAMES, raw_ids=tuple(range(1, 11)), ignored_values=(0,))
"""What the values of the label pictures mean: 1 to 10 are classes, 0 is not labelled."""


@dataclass(frozen=True)
class SplitPaths:
    """Where one split lies: images, label pictures with the same stems, and the COCO annotation file."""

    image_folder: Path
    label_folder: Path
    annotation_file: Path


@dataclass(frozen=True)
class ShapesPaths:
    """Where the data set lies; `class_file` names the classes of the label pictures, one a line, value 1 first."""

    root: Path
    class_file: Path
    training: SplitPaths
    validation: SplitPaths


def write_shapes(
    root: str | os.PathLike[str],
    *,
    num_training: int = 400,
    num_validation: int = 60,
    image_side_range: tuple[int, int] = (96, 160),
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> ShapesPaths:
    """Writes the data set into `root`, and returns where its parts lie.

    ```
    root/images/{training,validation}/*.jpg              root/annotations/{training,validation}/*.png
    root/annotations/instances_{training,validation}.json      root/classes.txt      root/shapes.json
    ```
    A folder that holds the same set already is left as it is; one that was left half written is completed.

    Args:
        root: A folder that is missing, empty, or was written by this function with the same settings.
        num_training: Pictures in the training split.
        num_validation: Pictures in the validation split.
        image_side_range: Least and greatest height and width in pixels, both included; each is drawn on its own.
        seed: Another seed gives other pictures.
        report: Called as `report(pictures_done, pictures_in_all)` after each picture.

    Raises:
        ConfigError: A number is out of range.
        DataError: `root` holds something else.
    """
    _check_settings(num_training, num_validation, image_side_range, seed)
    settings = {
        "num_training": num_training,
        "num_validation": num_validation,
        "image_side_range": list(image_side_range),
        "seed": seed,
    }
    paths = shapes_paths(root)
    if _already_written(paths.root, settings):
        return paths
    # The record says "incomplete" until the end, so a run that was killed can be told from a whole one.
    _write_record(paths.root, settings, complete=False)
    paths.class_file.write_text("".join(f"{name}\n" for name in SHAPES_LABELS.names), encoding="utf-8")
    total = num_training + num_validation
    for split, split_paths, count, done in (
        (0, paths.training, num_training, 0),
        (1, paths.validation, num_validation, num_training),
    ):
        _write_split(split_paths, split, count, done, total, image_side_range, seed, report)
    _write_record(paths.root, settings, complete=True)
    return paths


def shapes_paths(root: str | os.PathLike[str]) -> ShapesPaths:
    """Where the parts of the data set lie under `root`; nothing is read or written."""
    folder = Path(root)
    training, validation = (
        SplitPaths(
            folder / "images" / split,
            folder / "annotations" / split,
            folder / "annotations" / f"instances_{split}.json",
        )
        for split in ("training", "validation")
    )
    return ShapesPaths(folder, folder / "classes.txt", training, validation)


def _check_settings(num_training: int, num_validation: int, image_side_range: tuple[int, int], seed: int) -> None:
    for name, value in (("num_training", num_training), ("num_validation", num_validation)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}.")
    low, high = image_side_range
    if not MIN_IMAGE_SIDE <= low <= high:
        raise ConfigError(
            f"image_side_range must be (least, greatest) in pixels with {MIN_IMAGE_SIDE} <= least <= greatest, "
            f"got {image_side_range}."
        )


def _already_written(root: Path, settings: dict[str, Any]) -> bool:
    record_file = root / "shapes.json"
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; the shapes need a folder. Choose another one.")
    if not record_file.exists():
        if root.exists() and any(root.iterdir()):
            raise DataError(f"{root} is not empty and holds no shapes. Choose a new or empty folder.")
        return False
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        written, complete = record["settings"], record["complete"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record_file} cannot be read ({error}). Delete {root}, or choose another folder.") from error
    if written != settings:
        raise DataError(
            f"{root} holds shapes written with {written}, wanted {settings}. Delete it, or choose another folder."
        )
    return bool(complete)


def _write_record(root: Path, settings: dict[str, Any], complete: bool) -> None:
    root.mkdir(parents=True, exist_ok=True)
    partial = root / "shapes.json.partial"
    partial.write_text(json.dumps({"settings": settings, "complete": complete}, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, root / "shapes.json")


def _write_split(
    paths: SplitPaths,
    split: int,
    count: int,
    done: int,
    total: int,
    image_side_range: tuple[int, int],
    seed: int,
    report: Callable[[int, int], None] | None,
) -> None:
    paths.image_folder.mkdir(parents=True, exist_ok=True)
    paths.label_folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        random = np.random.default_rng([seed, split, index])
        height, width = (int(side) for side in random.integers(*image_side_range, size=2, endpoint=True))
        scene = draw_scene(random, (height, width))
        image_id = 100_000 * split + index + 1
        stem = f"shapes_{image_id:06d}"
        # No colour subsampling: it would smear small objects.
        Image.fromarray(scene.image).save(paths.image_folder / f"{stem}.jpg", quality=95, subsampling=0)
        Image.fromarray(scene.label).save(paths.label_folder / f"{stem}.png")
        images.append({"id": image_id, "file_name": f"{stem}.jpg", "width": width, "height": height})
        for scene_object in scene.objects:
            annotations.append(_annotation(scene_object, len(annotations) + 1, image_id))
        if report is not None:
            report(done + index + 1, total)
    categories = [
        {"id": raw_id, "name": name, "supercategory": "shape"}
        for raw_id, name in zip(CATEGORY_IDS, SHAPE_NAMES, strict=True)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    paths.annotation_file.write_text(json.dumps(content), encoding="utf-8")


def _annotation(scene_object: SceneObject, annotation_id: int, image_id: int) -> dict[str, Any]:
    """One COCO annotation: a polygon where one says it, an RLE for holes and several parts, plain counts for crowds."""
    mask = scene_object.mask
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    bottom, right = int(rows[-1]) + 1, int(columns[-1]) + 1
    segmentation: Any
    if scene_object.is_crowd:
        segmentation = {"size": list(mask.shape), "counts": _run_lengths(mask)}
    else:
        segmentation = _polygon(mask[top:bottom, left:right], top, left) or _compressed_rle(mask)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": CATEGORY_IDS[scene_object.shape],
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask.sum()),
        "iscrowd": int(scene_object.is_crowd),
        "segmentation": segmentation,
    }


def _polygon(crop: Mask, top: int, left: int) -> list[list[float]] | None:
    """The outline of `crop` as a COCO polygon, or None where it has holes or several parts."""
    import cv2

    # cv2 walks through pixel centres, half a pixel inside the outline; on an enlarged mask that hardly counts.
    enlarge = 4
    fine = np.kron(crop, np.ones((enlarge, enlarge), dtype=np.uint8)).astype(np.uint8)
    contours, _ = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if len(contours) != 1:
        return None
    points = cv2.approxPolyDP(contours[0], 0.4 * enlarge, True).reshape(-1, 2)
    if len(points) < 3:
        return None
    corners = (points + 0.5) / enlarge + (left, top)
    return [[float(value) for value in corners.round(2).reshape(-1)]]


def _compressed_rle(mask: Mask) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def _run_lengths(mask: Mask) -> list[int]:
    """Lengths of the runs of 0 and 1 down the columns, the first one of 0."""
    flat = mask.reshape(-1, order="F")
    borders = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]))
    lengths = [int(length) for length in np.diff(borders)]
    return [0, *lengths] if flat[0] else lengths
