import pytest
import torch

from swin_dense.attention_trial import fused_is_right
from swin_dense.window_attention import reference_window_attention
from swin_dense.windows import ShiftedWindows


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.setattr("swin_dense.kernel_trial._answers", {})
    return lambda cosine=False, head_dim=4: fused_is_right(torch.device("cpu"), torch.float32, 3, head_dim, cosine)


def as_fused(change=lambda attended: attended):
    def attend(qkv, padding, bias, scale, *windows):
        return change(reference_window_attention(qkv, padding, bias, scale, ShiftedWindows(*windows)))

    return attend


@pytest.mark.parametrize("cosine", [False, True])
def test_fused_attention_is_used_where_it_equals_the_reference(cosine, tried, monkeypatch):
    monkeypatch.setattr("swin_dense.attention_trial.fused_window_attention", as_fused())
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert tried(cosine)
    assert torch.equal(torch.get_rng_state(), state)
    assert not tried(head_dim=65)  # wider than its tiles


def test_fused_attention_that_differs_is_left_for_the_reference(tried, monkeypatch):
    monkeypatch.setattr("swin_dense.attention_trial.fused_window_attention", as_fused(lambda x: x * 1.01))
    with pytest.warns(UserWarning, match="slower reference: the fused one is off by 1.0e-02"):
        assert not tried()
    assert not tried()  # and is not tried again


def test_fused_attention_that_fails_is_left_for_the_reference(tried, monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("swin_dense.attention_trial.fused_window_attention", fail)
    with pytest.warns(UserWarning, match=r"slower reference: the fused one failed \(RuntimeError: no kernel image\)"):
        assert not tried()


def test_compiler_takes_the_answer_as_it_is(tried, monkeypatch):
    monkeypatch.setattr("swin_dense.attention_trial.fused_window_attention", as_fused())

    def doubled(x):
        return x * (2 if tried() else 3)

    assert torch.compile(doubled, fullgraph=True, backend="eager")(torch.ones(1)) == 2
