"""``train``: from a folder of pictures to an adapter file."""

import datetime
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import formats
from ..bases import components
from ..bases.words import teach
from ..core.arena import Arena
from ..core.errors import UserError
from ..core.settings import pick, to_json
from ..data.captions import with_trigger
from ..data.folder import Picture
from ..fast.unet import fused
from ..methods.tokens import Tokens
from .loop.trainer import Trainer
from .machine.memory_plan import Clock, Footing
from .machine.processes import Crew
from .machine.processes import crew as together
from .machine.sharding import sharing
from .progress import PICTURES_APART, Reading, noted, say_to
from .record.facts import about, commands, memory, thumbnails, warned
from .record.run_folder import RunFolder
from .record.trackers import Tracker, check_tracker
from .session import (
    NAME,
    Attached,
    Outcome,
    Session,
    attach,
    base_kept,
    check_writable,
    chosen,
    next_command,
    origin,
    save,
    taught,
    told,
    told_rates,
    trainer_settings,
)
from .settings.blocks import Block, blocks, check_methods
from .settings.derive import resolve
from .settings.pictures import ResolvedConfig, TrainConfig, run_path
from .settings.presets import RATES
from .tasks.diffusion import DiffusionSettings, DiffusionTask
from .tasks.preparation import Prepared, check_places, prepare
from .watch.find_lr import FoundRates, find, refuse_crew
from .watch.previews import PROMPTS, Previews


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
    outcome: Outcome | None = None
    """None in a process that does not measure."""


def train(config: TrainConfig, *, pipe: Any | None = None, console: Console | None = None) -> TrainResult:
    """Learn a style from the configuration's folders and write it as one adapter file.

    ``pipe`` is a base that is loaded already, used in place of ``config.base`` and left as it was. What happens is told to
    ``console``, if there is one. Raises UserError for what the user can mend, and Interrupted (a KeyboardInterrupt) where
    a signal stopped the run after it saved a checkpoint.
    """
    began = time.monotonic()
    crew, device = together(config.device)
    crew = sharing(crew, config, pipe)
    config = replace(config, device=device)
    console = console if console is not None and crew.leads else Console(quiet=True)
    said: list[str] = []
    say = noted(say_to(console), said)
    check_methods(config)
    check_tracker(config.log_with)
    folder = check_places(config)
    with Reading(console) as reading:
        prepared = prepare(config, pipe, say, reading, crew)
    parts = components(prepared.pipe)
    with _faster(prepared, crew), base_kept(prepared.pipe, parts, say) as before, folder.closing():
        run = _Run(prepared, folder, console, crew, said)
        try:
            run.train(config.resume)
            result = run.save(before, folder.seconds + time.monotonic() - began)
        finally:
            run.task.restore()
    _tell(result, say)
    return result


def find_rates(config: TrainConfig, *, pipe: Any | None = None, console: Console | None = None) -> FoundRates:
    """Find a learning rate for a training, without doing it: see `find_lr`.

    Nothing is written but ``find_lr.json`` and ``find_lr.png`` in the run folder. Raises as `train` does.
    """
    crew, device = together(config.device)
    refuse_crew(crew)
    if config.shard_base:
        raise UserError("--find-lr runs in one process, which cannot shard a base; leave --shard-base away")
    console = console or Console(quiet=True)
    say = say_to(console)
    config = replace(config, device=device, preview_steps=0)
    check_methods(config)
    folder = RunFolder(run_path(config))
    check_writable(folder.path)
    with Reading(console) as reading:
        prepared = prepare(config, pipe, say, reading, crew)
    with _faster(prepared, crew), base_kept(prepared.pipe, components(prepared.pipe), say):
        run = _Run(prepared, folder, console, crew, [])
        flags = {name: f"--{RATES[name].replace('_', '-')}" for name in run.parts} if not config.block else {}
        try:
            run.task.offload()
            with run.footing().stand(say):
                found = find(run.task, run.trainer.arena, run.trainer.settings, folder.path, console, flags)
        finally:
            run.task.restore()
    if config.preset == "style" and found.factor < 1:
        say("a style's look still gains above the rate of the lowest loss: compare with a run at the rate of the settings")
    return found


