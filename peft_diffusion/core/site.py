"""Sites: modules of a base that carry adapters, made by swapping the class of the module.

The swap renames no key of the base, saves nothing more for backward, and is seen by torch.compile; see ``attach``.
"""

import functools
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import targets
from .adapter import Adapter, AdapterDict, Method, chained
from .errors import UserError
from .strength import Strengths


class Packed(nn.Module):
    """The low-rank adapters of a site as one pair: three operations, however many adapters there are."""

    down: Tensor
    up: Tensor
    rows: Tensor

    def __init__(self, adapters: Mapping[str, Adapter], strengths: Strengths, dtype: torch.dtype) -> None:
        super().__init__()
        pairs = [(strengths.index(name), adapter.low_rank()) for name, adapter in adapters.items()]
        present = [(row, pair) for row, pair in pairs if pair is not None]
        rows = torch.cat([torch.full((len(pair.down),), row) for row, pair in present])
        self.register_buffer("down", torch.cat([pair.down for _, pair in present]).detach().to(dtype), persistent=False)
        self.register_buffer("up", torch.cat([pair.up for _, pair in present], 1).detach().to(dtype), persistent=False)
        self.register_buffer("rows", rows.to(self.down.device), persistent=False)


class AdaptedSite(nn.Module):
    """Mixed into the class of a module that carries adapters. They run in the order of attachment, each on the present y."""

    adapters: AdapterDict
    strengths: Strengths
    packed: Packed | None
    block: int
    unmerged: dict[str, Tensor]  # the bytes before a merge, here so that a copy of the model has its own

    def forward(self, input: Tensor | None = None, *more: Any, **named: Any) -> Any:
        """The site's own output, changed by each adapter whose strength is not 0.

        Attention takes more than one input; that of language models is told all by name, and returns its weights too.
        """
        x: Tensor = named.pop("hidden_states") if input is None else input
        if not more and not named and (whole := self._whole(x)) is not None:
            return whole
        prepared = x
        for _, adapter in self.adapters.items():
            prepared = adapter.prepare(prepared)
        result = super().forward(prepared, *more, **named)
        if isinstance(result, tuple):
            return self._changed(x, result[0], named), *result[1:]
        return self._changed(x, result, named)

    def _whole(self, x: Tensor) -> Tensor | None:
        """The site's output with its change, from the fast path in use; None where there is none that serves this."""
        path = _FastPaths.present
        if path is None or self.sole_adapter() is None:
            return None
        return path.output(self, x)

    def sole_adapter(self) -> "Sole | None":
        """The adapter of this site, if it is the only one, on, trained, and has one strength for all images.

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

    def _changed(self, input: Tensor, y: Tensor, named: Mapping[str, Any]) -> Tensor:
        strengths = self.strengths
        if strengths.merged:
            return y
        # A graph outlives the strengths that it was made with, so it holds every adapter; eager runs skip the idle ones.
        recorded = torch.compiler.is_compiling() or _capturing()
        if self.packed is not None and not torch.is_grad_enabled():
            return self._run_packed(self.packed, input, y) if recorded or strengths.active else y
        base = y
        for name, adapter in self.adapters.items():
            if recorded or name in strengths.active:
                y = adapter.run(input, y, _broadcast(strengths.at(strengths.index(name), self.block, y), y), base, named)
        return y

    def _run_packed(self, packed: Packed, x: Tensor, y: Tensor) -> Tensor:
        strength = self.strengths.at(packed.rows, self.block, y)
        down, up = packed.down.to(x.dtype), packed.up.to(x.dtype)  # no copies, but where x is not what pack() expected
        if isinstance(self, nn.Conv2d):
            hidden = self._conv_forward(x, down, None) * strength[:, :, None, None]
            return y + F.conv2d(hidden, up[:, :, None, None])
        hidden = F.linear(x, down) * strength.view(len(strength), *[1] * (x.ndim - 2), -1)
        return y + F.linear(hidden, up)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy make it again from the one that it came from.
        return _remade, (base_class(self),), self.__dict__


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
    """Code that computes a site and its only adapter in one; it lies above this package, which knows nothing of it."""

    def output(self, site: AdaptedSite, x: Tensor) -> Tensor | None:
        """What the site gives for ``x`` with its change; None to have it computed as ever."""


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


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _broadcast(strength: Tensor, y: Tensor) -> Tensor:
    """A strength per image as (images, 1, ...), so that it multiplies ``y``."""
    return strength.view(-1, *[1] * (y.ndim - 1))


@functools.cache
def _adapted(cls: Any) -> type[AdaptedSite]:
    return type(f"Adapted{cls.__name__}", (AdaptedSite, cls), {"__module__": cls.__module__})


def _remade(cls: type[nn.Module]) -> nn.Module:
    adapted = _adapted(cast(Hashable, cls))
    module: nn.Module = adapted.__new__(adapted)
    return module


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before it carried adapters."""
    cls: type[nn.Module] = type(module).__mro__[2] if isinstance(module, AdaptedSite) else type(module)
    return cls


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a Linear with a weight that is not quantized, whatever it carries."""
    return base_class(module) is nn.Linear and type(module.weight) is nn.Parameter


def rebase(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class; one that carries adapters keeps them, over that class."""
    module.__class__ = _adapted(cast(Hashable, cls)) if isinstance(module, AdaptedSite) else cls


def sites(component: nn.Module, name: str | None = None) -> dict[str, AdaptedSite]:
    """The modules of a component that carry adapters, by path; with a name, those that carry that adapter."""
    found = {path: m for path, m in component.named_modules() if isinstance(m, AdaptedSite)}
    return found if name is None else {path: m for path, m in found.items() if name in m.adapters}


