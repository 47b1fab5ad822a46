import sys
from types import ModuleType

import pytest

from swin_dense.errors import ConfigError
from swin_dense.tools.tensorboard_log import TensorboardLog


class Writer:
    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.flushed = folder, purge_step, [], 0

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        self.flushed = len(self.scalars)


@pytest.fixture
def tensorboard(monkeypatch):
    made = []

    def make(folder, purge_step=None):
        made.append(Writer(folder, purge_step))
        return made[-1]

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = make
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def test_numbers_are_written_by_step_and_undefined_ones_left_out(tensorboard, tmp_path):
    log = TensorboardLog(tmp_path, 0)
    log.append(3, {"loss": 2.0, "val_mask_AP": None, "loss_mask": 0.5})
    (writer,) = tensorboard
    assert writer.scalars == [("loss", 2.0, 3), ("loss/mask", 0.5, 3)] and writer.flushed == 2
    assert writer.folder == str(tmp_path) and writer.purge_step is None


def test_a_run_that_goes_on_hides_the_steps_that_it_makes_again(tensorboard, tmp_path):
    TensorboardLog(tmp_path, 7)
    assert tensorboard[0].purge_step == 8


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'swin-dense\[tensorboard\]'"):
        TensorboardLog(tmp_path, 0)
