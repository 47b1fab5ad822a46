"""What `predict` and `evaluate` ask about large images on their command lines."""

from __future__ import annotations

import argparse


def add_tile_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--tile-size", type=int, metavar="PX", help="predict in overlapping tiles of this side")
    parser.add_argument("--tile-overlap", type=int, metavar="PX", help="by which tiles overlap at least; default: 128")
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="read pictures of up to N pixels; default: 89 million"
    )


def tile_overrides(arguments: argparse.Namespace) -> list[str]:
    """The changes to the recipe that the arguments ask for."""
    wanted = {"tile_size": arguments.tile_size, "tile_overlap": arguments.tile_overlap}
    return [f"inference.{name}={value}" for name, value in wanted.items() if value is not None]
