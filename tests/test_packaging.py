import ast
import configparser
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import swin_dense
from swin_dense import errors

ROOT = Path(__file__).parents[1]
LINKED = ("heads", "datasets", "tools")
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "tests")
EXCEPTIONS = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.SwinDenseError)
]


def modules():
    """(dotted name, file) of every module; the linked folders are walked once."""
    for file in sorted(ROOT.glob("*/**/*.py")):
        path = file.relative_to(ROOT)
        inside_link = path.parts[0] == "swin_dense" and path.parts[1] in LINKED
        if path.parts[0] not in (*LINKED, "swin_dense") or inside_link:
            continue
        parts = path.with_suffix("").parts
        dotted = parts if parts[0] == "swin_dense" else ("swin_dense", *parts)
        yield ".".join(dotted).removesuffix(".__init__"), file


MODULES = dict(modules())


def imports_of(name):
    """(module, line) of everything of swin_dense that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: relative import"
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def part(module):
    """ "core", "heads", "datasets" or "tools"; None for a module of others."""
    names = module.split(".")
    if names[0] != "swin_dense":
        return None
    return names[1] if len(names) > 1 and names[1] in LINKED else "core"


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_modules_are_found():
    assert {"swin_dense", "swin_dense.swin", "swin_dense.training.loop", "swin_dense.tools.main"} < set(MODULES)
    assert {part(name) for name in MODULES} == {"core", *LINKED}


def test_imports_are_absolute():
    for name in MODULES:
        for module, line in imports_of(name):
            assert module.split(".")[0] not in (*LINKED, "tests"), f"{name}, line {line}: import {module}"


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("core", {"heads", "datasets", "tools"}),
        ("heads", {"datasets", "tools"}),
        ("datasets", {"heads", "tools"}),
    ],
)
def test_parts_import_only_what_lies_below_them(importer, forbidden):
    found = [
        f"{name}, line {line}: {module}"
        for name in MODULES
        if part(name) == importer
        for module, line in imports_of(name)
        if part(module) in forbidden
    ]
    assert not found


def test_every_package_is_installed(settings):
    folders = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    assert set(settings["options"]["packages"].split()) == folders


def test_every_folder_with_modules_is_a_package():
    for name, file in MODULES.items():
        assert (file.parent / "__init__.py").is_file(), name


def test_every_mapped_folder_exists(settings):
    pairs = [line.split(" = ") for line in settings["options"]["package_dir"].strip().splitlines()]
    mapping = {name.strip(): folder.strip() for name, folder in pairs}
    assert mapping == {"swin_dense": "swin_dense", **{f"swin_dense.{folder}": folder for folder in LINKED}}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in mapping.values())


@pytest.mark.parametrize("folder", LINKED)
def test_links_lead_to_the_folders(folder):
    link = ROOT / "swin_dense" / folder
    assert link.is_symlink() and os.readlink(link) == f"../{folder}"
    assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", LINKED)
def test_links_are_links_in_git(folder):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "--stage", f"swin_dense/{folder}"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert listed and listed[0] == "120000"


def test_the_folder_datasets_refuses_its_bare_name(run_python):
    done = run_python("-c", "import datasets")
    assert done.returncode == 1
    assert "ImportError: this folder is the package swin_dense.datasets" in done.stderr


def test_tests_are_no_package():
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_every_bound_has_its_reason_above_it():
    lines = (ROOT / "setup.cfg").read_text().splitlines()
    bounds = [
        index for index, line in enumerate(lines) if re.match(r"    [A-Za-z][\w-]*(\[\w+\])?\s*(>=|==|<|~=)", line)
    ]
    assert len(bounds) > 10
    assert not [lines[index].strip() for index in bounds if not lines[index - 1].startswith("    #")]


@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: error.__name__)
def test_errors_cross_processes_and_stand_at_the_top(error):
    copy = pickle.loads(pickle.dumps(error("file x, id 3")))
    assert type(copy) is error and str(copy) == "file x, id 3"
    assert getattr(swin_dense, error.__name__) is error and error.__name__ in swin_dense.__all__
    assert issubclass(error, swin_dense.SwinDenseError)
    assert error.exit_code in (2, 3, 4, 5)


def test_interruption_crosses_processes_and_is_no_mistake():
    copy = pickle.loads(pickle.dumps(swin_dense.Interrupted(15)))
    assert (type(copy), copy.signal_number, copy.exit_code) == (errors.Interrupted, 15, 143)
    assert not issubclass(errors.Interrupted, errors.SwinDenseError)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that building leaves nothing in the checkout and takes nothing from an earlier build.
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "out")]
    done = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True, cwd=folder, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "out").iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def text_of(wheel, name):
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_wheel_has_one_name_at_the_top(wheel):
    assert text_of(wheel, "top_level.txt").split() == ["swin_dense"]
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"swin_dense"}


def test_wheel_holds_every_module_recipe_and_the_type_marker(wheel):
    expected = {"swin_dense/py.typed"}
    expected |= {f"swin_dense/tools/recipes/{path.name}" for path in (ROOT / "tools" / "recipes").iterdir()}
    for name, file in MODULES.items():
        stem = name.replace(".", "/")
        expected.add(f"{stem}/__init__.py" if file.name == "__init__.py" else f"{stem}.py")
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_wheel_has_the_program_and_the_version(wheel):
    assert "swin-dense = swin_dense.tools.main:main" in text_of(wheel, "entry_points.txt")
    assert f"Version: {swin_dense.__version__}\n" in text_of(wheel, "METADATA")


def test_module_run_as_a_script_is_the_installed_one(run_python):
    done = run_python("-c", "import swin_dense.tools.main as main; print(main.__name__, main.__file__)")
    name, file = done.stdout.split()
    assert name == "swin_dense.tools.main" and Path(file).resolve() == ROOT / "tools" / "main.py"
