"""A pair with what other programs add to it: a bias (peft's ``lora_bias``) and a sparse rest (LyCORIS' ``extract_diff``)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core.adapter import Site, float32_parameter
from ...core.errors import UserError
from ..shared.affine import WeightChange, applied, channels, weight_shape
from . import SPARSE, UP_BIAS
from .adapter import LoraAdapter


def extended(site: Site, pair: LoraAdapter, tensors: Mapping[str, Tensor]) -> "LoraAdapter | ExtendedLora":
    """Add to a pair what stands beside it.

    Args:
        site: The module that it will sit on.
        pair: The pair.
        tensors: Those of the site, by suffix.

    Returns:
        The pair itself where nothing does.

    Raises:
        UserError: A tensor is missing or does not fit the site.
    """
    bias, sparse = tensors.get(UP_BIAS), None
    outputs, *inputs = weight_shape(site)
    if bias is not None and bias.shape != (outputs,):
        raise UserError(f"{UP_BIAS} {tuple(bias.shape)} does not fit the {outputs} outputs of the site")
    if not tensors.keys().isdisjoint(SPARSE):
        sparse = _checked([tensors[name] for name in SPARSE], outputs, torch.Size(inputs).numel())
    return pair if bias is None and sparse is None else ExtendedLora(pair, bias, sparse)


def _checked(parts: list[Tensor], outputs: int, columns: int) -> list[Tensor]:
    """The parts of a sparse matrix. Raises UserError where they are none of the weight's size."""
    indices, values, size = parts
    if indices.is_floating_point() or size.tolist() != [outputs, columns] or indices.shape != (2, len(values.flatten())):
        shown = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(SPARSE, parts, strict=True))
        raise UserError(f"{shown} are no sparse matrix of {(outputs, columns)}")
    beyond = indices.long() >= torch.tensor([[outputs], [columns]])
    if bool((indices < 0).any() | beyond.any()):
        raise UserError(f"{SPARSE[0]} lie outside of a matrix of {(outputs, columns)}")
    return parts


class ExtendedLora(WeightChange):
    """A pair, a bias (out,) that is scaled as the pair is, and a sparse change of the weight, which is not scaled."""

    indices: Tensor | None
    sides: Tensor | None

    def __init__(self, pair: LoraAdapter, bias: Tensor | None, sparse: list[Tensor] | None) -> None:
        super().__init__()
        self.pair = pair
        self.bias = None if bias is None else float32_parameter(bias)
        self.values = None if sparse is None else float32_parameter(sparse[1].flatten())
        self.register_buffer("indices", None if sparse is None else sparse[0].clone(), persistent=False)
        self.register_buffer("sides", None if sparse is None else sparse[2].clone(), persistent=False)

    def bind(self, site: Site) -> None:
        """Bind the pair too."""
        super().bind(site)
        self.pair.bind(site)

    def sparse(self) -> Tensor | None:
        """The sparse change, of the weight's shape; None where there is none."""
        if self.values is None or self.indices is None:
            return None
        shape = weight_shape(self.site)
        flat = self.values.new_zeros(shape[0], torch.Size(shape[1:]).numel())
        rows, columns = self.indices.long()
        return flat.index_put((rows, columns), self.values, accumulate=True).view(shape)

    def change(self) -> Tensor:
        """The pair's change and the sparse one."""
        change, sparse = self.pair.change(), self.sparse()
        return change if sparse is None else change + sparse

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """What pair, bias and sparse change make of ``x``."""
        result, sparse = self.pair.residual(x, y, base), self.sparse()
        if sparse is not None:
            result = result + applied(self.site, x, sparse.to(x.dtype))
        return result if self.bias is None else result + channels(self.bias * self.pair.scale, y, self.site)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change, and the scaled bias."""
        return self.change(), None if self.bias is None else self.bias * self.pair.scale

    def state(self) -> dict[str, Tensor]:
        """The pair's, with peft's and LyCORIS' names beside."""
        more = dict(zip((*SPARSE, UP_BIAS), (self.indices, self.values, self.sides, self.bias), strict=True))
        return {**self.pair.state(), **{name: tensor for name, tensor in more.items() if tensor is not None}}
