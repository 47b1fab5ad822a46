"""COCO-format instance segmentation data: images, boxes, masks, crowd regions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from swin_dense.box_masks import BoxMasks
from swin_dense.datasets.coco_annotations import AnnotationReader, AnnotationTable
from swin_dense.datasets.coco_json import (
    CocoImages,
    collection_paused,
    find_coco_split,
    read_categories,
    read_coco_json,
    read_images,
)
from swin_dense.datasets.copy_paste import CopyPaste
from swin_dense.datasets.folders import describe_folder
from swin_dense.datasets.geometry import channels_first
from swin_dense.datasets.images import read_image
from swin_dense.datasets.instances import Instances
from swin_dense.datasets.labels import LabelMap, require_same_labels
from swin_dense.datasets.outlines import Frame
from swin_dense.datasets.shared_arrays import SharedArrays
from swin_dense.datasets.transforms import InstanceTransform, sample_seed
from swin_dense.errors import AnnotationError, DataError

__all__ = ["CocoDataset", "InstanceSample", "find_coco_split", "read_annotations"]


@dataclass
class InstanceSample:
    """One image with its objects, ready for a detector.

    Attributes:
        image: (3, H, W) uint8, RGB.
        target: "boxes" float32 (N, 4) xyxy in pixels of `image`; "labels" int64 (N,); "masks" N of them as `BoxMasks`;
            "iscrowd" bool (N,), True where a region takes no part, neither as an object nor as background.
        image_id: the id in the annotation file.
        index: number of the image in the data set.
        original_size_hw: (height, width) of the file's picture, to which results are scaled back.
    """

    image: torch.Tensor
    target: dict[str, torch.Tensor | BoxMasks]
    image_id: int
    index: int
    original_size_hw: tuple[int, int]


@dataclass(frozen=True)
class CocoContent:
    """What an annotation file holds.

    Attributes:
        label_map: the categories in the order of their ids.
        images: the images in file order.
        table: the annotations that can be used.
        faults: messages, at most 100, of annotations that cannot.
        findings: counts of what is unusual but usable.
    """

    label_map: LabelMap
    images: CocoImages
    table: AnnotationTable
    faults: list[str]
    findings: dict[str, int]


def read_annotations(annotation_file: str | Path, image_folder: str | Path) -> CocoContent:
    """Reads and checks an annotation file; faults of single annotations are collected, not raised.

    Raises:
        AnnotationError: the file as a whole, a category or an image entry cannot be used.
    """
    with collection_paused():
        content = read_coco_json(annotation_file)
        label_map = read_categories(annotation_file, content["categories"])
        images = read_images(annotation_file, content["images"], Path(image_folder))
        reader = AnnotationReader(annotation_file, images, label_map)
        table = reader.read(content["annotations"])
        del content  # before the collector would walk all of it
    return CocoContent(label_map, images, table, reader.faults, reader.findings)


class ImageIds(SharedArrays, Sequence[int]):
    """Ids in one flat array, seen as a read-only list of int: a list would be copied into every loader process.

    Args:
        values: (N,) int64.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._values[index].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self._values.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(self._values.tolist())


