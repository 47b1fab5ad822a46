"""Any file of weights into tensors by name. What a file is, its first bytes say; its suffix is not asked.

Read are torch's zip files and older streams, safetensors, and both in several files under an index. Nothing in a file
is executed, and nothing is trusted before it was compared with the file's size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from swin_dense.errors import CheckpointError
from swin_dense.weights.torch_files import STREAM_MAGIC, ZIP_START, read_stream_file, read_zip_file
from swin_dense.weights.wrappers import WeightsFile, shortened, unwrap_weights

__all__ = ["WeightsFile", "read_weights_file", "unwrap_weights"]

_METADATA_KEY = "swin_dense"
_HEAD_BYTES = 512
# The format's own limit: https://github.com/huggingface/safetensors, README, "Format".
_LARGEST_SAFETENSORS_HEADER = 100_000_000
# Names that a folder's weights go by, the likeliest first.
_NAMES_IN_FOLDERS = (
    "best.safetensors",
    "last.safetensors",
    "model.safetensors",
    "*.safetensors.index.json",
    "pytorch_model.bin",
    "*.bin.index.json",
    "*.safetensors",
    "*.pth",
    "*.pt",
    "*.ckpt",
    "*.bin",
)
_FOREIGN_STARTS: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself. Run 'git lfs pull'."),
    (b"\x89PNG", "a PNG image, not weights."),
    (b"\xff\xd8\xff", "a JPEG image, not weights."),
    (b"GIF8", "a GIF image, not weights."),
    (b"%PDF", "a PDF document, not weights."),
    (b"\x1f\x8b", "compressed with gzip. Unpack it and pass the file inside."),
    (b"\xfd7zXZ", "compressed with xz. Unpack it and pass the file inside."),
    (b"7z\xbc\xaf", "a 7z archive. Unpack it and pass the file inside."),
    (b"PK\x05\x06", "an empty zip archive."),
    (b"\x93NUMPY", "a NumPy array, not a state dict."),
    (b"\x89HDF", "an HDF5 file, as Keras writes; a state dict of torch or safetensors is needed."),
    (
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a plain pickle, as detectron2's model zoo has, not a file of torch.save. Pickles can run code, so it is not "
        "opened; ask for the same weights from torch.save or as safetensors.",
    ),
)


def read_weights_file(path: str | Path) -> WeightsFile:
    """All tensors of a weights file by name, on the CPU.

    Tensors of large files may be views of the file's pages: do not change the file while they are in use.

    Args:
        path: A file of torch.save or safetensors, or the index (`….index.json`) beside the parts of one.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind, or holds more than tensors and harmless objects.
    """
    path = Path(path)
    try:
        return _read(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or type(error).__name__}).") from None


def _read(path: Path) -> WeightsFile:
    head = _head(path)
    if _is_json(head):
        return _read_index(path)
    content, metadata, foreign = _read_single(path, head)
    found = unwrap_weights(content, str(path))
    _refuse_tensors_larger_than_the_file(found.tensors, path)
    about, about_notes = _about(metadata)
    foreign_notes = (f"objects of other libraries not read: {', '.join(foreign)}",) if foreign else ()
    return replace(
        found,
        about=about,
        class_names=_names_of_labels(about) or found.class_names,
        notes=found.notes + foreign_notes + about_notes,
    )


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; {_advice_for_folder(path)}")
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such weights file.")
    if not path.is_file():
        raise CheckpointError(f"{path}: is a device or a pipe, not a file.")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise CheckpointError(f"{path}: is empty. Copy or download it again.")
    return head


def _advice_for_folder(folder: Path) -> str:
    found = [file.name for pattern in _NAMES_IN_FOLDERS for file in sorted(folder.glob(pattern)) if file.is_file()]
    return f"pass the weights file in it: {folder / found[0]}." if found else "and there is no weights file in it."


def _read_single(path: Path, head: bytes) -> tuple[Any, Mapping[str, str], tuple[str, ...]]:
    """Content, the text beside it, and the libraries whose objects were left out."""
    if head.startswith(ZIP_START):
        content, foreign = read_zip_file(path)
        return content, {}, foreign
    if head.startswith(b"\x80") and STREAM_MAGIC in head[:32]:
        content, foreign = read_stream_file(path)
        return content, {}, foreign
    if _is_safetensors(head):
        tensors, metadata = _read_safetensors(path)
        return tensors, metadata, ()
    raise CheckpointError(f"{path}: {_what_it_is(head)}")


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_SAFETENSORS_HEADER


def _is_json(head: bytes) -> bool:
    return head.lstrip()[:1] in (b"{", b"[")


def _what_it_is(head: bytes) -> str:
    for start, words in _FOREIGN_STARTS:
        if head.startswith(start):
            return f"is {words}"
    if head[257:262] == b"ustar":
        return "is a tar archive. Unpack it; torch's own tar files of 2016 are not read safely."
    if head.lstrip().startswith(b"<"):
        return "is a web page, not a weights file. Download the file itself."
    if _is_text(head):
        first_line = head.decode(errors="replace").strip().splitlines()[:1]
        return f"is text that begins with '{''.join(first_line)[:40]}', not a weights file."
    return "is none of the kinds that are read (torch.save, safetensors), or its beginning is damaged."


def _is_text(head: bytes) -> bool:
    text = head.decode(errors="ignore")
    is_whole = bool(text) and len(text.encode()) > len(head) - 4  # the last character may be cut
    return is_whole and all(character.isprintable() or character.isspace() for character in text)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import safe_open

    _require_whole_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:  # SafetensorError, and torch's own for types that it lacks
        reason = str(error).splitlines()[0][:150].rstrip(".") if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: is no valid safetensors file ({reason}). Use another copy of it.") from None


def _require_whole_safetensors(path: Path) -> None:
    size = os.path.getsize(path)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(header_bytes)
    end = 0
    if len(header) == header_bytes:
        try:
            ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
            end = max(ends, default=0)
            end = end if isinstance(end, int) else 0
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            pass  # safetensors itself says what is wrong
    expected = 8 + header_bytes + end
    if size < expected:
        raise CheckpointError(
            f"{path}: is cut, it has {size} bytes and its header asks for {expected}. Copy or download it again."
        )


def _read_index(path: Path) -> WeightsFile:
    names_of_parts: dict[str, list[str]] = {}
    for name, part in _weight_map(path).items():
        names_of_parts.setdefault(_checked_part(part, path), []).append(name)
    tensors: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    for part, names in names_of_parts.items():
        if not (path.parent / part).is_file():
            raise CheckpointError(
                f"{path}: its part {shortened(part)} is not beside it. Download all {len(names_of_parts)} parts."
            )
        held, part_notes = _read_part(path, part, names)
        tensors.update(held)
        notes += part_notes
    found = unwrap_weights(tensors, str(path))
    return replace(found, notes=found.notes + notes)


def _read_part(index: Path, part: str, names: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    path = index.parent / part
    content, _, foreign = _read_single(path, _head(path))
    missing = [name for name in names if not isinstance(content, Mapping) or name not in content]
    if missing:
        raise CheckpointError(
            f"{index}: says that {shortened(missing[0])} is in {shortened(part)}, which does not hold it. "
            "Index and parts do not belong together; download them again."
        )
    held = {name: content[name] for name in names}
    _refuse_tensors_larger_than_the_file(held, path)
    return held, (f"objects of other libraries in {part} not read: {', '.join(foreign)}",) if foreign else ()


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: looks like JSON and is not whole ({type(error).__name__}).") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path}: is JSON, but no index of weights (it has no weight_map). Pass the weights file itself, such as "
            "model.safetensors."
        )
    if not weight_map:
        raise CheckpointError(f"{path}: its weight_map is empty.")
    return weight_map


def _checked_part(part: object, index: Path) -> str:
    """Only the words of the path count: caches of downloads hold links to files elsewhere."""
    if isinstance(part, str) and part and "\0" not in part:
        paths = (PurePosixPath(part), PureWindowsPath(part))
        if not any(path.anchor or ".." in path.parts for path in paths):
            return part
    raise CheckpointError(
        f"{index}: its weight_map names the part '{shortened(part)}', outside its own folder; that is refused. "
        "Parts lie beside the index."
    )


def _refuse_tensors_larger_than_the_file(tensors: Mapping[str, Any], path: Path) -> None:
    """A tensor of stride 0 repeats one number without end."""
    size = os.path.getsize(path)
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
            raise CheckpointError(
                f"{path}: {shortened(name)} claims shape {tuple(value.shape)}, "
                f"{value.numel() * value.element_size()} bytes in a file of {size}; that is refused."
            )


def _about(metadata: Mapping[str, str]) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    if _METADATA_KEY not in metadata:
        return None, ()
    try:
        about = json.loads(metadata[_METADATA_KEY])
    except (ValueError, RecursionError):
        about = None
    return (about, ()) if isinstance(about, dict) else (None, ("the text beside the weights is damaged, not used",))


def _names_of_labels(about: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    labels = about.get("labels") if about else None
    names = labels.get("names") if isinstance(labels, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None
