"""What the data check can find, how bad each kind is and what a cleaned copy does about it; one record, one report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        severity: "error" hurts training or scores, or stops them; "note" is handled by the loaders or changes nothing
            that is learned, but is worth knowing.
        meaning: What it is.
        cleaned: What a cleaned copy has instead.
    """

    severity: Literal["error", "note"]
    meaning: str
    cleaned: str


_REMOVED = "entry removed"
_IMAGE_REMOVED = "image removed with its annotations or label picture"
_PAIR_REMOVED = "pair removed"
_AS_IT_IS = "as it is"
_FROM_MASK = "box of the segmentation; annotation removed where there is none"

KINDS: dict[str, Kind] = {
    # Annotation files
    "file-unreadable": Kind("error", "an annotation file that cannot be read, beside one that can", "left out"),
    "json-repeated-key": Kind(
        "error", "a key stands twice in one JSON object", "the last value, as other readers take"
    ),
    "id-not-whole": Kind("error", 'an id written as 7.0 or "7"', "the whole number"),
    # Categories
    "category-invalid": Kind("error", "a category without a whole number as id", _REMOVED),
    "category-unnamed": Kind("error", "a category without a name", 'named "category <id>"'),
    "category-id-zero": Kind("note", "a category id of 0, which some tools take for background", _AS_IT_IS),
    "category-repeated-id": Kind("error", "two categories with one id", "the first one kept"),
    "category-repeated-name": Kind("error", "two categories with one name", "the id added to the name"),
    "categories-differ": Kind(
        "error", "splits with different categories", "all categories, with the same ids, in each"
    ),
    "category-unused": Kind("note", "categories without an annotation", _AS_IT_IS),
    # Image entries
    "image-invalid": Kind("error", "an image entry without a whole number as id, or without a file name", _REMOVED),
    "image-repeated-id": Kind("error", "two images with one id", "the first one kept"),
    "image-outside-folder": Kind(
        "error",
        "a file name that leads out of the image folder",
        "the file in the folder that is meant; image removed where there is none",
    ),
    "image-size-invalid": Kind("error", "a width or height that no picture can have", "the picture's own size"),
    "image-size-missing": Kind("note", "no width or height in the file", "the picture's own size"),
    "image-size-differs": Kind(
        "error", "another size than the picture has; its annotations are not checked", _IMAGE_REMOVED
    ),
    "image-without-objects": Kind("note", "images without an annotation", _AS_IT_IS),
    "image-not-listed": Kind("note", "pictures in the folder that no annotation file names", _AS_IT_IS),
    # Picture files
    "picture-missing": Kind("error", "a picture that is not there", _IMAGE_REMOVED),
    "picture-misnamed": Kind(
        "error", "a picture that is there under another folder, ending or case", "the file name corrected"
    ),
    "picture-empty": Kind("error", "a picture file of zero bytes", _IMAGE_REMOVED),
    "picture-damaged": Kind("error", "a picture that is cut short or damaged", _IMAGE_REMOVED),
    "picture-foreign": Kind("error", "a file that is no picture, or of a kind that cannot be used", _IMAGE_REMOVED),
    "picture-too-large": Kind(
        "error", "a picture of more pixels than are read, 89 million or --max-pixels", _IMAGE_REMOVED
    ),
    "picture-animated": Kind("error", "more than one frame in a file", _IMAGE_REMOVED),
    "picture-turned": Kind("note", "a picture that EXIF says to turn", _AS_IT_IS),
    "picture-converted": Kind("note", "not 8-bit RGB in the file; converted on reading", _AS_IT_IS),
    "picture-linked-out": Kind("note", "a link that leads out of the image folder", _AS_IT_IS),
    "picture-repeated": Kind("note", "the same picture twice in one split", _AS_IT_IS),
    "picture-in-two-splits": Kind("error", "the same picture in two splits", "removed from the training split"),
    # Annotations
    "annotation-invalid": Kind("error", "an annotation that is no JSON object", _REMOVED),
    "annotation-id-invalid": Kind("error", "an id that is no whole number", "annotations numbered anew from 1"),
    "annotation-id-repeated": Kind("error", "two annotations with one id", "annotations numbered anew from 1"),
    "annotation-id-zero": Kind("note", "an id of 0, which other tools score as no match", "annotations numbered anew"),
    "annotation-image-unknown": Kind("error", "an image_id that no image has", _REMOVED),
    "annotation-category-unknown": Kind("error", "a category_id that no category has", _REMOVED),
    "annotation-repeated": Kind("note", "the same object annotated twice", "the first one kept"),
    "crowd-invalid": Kind("error", "iscrowd that is neither 0 nor 1", "1: neither learned nor counted"),
    "ignore-invalid": Kind("error", "ignore that is neither 0 nor 1", "1: neither learned nor counted"),
    "crowd-missing": Kind("note", "no iscrowd", "0"),
    "area-invalid": Kind("error", "an area that is negative or no number", "the area of the segmentation"),
    "area-missing": Kind("note", "no area", "the area of the segmentation"),
    "area-differs": Kind("note", "an area far from that of the segmentation", "the area of the segmentation"),
    "box-missing": Kind("note", "no bbox", _FROM_MASK),
    "box-invalid": Kind("error", "a bbox that is not four finite numbers, or negative", _FROM_MASK),
    "box-xyxy": Kind("error", "boxes written as x1, y1, x2, y2", _FROM_MASK),
    "box-outside": Kind("error", "a box outside its image", _FROM_MASK),
    "box-partly-outside": Kind("note", "a box that reaches over the edge; clipped on reading", "clipped"),
    "box-normalised": Kind("error", "boxes written as shares of the image, 0 to 1, not in pixels", _FROM_MASK),
    "box-degenerate": Kind("error", "a box under 1 px around a larger segmentation; not trained on", _FROM_MASK),
    "box-thin": Kind("note", "an object under 1 px; not trained on", _FROM_MASK),
    "box-off-mask": Kind("error", "a box that overlaps its segmentation's box by less than half (IoU)", _FROM_MASK),
    "box-loose": Kind("note", "a box over 2 px from its segmentation's", _AS_IT_IS),
    "segmentation-missing": Kind("error", "no polygons and no run lengths; a box alone is not enough", _REMOVED),
    "polygon-short": Kind("error", "a polygon of less than three points", "polygon removed"),
    "polygon-invalid": Kind("error", "a coordinate that is no finite number or far outside", "polygon removed"),
    "polygon-unnested": Kind("note", "a polygon without its outer list", "in a list"),
    "polygon-outside": Kind("note", "a polygon that reaches over 2 px out of its image; clipped when drawn", _AS_IT_IS),
    "polygon-crossing": Kind("note", "a polygon that crosses itself; inside and outside swap there", _AS_IT_IS),
    "polygon-unexamined": Kind("note", "a polygon of too many points to look for crossings", _AS_IT_IS),
    "rle-size": Kind("error", "run lengths for another size than the image's", _REMOVED),
    "rle-invalid": Kind("error", "run lengths that cannot be decoded or do not fill the image", _REMOVED),
    "mask-empty": Kind("note", "a segmentation without a pixel; not trained on", _REMOVED),
    # Label pictures
    "partner-missing": Kind("error", "an image without a label picture, or the other way round", "left out"),
    "name-repeated": Kind("error", "two files of one name with different endings", "the first one kept"),
    "label-lossy": Kind("error", "a label picture in a format that changes values, such as JPEG", _PAIR_REMOVED),
    "label-colours": Kind(
        "error", "a label picture of colours instead of numbers", "grey where R = G = B, else removed"
    ),
    "label-mode": Kind(
        "error", "a label picture with transparency or floating point", "values kept where whole, else removed"
    ),
    "label-values": Kind(
        "error",
        "values that the classes do not know; --ignored-values names those without a class",
        "255, which is ignored",
    ),
    "label-size": Kind("error", "a label picture of another size than its image", _PAIR_REMOVED),
    "label-ignored": Kind("note", "a label picture without any labelled pixel", _AS_IT_IS),
    "class-unused": Kind("note", "classes without a pixel", _AS_IT_IS),
}
"""Every kind, in the order in which they are shown."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in one place.

    Attributes:
        kind: A key of `KINDS`.
        split: Name of the split.
        file: The annotation file, picture or folder that has it.
        reason: What is wrong there, with the values.
        image_id: As in the file; shortened text where it is no whole number.
        annotation_id: Likewise.
        entry: ("images", "annotations" or "categories", position in that list), for what is in an annotation file.
        other: The other file, where two are alike or belong together.
        count: How many entries this stands for.
    """

    kind: str
    split: str
    file: str
    reason: str
    image_id: int | str | None = None
    annotation_id: int | str | None = None
    entry: tuple[str, int] | None = None
    other: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KeyError(self.kind)

    @property
    def is_error(self) -> bool:
        """Whether this would hurt training or scores."""
        return KINDS[self.kind].severity == "error"


