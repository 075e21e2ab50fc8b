"""The grid of pictures before and after, and its labels."""

from PIL import Image, ImageFont

from editing.pictures.grid import GAP, LABEL, MARGIN, GridRow, _fit_text, draw_grid


def test_before_is_left_of_after() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    grid = draw_grid("title", [("heading", [GridRow("dog", "to robot", [red, red], [blue, blue])])])
    colors = [grid.getpixel((x, grid.height - 60)) for x in range(grid.width)]
    reds, blues = ([x for x, c in enumerate(colors) if c == color] for color in ((255, 0, 0), (0, 0, 255)))
    assert len(reds) == len(blues) == 160
    assert max(reds) < min(blues)


def test_labels_do_not_reach_the_pictures() -> None:
    red = Image.new("RGB", (8, 8), "red")
    name = "a word so long that it would run into the pictures if it were not truncated, and then on through them"
    grid = draw_grid("", [(name, [GridRow(name, name, [red], [red])])])
    between = {grid.getpixel((MARGIN + LABEL - 1, y)) for y in range(82, grid.height)}
    assert between == {(255, 255, 255)}


def test_long_text_is_wrapped_and_truncated() -> None:
    assert _fit_text("ball, beetle", size=13) == "ball, beetle"
    wrapped = _fit_text(", ".join(["beetle"] * 40), size=13).split("\n")
    assert len(wrapped) == 2
    assert wrapped[1].endswith("beetle…")
    assert all(ImageFont.load_default(13).getlength(line) <= LABEL - GAP for line in wrapped)
    assert _fit_text("x" * 500, size=17, lines=1).endswith("x…")
