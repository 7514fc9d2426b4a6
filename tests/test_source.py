"""Pictures that start from a picture: made anew to a degree, or where a mask shows them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from conftest import make_pipe, make_xl_pipe
from making import environment
from PIL import Image

from peft_diffusion.core.errors import UserError
from peft_diffusion.generation import recipe as recipes
from peft_diffusion.generation.generate import Picture, generate
from peft_diffusion.generation.settings import GenerateConfig

pytestmark = pytest.mark.usefixtures("read_bases_once")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny pipelines, and those that are told masks."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {"plain": make_pipe(), "xl": make_xl_pipe(), "masked": make_pipe(in_channels=9)}
    for name, pipe in made.items():
        pipe.save_pretrained(folder / name)
    return {name: folder / name for name in made}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A picture of 128 x 64 and a mask that shows its right half."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    mask = Image.new("L", (128, 64))
    mask.paste(255, (64, 0, 128, 64))
    mask.save(tmp_path / "mask.png")
    return {"image": tmp_path / "picture.png", "mask": tmp_path / "mask.png"}


def run(base: Path, where: Path, **more: Any) -> list[Picture]:
    settings: dict[str, Any] = {"base": str(base), "steps": 4, "device": "cpu", "output": where / "a.png"}
    return generate(GenerateConfig(("red apple",), **(settings | more)))


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image, np.int16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "xl", "masked"])
def test_what_a_mask_hides_stays_to_the_bit_and_the_rest_is_painted(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    (made,) = run(bases[kind], tmp_path, **files)
    before = np.asarray(Image.open(files["image"]), np.int16)
    after = pixels(made)
    assert after.shape == before.shape
    assert np.array_equal(after[:, :64], before[:, :64])
    assert np.abs(after[:, 64:] - before[:, 64:]).mean() > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "xl"])
def test_a_picture_is_made_anew_as_far_as_told_whatever_the_batch(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    seeds: dict[str, Any] = {"seeds": (3, 5), "output": tmp_path / "several"}
    near, other = run(bases[kind], tmp_path, image=files["image"], strength=0.5, **seeds)
    alone, _ = run(bases[kind], tmp_path, image=files["image"], strength=0.5, batch_size=1, **seeds)
    assert np.abs(pixels(near) - pixels(alone)).max() <= 1
    far, _ = run(bases[kind], tmp_path, image=files["image"], strength=1.0, **seeds)
    assert not np.array_equal(pixels(near), pixels(other)) and not np.array_equal(pixels(near), pixels(far))
    assert near.image.size == (128, 64) and near.recipe.strength == 0.5
    (resized,) = run(bases[kind], tmp_path, image=files["image"], width=64, height=64)
    assert resized.image.size == (64, 64) and resized.recipe.strength == 0.8


@pytest.mark.slow
def test_the_recipe_makes_it_again_from_the_same_files_and_no_others(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    (first,) = run(bases["masked"], tmp_path, output=tmp_path / "first.png", **files)
    assert "Denoising strength: 1" in Image.open(first.path).info["parameters"]
    told = recipes.read(first.path)
    assert told.image is not None and told.mask is not None
    assert told.image.path == str(files["image"]) and told.mask.path == str(files["mask"])
    base = first.recipe.base
    config = GenerateConfig(recipe=first.path, base=base, output=tmp_path / "again.png", device="cpu")
    assert generate(config)[0].image.tobytes() == first.image.tobytes()
    moved = files["mask"].rename(tmp_path / "moved.png")
    with pytest.raises(UserError, match=r"mask\.png of the recipe .* is not there any more.* with --mask"):
        generate(config)
    elsewhere = replace(config, mask=moved)
    assert generate(elsewhere)[0].image.tobytes() == first.image.tobytes()


@pytest.mark.slow
def test_what_does_not_fit_is_said(bases: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"paints parts of a picture anew, and is not told which; give --mask"):
        run(bases["masked"], tmp_path, image=files["image"])
    with pytest.raises(UserError, match="name it with --image"):
        run(bases["masked"], tmp_path, mask=files["mask"])
    with pytest.raises(UserError, match="name it with --image"):
        run(bases["plain"], tmp_path, strength=0.5)
    with pytest.raises(UserError, match=r"--strength must be above 0, at most 1, not 1\.5"):
        run(bases["plain"], tmp_path, image=files["image"], strength=1.5)
    with pytest.raises(UserError, match=r"--strength 0\.1 leaves none of 4 steps"):
        run(bases["plain"], tmp_path, image=files["image"], strength=0.1)
    odd, black = tmp_path / "odd.png", tmp_path / "black.png"
    Image.new("RGB", (100, 70)).save(odd)
    Image.new("L", (128, 64)).save(black)
    with pytest.raises(UserError, match=r"the mask .*odd\.png is 100x70 and the picture .* is 128x64"):
        run(bases["masked"], tmp_path, image=files["image"], mask=odd)
    with pytest.raises(UserError, match="is black: nothing would be painted"):
        run(bases["masked"], tmp_path, image=files["image"], mask=black)
    thin = Image.new("L", (128, 64))
    thin.paste(255, (50, 0, 51, 64))
    thin.save(black)
    with pytest.raises(UserError, match=r"the white of the mask is too thin for .* at 32x32"):
        run(bases["masked"], tmp_path, image=files["image"], mask=black, width=32, height=32)
    (tmp_path / "notes.png").write_text("words")
    with pytest.raises(UserError, match=r"notes\.png: the content is no picture; choose another file"):
        run(bases["plain"], tmp_path, image=tmp_path / "notes.png")
    with pytest.raises(UserError, match=r"odd\.png is 100x70, and the sides must be multiples of 16 .* such as 96x64"):
        run(bases["plain"], tmp_path, image=odd)
    with pytest.raises(UserError, match=r"there is no picture .*gone\.png"):
        run(bases["plain"], tmp_path, image=tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png.*is no picture"):
        run(bases["plain"], tmp_path, image=tmp_path / "text.png")


@pytest.mark.slow
def test_the_command(bases: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "generate.py"
    flags = ["--base", bases["masked"], "--steps", 2, "--image", files["image"], "--mask", files["mask"], "-o", "a.png"]
    done = forked.python([str(script), "red apple", *map(str, flags)], tmp_path, environment())
    assert done.returncode == 0 and done.stdout.strip() == "a.png", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("told", ["image", "mask"])
def test_what_a_picture_is_made_from_is_not_replaced(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path, told: str
) -> None:
    before = files[told].read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(files[told])
    for more in ({"output": files[told]}, {"output": link}, {"sheet": files[told]}):
        with pytest.raises(UserError, match=f"is the picture of --{told}, and would be replaced"):
            run(bases["masked"], tmp_path, **files, **more)
    assert files[told].read_bytes() == before
