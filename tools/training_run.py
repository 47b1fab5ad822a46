"""One training run: data, model and optimiser from a recipe, and what each log, checkpoint and evaluation does."""

from __future__ import annotations

import random
import shlex
import sys
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from swin_dense.datasets.batches import TrainingBatches, batches_per_epoch
from swin_dense.datasets.labels import LabelMap, require_same_labels
from swin_dense.errors import CheckpointError, ConfigError, Interrupted
from swin_dense.heads.model_file import save_model
from swin_dense.tools.disk_writes import DiskWrites
from swin_dense.tools.evaluation import default_workers, evaluate, flat
from swin_dense.tools.machine import describe_machine
from swin_dense.tools.recipe import Recipe, changed_values
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.run_pictures import RunPictures
from swin_dense.tools.run_report import write_report
from swin_dense.tools.step_settings import build_schedule, optimizer_text, resolve_precision, split_batch
from swin_dense.tools.tables import counted
from swin_dense.tools.tasks import task_of
from swin_dense.tools.tensorboard_log import TensorboardLog
from swin_dense.tools.training_batches import training_batches
from swin_dense.tools.validation_losses import with_total
from swin_dense.training.checkpoint import LAST, capture_state, load_state, restore_state, save_state
from swin_dense.training.distributed import Process, barrier, share_rare, unwrap, wrap
from swin_dense.training.events import Event, append_event
from swin_dense.training.loop import LoopSettings, StepLog, train
from swin_dense.training.metrics_file import MetricsFile
from swin_dense.training.non_finite import SkippedSteps
from swin_dense.training.optimizer import build_optimizer, change_settings
from swin_dense.training.progress import Progress, peak_memory_bytes
from swin_dense.training.sharding import is_sharded, shard, whole_state
from swin_dense.training.weight_average import WeightAverage
from swin_dense.weights import WeightsReport, load_weights

