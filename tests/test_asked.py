"""What prompts hold besides words: adapters by name, alternatives and lists by the seed, and lines of options."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe
from making import command, make_adapter
from safetensors.torch import load_file, save_file
from test_training import draw_pictures, small

from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event
from peft_diffusion.core.strength_schedule import ByPart
from peft_diffusion.data.prompt_lines import parse_line, read_prompts
from peft_diffusion.data.wildcards import Wildcards
from peft_diffusion.generation import asked
from peft_diffusion.generation.asked import strengths
from peft_diffusion.generation.blend import blend
from peft_diffusion.generation.generate import Picture, generate
from peft_diffusion.generation.settings import BlendConfig, Choice, GenerateConfig, with_plans
from peft_diffusion.generation.tags import Shelf, Tag, take
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.training.attachment import attach, selected_components
from peft_diffusion.training.loop.seeds import seed_of
from peft_diffusion.training.machine.processes import Processes
from peft_diffusion.training.pictures import diffusion_task
from peft_diffusion.training.settings.placements import blocks
from peft_diffusion.training.tasks.preparation import prepare
from peft_diffusion.training.watch.previews import Previews


@pytest.fixture(scope="module")
def shelf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters as A1111 has one: ``ink``, ``flat`` in a subfolder, and one that its metadata call otherwise."""
    folder = tmp_path_factory.mktemp("Lora")
    make_adapter(folder / "ink.safetensors", tiny_base, 1)
    (folder / "styles").mkdir()
    flat = make_adapter(folder / "styles" / "Flat v1.safetensors", tiny_base, 2)
    save_file(load_file(flat), folder / "x123.safetensors", {"ss_output_name": "paper"})
    return folder


@pytest.fixture(scope="module")
def pipe() -> Any:
    return make_pipe()


def made(pipe: Any, where: Path, *prompts: str, **options: Any) -> list[Picture]:
    return generate(GenerateConfig(prompts, output=where, device="cpu", **{"steps": 2, **options}), pipe=pipe)


def difference(one: Picture, other: Picture) -> float:
    return float(np.abs(np.asarray(one.image, float) - np.asarray(other.image, float)).mean())


# Names of adapters.


def test_adapters_are_taken_out_of_prompts() -> None:
    words, tags = take("a <lora:ink:0.8> cat, <lyco:Flat v1:0.5:0.25> red <LORA:ink:0.1:unet=0.4><lora:x>")
    assert words == "a cat, red"
    assert tags == (Tag("ink", 0.8 + 0.1, 0.8 + 0.4), Tag("Flat v1", 0.5, 0.25), Tag("x", 1.0, 1.0))
    assert take("a  cat") == ("a  cat", ())
    for odd, said in {
        "<lora:ink:much>": "'much' is no strength", "<lora:ink:nan>": "is no strength", "<lora:>": "names no adapter",
        "<lora:ink:1:1:64>": "says 64, which is not read", "<lora:ink:1:lbw=MIDD>": "says lbw=MIDD",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=said):
            take(f"a cat {odd}")


@pytest.mark.slow
def test_a_file_that_is_named_by_several_names_has_the_sum_of_their_strengths(pipe: Any, shelf: Path) -> None:
    """As A1111 adds one that is named twice, by its file and by its alias."""
    (choice,) = with_plans([Choice(shelf / "x123.safetensors")])
    _, tags = take("a <lora:x123:0.3> cat <lora:paper:0.25:0.5><lora:PAPER:0.125>")
    told = strengths([choice], ["one"], tags, Shelf((), shelf), pipe)
    wanted = {"unet": 0.3 + 0.5 + 0.125, "text_encoder": 0.3 + 0.25 + 0.125}
    assert isinstance(told["one"], ByPart)
    assert {name: told["one"].components[name] for name in wanted} == pytest.approx(wanted)


def test_adapters_of_regions_are_found_by_names_and_files_that_have_equals_signs(tmp_path: Path) -> None:
    there = tmp_path / "a=b.safetensors"
    save_file({"lora_unet_conv_in.lora_up.weight": torch.zeros(1)}, there)

    def adapters(named: str, **more: Any) -> tuple[Choice, ...]:
        config = GenerateConfig("a dog", region=f"box=0,0,0.5,1 adapter='{named}'", **more)
        given = tuple(Choice(Path(one)) for one in config.adapter)
        return asked._of_regions(config, Shelf(given, config.adapters_dir))[0]

    for more in ({"adapters_dir": tmp_path}, {"adapter": str(there)}):
        for named, strength in (("a=b", 1.0), ("A=B=0.5", 0.5), (f"{there}=-0.5", -0.5), (str(there), 1.0)):
            assert [(one.path, one.strength) for one in adapters(named, **more)] == [(there, strength)]
    assert adapters("a=b=0.5,te:0.25", adapters_dir=tmp_path)[0].parts is not None
    with pytest.raises(UserError, match=r"there is no adapter 'a=c' in .* for adapter=a=c of a region; did you mean 'a=b'"):
        adapters("a=c=0.5", adapters_dir=tmp_path)


