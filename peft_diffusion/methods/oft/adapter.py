"""What an OFT computes at a site."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from ...core.merge import dense_weight
from ..shared.affine import channels, single, weight_shape, without_bias
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
    factors = torch.ones(outputs) if method.rescale else None
    if method.butterfly:
        size, rotations = butterfly(outputs, method.block_size)
        blocks = torch.zeros(rotations, outputs // size, size, size)
        return ButterflyAdapter(site, blocks, factors, method.constraint)
    size, number = split(outputs, min(method.block_size, math.isqrt(outputs)))
    if size == 1:
        raise UserError(f"oft finds no blocks of 2 to {method.block_size} in {outputs} outputs")
    return OftAdapter(site, torch.zeros(number, size, size), factors, method.constraint)


def butterfly(outputs: int, block_size: int) -> tuple[int, int]:
    """Choose the blocks of a BOFT as LyCORIS does, and the smallest that there can be where it finds none.

    Args:
        outputs: Of the layer.
        block_size: The largest size of a block.

    Returns:
        The size, an even number of which the outputs have a power of two; and how many rotations then mix them all.

    Raises:
        UserError: The number of outputs is odd.
    """
    smallest = 2 * (outputs // (outputs & -outputs))  # the largest power of two taken out, but one
    if outputs % 2:
        raise UserError(f"a butterfly needs an even number of outputs, not {outputs}")
    size = smallest
    while 2 * size <= min(block_size, outputs):
        size *= 2
    return size, (outputs // size).bit_length()


def read(site: Site, tensors: Mapping[str, Tensor]) -> "OftAdapter":
    """Make an adapter from tensors in LyCORIS' layout.

    Args:
        site: The layer.
        tensors: By suffix.

    Returns:
        The adapter.

    Raises:
        UserError: The tensors do not fit the site.
    """
    blocks, outputs = tensors[BLOCKS], weight_shape(site)[0]
    number, size, other = blocks.shape[-3:] if blocks.ndim in (3, 4) else (0, 0, 0)
    fits = size == other and number * size == outputs
    if blocks.ndim == 4:  # the last rotation mixes halves of blocks over this many outputs
        fits = fits and size % 2 == 0 and len(blocks) > 0 and outputs % (size << (len(blocks) - 1)) == 0
    if not fits:
        raise UserError(f"{BLOCKS} {tuple(blocks.shape)} do not fit the {outputs} outputs of the site")
    factors = tensors.get(RESCALE)
    if factors is not None and factors.numel() != outputs:
        raise UserError(f"{RESCALE} {tuple(factors.shape)} does not fit the {outputs} outputs of the site")
    kind = ButterflyAdapter if blocks.ndim == 4 else OftAdapter
    return kind(site, blocks, factors, float(tensors[ALPHA]) if ALPHA in tensors else 0.0)


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
        """Rotation minus identity, (..., number, size, size): exactly 0 in a fresh adapter."""
        generator = self.blocks - self.blocks.transpose(-1, -2)
        if self.limit > 0:
            size = torch.linalg.vector_norm(generator) + 1e-8
            generator = generator * (self.limit / size).clamp(max=1.0)
        identity = torch.eye(generator.shape[-1], device=generator.device)
        # Cayley: (1 + q) / (1 - q) - 1 = 2 q / (1 - q). 1 - q is never singular.
        rotation: Tensor = torch.linalg.solve_ex(identity - generator, 2 * generator, check_errors=False)[0]
        return rotation

    def moved(self, product: Tensor) -> Tensor:
        """Compute by how much the rotation moves outputs.

        Args:
            product: What the weight makes of an input.

        Returns:
            The rotated outputs, less ``product``.
        """
        turn = self.turn().transpose(1, 2).to(product.dtype)  # LyCORIS takes the transpose
        number, size, _ = turn.shape
        if isinstance(self.site, nn.Conv2d):
            blocks = product.reshape(len(product), number, size, -1)
            return (turn @ blocks).view(product.shape)
        blocks = product.reshape(-1, number, size)
        return torch.einsum("kmn,bkn->bkm", turn, blocks).reshape(product.shape)

    def moved_weight(self, weight: Tensor) -> Tensor:
        """Compute by how much the rotation moves the rows of a weight.

        Args:
            weight: (out, in, ...).

        Returns:
            The rotated weight, less ``weight``.
        """
        turn = self.turn().transpose(1, 2)
        return torch.einsum("kmn,kn...->km...", turn, weight.view(*turn.shape[:2], *weight.shape[1:])).flatten(0, 1)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """What the rotation makes of the weight's product, less that product."""
        product = without_bias(self.site, base)
        change = self.moved(product)
        if self.factors is None:
            return change
        return channels(self.factors, base, self.site) * change + channels(self.factors - 1, base, self.site) * product

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change of the base's own weight, whatever others added to it; no bias."""
        own = dense_weight(self.site)
        change = self.moved_weight(own)
        return change if self.factors is None else self.factors * change + (self.factors - 1) * own, None

    def state(self) -> dict[str, Tensor]:
        """The LyCORIS layout."""
        rescale = {} if self.factors is None else {RESCALE: self.factors}
        return {BLOCKS: self.blocks, **rescale, ALPHA: torch.tensor(self.alpha)}


class ButterflyAdapter(OftAdapter):
    """``blocks`` (rotations, number, size, size): one after the other, each turns halves of blocks together that lie farther
    apart, so that after all of them each output depends on each."""

    def moved(self, product: Tensor) -> Tensor:
        """Outputs along the first axis, and back."""
        axis = 1 if isinstance(self.site, nn.Conv2d) else -1
        return self.moved_weight(product.movedim(axis, 0)).movedim(0, axis)

    def moved_weight(self, weight: Tensor) -> Tensor:
        """Each rotation of what the one before it made."""
        values, size = weight, self.blocks.shape[-1]
        for number, turn in enumerate(self.turn().to(weight.dtype)):
            half = 2**number * size // 2
            mixed = values.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            mixed = mixed + torch.einsum("kij,kj...->ki...", turn, mixed)
            values = mixed.flatten(0, 1).unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return values - weight
