"""Triton kernels for what a frozen UNet spends its time on beside products: group norms with SiLU, and gated units.

Each reads and writes memory once where torch does it several times, computes in float32, and keeps for backward
only what it read. Sums are made in a fixed order. Import it only where Triton is installed.
"""

# ruff: noqa: ANN001, ANN202 -- Triton reads the annotations of its functions, and knows those of numbers alone

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _CHANNELS = 64, 64  # of a tile
_ELEMENTS = 1024


@triton.jit
def _tile(x, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Numbers of one tile of (images, rows, channels), their places and which of them are there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = (row < rows)[:, None] & (channel < channels)[None, :]
    place = (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * channels + channel[None, :]
    return tl.load(x + place, mask=there, other=0.0).to(tl.float32), place, there, channel


@triton.jit
def _put_sums(sums, first, second, channel, channels):
    """Two numbers per channel of a tile, in (images, tiles, 2, channels)."""
    place = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + channel
    tl.store(sums + place, first, mask=channel < channels)
    tl.store(sums + place + channels, second, mask=channel < channels)


@triton.jit
def _normal(x, channel, channels, weight, bias, stats, WIDTH: tl.constexpr):
    """Of a tile: the numbers as their group's mean and deviation make them, the weight, and what the norm gives."""
    there = channel < channels
    group = tl.program_id(2) * (channels // WIDTH) + channel // WIDTH
    mean, inverse = tl.load(stats + 2 * group, mask=there, other=0.0), tl.load(stats + 2 * group + 1, mask=there, other=0.0)
    w = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    hat = (x - mean[None, :]) * inverse[None, :]
    return hat, w, inverse, hat * w[None, :] + b[None, :]


@triton.jit
def _moments(x, sums, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared deviations of each channel of a tile."""
    value, _, there, channel = _tile(x, rows, channels, ROWS, CHANNELS)
    count = tl.minimum(rows - tl.program_id(0) * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(value, 0) / count
    away = tl.where(there, value - mean[None, :], 0.0)
    _put_sums(sums, mean, tl.sum(away * away, 0), channel, channels)


@triton.jit
def _group_stats(
    sums, stats, rows, channels, tiles, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    TILES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Mean and inverse deviation of a group, from those of its tiles (Chan et al. 1983)."""
    group, image = tl.program_id(0), tl.program_id(1)
    tile, own = tl.arange(0, TILES), tl.arange(0, PADDED)
    there = (tile < tiles)[:, None] & (own < WIDTH)[None, :]
    place = (image * tiles + tile[:, None]) * 2 * channels + group * WIDTH + own[None, :]
    means = tl.load(sums + place, mask=there, other=0.0)
    squares = tl.load(sums + place + channels, mask=there, other=0.0)
    counts = tl.where(there, tl.minimum(rows - tile * ROWS, ROWS).to(tl.float32)[:, None], 0.0)
    total = rows * 1.0 * WIDTH
    mean = tl.sum(tl.sum(counts * means, 1), 0) / total
    away = means - mean
    variance = tl.sum(tl.sum(squares + counts * away * away, 1), 0) / total
    where = stats + 2 * (image * tl.num_programs(0) + group)
    tl.store(where, mean)
    tl.store(where + 1, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _apply(
    x, y, weight, bias, stats, rows, channels, WIDTH: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    value, place, there, channel = _tile(x, rows, channels, ROWS, CHANNELS)
    _, _, _, z = _normal(value, channel, channels, weight, bias, stats, WIDTH)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + place, z.to(y.dtype.element_ty), mask=there)


@triton.jit
def _before_silu(g, z, SILU: tl.constexpr):
    """The gradient to what the norm gave."""
    if SILU:
        s = tl.sigmoid(z)
        g = g * s * (1.0 + z * (1.0 - s))
    return g


@triton.jit
def _backward_sums(
    x, g, sums, weight, bias, stats, rows, channels, WIDTH: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each channel of a tile, the sums of weighted gradients, and of those times the normalized numbers."""
    value, place, there, channel = _tile(x, rows, channels, ROWS, CHANNELS)
    hat, w, _, z = _normal(value, channel, channels, weight, bias, stats, WIDTH)
    gradient = _before_silu(tl.load(g + place, mask=there, other=0.0).to(tl.float32), z, SILU) * w[None, :]
    _put_sums(sums, tl.sum(gradient, 0), tl.sum(tl.where(there, gradient * hat, 0.0), 0), channel, channels)


@triton.jit
def _group_sums(sums, means, rows, channels, tiles, WIDTH: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr):
    """The means over a group of what its tiles summed."""
    group, image = tl.program_id(0), tl.program_id(1)
    tile, own = tl.arange(0, TILES), tl.arange(0, PADDED)
    there = (tile < tiles)[:, None] & (own < WIDTH)[None, :]
    place = (image * tiles + tile[:, None]) * 2 * channels + group * WIDTH + own[None, :]
    total = rows * 1.0 * WIDTH
    where = means + 2 * (image * tl.num_programs(0) + group)
    tl.store(where, tl.sum(tl.sum(tl.load(sums + place, mask=there, other=0.0), 1), 0) / total)
    tl.store(where + 1, tl.sum(tl.sum(tl.load(sums + place + channels, mask=there, other=0.0), 1), 0) / total)


@triton.jit
def _backward_apply(
    x, g, to_x, means, weight, bias, stats, rows, channels, WIDTH: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    value, place, there, channel = _tile(x, rows, channels, ROWS, CHANNELS)
    hat, w, inverse, z = _normal(value, channel, channels, weight, bias, stats, WIDTH)
    gradient = _before_silu(tl.load(g + place, mask=there, other=0.0).to(tl.float32), z, SILU) * w[None, :]
    known = channel < channels
    group = tl.program_id(2) * (channels // WIDTH) + channel // WIDTH
    mean = tl.load(means + 2 * group, mask=known, other=0.0)
    along = tl.load(means + 2 * group + 1, mask=known, other=0.0)
    result = inverse[None, :] * (gradient - mean[None, :] - hat * along[None, :])
    tl.store(to_x + place, result.to(to_x.dtype.element_ty), mask=there)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor]:
    """The norm of ``x`` (images, channels, height, width), in channels-last order, and each group's mean and 1 / deviation.

    With ``silu``, SiLU of it. The second is (images, groups, 2) in float32.
    """
    images, channels, rows, grid = _sizes(x)
    width, tiles = channels // groups, grid[0]
    sums = torch.empty(images, tiles, 2, channels, device=x.device)
    stats = torch.empty(images, groups, 2, device=x.device)
    y = torch.empty_like(x)
    padded = {"TILES": triton.next_power_of_2(tiles), "PADDED": triton.next_power_of_2(width)}
    tile = {"ROWS": _ROWS, "CHANNELS": _CHANNELS}
    with torch.cuda.device_of(x):
        _moments[grid](x, sums, rows, channels, **tile)
        _group_stats[(groups, images)](sums, stats, rows, channels, tiles, eps, ROWS=_ROWS, WIDTH=width, **padded)
        _apply[grid](x, y, weight, bias, stats, rows, channels, WIDTH=width, SILU=silu, **tile)
    return y, stats


def group_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, silu: bool) -> Tensor:
    """The gradient to ``x``, from that to what ``group_norm`` gave; both in channels-last order."""
    images, channels, rows, grid = _sizes(x)
    groups = stats.shape[1]
    width, tiles = channels // groups, grid[0]
    sums, means = torch.empty(images, tiles, 2, channels, device=x.device), torch.empty_like(stats)
    to_x = torch.empty_like(x)
    padded = {"TILES": triton.next_power_of_2(tiles), "PADDED": triton.next_power_of_2(width)}
    how = {"WIDTH": width, "SILU": silu, "ROWS": _ROWS, "CHANNELS": _CHANNELS}
    with torch.cuda.device_of(x):
        _backward_sums[grid](x, gradient, sums, weight, bias, stats, rows, channels, **how)
        _group_sums[(groups, images)](sums, means, rows, channels, tiles, WIDTH=width, **padded)
        _backward_apply[grid](x, gradient, to_x, means, weight, bias, stats, rows, channels, **how)
    return to_x


def _sizes(x: Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    """Images, channels, rows, and the grid of tiles."""
    images, channels, height, width = x.shape
    rows = height * width
    return images, channels, rows, (triton.cdiv(rows, _ROWS), triton.cdiv(channels, _CHANNELS), images)


@triton.jit
def _half(x, width, count, ELEMENTS: tl.constexpr):
    """A stretch of both halves of rows (count, 2 * width), value and gate, their place and that in one half."""
    one = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    there = one < count
    place = one // width * 2 * width + one % width
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(x + place + width, mask=there, other=0.0).to(tl.float32)
    return value, gate, place, one, there


@triton.jit
def _gated(x, y, width, count, ELEMENTS: tl.constexpr):
    value, gate, _, one, there = _half(x, width, count, ELEMENTS)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + one, (value * gate * share).to(y.dtype.element_ty), mask=there)


@triton.jit
def _gated_backward(x, g, to_x, width, count, ELEMENTS: tl.constexpr):
    value, gate, place, one, there = _half(x, width, count, ELEMENTS)
    gradient = tl.load(g + one, mask=there, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(to_x + place, (gradient * gate * share).to(to_x.dtype.element_ty), mask=there)
    tl.store(to_x + place + width, (gradient * value * slope).to(to_x.dtype.element_ty), mask=there)


def geglu(x: Tensor) -> Tensor:
    """``value * gelu(gate)`` (Shazeer 2020) of a contiguous (..., 2 * width), whose halves they are."""
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    with torch.cuda.device_of(x):
        _gated[(triton.cdiv(y.numel(), _ELEMENTS),)](x, y, y.shape[-1], y.numel(), ELEMENTS=_ELEMENTS)
    return y


def geglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient to ``x``, from that to what ``geglu`` gave; both contiguous."""
    to_x = torch.empty_like(x)
    count = gradient.numel()
    with torch.cuda.device_of(x):
        _gated_backward[(triton.cdiv(count, _ELEMENTS),)](x, gradient, to_x, gradient.shape[-1], count, ELEMENTS=_ELEMENTS)
    return to_x
