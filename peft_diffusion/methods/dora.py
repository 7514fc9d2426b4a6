"""DoRA: direction and magnitude of the weight apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import Tensor

from ..core.adapter import Method, Site
from .lora import DOWN, MID, UP, LoraAdapter, check_dropout, fresh_pair, read_pair
from .shared.affine import ALPHA, check_rank, serves, stored_alpha
from .shared.decomposed import MAGNITUDE, Decomposed, decomposed, read_decomposed


@dataclass(frozen=True)
class Dora(Method, name="dora", suffixes=frozenset({DOWN, UP, MID, ALPHA, MAGNITUDE})):
    """The weight becomes ``magnitude * (W + LoRA) / |W + LoRA|``, the norm being that of each output's row.

    See ``Decomposed``. ``rank``, ``alpha``, ``dropout`` and ``rank_stabilized`` are those of the LoRA. Files are those of
    LyCORIS; diffusers 0.42 leaves ``dora_scale`` out of them, with a warning.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank, self.alpha)
        check_dropout(self.dropout)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """A pair with a magnitude."""
        return DOWN in suffixes and MAGNITUDE in suffixes

    def serves(self, site: Site) -> bool:
        """Linear layers and convolutions without groups."""
        return serves(site)

    def build(self, site: Site) -> Decomposed:
        """A fresh LoRA, and the norms that the rows of the weight have."""
        down, up = fresh_pair(site, self.rank, gaussian=False)
        alpha = stored_alpha(self.rank, self.alpha, self.rank_stabilized)
        return decomposed(site, LoraAdapter(site, down, up, alpha, self.dropout))

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> Decomposed:
        """From the LyCORIS layout; a magnitude per input instead of per output is known by its shape."""
        return read_decomposed(site, read_pair(site, tensors), tensors[MAGNITUDE])
