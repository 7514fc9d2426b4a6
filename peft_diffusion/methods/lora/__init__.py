"""LoRA: a change of low rank.

Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.errors import UserError
from ...core.method import KOHYA, LYCORIS, Method, Network, PeftForm, PeftSite, Scalars, Shapes, Values
from ..shared.hyper_parameters import (
    ALPHA,
    MAGNITUDE,
    check_dropout,
    check_rank,
    rank_and_alpha,
    read_rank,
    side,
    stored_alpha,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Adapter, Described, PairForm, Site
    from .adapter import LoraAdapter
    from .embedding import EmbeddingLora
    from .extended import ExtendedLora

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
SINGULAR = "lora_E"
"""Of peft's AdaLoRA: what stands between both halves of a pair, a diagonal."""

UP_BIAS = "lora_up.bias"
"""Of peft's ``lora_bias``: the bias of the second half, which is scaled as the pair is."""

SPARSE = ("bias_indices", "bias_values", "bias_size")
"""Of LyCORIS' ``extract_diff`` with ``use_bias``: what the pair leaves of the change of the weight, as a sparse matrix."""

_PLAIN = frozenset({DOWN, UP, ALPHA})
EXTRAS = frozenset({SINGULAR, UP_BIAS, *SPARSE})
BASE = "base_layer.weight"
"""The weight of an embedding, which peft saves beside a pair that it has there. It changes nothing."""

EMBEDDING_ALIASES = {"lora_embedding_A": DOWN, "lora_embedding_B": UP, BASE: BASE}
"""What peft calls them at an embedding."""

INITS = ("standard", "gaussian", "pissa", "orthogonal")
PAIR_ALIASES = {
    "lora_A": DOWN, "lora_B": UP,
    "lora.down": DOWN, "lora.up": UP,
    "lora_down": DOWN, "lora_up": UP,
    "lora_linear_layer.down": DOWN, "lora_linear_layer.up": UP,
    "alpha": ALPHA,
}  # fmt: skip
"""What peft and diffusers, older scripts of diffusers, ComfyUI, and the oldest scripts call the tensors of a pair."""


