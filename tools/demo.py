"""The whole path on generated data: make it, train both heads, score them, draw what they see."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_dense.errors import Interrupted

if TYPE_CHECKING:
    from swin_dense.tools.run_folder import RunFolder

HELP = "Generate a small data set, train a detector and a segmenter on it, score both and draw their predictions."
EXAMPLE = "  swin-dense demo --out demo          (some minutes on two cores)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for data, models and pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores")
    parser.add_argument("--seed", type=int, default=0, help="of data and training; default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")


def run(arguments: argparse.Namespace) -> int:
    """Do it all and print where everything lies."""
    from swin_dense.tools.run_folder import RunFolder

    runs = {task: RunFolder(arguments.out / task) for task in ("instance", "semantic")}
    for folder in runs.values():
        folder.require_startable(resume=False)
    started_s = time.monotonic()
    _write_data(arguments.out / "data", arguments.seed)
    summary: dict[str, Any] = {}
    try:
        for task, folder in runs.items():
            summary[task] = _train(task, folder, arguments)
    except Interrupted as interruption:
        print(f"swin-dense demo: stopped; delete {arguments.out} and start again", file=sys.stderr)
        return interruption.exit_code
    _report(summary, runs, arguments, time.monotonic() - started_s)
    return 0


def _write_data(root: Path, seed: int) -> None:
    from swin_dense.datasets.shapes import write_shapes
    from swin_dense.tools.progress_bar import progress_bar

    with progress_bar("drawing the data set") as show:
        write_shapes(root, seed=seed, report=show)


def _train(task: str, folder: RunFolder, arguments: argparse.Namespace) -> dict[str, Any]:
    from swin_dense.tools.recipe import read_recipe
    from swin_dense.tools.train import train

    data = (arguments.out / "data").resolve()
    recipe = read_recipe(f"shapes_{task}", [f"data={data}", f"run.seed={arguments.seed}"])
    print(f"\n{task} segmentation", file=sys.stderr)
    train(recipe, folder, device=arguments.device)
    return json.loads(folder.scores.read_text())


def _report(summary: dict[str, Any], runs: dict[str, Any], arguments: argparse.Namespace, seconds: float) -> None:
    from swin_dense.tools.tables import print_table, write_json

    instance, semantic = summary["instance"], summary["semantic"]
    print_table(
        f"scores on held-back images after {seconds / 60:.1f} minutes",
        {
            "instance: box AP50": instance["box"]["AP50"],
            "instance: box AP": instance["box"]["AP"],
            "instance: mask AP50": instance["mask"]["AP50"],
            "instance: mask AP": instance["mask"]["AP"],
            "semantic: mIoU": semantic["mIoU"],
            "semantic: pixel accuracy": semantic["aAcc"],
        },
    )
    print(f"data         {arguments.out / 'data'}")
    for task, folder in runs.items():
        print(f"{task:<12} {folder.best_model}   report: {folder.report}   pictures: {folder.pictures}")
    write_json(arguments.json, {**summary, "seconds": seconds, "out": str(arguments.out)})


if __name__ == "__main__":
    from swin_dense.tools.main import main

    sys.exit(main(["demo", *sys.argv[1:]]))
