import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swin_dense.datasets.copy_paste import CopyPaste, Paste, paste_objects, uncovered
from swin_dense.datasets.geometry import Flip
from swin_dense.datasets.transforms import sample_seed
from swin_dense.errors import ConfigError

SIZE_HW = (41, 67)
FIRST = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
SECOND = np.random.default_rng(1).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)


def renamed(instances):
    """With other labels and ids, so that it shows which image an object comes from."""
    return dataclasses.replace(instances, labels=instances.labels + 50, annotation_ids=instances.annotation_ids + 50)


def full_masks(instances):
    kept, masks = instances.with_masks()
    assert len(kept) == len(instances)
    return masks.full().numpy().astype(bool)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_pasting_equals_the_reference_on_whole_pictures(make_instances, seed, count, pasted_count, flipped):
    first, pasted = make_instances(SIZE_HW, seed, count), renamed(make_instances(SIZE_HW, seed + 1, pasted_count))
    if flipped:
        pasted = Flip().instances(pasted)
    front, behind = full_masks(pasted), full_masks(first)
    covered = front.any(axis=0)
    wanted = np.concatenate([behind & ~covered, front])
    seen = wanted.any(axis=(1, 2))

    image, found = paste_objects(FIRST, first, SECOND, pasted)
    assert np.array_equal(image, np.where(covered[:, :, None], SECOND, FIRST))
    assert np.array_equal(full_masks(found), wanted[seen])
    for name in ("labels", "annotation_ids", "is_crowd"):
        assert np.array_equal(getattr(found, name), np.append(getattr(first, name), getattr(pasted, name))[seen])
    for box, mask in zip(found.boxes_xyxy, full_masks(found), strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_an_object_wholly_covered_vanishes_and_one_cut_in_two_keeps_its_box():
    cross = np.ones((3, 9), np.uint8), (10, 20)
    assert uncovered(cross, [(np.ones((5, 9), np.uint8), (10, 19))])[0].shape == (0, 0)
    cut, corner_xy = uncovered(cross, [(np.ones((30, 2), np.uint8), (13, 0))])
    assert corner_xy == (10, 20) and cut.tolist() == [[1, 1, 1, 0, 0, 1, 1, 1, 1]] * 3
    shorter, corner_xy = uncovered(cross, [(np.ones((30, 5), np.uint8), (8, 0))])
    assert corner_xy == (13, 20) and shorter.shape == (3, 6)
    untouched, corner_xy = uncovered(cross, [(np.ones((3, 9), np.uint8), (19, 20))])
    assert corner_xy == (10, 20) and untouched.all() and cross[0].all()


def test_a_hole_in_front_leaves_what_is_behind_it():
    ring = np.ones((7, 7), np.uint8)
    ring[2:5, 2:5] = 0
    behind = np.ones((7, 7), np.uint8)
    rest, corner_xy = uncovered((behind, (0, 0)), [(ring, (0, 0))])
    assert corner_xy == (2, 2) and rest.shape == (3, 3) and rest.all() and behind.all()


def test_regions_that_take_no_part_are_never_pasted_and_stay_so(make_instances):
    first, second = make_instances(SIZE_HW, 3), renamed(make_instances(SIZE_HW, 4))
    pasted_ids, crowds_left = set(), 0
    for seed in range(40):
        _, found = Paste(0, 0, seed)(FIRST, first, SECOND, second)
        own = found.annotation_ids < 150
        assert np.array_equal(found.is_crowd, own & (found.annotation_ids % 2 == 1))
        assert np.array_equal(found.labels, found.annotation_ids - 100)
        pasted_ids |= set(found.annotation_ids[~own].tolist())
        crowds_left += found.is_crowd.sum()
    assert pasted_ids == set(second.annotation_ids[~second.is_crowd].tolist()) and crowds_left


def test_about_half_of_the_objects_are_pasted(make_instances):
    nothing = make_instances(SIZE_HW, 0, count=0)
    second = make_instances(SIZE_HW, 1, count=9)
    counts = [len(Paste(0, 0, seed)(FIRST, nothing, SECOND, second)[1]) for seed in range(400)]
    assert set(counts) == {0, 1, 2, 3, 4, 5} and 2.3 < np.mean(counts) < 2.7


def test_pasting_changes_nothing_in_place(make_instances):
    def contents():
        return [*images, *(pickle.dumps((record.boxes_xyxy, record.outlines)) for record in (first, second))]

    first, second = (make_instances(SIZE_HW, seed).drawn() for seed in (5, 6))
    images = [FIRST.copy(), SECOND.copy()]
    before = contents()
    for seed in range(5):
        image, _ = Paste(0, 0, seed)(images[0], first, images[1], second)
        image[:] = 0
    assert all(np.array_equal(one, other) for one, other in zip(before, contents(), strict=True))
    assert np.array_equal(images[0], FIRST) and np.array_equal(images[1], SECOND)


def test_draw_follows_from_the_seed_and_takes_every_image():
    draws = [CopyPaste(0.5).draw(sample_seed(0, 0, index), 7) for index in range(600)]
    assert draws == [CopyPaste(0.5).draw(sample_seed(0, 0, index), 7) for index in range(600)]
    pastes = [paste for paste in draws if paste is not None]
    assert 250 < len(pastes) < 350 and {paste.index for paste in pastes} == set(range(7))
    assert (
        len({paste.transform_seed for paste in pastes}) == len({paste.subset_seed for paste in pastes}) == len(pastes)
    )
    assert all(CopyPaste(0.0).draw(seed, 7) is None for seed in range(50))
    assert all(CopyPaste().draw(seed, 7) is not None for seed in range(50))


def test_images_of_unequal_size_are_refused(make_instances):
    instances = make_instances(SIZE_HW, 0)
    with pytest.raises(ConfigError, match=r"images of one size, got \(41, 67\) and \(41, 60\) .*large_scale_jitter"):
        paste_objects(FIRST, instances, SECOND[:, :60], make_instances((41, 60), 0))


def test_probability_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"copy_paste_probability must lie in 0\.\.1, got 1\.5"):
        CopyPaste(1.5)
