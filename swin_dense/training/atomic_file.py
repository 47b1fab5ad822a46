"""Files that are either whole or not there: atomic replacement, and tensors under a checksum."""

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from swin_dense.errors import CheckpointError

# A checked file is what torch.save writes, a ZIP archive, with its checksum as the archive's comment: torch.load and
# every ZIP tool still read it. The archive ends with a record of 22 bytes whose last two are the comment's length.
CHECKSUM_LABEL = b"sha256:"
COMMENT_LENGTH = len(CHECKSUM_LABEL) + 64
ARCHIVE_START = b"PK\x03\x04"


@contextmanager
def atomic_write(path: Path, *, keep_as: Path | None = None) -> Iterator[BinaryIO]:
    """Gives a file to write to that takes the place of `path` when the block ends without an error.

    The new bytes lie in `<path>.tmp` in the same folder and are on the disk before the replacement, so that a crash
    at any moment leaves the old content or the new one under `path`, or, with `keep_as`, at least the old one there.
    What is no file, such as /dev/null or a pipe, is written to and never replaced.

    Args:
        path: File to create or replace.
        keep_as: Name in the same folder under which the former content of `path` is kept.

    Yields:
        An empty binary file, open for writing and reading.
    """
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_checked(path: Path, content: Mapping[str, Any], *, keep_as: Path | None = None) -> None:
    """Writes tensors and plain values, atomically and with a checksum.

    Args:
        path: File to create or replace; its folder exists.
        content: Tensors, numbers, strings, None, and lists, tuples and dicts of these.
        keep_as: As in `atomic_write`.

    Raises:
        CheckpointError: A value is of another type, or the file cannot be written. The former file is unharmed.
    """
    _require_plain(content, path.name)
    try:
        with atomic_write(path, keep_as=keep_as) as file:
            torch.save(dict(content), file)
            _append_checksum(file)
    # torch reports a full disk as RuntimeError, in words about its own file format.
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not all of it could be written"
        unharmed = " The former file is unharmed." if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written ({reason}); {_free_space(path.parent)}.{unharmed}") from error


def read_checked(path: Path) -> dict[str, Any]:
    """Reads what `write_checked` wrote, to the CPU, after its checksum was verified.

    Raises:
        CheckpointError: The file is missing, empty, cut, changed or of another origin; one sentence says which.
    """
    try:
        with open(path, "rb") as file:
            _verify(file, path)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except CheckpointError:
        raise
    except Exception as error:
        # torch's own text advises to load without protection: not to be repeated, hence neither quoted nor chained.
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds an object of type {foreign[1]}" if foreign else f"torch stops with {type(error).__name__}"
        raise CheckpointError(
            f"{path}: refused, {reason}; only tensors and plain values are read. Use a file from a trusted run."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict of named values, got {type(content).__name__}.")
    return content


def _append_checksum(file: BinaryIO) -> None:
    file.seek(-2, os.SEEK_END)
    file.write(COMMENT_LENGTH.to_bytes(2, "little"))
    file.seek(0)
    checksum = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed wants readinto
    file.seek(0, os.SEEK_END)
    file.write(CHECKSUM_LABEL + checksum.encode())


def _verify(file: BinaryIO, path: Path) -> None:
    start = file.read(64)
    if not start:
        raise CheckpointError(f"{path}: is empty. Use another copy of it.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the file itself. Run 'git lfs pull'.")
    if start.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path}: is a web page, not a checkpoint. Download the file itself.")
    if not start.startswith(ARCHIVE_START):
        raise CheckpointError(f"{path}: is not a file that torch.save wrote, or its beginning is damaged.")
    if not _has_checksum(file):
        raise CheckpointError(f"{path}: has no checksum at its end: it is cut, or was not written by this library.")
    if not _matches_checksum(file):
        raise CheckpointError(f"{path}: is damaged, its content does not match its checksum. Use another copy of it.")
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(f"{path}: holds compressed entries, which torch.save never writes.")
    file.seek(0)


def _has_checksum(file: BinaryIO) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - COMMENT_LENGTH))
    return re.fullmatch(re.escape(CHECKSUM_LABEL) + rb"[0-9a-f]{64}", file.read()) is not None


def _matches_checksum(file: BinaryIO) -> bool:
    remaining = file.seek(0, os.SEEK_END) - COMMENT_LENGTH
    file.seek(0)
    digest = hashlib.sha256()
    while remaining > 0:
        block = file.read(min(remaining, 1 << 20))
        digest.update(block)
        remaining -= len(block)
    return file.read() == CHECKSUM_LABEL + digest.hexdigest().encode()


def _require_plain(value: object, where: str) -> None:
    """Types are compared exactly: numpy.float64 is a float, and is refused when the file is read."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_plain(key, where)
            _require_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]  # a list or a tuple
            _require_plain(item, f"{where}[{index}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise CheckpointError(
            f"{where}: a value of type {type(value).__name__} cannot be saved. Convert it to a tensor or a plain value."
        )


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free in {folder}"
    except OSError:
        return f"the folder {folder} cannot be reached"


def _sync_folder(folder: Path) -> None:
    """Puts the renamed entry itself on the disk, where the system can (Windows cannot open a folder)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
