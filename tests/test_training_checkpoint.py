import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from swin_dense.errors import CheckpointError, DivergenceError
from swin_dense.training.atomic_file import read_checked, write_checked
from swin_dense.training.checkpoint import (
    capture_state,
    has_state,
    load_state,
    read_state,
    restore_state,
    save_state,
)
from swin_dense.training.optimizer import build_optimizer
from swin_dense.training.schedule import poly_schedule
from swin_dense.training.weight_average import WeightAverage


class Run:
    def __init__(self, seed=0, width=5, frozen=False, average_decay=None):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 2))
        self.model[0].requires_grad_(not frozen)
        self.optimizer = build_optimizer(self.model, learning_rate=0.05, weight_decay=0.1)
        self.scheduler = poly_schedule(self.optimizer, total_steps=20, warmup_steps=3, warmup_start=0.1)
        self.average = None if average_decay is None else WeightAverage(self.model, average_decay)
        self.parts = (self.model, self.optimizer, self.scheduler)

    def advance(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.rand(7, 3) * random.random()).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            if self.average is not None:
                self.average.update()
        return self

    def save(self, folder, step, **settings):
        return save_state(folder, capture_state(*self.parts, step=step, average=self.average, **settings))

    def restore(self, folder):
        return restore_state(load_state(folder).state, *self.parts, average=self.average)


def assert_same_weights(first, second):
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_restored_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    run = Run()
    run.advance(4).save(tmp_path, step=4, best_score=0.5, extra={"classes": ["a", "b"]})
    run.advance(6)
    loaded = load_state(tmp_path)
    assert (loaded.state.step, loaded.state.best_score, loaded.messages) == (4, 0.5, ())
    assert loaded.state.extra == {"classes": ["a", "b"]}
    resumed = Run(seed=9)
    assert restore_state(loaded.state, *resumed.parts) == ()
    resumed.advance(6)
    assert_same_weights(run, resumed)
    assert resumed.scheduler.get_last_lr() == run.scheduler.get_last_lr()


def averaged_weights(run):
    with run.average.applied():
        return torch.cat([tensor.detach().flatten() for tensor in run.model.state_dict().values()])


def test_restored_run_with_an_average_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    run = Run(average_decay=0.9)
    run.advance(4).save(tmp_path, step=4)
    run.advance(6)
    resumed = Run(seed=9, average_decay=0.9)
    assert resumed.restore(tmp_path) == ()
    resumed.advance(6)
    assert_same_weights(run, resumed)
    assert torch.equal(averaged_weights(run), averaged_weights(resumed)) and resumed.average.updates == 10


def test_average_that_was_not_saved_begins_with_the_restored_weights(tmp_path):
    Run().advance(4).save(tmp_path, step=4)
    resumed = Run(seed=9, average_decay=0.9)
    (message,) = resumed.restore(tmp_path)
    assert message == "the run was saved without an average of its weights: that begins with the restored ones."
    weights = torch.cat([tensor.flatten() for tensor in resumed.model.state_dict().values()])
    assert torch.equal(averaged_weights(resumed), weights) and resumed.average.updates == 0


def test_average_that_is_not_wanted_any_more_is_given_up_in_words(tmp_path):
    run = Run(average_decay=0.9)
    run.advance(4).save(tmp_path, step=4)
    resumed = Run(seed=9)
    assert resumed.restore(tmp_path) == ("the average of the weights that the run was saved with is given up.",)
    assert_same_weights(run, resumed)


def test_restore_state_of_another_average_changes_nothing(tmp_path):
    Run(average_decay=0.9).save(tmp_path, step=1)
    state = load_state(tmp_path).state
    resumed = Run(seed=9, average_decay=0.9)
    before = averaged_weights(resumed)
    with pytest.raises(CheckpointError, match=r"another model: tensors 9 missing"):
        restore_state(replace(state, average={"updates": 1, "tensors": {}}), *resumed.parts, average=resumed.average)
    weights = torch.cat([tensor.flatten() for tensor in resumed.model.state_dict().values()])
    assert torch.equal(averaged_weights(resumed), before) and torch.equal(weights, before)


