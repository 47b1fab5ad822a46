import sys
from types import SimpleNamespace

import pytest
import torch

from swin_dense.errors import ConfigError
from swin_dense.kernel_import import import_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "some_kernels", module)
    return module


def test_kernels_run_on_gpus_and_where_they_are_interpreted(kernels):
    assert import_kernels("some_kernels", "some", GPU) is kernels
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    kernels.some_kernel = interpreter.InterpretedFunction(lambda: None)
    assert import_kernels("some_kernels", "some", CPU) is kernels


def test_a_cpu_without_the_interpreter_is_an_error(kernels):
    with pytest.raises(ConfigError, match=r"^some runs on CUDA devices, got tensors on cpu\. For trials on a CPU set"):
        import_kernels("some_kernels", "some", CPU)


def test_missing_triton_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "some_kernels", None)
    with pytest.raises(ConfigError, match=r"^some needs Triton, which cannot be imported: "):
        import_kernels("some_kernels", "some", GPU)
