"""What is told of runs, of drawing and of writing: which events, with what data, to whom, and how any thread stops them."""

import json
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
from conftest import leave_signals, make_pipe
from language import make_lm
from making import make_adapter, modes
from rich.console import Console
from safetensors.torch import load_file
from test_memory import short
from test_resume import same_file, without_time
from test_training import draw_pictures, lines, small

from peft_diffusion.api import find_rates, train, train_text
from peft_diffusion.bases import components, load_base
from peft_diffusion.bases.digest import checksum
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core import events as core_events
from peft_diffusion.core.errors import Interrupted, UserError
from peft_diffusion.core.events import (
    Ended,
    Event,
    Noted,
    ObserverFailed,
    Observers,
    Progress,
    Stopping,
    Warned,
    stop_on_signal,
)
from peft_diffusion.generation import Adapters
from peft_diffusion.generation import events as generation_events
from peft_diffusion.generation.blend import blend
from peft_diffusion.generation.events import PictureMade, SheetMade, TextWritten
from peft_diffusion.generation.generate import generate
from peft_diffusion.generation.settings import BlendConfig, GenerateConfig
from peft_diffusion.generation.text import generate_text
from peft_diffusion.generation.text_settings import TextGenerateConfig
from peft_diffusion.training import TextTrainConfig, TextTrainResult
from peft_diffusion.training import events as training_events
from peft_diffusion.training.events import (
    Arranged,
    BaseLoaded,
    BaseSharded,
    Begun,
    ClassNotKept,
    ClassPictures,
    DataRead,
    Fingerprinted,
    HeldOut,
    LanguageModelLoaded,
    LatentsCached,
    LookGains,
    Losses,
    Measured,
    MemoryPredicted,
    MemorySaved,
    MemoryUnknown,
    Pace,
    Prepared,
    Preview,
    PreviewsChosen,
    PromptsMade,
    RatesFound,
    Saved,
    SearchStarted,
    Started,
    Step,
    StepLeftOut,
    StrengthSuggested,
    TimePredicted,
    TokensMade,
    Trained,
    TrialEnded,
    Unrecorded,
    WeightsChosen,
)
from peft_diffusion.training.machine import memory_plan
from peft_diffusion.training.need import Need

pytestmark = pytest.mark.usefixtures("few_measurements", "no_plots")

torch.set_num_threads(1)
LONG = "apple " * 80 + "dog"


Kind = TypeVar("Kind", bound=Event)


def of(kind: type[Kind], told: list[Event]) -> list[Kind]:
    """The events of a kind, in order."""
    return [event for event in told if isinstance(event, kind)]


def only(kind: type[Kind], told: list[Event]) -> Kind:
    (found,) = of(kind, told)
    return found


def ended(told: list[Event]) -> Ended:
    """The end, which is told last."""
    assert isinstance(told[-1], Ended)
    return told[-1]


def kinds(module: ModuleType) -> set[type[Event]]:
    """The kinds of events that a module defines."""
    found = (value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__)
    return {kind for kind in found if issubclass(kind, Event) and kind is not Event}


class Watched:
    """A run with everything on, and all that was told of it: to a list, and to a console."""

    def __init__(self, folder: Path) -> None:
        pictures = draw_pictures(folder / "pictures", 10)
        (pictures / "broken.png").write_bytes(b"no picture")
        sorted(pictures.glob("*.png"))[2].with_suffix(".txt").write_text(LONG, "utf-8")
        self.told: list[Event] = []
        self.console = Console(record=True, width=400, file=(folder / "log").open("w"))
        changes: dict[str, Any] = {
            "preset": "subject",
            "class_prompt": ("a cat",),
            "class_images": 2,
            "cache": folder / "cache",
        }
        changes |= {"held_out": 0.3, "steps": 10, "save_every": 5, "log_every": 5, "missing_captions": "name"}
        changes |= {"unet_lr": 0.3, "keep": "best", "clip": 0.0, "max_tokens": "75"}
        changes |= {"preview_steps": 1, "preview_every": 5, "preview_prompts": ("a cat", "a dog"), "scheduler": "constant"}
        self.config = small(pictures, folder, **changes)
        with TrainingConsole(self.console) as console:
            self.result = train(self.config, pipe=make_pipe(), observers=[self.told.append, console])
        assert self.result.outcome is not None
        self.outcome = self.result.outcome


