"""What a LoRA and a PiSSA compute at a site."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Adapter, Described, Factors, LowRank, PairForm, Site, float32_parameter
from ...core.errors import UserError
from ...core.merge import dense_weight
from ...core.reduction import Truncation, reduced
from ...core.weight_change import change_of
from ..shared import sites
from ..shared.affine import WeightChange, read_alpha, single, weight_shape
from ..shared.hyper_parameters import ALPHA
from . import DOWN, MID, SINGULAR, UP

_EXACT = {torch.float32, torch.bfloat16, torch.float16}  # what float32 holds as it is


def fresh_pair(site: Site, rank: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    """Make a pair that changes nothing.

    Args:
        site: The module that it will sit on.
        rank: Of the pair.
        gaussian: Whether ``down`` is normal instead of uniform.

    Returns:
        A random ``down`` and an ``up`` of zeros.
    """
    outputs, *inputs = sites.weight_shape(site)
    down = torch.empty(rank, *inputs)
    if gaussian:
        nn.init.normal_(down, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return down, torch.zeros(outputs, rank)


def principal(site: Site, rank: int, alpha: float, dropout: float, b_rate_ratio: float) -> "PissaAdapter":
    """Make a fresh PiSSA.

    Args:
        site: The module that it will sit on.
        rank: Of the trained half.
        alpha: Of the trained half.
        dropout: The share of inputs that it does not see in training.
        b_rate_ratio: How many times the rate ``up`` is trained with.

    Returns:
        The adapter.

    Raises:
        UserError: The weight has no such rank.
    """
    down, up = principal_pair(site, rank, single(2 * alpha) / (2 * rank))
    return PissaAdapter(site, down, up, alpha, dropout, b_rate_ratio)


@torch.no_grad()
def principal_pair(site: Site, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Find the part of a weight with its largest singular values.

    Args:
        site: The module.
        rank: How many there are.
        scale: What the product of the pair is multiplied with.

    Returns:
        ``down`` and ``up``.

    Raises:
        UserError: The weight has no such rank.
    """
    weight = dense_weight(site)
    if rank > min(weight.flatten(1).shape):
        raise UserError(f"pissa takes the rank from the weight, and one of {tuple(weight.shape)} has no rank {rank}")
    left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return (root[:, None] * right[:rank]).view(rank, *weight.shape[1:]), left[:, :rank] * root


def read_pair(site: Site, tensors: Mapping[str, Tensor]) -> "LoraAdapter":
    """Read a pair. LyCORIS' Tucker form of a convolution (``lora_mid``, between two 1x1) becomes a usual one.

    Args:
        site: The module that it will sit on.
        tensors: Those of the site, by suffix.

    Returns:
        The adapter.

    Raises:
        UserError: It does not fit the site.
    """
    outputs, *inputs = weight_shape(site)
    if SINGULAR in tensors:
        tensors = without_singular_values(tensors, inputs)
    down, up = tensors[DOWN], tensors[UP].flatten(1)
    if MID in tensors:
        if tensors[MID].shape[:2] != (up.shape[1], len(down)):
            raise UserError(
                f"{MID} {tuple(tensors[MID].shape)} does not fit down {tuple(down.shape)} and up {tuple(up.shape)}"
            )
        down = torch.einsum("ij...,jn->in...", tensors[MID].float(), down.flatten(1).float())
    if down.ndim == 4 and len(inputs) == 1 and down.shape[2:] == (1, 1):
        down = down.flatten(1)  # a 1x1 convolution elsewhere is a Linear here
    if len(inputs) == 3 and down.ndim == 2:
        down = down[:, :, None, None]
    if list(down.shape[1:]) != inputs or tuple(up.shape) != (outputs, len(down)):
        raise UserError(
            f"down {tuple(down.shape)} and up {tuple(up.shape)} do not fit a {type(site).__name__} of {(outputs, *inputs)}"
        )
    return LoraAdapter(site, down, up, read_alpha(tensors, len(down)), 0.0)


def stored(site: Site, tensors: Mapping[str, Described], constant: float) -> PairForm | None:
    """Say how a file holds a pair.

    Args:
        site: The module that it will sit on.
        tensors: ``down`` (rank, in, ...), which may lack or have sizes of 1 behind the inputs, ``up`` (out, rank), likewise,
            and alpha, by suffix.
        constant: Alpha, where it is no tensor; 0 means the rank.

    Returns:
        The form; None where there is something about the pair that `read_pair` has to see to, or to refuse.
    """
    down, up = tensors.get(DOWN), tensors.get(UP)
    if down is None or up is None:
        return None
    convolution = isinstance(site, nn.Conv2d) and site.groups == 1 and site.padding_mode == "zeros"
    if not convolution and not isinstance(site, nn.Linear):
        return None
    return _form(weight_shape(site), down, up, tensors.get(ALPHA), constant)


