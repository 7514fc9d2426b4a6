"""What the OFT of OneTrainer and of peft, and the BOFT of peft, compute at a site: the inputs turned."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from ...core.merge import dense_weight
from ...core.method import PeftForm, PeftSite
from ...core.weight_change import has_kernel
from ..shared.affine import applied, base_output, channels, single, weight_shape, without_bias
from ..shared.divisors import split
from . import BUTTERFLY, LIMIT, PACKED, SCALE, SCALED, TERMS, block_side


def fresh(site: Site, block_size: int) -> "InputRotation":
    """Make an adapter that turns nothing yet, as OneTrainer has it.

    Args:
        site: The layer.
        block_size: The largest size of a block.

    Returns:
        The adapter, with blocks of the largest divisor of the inputs that is not above that size.

    Raises:
        UserError: The inputs have no such divisor but 1.
    """
    features = _features(site)
    size, number = split(features, min(block_size, math.isqrt(features)))
    if size == 1:
        raise UserError(f"oft finds no blocks of 2 to {block_size} in {features} inputs")
    return InputRotation(site, torch.zeros(number, size * (size - 1) // 2))


def read(site: Site, tensors: Mapping[str, Tensor]) -> "InputRotation | InputButterfly":
    """Make an adapter from tensors as OneTrainer and peft have them.

    Args:
        site: The layer.
        tensors: By suffix.

    Returns:
        The adapter.

    Raises:
        DamagedError: A tensor is missing.
        UserError: The tensors do not fit the site, or the site has a kernel, with which peft's OFT is no rotation.
    """
    outputs, features = weight_shape(site)[0], _features(site)
    if PACKED not in tensors:
        blocks, factors = tensors[BUTTERFLY], tensors[SCALE]
        fits = blocks.ndim == 4 and blocks.shape[2] == blocks.shape[3] and blocks.shape[1] * blocks.shape[2] == features
        # The last of several rotations mixes halves of blocks over this many features.
        fits = fits and (len(blocks) == 1 or features % (blocks.shape[2] << (len(blocks) - 1)) == blocks.shape[2] % 2 == 0)
        if not fits or not len(blocks) or factors.numel() != outputs:
            shown = f"{BUTTERFLY} {tuple(blocks.shape)} and {SCALE} {tuple(factors.shape)}"
            raise UserError(f"{shown} do not fit the {features} inputs and {outputs} outputs of the site")
        return InputButterfly(blocks, factors.flatten())
    packed = tensors[PACKED]
    size = block_side(packed.shape[1]) if packed.ndim == 2 else 0
    if not size or features % size or len(packed) not in (1, features // size):
        raise UserError(f"{PACKED} {tuple(packed.shape)} does not fit the {features} inputs of the site")
    if TERMS not in tensors:
        return InputRotation(site, packed, scaled=tensors.get(SCALED))
    if has_kernel(site):
        raise UserError(
            f"{PACKED} stands at a convolution with a kernel, where peft's OFT adds up overlapping parts of its input, which"
            " is no rotation; merge it into the weights with peft"
        )
    limit = float(tensors[LIMIT]) if LIMIT in tensors else 0.0
    told = PeftRotation(int(tensors[TERMS]), single(limit))
    if told == ONETRAINER:  # peft's own default; of the negative, R is the transpose
        return InputRotation(site, -packed if isinstance(site, nn.Conv2d) else packed)
    return InputRotation(site, packed, told)


def _features(site: Site) -> int:
    """How many numbers an output is made of."""
    return torch.Size(weight_shape(site)[1:]).numel()


def in_peft(adapters: Mapping[str, Adapter]) -> PeftForm | None:
    """Bring adapters into the form that peft keeps them in.

    Args:
        adapters: By path. They are attached.

    Returns:
        The form; None where one turns outputs, which peft does not.

    Raises:
        UserError: peft has one configuration for all, and it would have to say two things.
    """
    forms = {path: one.in_peft() for path, one in adapters.items() if isinstance(one, (InputRotation, InputButterfly))}
    if len(forms) < len(adapters):
        return None
    found = {(kind, *options.items()) for kind, _, options in forms.values()}
    if len(found) > 1:
        raise UserError("peft has one kind and size of blocks for all sites, these have several; take the layout 'kohya'")
    kind, _, options = next(iter(forms.values()))
    return PeftForm(kind, "", {path: PeftSite(tensors, 0, 0.0) for path, (_, tensors, _) in forms.items()}, options)


class PeftRotation(NamedTuple):
    """How peft makes rotations. ``terms`` 0 is the Cayley transform, ``(1 - q) / (1 + q)``; else a series, see `_series`.

    ``limit`` above 0 keeps the norm of each generator within limit / sqrt(rows), which is peft's ``coft``.
    """

    terms: int
    limit: float


ONETRAINER = PeftRotation(5, 0.0)
"""How OneTrainer makes rotations."""


class InputRotation(Adapter):
    """``packed`` (blocks, pairs) generates the rotations of the inputs, or of all blocks alike where it has but one row.

    At a Linear the weight becomes ``W @ R.T``. At a convolution it becomes ``W @ R`` in OneTrainer, over the inputs with
    those of the kernel, and ``W @ R.T`` in peft. ``told`` is how peft makes R, and None where it is OneTrainer, which makes
    it as a series of 5 terms.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, site: Site, packed: Tensor, told: PeftRotation | None = None, scaled: Tensor | None = None) -> None:
        super().__init__()
        self.packed = float32_parameter(packed)
        self.size = block_side(packed.shape[1])
        self.number = _features(site) // self.size
        self.told = told
        self.scaled = None if scaled is None else scaled.dtype
        self.turned_back = told is None and isinstance(site, nn.Conv2d)
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    @property
    def divisor(self) -> float:
        """What OneTrainer's scaled OFT divides generators by: in its first version, whose mark is a number, another."""
        if self.scaled is None:
            return 1.0
        return 2 * math.sqrt(self.size - 1) if self.scaled == torch.bool else math.sqrt(self.packed.shape[1])

    def turn(self) -> Tensor:
        """Rotation minus identity, (blocks, size, size): exactly 0 in a fresh adapter."""
        above = self.packed.new_zeros(len(self.packed), self.size, self.size)
        each = torch.arange(len(above), device=above.device)[:, None]
        above = above.index_put((each, self.rows, self.columns), self.packed / self.divisor)
        generator = above - above.transpose(1, 2)
        terms, limit = self.told or ONETRAINER
        if limit > 0:
            norms = torch.linalg.vector_norm(generator, dim=(1, 2), keepdim=True) + 1e-12
            generator = generator * (limit / math.sqrt(len(generator)) / norms).clamp(max=1.0)
        turn = _series(generator, terms) if terms else _cayley(generator)
        return (turn.transpose(1, 2) if self.turned_back else turn).expand(self.number, -1, -1)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """What the weight makes of how the turned input differs from the input."""
        if has_kernel(self.site):
            return applied(self.site, x, self.change().to(x.dtype))
        blocks, turn = (self.number, self.size), self.turn().to(x.dtype)
        if isinstance(self.site, nn.Conv2d):
            moved = torch.einsum("nki...,kij->nkj...", x.unflatten(1, blocks), turn).flatten(1, 2)
        else:
            moved = torch.einsum("...ki,kij->...kj", x.unflatten(-1, blocks), turn).flatten(-2)
        return without_bias(self.site, base_output(self.site, moved))

    def change(self) -> Tensor:
        """The change of the base's weight."""
        own = dense_weight(self.site)
        blocks = own.flatten(1).unflatten(1, (self.number, self.size))
        return torch.einsum("okj,kij->oki", blocks, self.turn()).reshape(own.shape)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change of the base's own weight, whatever others added to it; no bias."""
        return self.change(), None

    def state(self) -> dict[str, Tensor]:
        """OneTrainer's names, and what peft's configuration says."""
        marks: dict[str, Tensor] = {}
        if self.scaled is not None:
            marks[SCALED] = torch.ones((), dtype=self.scaled)
        if self.told is not None:
            marks |= {TERMS: torch.tensor(float(self.told.terms)), LIMIT: torch.tensor(self.told.limit)}
        return {PACKED: self.packed, **marks}

    def in_peft(self) -> tuple[str, Mapping[str, Tensor], Mapping[str, float | bool]]:
        """Say it as peft does.

        Returns:
            Its kind, its tensors by peft's names, and its options.

        Raises:
            UserError: The site has a kernel.
        """
        if has_kernel(self.site):
            raise UserError("peft's OFT is no rotation at a convolution with a kernel; take the layout 'kohya'")
        terms, limit = self.told or ONETRAINER
        options = {
            "r": 0, "oft_block_size": self.size, "block_share": len(self.packed) < self.number,
            "use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5,
            "coft": limit > 0, "eps": limit or 6e-5,
        }  # fmt: skip
        packed = self.packed / self.divisor
        return "OFT", {PACKED: -packed if self.turned_back else packed}, options  # of the negative, R is the transpose


