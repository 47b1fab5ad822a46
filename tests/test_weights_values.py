import pytest
import torch
from torch.nn import functional

from swin_dense.blocks import PatchMerging
from swin_dense.weights import values


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("to_own", "to_file", "tensors"),
    [
        (values.merging_from_channel_major, values.merging_to_channel_major, [torch.randn(6, 12)]),
        (values.merging_from_channel_major, values.merging_to_channel_major, [torch.randn(20)]),
        (values.stack, values.unstack, [torch.randn(5, 5), torch.randn(5, 5), torch.randn(5, 5)]),
        (values.background_first, values.background_last, [torch.randn(4, 3)]),
        (values.background_first, values.background_last, [torch.randn(4)]),
        (values.add_background_box, values.drop_background_box, [torch.randn(12, 3)]),
        (values.add_background_box, values.drop_background_box, [torch.randn(12, 3), torch.randn(4, 3)]),
        (values.add_background_box_unless_shared, values.drop_background_box_unless_shared, [torch.randn(4, 3)]),
        (values.add_background_box_unless_shared, values.drop_background_box_unless_shared, [torch.randn(8)]),
        (values.add_background_mask, values.drop_background_mask, [torch.randn(7, 3, 1, 1)]),
        (values.add_background_mask, values.drop_background_mask, [torch.randn(7), torch.randn(1)]),
        (values.grid_from_tokens, values.tokens_from_grid, [torch.randn(1, 49, 3)]),
    ],
)
def test_there_and_back_is_bit_for_bit_the_same(to_own, to_file, tensors):
    before = [tensor.clone() for tensor in tensors]
    own = to_own(tensors)
    assert len(own) == 1
    assert equal(to_file(own), tensors)
    assert equal(tensors, before)  # and nothing was changed in place


def test_channel_major_merging_is_what_unfold_computes():
    torch.manual_seed(0)
    merging = PatchMerging(5).double()
    for parameter in merging.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.double)
    state = merging.state_dict()
    norm_weight, norm_bias, reduction = (
        values.merging_to_channel_major([state[name]])[0] for name in ("norm.weight", "norm.bias", "reduction.weight")
    )
    x = torch.randn(2, 6, 8, 5, dtype=torch.double)
    patches = functional.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
    merged = functional.linear(functional.layer_norm(patches, (20,), norm_weight, norm_bias), reduction)
    assert (merged.view(2, 3, 4, 10) - merging(x)).abs().max() < 1e-12


def test_the_bias_of_the_keys_is_dropped_and_comes_back_as_zeros():
    bias = torch.arange(1.0, 16.0)
    query, value = values.drop_key_bias([bias])
    assert torch.equal(query, bias[:5]) and torch.equal(value, bias[10:])
    (back,) = values.add_key_bias([query, value])
    assert torch.equal(back, torch.cat((bias[:5], torch.zeros(5), bias[10:])))


def test_added_background_rows_are_zeros_in_front():
    rows = torch.randn(8, 3)
    (boxes,) = values.add_background_box([rows])
    assert torch.equal(boxes[:4], torch.zeros(4, 3)) and torch.equal(boxes[4:], rows)
    (masks,) = values.add_background_mask([rows])
    assert torch.equal(masks[:1], torch.zeros(1, 3)) and torch.equal(masks[1:], rows)


def test_grid_reads_tokens_row_by_row():
    tokens = torch.arange(9.0).view(1, 9, 1)
    assert values.grid_from_tokens([tokens])[0].tolist() == [[[[0, 1, 2], [3, 4, 5], [6, 7, 8]]]]


def test_tokens_of_no_square_are_refused():
    with pytest.raises(ValueError, match=r"expected \(1, H W, C\) with H = W, got \(1, 50, 3\)"):
        values.grid_from_tokens([torch.zeros(1, 50, 3)])
