"""Pictures and their recipes, blends, sheets, and what files say of each other. One tiny random base for all of it."""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from making import make_adapter
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from peft_diffusion import Adapters, BlendConfig, GenerateConfig, UserError, blend, formats, generate, load_base
from peft_diffusion.bases import describe
from peft_diffusion.bases.base import checkpoint_sha256
from peft_diffusion.bases.schedulers import SCHEDULERS
from peft_diffusion.cli import app, demo, parser
from peft_diffusion.core import site
from peft_diffusion.core.events import Event, Noted, Progress, Warned
from peft_diffusion.data.prompts import words_of
from peft_diffusion.generation import recipe, sampler, sheet
from peft_diffusion.generation.adapted import adapted
from peft_diffusion.generation.blend import _distinct, _label, shares
from peft_diffusion.generation.compatibility import compare
from peft_diffusion.generation.generate import Picture, cell_recipes
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Choice, DemoConfig, Sampling, parse_choice, parse_choices
from peft_diffusion.generation.text import choose, generate_text
from peft_diffusion.generation.text_settings import TextGenerateConfig
from peft_diffusion.methods.lora import Lora

Make: TypeAlias = Callable[..., list[Picture]]
STEPS = 2
ONE_LEVEL = 1  # of 255
pytestmark = pytest.mark.usefixtures("read_bases_once")


@pytest.fixture(scope="module")
def ink(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("ink") / "ink.safetensors", tiny_base, 1, ("ink style",))


@pytest.fixture(scope="module")
def flat(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("flat") / "flat.safetensors", tiny_base, 2)


