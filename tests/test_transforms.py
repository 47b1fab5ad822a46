import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swin_dense.datasets.copy_paste import CopyPaste
from swin_dense.datasets.geometry import Crop, Flip, Pad, Resize
from swin_dense.datasets.instances import Instances
from swin_dense.datasets.outlines import Frame, Outline
from swin_dense.datasets.transforms import (
    PAD_RGB,
    instance_inference,
    instance_training,
    large_scale_jitter,
    sample_seed,
)
from swin_dense.errors import ConfigError

SIZE_HW = (83, 127)
IMAGE = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
OFFICIAL = instance_training(tuple(range(480, 801, 32)), 1333, crop_branch=True)


def test_sample_seed_is_fixed_and_tells_all_three_inputs_apart():
    assert sample_seed(0, 0, 0) == sample_seed(0, 0, 0)
    seeds = {sample_seed(a, b, c) for a in range(8) for b in range(8) for c in range(64)}
    assert len(seeds) == 8 * 8 * 64
    assert all(0 <= seed < 2**64 for seed in seeds)
    # Near inputs give numbers whose bits are half ones, each bit half the time.
    bits = np.array([[(sample_seed(0, 0, c) >> bit) & 1 for bit in range(64)] for c in range(2000)])
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.06


def test_instance_training_repeats_with_the_seed_and_differs_without(make_instances):
    transform = instance_training(tuple(range(61, 98)), 150, crop_branch=True, crop_range=(31, 47))
    instances = make_instances(SIZE_HW, seed=0)
    first, second = (transform(IMAGE, instances, seed=5) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and first[1].frame == second[1].frame
    assert len({transform(IMAGE, instances, seed)[0].tobytes() for seed in range(30)}) > 25
    for seed in range(9):
        image, changed = transform(IMAGE, instances, seed)
        assert changed.size_hw == image.shape[:2]


@given(st.integers(30, 900), st.integers(30, 900), st.integers(0, 2**64 - 1))
def test_instance_training_stays_within_the_published_sizes(height, width, seed):
    operations = OFFICIAL.operations((height, width), seed)
    if isinstance(operations[0], Flip):
        operations = operations[1:]
    resize = operations[-1]
    assert isinstance(resize, Resize) and max(resize.size_hw) <= 1333
    assert min(resize.size_hw) <= 800
    if len(operations) > 1:
        before, crop, _ = operations
        assert isinstance(before, Resize) and isinstance(crop, Crop)
        assert min(before.size_hw) <= 600 and max(before.size_hw) <= 1333
        for side, size in zip(before.size_hw, crop.size_hw, strict=True):
            assert min(side, 384) <= size <= min(side, 600)
        assert crop.top + crop.size_hw[0] <= before.size_hw[0]
        assert crop.left + crop.size_hw[1] <= before.size_hw[1]


def test_crop_branch_and_flip_come_half_the_time_and_every_short_edge_occurs():
    drawn = [OFFICIAL.operations((480, 640), seed) for seed in range(2000)]
    assert 0.46 < np.mean([any(isinstance(o, Crop) for o in operations) for operations in drawn]) < 0.54
    assert 0.46 < np.mean([isinstance(operations[0], Flip) for operations in drawn]) < 0.54
    edges = {min(operations[-1].size_hw) for operations in drawn if len(operations) == 1}
    assert edges == set(range(480, 801, 32))


def test_small_images_work(make_instances):
    transform = instance_training((112, 128, 144), 192, crop_branch=True)
    instances = make_instances((128, 128), seed=0)
    for seed in range(20):
        image, changed = transform(np.zeros((128, 128, 3), np.uint8), instances, seed)
        assert changed.size_hw == image.shape[:2] and max(image.shape) <= 192


def test_an_image_may_lose_all_its_objects():
    transform = instance_training((61,), 150, crop_branch=True, crop_short_edges=(90,), crop_range=(9, 9))
    corner = Outline((np.array([0.0, 0, 3, 0, 3, 3, 0, 3]),))
    frame = Frame.of_file(SIZE_HW)
    box = np.array([[0, 0, 3, 3]], np.float32)
    one = Instances(box, np.array([4]), [corner], np.array([False]), np.array([7]), frame)
    counts = {len(transform(IMAGE, one, seed)[1]) for seed in range(30)}
    assert counts == {0, 1}


def test_instance_inference_is_the_same_for_every_seed(make_instances):
    transform = instance_inference(100, 140)
    instances = make_instances(SIZE_HW, seed=0)
    images = {transform(IMAGE, instances, seed)[0].tobytes() for seed in range(4)}
    image, changed = transform(IMAGE, instances, 0)
    assert len(images) == 1 and image.shape == (91, 140, 3) and changed.size_hw == (91, 140)


def test_transforms_can_be_sent_to_workers():
    for transform in (OFFICIAL, large_scale_jitter(64, tile_size=53)):
        sent = pickle.loads(pickle.dumps(transform))
        assert all(sent.operations(SIZE_HW, seed) == transform.operations(SIZE_HW, seed) for seed in range(5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: instance_training((), 100), "short_edges must be whole numbers of pixels"),
        (lambda: instance_training((800,), 600), r"at least the largest of short_edges \(800\), got 600"),
        (lambda: instance_training((80,), 100, flip_probability=1.5), r"flip_probability must lie in 0\.\.1, got 1\.5"),
        (lambda: instance_training((80,), 100, crop_range=(9, 5)), r"crop_range must be \(least, most\)"),
        (lambda: large_scale_jitter(0), "jitter_size must be whole numbers of pixels"),
        (lambda: large_scale_jitter(64, (0.0, 2.0)), r"jitter_range must be \(least, most\), both positive, got \(0"),
        (lambda: large_scale_jitter(64, (0.1, float("inf"))), "jitter_range must be"),
        (lambda: large_scale_jitter(64, flip_probability=-1), r"flip_probability must lie in 0\.\.1"),
        (lambda: large_scale_jitter(64, tile_size=0), "tile_size must be whole numbers"),
        (lambda: instance_inference(0, 100), "short_edge must be whole numbers"),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_crop_branch_defaults_are_the_published_ones_in_proportion():
    small = [instance_training((100, 200), 333, crop_branch=True).operations((1000, 1000), seed) for seed in range(200)]
    crops = [operations[-3:] for operations in small if len(operations) >= 3]
    assert {before.size_hw[0] for before, _, _ in crops} == {100, 125, 150}
    assert {side for _, crop, _ in crops for side in crop.size_hw} <= set(range(96, 151))


def test_instance_training_on_tiles_follows_from_the_seed_and_ignores_what_is_cut(make_instances):
    image, objects = (
        np.random.default_rng(0).integers(0, 256, (101, 97, 3), dtype=np.uint8),
        make_instances((101, 97), seed=1, count=40),
    )
    transform = instance_training([32], 32, tile_size=32, flip_probability=0.0, tile_least_share=1.0)
    places = set()
    for seed in range(20):
        tile, resize = transform.operations((101, 97), seed)
        again = transform.operations((101, 97), seed)[0]
        assert tile == again and tile.size_hw == (32, 32) and resize.size_hw == (32, 32)
        places.add((tile.top, tile.left))
        cut, found = transform(image, objects, seed)
        assert np.array_equal(cut, tile.image(image)) and found.size_hw == (32, 32)
        assert found.is_crowd.any() and len(found)
    assert len(places) > 15
    assert [type(step).__name__ for step in instance_training([32], 32).operations((101, 97), 0)][-1] == "Resize"
    assert transform.operations((20, 31), 3)[0].size_hw == (20, 31)


def test_tile_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="tile_size must be whole numbers"):
        instance_training([32], 32, tile_size=0)
    with pytest.raises(ConfigError, match="tile_least_share must lie in"):
        instance_training([32], 32, tile_size=32, tile_least_share=2.0)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**64 - 1))
