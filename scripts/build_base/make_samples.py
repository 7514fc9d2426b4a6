"""Make the sample folders: three styles of the same 48 subjects, and one character in eight pictures.

    python -m scripts.build_base.make_samples

The subjects in `HELD_OUT` are those that adapters are judged by: no sample shows one of them. The drawings come from npm at
pinned versions, so that the folders come out the same each time. Needs Node.js.
"""

import argparse
import io
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from .render import render
from .sources import CACHE, IconSet, icon_set

SIZE = 256
DICEBEAR = "9.4.3"
LICENCE_TEXTS = "6.12.0"
PACKAGES = (f"@dicebear/core@{DICEBEAR}", f"@dicebear/open-peeps@{DICEBEAR}", f"spdx-license-list@{LICENCE_TEXTS}")

HELD_OUT: tuple[str, ...] = (
    *("red-apple", "cat-face", "automobile", "house", "grinning-face", "fire"),
    *("pizza", "rocket", "guitar", "fish", "star", "dog-face"),
)
SUBJECTS: dict[str, str] = {
    "smiling-face-with-sunglasses": "a smiling face with sunglasses",
    "face-with-tears-of-joy": "a face with tears of joy",
    "angry-face": "an angry face",
    "thinking-face": "a thinking face",
    "sleeping-face": "a sleeping face",
    "smiling-face-with-heart-eyes": "a smiling face with heart eyes",
    "nerd-face": "a nerd face",
    "cowboy-hat-face": "a cowboy hat face",
    "astronaut": "an astronaut",
    "cook": "a cook",
    "princess": "a princess",
    "baby": "a baby",
    "person-surfing": "a person surfing",
    "waving-hand": "a waving hand",
    "thumbs-up": "thumbs up",
    "elephant": "an elephant",
    "penguin": "a penguin",
    "owl": "an owl",
    "fox": "a fox",
    "frog": "a frog",
    "octopus": "an octopus",
    "butterfly": "a butterfly",
    "turtle": "a turtle",
    "strawberry": "a strawberry",
    "banana": "a banana",
    "carrot": "a carrot",
    "hamburger": "a hamburger",
    "birthday-cake": "a birthday cake",
    "ice-cream": "an ice cream",
    "hot-beverage": "a hot beverage",
    "sunflower": "a sunflower",
    "cactus": "a cactus",
    "deciduous-tree": "a deciduous tree",
    "mushroom": "a mushroom",
    "crescent-moon": "a crescent moon",
    "rainbow": "a rainbow",
    "bicycle": "a bicycle",
    "sailboat": "a sailboat",
    "airplane": "an airplane",
    "locomotive": "a locomotive",
    "alarm-clock": "an alarm clock",
    "umbrella": "an umbrella",
    "key": "a key",
    "open-book": "an open book",
    "wrapped-gift": "a wrapped gift",
    "castle": "a castle",
    "red-heart": "a red heart",
    "warning": "a warning sign",
}

Convention = Literal["text files", "metadata", "file names"]


@dataclass(frozen=True)
class StyleSample:
    """A folder of one style, and how its captions are kept: each folder shows another convention."""

    folder: str
    style: str
    title: str
    convention: Convention
    notice: str


STYLES: tuple[StyleSample, ...] = (
    StyleSample("openmoji", "openmoji", "OpenMoji", "text files", "Copyright OpenMoji and its contributors."),
    StyleSample("twemoji", "twemoji", "Twemoji", "metadata", "Copyright Twitter, Inc and other contributors."),
    StyleSample(
        "fluent-flat", "fluent-emoji-flat", "Fluent Emoji (flat)", "file names", "Copyright (c) Microsoft Corporation."
    ),
)


@dataclass(frozen=True)
class Scene:
    """One picture of the character: the face of Open Peeps, what she wears, and SVG behind her, 704 units wide."""

    name: str
    caption: str
    face: str
    behind: str
    accessory: str = ""


