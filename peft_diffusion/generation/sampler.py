"""Pictures from prompts, seeds and strengths, in batches; what ``generate``, ``blend`` and ``demo`` share."""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import diffusers
import numpy as np
import torch
from PIL import Image

from ..bases import BaseInfo, denoiser_of
from ..bases.base import dtype_of, text_encoders
from ..bases.pipelines import drawing, end_guidance, guided_tensors
from ..core.errors import UserError
from .adapters import Adapters
from .settings import Choice, Sampling
from .source import Source

log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the steps done and the steps in all, over all batches."""

# Name: the class in diffusers, and what is set besides the base's own configuration.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # The class clips what it predicts to [-1, 1] unless told otherwise, which latents do not keep to.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@dataclass(frozen=True)
class Cell:
    """One picture to make.

    Attributes:
        prompt: What it shows.
        seed: That of its noise.
        strengths: Those of the adapters by name, 0 for one that is not named; None leaves all of them as they are, which
            the cells of a call do all or none.
    """

    prompt: str
    seed: int
    strengths: Mapping[str, float] | None


def size(info: BaseInfo, sampling: Sampling, source: Source | None = None) -> tuple[int, int]:
    """Width and height in pixels. Raises UserError for sides that the base cannot make, naming the nearest that it can."""
    usual = (info.resolution, info.resolution) if source is None else source.image.size
    sides = (sampling.width or usual[0], sampling.height or usual[1])
    for name, side in zip(("width", "height"), sides, strict=True):
        if side % info.step:
            below, above = side - side % info.step, side - side % info.step + info.step
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(f"{name} {side} is no multiple of {info.step}, which the base {info.name!r} needs; take {near}")
    return sides


def paint(
    adapters: Adapters,
    cells: Sequence[Cell],
    sampling: Sampling,
    progress: Progress | None = None,
    source: Source | None = None,
) -> Iterator[Image.Image]:
    """The pictures of ``cells`` in order, computed ``sampling.batch_size`` at a time, each from the noise of its own seed,
    or from ``source`` and that.

    A picture depends on its own cell alone, up to rounding. The pipeline's scheduler is afterwards what it was; the adapters
    keep the strengths of the last batch. Raises UserError, before anything is computed, for sizes and prompts that the base
    cannot take.
    """
    pipe = adapters.pipe
    width, height = size(adapters.base, sampling, source)
    each = sampling.steps if source is None else source.steps(sampling.steps)
    batches = [cells[start : start + sampling.batch_size] for start in range(0, len(cells), sampling.batch_size)]
    scheduler = scheduler_of(adapters, cells, sampling)
    if gives_way(scheduler, sampling):
        log.warning(
            f"the scheduler {sampling.scheduler} cannot begin with pure noise, which an adapter was trained for with zero"
            " terminal SNR; ddim draws in its place"
        )
    _check_prompts(adapters, batches, sampling.negative)
    with drawing(pipe, scheduler):
        for number, batch in enumerate(batches):
            _set_strengths(adapters, batch)
            report = _Report(progress, number * each, len(batches) * each, sampling.guidance_stop)
            start = _noise(pipe, batch, (width, height)) if source is None else _start(pipe, batch, source)
            yield from _paint_batch(start, batch, sampling, report, source)


def load_choices(adapters: Adapters, choices: Sequence[Choice], prompts: Sequence[str]) -> list[str]:
    """Load adapters from their files; returns their names, and logs what the person should know of them."""
    names = [adapters.load(choice.parsed(), strength=choice.strength) for choice in choices]
    for name in names:
        for warning in adapters[name].warnings:
            log.warning(warning)
        triggers = adapters[name].spec.triggers
        for prompt in dict.fromkeys(prompts):
            if triggers and not any(_contains(prompt, trigger) for trigger in triggers):
                words = " or ".join(f'"{trigger}"' for trigger in triggers)
                log.info(f'{adapters[name].path} is called by {words}, which the prompt "{prompt}" does not contain')
    return names


def check_lengths(pipe: Any, texts: Sequence[str]) -> None:
    """Raise UserError for a text that the base's text encoders would cut, naming the words that would be lost.

    The texts are those of a batch, in order: learned words take room too, and which ones do depends on the strengths.
    """
    for name in text_encoders(pipe).values():
        tokenizer = getattr(pipe, name)
        room = tokenizer.model_max_length - 2  # the start and the end take a token each
        rows = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False).input_ids
        for text, tokens in zip(texts, rows, strict=True):
            if len(tokens) > room:
                lost = tokenizer.decode(tokens[room:]).strip()
                raise UserError(
                    f'the prompt "{text[:40]}..." has {len(tokens)} tokens, of which the base reads {room}; shorten it,'
                    f' or it would lose "{lost}"'
                )


@dataclass
class _Report:
    """A pipeline's callback after each step: it passes on how far all batches are, and ends guidance where it stops."""

    progress: Progress | None
    before: int
    total: int
    stop: float

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.progress is not None:
            self.progress(min(self.before + step + 1, self.total), self.total)
        coming = pipe.scheduler.timesteps[-pipe.num_timesteps :][step + 1 :]  # what starts from a picture skips some
        if pipe.do_classifier_free_guidance and len(coming) and not guides(pipe, float(coming[0]), self.stop):
            return end_guidance(pipe, tensors)
        return {}


def guides(pipe: Any, timestep: float, stop: float) -> bool:
    """Whether guidance acts at a timestep, when it does in so large a share of them from the noisiest.

    In a limited interval it spoils less of what was learned (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724).
    """
    steps: int = pipe.scheduler.config.num_train_timesteps
    return timestep >= (1 - stop) * steps


