"""Learned words: the embeddings of new words (textual inversion).

Textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618) learns the embedding of a new word, the placeholder. It
sits at the token embedding, target ``tokens``. The base's matrix keeps its size: the tokenizer is taught ids beyond it
(``bases.words``), and the adapter answers for those.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ...core.errors import UserError
from ...core.method import Method, Rates, Scalars, Shapes, Values
from ..shared.hyper_parameters import check_ids, side

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import TokensAdapter

# The vectors, (tokens, width); and, as JSON in bytes, the tokens of the base that they began as, per placeholder.
VECTORS, WORDS = "tokens_vectors", "tokens_words"


@dataclass(frozen=True)
class Tokens(Method, name="tokens", suffixes=frozenset({VECTORS, WORDS})):
    """New words, ``placeholders``, with commas between several. Each has ``vectors`` tokens, which is as many vectors.

    ``initial`` are the words whose embeddings the vectors begin as, in turn where there are more vectors; with commas, one
    entry for each placeholder; "*" where it is empty. ``ids`` are the tokens of those words, one a vector, in the order of
    the placeholders, which ``bases.words.with_initial_tokens`` finds. Parameters: placeholders * vectors * width.
    """

    target: ClassVar[str] = "tokens"
    constants: ClassVar[frozenset[str]] = frozenset({WORDS})
    embedding: ClassVar[tuple[str, str]] = (VECTORS, WORDS)
    # Embeddings are large numbers. 5e-3 is what A1111's textual inversion starts with; of six rates from 4e-4 to 4e-2 on the
    # embedded base, whose embeddings are five times as large as CLIP's, words kept the subjects at twice that.
    rates: ClassVar[Rates] = Rates(own=5e-3, own_small=1e-2, text=2e-3)
    decayed: ClassVar[bool] = False
    reads_words: ClassVar[bool] = True
    debiased_when_small: ClassVar[bool] = True

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
        check_ids(self.ids)

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
        return VECTORS in suffixes

    def serves(self, site: "Site") -> bool:
        """Embeddings."""
        from torch import nn

        return isinstance(site, nn.Embedding)

    def build(self, site: "Site") -> "TokensAdapter":
        """Vectors that equal those of the initial words: the new words mean what these do."""
        from ..shared.learned_vectors import fresh
        from .adapter import TokensAdapter

        return fresh(site, dict.fromkeys(self.names, self.vectors), self.ids, TokensAdapter)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "TokensAdapter":
        """From keys of our own."""
        from ..shared.learned_vectors import read
        from .adapter import TokensAdapter

        return read(site, tensors, TokensAdapter)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """The number of vectors."""
        return {"vectors": side(shapes, VECTORS, 0)} if VECTORS in shapes else None

    def new_words(self) -> Sequence[str]:
        """The new words."""
        return self.names

    def initial_words(self) -> Sequence[tuple[str, int]]:
        """Those of each placeholder, unless their tokens are known."""
        return [] if self.ids else [(words, self.vectors) for words in self.begins]

    def with_ids(self, ids: Sequence[int]) -> Self:
        """With these ids."""
        return replace(self, ids=ids)
