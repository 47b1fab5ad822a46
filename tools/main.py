"""The program `swin-dense`: finds the command, turns a user's mistake into one message and an exit code.

Nothing here imports torch, so that `--help` answers at once; a command imports what it needs when its work starts.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

from swin_dense.errors import Interrupted, SwinDenseError

COMMANDS = ("demo", "plan", "train", "evaluate", "predict", "features", "check", "weights", "convert", "benchmark")


class Command(Protocol):
    """What a command's module offers."""

    HELP: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work and return the exit code."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="swin-dense", description="Swin Transformers for detection and segmentation.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = _command(name)
        subparser = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            epilog=f"example:\n{command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        words: The command line without the program's name; None takes the process's.

    Returns:
        0 done, 1 the answer is "no", 2 wrong use or configuration, 3 data, 4 checkpoint, 5 diverged, 130 or 143 stopped
        by a signal and resumable.
    """
    arguments = parse(words)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would look for updates on the network
    try:
        code = _command(arguments.command).run(arguments)
        sys.stdout.flush()  # so that a reader who has gone is noticed here
        return code
    except SwinDenseError as error:
        if arguments.traceback:
            raise
        print(f"swin-dense {arguments.command}: {message_of(error)}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interruption:
        print(f"swin-dense {arguments.command}: {interruption}", file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that may not be written, a full disk
        if arguments.traceback:
            raise
        print(f"swin-dense {arguments.command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def message_of(error: SwinDenseError) -> str:
    """The error's own words; those from a loader's worker arrive wrapped in the worker's traceback."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.rpartition(f"{type(error).__name__}: ")[2].strip()


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; "key=value" may stand anywhere, also after options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; see swin-dense {arguments.command} --help")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _command(name: str) -> Command:
    return cast(Command, import_module(f"swin_dense.tools.{name}"))


def leave(code: int) -> NoReturn:
    """End the process; under torchrun without the interpreter's teardown, which Gloo's threads now and then abort."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
