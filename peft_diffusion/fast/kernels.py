"""Triton kernels of the fused base: norms and gates in one pass over memory each, in float32 inside.

Pictures are channels-last, (images, places, channels) in memory. Nothing is added up atomically, so results repeat bit for
bit. Imported where Triton is; ``lean.py`` says the same in torch.
"""

# ruff: noqa: ANN001, ANN202 -- Triton reads the annotations of its functions, and knows those of numbers alone

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_TILE = 4096  # numbers that a program holds at once
_WHOLE = 16384  # numbers of a group that one program holds whole, so that it reads them once
_PROGRAMS = 1024  # that fill a card: where there are more tiles than these, a program sums up several
# Numbers of the run: a kernel serves all of them. That of channels is not among these, as memory is read by its multiples.
_SIZES = ["PLACES", "GROUPS", "WIDTH", "LENGTH", "STRETCHES", "SHIFT_STEP", "TILES"]


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _gelu_parts(gate):
    """The normal distribution's share below ``gate``, and its density there."""
    below = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    return below, 0.3989422804014327 * tl.exp(-0.5 * gate * gate)


@triton.jit
def _shifted(x, shift, image, channel, here, SHIFT_STEP, SHIFTED: tl.constexpr):
    """``x`` and its image's shift, a number for each channel; the shifts of two images lie SHIFT_STEP apart."""
    if SHIFTED:
        x += tl.load(shift + image * SHIFT_STEP + channel, mask=here, other=0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["SHIFT_STEP"])
