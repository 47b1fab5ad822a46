"""The pictures of a source: which file belongs to which, and whether the sizes agree."""

from __future__ import annotations

from pathlib import Path

from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.folders import describe_folder, files_ending_in
from swin_dense.datasets.images import IMAGE_SUFFIXES, image_size_hw, read_image
from swin_dense.errors import DataError

LOSSLESS_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")


def pictures_by_stem(folder: Path, what: str, findings: Findings) -> dict[str, Path]:
    """Returns the pictures directly in a folder by their names without ending, sorted.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: wanted the folder of the {what}; there is none.")
    pictures: dict[str, Path] = {}
    for path in files_ending_in(folder, IMAGE_SUFFIXES):
        if path.stem in pictures:
            findings.faults.append(f"{path}: {pictures[path.stem].name} has the same name. Remove or rename one.")
        pictures.setdefault(path.stem, path)
    if not pictures:
        wanted = ", ".join(IMAGE_SUFFIXES)
        raise DataError(f"{folder}: wanted {what} ({wanted}), found none. Got: {describe_folder(folder)}.")
    return pictures


def paired_pictures(
    image_folder: Path, label_folder: Path, findings: Findings, label_suffix: str = ""
) -> list[tuple[Path, Path]]:
    """Returns (image, label picture) of the same name, sorted; those without a partner become faults.

    Args:
        image_folder: folder of images.
        label_folder: folder of label pictures, which must be of a lossless format.
        findings: takes the faults.
        label_suffix: what a label picture's name has after the image's, such as "_mask".

    Raises:
        DataError: a folder is missing, or has no picture in it.
    """
    images = pictures_by_stem(image_folder, "images", findings)
    labels = {}
    for stem, path in pictures_by_stem(label_folder, "label pictures", findings).items():
        if not stem.endswith(label_suffix):
            findings.faults.append(f"{path}: the name does not end with {label_suffix!r}. Rename or remove the file.")
        elif path.suffix.lower() not in LOSSLESS_SUFFIXES:
            findings.faults.append(
                f"{path}: a label picture must be lossless ({', '.join(LOSSLESS_SUFFIXES)}); {path.suffix} changes the "
                f"values. Take the original pictures."
            )
        else:
            labels[stem.removesuffix(label_suffix)] = path
    for stem in sorted(set(images) - set(labels)):
        findings.faults.append(f"{images[stem]}: there is no label picture {stem}{label_suffix}.png in {label_folder}.")
    for stem in sorted(set(labels) - set(images)):
        findings.faults.append(f"{labels[stem]}: there is no image {stem} in {image_folder}.")
    return [(images[stem], labels[stem]) for stem in sorted(set(images) & set(labels))]


def require_size(path: Path, size_hw: tuple[int, int]) -> None:
    """Checks that a picture has a size, as stored or turned by its EXIF orientation, from its header alone if it can.

    Raises:
        ImageError: it cannot be read, or has another size.
    """
    if image_size_hw(path) != size_hw:
        # Only the full reader knows both frames; this is the rare case, and most often its message.
        read_image(path, size_hw)
