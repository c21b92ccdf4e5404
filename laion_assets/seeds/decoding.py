"""Decode image files to RGB: first frame, upright, on a white background.

An image that cannot be decoded raises `BadImageError` with the reason.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # independent of the file's extension
MAX_PIXELS = 128_000_000
"""Most pixels that an image may have. Medium-format cameras produce 102 million; decoding 128 million
takes at most a gigabyte."""
BAND = 4_000_000  # pixels converted at a time
THUMBNAIL = 96  # pixels of the longer edge, at most
THUMBNAIL_DETAIL = 2 * THUMBNAIL  # smallest size in pixels at which a JPEG is decoded for a thumbnail
THUMBNAIL_QUALITY = 80
STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow already warns below MAX_PIXELS.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImageError(Exception):
    """A file is not a usable image. The message is a phrase that follows the file's name."""


class PixelBudget:
    """Limits how many pixels are decoded at a time; a single image is always allowed."""

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self._free = self._all = pixels
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


@contextmanager
def open_image(
    data: bytes, enough: Callable[[int, int], tuple[int, int]], budget: PixelBudget
) -> Iterator[Image.Image]:
    """Decode an image file for as long as the block lasts.

    Args:
        data: the file.
        enough: takes the (width, height) of an image and returns the (width, height) beyond which more
            detail changes nothing. A JPEG may be decoded at a half, a quarter or an eighth of its size,
            but not below the size returned.
        budget: limit on the pixels of all images decoded at the same time.

    Yields:
        An RGB image.

    Raises:
        BadImageError: it cannot be decoded, or memory runs out, which may also happen in the block.

    """
    image = _opened(data)
    image.draft(None, enough(*image.size))  # ignored by other formats than JPEG
    with budget.hold(image.width * image.height):
        try:
            yield _decoded(image)
        except MemoryError:
            raise BadImageError(
                f"has {_megapixels(image)}, too large for the available memory: scale it down or crop it"
            ) from None


def thumbnail_of(data: bytes, budget: PixelBudget) -> bytes:
    """Decode an image file and return its thumbnail, see `thumbnail`.

    Raises:
        BadImageError: it cannot be decoded.

    """
    with open_image(data, lambda *_: (THUMBNAIL_DETAIL, THUMBNAIL_DETAIL), budget) as image:
        return thumbnail(image)


def thumbnail(image: Image.Image) -> bytes:
    """Return a small copy of an RGB image as WebP."""
    scale = min(1, THUMBNAIL / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=1.1)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY, method=2)
    return buffer.getvalue()


def _opened(data: bytes) -> Image.Image:
    """Read the header."""
    if not data:
        raise BadImageError("is empty (0 bytes): use another file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError(_too_large(error)) from error
    except UnidentifiedImageError as error:
        raise BadImageError(_what_it_is(data)) from error
    except Exception as error:
        raise BadImageError(_damage(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(
            f"has {_megapixels(image)} ({image.width:,} x {image.height:,}), at most "
            f"{MAX_PIXELS // 10**6} are read: scale it down"
        )
    return image


def _decoded(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return _on_white(_upright(image))
    except MemoryError:
        raise
    except Exception as error:  # whatever the decoders raise for damaged files
        raise BadImageError(_damage(error)) from error


def _megapixels(image: Image.Image) -> str:
    return f"{image.width * image.height / 1e6:,.0f} megapixels"


def _too_large(error: Exception) -> str:
    """Take the pixel count from Pillow's error for images of more than twice its own limit."""
    pixels = re.search(r"\((\d+) pixels\)", str(error))
    count = f"{int(pixels[1]) / 1e6:,.0f}" if pixels else "too many"
    return f"has {count} megapixels, at most {MAX_PIXELS // 10**6} are read: scale it down"


def _damage(error: Exception) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "truncated" in said.lower():
        return "is truncated: copy it again"
    return f"is damaged ({said}): save it again as JPEG or PNG"


def _what_it_is(data: bytes) -> str:
    """Say what a file is if Pillow does not recognise it as an image."""
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand[:3] in (b"hei", b"hev") or brand in (b"mif1", b"msf1"):
        return "is HEIC, which is not supported: save it as JPEG or PNG"
    if b"<svg" in start and start.startswith(b"<"):
        return "is SVG, a drawing without pixels: export it as PNG"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not an image: download the image itself"
    if start.startswith(b"%pdf"):
        return "is PDF, not an image: export its pages as PNG"
    if brand == b"avif":
        return "is a damaged AVIF: copy it again"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "is a damaged WebP: copy it again"
    for magic, name in STARTS.items():
        if data.startswith(magic):
            return f"is a truncated or damaged {name}: copy it again"
    if _is_text(data[:1024]):
        return "is text, not an image: use another file"
    return f"is not an image in a supported format ({', '.join(FORMATS)}): save it in one of them"


def _is_text(data: bytes) -> bool:
    text = data.decode("utf-8", "replace")
    return sum(letter.isprintable() or letter.isspace() for letter in text) > 0.95 * len(text) and (
        text.count("\ufffd") <= 1  # a letter may be cut at the end
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata is ignored
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _on_white(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB in bands, so that only one band is in memory twice."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    scale = _scale_to_bytes(image)
    if image.width * image.height <= BAND:
        return _converted(image, scale)
    canvas = Image.new("RGB", image.size)
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        canvas.paste(_converted(band, scale), (0, top))
    return canvas


def _converted(image: Image.Image, scale: float | None) -> Image.Image:
    if scale is not None:
        values = np.nan_to_num(np.asarray(image, np.float64) * scale)
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    on_top = image.convert(straight).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, on_top).convert("RGB")


def _scale_to_bytes(image: Image.Image) -> float | None:
    """Return the factor that scales values of more than 8 bits to 8 bits; None for 8-bit images.

    Integers lose their lower bits. Floating-point images have no fixed white point: it is taken to be the
    lowest of 1, 255 and 65,535 that no value exceeds.
    """
    if image.mode.startswith("I;16"):
        return 1 / 256
    if image.mode not in ("I", "F"):
        return None
    _, highest = image.getextrema()
    if image.mode == "F" and highest <= 1:  # type: ignore[operator]
        return 255.0
    if highest <= 255:  # type: ignore[operator]
        return 1.0
    return 1 / 256 if highest <= 65535 else 1 / 2**23  # type: ignore[operator]
