"""Data for benchmarks: pictures with outlined objects, and an annotation file as large as COCO's, made in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NUM_COCO_IMAGES = 118_287
NUM_COCO_ANNOTATIONS = 860_001
"""Images and annotations of instances_train2017.json."""

# About one annotation in 86 there is a crowd, whose mask is given as run lengths.
_CROWD_EVERY = 86
_NUM_SHAPES = 2000
_NUM_CLASSES = 80
_SIZE_HW = (480, 640)
# The file has 448 MB; with this many corners on average, so has ours.
_CORNERS = (8, 44)


def write_scenes(
    folder: Path, num_images: int, objects_each: int, seed: int = 0, size_hw: tuple[int, int] = _SIZE_HW
) -> tuple[Path, Path]:
    """Write JPEG pictures with polygons, as a COCO data set.

    Args:
        folder: Where to; it is there already.
        num_images: How many pictures.
        objects_each: Objects in each of them.
        seed: Of the pictures and the outlines.
        size_hw: (height, width) of each picture.

    Returns:
        The annotation file and the folder of the images.
    """
    from PIL import Image

    generator = np.random.default_rng(seed)
    image_folder = folder / "images"
    image_folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, num_images + 1):
        images.append(_image_entry(number, size_hw))
        small = generator.integers(0, 256, (*(side // 8 for side in size_hw), 3), np.uint8)
        picture = Image.fromarray(small).resize(size_hw[::-1], Image.Resampling.BICUBIC)  # as smooth as a photograph
        picture.save(image_folder / images[-1]["file_name"], quality=95)
        for _ in range(objects_each):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1, **_polygon_entry(generator, size_hw)}
            )
    annotation_file = folder / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    annotation_file.write_text(json.dumps(content))
    return annotation_file, image_folder


def write_large_annotations(
    path: Path, num_images: int = NUM_COCO_IMAGES, num_annotations: int = NUM_COCO_ANNOTATIONS, seed: int = 0
) -> None:
    """Write an annotation file without its pictures, by default of the size of COCO's for training.

    The annotations share their outlines with each other, so that writing is a matter of copying text.

    Args:
        path: The file.
        num_images: How many pictures it names.
        num_annotations: How many annotations it has.
        seed: Of the outlines and of where they are.
    """
    generator = np.random.default_rng(seed)
    shapes = [json.dumps(_polygon_entry(generator))[1:] for _ in range(_NUM_SHAPES)]
    crowd = json.dumps(_crowd_entry())[1:]
    which = generator.integers(_NUM_SHAPES, size=num_annotations).tolist()
    image_ids = generator.integers(1, num_images + 1, num_annotations).tolist()
    classes = generator.integers(1, _NUM_CLASSES + 1, num_annotations).tolist()
    with path.open("w") as file:
        file.write('{"images": [' + ", ".join(json.dumps(_image_entry(n)) for n in range(1, num_images + 1)))
        file.write('], "annotations": [')
        for number, (shape, image_id, label) in enumerate(zip(which, image_ids, classes, strict=True), start=1):
            entry = shapes[shape] if number % _CROWD_EVERY else crowd
            comma = ", " if number > 1 else ""
            file.write(f'{comma}{{"id": {number}, "image_id": {image_id}, "category_id": {label}, {entry}')
        categories = [{"id": number, "name": f"class {number}"} for number in range(1, _NUM_CLASSES + 1)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def _image_entry(number: int, size_hw: tuple[int, int] = _SIZE_HW) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012}.jpg", "height": size_hw[0], "width": size_hw[1]}


def _polygon_entry(generator: np.random.Generator, size_hw: tuple[int, int] = _SIZE_HW) -> dict[str, Any]:
    """An outline around a centre: every ray meets it once, so that its area is that of its corners."""
    num_corners = int(generator.integers(*_CORNERS))
    half_wh = generator.uniform(12, 90, 2)
    centre = generator.uniform(half_wh, np.array(size_hw[::-1]) - half_wh)
    angles = np.linspace(0, 2 * np.pi, num_corners, endpoint=False)
    reach = generator.uniform(0.6, 1.0, num_corners)
    points = np.round(centre + np.stack([np.cos(angles), np.sin(angles)], 1) * reach[:, None] * half_wh, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return {
        "segmentation": [points.ravel().tolist()],
        "bbox": np.round([*low, *(high - low)], 2).tolist(),
        "area": round(float(area), 4),
        "iscrowd": 0,
    }


def _crowd_entry() -> dict[str, Any]:
    """A row of people, 40 pixels high and 200 wide."""
    height, width = _SIZE_HW
    column = [40, height - 40]
    counts = [100 * height + 200, *column * 199, 40, height * width - 299 * height - 240]
    segmentation = {"size": [height, width], "counts": counts}
    return {"segmentation": segmentation, "bbox": [100, 200, 200, 40], "area": 8000, "iscrowd": 1}
