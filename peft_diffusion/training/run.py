"""The course of a run, whatever it trains: prepare, train, measure, keep, write, leave the base.

A `Source` knows what is learned from and how that is read; what it opens, a `Material`, is trained on, and what is trained
there is a `Learner`. Everything else is the same for pictures and text, and for adapters and what weighs them, and stands
here once.
"""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from ..bases import checksum, components
from ..bases.base import Base, frozen
from ..bases.words import teach
from ..core import site
from ..core.arena import Arena
from ..core.errors import Interrupted
from ..core.events import (
    Ended,
    Event,
    Observer,
    Observers,
    Stop,
    Warned,
    check_stop,
    observed,
    stop_on_signal,
    untold,
)
from ..core.files import claimed, explained
from ..core.others import Other
from ..core.settings import Settings, pick, to_json
from .attachment import NAME
from .beginning import Beside
from .events import Data, Fingerprinted, Plan, Prepared, Saved, Started, StrengthSuggested, Trained, WeightsChosen
from .loop.trainer import Passes, Task, Trainer, TrainerSettings, TrainerState
from .machine.memory_plan import Load, MemoryPlan
from .machine.processes import Processes, join
from .record.checkpoint import Origin, digest
from .record.facts import about, commands
from .record.measurements import best_step, measurements, verdict
from .record.notify import Notifier, missing_program
from .record.recorder import Recorder, ReportWriter
from .record.run_folder import RunFolder
from .record.trackers import Tracker, check_tracker
from .results import FoundRates, Outcome, RunResult
from .settings.choices import LogWith
from .settings.export import of_step
from .settings.resumption import DERIVED, FILES, PROCESSES
from .settings.shared import AskedSettings, RunSettings
from .watch.clock import Clock
from .watch.find_lr import Search, refuse_several_processes
from .watch.pace import PaceMeter
from .watch.previews import Previews
from .watch.strength import suggest

_TOO_EARLY = "stopped before the first step: there is nothing to go on from"

Result = TypeVar("Result", bound=RunResult)
Taken = TypeVar("Taken", bound=RunResult, contravariant=True)


class BaseInfo(Settings, Protocol):
    """What is known of a base."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Facts:
    """What a report tells of a run besides its settings and measurements.

    Attributes:
        defaults: What the settings would be if nothing had been said but what is learned from, with which method, as JSON.
        held_out: How much is kept apart to measure on, in words; empty where nothing is.
        prompts: Those of the previews; None for a run that could have none.
    """

    defaults: Mapping[str, Any]
    held_out: str
    prompts: Sequence[str] | None = None


class Learner(Protocol[Taken]):
    """What a run trains: an adapter, or what weighs adapters. The base carries it from the time it is made."""

    @property
    def arena(self) -> Arena:
        """Its parameters, in groups."""
        ...

    @property
    def rates(self) -> Mapping[str, float]:
        """The learning rate of each group."""
        ...

    @property
    def undecayed(self) -> frozenset[str]:
        """Groups without weight decay."""
        ...

    @property
    def ends(self) -> Mapping[str, float]:
        """The share of the run in which a group learns, for those that learn in less than all of it."""
        ...

    @property
    def files(self) -> Mapping[str, Any]:
        """The adapter files that it depends on beside settings and data, by what for; see `settings.resumption`."""
        ...

    @property
    def penalty(self) -> Callable[[], Tensor] | None:
        """Gives what is added to the loss and depends on the weights alone; None for nothing."""
        ...

    def passes(self) -> Passes:
        """Make what every pass forward and backward of a trainer runs inside.

        Returns:
            It.
        """
        ...

    def described(self) -> str:
        """Tell what is trained.

        Returns:
            In words.
        """
        ...

    @property
    def at_strength(self) -> Callable[[float], AbstractContextManager[None]] | None:
        """Has it act as much as a strength says, for what is done inside; None for what has no strength of its own."""
        ...

    @property
    def begins_as_base(self) -> bool:
        """Whether the loss before the first step is the base's, which it has at strength 0."""
        ...

    def save(self, path: Path, result: Taken, known: Mapping[str, Any]) -> None:
        """Write its file, with the weights that it has now.

        Args:
            path: The file; its folder is there.
            result: What the run gave so far.
            known: What is known of the training since before the first step.

        Raises:
            UserError: The disk refuses.
        """
        ...