@pytest.mark.slow
def test_names_are_those_of_files_given_then_of_the_folder(shelf: Path, tmp_path: Path) -> None:
    found = Shelf((Choice(tmp_path / "own" / "ink.safetensors", 0.5),), shelf)
    assert found.find("INK") is found.given[0]
    assert found.find("flat V1").path == found.find("styles/flat v1").path == shelf / "styles" / "Flat v1.safetensors"
    assert found.find("paper").path == shelf / "x123.safetensors"
    with pytest.raises(UserError, match=r"there is no adapter 'fla v1' in .* for <lora:...> .*; did you mean 'Flat v1'"):
        found.find("fla v1")
    with pytest.raises(UserError, match="its folder with --adapters-dir"):
        Shelf().find("ink")
    (tmp_path / "c" / ".trash").mkdir(parents=True)
    for name in (".trash/one", "._one", "one"):
        (tmp_path / "c" / f"{name}.safetensors").touch()
    assert Shelf((), tmp_path / "c").find("one").path == tmp_path / "c" / "one.safetensors"
    with pytest.raises(UserError, match="there is no folder of adapters"):
        Shelf((), tmp_path / "no")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="means several files"):
        Shelf((), tmp_path).find("one")
    assert Shelf((), tmp_path).find("a/one").path == tmp_path / "a" / "one.safetensors"


@pytest.mark.slow
def test_named_adapters_have_the_strengths_of_each_prompt(pipe: Any, shelf: Path, tmp_path: Path) -> None:
    prompts = ("a cat <lora:ink:0.8>", "a cat", "a cat <lora:Flat v1:0.3:0.9> <lora:ink:0.2>")
    named = made(pipe, tmp_path / "named", *prompts, adapters_dir=shelf)
    ink, flat = shelf / "ink.safetensors", shelf / "styles" / "Flat v1.safetensors"
    given: list[tuple[str, ...]] = [(f"{ink}=0.8",), (), (f"{flat}=te:0.3,unet:0.9", f"{ink}=0.2")]
    for number, adapter in enumerate(given):
        (alone,) = made(pipe, tmp_path / f"{number}", "a cat", adapter=adapter)
        assert difference(named[number], alone) < 0.1
    assert min(difference(named[1], named[0]), difference(named[1], named[2])) > 0.5
    # What a prompt says replaces what was given; a prompt that says nothing keeps it.
    both = made(pipe, tmp_path / "both", "a cat <lora:ink:0.8>", "a cat", adapter=(f"{ink}=0.3",))
    (kept,) = made(pipe, tmp_path / "kept", "a cat", adapter=(f"{ink}=0.3",))
    assert difference(both[0], named[0]) < 0.1 and difference(both[1], kept) < 0.1
    # A recipe has the words and strengths, and makes the picture again.
    recipe = named[2].recipe
    assert (recipe.prompt, recipe.written) == ("a cat", prompts[2])
    (again,) = generate(GenerateConfig(recipe=named[2].path, output=tmp_path / "again", device="cpu"), pipe=pipe)
    assert difference(again, named[2]) < 0.1


@pytest.mark.slow
def test_a_prompt_of_a1111_is_drawn_by_the_command_as_it_is(tiny_base: Path, shelf: Path, tmp_path: Path) -> None:
    prompt = (
        r"masterpiece, (red apple:1.2), ((cat)), [dog], emoji \(style\), <lora:ink:0.8> BREAK a house, flat style,"
        r" <lyco:Flat v1:0.4> of a blue house"
    )
    lora = ("--adapters-dir", shelf, "--base", tiny_base, "--steps", 2, "--device", "cpu")
    done = command("generate", prompt, *lora, "--output", tmp_path / "a.png", "--negative", "(blue:1.3), [ink]")
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr and "warning" not in done.stderr
    ink, flat = shelf / "ink.safetensors", shelf / "styles" / "Flat v1.safetensors"
    words, _ = take(prompt)
    (same,) = generate(
        GenerateConfig(
            (words,), adapter=(f"{ink}=0.8", f"{flat}=0.4"), negative="(blue:1.3), [ink]", steps=2, device="cpu",
            base=str(tiny_base), output=tmp_path / "b.png",
        )
    )  # fmt: skip
    (drawn,) = generate(
        GenerateConfig(recipe=tmp_path / "a.png", base=str(tiny_base), output=tmp_path / "c.png", device="cpu")
    )
    assert (tmp_path / "a.png").is_file() and difference(drawn, same) == 0
    assert drawn.recipe.parameters().startswith(f"{words} <lora:ink:0.8> <lora:Flat v1:0.4>\nNegative prompt: (blue:1.3)")


