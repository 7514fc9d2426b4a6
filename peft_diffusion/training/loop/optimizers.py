"""The optimizers of a run, by name: each over the flat groups of an arena, and what of it a checkpoint keeps."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...core.arena import Arena
from ...core.errors import UserError
from ..settings.choices import OptimizerName

Decays: TypeAlias = Mapping[str, float]
"""The weight decay of each group."""
Grouping: TypeAlias = Callable[[Arena, Mapping[str, float], Decays], list[dict[str, Any]]]
"""Makes the groups of an optimizer of an arena, rates and decays."""
Build: TypeAlias = "Callable[[Arena, Mapping[str, float], Decays, bool], FlatOptimizer]"
"""Makes an optimizer of an arena, rates, decays, and whether its steps may be recorded."""


class FlatOptimizer:
    """An optimizer of torch's kind, ``optimizer``, with one parameter for each group of an arena.

    ``records`` says whether its steps can be recorded as CUDA graphs: they read their rates where those lie, and ask the
    device nothing. ``kept`` are the tensors of its state, by name.
    """

    def __init__(self, arena: Arena, optimizer: Any, kept: Mapping[str, Tensor], records: bool = False) -> None:
        self.arena = arena
        self.optimizer = optimizer
        self.kept = dict(kept)
        self.records = records

    def tensors(self) -> dict[str, Tensor]:
        """What it goes on from besides the weights, by name; views, not copies."""
        return dict(self.kept)

    def go_on_from(self, step: int) -> None:
        """Count steps from there, after the tensors were filled.

        Args:
            step: The steps done.
        """
        for state in self.optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(float(step))
            else:
                state["step"] = step

    def final(self, parameters: Tensor, kept: Mapping[str, Tensor]) -> Tensor | None:
        """Compute the weights that a run gives in a state.

        Args:
            parameters: The weights at which gradients are taken.
            kept: The tensors of the optimizer.

        Returns:
            The weights; None where they are ``parameters``.
        """
        return None

    def counters(self) -> list[Tensor]:
        """The counts of steps, where a device holds them."""
        return [state["step"] for state in self.optimizer.state.values() if isinstance(state["step"], Tensor)]

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rates from now on.

        Args:
            rates: By group.
        """
        for name, group in zip(self.arena.groups, self.optimizer.param_groups, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rates[name])
            else:
                group["lr"] = rates[name]


