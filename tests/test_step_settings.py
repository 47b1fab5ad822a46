import pytest
import torch

from swin_dense.errors import ConfigError
from swin_dense.tools.recipe import ScheduleSettings, read_recipe
from swin_dense.tools.step_settings import build_schedule, optimizer_text, resolve_precision, split_batch
from swin_dense.training.optimizer import build_optimizer

CPU = torch.device("cpu")
DECAY = "optimizer.layer_decay=0.8"
AVERAGE = "optimizer.average_decay=0.7"


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
    [(5, 2, 1), (3, "null", 2), (1, "null", 2), (2, 4, 1)],
)
def test_split_batch_refuses_what_does_not_divide(batch, micro, world_size):
    with pytest.raises(ConfigError, match=rf"optimizer\.batch_size={batch} must be a multiple of") as caught:
        split_batch(recipe_with(batch, micro), world_size)
    part = "" if micro == "null" else f" x optimizer.micro_batch_size={micro}"
    assert f" {world_size} processes{part}; change one" in str(caught.value)


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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ((), "learning rate 6e-05"),
        (("optimizer.reference_batch_size=null", "optimizer.batch_size=4"), "learning rate 6e-05"),
        (
            ("optimizer.batch_size=4",),
            "learning rate 6e-05 for 16 images, 1.5e-05 for 4 "
            "(schedule.steps=640000 sees as many images as 160000 steps of 16)",
        ),
        (
            ("schedule.epochs=9", "schedule.steps=null", "optimizer.batch_size=32", DECAY, AVERAGE),
            "learning rate 6e-05 for 16 images, 0.00012 for 32, layer decay 0.8, "
            "evaluated is the average of the weights (decay 0.7)",
        ),
    ],
)
def test_summary_says_what_became_of_the_learning_rate(changes, text):
    assert optimizer_text(read_recipe("upernet_swin_t_160k", changes)) == text
