"""From a configuration to what a run works on: checked places, base, pictures, captions, latents."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...bases import BaseInfo, denoiser_of, describe, load_base
from ...bases.loading import pick_device
from ...bases.prompts import TextSide
from ...data import subfolders
from ...data.buckets import Bucket, Fit, arrange, describe_buckets, fit, group, repeated, steps_per_epoch
from ...data.captions import CaptionRules
from ...data.folder import ImageFolder, Picture, scan
from ...data.images import parse_colour
from ...data.latents import cache_latents
from ..attachment import Say, chosen
from ..loop.seeds import seed_of
from ..machine.low_memory import small_vae
from ..machine.precision import pick_precision
from ..machine.processes import Crew
from ..machine.sharding import shard
from ..progress import IMPATIENT
from ..record.run_folder import RunFolder, check_run, check_writable
from ..settings.derive import adapted_components, resolve
from ..settings.pictures import ResolvedConfig, TrainConfig, output_path, run_path
from ..settings.presets import HELD_OUT_FROM
from ..watch.drawing import Drawing
from . import class_images
from .diffusion import Examples, noise_schedule

Progress = Callable[[str], Callable[[int, int], None]]
_SHOWN = 5  # lines of a list


@dataclass(frozen=True)
class Prepared:
    """What a run works on."""

    config: ResolvedConfig
    pipe: Any
    info: BaseInfo
    pictures: tuple[Picture, ...]
    train: Examples
    held_out: Examples | None
    rules: CaptionRules
    prior: Examples | None = None
    class_pictures: tuple[Picture, ...] = ()
    problems: tuple[str, ...] = ()  # of the folder, in words

    @property
    def prompts(self) -> list[str]:
        """The prompts of the previews: those asked for, or captions of pictures kept apart, or else of any."""
        if self.config.preview_prompts:
            return list(self.config.preview_prompts)
        examples = self.held_out or self.train
        return list(dict.fromkeys(self.rules.plain(caption) for caption in examples.captions))


def check_places(config: TrainConfig) -> RunFolder:
    """The run folder, after seeing that everything can be written where it shall go. Raises UserError."""
    run = RunFolder(run_path(config))
    check_run(run, output_path(config), resume=config.resume, overwrite=config.overwrite)
    if config.cache is not None:
        check_writable(config.cache)
    return run


def prepare(
    config: TrainConfig,
    pipe: Any | None,
    say: Say,
    progress: Progress,
    drawing: Drawing,
    crew: Crew = Crew(),  # noqa: B008 -- frozen
) -> Prepared:
    """Load the base, read and check the folder, and encode the pictures; says what it finds and what it chose.

    Raises UserError for a base, folder or picture that cannot be used.
    """
    parse_colour(config.background)
    dropout = config.caption_dropout or 0.0
    rules = CaptionRules(config.trigger, dropout, config.shuffle_tags, config.keep_tags, config.wildcards)
    device = pick_device(config.device)
    asked = replace(config, precision=pick_precision(config.precision, device))
    pipe = _loaded(asked, pipe, device, say, crew)
    info, text = describe(pipe), denoiser_of(pipe).text
    held = f", linear layers in {config.quantize}" if config.quantize else ""
    say(f"base {info.name}: {info.family}, {info.prediction_type}, {info.resolution} pixels{held}")
    folder = _read_folder(config, info, say, progress)
    pictures = subfolders.apply(folder.pictures, config.repeats, config.folder_weight)
    resolved = resolve(asked, info, len(pictures), device.type)
    kept, apart = _split(pictures, resolved)
    fits = arrange(kept, resolved.resolution, info.step, no_upscale=not config.upscale)
    sides = 2 if config.flip else 1
    drawn = repeated(group(fits * sides), [one.repeats for one in kept] * sides)
    batches = steps_per_epoch(drawn, resolved.batch_size * crew.size)
    resolved = resolve(asked, info, len(folder.pictures), device.type, batches)
    for line in (*describe_buckets(fits), *subfolders.describe(kept)):
        say(f"  {line}")
    say(_apart_line(len(apart), len(pictures), resolved))
    if resolved.patience and not apart:
        say(IMPATIENT)
    rules = replace(rules, dropout=resolved.caption_dropout)
    _report_prompts([*kept, *apart], rules, text, say)
    before = _kept(config.cache)
    encode = _Encoder(resolved, info, pipe, progress)
    train = encode(kept, config.flip, "encoding pictures")
    held_out = encode(apart, False, "encoding pictures kept apart") if apart else None
    problems = tuple(str(problem) for problem in folder.problems)
    of_class = class_images.pictures(resolved, pipe, say, progress, drawing, crew)
    kept_as_is = encode.in_buckets(of_class, train.groups) if of_class else None
    for line in _cache_lines(config.cache, before, [one for one in (train, held_out, kept_as_is) if one]):
        say(line)
    return Prepared(
        resolved, pipe, info, tuple(pictures), train, held_out, rules, kept_as_is, tuple(of_class), problems
    )


def _loaded(config: TrainConfig, pipe: Any | None, device: torch.device, say: Say, crew: Crew) -> Any:
    """The base on its device, or this process's part of it. Raises UserError for one that cannot be used."""
    source = config.base if pipe is None else pipe
    first = "cpu" if crew.shares_base else config.device
    pipe = load_base(source, device=first, dtype=config.precision, quantize=config.quantize)
    denoiser = denoiser_of(pipe)
    components = adapted_components(config, denoiser.family)
    chosen(pipe, components)
    noise_schedule(denoiser, config.zero_terminal_snr)
    if crew.shares_base:
        say(shard(pipe, components, device))
    return pipe


