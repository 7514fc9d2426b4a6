"""Alternatives and lists in prompts, drawn by the seed: ``{a|b}`` and ``__name__``. Imports no torch.

They are what the extensions Dynamic Prompts and Wildcards of A1111 read (https://github.com/adieyal/sd-dynamic-prompts).
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..core.errors import UserError, did_you_mean
from ..core.files import at_home, files_below
from ..core.shortening import brief
from .prompt_lines import lines_of

_GROUP = re.compile(r"(?<!\\)\{((?:[^{}\\]|\\.)*)(?<!\\)\}", re.DOTALL)
_LIST = re.compile(r"__([\w*./-]+?)__")
_COUNT = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*\$\$(?:(.*?)\$\$)?", re.DOTALL)
_SHARE = re.compile(r"\s*(\d+\.?\d*|\.\d+)::", re.DOTALL)
_DEEPEST = 100  # lists that are named in entries of lists; more is a circle
_LONGEST = 100_000  # letters of a prompt; more is a circle that grows
_ESCAPED = re.compile(r"\\([{}|])")
_OPEN, _CLOSED = "\ue800", "\ue801"  # braces of one alternative, which are letters, while others are looked for


@dataclass(frozen=True)
class Wildcards:
    """The lists of a folder: ``NAME.txt``, also in its subfolders as ``__FOLDER/NAME__``, an entry a line.

    Attributes:
        folder: The folder; None for no lists.
    """

    folder: Path | None = None

    def __post_init__(self) -> None:
        folder = None if self.folder is None else at_home(self.folder)
        if folder is not None and not folder.is_dir():
            raise UserError(f"there is no folder of wildcards {folder}")
        object.__setattr__(self, "folder", folder)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files by the names that prompts call them, without the ending and in small letters."""
        if self.folder is None:
            return {}
        found = [path for path in files_below(self.folder) if path.suffix.lower() == ".txt" and path.is_file()]
        return {path.relative_to(self.folder).with_suffix("").as_posix().casefold(): path for path in found}

    @cached_property
    def _entries(self) -> dict[str, list[str]]:
        """The entries of what prompts named already, by those names in small letters: the same at every picture."""
        return {}

    def draw(self, prompt: str, seed: int) -> str:
        """Draw what a prompt leaves open.

        Args:
            prompt: With ``{a|b}``, ``{2$$a|b|c}`` (two of them, with commas), ``{1-2$$ and $$a|b}``, ``{3::a|b}`` (a three
                times as often), and ``__name__``, in each other, too. Braces of one word are letters, as escaped ones are.
            seed: The same seed draws the same.

        Returns:
            The prompt; as it is where it leaves nothing open.

        Raises:
            UserError: There is no such list, it is empty or no text, or lists name each other in a circle.
        """
        if not (_LIST.search(prompt) or "{" in prompt or "\\}" in prompt):
            return prompt
        chance, found = random.Random(f"prompt {seed}"), prompt
        for _ in range(_DEEPEST):
            before = found
            found = _LIST.sub(lambda match: self._entry(match[1], chance), found)
            found = _GROUP.sub(lambda match: _drawn(match[1], chance), found)
            if found == before:
                return _ESCAPED.sub(r"\1", found).replace(_OPEN, "{").replace(_CLOSED, "}")
            if len(found) > _LONGEST:
                break
        raise UserError(f'the prompt "{brief(prompt)}" never ends: entries of its wildcards name each other')

    def _entry(self, name: str, chance: random.Random) -> str:
        entries = self._entries.get(name.casefold())
        if entries is None:
            entries = [entry for path in self._matching(name) for entry in lines_of(path, "the list")]
            self._entries[name.casefold()] = entries
        if not entries:
            raise UserError(f"the wildcard __{name}__ has no entries; write one a line")
        return chance.choice(entries)

    def _matching(self, name: str) -> list[Path]:
        """The files of a name, which may hold ``*``; a name alone is also one in a subfolder. Raises UserError."""
        wanted = name.casefold()
        found = [path for known, path in self.files.items() if _matches(known, wanted)]
        if found:
            return found
        if self.folder is None:
            raise UserError(
                f"__{name}__ is a wildcard, and there are no lists; give their folder with --wildcards-dir, with {name}.txt"
            )
        raise UserError(f"there is no list {name}.txt for __{name}__ in {self.folder}{did_you_mean(wanted, self.files)}")


def _matches(known: str, wanted: str) -> bool:
    pattern = re.escape(wanted).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return re.fullmatch(pattern if "/" in wanted else rf"(?:.*/)?{pattern}", known) is not None


def _drawn(inside: str, chance: random.Random) -> str:
    """What of the inside of braces is taken."""
    count = _COUNT.match(inside)
    options = (inside[count.end() :] if count else inside).split("|")
    if count is None and len(options) == 1:
        return f"{_OPEN}{inside}{_CLOSED}"
    shares = [_SHARE.match(option) for option in options]
    weights = [float(share[1]) if share else 1.0 for share in shares]
    texts = [option[share.end() :] if share else option for option, share in zip(options, shares, strict=True)]
    if count is None:
        return chance.choices(texts, weights)[0] if any(weights) else texts[0]
    low, high = int(count[1]), int(count[2] or count[1])
    number = min(chance.randint(min(low, high), max(low, high)), len(texts))
    left, taken = list(range(len(texts))), []
    for _ in range(number):
        some = [weights[one] for one in left]
        taken.append(left.pop(left.index(chance.choices(left, some)[0] if any(some) else left[0])))
    return (", " if count[3] is None else count[3]).join(texts[one].strip() for one in taken)
