import re
import shutil

import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.check_findings import KINDS
from swin_dense.datasets.check_fix_semantic import fix_semantic
from swin_dense.datasets.check_semantic import check_semantic, count_values, find_semantic_folders, whole_label_values
from swin_dense.datasets.folders import find_semantic_split
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic import SemanticDataset
from swin_dense.errors import DataError

SIZES_HW = {"train": ((41, 67), (59, 37), (47, 53)), "val": ((31, 61), (37, 43))}
LABELS = LabelMap(("sky", "road", "tree"), (1, 2, 3), (0,))


class Tree:
    """A clean data set on disk: values 0 to 3 and 255."""

    def __init__(self, root):
        self.root = root
        for split, sizes_hw in SIZES_HW.items():
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True)
            for number, size_hw in enumerate(sizes_hw):
                random = np.random.default_rng([number, *size_hw])
                image = random.integers(0, 256, (*size_hw, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / "images" / split / f"{number}.png")
                values = random.choice(np.array([0, 1, 2, 3, 255], np.uint8), size_hw)
                Image.fromarray(values).save(self.label(number, split))

    def image(self, number=0, split="train"):
        return self.root / "images" / split / f"{number}.png"

    def label(self, number=0, split="train"):
        return self.root / "annotations" / split / f"{number}.png"

    def check(self, label_map=LABELS, **how):
        return check_semantic(find_semantic_folders(self.root), label_map, **how)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "data")


def in_label(change):
    """The first label picture becomes what `change` makes of its values; a picture, or an array of pixels."""

    def plant(tree):
        changed = change(np.array(Image.open(tree.label())))
        if not isinstance(changed, Image.Image):
            changed = Image.fromarray(changed)
        changed.save(tree.label(), "TIFF" if changed.mode == "F" else "PNG")

    return plant


def with_value(value, dtype=np.uint8):
    def change(values):
        values = values.astype(dtype)
        values[3, 5:7] = value
        return values

    return in_label(change)


def palette_colours(values):
    return np.array([[0, 0, 0], [128, 64, 128], [70, 70, 70], [0, 0, 142]], np.uint8)[np.where(values > 3, 0, values)]


def turned_image(tree):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(tree.image()).transpose(Image.Transpose.ROTATE_90).save(tree.image(), exif=exif)


def lossy_label(tree):
    Image.open(tree.label()).save(tree.label().with_suffix(".jpg"))
    tree.label().unlink()


def without_class(tree):
    for number in range(3):
        values = np.array(Image.open(tree.label(number)))
        Image.fromarray(np.where(values == 3, 1, values)).save(tree.label(number))


FAULTS = {
    "image without label picture": (lambda t: t.label().unlink(), "partner-missing", "no label picture named '0' in"),
    "label picture without image": (lambda t: t.image().unlink(), "partner-missing", "no image named '0' in"),
    "label picture of another name": (
        lambda t: t.label().rename(t.label().with_stem("0_mask")),
        "partner-missing",
        "no label picture named '0' in .*; there is for example 0_mask.png",
    ),
    "name twice": (
        lambda t: shutil.copy(t.image(), t.image().with_suffix(".bmp")),
        "name-repeated",
        "0.bmp has the same",
    ),
    "label picture in JPEG": (lossy_label, "label-lossy", r"\.jpg is no format for labels"),
    "label picture in colours": (in_label(palette_colours), "label-colours", "RGB with 4 colours, such as .0, 0, 0."),
    "grey saved as colours": (
        in_label(lambda values: np.repeat(values[..., None], 3, axis=2)),
        "label-colours",
        "red, green and blue are equal",
    ),
    "label picture with alpha": (
        in_label(lambda values: Image.fromarray(values).convert("LA")),
        "label-mode",
        "mode LA",
    ),
    "label picture of floats": (
        in_label(lambda values: Image.fromarray(values.astype(np.float32))),
        "label-mode",
        "mode F",
    ),
    "unknown value": (with_value(9), "label-values", r"3 classes, values 1 to 3: 9 \(2 px\)"),
    "unknown value of 16 bit": (with_value(300, np.uint16), "label-values", r"300 \(2 px\)"),
    "label picture of another size": (
        in_label(lambda values: values[:, :-1]),
        "label-size",
        "height x width 41 x 66, the image is 41 x 67",
    ),
    "nothing labelled": (
        in_label(lambda values: np.where(values > 0, 0, 255).astype(np.uint8)),
        "label-ignored",
        "no pixel",
    ),
    "class without pixels": (without_class, "class-unused", "no pixel of: tree"),
    "label picture cut short": (
        lambda t: t.label().write_bytes(t.label().read_bytes()[:400]),
        "picture-damaged",
        "cut short",
    ),
    "label picture of no bytes": (lambda t: t.label().write_bytes(b""), "picture-empty", "0 bytes"),
    "label picture of text": (lambda t: t.label().write_text("<html>"), "picture-foreign", "web page"),
    "image cut short": (lambda t: t.image().write_bytes(t.image().read_bytes()[:999]), "picture-damaged", "cut short"),
    "image turned": (turned_image, "picture-turned", "orientation 8: .* when turned"),
    "image of 16 bit": (
        lambda t: Image.fromarray(np.full((41, 67), 1000, np.uint16)).save(t.image()),
        "picture-converted",
        "colour mode I;16",
    ),
    "image in two splits": (
        lambda t: [shutil.copy(getattr(t, what)(0, "val"), getattr(t, what)(0)) for what in ("image", "label")],
        "picture-in-two-splits",
        "same as '0.png' of val",
    ),
    "image twice": (
        lambda t: [shutil.copy(getattr(t, what)(0), getattr(t, what)(7)) for what in ("image", "label")],
        "picture-repeated",
        "same as '0.png' of train",
    ),
}


