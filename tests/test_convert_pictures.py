import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.convert_pictures import paired_pictures, pictures_by_stem, require_size
from swin_dense.errors import DataError, ImageError


def write(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(np.zeros((3, 5), np.uint8)).save(folder / name)
    return folder


def test_pairs_are_sorted_and_follow_the_suffix(tmp_path):
    images = write(tmp_path / "images", "b.jpg", "a.png")
    labels = write(tmp_path / "labels", "a_mask.png", "b_mask.tif")
    findings = Findings()
    pairs = paired_pictures(images, labels, findings, "_mask")
    assert pairs == [(images / "a.png", labels / "a_mask.png"), (images / "b.jpg", labels / "b_mask.tif")]
    assert not findings.faults


def test_every_picture_without_partner_is_named(tmp_path):
    images = write(tmp_path / "images", "a.png", "b.png", "c.png")
    labels = write(tmp_path / "labels", "c.png", "d.png", "e.png")
    findings = Findings()
    assert paired_pictures(images, labels, findings) == [(images / "c.png", labels / "c.png")]
    assert [fault.split(":")[0].rsplit("/", 1)[1] for fault in findings.faults] == ["a.png", "b.png", "d.png", "e.png"]
    assert "there is no label picture a.png in" in findings.faults[0] and "no image d in" in findings.faults[2]


def test_lossy_labels_other_names_and_twins_are_faults(tmp_path):
    images = write(tmp_path / "images", "a.png", "a.jpg", "b.png")
    labels = write(tmp_path / "labels", "a_m.jpg", "b.png")
    findings = Findings()
    assert paired_pictures(images, labels, findings, "_m") == []
    text = "\n".join(findings.faults)
    assert "a.png: a.jpg has the same name" in text
    assert "a_m.jpg: a label picture must be lossless" in text
    assert "b.png: the name does not end with '_m'" in text


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="none: wanted the folder of the images; there is none"):
        pictures_by_stem(tmp_path / "none", "images", Findings())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"wanted images .* found none\. Got: notes\.txt"):
        pictures_by_stem(tmp_path, "images", Findings())


def test_size_fits_as_stored_or_as_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    require_size(tmp_path / "turned.jpg", (5, 3))
    require_size(tmp_path / "turned.jpg", (3, 5))
    with pytest.raises(ImageError, match="4 x 4, the picture is 3 x 5, 5 x 3 when turned by its EXIF orientation"):
        require_size(tmp_path / "turned.jpg", (4, 4))
    with pytest.raises(ImageError, match=r"gone\.png: there is no such file"):
        require_size(tmp_path / "gone.png", (4, 4))
