import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.convert_yolo import parse_yolo_line, read_data_yaml, read_yolo, yolo_classes
from swin_dense.errors import AnnotationError, DataError

SIZE_HW = (31, 41)


@pytest.fixture
def write(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()

    def one(stem, text=None, size_hw=SIZE_HW):
        Image.fromarray(np.zeros((*size_hw, 3), np.uint8)).save(tmp_path / "images" / f"{stem}.png")
        if text is not None:
            (tmp_path / "labels" / f"{stem}.txt").write_text(text)

    one.root = tmp_path
    return one


def convert(root, num_classes=3, **options):
    findings = Findings()
    return list(read_yolo(root / "images", root / "labels", num_classes, findings, **options)), findings


def test_polygons_come_back_within_half_a_pixel(write):
    random = np.random.default_rng(0)
    polygons = [random.random((count, 2)) for count in (3, 5, 17)]
    lines = [" ".join(["2", *(f"{number:.6f}" for number in polygon.ravel())]) for polygon in polygons]
    write("a", "\n".join(lines) + "\n\n")
    (image,), findings = convert(write.root)
    assert not findings.faults and image.size_hw == SIZE_HW and [each.label for each in image.objects] == [2, 2, 2]
    for each, polygon in zip(image.objects, polygons, strict=True):
        points = np.array(each.segmentation).reshape(-1, 2)
        assert np.abs(points - polygon * SIZE_HW[::-1]).max() < 0.5
        again = points / SIZE_HW[::-1]
        assert np.abs(again - polygon).max() < 0.5 / max(SIZE_HW)


@given(
    st.integers(0, 4),
    st.lists(st.floats(0, 1), min_size=6, max_size=12).filter(lambda numbers: len(numbers) % 2 == 0),
)
def test_lines_read_back_what_was_written(label, numbers):
    line = " ".join([str(label), *(repr(number) for number in numbers)])
    assert parse_yolo_line(line, 5) == (label, numbers, False)


def test_boxes_are_masks_only_when_asked(write):
    write("a", "1 0.5 0.5 0.5 0.25\n0 0 0 1 0 1 1\n")
    _, findings = convert(write.root)
    assert len(findings.faults) == 1
    assert "a.txt: 1 boxes have no polygon, the first in line 1" in findings.faults[0]
    assert "--boxes-as-masks" in findings.faults[0]
    (image,), findings = convert(write.root, boxes_as_masks=True)
    assert not findings.faults and [each.label for each in image.objects] == [1, 0]
    x, y, width, height = 41 / 4, 31 * 3 / 8, 41 / 2, 31 / 4
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    assert np.allclose(image.objects[0].segmentation, [corners], atol=1e-3)


def test_every_wrong_line_is_named(write):
    wrong = {
        "got 3 numbers": "0 0.1 0.2",
        "got 6 numbers": "0 0.1 0.2 0.3 0.4 0.9",
        "class 3 is beyond the 3 names": "3 0 0 1 0 1 1",
        "the class must be a whole number, got '1.0'": "1.0 0 0 1 0 1 1",
        "the class must be a whole number, got '-1'": "-1 0 0 1 0 1 1",
        "coordinates must be numbers, got '0 x 1 0 1 1'": "0 0 x 1 0 1 1",
        "shares of width and height from 0 to 1, got 20": "0 20 10 1 0 1 1",
        "shares of width and height from 0 to 1, got nan": "0 nan 0 1 0 1 1",
    }
    write("a", "\n".join(wrong.values()))
    _, findings = convert(write.root)
    for number, (fault, text) in enumerate(zip(findings.faults, wrong, strict=True), start=1):
        assert f"a.txt: line {number}: " in fault and text in fault


def test_polygon_of_two_points_reads_as_the_box_that_it_cannot_be_told_from(write):
    write("a", "0 0.1 0.1 0.5 0.5\n")
    _, findings = convert(write.root)
    assert "1 boxes have no polygon" in findings.faults[0]


def test_rounding_beyond_the_border_is_clipped():
    assert parse_yolo_line("0 -0.004 0 1.009 0 1 1", 1)[1] == [0, 0, 1, 0, 1, 1]
    with pytest.raises(AnnotationError):
        parse_yolo_line("0 -0.02 0 1 0 1 1", 1)


def test_images_without_text_are_background_and_repeated_lines_count_once(write):
    write("a")
    write("b", "")
    write("c", "0 0 0 1 0 1 1\n0 0 0 1 0 1 1\n1 0.5 0.5 0.5 0.5 0.5 0.5\n")
    images, findings = convert(write.root)
    assert [len(image.objects) for image in images] == [0, 0, 1]
    assert findings.notes == {
        "images without a text file (background)": 1,
        "repeated lines (left out)": 1,
        "objects without a pixel (left out)": 1,
    }


def test_text_without_an_image_and_broken_files_are_named(write):
    write("a", "0 0 0 1 0 1 1\n")
    write("b")
    (write.root / "labels" / "gone.txt").write_text("")
    (write.root / "labels" / "b.txt").write_bytes(b"\xff\xfe0")
    (write.root / "labels" / "classes.txt").write_text("cat\n")
    images, findings = convert(write.root)
    assert [image.file_name for image in images] == ["a.png"] and len(findings.faults) == 2
    assert "gone.txt: there is no image gone in" in findings.faults[0]
    assert "b.txt: the file cannot be read as text" in findings.faults[1]
    (write.root / "none").mkdir()
    with pytest.raises(DataError, match="found none there"):
        list(read_yolo(write.root / "images", write.root / "none", 1, Findings()))


def test_sizes_are_those_of_the_turned_picture(write):
    write("a", "0 0 0 1 0 1 1 0 1\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((*SIZE_HW, 3), np.uint8)).save(write.root / "images" / "a.png", exif=exif)
    (image,), _ = convert(write.root)
    assert image.size_hw == SIZE_HW[::-1] and image.objects[0].box_xywh == (0, 0, *SIZE_HW)


@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}", "{1: dog, 0: cat}"])
def test_data_yaml_names_are_read_in_order(tmp_path, names):
    (tmp_path / "data.yaml").write_text(f"path: ../x\nnc: 2\nnames: {names}\n")
    assert read_data_yaml(tmp_path / "data.yaml") == ("cat", "dog")
    assert yolo_classes(("cat", "dog")).raw_ids == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat]\nnc: 2\n", "nc is 2, but there are 1 names"),
        ("names: {0: cat, 2: dog}\n", "numbered from 0 without gaps"),
        ("nc: 2\n", "wanted the key names"),
        ("- a\n", "wanted the key names"),
        ("names: [\n", "not a YAML file"),
    ],
)
def test_wrong_data_yaml_is_refused(tmp_path, text, message):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_data_yaml(tmp_path / "data.yaml")