class Material(Protocol[Result]):
    """A base that is loaded, and data that was read: what a run works on."""

    @property
    def data(self) -> Data:
        """What is learned from."""
        ...

    @property
    def base(self) -> Base:
        """The pipeline or model, as its library knows it."""
        ...

    @property
    def info(self) -> BaseInfo:
        """What is known of the base."""
        ...

    def learner(self, folder: RunFolder, others: Sequence[Other], tell: Observer) -> Learner[Result]:
        """Make what is trained. Asked for once, and before the task.

        Args:
            folder: The run folder, which says how a run that goes on began.
            others: The adapters that the base carries meanwhile.
            tell: Is told what should be known of it.

        Returns:
            It, on the base.

        Raises:
            UserError: It cannot be made on this base.
        """
        ...

    @property
    def task(self) -> Task:
        """What is learned. Asked for once the learner is made: data may become others by the words that it teaches."""
        ...

    @property
    def config(self) -> RunSettings:
        """The settings, with every value that a run needs. Asked for after `learner`."""
        ...

    @property
    def items(self) -> Sequence[dict[str, str]]:
        """What is learned from, piece by piece, as ``data.json`` holds it; checkpoints hold its digest."""
        ...

    @property
    def plugins(self) -> list[str]:
        """The modules of plug-ins that the run needs."""
        ...

    def faster(self) -> AbstractContextManager[None]:
        """Make the base quicker for a run, where it can be fused.

        Returns:
            What everything is done inside; afterwards the base is as it was.
        """
        ...

    def at_work(self) -> AbstractContextManager[None]:
        """Take off the device what is idle while steps are done.

        Returns:
            What training is done inside.
        """
        ...

    def previews(self, trainer: Trainer, folder: RunFolder) -> Previews | None:
        """Make what draws previews.

        Args:
            trainer: Gives the weights to draw with.
            folder: Where they are written.

        Returns:
            The previews; None where none are drawn.
        """
        ...

    def load(self, previews: Previews | None) -> Load:
        """List what of the run takes memory.

        Args:
            previews: What draws previews, if any are drawn.

        Returns:
            The list, and how to save some of it.
        """
        ...

    def facts(self, folder: RunFolder, previews: Previews | None) -> "Facts":
        """Collect what the report tells of this kind of run.

        Args:
            folder: The run folder, into which pictures for the report may be written.
            previews: What draws previews, if any are drawn.

        Returns:
            The facts.
        """
        ...

    def next_command(self, strength: float | None) -> str:
        """Write the command that uses what was learned.

        Args:
            strength: That at which it was measured to serve best; None where that is not known.

        Returns:
            The command line.
        """
        ...

    def result(self, found: RunResult) -> Result:
        """Complete the result with what only this kind of run has.

        Args:
            found: What every run gives.

        Returns:
            The result.
        """
        ...

    def training(self) -> Mapping[str, Any]:
        """Add to the training summary of the file what is known before the first step.

        Returns:
            Entries beside those of the settings, and in place of some.
        """
        ...


class RatedMaterial(Material[Result], Protocol[Result]):
    """One whose learning rates can be searched for."""

    def rate_flags(self) -> Mapping[str, str]:
        """Name the flags that set learning rates.

        Returns:
            A flag by component; empty where blocks have rates of their own.
        """
        ...


