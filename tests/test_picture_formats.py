"""Pictures as PNG, JPEG and WebP: each carries its recipe, and A1111's text where other programs look for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import make_adapter
from PIL import Image

from peft_diffusion import BlendConfig, GenerateConfig, GridConfig, UserError, blend, generate, grid
from peft_diffusion.data.images import check_picture
from peft_diffusion.data.picture_formats import Carried, own_text
from peft_diffusion.generation import recipe as recipes


def as_a1111_reads(path: Path) -> str:
    """What A1111's ``read_info_from_image`` finds: a chunk, or EXIF's UserComment as piexif decodes it."""
    with Image.open(path) as image:
        if "parameters" in image.info:
            return str(image.info["parameters"])
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    text: str = comment[8:].decode("utf-16-be")
    return text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pillow"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
def test_every_format_carries_the_recipe_and_the_text_of_a1111(
    tiny_base: Path, tmp_path: Path, name: str, pillow: str
) -> None:
    common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu"}
    (made,) = generate(GenerateConfig("a cat, 猫 🐈", steps=1, output=tmp_path / name, seed=3, **common))
    with Image.open(made.path) as image:
        assert image.format == pillow and image.size == (64, 64)
        assert np.abs(np.asarray(image.convert("L"), int) - np.asarray(made.image.convert("L"), int)).mean() < 8
    assert recipes.read(made.path) == made.recipe
    assert check_picture(made.path).told.prompt == "a cat, 猫 🐈"  # its caption, where it is learned
    assert as_a1111_reads(made.path) == made.recipe.parameters() and "猫 🐈" in made.recipe.parameters()
    again = generate(GenerateConfig(recipe=made.path, output=tmp_path / "again", format="webp", quality=100, **common))
    assert again[0].image.tobytes() == made.image.tobytes() and again[0].path.suffix == ".webp"
    with Image.open(again[0].path) as image:  # of quality 100, which loses nothing
        assert image.convert("RGB").tobytes() == made.image.tobytes()


@pytest.mark.slow
def test_quality_and_sheets(tiny_base: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu", "steps": 1}
    for kind in ("jpeg", "webp"):
        low, high = (
            generate(GenerateConfig("a cat", format=kind, quality=q, output=tmp_path / f"{kind}{q}", **common))[0]
            for q in (10, 99)
        )
        assert low.path.stat().st_size < high.path.stat().st_size
    made = grid(GridConfig("a cat", x="seed=0,1", output=tmp_path / "grid.jpg", **common))
    with Image.open(tmp_path / "grid.jpg") as image:
        told = json.loads(own_text(image) or "")
    assert [one["seed"] for one in told["sheet"][0]] == [0, 1] and len(made.recipes[0]) == 2
    with pytest.raises(UserError, match="is a sheet of many pictures"):
        recipes.read(tmp_path / "grid.jpg")
    files = tuple(str(make_adapter(tmp_path / f"{n}.safetensors", tiny_base, n)) for n in (1, 2))
    blend(BlendConfig("a cat", adapter=files, columns=2, output=tmp_path / "blend.webp", **common))
    with Image.open(tmp_path / "blend.webp") as image:
        assert len(json.loads(own_text(image) or "")["sheet"][0]) == 2
    assert BlendConfig("a", adapter=files, format="jpeg").output == Path("blend.jpg")
    assert GridConfig("a", format="webp").output == Path("grid.webp")


@pytest.mark.slow
def test_what_has_no_room_in_a_jpeg_is_told_before_anything_is_drawn(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0).integers(33, 127, 200_000, np.uint8).tobytes().decode()
    assert not Carried(random).fits("jpeg") and Carried(random).fits("webp") and Carried(random).fits("png")
    monkeypatch.setattr(recipes, "_of_sheet", lambda _: Carried(random))
    with pytest.raises(UserError, match=r"no room in a JPEG; take \.png or \.webp"):
        grid(GridConfig("a cat", steps=900, base=str(tiny_base), device="cpu", output=tmp_path / "a.jpg"))


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_damaged_text_is_an_error_and_the_picture_of_another_program_has_none(tmp_path: Path, kind: Any) -> None:
    picture, path = Image.new("RGB", (8, 8)), tmp_path / "a.bin"
    options = Carried("{}" * 40).options(kind)
    exif = options["exif"]
    options["exif"] = exif[:-8] + bytes(8)
    picture.save(path, **options)
    with pytest.raises(UserError, match=r"a\.bin: its recipe is damaged"):
        recipes.read(path)
    picture.save(path, format=kind)
    with pytest.raises(UserError, match="carries no recipe"):
        recipes.read(path)
