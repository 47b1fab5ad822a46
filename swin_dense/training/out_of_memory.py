"""A step that does not fit into memory is made again in smaller parts, with the same gradient."""

import gc
from collections.abc import Callable, Mapping
from typing import Generic

import torch
from torch import nn

from swin_dense.errors import ConfigError
from swin_dense.training.events import Event
from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import B, Forward, MicroBatch, add_gradient, add_gradient_in_parts
from swin_dense.training.random_state import random_state
from swin_dense.training.starting_point import StartingPoint

REDONE_STEPS_IN_A_ROW = 3
"""After so many, steps begin with the smaller parts: cheaper than failing first every time."""


class OutOfMemoryRecovery(Generic[B]):
    """Adds up the gradients of a step's micro-batches, in whatever parts fit into memory.

    Where one runs out of memory, in the forward or in the backward pass, all of the step is taken back and made again,
    that micro-batch in 2, 4, 8 … parts, down to single images. What `add_gradient_in_parts` says of the gradient holds;
    a step that fits is untouched, bit for bit. The next step starts whole again, because the images differ; after
    `REDONE_STEPS_IN_A_ROW` steps that were made again, all later ones of this process start in parts. Nothing here
    talks to other processes: they go on, and wait where gradients are exchanged. Synchronised BatchNorm and a model
    cut into pieces do talk to them inside the passes; then nothing can be made again in one process alone, and the run
    ends with an error.

    Args:
        model: Its gradients are added up, and start at none.
        forward: Losses of a batch.
        accumulation_steps: Micro-batches of a step.
        can_redo: Whether a pass may be repeated in this process alone.
    """

    def __init__(
        self, model: nn.Module, forward: Forward[B], accumulation_steps: int, *, can_redo: bool = True
    ) -> None:
        self._model = model
        self._forward_of_model = forward
        self._accumulation_steps = accumulation_steps
        self._can_redo = can_redo
        self._first_parts = 1
        self._redone_in_a_row = 0
        self._running: B | None = None

    def add_gradients(
        self, step: int, start: StartingPoint, next_batch: Callable[[], B]
    ) -> tuple[list[MicroBatch[B]], list[Event]]:
        """The micro-batches of a step after their backward passes, and what is to be told of them.

        Args:
            step: Its number, for messages.
            start: The present state, to return to.
            next_batch: Called once for each micro-batch of the step.

        Raises:
            ConfigError: A single image does not fit.
        """
        batches: list[B] = []
        parts = [self._first_parts] * self._accumulation_steps
        while len(micro_batches := self._attempt(batches, parts, next_batch)) < self._accumulation_steps:
            # The exception is gone by now, and with it all that its traceback held.
            self._model.zero_grad(set_to_none=True)
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            failed = len(micro_batches)
            parts[failed] = self._smaller(step, batches[failed], parts[failed])
            start.go_back()
        return micro_batches, self._events(step, batches, parts)

    def _attempt(self, batches: list[B], parts: list[int], next_batch: Callable[[], B]) -> list[MicroBatch[B]]:
        """The micro-batches before the first that ran out of memory."""
        done: list[MicroBatch[B]] = []
        for index in range(self._accumulation_steps):
            if index == len(batches):
                batches.append(next_batch())
            try:
                done.append(self._micro_batch(batches[index], parts[index]))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                break
        return done

    def _micro_batch(self, batch: B, parts: int) -> MicroBatch[B]:
        state = random_state()
        if min(parts, len(batch.ids)) == 1:
            return MicroBatch(batch, state, add_gradient(self._forward, batch, self._accumulation_steps))
        go_back = StartingPoint.of(self._model).go_back
        losses = add_gradient_in_parts(self._forward, batch.split(parts), self._accumulation_steps, go_back)
        return MicroBatch(batch, state, losses)

    def _forward(self, batch: B) -> Mapping[str, LossTerm]:
        self._running = batch
        return self._forward_of_model(batch)

    def _smaller(self, step: int, batch: B, parts: int) -> int:
        assert self._running is not None
        images = len(batch.ids)
        if parts >= images:
            raise ConfigError(
                f"step {step}: out of memory with one image alone, {self._running.describe()}. Recompute activations "
                "in the backward pass (model.backbone.checkpoint_stages=[0,1,2,3]), or train on smaller images."
            )
        if not self._can_redo:
            raise ConfigError(
                f"step {step}: out of memory with {self._running.describe()}. BatchNorm that is synchronised between "
                "processes, or a model cut into pieces, rules out making the step again in smaller parts: lower "
                "optimizer.micro_batch_size, or recompute activations in the backward pass "
                "(model.backbone.checkpoint_stages=[0,1,2,3])."
            )
        return min(2 * parts, images)

    def _events(self, step: int, batches: list[B], parts: list[int]) -> list[Event]:
        redone = [(batch, count) for batch, count in zip(batches, parts, strict=True) if count > self._first_parts]
        texts = [
            f"out of memory with {batch.describe()}, {len(batch.ids)} at once; redone in {count} parts"
            for batch, count in redone
        ]
        self._redone_in_a_row = self._redone_in_a_row + 1 if redone else 0
        if self._redone_in_a_row == REDONE_STEPS_IN_A_ROW:
            self._redone_in_a_row = 0
            self._first_parts = max(parts)
            texts.append(f"from the next step on, batches are computed in {self._first_parts} parts from the start")
        return [Event(step, "out_of_memory", f"step {step}: {text}") for text in texts]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory: on a GPU it has an exception of its own, on the CPU only these words."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
