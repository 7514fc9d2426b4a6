"""The run folder: settings, metrics, previews, plots, a report and checkpoints of one training."""

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import __version__
from ...core import checksums
from ...core.errors import UserError
from ...core.files import explained, file_of, lies_in, write_bytes
from ...core.parsing import json_value
from ...core.settings import to_json
from ..loop.trainer import TrainerState
from ..settings.derive import undecided
from ..settings.resumption import BESIDE, FILES, PROCESSES, WEIGHED, changes
from ..settings.shared import AskedSettings, RunSettings
from ..settings.toml import to_toml
from . import checkpoint as checkpoints
from . import run_record
from .checkpoint import Checkpoint, Origin
from .measurements import best_step

_ANEW = "; start a new run with another --run-dir, or with --overwrite"
_CHECKPOINTS, _LOGS, _ADAPTERS = "checkpoints", "logs", "adapters"
_FILE = "step_{:06}.safetensors"
_NAME = re.compile(r"step_(\d+)\.safetensors")
_ADAPTER = re.compile(r".+-(\d{6,})\.safetensors", re.DOTALL)
# What a run writes, by folder: nothing else is ever deleted.
_OWN = {
    _CHECKPOINTS: _NAME,
    run_record.PREVIEWS: re.compile(rf"{run_record.PREVIEW.pattern}|sheet\.png|prompts\.json"),
    run_record.THUMBNAILS: re.compile(r"\d{6}\.webp"),
    _ADAPTERS: _ADAPTER,
    _LOGS: re.compile(r"events\.out\.tfevents\..+"),
    "": re.compile(r"(?:config\.toml|(?:data|run)\.json|metrics\.jsonl|(?:loss|signals)\.png|report\.html)"),
}
EARLIER = re.compile(r"until_step_\d{6,}")
"""The folders in ``previews/`` of pictures for other prompts, which the run had before it went on."""
_ENTRIES = {
    "digest": "another content", "caption": "another caption", "mask": "another mask", "drawn": "other repeats or weight",
    "adapter": "another adapter",
}  # fmt: skip
# Adapter files that a run has by name and digest, by what for: what it was, and how to say the same.
_USED = {
    BESIDE: ("was trained beside other adapters", "say the same with --beside"),
    WEIGHED: ("weighs other adapters", "name the same"),
}