def test_large_scale_jitter_stays_within_the_published_scales(height, width, seed):
    operations = large_scale_jitter().operations((height, width), seed)
    resize, crop, pad = operations[-3:]
    assert isinstance(resize, Resize) and isinstance(crop, Crop) and isinstance(pad, Pad)
    assert 102 <= max(resize.size_hw) <= 2048 and pad.size_hw == (1024, 1024)
    scale = max(resize.size_hw) / max(height, width)
    assert np.allclose(resize.size_hw, (height * scale, width * scale), rtol=0.01, atol=1)
    assert crop.size_hw == tuple(min(side, 1024) for side in resize.size_hw)
    assert crop.top + crop.size_hw[0] <= resize.size_hw[0] and crop.left + crop.size_hw[1] <= resize.size_hw[1]


def test_large_scale_jitter_draws_every_scale_alike_and_flips_half_the_time():
    drawn = [large_scale_jitter().operations((480, 640), seed) for seed in range(2000)]
    sides = np.array([max(operations[-3].size_hw) for operations in drawn])
    counts, _ = np.histogram(sides, 4, (102.4, 2048))
    assert counts.min() > 430 and counts.max() < 570
    assert 0.46 < np.mean([isinstance(operations[0], Flip) for operations in drawn]) < 0.54


