import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.datasets.coco import CocoDataset, ImageIds
from swin_dense.datasets.copy_paste import CopyPaste
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.transforms import instance_training, large_scale_jitter, sample_seed
from swin_dense.errors import AnnotationError, DataError, ImageError

TRAINING = instance_training(tuple(range(31, 71)), 131, crop_branch=True)
JITTER = large_scale_jitter(61, (0.5, 2.0))


def dataset_of(tree, transform=None, **options):
    tree.write()
    return CocoDataset(tree.annotation_file, tree.image_folder, transform, **options)


def contents(sample):
    target = sample.target
    tensors = {**target, **vars(target["masks"])}
    values = [value.numpy().tobytes() for value in tensors.values() if isinstance(value, torch.Tensor)]
    return (sample.image.numpy().tobytes(), *values, sample.image_id)


def load(dataset, num_workers, seed=5, num_batches=6):
    batches = TrainingBatches(len(dataset), 2, seed=seed, num_batches=num_batches)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=list)
    return [sample for batch in loader for sample in batch]


def test_samples_have_the_stated_types_and_sizes(coco_tree):
    dataset = dataset_of(coco_tree)
    assert len(dataset) == 4 and dataset.image_ids == [3, 13, 23, 33]
    assert dataset.label_map == LabelMap(("dog", "cat", "cup"), (1, 17, 90))
    assert np.array_equal(dataset.aspect_ratios, [67 / 41, 37 / 59, 53 / 47, 61 / 31])
    sample = dataset[0]
    assert sample.image.shape == (3, 41, 67) and sample.image.dtype == torch.uint8
    target = sample.target
    assert target["boxes"].tolist() == [[4, 6, 24, 15], [30, 2, 41, 15], [40, 30, 60, 40]]
    assert target["labels"].tolist() == [1, 2, 0] and target["iscrowd"].tolist() == [False, False, True]
    masks = target["masks"]
    assert masks.image_size_hw == (41, 67) and masks.full().shape == (3, 41, 67)
    assert masks.sizes_hw.tolist() == [[9, 20], [13, 11], [10, 20]] and masks.pixels.dtype == torch.uint8
    assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
    assert (sample.image_id, sample.index, sample.original_size_hw) == (3, 0, (41, 67))


def test_image_ids_are_a_sequence_of_ints():
    values = [7, 2**63 - 1, 0, 12]
    ids = ImageIds(np.array(values))
    assert ids == values and values == ids and ids == ImageIds(np.array(values)) and ids == tuple(values)
    assert ids != values[:3] and ids != [*values[:3], 13] and ids != 7
    assert [ids[row] for row in range(4)] == list(ids) == values and ids[-1] == 12 and ids[np.int64(3)] == 12
    assert {type(value) for value in [ids[1], *ids, *ids[1:]]} == {int}
    assert ids[1:3] == values[1:3] and 12 in ids and 13 not in ids and ids.index(0) == 2 and repr(ids) == repr(values)
    with pytest.raises(IndexError):
        ids[4]
    with pytest.raises(TypeError):
        ids[0] = 1


def test_nothing_of_a_data_set_grows_with_its_images_but_arrays(coco_tree):
    dataset = dataset_of(coco_tree)
    held = [dataset, dataset.image_ids, dataset._images, dataset._images.file_names, dataset._table]
    containers = [value for part in held for value in vars(part).values() if isinstance(value, list | tuple | set)]
    assert all(len(value) != len(dataset) for value in containers)


def test_masks_lie_in_their_boxes(coco_tree):
    dataset = dataset_of(coco_tree)
    for index in range(len(dataset)):
        target = dataset[index].target
        corners_xy = target["masks"].corners_xy
        extents = torch.cat([corners_xy, corners_xy + target["masks"].sizes_hw.flip(1)], dim=1)
        assert float((extents - target["boxes"]).abs().max()) <= 1 if len(extents) else index == 3


def test_an_image_without_objects_has_empty_targets(coco_tree):
    target = dataset_of(coco_tree, TRAINING)[3].target
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    assert len(target["masks"]) == 0 and target["masks"].full().shape[0] == 0


def test_skip_empty_leaves_out_images_without_objects_or_with_crowds_only(coco_tree):
    dataset = dataset_of(coco_tree, skip_empty=True)
    assert dataset.image_ids == [3, 13] and len(dataset.sizes_hw) == 2
    assert {entry["image_id"] for entry in dataset.ground_truth["annotations"]} == {3, 13}


