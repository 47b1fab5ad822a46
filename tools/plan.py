"""Say before a training run what it needs: memory, time of a step and of the run, and which micro-batch fits.

`--json` writes {"machine", "memory_gb", "usable_share", "batch_size", "world_size", "workers", "total_steps",
"worst_batch", "candidates", "checkpointing", "recommended", "peak_memory_gb", "step_time_s", "loading_time_s",
"run_time_s"}; what belongs to the recommended candidate is null where nothing fits. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swin_dense.tools.tables import Cell

HELP = "Measure a recipe's largest batch: memory, time, and the micro-batch that fits. Exit code 1 if none does."
EXAMPLE = """  swin-dense plan mask_rcnn_swin_t_3x data=/data/coco
  swin-dense plan mask_rcnn_swin_t_3x data=/data/coco --world-size 8 --memory-limit 24 --json plan.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes, such as data=/data/coco"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes that will train; default: 1")
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="of each process; default: what is free")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="to measure of each kind; default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write what was asked for."""
    from swin_dense.errors import ConfigError
    from swin_dense.tools.recipe import read_recipe

    for name in ("world_size", "memory_limit", "steps"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}.")
    recipe = read_recipe(arguments.recipe, arguments.overrides).with_absolute_data()

    from swin_dense.tools.planning import Planning, describe, figures
    from swin_dense.tools.tables import print_table, write_json
    from swin_dense.training.distributed import process_from_environment

    device = process_from_environment(arguments.device).device
    planning = Planning.of(recipe, device, arguments.world_size, arguments.memory_limit, arguments.steps)
    print("\n".join(describe(planning)), flush=True)
    found = figures(planning)
    usable = f"{found['usable_share']:.0%} of {found['memory_gb']:.1f} GB"
    print_table(f"steps on the largest batches; to fit they may take {usable}", table(found))
    print("\n".join(conclusions(found)))
    write_json(arguments.json, found)
    return 1 if found["recommended"] is None else 0


def table(found: Mapping[str, Any]) -> dict[str, Mapping[str, Cell]]:
    """A row for each candidate.

    Args:
        found: As `planning.figures` gives it.
    """
    from swin_dense.tools.micro_batch_choice import Split

    rows: dict[str, Mapping[str, Cell]] = {}
    for each in (*found["candidates"], *found["checkpointing"]):
        split = Split(each["micro_batch_size"], each["accumulation_steps"], tuple(each["checkpoint_stages"]))
        peak_gb, step_s = each["peak_memory_gb"], each["step_time_s"]
        rows[str(split)] = {
            "peak GB": f"> {found['memory_gb']:.1f}" if peak_gb is None else f"{peak_gb:.1f}",
            "s/step": None if step_s is None else f"{step_s:.3g}",
            "images/s": None if step_s is None else f"{found['batch_size'] / step_s:,.1f}",
            "fits": "yes" if each["fits"] else "no",
        }
    return rows


def conclusions(found: Mapping[str, Any]) -> list[str]:
    """Lines that say what follows.

    Args:
        found: As `planning.figures` gives it.
    """
    from swin_dense.training.progress import duration

    worst = found["worst_batch"]
    height, width = worst["size_hw"]
    objects = "" if worst["objects"] is None else f", {worst['objects']} objects in each"
    lines = [f"largest batch of {worst['images']}: {height} x {width} pixels{objects}"]
    lines += [text for each in found["checkpointing"] if (text := _bought(each, found["candidates"][-1]))]
    if found["recommended"] is None:
        nothing = f"nothing fits into {found['memory_gb']:.1f} GB: train on smaller images, or take a smaller model"
        return [*lines, nothing]
    settings = " ".join(f"{key}={str(value).replace(' ', '')}" for key, value in found["recommended"].items())
    return [
        *lines,
        _loading_text(found),
        f"the run takes {duration(found['run_time_s'])} at most, {found['total_steps']} steps as slow as these; "
        "evaluation is not included",
        f"recommended: {settings}",
        f"a step stays one of {found['batch_size']} images, and so does the learning rate",
    ]


def _bought(checkpointed: Mapping[str, Any], plain: Mapping[str, Any]) -> str | None:
    """What recomputing changes, where it ran."""
    if checkpointed["peak_memory_gb"] is None:
        return None
    text = f"recomputing activations of stages {checkpointed['checkpoint_stages']}: peak "
    after = f"{checkpointed['peak_memory_gb']:.1f} GB"
    if plain["peak_memory_gb"] is None:
        return f"{text}{after} instead of more than there is"
    slower = checkpointed["step_time_s"] / plain["step_time_s"] - 1
    return f"{text}{plain['peak_memory_gb']:.1f} -> {after}, {slower:+.0%} time"


def _loading_text(found: Mapping[str, Any]) -> str:
    loading_s, step_s = found["loading_time_s"], found["step_time_s"]
    compared = f"{loading_s:.2g} s to load a step's images, {step_s:.2g} s to train on them"
    if not found["workers"]:
        return f"{compared}, one after the other: run.workers is 0"
    if loading_s <= step_s:
        return f"the loader keeps up: {compared}"
    return f"the loader does not keep up: {compared}; raise run.workers, or store smaller pictures"


if __name__ == "__main__":
    from swin_dense.tools.main import main

    sys.exit(main(["plan", *sys.argv[1:]]))
