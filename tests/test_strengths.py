"""Strengths that do not fit what is drawn, schedules on any sampler, and merges of a part."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
)
from laws import strengths_of
from making import step_watches
from PIL import Image
from test_formats import picture, write_adapter

from peft_diffusion.bases import components
from peft_diffusion.core import merge, site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.strength import Strengths
from peft_diffusion.generation import Adapters, Schedule

Draw: TypeAlias = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "ink.safetensors", make_pipe(), seed=3)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "flat.safetensors"
    return write_adapter(path, make_pipe(), target="all-linear", seed=4, parts=("unet",))


@pytest.fixture
def drawn(tiny_pipe: DiffusionPipeline, flat: Path) -> tuple[Adapters, Draw]:
    """The adapter on a pipeline, and how to draw so many pictures from one noise."""
    adapters = Adapters(tiny_pipe)
    adapters.load(flat)

    def draw(*prompts: str, pipe: DiffusionPipeline = tiny_pipe, **options: Any) -> list[np.ndarray]:
        torch.manual_seed(0)
        told: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, **options}
        return [np.asarray(image).astype(int) for image in pipe(list(prompts), **told).images]

    return adapters, draw


@pytest.mark.parametrize("table", [[[1, 0]], torch.ones(2, 2), {"mid_block": np.ones((1, 2))}])
def test_a_table_of_strengths_is_not_taken_for_those_of_images(table: Any, drawn: tuple[Adapters, Draw]) -> None:
    adapters, _ = drawn
    with pytest.raises(UserError, match=r"one for each image, not a table of \([12], 2\)"):
        adapters.set(flat=table)
    assert strengths_of(adapters.pipe.unet).values.shape[-1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_strengths_per_image_are_for_as_many_images_as_are_drawn(drawn: tuple[Adapters, Draw], guidance: float) -> None:
    adapters, draw = drawn
    adapters.set(flat=[0.0, 1.0])
    for count, more, told in (
        (1, {}, "2 images, but 1 is drawn"),
        (3, {}, "2 images, but 3 are drawn"),
        (4, {}, "2 images, but 4 are drawn"),
        (2, {"num_images_per_prompt": 2}, "2 images, but 4 are drawn"),
    ):
        with pytest.raises(UserError, match=told):
            draw(*["a cat"] * count, guidance_scale=guidance, **more)
    adapters.set(flat=[0.0, 0.3, 0.6, 1.0])
    with pytest.raises(UserError, match="4 images, but 2 are drawn"):
        draw("a cat", "a dog", guidance_scale=guidance)
    assert len(draw("a cat", "a dog", guidance_scale=guidance, num_images_per_prompt=2)) == 4
    adapters.set(flat=1.0)
    assert len(draw("a cat", "a dog", "a cat", guidance_scale=guidance)) == 3
    assert not step_watches(adapters.pipe.unet)


@pytest.mark.slow
def test_strengths_per_image_of_words_alone_are_counted_too(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(write_adapter(tmp_path / "words.safetensors", make_pipe(), seed=3, parts=("text_encoder",)))
    adapters.set(words=[0.0, 1.0])
    with pytest.raises(UserError, match="2 images, but 4 are drawn"):
        tiny_pipe(["a cat"] * 4, num_inference_steps=1)
    assert len(tiny_pipe(["a cat"] * 2, num_inference_steps=1).images) == 2


@pytest.mark.slow
def test_another_pipeline_of_the_same_parts_is_asked_if_it_guides(drawn: tuple[Adapters, Draw]) -> None:
    adapters, draw = drawn
    adapters.set(flat=[0.0, 1.0])
    draw("a cat", "a dog", guidance_scale=1.0)
    other = AutoPipelineForImage2Image.from_pipe(adapters.pipe)
    told = {"image": Image.new("RGB", (64, 64), "red"), "strength": 1.0, "num_inference_steps": 2, "guidance_scale": 5.0}
    assert len(other(["a cat", "a dog"], **told).images) == 2
    with pytest.raises(UserError, match="2 images, but 1 is drawn"):
        other(["a cat"], **told)
    assert len(draw("a cat", "a dog", guidance_scale=1.0)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["0.5", None, {"mid_block": None}, {1: 0.5}, [None, 1.0], [], object()])
def test_a_strength_that_is_none_is_refused_and_a_load_with_it_changes_nothing(
    flat: Path, tiny_pipe: DiffusionPipeline, wrong: Any
) -> None:
    before = picture(tiny_pipe)
    adapters = Adapters(tiny_pipe)
    with pytest.raises(UserError, match=r"strength of|no block"):
        adapters.load(flat, strength=wrong)
    assert adapters.names == () and not site.sites(tiny_pipe.unet) and np.array_equal(picture(tiny_pipe), before)
    adapters.load(flat)
    with pytest.raises(UserError, match=r"strength of|no block"):
        adapters.set(flat=wrong)


def test_a_load_that_is_interrupted_leaves_nothing(
    flat: Path, tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = Adapters(tiny_pipe)
    monkeypatch.setattr(adapters, "set", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapters.load(flat, strength=0.5)
    assert adapters.names == () and not site.sites(tiny_pipe.unet)


def test_a_schedule_is_made_of_any_numbers_and_of_nothing_else() -> None:
    right: tuple[Any, ...] = ([0, 1], (0.0, 1.0), np.array([0, 1.0]), torch.tensor([0, 1]))
    for values in right:
        assert Schedule(values).at(0.25) == 0.25 and Schedule(values).mean == 0.5
    none: tuple[Any, ...] = (0.5, "01", None, [], [None], [float("nan")], torch.zeros(2, 2), np.zeros((2, 2)))
    for wrong in none:
        with pytest.raises(UserError, match="a schedule is a list of finite strengths"):
            Schedule(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler, DDIMScheduler])
def test_a_schedule_begins_and_ends_on_every_sampler(drawn: tuple[Adapters, Draw], scheduler: type[SchedulerMixin]) -> None:
    adapters, draw = drawn
    adapters.pipe.scheduler = scheduler.from_config(adapters.pipe.scheduler.config, skip_prk_steps=True)
    seen = []
    strengths = strengths_of(adapters.pipe.unet)
    adapters.pipe.unet.register_forward_hook(lambda *_: seen.append(float(strengths.values[0, 0, 0])))
    adapters.set(flat=Schedule([0.0, 1.0]))
    draw("a cat", num_inference_steps=4)
    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen)
    assert sorted(set(seen)) == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])


@pytest.mark.slow
def test_a_schedule_follows_the_scheduler_of_the_pipeline_that_calls(drawn: tuple[Adapters, Draw]) -> None:
    adapters, draw = drawn
    other = type(adapters.pipe)(**{**adapters.pipe.components, "requires_safety_checker": False})
    other.set_progress_bar_config(disable=True)
    other.scheduler = HeunDiscreteScheduler.from_config(adapters.pipe.scheduler.config, timestep_spacing="trailing")
    seen = []
    strengths = strengths_of(adapters.pipe.unet)
    adapters.pipe.unet.register_forward_hook(lambda *_: seen.append(float(strengths.values[0, 0, 0])))
    adapters.set(flat=Schedule([0.0, 1.0]))
    adapters.pipe.scheduler.set_timesteps(3)
    draw("a cat", pipe=other, num_inference_steps=5)
    assert sorted(set(seen)) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    with pytest.raises(UserError, match=r"timestep 123\.4, which is none of the scheduler's 3"):
        adapters.pipe.unet(torch.zeros(1, 4, 8, 8), 123.4, torch.zeros(1, 77, 32))


@pytest.mark.slow
def test_merges_of_one_part_are_completed_and_undone(file: Path, tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(file)
    before = picture(tiny_pipe)
    parts = components(tiny_pipe)
    for name in ("unet", "text_encoder"):
        merge.merge(parts[name])
        for refused in (lambda: adapters.set(ink=0.1), lambda: adapters.remove("ink"), lambda: adapters.load(file)):
            with pytest.raises(UserError, match="unmerge them"):
                refused()
        assert all(set(part.scalar("ink").tolist()) == {1.0} for part in map(site.strengths, parts.values()) if part)
        adapters.unmerge()
        assert np.array_equal(picture(tiny_pipe), before)
        with pytest.raises(UserError, match="nothing is merged"):
            adapters.unmerge()
        merge.merge(parts[name])
        assert len(adapters.merge()) == 1
        with pytest.raises(UserError, match="nothing to merge"):
            adapters.merge()
        adapters.unmerge()
        assert np.array_equal(picture(tiny_pipe), before)


def in_threads(work: Callable[[int], Any], count: int = 8) -> list[Any]:
    """What each of several threads makes, which take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(work, range(count)))
    finally:
        sys.setswitchinterval(before)