def test_state_of_another_version_says_so(tmp_path):
    Run().save(tmp_path, step=1)
    content = read_checked(tmp_path / "last.pt")
    del content["average"]
    write_checked(tmp_path / "last.pt", {**content, "format": "swin_dense training state 1"})
    with pytest.raises(CheckpointError, match=r"another version of this library: 'swin_dense training state 1', this"):
        load_state(tmp_path)


def test_save_state_keeps_the_previous_one(tmp_path):
    run = Run()
    assert not has_state(tmp_path / "run")
    for step in (1, 2, 3):
        run.advance(1).save(tmp_path / "run", step=step)
    assert has_state(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["last.pt", "previous.pt"]
    assert read_state(tmp_path / "run" / "last.pt").step == 3
    assert read_state(tmp_path / "run" / "previous.pt").step == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace_by_web_page(path):
    path.write_bytes(b"<html>404</html>")


def replace_by_weights(path):
    torch.save(nn.Linear(1, 1).state_dict(), path)


def replace_by_other_content(path):
    write_checked(path, {"model": {}})


DAMAGES = [cut, empty, flip, replace_by_web_page, replace_by_weights, replace_by_other_content]


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_state_falls_back_and_the_good_file_outlives_the_next_save(tmp_path, damage):
    run = Run()
    run.save(tmp_path, step=1)
    run.save(tmp_path, step=2)
    damage(tmp_path / "last.pt")
    loaded = load_state(tmp_path)
    assert (loaded.state.step, loaded.path.name) == (1, "previous.pt")
    (message,) = loaded.messages
    assert "last.pt" in message and "Going back to previous.pt, step 1" in message
    assert (tmp_path / "last.pt.bad").exists()
    run.save(tmp_path, step=3)
    assert read_state(tmp_path / "previous.pt").step == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_state_names_both_files_when_none_is_good(tmp_path, damage):
    run = Run()
    run.save(tmp_path, step=1)
    damage(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last.pt: .* no previous.pt beside it"):
        load_state(tmp_path)
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last.pt: .* Nor can .*previous.pt: is empty"):
        load_state(tmp_path)
    assert (tmp_path / "last.pt").exists()


def test_load_state_takes_the_previous_after_a_crash_between_two_renames(tmp_path):
    Run().save(tmp_path, step=1)
    (tmp_path / "last.pt").rename(tmp_path / "previous.pt")
    assert load_state(tmp_path).state.step == 1


def test_load_state_says_what_is_there_when_nothing_was_saved(tmp_path):
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(CheckpointError, match=r"nothing to resume.*got \['metrics.csv'\]"):
        load_state(tmp_path)
    with pytest.raises(CheckpointError, match="got no such folder"):
        load_state(tmp_path / "elsewhere")


def test_restore_state_of_another_model_changes_nothing(tmp_path):
    Run(width=5).save(tmp_path, step=1)
    other = Run(width=6)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"another model: tensors 7 of another shape \(first: 0.weight \(5, 3\) in"
    ):
        restore_state(load_state(tmp_path).state, *other.parts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items())
    other.model.append(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"2 missing \(first: 4.weight, 4.bias\)"):
        restore_state(load_state(tmp_path).state, *other.parts)


def test_restore_state_of_another_optimiser_changes_nothing(tmp_path):
    Run(seed=1).save(tmp_path, step=1)
    other = Run(seed=2, frozen=True)
    before = other.model[0].weight.clone()
    with pytest.raises(CheckpointError, match=r"another optimiser: its groups hold \[6\] parameters, wanted \[4\]"):
        restore_state(load_state(tmp_path).state, *other.parts)
    assert torch.equal(other.model[0].weight, before)


def test_restore_state_says_what_makes_the_run_differ(tmp_path, monkeypatch):
    Run().save(tmp_path, step=1)
    state = load_state(tmp_path).state
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    messages = restore_state(state, *Run().parts, rank=3)
    assert len(messages) == 2
    assert "process 3 starts with new random numbers: 1 were saved" in messages[0]
    assert "77" in messages[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_capture_state_never_takes_what_is_not_finite(value):
    run = Run()
    run.model[1].running_mean[2] = value
    with pytest.raises(DivergenceError, match=r"step 5: 1 tensors .*1.running_mean.*not saved"):
        capture_state(*run.parts, step=5)


def test_save_state_into_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be created"):
        Run().save(tmp_path / "file" / "run", step=1)
