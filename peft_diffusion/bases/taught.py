"""Tokenizers that know the words that adapters learned, and how they read texts with them."""

import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from ..core.component import ComponentState, Link, Word
from ..core.errors import UserError
from ..core.slot import SLOT
from ..core.strength import Strengths

# Arguments that concern rows together, by their names in ``_encode_plus``, and those that ``pad`` has for them.
_OF_A_BATCH = {
    "padding_strategy": "padding",
    "pad_to_multiple_of": "pad_to_multiple_of",
    "padding_side": "padding_side",
    "return_tensors": "return_tensors",
}
_BOTH = "only one of them can be there: choose another word, or remove the adapter"


def plain_ids(tokenizer: Any, words: str) -> list[int]:
    """Encode words as the base has them, whatever its tokenizer was taught.

    Args:
        tokenizer: The tokenizer.
        words: The words.

    Returns:
        Their tokens.
    """
    if isinstance(tokenizer, TaughtTokenizer):
        return list(_backend(tokenizer).encode(words, add_special_tokens=False).ids)
    return list(tokenizer(words, add_special_tokens=False).input_ids)


def ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tell which tokens mark the start and the end of a text, whatever the tokenizer was taught.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The tokens before a text, and those after it.
    """
    reader = _plain_reader(tokenizer)
    inside = list(reader("a", add_special_tokens=False).input_ids)
    whole = list(reader("a").input_ids)
    start = next(place for place in range(len(whole)) if whole[place : place + len(inside)] == inside)
    return whole[:start], whole[start + len(inside) :]


def soft_prompt(tokenizer: Any, index: int, count: int) -> tuple[int, ...]:
    """Tell which learned tokens a text encoder reads before a prompt.

    Args:
        tokenizer: The tokenizer.
        index: The number of the prompt among those that are read together.
        count: How many there are.

    Returns:
        The tokens of the soft prompts whose strength for it is not 0.
    """
    if not isinstance(tokenizer, TaughtTokenizer):
        return ()
    lessons = _lessons(tokenizer)
    return tuple(lessons.ids[name] for name in lessons.before(index, count))


def units(tokenizer: Any, texts: Sequence[str]) -> list[list[tuple[int, ...]]]:
    """Split texts into what stays together, without what marks start and end and without soft prompts.

    Args:
        tokenizer: The tokenizer of a text encoder.
        texts: The texts.

    Returns:
        For each text its tokens, and those of a learned word as one; also of words that diffusers' own loader of textual
        inversion taught, whose further tokens end in ``_1``, ``_2`` and so on.
    """
    reader, spelled = tokenizer, list(texts)
    if isinstance(tokenizer, TaughtTokenizer):
        lessons = _lessons(tokenizer)
        reader = _reader(tokenizer, lessons, lessons.extended)
        spelled = [lessons.spell(text) for text in texts]
    rows = reader(spelled, add_special_tokens=False, truncation=False, verbose=False).input_ids if spelled else []
    starts = _starts(tokenizer)
    return [list(_together(row, starts)) for row in rows]


def _starts(tokenizer: Any) -> dict[int, tuple[tuple[int, ...], bool]]:
    """The tokens of each word of several, by the first; and whether the others are written in a text, too."""
    known = _lessons(tokenizer).known if isinstance(tokenizer, TaughtTokenizer) else ()
    found = {word.ids[0]: (word.ids, True) for word in known if not word.precedes}
    added: dict[str, int] = dict(getattr(tokenizer, "added_tokens_encoder", {}))
    for name, first in added.items():
        more = itertools.takewhile(lambda one: one in added, (f"{name}_{number}" for number in itertools.count(1)))
        ids = (first, *(added[one] for one in more))
        if len(ids) > 1:
            found[first] = ids, False
    return found


def _together(row: Sequence[int], starts: Mapping[int, tuple[tuple[int, ...], bool]]) -> Iterator[tuple[int, ...]]:
    place = 0
    while place < len(row):
        ids, written = starts.get(row[place], ((row[place],), True))
        if written and tuple(row[place : place + len(ids)]) != ids:
            ids = (row[place],)
        yield ids
        place += len(ids) if written else 1


def _plain_reader(tokenizer: Any) -> Any:
    """The tokenizer as if it had learned nothing."""
    if not isinstance(tokenizer, TaughtTokenizer):
        return tokenizer
    lessons = _lessons(tokenizer)
    return _reader(tokenizer, lessons, lessons.plain)


def instruct(tokenizer: Any, plain: Any, teacher: Link[ComponentState], words: tuple[Word, ...], *, of_lm: bool) -> None:
    """Teach a tokenizer words, in place of what it was taught before.

    Args:
        tokenizer: The tokenizer.
        plain: The tokenizer of the tokenizers library that the base has.
        teacher: What the text encoder or language model carries that teaches it.
        words: What it is taught.
        of_lm: Whether it reads for a language model, where soft prompts precede what marks the start.

    Raises:
        UserError: One is a word of the tokenizer already.
    """
    if not isinstance(tokenizer, TaughtTokenizer):
        tokenizer.__class__ = _taught(cast(Hashable, type(tokenizer)))
    vars(tokenizer)[SLOT] = _Lessons(plain, of_lm, teacher, words)


def learned(tokenizer: Any) -> Mapping[str, int]:
    """List the tokens that a tokenizer was taught.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Ids by name; each placeholder's first token is the placeholder itself.
    """
    return _lessons(tokenizer).ids if isinstance(tokenizer, TaughtTokenizer) else {}


class _Lessons:
    """What a tokenizer was taught, and what it takes to forget it.

    Attributes:
        plain: The tokenizer of the tokenizers library that the base has.
        of_lm: Whether it reads for a language model, where soft prompts precede what marks the start, and a new word takes
            only the space before it.
        teacher: What the text encoder or language model carries that it was taught from.
        words: What it was taught, with those whose adapters are gone.
        known: What of that it still knows.
        extended: The plain tokenizer with the tokens of these words.
        numbers: By a token's number in ``extended``, which comes after whatever the base has now, the one that is given out.
        ids: The numbers of the new tokens that are given out, by their names.
        tokens: The names, by these numbers.
    """

    def __init__(self, plain: Any, of_lm: bool, teacher: Link[ComponentState], words: tuple[Word, ...]) -> None:
        self.plain = plain
        self.of_lm = of_lm
        self.teacher = teacher
        self.words = words
        self.known = tuple(word for word in words if word.owner is not None)
        self.extended = _extended(plain, [word.tokens for word in self.known], of_lm)
        self._backends: dict[tuple[str, ...], Any] = {(): self.extended}  # by the tokens that each puts first
        self._made_of = _ways(plain)
        self.ids = {name: number for word in self.known for name, number in zip(word.tokens, word.ids, strict=True)}
        self.tokens = {number: name for word in self.known for name, number in zip(word.tokens, word.ids, strict=True)}
        self.numbers = {self.extended.token_to_id(name): number for number, name in self.tokens.items()}
        for name in self.tokens.values():
            if plain.token_to_id(name) is not None:
                raise UserError(f"an adapter teaches the word {name!r}, which the tokenizer has as one of its own; {_BOTH}")
        self._longest_first = sorted(
            (word for word in self.known if not word.precedes), key=lambda word: len(word.tokens[0]), reverse=True
        )
        flags = re.NOFLAG if of_lm else re.IGNORECASE  # CLIP knows no capitals
        either = "|".join(f"({_whole(word.tokens[0])})" for word in self._longest_first)
        self._pattern = re.compile(either, flags) if either else None

    @property
    def stale(self) -> bool:
        """Whether somebody has given the plain tokenizer other words, or another beginning and end, since."""
        return self._made_of != _ways(self.plain)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Lessons, (self.plain, self.of_lm, self.teacher, self.words)

    def expand(self, text: Any, index: int, count: int) -> Any:
        """A prompt with every placeholder as all of its tokens, and before it a text encoder's soft prompts.

        It may be a text, one with another that follows it, or the list of its words; what is none of them stays as it is.
        """
        front = () if self.of_lm else self.before(index, count)
        if isinstance(text, tuple) and text:
            return (self._led(text[0], front), *map(self.spell, text[1:]))
        return self._led(text, front)

    def spell(self, text: Any) -> Any:
        """A text, or each of a list, with every placeholder as all of its tokens."""
        if isinstance(text, (list, tuple)):
            return type(text)(map(self.spell, text))
        if not isinstance(text, str) or self._pattern is None:
            return text
        edge, words = "" if self.of_lm else " ", self._longest_first
        return self._pattern.sub(lambda match: edge + " ".join(words[(match.lastindex or 1) - 1].tokens) + edge, text)

    def _led(self, text: Any, front: Sequence[str]) -> Any:
        spelled = self.spell(text)
        if isinstance(spelled, list):
            return [*front, *spelled]
        return " ".join([*front, spelled]) if isinstance(spelled, str) and not self.of_lm else spelled

    def backend(self, index: int, count: int) -> Any:
        """The tokenizer for a prompt, which puts the soft prompts of a language model before all else."""
        front = self.before(index, count) if self.of_lm else ()
        if front not in self._backends:
            self._backends[front] = _led(self.extended, front)
        return self._backends[front]

    def parted(self, ids: Sequence[int]) -> list[str | list[int]]:
        """Part tokens into learned words and what stands between them.

        Args:
            ids: The tokens.

        Returns:
            A text for each learned word, and lists of the base's own tokens; soft prompts are left out.
        """
        pieces: list[str | list[int]] = []
        starts = {word.ids[0]: word for word in self.known}
        place = 0
        while place < len(ids):
            word, one = starts.get(ids[place]), ids[place]
            whole = word is not None and tuple(ids[place : place + len(word.ids)]) == word.ids
            place += len(word.ids) if word is not None and whole else 1
            if word is not None and whole:
                pieces += [] if word.precedes else [word.tokens[0]]
            elif one in self.tokens:
                pieces.append(self.tokens[one])
            elif pieces and isinstance(pieces[-1], list):
                pieces[-1].append(one)
            else:
                pieces.append([one])
        return pieces

    def before(self, index: int, count: int) -> tuple[str, ...]:
        """The tokens of the soft prompts of prompt ``index`` of ``count``."""
        state = self.teacher()
        if state is None:
            return ()
        return tuple(
            token
            for word in self.known
            if word.precedes and _wanted(word, state.strengths, index, count)
            for token in word.tokens
        )


def _wanted(word: Word, strengths: Strengths, index: int, count: int) -> bool:
    """Whether a soft prompt has a strength other than 0 for prompt ``index`` of ``count``."""
    if word.owner not in strengths.names:
        return False
    row = strengths.values[strengths.index(word.owner), word.block].tolist()
    if len(row) % count == 0:  # a prompt for each image, or one for several that follow one another
        each = len(row) // count
        return any(row[index * each : (index + 1) * each])
    return any(row) if count % len(row) else bool(row[index % len(row)])


class _Reader:
    """Mixed into the class of a tokenizer whose backend knows learned words: gives these the numbers that are given out."""

    def _convert_encoding(self, *more: Any, **named: Any) -> Any:
        fields, encodings = super()._convert_encoding(*more, **named)  # type: ignore[misc]
        numbers: Mapping[int, int] = vars(self)[SLOT]
        fields["input_ids"] = [[numbers.get(one, one) for one in row] for row in fields["input_ids"]]
        return fields, encodings


class TaughtTokenizer:
    """Mixed into the class of a tokenizer that knows learned words; what it knows is under the private name of slots.

    Whatever turns text to tokens and back knows the words. The vocabulary itself, its size and what is saved of it stay the
    base's, so hosts can add words of their own, resize an embedding to it, and save a pipeline that others can load.
    """

    def _encode_plus(self, text: Any = None, text_pair: Any = None, *more: Any, **named: Any) -> Any:
        """As transformers' own, of the expanded text; the prompts of a list are those of the images (or rows) in order.

        ``__call__``, ``encode`` and ``tokenize`` come here.
        """
        lessons, given = _lessons(self), (text, text_pair)
        split = bool(named.get("is_split_into_words"))
        several = isinstance(text, (list, tuple)) and bool(text) and not (split and isinstance(text[0], str))
        count = len(text) if several else 1
        if several:
            text = [lessons.expand(one, index, count) for index, one in enumerate(text)]
            text_pair = None if text_pair is None else [lessons.spell(one) for one in text_pair]
        else:
            text, text_pair = lessons.expand(text, 0, 1), lessons.spell(text_pair)
        if named.get("return_offsets_mapping") and not _equal(given, (text, text_pair)):
            raise UserError(
                "offsets of tokens are not known in a text with learned words; leave return_offsets_mapping away"
            )
        backends = [lessons.backend(index, count) for index in range(count)]
        readers = {backend: _reader(self, lessons, backend) for backend in dict.fromkeys(backends)}
        if len(readers) == 1:
            return readers[backends[0]]._encode_plus(text, text_pair, *more, **named)
        return _each([readers[backend] for backend in backends], text, text_pair, *more, **named)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **named: Any) -> list[str]:
        """Split a text into tokens.

        Args:
            text: The text.
            pair: Another that follows it.
            add_special_tokens: Whether those that mark start and end are among them.
            named: What else transformers takes.

        Returns:
            Their names.
        """
        found = self._encode_plus(text, pair, add_special_tokens=add_special_tokens, **named)
        return self._names(found["input_ids"])

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Name tokens.

        Args:
            ids: A number, or several.
            skip_special_tokens: Whether to leave those out that mark start and end.

        Returns:
            The name, or the names.
        """
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        skipped = set(cast(Any, self).all_special_ids) if skip_special_tokens else set()
        return self._names(number for one in ids if (number := int(one)) not in skipped)

    def _convert_id_to_token(self, index: int) -> Any:
        return self._names([int(index)])[0]

    def _names(self, ids: Iterable[int]) -> list[Any]:
        """The tokens of these numbers; what was taught is looked up once for all of them."""
        own, plain = _lessons(self).tokens, super()._convert_id_to_token  # type: ignore[misc]
        return [own[one] if one in own else plain(one) for one in ids]

    def _convert_token_to_id_with_added_voc(self, token: str) -> Any:
        own = learned(self).get(token)
        return super()._convert_token_to_id_with_added_voc(token) if own is None else own  # type: ignore[misc]

    def _decode(self, token_ids: Any, *more: Any, **named: Any) -> str:
        """The text that has these tokens: learned words stand in it as they are written, soft prompts are left out."""
        given = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        pieces = _lessons(self).parted([given] if isinstance(given, int) else given)
        decode: Callable[..., str] = super()._decode  # type: ignore[misc]
        texts = [piece if isinstance(piece, str) else decode(piece, *more, **named) for piece in pieces]
        return " ".join(text.strip() for text in texts) if len(texts) > 1 else "".join(texts)

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> Any:
        """As transformers' own. Raises UserError for a word that an adapter has taught."""
        taught = {name.casefold() for name in learned(self)}
        for token in new_tokens:
            if str(token).casefold() in taught:
                raise UserError(f"an adapter teaches the word {str(token)!r} already; {_BOTH}")
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy make it again from the one that it came from.
        return _remade, (type(self).__mro__[2],), self.__getstate__()


