from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from swin_dense import compiled_calls
from swin_dense.config import SwinConfig
from swin_dense.tools.benchmark_agreement import relative_difference
from swin_dense.tools.benchmark_backbone import GRADIENT, BackboneContest
from swin_dense.tools.benchmark_contest import OURS, Contest, Inference, Row, Training, spread_weights, work_of
from swin_dense.tools.benchmark_detect import DetectionContest
from swin_dense.tools.benchmark_models import agreements_of
from swin_dense.tools.benchmark_segment import SegmentationContest

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SwinConfig(embed_dim=8, depths=(2, 2, 1, 2), num_heads=(1, 2, 2, 4), window_size=3)
SMALL_DETECTOR: dict[str, Any] = {
    "num_classes": 5,
    "fpn_channels": 8,
    "box_head_channels": 16,
    "mask_head_channels": 8,
    "max_proposals": 31,
    "samples_per_image": 64,
}
CONTESTS: dict[str, Contest[Any]] = {
    "backbone": BackboneContest(CONFIG, {}),
    "detect": DetectionContest(CONFIG, SMALL_DETECTOR),
    "segment": SegmentationContest(CONFIG, {"num_classes": 7, "channels": 8, "auxiliary_channels": 6}),
}
PEERS = [(name, peer) for name, contest in CONTESTS.items() for peer in contest.peers]
SIZE_HW = (96, 128)
MODES = ("inference", "forward and backward", "train step")


def row_of(mode, precision="float32", batch_size=2):
    return Row(mode, precision, batch_size, SIZE_HW)


def compared(name, peer, row, damage=lambda model: None):
    """What is found of a peer after something was done to its model."""
    pytest.importorskip({"huggingface": "transformers", "smp": "segmentation_models_pytorch"}.get(peer, peer))
    contest = CONTESTS[name]
    own = contest.own(row)
    other = contest.peer(peer, own, row)
    damage(other.model)
    return agreements_of(contest.references(peer, own), other, row, contest.batch(row).first())


@pytest.mark.parametrize(("name", "peer"), PEERS)
@pytest.mark.parametrize("mode", ["inference", "train step"])
def test_same_weights_give_equal_outputs(name, peer, mode):
    found = compared(name, peer, row_of(mode, "bfloat16"))
    assert all(one.holds for one in found)
    assert [one.precision for one in found] == ["float32"] * (len(found) - 1) + ["bfloat16"]
    assert found[0].difference < 1e-4 and len({one.reference for one in found}) == 1
    # Maps where a window rule changes nothing are not what is tested here.
    assert (found[0].reference in (OURS, f"{OURS} with style=torchvision")) == (peer == "huggingface")
    if peer != "smp" and (mode == "train step" or name == "detect"):
        assert len(found) == 3  # also what follows from the maps


@pytest.mark.parametrize("peer", CONTESTS["backbone"].peers)
def test_same_weights_give_equal_maps_when_cast_beforehand(peer):
    found = compared("backbone", peer, replace(row_of("inference", "bfloat16"), cast_once=True))
    assert all(one.holds for one in found) and [one.precision for one in found] == ["float32", "bfloat16"]
    assert found[1].difference > 1e-4  # they were cast


def test_casting_changes_a_copy():
    contest, row = CONTESTS["backbone"], replace(row_of("inference", "bfloat16"), cast_once=True)
    own, batch = contest.own(row), contest.batch(row)
    cast = own.cast(torch.bfloat16), batch.cast(torch.bfloat16)
    maps = work_of(*cast, row)()
    assert {stage_map.dtype for stage_map in maps.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in own.model.parameters()} == {torch.float32} == {batch.images.dtype}
    assert row.title == "inference, bfloat16 weights, 2 images of 96 x 128"


@pytest.mark.parametrize(("name", "peer"), PEERS)
def test_other_weights_are_noticed(name, peer):
    def damage(model):
        biases = [
            value for part, value in model.named_parameters() if part.endswith("mlp.fc2.bias") or "mlp.3.b" in part
        ]
        assert len(biases) == 7
        with torch.no_grad():
            biases[2][0] += 0.5  # one channel alone: norms do not see what all have in common

    found = compared(name, peer, row_of("inference"), damage)
    assert not found[0].holds and found[0].difference < float("inf")


def test_other_gradients_are_noticed():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return 1.1 * gradient

    def damage(model):
        model.register_forward_pre_hook(lambda module, inputs: (Doubled.apply(inputs[0]),))

    maps, results = compared("backbone", "torchvision", row_of("train step"), damage)
    assert maps.holds and not results.holds and results.worst == GRADIENT
    assert results.difference == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", CONTESTS)
def test_batch_and_weights_are_the_same_every_time(name):
    contest, row = CONTESTS[name], row_of("inference")
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    first, second = contest.own(row), contest.own(row)
    assert torch.equal(drawn, torch.get_rng_state())
    state = second.model.state_dict()
    assert all(torch.equal(value, state[part]) for part, value in first.model.state_dict().items())
    maps, others = first.maps(contest.batch(row)), second.maps(contest.batch(row))
    assert all(torch.equal(maps[part], others[part]) for part in maps)


