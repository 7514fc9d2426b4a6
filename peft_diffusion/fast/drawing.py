"""A network that denoises made to draw faster: fused, its step recorded as a CUDA graph, its operands at fixed addresses.

The class of the network is swapped, as that of sites is, for one whose ``forward`` asks an `Engine`. Whatever calls the
network goes on to call it as ever: pipelines of diffusers, with ControlNet or from a picture. Modules have their fused
classes only while the engine computes, so nobody else sees them. A call that cannot be served is computed as before, and
`Engine.refused` says why.
"""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils import _pytree as trees

from .. import bases
from ..bases import pipelines
from ..bases.regional_attention import unwrapped, usual_class, watched
from ..core import regions
from ..core import site as sites
from ..core.regions import Layout
from ..core.slab import Slab
from ..core.slot import Slot, slot_of, state_of, walk
from ..core.strength import Strengths, recording
from . import frozen_ops
from .compiling import compile_ahead
from .cuda_graph import Inputs, Recorder, cause, shapes
from .operands import Operands, holds_pair
from .stepping import keep_on_host
from .unet import CUDNN_FIRST, FusedAttention, channels_last, cudnn_attends, side_by_side, swapped
from .unet import told as told_by

_ENGINE = "_peft_diffusion_engine"
"""The name of the engine in a network's ``__dict__``."""
_CONFIGURED = ("output_hidden_states", "output_attentions", "return_dict", "_attn_implementation")
"""What a configuration of transformers says for calls that do not."""
_ROOM = {False: 32, True: 8}
"""Of how many kinds of calls recordings are kept, of pictures without regions and of such with them.

A kind without regions is a size and a number of pictures, of which people draw few. Of divisions there is no end, and each
keeps keys and values for every region. A divided picture has two kinds where its regions first attend to themselves.
"""


