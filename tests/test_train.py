import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from swin_dense.tools.main import main
from swin_dense.tools.recipe import read_recipe
from swin_dense.training.checkpoint import read_state
from swin_dense.training.metrics_file import read_metrics

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]
ROOT = Path(__file__).parents[1]


def train(words, out, *options):
    return main(["train", *words, "--out", str(out), "--device", "cpu", *options])


def assert_same_weights(first, second):
    first, second = load_file(first), load_file(second)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_equals_the_uninterrupted_one(workers, tiny_run, tmp_path, capsys):
    words = [*tiny_run.words, f"run.workers={workers}"]
    assert train([*words, "schedule.steps=2"], tmp_path) == 0
    assert read_recipe(str(tmp_path / "recipe.yaml")).schedule.steps == 2
    assert train(words, tmp_path, "--resume") == 0
    assert_same_weights(tmp_path / "last.safetensors", tiny_run.last_model)
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(
        (tiny_run.folder / "scores.json").read_text()
    )
    timings = ("step_time_s", "data_time_s", "peak_memory_gb")
    resumed, whole = (
        [{name: value for name, value in row.items() if name not in timings} for row in read_metrics(folder)]
        for folder in (tmp_path / "metrics.csv", tiny_run.folder / "metrics.csv")
    )
    assert resumed == whole
    assert read_recipe(str(tmp_path / "recipe.yaml")).schedule.steps == 4


@pytest.fixture
def copied_run(semantic_run, tmp_path):
    """The folder of a finished run that a test may change."""
    return Path(shutil.copytree(semantic_run.folder, tmp_path / "copy"))


def test_finished_run_resumes_to_itself(semantic_run, copied_run, capsys):
    assert train(semantic_run.words, copied_run, "--resume") == 0
    for name in ("last.safetensors", "best.safetensors", "scores.json", "recipe.yaml"):
        assert (copied_run / name).read_bytes() == (semantic_run.folder / name).read_bytes()


def test_second_start_is_refused_in_words(tiny_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.folder.rglob("*")}
    assert train(tiny_run.words, tiny_run.folder) == 2
    assert "is not empty: continue that run with --resume, or choose another --out" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tiny_run.folder.rglob("*")} == before


