"""Strengths that differ between components, blocks and steps: as text, in pictures, and in recipes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from laws import strengths_of
from making import make_adapter
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_formats import write_adapter

from peft_diffusion import Adapters, ByPart, GenerateConfig, MergeConfig, Schedule, UserError, generate
from peft_diffusion.bases import family as families
from peft_diffusion.bases.skeleton import skeleton
from peft_diffusion.core import site, targets
from peft_diffusion.core.block_names import PRESETS, weighed
from peft_diffusion.generation import amounts, recipe
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Sampling, parse_choice
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training.attachment import with_words
from peft_diffusion.training.settings.placements import Placement

TE = {"text_encoder": 0.2, "text_encoder_2": 0.2}


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "ink.safetensors", make_pipe(), seed=3)


@pytest.mark.parametrize(
    ("text", "whole", "parts"),
    [
        ("0.8", 0.8, None),
        ("unet:0.8,te:0.2", 1.0, ByPart(1.0, {"unet": 0.8, **TE})),
        ("unet=0.8,te2=-1", 1.0, ByPart(1.0, {"unet": 0.8, "text_encoder_2": -1.0})),
        ("0.5, mid:1, up.1:0.5", 0.5, ByPart(1.0, {}, {"mid": 1.0, "up.1": 0.5})),
        ("0:1,0.6:0", 1.0, ByPart(1.0, {}, {}, Schedule([1, 0], [0, 0.6]))),
        ("0.7,te:0.2,midd,1:0.5", 0.7, ByPart(1.0, TE, dict.fromkeys(PRESETS["MIDD"], 1.0), Schedule([0.5], [1]))),
        ("0.9,content", 0.9, ByPart(1.0, {}, {"content": 1.0})),
        ("content:0.5,style:1", 1.0, ByPart(1.0, {}, {"content": 0.5, "style": 1.0})),
        ("INS:0.5", 1.0, ByPart(1.0, {}, {"IN01": 0.5, "IN02": 0.5, "IN04": 0.5})),
    ],
)
def test_a_strength_is_read_and_written(ink: Path, text: str, whole: float, parts: ByPart | None) -> None:
    choice = parse_choice(f"{ink}={text}")
    assert (choice.path, choice.strength, choice.parts) == (ink, whole, parts)
    assert parse_choice(choice.text) == choice


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lots", "must be a number as 0.8, parts as"), ("0.8,0.2", "must be a number"), ("te:", "must be a number"),
        ("te:inf", "finite number"), ("0.6:1,0.2:0", "'0.6:1,0.2:0': steps are places"),
        ("2:1", "ink.safetensors is '2:1': steps are places"),
    ],
)  # fmt: skip
def test_what_is_no_strength_is_refused(ink: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_choice(f"{ink}={text}")


def test_a_strength_by_part_is_not_merged_in_silence(ink: Path, tmp_path: Path) -> None:
    config = MergeConfig(files=(f"{ink}=te:0.2",), output=tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="merged at one strength"):
        config.choices()


def test_the_community_names_blocks_by_the_numbers_of_the_original_unet() -> None:
    """Those of input_blocks and output_blocks, as "LoRA Block Weight" finds them in kohya's names of the original."""
    blocks = [f"{side}_blocks.{n}.{kind}.{layer}" for side in ("down", "up") for n in range(4)
              for kind in ("resnets", "attentions") for layer in range(3)]  # fmt: skip
    blocks += ["conv_in", "mid_block", "down_blocks.0.downsamplers.0", "up_blocks.2.upsamplers.0"]
    for name, wanted in {
        "IN00": {"conv_in"},
        "IN03": {"down_blocks.0.downsamplers.0"},
        "IN05": {"down_blocks.1.resnets.1", "down_blocks.1.attentions.1"},
        "in08": {"down_blocks.2.resnets.1", "down_blocks.2.attentions.1"},
        "M00": {"mid_block"},
        "OUT03": {"up_blocks.1.resnets.0", "up_blocks.1.attentions.0"},
        "OUT08": {"up_blocks.2.resnets.2", "up_blocks.2.attentions.2", "up_blocks.2.upsamplers.0"},
        "OUT11": {"up_blocks.3.resnets.2", "up_blocks.3.attentions.2"},
    }.items():
        assert set(weighed({name: 1}, blocks)) == wanted, name
    assert weighed({"up": 1, "up.1": 1, "up_blocks.1.resnets.2": 1}, blocks)["up_blocks.1.resnets.2"].endswith("2")


