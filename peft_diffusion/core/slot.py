"""The slot of a module: the one place on it where everything of this package sits, and how the adapters there run."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import changes
from .adapter import Adapter, AdapterDict, begin
from .component import ComponentState
from .slab import SiteView, Slab
from .strength import Strengths, recording

SLOT = "_peft_diffusion"
"""The name of the child module that a slot is: the only name that this package takes on a module of a base."""


class Packed:
    """The low-rank adapters of a site as one pair: three operations, however many adapters there are. It is a part of the
    component's slab.
    """

    __slots__ = ("_slab", "place")

    def __init__(self, slab: Slab, place: int) -> None:
        self._slab = slab
        self.place = place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed) and self._slab is other._slab and self.place == other.place

    def __hash__(self) -> int:
        return hash((id(self._slab), self.place))

    @property
    def view(self) -> SiteView:
        """What the site sees of the slab."""
        found = self._slab.views[self.place]
        if found is None:
            raise IndexError("the site has no region any more")
        return found

    @property
    def down(self) -> Tensor:
        """(room, in, ...)."""
        return self.view.down

    @property
    def up(self) -> Tensor:
        """(out, room)."""
        return self.view.up.t()

    @property
    def rows(self) -> Tensor:
        """(room,): the row of each rank in ``Strengths.values``."""
        return self.view.rows


class Slot(nn.Module):
    """What a site carries. The state dict of the base leaves it out: an adapter has its own file.

    Attributes:
        adapters: The adapters by name, in the order of attachment, in which they run.
        component: What the whole component carries; every slot of a component has the same object.
        packed: The low-rank adapters as one pair, where ``site.pack`` made one.
        place: The place of the site in the slab of the component; None where it has none.
        block: The index of the block that the site lies in, of ``Strengths.blocks``.
        unmerged: The weights before a merge, by the name that ``core.merge`` gives them; empty where nothing is merged.
            They are here so that a copy of the model has its own.
        merged: By the same names, samples of what the merge wrote, which tell whether anybody has changed it since.
    """

    adapters: AdapterDict
    component: ComponentState
    packed: Packed | None
    place: int | None
    block: int
    unmerged: dict[str, Tensor]
    merged: dict[str, Tensor]

    def __init__(self, component: ComponentState, block: int) -> None:
        begin(self)
        # Not by nn.Module.__setattr__, which looks through all kinds of members each time: a network has hundreds of sites.
        self._modules.update(adapters=AdapterDict(), component=component)
        vars(self).update(packed=None, place=None, block=block, unmerged={}, merged={})

    @property
    def held(self) -> AdapterDict:
        """``adapters``, several times faster, for what goes through all sites."""
        return cast(AdapterDict, self._modules["adapters"])

    @property
    def state(self) -> ComponentState:
        """``component``, several times faster, likewise."""
        return cast(ComponentState, self._modules["component"])

    def run_as(self, packed: Packed | None, place: int | None) -> None:
        """Run the adapters as one pair, or each by itself.

        Args:
            packed: The pair; None for none.
            place: The place of the site in the slab; None for none.
        """
        vars(self).update(packed=packed, place=place)  # as in __init__

    @property
    def strengths(self) -> Strengths:
        """Those of all adapters of the component."""
        return self.component.strengths

    def prepare(self, x: Tensor) -> Tensor:
        """Change what the site itself is given: see ``Adapter.prepare``.

        Args:
            x: What the site was called with.

        Returns:
            What it is given in place of that, of the same shape.
        """
        for adapter in self.adapters.built():
            x = adapter.prepare(x)
        return x

    def whole(self, site: nn.Module, x: Tensor) -> Tensor | None:
        """The site's output with its change, from the fast path in use.

        Args:
            site: The module whose slot this is.
            x: What the site was given, (batch, ...).

        Returns:
            None where no fast path serves this; the site then runs by itself, and ``changed`` changes what it gives.
        """
        path = _FastPaths.present
        return None if path is None else path.output(site, self, x)

    def sole_adapter(self) -> "Sole | None":
        """The adapter here, if it is the only one, on, trained, and has one strength for all images.

        Returns:
            The adapter with its strength; None where any of that does not hold.
        """
        strengths = self.strengths
        if len(self.adapters) != 1 or strengths.merged or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        ((name, adapter),) = self.adapters.items()
        if strengths.images != 1 or name not in strengths.active:
            return None
        return Sole(name, adapter, strengths, strengths.values[strengths.index(name), self.block])

    def changed(self, site: nn.Module, x: Tensor, y: Tensor, named: Mapping[str, Any]) -> Tensor:
        """Change the output of a site by every adapter whose strength is not 0.

        Args:
            site: The module whose slot this is.
            x: What the site was given, (batch, ...).
            y: What it made of it, (batch, ...).
            named: What else it was given by name, such as a mask.

        Returns:
            The new output, of the shape of ``y``.
        """
        strengths = self.strengths
        if strengths.merged:
            return y
        # A graph outlives the strengths that it was made with, so it holds every adapter; eager runs skip the idle ones.
        recorded = torch.compiler.is_compiling() or recording()
        if self.packed is not None and not torch.is_grad_enabled():
            return self._run_packed(self.packed, site, x, y) if recorded or strengths.active else y
        base = y
        for name, adapter in self.adapters.items():
            if recorded or name in strengths.active:
                y = adapter.run(x, y, strengths.spread(strengths.index(name), self.block, y), base, named)
        return y

    def _run_packed(self, packed: Packed, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        down, up, rows = packed.view
        down, up = down.to(x.dtype), up.to(x.dtype)  # no copies, but where x is not what pack() expected
        if isinstance(site, nn.Conv2d):
            hidden = site._conv_forward(x, down, None)
            return y + F.conv2d(hidden * self.strengths.spread(rows, self.block, hidden), up.t()[:, :, None, None])
        hidden = F.linear(x, down)
        return y + hidden * self.strengths.spread(rows, self.block, hidden, channels_first=False) @ up

    def follow(self, device: torch.device) -> None:
        """Bring all that is here to where the site computes, and leave it there: it is small beside what is offloaded.

        Offloading layer by layer moves the weights of a site for each call, and leaves a slot alone: see `named_children`.
        Offloading by groups finds buffers in the slot and puts other memory under them.

        Args:
            device: Where the input of the site lies.
        """
        if any(tensor.device != device for tensor in itertools.chain(self.parameters(), self.buffers())):
            self.to(device)
        if self.packed is not None:
            self.component.slab.follow()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Name nothing. What walks a model by the names of its children looks for layers to move elsewhere or to replace.

        accelerate's sequential offloading does: it would put the weights of adapters on ``meta``, and look for them in the
        state dict, which does not have them. `children`, by which torch moves a model, gives them all.

        Returns:
            Nothing.
        """
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        """Give the modules in here, for torch to move them and to set their mode.

        Yields:
            Each once.
        """
        yield from (module for module in self._modules.values() if module is not None)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Give nothing, so that the base's state dict has no key of ours.

        Args:
            destination: What torch collects the tensors of a model in.
            prefix: The path of this module there.
            keep_vars: Of torch.

        Returns:
            The same destination, or an empty dict.
        """
        return {} if destination is None else destination


class Sole(NamedTuple):
    """The only adapter of a site: its name, and its strength, (1,), among the component's strengths."""

    name: str
    adapter: Adapter
    strengths: Strengths
    strength: Tensor

    @property
    def full(self) -> bool:
        """Whether its strength is 1, without asking the device."""
        return self.name in self.strengths.full


