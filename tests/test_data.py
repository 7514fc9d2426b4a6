"""Image folders, captions, buckets and caches, on real files made for each test."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageCms, PngImagePlugin

from peft_diffusion.core.errors import UserError
from peft_diffusion.data import borders, buckets, captions, latents
from peft_diffusion.data.caption_files import name_captions
from peft_diffusion.data.folder import CaptionSource, ImageFolder, TrainingImage, open_picture, scan
from peft_diffusion.data.picture_formats import Carried, format_of
from peft_diffusion.data.problems import PictureError

REPOSITORY = Path(__file__).parent.parent


def draw(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, **options: Any) -> Path:
    """A smooth picture that JPEG keeps well: no two seeds or sizes give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    low = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def kinds(folder: ImageFolder) -> list[str]:
    return sorted(problem.kind for problem in folder.problems)


def texts(folder: ImageFolder) -> dict[str, str]:
    return {picture.name: picture.caption for picture in folder.pictures}


def close(image: Image.Image, place: tuple[int, int], colour: tuple[int, int, int], tolerance: int = 6) -> bool:
    return bool(np.abs(np.array(image, dtype=int)[place[1], place[0]] - colour).max() <= tolerance)


# Opening


def test_scanning_modules_do_not_import_torch() -> None:
    code = "import sys, peft_diffusion.data.folder, peft_diffusion.data.captions, peft_diffusion.data.buckets; "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=False, cwd=REPOSITORY)
    assert done.returncode == 0


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "JPG"])
def test_formats_open_alike(tmp_path: Path, suffix: str) -> None:
    want = np.array(Image.open(draw(tmp_path / "truth.png", seed=3)), dtype=float)
    path = draw(tmp_path / "pictures" / f"a.{suffix}", seed=3)
    opened = open_picture(path)
    assert opened.mode == "RGB"
    assert np.abs(np.array(opened) - want).mean() < 12
    assert [picture.name for picture in scan(path.parent).pictures] == [path.name]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The upright picture has red at the top left, green at the top right and blue at the bottom left."""
    upright = Image.new("RGB", (48, 32), "white")
    for colour, box in {(255, 0, 0): (0, 0, 16, 16), (0, 255, 0): (32, 0, 48, 16), (0, 0, 255): (0, 16, 16, 32)}.items():
        upright.paste(colour, box)
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality: dict[str, Any] = {} if suffix in ("png", "tiff") else {"quality": 95}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **quality)
    opened = open_picture(tmp_path / f"a.{suffix}")
    assert opened.size == (48, 32)
    assert close(opened, (4, 4), (255, 0, 0), 40)
    assert close(opened, (44, 4), (0, 255, 0), 40)
    assert close(opened, (4, 28), (0, 0, 255), 40)
    [picture] = scan(tmp_path, missing="empty").pictures
    assert (picture.width, picture.height) == (48, 32)


def test_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", exif=b"Exif\0\0not a TIFF header at all")
    assert len(scan(tmp_path).pictures) == 1


def test_alpha_lies_on_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    half.save(tmp_path / "half.webp", lossless=True)
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey.png")
    assert close(open_picture(tmp_path / "clear.png"), (0, 0), (255, 255, 255), 0)
    assert close(open_picture(tmp_path / "clear.png", "#102030"), (0, 0), (16, 32, 48), 0)
    assert close(open_picture(tmp_path / "half.webp"), (0, 0), (127, 127, 127), 2)
    assert close(open_picture(tmp_path / "grey.png", "red"), (0, 0), (255, 0, 0), 0)
    with pytest.raises(UserError, match=r"whiteish.*#rrggbb"):
        open_picture(tmp_path / "clear.png", "whiteish")


def test_palettes(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 128, 255])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "clear.gif", transparency=1)
    assert close(open_picture(tmp_path / "plain.png"), (0, 0), (0, 128, 255), 0)
    assert close(open_picture(tmp_path / "clear.png"), (0, 0), (255, 255, 255), 0)
    assert close(open_picture(tmp_path / "clear.gif"), (0, 0), (255, 255, 255), 0)


def test_sixteen_bits_and_grey(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(ramp).save(tmp_path / "deep.tiff")
    Image.fromarray(ramp.astype(np.float32) / 65535).save(tmp_path / "float.tiff")
    Image.fromarray((ramp // 257).astype(np.uint8)).save(tmp_path / "grey.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "bits.png")
    for name in ("deep.png", "deep.tiff", "float.tiff", "grey.png"):
        row = np.array(open_picture(tmp_path / name), dtype=int)[0]
        assert np.abs(row - np.linspace(0, 255, 64)[:, None]).max() <= 1, name
    assert close(open_picture(tmp_path / "bits.png"), (0, 0), (255, 255, 255), 0)


def test_cmyk_and_profiles(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "press.jpg", quality=95)
    assert close(open_picture(tmp_path / "press.jpg"), (8, 8), (255, 0, 0), 4)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    draw(tmp_path / "odd.png", icc_profile=profile)
    draw(tmp_path / "none.png", icc_profile=b"nonsense")
    plain = open_picture(draw(tmp_path / "plain.png")).tobytes()
    assert open_picture(tmp_path / "odd.png").tobytes() == plain
    assert open_picture(tmp_path / "none.png").tobytes() == plain


def test_only_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png", "tiff"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50)
        assert close(open_picture(tmp_path / f"a.{suffix}"), (8, 8), (255, 0, 0), 8)
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert close(open_picture(tmp_path / "phone.jpg"), (8, 8), (255, 0, 0), 8)
    assert len(scan(tmp_path, missing="empty").pictures) == 5


def test_colours_of_a_profile_become_srgb(tmp_path: Path) -> None:
    """A profile in which red and blue have changed places, under another name than sRGB."""
    standard = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    head = standard[:400].replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
    swapped = (head + standard[400:]).replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be"))
    assert swapped.count("odd!".encode("utf-16-be")) == 1
    for mode, colour in (("RGB", (255, 0, 0)), ("RGBA", (255, 0, 0, 255))):
        Image.new(mode, (8, 8), colour).save(tmp_path / f"{mode}.png", icc_profile=swapped)
        assert close(open_picture(tmp_path / f"{mode}.png"), (4, 4), (0, 0, 255), 30)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "standard.png", icc_profile=standard)
    assert close(open_picture(tmp_path / "standard.png"), (4, 4), (255, 0, 0), 0)


# Scanning: what is wrong


def bomb(path: Path, side: int = 30_000) -> None:
    """A tiny PNG whose header says that it is huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_every_bad_file_is_listed_with_its_fix(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    draw(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("I am not a picture")
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "phone.heic").write_text("x")
    bomb(tmp_path / "bomb.png")
    whole = draw(tmp_path / "cut.jpg", (256, 256), 1).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    whole = draw(tmp_path / "cut.png", (256, 256), 2).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    draw(tmp_path / "tiny.png", (20, 90), 4)
    (tmp_path / "again.png").write_bytes((tmp_path / "good.png").read_bytes())
    (tmp_path / "nobody.txt").write_text("a caption of nothing")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "again.txt").write_text("again")
    folder = scan(tmp_path, resolution=64)
    want = {
        "empty.png": ("empty file", "0 bytes"),
        "words.png": ("not a picture", "no picture"),
        "notes.docx": ("not a picture", "Move it out"),
        "phone.heic": ("not a picture", "Convert it to PNG or JPEG"),
        "bomb.png": ("too many pixels", "30000x30000"),
        "cut.jpg": ("damaged picture", "truncated"),
        "cut.png": ("damaged picture", "Copy or export it again"),
        "tiny.png": ("picture too small", "resolution of 64"),
        "good.png": ("duplicate", "again.png, though with another caption"),
        "nobody.txt": ("caption without a picture", "no picture has this name"),
    }
    found = {Path(problem.where).name: problem for problem in folder.problems}
    assert set(found) == set(want)
    for name, (kind, words) in want.items():
        assert found[name].kind == kind
        assert words in str(found[name]), str(found[name])
        assert found[name].fix
    assert texts(folder) == {"again.png": "again"}
    folder.check()
    lines = "\n".join(folder.describe())
    assert "1 picture, 64x64" in lines and "damaged picture: 2" in lines and str(tmp_path / "cut.jpg") in lines
    assert not recwarn.list


