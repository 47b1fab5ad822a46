"""Plain values, from YAML or a command line, into typed dataclasses, with a word on everything that is wrong."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from swin_dense.errors import ConfigError

Schema = TypeVar("Schema")
# YAML 1.1 takes 1e-4 for text: it wants 1.0e-4.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def build(schema: type[Schema], values: Mapping[str, Any], where: str, prefix: str = "") -> Schema:
    """Make a dataclass of plain values; fields that are dataclasses themselves are built from mappings.

    Args:
        schema: The dataclass.
        values: Values by field name; what is left out keeps its default.
        where: What to call the source in messages, such as a file name.
        prefix: The dotted path to this part, ending in a dot, or nothing.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type.
    """
    hints = get_type_hints(schema)
    fields = {}
    for key, value in values.items():
        if key not in hints:
            name = str(key)  # YAML reads yes, no, on and off as true and false
            raise ConfigError(f"{where}: unknown key {prefix + name!r}{did_you_mean(name, list(hints))}")
        fields[key] = convert(hints[key], value, where, prefix + key)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        if field.name not in fields and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key {prefix + field.name!r} is missing; it has no default.")
    return schema(**fields)


def convert(hint: Any, value: Any, where: str, key: str) -> Any:  # noqa: ANN401 - any hint, any value
    """One value as its type hint wants it: numbers, text, tuples, literals, unions of these, dataclasses.

    Raises:
        ConfigError: The value has another type.
    """
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} must hold keys and values, got {value!r}.")
        return build(hint, value, where, f"{key}.")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where, key)
    if origin is Literal and value in arguments:
        return value
    if origin in (tuple, Sequence) and isinstance(value, Sequence) and not isinstance(value, str):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        item_hints = arguments if fixed else (arguments[0],) * len(value)
        if len(item_hints) == len(value):
            return tuple(convert(item, part, where, key) for item, part in zip(item_hints, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    elif hint in (int, str, bool, type(None)) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: {key} must be {describe(hint)}, got {value!r}.")


def _convert_union(hints: Sequence[Any], value: Any, where: str, key: str) -> Any:  # noqa: ANN401
    for hint in hints:
        try:
            return convert(hint, value, where, key)
        except ConfigError:
            continue
    raise ConfigError(f"{where}: {key} must be {' or '.join(describe(hint) for hint in hints)}, got {value!r}.")


def describe(hint: Any) -> str:  # noqa: ANN401
    """A type hint in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, Sequence):
        if origin is Sequence or arguments[-1] is Ellipsis:
            return f"a list of {_PLURALS.get(arguments[0], 'values')}"
        return f"a list of {len(arguments)} values"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, "keys and values")


def override(values: dict[str, Any], assignment: str, schema: type) -> None:
    """Apply one "key=value" of the command line to nested plain values, in place.

    Args:
        values: The nested mapping.
        assignment: A dotted key, "=", and a YAML value.
        schema: The dataclass that `values` will be built into; tells the known keys.

    Raises:
        ConfigError: The text is not an assignment, the value has another type, or the key is unknown; the nearest
            known one is suggested.
    """
    key, separator, text = assignment.partition("=")
    known = list(keys(schema))
    if not separator:
        raise ConfigError(f"command line: {assignment!r} is not key=value{did_you_mean(key, known)}")
    if key not in known and not any(key.startswith(f"{name}.") for name in _free_keys(schema)):
        leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        suggestion = f"; did you mean {leaf[0]!r}?" if leaf else did_you_mean(key, known)
        raise ConfigError(f"command line: unknown key {key!r}{suggestion}")
    import yaml  # only a command line needs it

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"command line: the value of {key} cannot be read: {error}") from None
    if key in known:
        convert(_hint_of(schema, key), value, "command line", key)  # later, the recipe would be blamed
    *path, leaf_name = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"command line: {key} cannot be set, the recipe has {part}={values!r} without keys.")
    values[leaf_name] = value


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of all values of a nested dataclass."""
    for name, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _hint_of(schema: type, key: str) -> Any:  # noqa: ANN401
    hint: Any = schema
    for name in key.split("."):
        hint = get_type_hints(hint)[name]
    return hint


def _free_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Names whose value is a mapping with keys of its own."""
    for name, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _free_keys(hint, f"{prefix}{name}.")
        elif get_origin(hint) is dict:
            yield prefix + name


def plain(value: Any) -> Any:  # noqa: ANN401
    """A dataclass as nested mappings and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def did_you_mean(word: str, known: list[str]) -> str:
    """The end of an error message about an unknown word: the nearest known one, or all of them."""
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}."
