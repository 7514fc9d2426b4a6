"""Captions that are written, changed and counted, by the command, with tiny models of the true architectures."""

import json
from pathlib import Path

import captioners
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoProcessor,
    BlipForConditionalGeneration,
    Florence2ForConditionalGeneration,
    ViTImageProcessor,
)

from peft_diffusion.cli.app import main
from peft_diffusion.core.errors import UserError
from peft_diffusion.data import captioning
from peft_diffusion.data.caption_edits import replaced
from peft_diffusion.data.caption_models import squared
from peft_diffusion.data.caption_settings import CaptionConfig

COLOURS = {"a.png": (200, 30, 30), "b.jpg": (20, 40, 220), "deep/c.png": (10, 10, 10)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures without captions, of which one lies deeper."""
    root = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(root / name)
    return root


def texts(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in sorted(root.rglob("*.txt"))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip", "blip with words", "florence"])
def test_sentences_are_what_transformers_writes(kind: str, tmp_path: Path, folder: Path) -> None:
    said = {"blip": None, "blip with words": "a red", "florence": "<CAPTION>"}[kind]
    made = (captioners.florence if kind == "florence" else captioners.blip)(tmp_path / "model")
    flags = [] if said is None else ["--prompt", said]
    assert main(["caption", str(folder), "--model", str(made), "--max-tokens", "6", "--batch-size", "2", *flags]) == 0
    architecture = Florence2ForConditionalGeneration if kind == "florence" else BlipForConditionalGeneration
    model, processor = architecture.from_pretrained(made), AutoProcessor.from_pretrained(made)
    for name in COLOURS:
        inputs = processor(images=Image.open(folder / name).convert("RGB"), text=said, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, num_beams=3)
        want = processor.batch_decode(tokens, skip_special_tokens=True)[0]
        assert want.strip() and (folder / name).with_suffix(".txt").read_text("utf-8") == f"{want.strip()}\n"
    assert sorted(path.suffix for path in folder.rglob("*") if path.is_file()) == [".jpg", ".png", ".png"] + [".txt"] * 3


@pytest.mark.slow
def test_tags_are_those_that_a_wd_tagger_is_sure_of(tmp_path: Path, folder: Path) -> None:
    """A list of tags beside the model makes it one of SmilingWolf's: squares on white, BGR, sigmoid, ratings left out."""
    rows = ["general,9", "1girl,0", "red_hat,0", "^_^,0", "mira_(game),4", "blue,0", "night,0"]
    names = {number: f"LABEL_{number}" for number in range(len(rows))}
    made = captioners.tagger(tmp_path / "model", names)
    (made / "selected_tags.csv").write_text("name,category\n" + "\n".join(rows))
    model, processor = AutoModelForImageClassification.from_pretrained(made), ViTImageProcessor.from_pretrained(made)
    picture = squared(Image.open(folder / "a.png"))
    assert picture.size == (40, 40) and picture.getpixel((0, 0)) == (255, 255, 255)
    blue_first = Image.merge("RGB", picture.split()[::-1])
    with torch.no_grad():
        sure = model(**processor(images=blue_first, return_tensors="pt")).logits.sigmoid()[0]
    threshold = sorted(sure[[1, 2, 3, 5, 6]].tolist())[2] - 1e-4  # three of the plain tags
    shown = [row.partition(",")[0] for row in rows]
    plain = sorted((number for number in (1, 2, 3, 5, 6) if sure[number] >= threshold), key=lambda number: -sure[number])
    want = ["mira (game)", *(shown[number].replace("d_h", "d h") for number in plain)]
    command = ["caption", str(folder), "--model", str(made), "--character-threshold", "0"]
    assert main([*command, "--threshold", str(threshold)]) == 0
    assert (folder / "a.txt").read_text() == ", ".join(want) + "\n"
    assert main([*command, "--threshold", "0", "--exclude", "Red_Hat", "--exclude", "night", "--overwrite"]) == 0
    tags = (folder / "a.txt").read_text().strip().split(", ")
    assert tags[0] == "mira (game)" and sorted(tags[1:]) == ["1girl", "^_^", "blue"]


@pytest.mark.slow
def test_a_classifier_of_one_kind_each_tells_its_label(tmp_path: Path, folder: Path) -> None:
    made = captioners.tagger(tmp_path / "model", {0: "a cat", 1: "a dog", 2: "a hat"}, several=False)
    model, processor = AutoModelForImageClassification.from_pretrained(made), ViTImageProcessor.from_pretrained(made)
    with torch.no_grad():
        sure = model(**processor(images=Image.open(folder / "a.png"), return_tensors="pt")).logits.softmax(-1)[0]
    best = int(sure.argmax())
    flags = ["--threshold", str(float(sure[best]) - 1e-4)]
    assert main(["caption", str(folder), "--model", str(made), *flags]) == 0
    assert (folder / "a.txt").read_text() == f"{model.config.id2label[best]}\n"


@pytest.mark.slow
def test_captions_that_are_there_stay(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = captioners.tagger(tmp_path / "model", {0: "cat", 1: "hat"})
    (folder / "a.txt").write_text("mine")
    (folder / "deep" / "c.caption").write_text("")  # blank, and there
    (folder / "metadata.jsonl").write_text('{"file_name": "b.jpg", "text": "of metadata"}')
    command = ["caption", str(folder), "--model", str(made), "--threshold", "0"]
    assert main(command) == 0
    assert texts(folder) == {"a.txt": "mine"} and "kept 3 captions (--overwrite replaces them)" in capsys.readouterr().out
    assert main([*command, "--overwrite"]) == 0
    assert set(texts(folder)) == {"a.txt", "b.txt"} and "mine" not in texts(folder)["a.txt"]
    assert "cat" in (folder / "deep" / "c.caption").read_text()
    for nothing in ("", "0.99"):
        (folder / "a.txt").write_text("mine")
        assert main([*command[:-1], nothing or "1", "--overwrite"]) == 0
        assert "no words for 3 pictures" in capsys.readouterr().out and texts(folder)["a.txt"] == "mine"


@pytest.mark.parametrize(
    ("caption", "find", "replacement", "want"),
    [
        ("a cat, category", "cat", "dog", "a dog, category"),
        ("1girl, red hat,  blue", "red hat", "", "1girl, blue"),
        ("a cat\nno  dogs", "cat", "bird", "a bird\nno  dogs"),
        ("smile, :)", ":)", "laughing", "smile, laughing"),
        ("Cat", "cat", "dog", "Cat"),
        (r"a \1", "a", r"\g<0>", r"\g<0> \1"),
    ],
)
def test_whole_words_are_replaced(caption: str, find: str, replacement: str, want: str) -> None:
    assert replaced(caption, find, replacement) == want


@pytest.mark.slow
def test_edits_and_statistics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_text("1girl, red hat, solo\n")
    (folder / "b.caption").write_bytes("1girl, café, red hat".encode("cp1252"))
    (folder / "LICENSE.txt").write_text("1girl")
    (folder / "masks").mkdir()
    before = (folder / "a.txt").stat().st_ino
    assert main(["caption", str(folder), "--edit", "solo=", "--edit", "red hat=scarf = old", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (folder / "a.txt").read_text() == "1girl, scarf = old\n" and (folder / "a.txt").stat().st_ino != before
    assert (folder / "b.caption").read_text("utf-8") == "1girl, café, scarf = old\n"
    assert (folder / "LICENSE.txt").read_text() == "1girl"
    assert told["tags"] == {"1girl": 2, "scarf = old": 2, "café": 1} and next(iter(told["tags"])) == "1girl"
    assert told["pictures"] == 3 and told["captions"] == 2 and told["without_caption"] == [str(folder / "deep/c.png")]
    assert main(["caption", str(folder), "--stats"]) == 0
    shown = capsys.readouterr().out
    assert (
        "2 of 3 pictures have captions" in shown and "     2  100%  scarf = old" in shown and f"{folder}/deep/c.png" in shown
    )


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], "nothing is asked for: give --model"),
        (["--edit", "cat"], "--edit 'cat': give what is found"),
        (["--model", "nowhere"], "there is no model 'nowhere': neither a folder nor a hub id"),
        (["--stats", "--prompt", "a"], "--prompt is for --model alone"),
    ],
)
def test_what_cannot_be_done_is_told(flags: list[str], want: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", str(folder), *flags]) == 1
    assert want in capsys.readouterr().err


@pytest.mark.slow
def test_folders_of_other_models_are_told(tmp_path: Path, folder: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    for config, want in (
        (None, "holds no config.json"),
        ("{", "cannot be read"),
        ('{"model_type": "gpt2"}', "is a gpt2, which does not describe pictures"),
        ('{"model_type": "blip"}', "cannot be read"),
    ):
        if config is not None:
            (place / "config.json").write_text(config)
        with pytest.raises(UserError, match=want):
            captioning.caption(CaptionConfig(folder, model=str(place)))
    listed = captioners.tagger(tmp_path / "tagger", {0: "a", 1: "b"})
    for text, want in (("tag,count\na,1\n", "needs the columns name and category"), ("name,category\na,0\n", "has 1 tags")):
        (listed / "selected_tags.csv").write_text(text)
        with pytest.raises(UserError, match=want):
            captioning.caption(CaptionConfig(folder, model=str(listed)))
    assert not texts(folder)
