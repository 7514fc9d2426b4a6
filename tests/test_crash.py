"""What a crash leaves: processes that are killed at any moment, files half written, disks and caches that fail."""

import builtins
import errno
import io
import json
import math
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_again, draw_copies, draw_nothing, leave_signals, make_pipe, measure_little
from forked import ASKING, POSSIBLE, alive, begin
from rich.console import Console
from safetensors.torch import load_file
from test_training import draw_pictures, small, warnings_but_counsel

from peft_diffusion.api import train
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event
from peft_diffusion.training.record import checkpoint
from peft_diffusion.training.record.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")]

KILLS, FULL, SEED = 8, 8, 7  # two kills a step

# What carries state from step to step; and checkpoints often enough that moments lie within one.
RUN = {"steps": 4, "save_every": 2, "log_every": 1, "ema": 0.9, "scheduler": "cosine", "held_out": 0.2, "dropout": 0.2}


def learn(pictures: Path, where: Path, resume: bool) -> None:
    """A process's whole life."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        measure_little(patched)
        leave_signals(patched)
        draw_nothing(patched)
        train(small(pictures, where, resume=resume, overwrite=not resume, **RUN), pipe=make_pipe())


def written(where: Path) -> int:
    """The lines of metrics that a run has come to."""
    path = where / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def live(pictures: Path, where: Path, resume: bool, until: tuple[int, float] | None = None) -> bool:
    """Train in a process of its own; whether it ended by itself.

    ``until`` kills it once it has written so many lines of metrics, and so many seconds have gone by: by how far it came,
    and not by the clock alone, which says nothing of that on a machine that has other work.
    """
    process = begin(learn, pictures, where, resume)
    while until and alive(process) and written(where) < until[0]:
        time.sleep(0.01)
    end = time.monotonic() + (until[1] if until else math.inf)
    while alive(process) and time.monotonic() < end:
        time.sleep(0.01)
    with ASKING:
        process.kill()
        process.join()
    assert process.exitcode in ((0,) if until is None else (0, -signal.SIGKILL))
    return process.exitcode == 0


def outcome(where: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, Any]]]:
    """All that a run leaves but times: the adapter, the last checkpoint, and the metrics."""
    lines = [json.loads(line) for line in (where / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["crc32"]
    last = checkpoint.read(max((where / "run" / "checkpoints").glob("step_*.safetensors")))
    assert last is not None
    return load_file(where / "a.safetensors"), last.state.tensors, lines


def assert_same(one: Path, other: Path) -> None:
    for first, second in zip(outcome(one)[:2], outcome(other)[:2], strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert outcome(one)[2] == outcome(other)[2]


@pytest.mark.skipif(not POSSIBLE, reason="processes of POSIX")
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    begin(time.sleep, 0).join()  # the server imports what it shall
    began = time.monotonic()
    live(pictures, tmp_path / "whole", resume=False)
    whole = time.monotonic() - began
    chance = random.Random(SEED)
    lines = written(tmp_path / "whole")
    moments = [(number * lines // KILLS, chance.uniform(0, 0.15) * whole) for number in range(KILLS)]

    def killed_and_resumed(number: int) -> tuple[bool, int]:
        """Whether it was killed in time, and the lines that it had written by then."""
        where = tmp_path / str(number)
        cut = not live(pictures, where, resume=False, until=moments[number])
        begun = (where / "run" / "config.toml").exists()
        come_to = written(where)
        live(pictures, where, resume=begun)
        assert_same(tmp_path / "whole", where)
        assert not [path for path in where.rglob(".*") if path.is_file()], "what was written aside goes"
        return cut, come_to

    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(killed_and_resumed, range(KILLS)))
    assert sum(cut for cut, _ in seen) > KILLS // 2 and len({lines for _, lines in seen}) > 4, "they were all over the run"


def test_what_a_killed_run_was_writing_goes_when_it_goes_on(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    train(small(pictures, tmp_path), pipe=make_pipe())
    half = [tmp_path / "run" / ".config.toml.123", tmp_path / "run" / "checkpoints" / ".step_000006.safetensors.4567"]
    half.append(tmp_path / ".a.safetensors.89")  # beside what it makes
    own, others = tmp_path / "run" / ".notes", tmp_path / ".b.safetensors.89"
    for path in (*half, own, others):
        path.write_bytes(b"half")
    train(small(pictures, tmp_path, steps=7, resume=True), pipe=make_pipe())
    assert own.exists() and others.exists() and not any(path.exists() for path in half)


class Disk:
    """A disk with room for so many bytes more, for all that Python writes below a folder; cut short as a real one cuts."""

    def __init__(self, folder: Path, room: float) -> None:
        self.folder = str(folder)
        self.room = room
        self.taken = 0

    def open(self, file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        """``open``, with files below the folder that end where the disk is full."""
        ours = isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(self.folder)
        if not ours or not set(mode) & set("wax+"):
            return OPEN(file, mode, *more, **named)
        raw = _Limited(self, file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, named.get("encoding"))

    def sync(self, number: int) -> None:
        """``os.fsync``, which tells of a disk that is full where others wrote."""
        self.take(0 if self.taken < self.room else 1)
        SYNC(number)

    def take(self, size: int) -> int:
        """How many of so many bytes there is room for, at least one."""
        given = int(min(size, self.room - self.taken))
        if size and given <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.taken += given
        return given


class _Limited(io.FileIO):
    def __init__(self, disk: Disk, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self.disk = disk

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        return super().write(view[: self.disk.take(len(view))])


OPEN, SYNC = io.open, os.fsync
SHORT = RUN | {"steps": 2, "save_every": 1, "preview_steps": 1, "preview_prompts": ("a cat",)}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """Pictures, where a run on them lies that nothing disturbed, and the bytes that it wrote."""
    pictures = draw_pictures(tmp_path_factory.mktemp("pictures") / "pictures", 3)
    where = tmp_path_factory.mktemp("whole")
    disk = Disk(where, math.inf)
    with pytest.MonkeyPatch.context() as patched:
        mount(patched, disk)
        draw_again(patched)
        train(small(pictures, where, **SHORT), pipe=make_pipe())
    assert disk.taken > 100_000
    return pictures, where, disk.taken


def mount(patched: pytest.MonkeyPatch, disk: Disk) -> None:
    """Let everything below the folder of a disk be written to it."""
    for module in (io, builtins):
        patched.setattr(module, "open", disk.open)
    patched.setattr(os, "fsync", disk.sync)


@pytest.mark.parametrize("moment", range(FULL))
def test_a_run_that_met_a_full_disk_at_any_moment_goes_on_to_the_same_bytes(
    moment: int, short: tuple[Path, Path, int], tmp_path: Path
) -> None:
    pictures, whole, size = short
    with pytest.MonkeyPatch.context() as patched:
        draw_copies(patched, whole / "run")
        mount(patched, Disk(tmp_path, random.Random(moment).uniform(moment, moment + 1) / FULL * size))
        with pytest.raises(UserError, match=f"{tmp_path}.*cannot be written: No space left on device; free space"):
            train(small(pictures, tmp_path, **SHORT), pipe=make_pipe())
    adapter = tmp_path / "a.safetensors"
    if adapter.exists():  # the report after it did not fit
        assert_same(whole, tmp_path)
    begun = RunFolder(tmp_path / "run").holds_a_run()
    told: list[Event] = []
    config = small(pictures, tmp_path, resume=begun, overwrite=not begun, **SHORT)
    train(config, pipe=make_pipe(), observers=[told.append])
    assert not warnings_but_counsel(told), "nothing was lost"
    assert_same(whole, tmp_path)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()], "what was written aside goes"


def test_a_cache_that_is_damaged_or_of_another_vae_is_named_and_changes_nothing(tmp_path: Path) -> None:
    pictures, cache = draw_pictures(tmp_path / "pictures"), tmp_path / "cache"

    def run(name: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], str]:
        said = Console(record=True, width=1000, file=(tmp_path / "log").open("w"))
        config = small(pictures, tmp_path / name, cache=cache, steps=2)
        result = train(config, pipe=make_pipe(seed), observers=[TrainingConsole(said)])
        return load_file(result.output), said.export_text()

    first, told = run("first")
    assert f"{cache}: 0 of 6 latents were there\n" in told
    again, told = run("again")
    assert f"{cache}: 6 of 6 latents were there\n" in told
    for path in sorted(cache.iterdir())[:2]:
        path.write_bytes(path.read_bytes()[:-8])
    mended, told = run("mended")
    assert f"warning: 2 latents in {cache} were damaged, and are made again" in told
    for other in (again, mended):
        assert all(torch.equal(first[name], other[name]) for name in first)
    _, told = run("other", seed=3)
    assert f"{cache}: 0 of 6 latents were there; the 6 that it held are of other pictures" in told
    assert len(list(cache.iterdir())) == 12
