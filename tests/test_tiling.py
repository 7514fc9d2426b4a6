"""Textures whose edges meet: noise that is moved around the edges gives the picture moved around the edges."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline
from PIL import Image

from peft_diffusion import Adapters, GenerateConfig, UserError, generate
from peft_diffusion.core import site
from peft_diffusion.generation import recipe as recipes
from peft_diffusion.generation.hires import Hires
from peft_diffusion.generation.regions import Area, Division, DrawnRegion
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Sampling, Tile
from peft_diffusion.generation.tiling import seamless
from peft_diffusion.generation.upscaling import enlarged
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lora import Lora

RANDN = torch.randn


def drawn(pipe: DiffusionPipeline, moved: tuple[int, int], divided: bool = False, **told: Any) -> np.ndarray:
    """The picture from noise that is moved by latents, (down, right), and its region; both passes begin in moved noise."""

    def rolled(shape: Any, **kinds: Any) -> torch.Tensor:
        noise = RANDN(shape, **kinds)
        share = noise.shape[-1] // 8  # of the second pass, twice as far
        return noise.roll((moved[0] * share, moved[1] * share), (2, 3))

    adapters, cell = Adapters(pipe), Cell("a cat", 1, None)
    if divided:
        mask = np.zeros((64, 64), np.uint8)
        mask[:48, :32] = 255
        area = Area(None, Image.fromarray(np.roll(mask, (moved[0] * 8, moved[1] * 8), (0, 1))))
        whole, there = {"one": 0.0, "two": 0.5}, {"one": 1.0, "two": 0.0}
        cell = Cell("a cat", 1, whole, None, Division((DrawnRegion(area, "a dog", there),), 0.3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", rolled)
        (image,) = paint(adapters, [cell], Sampling(**{"steps": 2, "width": 64, "height": 64, **told}))
    if divided:
        adapters.set(one=1.0, two=1.0)
    return np.asarray(image, int)


def off(pipe: DiffusionPipeline, moved: tuple[int, int], **told: Any) -> int:
    """How far the picture from moved noise is from the moved picture, at most, in levels of 255."""
    still, other = drawn(pipe, (0, 0), **told), drawn(pipe, moved, **told)
    scale = still.shape[0] // 8
    return int(np.abs(np.roll(still, (moved[0] * scale, moved[1] * scale), (0, 1)) - other).max())


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    """A base whose convolutions carry adapters of two kinds, one of kernels of their own."""
    made = make_pipe()
    torch.manual_seed(3)
    for name, method in (("one", Lora(rank=4)), ("two", Loha(rank=2))):
        site.attach(made.unet, name, method, "conv")
        for adapter in site.adapters(made.unet, name).values():
            for own in adapter.parameters():
                torch.nn.init.normal_(own, std=0.3)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tile", "along", "across"), [("both", (2, 4), None), ("x", (0, 4), (4, 0)), ("y", (4, 0), (0, 4)), (None, None, (2, 4))]
)
def test_what_is_moved_around_the_edges_is_the_same_picture_moved(
    pipe: DiffusionPipeline, tile: Tile | None, along: tuple[int, int] | None, across: tuple[int, int] | None
) -> None:
    assert along is None or off(pipe, along, tile=tile) <= 1
    assert across is None or off(pipe, across, tile=tile) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "along"), [("both", (2, 4)), ("x", (0, 6))])
def test_a_region_that_is_moved_around_the_edges_is_feathered_and_acts_there_too(
    pipe: DiffusionPipeline, tile: Tile, along: tuple[int, int]
) -> None:
    assert off(pipe, along, tile=tile, divided=True, steps=1) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("upscaler", ["latent", "latent-bicubic-antialiased"])
def test_a_second_pass_keeps_the_edges_together(pipe: DiffusionPipeline, upscaler: str) -> None:
    told: dict[str, Any] = {"hires": 2.0, "hires_upscaler": upscaler, "tile": "both"}
    assert off(pipe, (2, 4), **told) <= 1 < off(pipe, (2, 4), **(told | {"tile": None}))


def test_pictures_are_enlarged_and_encoded_over_their_edges(pipe: DiffusionPipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    hires = Hires(1.5, "lanczos", 0.5, 1)
    one, other = enlarged([Image.fromarray(p) for p in (pixels, np.roll(pixels, 32, 1))], hires, (96, 96), 8, "x")
    assert np.array_equal(np.roll(np.asarray(one), 48, 1), np.asarray(other))
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), seamless(pipe, "both"):
        one, other = (pipe.vae.encode(x).latent_dist.mean for x in (picture, picture.roll((16, 32), (2, 3))))
    torch.testing.assert_close(one.roll((2, 4), (2, 3)), other, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_base_is_afterwards_what_it_was_and_recipes_know(tiny_base: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_base)
    before = drawn(pipe, (0, 0))
    hooks = [(len(one._forward_pre_hooks), len(one._forward_hooks)) for one in pipe.unet.modules()]
    common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu"}
    (made,) = generate(GenerateConfig("a cat", steps=2, tile="both", output=tmp_path / "a.png", **common))
    with pytest.raises(ZeroDivisionError), seamless(pipe, "both"):
        1 / 0  # noqa: B018
    assert [(len(one._forward_pre_hooks), len(one._forward_hooks)) for one in pipe.unet.modules()] == hooks
    assert np.array_equal(drawn(pipe, (0, 0)), before)
    assert recipes.read(made.path).tile == "both" and "Tiling: True" in made.recipe.parameters()
    (again,) = generate(GenerateConfig(recipe=made.path, output=tmp_path / "b.png", **common))
    assert again.image.tobytes() == made.image.tobytes()
    with pytest.raises(UserError, match="whose edges would not meet"):
        Sampling(tile="x", vae_tiling=True)