def strengths(component: nn.Module) -> Strengths | None:
    """The strengths of a component's adapters; None where it carries none."""
    return next((m.strengths for m in component.modules() if isinstance(m, AdaptedSite)), None)


def adapters(component: nn.Module, name: str) -> dict[str, Adapter]:
    """An adapter's parts by the path of their site."""
    return {path: site.adapters[name] for path, site in sites(component, name).items()}


def names(component: nn.Module) -> list[str]:
    """The adapters of a component in the order of attachment."""
    found = strengths(component)
    return list(found.names) if found else []


def attach(component: nn.Module, name: str, method: Method, target: str = targets.DEFAULT) -> list[str]:
    """Add a fresh adapter at every module that ``target`` names, at strength 1; returns their paths.

    Raises UserError, and changes nothing, where the target matches no module that the method can serve, where the name
    is taken or no good, and where a module's forward is patched (offloading hooks), which the class could not reach.
    """
    return list(attach_all(component, name, [(method, target)])[0])


def attach_all(component: nn.Module, name: str, methods: Sequence[tuple[Method, str]]) -> list[dict[str, Adapter]]:
    """Add one adapter of several methods, each at its own target; where they meet at a site they run in this order.

    Returns what each method built, by path. Raises as ``attach`` does.
    """
    found = targets.modules(component)
    built: list[dict[str, Adapter]] = []
    for method, target in methods:
        matched = targets.resolve(component, target)
        served = [path for path in matched if method.serves(found[path])]
        if not served:
            kinds = sorted({type(found[path]).__name__ for path in matched})
            raise UserError(f"method {method.name} cannot serve what the target {target!r} names: {', '.join(kinds)}")
        built.append({path: method.build(found[path]) for path in served})
    together: dict[str, list[Adapter]] = {}
    for adapters in built:
        for path, adapter in adapters.items():
            together.setdefault(path, []).append(adapter)
    attach_built(component, name, {path: chained(parts) for path, parts in together.items()})
    return built


def attach_built(component: nn.Module, name: str, built: Mapping[str, Adapter]) -> None:
    """Add adapters made elsewhere, such as loaded ones, at the sites of these paths. Raises as ``attach`` does."""
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"an adapter's name consists of letters, digits, _ and -; {name!r} does not")
    if name in names(component):
        raise UserError(f"an adapter {name!r} is attached already; remove it first or choose another name")
    found = strengths(component)
    if found and found.merged:
        raise UserError("adapters are merged into the weights; unmerge them before you attach another")
    modules = {path: component.get_submodule(path) for path in built}
    for path, module in modules.items():
        _refuse_patched(path, module)
    blocks = targets.blocks(component)
    shared = found or Strengths(blocks.names, _device(component))
    shared.add(name)
    for path, module in modules.items():
        site = module if isinstance(module, AdaptedSite) else _swap(module, shared, blocks.of(path))
        site.adapters[name] = built[path].to(_device(module, component)).train(module.training)
        built[path].bind(site)
        site.packed = None


def detach(component: nn.Module, name: str) -> None:
    """Take an adapter away; a module without any has its own class, keys and bits again. Raises UserError."""
    found = strengths(component)
    if found is None or name not in found.names:
        raise UserError(f"no adapter {name!r} is attached; there are: {', '.join(names(component)) or 'none'}")
    if found.merged:
        raise UserError("adapters are merged into the weights; unmerge them before you remove one")
    carriers = sites(component, name)
    for path, site in carriers.items():
        _refuse_patched(path, site)
    for site in carriers.values():
        del site.adapters[name]
        if not len(site.adapters):
            _restore(site)
    for site in sites(component).values():
        site.packed = None  # the rows of the strengths move up
    found.remove(name)


def pack(component: nn.Module) -> None:
    """Run the low-rank adapters of each site as one pair where no gradients are wanted.

    Copies the parameters: call it again when they change. Attaching and detaching undo it.
    """
    everywhere = {dtype for module in targets.modules(component).values() for dtype in _precisions(module)}
    # A quantized weight does not tell what its layer computes in; the rest of the component does, if it is of one mind.
    usual = everywhere.pop() if len(everywhere) == 1 else torch.float32
    for site in sites(component).values():
        built = dict(site.adapters.items())
        if all(adapter.low_rank() is not None for adapter in built.values()):
            site.packed = Packed(built, site.strengths, next(_precisions(site), usual))


def _precisions(module: nn.Module) -> Iterator[torch.dtype]:
    """Those of its own parameters that are numbers, not codes."""
    return (own.dtype for own in module.parameters(recurse=False) if own.is_floating_point())


def unpack(component: nn.Module) -> None:
    """Run every adapter by itself again."""
    for site in sites(component).values():
        site.packed = None


def _swap(module: nn.Module, shared: Strengths, block: int) -> AdaptedSite:
    module.__class__ = _adapted(cast(Hashable, type(module)))
    if not isinstance(module, AdaptedSite):
        raise TypeError(f"{type(module).__name__} did not take the class")
    module.adapters = AdapterDict()
    module.strengths = shared
    module.packed = None
    module.block = block
    module.unmerged = {}
    return module


def _restore(site: AdaptedSite) -> None:
    cls = base_class(site)
    del site.adapters, site.strengths, site.packed, site.block, site.unmerged
    site.__class__ = cls  # type: ignore[assignment]


def _refuse_patched(path: str, module: nn.Module) -> None:
    if "forward" in vars(module):
        raise UserError(
            f"{path}: its forward is patched on the instance, as offloading does; attach and remove adapters before"
            " you enable offloading (or call remove_all_hooks() first)"
        )


def _device(*modules: nn.Module) -> torch.device:
    """Where the first parameter lies."""
    for module in modules:
        for parameter in module.parameters():
            return parameter.device
    return torch.device("cpu")
