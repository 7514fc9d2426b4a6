"""Learned tokens: words of one's own, and words that precede every prompt.

Textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618) learns the embedding of a new word, the placeholder;
prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691) learns words that stand before every prompt. Both sit at
the token embedding, target ``tokens``. The base's matrix keeps its size: the tokenizer is taught ids beyond it
(``bases.vocabulary``), and the adapter answers for those.
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter, Method, Site, float32_parameter
from ..core.errors import DamagedError, FoldError, UserError
from ..core.sharded import whole

# The vectors, (tokens, width); and, as JSON in bytes, the tokens of the base that they began as, per placeholder.
_VECTORS, _WORDS = "tokens_vectors", "tokens_words"
_PROMPT_VECTORS, _PROMPT_WORDS = "prompt_vectors", "prompt_words"
_PROMPT = ""  # the placeholder of a soft prompt, which nobody writes


@dataclass(frozen=True)
class Tokens(Method, name="tokens", suffixes=frozenset({_VECTORS, _WORDS})):
    """New words, ``placeholders``, with commas between several. Each has ``vectors`` tokens, which is as many vectors.

    ``initial`` are the words whose embeddings the vectors begin as, in turn where there are more vectors; with commas, one
    entry for each placeholder; "*" where it is empty. ``ids`` are the tokens of those words, one a vector, in the order of
    the placeholders, which ``bases.vocabulary.begun`` finds. Parameters: placeholders * vectors * width.
    """

    target: ClassVar[str] = "tokens"

    placeholders: str = "<new>"
    vectors: int = 4
    initial: str = ""
    ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise UserError(f"a placeholder needs at least 1 vector, not {self.vectors}")
        for name in self.names:
            if not name or any(letter.isspace() for letter in name):
                raise UserError(f"a placeholder is one word without spaces, such as <cat>; {name!r} is not")
        if len({name.casefold() for name in self.names}) < len(self.names):
            raise UserError(f"placeholders {self.placeholders!r} name one twice")
        if len(self.begins) != len(self.names):
            raise UserError(
                f"initial words are given for {len(self.begins)} placeholders, but there are {len(self.names)}:"
                f" {', '.join(self.names)}"
            )
        _check_type(self.ids)

    @property
    def names(self) -> list[str]:
        """The placeholders."""
        return [name.strip() for name in self.placeholders.split(",")]

    @property
    def begins(self) -> list[str]:
        """The initial words of each placeholder."""
        return [words.strip() for words in self.initial.split(",")] if self.initial else [""] * len(self.names)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By its own names."""
        return _VECTORS in suffixes

    def serves(self, site: Site) -> bool:
        """Embeddings."""
        return isinstance(site, nn.Embedding)

    def build(self, site: Site) -> "TokensAdapter":
        """Vectors that equal those of the initial words: the new words mean what these do."""
        return _build(site, dict.fromkeys(self.names, self.vectors), self.ids, TokensAdapter)

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "TokensAdapter":
        """From keys of our own."""
        return _read(site, tensors, TokensAdapter)


