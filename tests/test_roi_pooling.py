import math
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align

from swin_dense.features import FeatureSpec
from swin_dense.heads import roi_pooling
from swin_dense.heads.roi_pooling import PyramidRoIAlign, fused_is_right, published_pooling, reference_roi_align

SPECS = {f"p{k}": FeatureSpec(2, 2**k) for k in (2, 3, 4, 5)}


def ramps(size_hw, dtype=torch.float64):
    """Levels whose two channels are the x and y of the cell's centre in image pixels."""
    levels = {}
    for name, spec in SPECS.items():
        rows, columns = size_hw[0] // spec.stride, size_hw[1] // spec.stride
        x = (torch.arange(columns, dtype=dtype) + 0.5) * spec.stride
        y = (torch.arange(rows, dtype=dtype) + 0.5) * spec.stride
        levels[name] = torch.stack((x.expand(rows, columns), y[:, None].expand(rows, columns)))[None]
    return levels


@pytest.mark.parametrize("box", [(40.0, 37.0, 75.0, 69.0), (61.3, 70.9, 200.7, 161.1), (90.0, 80.0, 470.5, 433.1)])
@pytest.mark.parametrize("size", [7, 3])
def test_pooling_a_ramp_gives_the_centres_of_the_bins(box, size):
    pooled = PyramidRoIAlign(SPECS, size)(ramps((512, 544)), [torch.tensor([box], dtype=torch.float64)], [(512, 544)])
    x1, y1, x2, y2 = box
    x = x1 + (torch.arange(size, dtype=torch.float64) + 0.5) / size * (x2 - x1)
    y = y1 + (torch.arange(size, dtype=torch.float64) + 0.5) / size * (y2 - y1)
    assert torch.allclose(pooled[0, 0], x.expand(size, size), atol=1e-9)
    assert torch.allclose(pooled[0, 1], y[:, None].expand(size, size), atol=1e-9)


