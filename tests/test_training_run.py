import json

import pytest
import torch
from safetensors.torch import load_file

from swin_dense.errors import ConfigError, DivergenceError
from swin_dense.tools.main import main
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.semantic_task import SemanticTask
from swin_dense.tools.tasks import task_of
from swin_dense.tools.train import train
from swin_dense.tools.training_run import TrainingRun
from swin_dense.training.atomic_file import read_checked
from swin_dense.training.checkpoint import read_state
from swin_dense.training.distributed import Process, unwrap
from swin_dense.training.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def make_run(tiny_words, tmp_path):
    def make(task, *changes, process=Process(0, 0, 1, CPU)):  # noqa: B008
        name, *overrides = tiny_words(task, *changes)
        return TrainingRun(read_recipe(name, overrides), RunFolder(tmp_path / "run"), process)

    return make


def test_length_in_epochs_counts_steps_not_batches(make_run):
    changes = ("schedule.steps=null", "schedule.epochs=3", "optimizer.batch_size=2", "optimizer.micro_batch_size=1")
    run = make_run("semantic", *changes)
    assert (run.micro_batch_size, run.accumulation_steps) == (1, 2)
    assert (run.steps_per_epoch, run.total_steps) == (3, 9)


def test_accumulation_sees_as_many_images(make_run):
    run = make_run("semantic", "optimizer.batch_size=4", "optimizer.micro_batch_size=2", "schedule.steps=3")
    assert run.accumulation_steps == 2
    batches = list(run.batches(start_step=1))
    assert len(batches) == 2 * 2 and all(len(batch.names) == 2 for batch in batches)


def test_batches_go_on_where_they_stopped(make_run):
    run = make_run("instance")
    whole = [batch.image_ids for batch in run.batches(0)]
    assert [batch.image_ids for batch in run.batches(3)] == whole[3:]


