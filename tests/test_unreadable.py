import pytest
from torch.utils.data import DataLoader

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.datasets.unreadable import (
    CheckedBatch,
    CheckedCollate,
    SkippingUnreadable,
    Unreadable,
    count_unreadable,
)
from swin_dense.errors import DataError, ImageError


class Pictures:
    """A training set whose samples are their keys; some cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        if key[1] in self.broken:
            raise ImageError(f"picture_{key[1]}.jpg: is cut short.")
        return key


def batches_of(pictures, num_workers=0, start_batch=0, num_batches=8):
    batches = TrainingBatches(len(pictures), 3, seed=1, start_batch=start_batch, num_batches=num_batches)
    return DataLoader(
        SkippingUnreadable(pictures), batch_sampler=batches, collate_fn=CheckedCollate(list), num_workers=num_workers
    )


def test_without_faults_the_samples_are_those_of_the_data_set():
    keys = list(TrainingBatches(7, 3, seed=1, num_batches=8))
    noted = []
    assert list(count_unreadable(batches_of(Pictures(7)), limit=0, on_unreadable=noted.append)) == keys
    assert not noted


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_readable_picture_stands_in_and_each_fault_is_told_once(num_workers):
    noted = []
    loader = batches_of(Pictures(7, broken=(2, 3, 6)), num_workers)
    found = list(count_unreadable(loader, limit=3, on_unreadable=noted.append))
    stand_in = {2: 4, 3: 4, 6: 0}
    wanted = [
        [(epoch, stand_in.get(index, index)) for epoch, index in batch]
        for batch in TrainingBatches(7, 3, seed=1, num_batches=8)
    ]
    assert found == wanted
    assert sorted(picture.index for picture in noted) == [2, 3, 6]
    assert {picture.reason for picture in noted} == {f"picture_{n}.jpg: is cut short." for n in (2, 3, 6)}


def test_a_resumed_run_sees_the_same_samples():
    pictures = Pictures(7, broken=(1, 5))
    whole = list(count_unreadable(batches_of(pictures), limit=9, on_unreadable=lambda picture: None))
    rest = batches_of(pictures, start_batch=3, num_batches=5)
    assert list(count_unreadable(rest, limit=9, on_unreadable=lambda picture: None)) == whole[3:]


def test_too_many_end_the_run_and_the_last_is_named():
    loader = batches_of(Pictures(7, broken=(2, 3, 6)))
    with pytest.raises(
        DataError, match=r"3 pictures could not be read, more than run.max_unreadable_images=2; the last: picture_\d"
    ):
        list(count_unreadable(loader, limit=2, on_unreadable=lambda picture: None))


def test_a_set_of_which_nothing_can_be_read_names_the_first():
    with pytest.raises(ImageError, match=r"5 pictures in a row cannot be read; the first: picture_3\.jpg: is cut"):
        SkippingUnreadable(Pictures(5, broken=range(5)))[0, 3]
    with pytest.raises(ImageError, match="20 pictures in a row"):
        SkippingUnreadable(Pictures(50, broken=range(50)))[0, 3]


def test_other_errors_are_not_skipped():
    class Wrong(Pictures):
        def __getitem__(self, key):
            raise DataError("the annotations are wrong")

    with pytest.raises(DataError, match="the annotations are wrong"):
        SkippingUnreadable(Wrong(3))[0, 0]


def test_pinning_reaches_the_batch():
    class Pinned:
        def pin_memory(self):
            return "pinned"

    missing = (Unreadable(3, "gone"),)
    assert CheckedBatch(Pinned(), missing).pin_memory() == CheckedBatch("pinned", missing)
    assert CheckedBatch([1], missing).pin_memory() == CheckedBatch([1], missing)