@pytest.fixture
def without_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test measure no signals."""
    leave_signals(monkeypatch)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp("watched"))


@pytest.fixture(scope="module")
def text_told(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], str]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "words.txt").write_text("the ox is swift and the hen is bold. " * 60, "utf-8")
    told: list[Event] = []
    console = Console(record=True, width=400, file=(folder / "log").open("w"))
    places: dict[str, Any] = {"output": folder / "a.safetensors", "run_dir": folder / "run", "device": "cpu"}
    config = TextTrainConfig((folder / "words.txt",), steps=3, batch_size=2, context=24, rank=2, held_out=0.2, **places)
    train_text(config, base=make_lm(), observers=[told.append, TrainingConsole(console)])
    return told, console.export_text()


@pytest.mark.slow
def test_the_pace_is_told_whenever_losses_are_read(watched: Watched, text_told: tuple[list[Event], str]) -> None:
    for told, data in ((watched.told, "pictures"), (text_told[0], "text")):
        read = [event.losses[-1].step for event in of(Losses, told)]
        paces = of(Pace, told)
        assert [event.step for event in paces] == read and {event.data for event in paces} == {data}
        assert all(event.rate > 0 and event.left >= 0 for event in paces) and paces[-1].left == 0


# What is told.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "said"),
    [
        (HeldOut(2, 10, True, 6), "2 pictures kept apart: the loss there shows when to stop (--held-out 0 trains on all)"),
        (HeldOut(3, 30, True, 6), "3 pictures kept apart: the loss there shows when to stop (--held-out 0 trains on all)"),
        (HeldOut(2, 20, True, 0), "2 pictures kept apart: the loss there shows when to stop"),  # as somebody said
        (HeldOut(0, 30, False, 0), "no pictures are kept apart to measure on (--held-out 0.1 keeps a tenth, at least one)"),
        (
            HeldOut(0, 4, False, 6),
            "no pictures are kept apart to measure on (fewer than 6 pictures; --held-out 0.1 keeps a tenth, at least one)",
        ),
        # No share is any of one.
        (HeldOut(0, 1, False, 6), "no pictures are kept apart to measure on: there is but one picture"),
        (HeldOut(0, 1, True, 0), "no pictures are kept apart to measure on: there is but one picture"),
        (HeldOut(0, 2, True, 0), "no pictures are kept apart to measure on: each data set has but one picture"),
    ],
)
def test_what_is_said_of_pictures_kept_apart_is_what_can_be_done(event: HeldOut, said: str) -> None:
    assert event.lines() == (said,)


def test_what_is_found_before_the_first_step_is_told(watched: Watched) -> None:
    told = watched.told
    base = only(BaseLoaded, told)
    assert (base.family, base.resolution, base.quantize) == ("other", 64, None)
    own = only(DataRead, told)
    assert own.data == "pictures" and not own.of_class and len(own.problems) == 1 and "broken.png" in own.problems[0]
    arranged = {event.of_class: event.description for event in of(Arranged, told)}
    assert arranged[False] == ("64x64: 7 pictures, 100% or more of each kept",)
    assert arranged[True][0].startswith("64x64: 2 pictures") and len(of(Arranged, told)) == 2
    held_out = only(HeldOut, told)
    assert (held_out.count, held_out.of) == (3, 10)
    prompts = only(PromptsMade, told).prompts
    assert len(prompts) == 10 and LONG in prompts
    (seldom, long, *others) = of(Warned, told)
    assert "each picture is seen" in seldom.message
    assert "over 75 tokens" in long.message and len(long.details) == 1 and "dog" in long.details[0]
    assert [warning.message for warning in others] == ([watched.outcome.warning] if watched.outcome.warning else [])
    assert not of(PreviewsChosen, told)  # somebody chose them
    (line,) = PreviewsChosen(("a cat",), ("a fox", "an owl")).lines()
    assert line.endswith(": a fox; an owl") and PreviewsChosen(("a cat",), ()).lines() == ()
    pictures = only(ClassPictures, told)
    assert pictures.count == 2 and len(list(pictures.folder.glob("*.png"))) == 2
    latents = only(LatentsCached, told)
    assert (latents.reused, latents.computed, latents.strange) == (0, 12, 0)
    assert {event.what for event in of(Progress, told)} > {"reading pictures", "encoding pictures"}
    assert all(0 <= event.done <= event.total for event in of(Progress, told))


def test_the_steps_losses_and_measurements_of_a_run_are_told(watched: Watched) -> None:
    told = watched.told
    prepared, started = only(Prepared, told), only(Started, told)
    assert prepared.plan.steps == started.steps == 10 and prepared.plan.data == "pictures" and started.step == 0
    assert prepared.plan.rates.keys() == {"unet", "text_encoder"} and prepared.plan.rates["unet"] == 0.3
    assert [(event.step, event.steps) for event in of(Step, told)] == [(step, 10) for step in range(1, 11)]
    assert [[one.step for one in event.losses] for event in of(Losses, told)] == [list(range(1, 6)), list(range(6, 11))]
    measured = {event.step: event for event in of(Measured, told)}
    assert list(measured) == [0, 5, 10] and all(event.held_out and event.signals.seen for event in measured.values())
    written = {line["step"]: line["held_out_loss"] for line in lines(watched.result) if "held_out_loss" in line}
    assert {step: event.held_out for step, event in measured.items()} == written
    assert only(TimePredicted, told).left == 2
    assert told.index(only(Trained, told)) > told.index(of(Step, told)[-1])


def test_what_a_run_draws_writes_and_chooses_is_told(watched: Watched) -> None:
    told, result = watched.told, watched.result
    previews = of(Preview, told)
    assert [event.step for event in previews] == [0, 5, 10]
    for event in previews:
        assert event.prompts == ("a cat", "a dog") and len(event.pictures) == 2 and event.pictures[0].size == (64, 64)
        assert all(file.exists() for file in event.files) and event.nearest is not None and event.nearest > 0
    saved = [(event.what, event.step) for event in of(Saved, told)]
    on_the_way = [(what, step) for step in (5, 10) for what in ("checkpoint", "on the way")]
    assert saved == [*on_the_way, ("adapter", watched.outcome.kept)]
    assert all(event.path.exists() for event in of(Saved, told)) and of(Saved, told)[-1].path == result.output
    assert [(event.when, event.checksum) for event in of(Fingerprinted, told)] == [
        ("before", result.base_checksum),
        ("after", result.base_checksum),
    ]
    assert only(StrengthSuggested, told).suggestion == watched.outcome.suggestion
    chosen = of(WeightsChosen, told)
    assert [event.step for event in chosen] == ([watched.outcome.kept] if watched.outcome.kept != 10 else [])
    assert told[-1] == Ended("finished", result)


def test_every_line_of_the_console_comes_from_an_event(watched: Watched, text_told: tuple[list[Event], str]) -> None:
    for told, printed in ((watched.told, watched.console.export_text()), text_told):
        assert printed.splitlines() == [line for event in told for line in event.lines()]
        assert printed.count("\n") > 10


def test_the_record_holds_what_was_told_before_the_first_step(watched: Watched) -> None:
    facts = json.loads((watched.result.run_dir / "run.json").read_text("utf-8"))
    begun = watched.told.index(only(Started, watched.told))
    assert facts["said"] == [line for event in watched.told[:begun] for line in event.lines()]
    (problem,), (seldom, long, *_) = only(DataRead, watched.told).problems, of(Warned, watched.told)
    assert facts["warnings"] == [problem, seldom.message, f"{long.message} {long.details[0]};"]
    assert facts["state"] == "finished" and facts["figures"]["seconds"] == watched.result.seconds


@pytest.mark.slow
def test_text_is_told_of_as_pictures_are(text_told: tuple[list[Event], str]) -> None:
    told, _ = text_told
    assert only(LanguageModelLoaded, told).context == 48 and only(DataRead, told).data == "text"
    tokens = only(TokensMade, told)
    result = ended(told).result
    assert isinstance(result, TextTrainResult)
    assert tokens.held_out is not None and tokens.held_out > 0
    assert tokens.tokens == result.tokens and tokens.context == 24
    assert only(Prepared, told).plan.data == "text" and {event.data for event in of(Measured, told)} == {"text"}
    assert "perplexity" in of(Measured, told)[0].lines()[0]
    assert [event.what for event in of(Saved, told)] == ["checkpoint", "checkpoint", "checkpoint", "adapter"]


@pytest.mark.slow
def test_a_subject_without_its_class_a_search_and_its_trials_are_told(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 4)
    told: list[Event] = []
    train(small(pictures, tmp_path / "a", preset="subject", steps=1), pipe=make_pipe(), observers=[told.append])
    only(ClassNotKept, told)
    told.clear()
    config = small(pictures, tmp_path / "b", held_out=0.25, unet_lr=100.0, steps=3, clip=0.0)
    found = find_rates(config, pipe=make_pipe(), observers=[told.append])
    started = only(SearchStarted, told)
    assert (started.short, started.steps, started.before) == (3, 3, found.before)
    assert sorted(event.trial.factor for event in of(TrialEnded, told)) == sorted(one.factor for one in found.trials)
    assert only(RatesFound, told).found == found and found.factor < 1
    only(LookGains, told)
    assert told[-1] == Ended("finished")


@pytest.mark.slow
@pytest.mark.usefixtures("without_signals")
def test_memory_is_told_of_where_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "SMALL", 0)
    told: list[Event] = []
    pipe = short(make_pipe())
    train(small(draw_pictures(tmp_path / "pictures", 4), tmp_path, steps=1), pipe=pipe, observers=[told.append])
    predicted = only(MemoryPredicted, told)
    assert predicted.need.total > 0 and predicted.there and f"{predicted.need}" in predicted.lines()[0]


def test_events_that_take_other_machines_have_their_lines() -> None:
    sharded = BaseSharded(("unet",), 2, 3 * 2**20, 6 * 2**20, True)
    assert sharded.lines()[0].startswith("unet sharded over 2 processes: each holds 3 MiB of 6 MiB; steps run one operation")
    assert "no CUDA graph of them can be made (why)" in Unrecorded("why").lines()[0]
    assert "2 so far" in StepLeftOut(7, 2, 64.0).lines()[0]
    assert Begun(Path("ink.safetensors"), 3, 1, 2, 0.25).lines() == (
        "3 layers begun as ink.safetensors; 1 begun fresh; 2 of the file left out, not trained now; the rank"
        " leaves out 25.0% of its change",
    )
    assert MemorySaved(Need(2**20, 2**20, 2**20)).lines()[0].startswith("memory: 3 MiB do not fit; as with --memory low")
    assert "Ctrl-C again, a second later" in Stopping().lines()[0]
    assert "--memory low takes less" in MemoryUnknown(None, low=False).lines()[0]


def test_every_kind_of_event_is_a_frozen_dataclass_and_is_tested_here() -> None:
    found = kinds(core_events) | kinds(training_events) | kinds(generation_events)
    assert len(found) > 40 - 5
    for kind in found:
        assert is_dataclass(kind) and vars(kind)["__dataclass_params__"].frozen, kind
        assert kind.__name__ in globals(), f"no test speaks of {kind.__name__}"
        assert all(field.type for field in fields(kind))


# Stopping.


class Handed:
    """An observer that hands each event to another thread, and waits until that has dealt with it."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self.events.put(event)
        self.events.join()

    def until(self, last: type[Event]) -> Iterator[Event]:
        """The events as they come, up to the first of a kind."""
        while True:
            event = self.events.get(timeout=120)
            yield event
            self.events.task_done()
            if isinstance(event, last):
                return


