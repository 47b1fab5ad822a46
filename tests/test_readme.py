import re
from pathlib import Path

import pytest

from swin_dense.config import VARIANTS
from swin_dense.tools.main import COMMANDS
from swin_dense.tools.recipe import recipe_names

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.splitlines()[1])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_readme_has_a_block_for_each_use():
    assert len(PYTHON_BLOCKS) == 5


def test_commands_and_recipes_named_exist():
    assert set(re.findall(r"swin-dense (\w+)", README)) == set(COMMANDS)
    named = set(re.findall(r"\b((?:cascade_mask_rcnn|mask_rcnn|upernet)_swin_\w+)(?![\w.])", README))
    assert named and named <= set(recipe_names())


def test_variants_named_are_all_there_is():
    named = set(re.findall(r"`(swin_[tsbl](?:_w12_384)?)`", README))
    assert named <= set(VARIANTS)
    assert {name for name, config in VARIANTS.items() if config.version == 1 and "w12" not in name} <= named
