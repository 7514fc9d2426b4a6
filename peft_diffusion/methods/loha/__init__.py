"""LoHa: the Hadamard product of two changes of low rank.

FedPara (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098). Parametrization
and names are those of LyCORIS (Yeh et al. 2023, https://arxiv.org/abs/2309.14859).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.errors import UserError
from ...core.method import LYCORIS, Method, Network, PeftForm, PeftSite, Rates, Scalars, Shapes, Values
from ..shared.hyper_parameters import (
    ALPHA,
    MAGNITUDE,
    check_rank,
    network_flags,
    rank_and_alpha,
    read_magnitude,
    read_rank,
    side,
    stored_alpha,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Adapter, Site
    from ..shared.decomposed import Decomposed
    from .adapter import LohaAdapter

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True)
class Loha(Method, name="loha", suffixes=frozenset({*FACTORS, *CORES, ALPHA, MAGNITUDE})):
    """The weight changes by ``alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)``, of a rank up to rank squared.

    ``alpha`` None means alpha = rank; ``rank_stabilized`` scales by alpha / sqrt(rank). ``weight_decompose`` trains the
    magnitudes of the outputs apart, as DoRA does: see ``Decomposed``.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ALPHA})
    ranked: ClassVar[frozenset[str]] = frozenset({"hada_w1_b"})
    by_output: ClassVar[frozenset[str]] = frozenset({"hada_w1_a", "hada_w2_a"})
    aliases: ClassVar[Mapping[str, str]] = {name: name for name in (*FACTORS, *CORES)}
    rates: ClassVar[Rates] = Rates(factor=0.5)

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    weight_decompose: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank, self.alpha)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By the first factor, as LyCORIS does."""
        return FACTORS[0] in suffixes

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """All factors, and both cores or none."""
        return FACTORS if suffixes.isdisjoint(CORES) else (*FACTORS, *CORES)

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from ..shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "LohaAdapter | Decomposed":
        """Factors as LyCORIS starts them: normal with deviations 0.1, 1 and 1, and one of zeros."""
        from ..shared.decomposed import decomposed
        from .adapter import fresh

        adapter = fresh(site, self.rank, stored_alpha(self.rank, self.alpha, self.rank_stabilized))
        return decomposed(site, adapter) if self.weight_decompose else adapter

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "LohaAdapter | Decomposed":
        """From the LyCORIS layout, also in the Tucker form of its convolutions (``hada_t1``, ``hada_t2``)."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """Rank, alpha, and whether the magnitudes are trained apart."""
        if not cls.recognizes(shapes.keys()):
            return None
        return {**read_rank(side(shapes, "hada_w1_b", 0), scalars), **read_magnitude(shapes)}

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """LyCORIS' own."""
        flags = network_flags(values, {"weight_decompose": "dora_wd", "rank_stabilized": "rs_lora"})
        return Network(LYCORIS, *rank_and_alpha(values), {"algo": "loha", **flags})

    @classmethod
    def in_peft(cls, adapters: Mapping[str, "Adapter"]) -> PeftForm:
        """The same names and shapes, without magnitudes and without the Tucker form."""
        sites = {}
        for path, adapter in adapters.items():
            state = adapter.state()
            more = next((name for name in (MAGNITUDE, *CORES) if name in state), None)
            if more is not None:
                raise UserError(f"{path} has {more}, and files of peft hold none for this method; take the layout 'kohya'")
            sites[path] = PeftSite({name: state[name] for name in FACTORS}, len(state[FACTORS[1]]), float(state[ALPHA]))
        return PeftForm("LOHA", "alpha", sites)
