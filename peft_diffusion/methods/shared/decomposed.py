"""The magnitude of a weight apart from its direction: what makes DoRA of a LoRA, and LyCORIS offers on LoHa and LoKr.

See DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
"""

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from ...core.merge import dense_weight
from .affine import WeightChange, applied, channels, without_bias
from .hyper_parameters import MAGNITUDE
from .sites import is_embedding, looked_up, weight_shape


def decomposed(site: Site, inner: WeightChange) -> "Decomposed":
    """Make a fresh change with the magnitudes that the outputs have: together they change nothing.

    Args:
        site: The module that it will sit on.
        inner: The change of the direction.

    Returns:
        The adapter.
    """
    return Decomposed(inner, norm(dense_weight(site), per_input=False))


def read_decomposed(site: Site, inner: WeightChange, magnitude: Tensor) -> "Decomposed":
    """Make an adapter of a change and the magnitudes of a file.

    Args:
        site: The module that it will sit on.
        inner: The change of the direction.
        magnitude: Per output or, known by the shape, per input. At an embedding, as in peft, of each column.

    Returns:
        The adapter.

    Raises:
        UserError: The magnitudes fit neither.
    """
    outputs, inputs, *kernel = weight_shape(site)
    shape, ones = list(magnitude.shape), [1] * len(kernel)
    if is_embedding(site) and magnitude.numel() == inputs:
        magnitude = magnitude.reshape(1, inputs)
    elif is_embedding(site):
        raise UserError(f"{MAGNITUDE} {tuple(shape)} does not fit the {inputs} columns of the embedding")
    elif magnitude.numel() == outputs and shape[:1] == [outputs]:
        magnitude = magnitude.reshape(outputs, 1, *ones)
    elif magnitude.numel() == inputs and shape[:2] == [1, inputs]:
        magnitude = magnitude.reshape(1, inputs, *ones)
    else:
        raise UserError(f"{MAGNITUDE} {tuple(shape)} fits neither the {outputs} outputs nor the {inputs} inputs")
    return Decomposed(inner, magnitude)


class Decomposed(Adapter):
    """The weight becomes ``magnitude * (W + change) / |W + change|``; magnitudes are (out, 1, ...) or (1, in, ...).

    At a strength s the output is the base's plus s times the whole difference, as LyCORIS and ComfyUI mix it too.

    The norm takes no part in the gradient, which the paper (section 4.3) found to cost nothing and to save memory.
    """

    def __init__(self, inner: WeightChange, magnitude: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.magnitude = float32_parameter(magnitude)
        self.per_input = len(magnitude) == 1 and magnitude.shape[1] > 1

    def bind(self, site: Site) -> None:
        """Bind the change too."""
        super().bind(site)
        self.inner.bind(site)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """Per output: the base's product and the change's, scaled. Per input the scale is within the product."""
        if isinstance(self.site, nn.Embedding):
            return looked_up(self.site, x, self.change()).to(y.dtype)
        if self.per_input:
            return applied(self.site, x, self.change().to(x.dtype))
        ratio = self.ratio()
        change = self.inner.residual(x, y, base)
        scaled = channels(ratio, base, self.site) * change
        return channels(ratio - 1, base, self.site) * without_bias(self.site, base) + scaled

    def ratio(self) -> Tensor:
        """Magnitude over norm; exactly 1 in a fresh adapter."""
        with torch.no_grad():
            # The smallest normal number keeps a row of zeros, such as in a zero-initialized layer, from dividing 0 by 0.
            norms = norm(dense_weight(self.site) + self.inner.change(), self.per_input)
            norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return self.magnitude / norms

    def change(self) -> Tensor:
        """The change of the base's weight."""
        weight = dense_weight(self.site)
        return (weight + self.inner.change()) * self.ratio() - weight

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change of the base's own weight, whatever others added to it; no bias."""
        return self.change(), None

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout."""
        return {**self.inner.state(), MAGNITUDE: self.magnitude}


def norm(weight: Tensor, per_input: bool) -> Tensor:
    """Compute the norms of a weight.

    Args:
        weight: (out, in, ...).
        per_input: Whether of what comes from each input instead of what leads to each output.

    Returns:
        (out, 1, ...) or (1, in, ...).
    """
    rows = weight.transpose(0, 1) if per_input else weight
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1).view(-1, *[1] * (weight.ndim - 1))
    return norms.transpose(0, 1) if per_input else norms
