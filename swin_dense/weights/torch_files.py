"""Files that torch.save wrote, today's zip archives and the older streams, opened without executing anything.

Everything about the file is compared with its size first, so that a small file cannot ask for much memory; then torch
opens it with its restricted reader.
"""

from __future__ import annotations

import io
import mmap
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from swin_dense.errors import CheckpointError
from swin_dense.weights.foreign_objects import libraries_of
from swin_dense.weights.pickle_scan import PickleScan, scan_pickle

ZIP_START = b"PK\x03\x04"
# The pickled number that opens the older streams, torch.serialization.MAGIC_NUMBER; its protocol comes before it.
STREAM_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def read_zip_file(path: Path) -> tuple[Any, tuple[str, ...]]:
    """The content of a torch zip file, and the libraries whose objects were left out of it.

    Tensors are views of the file's pages, read when they are first touched: parts that nobody uses, such as the state
    of an optimiser, are never read.

    Raises:
        CheckpointError: The file is damaged, no such archive, or holds more than tensors and harmless objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            scan = _scan_archive(archive, path)
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: is the beginning of a torch file; its end is missing or damaged ({_size(path)} bytes are there). "
            "Copy or download it again."
        ) from None
    except (RuntimeError, NotImplementedError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: its zip archive is damaged ({_first_words(error)}).") from None
    if path.suffix == ".safetensors":
        # torch.load goes by this suffix, whatever the file is; it does not see the name of an open one.
        with path.open("rb") as file:
            return _load(file, path, scan)
    return _load(path, path, scan, by_pages=True)


def read_stream_file(path: Path) -> tuple[Any, tuple[str, ...]]:
    """The same for the files that torch.save wrote before version 1.6.

    Raises:
        CheckpointError: As for `read_zip_file`.
    """
    # Read through a map: a plain file makes room for whatever length a damaged pickle claims for its next text.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        for _ in ("magic number", "protocol", "system"):
            scan_pickle(pages, str(path))
        scan = scan_pickle(pages, str(path))
        scan_pickle(pages, str(path))  # the order of the storages; they follow, each behind eight bytes of its length
        expected = pages.tell() + sum(8 + size for size in scan.storage_bytes.values())
        if expected != _size(path):
            raise CheckpointError(
                f"{path}: has {_size(path)} bytes, its list of tensors asks for {expected}. Copy or download it again."
            )
        return _load(file, path, scan)


def _scan_archive(archive: zipfile.ZipFile, path: Path) -> PickleScan:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise CheckpointError(f"{path}: its zip archive names an entry twice; torch.save does not.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise CheckpointError(
            f"{path}: its zip archive is compressed, which torch.save does not do; it may expand without bound. "
            "Unpack it and pass the weights file inside, if there is one."
        )
    if sum(entry.file_size for entry in entries.values()) > _size(path):
        raise CheckpointError(f"{path}: its zip archive promises more bytes than the file has.")
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path}: is a zip archive, but torch.save did not write it. Unpack it and pass the weights file inside."
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise CheckpointError(
            f"{path}: is a TorchScript program, not weights. Ask for a file with its model's state_dict()."
        )
    scan = scan_pickle(io.BytesIO(archive.read(pickles[0])), str(path))
    for key, size in scan.storage_bytes.items():
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or entry.file_size != size:
            held = "none" if entry is None else f"{entry.file_size}"
            raise CheckpointError(
                f"{path}: is damaged, a tensor refers to {size} bytes under data/{key} and there are {held}. "
                "Use another copy of it."
            )
    return scan


def _load(file: Path | BinaryIO, path: Path, scan: PickleScan, by_pages: bool = False) -> tuple[Any, tuple[str, ...]]:
    stand_ins = [(stand_in, name) for name, stand_in in scan.foreign.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=by_pages)
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(
            f"{path}: is damaged, torch cannot read it ({_first_words(error)}). Use another copy of it."
        ) from None
    return content, libraries_of(scan.foreign)


def _first_words(error: Exception) -> str:
    """The text of torch, unless it advises to load without protection."""
    words = str(error).strip().splitlines()[:1]
    if not words or "weights_only" in str(error) or "allowlist" in str(error):
        return type(error).__name__
    return words[0].split(". ")[0][:150].rstrip(".")


def _size(path: Path) -> int:
    return os.path.getsize(path)