def test_level_is_the_published_rule():
    pooler = PyramidRoIAlign(SPECS, 7)
    sides = [0.0, 0.5, 8.0, 55.9, 56.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 896.0, 5000.0]
    wanted = [min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 3) for side in sides]
    boxes = torch.tensor([(3.0, 5.0, 3.0 + side, 5.0 + side) for side in sides], dtype=torch.float64)
    assert pooler.level_of(boxes).tolist() == wanted
    assert wanted == [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_level_looks_at_the_area_only():
    pooler = PyramidRoIAlign(SPECS, 7)
    assert pooler.level_of(torch.tensor([[0.0, 0, 448, 28], [0, 0, 28, 448], [0, 0, 112, 112]])).tolist() == [1, 1, 1]
    assert PyramidRoIAlign(SPECS, 7, finest_side=28).level_of(torch.tensor([[0.0, 0, 112, 112]])).tolist() == [2]


def test_each_box_is_pooled_from_its_level_and_image():
    torch.manual_seed(0)
    levels = {name: torch.rand(2, 3, 256 // spec.stride, 320 // spec.stride) for name, spec in SPECS.items()}
    boxes = [torch.tensor([[3.0, 5, 40, 33], [0, 0, 300, 250]]), torch.tensor([[10.0, 20, 150, 140]])]
    pooled = PyramidRoIAlign(SPECS, 5)(levels, boxes, [(256, 320)] * 2)
    wanted = []
    for image, name, box in ((0, "p2", boxes[0][0]), (0, "p4", boxes[0][1]), (1, "p3", boxes[1][0])):
        level = levels[name][image : image + 1]
        wanted.append(roi_align(level, [box[None]], 5, 1 / SPECS[name].stride, sampling_ratio=0, aligned=True))
    assert torch.equal(pooled, torch.cat(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_in_half_precision_are_pooled_in_float32(dtype):
    levels = {name: level.to(dtype) for name, level in ramps((64, 96)).items()}
    boxes = [torch.tensor([[3.3, 5.7, 40.1, 33.9]])]
    pooled = PyramidRoIAlign(SPECS, 3)(levels, boxes, [(64, 96)])
    exact = {name: level.float() for name, level in levels.items()}
    assert pooled.dtype == torch.float32 and torch.equal(pooled, PyramidRoIAlign(SPECS, 3)(exact, boxes, [(64, 96)]))


def test_boxes_in_float64_do_not_change_the_dtype_of_the_result():
    boxes = [torch.tensor([[3.3, 5.7, 40.1, 33.9]], dtype=torch.float64)]
    assert PyramidRoIAlign(SPECS, 3)(ramps((64, 96), torch.float32), boxes, [(64, 96)]).dtype == torch.float32


def test_strides_do_not_depend_on_the_first_image_seen():
    pooler = PyramidRoIAlign(SPECS, 3)
    tiny = {name: torch.rand(1, 2, 1, 1) for name in SPECS}
    pooler(tiny, [torch.tensor([[0.0, 0, 5, 5]])], [(7, 7)])
    box = torch.tensor([[40.0, 37.0, 75.0, 69.0]], dtype=torch.float64)
    pooled = pooler(ramps((512, 544)), [box], [(512, 544)])
    assert float(pooled[0, 0].mean()) == pytest.approx(57.5)


def test_no_boxes_give_an_empty_result_that_keeps_the_graph():
    levels = {name: map.clone().requires_grad_() for name, map in ramps((64, 96), torch.float32).items()}
    pooled = PyramidRoIAlign(SPECS, 7)(levels, [torch.zeros(0, 4), torch.zeros(0, 4)], [(64, 96)] * 2)
    assert pooled.shape == (0, 2, 7, 7)
    pooled.sum().backward()
    assert all(not map.grad.any() for map in levels.values())


def test_gradients_reach_the_level_that_was_pooled():
    levels = {name: map.clone().requires_grad_() for name, map in ramps((256, 256), torch.float32).items()}
    PyramidRoIAlign(SPECS, 7)(levels, [torch.tensor([[0.0, 0, 130, 130]])], [(256, 256)]).sum().backward()
    assert [bool(map.grad is not None and map.grad.any()) for map in levels.values()] == [False, True, False, False]
    # Every sample is a weighted mean, so the weights of one bin sum to one.
    assert float(levels["p3"].grad.sum()) == pytest.approx(2 * 49, rel=1e-4)


def test_it_is_accepted_where_torchvision_asks_for_its_own_pooler():
    assert isinstance(PyramidRoIAlign(SPECS, 7), MultiScaleRoIAlign)


def test_boxes_change_level_in_proportion_to_the_anchors():
    published, small = published_pooling(SPECS, 7, 8.0), published_pooling(SPECS, 7, 2.0)
    assert (published.finest_side, small.finest_side) == (56.0, 14.0)
    boxes = torch.tensor([[0.0, 0, side, side] for side in (5, 60, 113, 300, 900)])
    assert torch.equal(published.level_of(boxes), small.level_of(boxes / 4))


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.setattr("swin_dense.kernel_trial._answers", {})
    return lambda dtype=torch.float32: fused_is_right(torch.device("cpu"), dtype, 2, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fused_pooling_is_used_where_it_equals_the_reference(dtype, tried, monkeypatch):
    monkeypatch.setattr(roi_pooling, "fused_roi_align", reference_roi_align)
    assert tried(dtype)


@pytest.mark.parametrize("part", ["result", "gradient"])
def test_fused_pooling_that_differs_is_left_for_the_reference(part, tried, monkeypatch):
    def align(levels, *others):
        pooled = reference_roi_align(levels, *others)
        return pooled + (0.1 * pooled.detach() if part == "result" else 0.1 * (pooled - pooled.detach()))

    monkeypatch.setattr(roi_pooling, "fused_roi_align", align)
    with pytest.warns(UserWarning, match="goes level by level, which is slower: the fused one is off by 1.0e-01"):
        assert not tried()


def test_fused_pooling_is_for_gpus_where_algorithms_need_not_be_deterministic(monkeypatch):
    asked = []
    monkeypatch.setattr(roi_pooling, "fused_is_right", lambda *kind: asked.append(kind) or True)
    level = SimpleNamespace(is_cuda=True, device="cuda:1", dtype=torch.bfloat16, shape=(2, 7, 5, 3))
    assert roi_pooling._is_fused([level] * 4, 14) and asked == [("cuda:1", torch.bfloat16, 4, 7, 14)]
    assert not roi_pooling._is_fused([torch.zeros(2, 7, 5, 3)], 14)
    try:
        torch.use_deterministic_algorithms(True)
        assert not roi_pooling._is_fused([level] * 4, 14)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not roi_pooling._is_fused([level] * 4, 14)
    assert len(asked) == 1
