"""Learned words and second text encoders in files of other programs: what they are called, and which encoder is meant."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from test_formats import write_adapter

from peft_diffusion import formats
from peft_diffusion.bases.taught import learned
from peft_diffusion.core.errors import UserError
from peft_diffusion.formats import pictures
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.generate import generate
from peft_diffusion.generation.settings import GenerateConfig, parse_choice, parse_choices

torch.set_num_threads(1)
A, B = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)), torch.full((2, 32), 0.5)


def old_parameters(tensors: dict[str, torch.Tensor]) -> torch.nn.ParameterDict:
    """As a pickle of torch before 1.12 has it, which kept the parameters as those of a module."""
    found = torch.nn.ParameterDict()
    for name in [*vars(found)]:
        if name == "_keys":
            del found.__dict__[name]
    found._parameters.update({name: torch.nn.Parameter(one) for name, one in tensors.items()})
    return found


FILES: dict[str, tuple[str, Any, dict[str, torch.Tensor]]] = {
    "without brackets": ("a.safetensors", {"my-style": A}, {"my-style": A}),
    "without brackets, pickled": ("a.bin", {"washed": A[0]}, {"washed": A}),
    "two words": ("a.safetensors", {"<one>": A, "<two>": B}, {"<one>": A, "<two>": B}),
    "two bare words": ("a.pt", {"one": A, "two": B}, {"one": A, "two": B}),
    "A1111": ("sumi.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": B}, "name": "x", "step": 3}, {"sumi": B}),
    "A1111, two": ("sumi.pt", {"string_to_param": {"one": A, "two": B}}, {"one": A, "two": B}),
    "ParameterDict": ("sumi.pt", {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(B)})}, {"sumi": B}),
    "old ParameterDict": ("sumi.pt", {"string_to_param": old_parameters({"*": B})}, {"sumi": B}),
    "bundle": ("a.safetensors", {"bundle_emb.tiger.clip_l": A, "bundle_emb.lion.clip_l": B}, {"tiger": A, "lion": B}),
    "rows": ("run_emb.safetensors", {"clip_l": torch.cat([A, B])}, {"<s0>": A, "<s1>": B[:1], "<s2>": B[1:]}),
    "older rows": ("run_emb.safetensors", {"text_encoders_0": B}, {"<s0>": B[:1], "<s1>": B[1:]}),
}


@pytest.mark.parametrize("case", FILES)
def test_words_are_called_as_their_program_does(case: str, tmp_path: Path) -> None:
    name, content, words = FILES[case]
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({key: one.contiguous() for key, one in content.items()}, path)
    else:
        torch.save(content, path)
    pipe = make_pipe()
    Adapters(pipe).load(path, strict=True)
    for word, vectors in words.items():
        ids = pipe.tokenizer(word, add_special_tokens=False).input_ids
        found = pipe.text_encoder.get_input_embeddings()(torch.tensor(ids))
        torch.testing.assert_close(found.detach(), vectors, atol=1e-6, rtol=0)
    assert len(learned(pipe.tokenizer)) == sum(map(len, words.values()))


@pytest.mark.slow
def test_a_word_is_called_as_one_likes_and_of_several_one_is_chosen(tmp_path: Path) -> None:
    save_file({"emb_params": B}, tmp_path / "v1-final.safetensors")
    pipe = make_pipe()
    (choice,) = parse_choices([f"{tmp_path / 'v1-final.safetensors'}@word:<ink>=0.5"])
    assert (choice.word, choice.strength, parse_choice(choice.text)) == ("<ink>", 0.5, choice)
    Adapters(pipe).load(choice.parsed(), strict=True)
    assert len(pipe.tokenizer("<ink>", add_special_tokens=False).input_ids) == 2
    save_file({"<one>": A, "<two>": B}, tmp_path / "a.safetensors")
    adapters = Adapters(make_pipe())
    adapters.load(tmp_path / "a.safetensors", word="<two>")
    assert len(learned(adapters.pipe.tokenizer)) == 2 and adapters["a"].report.unmatched == ("<one>",)
    with pytest.raises(UserError, match="holds the words <one>, <two>, and none '<three>'"):
        adapters.load(tmp_path / "a.safetensors", "b", word="<three>")
    with pytest.raises(UserError, match="one without spaces"):
        adapters.load(tmp_path / "v1-final.safetensors", "b", word="two words")
    write_adapter(tmp_path / "lora.safetensors", make_pipe())
    with pytest.raises(UserError, match="holds no learned word that could be called"):
        formats.plan(tmp_path / "lora.safetensors", word="<a>")


@pytest.mark.slow
def test_a_recipe_keeps_what_a_word_was_called(tmp_path: Path, tiny_base: Path) -> None:
    save_file({"emb_params": B}, tmp_path / "v1.safetensors")
    base = str(tiny_base)
    first = generate(
        GenerateConfig(
            prompts=("a <ink> cat",), adapter=(f"{tmp_path / 'v1.safetensors'}@word:<ink>",), steps=1, width=64, height=64,
            output=tmp_path / "a.png", base=base, device="cpu",
        )
    )[0]  # fmt: skip
    again = generate(GenerateConfig(recipe=first.path, output=tmp_path / "b.png", base=base, device="cpu"))[0]
    assert again.recipe.adapters == first.recipe.adapters and first.recipe.adapters[0].word == "<ink>"
    assert first.image.tobytes() == again.image.tobytes()


@pytest.mark.slow
def test_a_word_for_one_text_encoder_is_told_where_there_are_two(tmp_path: Path) -> None:
    save_file({"emb_params": B}, tmp_path / "old.safetensors")
    save_file({"clip_l": B, "clip_g": B.clone()}, tmp_path / "xl.safetensors")
    (warning,) = formats.load(tmp_path / "old.safetensors", make_xl_pipe()).warnings
    assert (
        "the word old was learned for text_encoder alone, as for Stable Diffusion 1 and 2; text_encoder_2 reads" in warning
    )
    assert formats.load(tmp_path / "xl.safetensors", make_xl_pipe()).warnings == ()
    pipe = make_xl_pipe()
    Adapters(pipe).load(tmp_path / "old.safetensors", component="text_encoder_2")
    assert len(learned(pipe.tokenizer_2)) == 2 and not learned(pipe.tokenizer)


@pytest.mark.slow
def test_words_beside_a_lora_are_told(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "run.safetensors", make_pipe())
    assert formats.load(path, make_pipe()).warnings == ()
    save_file({"clip_l": B}, tmp_path / "run_emb.safetensors")
    (warning,) = formats.load(path, make_pipe()).warnings
    assert "trained with new words, which lie beside it in run_emb.safetensors" in warning


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_the_second_text_encoder_says_which_it_is_for(tmp_path: Path) -> None:
    theirs, ours = make_xl_pipe(), make_xl_pipe()
    ids = torch.arange(2, 20)[None]
    plain = ours.text_encoder_2(ids).text_embeds.detach()
    model = peft.get_peft_model(theirs.text_encoder_2, peft.LoraConfig(r=4, target_modules=["q_proj", "text_projection"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match="this base has text_encoder and text_encoder_2: say which is meant, as component="):
        formats.load(tmp_path / "peft", ours)
    (choice,) = parse_choices([f"{tmp_path / 'peft'}@text_encoder_2=1"])
    Adapters(ours).load(choice.parsed(), strict=True)
    expected = theirs.text_encoder_2(ids).text_embeds.detach()
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours.text_encoder_2(ids).text_embeds.detach(), expected, atol=1e-5, rtol=1e-4)
    own = write_adapter(tmp_path / "own.safetensors", make_xl_pipe(), parts=("unet", "text_encoder_2"))
    renamed = {f"lycoris_{name[name.index('_', 5) + 1 :]}": one for name, one in load_file(own).items()}
    save_file(renamed, tmp_path / "wrapped.safetensors")
    chosen = formats.load(
        formats.plan(tmp_path / "wrapped.safetensors", component="text_encoder_2"), make_xl_pipe(), strict=True
    )
    named = formats.load(own, make_xl_pipe())
    assert {part: built.keys() for part, built in chosen.components.items()} == {
        part: built.keys() for part, built in named.components.items()
    }
    with pytest.raises(UserError, match="its names tell their components, so leave text_encoder_2 away"):
        formats.plan(own, component="text_encoder_2")
    with pytest.raises(UserError, match=r"there is no component 'text_encoder_3'.*did you mean"):
        formats.plan(own, component="text_encoder_3")


def as_json(vectors: torch.Tensor, name: str) -> bytes:
    """What A1111 puts into a picture."""
    return json.dumps({"string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}}, "name": name, "step": 5}).encode()


def generator(count: int) -> np.ndarray[Any, Any]:
    """The numbers that A1111 mixes data with, one by one."""
    numbers, seed = [], 0
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        numbers.append(seed % 255)
    return np.array(numbers, np.uint8)


def in_pixels(data: bytes, picture: Image.Image) -> Image.Image:
    """A picture between the halves of compressed data, as ``insert_image_data_embed`` of A1111 makes it."""
    packed = np.frombuffer(zlib.compress(data, 9), np.uint8)
    height = picture.height
    size = -(-len(packed) // (3 * height)) * 3 * height
    blocks = []
    for half in (packed & 15, packed >> 4):
        block = np.resize(half, size).reshape(height, -1, 3)
        shades = np.random.default_rng(0).integers(16, 256, block.shape).astype(np.uint8) & 0xF0
        blocks.append(block ^ shades ^ (generator(size).reshape(block.shape) & 15))
    gap = np.zeros((height, 1, 3), np.uint8)
    return Image.fromarray(np.concatenate([blocks[0], gap, np.asarray(picture), gap, blocks[1]], 1))


@pytest.mark.parametrize("form", ("text", "pixels.png", "pixels.webp"))
def test_a_word_in_a_picture_is_read_as_a1111_does(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"card.{form.rpartition('.')[2] if '.' in form else 'png'}"
    picture = Image.new("RGB", (40, 32), (200, 90, 30))
    if form == "text":
        entries = PngInfo()
        entries.add_text("sd-ti-embedding", base64.b64encode(as_json(B, "sumi ink")).decode())
        picture.save(path, pnginfo=entries)
    else:
        in_pixels(as_json(B, "sumi ink"), picture).save(path, lossless=True)
    pipe = make_pipe()
    Adapters(pipe).load(path, strict=True)
    ids = pipe.tokenizer("sumi_ink", add_special_tokens=False).input_ids
    found = pipe.text_encoder.get_input_embeddings()(torch.tensor(ids))
    torch.testing.assert_close(found.detach(), B, atol=1e-6, rtol=0)
    assert formats.inspect(path).triggers == ("sumi_ink",)


@pytest.mark.slow
def test_pictures_that_hold_no_word_or_a_damaged_one_are_refused(tmp_path: Path) -> None:
    plain = Image.new("RGB", (40, 32), (200, 90, 30))
    framed = Image.new("RGB", (60, 40), (9, 9, 9))
    framed.paste(plain, (10, 4))
    framed.paste((0, 0, 0), (8, 0, 9, 40))
    framed.paste((0, 0, 0), (51, 0, 52, 40))
    for picture in (plain, framed, Image.new("RGB", (8, 8))):
        picture.save(tmp_path / "a.png")
        with pytest.raises(UserError, match="a picture that holds no embedding of A1111"):
            formats.plan(tmp_path / "a.png")
    huge = in_pixels(b" " * (2**26 + 1), plain)  # of 64 KiB, which unpack to 64 MiB
    huge.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="more than any embedding"):
        formats.plan(tmp_path / "a.png")
    for text in (b'{"string_to_param": {}}', b"[" * 9999, b'{"string_to_param": {"*": {"TORCHTENSOR": [[1e999]]}}}', b"no"):
        in_pixels(text, plain).save(tmp_path / "a.png")
        with pytest.raises(UserError, match="its embedding"):
            formats.plan(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="is no picture that can be read"):
        formats.plan(tmp_path / "a.png")


def test_the_numbers_in_pictures_are_a1111s_own() -> None:
    """The values that A1111's file tests itself with."""
    found = pictures._numbers(100_100)
    assert found[:10].tolist() == [253, 242, 127, 44, 157, 27, 239, 133, 38, 79]
    assert int(found[100:].astype(np.int64).sum()) == 12731374


