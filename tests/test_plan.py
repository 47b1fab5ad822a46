import json

import pytest

from swin_dense.tools import planning
from swin_dense.tools.main import main
from swin_dense.tools.plan import conclusions, table
from swin_dense.tools.step_cost import StepCost

pytestmark = pytest.mark.usefixtures("one_thread")
ALL, TWO = [0, 1, 2, 3], [0, 1]


def candidate(size, peak_gb, step_s, stages=()):
    return {
        "micro_batch_size": size,
        "accumulation_steps": 8 // size,
        "checkpoint_stages": list(stages),
        "peak_memory_gb": peak_gb,
        "step_time_s": step_s,
        "fits": peak_gb is not None and peak_gb < 7,
    }


def figures(**changes):
    return {
        "memory_gb": 8.0,
        "usable_share": 0.9,
        "batch_size": 8,
        "workers": 2,
        "total_steps": 36000,
        "worst_batch": {"size_hw": (800, 1333), "objects": 128, "images": 4},
        "candidates": [candidate(8, None, None), candidate(4, 6.8, 0.4)],
        "checkpointing": [candidate(4, 4.1, 0.5, ALL), candidate(4, 5.0, 0.44, TWO)],
        "recommended": {"optimizer.micro_batch_size": 4},
        "step_time_s": 0.4,
        "loading_time_s": 0.3,
        "run_time_s": 14400.0,
        **changes,
    }


def test_table_has_a_row_for_everything_measured():
    rows = table(figures())
    recomputing = ["4 x 2, recomputing stages [0, 1, 2, 3]", "4 x 2, recomputing stages [0, 1]"]
    assert list(rows) == ["8 x 1", "4 x 2", *recomputing]
    assert rows["8 x 1"] == {"peak GB": "> 8.0", "s/step": None, "images/s": None, "fits": "no"}
    assert rows["4 x 2"] == {"peak GB": "6.8", "s/step": "0.4", "images/s": "20.0", "fits": "yes"}


def test_conclusions_can_be_pasted_and_say_what_stays():
    assert conclusions(figures()) == [
        "largest batch of 4: 800 x 1333 pixels, 128 objects in each",
        "recomputing activations of stages [0, 1, 2, 3]: peak 6.8 -> 4.1 GB, +25% time",
        "recomputing activations of stages [0, 1]: peak 6.8 -> 5.0 GB, +10% time",
        "the loader keeps up: 0.3 s to load a step's images, 0.4 s to train on them",
        "the run takes 4:00:00 at most, 36000 steps as slow as these; evaluation is not included",
        "recommended: optimizer.micro_batch_size=4",
        "a step stays one of 8 images, and so does the learning rate",
    ]


def test_recomputing_is_said_to_make_the_difference():
    shown = conclusions(
        figures(
            candidates=[candidate(1, None, None)],
            checkpointing=[candidate(1, 4.1, 0.5, ALL), candidate(1, None, None, TWO)],
            recommended={"optimizer.micro_batch_size": 1, "model.backbone.checkpoint_stages": ALL},
        )
    )
    assert "recomputing activations of stages [0, 1, 2, 3]: peak 4.1 GB instead of more than there is" in shown
    assert not any("stages [0, 1]:" in line for line in shown)
    assert "recommended: optimizer.micro_batch_size=1 model.backbone.checkpoint_stages=[0,1,2,3]" in shown


@pytest.mark.parametrize(
    ("workers", "loading_s", "shown"),
    [
        (2, 0.4, "the loader keeps up: 0.4 s to load"),
        (2, 0.41, "the loader does not keep up: 0.41 s to load"),
        (0, 0.1, "0.1 s to load a step's images, 0.4 s to train on them, one after the other: run.workers is 0"),
    ],
)
def test_loader_is_compared_with_the_step(workers, loading_s, shown):
    found = conclusions(figures(workers=workers, loading_time_s=loading_s))
    assert any(line.startswith(shown) for line in found)


@pytest.fixture
def fake_cost(monkeypatch):
    def measure(job, on_step):
        size = job.split.micro_batch_size
        return StepCost(2 * size * 10**9, 0.5) if 2 * size * 10**9 < job.memory_bytes else None

    monkeypatch.setattr(planning, "step_cost", measure)


def plan(words, *options):
    return main(["plan", *words, "--device", "cpu", "--memory-limit", "3.5", *options])


@pytest.mark.parametrize("task", ["instance", "semantic", "classification"])
def test_every_task_is_planned(task, tiny_words, classification_words, fake_cost, tmp_path, capsys):
    words = classification_words() if task == "classification" else tiny_words(task)
    assert plan(words, "--json", str(tmp_path / "plan.json")) == 0
    shown = capsys.readouterr().out
    assert "recommended: optimizer.micro_batch_size=1" in shown and "learning rate" in shown
    assert "2 x 1" in shown and "1 x 2" in shown and "they may take 70% of 3.5 GB" in shown
    found = json.loads((tmp_path / "plan.json").read_text())
    assert set(figures()) < set(found) and {"machine", "world_size", "peak_memory_gb"} < set(found)
    assert found["recommended"] == {"optimizer.micro_batch_size": 1} and found["peak_memory_gb"] == 2
    assert (found["worst_batch"]["objects"] is None) == (task != "instance")


def test_nothing_that_fits_is_1(tiny_words, fake_cost, tmp_path, capsys):
    assert plan(tiny_words("semantic"), "--memory-limit", "1", "--json", str(tmp_path / "plan.json")) == 1
    shown = capsys.readouterr().out
    assert "nothing fits into 1.0 GB: train on smaller images, or take a smaller model" in shown
    assert "recommended" not in shown
    assert json.loads((tmp_path / "plan.json").read_text())["recommended"] is None


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--steps", "0"], "--steps must be above 0, got 0."),
        (["--world-size", "-1"], "--world-size must be above 0, got -1."),
        (["--memory-limit", "nan"], "--memory-limit must be above 0, got nan."),
        (["--world-size", "3"], "optimizer.batch_size=2 must be a multiple of 3 processes"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["model.head.chanels=8"], "did you mean 'channels'?"),
    ],
)
def test_mistakes_are_2_and_told(options, shown, tiny_words, fake_cost, capsys):
    assert plan(tiny_words("semantic"), *options) == 2
    captured = capsys.readouterr()
    assert shown in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_missing_data_are_3(tiny_words, fake_cost, capsys):
    assert plan(tiny_words("semantic", "data=/not/there")) == 3
    assert "data=/not/there: there is no such folder" in capsys.readouterr().err


def test_nothing_is_written_without_being_asked(tiny_words, fake_cost, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan(tiny_words("semantic")) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_steps_are_measured(tiny_words, tmp_path, capsys):
    assert plan(tiny_words("instance"), "--steps", "1", "--json", str(tmp_path / "plan.json")) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["recommended"] == {"optimizer.micro_batch_size": 2}
    assert 0 < found["peak_memory_gb"] < 3.5 and found["step_time_s"] > 0