@pytest.mark.slow
def test_a_sheet_of_blends_has_other_adapters_beside(pipe: Any, shelf: Path, tmp_path: Path) -> None:
    ink, flat = str(shelf / "ink.safetensors"), str(shelf / "styles" / "Flat v1.safetensors")
    config = BlendConfig(
        ("a {cat|cat} <lora:paper:0.5>",), adapter=(ink, flat), columns=2, steps=1, output=tmp_path / "b.png",
        adapters_dir=shelf, device="cpu",
    )  # fmt: skip
    drawn = blend(config, pipe=pipe)
    assert [used.strength for used in drawn.recipes[0][0].adapters] == [1.0, 0.5]
    assert drawn.recipes[0][0].prompt == "a cat"
    with pytest.raises(UserError, match="is one of the adapters that are blended"):
        blend(BlendConfig(("a <lora:ink:1>",), adapter=(ink, flat), output=tmp_path / "c.png", device="cpu"), pipe=pipe)


# Alternatives and lists.


def test_alternatives_and_lists_are_drawn_by_the_seed(tmp_path: Path) -> None:
    (tmp_path / "colour.txt").write_text("# warm\nred\n\nora{n|N}ge\n", "utf-8")
    (tmp_path / "cold").mkdir()
    (tmp_path / "cold" / "blue.txt").write_text("navy\n__colour__ish\n", "utf-8-sig")
    lists = Wildcards(tmp_path)
    prompt = "a {cat|dog|{old|new} house}, __colour__, __cold/*__, {2$$a|b|c}, {1-2$$ and $$x|y}, {0::p|q}"
    drawn = {seed: lists.draw(prompt, seed) for seed in range(60)}
    assert drawn == {seed: Wildcards(tmp_path).draw(prompt, seed) for seed in range(60)}
    assert len(set(drawn.values())) > 40
    things, colours, cold, two, some, sure = zip(
        *(one.split(", ", 2)[:2] + rest(one) for one in drawn.values()), strict=True
    )
    assert set(things) == {"a cat", "a dog", "a old house", "a new house"}
    assert set(colours) == {"red", "orange", "oraNge"}
    assert set(cold) == {"navy", "redish", "orangeish", "oraNgeish"}
    assert set(two) == {f"{one}, {other}" for one in "abc" for other in "abc" if one != other}
    assert set(some) == {"x", "y", "x and y", "y and x"} and set(sure) == {"q"}
    shares = [lists.draw("{3::a|b}", seed) for seed in range(400)]
    assert 250 < shares.count("a") < 350


def rest(one: str) -> list[str]:
    """What follows thing and colour: a cold colour, two letters with a comma, one or two others, and a sure one."""
    cold, first, second, *others = one.split(", ")[2:]
    return [cold, f"{first}, {second}", *others]


def test_what_is_left_of_braces_are_letters_and_faults_are_told(tmp_path: Path) -> None:
    lists = Wildcards(tmp_path)
    for prompt, words in {
        r"a \{cat|dog\}": "a {cat|dog}",
        "a {cat}": "a {cat}",
        "{a {b}|a {b}}": "a {b}",
        "a_b__": "a_b__",
    }.items():
        assert lists.draw(prompt, 0) == words
    (tmp_path / "colours.txt").write_text("red\n")
    (tmp_path / "loop.txt").write_text("a __loop__ __loop__\n")
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\x00")
    for prompt, said in {
        "__colour__": "no list colour.txt for __colour__ in .*; did you mean 'colours'", "__loop__": "never ends",
        "__none__": "has no entries", "__odd__": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=said):
            Wildcards(tmp_path).draw(prompt, 0)
    gone = Wildcards(tmp_path)
    assert gone.draw("__colours__", 0) == "red" and set(gone.files) == {"colours", "loop", "none", "odd"}
    (tmp_path / "colours.txt").write_text("blue\n")
    assert gone.draw("__Colours__", 0) == "red", "a list is read once a call"
    (tmp_path / "none.txt").unlink()
    with pytest.raises(UserError, match=r"the list .*none\.txt cannot be read: No such file"):
        gone.draw("__none__", 0)
    with pytest.raises(UserError, match="give their folder with --wildcards-dir"):
        Wildcards().draw("a __colour__ cat", 0)
    with pytest.raises(UserError, match="there is no folder of wildcards"):
        Wildcards(tmp_path / "no")


