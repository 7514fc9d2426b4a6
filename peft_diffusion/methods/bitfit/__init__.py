"""BitFit: the biases alone.

Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.method import Method, Rates

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import BitFitAdapter

# LyCORIS' names: ``modules/full.py`` for layers, ``modules/norms.py`` for norms.
LAYER_BIAS, NORM_BIAS, NORM_WEIGHT = "diff_b", "b_norm", "w_norm"


@dataclass(frozen=True)
class BitFit(Method, name="bitfit", suffixes=frozenset({LAYER_BIAS, NORM_BIAS, NORM_WEIGHT})):
    """``y + change`` of the bias, at every Linear, Conv2d, GroupNorm and LayerNorm that has one: the target ``biases``.

    Parameters: as many as the biases have. Has no hyper-parameters.
    """

    target: ClassVar[str] = "biases"
    fillers: ClassVar[frozenset[str]] = frozenset({NORM_WEIGHT})
    aliases: ClassVar[Mapping[str, str]] = {LAYER_BIAS: LAYER_BIAS}
    rates: ClassVar[Rates] = Rates(factor=10.0)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """A bias alone, or a norm's; a layer's bias beside a full ``diff`` of its weight is not this method's."""
        return NORM_BIAS in suffixes or (LAYER_BIAS in suffixes and "diff" not in suffixes)

    def serves(self, site: "Site") -> bool:
        """Layers and norms that have a bias."""
        from .adapter import serves

        return serves(site)

    def build(self, site: "Site") -> "BitFitAdapter":
        """No change yet."""
        from .adapter import fresh

        return fresh(site)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "BitFitAdapter":
        """From LyCORIS' layout; a change of a norm's weight, which other programs train, is kept and stays as it is."""
        from .adapter import read

        return read(site, tensors)