METRICS = "metrics.csv"
PICTURES = "pictures"


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
        # Processes evaluate different numbers of images, which pieces of a model cannot.
        self.evaluated = unwrap(self.model)
        if recipe.run.shard_model and process.world_size > 1:
            self.evaluated = deepcopy(self.evaluated)
            shard(unwrap(self.model), process)
        torch.manual_seed(recipe.run.seed + 1 + process.rank)  # processes drop and sample differently
        random.seed(recipe.run.seed + 1 + process.rank)
        self.optimizer: AdamW = build_optimizer(unwrap(self.model), **self._optimizer_settings())
        decay = recipe.optimizer.average_decay
        self.average = None if decay is None else WeightAverage(unwrap(self.model), decay)
        self.scheduler = build_schedule(self.optimizer, recipe.schedule, self.steps_per_epoch, self.total_steps)
        # Made here and not in the first evaluation, so that a wrong setting shows before hours of training.
        self.predictor = self.task.predictor(self.evaluated, self.label_map, process.device)
        self.best_score: float | None = None
        self.tensorboard: TensorboardLog | None = None
        self.skipped_steps = SkippedSteps()
        self.writes = DiskWrites(self._tell)
        self.pictures = RunPictures(folder, self.validation, self.predictor, recipe.run.pictures)

    def start(self, resume: bool) -> None:
        """Run to the end; see `swin_dense.training.loop.train` for what may be raised.

        Raises:
            CheckpointError: Files could not be written, to the end.
        """
        start_step = self._restore() if resume else 0
        if self.process.is_main:
            if self.recipe.run.tensorboard:  # before anything is written: it may not be installed
                self.tensorboard = TensorboardLog(self.folder.path / "tensorboard", start_step)
            self.folder.write_recipe(self.recipe)
            self.metrics = MetricsFile(self.folder.metrics, resume_step=start_step)
            self._say(self._summary(start_step))
            self._write_beginning(start_step)
        run, settings = self.recipe.run, self.recipe.optimizer
        loop_settings = LoopSettings(
            total_steps=self.total_steps,
            accumulation_steps=self.accumulation_steps,
            max_gradient_norm=settings.max_gradient_norm,
            precision=resolve_precision(settings.precision, self.process.device),
            max_skipped_steps=run.max_skipped_steps,
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
        try:
            with self.progress:
                train(
                    self.model,
                    self.batches(start_step),
                    partial(self.task.losses, device=self.process.device),
                    self.optimizer,
                    self.scheduler,
                    loop_settings,
                    device=self.process.device,
                    start_step=start_step,
                    skipped_steps=self.skipped_steps,
                    bad_batches=self.folder.bad_batches,
                    on_log=self._log,
                    on_checkpoint=self._checkpoint,
                    on_evaluate=self._evaluate,
                    on_event=self._tell_once,
                    after_update=None if self.average is None else self.average.update,
                )
        except Interrupted:
            if complaint := self.writes.complaint(LAST):
                raise CheckpointError(f"{self.folder.path}: stopped by a signal, but {complaint}") from None
            raise
        if complaints := share_rare(self.writes.complaint() or None):
            raise CheckpointError(f"{self.folder.path}: the run is done, but {' '.join(complaints)}")

    def _write_beginning(self, start_step: int) -> None:
        """What a report says of how the run began; the ground truth is proved to score 1 before it judges a model."""
        for note in self.validation.prove():
            self._say(note)
        environment = {
            "command": shlex.join(sys.argv),
            "total_steps": self.total_steps,
            "processes": self.process.world_size,
            "device": str(self.process.device),
            "precision": resolve_precision(self.recipe.optimizer.precision, self.process.device),
            "machine": describe_machine(),
        }
        self.writes.attempt(
            self.folder.environment.name, start_step, partial(self.folder.write_environment, environment)
        )
        if start_step == 0:
            keys = [key for batch in self._first_batches() for key in batch]
            draw = partial(self.pictures.draw_training, self.task, self.training_data, keys)
            self.writes.attempt(PICTURES, start_step, draw)

    def _first_batches(self) -> TrainingBatches:
        return TrainingBatches(
            len(self.training_data),
            self.micro_batch_size,
            seed=self.recipe.run.seed,
            groups=self.groups,
            world_size=self.process.world_size,
            num_batches=-(-self.recipe.run.pictures // self.micro_batch_size),
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

    def batches(self, start_step: int) -> Iterable[Any]:
        """The batches of this process from a step on, which go on when pictures or loading processes fail."""
        return training_batches(
            self.training_data,
            self.task.collate,
            self.recipe,
            self.process,
            groups=self.groups,
            batch_size=self.micro_batch_size,
            batches_per_step=self.accumulation_steps,
            start_step=start_step,
            total_steps=self.total_steps,
            workers=self.workers,
            tell=self._tell,
        )

    def _log(self, log: StepLog) -> None:
        if not self.process.is_main:
            return
        self.progress.update(log.step, log.losses, log.learning_rate)
        row: dict[str, float | None] = {
            "loss": sum(log.losses.values()),
            **log.losses,
            "learning_rate": log.learning_rate,
            "gradient_norm": log.gradient_norm,
            "step_time_s": log.seconds,
            "data_time_s": log.data_seconds,
            "peak_memory_gb": peak_memory_bytes(self.process.device) / 1e9,
        }
        self.writes.attempt(METRICS, log.step, partial(self._append, log.step, row))

    def _append(self, step: int, row: dict[str, float | None]) -> None:
        if METRICS in self.writes.failed:  # the last line may be torn
            self.metrics = MetricsFile(self.folder.metrics, resume_step=step)
        self.metrics.append(step, row)
        if self.tensorboard is not None:
            self.tensorboard.append(step, row)

    def _checkpoint(self, step: int) -> None:
        state = capture_state(
            self.model,
            self.optimizer,
            self.scheduler,
            step=step,
            best_score=self.best_score,
            average=self.average,
            extra={
                "skipped_steps": asdict(self.skipped_steps),
                "labels": self.label_map.to_dict(),
                "recipe": self.recipe.to_dict(),
            },
        )
        if state is not None:
            self.writes.attempt(LAST, step, partial(save_state, self.folder.path, state))

    def _evaluate(self, step: int) -> None:
        """Score and write the average of the weights where there is one, else the weights."""
        if is_sharded(unwrap(self.model)):
            state = unwrap(self.model).state_dict() if self.average is None else self.average.state_dict()["tensors"]
            self.evaluated.load_state_dict(whole_state(state), strict=self.average is None)
            self._evaluate_model(step)
            return
        with nullcontext() if self.average is None else self.average.applied():
            self._evaluate_model(step)

    def _evaluate_model(self, step: int) -> None:
        model = self.evaluated.eval()

        def note_and_draw(index: int, prediction: Any) -> None:  # noqa: ANN401
            if self.process.is_main:
                self.progress.note("evaluating", index + 1, len(self.validation.paths))
            self.writes.attempt(PICTURES, step, lambda: self.pictures.draw_validation(index, prediction))

        scores = evaluate(
            self.predictor,
            self.validation,
            self.process,
            workers=self.workers,
            with_losses=self.recipe.run.validation_losses,
            on_prediction=note_and_draw,
        )
        if scores is None:
            return
        table = self.task.table(scores)
        losses = with_total(scores.get("losses", {}))
        self.writes.attempt(METRICS, step, partial(self._append, step, flat({**table, **losses}, "val")))
        self.writes.attempt(self.folder.scores.name, step, partial(self.folder.write_scores, scores, table, step))
        self.writes.attempt(self.folder.curves.name, step, self.folder.draw_curves)
        self._write_models(model, step, table[self.task.main_score])
        self.writes.attempt(PICTURES, step, lambda: self.pictures.draw_worst(scores.get("worst_images", ())))
        self.writes.attempt(self.folder.report.name, step, lambda: write_report(self.folder))
        told = {**table, "loss": losses.get("loss")}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in told.items() if value is not None)
        self._say("\n".join([f"step {step}: {shown}", *scores.get("explanations", ())]))

    def _write_models(self, model: nn.Module, step: int, score: float | None) -> None:
        about = {
            "labels": self.label_map.to_dict(),
            "recipe": self.recipe.to_dict(),
            "step": step,
            "score": {self.task.main_score: score},
        }

        def saved(path: Path) -> bool:
            return self.writes.attempt(path.name, step, lambda: save_model(path, model, about))  # type: ignore[arg-type]

        saved(self.folder.last_model)
        is_best = self.best_score is None or (score is not None and score > self.best_score)
        if is_best and saved(self.folder.best_model):
            self.best_score = score

    def _restore(self) -> int:
        loaded = load_state(self.folder.path)
        if loaded.state.step > self.total_steps:
            raise ConfigError(
                f"{self.folder.path}: the run is at step {loaded.state.step} already, the recipe ends at step "
                f"{self.total_steps}; raise schedule.steps or schedule.epochs to go on."
            )
        extra = loaded.state.extra
        saved_labels = LabelMap.from_dict(extra["labels"])
        require_same_labels(saved_labels, self.label_map, f"{self.folder.path}: the run goes on with other data")
        messages = restore_state(
            loaded.state,
            self.model,
            self.optimizer,
            self.scheduler,
            rank=self.process.rank,
            average=self.average,
        )
        change_settings(self.optimizer, self.scheduler, unwrap(self.model), **self._optimizer_settings())
        self.best_score = loaded.state.best_score
        self.skipped_steps = SkippedSteps(**extra["skipped_steps"])
        changes = [f"since the run was stopped, {change}" for change in changed_values(extra["recipe"], self.recipe)]
        for message in (*loaded.messages, *messages, *changes):
            self._say(message)
        return loaded.state.step

    def _optimizer_settings(self) -> dict[str, float]:
        settings = self.recipe.optimizer
        return {
            "learning_rate": settings.scaled_learning_rate(),
            "weight_decay": settings.weight_decay,
            "layer_decay": settings.layer_decay,
        }

    def _summary(self, start_step: int) -> str:
        process, settings = self.process, self.recipe.optimizer
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        images = f"{len(self.training_data)} training and {len(self.validation.paths)} validation images"
        shares = f"{process.world_size} x {self.micro_batch_size} x {self.accumulation_steps}"
        lines = [
            f"{images}, {counted(len(self.label_map), 'class', 'classes')}; {parameters / 1e6:.1f} M parameters",
            f"{self.total_steps} steps of {settings.batch_size} images ({shares}) on {process.device}",
            optimizer_text(self.recipe),
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

    def _tell_once(self, event: Event) -> None:
        """What all processes know."""
        if self.process.is_main:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        """What this process knows."""
        print(event.text, file=sys.stderr, flush=True)
        with suppress(OSError):  # a full disk has been told of
            append_event(self.folder.events, event)

    def _say(self, text: str) -> None:
        if self.process.is_main:
            print(text, file=sys.stderr, flush=True)