def drawn(pipe: DiffusionPipeline, *strengths: Any) -> list[np.ndarray]:
    cells = [Cell("a cat", 1, dict.fromkeys(Adapters(pipe).names, one)) for one in strengths]
    return [np.asarray(image, int) for image in paint(Adapters(pipe), cells, Sampling(steps=3))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("te:0", lambda name: not name.startswith("lora_te")),
        ("unet:0", lambda name: name.startswith("lora_te")),
        ("te:0,mid:1", lambda name: "mid_block" in name),
        ("te:0,IN01", lambda name: "down_blocks_0" in name),
        ("te:0,mid.attentions.0.transformer_blocks.0.attn2.to_v:1", 
         lambda name: "mid_block_attentions_0_transformer_blocks_0_attn2_to_v" in name),
        ("te:0,up.1.attentions.1", lambda name: "up_blocks_1_attentions_1" in name),
    ],
)  # fmt: skip
def test_a_part_alone_acts_as_a_file_of_that_part(
    ink: Path, tiny_pipe: DiffusionPipeline, tmp_path: Path, text: str, kept: Any
) -> None:
    with safe_open(ink, "pt") as file:
        metadata = file.metadata()
    part = {name: tensor for name, tensor in load_file(ink).items() if kept(name)}
    save_file(part, tmp_path / "part.safetensors", metadata)
    other = make_pipe()
    Adapters(other).load(tmp_path / "part.safetensors")
    Adapters(tiny_pipe).load(ink)
    text = text.replace("IN01", "IN01:1").replace("attentions.1", "attentions.1:1")
    _, by_part = amounts.parse(text, "ink")
    (wanted,), (found, whole) = drawn(other, 1.0), drawn(tiny_pipe, by_part, 1.0)
    assert np.abs(found - wanted).max() <= 1 and np.abs(found - whole).max() > 3


@pytest.mark.slow
def test_parts_blocks_and_steps_multiply_for_each_image(ink: Path, tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(ink)
    both: list[float | ByPart] = [
        ByPart(0.5, {"unet": 0.4}, {"mid": 1.0, "down.0": 0.5}, Schedule([1, 0], [0.25, 0.75])),
        0.7,
    ]
    together, alone = drawn(tiny_pipe, *both), [drawn(tiny_pipe, one)[0] for one in both]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(together, alone, strict=True))
    seen, strengths = [], strengths_of(tiny_pipe.unet)
    places = [strengths.blocks.index(name) for name in ("mid_block", "down_blocks.0.resnets.0", "up_blocks.0.resnets.0")]
    hook = tiny_pipe.unet.register_forward_hook(lambda *_: seen.append(strengths.values[0, places, 0].tolist()))
    paint_five = Sampling(steps=5, guidance=1.0)
    next(paint(adapters, [Cell("a cat", 1, {"ink": both[0]})], paint_five))
    hook.remove()
    shares = np.interp([0, 0.25, 0.5, 0.75, 1], [0.25, 0.75], [1, 0])
    np.testing.assert_allclose(seen, np.outer(shares, [0.2, 0.1, 0]), atol=1e-6)
    text = strengths_of(tiny_pipe.text_encoder).scalar("ink")
    np.testing.assert_allclose(text, 0.5 * 0.5, err_msg="no block of it is named, and it takes the mean of the steps")
    with pytest.raises(UserError, match=r"no block mit.*mid_block"):
        adapters.set(ink=ByPart(blocks={"mit": 1, "mid": 1}))
    with pytest.raises(UserError, match=r"there are: conv_in, .*, mid_block, other"):  # and not what is in them
        adapters.set(ink=ByPart(blocks={"mit": 1}))
    adapters.set(ink=ByPart(blocks=dict.fromkeys(PRESETS["INALL"], 1.0)))  # of blocks that a smaller network lacks