@pytest.mark.slow
@pytest.mark.usefixtures("without_signals")
def test_a_run_is_watched_and_stopped_from_another_thread_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    changes = {"ema": 0.9, "dropout": 0.2, "held_out": 0.2, "scheduler": "cosine"}
    whole = train(small(pictures, tmp_path / "whole", **changes), pipe=make_pipe())
    handed, stop, raised = Handed(), threading.Event(), []

    def work() -> None:
        try:
            train(small(pictures, tmp_path / "cut", **changes), pipe=make_pipe(), observers=[handed], stop=stop)
        except Interrupted as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    told = []
    for event in handed.until(Ended):
        told.append(event)
        if isinstance(event, Step) and event.step == 4:
            stop.set()
    thread.join(120)
    assert "stopped after step 4 of 6; go on with: peft-diffusion train" in str(raised[0])
    assert [event.step for event in of(Step, told)] == [1, 2, 3, 4]
    assert [event.step for event in of(Saved, told) if event.what == "checkpoint"] == [3, 4]
    end = ended(told)
    assert end.state == "stopped" and end.error == str(raised[0]) and end.result is None
    assert json.loads((tmp_path / "cut" / "run" / "run.json").read_text())["state"] == "stopped"
    told.clear()
    resumed = train(small(pictures, tmp_path / "cut", resume=True, **changes), pipe=make_pipe(), observers=[told.append])
    started = only(Started, told)
    assert (started.resumed, started.step, started.planned) == (True, 4, 6)
    assert [event.step for event in of(Step, told)] == [5, 6]
    assert same_file(whole.output, resumed.output) and without_time(whole) == without_time(resumed)


