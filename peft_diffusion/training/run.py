"""The course of a run, whatever it learns from: prepare, attach an adapter, train, measure, keep, write, leave the base.

A `Source` knows what is learned from and how that is read; what it opens, a `Material`, is trained on. Everything else is
the same for pictures and for text, and stands here once.
"""

import datetime
import hashlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from rich.console import Console
from torch import nn

from .. import formats
from ..bases import components, fingerprint
from ..bases.words import teach
from ..core import site
from ..core.arena import Arena
from ..core.errors import UserError
from ..core.files import explained
from ..core.settings import Settings, pick, to_json
from .attachment import NAME, Attached, Say, attach, described
from .loop.trainer import Interrupted, Observer, Task, Trainer, TrainerSettings
from .machine.memory_plan import Clock, Footing
from .machine.processes import Crew
from .machine.processes import crew as this_crew
from .progress import Bar, Reading, noted, say_to
from .record.checkpoint import Origin
from .record.facts import about, commands, memory, warned
from .record.run_folder import RunFolder
from .record.trackers import Tracker, check_tracker
from .results import Outcome, RunResult
from .settings.blocks import Block, check_methods
from .settings.choices import LogWith
from .settings.pictures import TrainConfig
from .settings.resumption import DERIVED
from .settings.shared import MethodSettings, RunSettings
from .watch.find_lr import FoundRates, find, refuse_crew
from .watch.previews import Previews
from .watch.signals import at_strength, best_step, measurements, suggest, verdict

_PROCESSES = "processes"  # how many learn together, beside the settings of a run

Result = TypeVar("Result", bound=RunResult)


class AskedSettings(MethodSettings, Protocol):
    """What a run is told that its course depends on before anything is read."""

    @property
    def device(self) -> str: ...
    @property
    def log_with(self) -> LogWith | None: ...


class BaseInfo(Settings, Protocol):
    """What is known of a base."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Facts:
    """What a report tells of a run besides its settings and measurements.

    Attributes:
        defaults: What the settings would be if nothing had been said but what is learned from, with which method.
        apart: How much is kept apart to measure on, in words; empty where nothing is.
        warnings: What is wrong with the data, in words.
        prompts: Those of the previews; None for a run that could have none.
    """

    defaults: Settings
    apart: str
    warnings: Sequence[str] = ()
    prompts: Sequence[str] | None = None


class Material(Protocol[Result]):
    """A base that is loaded, and data that was read: what a run works on."""

    @property
    def base(self) -> Any:
        """The pipeline or model, as its library knows it."""
        ...

    @property
    def info(self) -> BaseInfo:
        """What is known of the base."""
        ...

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The components that are trained, by name."""
        ...

    @property
    def blocks(self) -> Sequence[Block]:
        """Which method is trained at which sites."""
        ...

    @property
    def seed(self) -> int:
        """What all chance of the run comes from."""
        ...

    def rate(self, component: str) -> float:
        """Returns: the learning rate of a component."""
        ...

    def rate_flags(self) -> Mapping[str, str]:
        """Returns: the flag that sets the learning rate of a component; empty where blocks have their own."""
        ...

    @property
    def task(self) -> Task:
        """What is learned. Asked for once the adapter is attached and its words are taught: data may become others by it."""
        ...

    @property
    def config(self) -> RunSettings:
        """The settings, with every value that a run needs. Asked for after `task`."""
        ...

    @property
    def items(self) -> Sequence[dict[str, str]]:
        """What is learned from, piece by piece, as ``data.json`` holds it; checkpoints hold its digest."""
        ...

    def faster(self) -> AbstractContextManager[None]:
        """Returns: what a run trains inside, where the base may be fused."""
        ...

    def at_work(self) -> AbstractContextManager[None]:
        """Returns: what training is done inside, with nothing on the device that is idle."""
        ...

    def plan(self, rates: Mapping[str, float]) -> str:
        """Returns: steps, batch and learning rates in words, with rates by group."""
        ...

    def held_out_line(self, loss: float) -> str:
        """Returns: a measurement on what is kept apart, in words."""
        ...

    def previews(self, trainer: Trainer, folder: RunFolder) -> Previews | None:
        """Returns: what draws previews; None where none are drawn."""
        ...

    def footing(self, trainer: Trainer, previews: Previews | None) -> Footing:
        """Returns: what the run's memory is predicted from."""
        ...

    def facts(self, folder: RunFolder, previews: Previews | None) -> "Facts":
        """Returns: what the report tells of this kind of run."""
        ...

    def next_command(self) -> str:
        """Returns: what to type to use what was learned."""
        ...

    def result(self, found: RunResult) -> Result:
        """Returns: what the run gave, with what only this kind of run has."""
        ...

    def training(self, result: Result) -> Mapping[str, Any]:
        """Returns: entries of the adapter file's training summary, in place of settings of their name and beside them."""
        ...

    def triggers(self) -> Sequence[str]:
        """Returns: the words that call what was learned."""
        ...

    def tell(self, result: Result, say: Say) -> None:
        """Say what was made, and what to type next."""
        ...


