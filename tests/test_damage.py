"""Bits that a disk or a copy changed in what a run wrote for itself, and folders that a full disk left half made."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_again, make_pipe
from safetensors.torch import load_file, save
from test_training import draw_pictures, small, warnings_but_counsel

from peft_diffusion.api import train
from peft_diffusion.core import checksums, files
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event
from peft_diffusion.training.events import Step
from peft_diffusion.training.record import checkpoint, run_folder
from peft_diffusion.training.record.run_record import Record, measurements

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")]

torch.set_num_threads(1)

RUN: dict[str, Any] = {"scheduler": "constant", "held_out": 0.2, "log_every": 1, "preview_prompts": ("a cat",)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("damage") / "pictures")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The folder of a run of six steps, with its adapter beside it."""
    where = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        draw_again(patched)
        train(small(pictures, where, preview_steps=1, **RUN), pipe=make_pipe())
    return where


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pictures: Path, made: Path) -> tuple[Any, ...]:
    """What the run comes to when it goes on for one step."""
    where = shutil.copytree(made, tmp_path_factory.mktemp("undisturbed") / "here")
    said = gone_on(pictures, where)
    assert not said
    return outcome(where)


def gone_on(pictures: Path, where: Path) -> list[str]:
    """Go on with a run for a step; the warnings."""
    events: list[Event] = []
    config = small(pictures, where, steps=7, resume=True, preview_steps=1, **RUN)
    train(config, pipe=make_pipe(), observers=[events.append])
    return warnings_but_counsel(events)


def outcome(where: Path) -> tuple[Any, ...]:
    """The adapter, the metrics without their times, and the previews."""
    lines, damaged = measurements(where / "run" / "metrics.jsonl")
    assert not damaged
    kept = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    previews = {path.name: path.read_bytes() for path in (where / "run" / "previews").glob("*_0.png")}
    thumbnails = {path.name: path.read_bytes() for path in (where / "run" / "thumbnails").iterdir()}
    return {name: tensor.tolist() for name, tensor in load_file(where / "a.safetensors").items()}, kept, previews, thumbnails


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


ENTRIES = {"state", "command", "version", "process", "settings", "plugins", "derived", "about", "defaults", "figures"}
SAID = {
    "checkpoints/step_000006.safetensors": "is damaged, and deleted; the run goes on from the checkpoint of step 3",
    "metrics.jsonl": "metrics.jsonl: damaged, and left out, line 1",
    "run.json": "run.json is damaged, and left out",
    "config.toml": "config.toml is not as the run wrote it: edited, or damaged",
    "data.json": "data.json was damaged or edited, and is written anew",
    "previews/base_0.png": "base_0.png is damaged, and deleted",
    "previews/step_000006_0.png": "step_000006_0.png is damaged, and deleted",
}