class Source(Protocol[Result]):
    """What a run learns from, as it was asked for; nothing is loaded yet."""

    @property
    def asked(self) -> AskedSettings:
        """The settings as they were given."""
        ...

    @property
    def others(self) -> Sequence[str]:
        """The adapters that the base is to carry meanwhile, as `train` is given what attaches them."""
        ...

    @property
    def lent(self) -> "Base | None":
        """A base that is the caller's, who gets it back as it was; None where the run loads one of its own."""
        ...

    @property
    def output(self) -> Path:
        """The file that is to be made."""
        ...

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        ...

    def check(self) -> None:
        """Find out what can be told with neither base nor data.

        Raises:
            UserError: Something cannot be as it was asked for.
        """
        ...

    def on(self, device: str) -> Self:
        """Put the run on another device.

        Args:
            device: Its name.

        Returns:
            The same source otherwise.
        """
        ...

    def processes(self, processes: Processes) -> Processes:
        """Arrange the processes as the settings have them.

        Args:
            processes: Those that a launcher started.

        Returns:
            The same, sharing the base or not.

        Raises:
            UserError: They cannot be so.
        """
        ...

    def folder(self) -> RunFolder:
        """Make the run folder, after seeing that everything can be written.

        Returns:
            The folder.

        Raises:
            UserError: Something cannot be written.
        """
        ...

    def open(self, folder: RunFolder, processes: Processes, tell: Observer) -> Material[Result]:
        """Load the base and read the data.

        Args:
            folder: The run folder, which says what a run that goes on depends on.
            processes: The processes that train together.
            tell: Is told what is found.

        Returns:
            What the run works on.

        Raises:
            UserError: For a base or data that cannot be used.
        """
        ...


class RatedSource(Source[Result], Protocol[Result]):
    """One whose learning rates can be searched for."""

    def search_folder(self) -> RunFolder:
        """Choose where a search for learning rates writes, after seeing that it can.

        Returns:
            The folder.

        Raises:
            UserError: It cannot be written.
        """
        ...

    def open(self, folder: RunFolder, processes: Processes, tell: Observer) -> RatedMaterial[Result]:
        """Load the base and read the data: see `Source.open`."""
        ...

    def remark(self, found: FoundRates) -> Event | None:
        """Say what should be known of rates that were found.

        Args:
            found: The rates.

        Returns:
            An event; None where there is nothing to say.
        """
        ...


def train(source: Source[Result], beside: Beside, observers: Sequence[Observer] = (), stop: Stop | None = None) -> Result:
    """Learn from a source and write what was learned as one file.

    Args:
        source: What is learned from.
        beside: Puts on the base the adapters that it carries meanwhile.
        observers: Are told what happens, in this thread; of several processes, only by the one that leads.
        stop: Where it is set, the run ends after the present step, with a checkpoint. Without one, SIGINT, SIGTERM and
            SIGHUP do the same from the first step on, where this is the main thread.

    Returns:
        What the run gave.

    Raises:
        UserError: For what the user can mend.
        Interrupted: The run was stopped, after it saved a checkpoint. It is a KeyboardInterrupt.
    """
    began = time.monotonic()
    with observed(observers) as tell, frozen(source.lent):
        processes, device = join(source.asked.device)
        if processes.leads:
            _notify(source, tell)
        else:
            tell.others = [untold]
        processes, source = source.processes(processes), source.on(device)
        source.check()
        check_tracker(source.asked.log_with)
        folder = source.folder()
        if source.asked.resume:
            folder.check_asked(source.asked, processes.size)
        with _claimed(source.output) if processes.leads else nullcontext():
            if processes.leads:
                source.folder()  # again: another run may have written the output before this one claimed it
            recorder = Recorder(folder)
            if processes.leads:
                tell.own = [recorder, ReportWriter(folder), *tell.own]
            material = source.open(folder, processes, _stopping(tell, stop, processes))
            with (
                beside(material.base, source.others, tell) as others,
                material.faster(),
                base_kept(material.base, material.info.fingerprint, tell) as before,
            ):
                run = _Run(material, folder, tell, processes, others)
                with material.at_work():
                    run.train(source.asked, recorder, stop)
                    result = run.write(before, folder.seconds + time.monotonic() - began)
        tell(Ended("finished", result))
    return result


