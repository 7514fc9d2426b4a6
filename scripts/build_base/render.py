"""Render the icon sets on white, one drawing at any size or all of them into one packed file."""

import argparse
import io
import json
import os
import re
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from .fetch import read_icons
from .packed import Drawing
from .sources import CACHE, ICON_SETS, IconSet, icon_set
from .words import OTHER_NAMES, emoji_tags, split

PACKED_SIZE = 128
_TONE = re.compile(r"-skin-tone|(-(medium-light|medium-dark|light|medium|dark))+$")
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{}">{}</svg>'


def _is_toned(name: str, names: dict[str, object]) -> bool:
    """Whether the icon is another icon of the set with another skin tone."""
    match = _TONE.search(name)
    return match is not None and ("skin-tone" in name or name[: match.start()] in names)


def _kept(chosen: IconSet, name: str, names: dict[str, object]) -> bool:
    if chosen.style == "tabler" and name.endswith("-filled"):
        return False
    return name.endswith(chosen.suffix) and not _is_toned(name, names)


def _subject(chosen: IconSet, name: str, cache: Path) -> str:
    words = name.removesuffix(chosen.suffix).split("-")
    return " ".join(split(word, cache) for word in words) if chosen.style == "fxemoji" else " ".join(words)


def drawings(style: str, cache: Path = CACHE) -> list[Drawing]:
    """Every icon of a style, without skin tones, ordered by name."""
    chosen = icon_set(style)
    icons = read_icons(chosen, cache)["icons"]
    names = sorted(name for name, icon in icons.items() if not icon.get("hidden") and _kept(chosen, name, icons))
    subjects = [_subject(chosen, name, cache) for name in names]
    near = emoji_tags(cache) if chosen.is_emoji else OTHER_NAMES
    tags = [near.get(subject, ()) for subject in subjects]
    rows = zip(names, subjects, tags, strict=True)
    return [Drawing(style, name, subject, words, chosen.role, chosen.licence) for name, subject, words in rows]


def svg(style: str, name: str, cache: Path = CACHE) -> str:
    """The SVG of one icon; its current colour, where it has one, is black."""
    chosen = icon_set(style)
    package = read_icons(chosen, cache)
    if name not in package["icons"]:
        raise ValueError(f"the set {style!r} has no icon {name!r}")
    icon = package["icons"][name]
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    box = (icon.get(key, package.get(key, default)) for key, default in defaults.items())
    return _SVG.format(" ".join(str(number) for number in box), icon["body"].replace("currentColor", "#000000"))


def render(style: str, name: str, size: int = PACKED_SIZE, cache: Path = CACHE) -> Image.Image:
    """One icon on a white square of `size` pixels, in RGB; a drawing that is not square stands in the middle."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise RuntimeError("drawing icons needs resvg-py: pip install 'peft_diffusion[base]'") from error
    png = svg_to_bytes(svg_string=svg(style, name, cache), width=size, height=size, skip_system_fonts=True)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return canvas.convert("RGB")


def _packed(job: tuple[Drawing, Path]) -> bytes:
    """One drawing as lossless WebP."""
    drawing, cache = job
    file = io.BytesIO()
    render(drawing.style, drawing.name, PACKED_SIZE, cache).save(file, "WEBP", lossless=True, quality=50, method=3)
    return file.getvalue()


def pack(path: Path, styles: tuple[str, ...], cache: Path = CACHE, limit: int | None = None) -> int:
    """Render the styles into one zip of WebP files with a `meta.json`; returns how many drawings it holds."""
    jobs = [drawing for style in styles for drawing in drawings(style, cache)[:limit]]
    path.parent.mkdir(parents=True, exist_ok=True)
    meta: list[dict[str, Any]] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        files = pool.map(_packed, ((drawing, cache) for drawing in jobs), chunksize=64)
        for number, (drawing, file) in enumerate(zip(jobs, files, strict=True)):
            name = f"{number:05d}.webp"
            archive.writestr(name, file)
            meta.append(drawing.row(name))
        archive.writestr("meta.json", json.dumps(meta), zipfile.ZIP_DEFLATED)
    return len(meta)


def main() -> None:
    """Render and pack the sets."""
    styles = tuple(source.style for source in ICON_SETS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder the archives are kept in")
    parser.add_argument("--output", type=Path, default=CACHE / "drawings.zip", help="the packed file")
    parser.add_argument("--styles", nargs="+", default=styles, choices=styles, help="the sets to render")
    parser.add_argument("--limit", type=int, help="the first so many drawings of each set only")
    options = parser.parse_args()
    count = pack(options.output, tuple(options.styles), options.cache, options.limit)
    print(f"{count} drawings, {options.output.stat().st_size / 1e6:.1f} MB: {options.output}")


if __name__ == "__main__":
    main()
