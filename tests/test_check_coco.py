import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from swin_dense.datasets.check_coco import check_coco, find_coco_files, read_any_coco_json
from swin_dense.datasets.check_findings import KINDS
from swin_dense.datasets.check_fix_coco import fix_coco
from swin_dense.datasets.coco import CocoDataset, find_coco_split
from swin_dense.datasets.labels import require_same_labels
from swin_dense.errors import AnnotationError, DataError, SwinDenseError

SIZES_HW = {"train": ((41, 67), (59, 37), (47, 53)), "val": ((31, 61), (37, 43))}
CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 1, "name": "dog"}, {"id": 5, "name": "cat"}]


class Tree:
    """A clean data set on disk; `write` saves what a test has planted."""

    def __init__(self, root):
        self.root = root
        self.splits = {}
        for split, sizes_hw in SIZES_HW.items():
            (root / split).mkdir(parents=True)
            images = []
            for number, (height, width) in enumerate(sizes_hw):
                image_id = 10 * number + len(split)
                noise = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / split / f"{number}.png")
                images.append({"id": image_id, "file_name": f"{number}.png", "height": height, "width": width})
            self.splits[split] = {"images": images, "annotations": annotations(images), "categories": CATEGORIES}
        self.splits = json.loads(json.dumps(self.splits))
        self.write()

    def write(self):
        (self.root / "annotations").mkdir(exist_ok=True)
        for split, content in self.splits.items():
            self.file(split).write_text(json.dumps(content))

    def file(self, split):
        return self.root / "annotations" / f"instances_{split}.json"

    def check(self, **how):
        return check_coco(find_coco_files(self.root), **how)

    @property
    def train(self):
        return self.splits["train"]

    @property
    def first(self):
        return self.train["annotations"][0]


def annotations(images):
    """Two rectangles in each image, and in the last a crowd of run lengths on its left edge."""
    found = []
    for number, image in enumerate(images):
        for part, (x, y, w, h) in enumerate([(3, 4, 11, 13), (17, 8, 7, 19)]):
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            category = CATEGORIES[(2 * number + part) % 3]["id"]
            entry = {"id": len(found) + 1, "image_id": image["id"], "category_id": category, "bbox": [x, y, w, h]}
            found.append({**entry, "area": w * h, "iscrowd": 0, "segmentation": [polygon]})
    height, width = image["height"], image["width"]
    runs = {"size": [height, width], "counts": [0, 2 * height, (width - 2) * height]}
    entry = {"id": 99, "image_id": image["id"], "category_id": 1, "bbox": [0, 0, 2, height], "area": 2 * height}
    return [*found, {**entry, "iscrowd": 1, "segmentation": runs}]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "data")


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory):
    """For many tries: what is planted must be taken back."""
    return Tree(tmp_path_factory.mktemp("shared") / "data")


def set_first(**fields):
    def plant(tree):
        tree.first.update(fields)

    return plant


def set_image(**fields):
    def plant(tree):
        tree.train["images"][0].update(fields)

    return plant


def drop(section, field):
    def plant(tree):
        del tree.train[section][0][field]

    return plant


def repeat(section, **fields):
    def plant(tree):
        tree.train[section].append({**tree.train[section][0], **fields})

    return plant


def replace(section, value, position=0):
    def plant(tree):
        tree.train[section][position] = value

    return plant


def file_of(make):
    def plant(tree):
        make(tree.root / "train" / "0.png")

    return plant


def picture(mode="RGB", size_wh=(67, 41), **options):
    return lambda path: Image.new(mode, size_wh).save(path, "PNG", **options)


def turned(size_wh):
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(size_wh=size_wh, exif=exif)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3000])


