"""Sheets over values of settings: each picture is that of a call of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from making import make_adapter
from PIL import Image

from peft_diffusion import Adapters, GenerateConfig, GridConfig, UserError, generate, grid
from peft_diffusion.core.events import Event
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Sampling

pytestmark = pytest.mark.usefixtures("read_bases_once")


@pytest.mark.slow
def test_each_picture_of_a_sheet_is_that_of_a_call_of_its_own(tiny_base: Path, tmp_path: Path) -> None:
    file = make_adapter(tmp_path / "ink.safetensors", tiny_base, 1)
    common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu"}
    config = GridConfig("a red cat", adapter=str(file), steps=2, x="ink=0|te:0|0.5", y="scheduler=Euler a,DDIM",
                        z="replace=red,green", output=tmp_path / "sheet.png", **common)  # fmt: skip
    made = grid(config)
    assert [len(row) for row in made.pictures] == [3] * 4 and config.columns == ["ink 0", "ink te:0", "ink 0.5"]
    with Image.open(tmp_path / "sheet.png") as image:
        kept = json.loads(image.info["peft_diffusion"])["sheet"]
    for number, (prompt, scheduler) in enumerate((p, s) for p in ("a red cat", "a green cat") for s in ("euler-a", "ddim")):
        for column, strength in enumerate(("0", "te:0", "0.5")):
            told = {"adapter": f"{file}={strength}", "scheduler": scheduler, "output": tmp_path / "a.png", **common}
            (alone,) = generate(GenerateConfig(prompt, steps=2, **told))
            found = made.pictures[number][column]
            assert np.abs(np.asarray(found, int) - np.asarray(alone.image, int)).max() <= 1
            assert made.recipes[number][column] == alone.recipe
            assert kept[number][column]["prompt"] == prompt and kept[number][column]["scheduler"] == scheduler
    assert made.pictures[0][0].tobytes() != made.pictures[0][1].tobytes() != made.pictures[0][2].tobytes()


@pytest.mark.slow
def test_an_adapter_for_few_steps_that_a_prompt_names_is_drawn_as_by_a_call_of_its_own(
    tiny_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    file = make_adapter(folder / "lcm-lora.safetensors", tiny_base, 1, size=0.1)
    told: list[Event] = []
    common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu", "adapters_dir": folder, "width": 64, "height": 64}
    config = GridConfig("a cat WORD", x="replace=WORD,<lora:lcm-lora:1>,red", output=tmp_path / "sheet.png", **common)
    (row,) = grid(config, observers=[told.append]).recipes
    for recipe, words in zip(row, ("WORD", "<lora:lcm-lora:1>", "red"), strict=True):
        (alone,) = generate(GenerateConfig(f"a cat {words}", output=tmp_path / "a.png", **common))
        assert (recipe.steps, recipe.guidance, recipe.scheduler) == (
            alone.recipe.steps, alone.recipe.guidance, alone.recipe.scheduler
        )  # fmt: skip
    assert [one.steps for one in row] == [25, 4, 25]
    assert sum(str(file) in line for event in told for line in event.lines()) == 1


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        ({"x": "stepz=1,2"}, "no side 'stepz'; there are: steps"), ({"x": "steps=1,many"}, "steps cannot be 'many'"),
        ({"x": "steps=0,1"}, "--steps must be 1 or more"), ({"y": "replace=dog,mouse"}, "no prompt holds 'dog'"),
        ({"z": "seed"}, "a side of the sheet is"), ({"y": "scheduler=magic"}, "no scheduler 'magic'"),
        ({"x": "seed=1-5 (-1)"}, "seed=1-5 \\(-1\\) is no values"), ({"x": "seed=1-5 (+0)"}, "is no values"),
        ({"x": "seed=0-99999999"}, "is 100000000 values"), ({"x": "steps=1-2 (+0.5)"}, "steps cannot be '1.5'"),
    ],
)  # fmt: skip
def test_a_side_that_cannot_be_is_refused_before_anything_is_loaded(sides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GridConfig("a cat", **sides).check()


@pytest.mark.slow
def test_sides_have_the_names_of_a1111_unless_an_adapter_has_them(tiny_base: Path, tmp_path: Path) -> None:
    config = GridConfig("a cat", x="CFG Scale=3,4", y="Prompt S/R=cat,dog", z="Sampler=Euler a")
    (row, other), columns = config.rows(config.of_generate()), config.columns
    assert columns == ["guidance 3", "guidance 4"] and [one.config.guidance for one in row.cells] == [3.0, 4.0]
    assert (row.label, other.cells[0].config.prompts, other.cells[0].config.scheduler) == (
        "scheduler Euler a\ncat", ("a dog",), "euler-a",
    )  # fmt: skip
    config = GridConfig("a cat", x="cfg=0,1", adapter=str(make_adapter(tmp_path / "cfg.safetensors", tiny_base, 1)))
    (row,) = config.rows(config.of_generate())
    assert [one.choices[0].strength for one in row.cells] == [0.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "values"),
    [  # the first four as A1111's wiki has them, "X/Y/Z plot"
        ("steps=1-5", [1, 2, 3, 4, 5]), ("guidance=1-3 (+0.5)", [1, 1.5, 2, 2.5, 3]), ("steps=10-5 (-3)", [10, 7]),
        ("steps=1-10 [5]", [1, 3, 5, 7, 10]), ("guidance=0.0-1.0 [6]", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("CFG Scale=3-5,7", [3, 4, 5, 7]), ("steps=1-5 (+2)|20", [1, 3, 5, 20]), ("ink=-1-1 (+1)", [-1, 0, 1]),
        ("ink=0 - .3 (0.1)", [0, 0.1, 0.2, 0.3]),
    ],
)  # fmt: skip
def test_numbers_of_a_side_may_be_ranges_as_in_a1111(
    told: str, values: list[float], tiny_base: Path, tmp_path: Path
) -> None:
    config = GridConfig("a cat", x=told, adapter=str(make_adapter(tmp_path / "ink.safetensors", tiny_base, 1)))
    (row,) = config.rows(config.of_generate())
    name = {"s": "steps", "g": "guidance", "C": "guidance", "i": "ink"}[told[0]]
    found = [one.choices[0].strength if name == "ink" else getattr(one.config, name) for one in row.cells]
    assert found == values and config.columns == [f"{name} {value:g}" for value in values]


def test_ranges_are_of_numbers_alone() -> None:
    config = GridConfig("a 1-2 cat", x="replace=1-2,3-4", y="negative=1-2")
    assert config.columns == ["1-2", "3-4"] and [row.label for row in config.rows(config.of_generate())] == ["negative 1-2"]


def slerp(val: float, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """That of A1111, over (channels, height, width)."""
    low_norm, high_norm = low / torch.norm(low, dim=1, keepdim=True), high / torch.norm(high, dim=1, keepdim=True)
    omega = torch.acos((low_norm * high_norm).sum(1))
    so = torch.sin(omega)
    return (torch.sin((1.0 - val) * omega) / so).unsqueeze(1) * low + (torch.sin(val * omega) / so).unsqueeze(1) * high


@pytest.mark.slow
def test_a_variation_starts_from_the_noise_of_two_seeds_as_in_a1111(tiny_pipe: DiffusionPipeline) -> None:
    seen: list[torch.Tensor] = []
    hook = tiny_pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    told: dict[str, Any] = {"steps": 1, "guidance": 1.0}
    for share in (0.0, 0.3, 1.0):
        varied = Sampling(variation_seed=7, variation_strength=share, **told)
        list(paint(Adapters(tiny_pipe), [Cell("a cat", seed, {}) for seed in (1, 2)], varied))
    hook.remove()
    first, second, other = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 2, 7))
    for share, found in zip((0.0, 0.3, 1.0), seen, strict=True):
        for noise, latents in zip((first, second), found, strict=True):
            torch.testing.assert_close(latents, slerp(share, noise, other), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="name it with --variation-seed"):
        Sampling(variation_strength=0.5)
