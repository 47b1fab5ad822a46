"""The batches of a run, which go on when pictures cannot be read and when processes that load them die."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from swin_dense.datasets.batches import TrainingBatches
from swin_dense.datasets.unreadable import CheckedBatch, CheckedCollate, SkippingUnreadable, count_unreadable
from swin_dense.tools.recipe import Recipe
from swin_dense.tools.tasks import LabelledImages
from swin_dense.training.distributed import Process
from swin_dense.training.events import Event
from swin_dense.training.restarting_loader import POLL_S, restarting


def training_batches(
    images: LabelledImages[Any],
    collate: Callable[[Sequence[Any]], Any],
    recipe: Recipe,
    process: Process,
    *,
    groups: np.ndarray | None,
    batch_size: int,
    batches_per_step: int,
    start_step: int,
    total_steps: int,
    workers: int,
    tell: Callable[[Event], None],
) -> Iterator[Any]:
    """The batches of this process from one step to the end; which they are follows from the recipe's seed alone.

    Args:
        images: The training set.
        collate: Makes a batch of samples.
        recipe: Gives the seed and the limits.
        process: This process.
        groups: As `TrainingBatches` takes them.
        batch_size: Samples of a batch.
        batches_per_step: Batches of a step.
        start_step: Steps made before.
        total_steps: Steps of the whole run.
        workers: Processes that load.
        tell: Gets an event for each picture that cannot be read, and for each restart.

    Raises:
        DataError: More pictures than `run.max_unreadable_images` cannot be read, or workers die again and again.
    """
    run = recipe.run
    first_batch, end = start_step * batches_per_step, total_steps * batches_per_step
    checked = SkippingUnreadable(images)
    pin_memory = process.device.type == "cuda"
    step = start_step + 1

    def load_from(number: int) -> Iterable[CheckedBatch[Any]]:
        batches = TrainingBatches(
            len(images),
            batch_size,
            seed=run.seed,
            groups=groups,
            rank=process.rank,
            world_size=process.world_size,
            start_batch=first_batch + number,
            num_batches=end - first_batch - number,
        )
        loader: Any = DataLoader  # its types know of integer keys only; ours are (epoch, index)
        return loader(
            checked,
            batch_sampler=batches,
            collate_fn=CheckedCollate(collate),
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=POLL_S if workers else 0,
            generator=torch.Generator().manual_seed(run.seed),
        )

    def tell_of(kind: str, text: str) -> None:
        tell(Event(step, kind, f"step {step}: {text}"))

    loaded = restarting(
        load_from, patience_s=run.loading_timeout_s, on_restart=lambda text: tell_of("loading_restarted", text)
    )
    readable = count_unreadable(
        loaded,
        limit=run.max_unreadable_images,
        on_unreadable=lambda picture: tell_of("unreadable", f"another stands in for a picture. {picture.reason}"),
    )
    for number, batch in enumerate(readable, start=1):
        yield batch
        step = start_step + number // batches_per_step + 1
