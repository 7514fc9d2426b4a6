"""Teaching a base's tokenizers the words that its adapters learned."""

import gc
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core import site as sites
from ..core.adapter import Adapter, parts_of
from ..core.component import Link, Word
from ..core.errors import UserError
from ..core.method import Method
from ..core.slot import state_of
from ..core.wording import number_of
from . import family as families
from .base import components, text_encoders
from .taught import forget, instruct, plain_ids, teacher_of, template_of

_LEGACY_EOS = 2  # what configurations of early CLIP exports say, and what makes the model look for the largest id instead
_FIRST = 2**20  # what new words are numbered from: more than any vocabulary has, so nobody's added words meet them
_DEFAULT = "*"  # the word that the first programs for textual inversion began with


def with_initial_tokens(base: object, component: str, method: Method) -> Method:
    """Complete a method for a component: one that learns words gets the ids of the tokens that its vectors begin as.

    Args:
        base: The pipeline or language model.
        component: The component that it is built on.
        method: The method.

    Returns:
        The method with the ids; the same where it teaches no words.

    Raises:
        UserError: The component reads no words, or initial words have more tokens than there are vectors.
    """
    begins = method.initial_words()
    if not begins:
        return method
    tokenizers = text_encoders(base)
    if component not in tokenizers:
        raise UserError(f"{method.name} needs a component that reads words, which {component} is not")
    tokenizer = getattr(base, tokenizers[component])
    return method.with_ids([one for words, vectors in begins for one in _initial(tokenizer, words, vectors)])


def teach(base: object) -> None:
    """Bring the tokenizers of a base in line with the token adapters that it carries now; call it when these change.

    A taught tokenizer reads each placeholder as a whole word and gives it as many tokens as it has vectors; it puts soft
    prompts before every prompt for which their strength is not 0. With a text encoder they follow the token that marks the
    start; with a language model they precede it, as they do in peft, and like it they are left out where a call says
    ``add_special_tokens=False``. Where no adapter has words, tokenizers and text encoders are what they were.

    What is taught stands with the adapters on the text encoder or language model. So every tokenizer that was taught from
    one follows what is taught there later, by whichever base that has it; one whose teacher is gone reads as if it had
    learned nothing.

    Args:
        base: A pipeline or a ``LanguageModel``.

    Raises:
        UserError: Two adapters teach one placeholder, one is a word of the base already, there are more soft prompts than a
            prompt has room, or the tokenizer has learned from a text encoder of another pipeline. Nothing is changed then.
    """
    parts = components(base)
    pupils = [
        _Pupil(parts[name], getattr(base, tokenizer), of_lm=families.role_of(name) == "language model")
        for name, tokenizer in text_encoders(base).items()
    ]
    for pupil in pupils:
        pupil.check()
    _refuse_shared(pupils)
    for pupil in pupils:
        pupil.teach()


@dataclass(frozen=True)
class _Found:
    """What one placeholder of an adapter becomes: the names of its tokens, the first being the placeholder itself."""

    owner: str
    adapter: Adapter
    tokens: tuple[str, ...]
    block: int

    @property
    def precedes(self) -> bool:
        """Whether it is a soft prompt."""
        return self.adapter.precedes


