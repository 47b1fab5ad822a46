from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.ops import batched_nms, box_iou, masks_to_boxes, roi_align

from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError
from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import mask_rcnn
from swin_dense.heads.roi_heads import DetectionSelector
from swin_dense.heads.suppression import SoftNMS
from swin_dense.heads.view_detection import view_detector
from swin_dense.heads.views import View

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.0)
WIDTHS = {"fpn_channels": 8, "box_head_channels": 16, "mask_head_channels": 8, "max_proposals": 60}
BUILDERS = {
    "mask_rcnn": mask_rcnn,
    "torchvision": partial(mask_rcnn, style="torchvision"),
    "cascade": cascade_mask_rcnn,
}
SIZE_HW = (53, 97)


def detector_of(kind="mask_rcnn", **changes):
    torch.manual_seed(0)
    detector = BUILDERS[kind](TINY, 3, **{**WIDTHS, **changes})
    for name, parameter in detector.named_parameters():  # outputs that differ from box to box
        if "predictor" in name or "cls_logits" in name:
            parameter.data = torch.randn(parameter.shape) * (0.02 if "bbox_pred" in name else 0.5)
    return detector.double().eval().requires_grad_(False)


def image_of(size_hw=SIZE_HW):
    return torch.rand(3, *size_hw, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def views_of(*sizes_hw):
    images = [interpolate(image_of()[None], size=size_hw, mode="bilinear")[0] for size_hw in sizes_hw]
    return [view for image in images for view in (View(image), View(image).flipped())]


def close(first, second, tolerance=1e-9):
    return set(first) == set(second) and all(
        first[name].shape == second[name].shape and bool(((first[name] - second[name]).abs() < tolerance).all())
        for name in first
    )


@pytest.fixture(params=BUILDERS)
def detector(request):
    return detector_of(request.param)


def test_one_view_gives_what_the_model_gives(detector):
    (wanted,) = detector.detect([image_of()])
    assert len(wanted["scores"]) > 10
    assert close(view_detector(detector)([View(image_of())], SIZE_HW), wanted)


def test_flipped_view_gives_what_the_model_gives_for_the_flipped_image(detector):
    (seen,) = detector.detect([image_of().flip(2)])
    x1, y1, x2, y2 = seen["boxes"].unbind(dim=1)
    wanted = {**seen, "boxes": torch.stack((97 - x2, y1, 97 - x1, y2), dim=1), "masks": seen["masks"].flip(3)}
    assert close(view_detector(detector)([View(image_of()).flipped()], SIZE_HW), wanted)


def test_equal_views_give_what_one_gives(detector):
    view = View(image_of())
    one, three = (view_detector(detector)([view] * count, SIZE_HW) for count in (1, 3))
    assert close(one, three)


@pytest.mark.parametrize("soft_nms", [None, "linear", "gaussian"])
def test_views_give_the_same_in_any_order(soft_nms):
    detect, views = view_detector(detector_of(), soft_nms), views_of((53, 97), (41, 79))
    forth, back = detect(views, SIZE_HW), detect(iter(views[::-1]), SIZE_HW)
    assert len(forth["scores"]) > 10 and close(forth, back)


@pytest.mark.parametrize("soft_nms", [None, "linear", "gaussian"])
def test_detections_are_in_the_frame_and_form_that_is_promised(soft_nms, detector):
    (height, width), views = SIZE_HW, views_of((31, 59), (61, 113))
    found = view_detector(detector, soft_nms)(views, SIZE_HW)
    count = len(found["scores"])
    assert 10 < count <= 100 and (found["scores"].diff() <= 0).all() and found["scores"][0] <= 1
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height, width, height])).all()
    assert found["labels"].dtype == torch.int64 and set(found["labels"].tolist()) <= {0, 1, 2}
    assert found["masks"].shape == (count, 1, 28, 28) and 0 <= found["masks"].min() and found["masks"].max() <= 1
    assert len(view_detector(detector_of(max_detections=7), soft_nms)(views, SIZE_HW)["scores"]) == 7


def test_boxes_of_all_views_suppress_each_other_and_masks_are_averaged():
    detector, views = detector_of(), views_of((53, 97), (31, 59))
    boxes, scores, labels = [], [], []
    for view in views:
        (seen,) = detector.detect([view.image])
        boxes.append(view.boxes_to_original(seen["boxes"], SIZE_HW))
        scores.append(seen["scores"])
        labels.append(seen["labels"])
    boxes, scores, labels = (torch.cat(parts) for parts in (boxes, scores, labels))
    rows = batched_nms(boxes, scores, labels, 0.5)[:100]
    masks = 0
    for view in views:
        batch, levels = detector.pyramid([view.image])
        own_boxes = view.boxes_from_original(boxes[rows], SIZE_HW)
        (seen,) = detector.roi_heads.masks(levels, [own_boxes], [labels[rows] + 1], batch.image_sizes)
        masks = masks + (seen.flip(3) if view.is_flipped else seen) / len(views)
    wanted = {"boxes": boxes[rows], "scores": scores[rows], "labels": labels[rows], "masks": masks}
    assert len(rows) < len(boxes) and close(view_detector(detector)(views, SIZE_HW), wanted)


