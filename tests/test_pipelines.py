"""What is asked of pipelines of diffusers beyond their manual, on every class that this package draws with."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from peft_diffusion.bases import pipelines

CLASSES: dict[type[Any], Callable[[], Any]] = {
    StableDiffusionPipeline: make_pipe,
    StableDiffusionImg2ImgPipeline: make_pipe,
    StableDiffusionInpaintPipeline: lambda: make_pipe(in_channels=9),
    StableDiffusionXLPipeline: make_xl_pipe,
    StableDiffusionXLImg2ImgPipeline: make_xl_pipe,
    StableDiffusionXLInpaintPipeline: lambda: make_xl_pipe(in_channels=9),
}


def made(cls: type[Any]) -> tuple[Any, dict[str, Any]]:
    """A pipeline of a class, and what a call of it is told."""
    torch.manual_seed(0)
    whole = CLASSES[cls]()
    pipe = whole if type(whole) is cls else cls.from_pipe(whole)
    pipe.set_progress_bar_config(disable=True)
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    told: dict[str, Any] = {"prompt": ["a cat"], "num_inference_steps": 4, "guidance_scale": 5.0}
    if "Img2Img" in cls.__name__:
        return pipe, told | {"image": picture, "strength": 1.0}
    size = {"width": 64, "height": 64}
    return pipe, told | size | ({"image": picture, "mask_image": mask, "strength": 1.0} if "Inpaint" in cls.__name__ else {})


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_guidance_ends_where_the_callback_says_so(cls: type[Any]) -> None:
    pipe, told = made(cls)
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))

    def after(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert pipeline.do_classifier_free_guidance == (step < 2)
        return pipelines.end_guidance(pipeline, tensors) if step == 1 else {}

    names = pipelines.guided_tensors(pipe)
    assert "prompt_embeds" in names
    image = pipe(**told, callback_on_step_end=after, callback_on_step_end_tensor_inputs=names).images[0]
    assert batches == [2, 2, 1, 1] and image.size == (64, 64)
    assert len(pipe(**told).images) == 1 and batches[4:] == [2] * 4, "the next call guides again"


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_pipeline_that_draws_is_known_while_it_does(cls: type[Any]) -> None:
    pipelines.watch()
    pipe, told = made(cls)
    seen: list[tuple[Any, int, float]] = []

    def look(network: Any, args: tuple[Any, ...]) -> None:
        drawing = pipelines.drawing_with(network)
        assert drawing is not None
        seen.append((drawing, pipelines.images_drawn(drawing, len(args[0])), pipelines.progress(drawing, float(args[1]))))

    pipe.unet.register_forward_pre_hook(look)
    assert pipelines.drawing_with(pipe.unet) is None
    pipe(**told)
    pipe(**{**told, "guidance_scale": 1.0})
    assert [drawing for drawing, _, _ in seen] == [pipe] * 8 and {count for _, count, _ in seen} == {1}
    assert [round(far, 3) for _, _, far in seen[:4]] == [0.0, 0.333, 0.667, 1.0]
    assert pipelines.drawing_with(pipe.unet) is None


@pytest.mark.slow
def test_of_pipelines_one_within_the_other_the_one_with_the_network_is_told() -> None:
    pipelines.watch()
    outer, inner = make_pipe(), make_pipe(seed=1)
    told: dict[str, Any] = {"num_inference_steps": 1, "width": 64, "height": 64}
    seen: list[Any] = []
    inner.unet.register_forward_pre_hook(
        lambda network, _: seen.append((pipelines.drawing_with(network), pipelines.drawing_with(outer.unet)))
    )

    def draw_another(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inner("a cat", **told)
        assert pipelines.drawing_with(inner.unet) is None and pipelines.drawing_with(outer.unet) is outer
        return {}

    outer("a dog", **told, callback_on_step_end=draw_another)
    assert seen == [(inner, outer)]


def test_threads_do_not_see_each_other_and_an_error_leaves_nothing() -> None:
    pipelines.watch()
    pipe = make_pipe()
    seen: list[Any] = []

    def fail(network: Any, _: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(pipelines.drawing_with(network)))
        thread.start()
        thread.join()
        raise RuntimeError("broken")

    pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        pipe("a cat", num_inference_steps=1, width=64, height=64)
    assert seen == [None] and pipelines.drawing_with(pipe.unet) is None


def test_the_progress_bar_of_others_is_what_it_was() -> None:
    pipelines.watch()
    bar = DiffusionPipeline.progress_bar
    pipelines.watch()
    assert DiffusionPipeline.progress_bar is bar
    pipe = make_pipe()
    pipe.set_progress_bar_config(disable=False)
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    with pipe.progress_bar(total=2) as shown:
        shown.update()
        assert shown.n == 1


def test_drawing_gives_back_scheduler_and_bar() -> None:
    pipe = make_pipe()
    before = pipe.scheduler
    pipe.set_progress_bar_config(desc="mine")
    with pipelines.drawing(pipe, torch.nn.Identity()):
        assert isinstance(pipe.scheduler, torch.nn.Identity)
    assert pipe.scheduler is before and pipe._progress_bar_config == {"desc": "mine"}
