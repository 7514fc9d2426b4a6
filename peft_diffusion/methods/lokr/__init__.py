"""LoKr: a Kronecker product as the change.

KronA (Edalati et al. 2022, https://arxiv.org/abs/2212.10650). Parametrization
and names are those of LyCORIS (Yeh et al. 2023, https://arxiv.org/abs/2309.14859).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.errors import UserError
from ...core.method import LYCORIS, Method, Network, PeftForm, Rates, Scalars, Shapes, Values
from ..shared.hyper_parameters import (
    ALPHA,
    MAGNITUDE,
    check_rank,
    network_flags,
    rank_and_alpha,
    read_magnitude,
    read_rank,
    side,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Adapter, Site
    from ..shared.decomposed import Decomposed
    from .adapter import LokrAdapter

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B, CORE = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
NAMES = (W1, W1_A, W1_B, W2, W2_A, W2_B, CORE)


@dataclass(frozen=True)
class Lokr(Method, name="lokr", suffixes=frozenset({*NAMES, ALPHA, MAGNITUDE})):
    """The weight changes by ``alpha / rank * kron(w1, w2)``.

    Outputs and inputs are each split in two, the first part at most ``factor`` and the second no smaller; ``factor`` -1
    makes both as equal as the number allows, which gives the fewest parameters. ``w1`` maps the first parts and ``w2`` the
    second ones. ``w2`` is a product of two matrices of ``rank`` where that is under half of its larger side, or, with
    ``full``, one matrix; ``decompose_both`` makes the same choice for ``w1``, which is one matrix otherwise.
    Where both are one matrix there is no rank, and alpha has no effect. ``alpha`` None means alpha = rank;
    ``rank_stabilized`` scales by alpha / sqrt(rank). ``weight_decompose`` trains the magnitudes of the outputs apart, as
    DoRA does: see ``Decomposed``.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ALPHA})
    ranked: ClassVar[frozenset[str]] = frozenset({W1_B, W2_B})
    aliases: ClassVar[Mapping[str, str]] = {name: name for name in NAMES}
    rates: ClassVar[Rates] = Rates(factor=3.0)

    rank: int = 16
    alpha: float | None = None
    factor: int = 8
    full: bool = False
    decompose_both: bool = False
    rank_stabilized: bool = False
    weight_decompose: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank, self.alpha)
        if self.factor != -1 and self.factor < 1:
            raise UserError(f"factor must be at least 1, or -1 for parts as equal as can be, not {self.factor}")
        if self.full and self.decompose_both:
            raise UserError("full keeps w2 one matrix and decompose_both makes w1 two; choose one of them")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By either form of ``w1``, as LyCORIS does."""
        return not suffixes.isdisjoint({W1, W1_A})

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """Both matrices, each whole or as two factors."""
        halves = ((W1, W1_A, W1_B), (W2, W2_A, W2_B))
        return [name for whole, *factors in halves if whole not in suffixes for name in factors]

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from ..shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "LokrAdapter | Decomposed":
        """Everything uniform as a Linear starts (Kaiming, a = sqrt 5), but ``w2``, or its second factor, of zeros."""
        from .adapter import fresh

        return fresh(site, self)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "LokrAdapter | Decomposed":
        """From the LyCORIS layout, also in the Tucker form of its convolutions (``lokr_t2``)."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """Factor; rank and alpha, or that there is none; and whether the magnitudes are trained apart."""
        if not cls.recognizes(shapes.keys()):
            return None
        if W1 in shapes:
            factor = max(side(shapes, W1, 0), side(shapes, W1, 1))
        else:
            factor = max(side(shapes, W1_A, 0), side(shapes, W1_B, 1))
        rank = side(shapes, W2_B, 0) or side(shapes, W1_B, 0)
        ranked = read_rank(rank, scalars) or {"full": True}  # without a rank alpha says nothing
        return {"factor": factor, **ranked, **read_magnitude(shapes)}

    @classmethod
    def weight_shape(cls, shapes: Shapes) -> tuple[int, ...]:
        """That of the product of both; unknown where factors of a kernel lie flat, as those of a Linear do."""
        first = shapes.get(W1) or (*shapes.get(W1_A, ())[:1], *shapes.get(W1_B, ())[1:])
        second = shapes.get(W2, ())
        if len(first) != 2 or len(second) not in (2, 4):
            return ()
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """LyCORIS' own."""
        names = {
            "weight_decompose": "dora_wd",
            "rank_stabilized": "rs_lora",
            "full": "full_matrix",
            "decompose_both": "decompose_both",
        }
        args = {"algo": "lokr", "factor": str(values["factor"]), **network_flags(values, names)}
        return Network(LYCORIS, *rank_and_alpha(values), args)

    @classmethod
    def scaled_tensor(cls, suffixes: Set[str]) -> str | None:
        """``w1``, where both are one matrix: peft scales those too."""
        return W1 if W1 in suffixes and W2 in suffixes else None

    @classmethod
    def in_peft(cls, adapters: Mapping[str, "Adapter"]) -> PeftForm:
        """The same names and shapes, where one configuration of peft gives them at all sites."""
        from .peft_form import in_peft

        return in_peft(adapters)