def _group_norm_whole(
    x, shift, weight, bias, y, mean, rstd, SHIFT_STEP, PLACES, CHANNELS, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    place, within = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    channel, here = group * WIDTH + within, within < WIDTH
    inside = (place < PLACES)[:, None] & here[None, :]
    at = image * PLACES * CHANNELS + place[:, None] * CHANNELS + channel[None, :]
    seen = _shifted(tl.load(x + at, mask=inside, other=0).to(tl.float32), shift, image, channel, here, SHIFT_STEP, SHIFTED)
    count = PLACES * WIDTH
    middle = tl.sum(tl.sum(tl.where(inside, seen, 0.0), 1), 0) / count
    away = tl.where(inside, seen - middle, 0.0)
    scale = 1 / tl.sqrt(tl.sum(tl.sum(away * away, 1), 0) / count + eps)
    factor = tl.load(weight + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    z = away * scale * factor[None, :] + offset[None, :]
    if SILU:
        z = z * _sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + tl.program_id(0), middle)
    tl.store(rstd + tl.program_id(0), scale)


@triton.jit(do_not_specialize=["SHIFT_STEP"])
def _group_norm_whole_back(
    dy, x, shift, weight, bias, mean, rstd, through, dx, SHIFT_STEP, PLACES, CHANNELS,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr, THROUGH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    place, within = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    channel, here = group * WIDTH + within, within < WIDTH
    inside = (place < PLACES)[:, None] & here[None, :]
    at = image * PLACES * CHANNELS + place[:, None] * CHANNELS + channel[None, :]
    seen = _shifted(tl.load(x + at, mask=inside, other=0).to(tl.float32), shift, image, channel, here, SHIFT_STEP, SHIFTED)
    middle, scale = tl.load(mean + tl.program_id(0)), tl.load(rstd + tl.program_id(0))
    factor = tl.load(weight + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    normal = tl.where(inside, (seen - middle) * scale, 0.0)
    dz = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
    if SILU:
        z = normal * factor[None, :] + offset[None, :]
        s = _sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    dz = dz * factor[None, :]
    count = PLACES * WIDTH
    first = tl.sum(tl.sum(dz, 1), 0) / count
    second = tl.sum(tl.sum(dz * normal, 1), 0) / count
    found = scale * (dz - first - normal * second)
    if THROUGH:
        found += tl.load(through + at, mask=inside, other=0).to(tl.float32)
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _channel_moments(
    x, shift, parts, SHIFT_STEP, PLACES, CHANNELS, TILES,
    SHIFTED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and squared distances of each channel over a stretch of TILES tiles: parts (image, stretch, 2, channel)."""
    stretch, image = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < CHANNELS
    middle, spread = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    done, tile = 0, 0
    while tile < TILES:
        first = (stretch * TILES + tile) * BLOCK_P
        place = first + tl.arange(0, BLOCK_P)
        inside = (place < PLACES)[:, None] & here[None, :]
        at = image * PLACES * CHANNELS + place[:, None] * CHANNELS + channel[None, :]
        seen = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        seen = _shifted(seen, shift, image, channel, here, SHIFT_STEP, SHIFTED)
        count = tl.maximum(tl.minimum(PLACES - first, BLOCK_P), 0)
        own = tl.sum(tl.where(inside, seen, 0.0), 0) / tl.maximum(count, 1)
        away = tl.where(inside, seen - own[None, :], 0.0)
        share = count / tl.maximum(done + count, 1)  # of what was seen up to here, in this tile (Chan et al. 1979)
        spread += tl.sum(away * away, 0) + (own - middle) * (own - middle) * (done * share)
        middle += (own - middle) * share
        done += count
        tile += 1
    to = parts + (image * tl.num_programs(0) + stretch) * 2 * CHANNELS + channel
    tl.store(to, middle, mask=here)
    tl.store(to + CHANNELS, spread, mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _group_moments(
    parts, mean, rstd, PLACES, CHANNELS, STRETCHES, eps,
    GROUPS, WIDTH, LENGTH, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of each group, from those of its channels (Chan et al. 1979)."""
    image, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    within = tl.arange(0, BLOCK_C)
    here = within < WIDTH
    count = PLACES * WIDTH
    total = tl.zeros((BLOCK_C,), tl.float32)
    start = 0
    while start < STRETCHES:
        stretch = start + tl.arange(0, BLOCK_S)
        inside = (stretch < STRETCHES)[:, None] & here[None, :]
        at = (image * STRETCHES + stretch[:, None]) * 2 * CHANNELS + group * WIDTH + within[None, :]
        size = tl.minimum(PLACES - stretch * LENGTH, LENGTH)
        total += tl.sum(tl.load(parts + at, mask=inside, other=0) * size[:, None], 0)
        start += BLOCK_S
    middle = tl.sum(total, 0) / count
    spread = tl.zeros((BLOCK_C,), tl.float32)
    start = 0
    while start < STRETCHES:
        stretch = start + tl.arange(0, BLOCK_S)
        inside = (stretch < STRETCHES)[:, None] & here[None, :]
        at = (image * STRETCHES + stretch[:, None]) * 2 * CHANNELS + group * WIDTH + within[None, :]
        size = tl.minimum(PLACES - stretch * LENGTH, LENGTH)
        away = tl.load(parts + at, mask=inside, other=0) - middle
        own = tl.load(parts + at + CHANNELS, mask=inside, other=0)
        spread += tl.sum(tl.where(inside, own + away * away * size[:, None], 0.0), 0)
        start += BLOCK_S
    tl.store(mean + tl.program_id(0), middle)
    tl.store(rstd + tl.program_id(0), 1 / tl.sqrt(tl.sum(spread, 0) / count + eps))


@triton.jit(do_not_specialize=_SIZES)
def _group_norm_apply(
    x, shift, weight, bias, y, mean, rstd, SHIFT_STEP, PLACES, CHANNELS,
    GROUPS, WIDTH, SHIFTED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stretch, image = tl.program_id(0), tl.program_id(1)
    place, channel = stretch * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < CHANNELS
    inside = (place < PLACES)[:, None] & here[None, :]
    at = image * PLACES * CHANNELS + place[:, None] * CHANNELS + channel[None, :]
    seen = _shifted(tl.load(x + at, mask=inside, other=0).to(tl.float32), shift, image, channel, here, SHIFT_STEP, SHIFTED)
    own = image * GROUPS + channel // WIDTH
    middle, scale = tl.load(mean + own, mask=here, other=0), tl.load(rstd + own, mask=here, other=0)
    factor = tl.load(weight + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    z = (seen - middle[None, :]) * (scale * factor)[None, :] + offset[None, :]
    if SILU:
        z = z * _sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _group_norm_back_sums(
    dy, x, shift, weight, bias, mean, rstd, parts, SHIFT_STEP, PLACES, CHANNELS,
    GROUPS, WIDTH, SHIFTED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of each channel over a stretch of places that the gradient of a group is made of."""
    stretch, image = tl.program_id(0), tl.program_id(1)
    place, channel = stretch * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < CHANNELS
    inside = (place < PLACES)[:, None] & here[None, :]
    at = image * PLACES * CHANNELS + place[:, None] * CHANNELS + channel[None, :]
    seen = _shifted(tl.load(x + at, mask=inside, other=0).to(tl.float32), shift, image, channel, here, SHIFT_STEP, SHIFTED)
    own = image * GROUPS + channel // WIDTH
    middle, scale = tl.load(mean + own, mask=here, other=0), tl.load(rstd + own, mask=here, other=0)
    factor = tl.load(weight + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    normal = (seen - middle[None, :]) * scale[None, :]
    dz = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
    if SILU:
        z = normal * factor[None, :] + offset[None, :]
        s = _sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    to = parts + (image * tl.num_programs(0) + stretch) * 2 * CHANNELS + channel
    tl.store(to, factor * tl.sum(dz, 0), mask=here)
    tl.store(to + CHANNELS, factor * tl.sum(dz * normal, 0), mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _group_sums(
    parts, first, second, PLACES, CHANNELS, STRETCHES,
    GROUPS, WIDTH, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, group = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    within = tl.arange(0, BLOCK_C)
    here = within < WIDTH
    one, two = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    start = 0
    while start < STRETCHES:
        stretch = start + tl.arange(0, BLOCK_S)
        inside = (stretch < STRETCHES)[:, None] & here[None, :]
        at = (image * STRETCHES + stretch[:, None]) * 2 * CHANNELS + group * WIDTH + within[None, :]
        one += tl.sum(tl.load(parts + at, mask=inside, other=0), 0)
        two += tl.sum(tl.load(parts + at + CHANNELS, mask=inside, other=0), 0)
        start += BLOCK_S
    count = PLACES * WIDTH
    tl.store(first + tl.program_id(0), tl.sum(one, 0) / count)
    tl.store(second + tl.program_id(0), tl.sum(two, 0) / count)


@triton.jit(do_not_specialize=_SIZES)
def _group_norm_back_apply(
    dy, x, shift, weight, bias, mean, rstd, first, second, through, dx, SHIFT_STEP, PLACES, CHANNELS,
    GROUPS, WIDTH, SHIFTED: tl.constexpr, SILU: tl.constexpr, THROUGH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    stretch, image = tl.program_id(0), tl.program_id(1)
    place, channel = stretch * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < CHANNELS
    inside = (place < PLACES)[:, None] & here[None, :]
    at = image * PLACES * CHANNELS + place[:, None] * CHANNELS + channel[None, :]
    seen = _shifted(tl.load(x + at, mask=inside, other=0).to(tl.float32), shift, image, channel, here, SHIFT_STEP, SHIFTED)
    own = image * GROUPS + channel // WIDTH
    middle, scale = tl.load(mean + own, mask=here, other=0), tl.load(rstd + own, mask=here, other=0)
    one, two = tl.load(first + own, mask=here, other=0), tl.load(second + own, mask=here, other=0)
    factor = tl.load(weight + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    normal = (seen - middle[None, :]) * scale[None, :]
    dz = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
    if SILU:
        z = normal * factor[None, :] + offset[None, :]
        s = _sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    found = scale[None, :] * (dz * factor[None, :] - one[None, :] - normal * two[None, :])
    if THROUGH:
        found += tl.load(through + at, mask=inside, other=0).to(tl.float32)
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm(
    x, added, weight, bias, total, y, mean, rstd, ROWS, WIDTH, STRIDE, eps,
    ADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    here = column < WIDTH
    inside = (row < ROWS)[:, None] & here[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    seen = tl.load(x + row[:, None] * STRIDE + column[None, :], mask=inside, other=0).to(tl.float32)
    if ADDED:
        seen += tl.load(added + at, mask=inside, other=0).to(tl.float32)
        rounded = seen.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        seen = rounded.to(tl.float32)
    middle = tl.sum(seen, 1) / WIDTH
    away = tl.where(inside, seen - middle[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(away * away, 1) / WIDTH + eps)
    factor = tl.load(weight + column, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + column, mask=here, other=0).to(tl.float32)
    z = away * scale[:, None] * factor[None, :] + offset[None, :]
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle, mask=row < ROWS)
    tl.store(rstd + row, scale, mask=row < ROWS)


@triton.jit
def _layer_norm_back(
    dy, x, weight, mean, rstd, through, dx, ROWS, WIDTH,
    THROUGH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    here = column < WIDTH
    inside = (row < ROWS)[:, None] & here[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    middle, scale = tl.load(mean + row, mask=row < ROWS, other=0), tl.load(rstd + row, mask=row < ROWS, other=0)
    seen = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    normal = tl.where(inside, (seen - middle[:, None]) * scale[:, None], 0.0)
    factor = tl.load(weight + column, mask=here, other=0).to(tl.float32)
    dz = tl.load(dy + at, mask=inside, other=0).to(tl.float32) * factor[None, :]
    first, second = tl.sum(dz, 1) / WIDTH, tl.sum(dz * normal, 1) / WIDTH
    found = scale[:, None] * (dz - first[:, None] - normal * second[:, None])
    if THROUGH:
        found += tl.load(through + at, mask=inside, other=0).to(tl.float32)
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x, y, COUNT, WIDTH, BLOCK: tl.constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < COUNT
    at = number // WIDTH * 2 * WIDTH + number % WIDTH
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    gate = tl.load(x + at + WIDTH, mask=inside, other=0).to(tl.float32)
    below, _ = _gelu_parts(gate)
    tl.store(y + number, (value * gate * below).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_back(dy, x, dx, COUNT, WIDTH, BLOCK: tl.constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < COUNT
    at = number // WIDTH * 2 * WIDTH + number % WIDTH
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    gate = tl.load(x + at + WIDTH, mask=inside, other=0).to(tl.float32)
    given = tl.load(dy + number, mask=inside, other=0).to(tl.float32)
    below, density = _gelu_parts(gate)
    tl.store(dx + at, (given * gate * below).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + at + WIDTH, (given * value * (below + gate * density)).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _sum_with_bias(a, b, bias, y, COUNT, CHANNELS, BLOCK: tl.constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < COUNT
    total = tl.load(a + number, mask=inside, other=0).to(tl.float32)
    total += tl.load(b + number, mask=inside, other=0).to(tl.float32)
    total += tl.load(bias + number % CHANNELS, mask=inside, other=0).to(tl.float32)
    tl.store(y + number, total.to(y.dtype.element_ty), mask=inside)


class _Compiling(threading.local):
    """The kernels that the present thread has compiled instead of running them; None where it runs them."""

    kernels: list[Any] | None = None


_compiling = _Compiling()


def _launch(kernel: Any, grid: tuple[int, ...], *given: Any, **flags: Any) -> None:
    if _compiling.kernels is None:
        kernel[grid](*given, **flags)
    else:
        told = [one.dtype if isinstance(one, Tensor) else one for one in given]
        _compiling.kernels.append(kernel.warmup(*told, grid=grid, **flags))


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Compile what is launched by this thread inside, side by side, in place of running it; tensors need have no memory.

    Args:
        device: The card to compile for.

    Yields:
        Once; afterwards all is compiled, on disk and loaded.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.cuda.device(device):
        with triton.AsyncCompileMode(pool):
            _compiling.kernels = []
            try:
                yield
                found = _compiling.kernels
            finally:
                _compiling.kernels = None

        def load(kernel: Any) -> None:
            with torch.cuda.device(device):
                _ = kernel.run  # which compiles what launches it, too

        list(pool.map(load, {id(one): one for one in (getattr(one, "kernel", None) or one for one in found)}.values()))


def compiling_ahead() -> bool:
    """Tell whether the present thread compiles kernels instead of running them.

    Returns:
        Whether it does.
    """
    return _compiling.kernels is not None


def card(device: torch.device) -> str:
    """Name what kernels are compiled for and by.

    Args:
        device: The card.

    Returns:
        Triton's version, the card's name and what it can do.
    """
    return f"{triton.__version__} {torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"


def compiled_before(digest: str) -> Path:
    """Tell where it is noted that kernels are on disk: beside them, so that it goes when they go.

    Args:
        digest: What they were compiled for.

    Returns:
        A file, which may not exist yet.
    """
    return Path(triton.knobs.cache.dir) / f"peft_diffusion-{digest}"


def _on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Launch where the first tensor is: Triton would take the present device."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        if not isinstance(first, Tensor) or not first.is_cuda:
            return function(*args, **kwargs)
        with torch.cuda.device_of(first):
            return function(*args, **kwargs)

    return run


class _Tiles:
    """How a map (images, channels, height, width) is cut into what programs hold."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.images, self.channels = x.shape[:2]
        self.places = x.shape[2] * x.shape[3]
        self.groups, self.width = groups, self.channels // groups
        self.block_width = triton.next_power_of_2(self.width)
        self.all_places = triton.next_power_of_2(self.places)
        self.whole = self.all_places * self.block_width <= _WHOLE
        self.block_channels = min(64, triton.next_power_of_2(self.channels))
        self.length = min(_TILE // self.block_channels, self.all_places)
        self.stretches = triton.cdiv(self.places, self.length)
        self.grid = (self.stretches, self.images, triton.cdiv(self.channels, self.block_channels))
        # One program a group reads what all stretches came to, one block after the other: of a large map they must be few.
        self.tiles = triton.cdiv(self.stretches * self.grid[1] * self.grid[2], _PROGRAMS)
        self.long_stretches = triton.cdiv(self.stretches, self.tiles)
        # Two kernels serve all usual widths: narrow groups are those of large maps, which have many stretches.
        within = 32 if self.width <= 32 else max(128, self.block_width)
        self.group_block = {"BLOCK_S": max(1, _TILE // within), "BLOCK_C": within}
        self.warps = 8 if self.all_places * self.block_width > 4096 else 4


@_on_its_device
def group_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the norm of a channels-last map plus a shift.

    Args:
        x: (images, channels, height, width), channels-last.
        shift: (images, channels), the channels of an image in a row; images may lie apart, or all be one.
        weight: (channels,).
        bias: (channels,).
        groups: How many groups of channels there are.
        eps: Added to the variance.
        silu: Whether SiLU follows.

    Returns:
        The norm, and mean and 1 / deviation, (images, groups) each.
    """
    t, y = _Tiles(x, groups), torch.empty_like(x)
    mean, rstd = x.new_empty(2, t.images, groups, dtype=torch.float32).unbind()
    moved, step = (x, 0) if shift is None else (shift, shift.stride(0))
    flags = {"SHIFTED": shift is not None, "SILU": silu}
    if t.whole:
        _launch(
            _group_norm_whole, (t.images * groups,),
            x, moved, weight, bias, y, mean, rstd, step, t.places, t.channels, eps, GROUPS=groups, WIDTH=t.width, **flags,
            BLOCK_P=t.all_places, BLOCK_C=t.block_width, num_warps=t.warps,
        )  # fmt: skip
        return y, mean, rstd
    parts = x.new_empty(t.images, t.long_stretches, 2, t.channels, dtype=torch.float32)
    tile = {"BLOCK_P": t.length, "BLOCK_C": t.block_channels}
    _launch(
        _channel_moments, (t.long_stretches, *t.grid[1:]),
        x, moved, parts, step, t.places, t.channels, t.tiles, SHIFTED=shift is not None, **tile,
    )  # fmt: skip
    _launch(
        _group_moments, (t.images * groups,),
        parts, mean, rstd, t.places, t.channels, t.long_stretches, eps, GROUPS=groups, WIDTH=t.width,
        LENGTH=t.tiles * t.length, **t.group_block,
    )  # fmt: skip
    _launch(
        _group_norm_apply, t.grid,
        x, moved, weight, bias, y, mean, rstd, step, t.places, t.channels, GROUPS=groups, WIDTH=t.width, **flags, **tile,
    )  # fmt: skip
    return y, mean, rstd


@_on_its_device
def group_norm_back(
    dy: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool,
    through: Tensor | None,
) -> Tensor:  # fmt: skip
    """Compute the gradient of `group_norm` to ``x``.

    Args:
        dy: The gradient of its output.
        x: As it was given, like all that follow.
        shift: (images, channels).
        weight: (channels,).
        bias: (channels,).
        mean: (images, groups).
        rstd: 1 / deviation, (images, groups).
        silu: Whether SiLU followed.
        through: Added to the result: the gradient of another use of ``x``.

    Returns:
        The gradient, channels-last.
    """
    groups = mean.shape[1]
    t, dx = _Tiles(x, groups), torch.empty_like(x)
    moved, step = (x, 0) if shift is None else (shift, shift.stride(0))
    passed = x if through is None else through
    flags = {"SHIFTED": shift is not None, "SILU": silu}
    if t.whole:
        _launch(
            _group_norm_whole_back, (t.images * groups,),
            dy, x, moved, weight, bias, mean, rstd, passed, dx, step, t.places, t.channels,
            GROUPS=groups, WIDTH=t.width, **flags, THROUGH=through is not None, BLOCK_P=t.all_places,
            BLOCK_C=t.block_width, num_warps=2 * t.warps,
        )  # fmt: skip
        return dx
    parts = x.new_empty(t.images, t.stretches, 2, t.channels, dtype=torch.float32)
    first, second = torch.empty_like(mean), torch.empty_like(mean)
    sizes, tile = {"GROUPS": groups, "WIDTH": t.width}, {"BLOCK_P": t.length, "BLOCK_C": t.block_channels}
    _launch(
        _group_norm_back_sums, t.grid,
        dy, x, moved, weight, bias, mean, rstd, parts, step, t.places, t.channels, **sizes, **flags, **tile,
    )  # fmt: skip
    _launch(
        _group_sums, (t.images * groups,),
        parts, first, second, t.places, t.channels, t.stretches, **sizes, **t.group_block,
    )  # fmt: skip
    _launch(
        _group_norm_back_apply, t.grid,
        dy, x, moved, weight, bias, mean, rstd, first, second, passed, dx, step, t.places, t.channels, **sizes, **flags,
        THROUGH=through is not None, **tile,
    )  # fmt: skip
    return dx


@_on_its_device
def layer_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a sum and its norm over the last axis.

    Args:
        x: (..., width), its rows in order; they may lie apart where something is added.
        added: Added to ``x``, of its shape.
        weight: (width,).
        bias: (width,).
        eps: Added to the variance.

    Returns:
        ``x + added``, its norm, and mean and 1 / deviation of each row; all contiguous.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    y, total = x.new_empty(x.shape), x if added is None else x.new_empty(x.shape)
    mean, rstd = x.new_empty(2, rows, dtype=torch.float32).unbind()
    block = triton.next_power_of_2(width)
    each = max(1, _TILE // 2 // block)
    _launch(
        _layer_norm, (triton.cdiv(rows, each),),
        x, x if added is None else added, weight, bias, total, y, mean, rstd, rows, width, x.stride(-2), eps,
        ADDED=added is not None, BLOCK_R=each, BLOCK_C=block,
    )  # fmt: skip
    return total, y, mean, rstd


@_on_its_device
def layer_norm_back(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, through: Tensor | None) -> Tensor:
    """Compute the gradient of `layer_norm` to ``x``.

    Args:
        dy: The gradient of its norm.
        x: The sum.
        weight: (width,).
        mean: Of each row.
        rstd: 1 / deviation of each row.
        through: Added to the result: the gradient of the sum.

    Returns:
        The gradient.
    """
    width, dx = x.shape[-1], torch.empty_like(x)
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    each = max(1, _TILE // 2 // block)
    _launch(
        _layer_norm_back, (triton.cdiv(rows, each),),
        dy, x, weight, mean, rstd, x if through is None else through, dx, rows, width, THROUGH=through is not None,
        BLOCK_R=each, BLOCK_C=block,
    )  # fmt: skip
    return dx


@_on_its_device
def gated(x: Tensor) -> Tensor:
    """Compute GEGLU.

    Args:
        x: (..., 2 * width).

    Returns:
        The first half of the last axis times the GELU of the second, contiguous.
    """
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _launch(_gated, (triton.cdiv(y.numel(), 1024),), x, y, y.numel(), y.shape[-1], BLOCK=1024)
    return y


@_on_its_device
def gated_back(dy: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of `gated` to ``x``.

    Args:
        dy: The gradient of its output.
        x: As it was given.

    Returns:
        The gradient.
    """
    dx = torch.empty_like(x)
    _launch(_gated_back, (triton.cdiv(dy.numel(), 1024),), dy, x, dx, dy.numel(), dy.shape[-1], BLOCK=1024)
    return dx


@_on_its_device
def sum_with_bias(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """Add two channels-last maps and a number for each channel.

    Args:
        a: (images, channels, height, width).
        b: Of the same shape.
        bias: (channels,).

    Returns:
        The sum.
    """
    y = torch.empty_like(a)
    _launch(_sum_with_bias, (triton.cdiv(y.numel(), 1024),), a, b, bias, y, y.numel(), len(bias), BLOCK=1024)
    return y
