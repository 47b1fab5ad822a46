from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swin_dense.datasets.batches import TrainingBatches, batches_per_epoch
from swin_dense.errors import ConfigError


def epoch_of(batches):
    return {epoch for batch in batches for epoch, _ in batch}


@given(
    groups=st.lists(st.integers(0, 2), min_size=1, max_size=23),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_holds_every_sample_in_batches_of_one_group(groups, batch_size, world_size, seed):
    count = batches_per_epoch(len(groups), batch_size, groups, world_size)
    ranks = [
        list(
            TrainingBatches(
                len(groups), batch_size, seed=seed, groups=groups, rank=rank, world_size=world_size, num_batches=count
            )
        )
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {count}
    global_batches = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert all(len(batch) == batch_size * world_size for batch in global_batches)
    assert all(len({groups[index] for _, index in batch}) == 1 for batch in global_batches)
    seen = Counter(index for batch in global_batches for _, index in batch)
    assert set(seen) == set(range(len(groups)))
    assert epoch_of(global_batches) == {0}


@pytest.mark.parametrize("start", [0, 1, 4, 5, 11])
def test_a_resumed_run_goes_on_where_it_stopped(start):
    groups = [0, 1, 0, 0, 1, 0, 0, 1]
    whole = list(TrainingBatches(8, 2, seed=7, groups=groups, num_batches=20))
    rest = list(TrainingBatches(8, 2, seed=7, groups=groups, start_batch=start, num_batches=20 - start))
    assert whole[start:] == rest


def test_epochs_and_seeds_differ():
    batches = list(TrainingBatches(11, 11, seed=1, num_batches=2))
    assert [index for _, index in batches[0]] != [index for _, index in batches[1]]
    assert batches[0] != next(iter(TrainingBatches(11, 11, seed=2)))


def test_without_leftovers_no_sample_comes_twice():
    keys = [key for batch in TrainingBatches(12, 3, seed=0, num_batches=4) for key in batch]
    assert len(set(keys)) == 12


def test_length_is_known_when_counted_only():
    assert len(TrainingBatches(5, 2, seed=0, num_batches=9)) == 9
    with pytest.raises(TypeError, match="has no length"):
        len(TrainingBatches(5, 2, seed=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"groups": np.zeros(4)}, r"one number per sample \(5\), got 4"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1, got 2"),
        ({"start_batch": -1}, "must not be negative"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TrainingBatches(**{"num_samples": 5, "batch_size": 2, "seed": 0, **arguments})
