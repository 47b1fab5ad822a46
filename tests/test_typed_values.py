from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from swin_dense.errors import ConfigError
from swin_dense.typed_values import build, convert, describe, keys, override, plain


@dataclass(frozen=True, kw_only=True)
class Wheel:
    inches: int = 28
    spokes: tuple[int, ...] = ()
    size_hw: tuple[int, int] = (1, 2)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bicycle:
    name: str
    kind: Literal["race", "city"] = "city"
    kilograms: float = 12.0
    price: float | None = None
    lamps: bool = True
    parts: str | tuple[str, ...] | None = None
    wheel: Wheel = field(default_factory=Wheel)


def test_build_is_the_inverse_of_plain():
    bicycle = Bicycle(name="a", kind="race", parts=("x", "y"), wheel=Wheel(spokes=(3, 5), extra={"b": [1, {"c": 2}]}))
    values = plain(bicycle)
    assert values["parts"] == ["x", "y"] and values["wheel"]["size_hw"] == [1, 2]
    assert build(Bicycle, values, "test") == bicycle


def test_build_keeps_defaults_and_takes_whole_numbers_for_numbers():
    bicycle = build(Bicycle, {"name": "a", "kilograms": 9, "price": 7}, "test")
    assert bicycle == Bicycle(name="a", kilograms=9.0, price=7.0)
    assert type(bicycle.kilograms) is float and type(bicycle.price) is float


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4", "1e-04"])
def test_numbers_may_have_an_exponent_without_a_point(text):
    assert convert(float, text, "w", "k") == 1e-4
    assert convert(float | None, text, "w", "k") == 1e-4
    values = {"name": "a"}
    override(values, f"kilograms={text}", Bicycle)
    assert build(Bicycle, values, "w").kilograms == 1e-4


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("name", 3, "text"),
        ("name", None, "text"),
        ("kilograms", "many", "a number"),
        ("kilograms", "e4", "a number"),
        ("kilograms", True, "a number"),
        ("price", [1.0], "a number or null"),
        ("lamps", 1, "true or false"),
        ("kind", "tandem", "one of race, city"),
        ("parts", 3, "text or a list of texts or null"),
        ("parts", ["a", 3], "text or a list of texts or null"),
        ("wheel", 3, "keys and values"),
    ],
)
def test_wrong_type_says_wanted_and_got(key, value, wanted):
    with pytest.raises(ConfigError) as caught:
        build(Bicycle, {"name": "a", key: value}, "file.yaml")
    message = str(caught.value)
    assert message.startswith("file.yaml: ") and key in message
    assert "must " in message and wanted in message and f"got {value!r}" in message


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("inches", 28.0, "a whole number, got 28.0"),
        ("inches", True, "a whole number, got True"),
        ("spokes", 3, "a list of whole numbers, got 3"),
        ("spokes", "345", "a list of whole numbers, got '345'"),
        ("size_hw", [1, 2, 3], "a list of 2 values, got [1, 2, 3]"),
        ("extra", [1], "keys and values, got [1]"),
    ],
)
def test_wrong_type_in_a_part_names_the_whole_key(key, value, wanted):
    with pytest.raises(ConfigError) as caught:
        build(Bicycle, {"name": "a", "wheel": {key: value}}, "f")
    assert str(caught.value) == f"f: wheel.{key} must be {wanted}."


def test_wrong_item_is_named():
    with pytest.raises(ConfigError, match=r"f: wheel\.spokes must be a whole number, got 'b'"):
        build(Bicycle, {"name": "a", "wheel": {"spokes": [1, "b"]}}, "f")


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"f: unknown key 'wheel\.inch'; did you mean 'inches'\?"):
        build(Bicycle, {"name": "a", "wheel": {"inch": 3}}, "f")


def test_unknown_key_that_yaml_took_for_a_truth_value():
    with pytest.raises(ConfigError, match="f: unknown key 'True'; known are"):
        build(Bicycle, {"name": "a", True: 3}, "f")


def test_missing_field_is_named():
    with pytest.raises(ConfigError, match=r"f: .*'name'"):
        build(Bicycle, {}, "f")


def test_keys_are_dotted():
    names = ["name", "kind", "kilograms", "price", "lamps", "parts"]
    assert list(keys(Bicycle)) == [*names, "wheel.inches", "wheel.spokes", "wheel.size_hw", "wheel.extra"]


def test_describe_uses_words():
    assert describe(tuple[float, float]) == "a list of 2 values"
    assert describe(int | None) == "a whole number or null"
    assert describe(dict[str, Any]) == "keys and values"


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("name=b", {"name": "b"}),
        ("price=", {"price": None}),
        ("name=a=b", {"name": "a=b"}),
        ("wheel.inches=26", {"wheel": {"inches": 26}}),
        ("wheel.spokes=[1, 2]", {"wheel": {"spokes": [1, 2]}}),
        ("wheel.extra.deep.er=x", {"wheel": {"extra": {"deep": {"er": "x"}}}}),
        ("wheel.extra={a: 1}", {"wheel": {"extra": {"a": 1}}}),
    ],
)
def test_override_sets_one_value(assignment, expected):
    values = {}
    override(values, assignment, Bicycle)
    assert values == expected


def test_override_leaves_the_neighbours():
    values = {"name": "a", "wheel": {"inches": 26, "extra": {"a": 1}}}
    override(values, "wheel.extra.b=2", Bicycle)
    assert values == {"name": "a", "wheel": {"inches": 26, "extra": {"a": 1, "b": 2}}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inches=3", "unknown key 'inches'; did you mean 'wheel.inches'?"),
        ("wheel.inchs=3", "unknown key 'wheel.inchs'; did you mean 'wheel.inches'?"),
        ("lamp.spokes=[3]", "unknown key 'lamp.spokes'; did you mean 'wheel.spokes'?"),
        ("wheel=3", "unknown key 'wheel'"),
        ("kilograms=many", "kilograms must be a number, got 'many'"),
        ("wheel.spokes=3", "wheel.spokes must be a list of whole numbers, got 3"),
        ("zzz=3", "unknown key 'zzz'; known are kilograms, kind"),
        ("name", "'name' is not key=value"),
        ("wheel.spokes=[1,", "the value of wheel.spokes cannot be read"),
    ],
)
def test_override_says_what_is_wrong(assignment, message):
    with pytest.raises(ConfigError) as caught:
        override({}, assignment, Bicycle)
    assert str(caught.value).startswith("command line: ") and message in str(caught.value)


@pytest.mark.parametrize("value", [None, "big", 3])
def test_override_below_a_value_without_keys_is_refused(value):
    with pytest.raises(ConfigError, match=r"wheel\.inches cannot be set, the recipe has wheel="):
        override({"wheel": value}, "wheel.inches=3", Bicycle)
