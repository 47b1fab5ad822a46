import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from swin_dense.tools.main import main


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def shapes(shapes_root, tmp_path):
    """A copy of the generated data set that a test may damage."""
    shutil.copytree(shapes_root, tmp_path / "data")
    return tmp_path / "data"


def train_file(root):
    return next((root / "annotations").glob("instances_train*.json"))


def damage(root):
    path = train_file(root)
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [5000, 5000, 7, 7]
    path.write_text(json.dumps(content))


def write_ids_as_text(root):
    path = train_file(root)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    path.write_text(json.dumps(content))


def test_clean_data_is_0(shapes, capsys):
    assert main(["check", str(shapes)]) == 0
    assert f"{shapes}: 0 errors" in capsys.readouterr().out


def test_faults_are_1_and_cleaned_data_is_0_again(shapes, tmp_path, capsys):
    damage(shapes)
    out, report = tmp_path / "cleaned", tmp_path / "report.json"
    assert (
        main(["check", str(shapes), "--fix", str(out), "--json", str(report), "--html", str(tmp_path / "p.html")]) == 1
    )
    shown = capsys.readouterr().out
    assert "box-outside" in shown and "1 box-outside; see changes.json" in shown
    content = json.loads(report.read_text())
    assert content["errors"] == 1 and content["kinds"]["box-outside"]["count"] == 1
    assert content["cleaned"] == str(out) and content["data"] == str(shapes)
    assert [change["kind"] for change in json.loads((out / "changes.json").read_text())] == ["box-outside"]
    assert "base64" in (tmp_path / "p.html").read_text()
    assert main(["check", str(out)]) == 0


