"""Models of other libraries beside ours, with the same weights and inputs: time, memory, and the share of the floor.

All contestants take turns in one process. Before they do, what they compute is compared; a peer that computes something
else gets no ratio. A peer that is another network at this size, such as timm's, must be equal to ours with its rules.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from swin_dense.config import variant_config
from swin_dense.errors import ConfigError
from swin_dense.tools.backbone_peers import one_window, require_timm_size
from swin_dense.tools.benchmark import spread
from swin_dense.tools.benchmark_agreement import MAP_TOLERANCE, Agreement, agreement, first_agreement, full_float32
from swin_dense.tools.benchmark_backbone import BackboneContest
from swin_dense.tools.benchmark_contest import (
    COMPILED,
    OURS,
    B,
    Batch,
    Contest,
    Contestant,
    Row,
    autocast,
    device_type,
    work_of,
)
from swin_dense.tools.benchmark_detect import DetectionContest
from swin_dense.tools.benchmark_scaling import measure_sweep, scaling_sweeps
from swin_dense.tools.benchmark_segment import SegmentationContest
from swin_dense.tools.benchmark_tables import print_row, print_sweep
from swin_dense.tools.benchmark_timing import (
    Clock,
    LargeProduct,
    clock_of,
    matrix_flops,
    paired_ratio,
    peak_extra_bytes,
    take_turns,
)
from swin_dense.tools.machine import device_name
from swin_dense.tools.progress_bar import progress_bar
from swin_dense.tools.tables import counted, print_sentences, require_writable
from swin_dense.training.distributed import process_from_environment
from swin_dense.training.out_of_memory import is_out_of_memory

CONTESTS: dict[str, type[Contest[Any]]] = {
    "backbone": BackboneContest,
    "detect": DetectionContest,
    "segment": SegmentationContest,
}
_DISTRIBUTIONS = {
    "timm": ("timm",),
    "torchvision": ("torchvision",),
    "huggingface": ("transformers",),
    "smp": ("segmentation-models-pytorch", "timm"),
}
_MODULES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "huggingface": "transformers",
    "smp": "segmentation_models_pytorch",
}
_ON_TIMM = {"timm", "smp"}
_DEFAULT_REPEATS = {"cuda": 20, "cpu": 7}
_DEFAULT_WARMUP = {"cuda": 5, "cpu": 2}
_PRODUCT = "a large product"
_BACKWARD_SHARE = 3  # a training step has this many times the products of its forward pass


@dataclass(frozen=True)
class Settings:
    """How rows are measured.

    Attributes:
        repeats: Rounds that are timed.
        warmup: Rounds before.
        compile: Whether every contestant takes part a second time, compiled.
        device: Where.
        time_of: The clock.
    """

    repeats: int
    warmup: int
    compile: bool
    device: torch.device
    time_of: Clock


def measure_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print what the arguments ask for; returns every figure.

    Raises:
        ConfigError: The arguments do not fit each other, a peer has no such network, or memory does not suffice.
    """
    device = process_from_environment(arguments.device).device
    contest = CONTESTS[arguments.part](variant_config(arguments.variant), {})
    rows = chosen_rows(contest.default_rows[device.type], arguments)
    peers, notes = chosen_peers(contest, arguments.peers)
    require_networks(contest, rows, peers)
    if arguments.json is not None:
        require_writable(arguments.json)
    settings = Settings(
        arguments.repeats or _DEFAULT_REPEATS[device.type],
        _DEFAULT_WARMUP[device.type] if arguments.warmup is None else arguments.warmup,
        arguments.compile,
        device,
        clock_of(device),
    )
    rounds, threads = counted(settings.repeats, "round", "rounds"), torch.get_num_threads()
    print(
        f"{contest.title}, {arguments.variant}: {rounds} after {settings.warmup} for warming up, on {device}, "
        f"{counted(threads, 'thread', 'threads')}"
    )
    versions = {name: version(name) for peer in peers for name in _DISTRIBUTIONS[peer]}
    if versions:
        print(f"peers: {', '.join(f'{name} {number}' for name, number in versions.items())}")
    figures = {
        "command": command(arguments),
        "title": f"{contest.title} {arguments.variant}, {device_name(str(device))}",
        "device": str(device),
        "threads": threads,
        "repeats": settings.repeats,
        "versions": versions,
        "notes": [*notes, *contest.remarks, *(contest.peer_remarks if peers else ())],
        **measure_contest(contest, rows, peers, settings),
    }
    print_sentences(figures["notes"])
    if arguments.scaling:
        figures["scaling"] = []
        for sweep in scaling_sweeps(contest, rows[0].precision, arguments.variant):
            measured = measure_sweep(sweep, peers, settings.repeats, arguments.limit_s, device, settings.time_of)
            print_sweep(measured)
            figures["scaling"].append(measured)
    return figures


