"""The loader: attach adapters from files to a pipeline, set how much of each, merge and remove them."""

import logging
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import bases, formats
from ..bases import LanguageModel, components, denoiser_of, describe, pipelines
from ..bases import family as families
from ..bases.base import Base, network_of
from ..bases.pipelines import Pipeline
from ..bases.words import teach
from ..core import merge as merging
from ..core import site as sites
from ..core.adapter import Adapter, StoredPair
from ..core.block_names import weighed
from ..core.changes import one_at_a_time
from ..core.collector import without_collecting
from ..core.errors import UserError
from ..core.events import Never, Observer, Observers, Stop
from ..core.files import at_home
from ..core.regions import present
from ..core.registry import Registry
from ..core.slot import walk
from ..core.strength import Amount, OverSteps, named_blocks, of_component, over_steps, refuse_unknown, with_blocks
from ..core.strength_schedule import Schedule, Timed
from ..fast import drawing
from ..fast.parts import parts_beside
from ..fast.stepping import keep_on_host, release
from ..formats import Coverage, Loaded, Plan, Spec
from ..formats.container import adapter_file, title
from ..formats.planning import Digests
from . import watch
from .host_options import OptionWatch, carries, refuse_fused
from .tiers import Known, Tiers
from .watch import Watch

if TYPE_CHECKING:
    from PIL import Image

    from ..core.strength_schedule import ByPart
    from .batching import Request
    from .calibration import Calibration
    from .joining import Queue
    from .on_pictures import Losses
    from .overlap import BlendReport
    from .settings import Sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on a pipeline: the file that it came from and what the file says of it.

    Attributes:
        name: What it is called on the pipeline.
        path: The file; None for an adapter that was attached without one, as the one that is being trained.
        spec: What the file says of it; empty where there is no file.
        report: How much of it found its place.
        warnings: What the person should know of it.
        digests: Of the file's bytes and of its tensors, which need not be known yet; None where there is no file.
        component: Which component was said to be meant by names that tell none; None where nothing was said.
        word: What was said of its learned words; None where nothing was.
    """

    name: str
    path: Path | None
    spec: Spec
    report: Coverage
    warnings: tuple[str, ...]
    digests: Digests | None = None
    component: str | None = None
    word: str | None = None

    @property
    def sha256(self) -> str | None:
        """The digest of the file's bytes; None where there is no file."""
        return None if self.digests is None else self.digests.sha256

    @property
    def data_sha256(self) -> str:
        """The digest of its tensors alone, by which A1111 knows it; "" where there is no file."""
        return "" if self.digests is None else self.digests.data_sha256


