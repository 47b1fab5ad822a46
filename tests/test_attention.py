import math

import pytest
import torch
from torch.nn import functional

from swin_dense.attention import CosineWindowAttention, WindowAttention, log_offsets

DIM, HEADS, WINDOW = 6, 3, 3


def lively(attention):
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return attention.double()


def windows_of(batch=2, count=5):
    shape = (batch, count, WINDOW * WINDOW, DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def both():
    return [
        lively(WindowAttention(DIM, HEADS, WINDOW, qkv_bias=True)),
        lively(CosineWindowAttention(DIM, HEADS, WINDOW, qkv_bias=True, pretrained_window_size=2)),
    ]


@pytest.mark.parametrize("attention", both())
def test_mask_of_zeros_changes_nothing_and_a_wall_cuts_off(attention):
    windows, area = windows_of(), WINDOW * WINDOW
    plain = attention(windows)
    assert torch.allclose(attention(windows, torch.zeros(5, area, area, dtype=torch.float64)), plain, atol=1e-12)
    wall = torch.zeros(5, area, area, dtype=torch.float64)
    wall[:, :4, 4:] = -math.inf
    changed = windows.clone()
    changed[:, :, 4:] += 1
    assert torch.allclose(attention(windows, wall)[:, :, :4], attention(changed, wall)[:, :, :4], atol=1e-12)


@pytest.mark.parametrize("attention", both())
def test_each_window_is_attended_alone(attention):
    windows = windows_of()
    mask = torch.randn(5, WINDOW**2, WINDOW**2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = attention(windows, mask)
    for index in range(5):
        alone = attention(windows[1:, index : index + 1], mask[index : index + 1])
        assert torch.allclose(whole[1, index], alone[0, 0], atol=1e-12)


def test_cosine_attention_is_the_formula_of_the_paper():
    attention = lively(CosineWindowAttention(DIM, HEADS, WINDOW, qkv_bias=True, pretrained_window_size=5))
    attention.logit_scale.data = torch.tensor([1.5, 9.0, -0.5], dtype=torch.float64).view(3, 1, 1)
    window = windows_of(1, 1)[0, 0]
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
    assert torch.allclose(attention(window[None, None])[0, 0], wanted, atol=1e-5)


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
