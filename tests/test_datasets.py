"""Folders with settings of their own: which pictures an epoch sees, how often, in which size and with which caption."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_pipe
from PIL import Image
from test_training import small

import peft_diffusion as pd
from peft_diffusion.core.settings import Described, from_text, settings_of, to_json, to_text
from peft_diffusion.core.settings_file import load
from peft_diffusion.core.wording import shares
from peft_diffusion.data import images
from peft_diffusion.data.folder import TrainingImage
from peft_diffusion.data.images import Checked, check_picture
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.training.machine.processes import Processes
from peft_diffusion.training.pictures import diffusion_task
from peft_diffusion.training.settings.captions import CaptionSettings
from peft_diffusion.training.settings.datasets import FolderSettings
from peft_diffusion.training.settings.idle import idle
from peft_diffusion.training.settings.placements import blocks
from peft_diffusion.training.settings.resumption import changes
from peft_diffusion.training.settings.toml import to_toml
from peft_diffusion.training.tasks.preparation import Prepared, _split, apart_of, prepare

Seen = Counter[tuple[str, tuple[int, int], bool]]
"""Of an epoch: prompt, size and whether mirrored, with how often they come."""


def draw(folder: Path, *names: str, size: tuple[int, int] = (64, 64), caption: str = "") -> Path:
    """Pictures of one size that no other folder has, with a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        chance = random.Random(f"{folder.name}/{name}")
        Image.frombytes("RGB", size, chance.randbytes(size[0] * size[1] * 3)).save(folder / f"{name}.png")
        if caption:
            (folder / f"{name}.txt").write_text(caption, "utf-8")
    return folder


def prepared(place: Path, *folders: Path, **settings: Any) -> Prepared:
    given = {"held_out": 0.0, "caption_dropout": 0.0, "batch_size": 1, "resolution": 64, **settings}
    config = small(place, place / "out", **given)
    return prepare(replace(config, folder=folders), make_pipe(), lambda event: None, TrainingPictures())


def epoch(ready: Prepared) -> Seen:
    """What an epoch draws, from the batches of training."""
    task = diffusion_task(ready, blocks(ready.config), Processes())
    found: Seen = Counter()
    for step in range(sum(map(len, task.groups.values()))):
        (entry,) = task.batch(step, 0).indices
        fit = ready.train.latents.entries[entry].fit
        prompt = ready.train.rule(entry, ready.rules).prompt(ready.train.caption(entry), random.Random(step))
        found[prompt, (fit.bucket.width, fit.bucket.height), ready.train.latents.entries[entry].flipped] += 1
    return found


@pytest.mark.slow
def test_each_folder_is_drawn_sized_and_captioned_by_its_own_settings(tmp_path: Path) -> None:
    plain = draw(tmp_path / "plain", "apple", caption="an apple")
    hats = draw(tmp_path / "hats", "hat", size=(128, 64), caption="a hat, red, blue")
    rest = draw(tmp_path / "rest" / "5_inner", "shoe", caption="a shoe")
    own = (
        pd.Dataset(hats, repeats=3, resolution=(32, 64), flip=True, trigger="mira", keep_tags=1, weight=0.5),
        pd.Dataset(rest.parent, max_aspect=1, caption_prefix="old,", trigger=""),
    )
    ready = prepared(tmp_path, plain, dataset=own, trigger="ink", shuffle_tags=False)
    found = epoch(ready)
    assert found == {
        ("ink, an apple", (64, 64), False): 1,
        ("old, a shoe", (64, 64), False): 5,
        **{("mira, a hat, red, blue", size, flip): 3 for size in ((32, 32), (80, 48)) for flip in (False, True)},
    }
    assert {round(ready.train.weight(entry), 3) for entry in range(len(ready.train.latents.entries))} == {1.0, 0.5}
    assert len(ready.of_run.kept) == 3 and ready.config.resolution == 64


def test_cut_outs_lie_side_by_side_and_a_square_is_cut_once(tmp_path: Path) -> None:
    wide = draw(tmp_path / "wide", "wide", size=(192, 64), caption="wide")
    square = draw(tmp_path / "square", "square", caption="square")
    own = [pd.Dataset(folder, crops=3, max_aspect=1) for folder in (wide, square)]
    ready = prepared(tmp_path, dataset=own)
    crops = {ready.train.captions[one.picture]: [] for one in ready.train.latents.entries}  # type: ignore[var-annotated]
    for one in ready.train.latents.entries:
        crops[ready.train.captions[one.picture]].append(one.fit.crop)
    assert crops == {"wide": [(0, 0, 64, 64), (64, 0, 128, 64), (128, 0, 192, 64)], "square": [(0, 0, 64, 64)]}


