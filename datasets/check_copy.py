"""What cleaned copies have in common: a new folder, links or copies of files, and the list of changes.

The input is only read; `KINDS` says what becomes of each kind of finding. Pictures of the copy are links to the
original ones, or with `copy_pictures` files of their own, so that the folder can be moved. `changes.json` lists each
change.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from swin_dense.datasets.check_findings import KINDS
from swin_dense.errors import ConfigError

UNUSABLE_PICTURES = {
    "picture-missing",
    "picture-empty",
    "picture-damaged",
    "picture-foreign",
    "picture-too-large",
    "picture-animated",
    "picture-in-two-splits",
}
"""Kinds of findings of picture files that are left out."""


@dataclass(frozen=True)
class Change:
    """One difference between the copy and the input.

    Attributes:
        kind: Of the finding that it answers.
        file: The input's file.
        done: What was done.
        image_id: As in the input.
        annotation_id: As in the input.
    """

    kind: str
    file: str
    done: str
    image_id: int | str | None = None
    annotation_id: int | str | None = None


def require_new_folder(out: Path, inputs: Iterable[Path]) -> None:
    """Refuses a folder that holds anything, or that lies in one of the inputs.

    Raises:
        ConfigError: It does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: choose another folder for the cleaned copy.")
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{out} lies in the data itself ({folder}): choose a folder outside.")


def place_folder(folder: Path, target: Path, file_names: list[str], copy_pictures: bool) -> None:
    """Makes the files of a folder stand under `target` too: a link to the folder, or copies of these files."""
    if not copy_pictures:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():  # both splits in one folder
            return
        os.symlink(folder.resolve(), target, target_is_directory=True)
        return
    for name in file_names:
        place_file(folder / name, target / name, copy_pictures)


def place_file(file: Path, target: Path, copy_pictures: bool) -> None:
    """Makes a file stand at `target` too: a link, or a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy_pictures:
        shutil.copy2(file, target)
    else:
        os.symlink(file.resolve(), target)


def write_changes(out: Path, changes: list[Change]) -> list[Change]:
    """Writes changes.json; returns the changes."""
    text = json.dumps([asdict(change) for change in changes], indent=1)
    (out / "changes.json").write_text(text + "\n", encoding="utf-8")
    return changes


def first_of(kinds: set[str], wanted: set[str]) -> str | None:
    """The first of the wanted kinds that is there, in the order of `KINDS`."""
    return next((kind for kind in KINDS if kind in kinds and kind in wanted), None)
