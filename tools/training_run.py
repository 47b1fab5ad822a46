"""One training run: data, model and optimiser from a recipe, and what each log, checkpoint and evaluation does."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from swin_dense.datasets.batches import TrainingBatches, batches_per_epoch
from swin_dense.errors import ConfigError
from swin_dense.heads.model_file import save_model
from swin_dense.tools.evaluation import default_workers, evaluate, flat, spread
from swin_dense.tools.recipe import Recipe, ScheduleSettings
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.tasks import task_of
from swin_dense.training.checkpoint import capture_state, load_state, restore_state, save_state
from swin_dense.training.distributed import Process, barrier, unwrap, wrap
from swin_dense.training.loop import LoopSettings, StepLog, train
from swin_dense.training.metrics_file import MetricsFile
from swin_dense.training.optimizer import build_optimizer, change_settings
from swin_dense.training.progress import Progress
from swin_dense.training.schedule import cosine_schedule, poly_schedule, step_schedule
from swin_dense.weights import WeightsReport, load_weights


class TrainingRun:
    """Everything of one run, in this process.

    Args:
        recipe: What to do.
        folder: Where to leave the results.
        process: This process.

    Raises:
        ConfigError: The recipe contradicts itself or the number of processes.
        DataError: The data cannot be used.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, process: Process) -> None:
        self.recipe = recipe
        self.folder = folder
        self.process = process
        self.task = task_of(recipe)
        self.training_data = self.task.training_data()
        self.label_map = self.training_data.label_map
        self.validation = self.task.validation_data(self.label_map)
        self.groups = self.task.batch_groups(self.training_data)
        self.micro_batch_size, self.accumulation_steps = split_batch(recipe, process.world_size)
        self.steps_per_epoch, self.total_steps = self._count_steps()
        self.workers = default_workers(process) if recipe.run.workers is None else recipe.run.workers

        torch.manual_seed(recipe.run.seed)
        model = self.task.build_model(len(self.label_map))
        self.weights = self._load_weights(model)
        several_gpus = process.world_size > 1 and process.device.type == "cuda"
        self.model = wrap(model, process, synchronise_batch_norm=several_gpus)
        torch.manual_seed(recipe.run.seed + 1 + process.rank)  # processes drop and sample differently
        settings = recipe.optimizer
        self.optimizer: AdamW = build_optimizer(
            unwrap(self.model), learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.scheduler = build_schedule(self.optimizer, recipe.schedule, self.steps_per_epoch, self.total_steps)
        # Made here and not in the first evaluation, so that a wrong setting shows before hours of training.
        self.predictor = self.task.predictor(unwrap(self.model), self.label_map, process.device)
        self.best_score: float | None = None

    def start(self, resume: bool) -> None:
        """Run to the end; see `swin_dense.training.loop.train` for what may be raised."""
        start_step = self._restore() if resume else 0
        if self.process.is_main:
            self.folder.write_recipe(self.recipe)
            self.metrics = MetricsFile(self.folder.metrics, resume_step=start_step)
            self._say(self._summary(start_step))
        run, settings = self.recipe.run, self.recipe.optimizer
        loop_settings = LoopSettings(
            total_steps=self.total_steps,
            accumulation_steps=self.accumulation_steps,
            max_gradient_norm=settings.max_gradient_norm,
            precision=resolve_precision(settings.precision, self.process.device),
            log_every_steps=run.log_every_steps,
            checkpoint_every_steps=run.checkpoint_every_steps,
            evaluate_every_steps=run.evaluate_every_steps or self.total_steps,
        )
        self.progress = Progress(
            self.total_steps,
            images_per_step=settings.batch_size,
            device=self.process.device,
            start_step=start_step,
        )
        with self.progress:
            train(
                self.model,
                self._batches(start_step),
                partial(self.task.losses, device=self.process.device),
                self.optimizer,
                self.scheduler,
                loop_settings,
                device=self.process.device,
                start_step=start_step,
                on_log=self._log,
                on_checkpoint=self._checkpoint,
                on_evaluate=self._evaluate,
            )

    def _load_weights(self, model: nn.Module) -> WeightsReport | None:
        weights = self.recipe.model.weights
        if weights is None:
            return None
        if not self.process.is_main:
            barrier()  # published weights are downloaded by one process, and read by all
        report = load_weights(model, weights, class_names=self.label_map.names)
        if self.process.is_main:
            barrier()
        return report

    def _count_steps(self) -> tuple[int, int]:
        schedule = self.recipe.schedule
        per_epoch = batches_per_epoch(
            len(self.training_data), self.micro_batch_size, self.groups, self.process.world_size
        )
        steps_per_epoch = max(1, per_epoch // self.accumulation_steps)
        if schedule.steps is not None:
            return steps_per_epoch, schedule.steps
        assert schedule.epochs is not None
        return steps_per_epoch, schedule.epochs * steps_per_epoch

    def _batches(self, start_step: int) -> Iterable[Any]:
        batches = TrainingBatches(
            len(self.training_data),
            self.micro_batch_size,
            seed=self.recipe.run.seed,
            groups=self.groups,
            rank=self.process.rank,
            world_size=self.process.world_size,
            start_batch=start_step * self.accumulation_steps,
            num_batches=(self.total_steps - start_step) * self.accumulation_steps,
        )
        loader: Any = DataLoader  # its types know of integer keys only; ours are (epoch, index)
        return loader(
            self.training_data,
            batch_sampler=batches,
            collate_fn=self.task.collate,
            num_workers=self.workers,
            pin_memory=self.process.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.recipe.run.seed),
        )

    def _log(self, log: StepLog) -> None:
        if not self.process.is_main:
            return
        self.progress.update(log.step, log.losses, log.learning_rate)
        row = {
            "loss": sum(log.losses.values()),
            **log.losses,
            "learning_rate": log.learning_rate,
            "gradient_norm": log.gradient_norm,
            "step_time_s": log.seconds,
            "data_time_s": log.data_seconds,
        }
        self.metrics.append(log.step, row)

    def _checkpoint(self, step: int) -> None:
        state = capture_state(self.model, self.optimizer, self.scheduler, step=step, best_score=self.best_score)
        if state is not None:
            save_state(self.folder.path, state)

    def _evaluate(self, step: int) -> None:
        model = unwrap(self.model).eval()
        self._share_buffers(model)
        drawn = set(spread(self.recipe.run.pictures, len(self.validation.paths)))

        def note_and_draw(index: int, prediction: Any) -> None:  # noqa: ANN401
            if self.process.is_main:
                self.progress.note("evaluating", index + 1, len(self.validation.paths))
            if index in drawn:
                picture = self.validation.picture(index, self.predictor, prediction)
                self.folder.write_picture(f"{index:05d}_{self.validation.paths[index].stem}", picture)

        scores = evaluate(
            self.predictor, self.validation, self.process, workers=self.workers, on_prediction=note_and_draw
        )
        if scores is None:
            return
        table = self.task.table(scores)
        self.metrics.append(step, flat(table, "val"))
        self.folder.write_scores(scores, step)
        self.folder.draw_curves()
        self._write_models(model, step, table[self.task.main_score])
        shown = "  ".join(f"{name} {value:.3f}" for name, value in table.items() if value is not None)
        self._say(f"step {step}: {shown}")

    def _share_buffers(self, model: nn.Module) -> None:
        """BatchNorm's running statistics of rank 0 for all: those of the others are not the ones that are saved."""
        if self.process.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _write_models(self, model: nn.Module, step: int, score: float | None) -> None:
        about = {
            "labels": self.label_map.to_dict(),
            "recipe": self.recipe.to_dict(),
            "step": step,
            "score": {self.task.main_score: score},
        }
        save_model(self.folder.last_model, model, about)  # type: ignore[arg-type]
        if self.best_score is None or (score is not None and score > self.best_score):
            self.best_score = score
            save_model(self.folder.best_model, model, about)  # type: ignore[arg-type]

    def _restore(self) -> int:
        loaded = load_state(self.folder.path)
        if loaded.state.step > self.total_steps:
            raise ConfigError(
                f"{self.folder.path}: the run is at step {loaded.state.step} already, the recipe ends at step "
                f"{self.total_steps}; raise schedule.steps or schedule.epochs to go on."
            )
        messages = restore_state(loaded.state, self.model, self.optimizer, self.scheduler, rank=self.process.rank)
        settings = self.recipe.optimizer
        change_settings(
            self.optimizer,
            self.scheduler,
            unwrap(self.model),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.best_score = loaded.state.best_score
        for message in (*loaded.messages, *messages):
            self._say(message)
        return loaded.state.step

    def _summary(self, start_step: int) -> str:
        process, settings = self.process, self.recipe.optimizer
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        images = f"{len(self.training_data)} training and {len(self.validation.paths)} validation images"
        shares = f"{process.world_size} x {self.micro_batch_size} x {self.accumulation_steps}"
        lines = [
            f"{images}, {len(self.label_map)} classes; {parameters / 1e6:.1f} M parameters",
            f"{self.total_steps} steps of {settings.batch_size} images ({shares}) on {process.device}, "
            f"learning rate {settings.learning_rate:g}",
        ]
        if start_step:
            lines.append(f"the run goes on after step {start_step}")
        elif self.weights is None:
            lines.append("training starts from random weights: model.weights is null")
        else:
            lines.append(str(self.weights))
        findings = getattr(self.training_data, "findings", {})
        unusual = ", ".join(f"{count} {what}" for what, count in findings.items() if count)
        if unusual:
            lines.append(f"in the annotations: {unusual}")
        return "\n".join(lines)

    def _say(self, text: str) -> None:
        if self.process.is_main:
            print(text, file=sys.stderr, flush=True)


def split_batch(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """How a step's images are shared: the micro-batch of one process, and how many of these make a step.

    Raises:
        ConfigError: The batch does not divide.
    """
    total, micro = recipe.optimizer.batch_size, recipe.optimizer.micro_batch_size
    if micro is None:
        micro = total // world_size
    if micro < 1 or total % (micro * world_size):
        raise ConfigError(
            f"optimizer.batch_size={total} must be a multiple of {world_size} processes x "
            f"optimizer.micro_batch_size={recipe.optimizer.micro_batch_size}; change one of them."
        )
    return micro, total // (micro * world_size)


def resolve_precision(
    wanted: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """The precision to train in: what is wanted, or for "auto" bfloat16 on a GPU that has it and float32 elsewhere."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def build_schedule(optimizer: AdamW, settings: ScheduleSettings, steps_per_epoch: int, total_steps: int) -> LRScheduler:
    """The schedule of a recipe, milestones turned into steps."""
    if settings.decay == "poly":
        return poly_schedule(
            optimizer,
            total_steps=total_steps,
            warmup_steps=settings.warmup_steps,
            warmup_start=settings.warmup_start,
            power=settings.power,
            minimum=settings.minimum_factor,
        )
    if settings.decay == "cosine":
        return cosine_schedule(
            optimizer,
            total_steps=total_steps,
            warmup_steps=settings.warmup_steps,
            warmup_start=settings.warmup_start,
            minimum=settings.minimum_factor,
        )
    unit = steps_per_epoch if settings.epochs is not None else 1
    return step_schedule(
        optimizer,
        warmup_steps=settings.warmup_steps,
        warmup_start=settings.warmup_start,
        milestones=[milestone * unit for milestone in settings.milestones],
    )