def ending_in_noise(scheduler: Any) -> Any:
    """A scheduler that begins with pure noise (Lin et al. 2023, https://arxiv.org/abs/2305.08891), for what was trained with
    zero terminal SNR; DDIM's in place of one that cannot."""
    cls, changes = type(scheduler), {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if "rescale_betas_zero_snr" not in inspect.signature(cls.__init__).parameters:
        name, more = SCHEDULERS["ddim"]
        cls, changes = getattr(diffusers, name), {**more, **changes}
    return cls.from_config(scheduler.config, **changes)


def scheduler_of(adapters: Adapters, cells: Sequence[Cell], sampling: Sampling) -> Any:
    """The scheduler that draws: the one that was asked for, or the pipeline's own; where a cell has an adapter that was
    trained so, from pure noise, as ``ending_in_noise`` says. Raises UserError for more steps than there are noise levels.
    """
    scheduler = adapters.pipe.scheduler
    levels = scheduler.config.num_train_timesteps
    if sampling.steps > levels:
        raise UserError(f"steps must be at most {levels}, the noise levels that the base knows, not {sampling.steps}")
    if sampling.scheduler is not None:
        name, changes = SCHEDULERS[sampling.scheduler]
        scheduler = getattr(diffusers, name).from_config(scheduler.config, **changes)
    used = {name for cell in cells for name, strength in (cell.strengths or {}).items() if strength != 0}
    of_noise = any(adapters[name].spec.training.get("zero_terminal_snr") for name in used & set(adapters.names))
    return ending_in_noise(scheduler) if of_noise else scheduler


def gives_way(scheduler: Any, sampling: Sampling) -> bool:
    """Whether what draws is DDIM's in place of the scheduler that was asked for."""
    return sampling.scheduler is not None and type(scheduler).__name__ != SCHEDULERS[sampling.scheduler][0]


@dataclass(frozen=True)
class _Start:
    """What pictures begin as: a pipeline, its chance, and what it is told of sizes and of what is there."""

    pipe: Any
    generators: list[torch.Generator]
    told: Mapping[str, Any]


def _noise(pipe: Any, batch: Sequence[Cell], sides: tuple[int, int]) -> _Start:
    """Noise alone."""
    width, height = sides
    generators = _generators(batch)
    # Drawn here, on the CPU and in float32, so that a seed means the same noise on every device and in every precision.
    shape = (1, denoiser_of(pipe).channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    told = {"width": width, "height": height, "latents": latents.to(pipe.device, dtype_of(pipe))}
    return _Start(pipe, generators, {**whole_picture(pipe, width, height), **told})


def _start(pipe: Any, batch: Sequence[Cell], source: Source) -> _Start:
    """A picture, to which the pipeline adds noise by the generators, which draw on the CPU."""
    return _Start(source.pipeline(pipe), _generators(batch), source.told(len(batch)))


def _generators(batch: Sequence[Cell]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(cell.seed) for cell in batch]


def _paint_batch(
    start: _Start, batch: Sequence[Cell], sampling: Sampling, report: _Report, source: Source | None
) -> list[Image.Image]:
    # What starts from a picture may start where guidance acts no more.
    begins = 1.0 if source is None else source.steps(sampling.steps) / sampling.steps
    guided = begins > 1 - sampling.guidance_stop
    out = start.pipe(
        **start.told,
        prompt=[cell.prompt for cell in batch],
        negative_prompt=[sampling.negative] * len(batch),
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance if guided else 1.0,
        generator=start.generators,
        callback_on_step_end=report,
        callback_on_step_end_tensor_inputs=guided_tensors(start.pipe),
        output_type="np",
    )
    _check_finite(out.images, start.pipe)
    blanked = sum(map(bool, getattr(out, "nsfw_content_detected", None) or ()))
    if blanked:
        log.warning(f"the base's safety checker has blanked {blanked} of {len(batch)} pictures")
    images: list[Image.Image] = start.pipe.image_processor.numpy_to_pil(out.images)
    return images if source is None else [source.kept(image) for image in images]


def _check_finite(pixels: Any, pipe: Any) -> None:
    """Raise UserError for NaN, which would be written as black."""
    if not np.isfinite(pixels).all():
        advice = "" if dtype_of(pipe) == torch.float32 else ", or take --precision float32"
        raise UserError(f"the picture came out as NaN; lower the strength or the guidance{advice}")


def whole_picture(pipe: Any, width: int, height: int) -> dict[str, Any]:
    """What makes a pipeline that paints parts of a picture anew paint all of it; nothing for others."""
    if not denoiser_of(pipe).told_masks:
        return {}
    empty, everything = Image.new("RGB", (width, height), "gray"), Image.new("L", (width, height), 255)
    return {"image": empty, "mask_image": everything, "strength": 1.0}


def _check_prompts(adapters: Adapters, batches: Sequence[Sequence[Cell]], negative: str) -> None:
    """Raise UserError as ``check_lengths`` does, at the strengths that each batch will have."""
    different = {tuple((cell.prompt, *sorted((cell.strengths or {}).items())) for cell in batch): batch for batch in batches}
    for batch in different.values():
        _set_strengths(adapters, batch)
        check_lengths(adapters.pipe, [cell.prompt for cell in batch])
        check_lengths(adapters.pipe, [negative] * len(batch))


def _set_strengths(adapters: Adapters, batch: Sequence[Cell]) -> None:
    """One strength where the batch agrees, and one per picture where not."""
    named = [cell.strengths for cell in batch if cell.strengths is not None]
    if not named:
        return
    wanted = {name: [strengths.get(name, 0.0) for strengths in named] for name in adapters.names}
    # All at once: adapters that still had strengths for a batch of another size would not agree with the first.
    adapters.set({name: values if len(set(values)) > 1 else values[0] for name, values in wanted.items()})


def _contains(prompt: str, trigger: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", prompt, re.IGNORECASE) is not None