@pytest.mark.parametrize(
    ("names", "same"),
    [
        (("run.json", "config.toml", "data.json", "previews/base_0.png", "thumbnails/000000.webp", "previews/sheet.png",
          "loss.png", "signals.png", "report.html"), True),
        (("metrics.jsonl", "previews/step_000006_0.png"), False),
        (("checkpoints/step_000006.safetensors",), False),  # what was measured at the end of the shorter run is not again
    ],
    ids=["whole", "measured", "checkpoint"],
)  # fmt: skip
def test_a_bit_that_changed_in_each_file_of_a_run_is_made_good_or_told(
    names: tuple[str, ...], same: bool, tmp_path: Path, pictures: Path, made: Path, undisturbed: tuple[Any, ...]
) -> None:
    place = shutil.copytree(made, tmp_path / "here")
    for name in names:
        path = place / "run" / name
        flip(path, (path.stat().st_size // 2 if name != "metrics.jsonl" else 10) * 8 + 2)
    warnings = gone_on(pictures, place)
    expected = [SAID[name] for name in names if name in SAID]
    assert len(warnings) == len(expected), warnings
    assert all(any(words in warning for warning in warnings) for words in expected), warnings
    adapter, lines, previews, thumbnails = outcome(place)
    assert adapter == undisturbed[0] and thumbnails == undisturbed[3]
    assert same == (lines == undisturbed[1] and previews == undisturbed[2])


def test_any_bit_of_a_checkpoint_is_seen(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(made / "run" / "checkpoints" / "step_000006.safetensors", tmp_path))
    whole = path.read_bytes()
    told = checkpoint.read(path)
    assert told is not None

    def content(one: checkpoint.Checkpoint) -> tuple[Any, ...]:
        state = one.state
        tensors = {name: (tensor.dtype, tensor.tolist()) for name, tensor in state.tensors.items()}
        return state.step, tensors, state.divergence, one.origin, one.held_out, one.seconds, one.measured, one.lines

    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(3)
    bits = [chance.randrange(8 * header) for _ in range(150)] + [chance.randrange(8 * len(whole)) for _ in range(150)]
    seen = 0
    for bit in bits:
        path.write_bytes(whole)
        flip(path, bit)
        found = checkpoint.read(path)
        seen += found is None
        assert found is None or content(found) == content(told), bit
    assert seen > 250


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("metrics.jsonl", lambda record: record.metrics),
        ("run.json", lambda record: {key: record.facts.get(key) for key in record.facts if key in ENTRIES}),
        ("config.toml", lambda record: record.explicit),
    ],
)
def test_any_bit_of_a_record_is_seen(name: str, read: Callable[[Record], Any], made: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    whole = (made / "run" / name).read_bytes()
    (tmp_path / "config.toml").write_bytes((made / "run" / "config.toml").read_bytes())  # without it, that is told
    path.write_bytes(whole)
    told = read(Record(tmp_path))
    assert told and not Record(tmp_path).damage
    chance = random.Random(4)
    seen = 0
    for bit in [8 * len(whole) - 8 + n for n in range(8)] + [chance.randrange(8 * len(whole)) for _ in range(300)]:
        path.write_bytes(whole)
        flip(path, bit)
        record = Record(tmp_path)
        if record.damage:
            seen += 1
            continue
        try:  # where only the name of the checksum changed, the rest is whole
            assert read(record) == told, bit
        except UserError as error:
            assert f"{path} cannot be read" in str(error)
    assert seen > 200


def test_a_best_checkpoint_that_is_damaged_is_named_and_the_next_best_is_taken(made: Path, tmp_path: Path) -> None:
    run = run_folder.RunFolder(shutil.copytree(made / "run", tmp_path / "run"))
    step, tensors, lost = run.best({0: 9.0, 3: 1.0, 6: 2.0}, 7)
    assert step == 3 and tensors and lost is None
    flip(tmp_path / "run" / "checkpoints" / "step_000003.safetensors", -8 % 8 + 8 * 5000)
    step, tensors, lost = run.best({0: 9.0, 3: 1.0, 6: 2.0}, 7)
    assert step == 6 and tensors and lost is not None and "step_000003.safetensors, of the lowest loss" in lost
    assert run.best({0: 9.0, 3: 1.0, 7: 2.0}, 7)[:2] == (7, {})


def test_a_run_of_a_version_without_checksums_goes_on(
    made: Path, tmp_path: Path, pictures: Path, undisturbed: tuple[Any, ...]
) -> None:
    place = shutil.copytree(made, tmp_path / "here")
    run = place / "run"
    for path in (run / "checkpoints").iterdir():
        found = checkpoint.read(path)
        assert found is not None
        told = {
            "step": found.state.step, "divergence": asdict(found.state.divergence), "origin": asdict(found.origin),
            "held_out": found.held_out, "seconds": found.seconds,
        }  # fmt: skip
        data = save(found.state.tensors, {"peft_diffusion_checkpoint_2": json.dumps(told)})
        path.write_bytes(data)
    lines = measurements(run / "metrics.jsonl")[0]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = checksums.opened(json.loads((run / "run.json").read_text()))
    (run / "run.json").write_text(json.dumps(facts))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text("".join(line for line in config.splitlines(True) if "SHA-256" not in line))
    assert gone_on(pictures, place) == []
    assert outcome(place) == undisturbed


@pytest.mark.parametrize("number", (1, 3, 5))
def test_a_disk_that_is_full_at_any_file_leaves_a_folder_that_a_run_can_begin_in(
    number: int, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the first run came: the files before this one were written, and no more."""
    written = 0
    write = files.write_bytes

    def full(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > number:
            raise UserError(f"{path} cannot be written: No space left on device")
        write(path, data)

    config = small(pictures, tmp_path, steps=1, save_every=1)
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_bytes", full)
        patched.setattr(checkpoint, "write_bytes", full)
        with pytest.raises(UserError, match="No space left"):
            train(config, pipe=make_pipe())
    run = run_folder.RunFolder(tmp_path / "run")
    run.check()
    resume = {"resume": True} if run.holds_a_run() else {"overwrite": True}
    assert train(small(pictures, tmp_path, steps=1, save_every=1, **resume), pipe=make_pipe()).steps == 1


def test_of_two_runs_at_once_with_one_output_the_second_is_refused(tmp_path: Path, pictures: Path) -> None:
    """The first is in its first step when the second begins, by another name of the same folder."""
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    output, refused = tmp_path / "new" / "a.safetensors", []
    second = small(pictures, tmp_path / "second", output=tmp_path / "up" / "new" / "a.safetensors", overwrite=True)

    def begin_another(event: Event) -> None:
        if isinstance(event, Step) and event.step == 1:
            with pytest.raises(UserError, match=r"another run makes .*a\.safetensors now; .* choose another --output"):
                train(second, pipe=make_pipe())
            refused.append(not (tmp_path / "second").exists())

    train(small(pictures, tmp_path, output=output, steps=1), pipe=make_pipe(), observers=[begin_another])
    assert refused == [True]
    assert [path.name for path in output.parent.iterdir()] == ["a.safetensors"], "no lock is left"
    train(replace(second, steps=1), pipe=make_pipe())


def test_a_lock_of_a_process_that_was_killed_is_none(tmp_path: Path) -> None:
    script = "import sys, os, signal, pathlib; from peft_diffusion.core.files import claimed\n"
    script += "with claimed(pathlib.Path(sys.argv[1]), 'taken'):\n print(flush=True); input()"
    path = tmp_path / "new" / "a.safetensors"
    with subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match="taken"), files.claimed(path, "taken"):
            pass
        other.kill()
    with files.claimed(path, "taken"):
        assert path.with_name(".a.safetensors.lock").exists()
    assert not list(path.parent.iterdir())
    with files.claimed(tmp_path / "none" / "a", "taken"):
        pass
    assert not (tmp_path / "none").exists(), "nothing came of it"
