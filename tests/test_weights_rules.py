import pytest
import torch

from swin_dense.errors import CheckpointError
from swin_dense.weights.rules import Rule, fill, match, rename, to_file_names, to_own_names

JOINED = Rule(
    ("own.{i}.qk",),
    ("file.{i}.attention.q", "file.{i}.attention.k"),
    lambda parts: [torch.cat(list(parts))],
    lambda parts: parts[0].chunk(2),
    change="joined",
)
OPTIONAL = Rule(
    ("own.rows.*",),
    ("file.rows.*", "file.spare_*?"),
    lambda parts: [torch.cat([*parts[1:], parts[0]])],
    lambda parts: [parts[0][1:], parts[0][:1]] if parts[0][:1].any() else [parts[0][1:]],
)
RULES = (
    rename("own.{i}.down.*", "file.{2*i+2}.d.*"),
    rename("own.{i}.{j}.*", "file.{2*i+1}.{j}.*"),
    rename("own.fpn.{2-level}.*", "file.fpn.{level}.*"),
    JOINED,
    OPTIONAL,
)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("template", "bindings", "name"),
    [
        ("a.{i}.b", {"i": 3}, "a.3.b"),
        ("a.{i+1}.*", {"i": 0, "*": "x.y"}, "a.1.x.y"),
        ("{2*i+1}.{j}.*", {"i": 3, "j": 12, "*": "w"}, "7.12.w"),
        ("a{2-level}", {"level": 2}, "a0"),
        ("a.b", {}, "a.b"),
    ],
)
def test_match_inverts_fill(template, bindings, name):
    assert fill(template, bindings) == name
    assert match(template, name) == bindings


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("a.{i+1}.b", "a.0.b"),  # would be -1
        ("a.{2*i+1}.b", "a.4.b"),  # no whole number
        ("a{2-level}", "a3"),
        ("a.{i}.b", "a.3.b.c"),
        ("a.*", "a."),
        ("a.{i}", "a.x"),
        ("a.b", "a_b"),  # a dot is a dot
    ],
)
def test_match_refuses_what_fill_cannot_make(template, name):
    assert match(template, name) is None


def test_match_wants_the_same_number_for_the_same_placeholder():
    assert match("{i}.{i+1}", "3.4") == {"i": 3}
    assert match("{i}.{i+1}", "3.5") is None


@pytest.mark.parametrize("spare", [0.0, 1.0])
def test_translation_there_and_back_is_the_identity(spare):
    own = {
        "own.1.down.weight": torch.randn(3),
        "own.1.4.norm.bias": torch.randn(2),
        "own.fpn.0.weight": torch.randn(5),
        "own.2.qk": torch.randn(6),
        "own.rows.weight": torch.tensor([spare, 2.0, 3.0]),
    }
    there = to_file_names(own, RULES)
    assert set(there.tensors) >= {
        "file.4.d.weight",
        "file.3.4.norm.bias",
        "file.fpn.2.weight",
        "file.2.attention.q",
        "file.2.attention.k",
    }
    assert ("file.spare_weight" in there.tensors) is bool(spare)
    assert not there.rest
    back = to_own_names(there.tensors, RULES)
    assert equal({**back.tensors}, {**own, "own.rows.weight": own["own.rows.weight"][0 if spare else 1 :]})
    assert back.changes == {"own.2.qk": "joined"}
    assert back.origins["own.1.down.weight"] == "file.4.d.weight" and back.origins["own.2.qk"] == "file.2.attention.q"


def test_what_no_rule_names_is_left_and_nothing_is_lost():
    tensors = {"stranger": torch.ones(1), "file.0.attention.q": torch.ones(2), "file.1.9.x": torch.ones(3)}
    found = to_own_names(tensors, RULES)
    assert set(found.rest) == {"stranger", "file.0.attention.q"}  # a query without its key is not joined
    assert set(found.tensors) == {"own.0.9.x"}


def test_the_first_rule_that_fits_is_taken():
    rules = (rename("own.special.*", "file.a.*"), rename("own.*", "file.*"))
    found = to_own_names({"file.a.w": torch.ones(1), "file.b.w": torch.ones(1)}, rules)
    assert set(found.tensors) == {"own.special.w", "own.b.w"}


def test_shapes_that_cannot_be_converted_are_refused():
    with pytest.raises(CheckpointError, match=r"file\.0\.attention\.q has shape \(2,\), \(\), which no Swin has there"):
        to_own_names({"file.0.attention.q": torch.ones(2), "file.0.attention.k": torch.tensor(1.0)}, RULES)
