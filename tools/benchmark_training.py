"""Training beside another library's model of the same kind, from random weights, for the same time on the same machine.

Both get the same batches in the same order, the same optimiser and the same schedule, as a function of the time that is
used up. They take turns within one process, so that whatever else the machine does slows both alike; only the time of
steps counts (forward, backward, update), not that of loading and of scoring. Both are scored by the same evaluator.
"""

from __future__ import annotations

import argparse
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.errors import ConfigError
from swin_dense.tools.benchmark import spread
from swin_dense.tools.benchmark_peers import peer_of
from swin_dense.tools.evaluation import evaluate
from swin_dense.tools.machine import machine_line
from swin_dense.tools.markdown_page import markdown_page, markdown_table, wrapped, write_markdown
from swin_dense.tools.predictors import Predictor
from swin_dense.tools.recipe import Recipe, read_recipe
from swin_dense.tools.tables import print_table
from swin_dense.tools.tasks import LabelledImages, Task, ValidationData, task_of
from swin_dense.training.distributed import process_from_environment
from swin_dense.training.loss_terms import means, total
from swin_dense.training.optimizer import build_optimizer
from swin_dense.training.random_state import RandomState, preserved_random_state, random_state, set_random_state

if TYPE_CHECKING:
    from torch.optim import AdamW

OURS = "swin-dense"
_TURN_S = 10.0
_WARMUP = 0.05  # of the time
_WARMUP_START = 0.01  # of the learning rate

Curve = list[tuple[float, float]]
"""Scores over time: (seconds, score)."""


@dataclass
class Contestant:
    """A model in training.

    Attributes:
        name: Whose it is.
        model: The model.
        losses: Of a batch, to be summed.
        predictor: The model on original images.
        optimizer: Its optimiser.
        batches: Its own iterator over the batches.
        random_state: Of its own random generators.
        seconds: Time used up.
        steps: Updates made.
        scores: At the times when it was scored.
    """

    name: str
    model: nn.Module
    losses: Callable[[Any], Mapping[str, Tensor]]
    predictor: Predictor[Any]
    optimizer: AdamW
    batches: Iterator[Any]
    random_state: RandomState
    seconds: float = 0.0
    steps: int = 0
    scores: Curve = field(default_factory=list)


def measure_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, print and return every figure.

    Raises:
        ConfigError: A number is out of range, or the recipe's model has no peer.
    """
    _require_fitting(arguments)
    seeds = sorted(set(arguments.seeds))
    by_seed: dict[str, Any] = {}
    for seed in seeds:
        recipe = read_recipe(arguments.recipe, [*arguments.overrides, f"run.seed={seed}"])
        score = task_of(recipe).main_score
        contestants = train_beside(recipe, 60 * arguments.minutes, arguments.scores)
        by_seed[str(seed)] = {
            each.name: {"steps": each.steps, "seconds": each.seconds, "scores": each.scores} for each in contestants
        }
        print_table(f"seed {seed}", _seed_rows(by_seed[str(seed)], score))
    figures = {
        "command": _command(arguments, seeds),
        "score": score,
        "minutes": arguments.minutes,
        "threads": torch.get_num_threads(),
        "by_seed": by_seed,
        "summary": summarise(by_seed),
    }
    print_table(f"{score} after {arguments.minutes:g} minutes", _summary_rows(figures))
    return figures


def _require_fitting(arguments: argparse.Namespace) -> None:
    if min(arguments.seeds) < 0:
        raise ConfigError(f"--seeds must be 0 or more each, got {arguments.seeds}.")
    if not 0 < arguments.minutes < math.inf:
        raise ConfigError(f"--minutes must be above 0, got {arguments.minutes}.")
    if arguments.scores < 1:
        raise ConfigError(f"--scores must be at least 1, got {arguments.scores}.")


def train_beside(recipe: Recipe, budget_s: float, num_scores: int) -> list[Contestant]:
    """Train the recipe's model and its peer in turns, until both have used up their time.

    Args:
        recipe: What to train; its schedule and its decay of rates over layers are not used.
        budget_s: Seconds of each.
        num_scores: How often each is scored, in even intervals; the last time is at the end.

    Returns:
        Ours and the peer.

    Raises:
        ConfigError: There is no peer for the recipe's model.
    """
    with preserved_random_state():
        task = task_of(recipe)
        data = task.training_data()
        validation = task.validation_data(data.label_map)
        both = contestants(task, data)
        for number in range(1, num_scores + 1):
            end_s = budget_s * number / num_scores
            while any(each.seconds < end_s for each in both):
                contestant = min(both, key=lambda each: each.seconds)
                take_turn(contestant, min(end_s, contestant.seconds + _TURN_S), budget_s, recipe)
            for contestant in both:
                contestant.scores.append((contestant.seconds, score_of(contestant, task, validation)))
    return both


def contestants(task: Task[Any, Any, Any], data: LabelledImages[Any]) -> list[Contestant]:
    """The recipe's model and its peer, each with generators that start from the recipe's seed.

    Args:
        task: Of the recipe.
        data: The training set.

    Raises:
        ConfigError: There is no peer for the recipe's model.
    """
    recipe, label_map, device = task.recipe, data.label_map, torch.device("cpu")
    torch.manual_seed(recipe.run.seed)
    model = task.build_model(len(label_map)).train()
    own = Contestant(
        OURS,
        model,
        lambda batch: means(task.losses(model, batch, device)),
        task.predictor(model, label_map, device),
        _optimizer(model, recipe),
        batches(task, data),
        random_state(),
    )
    torch.manual_seed(recipe.run.seed)
    architecture: Any = model.architecture
    peer = peer_of(architecture, recipe.inference).train()
    other = Contestant(
        peer.title,
        peer,
        peer.losses,
        peer.predictor(label_map),
        _optimizer(peer, recipe),
        map(peer.prepared, batches(task, data)),
        random_state(),
    )
    return [own, other]


def _optimizer(model: nn.Module, recipe: Recipe) -> AdamW:
    settings = recipe.optimizer
    return build_optimizer(model, learning_rate=settings.scaled_learning_rate(), weight_decay=settings.weight_decay)


def batches(task: Task[Any, Any, Any], data: LabelledImages[Any]) -> Iterator[Any]:
    """The batches of a recipe's run, without end; which they are follows from its seed alone.

    Args:
        task: Of the recipe.
        data: The training set.
    """
    recipe = task.recipe
    groups = task.batch_groups(data)
    for keys in TrainingBatches(len(data), recipe.optimizer.batch_size, seed=recipe.run.seed, groups=groups):
        yield task.collate([data[key] for key in keys])


def take_turn(contestant: Contestant, end_s: float, budget_s: float, recipe: Recipe) -> None:
    """Make steps until the contestant has used so many seconds.

    Args:
        contestant: Whose turn it is.
        end_s: When it ends, of its own time.
        budget_s: All of its time, which the schedule follows.
        recipe: Its optimiser settings.
    """
    settings = recipe.optimizer
    set_random_state(contestant.random_state)
    while contestant.seconds < end_s:
        batch = next(contestant.batches)
        for group in contestant.optimizer.param_groups:
            group["lr"] = settings.scaled_learning_rate() * rate_factor(contestant.seconds / budget_s)
        started_s = time.perf_counter()
        contestant.optimizer.zero_grad(set_to_none=True)
        total(contestant.losses(batch)).backward()
        if settings.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(contestant.model.parameters(), settings.max_gradient_norm)
        contestant.optimizer.step()
        contestant.seconds += time.perf_counter() - started_s
        contestant.steps += 1
    contestant.random_state = random_state()


def rate_factor(share: float) -> float:
    """The learning rate over its largest, after a share of the time: a short linear rise, then a straight line to 0."""
    return min(1.0, _WARMUP_START + share / _WARMUP) * max(0.0, 1.0 - share)


def score_of(contestant: Contestant, task: Task[Any, Any, Any], validation: ValidationData[Any]) -> float:
    """The task's main score on the validation set; 0 where there is none yet."""
    contestant.model.eval()
    scores = evaluate(contestant.predictor, validation, process_from_environment("cpu"))
    contestant.model.train()
    assert scores is not None  # there is one process
    return task.table(scores)[task.main_score] or 0.0


