"""Named sets of sites: the modules of a component that a target names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import nn

from . import block_names
from .errors import UserError, did_you_mean
from .parsing import compiled_for, matching
from .slot import walk
from .target_tables import TABLES, UNKNOWN, TargetTable

OTHER_BLOCK = "other"

# Output layers over the vocabulary: no kind of modules takes them in. They are large, and often share their weight with the
# token embedding, so that nothing can be merged into them. An expression may still name them.
HEADS: frozenset[str] = frozenset(("lm_head", "embed_out"))

# Targets that are kinds of modules, the same in every architecture.
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "all-linear": (nn.Linear,),
    "conv": (nn.Conv2d,),
    "all": (nn.Linear, nn.Conv2d),
    "norms": (nn.GroupNorm, nn.LayerNorm),
    "biases": (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm),
}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a component: their names, and which one a path lies in."""

    names: tuple[str, ...]
    pattern: str

    def of(self, path: str) -> int:
        """Find the block that a module lies in.

        Args:
            path: The path of the module.

        Returns:
            The index of the block among ``names``, and of a layer that is among them itself.
        """
        found = _within(self.pattern, path)
        own = None if found is None else self._places.get("".join(found))
        return self._places[OTHER_BLOCK if found is None else found[0]] if own is None else own

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def architecture(component: nn.Module) -> str:
    """Name what the tables know a component by: its class, before it was sharded.

    Args:
        component: The module.

    Returns:
        The name of the class.
    """
    return type(component).__name__.removeprefix("FSDP")  # what torch's fully_shard puts before it


def table(component: nn.Module) -> TargetTable:
    """Say what targets mean in a component.

    Args:
        component: The module.

    Returns:
        Its table; one without names for an architecture that is not known.
    """
    return TABLES.get(architecture(component), UNKNOWN)


def modules(component: nn.Module) -> dict[str, nn.Module]:
    """List every module of the base, without what adapters brought.

    Args:
        component: The module to look in.

    Returns:
        The modules by path; "" is the component itself.
    """
    return dict(walk(component))


@lru_cache(maxsize=20_000)
def _within(pattern: str, path: str) -> tuple[str, str] | None:
    """The name of the block that a path lies in, and what of the path follows; None for one that lies in none."""
    match = re.fullmatch(pattern, path)
    return (match[1], path[match.end(1) :]) if match else None


def blocks(component: nn.Module, *, parts: bool = False) -> Blocks:
    """List the blocks of a component, in the order of its modules; whatever lies in none is in ``other``.

    Args:
        component: The module to look in.
        parts: Whether to list the parts of blocks that take a strength of their own.

    Returns:
        The blocks.
    """
    return _blocks(_pattern(component, parts), modules(component))


def _pattern(component: nn.Module, parts: bool) -> str:
    own = table(component)
    return (own.part if parts else "") or own.block


def _blocks(pattern: str, paths: Iterable[str]) -> Blocks:
    found = (_within(pattern, path) for path in paths)
    return Blocks((*dict.fromkeys(one[0] for one in found if one is not None), OTHER_BLOCK), pattern)


def units(component: nn.Module, found: Mapping[str, nn.Module]) -> Blocks:
    """List what takes a strength of its own: the parts of blocks, and in them each Linear layer and convolution.

    Args:
        component: The module to look in.
        found: All its modules, by path.

    Returns:
        The parts, and behind them the layers, named as the part that they lie in and the rest of their path.
    """
    layers = KINDS["all"]
    own = tuple(path for path, module in found.items() if isinstance(module, layers))
    return _units(_pattern(component, parts=True), tuple(found), own)


@lru_cache(maxsize=32)  # asked with every change, of a few networks
def _units(pattern: str, paths: tuple[str, ...], layers: tuple[str, ...]) -> Blocks:
    """See `units`: the blocks that an expression finds in paths, of which some are of layers."""
    parts = _blocks(pattern, paths)
    own = (_within(pattern, path) for path in layers)
    return Blocks(tuple(dict.fromkeys((*parts.names, *("".join(one) for one in own if one is not None)))), pattern)


def check(target: str) -> None:
    """See that a target is a name that some architecture has, or an expression; for the time before there is a component.

    Args:
        target: As `match` takes it.

    Raises:
        UserError: It is neither.
    """
    layers = parted(target)[0]
    if layers not in KINDS and not any(layers in one.targets for one in TABLES.values()):
        compiled_for(layers, "target")


def parted(target: str) -> tuple[str, tuple[str, ...]]:
    """Part a target into the layers that it names and the blocks in which they lie.

    Args:
        target: ``LAYERS``, or ``LAYERS@BLOCK,BLOCK``.

    Returns:
        The layers, and the blocks; none where all are meant.
    """
    layers, _, within = target.partition("@")
    return layers, tuple(block for one in within.split(",") if (block := one.strip()))


def match(component: nn.Module, target: str) -> list[str]:
    """Find the modules that a target names.

    Args:
        component: The module to look in.
        target: A name that the architecture or ``KINDS`` knows (the former first), or a regular expression that a path
            matches in full. Behind an @ may stand the blocks in which the modules lie, as strengths name them, with commas.

    Returns:
        Their paths, in the order of the component.

    Raises:
        UserError: It matches nothing, is no valid expression, or one that may try without end.
    """
    paths = modules(component)
    own = table(component).targets
    layers, within = parted(target)
    if layers in KINDS and layers not in own:
        found = [path for path, module in paths.items() if isinstance(module, KINDS[layers]) and path not in HEADS]
    else:
        found = matching(own.get(layers, layers), [path for path in paths if path], "target")
    if within:
        places = units(component, paths)
        lost = block_names.unknown(dict.fromkeys(within), places.names)
        if lost:
            there = block_names.shown(places.names)
            raise UserError(f"the target {target!r} names no block {', '.join(lost)}; there are: {there}")
        meant = block_names.weighed(dict.fromkeys(within), places.names)
        found = [path for path in found if places.names[places.of(path)] in meant]
    if not found:
        near = did_you_mean(target, [*own, *KINDS])
        raise UserError(f"no module of {architecture(component)} matches the target {target!r}{near}; {_offer(component)}")
    return found


def _offer(component: nn.Module) -> str:
    """What there is to choose from, in a line."""
    names = dict.fromkeys([*table(component).targets, *KINDS])
    examples = [path for path, module in modules(component).items() if isinstance(module, KINDS["all"])]
    shapes = dict.fromkeys(re.sub(r"\d+", "N", path) for path in examples)
    shown = ", ".join(list(shapes)[:12])
    return f"names: {', '.join(names)}; modules, N for a number: {shown}{', ...' if len(shapes) > 12 else ''}"