@pytest.fixture(scope="module")
def make(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Generate on the tiny base; returns the pictures."""

    def run(*prompts: str, **options: Any) -> list[Picture]:
        options = {"output": tmp_path_factory.mktemp("out"), "steps": STEPS, "base": str(tiny_base), **options}
        return generate(GenerateConfig(prompts or ("a red apple",), device="cpu", **options))

    return run


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest, in levels of 255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [None, "euler-a"])
def test_a_seed_gives_its_picture_whatever_the_batch_and_the_count(make: Make, ink: Path, scheduler: str | None) -> None:
    options: dict[str, Any] = {"adapter": (str(ink),), "scheduler": scheduler}
    together = make("a cat", "a red apple", seed=4, count=3, batch_size=4, **options)
    alone = [make(p.recipe.prompt, seed=p.recipe.seed, batch_size=1, **options)[0] for p in together]
    assert [p.recipe.seed for p in together] == [4, 5, 6, 4, 5, 6]
    assert max(difference(a.image, b.image) for a, b in zip(together, alone, strict=True)) <= ONE_LEVEL
    listed = make("a cat", seeds=(6, 4), **options)
    assert difference(listed[0].image, together[2].image) <= ONE_LEVEL
    assert difference(listed[1].image, together[0].image) <= ONE_LEVEL
    assert difference(together[0].image, together[1].image) > 10


@pytest.mark.slow
def test_every_scheduler_draws_and_is_put_back(tiny_pipe: DiffusionPipeline) -> None:
    adapters, own = Adapters(tiny_pipe), tiny_pipe.scheduler
    drawn = {}
    for name in (one for one in SCHEDULERS if one != "lms" or find_spec("scipy")):
        drawn[name] = next(paint(adapters, [Cell("a cat", 1, {})], Sampling(steps=5, scheduler=name)))
        assert tiny_pipe.scheduler is own
    for name, picture in drawn.items():
        assert np.asarray(picture).std() > 5, name
        assert all(difference(picture, other) > 0 for key, other in drawn.items() if key != name), name


@pytest.mark.slow
def test_progress_comes_to_the_end(tiny_pipe: DiffusionPipeline) -> None:
    seen: list[Event] = []
    cells = [Cell("a cat", seed, {}) for seed in range(3)]
    list(paint(Adapters(tiny_pipe), cells, Sampling(steps=2, batch_size=2), tell=seen.append))
    assert all(isinstance(event, Progress) for event in seen)
    assert [(event.done, event.total) for event in seen if isinstance(event, Progress)] == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["dpm++", "heun", "pndm"])
def test_guidance_stops_where_it_is_told(tiny_pipe: DiffusionPipeline, ink: Path, scheduler: str) -> None:
    """Up to there a picture is what guidance makes it, and from there each is computed once and not twice."""
    adapters = Adapters(tiny_pipe)
    counts: list[tuple[int, float]] = []
    adapters.load(ink, name="ink")
    hook = tiny_pipe.unet.register_forward_pre_hook(lambda net, args: counts.append((len(args[0]), float(args[1]))))

    def drawn(**options: Any) -> tuple[list[Image.Image], list[tuple[int, float]]]:
        counts.clear()
        cells = [Cell("a cat", seed, {"ink": 0.5 + seed}) for seed in range(2)]  # of their own strength each
        return list(paint(adapters, cells, Sampling(steps=4, scheduler=scheduler, **options))), list(counts)

    whole, half, none, off = (
        drawn(guidance=5.0, guidance_stop=1.0), drawn(guidance=5.0, guidance_stop=0.5), drawn(guidance=5.0, guidance_stop=0),
        drawn(guidance=1.0),
    )  # fmt: skip
    hook.remove()
    assert {count for count, _ in whole[1]} == {4} and {count for count, _ in none[1]} == {2}
    assert {count for count, timestep in half[1] if timestep >= 500} == {4}
    assert {count for count, timestep in half[1] if timestep < 500} == {2}
    for one, other in zip(none[0], off[0], strict=True):
        assert difference(one, other) == 0
    assert all(difference(half[0][n], other[0][n]) > 0 for other in (whole, none) for n in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_guidance_stops_where_a_picture_is_made_anew(make: Make, tmp_path: Path, masked: bool) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "source.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    told = {"image": tmp_path / "source.png", "mask": tmp_path / "mask.png" if masked else None, "strength": 0.9, "seed": 3}
    told["steps"] = 3  # of which guidance takes part in one
    whole, half, none = (make("a cat", guidance_stop=stop, **told)[0].image for stop in (1.0, 0.5, 0.0))
    assert difference(whole, half) > 0 and difference(half, none) > 0
    late, without = (make("a cat", **{**told, "strength": 0.4}, guidance_stop=stop)[0].image for stop in (0.5, 0.0))
    assert difference(late, without) == 0, "it starts where guidance acts no more"
    if masked:
        assert half.getpixel((60, 30)) == (255, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_the_ends_of_a_blend_are_each_adapter_alone(
    make: Make, ink: Path, flat: Path, tiny_base: Path, tmp_path: Path, guidance: float
) -> None:
    prompts = ("a cat", "a red apple")
    config = BlendConfig(
        prompts, adapter=(f"{ink}=0.8", str(flat)), columns=3, plain=True, bare=True, seed=3, output=tmp_path / "b.png",
        steps=STEPS, base=str(tiny_base), guidance=guidance,
    )  # fmt: skip
    drawn = blend(config)
    for columns, adapter in ((0, ()), (1, (f"{ink}=0.8",)), (3, (str(flat),)), (2, (f"{ink}=0.4", f"{flat}=0.5"))):
        alone = make(*prompts, adapter=adapter, seed=3, guidance=guidance)
        for row, picture in enumerate(alone):
            assert difference(drawn.pictures[row][columns], picture.image) <= ONE_LEVEL
    assert all(difference(a, b) > 10 for row in drawn.pictures for a, b in pairwise(row))
    told = json.loads(Image.open(config.output).info["peft_diffusion"])["sheet"]
    assert [[recipe.Recipe.from_json(one) for one in row] for row in told] == [list(row) for row in drawn.recipes]


def test_shares_pass_all_of_each_adapter() -> None:
    assert shares(2, 5) == [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    assert shares(3, 5) == [(1, 0, 0), (0.5, 0.5, 0), (0, 1, 0), (0, 0.5, 0.5), (0, 0, 1)]
    assert all(sum(mix) == pytest.approx(1) for mix in shares(4, 9))


@pytest.mark.slow
def test_the_picture_is_made_again_from_its_own_recipe(make: Make, ink: Path, tmp_path: Path) -> None:
    options = {"seed": 9, "scheduler": "euler", "negative": "a dog", "width": 128, "guidance_stop": 0.6}
    first = make(adapter=(f"{ink}=0.7",), output=tmp_path / "a.png", **options)[0]
    assert recipe.read(first.path) == first.recipe
    again = generate(GenerateConfig(recipe=first.path, base=first.recipe.base, output=tmp_path / "b.png", device="cpu"))[0]
    assert (tmp_path / "b.png").read_bytes() == first.path.read_bytes()
    assert again.recipe == first.recipe
    assert first.image.size == (128, 64)


@pytest.mark.slow
def test_a_recipe_finds_its_adapters_by_their_bytes(make: Make, ink: Path, flat: Path, tmp_path: Path) -> None:
    used = tmp_path / "used.safetensors"
    used.write_bytes(ink.read_bytes())
    first = make(adapter=(f"{used}=0.7",), output=tmp_path / "a.png")[0]
    used.write_bytes(flat.read_bytes())
    config = GenerateConfig(recipe=first.path, base=first.recipe.base, output=tmp_path / "b.png", device="cpu")
    with pytest.raises(UserError, match="is another"):
        generate(config)
    found = generate(replace(config, adapter=(str(ink),)))[0]
    assert difference(found.image, first.image) == 0


@pytest.mark.slow
def test_a_recipe_is_not_used_on_another_base_or_overridden(make: Make, other_base: Path, tmp_path: Path) -> None:
    first = make(output=tmp_path / "a.png")[0]
    with pytest.raises(UserError, match="was made with base 'tiny'"):
        generate(GenerateConfig(recipe=first.path, base=str(other_base), output=tmp_path / "b.png"))
    with pytest.raises(UserError, match="says steps"):
        generate(GenerateConfig(recipe=first.path, steps=7))
    assert not (tmp_path / "b.png").exists()


def as_trailing(pipe: DiffusionPipeline) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")


def with_another_scheduler(pipe: DiffusionPipeline) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def with_another_vae(pipe: DiffusionPipeline) -> None:
    pipe.vae.decoder.conv_out.weight.data.mul_(1.5)


def with_free_u(pipe: DiffusionPipeline) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_free_u, r"freeu \[0.9, 0.2, 1.2, 1.4\], not None"),
        (as_trailing, "timestep_spacing trailing, not leading"),
        (with_another_scheduler, "EulerDiscreteScheduler, not DDIMScheduler"),
        (with_another_vae, "a VAE .*, not "),
    ],
)
def test_a_recipe_is_drawn_by_what_drew_it_or_refused(
    change: Callable[[DiffusionPipeline], None], told: str, tiny_base: Path, tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    change(tiny_pipe)
    config = GenerateConfig(("a cat",), base=str(tiny_base), steps=2, output=tmp_path / "a.png", device="cpu")
    first = generate(config, pipe=tiny_pipe)[0]
    again = GenerateConfig(recipe=first.path, base=str(tiny_base), output=tmp_path / "b.png", device="cpu")
    with pytest.raises(UserError, match=f"was drawn with {told}"):
        generate(again)
    assert difference(generate(again, pipe=tiny_pipe)[0].image, first.image) == 0


@pytest.mark.slow
def test_a_recipe_is_drawn_in_its_own_dtype_and_another_is_told(make: Make, tmp_path: Path) -> None:
    first = make(precision="bfloat16", output=tmp_path / "a.png")[0]
    config = GenerateConfig(recipe=first.path, base=first.recipe.base, output=tmp_path / "b.png", device="cpu")
    again = generate(config)[0]
    assert again.recipe == first.recipe and difference(again.image, first.image) == 0
    heard: list[Event] = []
    wider = generate(replace(config, precision="float32"), observers=[heard.append])[0]
    assert difference(wider.image, first.image) > 0
    assert (
        Warned("the picture was drawn in bfloat16 on cpu and is drawn in float32 on cpu now, so it will differ a little")
        in heard
    )


@pytest.mark.slow
def test_other_programs_read_the_parameters(make: Make, ink: Path, tmp_path: Path) -> None:
    options = {"seed": 3, "scheduler": "dpm++-karras", "negative": "a dog", "guidance": 6.5}
    picture = make("a café", adapter=(f"{ink}=0.5",), output=tmp_path / "a.png", **options)[0]
    lines = Image.open(picture.path).info["parameters"].split("\n")
    assert lines[:2] == ["a café <lora:ink:0.5>", "Negative prompt: a dog"]
    fields = a1111(lines[2])
    assert fields["Sampler"] == "DPM++ 2M Karras"
    assert (fields["Steps"], fields["Seed"], fields["Size"], fields["CFG scale"]) == (str(STEPS), "3", "64x64", "6.5")
    assert "Model hash" not in fields and fields["Model"] == "tiny"  # A1111 knows bases of one file
    content = ink.read_bytes()  # as A1111's hashes.py: of what follows the header
    assert (
        fields["Lora hashes"]
        == f"ink: {hashlib.sha256(content[8 + int.from_bytes(content[:8], 'little') :]).hexdigest()[:12]}"
    )


def a1111(line: str) -> dict[str, str]:
    """The values of a line of parameters, as A1111's infotext_utils.py reads them."""
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


@pytest.mark.slow
def test_parameters_name_each_adapter_once_and_quote_what_parts_values(make: Make, ink: Path, tmp_path: Path) -> None:
    others = [tmp_path / "x" / "ink.safetensors", tmp_path / "a, b: <c>.safetensors"]
    others[0].parent.mkdir()
    save_file(load_file(ink), others[0])  # without the hash that kohya's programs write
    others[1].write_bytes(ink.read_bytes())
    first = make("a cat", adapter=(str(ink), f"{others[0]}=0.5", f"{others[1]}=0.25"), output=tmp_path / "a.png")[0].recipe
    lines = replace(first, base_name="mine, v2: best").parameters().split("\n")
    assert lines[0] == "a cat <lora:ink:1> <lora:ink_2:0.5> <lora:a b c:0.25>"
    fields, digests = a1111(lines[1]), []
    for path in (ink, *others):
        content = path.read_bytes()
        digests.append(hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:12])
    assert fields["Model"] == "mine, v2: best" and fields["Seed"] == "0"
    assert fields["Lora hashes"] == f"ink: {digests[0]}, ink_2: {digests[1]}, a b c: {digests[2]}"


SYNTAXES = {
    "a cat <lora:ink:0.8>": ("a cat", "names an adapter where none is taken"),
    "a [red:blue:0.5] [cat:.7] [dog::9]": ("a red cat dog", "changes words while the picture is drawn"),
    "a [cat|dog|bird]": ("a cat", "takes turns at each step"),
    "a cat AND a dog": ("a cat and a dog", "joins prompts"),
    "embedding:ink, a cat": ("ink, a cat", "names learned words"),
    "<segment:face,0.5> a <random[1-2]:red,blue> cat": ("a cat", "is an instruction to another program"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "words", "said"), [(prompt, *told) for prompt, told in SYNTAXES.items()])
def test_instructions_of_other_programs_are_told_and_not_drawn(
    tiny_pipe: DiffusionPipeline, prompt: str, words: str, said: str
) -> None:
    told: list[Event] = []
    for negative in (False, True):
        sampling = Sampling(steps=1, negative=prompt if negative else "")
        plain = replace(sampling, negative=words if negative else "")
        asked, same = ("a dog", "a dog") if negative else (prompt, words)
        (drawn,) = paint(Adapters(tiny_pipe), [Cell(asked, 1, {})], sampling, tell=told.append)
        (wanted,) = paint(Adapters(tiny_pipe), [Cell(same, 1, {})], plain)
        assert difference(drawn, wanted) == 0
    warned = [event.message for event in told if isinstance(event, Warned)]
    assert len(warned) == 2 and all(said in message for message in warned)


