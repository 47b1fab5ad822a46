import pytest
import torch

from swin_dense.tools.machine import describe_machine, device_name, machine_line


def test_machine_names_date_device_and_versions():
    machine = describe_machine()
    assert {"date", "device", "python", "torch", "torchvision"} <= set(machine)
    assert all(isinstance(value, str) and value for value in machine.values())
    assert torch.__version__.startswith(machine["torch"])


@pytest.mark.parametrize(("names", "described"), [([], None), (["H", "L", "H"], "2 x H, 1 x L"), (["H"], "1 x H")])
def test_every_gpu_is_counted_by_its_name(names, described, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    assert describe_machine().get("gpu") == described


def test_kind_of_device_is_the_same_on_machines_of_a_kind(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert device_name("cuda:1") == "name of cuda:1"
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert device_name("cpu").endswith(", 3 cores") and describe_machine()["device"] == f"cpu ({device_name('cpu')})"
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert device_name("cpu").endswith(", 1 core")


def test_line_holds_every_name_and_value_in_order():
    machine = describe_machine()
    line = machine_line(machine)
    places = [line.index(f"{name} {value}") for name, value in machine.items()]
    assert places == sorted(places) and "\n" not in line


def test_command_line_loads_no_torch(run_python):
    code = "import sys; import swin_dense.tools.machine, swin_dense.tools.main as main; main.build_parser()"
    assert run_python("-c", f"{code}; print('torch' in sys.modules)").stdout.split() == ["False"]
