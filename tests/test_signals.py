"""The signals that tell when to stop: what they measure, what they choose, and that a resumed run has the same."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from conftest import draw_nothing, leave_signals, make_pipe
from laws import strengths_of
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_resume import same_file, stop_after, without_time
from test_training import Line, draw_pictures, lines, small, state_of, trainer
from torch import nn

from peft_diffusion.api import train, train_text
from peft_diffusion.bases import components
from peft_diffusion.bases.embedded import embedded
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core import merge, site
from peft_diffusion.formats.container import read_header
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.methods import method
from peft_diffusion.training import Interrupted
from peft_diffusion.training import run as runs
from peft_diffusion.training.attachment import at_strength
from peft_diffusion.training.record import recorder, run_record
from peft_diffusion.training.record.measurements import Measurement, best_step, measurements, verdict
from peft_diffusion.training.settings.text import TextTrainConfig
from peft_diffusion.training.tasks.diffusion import DiffusionSettings, DiffusionTask
from peft_diffusion.training.tasks.layer_changes import layer_changes
from peft_diffusion.training.tasks.preparation import prepare
from peft_diffusion.training.watch import strength as strengths

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_measurements", "no_plots")]

torch.set_num_threads(1)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


def spec(path: Path) -> dict[str, Any]:
    """The summary of the training that a file holds."""
    told: dict[str, Any] = json.loads(read_header(path).metadata["peft_diffusion"])["training"]
    return told


Value = TypeVar("Value")


def known(value: Value | None) -> Value:
    """What must be there."""
    assert value is not None
    return value


def run(*unseen: float, seen: float = 0.1) -> list[Measurement]:
    return [Measurement(10 * place, value, seen, 0.0, 0.0) for place, value in enumerate(unseen)]


def test_the_best_step_is_the_earliest_of_the_lowest_after_the_start() -> None:
    assert best_step({0: 0.1, 10: 0.3, 20: 0.2, 30: 0.2}) == 20
    assert best_step({0: 0.1}) is None and best_step({}) is None


def test_a_run_that_got_worse_is_called_over_trained_and_one_that_stayed_is_not() -> None:
    assert verdict(run(1.0, 0.5, 0.4, 0.407)) is None
    assert verdict(run(1.0)) is None and verdict([]) is None
    assert known(verdict(run(1.0, 0.4, 0.5))).startswith(
        "over-trained since step 10: the loss on what is kept apart rose from 0.4000"
    )
    worse = [*run(1.0, 0.4), Measurement(20, 0.5, 0.2, 0.0, 0.0)]
    assert known(verdict(worse)).startswith("unstable since step 10")


def test_memorisation_is_how_much_further_the_loss_fell_on_what_was_seen() -> None:
    told = [
        {"step": 0, "held_out_loss": 1.0},
        {"step": 0, "seen_loss": 2.0},
        {"step": 5, "held_out_loss": 0.8, "seen_loss": 0.8},
    ]
    first, last = measurements([*told, {"step": 5, "loss": 3.0}])
    assert first.memorisation == 0 and last.memorisation == pytest.approx(0.5)
    assert measurements(told[:1])[0].memorisation is None


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "oft", "ia3", "bitfit"])
def test_a_layers_change_is_that_of_merging(name: str) -> None:
    pipe = make_pipe()
    for part in site.attach(pipe.unet, "new", method(name)):
        adapter = site.adapters(pipe.unet, "new")[part]
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.1)
    changes = layer_changes({"unet": pipe.unet}, "new")
    path, adapted = next(iter(site.sites(pipe.unet).items()))
    which = "bias" if name == "bitfit" else "weight"
    before = getattr(adapted, which).detach().clone()
    merge.merge(pipe.unet)
    moved = (getattr(adapted, which) - before).norm() / before.norm()
    assert changes[f"unet.{path}"] == pytest.approx(float(moved), rel=1e-3) and moved > 0


def test_a_method_that_is_no_change_of_weights_tells_the_size_of_its_parameters() -> None:
    pipe = make_pipe()
    site.attach(pipe.unet, "new", method("bottleneck"))
    for adapter in site.adapters(pipe.unet, "new").values():
        for parameter in adapter.parameters():
            nn.init.constant_(parameter, 0.25)
    assert set(layer_changes({"unet": pipe.unet}, "new").values()) == {0.25}


def test_patience_ends_a_run_after_measurements_without_a_lower_loss() -> None:
    loop, log = trainer(Line(), steps=40, patience=2)
    loop.measured = {1: -2.0}  # lower than anything to come
    assert loop.run()
    assert loop.step == 8 and [state.step for state in log.states] == [4, 8]
    assert loop.run() and loop.step == 8


def test_plots_are_drawn_with_the_first_checkpoint_at_times_and_at_the_end(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []

    def draw(_: Path, metrics: list[dict[str, Any]]) -> None:
        drawn.append([line["step"] for line in metrics if "loss" in line])

    leave_signals(monkeypatch)
    monkeypatch.setattr(recorder, "draw", draw)
    monkeypatch.setattr(recorder, "_SECONDS", math.inf)
    train(small(pictures, tmp_path / "a", steps=3, save_every=1), pipe=make_pipe())
    assert drawn == [[1], [1, 2, 3]]
    drawn.clear()
    monkeypatch.setattr(recorder, "_SECONDS", 0.0)
    train(small(pictures, tmp_path / "b", steps=3, save_every=1), pipe=make_pipe())
    assert [one for number, one in enumerate(drawn) if one not in drawn[:number]] == [[1], [1, 2], [1, 2, 3]]


def test_signals_are_measured_with_every_checkpoint_and_leave_the_training_alone(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, plots: None
) -> None:
    short: dict[str, Any] = {"held_out": 0.4, "steps": 4, "save_every": 2}
    watched = train(small(pictures, tmp_path / "a", **short), pipe=make_pipe())
    told = measurements(lines(watched))
    assert [one.step for one in told] == [0, 2, 4]
    assert told[0].leakage == 0 and known(told[-1].leakage) > 0 and told[0].memorisation == 0
    assert all(
        math.isfinite(known(value)) for one in told for value in (one.unseen, one.seen, one.leakage, one.memorisation)
    )
    changes = [line["changes"] for line in lines(watched) if "changes" in line]
    assert len(changes) == 2 and all(value > 0 for value in changes[-1].values())
    assert (watched.run_dir / "signals.png").read_bytes().startswith(b"\x89PNG")
    pipe = make_pipe()
    before = [part.clone() for part in pipe.unet.parameters()]
    draw_nothing(monkeypatch)
    monkeypatch.setattr(DiffusionTask, "leakage", lambda _: 0.0)
    monkeypatch.setattr(DiffusionTask, "watched", lambda _: frozenset([0]))
    blind = train(small(pictures, tmp_path / "b", **short), pipe=pipe)
    assert same_file(watched.output, blind.output)
    assert all(torch.equal(one, two) for one, two in zip(before, pipe.unet.parameters(), strict=True))


def test_previews_tell_how_near_they_are_to_training_pictures(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_signals(monkeypatch)
    drawn: dict[str, Any] = {"preview_steps": 1, "preview_every": 1, "steps": 2, "save_every": 1}
    told = lines(train(small(pictures, tmp_path, **drawn), pipe=make_pipe()))
    near = {line["step"]: line["preview_nearest"] for line in told if "preview_nearest" in line}
    assert list(near) == [0, 1, 2] and all(value > 0 for value in near.values())
    again = train(small(pictures, tmp_path, resume=True, **drawn), pipe=make_pipe())
    assert lines(again) == told


def test_training_pictures_are_nearest_to_themselves(pictures: Path) -> None:
    config = small(pictures, pictures, held_out=0.0)
    prepared = prepare(config, make_pipe(), lambda event: None, TrainingPictures())
    task = DiffusionTask(prepared.pipe, "none", DiffusionSettings(), prepared.train)
    drawn = [Image.open(picture.path) for picture in prepared.of_run.all]
    assert known(task.nearness(drawn)) < 1e-3 < 0.5 < known(task.nearness([Image.new("RGB", (64, 64), "black")]))
    assert task.nearness([Image.new("RGB", (32, 32))]) is None


def test_text_has_the_same_signals(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("And it came to pass in those days, that there went out a decree. " * 60, "utf-8")
    config = TextTrainConfig(
        texts=(tmp_path / "text.txt",), output=tmp_path / "a.safetensors", run_dir=tmp_path / "run", steps=4, save_every=2,
        batch_size=2, context=32, rank=2, held_out=0.2, device="cpu",
    )  # fmt: skip
    result = train_text(config)
    told = measurements(lines(result))
    assert [one.step for one in told] == [0, 2, 4] and told[0].leakage == 0 < known(told[-1].leakage)
    outcome = known(result.outcome)
    assert told[-1].memorisation is not None and outcome.kept == outcome.best
    assert spec(result.output)["suggested_strength"] == known(outcome.suggestion).strength


def test_so_many_checkpoints_stay_as_are_asked_for(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_signals(monkeypatch)
    result = train(small(pictures, tmp_path, steps=4, save_every=1, keep_checkpoints=3), pipe=make_pipe())
    kept = sorted(int(path.stem[5:]) for path in (result.run_dir / "checkpoints").iterdir())
    assert kept == [2, 3, 4]


def test_without_pictures_apart_the_last_weights_are_written_and_nothing_is_suggested(
    tmp_path: Path, pictures: Path
) -> None:
    result = train(small(pictures, tmp_path, held_out=0.0, steps=2, save_every=1), pipe=make_pipe())
    outcome = known(result.outcome)
    assert outcome.kept == 2 and outcome.best is None and outcome.suggestion is None
    assert "suggested_strength" not in spec(result.output)


def measured_as(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """What is kept apart gets these losses, measurement by measurement."""
    rest = iter(losses)
    monkeypatch.setattr(DiffusionTask, "held_out", lambda _: next(rest))


def test_the_best_weights_are_written_or_the_last(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = (9.0, 5.0, 1.0, 6.0, 7.0, *(2.0,) * 5)
    for keep, step in (("best", 2), ("last", 4)):
        measured_as(monkeypatch, *course)
        changes: dict[str, Any] = {"steps": 4, "save_every": 1, "keep": keep, "scheduler": "constant", "held_out": 0.4}
        result = train(small(pictures, tmp_path / keep, **changes), pipe=make_pipe())
        outcome = known(result.outcome)
        assert outcome.kept == step == spec(result.output)["kept_step"] and outcome.best == 2
        assert result.held_out_after == {2: 1.0, 4: 7.0}[step]
        assert spec(result.output)["warning"].startswith("over-trained since step 2")
        kept = state_of(result.run_dir / "checkpoints" / f"step_{step:06}.safetensors").tensors["parameters"]
        written = torch.cat([tensor.flatten() for name, tensor in load_file(result.output).items() if "alpha" not in name])
        assert written.double().norm() == pytest.approx(kept.double().norm().item(), rel=1e-6)


def test_the_suggested_strength_is_measured_said_and_proposed(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever the small network comes to.
    monkeypatch.setattr(runs, "suggest", lambda *measured: replace(strengths.suggest(*measured), strength=0.7))
    console = Console(record=True, width=300, file=(tmp_path / "log").open("w"))
    config = small(pictures, tmp_path, held_out=0.4, unet_lr=1e-2, steps=2)
    result = train(config, pipe=make_pipe(), observers=[TrainingConsole(console)])
    told = spec(result.output)
    losses = known(known(result.outcome).suggestion).losses
    assert losses[0.0] == result.held_out_before and losses[1.0] == result.held_out_after
    assert told["suggested_strength"] == 0.7 and result.next_command.endswith(f"--adapter {result.output}=0.7")
    said = console.export_text()
    assert "suggested strength: 0.7" in said and f"next: {result.next_command}" in said
    assert f"{result.output.name}=0.7" in run_record.Record(result.run_dir).facts["commands"]["To use it"]
    assert told["loss_by_strength"] == {f"{strength:g}": loss for strength, loss in losses.items()}


def test_a_strength_is_one_again_afterwards() -> None:
    pipe = make_pipe()
    site.attach(pipe.unet, "new", method("lora"))
    with pytest.raises(KeyError), at_strength(components(pipe).values(), "new", 0.5):
        assert strengths_of(pipe.unet).scalar("new").unique().tolist() == [0.5]
        raise KeyError
    assert strengths_of(pipe.unet).scalar("new").unique().tolist() == [1.0]


def test_a_resumed_run_has_the_same_signals_choice_and_patience(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "steps": 12,
        "save_every": 2,
        "held_out": 0.4,
        "unet_lr": 0.2,
        "patience": 1,  # which the second measurement may end, by what the first was, before it was stopped
        "scheduler": "constant",
    }
    whole = train(small(pictures, tmp_path / "whole", **changes), pipe=make_pipe())
    assert whole.steps < 12
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Interrupted):
            train(small(pictures, tmp_path / "cut", **changes), pipe=make_pipe())
    resumed = train(small(pictures, tmp_path / "cut", resume=True, **changes), pipe=make_pipe())
    assert without_time(whole) == without_time(resumed) and whole.outcome == resumed.outcome
    assert same_file(whole.output, resumed.output) and whole.steps == resumed.steps


def test_a_run_that_is_planted_to_over_train_is_called_so(tmp_path: Path) -> None:
    """Four pictures, six passes at ten times the usual rate, four others kept apart: on the embedded base, and small."""
    source = embedded("styles/openmoji")
    (tmp_path / "few").mkdir()
    for picture in sorted(source.glob("*.webp"))[:8]:
        for file in source.glob(f"{picture.stem}.*"):
            shutil.copy(file, tmp_path / "few")
    changes: dict[str, Any] = {
        "steps": 24,
        "save_every": 12,
        "batch_size": 1,
        "resolution": 64,
        "held_out": 0.5,
        "unet_lr": 0.01,
        "rank": 8,
        "missing_captions": "name",
    }
    config = small(tmp_path / "few", tmp_path, base="icons", scheduler="constant", keep="best", **changes)
    result = train(config)
    best, last = measurements(lines(result))[1], measurements(lines(result))[-1]
    outcome = known(result.outcome)
    assert known(outcome.warning).startswith(f"over-trained since step {outcome.best}: the loss on what is kept")
    assert outcome.kept == known(outcome.best) < result.steps
    assert known(last.seen) < known(best.seen) and known(last.memorisation) > known(best.memorisation) > 0