class RunFolder:
    """Keeps what there is of a run, and finds what an earlier one left.

    ``config.toml`` (for ``--config``), ``data.json`` (what is learned from), ``run.json`` (how it stands and what is to be
    known of it), ``metrics.jsonl``, ``loss.png``, ``signals.png``, ``report.html``, ``previews/``, ``thumbnails/``,
    ``checkpoints/`` and, where they are wanted, ``adapters/``. Every method that writes raises UserError where the
    disk refuses.
    """

    def __init__(self, path: Path, command: str = "train", data: str = "pictures or captions") -> None:
        self.path = path
        self.command = command
        self.data = data  # what ``data.json`` lists, in words
        self.origin = Origin({}, "", "")
        self.training: dict[str, Any] = {}  # of the adapter file's training summary, beside settings and losses
        self.seconds = 0.0  # of earlier stretches of the run
        self.started = time.monotonic()
        self.held_out: dict[int, float] = {}  # losses on what is kept apart, by step
        self.facts: dict[str, Any] = {}  # of ``run.json``; empty until the run begins
        self.lines = 0  # of the metrics
        self.lost: list[str] = []  # what was found damaged, and what that means, in words
        self._looked: tuple[object, dict[Path, Checkpoint | None]] | None = None  # see `_read_newest`
        self.kept_adapters = 0  # newest adapter files of the way that stay
        self.kept = 1  # newest checkpoints that stay, beside the best one by the loss on what is kept apart

    @property
    def previews(self) -> Path:
        """Where previews go."""
        return self.path / run_record.PREVIEWS

    @property
    def thumbnails(self) -> Path:
        """Where small copies of the pictures go."""
        return self.path / run_record.THUMBNAILS

    @property
    def logs(self) -> Path:
        """Where trackers write."""
        return self.path / _LOGS

    @property
    def elapsed(self) -> float:
        """Seconds trained, all stretches together."""
        return self.seconds + time.monotonic() - self.started

    def holds_a_run(self) -> bool:
        """Whether a run was started here."""
        return (self.path / run_record.CONFIG).exists()

    def check(self) -> None:
        """See that nothing of somebody else lies in the way, and that no other process trains into this folder.

        Raises:
            UserError: Something does, or one does.
        """
        other = run_record.Record(self.path).other_process
        if other is not None:
            raise UserError(
                f"process {other} trains into {self.path} now; wait for it, stop it, or choose another --run-dir (if that"
                f" process is something else, delete {self.path / run_record.FACTS})"
            )
        if run_record.Record(self.path).is_run:
            return
        foreign = [name for name in _OWN if name and _listed(self.path / name)]
        foreign += [path.name for path in _listed(self.path) if _OWN[""].fullmatch(path.name)]
        if foreign:
            raise UserError(
                f"{self.path} is no run folder and holds {foreign[0]}, where a run would write its own; choose another"
                " --run-dir"
            )

    @property
    def plugins(self) -> list[str]:
        """The modules of plug-ins that the run here was trained with."""
        return run_record.Record(self.path).plugins

    def start(
        self, config: RunSettings, items: Sequence[dict[str, str]], origin: Origin, plugins: Sequence[str] = ()
    ) -> None:
        """Begin a run in a clean folder; what an earlier run wrote here goes.

        Args:
            config: The settings.
            items: What is learned from.
            origin: What the run depends on.
            plugins: The modules of plug-ins that it needs.

        Raises:
            UserError: The disk refuses.
        """
        with explained(self.path):
            self._clear()
            for place in (self._checkpoints, self.previews, self.thumbnails):
                place.mkdir(parents=True, exist_ok=True)
        # The settings tell that the folder is ours: with a disk that is full after them, a run can begin here again.
        self._begin(config, origin, plugins)
        self.lines = 0
        write_bytes(self._metrics, b"")
        write_bytes(self.path / run_record.DATA, _json_lines(items))

    def resume(
        self, config: RunSettings, items: Sequence[dict[str, str]], origin: Origin, plugins: Sequence[str] = ()
    ) -> Checkpoint | None:
        """Find where a run goes on, and cut the metrics back to it.

        Args:
            config: The settings.
            items: What is learned from.
            origin: What the run depends on.
            plugins: The modules of plug-ins that it needs.

        Returns:
            The newest good checkpoint; None where the run never came to one. What was damaged is in `lost` afterwards.

        Raises:
            UserError: Settings, data or base are others than the run was started with, or there are checkpoints and none
                can be read.
        """
        read = self._read_newest()
        found = next((checkpoint for checkpoint in read.values() if checkpoint is not None), None)
        damage = run_record.Record(self.path).damage
        if found is None:
            self._check_begun()
            self.lost = [f"{self.path}: {words}; the run begins anew" for words in damage]
            self.start(config, items, origin, plugins)
            return None
        self._check_settings(changes(found.origin.config, config))
        self.check_base(found.origin, origin.base)
        self.check_data(found.origin, items)
        self._check_used(found.origin, origin)
        self._check_length(found, config.steps)
        step = found.state.step
        self.lost = [
            f"{path} is damaged, and deleted; the run goes on from the checkpoint of step {step}"
            for path, checkpoint in read.items()
            if checkpoint is None
        ]
        self.lost += [f"{self.path}: {words}" for words in damage]
        self._cut(found)
        if _read(self.path / run_record.DATA) != _json_lines(items):
            self.lost.append(f"{self.path / run_record.DATA} was damaged or edited, and is written anew")
            write_bytes(self.path / run_record.DATA, _json_lines(items))
        self.seconds = found.seconds
        self._begin(config, origin, plugins)
        return found

    def check_asked(self, config: AskedSettings, processes: int) -> None:
        """See that the run here can go on with what is asked for, as far as neither base nor data are needed for that.

        Args:
            config: The settings as they were given.
            processes: How many train together.

        Raises:
            UserError: Settings or processes are others than the run was started with, it is longer than asked for already,
                or there are checkpoints and none can be read.
        """
        found = self.newest()
        if found is None:
            self._check_begun()
            return
        self._check_settings(changes(found.origin.config, config, undecided(config)))
        if config.steps is not None and config.epochs is None:
            self._check_length(found, config.steps)
        before = found.origin.config.get(PROCESSES, 1)
        if before != processes:
            raise UserError(
                f"the run in {self.path} had {before} processes, and there are {processes} now, so its batches would be"
                " others; start as many, or a new run with another --run-dir"
            )

    def check_base(self, before: Origin, base: str) -> None:
        """See that a run has the base that it was started with.

        Args:
            before: What it depends on, as its newest checkpoint has it.
            base: The fingerprint of the base now.

        Raises:
            UserError: It has another.
        """
        if before.base != base:
            raise UserError(f"the run in {self.path} had another base ({before.base}, this one is {base}){_ANEW}")

    def check_data(self, before: Origin, items: Sequence[dict[str, str]]) -> None:
        """See that a run learns from what it was started with.

        Args:
            before: What it depends on, as its newest checkpoint has it.
            items: What is learned from now.

        Raises:
            UserError: It would learn from something else; the message names what.
        """
        if before.data != checkpoints.digest(items):
            raise UserError(f"the run in {self.path} had other {self.data}: {self._changed(items)}{_ANEW}")

    def _check_used(self, before: Origin, now: Origin) -> None:
        """Raise UserError where a run would have other adapters on its base than it had."""
        for use, (did, mend) in _USED.items():
            had, has = (one.config.get(FILES, {}).get(use, []) for one in (before, now))
            if had != has:
                was, now_is = (", ".join(map(_used, each)) for each in (had, has))
                raise UserError(
                    f"the run in {self.path} {did}, or others of these names: {was or 'none'} then,"
                    f" {now_is or 'none'} now; {mend}{_ANEW}"
                )

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read."""
        return next((found for found in self._read_newest().values() if found is not None), None)

    def forget(self) -> None:
        """Let go of the checkpoint that `newest` and `resume` gave, which takes as much memory as the trainer's state."""
        self._looked = None

    def _read_newest(self) -> dict[Path, Checkpoint | None]:
        """Checkpoints from the newest to the first that can be read; None for those that cannot.

        They are large, and every check before a run goes on asks for them: while the files are the same, they are read once.
        """
        files = [path for _, path in sorted(self._files().items(), reverse=True)]
        same = [(path, (at := path.stat()).st_mtime_ns, at.st_size, at.st_ino) for path in files]
        if self._looked is None or self._looked[0] != same:
            found: dict[Path, Checkpoint | None] = {}
            for path in files:
                found[path] = checkpoints.read(path)
                if found[path] is not None:
                    break
            self._looked = same, found
        return self._looked[1]

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write measurements into ``metrics.jsonl``, each with the seconds trained so far.

        Args:
            lines: The measurements.

        Raises:
            UserError: The disk refuses.
        """
        seconds = round(self.elapsed, 3)
        with explained(self._metrics), self._metrics.open("ab") as file:
            sealed = [checksums.sealed_line({**line, "seconds": seconds}) for line in lines]
            file.write(b"".join(sealed))
        self.lines += len(sealed)

    def keep(self, state: TrainerState) -> Path:
        """Keep a state to go on from, a few before it and the best; others go.

        Args:
            state: That of the trainer.

        Returns:
            The checkpoint.

        Raises:
            UserError: The disk refuses.
        """
        path = self._checkpoints / _FILE.format(state.step)
        measured = dict(self.held_out)
        held_out = measured.get(state.step)
        checkpoints.write(path, Checkpoint(state, self.origin, held_out, self.elapsed, measured, self.lines, self.training))
        files = self._files()
        keep = set(sorted(files)[-self.kept :])
        best = best_step({step: loss for step, loss in self.held_out.items() if step in files})
        if best is not None:
            keep.add(best)
        with explained(self.path):
            for step in files.keys() - keep:
                files[step].unlink()
        return path

    def adapter(self, name: str) -> Path:
        """Place the adapter file of a step.

        Args:
            name: The file's name.

        Returns:
            The file, which need not be there.
        """
        return self.path / _ADAPTERS / name

    def thin(self) -> None:
        """Delete adapter files of the way beyond as many of the newest as are to stay.

        Raises:
            UserError: The disk refuses.
        """
        files = self._adapters()
        with explained(self.path):
            for step in sorted(files)[: max(0, len(files) - self.kept_adapters)]:
                files[step].unlink()

    def _adapters(self) -> dict[int, Path]:
        """Adapter files of the way, by step."""
        matches = ((_ADAPTER.fullmatch(path.name), path) for path in _listed(self.path / _ADAPTERS))
        return {int(match[1]): path for match, path in matches if match}

    def note(self, **facts: Any) -> None:
        """Keep facts of the run in ``run.json``: see `run_record.Record`.

        Args:
            facts: JSON values by name, each in place of one that was there.
        """
        self.facts |= facts
        text = json.dumps(checksums.sealed(self.facts), ensure_ascii=False, indent=1)
        write_bytes(self.path / run_record.FACTS, f"{text}\n".encode())

    def steps(self) -> list[int]:
        """The steps whose checkpoints are kept, in order."""
        return sorted(self._files())

    def at(self, step: int) -> Checkpoint | None:
        """Read the checkpoint of a step.

        Args:
            step: The steps done.

        Returns:
            The checkpoint; None where it is gone or damaged.
        """
        path = self._files().get(step)
        return checkpoints.read(path) if path else None

    def best(self, measured: Mapping[int, float], last: int) -> tuple[int, dict[str, Tensor], str | None]:
        """Read the state of the trainer at the best step; where its checkpoint is lost, at the best of those kept.

        Args:
            measured: Losses on what is held out, by step.
            last: The step that the run is at, whose state needs no file.

        Returns:
            The step, tensors by name, none for the last step, and what was lost, in words.
        """
        files, left = self._files(), dict(measured)
        wanted = step = best_step(left)
        while step is not None and step != last:
            found = self.at(step)
            if found is not None:
                return step, found.state.tensors, self._without(wanted, step)
            del left[step]
            step = best_step({other: loss for other, loss in left.items() if other in files or other == last})
        return last, {}, self._without(wanted, last)

    def _without(self, wanted: int | None, step: int) -> str | None:
        """What it means that the checkpoint of the best step is lost; None where it is not."""
        if wanted in (None, step):
            return None
        name = self._checkpoints / _FILE.format(wanted)
        return f"{name}, of the lowest loss on what is kept apart, is gone or damaged; the weights of step {step} are taken"

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; what is damaged or was cut short by a crash is left out."""
        return run_record.measurements(self._metrics)[0]

    @property
    def _metrics(self) -> Path:
        return self.path / run_record.METRICS

    @property
    def _checkpoints(self) -> Path:
        return self.path / _CHECKPOINTS

    def _files(self) -> dict[int, Path]:
        """Checkpoints by step."""
        matches = ((_NAME.fullmatch(path.name), path) for path in self._checkpoints.glob("*.safetensors"))
        return {int(match[1]): path for match, path in matches if match}

    def _begin(self, config: RunSettings, origin: Origin, plugins: Sequence[str]) -> None:
        self.origin = origin
        self.kept = config.keep_checkpoints
        self.kept_adapters = config.keep_last
        self.started = time.monotonic()
        with explained(self.path):
            # The adapter file lies elsewhere; nobody else writes it now, as the run has claimed it.
            of_output = config.output.parent, re.compile(re.escape(config.output.name))
            for place, own in (*((self.path / name, own) for name, own in _OWN.items()), of_output):
                for left in _listed(place):
                    whole = file_of(left.name)
                    if whole and own.fullmatch(whole):
                        left.unlink()  # by a run that was killed while it wrote
        header = f"{run_record.HEADER}{self.command} --config {self.path / run_record.CONFIG}\n"
        header += "# What stands in a comment was derived from the rest, and is derived anew when this file is used.\n"
        header += f"plugin = {json.dumps(plugins, ensure_ascii=False)}\n" if plugins else ""
        write_bytes(self.path / run_record.CONFIG, checksums.sealed_comment(header + to_toml(config)).encode())
        self.facts = {}
        self.note(
            state="running",
            command=self.command,
            version=__version__,
            process=run_record.this_process(),
            settings=to_json(config),
            plugins=list(plugins),
            derived=dict(config.derived),
        )

    def _clear(self) -> None:
        """Delete what runs wrote into the folders of this one, and those that are empty then."""
        for name, own in _OWN.items():
            place = self.path / name
            earlier = [path for path in _listed(place) if path.is_dir() and EARLIER.fullmatch(path.name)]
            for folder in [*earlier, place] if name else []:
                for path in _listed(folder):
                    if own.fullmatch(path.name) and not path.is_dir():
                        path.unlink()
                with suppress(OSError):  # something of somebody else is left in it
                    folder.rmdir()

    def _cut(self, found: Checkpoint) -> None:
        """Forget what came after a checkpoint: it is about to happen again."""
        step = found.state.step
        kept = [line for line in self.metrics() if line["step"] <= step]
        if len(kept) < found.lines:
            count = found.lines - len(kept)
            self.lost.append(f"{self._metrics}: {count} of {found.lines} measurements up to step {step} are lost")
        write_bytes(self._metrics, b"".join(map(checksums.sealed_line, kept)))
        self.lines = len(kept)
        told = {line["step"]: line["held_out_loss"] for line in kept if "held_out_loss" in line}
        self.held_out = told if found.measured is None else dict(found.measured)
        with explained(self.path):
            for later, path in [*self._files().items(), *self._adapters().items()]:
                if later > step:
                    path.unlink()  # damaged, or it would have been the newest

    def _check_begun(self) -> None:
        """Raise UserError where there are checkpoints, of which none could be read."""
        count = len(self._files())
        if count:
            are = "checkpoints are" if count > 1 else "checkpoint is"
            raise UserError(
                f"{count} {are} in {self._checkpoints} and none can be read (damaged, or of another version);"
                " --overwrite starts anew"
            )

    def _check_settings(self, changed: Sequence[str]) -> None:
        """Raise UserError for settings that are not those of the run."""
        if changed:
            raise UserError(f"the run in {self.path} had other settings: {'; '.join(changed)}{_ANEW}")

    def _check_length(self, found: Checkpoint, steps: int) -> None:
        """Raise UserError where the run has gone further than it shall."""
        if steps < found.state.step:
            raise UserError(f"--steps {steps}: the run in {self.path} is at step {found.state.step} already")

    def _changed(self, items: Sequence[dict[str, str]]) -> str:
        """Which items are not what ``data.json`` says."""
        try:
            old = [json_value(line) for line in (self.path / run_record.DATA).read_text("utf-8").split("\n") if line]
            before = {one["name"]: one for one in old}
        except (OSError, ValueError, KeyError, TypeError):
            return "which ones cannot be told, data.json is gone"
        now = {one["name"]: one for one in items}
        lines = [f"{name} is gone" for name in before if name not in now]
        lines += [f"{name} is new" for name in now if name not in before]
        both = [name for name in now if name in before]
        for entry, words in _ENTRIES.items():
            lines += [f"{name} has {words}" for name in both if now[name].get(entry) != before[name].get(entry)]
        return ", ".join(lines[:3] or ["their order changed"]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")


def check_run(run: RunFolder, output: Path, *, resume: bool, overwrite: bool) -> None:
    """See that the run and its adapter file can be written where they shall go.

    Args:
        run: The run folder.
        output: The adapter file.
        resume: Whether a run there goes on.
        overwrite: Whether what is there may be replaced.

    Raises:
        UserError: They cannot.
    """
    run.check()
    if resume and not run.holds_a_run():
        raise UserError(f"there is no run in {run.path} to go on with; leave out --resume, or name it with --run-dir")
    if not resume and not overwrite and run.holds_a_run():
        raise UserError(f"{run.path} holds a run already: --resume goes on with it, --overwrite starts anew")
    check_output(output, overwrite=resume or overwrite)
    for place in filter(None, _OWN):
        if lies_in(output, run.path / place):
            raise UserError(f"--output {output} lies in {run.path / place}, where the run keeps its own; name another place")
    for folder in (output.parent, run.path):
        check_writable(folder)


def check_output(output: Path, *, overwrite: bool) -> None:
    """See that an adapter file can be made where it shall be.

    Args:
        output: The file.
        overwrite: Whether what is there may be replaced.

    Raises:
        UserError: It cannot.
    """
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already: --overwrite replaces it, another --output keeps it")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it")
    if output.exists() and not output.is_file():
        raise UserError(f"--output {output} is no regular file, so it cannot be replaced; choose another name")


def check_writable(folder: Path) -> None:
    """See that a file can be made in a folder, or in the nearest one above it that is there.

    Args:
        folder: The folder.

    Raises:
        UserError: It cannot.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    probe = there / f".peft_diffusion.{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{there} cannot be written to: {error.strerror}; choose another place") from None


def _used(told: Mapping[str, Any]) -> str:
    """An adapter that a run has on its base, in words."""
    return f"{told['file']}={told['strength']:g}" if "strength" in told else str(told["file"])


def _listed(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _read(path: Path) -> bytes | None:
    """What is in a file; None where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _json_lines(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
