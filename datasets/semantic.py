"""Semantic segmentation data: any folder of images with a folder of label pictures of the same names."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from swin_dense.datasets.folders import describe_folder, files_ending_in
from swin_dense.datasets.geometry import channels_first
from swin_dense.datasets.images import IMAGE_SUFFIXES, read_image, read_label
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_transforms import SemanticTransform
from swin_dense.datasets.shared_arrays import FileNames, SharedArrays
from swin_dense.datasets.transforms import sample_seed
from swin_dense.errors import DataError

LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")


@dataclass
class SemanticSample:
    """One image with its label map, ready for a segmenter.

    Attributes:
        image: (3, H, W) uint8, RGB.
        label: (H, W) uint8 class indices, 255 ignored. After a test-time resize it keeps the original size.
        index: number of the image in the data set.
        name: the file's name without its ending.
        original_size_hw: (height, width) of the file's picture.
    """

    image: torch.Tensor
    label: torch.Tensor
    index: int
    name: str
    original_size_hw: tuple[int, int]


class SemanticDataset(SharedArrays, Dataset[SemanticSample]):
    """Images and label pictures of the same names, and a table that says what each value in a label picture means.

    Args:
        image_folder: folder of images.
        label_folder: folder of label pictures (PNG or another lossless format), one for each image.
        label_map: the classes, the value of each in the files, and the values to ignore.
        transform: augmentation or test-time resize; None gives the images as they are.
        seed: the run's seed, for the augmentation.

    Attributes:
        label_map: the classes.
        names: file names without ending, sorted.

    Raises:
        DataError: a folder is missing or empty, or an image or label picture has no partner.
    """

    def __init__(
        self,
        image_folder: str | Path,
        label_folder: str | Path,
        label_map: LabelMap,
        transform: SemanticTransform | None = None,
        seed: int = 0,
    ) -> None:
        self._image_folder, self._label_folder = Path(image_folder), Path(label_folder)
        images = files_by_stem(self._image_folder, IMAGE_SUFFIXES, "images")
        labels = files_by_stem(self._label_folder, LABEL_SUFFIXES, "label pictures")
        require_partners(images, labels, self._image_folder, self._label_folder)
        self.names = tuple(sorted(images))
        # Flat: a path of its own for every file would be copied into every loader process.
        self._image_files = FileNames([images[name].name for name in self.names])
        self._label_files = FileNames([labels[name].name for name in self.names])
        self.label_map = label_map
        self._value_table = label_map.value_table()
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> SemanticSample:
        """Returns a sample.

        Args:
            key: index, or (epoch, index): the augmentation differs from epoch to epoch.

        Raises:
            ImageError: a picture cannot be read, or the two sizes differ.
            DataError: a value is not in the label map.
            IndexError: there is no such index.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.raw(index)
        original_size_hw = (image.shape[0], image.shape[1])
        if self._transform is not None:
            image, label = self._transform(image, label, sample_seed(self._seed, epoch, index))
        return SemanticSample(
            torch.from_numpy(channels_first(image)),
            torch.from_numpy(np.ascontiguousarray(label)),
            int(index),
            self.names[index],
            original_size_hw,
        )

    def raw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns image and label map without transform.

        Returns:
            (H, W, 3) uint8 RGB, and (H, W) uint8 class indices with 255 for ignored pixels.

        Raises:
            ImageError: a picture cannot be read, or the two sizes differ.
            DataError: a value is not in the label map.
            IndexError: there is no such index.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        image_path, label_path = self.paths(index)
        values = read_label(label_path)
        # The label picture says in which frame the image was drawn, where EXIF allows two.
        image = read_image(image_path, (values.shape[0], values.shape[1]))
        return image, class_indices(values, self._value_table, self.label_map, label_path)

    def label(self, index: int) -> np.ndarray:
        """Returns the label map alone, (H, W) uint8 class indices with 255 for ignored pixels.

        Raises:
            ImageError: the picture cannot be read.
            DataError: a value is not in the label map.
        """
        _, label_path = self.paths(index)
        return class_indices(read_label(label_path), self._value_table, self.label_map, label_path)

    def paths(self, index: int) -> tuple[Path, Path]:
        """Returns the paths of an image and of its label picture."""
        return self._image_folder / self._image_files[index], self._label_folder / self._label_files[index]


def class_indices(values: np.ndarray, value_table: np.ndarray, label_map: LabelMap, path: Path) -> np.ndarray:
    """Turns the values of a label picture into class indices.

    Args:
        values: (H, W) integers.
        value_table: `label_map.value_table()`.
        label_map: what the values mean.
        path: the picture, for messages.

    Returns:
        (H, W) uint8, 255 for ignored pixels.

    Raises:
        DataError: a value is not in the label map. It is no ImageError, for which training takes another picture: the
            classes are wrong rather than the picture.
    """
    # A value below or beyond the table is unknown too, whatever stands at the end that the clip sends it to.
    indices = value_table.take(values, mode="clip")
    if indices.min() < 0 or values.min() < 0 or values.max() >= len(value_table):
        unknown = (indices < 0) | (values < 0) | (values >= len(value_table))
        raise DataError(_describe_unknown(values[unknown], path, label_map))
    return indices.astype(np.uint8)


def files_by_stem(folder: Path, suffixes: tuple[str, ...], what: str) -> dict[str, Path]:
    """Finds the pictures of a folder, by their names without ending.

    Raises:
        DataError: there is no such folder, it holds none, or two have the same name.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: wanted a folder of {what}; there is none.")
    files: dict[str, Path] = {}
    for path in files_ending_in(folder, suffixes):
        if path.stem in files:
            raise DataError(f"{folder}: {files[path.stem].name} and {path.name} have the same name. Remove one.")
        files[path.stem] = path
    if not files:
        raise DataError(f"{folder}: wanted {what} ({', '.join(suffixes)}), found none. Got: {describe_folder(folder)}.")
    return files


def require_partners(
    images: dict[str, Path],
    labels: dict[str, Path],
    image_folder: Path,
    label_folder: Path,
    *,
    of_images: str = "image",
    of_labels: str = "label picture",
) -> None:
    """Checks that two folders hold pictures of the same names.

    Args:
        images: from `files_by_stem`.
        labels: likewise.
        image_folder: that of `images`.
        label_folder: that of `labels`.
        of_images: what to call one of `images`.
        of_labels: what to call one of `labels`.

    Raises:
        DataError: one has no partner; names it.
    """
    for found, partners, folder, what in (
        (images, labels, label_folder, of_labels),
        (labels, images, image_folder, of_images),
    ):
        alone = sorted(set(found) - set(partners))
        if alone:
            raise DataError(
                f"{found[alone[0]]}: there is no {what} of that name in {folder} ({len(alone)} of {len(found)} lack "
                f"theirs; there is for example {next(iter(partners.values())).name}). Add it, or remove the file."
            )


def _describe_unknown(values: np.ndarray, path: Path, label_map: LabelMap) -> str:
    unique, counts = np.unique(values, return_counts=True)
    listed = ", ".join(f"{value} ({count} px)" for value, count in list(zip(unique, counts, strict=True))[:5])
    more = f" and {len(unique) - 5} more values" if len(unique) > 5 else ""
    low, high = min(label_map.raw_ids), max(label_map.raw_ids)
    return (
        f"{path}: the label map of {len(label_map)} classes (values {low} to {high}; ignored "
        f"{[*label_map.ignored_values, 255]}) does not know the value {listed}{more}. "
        f"Add it to the classes or to the ignored values."
    )
