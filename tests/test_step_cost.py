import os
import sys
from dataclasses import replace

import pytest
import torch

from swin_dense.blocks import DropPath
from swin_dense.errors import ConfigError
from swin_dense.tools import step_cost as module
from swin_dense.tools.micro_batch_choice import Split
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.step_cost import StepJob, _Steps, make_steps, memory_bytes, peak_bytes, resident_bytes, step_cost
from swin_dense.tools.tasks import task_of

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def make_job(tiny_words):
    def make(*changes, split=Split(2, 3), steps=2, memory=10**12, task="semantic"):  # noqa: B008
        name, *overrides = tiny_words(task, *changes)
        recipe = read_recipe(name, overrides)
        data = task_of(recipe).training_data()
        return StepJob(recipe, len(data.label_map), data[0, 0], split, steps, CPU, memory)

    return make


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_steps_are_made_and_cost_something(task, make_job):
    made = []
    cost = make_steps(make_job(task=task), made.append)
    assert made == [1, 2, 3]
    assert cost is not None and cost.step_time_s > 0
    assert 2**26 < cost.peak_bytes < 2**36


def test_time_is_that_of_all_micro_batches(make_job, monkeypatch):
    monkeypatch.setattr(_Steps, "make", lambda steps: 0.5)
    for accumulation_steps, expected_s in ((1, 0.5), (2, 0.5), (6, 1.5)):
        cost = make_steps(make_job(split=Split(1, accumulation_steps)), lambda step: None)
        assert cost is not None and cost.step_time_s == pytest.approx(expected_s)


def test_first_step_does_not_count(make_job, monkeypatch):
    times_s = iter([9.0, 1.0, 4.0, 2.0])
    monkeypatch.setattr(_Steps, "make", lambda steps: next(times_s))
    cost = make_steps(make_job(steps=3, split=Split(1, 1)), lambda step: None)
    assert cost is not None and cost.step_time_s == 2.0


def test_slow_machines_measure_one_step_after_the_first(make_job, monkeypatch):
    monkeypatch.setattr(module, "ENOUGH_S", 0.0)
    made = []
    assert make_steps(make_job(steps=9), made.append) is not None
    assert made == [1, 2]


@pytest.mark.parametrize(("accumulation_steps", "computed"), [(1, 1), (2, 2), (7, 2)])
def test_weights_stay_while_gradients_and_state_are_there(accumulation_steps, computed, make_job):
    job = make_job("optimizer.average_decay=0.9", "optimizer.max_gradient_norm=1.0", split=Split(2, accumulation_steps))
    steps = _Steps(job)
    assert len(steps.batch.names) == 2 and steps.micro_batches == computed
    before = {name: value.detach().clone() for name, value in steps.model.named_parameters()}
    assert steps.make() > 0
    assert all(torch.equal(value, before[name]) for name, value in steps.model.named_parameters())
    assert steps.average is not None and steps.average.updates == 1
    assert set(steps.optimizer.state) == {value for value in steps.model.parameters() if value.grad is not None}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_no_error(error, make_job, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(module, "add_gradient", fail)
    assert make_steps(make_job(), lambda step: None) is None


def test_other_faults_are_not_taken_for_it(make_job, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(module, "add_gradient", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        make_steps(make_job(), lambda step: None)


@LINUX
def test_process_over_the_limit_is_ended(make_job):
    made = []
    assert step_cost(make_job(memory=2**20), made.append) is None
    assert made == []


@pytest.mark.slow
def test_another_process_measures_the_same_steps(make_job):
    made = []
    cost = step_cost(make_job(), made.append)
    assert made == [1, 2, 3] and cost is not None and cost.step_time_s > 0
    if sys.platform == "linux":
        block = bytearray(os.urandom(2**28))  # not of that process
        other = step_cost(make_job(), made.append)
        assert len(block) == 2**28 and other is not None
        assert abs(other.peak_bytes - cost.peak_bytes) < 2**27


@pytest.mark.slow
def test_errors_of_the_other_process_arrive(make_job):
    with pytest.raises(ConfigError, match=r"did you mean 'channels'\?"):
        step_cost(make_job("model.head.chanels=8"), lambda step: None)


class _Unreadable:
    def __reduce__(self):
        return os._exit, (7,)


@pytest.mark.slow
def test_process_that_ends_early_is_told_of(make_job):
    job = make_job()
    broken = replace(job, sample=_Unreadable())
    with pytest.raises(ConfigError, match="the process that measures a step ended with code 7"):
        step_cost(broken, lambda step: None)


@LINUX
def test_memory_is_counted_in_bytes():
    own = resident_bytes(os.getpid())
    assert 2**26 < own <= peak_bytes(CPU) < memory_bytes(CPU) + own + 2**34
    assert resident_bytes(2**30) == 0


@LINUX
def test_limit_of_a_container_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(module, "_CGROUP_LIMIT", limit)
    for text, expected in (("4096\n", 4096), ("max\n", None)):
        limit.write_text(text)
        assert memory_bytes(CPU) == expected or (expected is None and memory_bytes(CPU) > 2**20)


def test_system_that_does_not_tell_is_asked_for_a_limit(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"say how much to use, --memory-limit GB"):
        memory_bytes(CPU)
    assert resident_bytes(os.getpid()) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_no_more_than_the_limit(make_job):
    device = torch.device("cuda", 0)
    roomy = replace(make_job(), device=device, memory_bytes=memory_bytes(device))
    cost = step_cost(roomy, lambda step: None)
    assert cost is not None and 0 < cost.peak_bytes < roomy.memory_bytes
    assert step_cost(replace(roomy, memory_bytes=2**20), lambda step: None) is None


def test_stochastic_depth_drops_nothing_in_the_step_that_shows_the_memory(make_job, monkeypatch):
    rates = []
    monkeypatch.setattr(
        _Steps,
        "make",
        lambda steps: rates.append({part.rate for part in steps.model.modules() if isinstance(part, DropPath)}) or 0.1,
    )
    assert make_steps(make_job("model.backbone.drop_path_rate=0.3"), lambda step: None) is not None
    assert rates[0] == {0.0} and rates[1] == rates[2] and max(rates[1]) == pytest.approx(0.3)
