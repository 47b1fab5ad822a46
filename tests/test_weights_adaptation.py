import pytest
import torch
from torch import nn
from torch.nn import functional

from swin_dense.weights.adaptation import (
    class_layout,
    num_classes,
    resized_bias_table,
    resized_position_embedding,
    with_classes,
    with_input_channels,
)


def test_bias_table_is_resized_per_head_as_the_official_code_does():
    torch.manual_seed(0)
    table = torch.randn(49, 3, dtype=torch.double)  # window 4
    resized = resized_bias_table(table, 121)  # window 6
    assert resized.shape == (121, 3)
    for head in range(3):
        picture = table[:, head].view(1, 1, 7, 7)
        wanted = functional.interpolate(picture, size=(11, 11), mode="bicubic", align_corners=False, antialias=False)
        assert torch.equal(resized[:, head], wanted.flatten())


def test_bias_table_of_the_same_window_stays_and_the_centre_always():
    table = torch.randn(169, 2, dtype=torch.double)
    assert (resized_bias_table(table, 169) - table).abs().max() < 1e-12
    bigger = resized_bias_table(table, 529)  # odd sides share their centre
    assert (bigger[264] - table[84]).abs().max() < 1e-12


def test_position_embedding_keeps_a_constant_and_takes_any_grid():
    resized = resized_position_embedding(torch.full((1, 3, 4, 4), 2.5, dtype=torch.double), (7, 5))
    assert resized.shape == (1, 3, 7, 5)
    assert (resized - 2.5).abs().max() < 1e-12


@pytest.mark.parametrize("in_channels", [1, 3, 6, 9])
def test_grey_pictures_see_the_same_patches(in_channels):
    # In one channel or whole multiples of the old three; other numbers weigh the old channels unevenly.
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.double)
    grey = torch.randn(2, 1, 8, 12, dtype=torch.double)
    old = functional.conv2d(grey.expand(-1, 3, -1, -1), weight, stride=4)
    adapted = with_input_channels(weight, in_channels)
    assert adapted.shape == (5, in_channels, 4, 4)
    new = functional.conv2d(grey.expand(-1, in_channels, -1, -1), adapted, stride=4)
    assert (new - old).abs().max() < 1e-12


@pytest.mark.parametrize("in_channels", [1, 2, 4, 5, 7])
def test_any_number_of_channels_keeps_the_sum_of_a_uniform_filter(in_channels):
    adapted = with_input_channels(torch.ones(1, 3, 2, 2), in_channels)
    assert adapted.shape == (1, in_channels, 2, 2)
    assert adapted.sum().item() == pytest.approx(12)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("roi_heads.box_predictor.cls_score.weight", 5, 4),
        ("roi_heads.box_predictor.2.bbox_pred.bias", 20, 4),
        ("roi_heads.mask_predictor.mask_fcn_logits.weight", 5, 4),
        ("decode_head.conv_seg.weight", 4, 4),
        ("auxiliary_head.conv_seg.bias", 4, 4),
        ("head.weight", 4, 4),
    ],
)
def test_rows_tell_the_number_of_classes(name, rows, expected):
    assert num_classes(name, rows) == expected


@pytest.mark.parametrize("name", ["rpn.head.bbox_pred.weight", "rpn.head.cls_logits.weight", "decode_head.x.weight"])
def test_other_parameters_have_no_class_rows(name):
    # The box layer of the proposals has the same name as that of the classes, in another module.
    assert class_layout(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "head.weight",
        "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.box_predictor.0.bbox_pred.weight",
        "roi_heads.mask_predictor.mask_fcn_logits.weight",
    ],
)
def test_rows_follow_their_class_by_name(name):
    per_class, background_first = class_layout(name)
    file_classes, model_classes = ("cat", "dog", "cup"), ("cup", "tree", "cat", "dog")
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(per_class * (3 + background_first), 2, 1, generator=generator)
    fresh = torch.randn(per_class * (4 + background_first), 2, 1, generator=generator)
    before = fresh.clone()
    adapted = with_classes(name, value, fresh, file_classes, model_classes)
    old, new, unset = (tensor.view(-1, per_class, 2, 1)[int(background_first) :] for tensor in (value, adapted, fresh))
    assert torch.equal(new[0], old[2]) and torch.equal(new[2], old[0]) and torch.equal(new[3], old[1])
    assert torch.equal(new[1], unset[1])
    if background_first:
        assert torch.equal(adapted[:per_class], value[:per_class])
    assert torch.equal(fresh, before)


def test_a_classifier_gives_the_same_logits_for_the_classes_it_keeps():
    old, new = nn.Linear(5, 3), nn.Linear(5, 2)
    state = {
        name: with_classes(f"head.{name}", value, new.state_dict()[name], ("a", "b", "c"), ("c", "a"))
        for name, value in old.state_dict().items()
    }
    new.load_state_dict(state)
    x = torch.randn(4, 5)
    assert torch.allclose(new(x), old(x)[:, [2, 0]])