class Source(Protocol[Result]):
    """What a run learns from, as it was asked for; nothing is loaded yet."""

    @property
    def asked(self) -> AskedSettings:
        """The settings as they were given."""
        ...

    def on(self, device: str) -> Self:
        """Returns: the same on another device."""
        ...

    def processes(self, crew: Crew) -> Crew:
        """Returns: the processes as the settings have them. Raises UserError where they cannot be so."""
        ...

    def folder(self) -> RunFolder:
        """Returns: the run folder, after seeing that everything can be written. Raises UserError where it cannot."""
        ...

    def search_folder(self) -> Path:
        """Returns: where a search for learning rates writes, after seeing that it can. Raises UserError where it cannot."""
        ...

    def open(self, crew: Crew, say: Say, reading: Reading) -> Material[Result]:
        """Load the base and read the data.

        Returns:
            What the run works on.

        Raises:
            UserError: For a base or data that cannot be used.
        """
        ...

    def remark(self, found: FoundRates) -> str | None:
        """Returns: what should be known of rates that were found; None where there is nothing."""
        ...


def train(source: Source[Result], console: Console | None = None) -> Result:
    """Learn from a source and write what was learned as one adapter file.

    Args:
        source: What is learned from.
        console: Is told what happens.

    Returns:
        What the run gave.

    Raises:
        UserError: For what the user can mend.
        Interrupted: A signal stopped the run after it saved a checkpoint. It is a KeyboardInterrupt.
    """
    began = time.monotonic()
    crew, device = this_crew(source.asked.device)
    crew, source = source.processes(crew), source.on(device)
    console = console if console is not None and crew.leads else Console(quiet=True)
    said: list[str] = []
    say = noted(say_to(console), said)
    check_methods(source.asked)
    check_tracker(source.asked.log_with)
    folder = source.folder()
    with Reading(console) as reading:
        material = source.open(crew, say, reading)
    with material.faster(), base_kept(material.base, say) as before, folder.closing():
        run = _Run(material, folder, console, crew, said)
        with material.at_work():
            run.train(source.asked)
            result = run.write(before, folder.seconds + time.monotonic() - began)
    material.tell(result, say)
    return result


def find_rates(source: Source[Result], console: Console | None = None) -> FoundRates:
    """Find a learning rate for a training, without doing it: see `find_lr`.

    Nothing is written but ``find_lr.json`` and ``find_lr.png`` in the run folder. Raises as `train` does.
    """
    crew, device = this_crew(source.asked.device)
    refuse_crew(crew)
    console = console or Console(quiet=True)
    say = say_to(console)
    source = source.on(device)
    check_methods(source.asked)
    folder = source.search_folder()
    with Reading(console) as reading:
        material = source.open(crew, say, reading)
    with material.faster(), base_kept(material.base, say):
        run = _Run(material, RunFolder(folder), console, crew, [])
        with material.at_work(), material.footing(run.trainer, None).stand(say):
            trainer = run.trainer
            found = find(trainer.task, trainer.arena, trainer.settings, folder, console, material.rate_flags())
    remark = source.remark(found)
    if remark:
        say(remark)
    return found


