from itertools import product

import pytest

from swin_dense.tools.micro_batch_choice import Candidate, Split, choose, first_that_fits, splits


def candidate(size, peak_bytes, usable_bytes=100, stages=()):
    return Candidate(Split(size, 12 // size, stages), peak_bytes, None if peak_bytes is None else 1.0, usable_bytes)


@pytest.mark.parametrize("share", [1, 2, 7, 12, 16])
def test_every_split_makes_the_same_share(share):
    ways = splits(share, (0, 1))
    assert all(way.micro_batch_size * way.accumulation_steps == share for way in ways)
    assert all(way.checkpoint_stages == (0, 1) for way in ways)
    sizes = [way.micro_batch_size for way in ways]
    assert sizes == sorted({size for size in range(1, share + 1) if share % size == 0}, reverse=True)


@pytest.mark.parametrize(("peak_bytes", "fits"), [(99, True), (100, True), (101, False), (None, False)])
def test_fits_within_what_is_usable(peak_bytes, fits):
    assert candidate(2, peak_bytes).fits is fits


@pytest.mark.parametrize(
    ("most", "tried"), [(12, [12]), (5, [12, 6, 4]), (1, [12, 6, 4, 3, 2, 1]), (0, [12, 6, 4, 3, 2, 1])]
)
def test_smaller_ones_are_tried_until_one_fits(most, tried):
    def measure(split):
        size = split.micro_batch_size
        return candidate(size, 10 * size if size <= most else None, 200)

    measured = first_that_fits(splits(12), measure)
    assert [each.split.micro_batch_size for each in measured] == tried
    assert [each.fits for each in measured] == [False] * (len(tried) - 1) + [most > 0]


def test_choice_fits_and_no_larger_one_does():
    for peaks in product((None, 20, 95, 120), repeat=3):
        candidates = [candidate(size, peak) for size, peak in zip((6, 3, 1), peaks, strict=True)]
        fitting = [each.split.micro_batch_size for each in candidates if each.fits]
        chosen = choose(candidates)
        assert (None if chosen is None else chosen.split.micro_batch_size) == max(fitting, default=None)


def test_more_memory_never_makes_the_choice_smaller():
    costs = [(12, 900, ()), (6, 500, ()), (6, 300, (0, 1, 2, 3)), (6, 400, (0, 1)), (2, 250, ()), (1, None, ())]
    sizes = []
    for usable_bytes in range(0, 1200, 10):
        chosen = choose([candidate(size, peak, usable_bytes, stages) for size, peak, stages in costs])
        sizes.append(0 if chosen is None else chosen.split.micro_batch_size)
    assert sizes == sorted(sizes) and set(sizes) == {0, 2, 6, 12}


def test_of_equal_ones_the_one_that_recomputes_least_is_chosen():
    costs = {(): 95, (0, 1): 60, (0, 1, 2, 3): 40}
    for usable_bytes, expected in ((95, ()), (94, (0, 1)), (59, (0, 1, 2, 3))):
        chosen = choose([candidate(2, peak, usable_bytes, stages) for stages, peak in costs.items()])
        assert chosen is not None and chosen.split.checkpoint_stages == expected


def test_split_in_words():
    assert [str(Split(2, 8)), str(Split(1, 16, (0, 1)))] == ["2 x 8", "1 x 16, recomputing stages [0, 1]"]
