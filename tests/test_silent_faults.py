"""Faults that other libraries pass over in silence: each test states a law, shows one that breaks it, and keeps it."""

import contextlib
import copy
import io
import json

import albumentations
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.datasets.coco import CocoDataset
from swin_dense.datasets.coco_evaluation import CocoEvaluator
from swin_dense.datasets.transforms import instance_training
from swin_dense.features import FeatureSpec
from swin_dense.heads import mask_rcnn
from swin_dense.heads.targets import training_target

SIZE_HW = (61, 97)
COLOURS = {"red": (200, 30, 40), "green": (20, 190, 60), "blue": (30, 60, 210)}
BOXES_XYWH = {"red": (5, 7, 24, 41), "green": (37, 11, 22, 30), "blue": (66, 19, 26, 35)}
CROPPING = instance_training(tuple(range(53, 89)), 141, crop_branch=True, crop_short_edges=(61,), crop_range=(23, 41))


@pytest.fixture
def colours(tmp_path):
    """Three rectangles in a picture, the class of each is its colour; ids begin at 0, as many exporters write them."""
    image = np.zeros((*SIZE_HW, 3), np.uint8)
    annotations = []
    for number, (name, (x, y, width, height)) in enumerate(BOXES_XYWH.items()):
        image[y : y + height, x : x + width] = COLOURS[name]
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        annotations.append(
            {
                "id": number,
                "image_id": 0,
                "category_id": number,
                "bbox": [x, y, width, height],
                "area": width * height,
                "segmentation": [corners],
                "iscrowd": 0,
            }
        )
    Image.fromarray(image).save(tmp_path / "rectangles.png")
    content = {
        "images": [{"id": 0, "file_name": "rectangles.png", "height": SIZE_HW[0], "width": SIZE_HW[1]}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(COLOURS)],
        "annotations": annotations,
    }
    (tmp_path / "rectangles.json").write_text(json.dumps(content))
    return content, lambda **options: CocoDataset(tmp_path / "rectangles.json", tmp_path, **options)


def whole_picture(dataset):
    image, instances = dataset.raw(0)
    kept, masks = instances.with_masks()
    return image, kept, list(masks.full().numpy())


def albumentations_crop(dataset, side=31):
    """Crops as the recipes of albumentations make them."""
    image, instances, masks = whole_picture(dataset)
    crop = albumentations.Compose(
        [albumentations.RandomCrop(side, side)],
        bbox_params=albumentations.BboxParams("pascal_voc", label_fields=["labels"], clip=True),
        seed=0,
    )
    for _ in range(12):
        yield crop(image=image, bboxes=instances.boxes_xyxy, labels=instances.labels.tolist(), masks=masks)


def masks_show_their_class(image, labels, masks):
    """As many masks as labels, and under each mask lies the colour of its label (red, green or blue is strongest)."""
    return len(masks) == len(labels) and all(
        mask.any() and image[mask.astype(bool)].mean(axis=0).argmax() == label
        for label, mask in zip(labels, masks, strict=True)
    )


def test_label_and_mask_do_not_drift_apart_in_a_crop(colours):
    _, dataset_of = colours
    peers = [
        masks_show_their_class(crop["image"], np.array(crop["labels"], int), crop["masks"])
        for crop in albumentations_crop(dataset_of())
    ]
    assert not all(peers)

    dataset, counts = dataset_of(transform=CROPPING), set()
    for epoch in range(40):
        sample = dataset[epoch, 0]
        labels, masks = sample.target["labels"].numpy(), sample.target["masks"].full().numpy()
        assert masks_show_their_class(sample.image.permute(1, 2, 0).numpy(), labels, masks)
        counts.add(len(labels))
    assert counts >= {1, 2, 3}


def test_labels_stay_integers_through_augmentation(colours):
    _, dataset_of = colours
    peers = [label for crop in albumentations_crop(dataset_of()) for label in crop["labels"]]
    assert any(isinstance(label, float) for label in peers)

    dataset = dataset_of(transform=CROPPING)
    for epoch in range(12):
        labels = dataset[epoch, 0].target["labels"]
        assert labels.dtype == torch.int64
        assert set(labels.tolist()) <= {0, 1, 2}


