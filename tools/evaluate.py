"""Score a trained model on annotated images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from swin_dense.tools.tile_arguments import add_tile_arguments, tile_overrides

HELP = "Score a trained model: COCO box and mask AP, mean IoU, or top-1 accuracy."
EXAMPLE = """  swin-dense evaluate runs/coco/best.safetensors
  swin-dense evaluate runs/ade/best.safetensors data=/data/ade --json scores.json --predictions labels/
  swin-dense evaluate runs/fields/best.safetensors --tile-size 1024 --max-pixels 500000000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a file that train wrote, such as best.safetensors")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to its recipe, such as data=DIR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="OUT",
        help="write the predictions: a results file, or label pictures' folder",
    )
    add_tile_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print a table."""
    from swin_dense.datasets.images import pixel_limit

    with pixel_limit(arguments.max_pixels):
        return _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from swin_dense.heads.model_file import load_model, read_about
    from swin_dense.tools.evaluation import default_workers, evaluate
    from swin_dense.tools.predictors import recipe_and_labels
    from swin_dense.tools.progress_bar import progress_bar
    from swin_dense.tools.tables import per_class_table, print_table, write_json
    from swin_dense.tools.tasks import task_of
    from swin_dense.training.distributed import distributed

    overrides = [*arguments.overrides, *tile_overrides(arguments)]
    recipe, label_map = recipe_and_labels(arguments.model, read_about(arguments.model), overrides)
    task = task_of(recipe)
    validation = task.validation_data(label_map)
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
                predictions=arguments.predictions,
                on_prediction=lambda index, prediction: show(index + 1, len(validation.paths)),
            )
    if scores is not None:
        print_table(f"{arguments.model} on {len(validation.paths)} images", task.table(scores))
        print_table("by class", per_class_table(scores))
        write_json(arguments.json, {"model": str(arguments.model), **scores})
    return 0


if __name__ == "__main__":
    from swin_dense.tools.main import leave, main

    leave(main(["evaluate", *sys.argv[1:]]))