def test_a_projection_that_only_comfyui_has_is_left_out_and_told(tmp_path: Path) -> None:
    """ComfyUI's saver writes that of XL's first text encoder too, whose output there nothing reads."""
    ends = {"clip_g": "text_encoder_2", "clip_l": "text_encoder"}
    pipe, held = make_xl_pipe(), dict[str, torch.Tensor]()
    for name, component in ends.items():
        config = getattr(pipe, component).config
        width, outputs = config.hidden_size, config.projection_dim
        site = f"text_encoders.{name}.transformer.text_projection"
        held |= {f"{site}.lora_down.weight": torch.ones(2, width), f"{site}.lora_up.weight": torch.ones(outputs, 2)}
    save_file(held, tmp_path / "style.safetensors")
    loaded = formats.load(tmp_path / "style.safetensors", pipe, strict=True)
    assert {component: [*own] for component, own in loaded.components.items()} == {"text_encoder_2": ["text_projection"]}
    assert any("2 of 4 tensors change a projection" in one and "clip_l" in one for one in loaded.warnings)
    save_file({name: one for name, one in held.items() if "clip_l" in name}, tmp_path / "idle.safetensors")
    with pytest.raises(UserError, match="holds nothing for this base: its tensors change a projection"):
        formats.load(tmp_path / "idle.safetensors", pipe)
