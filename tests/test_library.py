"""A library of adapters: what is found first and why, what becomes of files that moved or changed, what strangers bring."""

import base64
import io
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import judges_of_transformers
import numpy as np
import pytest
from making import environment, make_adapter
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

import peft_diffusion as pd
from peft_diffusion.cli.app import main
from peft_diffusion.core.events import Event, Noted
from peft_diffusion.data.captions import tag_frequency
from peft_diffusion.formats.sidecars import read_sidecars
from peft_diffusion.generation import recipe
from peft_diffusion.generation.asked import order
from peft_diffusion.generation.retrieval import retrieval
from peft_diffusion.library import Library
from peft_diffusion.library import library as libraries
from peft_diffusion.library.encoder import floor_of, near_texts
from peft_diffusion.library.entries import files_in, lead_of, read_entry
from peft_diffusion.library.events import Chosen
from peft_diffusion.library.ranking import LEAST, Snapshot
from peft_diffusion.library.terms import terms_of
from peft_diffusion.library.word_vectors import WordVectors
from peft_diffusion.library.words import COLUMNS

SD1 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"


def adapter(
    path: Path, told: Mapping[str, str] | None = None, *, width: int = 768, site: str = SD1, seed: int | None = None
) -> Path:
    """A LoRA of one layer, as kohya's trainer writes it; its bytes differ with its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(path.name.encode()) if seed is None else seed)
    shapes = {"lora_down.weight": (2, width), "lora_up.weight": (320, 2), "alpha": ()}
    tensors = {f"{site}.{name}": np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}
    save_file(tensors, path, dict(told or {}))
    return path


def tags(*captions: str) -> dict[str, str]:
    """Metadata as kohya's trainer writes them of so many captions."""
    return {"ss_tag_frequency": json.dumps(tag_frequency(captions))}


ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow")


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Four adapters whose files tell what they are."""
    folder = tmp_path / "shelf"
    adapter(folder / "a1.safetensors", tags(*(f"a pencil drawing of a {one}" for one in ANIMALS)))
    adapter(folder / "b2.safetensors", tags(*(f"{one}, pixel art, 8-bit" for one in ANIMALS)))
    adapter(folder / "c3.safetensors", {"modelspec.trigger_phrase": "zkw style"} | tags("a cat", "a red car", "an old man"))
    adapter(folder / "d4.safetensors", tags(*(f"a watercolor of a {one} at the sea" for one in ("ship", "boat", "gull"))))
    return folder


@pytest.fixture
def library(tmp_path: Path, shelf: Path) -> Library:
    made = Library(tmp_path / "data" / "library.sqlite3")
    made.add([shelf])
    return made


def names(library: Library, query: str, **how: Any) -> list[str]:
    return [one.entry.name for one in library.search(query, **how)]


# What is found, and why.


@pytest.mark.parametrize("words_only", (True, False))
def test_known_words_are_found_first(library: Library, words_only: bool) -> None:
    expected = {
        "a pencil drawing of a cat": "a1",
        "Pencil DRAWINGS": "a1",
        "an owl in pixel art": "b2",
        "a castle, zkw style": "c3",
        "a watercolor of gulls": "d4",
        "a1": "a1",
    }
    assert {query: names(library, query, words_only=words_only)[0] for query in expected} == expected


def test_reasons_are_told(library: Library) -> None:
    first = library.search("a pencil drawing of a cat, zkw style")
    by_name = {one.entry.name: one for one in first}
    assert by_name["c3"].called and by_name["c3"].score >= 0.8
    assert by_name["c3"].because[0] == 'the prompt has its trigger "zkw style"'
    assert "pencil, drawing (calls it)" in by_name["a1"].because
    assert "cat (in its captions and description)" in by_name["a1"].because
    assert any(line.startswith("near ") for line in by_name["a1"].because)


def test_meaning_is_found_where_no_word_matches(tmp_path: Path, shelf: Path) -> None:
    adapter(shelf / "e5.safetensors", tags("a house", "the house", "houses"))
    with Library(tmp_path / "more.sqlite3") as library:
        library.add([shelf])
        assert names(library, "home", words_only=True) == []
        (first, *_) = library.search("home")
        assert first.entry.name == "e5" and first.words == 0 and first.meaning > 0.1
        assert first.because[0].startswith("near what it shows")


def test_unlike_texts_are_not_near_to_an_encoder_that_hardly_tells_texts_apart() -> None:
    one = np.repeat(np.array([[1.0], [-1.0]], np.float32), 16, 0)  # all texts are the same or opposite: mean 0, deviation 1
    encoder = WordVectors()
    encoder.floor = floor_of(one)
    near = near_texts(encoder, np.array([1.0, 0.9, 0.0, -1.0], np.float32), np.ones(4, np.float32))
    assert near.tolist() == pytest.approx([encoder.trust, 0, 0, 0])


def test_only_adapters_for_the_base_are_found_and_the_others_counted(tmp_path: Path) -> None:
    told = tags("ink drawing of a cat")
    adapter(tmp_path / "one.safetensors", told)
    adapter(tmp_path / "xl.safetensors", told, width=2048)
    adapter(tmp_path / "flux.safetensors", told, site=FLUX)
    adapter(tmp_path / "silent.safetensors", told, site="lora_unet_down_blocks_0_attentions_0_proj_in")
    with Library(tmp_path / "library.sqlite3") as library:
        library.add([tmp_path])
        said: list[Event] = []
        assert names(library, "ink drawing", base="sd1", observers=[said.append]) == ["one"]
        assert [line for one in said for line in one.lines()] == [
            "3 more would be found, but do not fit the base, or do not tell theirs"
        ]
        assert names(library, "ink drawing", base="sdxl") == ["xl"] and len(names(library, "ink drawing")) == 4
        assert names(library, "ink drawing", base="icons") == []
        with pytest.raises(pd.UserError, match="there is no base 'sd7'"):
            library.search("ink", base="sd7")


def test_words_are_scored_by_bm25(library: Library) -> None:
    query = terms_of("a pencil drawing of a red cat and a ship")
    snapshot = Snapshot(library._store)
    columns = library._store.columns([int(number) for number in snapshot.places])
    lengths = {number: sum(len(text.split()) for text in texts) for number, texts in columns.items()}
    usual = sum(lengths.values()) / len(lengths)
    found, most = dict.fromkeys(columns, 0.0), 0.0
    for term in query:
        having = sum(any(term in text.split() for text in texts) for texts in columns.values())
        idf = math.log(1 + (4 - having + 0.5) / (having + 0.5))
        most += idf
        for number, texts in columns.items():
            count = sum(weight * text.split().count(term) for (_, weight), text in zip(COLUMNS, texts, strict=True))
            found[number] += idf * count / (count + 1.2 * (0.25 + 0.75 * lengths[number] / usual))
    expected = [found[int(number)] / most for number in snapshot.places]
    assert np.allclose(snapshot.index.scores(query), expected, rtol=1e-5) and max(expected) > 0.1


def test_terms_are_of_any_script() -> None:
    assert terms_of("Two red-haired Girls, a Café; ponies_and dresses <lora:cat:1>") == (
        *("two", "red", "haired", "girl", "cafe", "pony", "dresse"),
    )
    assert terms_of("水彩 한") == ("水", "彩", "한") and terms_of("the of") == ()


# Files of others.


def test_tags_of_kohya_tell_what_an_adapter_shows(tmp_path: Path) -> None:
    frequency = {"10_sks girl": {"sks girl": 40, "blue hair": 38, "smile": 3}, "5_more": {"sks girl": 5}}
    path = adapter(tmp_path / "k.safetensors", {"ss_tag_frequency": json.dumps(frequency), "ss_output_name": "my_girl"})
    entry = read_entry(path)
    assert entry.tags["sks girl"] == 45 and entry.title == "my_girl" and entry.families == ("sd1",)
    assert set(entry.shown()) == {"sks", "girl", "blue", "hair"} and entry.trigger == ""
    with Library(tmp_path / "library.sqlite3") as library:
        library.add([path])
        assert library.search("a girl with blue hair")[0].score > library.search("a smile")[0].score > 0


def test_what_stands_beside_is_read(tmp_path: Path) -> None:
    path = adapter(tmp_path / "n.safetensors", site="lora_unet_down_blocks_0_attentions_0_proj_in")
    told = {
        "name": "v1.2",
        "model": {"name": "Neon Night", "tags": ["style", "cyberpunk"], "description": "<p>Neon &amp; rain <b>city</b></p>"},
        "trainedWords": ["neonpunk <lora:n:1>, rainy street", 7],
        "baseModel": "SDXL 1.0",
        "images": [{"url": "https://example.com/a.png", "meta": {"prompt": "neonpunk alley with puddles"}}, {"meta": None}],
    }
    path.with_suffix(".civitai.info").write_text(json.dumps(told))
    own = {"activation text": "npk", "preferred weight": 0.7, "sd version": "SDXL"}
    path.with_suffix(".json").write_text(json.dumps(own))
    picture = PngImagePlugin.PngInfo()
    picture.add_text("parameters", "npk taxi in fog\nNegative prompt: day\nSteps: 20, Sampler: Euler")
    Image.new("RGB", (8, 8)).save(path.with_name("n.preview.png"), pnginfo=picture)
    entry = read_entry(path)
    assert entry.title == "Neon Night" and entry.description == "Neon & rain city"
    assert entry.triggers == ("npk", "neonpunk , rainy street") and entry.trigger == "npk"
    assert entry.families == ("sdxl",) and entry.strength == 0.7 and entry.notes == ()
    assert entry.captions == ("neonpunk alley with puddles", "npk taxi in fog") and len(entry.examples) == 1
    with Library(tmp_path / "library.sqlite3") as library:
        library.add([path])
        chosen = library.choose("a taxi, neonpunk", 1, base="sdxl")
        assert chosen.found[0].called and 0.28 <= chosen.found[0].strength <= 0.7
        assert names(library, "cyberpunk puddles") == ["n"]


def test_what_strangers_bring_is_told_and_limited(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        adapter(tmp_path / f"{name}.safetensors")
    (tmp_path / "a.json").write_bytes(b"{" + b" " * 2**22 + b"}")
    (tmp_path / "b.civitai.info").write_text("[" * 100_000)
    (tmp_path / "c.json").write_text(json.dumps({"preferred weight": 1e9, "activation text": ["x"], "description": 3}))
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + b"\0" * 4
    (tmp_path / "d.png").write_bytes(header)
    (tmp_path / "old.pt").write_bytes(b"pickle")
    save_file({"model.diffusion_model.x": np.zeros(1, np.float32)}, tmp_path / "whole.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 20)
    with Library(tmp_path / "library.sqlite3") as library:
        made = library.add([tmp_path], encoder="none")
    text = "\n".join(made.lines())
    assert len(made.added) == 4 and len(made.left_out) == 3 and made.encoder == "none"
    for part in ("a.json has 4,194,306 bytes", "b.civitai.info is not read", "1e+09 is no strength", "d.png is not read"):
        assert part in text
    for part in ("old.pt is no safetensors file", "whole.safetensors is a checkpoint", "torn.safetensors"):
        assert part in text
    assert read_sidecars(tmp_path / "c.safetensors").triggers == ()


def test_a_folder_without_adapters_is_told(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "._ink.safetensors").touch()
    for folder in (tmp_path, tmp_path / "pictures"):
        assert files_in([folder]) == ([], [(folder, "holds no safetensors file")])
    (tmp_path / "pictures" / "ink.safetensors").touch()
    assert files_in([tmp_path]) == ([tmp_path / "pictures" / "ink.safetensors"], [])


def test_what_captions_begin_with_calls_an_adapter() -> None:
    captions = [f"openmoji emoji of {'an' if one[0] == 'o' else 'a'} {one}" for one in ANIMALS]
    assert lead_of(dict.fromkeys(captions, 1)) == "openmoji emoji of {}"
    assert lead_of({f"a {one}": 1 for one in ANIMALS}) == "" == lead_of({"ink of a cat": 2})
    assert lead_of({**{f"ink of {one}": 1 for one in ANIMALS}, "a photo": 3}) == ""


# What becomes of files.


def test_what_is_as_it_was_is_not_read_again(library: Library, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def reading(path: Path, sha256: str | None = None) -> Any:
        read.append(path)
        return read_entry(path, sha256)

    monkeypatch.setattr(libraries, "read_entry", reading)
    assert library.add([shelf]).unchanged == 4 and read == []
    os.utime(shelf / "a1.safetensors", (1, 1))
    again = library.add([shelf])
    assert again.unchanged == 4 and read == [shelf / "a1.safetensors"] and not again.changed
    (shelf / "b2.json").write_text(json.dumps({"activation text": "bit8"}))
    assert library.add([shelf]).changed == (shelf / "b2.safetensors",) and names(library, "bit8")[0] == "b2"
    assert len(library) == 4


def test_moved_changed_copied_and_gone_files_are_told(library: Library, shelf: Path) -> None:
    (shelf / "a1.safetensors").rename(shelf / "moved.safetensors")
    shutil.copy(shelf / "b2.safetensors", shelf / "copy.safetensors")
    adapter(shelf / "c3.safetensors", tags("a tin toy"), seed=5)
    (shelf / "d4.safetensors").unlink()
    assert [one.status for one in library.entries()] == ["missing", "", "changed", "missing"]
    before = {one.entry.name: one.status for one in library.search("a watercolor in pencil, zkw style")}
    assert before["d4"] == "missing" and before["c3"] == "changed"
    chosen = library.choose("a watercolor of a ship at the sea", 1)
    assert chosen.found == () and "d4.safetensors is meant, but is not there any more" in chosen.message
    assert "was changed since it was added" in library.choose("zkw style", 1).message
    made = library.add([shelf])
    assert made.moved == {shelf / "moved.safetensors": shelf / "a1.safetensors"}
    assert made.copies == {shelf / "copy.safetensors": shelf / "b2.safetensors"}
    assert made.changed == (shelf / "c3.safetensors",) and made.gone == (shelf / "d4.safetensors",)
    assert len(library) == 4 and names(library, "a tin toy")[0] == "c3" and names(library, "pencil")[0] == "moved"
    assert [one.name for one in library.remove(missing=True)] == ["d4"] and len(library) == 3
    with pytest.raises(pd.UserError, match="no adapter 'movd'; did you mean 'moved'"):
        library.remove(["movd"])
    assert len(library.remove([shelf])) == 3 and library.search("pencil") == []


def test_files_that_are_no_library_are_refused(tmp_path: Path) -> None:
    torn, other, newer = (tmp_path / name for name in ("torn.sqlite3", "other.sqlite3", "newer.sqlite3"))
    torn.write_bytes(b"no database at all, and long enough to be seen as none" * 40)
    for path, line in ((other, "CREATE TABLE x (y)"), (newer, "PRAGMA user_version = 99")):
        with sqlite3.connect(path) as base:
            base.execute("CREATE TABLE z (y)")
            base.execute(line)
    for path, said in ((torn, "is no library, or is damaged"), (other, "another program"), (newer, "newer peft_diffusion")):
        with pytest.raises(pd.UserError, match=said):
            Library(path)
    with pytest.raises(pd.UserError, match="there is no library"):
        Library(tmp_path / "none.sqlite3", make=False)
    with pytest.raises(pd.UserError, match="there is no encoder 'nowhere'"), Library(tmp_path / "new.sqlite3") as library:
        library.add([], encoder="nowhere")


def test_another_encoder_embeds_all_anew_and_none_goes_by_words(library: Library) -> None:
    said: list[Event] = []
    assert library.add(encoder="none", observers=[said.append]).embedded == 0
    assert "embedded anew, by none" in "".join(line for one in said for line in one.lines())
    assert all(one.meaning == 0 for one in library.search("a pencil drawing"))
    assert library.add(encoder="icons").embedded == 4 and library.search("a pencil drawing")[0].meaning > 0


@pytest.mark.slow
def test_clip_sees_example_pictures(tmp_path: Path, shelf: Path) -> None:
    folder = judges_of_transformers.clip(tmp_path / "clip")
    Image.new("RGB", (40, 40), "red").save(shelf / "a1.png")
    data = io.BytesIO()
    Image.new("RGB", (40, 40), "blue").save(data, "JPEG")
    thumbnail = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    adapter(shelf / "e5.safetensors", {"modelspec.thumbnail": thumbnail})
    with Library(tmp_path / "seen.sqlite3") as library:
        made = library.add([shelf], encoder=str(folder))
        assert made.sees and made.embedded == 5 and made.notes == ()
        kinds = [[label[0] for label in json.loads(row[0])] for row in library._store.rows("SELECT labels FROM vectors")]
        assert ["picture" in one for one in kinds] == [True, False, False, False, True]
        found = library.search("a red picture", limit=5)
        assert all(0 <= one.meaning <= 1 for one in found)


# Drawing.


def test_adapters_are_chosen_with_their_triggers(library: Library, shelf: Path) -> None:
    chosen = library.choose("a cat in pencil", 2)
    assert [one.entry.name for one in chosen.found] == ["a1"] and 0.4 <= chosen.found[0].strength < 1
    assert chosen.prompt == "a pencil drawing of a cat in pencil"
    both = library.choose("a pencil drawing of a cat, zkw style", 2)
    assert {one.entry.name for one in both.found} == {"a1", "c3"} and both.added == ()
    assert both.prompt == "a pencil drawing of a cat, zkw style"
    assert library.choose("zkw style", 2, without=[shelf / "c3.safetensors"]).found == ()
    nothing = library.choose("quantum chromodynamics", 2)
    assert nothing.found == () and "no adapter of the library is meant" in nothing.message
    adapter(shelf / "c4.safetensors", {"modelspec.trigger_phrase": "zkw style"})
    library.add([shelf])
    assert "it has the triggers of" in library.choose("zkw style", 2).message


def test_prompts_of_a_sheet_have_the_same_adapters_those_that_any_asks_for_most(library: Library) -> None:
    prompts = ["a cat in pencil", "zkw style of a car", "quantum chromodynamics"]
    first, second, third = library.choose_together(prompts, 2)
    assert [one.entry.name for one in (*first.found, *second.found)] == ["a1", "c3"] and third.found == ()
    assert first.every == second.every == third.every and second.every[0].entry.name == "c3"
    assert [one.prompt for one in (first, second, third)] == [
        "zkw style, pencil drawing, a cat in pencil", "pencil drawing, zkw style of a car",
        "zkw style, pencil drawing, quantum chromodynamics",
    ]  # fmt: skip
    alone = library.choose_together(prompts, 1)
    assert [[one.entry.name for one in chosen.every] for chosen in alone] == [["c3"]] * 3
    assert "a1.safetensors" in alone[0].message and "is not taken: others are asked for more, and 1 are" in alone[0].message
    assert "which another prompt asks for more" in alone[2].message


def test_what_a_region_names_is_not_chosen_for_the_whole_picture(library: Library, shelf: Path) -> None:

    def chosen(region: pd.Region) -> list[str]:
        config = pd.GenerateConfig(
            "a pencil drawing of a cat", auto=1, library=library.path, base="sd1", adapters_dir=shelf, region=[region]
        )
        with retrieval(config, None, (), lambda event: None, used=True) as used:
            ((one,),) = order(config, (), literal=False, retrieval=used).rows
        return [Path(tag.name).stem for tag in one.tags]

    half = (0.0, 0.0, 0.5, 1.0)
    assert chosen(pd.Region(box=half)) == ["a1"]
    assert chosen(pd.Region(box=half, adapter=os.path.relpath(shelf / "a1.safetensors"))) == []
    assert chosen(pd.Region(box=half, prompt="a dog <lora:a1:0.5>")) == []


@pytest.mark.slow
def test_generate_chooses_by_prompt_and_its_picture_is_made_again(tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    make_adapter(folder / "cats.safetensors", tiny_base, 1, ("inkcat",))
    make_adapter(folder / "cars.safetensors", tiny_base, 2, ("boldcar",))
    place = tmp_path / "library.sqlite3"
    with Library(place) as library:
        library.add([folder])
    told: list[Event] = []
    prompts, out = ("a inkcat", "a boldcar", "a tree"), tmp_path / "out"
    config = pd.GenerateConfig(prompts=prompts, auto=1, library=place, base=str(tiny_base), steps=1, output=out)
    pictures = pd.generate(config, observers=[told.append])
    strengths = [{Path(one.path).stem: one.strength for one in made.recipe.adapters} for made in pictures]
    assert strengths[0]["cats"] >= 0.4 and strengths[0]["cars"] == 0 and strengths[1]["cars"] >= 0.4
    assert strengths[1]["cats"] == 0 and not any(strengths[2].values())
    assert [one.found[0].entry.name if one.found else "" for one in told if isinstance(one, Chosen)] == ["cats", "cars", ""]
    again = tmp_path / "again.png"
    flags = ["generate", "--recipe", pictures[0].path, "--base", tiny_base, "--output", again]
    assert main([str(one) for one in flags]) == 0
    assert apart(Image.open(again), pictures[0].image) <= 1 < apart(pictures[1].image, pictures[0].image)  # it had company
    assert recipe.read(again).adapters == pictures[0].recipe.adapters
    with pytest.raises(pd.UserError, match="--library is where --auto finds adapters"):
        pd.GenerateConfig(prompts="a cat", library=place).check()
    with pytest.raises(pd.UserError, match="leave --auto away"):
        pd.GenerateConfig(auto=1, recipe=again)
    with pytest.raises(pd.UserError, match="there is no library"):
        pd.GenerateConfig(prompts="a cat", auto=1, library=tmp_path / "none.sqlite3").check()


def apart(one: Image.Image, other: Image.Image) -> int:
    """By how much bytes differ at most; what is drawn in another batch is rounded otherwise."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.slow