def _reader(tokenizer: TaughtTokenizer, lessons: _Lessons, backend: Any) -> Any:
    """The same tokenizer with another backend, for one call: threads that share the tokenizer do not meet."""
    cls = _reading(cast(Hashable, type(tokenizer).__mro__[2]))
    reader = cls.__new__(cls)
    vars(reader).update(vars(tokenizer), _tokenizer=backend, **{SLOT: lessons.numbers})
    return reader


def _equal(given: tuple[Any, Any], told: tuple[Any, Any]) -> bool:
    """Whether texts were left as they are, be they in lists or tuples."""

    def plain(one: Any) -> Any:
        return [plain(part) for part in one] if isinstance(one, (list, tuple)) else one

    return bool(plain(given) == plain(told))


def _each(readers: Sequence[Any], texts: Sequence[str], text_pair: Any, *more: Any, **named: Any) -> Any:
    """Texts with different soft prompts: each by itself, then padded together. Raises UserError for pairs of texts."""
    if more or text_pair is not None:
        raise UserError("pairs of texts cannot have soft prompts at different strengths; tokenize them one by one")
    together = {ours: named.pop(theirs) for theirs, ours in _OF_A_BATCH.items() if theirs in named}
    rows = [reader._encode_plus(text, **named) for reader, text in zip(readers, texts, strict=True)]
    padded = {key: [row[key] for row in rows] for key in rows[0]}
    return readers[0].pad(padded, max_length=named.get("max_length"), **{"padding": False, **together})


