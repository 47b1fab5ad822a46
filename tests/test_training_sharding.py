import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from swin_dense.training.checkpoint import read_state
from swin_dense.training.sharding import is_sharded, own, piece, pieces, whole, whole_state

RUNS = """
import os, sys
from pathlib import Path
import torch
from swin_dense.config import SwinConfig
from swin_dense.heads import upernet
from swin_dense.training.checkpoint import capture_state, load_state, restore_state, save_state
from swin_dense.training.distributed import barrier, distributed, wrap
from swin_dense.training.loop import LoopSettings, train
from swin_dense.training.optimizer import build_optimizer
from swin_dense.training.schedule import poly_schedule
from swin_dense.training.sharding import is_sharded, shard
from swin_dense.training.weight_average import WeightAverage

SHAPE = dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.2)
STEPS, ACCUMULATION = 4, 2

class Batch:
    ids = [0, 1]

    def describe(self):
        return "images 0 and 1"

    def split(self, parts):
        return [self]

    def plain(self):
        return {"images": self.images}

    def __init__(self, generator):
        self.images = torch.rand(2, 3, 41, 37, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 3, (2, 41, 37), generator=generator)

def run(folder, process, sharded, start, stop):
    torch.manual_seed(0)
    model = wrap(upernet(SwinConfig(**SHAPE), 3, channels=8, auxiliary_channels=6).double(), process)
    if sharded:
        assert is_sharded(shard(model, process))
    optimizer = build_optimizer(model, learning_rate=1e-2, weight_decay=0.05)
    scheduler = poly_schedule(optimizer, total_steps=STEPS, warmup_steps=1, warmup_start=0.1)
    average = WeightAverage(model, 0.7)
    torch.manual_seed(9 + process.rank)
    parts = (model, optimizer, scheduler)
    if start:
        assert restore_state(load_state(folder).state, *parts, rank=process.rank, average=average) == ()

    def save(step):
        state = capture_state(*parts, step=step, average=average)
        if state is not None:
            save_state(folder, state)

    generator = torch.Generator().manual_seed(process.rank)
    batches = [Batch(generator) for _ in range(STEPS * ACCUMULATION)]
    if process.rank == 1:
        batches[2 * ACCUMULATION].images[0, 0, 0, 0] = float("nan")  # the third step is skipped, by all
    batches = batches[start * ACCUMULATION :]
    settings = LoopSettings(
        total_steps=stop, accumulation_steps=ACCUMULATION, max_gradient_norm=0.1,
        log_every_steps=1, checkpoint_every_steps=2, evaluate_every_steps=100)
    train(
        model, batches, lambda model, batch: model.loss_terms(batch.images, batch.labels), optimizer, scheduler,
        settings,
        device=process.device, start_step=start, on_log=print, on_checkpoint=save, on_evaluate=lambda step: None,
        after_update=average.update)
    barrier()

folder = Path(sys.argv[1])
torch.set_num_threads(1)
with distributed("cpu", timeout_s=60) as process:
    for name, first, second in (("plain", 0, 0), ("shards", 1, 1), ("cut", 0, 1), ("joined", 1, 0)):
        run(folder / name, process, first, 0, 2)
        run(folder / name, process, second, 2, STEPS)
os._exit(0)  # Gloo's threads now and then abort the interpreter's teardown
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    script = folder / "script.py"
    script.write_text(RUNS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def assert_close(first, second, where=""):
    """The same types, names and shapes in the same order; floating values within 1e-12."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, where
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12 if first.is_floating_point() else 0)
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for name in first:
            assert_close(first[name], second[name], f"{where}/{name}")
    elif isinstance(first, list | tuple):
        for pair in zip(first, second, strict=True):
            assert_close(*pair, where)
    else:
        assert first == second, where


@pytest.mark.parametrize("name", ["shards", "cut", "joined"])
def test_pieces_train_as_the_whole_and_either_goes_on_from_the_state_of_the_other(name, runs):
    state, plain = (read_state(runs / folder / "last.pt") for folder in (name, "plain"))
    assert_close(vars(state), vars(plain))
    assert plain.average["updates"] == 3  # one of four steps was skipped


def test_whole_tensors_pass_as_they_are():
    tensor = torch.rand(3, 5)
    state = {"a": [tensor, 1], "b": None}
    for keep in (True, False):
        assert whole_state(state, keep=keep)["a"][0] is tensor and whole_state(state, keep=keep) == state
    assert whole(tensor) is own(tensor) is piece(tensor, tensor) is pieces({"a": tensor}, {})["a"] is tensor
    assert not is_sharded(nn.Linear(1, 1))