class AlbumentationsCrops(Dataset):
    """A data set as it is usually written: one composed augmentation, called for each sample."""

    def __init__(self, image):
        self.image = image
        self.crop = albumentations.Compose([albumentations.RandomCrop(23, 23)], seed=0)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.from_numpy(self.crop(image=self.image)["image"])


def test_workers_and_epochs_do_not_repeat_each_others_random_numbers(colours):
    _, dataset_of = colours
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), dtype=np.uint8)
    loader = DataLoader(AlbumentationsCrops(noise), batch_size=None, num_workers=2)
    peers = [sample.numpy().tobytes() for _ in range(2) for sample in loader]
    assert len(peers) == 16 and len(set(peers)) <= 4  # both workers, and both epochs, draw the same

    dataset = dataset_of(transform=CROPPING)
    samples = {}
    for num_workers in (0, 2):
        batches = TrainingBatches(len(dataset), 2, seed=3, num_batches=8)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=list)
        samples[num_workers] = [sample.image.numpy().tobytes() for batch in loader for sample in batch]
    assert samples[0] == samples[2]
    assert len({dataset[epoch, 0].image.numpy().tobytes() for epoch in range(16)}) >= 14


def test_annotation_ids_from_zero_do_not_cost_precision(colours):
    content, dataset_of = colours
    perfect = [{**each, "score": 0.9} for each in content["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(perfect)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] < 0.7  # of perfect boxes

    dataset = dataset_of()
    _, instances, _ = whole_picture(dataset)
    evaluator = CocoEvaluator(dataset.ground_truth, dataset.label_map)
    evaluator.add(0, instances.boxes_xyxy, np.full(3, 0.9), instances.labels, None)
    assert evaluator.compute()["box"]["AP"] == pytest.approx(1.0, abs=1e-12)


def test_a_crowd_is_not_taught_as_background():
    image, crowd = torch.zeros(3, 96, 128), torch.tensor([30.0, 20.0, 110.0, 90.0])
    specs = {f"p{level}": FeatureSpec(4, 2**level) for level in (2, 3, 4, 5, 6)}
    ours = mask_rcnn("swin_t", num_classes=3, fpn_channels=4, box_head_channels=4, mask_head_channels=4).rpn
    sizes_hw = [(-(-96 // spec.stride), -(-128 // spec.stride)) for spec in specs.values()]
    levels = [torch.zeros(1, 4, *size_hw) for size_hw in sizes_hw]
    (anchors,) = ours.anchor_generator(ImageList(image[None], [(96, 128)]), levels)
    masks = torch.zeros(2, 96, 128, dtype=torch.uint8)
    target = {
        "boxes": torch.stack([torch.tensor([3.0, 5.0, 27.0, 44.0]), crowd]),
        "labels": torch.tensor([0, 1]),
        "masks": masks,
        "iscrowd": torch.tensor([False, True]),
    }
    in_crowd = ((anchors[:, :2] > crowd[:2]) & (anchors[:, 2:] < crowd[2:])).all(dim=1)
    assert in_crowd.any()

    top = {"training": 9, "testing": 9}
    peer = RegionProposalNetwork(ours.anchor_generator, RPNHead(4, 3), 0.7, 0.3, 256, 0.5, top, top, 0.7)
    without_crowd = {name: value[:1] for name, value in target.items()}  # with it, the crowd would be one object
    (peer_labels,), _ = peer.assign_targets_to_anchors([anchors], [without_crowd])
    assert (peer_labels[in_crowd] == 0).all()  # it learns that nothing is there

    (our_labels,), _ = ours.assign_targets_to_anchors([anchors], [training_target(target, image, 32)])
    assert (our_labels[in_crowd] == -1).all() and (our_labels == 0).any() and (our_labels == 1).any()
