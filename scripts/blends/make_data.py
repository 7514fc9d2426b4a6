"""Fetch and draw what blends are measured with, into one folder that travels.

    python -m scripts.blends.make_data --output FOLDER

``styles/NAME/train`` are what an adapter learns from, with captions; the three sample styles have theirs in ``samples``.
``known`` are other drawings, by which a judge knows a style, and ``held`` are yet others, which say how far to trust it. Of
styles that are only compared with there is ``known`` alone. ``subjects/NAME`` are two characters made as the sample one is,
and all three with settings of their own in ``held`` and other characters of the same hand in ``others``.
``subjects.safetensors`` are the points of `subject_net` for everything that the emoji sets draw. Needs Node.js.
"""

import argparse
import io
import json
import random
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from peft_diffusion.evaluation.drawings import pixels_of
from peft_diffusion.evaluation.subject_net import Subjects, load_subject_net, points_of
from scripts.blends.judges import COLOURS
from scripts.build_base.captions import with_article
from scripts.build_base.make_samples import CHARACTER, DICEBEAR, HELD_BACK, HELD_OUT, SUBJECTS
from scripts.build_base.render import drawings, render
from scripts.build_base.sources import CACHE, UNSEEN_SETS, icon_set

SIZE = 128
SAMPLES: dict[str, str] = {"openmoji": "openmoji", "twemoji": "twemoji", "fluent-flat": "fluent-emoji-flat"}
COMPARED_WITH = ("noto", "noto-v1", "fxemoji", "ph-duotone", "ph-fill", "flat-color-icons")  # styles of the base
TOLD_BY = ("noto", "openmoji", "twemoji", "fluent-emoji-flat")
TOLD_AMONG = 200  # subjects, of which the judge has to find the one that was asked for
TRAINED, KNOWN, HELD, COMPARED = 54, 80, 48, 40  # drawings of each kind
_VARIANT = re.compile(r"-\d+$")


@dataclass(frozen=True)
class Face:
    """A picture of a character: how it is named in the caption, what is behind it, and what the avatar is made with."""

    words: str
    colour: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Character:
    """A character of DiceBear: what all its pictures have in common, and those of others of the same hand."""

    style: str
    trigger: str
    kind: str
    own: Mapping[str, Any]
    others: Sequence[Mapping[str, Any]]
    shown: Sequence[Face]
    held: Sequence[Face]
    drawn: Mapping[str, Any] = field(default_factory=dict)


def _robot(eyes: str, mouth: str, words: str, colour: str) -> Face:
    return Face(words, colour, {"eyes": [eyes], "mouth": [mouth]})


def _man(eyes: str, mouth: str, words: str, colour: str, accessory: str = "") -> Face:
    more = {"accessories": [accessory] if accessory else [], "accessoriesProbability": 100 if accessory else 0}
    return Face(words, colour, {"eyes": [eyes], "mouth": [mouth], **more})


