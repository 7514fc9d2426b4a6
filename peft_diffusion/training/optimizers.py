"""The optimizers of a run, as a table: how each is built over the groups of an arena, and what of it a checkpoint keeps."""

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.arena import Arena
from ..core.errors import UserError
from .config import OptimizerName


@dataclass(frozen=True)
class Rules:
    """What an optimizer goes by: a learning rate for each group of the arena, weight decay, and which groups have none.

    ``records`` says that its steps are to be recorded as CUDA graphs.
    """

    rates: Mapping[str, float]
    weight_decay: float = 0.01
    undecayed: frozenset[str] = frozenset()
    records: bool = False

    def groups(self, arena: Arena) -> list[dict[str, Any]]:
        """One group of parameters for each of the arena's, as the optimizers of torch take them."""
        return [
            {
                "params": [parameter],
                "lr": self.rates[name],
                "weight_decay": 0.0 if name in self.undecayed else self.weight_decay,
            }
            for name, parameter in arena.groups.items()
        ]


class Optimizer:
    """What the trainer asks of an optimizer: ``inner`` is one of torch's kind, with one parameter for each group."""

    recordable: ClassVar[bool] = False
    """Whether its steps can be recorded: they read their rates where those lie, and ask the device nothing."""

    def __init__(self, arena: Arena, inner: Any) -> None:
        self.arena = arena
        self.inner = inner

    def step(self) -> None:
        """Change the weights by their gradients."""
        self.inner.step()

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """The learning rate of each group from now on."""
        for name, group in zip(self.arena.groups, self.inner.param_groups, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rates[name])
            else:
                group["lr"] = rates[name]

    def state(self) -> dict[str, Tensor]:
        """What it goes on from besides the weights, by name; views where it can be."""
        raise NotImplementedError

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on from what ``state`` gave after so many steps."""
        raise NotImplementedError

    def changed(self) -> list[Tensor]:
        """All that a step changes besides the weights; for those that can be recorded."""
        return list(self.state().values())


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019), its moments in two flat tensors, so that a checkpoint is a copy of each."""

    recordable = True

    def __init__(self, arena: Arena, rules: Rules) -> None:
        device = arena.flat.device
        groups = rules.groups(arena)
        if rules.records:
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=device)  # a recording reads its rate where it lies
        fused = device.type in ("cpu", "cuda")
        super().__init__(arena, torch.optim.AdamW(groups, fused=fused, capturable=rules.records))
        self.first, self.second = torch.zeros_like(arena.flat), torch.zeros_like(arena.flat)
        start = 0
        for parameter in arena.groups.values():
            part = slice(start, start := start + parameter.numel())
            on = device if fused else torch.device("cpu")
            steps = torch.zeros((), dtype=torch.float32, device=on)
            self.inner.state[parameter] = {"step": steps, "exp_avg": self.first[part], "exp_avg_sq": self.second[part]}

    def state(self) -> dict[str, Tensor]:
        """Both moments."""
        return {"first_moment": self.first, "second_moment": self.second}

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take moments over, and count steps from there."""
        for name, own in self.state().items():
            own.copy_(tensors[name])
        for values in self.inner.state.values():
            values["step"].fill_(float(step))

    def changed(self) -> list[Tensor]:
        """Moments and counts."""
        return [*super().changed(), *(values["step"] for values in self.inner.state.values())]


@dataclass(frozen=True)
class Kept:
    """What a checkpoint keeps of an optimizer of another library, by the names that it gives them, where they are there.

    ``tensors`` and ``numbers`` are of its state of each parameter; ``of_group`` are numbers of its groups of parameters.
    """

    tensors: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    of_group: tuple[str, ...] = ()


class Foreign(Optimizer):
    """An optimizer of another library, which makes its state in its first step."""

    def __init__(self, arena: Arena, inner: Any, kept: Kept) -> None:
        super().__init__(arena, inner)
        self.kept = kept

    def state(self) -> dict[str, Tensor]:
        """Tensors by ``group/name``; numbers are tensors without dimension."""
        found: dict[str, Tensor] = {}
        for name, where, key, number in self._places():
            if key in where:
                found[name] = torch.tensor(where[key], dtype=_wide(where[key])) if number else where[key]
        return found

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take everything over that was kept."""
        device = self.arena.flat.device
        for name, where, key, number in self._places():
            if name in tensors:
                where[key] = tensors[name].item() if number else tensors[name].to(device, copy=True)

    def _places(self) -> list[tuple[str, Any, str, bool]]:
        """For all that is kept: its name, the mapping that holds it and its key there, and whether it is a number."""
        places: list[tuple[str, Any, str, bool]] = []
        for (name, parameter), group in zip(self.arena.groups.items(), self.inner.param_groups, strict=True):
            state = self.inner.state[parameter]
            places += [(f"{name}/{key}", state, key, False) for key in self.kept.tensors]
            places += [(f"{name}/{key}", state, key, True) for key in self.kept.numbers]
            places += [(f"{name}/{key}", group, key, True) for key in self.kept.of_group]
        return places


def _wide(number: int | float) -> torch.dtype:
    return torch.float64 if isinstance(number, float) else torch.int64


def _adamw8bit(arena: Arena, rules: Rules) -> Optimizer:
    """AdamW with moments of 8 bits in blocks of 256 (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861)."""
    library = needed("bitsandbytes", "quantize", "--optimizer adamw8bit")
    kept = Kept(tensors=("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"), numbers=("step",))
    return Foreign(arena, library.optim.AdamW8bit(rules.groups(arena)), kept)


@dataclass(frozen=True)
class Row:
    """How an optimizer is built; ``bytes_each`` is what its state takes for a trained number."""

    build: Callable[[Arena, Rules], Optimizer]
    bytes_each: float


TABLE: dict[OptimizerName, Row] = {
    "adamw": Row(AdamW, 8.0),
    "adamw8bit": Row(_adamw8bit, 2.0 + 8 / 256),
}
"""One line for each optimizer; its name is listed in ``config.OptimizerName`` too, which the flag is made of."""


def needed(package: str, extra: str, what: str) -> Any:
    """A package that only this optimizer needs. Raises UserError where it is not installed."""
    logger = logging.getLogger(package)
    before = logger.level
    logger.setLevel(logging.ERROR)  # libraries speak of kernels that nobody asked for
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{what} needs the package {package}, which is not installed; install it with"
            f" pip install 'peft_diffusion[{extra}]', or take --optimizer adamw, which needs nothing"
        ) from None
    finally:
        logger.setLevel(before)


def build(name: OptimizerName, arena: Arena, rules: Rules) -> Optimizer:
    """The optimizer of that name over the groups of an arena. Raises UserError where its package is not installed."""
    return TABLE[name].build(arena, rules)
