"""The toy method as a plug-in of the commands: trained, resumed, listed, inspected, drawn and blended with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from making import command, environment
from safetensors.torch import load_file
from test_plugins import install
from test_training import draw_pictures

import peft_diffusion as pd
from peft_diffusion.core.method import METHODS
from peft_diffusion.core.plugins import METHODS_GROUP

pytestmark = pytest.mark.slow

PLUGIN = "toy_method"
LOADED = ["--plugin", PLUGIN]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with the plug-in's file, pictures, and an adapter that was trained by command."""
    place = tmp_path_factory.mktemp("toy")
    shutil.copy(Path(__file__).parent / f"{PLUGIN}.py", place)
    draw_pictures(place / "pictures", 4)
    told = command("train", *training(tiny_base), *LOADED, cwd=place)
    assert told.returncode == 0, told.stderr
    assert f"--plugin {PLUGIN}" in told.stdout, "the command that it says to type next"
    return place


def training(base: Path, steps: int = 4) -> list[object]:
    flags = ["pictures", "--base", base, "--method", "gain", "--output", "gain.safetensors", "--run-dir", "run"]
    numbers = ["--steps", steps, "--batch-size", 2, "--unet-lr", 0.05, "--preview-steps", 0, "--held-out", 0]
    return [*flags, *numbers, "--save-every", 2, "--scheduler", "constant", "--device", "cpu"]


def drawing(base: Path, *adapters: object) -> list[object]:
    return ["a cat", *(f"--adapter={one}" for one in adapters), "--base", base, "--steps", 2, "--device", "cpu"]


