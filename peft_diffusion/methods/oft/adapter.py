"""What an OFT computes at a site."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from ...core.merge import dense_weight
from ..shared.affine import channels, require, single, weight_shape, without_bias
from ..shared.divisors import split
from ..shared.hyper_parameters import ALPHA
from . import BLOCKS, RESCALE, Oft


def fresh(site: Site, method: Oft) -> "OftAdapter":
    """Make an adapter that turns nothing yet.

    Args:
        site: The layer.
        method: The largest size of a block, the constraint, and whether outputs are scaled too.

    Returns:
        The adapter, with blocks of the largest divisor of the outputs that is not above that size.

    Raises:
        UserError: The outputs have no such divisor but 1.
    """
    outputs = weight_shape(site)[0]
    size, number = split(outputs, min(method.block_size, math.isqrt(outputs)))
    if size == 1:
        raise UserError(f"oft finds no blocks of 2 to {method.block_size} in {outputs} outputs")
    factors = torch.ones(outputs) if method.rescale else None
    return OftAdapter(site, torch.zeros(number, size, size), factors, method.constraint)


def read(site: Site, tensors: Mapping[str, Tensor]) -> "OftAdapter":
    """Make an adapter from tensors in LyCORIS' layout.

    Args:
        site: The layer.
        tensors: By suffix.

    Returns:
        The adapter.

    Raises:
        UserError: The tensors do not fit the site, or are those of a butterfly OFT.
    """
    require(tensors, BLOCKS)
    blocks, outputs = tensors[BLOCKS], weight_shape(site)[0]
    if blocks.ndim != 3:
        raise UserError(f"{BLOCKS} {tuple(blocks.shape)} are those of a butterfly OFT (BOFT), which is not supported")
    if blocks.shape[1] != blocks.shape[2] or blocks.shape[0] * blocks.shape[1] != outputs:
        raise UserError(f"{BLOCKS} {tuple(blocks.shape)} do not fit the {outputs} outputs of the site")
    factors = tensors.get(RESCALE)
    if factors is not None and factors.numel() != outputs:
        raise UserError(f"{RESCALE} {tuple(factors.shape)} does not fit the {outputs} outputs of the site")
    return OftAdapter(site, blocks, factors, float(tensors[ALPHA]) if ALPHA in tensors else 0.0)


class OftAdapter(Adapter):
    """``blocks`` (number, size, size), of which ``blocks - blocks.T`` generates the rotations; ``factors`` (out, 1, ...)."""

    def __init__(self, site: Site, blocks: Tensor, factors: Tensor | None, constraint: float) -> None:
        super().__init__()
        outputs, *rest = weight_shape(site)
        self.blocks = float32_parameter(blocks)
        self.factors = None if factors is None else float32_parameter(factors.reshape(outputs, *[1] * len(rest)))
        self.alpha = single(constraint)
        self.limit = self.alpha * outputs

    def turn(self) -> Tensor:
        """Rotation minus identity, (number, size, size): exactly 0 in a fresh adapter. A row is what an output becomes."""
        generator = self.blocks - self.blocks.transpose(1, 2)
        if self.limit > 0:
            size = torch.linalg.vector_norm(generator) + 1e-8
            generator = generator * (self.limit / size).clamp(max=1.0)
        identity = torch.eye(generator.shape[1], device=generator.device)
        # Cayley: (1 + q) / (1 - q) - 1 = 2 q / (1 - q), and LyCORIS takes the transpose. 1 - q is never singular.
        rotation: Tensor = torch.linalg.solve_ex(identity - generator, 2 * generator, check_errors=False)[0]
        return rotation.transpose(1, 2)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """What the rotation makes of the weight's product, less that product."""
        product = without_bias(self.site, base)
        turn = self.turn().to(product.dtype)
        number, size, _ = turn.shape
        if isinstance(self.site, nn.Conv2d):
            blocks = product.reshape(len(product), number, size, -1)
            change = (turn @ blocks).view(product.shape)
        else:
            blocks = product.reshape(-1, number, size)
            change = torch.einsum("kmn,bkn->bkm", turn, blocks).reshape(product.shape)
        if self.factors is None:
            return change
        return channels(self.factors, base, self.site) * change + channels(self.factors - 1, base, self.site) * product

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change of the base's own weight, whatever others added to it; no bias."""
        own, turn = dense_weight(self.site), self.turn()
        change = torch.einsum("kmn,kn...->km...", turn, own.view(*turn.shape[:2], *own.shape[1:])).flatten(0, 1)
        return change if self.factors is None else self.factors * change + (self.factors - 1) * own, None

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout."""
        rescale = {} if self.factors is None else {RESCALE: self.factors}
        return {BLOCKS: self.blocks, **rescale, ALPHA: torch.tensor(self.alpha)}
