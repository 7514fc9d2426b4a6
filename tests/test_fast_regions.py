"""Pictures with regions by recorded steps: each kind is recorded once, and as many are kept as there is room for."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe
from taped import tape
from test_batching import numbers
from test_fast_generation import carry, given
from test_formats import write_adapter
from test_regions import halves
from torch import Tensor, nn

from peft_diffusion import GenerateConfig, Region, generate
from peft_diffusion.bases import regional_attention
from peft_diffusion.core import regions, site
from peft_diffusion.core.regions import Layout
from peft_diffusion.fast import drawing
from peft_diffusion.generation import Adapters


def engine_of(network: nn.Module) -> drawing.Engine:
    found = drawing.engine_of(network)
    assert found is not None
    return found


@pytest.mark.slow
def test_calls_of_generate_go_back_and_forth_between_kinds_of_pictures_and_record_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape(monkeypatch)
    fast, plain = make_pipe(), make_pipe()
    drawn = {id(pipe): numbers(pipe, monkeypatch) for pipe in (fast, plain)}
    ink, flat = (
        write_adapter(tmp_path / f"{name}.safetensors", plain, seed=seed, rank=seed, parts=("unet",))
        for seed, name in enumerate(("ink", "flat"), 2)
    )

    def whole(strength: float) -> dict[str, Any]:
        return {"prompts": ("a cat",), "adapter": (f"{ink}={strength}",), "steps": 1}

    def parted(at: float, first: Path, second: Path, prompt: str, **how: Any) -> dict[str, Any]:
        left = Region(box=(0, 0, at, 1), prompt=prompt, adapter=(f"{first}=0.8",))
        right = Region(box=(at, 0, 1, 1), adapter=(f"{second}=0.5",))
        return {"prompts": ("a dog",), "region": (left, right), "steps": 2, **how}

    def pair(number: int, call: dict[str, Any], asked: bool | None) -> None:
        for pipe, quick in ((fast, asked), (plain, None)):
            how = {"seed": number, "guidance": 1.0, "width": 32, "height": 32, "device": "cpu", "scheduler": "euler", **call}
            generate(GenerateConfig(**how, fast=quick, output=tmp_path / f"{number}{quick}"), pipe=pipe)
        found, expected = (drawn[id(pipe)][-1] for pipe in (fast, plain))
        assert np.abs(found - expected).max() < 1e-5
        assert not Adapters(fast).names and drawing.engine_of(plain.unet) is None

    made = []
    for number, call in enumerate(
        (
            whole(0.9),
            parted(0.5, ink, flat, "a red cat"),  # apart at the first of its steps, and not at the second
            whole(0.4),
            parted(0.25, flat, ink, "a house"),
            parted(0.5, ink, flat, "a red cat", region_isolation=0.0),
        )
    ):
        pair(number, call, True)
        engine = engine_of(fast.unet)
        assert engine.refused is None
        made.append(engine.recordings)
    assert made == [2, 6, 6, 6, 6]  # of a step, and of what prompts are told by
    pair(5, whole(0.7), False)
    assert engine_of(fast.unet).recordings == 0  # fast again, as it was lent


class Both:
    """A network with two adapters that is computed from recordings, and beside it as it is."""

    def __init__(self) -> None:
        self.plain = make_pipe().unet
        for seed, name in enumerate(("ink", "flat")):
            carry(self.plain, name, seed=seed)
        self.fast = copy.deepcopy(self.plain)
        self.engine = drawing.start(self.fast)
        self.seed = 0
        self.layout: weakref.ref[Layout] | None = None

    @torch.no_grad()
    def recorded(self, groups: list[int] | None = None, size: tuple[int, int] = (8, 8), batch: int = 1) -> int:
        """How many recordings a call needs, which is given what the plain network gives."""
        before, found = self.engine.recordings, list[Tensor]()
        self.seed += 1
        call = given(self.plain, batch, self.seed)
        call["sample"] = call["sample"][:, :, : size[0], : size[1]]
        for network in (self.plain, self.fast):
            strengths = site.strengths(network)
            assert strengths is not None
            if groups is None:
                strengths.write({"ink": 0.1 * self.seed, "flat": 0.5})
                found.append(network(**call).sample)
                continue
            masks = (halves(64, 64) + 0.1 * self.seed) / (1 + 0.2 * self.seed)
            layout = Layout(masks, size, [network], [groups])
            self.layout = weakref.ref(layout)
            strengths.write({"ink": [0.9, 0.0], "flat": [0.0, 0.1 * self.seed]})
            told = call["encoder_hidden_states"].repeat(1, 2, 1)
            with regional_attention.attending([network]), regions.using(layout):
                found.append(network(**{**call, "encoder_hidden_states": told}).sample)
            del layout
        assert self.engine.refused is None
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        return self.engine.recordings - before


@pytest.mark.slow
def test_what_was_drawn_longest_ago_is_recorded_anew_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    tape(monkeypatch)
    monkeypatch.setattr(drawing, "_ROOM", {False: 2, True: 2})
    both = Both()
    assert [both.recorded(), both.recorded(size=(8, 6))] == [2, 1]  # which are told alike
    assert [both.recorded([0, 0]), both.recorded([0, 1]), both.recorded([0, 0])] == [2, 2, 0]
    assert [both.recorded([1, 0]), both.recorded([0, 0]), both.recorded([0, 1])] == [2, 0, 2]
    # Guidance repeats pictures, and the masks of both kinds lie in one place.
    guided = [both.recorded([0, 1], batch=2), both.recorded([1, 0]), both.recorded([0, 1], batch=2)]
    assert guided == [2, 2, 0]
    assert [both.recorded(batch=2), both.recorded(size=(8, 6)), both.recorded()] == [2, 0, 1]
    engine = both.engine
    assert (len(engine._steps.graphs), len(engine._tellings.graphs), len(engine._layouts)) == (4, 3, 2)
    gc.collect()
    assert both.layout is not None and both.layout() is None  # nor the networks that it knows
    for network in (both.plain, both.fast):
        network.conv_in.weight.data = 1.1 * network.conv_in.weight.data
    assert both.recorded([0, 1]) == 2  # as what was recorded before was of other weights
