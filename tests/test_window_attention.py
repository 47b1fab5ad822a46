import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError
from swin_dense.swin import SwinTransformer
from swin_dense.window_attention import (
    attention_implementation,
    reference_window_attention,
    window_attention,
)
from swin_dense.windows import ShiftedWindows

WINDOW, HEADS, WIDTH = 3, 2, 5
SHIFTED = ShiftedWindows(WINDOW, (1, 1), True, -100.0)


def inputs(height, width, batch=2, seed=0, heads=HEADS):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, height, width, 3 * heads * WIDTH), (3 * heads * WIDTH,), (heads, WINDOW**2, WINDOW**2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("pad_first", [True, False])
def test_regions_that_only_the_roll_brought_together_do_not_see_each_other(pad_first):
    windows = ShiftedWindows(WINDOW, (1, 1), pad_first, -1e9)
    qkv, padding, bias = inputs(2 * WINDOW, 2 * WINDOW)
    changed = qkv.clone()
    changed[:, 0] += 1  # the first row is carried to the end, into the windows of the last rows
    one, other = (reference_window_attention(x, padding, bias, None, windows) for x in (qkv, changed))
    assert torch.equal(one[:, 1:], other[:, 1:])
    assert not torch.allclose(one[:, 0], other[:, 0])


def test_each_head_attends_alone():
    qkv, padding, bias = inputs(4, 5)
    whole = reference_window_attention(qkv, padding, bias, None, SHIFTED).unflatten(3, (HEADS, WIDTH))
    for head in range(HEADS):
        alone = [x.unflatten(-1, (3, HEADS, WIDTH))[..., head, :].flatten(-2) for x in (qkv, padding)]
        attended = reference_window_attention(*alone, bias[head : head + 1], None, SHIFTED)
        assert torch.allclose(whole[..., head, :], attended, atol=1e-12)


def test_cosines_ignore_the_length_of_queries_and_keys():
    qkv, padding, bias = inputs(4, 7)
    scale = torch.tensor([3.0, 0.5], dtype=torch.float64)
    longer = (x * torch.tensor([7.0] * 2 * HEADS * WIDTH + [1.0] * HEADS * WIDTH) for x in (qkv, padding))
    one = reference_window_attention(qkv, padding, bias, scale, SHIFTED)
    assert torch.allclose(reference_window_attention(*longer, bias, scale, SHIFTED), one, atol=1e-12)


def test_no_image_gives_no_map():
    qkv, padding, bias = inputs(4, 5, batch=0)
    assert window_attention(qkv, padding, bias, None, SHIFTED).shape == (0, 4, 5, HEADS * WIDTH)


def test_implementation_can_be_chosen_for_a_while(monkeypatch):
    called = []
    monkeypatch.setattr(
        "swin_dense.window_attention.reference_window_attention",
        lambda *arguments: called.append("reference") or reference_window_attention(*arguments),
    )
    backbone = SwinTransformer(SwinConfig(embed_dim=4, depths=(1,), num_heads=(1,), out_features=("c2",))).eval()
    images = torch.rand(1, 3, 31, 53)
    default = backbone(images)["c2"]
    assert called == []
    with pytest.raises(ZeroDivisionError), attention_implementation("reference"):
        assert torch.allclose(backbone(images)["c2"], default, atol=1e-5)
        raise ZeroDivisionError
    assert called == ["reference"]
    backbone(images)
    assert called == ["reference"]


def test_unknown_implementation_is_named():
    with (
        pytest.raises(ConfigError, match=r"one of auto, reference, gathered, fused, got 'fastest'"),
        attention_implementation("fastest"),
    ):
        pass
