"""Requests of several people in one batch, each against the pipeline by itself with the adapters of that one alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from test_formats import write_adapter

from peft_diffusion import ByPart, Request, Schedule, UserError
from peft_diffusion.core.events import Event, Noted
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.settings import Sampling

HOW = Sampling(steps=3, guidance=4.0, width=64, height=64)
FADED = ByPart(0.9, blocks={"mid": 1.0, "up.1": 0.5}, steps=Schedule([1.0, 0.2]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of several ranks, targets and parts, by the names that they are loaded under."""
    folder, pipe = tmp_path_factory.mktemp("adapters"), make_pipe()
    return {
        "ink": write_adapter(folder / "ink.safetensors", pipe, seed=3),
        "flat": write_adapter(folder / "flat.safetensors", pipe, "all-linear", rank=2, seed=4, parts=("unet",)),
        "line": write_adapter(folder / "line.safetensors", pipe, "all", rank=3, seed=5),
    }


def loaded(pipe: DiffusionPipeline, files: dict[str, Path], *names: str) -> Adapters:
    adapters = Adapters(pipe)
    for name in names:
        adapters.load(files[name], name)
    return adapters


def numbers(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What is drawn, before it is rounded to bytes."""
    kept: list[np.ndarray] = []
    plain = type(pipe.image_processor).numpy_to_pil

    def keep(images: np.ndarray) -> Any:
        kept.extend(images)
        return plain(images)

    monkeypatch.setattr(pipe.image_processor, "numpy_to_pil", keep)
    return kept


def alone(make: Callable[[], DiffusionPipeline], files: dict[str, Path], request: Request) -> np.ndarray:
    """The picture of a request by a pipeline of its own, which is called as diffusers' users do."""
    pipe, how = make(), request.sampling
    adapters = loaded(pipe, files, *request.adapters)
    adapters.set(dict(request.adapters))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(request.seed))
    drawn = pipe(
        request.prompt, negative_prompt=request.negative, latents=noise, num_inference_steps=how.taken_steps, height=64,
        width=64, guidance_scale=how.guided_by, output_type="np",
    ).images[0]  # fmt: skip
    assert isinstance(drawn, np.ndarray)
    return drawn


REQUESTS = [
    Request("a red cat", {"ink": 0.8}, 1, "blue", HOW),
    Request("a dog", {"ink": -0.3, "flat": 1.0, "line": 0.5}, 2, "", HOW),
    Request("a red cat", {}, 3, "a red dog", HOW),
    Request("a house", {"flat": FADED}, 4, "blue", HOW),
    Request("a dog", {"line": Schedule([0.0, 1.0]), "ink": 0.5}, 1, "", HOW),
    Request("", {"line": ByPart(1.0, components={"unet": 0.5, "text_encoder": 2.0})}, 6, "red", HOW),
]


@pytest.mark.slow
@pytest.mark.parametrize("at_most", [2, 8])
def test_a_picture_of_a_batch_is_that_of_its_own_run(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    adapters = loaded(tiny_pipe, files, "ink", "flat", "line")
    adapters.set(ink=0.25, flat=Schedule([0.0, 1.0]))
    kept, told = numbers(tiny_pipe, monkeypatch), list[Event]()
    assert len(adapters.batch(REQUESTS, at_most=at_most, tell=told.append)) == len(kept) == len(REQUESTS)
    assert not [event for event in told if isinstance(event, Noted)]
    own = [alone(make_pipe, files, request) for request in REQUESTS]
    for together, by_itself in zip(kept, own, strict=True):
        assert np.abs(together - by_itself).max() < 1e-5
    for number, one in enumerate(own):
        assert all(np.abs(one - other).max() > 1e-2 for other in own[:number])
    state = next(iter(adapters._registry.states().values()))
    assert state.strengths.images == 1 and state.strengths.kept("ink") == 0.25 and "flat" in adapters.schedules


@pytest.mark.slow
def test_pictures_of_xl_share_a_batch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_xl_pipe()
    parts = ("unet", "text_encoder", "text_encoder_2")
    files = {name: write_adapter(tmp_path / f"{name}.safetensors", pipe, seed=3, parts=parts) for name in ("ink", "flat")}
    requests = [Request("a red cat", {"ink": 0.8}, 1, "blue", HOW), Request("a dog", {"flat": 0.4}, 2, "red", HOW)]
    adapters, kept = loaded(pipe, files, *files), numbers(pipe, monkeypatch)
    adapters.batch(requests)
    for together, request in zip(kept, requests, strict=True):
        assert np.abs(together - alone(make_xl_pipe, files, request)).max() < 1e-5


@pytest.mark.slow
def test_what_cannot_share_a_batch_is_drawn_group_by_group_and_told(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Sampling(steps=2, guidance=4.0, width=64, height=64)
    long = " ".join(["a red cat"] * 40)
    requests = [
        Request("a dog", {"ink": 0.8}, 1, "", HOW),
        Request("a dog", {"flat": 0.8}, 1, "", other),
        Request(long, {"ink": 0.4}, 2, "", HOW),
        Request("a red cat", {"flat": 1.0}, 3, "blue", HOW),
    ]
    adapters, kept, told = loaded(tiny_pipe, files, "ink", "flat"), numbers(tiny_pipe, monkeypatch), list[Event]()
    adapters.batch(requests, tell=told.append)
    (note,) = [event.message for event in told if isinstance(event, Noted)]
    assert note == "4 pictures are drawn in 3 groups, as they differ in steps, length of prompts"
    together = dict(zip([0, 3, 1, 2], kept, strict=True))
    for number in (0, 1, 3):
        assert np.abs(together[number] - alone(make_pipe, files, requests[number])).max() < 1e-5
    kept.clear()
    adapters.batch(requests[2:3])
    assert np.abs(together[2] - kept[0]).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request("a cat", {"nobody": 1.0}), "no adapter 'nobody' is loaded"),
        (Request("a cat", {"ink": ByPart(blocks={"nowhere": 1.0})}, sampling=HOW), "no block nowhere"),
        (Request("a cat", {"ink": float("nan")}, sampling=HOW), "finite"),
        (Request("a cat", negative="blue", sampling=Sampling(guidance=1.0)), "no effect at guidance 1"),
        (Request("a cat", sampling=Sampling(width=63)), "width 63 is no multiple"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, request_: Request, told: str
) -> None:
    adapters = loaded(tiny_pipe, files, "ink")
    with pytest.raises(UserError, match=told):
        adapters.batch([Request("a dog", {"ink": 0.5}, sampling=HOW), request_])
    with pytest.raises(UserError, match="at_most must be 1 or more"):
        adapters.batch([], at_most=0)
    with pytest.raises(UserError, match="are of regions; give regions too"):
        Request("a dog", region_feather=0.2)
    assert adapters.batch([]) == []
    assert next(iter(adapters._registry.states().values())).strengths.kept("ink") == 1.0
