"""Rows of thumbnails on one image: what a seed set found, at a glance.

Pillow only: encoded images in, one image out.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont, features

_BACKGROUND = "#f7f6f3"
_CARD = "#ffffff"
_CARD_EDGE = "#e4e2dc"
_MISSING = "#dcdad4"
_TITLE = "#1f1d1a"
_SUBTITLE = "#7d7972"

_MARGIN = 28
_GAP = 8
_PADDING = 4
_STRIP_GAP = 26
_HEADING = 34
_CAPTION = 16
_CORNER = 6
_TITLE_SIZE = 19
_SUBTITLE_SIZE = 14
_CAPTION_SIZE = 10

# A thumbnail is a few thousand pixels. A small file may claim gigapixels, so ask its header first.
_MAX_PIXELS = 4_000_000
_FORMATS = ("WEBP", "PNG", "JPEG", "GIF")
_WEBP_MAX_SIDE = 16_383
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Strip:
    """A heading and its images, best first.

    Attributes:
        title: of the strip.
        subtitle: behind it.
        images: encoded images (WebP, PNG, JPEG or GIF); None for a missing one.
        captions: by position; there may be fewer than images.
        together: how many images in a row are drawn without a gap.

    """

    title: str
    subtitle: str
    images: Sequence[bytes | None]
    captions: Sequence[str]
    together: int = 1


def contact_sheet(
    strips: Sequence[Strip], *, columns: int = 12, cell: int = 88, show_captions: bool = False
) -> Image.Image:
    """Draw the strips below each other and return one RGB image.

    Every image is fitted into a square. One that is missing, broken or larger than 4 megapixels becomes a
    grey square: a sheet never fails because of an image.

    Args:
        strips: in order.
        columns: images in a row.
        cell: pixels of a square's edge.
        show_captions: whether captions are drawn.

    Raises:
        ValueError: `columns` or `cell` leave no room.

    """
    if columns < 1 or cell <= 2 * _PADDING:
        raise ValueError(f"no room to draw in: columns={columns}, cell={cell}")
    row_height = cell + (_CAPTION if show_captions else 0)
    width = 2 * _MARGIN + columns * (cell + _GAP) - _GAP
    sheet = Image.new("RGB", (width, _sheet_height(strips, columns, row_height)), _BACKGROUND)
    top = _MARGIN
    for strip in strips:
        _draw_heading(sheet, strip, top, width - 2 * _MARGIN)
        top += _HEADING
        for position, image in enumerate(strip.images):
            row, column = divmod(position, columns)
            closer = column % strip.together * _GAP
            corner = (_MARGIN + column * (cell + _GAP) - closer, top + row * (row_height + _GAP))
            _draw_image(sheet, image, corner, cell)
            if show_captions and position < len(strip.captions):
                _draw_caption(sheet, strip.captions[position], corner, cell)
        top += _grid_height(len(strip.images), columns, row_height) + _STRIP_GAP
    return sheet


def encode(image: Image.Image, *, max_bytes: int) -> tuple[bytes, str]:
    """Encode an image in at most `max_bytes`: the bytes and their MIME type.

    WebP (PNG where this Pillow has no WebP), at a lower quality first and then at a smaller size.
    Raises ValueError where even a postage stamp is too large.
    """
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > _WEBP_MAX_SIDE:
        image = _scaled(image, _WEBP_MAX_SIDE / longest)
    while True:
        for quality in (86, 72):
            data, mime = _encoded(image, quality)
            if len(data) <= max_bytes:
                return data, mime
        if max(image.size) <= _SMALLEST_SIDE:
            raise ValueError(f"an image does not fit into {max_bytes} bytes")
        # Bytes go roughly with the area. Bounded, so that a poor guess neither shrinks the image
        # to nothing nor takes many rounds.
        image = _scaled(image, min(0.9, max(0.5, (max_bytes / len(data)) ** 0.5)))


def _encoded(image: Image.Image, quality: int) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    if features.check("webp"):
        image.save(buffer, "WEBP", quality=quality, method=4)
        return buffer.getvalue(), "image/webp"
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), "image/png"


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    width, height = (max(1, int(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _grid_height(images: int, columns: int, row_height: int) -> int:
    rows = -(-images // columns)
    return max(0, rows * (row_height + _GAP) - _GAP)


def _sheet_height(strips: Sequence[Strip], columns: int, row_height: int) -> int:
    grids = sum(_grid_height(len(strip.images), columns, row_height) for strip in strips)
    gaps = _STRIP_GAP * max(0, len(strips) - 1)
    return 2 * _MARGIN + len(strips) * _HEADING + grids + gaps


def _draw_heading(sheet: Image.Image, strip: Strip, top: int, width: int) -> None:
    draw = ImageDraw.Draw(sheet)
    baseline = top + _TITLE_SIZE
    title = _fitted(strip.title, _font(_TITLE_SIZE), width)
    # The built-in font has one weight; a hair of stroke in the same colour reads as bold.
    draw.text((_MARGIN, baseline), title, _TITLE, _font(_TITLE_SIZE), anchor="ls", stroke_width=0.35)
    used = round(_font(_TITLE_SIZE).getlength(title)) + 12
    subtitle = _fitted(strip.subtitle, _font(_SUBTITLE_SIZE), width - used)
    draw.text((_MARGIN + used, baseline), subtitle, _SUBTITLE, _font(_SUBTITLE_SIZE), anchor="ls")


def _draw_image(sheet: Image.Image, image: bytes | None, corner: tuple[int, int], cell: int) -> None:
    thumbnail = _decoded(image, cell - 2 * _PADDING)
    left, top = corner
    ImageDraw.Draw(sheet).rounded_rectangle(
        (left, top, left + cell - 1, top + cell - 1),
        radius=_CORNER,
        fill=_MISSING if thumbnail is None else _CARD,
        outline=_MISSING if thumbnail is None else _CARD_EDGE,
    )
    if thumbnail is not None:
        offset = (left + (cell - thumbnail.width) // 2, top + (cell - thumbnail.height) // 2)
        sheet.paste(thumbnail, offset)


def _draw_caption(sheet: Image.Image, caption: str, corner: tuple[int, int], cell: int) -> None:
    left, top = corner
    text = _fitted(caption, _font(_CAPTION_SIZE), cell)
    ImageDraw.Draw(sheet).text(
        (left + cell // 2, top + cell + _CAPTION - 4),
        text,
        _SUBTITLE,
        _font(_CAPTION_SIZE),
        anchor="ms",
    )


def _decoded(image: bytes | None, side: int) -> Image.Image | None:
    """Return the image on white, at most `side` pixels a side; None if it cannot be decoded."""
    if not image:
        return None
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                return None
            rgba = opened.convert("RGBA")
    except Exception:
        # Bytes off the web: decoders fail in many ways, one bad image must not cost the sheet.
        return None
    rgba.thumbnail((side, side), Image.Resampling.LANCZOS)
    flat = Image.new("RGB", rgba.size, _CARD)
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return flat


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text on one line, cut to `width` pixels."""
    line = " ".join(text.split())[:500]
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…" if line else ""


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow is built without FreeType: it cannot draw text of any size")
    return font
