"""Names and words of others do not steer the terminal."""

import ast
import io
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import peft_diffusion
from peft_diffusion.cli import app, parser
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.cli.progress import show_notes
from peft_diffusion.cli.screen import Screen
from peft_diffusion.cli.terminal import plain
from peft_diffusion.core.events import Noted, Warned

TITLE = "\x1b]0;owned\x07"  # sets the title of a window
CLEAR = "\x1b[2J\x9b31m\r\x7f\u202e"  # clears the screen; colours, by the control of one byte; goes back; turns around
HOSTILE = f"a{TITLE}b{CLEAR}c"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An adapter file whose name, title and triggers are hostile."""
    path = tmp_path / f"{HOSTILE}.safetensors"
    spec = {"version": 1, "methods": {}, "base": {"name": HOSTILE}, "triggers": [HOSTILE], "training": {}, "title": HOSTILE}
    tensors = {f"lora_unet_x.{end}": torch.ones(1, 1) for end in ("lora_down.weight", "lora_up.weight")}
    save_file(tensors, path, {"peft_diffusion": json.dumps(spec), "modelspec.trigger_phrase": HOSTILE})
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "FILE"],
        ["inspect", "FILE", "FILE", "--json"],
        ["inspect", "FILE", "--strict"],
        ["inspect", f"{HOSTILE}.pt"],
        ["inspect", f"--{HOSTILE}"],
        ["runs", f"{HOSTILE}/"],
        ["train", HOSTILE, "--output", "x.safetensors"],
        ["generate", "a cat", "--adapter", "FILE", "--debug"],
        ["generate", "a cat", "--base", HOSTILE, "--debug"],
        ["generate", "--recipe", f"{HOSTILE}.png"],
        ["train", "--plugin", HOSTILE],
        ["--config", f"{HOSTILE}.toml", "train"],
    ],
)
def test_no_command_passes_control_characters_on(
    words: list[str], file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    app.main([str(file.name) if word == "FILE" else word for word in words])
    told = "".join(capsys.readouterr())
    assert "owned" in told and not CONTROLS.search(told)


def test_what_is_noted_logged_and_shown_while_training_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    show_notes(Noted(HOSTILE))
    TrainingConsole()(Noted(HOSTILE))
    with parser.notes(False):
        logging.getLogger("peft_diffusion.any").warning(HOSTILE)
    told = "".join(capsys.readouterr())
    assert told.count("]0;owned") == 3 and not CONTROLS.search(told)


def test_each_line_of_a_note_is_known_as_one_and_details_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show_notes(Noted("first\nsecond"))
    show_notes(Warned("odd files:", ("a.png", "b.png")))
    assert capsys.readouterr().err.splitlines() == ["note: first", "note: second", "note: odd files:", "  a.png", "  b.png"]


def test_a_screen_keeps_its_own_colours() -> None:
    file = io.StringIO()
    Screen(file=file, force_terminal=True, color_system="standard").print(HOSTILE, style="red", highlight=False)
    assert file.getvalue() == f"\x1b[31m{plain(HOSTILE)}\x1b[0m\n"
    assert not isinstance(Console(file=file), Screen) and CONTROLS.search(HOSTILE)


@pytest.mark.slow
def test_everything_is_written_in_one_place() -> None:
    package = Path(peft_diffusion.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console"):
                found.append(f"{path.relative_to(package)}: {node.func.id}")
    assert found == ["cli/terminal.py: print"]