def test_resume_of_nothing_is_refused_in_words(tiny_run, tmp_path, capsys):
    assert train(tiny_run.words, tmp_path / "new", "--resume") == 2
    assert "no training state to resume; start without --resume" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "code", "shown"),
    [
        ("model.head.channels=16", 4, "the checkpoint is of another model"),
        ("schedule.steps=3", 2, "the run is at step 4 already, the recipe ends at step 3; raise schedule.steps or"),
    ],
)
def test_resume_of_another_run_is_refused_and_changes_nothing(change, code, shown, semantic_run, copied_run, capsys):
    before = {path: path.read_bytes() for path in copied_run.rglob("*") if path.is_file()}
    assert train([*semantic_run.words, change], copied_run, "--resume") == code
    assert shown in capsys.readouterr().err
    assert {path: path.read_bytes() for path in copied_run.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_terminated_run_is_143_and_resumes(semantic_run, tmp_path, capsys):
    out = tmp_path / "run"
    words = [*semantic_run.words, "run.evaluate_every_steps=null", "run.checkpoint_every_steps=1000000"]
    command = [sys.executable, "tools/train.py", *words, "schedule.steps=1000000", "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("1/1000000") for line in lines)
        process.send_signal(signal.SIGTERM)
        shown = "".join(lines)
        assert process.wait(60) == 143
    assert "the same command with --resume goes on from there" in shown and "Traceback" not in shown
    step = read_state(out / "last.pt").step
    assert step >= 1 and not (out / "last.safetensors").exists()
    assert train([*words, f"schedule.steps={step + 1}"], out, "--resume") == 0
    assert [row["step"] for row in read_metrics(out / "metrics.csv")] == list(range(1, step + 2))
    assert (out / "last.safetensors").is_file() and (out / "scores.json").is_file()


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_two_processes_train_and_score_as_one_evaluates(task, tiny_words, tmp_path, run_python, capsys):
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tools/train.py"]
    done = run_python(*launcher, *tiny_words(task), "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "4 steps of 2 images (2 x 1 x 1) on cpu" in done.stderr
    assert done.stderr.count("training starts from random weights") == 1
    assert main(["evaluate", str(out / "last.safetensors"), "--json", str(tmp_path / "s.json"), "--device", "cpu"]) == 0
    scores, again = json.loads((out / "scores.json").read_text()), json.loads((tmp_path / "s.json").read_text())
    assert scores.pop("step") == 4 and scores.pop("table") and again.pop("model") and again.pop("inference")
    assert again == scores and len(scores["losses"]) >= 2
    assert len(list((out / "pictures").glob("*.png"))) == 2


def refusal(words, capsys, out):
    code = train(words, out)
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.startswith("swin-dense train: ") and captured.err.count("swin-dense train: ") == 1
    assert not out.exists()
    return code, captured.err


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["shapes_instanse"], 2, "there is no recipe 'shapes_instanse'; did you mean 'shapes_instance'?"),
        (["mine.yaml"], 2, "there is no recipe file mine.yaml"),
        (["shapes_instance", "epochs=3"], 2, "unknown key 'epochs'; did you mean 'schedule.epochs'?"),
        (["shapes_instance", "run.sed=3"], 2, "unknown key 'run.sed'; did you mean 'run.seed'?"),
        (["shapes_instance", "run.seed=x"], 2, "run.seed must be a whole number, got 'x'"),
        (["shapes_instance", "schedule.epochs=3"], 2, "give either schedule.epochs or schedule.steps"),
        (["shapes_instance"], 2, "no data folder: add data=/path/to/the/data/set"),
        (["shapes_instance", "data=/not/there"], 3, "data=/not/there: there is no such folder"),
    ],
)
def test_mistakes_in_the_words(words, code, shown, capsys, tmp_path):
    found, message = refusal(words, capsys, tmp_path / "run")
    assert found == code and shown in message


@pytest.mark.parametrize(
    ("task", "change", "code", "shown"),
    [
        ("instance", "optimizer.batch_size=0", 2, "optimizer.batch_size must be 1 or more, got 0"),
        ("instance", "model.head.fpn_chanels=8", 2, "did you mean 'fpn_channels'?"),
        ("instance", "model.variant=swin_x", 2, "there is no Swin variant 'swin_x'"),
        (
            "instance",
            "model.weights=/not/there.pth",
            4,
            "there is no file /not/there.pth, and there are no published weights",
        ),
        ("semantic", "optimizer.micro_batch_size=4", 2, "must be a multiple of 1 processes x"),
        ("semantic", "dataset.classes=null", 2, "set dataset.classes to ade20k, to a text file"),
        ("semantic", "dataset.classes=nowhere.txt", 3, "nowhere.txt"),
    ],
)
def test_mistakes_in_the_recipe(task, change, code, shown, tiny_words, capsys, tmp_path):
    found, message = refusal(tiny_words(task, change), capsys, tmp_path / "run")
    assert found == code and shown in message


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_folder_of_another_kind_is_3(task, tiny_words, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "holiday").mkdir(parents=True)
    words = tiny_words(task, "dataset.classes=[a, b]", f"data={data}")
    code, message = refusal(words, capsys, tmp_path / "run")
    assert code == 3 and str(data) in message and "holiday" in message


@pytest.mark.parametrize(
    ("text", "shown"), [("{", "JSON"), ("[]", ""), ('{"images": []}', ""), ('{"a": 1}', ""), ("", "empty")]
)
def test_annotations_that_are_not_coco_are_3(text, shown, tiny_words, coco_tree, tmp_path, capsys):
    coco_tree.annotation_file.write_text(text)
    files = [f"dataset.{split}_annotations={coco_tree.annotation_file}" for split in ("train", "val")]
    files += [f"dataset.{split}_images={coco_tree.image_folder}" for split in ("train", "val")]
    code, message = refusal(tiny_words("instance", *files), capsys, tmp_path / "run")
    assert code == 3 and coco_tree.annotation_file.name in message and shown in message


