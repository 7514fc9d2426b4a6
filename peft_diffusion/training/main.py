"""``train``: from a folder of pictures to an adapter file."""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import formats
from ..bases import components
from ..bases.vocabulary import teach
from ..core.arena import Arena
from ..data.captions import with_trigger
from ..methods.tokens import Tokens
from .blocks import Block, blocks, check_methods
from .config import RATES, ResolvedConfig, TrainConfig, to_json
from .crew import Crew
from .crew import crew as together
from .diffusion import DiffusionSettings, DiffusionTask
from .fused import fused
from .preparation import Prepared, check_places, prepare
from .previews import PROMPTS, Previews
from .progress import PICTURES_APART, Reading, say_to
from .run import RunFolder
from .session import NAME, Session, attach, base_kept, chosen, next_command, origin, save, taught, told, trainer_settings
from .trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """What a run gave. The losses are those on pictures kept apart, before and after; None where there were none."""

    output: Path
    run_dir: Path
    config: ResolvedConfig
    steps: int
    images: int
    seconds: float
    held_out_before: float | None
    held_out_after: float | None
    base_fingerprint: str


def train(config: TrainConfig, *, pipe: Any | None = None, console: Console | None = None) -> TrainResult:
    """Learn a style from the configuration's folders and write it as one adapter file.

    ``pipe`` is a base that is loaded already, used in place of ``config.base`` and left as it was. What happens is told to
    ``console``, if there is one. Raises UserError for what the user can mend, and Interrupted (a KeyboardInterrupt) where
    a signal stopped the run after it saved a checkpoint.
    """
    began = time.monotonic()
    crew, device = together(config.device)
    config = replace(config, device=device)
    console = console if console is not None and crew.leads else Console(quiet=True)
    say = say_to(console)
    check_methods(config)
    folder = check_places(config)
    with Reading(console) as reading:
        prepared = prepare(config, pipe, say, reading, crew)
    parts = components(prepared.pipe)
    with fused(prepared.pipe.unet), base_kept(prepared.pipe, parts, say) as before:
        run = _Run(prepared, folder, console, crew)
        run.train(config.resume)
        result = run.save(before, folder.seconds + time.monotonic() - began)
    _tell(result, say)
    return result