@pytest.mark.parametrize("soft_nms", ["linear", "gaussian"])
def test_soft_suppression_lowers_scores_and_keeps_what_overlaps(soft_nms):
    detector, views = detector_of(max_detections=1000), views_of(SIZE_HW)
    hard, soft = (view_detector(detector, method)(views, SIZE_HW) for method in (None, soft_nms))
    assert len(soft["scores"]) > len(hard["scores"])
    assert torch.equal(soft["boxes"][0], hard["boxes"][0]) and torch.equal(soft["scores"][0], hard["scores"][0])
    same_class = soft["labels"][:, None] == soft["labels"]
    assert (box_iou(soft["boxes"], soft["boxes"])[same_class & ~torch.eye(len(same_class)).bool()] > 0.5).any()
    assert soft["scores"].min() >= 1e-3 and soft["scores"].min() < 0.05 < hard["scores"].min()


@pytest.mark.parametrize("soft_nms", ["linear", "gaussian"])
def test_soft_suppression_happens_once_among_all_candidates(soft_nms, detector):
    heads, size_hw = detector.roi_heads, (41, 67)
    view = View(image_of(size_hw))
    batch, levels = detector.pyramid([view.image])
    proposals, _ = detector.rpn(batch, levels, None)
    class_boxes, logits = heads.class_boxes(levels, proposals, batch.image_sizes)
    boxes, scores, labels = heads.select.candidates(class_boxes, logits.softmax(dim=1), size_hw)
    rows, new_scores = SoftNMS(soft_nms)(boxes, scores, labels, 100)
    found = view_detector(detector, soft_nms)([view], size_hw)
    assert torch.equal(found["labels"], labels[rows] - 1) and (found["boxes"] - boxes[rows]).abs().max() < 1e-9
    assert (found["scores"] - new_scores).abs().max() < 1e-9


def test_nothing_found_is_an_empty_result(detector):
    detector = detector_of(score_threshold=0.9999)
    found = view_detector(detector)(views_of((31, 59)), SIZE_HW)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
        "masks": (0, 1, 28, 28),
    }


def test_unknown_soft_nms_is_refused():
    with pytest.raises(ConfigError, match="method must be"):
        view_detector(detector_of(), "cubic")


def extents(masks):
    return masks_to_boxes(masks).double() + torch.tensor([0.0, 0, 1, 1])  # from the last pixel to its far side


class SymmetricHeads:
    """Finds the extent of each colour, and its pixels; left and right are the same to it."""

    select = DetectionSelector(score_threshold=0.05, nms_iou=0.5, max_detections=100)

    def class_boxes(self, levels, proposals, sizes_hw):
        return torch.cat(proposals).repeat(1, 4), torch.eye(4).double()[1:] * torch.tensor([[9.0], [8.0], [7.0]])

    def masks(self, levels, boxes, labels, sizes_hw):
        channels = levels["image"][0, labels[0] - 1]
        rois = [box[None] for box in boxes[0]]
        return [roi_align(channels[:, None], rois, 28, aligned=True, sampling_ratio=4)]


def test_symmetric_model_sees_a_flipped_view_like_the_view():
    image = torch.zeros(3, 64, 96).double()
    image[0, 10:30, 4:40] = image[1, 20:60, 50:90] = image[2, 5:25, 30:70] = 1
    image[1, 20:30, 50:60] = 0  # a mask with a left and a right
    model = SimpleNamespace(
        pyramid=lambda images: (SimpleNamespace(image_sizes=[images[0].shape[1:]]), {"image": images[0][None]}),
        rpn=lambda batch, levels, targets: ([extents(levels["image"][0] > 0.5)], {}),
        roi_heads=SymmetricHeads(),
    )
    size_hw, view = (32, 48), View(image)
    wanted = view_detector(model)([view], size_hw)
    assert torch.allclose(wanted["boxes"][0], torch.tensor([2.0, 5, 20, 15]).double()) and len(wanted["scores"]) == 3
    assert (wanted["masks"][1] - wanted["masks"][1].flip(2)).abs().max() > 0.5
    for views in ([view.flipped()], [view, view.flipped()], [view.flipped()] * 2):
        assert close(view_detector(model)(views, size_hw), wanted)
