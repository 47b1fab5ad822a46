"""The whole path on generated data: make it, train both heads, score them, draw what they see."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

HELP = "Generate a small data set, train a detector and a segmenter on it, score both and draw their predictions."
EXAMPLE = "  swin-dense demo --out demo          (about five minutes on two cores)"


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
    for task, folder in runs.items():
        code, summary[task] = _train(task, folder, arguments)
        if code:
            return code
    _report(summary, runs, arguments, time.monotonic() - started_s)
    return 0


def _write_data(root: Path, seed: int) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from swin_dense.datasets.shapes import write_shapes

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("drawing the data set", total=None)
        write_shapes(root, seed=seed, report=lambda done, total: progress.update(bar, completed=done, total=total))


def _train(task: str, folder: Any, arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:  # noqa: ANN401
    import json

    from swin_dense.tools.recipe import read_recipe
    from swin_dense.tools.train import train

    recipe = read_recipe(f"shapes_{task}", [f"data={arguments.out / 'data'}", f"run.seed={arguments.seed}"])
    print(f"\n{task} segmentation", file=sys.stderr)
    code = train(recipe, folder.path, device=arguments.device)
    return code, {} if code else json.loads(folder.scores.read_text())


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
        print(f"{task:<12} {folder.best_model}   pictures: {folder.pictures}   curves: {folder.curves}")
    write_json(arguments.json, {**summary, "seconds": seconds, "out": str(arguments.out)})


if __name__ == "__main__":
    from swin_dense.tools.main import main

    sys.exit(main(["demo", *sys.argv[1:]]))