# Lines.


def test_lines_are_read_as_kohyas_trainer_reads_them(tmp_path: Path) -> None:
    assert parse_line("a red cat --n blurry, dog --w 640 --H 512 --d 7 --l 5.5 --s 30").told == {
        "negative": "blurry, dog", "width": 640, "height": 512, "seed": 7, "guidance": 5.5, "steps": 30,
    }  # fmt: skip
    assert parse_line("a well-known cat -- and a dog").told == {}
    for line, said in {"a --s many": "takes a whole number, not 'many'", "a --ss ddim": "scheduler of sd-scripts"}.items():
        with pytest.raises(UserError, match=said):
            parse_line(line)
    (tmp_path / "a.txt").write_text("# cats\n\na cat --s 2\n  a dog\n", "utf-8")
    assert read_prompts(tmp_path / "a.txt") == ("a cat --s 2", "a dog")
    (tmp_path / "b.txt").write_text("# none\n")
    for name, said in {"b.txt": "holds none", "no.txt": "cannot be read"}.items():
        with pytest.raises(UserError, match=said):
            read_prompts(tmp_path / name)


@pytest.mark.slow
def test_each_line_is_drawn_as_it_says(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat --n dog --w 80 --d 4 --s 1\na {cat|dog|house} --l 2\na cat --h 80\n")
    drawn = made(pipe, tmp_path / "all", prompts_file=tmp_path / "p.txt", count=2, sheet=tmp_path / "sheet.png", seed=9)
    asked: list[dict[str, Any]] = [
        {"negative": "dog", "width": 80, "seed": 4, "steps": 1}, {"guidance": 2.0, "seed": 9}, {"height": 80, "seed": 9},
    ]  # fmt: skip
    for number, options in enumerate(asked):
        for column in range(2):
            one = drawn[2 * number + column]
            told = {**options, "seed": options["seed"] + column}
            (alone,) = made(pipe, tmp_path / f"{number}{column}", one.recipe.prompt, **told)
            assert difference(one, alone) < 0.1 and one.image.size == alone.image.size
            assert (one.recipe.negative, one.recipe.seed) == (told.get("negative", ""), told["seed"])
    assert (tmp_path / "sheet.png").is_file()
    with pytest.raises(UserError, match='the prompt "a cat" cannot be drawn: a negative prompt has no effect at guidance 1'):
        made(pipe, tmp_path, "a cat --n dog --l 1")


@pytest.mark.slow
def test_previews_of_a_run_are_drawn_as_their_lines_say(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    (tmp_path / "p.txt").write_text("a cat --w 80 --h 64 --s 1 --d 5\na (dog:1.2) --n cat --l 3\na {cat|cat}\n")
    asked = small(
        folder, tmp_path, missing_captions="name", preview_prompts=("a house",), preview_steps=2,
        preview_prompts_file=tmp_path / "p.txt",
    )  # fmt: skip
    pipe: Any = make_pipe()
    prepared = prepare(asked, pipe, lambda event: None, TrainingPictures())
    made = blocks(prepared.config)
    attach(selected_components(pipe, prepared.config.components), made, 0, lambda name: 1e-3)
    task = diffusion_task(prepared, made, Processes())
    told: list[Event] = []
    previews = Previews(
        tmp_path / "previews",
        task,
        prepared.prompts,
        TrainingPictures(),
        nullcontext,
        told.append,
        steps=2,
        every=0,
        size=64,
    )
    previews.draw(0)
    first, wide, weighed, drawn = (np.asarray(picture, float) for picture in told[-1].pictures)  # type: ignore[attr-defined]
    assert wide.shape[:2] == (64, 80) and first.shape == weighed.shape == drawn.shape
    common: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0}
    common["generator"] = [torch.Generator().manual_seed(seed_of(0, "preview", 3))]
    theirs = np.asarray(pipe(["a cat"], **common).images[0], float)
    assert np.abs(theirs - drawn).mean() < 0.1
    with pytest.raises(UserError, match="has a side of 72, no multiple of 16"):
        prepare(replace(asked, preview_prompts=("a cat --w 72",)), pipe, lambda event: None, TrainingPictures())