def by_itself(pipe: DiffusionPipeline, words: torch.Tensor, noise: torch.Tensor, number: int) -> torch.Tensor:
    """What a pipeline of one's own over a shared network draws, in steps of a number of its own."""
    own = StableDiffusionPipeline.from_pipe(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    own.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {"latents": noise, "guidance_scale": 1.0, "output_type": "latent"}
    found: torch.Tensor = own(prompt_embeds=words, num_inference_steps=3 + number, **told).images
    return found


@pytest.mark.slow
@torch.no_grad()
def test_threads_that_share_a_network_follow_a_schedule_each_by_its_own_steps(drawn: tuple[Adapters, Draw]) -> None:
    adapters, _ = drawn
    adapters.set(flat=Schedule([0.0, 1.0, 0.0]))
    pipe = adapters.pipe
    ids = pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    words, noise = pipe.text_encoder(ids)[0], torch.randn(1, 4, 8, 8)

    alone = [by_itself(pipe, words, noise, number) for number in range(8)]
    assert all(map(torch.equal, in_threads(lambda number: by_itself(pipe, words, noise, number)), alone))


def test_what_threads_tell_at_once_is_neither_lost_nor_taken_for_that_of_another() -> None:
    strengths = Strengths(["mid"], torch.device("cpu"))
    for name in ("flat", "a0", "a1", "a2", "a3"):
        strengths.add(name)
    strengths.write({"flat": Schedule([0.0, 1.0])})

    def draws(number: int) -> int:
        """At how many steps the strengths are not those of this thread's step."""
        found = 0
        for turn in range(400):
            progress = (number + turn) % 2 / 2
            strengths.at_progress(progress)
            found += (float(strengths.present[0, 0, 0]), "flat" in strengths.active) != (progress, progress > 0)
        return found

    def sets(number: int) -> int:
        """How often what was set is lost."""
        found = 0
        for turn in range(400):
            strengths.write({f"a{number // 2}": float(turn % 3)})
            found += float(strengths.scalar(f"a{number // 2}").max()) != turn % 3
        return found

    assert sum(in_threads(draws)) == 0
    assert sum(in_threads(lambda number: sets(number) if number % 2 else 0 * draws(number))) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_threads_with_streams_of_their_own_follow_a_schedule_too(drawn: tuple[Adapters, Draw]) -> None:
    adapters, _ = drawn
    adapters.set(flat=Schedule([0.0, 1.0, 0.0]))
    pipe = adapters.pipe.to("cuda")
    words, noise = torch.randn(1, 77, 32, device="cuda"), torch.randn(1, 4, 8, 8, device="cuda")
    alone = [by_itself(pipe, words, noise, number) for number in range(8)]

    def draw(number: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = by_itself(pipe, words, noise, number)
            torch.cuda.current_stream().synchronize()
        return found

    torch.cuda.synchronize()
    for _ in range(5):
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(in_threads(draw), alone, strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_threads_that_load_and_remove_leave_the_base_as_it_was(tiny_pipe: DiffusionPipeline, flat: Path) -> None:
    kinds = {path: type(module) for path, module in tiny_pipe.unet.named_modules()}
    told = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32)
    before = tiny_pipe.unet(*told).sample
    kept = Adapters(tiny_pipe)
    kept.load(flat, name="kept")
    alone = tiny_pipe.unet(*told).sample

    def change(number: int) -> None:
        own = Adapters(tiny_pipe)
        for _ in range(3):
            own.load(flat, name=f"a{number}", strength=0.0)
            own.set({f"a{number}": 0.5})
            own.remove(f"a{number}")

    in_threads(change)
    # Products over the ranks that are free again, all zeros, add up in another order.
    assert kept.names == ("kept",)
    torch.testing.assert_close(tiny_pipe.unet(*told).sample, alone, rtol=1e-5, atol=1e-5)
    kept.remove("kept")
    assert {path: type(module) for path, module in tiny_pipe.unet.named_modules()} == kinds
    assert torch.equal(tiny_pipe.unet(*told).sample, before)
