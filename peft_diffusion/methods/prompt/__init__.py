"""Soft prompts: learned tokens that precede every prompt.

Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691). They sit at the token embedding, target
``tokens``, beyond the base's matrix, as new words do: see ``tokens``.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ...core.errors import UserError
from ...core.method import Method, Rates, Scalars, Shapes, Values, VirtualRows
from ..shared.hyper_parameters import check_ids, side

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import SoftPromptAdapter

# As those of ``tokens``.
VECTORS, WORDS = "prompt_vectors", "prompt_words"
PLACEHOLDER = ""  # the word that a soft prompt is in a file, which nobody writes


@dataclass(frozen=True)
class SoftPrompt(Method, name="prompt", suffixes=frozenset({VECTORS, WORDS})):
    """``vectors`` learned tokens before every prompt; they begin as the words ``initial``. Parameters: vectors * width.

    They take room from the prompt: a text encoder reads 77 tokens in all. In a language model they precede even the token
    that marks the start, as in peft's prompt tuning. ``ids`` as for ``tokens``.
    """

    target: ClassVar[str] = "tokens"
    constants: ClassVar[frozenset[str]] = frozenset({WORDS})
    # As of ``tokens``: on the embedded base the prompt looked most like a style at the very rate that A1111 starts with.
    rates: ClassVar[Rates] = Rates(own=5e-3, text=1e-2, text_small=3e-2)
    decayed: ClassVar[bool] = False
    reads_words: ClassVar[bool] = True
    debiased_when_small: ClassVar[bool] = True

    vectors: int = 8
    initial: str = ""
    ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise UserError(f"a soft prompt needs at least 1 vector, not {self.vectors}")
        check_ids(self.ids)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By its own names."""
        return VECTORS in suffixes

    def serves(self, site: "Site") -> bool:
        """Embeddings."""
        from torch import nn

        return isinstance(site, nn.Embedding)

    def build(self, site: "Site") -> "SoftPromptAdapter":
        """Vectors that equal those of the initial words."""
        from ..shared.learned_vectors import fresh
        from .adapter import SoftPromptAdapter

        return fresh(site, {PLACEHOLDER: self.vectors}, self.ids, SoftPromptAdapter)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "SoftPromptAdapter":
        """From keys of our own."""
        from ..shared.learned_vectors import read
        from .adapter import SoftPromptAdapter

        return read(site, tensors, SoftPromptAdapter)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """The number of vectors."""
        return {"vectors": side(shapes, VECTORS, 0)} if cls.recognizes(shapes.keys()) else None

    @classmethod
    def from_virtual_tokens(cls, kind: str, width: int, layers: int) -> Sequence[VirtualRows]:
        """Prompt tuning, and P-tuning, of which peft keeps what its network made of the prompt."""
        return (VirtualRows(None, VECTORS, (0, width), words=WORDS),) if kind in ("PROMPT_TUNING", "P_TUNING") else ()

    def initial_words(self) -> Sequence[tuple[str, int]]:
        """The initial words, unless their tokens are known."""
        return [] if self.ids else [(self.initial, self.vectors)]

    def with_ids(self, ids: Sequence[int]) -> Self:
        """With these ids."""
        return replace(self, ids=ids)