def _notify(source: Source[Any], tell: Observers) -> None:
    """Let a command be run at the end, where one was given."""
    command = source.asked.notify
    if command is None:
        return
    tell.own.append(Notifier(command, source.output, source.run_dir))
    missing = missing_program(command)
    if missing is not None:
        tell(missing)


def _claimed(output: Path) -> AbstractContextManager[None]:
    """The adapter file as this run's own: of two with one file, the later would replace what the earlier wrote."""
    return claimed(output, f"another run makes {output} now; wait for it, or choose another --output")


def find_rates(
    source: RatedSource[Result], beside: Beside, observers: Sequence[Observer] = (), stop: Stop | None = None
) -> FoundRates:
    """Find a learning rate for a training by trials, without doing it: see `watch.find_lr`.

    Nothing is written but ``find_lr.json`` and ``find_lr.png`` in the run folder.

    Args:
        source: What is learned from.
        beside: Puts on the base the adapters that it carries meanwhile.
        observers: Are told what happens, in this thread.
        stop: Where it is set, the search ends. Without one, SIGINT, SIGTERM and SIGHUP do the same, where this
            is the main thread.

    Returns:
        The rates, and all trials.

    Raises:
        UserError: For what the user can mend.
        Interrupted: The search was stopped. It is a KeyboardInterrupt.
    """
    with observed(observers) as tell, frozen(source.lent):
        processes, device = join(source.asked.device)
        refuse_several_processes(processes)
        _notify(source, tell)
        source = source.on(device)
        source.check()
        folder = source.search_folder()
        material = source.open(folder, processes, _stopping(tell, stop, processes))
        with (
            beside(material.base, source.others, tell) as others,
            material.faster(),
            base_kept(material.base, material.info.fingerprint, tell),
        ):
            run = _Run(material, folder, tell, processes, others)
            with material.at_work(), run.memory_plan().applied(tell), _stop_of(stop, tell) as wish:
                trainer = run.trainer
                found = Search(
                    trainer.task, trainer.arena, trainer.settings, run.trial, folder.path, material.rate_flags(), tell, wish
                ).run()
        remark = source.remark(found)
        if remark:
            tell(remark)
        tell(Ended("finished"))
    return found


