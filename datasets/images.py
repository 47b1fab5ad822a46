"""Reading images and label pictures from files, with one clear error for everything that cannot be read."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from swin_dense.errors import ConfigError, ImageError

MAX_PIXELS = 89_000_000
"""A larger picture is refused from its header: a few kilobytes can unpack to gigabytes. `pixel_limit` allows more."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

_LIMIT_VARIABLE = "SWIN_DENSE_MAX_PIXELS"
_ROWS_AT_ONCE = 256
_EXIF_ORIENTATION = 0x0112
_TURNS_SIDES = (5, 6, 7, 8)
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
# What Pillow's decoders raise on damaged data; the last three come out of its parsers unwrapped.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, KeyError, IndexError, TypeError)


def read_image(path: str | Path, size_hw: tuple[int, int] | None = None) -> np.ndarray:
    """Reads a picture as RGB.

    Grey, palette and CMYK pictures are converted, transparency is dropped, 16 bit per channel is scaled to 8.

    Args:
        path: the picture file.
        size_hw: the (height, width) that the annotations state, which tells the frame they were drawn in: the picture
            as stored, or turned by its EXIF orientation. Where both fit, or without `size_hw`, the EXIF orientation is
            applied, as every viewer does.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ImageError: the file is missing, no picture, damaged, animated, over `max_pixels`, or of another size.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        stored_hw = (image.height, image.width)
        turned_hw = stored_hw[::-1] if orientation in _TURNS_SIDES else stored_hw
        if size_hw is not None and tuple(size_hw) not in (stored_hw, turned_hw):
            raise ImageError(_size_message(path, size_hw, stored_hw, turned_hw))
        image.load()
        if orientation != 1 and (size_hw is None or tuple(size_hw) == turned_hw):
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, path)


def read_label(path: str | Path) -> np.ndarray:
    """Reads a label picture: the values as they stand in the file.

    Args:
        path: an 8- or 16-bit grey picture, or a palette picture, whose palette indices are the labels.

    Returns:
        (H, W) int32.

    Raises:
        ImageError: as for `read_image`, or the picture has colours, so that its values are no labels.
    """
    with _opened(path) as image:
        if image.mode not in ("1", "L", "P", *_SIXTEEN_BIT_MODES):
            raise ImageError(
                f"{path}: a label picture must be grey (8 or 16 bit) or have a palette, got colour mode {image.mode}. "
                f"Convert it to one number per pixel, the class of that pixel."
            )
        image.load()
        return np.asarray(image).astype(np.int32)


def image_size_hw(path: str | Path) -> tuple[int, int]:
    """Returns the (height, width) of a picture, EXIF orientation applied, from its header alone.

    Raises:
        ImageError: the file is missing, no picture, animated, or over `max_pixels`.
    """
    with _opened(path) as image:
        if _orientation(image) in _TURNS_SIDES:
            return image.width, image.height
        return image.height, image.width


def max_pixels() -> int:
    """Returns how many pixels a picture may have: the environment variable SWIN_DENSE_MAX_PIXELS, else `MAX_PIXELS`.

    Raises:
        ConfigError: the variable is no positive whole number.
    """
    text = os.environ.get(_LIMIT_VARIABLE, str(MAX_PIXELS))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"the most pixels of a picture must be a whole number of 1 or more, got {text!r}")
    return int(text)


@contextmanager
def pixel_limit(count: int | None) -> Iterator[None]:
    """Lets pictures have up to `count` pixels, in this process and in the workers that it starts; None changes nothing.

    Only for files that you trust: reading takes about 7 bytes a pixel for a moment, and 3 as long as the image is used.

    Raises:
        ConfigError: the number is not positive.
    """
    before = os.environ.get(_LIMIT_VARIABLE)
    if count is not None:
        os.environ[_LIMIT_VARIABLE] = str(count)  # workers inherit it however they are started
    try:
        max_pixels()
        yield
    finally:
        os.environ.pop(_LIMIT_VARIABLE, None)
        if before is not None:
            os.environ[_LIMIT_VARIABLE] = before


@contextmanager
def _pillow_limit() -> Iterator[None]:
    """Pillow refuses pictures of twice its own limit before we see their header."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(MAX_PIXELS, max_pixels())
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    path = Path(path)
    try:
        with warnings.catch_warnings(), _pillow_limit():
            # Pillow warns about damaged EXIF and odd headers that do not touch the pixels; the bomb limit is ours.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                _check_header(image, path)
                yield image
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such file. Check the image folder and the file name.") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: wanted a picture, got a folder.") from None
    except PermissionError:
        raise ImageError(f"{path}: the file may not be read. Check its permissions.") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: {_too_large()}") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: {_describe_foreign_file(path)}") from None
    except _DECODE_ERRORS as error:
        size = path.stat().st_size if path.exists() else 0
        raise ImageError(
            f"{path}: the picture is damaged or cut short ({size} bytes; {error}). Copy or download it again."
        ) from error


def _too_large() -> str:
    return (
        f"the picture has more than {max_pixels() / 1e6:g} megapixels. If you trust the file, allow more with "
        f"--max-pixels or the environment variable {_LIMIT_VARIABLE}; else reduce it first."
    )


def _check_header(image: Image.Image, path: Path) -> None:
    if image.width * image.height > max_pixels():
        raise ImageError(f"{path}: {image.height} x {image.width}: {_too_large()}")
    # Phones write MPO: a JPEG whose first frame is the picture and whose others are previews.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ImageError(f"{path}: wanted one picture, got {frames} frames. Save the frame you want as its own file.")


def _describe_foreign_file(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "the file is empty (0 bytes). Copy or download it again."
    if start.lstrip()[:1] == b"<":
        return "wanted a picture, got a web page or XML text. Download it again."
    if start.startswith(b"version https://git-lfs"):
        return "wanted a picture, got a Git LFS pointer. Run 'git lfs pull' in its repository."
    return f"not a picture that can be read ({path.stat().st_size} bytes). Convert it to JPEG or PNG."


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DECODE_ERRORS:
        # Damaged EXIF says nothing; the pixels are still good.
        return 1


def _size_message(
    path: str | Path, wanted_hw: tuple[int, int], stored_hw: tuple[int, int], turned_hw: tuple[int, int]
) -> str:
    turned = "" if turned_hw == stored_hw else f", {turned_hw[0]} x {turned_hw[1]} when turned by its EXIF orientation"
    return (
        f"{path}: the annotations say height x width {wanted_hw[0]} x {wanted_hw[1]}, the picture is "
        f"{stored_hw[0]} x {stored_hw[1]}{turned}. It was resized, or it is another picture; use the annotated one."
    )


def _to_rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT_MODES:
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path}: grey values must lie in 0..65535, got {values.min()}..{values.max()}.")
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(f"{path}: wanted 8 or 16 bit per channel, got floating point. Convert it to 8-bit RGB.")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    # In bands: Pillow hands over its pixels by way of two more copies.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _ROWS_AT_ONCE):
        bottom = min(top + _ROWS_AT_ONCE, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels
