"""What prompts of A1111 and ComfyUI hold besides words: weights, escapes and BREAK, and how tokens fill chunks.

A1111 reads them in ``modules/prompt_parser.py`` and ``modules/sd_hijack_clip.py``, ComfyUI in ``comfy/sd1_clip.py``.
Imports no torch.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from ..core.errors import UserError
from ..core.parsing import number_in

Weights: TypeAlias = Literal["a1111", "comfyui", "none"]
"""Whose arithmetic brackets follow; with "none" they are letters."""

_BRACKET = 1.1  # what one pair of brackets multiplies by
_NEAR = 20  # tokens behind a comma that A1111 takes along into the next chunk (its comma_padding_backtrack)
_WORD = 8  # tokens from which ComfyUI breaks a word in two where a chunk is full
_DEEPEST = 100  # brackets in each other that are read; more are letters
_PRIVATE = 0xE000  # code points of nobody stand for learned words while a prompt is read
_PIECES = re.compile(r"\\[()\[\]\\]|\\|[(\[)\]]|:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_SYNTAX = re.compile(r"[()\[\]\\]|\bBREAK\b")
_ESCAPED = re.compile(r"\\([()\[\]])")


class Part(NamedTuple):
    """Words, and how much they count.

    Attributes:
        text: The words.
        weight: 1 is as written.
    """

    text: str
    weight: float = 1.0


class Unit(NamedTuple):
    """Tokens that stay together.

    Attributes:
        ids: The tokens.
        weight: How much they count.
        whole: Whether they may not be parted, as those of a learned word.
    """

    ids: tuple[int, ...]
    weight: float = 1.0
    whole: bool = True


@dataclass(frozen=True)
class Chunk:
    """What a text encoder reads at once: tokens without those that mark start and end, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def is_plain(prompt: str, weights: Weights = "a1111") -> bool:
    """Tell whether a prompt is words alone.

    Args:
        prompt: As it was given.
        weights: How it is read.

    Returns:
        Whether it reads as it stands.
    """
    return (_ESCAPED if weights == "none" else _SYNTAX).search(prompt) is None


def escaped(text: str) -> str:
    """Write words so that they are read as letters: every bracket, backslash and BREAK in them.

    Args:
        text: The words.

    Returns:
        A prompt.
    """
    return re.sub(r"\bBREAK\b", "Break", re.sub(r"([()\[\]\\])", r"\\\1", text))


def from_letters(text: str) -> str:
    r"""Write a text in which brackets are letters, as captions are learned, so that A1111's reading reads the same.

    Args:
        text: Words; brackets in them may be escaped, as boorus write ``miku \(vocaloid\)``.

    Returns:
        A prompt.
    """
    return escaped(_ESCAPED.sub(r"\1", text))


def broken(prompt: str, weights: Weights) -> list[str]:
    """Part a prompt where it has ``BREAK``.

    Args:
        prompt: The prompt.
        weights: Whose reading it is.

    Returns:
        What stands between; the whole prompt where that is letters.
    """
    return [part for part in _BREAK.split(prompt) if part] if weights == "a1111" else [prompt]


def parse(prompt: str, weights: Weights = "a1111", learned: Sequence[str] = ()) -> list[Part | None]:
    r"""Read a prompt: ``(word)``, ``(word:1.3)``, ``[word]``, the escapes ``\(`` ``\)`` ``\[`` ``\]``, and ``BREAK``.

    Args:
        prompt: As it was given.
        weights: Whose reading it is. A1111 multiplies nested weights; in ComfyUI a number replaces what is around it, and
            square brackets and BREAK are letters.
        learned: Words of adapters, which are read as words whatever letters they have.

    Returns:
        Words of one weight after the other; None where a new chunk begins.
    """
    odd = sorted((word for word in learned if not is_plain(word)), key=len, reverse=True)
    places = {chr(_PRIVATE + number): word for number, word in enumerate(odd)}
    for place, word in places.items():
        prompt = re.sub(re.escape(word), place, prompt, flags=re.IGNORECASE)
    read = {"a1111": _of_a1111, "comfyui": _of_comfyui, "none": _of_letters}[weights]
    return [None if part is None else Part(_restored(part.text, places), part.weight) for part in read(prompt)]


def _restored(text: str, places: dict[str, str]) -> str:
    return "".join(places.get(letter, letter) for letter in text) if places else text


def words(prompt: str, weights: Weights = "a1111") -> str:
    """Give the words of a prompt alone.

    Args:
        prompt: As it was given.
        weights: How it is read.

    Returns:
        The words, without brackets, weights and BREAK.
    """
    return " ".join("".join(" " if part is None else part.text for part in parse(prompt, weights)).split())


def _of_letters(prompt: str) -> list[Part | None]:
    return [Part(_ESCAPED.sub(r"\1", prompt))]


