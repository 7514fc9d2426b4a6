"""What other programs write beside an adapter file: A1111's ``NAME.json`` and the ``NAME.civitai.info`` of its helpers.

``NAME.json`` is what A1111's editor of user metadata keeps (``modules/ui_extra_networks_user_metadata.py`` and
``extensions-builtin/Lora/ui_edit_user_metadata.py`` there); ``.civitai.info`` is what Civitai's interface answers about a
version of a model (https://github.com/civitai/civitai/wiki/REST-API-Reference). Both are texts of strangers: no more is
read than stands here, nothing is fetched, and what is too long is cut and told. Imports no torch.
"""

import html
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import refuse_larger
from ..core.parsing import json_value, number, refusing
from ..core.shortening import in_one_line
from .origin import shared_as

_MOST_BYTES = 2**22  # of a file
_LONGEST = 2000  # letters of a text
_MOST = 100  # texts of a kind
_SUFFIXES = (".civitai.info", ".json")
_MARKUP = re.compile(r"<[^<>]{0,1000}>")
_PROMPT = "prompt"  # of a picture, in what Civitai answers
_STRENGTHS = (0.05, 2.0)  # a preferred weight beyond these is no advice


@dataclass(frozen=True)
class Sidecar:
    """What stands beside an adapter file.

    Attributes:
        title: What it is called.
        description: In words.
        triggers: The words that call it.
        tags: What it is listed under.
        captions: Prompts of pictures that were drawn with it.
        made_for: The model, as `origin.Origin` names it; "" where nothing tells.
        strength: At which it is meant to be used; None where nothing tells.
        notes: What was left out, and why.
    """

    title: str = ""
    description: str = ""
    triggers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    made_for: str = ""
    strength: float | None = None
    notes: tuple[str, ...] = ()

    def beside(self, other: "Sidecar") -> "Sidecar":
        """Join what two files say.

        Args:
            other: What the other says, which counts where this one is silent.

        Returns:
            Both together.
        """
        return Sidecar(
            self.title or other.title,
            self.description or other.description,
            tuple(dict.fromkeys((*self.triggers, *other.triggers))),
            tuple(dict.fromkeys((*self.tags, *other.tags))),
            tuple(dict.fromkeys((*self.captions, *other.captions))),
            self.made_for or other.made_for,
            self.strength if self.strength is not None else other.strength,
            (*self.notes, *other.notes),
        )


def sidecars_of(path: Path) -> tuple[Path, ...]:
    """Find the files beside an adapter that tell of it.

    Args:
        path: The adapter file.

    Returns:
        Those that are there: A1111's first, which a person wrote.
    """
    found = (path.with_name(path.stem + suffix) for suffix in reversed(_SUFFIXES))
    return tuple(one for one in found if one.is_file())


def read_sidecars(path: Path) -> Sidecar:
    """Read what stands beside an adapter file.

    Args:
        path: The adapter file.

    Returns:
        What is told; a file that cannot be read is named among the notes.
    """
    found = Sidecar()
    for one in sidecars_of(path):
        try:
            found = found.beside(_read(one))
        except UserError as error:
            found = found.beside(Sidecar(notes=(str(error),)))
    return found


def _read(path: Path) -> Sidecar:
    """What one file says. Raises UserError."""
    refuse_larger(path, _MOST_BYTES, "such files")
    with refusing(f"{path} is not read"):
        told = json_value(path.read_bytes())
        if not isinstance(told, dict):
            raise UserError(f"{path} is not read: it is no table")
        return _of_civitai(told, path) if path.name.endswith(_SUFFIXES[0]) else _of_a1111(told, path)


def _of_a1111(told: Mapping[str, Any], path: Path) -> Sidecar:
    weight = number(told.get("preferred weight"))
    good = weight is not None and math.isfinite(weight) and _STRENGTHS[0] <= weight <= _STRENGTHS[1]
    # A1111 keeps 0 for no weight.
    notes = () if good or not weight else (f"{path}: the preferred weight {weight:g} is no strength to draw with",)
    return Sidecar(
        description=" ".join(_text(told.get(name)) for name in ("description", "notes")).strip(),
        triggers=tuple(_texts([told.get("activation text")])),
        made_for=shared_as(_text(told.get("sd version"))),
        strength=weight if good else None,
        notes=notes,
    )


def _of_civitai(told: Mapping[str, Any], path: Path) -> Sidecar:
    model = told.get("model")
    whole: Mapping[str, Any] = model if isinstance(model, dict) else {}
    pictures = told.get("images")
    prompts = list(_prompts(pictures if isinstance(pictures, list) else []))
    words = told.get("trainedWords")
    tags = whole.get("tags", told.get("tags"))
    several = {"trainedWords": words, "tags": tags, "images": pictures}
    long = [name for name, value in several.items() if isinstance(value, list) and len(value) > _MOST]
    return Sidecar(
        title=_text(whole.get("name")) or _text(told.get("name")),
        description=" ".join(_text(one.get("description")) for one in (whole, told)).strip(),
        triggers=tuple(_texts(words)),
        tags=tuple(_texts(tags)),
        captions=tuple(_texts(prompts)),
        made_for=shared_as(_text(told.get("baseModel"))),
        notes=tuple(f"{path}: {name} has more than {_MOST} entries, of which the first are read" for name in long),
    )


def _prompts(pictures: list[Any]) -> Iterator[object]:
    for one in pictures[:_MOST]:
        meta = one.get("meta") if isinstance(one, dict) else None
        if isinstance(meta, dict):
            yield meta.get(_PROMPT)


def _texts(values: object) -> Iterator[str]:
    """The texts of a list, each in one line, without those that say nothing."""
    for value in values[:_MOST] if isinstance(values, list) else ():
        text = _text(value).strip(" ,;")
        if text:
            yield text


def _text(value: object) -> str:
    """A text in one line, without markup and what cannot be shown; "" for what is none."""
    if not isinstance(value, str):
        return ""
    return in_one_line(html.unescape(_MARKUP.sub(" ", value[: 4 * _LONGEST])))[:_LONGEST]
