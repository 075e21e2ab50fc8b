import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from demo import art
from demo.concepts import Concept


def glyph() -> Image.Image:
    """A red square of 20 × 10 pixels on a transparent canvas."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((8, 30, 27, 39), fill=(255, 0, 0, 255))
    return image


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("T-Rex", "t-rex"),
        ("rescue worker’s helmet", "rescue-workers-helmet"),
        ("piñata", "pinata"),
        ("Santa Claus", "santa-claus"),
    ],
)
def test_slug(label: str, expected: str) -> None:
    assert art.slug(label) == expected


def test_placed_is_cropped_scaled_and_centred_on_white() -> None:
    pixels = torch.from_numpy(__import__("numpy").asarray(art.placed(glyph(), side=30, shift=(0, 0))).copy())
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60)
    rows, columns = red.nonzero(as_tuple=True)
    assert (int(columns.min()), int(columns.max())) == (1, 30)
    assert (int(rows.min()), int(rows.max())) == (8, 22)
    assert (pixels[0] == 255).all()


def test_placed_stays_inside() -> None:
    shifted = art.placed(glyph(), side=31, shift=(9, 0))
    pixel = shifted.getpixel((31, 16))
    assert isinstance(pixel, tuple) and pixel[1] < 60


def test_transparent_glyph_is_refused() -> None:
    with pytest.raises(ValueError, match="transparent"):
        art.placed(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), side=30, shift=(0, 0))


def test_copies_depend_on_the_seed_only_past_the_first() -> None:
    one, same, other = (art.copies(glyph(), seed=seed) for seed in (1, 1, 2))
    assert one.shape == (art.COPIES, 3, art.SIZE, art.SIZE) and one.dtype == torch.uint8
    assert torch.equal(one, same) and torch.equal(one[0], other[0]) and not torch.equal(one, other)


def emojibase(folder: Path) -> Path:
    tones = [{"label": f"x: {tone}", "hexcode": f"1F468-{code}"} for tone, code in art.SKIN_TONES.items()]
    known = [
        {"label": "cat", "hexcode": "1F408"},
        {"label": "man judge", "hexcode": "1F468", "skins": tones},
        {"label": "woman judge", "hexcode": "1F469", "skins": tones},
    ]
    (folder / "en").mkdir(parents=True)
    (folder / "en" / "data.json").write_text(json.dumps(known), encoding="utf-8")
    return folder


def test_glyphs_of_objects_and_professions(tmp_path: Path) -> None:
    concepts = [Concept("cat", ("cat",), (), ()), Concept("judge", ("judge",), (), (), 0.85)]
    found = list(art.glyphs(concepts, emojibase(tmp_path)))
    assert [(glyph.concept, glyph.gender) for glyph in found] == [(0, -1)] + [(1, 0)] * 3 + [(1, 1)] * 3
    assert {glyph.tone for glyph in found[1:]} == set(art.SKIN_TONES)


def test_unknown_label_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gryphon'.*'griffin'"):
        list(art.glyphs([Concept("gryphon", ("griffin",), (), ())], emojibase(tmp_path)))


def test_missing_art_says_how_to_prepare_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m demo.art"):
        art.load(tmp_path / "art.safetensors")


def test_art_of_other_concepts_is_refused(tmp_path: Path) -> None:
    cat, dog = Concept("cat", ("cat",), (), ()), Concept("dog", ("dog",), (), ())
    names = ("pictures", "concept", "style", "gender")
    made = art.Art(torch.zeros(1, art.COPIES, 3, 32, 32, dtype=torch.uint8), *torch.zeros(3, 1, dtype=torch.int64))
    path = tmp_path / "art.safetensors"
    save_file({name: getattr(made, name) for name in names}, path, metadata={"art": json.dumps({"concepts": ["cat"]})})
    assert len(art.load(path, [cat])) == 1
    with pytest.raises(ValueError, match="other concepts"):
        art.load(path, [cat, dog])