def test_a_run_that_is_stopped_while_pictures_are_read_writes_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    told: list[Event] = []

    def stop_soon(event: Event) -> None:
        told.append(event)
        if isinstance(event, Progress) and event.what == "encoding pictures":
            stop.set()

    pipe = make_pipe()
    with pytest.raises(Interrupted, match="stopped before the first step"):
        train(small(draw_pictures(tmp_path / "pictures"), tmp_path), pipe=pipe, observers=[stop_soon], stop=stop)
    assert not (tmp_path / "run").exists() and not of(Fingerprinted, told) and ended(told).state == "stopped"


@pytest.mark.slow
def test_a_search_for_rates_stops_after_the_present_step(tmp_path: Path) -> None:
    stop = threading.Event()
    told: list[Event] = []

    def stop_soon(event: Event) -> None:
        told.append(event)
        if isinstance(event, TrialEnded):
            stop.set()

    pipe = make_pipe()
    before = checksum(components(pipe))
    config = small(draw_pictures(tmp_path / "pictures"), tmp_path, held_out=0.3, steps=2)
    with pytest.raises(Interrupted, match="stopped before a learning rate was found"):
        find_rates(config, pipe=pipe, observers=[stop_soon], stop=stop)
    assert len(of(TrialEnded, told)) == 1 and ended(told).state == "stopped"
    assert checksum(components(pipe)) == before and not Adapters(pipe).names