class _Run(Generic[Result]):
    """One training: what is trained on a base, its trainer, and what is kept of it."""

    def __init__(
        self,
        material: Material[Result],
        folder: RunFolder,
        tell: Observers,
        processes: Processes,
        others: Sequence[Other],
    ) -> None:
        self.material = material
        self.folder = folder
        self.tell = tell
        self.processes = processes
        self.learner = learner = material.learner(folder, others, tell)
        self.arena = learner.arena
        task, config = material.task, material.config
        rates = {"rates": learner.rates}
        plan = pick(Plan, config, rates, {"data": material.data, "batch": _batch(config), "processes": processes.size})
        tell(Prepared(learner.described(), self.arena.count, plan))
        self.trainer = self.trial(task, self._settings())
        self.trainer.observers = [tell]
        self.previews = material.previews(self.trainer, folder) if processes.measures else None
        self.outcome: Outcome | None = None

    def _settings(self) -> TrainerSettings:
        config, learner = self.material.config, self.learner
        own = {
            "rates": learner.rates,
            "undecayed": learner.undecayed,
            "ends": {group: max(1, round(share * config.steps)) for group, share in learner.ends.items()},
            "loss_scaling": config.precision == "float16",
        }
        settings = pick(TrainerSettings, config, own)
        # No CUDA graph holds weights that come and go.
        return replace(settings, cuda_graph=False) if self.processes.shares_base else settings

    def trial(self, task: Task, settings: TrainerSettings) -> Trainer:
        """A trainer of what is learned, which nobody watches."""
        return Trainer(
            task,
            self.arena,
            settings,
            processes=self.processes,
            data=self.material.data,
            passes=self.learner.passes(),
            penalty=self.learner.penalty,
        )

    def memory_plan(self) -> MemoryPlan:
        """How the run uses the memory of its device."""
        trainer, config = self.trainer, self.material.config
        return MemoryPlan(
            memory=config.memory,
            load=self.material.load(self.previews),
            loss=trainer.task.loss,
            held=trainer.held,
            device=self.arena.flat.device,
            records=trainer.records,
            sharded=self.processes.shares_base,
        )

    def train(self, asked: AskedSettings, recorder: Recorder, stop: Stop | None) -> None:
        """Train to the end. Raises Interrupted where it was stopped early."""
        with self.memory_plan().applied(self.tell):
            if self.processes.size == 1 and stop is not None:
                check_stop(stop, _TOO_EARLY)
            started = self._start(asked.resume)
            if self.processes.leads:
                self._note(recorder)
            self.tell(started)
            self._learn(asked.log_with, stop)
            self.outcome = self._outcome() if self.processes.measures else None
            if self.processes.leads:
                self.folder.note(commands=self._commands())  # with the strength that is suggested now

    def write(self, base: str, seconds: float) -> Result:
        """Write the file of what was trained, with what is worth knowing of it."""
        config, result = self.material.config, self._result(base, seconds)
        if self.processes.leads:
            self._save(config.output, result)
            self.tell(Saved("adapter", self._kept, config.output))
        self.processes.wait()
        return result

    @property
    def _kept(self) -> int:
        """The step whose weights the run gives, as far as it is."""
        return self.outcome.kept if self.outcome else self.trainer.step

    def _result(self, base: str, seconds: float) -> Result:
        config, measured = self.material.config, self.trainer.measured
        found = RunResult(
            output=config.output,
            run_dir=config.run_dir,
            steps=self.trainer.step,
            seconds=seconds,
            held_out_before=measured.get(0),
            held_out_after=measured.get(self._kept),
            base_fingerprint=self.material.info.fingerprint,
            base_checksum=base,
            next_command=self.material.next_command(self._strength),
            outcome=self.outcome,
        )
        return self.material.result(found)

    def _save(self, path: Path, result: Result) -> None:
        """Write a file of the weights that the run gives. Raises UserError where the disk refuses."""
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self.trainer.final_weights():
            self.learner.save(path, result, self._known())

    def _start(self, resume: bool) -> Started:
        """Begin the run, or go on with it. Raises UserError where settings, data or base are others than it had."""
        processes, config, items = self.processes, self.material.config, self.material.items
        info = self.material.info
        origin = origin_of(config, items, info.fingerprint, processes, self.learner.files)
        self.folder.training = self._known()
        modules = self.material.plugins
        processes.wait()  # all have looked at the folder before one writes to it
        if processes.leads:
            self.folder.check()  # again: another process may have begun meanwhile
        if not resume:
            if processes.leads:
                self.folder.start(config, items, origin, modules)
            return Started(self.folder.path, 0, config.steps)
        found = self.folder.resume(config, items, origin, modules) if processes.leads else None
        for words in self.folder.lost:
            self.tell(Warned(words))
        processes.wait()  # what cannot be gone on from is gone
        if not processes.leads:
            found = self.folder.newest()
        if found is None:
            return Started(self.folder.path, 0, config.steps, resumed=True)
        self.trainer.load(found.state)
        self.folder.forget()
        self.trainer.measured = processes.agreed(dict(self.folder.held_out))
        planned = int(found.origin.config["steps"])
        return Started(self.folder.path, found.state.step, config.steps, True, planned, config.scheduler)

    def _note(self, recorder: Recorder) -> None:
        """What the report tells of the run besides its settings and measurements."""
        material, info = self.material, self.material.info
        own = material.facts(self.folder, self.previews)
        self.folder.note(
            about=about(self.learner.described(), self.arena.count, info.name, info.fingerprint),
            defaults=dict(own.defaults),
            warnings=recorder.warnings,
            said=recorder.lines,
            apart=own.held_out,
            **({} if own.prompts is None else {"prompts": list(own.prompts)}),
            commands=self._commands(),
        )

    @property
    def _strength(self) -> float | None:
        """The strength that is suggested, as far as it is."""
        return self.outcome.suggestion.strength if self.outcome and self.outcome.suggestion else None

    def _commands(self) -> dict[str, str]:
        """What to type to use what was learned, and to go on."""
        use = self.material.next_command(self._strength)
        return commands(self.folder.command, self.material.config.run_dir, use)

    def _learn(self, log_with: LogWith | None, stop: Stop | None) -> None:
        """Train to the end. Raises Interrupted where it was stopped early."""
        trainer, config, previews = self.trainer, self.material.config, self.previews
        if log_with is not None and self.processes.leads:
            self.tell.own.append(Tracker(self.folder.logs, trainer.step))
        if self.processes.leads:
            trainer.keep = self._keep
            batch = _batch(config) * self.processes.size
            trainer.observers += [
                PaceMeter(self.material.data, batch, config.steps, trainer.step, self.arena.flat.device, self.tell)
            ]
        if self.processes.measures:
            trainer.after_step = [Clock(config.steps, self.arena.flat.device, self.tell).after_step]
        if previews:
            if not previews.go_on_from(trainer.step):
                previews.draw_base()
            trainer.after_step.append(previews.after_step)
        with _stop_of(stop, self.tell) as wish:
            finished = trainer.run(stop=wish)
        if not finished:
            raise Interrupted(
                f"stopped after step {trainer.step} of {config.steps}; go on with: peft-diffusion {self.folder.command}"
                f" --config {shlex.quote(str(self.folder.path / 'config.toml'))} --resume"
            )
        self.tell(Trained(trainer.step, config.steps, config.patience if trainer.step < config.steps else None))
        if previews:
            previews.draw(trainer.step)
            previews.look_at_paper()

    def _keep(self, state: TrainerState) -> None:
        self.trainer.tell(Saved("checkpoint", state.step, self.folder.keep(state)))
        config = self.material.config
        if config.keep_last:
            path = self.folder.adapter(of_step(config.output, state.step))
            self._save(path, self._result("", self.folder.elapsed))
            self.trainer.tell(Saved("on the way", state.step, path))
            self.folder.thin()

    def _outcome(self) -> Outcome:
        """Choose the weights that the run gives, and measure at which strength they serve best; tells both.

        Only the processes that measure may ask, and all of them have to.
        """
        trainer, processes, held_out = self.trainer, self.processes, self.trainer.measured
        warning = verdict(measurements(self.folder.metrics()))
        if warning:
            self.tell(Warned(warning))
        best, kept = best_step(held_out), trainer.step
        if self.material.config.keep == "best":
            none: tuple[int, dict[str, Tensor], str | None] = (kept, {}, None)
            kept, tensors, lost = processes.agreed(self.folder.best(held_out, kept) if processes.leads else none)
            if lost:
                self.tell(Warned(lost))
            if tensors:
                trainer.result_weights = trainer.given(tensors).to(self.arena.flat.device)
                self.tell(WeightsChosen(kept, trainer.step))
        suggestion = None
        at_strength = self.learner.at_strength
        if at_strength is not None and 0 in held_out and kept in held_out:
            measure = partial(self._measured, at_strength)
            base = held_out[0] if self.learner.begins_as_base else measure(0.0)
            suggestion = suggest(measure, base, held_out[kept])
            self.tell(StrengthSuggested(suggestion))
        return Outcome(kept, best, warning, suggestion)

    def _measured(self, at_strength: Callable[[float], AbstractContextManager[None]], strength: float) -> float:
        with self.trainer.final_weights(), at_strength(strength):
            loss = self.trainer.task.held_out()
        if loss is None:
            raise ValueError("nothing is kept apart")
        return self.processes.agreed(loss)

    def _known(self) -> dict[str, Any]:
        """Entries of the training summary that checkpoints hold too, so that a file of one says the same."""
        return {**self.material.training(), **self.learner.files}