def animated(path):
    frames = [Image.new("RGB", (67, 41), colour) for colour in ("red", "blue")]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def bomb(path):
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def as_xyxy(tree):
    for annotation in tree.train["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]


def as_shares(tree):
    size_of = {image["id"]: (image["width"], image["height"]) for image in tree.train["images"]}
    for annotation in tree.train["annotations"]:
        sides = size_of[annotation["image_id"]] * 2
        annotation["bbox"] = [value / side for value, side in zip(annotation["bbox"], sides, strict=True)]


def as_shares_throughout(tree):
    as_shares(tree)
    for annotation in tree.train["annotations"][:2]:
        polygon = annotation["segmentation"][0]
        annotation["segmentation"] = [[value / side for value, side in zip(polygon, (67, 41) * 4, strict=True)]]


def into_subfolder(tree):
    (tree.root / "train" / "deeper").mkdir()
    (tree.root / "train" / "0.png").rename(tree.root / "train" / "deeper" / "0.png")


def copy_within(tree):
    shutil.copy(tree.root / "train" / "0.png", tree.root / "train" / "copy.png")
    tree.train["images"].append({**tree.train["images"][0], "id": 77, "file_name": "copy.png"})
    tree.train["annotations"].append({**tree.first, "id": 77, "image_id": 77})


def copy_across(tree):
    # As another format: the pixels count, not the bytes.
    Image.open(tree.root / "val" / "0.png").save(tree.root / "train" / "leak.bmp")
    tree.train["images"].append({**tree.splits["val"]["images"][0], "id": 77, "file_name": "leak.bmp"})
    tree.train["annotations"].append({**tree.first, "id": 77, "image_id": 77})


def link_out(tree):
    outside = tree.root.parent / "elsewhere.png"
    shutil.move(tree.root / "train" / "0.png", outside)
    (tree.root / "train" / "0.png").symlink_to(outside)


def far(x, y):
    return [[x, y, x + 11.0, y, x + 11.0, y + 13.0, x, y + 13.0]]


BOWTIE = [[3.0, 4.0, 14.0, 17.0, 14.0, 4.0, 3.0, 17.0]]
FAULTS = {
    # name: (what is planted, kind of finding, its reason)
    "category without id": (repeat("categories", id=None), "category-invalid", "got None"),
    "category of text": (lambda t: t.train["categories"].append("dog"), "category-invalid", "got 'dog'"),
    "category without name": (
        lambda t: [t.splits[split]["categories"][0].update(name=" ") for split in t.splits],
        "category-unnamed",
        "id 7 has the name ' '",
    ),
    "category id twice": (repeat("categories", name="x"), "category-repeated-id", "id 7 .'x'. stands for another"),
    "category name twice": (
        lambda t: [t.splits[split]["categories"][0].update(name="dog") for split in t.splits],
        "category-repeated-name",
        "'dog' is the name of",
    ),
    "category id zero": (
        lambda t: [
            entry.update(
                {key: 0 for key in ("id", "category_id") if entry.get(key) == 7 and (key != "id" or "name" in entry)}
            )
            for content in t.splits.values()
            for entry in (*content["categories"], *content["annotations"])
        ],
        "category-id-zero",
        "'cup' has the id 0",
    ),
    "category unused": (
        lambda t: [t.splits[split]["categories"].append({"id": 9, "name": "emu"}) for split in t.splits],
        "category-unused",
        "never used: emu",
    ),
    "category in one split": (repeat("categories", id=9, name="emu"), "categories-differ", "id 9: 'emu' / none"),
    "categories swapped": (
        lambda t: [entry.update(name=name) for entry, name in zip(t.train["categories"], ("dog", "cup"), strict=False)],
        "categories-differ",
        "id 1: 'cup' / 'dog', id 7: 'dog' / 'cup'",
    ),
    "image of text": (lambda t: t.train["images"].append("0.png"), "image-invalid", "got '0.png'"),
    "image id of text": (set_image(id="5"), "id-not-whole", "id must be a whole number, got '5'; taken as 5"),
    "image id of letters": (set_image(id="a"), "image-invalid", "id must be a whole number, got 'a'"),
    "image without name": (drop("images", "file_name"), "image-invalid", "file_name is None"),
    "image id twice": (repeat("images", file_name="1.png"), "image-repeated-id", "that of '0.png' already"),
    "path upwards": (set_image(file_name="../val/0.png"), "image-outside-folder", "'../val/0.png'"),
    "path from the root": (set_image(file_name="/etc/a.png"), "image-outside-folder", "'/etc/a.png'"),
    "path of Windows": (set_image(file_name="C:\\a.png"), "image-outside-folder", r"a\.png"),
    "width zero": (set_image(width=0), "image-size-invalid", "width is 0, height is 41"),
    "height of text": (set_image(height="41"), "image-size-invalid", "height is '41'"),
    "side beyond all": (set_image(height=10**9, width=10**9), "image-size-invalid", "width is 1000000000"),
    "size missing": (drop("images", "width"), "image-size-missing", "width or height is missing"),
    "size swapped": (
        set_image(height=67, width=41),
        "image-size-differs",
        "67 x 41 is stated.* 41 x 67, with .* swapped",
    ),
    "image without objects": (
        lambda t: t.train["annotations"].__delitem__(slice(0, 2)) or t.train["annotations"][0].update(category_id=7),
        "image-without-objects",
        "1 of 3 images",
    ),
    "picture not listed": (
        lambda t: shutil.copy(t.root / "val" / "0.png", t.root / "train" / "new.png"),
        "image-not-listed",
        "not used: new.png",
    ),
    "picture missing": (file_of(Path.unlink), "picture-missing", "there is no such file"),
    "picture of another ending": (
        file_of(lambda path: path.rename(path.with_suffix(".PNG"))),
        "picture-misnamed",
        r"file_name is '0.png'; taken as '0.PNG', which is there",
    ),
    "picture in a subfolder": (into_subfolder, "picture-misnamed", "taken as 'deeper/0.png'"),
    "folder of Windows in the name": (
        lambda t: (into_subfolder(t), set_image(file_name="deeper\\0.png")(t)),
        "picture-misnamed",
        "taken as 'deeper/0.png'",
    ),
    "path of another machine": (
        set_image(file_name="/home/me/train/0.png"),
        "image-outside-folder",
        "'/home/me/train/0.png'; taken as '0.png'",
    ),
    "picture of no bytes": (file_of(lambda path: path.write_bytes(b"")), "picture-empty", r"empty \(0 bytes\)"),
    "picture cut short": (file_of(cut_short), "picture-damaged", "damaged or cut short"),
    "web page": (file_of(lambda path: path.write_text("<html>")), "picture-foreign", "web page"),
    "folder for picture": (file_of(lambda p: (p.unlink(), p.mkdir())), "picture-foreign", "got a folder"),
    "bomb": (file_of(bomb), "picture-too-large", "more than 89 megapixels"),
    "animation": (file_of(animated), "picture-animated", "2 frames"),
    "picture turned": (file_of(turned((41, 67))), "picture-turned", "orientation 6: .* when turned"),
    "picture turned after annotation": (file_of(turned((67, 41))), "picture-turned", "orientation 6: .* as stored"),
    "grey picture": (file_of(picture("L")), "picture-converted", "colour mode L"),
    "picture linked from elsewhere": (link_out, "picture-linked-out", "elsewhere.png"),
    "picture twice": (copy_within, "picture-repeated", "same as '0.png' of train"),
    "picture in two splits": (copy_across, "picture-in-two-splits", "same as '0.png' of val"),
    "annotation null": (replace("annotations", None), "annotation-invalid", "got None"),
    "annotation id of text": (set_first(id="a"), "annotation-id-invalid", "got 'a'"),
    "annotation id twice": (set_first(id=2), "annotation-id-repeated", "id 2 stands for another"),
    "annotation id zero": (set_first(id=0), "annotation-id-zero", "id is 0"),
    "unknown image": (set_first(image_id=404), "annotation-image-unknown", "image_id 404 is not"),
    "image id as float": (set_first(image_id=5.0), "id-not-whole", r"image_id must be .* got 5\.0; taken as 5"),
    "category id as text": (set_first(category_id="7"), "id-not-whole", "category_id must be .* got '7'; taken as 7"),
    "unknown category": (set_first(category_id=3), "annotation-category-unknown", r"3 is not among .*\[7, 1, 5\]"),
    "object twice": (repeat("annotations", id=50), "annotation-repeated", r"those of annotations\[0\]"),
    "crowd of 2": (set_first(iscrowd=2), "crowd-invalid", "got 2"),
    "ignore of text": (set_first(ignore="1"), "ignore-invalid", "ignore must be 0 or 1, got '1'"),
    "ignored region without outline or box": (
        set_first(ignore=1, segmentation=[], bbox=[3, 4, 11]),
        "box-invalid",
        "four numbers",
    ),
    "crowd missing": (drop("annotations", "iscrowd"), "crowd-missing", "iscrowd is missing"),
    "area of text": (set_first(area="143"), "area-invalid", "got '143'"),
    "area negative": (set_first(area=-1), "area-invalid", "got -1"),
    "area beyond floats": (set_first(area=10**400), "area-invalid", "area must be"),
    "area missing": (drop("annotations", "area"), "area-missing", "area is missing"),
    "area far off": (set_first(area=14300), "area-differs", "area 14300, the segmentation has 1.. px"),
    "box null": (set_first(bbox=None), "box-missing", "bbox is missing or null"),
    "box not a number": (set_first(bbox=[3, 4, float("nan"), 13]), "box-invalid", "not finite"),
    "box of text": (set_first(bbox=["3", "4", "11", "13"]), "box-invalid", "numbers only"),
    "box of three": (set_first(bbox=[3, 4, 11]), "box-invalid", "four numbers"),
    "box negative": (set_first(bbox=[3, 4, -11, 13]), "box-invalid", "must not be negative"),
    "boxes as corners": (as_xyxy, "box-xyxy", r"bbox \[3, 4, 14, 17\], its segmentation's is \[3, 4, 11, 13\]"),
    "box outside": (set_first(bbox=[80, 4, 11, 13]), "box-outside", "in an image of width 67 and height 41"),
    "box beyond floats": (set_first(bbox=[1e308, 4, 1e308, 13]), "box-outside", "1e"),
    "box over the edge": (
        set_first(bbox=[-2.5, 4, 11, 13], segmentation=far(-2.5, 4.0)),
        "box-partly-outside",
        r"bbox \[-2.5, 4, 11, 13\]",
    ),
    "box beyond precision": (set_first(bbox=[2**63, 4, 11, 13]), "box-outside", "9.22337e"),
    "boxes as shares": (as_shares, "box-normalised", r"bbox \[0.0447761, 0.097561, 0.164179, 0.317073\]"),
    "boxes and polygons as shares": (as_shares_throughout, "box-normalised", "bbox .0.0447761, 0.097561"),
    "box of no width": (set_first(bbox=[3, 4, 0, 13]), "box-degenerate", r"\[3, 4, 0, 13\]"),
    "object of no width": (
        set_first(bbox=[3, 4, 0.5, 13], area=6.5, segmentation=[[3, 4, 3.5, 4, 3.5, 17, 3, 17]]),
        "box-thin",
        r"\[3, 4, 0.5, 13\]",
    ),
    "box elsewhere": (set_first(bbox=[20, 20, 11, 13]), "box-off-mask", r"segmentation's is \[3, 4, 11, 13\]"),
    "box loose": (set_first(bbox=[0, 4, 14, 13]), "box-loose", r"bbox \[0, 4, 14, 13\]"),
    "segmentation null": (set_first(segmentation=None), "segmentation-missing", "is None"),
    "segmentation empty": (set_first(segmentation=[]), "segmentation-missing", r"is \[\]"),
    "polygon of two points": (set_first(segmentation=[[3, 4, 14, 17]]), "polygon-short", "polygon 0: .* got 4"),
    "polygon of seven numbers": (
        lambda t: t.first["segmentation"].append([1, 2, 3, 4, 5, 6, 7]),
        "polygon-short",
        "polygon 1: .* got 7",
    ),
    "polygon infinite": (set_first(segmentation=far(float("inf"), 4.0)), "polygon-invalid", "not finite"),
    "polygon far away": (set_first(segmentation=far(1e9, 4.0)), "polygon-invalid", "far outside"),
    "polygon of text": (set_first(segmentation=[["a"] * 6]), "polygon-invalid", "something else than numbers"),
    "polygon null": (set_first(segmentation=[None]), "polygon-invalid", "got None"),
    "polygon without list": (
        lambda t: t.first.update(segmentation=t.first["segmentation"][0]),
        "polygon-unnested",
        "8 numbers",
    ),
    "polygon over the edge": (
        set_first(segmentation=far(-5.0, 4.0), bbox=[0, 4, 6, 13], area=78),
        "polygon-outside",
        r"span \[-5, 4, 6, 17\]",
    ),
    "polygon crossing itself": (
        set_first(segmentation=BOWTIE, area=72),
        "polygon-crossing",
        "edges of a polygon cross",
    ),
    "run lengths of another size": (
        set_first(segmentation={"size": [67, 41], "counts": [0, 41 * 67]}),
        "rle-size",
        r"must be the image's \[height, width\] \[41, 67\], got \[67, 41\]",
    ),
    "run lengths short": (set_first(segmentation={"size": [41, 67], "counts": [3, 4]}), "rle-invalid", "got 7"),
    "run lengths garbage": (
        set_first(segmentation={"size": [41, 67], "counts": "hello~"}),
        "rle-invalid",
        "characters",
    ),
    "run lengths nothing": (set_first(segmentation={}), "rle-invalid", "needs the keys size and counts"),
    "mask empty": (
        set_first(segmentation={"size": [41, 67], "counts": [41 * 67]}),
        "mask-empty",
        "no pixel",
    ),
}
CONSEQUENCES = {
    "image-invalid": ["annotation-image-unknown"],
    "box-invalid": ["segmentation-missing"],
    "box-normalised": ["mask-empty"],
}


def fingerprints(root):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in root.rglob("*")}


