"""Draws the pictures of the shapes data set: textured ground, shapes that overlap, and their exact visible masks."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

BACKGROUND_NAMES = ("grass", "water", "sand", "brick")
SHAPE_NAMES = ("disk", "square", "triangle", "star", "ring", "cross")
MIN_IMAGE_SIDE = 48
MIN_VISIBLE_PIXELS = 60
_MIN_VISIBLE_OVERLAPPING = 0.4
_MIN_VISIBLE_FREE = 0.95
_RADIUS_RANGE = (9.0, 40.0)
_OVERSAMPLING = 4
_MARGIN = 6
_CROWD_PROBABILITY = 0.1
_EMPTY_PROBABILITY = 0.05
_BACKGROUND_COLOURS = ((143, 172, 112), (122, 167, 190), (223, 206, 170), (184, 134, 114))
_SHAPE_COLOURS = ((214, 78, 72), (50, 72, 128), (244, 188, 58), (248, 243, 233), (126, 64, 122), (22, 102, 106))
_OWN_COLOUR_PROBABILITY = 0.85

FloatArray = NDArray[np.float32]
Mask = NDArray[np.bool_]
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class SceneObject:
    """One object, or one crowd region: `shape` is an index into SHAPE_NAMES, `mask` (H, W) its visible pixels."""

    shape: int
    mask: Mask
    is_crowd: bool


@dataclass(frozen=True)
class Scene:
    """A picture (H, W, 3) RGB, its label picture (H, W) in file values, and its objects from front to back."""

    image: Picture
    label: Picture
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class _Sprite:
    """A shape drawn on a window whose corner may lie outside the frame: `alpha` and `rim` (h, w) in 0..1."""

    shape: int
    top: int
    left: int
    alpha: FloatArray
    rim: FloatArray
    colour: FloatArray

    def frame_and_window(self, size_hw: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Slices of the part inside the frame: in the frame's pixels, and in the window's."""
        height, width = self.alpha.shape
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = max(min(self.top + height, size_hw[0]), top), max(min(self.left + width, size_hw[1]), left)
        frame = (slice(top, bottom), slice(left, right))
        window = (slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left))
        return frame, window


def draw_scene(random: np.random.Generator, size_hw: tuple[int, int]) -> Scene:
    """Draws one picture of the given (height, width), each at least MIN_IMAGE_SIDE, with exact visible masks."""
    canvas, label = _background(random, size_hw)
    if random.random() < _EMPTY_PROBABILITY:
        return Scene(_to_picture(canvas), label, ())
    sprites, masks, covered = _place_objects(random, size_hw)
    objects = [SceneObject(sprite.shape, mask, False) for sprite, mask in zip(sprites, masks, strict=True)]
    if random.random() < _CROWD_PROBABILITY:
        crowd = _draw_crowd(random, canvas, label, covered)
        if crowd is not None:
            objects.append(crowd)
    for sprite in reversed(sprites):
        _paint(random, canvas, label, sprite)
    return Scene(_to_picture(canvas), label, tuple(objects))


def _to_picture(canvas: FloatArray) -> Picture:
    return canvas.clip(0, 255).round().astype(np.uint8)


def _smooth_noise(random: np.random.Generator, size_hw: tuple[int, int], cell_hw: tuple[float, float]) -> FloatArray:
    """Noise (H, W) of about unit strength that varies over `cell_hw` pixels."""
    height, width = size_hw
    grid_hw = (math.ceil(height / cell_hw[0]) + 1, math.ceil(width / cell_hw[1]) + 1)
    grid = Image.fromarray(random.standard_normal(grid_hw, dtype=np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))


def _grass(random: np.random.Generator, size_hw: tuple[int, int]) -> FloatArray:
    return 7 * _smooth_noise(random, size_hw, (16, 16)) + 9 * _smooth_noise(random, size_hw, (6, 1.5))


def _water(random: np.random.Generator, size_hw: tuple[int, int]) -> FloatArray:
    rows = np.arange(size_hw[0], dtype=np.float32)[:, None]
    crests = np.sin(2 * math.pi * rows / random.uniform(8, 11) + 1.2 * _smooth_noise(random, size_hw, (14, 20)))
    return 8 * crests + 40 * np.maximum(crests - np.float32(0.7), 0)


def _sand(random: np.random.Generator, size_hw: tuple[int, int]) -> FloatArray:
    return 5 * _smooth_noise(random, size_hw, (24, 40)) + 6 * random.standard_normal(size_hw, dtype=np.float32)