def fingerprints(root):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in root.rglob("*")}


def load_all(root):
    for split in ("train", "val"):
        dataset = SemanticDataset(*find_semantic_split(root, split), LABELS)
        assert len(dataset) and all(dataset[index].label.max() <= 255 for index in range(len(dataset)))


def test_clean_data_gives_no_finding(tree):
    report = tree.check().report
    assert report.findings == [] and report.remarks == []
    load_all(tree.root)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("copy_pictures", [False, True])
def test_fault_is_found_with_its_reason_and_is_gone_from_the_cleaned_copy(name, copy_pictures, tree, tmp_path):
    plant, kind, reason = FAULTS[name]
    plant(tree)
    before = fingerprints(tree.root)
    check = tree.check()
    counts = check.report.counts()
    assert kind in counts and {found for found in counts if KINDS[found].severity == "error"} <= {kind}
    assert re.search(reason, check.report.first(kind).reason), check.report.first(kind).reason
    changes = fix_semantic(check, tmp_path / "out", copy_pictures=copy_pictures)
    assert fingerprints(tree.root) == before
    if copy_pictures:
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
        shutil.rmtree(tree.root)
    again = check_semantic(find_semantic_folders(tmp_path / "out"), LABELS).report
    assert again.num_errors == 0
    if KINDS[kind].cleaned != "as it is":
        assert kind not in again.counts() and {change.kind for change in changes} == {kind}
    load_all(tmp_path / "out")


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_loader_refuses_is_an_error_here(name, tree):
    FAULTS[name][0](tree)
    try:
        load_all(tree.root)
    except DataError:
        assert tree.check().report.num_errors


def test_every_kind_of_label_pictures_is_planted():
    of_labels = {kind for kind in KINDS if kind.startswith(("label-", "class-", "partner-", "name-"))}
    assert of_labels <= {kind for _, kind, _ in FAULTS.values()}


@pytest.mark.parametrize("name", ["grey saved as colours", "label picture with alpha", "label picture of floats"])
def test_repaired_label_pictures_keep_their_values(name, tree, tmp_path):
    expected = np.array(Image.open(tree.label()))
    FAULTS[name][0](tree)
    assert (whole_label_values(str(tree.label())) == expected).all()
    fix_semantic(tree.check(), tmp_path / "out")
    assert (np.array(Image.open(tmp_path / "out" / "annotations" / "train" / "0.png")) == expected).all()


def test_only_unknown_values_change(tree, tmp_path):
    FAULTS["unknown value"][0](tree)
    before = np.array(Image.open(tree.label()))
    fix_semantic(tree.check(), tmp_path / "out")
    after = np.array(Image.open(tmp_path / "out" / "annotations" / "train" / "0.png"))
    assert (after == np.where(before == 9, 255, before)).all()


@pytest.mark.parametrize(
    ("values", "remark"),
    [
        ([0, 1, 2, 255], "the values 0 to 2, 255; what fits, if they are classes: --classes 3."),
        ([1, 2, 4], "the values 1 to 2, 4; what fits, if they are classes: --classes 4 --first-value 1."),
        ([0, 17, 140], "--classes 141, or --classes ade20k, where 0 is ignored"),
        ([0, 300, 65535], "hold 3 values .0, 300, 65535.: numbers of objects rather than classes"),
        ([255], "no label picture has a value but 255"),
    ],
)
def test_without_classes_values_are_listed_with_what_fits(values, remark, tmp_path):
    for kind in ("images", "annotations"):
        (tmp_path / kind).mkdir()
    label = np.resize(np.array(values, np.uint16), (7, 11))
    Image.fromarray(label).save(tmp_path / "annotations" / "a.png")
    Image.new("RGB", (11, 7)).save(tmp_path / "images" / "a.png")
    folders = find_semantic_folders(tmp_path)
    assert [split for split, *_ in folders] == ["all"]
    report = check_semantic(folders).report
    assert report.num_errors == 0 and re.search(remark, report.remarks[0])
    assert report.statistics["all"]["values"] == {str(value): int((label == value).sum()) for value in values}


def test_statistics_count_pixels(tree):
    statistics = tree.check().report.statistics["train"]
    labels = np.concatenate([np.array(Image.open(tree.label(number))).ravel() for number in range(3)])
    assert statistics["classes"] == {name: int((labels == i).sum()) for i, name in enumerate(LABELS.names, start=1)}
    assert statistics["unlabelled_share"] == pytest.approx(np.isin(labels, (0, 255)).mean())


def test_counts_are_those_of_unique():
    random = np.random.default_rng(0)
    for low, high in ((0, 300), (-5, 5), (0, 2**30)):
        values = random.integers(low, high, (17, 19)).astype(np.int32)
        unique, counts = np.unique(values, return_counts=True)
        assert count_values(values) == dict(zip(unique.tolist(), counts.tolist(), strict=True))


def test_folders_without_pairs_are_one_message(tmp_path):
    with pytest.raises(DataError, match="split 'train' not found"):
        find_semantic_folders(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"wanted pictures .* an empty folder"):
        check_semantic([("all", tmp_path / "images", tmp_path / "images")])
    (tmp_path / "images" / "a.png").touch()
    with pytest.raises(DataError, match="wanted a folder of pictures; there is none"):
        check_semantic([("all", tmp_path / "images", tmp_path / "none")])
