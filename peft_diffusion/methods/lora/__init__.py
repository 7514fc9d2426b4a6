"""LoRA: a change of low rank.

Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

import math
from collections.abc import Mapping, Set
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

    from ...core.adapter import Adapter, Site
    from .adapter import LoraAdapter
    from .extended import ExtendedLora

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
SINGULAR = "lora_E"
"""Of peft's AdaLoRA: what stands between both halves of a pair, a diagonal."""

UP_BIAS = "lora_up.bias"
"""Of peft's ``lora_bias``: the bias of the second half, which is scaled as the pair is."""

SPARSE = ("bias_indices", "bias_values", "bias_size")
"""Of LyCORIS' ``extract_diff`` with ``use_bias``: what the pair leaves of the change of the weight, as a sparse matrix."""

EXTRAS = frozenset({SINGULAR, UP_BIAS, *SPARSE})
INITS = ("standard", "gaussian", "pissa")
PAIR_ALIASES = {
    "lora_A": DOWN, "lora_B": UP,
    "lora.down": DOWN, "lora.up": UP,
    "lora_down": DOWN, "lora_up": UP,
    "lora_linear_layer.down": DOWN, "lora_linear_layer.up": UP,
    "alpha": ALPHA,
}  # fmt: skip
"""What peft and diffusers, older scripts of diffusers, ComfyUI, and the oldest scripts call the tensors of a pair."""


@dataclass(frozen=True)
class Lora(Method, name="lora", suffixes=frozenset({DOWN, UP, MID, ALPHA}) | EXTRAS):
    """``y + alpha / rank * up(down(x))`` at a Linear or Conv2d; a convolution goes down with its own kernel, up with 1x1.

    ``alpha`` None means alpha = rank. ``dropout`` drops inputs of ``down`` while training. ``rank_stabilized`` scales by
    alpha / sqrt(rank). ``init`` is what training starts from:

    - ``standard``: down uniform as a Linear starts (Kaiming, a = sqrt 5), up zero, as in the paper's code;
    - ``gaussian``: down normal with deviation 1 / rank, up zero;
    - ``pissa``: the weight's largest singular values and vectors (Meng et al. 2024, https://arxiv.org/abs/2404.02948),
      see ``PissaAdapter``. Takes a singular value decomposition of each weight.

    ``b_rate_ratio`` times the learning rate is what ``up`` (the paper's B) is trained with: LoRA+ (Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354), which advises about 16, and a lower learning rate beside it; 1 is plain LoRA.
    """

    constants: ClassVar[frozenset[str]] = frozenset({ALPHA, SPARSE[0], SPARSE[2]})
    ranked: ClassVar[frozenset[str]] = frozenset({DOWN})
    by_output: ClassVar[frozenset[str]] = frozenset({UP, UP_BIAS})
    aliases: ClassVar[Mapping[str, str]] = {**PAIR_ALIASES, SINGULAR: SINGULAR, "lora_B.bias": UP_BIAS}

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: str = "standard"
    b_rate_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_rank(self.rank, self.alpha)
        check_dropout(self.dropout)
        if not 0 < self.b_rate_ratio < math.inf:
            raise UserError(f"b_rate_ratio must be above 0, not {self.b_rate_ratio}")
        if self.init not in INITS:
            raise UserError(f"init must be one of {', '.join(INITS)}, not {self.init!r}")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """A pair without the magnitude that would make it DoRA."""
        return DOWN in suffixes and MAGNITUDE not in suffixes

    def serves(self, site: "Site") -> bool:
        """Linear layers and convolutions without groups."""
        from ..shared.affine import serves

        return serves(site)

    def build(self, site: "Site") -> "LoraAdapter":
        """Make a fresh pair, or with PiSSA that of the largest singular values of the weight."""
        from .adapter import LoraAdapter, fresh_pair, principal

        alpha = stored_alpha(self.rank, self.alpha, self.rank_stabilized)
        if self.init == "pissa":
            return principal(site, self.rank, alpha, self.dropout, self.b_rate_ratio)
        down, up = fresh_pair(site, self.rank, self.init == "gaussian")
        return LoraAdapter(site, down, up, alpha, self.dropout, self.b_rate_ratio)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "LoraAdapter | ExtendedLora":
        """From the kohya or LyCORIS layout, with what peft and LyCORIS add. No alpha, and alpha 0, mean alpha = rank."""
        from .adapter import read_pair
        from .extended import extended

        return extended(site, read_pair(site, tensors), tensors)

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
        """Its own first method. peft has a word for the bias of the second half, and none for a sparse rest."""
        for path, one in adapters.items():
            if more := sorted(one.state().keys() & EXTRAS):
                raise UserError(f"{path} has {', '.join(more)} beside its pair; take the layout 'kohya'")
        return PeftForm("LORA", "lora_alpha", {path: pair_in_peft(one.state()) for path, one in adapters.items()})

    def dropped(self) -> float:
        """The dropout."""
        return self.dropout


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
