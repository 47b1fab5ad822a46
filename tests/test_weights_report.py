import pytest

from swin_dense.weights.report import Fate, WeightsReport, group_of, percent

FATES = (
    Fate("backbone.patch_embed.proj.weight", "patch embedding", "loaded", 1000),
    Fate("backbone.layers.0.downsample.norm.weight", "stage 1", "permuted", 500, "another order"),
    Fate("backbone.layers.0.blocks.0.attn.relative_position_bias_table", "stage 1", "resized", 400, "another window"),
    Fate("backbone.norm0.weight", "output norms", "missing", 100, "it starts fresh"),
    Fate("decode_head.conv_seg.weight", "decoder", "missing", 2000, "the file has no such head"),
    Fate("norm.weight", "classifier", "unused", 77, "a classifier's"),
    Fate("head.weight", "classifier", "unused", 7, "a classifier's"),
)
REPORT = WeightsReport("a.pth", "mmdet", "swin_t", None, FATES, notes=("averaged weights under 'ema'",))


def test_every_fate_is_named_once():
    assert REPORT.loaded == tuple(fate.name for fate in FATES[:3])
    assert REPORT.permuted == (FATES[1].name,) and REPORT.resized == (FATES[2].name,)
    assert REPORT.missing == (FATES[3].name, FATES[4].name)
    assert REPORT.unused == ("norm.weight", "head.weight")
    assert sorted((*REPORT.loaded, *REPORT.missing, *REPORT.unused)) == sorted(fate.name for fate in FATES)


def test_shares_count_numbers_and_not_what_the_file_has_too_much():
    assert REPORT.backbone_share == pytest.approx(1900 / 2000)
    assert REPORT.share == pytest.approx(1900 / 4000)
    assert WeightsReport("a.pth", "unknown", None, None, ()).share == 0


def test_report_reads_as_a_receipt():
    assert str(REPORT).splitlines() == [
        "weights: a.pth (mmdet format, swin_t): 95.0% of the backbone, 47.5% of the model's 4,000 parameters",
        "  permuted: 500 of stage 1: another order",
        "  resized: 400 of stage 1: another window",
        "  missing: 100 of output norms: it starts fresh: 1 (backbone.norm0.weight)",
        "  missing: 2,000 of decoder: the file has no such head: 1 (decode_head.conv_seg.weight)",
        "  unused: 84 of classifier: a classifier's: 2 (norm.weight, head.weight)",
        "  note: averaged weights under 'ema'",
    ]


def test_long_lists_are_cut_and_kept_classes_named():
    fates = tuple(Fate(f"w{index}", "other", "unused", 1, "why") for index in range(5))
    report = WeightsReport("a.pth", "timm", None, "classifier", fates, kept_classes=("cat", "dog"))
    assert str(report).splitlines()[1:] == [
        "  unused: 5 of other: why: 5 (w0, w1, w2, …)",
        "  classes kept by name: 2 (cat, dog)",
    ]


def test_groups_add_up_and_keep_the_order_of_the_model():
    groups = REPORT.by_group()
    assert [group for group, _, _ in groups] == ["patch embedding", "stage 1", "output norms", "decoder", "classifier"]
    assert sum(sum(numbers.values()) for _, numbers, _ in groups) == sum(fate.numbers for fate in FATES)
    (_, stage_1, reasons) = groups[1]
    assert stage_1 == {"loaded": 0, "permuted": 500, "resized": 400, "missing": 0, "unused": 0}
    assert reasons == "another order; another window"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("backbone.layers.2.blocks.1.mlp.fc1.weight", "stage 3"),
        ("backbone.absolute_pos_embed", "position embedding"),
        ("backbone.norm3.bias", "output norms"),
        ("final_norm.bias", "classifier"),
        ("fpn.pyramid.inner_blocks.0.0.weight", "pyramid"),
        ("rpn.head.bbox_pred.weight", "proposals"),
        ("roi_heads.box_predictor.0.bbox_pred.weight", "box head"),
        ("roi_heads.mask_head.0.0.weight", "mask head"),
        ("auxiliary_head.conv_seg.bias", "auxiliary head"),
        ("queue", "other"),
    ],
)
def test_names_tell_their_group(name, group):
    assert group_of(name) == group


@pytest.mark.parametrize(("share", "text"), [(1.0, "100.0%"), (0.99999, "99.9%"), (0.0, "0.0%"), (0.5, "50.0%")])
def test_only_all_of_it_is_a_hundred_percent(share, text):
    assert percent(share) == text
