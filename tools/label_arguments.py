"""What the values of label pictures mean, on the command line of `check` and `evaluate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swin_dense.datasets.labels import LabelMap


def add_label_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare --classes, --first-value and --ignored-values."""
    parser.add_argument(
        "--classes",
        metavar="CLASSES",
        help="of label pictures: ade20k, a file of names, or how many; default: the values that they hold",
    )
    parser.add_argument("--first-value", type=int, default=0, metavar="N", help="value of the first class; default: 0")
    parser.add_argument(
        "--ignored-values", type=int, nargs="+", default=[], metavar="N", help='values for "no label" beside 255'
    )


def label_map_of(arguments: argparse.Namespace) -> LabelMap | None:
    """The label map that the arguments describe; None where they name no classes.

    Raises:
        ConfigError: They contradict each other.
        DataError: The file of names cannot be used.
    """
    from swin_dense.datasets.ade20k import ade20k_labels
    from swin_dense.datasets.class_names import numbered_names, read_class_names
    from swin_dense.datasets.labels import LabelMap

    if arguments.classes is None:
        return None
    if arguments.classes == "ade20k":
        return ade20k_labels(arguments.first_value, arguments.ignored_values)
    if arguments.classes.isdecimal():
        names = numbered_names(int(arguments.classes))
    else:
        names = read_class_names(arguments.classes)
    values = tuple(range(arguments.first_value, arguments.first_value + len(names)))
    label_map = LabelMap(names, values, tuple(arguments.ignored_values))
    label_map.value_table()  # refuses values that no label picture can hold
    return label_map