@pytest.mark.slow
def test_a_picture_in_two_data_sets_is_never_measured_on_what_was_learned_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []

    def check(path: Path, most: int) -> Checked:
        checked.append(path)
        return check_picture(path, most)

    monkeypatch.setattr(images, "check_picture", check)
    folder = draw(tmp_path / "all", *(f"p{n}" for n in range(8)), caption="a thing")
    own = [pd.Dataset(folder, resolution=size) for size in (32, 64)]
    ready = prepared(tmp_path, dataset=own, held_out=0.25, resolution=None)
    learned, apart = ({one.digest for one in pictures} for pictures in (ready.of_run.kept, ready.of_run.apart))
    assert (len(learned), len(apart)) == (6, 2) and not learned & apart
    assert sorted(checked) == sorted(folder.glob("*.png"))  # each decoded once
    assert ready.config.resolution == 64  # the largest of the data sets: nothing else is said
    assert ready.held_out is not None and len(ready.held_out.captions) == 4


@pytest.mark.slow
def test_no_data_set_is_kept_apart_as_a_whole(tmp_path: Path) -> None:
    """Which would teach nothing of it: others stand in for those that have to stay, as far as there are any."""
    own = [pd.Dataset(draw(tmp_path / "one", "only", caption="a hat"))]
    own += [pd.Dataset(draw(tmp_path / "more", *(f"p{n}" for n in range(3)), caption="a thing"))]
    for seed in range(4):
        of_run = prepared(tmp_path, dataset=own, held_out=0.5, seed=seed).of_run
        assert [one.dataset for one in of_run.apart] == [1, 1] and {one.dataset for one in of_run.kept} == {0, 1}
    singles = [own[0], pd.Dataset(draw(tmp_path / "other", "only", caption="a dog"))]
    assert not prepared(tmp_path, dataset=singles, held_out=0.5).of_run.apart


def pictured(dataset: int, *names: str) -> list[TrainingImage]:
    """Pictures of a data set that were read; those of one name are the same."""
    return [TrainingImage(Path(name), name, name, "none", 64, 64, name, dataset=dataset) for name in names]


def test_a_share_of_each_data_set_has_some_of_small_ones_too() -> None:
    """As far as they have two or more, of which one stays; what is in two of them is on the same side in both."""
    large, small = [f"p{number}" for number in range(30)], ["a", "b"]
    for both in (("p0",), ()):
        pictures = [*pictured(0, *large), *pictured(1, *small), *pictured(2, "only"), *pictured(3, "c", *both)]
        for seed in range(5):
            kept, apart = _split(pictures, 0.1, seed, of_each=True)
            of_each = dict(apart_of(("large", "small", "one", "shared"), apart))
            also = "p0" in {one.digest for one in apart} and of_each["large"] == 4  # drawn of the last data set
            assert of_each == {"large": 3 + also, "small": 1, "one": 0, "shared": len(both)}
            assert {one.dataset for one in kept} == {0, 1, 2, 3}
            assert not {one.digest for one in kept} & {one.digest for one in apart}
    _, together = _split(pictures, 0.1, 0, of_each=False)
    assert len(together) == 3
    assert shares((("large", 3), ("one", 0))) == "3 of large, none of one"


@pytest.mark.slow
def test_captions_come_from_where_the_data_set_says(tmp_path: Path) -> None:
    folder = draw(tmp_path / "tags", "red_hat", "blue_hat")
    (folder / "red_hat.tags").write_text("hat, red", "utf-8")
    (folder / "red_hat.txt").write_text("not this", "utf-8")
    draw(folder / "inner", "deep")
    of = {
        "files": {"captions": "files", "caption_extension": "tags", "caption": "1hat"},
        "names": {"captions": "names"},
        "all": {"captions": "caption", "caption": "a hat"},
    }
    told = {}
    for name, own in of.items():
        given: dict[str, Any] = own
        ready = prepared(tmp_path / name, dataset=pd.Dataset(folder, subfolders=False, **given))
        told[name] = sorted(ready.train.captions)
    assert told == {"files": ["1hat", "hat, red"], "names": ["blue hat", "red hat"], "all": ["a hat", "a hat"]}