def test_limit_on_pixels_is_configurable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "a.png", (100, 100))
    with pytest.raises(UserError, match="10,000 pixels"):
        scan(tmp_path, max_pixels=9_999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit must not overrule the caller's
    assert len(scan(tmp_path, max_pixels=10_000).pictures) == 1
    with pytest.raises(PictureError, match="10,000 pixels"):
        open_picture(tmp_path / "a.png", max_pixels=9_999)
    assert open_picture(tmp_path / "a.png", max_pixels=10_000).size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_may_have_half_the_resolution_but_no_less(tmp_path: Path) -> None:
    draw(tmp_path / "half.png", (32, 90), 1)
    draw(tmp_path / "under half.png", (31, 90), 2)
    assert list(texts(scan(tmp_path, resolution=64))) == ["half.png"]
    assert len(scan(tmp_path).pictures) == 2


def test_companions_and_litter_are_no_problems(tmp_path: Path) -> None:
    draw(tmp_path / "license_plate.png")
    (tmp_path / "license_plate.txt").write_text("a license plate")
    names = (
        "LICENSE",
        "LICENSE.txt",
        "README.md",
        "readme.txt",
        "ATTRIBUTION.md",
        ".DS_Store",
        "Thumbs.db",
        "a.safetensors",
    )
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / ".hidden").mkdir()
    draw(tmp_path / ".hidden" / "b.png", seed=1)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._license_plate.png").write_text("x")
    folder = scan(tmp_path)
    assert folder.problems == ()
    assert texts(folder) == {"license_plate.png": "a license plate"}


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere.*has the folders: there"):
        (tmp_path / "there").mkdir()
        scan(tmp_path / "nowhere")
    for number in range(10):
        (tmp_path / f"there{number}").mkdir()
        (tmp_path / f".hidden{number}").mkdir()
    with pytest.raises(UserError, match=r"has the folders: there, there0, there1, .*there6 and 3 more$"):
        scan(tmp_path / "nowhere")
    (tmp_path / "ink.safetensors").touch()
    with pytest.raises(
        UserError, match=r"ink.safetensors=0.5 is an adapter and no folder of pictures; .* with commas between"
    ):
        scan(tmp_path / "ink.safetensors=0.5")
    with pytest.raises(UserError, match=r"no picture in .*empty"):
        scan(tmp_path / "there")
    with pytest.raises(UserError, match="is a file"):
        scan(draw(tmp_path / "a.png"))
    (tmp_path / "there" / "b.png").write_text("x")
    with pytest.raises(UserError, match=r"no usable picture.*b\.png"):
        scan(tmp_path / "there")
    (tmp_path / "there" / "b.png").rename(tmp_path / "there" / "LICENSE")
    with pytest.raises(UserError, match="only LICENSE"):
        scan(tmp_path / "there")
    with pytest.raises(UserError, match="at least one"):
        scan([])


def test_order_digests_subfolders_and_progress(tmp_path: Path) -> None:
    for seed, name in enumerate(("b/2.png", "a/x/1.png", "c.png", "B.png", "ünïcode 猫.png")):
        draw(tmp_path / name, seed=seed)
    calls = []
    folder = scan(tmp_path, missing="empty", on_progress=lambda done, total: calls.append((done, total)))
    names = [picture.name for picture in folder.pictures]
    assert names == ["B.png", "a/x/1.png", "b/2.png", "c.png", "ünïcode 猫.png"]
    assert [picture.subfolder for picture in folder.pictures] == ["", "a/x", "b", "", ""]
    assert folder.pictures[3].digest == hashlib.sha256((tmp_path / "c.png").read_bytes()).hexdigest()
    assert folder.pictures[4].caption == "ünïcode 猫"
    assert calls == [(number, 5) for number in range(1, 6)]
    assert folder == scan(str(tmp_path), missing="empty")


def test_several_folders_and_links(tmp_path: Path) -> None:
    draw(tmp_path / "one" / "cat.png", seed=1)
    draw(tmp_path / "two" / "dog.png", seed=2)
    draw(tmp_path / "two" / "cat copy.png", seed=1)
    (tmp_path / "two" / "loop").symlink_to(tmp_path / "two", target_is_directory=True)
    folder = scan([tmp_path / "two", tmp_path / "one", tmp_path / "two"])
    assert [picture.name for picture in folder.pictures] == ["cat copy.png", "dog.png"]
    assert kinds(folder) == ["duplicate"]


@pytest.mark.parametrize(
    ("name", "count", "source", "start"),
    [
        ("styles/openmoji", 48, "sidecar", "openmoji emoji of "),
        ("styles/twemoji", 48, "metadata", "twemoji emoji of "),
        ("styles/fluent-flat", 48, "name", "fluent flat emoji of "),
        ("subjects/mira", 8, "sidecar", "a portrait of mira"),
    ],
)
def test_the_sample_folders_are_sound(name: str, count: int, source: str, start: str) -> None:
    folder = scan(REPOSITORY / "samples" / name, resolution=128)
    assert folder.problems == ()
    assert folder.sources == {source: count}
    assert all(picture.caption.startswith(start) for picture in folder.pictures)
    assert len({picture.caption for picture in folder.pictures}) == count
    companions = {path.name for path in (REPOSITORY / "samples" / name).iterdir()}
    assert {"LICENSE", "ATTRIBUTION.md"} <= companions


# Scanning: captions


