"""What every training has in common, of pictures or of text: attach, watch, keep, go on, and leave the base as it was."""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .. import formats
from ..bases import components, fingerprint
from ..bases.words import begun, teach
from ..core import site
from ..core.adapter import Adapter, Method
from ..core.arena import side_by_side
from ..core.errors import UserError
from ..core.files import explained
from ..core.settings import Settings, pick, to_json
from ..methods.tokens import SoftPrompt, Tokens
from .loop.seeds import global_seed
from .loop.trainer import Interrupted, Observer, Trainer, TrainerSettings
from .machine.processes import Crew
from .progress import Bar, say_to
from .record.checkpoint import Origin
from .record.run_folder import RunFolder
from .settings.blocks import Block
from .settings.choices import Precision
from .settings.shared import RunSettings
from .watch.signals import Suggestion, at_strength, best_step, measurements, suggest, verdict

NAME = "trained"  # of the adapter, while it is
IMPATIENT = "warning: --patience ends nothing where nothing is kept apart to measure on; --held-out 0.1 keeps a tenth"
Say = Callable[[str], None]
_PROCESSES = "processes"  # how many learn together, beside the settings of a run


@dataclass(frozen=True)
class Attached:
    """A fresh adapter's parameters and learning rates by the name of their group; ``undecayed`` are not pulled towards 0."""

    groups: dict[str, list[nn.Parameter]]
    rates: dict[str, float]
    undecayed: frozenset[str]


def attach(
    parts: Mapping[str, nn.Module],
    blocks: Sequence[Block],
    seed: int,
    rate_of: Callable[[str], float],
) -> Attached:
    """Put the adapter on every component, its chance from the seed.

    ``rate_of`` gives a component's learning rate; a block's own goes before it.
    Raises UserError where a component has no block, and as ``site.attach_all`` does.
    """
    groups: dict[str, list[tuple[str, list[nn.Parameter]]]] = {}
    rates: dict[str, float] = {}
    undecayed: set[str] = set()
    for name, part in parts.items():
        own = [block for block in blocks if block.component == name]
        if not own:
            raise UserError(f"no --block trains {name}; leave it out of --components")
        with global_seed(torch.device("cpu"), seed, "start", name):
            built = site.attach_all(part, NAME, [(block.method, block.target) for block in own])
        for number, (block, adapters) in enumerate(zip(own, built, strict=True)):
            words = isinstance(block.method, (Tokens, SoftPrompt))
            group = name if block.rate is None and not words else f"{name}.{number}"
            rate = rate_of(name) if block.rate is None else block.rate
            if words:
                undecayed.add(group)
            for path, adapter in adapters.items():
                adapter.train()  # the base stays in eval mode; dropout belongs to the adapter
                for times, parameters in adapter.by_rate().items():
                    own_group = group if times == 1 else f"{group} x{times:.9g}"
                    rates[own_group] = times * rate
                    groups.setdefault(own_group, []).append((path, parameters))
    return Attached({name: side_by_side(sites) for name, sites in groups.items()}, rates, frozenset(undecayed))


def chosen(base: Any, names: Sequence[str]) -> dict[str, nn.Module]:
    """The components of these names. Raises UserError for one that the base has not."""
    there = components(base)
    absent = [name for name in names if name not in there]
    if absent:
        raise UserError(f"--components {','.join(absent)}: this base has {', '.join(there)}")
    return {name: part for name, part in there.items() if name in names}


def taught(base: Any, blocks: Sequence[Block]) -> list[Block]:
    """The blocks with the ids of the words that their tokens begin as. Raises UserError as ``vocabulary.begun`` does."""
    return [replace(block, method=begun(base, block.component, block.method)) for block in blocks]


def told(parts: Mapping[str, nn.Module], blocks: Sequence[Block], parameters: int) -> str:
    """Methods, layers and parameters of the adapter that was attached, in words."""
    layers = sum(len(site.adapters(part, NAME)) for part in parts.values())
    names = ", ".join(dict.fromkeys(named(block.method) for block in blocks))
    return f"{names}: {layers} layers, {parameters:,} parameters"