class FastPath(Protocol):
    """Code that computes a site and its only adapter in one. It lies above this package, which knows nothing of it."""

    def output(self, site: nn.Module, slot: Slot, x: Tensor) -> Tensor | None:
        """Compute the new output of a site, with its adapters.

        Args:
            site: The site.
            slot: Its slot.
            x: What it was called with.

        Returns:
            The output; None where this call is none that the fast path knows.
        """


class _FastPaths:
    present: FastPath | None = None


@contextmanager
def using(path: FastPath) -> Iterator[None]:
    """Take a fast path inside, in every thread: a backward pass that computes again has one of its own.

    Args:
        path: What every adapted site asks first.

    Yields:
        Once, while it is in use.
    """
    before, _FastPaths.present = _FastPaths.present, path
    try:
        yield
    finally:
        _FastPaths.present = before


def slot_of(module: nn.Module) -> Slot | None:
    """Find the slot of a module.

    Args:
        module: Any module of a base.

    Returns:
        The slot; None where it carries no adapter.
    """
    found = module._modules.get(SLOT)
    return found if isinstance(found, Slot) else None


def walk(component: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules of a base, without what adapters brought, each once and those around before those inside.

    This is what ``named_modules`` does, several times faster: a network of thousands of modules is walked for every change.

    Args:
        component: The module to begin at.

    Returns:
        Paths, "" for the component itself, and modules.
    """
    seen = changes.seen()
    if seen is None:
        return iter(_found(component))
    found = seen.modules.get(component)
    if found is None:
        found = seen.modules[component] = _found(component)
    return iter(found)


def _found(component: nn.Module) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    waiting, seen = [("", component)], set[nn.Module]()
    while waiting:
        path, module = one = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append(one)
        held = module._modules
        if held:
            start = f"{path}." if path else ""
            for name, child in reversed(held.items()):
                if child is not None and (name != SLOT or not isinstance(child, Slot)):
                    waiting.append((start + name, child))
    return found


def state_of(component: nn.Module) -> ComponentState | None:
    """Find what a component carries.

    Args:
        component: The module.

    Returns:
        Its state; None where it carries no adapter.
    """
    seen = changes.seen()
    if seen is None:
        return _state(component)
    if component not in seen.states:
        found = seen.modules.get(component)
        seen.states[component] = _state(component) if found is None else _state_in(found)
    return seen.states[component]


def _state_in(modules: list[tuple[str, nn.Module]]) -> ComponentState | None:
    """What the first slot of these tells: where they are known, the component need not be gone through again."""
    for _, module in modules:
        slot = module._modules.get(SLOT)
        if isinstance(slot, Slot):
            return slot.state
    return None


def _state(component: nn.Module) -> ComponentState | None:
    """What the first slot tells that comes up. This makes no paths, as `walk` does: to set a strength takes little else."""
    waiting = [component]
    while waiting:  # in no order: all slots of a component have the same
        held = waiting.pop()._modules
        if held:
            slot = held.get(SLOT)
            if isinstance(slot, Slot):
                return slot.state
            waiting.extend(child for child in held.values() if child is not None)
    return None