CHARACTERS: tuple[Character, ...] = (
    Character(
        "bottts",
        "zog",
        "robot",
        {
            "baseColor": ["00897b"], "face": ["square02"], "sides": ["antenna02"], "top": ["glowingBulb01"],
            "textureProbability": 0, "topProbability": 100, "sidesProbability": 100, "mouthProbability": 100,
        },
        [
            {"baseColor": [base], "face": [face], "sides": [sides], "top": [top], "textureProbability": 0}
            for base, face, sides, top in (
                ("e53935", "round01", "round", "horns"), ("fdd835", "square01", "cables01", "radar"),
                ("5e35b1", "round02", "square", "lights"), ("757575", "square04", "antenna01", "pyramid"),
            )
        ],
        [
            _robot("round", "smile01", "smiling", "white"), _robot("happy", "smile02", "happy", "yellow"),
            _robot("hearts", "smile01", "in love", "pink"), _robot("dizzy", "square01", "dizzy", "grey"),
            _robot("glow", "grill01", "with glowing eyes", "black"), _robot("robocop", "bite", "angry", "blue"),
            _robot("sensor", "grill02", "looking", "green"), _robot("eva", "diagram", "calm", "purple"),
        ],
        [
            _robot("frame1", "smile01", "smiling", "orange"), _robot("roundFrame01", "smile02", "happy", "green"),
            _robot("bulging", "square02", "surprised", "yellow"), _robot("shade01", "grill03", "with shades", "purple"),
            _robot("frame2", "bite", "angry", "grey"), _robot("roundFrame02", "diagram", "calm", "pink"),
            _robot("happy", "smile01", "happy", "blue"), _robot("round", "grill01", "serious", "white"),
        ],
    ),
    Character(
        "avataaars",
        "dario",
        "man",
        {
            "top": ["shortCurly"], "hairColor": ["2c1b18"], "facialHair": ["beardMajestic"], "facialHairColor": ["2c1b18"],
            "facialHairProbability": 100, "skinColor": ["d08b5b"], "clothing": ["hoodie"], "clothesColor": ["ff5c5c"],
            "eyebrows": ["default"],
        },
        [
            {"top": [top], "hairColor": [hair], "facialHairProbability": beard, "skinColor": [skin], "clothing": [cloth],
             "clothesColor": [colour]}
            for top, hair, beard, skin, cloth, colour in (
                ("bob", "c93305", 0, "ffdbb4", "blazerAndShirt", "5199e4"),
                ("bigHair", "d6b370", 0, "edb98a", "overall", "a7ffc4"),
                ("hijab", "2c1b18", 0, "ae5d29", "shirtCrewNeck", "ffffb1"),
                ("shortFlat", "a55728", 0, "ffdbb4", "collarAndSweater", "25557c"),
            )
        ],
        [
            _man("happy", "smile", "smiling", "white"), _man("happy", "twinkle", "happy", "yellow"),
            _man("hearts", "smile", "in love", "pink"), _man("squint", "serious", "serious", "grey"),
            _man("closed", "default", "with closed eyes", "black"), _man("cry", "sad", "crying", "blue"),
            _man("default", "smile", "with sunglasses", "green", "sunglasses"),
            _man("default", "default", "with glasses", "purple", "prescription02"),
        ],
        [
            _man("default", "smile", "smiling", "orange"), _man("wink", "tongue", "cheeky", "green"),
            _man("surprised", "screamOpen", "surprised", "yellow"), _man("side", "serious", "suspicious", "purple"),
            _man("eyeRoll", "grimace", "angry", "grey"), _man("default", "twinkle", "with sunglasses", "pink", "wayfarers"),
            _man("happy", "smile", "happy", "blue"), _man("default", "serious", "with glasses", "white", "round"),
        ],
    ),
)  # fmt: skip
_NODE = """
import { createAvatar } from '@dicebear/core';
import { readFileSync } from 'fs';
const found = [];
for (const [name, options] of JSON.parse(readFileSync(process.argv[2]))) {
  const style = await import(`@dicebear/${name}`);
  found.push(createAvatar(style, options).toString());
}
console.log(JSON.stringify(found));
"""


def _install(cache: Path) -> Path:
    """The packages of the characters, in a folder of the cache."""
    folder = cache / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    packages = [f"@dicebear/{name}@{DICEBEAR}" for name in ("core", "open-peeps", *(one.style for one in CHARACTERS))]
    subprocess.run(["npm", "install", "--prefix", str(folder), "--no-save", "--silent", *packages], check=True)
    return folder


