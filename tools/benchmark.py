"""Measure this library beside others on your machine, in one run; the figures of two machines or days do not compare.

`--json` writes what is printed: {"machine": ..., and under the part's name every figure} with every repetition.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_dense.errors import Interrupted

if TYPE_CHECKING:
    Parts = argparse._SubParsersAction[argparse.ArgumentParser]
    Machine = Mapping[str, str]
    Figures = dict[str, Any]

HELP = "Measure speed, memory and training beside other libraries, in one run on this machine."
EXAMPLE = """  swin-dense benchmark backbone --document benchmarks.md --json backbone.json
  swin-dense benchmark segment --batch 2 --size 256 256 --peers huggingface --compile --document benchmarks.md
  swin-dense benchmark data --document benchmarks.md
  swin-dense benchmark data --annotations instances_val2017.json --images val2017 --repeats 9 --json data.json
  swin-dense benchmark data --memory --workers 1 8          (some minutes, 4 GB)
  swin-dense benchmark data --dense                         (10 GB for torchvision)
  swin-dense benchmark ignored --seeds 0 1 2                (half an hour)
  swin-dense benchmark training shapes_semantic data=shapes model.backbone={} --minutes 20 --document training.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, text in _MODELS.items():
        _add_models(parts, name, text)
    _add_data(parts)
    _add_ignored(parts)
    _add_training(parts)


_MODELS = {
    "backbone": "time and memory of the backbone, beside timm's, torchvision's and Hugging Face's",
    "detect": "time and memory of Mask R-CNN, beside torchvision's on its own Swin and on timm's",
    "segment": "time and memory of UPerNet, beside Hugging Face's and segmentation-models-pytorch's",
}
_MODELS_EXAMPLE = """example:
  swin-dense benchmark {name}                                    (the rows of this device, some minutes)
  swin-dense benchmark {name} --batch 2 --size 256 320 --precision float32 --repeats 5
  swin-dense benchmark {name} --compile --scaling --document benchmarks.md --json {name}.json

A peer whose outputs differ from ours gets no ratio, and the exit code is 1."""


def _add_models(parts: Parts, name: str, text: str) -> None:
    models = parts.add_parser(
        name,
        help=text,
        description=text,
        epilog=_MODELS_EXAMPLE.format(name=name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    models.add_argument("--peers", nargs="*", metavar="NAME", help="libraries to compare with; default: all of them")
    models.add_argument("--variant", default="swin_t", metavar="NAME", help="the backbone; default: swin_t")
    models.add_argument("--batch", type=int, metavar="N", help="images; default: by row")
    models.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="of the images in pixels; default: by row"
    )
    models.add_argument("--precision", choices=["float32", "bfloat16"], help="bfloat16 is autocast; default: by row")
    models.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")
    models.add_argument("--repeats", type=int, metavar="N", help="rounds; default: 20 on a GPU, 7 on a CPU")
    models.add_argument("--warmup", type=int, metavar="N", help="rounds before; default: 5 on a GPU, 2 on a CPU")
    models.add_argument("--compile", action="store_true", help="let all take part a second time, under torch.compile")
    models.add_argument(
        "--scaling",
        action="store_true",
        help="also measure inference and train step from 256 to 2048 pixels, batch 1 to 32, Swin-T to L",
    )
    models.add_argument(
        "--limit-s",
        type=float,
        default=20.0,
        metavar="X",
        help="of each model at each point of --scaling, seconds; default: 20",
    )
    _add_page(models)
    _add_shared(models)


def _add_data(parts: Parts) -> None:
    text = "time to load an image with its objects, beside torchvision; or memory of the loader's workers"
    data = parts.add_parser("data", help=text, description=text, allow_abbrev=False)
    data.add_argument("--annotations", type=Path, metavar="JSON", help="COCO annotation file; default: generated data")
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of its images")
    data.add_argument(
        "--peers", nargs="*", choices=["torchvision"], default=["torchvision"], help="default: torchvision"
    )
    data.add_argument("--repeats", type=int, default=7, metavar="N", help="how often to load every image; default: 7")
    data.add_argument("--pictures", type=int, default=20, metavar="N", help="how many images; default: 20")
    data.add_argument("--memory", action="store_true", help="measure memory instead, on a file of COCO's size")
    data.add_argument("--dense", action="store_true", help="measure memory of one large image with 300 objects instead")
    data.add_argument(
        "--workers", type=int, nargs="+", default=[1, 8], metavar="N", help="with --memory: how many; default: 1 8"
    )
    data.add_argument(
        "--images-per-second",
        type=float,
        metavar="X",
        help="a rate of training for which to count workers, beside those on the page of --document",
    )
    _add_page(data)
    _add_shared(data)


def _add_ignored(parts: Parts) -> None:
    text = "scores of a detector that leaves crowd regions out of its losses, beside one that learns them as background"
    ignored = parts.add_parser("ignored", help=text, description=text, allow_abbrev=False)
    ignored.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of data and training; default: 0 1 2"
    )
    ignored.add_argument("--steps", type=int, default=300, metavar="N", help="of each training; default: 300")
    ignored.add_argument(
        "--share", type=float, default=0.3, metavar="X", help="of the training objects to ignore; default: 0.3"
    )
    ignored.add_argument(
        "--runs", type=Path, metavar="DIR", help="keep data and runs, and go on with what is there; default: keep none"
    )
    ignored.add_argument("--document", type=Path, metavar="FILE", help="write the figures as a page, Markdown")
    _add_shared(ignored)


