"""Adapters that a prompt names: ``<lora:name:0.8>``, ``<lora:name:te:unet>`` and ``<lyco:...>``, as A1111 reads them."""

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..core.errors import UserError, did_you_mean
from ..core.files import at_home, files_below
from ..core.parsing import number_in
from ..core.shortening import brief
from ..formats.container import is_pickle, read_header, title
from .settings import Choice

_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)


class Tag(NamedTuple):
    """An adapter that a prompt names, and how much of it.

    Attributes:
        name: As the prompt calls it.
        te: The strength for text encoders.
        denoiser: The strength for the network that denoises.
    """

    name: str
    te: float
    denoiser: float


def take(prompt: str) -> tuple[str, tuple[Tag, ...]]:
    """Take the adapters out of a prompt.

    Args:
        prompt: As it was given.

    Returns:
        The words, and the adapters in the order of the prompt, one that is named twice with the sum of its strengths.

    Raises:
        UserError: A strength is no number, or something else is said.
    """
    found: dict[str, Tag] = {}
    for match in _TAG.finditer(prompt):
        tag = _read(match[0], match[1])
        before = found.get(tag.name, Tag(tag.name, 0.0, 0.0))
        found[tag.name] = Tag(tag.name, before.te + tag.te, before.denoiser + tag.denoiser)
    return (" ".join(_TAG.sub("", prompt).split()) if found else prompt), tuple(found.values())


def _read(text: str, inside: str) -> Tag:
    name, *more = (part.strip() for part in inside.split(":"))
    if not name:
        raise UserError(f"{brief(text)} in the prompt names no adapter; write <lora:NAME:0.8>")
    named = dict(one.split("=", 1) for one in more if "=" in one)
    plain = [one for one in more if "=" not in one]
    odd = [*(f"{key}={value}" for key, value in named.items() if key not in ("te", "unet")), *plain[2:]]
    if odd:
        raise UserError(
            f"{brief(text)} in the prompt says {brief(odd[0])}, which is not read; strengths are <lora:NAME:TE:UNET>"
        )
    te = _strength(text, named.get("te", plain[0] if plain else "1"))
    return Tag(name, te, _strength(text, named["unet"]) if "unet" in named else _second(text, plain, te))


def _second(text: str, plain: Sequence[str], te: float) -> float:
    return _strength(text, plain[1]) if len(plain) > 1 else te


def _strength(text: str, number: str) -> float:
    found = number_in(number)
    if found is None or not math.isfinite(found):
        raise UserError(
            f"{brief(text)} in the prompt: {brief(number)!r} is no strength; write a number, as in <lora:NAME:0.8>"
        )
    return found


@dataclass(frozen=True)
class Shelf:
    """Where the adapters that prompts name are looked for: those given, then a folder with its subfolders.

    Attributes:
        given: Those that were named as files.
        folder: The folder; None for none.
        chosen: Those that a library chose, which are found by the paths of their files.
    """

    given: tuple[Choice, ...] = ()
    folder: Path | None = None
    chosen: tuple[Choice, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        folder = None if self.folder is None else at_home(self.folder)
        if folder is not None and not folder.is_dir():
            raise UserError(f"there is no folder of adapters {folder}")
        object.__setattr__(self, "folder", folder)

    def holding(self, given: Iterable[Choice] = (), chosen: Iterable[Choice] = ()) -> "Shelf":
        """Put further adapters on the shelf.

        Args:
            given: Those that were named as files.
            chosen: Those that a library chose.

        Returns:
            Another shelf, which knows what this one has found in the folder.
        """
        made = copy.copy(self)
        object.__setattr__(made, "given", (*self.given, *given))
        object.__setattr__(made, "chosen", (*self.chosen, *chosen))
        return made

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The adapter files of the folder."""
        found = files_below(self.folder) if self.folder is not None else []
        return tuple(path for path in found if (_is_safetensors(path) or is_pickle(path)) and path.is_file())

    @cached_property
    def _by_name(self) -> Mapping[str, tuple[Path, ...]]:
        """Files by their names, and by their paths in the folder, without endings and in small letters."""
        found: dict[str, list[Path]] = {}
        for path in self.files:
            names = (title(path), path.relative_to(self.folder or path.parent).with_suffix("").as_posix())
            for name in dict.fromkeys(name.casefold() for name in names):
                found.setdefault(name, []).append(path)
        return {name: tuple(paths) for name, paths in found.items()}

    @cached_property
    def _by_alias(self) -> Mapping[str, tuple[Path, ...]]:
        """Files by what their metadata call them, in small letters; every header is read for it."""
        found: dict[str, list[Path]] = {}
        for path in self.files:
            found.setdefault(_alias(path).casefold(), []).append(path)
        return {name: tuple(paths) for name, paths in found.items()}

    def is_given(self, name: str) -> bool:
        """Tell whether a name is that of an adapter which was given as a file.

        Args:
            name: In any case of letters.

        Returns:
            Whether it is.
        """
        return any(choice.name.casefold() == name.casefold() for choice in self.given)

    def holds(self, name: str) -> bool:
        """Tell whether the folder has an adapter of a name.

        Args:
            name: As `find` takes it.

        Returns:
            Whether it has one, or several.
        """
        wanted = name.casefold().removesuffix(".safetensors")
        return wanted in self._by_name or wanted in self._by_alias

    def find(self, name: str, said: str = "") -> Choice:
        """Find the adapter that a prompt or a region means.

        Args:
            name: The file's name without ending, in any case of letters; its path in the folder, where several have that
                name; what its metadata call it (``ss_output_name``); or the path of one that a library chose.
            said: Where it is named, for errors; by default in a prompt.

        Returns:
            The one given, or one of the folder, at strength 1.

        Raises:
            UserError: There is none, or more than one; tells the nearest name.
        """
        chosen = next((one for one in self.chosen if str(one.path) == name), None)
        if chosen is not None:
            return chosen
        wanted = name.casefold().removesuffix(".safetensors")
        given = [choice for choice in self.given if choice.name.casefold() == wanted]
        if given:
            return given[0]
        found = self._by_name.get(wanted) or self._by_alias.get(wanted, ())
        if len(found) == 1:
            return Choice(found[0])
        if found:
            paths = ", ".join(map(str, found))
            told = said or f"<lora:{brief(name)}> in the prompt"
            raise UserError(f"{told} means several files: {paths}; write its path in the folder")
        known = [*(choice.name for choice in self.given), *map(title, self.files)]
        where = f"in {self.folder} " if self.folder is not None else ""
        hint = "" if self.folder is not None else "; name its file with --adapter, or its folder with --adapters-dir"
        raise UserError(
            f"there is no adapter {brief(name)!r} {where}for {said or '<lora:...> in the prompt'}"
            f"{did_you_mean(name, known)}{hint}"
        )

    def all_of(self, tags: Iterable[Tag]) -> tuple[Choice, ...]:
        """Find all adapters that prompts name, beside those given.

        Args:
            tags: What the prompts name.

        Returns:
            Those of the folder, each once.

        Raises:
            UserError: As `find` does.
        """
        found = [self.find(name) for name in dict.fromkeys(tag.name for tag in tags)]
        paths = {choice.path: choice for choice in found if choice not in self.given}
        return tuple(paths.values())


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _alias(path: Path) -> str:
    """What a file's metadata call it; "" for nothing, and for what cannot be read, which whoever loads it is told of."""
    if not _is_safetensors(path):
        return ""
    try:
        return read_header(path).metadata.get("ss_output_name", "")
    except UserError:
        return ""
