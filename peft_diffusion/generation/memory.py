"""Drawing on small cards: what of the base waits on the CPU, and what is computed in pieces."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from torch import nn

from ..bases import load_base
from ..bases.loading import pick_device, pick_dtype
from ..bases.pipelines import Pipeline
from ..core.errors import UserError
from .adapters import Adapters
from .settings import Sampling


def loaded(config: Sampling, pipe: Pipeline | None, *, download: bool = True) -> DiffusionPipeline:
    """Load the base that was asked for, on the CPU where it is to be brought to the device part by part.

    Args:
        config: What was asked for.
        pipe: A base that is loaded already; None for none.
        download: Whether a base of the hub may be fetched.

    Returns:
        The pipeline.

    Raises:
        UserError: As `load_base`; and a pipeline was handed in, whose owner decides where its parts are.
    """
    if pipe is not None and (config.offload or config.vae_tiling or config.attention_slicing):
        raise UserError("the pipeline is loaded already: enable offloading, tiling and slicing on it yourself")
    dtype: str = config.precision
    if config.offload and pick_device(config.device).type == "cpu":
        raise UserError("on a CPU there is nothing to offload to; leave --offload away, or name another --device")
    if config.offload and dtype == "auto":
        dtype = str(pick_dtype("auto", pick_device(config.device))).removeprefix("torch.")
    return load_base(
        config.base if pipe is None else pipe,
        device="cpu" if config.offload else config.device,
        dtype=dtype,
        quantize=config.quantize,
        download=download,
        prediction=config.prediction,
    )


def device_of(pipe: Pipeline, config: Sampling) -> torch.device:
    """Tell where a pipeline computes.

    Args:
        pipe: The pipeline.
        config: What was asked for.

    Returns:
        The device.
    """
    return pick_device(config.device) if config.offload else pipe.device


def spare(adapters: Adapters, config: Sampling) -> None:
    """Have a pipeline take less memory, as was asked for. Adapters can come and go no more then.

    Args:
        adapters: Those of the pipeline, all of them loaded.
        config: What was asked for.

    Raises:
        UserError: The pipeline has nothing of the kind.
    """
    _ = adapters.base  # found out and kept while the weights can be read
    pipe: Any = adapters.pipe
    device = device_of(pipe, config) if config.offload else None
    if config.vae_tiling:
        if not hasattr(pipe.vae, "enable_tiling"):
            raise UserError(f"a {type(pipe.vae).__name__} does not decode in tiles; leave --vae-tiling away")
        pipe.vae.enable_tiling()
    if config.attention_slicing:
        pipe.enable_attention_slicing()
    if config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif config.offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")


@contextmanager
def spared(adapters: Adapters, config: Sampling) -> Iterator[None]:
    """Have a pipeline take less memory inside, as `spare` does; afterwards adapters can come and go again.

    Args:
        adapters: Those of the pipeline, all of them loaded.
        config: What was asked for.

    Yields:
        Once; afterwards all of an offloaded base waits on the CPU.

    Raises:
        UserError: The pipeline has nothing of the kind.
    """
    spare(adapters, config)
    try:
        yield
    finally:
        if config.offload:
            _gather(adapters.pipe)


def _gather(pipe: Any) -> None:
    """Take all off that brings a base to the device, which leaves its weights on the CPU."""
    pipe.remove_all_hooks()
    parts = [one for one in pipe.components.values() if isinstance(one, nn.Module)]
    for module in (module for part in parts for module in part.modules()):
        registry = vars(module).pop("_diffusers_hook", None)
        if isinstance(registry, HookRegistry):
            for name in tuple(registry.hooks):
                registry.remove_hook(name, recurse=False)
    for part in parts:
        part.to("cpu")