def _faster(prepared: Prepared, crew: Crew) -> AbstractContextManager[None]:
    """What a run trains inside, where it may be fused."""
    return fused(prepared.pipe.unet) if prepared.config.cuda_graph and not crew.shares_base else nullcontext()


class _Run:
    """One training: its task, trainer and observers."""

    def __init__(self, prepared: Prepared, folder: RunFolder, console: Console, crew: Crew, said: list[str]) -> None:
        self.crew = crew
        self.said = said  # to the person, so far and later on
        config = self.config = prepared.config
        self.prepared = prepared
        self.folder = folder
        self.console = console
        self.parts = chosen(prepared.pipe, config.components)
        self.blocks = taught(prepared.pipe, blocks(config))
        attached = attach(self.parts, self.blocks, config.seed, lambda name: _component_rate(config, name))
        teach(prepared.pipe)
        arena = Arena(attached.groups)
        self.about = told(self.parts, self.blocks, arena.count)
        noted(say_to(console), said)(f"{self.about}; {_plan(config, attached, crew)}")
        self.task = _task(prepared, self.blocks, crew)
        settings = trainer_settings(config, attached)
        if crew.shares_base:  # no CUDA graph holds weights that come and go
            settings = replace(settings, cuda_graph=False)
        self.trainer = Trainer(self.task, arena, settings, crew=crew)
        self.previews = _previews(prepared, folder, self.task, self.trainer) if crew.measures else None
        self.outcome: Outcome | None = None

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
        with self.footing().stand(say_to(self.console)):
            session.start(resume)
            if self.crew.leads:
                self._note()
            self._learn(session)
            self.outcome = session.outcome(self.parts) if self.crew.measures else None

    def _learn(self, session: Session) -> None:
        clock, tracker = Clock(self.config.steps, self.task.device, say_to(self.console)), self._tracker()
        if self.previews and not self.previews.go_on_from(self.trainer.step):
            self.previews.draw_base()
        session.learn([one for one in (clock, self.previews, tracker) if one])
        if self.previews:
            self.previews.draw(self.trainer.step)
        if tracker:
            tracker.finish()

    def footing(self) -> Footing:
        """What the run is weighed by."""
        pipe, config = self.prepared.pipe, self.config
        savings = ["--batch-size 1 with --accumulation"] if config.batch_size > 1 else []
        savings += [] if config.quantize == "nf4" else ["--quantize nf4"]
        parts = tuple(components(pipe).values())
        return Footing(
            memory=config.memory,
            trainer=self.trainer,
            parts=parts,
            loaded=(*parts, pipe.vae),
            largest=self.task.largest,
            chance=self.task.settings.dropout > 0,
            savings=[*savings, f"--resolution below {config.resolution}"],
            drawing=self.previews.peak if self.previews else None,
        )

    def save(self, base: str, seconds: float) -> TrainResult:
        """Write the adapter file with what is worth knowing of it."""
        config, held_out, outcome = self.config, self.folder.held_out, self.outcome
        result = TrainResult(
            output=config.output,
            run_dir=config.run_dir,
            config=config,
            steps=self.trainer.step,
            images=len(self.prepared.train.captions),
            seconds=seconds,
            held_out_before=held_out.get(0),
            held_out_after=held_out.get(outcome.kept if outcome else self.trainer.step),
            base_fingerprint=base,
            outcome=outcome,
        )
        if self.crew.leads:
            save(config.output, self.parts, self.trainer, self._spec(result))
            self.folder.finish(seconds=seconds, **memory(), **(outcome.training() if outcome else {}))
        self.crew.wait()
        return result

    def _tracker(self) -> Tracker | None:
        if self.config.log_with is None or not self.crew.leads:
            return None
        tracker = Tracker(self.folder.logs, self.trainer.step)
        if self.previews:
            self.previews.watching = tracker
        return tracker

    def _note(self) -> None:
        """What the report tells of the run besides its settings and measurements."""
        prepared, config = self.prepared, self.config
        thumbnails(self.folder.thumbnails, prepared.pictures, config.background)
        apart = len(prepared.held_out.captions) if prepared.held_out else 0
        self.folder.note(
            about=about(self.about, self.trainer.arena.count, prepared.info.name, prepared.info.fingerprint),
            defaults=to_json(self._defaults()) | {"method": TrainConfig.method},
            warnings=[*prepared.problems, *warned(self.said)],
            said=self.said,
            apart=f"{apart} of them are kept apart to measure on" if apart else "",
            prompts=self.previews.prompts if self.previews else [],
            commands=commands("train", config.run_dir, _next(config)),
        )

    def _defaults(self) -> ResolvedConfig:
        """What the run would be if nothing had been said but what it learns from, with which preset and method."""
        config = self.config
        plain = TrainConfig(
            folder=config.folder, preset=config.preset, method=config.method, output=config.output, run_dir=config.run_dir,
            device=config.device, precision=config.precision,
        )  # fmt: skip
        return resolve(plain, self.prepared.info, len(self.prepared.pictures), self.task.device.type)

    def _pictures(self) -> list[dict[str, str]]:
        return [_item(picture) for picture in (*self.prepared.pictures, *self.prepared.class_pictures)]

    def _spec(self, result: TrainResult) -> formats.Spec:
        config = self.config
        training = to_json(config) | {
            # Where pictures lie on this disk is nobody's business.
            "folder": [path.name for path in config.folder],
            "regularisation": [path.name for path in config.regularisation],
            "class_pictures": len(self.prepared.class_pictures),
            "images": result.images,
            "steps_done": result.steps,
            "seconds": round(result.seconds, 1),
            "held_out_loss": result.held_out_after,
            "held_out_loss_before": result.held_out_before,
            **(result.outcome.training() if result.outcome else {}),
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


def _item(picture: Picture) -> dict[str, str]:
    """What of a picture a run depends on."""
    item = {"name": picture.name, "digest": picture.digest, "caption": picture.caption}
    item |= {"mask": picture.mask_digest} if picture.mask_digest else {}
    drawn = (picture.repeats, picture.weight)
    return item | ({"drawn": f"{drawn[0]} times, weight {drawn[1]:g}"} if drawn != (1, 1.0) else {})


def _trigger_words(config: ResolvedConfig) -> list[str]:
    return [words for part in config.trigger.split("{}") if (words := part.strip(" ,;:"))]


def _placeholders(blocks: Sequence[Block]) -> list[str]:
    """The words that blocks teach the tokenizers."""
    return [name for block in blocks if isinstance(block.method, Tokens) for name in block.method.names]


def _task(prepared: Prepared, blocks: Sequence[Block], crew: Crew) -> DiffusionTask:
    dropout = max(getattr(block.method, "dropout", 0.0) for block in blocks)
    settings = pick(DiffusionSettings, prepared.config, prepared, {"dropout": dropout, "crew": crew})
    return DiffusionTask(prepared.pipe, NAME, settings, prepared.train, prepared.held_out, prepared.prior)


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
    weights, told = trainer.final_weights, folder.on_previews
    return Previews(folder.previews, task, prompts, weights, told, steps=steps, every=often, size=size)


def _plan(config: ResolvedConfig, attached: Attached, crew: Crew) -> str:
    """What was chosen, in a line."""
    each = config.batch_size * config.accumulation
    size = f"{each * crew.size} pictures ({each} in each of {crew.size} processes)" if crew.size > 1 else f"{each} pictures"
    rates = told_rates(attached.rates)
    return (
        f"{config.steps} steps of {size}, learning rate {rates} ({config.scheduler}), seed {config.seed}, {config.precision}"
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
        f" {result.seconds:.0f} s; settings, metrics, previews and report.html are in {result.run_dir}"
    )
    say(f"next: {_next(config)}")


def _next(config: ResolvedConfig) -> str:
    prompt = with_trigger("a red apple", config.trigger)
    base = None if config.base == TrainConfig.base else config.base
    return next_command("generate", prompt, {"adapter": str(config.output), "base": base, "quantize": config.quantize})
