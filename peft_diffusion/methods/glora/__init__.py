"""GLoRA: a change of low rank, and one of the weight's own making.

Chavan et al. 2023, https://arxiv.org/abs/2306.07967. Parametrization and names are those of LyCORIS.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.method import LYCORIS, Method, Network, Scalars, Shapes, Values
from ..shared.hyper_parameters import ALPHA, MAGNITUDE, check_rank, rank_and_alpha, read_magnitude, read_rank

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from ..shared.decomposed import Decomposed
    from .adapter import GloraAdapter

A1, A2, B1, B2, CORE = "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"


@dataclass(frozen=True)
class Glora(Method, name="glora", suffixes=frozenset({A1, A2, B1, B2, CORE, ALPHA, MAGNITUDE})):
    """``W + alpha / rank * (W @ a1 @ a2 + b1 @ b2)`` at a Linear or Conv2d, whose inputs a1 and a2 mix.

    A convolution has its own kernel in ``b2``, and the others are 1x1. ``alpha`` None means alpha = rank. Parameters:
    rank * (3 * in + out) at a Linear.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ALPHA})
    ranked: ClassVar[frozenset[str]] = frozenset({A2, B2})
    aliases: ClassVar[Mapping[str, str]] = {name: name for name in (A1, A2, B1, B2)}

    rank: int = 16
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank, self.alpha)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By the first matrix."""
        return A1 in suffixes

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """The four matrices."""
        return (A1, A2, B1, B2)

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from ..shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "GloraAdapter":
        """``a1`` and ``b1`` uniform as a Linear starts (Kaiming, a = sqrt 5), ``a2`` and ``b2`` zero."""
        from .adapter import fresh

        return fresh(site, self.rank, float(self.rank if self.alpha is None else self.alpha))

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "GloraAdapter | Decomposed":
        """From LyCORIS, and from its first version, in which each pair stands the other way round."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """Rank and alpha, and whether magnitudes are apart, which ComfyUI reads."""
        if not cls.recognizes(shapes.keys()):
            return None
        rank = min(shapes.get(A2, ())[:2], default=0)  # the smaller side, whichever way round it stands
        return {**read_rank(rank, scalars), **read_magnitude(shapes)}

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """LyCORIS' own."""
        return Network(LYCORIS, *rank_and_alpha(values), {"algo": "glora"})
