"""Regions of pictures: each against a run of its own, at sites, in attention, and by whole pictures."""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import ControlNetModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from making import make_adapter
from PIL import Image
from taped import tape
from test_batching import numbers
from test_fast_generation import CUDA
from test_fast_generation import carry as fast_carry
from test_formats import write_adapter
from test_registry import write_words
from torch import Tensor, nn
from torch.nn import functional as F

from peft_diffusion import BlendConfig, GenerateConfig, GridConfig, Region, Request, blend, generate, grid
from peft_diffusion.bases import regional_attention
from peft_diffusion.bases.regional_attention import Maps
from peft_diffusion.core import regions, site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Noted, Warned
from peft_diffusion.core.method import METHODS, Method
from peft_diffusion.core.regions import Layout
from peft_diffusion.core.strength_schedule import ByPart
from peft_diffusion.fast import drawing
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.asked import order
from peft_diffusion.generation.automatic_regions import concepts_of
from peft_diffusion.generation.recipe import write as write_recipe
from peft_diffusion.generation.regions import Area, Division, DrawnRegion, Regional, parse_area, picture_masks
from peft_diffusion.generation.sampler import Cell
from peft_diffusion.generation.settings import Sampling
from peft_diffusion.generation.telling import Telling
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.prompt import SoftPrompt


