import json
import shlex

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from swin_dense.datasets.coco import CocoDataset, find_coco_split
from swin_dense.tools.main import main


def tree_of(root):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path):
    """Nine images, and masks of classes 1 and 2 in blocks, as numbers and in colours."""
    root = tmp_path / "source"
    for name in ("images", "masks", "colours"):
        (root / name).mkdir(parents=True)
    for number in range(9):
        blocks = np.random.default_rng(number).integers(0, 3, (6, 5))
        values = np.kron(blocks, np.ones((3 + number, 5), int)).astype(np.uint8)
        Image.fromarray(np.zeros((*values.shape, 3), np.uint8)).save(root / "images" / f"p{number}.jpg")
        Image.fromarray(values).save(root / "masks" / f"p{number}.png")
        colours = np.array([[0, 0, 0], [9, 8, 7], [1, 2, 3]], np.uint8)[values]
        Image.fromarray(colours).save(root / "colours" / f"p{number}_L.png")
    (root / "palette.txt").write_text("0 0 0 nothing\n9 8 7 cat\n1 2 3 dog\n")
    return root


def masks_command(source, out, *more):
    words = ["convert", source / "masks", "--from", "masks", "--images", source / "images", "--out", out, *more]
    return main([str(word) for word in words])


def components(source, out, *more):
    return masks_command(source, out, "--instances", "components", "--classes", "cat", "dog", *more)


def test_masks_to_coco_to_labels_is_the_identity(source, tmp_path, capsys):
    before = tree_of(source)
    coco, labels = tmp_path / "coco", tmp_path / "labels"
    assert components(source, coco) == 0
    words = ["convert", coco / "annotations" / "instances_train.json", "--from", "coco", "--to", "labels"]
    words += ["--images", coco / "images" / "train", "--out", labels]
    assert main([str(word) for word in words]) == 0
    for mask in (source / "masks").iterdir():
        assert np.array_equal(Image.open(mask), Image.open(labels / "annotations" / "train" / mask.name))
    assert (labels / "classes.txt").read_text() == "background\ncat\ndog\n"
    assert tree_of(source) == before


def test_values_come_back_under_their_own_ids_ignored_pixels_too(source, tmp_path, capsys):
    for path in (source / "masks").iterdir():
        values = np.array(Image.open(path))
        values[:, :4] = 255
        Image.fromarray(values).save(path)
    more = ("--instances", "components", "--classes", "sky", "cat", "dog", "--first-value", "0")
    assert masks_command(source, tmp_path / "coco", *more, "--held-out", "0.5") == 0
    for split in ("train", "val"):
        words = ["convert", tmp_path / "coco" / "annotations" / f"instances_{split}.json", "--from", "coco", "--images"]
        words += [tmp_path / "coco" / "images" / split, "--values", "ids", "--uncovered", "ignore", "--split", split]
        assert main([*map(str, words), "--out", str(tmp_path / "labels")]) == 0
        for label in (tmp_path / "labels" / "annotations" / split).iterdir():
            assert np.array_equal(Image.open(source / "masks" / label.name), Image.open(label))
    assert len(list((tmp_path / "labels").rglob("*.png"))) == 9


def test_numbered_masks_come_back_bit_for_bit(source, tmp_path, capsys):
    assert masks_command(source, tmp_path / "out", "--classes", "person") == 0
    coco = COCO(tmp_path / "out" / "annotations" / "instances_train.json")
    for image in coco.imgs.values():
        values = np.asarray(Image.open(source / "masks" / image["file_name"].replace(".jpg", ".png")))
        back = np.zeros_like(values)
        for number, entry in enumerate(coco.imgToAnns[image["id"]], start=1):
            back[coco.annToMask(entry) == 1] = number
        assert np.array_equal(back, values)


def next_command(capsys):
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: swin-dense ")
    return shlex.split(last.removeprefix("next: swin-dense "))


def test_printed_next_command_finds_the_objects(source, tmp_path, capsys):
    assert components(source, tmp_path / "an out", "--held-out", "0.5") == 0
    words = next_command(capsys)
    assert words == ["train", "mask_rcnn_swin_t_1x", f"data={tmp_path / 'an out'}"]
    assert all(len(CocoDataset(*find_coco_split(tmp_path / "an out", split))) for split in ("train", "val"))


def test_printed_next_command_finds_the_classes(source, tmp_path, capsys):
    from swin_dense.tools.recipe import read_recipe
    from swin_dense.tools.tasks import task_of

    words = ["convert", source / "colours", "--from", "palette", "--palette", source / "palette.txt", "--images"]
    words += [source / "images", "--label-suffix", "_L", "--ignored-names", "nothing", "--out", tmp_path / "out"]
    assert main([*map(str, words), "--held-out", "0.5", "--copy-images"]) == 0
    train, recipe, *overrides = next_command(capsys)
    assert train == "train"
    task = task_of(read_recipe(recipe, overrides))
    training = task.training_data()
    validation = task.validation_data(training.label_map)
    assert training.label_map.names == ("cat", "dog") and len(training) + len(validation.paths) == 9
    values = np.asarray(Image.open(source / "masks" / f"{training.names[0]}.png")).astype(int)
    assert np.array_equal(training.label(0), np.where(values == 0, 255, values - 1))


