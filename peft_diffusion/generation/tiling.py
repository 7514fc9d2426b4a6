"""Pictures whose edges meet, for textures: convolutions see the other edge beyond an edge, in place of zeros."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from ..bases import denoiser_of
from ..bases.pipelines import Pipeline, uncompiled
from ..core import regions
from .settings import Tile

DIMENSIONS = {None: (), "x": (3,), "y": (2,), "both": (2, 3)}
"""The dimensions of maps along which edges meet."""


class _Ring:
    """Hooks that close one convolution to a ring along some dimensions, for the thread that made them.

    What goes in is continued by the other edge, and what comes out is cut to its size: so whatever is computed in between
    by the convolution and the adapters on it holds, and nothing of the module is changed, which threads may share.
    """

    def __init__(self, dimensions: tuple[int, ...]) -> None:
        self.dimensions = dimensions
        self.thread = threading.get_ident()

    def before(self, conv: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Continue the input."""
        if threading.get_ident() != self.thread:
            return None
        x: Tensor = args[0]
        layout = regions.present()
        if layout is not None:
            layout.ring = self._kept(conv, x, 2), self._kept(conv, x, 3)
        for dimension in self.dimensions:
            if _padded_before(conv):
                # The encoder of diffusers' VAE adds a row and a column of zeros itself before it halves the size.
                x = x.clone()
                x.select(dimension, -1).copy_(x.select(dimension, 0))
            elif margin := _margin(conv, dimension):
                sides = (margin, margin, 0, 0) if dimension == 3 else (0, 0, margin, margin)
                x = pad(x, sides, mode="circular")
        return x, *args[1:]

    def after(self, conv: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        """Cut the output."""
        if threading.get_ident() != self.thread:
            return None
        layout = regions.present()
        if layout is not None:
            layout.ring = None
        for dimension in self.dimensions:
            if margin := _margin(conv, dimension):
                size = _size(conv, args[0].shape[dimension] - 2 * margin, dimension)
                y = y.narrow(dimension, margin // _of(conv.stride, dimension), size)
        return y

    def _kept(self, conv: nn.Module, x: Tensor, dimension: int) -> tuple[int, int]:
        """Where what is kept of the output begins along a dimension, and how long it is."""
        margin = _margin(conv, dimension) if dimension in self.dimensions else 0
        return margin // _of(conv.stride, dimension), _size(conv, x.shape[dimension], dimension)


def _of(pair: Any, dimension: int) -> int:
    return int(pair[dimension - 2])


def _margin(conv: nn.Module, dimension: int) -> int:
    """How far the input is continued: as far as the padding reaches, in whole steps of the stride."""
    padding, stride = _of(conv.padding, dimension), _of(conv.stride, dimension)
    return -(-padding // stride) * stride


def _size(conv: nn.Module, side: int, dimension: int) -> int:
    """How long what is made of a side is."""
    reach = _of(conv.dilation, dimension) * (_of(conv.kernel_size, dimension) - 1)
    return (side + 2 * _of(conv.padding, dimension) - reach - 1) // _of(conv.stride, dimension) + 1


def _padded_before(conv: nn.Module) -> bool:
    return conv.kernel_size == (3, 3) and conv.stride == (2, 2) and conv.padding == (0, 0)


@contextmanager
def seamless(pipe: Pipeline, tile: Tile | None, beside: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Have a pipeline draw pictures whose edges meet, in this thread.

    Args:
        pipe: The pipeline.
        tile: Which edges: left and right (x), upper and lower (y), or both; None for none.
        beside: Modules that run beside the pipeline's own.

    Yields:
        Once; afterwards its modules are as they were.
    """
    parts = (denoiser_of(pipe).network, pipe.vae, *beside)
    with ExitStack() as hooks:
        for part in parts if tile is not None else ():
            for conv in uncompiled(part).modules() if isinstance(part, nn.Module) else ():
                if isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str):
                    ring = _Ring(DIMENSIONS[tile])
                    hooks.callback(conv.register_forward_pre_hook(ring.before).remove)
                    hooks.callback(conv.register_forward_hook(ring.after).remove)
        yield
