"""The processes that train one adapter together, each on its part of every batch: ``accelerate launch`` starts them."""

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...core.errors import UserError

_Value = TypeVar("_Value")
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # of torchrun, and of kinds of mpirun


@dataclass(frozen=True)
class Processes:
    """This process among ``size`` of them, from 0; by default the only one.

    All hold the whole adapter, and see the same data in the same order. A step's gradients are their mean, so that two
    processes with batches of 2 learn what one learns with batches of 4. Each holds the whole base or, where they share it,
    a part of every weight, so that whatever the base computes takes all of them.
    """

    rank: int = 0
    size: int = 1
    shares_base: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    @property
    def measures(self) -> bool:
        """Whether this process takes part where the base is looked at: in measuring, and in drawing pictures."""
        return self.leads or self.shares_base

    def seed_parts(self) -> tuple[int, ...]:
        """What a seed needs besides, so that each process draws its own; nothing for the first."""
        return (self.rank,) if self.rank else ()

    def part(self, count: int) -> slice:
        """Say which rows are this process's.

        Args:
            count: Rows of each process.

        Returns:
            Where they are among the rows of all.
        """
        return slice(self.rank * count, (self.rank + 1) * count)

    def mean(self, tensor: Tensor) -> None:
        """Make a tensor the mean over all processes, in place.

        Args:
            tensor: The tensor, of the same shape in all.
        """
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self.size)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell all processes whether something is so in any of them.

        Args:
            flag: Whether it is so in this one.
            device: What the processes communicate through.

        Returns:
            Whether it is so in one or more.
        """
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag), device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return bool(found)

    def agreed(self, value: _Value) -> _Value:
        """Share what the process that leads found with all that took part in finding it: rounding must not part their ways.

        Args:
            value: What this process found.

        Returns:
            What the one that leads found, where the processes share a base; else the same value.
        """
        if not self.shares_base:
            return value
        found = [value]
        torch.distributed.broadcast_object_list(found, 0)
        return found[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


def join(device: str) -> tuple[Processes, str]:
    """Find this process's place among those that a launcher started.

    Args:
        device: The device that was asked for.

    Returns:
        The processes, and the device of this one.

    Raises:
        UserError: ``accelerate launch`` was asked for several processes and started one.
    """
    if all(int(os.environ.get(name, "1")) == 1 for name in _SIZES):
        # On a machine without several GPUs, and with --cpu, it starts the command once, whatever --num_processes says; all
        # that tells is the address where the others would have met.
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
            raise UserError(
                "accelerate launch was asked for several processes and started one, as it does without several GPUs; start"
                " them with accelerate launch --multi_gpu --num_processes N, which needs no GPU, or with torchrun"
                " --nproc-per-node N"
            )
        return Processes(), device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
    return Processes(state.process_index, state.num_processes), str(state.device)