@dataclass
class Report:
    """Everything that was found in a data set.

    Attributes:
        findings: In the order of splits and files.
        statistics: Counts and histograms of each split.
        remarks: Sentences about the data as a whole.
    """

    findings: list[Finding] = field(default_factory=list)
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many entries have each kind that occurs: errors first, then in the order of `KINDS`."""
        counts: Counter[str] = Counter()
        for finding in self.findings:
            counts[finding.kind] += finding.count
        kinds = sorted(KINDS, key=lambda kind: KINDS[kind].severity != "error")
        return {kind: counts[kind] for kind in kinds if counts[kind]}

    def first(self, kind: str) -> Finding:
        """The first finding of a kind that occurs."""
        return next(finding for finding in self.findings if finding.kind == kind)

    @property
    def num_errors(self) -> int:
        """How many entries have something that would hurt training."""
        return sum(finding.count for finding in self.findings if finding.is_error)

    @property
    def num_notes(self) -> int:
        """How many entries have something worth knowing."""
        return sum(finding.count for finding in self.findings if not finding.is_error)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types.

        Returns:
            {"errors": int, "notes": int, "kinds": {kind: {"severity", "count", "meaning", "cleaned"}},
            "findings": [{"kind", "severity" and the fields of `Finding`}, …], "statistics": {split: {…}},
            "remarks": [text, …]}; the findings are all there, none is cut off.
        """
        return {
            "errors": self.num_errors,
            "notes": self.num_notes,
            "kinds": {kind: {**asdict(KINDS[kind]), "count": count} for kind, count in self.counts().items()},
            "findings": [{"severity": KINDS[finding.kind].severity, **asdict(finding)} for finding in self.findings],
            "statistics": self.statistics,
            "remarks": self.remarks,
        }


def kinds_by_position(findings: Iterable[Finding], split: str, section: str) -> Mapping[int, set[str]]:
    """Which kinds each entry of a section of a split's annotation file has, by its position there."""
    kinds: dict[int, set[str]] = {}
    for finding in findings:
        if finding.split == split and finding.entry is not None and finding.entry[0] == section:
            kinds.setdefault(finding.entry[1], set()).add(finding.kind)
    return kinds


def shown(value: object, limit: int = 60) -> str:
    """A value out of a file as short text that any terminal and any JSON file can hold."""
    # Slices first: a value may be megabytes long, or a number with more digits than Python prints.
    if isinstance(value, str | list):
        value = value[: limit + 1]
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too large to print"
    text = printable(text)
    return text if len(text) <= limit else f"{text[:limit]}…"


def printable(text: str) -> str:
    """Text that every encoding of Unicode can hold: JSON can smuggle in halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(printable(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
