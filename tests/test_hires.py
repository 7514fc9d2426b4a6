"""The second pass of pictures, compared with A1111's arithmetic, which is written out here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from making import make_adapter
from PIL import Image

from peft_diffusion import Adapters, GenerateConfig, GridConfig, Schedule, UserError, generate, grid
from peft_diffusion.core import site
from peft_diffusion.core.events import Event, Progress
from peft_diffusion.generation import recipe as recipes
from peft_diffusion.generation.hires import UPSCALERS, Hires, label, upscaler
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Sampling

Seen = list[tuple[torch.Tensor, float]]


def watched(pipe: DiffusionPipeline, adapters: Adapters, cells: list[Cell], **told: Any) -> tuple[list[Image.Image], Seen]:
    """The pictures, and what the network was called with."""
    seen: Seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), float(args[1]))))
    drawn = list(paint(adapters, cells, Sampling(guidance=1.0, **told)))
    hook.remove()
    return drawn, seen


def begun_as_in_a1111(
    pipe: DiffusionPipeline, mode: dict[str, Any], seen: Seen, first: torch.Tensor, seed: int
) -> torch.Tensor:
    """What its second pass begins with: interpolated latents, and the noise of the same seed at the new size."""
    noise = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(seed))
    larger = torch.nn.functional.interpolate(first, size=(12, 12), **mode)
    begun: torch.Tensor = pipe.scheduler.add_noise(larger, noise, torch.tensor([int(seen[0][1])]))
    return begun


@pytest.mark.slow
@pytest.mark.parametrize("name", [one for one in UPSCALERS if one != "lanczos"])
def test_the_second_pass_begins_as_that_of_a1111(tiny_pipe: DiffusionPipeline, name: str) -> None:
    """A1111's ``sample_hr_pass`` and ``setup_img2img_steps``; the latents of the first pass are those of a plain call."""
    told: dict[str, Any] = {"steps": 3, "hires": 1.5, "hires_upscaler": name, "hires_strength": 0.6, "hires_steps": 4}
    (picture,), seen = watched(tiny_pipe, Adapters(tiny_pipe), [Cell("a cat", 5, None)], **told)
    assert picture.size == (96, 96) and len(seen) == 3 + 4
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    first = tiny_pipe("a cat", num_inference_steps=3, guidance_scale=1.0, latents=noise, output_type="latent").images
    mode = {"mode": name.removeprefix("latent").strip("-") or "bilinear", "antialias": name.endswith("antialiased")}
    mode["mode"] = str(mode["mode"]).removesuffix("antialiased").strip("-") or "bilinear"
    tiny_pipe.scheduler.set_timesteps(int(4 / 0.6))
    assert [timestep for _, timestep in seen[3:]] == tiny_pipe.scheduler.timesteps.tolist()[-4:]
    expected = begun_as_in_a1111(tiny_pipe, mode, seen[3:], first, 5)
    torch.testing.assert_close(seen[3][0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_pipe, make_xl_pipe])
def test_lanczos_enlarges_the_picture_and_a_batch_changes_nothing(make: Any) -> None:
    pipe = make()
    told: dict[str, Any] = {"steps": 2, "hires": 1.5, "hires_upscaler": "Lanczos", "scheduler": "euler-a"}
    cells = [Cell("a cat", seed, None) for seed in (1, 2)]
    together, seen = watched(pipe, Adapters(pipe), cells, **told)
    alone = [watched(pipe, Adapters(pipe), [cell], **told)[0][0] for cell in cells]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert together[0].tobytes() != together[1].tobytes() and len(seen) == 4
    # The less is left behind, the nearer to the picture of the first pass made larger.
    (plain,), _ = watched(pipe, Adapters(pipe), cells[:1], steps=2, scheduler="euler-a")
    enlarged = np.asarray(plain.resize((96, 96), Image.Resampling.LANCZOS).resize((16, 16)), int)
    near, far = (
        np.asarray(watched(pipe, Adapters(pipe), cells[:1], **told, hires_strength=share)[0][0].resize((16, 16)), int)
        for share in (0.02, 1.0)
    )
    assert np.abs(near - enlarged).mean() < np.abs(far - enlarged).mean()


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.55, 0.7, 0.999, 1.0])
def test_exactly_the_steps_that_were_asked_for_are_taken(strength: float) -> None:
    for steps in range(1, 101):
        hires = Hires(2.0, "latent", strength, steps)
        assert hires.planned == int(steps / min(strength, 0.999))  # A1111's
        assert min(int(hires.planned * hires.begins), hires.planned) == steps  # diffusers'


