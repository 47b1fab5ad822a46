import json

import numpy as np

from swin_dense.datasets.coco import CocoDataset
from swin_dense.datasets.coco_annotations import AnnotationReader
from swin_dense.datasets.coco_json import read_categories, read_coco_json, read_images
from swin_dense.tools.benchmark_scenes import write_large_annotations, write_scenes


def test_large_file_is_a_good_one(tmp_path):
    path = tmp_path / "a.json"
    write_large_annotations(path, num_images=41, num_annotations=173)
    content = read_coco_json(path)
    images = read_images(path, content["images"], tmp_path)
    reader = AnnotationReader(path, images, read_categories(path, content["categories"]))
    table = reader.read(content["annotations"])
    assert reader.faults == [] and reader.findings == {}
    assert len(images.ids) == 41 and len(table) == 173
    assert table.is_crowd.sum() == 2 and (table.polygon_counts == 0).sum() == 2
    assert json.loads(path.read_text()) == content


def test_scenes_are_what_their_annotations_say(tmp_path):
    dataset = CocoDataset(*write_scenes(tmp_path, num_images=2, objects_each=7))
    assert len(dataset) == 2 and dataset.findings == {}
    for index in range(2):
        sample = dataset[index]
        assert sample.image.shape == (3, 480, 640) and len(sample.target["boxes"]) == 7
        image, instances = dataset.raw(index)
        areas = [a["area"] for a in dataset.ground_truth["annotations"] if a["image_id"] == sample.image_id]
        drawn = sample.target["masks"].full().flatten(1).sum(dim=1).numpy()
        assert np.allclose(drawn, areas, rtol=0.1)
        assert len(instances) == 7 and image.std() > 10
