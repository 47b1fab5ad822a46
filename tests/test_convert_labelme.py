import json
import math

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.convert_labelme import labelme_classes, labelme_images, read_labelme_folder
from swin_dense.errors import DataError

TRIANGLE = [[3, 4], [20.5, 6], [11, 25]]


def shape(label="cat", points=TRIANGLE, kind="polygon", group_id=None, **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": group_id, "flags": {}, **more}


@pytest.fixture
def write(tmp_path):
    def one(stem, *shapes, **changes):
        Image.fromarray(np.zeros((31, 41, 3), np.uint8)).save(tmp_path / f"{stem}.png")
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": list(shapes),
            "imagePath": f"{stem}.png",
            "imageData": "not read",
            "imageHeight": 31,
            "imageWidth": 41,
        }
        (tmp_path / f"{stem}.json").write_text(json.dumps({**content, **changes}))

    one.folder = tmp_path
    return one


def convert(folder, names=None, image_folder=None, **options):
    findings = Findings()
    files = read_labelme_folder(folder, image_folder, findings, **options)
    label_map = labelme_classes(files, names)
    return label_map, list(labelme_images(files, label_map, findings)), findings


def raster(*polygons):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([list(each) for each in polygons], 31, 41)))


def mask_of(each):
    return raster(*each.segmentation)


def test_polygons_keep_their_points_and_classes_are_sorted(write):
    write("b", shape("dog"), shape("cat"))
    write("a")
    label_map, images, findings = convert(write.folder)
    assert not findings.faults and label_map.names == ("cat", "dog") and label_map.raw_ids == (1, 2)
    assert [(image.file_name, len(image.objects)) for image in images] == [("a.png", 0), ("b.png", 2)]
    assert [each.label for each in images[1].objects] == [1, 0]
    assert images[1].objects[0].segmentation == [[3, 4, 20.5, 6, 11, 25]] and images[1].size_hw == (31, 41)


def test_group_id_joins_parts_of_one_object(write):
    far = [[30, 20], [40, 20], [40, 30]]
    write("a", shape(group_id=7), shape(), shape(points=far, group_id=7))
    _, (image,), _ = convert(write.folder)
    joined, alone = image.objects
    assert len(joined.segmentation) == 2 and len(alone.segmentation) == 1
    assert joined.area == raster([3, 4, 20.5, 6, 11, 25], [30, 20, 40, 20, 40, 30]).sum() > alone.area


def test_rectangles_by_two_or_four_corners_are_the_same(write):
    corners = [[5, 6], [17, 6], [17, 21], [5, 21]]
    for stem, points in (("a", [[5, 6], [17, 21]]), ("b", [[17, 21], [5, 6]]), ("c", corners)):
        write(stem, shape(points=points, kind="rectangle"))
    _, images, _ = convert(write.folder)
    for image in images:
        assert image.objects[0].area == 12 * 15 and image.objects[0].box_xywh == (5, 6, 12, 15)


@pytest.mark.parametrize("radius", [1.5, 9.0, 13.0])
def test_circles_stay_within_a_tenth_of_a_pixel(write, radius):
    write("a", shape(points=[[20, 15], [20 + 0.6 * radius, 15 + 0.8 * radius]], kind="circle"))
    _, (image,), _ = convert(write.folder)
    (points,) = np.array(image.objects[0].segmentation).reshape(1, -1, 2) - (20, 15)
    distances = np.hypot(*points.T)
    middles = np.hypot(*((points + np.roll(points, 1, axis=0)) / 2).T)
    assert np.abs(distances - radius).max() < 2e-3 and 0 <= radius - middles.min() < 0.1 + 2e-3
    assert len(points) <= math.ceil(math.pi / math.acos(1 - 0.1 / radius))


def test_shapes_without_area_are_refused_or_left_out_with_a_note(write):
    strip, point = shape(kind="linestrip"), shape(points=[[1, 2]], kind="point")
    write("a", strip, shape(), point, shape(kind="mask", mask="iVBO"))
    findings = Findings()
    assert read_labelme_folder(write.folder, None, findings) == []
    assert len(findings.faults) == 3
    assert "a.json: shapes[0]: shape_type 'linestrip' of label 'cat' has no area. Remove it, or pass --skip" in str(
        findings.faults[0]
    )
    _, (image,), findings = convert(write.folder, skip_unsupported=True)
    assert len(image.objects) == 1 and not findings.faults
    assert findings.notes == {f"shapes of type {kind} (left out)": 1 for kind in ("linestrip", "point", "mask")}


