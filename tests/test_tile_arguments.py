import argparse

import pytest

from swin_dense.tools.recipe import recipe_from
from swin_dense.tools.tile_arguments import add_tile_arguments, tile_overrides


def parse(*words):
    parser = argparse.ArgumentParser()
    add_tile_arguments(parser)
    return parser.parse_args(words)


def test_nothing_asked_changes_nothing():
    assert tile_overrides(parse()) == [] and parse().max_pixels is None


@pytest.mark.parametrize(
    ("words", "wanted"),
    [(["--tile-size", "512"], (512, 128)), (["--tile-size", "512", "--tile-overlap", "64"], (512, 64))],
)
def test_arguments_become_the_recipes_settings(words, wanted):
    values = {"task": "semantic", "schedule": {"steps": 1}}
    settings = recipe_from(values, tile_overrides(parse(*words)), "x").inference
    assert (settings.tile_size, settings.tile_overlap) == wanted