@dataclass(frozen=True)
class Lora(Method, name="lora", suffixes=frozenset({DOWN, UP, MID, ALPHA, BASE}) | EXTRAS):
    """``y + alpha / rank * up(down(x))`` at a Linear or Conv2d; a convolution goes down with its own kernel, up with 1x1.

    At an embedding the rows change by ``alpha / rank * up @ down``.

    ``alpha`` None means alpha = rank. ``dropout`` drops inputs of ``down`` while training. ``rank_stabilized`` scales by
    alpha / sqrt(rank). ``init`` is what training starts from:

    - ``standard``: down uniform as a Linear starts (Kaiming, a = sqrt 5), up zero, as in the paper's code;
    - ``gaussian``: down normal with deviation 1 / rank, up zero;
    - ``pissa``: the weight's largest singular values and vectors (Meng et al. 2024, https://arxiv.org/abs/2404.02948),
      see ``PissaAdapter``. Takes a singular value decomposition of each weight;
    - ``orthogonal``: down the part ``basis_part``, from 0, of an orthogonal basis that comes from ``basis_seed``, and stays
      so, up zero and trained. Adapters with one seed, one rank and different parts read nothing in common (Orthogonal
      Adaptation, Po et al. 2024, https://arxiv.org/abs/2312.02432).

    ``b_rate_ratio`` times the learning rate is what ``up`` (the paper's B) is trained with: LoRA+ (Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354), which advises about 16, and a lower learning rate beside it; 1 is plain LoRA.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ALPHA, SPARSE[0], SPARSE[2]})
    ranked: ClassVar[frozenset[str]] = frozenset({DOWN})
    by_output: ClassVar[frozenset[str]] = frozenset({UP, UP_BIAS})
    rows: ClassVar[tuple[str, str]] = (DOWN, UP)
    aliases: ClassVar[Mapping[str, str]] = {
        **PAIR_ALIASES, **EMBEDDING_ALIASES, SINGULAR: SINGULAR, "lora_B.bias": UP_BIAS,
    }  # fmt: skip

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: str = "standard"
    b_rate_ratio: float = 1.0
    basis_seed: int = 0
    basis_part: int = 0

    def __post_init__(self) -> None:
        check_rank(self.rank, self.alpha)
        check_dropout(self.dropout)
        if not 0 < self.b_rate_ratio < math.inf:
            raise UserError(f"b_rate_ratio must be above 0, not {self.b_rate_ratio}")
        if self.init not in INITS:
            raise UserError(f"init must be one of {', '.join(INITS)}, not {self.init!r}")
        if (self.basis_seed or self.basis_part) and self.init != "orthogonal":
            raise UserError("basis_seed and basis_part are of init=orthogonal; give that too, or leave them away")
        if self.basis_part < 0 or not 0 <= self.basis_seed < 2**63:
            raise UserError("basis_seed and basis_part are whole numbers of 0 or more")
        if self.init == "orthogonal" and self.b_rate_ratio != 1:
            raise UserError("init=orthogonal trains up alone, so there is no b_rate_ratio; leave one of them away")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """A pair without the magnitude that would make it DoRA."""
        return DOWN in suffixes and MAGNITUDE not in suffixes

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """Both matrices, and all or none of a sparse bias."""
        return (DOWN, UP) if suffixes.isdisjoint(SPARSE) else (DOWN, UP, *SPARSE)

    def serves(self, site: "Site") -> bool:
        """Linear layers, convolutions without groups and, but for PiSSA and a shared basis, embeddings."""
        from ..shared.affine import serves
        from ..shared.sites import is_embedding

        return serves(site) or (is_embedding(site) and self.init not in ("pissa", "orthogonal"))

    def build(self, site: "Site") -> "LoraAdapter | EmbeddingLora":
        """Make a fresh pair, or with PiSSA that of the largest singular values of the weight."""
        from ..shared.sites import is_embedding, weight_shape
        from .adapter import LoraAdapter, fresh_pair, principal
        from .embedding import EmbeddingLora
        from .shared_basis import SharedBasisLora, orthogonal_down

        alpha = stored_alpha(self.rank, self.alpha, self.rank_stabilized)
        if self.init == "pissa":
            return principal(site, self.rank, alpha, self.dropout, self.b_rate_ratio)
        down, up = fresh_pair(site, self.rank, self.init == "gaussian")
        if self.init == "orthogonal":
            down = orthogonal_down(weight_shape(site), self.rank, self.basis_seed, self.basis_part)
            return SharedBasisLora(site, down, up, alpha, self.dropout)
        if is_embedding(site):
            return EmbeddingLora(down, up, alpha, self.dropout, self.b_rate_ratio)
        return LoraAdapter(site, down, up, alpha, self.dropout, self.b_rate_ratio)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "LoraAdapter | ExtendedLora | EmbeddingLora":
        """From the kohya or LyCORIS layout, with what peft and LyCORIS add. No alpha, and alpha 0, mean alpha = rank."""
        from ..shared.sites import is_embedding
        from . import embedding
        from .adapter import read_pair
        from .extended import extended

        if BASE in tensors:
            embedding.refuse_other_base(site, tensors[BASE])
        if is_embedding(site):
            return embedding.read(site, tensors)
        return extended(site, read_pair(site, tensors), tensors)

    @classmethod
    def stored(cls, site: "Site", tensors: "Mapping[str, Described]", constants: Mapping[str, float]) -> "PairForm | None":
        """A plain pair at a Linear or a convolution."""
        if not tensors.keys() <= _PLAIN or not constants.keys() <= {ALPHA}:
            return None
        from .adapter import stored

        return stored(site, tensors, constants.get(ALPHA, 0.0))

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """Rank and alpha; of half a pair, nothing but that it is one."""
        return read_pair(shapes, scalars) if MAGNITUDE not in shapes else None

    @classmethod
    def weight_shape(cls, shapes: Shapes) -> tuple[int, ...]:
        """By both sides of the pair."""
        return pair_weight_shape(shapes) if MAGNITUDE not in shapes else ()

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """kohya's own module, or that of LyCORIS where the scale is rank-stabilized. A file of PiSSA has twice the rank."""
        rank, alpha = rank_and_alpha(values)
        if values.get("init") == "pissa":
            rank, alpha = 2 * rank, 2 * alpha  # the first pair is taken off beside the trained one
        ratio = values.get("b_rate_ratio", 1.0)
        faster = {} if ratio == 1 else {"loraplus_lr_ratio": str(ratio)}
        if not values.get("rank_stabilized"):
            return Network(KOHYA, rank, alpha, faster)
        return Network(LYCORIS, rank, alpha, {"algo": "lora", "rs_lora": "True", **faster})

    @classmethod
    def in_peft(cls, adapters: Mapping[str, "Adapter"]) -> PeftForm:
        """Its own first method, with the bias of the second half at all sites or at none, and without a sparse rest."""
        states = {path: one.state() for path, one in adapters.items()}
        biased = all(UP_BIAS in state for state in states.values())
        for path, state in states.items():
            if more := sorted(state.keys() & EXTRAS - {UP_BIAS if biased else ""}):
                others = "" if biased or UP_BIAS not in more else ", which peft has at all sites or at none"
                raise UserError(f"{path} has {', '.join(more)} beside its pair{others}; take the layout 'kohya'")
        sites = {path: own_pair_in_peft(adapter.site, states[path]) for path, adapter in adapters.items()}
        return PeftForm("LORA", "lora_alpha", sites, {"lora_bias": True} if biased else {})

    def dropped(self) -> float:
        """The dropout."""
        return self.dropout