class CountingOptimizer(FlatOptimizer):
    """An optimizer of another library that counts in its groups: ``numbers`` are the names of what it counts there."""

    def __init__(self, arena: Arena, optimizer: Any, kept: Mapping[str, Tensor], numbers: Sequence[str]) -> None:
        super().__init__(arena, optimizer, kept)
        self.numbers = {
            (place, key): torch.zeros((), dtype=torch.float64)
            for place in range(len(optimizer.param_groups))
            for key in numbers
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its state, and what it counts."""
        for (place, key), tensor in self.numbers.items():
            tensor.fill_(self.optimizer.param_groups[place][key])
        names = list(self.arena.groups)
        return super().tensors() | {f"{names[place]}.{key}": tensor for (place, key), tensor in self.numbers.items()}

    def go_on_from(self, step: int) -> None:
        """Take over what the optimizer counts itself, after the tensors were filled.

        Args:
            step: The steps done.
        """
        for (place, key), tensor in self.numbers.items():
            group = self.optimizer.param_groups[place]
            group[key] = type(group[key])(tensor.item())

    def counters(self) -> list[Tensor]:
        """None: its steps are not recorded."""
        return []


class ScheduleFree(CountingOptimizer):
    """Gradients are taken between where it is (``z``) and the average of where it was, which is what it gives."""

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rates from now on. What learns nothing is left out: the average would still move.

        Args:
            rates: By group.
        """
        super().set_rates(rates)
        for name, parameter in self.arena.groups.items():
            parameter.grad = self.arena.view_in(self.arena.grad, parameter) if rates[name] else None

    def final(self, parameters: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """Compute the average, from what the weights are and ``z``.

        Args:
            parameters: The weights at which gradients are taken.
            kept: The tensors of the optimizer.

        Returns:
            The weights.
        """
        beta = self.optimizer.param_groups[0]["betas"][0]
        return parameters.lerp(kept["z"], 1 - 1 / beta)


class Each:
    """Several optimizers as one, for those that want the same of all that they change."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.state = {parameter: part.state[parameter] for part in parts for parameter in part.param_groups[0]["params"]}

    def step(self) -> None:
        """A step of each."""
        for part in self.parts:
            part.step()


def adamw(arena: Arena, rates: Mapping[str, float], decays: Decays, records: bool) -> FlatOptimizer:
    """Make AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), its moments in two flat tensors.

    Args:
        arena: What is trained.
        rates: The learning rate of each group.
        decays: The weight decay of each group.
        records: Whether steps may be recorded.

    Returns:
        The optimizer.
    """
    device = arena.flat.device
    groups = _groups(arena, rates, decays)
    if records:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, fused=fused, capturable=records)
    first, second = torch.zeros_like(arena.flat), torch.zeros_like(arena.flat)
    start = 0
    for parameter in arena.groups.values():
        part = slice(start, start := start + parameter.numel())
        on = device if fused else torch.device("cpu")
        steps = torch.zeros((), dtype=torch.float32, device=on)
        optimizer.state[parameter] = {"step": steps, "exp_avg": first[part], "exp_avg_sq": second[part]}
    return FlatOptimizer(arena, optimizer, {"first_moment": first, "second_moment": second}, records)


def adamw8bit(arena: Arena, rates: Mapping[str, float], decays: Decays, records: bool) -> FlatOptimizer:
    """Make AdamW with moments of 8 bits in groups of 256 (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861).

    Args:
        arena: What is trained; groups of fewer than 4096 numbers have moments of 32 bits.
        rates: The learning rate of each group.
        decays: The weight decay of each group.
        records: Whether steps may be recorded.

    Returns:
        The optimizer.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise _missing("adamw8bit") from None
    optimizer = AdamW8bit(_groups(arena, rates, decays))
    kept: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(arena.groups.items()):
        # Its own first step would do this; here, so that there is a state to fill before it.
        optimizer.init_state(optimizer.param_groups[number], parameter, number, 0)
        kept |= _named(name, optimizer.state[parameter], ("state1", "state2", "absmax1", "absmax2"))
    return FlatOptimizer(arena, optimizer, kept)


def prodigy(arena: Arena, rates: Mapping[str, float], decays: Decays, records: bool) -> FlatOptimizer:
    """Make Prodigy (Mishchenko and Defazio 2023, https://arxiv.org/abs/2306.06101), for each group by itself.

    Args:
        arena: What is trained.
        rates: Factors of the rate that it finds, for each group.
        decays: The weight decay of each group.
        records: Whether steps may be recorded.

    Returns:
        The optimizer.

    Raises:
        UserError: prodigyopt is not installed.
    """
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise _missing("prodigy") from None
    parts: list[torch.optim.Optimizer] = []
    kept: dict[str, Tensor] = {}
    for (name, parameter), group in zip(arena.groups.items(), _groups(arena, rates, decays), strict=True):
        part = Prodigy([parameter], lr=group["lr"], use_bias_correction=True, safeguard_warmup=True)
        part.param_groups[0]["weight_decay"] = group["weight_decay"]  # given at first, it would print a line
        zeros = {key: torch.zeros_like(parameter.data) for key in ("exp_avg", "exp_avg_sq", "s")}
        part.state[parameter] = {"step": 0, "p0": parameter.detach().clone(), **zeros}
        kept |= _named(name, part.state[parameter], ("p0", *zeros))
        parts.append(part)
    return CountingOptimizer(arena, Each(parts), kept, ("k", "d", "d_max", "d_numerator"))


def schedule_free(arena: Arena, rates: Mapping[str, float], decays: Decays, records: bool) -> FlatOptimizer:
    """Make schedule-free AdamW (Defazio et al. 2024, https://arxiv.org/abs/2405.15682).

    Args:
        arena: What is trained.
        rates: The learning rate of each group.
        decays: The weight decay of each group.
        records: Whether steps may be recorded.

    Returns:
        The optimizer.

    Raises:
        UserError: schedulefree is not installed.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise _missing("schedule-free") from None
    optimizer = AdamWScheduleFree(_groups(arena, rates, decays))
    optimizer.train()
    kept = {"z": arena.flat.detach().clone(), "second_moment": torch.zeros_like(arena.flat)}
    start = 0
    for parameter in arena.groups.values():
        part = slice(start, start := start + parameter.numel())
        optimizer.state[parameter] = {"z": kept["z"][part], "exp_avg_sq": kept["second_moment"][part]}
    return ScheduleFree(arena, optimizer, kept, ("k", "weight_sum", "lr_max"))


def of_library(name: OptimizerName, kind: str, groups: Grouping, options: Mapping[str, Any]) -> Build:
    """Choose an optimizer of pytorch-optimizer, whose state is made at once, so that there is one to fill before a step.

    Args:
        name: What a person calls it.
        kind: The name of its class there.
        groups: How the arena is given to it: whole, or the parameters themselves.
        options: What it takes beside groups.

    Returns:
        What makes it, and raises UserError where pytorch-optimizer is not installed.
    """

    def build(arena: Arena, rates: Mapping[str, float], decays: Decays, records: bool) -> FlatOptimizer:
        check_optimizer(name)
        import pytorch_optimizer

        optimizer = getattr(pytorch_optimizer, kind)(groups(arena, rates, decays), **options)
        kept: dict[str, Tensor] = {}
        for group_name, group in zip(arena.groups, optimizer.param_groups, strict=True):
            optimizer.init_group(group)
            for number, parameter in enumerate(group["params"]):
                state = optimizer.state[parameter]
                kept |= _named(f"{group_name}.{number}", state, [key for key in state if isinstance(state[key], Tensor)])
        return CountingOptimizer(arena, optimizer, kept, ("step",))

    return build


def prodigy_plus(arena: Arena, rates: Mapping[str, float], decays: Decays, records: bool) -> FlatOptimizer:
    """Make Prodigy with schedule-free averaging (https://github.com/LoganBooker/prodigy-plus-schedule-free), by groups.

    Args:
        arena: What is trained.
        rates: Factors of the rate that it finds, for each group.
        decays: The weight decay of each group.
        records: Whether steps may be recorded.

    Returns:
        The optimizer.

    Raises:
        UserError: prodigy-plus-schedule-free is not installed.
    """
    try:
        from prodigyplus import ProdigyPlusScheduleFree
    except ImportError:
        raise _missing("prodigy-plus") from None
    optimizer = ProdigyPlusScheduleFree(_groups_of_members(arena, rates, decays))
    kept: dict[str, Tensor] = {"z": arena.flat.detach().clone()}
    counted = ("d", "d_prev", "d_denom", "d_numerator", "prev_d_numerator", "max_d_numerator", "weight_sum")
    for name, group in zip(arena.groups, optimizer.param_groups, strict=True):
        group.update({key: float(group.get(key, 0)) for key in counted})
        for number, parameter in enumerate(group["params"]):
            state = optimizer.initialise_state(parameter, group)
            state["z"] = arena.view_in(kept["z"], parameter)
            state["p0"] = state["p0"].expand_as(state["s"]).clone()  # of a parameter of zeros it is one number
            kept |= _named(
                f"{name}.{number}", state, [key for key in state if isinstance(state[key], Tensor) and key != "z"]
            )
    return ScheduleFree(arena, optimizer, kept, ("k", *counted))


# The package that an optimizer needs, and the extra of this one that brings it.
_PACKAGES: dict[OptimizerName, tuple[str, str]] = {
    "adamw8bit": ("bitsandbytes", "quantize"),
    "adafactor": ("pytorch_optimizer", "optimizers"),
    "lion": ("pytorch_optimizer", "optimizers"),
    "came": ("pytorch_optimizer", "optimizers"),
    "prodigy-plus": ("prodigyplus", "optimizers"),
    "prodigy": ("prodigyopt", "optimizers"),
    "schedule-free": ("schedulefree", "optimizers"),
}


def check_optimizer(name: OptimizerName) -> None:
    """See that the package of an optimizer is there.

    Args:
        name: The optimizer.

    Raises:
        UserError: It is not installed.
    """
    if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name][0]) is None:
        raise _missing(name)


def _missing(name: OptimizerName) -> UserError:
    package, extra = _PACKAGES[name]
    return UserError(
        f"--optimizer {name} needs the package {package}, which is not installed; install it with"
        f" pip install 'peft_diffusion[{extra}]', or take adamw, which needs nothing"
    )


def _groups(arena: Arena, rates: Mapping[str, float], decays: Decays) -> list[dict[str, Any]]:
    return [
        {"params": [parameter], "lr": rates[name], "weight_decay": decays[name]} for name, parameter in arena.groups.items()
    ]


def _groups_of_members(arena: Arena, rates: Mapping[str, float], decays: Decays) -> list[dict[str, Any]]:
    """For optimizers that look at rows and columns: the parameters themselves, which are views of the arena."""
    return [
        {"params": list(parameters), "lr": rates[name], "weight_decay": decays[name]}
        for name, parameters in arena.members.items()
    ]


def _named(group: str, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Those tensors of a state that are there."""
    return {f"{group}.{name}": state[name] for name in names if name in state}


_ADAFACTOR = {"betas": (None, 0.999), "relative_step": False, "scale_parameter": False}
OPTIMIZERS: dict[OptimizerName, Build] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    # Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235, at the rates that are given, not its own.
    "adafactor": of_library("adafactor", "AdaFactor", _groups_of_members, _ADAFACTOR),
    "lion": of_library("lion", "Lion", _groups, {}),  # Chen et al. 2023, https://arxiv.org/abs/2302.06675
    "came": of_library("came", "CAME", _groups_of_members, {}),  # Luo et al. 2023, https://arxiv.org/abs/2307.02047
    "prodigy-plus": prodigy_plus,
    "prodigy": prodigy,
    "schedule-free": schedule_free,
}
"""A line for each; the names are those of ``config.OptimizerName``, which the flag is made of."""
