"""One label contract: class index, name, and the id that stands in the files, kept together everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.errors import ConfigError, DataError

_UNKNOWN = -1
_NUM_VALUES = 65536


@dataclass(frozen=True)
class LabelMap:
    """The classes of a data set: 0-based contiguous indices without background, their names and their ids in the files.

    Attributes:
        names: class index -> class name.
        raw_ids: class index -> id in the files: COCO category id, or value in a label picture.
        ignored_values: values of a label picture that mean "ignore". 255 means ignore too, unless it is a raw id.

    Raises:
        ConfigError: lengths differ, there is no class, or a name, id or ignored value is empty, repeated or no integer.
    """

    names: tuple[str, ...]
    raw_ids: tuple[int, ...]
    ignored_values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("label map: it has no class; at least one name and raw id is needed")
        if len(self.names) != len(self.raw_ids):
            raise ConfigError(
                f"label map: names and raw_ids must have one entry per class, "
                f"got {len(self.names)} names and {len(self.raw_ids)} ids"
            )
        for field, values in (("raw_ids", self.raw_ids), ("ignored_values", self.ignored_values)):
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ConfigError(f"label map: {field} must hold integers, got {value!r}")
        for index, name in enumerate(self.names):
            if not isinstance(name, str) or not name.strip():
                raise ConfigError(f"label map: class {index} has the name {name!r}; give it a name that is not empty")
        _refuse_repeats("name", self.names)
        _refuse_repeats("raw id", self.raw_ids)
        clash = sorted(set(self.raw_ids) & set(self.ignored_values))
        if clash:
            raise ConfigError(f"label map: value {clash[0]} is both a class and an ignored value; keep one of the two")

    def __len__(self) -> int:
        return len(self.names)

    def index_of(self, raw_id: int) -> int:
        """Returns the class index of an id in the files.

        Raises:
            DataError: no class has this id.
        """
        try:
            return self.raw_ids.index(raw_id)
        except ValueError:
            raise DataError(
                f"label map: no class has the id {raw_id}; known ids are {_shorten(self.raw_ids)}"
            ) from None

    def to_dict(self) -> dict[str, list[Any]]:
        """Returns the map as plain JSON types, for checkpoints and result files."""
        return {
            "names": list(self.names),
            "raw_ids": list(self.raw_ids),
            "ignored_values": list(self.ignored_values),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LabelMap":
        """Reads what `to_dict` returned.

        Raises:
            ConfigError: a key is missing or unknown, or the values do not make a label map.
        """
        wanted = {"names", "raw_ids"}
        keys = set(values)
        if not wanted <= keys or not keys <= wanted | {"ignored_values"}:
            raise ConfigError(
                f"label map: wanted the keys names, raw_ids and optionally ignored_values, got {sorted(keys)}"
            )
        return cls(tuple(values["names"]), tuple(values["raw_ids"]), tuple(values.get("ignored_values", ())))

    def value_table(self) -> np.ndarray:
        """Returns the look-up table that turns label pictures into class indices.

        Returns:
            int16 (65536,): file value -> class index, 255 for an ignored value, -1 for a value that is not in the map.

        Raises:
            ConfigError: the map has more classes than an 8-bit label map can hold beside 255, or a value that no label
                picture can hold.
        """
        if len(self) > IGNORED_LABEL:
            raise ConfigError(
                f"label map: label pictures can hold {IGNORED_LABEL} classes beside the ignored one, got {len(self)}"
            )
        for value in (*self.raw_ids, *self.ignored_values):
            if not 0 <= value < _NUM_VALUES:
                raise ConfigError(f"label map: a label picture holds values from 0 to 65535, got {value}")
        table = np.full(_NUM_VALUES, _UNKNOWN, dtype=np.int16)
        table[[IGNORED_LABEL, *self.ignored_values]] = IGNORED_LABEL
        table[list(self.raw_ids)] = np.arange(len(self), dtype=np.int16)
        return table


def require_same_labels(expected: LabelMap, got: LabelMap, where: str) -> None:
    """Checks that two label maps have the same classes, in the same order, under the same ids.

    Ignored values may differ: they concern the label pictures of one data set only.

    Args:
        expected: what the model or the other split has.
        got: what `where` has.
        where: the file or object that `got` comes from, for the message.

    Raises:
        DataError: they differ; the message shows both lists.
    """
    if expected.names == got.names and expected.raw_ids == got.raw_ids:
        return
    raise DataError(
        f"{where}: its classes differ from the expected ones. Wanted {len(expected)}: {_list_classes(expected)}; "
        f"got {len(got)}: {_list_classes(got)}. Use annotations with the same categories, or train anew for these."
    )


def _list_classes(labels: LabelMap) -> str:
    return _shorten([f"{raw_id} {name}" for raw_id, name in zip(labels.raw_ids, labels.names, strict=True)], limit=200)


def _shorten(values: Sequence[object], limit: int = 20) -> str:
    text = ", ".join(str(value) for value in values[:limit])
    return text if len(values) <= limit else f"{text}, … ({len(values)} in all)"


def _refuse_repeats(what: str, values: Sequence[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ConfigError(f"label map: the {what} {value!r} stands for two classes; each needs its own")
        seen.add(value)