def test_sidecars(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", seed=1)
    draw(tmp_path / "b.jpg", seed=2)
    draw(tmp_path / "c.png", seed=3)
    (tmp_path / "a.txt").write_text("\ufeff a red\n apple \n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("ein Bär", encoding="utf-8")
    (tmp_path / "c.TXT").write_text("first")
    (tmp_path / "c.caption").write_text("second")
    folder = scan(tmp_path)
    assert texts(folder) == {"a.png": "a red\napple", "b.jpg": "ein Bär", "c.png": "first"}
    assert folder.sources == {"sidecar": 3}
    assert kinds(folder) == ["two captions"]
    assert "3 captions from text files beside the pictures" in folder.describe()


def test_accents_may_be_decomposed_in_a_name_and_composed_in_the_other(tmp_path: Path) -> None:
    forms: tuple[tuple[Literal["NFC", "NFD"], Literal["NFC", "NFD"]], ...] = (("NFC", "NFD"), ("NFD", "NFC"))
    for seed, (form, other) in enumerate(forms):
        draw(tmp_path / (unicodedata.normalize(form, f"café {seed}") + ".png"), seed=seed)
        (tmp_path / (unicodedata.normalize(other, f"café {seed}") + ".txt")).write_text(f"coffee {seed}")
        Image.new("L", (64, 64), "white").save(tmp_path / (unicodedata.normalize(other, f"café {seed}") + "-mask.png"))
    folder = scan(tmp_path)
    assert sorted(texts(folder).values()) == ["coffee 0", "coffee 1"] and not folder.problems
    assert all(picture.mask is not None for picture in folder.pictures)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_names_that_are_no_text_are_listed(tmp_path: Path) -> None:
    draw(tmp_path / "red apple.png")
    for name in (b"caf\xe9.png", b"caf\xe9.txt"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes((tmp_path / "red apple.png").read_bytes())
    ticks = []
    folder = scan(tmp_path, on_progress=lambda done, total: ticks.append((done, total)))
    assert list(texts(folder)) == ["red apple.png"] and kinds(folder) == ["name that is no text"] * 2
    assert ticks[-1] == (2, 2)
    "\n".join(folder.describe()).encode()
    assert "caf?.png: the name is not UTF-8, so it is left out. Rename it." in str(folder.problems[0])
    (root := Path(os.fsdecode(bytes(tmp_path) + b"/b\xe4r"))).mkdir()
    with pytest.raises(UserError, match=r"b\?r is not UTF-8; rename it"):
        scan(root)


def test_metadata_jsonl_and_its_mistakes(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "sub/b.png", "c.png", "d.png", "sub/e.png")):
        draw(tmp_path / name, seed=seed)
    lines = [
        json.dumps({"file_name": "a.png", "text": "one"}),
        "{'file_name': 'a.png'}",
        json.dumps({"file_name": "sub/b.png", "caption": "two"}),
        "",
        json.dumps({"file_name": "gone.png", "text": "x"}),
        json.dumps({"file_name": "c.png", "prompt": "three"}),
        json.dumps({"text": "no name"}),
        json.dumps([1]),
        json.dumps({"file_name": "c.png", "text": "again"}),
        json.dumps({"file_name": "d.png", "text": 4}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "nearer"}')
    folder = scan(tmp_path)
    assert texts(folder) == {"a.png": "one", "c.png": "three", "sub/b.png": "nearer"}
    found = {problem.line: problem for problem in folder.problems if problem.line}
    assert {line: problem.kind for line, problem in found.items()} == {
        2: "broken metadata",
        5: "no such picture",
        7: "broken metadata",
        8: "broken metadata",
        9: "two captions",
        10: "broken metadata",
    }
    assert str(found[2]).startswith(f"{tmp_path / 'metadata.jsonl'}, line 2: ")
    assert [Path(problem.where).name for problem in folder.problems if problem.stops] == [
        *["metadata.jsonl"] * 4, "d.png", "e.png"
    ]  # fmt: skip
    with pytest.raises(UserError, match="line 2: is no JSON"):
        scan(tmp_path, missing="empty").check()


def test_metadata_csv(tmp_path: Path) -> None:
    decomposed = "cafe\u0301.png"
    for seed, name in enumerate(("a.png", decomposed)):
        draw(tmp_path / name, seed=seed)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"red, round"\ncaf\u00e9.png,a café\ngone.png,x\n', "utf-8")
    folder = scan(tmp_path)
    assert list(texts(folder).values()) == ["red, round", "a café"]
    assert folder.sources == {"metadata": 2}
    assert [(problem.kind, problem.line) for problem in folder.problems] == [("no such picture", 4)]
    (tmp_path / "metadata.csv").write_text("name,words\na.png,x\n")
    folder = scan(tmp_path)
    assert not folder.pictures
    assert "needs the columns file_name and text" in str(folder.problems[0])


def test_sidecar_wins_over_metadata_over_name(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        draw(tmp_path / name, seed=seed)
    (tmp_path / "a.txt").write_text("from the sidecar")
    lines = [json.dumps({"file_name": name, "text": "from metadata"}) for name in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    folder = scan(tmp_path, missing="name")
    assert [picture.source for picture in folder.pictures] == ["sidecar", "metadata", "name"]
    assert texts(folder) == {"a.png": "from the sidecar", "b.png": "from metadata", "c.png": "c"}


def test_missing_captions_stop_unless_told_otherwise(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "red_apple.png", "blank.png", "latin.png")):
        draw(tmp_path / name, seed=seed)
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    folder = scan(tmp_path)
    assert texts(folder) == {"a.png": "words", "latin.png": "café"}
    assert kinds(folder) == ["caption read as cp1252"] + ["missing caption"] * 2
    with pytest.raises(UserError, match=r"blank\.png: its caption file is empty\. Write it into blank\.txt.*1 more"):
        folder.check()
    assert texts(scan(tmp_path, missing="skip")) == {"a.png": "words", "latin.png": "café"}
    assert texts(scan(tmp_path, missing="name"))["red_apple.png"] == "red apple"
    waived = scan(tmp_path, missing="empty")
    assert texts(waived)["red_apple.png"] == ""
    assert kinds(waived).count("missing caption") == 2
    waived.check()
    with pytest.raises(UserError, match="stop, name, recipe, empty, skip"):
        scan(tmp_path, missing="guess")  # type: ignore[arg-type]


def draw_from(path: Path, recipe: Any = None, a1111: str | None = None, seed: int = 0) -> None:
    """A picture with texts as `generate` and A1111 write them; as a recipe, what stands in it, or the JSON itself."""
    own = recipe if isinstance(recipe, str) else json.dumps({"version": 1, "recipe": recipe})
    kind = format_of(path)
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8))
    if recipe is None:
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", a1111 or "")
        picture.save(path, pnginfo=info)
    else:
        picture.save(path, **Carried(own, a1111).options(kind))


STEPS = "\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 8x8"


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_pictures_that_were_drawn_have_their_prompts_as_captions(tmp_path: Path, kind: str) -> None:
    long = "a red apple, on a wooden table beside a window, with (soft light:1.2) from the left, BREAK miku \\(vocaloid\\)"
    read = "a red apple, on a wooden table beside a window, with soft light from the left, miku \\(vocaloid\\)"
    draw_from(tmp_path / f"0_a red apple.{kind}", {"prompt": long}, long + STEPS)
    draw_from(tmp_path / f"letters.{kind}", {"prompt": "a (fox:1.2)", "prompt_weights": "none"}, seed=1)
    draw_from(tmp_path / f"a1111 alone.{kind}", {"prompt": ""}, f"a cat,\nasleep <lora:ink:0.8>{STEPS}", seed=2)
    draw_from(tmp_path / f"a sheet.{kind}", json.dumps({"version": 1, "sheet": [[{"prompt": "a"}]]}), seed=3)
    draw_from(tmp_path / f"no prompt.{kind}", {"prompt": ""}, STEPS.lstrip(), seed=4)
    draw(tmp_path / f"drawn by hand.{kind}", seed=5)
    folder = scan(tmp_path)
    assert texts(folder) == {
        f"0_a red apple.{kind}": read,
        f"letters.{kind}": r"a \(fox:1.2\)",
        f"a1111 alone.{kind}": "a cat, asleep",
        f"a sheet.{kind}": "a sheet",
        f"no prompt.{kind}": "no prompt",
        f"drawn by hand.{kind}": "drawn by hand",
    }
    assert not folder.problems and folder.sources == {"recipe": 3, "name": 3}
    assert "3 captions from the prompts that pictures carry, which they were drawn from" in folder.describe()
    assert texts(scan(tmp_path, missing="name"))[f"letters.{kind}"] == "letters"
    names = scan(tmp_path, captions=CaptionSource("names"))
    assert names.sources == {"name": 6}


def test_prompts_of_pictures_stand_behind_what_is_written_of_them(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        draw_from(tmp_path / name, a1111=f"prompt of {name}{STEPS}", seed=seed)
    draw(tmp_path / "d.png", seed=3)
    (tmp_path / "a.txt").write_text("written")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "listed"}))
    assert texts(scan(tmp_path)) == {"a.png": "written", "b.png": "listed"}  # as without any recipe
    assert texts(scan(tmp_path, missing="empty"))["c.png"] == ""
    folder = scan(tmp_path, missing="recipe")
    assert texts(folder) == {"a.png": "written", "b.png": "listed", "c.png": "prompt of c.png"}
    with pytest.raises(UserError, match=r"d\.png: .*nor the prompt that it was drawn from.*captions name, empty or skip"):
        folder.check()
    kohya = tmp_path / "1_woman"
    kohya.mkdir()
    draw_from(kohya / "x.png", a1111=f"a portrait{STEPS}", seed=4)
    assert texts(scan(kohya)) == {"x.png": "woman"} and texts(scan(kohya, missing="recipe")) == {"x.png": "a portrait"}