@lru_cache(maxsize=1000)  # the sites of a network have few shapes
def _form(
    weight: tuple[int, ...], down: Described, up: Described, alpha: Described | None, constant: float
) -> PairForm | None:
    """See `stored`: the form of a pair at a weight of that shape."""
    if {down.dtype, up.dtype} - _EXACT or (alpha is not None and math.prod(alpha.shape) != 1):
        return None
    # Of 8 bits it is converted when it is read.
    narrow = alpha is not None and alpha.dtype.is_floating_point and alpha.dtype.itemsize == 1
    if narrow or min(math.prod(down.shape), math.prod(up.shape)) < 2 or len(up.shape) < 2:
        return None
    outputs, *inputs = weight
    (rank, *width), (rows, *ranks) = down.shape, up.shape
    flat = width == inputs[:1] if len(width) < len(inputs) else width[: len(inputs)] == inputs
    if not flat or math.prod(width) != math.prod(inputs) or rows != outputs or math.prod(ranks) != rank:
        return None
    told = None if alpha is None else ALPHA
    return PairForm(DOWN, UP, told, constant, (rank, *inputs), (rows, rank), _scale, _of_stored)


@lru_cache(maxsize=1000)
def _scale(alpha: float, rank: int) -> float | None:
    """What a pair is multiplied with; None where that is no finite number."""
    rounded = single(alpha or float(rank))
    return rounded / rank if math.isfinite(rounded) else None


def _of_stored(site: Site, down: Tensor, up: Tensor, alpha: float) -> "LoraAdapter":
    return LoraAdapter(site, down, up, alpha or float(len(down)), 0.0)


def without_singular_values(tensors: Mapping[str, Tensor], inputs: Sequence[int]) -> dict[str, Tensor]:
    """Bring the pair of an AdaLoRA, ``up @ diag(e) @ down``, to a LoRA's.

    See Zhang et al. 2023, https://arxiv.org/abs/2303.10512. peft keeps a convolution's ``down`` flat, and may have left a
    site no rank at all.

    Args:
        tensors: Those of the site, by suffix.
        inputs: The sides of the weight but the outputs.

    Returns:
        The tensors of a LoRA.

    Raises:
        UserError: There are not as many values as the pair has ranks.
    """
    down, values = tensors[DOWN], tensors[SINGULAR].flatten()
    rank = len(down)
    if len(values) != rank:
        raise UserError(f"{SINGULAR} {tuple(tensors[SINGULAR].shape)} does not fit down {tuple(down.shape)}")
    if rank == 0:
        return {DOWN: down.new_zeros(1, *inputs), UP: tensors[UP].new_zeros(len(tensors[UP]), 1)}
    down = values[:, None].float() * down.flatten(1).float()
    kept = {name: tensor for name, tensor in tensors.items() if name != SINGULAR}
    return {**kept, DOWN: down.view(rank, *inputs) if down.shape[1] == math.prod(inputs) else down}


