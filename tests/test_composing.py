"""Learned compositions: what a training of strengths and gates gives, how it is drawn with, and what is refused."""

import json
import math
import shlex
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peft_diffusion as pd
from peft_diffusion import Adapters, ComposeTrainConfig, GenerateConfig, UserError, formats, generate
from peft_diffusion.bases import denoiser_of, describe
from peft_diffusion.cli.app import main
from peft_diffusion.core import site
from peft_diffusion.core.errors import Interrupted
from peft_diffusion.core.events import Event, Observer, Warned
from peft_diffusion.core.learned_kinds import LEARNED_KINDS
from peft_diffusion.core.learned_strengths import KINDS, Gates, StrengthTable, imbalance, pooled
from peft_diffusion.formats import composition, plan
from peft_diffusion.formats.spec import KEY
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training.events import HeldOut, Step
from peft_diffusion.training.record import run_record
from peft_diffusion.training.record.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("few_measurements", "no_plots")
STEPS, GUIDANCE = 3, 2.0
PROMPTS = ("ink, a cat", "flat, a house")


def one_step(path: Path, base: Path, name: str, size: float) -> None:
    """A LoRA of the UNet that went one step against the gradient of the loss, or with it, and a random one of the text
    encoder."""
    pipe = pd.load_base(str(base), device="cpu")
    torch.manual_seed(0)
    for part in (pipe.unet, pipe.text_encoder):
        site.attach(part, name, Lora(rank=4), "attention+ff")
    latents, noise = torch.randn(2, 8, 4, 8, 8)
    times = torch.arange(50, 1000, 120)
    noisy = pipe.scheduler.add_noise(latents, noise, times)
    hidden = pipe.encode_prompt([f"{name}, a cat"] * 8, pipe.device, 1, False)[0].detach()
    torch.nn.functional.mse_loss(pipe.unet(noisy, times, hidden).sample, noise).backward()
    ups = [one.get_parameter("up") for one in site.adapters(pipe.unet, name).values()]
    gradients = [torch.zeros_like(up) if up.grad is None else up.grad for up in ups]
    norm = torch.stack([one.norm() for one in gradients]).norm()
    for up, gradient in zip(ups, gradients, strict=True):
        up.data = -size * gradient / norm
    for adapter in site.adapters(pipe.text_encoder, name).values():
        torch.nn.init.normal_(adapter.get_parameter("up"), std=0.5)
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    methods = {one: ({**Lora(rank=4).spec(), "target": "attention+ff"},) for one in parts}
    spec = formats.Spec(methods, asdict(describe(pipe)), (name,), {"trigger": name})
    formats.save(path, parts, name, spec)


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with few pictures each: flat helps at any of them, and ink hurts."""
    place = tmp_path_factory.mktemp("composing")
    for name, size in (("ink", -2.0), ("flat", 2.0)):
        one_step(place / f"{name}.safetensors", tiny_base, name, size)
        (place / name).mkdir()
        for number in range(3 if name == "ink" else 1):
            chance = torch.Generator().manual_seed(number)
            pixels = torch.randint(0, 256, (64, 64, 3), generator=chance, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / name / f"{number}.png")
            (place / name / f"{number}.txt").write_text(f"a {('cat', 'dog', 'house')[number]}")
    return place


def asked(folder: Path, base: Path, kind: str, output: str, **more: Any) -> ComposeTrainConfig:
    return ComposeTrainConfig(
        (folder / "ink.safetensors", folder / "flat.safetensors"), data=(folder / "ink", folder / "flat"), kind=kind,
        base=str(base), output=folder / output, run_dir=folder / "runs" / output, steps=8, batch_size=2, lr=0.1,
        device="cpu", **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(folder: Path, tiny_base: Path, no_plots: None) -> dict[str, Path]:
    """What both kinds learn, one of them by the command."""
    command = ["compose", "train", folder / "ink.safetensors", folder / "flat.safetensors", "--data", folder / "ink",
               "--data", folder / "flat", "--kind", "gates", "--base", tiny_base, "-o", folder / "gates.safetensors",
               "--run-dir", folder / "runs" / "gates", "--steps", 8, "--batch-size", 2, "--lr", 0.1,
               "--device", "cpu"]  # fmt: skip
    assert main(list(map(str, command))) == 0
    return {
        "gates": folder / "gates.safetensors",
        "strengths": pd.train_composition(asked(folder, tiny_base, "strengths", "strengths.safetensors")).output,
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_hurts_is_weighed_less(kind: str, files: dict[str, Path], folder: Path) -> None:
    told = composition.read(files[kind])
    assert [one.file for one in told.adapters] == ["ink.safetensors", "flat.safetensors"]
    assert [one.sha256 for one in told.adapters] == [plan(folder / one.file).sha256 for one in told.adapters]
    assert told.adapters[0].triggers == ("ink",) and told.kind == kind
    ink, flat = told.training["mean_strengths"]
    assert ink < 0.4 and flat > 0.6
    assert all(after < before for after, before in zip(told.training["loss"], told.training["loss_before"], strict=True))
    assert all("attentions" in block or block == "mid_block" for block in told.blocks)
    assert files[kind].stat().st_size < 40_000
    with pytest.raises(UserError, match="composes adapters and is none; give it with --compose-file"):
        plan(files[kind])


def test_the_same_seed_gives_the_same_file_and_a_lent_base_is_left_as_it_was(
    files: dict[str, Path], folder: Path, tiny_base: Path
) -> None:
    pipe = pd.load_base(str(tiny_base), device="cpu")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    first = asked(folder, tiny_base, "strengths", "again.safetensors")
    result = pd.train_composition(first, pipe=pipe)
    again = result.output
    assert "--adapter" not in result.next_command  # they lie beside it
    assert again.read_bytes() == files["strengths"].read_bytes()
    again.unlink()
    assert Adapters(pipe).names == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def stopped_at(step: int, config: ComposeTrainConfig, pipe: Any) -> str:
    """Stop a run after a step; what it says then."""
    stop = threading.Event()

    def told(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            stop.set()

    with pytest.raises(Interrupted) as said:
        pd.train_composition(config, pipe=pipe, observers=[told], stop=stop)
    return str(said.value)


@pytest.mark.slow
def test_what_is_kept_apart_is_measured_with_each_checkpoint(
    folder: Path, tiny_pipe: Any, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not learned from: two of ink's three pictures, as flat has one alone, which is told. What is proposed then can
    be typed."""
    config = asked(folder, tiny_base, "strengths", "away/apart.safetensors", held_out=0.5, save_every=4)
    events: list[Event] = []
    result = pd.train_composition(config, pipe=tiny_pipe, observers=[events.append])
    (at_start,) = [event.lines()[0] for event in events if isinstance(event, HeldOut)]
    assert at_start.startswith("2 pictures kept apart, 2 of ink, none of flat: ")
    record = run_record.only(result.run_dir)
    measured = dict(record.curve("held_out_loss"))
    assert list(measured) == [0, 4, 8]
    assert result.held_out_after is not None and result.held_out_before is not None
    assert measured[8] == result.held_out_after < result.held_out_before
    assert "pictures kept apart, 2 of ink, none of flat: loss " in "\n".join(result.lines())
    assert "2 of them are kept apart to measure on, 2 of ink, none of flat" in (result.run_dir / "report.html").read_text()
    assert main(["inspect", str(result.output)]) == 0
    told = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert f"held-out loss {result.held_out_after:.4f}" in told
    assert shlex.split(result.next_command)[2] in ("flat, ink, a cat", "flat, ink, a dog", "flat, ink, a house")
    typed = [*shlex.split(result.next_command)[1:], "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "a.png")]
    assert main(typed) == 0 and (tmp_path / "a.png").exists()
    with pytest.raises(UserError, match=r"--held-out was 0\.5, now 0"):
        pd.train_composition(replace(config, held_out=0.0, resume=True, steps=9), pipe=tiny_pipe)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_to_the_same_file(
    kind: str, files: dict[str, Path], folder: Path, tiny_pipe: Any, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = asked(folder, tiny_base, kind, f"on_{kind}.safetensors", save_every=3)
    said = stopped_at(5, config, tiny_pipe)
    assert config.run_dir is not None and config.output is not None and not config.output.exists()
    settings = str(config.run_dir / "config.toml")
    assert said == (f"stopped after step 5 of 8; go on with: peft-diffusion compose train --config {settings} --resume")
    assert RunFolder(config.run_dir).steps() == [3, 5]
    record = run_record.only(config.run_dir)
    assert (record.state, record.command, record.method, record.step) == ("stopped", "compose train", kind, 5)
    with pytest.raises(UserError, match="holds a run already: --resume goes on with it"):
        pd.train_composition(config, pipe=tiny_pipe)
    capsys.readouterr()
    assert main(["compose", "train", "--config", settings, "--resume", "--save-every", "25"]) == 0
    assert "going on from step 5 of 8" in capsys.readouterr().out
    assert config.output.read_bytes() == files[kind].read_bytes()
    record = run_record.only(config.run_dir)
    assert record.state == "finished" and (config.run_dir / "report.html").exists()
    assert [line["step"] for line in record.metrics if "loss" in line] == list(range(1, 9))
    assert [one["name"] for one in record.data] == ["0.png", "1.png", "2.png", "0.png"]
    assert main(["runs", str(config.run_dir.parent)]) == 0
    assert kind in capsys.readouterr().out
    assert main(["runs", "export", str(config.run_dir)]) == 1
    told = f"compose train --config {settings} --resume --steps 8"
    assert f"weighs adapters, and has none to export; to have its file of step 8: peft-diffusion {told}" in (
        capsys.readouterr().err
    )
    first, *_ = sorted((config.run_dir / "checkpoints").iterdir())
    assert main(["runs", "export", str(first)]) == 1
    assert f"to have its file of step 8: peft-diffusion {told}" in capsys.readouterr().err
    shutil.copy(first, folder / "elsewhere.safetensors")
    assert main(["runs", "export", str(folder / "elsewhere.safetensors")]) == 1
    assert "its run gives its file at that step with --resume --steps" in capsys.readouterr().err
    config.output.unlink()


@pytest.mark.slow
def test_a_run_goes_on_with_what_it_began_with(folder: Path, tiny_pipe: Any, tiny_base: Path, tmp_path: Path) -> None:
    """Another kind, adapter, or picture is refused; folders may have moved."""
    config = asked(folder, tiny_base, "strengths", "changed.safetensors")
    stopped_at(2, config, tiny_pipe)

    def refused(words: str, *observers: Observer, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            pd.train_composition(replace(config, resume=True, **changes), pipe=tiny_pipe, observers=observers)

    refused("had other settings: --kind was strengths, now gates", kind="gates")
    adapters = (Path(third(folder, tmp_path, name="elsewhere", fingerprint="0" * 16)), folder / "flat.safetensors")
    told: list[Event] = []
    refused("had other pictures, captions or adapters: .* has another adapter", told.append, adapters=adapters)
    (warned,) = [one.message for one in told if isinstance(one, Warned)]
    assert warned.endswith("was trained on 'elsewhere', whose weights differ from this base's; results may differ")
    refused("had other pictures", data=(folder / "flat", folder / "ink"))
    shutil.copytree(folder / "ink", tmp_path / "ink")
    (moved,) = [pd.train_composition(replace(config, resume=True, steps=2, data=(tmp_path / "ink", folder / "flat")),
                                     pipe=tiny_pipe)]  # fmt: skip
    assert (moved.steps, len(composition.read(moved.output).adapters)) == (2, 2)
    moved.output.unlink()


def by_hand(pipe: Any, file: Path, prompt: str, seed: int, names: tuple[str, ...]) -> torch.Tensor:
    """The denoising loop of diffusers' DDIM, with the strengths of each step set by hand; ink at 0.8 of what was learned."""
    adapters, told = Adapters(pipe), composition.read(file)
    learned, whole = told.learned(), dict(zip(names, (0.8, 1.0), strict=True))
    adapters.set(whole)
    hidden, without = pipe.encode_prompt(prompt, pipe.device, 1, True)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    for time in scheduler.timesteps:
        (values,) = learned(pooled((hidden,)), time[None] / 999).tolist()
        for name, row in zip(names, values, strict=True):
            adapters.set({name: {b: whole[name] * one for b, one in zip(told.blocks, row, strict=True)}})
        with_prompt, plain = (pipe.unet(latents, time, one).sample for one in (hidden, without))
        latents = scheduler.step(plain + GUIDANCE * (with_prompt - plain), time, latents).prev_sample
    return latents / float(pipe.vae.config.scaling_factor)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_loop_written_out_in_batches_and_alone(
    kind: str, files: dict[str, Path], folder: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pd.load_base(str(tiny_base), device="cpu")
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode

    def kept(latents: torch.Tensor, *more: Any, **named: Any) -> Any:
        decoded.extend(latents.split(1))
        return decode(latents, *more, **named)

    monkeypatch.setattr(pipe.vae, "decode", kept)
    common: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "scheduler": "ddim", "compose_file": files[kind],
                              "adapter": f"{folder / 'ink.safetensors'}=0.8", "device": "cpu"}  # fmt: skip
    together = generate(GenerateConfig(PROMPTS, output=tmp_path / "a", batch_size=2, **common), pipe=pipe)
    alone = generate(GenerateConfig(PROMPTS, output=tmp_path / "b", batch_size=1, **common), pipe=pipe)
    recipe = together[0].recipe
    assert recipe.compose == "learned" and recipe.compose_file is not None
    assert [Path(one.path).name for one in recipe.adapters] == ["ink.safetensors", "flat.safetensors"]
    again = generate(GenerateConfig(recipe=alone[1].path, output=tmp_path / "c.png", device="cpu"), pipe=pipe)
    assert again[0].image.tobytes() == alone[1].image.tobytes()
    adapters = Adapters(pipe)
    names = tuple(adapters.load(folder / f"{name}.safetensors") for name in ("ink", "flat"))
    for number, prompt in enumerate(PROMPTS):
        expected = by_hand(pipe, files[kind], prompt, 0, names)
        for found in (decoded[number], decoded[2 + number]):
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_adapters_are_composed_for_a_pipeline_that_is_called_by_hand(
    files: dict[str, Path], folder: Path, tiny_base: Path
) -> None:
    adapters = Adapters(pd.load_base(str(tiny_base), device="cpu"))
    pipe = adapters.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UserError, match="weighs adapters by the prompt; give those that will be drawn"):
        adapters.compose(files["gates"])
    assert adapters.compose(files["gates"], PROMPTS, amounts={"ink": 0.8}, steps=STEPS) == ("ink", "flat")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipe(list(PROMPTS), latents=noise.repeat(2, 1, 1, 1), num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                 output_type="latent").images  # fmt: skip
    for row, prompt in zip(drawn, PROMPTS, strict=True):
        expected = by_hand(pipe, files["gates"], prompt, 0, ("ink", "flat")) * float(pipe.vae.config.scaling_factor)
        assert (row - expected[0]).abs().max() < 1e-5 * expected.abs().max()
    assert adapters.compose(files["strengths"]) == ("ink", "flat")
    with pytest.raises(UserError, match="composes no adapter oil; there are: ink, flat"):
        adapters.compose(files["strengths"], amounts={"oil": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sheet_of_composed_adapters_ends_with_each_alone(
    kind: str, files: dict[str, Path], folder: Path, tiny_pipe: Any, tmp_path: Path
) -> None:
    both = [str(folder / f"{name}.safetensors") for name in ("ink", "flat")]
    common: dict[str, Any] = {"compose_file": files[kind], "steps": 2, "device": "cpu"}
    sheet = pd.blend(pd.BlendConfig("a cat", adapter=both, columns=2, output=tmp_path / "a.png", **common), pipe=tiny_pipe)
    for picture, amounts in zip(sheet.pictures[0], ((1, 0), (0, 1)), strict=True):
        adapter = [f"{one}={amount}" for one, amount in zip(both, amounts, strict=True)]
        (alone,) = generate(GenerateConfig("a cat", adapter=adapter, output=tmp_path / "b", **common), pipe=tiny_pipe)
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(alone.image, dtype=int)).max() <= 1
    told: list[Event] = []
    other = edited(files[kind], folder / f"other_{kind}.safetensors", base={"name": "elsewhere", "fingerprint": "0" * 16})
    again: dict[str, Any] = {**common, "compose_file": other, "output": tmp_path / "c"}
    generate(GenerateConfig("a cat", **again), pipe=tiny_pipe, observers=[told.append])
    judged = pd.EvaluateConfig(both, data=[str(folder / name) for name in ("ink", "flat")], **again)
    stop = threading.Event()
    stop.set()  # before anything is drawn
    with pytest.raises(Interrupted):
        pd.evaluate(judged, pipe=tiny_pipe, observers=[told.append], stop=stop)
    other.unlink()
    warned = [one.message for one in told if isinstance(one, Warned)]
    other_weights = "was learned on 'elsewhere', whose weights differ from this base's"
    assert sum(other_weights in one for one in warned) == 2  # by both commands
    config = pd.EvaluateConfig([both[0], third(folder, tmp_path)], data=[str(folder / "ink")] * 2, compose_file=files[kind])
    with pytest.raises(UserError, match="composes an adapter that is not given; name all of them"):
        config.check()


def third(folder: Path, to: Path, **base: str) -> str:
    """Another adapter, of other bytes, and of another base where something is told of it."""
    tensors = load_file(folder / "ink.safetensors")
    with safe_open(folder / "ink.safetensors", "pt") as file:
        told = {**file.metadata(), "ss_training_comment": "third"}
    spec = json.loads(told[KEY])
    told[KEY] = json.dumps({**spec, "base": {**spec["base"], **base}})
    save_file(tensors, to / "third.safetensors", told)
    return str(to / "third.safetensors")


@pytest.mark.slow
def test_inspect_tells_what_a_composition_holds(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(files["strengths"]), str(files["gates"])]) == 0
    told = capsys.readouterr().out
    for words in (
        "ink.safetensors",
        "strengths: a number for each",
        "gates: a small router",
        "strengths from the first quarter",
    ):
        assert words in told
    assert main(["inspect", "--json", str(files["strengths"])]) == 0
    (one,) = json.loads(capsys.readouterr().out)["files"]
    assert one["kind"] == "strengths" and len(one["adapters"]) == 2
    assert main(["inspect", "--norms", str(files["gates"])]) == 1


def edited(file: Path, path: Path, **changes: Any) -> Path:
    """A composition that says something else of itself."""
    told = composition.read(file)
    values = {**vars(told), **changes}
    composition.write(path, composition.CompositionSpec(**values), told.learned())
    return path


@pytest.mark.slow
def test_what_cannot_be_composed_is_told(files: dict[str, Path], folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    """A missing adapter, another of its name, another base, and what is no composition."""
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(files["gates"].read_bytes())
    ink, flat = folder / "ink.safetensors", folder / "flat.safetensors"

    def refused(words: str, file: Path, *adapters: Path, **more: Any) -> None:
        common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu", "steps": 1, "output": tmp_path / "none.png"}
        with pytest.raises(UserError, match=words):
            generate(GenerateConfig("a cat", compose_file=file, adapter=list(map(str, adapters)), **common, **more))

    refused("composes ink.safetensors .sha256 .*neither given with --adapter nor beside it", moved)
    refused("composes flat.safetensors", moved, ink)
    (tmp_path / "flat.safetensors").write_bytes(ink.read_bytes())
    refused("composes a flat.safetensors with sha256 .* is another file", moved, ink)
    refused("is no composition, as `compose train` writes it", ink)
    refused("leave it or --compose switch away", moved, ink, flat, compose="switch")
    blocks = ("nowhere", *composition.read(moved).blocks[1:])
    other = edited(moved, tmp_path / "other.safetensors", blocks=blocks)
    refused("was learned on another base .*there is no block nowhere", other, ink, flat)
    damaged = edited(moved, tmp_path / "damaged.safetensors", blocks=blocks[1:])
    refused("is damaged: its tensors are of other adapters or blocks", damaged, ink, flat)
    with pytest.raises(UserError, match="needs what was learned: name it with --compose-file"):
        GenerateConfig("a cat", compose="learned")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": ()}, "name the adapters to compose"),
        ({"data": ("ink",)}, "2 adapters and 1 folder of pictures"),
        ({"adapters": ("ink.safetensors",), "data": ("ink",)}, "gates share out between adapters; give 2 or more"),
        ({"kind": "strengths", "balance": 0.1}, "--balance is for gates; strengths are always free"),
        ({"adapters": ("ink.safetensors", "ink.safetensors")}, "are the same adapter; give each once"),
        ({"output": "there.safetensors"}, "exists already: --overwrite replaces it"),
        ({"output": "ink.safetensors"}, "--output .*ink.safetensors"),
        ({"output": "ink/both.safetensors"}, "--output .*both.safetensors lies in"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_anything_is_loaded(
    changes: Mapping[str, Any], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "there.safetensors").touch()
    told: dict[str, Any] = {"adapters": ("ink.safetensors", "flat.safetensors"), "data": ("ink", "flat"), "kind": "gates"}
    told |= {"output": "never.safetensors", "base": "/nowhere", **changes}
    with pytest.raises(UserError, match=words):
        pd.train_composition(ComposeTrainConfig(**told))


def test_every_kind_that_can_be_asked_for_can_be_made() -> None:
    assert list(KINDS) == list(LEARNED_KINDS)
    assert [ComposeTrainConfig(kind=one).balance_weight for one in LEARNED_KINDS] == [0.0, 0.001]
    assert ComposeTrainConfig(kind="gates", balance=0.0).balance_weight == 0


def test_shares_begin_equal_and_imbalance_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    prompts = torch.randn(5, 8)
    gates = Gates.fresh(3, 4, prompts)
    assert torch.allclose(gates(prompts, torch.rand(5)), torch.full((5, 3, 4), 1 / 3))
    torch.nn.init.normal_(gates.out.weight)
    shares = gates(prompts, torch.rand(5))
    assert torch.allclose(shares.sum(1), torch.ones(5, 4)) and shares.std(0).min() > 0
    expected = -sum(math.log(3 * shares[:, one].mean().item()) for one in range(3))
    assert imbalance(shares).item() == pytest.approx(expected, abs=1e-6)
    assert imbalance(torch.full((5, 3, 4), 1 / 3)).item() == pytest.approx(0, abs=1e-6)
    copied = Gates.of(gates.tensors())
    assert torch.equal(copied(prompts, torch.zeros(5)), gates(prompts, torch.zeros(5)))
    with pytest.raises(ValueError, match="missing or of another shape"):
        Gates.of({name: tensor for name, tensor in gates.tensors().items() if name != "level.weight"})
    table = StrengthTable(torch.arange(8.0).reshape(1, 2, 4))
    found = table(None, torch.tensor([1.0, 0.76, 0.74, 0.26, 0.24, 0.0]))
    assert found[:, 0, 0].tolist() == [0, 0, 1, 2, 3, 3]  # from pure noise, in quarters


def test_prompts_are_read_as_one_vector_each(tiny_pipe: Any) -> None:
    text = denoiser_of(tiny_pipe).text
    one = text.encode(["a cat"])
    assert torch.allclose(pooled(one), one[0].mean(1))
    summary = torch.randn(1, 3)
    assert torch.equal(pooled((*one, summary))[:, -3:], summary)
