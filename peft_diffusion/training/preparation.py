"""From a configuration to what a run works on: checked places, base, pictures, captions, latents."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bases import BaseInfo, describe, inpaints, load_base
from ..bases.reading import pick_device
from ..data.buckets import arrange, describe_buckets, group, steps_per_epoch
from ..data.captions import CaptionRules
from ..data.folder import ImageFolder, Picture, scan
from ..data.latents import cache_latents
from ..data.pictures import parse_colour
from .config import HELD_OUT_FROM, ResolvedConfig, TrainConfig, output_path, resolve, run_path
from .crew import Crew
from .diffusion import Examples
from .run import RunFolder
from .seeds import seed_of
from .session import Say, check_run, check_writable, chosen, pick_precision
from .text import TextSide

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
    problems: tuple[str, ...] = ()  # of the folder, in words

    @property
    def prompts(self) -> list[str]:
        """The prompts of the previews: those asked for, or captions of pictures kept apart, or else of any."""
        if self.config.preview_prompts:
            return list(self.config.preview_prompts)
        examples = self.held_out or self.train
        plain = CaptionRules(trigger=self.rules.trigger)
        return list(dict.fromkeys(plain.prompt(caption, random.Random(0)) for caption in examples.captions))


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
    crew: Crew = Crew(),  # noqa: B008 -- frozen
) -> Prepared:
    """Load the base, read and check the folder, and encode the pictures; says what it finds and what it chose.

    Raises UserError for a base, folder or picture that cannot be used.
    """
    parse_colour(config.background)
    rules = CaptionRules(config.trigger, config.caption_dropout or 0.0, config.shuffle_tags, config.keep_tags)
    device = pick_device(config.device)
    asked = replace(config, precision=pick_precision(config.precision, device))
    source = config.base if pipe is None else pipe
    pipe = load_base(source, device=config.device, dtype=asked.precision, quantize=config.quantize)
    chosen(pipe, config.components)
    info, text = describe(pipe), TextSide(pipe)
    held = f", linear layers in {config.quantize}" if config.quantize else ""
    say(f"base {info.name}: {info.family}, {info.prediction_type}, {info.resolution} pixels{held}")
    folder = _read_folder(config, info, say, progress)
    resolved = resolve(asked, info, len(folder.pictures), device.type)
    kept, apart = _split(folder.pictures, resolved)
    fits = arrange(kept, resolved.resolution, info.step, no_upscale=not config.upscale)
    batches = steps_per_epoch(group(fits * (2 if config.flip else 1)), resolved.batch_size * crew.size)
    resolved = resolve(asked, info, len(folder.pictures), device.type, batches)
    for line in describe_buckets(fits):
        say(f"  {line}")
    say(_apart_line(len(apart), resolved))
    rules = replace(rules, dropout=resolved.caption_dropout)
    _report_prompts([*kept, *apart], rules, text, say)
    encode = _Encoder(resolved, info, pipe, progress)
    train = encode(kept, config.flip, "encoding pictures")
    held_out = encode(apart, False, "encoding pictures kept apart") if apart else None
    problems = tuple(str(problem) for problem in folder.problems)
    return Prepared(resolved, pipe, info, folder.pictures, train, held_out, rules, problems)


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
        latents = cache_latents(
            pictures,
            fits,
            self.pipe.vae,
            background=config.background,
            flip=flip,
            masked=inpaints(self.pipe),
            folder=config.cache,
            on_progress=self.progress(what),
        )
        return Examples(latents, [one.caption for one in pictures])


def _read_folder(config: TrainConfig, info: BaseInfo, say: Say, progress: Progress) -> ImageFolder:
    """The pictures, after telling what is wrong with the others. Raises UserError where captions are missing."""
    folder = scan(
        config.folder,
        resolution=None if config.upscale else config.resolution or info.resolution,
        missing=config.missing_captions,
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


def _apart_line(count: int, config: ResolvedConfig) -> str:
    if count:
        return f"{count} pictures are kept apart: the loss on them shows when to stop"
    few = f"fewer than {HELD_OUT_FROM} pictures" if config.held_out == 0 else "there is but one picture"
    return f"no pictures are kept apart to measure on ({few}; --held-out 0.1 keeps a tenth)"


def _report_prompts(pictures: Sequence[Picture], rules: CaptionRules, text: TextSide, say: Say) -> None:
    """Show the first prompts as they are trained, and every one that is too long for the text encoder."""
    plain = CaptionRules(trigger=rules.trigger)
    prompts = [plain.prompt(picture.caption, random.Random(0)) for picture in pictures]
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
