"""Train a detector, a segmenter or a classifier from a recipe."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swin_dense.tools.recipe import Recipe
    from swin_dense.tools.run_folder import RunFolder

HELP = "Train a detector, a segmenter or a classifier from a recipe."
EXAMPLE = """  swin-dense train mask_rcnn_swin_t_3x data=/data/coco --out runs/coco
  torchrun --nproc-per-node 8 tools/train.py upernet_swin_t_160k data=/data/ADEChallengeData2016 --out runs/ade"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes, such as data=/data/coco"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder; default: runs/<recipe>")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out; torchrun's own restarts do so without it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")


def run(arguments: argparse.Namespace) -> int:
    """Train as the recipe says."""
    from swin_dense.tools.recipe import read_recipe

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    recipe = recipe.with_absolute_data()

    from swin_dense.tools.run_folder import RunFolder

    out = arguments.out or Path("runs") / Path(arguments.recipe).stem
    train(recipe, RunFolder(out), device=arguments.device, resume=arguments.resume)
    return 0


def train(recipe: Recipe, folder: RunFolder, *, device: str = "auto", resume: bool = False) -> None:
    """Train, evaluate and fill a run folder.

    Args:
        recipe: What to do.
        folder: The run's folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        resume: Whether to continue the run in the folder.

    Raises:
        Interrupted: A signal stopped the run, which can be resumed.
        SwinDenseError: Anything that a user can mend.
    """
    from swin_dense.tools.run_lock import only_run_in
    from swin_dense.tools.training_run import TrainingRun
    from swin_dense.training.distributed import any_process, barrier, distributed, restarted, torchrun_call

    with distributed(device) as process:
        # The main process alone looks: the others might see what it writes next.
        is_own, has_state = any_process(
            [process.is_main and folder.belongs_to(torchrun_call()), process.is_main and folder.has_state()]
        )
        if not (restarted() and is_own):
            folder.require_startable(resume)
            barrier()
        training_run = TrainingRun(recipe, folder, process)
        with only_run_in(folder.path) if process.is_main else nullcontext():
            training_run.start(has_state)


if __name__ == "__main__":
    from swin_dense.tools.main import leave, main

    leave(main(["train", *sys.argv[1:]]))