def _batch(config: RunSettings) -> int:
    """Pictures or windows of a step, in one process."""
    return config.batch_size * config.accumulation


@contextmanager
def _stop_of(stop: Stop | None, tell: Observer) -> Iterator[Stop]:
    """The wish to stop that was given, or else one that signals set inside."""
    if stop is not None:
        yield stop
        return
    with stop_on_signal(tell) as wish:
        yield wish


def _stopping(tell: Observer, stop: Stop | None, processes: Processes) -> Observer:
    """The same observer, which ends what is told to it where it is wished to stop, as long as nothing is written."""
    if stop is None or processes.size > 1:  # one of several cannot leave the others
        return tell

    def told(event: Event) -> None:
        tell(event)
        check_stop(stop, _TOO_EARLY)

    return told


@contextmanager
def base_kept(base: Base, fingerprint: str, tell: Observer) -> Iterator[str]:
    """A training inside; sees that the base is the same at the end, and takes the adapter off.

    Args:
        base: A pipeline or a language model.
        fingerprint: Which base it is.
        tell: Is told the base's fingerprint, and the checksums.

    Yields:
        The checksum of the base.

    Raises:
        RuntimeError: A byte of the base has changed, which no setting may bring about.
    """
    parts = components(base)
    for part in parts.values():
        part.requires_grad_(False)  # of adapters too that it carried before, which this training is none of
    before = checksum(parts)
    tell(Fingerprinted("before", fingerprint, before))
    try:
        yield before
        after = checksum(parts)
        tell(Fingerprinted("after", fingerprint, after))
        if after != before:
            raise RuntimeError("training changed the base, which no setting may do")
    finally:
        for part in parts.values():
            if NAME in site.names(part):
                site.detach(part, NAME)
        teach(base)


