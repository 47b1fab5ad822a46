"""Runs of `swin-dense train` that are killed, stopped, starved and restarted: each ends as the uninterrupted one."""

import json
import os
import pickle
import resource
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swin_dense.classification import classifier
from swin_dense.config import SwinConfig
from swin_dense.conventions import IGNORED_LABEL
from swin_dense.errors import CheckpointError, DivergenceError
from swin_dense.heads import cascade_mask_rcnn, mask_rcnn, upernet
from swin_dense.heads.model_file import load_model, read_about
from swin_dense.tools import evaluation
from swin_dense.tools.evaluation import evaluate
from swin_dense.tools.main import main
from swin_dense.tools.predictors import recipe_and_labels
from swin_dense.tools.semantic_task import SemanticTask
from swin_dense.tools.tasks import task_of
from swin_dense.tools.training_run import TrainingRun
from swin_dense.training.checkpoint import read_state
from swin_dense.training.distributed import Process
from swin_dense.training.loop import _Steps
from swin_dense.training.metrics_file import read_metrics

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.skipif(os.name != "posix", reason="signals"),
]
HELPERS = Path(__file__).with_name("survival_helpers.py")
CPU = torch.device("cpu")
LIVELY = ("optimizer.average_decay=0.7", "model.backbone.drop_path_rate=0.3")


def train(words, out, *options):
    return main(["train", *words, "--out", str(out), "--device", "cpu", *options])


def bits(value):
    """Tensors as types, shapes and bytes: what compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(item) for name, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


def measured_rows(folder):
    """What metrics.csv holds besides times and memory."""
    unequal = ("step_time_s", "data_time_s", "peak_memory_gb")
    rows = read_metrics(folder / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in unequal} for row in rows]


def state_bits(folder):
    """All of a training state but Python's own generator, which nothing here draws from or seeds."""
    state = vars(read_state(folder / "last.pt"))
    return bits({**state, "random_states": [[each["torch"], each["cuda"]] for each in state["random_states"]]})


def assert_same_run(found, expected):
    """The same weights, average, optimiser, models, scores and metrics to the last bit, and nothing unfinished."""
    assert state_bits(found) == state_bits(expected)
    for name in ("last.safetensors", "best.safetensors", "scores.json", "recipe.yaml"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert measured_rows(found) == measured_rows(expected)
    assert list(found.rglob("*.tmp")) == []


def assert_everything_opens(folder):
    """Every tensor file of a run can be read without running anything of it."""
    for path in folder.rglob("*.pt"):
        assert torch.load(path, weights_only=True)
    for path in folder.rglob("*.safetensors"):
        assert load_file(path)


# ---- Killed at any instant.


@pytest.fixture
def other_file_system(tmp_path, monkeypatch):
    """A folder for temporary files that is not on the run's disk, where the machine has one."""
    memory = Path("/dev/shm")
    is_other = memory.is_dir() and memory.stat().st_dev != tmp_path.stat().st_dev and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if is_other else tmp_path.parent) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.parametrize(
    ("task", "kills", "changes"),
    [
        ("semantic", 3, ("schedule.steps=4",)),
        pytest.param("semantic", 25, ("run.workers=1", "optimizer.micro_batch_size=1"), marks=pytest.mark.slow),
        pytest.param("instance", 25, ("run.checkpoint_every_steps=1",), marks=pytest.mark.slow),
    ],
)
def test_killed_run_loses_one_interval_and_ends_in_the_same_bits(
    task, kills, changes, tiny_words, tmp_path, run_python, other_file_system
):
    words = tiny_words(task, *LIVELY, "schedule.steps=40", "run.evaluate_every_steps=8", "run.pictures=1", *changes)
    interval = 1 if "run.checkpoint_every_steps=1" in changes else 2
    done = run_python(HELPERS, tmp_path, kills, 7, *words)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "kills.json").read_text())
    assert len(report) == kills
    for kill in report:
        assert kill["step_after"] >= max(kill["step_before"], kill["last_row"] - interval), kill
    runs = sorted(tmp_path.glob("run_*/"))
    assert runs
    for run in runs:
        assert_same_run(run, tmp_path / "whole")
        assert_everything_opens(run)
        found = {kill["step_after"] for kill in report if kill["run"] == run.name}
        lines = run.with_suffix(".log").read_text().splitlines()
        assert {int(line.rpartition(" ")[2]) for line in lines if line.startswith("the run goes on after")} <= found


