import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from swin_dense.datasets.shape_scenes import BACKGROUND_NAMES, SHAPE_NAMES, draw_scene
from swin_dense.datasets.shapes import CATEGORY_IDS, SHAPES_LABELS, shapes_paths, write_shapes
from swin_dense.errors import ConfigError, DataError

SEED = 5


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_training=90, num_validation=7, seed=SEED)


def file_bytes(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def written(paths):
    return json.loads(paths.training.annotation_file.read_text())


def test_both_layouts_cover_the_same_pictures(paths):
    for split, count in ((paths.training, 90), (paths.validation, 7)):
        content = json.loads(split.annotation_file.read_text())
        stems = sorted(file.stem for file in split.image_folder.iterdir())
        assert len(stems) == count
        assert stems == sorted(file.stem for file in split.label_folder.iterdir())
        assert stems == sorted(image["file_name"].removesuffix(".jpg") for image in content["images"])
        for image in content["images"]:
            for file in (
                split.image_folder / image["file_name"],
                split.label_folder / f"{image['file_name'][:-4]}.png",
            ):
                with Image.open(file) as picture:
                    assert picture.size == (image["width"], image["height"])


def test_sizes_stay_in_the_range_and_differ(written):
    sides = [side for image in written["images"] for side in (image["width"], image["height"])]
    assert 96 <= min(sides) and max(sides) <= 160 and len(set(sides)) > 20


def test_ids_are_unique_and_categories_have_gaps(paths, written):
    validation = json.loads(paths.validation.annotation_file.read_text())
    image_ids = [image["id"] for image in written["images"] + validation["images"]]
    assert len(set(image_ids)) == len(image_ids) == 97
    assert [each["id"] for each in written["annotations"]] == list(range(1, len(written["annotations"]) + 1))
    assert tuple(each["id"] for each in written["categories"]) == CATEGORY_IDS
    assert tuple(each["name"] for each in written["categories"]) == SHAPE_NAMES


def test_class_file_and_label_map_agree(paths):
    assert tuple(paths.class_file.read_text().split()) == SHAPES_LABELS.names == BACKGROUND_NAMES + SHAPE_NAMES


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools' decode
def test_annotations_reproduce_the_visible_masks(paths):
    coco = COCO(paths.training.annotation_file)
    kinds = set()
    for index, image_id in enumerate(sorted(coco.imgs)):
        image = coco.imgs[image_id]
        random = np.random.default_rng([SEED, 0, index])
        size_hw = tuple(int(side) for side in random.integers(96, 160, size=2, endpoint=True))
        assert size_hw == (image["height"], image["width"])
        scene = draw_scene(random, size_hw)
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(scene.objects)
        for annotation, each in zip(annotations, scene.objects, strict=True):
            raster = coco.annToMask(annotation).astype(bool)
            overlap = (raster & each.mask).sum() / (raster | each.mask).sum()
            is_polygon = isinstance(annotation["segmentation"], list)
            assert overlap >= 0.9 if is_polygon else overlap == 1.0
            assert annotation["area"] == each.mask.sum() and annotation["iscrowd"] == each.is_crowd
            assert annotation["bbox"] == list(
                coco_mask.toBbox(coco_mask.encode(np.asfortranarray(each.mask, np.uint8)))
            )
            kinds.add("polygon" if is_polygon else type(annotation["segmentation"]["counts"]).__name__)
    assert kinds == {"polygon", "str", "list"}


def test_only_crowds_have_plain_counts(written):
    plain = [
        isinstance(each["segmentation"], dict) and isinstance(each["segmentation"]["counts"], list)
        for each in written["annotations"]
    ]
    assert plain == [bool(each["iscrowd"]) for each in written["annotations"]]
    assert any(plain)


def test_some_images_have_no_annotation(written):
    annotated = {each["image_id"] for each in written["annotations"]}
    assert 0 < len(written["images"]) - len(annotated) < 20


def test_same_seed_gives_the_same_bytes_and_a_larger_set_begins_alike(tmp_path):
    settings = {"num_validation": 2, "image_side_range": (48, 67), "seed": 3}
    small, again, large = (tmp_path / name for name in ("small", "again", "large"))
    write_shapes(small, num_training=3, **settings)
    write_shapes(again, num_training=3, **settings)
    write_shapes(large, num_training=5, **settings)
    assert file_bytes(small) == file_bytes(again)
    whole = file_bytes(large)
    assert all(whole[name] == content for name, content in file_bytes(small).items() if name.endswith((".jpg", ".png")))


def test_other_seed_gives_other_pictures(tmp_path):
    for seed in (0, 1):
        write_shapes(tmp_path / str(seed), num_training=1, num_validation=1, image_side_range=(48, 53), seed=seed)
    one, other = (file_bytes(tmp_path / str(seed)) for seed in (0, 1))
    assert one["images/training/shapes_000001.jpg"] != other["images/training/shapes_000001.jpg"]


def test_complete_set_is_left_alone_and_half_written_set_is_completed(tmp_path):
    settings = {"num_training": 2, "num_validation": 1, "image_side_range": (48, 53)}
    paths = write_shapes(tmp_path, **settings)
    before = file_bytes(tmp_path)
    calls = []
    write_shapes(tmp_path, **settings, report=lambda done, total: calls.append((done, total)))
    assert calls == []
    (tmp_path / "shapes.json").write_text((tmp_path / "shapes.json").read_text().replace("true", "false"))
    paths.validation.annotation_file.unlink()
    write_shapes(tmp_path, **settings, report=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert file_bytes(tmp_path) == before


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"is not empty and holds no shapes\. Choose a new or empty folder"):
        write_shapes(tmp_path)
    with pytest.raises(DataError, match=r"holiday\.jpg is a file"):
        write_shapes(tmp_path / "holiday.jpg")


def test_other_settings_and_broken_record_are_refused(tmp_path):
    write_shapes(tmp_path, num_training=1, num_validation=1, image_side_range=(48, 53))
    with pytest.raises(DataError, match=r"'num_training': 1.*wanted.*'num_training': 2"):
        write_shapes(tmp_path, num_training=2, num_validation=1, image_side_range=(48, 53))
    (tmp_path / "shapes.json").write_text("{")
    with pytest.raises(DataError, match=r"shapes\.json cannot be read"):
        write_shapes(tmp_path, num_training=1, num_validation=1, image_side_range=(48, 53))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_training": 0}, "num_training must be at least 1, got 0"),
        ({"num_validation": -1}, "num_validation must be at least 1, got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"image_side_range": (47, 60)}, "image_side_range must be .* 48 <= least"),
        ({"image_side_range": (60, 59)}, "image_side_range must be"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        write_shapes(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_paths_are_known_without_writing(tmp_path):
    paths = shapes_paths(tmp_path)
    assert paths.training.image_folder == tmp_path / "images" / "training"
    assert paths.validation.annotation_file == tmp_path / "annotations" / "instances_validation.json"
    assert list(tmp_path.iterdir()) == []