class CocoDataset(SharedArrays, Dataset[InstanceSample]):
    """A COCO-format data set, all of whose annotations are checked before the first sample.

    Polygons, run lengths as numbers or text, and crowd regions are read; `iscrowd`, `area`, `bbox`, `width` and
    `height` may be missing. An annotation with `"ignore": 1` is a region like a crowd, and needs no segmentation beside
    its box. Boxes are clipped to the image; boxes under one pixel, and objects without a mask pixel, are left out.

    Args:
        annotation_file: COCO JSON.
        image_folder: folder that the file names start from.
        transform: augmentation or test-time resize; None gives the images as they are.
        copy_paste: pastes objects of other images into each, after `transform`; None pastes nothing.
        skip_empty: leave out images without an object other than a crowd region, as training does.
        label_map: the classes that the file must have, in this order; None takes the file's.
        seed: the run's seed, for the augmentation.

    Attributes:
        label_map: the classes.
        image_ids: ids of the images in order.
        sizes_hw: (N, 2) int64, (height, width) of each image.
        findings: counts of what is unusual but usable, for a one-line notice.

    Raises:
        AnnotationError: the file or one of its entries is wrong; names file, id, field and what was got.
        DataError: `label_map` differs from the file's, images are missing, or no image is left.

    Example:
        >>> dataset = CocoDataset("instances_val2017.json", "val2017")          # doctest: +SKIP
        >>> dataset[0].target["boxes"].shape                                    # doctest: +SKIP
        torch.Size([14, 4])
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_folder: str | Path,
        transform: InstanceTransform | None = None,
        *,
        copy_paste: CopyPaste | None = None,
        skip_empty: bool = False,
        label_map: LabelMap | None = None,
        seed: int = 0,
    ) -> None:
        self._image_folder = Path(image_folder)
        if not self._image_folder.is_dir():
            raise DataError(f"{image_folder}: wanted the folder of the images of {annotation_file}; there is none.")
        content = read_annotations(annotation_file, image_folder)
        if content.faults:
            more = f" (First of {len(content.faults)} faults.)" if len(content.faults) > 1 else ""
            raise AnnotationError(content.faults[0] + more)
        if label_map is not None:
            require_same_labels(label_map, content.label_map, str(annotation_file))
        self._annotation_file = Path(annotation_file)
        self._transform = transform
        self._copy_paste = copy_paste
        self._seed = seed
        self._table = content.table
        self._images = content.images
        self.label_map = content.label_map
        self.findings = content.findings
        self._boxes_xyxy = _clipped_boxes(self._table, self._images)
        self._rows, self._row_starts = self._trainable_rows()
        self._image_rows = self._chosen_images(skip_empty)
        self.image_ids = ImageIds(self._images.ids[self._image_rows])
        self.sizes_hw = self._images.sizes_hw[self._image_rows]
        self._check_files()

    def __len__(self) -> int:
        return len(self._image_rows)

    def __getitem__(self, key: int | tuple[int, int]) -> InstanceSample:
        """Returns a sample.

        Args:
            key: index, or (epoch, index): the augmentation differs from epoch to epoch.

        Raises:
            ImageError: the picture cannot be read or has another size than the annotations say.
            ConfigError: objects are to be pasted, and the transform gives images of unequal sizes.
            IndexError: there is no such index.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        seed = sample_seed(self._seed, epoch, index)
        image, instances = self._transformed(index, seed)
        paste = None if self._copy_paste is None else self._copy_paste.draw(seed, len(self))
        if paste is not None:
            image, instances = paste(image, instances, *self._transformed(paste.index, paste.transform_seed))
        pixels = torch.from_numpy(channels_first(image))
        height, width = self.sizes_hw[index].tolist()
        return InstanceSample(pixels, detector_target(instances), self.image_ids[index], int(index), (height, width))

    def raw(self, index: int) -> tuple[np.ndarray, Instances]:
        """Returns image and objects without transform.

        Returns:
            (H, W, 3) uint8 RGB, and its objects, crowd regions and those without a mask pixel among them.

        Raises:
            ImageError: the picture cannot be read or has another size than the annotations say.
            IndexError: there is no such index.
        """
        instances = self.instances(index)
        return read_image(self.image_path(index), instances.size_hw), instances

    def instances(self, index: int) -> Instances:
        """Returns the objects alone, as `raw` does.

        Raises:
            IndexError: there is no such index.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        height, width = self.sizes_hw[index].tolist()
        return self._instances(int(self._image_rows[index]), (height, width))

    def _transformed(self, index: int, seed: int) -> tuple[np.ndarray, Instances]:
        image, instances = self.raw(index)
        return (image, instances) if self._transform is None else self._transform(image, instances, seed)

    def image_path(self, index: int) -> Path:
        """Returns the path of an image file."""
        return self._image_folder / self._images.file_names[self._image_rows[index]]

    @property
    def aspect_ratios(self) -> np.ndarray:
        """(N,) float64, width / height of each image."""
        return self.sizes_hw[:, 1] / self.sizes_hw[:, 0]

    @property
    def objects_per_image(self) -> np.ndarray:
        """(N,) int64, how many objects and crowd regions each image has; those without a mask pixel count too."""
        return np.diff(self._row_starts)[self._image_rows]

    @property
    def ground_truth(self) -> dict[str, Any]:
        """A new COCO dictionary of the images of this data set, for the evaluator.

        Every annotation is in it, those that are too small to train on too, with the numbers of the file, so that
        scores are those of the reference tool. Ids are renumbered from 1 (0 would count as "no match"), and missing
        areas are filled in with the mask's. A region with `"ignore": 1` is a crowd in it, as pycocotools forgives
        detections in crowds but overwrites that field.
        """
        rows = np.flatnonzero(np.isin(self._table.image_rows, self._image_rows))
        images = [
            {
                "id": int(self._images.ids[row]),
                "file_name": self._images.file_names[row],
                "height": int(self._images.sizes_hw[row, 0]),
                "width": int(self._images.sizes_hw[row, 1]),
            }
            for row in self._image_rows
        ]
        categories = [
            {"id": raw_id, "name": name}
            for raw_id, name in zip(self.label_map.raw_ids, self.label_map.names, strict=True)
        ]
        annotations = [self._ground_truth_entry(int(row), number) for number, row in enumerate(rows, start=1)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _ground_truth_entry(self, row: int, number: int) -> dict[str, Any]:
        table = self._table
        image_row = table.image_rows[row]
        height, width = self._images.sizes_hw[image_row].tolist()
        segmentation: list[list[float]] | dict[str, Any] = [polygon.tolist() for polygon in table.polygons(row)]
        if not segmentation:
            segmentation = {"size": [height, width], "counts": table.run_lengths(row, (height, width)).tolist()}
        area = table.areas[row]
        if np.isnan(area):
            area = table.run_lengths(row, (height, width))[1::2].sum()
        return {
            "id": number,
            "image_id": int(self._images.ids[image_row]),
            "category_id": self.label_map.raw_ids[table.labels[row]],
            "bbox": table.boxes_xywh[row].tolist(),
            "area": float(area),
            "iscrowd": int(table.is_crowd[row]),
            "segmentation": segmentation,
        }

    def _trainable_rows(self) -> tuple[np.ndarray, np.ndarray]:
        boxes = self._boxes_xyxy
        rows = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1))
        rows = rows[np.argsort(self._table.image_rows[rows], kind="stable")]
        starts = np.searchsorted(self._table.image_rows[rows], np.arange(len(self._images.ids) + 1))
        return rows, starts

    def _chosen_images(self, skip_empty: bool) -> np.ndarray:
        chosen = np.arange(len(self._images.ids))
        if skip_empty:
            objects = self._rows[~self._table.is_crowd[self._rows]]
            chosen = np.unique(self._table.image_rows[objects])
        if not len(chosen):
            raise DataError(f"{self._annotation_file}: no image has an object to train on; got crowd regions only.")
        return chosen

    def _instances(self, image_row: int, size_hw: tuple[int, int]) -> Instances:
        rows = self._rows[self._row_starts[image_row] : self._row_starts[image_row + 1]]
        return Instances(
            self._boxes_xyxy[rows].astype(np.float32),
            self._table.labels[rows],
            [self._table.outline(row) for row in rows.tolist()],
            self._table.is_crowd[rows],
            self._table.ids[rows],
            Frame.of_file(size_hw),
        )

    def _check_files(self) -> None:
        missing = [row for row in self._image_rows if not (self._image_folder / self._images.file_names[row]).is_file()]
        if missing:
            raise DataError(
                f"{self._annotation_file}: {len(missing)} of {len(self)} images are not in {self._image_folder}, the "
                f"first is {self._images.file_names[missing[0]]!r}. Got there: {describe_folder(self._image_folder)}. "
                f"Pass the folder that the file names start from."
            )


def detector_target(instances: Instances) -> dict[str, torch.Tensor | BoxMasks]:
    """Returns what a detector is trained on, see `InstanceSample.target`: the objects that have a mask pixel."""
    instances, masks = instances.with_masks()
    return {
        "boxes": torch.from_numpy(instances.boxes_xyxy),
        "labels": torch.from_numpy(instances.labels),
        "masks": masks,
        "iscrowd": torch.from_numpy(instances.is_crowd),
    }


def _clipped_boxes(table: AnnotationTable, images: CocoImages) -> np.ndarray:
    low = table.boxes_xywh[:, :2]
    boxes = np.concatenate([low, low + table.boxes_xywh[:, 2:]], axis=1)
    sizes_wh = images.sizes_hw[table.image_rows][:, ::-1]
    return np.clip(boxes, 0, np.concatenate([sizes_wh, sizes_wh], axis=1))
