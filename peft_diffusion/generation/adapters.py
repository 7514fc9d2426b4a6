"""The loader: attach adapters from files to a pipeline, set how much of each, merge and remove them."""

import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import bases, formats
from ..bases import LanguageModel, components, describe
from ..bases.words import teach
from ..core import merge as merging
from ..core import quantized
from ..core import site as sites
from ..core.errors import UserError
from ..core.strength import Strength
from ..formats import Coverage, Spec
from ..formats.container import sha256
from .strength_schedule import Schedule

logger = logging.getLogger(__name__)

Amount: TypeAlias = "Strength | Schedule"
"""A number; one per image; either per block; or a schedule over the steps."""

_NEAR = 0.5  # timesteps are whole numbers, or fractions that are passed on as they are


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on a pipeline: the file that it came from and what the file says of it."""

    name: str
    path: Path
    sha256: str
    spec: Spec
    report: Coverage
    warnings: tuple[str, ...]


class Adapters:
    """The adapters of a base: ``load``, ``set``, ``remove``, ``merge``, ``unmerge``.

    The base, a Stable Diffusion pipeline or a ``LanguageModel``, is used as ever: ``Adapters`` changes what its UNet and
    text encoders, or its language model, compute, and nothing else of it. Take it back by removing every adapter: the base
    is then the one it was, to the bit.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = _checked(pipe)
        self.base = describe(self.pipe)  # before anything is merged
        self._loaded: dict[str, LoadedAdapter] = {}
        self._schedules: dict[str, Schedule] = {}
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in the order of loading."""
        return tuple(self._loaded)

    def __getitem__(self, name: str) -> LoadedAdapter:
        """What was loaded under that name. Raises UserError for a name that is not loaded."""
        if name not in self._loaded:
            raise UserError(f"no adapter {name!r} is loaded; there are: {', '.join(self._loaded) or 'none'}")
        return self._loaded[name]

    def load(self, path: str | Path, name: str | None = None, strength: Amount = 1.0, *, strict: bool = False) -> str:
        """Attach an adapter from a file; returns its name, by default that of the file.

        Raises UserError, and changes nothing, for a file that is no adapter, is damaged or was made for another base, for
        a name that is taken, and, if ``strict``, where a tensor of the file found no site.
        """
        file = Path(path)
        self._refuse_merged("load another")
        chosen = name or self._free_name(file.stem)
        if chosen in self._loaded:
            raise UserError(f"an adapter {chosen!r} is loaded already; remove it first or choose another name")
        read = formats.load(file, self.pipe, strict=strict)
        parts = self._components()
        attached: list[str] = []
        try:
            for component, built in read.components.items():
                sites.attach_built(parts[component], chosen, built)
                attached.append(component)
            teach(self.pipe)
            self._loaded[chosen] = LoadedAdapter(chosen, file, sha256(file), read.spec, read.report, read.warnings)
            self.set({chosen: strength})
        except BaseException:
            for component in attached:
                sites.detach(parts[component], chosen)
            teach(self.pipe)
            self._loaded.pop(chosen, None)
            self._schedules.pop(chosen, None)
            self._follow_steps()
            raise
        self._pack()
        return chosen

    def set(self, amounts: Mapping[str, Amount] | None = None, /, **more: Amount) -> None:
        """Set strengths by name, as ``set(ink=0.6)`` or ``set({"ink": 0.6})``; adapters not named keep theirs.

        Raises UserError for a name that is not loaded, a strength that is no finite number, and while merged.
        """
        wanted: dict[str, Amount] = {**(amounts or {}), **more}
        for name in wanted:
            self[name]
        self._refuse_merged("change a strength")
        schedules = {name: amount for name, amount in wanted.items() if isinstance(amount, Schedule)}
        if schedules and isinstance(self.pipe, LanguageModel):
            raise UserError(f"{', '.join(schedules)}: a schedule runs over denoising steps, which text does not have")
        plain: dict[str, Strength] = {n: a for n, a in wanted.items() if not isinstance(a, Schedule)}
        for component, part in self._components().items():
            present = set(sites.names(part))
            first = {n: s.at(0.0) if component == "unet" else s.mean for n, s in schedules.items()}
            self._write(part, {n: a for n, a in {**plain, **first}.items() if n in present})
        kept = {name: schedule for name, schedule in self._schedules.items() if name not in wanted}
        self._schedules = kept | schedules
        self._follow_steps()

    def remove(self, name: str) -> None:
        """Take an adapter away, and everything that it held. Raises UserError for a name that is not loaded."""
        self[name]
        self._refuse_merged("remove one")
        for part in self._components().values():
            if name in sites.names(part):
                sites.detach(part, name)
        teach(self.pipe)
        del self._loaded[name]
        self._schedules.pop(name, None)
        self._follow_steps()
        self._pack()

    def merge(self) -> dict[str, merging.Merged]:
        """Fold the adapters into the weights at their present strengths, where they are not yet: generation then costs what
        the base costs.

        Returns what that did by component, and warns of the error where quantized weights had to be rounded again. Raises
        UserError where strengths differ by image or over the steps, or a method cannot be folded; nothing is then
        merged.
        """
        if self._schedules:
            raise UserError(f"{', '.join(self._schedules)}: a strength that changes over the steps cannot be merged")
        self._adapted()
        parts = {n: p for n, p in self._components().items() if (found := sites.strengths(p)) and not found.merged}
        if not parts:
            raise UserError("there is nothing to merge: the adapters are merged already")
        done: dict[str, merging.Merged] = {}
        try:
            for name, part in parts.items():
                done[name] = merging.merge(part)
        except UserError:
            for name in done:
                merging.unmerge(parts[name])
            raise
        for name, told in done.items():
            if told.quantized:
                kind = quantized.kind_of(parts[name])
                logger.warning(
                    f"{name}: {told.quantized} {kind} weights were quantized again with the adapters in them, which moved"
                    f" them by {told.error:.1%} of their size, {told.error_of_change:.0%} of what the adapters changed;"
                    " unmerged, they act in full"
                )
        return done

    def unmerge(self) -> None:
        """Put the weights back as they were, to the bit. Raises UserError where nothing is merged."""
        merged = self._merged()
        if not merged:
            raise UserError("nothing is merged")
        for part in merged:
            merging.unmerge(part)

    def _components(self) -> dict[str, nn.Module]:
        return components(self.pipe)

    def _merged(self) -> list[nn.Module]:
        return [part for part in self._components().values() if (found := sites.strengths(part)) and found.merged]

    def _refuse_merged(self, wish: str) -> None:
        if self._merged():
            raise UserError(f"adapters are merged into the weights; unmerge them before you {wish}")

    def _adapted(self) -> list[nn.Module]:
        found = [part for part in self._components().values() if sites.names(part)]
        if not found:
            raise UserError("no adapter is loaded")
        return found

    def _pack(self) -> None:
        for part in self._components().values():
            sites.pack(part)

    def _free_name(self, stem: str) -> str:
        base = re.sub(r"[^\w-]", "_", stem) or "adapter"
        candidates = (base if count == 1 else f"{base}_{count}" for count in range(1, len(self._loaded) + 2))
        return next(name for name in candidates if name not in self._loaded)

    def _write(self, part: nn.Module, strengths: Mapping[str, Strength]) -> None:
        found = sites.strengths(part)
        if found is not None and strengths:
            found.write(self._known_blocks(part, strengths))

    def _known_blocks(self, part: nn.Module, strengths: Mapping[str, Strength]) -> dict[str, Strength]:
        """Strengths per block, with the blocks of other components left out; unknown everywhere is an error."""
        everywhere = {b for other in self._adapted() for b in self._blocks(other)}
        own = set(self._blocks(part))
        chosen: dict[str, Strength] = {}
        for name, strength in strengths.items():
            if isinstance(strength, Mapping) and not isinstance(strength, Tensor):
                unknown = sorted(str(block) for block in set(strength) - everywhere)
                if unknown:
                    raise UserError(f"there is no block {', '.join(unknown)}; there are: {', '.join(sorted(everywhere))}")
                strength = {block: value for block, value in strength.items() if block in own}
            chosen[name] = strength
        return chosen

    def _blocks(self, part: nn.Module) -> tuple[str, ...]:
        found = sites.strengths(part)
        return found.blocks if found else ()

    def _follow_steps(self) -> None:
        """Watch the UNet's calls while, and only while, a schedule is set or images have strengths of their own."""
        unet = self._components().get("unet")
        wanted = bool(self._schedules) or self._images() > 1
        if unet is not None and wanted and self._hook is None:
            self._hook = unet.register_forward_pre_hook(self._before_step, with_kwargs=True)
        elif not wanted and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _images(self) -> int:
        """How many images have strengths of their own."""
        return max((found.images for p in self._components().values() if (found := sites.strengths(p))), default=1)

    def _before_step(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            _check_images(self._images(), kwargs["sample"] if "sample" in kwargs else args[0])
        if self._schedules:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            pipe = _calling() or self.pipe
            progress = _progress(pipe.scheduler.timesteps, float(torch.as_tensor(timestep).flatten()[0]))
            present = set(sites.names(unet))
            self._write(unet, {n: s.at(progress) for n, s in self._schedules.items() if n in present})


def _check_images(images: int, sample: Tensor) -> None:
    """Raise UserError where a pipeline draws another number of images than have strengths of their own."""
    pipe = _calling() if images > 1 else None
    if pipe is None:
        return
    drawn = len(sample) // (2 if pipe.do_classifier_free_guidance else 1)
    if drawn != images:
        verb = "is" if drawn == 1 else "are"
        raise UserError(f"there are strengths for {images} images, but {drawn} {verb} drawn; set as many, or one for all")


def _calling() -> Any | None:
    """The pipeline whose call this is in: of several with the same UNet, only that one knows if it guides, and its steps."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if hasattr(type(owner), "do_classifier_free_guidance"):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _progress(timesteps: Tensor, now: float) -> float:
    """How far a timestep is from the first, at 0, to the last, at 1; some samplers take one twice. Raises UserError for
    one that is not among them."""
    steps = list(dict.fromkeys(timesteps.tolist()))
    nearest = min(range(len(steps)), key=lambda step: abs(steps[step] - now))
    if abs(steps[nearest] - now) > _NEAR:
        raise UserError(
            f"the UNet is called at timestep {now:g}, which is none of the scheduler's {len(steps)}: a schedule cannot tell"
            " how far that is; call it through the pipeline, or set a plain strength"
        )
    return nearest / max(1, len(steps) - 1)


def _checked(base: Any) -> Any:
    """A base of a kind that takes adapters. Raises UserError for another."""
    # Through the package, which imports diffusers only for what needs it.
    return base if isinstance(base, LanguageModel) else bases.load_base(base)