def test_signals_are_left_alone_where_a_stop_is_given_and_in_other_threads() -> None:
    found = []

    def work() -> None:
        with stop_on_signal(print) as stop:  # where Python lets nobody handle signals
            found.append(stop.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


# Observers that fail, and runs that do.


@pytest.mark.slow
@pytest.mark.usefixtures("without_signals")
def test_a_broken_observer_is_told_no_more_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 4)
    short: dict[str, Any] = {"held_out": 0.25, "steps": 3, "save_every": 2, "log_every": 1}
    whole = train(small(pictures, tmp_path / "whole", **short), pipe=make_pipe())
    calls: list[Event] = []
    told: list[Event] = []

    def broken(event: Event) -> None:
        calls.append(event)
        if isinstance(event, Losses):
            raise ConnectionError("the page is gone")

    result = train(small(pictures, tmp_path / "b", **short), pipe=make_pipe(), observers=[broken, told.append])
    assert isinstance(calls[-1], Losses) and len(of(Losses, calls)) == 1
    failed = only(ObserverFailed, told)
    assert "broken" in failed.observer and "the page is gone" in failed.error
    assert "the page is gone" in caplog.text
    assert told[-1] == Ended("finished", result)
    assert same_file(whole.output, result.output) and without_time(whole) == without_time(result)
    assert json.loads((result.run_dir / "run.json").read_text())["state"] == "finished"
    assert (result.run_dir / "report.html").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("without_signals")