def test_run_killed_before_its_first_state_begins_anew(tiny_words, semantic_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(TrainingRun, "_checkpoint", lambda run, step: sys.exit())
        train(semantic_run.words, folder)
    assert not (folder / "last.pt").exists()
    assert train(semantic_run.words, folder) == 2
    assert train(semantic_run.words, folder, "--resume") == 0
    assert_same_run(folder, semantic_run.folder)


# ---- Stopped by a signal.


def send_at(call, function, *numbers):
    """The function, sending signals to this process when it is called for that time, counted from 1."""
    calls = []

    def sending(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return sending


@pytest.mark.parametrize(
    ("task", "number", "picture", "step"),
    [
        ("instance", signal.SIGTERM, 7, 4),
        ("semantic", signal.SIGINT, 4, 2),
        pytest.param("instance", signal.SIGINT, 1, 2, marks=pytest.mark.slow),
        pytest.param("semantic", signal.SIGTERM, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_signal_in_an_evaluation_ends_at_once_and_the_evaluation_is_made_again(
    task, number, picture, step, request, tmp_path, monkeypatch, capsys
):
    tiny_run = request.getfixturevalue(f"{task}_run")
    kind = type(evaluator_of(tiny_run))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "add", send_at(picture, kind.add, number))
        assert train(tiny_run.words, tmp_path) == 128 + number
    assert "the same command with --resume goes on from there" in capsys.readouterr().err
    assert read_state(tmp_path / "last.pt").step == step
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv") if "val" in " ".join(row)] == [2] * (step > 2)
    assert train(tiny_run.words, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, tiny_run.folder)


def evaluator_of(run):
    recipe, label_map = recipe_and_labels(run.last_model, read_about(run.last_model), [])
    return task_of(recipe).validation_data(label_map).evaluator()


@pytest.mark.parametrize(
    ("numbers", "save", "code", "step"),
    [
        ([signal.SIGTERM], 1, 143, 2),
        pytest.param([signal.SIGINT], 1, 130, 2, marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM, signal.SIGTERM], 2, 143, 4, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGINT], 1, 130, None, marks=pytest.mark.slow),
        ([signal.SIGINT, signal.SIGINT], 2, 130, 2),
    ],
)
def test_signal_in_a_save_leaves_whole_files(numbers, save, code, step, semantic_run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", send_at(save, torch.save, *numbers))
        assert train(semantic_run.words, tmp_path) == code
    assert (step is None) == (not (tmp_path / "last.pt").exists())
    assert step is None or read_state(tmp_path / "last.pt").step == step
    assert list(tmp_path.rglob("*.tmp")) == []
    assert train(semantic_run.words, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, semantic_run.folder)


# ---- Planted faults.


def test_weight_that_turns_nan_is_5_and_the_last_good_state_stays(semantic_run, tmp_path, monkeypatch, capsys):
    log = TrainingRun._log

    def log_and_spoil(run, step_log):
        log(run, step_log)
        if step_log.step == 3:
            with torch.no_grad():
                run.model.decode_head.conv_seg.weight[0, 0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_log", log_and_spoil)
        assert train(semantic_run.words, tmp_path) == DivergenceError.exit_code
    shown = capsys.readouterr().err
    assert "step 4: training diverged: " in shown and "decode_head.conv_seg.weight" in shown
    assert read_state(tmp_path / "last.pt").step == 2
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "last.safetensors").values())
    assert train(semantic_run.words, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, semantic_run.folder)


def test_overflow_of_bfloat16_alone_is_skipped_and_named(tiny_words, tmp_path, monkeypatch, capsys):
    compute, updates = SemanticTask.losses, []

    def losses(model, batch, device):
        terms = compute(model, batch, device)
        overflows = len(updates) == 1 and torch.is_autocast_enabled("cpu")
        return {name: term.times(float("inf")) for name, term in terms.items()} if overflows else terms

    def skip(steps):
        updates.append("skipped")
        skip_step(steps)

    skip_step = _Steps._skip
    monkeypatch.setattr(_Steps, "_skip", skip)
    monkeypatch.setattr(TrainingRun, "_log", lambda run, log: updates.append(log.step))
    monkeypatch.setattr(SemanticTask, "losses", staticmethod(losses))
    words = tiny_words("semantic", "optimizer.precision=bfloat16", "run.evaluate_every_steps=null")
    assert train(words, tmp_path) == 0
    assert updates == [1, "skipped", 3, 4]
    shown = capsys.readouterr().err
    assert "step 2: skipped, 1 in a row" in shown and "Verdict: precision" in shown
    assert read_state(tmp_path / "last.pt").extra["skipped_steps"] == {"in_a_row": 0, "in_all": 1}


def test_disk_that_takes_no_file_of_that_size_keeps_what_was_there(semantic_run, tmp_path, capsys):
    """A limit of the kernel, not a replaced function: the training state does not fit, all else does."""
    assert train([*semantic_run.words, "schedule.steps=2"], tmp_path) == 0
    before = (tmp_path / "last.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        assert train(semantic_run.words, tmp_path, "--resume") == CheckpointError.exit_code
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr().err
    assert "step 4: last.pt is not saved, the run goes on: " in shown and "the run is done, but" in shown
    assert (tmp_path / "last.pt").read_bytes() == before and list(tmp_path.rglob("*.tmp")) == []
    assert train(semantic_run.words, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, semantic_run.folder)


# ---- torchrun starts dead processes anew, with the same command line.


def test_restart_by_torchrun_goes_on_without_resume_and_only_in_its_own_run(
    semantic_run, tmp_path, monkeypatch, capsys
):
    def started(run_id, restarts, words=semantic_run.words):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        return train(words, tmp_path)

    assert started("first", 1, [*semantic_run.words, "schedule.steps=2"]) == 0  # nothing there yet: from the beginning
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert started("first", 0) == started("second", 1) == 2
    assert capsys.readouterr().err.count("is not empty: continue that run with --resume") == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert started("first", 1) == 0
    assert "the run goes on after step 2" in capsys.readouterr().err
    assert_same_run(tmp_path, semantic_run.folder)


DYING = """
import os, signal, sys
import torch
from swin_dense.tools.main import leave, main
from swin_dense.tools.training_run import TrainingRun

rank, step, *words = sys.argv[1:]
log = TrainingRun._log

def log_and_die(run, step_log):
    log(run, step_log)
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_first and (run.process.rank, step_log.step) == (int(rank), int(step)):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
TrainingRun._log = log_and_die
leave(main(["train", *words]))
"""
LAUNCHER = ("-m", "torch.distributed.run", "--standalone")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "rank", "step"), [("semantic", 1, 3), ("instance", 0, 3), ("semantic", 0, 1)])
def test_killed_rank_restarts_and_the_run_ends_in_the_same_bits(task, rank, step, tiny_words, tmp_path, run_python):
    script = tmp_path / "script.py"
    script.write_text(DYING)
    words = [*tiny_words(task, *LIVELY), "--device", "cpu"]
    for name, dying_step in (("whole", 0), ("killed", step)):
        launcher = [*LAUNCHER, "--nproc-per-node=2", "--max-restarts=3"]
        done = run_python(*launcher, script, rank, dying_step, *words, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert ("exitcode: -9" in done.stderr) == (dying_step > 0), done.stderr
    assert ("the run goes on after step 2" in done.stderr) == (step > 2)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert len(read_state(tmp_path / "killed" / "last.pt").random_states) == 2


# ---- Scores do not depend on how many processes share the images.


def scores_of(run, world_size, monkeypatch):
    """Scores of so many processes, one after another; what they send is pickled."""
    recipe, label_map = recipe_and_labels(run.last_model, read_about(run.last_model), [])
    task = task_of(recipe)
    model, _ = load_model(run.last_model)
    predictor = task.predictor(model, label_map, CPU)
    sent = {}

    def gather(value):
        kept = sent.setdefault(type(value), [])
        kept.insert(0, pickle.loads(pickle.dumps(value)))
        return kept if len(kept) == world_size else None

    monkeypatch.setattr(evaluation, "gather_objects", gather)
    for rank in reversed(range(world_size)):
        process = Process(rank, rank, world_size, CPU)
        scores = evaluate(predictor, task.validation_data(label_map), process, with_losses=True)
        assert (scores is None) == (rank > 0)
    return scores


def test_scores_of_any_number_of_processes_are_the_same_bits(tiny_run, monkeypatch):
    alone = scores_of(tiny_run, 1, monkeypatch)
    assert alone["losses"]
    for world_size in (2, 3, 5):  # one of five has no image
        assert json.dumps(scores_of(tiny_run, world_size, monkeypatch)) == json.dumps(alone)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_scores_of_processes_under_torchrun_are_those_of_one(processes, tiny_run, tmp_path, run_python, capsys):
    words = ["evaluate", tiny_run.last_model, "--device", "cpu", "--json"]
    launcher = [*LAUNCHER, f"--nproc-per-node={processes}", "-m", "swin_dense.tools.main"]
    done = run_python(*launcher, *words, tmp_path / "many.json")
    assert done.returncode == 0, done.stderr
    assert main([*map(str, words), str(tmp_path / "one.json")]) == 0
    assert (tmp_path / "many.json").read_bytes() == (tmp_path / "one.json").read_bytes()


# ---- Every parameter gets a gradient, whatever the images hold: the processes exchange all of them.

CONFIGS = {
    "v1": SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.5),
    "v2": SwinConfig(
        version=2,
        embed_dim=8,
        depths=(1, 1, 2, 1),
        num_heads=(1, 1, 2, 2),
        window_size=4,
        drop_path_rate=0.5,
        absolute_pos_embed_hw=(16, 16),
        checkpoint_stages=(1, 2),
    ),
}
DETECTORS = {"mask_rcnn": mask_rcnn, "cascade_mask_rcnn": cascade_mask_rcnn}


def detector_losses(build, counts, config):
    detector = build(config, 3, fpn_channels=8, box_head_channels=16, mask_head_channels=8)
    boxes = torch.tensor([[5.0, 4.0, 30.0, 29.0], [11.0, 7.0, 33.0, 23.0]])
    targets = [
        {"boxes": boxes[:count], "labels": torch.arange(count), "masks": torch.ones(count, 41, 37, dtype=torch.uint8)}
        for count in counts
    ]
    return detector, detector([torch.rand(3, 41, 37) for _ in counts], targets)


def segmenter_losses(labels, config):
    segmenter = upernet(config, 3, channels=8, auxiliary_channels=6)
    return segmenter, segmenter(torch.rand(2, 3, 41, 37), labels)


def classifier_losses(config):
    model = classifier(config, 3)
    return model, {"loss": model(torch.rand(2, 3, 41, 37)).square().sum()}


MODELS = {
    **{
        f"{name} {counts}": partial(detector_losses, build, counts)
        for name, build in DETECTORS.items()
        for counts in ((2, 1), (0, 2), (0, 0))
    },
    "upernet": partial(segmenter_losses, torch.arange(2 * 41 * 37).reshape(2, 41, 37) % 3),
    "upernet ignored": partial(segmenter_losses, torch.full((2, 41, 37), IGNORED_LABEL)),
    "classifier": classifier_losses,
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_finite_gradient(name, family):
    torch.manual_seed(0)
    model, losses = MODELS[name](CONFIGS[family])
    sum(losses.values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
