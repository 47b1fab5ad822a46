import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from swin_dense.errors import ConfigError
from swin_dense.training.distributed import (
    any_process,
    average_scalars,
    barrier,
    distributed,
    exchange_gradients,
    gather_objects,
    process_from_environment,
    process_rank,
    restarted,
    several_processes,
    share_rare,
    torchrun_call,
    unwrap,
    wrap,
)

TWO_PROCESSES = """
import json, os, sys
from pathlib import Path
import torch
from torch import nn
from swin_dense.errors import ConfigError
from swin_dense.training.checkpoint import capture_state, load_state, restore_state, save_state
import swin_dense.training.distributed as module
from swin_dense.training.distributed import (
    any_process, average_scalars, barrier, distributed, exchange_gradients, gather_objects, send_from_main,
    several_processes, share_rare, wrap)
from swin_dense.training.optimizer import build_optimizer
from swin_dense.training.schedule import poly_schedule

folder = Path(sys.argv[1])
with distributed("cpu", timeout_s=60) as process:
    torch.manual_seed(process.rank)
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    wrapped = wrap(model, process)
    try:
        wrap(model, process, synchronise_batch_norm=True)
    except ConfigError as error:
        refusal = str(error)
    facts = {
        "rank": process.rank, "world_size": process.world_size, "is_main": process.is_main,
        "gathered": gather_objects({"rank": process.rank}),
        "means": average_scalars({"b": float(process.rank), "a": 5.0}),
        "any": any_process([process.rank == 1, False]),
        "weights": model[0].weight.tolist(), "same_object": wrapped is model, "refusal": refusal,
        "several": several_processes(),
        "rare": [share_rare(None), share_rare("one" if process.rank == 1 else None), share_rare(process.rank)],
    }
    module.BUCKET_BYTES = 100  # several buckets
    torch.manual_seed(0)
    shapes = [(3, 5), (), (0, 2), (7,), (2, 3, 1, 1), (30,)]
    layers = nn.Module()
    for index, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64 if index % 2 else torch.float32))
        parameter.grad = (process.rank + 1) * torch.randn(shape).to(parameter.dtype)
        layers.register_parameter(f"weight_{index}", parameter)
    layers.weight_4.grad = layers.weight_4.grad.contiguous(memory_format=torch.channels_last)
    layers.register_parameter("frozen", nn.Parameter(torch.zeros(3), requires_grad=False))
    expected = [1.5 * p.grad / (process.rank + 1) for p in layers.parameters() if p.requires_grad]
    exchange_gradients(layers)
    got = [parameter.grad for parameter in layers.parameters() if parameter.requires_grad]
    facts["gradients"] = all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, expected, strict=True))
    sent = [torch.full((2,), process.rank + 0.5), torch.tensor(process.rank), torch.full((60,), process.rank + 0.5)]
    send_from_main(sent)
    facts["sent"] = [tensor.unique().tolist() for tensor in sent]
    layers.weight_3.grad = None
    try:
        exchange_gradients(layers)
    except ConfigError as error:
        facts["without"] = str(error)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.0)
    scheduler = poly_schedule(optimizer, total_steps=5, warmup_steps=0, warmup_start=1.0)
    torch.manual_seed(10 + process.rank)
    state = capture_state(wrapped, optimizer, scheduler, step=1)
    facts["has_state"] = state is not None
    drawn = torch.rand(3)
    if state is not None:
        save_state(folder, state)
    barrier()
    messages = restore_state(load_state(folder).state, wrapped, optimizer, scheduler, rank=process.rank)
    facts["random_state_is_its_own"] = torch.equal(torch.rand(3), drawn) and messages == ()
    (folder / f"{process.rank}.json").write_text(json.dumps(facts))
os.write(1, f"left {torch.distributed.is_initialized()}\\n".encode())  # in one piece: both write to one pipe
os._exit(0)  # Gloo's threads now and then abort the interpreter's teardown
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text(TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(folder)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["left", "False"] * 2
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_processes_know_their_place(two_processes):
    assert [facts["rank"] for facts in two_processes] == [0, 1]
    assert [facts["is_main"] for facts in two_processes] == [True, False]
    assert all(facts["world_size"] == 2 for facts in two_processes)


def test_gather_objects_brings_all_to_the_main_process(two_processes):
    assert [facts["gathered"] for facts in two_processes] == [[{"rank": 0}, {"rank": 1}], None]


def test_average_scalars_and_any_process_are_the_same_everywhere(two_processes):
    for facts in two_processes:
        assert facts["means"] == {"b": 0.5, "a": 5.0} and list(facts["means"]) == ["b", "a"]
        assert facts["any"] == [True, False]


def test_wrap_sends_the_weights_of_rank_0(two_processes):
    assert two_processes[0]["weights"] == two_processes[1]["weights"]
    assert all(facts["same_object"] and facts["several"] for facts in two_processes)


def test_exchanged_gradients_are_the_mean_whatever_their_shapes_and_types(two_processes):
    assert all(facts["gradients"] for facts in two_processes)


def test_parameter_without_gradient_is_named(two_processes):
    assert all("1 parameters have no gradient (first: weight_3): " in facts["without"] for facts in two_processes)


def test_what_rank_0_sends_arrives(two_processes):
    assert all(facts["sent"] == [[0.5], [0], [0.5]] for facts in two_processes)


def test_rare_news_reach_everybody(two_processes):
    assert all(facts["rare"] == [[], ["one"], [0, 1]] for facts in two_processes)


def test_wrap_refuses_synchronised_batch_norm_on_the_cpu(two_processes):
    assert all("needs CUDA devices" in facts["refusal"] for facts in two_processes)


def test_state_is_captured_once_and_holds_every_process(two_processes):
    assert [facts["has_state"] for facts in two_processes] == [True, False]
    assert all(facts["random_state_is_its_own"] for facts in two_processes)


def test_everything_works_in_a_single_process():
    with distributed("cpu") as process:
        assert (process.rank, process.world_size, process.is_main) == (0, 1, True)
        model = nn.BatchNorm1d(3)
        assert wrap(model, process, synchronise_batch_norm=True) is model
        barrier()
        assert gather_objects("a") == ["a"]
        assert average_scalars({"a": 1.5}) == {"a": 1.5}
        assert any_process([True, False]) == [True, False]
        assert (share_rare(None), share_rare("news"), several_processes(), process_rank()) == ([], ["news"], False, 0)
        exchange_gradients(model)  # nobody to exchange with: not even a gradient is wanted
        assert not torch.distributed.is_initialized()


def test_unwrap_takes_off_compilation():
    model = nn.Linear(1, 1)
    assert unwrap(torch.compile(model)) is model
    assert unwrap(model) is model


def test_process_from_environment_reads_torchrun(monkeypatch):
    values = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    process = process_from_environment("cpu")
    assert (process.rank, process.local_rank, process.world_size, process.is_main) == (5, 1, 8, False)
    monkeypatch.setenv("RANK", "five")
    with pytest.raises(ConfigError, match="RANK must be a number, got 'five'"):
        process_from_environment("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match=r"without LOCAL_RANK: start the processes with torchrun"):
        process_from_environment("cpu")


def test_torchrun_call_is_its_run_id_or_its_own_process(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_call() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert torchrun_call() == "job 7"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun says where --rdzv-id is not given
    assert torchrun_call() == f"{socket.gethostname()} {os.getppid()}"


def test_restarts_are_those_that_torchrun_counts(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not restarted()
    for count in (0, 1, 3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        assert restarted() == (count > 0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "x")
    with pytest.raises(ConfigError, match="TORCHELASTIC_RESTART_COUNT must be a number, got 'x'"):
        restarted()


def test_process_from_environment_refuses_devices_that_are_not_there():
    with pytest.raises(ConfigError, match=r"cuda:99 asked for, but this machine has \d+ CUDA devices"):
        process_from_environment("cuda:99")
    for name in ("gpu", "meta"):
        with pytest.raises(ConfigError, match=f"unknown device '{name}'"):
            process_from_environment(name)
