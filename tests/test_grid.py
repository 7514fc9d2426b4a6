"""Sheets over values of settings: each picture is that of a call of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import make_adapter
from PIL import Image

from peft_diffusion import GenerateConfig, GridConfig, UserError, generate, grid


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


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        ({"x": "stepz=1,2"}, "no side 'stepz'; there are: steps"), ({"x": "steps=1,many"}, "steps cannot be 'many'"),
        ({"x": "steps=0,1"}, "--steps must be 1 or more"), ({"y": "replace=dog,mouse"}, "no prompt holds 'dog'"),
        ({"z": "seed"}, "a side of the sheet is"), ({"y": "scheduler=magic"}, "no scheduler 'magic'"),
    ],
)  # fmt: skip
def test_a_side_that_cannot_be_is_refused_before_anything_is_loaded(sides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GridConfig("a cat", **sides).check()