@pytest.mark.parametrize(
    "own",
    ["{", "[" * 100_000, "1", "{}", '{"recipe": 1}', '{"recipe": {"prompt": 1}}', '{"recipe": {"prompt": "\\ud800"}}',
     '{"recipe": {"prompt": "a", "prompt_weights": [1]}}'],
)  # fmt: skip
def test_a_recipe_that_is_damaged_costs_no_picture_and_is_told(tmp_path: Path, own: str) -> None:
    draw_from(tmp_path / "a fox.png", own)
    draw_from(tmp_path / "b.png", own, f"a hen{STEPS}", seed=1)
    folder = scan(tmp_path)
    assert texts(folder) == {"a fox.png": "a fox", "b.png": "a hen"} and kinds(folder) == ["damaged recipe"]
    (tmp_path / "a fox.txt").write_text("written")
    assert kinds(scan(tmp_path)) == ["missing caption"]  # of b alone
    folder.check()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_captions_with_a_byte_order_mark_are_read(tmp_path: Path, encoding: str) -> None:
    draw(tmp_path / "a.png", seed=1)
    draw(tmp_path / "b.png", seed=2)
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / "a.txt").write_bytes(f"{mark}ein Bär, 猫".encode(encoding))
    (tmp_path / "metadata.jsonl").write_bytes((mark + '{"file_name": "b.png", "text": "猫"}').encode(encoding))
    folder = scan(tmp_path)
    assert texts(folder) == {"a.png": "ein Bär, 猫", "b.png": "猫"} and not folder.problems


WESTERN = ["a café", "“a quote” – it’s…", "größere Füße", "crème brûlée à la carte", "une fête, ça va", "¿qué?", "20 °C"]
WESTERN += ["£5", "el árbol está aquí", "uma maçã no chão", "en rød hest på en gård", "« oui »", "© 2020, 5 m²"]
WESTERN += ["20\xa0000 cats", "a\xa0b"]  # without a letter that is not of ASCII
OTHERS = [
    ("кот на окне", "cp1251"),
    ("猫と犬", "shift-jis"),
    ("海", "shift-jis"),
    ("猫在窗台上睡觉", "gbk"),
    ("고양이", "euc-kr"),
]
# Pages of Latin letters of which one language has all that its own page gives: the words of cp1252 would be wrong ones.
OTHERS += [("chłopiec w żółtej koszuli", "cp1250"), ("žlutý kůň na louce", "cp1250"), ("egy nő", "cp1250")]
OTHERS += [("fată frumoasă", "cp1250"), ("djevojčica", "cp1250"), ("kırmızı elma", "cp1254"), ("obuolys, mažas", "cp1257")]
OTHERS += [("žlutý kůň", "iso8859_2"), ("ein Bär", "cp850"), ("un cœur", "iso8859_15"), ("Ñuñoa", "cp1252")]
OTHERS += [("γάτα", "cp1253"), ("חתול", "cp1255"), ("a cat", "utf-16-le"), ("あいう", "shift-jis")]


@pytest.mark.parametrize("text", WESTERN)
def test_western_captions_are_read_as_such_and_that_is_told(tmp_path: Path, text: str) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    folder = scan(tmp_path)
    assert texts(folder) == {"a.png": " ".join(text.split())} and kinds(folder) == ["caption read as cp1252"]
    folder.check()


@pytest.mark.parametrize("text, encoding", OTHERS)
@pytest.mark.parametrize("missing", ["empty", "name", "skip"])
def test_a_caption_that_cannot_be_read_stops_whatever_is_waived(
    tmp_path: Path, text: str, encoding: str, missing: Literal["empty", "name", "skip"]
) -> None:
    draw(tmp_path / "a.png", seed=1)
    draw(tmp_path / "b.png", seed=2)
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    folder = scan(tmp_path, missing=missing)
    assert "a.png" not in texts(folder)
    with pytest.raises(UserError, match=r"a\.txt: is no text.*Save it as UTF-8"):
        folder.check()


