"""What people get wrong, by the real command: one clear line on stderr, exit code 1 or 2, nothing half-written."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from making import command, environment, make_adapter
from PIL import Image
from safetensors.torch import load_file, save_file

from peft_diffusion.core.errors import UserError
from peft_diffusion.data.prompts import refuse_files

FAILED, USAGE = 1, 2


@pytest.fixture(scope="module")
def ink(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("ink") / "ink.safetensors", tiny_base, 1)


def complaint(code: int, *arguments: object, folder: Path, first: str = "") -> str:
    """Run a command that must fail with that exit code; returns its one line. It must leave the folder as it was.

    ``first`` is Python for its process to run before it.
    """
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run = f"{first}\nimport runpy\nrunpy.run_module('peft_diffusion', run_name='__main__', alter_sys=True)"
    line = ["-c", run] if first else ["-m", "peft_diffusion"]
    done = forked.python([*line, *map(str, arguments)], folder, environment())
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return done.stderr


USAGES = {
    "generate a --adaptor x": "--adaptor. Did you mean --adapter?",
    "generate a --steps many": 'Invalid value for --steps: unable to convert "many" into int',
    "generate a --steps 1.5": '"1.5" is no whole number',
    "generate a --seeds 1 x": "--seeds",
    "generate a --quantize int4": "--quantize is one of nf4, int8, not 'int4'; did you mean 'int8'?",
    "generate a --output": "--output requires an argument",
    "train pictures --lr 1e-4": "Unknown option: --lr. Here it is --unet-lr.",
    "train --train_data_dir=pictures": "Unknown option: --train_data_dir. Here it is FOLDER, without a flag.",
    "generate a --num-inference-steps 20": "Unknown option: --num-inference-steps. Here it is --steps.",
    "generate a --cfg 7": "Unknown option: --cfg. Here it is --guidance.",
    "blend a --calibrate": "Unknown option: --calibrate. That is the default here; leave it away, or take --plain for the",
    "generate a --hr_scale 2": "Unknown option: --hr_scale. Here it is --hires.",
    "generate a --subseed 2": "Unknown option: --subseed. Here it is --variation-seed.",
    "train pictures --sample_every_n_steps=5": "Unknown option: --sample_every_n_steps. Here it is --preview-every.",
    "resize a -o c --model b": "Unknown option: --model. Here it is FILE, without a flag.",
    "resize a -o c --dynamic_method sv_fro": "Unknown option: --dynamic_method. Here it is --ratio or --energy or",
    "merge --models a --save_to b": "Unknown option: --models. Here it is FILES, without a flag.",
    "extract a --model_org b": "Unknown option: --model_org. Here it is ORIGINAL, without a flag.",
    "blent a": 'Did you mean "blend"?',
    "inspect": "--files requires an argument",
}


@pytest.mark.slow
@pytest.mark.parametrize(("line", "said"), USAGES.items())
def test_a_wrong_command_line(line: str, said: str, tmp_path: Path) -> None:
    assert said in complaint(USAGE, *line.split(), folder=tmp_path)


VALUES = {
    "generate": "there is no prompt",
    "generate a --scheduler magic": "there is no scheduler 'magic'; there are: ddim, pndm, euler, euler-a, lms, heun, dpm2,",
    "merge a b -o c --density 0.3": "--density does nothing without --how ties, dare-ties, dare-linear or magnitude",
    "merge a b -o c --how ties --within magnitude": "--within does nothing without --how knots or core-space",
    "merge a b -o c --how knots --seed 1": "--seed does nothing without DARE",
    "merge a b -o c --into d --to diffusers": "--to does nothing without an adapter file to write",
    "convert a b --errors": "--errors is for --to-lora alone",
    "inspect a --base sd1": "--base is for --verify, --norms and --plot",
    "extract a b -o c --rank 2 --to sgm": "there is no layout 'sgm'",
    "generate a --steps 0": "--steps must be 1 or more, not 0",
    "generate a --width 64000": "--width must be 1 or more, at most 16384, not 64000",
    "train pics --resolution 64000": "--resolution must be 1 or more, at most 8192, not 64000",
    "generate a --guidance nan": "guidance must be a finite number",
    "generate a --seed -1": "--seed must be 0 or more, at most 9223372036854775807, not -1",
    "generate a --output a.jfif": "pictures are written as .png, .jpg, .jpeg, .webp",
    "generate a --output a.heic": "pictures are written as .png",
    "generate a --output a.png --format webp": "a.png is no name of a webp file",
    "generate a --output a.png --quality 80": "--quality is for JPEG and WebP, and a.png is neither",
    "generate a --quality 80": "--quality is for JPEG and WebP: take --format",
    "generate a --adapter missing.safetensors": "there is no adapter file missing.safetensors",
    "generate a --adapter missing.safetensors=0.5": "there is no adapter file missing.safetensors",
    "generate a --adapter k=v/missing": "there is no adapter file k=v/missing",
    "generate a --adapter https://x.org/a.safetensors": "nothing is fetched from an address: download the file",
    "generate a --base https://x.org/a.safetensors": "nothing is fetched from an address: download the file",
    "inspect https://x.org/a.safetensors": "nothing is fetched from an address: download the file",
    "generate a --base nowhere": "there is no base 'nowhere'",
    "generate --recipe missing.png": "there is no picture missing.png",
    "blend a": "a blend needs two adapters",
    "inspect missing.safetensors": "there is no file missing.safetensors",
    "generate a --config missing.toml": "missing.toml cannot be read: No such file",
}


@pytest.mark.slow
@pytest.mark.parametrize(("line", "said"), VALUES.items())
def test_a_value_that_cannot_be_used(line: str, said: str, tmp_path: Path) -> None:
    assert said in complaint(FAILED, *line.split(), folder=tmp_path)


@pytest.mark.slow
def test_a_file_of_prompts_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog --w 64\n")
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pics" / "a cat.png")
    for line in ("generate prompts.txt", "text generate prompts.txt", "train pics --preview-prompts prompts.txt"):
        said = complaint(FAILED, *line.split(), folder=tmp_path)
        instead = {"generate": "read it with --prompts-file", "train": "read it with --preview-prompts-file"}.get(
            line.split()[0], "give each prompt in quotes"
        )
        assert f"the prompt 'prompts.txt' is a file, whose lines are not read; {instead}" in said


def test_an_adapter_is_no_prompt(tmp_path: Path) -> None:
    ink = tmp_path / "ink wash.safetensors"
    ink.touch()
    for prompt in (str(ink), f"{ink}=0.5"):
        with pytest.raises(UserError, match="is an adapter; name each with a flag of its own, as in --adapter FILE"):
            refuse_files(["a cat", prompt])
    refuse_files(["a cat", str(tmp_path / "gone.safetensors"), "a = b", f"{'a' * 300}.safetensors"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_pipe_that_is_named_by_hand_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for line in ("generate a --config pipe", "text train pipe", "text train . --held-out-text pipe"):
        (tmp_path / "a.txt").write_text("a cat " * 20)
        assert "pipe is no regular file, but a pipe or a device" in complaint(FAILED, *line.split(), folder=tmp_path)
    written = "text train a.txt --overwrite --output pipe.safetensors"
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "pipe.safetensors is no regular file, so it cannot be" in complaint(FAILED, *written.split(), folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strength", ["abc", "nan", "inf", "-inf", "", "1,5", "0x10"])
def test_a_strength_that_is_no_number(ink: Path, strength: str, tmp_path: Path) -> None:
    said = complaint(FAILED, "generate", "a", "--adapter", f"{ink}={strength}", folder=tmp_path)
    assert f"the strength of {ink} must be a" in said
    assert repr(strength) in said or said.endswith(f"not {strength}\n")


SETTINGS = {
    "steps = 3\nstepz = 4\n": "run.toml: there is no setting 'stepz' of this command; did you mean 'steps'?",
    "config = 'other.toml'\n": "no setting 'config'",
    "steps = 3\nguidance = = 2\n": "run.toml is no valid TOML: Invalid value (at line 2, column 12)",
    "steps = [3]\n": "'steps' takes one value, not a list",
    "steps = true\n": "'steps' takes a value, not True",
    "[generate]\nsteps = 3\n": "no setting 'generate'",
    "[steps]\nmany = 3\n": "'steps' is a table",
}


@pytest.mark.parametrize(("text", "said"), SETTINGS.items())
def test_wrong_settings(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert said in complaint(FAILED, "generate", "a", "--config", "run.toml", folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no_debiased = true", "no setting 'no_debiased' of this command; did you mean debiased = false?"),
        ("no-cuda-graph = false", "no setting 'no-cuda-graph' of this command; did you mean cuda_graph = true?"),
    ],
)
def test_negative_flags_are_no_settings(text: str, said: str, tmp_path: Path) -> None:
    encoding = "utf-8" if "debiased" in text else "utf-16-le"  # as some editors begin a file, and as PowerShell writes one
    (tmp_path / "run.toml").write_text(f"\ufefffolder = ['x']\n{text}\n", encoding)
    assert said in complaint(FAILED, "train", "--config", "run.toml", folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('folder = "C:\\Users\\me"', "takes single quotes: folder = 'C:\\Users\\me'"),
        (
            "[general]\n[[datasets]]\nresolution = 512",
            "a dataset file of sd-scripts is given as --dataset-config",
        ),
        ('folder = "a\\u0000b"', "--folder 'a\\x00b' holds the character of number 0, which no path has"),
        ("learning_rate = 1e-4", "no setting 'learning_rate' of this command; here it is unet_lr"),
        ('"" = 1', "no setting ''"),
    ],
)
def test_habits_of_other_programs_in_a_file(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert said in complaint(FAILED, "train", "--config", "run.toml", folder=tmp_path)


def test_what_a_command_does_unless_the_contrary_is_said_is_told_where_it_is_asked_for_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("calibrate = true")
    told = complaint(FAILED, "blend", "a", "--config", "run.toml", folder=tmp_path)
    assert "no setting 'calibrate' of this command; that is the default here: leave it away, or take plain = true" in told


def test_a_strength_as_other_programs_write_it(ink: Path, tmp_path: Path) -> None:
    said = complaint(FAILED, "generate", "a", "--adapter", f"{ink}:0.8", folder=tmp_path)
    assert f"a strength follows an =, as in {ink}=0.8" in said


@pytest.mark.slow
def test_the_home_folder_is_found_where_no_shell_has_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    for arguments in (
        ["inspect", "--files=~/a.safetensors"],
        ["train", "~/pictures"],
        ["train", "--config=~/run.toml"],
        ["generate", "a", "-a=~/a.safetensors"],
    ):
        assert str(tmp_path / "home") in complaint(FAILED, *arguments, folder=tmp_path / "work")
    (tmp_path / "home" / "base").mkdir(parents=True)
    said = complaint(FAILED, "generate", "a", "--base", "~/base", folder=tmp_path / "work")
    assert f"{tmp_path / 'home' / 'base'} is no diffusers folder" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"), [("steps = 1.5", '"1.5" is no whole number'), ("steps = 'x'", "Invalid value for [steps] from")]
)
def test_settings_of_another_type(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert said in complaint(USAGE, "generate", "a", "--config", "run.toml", folder=tmp_path)


def hostile(ink: Path) -> dict[str, tuple[bytes, str]]:
    """Files that are not what they say, by name, and what is said of them."""
    good = ink.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    tensors = [name for name in header if name != "__metadata__"]

    def changed(**values: Any) -> bytes:
        text = json.dumps({**header, tensors[0]: {**header[tensors[0]], **values}}).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]

    return {
        "empty": (b"", "is no safetensors file"),
        "cut_header": (good[:100], "is truncated"),
        "cut_data": (good[:-100], ""),
        "huge_header": (struct.pack("<Q", 2**62) + good[8:], "is no safetensors file"),
        "long_header": (struct.pack("<Q", 50_000_000) + good[8:], "is truncated"),
        "no_json": (good[:8] + b"\xff" * length + good[8 + length :], "its header cannot be read"),
        "list": (struct.pack("<Q", 2) + b"[]", "its header cannot be read"),
        "deep": (struct.pack("<Q", 200_000) + b"[" * 200_000, "its header cannot be read"),
        "offsets_beyond": (changed(data_offsets=[0, 2**40]), ""),
        "offsets_swapped": (changed(data_offsets=[64, 0]), ""),
        "negative_shape": (changed(shape=[-4, 32]), ""),
        "wrong_dtype": (changed(dtype="Q9"), ""),
    }


CASES = (
    "empty", "cut_header", "cut_data", "huge_header", "long_header", "no_json", "list", "deep", "offsets_beyond",
    "offsets_swapped", "negative_shape", "wrong_dtype",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file(ink: Path, case: str, tmp_path: Path) -> None:
    content, said = hostile(ink)[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    commands: tuple[tuple[str, ...], ...] = (("inspect",), ("generate", "a", "--adapter"))
    for arguments in commands:
        line = complaint(FAILED, *arguments, "bad.safetensors", folder=tmp_path)
        assert "bad.safetensors" in line
        assert said in line


@pytest.mark.slow
def test_a_file_that_is_no_adapter(tmp_path: Path) -> None:
    save_file({"model.layer.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.safetensors")
    for arguments in (("inspect",), ("generate", "a", "--adapter")):
        said = complaint(FAILED, *arguments, "model.safetensors", folder=tmp_path)
        assert "is no adapter" in said
        assert "model.layer.weight" in said
        assert "picture.safetensors" in complaint(FAILED, *arguments, "picture.safetensors", folder=tmp_path)


@pytest.mark.slow
def test_a_picture_without_a_recipe(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert "a.png carries no recipe" in complaint(FAILED, "generate", "--recipe", "a.png", folder=tmp_path)
    assert "b.png cannot be read as a PNG, JPEG" in complaint(FAILED, "generate", "--recipe", "b.png", folder=tmp_path)


@pytest.mark.slow
def test_an_adapter_of_another_base(ink: Path, other_base: Path, tmp_path: Path) -> None:
    said = complaint(FAILED, "generate", "a", "--adapter", ink, "--base", other_base, "-o", "a.png", folder=tmp_path)
    assert "was made for base 'tiny'" in said
    assert "this base is 'other'" in said


@pytest.mark.slow
def test_an_adapter_with_numbers_that_are_none(ink: Path, tiny_base: Path, tmp_path: Path) -> None:
    tensors = load_file(ink)
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, tmp_path / "bad.safetensors")
    said = complaint(FAILED, "generate", "a", "--adapter", "bad.safetensors", "--base", tiny_base, folder=tmp_path)
    place = name.removeprefix("lora_te_text_model_").removeprefix("lora_unet_").split(".")[0]
    assert (f"tensor {name} holds NaN" in said) or (place in said.replace(".", "_") and "is NaN or infinite" in said)


@pytest.mark.parametrize("output", ["plain/a.png", "plain/folder", "/dev/null", "/dev/full/a.png", "there"])
@pytest.mark.skipif(os.name == "nt", reason="other device names")
def test_an_output_that_cannot_be(output: str, ink: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file")
    (tmp_path / "there").mkdir()
    made = ["--output", output] if output != "there" else ["--sheet", output + ".png/a.png"]
    (tmp_path / "there.png").write_text("a file")
    said = complaint(FAILED, "generate", "a", *made, folder=tmp_path)
    assert "is a file" in said or "no regular file" in said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no limit on a file's size to stand for a full disk")
def test_a_disk_that_fills_up(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"the old one")
    # Bytes; a picture of 64 pixels needs more. Python would cut what it compiles off there too, for every later process.
    limit = "import resource, sys\nsys.dont_write_bytecode = True\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    arguments = ("generate", "a", "--base", tiny_base, "--steps", 1, "--output", "a.png")
    assert "a.png cannot be written: File too large" in complaint(FAILED, *arguments, folder=tmp_path, first=limit)


@pytest.mark.slow
def test_a_layer_that_the_text_encoder_does_not_have(tiny_base: Path, tmp_path: Path) -> None:
    told = ("generate", "a cat", "--base", tiny_base, "--output", "a.png", "--clip-skip", 3)
    said = complaint(FAILED, *told, folder=tmp_path)
    assert "clip skip 3 is more than the 2 layers of the base's text encoder" in said


@pytest.mark.slow
def test_a_file_that_is_not_used_whole_is_told_and_with_strict_refused(ink: Path, tiny_base: Path, tmp_path: Path) -> None:
    tensors = load_file(ink)
    tensors["lora_unet_nowhere.alpha"] = torch.ones(())
    tensors["lora_unet_conv_out.lora_what"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "part.safetensors")
    drawn = ("generate", "a", "--adapter", "part.safetensors", "--base", tiny_base, "--steps", 1, "-o", "a.png")
    said = complaint(FAILED, *drawn, "--strict", folder=tmp_path)
    assert "would not be used whole" in said
    assert "lora_unet_nowhere.alpha" in said and "lora_unet_conv_out.lora_what" in said
    looked = command("inspect", "part.safetensors", "--strict", cwd=tmp_path)
    assert looked.returncode == FAILED and "lora_unet_conv_out.lora_what" in looked.stderr and "lora" in looked.stdout
    done = command(*drawn, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"2 of {len(tensors)} tensors are of no method") == 1
    assert command("inspect", ink, "--strict", cwd=tmp_path).returncode == 0
