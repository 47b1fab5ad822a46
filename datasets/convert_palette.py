"""Coloured label pictures into label pictures: each colour becomes the number of its class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.convert_findings import MAX_LISTED, Findings
from swin_dense.datasets.convert_labels import ConvertedLabel
from swin_dense.datasets.convert_pictures import paired_pictures, require_size
from swin_dense.datasets.images import read_image
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

Colour = tuple[int, int, int]

_UNKNOWN = -1
# "64 128 64 Animal", or "64, 128, 64<tab>Animal"
_COLOUR_FIRST = re.compile(r"(-?\d+)[\s,]+(-?\d+)[\s,]+(-?\d+)[\s,]+(\S.*)")
# CVAT: "Animal:64,128,64::"
_NAME_FIRST = re.compile(r"([^:]+):\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*(?::.*)?")


@dataclass(frozen=True)
class Palette:
    """What colours mean.

    Attributes:
        names: class index -> name.
        colours: class index -> (red, green, blue).
        ignored: colours of pixels to ignore.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    ignored: tuple[Colour, ...] = ()

    @property
    def label_map(self) -> LabelMap:
        """The classes of the label pictures: value and class index are the same."""
        return LabelMap(self.names, tuple(range(len(self.names))))

    def value_table(self) -> np.ndarray:
        """Returns int16 (2 ** 24,): red * 65536 + green * 256 + blue -> class index, 255 ignored, -1 unknown."""
        table = np.full(1 << 24, _UNKNOWN, np.int16)
        for colour in self.ignored:
            table[_code(colour)] = IGNORED_LABEL
        for index, colour in enumerate(self.colours):
            table[_code(colour)] = index
        return table


def read_palette(path: Path, ignored_names: tuple[str, ...] = ()) -> Palette:
    """Reads a palette file: "red green blue name" in each line, or CVAT's labelmap.txt; # begins a comment.

    Args:
        path: the text file.
        ignored_names: names in it whose pixels are to be ignored, such as Void; they become no class.

    Raises:
        DataError: it cannot be read or lines of it are wrong; names all of them.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the palette cannot be read as text ({error}).") from None
    findings = Findings()
    line_of: dict[Colour | str, int] = {}
    colour_of: dict[str, Colour] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        with findings.collected():
            name, colour = _parse_line(line.strip(), f"{path}: line {number}")
            for key in (name, colour):
                if key in line_of:
                    raise DataError(f"{path}: line {number}: {key!r} stands in line {line_of[key]} already.")
                line_of[key] = number
            colour_of[name] = colour
    missing = sorted(set(ignored_names) - set(colour_of))
    if missing and not findings.faults:
        findings.faults.append(f"{path}: no line has the name {missing[0]!r}, which is to be ignored.")
    classes = {name: colour for name, colour in colour_of.items() if name not in ignored_names}
    if not findings.faults and not 1 <= len(classes) <= IGNORED_LABEL:
        findings.faults.append(f"{path}: wanted 1 to {IGNORED_LABEL} classes, got {len(classes)}.")
    findings.require_none(path)
    return Palette(tuple(classes), tuple(classes.values()), tuple(colour_of[name] for name in ignored_names))


def read_palette_labels(
    image_folder: Path,
    label_folder: Path,
    palette: Palette,
    findings: Findings,
    *,
    ignore_unknown: bool = False,
    label_suffix: str = "",
    report: Callable[[int, int], None] | None = None,
) -> Iterator[ConvertedLabel]:
    """Reads images with coloured label pictures of the same names.

    Args:
        image_folder: folder of images.
        label_folder: folder of label pictures; those with a palette count by their colours.
        palette: what colours mean.
        findings: takes faults and notes: colours that the palette does not have, with pixels and pictures.
        ignore_unknown: make pixels of unknown colours 255 instead of a fault.
        label_suffix: what a label picture's name has after the image's.
        report: called as `report(done, in_all)`.

    Yields:
        The images in the order of their names.

    Raises:
        DataError: a folder is missing or empty.
    """
    pairs = paired_pictures(image_folder, label_folder, findings, label_suffix)
    table = palette.value_table()
    pixels: Counter[int] = Counter()
    pictures: Counter[int] = Counter()
    first: dict[int, Path] = {}
    for done, (image_path, label_path) in enumerate(pairs, start=1):
        with findings.collected():
            colours = read_image(label_path).astype(np.int32)
            require_size(image_path, (colours.shape[0], colours.shape[1]))
            codes = colours @ np.array([1 << 16, 1 << 8, 1], np.int32)
            values = table[codes]
            for code, count in zip(*np.unique(codes[values == _UNKNOWN], return_counts=True), strict=True):
                pixels[int(code)] += int(count)
                pictures[int(code)] += 1
                first.setdefault(int(code), label_path)
            values[values == _UNKNOWN] = IGNORED_LABEL
            yield ConvertedLabel(image_path, image_path.name, values.astype(np.uint8))
        if report is not None:
            report(done, len(pairs))
    if ignore_unknown:
        if pixels:
            findings.notes["pixels of unknown colours (ignored)"] += pixels.total()
            findings.notes["unknown colours"] += len(pixels)
    elif pixels:
        _add_unknown(pixels, pictures, first, findings)


def _add_unknown(pixels: Counter[int], pictures: Counter[int], first: dict[int, Path], findings: Findings) -> None:
    for code, count in pixels.most_common(MAX_LISTED):
        red, green, blue = code >> 16, code >> 8 & 255, code & 255
        findings.faults.append(
            f"the palette has no colour {red} {green} {blue}: {count} px in {pictures[code]} pictures, the first is "
            f"{first[code]}. Add a line for it, or pass --unknown ignore."
        )
    if all(len({code >> 16, code >> 8 & 255, code & 255}) == 1 for code in pixels):
        findings.faults.append(
            "all of these colours are grey: if the pictures hold class numbers already, they need no conversion."
        )
    elif len(pixels) > MAX_LISTED:
        findings.faults.append(
            f"{len(pixels)} unknown colours in all: so many come from resizing or from a lossy format. Take the "
            f"original pictures."
        )


def _parse_line(line: str, where: str) -> tuple[str, Colour]:
    if found := _NAME_FIRST.fullmatch(line):
        name, *numbers = found.groups()
    elif found := _COLOUR_FIRST.fullmatch(line):
        *numbers, name = found.groups()
    else:
        raise DataError(f'{where}: wanted "red green blue name" or CVAT\'s "name:red,green,blue::", got {line!r}.')
    red, green, blue = (int(number) for number in numbers)
    if min(red, green, blue) < 0 or max(red, green, blue) > 255:
        raise DataError(f"{where}: red, green and blue must be 0 to 255, got {red} {green} {blue}.")
    return name.strip(), (red, green, blue)


def _code(colour: Colour) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue
