"""What a benchmark of models compares: contestants, each a model of one library, in rows, each one kind of work.

All contestants of a row have the same weights and get the same batch. Nothing is drawn in training but what a detector
samples: no path and no channel is dropped, so that all make the same computation. The learning rate is 0, so that
weights stay what they are.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from swin_dense.config import SwinConfig
from swin_dense.tools.benchmark_agreement import Outputs
from swin_dense.training.loss_terms import total
from swin_dense.training.optimizer import POSITION_PARAMETERS, build_optimizer
from swin_dense.windows import SizeHW

OURS = "swin-dense"
COMPILED = ", compiled"
"""What follows the name of a compiled contestant."""

_WEIGHT_DECAY = 0.05

Mode = Literal["inference", "forward and backward", "train step"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
        mode: "forward and backward" ends with gradients, "train step" with AdamW's update.
        precision: "bfloat16" is autocast; weights and optimiser stay float32.
        batch_size: Images.
        size_hw: (height, width) of each in pixels.
        cast_once: Weights and images are brought to the precision beforehand, instead of by autocast.
    """

    mode: Mode
    precision: Precision
    batch_size: int
    size_hw: SizeHW
    cast_once: bool = False

    @property
    def title(self) -> str:
        """The row in words."""
        images = "1 image" if self.batch_size == 1 else f"{self.batch_size} images"
        precision = f"{self.precision} weights" if self.cast_once else self.precision
        return f"{self.mode}, {precision}, {images} of {self.size_hw[0]} x {self.size_hw[1]}"

    @property
    def pixels(self) -> int:
        """Of the batch."""
        return self.batch_size * self.size_hw[0] * self.size_hw[1]

    @property
    def trains(self) -> bool:
        """Whether gradients are computed."""
        return self.mode != "inference"


class Batch(ABC):
    """What all contestants of a row get."""

    @abstractmethod
    def first(self) -> Self:
        """The first image alone."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same on a device."""

    @abstractmethod
    def cast(self, dtype: torch.dtype) -> Self:
        """The same with images of a dtype."""


B = TypeVar("B", bound=Batch)


class Contestant(ABC, Generic[B]):
    """A model of one library.

    Args:
        name: Whose it is.
        model: The model.
    """

    results_tolerance: ClassVar[float] = 1e-3  # the relative difference of `results` that is allowed

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model: Any = model  # each subclass calls its own library's

    @abstractmethod
    def losses(self, batch: B) -> Mapping[str, Tensor]:
        """What training minimises, to be summed; the model is in training mode."""

    @abstractmethod
    def predictions(self, batch: B) -> object:
        """What its users get; the model is in evaluation mode."""

    @abstractmethod
    def maps(self, batch: B) -> Outputs:
        """What is compared with other contestants in the precision of the row, by name; in evaluation mode."""

    @abstractmethod
    def results(self, batch: B, training: bool) -> Outputs:
        """What follows from the maps and is compared in float32 alone: in bfloat16, other boxes may be chosen.

        Args:
            batch: The batch.
            training: Whether what training computes, or what prediction does; the model is in evaluation mode.
        """

    @abstractmethod
    def outputs(self, batch: B) -> Outputs:
        """What a compiled contestant is compared by with what it was made of, in the mode and precision of the row."""

    def cast(self, dtype: torch.dtype) -> Self:
        """A contestant with a copy of the model in a dtype."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).to(dtype)
        return twin

    def compile(self) -> None:
        """Let the model be compiled when it is first called, as its users would do it: here by torch, as a whole."""
        self.model.compile()

    def compiled(self) -> Self:
        """A contestant with a compiled copy of the model."""
        twin = copy.copy(self)
        twin.name, twin.model = self.name + COMPILED, copy.deepcopy(self.model)
        twin.compile()
        return twin


@dataclass(frozen=True)
class Contest(ABC, Generic[B]):
    """Contestants of one kind.

    Attributes:
        config: The backbone; `plain` makes it.
        head: What else ours is built with.
    """

    config: SwinConfig
    head: Mapping[str, Any]

    title: ClassVar[str]
    peers: ClassVar[tuple[str, ...]]
    default_rows: ClassVar[Mapping[str, tuple[Row, ...]]]  # by the type of device
    remarks: ClassVar[tuple[str, ...]]  # what is computed
    peer_remarks: ClassVar[tuple[str, ...]]  # how the peers differ
    least_training_batch: ClassVar[int] = 1  # images that all peers can train on

    @abstractmethod
    def batch(self, row: Row) -> B:
        """A row's batch; the same every time."""

    @abstractmethod
    def own(self, row: Row) -> Contestant[B]:
        """Ours, with random weights; the same every time."""

    @abstractmethod
    def peer(self, name: str, own: Contestant[B], row: Row) -> Contestant[B]:
        """One of `peers`, with the weights of ours.

        Raises:
            ConfigError: It has no such network.
        """

    @abstractmethod
    def references(self, name: str, own: Contestant[B]) -> Mapping[str, Callable[[], Contestant[B]]]:
        """What of ours the peer is compared with: in turn, until one is equal; each is built when it is its turn."""