class _Run:
    """One training: its task, trainer and observers."""

    def __init__(self, prepared: Prepared, folder: RunFolder, console: Console, crew: Crew) -> None:
        self.crew = crew
        config = self.config = prepared.config
        self.prepared = prepared
        self.folder = folder
        self.console = console
        self.parts = chosen(prepared.pipe, config.components)
        self.blocks = taught(prepared.pipe, blocks(config))
        attached = attach(self.parts, self.blocks, config.seed, lambda name: _component_rate(config, name))
        teach(prepared.pipe)
        arena = Arena(attached.groups)
        say_to(console)(f"{told(self.parts, self.blocks, arena.count)}; {_plan(config, crew)}")
        self.task = _task(prepared, self.blocks, crew)
        self.trainer = Trainer(self.task, arena, trainer_settings(config, attached), crew=crew)
        self.previews = _previews(prepared, folder, self.task, self.trainer) if crew.leads else None

    def train(self, resume: bool) -> None:
        """Train to the end. Raises Interrupted where a signal ended it early."""
        self.task.offload()
        pictures = self._pictures()
        session = Session(
            config=self.config,
            folder=self.folder,
            console=self.console,
            trainer=self.trainer,
            origin=origin(self.config, pictures, self.prepared.info.fingerprint, self.crew),
            items=pictures,
            command="train",
            held_out_line=PICTURES_APART.format,
        )
        session.start(resume)
        if self.previews and self.trainer.step:
            self.previews.forget_after(self.trainer.step)
        elif self.previews:
            self.previews.draw_base()
        session.learn([self.previews] if self.previews else [])
        if self.previews:
            self.previews.draw(self.trainer.step)

    def save(self, base: str, seconds: float) -> TrainResult:
        """Write the adapter file with what is worth knowing of it."""
        config, held_out = self.config, self.folder.held_out
        result = TrainResult(
            output=config.output,
            run_dir=config.run_dir,
            config=config,
            steps=self.trainer.step,
            images=len(self.prepared.train.captions),
            seconds=seconds,
            held_out_before=held_out.get(0),
            held_out_after=held_out.get(self.trainer.step),
            base_fingerprint=base,
        )
        if self.crew.leads:
            save(config.output, self.parts, self.trainer, self._spec(result))
        self.crew.wait()
        return result

    def _pictures(self) -> list[dict[str, str]]:
        kept = ("name", "digest", "caption")
        return [{key: getattr(picture, key) for key in kept} for picture in self.prepared.pictures]

    def _spec(self, result: TrainResult) -> formats.Spec:
        config = self.config
        training = to_json(config) | {
            "folder": [path.name for path in config.folder],  # where pictures lie on this disk is nobody's business
            "images": result.images,
            "steps_done": result.steps,
            "seconds": round(result.seconds, 1),
            "held_out_loss": result.held_out_after,
            "held_out_loss_before": result.held_out_before,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        for place in ("output", "run_dir", "cache"):
            del training[place]
        return formats.Spec(
            methods={name: [block.spec() for block in self.blocks if block.component == name] for name in self.parts},
            base=asdict(self.prepared.info),
            triggers=tuple(dict.fromkeys((*_trigger_words(config), *_placeholders(self.blocks)))),
            training=training,
            title=config.output.stem,
        )


def _trigger_words(config: ResolvedConfig) -> list[str]:
    return [words for part in config.trigger.split("{}") if (words := part.strip(" ,;:"))]


def _placeholders(blocks: Sequence[Block]) -> list[str]:
    """The words that blocks teach the tokenizers."""
    return [name for block in blocks if isinstance(block.method, Tokens) for name in block.method.names]


def _task(prepared: Prepared, blocks: Sequence[Block], crew: Crew) -> DiffusionTask:
    config = prepared.config
    settings = DiffusionSettings(
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        min_snr_gamma=config.min_snr_gamma,
        noise_offset=config.noise_offset,
        dropout=max(getattr(block.method, "dropout", 0.0) for block in blocks),
        crew=crew,
        rules=prepared.rules,
    )
    return DiffusionTask(prepared.pipe, NAME, settings, prepared.train, prepared.held_out)


def _component_rate(config: ResolvedConfig, name: str) -> float:
    found: float = getattr(config, RATES[name])
    return found


def _previews(prepared: Prepared, folder: RunFolder, task: DiffusionTask, trainer: Trainer) -> Previews | None:
    config = prepared.config
    if not config.preview_steps:
        return None
    prompts = prepared.prompts if config.preview_prompts else prepared.prompts[:PROMPTS]
    size = config.resolution // prepared.info.step * prepared.info.step
    often, steps = config.preview_every, config.preview_steps
    return Previews(folder.previews, task, prompts, trainer.final_weights, steps=steps, every=often, size=size)


def _plan(config: ResolvedConfig, crew: Crew) -> str:
    """What was chosen, in a line."""
    each = config.batch_size * config.accumulation
    size = f"{each * crew.size} pictures ({each} in each of {crew.size} processes)" if crew.size > 1 else f"{each} pictures"
    told = ", ".join(f"{name} {_component_rate(config, name):g}" for name in config.components)
    return (
        f"{config.steps} steps of {size}, learning rate {told} ({config.scheduler}), seed {config.seed}, {config.precision}"
    )


def _tell(result: TrainResult, say: Callable[[str], None]) -> None:
    """What was made, and what to type next."""
    config = result.config
    if result.held_out_before is not None and result.held_out_after is not None:
        losses = f"{result.held_out_before:.4f} before, {result.held_out_after:.4f} after"
        say(f"loss on pictures kept apart: {losses} ({result.held_out_after / result.held_out_before - 1:+.0%})")
    size = result.output.stat().st_size / 2**20
    say(
        f"wrote {result.output} ({size:.1f} MiB) after {result.steps} steps on {result.images} pictures,"
        f" {result.seconds:.0f} s; settings, metrics and previews are in {result.run_dir}"
    )
    prompt = with_trigger("a red apple", config.trigger)
    base = None if config.base == TrainConfig.base else config.base
    say(next_command("generate", prompt, {"adapter": str(result.output), "base": base, "quantize": config.quantize}))
