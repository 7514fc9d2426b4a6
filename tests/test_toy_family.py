"""A new family of bases is one row and one file: `toy_family.py`, which nothing in the package knows."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from making import command
from safetensors.torch import load_file
from test_training import draw_pictures
from toy_family import ROW, ToyDenoiser, ToyPipeline, make_toy

import peft_diffusion as pd
from peft_diffusion.bases import checksum, denoiser_of, describe, family
from peft_diffusion.bases.base import components
from peft_diffusion.bases.skeleton import skeleton
from peft_diffusion.core import site
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Sampling
from peft_diffusion.training.machine.low_memory import blocks_of
from peft_diffusion.training.settings.choices import Memory, Preset
from peft_diffusion.training.settings.derive import resolve


class BaseOf:
    """What defaults depend on."""

    name, resolution = "base", 64

    def __init__(self, family: str) -> None:
        self.family = family


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, few_measurements: None, no_plots: None) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    pipe = make_toy()
    before = checksum(components(pipe))
    config = pd.TrainConfig(
        folder=(draw_pictures(folder / "pictures", 4),), output=folder / "toy.safetensors", run_dir=folder / "run",
        steps=6, batch_size=2, rank=2, unet_lr=0.05, resolution=64, preview_steps=2, device="cpu", held_out=0.25,
    )  # fmt: skip
    result = pd.train(config, pipe=pipe)
    assert checksum(components(pipe)) == before and not site.sites(pipe.transformer)
    assert result.config.components == ("transformer",)
    assert result.held_out_after is not None and result.held_out_before is not None
    assert result.held_out_after < result.held_out_before
    return result.output


@pytest.mark.parametrize("preset", ["style", "subject"])
@pytest.mark.parametrize(
    ("presets", "steps"), [({}, None), ({"style": {"steps": 5}}, 5), ({"style": {"steps": 5}, "subject": {"steps": 5}}, 5)]
)
def test_a_row_says_only_the_defaults_that_are_its_own(
    preset: Preset, presets: dict[str, dict[str, int]], steps: int | None
) -> None:
    row = replace(ROW, name=f"toy of {len(presets)} presets", small=False, presets=presets)
    family.register(row)
    config = pd.TrainConfig(folder=(Path("pictures"),), preset=preset)
    found, usual = (resolve(config, BaseOf(name), 4, "cpu") for name in (row.name, "sd1"))
    own = preset in presets
    assert found.steps == (steps if own else usual.steps)
    assert (found.unet_lr, found.text_encoder_lr, found.rank, found.batch_size) == (
        usual.unet_lr, usual.text_encoder_lr, usual.rank, usual.batch_size
    )  # fmt: skip


def test_a_rate_that_is_no_setting_is_said_with_those_there_are() -> None:
    (network, *others) = ROW.components
    row = replace(ROW, name="toy of another rate", components=(replace(network, rate="toy_lr"), *others))
    family.register(row)
    with pytest.raises(
        pd.UserError, match=r"rate of its transformer: 'toy_lr' is none; there are: unet_lr, text_encoder_lr"
    ):
        resolve(pd.TrainConfig(folder=(Path("pictures"),)), BaseOf(row.name), 4, "cpu")


def test_it_is_known_by_its_row() -> None:
    pipe: DiffusionPipeline = make_toy()
    assert isinstance(denoiser_of(pipe), ToyDenoiser)
    told = describe(pipe)
    assert (told.family, told.resolution, told.step) == (ROW.name, 64, 16)
    assert set(components(pipe)) == {"transformer", "text_encoder"}


@pytest.mark.slow
def test_a_folder_of_it_has_a_skeleton(tmp_path: Path) -> None:
    pipe = make_toy()
    pipe.save_pretrained(tmp_path / "base")
    found = skeleton(tmp_path / "base")
    assert found.info == replace(describe(pipe), name="base", fingerprint="")
    assert found.tokenizer("a cat").input_ids == pipe.tokenizer("a cat").input_ids
    names = {(key, name, one.shape) for key, part in components(pipe).items() for name, one in part.state_dict().items()}
    tensors = [(key, name, one) for key, part in found.parts.items() for name, one in part.state_dict().items()]
    assert {(key, name, one.shape) for key, name, one in tensors} == names and all(one.is_meta for _, _, one in tensors)


@pytest.mark.slow
def test_what_was_trained_is_read_and_drawn_with(trained: Path, tmp_path: Path) -> None:
    found = pd.inspect(trained)
    assert found.components == {"transformer": 12} and found.spec is not None and found.spec.base["family"] == ROW.name
    make_toy().save_pretrained(tmp_path / "base")
    common: dict[str, Any] = {"base": str(tmp_path / "base"), "steps": 2, "device": "cpu", "output": tmp_path / "drawn"}
    (without,) = pd.generate(pd.GenerateConfig(prompts=("a red apple",), **common))
    schedulers: tuple[str | None, ...] = (None, "euler", "heun")
    for scheduler in schedulers:
        config = pd.GenerateConfig(prompts=("a red apple",), adapter=(str(trained),), scheduler=scheduler, **common)
        (with_it,) = pd.generate(config)
        assert with_it.recipe.base_family == ROW.name
        assert not np.array_equal(np.asarray(with_it.image), np.asarray(without.image))
    (again,) = pd.generate(pd.GenerateConfig(prompts=("a red apple",), **common), pipe=make_toy())
    assert np.array_equal(np.asarray(again.image), np.asarray(without.image)), "a pipeline that is loaded already"
    with pytest.raises(pd.UserError, match="has no scheduler ddim; choose one of: euler, heun"):
        pd.generate(pd.GenerateConfig(prompts=("a red apple",), scheduler="ddim", **common))


def draw(pipe: ToyPipeline, count: int = 1, guidance: float = 5.0) -> np.ndarray:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1, -1)
    prompts = ["a cat"] * count
    drawn: np.ndarray = pipe(prompts, latents=noise, guidance_scale=guidance, output_type="np").images
    return drawn


def test_a_pipeline_that_takes_no_embeddings_says_so_for_what_is_more_than_words() -> None:
    adapters, sampling = pd.Adapters(make_toy()), Sampling(steps=1)
    assert list(paint(adapters, [Cell("a red cat", 0, {})], sampling))
    with pytest.raises(pd.UserError, match="a ToyPipeline takes prompts as words alone"):
        list(paint(adapters, [Cell("a (red:1.2) cat", 0, {})], sampling))


@pytest.mark.slow
def test_strengths_by_block_image_and_step_and_merging(trained: Path) -> None:
    pipe = make_toy()
    plain = draw(pipe)
    adapters = pd.Adapters(pipe)
    adapters.load(trained, name="toy")
    full = draw(pipe)
    assert not np.array_equal(full, plain)
    adapters.set(toy=[0.0, 1.0])
    both = draw(pipe, 2)
    assert np.allclose(both[0], plain[0], atol=1e-4) and np.allclose(both[1], full[0], atol=1e-4)
    with pytest.raises(pd.UserError, match="2 images, but 1 is drawn"):
        draw(pipe, 1)
    adapters.set(toy={"blocks.0": 1.0})
    assert not np.array_equal(draw(pipe), full)
    adapters.set(toy=pd.Schedule([0, 1]))
    assert not np.array_equal(draw(pipe), full)
    adapters.set(toy=1.0)
    adapters.merge()
    assert np.allclose(draw(pipe), full, atol=1e-3)
    adapters.unmerge()
    adapters.remove("toy")
    assert np.array_equal(draw(pipe), plain)


@pytest.mark.slow
def test_a_file_of_another_family_is_refused(trained: Path) -> None:
    from conftest import make_pipe

    with pytest.raises(pd.UserError, match=r"was made for base .* \(toy\)"):
        pd.Adapters(make_pipe()).load(trained)


@pytest.mark.slow
@pytest.mark.usefixtures("few_measurements", "no_plots")
def test_blocks_are_computed_again_where_memory_is_low(tmp_path: Path) -> None:
    assert len(blocks_of(make_toy().transformer)) == 2
    common: dict[str, Any] = {
        "folder": (draw_pictures(tmp_path / "pictures", 2),), "steps": 2, "batch_size": 2, "rank": 2, "preview_steps": 0,
        "device": "cpu",
    }  # fmt: skip
    files = [tmp_path / "plain.safetensors", tmp_path / "low.safetensors"]
    memories: tuple[Memory, ...] = ("off", "low")
    for file, memory in zip(files, memories, strict=True):
        pd.train(pd.TrainConfig(output=file, run_dir=tmp_path / file.stem, memory=memory, **common), pipe=make_toy())
    plain, low = (load_file(file) for file in files)
    assert plain.keys() == low.keys()
    for name, tensor in plain.items():  # gradients that meet at a block are added up in another order
        torch.testing.assert_close(tensor, low[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_it_comes_in_by_command_and_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toy().save_pretrained(tmp_path / "base")
    draw_pictures(tmp_path / "pictures", 2)
    training: list[object] = ["train", "pictures", "--base", "base", "--output", "toy.safetensors", "--run-dir", "run"]
    training += ["--steps", 2, "--batch-size", 2, "--preview-steps", 0, "--device", "cpu"]
    refused = command(*training, cwd=tmp_path)
    assert refused.returncode != 0 and not (tmp_path / "run").exists()
    assert "is a ToyPipeline, which diffusers does not know" in " ".join(refused.stderr.split())
    assert "--plugin MODULE" in " ".join(refused.stderr.split())
    places = [str(Path(pd.__file__).parents[1]), str(Path(__file__).parent), str(tmp_path / "installed")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    trained = command(*training, "--plugin", "toy_family", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert 'plugin = ["toy_family"]' in (tmp_path / "run" / "config.toml").read_text().splitlines()
    assert "--plugin toy_family" in trained.stdout.splitlines()[-1]
    package = tmp_path / "installed" / "toy_package-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_package\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[peft_diffusion.families]\ntoy = toy_family\n")
    drawn = command("generate", "a cat", "--base", "base", "--adapter", "toy.safetensors", "--steps", 1, "--width", 64,
                    "--output", "drawn", "--device", "cpu", cwd=tmp_path)  # fmt: skip
    assert drawn.returncode == 0 and list((tmp_path / "drawn").glob("*.png")), drawn.stderr
    told = command("inspect", "toy.safetensors", cwd=tmp_path)
    assert told.returncode == 0 and "transformer" in told.stdout, told.stderr