def own_pair_in_peft(site: "Site", state: Mapping[str, "Tensor"]) -> PeftSite:
    """Say a pair, with its bias, or that of an embedding, as peft keeps them.

    Args:
        site: The module that it sits on.
        state: The tensors of the adapter, by suffix.

    Returns:
        Its tensors by peft's names, rank and alpha.
    """
    from ..shared.sites import is_embedding

    pair = pair_in_peft(state)
    if UP_BIAS in state:
        return PeftSite({**pair.tensors, "lora_B.bias": state[UP_BIAS]}, pair.rank, pair.alpha)
    if not is_embedding(site):
        return pair
    turned = {"lora_embedding_A": state[UP].t().contiguous(), "lora_embedding_B": state[DOWN].t().contiguous()}
    return PeftSite(turned, pair.rank, pair.alpha)


def pair_in_peft(state: Mapping[str, "Tensor"]) -> PeftSite:
    """Say a pair as peft keeps it.

    Args:
        state: The tensors of an adapter, by suffix.

    Returns:
        Its tensors by peft's names, rank and alpha.
    """
    pair = {"lora_A.weight": state[DOWN], "lora_B.weight": state[UP]}
    return PeftSite(pair, len(state[DOWN]), float(state[ALPHA]))


def read_pair(shapes: Shapes, scalars: Scalars) -> Values | None:
    """Tell rank and alpha of a pair from a header; one half suffices to know it.

    Args:
        shapes: Of the tensors of one site.
        scalars: The values of the constants.

    Returns:
        The hyper-parameters; None where there is no pair.
    """
    return read_rank(side(shapes, DOWN, 0), scalars) if DOWN in shapes or UP in shapes else None


def pair_weight_shape(shapes: Shapes) -> tuple[int, ...]:
    """Tell the shape of the weight that a pair changes.

    Args:
        shapes: Of the tensors of one site.

    Returns:
        (out, in, ...); () where it is no whole pair.
    """
    down, up = shapes.get(DOWN), shapes.get(UP)
    if not down or not up:
        return ()
    core = shapes.get(MID)  # of the Tucker form, which has the kernel
    return (up[0], *down[1:]) if core is None else (up[0], *down[1:2], *core[2:])