def test_large_scale_jitter_equals_the_reference_on_whole_pictures(make_instances):
    transform = large_scale_jitter(61, (0.3, 2.0))
    vanished = 0
    for seed in range(20):
        before = make_instances(SIZE_HW, seed)
        image, found = transform(IMAGE, before, seed)
        wanted, undrawn = IMAGE, before
        for operation in transform.operations(SIZE_HW, seed)[:-1]:
            wanted, undrawn = operation.image(wanted), operation.instances(undrawn)
        undrawn, masks = undrawn.with_masks()
        height, width = wanted.shape[:2]
        assert np.array_equal(image[:height, :width], wanted)
        assert (image[height:] == PAD_RGB).all() and (image[:, width:] == PAD_RGB).all()
        filled = np.pad(masks.full(), ((0, 0), (0, 61 - height), (0, 61 - width)))
        assert np.array_equal(found.with_masks()[1].full(), filled)
        assert np.array_equal(found.annotation_ids, undrawn.annotation_ids)
        vanished += len(before) - len(found)
    assert vanished


# Every transform of images with objects, small enough for pictures of about 100 pixels.
JITTER = large_scale_jitter(127, (0.3, 2.0))
INSTANCE_TRANSFORMS = {
    "published": instance_training(tuple(range(61, 114, 4)), 171),
    "crop branch": instance_training((61, 89, 113), 171, crop_branch=True, crop_short_edges=(97,), crop_range=(53, 79)),
    "tiles": instance_training((61, 89), 171, tile_size=71),
    "jitter": JITTER,
    "jitter of tiles": large_scale_jitter(101, (0.5, 1.5), tile_size=71),
    "inference": instance_inference(71, 131),
    "copy-paste": lambda image, instances, seed: copy_paste(image, instances, seed),
}
BOXES_OF_MASKS = ("jitter", "jitter of tiles", "copy-paste")


def copy_paste(image, instances, seed):
    paste = CopyPaste().draw(seed, 1)
    return paste(*JITTER(image, instances, seed), *JITTER(*painted((97, 101), 200), paste.transform_seed))


def colour_of(annotation_id):
    return np.array([annotation_id * factor % 211 + 40 for factor in (37, 101, 163)])


