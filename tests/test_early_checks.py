"""What can be told before the base is loaded, or before pictures are encoded, is told then."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_pipe
from test_bad_input import FAILED, complaint
from test_training import draw_pictures, small

from peft_diffusion.api import find_rates, find_text_rates, train, train_text
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Warned
from peft_diffusion.training import texts
from peft_diffusion.training.settings.text import TextTrainConfig
from peft_diffusion.training.tasks import preparation

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")


class TooLateError(Exception):
    """What must not be reached was."""


def too_late(*_: object, **__: object) -> None:
    raise TooLateError


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, few_measurements: None, no_signals: None, no_plots: None) -> Path:
    """A folder with pictures and a run that learned from them."""
    where = tmp_path_factory.mktemp("done")
    draw_pictures(where / "pictures")
    train(small(where / "pictures", where, scheduler="constant"), pipe=make_pipe())
    return where


@pytest.fixture
def again(done: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(done, tmp_path / "again"))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((preparation, "load_base"), (texts, "load_lm")):
        monkeypatch.setattr(module, name, too_late)


@pytest.mark.slow
def test_the_command_tells_of_an_unknown_hyper_parameter_before_anything_else(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pics", 1)
    said = complaint(FAILED, "train", "pics", "--option", "nonsense=1", "--base", "owner/none", folder=tmp_path)
    assert "method lora has no nonsense; it has:" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"option": ("nonsense=1",)}, "method lora has no nonsense"),
        ({"option": ("use_dora",)}, "--option: 'use_dora' is no NAME=VALUE"),
        ({"block": ("unet attention lora nonsense=1",)}, "method lora has no nonsense"),
        ({"block": ("unet attention lora rank=many",)}, "rank must be a whole number, not 'many'"),
        ({"target": "attn("}, "target 'attn\\(' is neither a name nor a regular expression"),
        ({"block": ("unet attn[ lora",)}, "target 'attn\\[' is neither a name nor a regular expression"),
        ({"optimizer": "prodigy"}, "--optimizer prodigy needs the package prodigyopt, which is not installed"),
        ({"background": "redd"}, 'unknown background colour "redd"'),
        ({"repeats": ("a=b",)}, "--repeats 'a=b': write SUBFOLDER=NUMBER"),
        ({"folder_weight": ("a",)}, "--folder-weight 'a': write SUBFOLDER=NUMBER"),
        ({"folder": Path("nowhere")}, "there is no folder nowhere"),
        ({"regularisation": (Path("nowhere"),)}, "there is no folder nowhere"),
    ],
)
def test_what_needs_no_base_is_told_before_it_is_loaded(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    for start in (train, find_rates):
        with pytest.raises(UserError, match=said):
            start(small(**{"folder": done / "pictures", "where": tmp_path, **changes}))


def test_a_strength_over_steps_of_another_adapter_is_refused_before_the_base_is_loaded(
    done: Path, tmp_path: Path, unloaded: None
) -> None:
    (file,) = done.glob("*.safetensors")
    (tmp_path / "a.txt").write_text("And it came to pass in those days. " * 60, "utf-8")
    common: dict[str, Any] = {"beside": (f"{file}=0:1,0.6:0",)}
    pictures = small(done / "pictures", tmp_path, **common)
    text = TextTrainConfig(texts=(tmp_path / "a.txt",), output=tmp_path / "b.safetensors", device="cpu", **common)
    for start in (
        lambda: train(pictures),
        lambda: find_rates(pictures),
        lambda: train_text(text),
        lambda: find_text_rates(text),
    ):
        with pytest.raises(UserError, match="training has no denoising steps that a strength could follow"):
            start()


def test_a_folder_without_pictures_is_told_before_the_base_is_loaded(tmp_path: Path, unloaded: None) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"no picture in .*pictures \(only a\.txt\)"):
        train(small(tmp_path / "pictures", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 4}, "--rank was 2, now 4; start a new run"),
        ({"unet_lr": 0.5}, r"--unet-lr was 0\.\d+, now 0\.5"),
        ({"flip": True}, "--flip was False, now True"),
        ({"target": "outputs"}, "--target was None, now outputs"),
        ({"option": ("use_dora=true",)}, "has no use_dora"),
        ({"steps": 3}, "--steps 3: the run in .* is at step 6 already"),
    ],
)
def test_a_resume_with_other_settings_is_told_before_the_base_is_loaded(
    again: Path, unloaded: None, changes: dict[str, Any], said: str
) -> None:
    before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=said):
        train(small(again / "pictures", again, **{"scheduler": "constant", "steps": 9, "resume": True, **changes}))
    assert {path: path.read_bytes() for path in again.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_resume_from_nothing_that_can_be_read_is_told_before_the_base_is_loaded(again: Path, unloaded: None) -> None:
    for path in (again / "run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"2 checkpoints are in .* and none can be read"):
        train(small(again / "pictures", again, scheduler="constant", resume=True))


@pytest.mark.slow
def test_a_resume_with_other_pictures_or_another_base_is_told_before_pictures_are_encoded(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "cache_latents", too_late)
    config = small(again / "pictures", again, scheduler="constant", steps=9, resume=True)
    with pytest.raises(UserError, match="had another base"):
        train(config, pipe=make_pipe(seed=5))
    with pytest.raises(TooLateError):
        train(config, pipe=make_pipe())  # the same pictures and base
    draw_pictures(again / "pictures", 1, size=80)
    with pytest.raises(UserError, match=r"red apple a\.png has another content"):
        train(config, pipe=make_pipe())


@pytest.mark.slow
def test_a_resume_on_other_text_is_told_before_the_base_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "a.txt"
    text.write_text("And it came to pass in those days. " * 60, "utf-8")
    places: dict[str, Any] = {"output": tmp_path / "a.safetensors", "run_dir": tmp_path / "run", "device": "cpu"}
    settings: dict[str, Any] = {**places, "steps": 1, "rank": 1, "context": 32, "batch_size": 1, "held_out": 0.0}
    train_text(TextTrainConfig(texts=(text,), **settings))
    monkeypatch.setattr(texts, "load_lm", too_late)
    settings |= {"steps": 2, "resume": True}
    with pytest.raises(UserError, match="--rank was 1, now 3"):
        train_text(TextTrainConfig(texts=(text,), **{**settings, "rank": 3}))
    with pytest.raises(UserError, match="target 'attn\\(' is neither a name"):
        train_text(TextTrainConfig(texts=(text,), **{**settings, "target": "attn("}))
    text.write_text("And it came not to pass in those days. " * 60, "utf-8")
    with pytest.raises(UserError, match=r"had other text: a\.txt has another content"):
        train_text(TextTrainConfig(texts=(text,), **settings))


def test_what_does_nothing_beside_other_settings_is_told(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "cache_latents", too_late)
    vain: dict[str, Any] = {
        "text_encoder_lr": 1e-5, "keep_tags": 1, "huber_c": 0.2, "huber_schedule": "constant", "class_images": 9,
        "prior_weight": 0.5, "prior_target": "noise", "preview_every": 2, "preview_prompts": ("word " * 100,),
    }  # fmt: skip
    needed: dict[str, Any] = {
        "components": "unet,text_encoder", "shuffle_tags": True, "loss": "huber", "regularisation": done / "pictures",
        "class_prompt": "a cat", "preview_steps": 1,
    }  # fmt: skip
    said = []
    for changes in (vain, {**vain, **needed, "class_images": 1}):
        told: list[Event] = []
        with pytest.raises(TooLateError):
            train(small(done / "pictures", tmp_path, **changes), pipe=make_pipe(), observers=[told.append])
        said.append([event for event in told if isinstance(event, Warned)])
    lines = [event.message for event in said[0] if "does nothing" in event.message]
    assert {line.split()[0].removeprefix("--").replace("-", "_") for line in lines} == vain.keys()
    assert "--text-encoder-lr does nothing without --components unet,text_encoder" in lines
    assert not [event for event in said[1] if "does nothing" in event.message]
