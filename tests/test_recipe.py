import dataclasses

import pytest
import yaml

from swin_dense.errors import ConfigError, DataError
from swin_dense.tools.main import main
from swin_dense.tools.recipe import (
    OptimizerSettings,
    Recipe,
    RunSettings,
    ScheduleSettings,
    changed_values,
    find_recipe,
    read_recipe,
    recipe_from,
    recipe_names,
)


@pytest.fixture
def recipe():
    overrides = [
        "data=/some/where",
        "dataset.classes=[wall, 'it''s, odd: [name]', étage]",
        "dataset.ignored_values=[0, 7]",
        "optimizer.learning_rate=6e-5",
        "schedule.warmup_start=1.0e-6",
        "model.backbone.window_size=[7,7,12,12]",
        "model.head.image_mean=[0.5,0.5,0.5]",
    ]
    return read_recipe("shapes_semantic", overrides)


def test_yaml_reads_back_to_the_same_recipe(recipe, tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml())
    assert read_recipe(str(path)) == recipe


def test_dict_reads_back_to_the_same_recipe_and_stays_as_it_is(recipe):
    values = recipe.to_dict()
    before = recipe.to_dict()
    assert recipe_from(values, (), "x") == recipe
    assert recipe_from(values, ["run.seed=5", "model.head.channels=3"], "x").run.seed == 5
    assert values == before


def test_overrides_change_nothing_else(recipe):
    changed = recipe_from(recipe.to_dict(), ["run.seed=5"], "x")
    assert dataclasses.replace(changed, run=dataclasses.replace(changed.run, seed=0)) == recipe


def test_later_overrides_win():
    assert read_recipe("shapes_instance", ["run.seed=5", "run.seed=6"]).run.seed == 6


@pytest.mark.parametrize(("epochs", "steps"), [(None, None), (1, 1)])
def test_either_epochs_or_steps(epochs, steps):
    with pytest.raises(ConfigError, match=r"either schedule\.epochs or schedule\.steps"):
        Recipe(task="instance", schedule=ScheduleSettings(epochs=epochs, steps=steps))


@pytest.mark.parametrize("name", ["workers", "pictures", "max_skipped_steps"])
def test_counts_are_not_negative(name):
    with pytest.raises(ConfigError, match=rf"run\.{name} must be 0 or more, got -1"):
        Recipe(task="instance", schedule=ScheduleSettings(steps=1), run=RunSettings(**{name: -1}))


@pytest.mark.parametrize(("batch_size", "rate"), [(16, 6e-5), (4, 1.5e-5), (24, 9e-5)])
def test_learning_rate_follows_the_batch(batch_size, rate):
    recipe = read_recipe("upernet_swin_t_160k", [f"optimizer.batch_size={batch_size}"])
    assert recipe.optimizer.scaled_learning_rate() == pytest.approx(rate)
    fixed = read_recipe("shapes_instance", [f"optimizer.batch_size={batch_size}"])
    assert fixed.optimizer.scaled_learning_rate() == fixed.optimizer.learning_rate


@pytest.mark.parametrize(("rate", "batch_size"), [(1e-4, 16), (6e-5, 48), (0.1 + 0.2, 49)])
def test_learning_rate_of_the_reference_batch_is_exact(rate, batch_size):
    settings = OptimizerSettings(learning_rate=rate, batch_size=batch_size, reference_batch_size=batch_size)
    assert settings.scaled_learning_rate() == rate


def test_reference_batch_size_is_at_least_1():
    with pytest.raises(ConfigError, match=r"optimizer\.reference_batch_size must be 1 or more, or null, got 0"):
        read_recipe("shapes_instance", ["optimizer.reference_batch_size=0"])


@pytest.mark.parametrize(
    "name", ["schedule.steps", "schedule.epochs", "optimizer.batch_size", "optimizer.micro_batch_size"]
)
@pytest.mark.parametrize("count", [0, -5])
def test_counts_are_at_least_1(name, count):
    nulls = ["schedule.steps=null", "schedule.epochs=null"] if name.startswith("schedule") else []
    with pytest.raises(ConfigError, match=rf"{name} must be 1 or more, got {count}"):
        read_recipe("shapes_instance", [*nulls, f"{name}={count}"])


def test_what_the_command_line_gives_is_not_blamed_on_the_file():
    with pytest.raises(ConfigError, match=r"^command line: optimizer\.batch_size must be a whole number"):
        read_recipe("shapes_instance", ["optimizer.batch_size=two"])


def test_folder_without_its_key_is_recognized(tmp_path):
    with pytest.raises(ConfigError, match="did you mean data="):
        read_recipe("shapes_instance", [str(tmp_path)])


