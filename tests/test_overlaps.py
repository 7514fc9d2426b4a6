"""Outputs are checked against inputs: nothing is written among what is read, whatever links lead there."""

from pathlib import Path
from typing import Any

import pytest
from conftest import make_pipe
from PIL import Image
from test_bad_input import FAILED, complaint
from test_training import draw_pictures, small

from peft_diffusion.api import find_rates, find_text_rates, train, train_text
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.files import lies_in
from peft_diffusion.generation.generate import generate
from peft_diffusion.generation.recipe import Recipe, write
from peft_diffusion.generation.settings import GenerateConfig
from peft_diffusion.training.settings.text import TextTrainConfig

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Folders to read and to write, with links between them."""
    draw_pictures(tmp_path / "pics" / "deeper")
    draw_pictures(tmp_path / "class", 2)
    (tmp_path / "base").mkdir()
    (tmp_path / "base.safetensors").write_bytes(b"a checkpoint")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("And it came to pass. " * 40, "utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "pics" / "deeper", target_is_directory=True)
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    return tmp_path


@pytest.mark.slow
def test_a_run_folder_among_the_pictures_is_refused_by_the_command(places: Path) -> None:
    said = complaint(FAILED, "train", "pics", "--run-dir", "pics", folder=places)
    assert "--run-dir pics is pics, which is read as pictures" in said and "name another place with --run-dir" in said
    assert "runs" in complaint(FAILED, "train", ".", folder=places), "the default places, from within the pictures"
    assert sorted(path.name for path in (places / "pics").iterdir()) == ["deeper"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_dir": "pics/deeper/run"}, "--run-dir .*/pics/deeper/run lies in .*/pics, which is read as pictures"),
        ({"run_dir": "link/run"}, "--run-dir .*/link/run lies in .*/pics,"),
        ({"run_dir": "up/pics"}, "--run-dir .*/up/pics is .*/pics,"),
        ({"run_dir": "."}, "/pics, which is read as pictures, lies in --run-dir"),
        ({"output": "link/a.safetensors"}, "--output .*/link/a.safetensors lies in .*/pics,"),
        ({"cache": "up/pics/cache"}, "--cache .*/cache lies in .*/pics,"),
        ({"cache": "class", "regularisation": ("up/class",)}, "--cache .*/class is .*/up/class, which is read as --regul"),
        ({"output": "base.safetensors", "base": "base.safetensors"}, "--output .* is .*, which is read as --base"),
        ({"output": "up/base/a.safetensors", "base": "base"}, "--output .* lies in .*, which is read as --base"),
        ({"output": "run/checkpoints/step_000006.safetensors"}, "lies in .*checkpoints, where the run keeps its own"),
    ],
)
def test_any_overlap_of_a_run_on_pictures_is_refused(places: Path, changes: dict[str, Any], said: str) -> None:
    def placed(value: Any) -> Any:
        return tuple(map(placed, value)) if isinstance(value, tuple) else places / value

    own = {name: str(placed(value)) if name == "base" else placed(value) for name, value in changes.items()}
    before = sorted(places.rglob("*"))
    config = small(places / "pics", places, overwrite=True, **own)
    with pytest.raises(UserError, match=said):
        train(config)
    if "run_dir" in changes:
        with pytest.raises(UserError, match=said):
            find_rates(config)
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_dir": "texts/run"}, "--run-dir .* lies in .*/texts, which is read as text"),
        ({"output": "up/texts/a.safetensors"}, "--output .* lies in .*/texts, which is read as text"),
        ({"run_dir": "class", "held_out_text": "class"}, "--run-dir .* is .*/class, which is read as --held-out-text"),
    ],
)
def test_any_overlap_of_a_run_on_text_is_refused(places: Path, changes: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {"output": places / "a.safetensors", "run_dir": places / "run"}
    settings |= {name: places / value for name, value in changes.items()}
    config = TextTrainConfig(texts=(places / "texts",), **settings)
    with pytest.raises(UserError, match=said):
        train_text(config)
    if "run_dir" in changes:
        with pytest.raises(UserError, match=said):
            find_text_rates(config)


def test_a_base_in_the_home_folder_is_not_written_into(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(places))
    said = r"--output .* lies in .*/base, which is read as --base"
    with pytest.raises(UserError, match=said):
        train(small(places / "pics", places, base="~/base", output=places / "base" / "a.safetensors"))
    settings: dict[str, Any] = {"base": "~/base", "output": "~/base/a.safetensors", "run_dir": places / "run"}
    with pytest.raises(UserError, match=said):
        train_text(TextTrainConfig(places / "texts", **settings))


def test_a_link_among_the_pictures_that_leads_into_the_run_is_named(places: Path) -> None:
    old = draw_pictures(places / "run" / "pictures", 1, size=96)
    (places / "pics" / "more").symlink_to(old, target_is_directory=True)
    with pytest.raises(UserError, match=r"more/red apple a\.png leads into --run-dir .*/run"):
        train(small(places / "pics", places), pipe=make_pipe())


def test_what_a_picture_is_made_again_from_is_not_replaced(tmp_path: Path) -> None:
    values: dict[str, Any] = dict.fromkeys(Recipe.__dataclass_fields__, "")
    values |= {"adapters": (), "plugins": (), "image": None, "mask": None, "strength": None, "prompt": "a cat", "seed": 1}
    values |= {"steps": 1, "width": 64, "height": 64, "guidance": 1.0, "guidance_stop": 1.0, "scheduler": None}
    values |= {"versions": {}, "base": "icons", "quantize": None, "sampler_options": None, "vae": None}
    values |= {name: one.default for name, one in Recipe.__dataclass_fields__.items() if one.default is None}
    write(tmp_path / "a.png", Image.new("RGB", (64, 64)), Recipe(**values))
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    cases: tuple[dict[str, Any], ...] = (
        {"output": tmp_path / "up" / "a.png"},
        {"sheet": tmp_path / "a.png", "output": tmp_path / "b.png"},
    )
    for written in cases:
        with pytest.raises(UserError, match="is the picture of --recipe, and would be replaced"):
            generate(GenerateConfig(recipe=tmp_path / "a.png", **written))


def test_a_path_lies_in_another_by_the_system_and_not_by_letters(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics2").mkdir()
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert not lies_in(tmp_path / "pics2", tmp_path / "pics") and not lies_in(tmp_path / "pics", tmp_path / "pics2")
    assert lies_in(tmp_path / "pics" / ".." / "pics" / "new", tmp_path / "pics")
    assert lies_in(tmp_path / "none" / "new", tmp_path / "none") and not lies_in(tmp_path / "round", tmp_path / "pics")