def origin_of(
    config: RunSettings, items: Sequence[Mapping[str, str]], base: str, processes: Processes, files: Mapping[str, Any]
) -> Origin:
    """Collect what the result of a run depends on, as its checkpoints keep it.

    Args:
        config: The settings.
        items: What is learned from, piece by piece.
        base: The fingerprint of the base.
        processes: Those that train together.
        files: Adapter files that it begins from and is trained beside.

    Returns:
        All of it.
    """
    settings = {
        **to_json(config),
        DERIVED: sorted(config.derived),
        PROCESSES: processes.size,
        **({FILES: dict(files)} if files else {}),
    }
    return Origin(settings, digest(items), base)


def at_strength(path: Path, strength: float | None) -> str:
    """Write an adapter as ``--adapter`` takes it.

    Args:
        path: Its file.
        strength: That which is suggested; None for none. At 0, which is suggested where nothing was learned that holds for
            what is kept apart, nothing of it would be seen: it is left at 1.

    Returns:
        The path, and the strength where it is another than 1.
    """
    return f"{path}={strength:g}" if strength and strength != 1 else str(path)


def next_command(
    command: str, prompt: str, flags: Mapping[str, str | None], modules: Sequence[str], adapters: Sequence[str] = ()
) -> str:
    """Write the command that uses what a run learned.

    Args:
        command: Such as ``generate``.
        prompt: What it is given first.
        flags: Values by flag, without dashes; those that are None are left away.
        modules: The plug-ins that are needed.
        adapters: Adapter files that are needed beside what was learned.

    Returns:
        The command line, quoted for a shell.
    """
    present = [(name, value) for name, value in flags.items() if value is not None]
    present += [*(("adapter", path) for path in adapters), *(("plugin", module) for module in modules)]
    given = "".join(f" --{name} {shlex.quote(value)}" for name, value in present)
    if prompt.startswith("-"):  # which would be read as a flag before the --
        return f"peft-diffusion {command}{given} -- {shlex.quote(prompt)}"
    return f"peft-diffusion {command} {shlex.quote(prompt)}{given}"