def test_label_value_out_of_range_is_3_and_named(tiny_words, tmp_path, capsys):
    code = train(tiny_words("semantic", "dataset.classes=[a, b]"), tmp_path / "run")
    shown = capsys.readouterr().err
    assert code == 3
    line = next(line for line in shown.splitlines() if line.startswith("swin-dense train: "))
    assert ".png" in line and "value" in line
    assert "stands in" not in shown and "cannot be read" not in shown


@pytest.fixture
def broken_words(tiny_words, shapes_root, tmp_path):
    def words(count, *changes):
        """A semantic run whose first training pictures, so many of six, are cut short."""
        broken = tmp_path / "data"
        for part in ("images/training", "annotations/training"):
            (broken / part).mkdir(parents=True)
            for path in (shapes_root / part).iterdir():
                (broken / part / path.name).write_bytes(path.read_bytes())
        for path in sorted((broken / "images" / "training").iterdir())[:count]:
            path.write_bytes(path.read_bytes()[:200])
        files = [f"dataset.train_images={broken / 'images/training'}"]
        files += [f"dataset.train_annotations={broken / 'annotations/training'}"]
        return tiny_words("semantic", *files, *changes)

    return words


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_picture_is_3_and_named(workers, broken_words, tmp_path, capsys):
    assert train(broken_words(6, f"run.workers={workers}"), tmp_path / "run") == 3
    shown = capsys.readouterr().err
    assert "swin-dense train: " in shown and ".jpg" in shown
    assert "Traceback" not in shown and "DataLoader" not in shown


@pytest.mark.parametrize("workers", [0, 1])
def test_one_broken_picture_is_told_of_and_training_goes_on(workers, broken_words, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(broken_words(1, f"run.workers={workers}"), out) == 0
    (event,) = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert event["kind"] == "unreadable" and "another stands in for a picture. " in event["text"]
    assert "shapes_000001.jpg" in event["text"] and event["text"] in capsys.readouterr().err
    assert read_metrics(out / "metrics.csv")[-1]["step"] == 4 and "1 unreadable" in (out / "report.html").read_text()


def test_more_broken_pictures_than_allowed_are_3(broken_words, tmp_path, capsys):
    assert train(broken_words(2, "run.max_unreadable_images=1"), tmp_path / "run") == 3
    shown = capsys.readouterr().err
    assert "2 pictures could not be read, more than run.max_unreadable_images=1" in shown and "Traceback" not in shown


def test_default_folder_is_named_after_the_recipe(tiny_words, tmp_path, monkeypatch, capsys):
    words = tiny_words("semantic", "schedule.steps=1", "run.pictures=1")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words, "--device", "cpu"]) == 0
    assert (tmp_path / "runs" / "shapes_semantic" / "last.safetensors").is_file()
    (picture,) = (tmp_path / "runs" / "shapes_semantic" / "pictures").glob("*.png")
    with Image.open(picture) as image:
        assert image.mode == "RGB"


def test_two_runs_in_one_folder_are_refused(tiny_words, tmp_path, capsys):
    out = tmp_path / "run"
    hold = "import sys, time; from pathlib import Path; from swin_dense.tools.run_lock import only_run_in\n"
    hold += "with only_run_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-P", "-c", hold, str(out)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        code = train(tiny_words("semantic"), out)
        other.kill()
    assert code == 2 and f"process {other.pid} trains here already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["run.lock"]


def test_missing_tensorboard_is_told_before_anything_is_written(tiny_words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tiny_words("semantic", "run.tensorboard=true"), tmp_path / "run") == 2
    assert "pip install 'swin-dense[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "recipe.yaml").exists()
