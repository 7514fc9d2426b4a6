"""Teaching a base's tokenizers the words that its adapters learned."""

import copy
import functools
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from ..core import site as sites
from ..core.adapter import Method, parts_of
from ..core.errors import UserError
from ..core.strength import Strengths
from ..methods.tokens import SoftPrompt, SoftPromptAdapter, Tokens, TokensAdapter
from .kinds import components

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "lm": "tokenizer"}
_LEGACY_EOS = 2  # what configurations of early CLIP exports say, and what makes the model look for the largest id instead
_OF_A_BATCH = ("padding", "pad_to_multiple_of", "padding_side", "return_tensors")  # arguments that concern rows together
_DEFAULT = "*"  # the word that the first programs for textual inversion began with


def begun(base: Any, component: str, method: Method) -> Method:
    """The method as it can be built on a component: token methods with the ids of their initial words, others as they are.

    Raises UserError where initial words have more tokens than there are vectors.
    """
    if not isinstance(method, (Tokens, SoftPrompt)) or method.ids:
        return method
    if component not in _TOKENIZERS:
        raise UserError(f"{method.name} needs a component that reads words, which {component} is not")
    begins = method.begins if isinstance(method, Tokens) else [method.initial]
    tokenizer = getattr(base, _TOKENIZERS[component])
    return replace(method, ids=[one for words in begins for one in _initial(tokenizer, words, method.vectors)])


def teach(base: Any) -> None:
    """Bring the tokenizers of a base in line with the token adapters that it carries now; call it when these change.

    A taught tokenizer reads each placeholder as a whole word and gives it as many tokens as it has vectors; it puts soft
    prompts before every prompt for which their strength is not 0. With a text encoder they follow the token that marks the
    start; with a language model they precede it, as they do in peft, and like it they are left out where a call says
    ``add_special_tokens=False``. Where no adapter has words, tokenizers and text encoders are what they were. Raises
    UserError, and changes nothing, for a placeholder that two adapters teach or that is a word of the base already, and for
    more soft prompts than a prompt has room.
    """
    parts = components(base)
    pairs = [(parts[name], getattr(base, tokenizer)) for name, tokenizer in _TOKENIZERS.items() if name in parts]
    lessons = [_lessons(encoder, tokenizer, of_lm=encoder is parts.get("lm")) for encoder, tokenizer in pairs]
    for (encoder, tokenizer), found in zip(pairs, lessons, strict=True):
        _forget(tokenizer)
        if found is not None:
            _learn(encoder, tokenizer, found)


def plain_ids(tokenizer: Any, words: str) -> list[int]:
    """The tokens of some words as the base has them, whatever its tokenizer was taught."""
    if isinstance(tokenizer, TaughtTokenizer):
        return list(tokenizer.lessons.plain.encode(words, add_special_tokens=False).ids)
    return list(tokenizer(words, add_special_tokens=False).input_ids)


def learned(tokenizer: Any) -> dict[str, int]:
    """The tokens that a tokenizer was taught, by name, each placeholder's first one being the placeholder itself."""
    return dict(tokenizer.lessons.ids) if isinstance(tokenizer, TaughtTokenizer) else {}


@dataclass(frozen=True)
class _Word:
    """What one placeholder of an adapter becomes: the names of its tokens, the first being the placeholder itself."""

    owner: str
    adapter: TokensAdapter
    tokens: tuple[str, ...]
    strengths: Strengths
    block: int

    @property
    def precedes(self) -> bool:
        """Whether it is a soft prompt."""
        return isinstance(self.adapter, SoftPromptAdapter)

    def wanted(self, index: int, count: int) -> bool:
        """Whether it has a strength other than 0 for prompt ``index`` of ``count``."""
        row = self.strengths.values[self.strengths.index(self.owner), self.block].tolist()
        if count % len(row):
            return any(row)
        return bool(row[index % len(row)])