def test_seed_decides_the_weights(make_run):
    first, again, other = (make_run("semantic", f"run.seed={seed}").model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("override", ["inference.short_edge=0", "augmentation.flip_probability=2"])
def test_wrong_settings_show_before_the_first_step(override, make_run):
    with pytest.raises(ConfigError, match="augmentation: "):
        make_run("instance", override)


def test_accumulation_trains(tiny_words, tmp_path):
    changes = ("optimizer.batch_size=4", "optimizer.micro_batch_size=2", "schedule.steps=1", "run.pictures=0")
    assert main(["train", *tiny_words("semantic", *changes), "--out", str(tmp_path), "--device", "cpu"]) == 0
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert row["step"] == 1 and not (tmp_path / "pictures").exists()


class StoppedError(Exception):
    """As if the process had ended after a checkpoint."""


def stop_after(step, monkeypatch):
    checkpoint = TrainingRun._checkpoint

    def checkpoint_and_stop(run, at_step):
        checkpoint(run, at_step)
        if at_step == step:
            raise StoppedError

    monkeypatch.setattr(TrainingRun, "_checkpoint", checkpoint_and_stop)


def assert_same_content(first, second, where=""):
    """Tensors bit for bit, everything else equal."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for name in first:
            assert_same_content(first[name], second[name], f"{where}/{name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same_content(*pair, f"{where}/{index}")
    else:
        assert first == second, where


def assert_same_results(first, second):
    """Training state, models, scores and metrics of two run folders; times and memory apart."""
    assert_same_content(read_checked(first / "last.pt"), read_checked(second / "last.pt"))
    for name in ("last.safetensors", "best.safetensors", "scores.json", "recipe.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    rows = [
        [
            {name: value for name, value in row.items() if not name.endswith(("time_s", "memory_gb"))}
            for row in read_metrics(path)
        ]
        for path in (first / "metrics.csv", second / "metrics.csv")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [1, 2, 3, 4]


AVERAGE = "optimizer.average_decay=0.7"
DECAY = "optimizer.layer_decay=0.8"
RESUMED = (
    "schedule.decay=poly",
    "schedule.warmup_steps=2",
    "model.backbone.drop_path_rate=0.3",
    "run.checkpoint_every_steps=1",
    "run.pictures=0",
)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(
    ("task", "stop_step", "changes"),
    [
        pytest.param("instance", 1, (AVERAGE, DECAY), id="within-an-epoch"),
        pytest.param("semantic", 3, (AVERAGE, "run.workers=2"), id="two-workers-across-an-evaluation"),
        pytest.param("instance", 2, (), id="before-an-evaluation", marks=pytest.mark.slow),
        pytest.param("instance", 3, ("run.workers=2", DECAY), id="two-workers", marks=pytest.mark.slow),
        pytest.param("semantic", 1, ("optimizer.max_gradient_norm=0.5",), id="shortened", marks=pytest.mark.slow),
        pytest.param("semantic", 2, ("optimizer.micro_batch_size=1",), id="accumulation", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_run_leaves_the_same_bits(task, stop_step, changes, tiny_words, tmp_path, monkeypatch):
    name, *overrides = tiny_words(task, *RESUMED, *changes)
    recipe = read_recipe(name, overrides)
    train(recipe, RunFolder(tmp_path / "whole"), device="cpu")
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_after(stop_step, patch)
        train(recipe, RunFolder(tmp_path / "parts"), device="cpu")
    assert read_state(tmp_path / "parts" / "last.pt").step == stop_step
    train(recipe, RunFolder(tmp_path / "parts"), device="cpu", resume=True)
    assert_same_results(tmp_path / "whole", tmp_path / "parts")
    state = read_state(tmp_path / "parts" / "last.pt")
    assert state.best_score is not None and (state.average is None) is (AVERAGE not in changes)


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.training_run import TrainingRun
from swin_dense.training.distributed import barrier, distributed

folder, name, *overrides = sys.argv[1:]
recipe = read_recipe(name, overrides)
checkpoint = TrainingRun._checkpoint

def checkpoint_and_stop(run, step):
    checkpoint(run, step)
    if step == 1:
        raise InterruptedError

torch.set_num_threads(1)
with distributed("cpu", timeout_s=120) as process:
    TrainingRun(recipe, RunFolder(Path(folder, "whole")), process).start(resume=False)
    TrainingRun._checkpoint = checkpoint_and_stop
    try:
        TrainingRun(recipe, RunFolder(Path(folder, "parts")), process).start(resume=False)
    except InterruptedError:
        pass
    TrainingRun._checkpoint = checkpoint
    barrier()
    TrainingRun(recipe, RunFolder(Path(folder, "parts")), process).start(resume=True)
os._exit(0)  # Gloo's threads now and then abort the interpreter's teardown
"""


def test_two_processes_stopped_and_resumed_leave_the_same_bits(tiny_words, tmp_path, run_python):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    words = tiny_words("semantic", *RESUMED, AVERAGE, DECAY)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_python(*launcher, script, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert_same_results(tmp_path / "whole", tmp_path / "parts")
    assert len(read_state(tmp_path / "parts" / "last.pt").random_states) == 2


def test_average_is_what_is_kept_and_training_goes_on_without_it(semantic_run, tiny_words, tmp_path):
    name, *overrides = tiny_words("semantic", AVERAGE)
    train(read_recipe(name, overrides), RunFolder(tmp_path), device="cpu")
    plain, averaged = (read_state(folder / "last.pt") for folder in (semantic_run.folder, tmp_path))
    assert_same_content(plain.model, averaged.model)
    assert averaged.average is not None and averaged.average["updates"] == 4
    kept = load_file(tmp_path / "last.safetensors")
    assert_same_content({name: kept[name] for name in averaged.average["tensors"]}, averaged.average["tensors"])
    assert not torch.equal(kept["decode_head.conv_seg.weight"], averaged.model["decode_head.conv_seg.weight"])


def test_divergence_is_5_and_writes_no_state(tiny_words, tmp_path, capsys):
    words = tiny_words("semantic", "optimizer.learning_rate=1.0e+20", "run.checkpoint_every_steps=4")
    assert main(["train", *words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == DivergenceError.exit_code
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.safetensors").exists()


def events_of(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_bad_batch_is_skipped_kept_and_told_of(task, tiny_words, tmp_path, monkeypatch, capsys):
    name, *overrides = words = tiny_words(task, "run.pictures=0", "run.evaluate_every_steps=null")
    kind = type(task_of(read_recipe(name, overrides)))
    compute, calls = kind.losses, []

    def losses(*arguments, **settings):
        calls.append(1)
        terms = compute(*arguments, **settings)
        is_bad = 2 <= len(calls) <= 4  # the second step, its replay, and its first image alone
        return {name: term.times(float("nan")) for name, term in terms.items()} if is_bad else terms

    monkeypatch.setattr(kind, "losses", staticmethod(losses))
    assert main(["train", *words, "--out", str(tmp_path), "--device", "cpu"]) == 0
    (event,) = events_of(tmp_path)
    kept = torch.load(tmp_path / "bad_batches" / "step_000002_rank0.pt", weights_only=True)
    assert (event["step"], event["kind"], kept["verdict"]) == (2, "skipped", "data")
    assert kept["images"] in event["text"] and event["text"] in capsys.readouterr().err
    assert len(kept["batch"]["images"]) == 2 and "," not in kept["images"]
    assert read_state(tmp_path / "last.pt").extra["skipped_steps"] == {"in_a_row": 0, "in_all": 1}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv") if "loss" in row] == [1, 3, 4]


def test_step_out_of_memory_is_told_of(tiny_words, tmp_path, monkeypatch):
    compute = SemanticTask.losses

    def losses(model, batch, device):
        if len(batch.ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(model, batch, device)

    monkeypatch.setattr(SemanticTask, "losses", staticmethod(losses))
    words = tiny_words("semantic", "run.pictures=0", "run.evaluate_every_steps=null")
    assert main(["train", *words, "--out", str(tmp_path), "--device", "cpu"]) == 0
    events = events_of(tmp_path)
    assert [event["step"] for event in events] == [1, 2, 3, 3] and events[0]["text"].endswith("redone in 2 parts")


def test_summary_says_what_is_trained(make_run):
    summary = make_run("instance")._summary(start_step=0)
    assert "6 training and 4 validation images, 6 classes" in summary
    assert "4 steps of 2 images (1 x 2 x 1) on cpu" in summary
    assert "training starts from random weights: model.weights is null" in summary
    assert "learning rate 0.001\n" in summary


def test_optimiser_gets_the_scaled_rate_and_layer_decay(make_run):
    run = make_run("semantic", "optimizer.reference_batch_size=8", "optimizer.learning_rate=0.4", DECAY)
    rates = [group["initial_lr"] for group in run.optimizer.param_groups]
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(0.1 * 0.8**5)


def test_summary_shows_the_receipt_of_the_weights(make_run, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save(unwrap(make_run("semantic").model).backbone.state_dict(), path, pickle_protocol=2)
    run = make_run("semantic", f"model.weights={path}")
    receipt = [line for line in run._summary(start_step=0).splitlines() if "100.0% of the backbone" in line]
    assert receipt and str(path) in receipt[0]


def test_a_run_goes_on_with_the_classes_that_it_began_with(tiny_words, shapes_root, tmp_path, capsys):
    out, names = tmp_path / "run", (shapes_root / "classes.txt").read_text().split("\n")
    assert main(["train", *tiny_words("semantic"), "--out", str(out), "--device", "cpu"]) == 0
    (tmp_path / "classes.txt").write_text("\n".join([names[1], names[0], *names[2:]]))
    words = tiny_words("semantic", f"dataset.classes={tmp_path / 'classes.txt'}", "schedule.steps=5")
    capsys.readouterr()
    assert main(["train", *words, "--out", str(out), "--device", "cpu", "--resume"]) == 3
    shown = capsys.readouterr().err
    assert "the run goes on with other data: its classes differ" in shown
    assert f"1 {names[0]}, 2 {names[1]}" in shown and f"1 {names[1]}, 2 {names[0]}" in shown


def test_what_changed_since_a_run_was_stopped_is_told(tiny_words, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *tiny_words("semantic"), "--out", str(out), "--device", "cpu"]) == 0
    words = tiny_words("semantic", "schedule.steps=5", "augmentation.flip_probability=0.25")
    assert main(["train", *words, "--out", str(out), "--device", "cpu", "--resume"]) == 0
    shown = capsys.readouterr().err
    assert "since the run was stopped, augmentation.flip_probability is 0.25, no longer 0.5" in shown
    assert shown.count("since the run was stopped") == 2
