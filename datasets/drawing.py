"""Pictures of annotations and predictions, drawn with Pillow alone.

Small images are enlarged by a whole factor first, so that names stay legible.
"""

import functools
import math
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from swin_dense.conventions import IGNORED_LABEL
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

Colour = tuple[int, int, int]

_LEAST_SIDE = 320
_MASK_OPACITY = 0.45
_PAGE_COLOUR = (255, 255, 255)
_TEXT_COLOUR = (35, 35, 40)
_BAR_COLOUR = (205, 210, 218)
_TRUE_COLOUR = (140, 205, 150)
_GAP = 8
_CLASS_LINES = 5


def class_colours(count: int) -> list[Colour]:
    """Colours (red, green, blue) that can be told apart; more of them always begin with the same ones."""
    colours = list(_colours_by_distance(min(count, 256)))
    return [colours[index % len(colours)] for index in range(count)]


def draw_instances(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    names: Sequence[str],
    masks: np.ndarray | None,
    scores: np.ndarray | None = None,
    *,
    label_map: LabelMap | None = None,
    scale: int | None = None,
) -> np.ndarray:
    """Draws objects over an image: translucent mask with an outline, box, and a tag with name and score.

    Args:
        image: (H, W, 3) uint8 RGB; stays as it is.
        boxes_xyxy: (N, 4) in pixels of `image`.
        names: N class names.
        masks: (N, H, W) bool or 0/1, of which the part inside the box is drawn; None draws boxes only.
        scores: (N,) fractions of 1, or None for annotations.
        label_map: Gives each class the colour of its index; without it a colour follows from the name alone.
        scale: Whole factor of enlargement; None makes the shorter side about 320 pixels or more.

    Returns:
        (scale * H, scale * W, 3) uint8 RGB.

    Raises:
        DataError: The image is not (H, W, 3) uint8, or lengths or sizes differ.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    _check_instances(image, boxes, names, masks, scores)
    factor = _checked_scale(image, scale)
    canvas = _enlarged(image, factor)
    colours = [_colour_of(name, label_map) for name in names]
    # Large ones first, so that none hides a smaller one.
    order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")
    if masks is not None:
        for row in order:
            _draw_mask(canvas, masks[row], boxes[row], colours[row], factor)
    draw = ImageDraw.Draw(canvas)
    line_width = max(1, round(min(canvas.size) / 220))
    for row in order:
        corners = _inside(boxes[row] * factor, canvas.size)
        draw.rectangle(corners, outline=colours[row], width=line_width)
    taken: list[tuple[float, float, float, float]] = []
    for row in order[::-1]:
        text = names[row] if scores is None else f"{names[row]} {scores[row]:.2f}"
        _draw_tag(draw, text, _inside(boxes[row] * factor, canvas.size), colours[row], canvas.size, taken)
    return np.array(canvas)


def draw_semantic(
    image: np.ndarray, label: np.ndarray, label_map: LabelMap, opacity: float = 0.6, *, scale: int | None = None
) -> np.ndarray:
    """Lays the colours of the classes over an image turned grey, with a legend below: classes present, largest first.

    Args:
        image: (H, W, 3) uint8 RGB; stays as it is.
        label: (H, W) class indices; pixels of value 255 show the image as it is.
        label_map: Names and colours of the classes.
        opacity: 0 shows the image alone (in grey), 1 the colours alone.
        scale: Whole factor of enlargement; None makes the shorter side about 320 pixels or more.

    Returns:
        (scale * H + height of the legend, scale * W, 3) uint8 RGB.

    Raises:
        DataError: Image and label differ in size, or the label holds a value that is no class.
    """
    _check_image(image)
    if label.shape != image.shape[:2]:
        raise DataError(f"Image and label must have the same size, got {image.shape[:2]} and {label.shape}.")
    values, counts = np.unique(label[label != IGNORED_LABEL], return_counts=True)
    if values.size and not 0 <= values[0] <= values[-1] < len(label_map):
        raise DataError(f"The label holds values from {values[0]} to {values[-1]}, wanted 0 to {len(label_map) - 1}.")
    factor = _checked_scale(image, scale)
    colours = class_colours(len(label_map))
    table = np.array([*colours, *[(0, 0, 0)] * (IGNORED_LABEL + 1 - len(colours))], dtype=np.uint8)
    canvas = _enlarged(image, factor)
    overlay = Image.fromarray(table[np.asarray(label, dtype=np.int64)]).resize(canvas.size, Image.Resampling.NEAREST)
    # Over grey, the colours stay those of the legend.
    tinted = Image.blend(canvas.convert("L").convert("RGB"), overlay, opacity)
    has_class = Image.fromarray(np.where(label == IGNORED_LABEL, 0, 255).astype(np.uint8))
    canvas.paste(tinted, mask=has_class.resize(canvas.size, Image.Resampling.NEAREST))
    present = [int(value) for value in values[np.argsort(-counts, kind="stable")]]
    legend = _legend([(label_map.names[value], colours[value]) for value in present], canvas.width)
    return np.concatenate([np.array(canvas), legend])


def draw_classification(
    image: np.ndarray, scores: np.ndarray, label_map: LabelMap, truth: int | None = None, *, scale: int | None = None
) -> np.ndarray:
    """Puts the classes with the highest scores below an image, each with a bar as long as its score.

    Args:
        image: (H, W, 3) uint8 RGB; stays as it is.
        scores: (K,) fractions of 1.
        label_map: Names of the classes.
        truth: The true class, whose bar is green; it gets a line even where its score is low.
        scale: Whole factor of enlargement; None makes the shorter side about 320 pixels or more.

    Returns:
        (scale * H + height of the lines, scale * W, 3) uint8 RGB.

    Raises:
        DataError: The image is not (H, W, 3) uint8, or there is not one score for each class.
    """
    _check_image(image)
    if scores.shape != (len(label_map),):
        raise DataError(f"Wanted one score for each of {len(label_map)} classes, got {scores.shape}.")
    canvas = _enlarged(image, _checked_scale(image, scale))
    shown = [int(index) for index in np.argsort(-scores, kind="stable")[:_CLASS_LINES]]
    if truth is not None and truth not in shown:
        shown[-1] = truth
    row_height = max(24, canvas.width // 18)
    font = _font(round(row_height * 0.6))
    strip = Image.new("RGB", (canvas.width, row_height * len(shown) + _GAP), _PAGE_COLOUR)
    draw = ImageDraw.Draw(strip)
    for row, index in enumerate(shown):
        top = _GAP / 2 + row * row_height
        length = float(scores[index]) * (canvas.width - 1)
        draw.rectangle((0, top, length, top + row_height - 4), fill=_TRUE_COLOUR if index == truth else _BAR_COLOUR)
        text = f"{scores[index]:.2f} {label_map.names[index]}{' (true)' if index == truth else ''}"
        text = _cut_to_width(text, font, canvas.width - 2 * _GAP)
        draw.text((_GAP, top + (row_height - 4) / 2), text, fill=_TEXT_COLOUR, font=font, anchor="lm")
    return np.concatenate([np.array(canvas), np.array(strip)])


def side_by_side(panels: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Puts pictures of any heights next to each other, top edges level, with a title above each.

    Args:
        panels: (H, W, 3) uint8 RGB each.
        titles: One for each panel; one that is wider than its panel is cut.

    Returns:
        (H, W, 3) uint8 RGB on white.

    Raises:
        DataError: There is no panel, the numbers differ, or a panel is not (H, W, 3) uint8.
    """
    if not panels or len(panels) != len(titles):
        raise DataError(f"Wanted one or more panels and as many titles, got {len(panels)} and {len(titles)}.")
    for panel in panels:
        _check_image(panel)
    font = _font(16)
    title_height = 16 + 2 * _GAP
    width = sum(panel.shape[1] for panel in panels) + _GAP * (len(panels) + 1)
    height = title_height + max(panel.shape[0] for panel in panels) + _GAP
    page = Image.new("RGB", (width, height), _PAGE_COLOUR)
    draw = ImageDraw.Draw(page)
    left = _GAP
    for panel, title in zip(panels, titles, strict=True):
        text = _cut_to_width(title, font, panel.shape[1])
        draw.text((left, title_height / 2), text, fill=_TEXT_COLOUR, font=font, anchor="lm")
        page.paste(Image.fromarray(panel), (left, title_height))
        left += panel.shape[1] + _GAP
    return np.array(page)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(f"Wanted an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}.")


