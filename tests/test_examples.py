"""The scripts of ``examples/``, each run as a person would, with the embedded base."""

import os
import shutil
from itertools import combinations
from pathlib import Path

import forked
import pytest
from making import environment
from PIL import Image
from safetensors.torch import load_file

import peft_diffusion as pd
from peft_diffusion.generation import recipe
from peft_diffusion.generation.sheet import grid

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SAMPLES = ROOT / "samples" / "styles" / "openmoji"

Cell = tuple[int, int, int, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the sample pictures with their captions; to encode all of them takes longer than what is tested."""
    some = tmp_path_factory.mktemp("styles") / SAMPLES.name
    some.mkdir()
    for path in sorted(SAMPLES.glob("*.webp"))[:8]:
        for own in (path, path.with_suffix(".txt")):
            shutil.copy(own, some)
    return some


def run(script: str, *arguments: object, cwd: Path) -> list[str]:
    """What a script prints, line by line."""
    path = os.pathsep.join([str(ROOT), environment().get("PYTHONPATH", "")])
    told = forked.python([str(EXAMPLES / script), *map(str, arguments)], cwd, {**environment(), "PYTHONPATH": path})
    assert told.returncode == 0, told.stderr
    return told.stdout.splitlines()


def cells(rows: list[str], columns: list[str], size: int) -> list[Cell]:
    """Where the pictures of a sheet are, row by row: found on a sheet of the same labels with plain pictures."""
    found: list[Cell] = []
    for wanted in range(len(rows) * len(columns)):
        colours = ["red" if number == wanted else "white" for number in range(len(rows) * len(columns))]
        plain = [Image.new("RGB", (size, size), colour) for colour in colours]
        sheet = grid([plain[at : at + len(columns)] for at in range(0, len(plain), len(columns))], rows, columns)
        red = sheet.point(lambda value: 255 * (value == 255)).split()
        box = Image.composite(red[0], Image.new("L", sheet.size), Image.eval(red[1], lambda value: 255 - value)).getbbox()
        assert box is not None
        found.append(box)
    return found


def test_all_of_them_are_run_here() -> None:
    tested = Path(__file__).read_text("utf-8")
    assert {script for script in (path.name for path in EXAMPLES.glob("*.py")) if f'run("{script}"' not in tested} == set()


def test_they_are_short() -> None:
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) >= 4 and max(lengths.values()) < 60, lengths


def test_the_service_answers_in_turn_and_lets_the_last_client_cancel(tmp_path: Path) -> None:
    prompts = ["emoji of a red apple", "emoji of a cat"]
    lines = run("service.py", *prompts, "--count", 4, "--steps", 1, "--output", tmp_path / "pictures", cwd=tmp_path)
    first, last = (
        sorted((tmp_path / "pictures").glob(f"{name}-*.png")) for name in ("emoji-of-a-red-apple", "emoji-of-a-cat")
    )
    assert [recipe.read(path).seed for path in first] == list(range(4))
    assert 1 <= len(last) < 4, "the pictures that were done before it was stopped are there, and no others"
    assert lines == [
        *map(str, first), f"{prompts[0]}: finished",
        *map(str, last), f"{prompts[1]}: stopped, stopped after {len(last)} of 4 pictures",
    ]  # fmt: skip


def test_the_sheet_shows_one_adapter_at_every_strength(folder: Path, tmp_path: Path) -> None:
    prompts, strengths = ["openmoji emoji of a cat", "openmoji emoji of a key"], ["0", "3"]
    flags = ["--folder", folder, "--train-steps", 2, "--steps", 2, "--output", "sheet.png"]
    run("strength_sweep.py", "--prompts", *prompts, "--strengths", *strengths, *flags, cwd=tmp_path)
    assert load_file(tmp_path / "openmoji.safetensors")
    labels = [*(f"strength {strength}" for strength in strengths), "from 0 to 1 over the steps"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        drawn = [sheet.convert("RGB").crop(cell) for cell in cells(prompts, labels, 128)]
    assert len(drawn) == 6 and all(picture.size == (128, 128) for picture in drawn)
    assert all(one.tobytes() != other.tobytes() for one, other in combinations(drawn, 2))


def test_a_method_of_ones_own_learns_and_draws(folder: Path, tmp_path: Path) -> None:
    run("own_method.py", folder, "--steps", 2, "--resolution", 64, cwd=tmp_path)
    tensors = load_file(tmp_path / "ssf.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"ssf_scale", "ssf_shift"}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    told = recipe.read(tmp_path / "ssf.png")
    assert told.plugins == ("own_method",) and Path(told.adapters[0].path).name == "ssf.safetensors"
    spec = pd.inspect(tmp_path / "ssf.safetensors").spec
    assert spec is not None
    (method,) = spec.methods["unet"]
    assert (method["method"], method["plugin"]) == ("ssf", "own_method")


def test_a_training_from_python_is_watched_stopped_and_goes_on(folder: Path, tmp_path: Path) -> None:
    lines = run("train_from_python.py", folder, "--steps", 4, "--stop-after", 2, cwd=tmp_path)
    assert "base icons: other, epsilon, 128 pixels" in lines
    assert [line.partition(":")[0] for line in lines if ": loss 0" in line] == [f"step {step}" for step in (1, 2, 3, 4)]
    assert any(line.startswith("stopped after step 2 of 4") for line in lines) and "going on from step 2 of 4" in lines
    assert "wrote the adapter style.safetensors" in lines and lines[-1].startswith("4 steps in ")
    assert load_file(tmp_path / "style.safetensors")
