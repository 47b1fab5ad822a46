import weakref

import pytest
import torch
from torch import nn

from swin_dense.errors import ConfigError
from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import even_slices
from swin_dense.training.out_of_memory import OutOfMemoryRecovery, is_out_of_memory
from swin_dense.training.starting_point import StartingPoint


class Rows:
    def __init__(self, rows, ids):
        self.rows, self.ids = rows, ids

    def describe(self):
        return f"rows {self.ids}"

    def split(self, parts):
        return [Rows(self.rows[part], self.ids[part]) for part in even_slices(len(self.ids), parts)]


def batches_of(*counts):
    generator = torch.Generator().manual_seed(1)
    return iter([Rows(torch.rand(count, 3, generator=generator).double(), list(range(count))) for count in counts])


class Device:
    """Computes losses until its memory, counted in rows, is full."""

    def __init__(self, rows, words="CUDA out of memory.", kind=torch.OutOfMemoryError):
        self.rows, self.words, self.kind = rows, words, kind
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
        self.model[1].eval()
        self.sizes = []
        self.held, self.alive = [], []

    def __call__(self, batch):
        self.sizes.append(len(batch.rows))
        self.alive.append(sum(held() is not None for held in self.held))
        activations = self.model(batch.rows)
        self.held.append(weakref.ref(activations))
        if len(batch.rows) > self.rows:
            raise self.kind(self.words)
        return {"loss": LossTerm(activations.square().mean(), len(batch.rows))}

    def run(self, batches, accumulation_steps, **settings):
        recovery = OutOfMemoryRecovery(self.model, self, accumulation_steps, **settings)
        return recovery.add_gradients(4, StartingPoint.of(self.model), lambda: next(batches))

    def gradient(self):
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", torch.OutOfMemoryError),
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried", RuntimeError),
    ],
)
def test_any_batch_fits_that_fits_image_by_image(words, kind):
    counts = (2, 7, 1, 5)
    plenty, scarce = Device(99), Device(2, words, kind)
    plenty.run(batches_of(*counts), 4)
    micro_batches, events = scarce.run(batches_of(*counts), 4)
    torch.testing.assert_close(scarce.gradient(), plenty.gradient(), rtol=0, atol=1e-13)
    assert [len(micro_batch.batch.ids) for micro_batch in micro_batches] == list(counts)
    assert [event.text for event in events] == [
        "step 4: out of memory with rows [0, 1, 2, 3, 4, 5, 6], 7 at once; redone in 4 parts",
        "step 4: out of memory with rows [0, 1, 2, 3, 4], 5 at once; redone in 4 parts",
    ]


def test_nothing_of_an_attempt_or_a_part_is_held_when_the_next_begins():
    device = Device(4)
    device.run(batches_of(5), 1)
    assert device.alive == [0] * (1 + 2 * 2)


def test_running_statistics_see_the_parts_and_not_the_failed_attempt():
    device = Device(3)
    device.model[1].train()
    device.run(batches_of(5), 1)
    assert int(device.model[1].num_batches_tracked) == 2


def test_what_fits_is_untouched():
    device = Device(7)
    _, events = device.run(batches_of(7, 3), 2)
    assert events == [] and device.sizes == [7, 3]


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes differ"):
        Device(3, "shapes differ", RuntimeError).run(batches_of(5), 1)
    assert not is_out_of_memory(RuntimeError("not enough fingers"))


def test_single_image_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match=r"step 4: out of memory with one image alone, rows \[0\]\. Recompute"):
        Device(0).run(batches_of(5), 1)


def test_synchronised_batch_norm_rules_out_a_second_attempt():
    device = Device(3)
    with pytest.raises(
        ConfigError, match=r"out of memory with rows \[0, 1, 2, 3, 4\]\. BatchNorm that is synchronised"
    ):
        device.run(batches_of(5), 1, can_redo=False)
    assert device.sizes == [5]
