"""Kernels compiled side by side before their first use, once for a version, a card, a network and a shape.

Triton compiles a kernel when it is first launched, one after the other, and keeps it on disk. So the first step that a
machine computes would wait for dozens of them. A run without memory tells which a step launches; a thread for each core
compiles them.
"""

import hashlib
import logging
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import __version__
from .cuda_graph import Inputs


def compile_ahead(
    kernels: Any, what: Hashable, inputs: Inputs, device: torch.device, work: Callable[[Inputs], object]
) -> None:
    """Compile what a step launches, where it may never have been compiled on this machine. What fails is left for later.

    Args:
        kernels: The module of kernels.
        what: What the kernels of a step depend on: the network and its precision; versions, card and shapes are added.
        inputs: What the step is given.
        device: Where it will run.
        work: The step.
    """
    shapes = sorted((name, tuple(one.shape), str(one.dtype)) for name, one in inputs.items())
    try:
        mark = kernels.compiled_before(_digest(what, shapes, kernels.card(device)))
        if mark.exists():
            return
        with FakeTensorMode(allow_non_fake_inputs=True), kernels.compiling(device):
            work({name: torch.empty(one.shape, dtype=one.dtype, device=device) for name, one in inputs.items()})
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except Exception as error:  # of a version that compiles otherwise, or of a folder that cannot be written
        logging.getLogger(__name__).debug("kernels are compiled when they are first used: %s", error)


def _digest(*told: object) -> str:
    source = Path(__file__).with_name("kernels.py").read_bytes()
    return hashlib.sha256(repr((__version__, torch.__version__, *told)).encode() + source).hexdigest()