@pytest.mark.slow
def test_a_variation_is_in_the_noise_of_both_passes(tiny_pipe: DiffusionPipeline) -> None:
    """At a share of 1 a picture is that of the variation's seed, whatever its own is."""
    told: dict[str, Any] = {"steps": 2, "hires": 1.5, "scheduler": "ddim"}
    (one,), _ = watched(
        tiny_pipe, Adapters(tiny_pipe), [Cell("a cat", 1, None)], variation_seed=9, variation_strength=1.0, **told
    )
    (other,), _ = watched(tiny_pipe, Adapters(tiny_pipe), [Cell("a cat", 9, None)], **told)
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.slow
def test_a_schedule_goes_on_where_the_noise_is(tiny_base: Path, tmp_path: Path) -> None:
    """In the second pass a schedule is where its noise level is among the steps from pure noise."""
    pipe = DiffusionPipeline.from_pretrained(tiny_base)
    adapters = Adapters(pipe)
    adapters.load(make_adapter(tmp_path / "ink.safetensors", tiny_base, 1), name="ink")
    adapters.set(ink=Schedule([0, 1]))
    found: list[float] = []

    def strength(*_: object) -> None:
        strengths = site.strengths(pipe.unet)
        assert strengths is not None
        found.append(float(strengths.values.flatten()[0]))

    pipe.unet.down_blocks[0].register_forward_pre_hook(strength)
    told: dict[str, Any] = {"guidance": 1.0, "hires": 1.5, "hires_steps": 3, "hires_strength": 0.6}
    list(paint(adapters, [Cell("a cat", 1, None)], Sampling(steps=5, **told)))
    assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.5, 0.75, 1])


@pytest.mark.slow
def test_progress_goes_over_both_passes(tiny_pipe: DiffusionPipeline) -> None:
    seen: list[Event] = []
    cells = [Cell("a cat", seed, {}) for seed in range(2)]
    list(paint(Adapters(tiny_pipe), cells, Sampling(steps=2, hires=1.5, hires_steps=1, batch_size=1), tell=seen.append))
    told = [(event.done, event.total) for event in seen if isinstance(event, Progress)]
    assert told == [(number, 6) for number in range(1, 7)]


@pytest.mark.slow
def test_a_recipe_has_the_second_pass_and_makes_it_again(tiny_base: Path, tmp_path: Path) -> None:
    file = make_adapter(tmp_path / "ink.safetensors", tiny_base, 1)
    common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu"}
    told: dict[str, Any] = {"steps": 2, "hires": 1.5, "hires_upscaler": "Latent (bicubic)", "hires_steps": 1}
    adapter = f"{file}=0:1,0.6:0"
    (made,) = generate(GenerateConfig("a cat", adapter=adapter, output=tmp_path / "a.png", **told, **common))
    recipe = recipes.read(made.path)
    assert (recipe.hires, recipe.hires_upscaler, recipe.hires_strength, recipe.hires_steps) == (
        1.5,
        "latent-bicubic",
        0.7,
        1,
    )
    with Image.open(made.path) as image:
        text = image.info["parameters"]
    said = "Denoising strength: 0.7, Hires upscale: 1.5, Hires steps: 1, Hires upscaler: Latent (bicubic)"
    assert said in text and "Size: 64x64" in text
    (again,) = generate(GenerateConfig(recipe=made.path, output=tmp_path / "b.png", **common))
    assert again.image.tobytes() == made.image.tobytes() and again.recipe == made.recipe
    sheet = grid(GridConfig("a cat", adapter=adapter, steps=2, x="hires=none|1.5", output=tmp_path / "s.png", **common))
    assert [one.size for one in sheet.pictures[0]] == [(64, 64), (96, 96)]


def test_upscalers_have_the_names_of_a1111() -> None:
    names = ["Latent", "Latent (antialiased)", "Latent (bicubic)", "Latent (bicubic antialiased)", "Latent (nearest)",
             "Latent (nearest-exact)", "Lanczos"]  # fmt: skip
    assert [label(upscaler(name)) for name in names] == names and [upscaler(name) for name in names] == list(UPSCALERS)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"hires": 1.0}, "--hires must be above 1"), ({"hires_steps": 3}, "give --hires too"),
        ({"hires": 2.0, "hires_upscaler": "latnt"}, "did you mean 'latent'"),
        ({"hires": 2.0, "image": "a.png"}, "with --image give --width and --height"),
    ],
)  # fmt: skip
def test_what_no_second_pass_can_be_is_refused(told: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GenerateConfig("a cat", **told)


@pytest.mark.slow
def test_what_a_base_cannot_draw_twice_is_refused_before_anything_is_drawn(tiny_pipe: DiffusionPipeline) -> None:
    def refused(pipe: DiffusionPipeline, said: str, **told: Any) -> None:
        with pytest.raises(UserError, match=said):
            list(paint(Adapters(pipe), [Cell("a cat", 1, None)], Sampling(steps=1, **told)))

    refused(
        tiny_pipe,
        r"40 steps of a second pass at strength 0\.03 are the last of 1333",
        hires=2,
        hires_steps=40,
        hires_strength=0.03,
    )
    refused(tiny_pipe, "over the limit", hires=8.0, width=4096, height=4096)
    refused(make_pipe(in_channels=9), "paints parts anew", hires=2.0)
    alone = type("Alone", (StableDiffusionPipeline,), {})(**tiny_pipe.components)  # of which diffusers knows no kin
    alone.unet.register_forward_pre_hook(lambda *_: pytest.fail("it was drawn with"))
    refused(alone, "an? Alone cannot start from a picture, so it has no second pass", hires=2.0)
