"""Full: a whole change of weight and bias, as many numbers as the layer has.

What fine-tuning without an adapter learns, kept beside the base. Names are those of LyCORIS' ``full``, which ComfyUI's saver
and LyCORIS' extraction write too.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.method import LYCORIS, Method, Network, Rates, Shapes

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import FullAdapter

WEIGHT, BIAS = "diff", "diff_b"
NORM_WEIGHT = "w_norm"
"""LyCORIS' name at norms. With ``b_norm`` beside it a norm is read as BitFit's, which keeps the change of the weight too."""

SET_WEIGHT = "set_weight"
"""ComfyUI's name of a weight that takes the place of the base's (``comfy/lora.py``)."""


@dataclass(frozen=True)
class Full(Method, name="full", suffixes=frozenset({WEIGHT, BIAS, NORM_WEIGHT})):
    """``W + change`` at a Linear, Conv2d, GroupNorm, LayerNorm or Embedding; the bias, where there is one, changes too.

    Parameters: as many as weight and bias have, so that files are as large as the layers. Has no hyper-parameters.
    """

    by_output: ClassVar[frozenset[str]] = frozenset({WEIGHT, BIAS})
    whole: ClassVar[tuple[str, str]] = (WEIGHT, BIAS)
    aliases: ClassVar[Mapping[str, str]] = {WEIGHT: WEIGHT, BIAS: BIAS, SET_WEIGHT: WEIGHT}
    replacing: ClassVar[frozenset[str]] = frozenset({SET_WEIGHT})
    # Of four rates from 3e-5 to 1e-3 on the embedded base, in 60 steps of a style. On text, what fine-tuning usually takes.
    rates: ClassVar[Rates] = Rates(factor=0.3, text=2e-5, text_small=3e-4)

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """A change of the weight, or a norm's without one of its bias, and nothing beside it.

        Of a whole change beside a pair ComfyUI takes the one and A1111 the other, so that none can be meant by it.
        """
        return bool(suffixes & {WEIGHT, NORM_WEIGHT}) and suffixes <= cls.suffixes

    def serves(self, site: "Site") -> bool:
        """Linear layers, convolutions without groups, norms with a weight, and embeddings."""
        from .adapter import serves

        return serves(site)

    def build(self, site: "Site") -> "FullAdapter":
        """No change yet."""
        from .adapter import fresh

        return fresh(site)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "FullAdapter":
        """From LyCORIS' layout; a bias is added also where the layer has none, as LyCORIS and A1111 do."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def weight_shape(cls, shapes: Shapes) -> tuple[int, ...]:
        """That of the change, where it is a layer's."""
        shape = shapes.get(WEIGHT, ())
        return shape if len(shape) > 1 else ()

    @classmethod
    def network(cls, values: Mapping[str, Any]) -> Network:
        """LyCORIS' own, which has no rank."""
        return Network(LYCORIS, None, None, {"algo": "full"})
