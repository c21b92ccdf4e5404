"""Draw rows of thumbnails into one image that shows the results of a seed set.

Needs only Pillow: encoded images in, one image out.
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

# A thumbnail has a few thousand pixels. A small file may declare gigapixels, so check its header first.
_MAX_PIXELS = 4_000_000
_FORMATS = ("WEBP", "PNG", "JPEG", "GIF")
_WEBP_MAX_SIDE = 16_383
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Strip:
    """A heading and its images, best first.

    Attributes:
        title: the title.
        subtitle: text after the title.
        images: encoded images (WebP, PNG, JPEG or GIF); None for a missing one.
        captions: captions by position; there may be fewer captions than images.
        together: number of images in a row that are drawn without a gap.

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

    Every image is fitted into a square. An image that is missing, broken or larger than 4 megapixels
    becomes a grey square, so a sheet never fails because of an image.

    Args:
        strips: the strips, from top to bottom.
        columns: number of images per row.
        cell: edge of a square in pixels.
        show_captions: whether to draw captions.

    Raises:
        ValueError: `columns` or `cell` leaves no room.

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
    """Encode an image in at most `max_bytes`, and return the bytes and their MIME type.

    The format is WebP, or PNG if this Pillow lacks WebP. Quality is reduced first, then size.
    Raises ValueError if even a tiny image is too large.
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
        # Bytes are roughly proportional to the area. The factor is bounded, so that a poor estimate
        # neither shrinks the image to nothing nor takes many rounds.
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
    # The built-in font has one weight; a thin stroke in the same colour looks bold.
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
    """Return the image on white, at most `side` pixels wide and high; None if it cannot be decoded."""
    if not image:
        return None
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                return None
            rgba = opened.convert("RGBA")
    except Exception:
        # Decoders fail in many ways on bytes from the web; one bad image must not fail the sheet.
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
        raise RuntimeError("this Pillow is built without FreeType and cannot draw text of any size")
    return font
