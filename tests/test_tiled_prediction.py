import numpy as np
import pytest
import torch

from swin_dense.datasets.geometry import Resize
from swin_dense.datasets.tiles import blending_weights
from swin_dense.errors import ConfigError
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.recipe import InferenceSettings
from swin_dense.tools.tiled_prediction import Tiling, detect_tiles, label_tiles, tiling_of

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 5


def picture(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def uneven_scores(tile, size_hw):
    """Scores that change with the pixels, the place in the tile and the tile, so that tiles disagree."""
    generator = torch.Generator().manual_seed(int(tile.long().sum()))
    return torch.rand(CLASSES, *size_hw, generator=generator) + tile.float().mean(dim=0) / 255


def blended_in_full_memory(image, tiling, scores_of):
    """The same in the plainest way: all scores of the image, and their weights, in one array each."""
    grid = tiling.grid(image.shape[:2])
    height, width = grid.tile_size_hw
    rows, columns = (
        dict(zip(starts, blending_weights(starts, side), strict=True))
        for starts, side in ((grid.tops, height), (grid.lefts, width))
    )
    total, weight = np.zeros((CLASSES, *image.shape[:2])), np.zeros(image.shape[:2])
    for tile in grid.tiles():
        place = np.s_[tile.top : tile.top + height, tile.left : tile.left + width]
        weights = np.outer(rows[tile.top], columns[tile.left])
        total[(slice(None), *place)] += weights * scores_of(tiling.cut(image, tile), tile.size_hw).numpy()
        weight[place] += weights
    return (total / weight).argmax(axis=0)


@pytest.mark.parametrize(
    ("size_hw", "side", "overlap"),
    [
        ((101, 67), 31, 7),
        ((67, 101), 31, 0),
        ((101, 31), 31, 13),
        ((53, 97), 31, 30),
        ((97, 53), 40, 25),
        ((31, 17), 31, 5),
        ((32, 33), 31, 1),
    ],
)
def test_labels_equal_blending_everything_in_full_memory(size_hw, side, overlap):
    image, tiling = picture(size_hw), Tiling(side, overlap, 1.0)
    labels = label_tiles(image, tiling, uneven_scores)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, blended_in_full_memory(image, tiling, uneven_scores))


def test_blending_matters():
    image = picture((67, 61))
    labels = [label_tiles(image, Tiling(31, overlap, 1.0), uneven_scores) for overlap in (0, 13)]
    assert not np.array_equal(*labels)


@pytest.mark.parametrize("size_hw", [(64, 64), (41, 64), (1, 1)])
def test_one_tile_gives_its_own_maxima(size_hw):
    image = picture(size_hw)
    labels = label_tiles(image, Tiling(64, 16, 1.0), uneven_scores)
    wanted = uneven_scores(torch.from_numpy(image).permute(2, 0, 1), size_hw).argmax(dim=0)
    assert np.array_equal(labels, wanted.numpy())


def test_labels_go_into_the_file_that_is_given(tmp_path):
    image, tiling = picture((67, 101)), Tiling(31, 7, 1.0)
    file = np.memmap(tmp_path / "labels", np.uint16, "w+", shape=(67, 101))
    assert label_tiles(image, tiling, uneven_scores, file) is file
    file.flush()
    again = np.memmap(tmp_path / "labels", np.uint16, "r", shape=(67, 101))
    assert np.array_equal(again, label_tiles(image, tiling, uneven_scores))


def test_each_tile_is_seen_once_and_scores_stay_as_they_are():
    image, tiling, given = picture((67, 101)), Tiling(31, 7, 1.0), []

    def scores_of(tile, size_hw):
        given.append((tile, uneven_scores(tile, size_hw)))
        return given[-1][1]

    label_tiles(image, tiling, scores_of)
    tiles = tiling.grid((67, 101)).tiles()
    assert len(given) == len(tiles)
    for (pixels, scores), tile in zip(given, tiles, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0), tile.image(image))
        assert torch.equal(scores, uneven_scores(pixels, tile.size_hw))


def test_tiles_are_seen_at_the_scale_wanted():
    image, tiling = picture((67, 101)), Tiling(32, 8, 1.5)
    tile = tiling.grid((67, 101)).tiles()[3]
    pixels = tiling.cut(image, tile)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous() and pixels.shape == (3, 48, 48)
    assert np.array_equal(pixels.permute(1, 2, 0), Resize((48, 48)).image(tile.image(image)))


def test_objects_are_moved_by_their_tile():
    def detect(tile, size_hw):
        """One object a tile, around its middle; its score tells which one."""
        from pycocotools import mask as coco_mask

        mask = np.zeros(size_hw, np.uint8, order="F")
        mask[12:18, 10:20] = 1
        code = coco_mask.encode(mask)
        score = np.float32(int(tile.long().sum()) % 997 / 997)
        boxes = np.array([[10, 12, 20, 18]], np.float32)
        codes = [{"size": list(code["size"]), "counts": code["counts"].decode()}]
        return InstancePrediction(boxes, np.zeros(1, np.int64), np.array([score]), codes)

    image, tiling = picture((67, 101)), Tiling(31, 7, 1.0)
    found = detect_tiles(image, tiling, detect)
    tiles = tiling.grid((67, 101)).tiles()
    wanted = {(tile.left + 10, tile.top + 12, tile.left + 20, tile.top + 18) for tile in tiles}
    assert {tuple(box) for box in found.boxes_xyxy.tolist()} == wanted
    assert (np.diff(found.scores) <= 0).all()
    for box, mask in zip(found.boxes_xyxy.astype(int), found.masks(), strict=True):
        assert mask.shape == (67, 101) and mask.sum() == 60 and mask[box[1] : box[3], box[0] : box[2]].all()
    assert len(detect_tiles(image, tiling, detect, max_detections=5).scores) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 128}, "tile_overlap must be 0 or more pixels and less than the side of a tile, got 128 for"),
        ({"tile_size": 64, "tile_overlap": -1}, "got -1"),
        ({"tile_size": 0, "tile_overlap": 0}, "got 0 for tiles of 0 x 0"),
        ({"tile_size": 512, "tile_scale": 0.0}, "tile_scale must be more than 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        tiling_of(InferenceSettings(**settings))
    assert message in str(caught.value)


def test_settings_make_the_tiling():
    assert tiling_of(InferenceSettings()) is None
    assert tiling_of(InferenceSettings(tile_size=512, tile_scale=2.0)) == Tiling(512, 128, 2.0)


MEASURE = """
import sys
import numpy as np, torch
from swin_dense.tools.tiled_prediction import Tiling, label_tiles
height = int(sys.argv[1])
image = np.zeros((height, 1024, 3), np.uint8)
def scores(tile, size_hw):
    return torch.full((50, *size_hw), float(tile.shape[1]))
def peak_bytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
label_tiles(image[:600], Tiling(256, 32, 1.0), scores)
before = peak_bytes()
label_tiles(image, Tiling(256, 32, 1.0), scores)
print(peak_bytes() - before)
"""


@pytest.mark.slow
def test_memory_grows_by_no_more_than_image_and_labels(run_python):
    small, large = (int(run_python("-c", MEASURE, height, check=True).stdout) for height in (2000, 20000))
    # 3 bytes of the image, which are touched only here, and 1 of the labels; all scores would be 200 bytes.
    assert large - small < 18000 * 1024 * 4 + 16e6
