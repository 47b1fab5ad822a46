import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from swin_dense.errors import DataError
from swin_dense.training.restarting_loader import restarting


class Numbers(Dataset):
    """0 to 11; a worker that comes to a number in `deadly` dies there, as long as its marker file is missing."""

    def __init__(self, folder, deadly=(), always=False):
        self.folder, self.deadly, self.always = folder, deadly, always

    def __len__(self):
        return 12

    def __getitem__(self, index):
        marker = self.folder / str(index)
        if index in self.deadly and get_worker_info() and (self.always or not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)


def loader_of(numbers, first, batch_size=2):
    batches = [list(range(start, start + batch_size)) for start in range(0, 12, batch_size)]
    return DataLoader(numbers, batch_sampler=batches[first:], num_workers=2, timeout=1)


def test_batches_are_those_of_the_loader(tmp_path):
    told = []
    found = restarting(lambda first: loader_of(Numbers(tmp_path), first), on_restart=told.append)
    assert torch.cat(list(found)).tolist() == list(range(12)) and not told


def test_no_batch_is_lost_or_repeated_when_workers_are_killed(tmp_path):
    told = []
    numbers = Numbers(tmp_path, deadly=(3, 8))
    found = restarting(lambda first: loader_of(numbers, first), on_restart=told.append)
    assert torch.cat(list(found)).tolist() == list(range(12))
    assert told and all("starts anew at this batch" in text for text in told)


def test_workers_that_die_again_and_again_end_the_run(tmp_path):
    told = []
    numbers = Numbers(tmp_path, deadly=(7,), always=True)
    with pytest.raises(DataError, match=r"loading stopped 3 times at the same batch: .* lower run.workers"):
        list(restarting(lambda first: loader_of(numbers, first), max_restarts=2, on_restart=told.append))
    assert len(told) == 2


class Hanging(Numbers):
    """A worker that comes to a number in `deadly` waits there, as long as its marker file is missing."""

    def __getitem__(self, index):
        marker = self.folder / str(index)
        if index in self.deadly and not marker.exists():
            marker.touch()
            time.sleep(60)
        return torch.tensor(index)


def test_a_hanging_worker_is_noticed(tmp_path):
    told = []
    numbers = Hanging(tmp_path, deadly=(5,))
    found = restarting(lambda first: loader_of(numbers, first), patience_s=2, on_restart=told.append)
    assert torch.cat(list(found)).tolist() == list(range(12))
    assert len(told) == 1 and "timed out after 2 seconds. Loading starts anew" in told[0]


def test_a_slow_worker_is_waited_for(tmp_path):
    class Slow(Numbers):
        def __getitem__(self, index):
            time.sleep(1.3 if index == 5 else 0)  # longer than the loader's own timeout
            return torch.tensor(index)

    found = restarting(lambda first: loader_of(Slow(tmp_path), first), patience_s=30, on_restart=pytest.fail)
    assert torch.cat(list(found)).tolist() == list(range(12))


@pytest.fixture
def handler_of_torch(monkeypatch):
    """As after any other loader of the process: torch sets its handler once, and then believes it to be there."""
    former = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    assert len(list(DataLoader(range(3), num_workers=1))) == 3
    assert signal.getsignal(signal.SIGCHLD).__module__ == signal_handling.__name__
    yield
    signal.signal(signal.SIGCHLD, former)


@pytest.mark.usefixtures("handler_of_torch")
def test_a_death_shows_at_the_next_batch_and_not_in_the_midst_of_a_step(tmp_path):
    told, steps = [], 0
    numbers = Numbers(tmp_path, deadly=(11,))  # loaded ahead, while the steps before are made
    for _ in restarting(lambda first: loader_of(numbers, first), on_restart=told.append):
        deadline_s = time.monotonic() + 0.2
        while time.monotonic() < deadline_s:  # a step, in which the worker that loads ahead dies
            pass
        steps += 1
    assert steps == 6 and told


@pytest.mark.parametrize("error", [FileNotFoundError, ValueError])
def test_errors_of_the_data_set_pass(error):
    class Wrong(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise error("gone")

    with pytest.raises(error, match="gone"):
        list(restarting(lambda first: DataLoader(Wrong(), num_workers=1), on_restart=pytest.fail))


def test_other_errors_pass():
    def load(first):
        raise RuntimeError("shapes differ")
        yield

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(restarting(load, on_restart=pytest.fail))
