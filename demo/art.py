"""Prepare the pictures: `python -m demo.art` fetches the npm art packages and renders every concept in every style.

The result, `art.safetensors` in the work folder, holds `pictures` (N, copies, 3, 32, 32) uint8 on white, copy 0
centred and the others shifted and scaled, with `concept`, `style` and `gender` (N,) int64 (gender -1 where the
concept has none).
"""

import argparse
import io
import json
import random
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from demo.concepts import FOLDER, GENDERS, STYLES, Concept, read_concepts

WORK = FOLDER / "work"
PACKAGES = {
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/noto-v1": "1.2.5",
    "emojibase-data": "17.0.0",
}
SIZE = 32  # pixels of a picture's side
COPIES = 4
SUPERSAMPLED = 128  # SVGs are rendered at this side before they are scaled down
SKIN_TONES = {"light": "1F3FB", "medium": "1F3FD", "dark": "1F3FF"}


@dataclass(frozen=True)
class Glyph:
    """One emoji to look for in the packages: its code points, its label and, for people, gender and skin tone."""

    concept: int
    label: str
    hexcode: str
    gender: int = -1
    tone: str | None = None


@dataclass(frozen=True)
class Art:
    """All pictures with what they show. `pictures` (N, copies, 3, 32, 32) uint8; the others (N,) int64."""

    pictures: torch.Tensor
    concept: torch.Tensor
    style: torch.Tensor
    gender: torch.Tensor

    def __len__(self) -> int:
        return len(self.pictures)


def install_packages(folder: Path) -> Path:
    """Install the art packages at their pinned versions; returns the node_modules folder. Needs npm on the PATH."""
    if shutil.which("npm") is None:
        raise RuntimeError(
            "npm was not found; install Node.js to prepare the art (using the committed weights needs neither)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
    subprocess.run(["npm", "install", *quiet, "--prefix", str(folder), *wanted], check=True)
    return folder / "node_modules"


def glyphs(concepts: Sequence[Concept], emojibase: Path) -> Iterator[Glyph]:
    """Every emoji that shows a concept, by label; a profession in both genders and three skin tones.

    Raises ValueError for a label that emojibase does not know.
    """
    known = json.loads((emojibase / "en" / "data.json").read_text(encoding="utf-8"))
    by_label = {entry["label"]: entry for entry in known}
    for index, concept in enumerate(concepts):
        for label in concept.labels:
            if concept.skew is None:
                entry = _entry(by_label, label, concept)
                yield Glyph(index, label, entry["hexcode"])
                continue
            for gender, word in enumerate(GENDERS):
                entry = _entry(by_label, f"{word} {label}", concept)
                for tone, modifier in SKIN_TONES.items():
                    toned = next(skin for skin in entry["skins"] if modifier in skin["hexcode"])
                    yield Glyph(index, entry["label"], toned["hexcode"], gender, tone)


def _entry(by_label: dict[str, dict[str, Any]], label: str, concept: Concept) -> dict[str, Any]:
    if label not in by_label:
        raise ValueError(f"concept {concept.name!r}: no emoji is labelled {label!r}; see emojibase-data's en/data.json")
    return by_label[label]


class RasterPackage:
    """The emoji-datasource packages: one 64 × 64 PNG per emoji, named by its code points."""

    def __init__(self, folder: Path, vendor: str) -> None:
        self.images = folder / "img" / vendor / "64"
        self.names: dict[str, str] = {}
        for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
            for form in (entry, *entry.get("skin_variations", {}).values()):
                self.names[_bare(form["unified"])] = form["image"]

    def find(self, glyph: Glyph) -> Image.Image | None:
        name = self.names.get(_bare(glyph.hexcode))
        if name is None or not (self.images / name).is_file():
            return None
        return Image.open(self.images / name).convert("RGBA")


class VectorPackage:
    """The @iconify-json packages: SVG bodies under the slug of the emoji's label, aliases resolved."""

    def __init__(self, folder: Path, *, tone_suffix: str) -> None:
        icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.icons, self.aliases = icons["icons"], icons.get("aliases", {})
        self.width, self.height = icons.get("width", 16), icons.get("height", 16)
        self.tone_suffix = tone_suffix

    def find(self, glyph: Glyph) -> Image.Image | None:
        name = slug(glyph.label)
        if glyph.tone is not None:
            name = f"{name}-{glyph.tone}{self.tone_suffix}"
        if name not in self.icons and name in self.aliases:
            name = self.aliases[name]["parent"]
        if name not in self.icons:
            return None
        icon = self.icons[name]
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        return _render(
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )


def _render(svg: str) -> Image.Image:
    import resvg_py  # only this step needs it, and it is not among the run-time dependencies

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SUPERSAMPLED, height=SUPERSAMPLED))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _bare(hexcode: str) -> str:
    return hexcode.upper().replace("-FE0F", "")