def test_sheets_choose_by_prompt_and_their_pictures_are_made_again_without_the_library(
    tmp_path: Path, tiny_base: Path, tiny_pipe: Any
) -> None:
    folder, place = tmp_path / "mine", tmp_path / "library.sqlite3"
    folder.mkdir()
    for seed, word in enumerate(("ink", "car")):
        make_adapter(folder / f"{word}.safetensors", tiny_base, seed, (word,), size=0.5)
    with Library(place) as library:
        library.add([folder])
    common: dict[str, Any] = {"auto": 2, "library": place, "steps": 2, "device": "cpu"}
    prompts = ("a inkcat ink", "a car")
    told: list[Event] = []
    config = pd.BlendConfig(prompts, columns=2, plain=True, output=tmp_path / "blend.png", **common)
    drawn = pd.blend(config, pipe=tiny_pipe, observers=[told.append])
    chosen = [one for one in told if isinstance(one, Chosen)]
    assert [[found.entry.name for found in one.found] for one in chosen] == [["ink"], ["car"]]
    assert [[Path(one.path).stem for one in cell.adapters] for cell in sum(drawn.recipes, ())] == [["car"], ["ink"]] * 2
    assert [row[0].prompt for row in drawn.recipes] == ["car, a inkcat ink", "ink, a car"]
    assert [row[0].written for row in drawn.recipes] == list(prompts)
    assert not [one for one in told if isinstance(one, Noted) and "does not contain" in one.message]

    told.clear()
    config_of_grid = pd.GridConfig(prompts[0], x="replace=ink,car", y="auto=none,1", output=tmp_path / "grid.png",
                                   **{**common, "auto": None})  # fmt: skip
    sheet = pd.grid(config_of_grid, pipe=tiny_pipe, observers=[told.append])
    strengths = [[{Path(a.path).stem: a.strength for a in cell.adapters} for cell in row] for row in sheet.recipes]
    assert strengths[0] == [{}, {}] and strengths[1][0].keys() == {"ink"} and strengths[1][1].keys() == {"car"}
    assert len([one for one in told if isinstance(one, Chosen)]) == 2
    (alone,) = pd.generate(
        pd.GenerateConfig("a carcat car", output=tmp_path / "alone.png", **{**common, "auto": 1}), pipe=tiny_pipe
    )
    assert sheet.recipes[1][1] == alone.recipe and apart(sheet.pictures[1][1], alone.image) <= 1

    place.unlink()
    for picture, one in ((drawn.pictures[1][0], drawn.recipes[1][0]), (sheet.pictures[1][0], sheet.recipes[1][0])):
        recipe.write(tmp_path / "one.png", picture, one)
        again = pd.GenerateConfig(recipe=tmp_path / "one.png", output=tmp_path / "again.png", device="cpu")
        assert apart(pd.generate(again, pipe=tiny_pipe)[0].image, picture) <= 1 < apart(picture, sheet.pictures[0][0])


