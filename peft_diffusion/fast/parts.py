"""What a pipeline computes beside its steps, made faster as they are: text encoders, the VAE, ControlNets."""

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import nn

from ..bases.base import components, network_of
from .drawing import Engine

_ROOM = 0.5  # of a card's memory, what has to be free for a recording to keep the memory that it computes in


class PartEngine(Engine):
    """An engine of what runs once a picture. A shape is recorded when it comes a second time: before, it would not pay.

    Whether from a recording or not, it computes by the same kernels, so that equal pictures are equal.
    """

    steps = False
    searches = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._seen: set[Hashable] = set()

    def _drop(self) -> None:
        super()._drop()
        self._seen.clear()

    def _records(self, what: Hashable) -> bool:
        if not super()._records(what) or what in self._steps.graphs:
            return what in self._steps.graphs
        if what not in self._seen:
            self._seen.add(what)
            return False
        return _roomy(self._steps.device)


def _roomy(device: torch.device) -> bool:
    """Whether there is memory for what a recording keeps."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused >= _ROOM * total


def parts_beside(pipe: Any) -> Iterator[tuple[str, nn.Module, type[Engine]]]:
    """Find what a pipeline computes beside its network, and the engine that suits it.

    Args:
        pipe: A pipeline of diffusers.

    Yields:
        Name, module and the class of its engine.
    """
    found = network_of(pipe)
    for name, part in components(pipe).items():
        # One that somebody compiled is left to that.
        if getattr(pipe, name) is part and (found is None or part is not found[1]):
            yield name, part, PartEngine
    for name, part in pipe.components.items():
        if isinstance(part, AutoencoderKL):
            yield f"{name}.encoder", part.encoder, PartEngine
            yield f"{name}.decoder", part.decoder, PartEngine
        elif isinstance(part, MultiControlNetModel):
            yield from ((f"{name}.{number}", net, Engine) for number, net in enumerate(part.nets))
        elif isinstance(part, ControlNetModel):
            yield name, part, Engine