class InputButterfly(Adapter):
    """``blocks`` (factors, blocks, size, size) generates rotations that follow one another; ``factors`` (out,).

    The weight becomes ``factors * W @ R.T``. Each rotation but the first turns halves of blocks that lie far apart together:
    after as many as there can be, each input depends on all.
    """

    def __init__(self, blocks: Tensor, factors: Tensor) -> None:
        super().__init__()
        self.blocks = float32_parameter(blocks)
        self.factors = float32_parameter(factors)

    def turned(self, values: Tensor, transposed: bool = False) -> Tensor:
        """Turn the last axis.

        Args:
            values: (..., features).
            transposed: Whether by the transpose of the rotation, which turns back.

        Returns:
            ``values @ R``; exactly ``values`` in a fresh adapter.
        """
        halves = (self.blocks - self.blocks.transpose(2, 3)) / 2
        turns = _cayley(halves).to(values.dtype)
        number, size = turns.shape[1:3]
        for factor in range(len(turns)) if transposed else reversed(range(len(turns))):
            turn = turns[factor].transpose(1, 2) if transposed else turns[factor]
            apart = 2**factor
            # A single rotation is not permuted, and may have blocks of an odd size.
            if factor:
                values = values.unflatten(-1, (-1, 2, apart, size // 2)).transpose(-3, -2).flatten(-4)
            blocks = values.unflatten(-1, (number, size))
            values = (blocks + torch.einsum("...ki,kij->...kj", blocks, turn)).flatten(-2)
            if factor:
                values = values.unflatten(-1, (-1, apart, 2, size // 2)).transpose(-3, -2).flatten(-4)
        return values

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """What the weight makes of how the turned input differs from the input, and its outputs scaled."""
        if isinstance(self.site, nn.Conv2d):
            return applied(self.site, x, self.change().to(x.dtype))
        change = without_bias(self.site, base_output(self.site, self.turned(x) - x))
        scaled = channels(self.factors, base, self.site) * change
        return scaled + channels(self.factors - 1, base, self.site) * without_bias(self.site, base)

    def change(self) -> Tensor:
        """The change of the base's weight."""
        own = dense_weight(self.site)
        turned = self.turned(own.flatten(1), transposed=True)
        return (self.factors[:, None] * turned).view(own.shape) - own

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The change of the base's own weight, whatever others added to it; no bias."""
        return self.change(), None

    def state(self) -> dict[str, Tensor]:
        """peft's names."""
        return {BUTTERFLY: self.blocks, SCALE: self.factors}

    def in_peft(self) -> tuple[str, Mapping[str, Tensor], Mapping[str, float | bool]]:
        """Its kind, its tensors by peft's names, and its options."""
        row = isinstance(self.site, nn.Conv2d)
        tensors = {BUTTERFLY: self.blocks, SCALE: self.factors[None] if row else self.factors[:, None]}
        options = {"boft_block_size": self.blocks.shape[2], "boft_block_num": 0, "boft_n_butterfly_factor": len(self.blocks)}
        return "BOFT", tensors, options


def _cayley(generator: Tensor) -> Tensor:
    """``(1 - q) / (1 + q) - 1 = -2 q / (1 + q)``, of skew matrices; 1 + q is never singular."""
    identity = torch.eye(generator.shape[-1], device=generator.device)
    found: Tensor = torch.linalg.solve_ex(identity + generator, -2 * generator, left=False, check_errors=False)[0]
    return found


def _series(generator: Tensor, terms: int) -> Tensor:
    """The series of ``(1 + q) / (1 - q) - 1`` with its last power once, as peft ends it: at the third at least."""
    if terms < 3:
        return 2 * generator if terms == 2 else torch.zeros_like(generator)
    power, total, last = generator, 2 * generator, max(terms - 1, 3)
    for exponent in range(2, last + 1):
        power = power @ generator
        total = total + (power if exponent == last else 2 * power)
    return total