@dataclass
class _Lessons:
    """What a tokenizer was taught, and what it takes to forget it."""

    words: list[_Word]
    plain: Any
    of_lm: bool  # where soft prompts precede what marks the start, and a new word only the space before it
    ids: Mapping[str, int] = field(default_factory=dict)  # by the names of the tokens
    legacy: list[nn.Module] = field(default_factory=list)  # those whose eos_token_id was corrected
    backends: dict[tuple[str, ...], Any] = field(default_factory=dict)  # by the tokens that each puts first

    def __post_init__(self) -> None:
        self.longest_first = sorted(
            (word for word in self.words if not word.precedes), key=lambda word: len(word.tokens[0]), reverse=True
        )
        flags = re.NOFLAG if self.of_lm else re.IGNORECASE  # CLIP knows no capitals
        either = "|".join(f"({_whole(word.tokens[0])})" for word in self.longest_first)
        self.pattern = re.compile(either, flags) if either else None

    def expand(self, text: str, index: int, count: int) -> str:
        """A prompt with every placeholder as all of its tokens, and before it a text encoder's soft prompts."""
        edge = "" if self.of_lm else " "
        if self.pattern is not None:
            words = self.longest_first
            text = self.pattern.sub(lambda match: edge + " ".join(words[(match.lastindex or 1) - 1].tokens) + edge, text)
        return text if self.of_lm else " ".join([*self._before(index, count), text])

    def backend(self, index: int, count: int) -> Any:
        """The tokenizer for a prompt, which puts the soft prompts of a language model before all else."""
        front = self._before(index, count) if self.of_lm else ()
        if front not in self.backends:
            self.backends[front] = _led(self.backends[()], front)
        return self.backends[front]

    def _before(self, index: int, count: int) -> tuple[str, ...]:
        """The tokens of the soft prompts of prompt ``index`` of ``count``."""
        return tuple(t for word in self.words if word.precedes and word.wanted(index, count) for t in word.tokens)


class TaughtTokenizer:
    """Mixed into the class of a tokenizer that knows learned words."""

    lessons: _Lessons
    _tokenizer: Any

    def __call__(self, text: Any = None, *more: Any, **named: Any) -> Any:
        """As ever, of the expanded text; the prompts of a list are those of the images (or rows) in order."""
        if isinstance(text, str):
            self._tokenizer = self.lessons.backend(0, 1)
            text = self.lessons.expand(text, 0, 1)
        elif isinstance(text, (list, tuple)):
            count = len(text)
            text = [self.lessons.expand(t, i, count) if isinstance(t, str) else t for i, t in enumerate(text)]
            backends = [self.lessons.backend(index, count) for index in range(count)]
            if len(set(map(id, backends))) > 1:
                return self._each(text, backends, *more, **named)
            self._tokenizer = backends[0] if backends else self._tokenizer
        return super().__call__(text, *more, **named)  # type: ignore[misc]

    def _each(self, texts: Sequence[str], backends: Sequence[Any], *more: Any, **named: Any) -> Any:
        """Texts with different soft prompts: each by itself, then padded together. Raises UserError for pairs of texts."""
        if more or named.get("text_pair") is not None:
            raise UserError("pairs of texts cannot have soft prompts at different strengths; tokenize them one by one")
        together = {key: named.pop(key) for key in _OF_A_BATCH if key in named}
        if together.get("padding") == "max_length":
            together["max_length"] = named.get("max_length")
        rows = []
        for text, backend in zip(texts, backends, strict=True):
            self._tokenizer = backend
            rows.append(super().__call__(text, **named))  # type: ignore[misc]
        padded = {key: [row[key] for row in rows] for key in rows[0]}
        return self.pad(padded, **{"padding": False, **together})  # type: ignore[attr-defined]


@functools.cache
def _taught(cls: Any) -> type[TaughtTokenizer]:
    return type(cls.__name__, (TaughtTokenizer, cls), {"__module__": cls.__module__})


def _initial(tokenizer: Any, words: str, vectors: int) -> list[int]:
    """The tokens of some words, in turn until each vector has one."""
    ids = plain_ids(tokenizer, words or _DEFAULT)
    if len(ids) > vectors:
        raise UserError(f"the initial words {words!r} have {len(ids)} tokens, for {vectors} vectors; give as many vectors")
    return [ids[index % len(ids)] for index in range(vectors)]


