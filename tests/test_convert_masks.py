import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.convert_masks import ComponentInstances, NumberedInstances, component_labels, read_masks
from swin_dense.errors import ConfigError, DataError


def drawn(objects, shape, value_of):
    """The map that the objects were read from."""
    values = np.zeros(shape, np.int64)
    for number, each in enumerate(objects, start=1):
        mask = coco_mask.decode(each.segmentation) == 1
        assert not values[mask].any()
        values[mask] = value_of(number, each)
    return values


def test_numbered_instances_come_back_bit_for_bit():
    values = np.random.default_rng(0).integers(0, 5, (31, 23))
    objects = NumberedInstances()(values)
    assert [each.label for each in objects] == [0, 0, 0, 0]
    assert np.array_equal(drawn(objects, values.shape, lambda number, each: number), values)


def test_numbers_may_exceed_8_bit_and_have_gaps():
    values = np.zeros((5, 7), np.int32)
    values[1, 1:3], values[3, 2:6] = 40_000, 255
    with pytest.raises(DataError, match=r"value 255 \(4 px\) may be an object or an area to ignore.*--ignored-values"):
        NumberedInstances()(values)
    assert [each.area for each in NumberedInstances(())(values)] == [4, 2]
    assert [each.area for each in NumberedInstances((255,))(values)] == [2]


def test_components_partition_each_class_into_connected_masks():
    values = np.kron(np.random.default_rng(1).integers(0, 3, (9, 8)), np.ones((2, 3), np.int64))
    label_map = component_labels(("cat", "dog"), 1, None)
    objects = ComponentInstances(label_map)(values)
    assert np.array_equal(drawn(objects, values.shape, lambda number, each: label_map.raw_ids[each.label]), values)
    import cv2

    for each in objects:
        count, _ = cv2.connectedComponents(coco_mask.decode(each.segmentation), connectivity=8)
        assert count == 2
    assert len(objects) > 4


def test_components_that_touch_at_a_corner_are_one():
    assert len(ComponentInstances(component_labels(("cat",), 1, None))(np.eye(5, dtype=int))) == 1


def test_value_without_a_name_is_named_with_its_pixels():
    values = np.array([[1, 2, 9, 9], [0, 255, 9, 70_000]])
    with pytest.raises(DataError, match=r"no class has the value 9 \(3 px\), 70000 \(1 px\); the classes are 1 cat, 2"):
        ComponentInstances(component_labels(("cat", "dog"), 1, None))(values)


def test_component_labels_say_what_is_no_object():
    assert component_labels(("cat",), 1, None).ignored_values == (0,)
    assert component_labels(("sky",), 0, (9,)).ignored_values == (9,)
    # A mask of 0 and 255 is one class of value 255.
    assert len(ComponentInstances(component_labels(("cat",), 255, None))(np.array([[0, 255, 255, 0]]))) == 1
    with pytest.raises(ConfigError, match="value 2 is both a class and an ignored value"):
        component_labels(("cat", "dog"), 1, (2,))


@pytest.fixture
def folders(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()

    def add(stem, mask, size_hw=(5, 7)):
        Image.fromarray(np.zeros((*size_hw, 3), np.uint8)).save(tmp_path / "images" / f"{stem}.png")
        mask.save(tmp_path / "masks" / f"{stem}.png")

    return tmp_path, add


def grey(values, dtype=np.uint8):
    return Image.fromarray(np.asarray(values, dtype))


def test_read_masks_takes_8_bit_16_bit_and_palette_indices_alike(folders):
    root, add = folders
    values = np.random.default_rng(2).integers(0, 4, (5, 7))
    with_palette = grey(values)
    with_palette.putpalette([200, 0, 0] * 256)  # the colours are all the same, the indices are not
    for stem, mask in (("a", grey(values)), ("b", grey(values, np.uint16)), ("c", with_palette)):
        add(stem, mask)
    assert with_palette.mode == "P"
    findings = Findings()
    images = list(read_masks(root / "images", root / "masks", NumberedInstances(), findings))
    assert not findings.faults and [image.file_name for image in images] == ["a.png", "b.png", "c.png"]
    assert images[0].objects == images[1].objects == images[2].objects and len(images[0].objects) == 3


def test_read_masks_names_every_wrong_file_and_reads_the_others(folders):
    root, add = folders
    good = np.ones((5, 7))
    add("colours", Image.fromarray(np.zeros((5, 7, 3), np.uint8)))
    add("good", grey(good))
    add("size", grey(good), size_hw=(5, 8))
    add("void", grey(good * 255))
    (root / "images" / "broken.png").write_bytes(b"")
    grey(good).save(root / "masks" / "broken.png")
    findings = Findings()
    calls = []
    images = list(
        read_masks(
            root / "images",
            root / "masks",
            NumberedInstances(),
            findings,
            report=lambda *numbers: calls.append(numbers),
        )
    )
    assert [image.file_name for image in images] == ["good.png"]
    assert calls[-1] == (5, 5)
    names = ("broken.png: the file is empty", "colours.png: a label picture must be grey", "size.png: the annotations")
    assert len(findings.faults) == 4
    for fault, text in zip(findings.faults, (*names, "masks/void.png: value 255 (35 px)"), strict=True):
        assert text in fault