def chosen_rows(defaults: Sequence[Row], arguments: argparse.Namespace) -> list[Row]:
    """The default rows with what the arguments change in them, each once.

    Raises:
        ConfigError: A number is out of range.
    """
    if arguments.batch is not None and arguments.batch < 1:
        raise ConfigError(f"--batch must be at least 1, got {arguments.batch}.")
    if arguments.size is not None and min(arguments.size) < 1:
        raise ConfigError(f"--size must be two numbers from 1, got {arguments.size[0]} {arguments.size[1]}.")
    if arguments.repeats is not None and arguments.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {arguments.repeats}.")
    if arguments.warmup is not None and arguments.warmup < 0:
        raise ConfigError(f"--warmup must be 0 or more, got {arguments.warmup}.")
    if not arguments.limit_s > 0:
        raise ConfigError(f"--limit-s must be above 0, got {arguments.limit_s}.")
    given = {
        "batch_size": arguments.batch,
        "size_hw": arguments.size and tuple(arguments.size),
        "precision": arguments.precision,
    }
    changes: Any = {name: value for name, value in given.items() if value is not None}
    if arguments.precision == "float32":
        changes["cast_once"] = False  # that is what weights and images are
    return list(dict.fromkeys(replace(row, **changes) for row in defaults))


def chosen_peers(contest: Contest[Any], asked: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The peers that are installed, and a note for each that is not.

    Args:
        contest: Knows its peers.
        asked: Their names, maybe several in a word with commas between; None is all.

    Raises:
        ConfigError: One is not a peer of this contest.
    """
    words = contest.peers if asked is None else [name for word in asked for name in word.split(",") if name]
    names = list(dict.fromkeys(words))
    unknown = [name for name in names if name not in contest.peers]
    if unknown:
        raise ConfigError(f"--peers: {contest.title} is compared with {', '.join(contest.peers)}, got {unknown[0]!r}.")
    absent = [name for name in names if find_spec(_MODULES[name]) is None]
    notes = [f"{name} is not installed and left out (pip install {_DISTRIBUTIONS[name][0]})." for name in absent]
    return [name for name in names if name not in absent], notes


def require_networks(contest: Contest[Any], rows: Sequence[Row], peers: Sequence[str]) -> None:
    """Refuse what the peers cannot do, before anything is built.

    Raises:
        ConfigError: Says what, and what to choose.
    """
    if not peers:
        return
    one_window(contest.config)
    for row in rows:
        if set(peers) & _ON_TIMM:
            require_timm_size(contest.config, row.size_hw)
        if row.trains and row.batch_size < contest.least_training_batch:
            raise ConfigError(
                f"--batch must be at least {contest.least_training_batch} to train {contest.title} beside "
                f"{', '.join(peers)}, got {row.batch_size}; or give --peers without a name."
            )


def measure_contest(
    contest: Contest[Any], rows: Sequence[Row], peers: Sequence[str], settings: Settings
) -> dict[str, Any]:
    """Measure and print rows.

    Args:
        contest: Builds the contestants.
        rows: What is measured.
        peers: Of `contest.peers`, installed.
        settings: How.

    Returns:
        {"rows": …, "refused": what is said of each contestant without a ratio}.
    """
    measured: list[dict[str, Any]] = []
    refused: list[str] = []
    for row in rows:
        try:
            figures = measure_row(contest, row, peers, settings)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"memory does not suffice for this row: {row.title}; choose a smaller --batch or --size."
            ) from None
        print_row(figures)
        measured.append(figures)
        refused += [f"{row.title}: {sentence}" for sentence in figures["refused"]]
    return {"rows": measured, "refused": refused}


def measure_row(contest: Contest[Any], row: Row, peers: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Measure one row.

    Args:
        contest: Builds the contestants.
        row: What is measured.
        peers: Of `contest.peers`, installed.
        settings: How.
    """
    device = settings.device
    own, batch = contest.own(row), contest.batch(row)
    flops = step_flops(own, batch, row)
    others = {name: contest.peer(name, own, row) for name in peers}
    batch = batch.to(device)
    contestants: list[Contestant[Any]] = [own, *others.values()]
    for contestant in contestants:
        contestant.model.to(device)
    agreements = {
        name: agreements_of(contest.references(name, own), other, row, batch.first()) for name, other in others.items()
    }
    if row.cast_once:
        dtype = getattr(torch, row.precision)
        contestants, batch = [contestant.cast(dtype) for contestant in contestants], batch.cast(dtype)
    if settings.compile:
        torch.compiler.reset()  # what was compiled for other rows counts against a limit
        twins = [contestant.compiled() for contestant in contestants]
        pairs = zip(twins, contestants, strict=True)
        agreements |= {twin.name: [compiled_agreement(twin, made_of, row, batch)] for twin, made_of in pairs}
        contestants += twins
    works = {contestant.name: work_of(contestant, batch, row) for contestant in contestants}
    product = LargeProduct.on(device, row.precision)
    with progress_bar(row.title) as show:
        times_s = take_turns({**works, _PRODUCT: product}, settings.time_of, settings.warmup, settings.repeats, show)
    rate = product.flops / spread(times_s.pop(_PRODUCT))["median"]
    ratios = ratios_of(times_s, {name for name, found in agreements.items() if not all(one.holds for one in found)})
    measured = {}
    for name, work in works.items():
        time_s = spread(times_s[name])
        measured[name] = {
            "time_s": time_s,
            "images_per_s": row.batch_size / time_s["median"],
            "ratios": ratios[name],
            "peak_bytes": work.held_bytes() + peak_extra_bytes(work, device),
            "share_of_floor": flops / rate / time_s["median"],
        }
    return {
        **asdict(row),
        "title": row.title,
        "flops": flops,
        "products_per_s": rate,
        "contestants": measured,
        "agreement": {
            name: [{**asdict(one), "holds": one.holds} for one in found] for name, found in agreements.items()
        },
        "refused": [one.refusal(name) for name, found in agreements.items() for one in found if not one.holds],
    }


def step_flops(own: Contestant[Any], batch: Batch, row: Row) -> int:
    """The operations of all products that one step of a row needs, counted on the CPU for one image.

    There torch itself makes them all; a GPU may have kernels that do not say what they compute.

    Args:
        own: Ours, on the CPU.
        batch: Likewise.
        row: What is done with it.
    """
    work = work_of(own, batch.first(), replace(row, precision="float32", cast_once=False))
    return matrix_flops(work.forward) * row.batch_size * (_BACKWARD_SHARE if row.trains else 1)


def agreements_of(
    references: Mapping[str, Callable[[], Contestant[Any]]], other: Contestant[Any], row: Row, batch: Batch
) -> list[Agreement]:
    """Whether a peer computes what ours does: maps in float32, what follows from them, maps in the row's precision.

    Args:
        references: Of ours, see `Contest.references`.
        other: The peer.
        row: Says what it is compared for.
        batch: Compared on.
    """
    other.model.eval()
    built = {name: cache(partial(_in_evaluation, build)) for name, build in references.items()}
    with full_float32():
        maps = {name: partial(lambda build: build().maps(batch), build) for name, build in built.items()}
        found = [first_agreement(other.maps(batch), maps)]
        name = found[0].reference
        own = built[name]()
        results = other.results(batch, row.trains)
        if results:
            ours = own.results(batch, row.trains)
            found.append(agreement(results, ours, name, "float32", other.results_tolerance))
    if row.precision != "float32":
        if row.cast_once:
            dtype = getattr(torch, row.precision)
            own, other, batch = own.cast(dtype), other.cast(dtype), batch.cast(dtype)
        with autocast(device_type(own.model), row):
            tolerance = MAP_TOLERANCE[row.precision]
            found.append(agreement(other.maps(batch), own.maps(batch), name, row.precision, tolerance))
    return found


def compiled_agreement(twin: Contestant[B], made_of: Contestant[B], row: Row, batch: B) -> Agreement:
    """Whether a compiled contestant computes what it was made of does, in the mode and precision in which it is timed.

    Args:
        twin: The compiled one.
        made_of: The other.
        row: Says the mode and the precision.
        batch: Compared on, all of it: for another size there would be other kernels.
    """
    for contestant in (twin, made_of):
        contestant.model.train(row.trains)
    with torch.inference_mode(not row.trains), autocast(device_type(twin.model), row):
        theirs, ours = (contestant.outputs(batch) for contestant in (twin, made_of))
    return agreement(theirs, ours, made_of.name, row.precision, MAP_TOLERANCE[row.precision])


def _in_evaluation(build: Callable[[], Contestant[Any]]) -> Contestant[Any]:
    contestant = build()
    contestant.model.eval()
    return contestant


def ratios_of(times_s: Mapping[str, Sequence[float]], refused: Collection[str]) -> dict[str, dict[str, Any]]:
    """For each contestant, how many times as long as ours it takes, and as ours compiled where that takes part.

    Args:
        times_s: Of every contestant, round by round.
        refused: Whose ratios are not to be had; nor those of peers that were compiled from them.

    Returns:
        {name: {name of ours: `spread` of the ratios of all rounds}}; nothing of a model to itself.
    """
    ours = [name for name in (OURS, OURS + COMPILED) if name in times_s and name not in refused]
    return {
        name: {
            own: paired_ratio(times, times_s[own])
            for own in ours
            if own != name and not {name, name.removesuffix(COMPILED)} & set(refused)
        }
        for name, times in times_s.items()
    }


def command(arguments: argparse.Namespace) -> str:
    """The command line again, without what is written where."""
    words = ["swin-dense", "benchmark", arguments.part]
    for name in ("variant", "precision", "device", "batch", "repeats", "warmup"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    if arguments.size is not None:
        words += ["--size", *map(str, arguments.size)]
    if arguments.peers is not None:
        words += ["--peers", *arguments.peers]
    words += [f"--{name}" for name in ("compile", "scaling") if getattr(arguments, name)]
    if arguments.scaling:
        words += ["--limit-s", f"{arguments.limit_s:g}"]
    return shlex.join([*words, "--document", "FILE"])