def _add_training(parts: Parts) -> None:
    text = "scores after the same training time, beside another library's model of the same kind"
    training = parts.add_parser("training", help=text, description=text, allow_abbrev=False)
    training.add_argument("recipe", metavar="RECIPE", help="a recipe's name or file; UPerNet or Mask R-CNN with swin_t")
    training.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to it, such as data=DIR"
    )
    training.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the trainings; default: 0 1 2"
    )
    training.add_argument("--minutes", type=float, default=10.0, metavar="X", help="of each training; default: 10")
    training.add_argument("--scores", type=int, default=5, metavar="N", help="how often each is scored; default: 5")
    training.add_argument(
        "--document", type=Path, metavar="FILE", help="write the figures as a page, Markdown, and a picture beside it"
    )
    _add_shared(training)


def _add_page(part: argparse.ArgumentParser) -> None:
    text = "write the figures into their section of this page, Markdown; other sections stay"
    part.add_argument("--document", type=Path, metavar="FILE", help=text)


def _add_shared(part: argparse.ArgumentParser) -> None:
    part.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error arose")
    part.add_argument("--json", type=Path, metavar="FILE", help="write every figure")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write what was asked for; 1 where a ratio was refused."""
    from swin_dense.tools.machine import describe_machine, machine_line
    from swin_dense.tools.tables import write_json

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, talks on standard error
    machine = describe_machine()
    print(machine_line(machine))
    try:
        figures = _MEASURES[arguments.part](arguments, machine)
    except Interrupted as interruption:
        left = "start again" if getattr(arguments, "runs", None) is None else "the same command goes on from there"
        print(f"swin-dense benchmark: stopped; {left}", file=sys.stderr)
        return interruption.exit_code
    write_json(arguments.json, {"machine": machine, arguments.part: figures})
    for sentence in figures.get("refused", []):
        print(f"swin-dense benchmark {arguments.part}: no ratio: {sentence}", file=sys.stderr)
    return 1 if figures.get("refused") else 0


def _measure_models(arguments: argparse.Namespace, machine: Machine) -> Figures:
    from swin_dense.tools.benchmark_models import measure_models
    from swin_dense.tools.benchmark_page import write_section
    from swin_dense.tools.benchmark_tables import section_parts

    _require_page(arguments.document)
    figures = measure_models(arguments)
    if arguments.document is not None:
        write_section(arguments.document, figures["title"], section_parts(figures, machine))
    return figures


def _measure_data(arguments: argparse.Namespace, machine: Machine) -> Figures:
    from swin_dense.tools.benchmark_page import section_start, write_section
    from swin_dense.tools.machine import device_name

    _require_fitting(arguments)
    _require_page(arguments.document)
    measure: Callable[[argparse.Namespace], Figures]
    parts_of: Callable[[Figures], list[str]]
    if arguments.memory:
        from swin_dense.tools.benchmark_memory import measure_memory as measure
        from swin_dense.tools.benchmark_memory import memory_parts as parts_of

        what = "Memory of a loader's workers"
    elif arguments.dense:
        from swin_dense.tools.benchmark_dense import dense_parts as parts_of
        from swin_dense.tools.benchmark_dense import measure_dense as measure

        what = "Memory of an image full of objects"
    else:
        from swin_dense.tools.benchmark_data import loading_parts as parts_of
        from swin_dense.tools.benchmark_data import measure_loading as measure

        what = "Loading images"
    figures = measure(arguments)
    if arguments.document is not None:
        parts = [*section_start(data_command(arguments), machine), *parts_of(figures)]
        write_section(arguments.document, f"{what}, {device_name('cpu')}", parts)
    return figures


def data_command(arguments: argparse.Namespace) -> str:
    """The command line of `benchmark data` again, without where files lie."""
    words = ["swin-dense", "benchmark", "data"]
    if arguments.annotations is not None:
        words += ["--annotations", "FILE", "--images", "DIR"]
    if arguments.memory:
        words += ["--memory", "--workers", *map(str, arguments.workers)]
    elif arguments.dense:
        words += ["--dense"]
    else:
        words += ["--repeats", str(arguments.repeats), "--pictures", str(arguments.pictures)]
    if arguments.images_per_second is not None:
        words += ["--images-per-second", f"{arguments.images_per_second:g}"]
    if not arguments.memory:
        words += ["--peers", *arguments.peers]
    return " ".join([*words, "--document", "FILE"])


def _require_page(path: Path | None) -> None:
    """Refuse a page that could not be written, before anything is measured."""
    from swin_dense.tools.benchmark_page import read_sections
    from swin_dense.tools.tables import require_writable

    if path is not None:
        require_writable(path)
        read_sections(path)


def _measure_ignored(arguments: argparse.Namespace, machine: Machine) -> Figures:
    from swin_dense.tools.benchmark_ignored import measure_ignored, write_document

    figures = measure_ignored(arguments)
    if arguments.document is not None:
        write_document(arguments.document, figures, machine)
    return figures


def _measure_training(arguments: argparse.Namespace, machine: Machine) -> Figures:
    from swin_dense.tools.benchmark_training import measure_training, write_document

    figures = measure_training(arguments)
    if arguments.document is not None:
        write_document(arguments.document, figures, machine)
    return figures


_MEASURES = {
    **dict.fromkeys(_MODELS, _measure_models),
    "data": _measure_data,
    "ignored": _measure_ignored,
    "training": _measure_training,
}


def _require_fitting(arguments: argparse.Namespace) -> None:
    from swin_dense.errors import ConfigError

    if (arguments.annotations is None) != (arguments.images is None):
        raise ConfigError("--annotations and --images go together.")
    if (arguments.memory or arguments.dense) and arguments.annotations is not None:
        raise ConfigError("--memory and --dense measure generated data; leave out --annotations and --images.")
    if arguments.memory and arguments.dense:
        raise ConfigError("--memory and --dense are two measurements; choose one.")
    for name in ("repeats", "pictures"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if arguments.images_per_second is not None and not 0 < arguments.images_per_second < float("inf"):
        raise ConfigError(f"--images-per-second must be above 0, got {arguments.images_per_second}.")
    if min(arguments.workers) < 1:
        raise ConfigError(f"--workers must be at least 1 each, got {arguments.workers}.")


def spread(values: list[float]) -> dict[str, Any]:
    """Median and range of repeated measurements: {"median": ..., "min": ..., "max": ..., "all": ...}."""
    from statistics import median

    return {"median": median(values), "min": min(values), "max": max(values), "all": values}


if __name__ == "__main__":
    from swin_dense.tools.main import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))
