"""What a run folder tells, read back for the report and for ``runs``. Imports no torch."""

import math
import os
import re
import socket
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ...core import checksums
from ...core.errors import UserError
from ...core.parsing import json_value, number, refusing
from ...core.settings import settings_of
from ..settings.composing import ComposeTrainConfig
from ..settings.pictures import TrainConfig
from ..settings.text import TextTrainConfig
from .measurements import memorisation

State: TypeAlias = Literal["running", "finished", "stopped", "failed"]

FACTS = "run.json"
CONFIG = "config.toml"
METRICS = "metrics.jsonl"
HEADER = "# peft-diffusion "
"""How a ``config.toml`` of ours begins."""
DATA = "data.json"
THUMBNAILS = "thumbnails"
PREVIEWS = "previews"
PREVIEW = re.compile(r"(?:step_(\d+)|base)_(\d+)\.png")
"""The name of a preview: its step, none for the base's own, and the number of its prompt."""

_SHOWN = 48  # items of a report
_STEPS = 2**53  # beyond which a float holds no step
_MOST = 3.5e38  # more than float32 holds, in which everything is measured
_TABLES = frozenset(("lr", "changes"))  # the entries of a line of metrics that are no numbers
_KINDS: dict[str, type] = {
    "process": dict, "figures": dict, "about": dict, "settings": dict, "derived": dict, "defaults": dict, "commands": dict,
    "warnings": list, "said": list, "prompts": list,
}  # fmt: skip

Curve: TypeAlias = list[tuple[int, float]]
"""Values by step, in order."""


