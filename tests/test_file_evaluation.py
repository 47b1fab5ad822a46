import json

import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.coco_evaluation import METRIC_NAMES
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import AnnotationError, ConfigError, DataError
from swin_dense.tools.file_evaluation import class_columns, score_label_folders, score_results, table


def as_results(tree, fields=("bbox", "segmentation")):
    """The objects as results, those of image 13 with the other's class."""
    swapped = {1: 90, 90: 1, 17: 17}
    results = []
    for each in tree.content["annotations"]:
        if each["iscrowd"]:
            continue
        segmentation = each["segmentation"]
        if isinstance(segmentation, list):
            size = next((i["height"], i["width"]) for i in tree.content["images"] if i["id"] == each["image_id"])
            segmentation = drawn(segmentation, size)
        result = {"bbox": each["bbox"], "segmentation": segmentation, "score": 0.75}
        category = swapped[each["category_id"]] if each["image_id"] == 13 else each["category_id"]
        results.append(
            {"image_id": each["image_id"], "category_id": category}
            | {name: result[name] for name in (*fields, "score")}
        )
    return results


def drawn(polygons, size_hw):
    from pycocotools import mask as coco_mask

    mask = coco_mask.merge(coco_mask.frPyObjects(polygons, *size_hw))
    return {"size": list(size_hw), "counts": mask["counts"].decode()}


@pytest.fixture
def files(coco_tree, tmp_path):
    def write(results):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(results))
        return path, coco_tree.annotation_file

    return coco_tree, write


def score(paths, iou_types=None, only_predicted=False, shown=None):
    show = (lambda done, total: shown.append((done, total))) if shown is not None else (lambda done, total: None)
    return score_results(*paths, iou_types, only_predicted=only_predicted, show=show)


def test_results_have_cocos_numbers_and_what_is_wrong(files):
    tree, write = files
    shown = []
    scores = score(write(as_results(tree)), shown=shown)
    assert shown == [(number, 4) for number in range(1, 5)] and scores["images"] == 4
    assert list(scores["bbox"]) == list(scores["segm"]) == list(METRIC_NAMES)
    assert scores["per_class"]["cat"]["mask_AP"] == pytest.approx(1.0) and scores["per_class"]["dog"]["mask_AP"] == 0.0
    assert scores["errors"]["errors"]["class"] == 2
    assert list(table(scores)) == [f"{word} {name}" for word in ("bbox", "segm") for name in METRIC_NAMES]
    assert class_columns(scores) == ("box_AP", "box_AP50", "mask_AP", "mask_AP50")


def test_what_the_first_result_has_is_scored_and_no_more(files):
    tree, write = files
    assert "segm" not in score(write(as_results(tree, ["bbox"])))
    assert "bbox" not in score(write(as_results(tree, ["segmentation"])))
    assert next(iter(score(write(as_results(tree)), ["boundary"]))) == "boundary"
    by_mask = score(write(as_results(tree, ["segmentation"])), ["bbox"])["bbox"]
    assert by_mask["AP50"] == score(write(as_results(tree)), ["bbox"])["bbox"]["AP50"]


def test_images_without_results_count_as_missed_unless_left_out(files):
    tree, write = files
    cats = [each for each in as_results(tree) if each["image_id"] == 3]
    everywhere, only = score(write(cats)), score(write(cats), only_predicted=True)
    assert "3 of 4 images have no result" in everywhere["notes"][0] and not only["notes"]
    assert everywhere["images"] == 4 and only["images"] == 1
    assert everywhere["bbox"]["AP"] < only["bbox"]["AP"] == pytest.approx(1.0)
    nothing = score(write([]))
    assert nothing["bbox"]["AP"] == nothing["segm"]["AP"] == 0.0 and nothing["explanations"]


def test_files_that_do_not_fit_are_refused(files):
    tree, write = files
    with pytest.raises(ConfigError, match="--iou-type must be some of bbox, segm, boundary, got mask"):
        score(write(as_results(tree)), ["bbox", "mask"])
    with pytest.raises(ConfigError, match="the results hold no segmentation; score --iou-type bbox"):
        score(write(as_results(tree, ["bbox"])), ["segm"])
    with pytest.raises(DataError, match="there is no result"):
        score(write([]), only_predicted=True)
    broken = as_results(tree)
    broken[1]["segmentation"]["counts"] = "11"
    with pytest.raises(AnnotationError, match=r"results.json: results of image 3: mask 1"):
        score(write(broken))
    for each in tree.content["annotations"]:
        each.pop("segmentation")
    tree.write()
    assert "segm" not in score(write(as_results_without_masks(tree)))
    with pytest.raises(ConfigError, match="has objects without segmentation"):
        score(write(as_results_without_masks(tree)), ["segm"])


def as_results_without_masks(tree):
    return [
        {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 0.5}
        for each in tree.content["annotations"]
        if not each["iscrowd"]
    ]


def test_label_folders_have_the_scores_of_a_segmenter(tmp_path):
    labels = LabelMap(("road", "tree", "car"), (1, 2, 3), (0,))
    for name, values in (("annotations", [[1, 1, 2, 2, 0]]), ("predictions", [[1, 0, 2, 2, 1]])):
        (tmp_path / name).mkdir()
        Image.fromarray(np.array(values, np.uint8)).save(tmp_path / name / "scene.png")
    folders = tmp_path / "predictions", tmp_path / "annotations"
    shown = []
    scores = score_label_folders(*folders, labels, lambda done, total: shown.append((done, total)))
    assert shown == [(1, 1)] and scores["images"] == 1
    assert scores["mIoU"] == 0.75 and scores["absent"] == ["car"]
    assert scores["notes"] == [
        "1 of 3 classes are labelled nowhere and take no part in the means. Tools that count them as 0, as that of the "
        "ADE20K benchmark does, give a mIoU of 0.5000."
    ]
    assert scores["worst_images"] == [{"name": "scene", "mIoU": 0.75}]
    assert table(scores)["image_mIoU"] == 0.75
    without_names = score_label_folders(folders[1], folders[1], None, lambda done, total: None)
    assert without_names["mIoU"] == 1.0 and list(without_names["per_class"]) == ["value 0", "value 1", "value 2"]
