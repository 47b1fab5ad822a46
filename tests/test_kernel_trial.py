import random
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from swin_dense.kernel_trial import WrongResult, check_equal, kernel_trial

CPU = torch.device("cpu")


@pytest.fixture
def kinds(monkeypatch):
    """What was tried, and a trial that the tests below ask."""
    monkeypatch.setattr("swin_dense.kernel_trial._answers", {})
    return []


def question(kinds, body=lambda: None):
    @kernel_trial("it goes slowly: the fast one")
    def is_right(device, *kind, **named):
        kinds.append((device, *kind, *named.items()))
        body()

    return is_right


def test_each_kind_is_tried_once(kinds):
    is_right, other_is_right = question(kinds), question(kinds)
    for _ in range(2):
        assert is_right(CPU, torch.float32, 3) and is_right(CPU, torch.float32, 4) and is_right(CPU, width=3)
    assert kinds == [(CPU, torch.float32, 3), (CPU, torch.float32, 4), (CPU, ("width", 3))]
    assert other_is_right(CPU, torch.float32, 3) and len(kinds) == 4


def test_a_trial_that_fails_is_warned_of_once(kinds):
    def fail():
        raise RuntimeError("no kernel image")

    is_right = question(kinds, fail)
    with pytest.warns(
        UserWarning, match=r"it goes slowly: the fast one failed \(RuntimeError: no kernel image\)\."
    ) as all:
        assert not is_right(CPU)
    assert [warning.filename for warning in all] == [__file__]
    with warnings.catch_warnings(action="error"):
        assert not is_right(CPU)
    assert len(kinds) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.01, r"the fast one is off by 1\.0e-02 of the largest value\."),
        (float("nan"), "the fast one is off by nan of"),
    ],
)
def test_a_result_that_differs_is_warned_of(value, message, kinds):
    def compare():
        check_equal([torch.ones(3), torch.tensor([4.0, value * 100])], [torch.ones(3), torch.tensor([4.0, 100])], 1e-3)

    with pytest.warns(UserWarning, match=message):
        assert not question(kinds, compare)(CPU)


def test_results_may_be_off_by_the_allowed_part_of_the_largest_value_of_their_tensor():
    wanted = [torch.tensor([0.0, -50.0]), torch.tensor([2.0])]
    check_equal([torch.tensor([0.4, -50.0]), torch.tensor([2.01])], wanted, 1e-2)
    with pytest.raises(WrongResult):
        check_equal([torch.tensor([0.4, -50.0]), torch.tensor([2.03])], wanted, 1e-2)


def test_nothing_is_tried_without_triton(kinds, monkeypatch):
    monkeypatch.setattr("swin_dense.kernel_trial.find_spec", lambda name: None)
    assert not question(kinds)(CPU) and not kinds


def test_random_generators_stay_as_they_are(kinds):
    before = torch.get_rng_state(), random.getstate()
    assert question(kinds, lambda: (torch.rand(3), torch.manual_seed(5), random.random()))(CPU)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def learn():
    """Fails where a mode of the caller reaches it."""
    assert not torch.are_deterministic_algorithms_enabled()
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = (x * x).sum() + (x[None] @ x).sum()
    assert y.dtype == torch.float32 and torch.autograd.grad(y, x)[0].tolist() == [8.0, 12.0]


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference", "no gradients", "autocast"],
)
def test_modes_of_the_caller_do_not_reach_the_trial(mode, kinds):
    with mode():
        before = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        assert question(kinds, learn)(CPU)
        after = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    assert after == before


@pytest.mark.parametrize("mode", ["warn", "error"])
def test_deterministic_algorithms_are_wanted_again_after_the_trial(mode, kinds):
    def fail():
        learn()
        raise ValueError("too bad")

    try:
        torch.set_deterministic_debug_mode(mode)
        assert question(kinds, learn)(CPU)
        with pytest.warns(UserWarning, match="too bad"):
            assert not question(kinds, fail)(CPU)
        assert torch.get_deterministic_debug_mode() == {"warn": 1, "error": 2}[mode]
    finally:
        torch.set_deterministic_debug_mode("default")


def test_waiting_for_a_gpu_is_an_error_again_after_the_trial(kinds, monkeypatch):
    modes = [2]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert question(kinds, lambda: modes.append("trial"))(torch.device("cuda"))
    assert modes == [2, 0, "trial", 2]


def test_a_checkpoint_around_the_trial_computes_once_more_as_always(kinds):
    is_right, computed = question(kinds, learn), []

    def square(x):
        computed.append(is_right(CPU))
        return x * x

    x = torch.tensor(3.0, requires_grad=True)
    out = checkpoint(square, x, use_reentrant=False)
    assert computed == [True]
    out.backward()
    assert x.grad == 6 and computed == [True, True]


def test_a_compiler_takes_the_answer_as_it_is(kinds):
    is_right = question(kinds, learn)

    def doubled(x):
        return x * (2 if is_right(x.device, x.dtype, x.shape[0]) else 3)

    assert torch.compile(doubled, fullgraph=True, backend="eager")(torch.ones(1)) == 2
    assert kinds == [(CPU, torch.float32, 1)]
