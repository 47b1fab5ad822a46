import json
import subprocess
import sys
from pathlib import Path

import pytest

from swin_dense.errors import CheckpointError, ConfigError, DataError, DivergenceError
from swin_dense.tools import train as train_command
from swin_dense.tools.main import COMMANDS, build_parser, main, parse

ROOT = Path(__file__).parents[1]


def subparsers():
    return next(action.choices for action in build_parser()._actions if action.dest == "command")


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_no_torch(words, run_python):
    code = (
        "import json, sys\nfrom swin_dense.tools.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = run_python("-c", code)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "torchvision", "numpy", "PIL", "albumentations", "pycocotools", "matplotlib", "rich"}


def test_program_and_module_show_the_same_help(run_python):
    done = run_python("-m", "swin_dense.tools.main", "train", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: swin-dense train")
    script = run_python("tools/train.py", "--help")
    assert script.stdout == done.stdout


def test_every_command_has_a_worked_example():
    assert set(subparsers()) == set(COMMANDS)
    for name, parser in subparsers().items():
        text = parser.format_help()
        _, example = text.split("\nexample:\n")
        assert f"  swin-dense {name} " in example
        assert "--traceback" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name, capsys):
    example = subparsers()[name].format_help().split("\nexample:\n")[1]
    lines = [line.split("(")[0].split() for line in example.splitlines() if line.startswith("  swin-dense")]
    assert lines
    for _, *words in lines:
        assert parse(words).command == name


def test_assignments_may_stand_after_options():
    arguments = parse(["train", "shapes_instance", "run.seed=1", "--out", "x", "data=y", "--resume", "run.workers=0"])
    assert arguments.overrides == ["run.seed=1", "data=y", "run.workers=0"]
    assert arguments.out == Path("x") and arguments.resume
    arguments = parse(["evaluate", "m.safetensors", "--json", "x.json", "data=y"])
    assert arguments.overrides == ["data=y"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "shapes_instance", "--outt", "x"], "unrecognized arguments: --outt"),
        (["train", "shapes_instance", "--ou", "x"], "unrecognized arguments: --ou"),
        (["train", "shapes_instance", "--out", "x", "word"], "unrecognized arguments: word"),
        (["predict", "m", "a.png", "--out", "x", "data=y"], "unrecognized arguments: data=y"),
        (["predict", "m", "a.png"], "--out"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_use_is_2_and_shows_what(words, shown, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (CheckpointError, 4), (DivergenceError, 5)],
)
def test_errors_become_one_line_and_their_code(error, code, monkeypatch, capsys):
    def fail(arguments):
        raise error("file x: wanted a, got b; do c.")

    monkeypatch.setattr(train_command, "run", fail)
    assert main(["train", "r"]) == code
    captured = capsys.readouterr()
    assert captured.err == "swin-dense train: file x: wanted a, got b; do c.\n" and captured.out == ""
    with pytest.raises(error):
        main(["train", "r", "--traceback"])


def test_traceback_is_shown_on_demand(run_python):
    quiet = run_python("tools/train.py", "shapes_instanse")
    loud = run_python("tools/train.py", "shapes_instanse", "--traceback")
    assert quiet.returncode == 2 and "Traceback" not in quiet.stderr and len(quiet.stderr.splitlines()) == 1
    assert "Traceback" in loud.stderr and "find_recipe" in loud.stderr


def test_interruption_is_130(monkeypatch):
    def fail(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "run", fail)
    assert main(["train", "r"]) == 130


def test_faults_of_the_system_become_one_line(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    words = ["train", "shapes_instance", f"data={tmp_path}", "--out", str(taken)]
    assert main(words) == 2
    assert capsys.readouterr().err == f"swin-dense train: {taken}: Not a directory\n"
    with pytest.raises(NotADirectoryError):
        main([*words, "--traceback"])


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(train_command, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", "r"])


def test_reader_that_has_gone_ends_quietly():
    command = [sys.executable, "-m", "swin_dense.tools.main", "train", "shapes_instance", "--print-config"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
