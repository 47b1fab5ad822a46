"""Detections on their way into a COCO results file: kept on disk, so that memory does not grow with their number."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_BYTES_IN_MEMORY = 2**24


class ResultsSpool:
    """Collects the detections of images, in any order, and gives them back in the order of the image ids.

    A small part is kept in memory, the rest in a nameless temporary file, which ends with the process however it ends.
    A spool can be pickled and so sent to another process, with all that it holds.
    """

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_BYTES_IN_MEMORY)
        weakref.finalize(self, self._file.close)
        self._places: dict[int, tuple[int, int]] = {}

    def add(self, image_id: int, results: Sequence[Mapping[str, Any]]) -> None:
        """Takes the COCO results of an image that was not added before."""
        self._append(image_id, json.dumps(results).encode())

    def merge(self, other: ResultsSpool) -> None:
        """Takes what another spool holds of other images."""
        for image_id in other._places:
            self._append(image_id, other._read(image_id))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for image_id in sorted(self._places):
            yield from json.loads(self._read(image_id))

    def write(self, path: Path) -> None:
        """Writes a COCO results file, image after image; the file is whole or not there."""
        from swin_dense.training.atomic_file import atomic_write

        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(b"[")
            separator = b""
            for image_id in sorted(self._places):
                listed = self._read(image_id)[1:-1]
                if listed:
                    file.write(separator + listed)
                    separator = b",\n"
            file.write(b"]\n")

    def _append(self, image_id: int, text: bytes) -> None:
        start = self._file.seek(0, 2)
        self._file.write(text)
        self._places[image_id] = (start, len(text))

    def _read(self, image_id: int) -> bytes:
        start, length = self._places[image_id]
        self._file.seek(start)
        return self._file.read(length)

    def __getstate__(self) -> dict[int, bytes]:
        return {image_id: self._read(image_id) for image_id in self._places}

    def __setstate__(self, texts: dict[int, bytes]) -> None:
        self._open()
        for image_id, text in texts.items():
            self._append(image_id, text)
