"""How a run tells how far it is: rates, the end, memory; and the command that is run at the end."""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from rich.console import Console
from test_training import draw_pictures, small

from peft_diffusion import UserError
from peft_diffusion.api import train
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core.errors import Interrupted
from peft_diffusion.core.events import Event, Progress, Warned
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.events import Losses, Measured, Pace, Preview, Saved, Signals, Started, Step, StepLoss
from peft_diffusion.training.watch.pace import PaceMeter

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def losses(*steps: int) -> Losses:
    return Losses(tuple(StepLoss(step, 0.5, {}) for step in steps))


def test_the_pace_leaves_out_what_is_measured_and_the_end_does_not() -> None:
    told: list[Event] = []
    hands = Hands()
    meter = PaceMeter("pictures", 4, 100, 20, torch.device("cpu"), told.append, hands)
    meter(Measured(20, None, Signals()))
    hands.seconds += 5  # 10 steps of half a second
    meter(losses(*range(21, 31)))
    assert told == [Pace(30, 100, 8.0, 35.0, None)]
    hands.seconds += 45
    meter(Preview(30, (), (), (), None))
    hands.seconds += 10  # 10 steps of a second
    meter(losses(*range(31, 41)))
    assert told[1:] == [Pace(40, 100, 4.0, 60 / 20 * 60, None)]
    meter(Losses(()))
    assert len(told) == 2 and str(told[1]) == "4 pictures/s"
    assert str(Pace(1, 2, 0.12, 1, 3 << 20, "text")) == "0.12 windows/s, 3 MiB"


def test_the_pace_of_a_resumed_run_counts_from_its_first_step_and_no_step_before_a_preview() -> None:
    told: list[Event] = []
    hands = Hands()
    meter = PaceMeter("pictures", 1, 40, 20, torch.device("cpu"), told.append, hands)  # nothing is measured at its start
    hands.seconds += 10  # 5 steps of two seconds
    meter(losses(*range(21, 26)))
    hands.seconds += 10
    meter(Preview(30, (), (), (), None))  # the losses of the steps before were not read
    hands.seconds += 0.001
    meter(losses(*range(26, 31)))
    hands.seconds += 5
    meter(losses(*range(31, 36)))
    left = [(event.step, event.rate, round(event.left)) for event in told if isinstance(event, Pace)]
    assert left == [(25, 0.5, 30), (35, 1.0, round(25 / 15 * 5))]


def test_the_terminal_tells_how_long_preparation_and_run_will_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hands = Hands()
    monkeypatch.setattr(time, "monotonic", hands)
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    with TrainingConsole(console) as observer:
        for done in (0, 1, 2, 3):
            observer(Progress("encoding pictures", done * 40, 1000))
            hands.seconds += 8
        observer(Progress("encoding captions", 0, 2000))
        observer(Started(tmp_path, 0, 100))
        observer(losses(1))
        observer(Pace(1, 100, 3.25, 4000.0, 12 << 30))
        hands.seconds += 20
        observer(Step(2, 100))
    lines = console.export_text().splitlines()
    assert lines[0] == "encoding pictures: 80 of 1000, 5/s, 3 min left"
    assert lines[1].startswith("step 2 of 100: loss 0.5000, 3.25 pictures/s, 12.0 GiB, ends ") and "16 min left" in lines[1]
    assert len(lines) == 2


@pytest.mark.slow
def test_a_run_tells_captions_and_its_pace_to_the_terminal_and_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told: list[Event] = []
    met: list[Event] = []
    look = PaceMeter.__call__

    def met_too(meter: PaceMeter, event: Event) -> None:
        met.append(event)
        look(meter, event)

    monkeypatch.setattr(PaceMeter, "__call__", met_too)
    changes = {"log_with": "tensorboard", "steps": 2, "log_every": 1}
    result = train(small(draw_pictures(tmp_path / "p", 6), tmp_path, **changes), pipe=make_pipe(), observers=[told.append])
    saved = [(event.what, event.step) for event in met if isinstance(event, Saved)]
    assert saved == [("checkpoint", 2), ("on the way", 2)]  # writing takes time that is no pace
    captions = [event for event in told if isinstance(event, Progress) and event.what == "encoding captions"]
    assert [(event.done, event.total) for event in captions] == [(7, 7), (2, 2)]  # the empty one, and the other prompts
    paces = [event for event in told if isinstance(event, Pace)]
    assert [event.step for event in paces] == [1, 2] and all(event.rate > 0 and event.memory is None for event in paces)
    (log,) = (result.run_dir / "logs").rglob("events.out.*")
    read = events.EventAccumulator(str(log.parent))
    read.Reload()
    assert [one.step for one in read.Scalars("speed/pictures a second")] == [1, 2]
    assert "speed/minutes left" in read.Tags()["scalars"]


# The command at the end.

_TELLS = "import json, os, sys; names = [n for n in os.environ if n.startswith('PEFT_DIFFUSION_')]; " + (
    "open(sys.argv[1], 'w').write(json.dumps({n.removeprefix('PEFT_DIFFUSION_'): os.environ[n] for n in names}))"
)


def asked(tmp_path: Path, **changes: Any) -> TrainConfig:
    """A run of a step that tells its end in a file whose name a shell would read otherwise."""
    command = f'"{sys.executable}" -c "{_TELLS}" "{tmp_path}/$HOME; told"'
    folder = tmp_path / "pictures"
    folder = folder if folder.exists() else draw_pictures(folder, 5)
    return small(folder, tmp_path, steps=1, **{"notify": command, **changes})


def outcome(tmp_path: Path) -> dict[str, str]:
    told: dict[str, str] = json.loads((tmp_path / "$HOME; told").read_text())
    assert int(told.pop("SECONDS")) >= 0 and told.pop("RUN_DIR") == str(tmp_path / "run")
    return told


@pytest.mark.slow
def test_a_command_is_told_of_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "a.safetensors")
    result = train(asked(tmp_path), pipe=make_pipe())
    assert outcome(tmp_path) == {"STATE": "finished", "OUTPUT": output, "ERROR": ""}
    assert "notify" not in json.dumps(_metadata(result.output))  # what runs on this machine is nobody's business
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        train(asked(tmp_path, overwrite=True), pipe=make_pipe(), stop=stop)
    assert outcome(tmp_path)["STATE"] == "stopped"
    next((tmp_path / "pictures").glob("*.png")).with_suffix(".txt").write_text("the others have none")
    with pytest.raises(UserError, match="caption"):
        train(asked(tmp_path, overwrite=True, missing_captions="stop"), pipe=make_pipe())
    failed = outcome(tmp_path)
    assert failed["STATE"] == "failed" and "caption" in failed["ERROR"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["no-such-program --now", f"{sys.executable} -c 'raise SystemExit(3)'"])
def test_a_command_that_fails_takes_nothing_from_the_run(
    command: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Event] = []
    result = train(asked(tmp_path, notify=command), pipe=make_pipe(), observers=[told.append])
    assert result.output.is_file() and json.loads((result.run_dir / "run.json").read_text())["state"] == "finished"
    warned = [event.message for event in told if isinstance(event, Warned) and "--notify" in event.message]
    missing = ["--notify: there is no program no-such-program, so nobody will be told of the end"]
    assert warned == (missing if "no-such" in command else [])
    assert any("--notify" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("command", ["", "say 'done"])
def test_what_is_no_command_is_refused(command: str) -> None:
    with pytest.raises(UserError, match="--notify"):
        TrainConfig("pictures", notify=command)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found
