import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.utils.data import get_worker_info

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.errors import DataError, ImageError
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.training_batches import training_batches
from swin_dense.training.distributed import Process

PROCESS = Process(0, 0, 1, torch.device("cpu"))


class Keys:
    """A training set whose samples are their keys."""

    def __init__(self, broken=(), deadly=None, folder=None):
        self.broken, self.deadly, self.folder = broken, deadly, folder

    def __len__(self):
        return 7

    def __getitem__(self, key):
        if key[1] in self.broken:
            raise ImageError(f"picture_{key[1]}.jpg: is cut short.")
        if key == self.deadly and get_worker_info() and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return key


def batches_of(images, told, *, start_step=0, workers=0, overrides=(), process=PROCESS):
    return training_batches(
        images,
        list,
        read_recipe("shapes_instance", ["run.seed=4", *overrides]),
        process,
        groups=None,
        batch_size=2,
        batches_per_step=3,
        start_step=start_step,
        total_steps=4,
        workers=workers,
        tell=told.append,
    )


def test_batches_are_those_of_the_seed_from_any_step_on():
    told = []
    wanted = list(TrainingBatches(7, 2, seed=4, num_batches=12))
    assert list(batches_of(Keys(), told)) == wanted
    assert list(batches_of(Keys(), told, start_step=2)) == wanted[6:]
    assert list(batches_of(Keys(), told, workers=2)) == wanted and not told


def test_processes_share_each_batch():
    halves = [
        list(batches_of(Keys(), [], process=replace(PROCESS, rank=rank, world_size=2), start_step=1)) for rank in (0, 1)
    ]
    whole = list(TrainingBatches(7, 4, seed=4, start_batch=3, num_batches=9))
    assert [one + other for one, other in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_told_of_in_their_step(workers):
    told = []
    found = list(batches_of(Keys(broken=(5,)), told, workers=workers))
    wanted = [[(e, 6 if i == 5 else i) for e, i in batch] for batch in TrainingBatches(7, 2, seed=4, num_batches=12)]
    assert found == wanted
    (event,) = told
    first = next(n for n, batch in enumerate(TrainingBatches(7, 2, seed=4)) if 5 in [i for _, i in batch])
    assert (event.step, event.kind) == (first // 3 + 1, "unreadable")
    assert event.text == (f"step {event.step}: another stands in for a picture. picture_5.jpg: is cut short.")


def test_too_many_unreadable_pictures_end_the_run():
    with pytest.raises(DataError, match=r"2 pictures could not be read, more than run.max_unreadable_images=1"):
        list(batches_of(Keys(broken=(1, 5)), [], overrides=["run.max_unreadable_images=1"]))


def test_a_worker_that_dies_costs_nothing_but_time(tmp_path):
    told = []
    wanted = list(TrainingBatches(7, 2, seed=4, num_batches=12))
    images = Keys(deadly=wanted[7][1], folder=tmp_path)
    assert list(batches_of(images, told, workers=2)) == wanted
    assert told and {event.kind for event in told} == {"loading_restarted"}
    assert all(event.step <= 3 and "starts anew" in event.text for event in told)