class FastNetwork(nn.Module):
    """Mixed into the class of a network that an engine computes. A copy of the network is a plain one."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """What the network gives, from its engine where that serves the call."""
        engine: Engine = self.__dict__[_ENGINE]
        return engine(super().forward, args, named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.__dict__[_ENGINE].forget_moved()
        return moved

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != _ENGINE}
        return _remade, (type(self).__mro__[2],), state


@functools.cache
def _fast(cls: Any) -> type[FastNetwork]:
    # Under the same name, by which pipelines are saved.
    return type(cls.__name__, (FastNetwork, cls), {"__module__": cls.__module__})


def _remade(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def engine_of(network: nn.Module) -> "Engine | None":
    """Find the engine of a network.

    Args:
        network: The network that denoises.

    Returns:
        The engine; None where it has none.
    """
    found = network.__dict__.get(_ENGINE)
    return found if isinstance(found, Engine) else None


def start(network: nn.Module, kind: "type[Engine] | None" = None) -> "Engine":
    """Give a network an engine. What it computes stays the same, up to rounding.

    Args:
        network: The network that denoises, or a part beside it.
        kind: The engine's class; None for that of the network that denoises.

    Returns:
        Its engine, also where it had one.
    """
    engine = engine_of(network)
    if engine is None:
        pipelines.watch()
        engine = (kind or Engine)(network)
        network.__dict__[_ENGINE] = engine
        network.__class__ = _fast(cast(Hashable, type(network)))
    return engine


def stop(network: nn.Module) -> None:
    """Take the engine of a network away; the network is then what it was.

    Args:
        network: The network that denoises.
    """
    engine = engine_of(network)
    if engine is not None:
        network.__class__ = type(network).__mro__[2]
        del network.__dict__[_ENGINE]
        engine.forget()


def held(network: nn.Module) -> AbstractContextManager[Any]:
    """Keep the engine of a network from computing, so that its modules are those that they are between its calls.

    Args:
        network: Any network.

    Returns:
        A context, of no effect where it has no engine.
    """
    engine = engine_of(network)
    return nullcontext() if engine is None else engine.lock


def records_on(device: torch.device) -> bool:
    """Tell whether steps can be recorded on a device.

    Args:
        device: Where the network lies.

    Returns:
        Whether it has graphs.
    """
    return device.type == "cuda"


class Engine:
    """Computes a network's calls: from a recording for each shape on CUDA, on other devices step by step.

    Threads take turns. A recording reads operands, strengths and weights where they lie, and is dropped where one of them
    has come to lie elsewhere.

    Args:
        network: The network that denoises.

    Attributes:
        refused: Why the last call was computed plainly; None where it was not.
        steps: Whether it runs once a step, so that schedules of strengths are followed.
        lock: Held while it computes.
        drawn: What is drawn where no pipeline does: as long as it is the same object, only adapters have changed.
        searches: Whether the fastest convolutions are looked for with a clock, which takes seconds and pays over many calls.
    """

    steps = True
    searches = True

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.refused: str | None = None
        self._broken: dict[Hashable, str] = {}  # why calls cannot be recorded
        self._compiled: set[Hashable] = set()  # calls whose kernels are there
        self.lock = threading.RLock()
        self.drawn: object | None = None
        self._signature = inspect.signature(type(network).forward)
        self._layout = ExitStack()
        self._reads: _Reads | None = None
        self._operands: Operands | None = None
        self._backends: Sequence[Any] = ()
        self._weighed: Hashable = None
        self._told: tuple[Tensor, Hashable] | None = None
        self._table: _Table | None = None
        self._times: object | None = None  # of the picture that is drawn
        self._layouts: dict[Hashable, _Held] = {}
        self._kinds: dict[Hashable, _Kind] = {}  # the one that was called longest ago first
        self._layout_now: Layout | None = None
        self._key: Hashable = None
        self._call: Callable[[Inputs], Any] | None = None
        device = next(network.parameters()).device
        self._steps: Recorder[Any] = Recorder(self._step, list, device, lambda: self._key)
        self._tellings: Recorder[_Known] = Recorder(self._tell, list, device, lambda: self._key)

    @property
    def recordings(self) -> int:
        """How many recordings were made: one of a step and one of what prompts are told by, for each shape."""
        return self._steps.made + self._tellings.made

    def forget(self) -> None:
        """Drop recordings and operands, and give the weights their own order in memory back."""
        with self.lock:
            self._drop()
            self._give_back()
            self._reads = self._table = None

    def forget_moved(self) -> None:
        """Drop recordings and operands if the network has moved."""
        with self.lock:
            if self._reads is not None and not self._reads.same():
                self.forget()

    def __call__(self, plain: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Compute a call of the network.

        Args:
            plain: The network's own forward.
            args: What it was called with.
            named: The same, by name.

        Returns:
            What the network gives, up to rounding.
        """
        given = self._given(args, named)
        with self.lock:
            self.refused = self._unserved()
            call = None if self.refused else self._called(given)
            if call is not None:
                found = self._computed(plain, call)
                if self.refused is None:
                    return found
        self._begin_on_host(given)
        return plain(*args, **named)

    def _given(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """What the network is called with, by name."""
        given = dict(self._signature.bind(self.network, *args, **named).arguments)
        del given[next(iter(given))]  # the network itself
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def _drop(self) -> None:
        self._steps.forget()
        self._tellings.forget()
        self._broken.clear()
        self._layouts.clear()
        self._kinds.clear()
        self._told = self._weighed = None

    def _unserved(self) -> str | None:
        """Why no call can be served now; None where one can."""
        if torch.is_grad_enabled():
            return "gradients are wanted; call it inside torch.no_grad()"
        if torch.compiler.is_compiling() or recording():
            return "somebody else compiles or records it"
        if self.network.training:
            return "it is in training"
        if watched():
            return "it is found out where regions are"
        state = state_of(self.network)
        if state is not None and state.strengths.learning:
            return "strengths are being learned"
        pipe, reads = pipelines.drawing_with(self.network), self._reads
        times: object | None = self.drawn if pipe is None else pipe.scheduler.timesteps
        # Within the steps of a picture only adapters change: looking everywhere would take the host a while.
        within = reads is not None and times is not None and times is self._times and reads.same_adapters()
        if not within and (reads is None or not reads.same()):
            self._read()
        if pipe is not None and times is not self._times and records_on(self._steps.device):
            keep_on_host(pipe.scheduler)  # one that came since drawing became fast: from its next picture on
        self._times = times
        return None if self._reads is None else self._reads.refused

    def _read(self) -> None:
        """Find out what recordings read; drop them where that lies elsewhere than it did."""
        before, self._reads = self._reads, _Reads(self.network)
        if self._reads.refused is not None:
            return
        if self._operands is None or before is None or before.addresses != self._reads.addresses:
            self._drop()
            self._give_back()
            self._lay_out()
        laid_out = self._operands is None
        if self._operands is None:
            self._operands = Operands(self.network)
        if self._operands.follow() or laid_out:
            self._drop()
            self._reads = _Reads(self.network)  # where all lies now
        self._weighed = self._told = None

    def _give_back(self) -> None:
        """Give the weights their own order in memory back."""
        if self._operands is not None:
            self._operands.release()
        self._operands = None
        self._layout.close()

    def _lay_out(self) -> None:
        """Bring the weights to the order in which they are read fastest."""
        parameter = next(self.network.parameters())
        self._layout.enter_context(channels_last(self.network))
        self._layout.enter_context(side_by_side(self.network))
        self._steps.device = self._tellings.device = parameter.device
        frozen_ops.kernels_on(parameter.device)  # now, as their first run cannot be recorded
        self._backends = CUDNN_FIRST if parameter.is_cuda and cudnn_attends(self.network, parameter) else ()

    def _called(self, given: dict[str, Any]) -> "_Call | None":
        """A call as recordings know it; None, with ``refused`` said, where it is none that they can know."""
        if isinstance(given.get("timestep"), (int, float)):
            given["timestep"] = torch.tensor(given["timestep"])
        call = _Call.of(given)
        if self.steps and (not isinstance(given.get("sample"), Tensor) or "timestep" not in given):
            self.refused = "it is called otherwise than a UNet of diffusers"
            return None
        if call is None or not call.tensors:
            self.refused = "it is called with something else than tensors, numbers and words"
            return None
        return call

    def _records(self, what: Hashable) -> bool:
        """Whether a call is computed from a recording, by what tells its recording apart."""
        return records_on(self._steps.device)

    def _computed(self, plain: Callable[..., Any], call: "_Call") -> Any:
        """What the network gives; nothing, with ``refused`` said, where it cannot be recorded."""
        operands, told = self._made(), call.given.get("encoder_hidden_states")
        self._layout_now = self._hold()
        self._weigh(call)
        tells = isinstance(told, Tensor) and told.ndim == 3 and getattr(self.network, "encoder_hid_proj", None) is None
        reads = self._reads
        place = reads.strengths.values.data_ptr() if reads is not None and reads.apart and reads.strengths else None
        settled = torch.are_deterministic_algorithms_enabled()
        signature = self._layout_now and self._layout_now.signature
        self._key = operands.merged, operands.by_image, place, tells, call.plain, settled, signature
        what = shapes(call.tensors), self._key
        if (why := self._broken.get(what)) is not None:
            self.refused = why
            return None
        self._keep(what, call.tensors.get("encoder_hidden_states") if tells else None)
        self._call = lambda inputs: plain(**call.filled(inputs))
        records = self._records(what)
        try:
            if records_on(self._steps.device) and what not in self._compiled:
                self._compiled.add(what)
                self._compile_ahead(call, tells)
            if tells:
                self._tell_once(call.tensors["encoder_hidden_states"], records)
            else:
                operands.known = {}
            if not records:
                return self._step(call.tensors)
            found = self._steps(call.tensors)
            # The next step writes to the same places.
            return trees.tree_map(_copied, found)
        except RuntimeError as error:
            if not records:
                raise
            if isinstance(error, torch.OutOfMemoryError):
                self.forget()
            self.refused = self._broken[what] = f"it cannot be recorded: {cause(error)}"
            return None
        finally:
            self._call = None

    def _keep(self, what: Hashable, told: Tensor | None) -> None:
        """Note a call as the latest; where its kind is one too many, drop the recordings of the one called longest ago."""
        if what == next(reversed(self._kinds), None):
            return
        telling = None if told is None else (shapes({"told": told}), self._key)
        kind = _Kind(telling, None if self._layout_now is None else self._layout_now.signature)
        self._kinds.pop(what, None)
        self._kinds[what] = kind
        alike = [one for one, own in self._kinds.items() if own.divided == kind.divided]
        for oldest in alike[: -_ROOM[kind.divided]]:
            gone = self._kinds.pop(oldest)
            self._steps.drop(oldest)
            # A recording of a step reads what the one that was there before it computed, and both read one layout.
            if all(own.telling != gone.telling for own in self._kinds.values()):
                self._tellings.drop(gone.telling)
                self._told = None
            if all(own.signature != gone.signature for own in self._kinds.values()):
                self._layouts.pop(gone.signature, None)

    def _hold(self) -> Layout | None:
        """The regions of the pictures, at the place where recordings read them."""
        layout = regions.present()
        if layout is None or self.network not in layout.networks:
            return None
        held = self._layouts.get(layout.signature)
        if held is None:
            held = self._layouts[layout.signature] = _Held(layout.copied(), weakref.ref(layout))
        if held.source() is not layout:
            held.layout.take(layout)
            held.source = weakref.ref(layout)
        return held.layout

    def _step(self, inputs: Inputs) -> Any:
        if self._call is None:
            raise AssertionError("a step is computed for a call")
        with self._computing():
            self._made().told = inputs.get("encoder_hidden_states")
            return self._call(inputs)

    def _compile_ahead(self, call: "_Call", tells: bool) -> None:
        """Have the kernels of a call compiled side by side, if this machine has not compiled them before."""
        kernels = frozen_ops.kernels_on(self._steps.device)
        if kernels is None:
            return

        def step(inputs: Inputs) -> None:
            operands = self._made()
            try:
                operands.known = self._tell({"told": inputs["encoder_hidden_states"]}) if tells else {}
                self._step(inputs)
            finally:
                operands.known, operands.told = {}, None

        norms = [one for one in self.network.modules() if isinstance(one, (nn.GroupNorm, nn.LayerNorm))]
        if not any(isinstance(one, nn.GroupNorm) for one in norms):
            return  # what has none runs as it is
        self._told = None
        what = type(self.network).__qualname__, str(norms), str(self._made().dtype)
        compile_ahead(kernels, what, call.tensors, self._steps.device, step)

    def _made(self) -> Operands:
        if self._operands is None:
            raise AssertionError("operands are made before anything is computed")
        return self._operands

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The network as it is computed here."""
        fused = swapped(self.network, self._backends)
        with frozen_ops.searching(self.searches), fused, self._made().used(), regions.using(self._layout_now):
            yield

    def _tell_once(self, told: Tensor, records: bool) -> None:
        """Compute keys and values of what attention is told, where that, or what computes them, is another than before."""
        version = None if told.is_inference() else told._version
        now = self._weighed, version, self._key, told.shape
        if version is not None and self._told is not None and self._told[0] is told and self._told[1] == now:
            return
        inputs = {"told": told}
        self._made().known = self._tellings(inputs) if records else self._tell(inputs)
        self._told = told, now

    def _tell(self, inputs: Inputs) -> "_Known":
        """Keys and values by the attention."""
        found: _Known = {}
        with self._computing():
            for attention in self.network.modules():
                if not isinstance(attention, Attention) or not attention.is_cross_attention:
                    continue
                if isinstance(attention.processor, FusedAttention):
                    key, value = told_by(attention, inputs["told"], self._layout_now)
                    found[attention] = key, value
        return found

    def _weigh(self, call: "_Call") -> None:
        """Bring strengths to what is drawn, and to the step."""
        strengths = None if self._reads is None else self._reads.strengths
        rows = len(next(tensor for tensor in call.tensors.values() if tensor.ndim))
        if strengths is not None and strengths.schedules and self.steps:
            if records_on(self._steps.device):
                self._begin(strengths, call.given)
            else:
                self._begin_on_host(call.given)
            now: Hashable = object()
        else:
            layout = self._layout_now and (self._layout_now.pictures, self._layout_now.count)
            now = strengths and (strengths.changes, strengths.merged, strengths.images > 1 and (rows, layout))
        if now != self._weighed or self._weighed is None:
            with regions.using(self._layout_now):
                self._made().weigh(strengths, rows)
            self._weighed = now if now is not None else 0

    def _begin(self, strengths: Strengths, given: Mapping[str, Any]) -> None:
        """Bring strengths that follow a schedule to the step of a call, by a table on the device: nothing waits for it."""
        pipe = pipelines.drawing_with(self.network)
        if pipe is None:
            return
        times = pipe.scheduler.timesteps
        if self._table is None or self._table.times is not times or self._table.change != strengths.changes:
            self._table = _Table.of(strengths, times)
        strengths.values.copy_(self._table.at(given["timestep"]))

    def _begin_on_host(self, given: Mapping[str, Any]) -> None:
        """Bring strengths that follow a schedule to the step of a call that is computed plainly."""
        strengths, pipe = sites.strengths(self.network), pipelines.drawing_with(self.network)
        if self.steps and strengths is not None and strengths.schedules and pipe is not None:
            timestep = bases.denoiser_of(pipe).read_call((), given).timestep
            strengths.at_progress(pipelines.progress(pipe, float(torch.as_tensor(timestep).flatten()[0])))


_Known = dict[nn.Module, tuple[Tensor, Tensor]]


@dataclass
class _Held:
    """Regions at the place where recordings read them, and those whose masks they have.

    The latter are not kept alive, as they hold the networks beside this one, such as ControlNets.
    """

    layout: Layout
    source: "weakref.ref[Layout]"


@dataclass(frozen=True)
class _Kind:
    """What calls of a kind share with others: the recording of what they are told, and the regions at their place."""

    telling: Hashable
    signature: Hashable

    @property
    def divided(self) -> bool:
        """Whether pictures have regions."""
        return self.signature is not None


def _copied(one: Any) -> Any:
    """What a recording gives, apart from where the next run writes. Raises RuntimeError for what may hold such places."""
    if isinstance(one, Tensor):
        return one.clone()
    if one is None or isinstance(one, (bool, int, float, str)):
        return one
    raise RuntimeError(f"it gives a {type(one).__name__}, of which no copy can be made")


@dataclass(frozen=True)
class _Table:
    """Strengths by step: ``values`` (steps, adapters, blocks, images), at the timesteps ``places`` (steps,)."""

    times: Tensor
    change: int
    places: Tensor
    values: Tensor

    @classmethod
    def of(cls, strengths: Strengths, times: Tensor) -> "_Table":
        """Of a scheduler's timesteps, of which some samplers take one twice."""
        steps = list(dict.fromkeys(times.tolist()))
        change = strengths.changes  # before they are read: what is written meanwhile ends the table
        values = strengths.steps([step / max(1, len(steps) - 1) for step in range(len(steps))])
        return cls(times, change, torch.tensor(steps, dtype=torch.float64, device=values.device), values)

    def at(self, timestep: Tensor) -> Tensor:
        """(adapters, blocks, images)."""
        now = timestep.to(self.places.device, self.places.dtype, non_blocking=True).flatten()[:1]
        return self.values.index_select(0, (self.places - now).abs().argmin().view(1))[0]


class _Unknown(Exception):
    """A value that no recording can be made for."""


@dataclass(frozen=True)
class _Call:
    """What a network is called with: ``tensors`` by path, and all else in ``plain``."""

    given: Mapping[str, Any]
    tensors: dict[str, Tensor]
    plain: Hashable

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "_Call | None":
        """Of the arguments by name; None where one is no tensor, number, word, or list or dict of such."""
        tensors: dict[str, Tensor] = {}

        def parted(value: Any, path: str) -> Hashable:
            if isinstance(value, Tensor):
                tensors[path] = value
                return None
            if isinstance(value, dict):
                return "dict", tuple((key, parted(one, f"{path}.{key}")) for key, one in value.items())
            if isinstance(value, (list, tuple)):
                return "list", tuple(parted(one, f"{path}.{number}") for number, one in enumerate(value))
            if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
                return type(value), value
            raise _Unknown

        try:
            plain = tuple((name, parted(value, name)) for name, value in given.items())
        except _Unknown:
            return None
        return cls(given, tensors, plain)

    def filled(self, inputs: Inputs) -> dict[str, Any]:
        """The arguments by name, with these tensors in place of its own."""

        def filled(value: Any, path: str) -> Any:
            if isinstance(value, Tensor):
                return inputs[path]
            if isinstance(value, dict):
                return {key: filled(one, f"{path}.{key}") for key, one in value.items()}
            if isinstance(value, (list, tuple)):
                return [filled(one, f"{path}.{number}") for number, one in enumerate(value)]
            return value

        return {name: filled(value, name) for name, value in self.given.items()}


class _Reads:
    """What recordings of a network read, and how to tell quickly whether it is still there.

    Attributes:
        refused: Why the network cannot be computed otherwise than by itself; None where it can.
        strengths: Those of its adapters; None without any.
        addresses: Where all lies that a recording reads, operands and strengths apart.
        apart: Whether adapters run by themselves, which read the strengths where they lie.
    """

    def __init__(self, network: nn.Module) -> None:
        self.strengths: Strengths | None = None
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self._modules: list[tuple[nn.Module, Hashable, Any]] = []
        self._hooks: list[Mapping[int, Any]] = []
        self._slots: list[tuple[nn.Module, Slot, Hashable]] = []
        self._slab: Slab | None = None
        self.apart = apart = False
        for _, module in walk(network):
            self._modules.append((module, usual_class(module), _processor(module)))
            if module is not network:
                self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            self._take(module)
            slot = slot_of(module)
            if slot is not None:
                self.strengths, self._slab = slot.strengths, slot.component.slab
                self._slots.append((module, slot, _state(slot)))
                if not holds_pair(module):
                    apart = True
                    for _, adapter in slot.adapters.items() if slot.packed is None else ():
                        for own in adapter.modules():
                            self._take(own)
        self.apart = apart
        self._changes, self._held = self._counted(), _held(self._slab)
        self._options, self._flags = _options(network), self._told()
        self.addresses = (
            tuple((place, tensor.shape, tensor.stride(), tensor.dtype) for _, _, tensor, place in self._tensors),
            tuple(cls for _, cls, _ in self._modules),
            tuple(id(processor) for _, _, processor in self._modules),
            self._options,
            self._slab.moves if apart and self._slab is not None else None,
            id(self.strengths) if apart else None,
        )
        self.refused = self._refused()

    def _take(self, module: nn.Module) -> None:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    self._tensors.append((cast(dict[str, Any], held), name, tensor, tensor.data_ptr()))

    def _told(self) -> tuple[bool, bool, bool]:
        """Whether modules are patched, have hooks of others, and are trained."""
        patched = any("forward" in vars(one) for one, _, _ in self._modules)
        hooked = any(_of_others(hooks) for hooks in self._hooks)
        return patched, hooked, any(tensor.requires_grad for _, _, tensor, _ in self._tensors)

    def _refused(self) -> str | None:
        patched, hooked, trained = self._flags
        if patched or any(tensor.is_meta for _, _, tensor, _ in self._tensors):
            return "its weights are moved or patched from call to call, as offloading does"
        if len({tensor.device for _, _, tensor, _ in self._tensors}) > 1:
            return "it lies on several devices"
        if hooked:
            return "somebody has hooks on its modules"
        return "it is being trained" if trained else None

    def same(self) -> bool:
        """Whether all is where it was."""
        return (
            all(held.get(name) is tensor and tensor.data_ptr() == place for held, name, tensor, place in self._tensors)
            and all(usual_class(one) == cls and _processor(one) is known for one, cls, known in self._modules)
            and all(slot_of(module) is slot and _state(slot) == state for module, slot, state in self._slots)
            and _held(self._slab) == self._held
            and self._flags == self._told()
            and self._options == _options(self._modules[0][0])
        )

    def same_adapters(self) -> bool:
        """Whether adapters are those that they were, by what all changes of them count."""
        # Where the last adapter went and another came, sites have other slots, and these another count.
        kept = all(slot_of(module) is slot for module, slot, _ in self._slots[:1])
        return kept and self._counted() == self._changes and _held(self._slab) == self._held

    def _counted(self) -> int | None:
        return None if self.strengths is None else self.strengths.changes


def _processor(module: nn.Module) -> Any:
    """What attends, also where it stands behind what attends by regions."""
    return unwrapped(getattr(module, "processor", None))


def _of_others(hooks: Mapping[int, Any]) -> bool:
    """Whether one of hooks may do anything: those of transformers hand outputs on to the call that asks for them."""
    return any(getattr(hook, "__module__", "").partition(".")[0] != "transformers" for hook in hooks.values())


def _state(slot: Slot) -> Hashable:
    """What tells whether the adapters of a site are still the same; of a pair, the slab tells what numbers it holds."""
    packed = slot.packed
    return packed if packed is not None else tuple(id(adapter) for _, adapter in slot.adapters.items())


def _held(slab: Slab | None) -> Hashable:
    """What changes with every number that a slab holds, and with where it lies."""
    return None if slab is None else (slab.moves, tuple(flat._version for flat in slab.buffers()))


def _options(network: nn.Module) -> Hashable:
    """What pipelines and configurations set on a network apart from weights and processors."""
    config = getattr(network, "config", None)
    given = tuple(getattr(config, name, None) for name in _CONFIGURED)
    return str((pipelines.free_u(network), given))
