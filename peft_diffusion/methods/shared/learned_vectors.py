"""Vectors of new tokens at an embedding: what learned words and soft prompts compute, and how files hold them."""

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import DamagedError, FoldError, UserError
from ...core.parsing import json_value, refusing
from ...core.sharded import whole
from ...core.wording import number_of


class LearnedVectors(Adapter):
    """The vectors (tokens, width) of new tokens, and the ids that mean them.

    Until ``answer`` gives it ids that a tokenizer was taught, it answers for the very tokens that its vectors began as.
    At strength 0 a new token means the one that it began as.
    """

    own_layout = True
    suffixes: ClassVar[tuple[str, str]]  # of the vectors, and of the words as JSON in bytes

    ids: Tensor
    began: Tensor

    def __init__(self, vectors: Tensor, words: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.vectors = float32_parameter(vectors)
        self.words = {name: tuple(ids) for name, ids in words.items()}
        began = torch.tensor([one for ids in self.words.values() for one in ids])
        self.register_buffer("began", began, persistent=False)
        self.register_buffer("ids", began.clone(), persistent=False)

    def learned_words(self) -> Mapping[str, Sequence[int]]:
        """The tokens of the base that the vectors of each began as."""
        return self.words

    def bind_ids(self, ids: Sequence[int] | None) -> None:
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
        return dict(zip(self.suffixes, (self.vectors, torch.tensor(list(text), dtype=torch.uint8)), strict=True))

    def _find(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each id is one of its own, and which vector's."""
        match = x[..., None] == self.ids
        return match.any(-1), match.int().argmax(-1)


_Kind = TypeVar("_Kind", bound=LearnedVectors)


def _embedding(site: Site) -> nn.Embedding:
    if not isinstance(site, nn.Embedding):
        raise UserError(f"learned tokens sit at an embedding (target 'tokens'), not at a {type(site).__name__}")
    return site


def fresh(site: Site, placeholders: Mapping[str, int], ids: Sequence[int], cls: type[_Kind]) -> _Kind:
    """Make vectors that equal those of tokens of the base.

    Args:
        site: The token embedding.
        placeholders: How many vectors each new word has, by word.
        ids: The tokens, one a vector, in the order of the words.
        cls: The kind of adapter.

    Returns:
        The adapter.

    Raises:
        UserError: There are not as many tokens as vectors, or the embedding has no such token.
    """
    embedding, count = _embedding(site), sum(placeholders.values())
    if len(ids) != count:
        told = f"{number_of(count, 'vector')} cannot begin as {number_of(len(ids), 'token')}"
        raise UserError(f"{told}; words.with_initial_tokens names one a vector")
    _check_ids(embedding, ids)
    words, start = {}, 0
    for name, vectors in placeholders.items():
        words[name] = ids[start : start + vectors]
        start += vectors
    weight = whole(embedding.weight)
    return cls(weight[torch.tensor(ids, device=weight.device)], words)


def read(site: Site, tensors: Mapping[str, Tensor], cls: type[_Kind]) -> _Kind:
    """Make vectors and words from the tensors of a file.

    Args:
        site: The token embedding.
        tensors: By suffix.
        cls: The kind of adapter.

    Returns:
        The adapter.

    Raises:
        DamagedError: The words are missing.
        UserError: The words are damaged, or the vectors do not fit them or the site.
    """
    vectors_name, words_name = cls.suffixes
    embedding, vectors = _embedding(site), tensors[vectors_name]
    if words_name not in tensors:
        raise DamagedError(f"{words_name} is missing")
    with refusing(f"{words_name} is damaged"):
        words = json_value(bytes(tensors[words_name].tolist()).decode())
        flat = [one for ids in words.values() for one in ids]
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