@pytest.mark.slow
def test_a_sheet_of_blends_needs_two_adapters_with_those_that_are_chosen(
    tmp_path: Path, tiny_base: Path, tiny_pipe: Any
) -> None:
    file, place = make_adapter(tmp_path / "ink.safetensors", tiny_base, 1, ("ink",)), tmp_path / "library.sqlite3"
    with Library(place) as library:
        library.add([file])
    common: dict[str, Any] = {"library": place, "steps": 1, "device": "cpu", "output": tmp_path / "a.png"}
    with pytest.raises(pd.UserError, match="--auto 2 chooses two"):
        pd.BlendConfig("a cat", auto=1, **common)
    for prompt, there in (("a house", "there is none"), ("ink", r"there is .*ink\.safetensors alone")):
        with pytest.raises(pd.UserError, match=there):
            pd.blend(pd.BlendConfig(prompt, auto=2, **common), pipe=tiny_pipe)
    with pytest.raises(pd.UserError, match="--library is where --auto finds adapters"):
        pd.GridConfig("a cat", **common).check()


@pytest.mark.slow
def test_commands_tell_all_and_import_no_torch(tmp_path: Path, shelf: Path) -> None:
    lines = [
        ["library", "add", str(shelf)],
        ["library", "search", "a pencil drawing of a cat", "--base", "sd1"],
        ["library", "search", "pencil", "--words", "--json"],
        ["library", "list"],
        ["library", "remove", "a1"],
        ["library", "search", "--help"],
    ]
    code = f"""
import sys
from peft_diffusion.cli.app import main
codes = [main(words) for words in {lines!r}]
assert codes == [0] * len(codes), codes
assert "torch" not in sys.modules, "torch was imported"
"""
    home = {**environment(), "XDG_DATA_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], env=home, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "peft-diffusion" / "library.sqlite3").is_file()
    for part in ("4 added; 4 adapters in all", "pencil, drawing (calls it)", '"status": "there"', "taken out: "):
        assert part in done.stdout
    assert main(["library", "search", "x", "--library", str(tmp_path / "none")]) == 1


def test_scores_are_answers_between_0_and_1(library: Library) -> None:
    for found in library.search("a pencil drawing of a cat, zkw style, pixel art, watercolor", limit=4):
        assert 0 <= found.words <= 1 and 0 <= found.meaning <= 1 and found.score <= 1 and 0.4 <= found.strength <= 1
    assert 0 < LEAST < 1