def told_rates(rates: Mapping[str, float]) -> str:
    """Learning rates by group, in words."""
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())


def named(method: Method) -> str:
    """A method with its rank, if it has one."""
    rank = getattr(method, "rank", None)
    return method.name if rank is None else f"{method.name} of rank {rank}"


def next_command(command: str, prompt: str, flags: Mapping[str, str | None]) -> str:
    """What to type to see what was learned; flags at None are left away."""
    given = "".join(f" --{name} {shlex.quote(value)}" for name, value in flags.items() if value is not None)
    return f"peft-diffusion {command} {shlex.quote(prompt)}{given}"


def check_run(run: RunFolder, output: Path, *, resume: bool, overwrite: bool) -> None:
    """See that the run and its adapter file can be written where they shall go. Raises UserError."""
    run.check()
    if resume and not run.holds_a_run():
        raise UserError(f"there is no run in {run.path} to go on with; leave out --resume, or name it with --run-dir")
    if not resume and not overwrite:
        if run.holds_a_run():
            raise UserError(f"{run.path} holds a run already: --resume goes on with it, --overwrite starts anew")
        if output.exists():
            raise UserError(f"{output} exists already: --overwrite replaces it, another --output keeps it")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it")
    for folder in (output.parent, run.path):
        check_writable(folder)


def check_writable(folder: Path) -> None:
    """Raise UserError unless a file can be made in a folder, or in the nearest one above it that is there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    probe = there / f".peft_diffusion.{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{there} cannot be written to: {error.strerror}; choose another place") from None


def pick_precision(asked: Precision, device: torch.device) -> Precision:
    """The precision of the base in training; auto is bfloat16 on a GPU that has it, else float32."""
    if asked != "auto":
        return asked
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def trainer_settings(config: RunSettings, attached: Attached) -> TrainerSettings:
    """What of a run's settings the trainer goes by."""
    return pick(TrainerSettings, config, attached)


def digest(items: Sequence[Mapping[str, str]]) -> str:
    """A digest of what is learned from (16 hex digits)."""
    found = hashlib.sha256()
    for item in items:
        found.update("\0".join((*item.values(), "")).encode())
    return found.hexdigest()[:16]


def save(output: Path, parts: Mapping[str, nn.Module], trainer: Trainer, spec: formats.Spec) -> None:
    """Write the adapter file, of the weights that the run gives. Raises UserError where the disk refuses."""
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with trainer.final_weights():
        formats.save(output, parts, NAME, spec)


@contextmanager
def base_kept(base: Any, parts: Mapping[str, nn.Module], say: Say) -> Iterator[str]:
    """A training inside; gives the base's fingerprint, and sees that it is the same at the end. Detaches the adapter.

    Raises RuntimeError should a byte of the base have changed, which no setting may bring about.
    """
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


@contextmanager
def evaluating(parts: Sequence[nn.Module], name: str = NAME) -> Iterator[None]:
    """The adapter that is trained, without its dropout."""
    adapters: list[Adapter] = [adapter for part in parts for adapter in site.adapters(part, name).values()]
    before = [adapter.training for adapter in adapters]
    for adapter in adapters:
        adapter.eval()
    try:
        yield
    finally:
        for adapter, training in zip(adapters, before, strict=True):
            adapter.train(training)


def origin(config: Settings, items: Sequence[Mapping[str, str]], base: str, crew: Crew) -> Origin:
    """What a run depends on, as its checkpoints keep it."""
    return Origin({**to_json(config), _PROCESSES: crew.size}, digest(items), base)


