import pytest
import torch

from swin_dense.errors import ConfigError, DivergenceError
from swin_dense.tools.main import main
from swin_dense.tools.recipe import ScheduleSettings, read_recipe
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.training_run import TrainingRun, build_schedule, resolve_precision, split_batch
from swin_dense.training.distributed import Process, unwrap
from swin_dense.training.metrics_file import read_metrics
from swin_dense.training.optimizer import build_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def make_run(tiny_words, tmp_path):
    def make(task, *changes, process=Process(0, 0, 1, CPU)):  # noqa: B008
        name, *overrides = tiny_words(task, *changes)
        return TrainingRun(read_recipe(name, overrides), RunFolder(tmp_path / "run"), process)

    return make


def recipe_with(batch_size, micro_batch_size):
    overrides = [f"optimizer.batch_size={batch_size}", f"optimizer.micro_batch_size={micro_batch_size}"]
    return read_recipe("shapes_instance", overrides)


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "expected"),
    [
        (4, 2, 1, (2, 2)),
        (16, "null", 8, (2, 1)),
        (16, 1, 8, (1, 2)),
        (16, "null", 1, (16, 1)),
        (6, 1, 3, (1, 2)),
    ],
)
def test_split_batch_multiplies_back(batch, micro, world_size, expected):
    assert split_batch(recipe_with(batch, micro), world_size) == expected
    assert expected[0] * expected[1] * world_size == batch


@pytest.mark.parametrize(
    ("batch", "micro", "world_size"),
    [(5, 2, 1), (3, "null", 2), (1, "null", 2), (4, 0, 1), (4, -2, 1), (0, "null", 1), (2, 4, 1)],
)
def test_split_batch_refuses_what_does_not_divide(batch, micro, world_size):
    with pytest.raises(ConfigError, match=rf"optimizer\.batch_size={batch} must be a multiple of {world_size} proc"):
        split_batch(recipe_with(batch, micro), world_size)


def test_precision_rule(monkeypatch):
    cuda = torch.device("cuda")
    for has_bfloat16, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=has_bfloat16: answer)
        assert resolve_precision("auto", cuda) == expected
    assert resolve_precision("auto", CPU) == "float32"
    assert resolve_precision("bfloat16", CPU) == "bfloat16" and resolve_precision("float32", cuda) == "float32"


def rates(settings, steps_per_epoch, total_steps):
    optimizer = build_optimizer(torch.nn.Linear(1, 1), learning_rate=1.0, weight_decay=0.0)
    scheduler = build_schedule(optimizer, settings, steps_per_epoch, total_steps)
    found = []
    for _ in range(total_steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_milestones_have_the_unit_of_the_length():
    in_epochs = ScheduleSettings(epochs=3, milestones=(1, 2), warmup_steps=0)
    in_steps = ScheduleSettings(steps=9, milestones=(3, 6), warmup_steps=0)
    expected = [1.0] * 3 + [0.1] * 3 + [0.01] * 3
    assert rates(in_epochs, 3, 9) == pytest.approx(expected) == rates(in_steps, 3, 9)


def test_warmup_is_in_steps_and_poly_ends_at_its_minimum():
    settings = ScheduleSettings(steps=10, decay="poly", warmup_steps=2, warmup_start=0.5, minimum_factor=0.2)
    found = rates(settings, 5, 10)
    assert found[0] == pytest.approx(0.5) and found[2] == pytest.approx(1 - 0.8 * 0.2)
    assert found[9] == pytest.approx(0.2 + 0.8 * 0.1)


def test_length_in_epochs_counts_steps_not_batches(make_run):
    changes = ("schedule.steps=null", "schedule.epochs=3", "optimizer.batch_size=2", "optimizer.micro_batch_size=1")
    run = make_run("semantic", *changes)
    assert (run.micro_batch_size, run.accumulation_steps) == (1, 2)
    assert (run.steps_per_epoch, run.total_steps) == (3, 9)


def test_accumulation_sees_as_many_images(make_run):
    run = make_run("semantic", "optimizer.batch_size=4", "optimizer.micro_batch_size=2", "schedule.steps=3")
    assert run.accumulation_steps == 2
    batches = list(run._batches(start_step=1))
    assert len(batches) == 2 * 2 and all(len(batch.names) == 2 for batch in batches)


def test_batches_go_on_where_they_stopped(make_run):
    run = make_run("instance")
    whole = [batch.image_ids for batch in run._batches(0)]
    assert [batch.image_ids for batch in run._batches(3)] == whole[3:]


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


def test_divergence_is_5_and_writes_no_state(tiny_words, tmp_path, capsys):
    words = tiny_words("semantic", "optimizer.learning_rate=1.0e+20", "run.checkpoint_every_steps=4")
    assert main(["train", *words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == DivergenceError.exit_code
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_summary_says_what_is_trained(make_run):
    summary = make_run("instance")._summary(start_step=0)
    assert "6 training and 4 validation images, 6 classes" in summary
    assert "4 steps of 2 images (1 x 2 x 1) on cpu" in summary
    assert "training starts from random weights: model.weights is null" in summary


def test_summary_shows_the_receipt_of_the_weights(make_run, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save(unwrap(make_run("semantic").model).backbone.state_dict(), path, pickle_protocol=2)
    run = make_run("semantic", f"model.weights={path}")
    receipt = [line for line in run._summary(start_step=0).splitlines() if "100.0% of the backbone" in line]
    assert receipt and str(path) in receipt[0]
