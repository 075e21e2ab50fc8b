"""Draw a grid of pictures before and after edits: a row for each prompt, the same seeds on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TILE, GAP, MARGIN, LABEL, SPLIT, HEADER = 80, 6, 24, 290, 36, 40
INK, PALE, RULE = "#1a1a1a", "#6b6b6b", "#d0d0d0"
TOP = 78


@dataclass(frozen=True)
class GridRow:
    """A label of two lines, and as many pictures before as after."""

    title: str
    subtitle: str
    before: Sequence[Image.Image]
    after: Sequence[Image.Image]


def draw_grid(title: str, sections: Sequence[tuple[str, Sequence[GridRow]]]) -> Image.Image:
    """Draw sections of rows with the columns "before" and "after". All rows have the same number of pictures.

    A label is wrapped to two lines and truncated with an ellipsis.
    """
    columns = len(sections[0][1][0].before)
    block = columns * (TILE + GAP) - GAP
    left = MARGIN + LABEL
    right = left + block + SPLIT
    height = TOP + sum(HEADER + len(rows) * (TILE + GAP) for _, rows in sections) + MARGIN
    grid = Image.new("RGB", (right + block + MARGIN, height), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((MARGIN, 20), title, fill=INK, font=ImageFont.load_default(22))
    y = TOP
    for heading, rows in sections:
        pen.line((MARGIN, y, grid.width - MARGIN, y), fill=RULE)
        pen.text((MARGIN, y + 11), _fit_text(heading, size=17, lines=1), fill=INK, font=ImageFont.load_default(17))
        for x, name in ((left, "before"), (right, "after")):
            pen.text((x, y + 12), name, fill=PALE, font=ImageFont.load_default(15))
        y += HEADER
        for row in rows:
            label = _fit_text(row.title, size=17, lines=2 if not row.subtitle else 1)
            pen.text((MARGIN, y + 10), label, fill=INK, font=ImageFont.load_default(17))
            pen.text((MARGIN, y + 34), _fit_text(row.subtitle, size=13), fill=PALE, font=ImageFont.load_default(13))
            for x, pictures in ((left, row.before), (right, row.after)):
                for column, picture in enumerate(pictures):
                    tile = picture.resize((TILE, TILE), Image.Resampling.LANCZOS)
                    grid.paste(tile, (x + column * (TILE + GAP), y))
            y += TILE + GAP
    return grid


def _fit_text(text: str, *, size: int, lines: int = 2) -> str:
    """Wrap the text to at most `lines` lines that fit the column of labels."""
    font = ImageFont.load_default(size)

    def fits(line: str) -> bool:
        return font.getlength(line) <= LABEL - GAP

    fitted: list[str] = []
    words = text.split()
    while words and len(fitted) < lines:
        count = next((n for n in range(len(words), 0, -1) if fits(" ".join(words[:n]))), 1)
        line, words = " ".join(words[:count]), words[count:]
        if not fits(line) or (words and len(fitted) == lines - 1):
            while line and not fits(f"{line}…"):
                line = line[:-1]
            line = f"{line.rstrip(' ,')}…"
        fitted.append(line)
    return "\n".join(fitted)
