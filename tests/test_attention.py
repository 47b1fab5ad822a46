import math

import pytest
import torch
from torch.nn import functional

from swin_dense.attention import CosineWindowAttention, WindowAttention, log_offsets
from swin_dense.windows import ShiftedWindows

DIM, HEADS, WINDOW = 6, 3, 3


def lively(attention):
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return attention.double()


NO_SHIFT = ShiftedWindows(WINDOW, (0, 0), True, -100.0)


def map_of(height, width, batch=2):
    shape = (batch, height, width, DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def both():
    return [
        lively(WindowAttention(DIM, HEADS, WINDOW, qkv_bias=True)),
        lively(CosineWindowAttention(DIM, HEADS, WINDOW, qkv_bias=True, pretrained_window_size=2)),
    ]


@pytest.mark.parametrize("attention", both())
def test_each_window_is_attended_alone(attention):
    x = map_of(2 * WINDOW, 3 * WINDOW)
    whole = attention(x, NO_SHIFT)
    for row in range(0, x.shape[1], WINDOW):
        for column in range(0, x.shape[2], WINDOW):
            window = slice(row, row + WINDOW), slice(column, column + WINDOW)
            alone = attention(x[1:, *window], NO_SHIFT)
            assert torch.allclose(whole[1:, *window], alone, atol=1e-12)


@pytest.mark.parametrize("attention", both())
def test_padded_cells_hold_the_bias_of_the_projection(attention):
    x = map_of(2, 2)
    padded = functional.pad(x, (0, 0, 0, 1, 0, 1))  # a zero is projected to the bias
    assert torch.allclose(attention(x, NO_SHIFT), attention(padded, NO_SHIFT)[:, :2, :2], atol=1e-12)


@pytest.mark.parametrize("kind", [WindowAttention, CosineWindowAttention])
def test_attention_without_a_bias_pads_with_zeros(kind):
    more = {"pretrained_window_size": 2} if kind is CosineWindowAttention else {}
    attention = lively(kind(DIM, HEADS, WINDOW, qkv_bias=False, **more))
    x = map_of(2, 1)
    padded = functional.pad(x, (0, 0, 0, 2, 0, 1))
    assert torch.allclose(attention(x, NO_SHIFT), attention(padded, NO_SHIFT)[:, :2, :1], atol=1e-12)


def test_cosine_attention_is_the_formula_of_the_paper():
    attention = lively(CosineWindowAttention(DIM, HEADS, WINDOW, qkv_bias=True, pretrained_window_size=5))
    attention.logit_scale.data = torch.tensor([1.5, 9.0, -0.5], dtype=torch.float64).view(3, 1, 1)
    window = map_of(WINDOW, WINDOW, batch=1).view(-1, DIM)
    weight = attention.qkv.weight
    query = window @ weight[:DIM].T + attention.q_bias
    key = window @ weight[DIM : 2 * DIM].T
    value = window @ weight[2 * DIM :].T + attention.v_bias
    heads = []
    for head in range(HEADS):
        part = slice(2 * head, 2 * head + 2)
        scale = math.exp(min(attention.logit_scale[head].item(), float(torch.tensor(100.0).log())))
        logits = torch.empty(WINDOW**2, WINDOW**2, dtype=torch.float64)
        for i in range(WINDOW**2):
            for j in range(WINDOW**2):
                cosine = functional.cosine_similarity(query[i, part], key[j, part], dim=0)
                offset = torch.tensor([i // WINDOW - j // WINDOW, i % WINDOW - j % WINDOW], dtype=torch.float64) / 4 * 8
                offset = offset.sign() * (offset.abs() + 1).log2() / 3
                logits[i, j] = scale * cosine + 16 * torch.sigmoid(attention.cpb_mlp(offset)[head])
        heads.append(logits.softmax(dim=1) @ value[:, part])
    wanted = torch.cat(heads, dim=1) @ attention.proj.weight.T + attention.proj.bias
    # The table of offsets is held in float32, as in every published implementation.
    attended = attention(window.view(1, WINDOW, WINDOW, DIM), NO_SHIFT).view(-1, DIM)
    assert torch.allclose(attended, wanted, atol=1e-5)


def test_log_offsets_reach_one_at_the_edge_of_the_pretrained_window():
    table = log_offsets(7, 7).view(13, 13, 2)
    assert table[6, 6].tolist() == [0.0, 0.0]
    assert table[12, 0].tolist() == pytest.approx([math.log2(9) / 3, -math.log2(9) / 3])
    assert torch.equal(log_offsets(7, 5).view(13, 13, 2)[2:11, 2:11], log_offsets(5, 5).view(9, 9, 2))


def test_position_bias_of_a_cell_depends_on_the_offset_only():
    for attention in both():
        bias = attention.relative_position_bias().view(HEADS, WINDOW, WINDOW, WINDOW, WINDOW)
        assert torch.equal(bias[:, 0, 1, 1, 2], bias[:, 1, 0, 2, 1])
        assert not torch.allclose(bias[:, 0, 1, 1, 2], bias[:, 0, 1, 1, 0])