def damage_labels(root):
    """One label picture gets a value that no class has, another is cut short."""
    cut, changed = sorted((root / "annotations").glob("train*/*.png"))[:2]
    cut.write_bytes(cut.read_bytes()[:200])
    values = np.array(Image.open(changed))
    values[:3] = 77
    Image.fromarray(values).save(changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "plant", "planted"),
    [
        ("instance", damage, {"box-outside"}),
        ("instance", write_ids_as_text, {"id-not-whole"}),
        ("semantic", damage_labels, {"label-values", "picture-damaged"}),
    ],
)
def test_cleaned_data_trains(task, plant, planted, shapes, tmp_path, tiny_words, one_thread):
    plant(shapes)
    out, report = tmp_path / "cleaned", tmp_path / "report.json"
    how = ["--classes", str(shapes / "classes.txt"), "--first-value", "1", "--ignored-values", "0"]
    words = [] if task == "instance" else how
    assert main(["check", str(shapes), *words, "--fix", str(out), "--json", str(report)]) == 1
    kinds = json.loads(report.read_text())["kinds"]
    assert {kind for kind, told in kinds.items() if told["severity"] == "error"} == planted
    assert main(["check", str(out), *words]) == 0
    words = tiny_words(task, f"data={out}", "schedule.steps=2", "run.evaluate_every_steps=2")
    assert main(["train", *words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0


def test_annotation_file_and_its_images_are_checked_alone(shapes, tmp_path, capsys):
    damage(shapes)
    images = next((shapes / "images").glob("train*"))
    words = ["check", str(train_file(shapes)), "--images", str(images)]
    assert main([*words, "--headers-only", "--workers", "1", "--fix", str(tmp_path / "out"), "--copy"]) == 1
    capsys.readouterr()
    cleaned = tmp_path / "out" / "annotations" / train_file(shapes).name
    assert main(["check", str(cleaned), "--images", str(tmp_path / "out" / images.name)]) == 0


def test_label_pictures_are_checked_with_and_without_classes(semantic_tree, tmp_path, capsys):
    root = str(semantic_tree.root)
    assert main(["check", root, "--classes", "4", "--fix", str(tmp_path / "out")]) == 1
    assert "not among 4 classes, values 0 to 3: 4 (" in " ".join(capsys.readouterr().out.split())
    assert main(["check", root, "--classes", "4", "--ignored-values", "4", "9"]) == 0
    assert main(["check", root, "--classes", "4", "--first-value", "1", "--ignored-values", "0"]) == 0
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    assert main(["check", root, "--classes", str(names)]) == 0
    assert main(["check", root, "--classes", "ade20k"]) == 0
    capsys.readouterr()
    folders = [str(semantic_tree.image_folder), "--labels", str(semantic_tree.label_folder)]
    assert main(["check", *folders]) == 0
    assert "what fits, if they are classes: --classes 5." in " ".join(capsys.readouterr().out.split())
    assert main(["check", str(tmp_path / "out"), "--classes", "4"]) == 0


def test_output_fits_80_columns(shapes, capsys, narrow):
    damage(shapes)
    content = json.loads(train_file(shapes).read_text())
    content["categories"][0]["name"] = "\ud800 [red]" + "a long name " * 9
    content["annotations"][1]["id"] = content["annotations"][2]["id"]
    train_file(shapes).write_text(json.dumps(content))
    assert main(["check", str(shapes)]) == 1
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith(str(shapes)) and max(map(len, lines)) <= 80
    assert any("categories-differ" in line for line in lines) and any("[red]" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothing"], 3, "nothing: there is no such file or folder"),
        ([".", "--images", "x"], 2, "--images goes with an annotation file"),
        (["a.json"], 2, "a.json: name the folder of its images with --images DIR"),
        (["a.json", "--images", ".", "--classes", "3"], 2, "--labels and --classes go with folders"),
        ([".", "--copy"], 2, "--copy goes with --fix"),
        ([".", "--fix", "."], 2, ". is not empty: choose another folder"),
        (["empty", "--labels", "./empty"], 2, "that is the folder of the images; labels need one of their own"),
        (["a.json", "--images", "none"], 3, "none: wanted the folder of the images of a.json"),
        (["a.json", "--images", "."], 3, "a.json: the file is empty"),
        (["."], 3, "split 'train' not found"),
        (["."], 3, "Nor is there an annotation file, annotations/instances_<split>.json."),
        (["."], 3, "Other folders are named so: check a.json --images DIR, or check IMAGES --labels LABELS."),
        (["empty", "--classes", "300"], 2, "label pictures can hold 255 classes"),
        (["empty", "--classes", "none.txt"], 3, "none.txt: the list of class names cannot be read"),
    ],
)
def test_mistakes_are_one_message(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").touch()
    (tmp_path / "empty").mkdir()
    assert main(["check", *words]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("swin-dense check: ") and message in error


def test_split_that_cannot_be_read_does_not_hide_the_other(shapes, capsys):
    next((shapes / "annotations").glob("instances_val*.json")).write_text("{")
    damage(shapes)
    assert main(["check", str(shapes)]) == 1
    shown = capsys.readouterr().out
    assert "file-unreadable" in shown and "box-outside" in shown


def test_pictures_are_read_in_processes_of_their_own(tmp_path, capsys):
    for kind in ("images", "annotations"):
        (tmp_path / kind).mkdir()
    for number in range(210):
        Image.fromarray(np.full((3, 5, 3), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(np.full((3, 5), number % 3, np.uint8)).save(tmp_path / "annotations" / f"{number}.png")
    (tmp_path / "images" / "208.png").write_bytes(b"")
    assert main(["check", str(tmp_path), "--workers", "2", "--json", str(tmp_path / "r.json")]) == 1
    content = json.loads((tmp_path / "r.json").read_text())
    assert list(content["kinds"]) == ["picture-empty"]
    assert content["statistics"]["all"]["values"] == {"0": 1050, "1": 1050, "2": 1050}


def test_larger_pictures_are_read_on_demand(semantic_tree, capsys):
    words = ["check", str(semantic_tree.root), "--classes", "5"]
    assert main([*words, "--max-pixels", "2000"]) == 1
    assert "picture-too-large" in capsys.readouterr().out
    assert main([*words, "--max-pixels", "3000"]) == 0


def test_check_needs_no_torch(shapes_root, semantic_tree, tmp_path):
    semantic = [str(semantic_tree.root), "--classes", "5", "--html", str(tmp_path / "b.html")]
    coco = [str(shapes_root), "--html", str(tmp_path / "a.html")]
    script = (
        "import sys; from swin_dense.tools.main import main\n"
        f"assert main(['check', *{coco}]) == main(['check', *{semantic}]) == 0\n"
        "sys.exit(' '.join({'torch', 'torchvision'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