def _lessons(encoder: nn.Module, tokenizer: Any, of_lm: bool) -> _Lessons | None:
    """What the adapters of a text encoder have to teach, checked; None where it is nothing."""
    words = list(_words(encoder))
    if not words:
        return None
    taught = isinstance(tokenizer, TaughtTokenizer)
    plain = tokenizer.lessons.plain if taught else getattr(tokenizer, "_tokenizer", None)
    if plain is None:
        raise UserError(f"a {type(tokenizer).__name__} cannot be taught words; one of the tokenizers library is needed")
    owners: dict[str, str] = {}
    for word in words:
        for name in word.tokens:
            _check_word(name, word.owner, owners, plain)
    config: Any = encoder.config
    room = (config.max_position_embeddings if of_lm else tokenizer.model_max_length) - 2
    front = sum(len(word.tokens) for word in words if word.precedes)
    if front >= room:
        raise UserError(f"soft prompts of {front} tokens leave no room for a prompt: the base reads {room}")
    if of_lm and front:
        _template(json.loads(plain.to_str()))
    return _Lessons(words, plain, of_lm)


def _words(encoder: nn.Module) -> Iterator[_Word]:
    for path, found in sites.slots(encoder).items():
        for owner, adapter in found.adapters.items():
            for part in parts_of(adapter):
                if isinstance(part, TokensAdapter):
                    for name, began in part.words.items():
                        tokens = _names(name or f"<{owner}@{path}>", len(began))
                        yield _Word(owner, part, tokens, found.strengths, found.block)


def _names(placeholder: str, vectors: int) -> tuple[str, ...]:
    # Not "_1": pipelines of diffusers would take that for theirs, and replace substrings.
    return (placeholder, *(f"{placeholder}|{number}" for number in range(1, vectors)))


def _check_word(name: str, owner: str, owners: dict[str, str], plain: Any) -> None:
    other = owners.setdefault(name.casefold(), owner)
    if other != owner:
        raise UserError(f"the adapters {other!r} and {owner!r} both teach the word {name!r}; only one of them can be loaded")
    if len(plain.encode(name, add_special_tokens=False).ids) == 1:
        raise UserError(f"adapter {owner!r} teaches the word {name!r}, which the base knows already; choose another")


def _whole(name: str) -> str:
    """An expression for a placeholder that is no part of a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + re.escape(name) + after


def _learn(encoder: nn.Module, tokenizer: Any, lessons: _Lessons) -> None:
    from tokenizers import AddedToken

    backend = copy.deepcopy(lessons.plain)
    for word in lessons.words:
        alone = not lessons.of_lm or bool(re.fullmatch(r"\w(.*\w)?", word.tokens[0]))
        backend.add_tokens(
            [AddedToken(n, single_word=alone, lstrip=True, rstrip=not lessons.of_lm, normalized=False) for n in word.tokens]
        )
    lessons.backends[()] = tokenizer._tokenizer = backend
    tokenizer.__class__ = _taught(cast(Hashable, type(tokenizer)))
    tokenizer.lessons = lessons
    lessons.ids = {name: backend.token_to_id(name) for word in lessons.words for name in word.tokens}
    _answer(lessons.words, lessons.ids)
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == _LEGACY_EOS != tokenizer.eos_token_id:
            # Its largest id would be a new word. For all others, the first end of text is where the largest id is.
            module.eos_token_id = tokenizer.eos_token_id
            lessons.legacy.append(module)


def _led(backend: Any, front: Sequence[str]) -> Any:
    """A copy of a tokenizer that puts these tokens before all that it puts first. Raises UserError where it cannot."""
    from tokenizers import Tokenizer

    layout = json.loads(backend.to_str())
    template = _template(layout)
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in front]
    for kind in ("single", "pair"):
        template[kind] = [*pieces, *template[kind]]
    known = {token: {"id": token, "ids": [backend.token_to_id(token)], "tokens": [token]} for token in front}
    template["special_tokens"] = {**template["special_tokens"], **known}
    return Tokenizer.from_str(json.dumps(layout))


def _template(layout: dict[str, Any]) -> dict[str, Any]:
    """The part of a tokenizer's JSON that says what stands before and after a text; made where there is none."""
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


def _answer(words: Sequence[_Word], ids: Mapping[str, int]) -> None:
    by_adapter: dict[TokensAdapter, list[int]] = {}
    for word in words:
        by_adapter.setdefault(word.adapter, []).extend(ids[name] for name in word.tokens)
    for adapter, own in by_adapter.items():
        adapter.answer(own)


def _forget(tokenizer: Any) -> None:
    if not isinstance(tokenizer, TaughtTokenizer):
        return
    found: Any = tokenizer
    for module in found.lessons.legacy:
        module.eos_token_id = _LEGACY_EOS
    found._tokenizer = found.lessons.plain
    del found.lessons
    found.__class__ = type(tokenizer).__mro__[2]