def test_an_observer_that_ends_the_program_ends_the_run_and_the_record_says_so(tmp_path: Path) -> None:
    def leave(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            raise SystemExit(3)

    pictures, pipe = draw_pictures(tmp_path / "pictures", 4), make_pipe()
    with pytest.raises(SystemExit):
        train(small(pictures, tmp_path), pipe=pipe, observers=[leave])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"
    assert not Adapters(pipe).names


@pytest.mark.slow
@pytest.mark.usefixtures("without_signals")
def test_a_run_that_fails_tells_of_it_last_whether_it_had_begun_or_not(tmp_path: Path) -> None:
    told: list[Event] = []
    pictures = draw_pictures(tmp_path / "pictures", 4)
    with pytest.raises(UserError, match=r"runs away|not finite|loss is") as caught:
        train(small(pictures, tmp_path, unet_lr=1e30, clip=0.0, log_every=1), pipe=make_pipe(), observers=[told.append])
    assert told[-1] == Ended("failed", error=str(caught.value)) and len(of(Ended, told)) == 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["state"], facts["error"]) == ("failed", str(caught.value))
    told.clear()
    with pytest.raises(UserError, match="there is no folder"):
        train(small(tmp_path / "nowhere", tmp_path / "b"), pipe=make_pipe(), observers=[told.append])
    assert ended(told).state == "failed" and not (tmp_path / "b").exists()


def test_what_nobody_watches_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "peft_diffusion"):
        Observers()(Warned("look", ("here",)))
        Observers()(Noted("by the way"))
        assert "look\n  here" in caplog.text and "by the way" in caplog.text
        caplog.clear()
        Observers([lambda event: None])(Warned("look"))
        assert not caplog.text


# Drawing and writing.


@pytest.fixture(scope="module")
def ink(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("ink") / "ink.safetensors", tiny_base, 1, ("ink style",))


@pytest.fixture(scope="module")
def oil(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("oil") / "oil.safetensors", tiny_base, 2)


def drawing_of(folder: Path, base: Path, *adapters: Path, **changes: Any) -> GenerateConfig:
    values = {"base": str(base), "device": "cpu", "steps": 2, "batch_size": 1, "adapter": tuple(map(str, adapters))}
    return GenerateConfig(("a cat",), output=folder, **{**values, **changes})