@functools.cache
def _reading(cls: Any) -> Any:
    return type(cls.__name__, (_Reader, cls), {"__module__": cls.__module__})


@functools.cache
def _taught(cls: Any) -> type[TaughtTokenizer]:
    return type(cls.__name__, (TaughtTokenizer, cls), {"__module__": cls.__module__})


def _remade(cls: type) -> TaughtTokenizer:
    taught = _taught(cast(Hashable, cls))
    return taught.__new__(taught)


def _backend(tokenizer: Any) -> Any:
    """The tokenizer of the tokenizers library inside of one of transformers."""
    return tokenizer._tokenizer


def _ways(plain: Any) -> tuple[int, bytes | None]:
    """What others may change of a tokenizer: how many words it has, and what it puts first and last."""
    ends = plain.post_processor
    return plain.get_vocab_size(with_added_tokens=True), None if ends is None else ends.__getstate__()


def _held(tokenizer: TaughtTokenizer) -> _Lessons:
    """What a tokenizer was taught when it was last asked."""
    lessons: _Lessons = vars(tokenizer)[SLOT]
    return lessons


def _lessons(tokenizer: TaughtTokenizer) -> _Lessons:
    """What a tokenizer was taught, brought in line with what its teacher says now. Raises UserError as ``_Lessons`` does."""
    lessons = _held(tokenizer)
    state = lessons.teacher()
    words = () if state is None else state.words
    if words != lessons.words or lessons.stale:
        lessons = vars(tokenizer)[SLOT] = _Lessons(lessons.plain, lessons.of_lm, lessons.teacher, words)
    return lessons


