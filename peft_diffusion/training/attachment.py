"""The adapter that a run trains: put on a base's components, named in words, and taken off again."""

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..bases import LanguageModel, components, denoiser_of
from ..bases import family as families
from ..bases.base import Base
from ..bases.words import with_initial_tokens
from ..core import block_names, site, targets
from ..core.adapter import Adapter
from ..core.arena import side_by_side
from ..core.errors import UserError, did_you_mean
from ..core.method import Method
from ..core.wording import number_of
from ..formats import Spec
from .loop.seeds import global_seed
from .settings.placements import Placement

NAME = "trained"  # of the adapter, while it is


@dataclass(frozen=True)
class Attached:
    """A fresh adapter's parameters and learning rates by the name of their group; ``undecayed`` are not pulled towards 0,
    and ``owners`` tells the component of each group."""

    groups: dict[str, list[nn.Parameter]]
    rates: dict[str, float]
    undecayed: frozenset[str]
    owners: dict[str, str]


def attach(
    parts: Mapping[str, nn.Module],
    blocks: Sequence[Placement],
    seed: int,
    rate_of: Callable[[str], float],
    block_rates: Mapping[str, float] = MappingProxyType({}),
) -> Attached:
    """Put a fresh adapter on every component, and its parameters into one arena.

    Args:
        parts: The components, by name.
        blocks: Which method is trained at which sites.
        seed: What the chance of the beginning comes from.
        rate_of: Gives the learning rate of a component; one of a placement's own goes before it.
        block_rates: Learning rates by the name of a block of the network, which go before both.

    Returns:
        What is trained, at which rates.

    Raises:
        UserError: A component has no block, a target matches nothing, or two methods cannot stand together at a site.
    """
    groups: dict[str, list[tuple[str, list[nn.Parameter]]]] = {}
    rates: dict[str, float] = {}
    undecayed: set[str] = set()
    owners: dict[str, str] = {}
    if block_rates:
        _refuse_unknown_blocks(parts.values(), block_rates)
    for name, part in parts.items():
        own = _of(name, blocks)
        with global_seed(torch.device("cpu"), seed, "start", name):
            built = site.attach_all(part, NAME, [(block.method, block.target) for block in own])
        named = targets.blocks(part, parts=True) if block_rates else None
        meant = {} if named is None else block_names.weighed(block_rates, named.names)
        for number, (block, adapters) in enumerate(zip(own, built, strict=True)):
            decayed = block.method.decayed
            group = name if block.rate is None and decayed else f"{name}.{number}"
            rate = rate_of(name) if block.rate is None else block.rate
            for path, adapter in adapters.items():
                at = None if named is None else meant.get(named.names[named.of(path)])
                adapter.train()  # the base stays in eval mode; dropout belongs to the adapter
                for times, parameters in adapter.by_rate().items():
                    own_group = group if at is None else f"{group} {at}"
                    own_group = own_group if times == 1 else f"{own_group} x{times:.9g}"
                    rates[own_group] = times * (rate if at is None else block_rates[at])
                    owners[own_group] = name
                    if not decayed:
                        undecayed.add(own_group)
                    groups.setdefault(own_group, []).append((path, parameters))
    return Attached({name: side_by_side(sites) for name, sites in groups.items()}, rates, frozenset(undecayed), owners)


def _refuse_unknown_blocks(parts: Iterable[nn.Module], block_rates: Mapping[str, float]) -> None:
    """Raise UserError for a name that means no block of what is trained."""
    there = [block for part in parts for block in targets.blocks(part, parts=True).names]
    lost = block_names.unknown(block_rates, there)
    if lost:
        raise UserError(f"--block-lr {lost[0]}: there is no such block; there are {block_names.shown(there)}")


def check_placements(parts: Mapping[str, nn.Module], blocks: Sequence[Placement]) -> None:
    """See that all components are trained, every method serves what its target names, and those that meet go together.

    `attach` finds the same. This is for the time before anything is computed that such a mistake would waste.

    Args:
        parts: The components, by name.
        blocks: Which method is trained at which sites.

    Raises:
        UserError: A component has no block, a target matches nothing that its method serves, or two methods cannot stand
            together at a site.
    """
    for name, part in parts.items():
        site.check_attachable(part, [(block.method, block.target) for block in _of(name, blocks)])


def _of(component: str, blocks: Sequence[Placement]) -> list[Placement]:
    """The placements of a component. Raises UserError where there is none."""
    found = [block for block in blocks if block.component == component]
    if not found:
        raise UserError(f"no --block trains {component}; leave it out of --components")
    return found


def selected_components(base: Base, names: Sequence[str]) -> dict[str, nn.Module]:
    """Pick components of a base by name.

    Args:
        base: The pipeline or language model.
        names: Those that are trained.

    Returns:
        The components by name, in the order of the base.

    Raises:
        UserError: The base has no such component.
    """
    there = components(base)
    absent = [name for name in names if name not in there]
    if absent:
        raise UserError(f"--components {','.join(absent)}: this base has {', '.join(there)}{did_you_mean(absent[0], there)}")
    return {name: part for name, part in there.items() if name in names}