def test_every_wrong_shape_is_named(write):
    wrong = {
        "a polygon needs at least 3 points, got 2": shape(points=TRIANGLE[:2]),
        "a rectangle needs 2 opposite corners or all 4, got 3 points": shape(kind="rectangle"),
        "a circle needs its centre and a point on it, got 3 points": shape(kind="circle"),
        "a shape needs a label that is not empty, got ' '": shape(label=" "),
        "a shape needs a label that is not empty, got 5": 5,
        "shape_type must be one of polygon, rectangle, circle, got 'star'": shape(kind="star"),
        "group_id must be a whole number or null, got 'x'": shape(group_id="x"),
        "points[1] must be [x, y] in pixels, got [1]": shape(points=[[1, 2], [1], [3, 4]]),
        "points[0]: x nan is not finite or far outside": shape(points=[[math.nan, 2], [1, 2], [3, 4]]),
        "points[2]: y 1000000000.0 is not finite or far outside": shape(points=[[1, 2], [1, 2], [3, 1e9]]),
    }
    write("a", *wrong.values())
    findings = Findings()
    read_labelme_folder(write.folder, None, findings)
    for position, (fault, text) in enumerate(zip(findings.faults, wrong, strict=True)):
        assert f"a.json: shapes[{position}]: {text}" in fault


def test_every_wrong_file_is_named(write):
    write("a", imagePath="gone.png")
    write("b", imageHeight=30)
    write("c", imageWidth="41")
    write("d", imagePath="../d.png")
    write("e", imagePath=None)
    write("f", imagePath="good.png")
    (write.folder / "f2.json").write_text('{"images": []}')
    (write.folder / "f3.json").write_text('{"shapes": [')
    write("good", shape())
    findings = Findings()
    files = read_labelme_folder(write.folder, None, findings)
    assert [file.path.name for file in files] == ["f.json"]
    texts = [
        "gone.png: there is no such file",
        "b.png: the annotations say height x width 30 x 41, the picture is 31 x 41",
        "c.json: imageWidth must be a whole number of pixels, at least 1, got '41'",
        "d.json: imagePath '../d.png' leads out of the folder. Pass --images DIR",
        "e.json: imagePath must be the path of a picture, got None",
        "f2.json: wanted a file of LabelMe",
        "f3.json: not a JSON file",
        "good.json: imagePath 'good.png' is that of f.json too",
    ]
    for fault, text in zip(findings.faults, texts, strict=True):
        assert text in fault


def test_image_folder_replaces_the_folders_in_image_paths(write):
    write("a", shape(), imagePath="..\\pictures\\x.png")
    other = write.folder / "pictures"
    other.mkdir()
    (write.folder / "a.png").rename(other / "x.png")
    _, (image,), findings = convert(write.folder, image_folder=other)
    assert not findings.faults and image.path == other / "x.png"


def test_exif_frame_of_the_shapes_is_kept(write):
    write("a", shape(), imagePath="a.jpg", imageHeight=41, imageWidth=31)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((31, 41, 3), np.uint8)).save(write.folder / "a.jpg", exif=exif)
    _, (image,), findings = convert(write.folder)
    assert not findings.faults and image.size_hw == (41, 31)
    write("a", shape(), imagePath="a.jpg", imageHeight=None, imageWidth=None)
    assert convert(write.folder)[1][0].size_hw == (41, 31)


def test_labels_must_be_among_the_classes_and_agree_in_a_group(write):
    write("a", shape("dgo"))
    write("b", shape("cat", group_id=3), shape("dog", group_id=3))
    write("c", shape("dog"))
    label_map, images, findings = convert(write.folder, names=("__ignore__", "_background_", "cat", "dog"))
    assert label_map.names == ("cat", "dog") and [image.file_name for image in images] == ["c.png"]
    assert "a.json: label 'dgo' is not among the classes cat, dog" in findings.faults[0]
    assert "b.json: group_id 3 joins the labels 'cat', 'dog'" in findings.faults[1]


def test_object_without_a_pixel_is_left_out_with_a_note(write):
    write("a", shape(points=[[3, 3], [3, 3], [3, 3]]), shape())
    _, (image,), findings = convert(write.folder)
    assert len(image.objects) == 1 and findings.notes == {"objects without a pixel (left out)": 1}


def test_folder_without_files_and_files_without_shapes_are_refused(write):
    with pytest.raises(DataError, match="wanted a folder of LabelMe's JSON files, found none"):
        convert(write.folder)
    write("a")
    with pytest.raises(DataError, match="no shape has a label"):
        convert(write.folder)