@pytest.mark.parametrize("skip_empty", [False, True])
def test_objects_per_image_are_those_of_each_raw_image(coco_tree, skip_empty):
    dataset = dataset_of(coco_tree, skip_empty=skip_empty)
    counts = dataset.objects_per_image
    assert counts.tolist() == [len(dataset.instances(index)) for index in range(len(dataset))]
    assert counts.tolist() == [3, 2, 1, 0][: len(dataset)] and counts.dtype == np.int64


def test_ground_truth_is_complete_renumbered_and_private(coco_tree):
    for number, annotation in enumerate(coco_tree.content["annotations"]):
        annotation["id"] = number
        del annotation["area"], annotation["iscrowd"]
    dataset = dataset_of(coco_tree)
    truth = dataset.ground_truth
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["category_id"] for entry in truth["annotations"]] == [17, 90, 1, 1, 90, 17]
    assert [entry["area"] for entry in truth["annotations"]][:4] == [180.0, 143.0, 200.0, 264.0]
    assert "annotation ids from 0 (renumbered for evaluation)" in dataset.findings
    truth["annotations"].clear()
    assert len(dataset.ground_truth["annotations"]) == 6


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_ground_truth_has_the_same_masks_in_pycocotools(coco_tree):
    from pycocotools.coco import COCO

    dataset = dataset_of(coco_tree)
    reference = COCO()
    reference.dataset = dataset.ground_truth
    reference.createIndex()
    for index, image_id in enumerate(dataset.image_ids):
        masks = [reference.annToMask(entry) for entry in reference.imgToAnns[image_id]]
        assert np.array_equal(dataset[index].target["masks"].full(), np.reshape(masks, (-1, *dataset.sizes_hw[index])))


def test_an_ignored_annotation_is_a_region_that_takes_no_part_and_needs_only_a_box(coco_tree):
    first, second = coco_tree.content["annotations"][:2]
    first["ignore"] = 1
    second.update(ignore=1, segmentation=[])
    dataset = dataset_of(coco_tree)
    target = dataset[0].target
    assert target["iscrowd"].tolist() == [True, True, True]
    assert target["masks"].crop(1).shape == (13, 11) and bool(target["masks"].crop(1).all())
    assert [entry["iscrowd"] for entry in dataset.ground_truth["annotations"]] == [1, 1, 1, 0, 0, 1]
    assert dataset_of(coco_tree, skip_empty=True).image_ids == [13]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_detections_in_an_ignored_region_are_no_mistakes(coco_tree):
    from swin_dense.datasets.coco_evaluation import CocoEvaluator

    def precision(ignore):
        coco_tree.content["annotations"][1]["ignore"] = ignore
        dataset = dataset_of(coco_tree)
        evaluator = CocoEvaluator(dataset.ground_truth, dataset.label_map)
        for index, image_id in enumerate(dataset.image_ids):
            target = dataset[index].target
            objects = ~target["iscrowd"]
            boxes, labels = target["boxes"][objects].numpy(), target["labels"][objects].numpy()
            if image_id == 3:  # twice, with the highest scores, in the region
                boxes = np.concatenate([boxes, np.float32([[31, 3, 40, 14], [32, 4, 41, 15]])])
                labels = np.append(labels, [2, 2])
            scores = np.linspace(0.1, 0.9, len(boxes))
            evaluator.add(image_id, boxes, scores, labels, None)
        return evaluator.compute()["box"]["AP"]

    assert precision(ignore=1) == pytest.approx(1.0) and precision(ignore=0) < 0.95