@dataclass(frozen=True)
class SoftPrompt(Method, name="prompt", suffixes=frozenset({_PROMPT_VECTORS, _PROMPT_WORDS})):
    """``vectors`` learned tokens before every prompt; they begin as the words ``initial``. Parameters: vectors * width.

    They take room from the prompt: a text encoder reads 77 tokens in all. In a language model they precede even the token
    that marks the start, as in peft's prompt tuning. ``ids`` as for ``tokens``.
    """

    target: ClassVar[str] = "tokens"

    vectors: int = 8
    initial: str = ""
    ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise UserError(f"a soft prompt needs at least 1 vector, not {self.vectors}")
        _check_type(self.ids)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By its own names."""
        return _PROMPT_VECTORS in suffixes

    def serves(self, site: Site) -> bool:
        """Embeddings."""
        return isinstance(site, nn.Embedding)

    def build(self, site: Site) -> "SoftPromptAdapter":
        """Vectors that equal those of the initial words."""
        return _build(site, {_PROMPT: self.vectors}, self.ids, SoftPromptAdapter)

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "SoftPromptAdapter":
        """From keys of our own."""
        return _read(site, tensors, SoftPromptAdapter)


class TokensAdapter(Adapter):
    """The vectors (tokens, width) of new tokens, and the ids that mean them.

    Until ``answer`` gives it ids that a tokenizer was taught, it answers for the very tokens that its vectors began as.
    At strength 0 a new token means the one that it began as.
    """

    own_layout = True
    names: ClassVar[tuple[str, str]] = (_VECTORS, _WORDS)

    ids: Tensor
    began: Tensor

    def __init__(self, vectors: Tensor, words: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.vectors = float32_parameter(vectors)
        self.words = {name: tuple(ids) for name, ids in words.items()}
        began = torch.tensor([one for ids in self.words.values() for one in ids])
        self.register_buffer("began", began, persistent=False)
        self.register_buffer("ids", began.clone(), persistent=False)

    def answer(self, ids: Sequence[int] | None) -> None:
        """Serve these ids, one a vector, in the order of ``words``; None: the ids that the vectors began as."""
        chosen = self.began if ids is None else torch.tensor(ids, device=self.ids.device)
        if chosen.shape != self.ids.shape:
            raise ValueError(f"{len(chosen)} ids for {len(self.ids)} vectors")
        self.ids = chosen.clone()

    def prepare(self, x: Tensor) -> Tensor:
        """The ids with new ones replaced by those that they began as, which the base knows."""
        own, row = self._find(x)
        return torch.where(own, self.began[row], x)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """From what stands at its ids to its vectors; 0 elsewhere."""
        own, row = self._find(x)
        change = F.embedding(row, self.vectors).to(y.dtype) - y
        return torch.where(own[..., None], change, torch.zeros_like(y))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Refuses: the matrix has no rows for new tokens, and where it is the output layer too, it must not change."""
        words = ", ".join(name or "the soft prompt" for name in self.words)
        raise FoldError(f"new tokens ({words}) have no row in the embedding matrix, so they cannot be merged into it")

    def state(self) -> dict[str, Tensor]:
        """The vectors, and the words as bytes of JSON."""
        text = json.dumps(self.words, ensure_ascii=False).encode()
        return dict(zip(self.names, (self.vectors, torch.tensor(list(text), dtype=torch.uint8)), strict=True))

    def _find(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each id is one of its own, and which vector's."""
        match = x[..., None] == self.ids
        return match.any(-1), match.int().argmax(-1)


class SoftPromptAdapter(TokensAdapter):
    """The same, for tokens that the taught tokenizer puts before every prompt."""

    names = (_PROMPT_VECTORS, _PROMPT_WORDS)


_Kind = TypeVar("_Kind", bound=TokensAdapter)


def _check_type(ids: Sequence[int]) -> None:
    if isinstance(ids, str) or not all(isinstance(one, int) for one in ids):
        raise UserError(f"ids are numbers of tokens, found from the initial words; give those instead of {ids!r}")


def _embedding(site: Site) -> nn.Embedding:
    if not isinstance(site, nn.Embedding):
        raise UserError(f"learned tokens sit at an embedding (target 'tokens'), not at a {type(site).__name__}")
    return site


def _build(site: Site, placeholders: Mapping[str, int], ids: Sequence[int], cls: type[_Kind]) -> _Kind:
    embedding, count = _embedding(site), sum(placeholders.values())
    if len(ids) != count:
        raise UserError(f"{count} vectors begin as {len(ids)} tokens; bases.vocabulary.begun names one for each vector")
    _check_ids(embedding, ids)
    words, start = {}, 0
    for name, vectors in placeholders.items():
        words[name] = ids[start : start + vectors]
        start += vectors
    weight = whole(embedding.weight)
    return cls(weight[torch.tensor(ids, device=weight.device)], words)


def _read(site: Site, tensors: Mapping[str, Tensor], cls: type[_Kind]) -> _Kind:
    vectors_name, words_name = cls.names
    embedding, vectors = _embedding(site), tensors[vectors_name]
    if words_name not in tensors:
        raise DamagedError(f"{words_name} is missing")
    try:
        words = json.loads(bytes(tensors[words_name].tolist()).decode())
        flat = [one for ids in words.values() for one in ids]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{words_name} is damaged") from None
    if not all(type(one) is int for one in flat) or not all(words.values()):
        raise UserError(f"{words_name} is damaged")
    if vectors.shape != (len(flat), embedding.embedding_dim) or not flat:
        raise UserError(
            f"vectors {tuple(vectors.shape)} do not fit {len(flat)} tokens; the width here is {embedding.embedding_dim}"
        )
    _check_ids(embedding, flat)
    return cls(vectors, words)


def _check_ids(embedding: nn.Embedding, ids: Sequence[int]) -> None:
    unknown = [one for one in ids if not 0 <= one < embedding.num_embeddings]
    if unknown:
        raise UserError(f"the embedding has {embedding.num_embeddings} tokens, and none with the number {unknown[0]}")
