import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from swin_dense.box_masks import BoxMasks
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import ConfigError
from swin_dense.tools.benchmark_peers import peer_of, torchvision_target
from swin_dense.tools.instance_task import InstanceBatch
from swin_dense.tools.recipe import InferenceSettings, read_recipe
from swin_dense.tools.semantic_task import SemanticBatch
from swin_dense.tools.tasks import task_of

pytestmark = pytest.mark.usefixtures("one_thread")
INFERENCE = InferenceSettings(short_edge=64, max_long_edge=100, scale=(100, 64))
LABELS = LabelMap(("a", "b", "c"), (1, 2, 3))
SMALL = {
    "semantic": ["model.head={channels: 8, auxiliary_channels: 8}"],
    "instance": ["model.head={fpn_channels: 8, box_head_channels: 16, mask_head_channels: 8, max_proposals: 17}"],
}


def own_model(task, *changes):
    recipe = read_recipe(f"shapes_{task}", ["model.backbone={}", *SMALL[task], *changes])
    with torch.device("meta"):
        return task_of(recipe).build_model(len(LABELS))


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return peer_of(own_model("semantic").architecture, INFERENCE)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return peer_of(own_model("instance", "model.head.score_threshold=0.0").architecture, INFERENCE)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def image_of(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def target_of(size_hw, crowd):
    """Three boxes with filled masks; `crowd` tells which is one."""
    boxes = torch.tensor([[3, 5, 20, 40], [11, 2, 50, 30], [30, 30, 47, 53]])
    masks = torch.zeros(3, *size_hw, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {
        "boxes": boxes.float(),
        "labels": torch.tensor([0, 2, 1]),
        "masks": BoxMasks.from_full(masks),
        "iscrowd": torch.tensor(crowd),
    }, masks


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_peer_is_as_large_as_ours_whatever_the_heads(task):
    for heads in (SMALL[task][0], "model.head={}"):
        model = own_model(task, heads)
        with torch.device("meta"):
            peer = peer_of(model.architecture, INFERENCE)
        auxiliary = num_parameters(model.auxiliary_head) if task == "semantic" else 0  # smp's UPerNet has none
        assert abs(num_parameters(peer) / (num_parameters(model) - auxiliary) - 1) < 1e-3


@pytest.mark.parametrize(
    ("task", "change", "got"),
    [
        ("semantic", "model.variant=swin_s", "a backbone with depths="),
        ("instance", "model.backbone={embed_dim: 48}", "a backbone with embed_dim=48"),
        ("instance", "model.detector=cascade_mask_rcnn", "the head cascade_mask_rcnn"),
    ],
)
def test_models_without_a_peer_are_refused(task, change, got):
    with pytest.raises(ConfigError, match=f"UPerNet and Mask R-CNN with swin_t, got {got}"):
        peer_of(own_model(task, change).architecture, INFERENCE)


def test_classifier_has_no_peer(classification_words):
    name, *overrides = classification_words()
    with torch.device("meta"):
        architecture = task_of(read_recipe(name, overrides)).build_model(3).architecture
    with pytest.raises(ConfigError, match="UPerNet and Mask R-CNN"):
        peer_of(architecture, INFERENCE)


@pytest.mark.parametrize("size_hw", [(47, 83), (90, 31)])
def test_predictions_have_the_original_size(size_hw, segmenter, detector):
    classes = segmenter.eval().predictor(LABELS)(image_of(size_hw))
    assert classes.shape == size_hw and classes.dtype == np.uint8 and classes.max() < len(LABELS)
    found = detector.eval().predictor(LABELS)(image_of(size_hw))
    assert len(found.scores) > 0 and found.labels.min() >= 0 and found.labels.max() < len(LABELS)
    assert {tuple(code["size"]) for code in found.masks_rle} == {size_hw}
    assert all(coco_mask.decode(code).shape == size_hw for code in found.masks_rle)
    assert found.boxes_xyxy.min() >= 0 and (found.boxes_xyxy.max(axis=0) <= [*size_hw[::-1]] * 2).all()


def test_segmenter_ignores_unlabelled_pixels(segmenter):
    images = torch.from_numpy(image_of((64, 59))).permute(2, 0, 1)[None]
    labels = torch.randint(0, len(LABELS), (1, 64, 59), dtype=torch.uint8)
    labels[:, 20:] = 255
    with torch.inference_mode():
        (loss,) = segmenter.eval().losses(SemanticBatch(images, labels, ["a"])).values()
        logits = segmenter(images.float() / 255)[:, :, :20]
    chosen = logits.log_softmax(dim=1).gather(1, labels[:, None, :20].long())
    torch.testing.assert_close(loss, -chosen.mean())


def test_target_drops_crowds_and_counts_labels_from_one():
    target, masks = target_of((61, 59), [False, True, False])
    given = torchvision_target(target)
    assert given["labels"].tolist() == [1, 2]
    assert torch.equal(given["boxes"], target["boxes"][[0, 2]])
    assert torch.equal(given["masks"], masks[[0, 2]])
    assert target["labels"].tolist() == [0, 2, 1] and len(target["masks"]) == 3


def test_detector_learns_from_images_as_they_are_with_or_without_objects(detector):
    sizes_hw = (64, 59), (71, 64)
    targets = [target_of(sizes_hw[0], [False] * 3)[0], target_of(sizes_hw[1], [True] * 3)[0]]
    images = [torch.from_numpy(image_of(size_hw)).permute(2, 0, 1) for size_hw in sizes_hw]
    batch = InstanceBatch(images, targets, [1, 2])
    seen = []
    hook = detector.model.transform.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    losses = detector.train().losses(detector.prepared(batch))
    hook.remove()
    assert seen[0].image_sizes == list(sizes_hw)
    assert len(losses) == 5 and all(torch.isfinite(loss) for loss in losses.values())
    assert batch.targets is targets and targets[0]["labels"].tolist() == [0, 2, 1]