@dataclass(frozen=True)
class _Encoder:
    """Pictures to examples."""

    config: ResolvedConfig
    info: BaseInfo
    pipe: Any
    progress: Progress

    def __call__(self, pictures: Sequence[Picture], flip: bool, what: str) -> Examples:
        config = self.config
        fits = arrange(pictures, config.resolution, self.info.step, no_upscale=not config.upscale)
        return self._encode(pictures, fits, flip, what)

    def in_buckets(self, pictures: Sequence[Picture], buckets: Iterable[Bucket]) -> Examples:
        """Each picture in each of the buckets, so that any batch can have any of them beside it."""
        pairs = [(picture, bucket) for bucket in buckets for picture in pictures]
        fits = [fit(picture.width, picture.height, bucket) for picture, bucket in pairs]
        return self._encode([picture for picture, _ in pairs], fits, False, "encoding pictures of the class")

    def _encode(self, pictures: Sequence[Picture], fits: Sequence[Fit], flip: bool, what: str) -> Examples:
        config = self.config
        with small_vae(self.pipe.vae, config.resolution, config.memory == "low"):
            latents = cache_latents(
                pictures,
                fits,
                self.pipe.vae,
                background=config.background,
                flip=flip,
                masked=denoiser_of(self.pipe).inpaints,
                alpha=config.masks == "alpha",
                folder=config.cache,
                on_progress=self.progress(what),
            )
        repeats = [one.repeats for one in pictures]
        weights = [one.weight for one in pictures]
        return Examples(
            latents,
            [one.caption for one in pictures],
            repeats if set(repeats) != {1} else (),
            weights if set(weights) != {1.0} else (),
        )


def _kept(cache: Path | None) -> int:
    """How many latents a cache folder holds."""
    return 0 if cache is None else sum(1 for _ in cache.glob("*.safetensors"))


def _cache_lines(cache: Path | None, before: int, found: Sequence[Examples]) -> list[str]:
    """What came of a cache folder that held ``before`` latents."""
    if cache is None:
        return []
    reused, computed, damaged = (
        sum(getattr(one.latents, name) for one in found) for name in ("reused", "computed", "damaged")
    )
    lines = [f"{cache}: {reused} of {reused + computed} latents were there"]
    if damaged:
        lines.append(f"warning: {damaged} latents in {cache} were damaged, and are made again; look after that disk")
    elif before and not reused:
        lines[0] += f"; the {before} that it held are of other pictures, sizes or settings, or of another VAE, and stay"
    return lines


def _read_folder(config: TrainConfig, info: BaseInfo, say: Say, progress: Progress) -> ImageFolder:
    """The pictures, after telling what is wrong with the others. Raises UserError where captions are missing."""
    folder = scan(
        config.folder,
        resolution=None if config.upscale else config.resolution or info.resolution,
        missing=config.missing_captions,
        masks=config.masks != "off",
        on_progress=progress("reading pictures"),
    )
    for line in folder.describe(_SHOWN):
        say(line)
    folder.check()
    return folder


def _split(pictures: Sequence[Picture], config: ResolvedConfig) -> tuple[list[Picture], list[Picture]]:
    """Pictures to train on and pictures kept apart, each in their order; at least one to train on."""
    count = min(max(1, round(len(pictures) * config.held_out)), len(pictures) - 1) if config.held_out else 0
    chance = random.Random(seed_of(config.seed, "held out"))
    apart = set(chance.sample(range(len(pictures)), count))
    kept = [one for index, one in enumerate(pictures) if index not in apart]
    return kept, [one for index, one in enumerate(pictures) if index in apart]


def _apart_line(count: int, pictures: int, config: ResolvedConfig) -> str:
    """How many of so many pictures are kept apart, and why none are."""
    if count:
        return f"{count} pictures are kept apart: the loss on them shows when to stop"
    few = "there is but one picture; " if config.held_out else f"fewer than {HELD_OUT_FROM} pictures; "
    why = few if config.held_out or pictures < HELD_OUT_FROM else ""
    return f"no pictures are kept apart to measure on ({why}--held-out 0.1 keeps a tenth)"


def _report_prompts(pictures: Sequence[Picture], rules: CaptionRules, text: TextSide, say: Say) -> None:
    """Show the first prompts as they are trained, and every one that is too long for the text encoder."""
    prompts = [rules.plain(picture.caption) for picture in pictures]
    say(f"prompts, the first {min(3, len(prompts))} of {len(prompts)}:")
    for prompt in prompts[:3]:
        say(f"  {prompt}")
    lost = [(picture, words) for picture, prompt in zip(pictures, prompts, strict=True) if (words := text.lost(prompt))]
    if lost:
        say(f"warning: {len(lost)} prompts are over {text.limit} tokens, and what comes after is not seen; shorten them:")
        for picture, words in lost[:_SHOWN]:
            say(f"  {picture.path}: without \u201c{words}\u201d")
        if len(lost) > _SHOWN:
            say(f"  and {len(lost) - _SHOWN} more")