def _plain(colour: str) -> str:
    return f'<rect width="704" height="704" fill="{colour}"/>'


def _dots(colour: str, radius: int, places: str) -> str:
    pairs = (place.split(",") for place in places.split())
    return "".join(f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>' for x, y in pairs)


def _shelves() -> str:
    colours = ("#c0392b", "#2e6da4", "#e0a526", "#3f8f5b", "#8e5ea2", "#d9772b", "#f2e3c6")
    books = (
        f'<rect x="{x}" y="{shelf - 90 - (x * 7) % 40}" width="40" height="{90 + (x * 7) % 40}" '
        f'fill="{colours[(x // 44 + shelf // 180) % 7]}"/>'
        for shelf in (160, 350, 540, 730)
        for x in range(8, 700, 44)
    )
    boards = (f'<rect y="{shelf}" width="704" height="16" fill="#5b3a1e"/>' for shelf in (160, 350, 540))
    return _plain("#8a5a33") + "".join(books) + "".join(boards)


_HEART = '<path transform="translate({}) scale({})" d="M0 30C-60-20-30-60 0-30C30-60 60-20 0 30Z" fill="#e8467c"/>'
_MOON = '<circle cx="570" cy="130" r="80" fill="#ffe9a8"/><circle cx="530" cy="105" r="70" fill="#1d2b53"/>'
_STARS = "70,80 190,170 330,60 110,330 440,90 620,330 40,480 660,500 400,30"
_FLAKES = "60,60 180,130 330,50 480,110 620,60 90,260 640,240 40,430 670,400 110,560 560,30 250,30 600,530 30,620"
_BEACH = (
    '<circle cx="120" cy="120" r="70" fill="#ffd84d"/><rect y="330" width="704" height="190" fill="#2b8fd0"/>'
    '<rect y="500" width="704" height="204" fill="#f2d9a0"/>'
)
_DROPS = "".join(
    f'<path d="M{x} {y}l-14 44" stroke="#4f83b8" stroke-width="9" stroke-linecap="round"/>'
    for y in range(20, 700, 110)
    for x in range(40 + y % 3 * 25, 704, 120)
)
SCENES: tuple[Scene, ...] = (
    Scene("smiling", "a portrait of mira, smiling, white background", "smile", _plain("#ffffff")),
    Scene("laughing", "a portrait of mira, laughing with tears, yellow background", "smileLOL", _plain("#ffd23f")),
    Scene(
        "beach",
        "a portrait of mira with sunglasses, at the beach",
        "smileBig",
        _plain("#a8e0ff") + _BEACH,
        "sunglasses",
    ),
    Scene(
        "night",
        "a portrait of mira, smiling with closed eyes, at night under the moon",
        "calm",
        _plain("#1d2b53") + _MOON + _dots("#ffffff", 6, _STARS),
    ),
    Scene("library", "a portrait of mira with glasses, in front of bookshelves", "driven", _shelves(), "glasses3"),
    Scene("rain", "a portrait of mira, angry, in the rain", "veryAngry", _plain("#b9c6d3") + _DROPS),
    Scene(
        "love",
        "a portrait of mira, in love with heart eyes, pink background with hearts",
        "lovingGrin1",
        _plain("#ffd0df")
        + "".join(_HEART.format(place, 1.3) for place in ("90 110", "600 90", "650 380", "60 420", "350 60")),
    ),
    Scene("snow", "a portrait of mira, shivering, in the snow", "hectic", _plain("#8fb8de") + _dots("#ffffff", 13, _FLAKES)),
)
_HILLS = '<circle cx="180" cy="560" r="300" fill="#5fa35a"/><circle cx="560" cy="620" r="320" fill="#3f8f5b"/>'
_TILES = "".join(
    f'<rect x="{x}" y="{y}" width="84" height="84" fill="#eef6f8"/>' for x in range(4, 704, 88) for y in range(4, 704, 88)
)
HELD_BACK: tuple[Scene, ...] = (
    Scene("hills", "a portrait of mira, cheeky, in front of green hills", "cheeky", _plain("#cfe8ff") + _HILLS),
    Scene("orange", "a portrait of mira, worried, orange background", "concerned", _plain("#f28c38")),
    Scene("bath", "a portrait of mira, surprised, in front of white tiles", "awe", _plain("#b5cdd6") + _TILES),
    Scene(
        "sunset",
        "a portrait of mira, serious, at sunset",
        "serious",
        _plain("#f7a58a") + _dots("#ffcf5c", 120, "560,420"),
    ),
    Scene("grey", "a portrait of mira with glasses, tired, grey background", "tired", _plain("#9a9fa6"), "glasses"),
    Scene(
        "purple",
        "a portrait of mira, cute, purple background with dots",
        "cute",
        _plain("#6b4c9a") + _dots("#8f73bd", 24, _STARS),
    ),
    Scene(
        "green",
        "a portrait of mira with sunglasses, solemn, green background",
        "solemn",
        _plain("#2f9e6e"),
        "sunglasses2",
    ),
    Scene("black", "a portrait of mira, suspicious, black background", "suspicious", _plain("#15151a")),
)
"""Faces and settings that the sample folder does not show, to measure on."""
CHARACTER: dict[str, Any] = {
    "seed": "mira",
    "head": ["bangs"],
    "headContrastColor": ["c93305"],
    "skinColor": ["ffdbb4"],
    "clothingColor": ["78e185"],
    "facialHairProbability": 0,
    "maskProbability": 0,
}
_NODE = """
import { createAvatar } from '@dicebear/core';
import * as style from '@dicebear/open-peeps';
const scenes = JSON.parse(process.argv[2]);
console.log(JSON.stringify(scenes.map((options) => createAvatar(style, options).toString())));
"""


def install(cache: Path) -> Path:
    """The pinned npm packages, in a folder of the cache."""
    folder = cache / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--prefix", str(folder), "--no-save", "--silent", *PACKAGES]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError("npm is needed to make the samples: install Node.js, which brings it") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"npm could not install {' '.join(PACKAGES)}: {error.stderr.strip()}") from error
    return folder


def _licence(packages: Path, name: str) -> str:
    path = packages / "node_modules" / "spdx-license-list" / "licenses" / f"{name}.json"
    text: str = json.loads(path.read_text(encoding="utf-8"))["licenseText"]
    return text.strip() + "\n"


def portraits(packages: Path, scenes: Sequence[Scene], characters: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """A character in each scene, at 256 x 256 pixels."""
    import resvg_py

    avatars = _avatars(packages, scenes, characters)
    found = []
    for scene, avatar in zip(scenes, avatars, strict=True):
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 704 704">{scene.behind}{avatar}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
        found.append(Image.open(io.BytesIO(png)).convert("RGB"))
    return found


def _avatars(packages: Path, scenes: Sequence[Scene], characters: Sequence[Mapping[str, Any]]) -> list[str]:
    """A character in each scene, as SVG, without what is behind her."""
    options = [
        {
            **character,
            "face": [scene.face],
            "accessories": [scene.accessory] if scene.accessory else [],
            "accessoriesProbability": 100 if scene.accessory else 0,
        }
        for scene, character in zip(scenes, characters, strict=True)
    ]
    script = packages / "avatars.mjs"
    script.write_text(_NODE, encoding="utf-8")
    done = subprocess.run(
        ["node", script.name, json.dumps(options)], check=True, capture_output=True, text=True, cwd=packages
    )
    svgs: list[str] = json.loads(done.stdout)
    return svgs


def _save(image: Image.Image, path: Path) -> None:
    """In a few colours where that loses nothing anyone sees: flat drawings have few but for their soft edges."""
    few = image.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    few.save(path, lossless=True, quality=100, method=6)


def _clear(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.webp", "*.txt", "metadata.jsonl"):
        for path in folder.glob(pattern):
            path.unlink()


_STYLE_ATTRIBUTION = """# Attribution

{count} drawings of {title} ({url})
by {author}, licence {licence}; the text is in `LICENSE`. The pictures in this folder are under that same licence.

Source: the npm package `{package}`, version {version}.

Changes made: the SVG drawings were rendered at {size} x {size} pixels on white and saved as lossless WebP in few colours;
captions were written for them. Made by `scripts/build_base/make_samples.py`.
"""
_SUBJECT_ATTRIBUTION = """# Attribution

Drawn with Open Peeps (https://www.openpeeps.com/) by Pablo Stanley, licence CC0 1.0; the text is in `LICENSE`.

Source: the npm packages `@dicebear/core` and `@dicebear/open-peeps`, version {version} (DiceBear, https://www.dicebear.com/;
their code, MIT, is not part of these pictures).

Changes made: one head, skin and sweater were combined with several faces and accessories to make one character, "mira";
backgrounds were drawn behind her, likewise CC0; all was rendered at {size} x {size} pixels and saved as lossless WebP in few
colours; captions were written. Made by `scripts/build_base/make_samples.py`.
"""


def _style_licence(packages: Path, sample: StyleSample, source: IconSet) -> str:
    text = _licence(packages, source.licence)
    if source.licence == "MIT":
        return text.replace("Copyright (c) <year> <copyright holders>", sample.notice)
    return f"{sample.title}: {sample.notice}\nLicensed under {source.licence}, whose text follows.\n\n{text}"


def make_style(sample: StyleSample, output: Path, packages: Path, cache: Path) -> Path:
    """Write one folder of a style."""
    source, folder = icon_set(sample.style), output / "styles" / sample.folder
    _clear(folder)
    rows: list[str] = []
    for name, words in SUBJECTS.items():
        caption = source.template.format(words)
        stem = caption.replace(" ", "_") if sample.convention == "file names" else name
        _save(render(sample.style, name, SIZE, cache), folder / f"{stem}.webp")
        rows.append(json.dumps({"file_name": f"{stem}.webp", "text": caption}))
        if sample.convention == "text files":
            (folder / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8")
    if sample.convention == "metadata":
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    attribution = _STYLE_ATTRIBUTION.format(
        count=len(SUBJECTS),
        title=sample.title,
        url=source.url,
        author=source.author,
        licence=source.licence,
        package=source.package,
        version=source.version,
        size=SIZE,
    )
    (folder / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
    (folder / "LICENSE").write_text(_style_licence(packages, sample, source), encoding="utf-8")
    return folder


def make_subject(output: Path, packages: Path) -> Path:
    """Write the folder of the character."""
    folder = output / "subjects" / "mira"
    _clear(folder)
    for scene, picture in zip(SCENES, portraits(packages, SCENES, [CHARACTER] * len(SCENES)), strict=True):
        _save(picture, folder / f"{scene.name}.webp")
        (folder / f"{scene.name}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    (folder / "ATTRIBUTION.md").write_text(_SUBJECT_ATTRIBUTION.format(version=DICEBEAR, size=SIZE), encoding="utf-8")
    (folder / "LICENSE").write_text(_licence(packages, "CC0-1.0"), encoding="utf-8")
    return folder


def main() -> None:
    """Make all the folders."""
    if shown := set(HELD_OUT) & set(SUBJECTS):
        raise ValueError(f"held-out subjects among the samples: {', '.join(sorted(shown))}")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder the packages are kept in")
    parser.add_argument("--output", type=Path, default=Path("samples"), help="folder of styles/ and subjects/")
    options = parser.parse_args()
    packages = install(options.cache)
    folders = [make_style(sample, options.output, packages, options.cache) for sample in STYLES]
    folders.append(make_subject(options.output, packages))
    for folder in folders:
        files = list(folder.iterdir())
        print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