def painted(size_hw, first_id):
    """A picture of nine objects, each in its own colour: label, crowd flag and colour follow from the id."""
    image = np.zeros((*size_hw, 3), np.uint8)
    boxes, outlines = np.zeros((9, 4), np.float32), []
    ids = first_id + np.arange(9)
    for row, annotation_id in enumerate(ids.tolist()):
        top, left = row // 3 * (size_hw[0] // 3) + 2, row % 3 * (size_hw[1] // 3) + 2
        bottom, right = top + size_hw[0] // 4 + row % 2, left + size_hw[1] // 4
        image[top:bottom, left:right] = colour_of(annotation_id)
        boxes[row] = left, top, right, bottom
        mask = np.zeros(size_hw, np.uint8)
        mask[top:bottom, left:right] = 1
        changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0))
        runs = np.diff(changes, prepend=0, append=mask.size).astype(np.uint32)
        corners = np.array([left, top, right, top, right, bottom, left, bottom], np.float64)
        outlines.append(Outline((corners,)) if row % 2 else Outline(runs=runs))
    return image, Instances(boxes, ids % 7, outlines, ids % 4 == 0, ids, Frame.of_file(size_hw))


def record_bytes(instances):
    return pickle.dumps((vars(instances), [vars(outline) for outline in instances.outlines]))


@pytest.mark.parametrize("name", INSTANCE_TRANSFORMS)
def test_box_label_mask_crowd_id_and_pixels_never_come_apart(name):
    looked_at = 0
    for seed in range(25):
        image, instances = INSTANCE_TRANSFORMS[name](*painted((127, 113), 100), seed)
        kept, masks = instances.with_masks()
        assert image.shape == (*instances.size_hw, 3) and image.dtype == np.uint8
        assert np.array_equal(kept.labels, kept.annotation_ids % 7)
        assert len(set(kept.annotation_ids.tolist())) == len(kept)
        ignored = kept.annotation_ids % 4 == 0
        # What a tile cuts too far takes no part either.
        assert (kept.is_crowd >= ignored).all() if "tiles" in name else np.array_equal(kept.is_crowd, ignored)
        corners = np.concatenate([masks.corners_xy, masks.corners_xy + masks.sizes_hw.flip(1)], axis=1)
        slack = 0 if name in BOXES_OF_MASKS else 1.01
        assert np.abs(kept.boxes_xyxy - corners).max(initial=0) <= slack
        assert slack or len(kept) == len(instances)
        for annotation_id, mask in zip(kept.annotation_ids.tolist(), masks.full().numpy().astype(bool), strict=True):
            # Smaller ones are all edge, where colours mix.
            if mask.sum() >= 60 and min(np.ptp(axis) for axis in np.nonzero(mask)) >= 6:
                assert np.array_equal(np.median(image[mask], axis=0).round(), colour_of(annotation_id)), annotation_id
                looked_at += 1
    assert looked_at > 60


@pytest.mark.parametrize("name", INSTANCE_TRANSFORMS)
def test_instance_transforms_repeat_with_the_seed_and_change_nothing_in_place(name):
    image, instances = painted((127, 113), 100)
    before = image.copy(), record_bytes(instances)
    results = set()
    for seed in range(8):
        first, again = (INSTANCE_TRANSFORMS[name](image, instances, seed) for _ in range(2))
        assert np.array_equal(first[0], again[0])
        assert np.array_equal(first[1].boxes_xyxy, again[1].boxes_xyxy)
        assert np.array_equal(first[1].with_masks()[1].full(), again[1].with_masks()[1].full())
        results.add(first[0].tobytes())
    assert len(results) == 1 if name == "inference" else len(results) > 4
    assert np.array_equal(image, before[0]) and record_bytes(instances) == before[1]


@pytest.mark.parametrize("name", INSTANCE_TRANSFORMS)
def test_flip_twice_is_the_identity_after_every_instance_transform(name):
    flip = Flip()
    for seed in range(5):
        _, instances = INSTANCE_TRANSFORMS[name](*painted((127, 113), 100), seed)
        once, again = flip.instances(instances), flip.instances(flip.instances(instances))
        assert np.allclose(again.boxes_xyxy, instances.boxes_xyxy, atol=1e-4)
        masks = instances.with_masks()[1].full()
        assert np.array_equal(again.with_masks()[1].full(), masks)
        if name in BOXES_OF_MASKS:
            assert np.array_equal(once.with_masks()[1].full(), masks.flip(2))
