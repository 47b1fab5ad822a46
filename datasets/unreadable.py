"""Pictures that cannot be read in the middle of a run: each is named and replaced by another; too many end the run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import Dataset

from swin_dense.datasets.batches import Key
from swin_dense.errors import DataError, ImageError

Sample = TypeVar("Sample")
Sample_co = TypeVar("Sample_co", covariant=True)
Batch = TypeVar("Batch")
_MAX_IN_A_ROW = 20


@dataclass(frozen=True)
class Unreadable:
    """A picture that was skipped.

    Attributes:
        index: of the picture in its data set.
        reason: the error's words, which name the file.
    """

    index: int
    reason: str


@dataclass(frozen=True)
class CheckedSample(Generic[Sample]):
    """A sample, and the pictures that were to be it but could not be read."""

    sample: Sample
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class CheckedBatch(Generic[Batch]):
    """A batch, and the pictures that are missing from it."""

    batch: Batch
    unreadable: tuple[Unreadable, ...]

    def pin_memory(self) -> "CheckedBatch[Batch]":
        """The batch in memory that a GPU copies from without waiting, where it can be."""
        pin = getattr(self.batch, "pin_memory", None)
        return self if pin is None else CheckedBatch(pin(), self.unreadable)


class Samples(Protocol[Sample_co]):
    """A training set, by keys of (epoch, index)."""

    def __len__(self) -> int:
        """How many pictures."""

    def __getitem__(self, key: Key, /) -> Sample_co:
        """The augmented picture; raises ImageError where it cannot be read."""


class SkippingUnreadable(Dataset[CheckedSample[Sample]]):
    """A training set in which the next picture that can be read stands in for one that cannot.

    Which one follows from the key alone, so that a resumed run sees the same samples.

    Args:
        samples: The training set.

    Raises:
        ImageError: On access, when too many pictures in a row cannot be read, as when a disk has gone.
    """

    def __init__(self, samples: Samples[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key) -> CheckedSample[Sample]:
        epoch, first = key
        unreadable: list[Unreadable] = []
        for step in range(min(_MAX_IN_A_ROW, len(self))):
            index = (first + step) % len(self)
            try:
                return CheckedSample(self._samples[epoch, index], tuple(unreadable))
            except ImageError as error:
                unreadable.append(Unreadable(index, str(error)))
        raise ImageError(f"{len(unreadable)} pictures in a row cannot be read; the first: {unreadable[0].reason}")


class CheckedCollate(Generic[Sample, Batch]):
    """Samples to a batch, beside the pictures that are missing from it.

    Args:
        collate: Makes a batch of samples.
    """

    def __init__(self, collate: Callable[[Sequence[Sample]], Batch]) -> None:
        self._collate = collate

    def __call__(self, samples: Sequence[CheckedSample[Sample]]) -> CheckedBatch[Batch]:
        """Make a batch."""
        unreadable = [picture for sample in samples for picture in sample.unreadable]
        return CheckedBatch(self._collate([sample.sample for sample in samples]), tuple(unreadable))


def count_unreadable(
    batches: Iterable[CheckedBatch[Any]], *, limit: int, on_unreadable: Callable[[Unreadable], None]
) -> Iterator[Any]:
    """The batches themselves, while few pictures are missing.

    Args:
        batches: From a loader over `SkippingUnreadable`.
        limit: The most different pictures that may be missing.
        on_unreadable: Gets each of them once, when it is first missed.

    Raises:
        DataError: One more is missing; names it.
    """
    seen: set[int] = set()
    for checked in batches:
        for picture in checked.unreadable:
            if picture.index in seen:
                continue
            seen.add(picture.index)
            on_unreadable(picture)
            if len(seen) > limit:
                raise DataError(
                    f"{len(seen)} pictures could not be read, more than run.max_unreadable_images={limit}; the last: "
                    f"{picture.reason} Look at the data with 'swin-dense check', or raise the limit."
                )
        yield checked.batch
