from pathlib import Path

import pytest
import torch

from swin_dense.errors import ConfigError
from swin_dense.heads import mask_rcnn, upernet
from swin_dense.tools.classification_task import ClassificationTask
from swin_dense.tools.instance_task import InstanceTask
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.semantic_task import SemanticTask
from swin_dense.tools.tasks import task_of

NAMES = ("instance", "semantic")


def task(name, *overrides):
    return task_of(read_recipe(f"shapes_{name}", overrides))


def test_task_follows_the_recipe():
    assert type(task("instance")) is InstanceTask and type(task("semantic")) is SemanticTask
    assert type(task("instance", "task=semantic")) is SemanticTask
    assert type(task("instance", "task=classification")) is ClassificationTask


def test_backbone_config_is_the_variant_with_changes():
    config = task("instance", "model.variant=swin_s", "model.backbone={depths: [1, 2, 3, 4]}").backbone_config()
    assert (config.embed_dim, config.depths, config.num_heads) == (96, (1, 2, 3, 4), (3, 6, 12, 24))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.variant=swin_tt", "no Swin variant 'swin_tt'; did you mean 'swin_t'?"),
        ("model.backbone.depth=[1]", "SwinConfig: unknown key 'depth'; did you mean 'depths'?"),
        ("model.backbone.depths=3", "depths must be a list of whole numbers, got 3"),
        ("model.backbone.num_heads=[5,5,5,5]", "num_heads must be divisors"),
    ],
)
def test_wrong_backbone_is_explained(override, message):
    with pytest.raises(ConfigError) as caught:
        task("instance", override).backbone_config()
    assert message in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["backbone", "num_classes", "weights", "nonsense"])
def test_head_takes_only_what_is_the_recipes_to_set(name, key):
    with torch.device("meta"), pytest.raises(ConfigError, match=rf"unknown key 'model\.head\.{key}'; known are "):
        task(name, f"model.head.{key}=3").build_model(2)


def test_head_suggests_the_nearest_name():
    with torch.device("meta"), pytest.raises(ConfigError, match=r"did you mean 'fpn_channels'\?"):
        task("instance", "model.head.fpn_channel=8").build_model(2)


@pytest.mark.parametrize("name", NAMES)
def test_head_settings_reach_the_model(name):
    key = {"instance": "box_head_channels", "semantic": "channels"}[name]
    with torch.device("meta"):
        model = task(name, f"model.head.{key}=24").build_model(3)
    assert model.architecture[key] == 24 and model.architecture["num_classes"] == 3
    builder = {"instance": mask_rcnn, "semantic": upernet}[name]
    assert task(name).head_settings(builder) == task(name).recipe.model.head


def test_paths_start_from_the_data_folder():
    here = task("instance", "data=/some/where")
    assert here.data_root() == Path("/some/where")
    assert here.data_path(None) is None
    assert here.data_path("a/b") == Path("/some/where/a/b")
    assert here.data_path("/x/y") == Path("/x/y")
    assert task("instance").data_path("a/b") == Path("a/b")


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_folder_says_what_to_add(name):
    with pytest.raises(ConfigError, match=r"add data=/path/to/the/data/set to the command line"):
        task(name).training_data()
