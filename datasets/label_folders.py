"""Predicted label pictures beside annotated ones of the same names, to be scored without a model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.images import read_label
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic import LABEL_SUFFIXES, class_indices, files_by_stem, require_partners
from swin_dense.errors import DataError, ImageError

NO_CLASS = "(no class)"


class LabelFolders:
    """Two folders of label pictures, paired by name.

    A prediction may hold values that mean "no label": there it names no class. Such pixels are those of a class of
    their own, `NO_CLASS`, which no label has: it takes no part in means, but costs the classes that were there.

    Args:
        predictions: folder of predicted label pictures.
        annotations: folder of annotated ones.
        label_map: what the values of both mean.

    Attributes:
        label_map: the classes, and `NO_CLASS` as the last one.
        names: file names without ending, sorted.

    Raises:
        DataError: a folder is missing or empty, or a picture has no partner.
    """

    def __init__(self, predictions: str | Path, annotations: str | Path, label_map: LabelMap) -> None:
        folders = Path(predictions), Path(annotations)
        self._predictions, self._annotations = (files_by_stem(folder, LABEL_SUFFIXES, "pictures") for folder in folders)
        require_partners(self._predictions, self._annotations, *folders, of_images="prediction", of_labels="annotation")
        self.names = tuple(sorted(self._annotations))
        self._known = label_map
        self._value_table = label_map.value_table()
        # No label picture holds a negative value, so it is free.
        self.label_map = LabelMap((*label_map.names, NO_CLASS), (*label_map.raw_ids, -1), label_map.ignored_values)

    def __len__(self) -> int:
        return len(self.names)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads a prediction and its annotation.

        Returns:
            (H, W) uint8 class indices of both, the first without ignored pixels.

        Raises:
            ImageError: a picture cannot be read, or the sizes differ.
            DataError: a value is not in the label map.
        """
        paths = self._predictions[self.names[index]], self._annotations[self.names[index]]
        prediction, label = (class_indices(read_label(path), self._value_table, self._known, path) for path in paths)
        if prediction.shape != label.shape:
            raise ImageError(
                f"{paths[0]}: the prediction is {prediction.shape[0]} x {prediction.shape[1]} pixels (height x width), "
                f"its annotation {label.shape[0]} x {label.shape[1]}. Write predictions at the size of the image."
            )
        prediction[prediction == IGNORED_LABEL] = len(self._known)
        return prediction, label


def label_map_of_values(annotations: str | Path, progress: Callable[[int, int], None] | None = None) -> LabelMap:
    """A class for each value that occurs in some annotations; 255 is ignored.

    Args:
        annotations: folder of label pictures.
        progress: gets how many pictures were read, and how many there are.

    Raises:
        DataError: the folder is missing or empty, or nothing in it is labelled.
    """
    files = list(files_by_stem(Path(annotations), LABEL_SUFFIXES, "pictures").values())
    values: set[int] = set()
    for number, path in enumerate(files, start=1):
        values.update(np.unique(read_label(path)).tolist())
        if progress is not None:
            progress(number, len(files))
    values.discard(IGNORED_LABEL)
    if not values:
        raise DataError(f"{annotations}: every pixel is {IGNORED_LABEL}, which means no label; nothing can be scored.")
    raw_ids = tuple(sorted(values))
    return LabelMap(tuple(f"value {value}" for value in raw_ids), raw_ids)