class Inference(Generic[B]):
    """Predictions of a batch, to be called.

    Args:
        contestant: Whose; its model is in evaluation mode from here on.
        batch: On the same device.
        row: Says the precision.
    """

    def __init__(self, contestant: Contestant[B], batch: B, row: Row) -> None:
        self._contestant, self._batch, self._row = contestant, batch, row
        contestant.model.eval()
        self._device_type = device_type(contestant.model)

    @torch.inference_mode()
    def __call__(self) -> object:
        """Predict."""
        return self.forward()

    @torch.no_grad()
    def forward(self) -> object:
        """The same in a mode in which operations can be counted."""
        with autocast(self._device_type, self._row):
            return self._contestant.predictions(self._batch)

    def held_bytes(self) -> int:
        """What is held between calls."""
        return _bytes_of(self._contestant.model)


class Training(Generic[B]):
    """Gradients of a batch, and an update where the row has one, to be called.

    Args:
        contestant: Whose; its model is in training mode from here on.
        batch: On the same device.
        row: Says the mode and the precision.
    """

    def __init__(self, contestant: Contestant[B], batch: B, row: Row) -> None:
        self._contestant, self._batch, self._row = contestant, batch, row
        self._model: nn.Module = contestant.model.train()
        self._device_type = device_type(self._model)
        self._optimizer: AdamW | None = None
        if row.mode == "train step":
            self._optimizer = build_optimizer(self._model, learning_rate=0.0, weight_decay=_WEIGHT_DECAY)

    def __call__(self) -> None:
        """Make a step; no gradient stays."""
        total(self._losses()).backward()
        if self._optimizer is not None:
            self._optimizer.step()
        self._model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(self) -> object:
        """The part before gradients, alone."""
        return self._losses()

    def _losses(self) -> Mapping[str, Tensor]:
        with autocast(self._device_type, self._row):
            return self._contestant.losses(self._batch)

    def held_bytes(self) -> int:
        """What is held between calls, the optimiser's state included."""
        states = () if self._optimizer is None else self._optimizer.state.values()
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return _bytes_of(self._model) + sum(moment.nbytes for moment in moments)


def work_of(contestant: Contestant[B], batch: B, row: Row) -> Inference[B] | Training[B]:
    """What a row times."""
    return Training(contestant, batch, row) if row.trains else Inference(contestant, batch, row)


def autocast(device_type: str, row: Row) -> torch.autocast:
    """The context of a row's precision."""
    return torch.autocast(device_type, torch.bfloat16, enabled=row.precision == "bfloat16" and not row.cast_once)


def device_type(model: nn.Module) -> str:
    """Where a model is."""
    return next(model.parameters()).device.type


def _bytes_of(model: nn.Module) -> int:
    return sum(value.nbytes for value in (*model.parameters(), *model.buffers()))


def plain(config: SwinConfig) -> SwinConfig:
    """A configuration in which no path is dropped."""
    return dataclasses.replace(config, drop_path_rate=0.0)


def spread_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Move weights away from where they start, in place, so that a mistake with any of them shows in the outputs.

    Norms and biases start at 1 and 0, and position biases so small that windows hardly matter.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(POSITION_PARAMETERS):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
