"""Regions of pictures: where strengths and prompts hold, as each site reads it at its own resolution."""

import copyreg
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError

Grid: TypeAlias = tuple[int, int]
"""Height and width of a map of features."""
_LEAST = 1e-6  # of a position: the share of a group that covers none, whose mean nobody reads
_NOTHING = -1e4
"""What is added to a score of attention for no weight: `exp` of it is 0, and it is finite in half precision."""


class Layout:
    """The regions of the pictures of a batch, in which strengths and prompts are mixed by their masks.

    Strengths of images are then those of regions: of each picture all its regions, one after the other.

    Args:
        masks: (pictures, regions, height, width) in pixels, from 0 to 1; at each pixel those of a picture sum to 1.
        latents: Height and width of the latents.
        networks: The networks that compute the pictures.
        groups: For each picture the group of each region, counted from 0; regions of one group are normalized together. By
            default all of a picture are.

    Attributes:
        count: Regions of a picture.
        pictures: Pictures of the batch.
        isolated: Of each picture, whether its regions attend to themselves alone.
        norm_groups: How many groups of regions are normalized each by itself; 1 where all are together, as without regions.
        shown: The numbers of those regions that any picture has.
        ring: Where a convolution runs over the edges of a map, which meet: along height and width, where the map begins in
            what it gives, and how long it is. None elsewhere.
    """

    def __init__(
        self,
        masks: Tensor,
        latents: Grid,
        networks: Sequence[nn.Module] = (),
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.masks = masks.float()
        self.networks = tuple(networks)
        self.pictures, self.count = masks.shape[:2]
        self.isolated = (False,) * self.pictures
        self.ring: tuple[tuple[int, int], tuple[int, int]] | None = None
        there = (self.masks > 0).any(0).flatten(1).any(1).tolist()
        self.shown = tuple(number for number, any_picture in enumerate(there) if any_picture)
        self._reads_text = False
        self._groups = None if groups is None else tuple(tuple(own) for own in groups)
        self.norm_groups = 1 + max((max(own) for own in groups or ()), default=0)
        self._maps: dict[Grid, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        self._scores: dict[int, Tensor] = {}
        grid = latents
        while grid not in self._maps:  # each block of a UNet halves the sides, rounded up
            self._maps[grid] = found = F.interpolate(self.masks, grid, mode="area")
            self._tokens.setdefault(grid[0] * grid[1], found.flatten(2).transpose(1, 2).contiguous())
            grid = -(-grid[0] // 2), -(-grid[1] // 2)
        for count, shares in self._tokens.items():
            self._scores[count] = shares.log().clamp(min=_NOTHING).transpose(1, 2).contiguous()
        self.areas = self.masks.mean((2, 3))
        by_group = self.norm_groups > 1
        self._normed = {size: self._grouped(own).flatten(2) for size, own in self._maps.items()} if by_group else {}
        self._weights = {size: _weighed(own) for size, own in self._normed.items()}

    def _grouped(self, masks: Tensor) -> Tensor:
        """What groups cover of a map, (pictures, groups, height, width), of what regions do."""
        found = masks.new_zeros(len(masks), self.norm_groups, *masks.shape[2:])
        for number, groups in enumerate(self._groups or ()):
            found[number].index_add_(0, torch.tensor(groups, device=masks.device), masks[number])
        return found

    @property
    def signature(self) -> tuple[object, ...]:
        """What a recording depends on, apart from the numbers of the masks."""
        return (tuple(self.masks.shape), tuple(self._maps), self.isolated, self.shown, self._groups)

    def _tensors(self) -> list[Tensor]:
        maps = (self._maps, self._tokens, self._scores, self._normed, self._weights)
        return [self.masks, self.areas, *(one for own in maps for one in own.values())]

    def copied(self) -> "Layout":
        """Make a layout of the same masks, which lie elsewhere.

        Returns:
            The other.
        """
        made = Layout(self.masks.clone(), next(iter(self._maps)), groups=self._groups)
        made.isolated = self.isolated
        return made

    def take(self, other: "Layout") -> None:
        """Take over the masks of another layout of the same signature, each where it lies.

        Args:
            other: The other.
        """
        for own, theirs in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(theirs)

    @property
    def columns(self) -> int:
        """Regions of all pictures."""
        return self.pictures * self.count

    def repeats(self, rows: int) -> int:
        """Count how often guidance repeats the pictures in a batch.

        Args:
            rows: Of the batch.

        Returns:
            1, 2 or 3.

        Raises:
            UserError: It is no batch of these pictures.
        """
        repeats, rest = divmod(rows, self.pictures)
        if rest or repeats not in (1, 2, 3):
            raise UserError(f"there are regions for {self.pictures} pictures, but the batch holds {rows}")
        return repeats

    def on_tokens(self, positions: int) -> Tensor:
        """Give the masks at the positions of attention.

        Args:
            positions: How many there are.

        Returns:
            (pictures, positions, regions), float32.

        Raises:
            UserError: No resolution of the network has so many.
        """
        found = self._tokens.get(positions)
        if found is None:
            raise UserError(
                f"a layer of the network sees {positions} positions, and the regions are known for"
                f" {', '.join(map(str, self._tokens))}: it is no UNet of diffusers as it comes, so leave regions away"
            )
        return found

    def scores(self, positions: int) -> Tensor:
        """Give what is added to scores of attention: the logarithms of the masks, by which it weighs what it reads.

        Args:
            positions: How many there are.

        Returns:
            (pictures, regions, positions), float32; 0 of pictures whose regions attend to all of them.

        Raises:
            UserError: As `on_tokens`.
        """
        self.on_tokens(positions)
        found = self._scores[positions]
        if all(self.isolated):
            return found
        return torch.stack(
            [one if alone else torch.zeros_like(one) for one, alone in zip(found, self.isolated, strict=True)]
        )

    def on_map(self, height: int, width: int) -> Tensor:
        """Give the masks at the resolution of a map.

        Args:
            height: Of the map.
            width: Of the map.

        Returns:
            (pictures, regions, height, width), float32.
        """
        (top, own_height), (left, own_width) = self.ring or ((0, height), (0, width))
        found = self._maps.get((own_height, own_width))
        found = F.interpolate(self.masks, (own_height, own_width), mode="area") if found is None else found
        if (own_height, own_width) == (height, width):
            return found
        beyond = (left, width - left - own_width, top, height - top - own_height)
        return F.pad(found, beyond, mode="circular")

    def spread(self, values: Tensor, y: Tensor) -> Tensor:
        """Mix the strengths of regions by their masks, as they multiply an output.

        What has no position, as what a block is told of the time, has the mean by areas. Of what is read of prompts, each
        region has its own rows.

        Args:
            values: (pictures * regions, k).
            y: The output, (batch, channels, height, width), (batch, positions, channels) or (batch, channels); k is 1, or
                the number of channels.

        Returns:
            What broadcasts against ``y``, in its dtype.

        Raises:
            UserError: They are strengths of something else, or as `on_tokens`.
        """
        if len(values) != self.columns:
            raise UserError(f"there are strengths for {len(values)} images, but the pictures have {self.columns} regions")
        if self._reads_text:
            return values.repeat(len(y) // self.columns, 1).to(y.dtype)[:, None]
        each = values.float().view(self.pictures, self.count, -1)
        if y.ndim == 4:
            found = torch.einsum("prhw,prk->pkhw", self.on_map(*y.shape[2:]), each)
        elif y.ndim == 3:
            found = self.on_tokens(y.shape[1]) @ each
        else:
            found = torch.einsum("pr,prk->pk", self.areas, each)
        return found.repeat(self.repeats(len(y)), *[1] * (found.ndim - 1)).to(y.dtype)

    def normalized(self, x: Tensor, norm: nn.GroupNorm, shift: Tensor | None = None, *, plain: bool = False) -> Tensor:
        """Normalize a map, each group of regions by the mean and variance of its own positions, mixed by their masks.

        Adapters of subjects change the statistics of a picture: where one half is flat and dark, the other would be
        normalized as if it were too, and come apart.

        Args:
            x: (batch, channels, height, width).
            norm: How: its groups of channels, each with a mean and a variance, and its weight and bias.
            shift: Added to ``x`` first, (batch, channels).
            plain: Whether weight and bias are left out.

        Returns:
            Of the shape and dtype of ``x``.

        Raises:
            UserError: As `repeats`.
        """
        repeats, size = self.repeats(len(x)), (x.shape[2], x.shape[3])
        known = size in self._normed
        masks = self._normed[size] if known else self._grouped(self.on_map(*size)).flatten(2)
        shares = (self._weights[size] if known else _weighed(masks)).repeat(repeats, 1, 1)[:, None]
        masks = masks.repeat(repeats, 1, 1)[:, None]  # (batch, 1, groups of regions, positions)
        each = x.to(torch.promote_types(x.dtype, torch.float32))
        each = each if shift is None else each + shift[:, :, None, None]
        each = each.unflatten(1, (norm.num_groups, -1)).flatten(3)
        # Of what lies at one position first: squares of means that lie far apart would drown a small variance. And sums
        # in place of products of matrices, which autocast and TF32 would round.
        middle = each.mean(2)  # (batch, groups of channels, positions)
        varied = (each - middle[:, :, None]).square_().mean(2)
        mean = (middle[:, :, None] * shares).sum(3, keepdim=True)
        off = (middle[:, :, None] - mean).square() + varied[:, :, None]
        scale = (off * shares).sum(3, keepdim=True).add(norm.eps).rsqrt()
        factor, less = (scale * masks).sum(2), (mean * scale * masks).sum(2)
        found: Tensor = (each * factor[:, :, None]).sub_(less[:, :, None]).unflatten(3, size).flatten(1, 2)
        if norm.affine and not plain:
            found.mul_(norm.weight[:, None, None]).add_(norm.bias[:, None, None])
        return found.to(x.dtype)

    def by_region(self, told: Tensor) -> Tensor:
        """Part what attention is told into rows, one for each region.

        Args:
            told: (batch, regions * tokens, width): for each picture the prompts of its regions, one after the other.

        Returns:
            (batch * regions, tokens, width).
        """
        return told.reshape(len(told) * self.count, -1, told.shape[-1])

    @contextmanager
    def reading_text(self) -> Iterator[None]:
        """Let the strengths of sites be those of rows of `by_region` inside.

        Yields:
            Once.
        """
        self._reads_text = True
        try:
            yield
        finally:
            self._reads_text = False


def _weighed(masks: Tensor) -> Tensor:
    """How much each position counts in a mean over what masks cover, (pictures, groups, positions)."""
    return masks / masks.sum(2, keepdim=True).clamp(min=_LEAST)


class RegionalNorm(nn.GroupNorm):
    """A group norm that normalizes regions each by itself, in a thread that draws pictures in which they are apart."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, channels, ...), normalized, multiplied by the weight, with the bias added."""
        found = self.by_region(input)
        return super().forward(input) if found is None else found

    def by_region(self, x: Tensor, shift: Tensor | None = None, *, plain: bool = False) -> Tensor | None:
        """Normalize regions each by itself.

        Args:
            x: (batch, channels, height, width).
            shift: Added to ``x`` first, (batch, channels).
            plain: Whether weight and bias are left out.

        Returns:
            Of the same shape; None where there are no regions that are normalized apart.
        """
        layout = None if torch.compiler.is_compiling() else _present.layout
        if layout is None or layout.norm_groups == 1 or x.ndim != 4:
            return None
        return layout.normalized(x, self, shift, plain=plain)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy, or a file, that is made while pictures are drawn holds the norm as it is without regions.
        return copyreg.__newobj__, (nn.GroupNorm,), self.__getstate__()  # type: ignore[attr-defined, no-untyped-call]


class _Present(threading.local):
    layout: Layout | None = None


_present = _Present()


def present() -> Layout | None:
    """Tell in which regions the present thread computes pictures.

    Returns:
        Their layout; None where pictures have no regions.
    """
    return _present.layout


@contextmanager
def using(layout: Layout | None) -> Iterator[None]:
    """Compute pictures with regions inside, in this thread.

    Args:
        layout: The regions; None for none.

    Yields:
        Once.
    """
    before, _present.layout = _present.layout, layout
    try:
        yield
    finally:
        _present.layout = before
