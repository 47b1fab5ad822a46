import threading
import time

import pytest
from torch.distributed import HashStore

from swin_dense.errors import ConfigError
from swin_dense.training.rendezvous import ROUND, agree_on_round


def agreed(store, ranks, world_size, timeout_s=20.0, late_s=0.0):
    """What each process of one round comes to believe; process 0 may be late."""
    names = {}

    def take_part(rank):
        if rank == 0:
            time.sleep(late_s)
        try:
            names[rank] = agree_on_round(store, rank, world_size, timeout_s)
        except ConfigError as error:
            names[rank] = str(error)

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [names[rank] for rank in ranks]


@pytest.mark.parametrize("late_s", [0.0, 0.1])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_processes_agree_on_a_new_name_in_every_round(world_size, late_s):
    store = HashStore()
    rounds = [agreed(store, range(world_size), world_size, late_s=late_s) for _ in range(3)]
    assert [len(set(names)) for names in rounds] == [1, 1, 1]
    assert len({names[0] for names in rounds}) == 3


def test_round_that_broke_off_is_believed_by_nobody():
    store = HashStore()
    # Process 2 dies before it comes; process 1 was answered before all were there.
    for names in (agreed(store, [0, 1], 3, timeout_s=0.1), agreed(store, [1], 3, timeout_s=0.1)):
        assert "did not come in time" in names[0]
    left = store.get(ROUND).decode()
    names = agreed(store, range(3), 3, late_s=0.1)
    assert len(set(names)) == 1 and names[0] != left


def test_world_may_shrink_and_grow():
    store = HashStore()
    for world_size in (3, 1, 2, 4):
        assert len(set(agreed(store, range(world_size), world_size))) == 1


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_process_that_does_not_come_is_named(rank, missing):
    (message,) = agreed(HashStore(), [rank], 2, timeout_s=0.05)
    assert message.startswith(f"process {missing} did not come in time. Is it running")
