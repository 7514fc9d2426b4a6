"""The command line as a person meets it: real processes."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from making import command, environment, make_adapter, typed
from PIL import Image
from rich.console import Console

import peft_diffusion
from peft_diffusion import bases, formats, generation, training
from peft_diffusion.cli import lean
from peft_diffusion.cli.app import main
from peft_diffusion.cli.commands import COMMANDS
from peft_diffusion.cli.parser import app
from peft_diffusion.generation import recipe

ROOT = Path(__file__).parent.parent

# Each is done after all before it: what one of them imported would stay.
LOOKING_AROUND = """
import sys
HEAVY = {'torch', 'diffusers', 'transformers', 'matplotlib', 'cyclopts', 'rich'}
for code in sys.argv[1:]:
    exec(code)
    print('imported', sorted(HEAVY & set(sys.modules)), code, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [make_adapter(folder / f"{name}.safetensors", tiny_base, seed) for seed, name in enumerate(("ink", "flat"))]


@pytest.mark.slow
def test_looking_around_imports_nothing_heavy() -> None:
    codes = [
        "import peft_diffusion",
        "from peft_diffusion import GenerateConfig, TrainConfig, UserError, inspect",
        *(f"from peft_diffusion.cli.app import main; main({[*name, '--help']})" for name in ([], *([c] for c in COMMANDS))),
    ]
    done = subprocess.run([sys.executable, "-c", LOOKING_AROUND, *codes], capture_output=True, text=True, env=environment())
    assert done.stderr.splitlines() == [f"imported [] {code}" for code in codes]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "modules"),
    [
        (["-c", "import peft_diffusion"], 55),
        (["-m", "peft_diffusion", "--help"], 135),
        (["-m", "peft_diffusion", "train", "--help"], 185),
        (["-m", "peft_diffusion", "generate", "--help"], 215),
    ],
)
def test_looking_around_imports_few_modules(arguments: list[str], modules: int) -> None:
    # What is imported decides how long this takes, the same on every machine; scripts/benchmark_start.py tells seconds.
    # Without site (-S), whose .pth files import what the machine has installed: 70 modules more in some environments. The
    # versions of Python from 3.11 to 3.13 differ by 4 at most.
    line = [sys.executable, "-S", "-X", "importtime", *arguments]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment(), cwd=ROOT)
    imported = [told.split("|")[-1].strip() for told in done.stderr.splitlines() if told.startswith("import time:")]
    assert 20 < len(imported) <= modules, sorted(imported)


@pytest.mark.slow
def test_garbage_is_looked_for_less_often_in_a_process_that_is_the_commands_own() -> None:
    code = (
        "import gc; from peft_diffusion.cli.app import main, run_process; found = [gc.get_threshold()[0]];"
        "[(run(['--version']), found.append(gc.get_threshold()[0])) for run in (main, run_process)]; print(*found)"
    )
    before, in_a_program, alone = map(int, forked.python(["-c", code], None, environment()).stdout.split()[-3:])
    assert before == in_a_program < alone


def test_every_public_name_is_there() -> None:
    assert {name: getattr(peft_diffusion, name) is not None for name in peft_diffusion.__all__} == dict.fromkeys(
        peft_diffusion.__all__, True
    )
    assert callable(peft_diffusion.train)
    assert callable(peft_diffusion.blend)
    assert set(peft_diffusion.__all__) <= set(dir(peft_diffusion))


# mypy holds the other half: an ignore where it would take the name is an error, as `strict` warns of unused ones.
NAMES_THAT_ARE_NOT_THERE: tuple[Callable[[], object], ...] = (
    lambda: peft_diffusion.nothing,  # type: ignore[attr-defined]
    lambda: bases.nothing,  # type: ignore[attr-defined]
    lambda: formats.nothing,  # type: ignore[attr-defined]
    lambda: generation.nothing,  # type: ignore[attr-defined]
    lambda: training.nothing,  # type: ignore[attr-defined]
)


@pytest.mark.parametrize("look_up", NAMES_THAT_ARE_NOT_THERE)
def test_a_name_that_is_not_there_is_refused_at_once_and_by_a_type_checker(look_up: Callable[[], object]) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        look_up()


def test_a_program_that_calls_main_keeps_its_own_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "speaks.py").write_text("import logging; logging.getLogger('peft_diffusion.speaks').warning('a plug-in')\n")
    log = logging.getLogger("peft_diffusion")
    before = list(log.handlers), log.level, log.propagate
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.delitem(sys.modules, "speaks", raising=False)
        assert main(["inspect", "--plugin", "speaks", str(tmp_path / "none.safetensors")]) == 1
    assert "note: a plug-in" in capsys.readouterr().err and not caplog.records
    assert (log.handlers, log.level, log.propagate) == before
    log.warning("the program's own")
    assert [record.getMessage() for record in caplog.records] == ["the program's own"]


