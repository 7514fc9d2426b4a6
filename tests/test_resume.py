"""Interrupted runs: whatever ends them, the resumed run gives the bits of one that was never interrupted."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import make_pipe
from little import SIGNALS
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_settings import asked
from test_training import draw_pictures, lines, small, state_of

from peft_diffusion.api import train
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event
from peft_diffusion.training import Dataset, Interrupted
from peft_diffusion.training.events import Step
from peft_diffusion.training.loop.trainer import Trainer
from peft_diffusion.training.record import checkpoint
from peft_diffusion.training.results import RunResult
from peft_diffusion.training.tasks.diffusion import DiffusionTask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")]

torch.set_num_threads(1)

# Everything at once that draws chance or carries state.
EVERYTHING = {
    "accumulation": 2, "ema": 0.9, "components": ("unet", "text_encoder"), "min_snr_gamma": 5.0, "shuffle_tags": True,
    "caption_dropout": 0.3, "noise_offset": 0.05, "dropout": 0.2, "flip": True, "scheduler": "cosine",
    "warmup": 2, "held_out": 0.2,
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = draw_pictures(tmp_path / "pictures")
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"ink, red {number}, apple, flat", "utf-8")
    return folder


class StopAfter:
    """Sends a real SIGINT to this process after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step) and event.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    run = Trainer.run

    def watched(self: Trainer, until: int | None = None, **stop: Any) -> bool:
        self.observers.append(StopAfter(step))
        return run(self, until, **stop)

    monkeypatch.setattr(Trainer, "run", watched)


def without_time(result: RunResult) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "crc32")} for line in lines(result)]


def same_file(one: Path, two: Path) -> bool:
    first, second = load_file(one), load_file(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    if changes:  # the same pictures again, in other sizes and with other captions
        again = Dataset(pictures, repeats=2, resolution=(32, 48), flip=False, trigger="hat", crops=2, tag_dropout=0.3)
        changes = changes | {"dataset": again}
    changes = {"held_out": None} | changes | {"steps": 4, "save_every": 2}
    whole = train(small(pictures, tmp_path / "whole", **changes), pipe=make_pipe())
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Interrupted, match=r"stopped after step 3 of 4; go on with: .* --config .* --resume"):
            train(small(pictures, tmp_path / "cut", **changes), pipe=make_pipe())
    assert not (tmp_path / "cut" / "a.safetensors").exists()
    torch.manual_seed(99)
    read, plain = list[str](), checkpoint.read

    def counted(path: Path) -> checkpoint.Checkpoint | None:
        read.append(path.name)
        return plain(path)

    monkeypatch.setattr(checkpoint, "read", counted)
    resumed = train(small(pictures, tmp_path / "cut", resume=True, **changes), pipe=make_pipe())
    assert read == ["step_000003.safetensors"]  # once: they are large
    assert same_file(whole.output, resumed.output)
    assert without_time(whole) == without_time(resumed)
    assert whole.held_out_after == resumed.held_out_after and whole.held_out_before == resumed.held_out_before
    ends = [state_of(r.run_dir / "checkpoints" / "step_000004.safetensors") for r in (whole, resumed)]
    assert all(torch.equal(ends[0].tensors[name], ends[1].tensors[name]) for name in ends[0].tensors)
    assert ends[0].divergence == ends[1].divergence