def summarise(by_seed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and range of the last scores over the seeds, steps made, and in how many seeds ours is at least equal.

    Args:
        by_seed: {seed: {name: {"steps", "seconds", "scores": [(seconds, score)]}}}.
    """
    names = list(next(iter(by_seed.values())))
    last = {name: [each[name]["scores"][-1][1] for each in by_seed.values()] for name in names}
    theirs = next(name for name in names if name != OURS)
    return {
        "last": {name: {"mean": _mean(values), **spread(values)} for name, values in last.items()},
        "steps": {name: spread([each[name]["steps"] for each in by_seed.values()]) for name in names},
        "at_least_equal": sum(own >= other for own, other in zip(last[OURS], last[theirs], strict=True)),
    }


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The means of times and of scores, point by point."""
    points = zip(*curves, strict=True)
    return [(_mean([at_s for at_s, _ in each]), _mean([score for _, score in each])) for each in points]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def draw_training(figures: Mapping[str, Any], path: Path) -> None:
    """Draw the score of each model and seed over the time that was used up, and the means.

    Args:
        figures: Of `measure_training`.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    for number, name in enumerate(figures["summary"]["last"]):
        curves = [each[name]["scores"] for each in figures["by_seed"].values()]
        for curve in curves:
            axes.plot(*_minutes_and_scores(curve), color=f"C{number}", alpha=0.3)
        label = f"{name}, mean of {len(curves)} seeds"
        axes.plot(*_minutes_and_scores(mean_curve(curves)), color=f"C{number}", marker=".", linewidth=2, label=label)
    axes.set(xlabel="minutes of training", ylabel=figures["score"], title="the same time, batches and optimiser")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    drawing.savefig(path, dpi=110)


def _minutes_and_scores(curve: Curve) -> tuple[list[float], list[float]]:
    return [at_s / 60 for at_s, _ in curve], [score for _, score in curve]


def write_document(path: Path, figures: Mapping[str, Any], machine: Mapping[str, str]) -> None:
    """Write the figures of `measure_training` as a page, Markdown, with its picture beside it."""
    picture = path.with_suffix(".png")
    write_markdown(path, document(figures, machine, picture.name))
    draw_training(figures, picture)


def document(figures: Mapping[str, Any], machine: Mapping[str, str], picture: str) -> str:
    """That page; every number in it is measured or a setting."""
    rows = _summary_rows(figures)
    peer = next(name for name in rows if name != OURS)
    parts = [
        "This page and its picture are written by this command:",
        f"```sh\n{figures['command']}\n```",
        wrapped(f"Machine: {machine_line(machine)}"),
        wrapped(
            f"Both models start from random weights and train for {figures['minutes']:g} minutes "
            f"(threads: {figures['threads']}). They get the same batches in the same order, the same optimiser and "
            "learning rate, take turns in one process, and are scored by the same evaluator; the time of forward, "
            f"backward and update counts, not that of loading and scoring. {OURS} is at least equal in "
            f"{figures['summary']['at_least_equal']} of {len(figures['by_seed'])} seeds."
        ),
        markdown_table(rows),
        f"![{figures['score']} over time]({picture})",
    ]
    return markdown_page(f"{figures['score']} after the same training time, beside {peer}", parts)


def _summary_rows(figures: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    summary = figures["summary"]
    return {
        name: {
            f"mean {figures['score']}": f"{values['mean']:.3f}",
            "least to most": f"{values['min']:.3f} to {values['max']:.3f}",
            "steps": f"{summary['steps'][name]['median']:.0f}",
        }
        for name, values in summary["last"].items()
    }


def _seed_rows(measured: Mapping[str, Any], score: str) -> dict[str, dict[str, float | int]]:
    return {name: {score: each["scores"][-1][1], "steps": each["steps"]} for name, each in measured.items()}


def _command(arguments: argparse.Namespace, seeds: Sequence[int]) -> str:
    numbers = ["--minutes", f"{arguments.minutes:g}", "--scores", str(arguments.scores), "--seeds", *map(str, seeds)]
    # Where the data lie is nobody's business, what they are called is.
    shown = [f"data={Path(word).name}" if word.startswith("data=") else word for word in arguments.overrides]
    return shlex.join(["swin-dense", "benchmark", "training", arguments.recipe, *shown, *numbers, "--document", "FILE"])