@pytest.mark.parametrize("name", CONTESTS)
def test_first_image_is_compared_alone(name):
    contest, row = CONTESTS[name], row_of("inference")
    own = contest.own(row)
    own.model.eval()
    alone, together = (own.maps(batch) for batch in (contest.batch(row).first(), contest.batch(row)))
    for part, value in alone.items():
        assert len(value) == 1 and len(together[part]) == 2
        assert relative_difference(value, together[part][:1]) < 1e-5


@pytest.mark.parametrize("name", CONTESTS)
@pytest.mark.parametrize("mode", MODES)
def test_work_leaves_weights_and_no_gradients(name, mode):
    contest, row = CONTESTS[name], row_of(mode)
    own = contest.own(row)
    before = {part: value.detach().clone() for part, value in own.model.named_parameters()}
    work = work_of(own, contest.batch(row), row)
    held = work.held_bytes()
    assert isinstance(work, Training if row.trains else Inference) and own.model.training == row.trains
    work()
    work.forward()
    for part, value in own.model.named_parameters():
        assert torch.equal(value, before[part]) and value.grad is None
    moments = sum(2 * value.nbytes for value in before.values())  # of AdamW, after the first step
    assert moments <= work.held_bytes() - held < moments + 10_000 if mode == "train step" else work.held_bytes() == held


def test_every_parameter_of_a_backbone_gets_a_gradient():
    contest, row = CONTESTS["backbone"], row_of("forward and backward")
    own = contest.own(row)
    sum(own.losses(contest.batch(row)).values()).backward()
    assert all(value.grad is not None and value.grad.any() for value in own.model.parameters())


def test_nothing_is_drawn_in_training():
    for name in ("backbone", "segment"):
        contest, row = CONTESTS[name], row_of("train step")
        own = contest.own(row)
        own.model.train()
        batch = contest.batch(row)
        with torch.no_grad():
            first, second = own.losses(batch), own.losses(batch)
        assert all(torch.equal(first[part], second[part]) for part in first)


def test_detector_finds_about_as_many_objects_as_a_trained_one():
    contest, row = (
        DetectionContest(CONFIG, {**SMALL_DETECTOR, "num_classes": 80, "max_proposals": 1000}),
        row_of("inference"),
    )
    own = contest.own(row)
    own.model.eval()
    with torch.no_grad():
        counts = [len(found["scores"]) for found in own.predictions(contest.batch(row))]
    assert all(10 < count <= 100 for count in counts)


def test_objects_fill_their_boxes():
    for target in CONTESTS["detect"].batch(row_of("train step")).targets:
        boxes, masks = target["boxes"], target["masks"].full()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert len(boxes) == 15 and sides.min() >= 5
        assert boxes.min() >= 0 and (boxes[:, 2:] <= torch.tensor([SIZE_HW[1], SIZE_HW[0]])).all()
        assert torch.equal(masks.flatten(1).sum(dim=1).float(), sides.prod(dim=1))


def test_compiled_twin_is_another_model_with_the_same_weights(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(call.__self__) or call)
    for contest in CONTESTS.values():
        own = contest.own(row_of("inference"))
        twin = own.compiled()
        assert (own.name, twin.name) == (OURS, f"{OURS}, compiled") and twin.model is not own.model
        pairs = zip(own.model.parameters(), twin.model.parameters(), strict=True)
        assert all(torch.equal(one, other) and one is not other for one, other in pairs)
        # As users compile it, see `swin_dense.compile`, and nothing of the other.
        assert compiled_calls(twin.model) and not compiled_calls(own.model)
        parts = {id(module) for module in twin.model.modules()}
        assert compiled and all(id(module) in parts for module in compiled)
        compiled.clear()


@pytest.mark.parametrize(("name", "peer"), PEERS)
def test_peers_are_compiled_as_their_users_do_it(name, peer, monkeypatch):
    pytest.importorskip({"huggingface": "transformers", "smp": "segmentation_models_pytorch"}.get(peer, peer))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(call.__self__) or call)
    row = row_of("inference")
    contest = CONTESTS[name]
    twin = contest.peer(peer, contest.own(row), row).compiled()
    (part,) = compiled
    assert part is (twin.model.backbone if name == "detect" else twin.model)


def test_spread_weights_reach_everything_that_starts_the_same():
    model = BackboneContest(CONFIG, {}).own(row_of("inference")).model
    for part, value in model.named_parameters():
        assert value.numel() == 1 or len(value.unique()) > 1, part
    linear = nn.Linear(3, 5)
    weight = linear.weight.detach().clone()
    spread_weights(linear, torch.Generator().manual_seed(0))
    assert torch.equal(linear.weight, weight)


def test_row_says_what_it_is():
    assert row_of("train step").title == "train step, float32, 2 images of 96 x 128"
    assert row_of("inference", "bfloat16", 1).title == "inference, bfloat16, 1 image of 96 x 128"
    assert row_of("inference").pixels == 2 * 96 * 128
    assert [row_of(mode).trains for mode in MODES] == [False, True, True]