class _Pupil:
    """A tokenizer, and the text encoder or language model whose adapters teach it."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, of_lm: bool) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.of_lm = of_lm
        self.state = state_of(encoder)
        self.found = list(_found(encoder))

    @property
    def plain(self) -> Any:
        """The tokenizer of the tokenizers library that the base has. Raises UserError where it has none."""
        plain = getattr(self.tokenizer, "_tokenizer", None)
        if plain is None:
            kind = type(self.tokenizer).__name__
            raise UserError(f"a {kind} cannot be taught words; one of the tokenizers library is needed")
        return plain

    def check(self) -> None:
        """Raise UserError where the adapters teach what this tokenizer cannot learn."""
        if not self.found:
            return
        if self._learns_elsewhere():
            raise UserError(
                f"the adapters {', '.join(dict.fromkeys(one.owner for one in self.found))} teach words, but this pipeline's"
                " tokenizer has learned those of another pipeline's text encoder; give it one of its own, as in"
                " pipe.tokenizer = copy.deepcopy(pipe.tokenizer)"
            )
        plain, owners = self.plain, dict[str, str]()
        for one in self.found:
            for name in one.tokens:
                _check_word(name, one.owner, owners, plain)
        config: Any = self.encoder.config
        room = (config.max_position_embeddings if self.of_lm else self.tokenizer.model_max_length) - 2
        front = sum(len(one.tokens) for one in self.found if one.precedes)
        if front >= room:
            raise UserError(f"soft prompts of {front} tokens leave no room for a prompt: the base reads {room}")
        if self.of_lm and front:
            template_of(json.loads(plain.to_str()))

    def teach(self) -> None:
        """Teach the tokenizer, and every other that was taught from here, what the adapters have to teach now."""
        if self.state is None or not self.found:
            self._forget()
            return
        plain, numbers = self.plain, itertools.count(_FIRST)
        ids = [tuple(next(numbers) for _ in one.tokens) for one in self.found]
        self.state.words = tuple(
            Word(one.owner, one.tokens, own, one.block, one.precedes) for one, own in zip(self.found, ids, strict=True)
        )
        _bind_ids(self.found, ids)
        instruct(self.tokenizer, plain, Link(self.state), self.state.words, of_lm=self.of_lm)
        for path, module in self.encoder.named_modules():
            if getattr(module, "eos_token_id", None) == _LEGACY_EOS != self.tokenizer.eos_token_id:
                # Its largest id would be a new word. For all others, the first end of text is where the largest id is.
                self.state.replace_attribute(self.encoder, path, "eos_token_id", self.tokenizer.eos_token_id)

    def _forget(self) -> None:
        if self.state is not None:
            self.state.forget_words(self.encoder)
        if not self._learns_elsewhere():
            forget(self.tokenizer)

    def _learns_elsewhere(self) -> bool:
        """Whether the tokenizer was taught by another text encoder, which still teaches it."""
        if teacher_of(self.tokenizer) in (None, self.state):
            return False
        gc.collect()  # one that nobody has any more lives until then, as its adapters know their sites
        return teacher_of(self.tokenizer) not in (None, self.state)


def _refuse_shared(pupils: Sequence[_Pupil]) -> None:
    """Raises UserError where two text encoders of one base teach the same tokenizer."""
    taught = [id(pupil.tokenizer) for pupil in pupils if pupil.found]
    if len(set(taught)) < len(taught):
        raise UserError(
            "the adapters of two text encoders teach words to one tokenizer, which both share; give each one of its own, as"
            " in pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer)"
        )


def _initial(tokenizer: Any, words: str, vectors: int) -> list[int]:
    """The tokens of some words, in turn until each vector has one."""
    ids = plain_ids(tokenizer, words or _DEFAULT)
    if len(ids) > vectors:
        room = number_of(vectors, "vector")
        raise UserError(f"the initial words {words!r} have {len(ids)} tokens, for {room}; give as many vectors")
    return [ids[index % len(ids)] for index in range(vectors)]


def _found(encoder: nn.Module) -> Iterator[_Found]:
    """What the adapters of a text encoder or language model have to teach."""
    for path, slot in sites.slots(encoder).items():
        for owner, adapter in slot.adapters.items():
            for part in parts_of(adapter):
                for name, began in part.learned_words().items():
                    yield _Found(owner, part, _names(name or f"<{owner}@{path}>", len(began)), slot.block)


def _names(placeholder: str, vectors: int) -> tuple[str, ...]:
    # Not "_1": pipelines of diffusers would take that for theirs, and replace substrings.
    return (placeholder, *(f"{placeholder}|{number}" for number in range(1, vectors)))


def _check_word(name: str, owner: str, owners: dict[str, str], plain: Any) -> None:
    other = owners.setdefault(name.casefold(), owner)
    if other != owner:
        raise UserError(f"the adapters {other!r} and {owner!r} both teach the word {name!r}; only one of them can be loaded")
    if len(plain.encode(name, add_special_tokens=False).ids) == 1:
        raise UserError(f"adapter {owner!r} teaches the word {name!r}, which the base knows already; choose another")


def _bind_ids(found: Sequence[_Found], ids: Sequence[Sequence[int]]) -> None:
    by_adapter: dict[Adapter, list[int]] = {}
    for one, own in zip(found, ids, strict=True):
        by_adapter.setdefault(one.adapter, []).extend(own)
    for adapter, numbers in by_adapter.items():
        adapter.bind_ids(numbers)