def load_all(root):
    datasets = [CocoDataset(*find_coco_split(root, split)) for split in ("train", "val")]
    require_same_labels(datasets[0].label_map, datasets[1].label_map, "val")
    for dataset in datasets:
        assert len(dataset) and all(len(dataset[index].target["boxes"]) >= 0 for index in range(len(dataset)))


def test_clean_data_gives_no_finding(tree):
    report = tree.check().report
    assert report.findings == [] and report.num_errors == report.num_notes == 0
    load_all(tree.root)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_with_its_reason_and_is_gone_from_the_cleaned_copy(name, tree, tmp_path):
    plant, kind, reason = FAULTS[name]
    plant(tree)
    tree.write()
    before = fingerprints(tree.root)
    check = tree.check()
    counts = check.report.counts()
    assert kind in counts
    assert {found for found in counts if KINDS[found].severity == "error"} <= {kind, *CONSEQUENCES.get(kind, ())}
    assert re.search(reason, check.report.first(kind).reason), check.report.first(kind).reason
    changes = fix_coco(check, tmp_path / "out", tree.root)
    assert fingerprints(tree.root) == before
    again = check_coco(find_coco_files(tmp_path / "out")).report
    assert again.num_errors == 0
    if KINDS[kind].cleaned != "as it is":
        assert (
            kind not in again.counts()
            and changes
            and {change.kind for change in changes} <= {kind, *CONSEQUENCES.get(kind, ())}
        )
    load_all(tmp_path / "out")


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_loader_refuses_is_an_error_here(name, tree):
    FAULTS[name][0](tree)
    tree.write()
    try:
        with np.errstate(over="ignore"):
            load_all(tree.root)
    except SwinDenseError:
        assert tree.check().report.num_errors