@pytest.mark.slow
def test_a_service_that_draws_twice_loads_the_base_once(
    tiny_base: Path, ink: Path, oil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = generate(drawing_of(tmp_path / "a", tiny_base, ink))[0].image
    pipe = load_base(str(tiny_base), device="cpu")
    pipe.unet.train().conv_in.requires_grad_(True)  # the caller's own training
    before, scheduler, own = checksum(components(pipe)), pipe.scheduler, modes(pipe.unet, pipe.text_encoder, pipe.vae)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded again"))
    told: list[Event] = []
    lent = [generate(drawing_of(tmp_path / "b", tiny_base, ink), pipe=pipe, observers=[told.append])[0] for _ in range(2)]
    assert all(list(one.image.getdata()) == list(fresh.getdata()) for one in lent)
    other = generate(drawing_of(tmp_path / "c", tiny_base, oil), pipe=pipe)[0]
    assert list(other.image.getdata()) != list(fresh.getdata())
    assert [event.picture.path for event in of(PictureMade, told)] == [one.path for one in lent]
    assert 'is called by "ink style"' in of(Noted, told)[0].message
    assert [(event.done, event.total) for event in of(Progress, told)] == [(1, 2), (2, 2)] * 2
    sheet = BlendConfig(
        ("a cat",), adapter=(str(ink), str(oil)), output=tmp_path / "d.png", columns=2, steps=1, base=str(tiny_base)
    )
    told.clear()
    blend(sheet, pipe=pipe, observers=[told.append])
    assert only(SheetMade, told).path == tmp_path / "d.png" and told[-1] == Ended("finished")
    assert checksum(components(pipe)) == before and not Adapters(pipe).names and pipe.scheduler is scheduler
    assert modes(pipe.unet, pipe.text_encoder, pipe.vae) == own


@pytest.mark.slow
def test_drawing_stops_between_batches_and_keeps_what_was_drawn(tiny_base: Path, ink: Path, tmp_path: Path) -> None:
    pipe, stop, told = load_base(str(tiny_base), device="cpu"), threading.Event(), []

    def stop_soon(event: Event) -> None:
        told.append(event)
        if isinstance(event, Progress) and event.done == 3:  # within the second of three pictures
            stop.set()

    config = drawing_of(tmp_path / "out", tiny_base, ink, count=3)
    with pytest.raises(Interrupted, match="stopped after 2 of 3 pictures"):
        generate(config, pipe=pipe, observers=[stop_soon], stop=stop)
    drawn = [event.picture.path for event in of(PictureMade, told)]
    assert len(drawn) == 2 and sorted((tmp_path / "out").iterdir()) == sorted(drawn)
    assert told[-1] == Ended("stopped", error="stopped after 2 of 3 pictures") and not Adapters(pipe).names
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(ink.read_bytes())
    files = (str(ink), str(copy))
    sheet = BlendConfig(("a cat", "a dog"), adapter=files, columns=2, steps=1, output=tmp_path / "sheet.png")
    with pytest.raises(Interrupted, match="stopped after 0 of 4 pictures"):
        blend(sheet, pipe=pipe, stop=stop)
    assert not (tmp_path / "sheet.png").exists() and not Adapters(pipe).names


@pytest.mark.slow
def test_a_lent_base_that_carries_adapters_is_refused_and_kept(tiny_base: Path, ink: Path, tmp_path: Path) -> None:
    pipe = load_base(str(tiny_base), device="cpu")
    adapters = Adapters(pipe)
    adapters.load(ink, name="mine", strength=0.5)
    with pytest.raises(UserError, match=r"carries adapters already \(mine\): remove them"):
        generate(drawing_of(tmp_path / "out", tiny_base, ink), pipe=pipe)
    assert adapters.names == ("mine",)
    adapters.remove("mine")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(ink.read_bytes()[:-64])
    with pytest.raises(UserError):
        generate(drawing_of(tmp_path / "out", tiny_base, ink, broken), pipe=pipe)
    assert not adapters.names


@pytest.mark.slow
def test_texts_are_told_of_and_a_lent_model_is_given_back(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the ox is swift and the hen is bold. " * 40, "utf-8")
    places: dict[str, Any] = {"output": tmp_path / "a.safetensors", "run_dir": tmp_path / "run", "device": "cpu"}
    trained = TextTrainConfig((tmp_path / "words.txt",), steps=2, batch_size=2, context=24, rank=2, held_out=0.0, **places)
    base = make_lm()
    base.lm.train().requires_grad_(True)  # the caller's own training
    own = modes(base.lm)
    told: list[Event] = []
    adapter = train_text(trained, base=base).output
    assert modes(base.lm) == own
    config = TextGenerateConfig(("the",), count=3, max_tokens=4, adapter=(str(adapter),), device="cpu")
    texts = list(generate_text(config, base=base, observers=[told.append]))
    assert [event.written for event in of(TextWritten, told)] == texts and len(texts) == 3
    assert told[-1] == Ended("finished") and not Adapters(base).names
    told.clear()
    unfinished = generate_text(config, base=base, observers=[told.append])
    next(unfinished)
    assert Adapters(base).names
    assert isinstance(unfinished, Generator)
    unfinished.close()
    assert ended(told).state == "stopped" and not Adapters(base).names and modes(base.lm) == own
    stop = threading.Event()
    stopped = generate_text(config, base=base, stop=stop)
    assert next(stopped) == texts[0]
    stop.set()
    with pytest.raises(Interrupted, match="stopped after 1 of 3 texts"):
        next(stopped)
    assert not Adapters(base).names and load_file(adapter)