@pytest.mark.slow
def test_blocks_of_b_lora_are_known_by_name_where_the_family_has_them(ink: Path, tiny_pipe: DiffusionPipeline) -> None:
    """Of its blora_utils.py: unet.up_blocks.0.attentions.0 is content, .1 is style; nothing is known of other bases."""
    xl = make_xl_pipe()
    sites = {
        "content": "up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_v",
        "style": "up_blocks.0.attentions.1.proj_in",
    }
    site.attach(xl.unet, "a", Lora(rank=2), "attention")
    adapters, strengths, other = Adapters(xl), strengths_of(xl.unet), "down_blocks.1.attentions.0.proj_in"
    for name, path in sites.items():
        adapters.set(a=amounts.parse(f"0.5,{name}", "a")[1] or 0)
        told = {block: float(strengths.values[0, place, 0]) for place, block in enumerate(strengths.blocks)}
        assert told[path] == 1.0 and told[other] == told[sites["style" if name == "content" else "content"]] == 0.0
    adapters.set(a={"content": 0.25, "mid": 1.0})  # a mapping of blocks names them so too
    assert strengths.values[0, strengths.blocks.index(sites["content"]), 0] == 0.25
    adapters = Adapters(tiny_pipe)
    adapters.load(ink)
    with pytest.raises(UserError, match="'style' names blocks of sdxl, and it is not known which blocks of other"):
        adapters.set(ink=ByPart(blocks={"style": 1.0}))


@pytest.mark.slow
def test_b_lora_trains_two_blocks_of_sdxl() -> None:
    unet = skeleton("sdxl").parts["unet"]
    family = families.find("sdxl")
    (placed,) = with_words(make_xl_pipe(), [Placement("unet", "attention@content,style", Lora(rank=4))])
    assert placed.target == "attention@up_blocks.0.attentions.0,up_blocks.0.attentions.1"
    found = targets.match(unet, placed.target)
    assert len(found) == 2 * 10 * 8 and all(
        path.startswith(family.blocks["content"] + family.blocks["style"]) for path in found
    )
    assert set(targets.match(unet, "attention@mid")) < set(targets.match(unet, "attention"))
    with pytest.raises(UserError, match="'attention@mit' names no block mit; there are: conv_in, "):
        targets.match(unet, "attention@mit")
    with pytest.raises(UserError, match="'content' names blocks of sdxl"):
        with_words(make_pipe(), [Placement("unet", "attention@content", Lora(rank=4))])


@pytest.mark.slow
def test_a_recipe_keeps_what_differs_between_parts(tiny_base: Path, tmp_path: Path) -> None:
    file = make_adapter(tmp_path / "a.safetensors", tiny_base, 1)
    told: dict[str, Any] = {"base": str(tiny_base), "device": "cpu"}
    asked = f"{file}=0.5,te:0.2,up:1,0:1,1:0"
    config = GenerateConfig("a cat", adapter=asked, steps=3, output=tmp_path / "first.png", **told)
    (first,) = generate(config)
    (again,) = generate(GenerateConfig(recipe=tmp_path / "first.png", output=tmp_path / "again.png", **told))
    assert again.image.tobytes() == first.image.tobytes() and again.recipe == first.recipe
    (plain,) = generate(GenerateConfig("a cat", adapter=f"{file}=0.5", steps=3, output=tmp_path / "plain.png", **told))
    assert plain.image.tobytes() != first.image.tobytes()
    assert recipe.read(tmp_path / "first.png").adapters[0].parts == amounts.text_of(parse_choice(asked).parts)
    with Image.open(tmp_path / "first.png") as image:
        assert "<lora:a:0.1:0.5>" in image.info["parameters"]