def test_every_kind_of_coco_data_is_planted():
    of_labels = {kind for kind in KINDS if kind.startswith(("label-", "class-", "partner-", "name-"))}
    elsewhere = {"file-unreadable", "json-repeated-key", "polygon-unexamined"}
    assert {kind for _, kind, _ in FAULTS.values()} == set(KINDS) - of_labels - elsewhere


def test_finding_names_file_ids_and_position(tree):
    tree.train["annotations"][3].update(bbox=[1, 2, 3])
    tree.write()
    (finding,) = tree.check().report.findings
    assert (finding.file, finding.split) == (str(tree.file("train")), "train")
    assert (finding.annotation_id, finding.image_id, finding.entry) == (4, 15, ("annotations", 3))


def test_all_faults_of_one_annotation_are_listed(tree):
    tree.train["annotations"][0] = {"bbox": "x", "iscrowd": {}, "area": [], "segmentation": [[1], None]}
    tree.train["annotations"][0]["image_id"] = 5
    tree.write()
    found = {finding.kind for finding in tree.check().report.findings if finding.is_error}
    wanted = {"annotation-id-invalid", "annotation-category-unknown", "crowd-invalid", "area-invalid", "box-invalid"}
    assert found == wanted | {"polygon-short", "polygon-invalid"}


