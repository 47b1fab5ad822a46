"""The exceptions of this library: one tree, importable without torch, picklable so that they cross worker processes.

A message names the file, the id and the field, what was wanted, what was got, and what to do. `exit_code` is what the
command line returns for each kind.
"""

import signal


class SwinDenseError(Exception):
    """Base of every error that a user can cause and mend."""

    exit_code = 2


class ConfigError(SwinDenseError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""

    exit_code = 2


class DataError(SwinDenseError):
    """A data set, or a file of it, cannot be used as it is."""

    exit_code = 3


class AnnotationError(DataError):
    """An annotation file or one of its entries is wrong."""


class ImageError(DataError):
    """An image or label picture cannot be read, or has the wrong size, mode or values."""


class CheckpointError(SwinDenseError):
    """A weights or checkpoint file is damaged, foreign, or does not fit the model."""

    exit_code = 4


class DivergenceError(SwinDenseError):
    """Training produced a value that is not finite."""

    exit_code = 5


class Interrupted(Exception):
    """A signal ended the training after its state was saved.

    Args:
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that this signal ended: 130 or 143."""
        return 128 + self.signal_number

    def __str__(self) -> str:
        name = signal.Signals(self.signal_number).name
        return f"stopped by {name} with the training state saved; the same command with --resume goes on from there."