def _avatars(packages: Path, wanted: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Avatars as SVG, each of a DiceBear style and its options."""
    script, given = packages / "avatars.mjs", packages / "avatars.json"
    script.write_text(_NODE, encoding="utf-8")
    given.write_text(json.dumps(wanted), encoding="utf-8")
    done = subprocess.run(
        ["node", script.name, given.name], check=True, capture_output=True, text=True, cwd=packages, encoding="utf-8"
    )
    svgs: list[str] = json.loads(done.stdout)
    return svgs


def _over(behind: str, avatar: str) -> Image.Image:
    """An avatar before a background of 704 x 704 units."""
    import resvg_py

    sized = re.sub(r"<svg ", '<svg width="704" height="704" ', avatar, count=1)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 704 704">{behind}{sized}</svg>'
    return Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)))
    ).convert("RGB")


def _plain(colour: str) -> str:
    return f'<rect width="704" height="704" fill="#{COLOURS[colour]}"/>'


def _save(folder: Path, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    rows = []
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        picture.save(folder / f"{number:03d}.webp", lossless=True, quality=60, method=2)
        rows.append(json.dumps({"file_name": f"{number:03d}.webp", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def make_character(one: Character, packages: Path, output: Path) -> None:
    """Draw a character, and others of its hand."""

    def drawn(faces: Sequence[Face], characters: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
        wanted = [(one.style, {"seed": one.trigger, **own, **face.options}) for face in faces for own in characters]
        behinds = [_plain(face.colour) for face in faces for _ in characters]
        return [_over(behind, svg) for behind, svg in zip(behinds, _avatars(packages, wanted), strict=True)]

    def captions(faces: Sequence[Face]) -> list[str]:
        return [f"a portrait of {one.trigger}, {face.words}, {face.colour} background" for face in faces]

    folder = output / "subjects" / one.trigger
    _save(folder / "train", drawn(one.shown, [one.own]), captions(one.shown))
    _save(folder / "held", drawn(one.held, [one.own]), captions(one.held))
    _save(folder / "others", drawn(one.held, one.others), [text for text in captions(one.held) for _ in one.others])


def make_mira(packages: Path, output: Path) -> None:
    """Draw the sample character in settings that its folder does not show, and others of its hand."""
    from scripts.evaluate_subject import OTHERS

    for name, characters, scenes in (("held", [CHARACTER], HELD_BACK), ("others", OTHERS[:4], HELD_BACK)):
        wanted, behinds, captions = [], [], []
        for scene in scenes:
            for own in characters:
                accessory = {"accessories": [scene.accessory]} if scene.accessory else {}
                shown = {"accessoriesProbability": 100 if scene.accessory else 0, "face": [scene.face], **accessory}
                wanted.append(("open-peeps", {**own, **shown}))
                behinds.append(scene.behind)
                captions.append(scene.caption)
        pictures = [_over(behind, svg) for behind, svg in zip(behinds, _avatars(packages, wanted), strict=True)]
        _save(output / "subjects" / "mira" / name, pictures, captions)


def _subject(name: str) -> str:
    """What an icon shows, without the number of a variant."""
    return _VARIANT.sub("", name).replace("-", " ")


def make_style(folder: str, style: str, output: Path, shared: Sequence[str], *, trains: bool) -> None:
    """Draw what a style is learned from and judged by, unless it is there."""
    if (output / "styles" / folder).exists():
        return
    own: dict[str, str] = {}
    for row in drawings(style):
        own.setdefault(_subject(row.name), row.name)
    asked = {name.replace("-", " ") for name in HELD_OUT}
    shown = {name.replace("-", " ") for name in SUBJECTS}
    chance = random.Random(0)
    if trains:
        learned = [name for name in shared if name not in asked][:TRAINED]
        shown = set(learned)
        captions = [icon_set(style).template.format(with_article(name)) for name in learned]
        _save(output / "styles" / folder / "train", [render(style, own[name], SIZE) for name in learned], captions)
    rest = sorted(set(own) - shown - asked)
    chance.shuffle(rest)
    counts = (KNOWN, HELD) if folder not in COMPARED_WITH else (COMPARED, 0)
    for kind, names in (("known", rest[: counts[0]]), ("held", rest[counts[0] : sum(counts)])):
        if names:
            _save(output / "styles" / folder / kind, [render(style, own[name], SIZE) for name in names], names)


def shared_subjects() -> list[str]:
    """What all the unseen sets draw, in an order of chance that is always the same."""
    sets = [{_subject(row.name) for row in drawings(one.style)} for one in UNSEEN_SETS]
    found = sorted(set.intersection(*sets))
    random.Random(0).shuffle(found)
    return found


def make_subjects(output: Path) -> None:
    """Map what several sets draw to points: what pictures are asked to show among many other things."""
    names = {style: {_subject(row.name): row.name for row in drawings(style)} for style in TOLD_BY}
    asked = [name.replace("-", " ") for name in HELD_OUT]
    others = sorted(set.intersection(*map(set, names.values())) - set(asked))
    chosen = [*asked, *random.Random(1).sample(others, TOLD_AMONG - len(asked))]
    net, points = load_subject_net(), {}
    for subject in chosen:
        pictures = [render(style, own[subject], SIZE) for style, own in names.items() if subject in own]
        points[subject] = points_of(net, pixels_of(pictures))
    known = Subjects(points)
    save_file({"means": known.means}, output / "subjects.safetensors", {"subjects": json.dumps(known.names)})


def main() -> None:
    """Make all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    output: Path = parser.parse_args().output
    torch.manual_seed(0)
    shared = shared_subjects()
    print(f"{len(shared)} subjects in all the unseen sets", flush=True)
    for folder, style in SAMPLES.items():
        make_style(folder, style, output, shared, trains=False)
    for one in UNSEEN_SETS:
        make_style(one.style, one.style, output, shared, trains=True)
    for style in COMPARED_WITH:
        make_style(style, style, output, shared, trains=False)
    packages = _install(CACHE)
    shutil.rmtree(output / "subjects", ignore_errors=True)
    for character in CHARACTERS:
        make_character(character, packages, output)
    make_mira(packages, output)
    print("drawn; now the points of subjects", flush=True)
    make_subjects(output)


if __name__ == "__main__":
    main()