def _check_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    masks: np.ndarray | None,
    scores: np.ndarray | None,
) -> None:
    _check_image(image)
    lengths = {"boxes": len(boxes), "names": len(names)}
    lengths |= {} if masks is None else {"masks": len(masks)}
    lengths |= {} if scores is None else {"scores": len(scores)}
    if len(set(lengths.values())) != 1:
        raise DataError(f"Every object needs one entry of each kind, got {lengths}.")
    if masks is not None and len(masks) and masks.shape[1:] != image.shape[:2]:
        raise DataError(f"Masks must have the image's size {image.shape[:2]}, got {masks.shape[1:]}.")
    if not np.isfinite(boxes).all():
        raise DataError(f"Box {np.argwhere(~np.isfinite(boxes))[0, 0]} is not finite.")


def _checked_scale(image: np.ndarray, scale: int | None) -> int:
    if scale is None:
        return max(1, math.ceil(_LEAST_SIDE / min(image.shape[:2]) - 0.25))
    if scale < 1:
        raise DataError(f"scale must be a whole number of 1 or more, got {scale}.")
    return scale


def _enlarged(image: np.ndarray, factor: int) -> Image.Image:
    picture = Image.fromarray(image)
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


@functools.lru_cache(maxsize=8)
def _colours_by_distance(count: int) -> tuple[Colour, ...]:
    """Picks, one after the other, the colour that is farthest in CIE L*a*b* from all before it."""
    steps = np.linspace(0, 255, 16)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _to_lab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    # Neither pale nor dark nor grey, so that they show on photographs; nor glaring.
    usable = (lab[:, 0] > 42) & (lab[:, 0] < 82) & (chroma > 34) & (chroma < 82)
    candidates, lab = candidates[usable], lab[usable]
    chosen = [int(np.argmin(np.linalg.norm(lab - (54, 62, 36), axis=1)))]
    distance = np.linalg.norm(lab - lab[chosen[0]], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return tuple((round(red), round(green), round(blue)) for red, green, blue in candidates[chosen].tolist())


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """Turns sRGB (N, 3) in 0..255 into CIE L*a*b* under daylight (D65), where distance is about what eyes see."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = linear @ to_xyz.T / (0.9505, 1.0, 1.089)
    root = np.where(relative > 216 / 24389, np.cbrt(relative), (relative * 24389 / 27 + 16) / 116)
    x, y, z = root.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def _colour_of(name: str, label_map: LabelMap | None) -> Colour:
    if label_map is not None and name in label_map.names:
        return class_colours(len(label_map))[label_map.names.index(name)]
    # crc32: Python's own hash of a string differs from run to run.
    return class_colours(32)[zlib.crc32(name.encode()) % 32]


def _draw_mask(canvas: Image.Image, mask: np.ndarray, box: np.ndarray, colour: Colour, factor: int) -> None:
    """Lays one mask over the canvas, in place; only the box's own rectangle is touched."""
    height, width = mask.shape
    left, top = max(math.floor(box[0]), 0), max(math.floor(box[1]), 0)
    right, bottom = min(math.ceil(box[2]), width), min(math.ceil(box[3]), height)
    if right <= left or bottom <= top:
        return
    # A rim of one pixel, so that the outline closes where the mask touches its box.
    crop = np.pad(mask[top:bottom, left:right].astype(bool), 1)
    size = (crop.shape[1] * factor, crop.shape[0] * factor)
    enlarged = Image.fromarray(crop.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    solid = np.asarray(enlarged) >= 128
    outline = ImageFilter.MinFilter(3 if factor == 1 else 5)
    shrunk = np.asarray(Image.fromarray(solid.astype(np.uint8) * 255).filter(outline)) > 0
    share = np.where(solid, np.where(shrunk, round(255 * _MASK_OPACITY), 255), 0).astype(np.uint8)
    canvas.paste(colour, ((left - 1) * factor, (top - 1) * factor), Image.fromarray(share))


def _inside(box_xyxy: np.ndarray, size_wh: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clips a box to the pixels of a canvas; Pillow's corners are pixels, the last one included."""
    width, height = size_wh
    left, right = np.clip((box_xyxy[0], box_xyxy[2] - 1), 0, width - 1)
    top, bottom = np.clip((box_xyxy[1], box_xyxy[3] - 1), 0, height - 1)
    return float(left), float(top), float(max(left, right)), float(max(top, bottom))


def _draw_tag(
    draw: ImageDraw.ImageDraw,
    text: str,
    corners: tuple[float, float, float, float],
    colour: Colour,
    size_wh: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Writes the text on a patch at the box, at the first of a few places that no other tag has; adds it to `taken`."""
    font = _font(max(12, round(min(size_wh) / 26)))
    width, height = math.ceil(font.getlength(text)) + 6, round(font.size * 1.25)
    left, top, right, bottom = corners
    above, below = top - height, bottom + 1
    places = [(left, above), (left, top), (right - width, above), (left, below), (right - width, below)]
    places += [(left, top + height * step) for step in range(1, 6)]
    tags = []
    for tag_left, tag_top in places:
        tag_left = min(max(tag_left, 0), max(size_wh[0] - width, 0))
        tag_top = min(max(tag_top, 0), max(size_wh[1] - height, 0))
        tags.append((tag_left, tag_top, tag_left + width, tag_top + height))
    tag = next((tag for tag in tags if not any(_overlap(tag, other) for other in taken)), tags[0])
    taken.append(tag)
    draw.rectangle(tag, fill=colour)
    draw.text((tag[0] + 3, (tag[1] + tag[3]) / 2), text, fill=_readable_on(colour), font=font, anchor="lm")


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _readable_on(colour: Colour) -> Colour:
    lightness = float(_to_lab(np.array([colour], dtype=np.float64))[0, 0])
    return (255, 255, 255) if lightness < 62 else (20, 20, 24)


def _legend(entries: Sequence[tuple[str, Colour]], width: int) -> np.ndarray:
    """A white strip (h, width, 3) with a patch and a name for each class, in as many rows as they need."""
    font, row_height, patch = _font(14), 24, 14
    places = []
    left, row = _GAP, 0
    for name, colour in entries:
        text = _cut_to_width(name, font, width - patch - 3 * _GAP)
        needed = patch + 5 + math.ceil(font.getlength(text)) + 2 * _GAP
        if left > _GAP and left + needed > width:
            left, row = _GAP, row + 1
        places.append((left, row, text, colour))
        left += needed
    strip = Image.new("RGB", (width, (row + 1) * row_height + _GAP if places else 0), _PAGE_COLOUR)
    draw = ImageDraw.Draw(strip)
    for left, row, text, colour in places:
        middle = _GAP / 2 + row * row_height + row_height / 2
        draw.rectangle((left, middle - patch / 2, left + patch, middle + patch / 2), fill=colour)
        draw.text((left + patch + 5, middle), text, fill=_TEXT_COLOUR, font=font, anchor="lm")
    return np.array(strip, dtype=np.uint8).reshape(strip.height, width, 3)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise DataError("Pillow was built without FreeType, so nothing can be written. Install Pillow from its wheel.")
    return font


def _cut_to_width(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…" if text else ""