def test_boxes_are_clipped_and_tiny_ones_dropped_with_all_of_theirs(coco_tree):
    first, second = coco_tree.content["annotations"][:2]
    first["bbox"] = [4.0, 6.0, 0.4, 9.0]
    second["bbox"] = [30.0, -2.0, 40.0, 13.0]
    dataset = dataset_of(coco_tree)
    _, instances = dataset.raw(0)
    assert instances.annotation_ids.tolist() == [12, 15]
    assert instances.boxes_xyxy[0].tolist() == [30, 0, 67, 11]
    assert dataset.ground_truth["annotations"][0]["bbox"] == [4.0, 6.0, 0.4, 9.0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_samples_are_the_same_for_any_number_of_workers(coco_tree, num_workers):
    dataset = dataset_of(coco_tree, TRAINING)
    alone = [contents(sample) for sample in load(dataset, 0)]
    assert alone == [contents(sample) for sample in load(dataset, num_workers)]


def test_epochs_and_seeds_differ_and_repeat(coco_tree):
    dataset = dataset_of(coco_tree, TRAINING, seed=1)
    other = dataset_of(coco_tree, TRAINING, seed=2)
    pictures = {contents(dataset[epoch, 0]) for epoch in range(12)}
    assert len(pictures) >= 10
    assert contents(dataset[3, 0]) == contents(dataset[3, 0])
    assert contents(dataset[0]) == contents(dataset[0, 0])
    assert pictures != {contents(other[epoch, 0]) for epoch in range(12)}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_pasted_samples_are_the_same_for_any_number_of_workers(coco_tree, num_workers):
    dataset = dataset_of(coco_tree, JITTER, copy_paste=CopyPaste())
    alone = [contents(sample) for sample in load(dataset, 0)]
    assert alone == [contents(sample) for sample in load(dataset, num_workers)]


def test_a_pasted_sample_can_be_replayed_from_seed_epoch_and_index(coco_tree):
    dataset = dataset_of(coco_tree, JITTER, copy_paste=CopyPaste(0.5), seed=3)
    plain = dataset_of(coco_tree, JITTER, seed=3)
    changed = 0
    for epoch in range(12):
        seed = sample_seed(3, epoch, 1)
        image, instances = JITTER(*plain.raw(1), seed)
        paste = CopyPaste(0.5).draw(seed, 4)
        if paste is None:
            assert contents(dataset[epoch, 1]) == contents(plain[epoch, 1])
            continue
        image, instances = paste(image, instances, *JITTER(*plain.raw(paste.index), paste.transform_seed))
        sample = dataset[epoch, 1]
        assert np.array_equal(sample.image.permute(1, 2, 0), image)
        assert np.array_equal(sample.target["boxes"], instances.boxes_xyxy)
        assert np.array_equal(sample.target["labels"], instances.labels)
        changed += contents(sample) != contents(plain[epoch, 1])
    assert changed
    assert len({contents(dataset[epoch, 1]) for epoch in range(12)}) > 10


def test_dataset_and_samples_can_be_pickled(coco_tree):
    dataset = pickle.loads(pickle.dumps(dataset_of(coco_tree, TRAINING)))
    sample = dataset[1, 0]
    assert contents(pickle.loads(pickle.dumps(sample))) == contents(sample)


def test_exif_frame_is_the_one_that_the_annotations_state(coco_tree):
    path = coco_tree.image_folder / "picture_0.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    assert dataset_of(coco_tree)[0].image.shape == (3, 41, 67)


def test_missing_width_and_height_come_from_the_picture(coco_tree):
    for image in coco_tree.content["images"]:
        del image["width"]
    assert dataset_of(coco_tree).sizes_hw.tolist() == [[41, 67], [59, 37], [47, 53], [31, 61]]


def test_wrong_stated_size_is_refused(coco_tree):
    coco_tree.content["images"][3].update(width=60, height=30)
    with pytest.raises(ImageError, match=r"picture_3\.png: the annotations say .* 30 x 60, the picture is 31 x 61"):
        dataset_of(coco_tree)[3]


def test_faults_stop_before_the_first_sample(coco_tree):
    coco_tree.content["annotations"][0]["bbox"] = [4, 6, float("inf"), 9]
    coco_tree.content["annotations"][1]["category_id"] = 2
    with pytest.raises(AnnotationError, match=r"annotation id=11 .* width is not finite.*\(First of 2 faults\.\)"):
        dataset_of(coco_tree)


def test_missing_images_and_folders_are_named(coco_tree):
    (coco_tree.image_folder / "picture_2.png").unlink()
    with pytest.raises(DataError, match=r"1 of 4 images are not in .*'picture_2\.png'. Got there: picture_0\.png"):
        dataset_of(coco_tree)
    with pytest.raises(DataError, match="there is none"):
        CocoDataset(coco_tree.annotation_file, coco_tree.image_folder / "none")


def test_other_label_map_is_refused(coco_tree):
    same = LabelMap(("dog", "cat", "cup"), (1, 17, 90))
    assert dataset_of(coco_tree, label_map=same).label_map == same
    with pytest.raises(DataError, match=r"instances_val2017\.json: its classes differ"):
        dataset_of(coco_tree, label_map=LabelMap(("dog",), (1,)))


def test_index_out_of_range_is_refused(coco_tree):
    dataset = dataset_of(coco_tree)
    for index in (4, -1):
        with pytest.raises(IndexError, match=r"is not in 0\.\.3"):
            dataset[index]


def test_a_file_with_crowds_only_cannot_be_trained_on(coco_tree):
    for annotation in coco_tree.content["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(DataError, match="no image has an object to train on; got crowd regions only"):
        dataset_of(coco_tree, skip_empty=True)
