"""Composition of adapters: pictures against the denoising loop written out, and what recipes and refusals say of it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, KDPM2DiscreteScheduler
from laws import strengths_of
from making import make_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_diffusion import (
    Adapters,
    BlendConfig,
    ByPart,
    GenerateConfig,
    GridConfig,
    Schedule,
    UserError,
    blend,
    generate,
    grid,
)
from peft_diffusion.core.slot import slot_of
from peft_diffusion.generation.composition import composed, rows_of
from peft_diffusion.generation.compositions import COMPOSITIONS, LEARNED, Compose
from peft_diffusion.generation.compositions.declared import Composition, Drawing, used
from peft_diffusion.generation.sampler import Cell

STEPS, GUIDANCE, RANK = 5, 2.0, 4


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("composition")
    return {
        name: make_adapter(folder / f"{name}.safetensors", tiny_base, seed, size=0.5)
        for seed, name in enumerate(("ink", "flat"), 1)
    }


def chosen(files: Mapping[str, Path]) -> tuple[str, str]:
    """One at 0.75, and one at 0.25 that fades and leaves the text encoder alone."""
    return f"{files['ink']}=0.75", f"{files['flat']}=0.25,te:0,0:1,1:0.5"


def common(output: Path) -> dict[str, Any]:
    return {"steps": STEPS, "guidance": GUIDANCE, "scheduler": "ddim", "device": "cpu", "output": output}


class ByHand:
    """The denoising loop of diffusers' DDIM, with the adapters set by hand before each call of the network."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters, self.pipe = adapters, adapters.pipe

    def told(self, **strengths: float) -> tuple[Any, Any]:
        self.adapters.set(strengths)
        with_prompt, without = self.pipe.encode_prompt("a cat", self.pipe.device, 1, True)
        return with_prompt, without

    def predicted(self, latents: torch.Tensor, time: Any, told: tuple[Any, Any], **strengths: float) -> torch.Tensor:
        self.adapters.set(strengths)
        with_prompt, without = (self.pipe.unet(latents, time, hidden).sample for hidden in told)
        answer: torch.Tensor = without + GUIDANCE * (with_prompt - without)
        return answer

    def switch(self, step: int, latents: torch.Tensor, time: Any) -> torch.Tensor:
        told = self.told(ink=0.75 * 0.5, flat=0.0)  # a text encoder takes the mean of 1, 0, 1, 0, 1
        fade = 1 - 0.5 * step / (STEPS - 1)
        on = {"ink": 0.0, "flat": 0.25 * fade} if step % 2 else {"ink": 0.75, "flat": 0.0}
        return self.predicted(latents, time, told, **on)

    def composite(self, step: int, latents: torch.Tensor, time: Any) -> torch.Tensor:
        fade = 1 - 0.5 * step / (STEPS - 1)
        ink = self.predicted(latents, time, self.told(ink=1.0, flat=0.0), ink=1.0, flat=0.0)
        flat = self.predicted(latents, time, self.told(ink=0.0, flat=0.0), ink=0.0, flat=fade)
        return 0.75 * ink + 0.25 * flat

    @torch.no_grad()
    def drawn(self, compose: Compose, seed: int) -> torch.Tensor:
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(STEPS)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step, time in enumerate(scheduler.timesteps):
            latents = scheduler.step(getattr(self, compose)(step, latents, time), time, latents).prev_sample
        scaled: torch.Tensor = latents / self.pipe.vae.config.scaling_factor
        return scaled


