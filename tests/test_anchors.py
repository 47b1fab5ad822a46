import math

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from swin_dense.features import FeatureSpec
from swin_dense.heads.anchors import PyramidAnchors

SPECS = {f"p{k}": FeatureSpec(4, 2**k) for k in (2, 3, 4, 5, 6)}


def anchors_of(generator, grids, num_images=1, dtype=torch.float32):
    levels = [torch.zeros(num_images, 1, *grid, dtype=dtype) for grid in grids]
    images = ImageList(torch.zeros(num_images, 3, 1, 1), [(1, 1)] * num_images)
    return generator(images, levels)


@pytest.mark.parametrize("scale", [8.0, 4.0, 2.5])
def test_anchors_follow_the_closed_form(scale):
    grids = [(5, 7), (3, 4), (2, 2), (1, 1), (1, 1)]
    generator = PyramidAnchors(SPECS, scale)
    wanted = []
    for (rows, columns), spec in zip(grids, SPECS.values(), strict=True):
        for row in range(rows):
            for column in range(columns):
                for ratio in (0.5, 1.0, 2.0):
                    side = scale * spec.stride
                    height, width = side * math.sqrt(ratio), side / math.sqrt(ratio)
                    y, x = row * spec.stride, column * spec.stride
                    wanted.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    (got,) = anchors_of(generator, grids)
    assert got.dtype == torch.float32
    assert torch.allclose(got, torch.tensor(wanted), atol=1e-4)


def test_anchor_strides_are_exact_where_the_image_does_not_divide():
    # 800 px give a p6 grid of 13 rows; 800 // 13 = 61 would be the stride of torchvision's generator.
    grids = [(200, 1), (100, 1), (50, 1), (25, 1), (13, 1)]
    (anchors,) = anchors_of(PyramidAnchors(SPECS), grids)
    coarsest = anchors[-13 * 3 :].view(13, 3, 4)
    centres = (coarsest[:, 1, 1] + coarsest[:, 1, 3]) / 2
    assert torch.equal(centres, torch.arange(13) * 64.0)


def test_cell_anchors_are_not_rounded_and_have_the_side_as_root_of_the_area():
    cells = torch.tensor(PyramidAnchors(SPECS).cell_anchors(4))
    assert cells[0].tolist() == pytest.approx([-22.627417, -11.313708, 22.627417, 11.313708])
    size = cells[:, 2:] - cells[:, :2]
    assert size.prod(dim=1).sqrt().tolist() == pytest.approx([32.0] * 3)
    assert (size[:, 1] / size[:, 0]).tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert not (cells[:, :2] + cells[:, 2:]).any()


def test_every_image_has_the_same_anchors_at_the_levels_precision():
    grids = [(2, 3)] * 5
    images = anchors_of(PyramidAnchors(SPECS), grids, num_images=3, dtype=torch.float64)
    assert len(images) == 3
    assert all(torch.equal(anchors, images[0]) for anchors in images)
    assert images[0].dtype == torch.float64 and images[0].shape == (5 * 6 * 3, 4)
    (half,), (full,) = (anchors_of(PyramidAnchors(SPECS), grids, dtype=d) for d in (torch.bfloat16, torch.float32))
    assert torch.equal(half, full)


def test_num_anchors_per_location_counts_the_ratios():
    assert PyramidAnchors(SPECS).num_anchors_per_location() == [3] * 5
    generator = PyramidAnchors(SPECS, aspect_ratios=(0.3, 1.0))
    assert generator.num_anchors_per_location() == [2] * 5
    assert len(anchors_of(generator, [(1, 1)] * 5)[0]) == 10


def test_each_level_needs_its_stride():
    with pytest.raises(ValueError, match="zip"):
        anchors_of(PyramidAnchors(SPECS), [(2, 2)] * 4)
