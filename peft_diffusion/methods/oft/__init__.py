"""OFT: the outputs of the weight turned, block by block.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280. Parametrization and names are those of LyCORIS' ``diag-oft``.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.errors import UserError
from ...core.method import LYCORIS, Method, Network, Rates, Scalars, Shapes, Values
from ..shared.hyper_parameters import ALPHA, network_flags, side

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import OftAdapter

BLOCKS, RESCALE = "oft_blocks", "rescale"


@dataclass(frozen=True)
class Oft(Method, name="oft", suffixes=frozenset({BLOCKS, RESCALE, ALPHA})):
    """The weight is multiplied from the left by the transpose of a block-diagonal rotation; the bias stays.

    Each block of outputs has ``block_size`` of them or, where that does not divide their number or is above its square
    root, the largest divisor that does: the blocks that LyCORIS can read. ``constraint`` above 0 keeps the generators of a
    site's rotations within a norm of constraint * outputs. ``rescale`` also learns a factor for each output.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ALPHA})
    rates: ClassVar[Rates] = Rates(factor=3.0)

    block_size: int = 8
    constraint: float = 0.0
    rescale: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise UserError(f"block_size must be at least 2, not {self.block_size}")
        if not 0 <= self.constraint < math.inf:
            raise UserError(f"constraint must be 0 (none) or above, not {self.constraint}")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By the blocks."""
        return BLOCKS in suffixes

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from ..shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "OftAdapter":
        """Make an adapter that turns nothing yet: see ``adapter.fresh``, as for errors."""
        from .adapter import fresh

        return fresh(site, self)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "OftAdapter":
        """From the LyCORIS layout; ``alpha`` is the constraint there."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """The size of the blocks, a constraint that is not 0, and whether factors are learned."""
        if not cls.recognizes(shapes.keys()):
            return None
        constraint = scalars.get(ALPHA) or 0.0
        rescale: Values = {"rescale": True} if RESCALE in shapes else {}
        return {"block_size": side(shapes, BLOCKS, 1), **({"constraint": constraint} if constraint else {}), **rescale}

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """LyCORIS takes the size of the blocks from the rank."""
        constraint = {"constraint": str(values["constraint"])} if values.get("constraint") else {}
        args = {"algo": "diag-oft", **constraint, **network_flags(values, {"rescale": "rescaled"})}
        return Network(LYCORIS, int(values["block_size"]), None, args)