class LoraAdapter(WeightChange):
    """The pair of one site: ``down`` (rank, in, ...), ``up`` (out, rank)."""

    def __init__(
        self, site: Site, down: Tensor, up: Tensor, alpha: float, dropout: float, b_rate_ratio: float = 1.0
    ) -> None:
        super().__init__()
        self.down = float32_parameter(down)
        self.up = float32_parameter(up)
        self.alpha = single(alpha)
        self.scale = self.alpha / len(down)
        self.dropout = dropout
        self.b_rate_ratio = b_rate_ratio
        self.geometry = (site.stride, site.padding, site.dilation) if isinstance(site, nn.Conv2d) else None
        if isinstance(site, nn.Conv2d) and site.padding_mode != "zeros":
            raise UserError(f"lora serves convolutions padded with zeros, not {site.padding_mode}")

    def pair(self) -> LowRank:
        """``down`` and ``up`` as a file holds them, without the scale."""
        return LowRank(self.down, self.up)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """``scale * up(down(x))``."""
        down, up = self.low_rank()
        hidden, up = self._hidden(x, down), up.to(x.dtype)
        return F.linear(hidden, up) if self.geometry is None else F.conv2d(hidden, up[:, :, None, None])

    def forward(self, x: Tensor, y: Tensor, strength: Tensor, base: Tensor) -> Tensor:
        """``y + strength * scale * up(down(x))``; strength and scale go to the small tensors, the sum into the product."""
        down, up = self.low_rank()
        hidden, up = self._hidden(x, down) * strength, up.to(x.dtype)
        if self.geometry is not None:
            return y + F.conv2d(hidden, up[:, :, None, None])
        return torch.addmm(y.reshape(-1, len(up)), hidden.reshape(-1, up.shape[1]), up.t()).view(y.shape)

    def low_rank_factors(self) -> Factors | None:
        """``down`` and ``up`` of a Linear; None for a convolution, and while inputs are dropped."""
        if self.geometry is not None or (self.dropout and self.training):
            return None
        return Factors(*self.pair(), self.scale)

    def _hidden(self, x: Tensor, down: Tensor) -> Tensor:
        """``down(x)``, of the rank's width, in the dtype of ``x``."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        down = down.to(x.dtype)
        if self.geometry is None:
            return F.linear(x, down)
        stride, padding, dilation = self.geometry
        return F.conv2d(x, down, None, stride, padding, dilation)

    def change(self) -> Tensor:
        """``scale * up @ down``, of the weight's shape."""
        down, up = self.low_rank()
        return (up @ down.flatten(1)).view(len(up), *down.shape[1:])

    def low_rank(self) -> LowRank:
        """The pair, with the scale in ``up``."""
        down, up = self.pair()
        return LowRank(down, up * self.scale)

    @torch.no_grad()
    def begin_as(self, other: Adapter) -> float | None:
        """Take over any change of the weight, at the rank that this pair has.

        A change of fewer ranks leaves the further rows of ``down`` as they were made and their columns of ``up`` at 0: it is
        the same change, and these ranks can learn. One of more ranks becomes the nearest of this rank.
        """
        try:
            change = change_of(other, self.site, "")
        except UserError:  # it is no change of the weight
            return None
        pair, error, whole = change.pair, 0.0, change.pair or change.matrix()
        if change.bias is not None or whole is None:
            return None
        if pair is None or len(pair.down) > len(self.down):
            found = reduced(whole, Truncation(len(self.down)))
            pair, error = found.pair, found.error
        filled = len(pair.down)
        self.down[:filled] = pair.down.view(filled, *self.down.shape[1:])
        self.up.zero_()
        self.up[:, :filled] = pair.up / self.scale
        return error

    def by_rate(self) -> dict[float, list[nn.Parameter]]:
        """``up`` apart where LoRA+ trains it faster."""
        return super().by_rate() if self.b_rate_ratio == 1 else {1.0: [self.down], self.b_rate_ratio: [self.up]}

    def state(self) -> dict[str, Tensor]:
        """The kohya layout; a convolution's ``up`` is 1x1."""
        down, up = self.pair()
        up = up if self.geometry is None else up[:, :, None, None]
        return {DOWN: down, UP: up, ALPHA: torch.tensor(self.alpha)}


class PissaAdapter(LoraAdapter):
    """A pair that starts as the principal part of the weight, and adds what training makes of it.

    The paper takes the first pair out of the base's weight. Here the base keeps its bits, and a frozen copy is taken off
    inside the adapter: ``up @ down - first_up @ first_down`` is ``(up - first_up) @ down + first_up @ (down - first_down)``,
    a pair of twice the rank, exactly 0 at first. That pair is what a file holds, an ordinary LoRA to every program. When it
    is loaded it is one here too: its own training starts from PiSSA only in the run that made it.
    """

    first_down: Tensor
    first_up: Tensor

    def __init__(
        self, site: Site, down: Tensor, up: Tensor, alpha: float, dropout: float, b_rate_ratio: float = 1.0
    ) -> None:
        super().__init__(site, down, up, alpha, dropout, b_rate_ratio)
        self.register_buffer("first_down", self.down.detach().clone(), persistent=False)
        self.register_buffer("first_up", self.up.detach().clone(), persistent=False)
        self.alpha = single(2 * alpha)  # that of twice the rank
        self.scale = self.alpha / (2 * len(down))

    def begin_as(self, other: Adapter) -> float | None:
        """Take over nothing: it begins with the principal part of the weight, which nothing else is."""
        return None

    def pair(self) -> LowRank:
        """The difference to the first pair."""
        down = torch.cat([self.down, self.down - self.first_down])
        return LowRank(down, torch.cat([self.up - self.first_up, self.first_up], 1))