def teacher_of(tokenizer: Any) -> ComponentState | None:
    """Find what a tokenizer was taught from, if that lives and still teaches anything.

    Args:
        tokenizer: The tokenizer.

    Returns:
        What the text encoder or language model carries; None for no teacher.
    """
    if not isinstance(tokenizer, TaughtTokenizer):
        return None
    state = _held(tokenizer).teacher()
    return state if state is not None and state.words else None


def _whole(name: str) -> str:
    """An expression for a placeholder that is no part of a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + re.escape(name) + after


def _extended(plain: Any, words: Sequence[Sequence[str]], of_lm: bool) -> Any:
    """A copy of a tokenizer that knows the tokens of these words besides."""
    from tokenizers import AddedToken

    backend = copy.deepcopy(plain)
    for tokens in words:
        alone = not of_lm or bool(re.fullmatch(r"\w(.*\w)?", tokens[0]))
        # CLIP drops all space by itself; with a language model a new word takes the space before it, as others hold theirs.
        backend.add_tokens([AddedToken(n, single_word=alone, lstrip=of_lm, normalized=False) for n in tokens])
    return backend


def _led(backend: Any, front: Sequence[str]) -> Any:
    """A copy of a tokenizer that puts these tokens before all that it puts first. Raises UserError where it cannot."""
    from tokenizers import Tokenizer

    layout = json.loads(backend.to_str())
    template = template_of(layout)
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in front]
    for kind in ("single", "pair"):
        template[kind] = [*pieces, *template[kind]]
    known = {token: {"id": token, "ids": [backend.token_to_id(token)], "tokens": [token]} for token in front}
    template["special_tokens"] = {**template["special_tokens"], **known}
    return Tokenizer.from_str(json.dumps(layout))


def template_of(layout: dict[str, Any]) -> dict[str, Any]:
    """Find the part of a tokenizer's JSON that says what stands before and after a text; it is made where there is none.

    Args:
        layout: The JSON, which gets the part.

    Returns:
        The part.

    Raises:
        UserError: Something else than a template puts tokens there.
    """
    found = layout["post_processor"]
    parts = [] if found is None else found["processors"] if found["type"] == "Sequence" else [found]
    for part in parts:
        if part["type"] == "TemplateProcessing":
            return cast(dict[str, Any], part)
        if part["type"] != "ByteLevel":  # which touches offsets alone
            raise UserError(f"no soft prompt can precede what a tokenizer with {part['type']} puts first")
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    made = {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    layout["post_processor"] = {"type": "Sequence", "processors": [*parts, made]}
    return made


def forget(tokenizer: Any) -> None:
    """Make a tokenizer again what it was before it was taught.

    Args:
        tokenizer: Any tokenizer.
    """
    if not isinstance(tokenizer, TaughtTokenizer):
        return
    found: Any = tokenizer
    del vars(found)[SLOT]
    found.__class__ = type(tokenizer).__mro__[2]