def test_names_stay_readable(recipe):
    assert "étage" in recipe.to_yaml()


def test_copy_paste_needs_images_of_one_size():
    assert read_recipe("mask_rcnn_swin_t_lsj", ["augmentation.copy_paste_probability=1"])
    with pytest.raises(ConfigError, match=r"give augmentation\.jitter_size too, for example 1024"):
        read_recipe("mask_rcnn_swin_t_1x", ["augmentation.copy_paste_probability=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", "unknown key 'epochs'; did you mean 'schedule.epochs'?"),
        ("lr=3", "unknown key 'lr'; known are "),
        ("optimizer.learning_rat=3", "did you mean 'optimizer.learning_rate'?"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number, got 'fast'"),
        ("optimizer.batch_size=2.5", "optimizer.batch_size must be a whole number, got 2.5"),
        ("optimizer.precision=float16", "must be one of auto, float32, bfloat16, got 'float16'"),
        ("task=panoptic", "task must be one of instance, semantic, classification, got 'panoptic'"),
        ("inference.tile_size=big", "inference.tile_size must be a whole number or null, got 'big'"),
        ("data=2017", "data must be text or null, got 2017"),
        ("augmentation.crop_size_hw=[1,2,3]", "must be a list of 2 values, got [1, 2, 3]"),
        ("model.detector=retinanet", "model.detector must be one of mask_rcnn, cascade_mask_rcnn, got 'retinanet'"),
        ("model.head=[1]", "model.head must be keys and values, got [1]"),
    ],
)
def test_wrong_overrides_are_explained(override, message):
    with pytest.raises(ConfigError) as caught:
        read_recipe("shapes_instance", [override])
    assert message in str(caught.value)


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"there is no recipe 'shapes_instanse'; did you mean 'shapes_instance'\?"):
        find_recipe("shapes_instanse")
    with pytest.raises(ConfigError, match=r"no recipe 'zzz'; known are .*classifier_cifar10, "):
        find_recipe("zzz")


def test_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no recipe file .*mine\.yaml"):
        read_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: [instance", "not a YAML file"),
        (b"\xff\xfe\x00", "not a YAML file"),
        (b"- a\n- b\n", "a recipe holds keys and values, got list"),
        (b"", "a recipe holds keys and values, got NoneType"),
        (b"schedule: {steps: 1}\n", "task"),
        (b"task: instance\nmodel: swin_t\nschedule: {steps: 1}\n", "model must hold keys and values, got 'swin_t'"),
        (b"task: instance\nshedule: {steps: 1}\n", "unknown key 'shedule'; did you mean 'schedule'?"),
        (b"!!python/object/apply:os.getcwd []", "not a YAML file"),
    ],
)
def test_wrong_files_are_explained(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_recipe(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_print_config_prints_what_reads_back(tmp_path, capsys):
    words = ["optimizer.learning_rate=3e-4", "data=/not/there", "schedule.epochs=7", "schedule.steps=null"]
    assert main(["train", "upernet_swin_t_160k", *words, "--print-config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert read_recipe(str(path)) == read_recipe("upernet_swin_t_160k", words)
    assert yaml.safe_load(path.read_text())["schedule"]["epochs"] == 7


def test_names_are_those_of_the_folder():
    assert {"shapes_instance", "shapes_semantic"} < set(recipe_names())
    assert all(find_recipe(name).is_file() for name in recipe_names())


def test_data_folder_becomes_absolute_and_must_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    recipe = read_recipe("mask_rcnn_swin_t_1x", ["data=coco"])
    assert recipe.with_absolute_data().data == str(tmp_path / "coco")
    assert recipe_from({"task": "semantic", "schedule": {"steps": 1}}, [], "x").with_absolute_data().data is None
    with pytest.raises(DataError, match="data=cocoa: there is no such folder; pass the folder of the data set"):
        read_recipe("mask_rcnn_swin_t_1x", ["data=cocoa"]).with_absolute_data()


def test_changed_values_are_named_with_both():
    before = read_recipe("shapes_semantic", ["data=a"]).to_dict()
    assert changed_values(before, read_recipe("shapes_semantic", ["data=a"])) == []
    after = read_recipe("shapes_semantic", ["data=b", "optimizer.batch_size=4", "model.head.channels=32"])
    assert changed_values(before, after) == [
        "data is 'b', no longer 'a'",
        "model.head.channels is 32, no longer 64",
        "optimizer.batch_size is 4, no longer 8",
    ]
    del before["run"]["pictures"]  # a key that the version before did not have
    assert "run.pictures is 12, no longer None" in changed_values(before, after)