class _Run(Generic[Result]):
    """One training: an adapter on a base, its trainer, and what is kept of it."""

    def __init__(
        self, material: Material[Result], folder: RunFolder, console: Console, crew: Crew, said: list[str]
    ) -> None:
        self.material = material
        self.folder = folder
        self.console = console
        self.crew = crew
        self.said = said  # to the person, so far and later on
        attached = attach(material.parts, material.blocks, material.seed, material.rate)
        teach(material.base)  # before texts become tokens
        arena = Arena(attached.groups)
        task = material.task
        self.about = described(material.parts, material.blocks, arena.count)
        noted(say_to(console), said)(f"{self.about}; {material.plan(attached.rates)}")
        self.trainer = Trainer(task, arena, self._settings(attached), crew=crew)
        self.previews = material.previews(self.trainer, folder) if crew.measures else None
        self.outcome: Outcome | None = None

    def _settings(self, attached: Attached) -> TrainerSettings:
        settings = pick(TrainerSettings, self.material.config, attached)
        # No CUDA graph holds weights that come and go.
        return replace(settings, cuda_graph=False) if self.crew.shares_base else settings

    def train(self, asked: AskedSettings) -> None:
        """Train to the end. Raises Interrupted where a signal ended it early."""
        material = self.material
        with material.footing(self.trainer, self.previews).stand(say_to(self.console)):
            self._start(asked.resume)
            if self.crew.leads:
                self._note()
            self._learn(asked.log_with)
            self.outcome = self._outcome() if self.crew.measures else None

    def write(self, base: str, seconds: float) -> Result:
        """Write the adapter file with what is worth knowing of it."""
        config, held_out, outcome = self.material.config, self.folder.held_out, self.outcome
        found = RunResult(
            output=config.output,
            run_dir=config.run_dir,
            steps=self.trainer.step,
            seconds=seconds,
            held_out_before=held_out.get(0),
            held_out_after=held_out.get(outcome.kept if outcome else self.trainer.step),
            base_fingerprint=base,
            outcome=outcome,
        )
        result = self.material.result(found)
        if self.crew.leads:
            _save(config.output, self.material.parts, self.trainer, self._spec(result))
            self.folder.finish(seconds=seconds, **memory(), **(outcome.training() if outcome else {}))
        self.crew.wait()
        return result

    def _start(self, resume: bool) -> None:
        """Begin the run, or go on with it. Raises UserError where settings, data or base are others than it had."""
        crew, config, items = self.crew, self.material.config, self.material.items
        origin = origin_of(config, items, self.material.info.fingerprint, crew)
        crew.wait()  # all have looked at the folder before one writes to it
        if crew.leads:
            self.folder.check()  # again: another process may have begun meanwhile
        if not resume:
            if crew.leads:
                self.folder.start(config, items, origin)
            return
        say = say_to(self.console)
        found = self.folder.resume(config, items, origin) if crew.leads else None
        crew.wait()  # what cannot be gone on from is gone
        if not crew.leads:
            found = self.folder.newest()
        if found is None:
            say("no checkpoint was made yet: the run starts from the beginning")
            return
        before = found.origin.config.get(_PROCESSES, 1)
        if before != crew.size:
            raise UserError(
                f"the run in {self.folder.path} had {before} processes, and there are {crew.size} now, so its batches would"
                " be others; start as many, or a new run with another --run-dir"
            )
        self.trainer.load(found.state)
        self.trainer.measured = crew.agreed(dict(self.folder.held_out))
        say(f"going on from step {found.state.step} of {config.steps}")
        planned = found.origin.config["steps"]
        if planned != config.steps and config.scheduler != "constant":
            say(
                f"the run was planned for {planned} steps: from here its {config.scheduler} learning rate is that of"
                f" {config.steps}, so the result is not quite that of one run of this length"
            )

    def _note(self) -> None:
        """What the report tells of the run besides its settings and measurements."""
        material, info = self.material, self.material.info
        own = material.facts(self.folder, self.previews)
        self.folder.note(
            about=about(self.about, self.trainer.arena.count, info.name, info.fingerprint),
            defaults=to_json(own.defaults) | {"method": TrainConfig.method},
            warnings=[*own.warnings, *warned(self.said)],
            said=self.said,
            apart=own.apart,
            **({} if own.prompts is None else {"prompts": list(own.prompts)}),
            commands=commands(self.folder.command, material.config.run_dir, material.next_command()),
        )

    def _learn(self, log_with: LogWith | None) -> None:
        """Train to the end. Raises Interrupted on a signal."""
        trainer, config, previews = self.trainer, self.material.config, self.previews
        clock, tracker = Clock(config.steps, trainer.arena.flat.device, say_to(self.console)), self._tracker(log_with)
        if previews and not previews.go_on_from(trainer.step):
            previews.draw_base()
        watching: list[Observer] = [one for one in (clock, previews, tracker) if one]
        with Bar(self.console, config.steps, trainer.step, self.material.held_out_line) as bar:
            own = [bar, self.folder] if self.crew.leads else []
            trainer.observers = [*own, *watching] if self.crew.measures else []
            finished = trainer.run()
        if not finished:
            raise Interrupted(
                f"stopped after step {trainer.step} of {config.steps}; go on with: peft-diffusion {self.folder.command}"
                f" --config {shlex.quote(str(self.folder.path / 'config.toml'))} --resume"
            )
        if trainer.step < config.steps:
            say_to(self.console)(
                f"ended after step {trainer.step} of {config.steps}: {config.patience} measurements without a new lowest one"
            )
        if previews:
            previews.draw(trainer.step)
        if tracker:
            tracker.finish()

    def _tracker(self, log_with: LogWith | None) -> Tracker | None:
        if log_with is None or not self.crew.leads:
            return None
        tracker = Tracker(self.folder.logs, self.trainer.step)
        if self.previews:
            self.previews.watching = tracker
        return tracker

    def _outcome(self) -> Outcome:
        """Choose the weights that the run gives, and measure at which strength they serve best; says both.

        Only the processes that measure may ask, and all of them have to.
        """
        say, trainer, crew = say_to(self.console), self.trainer, self.crew
        held_out = crew.agreed(self.folder.held_out)  # which only the process that leads has written down
        warning = verdict(measurements(self.folder.metrics()))
        if warning:
            say(f"warning: {warning}")
        best = best_step(held_out)
        kept = trainer.step
        if self.material.config.keep == "best" and best is not None and best != trainer.step:
            tensors = crew.agreed(self.folder.tensors(best) if crew.leads else {})
            trainer.chosen = trainer.given(tensors).to(trainer.arena.flat.device)
            kept = best
            say(
                f"written are the weights of step {best}, which has the lowest loss on what is kept apart (--keep last: step"
                f" {trainer.step})"
            )
        suggestion = None
        if 0 in held_out and kept in held_out:
            suggestion = suggest(self._measured, held_out[0], held_out[kept])
            tried = ", ".join(f"{loss:.4f} at {strength:g}" for strength, loss in suggestion.losses.items())
            say(f"suggested strength: {suggestion.strength:g} (loss on what is kept apart: {tried})")
        return Outcome(kept, best, warning, suggestion)

    def _measured(self, strength: float) -> float:
        with self.trainer.final_weights(), at_strength(self.material.parts.values(), NAME, strength):
            loss = self.trainer.task.held_out()
        if loss is None:
            raise ValueError("nothing is kept apart")
        return self.crew.agreed(loss)

    def _spec(self, result: Result) -> formats.Spec:
        material, config = self.material, self.material.config
        training = to_json(config) | {
            **material.training(result),
            "steps_done": result.steps,
            "seconds": round(result.seconds, 1),
            "held_out_loss": result.held_out_after,
            "held_out_loss_before": result.held_out_before,
            **(result.outcome.training() if result.outcome else {}),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        for place in ("output", "run_dir", "cache"):  # where things lie on this disk is nobody's business
            training.pop(place, None)
        blocks = material.blocks
        return formats.Spec(
            methods={name: [block.spec() for block in blocks if block.component == name] for name in material.parts},
            base=asdict(material.info),
            triggers=tuple(material.triggers()),
            training=training,
            title=config.output.stem,
        )


@contextmanager
def base_kept(base: Any, say: Say) -> Iterator[str]:
    """A training inside; sees that the base is the same at the end, and takes the adapter off.

    Args:
        base: A pipeline or a language model.
        say: Is told the fingerprints.

    Yields:
        The base's fingerprint.

    Raises:
        RuntimeError: A byte of the base has changed, which no setting may bring about.
    """
    parts = components(base)
    for part in parts.values():
        part.requires_grad_(False)  # of adapters too that it carried before, which this training is none of
    before = fingerprint(parts)
    say(f"base fingerprint before training: {before}")
    try:
        yield before
        after = fingerprint(parts)
        say(f"base fingerprint after training:  {after}")
        if after != before:
            raise RuntimeError("training changed the base, which no setting may do")
    finally:
        for part in parts.values():
            if NAME in site.names(part):
                site.detach(part, NAME)
        teach(base)


def origin_of(config: RunSettings, items: Sequence[Mapping[str, str]], base: str, crew: Crew) -> Origin:
    """What a run depends on, as its checkpoints keep it."""
    settings = {**to_json(config), DERIVED: sorted(config.derived), _PROCESSES: crew.size}
    return Origin(settings, digest(items), base)


def digest(items: Sequence[Mapping[str, str]]) -> str:
    """A digest of what is learned from (16 hex digits)."""
    found = hashlib.sha256()
    for item in items:
        found.update("\0".join((*item.values(), "")).encode())
    return found.hexdigest()[:16]


def next_command(command: str, prompt: str, flags: Mapping[str, str | None]) -> str:
    """What to type to see what was learned; flags at None are left away."""
    given = "".join(f" --{name} {shlex.quote(value)}" for name, value in flags.items() if value is not None)
    return f"peft-diffusion {command} {shlex.quote(prompt)}{given}"


def _save(output: Path, parts: Mapping[str, nn.Module], trainer: Trainer, spec: formats.Spec) -> None:
    """Write the adapter file, of the weights that the run gives. Raises UserError where the disk refuses."""
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with trainer.final_weights():
        formats.save(output, parts, NAME, spec)