@pytest.mark.slow
@pytest.mark.parametrize("compose", ["switch", "composite"])
def test_pictures_are_those_of_the_loop_written_out(
    compose: Compose, files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[torch.Tensor] = []
    decode = tiny_pipe.vae.decode

    def spied(latents: torch.Tensor, *given: Any, **named: Any) -> Any:
        decoded.extend(latents.split(1))
        return decode(latents, *given, **named)

    monkeypatch.setattr(tiny_pipe.vae, "decode", spied)
    hooks = len(tiny_pipe.unet._forward_hooks)
    config = GenerateConfig("a cat", adapter=chosen(files), compose=compose, seed=3, count=2, **common(tmp_path / "a"))
    first, second = generate(config, pipe=tiny_pipe)
    assert len(tiny_pipe.unet._forward_hooks) == hooks
    each = len(decoded) // 2  # rows of a picture
    assert each == (2 if compose == "composite" else 1)

    told = GenerateConfig(recipe=first.path, device="cpu", fast=True, output=tmp_path / "b.png")  # the same up to rounding
    again = generate(told, pipe=tiny_pipe)[0]
    assert again.recipe == first.recipe and again.recipe.compose == compose
    assert max(abs(a - b) for a, b in zip(again.image.tobytes(), first.image.tobytes(), strict=True)) <= 1
    added = GenerateConfig("a cat", adapter=chosen(files), seed=3, **common(tmp_path / "c.png"))
    plain = generate(added, pipe=tiny_pipe)[0]
    assert plain.recipe.compose is None and "compose" not in plain.recipe.to_json()

    adapters = Adapters(tiny_pipe)
    for name, file in files.items():
        adapters.load(file, name=name)
    by_hand = ByHand(adapters)
    for picture, seed in ((first, 3), (second, 4)):
        expected = by_hand.drawn(compose, picture.recipe.seed)
        assert picture.recipe.seed == seed
        for row in decoded[(seed - 3) * each :][:each]:
            assert (row - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - decoded[-1]).abs().max() > 1e-3  # the last was added, of another seed


@pytest.mark.slow
def test_a_turn_is_a_step_of_the_sampler(tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    cell = Cell("", 0, {"ink": 0.5, "off": 0.0, "flat": ByPart(1.0, {"unet": 0.5}), "oil": 1.0})
    (turned,) = composed([cell], "switch", Drawing(adapters, tiny_pipe.scheduler, 4))
    assert turned.strengths == {
        "ink": ByPart(0.5, steps=Schedule([1, 0, 0, 1])),
        "off": 0.0,
        "flat": ByPart(1.0, {"unet": 0.5}, steps=Schedule([0, 1, 0, 0])),
        "oil": ByPart(1.0, steps=Schedule([0, 0, 1, 0])),
    }
    other = KDPM2DiscreteScheduler.from_config(tiny_pipe.scheduler.config)
    (twice,) = composed([cell], "switch", Drawing(adapters, other, 4))
    ink = (twice.strengths or {})["ink"]
    assert isinstance(ink, ByPart) and ink.steps == Schedule([1, 1, 0, 0, 0, 0, 1])  # a second level within each step
    alone = Cell("", 0, {"ink": 0.5, "off": 0.0})
    assert composed([alone], "switch", Drawing(adapters, tiny_pipe.scheduler, 4)) == [alone]


def uneven(file: Path, to: Path, seed: int) -> Path:
    """The same with every layer stronger or weaker, as training makes them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    for key in tensors:
        if key.endswith("lora_up.weight"):
            tensors[key] *= float(torch.randn((), generator=generator).mul(0.5).exp())
    with safe_open(file, "pt") as opened:
        save_file(tensors, to, opened.metadata())
    return to


class KLoraByHand:
    """The rule as klora.py and utils.py of its authors have it, with real progress, on whole matrices in float64."""

    def __init__(self, content: Path, style: Path) -> None:
        self.changes = [self.read(file) for file in (content, style)]
        ratios = [np.abs(self.changes[0][site]).sum() / np.abs(self.changes[1][site]).sum() for site in self.changes[0]]
        self.gamma = float(np.mean([ratio for ratio in ratios if ratio < 3 * np.mean(ratios)]))

    @staticmethod
    def read(file: Path) -> dict[str, np.ndarray]:
        tensors = {key: value.double().numpy() for key, value in load_file(file).items() if key.startswith("lora_unet_")}
        sites = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
        return {
            site: tensors[f"{site}.lora_up.weight"] @ tensors[f"{site}.lora_down.weight"] * tensors[f"{site}.alpha"] / RANK
            for site in sites
        }

    def takes_content(self, site: str, progress: float) -> bool:
        content, style = (np.sort(np.abs(one[site]).ravel())[-RANK * RANK :].sum() for one in self.changes)
        return bool(content / self.gamma / (style * (1.5 * progress + 0.5)) > 1)


@pytest.mark.slow
def test_k_lora_is_its_published_rule_at_each_layer(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    adapters, own = Adapters(tiny_pipe), [uneven(file, tmp_path / file.name, n) for n, file in enumerate(files.values())]
    for file in own:
        adapters.load(file)
    by_hand, drawing = KLoraByHand(*own), Drawing(adapters, tiny_pipe.scheduler, STEPS)
    cell = Cell("a cat", 0, {"ink": 0.75, "flat": ByPart(0.5, {"text_encoder": 0.5})})
    (found,) = composed([cell], "k-lora", drawing)
    assert composed([cell], "k-lora", drawing.of_pass(3)) == [found] and found.strengths is not None
    adapters.set(dict(found.strengths))
    paths = {f"lora_unet_{path.replace('.', '_')}": module for path, module in tiny_pipe.unet.named_modules()}
    strengths, times = strengths_of(tiny_pipe.unet), dict.fromkeys(by_hand.changes[0], 0)
    for progress in np.linspace(0, 1, STEPS):
        strengths.at_progress(float(progress))
        for site in times:
            slot = slot_of(paths[site])
            assert slot is not None
            content = by_hand.takes_content(site, progress)
            expected = [0.75, 0.0] if content else [0.0, 0.5]
            assert strengths.present[:2, slot.block, 0].tolist() == expected, (site, progress)
            times[site] += content
    assert len(set(times.values())) > 3  # layers change over at different steps
    ink = found.strengths["ink"]
    assert isinstance(ink, ByPart)
    share = np.mean([schedule.mean for schedule in ink.block_steps.values()])
    for name, mean in (("ink", 0.75 * share), ("flat", 0.5 * 0.5 * (1 - share))):
        np.testing.assert_allclose(strengths_of(tiny_pipe.text_encoder).scalar(name), mean, rtol=1e-5)
    slots = [slot for one in paths.values() if (slot := slot_of(one)) is not None]
    assert all(slot.adapters.stored("ink") is not None for slot in slots)  # none was built for it


@pytest.mark.slow
def test_k_lora_leaves_layers_to_one_where_the_other_is_off(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    for file in files.values():
        adapters.load(file)
    cell = Cell("a cat", 0, {"ink": ByPart(0.75, {"text_encoder": 0.0}, {"mid": 1.0}), "flat": 0.5})
    (found,) = composed([cell], "k-lora", Drawing(adapters, tiny_pipe.scheduler, STEPS))
    adapters.set(dict(found.strengths or {}))
    strengths, mid = strengths_of(tiny_pipe.unet), 0
    for progress in (0.0, 0.5, 1.0):
        strengths.at_progress(progress)
        for path, module in tiny_pipe.unet.named_modules():
            if (slot := slot_of(module)) is not None:
                on = strengths.present[:2, slot.block, 0].tolist()
                assert on == [0.0, 0.5] or (path.startswith("mid_block") and on == [0.75, 0.0]), (path, progress)
                mid += on[0] > 0
    assert mid  # the first has steps where it acts
    assert strengths_of(tiny_pipe.text_encoder).scalar("flat").unique().tolist() == [0.5]


@pytest.mark.slow
def test_k_lora_takes_two_adapters_with_a_layer_in_common(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    with safe_open(files["flat"], "pt") as opened:
        text = {key: value for key, value in load_file(files["flat"]).items() if key.startswith("lora_te")}
        save_file(text, tmp_path / "text.safetensors", opened.metadata())
    told: dict[str, Any] = {"compose": "k-lora", **common(tmp_path / "a.png")}
    both = str(files["ink"]), str(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="between 'ink' and 'text', and there is none whose weight both change"):
        generate(GenerateConfig("a cat", adapter=both, **told), pipe=tiny_pipe)
    with pytest.raises(UserError, match="--compose k-lora is for 2 adapters, and 3 are given"):
        generate(GenerateConfig("a cat", adapter=(*both, str(files["flat"])), **told), pipe=tiny_pipe)


def test_a_composition_is_one_file_and_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What draws reads the table, and knows none by its name."""

    class Halves(Composition):
        name, words, most = "halves", "the first at half its strength, and a row without any", 1

        def rows(self, cell: Cell) -> list[tuple[Cell, float]]:
            return [(cell, 0.75), (replace(cell, strengths={}), 0.25)]

        def strengths(self, cell: Cell, drawing: Drawing) -> Mapping[str, float | ByPart]:
            return {name: one.scaled(0.5) for name, one in used(cell).items()}

    monkeypatch.setitem(COMPOSITIONS, Halves.name, Halves())
    nothing: Any = None
    laid = rows_of([Cell("a cat", 0, {"ink": 0.8}), Cell("a dog", 0, {"ink": 0.4})], "halves")
    assert laid.pictures == (0, 0, 1, 1) and laid.weights == (0.75, 0.25, 0.75, 0.25)
    drawn = composed(laid.cells, "halves", Drawing(nothing, nothing, 4))
    assert [one.strengths for one in drawn] == [{"ink": ByPart(0.4)}, {}, {"ink": ByPart(0.2)}, {}]
    with pytest.raises(UserError, match="--compose halves is for 1 adapter, and 2 are given"):
        COMPOSITIONS["halves"].check(2)


def test_rows_are_adapters_alone_weighed_by_their_strengths() -> None:
    cells = [Cell("a", 0, {"ink": 0.5, "flat": ByPart(1.5, {"unet": 0.5})}), Cell("b", 1, {"ink": 0.5, "flat": 0.0})]
    rows = rows_of(cells, "composite")
    ink, none = {"ink": ByPart(1.0), "flat": 0.0}, {"ink": 0.0, "flat": 0.0}
    assert [row.strengths for row in rows.cells] == [ink, {"ink": 0.0, "flat": ByPart(1.0, {"unet": 0.5})}, ink, none]
    assert (rows.pictures, rows.weights, rows.firsts) == ((0, 0, 1, 1), (0.25, 0.75, 0.5, 0.5), [0, 2])
    assert rows_of(cells, "add").cells == cells
    for strengths in ({"ink": 1.0, "flat": -1.0}, {"ink": -1.0, "flat": 0.0}):
        with pytest.raises(UserError, match="cannot be -1"):
            rows_of([Cell("", 0, strengths)], "composite")


def shares(**strengths: float) -> tuple[float, ...]:
    """The share that each adapter has in the mean of composite, and then the base's."""
    rows, found = rows_of([Cell("", 0, strengths)], "composite"), dict.fromkeys((*strengths, "base"), 0.0)
    for row, weight in zip(rows.cells, rows.weights, strict=True):
        (acting,) = [name for name, one in used(row).items() if one == ByPart(1.0)] or ["base"]
        found[acting] += weight
    return tuple(found.values())


def test_a_mean_has_no_jump_where_an_adapter_is_turned_off() -> None:
    assert shares(ink=0.6, flat=0.4) == (0.6, 0.4, 0.0)
    assert shares(ink=0.6, flat=0.1) == pytest.approx((0.6, 0.1, 0.3))
    assert shares(ink=0.6, flat=0.0) == (0.6, 0.0, 0.4) == pytest.approx(shares(ink=0.6, flat=1e-9), abs=1e-6)
    assert shares(ink=2.0, flat=0.0) == (1.0, 0.0, 0.0) == pytest.approx(shares(ink=2.0, flat=1e-9), abs=1e-6)
    assert shares(ink=0.0, flat=0.0) == (0.0, 0.0, 1.0) == pytest.approx(shares(ink=1e-9, flat=0.0), abs=1e-6)
    assert shares(ink=1.0, flat=1.0) == (0.5, 0.5, 0.0) == shares(ink=0.5, flat=0.5)
    assert len(rows_of([Cell("", 0, {"ink": 1 - 0.9, "flat": 0.9})], "composite").cells) == 2  # 1 but for rounding


@pytest.mark.slow
def test_sheets_and_a_second_pass_compose_too(files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 2, "guidance": 1.0, "device": "cpu", "adapter": tuple(map(str, files.values()))}
    sheet = blend(
        BlendConfig("a cat", columns=3, plain=True, compose="composite", output=tmp_path / "b.png", **how), pipe=tiny_pipe
    )
    one, middle, other = (list(picture.getdata()) for picture in sheet.pictures[0])
    assert one != middle != other and [told.compose for told in sheet.recipes[0]] == ["composite"] * 3
    sides = grid(GridConfig("a cat", x="compose=add,switch,composite", output=tmp_path / "g.png", **how), pipe=tiny_pipe)
    assert len({picture.tobytes() for picture in sides.pictures[0]}) == 3
    for compose in (name for name in COMPOSITIONS if name not in ("add", LEARNED)):
        config = GenerateConfig("a cat", hires=1.5, compose=compose, output=tmp_path / "h.png", **how)
        assert generate(config, pipe=tiny_pipe)[0].image.size == (96, 96)


@pytest.mark.slow
def test_one_adapter_alone_is_nothing_to_compose(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    config = GenerateConfig("a cat", adapter=(str(files["ink"]),), compose="switch", **common(tmp_path / "a.png"))
    with pytest.raises(UserError, match="--compose switch does nothing with 1 adapter; give two or more"):
        generate(config, pipe=tiny_pipe)
    with pytest.raises(UserError, match="does nothing with no adapter"):
        grid(GridConfig("a cat", compose="composite", output=tmp_path / "g.png"), pipe=tiny_pipe)
    with pytest.raises(UserError, match="add, switch, composite"):
        GenerateConfig("a cat", compose="swap")
