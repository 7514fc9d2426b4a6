"""Contact sheets: pictures in rows and columns with readable labels."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

from ..core.events import Observer, Warned
from ..core.shortening import shortened
from . import fonts

PAPER = (255, 255, 255)
INK = (32, 33, 36)
_LABEL = 300  # characters of a label
FRAME = (222, 224, 228)

T = TypeVar("T")


def grid(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Draw a white sheet of pictures with labels beside and above them. Long labels are cut.

    Pictures keep their pixels; a smaller one is centred in its cell. Rows may be of different lengths.

    Args:
        images: Rows of pictures, None for an empty cell.
        row_labels: One a row.
        column_labels: One a column.
        title: Above all.

    Returns:
        The sheet.

    Raises:
        ValueError: There is no picture, or labels are not one per row or column.
    """
    present = [image for row in images for image in row if image is not None]
    columns = max((len(row) for row in images), default=0)
    if not present:
        raise ValueError("a sheet needs at least one picture")
    if row_labels is not None and len(row_labels) != len(images):
        raise ValueError(f"there are {len(row_labels)} row labels for {len(images)} rows")
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"there are {len(column_labels)} column labels for {columns} columns")
    width, height = max(image.width for image in present), max(image.height for image in present)
    # Before any is measured, which takes a while for each word of a caption of thousands.
    row_labels, column_labels = ([shortened(one, _LABEL) for one in labels or ()] for labels in (row_labels, column_labels))
    size = min(30, max(13, round(width / 11)))  # of the letters, in pixels
    gap = max(6, size // 2)
    heads = [_wrap(label, width, size) for label in column_labels]
    beside = _side(row_labels, width, height, size)
    sides = [_wrap(label, beside, size) for label in row_labels]
    left = gap + (beside + gap if sides else 0)
    total = left + columns * (width + gap)
    above = _wrap(shortened(title, _LABEL), total - 2 * gap, round(size * 1.3)) if title else []
    title_height = _height(above, round(size * 1.3)) + gap if above else 0
    head_height = max(_height(lines, size) for lines in heads) + gap // 2 if heads else 0
    top = gap + title_height + head_height
    sheet = Image.new("RGB", (total, top + len(images) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, above, (gap, gap), round(size * 1.3))
    for column, lines in enumerate(heads):
        bottom = top - gap // 2 - _height(lines, size)
        _write(draw, lines, (left + column * (width + gap) + width // 2, bottom), size, centred=True)
    for row, lines in enumerate(sides):
        middle = top + row * (height + gap) + (height - _height(lines, size)) // 2
        _write(draw, lines, (gap, middle), size)
    for row, pictures in enumerate(images):
        for column, picture in enumerate(pictures):
            corner = (left + column * (width + gap), top + row * (height + gap))
            _place(sheet, draw, picture, corner, (width, height))
    return sheet


def in_rows(items: Sequence[T], width: int) -> tuple[tuple[T, ...], ...]:
    """Part what is on a sheet into its rows.

    Args:
        items: Row by row.
        width: How many a row has.

    Returns:
        The rows.
    """
    return tuple(tuple(items[start : start + width]) for start in range(0, len(items), width))


def _place(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Image.Image | None,
    corner: tuple[int, int],
    cell: tuple[int, int],
) -> None:
    """Draw a picture in its cell, with a hairline around it so that white pictures have an edge."""
    if picture is None:
        return
    x = corner[0] + (cell[0] - picture.width) // 2
    y = corner[1] + (cell[1] - picture.height) // 2
    draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
    if "A" in picture.getbands() or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        sheet.paste(seen, (x, y), seen)
    else:
        sheet.paste(picture.convert("RGB"), (x, y))


def _side(labels: Sequence[str], width: int, height: int, size: int) -> int:
    """How wide the labels beside the rows must be, in pixels: narrow, but with each inside the height of its row."""
    if not labels:
        return 0
    widest = 1
    for label in labels:
        natural = round(max(_length(line, size) for line in label.split("\n"))) + 1
        narrow = min(natural, max(round(width * 0.9), 6 * size))
        while narrow < min(natural, 3 * width) and _height(_wrap(label, narrow, size), size) > height:
            narrow += size
        widest = max(widest, narrow)
    return widest


def _wrap(text: str, width: int, size: int) -> list[str]:
    """Lines of at most ``width`` pixels; a word that is longer is broken."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}".strip()
            if _length(joined, size) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = word
            while _length(line, size) > width and len(line) > 1:
                fitting = _fitting(line, width, size)
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line)
    return lines


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], size: int, *, centred: bool = False
) -> None:
    x, y = at
    for line in lines:
        start = round(x - _length(line, size) / 2 if centred else float(x))
        _write_line(draw, line, (start, y), size)
        y += _leading(size)


def _write_line(draw: ImageDraw.ImageDraw, line: str, at: tuple[int, int], size: int) -> None:
    """A line, part by part, all on one base line."""
    parts, usual = fonts.runs(line, size), fonts.main_font(line, size)
    if all(run.font is usual for run in parts):
        draw.text(at, line, fill=INK, font=usual)
        return
    base = at[1] + (usual.getmetrics()[0] if isinstance(usual, ImageFont.FreeTypeFont) else size)
    left = float(at[0])
    for run in parts:
        if run.scale == 1:
            draw.text((round(left), base), run.text, fill=INK, font=run.font, anchor="ls", embedded_color=True)
        else:
            _paste_scaled(draw, run, (round(left), base), size)
        left += run.length


def _paste_scaled(draw: ImageDraw.ImageDraw, run: fonts.Run, at: tuple[int, int], size: int) -> None:
    """Letters of a font of bitmaps, brought to the size of the others; their lower edges stand on the base line."""
    box = ImageDraw.Draw(Image.new("RGBA", (1, 1))).textbbox((0, 0), run.text, font=run.font, embedded_color=True)
    layer = Image.new("RGBA", (max(1, round(box[2] - box[0])), max(1, round(box[3] - box[1]))))
    ImageDraw.Draw(layer).text((-box[0], -box[1]), run.text, font=run.font, fill=INK, embedded_color=True)
    sides = (max(1, round(layer.width * run.scale)), max(1, round(layer.height * run.scale)))
    small = layer.resize(sides, Image.Resampling.LANCZOS)
    sheet: Image.Image = draw._image
    sheet.paste(small, (at[0], at[1] - small.height + size // 8), small)


def _fitting(line: str, width: int, size: int) -> int:
    """How many letters of a line that is too long fit, one at least; to try each number in turn takes seconds."""

    def too_long(count: int) -> bool:
        return _length(line[:count], size) > width

    return max(1, bisect_left(range(1, len(line)), True, key=too_long))


def _height(lines: Sequence[str], size: int) -> int:
    return len(lines) * _leading(size)


def _leading(size: int) -> int:
    return round(size * 1.3)


def _length(text: str, size: int) -> float:
    return sum(run.length for run in fonts.runs(text, size))


def tell_missing(labels: Iterable[str], tell: Observer) -> None:
    """Tell of letters in labels that no font here has.

    Args:
        labels: The labels.
        tell: Is told.
    """
    lacking = fonts.missing("".join(shortened(one, _LABEL) for one in labels))
    if lacking:
        tell(
            Warned(
                f"no font here has {' '.join(lacking)}, so labels show boxes; install one, as Noto Sans CJK or Noto Emoji"
            )
        )
