"""DoRA: direction and magnitude of the weight apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import Adapter, Method, Site, float32_parameter
from ..core.errors import UserError
from ..core.merge import dense_weight
from .affine import ALPHA, applied, channels, check_rank, serves, stored_alpha, weight_shape, without_bias
from .lora import DOWN, MID, UP, LoraAdapter, check_dropout, fresh_pair, read_pair

_MAGNITUDE = "dora_scale"


@dataclass(frozen=True)
class Dora(Method, name="dora", suffixes=frozenset({DOWN, UP, MID, ALPHA, _MAGNITUDE})):
    """The weight becomes ``magnitude * (W + LoRA) / |W + LoRA|``, the norm being that of each output's row.

    ``rank``, ``alpha``, ``dropout`` and ``rank_stabilized`` are those of the LoRA. At a strength s the output is the
    base's plus s times the whole difference, as ComfyUI mixes it too. Files are those of LyCORIS; diffusers 0.42 leaves
    ``dora_scale`` out of them, with a warning.
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
        return DOWN in suffixes and _MAGNITUDE in suffixes

    def serves(self, site: Site) -> bool:
        """Linear layers and convolutions without groups."""
        return serves(site)

    def build(self, site: Site) -> "DoraAdapter":
        """A fresh LoRA, and the norms that the rows of the weight have."""
        down, up = fresh_pair(site, self.rank, gaussian=False)
        alpha = stored_alpha(self.rank, self.alpha, self.rank_stabilized)
        return DoraAdapter(LoraAdapter(site, down, up, alpha, self.dropout), norm(dense_weight(site), per_input=False))

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "DoraAdapter":
        """From the LyCORIS layout; a magnitude per input instead of per output is known by its shape."""
        outputs, inputs, *kernel = weight_shape(site)
        magnitude = tensors[_MAGNITUDE]
        shape, ones = list(magnitude.shape), [1] * len(kernel)
        if magnitude.numel() == outputs and shape[:1] == [outputs]:
            magnitude = magnitude.reshape(outputs, 1, *ones)
        elif magnitude.numel() == inputs and shape[:2] == [1, inputs]:
            magnitude = magnitude.reshape(1, inputs, *ones)
        else:
            raise UserError(f"{_MAGNITUDE} {tuple(shape)} fits neither the {outputs} outputs nor the {inputs} inputs")
        return DoraAdapter(read_pair(site, tensors), magnitude)


class DoraAdapter(Adapter):
    """A LoRA and the magnitudes, (out, 1, ...) or (1, in, ...) as in the weight's shape.

    The norm takes no part in the gradient, which the paper (section 4.3) found to cost nothing and to save memory.
    """

    def __init__(self, lora: LoraAdapter, magnitude: Tensor) -> None:
        super().__init__()
        self.lora = lora
        self.magnitude = float32_parameter(magnitude)
        self.per_input = len(magnitude) == 1 and magnitude.shape[1] > 1

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """Per output: the base's product and the LoRA's, scaled. Per input the scale is within the product."""
        if self.per_input:
            return applied(self.site, x, self.change().to(x.dtype))
        ratio = self.ratio()
        lora = self.lora.residual(x, y, base)
        return channels(ratio - 1, base, self.site) * without_bias(self.site, base) + channels(ratio, base, self.site) * lora

    def ratio(self) -> Tensor:
        """Magnitude over norm; exactly 1 in a fresh adapter."""
        with torch.no_grad():
            # The smallest normal number keeps a row of zeros, such as in a zero-initialized layer, from dividing 0 by 0.
            norms = norm(dense_weight(self.site) + self.lora.change(), self.per_input)
            norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return self.magnitude / norms

    def change(self) -> Tensor:
        """The change of the base's weight."""
        weight = dense_weight(self.site)
        return (weight + self.lora.change()) * self.ratio() - weight

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change of the base's own weight, whatever others added to it; no bias."""
        return self.change(), None

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout."""
        return {**self.lora.state(), _MAGNITUDE: self.magnitude}


def norm(weight: Tensor, per_input: bool) -> Tensor:
    """The norm of what leads to each output, (out, 1, ...), or from each input, (1, in, ...)."""
    rows = weight.transpose(0, 1) if per_input else weight
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1).view(-1, *[1] * (weight.ndim - 1))
    return norms.transpose(0, 1) if per_input else norms
