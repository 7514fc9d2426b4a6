"""The report of a run, lists and comparisons of runs, trackers, and the learning-rate finder."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from language import make_lm
from making import command
from PIL import Image
from rich.console import Console
from test_resume import stop_after
from test_training import draw_pictures, small
from torch import nn

from peft_diffusion.api import find_rates, find_text_rates, train, train_text
from peft_diffusion.cli import runs
from peft_diffusion.cli.app import main
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core import checksums
from peft_diffusion.core.errors import UserError
from peft_diffusion.training import Interrupted, TextTrainConfig, TrainConfig, TrainResult
from peft_diffusion.training import pictures as picture_runs
from peft_diffusion.training.machine import memory_plan
from peft_diffusion.training.machine.low_memory import recomputed
from peft_diffusion.training.record import charts, plots, report, run_record
from peft_diffusion.training.record.measurements import measurements, verdict
from peft_diffusion.training.record.run_folder import RunFolder
from peft_diffusion.training.watch import find_lr
from peft_diffusion.training.watch.find_lr import search, trial_steps

pytestmark = pytest.mark.usefixtures("few_measurements", "no_plots")

torch.set_num_threads(1)
NASTY = "<script>alert(1)</script> & \"quotes\" 'and' {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, few_measurements: None, no_plots: None) -> TrainResult:
    """A run with previews, warnings, captions that try to be markup, and pictures kept apart."""
    where = tmp_path_factory.mktemp("made")
    folder = draw_pictures(where / "pictures")
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"{NASTY} {number}", "utf-8")
    (folder / "broken.png").write_bytes(b"no picture")
    changes = {"held_out": 0.4, "preview_steps": 1, "preview_prompts": ("a cat", NASTY), "preview_every": 3}
    changes |= {"trigger": "<ink>"}
    return train(small(folder, where, unet_lr=3e-3, **changes), pipe=make_pipe())


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(path: Path) -> Page:
    return Page((path / "report.html").read_text("utf-8"))


def test_the_report_tells_all_of_a_run_and_needs_nothing_else(made: TrainResult) -> None:
    page = page_of(made.run_dir)
    for words in ("finished", "unet-lr", "0.003", "0.001", "broken.png", "Leakage", "Memorisation", "step 6",
                  "suggested strength",
                  "peft-diffusion generate", "--resume", made.base_fingerprint, "2 of them are kept apart"):  # fmt: skip
        assert words in page.text, words
    sources = [given[key] or "" for _, given in page.tags for key in ("src", "href") if key in given]
    pictures = [source for source in sources if source.startswith("data:image/webp;base64,")]
    assert len(pictures) == 3 * 2 + 6  # previews of the base and of two steps, and thumbnails
    assert all(source.startswith("data:") for source in sources)
    assert sum(tag == "svg" for tag, _ in page.tags) >= 4
    assert (made.run_dir / "report.html").stat().st_size < 1_000_000


@pytest.mark.slow
def test_what_others_wrote_stays_text(made: TrainResult) -> None:
    page = page_of(made.run_dir)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "ink")]
    assert NASTY in page.text and "<ink>" in page.text and "49" not in re.findall(r"'and' (\S+)", page.text)


def test_only_settings_that_are_not_the_presets_stand_out(made: TrainResult) -> None:
    changed = run_record.Record(made.run_dir).changed()
    assert changed["unet_lr"] == (3e-3, 1e-3) and changed["rank"] == (2, 16) and changed["trigger"] == ("<ink>", "")
    chosen = {"steps", "batch_size", "rank", "warmup", "preview_steps", "save_every", "log_every", "held_out", "unet_lr"}
    assert set(changed) <= chosen | {"preview_prompts", "preview_every", "trigger"}


@pytest.mark.slow
def test_what_follows_from_a_short_run_was_not_changed(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    places: dict[str, Any] = {"folder": folder, "output": tmp_path / "a.safetensors", "run_dir": tmp_path / "run"}
    own = TrainConfig(**places, epochs=1, batch_size=4, rank=2, preview_steps=0, device="cpu")
    result = train(own, pipe=make_pipe())
    assert result.config.derived.keys() >= {"steps", "save_every", "warmup"}
    changed = run_record.Record(result.run_dir).changed()
    assert changed == {"epochs": (1.0, None), "batch_size": (4, 8), "rank": (2, 16), "preview_steps": (0, 20)}


@pytest.mark.slow
def test_a_run_that_was_stopped_or_failed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        with pytest.raises(Interrupted):
            train(small(folder, tmp_path), pipe=make_pipe())
    assert run_record.Record(tmp_path / "run").state == "stopped" and "stopped" in page_of(tmp_path / "run").text
    train(small(folder, tmp_path, resume=True), pipe=make_pipe())
    assert run_record.Record(tmp_path / "run").state == "finished"
    with pytest.raises(UserError, match=r"not finite|runs away|loss is"):
        train(small(folder, tmp_path, overwrite=True, unet_lr=1e38, clip=0.0, held_out=0.0), pipe=make_pipe())
    assert run_record.Record(tmp_path / "run").state == "failed"
    assert "Lower the learning rate" in page_of(tmp_path / "run").text


def test_a_run_whose_process_is_gone_is_not_running(tmp_path: Path, made: TrainResult) -> None:
    copy = shutil.copytree(made.run_dir, tmp_path / "copy")
    facts = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(checksums.sealed(facts | {"state": "running"})))
    assert run_record.Record(copy).state == "running"
    gone = subprocess.Popen(["true"])
    gone.wait()
    ended = facts | {"state": "running", "process": facts["process"] | {"pid": gone.pid}}
    (copy / "run.json").write_text(json.dumps(checksums.sealed(ended)))
    assert run_record.Record(copy).state == "stopped"


@pytest.mark.slow
def test_a_text_run_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the ox is swift & the hen is <b>bold</b>. " * 40, "utf-8")
    run = TextTrainConfig((tmp_path / "words.txt",), output=tmp_path / "a.safetensors", run_dir=tmp_path / "run", steps=4,
                          batch_size=2, rank=2, save_every=2, held_out=0.2)  # fmt: skip
    train_text(run, base=make_lm())
    page = page_of(tmp_path / "run")
    assert "nats per token" in page.text and "words.txt" in page.text and "Previews" not in page.text
    assert "tokens are kept apart" in page.text and "text generate" in page.text


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("chromium-browser")), reason="needs chromium")
def test_a_real_browser_shows_it_without_errors(made: TrainResult, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser is not None
    both = tmp_path / "both.html"
    one = run_record.Record(made.run_dir)
    both.write_text(report.compared(one, one), "utf-8")
    for number, page in enumerate((made.run_dir / "report.html", both)):
        shot = tmp_path / f"{number}.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1200,2400"]
        places = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()]
        done = subprocess.run([browser, *flags, *places], capture_output=True, text=True, timeout=120)
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not said and shot.stat().st_size > 20_000
        dom = subprocess.run([browser, *flags[:3], places[0], "--dump-dom", page.as_uri()], capture_output=True, text=True,
                             timeout=120).stdout  # fmt: skip
        assert "<script" not in dom and dom.count("<svg") >= 4


@pytest.mark.slow
def test_runs_are_listed_and_compared(made: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(made.run_dir, runs / "first")
    shutil.copytree(made.run_dir, runs / "second")
    settings = runs / "second" / "config.toml"
    settings.write_text(settings.read_text().replace("seed = 0", "seed = 5"))
    monkeypatch.setenv("COLUMNS", "160")
    listed = command("runs", runs)
    assert listed.returncode == 0, listed.stderr
    for words in ("first", "second", "finished", "lora", f"{made.held_out_after:.4f}"):
        assert words in listed.stdout, words
    told = command("runs", runs / "first", runs / "second", "--html", tmp_path / "both.html")
    assert told.returncode == 0, told.stderr
    assert told.stdout.index("seed") < told.stdout.index("unseen loss after")
    page = Page((tmp_path / "both.html").read_text("utf-8"))
    assert "seed" in page.text and "unet-lr" not in page.text and not [tag for tag, _ in page.tags if tag == "script"]
    empty = command("runs", tmp_path / "nothing")
    assert empty.returncode == 1 and "there is no folder" in empty.stderr


def test_charts_have_round_ticks_within_their_limits() -> None:
    assert charts.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert charts.ticks(0.11, 0.16) == pytest.approx([0.12, 0.14, 0.16])
    spiky = [*[0.1] * 99, 50.0]
    curves = [charts.Curve("each step", list(enumerate(spiky)), "faint"), charts.Curve("kept", [(0, 0.4)], "second", True)]
    assert 0.4 < charts.room_for(curves)[1] < 0.5
    low, high = charts.bounds(spiky)
    assert low <= 0.1 < high < 1
    assert charts.lines([charts.Curve("none", [], "first")], "nothing") == ""
    nan, infinite = float("nan"), float("inf")
    diverged = [charts.Curve("all", [(1, nan), (2, infinite)], "first"), charts.Curve("one", [(1, 0.5), (2, nan)], "first")]
    assert charts.lines(diverged[:1], "diverged") == "" and "nan" not in charts.lines(diverged, "diverged")
    assert charts.running([(1, 2.0), (2, nan), (3, 2.0)]) == [*charts.running([(1, 2.0)]), (3, pytest.approx(2.0))]
    assert len(charts.thinned([(step, 1.0) for step in range(5000)])) <= 400


# Trackers.


@pytest.mark.slow
def test_tensorboard_gets_losses_signals_and_previews(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = draw_pictures(tmp_path / "pictures")
    changes: dict[str, Any] = {"held_out": 0.4, "preview_steps": 1, "preview_prompts": ("a cat",), "log_with": "tensorboard"}
    changes |= {"steps": 2, "save_every": 1}
    result = train(small(folder, tmp_path, **changes), pipe=make_pipe())
    found = events.EventAccumulator(str(result.run_dir / "logs"))
    found.Reload()
    tags = found.Tags()
    assert {"loss/training", "loss/unseen", "loss/seen", "leakage", "learning rate/unet"} <= set(tags["scalars"])
    assert [event.step for event in found.Scalars("loss/training")] == [1, 2]
    assert found.Scalars("loss/unseen")[-1].value == pytest.approx(result.held_out_after, rel=1e-5)
    assert [event.step for event in found.Images(tags["images"][0])] == [0, 2]


def test_a_tracker_without_its_package_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'peft_diffusion\[tensorboard\]'"):
        train(small(tmp_path / "none", tmp_path, log_with="tensorboard"))
    assert not (tmp_path / "run").exists()


# The learning-rate finder.


@pytest.mark.parametrize("best", [1 / 300, 1 / 9, 0.7, 1.0, 2.4, 40.0, 200.0])
@pytest.mark.parametrize("power", [0.0, 1.0, 1.6])  # by which the best rate falls as the steps grow
def test_the_search_finds_the_best_of_whole_runs_within_a_factor_of_two(best: float, power: float) -> None:
    tried = []

    def measure(steps: int, factor: float) -> float:
        tried.append(steps)
        return math.log(factor / best * (steps / 300) ** power) ** 2

    assert best / 1.2 < search(measure, 300) < best * 1.2
    assert set(tried) == {60, 300} and tried.count(60) <= 8 and tried.count(300) <= 6


def test_the_search_passes_over_rates_that_run_away() -> None:
    tried = {}

    def measure(steps: int, factor: float) -> float:
        tried[steps, factor] = math.inf if factor > (1.5 if steps == 60 else 0.12) else 1 - factor
        return tried[steps, factor]

    assert search(measure, 300) == 0.1 and math.isinf(tried[60, 4.0]) and math.isinf(tried[300, 0.2])
    with pytest.raises(UserError, match="every trial ran away"):
        search(lambda steps, factor: math.inf, 300)
    with pytest.raises(UserError, match="every trial ran away"):
        search(lambda steps, factor: math.inf if steps == 300 else factor, 300)


def test_trials_are_short_at_first() -> None:
    assert [trial_steps(steps) for steps in (5, 60, 300, 1500)] == [5, 20, 60, 300]


def test_a_picture_that_was_replaced_or_taken_away_is_shown_no_more(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    shown = []
    for colour in ("red", "red", "blue"):
        aside = tmp_path / "aside.png"
        Image.new("RGB", (8, 8), colour).save(aside)
        aside.replace(path)
        shown.append(report.picture(path))
    assert shown[0] is not None and shown[0] == shown[1] == report.inlined(Image.new("RGB", (8, 8), "red"), 8) != shown[2]
    path.unlink()
    assert report.picture(path) is None


@pytest.mark.slow
def test_a_rate_is_found_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures", 8)
    asked = small(folder, tmp_path, held_out=0.25, unet_lr=0.02, steps=2)
    console = Console(record=True, width=160, file=(tmp_path / "log").open("w"))
    found = find_rates(asked, pipe=make_pipe(), observers=[TrainingConsole(console)])
    again = find_rates(asked, pipe=make_pipe())
    assert (found.factor, found.trials) == (again.factor, again.trials)
    best = min((one for one in found.trials if one.steps == found.steps), key=lambda one: one.loss)
    assert best.loss < found.before and best.rates["unet"] / 2 <= found.rates["unet"] <= best.rates["unet"] * 2
    assert found.rates["unet"] > 0.02
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["find_lr.json", "find_lr.png"]
    assert not (tmp_path / "a.safetensors").exists()
    assert json.loads(found.file.read_text())["rates"] == found.rates
    told = console.export_text()
    assert f"suggested: --unet-lr {found.rates['unet']:g}" in told
    assert ("look still gains above" in told) == (found.factor < 1)


@pytest.mark.slow
def test_trials_stand_as_the_run_does_and_the_flag_of_words_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_pictures(tmp_path / "pictures", 4)
    stood = []

    def low(parts: Sequence[nn.Module], chance: bool) -> AbstractContextManager[int | None]:
        stood.append("low")
        return recomputed(parts, chance)

    def fused(unet: nn.Module) -> AbstractContextManager[int | None]:
        stood.append("fused")
        return nullcontext()

    monkeypatch.setattr(find_lr, "_plot", lambda found: b"")  # which another test looks at
    monkeypatch.setattr(memory_plan, "recomputed", low)
    monkeypatch.setattr(picture_runs, "fused", fused)
    asked = small(folder, tmp_path, rank=None, method="tokens", components=("text_encoder",), trigger="<ink>", steps=1,
                  option=("placeholders=<ink>",), memory="low")  # fmt: skip
    console = Console(record=True, width=160, file=(tmp_path / "log").open("w"))
    found = find_rates(asked, pipe=make_pipe(), observers=[TrainingConsole(console)])
    assert stood == ["fused", "low"]
    assert f"suggested: --text-encoder-lr {found.rates['text_encoder.0']:g}" in console.export_text()
    words = tmp_path / "words.txt"
    words.write_text("the ox is swift and the hen is bold. " * 40, "utf-8")
    text = TextTrainConfig((words,), output=tmp_path / "b.safetensors", run_dir=tmp_path / "text", steps=1, batch_size=2,
                           rank=2, held_out=0.2, memory="low")  # fmt: skip
    find_text_rates(text, base=make_lm())
    assert stood == ["fused", "low", "low"]


DAMAGE = {
    "config": ("config.toml", b"x = = 1"),
    "bytes": ("config.toml", b"x = '\xff'"),
    "lines": ("metrics.jsonl", b'[]\n5\n{"loss": 1}\n{"step": [1]}\n{"step": 1, "seconds": "x", "held_out_loss": []}\n'),
    "metrics": ("metrics.jsonl", b'{"step": 1, "loss": 2}\n\xff\xfe{\n'),
    "state": ("run.json", b'{"state": "odd"}'),
    "list": ("run.json", b'{"state": ["finished"]}'),
    "process": ("run.json", b'{"state": "running", "process": [1]}'),
    "figures": ("run.json", b'{"state": "finished", "figures": null, "about": 3}'),
    "block": ("config.toml", b"block = 5"),
}


@pytest.mark.slow
def test_a_damaged_run_hides_no_other(
    made: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for case, (name, content) in {"whole": ("note", b""), **DAMAGE}.items():
        shutil.copytree(made.run_dir, tmp_path / "runs" / case)
        (tmp_path / "runs" / case / name).write_bytes(content)
    for case, gone in (("no-config", "config.toml"), ("no-metrics", "metrics.jsonl"), ("metrics-alone", "config.toml")):
        shutil.copytree(made.run_dir, tmp_path / "runs" / case)
        (tmp_path / "runs" / case / gone).unlink()
    (tmp_path / "runs" / "metrics-alone" / "run.json").write_bytes(b"{")
    for name, text in (("config.toml", "title = 'a web site'"), ("metrics.jsonl", '{"step": 1}'), ("run.json", "{}")):
        (foreign := tmp_path / "runs" / f"foreign-{name}").mkdir()
        (foreign / name).write_text(text)
    monkeypatch.delenv("COLUMNS", raising=False)
    runs.runs(runs.RunsConfig((tmp_path / "runs",)))
    said = capsys.readouterr().out
    assert "no-config: config.toml is gone\n" in said and "metrics-alone: run.json is damaged, and left out\n" in said
    assert "foreign" not in said and "\nwhole: " not in said
    told = {line.split()[0]: line for line in said.splitlines()[3:] if line.strip()}
    assert {"whole", "no-metrics", *DAMAGE} <= told.keys()
    unread = ["bytes", "config", "metrics-alone", "no-config"]
    assert [case for case, line in told.items() if "cannot be read" in line and line.split()[1] == "damaged"] == unread
    assert f"{made.held_out_after:.4f}" in told["whole"] and "finished" in told["whole"]


METRICS = {
    "diverged": '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n',
    "beyond a float": '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n{"step": 3, "held_out_loss": 1}\n',
    "beyond a step": f'{{"step": 1{"0" * 400}, "loss": 1}}\n{{"step": true, "loss": 3}}\n{{"step": 2, "loss": 2}}\n',
    "of wrong types": '{"step": 0, "held_out_loss": null}\n{"step": 1, "loss": "low", "lr": 5, "changes": [1]}\n',
}


@pytest.mark.slow
@pytest.mark.parametrize("case", METRICS)
def test_odd_measurements_are_shown_as_far_as_they_go_and_serve_a_run_that_goes_on(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for run in folders:
        run.mkdir()
        (run / "config.toml").write_text('folder = ["x"]\n')
        (run / "metrics.jsonl").write_text(METRICS[case])
    assert main(["runs", *map(str, folders), "--html", str(tmp_path / "both.html")]) == 0, capsys.readouterr().err
    report.write(folders[0])
    lines = RunFolder(folders[0]).metrics()
    plots.draw(tmp_path / "loss.png", lines)
    plots.draw_signals(tmp_path / "signals.png", lines)
    verdict(measurements(lines))


def test_the_list_fits_a_narrow_terminal(
    made: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "openmoji-with-a-long-name"
    shutil.copytree(made.run_dir, tmp_path / name)
    monkeypatch.setenv("COLUMNS", "80")
    runs.runs(runs.RunsConfig((tmp_path,)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any(f"{made.held_out_after:.4f}" in line and "finished" in line for line in lines)
    assert len([line for line in lines if line.strip() and line[0] != " "]) <= 7  # folded little
    monkeypatch.delenv("COLUMNS")
    runs.runs(runs.RunsConfig((tmp_path,)))
    assert name in capsys.readouterr().out
