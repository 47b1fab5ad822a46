import pytest

from swin_dense.tools.benchmark import data_command, spread
from swin_dense.tools.main import main, parse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--annotations", "a.json"], "--annotations and --images go together"),
        (["--images", "a"], "--annotations and --images go together"),
        (["--memory", "--annotations", "a.json", "--images", "a"], "leave out --annotations"),
        (["--images-per-second", "nan"], "--images-per-second must be above 0, got nan"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--pictures", "-1"], "--pictures must be at least 1, got -1"),
        (["--memory", "--workers", "0", "8"], r"--workers must be at least 1 each, got [0, 8]"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, capsys):
    assert main(["benchmark", "data", *words]) == 2
    assert message in capsys.readouterr().err


def test_traceback_may_stand_on_either_side():
    assert parse(["benchmark", "--traceback", "data"]).traceback
    assert parse(["benchmark", "data", "--traceback"]).traceback
    assert not parse(["benchmark", "data"]).traceback


@pytest.mark.parametrize("part", ["backbone", "detect", "segment"])
def test_help_of_models_has_a_worked_example_that_parses(part, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(["benchmark", part, "--help"])
    assert leaving.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    examples = [
        line.strip().split("   ")[0].split() for line in lines[lines.index("example:") + 1 :] if "swin-d" in line
    ]
    assert len(examples) == 3 and all(words[:3] == ["swin-dense", "benchmark", part] for words in examples)
    assert all(parse(words[1:]).part == part for words in examples)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--repeats 7 --pictures 20 --peers torchvision"),
        (["--annotations", "/a/b.json", "--images", "/a/c", "--peers"], "--annotations FILE --images DIR --repeats 7 "),
        (["--memory", "--workers", "3", "5"], "--memory --workers 3 5"),
        (["--dense"], "--dense --peers torchvision"),
    ],
)
def test_data_command_is_told_without_paths(words, told):
    command = data_command(parse(["benchmark", "data", *words, "--document", "/a/b.md"]))
    assert command.startswith(f"swin-dense benchmark data {told}") and command.endswith(" --document FILE")
    assert "/a" not in command and parse(command.split()[1:]).part == "data"


def test_spread_is_median_and_range_of_all_values():
    assert spread([7.0, 1.0, 3.0]) == {"median": 3.0, "min": 1.0, "max": 7.0, "all": [7.0, 1.0, 3.0]}
