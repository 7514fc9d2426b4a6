"""Labels in any script: each letter by a font that has it, found through fontconfig or in the known folders."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from peft_diffusion.core.events import Event, Warned
from peft_diffusion.generation import fonts, sheet

CAT, EMOJI, RARE = "猫", "\U0001f408", "\U0001e900"


def block(width: int) -> Any:
    pen = TTGlyphPen(None)
    pen.moveTo((50, 0))
    for corner in ((50, 900), (width, 900), (width, 0)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


def make_font(path: Path, letter: str, colour: tuple[float, float, float, float] | None = None) -> Path:
    """A font of one letter, a block, perhaps in colour; what it lacks is a narrow block."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "one", "layer"])
    builder.setupCharacterMap({ord(letter): "one"})
    builder.setupGlyf({".notdef": block(200), "one": block(900), "layer": block(900)})
    builder.setupHorizontalMetrics({".notdef": (300, 0), "one": (1000, 0), "layer": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "One", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    if colour is not None:
        builder.setupCOLR({"one": [("layer", 0)]})
        builder.setupCPAL([[colour]])
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No fonts of this machine, and nothing that was found before or is kept afterwards."""
    kept: list[Callable[[], None]] = [one.cache_clear for one in (fonts._files, fonts._installed, fonts._has, fonts._opened)]
    monkeypatch.setattr(fonts, "_folders", lambda: [tmp_path / "fonts"])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for clear in kept:
        clear()
    yield
    for clear in kept:
        clear()


def labelled(text: str) -> Image.Image:
    return sheet.grid([[Image.new("RGB", (200, 60), "white")]], [text])


def test_letters_are_drawn_by_known_fonts_that_have_them(tmp_path: Path) -> None:
    before = labelled(f"a {CAT} b")
    assert fonts.missing(f"a {CAT} b é ж") == CAT
    make_font(tmp_path / "fonts" / "deep" / "NotoSansCJK-Regular.ttc", CAT)
    for one in (fonts._files, fonts._installed):
        one.cache_clear()
    found = fonts.runs(f"a {CAT} b", 20)
    assert [run.text for run in found] == ["a ", CAT, " b"] and found[0].font is found[2].font
    assert fonts.missing(f"a {CAT} b") == "" and found[1].length == 20
    assert labelled(f"a {CAT} b").tobytes() != before.tobytes()


def test_fontconfig_is_asked_and_colour_stays(tmp_path: Path) -> None:
    font = make_font(tmp_path / "somewhere" / "own.ttf", EMOJI, (1.0, 0.0, 0.0, 1.0))
    program = tmp_path / "bin" / "fc-match"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$3" = ":charset={ord(EMOJI):x}" ] && printf "%s\\n0" "{font}"\n')
    program.chmod(0o755)
    # With what joins and changes it, an emoji is one.
    assert [run.text for run in fonts.runs(f"a{EMOJI}\ufe0f", 20)] == ["a", f"{EMOJI}\ufe0f"]
    colours = labelled(f"a {EMOJI}").getcolors(10_000) or []
    assert any(colour == (255, 0, 0) and count > 50 for count, colour in colours)
    assert fonts.missing(f"{EMOJI}{RARE}") == RARE


def test_a_font_of_bitmaps_is_brought_to_size(tmp_path: Path) -> None:
    """Letters that only come at another size stand on the base line at the size of the others."""
    font, scale = fonts._opened(make_font(tmp_path / "a.ttf", CAT), 0, 160) or (None, 0.0)
    assert font is not None and scale == 1
    image = Image.new("RGB", (60, 40), "white")
    sheet._paste_scaled(ImageDraw.Draw(image), fonts.Run(CAT, font, 20 / 160), (10, 25), 20)
    box = Image.eval(image.convert("L"), lambda value: 255 - value).getbbox()
    assert box is not None and 14 <= box[2] - box[0] <= 20 and 14 <= box[3] - box[1] <= 20 and box[0] >= 10


def test_what_no_font_has_is_told_and_plain_labels_are_as_ever() -> None:
    told: list[Event] = []
    sheet.tell_missing([f"a {CAT}", "plain", f"{CAT}"], told.append)
    (warned,) = told
    assert isinstance(warned, Warned) and warned.message.startswith(f"no font here has {CAT}, so labels show boxes")
    sheet.tell_missing(["plain", "é ж\n"], told.append)
    assert len(told) == 1
    line = Image.new("RGB", (200, 40), "white")
    ImageDraw.Draw(line).text((3, 4), "plain é", fill=sheet.INK, font=fonts.main_font("plain é", 20))
    other = Image.new("RGB", (200, 40), "white")
    sheet._write_line(ImageDraw.Draw(other), "plain é", (3, 4), 20)
    assert line.tobytes() == other.tobytes()
