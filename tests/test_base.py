"""The embedded base: an ordinary diffusers folder that draws what it is asked for."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

import peft_diffusion as pd
from peft_diffusion.bases import describe, embedded
from peft_diffusion.bases.loading import quiet
from peft_diffusion.evaluation.style_net import load_style_net
from peft_diffusion.evaluation.subject_net import Subjects, load_subject_net, points_of
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import GenerateConfig
from scripts.build_base.augment import moved, strange
from scripts.build_base.card import Story, card
from scripts.build_base.export import mix
from scripts.build_base.judge import Gallery, Judge
from scripts.build_base.packed import Drawing
from scripts.build_base.train_unet import LITTLE_NOISE, SHEET_STYLES, TrainingSet, make_gradient
from scripts.build_base.training import Arena
from scripts.build_base.unknown_words import Prompts

FOLDER: Path = embedded("base")
ASKED = {"noto": "noto emoji of a red apple", "tabler": "line icon of a house", "ph-duotone": "duotone icon of a star"}


@pytest.fixture(scope="module")
def icons() -> Any:
    return pd.load_base("icons", device="cpu")


def _drawn(
    pipe: Any, prompts: list[str], scheduler: str | None = None, steps: int = 8, guidance: float | None = None
) -> np.ndarray:
    sampling = GenerateConfig(tuple(prompts), steps=steps, scheduler=scheduler, guidance=guidance)
    images = paint(pd.Adapters(pipe), [Cell(prompt, 0, {}) for prompt in prompts], sampling)
    return np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])


def test_libraries_show_what_they_showed_before_a_base_was_loaded() -> None:
    libraries: list[Any] = [diffusers_logging, transformers_logging]

    def shown() -> list[object]:
        own = [(one.get_verbosity(), one.is_progress_bar_enabled()) for one in libraries]
        return [own, are_progress_bars_disabled()]

    before, without = [one.is_progress_bar_enabled() for one in libraries], are_progress_bars_disabled()
    try:
        for bars in (False, True):
            for library in libraries:
                (library.enable_progress_bar if bars else library.disable_progress_bar)()
            chosen = shown()
            with quiet(*libraries):
                assert not any(one.is_progress_bar_enabled() for one in libraries)
            assert shown() == chosen
        disable_progress_bars()  # those of the hub alone
        with quiet(*libraries):
            pass
        assert are_progress_bars_disabled()
    finally:
        for library, bars in zip(libraries, before, strict=True):
            (library.enable_progress_bar if bars else library.disable_progress_bar)()
        (disable_progress_bars if without else enable_progress_bars)()


@pytest.mark.slow
def test_plain_diffusers_loads_it_and_draws_the_same(icons: Any) -> None:
    plain = StableDiffusionPipeline.from_pretrained(FOLDER)
    plain.set_progress_bar_config(disable=True)
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    wanted = plain(ASKED["noto"], latents=latents, num_inference_steps=3, guidance_scale=5.0).images[0]
    assert abs(_drawn(icons, [ASKED["noto"]], steps=3)[0] - np.asarray(wanted) / 255).max() <= 1 / 255


@pytest.mark.slow
def test_it_draws_subject_and_style(icons: Any) -> None:
    drawn = _drawn(icons, list(ASKED.values()), steps=6)
    apple, house, _ = drawn
    ink = apple.min(-1) < 0.9
    assert 0.3 < ink.mean() < 0.9
    red, green, blue = apple[ink].mean(0)
    assert red > green + 0.2 and red > blue + 0.2
    assert (house.max(-1) - house.min(-1)).mean() < 0.05  # a line icon has no colours
    nothing = Gallery([], torch.empty(0, 3, 128, 128))
    judge = Judge(dict.fromkeys(load_style_net().styles, nothing), load_style_net())
    assert judge.style(torch.from_numpy(drawn).permute(0, 3, 1, 2)) == list(ASKED)


def _drawings(style: str) -> dict[str, torch.Tensor]:
    """The drawings of a sample folder, as the judge sees them, by file name."""
    files = sorted(embedded(f"styles/{style}").glob("*.webp"))
    small = {file.stem: Image.open(file).convert("RGB").resize((128, 128), Image.Resampling.LANCZOS) for file in files}
    return {name: torch.from_numpy(np.array(image)).permute(2, 0, 1) for name, image in small.items()}


@pytest.mark.slow
def test_the_judge_of_subjects_sees_through_different_hands() -> None:
    net, known, asked = load_subject_net(), _drawings("twemoji"), _drawings("openmoji")
    subjects = Subjects({name: points_of(net, image[None]) for name, image in known.items()})
    ranks = subjects.ranks(points_of(net, torch.stack(list(asked.values()))), list(asked))
    assert sum(rank <= 5 for rank in ranks) >= 0.9 * len(ranks)
    blank = torch.full((1, 3, 128, 128), 255, dtype=torch.uint8)
    assert sum(rank <= 5 for rank in subjects.ranks(points_of(net, blank).expand(48, -1), list(known))) <= 5


@pytest.mark.slow
def test_a_style_of_any_name_keeps_the_subject(icons: Any) -> None:
    """A name that the text encoder never saw draws what no name draws, before anything is learned of it."""
    names = ["emoji of", "openmoji emoji of", "qwib watercolor drawing of"]
    plain, *named, other = _drawn(icons, [*(f"{words} a tulip" for words in names), "emoji of a ship"], steps=5)
    for drawn in named:
        assert abs(drawn - plain).mean() < 0.25 * abs(other - plain).mean()


def test_what_unknown_words_are_taught_is_aligned() -> None:
    """Every token that counts in full follows the same token of the plain prompt."""
    rows = [Drawing("noto", "red-apple", "red apple", ("fruit", "healthy")), Drawing("tabler", "home", "home", ())]
    prompts = Prompts(CLIPTokenizer.from_pretrained(FOLDER / "tokenizer"), rows, seed=0)
    pairs = [prompts.draw() for _ in range(200)]
    assert sum(bool((pair.prompt != pair.model).any()) for pair in pairs) > 60
    for pair in pairs:
        followed = pair.model[pair.places]
        assert torch.equal(pair.prompt[pair.weights == 1], followed[pair.weights == 1])
        assert int((pair.weights < 1).sum()) < len(pair.weights) // 2


# PNDM extrapolates from four steps before, and overshoots where they are long: under a guidance of 5 it takes 40 of them.
LITTLE_GUIDANCE = 2.0


@pytest.fixture(scope="module")
def apple_and_fish(icons: Any) -> np.ndarray:
    """Two subjects in one style, drawn by the sampler of the base."""
    return _drawn(icons, [ASKED["noto"], "noto emoji of a fish"], guidance=LITTLE_GUIDANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("ddim", 5), ("pndm", 14), ("euler", 5), ("heun", 6), ("dpm++-karras", 8), ("unipc", 8)],
)
def test_every_sampler_draws_the_apple(icons: Any, apple_and_fish: np.ndarray, scheduler: str, steps: int) -> None:
    """They take other steps to the same picture: far nearer to it than to another subject's."""
    wanted, other = apple_and_fish
    drawn = _drawn(icons, [ASKED["noto"]], scheduler, steps, LITTLE_GUIDANCE)[0]
    assert abs(drawn - wanted).mean() < 0.1 * abs(other - wanted).mean()


