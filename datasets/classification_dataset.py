"""Image classification data: a folder with one folder of pictures for each class."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch.utils.data import Dataset

from swin_dense.datasets.classification_transforms import ClassificationTransform
from swin_dense.datasets.folders import describe_folder, split_names
from swin_dense.datasets.geometry import channels_first
from swin_dense.datasets.images import IMAGE_SUFFIXES, read_image
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.transforms import sample_seed
from swin_dense.errors import DataError


@dataclass(frozen=True)
class MemoryImage:
    """A picture without a file of its own.

    Attributes:
        stem: what it is called, as `Path.stem`.
        pixels: (H, W, 3) uint8 RGB.
    """

    stem: str
    pixels: np.ndarray


ImageSource = Path | MemoryImage


@dataclass(frozen=True)
class ClassifiedImages:
    """Pictures with one class each.

    Attributes:
        sources: where each picture is.
        labels: (N,) class indices.
        label_map: the classes.
    """

    sources: Sequence[ImageSource]
    labels: np.ndarray
    label_map: LabelMap


@dataclass
class ClassificationSample:
    """One image with its class.

    Attributes:
        image: (3, H, W) uint8, RGB.
        label: class index.
        index: number of the image in the data set.
        name: what to call it in messages.
    """

    image: torch.Tensor
    label: int
    index: int
    name: str


class ClassificationDataset(Dataset[ClassificationSample]):
    """Pictures with one class each, augmented.

    Args:
        images: as `read_class_folders` or `read_cifar10` gives them.
        transform: augmentation or test-time crop; None gives the images as they are.
        seed: the run's seed, for the augmentation.

    Attributes:
        label_map: the classes.
        sources: where each picture is.
        labels: (N,) class indices.
    """

    def __init__(
        self, images: ClassifiedImages, transform: ClassificationTransform | None = None, seed: int = 0
    ) -> None:
        self.label_map = images.label_map
        self.sources = images.sources
        self.labels = images.labels
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> ClassificationSample:
        """Returns a sample.

        Args:
            key: index, or (epoch, index): the augmentation differs from epoch to epoch.

        Raises:
            ImageError: the picture cannot be read.
            IndexError: there is no such index.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self.raw(index)
        if self._transform is not None:
            image = self._transform(image, sample_seed(self._seed, epoch, index))
        return ClassificationSample(
            torch.from_numpy(channels_first(image)),
            int(self.labels[index]),
            int(index),
            self.name(index),
        )

    def raw(self, index: int) -> np.ndarray:
        """Returns the image without transform, (H, W, 3) uint8 RGB.

        Raises:
            ImageError: the picture cannot be read.
            IndexError: there is no such index.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        return read_source(self.sources[index])

    def name(self, index: int) -> str:
        """Returns what to call a picture: class folder and file, or its name in the archive."""
        source = self.sources[index]
        return source.stem if isinstance(source, MemoryImage) else f"{source.parent.name}/{source.name}"


def read_source(source: ImageSource, size_hw: tuple[int, int] | None = None) -> np.ndarray:
    """Reads a picture from wherever it is; see `read_image`."""
    return source.pixels if isinstance(source, MemoryImage) else read_image(source, size_hw)


def read_class_folders(folder: str | Path) -> ClassifiedImages:
    """Lists the pictures of a folder that holds one folder for each class; the pictures are not opened.

    Args:
        folder: `folder/<class>/<picture>`. The classes are in the order of their names. Files that are no pictures and
            hidden files and folders are passed over.

    Raises:
        DataError: the folder is missing or has fewer than two classes, a class has no pictures or a folder inside it,
            or a picture lies outside the classes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: wanted a folder with one folder of pictures for each class; there is none.")
    entries = _visible(folder)
    stray = next((entry for entry in entries if _is_picture(entry)), None)
    classes = [Path(entry.path) for entry in entries if entry.is_dir()]
    if stray is not None or len(classes) < 2:
        got = f"the picture {stray.name}" if stray is not None else describe_folder(folder)
        raise DataError(
            f"{folder}: wanted two or more folders, one for each class, and every picture in one of them, got {got}. "
            f"Pass the folder that holds the classes' folders."
        )
    files = [_pictures_of_class(path) for path in classes]
    labels = np.repeat(np.arange(len(classes)), [len(names) for names in files])
    names = np.array([name for of_class in files for name in of_class])
    label_map = LabelMap(tuple(path.name for path in classes), tuple(range(len(classes))))
    return ClassifiedImages(_ClassFiles(classes, labels, names), labels, label_map)


def find_class_folders(root: str | Path, split: str) -> Path:
    """Finds the folder of a split, whose folders are the classes.

    Args:
        root: `root/{train,training}/<class>` and `root/{val,validation}/<class>`; or `root/<class>`, which has no
            splits: both are the root.
        split: "train" or "val".

    Raises:
        DataError: one split is there, the other is not.
    """
    root = Path(root)
    places = {name: [root / place for place in split_names(name)] for name in ("train", "val")}
    found = {name: next((path for path in paths if _holds_folders(path)), None) for name, paths in places.items()}
    if found["train"] is None and found["val"] is None:
        return root
    folder = found[split]
    if folder is None:
        raise DataError(
            f"{root}: split {split!r} not found. Looked for folders of classes in "
            f"{' or '.join(path.name for path in places[split])}. Got: {describe_folder(root)}. Check the folder."
        )
    return folder


class _ClassFiles(Sequence[Path]):
    """Paths made on demand: a million of them as objects would be copied into every loader process."""

    def __init__(self, classes: Sequence[Path], labels: np.ndarray, names: np.ndarray) -> None:
        self._classes = classes
        self._labels = labels
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return _ClassFiles(self._classes, self._labels[index], self._names[index])
        return self._classes[self._labels[index]] / str(self._names[index])


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    # Entries know whether they are folders; paths would ask the disk for each of a million pictures.
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir()


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in _visible(folder))


def _pictures_of_class(folder: Path) -> list[str]:
    entries = _visible(folder)
    nested = next((entry for entry in entries if entry.is_dir()), None)
    if nested is not None:
        raise DataError(
            f"{nested.path}: a folder inside the class {folder.name!r}; the pictures of a class lie in its folder "
            f"directly. Move them up, or make it a class of its own."
        )
    names = [entry.name for entry in entries if _is_picture(entry)]
    if not names:
        raise DataError(
            f"{folder}: the class {folder.name!r} has no pictures ({', '.join(IMAGE_SUFFIXES)}). "
            f"Got: {describe_folder(folder)}. Add some, or remove the folder."
        )
    return names
