"""CIFAR-10 (Krizhevsky, 2009) from the files as they are distributed: 60000 pictures of 32 x 32 pixels, 10 classes."""

import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np

from swin_dense.datasets.classification_dataset import ClassifiedImages, MemoryImage
from swin_dense.datasets.folders import describe_folder, split_names
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def read_cifar10(root: str | Path, split: str) -> ClassifiedImages:
    """Reads a split into memory. The files' checksums are compared before anything in them is unpacked.

    Args:
        root: the folder that holds `cifar-10-batches-py` or `cifar-10-python.tar.gz`, or `cifar-10-batches-py` itself.
        split: "train", 50000 pictures, or "val", the 10000 of the test batch.

    Raises:
        DataError: the files are missing, incomplete or changed, or another split is asked for.
    """
    root = Path(root)
    split_names(split)
    if root.name == FOLDER and root.is_dir():
        return _read_folder(root, split)
    if (root / FOLDER).is_dir():
        return _read_folder(root / FOLDER, split)
    archive = root / ARCHIVE
    if not archive.is_file():
        raise DataError(
            f"{root}: wanted CIFAR-10, the folder {FOLDER} or the file {ARCHIVE}, got {describe_folder(root)}. "
            f"Get the python version at {SOURCE}."
        )
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with tarfile.open(archive) as file:
                file.extractall(unpacked, filter="data")
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise DataError(f"{archive}: cannot be unpacked ({error}). Get it again at {SOURCE}.") from None
        return _read_folder(Path(unpacked) / FOLDER, split, shown=archive)


def _read_folder(folder: Path, split: str, shown: Path | None = None) -> ClassifiedImages:
    from torchvision.datasets import CIFAR10

    try:
        content = CIFAR10(folder.parent, train=split == "train", download=False)
    except RuntimeError:
        raise DataError(
            f"{shown or folder}: not the files of CIFAR-10 as they are distributed: one is missing or has another "
            f"checksum. Get them again at {SOURCE}."
        ) from None
    pixels = np.ascontiguousarray(content.data)
    pictures = tuple(MemoryImage(f"{split}_{index:05d}", picture) for index, picture in enumerate(pixels))
    label_map = LabelMap(tuple(content.classes), tuple(range(len(content.classes))))
    return ClassifiedImages(pictures, np.array(content.targets), label_map)