@pytest.mark.slow
def test_it_is_small_and_says_what_it_is(icons: Any) -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 48_000_000
    info = describe(icons)
    assert (info.family, info.prediction_type, info.resolution) == ("other", "epsilon", 128)


def test_its_card_is_that_of_its_figures() -> None:
    figures = json.loads((FOLDER / "figures.json").read_text())
    text = (FOLDER / "README.md").read_text()
    told = r"from scratch,\n(.+)\. Then the text .+\swent on alone, (.+), on drawings .+ and (\d+)% those"
    said = re.search(told, text, re.DOTALL)
    assert said
    story = Story(said[1], said[2], int(said[3]) / 100)
    assert card(figures, story, "sheet.webp", SHEET_STYLES) == text
    with Image.open(FOLDER / "sheet.webp") as sheet:
        assert sheet.size == (12 * 64, len(SHEET_STYLES) * 64)


@pytest.mark.slow
def test_drawings_are_changed_on_white_and_within_bounds() -> None:
    torch.manual_seed(0)
    images = torch.ones(48, 3, 128, 128)
    assert (moved(images) == 1).all()
    images[:, :, 40:70, 30:60] = torch.tensor([0.8, -0.6, -0.2]).view(1, 3, 1, 1)
    for change in (moved, strange):
        found = change(images)
        assert found.shape == images.shape and found.min() >= -1 and found.max() <= 1
        assert len({tuple(one.flatten().tolist()) for one in found}) == len(images)
    own = moved(images)
    ink = (own.amax(1) - own.amin(1) > 1.3).flatten(1).sum(1)
    assert (ink > 900 / 1.3**2 * 0.7).all() and (ink < 900 / 0.85**2 * 1.2).all(), "only its place and its size are others"


def test_strange_drawings_are_shown_where_there_is_little_noise_alone() -> None:
    torch.manual_seed(0)
    unet = torch.nn.Conv2d(4, 4, 1)
    seen: list[tuple[Tensor, Tensor]] = []

    class Net(torch.nn.Module):
        def forward(self, noisy: Tensor, timesteps: Tensor, hidden: Tensor, return_dict: bool) -> tuple[Tensor]:
            seen.append((noisy, timesteps))
            return (unet(noisy),)

    class Reader(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            return (input_ids,)

    # What a latent is tells of which kind it is: 0 as it is, far above moved, far below strange.
    latents = torch.zeros(3, 6, 4, 2, 2)
    latents[:, 2:4], latents[:, 4:] = 1e4, -1e4
    data = TrainingSet(latents, torch.zeros(3, 2, 5, dtype=torch.int16), torch.ones(3))
    options = argparse.Namespace(batch=512, compute="float32")
    make_gradient(Net(), Reader(), Arena([unet], torch.float32), data, options)()
    ((noisy, timesteps),) = seen
    kind = noisy.mean((1, 2, 3)).div(50).clamp(-1, 1).round()
    little = timesteps < LITTLE_NOISE
    assert (kind[little] == -1).any() and not (kind[~little] == -1).any()
    assert all((kind[where] == which).any() for where in (little, ~little) for which in (0, 1))


def test_a_unet_is_the_mean_of_what_it_was_and_what_it_became() -> None:
    now, before = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    expected = 0.75 * now.weight.detach() + 0.25 * before.weight.detach()
    mix(now, before.state_dict(), 0.75)
    torch.testing.assert_close(now.weight.detach(), expected)
