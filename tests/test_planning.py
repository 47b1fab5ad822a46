import time
from types import SimpleNamespace

import pytest
import torch

from swin_dense.errors import ConfigError
from swin_dense.tools import planning as module
from swin_dense.tools.micro_batch_choice import Split
from swin_dense.tools.planning import (
    USABLE_SHARE,
    Planning,
    as_settings,
    describe,
    figures,
    loading_time_s,
    waiting_s,
    with_stages,
)
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.step_cost import StepCost

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def plan(tiny_words, monkeypatch):
    """Plans with so much memory: an image takes 1 GB, a stage that recomputes saves a fifth and costs a tenth."""

    def make(memory_gb, *changes, task="semantic", world_size=1):
        jobs = []

        def fake_cost(job, on_step):
            jobs.append(job)
            on_step(job.steps + 1)
            stages = len(job.recipe.model.backbone.get("checkpoint_stages", ()))
            assert stages == len(job.split.checkpoint_stages)
            peak_bytes = int(job.split.micro_batch_size * 10**9 * (1 - 0.2 * stages))
            images = job.split.micro_batch_size * job.split.accumulation_steps
            fits = peak_bytes <= job.memory_bytes
            return StepCost(peak_bytes, 0.1 * images * (1 + 0.1 * stages)) if fits else None

        monkeypatch.setattr(module, "step_cost", fake_cost)
        name, *overrides = tiny_words(task, "optimizer.batch_size=8", *changes)
        return Planning.of(read_recipe(name, overrides), CPU, world_size, memory_gb, 3), jobs

    return make


@pytest.mark.parametrize(("memory_gb", "size"), [(100, 8), (8, 4), (5, 2), (2, 1)])
def test_largest_micro_batch_that_fits_is_recommended(memory_gb, size, plan):
    planning, jobs = plan(memory_gb)
    found = figures(planning)
    assert found["recommended"] == {"optimizer.micro_batch_size": size}
    assert found["peak_memory_gb"] == size <= USABLE_SHARE["cpu"] * memory_gb
    assert found["step_time_s"] == pytest.approx(0.8)
    assert found["run_time_s"] == pytest.approx(4 * (0.8 + found["loading_time_s"]))
    assert all(job.split.micro_batch_size * job.split.accumulation_steps == 8 for job in jobs)
    assert [each["fits"] for each in found["candidates"]] == [False] * (len(found["candidates"]) - 1) + [True]
    assert found["worst_batch"] == {"size_hw": (64, 64), "objects": None, "images": size}
    assert [each["checkpoint_stages"] for each in found["checkpointing"]] == [[0, 1, 2, 3], [0, 1]]
    assert all(each["micro_batch_size"] == size for each in found["checkpointing"])


def test_recomputing_is_recommended_where_nothing_else_fits(plan):
    found = figures(plan(0.9)[0])
    assert not any(each["fits"] for each in found["candidates"])
    assert found["recommended"] == {"optimizer.micro_batch_size": 1, "model.backbone.checkpoint_stages": [0, 1]}


def test_nothing_is_recommended_where_nothing_fits(plan):
    found = figures(plan(0.1)[0])
    assert [each["micro_batch_size"] for each in found["candidates"]] == [8, 4, 2, 1]
    assert all(found[name] is None for name in ("recommended", "peak_memory_gb", "step_time_s", "run_time_s"))


def test_processes_share_the_batch(plan):
    planning, jobs = plan(100, world_size=4)
    found = figures(planning)
    assert jobs[0].split == Split(2, 1) and found["recommended"] == {"optimizer.micro_batch_size": 2}
    assert "4 x cpu" in "\n".join(describe(planning))
    with pytest.raises(ConfigError, match=r"optimizer\.batch_size=8 must be a multiple of 3 processes"):
        plan(100, world_size=3)


def test_processes_on_the_cpu_share_its_memory(plan, monkeypatch):
    monkeypatch.setattr(module, "memory_bytes", lambda device: 12 * 10**9)
    assert plan(None)[0].memory_bytes == 12 * 10**9
    assert plan(None, world_size=4)[0].memory_bytes == 3 * 10**9
    assert plan(5, world_size=4)[0].memory_bytes == 5 * 10**9


def test_stages_of_the_recipe_are_those_of_every_candidate(plan):
    planning, jobs = plan(100, "model.backbone.checkpoint_stages=[0,1]")
    found = figures(planning)
    assert [job.split.checkpoint_stages for job in jobs] == [(0, 1), (0, 1, 2, 3)]
    assert found["recommended"] == {"optimizer.micro_batch_size": 8}


def test_weights_are_not_needed_and_the_rest_is_as_in_training(plan):
    planning, jobs = plan(100, "model.weights=nowhere.pth", "optimizer.average_decay=0.5")
    planning.measure(Split(8, 1))
    assert jobs[0].recipe.model.weights is None and jobs[0].recipe.optimizer.average_decay == 0.5
    assert jobs[0].num_classes == 10


def test_description_says_what_is_trained(plan):
    shown = "\n".join(describe(plan(100, task="instance")[0]))
    assert "6 training and 4 validation images, 6 classes; 0.1 M parameters" in shown
    assert "4 steps of 8 images, 2 in an epoch; 1 x cpu, 0 loader processes each" in shown
    assert "learning rate 0.001" in shown
    assert "most objects: 6, in image 5" in shown


def test_detector_is_measured_on_the_most_objects(plan):
    planning, jobs = plan(100, task="instance")
    found = figures(planning)
    assert found["worst_batch"]["objects"] == 6 and found["worst_batch"]["images"] == 8
    assert all(len(job.sample.target["boxes"]) == 6 for job in jobs)
    assert all(job.sample.image.shape[1:] == found["worst_batch"]["size_hw"] for job in jobs)


@pytest.mark.parametrize(("workers", "waited_s"), [(0, 0.5), (1, 0.0), (8, 0.0)])
def test_loading_costs_time_where_it_does_not_keep_up(workers, waited_s):
    assert waiting_s(0.5, 0.8, workers) == waited_s
    assert waiting_s(0.8, 0.5, workers) == pytest.approx(0.3 if workers else 0.8)


@pytest.mark.parametrize(("workers", "batches"), [(0, 3), (3, 10)])
def test_loading_is_timed_once_the_workers_are_busy(workers, batches, monkeypatch):
    now_s, given = [0.0], []

    def load(start_step):
        for number in range(100):
            now_s[0] += 50.0 if number == 0 else 0.25
            given.append(number)
            yield number

    monkeypatch.setattr(module, "_LOADING_S", 1000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    run = SimpleNamespace(workers=workers, accumulation_steps=4, batches=load)
    assert loading_time_s(run) == pytest.approx(1.0)
    assert len(given) == batches


def test_short_runs_are_timed_too():
    run = SimpleNamespace(workers=8, accumulation_steps=1, batches=lambda start_step: iter([1]))
    assert loading_time_s(run) > 0


def test_settings_reproduce_the_split(tiny_words):
    split = Split(2, 4, (0, 1))
    words = [f"{key}={value}" for key, value in as_settings(split, ()).items()]
    name, *overrides = tiny_words("semantic", "optimizer.batch_size=8", *words)
    recipe = read_recipe(name, overrides)
    assert recipe.optimizer.micro_batch_size == 2
    assert with_stages(recipe, split.checkpoint_stages) == recipe
    assert as_settings(split, (0, 1)) == {"optimizer.micro_batch_size": 2}