class Adapters:
    """The adapters of a base: ``load``, ``set``, ``remove``, ``merge``, ``unmerge``.

    The base, a Stable Diffusion pipeline or a ``LanguageModel``, is used as ever: ``Adapters`` changes what its UNet and
    text encoders, or its language model, compute, and nothing else of it. Take it back by removing every adapter: the base
    is then the one it was, to the bit.

    Everything that is known of the adapters stands on these components, and nothing here. So every ``Adapters`` of a
    pipeline, of one made by ``from_pipe``, or of a copy, says and refuses the same; what one does, the others see at once.
    It lists adapters that were attached without a file too, such as one that is being trained.

    Where a component is put in another's place, as in ``pipe.unet = other``, an adapter is there as long as one of the
    pipeline's present components carries it; what the other component brings is there too. The component that was taken
    out keeps what it carries. After such an exchange make ``Adapters(pipe)`` anew, which brings tokenizers in line.

    Threads may share a base. Changes (load, set, remove, merge, unmerge) wait for each other, whichever ``Adapters`` makes
    them. Several threads may draw at once, each with a pipeline of its own over the same components: each follows a schedule
    by its own steps, unless the network is compiled, where they share one place for the strengths. A change acts on all
    pictures of the base, so make it while no other thread draws.

    With a budget, adapters beyond it wait: those of strength 0 that were used longest ago leave the base, and stay in
    memory of the host, beyond ``host_budget`` in their files alone. ``set`` and ``batch`` bring back what they name, from
    files too, unless `prefetch` has read these meanwhile. What is in use stays. This ``Adapters`` alone knows of those that
    wait.

    Args:
        pipe: The pipeline or language model, with adapters or without.
        budget: The most bytes of adapters on the base, as their files hold them; None for no limit.
        host_budget: The most bytes of waiting adapters in the memory of the host; None for no limit.

    Attributes:
        loads: How many times a file was read.

    Raises:
        UserError: It is no base that takes adapters, or its adapters teach words that its tokenizer cannot learn.
    """

    @one_at_a_time
    def __init__(self, pipe: Base, *, budget: int | None = None, host_budget: int | None = None) -> None:
        self.pipe: Any = _checked(pipe)
        self.loads = 0
        self._tiers = None if budget is None else Tiers(budget, host_budget, self._read, self._lift, self._lower)
        self._described: tuple[tuple[weakref.ref[nn.Module], ...], Any] = ((), None)
        teach(self.pipe)
        follow_steps(self.pipe)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.pipe,)  # all else stands on the pipeline's components

    @property
    def base(self) -> Any:
        """What an adapter must know of the base: see ``bases.describe``."""
        parts = list(components(self.pipe).values())
        known, info = self._described
        if [one() for one in known] != parts:
            info = describe(self.pipe)
            self._described = tuple(weakref.ref(part) for part in parts), info
        return info

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the order of loading."""
        return self._registry.names

    @property
    def waiting(self) -> tuple[str, ...]:
        """The adapters that have left the base for lack of room, from the one that was used longest ago."""
        return () if self._tiers is None else self._tiers.waiting

    @property
    def evictions(self) -> int:
        """How many times an adapter left the base for lack of room."""
        return 0 if self._tiers is None else self._tiers.evictions

    @property
    def schedules(self) -> dict[str, Schedule | Timed]:
        """The strengths that change over the steps, by the name of the adapter."""
        return self._registry.schedules

    @property
    def merged(self) -> tuple[str, ...]:
        """The components whose adapters are merged into the weights."""
        return self._registry.merged

    @property
    def teachers(self) -> frozenset[str]:
        """The adapters that teach words, or that stand before every prompt."""
        states = self._registry.states().values()
        return frozenset(word.owner for state in states for word in state.words if word.owner is not None)

    def __getitem__(self, name: str) -> LoadedAdapter:
        """What was loaded under that name.

        Raises:
            UserError: No adapter has the name, or components of different origin carry different ones under it.
        """
        waiting = None if self._tiers is None else self._tiers.told(name)
        info = self._registry.info(name) if waiting is None else waiting
        if isinstance(info, LoadedAdapter):
            return info
        parts = components(self.pipe)
        built = [adapter for one in self._registry.carriers(name) for adapter in sites.adapters(parts[one], name).values()]
        report = Coverage(sum(len(adapter.state()) for adapter in built), len(built), ())
        return LoadedAdapter(name, None, Spec(), report, ())

    @one_at_a_time
    @without_collecting()
    def load(
        self,
        source: str | Path | Plan,
        name: str | None = None,
        strength: Amount = 1.0,
        *,
        component: str | None = None,
        word: str | None = None,
        strict: bool = False,
        warn: Callable[[str], None] = logger.warning,
    ) -> str:
        """Attach an adapter from a file.

        Args:
            source: The file, or a folder of peft or diffusers with one in it, or the plan that was made of it
                (`formats.plan`), which saves parsing it again.
            name: What to call it; by default the file's name, or the folder's.
            strength: As for ``set``.
            component: Which component is meant by names that tell none, as of peft and LyCORIS on a text encoder of SDXL.
            word: What to call the learned word of a file that holds one; of a file with several, the one to load.
            strict: Whether to refuse a file of which a tensor is left out.
            warn: Is told in a line each what the person should know of the file, such as how many of its tensors were left
                out, and why; by default that is logged. It stays in ``LoadedAdapter.warnings``.

        Returns:
            Its name.

        Raises:
            UserError: The file is no adapter, is damaged or does not fit the base, the name is taken, or adapters are
                merged. Nothing is changed then.
        """
        registry, file = self._registry, _file(source)
        for part in components(self.pipe).values():
            walk(part)  # now, as all is gone through in the end: what follows finds adapters in what was found
        registry.refuse_merged("load another")
        chosen = self._free_name(title(file)) if name is None else name
        if chosen in registry.names or chosen in self.waiting:
            raise UserError(f"an adapter {chosen!r} is loaded already; remove it first or choose another name")
        given = _planned(source, component, word)
        read = self._read(given, strict)
        told = _told(chosen, given, read)
        if self._waits(chosen, Known(given, told, strict, read), strength):
            for warning in read.warnings:
                warn(warning)
            return chosen
        self._enter(chosen, read, told, strength)
        for warning in read.warnings:
            warn(warning)
        return chosen

    def _enter(self, name: str, read: Loaded, told: LoadedAdapter, strength: Amount) -> None:
        """Put what was read of a file on the base; where that fails, the base is as before."""
        registry, parts = self._registry, components(self.pipe)
        try:
            for component, built in read.by_component().items():
                sites.attach_built(parts[component], name, built)
            self._refuse_fused("load an adapter")
            registry.enter(name, told)
            teach(self.pipe)
            if isinstance(strength, (int, float)) and strength == 1:  # as it came
                follow_steps(self.pipe)
            else:
                self.set({name: strength})
            self._pack()
        except BaseException:
            for component in registry.states(name):
                sites.detach(parts[component], name)
            teach(self.pipe)
            follow_steps(self.pipe)
            self._pack()
            if self._tiers is not None:
                self._tiers.forget(name)
            raise

    def _read(self, given: Plan, strict: bool) -> Loaded:
        """Read the file of a plan, where adapters are to wait into memory from which a GPU copies fast."""
        pinned = self._tiers is not None and any(next(part.parameters()).is_cuda for part in components(self.pipe).values())
        read = formats.load(given, self.pipe, strict=strict, build=False, info=lambda: self.base, pinned=pinned)
        self.loads += 1
        return read

    def _waits(self, name: str, known: Known, strength: Amount) -> bool:
        """Whether an adapter that was read waits; it is known from now on. Raises UserError where it is to act."""
        if self._tiers is None:
            return False
        up = self._tiers.has_room(known.size, self._idle())
        if not up and not _is_nothing(strength):
            raise self._tiers.no_room(name, known.size)
        self._tiers.enter(name, known, up=up)
        return not up

    def _idle(self, wanted: Mapping[str, Amount] | None = None) -> set[str]:
        """The adapters that do nothing, once strengths are set."""
        states = self._registry.states().values()
        active = {name for state in states for name in (*state.strengths.active, *state.strengths.schedules)}
        zero = {name for name, amount in (wanted or {}).items() if _is_nothing(amount)}
        return set(self.names) - (active | (wanted or {}).keys()) | (zero & set(self.names))

    def _named(self, wanted: Mapping[str, Amount]) -> dict[str, Amount]:
        """Amounts with blocks by the names of the network. Raises UserError for what is known of other families alone."""
        known = families.block_names()
        if not any(known & named_blocks(amount).keys() for amount in wanted.values()):
            return dict(wanted)
        family = families.find(self.base.family)
        return {name: with_blocks(amount, family.meant) for name, amount in wanted.items()}

    def _ready(self, wanted: Mapping[str, Amount]) -> dict[str, Amount]:
        """Bring what is named and waits. Returns what is to be set, without those that go on waiting at 0."""
        if self._tiers is None:
            return dict(wanted)
        needed = [name for name in self.waiting if name in wanted and not _is_nothing(wanted[name])]
        for name in needed:
            self._tiers.bring(name, self._idle(wanted))
        self._tiers.touch(name for name, amount in wanted.items() if not _is_nothing(amount))
        waiting = self.waiting
        return {name: amount for name, amount in wanted.items() if name not in waiting}

    def _lift(self, name: str, known: Known, read: Loaded) -> None:
        """Attach what was read, at strength 0."""
        try:
            built = read.by_component()
            self._attach(name, built, dict.fromkeys(built, 0.0))
            self._registry.enter(name, known.told)
        except BaseException:
            if self._registry.states(name):
                self._lower(name)
            raise

    def _lower(self, name: str) -> None:
        """Take an adapter off the base."""
        parts = components(self.pipe)
        carriers = self._registry.carriers(name)
        for component in carriers:
            sites.check_detach(parts[component], name)
        for component in carriers:
            sites.detach(parts[component], name)
        teach(self.pipe)
        follow_steps(self.pipe)
        self._pack()

    @one_at_a_time
    def rest(self, *names: str) -> None:
        """Take adapters of strength 0 off the base, to wait as those do that have left for lack of room.

        Args:
            names: What they are called. Those that wait already are left as they are.

        Raises:
            UserError: No adapter has such a name, one is in use, adapters are merged, or there is no budget, without which
                none waits. Nothing is changed then.
        """
        if self._tiers is None:
            raise UserError("adapters wait only where there is a budget, as in Adapters(pipe, budget=2**30)")
        present = [name for name in dict.fromkeys(names) if name not in self.waiting]
        for name in present:
            self._registry.carriers(name)
        self._registry.refuse_merged("take one off the base")
        used = [name for name in present if name not in self._idle()]
        if used:
            raise UserError(f"{', '.join(used)}: an adapter in use cannot wait; set it to 0 first")
        for name in present:
            self._tiers.rest(name)

    @one_at_a_time
    def prefetch(self, *names: str) -> None:
        """Begin to read adapters that wait in their files, on another thread, while others draw.

        Args:
            names: What they are called. Those on the base, and those in memory, are left as they are.

        Raises:
            UserError: No adapter has such a name.
        """
        _ = self.base  # found out here, and not on the other thread
        for name in names:
            _ = self[name]
            if self._tiers is not None and name in self._tiers.waiting:
                self._tiers.prefetch(name)

    @one_at_a_time
    @without_collecting()
    def swap(
        self,
        name: str,
        source: str | Path | Plan,
        *,
        component: str | None = None,
        word: str | None = None,
        strict: bool = False,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        """Put the adapter of another file in the place of one, at the strengths and schedules that this has.

        Where both are plain LoRAs of the same sites and the new rank is not the greater, nothing moves in memory, so what
        was recorded or compiled goes on with the new one. A component that did not carry the old one gets the
        strength that all others have; 1 where these differ, or have strengths by block.

        Args:
            name: What the adapter is called, and stays called.
            source: As for ``load``.
            component: As for ``load``.
            word: As for ``load``.
            strict: As for ``load``.
            warn: As for ``load``.

        Raises:
            UserError: No adapter has the name, or as ``load``. Nothing is changed then.
        """
        registry = self._registry
        carriers = {} if name in self.waiting else registry.carriers(name)
        registry.refuse_merged("swap one")
        given = _planned(source, component, word)
        read = self._read(given, strict)
        told = _told(name, given, read)
        if self._tiers is not None:
            known = Known(given, told, strict, read)
            if not carriers:
                self._tiers.enter(name, known, up=False)
                return
        if read.components or carriers.keys() != read.stored.keys() or not self._exchange(name, read.stored):
            self._replace(name, read)
        registry.enter(name, told)
        if self._tiers is not None:
            self._tiers.enter(name, known, up=True)
        for warning in read.warnings:
            warn(warning)

    def _exchange(self, name: str, stored: Mapping[str, Mapping[str, StoredPair]]) -> bool:
        """Put pairs in the places of others; whether that could be done."""
        parts, before = components(self.pipe), dict[str, dict[str, StoredPair]]()
        done = False
        try:
            for component, pairs in stored.items():
                found = sites.exchange(parts[component], name, pairs)
                if found is None:
                    break
                before[component] = found
            done = len(before) == len(stored)
        finally:
            for component, pairs in before.items() if not done else ():
                sites.exchange(parts[component], name, pairs)
        return done

    def _replace(self, name: str, read: Loaded) -> None:
        """Take an adapter off and attach another under its name, or leave the first where that fails."""
        parts = components(self.pipe)
        old = {one: (sites.adapters(parts[one], name), state) for one, state in self._registry.carriers(name).items()}
        kept = {one: state.strengths.kept(name) for one, (_, state) in old.items()}
        first, *others = kept.values()
        if all(other == first for other in others) and not isinstance(first, Mapping):
            kept = {**dict.fromkeys(parts, first), **kept}
        entries = {one: state.entries[name] for one, (_, state) in old.items()}
        for one in old:
            sites.check_detach(parts[one], name)
        for one in old:
            sites.detach(parts[one], name)
        try:
            self._attach(name, read.by_component(), kept)
        except BaseException:
            for one in self._registry.states(name):
                sites.detach(parts[one], name)
            self._attach(name, {one: adapters for one, (adapters, _) in old.items()}, kept)
            for one, state in self._registry.carriers(name).items():
                state.enter(name, entries[one].info)
            raise

    def _attach(
        self, name: str, built: Mapping[str, Mapping[str, Adapter | StoredPair]], kept: Mapping[str, OverSteps]
    ) -> None:
        parts = components(self.pipe)
        for one, adapters in built.items():
            sites.attach_built(parts[one], name, adapters)
        teach(self.pipe)
        for one, state in self._registry.carriers(name).items():
            if one in kept:
                state.strengths.write({name: kept[one]})
        follow_steps(self.pipe)
        self._pack()

    @one_at_a_time
    def set(self, amounts: Mapping[str, Amount] | None = None, /, **more: Amount) -> None:
        """Set strengths by name, as ``set(ink=0.6)`` or ``set({"ink": 0.6})``; adapters not named keep theirs.

        Args:
            amounts: By the name of the adapter: a number, one for each image, either by block, a ``Schedule``, a ``ByPart``.
            more: The same.

        Raises:
            UserError: No adapter has such a name, a strength is no finite number, or adapters are merged. Nothing is
                changed then.
        """
        registry = self._registry
        wanted = self._ready(self._named({**(amounts or {}), **more}))
        states = registry.states()
        for name in wanted:
            if not any(name in state.entries for state in states.values()):
                registry.carriers(name)  # which says what there is
        if any(state.strengths.merged for state in states.values()):
            registry.refuse_merged("change a strength")
        schedules = [name for name, amount in wanted.items() if over_steps(amount)]
        if schedules and isinstance(self.pipe, LanguageModel):
            raise UserError(f"{', '.join(schedules)}: a schedule runs over denoising steps, which text does not have")
        everywhere = list(dict.fromkeys(b for state in states.values() for b in state.strengths.blocks))
        stepping, _ = network_of(self.pipe) or (None, None)  # what runs once a step; the others keep a schedule's mean
        planned = []
        for component, state in states.items():
            own = {name: amount for name, amount in wanted.items() if name in state.entries}
            chosen = _known_blocks(own, component, state.strengths.blocks, everywhere)
            state.strengths.check(chosen)
            planned.append((component, state.strengths, chosen))
        followed = any(strengths.stepwise for _, strengths, _ in planned)
        for component, strengths, chosen in planned:
            if chosen:
                strengths.write(chosen)
            if component == stepping:
                strengths.at_progress(0.0)
        if followed or any(strengths.stepwise for _, strengths, _ in planned):
            follow_steps(self.pipe)

    @one_at_a_time
    def remove(self, name: str) -> None:
        """Take an adapter away, and everything that it held.

        Args:
            name: What it is called.

        Raises:
            UserError: No adapter has the name, or adapters are merged.
        """
        if name not in self.waiting:
            self._registry.carriers(name)
            self._registry.refuse_merged("remove one")
            self._lower(name)
        if self._tiers is not None:
            self._tiers.forget(name)

    @one_at_a_time
    def merge(self) -> dict[str, merging.Merged]:
        """Fold the adapters into the weights at their present strengths, where they are not yet.

        Generation then costs what the base costs. Warns of the error where quantized weights had to be rounded again.

        Returns:
            What that did, by component.

        Raises:
            UserError: Strengths differ by image or over the steps, a method cannot be folded, or there is nothing to merge.
                Nothing is changed then.
        """
        registry = self._registry
        if registry.schedules:
            raise UserError(f"{', '.join(registry.schedules)}: a strength that changes over the steps cannot be merged")
        if not registry.names:
            raise UserError("no adapter is loaded")
        parts = {n: p for n, p in components(self.pipe).items() if n in registry.states() and n not in registry.merged}
        if not parts:
            raise UserError("there is nothing to merge: the adapters are merged already")
        self._refuse_fused("merge the adapters")
        done: dict[str, merging.Merged] = {}
        try:
            for name, part in parts.items():
                done[name] = merging.merge(part)
        except BaseException:  # as of a device that is full, or Ctrl-C
            for name in done:
                merging.unmerge(parts[name])
            raise
        for name, told in done.items():
            if told.quantized:
                logger.warning(
                    f"{name}: {told.quantized} {' and '.join(told.kinds)} weights were quantized again with the adapters in"
                    f" them, which moved them by {told.error:.1%} of their size, {told.error_of_change:.0%} of what they"
                    " changed; unmerged, they act in full"
                )
        return done

    @one_at_a_time
    def unmerge(self) -> None:
        """Put the weights back as they were, to the bit.

        Raises:
            UserError: Nothing is merged, or somebody has changed the weights since. Nothing is changed then.
        """
        merged = self._registry.merged
        if not merged:
            raise UserError("nothing is merged")
        self._refuse_fused("unmerge the adapters")
        parts = [components(self.pipe)[name] for name in merged]
        for part in parts:
            merging.check_unmerge(part)
        for part in parts:
            merging.put_back(part)

    @one_at_a_time
    def fast(self, on: bool | None = None) -> str | None:
        """Draw faster from now on, or as before: the same pictures up to rounding, several times as fast on a GPU.

        The network's step is fused, recorded as a CUDA graph for each shape of its inputs, and replayed; prompts are told to
        attention once for all steps. So are ControlNets, and from the second time on text encoders and the VAE, where at
        least half of the card's memory is free for what a recording keeps. The pipeline is called as ever. Adapters may be
        set, loaded, exchanged, merged and removed meanwhile. Threads take turns at the network. A copy of the pipeline is
        not fast. A step that cannot be recorded is computed as before: `plain_because` says why.

        Args:
            on: Whether to; None where it pays, which is on CUDA. On a CPU True saves little.

        Returns:
            None where it is on; else why it is not.

        Raises:
            UserError: The base is a language model.
        """
        name, network = self._denoising()
        wanted = next(network.parameters()).is_cuda if on is None else on
        if getattr(self.pipe, name) is not network:
            wanted, why = False, "the network is compiled, which recordings cannot look into"
        else:
            why = "it is off" if on is False else "the base is not on CUDA, where it would pay"
        (drawing.start if wanted else drawing.stop)(network)
        for _, part, kind in parts_beside(self.pipe):
            if wanted:
                drawing.start(part, kind)
            else:
                drawing.stop(part)
        if not wanted:
            release(self.pipe.scheduler)
        self.keep_steps_on_host(self.pipe.scheduler)
        return None if wanted else why

    def keep_steps_on_host(self, scheduler: Any) -> None:
        """Have a scheduler keep its timesteps on the host where drawing is fast, so that no step waits for the one before.

        Args:
            scheduler: The pipeline's, or one that it will be given.
        """
        engine = drawing.engine_of(self._denoising()[1])
        if engine is not None and drawing.records_on(next(engine.network.parameters()).device):
            keep_on_host(scheduler)

    def batch(
        self,
        requests: "Sequence[Request]",
        *,
        at_most: int = 8,
        tell: Observer = Observers(),  # noqa: B008 -- has no state
        stop: Stop = Never(),  # noqa: B008 -- has no state
    ) -> "list[Image.Image]":
        """Draw pictures with different prompts, adapters, strengths and seeds at once, each as if it were drawn alone.

        Pictures that cannot share a batch, as of other sizes, steps, schedulers or guidance, or with longer prompts, are
        drawn one group after the other, which is told.

        Args:
            requests: What is wanted.
            at_most: Pictures computed at once, 1 or more.
            tell: Is told how far it is, and of groups; an observer as `generate` takes them.
            stop: Where it is set, nothing is drawn after the present batch.

        Returns:
            A picture for each, in order. The strengths are afterwards what they were.

        Raises:
            UserError: A request names an adapter that is not there, or cannot be drawn; adapters are merged; or the base is
                a language model.
            Interrupted: It was stopped.
        """
        self._denoising()
        from .batching import drawn  # which imports diffusers

        if at_most < 1:
            raise UserError(f"at_most must be 1 or more, not {at_most}")
        with self._kept_strengths():
            return drawn(self, requests, at_most, tell, stop)

    @contextmanager
    def queue(self, *, at_most: int = 8) -> "Iterator[Queue]":
        """Draw pictures as requests for them come: each joins those under way at their next step.

        ``with adapters.queue() as queue:`` call ``ticket = queue.submit(request)`` at any time, and ``queue.step()`` as long
        as ``queue.busy``; ``ticket.image`` is there once ``ticket.done``.

        Args:
            at_most: Pictures computed at once, 1 or more.

        Yields:
            The queue. Afterwards it is closed, what was not drawn is given up, and the strengths are what they were.

        Raises:
            UserError: Adapters are merged, or the base is a language model.
        """
        self._denoising()
        from .joining import Queue  # which imports diffusers

        with self._kept_strengths(), closing(Queue(self, at_most=at_most)) as made:
            yield made

    def calibrate(
        self,
        prompts: Sequence[str],
        amounts: "Mapping[str, float | ByPart] | None" = None,
        *,
        seed: int = 0,
        sampling: "Sampling | None" = None,
        rows: bool = False,
    ) -> "Calibration":
        """Measure what each adapter changes of the network's predictions, by which strengths become comparable.

        ``factors = adapters.calibrate(["a cat", "a house"]).factors``, and ``adapters.set(ink=0.5 * factors["ink"],
        flat=0.5 * factors["flat"])`` gives each an equal part. Takes six steps a prompt.

        Args:
            prompts: What is drawn; of more than four the first four count.
            amounts: The strengths at which they are measured, by name; by default each adapter at 1.
            seed: That of the noise.
            sampling: How pictures are drawn, as with which guidance; by default as ``generate`` does.
            rows: Whether to also draw nine columns between each two adapters, so that `Calibration.evenly` goes by how far
                pictures are from both ends. Takes nine times eight steps a prompt for each two.

        Returns:
            What each does. The strengths stay what they are.

        Raises:
            UserError: There is no prompt, no adapter has such a name, adapters are merged, or the base is a language model.
        """
        self._denoising()
        from .calibration import calibrated  # these import diffusers
        from .sampler import Cell
        from .settings import Sampling as Usual

        wanted = dict.fromkeys(self.names, 1.0) if amounts is None else dict(amounts)
        if not prompts or not wanted:
            raise UserError("a calibration needs a prompt and an adapter, as in adapters.calibrate(['a cat'])")
        self._registry.refuse_merged("calibrate")
        for name in wanted:
            _ = self[name]
        cells = [Cell(prompt, seed, {}) for prompt in prompts]
        with self._kept_strengths():
            pairs = list(combinations(wanted, 2)) if rows else []
            return calibrated(self, wanted, cells, Usual() if sampling is None else sampling, rows=pairs)

    def report(
        self,
        prompts: "Sequence[str] | Mapping[str, Sequence[str]]" = (),
        *,
        names: Sequence[str] | None = None,
        seed: int = 0,
        sampling: "Sampling | None" = None,
        losses: "Losses | None" = None,
        stop: Stop = Never(),  # noqa: B008 -- has no state
    ) -> "BlendReport":
        """Tell what adapters change at each layer, what each two of them share, and at which strengths they go together.

        Without prompts it takes the weights alone, and works on a language model too. With prompts the base draws them, in a
        few steps, once for what each adapter adds to the outputs of layers, once to compare predictions, and twice for each
        adapter to find strengths. With ``losses``, strengths are found by real pictures of each adapter:

            losses = PictureLosses.read(adapters, {"ink": "drawings/ink", "flat": "drawings/flat"})
            adapters.set(adapters.report(losses=losses).suggested)

        Args:
            prompts: What is drawn, the first four of each. By the name of an adapter, prompts that call it; in a sequence,
                those of all, with the trigger of each that its file names.
            names: Which adapters; by default all.
            seed: That of the noise.
            sampling: How pictures are drawn, as with which guidance; by default as ``generate`` does.
            losses: Those of real pictures of each adapter, whose captions are the prompts where none are given: see
                `evaluation.picture_losses.PictureLosses`.
            stop: Where it is set, nothing is drawn after the present picture.

        Returns:
            Sizes against the weights and outputs, overlaps, conflicts, and suggested strengths.

        Raises:
            UserError: There is no adapter or none of that name, one has no prompts or pictures where others have, adapters
                are merged, with prompts the base is a language model, or a loss is no finite number.
            Interrupted: It was stopped.
        """
        from .overlap import measured

        chosen = self.names if names is None else tuple(names)
        if not chosen:
            raise UserError("no adapter is loaded")
        self._registry.refuse_merged("report on them")
        for name in chosen:
            _ = self[name]
        if not prompts and losses is None:
            return measured(components(self.pipe), chosen)
        self._denoising()
        if lacking := [name for name in chosen if losses is not None and not losses.prompts.get(name)]:
            raise UserError(f"there are no pictures of {', '.join(lacking)}; name a folder for each adapter")
        from .overlap_drawing import drawn, own_prompts  # these import diffusers
        from .settings import Sampling as Usual

        own = own_prompts(self, chosen, prompts or (() if losses is None else losses.prompts))
        with self._kept_strengths():
            found = drawn(self, own, seed, Usual() if sampling is None else sampling, stop, losses=losses)
        return measured(components(self.pipe), chosen, found)

    @property
    def is_fast(self) -> bool:
        """Whether `fast` is on."""
        found = network_of(self.pipe)
        return found is not None and drawing.engine_of(found[1]) is not None

    def compose(
        self,
        file: str | Path,
        prompts: Sequence[str] = (),
        *,
        amounts: "Mapping[str, float | ByPart] | None" = None,
        folder: str | Path | None = None,
        steps: int | None = None,
    ) -> tuple[str, ...]:
        """Set strengths by block and step as ``compose train`` learned them; they stay until they are set otherwise.

        ``adapters.compose("both.safetensors", prompts)``, and then ``pipe(prompts)``. Adapters of the composition that are
        not loaded yet are loaded from beside the file; others keep their strengths.

        Args:
            file: The file of the composition.
            prompts: What will be drawn, one for each image: gates weigh the adapters of each by its own.
            amounts: What is multiplied by that, by the name of the adapter; 1 for one that is not named.
            folder: Another folder where adapters are looked for.
            steps: How many denoising steps there will be, where not as ``generate`` takes; with another number what is
                learned holds between these.

        Returns:
            The names of the adapters of the composition, in its order.

        Raises:
            UserError: An adapter is missing or another than it was, the file is for another base or needs prompts, adapters
                are merged, or the base is a language model.
        """
        self._denoising()
        from .learned import composed  # which imports diffusers

        return composed(self, Path(file), prompts, amounts or {}, None if folder is None else Path(folder), steps)

    @contextmanager
    def _kept_strengths(self) -> Iterator[None]:
        """Give adapters the strengths back that they had."""
        before = {
            component: {name: state.strengths.kept(name) for name in state.entries}
            for component, state in self._registry.states().items()
        }
        try:
            yield
        finally:
            self._give_back(before)

    @one_at_a_time
    def _give_back(self, before: Mapping[str, Mapping[str, OverSteps]]) -> None:
        """Set strengths to what they were, by component and name; adapters that were removed since are left out."""
        left = {name for kept in before.values() for name in kept} & set(self.waiting)
        if left:  # which other pictures had no use for
            self.set(dict.fromkeys(self.names, 0.0))
            self._ready(dict.fromkeys(left, 1.0))
        stepping, _ = network_of(self.pipe) or (None, None)
        for component, state in self._registry.states().items():
            if not state.strengths.merged:
                kept = before.get(component, {})
                state.strengths.write({name: amount for name, amount in kept.items() if name in state.entries})
                if component == stepping:
                    state.strengths.at_progress(0.0)
        follow_steps(self.pipe)

    @property
    def recordings(self) -> int:
        """How many recordings were made since `fast`: two for each shape of pictures that were drawn, and from the second
        picture on one for each shape of what text encoders, the VAE and ControlNets are given.

        There are more where strengths begin to differ by image, on merging, and where adapters come to other sites, or have
        more ranks, than there is room for.
        """
        parts = [self._denoising()[1], *(part for _, part, _ in parts_beside(self.pipe))]
        return sum(engine.recordings for part in parts if (engine := drawing.engine_of(part)) is not None)

    @property
    def plain_because(self) -> str | None:
        """Why the last step was computed plainly in spite of `fast`; None where it was not."""
        engine = drawing.engine_of(self._denoising()[1])
        return None if engine is None else engine.refused

    @property
    def plain_parts(self) -> dict[str, str]:
        """Why parts beside the network were computed plainly in spite of `fast` when they last were, by their names."""
        found = {name: drawing.engine_of(part) for name, part, _ in parts_beside(self.pipe)}
        return {name: engine.refused for name, engine in found.items() if engine is not None and engine.refused is not None}

    def _denoising(self) -> tuple[str, nn.Module]:
        found = network_of(self.pipe)
        if found is None:
            raise UserError("a language model has no steps that fast drawing could record")
        return found

    @property
    def _registry(self) -> Registry:
        return Registry(components(self.pipe))

    def _pack(self) -> None:
        for part in components(self.pipe).values():
            sites.pack(part)

    def _refuse_fused(self, doing: str) -> None:
        found = network_of(self.pipe)
        if found is not None:
            refuse_fused(found[1], doing)

    def _free_name(self, stem: str) -> str:
        base, taken = re.sub(r"[^\w-]", "_", stem) or "adapter", (*self.names, *self.waiting)
        candidates = (base if count == 1 else f"{base}_{count}" for count in range(1, len(taken) + 2))
        return next(name for name in candidates if name not in taken)


def _is_nothing(amount: Amount) -> bool:
    """Whether an amount is plainly 0."""
    return isinstance(amount, (int, float)) and amount == 0


def _file(source: str | Path | Plan) -> Path:
    return source.path if isinstance(source, Plan) else adapter_file(at_home(Path(source)))


def _planned(source: str | Path | Plan, component: str | None, word: str | None) -> Plan:
    """The plan of a file. Raises UserError where it was made with something else said of it."""
    given = source if isinstance(source, Plan) else formats.plan(_file(source), component=component, word=word)
    if (given.component, given.word) != (component or given.component, word or given.word):
        raise UserError(f"{given.path} was planned already; say component and word to formats.plan")
    return given


def _told(name: str, given: Plan, read: Loaded) -> LoadedAdapter:
    """What is known of an adapter of a file."""
    return LoadedAdapter(name, given.path, read.spec, read.report, read.warnings, given.digests, given.component, given.word)


def _known_blocks(
    amounts: Mapping[str, Amount], component: str, own: tuple[str, ...], everywhere: list[str]
) -> dict[str, OverSteps]:
    """Strengths for a component, with the blocks of other components left out. Raises UserError for a block that is unknown
    everywhere."""
    chosen: dict[str, OverSteps] = {}
    for name, given in amounts.items():
        named = named_blocks(given)
        if part := next((one for one in named if one in families.components() and one not in everywhere), None):
            raise UserError(
                f"{part!r} is a component and no block; say ByPart(components={{{part!r}: 0.5}}, blocks={{'mid': 1.0}})"
            )
        refuse_unknown(named, everywhere)
        amount = of_component(given, component, own)
        if isinstance(amount, Mapping) and not isinstance(amount, Tensor):
            amount = {block: value for block, value in amount.items() if weighed({block: value}, own)}
        chosen[name] = amount
    return chosen


class StepWatch(Watch):
    """A hook that runs before each step of a network, while schedules follow steps or images have strengths of their own.

    It reads what the components of the pipeline that calls carry.

    Args:
        pipe: The pipeline whose scheduler tells the steps where none calls the network. It is not kept alive.
    """

    def __init__(self, pipe: Pipeline | None) -> None:
        super().__init__(pipe)
        pipelines.watch()

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bring the strengths to the step that begins. Raises UserError where strengths do not fit what is drawn."""
        network = pipelines.uncompiled(network)
        strengths = sites.strengths(network)
        scheduled = strengths is not None and bool(strengths.schedules)
        if scheduled or not torch.compiler.is_compiling():
            self._begin(network, args, kwargs)

    # It asks which pipeline draws, which cannot be traced. A graph is broken here only while a schedule is set.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        strengths = sites.strengths(network)
        scheduled = strengths is not None and bool(strengths.schedules)
        at_work = pipelines.drawing_with(network)
        pipe = at_work or self.pipe
        if pipe is None:
            if scheduled:
                raise UserError(
                    "the network is called by no pipeline, so a schedule cannot tell how far the steps are; call it through"
                    " the pipeline, or set a plain strength"
                )
            return
        denoiser = denoiser_of(pipe)
        call = denoiser.read_call(args, kwargs)
        if at_work is not None:
            _check_images(at_work, denoiser.images(at_work, call.rows))
        if strengths is not None and scheduled and drawing.engine_of(network) is None:  # which follows by itself
            strengths.at_progress(pipelines.progress(pipe, float(torch.as_tensor(call.timestep).flatten()[0])))


def follow_steps(pipe: Base) -> None:
    """Watch the network of a pipeline: its steps while a schedule is set or images have strengths of their own, and the
    options that it is called with while there are adapters.

    Args:
        pipe: The pipeline.
    """
    watch.keep(OptionWatch, pipe, carries)
    watch.keep(StepWatch, pipe, _has_steps)


def _has_steps(pipe: Base) -> bool:
    """Whether strengths on a pipeline depend on the step, or on how many images are drawn."""
    registry = Registry(components(pipe))
    return bool(registry.schedules) or registry.images > 1


def _check_images(pipe: Pipeline, drawn: int) -> None:
    """Raise UserError where a pipeline draws another number of images than have strengths of their own."""
    images, layout = Registry(components(pipe)).images, present()
    if images > 1 and drawn * (1 if layout is None else layout.count) != images:
        verb = "is" if drawn == 1 else "are"
        raise UserError(f"there are strengths for {images} images, but {drawn} {verb} drawn; set as many, or one for all")


def _checked(base: Base) -> Base:
    """A base of a kind that takes adapters. Raises UserError for another."""
    # Through the package, which imports diffusers only for what needs it.
    return base if isinstance(base, LanguageModel) else bases.load_base(base)