def test_lines_of_a_caption_are_alternatives_and_that_is_told(tmp_path: Path) -> None:
    """As sd-scripts reads them: the first line, and with wildcards any; tags end where lines do."""
    draw(tmp_path / "a.png", seed=1)
    draw(tmp_path / "b.png", seed=2)
    (tmp_path / "a.txt").write_bytes(b"red, round\r\n\r\n  green,   square \n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "one\\n{two|three}"}')
    folder = scan(tmp_path)
    assert texts(folder) == {"a.png": "red, round\ngreen, square", "b.png": "one\n{two|three}"}
    assert "2 captions with several lines, each an alternative: --wildcards draws one" in "\n".join(folder.describe())
    first, second = (picture.caption for picture in folder.pictures)
    tags, wild = captions.CaptionRules(shuffle=True), captions.CaptionRules(wildcards=True, shuffle=True)
    assert {tags.prompt(first, random.Random(seed)) for seed in range(9)} == {"red, round", "round, red"}
    assert tags.plain(first) == wild.plain(first) == "red, round"
    drawn = [wild.prompt(first, random.Random(seed)) for seed in range(99)]
    assert set(drawn) == {"red, round", "round, red", "green, square", "square, green"}
    assert {wild.prompt(second, random.Random(seed)) for seed in range(99)} == {"one", "two", "three"}
    assert 30 < sum("red" in words for words in drawn) < 70


def test_the_words_of_kohya_folders_are_captions_where_no_files_are(tmp_path: Path) -> None:
    """`caption_by_folder` of sd-scripts' library/config_util.py: what comes after the number and the underscore."""
    for seed, name in enumerate(
        ("10_mychar woman/IMG_1.png", "10_mychar woman/a nice name.png", "5_style/a.png", "5_style/b.png", "20_12/c.png")
    ):
        draw(tmp_path / name, seed=seed)
    (tmp_path / "5_style" / "a.txt").write_text("written")
    folder = scan(tmp_path)
    assert texts(folder) == {
        "10_mychar woman/IMG_1.png": "mychar woman",
        "10_mychar woman/a nice name.png": "mychar woman",
        "5_style/a.png": "written",
    }
    assert kinds(folder) == ["missing caption"] * 2  # b was forgotten, and 20_12 is a date
    assert "2 captions from names of folders, as kohya's 10_WORDS" in folder.describe()
    assert texts(scan(tmp_path, missing="name"))["10_mychar woman/a nice name.png"] == "a nice name"
    assert set(texts(scan(tmp_path / "10_mychar woman")).values()) == {"mychar woman"}


def test_what_other_programs_leave_beside_pictures_is_not_learned(tmp_path: Path) -> None:
    draw(tmp_path / "a cat.png", seed=1)
    draw(tmp_path / "sub" / "a dog.jpg", seed=2)
    draw(tmp_path / "masks" / "venetian.png", seed=3)
    for name in ("a cat-masklabel.png", "sub/masks/a dog.png"):
        Image.new("L", (64, 64), "white").save(draw(tmp_path / name))
    left = ["a cat-condlabel.png", "_controls/a cat.depth.jpg", "clipspace/clipspace-mask-1234.png"]
    left += ["sub/clipspace-painted-masked-99.5.png", "gone-masklabel.png", "sub/masks/nobody.png"]
    for seed, name in enumerate((*left, "@eaDir/a cat.png"), start=4):
        draw(tmp_path / name, seed=seed)
    caches = ["a cat.npz", "a cat_sdxl.npz", "meta_lat.json", "aspect_ratio_bucket_indices_pics.json", "x.latent"]
    for name in caches:
        (tmp_path / name).write_bytes(b"x")
    ticks = []
    folder = scan(tmp_path, on_progress=lambda done, total: ticks.append((done, total)))
    assert list(texts(folder)) == ["a cat.png", "masks/venetian.png", "sub/a dog.jpg"]
    masks = {picture.name: picture.mask for picture in folder.pictures}
    assert masks["a cat.png"] == tmp_path / "a cat-masklabel.png" and masks["masks/venetian.png"] is None
    assert masks["sub/a dog.jpg"] == tmp_path / "sub/masks/a dog.png"
    named = {Path(problem.where).relative_to(tmp_path).as_posix(): str(problem) for problem in folder.problems}
    assert sorted(named) == sorted(left + caches)
    assert kinds(folder) == ["file of another program"] * 9 + ["mask without a picture"] * 2
    assert ticks[-1] == (11, 11)
    assert "a conditioning picture of OneTrainer's, which is not learned" in named["a cat-condlabel.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    draw(tmp_path / "red apple.png")
    for name in ("f.png", "red apple.caption", "metadata.jsonl", "red apple-mask.png", "notes"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    folder = scan(tmp_path)
    assert texts(folder) == {"red apple.png": "red apple"}
    assert kinds(folder) == ["no ordinary file"] * 5 + ["unreadable file"]
    (other := tmp_path / "other").mkdir()
    os.mkfifo(other / "f.png")
    with pytest.raises(UserError, match=r"f\.png: a pipe, socket or device"):
        scan(other)


def test_names_that_say_nothing_are_missing_captions(tmp_path: Path) -> None:
    draw(tmp_path / "IMG_1234.jpg", seed=1)
    draw(tmp_path / "DSC-0042.jpg", seed=2)
    folder = scan(tmp_path)
    assert kinds(folder) == ["missing caption"] * 2
    with pytest.raises(UserError, match="file name says nothing"):
        folder.check()


@pytest.mark.parametrize(
    ("stems", "want"),
    [
        (["001_red_apple", "x"], ["red apple", "x"]),
        (["12-red-apple", "3 a cat"], ["red apple", "a cat"]),
        (["12-red-apple", "a cat"], ["12 red apple", "a cat"]),
        (["cat_1", "cat_2", "dog-1"], ["cat", "cat", "dog"]),
        (["apollo-11", "moon"], ["apollo 11", "moon"]),
        (["fluent flat emoji of a__cat (2)", "b"], ["fluent flat emoji of a cat", "b"]),
        (["cat_007", "b"], ["cat", "b"]),
        (["IMG_20240101_120000", "0001", "Screenshot 2", "picture", "9-11", "pig"], ["", "", "", "", "", "pig"]),
    ],
)
def test_file_names_as_captions(stems: list[str], want: list[str]) -> None:
    assert [name_captions(stems)[stem] for stem in stems] == want


@pytest.mark.parametrize(
    ("caption", "trigger", "want"),
    [
        ("a red apple", "ink style", "ink style, a red apple"),
        ("a red apple in Ink  Style", "ink style", "a red apple in Ink  Style"),
        ("an ink styled apple", "ink style", "ink style, an ink styled apple"),
        ("a drink style apple", "ink style", "ink style, a drink style apple"),
        ("", "ink style", "ink style"),
        ("an apple", "", "an apple"),
        ("an apple", "ink style of {}", "ink style of an apple"),
        ("ink style of an apple", "ink style of {}", "ink style of an apple"),
        ("an apple", "photo of {} in ink", "photo of an apple in ink"),
        ("photo of an apple in ink", "photo of {} in ink", "photo of an apple in ink"),
        ("photo of an apple", "photo of {} in ink", "photo of photo of an apple in ink"),
        ("a {b} c", "ink of {}", "ink of a {b} c"),
        ("c++ logo", "c++", "c++ logo"),
        ("[trigger] with a cup", "zwx", "zwx with a cup"),  # as ai-toolkit's inject_trigger_into_prompt
        ("a cup of [name]'s, [trigger]", r"z\1", r"a cup of z\1's, z\1"),
        ("[trigger] a cup", "ink style of {}", "ink style of a cup"),
    ],
)
def test_trigger(caption: str, trigger: str, want: str) -> None:
    assert captions.with_trigger(caption, trigger) == want
    assert captions.with_trigger(want, trigger) == want


def test_bad_caption_rules() -> None:
    for trigger in ("{} and {}", "{name}", "a } b"):
        with pytest.raises(UserError, match="braces"):
            captions.CaptionRules(trigger)
    with pytest.raises(UserError, match=r"0 to 1, not 1\.5"):
        captions.CaptionRules(dropout=1.5)


def test_dropout_and_shuffle() -> None:
    rng = random.Random(0)
    dropped = sum(captions.drop_caption("x", 0.1, rng) == "" for _ in range(4000))
    assert 320 < dropped < 480
    tags = "a, b,, c , d, e"
    shuffled = {str(captions.Tags.of(tags, keep=2).shuffled(rng)) for _ in range(60)}
    assert len(shuffled) == 6
    assert all(one.startswith("a, b, ") and sorted(one.split(", ")) == list("abcde") for one in shuffled)
    rules = captions.CaptionRules("ink", dropout=0.3, shuffle=True, keep_tags=1)
    first, second = ([rules.prompt(tags, rng) for _ in range(20)] for rng in (random.Random(7), random.Random(7)))
    assert first == second
    assert len(set(first)) > 3 and "" in first and any(one.startswith("ink, a, ") for one in first)


def test_tags_are_left_out_and_those_before_the_separator_stay() -> None:
    """`caption_tag_dropout_rate` and `keep_tokens_separator` of sd-scripts' library/train_util.py, process_caption."""
    rules = captions.CaptionRules("ink", shuffle=True, tag_dropout=0.5, separator="|||", keep_tags=9)
    drawn = [rules.prompt("mira, 1girl ||| a, b, c, d ||| best", random.Random(seed)) for seed in range(400)]
    assert all(one.startswith("ink, mira, 1girl") and one.endswith(", best") for one in drawn)
    kept = [one.split(", ")[3:-1] for one in drawn]
    assert 0.45 < sum(map(len, kept)) / (4 * len(kept)) < 0.55
    assert {tuple(sorted(one)) for one in kept} >= {(), ("a",), ("a", "b", "c", "d")} and ["b", "a"] in kept
    assert rules.plain("mira, 1girl ||| a, b ||| best") == "ink, mira, 1girl, a, b, best"
    counted = captions.CaptionRules(tag_dropout=0.9, keep_tags=2)
    assert {counted.prompt("x, y, z", random.Random(seed)) for seed in range(99)} == {"x, y", "x, y, z"}
    assert captions.CaptionRules(separator="|||").prompt("a ||| b", random.Random(0)) == "a, b"


@pytest.mark.parametrize(
    ("rules", "caption", "want"),
    [
        ({"prefix": "masterpiece, best,", "suffix": ", flat"}, "a cat", "masterpiece, best, a cat, flat"),
        ({"prefix": "old", "suffix": "in oil", "trigger": "zwx"}, "", "zwx, old in oil"),
        ({"trigger": "zwx", "templates": ("a page of {caption}, by {trigger}",)}, "a cat", "a page of a cat, by zwx"),
        ({"trigger": "zwx of {}", "templates": ("{caption} ({trigger})",)}, "[name]'s cat", "zwx of's cat (zwx of)"),
        ({"trigger": "zwx", "templates": ("a page of {caption}",), "suffix": "now"}, "a cat", "zwx, a page of a cat now"),
        ({"templates": ("{caption}, {trigger}",)}, "a cat", "a cat"),
    ],
)
def test_words_around_captions(rules: dict[str, Any], caption: str, want: str) -> None:
    made = captions.CaptionRules(**rules)
    assert made.plain(caption) == made.prompt(caption, random.Random(0)) == want
    assert made.of_class().plain("a cat") == "a cat"


def test_each_step_draws_a_template() -> None:
    rules = captions.CaptionRules("zwx", templates=("a photo of {trigger}", "a print of {trigger}, {caption}"))
    drawn = {rules.prompt("red", random.Random(seed)) for seed in range(40)}
    assert rules.varies and drawn == {"a photo of zwx", "a print of zwx, red"}
    for template in ("a photo", "{caption} {name}", "{caption} {"):
        with pytest.raises(UserError, match="or both, and no other braces"):
            captions.CaptionRules(templates=(template,))


# Borders.


def test_paper_is_what_all_borders_have_in_common() -> None:
    rng = np.random.default_rng(0)

    def page(colour: tuple[int, int, int], noise: int = 4) -> Image.Image:
        pixels = np.array(colour) + rng.integers(-noise, noise + 1, (80, 60, 3))
        pixels[20:60, 15:45] = rng.integers(0, 256, (40, 30, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    cream, noisy = (240, 228, 196), Image.fromarray(rng.integers(0, 256, (50, 50, 3), np.uint8))
    assert borders.border(noisy) is None
    found = borders.paper([page(cream) for _ in range(4)] + [noisy])
    assert found is not None and borders.near(found, cream, 1)
    assert borders.paper([page(cream), page((20, 20, 20)), page((200, 30, 30)), page((0, 0, 250))]) is None
    assert borders.paper([page(cream), page(cream), noisy, noisy]) is None and borders.paper([page(cream)] * 2) is None
    assert borders.missed([page(cream), page((250, 250, 250), 0), noisy], cream) == [(250, 250, 250), None]
    assert borders.written(cream) == "#f0e4c4"


# Buckets


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (128, 32), (128, 64), (500, 64), (64, 64), (96, 8)])
@pytest.mark.parametrize("max_aspect", [1.0, 2.0, 4.0])
def test_bucket_laws(resolution: int, step: int, max_aspect: float) -> None:
    made = buckets.make_buckets(resolution, step, max_aspect)
    side = resolution // step * step
    assert any(bucket.aspect == 1 and bucket.width == side for bucket in made)
    assert len(set(made)) == len(made)
    for bucket in made:
        assert bucket.width % step == bucket.height % step == 0
        assert bucket.width * bucket.height <= resolution**2
        assert 1 / max_aspect <= bucket.aspect <= max_aspect
        assert buckets.Bucket(bucket.height, bucket.width) in made
        if bucket.aspect > 1:  # no longer side fits: the area is preserved as far as the step allows
            assert (bucket.width + step) * bucket.height > resolution**2


def test_known_buckets() -> None:
    made = [(bucket.width, bucket.height) for bucket in buckets.make_buckets(512, 64, 2.5)]
    assert made == [(320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (768, 320)]
    with pytest.raises(UserError, match="below the step"):
        buckets.make_buckets(32, 64)
    with pytest.raises(UserError, match="aspect"):
        buckets.make_buckets(512, 64, 0.5)


class Size:
    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height


def test_fits_enlarge_by_half_a_step_at_most_and_crop_little() -> None:
    rng = random.Random(1)
    sizes = [Size(rng.randint(64, 3000), rng.randint(64, 3000)) for _ in range(500)]
    for size, fit in zip(sizes, buckets.arrange(sizes, 512, 64, 2.5), strict=True):
        bucket = fit.bucket
        assert bucket.width % 64 == bucket.height % 64 == 0
        assert bucket.width * bucket.height <= 512**2
        assert bucket.aspect <= 2.5 and bucket.aspect >= 0.4
        assert bucket.width <= size.width + 32 and bucket.height <= size.height + 32
        scale = max(bucket.width / size.width, bucket.height / size.height)
        assert abs(fit.resized[0] - size.width * scale) <= 1 and abs(fit.resized[1] - size.height * scale) <= 1
        left, top, right, bottom = fit.crop
        assert (right - left, bottom - top) == (bucket.width, bucket.height)
        assert min(left, top) >= 0 and right <= fit.resized[0] and bottom <= fit.resized[1]
        assert abs((fit.resized[0] - right) - left) <= 1 and abs((fit.resized[1] - bottom) - top) <= 1
        assert abs(fit.resized[0] / size.width - fit.resized[1] / size.height) < 0.51 / min(size.width, size.height)
        if min(size.width, size.height) > 800 and 0.5 < size.width / size.height < 2:
            assert fit.kept > 0.8


def test_known_fits() -> None:
    def one(width: int, height: int, no_upscale: bool = True) -> tuple[int, int]:
        [fit] = buckets.arrange([Size(width, height)], 512, 64, 2.5, no_upscale)
        return fit.bucket.width, fit.bucket.height

    assert one(1000, 1000) == (512, 512)
    assert one(1600, 1000) == (640, 384)
    assert one(511, 512) == (512, 512)  # a pixel short is no step short
    assert one(480, 480) == (512, 512) and one(479, 479) == (448, 448)
    assert one(300, 300) == (320, 320)
    assert one(300, 300, no_upscale=False) == (512, 512)
    assert one(400, 300) == (384, 320)
    assert one(40, 500) == (64, 128)
    assert one(10_000, 700) == (768, 320)
    [fit] = buckets.arrange([Size(127, 127)], 128, 32)
    assert (fit.bucket.width, fit.kept) == (128, 1.0)


def test_place_keeps_the_middle(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 0, 255), (150, 0, 300, 100))
    [fit] = buckets.arrange([image], 64, 32, 1.0)
    assert fit.bucket == buckets.Bucket(64, 64)
    placed = buckets.place(image, fit)
    assert placed.size == (64, 64)
    assert close(placed, (10, 32), (255, 0, 0), 0) and close(placed, (54, 32), (0, 0, 255), 0)
    flipped = buckets.place(image, fit, flip=True)
    assert np.array_equal(np.array(flipped), np.array(placed)[:, ::-1])
    assert fit.kept == pytest.approx(1 / 3, abs=0.01)
    assert buckets.describe_buckets([fit]) == ["64x64: 1 picture, 33% or more of each kept"]


GROUPS = {
    buckets.Bucket(512, 512): (0, 3, 4, 7, 8, 9, 10),
    buckets.Bucket(640, 384): (1,),
    buckets.Bucket(384, 640): (2, 5, 6, 11),
}


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_batches(batch_size: int) -> None:
    for epoch in range(5):
        steps = buckets.batches(GROUPS, batch_size, 3, epoch)
        assert len(steps) == buckets.steps_per_epoch(GROUPS, batch_size)
        for bucket, members in GROUPS.items():
            drawn = [index for step in steps if step.bucket == bucket for index in step.indices]
            counts = [drawn.count(index) for index in members]
            assert set(drawn) == set(members)
            assert max(counts) - min(counts) <= 1
            assert sum(counts) - len(members) < batch_size
        assert all(len(step.indices) == batch_size for step in steps)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
def test_every_picture_counts_alike_in_an_epoch_however_rare_its_shape(batch_size: int) -> None:
    """Sixteen squares and a tall one, as in the report of a tall one that was drawn eight times; and repeats."""
    square, tall = buckets.Bucket(512, 512), buckets.Bucket(320, 768)
    for groups, repeats in (
        ({square: tuple(range(16)), tall: (16,)}, dict.fromkeys(range(17), 1)),
        (GROUPS, dict.fromkeys(range(12), 1)),
        ({square: (0, 0, 0, 1), tall: (2, 2, 2)}, {0: 3, 1: 1, 2: 3}),
    ):
        for epoch in range(3):
            steps = buckets.batches(groups, batch_size, 3, epoch)
            counted: dict[int, float] = {}
            for step in steps:
                for index, weight in zip(step.indices, step.weights, strict=True):
                    counted[index] = counted.get(index, 0.0) + weight
            each = len(steps) * batch_size / sum(repeats.values())
            assert counted == pytest.approx({index: each * times for index, times in repeats.items()})
            if all(len(members) % batch_size == 0 for members in groups.values()):
                assert all(set(step.weights) == {1.0} for step in steps)


def test_pictures_of_the_class_are_in_one_bucket_each_and_none_is_without() -> None:
    square, tall, wide = buckets.Bucket(512, 512), buckets.Bucket(320, 768), buckets.Bucket(640, 384)
    sizes = [Size(512, 512)] * 20 + [Size(600, 900)] * 10 + [Size(1000, 600)] * 10
    shared = buckets.share_out(sizes, {square: 20, tall: 9, wide: 1})
    assert sorted(index for index, _ in shared) == list(range(40))
    found = {bucket: [index for index, other in shared if other == bucket] for bucket in (square, tall, wide)}
    assert {bucket: len(members) for bucket, members in found.items()} == {square: 25, tall: 12, wide: 3}
    assert set(range(20, 30)) <= set(found[tall]) and set(found[wide]) == {37, 38, 39}
    few = buckets.share_out([Size(500, 500), Size(300, 900)], {square: 3, tall: 3, wide: 3})
    assert {index for index, _ in few} == {0, 1} and {bucket for _, bucket in few} == {square, tall, wide}


def test_batches_are_a_pure_function() -> None:
    turned = dict(reversed([(bucket, tuple(reversed(members))) for bucket, members in GROUPS.items()]))
    assert buckets.batches(GROUPS, 2, 3, 1) == buckets.batches(turned, 2, 3, 1)
    assert buckets.batches(GROUPS, 2, 3, 1) != buckets.batches(GROUPS, 2, 3, 2)
    assert buckets.batches(GROUPS, 2, 3, 1) != buckets.batches(GROUPS, 2, 4, 1)
    # Written down once: a resumed run must see the order of the version that it was started with.
    assert [step.indices for step in buckets.batches({buckets.Bucket(64, 64): range(6)}, 2, 0, 0)] == [
        (1, 3),
        (0, 4),
        (2, 5),
    ]
    with pytest.raises(UserError, match="batch size"):
        buckets.batches(GROUPS, 0, 3, 1)


def test_stream_resumes_where_it_stopped() -> None:
    whole = [batch for batch, _ in zip(buckets.stream(GROUPS, 2, 5), range(40), strict=False)]
    for start in (0, 3, 7, 8, 25):
        assert next(buckets.stream(GROUPS, 2, 5, start)) == whole[start]
    resumed = [batch for batch, _ in zip(buckets.stream(GROUPS, 2, 5, 13), range(27), strict=False)]
    assert resumed == whole[13:]
    with pytest.raises(UserError, match="no picture"):
        next(buckets.stream({}, 2, 5))


# Latents


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vae(0)


def tiny_vae(seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=32).eval()


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[TrainingImage, ...]:
    for seed, size in enumerate([(64, 64), (80, 80), (64, 64), (128, 64), (130, 70)]):
        draw(tmp_path / "pictures" / f"{seed}.png", size, seed)
    return scan(tmp_path / "pictures", missing="empty").pictures


def cached(pictures: tuple[TrainingImage, ...], vae: AutoencoderKL, **options: Any) -> latents.LatentCache:
    return latents.cache_latents(pictures, buckets.arrange(pictures, 64, 16), vae, batch_size=2, **options)


def same(one: latents.LatentCache, two: latents.LatentCache) -> bool:
    pairs = zip(one.entries, two.entries, strict=True)
    return all(torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) for a, b in pairs)


def test_latents_are_the_posterior(pictures: tuple[TrainingImage, ...], vae: AutoencoderKL) -> None:
    calls = []
    cache = cached(pictures, vae, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(number, 5) for number in range(1, 6)]
    assert (cache.computed, cache.reused, cache.damaged) == (5, 0, 0)
    for index, (picture, entry) in enumerate(zip(pictures, cache.entries, strict=True)):
        placed = buckets.place(open_picture(picture.path), entry.fit)
        pixels = torch.from_numpy(np.array(placed)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        torch.testing.assert_close(entry.mean, posterior.mean[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(entry.std, posterior.std[0], rtol=0, atol=1e-5)
        assert entry.picture == index and not entry.flipped
    for bucket, members in cache.groups.items():
        mean, std = cache.stack(members)
        assert mean.shape == std.shape == (len(members), 4, bucket.height // 2, bucket.width // 2)


def test_flips_are_entries_of_their_own(pictures: tuple[TrainingImage, ...], vae: AutoencoderKL) -> None:
    cache = cached(pictures, vae, flip=True)
    assert [(entry.picture, entry.flipped) for entry in cache.entries[4:6]] == [(4, False), (0, True)]
    assert len(cache.entries) == 10
    mirrored = [cache.entries[index + 5].mean for index in range(5)]
    assert not any(torch.equal(entry.mean, other) for entry, other in zip(cache.entries, mirrored, strict=False))
    assert sorted(index for members in cache.groups.values() for index in members) == list(range(10))


@pytest.mark.slow
def test_cache_hit_equals_recompute(
    pictures: tuple[TrainingImage, ...], vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    plain, first, second = cached(pictures, vae), cached(pictures, vae, folder=folder), cached(pictures, vae, folder=folder)
    assert (first.computed, first.reused) == (5, 0)
    assert (second.computed, second.reused, second.damaged) == (0, 5, 0)
    monkeypatch.setattr(latents, "_encode", None)  # a full cache must not run the VAE
    assert cached(pictures, vae, folder=folder).reused == 5
    monkeypatch.undo()
    assert same(plain, first) and same(plain, second)
    assert len(list(folder.iterdir())) == 5
    half = cached(pictures, vae, folder=folder, dtype=torch.bfloat16)
    assert half.reused == 5
    assert torch.equal(half.entries[0].mean, plain.entries[0].mean.bfloat16())
    flipped = cached(pictures, vae, folder=folder, flip=True)
    assert (flipped.computed, flipped.reused) == (5, 5)
    assert same(flipped, cached(pictures, vae, flip=True))  # whatever else was encoded beside when the cache was filled


@pytest.mark.slow
def test_what_changes_a_latent_changes_its_key(
    pictures: tuple[TrainingImage, ...], vae: AutoencoderKL, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    cached(pictures, vae, folder=folder)
    assert cached(pictures, tiny_vae(1), folder=folder).reused == 0
    assert cached(pictures, vae, folder=folder, background="black").reused == 0
    assert cached(pictures, vae, folder=folder, background="#fff").reused == 5
    smaller = buckets.arrange(pictures, 48, 16)
    assert latents.cache_latents(pictures, smaller, vae, folder=folder).reused == 0
    changed = tiny_vae(0)
    assert latents.fingerprint(changed) == latents.fingerprint(vae)
    with torch.no_grad():
        changed.encoder.conv_in.bias[0] += 1e-3
    assert latents.fingerprint(changed) != latents.fingerprint(vae)


def test_damaged_cache_files_are_computed_again(
    pictures: tuple[TrainingImage, ...], vae: AutoencoderKL, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    first = cached(pictures, vae, folder=folder)
    files = sorted(folder.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-10])
    flipped_bit = bytearray(files[1].read_bytes())
    flipped_bit[-1] ^= 1
    files[1].write_bytes(flipped_bit)
    files[2].write_bytes(files[3].read_bytes())
    files[4].write_bytes(b"")
    again = cached(pictures, vae, folder=folder)
    assert (again.damaged, again.computed, again.reused) == (4, 4, 1)
    assert same(first, again)
    assert cached(pictures, vae, folder=folder).reused == 5
    assert sorted(folder.iterdir()) == files


def test_changed_pictures_and_bad_folders(pictures: tuple[TrainingImage, ...], vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write the latent cache"):
        cached(pictures, vae, folder=tmp_path / "file")
    draw(pictures[0].path, seed=99)
    with pytest.raises(UserError, match="changed since"):
        cached(pictures, vae)


@pytest.mark.slow
def test_half_precision_vae_runs_in_float32_on_the_cpu(pictures: tuple[TrainingImage, ...], vae: AutoencoderKL) -> None:
    half = tiny_vae(0).half()
    exact = tiny_vae(0).half().float()
    assert same(cached(pictures, half), cached(pictures, exact))
    assert next(half.parameters()).dtype == torch.float16
    with torch.no_grad():
        exact.quant_conv.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="overflows in float32"):
        cached(pictures, exact)


def test_text_is_encoded_once() -> None:
    asked: list[str] = []

    def encode(prompts: list[str]) -> tuple[torch.Tensor, ...]:
        asked.extend(prompts)
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts], requires_grad=True)
        return lengths[:, None].expand(-1, 3), -lengths

    cache = latents.cache_text(["a", "bb", "a", "", "ccc", "bb"], encode, batch_size=3)
    assert asked == ["a", "bb", "", "ccc"]
    assert len(cache) == 4 and list(cache) == asked
    wide, summary = cache.stack(["ccc", "a", "ccc"])
    assert wide.tolist() == [[3.0] * 3, [1.0] * 3, [3.0] * 3] and summary.tolist() == [-3.0, -1.0, -3.0]
    assert not any(tensor.requires_grad for tensor in cache["a"])
    with pytest.raises(KeyError):
        cache["unknown"]
    with pytest.raises(ValueError, match="1 rows for 2 prompts"):
        latents.cache_text(["a", "b"], lambda prompts: (torch.zeros(2, 3), torch.zeros(1, 3)))