@pytest.mark.slow
def test_version_and_help() -> None:
    assert typed("--version").stdout.strip() == peft_diffusion.__version__
    told = typed("--help")
    assert told.returncode == 0
    assert all(name in told.stdout for name in COMMANDS)
    assert all(flag in command("generate", "--help").stdout for flag in ("--adapter", "--config", "--debug", "--seeds"))


@pytest.mark.slow
def test_help_is_that_of_the_command_whatever_else_is_on_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> str:
        main(words)
        return capsys.readouterr().out

    assert told("train", "--help") == told("--config", "no.toml", "train", "--lr", "no number", "--nonsense", "-h")
    assert "FOLDER" in told("--help", "train") and "FOLDER" not in told("--help")
    assert "Usage" not in told("runs", "--", "--help")  # a folder of this name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "train", "generate", "runs", "metadata", "strength"])
def test_help_tells_what_cyclopts_reads(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*name.split(), "--help"]) == 0
    told = capsys.readouterr().out.partition("\n\nMethods")[0]
    app.help_print(name.split(), console=Console(width=100, color_system=None, force_terminal=False))
    assert [line.rstrip() for line in told.rstrip().splitlines()] == [
        line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()
    ]


def test_help_has_colours_on_a_terminal_and_no_drawn_lines_where_there_are_no_letters_for_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["strength", "--help"]) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["strength", "--help"]) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[36mFILE --file" in coloured and re.sub(r"\x1b\[\d*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["strength", "--help"]) == 0
    assert capsys.readouterr().out == plain
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    assert main(["strength", "--help"]) == 0
    assert narrow.buffer.getvalue().decode() == plain.translate(str.maketrans("╭╮╰╯─│", "++++-|"))


@pytest.mark.parametrize("name", ["", "text", "metadata", "compose"])
def test_a_name_without_a_command_below_it_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(name.split()) == 0
    told = capsys.readouterr().out
    assert main([*name.split(), "--help"]) == 0
    assert capsys.readouterr().out == told and " COMMAND [OPTIONS]" in told
    assert main([*name.split(), "nonsense"]) == 2


@pytest.mark.slow
def test_inspect_tells_what_a_file_holds_and_whether_two_fit(files: list[Path]) -> None:
    told = command("inspect", *files)
    assert told.returncode == 0
    for words in ("lora", "unet 40", "tiny", "attention+ff", "images 48, steps 300, held-out loss 0.125", "fit together"):
        assert words in told.stdout, words
    plain = json.loads(command("inspect", "--json", *files).stdout)
    assert [one["ranks"] for one in plain["files"]] == [{"4": 52}] * 2
    assert plain["fits"][0]["verdict"] == "yes"
    assert plain["files"][0]["spec"]["training"]["images"] == 48


@pytest.mark.slow
def test_settings_from_a_file_and_flags_over_them(files: list[Path], tmp_path: Path) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(f"files = [{json.dumps(str(files[0]))}]\njson = true\n")
    assert [one["path"] for one in json.loads(command("inspect", "--config", settings).stdout)["files"]] == [str(files[0])]
    told = json.loads(command("inspect", files[1], f"--config={settings}").stdout)
    assert [one["path"] for one in told["files"]] == [str(files[1])]


@pytest.mark.slow
def test_a_file_of_settings_holds_for_one_command(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.toml").write_text("colour = 'red'\n")
    assert main(["inspect", "--config", str(tmp_path / "bad.toml")]) == 1
    assert "no setting 'colour'" in capsys.readouterr().err
    app.parse_args(["inspect", str(files[0])], exit_on_error=False, print_error=False)  # raises if the file is still read


# A command, and after it which of the packages that libraries would import besides are there.
WITH_PACKAGES = """
import sys
from peft_diffusion.cli.app import run_process
code = run_process(sys.argv[1:])
from diffusers.utils import is_peft_available
found = {'bitsandbytes', 'torchao', 'peft'} & set(sys.modules)
sys.exit(code or repr((is_peft_available(), bool(found))))
"""


def drawn_anew(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a new interpreter, all of it from its first import; its last line tells of packages."""
    line = [sys.executable, "-c", WITH_PACKAGES, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_generate_writes_pictures_that_carry_their_recipe_and_needs_no_package_besides(
    files: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "run.toml"
    lines = [f"base = '{tiny_base}'", "steps = 9", "batch-size = 2", f"adapter = ['{files[0]}=0.5']", 'negative = "a dog"']
    settings.write_text("\n".join(lines))
    flags = ["--config", settings, "--steps", 2, "--seed", 5, "--sheet", "s.png"]
    told = drawn_anew("generate", "a cat", "a house", *flags, cwd=tmp_path)
    assert told.stderr == "(False, False)\n"
    assert told.stdout.split() == ["pictures/a-cat-5.png", "pictures/a-house-5.png", "s.png"]
    made = recipe.read(tmp_path / "pictures" / "a-house-5.png")
    assert (made.prompt, made.negative, made.steps, made.seed) == ("a house", "a dog", 2, 5)
    assert [(used.path, used.strength) for used in made.adapters] == [(str(files[0]), 0.5)]


@pytest.mark.slow
def test_blend_draws_a_sheet(files: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    settings = ["--adapter", files[0], "-a", f"{files[1]}=0.5", "--base", tiny_base, "--steps", 1, "--columns", 3, "--plain"]
    told = command("blend", "a cat", "a house", *settings, "-o", "out/sheet.png", cwd=tmp_path)
    assert (told.returncode, told.stdout.split()) == (0, ["out/sheet.png"]), told.stderr
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 3 * 64
        rows = json.loads(sheet.info["peft_diffusion"])["sheet"]
    strengths = [[[used["strength"] for used in one["adapters"]] for one in row] for row in rows]
    assert strengths == [[[1.0], [0.5, 0.25], [0.5]]] * 2


@pytest.mark.slow
def test_demo_teaches_two_styles_and_blends_them(tiny_base: Path, tmp_path: Path) -> None:
    told = command("demo", "--base", tiny_base, "--steps", 2, "--output", "shown", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {
        "openmoji.safetensors", "twemoji.safetensors", "styles.png", "blend.png", "runs",
    }  # fmt: skip
    rows = json.loads(Image.open(tmp_path / "shown" / "styles.png").info["peft_diffusion"])["sheet"]
    assert [{used["path"] for one in row for used in one["adapters"]} for row in rows] == [
        set(), {"shown/openmoji.safetensors"}, {"shown/twemoji.safetensors"},
    ]  # fmt: skip
    assert "shown/styles.png" in told.stdout
    learned = command("inspect", "shown/openmoji.safetensors", "shown/twemoji.safetensors", cwd=tmp_path)
    assert "fit together" in learned.stdout


# A shell starts what runs in its background deaf to Ctrl-C, and the tests may run there.
HEARS_CTRL_C = """
import signal, sys
from peft_diffusion.cli.app import run_process
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(run_process())
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process there")
def test_ctrl_c_keeps_the_pictures_that_are_done(tiny_base: Path, tmp_path: Path) -> None:
    more = ["--base", tiny_base, "--steps", "20", "--count", "500", "--batch-size", "1", "--output", "out"]
    started = forked.Started(["-c", HEARS_CTRL_C, "generate", "a cat", *map(str, more)], tmp_path, environment())
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "a-cat-0.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.process.pid is not None
    os.kill(started.process.pid, signal.SIGINT)
    ended = started.wait(60)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")
    made = list((tmp_path / "out").iterdir())
    assert made
    assert all(recipe.read(path).prompt == "a cat" for path in made)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="pipes break in another way there")
def test_a_reader_that_goes_is_no_error(files: list[Path]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "-m", "peft_diffusion", "inspect", "--json", *map(str, files)]
    done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment())
    os.close(writing)
    assert done.stderr == ""


@pytest.mark.slow
def test_what_a_base_of_fewer_bits_needs_is_there(tiny_base: Path, tmp_path: Path) -> None:
    """Libraries look for packages once, when they are imported."""
    flags = ["--base", tiny_base, "--steps", 1, "--device", "cpu", "-o", "a.png", "--quantize", "int8"]
    done = drawn_anew("generate", "a", *flags, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "(True, True)" and (tmp_path / "a.png").is_file()


def test_a_base_is_plain_where_it_is_here_and_not_of_fewer_bits(tiny_base: Path, tmp_path: Path) -> None:
    """Those that are not may need any of the packages."""
    assert all(lean._is_plain(base) for base in ("icons", str(tiny_base), str(tiny_base / "model_index.json")))
    config = tmp_path / "unet" / "config.json"
    config.parent.mkdir()
    config.write_text("{}")
    assert lean._is_plain(str(tmp_path))
    config.write_text('{"quantization_config": {}}')
    assert not any(lean._is_plain(base) for base in (str(tmp_path), str(tmp_path / "unet"), "owner/name"))
