"""Pictures from prompts, seeds and strengths, in batches; what ``generate``, ``blend`` and ``demo`` share."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from ..bases import BaseInfo, denoiser_of
from ..bases.base import dtype_of
from ..bases.pipelines import Pipeline, computes_on, drawing, end_guidance, guided_tensors, guides, interrupt, uncompiled
from ..bases.prompts import Encoding
from ..bases.regional_attention import Maps, watching
from ..bases.schedulers import BY_STEPS, NOT_UNIFORM, SCHEDULERS, SPACINGS, parted
from ..core.errors import UserError, first_line
from ..core.events import Never, Observer, Observers, Progress, Stop, Warned, check_stop
from ..core.strength import Amount
from ..core.strength_schedule import ByPart
from ..data.images import MAX_PIXELS
from ..data.prompts import in_words
from ..fast.drawing import held
from .composition import Rows, composed, rows_of
from .compositions.declared import Drawing
from .control import Controls, controlled
from .hires import LANCZOS, Hires
from .region_settings import check_compose
from .regions import Division, Regional, columns
from .settings import Sampling
from .source import Source
from .telling import Telling, triggers
from .tiling import seamless
from .upscaling import check as check_hires
from .upscaling import enlarged, noised_by, second

if TYPE_CHECKING:
    from .adapters import Adapters

_Made = TypeVar("_Made")
_WHAT = "drawing"  # what progress is told of
_OF_NOISE = "rescale_betas_zero_snr"  # what schedulers of diffusers call a schedule that begins with pure noise


@dataclass(frozen=True)
class Cell:
    """One picture to make.

    Attributes:
        prompt: What it shows.
        seed: That of its noise.
        strengths: Those of the adapters by name, 0 for one that is not named; None leaves all of them as they are, which
            the cells of a call do all or none.
        negative: What it should not show; None is what is said for all.
        division: Its regions; None where it has none.
    """

    prompt: str
    seed: int
    strengths: Mapping[str, float | ByPart] | None
    negative: str | None = None
    division: Division | None = None

    @property
    def amounts(self) -> Mapping[str, float | ByPart]:
        """The strengths that adapters have anywhere in the picture, by name; of several one that is not 0."""
        found = dict(self.strengths or {})
        parts = () if self.division is None else self.division.parts
        for name, amount in (pair for part in parts for pair in part.strengths.items()):
            found[name] = found.get(name) or amount
        return found

    def against(self, sampling: Sampling) -> str:
        """Tell what it should not show.

        Args:
            sampling: How it is drawn.

        Returns:
            Its own negative prompt, or that of all.
        """
        return sampling.negative if self.negative is None else self.negative


def size(info: BaseInfo, sampling: Sampling, source: Source | None = None) -> tuple[int, int]:
    """Choose the size of pictures.

    Args:
        info: The base.
        sampling: What was asked for.
        source: What they start from.

    Returns:
        Width and height in pixels.

    Raises:
        UserError: The base cannot make such a side; names the nearest that it can. Or there are too many pixels.
    """
    usual = (info.resolution, info.resolution) if source is None else source.image.size
    sides = (sampling.width or usual[0], sampling.height or usual[1])
    for name, side in zip(("width", "height"), sides, strict=True):
        if side % info.step:
            below, above = side - side % info.step, side - side % info.step + info.step
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(f"{name} {side} is no multiple of {info.step}, which the base {info.name!r} needs; take {near}")
    _check_pixels(sides)
    if sampling.second_pass is not None:
        _check_pixels(sampling.second_pass.size(*sides, info.step))
    return sides


def _check_pixels(sides: tuple[int, int]) -> None:
    if sides[0] * sides[1] > MAX_PIXELS:
        raise UserError(f"{sides[0]}x{sides[1]} is over the limit of {MAX_PIXELS:,} pixels a picture; take smaller sides")


def paint(
    adapters: "Adapters",
    cells: Sequence[Cell],
    sampling: Sampling,
    source: Source | None = None,
    *,
    tell: Observer = Observers(),  # noqa: B008 -- has no state
    stop: Stop = Never(),  # noqa: B008 -- has no state
) -> Iterator[Image.Image]:
    """Draw pictures, ``sampling.batch_size`` at a time, each from the noise of its own seed, or from ``source`` and that.

    A picture depends on its own cell alone, up to rounding. The pipeline's scheduler is afterwards what it was; the adapters
    keep the strengths of the last batch.

    Args:
        adapters: The adapters of the pipeline that draws.
        cells: What is drawn.
        sampling: How it is.
        source: A picture to start from.
        tell: Is told how far all batches are, and what the person should know.
        stop: Where it is set, nothing is drawn after the present batch.

    Yields:
        A picture for each cell, in order.

    Raises:
        UserError: Before anything is computed, for sizes and prompts that the base cannot take.
        Interrupted: It was stopped.
    """
    for rows, drawn in _drawn(adapters, cells, sampling, source, _paint_batch, tell, stop):
        images = [drawn[row] for row in rows.firsts]
        yield from images if source is None else map(source.kept, images)


def latents(
    adapters: "Adapters",
    cells: Sequence[Cell],
    sampling: Sampling,
    *,
    stop: Stop = Never(),  # noqa: B008 -- has no state
) -> torch.Tensor:
    """Draw pictures from noise as `paint` does, and leave them undecoded.

    Args:
        adapters: The adapters of the pipeline that draws.
        cells: What is drawn.
        sampling: How it is.
        stop: Where it is set, nothing is drawn after the present batch.

    Returns:
        What a VAE decodes, in float32 on the CPU: a row for each cell, in the shape in which the pipeline computes them.

    Raises:
        UserError: As `paint`.
        Interrupted: It was stopped.
    """
    batches = _drawn(adapters, cells, sampling, None, _latents, Observers(), stop)
    return torch.cat([drawn[rows.firsts].float().cpu() for rows, drawn in batches])


def _drawn(
    adapters: "Adapters",
    cells: Sequence[Cell],
    sampling: Sampling,
    source: Source | None,
    draw: "Callable[[_Start, Sequence[Cell], Telling, _Report, Controls], _Made]",
    tell: Observer,
    stop: Stop,
) -> "Iterator[tuple[Rows, _Made]]":
    """Draw batches: the rows of each, and what they became."""
    pipe, hires = adapters.pipe, sampling.second_pass
    sides = size(adapters.base, sampling, source)
    if hires is not None:
        check_hires(pipe, hires)
    if any(cell.division is not None for cell in cells):
        check_compose(sampling.composition)
    cells = _divided(cells, sides, tell)
    cells = _in_words(cells, sampling, tell)
    first = sampling.taken_steps if source is None else source.steps(sampling.taken_steps)
    each = first + (0 if hires is None else hires.steps)
    starts = range(0, len(cells), sampling.batch_size)
    batches = [rows_of(cells[start : start + sampling.batch_size], sampling.composition) for start in starts]
    scheduler = scheduler_of(adapters, cells, sampling)
    adapters.keep_steps_on_host(scheduler)
    _tell_of_scheduler(pipe, scheduler, sampling, tell)
    telling = Telling(pipe, sampling, triggers(adapters, cells))
    _check_prompts(adapters, [rows.cells for rows in batches], telling)
    told = Drawing(adapters, scheduler, sampling.taken_steps, partial(_read, adapters, telling), sampling.compose_file)
    steered = controlled(pipe, sampling.controls(), sampling.control_scale)
    with steered as controls, drawing(pipe, scheduler):
        for number, rows in enumerate(batches):
            check_stop(stop, f"stopped after {number * sampling.batch_size} of {len(cells)} pictures")
            batch = rows.cells
            set_strengths(adapters, composed(batch, sampling.composition, told))
            report = _Report(tell, number * each, len(batches) * each, sampling.guidance_stop)
            start = _noise(pipe, batch, sides, sampling) if source is None else _start(pipe, batch, source, sampling)
            with rows.averaged(denoiser_of(pipe).network):
                if hires is not None:
                    start = _second(start, hires, adapters, batch, telling, report, controls)
                    report = replace(report, before=report.before + first)
                    set_strengths(adapters, composed(batch, sampling.composition, told.of_pass(hires.planned)))
                drawn = draw(start, batch, telling, report, controls)
            yield rows, drawn


def _divided(cells: Sequence[Cell], sides: tuple[int, int], tell: Observer) -> list[Cell]:
    """The pictures with their regions in shares of them."""
    divisions = [cell.division for cell in cells if cell.division is not None]
    for note in dict.fromkeys(note for division in divisions for note in division.cut(*sides)):
        tell(Warned(note))
    return [cell if cell.division is None else replace(cell, division=cell.division.on(*sides)) for cell in cells]


def _read(adapters: "Adapters", telling: Telling, cell: Cell) -> Encoding:
    """A prompt as the adapters of its picture let it be read."""
    set_strengths(adapters, [cell])
    return telling.as_learned(cell.prompt)


def probed(
    adapters: "Adapters", batch: Sequence[Cell], sampling: Sampling, source: Source | None, maps: Maps, until: float
) -> None:
    """Draw pictures as far as a noise level, to see what they read of their prompts.

    Args:
        adapters: The adapters of the pipeline that draws.
        batch: The pictures.
        sampling: How they are drawn.
        source: What they start from.
        maps: Takes what they read.
        until: The share of the noise levels, from the noisiest, that is gone through; a step at least.

    Raises:
        UserError: As `paint`.
    """
    pipe, sides = adapters.pipe, size(adapters.base, sampling, source)
    scheduler = scheduler_of(adapters, batch, sampling)
    batch = _in_words(batch, sampling, Observers())
    adapters.keep_steps_on_host(scheduler)
    telling = Telling(pipe, sampling, triggers(adapters, batch))
    network = denoiser_of(pipe).network
    steered = controlled(pipe, sampling.controls(), sampling.control_scale)
    with steered as controls, drawing(pipe, scheduler):
        set_strengths(adapters, batch)
        start = _noise(pipe, batch, sides, sampling) if source is None else _start(pipe, batch, source, sampling)
        with watching(network, maps, lambda: held(network)):
            _called(start, batch, telling, _Ending(Observers(), 0, 1, until), controls, "latent")


@dataclass
class FirstCall:
    """What a pipeline has made of a picture when it calls its network for the first time.

    Attributes:
        cell: The picture, its prompts in words.
        sampling: How it is drawn.
        scheduler: Its own one, which stands before the first step.
        latents: Noise as the scheduler begins with it, (1, channels, height, width).
        named: What the network is called with at every step beside latents and timestep: where the pipeline guides, tensors
            have a row without the prompt before that with it.
        guided: Whether it guides.
        arguments: What the pipeline was called with, prompts as embeddings.
        extra: What a step of the scheduler is told besides, such as the chance from which it draws.
    """

    cell: Cell
    sampling: Sampling
    scheduler: Any
    latents: torch.Tensor
    named: Mapping[str, Any]
    guided: bool
    arguments: Mapping[str, Any]
    extra: Mapping[str, Any]


def called_by(pipe: Pipeline) -> nn.Module:
    """Give the network as a pipeline calls it: in the wrapper of ``torch.compile`` where it has one.

    Args:
        pipe: The pipeline.

    Returns:
        The network.

    Raises:
        UserError: It has none.
    """
    network = denoiser_of(pipe).network
    parts = (part for part in vars(pipe).values() if isinstance(part, nn.Module))
    return next(part for part in parts if uncompiled(part) is network)


class _Called(Exception):
    """A pipeline has called its network."""


def first_call(adapters: "Adapters", cell: Cell, sampling: Sampling, tell: Observer) -> FirstCall:
    """Have the pipeline prepare a picture from noise as `paint` does, up to where it would call the network.

    Args:
        adapters: The adapters of the pipeline that draws. They have the strengths of the picture afterwards.
        cell: The picture.
        sampling: How it is drawn, without second pass, pictures that steer, and compositions.
        tell: Is told what the person should know.

    Returns:
        What was prepared.

    Raises:
        UserError: As `paint`.
    """
    pipe, sides = adapters.pipe, size(adapters.base, sampling)
    (cell,) = _in_words([cell], sampling, tell)
    scheduler = copy.deepcopy(scheduler_of(adapters, [cell], sampling))  # each picture is at another step
    adapters.keep_steps_on_host(scheduler)
    _tell_of_scheduler(pipe, scheduler, sampling, tell)
    telling = Telling(pipe, sampling, triggers(adapters, [cell]))
    _check_prompts(adapters, [[cell]], telling)
    set_strengths(adapters, [cell])
    start = _noise(pipe, [cell], sides, sampling)
    guided = sampling.guidance_stop > 0 and sampling.guided_by > 1
    told = telling.arguments(*_texts([cell], sampling), guided=guided, embedded=True)
    found: dict[str, Any] = {}

    def caught(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.update(named)
        raise _Called

    hook = called_by(pipe).register_forward_pre_hook(caught, with_kwargs=True, prepend=True)
    arguments = {**start.arguments, **told}
    try:
        with drawing(pipe, scheduler):
            extra: dict[str, Any] = pipe.prepare_extra_step_kwargs(start.generators, 0.0)
            pipe(
                **arguments,
                num_inference_steps=start.steps,
                guidance_scale=sampling.guided_by if guided else 1.0,
                generator=start.generators,
                output_type="latent",
            )
    except _Called:
        pass
    finally:
        hook.remove()
    noise = arguments.pop("latents") * scheduler.init_noise_sigma
    guided = bool(pipe.do_classifier_free_guidance)
    return FirstCall(cell, sampling, scheduler, noise, found, guided, arguments, extra)


class _Over(diffusers.DDIMScheduler):  # type: ignore[misc]
    """A scheduler without steps, by which a pipeline does with latents what it does after the last one."""

    def set_timesteps(self, num_inference_steps: int, device: "str | torch.device | None" = None) -> None:
        """Set none. The arguments are those of schedulers."""
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.zeros(0, device=device)


def finished(adapters: "Adapters", call: FirstCall, latents: torch.Tensor, tell: Observer) -> Image.Image:
    """Have the pipeline make a picture of what was drawn.

    Args:
        adapters: The adapters of the pipeline.
        call: What it was begun with.
        latents: What is left of the noise after the last step, (1, channels, height, width).
        tell: Is told what the person should know.

    Returns:
        The picture.

    Raises:
        UserError: It came out as NaN.
    """
    pipe = adapters.pipe
    with drawing(pipe, _Over()), seamless(pipe, call.sampling.tile):
        out = pipe(**call.arguments, latents=latents, num_inference_steps=1, guidance_scale=1.0, output_type="np")
    _check_finite(out.images, pipe)
    return _images(pipe, out, tell)[0]


def _tell_of_scheduler(pipe: Pipeline, scheduler: Any, sampling: Sampling, tell: Observer) -> None:
    """Warn where another scheduler draws than the one that was asked for."""
    if gives_way(pipe, scheduler, sampling):
        whose = "the base" if _begins_with_noise(pipe.scheduler) else "an adapter"
        tell(
            Warned(
                f"the scheduler {sampling.scheduler} cannot begin with pure noise, which {whose} was trained for with"
                " zero terminal SNR; ddim draws in its place"
            )
        )


def _in_words(cells: Sequence[Cell], sampling: Sampling, tell: Observer) -> list[Cell]:
    """Cells with prompts of what is read here; tells what else there was, once."""
    prompts, against = [cell.prompt for cell in cells], [cell.against(sampling) for cell in cells]
    of_parts = [part.prompt or "" for cell in cells if cell.division is not None for part in cell.division.parts]
    read = iter(in_words([*prompts, *against, *of_parts], tell))
    found = [replace(cell, prompt=next(read)) for cell in cells]
    found = [replace(cell, negative=next(read)) for cell in found]
    return [cell if cell.division is None else replace(cell, division=cell.division.worded(read)) for cell in found]


@dataclass
class _Report:
    """A pipeline's callback after each step: it passes on how far all batches are, and ends guidance where it stops."""

    tell: Observer
    before: int
    total: int
    stop: float

    def __call__(self, pipe: Pipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.tell(Progress(_WHAT, min(self.before + step + 1, self.total), self.total))
        coming = pipe.scheduler.timesteps[-pipe.num_timesteps :][step + 1 :]  # what starts from a picture skips some
        if pipe.do_classifier_free_guidance and len(coming) and not guides(pipe, float(coming[0]), self.stop):
            return end_guidance(pipe, tensors)
        return {}


@dataclass
class _Ending(_Report):
    """Ends drawing where guidance would end."""

    def __call__(self, pipe: Pipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        coming = pipe.scheduler.timesteps[-pipe.num_timesteps :][step + 1 :]
        if len(coming) and not guides(pipe, float(coming[0]), self.stop):
            interrupt(pipe)
        return {}


def ending_in_noise(scheduler: Any) -> Any:
    """Make a scheduler begin with pure noise (Lin et al. 2023, https://arxiv.org/abs/2305.08891).

    Args:
        scheduler: Any of diffusers.

    Returns:
        One of its kind that does; DDIM's in place of one that cannot.
    """
    cls, changes = type(scheduler), {_OF_NOISE: True, "timestep_spacing": "trailing"}
    if not _can_begin_with_noise(scheduler):
        name, more = SCHEDULERS["ddim"]
        cls, changes = getattr(diffusers, name), {**more, **changes}
    return cls.from_config(scheduler.config, **changes)


def _can_begin_with_noise(scheduler: Any) -> bool:
    return _OF_NOISE in inspect.signature(type(scheduler).__init__).parameters


def _begins_with_noise(scheduler: Any) -> bool:
    return bool(scheduler.config.get(_OF_NOISE))


def scheduler_of(adapters: "Adapters", cells: Sequence[Cell], sampling: Sampling) -> Any:
    """Choose the scheduler that draws: the one that was asked for, or the pipeline's own.

    Args:
        adapters: Those on the base.
        cells: What is drawn; where one has an adapter that was trained with zero terminal SNR, it begins with pure noise.
        sampling: What was asked for.

    Returns:
        The scheduler; DDIM's in place of one that cannot begin with pure noise, where it should.

    Raises:
        UserError: There are more steps than noise levels.
    """
    scheduler, hires = adapters.pipe.scheduler, sampling.second_pass
    levels = scheduler.config.num_train_timesteps
    if sampling.taken_steps > levels:
        raise UserError(f"steps must be at most {levels}, the noise levels that the base knows, not {sampling.taken_steps}")
    if hires is not None and hires.planned > levels:
        raise UserError(
            f"{hires.steps} steps of a second pass at strength {hires.strength:g} are the last of {hires.planned}, and the"
            f" base knows {levels} noise levels; lower --hires-steps, or raise --hires-strength"
        )
    if sampling.scheduler is not None:
        for steps in {sampling.taken_steps, *(() if hires is None else (hires.planned,))}:
            scheduler = _named(sampling.scheduler, adapters, steps)
            # One that knows no such schedule would leave that of the base's configuration out, and begin with another.
            if _begins_with_noise(adapters.pipe.scheduler) and not _can_begin_with_noise(scheduler):
                scheduler = _named("ddim", adapters, steps)
    used = {name for cell in cells for name, strength in cell.amounts.items() if strength != 0}
    known = used & {*adapters.names, *adapters.waiting}
    of_noise = any(adapters[name].spec.training.get("zero_terminal_snr") for name in known)
    return ending_in_noise(scheduler) if of_noise else scheduler


def _named(name: str, adapters: "Adapters", steps: int) -> Any:
    """A scheduler by its name, from the configuration of the base's. Raises UserError for one that cannot be."""
    known, (kind, spacing) = denoiser_of(adapters.pipe).schedulers, parted(name)
    if kind not in known:
        raise UserError(f"the base {adapters.base.name!r} has no scheduler {kind}; choose one of: {', '.join(known)}")
    cls, changes = getattr(diffusers, known[kind][0]), {**known[kind][1], **SPACINGS.get(spacing, {})}
    if find_spec("scipy") is None and ("scipy" in getattr(cls, "_backends", ()) or spacing == "beta"):
        raise UserError(f"the scheduler {name} needs scipy: pip install scipy; or take another")
    if kind in BY_STEPS and spacing:
        changes = {"timestep_spacing": "linspace", **changes}
    lacking = set(SPACINGS.get(spacing, {})) - set(inspect.signature(cls.__init__).parameters)
    if lacking or (spacing == "uniform" and kind in NOT_UNIFORM):
        raise UserError(f"the scheduler {kind} cannot space its noise levels so: {spacing}; take another, or {kind} alone")
    own = adapters.pipe.scheduler.config
    plain = {option for options in SPACINGS.values() for option in options if option.startswith("use_")}
    base = {option: value for option, value in own.items() if not (spacing and option in plain)}
    try:
        made = cls.from_config(base, **changes)
        copy.deepcopy(made).set_timesteps(steps)  # making some anew takes half a second
        return made
    except ValueError as error:
        raise UserError(f"the scheduler {name} cannot take {steps} steps here: {first_line(error)}") from error


def gives_way(pipe: Pipeline, scheduler: Any, sampling: Sampling) -> bool:
    """Tell whether DDIM's scheduler draws in place of the one that was asked for.

    Args:
        pipe: The pipeline.
        scheduler: What draws.
        sampling: What was asked for.

    Returns:
        Whether it does.
    """
    asked = sampling.scheduler
    return asked is not None and type(scheduler).__name__ != denoiser_of(pipe).schedulers[parted(asked)[0]][0]


@dataclass(frozen=True)
class _Start:
    """What pictures begin as: a pipeline, its chance, and what it is told of sizes and of what is there; width and height.

    ``steps`` are those from pure noise, of which the share ``begins`` is taken.
    """

    pipe: Pipeline
    generators: list[torch.Generator]
    arguments: Mapping[str, Any]
    steps: int
    sides: tuple[int, int]
    begins: float = 1.0


def _noise(pipe: Pipeline, batch: Sequence[Cell], sides: tuple[int, int], sampling: Sampling) -> _Start:
    """Noise alone."""
    width, height = sides
    generators = _generators(batch)
    noise = _drawn_noise(pipe, generators, sides, sampling)
    told = {"width": width, "height": height, "latents": noise.to(computes_on(pipe), dtype_of(pipe))}
    return _Start(pipe, generators, {**whole_picture(pipe, width, height), **told}, sampling.taken_steps, sides)


def _drawn_noise(
    pipe: Pipeline, generators: Sequence[torch.Generator], sides: tuple[int, int], sampling: Sampling
) -> torch.Tensor:
    """Noise for pictures of a size, a generator each, with that of a variation in it."""
    # Drawn here, on the CPU and in float32, so that a seed means the same noise on every device and in every precision.
    (width, height), denoiser = sides, denoiser_of(pipe)
    shape = (1, denoiser.channels, height // denoiser.factor, width // denoiser.factor)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    if sampling.variation_seed is not None:
        other = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(sampling.variation_seed))
        latents = _between(latents, other, sampling.variation_strength)
    return latents


def _between(noise: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """Mix noise on the sphere that it lies on, column by column, as A1111's ``modules/rng.py`` does: it stays noise."""
    one, two = (side / side.norm(dim=2, keepdim=True) for side in (noise, other))
    angle = (one * two).sum(2, keepdim=True).clamp(-1, 1).acos()
    mixed = (((1 - share) * angle).sin() * noise + (share * angle).sin() * other) / angle.sin()
    return torch.where(angle.sin() > 1e-4, mixed, noise)


def _start(pipe: Pipeline, batch: Sequence[Cell], source: Source, sampling: Sampling) -> _Start:
    """A picture, to which the pipeline adds noise by the generators, which draw on the CPU."""
    begins = source.steps(sampling.taken_steps) / sampling.taken_steps
    told = source.call_arguments(len(batch))
    return _Start(source.pipeline(pipe), _generators(batch), told, sampling.taken_steps, source.image.size, begins)


def _second(
    start: _Start,
    hires: Hires,
    adapters: "Adapters",
    batch: Sequence[Cell],
    telling: Telling,
    report: _Report,
    controls: Controls,
) -> _Start:
    """Draw the first pass, and begin the second with what it drew and, as A1111, with noise of the same seeds."""
    pipe, info = start.pipe, adapters.base
    of_pictures = hires.upscaler == LANCZOS
    draw = _paint_batch if of_pictures else _latents
    drawn = draw(start, batch, telling, report, controls)
    sides = hires.size(*start.sides, info.step)
    generators = _generators(batch)
    noise = _drawn_noise(pipe, generators, sides, telling.asked)
    made = second(pipe)
    made.scheduler = noised_by(made.scheduler, noise)
    told = {"image": enlarged(drawn, hires, sides, denoiser_of(pipe).factor, telling.asked.tile), "strength": hires.begins}
    return _Start(made, generators, told, hires.planned, sides, hires.steps / hires.planned)


def _generators(batch: Sequence[Cell]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(cell.seed) for cell in batch]


def _paint_batch(
    start: _Start, batch: Sequence[Cell], telling: Telling, report: _Report, controls: Controls
) -> list[Image.Image]:
    out = _called(start, batch, telling, report, controls, "np")
    return _images(start.pipe, out, report.tell)


def _images(pipe: Pipeline, out: Any, tell: Observer) -> list[Image.Image]:
    """What a pipeline gives as pixels, as pictures."""
    blanked = sum(map(bool, getattr(out, "nsfw_content_detected", None) or ()))
    if blanked:
        tell(Warned(f"the base's safety checker has blanked {blanked} of {len(out.images)} pictures"))
    images: list[Image.Image] = pipe.image_processor.numpy_to_pil(out.images)
    return images


def _latents(start: _Start, batch: Sequence[Cell], telling: Telling, report: _Report, controls: Controls) -> torch.Tensor:
    """What is drawn before it is decoded, as pipelines scale it."""
    found: torch.Tensor = _called(start, batch, telling, report, controls, "latent").images
    return found


def _called(start: _Start, batch: Sequence[Cell], telling: Telling, report: _Report, controls: Controls, kind: str) -> Any:
    """What the pipeline gives, as pixels or as latents. Raises UserError for NaN."""
    sampling = telling.asked
    # What starts from a picture may start where guidance acts no more.
    guided = start.begins > 1 - sampling.guidance_stop
    regional = Regional.of(batch, sampling.tile)
    told = telling.arguments(
        *_texts(batch, sampling), guided=guided and sampling.guided_by > 1, embedded=regional is not None
    )
    by_region = nullcontext() if regional is None else regional.drawn(start.pipe, *start.sides, controls.modules)
    with seamless(start.pipe, sampling.tile, controls.modules), controls.steer(), by_region:
        out = start.pipe(
            **start.arguments,
            **controls.arguments,
            **(told if regional is None else regional.told(told, *start.sides)),
            num_inference_steps=start.steps,
            guidance_scale=sampling.guided_by if guided else 1.0,
            generator=start.generators,
            callback_on_step_end=report,
            callback_on_step_end_tensor_inputs=guided_tensors(start.pipe),
            output_type=kind,
        )
    _check_finite(out.images, start.pipe)
    return out


def _check_finite(pixels: Any, pipe: Pipeline) -> None:
    """Raise UserError for NaN, which would be written as black."""
    if not bool((torch if isinstance(pixels, torch.Tensor) else np).isfinite(pixels).all()):
        advice = "" if dtype_of(pipe) == torch.float32 else ", or take --precision float32"
        raise UserError(f"the picture came out as NaN; lower the strength or the guidance{advice}")


def whole_picture(pipe: Pipeline, width: int, height: int) -> dict[str, Any]:
    """Tell a pipeline that paints parts of a picture anew to paint all of it.

    Args:
        pipe: The pipeline.
        width: Pixels.
        height: Pixels.

    Returns:
        What it is called with besides; nothing for others.
    """
    if not denoiser_of(pipe).inpaints:
        return {}
    empty, everything = Image.new("RGB", (width, height), "gray"), Image.new("L", (width, height), 255)
    return {"image": empty, "mask_image": everything, "strength": 1.0}


def _check_prompts(adapters: "Adapters", batches: Sequence[Sequence[Cell]], telling: Telling) -> None:
    """Raise UserError for prompts that cannot be read at the strengths that each batch will have."""
    different = {
        tuple((cell.prompt, cell.negative, *sorted((cell.strengths or {}).items())) for cell in columns(batch)): batch
        for batch in batches
    }
    for batch in different.values():
        set_strengths(adapters, batch)
        for texts in _texts(batch, telling.asked):
            telling.check(texts)


def _texts(batch: Sequence[Cell], sampling: Sampling) -> tuple[list[str], list[str]]:
    """The prompts of a batch and the negative ones; where its pictures have regions, those of each region."""
    return [cell.prompt for cell in columns(batch)], [cell.against(sampling) for cell in columns(batch)]


def set_strengths(adapters: "Adapters", batch: Sequence[Cell]) -> None:
    """Set the strengths of a batch: one where its pictures agree, and one for each picture, or each region, where not.

    Args:
        adapters: Those on the base.
        batch: The pictures.
    """
    named = [cell.strengths for cell in columns(batch) if cell.strengths is not None]
    if not named:
        return
    used = {name for strengths in named for name, amount in strengths.items() if amount != 0}
    names = (*adapters.names, *(name for name in adapters.waiting if name in used))
    wanted = {name: [strengths.get(name, 0.0) for strengths in named] for name in names}
    # All at once: adapters that still had strengths for a batch of another size would not agree with the first.
    amounts: dict[str, Amount] = {name: values[0] if len(set(values)) == 1 else values for name, values in wanted.items()}
    adapters.set(amounts)
