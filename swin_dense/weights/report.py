"""The receipt of loading weights: what became of every tensor of the file and of the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["loaded", "permuted", "resized", "missing", "unused"]

OUTCOMES: tuple[Outcome, ...] = ("loaded", "permuted", "resized", "missing", "unused")
_GROUPS = (
    ("patch_embed.", "patch embedding"),
    ("absolute_pos_embed", "position embedding"),
    ("layers.0.", "stage 1"),
    ("layers.1.", "stage 2"),
    ("layers.2.", "stage 3"),
    ("layers.3.", "stage 4"),
    ("norm", "output norms"),
    ("final_norm.", "classifier"),
    ("head.", "classifier"),
    ("fpn.", "pyramid"),
    ("rpn.", "proposals"),
    ("roi_heads.box", "box head"),
    ("roi_heads.mask", "mask head"),
    ("decode_head.", "decoder"),
    ("auxiliary_head.", "auxiliary head"),
)
OTHER_GROUP = "other"
_BACKBONE_GROUPS = {group for _, group in _GROUPS[:7]}


def group_of(name: str) -> str:
    """The part of a model that a parameter belongs to, in words; by own name."""
    name = name.removeprefix("backbone.")
    return next((group for start, group in _GROUPS if name.startswith(start)), OTHER_GROUP)


@dataclass(frozen=True)
class Fate:
    """What became of one tensor.

    Attributes:
        name: The model's name for it; the file's for one that was not used.
        group: The part of the model it belongs to, see `group_of`.
        outcome: "loaded" as it is, "permuted" and "resized" are loaded with other values, "missing" is a parameter of
            the model that keeps its value, "unused" a tensor of the file.
        numbers: How many numbers it holds.
        reason: Why it did not simply load; empty where it did.
    """

    name: str
    group: str
    outcome: Outcome
    numbers: int
    reason: str = ""


@dataclass(frozen=True)
class WeightsReport:
    """What became of every tensor.

    Attributes:
        source: The file, or "state dict".
        family: Whose format it is: "official", "mmdet", "mmseg", "detectron2", "torchvision", "timm", "huggingface",
            "smp" or "swin_dense".
        variant: The published variant in the file, such as "swin_t"; None for other sizes or an unknown window.
        head: What the file has on its backbone: "classifier", "mask_rcnn", "cascade_mask_rcnn", "upernet" or None.
        fates: One for each parameter of the model and each tensor of the file that was not used.
        kept_classes: Classes whose rows were taken by name, where the file's classes are not the model's.
        notes: What else the reader chose, such as averaged weights instead of plain ones.
    """

    source: str
    family: str
    variant: str | None
    head: str | None
    fates: tuple[Fate, ...]
    kept_classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The model's parameters that were set, permuted and resized ones among them."""
        return tuple(fate.name for fate in self.fates if fate.outcome in ("loaded", "permuted", "resized"))

    @property
    def permuted(self) -> tuple[str, ...]:
        """Those whose values were put into another order."""
        return self._named("permuted")

    @property
    def resized(self) -> tuple[str, ...]:
        """Those whose values were fitted to another size."""
        return self._named("resized")

    @property
    def missing(self) -> tuple[str, ...]:
        """The model's parameters that keep their values."""
        return self._named("missing")

    @property
    def unused(self) -> tuple[str, ...]:
        """The file's tensors that the model has no place for."""
        return self._named("unused")

    def _named(self, outcome: Outcome) -> tuple[str, ...]:
        return tuple(fate.name for fate in self.fates if fate.outcome == outcome)

    @property
    def share(self) -> float:
        """The share of the model's numbers that were loaded, 0 to 1."""
        return _loaded_share(self.fates)

    @property
    def backbone_share(self) -> float:
        """The share of the backbone's numbers that were loaded, 0 to 1."""
        return _loaded_share([fate for fate in self.fates if fate.group in _BACKBONE_GROUPS])

    def __str__(self) -> str:
        """A few lines: what was recognised, how much of it is loaded, and each reason why something is not."""
        what = ", ".join(filter(None, (f"{self.family} format", self.variant, self.head)))
        wanted = sum(fate.numbers for fate in self.fates if fate.outcome != "unused")
        lines = [
            f"weights: {self.source} ({what}): {percent(self.backbone_share)} of the backbone, "
            f"{percent(self.share)} of the model's {wanted:,} parameters"
        ]
        for outcome in OUTCOMES[1:]:
            reasons: dict[str, list[Fate]] = {}
            for fate in self.fates:
                if fate.outcome == outcome:
                    reasons.setdefault(fate.reason, []).append(fate)
            for reason, fates in reasons.items():
                numbers = sum(fate.numbers for fate in fates)
                groups = ", ".join(Counter(fate.group for fate in fates))
                names = f": {a_few([fate.name for fate in fates])}" if outcome in ("missing", "unused") else ""
                lines.append(f"  {outcome}: {numbers:,} of {groups}: {reason}{names}")
        if self.kept_classes:
            lines.append(f"  classes kept by name: {a_few(self.kept_classes)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def by_group(self) -> list[tuple[str, dict[Outcome, int], str]]:
        """For each part of the model, in the order of its parameters: its name, numbers by outcome, and the reasons."""
        groups: dict[str, list[Fate]] = {}
        for fate in self.fates:
            groups.setdefault(fate.group, []).append(fate)
        return [
            (
                group,
                {outcome: sum(fate.numbers for fate in fates if fate.outcome == outcome) for outcome in OUTCOMES},
                "; ".join(Counter(fate.reason for fate in fates if fate.reason)),
            )
            for group, fates in groups.items()
        ]


def _loaded_share(fates: Sequence[Fate]) -> float:
    wanted = [fate for fate in fates if fate.outcome != "unused"]
    loaded = sum(fate.numbers for fate in wanted if fate.outcome != "missing")
    return loaded / max(sum(fate.numbers for fate in wanted), 1)


def percent(share: float) -> str:
    """A share with one digit, rounded down, so that 100.0% means all."""
    return f"{math.floor(share * 1000) / 10:.1f}%"


def a_few(names: Sequence[str], shown: int = 3) -> str:
    """How many names there are, and the first of them."""
    return f"{len(names)} ({', '.join(names[:shown])}{', …' if len(names) > shown else ''})"