def halves(height: int, width: int, pictures: int = 1) -> Tensor:
    """The left half, and the right half."""
    left = torch.zeros(pictures, 1, height, width)
    left[..., : width // 2] = 1
    return torch.cat([left, 1 - left], 1)


def carry(network: nn.Module, name: str, method: Method, target: str, seed: int) -> None:
    site.attach(network, name, method, target)
    chance = torch.Generator().manual_seed(seed)
    for adapter in site.adapters(network, name).values():
        for own in adapter.parameters():
            own.data.add_(0.1 * torch.randn(own.shape, generator=chance))
            own.requires_grad_(False)


class Pointwise(nn.Module):
    """A network in which no position sees another: its values inside a region are those of a run of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.norm, self.to_q = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 8)
        self.conv_out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_in(x)
        tokens = self.to_q(self.norm(y.flatten(2).transpose(1, 2)))
        found: Tensor = self.conv_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))
        return found


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (5, 7)], ids=str)
@torch.no_grad()
def test_values_inside_a_region_are_those_of_a_run_of_its_own(size: tuple[int, int], packed: bool) -> None:
    torch.manual_seed(0)
    network = Pointwise().eval()
    plain = network(x := torch.randn(4, 3, *size))  # two pictures, each twice
    for seed, name in enumerate(("ink", "flat")):
        carry(network, name, Lora(rank=3), "all", seed)
    if packed:
        site.pack(network)
    strengths = site.strengths(network)
    assert strengths is not None
    layout = Layout(halves(*size, pictures=2), size)
    wanted = {"ink": [0.7, 0.0, 0.2, -1.0], "flat": [0.0, 1.3, 0.0, 0.0]}
    strengths.write(wanted)
    with regions.using(layout):
        found = network(x)
    for column in range(4):
        strengths.write({name: values[column] for name, values in wanted.items()})
        alone, half = network(x), layout.on_map(*size)[column // 2, column % 2] == 1
        for row in (column // 2, column // 2 + 2):  # guidance
            assert (found[row][:, half] - alone[row][:, half]).abs().max() < 1e-5
            assert (alone[row] - plain[row]).abs().max() > 1e-2
    strengths.write({"ink": [0.7, 0.0, 0.2, -1.0], "flat": 0.0})
    with regions.using(layout):
        nothing = network(x)[0][:, layout.on_map(*size)[0, 1] == 1]
    assert (nothing - plain[0][:, layout.on_map(*size)[0, 1] == 1]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("method", "target", "site_of"),
    [
        ("lora", "attention", "linear"), ("loha", "attention", "linear"), ("dora", "attention", "linear"),
        ("oft", "attention", "linear"), ("ia3", "attention", "linear"), ("bitfit", "all", "linear"),
        ("lora", "conv", "conv"), ("lokr", "conv", "conv"), ("dora", "conv", "conv"), ("bitfit", "norms", "norm"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_every_method_is_nothing_outside_of_its_region(method: str, target: str, site_of: str) -> None:
    """At each site of a UNet: what the adapter adds there is the same inside, and nothing outside."""
    network = make_pipe().unet
    carry(network, "made", METHODS[method](), target, 1)
    strengths = site.strengths(network)
    assert strengths is not None
    checked = 0
    module: Any
    for path, module in site.sites(network).items():
        if path.endswith(("attn2.to_k", "attn2.to_v")) or "time_emb" in path:
            continue
        if isinstance(module, nn.Conv2d):
            x = torch.randn(2, module.in_channels, 8, 8)
        elif isinstance(module, nn.GroupNorm):
            x = torch.randn(2, module.num_channels, 8, 8)
        else:
            x = torch.randn(2, 64, module.in_features if isinstance(module, nn.Linear) else module.weight.numel())
        strengths.write({"made": 0.0})
        plain = module(x)
        strengths.write({"made": 0.8})
        alone = module(x)
        strengths.write({"made": [0.8, 0.0]})
        layout = Layout(halves(8, 8), (8, 8))
        with regions.using(layout):
            found = module(x)
        if x.ndim == 3:
            plain, found, alone = (one.transpose(1, 2).unflatten(2, (8, 8)) for one in (plain, found, alone))
        left = plain.shape[3] // 2
        assert torch.equal(found[..., left:], plain[..., left:])
        assert (found[..., :left] - alone[..., :left]).abs().max() < 1e-5
        assert (alone - plain).abs().max() > 1e-3 or method == "dora"
        checked += 1
    assert checked > 3, site_of


@torch.no_grad()
def test_prompts_of_regions_are_read_apart_and_mixed_by_the_masks() -> None:
    network: Any = make_pipe().unet
    attention: Any = network.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    plain = attention.processor
    chance = torch.Generator().manual_seed(1)
    masks = torch.rand(2, 3, 8, 6, generator=chance).softmax(1)
    layout = Layout(masks, (8, 6))
    x, told = torch.randn(4, 48, 32, generator=chance), torch.randn(4, 3 * 5, 32, generator=chance)
    alone = [attention(x, one) for one in told.chunk(3, 1)]
    shares = masks.flatten(2).repeat(2, 1, 1)[..., None]
    expected = sum(shares[:, r] * (one - attention.to_out[0].bias) for r, one in enumerate(alone)) + attention.to_out[0].bias
    with regional_attention.attending([network]):
        with regions.using(layout):
            found = attention(x, told)
        assert torch.equal(attention(x, told), plain(attention, x, told))
    assert attention.processor is plain
    assert (found - expected).abs().max() < 1e-5


@torch.no_grad()
def test_isolated_regions_attend_to_themselves_alone() -> None:
    network: Any = make_pipe().unet
    attention: Any = network.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    layout, x = Layout(halves(8, 8, 2), (8, 8)), torch.randn(4, 64, 32)  # two pictures, each twice
    with regional_attention.attending([network]), regions.using(layout):
        together = attention(x)
        layout.isolated = (True, False)
        apart = attention(x)
    assert torch.equal(together, attention(x))
    for r in range(2):
        inside = layout.on_tokens(64)[0, :, r] == 1
        assert (apart[::2, inside] - attention(x[::2, inside])).abs().max() < 1e-5
    assert (apart - together)[::2].abs().max() > 1e-3
    assert (apart - together)[1::2].abs().max() < 1e-5


@torch.no_grad()
def test_each_picture_of_a_batch_is_isolated_as_long_as_by_itself_and_networks_beside_know_it() -> None:
    pipe: Any = make_pipe()
    half = DrawnRegion(Area((0.0, 0.0, 0.5, 1.0)), "a cat", {"ink": 1.0})
    isolations = (None, 0.0, 1.0, None)
    cells = [Cell("a dog", 0, {}, None, Division((half,), isolation=one)) for one in isolations]
    cells[3] = replace(cells[3], strengths={"ink": 1.0})  # as in its region
    regional = Regional.of([*cells, Cell("a dog", 0, {})])
    assert regional is not None and regional.isolations == (0.3, 0.0, 1.0, 0.0, 0.0)
    seen: list[tuple[bool, ...]] = []

    def beside(*_: object) -> None:  # as a hook does that calls a ControlNet
        layout = regions.present()
        assert layout is not None
        seen.append(layout.isolated)

    handle = pipe.unet.register_forward_pre_hook(beside)
    with regional.drawn(pipe, 64, 64):
        for timestep in (701, 699):
            pipe.unet(torch.randn(5, 4, 8, 8), timestep, torch.randn(5, 4, 32))
    handle.remove()
    assert seen == [(True, False, True, False, False), (False, False, True, False, False)]


HOW = Sampling(steps=3, guidance=4.0, width=64, height=64)
MAKE: dict[str, Callable[[], Any]] = {"sd": make_pipe, "xl": make_xl_pipe}


class Drawing:
    """Draws requests on a base, each call in batches of its own, and gives the numbers of the pictures."""

    def __init__(self, kind: str, files: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = MAKE[kind]()
        self.adapters, self.kept = Adapters(pipe), numbers(pipe, monkeypatch)
        for name, file in files[kind].items():
            self.adapters.load(file, name)

    def __call__(self, *requests: Request) -> list[np.ndarray]:
        self.kept.clear()
        self.adapters.batch(requests)
        return list(self.kept)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("regions")
    found: dict[str, dict[str, Path]] = {}
    for kind, make in MAKE.items():
        pipe, parts = make(), ("unet", "text_encoder", *(("text_encoder_2",) if kind == "xl" else ()))
        found[kind] = {
            "ink": write_adapter(folder / f"ink_{kind}.safetensors", pipe, seed=3, parts=parts),
            "flat": write_adapter(folder / f"flat_{kind}.safetensors", pipe, "all", rank=2, seed=4, parts=parts),
        }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_a_region_of_everything_is_the_picture_of_its_prompt_and_adapters(
    kind: str, files: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Drawing(kind, files, monkeypatch)
    alone, other = draw(Request("a red cat", {"ink": 0.8}, 1, "blue", HOW), Request("a dog", {"flat": 1.0}, 1, "blue", HOW))
    whole = Region(box=(0, 0, 1, 1), prompt="a red cat", adapter=("ink=0.8", "flat=0"))
    for isolation in (0.0, 1.0):
        divided = Request("a dog", {"flat": 1.0}, 1, "blue", HOW, [whole], region_isolation=isolation)
        (found,) = draw(divided)
        assert np.abs(found - alone).max() < 1e-5 < np.abs(alone - other).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_pictures_with_different_regions_share_a_batch(
    kind: str, files: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    painted = Image.new("RGB", (10, 10), "white")
    painted.paste("#ff0000", (0, 0, 10, 5))
    painted.paste("#0000ff", (3, 7, 9, 10))
    painted.save(tmp_path / "map.png")
    how = replace(HOW, width=80 if kind == "sd" else 64, height=48 if kind == "sd" else 96)
    requests = [
        Request("a dog", {}, 1, "blue", how, [Region(box=(0, 0, 0.5, 1), adapter="ink=0.8", prompt="a red cat")]),
        Request("a house", {"flat": 0.5}, 2, "", how, [
            Region(painted=tmp_path / "map.png", color="#ff0000", adapter=("ink=1,te:0.5,0:1,1:0", "flat=0")),
            Region(painted=tmp_path / "map.png", color="#0000ff", prompt="blue apple", adapter="ink=-0.5"),
        ]),
    ]  # fmt: skip
    draw = Drawing(kind, files, monkeypatch)
    together = draw(*requests)
    for request, one in zip(requests, together, strict=True):
        (alone,) = draw(request)
        (without,) = draw(replace(request, regions=()))
        assert np.abs(one - alone).max() < 1e-5 < 1e-3 < np.abs(one - without).max()


@pytest.mark.slow
def test_a_recipe_draws_regions_again(tiny_base: Path, tiny_pipe: Any, tmp_path: Path) -> None:
    made = {
        name: make_adapter(tmp_path / f"{name}.safetensors", tiny_base, seed, triggers=(name,), size=0.5)
        for seed, name in enumerate(("ink", "flat"), 1)
    }
    Image.new("L", (3, 2), 255).save(tmp_path / "mask.png")
    common: dict[str, Any] = {"steps": 3, "device": "cpu", "seed": 3, "count": 2}
    config = GenerateConfig(
        "a cat, {red|blue}",
        adapter=f"{made['flat']}=0.5",
        region=[
            f"box=0,0,32,64 adapter='{made['ink']}=0.8,te:0.5' adapter=flat=0 prompt='a {{dog|house}} of ink'",
            {"mask": tmp_path / "mask.png", "prompt": "a red apple"},
        ],
        region_isolation=0.5,
        output=tmp_path / "a",
        **common,
    )
    first = generate(config, pipe=tiny_pipe)[1]
    (tmp_path / "mask.png").unlink()
    divided = first.recipe.divided
    assert [one.area[:8] for one in divided] == ["0.0,0.0,", "png:iVBO"] and "{" not in divided[0].prompt
    assert json.loads(divided[0].adapters) == {"1": "0.8,text_encoder:0.5,text_encoder_2:0.5", "0": "0.0"}
    assert (first.recipe.region_feather, first.recipe.region_isolation) == (0.05, 0.5)
    for fast in (False, True):
        told: list[Event] = []
        config = GenerateConfig(recipe=first.path, device="cpu", fast=fast, output=tmp_path / "b.png")
        again = generate(config, pipe=tiny_pipe, observers=[told.append])[0]
        assert replace(again.recipe, written=first.recipe.written) == first.recipe
        numbers = [np.asarray(one.image, dtype=int) for one in (again, first)]
        assert np.abs(numbers[0] - numbers[1]).max() <= fast
        assert not [event for event in told if isinstance(event, (Noted, Warned)) and "fast" in event.message]


@pytest.mark.slow
def test_regions_are_found_by_where_triggers_are_read(
    tiny_base: Path, tiny_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        name: make_adapter(tmp_path / f"{name}.safetensors", tiny_base, seed, triggers=(name,), size=0.5)
        for seed, name in enumerate(("ink", "flat"), 1)
    }
    common: dict[str, Any] = {"steps": 2, "device": "cpu", "seed": 3, "count": 2, "width": 96}
    config = GenerateConfig(
        "flat dog (and) ink cat",
        adapter=tuple(f"{one}=0.5" for one in made.values()),
        regions="auto",
        output=tmp_path / "a",
        **common,
    )
    told: list[Event] = []
    random_weights = generate(config, pipe=tiny_pipe, observers=[told.append])
    notes = [event.message for event in told if isinstance(event, Noted)]
    for one in random_weights:
        areas = [region.area for region in one.recipe.divided]
        beside = f"seed {one.recipe.seed} reads its triggers in one place, so 2 regions lie side by side, in order" in notes
        assert (areas == ["0.0,0.0,0.5,1.0", "0.5,0.0,1.0,1.0"]) == beside

    mixed = [1.0, 0.0]

    def read(self: Maps, query: Tensor, key: Tensor, heads: int) -> None:
        """What a network reads that has the first concept on the right, and the second in a disc on the left."""
        y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
        disc = torch.exp(-((y - 4) ** 2 + (x - 3) ** 2) / 8).flatten()
        for found, concepts in zip(self.found, self.tokens, strict=True):
            assert [len(one) for one in concepts] == [1, 1]
            found[96] = torch.stack([mixed[0] * (1 - disc) + mixed[1] * disc, disc])

    monkeypatch.setattr(Maps, "add", read)
    (picture,) = generate(replace(config, count=1), pipe=tiny_pipe)
    ink, flat = (parse_area(region.area).coverage(96, 64) for region in picture.recipe.divided)
    assert torch.equal(ink + flat, torch.ones(64, 96))
    assert flat[32, 24] == 1 and ink[32, 80] == 1
    assert [json.loads(region.adapters) for region in picture.recipe.divided] == [{"1": "0.0"}, {"0": "0.0"}]
    mixed[:] = [0.1, 0.9]  # the same places, a little less of them
    alike = generate(replace(config, count=1), pipe=tiny_pipe)[0]
    assert [region.area for region in alike.recipe.divided] == ["0.0,0.0,0.5,1.0", "0.5,0.0,1.0,1.0"]
    mixed[:] = [1.0, 0.0]
    parted = generate(replace(config, prompts=("a red BREAK Flat dog BREAK ink cat",), count=1), pipe=tiny_pipe)[0]
    assert [region.prompt for region in parted.recipe.divided] == ["a red, ink cat", "a red, Flat dog"]
    again = generate(GenerateConfig(recipe=picture.path, device="cpu", output=tmp_path / "b.png"), pipe=tiny_pipe)[0]
    assert replace(again.recipe, written=None) == replace(picture.recipe, written=None)
    assert again.image.tobytes() == picture.image.tobytes()
    with pytest.raises(UserError, match="only that of ink; write them into the prompt"):
        generate(replace(config, prompts=("ink cat",)), pipe=tiny_pipe)


@pytest.mark.slow
def test_sheets_have_the_regions_of_pictures_alone(tiny_base: Path, tiny_pipe: Any, tmp_path: Path) -> None:
    """Each picture of a blend and of a grid is the one that ``generate`` draws at its strengths, with the same recipe."""
    ink, flat, line = (
        make_adapter(tmp_path / f"{name}.safetensors", tiny_base, seed, triggers=(name,), size=0.5)
        for seed, name in enumerate(("ink", "flat", "line"), 1)
    )
    region = (Region(box=(0, 0, 0.5, 1), prompt="an ink dog", adapter=(f"{line}=0.7", "flat=0")), "box=0.5,0.5,1,1")
    common: dict[str, Any] = {"steps": 2, "device": "cpu", "region": region, "region_feather": 0.1}
    both = (str(ink), f"{flat}=0.8")
    drawn = blend(
        BlendConfig("flat house", adapter=both, columns=3, plain=True, output=tmp_path / "a.png", **common), pipe=tiny_pipe
    )
    pictures = list(zip(drawn.pictures[0], drawn.recipes[0], ((1, 0), (0.5, 0.4), (0, 0.8)), strict=True))
    sheet = grid(
        GridConfig("flat house", adapter=both, x="replace=dog,cat", output=tmp_path / "b.png", **common), pipe=tiny_pipe
    )
    for picture, recipe, strengths in [*pictures[1:], (sheet.pictures[0][0], sheet.recipes[0][0], (1, 0.8))]:
        given = tuple(f"{file}={strength}" for file, strength in zip((ink, flat), strengths, strict=True))
        (alone,) = generate(GenerateConfig("flat house", adapter=given, output=tmp_path / "c.png", **common), pipe=tiny_pipe)
        found, wanted = (np.asarray(one, dtype=int) for one in (picture, alone.image))
        assert np.abs(found - wanted).max() <= 1
        assert [one.area for one in recipe.divided] == [one.area for one in alone.recipe.divided]
        assert [one.prompt for one in recipe.divided] == ["an ink dog", "flat house"]
    write_recipe(tmp_path / "d.png", *pictures[2][:2])
    (again,) = generate(GenerateConfig(recipe=tmp_path / "d.png", device="cpu", output=tmp_path / "e.png"), pipe=tiny_pipe)
    assert np.abs(np.asarray(again.image, dtype=int) - np.asarray(pictures[2][0], dtype=int)).max() <= 1
    assert [one.divided[0].prompt for one in sheet.recipes[0]] == ["an ink dog", "an ink cat"]


@pytest.mark.slow
def test_a_grid_compares_where_regions_are(tiny_base: Path, tiny_pipe: Any, tmp_path: Path) -> None:
    made = [
        make_adapter(tmp_path / f"{name}.safetensors", tiny_base, seed, triggers=(name,), size=0.5)
        for seed, name in enumerate(("ink", "flat"), 1)
    ]
    common: dict[str, Any] = {"steps": 2, "device": "cpu", "adapter": tuple(map(str, made))}
    config = GridConfig("ink cat and flat dog", x="regions=given,auto", region_feather=0.2, output=tmp_path / "a.png",
                        **common)  # fmt: skip
    sheet = grid(config, pipe=tiny_pipe)
    assert [len(one.divided) for one in sheet.recipes[0]] == [0, 2]
    (alone,) = generate(
        GenerateConfig("ink cat and flat dog", regions="auto", region_feather=0.2, output=tmp_path / "b.png", **common),
        pipe=tiny_pipe,
    )
    assert sheet.recipes[0][1] == alone.recipe
    assert np.abs(np.asarray(sheet.pictures[0][1], int) - np.asarray(alone.image, int)).max() <= 1


BOX = Region(box=(0, 0, 0.5, 1))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: BlendConfig("a", auto=2, region=BOX, compose="switch"), "--compose switch has no place"),
        (lambda: BlendConfig("a", auto=2, region=BOX, report="a.json"), "--report measures adapters on whole pictures"),
        (lambda: BlendConfig("a", auto=2, region_feather=0.2).check(), "are of regions"),
        (lambda: GridConfig("a", x="region_feather=0,0.2").check(), "are of regions"),
        (lambda: GridConfig("a", region=BOX, x="compose=add,switch").check(), "--compose switch has no place"),
        (lambda: GridConfig("a", region=BOX, x="regions=given,auto").check(), "finds the regions by itself"),
        (lambda: GridConfig("a", region=BOX, x="replace=dog,cat").check(), "no prompt holds 'dog'"),
        (lambda: GridConfig("a", region="mask=no.png").check(), "there is no picture no.png of a region"),
    ],
)
def test_regions_of_sheets_that_cannot_be_are_refused(config: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hires", "image", "mask", "guidance_stop", "control"])
def test_a_region_of_everything_in_every_way_to_draw(how: str, tiny_base: Path, tiny_pipe: Any, tmp_path: Path) -> None:
    ink = make_adapter(tmp_path / "ink.safetensors", tiny_base, 1, size=0.5)
    Image.effect_noise((64, 96), 60).convert("RGB").save(tmp_path / "begin.png")
    white = Image.new("L", (64, 96))
    white.paste(255, (0, 0, 64, 40))
    white.save(tmp_path / "white.png")
    ways: dict[str, dict[str, Any]] = {
        "hires": {"hires": 1.5, "height": 96},
        "image": {"image": tmp_path / "begin.png", "strength": 0.6},
        "mask": {"image": tmp_path / "begin.png", "mask": tmp_path / "white.png"},
        "guidance_stop": {"guidance_stop": 0.5, "width": 80},
        "control": {"control": f"controlnet:{tmp_path / 'net'}={tmp_path / 'begin.png'}"},
    }
    if how == "control":
        net = ControlNetModel.from_unet(tiny_pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
        for own in net.parameters():
            torch.nn.init.normal_(own, std=0.1)
        net.save_pretrained(tmp_path / "net")
    common = {"steps": 4, "device": "cpu", "output": tmp_path / "a", **ways[how]}
    divided = generate(
        GenerateConfig("a dog", region=f"box=0,0,1,1 adapter='{ink}=0.7' prompt='a cat'", region_isolation=0.5, **common),
        pipe=tiny_pipe,
    )[0]
    plain = generate(GenerateConfig("a cat", adapter=f"{ink}=0.7", **common), pipe=tiny_pipe)[0]
    other = generate(GenerateConfig("a dog", **common), pipe=tiny_pipe)[0]
    found, expected, without = (np.asarray(one.image, dtype=int) for one in (divided, plain, other))
    assert np.abs(found - expected).max() <= 1 < np.abs(expected - without).max()


@pytest.mark.slow
def test_a_box_in_pixels_is_the_same_part_in_every_pass(tiny_base: Path, tiny_pipe: Any, tmp_path: Path) -> None:
    ink = make_adapter(tmp_path / "ink.safetensors", tiny_base, 1, size=0.5)
    common: dict[str, Any] = {"steps": 1, "hires": 1.5, "hires_steps": 1, "device": "cpu", "output": tmp_path / "a"}
    drawn = [
        generate(GenerateConfig("a dog", region=f"box={box} adapter={ink}", **common), pipe=tiny_pipe)[0].image.tobytes()
        for box in ("0,0,0.5,1", "0,0,32,64", "0,0,0.5,0.5")
    ]
    assert drawn[0] == drawn[1] != drawn[2]  # of the first pass, which is of 64 pixels


@pytest.mark.slow
def test_a_file_is_one_adapter_in_and_outside_of_regions_by_any_path(
    tiny_base: Path, tiny_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ink = make_adapter(tmp_path / "ink.safetensors", tiny_base, 1, size=0.5)
    monkeypatch.chdir(tmp_path)
    common: dict[str, Any] = {"steps": 1, "device": "cpu", "output": tmp_path / "a"}
    drawn = [
        generate(GenerateConfig("a dog", adapter=f"{one}=0.5", region="box=0,0,1,1 adapter=ink.safetensors=0.5", **common),
                 pipe=tiny_pipe)[0]
        for one in ("ink.safetensors", ink)
    ]  # fmt: skip
    assert [len(one.recipe.adapters) for one in drawn] == [1, 1]
    assert drawn[0].image.tobytes() == drawn[1].image.tobytes()
    twice = Region(box=(0, 0, 1, 1), adapter=("ink.safetensors=1", f"{ink}=0.5"))
    with pytest.raises(UserError, match=r"region 1 names the adapter ink\.safetensors twice"):
        generate(GenerateConfig("a dog", region=twice, **common), pipe=tiny_pipe)
    adapters = Adapters(tiny_pipe)
    adapters.load(ink, name="ink")
    with pytest.raises(UserError, match="a region names the adapter 'ink' twice"):
        adapters.batch([Request("a dog", regions=[Region(box=(0, 0, 1, 1), adapter=("ink=1", "ink=0.5"))])])


def test_a_colour_that_is_not_painted_is_told_with_those_that_are_and_a_box_beyond_a_picture_with_what_it_loses(
    tmp_path: Path,
) -> None:
    painted = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    painted.paste((255, 0, 0, 128), (0, 0, 2, 4))
    painted.save(tmp_path / "painted.png")
    with pytest.raises(UserError, match=r"has nothing of the colour #ff0000; most of it is #ffffff, #ff7f7f$"):
        Area.of(Region(painted=tmp_path / "painted.png", color="#ff0000"))
    boxes = [(0.0, 0.0, 64.0, 64.0), (0.0, 0.0, 1.0, 1.0), (32.0, 0.0, 512.0, 64.0)]
    division = Division(tuple(DrawnRegion(Area(box)) for box in boxes))
    assert division.cut(512, 64) == []
    assert division.cut(64, 64) == ["region 3 of 3 reaches beyond a picture of 64x64: its box 32,0,512,64 is cut off there"]


@pytest.mark.slow
def test_regions_that_do_nothing_are_refused(tiny_pipe: Any, tmp_path: Path) -> None:
    common: dict[str, Any] = {"steps": 1, "device": "cpu", "output": tmp_path / "a"}
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    for region, message in (
        ("box=64,0,96,64", "region 1 of 1 holds nothing of a picture of 64x64: its box 64.0,0.0,96.0,64.0 lies outside"),
        (
            f"mask={tmp_path / 'black.png'}",
            "region 1 of 1 holds nothing of a picture of 64x64: its mask is black; white is the",
        ),
    ):
        with pytest.raises(UserError, match=message):
            generate(GenerateConfig("a dog", region=region, **common), pipe=tiny_pipe)
    for name, value in (("region_feather", 0.2), ("region_isolation", 0.5)):
        with pytest.raises(UserError, match="are of regions; give --region or --regions auto too"):
            generate(GenerateConfig("a dog", **{**common, name: value}), pipe=tiny_pipe)


@pytest.mark.slow
def test_triggers_are_found_in_the_words_that_are_drawn_the_longest_first(
    tiny_base: Path, tiny_pipe: Any, tmp_path: Path
) -> None:
    adapters = Adapters(tiny_pipe)
    for seed, (name, trigger) in enumerate({"ink": "red", "flat": "red dog"}.items()):
        adapters.load(make_adapter(tmp_path / f"{name}.safetensors", tiny_base, seed, (trigger,)), name=name)
    telling = Telling(tiny_pipe, Sampling())
    for prompt in ("a red cat a red dog", "a [red:blue:0.5] cat <hypernet:x:1> a red dog"):
        found = concepts_of(adapters, Cell(prompt, 0, {"ink": 1.0, "flat": 1.0}), telling)
        assert [(one.name, one.tokens) for one in found] == [("ink", (2,)), ("flat", (5, 6))]
    adapters.load(write_words(tmp_path / "soft.safetensors", SoftPrompt(3, "red")), name="soft")
    for strength in (1.0, 0.0):  # whatever the picture before had
        found = concepts_of(adapters, Cell("a red cat a red dog", 0, {"ink": 1.0, "flat": 1.0, "soft": strength}), telling)
        assert [one.tokens for one in found] == ([(5,), (8, 9)] if strength else [(2,), (5, 6)])


@pytest.mark.slow
def test_networks_that_know_no_regions_are_refused(tiny_pipe: Any, tmp_path: Path) -> None:
    config = GenerateConfig("a dog", region="box=0,0,0.5,1", steps=1, device="cpu", output=tmp_path / "a.png")
    attention, plain = tiny_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2, tiny_pipe.unet
    processor, attention.processor = attention.processor, print
    with pytest.raises(UserError, match=r"attention is computed by .*, which knows no regions"):
        generate(config, pipe=tiny_pipe)
    attention.processor = processor
    tiny_pipe.unet = torch.compile(plain)
    compiled = r"a network that torch\.compile compiled knows no regions"
    with pytest.raises(UserError, match=compiled):
        generate(config, pipe=tiny_pipe)
    plain.mid_block.compile()
    with pytest.raises(UserError, match=compiled), regional_attention.attending([plain]):
        pass
    with pytest.raises(UserError, match="--compose switch has no place"):
        replace(config, compose="switch")
    request = Request("a dog", sampling=Sampling(compose="composite"), regions=[Region(box=(0, 0, 1, 1))])
    tiny_pipe.unet = plain
    with pytest.raises(UserError, match="--compose composite has no place"):
        Adapters(tiny_pipe).batch([request])
    with pytest.raises(UserError, match="leave each --region away, or auto"):
        replace(config, regions="auto")


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("prompt=cat", "a region has nothing that says where it is; give box, mask, or painted"),
        ("box=0,0,1,1 mask=a.png", "a region has box and mask at once"),
        ("box=0.5,0,0.2,1", "box 0.5,0,0.2,1 is none"),
        ("box=0,0,0.5,64", "mixes pixels and shares"),
        ("painted=a.png", "a painted region has the colour ''"),
        ("box=0,0,1,1 adaptor=a", "there is no setting 'adaptor'"),
        ("mask=nowhere.png", "there is no picture nowhere.png of a region"),
        ("box=0,0,1,1 adapter=nowhere.safetensors", "there is no adapter file nowhere.safetensors"),
    ],
)
def test_what_is_no_region_is_refused(region: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        config = GenerateConfig("a cat", region=region, output=tmp_path / "a.png")
        config.check()
        order(config, (), literal=False)


def test_masks_share_where_they_overlap_and_are_exact_outside_of_feathered_edges() -> None:
    left, right = (DrawnRegion(Area(box)) for box in ((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0)))
    masks = picture_masks([left, right], 64, 32, feather=0.25)
    assert (masks.sum(0) - 1).abs().max() < 1e-5
    row = masks[:, 16]
    for place, expected in ((8, (0, 1, 0)), (24, (0, 0.5, 0.5)), (40, (0, 0, 1)), (60, (1, 0, 0))):
        assert row[:, place].tolist() == pytest.approx(expected, abs=1e-6)
    assert 0 < row[1, 13] < 1 and row[1, 11] == 1


@torch.no_grad()
def test_regions_are_normalized_each_by_itself_where_their_adapters_differ() -> None:
    norm = nn.GroupNorm(2, 6)
    for own in norm.parameters():
        own.data.normal_()
    network = nn.ModuleList([norm])
    x = (
        torch.randn(4, 6, 8, 10) * torch.tensor([0.1, 5.0]).repeat_interleave(5) + 3
    )  # two pictures, each twice; halves differ
    layout = Layout(halves(8, 10, pictures=2), (8, 10), [network], [[0, 1], [0, 0]])
    with regional_attention.attending([network]):
        assert torch.equal(norm(x), nn.GroupNorm.forward(norm, x))  # a thread that draws without regions
        with regions.using(layout):
            found = norm(x)
    apart = torch.cat([F.group_norm(half, 2, norm.weight, norm.bias) for half in x.split(5, 3)], 3)
    together = F.group_norm(x, 2, norm.weight, norm.bias)
    torch.testing.assert_close(found[[0, 2]], apart[[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[[1, 3]], together[[1, 3]], rtol=1e-4, atol=1e-5)
    assert (apart - together).abs().max() > 0.5 and type(norm) is nn.GroupNorm


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_norms_by_region_are_as_exact_as_those_of_a_half_and_of_their_dtype(dtype: torch.dtype, mixed: bool) -> None:
    norm = nn.GroupNorm(2, 6)
    norm.weight.data.normal_()
    left, right = 50 + 0.1 * torch.randn(2, 6, 8, 5), torch.randn(2, 6, 8, 5) - 50  # far apart, and one of them flat
    left, right = left.to(dtype), right.to(dtype)
    layout = Layout(halves(8, 10, pictures=2), (8, 10), [norm], [[0, 1], [0, 1]])
    own = norm.float() if mixed else norm.to(dtype)
    with regional_attention.attending([own]), regions.using(layout), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = own(torch.cat([left, right], 3))
    exact = nn.GroupNorm(2, 6, dtype=torch.float64)
    exact.load_state_dict(norm.state_dict())
    apart = torch.cat([exact(half.double()) for half in (left, right)], 3)
    assert found.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), apart, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_an_adapter_of_a_norm_reads_what_is_normalized_by_region(method: str) -> None:
    network = nn.Sequential(nn.GroupNorm(2, 6))
    carry(network, "ink", METHODS[method](), "0", 3)
    x = torch.randn(1, 6, 8, 10) * torch.tensor([0.1, 5.0]).repeat_interleave(5)
    with regional_attention.attending([network]), regions.using(Layout(halves(8, 10), (8, 10), [network], [[0, 1]])):
        strengths = site.strengths(network)
        assert strengths is not None
        strengths.write({"ink": [0.7, 0.7]})
        found = network(x)
    strengths.write({"ink": 0.7})
    alone = torch.cat([network(half) for half in x.split(5, 3)], 3)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_a_network_that_computes_keeps_no_other_from_regions() -> None:
    waits, done = threading.Event(), threading.Event()

    @contextmanager
    def computing() -> Iterator[None]:  # as the engine of a network that another thread computes with
        waits.set()
        assert done.wait(20)
        yield

    def draw() -> None:
        with regional_attention.attending([nn.ModuleList([nn.GroupNorm(2, 6)])], computing):
            pass

    other = threading.Thread(target=draw)
    other.start()
    try:
        assert waits.wait(20) and not regional_attention._lock.locked()
    finally:
        done.set()
        other.join()


def test_threads_that_draw_with_regions_leave_norms_as_they_were() -> None:
    network = nn.ModuleList([nn.GroupNorm(2, 6)])
    with regional_attention.attending([network]):
        with regional_attention.attending([network]):
            pass
        assert type(network[0]) is regions.RegionalNorm
    assert type(network[0]) is nn.GroupNorm


def test_subjects_are_kept_apart_by_default_and_what_only_prompts_say_is_not() -> None:
    left, right = Area((0, 0, 0.5, 1)), Area((0.5, 0, 1, 1))
    worded = Division((DrawnRegion(left, "a cat"), DrawnRegion(right, "a dog")))
    assert (worded.isolated({"ink": 1.0}), worded.groups({"ink": 1.0}, 4)) == (0.0, [0, 0, 0, 0])
    subjects = [DrawnRegion(left, "a cat", {"ink": 1.0}), DrawnRegion(right, "a dog", {"flat": 1.0}), DrawnRegion(left)]
    divided = Division((*subjects, DrawnRegion(right, None, {"ink": 1.0})))
    assert (divided.isolated({}), divided.groups({}, 6)) == (0.3, [0, 1, 2, 0, 1, 0])
    assert Division(tuple(subjects), isolation=0.0).isolated({}) == 0.0
    same = Division((DrawnRegion(left, "a cat", {"ink": ByPart(0.8), "flat": 0.0}),))
    assert same.isolated({"ink": 0.8}) == 0.0
    assert same.isolated({"ink": 0.7}) == 0.3


def test_norms_that_are_computed_otherwise_are_refused() -> None:
    network = nn.Sequential(nn.GroupNorm(2, 6))
    with regional_attention.attending([network], norms_apart=True):
        pass
    network[0].forward = network[0].forward  # as hooks that move weights from call to call do
    moved = pytest.raises(UserError, match="the norm 0 is moved from call to call")
    with moved, regional_attention.attending([network], norms_apart=True):
        pass
    with regional_attention.attending([network]):  # where all regions are normalized together
        pass


def test_a_copy_made_while_regions_are_drawn_holds_plain_norms_and_attention() -> None:
    network: Any = nn.ModuleList([nn.GroupNorm(2, 6), nn.Sequential(nn.GroupNorm(2, 6)), Attention(8)])
    carry(network[1], "ink", METHODS["bitfit"](), "0", 3)
    with regional_attention.attending([network]):
        made = copy.deepcopy(network)
    assert type(made[0]) is nn.GroupNorm
    assert type(made[1][0]) is type(network[1][0]) and site.base_class(made[1][0]) is nn.GroupNorm
    assert type(made[2].processor) is type(network[2].processor) is AttnProcessor2_0
    assert torch.equal(made.get_parameter("0.weight"), network.get_parameter("0.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["attention", "conv", "bottleneck"])
@pytest.mark.parametrize("device", ["taped", pytest.param("cuda", marks=CUDA)])
@torch.no_grad()
def test_recorded_steps_read_the_masks_where_they_lie(device: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "taped":
        tape(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # in a recording cuDNN takes other algorithms
    where = "cuda" if device == "cuda" else "cpu"
    plain = make_pipe().unet.to(where)
    for seed, name in enumerate(("ink", "flat")):
        fast_carry(plain, name, method, seed)
    fast = copy.deepcopy(plain)
    engine = drawing.start(fast)
    chance = torch.Generator().manual_seed(1)
    amounts = {"ink": [0.9, 0.0, 0.3, -0.4], "flat": [0.0, 0.7, 0.0, 1.0]}
    call: dict[str, Any] = {
        "sample": torch.randn(4, 4, 8, 6, generator=chance).to(where),
        "timestep": torch.tensor(500.0, device=where),
        "encoder_hidden_states": torch.randn(4, 2 * 7, 32, generator=chance).to(where),
        "return_dict": False,
    }
    made: dict[Any, int] = {}
    apart = [[0, 1], [0, 0]]
    for isolated, groups in (((False, False), None), ((True, False), apart), ((False, False), apart)):
        for number in range(3):  # other masks, and strengths, are read where the first were
            masks = torch.rand(2, 2, 64, 48, generator=chance).softmax(1).to(where)
            found = []
            for network in (plain, fast):
                layout = Layout(masks, (8, 6), [network], groups)
                layout.isolated = isolated
                strengths = site.strengths(network)
                assert strengths is not None
                strengths.write({name: [one * (1 + number) for one in own] for name, own in amounts.items()})
                with regional_attention.attending([network]), regions.using(layout):
                    found.append(network(**call)[0])
            assert engine.refused is None
            assert (found[0] - found[1]).abs().max() < 1e-4 * found[0].abs().max()
            made[layout.signature] = made.get(layout.signature) or engine.recordings
            assert engine.recordings == made[layout.signature]
    assert len(set(made.values())) == len(made) == 3
    drawn = []
    for network in (plain, fast):  # and without regions as before
        one = site.strengths(network)
        assert one is not None
        one.write(dict.fromkeys(amounts, 0.5))
        drawn.append(network(**call)[0])
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4 * drawn[0].abs().max()
