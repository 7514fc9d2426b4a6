"""Sites: modules of a base that carry adapters, made by swapping the class of the module.

The swap renames no key of the base, saves nothing more for backward, and is seen by torch.compile; see ``attach``.
"""

import functools
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from . import changes, targets
from .adapter import Adapter, AdapterDict, Pair, StoredPair, chained
from .changes import one_at_a_time
from .component import ComponentState
from .errors import UserError, did_you_mean
from .method import DEFAULT_TARGET, Method
from .regions import RegionalNorm
from .slab import LivePair, Wanted
from .slot import SLOT, Packed, Slot, slot_of, state_of, walk
from .strength import Strengths


class AdaptedSite(nn.Module):
    """Mixed into the class of a module that carries adapters, which run in the order of attachment, each on the present y.

    It brings no name but the slot's, so that every attribute of the module and of its class is what it was.
    """

    _peft_diffusion: Slot

    def forward(self, input: Tensor | None = None, *more: Any, **named: Any) -> Any:
        """The site's own output, changed by each adapter whose strength is not 0.

        Attention takes more than one input; that of language models is told all by name, and returns its weights too.
        """
        slot = self._peft_diffusion
        x: Tensor = named.pop("hidden_states") if input is None else input
        if "forward" in vars(self):  # of a host that moves weights
            slot.follow(x.device)
        if not more and not named and (whole := slot.whole(self, x)) is not None:
            return whole
        result = super().forward(slot.prepare(x), *more, **named)
        if isinstance(result, tuple):
            return slot.changed(self, x, result[0], named), *result[1:]
        return slot.changed(self, x, result, named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy make it again from the one that it came from.
        # While pictures with regions are drawn, a norm is by region, which its copy is not to stay.
        cls = nn.GroupNorm if issubclass(base_class(self), RegionalNorm) else base_class(self)
        return _remade, (cls,), self.__getstate__()  # type: ignore[no-untyped-call]


@functools.cache
def _adapted(cls: Any) -> type[AdaptedSite]:
    # Under the same name: errors, and programs that place modules by the names of their classes, know the base's.
    return type(cls.__name__, (AdaptedSite, cls), {"__module__": cls.__module__})


def _remade(cls: type[nn.Module]) -> nn.Module:
    adapted = _adapted(cast(Hashable, cls))
    module: nn.Module = adapted.__new__(adapted)
    return module


def base_class(module: nn.Module) -> type[nn.Module]:
    """Tell the class that a module has, or had before it carried adapters.

    Args:
        module: Any module of a base.

    Returns:
        The class.
    """
    cls: type[nn.Module] = type(module).__mro__[2] if isinstance(module, AdaptedSite) else type(module)
    return cls


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether a module is a Linear with a weight that is not quantized, whatever it carries.

    Args:
        module: Any module of a base.

    Returns:
        Whether it is.
    """
    return base_class(module) is nn.Linear and type(module.weight) is nn.Parameter


def rebase(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class; one that carries adapters keeps them, over that class.

    Args:
        module: Any module of a base.
        cls: The class.
    """
    _turn(module, _adapted(cast(Hashable, cls)) if isinstance(module, AdaptedSite) else cls)


def _turn(module: nn.Module, cls: type[nn.Module]) -> None:
    """Swap a class. nn.Module.__setattr__ would first look for parameters and modules of that name."""
    object.__setattr__(module, "__class__", cls)


def sites(component: nn.Module, name: str | None = None) -> dict[str, AdaptedSite]:
    """Find the modules of a component that carry adapters.

    Args:
        component: The module to look in.
        name: Only those that carry this adapter.

    Returns:
        The modules by path.
    """
    found = {path: m for path, m in walk(component) if isinstance(m, AdaptedSite)}
    return found if name is None else {path: m for path, m in found.items() if name in _slot(m).held}


def slots(component: nn.Module, name: str | None = None) -> dict[str, Slot]:
    """Find what the sites of a component carry.

    Args:
        component: The module to look in.
        name: Only sites that carry this adapter.

    Returns:
        The slots by path.
    """
    return {path: _slot(site) for path, site in sites(component, name).items()}


def _slot(site: AdaptedSite) -> Slot:
    """What a site carries, several times faster than as an attribute."""
    return cast(Slot, site._modules[SLOT])


def strengths(component: nn.Module) -> Strengths | None:
    """Find the strengths of a component's adapters.

    Args:
        component: The module to look in.

    Returns:
        The strengths, which all sites share; None where there is no adapter.
    """
    state = state_of(component)
    return None if state is None else state.strengths


def adapters(component: nn.Module, name: str) -> dict[str, Adapter]:
    """Find what an adapter has at each site.

    Args:
        component: The module to look in.
        name: What the adapter is called.

    Returns:
        Its parts by the path of their site; empty where the component does not carry it.
    """
    return {path: slot.adapters[name] for path, slot in slots(component, name).items()}


def names(component: nn.Module) -> list[str]:
    """List the adapters of a component.

    Args:
        component: The module to look in.

    Returns:
        Their names in the order of attachment.
    """
    found = strengths(component)
    return list(found.names) if found else []


def attach(component: nn.Module, name: str, method: Method, target: str = DEFAULT_TARGET) -> list[str]:
    """Add a fresh adapter at every module that a target names, at strength 1.

    Args:
        component: The module that gets the adapter.
        name: What the adapter is called: letters, digits, _ and -.
        method: What it does at a site.
        target: A name of ``core.targets``, or a regular expression that paths match in full.

    Returns:
        The paths of the sites.

    Raises:
        UserError: The target matches no module that the method can serve, the name is taken or no good, or a module's
            forward is patched (offloading hooks), which the class could not reach. Nothing was changed then.
    """
    return list(attach_all(component, name, [(method, target)])[0])


def attach_all(component: nn.Module, name: str, methods: Sequence[tuple[Method, str]]) -> list[dict[str, Adapter]]:
    """Add one adapter of several methods, each at its own target; where they meet at a site they run in this order.

    Args:
        component: The module that gets the adapter.
        name: What the adapter is called.
        methods: Each method with its target.

    Returns:
        What each method built, by path.

    Raises:
        UserError: As `attach`.
    """
    found = targets.modules(component)
    built: list[dict[str, Adapter]] = []
    for method, target in methods:
        built.append({path: method.build(found[path]) for path in served(component, method, target)})
    together: dict[str, list[Adapter]] = {}
    for adapters in built:
        for path, adapter in adapters.items():
            together.setdefault(path, []).append(adapter)
    attach_built(component, name, {path: chained(parts) for path, parts in together.items()})
    return built


def served(component: nn.Module, method: Method, target: str) -> list[str]:
    """Find the modules that a method would be built on. Nothing is built.

    Args:
        component: The module to look in.
        method: What it would do at a site.
        target: As for `attach`.

    Returns:
        Their paths.

    Raises:
        UserError: The target matches nothing, or nothing that the method serves.
    """
    found, matched = targets.modules(component), targets.match(component, target)
    paths = [path for path in matched if method.serves(found[path])]
    if not paths:
        kinds = sorted({base_class(found[path]).__name__ for path in matched})
        raise UserError(f"method {method.name} cannot serve what the target {target!r} names: {', '.join(kinds)}")
    return paths


def check_attachable(component: nn.Module, methods: Sequence[tuple[Method, str]]) -> None:
    """See that `attach_all` would serve every target, and that a file could hold what meets at a site.

    Little is built: the methods that meet, at one site of each such meeting.

    Args:
        component: The module to look in.
        methods: Each method with its target.

    Raises:
        UserError: As `served`, or two methods cannot stand together at a site.
    """
    meeting: dict[str, list[int]] = {}
    for number, (method, target) in enumerate(methods):
        for path in served(component, method, target):
            meeting.setdefault(path, []).append(number)
    once = {tuple(numbers): path for path, numbers in meeting.items() if len(numbers) > 1}
    with torch.random.fork_rng(devices=[]):  # adapters start on the CPU
        for numbers, path in once.items():
            module = component.get_submodule(path)
            chained([methods[number][0].build(module) for number in numbers])


@one_at_a_time
def attach_built(component: nn.Module, name: str, built: Mapping[str, Adapter | StoredPair]) -> None:
    """Add adapters that were made elsewhere, such as loaded ones.

    Args:
        component: The module that gets them.
        name: What they are called together.
        built: One for each site, by path, or what a file holds of it.

    Raises:
        UserError: As `attach`. Nothing is left of it, nor where it is interrupted, or a device has no room.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"an adapter's name consists of letters, digits, _ and -; {name!r} does not")
    if name in names(component):
        raise UserError(f"an adapter {name!r} is attached already; remove it first or choose another name")
    state = state_of(component)
    if state is not None and state.strengths.merged:
        raise UserError("adapters are merged into the weights; unmerge them before you attach another")
    found = targets.modules(component)
    modules = {path: found[path] if path in found else component.get_submodule(path) for path in built}
    _check_free(modules)
    blocks = targets.units(component, found)
    _check_one_state(component, found.values(), blocks.names)
    state = state or ComponentState(blocks.names, _device(component))
    state.add(name)
    try:
        for path, module in modules.items():
            slot = slot_of(module) or _swap(module, state, blocks.of(path))
            adapter = built[path]
            if isinstance(adapter, StoredPair):
                slot.held.store(name, adapter, module)
            else:
                slot.held[name] = adapter.to(_device(module, component)).train(module.training)
                adapter.bind(module)
            slot.run_as(None, slot.place)
    except BaseException:
        _take_off(component, state, name)
        raise


@one_at_a_time
def exchange(component: nn.Module, name: str, stored: Mapping[str, StoredPair]) -> dict[str, StoredPair] | None:
    """Put other pairs in the places of those of an adapter.

    Args:
        component: The module that carries it.
        name: What it is called.
        stored: The new pairs, by path.

    Returns:
        The pairs that were there, by path; None, and nothing is changed, where they are at other sites than the new ones, or
        an adapter was built.

    Whatever ends it early, the pairs that were there are there again.
    """
    carriers = sites(component, name)
    held = {path: _slot(site).held for path, site in carriers.items()}
    before = {path: pair for path, adapters in held.items() if (pair := adapters.stored(name)) is not None}
    if not len(held) == len(before) == len(stored) or before.keys() != stored.keys():
        return None
    try:
        for path, adapters in held.items():
            adapters.exchange(name, stored[path])
        if not _rewritten(carriers, name, stored):
            _pack(component, carriers, name)
        next(iter(carriers.values()))._peft_diffusion.strengths.changes += 1
    except BaseException:  # as of a device that is full
        for path, adapters in held.items():
            adapters.exchange(name, before[path])
        unpack(component)
        pack(component)
        raise
    return before


@one_at_a_time
def detach(component: nn.Module, name: str) -> None:
    """Take an adapter away; a module without any has its own class, keys, attributes and bits again.

    Args:
        component: The module that it was attached to.
        name: What it is called.

    Raises:
        UserError: As `check_detach`. Nothing is changed then.
    """
    _take_off(component, check_detach(component, name), name)


def check_detach(component: nn.Module, name: str) -> ComponentState:
    """See that an adapter can be taken away.

    Args:
        component: The module that it was attached to.
        name: What it is called.

    Returns:
        What the component carries.

    Raises:
        UserError: There is no such adapter, it is merged, or a site's forward or class was changed since.
    """
    state = state_of(component)
    if state is None or name not in state.entries:
        there = names(component)
        raise UserError(
            f"no adapter {name!r} is attached; there are: {', '.join(there) or 'none'}{did_you_mean(name, there)}"
        )
    if state.strengths.merged:
        raise UserError("adapters are merged into the weights; unmerge them before you remove one")
    _check_free(sites(component, name))
    return state


def _take_off(component: nn.Module, state: ComponentState, name: str) -> None:
    left, vacated = list[int](), list[int]()
    for site in sites(component).values():
        slot = _slot(site)
        held = slot.held
        if name in held:
            del held[name]
            if slot.place is not None:
                (left if len(held) else vacated).append(slot.place)
        if not len(held):
            _restore(site)
    state.slab.vacate(vacated)
    state.slab.release(name, left)
    state.remove(name)
    if not state.entries:
        state.forget_words(component)


def freeze(component: nn.Module) -> None:
    """Take gradients and randomness from the base, and leave the adapters on it as they are: one may be in training.

    Args:
        component: The module.
    """
    for module in targets.modules(component).values():
        _set_training(module, False)
        for _, own in _own(module):
            own.requires_grad_(False)


@contextmanager
def frozen(components: Iterable[nn.Module]) -> Iterator[None]:
    """Freeze modules that are somebody's own, and give them back as they were: they may be in a training of his.

    Parameters are remembered by name, as sharding puts others in their place, which would be held in memory by that.

    Args:
        components: The modules.

    Yields:
        Once; afterwards each module is in the mode that it was in, and each parameter takes gradients if it did.
    """
    parts = list(components)
    modules = dict.fromkeys(module for part in parts for module in part.modules())
    before = [(one, one.training, {name: own.requires_grad for name, own in _own(one)}) for one in modules]
    for part in parts:
        freeze(part)
    try:
        yield
    finally:
        for module, training, wanted in before:
            _set_training(module, training)
            for name, own in _own(module):
                if own.requires_grad != wanted.get(name, own.requires_grad):
                    own.requires_grad_(wanted[name])


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters by name: what ``named_parameters`` gives of it, several times faster."""
    return ((name, own) for name, own in module._parameters.items() if own is not None)


def _set_training(module: nn.Module, training: bool) -> None:
    """Put a module into a mode. To set an attribute of one takes long, and most are in the mode that is wanted."""
    if module.training != training:
        module.training = training


@one_at_a_time
def pack(component: nn.Module) -> None:
    """Run the low-rank adapters of each site as one pair where no gradients are wanted.

    Copies the parameters: call it again when they change. Attaching undoes it at its sites.

    Args:
        component: The module that carries them.
    """
    _pack(component, sites(component))


def _pack(component: nn.Module, carriers: Mapping[str, AdaptedSite], exchanged: str | None = None) -> None:
    """Bring the slab to what sites carry. Of an adapter that was exchanged all is new, of others what is not packed yet."""
    state = next((_slot(site).component for site in carriers.values()), None)
    if state is None:
        return
    wanted, new = _wanted(component, state, carriers, exchanged)
    try:
        places = state.slab.hold(wanted, [one for _, one in new])
    except BaseException:  # as of a device that is full: nothing is known of what was written
        unpack(component)
        raise
    for (slot, _), place in zip(new, places, strict=True):
        slot.run_as(Packed(state.slab, place), place)


def _rewritten(carriers: Mapping[str, AdaptedSite], name: str, stored: Mapping[str, StoredPair]) -> bool:
    """Write new pairs of an adapter over the old ones; False, and nothing is written, where there is more to do."""
    pairs: dict[int, StoredPair] = {}
    slab = None
    for path, site in carriers.items():
        slot, pair = _slot(site), stored[path]
        place, slab = slot.place, slot.state.slab
        if place is None or slot.packed is None or len(slot.held.unbuilt) != len(slot.held):
            return False
        if slab.ranks(place, name) != pair.rank or slab.computes(place) != _precision(site):
            return False
        pairs[place] = pair
    if slab is None:
        return False
    slab.rewrite(name, pairs)
    return True


def _precision(site: nn.Module) -> torch.dtype | None:
    """The dtype of the first of its own parameters that is numbers, not codes; None where there is none."""
    for own in site._parameters.values():
        if own is not None and own.dtype.is_floating_point:
            return own.dtype
    return None


def _wanted(
    component: nn.Module, state: ComponentState, carriers: Mapping[str, AdaptedSite], exchanged: str | None
) -> tuple[dict[int, Wanted], list[tuple[Slot, Wanted]]]:
    """What is yet to come into a slab, by place, and for the slots that have none."""
    usual: list[torch.dtype] = []

    def precision(site: nn.Module) -> torch.dtype:
        found = _precision(site)
        if found is not None:
            return found
        if not usual:
            # A quantized weight does not tell what its layer computes in; the rest does, if it is of one mind.
            everywhere = {dtype for module in targets.modules(component).values() for dtype in _precisions(module)}
            usual.append(next(_precisions(site), everywhere.pop() if len(everywhere) == 1 else torch.float32))
        return usual[0]

    there: dict[int, Wanted] = {}
    new: list[tuple[Slot, Wanted]] = []
    slab, strengths = state.slab, state.strengths
    for path, site in carriers.items():
        slot = _slot(site)
        held, place, packed = slot.held, slot.place, slot.packed
        names, unbuilt, dtype = held.names(), held.unbuilt, precision(site)
        if place is None:
            missing = list(names)
        elif len(unbuilt) == len(names) and packed is not None and slab.computes(place) == dtype:
            missing = [exchanged] if exchanged in names else []  # all that is of files stays in its place
        else:
            missing = slab.missing(place, unbuilt, dtype) + [name for name in names if name not in unbuilt]
        if place is not None and packed is not None and not missing:
            continue
        pairs = _pairs(held, strengths, missing)
        if pairs is None:
            _unpack(slot)
        elif place is None:
            shape = _shape(next(iter(pairs.values()))[1])
            new.append((slot, Wanted(path, shape, dtype, names, pairs)))
        else:
            there[place] = Wanted("", (), dtype, names, pairs)
            slot.run_as(packed or Packed(slab, place), place)
    return there, new


def _pairs(held: AdapterDict, strengths: Strengths, names: Sequence[str]) -> dict[str, tuple[int, Pair]] | None:
    """Adapters of a site as pairs, with their rows of the strengths; None where one is none."""
    found: dict[str, tuple[int, Pair]] = {}
    unbuilt = held.unbuilt
    for name in names:
        pair: Pair | None = unbuilt.get(name)
        if pair is None:
            adapter = held[name]
            made = adapter.low_rank()
            pair = None if made is None else LivePair(adapter, len(made.down))
        if pair is None:
            return None
        found[name] = strengths.index(name), pair
    return found


def _shape(pair: Pair) -> tuple[int, ...]:
    if isinstance(pair, StoredPair):
        return (pair.form.up_shape[0], *pair.form.down_shape[1:])
    down, up, _ = pair.matrices()
    return (len(up), *down.shape[1:])


def _unpack(slot: Slot) -> None:
    """Run every adapter of a site by itself, and give its part of the slab up."""
    if slot.place is not None:
        slot.component.slab.vacate([slot.place])
    slot.run_as(None, None)


def _precisions(module: nn.Module) -> Iterator[torch.dtype]:
    """Those of its own parameters that are numbers, not codes."""
    return (own.dtype for own in module.parameters(recurse=False) if own.is_floating_point())


def unpack(component: nn.Module) -> None:
    """Run every adapter by itself again.

    Args:
        component: The module that carries them.
    """
    for slot in slots(component).values():
        _unpack(slot)


def _swap(module: nn.Module, state: ComponentState, block: int) -> Slot:
    _turn(module, _adapted(cast(Hashable, type(module))))
    slot = Slot(state, block)
    for one in (slot, slot.held):
        vars(one)["training"] = module.training  # what `train` would take ten times as long for
    module._modules[SLOT] = slot  # not add_module, which a class of others may have made its own
    _forget_states()
    return slot


def _forget_states() -> None:
    seen = changes.seen()
    if seen is not None:
        seen.states.clear()


def _restore(site: AdaptedSite) -> None:
    del site._modules[SLOT]
    _turn(site, base_class(site))
    _forget_states()


def refuse_wrapped(path: str, module: nn.Module) -> None:
    """See that a module is the base's own, not one that peft has put in its place.

    Args:
        path: Where it is, for the error.
        module: The module.

    Raises:
        UserError: peft has wrapped it, as ``pipe.load_lora_weights`` does.
    """
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        raise UserError(
            f"{path} carries an adapter of peft already, as pipe.load_lora_weights() and add_adapter() make them; call"
            " pipe.unload_lora_weights() and load it here too, or load ours first and theirs then"
        )


def _check_free(modules: Mapping[str, nn.Module]) -> None:
    """Raises UserError where the class of one of them, by path, cannot be swapped, or swapped back, with any effect."""
    for path, module in modules.items():
        if not _is_free(module):
            _refuse_taken(path, module)


def _is_free(module: nn.Module) -> bool:
    """Whether nothing stands in the way of swapping the class of a module; False where `_refuse_taken` has to look at it."""
    own, cls = vars(module), type(module)
    if not _is_plain(cast(Hashable, cls)) or "forward" in own or "base_layer" in own or SLOT in own:
        return False
    inside = own["_modules"]
    if inside:
        return len(inside) == 1 and SLOT in inside and issubclass(cls, AdaptedSite)
    return SLOT not in own["_parameters"] and SLOT not in own["_buffers"]


@functools.cache
def _is_plain(cls: Any) -> bool:
    """Whether instances of a class have no names that matter but what is on them, and no class over ours."""
    ours = not issubclass(cls, AdaptedSite) or cls.__mro__[1] is AdaptedSite
    return ours and not hasattr(cls, SLOT) and not hasattr(cls, "base_layer")


def _refuse_taken(path: str, module: nn.Module) -> None:
    """Free a module of hooks that are gone. Raises UserError where something else stands in the way."""
    refuse_wrapped(path, module)
    patched = vars(module).get("forward")
    if getattr(patched, "__func__", None) is type(module).forward and getattr(patched, "__self__", None) is module:
        del module.forward  # what accelerate and diffusers leave behind when their hooks go
    if "forward" in vars(module):
        raise UserError(
            f"{path}: its forward is patched on the instance, as offloading and layerwise casting do; attach and remove"
            " adapters before you enable them (after offloading, call pipe.remove_all_hooks() first)"
        )
    if isinstance(module, AdaptedSite) and type(module).__mro__[1] is not AdaptedSite:
        raise UserError(
            f"{path}: its class was changed to {type(module).__name__} while it carried adapters, as fully_shard does;"
            " shard or wrap a base first, and attach adapters then"
        )
    if not isinstance(module, AdaptedSite) and hasattr(module, SLOT):
        raise UserError(f"{path}: it has an attribute {SLOT!r} of its own, the name that adapters are kept under; rename it")


def _check_one_state(component: nn.Module, modules: Iterable[nn.Module], blocks: tuple[str, ...]) -> None:
    """Raises UserError where a part of a component, or a whole that it is a part of, was given adapters by itself."""
    states = {cast(ComponentState, _slot(one)._modules["component"]) for one in modules if isinstance(one, AdaptedSite)}
    if len(states) > 1 or any(state.strengths.blocks != blocks for state in states):
        raise UserError(
            f"this {targets.architecture(component)}, or what it is a part of, carries adapters that were attached to"
            " another module than this; remove them first, or attach to that module"
        )


def _device(*modules: nn.Module) -> torch.device:
    """Where the first parameter lies."""
    for module in modules:
        for _, parameter in _own(module):  # those of a site: to look below it takes ten times as long
            return parameter.device
        for parameter in module.parameters():
            return parameter.device
    return torch.device("cpu")
