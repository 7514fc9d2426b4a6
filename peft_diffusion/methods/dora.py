"""DoRA: a LoRA with direction and magnitude of the weight apart.

Liu et al. 2024, https://arxiv.org/abs/2402.09353.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.errors import UserError
from ..core.method import LYCORIS, Method, Network, PeftForm, PeftSite, Scalars, Shapes, Values
from .lora import BASE, DOWN, EMBEDDING_ALIASES, MID, PAIR_ALIASES, UP, own_pair_in_peft, pair_weight_shape, read_pair
from .shared.hyper_parameters import (
    ALPHA,
    MAGNITUDE,
    check_dropout,
    check_rank,
    network_flags,
    rank_and_alpha,
    stored_alpha,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.adapter import Adapter, Site
    from .shared.decomposed import Decomposed

_PEFT_MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Dora(Method, name="dora", suffixes=frozenset({DOWN, UP, MID, ALPHA, MAGNITUDE, BASE})):
    """The weight becomes ``magnitude * (W + LoRA) / |W + LoRA|``, the norm being that of each output's row.

    At an embedding, where files of peft have it, the norm is that of each column: what all tokens have in one number.

    See ``Decomposed``. ``rank``, ``alpha``, ``dropout`` and ``rank_stabilized`` are those of the LoRA. Files are those of
    LyCORIS; diffusers 0.42 leaves ``dora_scale`` out of them, with a warning.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ALPHA})
    ranked: ClassVar[frozenset[str]] = frozenset({DOWN})
    by_output: ClassVar[frozenset[str]] = frozenset({UP, MAGNITUDE})
    aliases: ClassVar[Mapping[str, str]] = {
        **PAIR_ALIASES, **EMBEDDING_ALIASES, _PEFT_MAGNITUDE: MAGNITUDE, MAGNITUDE: MAGNITUDE,
    }  # fmt: skip

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

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """Both matrices."""
        return (DOWN, UP)

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from .shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "Decomposed":
        """A fresh LoRA, and the norms that the rows of the weight have."""
        from .lora.adapter import LoraAdapter, fresh_pair
        from .shared.decomposed import decomposed

        down, up = fresh_pair(site, self.rank, gaussian=False)
        alpha = stored_alpha(self.rank, self.alpha, self.rank_stabilized)
        return decomposed(site, LoraAdapter(site, down, up, alpha, self.dropout))

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "Decomposed":
        """From the LyCORIS layout; a magnitude per input instead of per output is known by its shape."""
        from .lora import embedding
        from .lora.adapter import read_pair
        from .shared.decomposed import read_decomposed
        from .shared.sites import is_embedding

        if BASE in tensors:
            embedding.refuse_other_base(site, tensors[BASE])
        pair = embedding.read(site, tensors) if is_embedding(site) else read_pair(site, tensors)
        return read_decomposed(site, pair, tensors[MAGNITUDE])

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """Rank and alpha; of half a pair, nothing but that it is one."""
        return read_pair(shapes, scalars) if MAGNITUDE in shapes else None

    @classmethod
    def weight_shape(cls, shapes: Shapes) -> tuple[int, ...]:
        """By both sides of the pair."""
        return pair_weight_shape(shapes) if MAGNITUDE in shapes else ()

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """A LoRA of LyCORIS, decomposed."""
        args = {"algo": "lora", "dora_wd": "True", **network_flags(values, {"rank_stabilized": "rs_lora"})}
        return Network(LYCORIS, *rank_and_alpha(values), args)

    @classmethod
    def from_alias(cls, alias: str, tensor: "Tensor") -> "Tensor":
        """A magnitude as (out, 1, ...): peft's is flat for a Linear, and (1, out, 1, 1) for a convolution."""
        if cls.aliases[alias] != MAGNITUDE:
            return tensor
        if tensor.ndim == 1:
            return tensor[:, None]
        return tensor.transpose(0, 1) if alias == _PEFT_MAGNITUDE and tensor.ndim > 2 else tensor

    @classmethod
    def in_peft(cls, adapters: Mapping[str, "Adapter"]) -> PeftForm:
        """A LoRA with magnitudes per output, flat for a Linear or an embedding, and (1, out, 1, 1) for a convolution."""
        from .shared.sites import is_embedding

        sites = {}
        for path, adapter in adapters.items():
            state = adapter.state()
            pair, magnitude = own_pair_in_peft(adapter.site, state), state[MAGNITUDE]
            if len(magnitude) == 1 and magnitude.numel() > 1 and not is_embedding(adapter.site):
                raise UserError(f"{path} has a magnitude per input, and peft knows only those per output")
            shaped = magnitude.flatten() if magnitude.ndim == 2 else magnitude.transpose(0, 1)
            sites[path] = PeftSite({**pair.tensors, _PEFT_MAGNITUDE: shaped}, pair.rank, pair.alpha)
        return PeftForm("LORA", "lora_alpha", sites, {"use_dora": True})

    def dropped(self) -> float:
        """The dropout."""
        return self.dropout