LETTERS = ["a (red)", r"a \(red:1.4\)", "a [V]", "a {cat}", "take a BREAK", "a_cat__", "ratio 16:9", "<ink> [] a", "ANDY"]


@pytest.mark.parametrize("prompt", LETTERS)
def test_words_that_look_alike_are_left(prompt: str) -> None:
    assert words_of(prompt) == (prompt, (), ())


@pytest.mark.slow
def test_brackets_that_were_letters_are_letters_for_a1111_too(make: Make, tmp_path: Path) -> None:
    letters = {"negative": "(y)", "steps": 1, "prompt_weights": "none"}
    told = make(r"a \(red:1.4\) cat (x) [V]", output=tmp_path / "a.png", **letters)[0].recipe.parameters()
    assert told.split("\n")[:2] == [r"a \(red:1.4\) cat \(x\) \[V\]", r"Negative prompt: \(y\)"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"seed": "1"}, {"prompt": None}, {"steps": True}, {"base_sha256": None}, {"plugins": "toy"}, {"plugins": [1]},
        {"adapters": [{"path": 1}]}, {"adapters": [1, 2, 3]}, {"image": {"path": "a.png", "sha256": 1}}, {"mask": {}},
        {"adapters": [{"path": "a", "sha256": "", "strength": "1"}]},
        {"controls": {}}, {"controls": ["edges.png"]},
        {"controls": [
            {"kind": "controlnet", "model": "m", "sha256": "", "picture": "p", "picture_sha256": "", "scale": "1"}
        ]},
    ],
)  # fmt: skip
def test_a_damaged_recipe_is_an_error(make: Make, tmp_path: Path, change: dict[str, Any]) -> None:
    values = make(output=tmp_path / "a.png")[0].recipe.to_json() | change
    info = PngImagePlugin.PngInfo()
    info.add_text("peft_diffusion", json.dumps({"version": 1, "recipe": values}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match="recipe is damaged"):
        recipe.read(tmp_path / "a.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheduler": "magic"}, "there is no scheduler 'magic'; there are: ddim, pndm"),
        ({"quantize": "int3"}, "--quantize is one of nf4, int8, not 'int3'"),
        ({"steps": 0}, "--steps must be 1 or more, not 0"),
    ],
)
def test_a_recipe_of_settings_that_there_are_not_is_an_error(
    make: Make, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    first = make(output=tmp_path / "a.png")[0]
    recipe.write(first.path, first.image, replace(first.recipe, **change))
    with pytest.raises(UserError, match=rf"a\.png has a recipe that cannot be drawn here: {said}"):
        generate(GenerateConfig(recipe=first.path, base=first.recipe.base, output=tmp_path / "b.png", device="cpu"))


@pytest.mark.slow
def test_a_picture_does_not_choose_what_is_fetched_or_loaded(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base is loaded by a recipe's word only if it is embedded, or a cached one of the hub."""
    first = make(output=tmp_path / "a.png")[0]
    with pytest.raises(UserError, match=rf"say that it is the right one with --base {first.recipe.base}$"):
        generate(GenerateConfig(recipe=first.path, output=tmp_path / "b.png", device="cpu"))
    recipe.write(first.path, first.image, replace(first.recipe, base="some/where"))
    with pytest.raises(UserError, match="which is not here; fetch it with --base some/where"):
        generate(GenerateConfig(recipe=first.path, output=tmp_path / "b.png", device="cpu"))
    snapshot = tmp_path / "hub" / "models--some--where" / "snapshots" / "0123"
    shutil.copytree(first.recipe.base, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asked: list[object] = []
    read = StableDiffusionPipeline.from_pretrained

    def watched(source: str, **options: Any) -> Any:
        asked.append(options["local_files_only"])
        return read(source, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", watched)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", watched)
    again = generate(GenerateConfig(recipe=first.path, output=tmp_path / "b.png", device="cpu"))[0]
    assert asked == [True] and again.image.tobytes() == first.image.tobytes()


@pytest.mark.slow
def test_only_the_named_file_is_replaced(make: Make, tmp_path: Path) -> None:
    named = tmp_path / "a.png"
    named.write_bytes(b"old")
    assert make(output=named)[0].path == named
    assert Image.open(named).size == (64, 64)
    (tmp_path / "a-1.png").write_bytes(b"kept")
    many = make(output=named, count=2)
    assert [p.path.name for p in many] == ["a-1-2.png", "a-2.png"]
    folder = [make("A red, red apple!", output=tmp_path / "folder")[0].path.name for _ in range(2)]
    assert folder == ["a-red-red-apple-0.png", "a-red-red-apple-0-2.png"]
    assert (tmp_path / "a-1.png").read_bytes() == b"kept"
    assert not list(tmp_path.glob(".*"))


def test_strengths_are_parsed_from_the_right(tmp_path: Path) -> None:
    plain, odd = tmp_path / "a.safetensors", tmp_path / "k=v" / "b=2.safetensors"
    odd.parent.mkdir()
    for path in (plain, odd):
        path.touch()
    for text, strength in ((f"{plain}", 1), (f"{plain}=0.5", 0.5), (f"{plain}=-1e-1", -0.1), (f"{odd}", 1), (f"{odd}=2", 2)):
        choice = parse_choice(text)
        assert (choice.path, choice.strength) == (plain if str(plain) in text else odd, strength)
    for wrong in ("=x", "=", "=nan", "=inf", "=-inf", "=0,5"):
        with pytest.raises(UserError, match=r"must be a (finite )?number"):
            parse_choice(f"{plain}{wrong}")
    with pytest.raises(UserError, match="no adapter file"):
        parse_choice(str(tmp_path / "k=v" / "missing"))
    (tmp_path / "ink wash v1.2.safetensors").touch()
    for near in ("ink wash v1.2", "Ink_Wash v1.2.safetensors=0.5"):
        with pytest.raises(UserError, match=r"there is no adapter file .*; did you mean .*ink wash v1.2.safetensors\?$"):
            parse_choice(str(tmp_path / near))


def test_sides_must_be_what_the_base_can_make(tiny_pipe: DiffusionPipeline) -> None:
    assert sampler.size(describe(tiny_pipe), Sampling(height=128)) == (64, 128)
    with pytest.raises(UserError, match=r"width 72 is no multiple of 16, .*; take 64 or 80"):
        sampler.size(describe(tiny_pipe), Sampling(width=72))
    with pytest.raises(UserError, match=r"16000x16000 is over the limit of 89,478,485 pixels"):
        sampler.size(describe(tiny_pipe), Sampling(width=16000, height=16000))


@pytest.mark.slow
def test_strengths_of_parts_in_which_an_adapter_changes_nothing_are_told(tiny_pipe: DiffusionPipeline, ink: Path) -> None:
    for amount, said in {
        "0.5,te:0.5,unet:1": "",
        "mid:1,conv_in:0": "",
        "te2:1": "changes nothing of text_encoder_2, so the strength that is said of it has no effect",
        "conv_in:0.5": "changes nothing in conv_in, and has strength 0 in blocks that are not named",
    }.items():
        told: list[Event] = []
        choices = parse_choices((f"{ink}={amount}",))
        with adapted(tiny_pipe, choices, [()], told.append, lent=True, strict=False, fast=False):
            assert [one.message for one in told if isinstance(one, Noted)] == ([f"{ink} {said}"] if said else [])


@pytest.mark.slow
def test_a_missing_trigger_is_noted(make: Make, ink: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "peft_diffusion"):
        make("an INK STYLE cat", adapter=(str(ink),))
        assert "ink style" not in caplog.text
        make("pink stylecat", adapter=(str(ink),))
    assert 'is called by "ink style", which the prompt "pink stylecat" does not contain' in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch_size": 0}, {"count": 0}, {"seed": -1}, {"seed": 2**63}, {"guidance": float("nan")},
        {"guidance": 1, "negative": "a dog"}, {"guidance_stop": 0, "negative": "a dog"}, {"guidance_stop": 1.1},
        {"seeds": (1, 2), "count": 2}, {"width": 0}, {"prompts": ()}, {"prompts": 3}, {"prompts": ("a", None)},
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        GenerateConfig(**{"prompts": ("a",), **wrong})


@pytest.mark.slow
def test_a_sheet_shows_every_picture_as_it_is() -> None:
    colours: list[list[tuple[int, int, int] | None]] = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), None]]
    images = [[c and Image.new("RGB", (40, 30), c) for c in row] for row in colours]
    drawn = sheet.grid(images, ["a long label that must be wrapped", "é"], ["one", "two words"], "A title")
    counted: Any = drawn.getcolors(1 << 20)  # of a picture of more than one channel
    found = {colour: count for count, colour in counted}
    assert {found[c] for row in colours for c in row if c} == {40 * 30}
    assert drawn.getpixel((0, 0)) == sheet.PAPER
    assert any(sum(colour) < 200 for colour in found if colour not in colours[0] + colours[1])  # the letters
    endless = sheet.grid(images, ["word " * 100_000, "x" * 100_000], ["one", "y " * 50_000], "z" * 1_000_000)
    assert endless.width < 3000 and endless.height < 3000
    bare = sheet.grid(images)
    assert bare.width < drawn.width
    assert bare.height < drawn.height


