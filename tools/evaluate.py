"""Score a trained model on annotated images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from swin_dense.errors import ConfigError, DataError
from swin_dense.tools.label_arguments import add_label_arguments
from swin_dense.tools.tables import require_writable
from swin_dense.tools.tile_arguments import add_tile_arguments, tile_overrides

HELP = "Score a trained model, or predictions in files: COCO box and mask AP, mean IoU, or top-1 accuracy."
EXAMPLE = """  swin-dense evaluate runs/coco/best.safetensors
  swin-dense evaluate runs/ade/best.safetensors data=/data/ade --json scores.json --predictions labels/
  swin-dense evaluate runs/ade/best.safetensors --augmented
  swin-dense evaluate runs/fields/best.safetensors --tile-size 1024 --max-pixels 500000000
  swin-dense evaluate --predictions results.json --annotations instances_val2017.json --iou-type bbox,segm
  swin-dense evaluate --predictions labels/ --annotations annotations/validation --classes ade20k"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", type=Path, help="a file that train wrote, such as best.safetensors"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to its recipe, such as data=DIR"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="PATH",
        help="a COCO results file or a folder of label pictures: with MODEL written, without it read and scored",
    )
    parser.add_argument(
        "--augmented", action="store_true", help="see each image in several sizes and flipped, as published ms + flip"
    )
    add_tile_arguments(parser)
    files = parser.add_argument_group("without a model")
    files.add_argument(
        "--annotations", type=Path, metavar="PATH", help="a COCO annotation file, or a folder of label pictures"
    )
    files.add_argument(
        "--iou-type", metavar="TYPES", help="some of bbox,segm,boundary; default: what the first result has"
    )
    files.add_argument(
        "--only-predicted", action="store_true", help="score only the images that have results, not all annotated ones"
    )
    add_label_arguments(files)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print a table."""
    from swin_dense.datasets.images import pixel_limit

    _require_fitting(arguments)
    with pixel_limit(arguments.max_pixels):
        return _evaluate_files(arguments) if arguments.model is None else _evaluate_model(arguments)


def _require_fitting(arguments: argparse.Namespace) -> None:
    if arguments.model is None and (arguments.predictions is None or arguments.annotations is None):
        raise ConfigError("name a MODEL, or files to score with --predictions PATH and --annotations PATH.")
    if arguments.model is not None and (arguments.annotations or arguments.iou_type or arguments.only_predicted):
        raise ConfigError(
            "--annotations, --iou-type and --only-predicted are for predictions in files; a model's data are changed "
            "with KEY=VALUE, such as dataset.val_annotations=FILE."
        )
    if arguments.json is not None:
        require_writable(arguments.json)


def _evaluate_files(arguments: argparse.Namespace) -> int:
    from swin_dense.tools.file_evaluation import class_columns, score_label_folders, score_results, table
    from swin_dense.tools.label_arguments import label_map_of
    from swin_dense.tools.progress_bar import progress_bar
    from swin_dense.tools.tables import per_class_table, print_sentences, print_table, write_json

    predictions, annotations = arguments.predictions, arguments.annotations
    for path in (predictions, annotations):
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder.")
    if predictions.is_dir() != annotations.is_dir():
        raise ConfigError("--predictions and --annotations are both files (COCO) or both folders (label pictures).")
    with progress_bar("scoring") as show:
        if predictions.is_dir():
            scores = score_label_folders(predictions, annotations, label_map_of(arguments), show)
        else:
            iou_types = None if arguments.iou_type is None else arguments.iou_type.split(",")
            only_predicted = arguments.only_predicted
            scores = score_results(predictions, annotations, iou_types, only_predicted=only_predicted, show=show)
    print_table(f"{predictions} on {scores['images']} images", table(scores))
    print_table("by class", per_class_table(scores, class_columns(scores)))
    print_sentences([*scores.get("notes", ()), *scores["explanations"]])
    write_json(arguments.json, {"predictions": str(predictions), "annotations": str(annotations), **scores})
    return 0


def _evaluate_model(arguments: argparse.Namespace) -> int:
    from swin_dense.heads.model_file import load_model, read_about
    from swin_dense.tools.evaluation import default_workers, evaluate
    from swin_dense.tools.predictors import recipe_and_labels
    from swin_dense.tools.progress_bar import progress_bar
    from swin_dense.tools.tables import per_class_table, print_sentences, print_table, write_json
    from swin_dense.tools.tasks import task_of
    from swin_dense.tools.validation_losses import with_total
    from swin_dense.training.distributed import distributed

    overrides = [*arguments.overrides, *tile_overrides(arguments)]
    if arguments.augmented:
        overrides.append("inference.augmented=true")
    recipe, label_map = recipe_and_labels(arguments.model, read_about(arguments.model), overrides)
    task = task_of(recipe)
    validation = task.validation_data(label_map)
    notes = validation.prove()
    with distributed(arguments.device) as process:
        model, _ = load_model(arguments.model)
        predictor = task.predictor(model.to(process.device), label_map, process.device)
        workers = default_workers(process) if recipe.run.workers is None else recipe.run.workers
        with progress_bar("evaluating", shown=process.is_main) as show:
            scores = evaluate(
                predictor,
                validation,
                process,
                workers=workers,
                with_losses=recipe.run.validation_losses,
                predictions=arguments.predictions,
                on_prediction=lambda index, prediction: show(index + 1, len(validation.paths)),
            )
    if scores is not None:
        numbers = {**task.table(scores), **with_total(scores.get("losses", {}))}
        print_table(f"{arguments.model} on {len(validation.paths)} images", numbers)
        print_table("by class", per_class_table(scores, task.class_columns))
        print_sentences([*notes, *scores.get("explanations", ())])
        settings = {"model": str(arguments.model), "inference": recipe.to_dict()["inference"]}
        write_json(arguments.json, {**settings, **scores})
    return 0


if __name__ == "__main__":
    from swin_dense.tools.main import leave, main

    leave(main(["evaluate", *sys.argv[1:]]))
