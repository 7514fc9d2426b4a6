"""What a bottleneck computes at a site."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from . import ACTIVATIONS, DOWN, DOWN_BIAS, FORMS, KIND, UP, UP_BIAS, Bottleneck

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}

# Whole sublayers by class, and where their output projection is: a sublayer gives what it takes, vectors of one width.
_SUBLAYERS = {
    "FeedForward": "net.2",
    "Attention": "to_out.0",
    "CLIPMLP": "fc2",
    "LlamaMLP": "down_proj",
}


def serves(site: Site, form: str) -> bool:
    """Tell whether a small network of a form can sit at a module.

    Args:
        site: A module of a base.
        form: ``sequential`` reads the output of the site, ``parallel`` its input.

    Returns:
        Whether its widths are known, and its output has the size that the form needs.
    """
    if _widths(site) is None:
        return False
    return form == "sequential" or not isinstance(site, nn.Conv2d) or _keeps_size(site)


def fresh(site: Site, method: Bottleneck) -> "BottleneckAdapter":
    """Make a network that changes nothing: down uniform as a Linear starts (Kaiming, a = sqrt 5), up and biases zero.

    Args:
        site: The module that it will sit on.
        method: Its form and sizes.

    Returns:
        The adapter.
    """
    inside, outside = _ends(site, method.form)
    hidden = method.hidden or max(1, int(inside / method.reduction))
    down = torch.empty(hidden, inside)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    weights = (down, torch.zeros(hidden), torch.zeros(outside, hidden), torch.zeros(outside))
    return BottleneckAdapter(site, weights, method.form, method.activation, method.scale)


def read(site: Site, tensors: Mapping[str, Tensor]) -> "BottleneckAdapter":
    """Make an adapter from keys of our own.

    Args:
        site: The module that it will sit on.
        tensors: By suffix.

    Returns:
        The adapter.

    Raises:
        DamagedError: A tensor is missing.
        UserError: The tensors do not fit the site.
    """
    form, activation, scale = _read_kind(tensors[KIND])
    down, up = tensors[DOWN], tensors[UP]
    Bottleneck(hidden=len(down), form=form, activation=activation, scale=scale)  # refuses what none can have
    if not serves(site, form):
        raise UserError(f"a {form} bottleneck cannot sit at this {type(site).__name__}")
    inside, outside = _ends(site, form)
    shapes = ((len(down), inside), (len(down),), (outside, len(down)), (outside,))
    weights = (down, tensors[DOWN_BIAS], up, tensors[UP_BIAS])
    if tuple(tuple(tensor.shape) for tensor in weights) != shapes:
        raise UserError(f"down {tuple(down.shape)} and up {tuple(up.shape)} do not fit widths {inside} and {outside}")
    return BottleneckAdapter(site, weights, form, activation, scale)


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
        inner = _FUNCTIONS[self.activation](self._map(y if self.form == "sequential" else x, self.down, self.down_bias))
        return self._map(inner, self.up * self.scale, self.up_bias * self.scale)

    def state(self) -> dict[str, Tensor]:
        """The weights, and what kind of network they make."""
        kind = torch.tensor([FORMS.index(self.form), ACTIVATIONS.index(self.activation), self.scale])
        return {DOWN: self.down, DOWN_BIAS: self.down_bias, UP: self.up, UP_BIAS: self.up_bias, KIND: kind}

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.conv2d(x, weight[:, :, None, None], bias) if self.is_conv else F.linear(x, weight, bias)


def _ends(site: Site, form: str) -> tuple[int, int]:
    """Widths of what ``down`` takes and of what ``up`` gives."""
    widths = _widths(site)
    if widths is None:
        raise UserError(
            f"bottleneck serves Linear, Conv2d, feed-forwards and attentions that return a tensor, not {type(site).__name__}"
        )
    return (widths[0] if form == "parallel" else widths[1]), widths[1]


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
    if len(values) != 3 or values[0] not in range(len(FORMS)) or values[1] not in range(len(ACTIVATIONS)):
        raise UserError(f"{KIND} {values} names no form and activation that are known")
    return FORMS[int(values[0])], ACTIVATIONS[int(values[1])], float(values[2])
