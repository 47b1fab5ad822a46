import torch

from swin_dense.weights.fitting import ClassNames, class_names_of, final_norm_as_last, fit
from swin_dense.weights.recognition import Recognised

NO_NAMES = ClassNames(None, None)


def found(tensors, **changes):
    fields = {
        "family": "official",
        "head": None,
        "changes": {},
        "origins": {},
        "unused": {},
        "fields": {},
        "faults": (),
    }
    return Recognised(source="x", tensors=tensors, **{**fields, **changes})


def outcome(fates):
    return {fate.name: fate.outcome for fate in fates}


def test_every_target_and_every_leftover_has_one_fate():
    targets = {"backbone.a": torch.zeros(2), "backbone.b": torch.zeros(3), "backbone.norm0.bias": torch.zeros(1)}
    tensors = {"backbone.a": torch.ones(2), "backbone.b": torch.ones(4), "final_norm.bias": torch.ones(1)}
    source = found(
        tensors,
        changes={"backbone.a": "another order"},
        origins={"final_norm.bias": "encoder.norm.bias"},
        unused={"queue": 7},
    )
    values, fates = fit(source, targets, NO_NAMES)
    assert set(values) == {"backbone.a"} and values["backbone.a"] is tensors["backbone.a"]
    assert outcome(fates) == {
        "backbone.a": "permuted",
        "backbone.b": "missing",
        "backbone.norm0.bias": "missing",
        "encoder.norm.bias": "unused",
        "queue": "unused",
    }
    reasons = {fate.name: fate.reason for fate in fates}
    assert reasons["backbone.b"] == "shape (4,) in the file, (3,) in the model"
    assert reasons["backbone.norm0.bias"] == "the file has no norm for this map; it starts fresh"
    assert [fate.numbers for fate in fates] == [2, 3, 1, 1, 7]


def test_counters_of_batch_norms_are_set_but_not_counted():
    name = "decode_head.bottleneck.bn.num_batches_tracked"
    values, fates = fit(found({name: torch.tensor(5)}), {name: torch.tensor(0)}, NO_NAMES)
    assert values[name] == 5 and not fates
    assert fit(found({}), {name: torch.tensor(0)}, NO_NAMES) == ({}, [])


def test_rows_of_classes_need_names_where_their_number_differs():
    targets = {"head.weight": torch.zeros(2, 3)}
    tensors = {"head.weight": torch.arange(12.0).view(4, 3)}
    values, (fate,) = fit(found(tensors), targets, NO_NAMES)
    assert not values and fate.outcome == "missing"
    assert fate.reason == "4 classes in the file, 2 in the model, none known to be the same"
    names = ClassNames(("a", "b", "c", "d"), ("c", "new"))
    values, (fate,) = fit(found(tensors), targets, names)
    assert torch.equal(values["head.weight"], torch.stack((tensors["head.weight"][2], torch.zeros(3))))
    assert (fate.outcome, fate.reason) == ("resized", "rows of 1 classes by name, of 1 fresh")
    assert names.kept == ("c",)


def test_the_same_number_of_classes_in_another_order_is_sorted_by_name():
    value = torch.arange(6.0).view(3, 2)
    values, _ = fit(
        found({"head.weight": value}),
        {"head.weight": torch.zeros(3, 2)},
        ClassNames(("a", "b", "c"), ("b", "c", "a")),
    )
    assert torch.equal(values["head.weight"], value[[1, 2, 0]])


def test_rows_of_other_classes_are_not_taken_by_position():
    targets = {"head.weight": torch.zeros(3, 2), "backbone.a": torch.zeros(1)}
    tensors = {"head.weight": torch.ones(3, 2), "backbone.a": torch.ones(1)}
    values, fates = fit(found(tensors), targets, ClassNames(("a", "b", "c"), ("d", "e", "f")))
    assert set(values) == {"backbone.a"} and outcome(fates)["head.weight"] == "missing"
    assert fates[0].reason == "rows of other classes; none is called the same"


def test_equal_names_are_loaded_as_they_are():
    value = torch.arange(6.0).view(3, 2)
    names = ClassNames(("a", "b", "c"), ("a", "b", "c"))
    values, (fate,) = fit(found({"head.weight": value}), {"head.weight": torch.zeros(3, 2)}, names)
    assert values["head.weight"] is value and fate.outcome == "loaded" and names.kept == ()


def test_box_rows_of_one_class_get_a_background():
    name = "roi_heads.box_predictor.0.bbox_pred.weight"
    value = torch.randn(4, 3)
    values, (fate,) = fit(found({name: value}), {name: torch.zeros(8, 3)}, NO_NAMES)
    assert torch.equal(values[name], torch.cat((torch.zeros(4, 3), value))) and fate.outcome == "resized"


def test_box_rows_of_the_proposals_are_no_class_rows():
    name = "rpn.head.bbox_pred.weight"
    values, (fate,) = fit(found({name: torch.zeros(8, 3, 1, 1)}), {name: torch.zeros(12, 3, 1, 1)}, NO_NAMES)
    assert not values and fate.reason == "shape (8, 3, 1, 1) in the file, (12, 3, 1, 1) in the model"


def test_final_norm_becomes_the_norm_of_the_last_map():
    source = found({"final_norm.weight": torch.ones(4), "backbone.x": torch.ones(1)})
    targets = {"backbone.norm1.weight": torch.zeros(2), "backbone.norm3.weight": torch.zeros(4)}
    assert set(final_norm_as_last(source, targets).tensors) == {"backbone.norm3.weight", "backbone.x"}
    assert final_norm_as_last(source, {}) is source


def test_torchvision_detectors_number_classes_by_raw_coco_ids():
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    predictor = "roi_heads.box_predictor.cls_score.weight"
    source = found({predictor: torch.zeros(91, 2)}, family="torchvision")
    names = class_names_of(source, None, None, {predictor: torch.zeros(81, 2)})
    assert names.file == tuple(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])
    assert len(names.model) == 80 and "N/A" not in names.model
    assert names.model.index("toothbrush") == 79 and names.file.index("toothbrush") == 89
    assert class_names_of(source, None, None, {predictor: torch.zeros(91, 2)}).model is None
    assert class_names_of(source, None, ["cat"], {predictor: torch.zeros(2, 2)}).model == ("cat",)


def test_names_of_the_file_win_over_what_is_known_of_its_family():
    predictor = "roi_heads.box_predictor.cls_score.weight"
    source = found({predictor: torch.zeros(91, 2)}, family="torchvision")
    assert class_names_of(source, ["a"], None, {}).file == ("a",)
    assert class_names_of(found({}), None, None, {}) == NO_NAMES