def test_repeated_key_is_found_and_the_rest_is_checked(tree):
    text = tree.file("train").read_text().replace('"iscrowd": 1', '"iscrowd": 0, "iscrowd": 1')
    tree.file("train").write_text(text.replace('"area": 143', '"area": -143'))
    counts = tree.check().report.counts()
    assert counts["json-repeated-key"] == 1 and counts["area-invalid"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"[1]", "got a list"),
        (b"null", "got NoneType"),
        (b"{", "cut short"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"images": [], "annotations": [1], "categories": [1]}', "at least one entry"),
        (b'{"images": ' + b"1" * 5000 + b"}", "cannot be read"),
    ],
    ids=range(8),
)
def test_file_that_is_no_annotation_file_is_one_message(content, message, tree):
    tree.file("val").write_bytes(content)
    with pytest.raises(AnnotationError, match=f"instances_val.json: .*{message}"):
        read_any_coco_json(tree.file("val"))
    report = tree.check().report
    assert message in report.first("file-unreadable").reason and list(report.statistics) == ["train"]
    with pytest.raises(AnnotationError, match=message):
        check_coco([("all", tree.file("val"), tree.root / "val")])


def test_missing_image_folder_is_one_message(tree):
    shutil.rmtree(tree.root / "val")
    with pytest.raises(DataError, match="image folder of split 'val' not found"):
        find_coco_files(tree.root)
    with pytest.raises(DataError, match="wanted the folder of the images"):
        check_coco([("all", tree.file("val"), tree.root / "val")])


