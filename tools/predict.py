"""Predict pictures with a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_dense.tools.tile_arguments import add_tile_arguments, tile_overrides

if TYPE_CHECKING:
    from swin_dense.datasets.labels import LabelMap
    from swin_dense.tools.instance_prediction import InstancePrediction

HELP = "Predict pictures with a trained model, and draw what it finds."
EXAMPLE = """  swin-dense predict runs/coco/best.safetensors photos/ holiday.jpg --out predictions
  swin-dense predict runs/fields/best.safetensors aerial.tif --out predictions --tile-size 1024 --tile-overlap 128"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a file that train wrote, such as best.safetensors")
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="pictures, or folders of pictures")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for drawings and results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    parser.add_argument("--score", type=float, default=0.5, metavar="S", help="draw objects from this score on")
    parser.add_argument(
        "--augmented", action="store_true", help="see each image in several sizes and flipped, as published ms + flip"
    )
    add_tile_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write drawings, and results.json with all objects or class scores, or label pictures with the set's values."""
    from swin_dense.datasets.images import pixel_limit

    with pixel_limit(arguments.max_pixels):
        return _predict(arguments)


def _predict(arguments: argparse.Namespace) -> int:
    from swin_dense.tools.image_files import find_images, named_apart

    paths = find_images(arguments.images)

    import numpy as np
    from PIL import Image

    from swin_dense.datasets.images import read_image
    from swin_dense.tools.classification_task import as_result
    from swin_dense.tools.predictors import ClassificationPredictor, InstancePredictor, load_predictor
    from swin_dense.tools.progress_bar import tracked
    from swin_dense.tools.semantic_task import write_label
    from swin_dense.tools.tables import counted, write_json
    from swin_dense.training.distributed import process_from_environment

    device = process_from_environment(arguments.device).device
    overrides = [f"inference.drawn_score={arguments.score}", *tile_overrides(arguments)]
    if arguments.augmented:
        overrides.append("inference.augmented=true")
    predictor: Any = load_predictor(arguments.model, device, overrides)
    found: list[dict[str, Any]] = []
    for path, name in tracked(list(zip(paths, named_apart(paths), strict=True)), "predicting"):
        image = read_image(path)
        prediction = predictor(image)
        drawn = arguments.out / "pictures" / f"{name}.png"
        drawn.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(predictor, InstancePredictor):
            found += as_results(path, prediction, predictor.label_map)
        elif isinstance(predictor, ClassificationPredictor):
            found.append(as_result(str(path), prediction, predictor.label_map))
        else:
            labels = arguments.out / "labels" / f"{name}.png"
            labels.parent.mkdir(parents=True, exist_ok=True)
            write_label(labels, np.asarray(prediction), predictor.label_map)
        Image.fromarray(predictor.picture(image, prediction)).save(drawn)
        del image  # it may be large, and the next one is read before this name changes
    for kind, predictor_class in (("detections", InstancePredictor), ("classifications", ClassificationPredictor)):
        if isinstance(predictor, predictor_class):
            write_json(arguments.out / "results.json", {kind: found})
    print(f"{counted(len(paths), 'picture', 'pictures')} predicted; look at {arguments.out / 'pictures'}")
    return 0


def as_results(path: Path, prediction: InstancePrediction, label_map: LabelMap) -> list[dict[str, Any]]:
    """The objects of one picture as in a COCO results file, with the file and the class by name."""
    boxes_xywh = prediction.boxes_xyxy.astype(float)  # 64-bit, as in the evaluator's results
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    return [
        {
            "file_name": str(path),
            "category_id": label_map.raw_ids[label],
            "category": label_map.names[label],
            "score": float(score),
            "bbox": [float(value) for value in box],
            "segmentation": mask,
        }
        for box, label, score, mask in zip(
            boxes_xywh, prediction.labels, prediction.scores, prediction.masks_rle, strict=True
        )
    ]


if __name__ == "__main__":
    from swin_dense.tools.main import main

    sys.exit(main(["predict", *sys.argv[1:]]))