def test_a_long_word_is_broken_where_it_no_longer_fits_in_a_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    length = sheet._length

    def counted(text: str, size: int) -> float:
        measured.append(text)
        return length(text, size)

    monkeypatch.setattr(sheet, "_length", counted)
    word = "mill" * 50
    lines = sheet._wrap(word, 100, 12)
    assert "".join(lines) == word and len(measured) < 11 * len(lines)
    for line, rest in pairwise(lines):
        assert length(line, 12) <= 100 < length(line + rest[0], 12)
    assert sheet._wrap("ab", 1, 12) == ["a", "b"]


def test_a_sheet_refuses_labels_that_do_not_match() -> None:
    picture = Image.new("RGB", (8, 8))
    wrong: tuple[Any, ...] = (([[]],), ([[picture]], ["a", "b"]), ([[picture]], None, ["a", "b"]))
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"picture|labels"):
            sheet.grid(*arguments)


@pytest.mark.slow
def test_whether_files_fit_together(ink: Path, flat: Path, tiny_base: Path, other_base: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other.safetensors", other_base, 3)
    a, b, c = map(formats.inspect, (ink, flat, other))
    assert compare(a, b).verdict == "yes"
    assert "the same base: tiny" in compare(a, b).reasons[0]
    apart = compare(a, c)
    assert apart.verdict == "no"
    assert "other shapes" in apart.reasons[-1]
    tensors = load_file(ink)  # whose names are told as the file has them
    (named,) = (name for name in tensors if f"{name} changes a weight of (" in apart.reasons[-1])
    site_name, _, _ = named.partition(".")
    outputs, inputs = len(tensors[f"{site_name}.lora_up.weight"]), tensors[f"{site_name}.lora_down.weight"].shape[1]
    assert f"{named} changes a weight of ({outputs}, {inputs})" in apart.reasons[-1]
    unnamed = replace(b, spec=None, metadata={})
    assert compare(a, unnamed).verdict == "yes"  # same shapes at the same sites
    assert compare(a, replace(unnamed, sites={})).verdict == "unknown"
    xl = replace(b, spec=None, metadata={"ss_base_model_version": "sdxl_base_v1-0"}, sites={})
    assert compare(a, xl).verdict == "no"


@pytest.mark.slow
def test_the_base_is_what_it_was_after_generating(tiny_base: Path, ink: Path) -> None:
    from peft_diffusion.bases import checksum, components

    pipe = load_base(str(tiny_base), device="cpu")
    before = checksum(components(pipe))
    adapters = Adapters(pipe)
    name = adapters.load(ink)
    list(paint(adapters, [Cell("a cat", 0, {name: 0.5}), Cell("a cat", 0, {})], Sampling(steps=1)))
    adapters.remove(name)
    assert checksum(components(pipe)) == before


@pytest.mark.slow
def test_a_recipe_has_the_adapters_of_strength_0_too(make: Make, ink: Path, flat: Path, tmp_path: Path) -> None:
    first = make(adapter=(str(ink), f"{flat}=0"), output=tmp_path / "a.png")[0]
    assert [used.strength for used in recipe.read(first.path).adapters] == [1.0, 0.0]
    again = generate(GenerateConfig(recipe=first.path, base=first.recipe.base, output=tmp_path / "b.png", device="cpu"))[0]
    assert again.recipe == first.recipe and difference(again.image, first.image) == 0


def test_a_sheet_does_not_replace_a_picture(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    for output, where in (("a.png", "a.png"), ("a.png", "link.png"), ("new.png", "../" + tmp_path.name + "/new.png")):
        with pytest.raises(UserError, match="would replace a picture"):
            make(output=tmp_path / output, sheet=tmp_path / where)
    with pytest.raises(UserError, match="would replace a picture"):
        make("a cat", output=tmp_path / "folder", sheet=tmp_path / "folder" / "a-cat-0.png")
    assert (tmp_path / "a.png").read_bytes() == b"old" and not (tmp_path / "folder").exists()


@pytest.mark.slow
def test_an_adapter_beside_a_recipe_only_says_where_it_is(make: Make, ink: Path, flat: Path, tmp_path: Path) -> None:
    first = make(adapter=(f"{ink}=0.7",), output=tmp_path / "a.png")[0]
    config = GenerateConfig(recipe=first.path, base=first.recipe.base, output=tmp_path / "b.png", device="cpu")
    with pytest.raises(UserError, match=r"has no adapter .*flat\.safetensors; leave that away"):
        generate(replace(config, adapter=(str(flat),)))
    with pytest.raises(UserError, match=r"at strength 0\.7, not 1; leave the strength away"):
        generate(replace(config, adapter=(f"{ink}=1",)))
    assert not (tmp_path / "b.png").exists()
    for given in (str(ink), f"{ink}=0.7"):
        assert generate(replace(config, adapter=(given,)))[0].recipe == first.recipe


@pytest.fixture
def of_noise(tmp_path: Path) -> Path:
    """A base that predicts v, and beside it an adapter that says it was trained with zero terminal SNR."""
    pipe = make_pipe(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "base")
    site.attach(pipe.unet, "n", Lora(rank=2), "attention")
    spec = formats.Spec({"unet": ({**Lora(rank=2).spec(), "target": "attention"},)}, training={"zero_terminal_snr": True})
    formats.save(tmp_path / "n.safetensors", {"unet": pipe.unet}, "n", spec)
    return tmp_path / "n.safetensors"


@pytest.mark.slow
def test_pictures_begin_with_pure_noise_where_an_adapter_that_acts_was_trained_so(
    make: Make, of_noise: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {"base": str(of_noise.parent / "base")}
    plain, idle = make(**base)[0], make(adapter=(f"{of_noise}=0",), **base)[0]
    assert difference(plain.image, idle.image) == 0
    assert difference(plain.image, make(adapter=(str(of_noise),), **base)[0].image) > 0
    for scheduler in ("heun", "pndm"):
        caplog.clear()
        make(adapter=(f"{of_noise}=0",), scheduler=scheduler, **base)
        assert "cannot begin" not in caplog.text
        first = make(adapter=(str(of_noise),), scheduler=scheduler, output=tmp_path / "a.png", **base)[0]
        assert caplog.text.count(f"the scheduler {scheduler} cannot begin with pure noise") == 1
        assert (first.recipe.scheduler, first.recipe.sampler) == ("ddim", "DDIMScheduler")
        assert "Sampler: DDIM," in Image.open(first.path).info["parameters"]
        again = generate(GenerateConfig(recipe=first.path, base=first.recipe.base, output=tmp_path / "b.png", device="cpu"))[
            0
        ]
        assert difference(again.image, first.image) == 0


@pytest.mark.slow
def test_a_recipe_tells_the_scheduler_that_drew(of_noise: Path) -> None:
    pipe = load_base(str(of_noise.parent / "base"), device="cpu")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    adapters = Adapters(pipe)
    name = adapters.load(of_noise)
    for strength, kind in ((1.0, "DDIMScheduler"), (0.0, "PNDMScheduler")):
        (told,) = cell_recipes(adapters, [Cell("a cat", 0, {name: strength})], Sampling())
        assert told.sampler == kind


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"guidance": 1e308}, {"strength": 1e30}])
def test_what_came_out_as_nan_is_an_error_and_not_written(
    make: Make, ink: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    strength = wrong.pop("strength", 1)
    with pytest.raises(UserError, match=r"came out as NaN; lower the strength or the guidance$"):
        make(adapter=(f"{ink}={strength!r}",), output=tmp_path / "nan.png", sheet=tmp_path / "sheet.png", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_more_steps_than_noise_levels_are_refused(make: Make) -> None:
    for scheduler in ("ddim", None):
        with pytest.raises(UserError, match="steps must be at most 1000"):
            make(steps=2000, scheduler=scheduler)


def test_a_prompt_of_half_a_character_is_refused() -> None:
    tellings: tuple[dict[str, Any], ...] = ({"prompts": ("a \udcff b",)}, {"negative": "\ud800"})
    for told in tellings:
        with pytest.raises(UserError, match="no whole character"):
            GenerateConfig(**{"prompts": ("a",), **told})
    with pytest.raises(UserError, match=r"'a \\udcff b' holds '\\udcff' at letter 3"):
        TextGenerateConfig(("a \udcff b",))


def test_adapters_of_the_same_name_have_labels_that_differ(tmp_path: Path) -> None:
    for paths, expected in (
        (("s1/style.safetensors", "s2/style.safetensors"), ["s1/style", "s2/style"]),
        (("s1/a.safetensors", "s2/b.safetensors"), ["a", "b"]),
        (("p/s/style.safetensors", "q/s/style.safetensors"), ["p/s/style", "q/s/style"]),
    ):
        assert _distinct([tmp_path / path for path in paths]) == expected
    assert len(set(_distinct([tmp_path / "style.safetensors", tmp_path / "style.pt"]))) == 2


def test_a_column_is_called_by_shares_and_by_strengths_that_are_others_than_1() -> None:
    choices, names = [Choice(Path("a"), 0.6), Choice(Path("b"))], ["ink", "flat"]
    told = [_label(mix, choices, names) for mix in ((1, 0), (0.75, 0.25), (0, 1), (0, 0))]
    assert told == ["ink at 0.6", "ink 75% of 0.6\nflat 25%", "flat", "no adapter"]


@pytest.mark.slow
def test_a_header_is_read_whatever_the_capitals_of_its_ending(ink: Path, tmp_path: Path) -> None:
    for ending, bad in (("SAFETENSORS", True), ("st", True), ("PT", False)):
        path = tmp_path / f"bad.{ending}"
        path.write_bytes(b"nothing")
        if bad:
            with pytest.raises(UserError, match="no safetensors file"):
                parse_choices((str(path),))
        else:
            parse_choices((str(path),))


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-40, 0.95), (1e-300, 1.0), (0.8, 1e-50), (0.8, 5e-324)])
def test_the_likeliest_token_is_always_among_those_chosen_from(temperature: float, top_p: float) -> None:
    logits = torch.tensor([-3.0, 50.0, 2.0, float("-inf")])
    assert choose(logits, temperature, top_p, torch.Generator().manual_seed(0)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(UserError, match="not finite; lower the strengths"):
        choose(torch.tensor([0.0, bad, 1.0]), temperature, 0.9, torch.Generator())


def test_the_same_prompt_twice_is_two_texts() -> None:
    written = list(generate_text(TextGenerateConfig(("a", "a"), max_tokens=2, device="cpu")))
    assert [one.prompt for one in written] == ["a", "a"]


def test_a_full_memory_is_no_bug_and_a_path_is_printed_in_any_encoding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to")
    assert app._explain(error) == app.FAILED and "out of memory" in capsys.readouterr().err
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    monkeypatch.setattr(parser, "app", SimpleNamespace(meta=lambda given: print(given[0])))
    assert app.main(["é.png"]) == app.OK
    assert narrow.buffer.getvalue() == b"\\xe9.png\n"


def test_a_demo_replaces_its_own_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for style in demo.STYLES:
            demo._check_own(tmp_path, style)

    check()
    (tmp_path / "openmoji.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"openmoji\.safetensors is there already, and no demo has made it"):
        demo.demo(DemoConfig(output=tmp_path))
    run = tmp_path / "runs" / "openmoji"
    run.mkdir(parents=True)
    told = f'steps = 5\nsave_every = %d\npreview_steps = 0\noutput = "{tmp_path}/openmoji.safetensors"\nrun_dir = "{run}"\n'
    (run / "config.toml").write_text(told % 1)  # somebody's own run
    with pytest.raises(UserError, match="no demo has made it"):
        check()
    (tmp_path / "openmoji.safetensors").unlink()
    with pytest.raises(UserError, match="runs/openmoji is there already"):
        check()
    (run / "config.toml").write_text(told % 5)
    (tmp_path / "openmoji.safetensors").write_bytes(b"the demo's")
    check()


def test_a_checkpoint_is_digested_once_and_again_where_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = tmp_path / "a.safetensors", list[str]()
    pipe: Any = SimpleNamespace(config={"_name_or_path": str(file)})
    digest = hashlib.file_digest

    def counted(one: Any, kind: str) -> Any:
        read.append(one.name)
        return digest(one, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    for content in (b"some", b"else"):
        file.write_bytes(content)
        os.utime(file, ns=(0, int.from_bytes(content)))  # a file system may tell time coarsely
        found = [checkpoint_sha256(pipe) for _ in range(3)]
        assert found == [hashlib.sha256(content).hexdigest()] * 3
    assert read == [str(file)] * 2