@dataclass(frozen=True)
class Record:
    """A run folder, read once. Whatever is missing or was cut short by a crash is left out."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.path.resolve().name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """``run.json``: what was found and what came of it; empty for a run of an older version.

        What is not of the kind that it should be is left out, and all of it where it is not what the run wrote.
        """
        return {name: value for name, value in (self._facts or {}).items() if isinstance(value, _KINDS.get(name, object))}

    @cached_property
    def _facts(self) -> dict[str, Any] | None:
        """``run.json``; None where it is damaged."""
        try:
            found = json_value((self.path / FACTS).read_text("utf-8", errors="replace"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            return None
        return checksums.opened(found) if isinstance(found, dict) else None

    @property
    def is_run(self) -> bool:
        """Whether a run wrote here, as far as its files tell."""
        config, metrics = self.path / CONFIG, self.path / METRICS
        try:
            with config.open("rb") as file:
                begins = file.read(len(HEADER)) == HEADER.encode()
        except OSError:
            begins = False
        told = {"state", "command", "version"} <= self.facts.keys()
        return begins or told or (config.exists() and metrics.exists()) or has_checksums(metrics)

    @property
    def damage(self) -> list[str]:
        """What of ``run.json``, ``config.toml`` and ``metrics.jsonl`` is not what the run wrote, in words."""
        found = [f"{FACTS} is damaged, and left out"] if self._facts is None else []
        try:
            if not checksums.is_as_written((self.path / CONFIG).read_text("utf-8", errors="replace")):
                found.append(f"{CONFIG} is not as the run wrote it: edited, or damaged")
        except FileNotFoundError:
            found += [f"{CONFIG} is gone"] if self.is_run else []
        except OSError as error:
            found.append(f"{CONFIG} cannot be read: {error.strerror}")
        numbers = self._metrics[1]
        return found + ([_damaged_lines(numbers)] if numbers else [])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings: those of ``config.toml``, and with them what was derived.

        Raises:
            UserError: The file is no TOML.
        """
        settings, derived = self.facts.get("settings", {}), self.facts.get("derived", {})
        known = settings | self.explicit | {name: value for name, value in settings.items() if name in derived}
        return {name: value for name, value in known.items() if value is not None}

    @cached_property
    def explicit(self) -> dict[str, Any]:
        """The settings of ``config.toml``: what was chosen, without what was derived.

        Raises:
            UserError: The file is no TOML.
        """
        with refusing(f"{self.path / CONFIG} cannot be read as the settings of a run"):
            return tomllib.loads((self.path / CONFIG).read_text("utf-8-sig"))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` that tell of a step."""
        return self._metrics[0]

    @cached_property
    def _metrics(self) -> tuple[list[dict[str, Any]], list[int]]:
        return measurements(self.path / METRICS)

    @cached_property
    def data(self) -> list[dict[str, Any]]:
        """What was learned from: a name for each item, and for pictures the caption."""
        return list(json_lines(self.path / DATA))

    @property
    def state(self) -> State:
        """How the run stands. One that says it is running, but whose process is gone, was stopped."""
        state: State = next((state for state in get_args(State) if state == self.facts.get("state")), "stopped")
        process = self.facts.get("process", {})
        if state == "running" and process.get("host") == socket.gethostname() and not _alive(process):
            return "stopped"
        return state

    @property
    def other_process(self) -> int | None:
        """The id of another process on this machine that trains into this folder now; None where none is known to."""
        process = self.facts.get("process", {})
        pid = process.get("pid")
        here = process.get("host") == socket.gethostname() and os.name != "nt"  # where nothing tells whether it lives
        running = here and isinstance(pid, int) and pid != os.getpid() and self.state == "running"
        return pid if running else None

    @property
    def command(self) -> str:
        """The command that made it."""
        return str(self.facts.get("command") or ("text train" if "texts" in self.config else "train"))

    @property
    def plugins(self) -> list[str]:
        """The modules of plug-ins that it was trained with."""
        found = self.facts.get("plugins", [])
        return list(map(str, found)) if isinstance(found, list) else []

    @property
    def step(self) -> int:
        """The steps done, as far as the losses tell."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def seconds(self) -> float | None:
        """Seconds trained."""
        return max((line["seconds"] for line in self.metrics if "seconds" in line), default=None)

    def curve(self, name: str) -> Curve:
        """Read an entry of the metrics by step.

        Args:
            name: The entry.

        Returns:
            Steps and values.
        """
        return sorted((line["step"], float(line[name])) for line in self.metrics if name in line)

    @property
    def unseen(self) -> Curve:
        """The loss on what is kept apart."""
        return self.curve("held_out_loss")

    @property
    def before(self) -> float | None:
        """That loss before the first step."""
        return dict(self.unseen).get(0)

    @property
    def after(self) -> float | None:
        """That loss of the weights that were written, or of the last measurement so far."""
        unseen, kept = dict(self.unseen), self.figures.get("kept_step")
        return unseen.get(kept if isinstance(kept, int) else -1) or unseen.get(max(unseen, default=-1))

    @property
    def memorised(self) -> Curve:
        """How much further the loss fell on what is trained on than on what is not, as a share of the latter (0 is none)."""
        seen, unseen = dict(self.curve("seen_loss")), dict(self.unseen)
        if not seen.get(0) or not unseen.get(0):
            return []
        both = (step for step in seen if unseen.get(step))
        return [(step, memorisation((seen[0], unseen[0]), (seen[step], unseen[step]))) for step in both]

    @property
    def nearest(self) -> Curve:
        """How near the previews are to training pictures, over how near those are to one another."""
        return self.curve("preview_nearest")

    @property
    def changes(self) -> dict[str, float]:
        """How far each layer moved at the last measurement, largest first."""
        found: Mapping[str, Any] = next((line["changes"] for line in reversed(self.metrics) if line.get("changes")), {})
        numbers = {layer: float(change) for layer, change in found.items() if _is_number(change)}
        return dict(sorted(numbers.items(), key=lambda item: -item[1]))

    @property
    def figures(self) -> Mapping[str, Any]:
        """What came of it: see `RunFolder.note`."""
        found: Mapping[str, Any] = self.facts.get("figures", {})
        return found

    @property
    def method(self) -> str:
        """The method, or those of its blocks; of a run that weighs adapters, what it learns of them."""
        texts = self.config.get("block", ())
        given = [text.split() for text in texts if isinstance(text, str)] if isinstance(texts, (list, tuple)) else []
        blocks = [words[2] for words in given if len(words) > 2]
        return " + ".join(dict.fromkeys(blocks)) or str(self.config.get("method", self.config.get("kind", "?")))

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The settings that were chosen otherwise than the preset has them, each with what the preset says.

        What was derived from others is none of them, such as how often a short run saves.
        """
        defaults, derived = self.facts.get("defaults", {}), self.facts.get("derived", {})
        own = {name: value for name, value in self.config.items() if name not in derived or name in self.explicit}
        return {name: (own[name], value) for name, value in defaults.items() if name in own and own[name] != value}


def find(folder: Path) -> list[Record]:
    """Find the runs in a folder and below it; the folder itself, if it is one.

    Args:
        folder: The folder.

    Returns:
        The runs by path.

    Raises:
        UserError: There is none.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name one that holds run folders, which train makes in runs/")
    if (own := Record(folder)).is_run:
        return [own]
    # Any of the three, as a damaged run may lack others.
    places = {path.parent for path in folder.rglob("*.*") if path.name in (CONFIG, FACTS, METRICS)}
    found = [record for path in sorted(places) if (record := Record(path)).is_run]
    if not found:
        raise UserError(f"there is no run in {folder}; train makes them in runs/, or where --run-dir says")
    return found


def only(folder: Path) -> Record:
    """Read the run of a folder.

    Args:
        folder: The run folder.

    Returns:
        The run.

    Raises:
        UserError: It is none.
    """
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is no run folder: it has no {CONFIG}; `peft-diffusion runs` lists those that there are")
    return Record(folder)


def differing(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Compare the settings of runs; places are left out.

    Args:
        records: The runs.

    Returns:
        The values of each setting that is not the same in all.
    """
    names = list(dict.fromkeys(name for record in records for name in record.config))
    values = {name: [record.config.get(name) for record in records] for name in names if name not in PLACES}
    return {name: own for name, own in values.items() if any(value != own[0] for value in own)}


def shown(count: int) -> list[int]:
    """Choose which of many items a report shows.

    Args:
        count: How many there are.

    Returns:
        All of a few, else some from all over.
    """
    return list(range(count)) if count <= _SHOWN else [round(n * (count - 1) / (_SHOWN - 1)) for n in range(_SHOWN)]


_SETTINGS = {one.name: one for kind in (ComposeTrainConfig, TrainConfig, TextTrainConfig) for one in settings_of(kind)}
PLACES = frozenset(name for name, one in _SETTINGS.items() if one.setting.place)
"""Settings that say where things lie, and nothing of what is learned."""
PATHS = frozenset(name for name, one in _SETTINGS.items() if one.single is Path)
"""Settings that are paths."""


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file with a JSON object on each line, up to the first that cannot be read.

    Args:
        path: The file; need not exist.

    Yields:
        The objects.
    """
    try:
        lines = path.read_text("utf-8", errors="replace").split("\n")
    except OSError:
        return
    for line in lines:
        try:
            found = json_value(line)
        except ValueError:
            return
        if isinstance(found, dict):
            yield found


def measurements(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a ``metrics.jsonl``.

    Args:
        path: The file; need not exist.

    Returns:
        The objects that tell of a step, and the numbers of the lines, from 1 on, that are not what was written. A last line
        that was cut short by a crash is none of either.
    """
    try:
        *whole, last = path.read_bytes().split(b"\n")
    except OSError:
        return [], []
    opened = [checksums.opened_line(line) for line in whole]
    have = any(sound for _, sound in opened)  # of an older version, no line has a checksum
    found, damaged = [], []
    for place, (body, sound) in enumerate(opened, 1):
        line = _object(body) if sound or (sound is None and not have) else None
        if line is None:
            damaged.append(place)
        else:
            found.append(line)
    if last:
        body, sound = checksums.opened_line(last)
        line = _object(body) if sound is None and not have else None  # written by hand, without an end
        if line is not None:
            found.append(line)
        elif sound is not None:  # it was whole, and its end is damaged
            damaged.append(len(whole) + 1)
    return [_entries(line) for line in found if _is_step(line.get("step"))], damaged


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _STEPS


def _entries(line: Mapping[str, Any]) -> dict[str, Any]:
    """What in a line of metrics is of the kind that runs write, which all who read the line may rely on."""
    right = {name: isinstance(value, dict) if name in _TABLES else _is_number(value) for name, value in line.items()}
    return {name: value for name, value in line.items() if right[name]}  # in their order, which the checksum is of


def has_checksums(path: Path) -> bool:
    """Tell whether a run wrote a ``metrics.jsonl``: it has a line with the checksum of ours.

    Args:
        path: The file; need not exist.

    Returns:
        Whether it has.
    """
    try:
        return any(checksums.opened_line(line)[1] for line in path.read_bytes().split(b"\n"))
    except OSError:
        return False


def _damaged_lines(numbers: Sequence[int]) -> str:
    """Name lines of the metrics that are damaged."""
    which = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"{METRICS}: damaged, and left out, line{'s' * (len(numbers) > 1)} {which}"


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None where there is none."""
    try:
        found = json_value(line.decode("utf-8", errors="replace"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def this_process() -> dict[str, Any]:
    """What tells this process from all others, as ``run.json`` holds it."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def _is_number(value: Any) -> bool:
    """Whether it may be a measurement: within float32, or NaN or infinite as those of a run that diverged."""
    found = number(value)
    return found is not None and (abs(found) < _MOST or (isinstance(value, float) and not math.isfinite(value)))


def _alive(process: Mapping[str, Any]) -> bool:
    """Whether there is such a process here; where that cannot be told, it is taken for alive."""
    pid = process.get("pid")
    if not isinstance(pid, int) or pid <= 0 or os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is another user's
    began, now = process.get("began"), _began(pid)
    return now != 0 and (began is None or now is None or began == now)


def _began(pid: int) -> int | None:
    """When a process began, in the system's own unit: ids are given anew. 0 for one that ended; None if nothing tells."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
        return 0 if words[0] in ("Z", "X") else int(words[19])
    except (OSError, ValueError, IndexError):
        return None