def _of_a1111(prompt: str) -> list[Part | None]:
    found: list[Part | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        found[start:] = [None if one is None else Part(one.text, one.weight * factor) for one in found[start:]]

    for match in _PIECES.finditer(prompt):
        piece, number = match[0], match[1]
        if piece.startswith("\\"):
            found.append(Part(piece[1:]))
        elif piece in opened:
            opened[piece].append(len(found))
        elif number is not None and opened["("]:
            weigh(opened["("].pop(), float(number))
        elif piece == ")" and opened["("]:
            weigh(opened["("].pop(), _BRACKET)
        elif piece == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / _BRACKET)
        else:
            first, *more = _BREAK.split(piece)
            found.append(Part(first))
            for text in more:
                found += [None, Part(text)]
    for bracket, factor in (("(", _BRACKET), ("[", 1 / _BRACKET)):  # those that nothing closes reach to the end
        for start in opened[bracket]:
            weigh(start, factor)
    return _merged(found) or [Part("")]


def _merged(found: Iterable[Part | None]) -> list[Part | None]:
    """Neighbours of one weight as one: their letters may make one word."""
    merged: list[Part | None] = []
    for one in found:
        last = merged[-1] if merged else None
        if one is not None and last is not None and one.weight == last.weight:
            merged[-1] = Part(last.text + one.text, last.weight)
        else:
            merged.append(one)
    return merged


def _of_comfyui(prompt: str) -> list[Part | None]:
    hidden = prompt.replace("\\)", "\0\1").replace("\\(", "\0\2")
    return [
        Part(text.replace("\0\1", ")").replace("\0\2", "("), weight) for text, weight in _nested(hidden, 1.0) if text
    ] or [Part("")]


def _nested(text: str, weight: float, depth: int = 0) -> Iterator[tuple[str, float]]:
    for piece in _outermost(text):
        if len(piece) < 2 or piece[0] != "(" or piece[-1] != ")" or depth == _DEEPEST:
            yield piece, weight
            continue
        inside, own = piece[1:-1], weight * _BRACKET
        before, colon, number = inside.rpartition(":")
        if colon and before and (told := number_in(number)) is not None:
            inside, own = before, told
        yield from _nested(inside, own, depth + 1)


def _outermost(text: str) -> Iterator[str]:
    """Pieces between brackets and in them, these with theirs."""
    depth, piece = 0, ""
    for letter in text:
        if letter == "(":
            if depth == 0 and piece:
                yield piece
                piece = ""
            depth += 1
        piece += letter
        if letter == ")":
            depth -= 1
            if depth == 0:
                yield piece
                piece = ""
    if piece:
        yield piece


def chunked(units: Iterable[Unit | None], room: int, comma: int | None, weights: Weights = "a1111") -> list[Chunk]:
    """Fill chunks with tokens.

    Args:
        units: What stays together; None begins a new chunk.
        room: Tokens that a chunk takes.
        comma: The token of a comma, behind which A1111 parts; None for a base without.
        weights: Whose way it is: where a chunk is full, A1111 takes up to 20 tokens behind a comma along into the next, and
            ComfyUI the word.

    Returns:
        The chunks, at least one.

    Raises:
        UserError: A learned word has more tokens than a chunk has room.
    """
    packer = _Packer(room, comma if weights != "comfyui" else None)
    for unit in units:
        if unit is None:
            packer.close()
        elif unit.whole and len(unit.ids) > room:
            raise UserError(f"a learned word of {len(unit.ids)} tokens fits no prompt: the base reads {room} at once")
        else:
            packer.add(unit)
    packer.end()
    return packer.chunks


class _Packer:
    """The chunk that is being filled, and those that are full."""

    def __init__(self, room: int, comma: int | None) -> None:
        self.room, self.comma = room, comma
        self.chunks: list[Chunk] = []
        self.tokens: list[tuple[int, float]] = []
        self.last_comma = -1

    def close(self) -> None:
        self.chunks.append(Chunk(tuple(one for one, _ in self.tokens), tuple(weight for _, weight in self.tokens)))
        self.tokens, self.last_comma = [], -1

    def end(self) -> None:
        if self.tokens or not self.chunks:
            self.close()

    def add(self, unit: Unit) -> None:
        tokens = [(one, unit.weight) for one in unit.ids]
        if self.comma is not None and unit.ids == (self.comma,):
            self.last_comma = len(self.tokens)
        elif len(self.tokens) == self.room and self.last_comma != -1 and self.room - self.last_comma <= _NEAR:
            behind = self.tokens[self.last_comma + 1 :]
            self.tokens = self.tokens[: self.last_comma + 1]
            self.close()
            self.tokens = behind
        if len(self.tokens) == self.room:
            self.close()
        while len(self.tokens) + len(tokens) > self.room:
            left = self.room - len(self.tokens) if not unit.whole and len(tokens) >= _WORD else 0
            self.tokens += tokens[:left]
            tokens = tokens[left:]
            self.close()
        self.tokens += tokens