def _brick(random: np.random.Generator, size_hw: tuple[int, int]) -> FloatArray:
    brick_height, brick_width = int(random.integers(8, 11)), int(random.integers(18, 24))
    y, x = np.indices(size_hw)
    row = y // brick_height
    shifted = x + (row % 2) * (brick_width // 2)
    tones = random.uniform(-12, 12, (int(row.max()) + 1, int(shifted.max()) // brick_width + 1)).astype(np.float32)
    mortar = (y % brick_height == 0) | (shifted % brick_width == 0)
    fine = 3 * random.standard_normal(size_hw, dtype=np.float32)
    return np.where(mortar, np.float32(38), tones[row, shifted // brick_width]) + fine


_TEXTURES = (_grass, _water, _sand, _brick)


def _textured(random: np.random.Generator, size_hw: tuple[int, int], background: int) -> FloatArray:
    colour = np.array(_BACKGROUND_COLOURS[background], dtype=np.float32) + random.uniform(-7, 7, 3).astype(np.float32)
    return colour + _TEXTURES[background](random, size_hw)[..., None]


def _background(random: np.random.Generator, size_hw: tuple[int, int]) -> tuple[FloatArray, Picture]:
    """Two or three grounds parted by wavy lines: canvas (H, W, 3) float and label picture (H, W)."""
    height, width = size_hw
    grounds = random.permutation(len(BACKGROUND_NAMES))[: random.integers(2, 4)]
    canvas = _textured(random, size_hw, int(grounds[0]))
    label = np.full(size_hw, grounds[0] + 1, dtype=np.uint8)
    y, x = np.indices(size_hw, dtype=np.float32)
    for ground in grounds[1:]:
        centre_y, centre_x = height * random.uniform(0.25, 0.75), width * random.uniform(0.25, 0.75)
        angle = random.uniform(0, 2 * math.pi)
        across = (x - centre_x) * math.cos(angle) + (y - centre_y) * math.sin(angle)
        along = (y - centre_y) * math.cos(angle) - (x - centre_x) * math.sin(angle)
        wave = random.uniform(2, 7) * np.sin(2 * math.pi * along / random.uniform(40, 90) + random.uniform(0, 6))
        distance = across + wave
        share = (distance + 0.5).clip(0, 1)[..., None]
        canvas = canvas * (1 - share) + _textured(random, size_hw, int(ground)) * share
        label[distance > 0] = ground + 1
    return canvas, label


def _circle(radius: float) -> FloatArray:
    angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    return (radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


def _regular(radii: tuple[float, ...], repeat: int) -> FloatArray:
    angles = np.linspace(0, 2 * math.pi, repeat * len(radii), endpoint=False)
    radius = np.tile(radii, repeat)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1).astype(np.float32)


def _cross_outline(arm: float = 0.32) -> FloatArray:
    end = math.sqrt(1 - arm * arm)
    quarter = [(end, -arm), (end, arm), (arm, arm)]
    points = []
    for turn in range(4):
        cos, sin = round(math.cos(turn * math.pi / 2)), round(math.sin(turn * math.pi / 2))
        points += [(x * cos - y * sin, x * sin + y * cos) for x, y in quarter]
    return np.array(points, dtype=np.float32)


# In a circle of radius 1; the second outline, where there is one, is a hole.
_OUTLINES = {
    "disk": (_circle(1),),
    "square": (_regular((1,), 4),),
    "triangle": (_regular((1,), 3),),
    "star": (_regular((1, 0.45), 5),),
    "ring": (_circle(1), _circle(0.52)),
    "cross": (_cross_outline(),),
}


def _make_sprite(random: np.random.Generator, shape: int, centre_xy: tuple[float, float], radius: float) -> _Sprite:
    """Draws the shape enlarged and shrinks it again: `alpha` is the covered share of each pixel, `rim` its border."""
    left, top = math.floor(centre_xy[0] - radius) - _MARGIN, math.floor(centre_xy[1] - radius) - _MARGIN
    side = math.ceil(2 * radius) + 2 * _MARGIN + 1
    angle = random.uniform(0, 2 * math.pi)
    turn = radius * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    centre = np.array(centre_xy) - (left, top)
    solid, rim = (Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING)) for _ in range(2))
    rim_width = round(_OVERSAMPLING * min(3.0, 1.6 + radius / 20))
    for hole, outline in enumerate(_OUTLINES[SHAPE_NAMES[shape]]):
        points = [(float(x), float(y)) for x, y in (outline @ turn + centre) * _OVERSAMPLING]
        ImageDraw.Draw(solid).polygon(points, fill=0 if hole else 255)
        ImageDraw.Draw(rim).line([*points, *points[:2]], fill=255, width=rim_width, joint="curve")
    alpha, edge = (
        np.asarray(picture.reduce(_OVERSAMPLING), dtype=np.float32) / np.float32(255) for picture in (solid, rim)
    )
    own = random.random() < _OWN_COLOUR_PROBABILITY
    base = _SHAPE_COLOURS[shape if own else random.integers(len(_SHAPE_COLOURS))]
    colour = np.array(base, dtype=np.float32) + random.uniform(-10, 10, 3).astype(np.float32)
    return _Sprite(shape, top, left, alpha, edge, colour)


def _place_objects(random: np.random.Generator, size_hw: tuple[int, int]) -> tuple[list[_Sprite], list[Mask], Mask]:
    """Places 1 to 6 shapes from front to back, each one visible enough: sprites, visible masks, and their union."""
    height, width = size_hw
    low, high = math.log(_RADIUS_RANGE[0]), math.log(min(_RADIUS_RANGE[1], 0.3 * min(size_hw)))
    covered = np.zeros(size_hw, dtype=np.bool_)
    sprites: list[_Sprite] = []
    masks: list[Mask] = []
    for _ in range(random.integers(1, 7)):
        least_visible = _MIN_VISIBLE_OVERLAPPING if random.random() < 0.45 else _MIN_VISIBLE_FREE
        shape, radius = int(random.integers(len(SHAPE_NAMES))), math.exp(random.uniform(low, high))
        for _ in range(10):
            sprite = _make_sprite(random, shape, (random.uniform(0, width), random.uniform(0, height)), radius)
            solid = sprite.alpha >= 0.5
            frame, window = sprite.frame_and_window(size_hw)
            visible = np.zeros(size_hw, dtype=np.bool_)
            visible[frame] = solid[window] & ~covered[frame]
            if visible.sum() >= max(MIN_VISIBLE_PIXELS, least_visible * solid.sum()):
                sprites.append(sprite)
                masks.append(visible)
                covered |= visible
                break
    return sprites, masks, covered


def _paint(random: np.random.Generator, canvas: FloatArray, label: Picture, sprite: _Sprite) -> None:
    """Paints a sprite with a soft shadow onto the canvas, and its class onto the label picture, both in place."""
    frame, window = sprite.frame_and_window(label.shape)
    alpha = sprite.alpha[window][..., None]
    shadow = Image.fromarray((sprite.alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    shade = np.roll(np.asarray(shadow, dtype=np.float32) / np.float32(255), (2, 2), axis=(0, 1))[window][..., None]
    fill = (sprite.colour + _fill_texture(random, sprite.alpha.shape)[..., None]) * (1 - 0.38 * sprite.rim[..., None])
    canvas[frame] = canvas[frame] * (1 - 0.35 * shade) * (1 - alpha) + fill[window] * alpha
    # Pixels that mix the shape with what lies behind it belong to neither.
    mixed = (alpha[..., 0] > 0.1) & (alpha[..., 0] < 0.9)
    label[frame][alpha[..., 0] >= 0.5] = len(BACKGROUND_NAMES) + sprite.shape + 1
    label[frame][mixed] = 0


def _fill_texture(random: np.random.Generator, size_hw: tuple[int, ...]) -> FloatArray:
    """Changes of brightness inside a shape: plain, a slope, stripes or dots."""
    y, x = np.indices(size_hw, dtype=np.float32)
    angle, period = random.uniform(0, 2 * math.pi), random.uniform(6, 10)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kind = random.integers(4)
    if kind == 0:
        return np.zeros(size_hw, dtype=np.float32)
    if kind == 1:
        return 30 * (along - along.mean()) / size_hw[0]
    if kind == 2:
        return 14 * np.tanh(3 * np.sin(2 * math.pi * along / period))
    return 22 * np.tanh(4 * (np.sin(2 * math.pi * along / period) * np.sin(2 * math.pi * across / period) - 0.4))


def _draw_crowd(random: np.random.Generator, canvas: FloatArray, label: Picture, covered: Mask) -> SceneObject | None:
    """Paints a cluster of tiny equal shapes behind all else, and returns its region; None where there is no room."""
    height, width = label.shape
    semi_x, semi_y = random.uniform(17, 23), random.uniform(17, 23)
    y, x = np.indices(label.shape, dtype=np.float32)
    for _ in range(10):
        centre_x, centre_y = random.uniform(semi_x, width - semi_x), random.uniform(semi_y, height - semi_y)
        region = ((x - centre_x) / semi_x) ** 2 + ((y - centre_y) / semi_y) ** 2 <= 1
        if (region & covered).sum() <= 0.2 * region.sum():
            break
    else:
        return None
    shape, step = int(random.integers(len(SHAPE_NAMES))), 8.5
    for row in range(-2, 3):
        for column in range(-2, 3):
            offset_x, offset_y = step * np.array((column, row)) + random.uniform(-1, 1, 2)
            if math.hypot(offset_x / (semi_x - 5), offset_y / (semi_y - 5)) <= 1:
                centre = (centre_x + offset_x, centre_y + offset_y)
                _paint(random, canvas, label, _make_sprite(random, shape, centre, random.uniform(3.6, 4.6)))
    label[region] = 0
    return SceneObject(shape, region & ~covered, True)
