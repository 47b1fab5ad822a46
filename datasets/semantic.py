"""Semantic segmentation data: any folder of images with a folder of label pictures of the same names."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from swin_dense.datasets.folders import describe_folder, files_ending_in, first_existing, split_names
from swin_dense.datasets.images import IMAGE_SUFFIXES, read_image, read_label
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.transforms import SemanticTransform, sample_seed
from swin_dense.errors import DataError, ImageError

_LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
_NAME_COLUMNS = ("name", "names", "class", "label")


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


class SemanticDataset(Dataset[SemanticSample]):
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
        images = _files_by_stem(Path(image_folder), IMAGE_SUFFIXES, "images")
        labels = _files_by_stem(Path(label_folder), _LABEL_SUFFIXES, "label pictures")
        _require_partners(images, labels, Path(image_folder), Path(label_folder))
        self.names = tuple(sorted(images))
        self._image_paths = [images[name] for name in self.names]
        self._label_paths = [labels[name] for name in self.names]
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
            ImageError: a picture cannot be read, the two sizes differ, or a value is not in the label map.
            IndexError: there is no such index.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.raw(index)
        original_size_hw = (image.shape[0], image.shape[1])
        if self._transform is not None:
            image, label = self._transform(image, label, sample_seed(self._seed, epoch, index))
        return SemanticSample(
            torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
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
            ImageError: a picture cannot be read, the two sizes differ, or a value is not in the label map.
            IndexError: there is no such index.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        label_path = self._label_paths[index]
        values = read_label(label_path)
        # The label picture says in which frame the image was drawn, where EXIF allows two.
        image = read_image(self._image_paths[index], (values.shape[0], values.shape[1]))
        return image, self._class_indices(values, label_path)

    def label(self, index: int) -> np.ndarray:
        """Returns the label map alone, (H, W) uint8 class indices with 255 for ignored pixels.

        Raises:
            ImageError: the picture cannot be read, or a value is not in the label map.
        """
        return self._class_indices(read_label(self._label_paths[index]), self._label_paths[index])

    def paths(self, index: int) -> tuple[Path, Path]:
        """Returns the paths of an image and of its label picture."""
        return self._image_paths[index], self._label_paths[index]

    def _class_indices(self, values: np.ndarray, path: Path) -> np.ndarray:
        # A value beyond the table, or below it, is unknown too: the clip sends it to an end that is checked as well.
        indices = self._value_table[values.clip(0, len(self._value_table) - 1)]
        unknown = (indices < 0) | (values < 0) | (values >= len(self._value_table))
        if unknown.any():
            raise ImageError(_describe_unknown(values[unknown], path, self.label_map))
        return indices.astype(np.uint8)


def find_semantic_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """Finds image and label folder of a split in the usual layouts.

    Looks for `images/{training,train}` with `annotations/{training,train}` (val accordingly). A root whose `images` and
    `annotations` hold files directly has no splits: both are that pair.

    Args:
        root: the data set's folder.
        split: "train" or "val".

    Returns:
        (image folder, label folder).

    Raises:
        DataError: not found; lists what was looked for and what is there.
    """
    root = Path(root)
    names = split_names(split)
    found = [first_existing([root / kind / name for name in names], Path.is_dir) for kind in ("images", "annotations")]
    image_folder, label_folder = found
    if image_folder is not None and label_folder is not None:
        return image_folder, label_folder
    flat = (root / "images", root / "annotations")
    if image_folder is None and label_folder is None and all(_holds_pictures(folder) for folder in flat):
        return flat
    raise DataError(
        f"{root}: split {split!r} not found. Looked for images/<name> and annotations/<name> with the name "
        f"{' or '.join(names)}, or pictures directly in images and annotations. Got: {describe_folder(root)}; "
        f"in images: {describe_folder(root / 'images')}. Check the folder."
    )


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Reads the names of the classes, in order.

    Args:
        path: a text file with one name per line, or a CSV file with a header that has the column "Name", like ADE20K's
            objectInfo150.csv. Of synonyms separated by ";" the first is taken; where two classes would then be called
            the same, words are added until they differ.

    Raises:
        DataError: the file is missing, empty, no text, or names a class twice.
    """
    path = Path(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list of class names cannot be read ({error}).") from None
    header = [cell.strip().lower() for cell in lines[0].split(",")] if lines else []
    column = next((header.index(name) for name in _NAME_COLUMNS if name in header and len(header) > 1), None)
    if column is None:
        names = tuple(line.strip() for line in lines)
    else:
        rows = list(csv.reader(lines[1:]))
        short = next((number for number, row in enumerate(rows, start=2) if len(row) <= column), None)
        if short is not None:
            raise DataError(f"{path}: line {short} has no column {lines[0].split(',')[column]!r}. Complete it.")
        names = _tell_apart([[word.strip() for word in row[column].split(";")] for row in rows])
    repeated = next((name for name in names if names.count(name) > 1), None)
    if not names or repeated is not None:
        got = "none" if not names else f"{repeated!r} twice"
        raise DataError(f"{path}: wanted one different class name per line, got {got}.")
    return names


def _tell_apart(synonyms: list[list[str]]) -> tuple[str, ...]:
    lengths = [1] * len(synonyms)
    while True:
        names = [" ".join(words[:length]) for words, length in zip(synonyms, lengths, strict=True)]
        longer = [
            length + 1 if names.count(name) > 1 and length < len(words) else length
            for name, words, length in zip(names, synonyms, lengths, strict=True)
        ]
        if longer == lengths:
            return tuple(names)
        lengths = longer


def _files_by_stem(folder: Path, suffixes: tuple[str, ...], what: str) -> dict[str, Path]:
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


def _require_partners(images: dict[str, Path], labels: dict[str, Path], image_folder: Path, label_folder: Path) -> None:
    for found, partners, folder, what in (
        (images, labels, label_folder, "label picture"),
        (labels, images, image_folder, "image"),
    ):
        alone = sorted(set(found) - set(partners))
        if alone:
            raise DataError(
                f"{found[alone[0]]}: there is no {what} of that name in {folder} ({len(alone)} of {len(found)} lack "
                f"theirs; there is for example {next(iter(partners.values())).name}). Add it, or remove the file."
            )


def _holds_pictures(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


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
