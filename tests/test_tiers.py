"""Adapters beyond a budget wait, in memory or in their files, and act as if they had never left the base."""

import random
from pathlib import Path

import numpy as np
import pytest
from conftest import make_pipe
from diffusers import DiffusionPipeline
from test_formats import picture, write_adapter

from peft_diffusion import Request, UserError
from peft_diffusion.bases import checksum, components
from peft_diffusion.formats.container import read_header
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.settings import Sampling

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, pipe = tmp_path_factory.mktemp("adapters"), make_pipe()
    return {name: write_adapter(folder / f"{name}.safetensors", pipe, seed=ord(name)) for name in NAMES}


def size_of(file: Path) -> int:
    """Bytes of a file's tensors."""
    return sum(entry.end - entry.start for entry in read_header(file).tensors.values())


def limited(pipe: DiffusionPipeline, files: dict[str, Path], count: int, host: int | None = None) -> Adapters:
    """All four, with room for so many on the base, and in memory."""
    each = size_of(files["a"])
    adapters = Adapters(pipe, budget=count * each, host_budget=None if host is None else host * each)
    for name in NAMES:
        adapters.load(files[name], name, 0.0)
    return adapters


@pytest.mark.slow
def test_the_one_that_was_used_longest_ago_waits(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = limited(tiny_pipe, files, 2)
    assert (adapters.names, adapters.waiting) == (("c", "d"), ("a", "b"))
    adapters.set(a=0.5)
    assert (adapters.names, adapters.waiting) == (("d", "a"), ("b", "c"))
    adapters.set(c=1.0)  # d leaves, as a is in use
    assert (set(adapters.names), adapters.waiting) == ({"a", "c"}, ("b", "d"))
    with pytest.raises(UserError, match="'b' has no room beside those in use"):
        adapters.set(b=1.0)
    with pytest.raises(UserError, match="'e' has no room beside those in use"):
        adapters.load(files["a"], "e")
    adapters.set(a=0.0, b=0.3)
    assert set(adapters.names) == {"c", "b"} and "a" in adapters.waiting
    assert adapters["a"].path == files["a"] and adapters["b"].path == files["b"]
    assert (adapters.loads, adapters.evictions) == (5, 5)  # each file once, and the one that was refused
    adapters.remove("a")
    with pytest.raises(UserError, match="no adapter 'a'"):
        adapters.set(a=1.0)
    with pytest.raises(UserError, match="loaded already"):
        adapters.load(files["d"], "d")


@pytest.mark.slow
@pytest.mark.parametrize("host", [None, 1, 0])
def test_what_waits_comes_back_as_it_was(files: dict[str, Path], tiny_pipe: DiffusionPipeline, host: int | None) -> None:
    plain, chance, before = Adapters(make_pipe()), random.Random(3), checksum(components(tiny_pipe))
    adapters = limited(tiny_pipe, files, 2, host)
    for name in NAMES:
        plain.load(files[name], name, 0.0)
    amounts = dict.fromkeys(NAMES, 0.0)
    for _ in range(5):
        one, other = chance.sample(NAMES, 2)
        amounts = {**dict.fromkeys(NAMES, 0.0), one: chance.uniform(-1, 1), other: chance.choice([0.0, 0.5])}
        adapters.prefetch(*adapters.waiting)
        for each in (plain, adapters):
            each.set(amounts)
        assert np.abs(picture(adapters.pipe).astype(int) - picture(plain.pipe)).max() <= 1, amounts
    assert adapters.evictions > 2 and (adapters.loads == 4) == (host is None)
    for name in NAMES:
        adapters.remove(name)
    assert checksum(components(tiny_pipe)) == before and adapters.waiting == adapters.names == ()


@pytest.mark.slow
def test_a_batch_brings_what_it_needs(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    how = Sampling(steps=2, width=64, height=64)
    requests = [Request("a dog", {name: 0.8}, number, sampling=how) for number, name in enumerate(NAMES)]
    plain = Adapters(make_pipe())
    for name in NAMES:
        plain.load(files[name], name)
    adapters = limited(tiny_pipe, files, 2)
    adapters.set(b=0.4)
    found = adapters.batch(requests, at_most=2)
    for image, own in zip(found, plain.batch(requests, at_most=2), strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(own, int)).max() <= 1
    assert "b" in adapters.names and adapters._registry.states()["unet"].strengths.kept("b") == pytest.approx(0.4)
    assert len(adapters.names) == 2


@pytest.mark.slow
def test_one_that_is_idle_can_be_sent_to_wait(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    with pytest.raises(UserError, match="only where there is a budget"):
        Adapters(tiny_pipe).rest()
    adapters = limited(tiny_pipe, files, 4)
    adapters.set(a=1.0)
    drawn = picture(tiny_pipe)
    for names, why in ((("b", "a"), "a: an adapter in use"), (("b", "z"), "no adapter 'z'")):
        with pytest.raises(UserError, match=why):
            adapters.rest(*names)
    assert not adapters.waiting
    adapters.set(a=0.0)
    adapters.rest("a", "c")
    adapters.rest("a")
    assert (adapters.names, adapters.waiting, adapters.evictions) == (("b", "d"), ("c", "a"), 0)
    adapters.set(a=1.0)
    assert adapters.names == ("b", "d", "a") and adapters.loads == 4 and np.allclose(picture(tiny_pipe), drawn, atol=1e-5)


@pytest.mark.slow
def test_a_waiting_one_is_exchanged_and_a_budget_is_a_number_of_bytes(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    adapters = limited(tiny_pipe, files, 1)
    adapters.swap("a", files["d"])
    adapters.set(a=1.0)
    swapped = picture(tiny_pipe)
    adapters.set(a=0.0, d=1.0)
    assert adapters.names == ("d",) and np.array_equal(picture(tiny_pipe), swapped)
    with pytest.raises(UserError, match="budget is a number of bytes"):
        Adapters(tiny_pipe, budget=-1)
    with pytest.raises(UserError, match="no adapter 'z'"):
        adapters.prefetch("z")
