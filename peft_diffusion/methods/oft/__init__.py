"""OFT: the weight turned, block by block, by rotations.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280, and with butterflies Liu et al. 2023 (BOFT),
https://arxiv.org/abs/2311.06243. Parametrization and names of rotations of the outputs are those of LyCORIS' ``diag-oft``
and ``boft``, which kohya's ``networks/oft.py`` shares; those of the inputs are OneTrainer's and peft's.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.errors import UserError
from ...core.method import LYCORIS, Method, Network, PeftForm, Rates, Scalars, Shapes, Values
from ...core.parsing import number
from ..shared.hyper_parameters import ALPHA, network_flags, side

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Adapter, Site
    from .adapter import OftAdapter
    from .on_input import InputButterfly, InputRotation

BLOCKS, RESCALE = "oft_blocks", "rescale"
PACKED, SCALED = "oft_R.weight", "oft_R.scaled_oft"
"""Of OneTrainer's and peft's OFT: the generators, each as what stands above its diagonal; and OneTrainer's mark that they
are divided by a number that grows with the blocks."""

TERMS, LIMIT = "oft_terms", "oft_eps"
"""What peft's configuration says: the number of terms of the series that stands for the Cayley transform (0 for the
transform itself), and the limit of the generators' norm (0 for none). Where a file has neither, it is OneTrainer's."""

BUTTERFLY, SCALE = "boft_R", "boft_s"
"""Of peft's BOFT: the generators, and a factor for each output."""


@dataclass(frozen=True)
class Oft(Method, name="oft", suffixes=frozenset({BLOCKS, RESCALE, ALPHA, PACKED, SCALED, TERMS, LIMIT, BUTTERFLY, SCALE})):
    """The weight is multiplied from the left by the transpose of a block-diagonal rotation; the bias stays.

    Each block of outputs has ``block_size`` of them or, where that does not divide their number or is above its square
    root, the largest divisor that does: the blocks that LyCORIS can read. ``constraint`` above 0 keeps the generators of a
    site's rotations within a norm of constraint * outputs. ``rescale`` also learns a factor for each output.

    ``butterfly`` makes it BOFT: several such rotations, each of other outputs together, so that all mix. Blocks are then at
    most of ``block_size``, or of the smallest size with which their number is a power of two. ``on_input`` turns the inputs,
    as OneTrainer and peft do, at a convolution with those of its kernel.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ALPHA, SCALED, TERMS, LIMIT})
    aliases: ClassVar[Mapping[str, str]] = {"oft_R": PACKED, **{name: name for name in (SCALED, BUTTERFLY, SCALE)}}
    rates: ClassVar[Rates] = Rates(factor=3.0)

    block_size: int = 8
    constraint: float = 0.0
    rescale: bool = False
    butterfly: bool = False
    on_input: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise UserError(f"block_size must be at least 2, not {self.block_size}")
        if not 0 <= self.constraint < math.inf:
            raise UserError(f"constraint must be 0 (none) or above, not {self.constraint}")
        if self.on_input and (self.butterfly or self.rescale or self.constraint):
            raise UserError("on_input turns inputs; constraint, rescale and butterfly are for outputs")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By the blocks."""
        return not suffixes.isdisjoint({BLOCKS, PACKED, BUTTERFLY})

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """The factors of peft's BOFT; the other forms are one tensor."""
        return (BUTTERFLY, SCALE) if suffixes.isdisjoint({BLOCKS, PACKED}) else ()

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from ..shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "OftAdapter | InputRotation":
        """Make an adapter that turns nothing yet: see ``adapter.fresh`` and ``on_input.fresh``, as for errors."""
        from . import adapter, on_input

        return on_input.fresh(site, self.block_size) if self.on_input else adapter.fresh(site, self)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "OftAdapter | InputRotation | InputButterfly":
        """From the LyCORIS layout, in which ``alpha`` is the constraint, and from those of OneTrainer and peft."""
        from . import adapter, on_input

        return adapter.read(site, tensors) if BLOCKS in tensors else on_input.read(site, tensors)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """The size of the blocks, a constraint that is not 0, what is turned, and whether factors are learned."""
        if not cls.recognizes(shapes.keys()):
            return None
        if BLOCKS not in shapes:
            size = block_side(side(shapes, PACKED, 1)) if PACKED in shapes else side(shapes, BUTTERFLY, 2)
            return {"block_size": size, "on_input": True, **({"butterfly": True} if PACKED not in shapes else {})}
        constraint, butterfly = scalars.get(ALPHA) or 0.0, len(shapes[BLOCKS]) == 4
        return {
            "block_size": side(shapes, BLOCKS, 2 if butterfly else 1),
            **({"constraint": constraint} if constraint else {}),
            **({"rescale": True} if RESCALE in shapes else {}),
            **({"butterfly": True} if butterfly else {}),
        }

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network | None:
        """LyCORIS takes the size of the blocks from the rank. It turns no inputs."""
        if values.get("on_input"):
            return None
        constraint = {"constraint": str(values["constraint"])} if values.get("constraint") else {}
        kind = "boft" if values.get("butterfly") else "diag-oft"
        args = {"algo": kind, **constraint, **network_flags(values, {"rescale": "rescaled"})}
        return Network(LYCORIS, int(values["block_size"]), None, args)

    @classmethod
    def from_alias(cls, alias: str, tensor: "Tensor") -> "Tensor":
        """peft keeps the factors as a column or a row."""
        return tensor.flatten() if alias == SCALE else tensor

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str, shapes: Shapes) -> Mapping[str, float]:
        """How rotations are made of their generators, with peft's own defaults for what a configuration leaves out."""
        if PACKED not in shapes:
            return {}
        series = config.get("use_cayley_neumann", True)
        terms = number(config.get("num_cayley_neumann_terms", 5)) if series else 0.0
        limit = number(config.get("eps", 6e-5)) if config.get("coft") else 0.0
        return {TERMS: terms or 0.0, LIMIT: limit or 0.0}

    @classmethod
    def in_peft(cls, adapters: Mapping[str, "Adapter"]) -> PeftForm | None:
        """Rotations of the inputs, all of one kind."""
        from .on_input import in_peft

        return in_peft(adapters)


def block_side(above: int) -> int:
    """Tell the side of a matrix by how many numbers stand above its diagonal.

    Args:
        above: The number.

    Returns:
        The side; 0 where there is no such matrix.
    """
    side = (1 + math.isqrt(1 + 8 * above)) // 2
    return side if above > 0 and side * (side - 1) == 2 * above else 0