def test_missing_split_is_the_next_thing_to_do(source, tmp_path, capsys):
    assert components(source, tmp_path / "out", "--split", "val") == 0
    assert "next: the same for the train images, with --split train" in capsys.readouterr().out
    assert components(source, tmp_path / "out", "--split", "train") == 0
    assert next_command(capsys)[0] == "train"


def test_counts_are_a_table_and_json(source, tmp_path, capsys):
    assert components(source, tmp_path / "out", "--json", tmp_path / "c.json") == 0
    counts = json.loads((tmp_path / "c.json").read_text())
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    train = counts["splits"]["train"]
    assert train["images"] == 9 and sum(train["classes"].values()) == len(content["annotations"])
    assert counts["label_map"] == {"names": ["cat", "dog"], "raw_ids": [1, 2], "ignored_values": [0]}
    shown = capsys.readouterr().out
    assert "objects by class" in shown and str(train["classes"]["dog"]) in shown


def test_all_faults_are_told_with_3_and_nothing_is_written(source, tmp_path, capsys):
    for name in ("p1", "p4"):
        values = np.array(Image.open(source / "masks" / f"{name}.png"))
        values[:2, :3] = 77
        Image.fromarray(values).save(source / "masks" / f"{name}.png")
    (source / "images" / "p7.jpg").unlink()
    before = tree_of(source)
    assert components(source, tmp_path / "out", "--json", tmp_path / "f.json") == 3
    shown = capsys.readouterr().err
    assert "nothing was written; 3 faults" in shown
    assert "p7.png: there is no image p7" in shown
    assert "p1.png: no class has the value 77 (6 px)" in shown and "p4.png: no class has" in shown
    assert len(json.loads((tmp_path / "f.json").read_text())["faults"]) == 3
    assert not (tmp_path / "out").exists() and tree_of(source) == before


def test_masks_without_an_object_are_3(source, tmp_path, capsys):
    for path in (source / "masks").iterdir():
        values = np.asarray(Image.open(path))
        Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8)).save(path)
    assert components(source, tmp_path / "out") == 3
    assert "none of the 9 images of split 'train' has an object" in capsys.readouterr().err
    one_class = ("--instances", "components", "--classes", "cat", "--first-value", "255")
    assert masks_command(source, tmp_path / "out", *one_class) == 0


def test_labelme_and_yolo_make_the_same_objects(tmp_path, capsys):
    points = [[3.1, 2.2], [30.3, 5.5], [17.0, 21.9]]
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (41, 31)).save(tmp_path / "images" / "a.png")
    shapes = [{"label": "dog", "points": points, "shape_type": "polygon"}]
    content = {"shapes": shapes, "imagePath": "a.png", "imageHeight": 31, "imageWidth": 41}
    (tmp_path / "images" / "a.json").write_text(json.dumps(content))
    shares = " ".join(f"{x / 41:.8f} {y / 31:.8f}" for x, y in points)
    (tmp_path / "labels" / "a.txt").write_text(f"1 {shares}\n")
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")
    labelme = ["convert", tmp_path / "images", "--from", "labelme", "--classes", "cat", "dog", "--out", tmp_path / "l"]
    yolo = ["convert", tmp_path / "labels", "--from", "yolo", "--images", tmp_path / "images"]
    yolo += ["--classes", tmp_path / "data.yaml", "--out", tmp_path / "y"]
    for words in (labelme, yolo):
        assert main([str(word) for word in words]) == 0
    one, other = (json.loads((tmp_path / name / "annotations" / "instances_train.json").read_text()) for name in "ly")
    assert one == other and one["annotations"][0]["category_id"] == 2


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--from", "masks", "--to", "labels"], "there is no conversion from masks to labels, only to coco"),
        (["--from", "coco", "--palette", "p"], "--palette belongs to --from palette, not to coco"),
        (["--from", "masks", "--boxes-as-masks"], "--boxes-as-masks belongs to --from yolo, not to masks"),
        (["--from", "masks", "--images", "i"], "--from masks needs --classes"),
        (["--from", "masks", "--images", "i", "--classes", "a", "b"], "do not say classes; got 2 names"),
        (
            ["--from", "masks", "--images", "i", "--classes", "a", "--first-value", "0"],
            "--first-value belongs to --inst",
        ),
        (["--from", "yolo", "--images", "i", "--classes", "a", "--held-out", "2"], "--held-out must be a share"),
    ],
)
def test_wrong_use_is_2(words, shown, tmp_path, capsys):
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out"), *words]) == 2
    assert shown in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_files_are_3(tmp_path, capsys):
    words = ["convert", str(tmp_path / "a.json"), "--from", "coco", "--images", str(tmp_path), "--out"]
    assert main([*words, str(tmp_path / "out")]) == 3
    assert "a.json: there is no such file" in capsys.readouterr().err
    words = ["convert", str(tmp_path), "--from", "yolo", "--images", str(tmp_path), "--classes", "gone.txt", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 3
    assert "gone.txt: the list of class names cannot be read" in capsys.readouterr().err
