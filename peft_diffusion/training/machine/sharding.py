"""A frozen base sharded over the processes that train together, for one that a single card does not hold.

Each process keeps its part of every weight, and has a block's weights whole only while it computes with them (FSDP, Zhao et
al. 2023, https://arxiv.org/abs/2304.11277, as torch's ``fully_shard`` has it). Adapters are attached afterwards, so they are
none of its business: they stay whole, and their gradients are averaged as ever.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ...bases import components
from ...bases import family as families
from ...bases.digest import keep_fingerprint
from ...bases.pipelines import Pipeline
from ...core.errors import UserError
from ...core.sharded import local_part
from ..events import BaseSharded
from ..settings.pictures import TrainConfig
from .low_memory import blocks_of
from .processes import Processes


def sharing(processes: Processes, config: TrainConfig, pipe: Pipeline | None) -> Processes:
    """Let processes share a base, where the settings say so.

    Args:
        processes: Those that train together.
        config: The settings.
        pipe: A base that is loaded already; None where it will be loaded.

    Returns:
        The processes, sharing the base or not.

    Raises:
        UserError: There is but one process, or the base is loaded already.
    """
    if not config.shard_base:
        return processes
    if pipe is not None:
        raise UserError(
            "--shard-base cannot take a pipeline that is loaded already, which would not be left as it was; name the base"
            " in its place"
        )
    if processes.size == 1:
        raise UserError(
            "--shard-base shards the base over several processes, and there is one; start them with torchrun"
            " --nproc-per-node N or accelerate launch --multi_gpu --num_processes N, or leave it away"
        )
    return replace(processes, shares_base=True)


def shard(pipe: Pipeline, trained: Sequence[str], device: torch.device) -> BaseSharded:
    """Shard the denoiser and the components that are trained, and move the rest of a pipeline to the device, in place.

    One block after the other goes there, so that the device never has to hold all. Which base it is is found out before:
    afterwards every tensor would have to be gathered for it.

    Args:
        pipe: The pipeline, on the CPU.
        trained: The names of the components that are trained.
        device: That of this process.

    Returns:
        What came of it, as an event.

    Raises:
        UserError: As `keep_fingerprint`.
    """
    # Not above: they take long to import, and few shard.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    keep_fingerprint(components(pipe))
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    shared = {*families.components("denoiser"), *trained}
    parts = {name: part for name, part in components(pipe).items() if name in shared}
    size = sum(weight.nbytes for part in parts.values() for weight in part.parameters())
    for part in parts.values():
        for module in (*reversed(blocks_of(part)), part):
            fully_shard(module, mesh=mesh)
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part not in parts.values():
            part.to(device)
    own = sum(held(part) for part in parts.values())
    return BaseSharded(tuple(parts), mesh.size(), own, size, device.type == "cuda")


def held(part: nn.Module) -> int:
    """Count the bytes of a component's weights that this process holds itself, while nothing is computed.

    Args:
        part: The component.

    Returns:
        Bytes.
    """
    return sum(local_part(weight.detach()).untyped_storage().nbytes() for weight in part.parameters())
