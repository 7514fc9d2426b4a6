"""(IA)3: a factor for each channel.

Liu et al. 2022, https://arxiv.org/abs/2205.05638. Names are those of LyCORIS.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.method import LYCORIS, Method, Network, Rates, Scalars, Shapes, Values

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import Ia3Adapter

WEIGHT, ON_INPUT = "weight", "on_input"


@dataclass(frozen=True)
class Ia3(Method, name="ia3", suffixes=frozenset({WEIGHT, ON_INPUT})):
    """What the weight makes of the input is multiplied by 1 + w, one w an output or, with ``on_input``, one an input.

    The paper has it on keys, values (outputs) and the second layer of the feed-forward (inputs). The bias stays as it is,
    as in LyCORIS; peft multiplies it too.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ON_INPUT})
    rates: ClassVar[Rates] = Rates(factor=30.0, text=3e-3)

    on_input: bool = False

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By the mark that LyCORIS sets."""
        return ON_INPUT in suffixes

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from ..shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "Ia3Adapter":
        """Factors of 1, kept as their distance from 1."""
        from .adapter import fresh

        return fresh(site, self.on_input)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "Ia3Adapter":
        """From the LyCORIS layout."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """On which side the factors are."""
        return {"on_input": bool(scalars.get(ON_INPUT))} if cls.recognizes(shapes.keys()) else None

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """LyCORIS' own, which has no rank."""
        return Network(LYCORIS, None, None, {"algo": "ia3"})