def with_words(base: Base, blocks: Sequence[Placement]) -> list[Placement]:
    """Complete placements by what the base is.

    Methods that learn words get the ids that these begin as: see `bases.words.with_initial_tokens`. Blocks of targets are
    named as the network does, in place of what they are known for, so that a file tells them whatever reads it.

    Args:
        base: The pipeline or language model.
        blocks: Which method is trained at which sites.

    Returns:
        The same, with both.

    Raises:
        UserError: A target names what blocks of other families alone are known for.
    """
    return [
        replace(block, method=with_initial_tokens(base, block.component, block.method), target=_target(base, block))
        for block in blocks
    ]


def _target(base: Base, block: Placement) -> str:
    layers, within = targets.parted(block.target)
    if not within or isinstance(base, LanguageModel) or families.role_of(block.component) != "denoiser":
        return block.target
    return f"{layers}@{','.join(denoiser_of(base).family.meant(dict.fromkeys(within)))}"


def new_words(blocks: Sequence[Placement]) -> list[str]:
    """List the words that placements teach the tokenizers.

    Args:
        blocks: The placements.

    Returns:
        The words.
    """
    return [word for block in blocks for word in block.method.new_words()]


def described(parts: Mapping[str, nn.Module], blocks: Sequence[Placement], parameters: int) -> str:
    """Describe the adapter that was attached.

    Args:
        parts: Components by name.
        blocks: The placements.
        parameters: How many are trained.

    Returns:
        Methods, layers and parameters in words.
    """
    layers = sum(len(site.adapters(part, NAME)) for part in parts.values())
    names = ", ".join(dict.fromkeys(named(block.method) for block in blocks))
    return f"{names}: {number_of(layers, 'layer')}, {parameters:,} parameters"


def named(method: Method) -> str:
    """Name a method with its rank, if it has one.

    Args:
        method: The method.

    Returns:
        In words.
    """
    rank = getattr(method, "rank", None)
    return method.name if rank is None else f"{method.name} of rank {rank}"


def triggers(trigger: str, blocks: Sequence[Placement]) -> list[str]:
    """List the words that call an adapter.

    Args:
        trigger: The setting; ``{}`` in it stands for a caption.
        blocks: The placements.

    Returns:
        The words of the trigger, and those that were taught.
    """
    parts = trigger.split("{}")
    return list(dict.fromkeys((*(words for part in parts if (words := part.strip(" ,;:"))), *new_words(blocks))))


def trained(steps: int, seconds: float, before: float | None, after: float | None) -> dict[str, Any]:
    """Say how an adapter was trained, beside the settings.

    Args:
        steps: Those done.
        seconds: That it took.
        before: The loss on what was kept apart before the first step; None where nothing was.
        after: That loss of these weights.

    Returns:
        Entries of the training summary of a spec, with the present time.
    """
    return {
        "steps_done": steps,
        "seconds": round(seconds, 1),
        "held_out_loss": after,
        "held_out_loss_before": before,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def spec_of(
    parts: Iterable[str],
    blocks: Sequence[Placement],
    base: Mapping[str, Any],
    triggers: Sequence[str],
    training: Mapping[str, Any],
    title: str,
) -> Spec:
    """Write what an adapter file says of itself.

    Args:
        parts: The names of the components that carry the adapter.
        blocks: The placements.
        base: What is known of the base.
        triggers: The words that call the adapter.
        training: The training summary.
        title: What the file is called.

    Returns:
        The spec.
    """
    methods = {name: [block.spec() for block in blocks if block.component == name] for name in parts}
    return Spec(methods=methods, base=base, triggers=tuple(triggers), training=training, title=title)


@contextmanager
def evaluating(parts: Sequence[nn.Module], name: str = NAME) -> Iterator[None]:
    """Take the dropout from the adapter that is trained.

    Args:
        parts: The components.
        name: The adapter.

    Yields:
        Once; afterwards it is as it was.
    """
    adapters: list[Adapter] = [adapter for part in parts for adapter in site.adapters(part, name).values()]
    before = [adapter.training for adapter in adapters]
    for adapter in adapters:
        adapter.eval()
    try:
        yield
    finally:
        for adapter, training in zip(adapters, before, strict=True):
            adapter.train(training)


@contextmanager
def at_strength(parts: Iterable[nn.Module], name: str, value: float) -> Iterator[None]:
    """Put the adapter at a strength.

    Args:
        parts: The components.
        name: The adapter.
        value: The strength.

    Yields:
        Once; afterwards it is at 1, at which it is trained.
    """
    owners = [found for part in parts if (found := site.strengths(part)) is not None and name in found.names]
    try:
        for strengths in owners:
            strengths.write({name: value})
        yield
    finally:
        for strengths in owners:
            strengths.write({name: 1.0})