def test_it_learned_something(place: Path) -> None:
    tensors = load_file(place / "gain.safetensors")
    assert tensors and {name.rpartition(".")[2] for name in tensors} == {"gain"}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_help_lists_it_and_imports_nothing_heavy(place: Path) -> None:
    code = (
        "import sys; from peft_diffusion.cli.app import main;"
        f"main(['train', '--help', '--plugin', {PLUGIN!r}]); sys.exit(repr({{'torch', {PLUGIN!r}}} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=place)
    assert told.stderr.strip() == "set()"
    lines = [line.split(maxsplit=1) for line in told.stdout.splitlines() if line.strip()]
    assert ["gain", "Gain: a factor for each output of a layer."] in lines
    assert ["lora", "LoRA: a change of low rank."] in lines
    assert "Gain:" not in command("train", "--help", cwd=place).stdout
    assert "Gain:" in command("text", "train", f"--plugin={PLUGIN}", "--help", cwd=place).stdout
    assert "LoRA:" not in command("generate", "--help", cwd=place).stdout


def test_inspect_tells_it(place: Path) -> None:
    told = command("inspect", "gain.safetensors", *LOADED, cwd=place)
    assert told.returncode == 0 and re.search(r"method\s+│ gain\s", told.stdout), told.stdout
    plain = json.loads(command("inspect", "--json", "gain.safetensors", *LOADED, cwd=place).stdout)
    assert plain["files"][0]["methods"] == ["gain"]
    without = command("inspect", "gain.safetensors", cwd=place)
    assert without.returncode == 0 and f"gain: not known here; it comes with --plugin {PLUGIN}" in without.stdout


def test_an_installed_package_brings_it_by_an_entry_point(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / f"{PLUGIN}.py", tmp_path)
    install(tmp_path, "toy-package", METHODS_GROUP, f"gain = {PLUGIN}")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment().get("PYTHONPATH", "")])}

    def told(*arguments: str) -> str:
        code = (
            f"import sys; from peft_diffusion.cli.app import main; main({list(arguments)!r});"
            f"print('imported', sorted({{'torch', {PLUGIN!r}}} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment() | path)
        assert not done.stderr
        return done.stdout

    listed = told("train", "--help")
    assert "Gain: a factor for each output of a layer." in listed and "imported []" in listed
    inspected = told("inspect", str(place / "gain.safetensors"))
    assert re.search(r"method\s+│ gain\s", inspected) and f"imported ['torch', '{PLUGIN}']" in inspected


def test_pictures_are_drawn_with_it_and_again_by_their_recipe(place: Path, tiny_base: Path) -> None:
    told = command("generate", *drawing(tiny_base, "gain.safetensors"), "--seed", 1, *LOADED, "-o", "with", cwd=place)
    assert told.returncode == 0, told.stderr
    plain = command("generate", *drawing(tiny_base), "--seed", 1, "-o", "without", cwd=place)
    (drawn,), (base,) = (list((place / folder).iterdir()) for folder in ("with", "without"))
    assert plain.returncode == 0 and drawn.read_bytes() != base.read_bytes()
    again = command("generate", "--recipe", drawn, "--base", tiny_base, *LOADED, "-o", "again", cwd=place)
    assert again.returncode == 0, again.stderr
    assert (place / "again" / drawn.name).read_bytes() == drawn.read_bytes()
    refused = command("generate", "--recipe", drawn, "-o", "again", cwd=place)
    assert refused.returncode == 1 and f"was made with --plugin {PLUGIN}" in refused.stderr


def test_it_is_blended(place: Path, tiny_base: Path) -> None:
    shutil.copy(place / "gain.safetensors", place / "other.safetensors")
    cells = ["--columns", 2, "-o", "sheet.png"]
    told = command("blend", *drawing(tiny_base, "gain.safetensors", "other.safetensors"), *cells, *LOADED, cwd=place)
    assert told.returncode == 0 and (place / "sheet.png").is_file(), told.stderr


def test_what_is_missing_is_named(place: Path, tiny_base: Path) -> None:
    shutil.copy(place / "gain.safetensors", place / "other.safetensors")
    for name, files in (("generate", ["gain.safetensors"]), ("blend", ["gain.safetensors", "other.safetensors"])):
        told = command(name, *drawing(tiny_base, *files), cwd=place)
        assert told.returncode == 1
        assert f"method 'gain' is not known; it was trained with --plugin {PLUGIN}" in told.stderr
    resumed = command("train", *training(tiny_base, steps=6), "--resume", cwd=place)
    assert resumed.returncode == 1
    assert f"method 'gain' is not known; the run in run was trained with --plugin {PLUGIN}" in resumed.stderr
    anew = command("train", *training(tiny_base), "--overwrite", cwd=place)
    assert anew.returncode == 1 and "there is no method 'gain'" in anew.stderr


def test_a_run_goes_on_by_its_settings_file_which_names_the_plug_in(place: Path) -> None:
    assert f'plugin = ["{PLUGIN}"]' in (place / "run" / "config.toml").read_text().splitlines()
    (place / "of_another_run.py").write_text("")  # which is loaded, and which the run has nothing of
    told = command("train", "--config", "run/config.toml", "--resume", "--steps", 6, "--plugin", "of_another_run", cwd=place)
    assert told.returncode == 0, told.stderr
    assert json.loads((place / "run" / "run.json").read_text())["plugins"] == [PLUGIN]
    assert told.stdout.rstrip().endswith(f"--plugin {PLUGIN}")
    assert max(json.loads(line)["step"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("value", "words"),
    [("3", "takes names of modules, not 3"), ('"no_such_plugin"', "there is no module 'no_such_plugin'")],
)
def test_a_wrong_plug_in_in_a_settings_file_is_named(tmp_path: Path, value: str, words: str) -> None:
    (tmp_path / "run.toml").write_text(f"plugin = {value}\n")
    told = command("inspect", "--config", "run.toml", "x.safetensors", cwd=tmp_path)
    assert told.returncode == 1 and words in told.stderr


def test_python_loads_a_plug_in_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    pd.load_plugin(PLUGIN)
    assert METHODS["gain"].plugin() == PLUGIN
    assert pd.inspect(place / "gain.safetensors").methods == ("gain",)