def test_folder_without_annotation_files_is_no_coco_folder(tmp_path):
    assert find_coco_files(tmp_path) == []


def test_headers_alone_find_missing_but_not_damaged_pictures(tree):
    cut_short(tree.root / "train" / "0.png")
    (tree.root / "train" / "1.png").unlink()
    assert set(tree.check(decode=False).report.counts()) == {"picture-missing"}


def test_statistics_count_classes_sizes_and_crowds(tree):
    tree.train["annotations"][0]["area"] = 32**2
    tree.train["annotations"][1]["area"] = 96**2
    tree.write()
    statistics = tree.check().report.statistics["train"]
    assert statistics["sizes"] == {"small": 4, "medium": 1, "large": 1}
    assert statistics["classes"] == {"cup": 2, "dog": 3, "cat": 2}
    assert statistics["crowd"] == {"annotations": 1, "share_of_annotations": 1 / 7, "share_of_images": 1 / 3}
    assert statistics["image_sides_px"]["min"] == [41, 37] and statistics["image_sides_px"]["max"] == [59, 67]
    assert statistics["annotations_per_image"] == {"mean": 7 / 3, "max": 3}


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 100)
    | st.sampled_from([2**63, -(2**70), 10**400, 1e308, float("nan"), float("inf"), -0.0, 1e-320])
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "\0", "x" * 5000, "../x", "0.png", "00:0o2"]),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), values),
    max_leaves=8,
)


def places(content, path=()):
    """The paths to all values of a JSON document."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutations_never_crash_and_what_is_cleaned_loads(data, shared_tree, tmp_path_factory):
    check_mutation(data, shared_tree, tmp_path_factory.mktemp("mutated"))


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_mutations_never_crash(data, shared_tree, tmp_path_factory):
    check_mutation(data, shared_tree, tmp_path_factory.mktemp("mutated"))


def check_mutation(data, shared_tree, out):
    """One to three values anywhere in the file become anything."""
    content = json.loads(json.dumps(shared_tree.train))
    paths = sorted(places(content), key=str)
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3)):
        target = content
        for key in path[:-1]:
            target = target[key] if isinstance(target, list | dict) and _has(target, key) else {}
        if path and isinstance(target, list | dict) and _has(target, path[-1]):
            target[path[-1]] = data.draw(JSON_VALUES)
    file = out / "instances_train.json"
    file.write_text(json.dumps(content))
    try:
        check = check_coco([("train", file, shared_tree.root / "train")])
    except AnnotationError as error:
        assert "instances_train.json" in str(error)
        return
    json.dumps(check.report.to_dict()).encode()
    try:
        fix_coco(check, out / "copy")
    except DataError as error:
        assert "nothing usable is left" in str(error)
        return
    copy = (out / "copy" / "annotations" / file.name, out / "copy" / "train")
    assert check_coco([("train", *copy)]).report.num_errors == 0
    dataset = CocoDataset(*copy)
    assert all(dataset[index].image.ndim == 3 for index in range(len(dataset)))
    if not check.report.num_errors:
        CocoDataset(file, shared_tree.root / "train")


def _has(container, key):
    return key in container if isinstance(container, dict) else isinstance(key, int) and key < len(container)


def test_hidden_files_are_no_pictures(tree):
    (tree.root / "train" / "._0.png").write_bytes(b"\0\5\26\7")
    (tree.root / "train" / "Thumbs.db").write_bytes(b"x")
    assert tree.check().report.findings == []


def test_boxes_of_a_cleaned_copy_pass_where_polygons_have_spikes(tree, tmp_path):
    spike = [30.0, 20.0, 34.0, 20.0, 34.0, 24.0, 32.1, 24.0, 32.0, 1.0, 31.9, 24.0, 30.0, 24.0]
    tree.first.update(segmentation=[spike], bbox=[3, 4, 11, 13], area=16)
    tree.write()
    check = tree.check()
    assert check.report.first("box-off-mask").reason.endswith("its segmentation's is [30, 20, 4, 4]")
    fix_coco(check, tmp_path / "out", tree.root)
    assert check_coco(find_coco_files(tmp_path / "out")).report.num_errors == 0
