"""Bottleneck adapters: a small network between or beside the layers.

Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751): after attention and feed-forward, form ``sequential``, target
``outputs``. Pfeiffer et al. 2020 (https://arxiv.org/abs/2005.00247): after the feed-forward only, target ``ff-outputs``.
He et al. 2022 (https://arxiv.org/abs/2110.04366): beside whole sublayers, form ``parallel``, target ``sublayers``.
"""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter, Method, Site, float32_parameter
from ..core.errors import DamagedError, UserError

# The order is that of the numbers in files.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
FORMS = ("sequential", "parallel")

_DOWN, _DOWN_BIAS = "bottleneck_down", "bottleneck_down_bias"
_UP, _UP_BIAS = "bottleneck_up", "bottleneck_up_bias"
_KIND = "bottleneck_kind"  # form and activation by their place in FORMS and ACTIVATIONS, and the scale

# Whole sublayers by class, and where their output projection is: a sublayer gives what it takes, vectors of one width.
_SUBLAYERS = {
    "FeedForward": "net.2",
    "Attention": "to_out.0",
    "CLIPMLP": "fc2",
    "LlamaMLP": "down_proj",
}


@dataclass(frozen=True)
class Bottleneck(Method, name="bottleneck", suffixes=frozenset({_DOWN, _DOWN_BIAS, _UP, _UP_BIAS, _KIND})):
    """``y + scale * up(activation(down(h)))``: h is ``y`` in the sequential form, and the site's input in the parallel one.

    ``hidden`` is the width between, or else the outer width divided by ``reduction``, at least 1. Sites are Linear, whole
    feed-forwards and attentions, and convolutions, where down and up are 1x1. Biases are part of it.
    Parameters at a site, for widths in, hidden, out: hidden * (in + out + 1) + out.
    """

    target: ClassVar[str] = "outputs"

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
        return _DOWN in suffixes

    def serves(self, site: Site) -> bool:
        """Linear layers, whole sublayers, and convolutions; the parallel form needs an output the size of the input."""
        if _widths(site) is None:
            return False
        return self.form == "sequential" or not isinstance(site, nn.Conv2d) or _keeps_size(site)

    def build(self, site: Site) -> "BottleneckAdapter":
        """Down uniform as a Linear starts (Kaiming, a = sqrt 5), up and biases zero."""
        inside, outside = self._ends(site)
        hidden = self.hidden or max(1, int(inside / self.reduction))
        down = torch.empty(hidden, inside)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        weights = (down, torch.zeros(hidden), torch.zeros(outside, hidden), torch.zeros(outside))
        return BottleneckAdapter(site, weights, self.form, self.activation, self.scale)

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "BottleneckAdapter":
        """From keys of our own."""
        missing = [name for name in (_DOWN, _DOWN_BIAS, _UP, _UP_BIAS, _KIND) if name not in tensors]
        if missing:
            raise DamagedError(f"{missing[0]} is missing")
        form, activation, scale = _read_kind(tensors[_KIND])
        down, up = tensors[_DOWN], tensors[_UP]
        method = cls(hidden=len(down), form=form, activation=activation, scale=scale)
        if not method.serves(site):
            raise UserError(f"a {form} bottleneck cannot sit at this {type(site).__name__}")
        inside, outside = method._ends(site)
        shapes = ((len(down), inside), (len(down),), (outside, len(down)), (outside,))
        weights = (down, tensors[_DOWN_BIAS], up, tensors[_UP_BIAS])
        if tuple(tuple(tensor.shape) for tensor in weights) != shapes:
            raise UserError(f"down {tuple(down.shape)} and up {tuple(up.shape)} do not fit widths {inside} and {outside}")
        return BottleneckAdapter(site, weights, form, activation, scale)

    def _ends(self, site: Site) -> tuple[int, int]:
        """Widths of what ``down`` takes and of what ``up`` gives."""
        widths = _widths(site)
        if widths is None:
            raise UserError(
                f"bottleneck serves Linear, Conv2d, feed-forwards and attentions that return a tensor, not"
                f" {type(site).__name__}"
            )
        return (widths[0] if self.form == "parallel" else widths[1]), widths[1]


class BottleneckAdapter(Adapter):
    """The small network of one site: ``down`` (hidden, in), ``up`` (out, hidden) and their biases. Not an affine map."""

    own_layout = True

    def __init__(
        self, site: Site, weights: tuple[Tensor, Tensor, Tensor, Tensor], form: str, activation: str, scale: float
    ) -> None:
        super().__init__()
        self.down, self.down_bias, self.up, self.up_bias = map(float32_parameter, weights)
        self.form = form
        self.activation = activation
        self.scale = scale
        self.is_conv = isinstance(site, nn.Conv2d)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """Of ``y``, what earlier adapters made included, or of the site's input."""
        inner = ACTIVATIONS[self.activation](self._map(y if self.form == "sequential" else x, self.down, self.down_bias))
        return self._map(inner, self.up * self.scale, self.up_bias * self.scale)

    def state(self) -> dict[str, Tensor]:
        """The weights, and what kind of network they make."""
        kind = torch.tensor([FORMS.index(self.form), list(ACTIVATIONS).index(self.activation), self.scale])
        return {_DOWN: self.down, _DOWN_BIAS: self.down_bias, _UP: self.up, _UP_BIAS: self.up_bias, _KIND: kind}

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.conv2d(x, weight[:, :, None, None], bias) if self.is_conv else F.linear(x, weight, bias)


def _widths(site: Site) -> tuple[int, int] | None:
    """How many numbers a position has in the site's input and output; None for sites without a known width."""
    if isinstance(site, nn.Linear):
        return site.in_features, site.out_features
    if isinstance(site, nn.Conv2d):
        return site.in_channels, site.out_channels
    for cls in type(site).__mro__:  # a site that carries adapters is of a class derived from its own
        if cls.__name__ in _SUBLAYERS:
            output = dict(site.named_modules()).get(_SUBLAYERS[cls.__name__])
            return (output.out_features, output.out_features) if isinstance(output, nn.Linear) else None
    return None


def _keeps_size(site: nn.Conv2d) -> bool:
    if isinstance(site.padding, str):
        return site.padding == "same"
    spans = zip(site.stride, site.padding, site.dilation, site.kernel_size, strict=True)
    return all(stride == 1 and 2 * padding == dilation * (size - 1) for stride, padding, dilation, size in spans)


def _read_kind(kind: Tensor) -> tuple[str, str, float]:
    values = kind.flatten().tolist()
    activations = list(ACTIVATIONS)
    if len(values) != 3 or values[0] not in range(len(FORMS)) or values[1] not in range(len(activations)):
        raise UserError(f"{_KIND} {values} names no form and activation that are known")
    return FORMS[int(values[0])], activations[int(values[1])], float(values[2])
