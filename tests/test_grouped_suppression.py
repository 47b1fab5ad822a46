import sys

import pytest
import torch
from torchvision.ops import nms

from swin_dense.errors import ConfigError
from swin_dense.heads import grouped_suppression
from swin_dense.heads.grouped_suppression import grouped_nms, kernel_is_right

SIZES = (7, 0, 1, 43, 2, 0, 0, 101, 13, 0)  # of groups
INF = float("inf")


def crowd(sizes=SIZES, num_scores=1000, seed=0, dtype=torch.float32):
    """Boxes that overlap some others, many of them twice, in groups whose rows are mixed; of some scores many."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    corner = 23 * torch.rand(count, 2, generator=generator, dtype=dtype)
    boxes = torch.cat((corner, corner + 5 + 11 * torch.rand(count, 2, generator=generator, dtype=dtype)), dim=1)
    boxes = boxes[torch.randint(0, count, (count,), generator=generator)]
    scores = torch.randint(-num_scores // 2, num_scores, (count,), generator=generator).to(dtype) / 7
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return boxes, scores, groups[torch.randperm(count, generator=generator)]


def one_by_one(boxes, scores, groups, num_groups, iou):
    """Each group alone."""
    keep = torch.zeros(len(boxes), dtype=torch.bool)
    for group in range(num_groups):
        rows = (groups == group).nonzero()[:, 0]
        keep[rows[nms(boxes[rows], scores[rows], iou)]] = True
    return keep


def overlap(one, other):
    """IoU of two boxes, number by number."""
    width = max(min(one[2], other[2]) - max(one[0], other[0]), 0)
    height = max(min(one[3], other[3]) - max(one[1], other[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (areas[0] + areas[1] - width * height)


def literally(boxes, scores, groups, iou):
    """The definition, in plain Python: row by row, the best first, against all that stayed."""
    kept, boxes, groups = [], boxes.tolist(), groups.tolist()
    for row in sorted(range(len(boxes)), key=lambda row: -scores[row]):
        rivals = [boxes[other] for other in kept if groups[other] == groups[row]]
        if all(overlap(rival, boxes[row]) <= iou for rival in rivals):
            kept.append(row)
    return torch.zeros(len(boxes), dtype=torch.bool).index_fill(0, torch.tensor(kept), True)


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_grouped_nms_is_its_definition(iou):
    tensors = crowd((7, 0, 1, 43, 2), dtype=torch.float64)
    keep = grouped_nms(*tensors, 5, iou)
    assert keep.dtype == torch.bool and keep.sum() >= 4
    assert torch.equal(keep, literally(*tensors, iou))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_scores", [3, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_grouped_nms_keeps_of_each_group_what_torchvision_keeps_of_it_alone(dtype, num_scores, seed):
    tensors = crowd(num_scores=num_scores, seed=seed, dtype=dtype)
    keep = grouped_nms(*tensors, len(SIZES), 0.4)
    assert 20 < keep.sum() < len(keep) - 20
    assert torch.equal(keep, one_by_one(*tensors, len(SIZES), 0.4))


def test_grouped_nms_does_not_depend_on_the_order_of_rows_whose_scores_differ():
    boxes, _, groups = crowd()
    generator = torch.Generator().manual_seed(3)
    scores = torch.randperm(len(boxes), generator=generator).float()
    order = torch.randperm(len(boxes), generator=generator)
    keep = grouped_nms(boxes, scores, groups, len(SIZES), 0.4)
    assert torch.equal(grouped_nms(boxes[order], scores[order], groups[order], len(SIZES), 0.4), keep[order])


def test_grouped_nms_keeps_the_first_of_equal_boxes_with_equal_scores():
    boxes = torch.tensor([[1.0, 2, 30, 20]]).repeat(5, 1)
    keep = grouped_nms(boxes, torch.tensor([0.3, 0.7, 0.3, 0.7, 0.3]), torch.tensor([0, 2, 0, 2, 1]), 3, 0.5)
    assert keep.tolist() == [True, True, False, False, True]


def test_grouped_nms_takes_scores_of_any_precision():
    boxes, scores, groups = crowd(num_scores=20)
    wanted = grouped_nms(boxes, scores.round(), groups, len(SIZES), 0.4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(grouped_nms(boxes, scores.round().to(dtype), groups, len(SIZES), 0.4), wanted)
    fine = torch.tensor([0.5, 0.5 + 1e-12], dtype=torch.float64)  # equal in the dtype of the boxes
    assert grouped_nms(boxes[:1].repeat(2, 1), fine, groups.new_zeros(2), 1, 0.4).tolist() == [False, True]


@pytest.mark.parametrize("place", ["score", "group after the last", "group before the first"])
def test_empty_places_neither_stay_nor_suppress(place):
    boxes, scores, groups = crowd()
    is_empty = torch.arange(len(boxes)) % 3 == 1
    wanted = grouped_nms(boxes[~is_empty], scores[~is_empty], groups[~is_empty], len(SIZES), 0.4)
    if place == "score":
        scores = scores.masked_fill(is_empty, -INF)
    else:
        groups = groups.masked_fill(is_empty, len(SIZES) if place == "group after the last" else -1)
    keep = grouped_nms(boxes, scores, groups, len(SIZES), 0.4)
    assert torch.equal(keep[~is_empty], wanted) and not keep[is_empty].any()


def test_nothing_is_kept_of_nothing():
    boxes, scores, groups = crowd()
    assert grouped_nms(boxes[:0], scores[:0], groups[:0], 3, 0.5).shape == (0,)
    assert grouped_nms(boxes[:0], scores[:0], groups[:0], 0, 0.5).shape == (0,)
    assert not grouped_nms(boxes, scores, groups, 0, 0.5).any()
    assert not grouped_nms(boxes, torch.full_like(scores, -INF), groups, len(SIZES), 0.5).any()


def test_boxes_without_area_all_stay():
    boxes = torch.tensor([[3.0, 4, 3, 4], [3, 4, 3, 4], [3, 4, 3, 9], [0, 0, 9, 9], [0, 4, 9, 4]])
    scores, groups = torch.arange(5.0), torch.zeros(5, dtype=torch.int64)
    assert grouped_nms(boxes, scores, groups, 1, 0.0).all()


def test_threshold_is_strict_and_not_rounded():
    groups = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        half = torch.tensor([[0, 0, 2, 3], [0, 0, 1, 3]], dtype=dtype)
        assert grouped_nms(half, torch.ones(2), groups, 1, 0.5).all()
        assert not grouped_nms(half, torch.ones(2), groups, 1, 0.4999999).all()
        three_fifths = torch.tensor([[0, 0, 5, 1], [0, 0, 3, 1]], dtype=dtype)  # in float32 more than 0.6
        assert grouped_nms(three_fifths, torch.ones(2), groups, 1, 0.6).all() == (dtype == torch.float64)


def test_grouped_nms_changes_nothing_it_is_given_and_gives_no_gradient():
    boxes, scores, groups = crowd()
    copies = [boxes.clone(), scores.clone(), groups.clone()]
    wanted = grouped_nms(boxes, scores, groups, len(SIZES), 0.4)
    keep = grouped_nms(boxes.requires_grad_(), scores.requires_grad_(), groups, len(SIZES), 0.4)
    assert torch.equal(keep, wanted) and not keep.requires_grad
    assert all(map(torch.equal, (boxes, scores, groups), copies))


def test_any_memory_layout_gives_the_same():
    boxes, scores, groups = crowd()
    wanted = grouped_nms(boxes, scores, groups, len(SIZES), 0.4)
    spread = boxes.T.contiguous().T, scores[:, None].repeat(1, 2)[:, 0], groups[:, None].repeat(1, 2)[:, 1]
    assert torch.equal(grouped_nms(*spread, len(SIZES), 0.4), wanted)


def test_operator_keeps_the_rules_of_torch():
    torch.library.opcheck(torch.ops.swin_dense.grouped_nms.default, (*crowd((3, 0, 5)), 3, 0.4))


class Suppression(torch.nn.Module):
    def forward(self, boxes, scores, groups):
        return grouped_nms(boxes, scores, groups, len(SIZES), 0.4)


def num_operators(graph):
    return [node.target for node in graph.nodes].count(torch.ops.swin_dense.grouped_nms.default)


def test_compiled_graph_has_one_operator_for_all_sizes():
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(num_operators(graph_module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, example_inputs)

    torch.compiler.reset()
    try:
        compiled = torch.compile(Suppression(), fullgraph=True, backend=backend, dynamic=True)
        for sizes in ((7, 11), (5, 0, 31)):
            tensors = crowd(sizes)
            assert torch.equal(compiled(*tensors), Suppression()(*tensors))
    finally:
        torch.compiler.reset()
    assert graphs == [1]


def test_exported_program_has_one_operator():
    count = torch.export.Dim("count", min=2)
    program = torch.export.export(Suppression(), crowd((7, 11)), dynamic_shapes=({0: count},) * 3)
    assert num_operators(program.graph) == 1
    larger = crowd((7, 0, 43))
    assert torch.equal(program.module()(*larger), Suppression()(*larger))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \(N, 4\) of float32 or float64, got \(3, 5\) of torch.float32"),
        ({"boxes": torch.zeros(3, 4).bfloat16()}, r"boxes must be .*, got \(3, 4\) of torch.bfloat16"),
        ({"scores": torch.zeros(2)}, r"scores must be \(3,\) floats, one for each box, got \(2,\) of torch.float32"),
        ({"scores": torch.zeros(3).long()}, r"scores must be .*, got \(3,\) of torch.int64"),
        ({"groups": torch.zeros(3)}, r"groups must be \(3,\) of int64, one for each box, got \(3,\) of torch.float32"),
        ({"groups": torch.zeros(3, 1).long()}, r"groups must be .*, got \(3, 1\) of torch.int64"),
        ({"iou": 1.5}, r"iou must be from 0 to 1, got 1\.5"),
        ({"iou": float("nan")}, r"iou must be from 0 to 1, got nan"),
    ],
)
def test_what_does_not_fit_is_one_error(changes, message):
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "groups": torch.zeros(3).long(), "iou": 0.5}
    assert grouped_nms(**arguments, num_groups=2).all()
    with pytest.raises(ConfigError, match=message):
        grouped_nms(**{**arguments, **changes}, num_groups=2)


def test_tensors_of_two_devices_are_an_error():
    boxes, scores, groups = crowd((3,))
    with pytest.raises(ConfigError, match="scores must be on the device of boxes, cpu, got meta"):
        grouped_suppression._check(boxes, scores.to("meta"), groups, 0.5)


def test_grouped_nms_on_a_cpu_needs_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "swin_dense.heads.suppression_kernels", None)  # importing it would fail
    assert grouped_nms(*crowd(), len(SIZES), 0.4).any()


@pytest.fixture
def tried(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("swin_dense.kernel_trial._answers", {})
    return lambda dtype=torch.float32: kernel_is_right(torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_is_used_where_it_keeps_what_torchvision_does(dtype, tried, monkeypatch):
    seen = []

    def group_by_group(*arguments):
        keep = grouped_suppression.nms_group_by_group(*arguments)
        seen.append((arguments[0].dtype, int(keep.sum()), int((~keep).sum()), arguments[2].bincount().min()))
        return keep

    monkeypatch.setattr(grouped_suppression, "nms_by_kernel", group_by_group)
    assert tried(dtype)
    ((tried_dtype, kept, dropped, smallest),) = seen
    assert tried_dtype == dtype and min(kept, dropped, smallest) > 5


def test_kernel_that_differs_is_left_for_torchvision(tried, monkeypatch):
    monkeypatch.setattr(grouped_suppression, "nms_by_kernel", lambda boxes, *_: torch.ones(len(boxes)).bool())
    with pytest.warns(UserWarning, match=r"which is slower: the kernel for all groups keeps other boxes\."):
        assert not tried()
