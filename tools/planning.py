"""What a training run will need, from real steps on the worst batch that its recipe can draw."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from swin_dense.config import SwinConfig
from swin_dense.datasets.coco import CocoDataset
from swin_dense.tools.evaluation import default_workers
from swin_dense.tools.machine import describe_machine
from swin_dense.tools.micro_batch_choice import Candidate, Split, choose, first_that_fits, splits
from swin_dense.tools.progress_bar import progress_bar
from swin_dense.tools.recipe import Recipe
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.step_cost import StepJob, memory_bytes, step_cost
from swin_dense.tools.step_settings import optimizer_text
from swin_dense.tools.tables import counted
from swin_dense.tools.training_run import TrainingRun
from swin_dense.tools.worst_batch import WorstBatch, most_objects, worst_batch
from swin_dense.training.distributed import Process

USABLE_SHARE = {"cuda": 0.9, "cpu": 0.7}
"""Of the memory, on each kind of device: what batches of unequal sizes leave unusable between them is lost.

On a GPU torch takes such pieces back when memory runs short; a process's heap does not: a Mask R-CNN with Swin-T held
1.69 GB after its largest batch of 2 images of 640 x 960, and 2.26 GB after 30 unequal ones (glibc, Linux).
"""

_LOADING_S = 30.0  # no longer is watched how fast batches come


@dataclass(frozen=True)
class Planning:
    """A run that is not started, and where it is to be.

    Attributes:
        run: With random weights, on the CPU.
        device: Where steps are measured.
        memory_bytes: There is so much.
        steps: Measured of each candidate, at most.
    """

    run: TrainingRun
    device: torch.device
    memory_bytes: int
    steps: int

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device, world_size: int, memory_gb: float | None, steps: int) -> Planning:
        """Builds what training would build, but leaves out the weights, on which no cost depends.

        Args:
            recipe: The recipe.
            device: Of the training.
            world_size: Processes that will train.
            memory_gb: Plan for so much of 10^9 bytes in each process; None is what is free, on the CPU its share.
            steps: See `Planning`.

        Raises:
            ConfigError: The recipe contradicts itself or the number of processes.
            DataError: The data cannot be used.
        """
        workers = recipe.run.workers
        if workers is None:
            workers = default_workers(Process(0, 0, world_size, device))
        recipe = replace(
            recipe,
            model=replace(recipe.model, weights=None),
            run=replace(recipe.run, workers=workers),
        )
        # On the CPU, where it takes no memory from what is measured. Nothing is written before a run starts.
        run = TrainingRun(recipe, RunFolder(Path()), Process(0, 0, world_size, torch.device("cpu")))
        if memory_gb is not None:
            return cls(run, device, int(memory_gb * 1e9), steps)
        free_bytes = memory_bytes(device)
        return cls(run, device, free_bytes // world_size if device.type == "cpu" else free_bytes, steps)

    @property
    def backbone(self) -> SwinConfig:
        """The backbone as the recipe has it."""
        model: Any = self.run.model
        return model.backbone.config

    def worst_batch(self, images: int) -> WorstBatch:
        """The worst micro-batch of so many images."""
        run = self.run
        return worst_batch(run.recipe.augmentation, run.training_data, run.groups, run.model, images)

    def measure(self, split: Split) -> Candidate:
        """Makes steps, with a bar that follows."""
        job = StepJob(
            recipe=with_stages(self.run.recipe, split.checkpoint_stages),
            num_classes=len(self.run.label_map),
            sample=self.worst_batch(split.micro_batch_size).sample,
            split=split,
            steps=self.steps,
            device=self.device,
            memory_bytes=self.memory_bytes,
        )
        with progress_bar(f"measuring {split}") as show:
            show(0, self.steps + 1)
            cost = step_cost(job, lambda step: show(step, self.steps + 1))
        usable_bytes = int(USABLE_SHARE[self.device.type] * self.memory_bytes)
        if cost is None:
            return Candidate(split, None, None, usable_bytes)
        return Candidate(split, cost.peak_bytes, cost.step_time_s, usable_bytes)

    def candidates(self) -> tuple[list[Candidate], list[Candidate]]:
        """The micro-batches up to the first that fits; the last of them with stages that recompute activations."""
        share = self.run.recipe.optimizer.batch_size // self.run.process.world_size
        own = self.backbone.checkpoint_stages
        plain = first_that_fits(splits(share, own), self.measure)
        stages = tuple(range(len(self.backbone.depths)))
        others = dict.fromkeys((stages, stages[:2]))  # the first two hold most of the memory
        last = plain[-1].split
        return plain, [self.measure(replace(last, checkpoint_stages=other)) for other in others if other != own]


def with_stages(recipe: Recipe, checkpoint_stages: Sequence[int]) -> Recipe:
    """The recipe with other stages that recompute activations."""
    backbone = {**recipe.model.backbone, "checkpoint_stages": list(checkpoint_stages)}
    return replace(recipe, model=replace(recipe.model, backbone=backbone))


def figures(planning: Planning) -> dict[str, Any]:
    """Measures everything and returns it for programs; the keys are those of `plan.json`."""
    run = planning.run
    plain, checkpointed = planning.candidates()
    chosen = choose([*plain, *checkpointed])
    worst = planning.worst_batch((chosen or plain[-1]).split.micro_batch_size)
    loading_s = loading_time_s(run)
    step_s = None if chosen is None else chosen.step_time_s
    peak = None if chosen is None else chosen.peak_bytes
    return {
        "machine": {**describe_machine(), **_gpu(planning.device)},
        "memory_gb": planning.memory_bytes / 1e9,
        "usable_share": USABLE_SHARE[planning.device.type],
        "batch_size": run.recipe.optimizer.batch_size,
        "world_size": run.process.world_size,
        "workers": run.workers,
        "total_steps": run.total_steps,
        "worst_batch": {"size_hw": worst.size_hw, "objects": worst.objects, "images": worst.images},
        "candidates": [as_dict(candidate) for candidate in plain],
        "checkpointing": [as_dict(candidate) for candidate in checkpointed],
        "recommended": None if chosen is None else as_settings(chosen.split, planning.backbone.checkpoint_stages),
        "peak_memory_gb": None if peak is None else peak / 1e9,
        "step_time_s": step_s,
        "loading_time_s": loading_s,
        "run_time_s": None
        if step_s is None
        else run.total_steps * (step_s + waiting_s(loading_s, step_s, run.workers)),
    }


def waiting_s(loading_s: float, step_s: float, workers: int) -> float:
    """Seconds of each step in which training waits for images; without loader processes it loads them itself."""
    return max(0.0, loading_s - step_s) if workers else loading_s


def as_dict(candidate: Candidate) -> dict[str, Any]:
    """A candidate in plain types."""
    return {
        "micro_batch_size": candidate.split.micro_batch_size,
        "accumulation_steps": candidate.split.accumulation_steps,
        "checkpoint_stages": list(candidate.split.checkpoint_stages),
        "peak_memory_gb": None if candidate.peak_bytes is None else candidate.peak_bytes / 1e9,
        "step_time_s": candidate.step_time_s,
        "fits": candidate.fits,
    }


def as_settings(split: Split, own_stages: Sequence[int]) -> dict[str, Any]:
    """What the recipe must set for a split."""
    settings: dict[str, Any] = {"optimizer.micro_batch_size": split.micro_batch_size}
    if split.checkpoint_stages != tuple(own_stages):
        settings["model.backbone.checkpoint_stages"] = list(split.checkpoint_stages)
    return settings


def loading_time_s(run: TrainingRun) -> float:
    """Seconds in which the run's loader gives the batches of a step, once its processes are busy."""
    arrivals_s = [time.perf_counter()]
    busy_after, watched = 2 * run.workers, max(2, run.workers)  # each process keeps two batches ready
    for _ in run.batches(0):
        arrivals_s.append(time.perf_counter())
        if len(arrivals_s) > busy_after + watched + 1 or arrivals_s[-1] - arrivals_s[0] > _LOADING_S:
            break
    last = arrivals_s[-watched - 1 :]
    return run.accumulation_steps * (last[-1] - last[0]) / (len(last) - 1)


def describe(planning: Planning) -> list[str]:
    """Lines that say what is to be trained."""
    run = planning.run
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    images = f"{len(run.training_data)} training and {len(run.validation.paths)} validation images"
    processes = f"{run.process.world_size} x {planning.device}, {run.workers} loader processes each"
    lines = [
        f"{images}, {counted(len(run.label_map), 'class', 'classes')}; {parameters / 1e6:.1f} M parameters",
        f"{run.total_steps} steps of {run.recipe.optimizer.batch_size} images, {run.steps_per_epoch} in an epoch; "
        f"{processes}",
        optimizer_text(run.recipe),
    ]
    if isinstance(run.training_data, CocoDataset):
        index, most = most_objects(run.training_data)
        lines.append(f"most objects: {most}, in image {run.training_data.image_ids[index]}")
    return lines


def _gpu(device: torch.device) -> dict[str, str]:
    return {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
