"""A frozen UNet made ready for training on a GPU, and afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def fused(component: nn.Module) -> Iterator[None]:
    """On CUDA, a component in channels-last order inside; on any other device nothing changes."""
    parameter = next(component.parameters())
    if not parameter.is_cuda:
        yield
        return
    chosen = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    component.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        component.to(memory_format=torch.contiguous_format)
        torch.backends.cudnn.benchmark = chosen