def test_a_handler_of_the_caller_is_there_again_afterwards(tmp_path: Path, pictures: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(small(pictures, tmp_path, steps=1), pipe=make_pipe())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
def test_a_terminal_that_is_gone_stops_a_run_as_sigterm_does_unless_hang_ups_are_ignored(
    tmp_path: Path, pictures: Path
) -> None:
    def hang_up(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(Interrupted, match="stopped after step 2 of 3"):
        train(small(pictures, tmp_path / "gone", steps=3), pipe=make_pipe(), observers=[hang_up])
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert train(small(pictures, tmp_path / "on", steps=3), pipe=make_pipe(), observers=[hang_up]).steps == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_longer_run_goes_on_and_says_what_that_means(tmp_path: Path, pictures: Path) -> None:
    train(small(pictures, tmp_path, scheduler="constant", steps=2), pipe=make_pipe())
    longer = train(small(pictures, tmp_path, scheduler="constant", steps=4, resume=True), pipe=make_pipe())
    whole = train(small(pictures, tmp_path / "whole", scheduler="constant", steps=4), pipe=make_pipe())
    assert same_file(longer.output, whole.output)
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    train(small(pictures, tmp_path / "falling", scheduler="cosine", steps=2), pipe=make_pipe())
    config = small(pictures, tmp_path / "falling", scheduler="cosine", steps=3, resume=True)
    train(config, pipe=make_pipe(), observers=[TrainingConsole(console)])
    assert "the run was planned for 2 steps" in console.export_text()
    with pytest.raises(UserError, match=r"--steps 1: the run in .* is at step 3 already"):
        train(small(pictures, tmp_path / "falling", scheduler="cosine", steps=1, resume=True), pipe=make_pipe())


def test_a_run_goes_on_from_its_file_of_settings_with_what_it_had_derived(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its warm-up follows from its steps, which may be more now; rank, rates and the rest are derived as they were."""
    derives = {"warmup": None, "rank": None, "save_every": None, "held_out": None, "scheduler": "constant"}
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Interrupted):
            train(small(pictures, tmp_path / "cut", steps=5, **derives), pipe=make_pipe())
    file = tmp_path / "cut" / "run" / "config.toml"
    assert "# warmup = 1  (from 5 steps)" in file.read_text("utf-8")
    with monkeypatch.context() as patched:
        again = asked(patched, file, "--steps", "10", "--resume")
    assert again.warmup is None and again.rank is None and again.unet_lr is None
    resumed = train(again, pipe=make_pipe())
    assert (resumed.config.warmup, resumed.config.save_every) == (1, 2)
    whole = train(small(pictures, tmp_path / "whole", steps=10, **{**derives, "warmup": 1}), pipe=make_pipe())
    assert same_file(resumed.output, whole.output)
    with monkeypatch.context() as patched:  # and once more: its own is now that of the run before it
        again = asked(patched, file, "--steps", "11", "--resume")
    assert train(again, pipe=make_pipe()).config.warmup == 1


def test_a_warm_up_that_was_chosen_is_compared(tmp_path: Path, pictures: Path) -> None:
    train(small(pictures, tmp_path, warmup=2, steps=2), pipe=make_pipe())
    with pytest.raises(UserError, match="--warmup was 2, now 1"):
        train(small(pictures, tmp_path, warmup=None, steps=9, resume=True), pipe=make_pipe())


def test_a_run_of_an_older_version_goes_on_from_a_file_of_all_settings(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derives = {"warmup": None, "rank": None, "save_every": None, "held_out": None}
    whole = train(small(pictures, tmp_path / "whole", steps=5, **derives), pipe=make_pipe())
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Interrupted):
            train(small(pictures, tmp_path / "cut", steps=5, **derives), pipe=make_pipe())
    run = tmp_path / "cut" / "run"
    for path in (run / "checkpoints").iterdir():
        found = checkpoint.read(path)
        assert found is not None
        settings = {name: value for name, value in found.origin.config.items() if name != "derived"}
        checkpoint.write(path, replace(found, origin=replace(found.origin, config=settings)))
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if value is not None and key != "processes"]
    (run / "config.toml").write_text("\n".join(lines) + "\n", "utf-8")
    with monkeypatch.context() as patched:
        again = asked(patched, run / "config.toml", "--resume")
    assert again.warmup == 1 and again.unet_lr == 1e-3
    assert same_file(train(again, pipe=make_pipe()).output, whole.output)


def test_resuming_refuses_other_settings_pictures_captions_and_bases_by_name(tmp_path: Path, pictures: Path) -> None:
    first = train(small(pictures, tmp_path, steps=1), pipe=make_pipe())
    before = {path: path.read_bytes() for path in first.run_dir.rglob("*") if path.is_file()}
    again = {"steps": 9, "resume": True}
    with pytest.raises(UserError, match=r"--rank was 2, now 4; --unet-lr was 0\.001, now 0\.002"):
        train(small(pictures, tmp_path, rank=4, unet_lr=2e-3, **again), pipe=make_pipe())
    with pytest.raises(UserError, match="another base"):
        train(small(pictures, tmp_path, **again), pipe=make_pipe(seed=5))
    caption = sorted(pictures.glob("*.txt"))[1]
    old = caption.read_text("utf-8")
    caption.write_text("something else", "utf-8")
    with pytest.raises(UserError, match=rf"{caption.stem}\.png has another caption"):
        train(small(pictures, tmp_path, **again), pipe=make_pipe())
    caption.write_text(old, "utf-8")
    draw_pictures(tmp_path / "more", 7)
    new = sorted((tmp_path / "more").glob("* g.png"))[0].rename(pictures / "new one.png")
    new.with_suffix(".txt").write_text("a cat", "utf-8")
    with pytest.raises(UserError, match=r"new one\.png is new"):
        train(small(pictures, tmp_path, **again), pipe=make_pipe())
    assert {path: path.read_bytes() for path in first.run_dir.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, pictures: Path) -> None:
    short = {"steps": 4, "save_every": 2}
    whole = train(small(pictures, tmp_path, **short), pipe=make_pipe())
    newest = whole.run_dir / "checkpoints" / "step_000004.safetensors"
    bits = load_file(whole.output)
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = train(small(pictures, tmp_path, resume=True, **short), pipe=make_pipe())
    again = load_file(resumed.output)
    assert all(torch.equal(bits[key], again[key]) for key in bits)
    assert [line["step"] for line in lines(resumed) if "loss" in line] == list(range(1, 5))
    assert state_of(newest).step == 4


def test_checkpoints_that_cannot_be_read_are_kept(tmp_path: Path, pictures: Path) -> None:
    run = train(small(pictures, tmp_path, steps=2, save_every=1), pipe=make_pipe()).run_dir
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"2 checkpoints are in .* and none can be read \(damaged, or of another version\)"):
        train(small(pictures, tmp_path, steps=2, save_every=1, resume=True), pipe=make_pipe())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("changes", [{"method": "bitfit"}, {"block": ("unet attention+ff ia3",)}], ids=["method", "block"])
def test_a_method_without_rank_goes_on_from_its_own_settings(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = train(small(pictures, tmp_path, rank=None, scheduler="constant", steps=1, **changes), pipe=make_pipe())
    assert whole.config.rank is None
    train(replace(whole.config, steps=2, resume=True), pipe=make_pipe())
    older = replace(whole.config, rank=16, resume=True)  # which earlier versions wrote down
    for path in (whole.run_dir / "checkpoints").iterdir():
        found = checkpoint.read(path)
        assert found is not None
        origin = replace(found.origin, config={**found.origin.config, "rank": 16})
        checkpoint.write(path, replace(found, origin=origin))
    assert train(replace(older, steps=3), pipe=make_pipe()).steps == 3


def test_only_a_mask_or_repeats_that_changed_are_named(tmp_path: Path, pictures: Path) -> None:
    config = small(pictures, tmp_path, steps=1)
    train(config, pipe=make_pipe())
    with pytest.raises(UserError, match=r"other repeats or weight, .* and 3 more"):
        train(replace(config, resume=True, folder=(shutil.copytree(pictures, tmp_path / "2_ink"),)), pipe=make_pipe())
    Image.new("L", (64, 64), "white").save(pictures / "red apple a-mask.png")
    with pytest.raises(UserError, match=r"captions: red apple a\.png has another mask;"):
        train(replace(config, resume=True), pipe=make_pipe())


def test_previews_go_on_without_their_folder_and_with_other_prompts(tmp_path: Path, pictures: Path) -> None:
    changes: dict[str, Any] = {"preview_steps": 1, "scheduler": "constant"}
    first = train(small(pictures, tmp_path, steps=3, preview_prompts=("a cat", "a dog"), **changes), pipe=make_pipe())
    previews = first.run_dir / "previews"
    shutil.rmtree(previews)
    train(small(pictures, tmp_path, steps=4, resume=True, preview_prompts=("a cat", "a dog"), **changes), pipe=make_pipe())
    names = ["base_0.png", "base_1.png", "prompts.json", "sheet.png", "step_000004_0.png", "step_000004_1.png"]
    assert sorted(path.name for path in previews.iterdir()) == names
    train(small(pictures, tmp_path, steps=5, resume=True, preview_prompts=("a house",), **changes), pipe=make_pipe())
    names = ["base_0.png", "prompts.json", "sheet.png", "step_000005_0.png", "until_step_000004"]
    assert sorted(path.name for path in previews.iterdir()) == names
    assert (previews / "until_step_000004" / "step_000004_1.png").exists()
    train(small(pictures, tmp_path, steps=1, overwrite=True), pipe=make_pipe())
    assert not list(previews.iterdir())


def test_a_run_without_checkpoint_starts_again_and_one_that_is_not_there_is_an_error(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        train(small(pictures, tmp_path, resume=True), pipe=make_pipe())
    whole = train(small(pictures, tmp_path / "whole", steps=3), pipe=make_pipe())
    begun = small(pictures, tmp_path / "begun", resume=True, steps=3)
    run = tmp_path / "begun" / "run"
    run.mkdir(parents=True)
    (run / "config.toml").write_text("", "utf-8")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 5}\n{"st', "utf-8")
    assert same_file(train(begun, pipe=make_pipe()).output, whole.output)
    assert [line["step"] for line in lines(whole) if "loss" in line] == list(range(1, 4))


def test_the_newest_two_checkpoints_and_the_best_are_kept(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([9.0, 5.0, 1.0, 6.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(DiffusionTask, "held_out", lambda _: next(measured, 2.0))  # the strengths come after the run
    result = train(small(pictures, tmp_path, steps=6, save_every=1, held_out=0.4), pipe=make_pipe())
    kept = {state_of(path).step for path in (result.run_dir / "checkpoints").iterdir()}
    assert kept == {2, 5, 6}


# Real processes, as a person runs them.


class Command:
    """``peft-diffusion train`` on the tiny base."""

    def __init__(self, base: Path, pictures: Path, where: Path) -> None:
        self.run = where / "run"
        places = {"--base": base, "--output": where / "a.safetensors", "--run-dir": self.run}
        numbers = {"steps": 15, "batch-size": 2, "rank": 2, "save-every": 4, "log-every": 1, "preview-steps": 0}
        options = {"--device": "cpu", **places, **{f"--{name}": value for name, value in numbers.items()}}
        arguments = [str(pictures), *(str(part) for option in options.items() for part in option)]
        script = Path(__file__).parent.parent / "scripts" / "train_style.py"
        self.line = [sys.executable, str(script), *arguments]
        where.mkdir(parents=True, exist_ok=True)

    def start(self) -> forked.Started:
        return forked.Started(self.line[1:], None, self._environment())

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Run it to its end, forked from a process that has imported the libraries."""
        return forked.python(self.line[1:], None, self._environment())

    def _environment(self) -> dict[str, str]:
        """In which signals are measured, which neither a stop nor going on may change."""
        return {**os.environ, "OMP_NUM_THREADS": "1", SIGNALS: "1"}

    def wait_for_step(self, step: int, started: forked.Started) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and forked.alive(started.process):
            metrics = self.run / "metrics.jsonl"
            if metrics.exists() and metrics.read_text("utf-8").count('"loss"') >= step:
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} did not come: {started.wait(0)}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Path]:
    """Pictures, and the file of a run on them that nothing interrupted."""
    where = tmp_path_factory.mktemp("finished")
    pictures = draw_pictures(where / "pictures")
    done = Command(tiny_base, pictures, where).finish()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checksum of its weights") == 2
    return pictures, where / "a.safetensors"


@pytest.mark.skipif(not forked.POSSIBLE, reason="processes of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["INT", "TERM", "KILL"])
def test_a_real_process_that_is_stopped_goes_on_to_the_same_bits(
    tmp_path: Path, tiny_base: Path, finished: tuple[Path, Path], number: signal.Signals
) -> None:
    pictures, whole = finished
    command = Command(tiny_base, pictures, tmp_path)
    started = command.start()
    command.wait_for_step(5, started)
    for _ in range(5 if number == signal.SIGINT else 1):  # an impatient person
        with contextlib.suppress(ProcessLookupError):  # it may have ended by the last of them
            os.kill(started.pid, number)
        time.sleep(0.05)
    done = started.wait(120)
    out, error = done.stdout, done.stderr
    assert not (tmp_path / "a.safetensors").exists()
    steps = sorted(int(path.stem[5:]) for path in (command.run / "checkpoints").glob("step_*.safetensors"))
    if number == signal.SIGKILL:
        assert done.returncode == -signal.SIGKILL and steps[-1] % 4 == 0
    else:
        assert done.returncode == 130, error
        assert out.count("stopping after the present step; Ctrl-C again") == 1
        assert f"stopped after step {steps[-1]} of 15; go on with:" in error and "Traceback" not in error
        told = [json.loads(line) for line in (command.run / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert [line["step"] for line in told if "loss" in line] == list(range(1, steps[-1] + 1))
    if number == signal.SIGINT:  # the line that it printed: the settings of the run folder are all that is needed
        command.line = [*command.line[:2], "--config", str(command.run / "config.toml"), "--resume"]
    else:
        command.line += ["--resume"]
    resumed = command.finish()
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from step {steps[-1]} of 15" in resumed.stdout
    assert same_file(tmp_path / "a.safetensors", whole)
    told = [json.loads(line) for line in (command.run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in told if "loss" in line] == list(range(1, 16))
