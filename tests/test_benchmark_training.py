import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from swin_dense.tools import benchmark_training
from swin_dense.tools.benchmark_training import (
    OURS,
    batches,
    contestants,
    document,
    mean_curve,
    rate_factor,
    summarise,
    take_turn,
    train_beside,
    write_document,
)
from swin_dense.tools.main import main, parse
from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.tasks import task_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(tiny_words):
    """A recipe with the peers' backbone and narrow heads, two images of 64 pixels a step."""

    def words(task, *changes):
        heads = ["model.head.max_proposals=17", "model.head.max_detections=5"] if task == "instance" else []
        crop = ["model.backbone={}", "augmentation.max_long_edge=80", "inference.max_long_edge=80", *heads]
        return tiny_words(task, *crop, *changes)

    return words


def task_with(words):
    name, *overrides = words
    task = task_of(read_recipe(name, overrides))
    return task, task.training_data()


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on by a second with every look at it: each step takes one."""

    class Clock:
        now_s = 0.0

        def perf_counter(self):
            self.now_s += 1.0
            return self.now_s

    monkeypatch.setattr(benchmark_training, "time", Clock())


def tensors_of(batch):
    targets = batch.plain()
    return [targets["labels"], targets["images"]] if "labels" in targets else targets["images"]


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_both_get_the_same_batches(task, small):
    task, data = task_with(small(task))
    own, other = contestants(task, data)
    for first, second, plain in islice(zip(own.batches, other.batches, batches(task, data), strict=True), 3):
        assert first.ids == second.ids == plain.ids
        pairs = zip(tensors_of(first), tensors_of(second), strict=True)
        assert all(torch.equal(one, another) for one, another in pairs)


def parameters_of(contestant):
    return [parameter.detach().clone() for parameter in contestant.model.parameters()]


def test_turns_of_one_do_not_touch_the_other(small, clock):
    """Dropped paths and channels are drawn: weights after two steps are the same, whatever the other one drew."""
    words = small("semantic")
    task, data = task_with(words)
    own, other = contestants(task, data)
    take_turn(own, 2.0, 9.0, task.recipe)
    alone = parameters_of(own)
    own, other = contestants(task, data)
    take_turn(own, 1.0, 9.0, task.recipe)
    before = parameters_of(other)
    take_turn(other, 1.0, 9.0, task.recipe)
    take_turn(own, 2.0, 9.0, task.recipe)
    assert own.steps == 2 and other.steps == 1
    assert all(torch.equal(one, another) for one, another in zip(alone, parameters_of(own), strict=True))
    assert not all(torch.equal(one, another) for one, another in zip(before, parameters_of(other), strict=True))


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_both_use_up_the_same_time_and_are_scored_at_the_same_times(task, small, clock, monkeypatch):
    monkeypatch.setattr(benchmark_training, "_TURN_S", 1.0)
    name, *overrides = small(task)
    drawn = torch.get_rng_state()
    own, other = train_beside(read_recipe(name, overrides), 1.5, 2)
    assert torch.equal(drawn, torch.get_rng_state())
    assert own.name == OURS != other.name
    for each in (own, other):
        assert each.seconds == each.steps == 2.0  # the first step that begins before the end is made
        assert [at_s for at_s, _ in each.scores] == [1.0, 2.0]
        assert all(0 <= score <= 1 for _, score in each.scores)
        assert each.model.training


def test_rate_rises_at_first_and_falls_to_zero():
    shares = np.linspace(0, 1, 1001)
    rates = [rate_factor(share) for share in shares]
    assert rates[0] == pytest.approx(0.01) and rates[-1] == 0 and rate_factor(1.3) == 0
    highest = int(np.argmax(rates))
    assert 0.9 < max(rates) <= 1 and shares[highest] < 0.06
    assert (np.diff(rates[: highest + 1]) > 0).all() and (np.diff(rates[highest:]) < 0).all()


def curve(*scores):
    return [(60.0 * minute, score) for minute, score in enumerate(scores, start=1)]


def figures_of(own, other):
    """As `measure_training` gives them, one seed for each curve of both."""
    by_seed = {
        str(seed): {
            OURS: {"steps": 7 + seed, "seconds": 120.0, "scores": first},
            "another": {"steps": 5, "seconds": 120.0, "scores": second},
        }
        for seed, (first, second) in enumerate(zip(own, other, strict=True))
    }
    numbers = {"score": "mIoU", "minutes": 2.0, "threads": 3, "command": "swin-dense benchmark training"}
    return {**numbers, "by_seed": by_seed, "summary": summarise(by_seed)}


def test_summary_compares_the_last_scores_of_each_seed():
    figures = figures_of(
        [curve(0.1, 0.5), curve(0.9, 0.25), curve(0.2, 0.125)], [curve(0.2, 0.5), curve(0.1, 0.5), curve(0.1, 0.0)]
    )
    summary = figures["summary"]
    assert summary["at_least_equal"] == 2
    assert summary["last"][OURS]["all"] == [0.5, 0.25, 0.125] and summary["last"][OURS]["mean"] == 0.875 / 3
    assert summary["last"]["another"]["max"] == 0.5 and summary["steps"][OURS]["median"] == 8


def test_mean_curve_lies_between_and_equals_equal_ones():
    one = curve(0.25, 0.5, 0.75)
    assert mean_curve([one, one]) == mean_curve([one]) == one
    assert mean_curve([[(60.0, 0.25)], [(62.0, 0.75)]]) == [(61.0, 0.5)]


def test_document_says_what_the_figures_say(tmp_path):
    figures = figures_of([curve(0.1, 0.5), curve(0.1, 0.25)], [curve(0.2, 0.125), curve(0.2, 0.5)])
    page = " ".join(document(figures, {"device": "cpu (of a test)"}, "page.png").split())
    assert "# mIoU after the same training time, beside another" in page and "device cpu (of a test)" in page
    assert "for 2 minutes (threads: 3)" in page and "at least equal in 1 of 2 seeds" in page
    assert f"| {OURS} | 0.375 | 0.250 to 0.500 | 8 |" in page and "| another | 0.312 | 0.125 to 0.500 | 5 |" in page
    write_document(tmp_path / "new" / "page.md", figures, {"device": "cpu"})
    assert "](page.png)" in (tmp_path / "new" / "page.md").read_text()
    with Image.open(tmp_path / "new" / "page.png") as picture:
        assert min(picture.size) > 300 and len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_command_measures_prints_and_writes(small, tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_training, "_TURN_S", 1.0)
    name, *overrides = small("semantic")
    words = ["--seeds", "5", "5", "--minutes", str(1 / 60), "--scores", "1", "--json", str(tmp_path / "figures.json")]
    assert main(["benchmark", "training", name, *words, "--document", str(tmp_path / "page.md"), *overrides]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["training"]
    measured = figures["by_seed"]["5"]
    assert list(figures["by_seed"]) == ["5"] and list(measured) == [OURS, "segmentation-models-pytorch"]
    assert all(each["steps"] == len(each["scores"]) == 1 for each in measured.values())
    folder = next(word for word in overrides if word.startswith("data=")).rsplit("/", 1)[-1]
    assert figures["command"].startswith(f"swin-dense benchmark training {name} data={folder} ")
    page, shown = (tmp_path / "page.md").read_text(), capsys.readouterr().out
    for each in measured.values():
        assert f"{each['scores'][0][1]:.3f}" in page and f"{each['scores'][0][1]:.3f}" in shown
    assert "seed 5" in shown and str(tmp_path) not in page


def test_changes_to_the_recipe_may_stand_anywhere():
    words = ["training", "recipe", "a=1", "--minutes", "3", "b=2", "--document", "page.md", "c=3"]
    assert parse(["benchmark", *words]).overrides == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0", "-1"], "--seeds must be 0 or more each, got [0, -1]"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--scores", "0"], "--scores must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, capsys):
    assert main(["benchmark", "training", "shapes_semantic", *words]) == 2
    assert message in capsys.readouterr().err


def test_recipe_without_a_peer_is_refused_before_training(tiny_words, capsys):
    assert main(["benchmark", "training", *tiny_words("semantic")]) == 2
    assert "training is compared for UPerNet and Mask R-CNN with swin_t" in capsys.readouterr().err