def slug(label: str) -> str:
    """Return the label as iconify writes it: lower-case ASCII words joined by hyphens."""
    plain = unicodedata.normalize("NFKD", label.replace("’", "").replace("'", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def placed(glyph: Image.Image, *, side: int, shift: tuple[int, int]) -> Image.Image:
    """Return the glyph cropped, its longer side scaled to `side` pixels, on white, off center by `shift`."""
    box = glyph.getchannel("A").getbbox()
    if box is None:
        raise ValueError("the glyph is fully transparent")
    cropped = glyph.crop(box)
    scale = side / max(cropped.size)
    width, height = (max(1, round(length * scale)) for length in cropped.size)
    scaled = cropped.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(scaled, (_inside(shift[0], width), _inside(shift[1], height)))
    return canvas.convert("RGB")


def _inside(shift: int, length: int) -> int:
    free = SIZE - length
    return min(max(free // 2 + shift, 0), free)


def copies(glyph: Image.Image, *, seed: int) -> torch.Tensor:
    """Return (copies, 3, 32, 32) uint8: the centered picture at 30 pixels, then shifted and scaled ones.

    None is flipped: a flip would teach that the two directions of an emoji are one.
    """
    chance = random.Random(seed)
    pictures = [placed(glyph, side=30, shift=(0, 0))]
    for _ in range(COPIES - 1):
        shift = (chance.randint(-2, 2), chance.randint(-2, 2))
        pictures.append(placed(glyph, side=chance.randint(26, 31), shift=shift))
    return torch.stack([_pixels(picture) for picture in pictures])


def _pixels(picture: Image.Image) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1)


def prepare(packages: Path, destination: Path, concepts: Sequence[Concept] | None = None) -> Art:
    """Render every concept in every style that has it, save the result and return it. Default: those of
    `concepts.txt`."""
    concepts = read_concepts() if concepts is None else concepts
    sources: tuple[RasterPackage | VectorPackage, ...] = (
        RasterPackage(packages / "emoji-datasource-google", "google"),
        RasterPackage(packages / "emoji-datasource-twitter", "twitter"),
        VectorPackage(packages / "@iconify-json" / "fluent-emoji-flat", tone_suffix=""),
        VectorPackage(packages / "@iconify-json" / "emojione", tone_suffix="-skin-tone"),
        VectorPackage(packages / "@iconify-json" / "noto-v1", tone_suffix="-skin-tone"),
    )
    pictures: list[torch.Tensor] = []
    facts: list[tuple[int, int, int]] = []
    for glyph in tqdm(list(glyphs(concepts, packages / "emojibase-data")), desc="art", unit="emoji"):
        for style, source in enumerate(sources):
            image = source.find(glyph)
            if image is not None:
                pictures.append(copies(image, seed=len(facts)))
                facts.append((glyph.concept, style, glyph.gender))
    columns = [column.contiguous() for column in torch.tensor(facts).unbind(1)]
    art = Art(torch.stack(pictures), *columns)
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        vars(art), destination, metadata={"art": json.dumps({"concepts": [c.name for c in concepts], "styles": STYLES})}
    )
    return art


def load(path: Path = WORK / "art.safetensors", concepts: Sequence[Concept] | None = None) -> Art:
    """Load the art that was prepared for these concepts. Default: those of `concepts.txt`.

    Raises FileNotFoundError that says how to prepare it, ValueError if the concepts have changed since.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `python -m demo.art` first")
    concepts = read_concepts() if concepts is None else concepts
    with safe_open(path, "pt") as file:
        made_for = json.loads(file.metadata()["art"])["concepts"]
        if made_for != [concept.name for concept in concepts]:
            raise ValueError(f"{path} was prepared for other concepts; run `python -m demo.art` again")
        return Art(**{name: file.get_tensor(name) for name in ("pictures", "concept", "style", "gender")})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.art", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="folder for packages and result (default: %(default)s)")
    arguments = parser.parse_args()
    packages = install_packages(arguments.work / "art")
    art = prepare(packages, arguments.work / "art.safetensors")
    counts = ", ".join(f"{name} {int((art.style == style).sum())}" for style, name in enumerate(STYLES))
    tqdm.write(f"{len(art)} pictures: {counts}")


if __name__ == "__main__":
    main()