@dataclass(frozen=True)
class Session:
    """A run of the trainer that is watched, kept in a folder, and gone on with. ``items`` are what is learned from."""

    config: RunSettings
    folder: RunFolder
    console: Console
    trainer: Trainer
    origin: Origin
    items: Sequence[dict[str, str]]
    command: str
    held_out_line: Callable[[float], str]

    def start(self, resume: bool) -> None:
        """Begin the run, or go on with it. Raises UserError where settings, data or base are others than it had."""
        crew = self.trainer.crew
        crew.wait()  # all have looked at the folder before one writes to it
        if crew.leads:
            self.folder.check()  # again: another process may have begun meanwhile
        if not resume:
            if crew.leads:
                self.folder.start(self.config, self.items, self.origin)
            return
        say, config = say_to(self.console), self.config
        found = self.folder.resume(config, self.items, self.origin) if crew.leads else None
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

    def learn(self, watching: Sequence[Observer] = ()) -> None:
        """Train to the end; ``watching`` come after what is written to the disk. Raises Interrupted on a signal."""
        steps, trainer = self.config.steps, self.trainer
        with Bar(self.console, steps, trainer.step, self.held_out_line) as bar:
            own = [bar, self.folder] if trainer.crew.leads else []
            trainer.observers = [*own, *watching] if trainer.crew.measures else []
            finished = trainer.run()
        if not finished:
            raise Interrupted(
                f"stopped after step {trainer.step} of {steps}; go on with: peft-diffusion {self.command} --config"
                f" {shlex.quote(str(self.folder.path / 'config.toml'))} --resume"
            )
        if trainer.step < steps:
            say_to(self.console)(
                f"ended after step {trainer.step} of {steps}: {self.config.patience} measurements without a new lowest one"
            )

    def outcome(self, parts: Mapping[str, nn.Module]) -> "Outcome":
        """Choose the weights that the run gives, and measure at which strength they serve best; says both.

        Only the processes that measure may ask, and all of them have to.
        """
        say, trainer, crew = say_to(self.console), self.trainer, self.trainer.crew
        held_out = crew.agreed(self.folder.held_out)  # which only the process that leads has written down
        warning = verdict(measurements(self.folder.metrics()))
        if warning:
            say(f"warning: {warning}")
        best = best_step(held_out)
        kept = trainer.step
        if self.config.keep == "best" and best is not None and best != trainer.step:
            tensors = crew.agreed(self.folder.tensors(best) if crew.leads else {})
            trainer.chosen = trainer.given(tensors).to(trainer.arena.flat.device)
            kept = best
            say(
                f"written are the weights of step {best}, which has the lowest loss on what is kept apart (--keep last: step"
                f" {trainer.step})"
            )
        suggestion = None
        if 0 in held_out and kept in held_out:
            suggestion = suggest(lambda strength: self._measured(parts, strength), held_out[0], held_out[kept])
            tried = ", ".join(f"{loss:.4f} at {strength:g}" for strength, loss in suggestion.losses.items())
            say(f"suggested strength: {suggestion.strength:g} (loss on what is kept apart: {tried})")
        return Outcome(kept, best, warning, suggestion)

    def _measured(self, parts: Mapping[str, nn.Module], strength: float) -> float:
        with self.trainer.final_weights(), at_strength(parts.values(), NAME, strength):
            loss = self.trainer.task.held_out()
        if loss is None:
            raise ValueError("nothing is kept apart")
        return self.trainer.crew.agreed(loss)


@dataclass(frozen=True)
class Outcome:
    """What a run came to. ``kept`` is the step whose weights are written, ``best`` that of the lowest loss."""

    kept: int
    best: int | None
    warning: str | None
    suggestion: Suggestion | None

    def training(self) -> dict[str, Any]:
        """For the adapter file: the entries of its training summary."""
        told: dict[str, Any] = {"kept_step": self.kept, "best_step": self.best, "warning": self.warning}
        if self.suggestion is not None:
            told |= {
                "suggested_strength": self.suggestion.strength,
                "loss_by_strength": {f"{strength:g}": loss for strength, loss in self.suggestion.losses.items()},
            }
        return told