def test_pictures_of_the_class_have_their_own_captions_and_no_trigger(tmp_path: Path) -> None:
    subject = draw(tmp_path / "mira", "mira", caption="mira, a woman")
    others = draw(tmp_path / "women", "one", "two")
    own = pd.Dataset(others, regularisation=True, captions="files", caption="a woman", keep_tags=0)
    ready = prepared(tmp_path, subject, dataset=own, trigger="ink", caption_suffix="in ink")
    assert ready.prior is not None and len(ready.of_run.all) == 1
    assert set(ready.prior.plain(ready.rules)) == {"a woman"}


def test_a_data_set_is_the_same_by_flag_toml_and_in_python(tmp_path: Path) -> None:
    full = pd.Dataset(
        tmp_path / "a 'folder' with \"both\"",
        repeats=2,
        weight=0.5,
        resolution=(512, 768),
        flip=True,
        caption="a cat\nanother = one, with 'quotes' #1",
        caption_template=["{trigger} of {caption}", "a {caption}"],
        masks="off",
    )
    assert from_text(pd.Dataset, to_text(full), "--dataset") == full
    config = pd.TrainConfig(dataset=[full, {"folder": "b"}, "c repeats=3 resolution=32,64 upscale=true"])
    assert config.dataset[1:] == (
        pd.Dataset("b"),
        pd.Dataset("c", repeats=3, resolution=(32, 64), upscale=True),
    )
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), "utf-8")
    assert load(pd.TrainConfig, file).dataset == config.dataset
    moved = pd.TrainConfig(dataset=[pd.Dataset("elsewhere"), *config.dataset[1:]])
    assert not changes(to_json(config), config) and len(changes(to_json(config), moved)) == 1
    assert not changes(to_json(moved), pd.TrainConfig(dataset=["here", *config.dataset[1:]]))  # folders may have moved


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a repeats=0", r"--dataset 'a repeats=0': --repeats must be 1 or more, not 0"),
        ("my pictures", r"'pictures' is no NAME=VALUE; a text with spaces stands in quotes"),
        ("a num_repeats=3", r"no setting 'num_repeats'; here it is repeats"),
        ("a flp=true", r"no setting 'flp'; did you mean 'flip'"),
        ("a flip=yes", r"--flip must be true or false, not 'yes'"),
        ("'a", r"a quotation mark has no second one"),
        ({"repeats": 2}, r"--dataset lacks folder"),
        (3, r"--dataset takes a Dataset, a mapping or a text, not 3"),
    ],
)
def test_a_wrong_data_set_is_told_in_words(given: Any, said: str) -> None:
    with pytest.raises(pd.UserError, match=said):
        pd.TrainConfig(dataset=[given])


def test_a_data_set_may_have_all_caption_and_picture_settings_otherwise() -> None:
    own = {one.name: one for one in settings_of(pd.Dataset)}
    for one in (*settings_of(CaptionSettings), *settings_of(FolderSettings)):
        assert own[one.name].default is None and _inner(own[one.name]) == _inner(one)
    assert pd.Dataset("a", trigger="", keep_tags=0).overrides() == {"trigger": "", "keep_tags": 0}


def _inner(one: Described) -> tuple[Any, Any, bool]:
    return one.single, one.setting.range, one.several


@pytest.mark.slow
def test_settings_of_the_run_that_a_data_set_needs_are_not_told_as_idle(tmp_path: Path) -> None:
    plain, others = (draw(tmp_path / name, name, caption="a, b") for name in ("plain", "others"))
    own = [pd.Dataset(plain, shuffle_tags=True), pd.Dataset(others, regularisation=True)]
    for data, told in ((own, []), ([plain], ["--keep-tags", "--prior-weight"])):
        asked = small(plain, tmp_path / "out", held_out=0.0, resolution=64, keep_tags=1, prior_weight=0.5)
        asked = replace(asked, folder=(), dataset=data)
        ready = prepare(asked, make_pipe(), lambda event: None, TrainingPictures())
        assert sorted(line.split()[0] for line in idle(asked, ready.config)) == told
