"""Less held at once: blocks that are computed again in the backward pass, and a VAE that works in parts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ...core import targets

_MARKED = "GradientCheckpointingLayer"  # the class in transformers that layers derive from which can be computed again
TILED_ABOVE = 1024
"""Pixels a side up to which a VAE takes a picture in one piece: tiles give other values at their seams."""
SLICED_FROM = 512
"""Pixels a side from which a VAE takes pictures one by one: several would hold more than a training step does."""


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """List the blocks of a component that can be computed again.

    Args:
        part: The component.

    Returns:
        A network's by diffusers, a language model's by transformers.
    """
    names = {*targets.table(part).layers, _MARKED}
    # By name and with the classes that they derive from: sites and what makes a step quick change a module's class.
    return [module for module in part.modules() if not names.isdisjoint(cls.__name__ for cls in type(module).__mro__)]


@contextmanager
def recomputed(parts: Iterable[nn.Module], chance: bool) -> Iterator[int]:
    """Keep only the inputs of blocks for the backward pass, and run them again in it.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174.

    Args:
        parts: The components.
        chance: Whether something in them draws random numbers, which are then drawn alike; a CUDA graph cannot record that.

    Yields:
        The number of blocks.
    """
    found: list[Any] = [block for part in parts for block in blocks_of(part)]
    own = [vars(block).get("forward") for block in found]  # as accelerate's hooks put there
    for block in found:
        # On the instance: the class is what sites swap, and the libraries' own flags work in training mode alone.
        block.forward = partial(_again, block.forward, chance)
    try:
        yield len(found)
    finally:
        for block, forward in zip(found, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _again(forward: Callable[..., Any], chance: bool, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=chance, **kwargs)


@contextmanager
def small_vae(vae: Any, resolution: int, low: bool = False) -> Iterator[None]:
    """Have a VAE take large pictures one by one, and the largest in overlapping tiles.

    Args:
        vae: The VAE.
        resolution: Pixels a side.
        low: Whether all are taken one by one.

    Yields:
        Once; afterwards the VAE is as it was.
    """
    before = vae.use_slicing, vae.use_tiling
    vae.use_slicing = before[0] or low or resolution >= SLICED_FROM
    vae.use_tiling = before[1] or resolution > TILED_ABOVE
    try:
        yield
    finally:
        vae.use_slicing, vae.use_tiling = before
