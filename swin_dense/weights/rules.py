"""Rules that say how one family writes a parameter, read in both directions.

A rule pairs this library's names with a file's. `{stage}` stands for a number, `{stage+1}`, `{2*stage+1}` or
`{2-level}` for what the file counts instead, a final `*` for the rest of the name. A rule may join or split tensors and
may change their values; it then has both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from swin_dense.errors import CheckpointError

Convert = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Bindings = dict[str, int | str]


def keep(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The values as they are."""
    return tensors


@dataclass(frozen=True)
class Rule:
    """How one family writes some parameters.

    Attributes:
        own: Names in this library, one or several that belong together.
        file: Names in the file. One that ends in "?" may be absent; it is then neither wanted nor written.
        to_own: The file's tensors, in the order of `file`, to this library's.
        to_file: The inverse.
        change: What happens to the values, for the receipt; empty where they stay as they are.
    """

    own: tuple[str, ...]
    file: tuple[str, ...]
    to_own: Convert = keep
    to_file: Convert = keep
    change: str = ""


@dataclass(frozen=True)
class Translated:
    """What rules made of tensors.

    Attributes:
        tensors: By new name.
        changes: What happened to the values, by new name, where anything did.
        origins: The old name, the first one where several were joined, by new name.
        rest: The tensors that no rule speaks of, by old name.
    """

    tensors: dict[str, Tensor]
    changes: dict[str, str]
    origins: dict[str, str]
    rest: dict[str, Tensor]


def rename(own: str, file: str) -> Rule:
    """The same tensor under another name."""
    return Rule((own,), (file,))


def to_own_names(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> Translated:
    """A file's tensors under this library's names. The first rule that fits a name is taken.

    Raises:
        CheckpointError: A tensor has a shape that its rule cannot convert.
    """
    return _translate(tensors, [(rule, rule.file, rule.own, rule.to_own) for rule in rules])


def to_file_names(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> Translated:
    """The inverse of `to_own_names`."""
    return _translate(tensors, [(rule, rule.own, rule.file, rule.to_file) for rule in rules])


def _translate(
    tensors: Mapping[str, Tensor], rules: Iterable[tuple[Rule, tuple[str, ...], tuple[str, ...], Convert]]
) -> Translated:
    rest, translated, changes, origins = dict(tensors), dict[str, Tensor](), dict[str, str](), dict[str, str]()
    for rule, old_names, new_names, convert in rules:
        for name in list(rest):
            bindings = match(old_names[0].removesuffix("?"), name)
            if bindings is None or _is_optional(name, old_names):
                continue
            sources = {old: fill(old.removesuffix("?"), bindings) for old in old_names}
            if any(source not in rest for old, source in sources.items() if not old.endswith("?")):
                continue
            values = _converted([rest.pop(source) for source in sources.values() if source in rest], convert, name)
            for new, value in zip(new_names, values, strict=False):  # optional names may have no value
                target = fill(new.removesuffix("?"), bindings)
                translated[target], origins[target] = value, name
                if rule.change:
                    changes[target] = rule.change
    return Translated(translated, changes, origins, rest)


def _is_optional(name: str, names: tuple[str, ...]) -> bool:
    return any(match(optional.removesuffix("?"), name) is not None for optional in names if optional.endswith("?"))


def _converted(values: Sequence[Tensor], convert: Convert, name: str) -> Sequence[Tensor]:
    try:
        return convert(values)
    except (RuntimeError, ValueError, IndexError):
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise CheckpointError(f"{name} has shape {shapes}, which no Swin has there") from None


def match(template: str, name: str) -> Bindings | None:
    """What the placeholders of a template stand for in a name, or None where it does not fit.

    Example:
        >>> match("layers.{stage+1}.downsample.*", "layers.3.downsample.norm.bias")
        {'stage': 2, '*': 'norm.bias'}
    """
    pattern, placeholders = _compiled(template)
    found = pattern.fullmatch(name)
    if found is None:
        return None
    bindings: Bindings = {}
    for (variable, factor, offset), text in zip(placeholders, found.groups(), strict=True):
        if variable == "*":
            bindings["*"] = text
            continue
        value, remainder = divmod(int(text) - offset, factor)
        if remainder or value < 0 or bindings.setdefault(variable, value) != value:
            return None
    return bindings


def fill(template: str, bindings: Bindings) -> str:
    """The name that a template gives for these values; the inverse of `match`."""

    def value_of(found: re.Match[str]) -> str:
        if found[0] == "*":
            return str(bindings["*"])
        variable, factor, offset = _parse(found[1])
        return str(factor * int(bindings[variable]) + offset)

    return _PLACEHOLDER.sub(value_of, template)


_NUMBER = "(0|[1-9][0-9]{0,3})"
_PLACEHOLDER = re.compile(r"\{([^}]+)\}|\*")
_EXPRESSION = re.compile(
    r"(?:(?P<factor>\d+)\*)?(?P<variable>[a-z]+)(?:\+(?P<offset>\d+))?|(?P<start>\d+)-(?P<down>[a-z]+)"
)


@cache
def _compiled(template: str) -> tuple[re.Pattern[str], list[tuple[str, int, int]]]:
    pattern, placeholders, end = "", [], 0
    for found in _PLACEHOLDER.finditer(template):
        pattern += re.escape(template[end : found.start()]) + (r"(.+)" if found[0] == "*" else _NUMBER)
        placeholders.append(("*", 1, 0) if found[0] == "*" else _parse(found[1]))
        end = found.end()
    return re.compile(pattern + re.escape(template[end:])), placeholders


@cache
def _parse(expression: str) -> tuple[str, int, int]:
    """(variable, factor, offset) of "stage", "stage+1", "2*stage+1" or "2-level"."""
    found = _EXPRESSION.fullmatch(expression)
    assert found, f"not a placeholder: {{{expression}}}"
    if found["down"]:
        return found["down"], -1, int(found["start"])
    return found["variable"], int(found["factor"] or 1), int(found["offset"] or 0)
