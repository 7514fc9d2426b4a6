"""Bottlenecks: a small network between or beside the layers.

Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751): after attention and feed-forward, form ``sequential``, target
``outputs``. Pfeiffer et al. 2020 (https://arxiv.org/abs/2005.00247): after the feed-forward only, target ``ff-outputs``.
He et al. 2022 (https://arxiv.org/abs/2110.04366): beside whole sublayers, form ``parallel``, target ``sublayers``.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.errors import UserError
from ...core.method import Method, Rates, Scalars, Shapes, Values
from ..shared.hyper_parameters import side

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Site
    from .adapter import BottleneckAdapter

# The orders are those of the numbers in files.
ACTIVATIONS = ("gelu", "relu", "silu")
FORMS = ("sequential", "parallel")

DOWN, DOWN_BIAS = "bottleneck_down", "bottleneck_down_bias"
UP, UP_BIAS = "bottleneck_up", "bottleneck_up_bias"
KIND = "bottleneck_kind"  # form and activation by their place in FORMS and ACTIVATIONS, and the scale


@dataclass(frozen=True)
class Bottleneck(Method, name="bottleneck", suffixes=frozenset({DOWN, DOWN_BIAS, UP, UP_BIAS, KIND})):
    """``y + scale * up(activation(down(h)))``: h is ``y`` in the sequential form, and the site's input in the parallel one.

    ``hidden`` is the width between, or else the outer width divided by ``reduction``, at least 1. Sites are Linear, whole
    feed-forwards and attentions, and convolutions, where down and up are 1x1. Biases are part of it.
    Parameters at a site, for widths in, hidden, out: hidden * (in + out + 1) + out.
    """

    target: ClassVar[str] = "outputs"
    constants: ClassVar[frozenset[str]] = frozenset({KIND})
    rates: ClassVar[Rates] = Rates(factor=3.0)

    hidden: int | None = None
    reduction: float = 8.0
    activation: str = "gelu"
    form: str = "sequential"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1, not {self.hidden}")
        if not 1 <= self.reduction < math.inf:
            raise UserError(f"reduction must be at least 1, not {self.reduction}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.form not in FORMS:
            raise UserError(f"form must be one of {', '.join(FORMS)}, not {self.form!r}")
        if not 0 < self.scale < math.inf:
            raise UserError(f"scale must be above 0, not {self.scale}")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By its own names."""
        return DOWN in suffixes

    @classmethod
    def needed(cls, suffixes: Set[str]) -> Sequence[str]:
        """All but the mask."""
        return (DOWN, DOWN_BIAS, UP, UP_BIAS, KIND)

    def serves(self, site: "Site") -> bool:
        """Linear layers, whole sublayers, and convolutions; the parallel form needs an output the size of the input."""
        from .adapter import serves

        return serves(site, self.form)

    def build(self, site: "Site") -> "BottleneckAdapter":
        """Down uniform as a Linear starts (Kaiming, a = sqrt 5), up and biases zero."""
        from .adapter import fresh

        return fresh(site, self)

    @classmethod
    def read(cls, site: "Site", tensors: Mapping[str, "Tensor"]) -> "BottleneckAdapter":
        """From keys of our own."""
        from .adapter import read

        return read(site, tensors)

    @classmethod
    def read_hyper_parameters(cls, shapes: Shapes, scalars: Scalars) -> Values | None:
        """The width between."""
        return {"hidden": side(shapes, DOWN, 0)} if cls.recognizes(shapes.keys()) else None
