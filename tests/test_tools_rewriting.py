"""``resize``, ``strength``, ``split``, ``join``, ``rename-trigger`` and ``metadata``, against formulas and bytes."""

import hashlib
import shlex
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from safetensors.torch import load_file, save_file
from test_tools import ATTENTION, CROSS, KERNEL, POINTWISE, TEXT, change, change_of_loha, close, loha, lora_file, noise, pair
from torch import Tensor

import peft_diffusion as pd
from peft_diffusion import bases, formats
from peft_diffusion.cli.app import main
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Noted, Progress
from peft_diffusion.methods.tokens import Tokens
from peft_diffusion.tools.verify import verify

RANKS: dict[str, tuple[int, float | None]] = {
    ATTENTION: (8, 4.0), CROSS: (6, None), POINTWISE: (5, 5.0), KERNEL: (8, 16.0), TEXT: (4, 2.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewriting")
    told = {"ss_network_dim": "8", "ss_network_module": "networks.lora", "ss_seed": "7", "ss_training_comment": "mine"}
    return lora_file(folder / "one.safetensors", 4, RANKS, **told)


def rank_by_kohya(values: Tensor, method: str, target: float, most: int) -> int:
    """``rank_resize`` of networks/resize_lora.py, on the values that are not rounding."""
    if method == "sv_ratio":
        found = int((values > values[0] / target).sum())
    elif method == "sv_cumulative":
        found = int(torch.searchsorted(values.cumsum(0) / values.sum(), target)) + 1
    else:
        squares = values.square()
        found = int(torch.searchsorted(squares.cumsum(0) / squares.sum(), target**2)) + 1
    return min(max(1, found), most)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "method", "target"),
    [("--energy", "sv_cumulative", 0.7), ("--frobenius", "sv_fro", 0.9), ("--ratio", "sv_ratio", 2.0)],
)
def test_resizing_keeps_the_ranks_that_kohyas_script_keeps(
    flag: str, method: str, target: float, lora: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output, one = tmp_path / "small.safetensors", load_file(lora)
    words = ["resize", str(lora), flag, str(target), "--rank", "6", "--output", str(output), "--base", str(tiny_base)]
    assert main(words) == 0
    found = load_file(output)
    for name, (rank, _) in RANKS.items():
        whole = change(one, name)
        u, values, v = torch.linalg.svd(whole.double(), full_matrices=False)
        kept = rank_by_kohya(values[:rank], method, target, 6)
        assert len(found[f"lora_{name}.lora_down.weight"]) == kept, name
        assert close(change(found, name), (u[:, :kept] * values[:kept] @ v[:kept]).float(), 1e-4), name


@pytest.mark.slow
def test_resizing_to_a_rank_takes_convolutions_apart_and_tells_what_is_left_out(
    lora: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = pd.ResizeConfig(lora, output=tmp_path / "small.safetensors", rank=4, conv_rank=2, base=str(tiny_base))
    made, one, found = pd.resize(config), load_file(lora), load_file(tmp_path / "small.safetensors")
    for name in RANKS:
        values = torch.linalg.svdvals(change(one, name).double())
        rank = 2 if name == KERNEL else 4
        assert found[f"lora_{name}.lora_down.weight"].shape[0] == rank
        assert close(change(found, name), change(one, name), float(values[rank:].norm() / values.norm()) + 1e-5)
    wholes = [change(one, name) for name in RANKS]
    left = [change(found, name) - change(one, name) for name in RANKS]
    norm = sum(float(whole.square().sum()) for whole in wholes) ** 0.5
    assert made.error == pytest.approx(sum(float(rest.square().sum()) for rest in left) ** 0.5 / norm, rel=1e-3)
    told = pd.metadata(tmp_path / "small.safetensors")
    assert told["ss_seed"] == "7" and told["ss_network_dim"] == "4"
    assert told["ss_training_comment"] == "resized from one.safetensors: rank 4; mine"


@pytest.mark.slow
def test_what_is_computed_is_written_with_the_names_of_diffusers_too(lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    for to in ("kohya", "diffusers"):
        pd.resize(pd.ResizeConfig(lora, output=tmp_path / f"{to}.safetensors", rank=4, to=to, base=str(tiny_base)))
    flat, dotted = load_file(tmp_path / "kohya.safetensors"), load_file(tmp_path / "diffusers.safetensors")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert torch.equal(dotted[name], flat[f"lora_{ATTENTION}.lora_down.weight"]) and 3 * len(dotted) == 2 * len(flat)


def lokr() -> dict[str, Tensor]:
    """Whole factors, of which LyCORIS takes no alpha."""
    return {f"lora_{ATTENTION}.lokr_w1": noise(1, 4, 4), f"lora_{ATTENTION}.lokr_w2": noise(2, 8, 8)}


@pytest.mark.slow
def test_a_strength_is_written_into_each_method_as_it_is_scaled(tiny_base: Path, tmp_path: Path) -> None:
    weight = make_pipe().unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q").weight.detach()
    turned = {**pair(ATTENTION, 5, 4, 4.0), f"lora_{ATTENTION}.dora_scale": noise(7, 32, 1).abs() + 1}
    direction = weight + change(turned, ATTENTION)
    of_dora = turned[f"lora_{ATTENTION}.dora_scale"] * direction / direction.norm(dim=1, keepdim=True) - weight
    written: dict[str, tuple[dict[str, Tensor], Any]] = {
        "lora": (pair(ATTENTION, 1, 4, 2.0), lambda own: change(own, ATTENTION)),
        "loha": (loha(ATTENTION, 3, 1.5), lambda own: change_of_loha(own, ATTENTION)),
        "lokr": (lokr(), lambda own: torch.kron(own[f"lora_{ATTENTION}.lokr_w1"], own[f"lora_{ATTENTION}.lokr_w2"])),
        "ia3": (
            {f"lora_{ATTENTION}.weight": noise(8, 32), f"lora_{ATTENTION}.on_input": torch.tensor(0)},
            lambda own: own[f"lora_{ATTENTION}.weight"][:, None] * weight,
        ),
        "full": ({f"lora_{ATTENTION}.diff": noise(9, 32, 32)}, lambda own: own[f"lora_{ATTENTION}.diff"]),
    }
    for name, (tensors, formula) in written.items():
        source, output = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-scaled.safetensors"
        save_file(tensors, source)
        pd.strength(pd.StrengthConfig(source, -0.4, output=output, base=str(tiny_base)))
        assert close(formula(load_file(output)), -0.4 * formula(tensors)), name
        assert set(tensors) <= set(load_file(output)), f"{name} is another method"
    save_file(turned, tmp_path / "dora.safetensors")
    events: list[Event] = []
    config = pd.StrengthConfig(tmp_path / "dora.safetensors", 0.5, output=tmp_path / "half.safetensors", base=str(tiny_base))
    pd.strength(config, observers=[events.append])
    assert close(load_file(tmp_path / "half.safetensors")[f"lora_{ATTENTION}.diff"], 0.5 * of_dora, 1e-4)
    assert any(isinstance(one, Noted) and "becomes a whole change" in one.message for one in events)


@pytest.mark.slow
def test_rotations_of_which_the_first_turn_nothing_are_scaled_as_rotations(tiny_base: Path, tmp_path: Path) -> None:
    blocks = {ATTENTION: torch.zeros(8, 4, 4), CROSS: 0.3 * noise(1, 8, 4, 4)}
    save_file({f"lora_{site}.oft_blocks": own for site, own in blocks.items()}, tmp_path / "oft.safetensors")
    pd.strength(pd.StrengthConfig(tmp_path / "oft.safetensors", 0.5, output=tmp_path / "a.safetensors", base=str(tiny_base)))
    weight = make_pipe().unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k").weight.detach()
    skew, one = blocks[CROSS] - blocks[CROSS].mT, torch.eye(4)
    turned = ((one + skew) @ (one - skew).inverse()).mT @ weight.view(8, 4, 32)  # LyCORIS takes the transpose
    assert close(load_file(tmp_path / "a.safetensors")[f"lora_{CROSS}.diff"], 0.5 * (turned.view(32, 32) - weight), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("by", "to"), [("component", "kohya"), ("component", "kohya-sgm"), ("block", "kohya")])
def test_parts_have_the_very_numbers_and_make_the_whole_again(by: Any, to: str, tiny_base: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() for number, own in enumerate(RANKS) for name, tensor in pair(own, number, 4, 2.0).items()}
    save_file(half, tmp_path / "whole.safetensors", {"ss_seed": "3"})
    if to != "kohya":  # as files of Stable Diffusion XL, whose UNet has other names there, and whose text encoders have not
        source = (tmp_path / "whole.safetensors").rename(tmp_path / "source.safetensors")
        pd.convert(pd.ConvertConfig(source, tmp_path / "whole.safetensors", to=to, base=str(tiny_base)))
        half = load_file(tmp_path / "whole.safetensors")
    parts = pd.split(pd.SplitConfig(tmp_path / "whole.safetensors", output=tmp_path / "parts", by=by, base=str(tiny_base)))
    names = {one.path.name for one in parts}
    if by == "component":
        assert names == {"whole-unet.safetensors", "whole-text_encoder.safetensors"}
    else:
        assert "whole-unet.down_blocks.0.safetensors" in names
    tensors = [load_file(one.path) for one in parts]
    assert sum(map(len, tensors)) == len(half)
    pd.join(pd.JoinConfig([str(one.path) for one in parts], output=tmp_path / "again.safetensors", base=str(tiny_base)))
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == half.keys()
    assert all(torch.equal(again[name].half(), tensor) for name, tensor in half.items())
    assert all(again[name].dtype == torch.float16 for name in half if not name.endswith("alpha"))
    assert pd.metadata(parts[0].path)["ss_seed"] == pd.metadata(tmp_path / "again.safetensors")["ss_seed"] == "3"


@pytest.mark.slow
def test_files_of_one_site_are_not_joined_and_parts_that_are_not_there_are_named(
    lora: Path, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"both change \S+; merge them"):
        pd.join(pd.JoinConfig([str(lora), str(lora)], output=tmp_path / "no.safetensors", base=str(tiny_base)))
    with pytest.raises(UserError, match="has no part 'unett'; it has: text_encoder, unet; did you mean 'unet'"):
        pd.split(pd.SplitConfig(lora, output=tmp_path / "parts", parts=("unett",), base=str(tiny_base)))


def word_file(path: Path, word: str, base: Path) -> Path:
    pipe = bases.load_base(str(base), device="cpu")
    encoder = bases.components(pipe)["text_encoder"]
    site.attach(encoder, "made", Tokens(placeholders=word, vectors=2, ids=(5, 6)), "tokens")
    for adapter in site.adapters(encoder, "made").values():
        torch.nn.init.normal_(adapter.get_parameter("vectors"))
    spec = formats.Spec(
        {"text_encoder": ({**Tokens(placeholders=word, vectors=2, ids=(5, 6)).spec(), "target": "tokens"},)},
        triggers=(word,),
    )
    formats.save(path, {"text_encoder": encoder}, "made", spec)
    return path


def words_of(path: Path, base: Path) -> dict[str, Tensor]:
    """The vectors of each word, as a pipeline loads them."""
    pipe = bases.load_base(str(base), device="cpu")
    adapters = pd.Adapters(pipe)
    adapters.load(path, name="words")
    (adapter,) = site.adapters(bases.components(pipe)["text_encoder"], "words").values()
    vectors = adapter.get_parameter("vectors").detach()
    found, start = {}, 0
    for word, ids in adapter.learned_words().items():
        found[word] = vectors[start : start + len(ids)]
        start += len(ids)
    return found


@pytest.mark.slow
def test_a_learned_word_gets_another_name_and_words_of_files_come_together(tiny_base: Path, tmp_path: Path) -> None:
    cat, dog = (word_file(tmp_path / f"{word}.safetensors", f"<{word}>", tiny_base) for word in ("cat", "dog"))
    renamed = tmp_path / "felix.safetensors"
    assert main(["rename-trigger", str(cat), "<cat>", "<felix>", "--output", str(renamed), "--base", str(tiny_base)]) == 0
    with pytest.raises(UserError, match="has no word '<cot>'; it has: <cat>; did you mean '<cat>'"):
        pd.rename_trigger(
            pd.RenameTriggerConfig(cat, "<cot>", "<felix>", output=tmp_path / "no.safetensors", base=str(tiny_base))
        )
    before, after = words_of(cat, tiny_base), words_of(renamed, tiny_base)
    assert list(after) == ["<felix>"] and torch.equal(after["<felix>"], before["<cat>"])
    spec = formats.inspect(renamed).spec
    assert spec is not None and spec.triggers == ("<felix>",)
    assert spec.methods["text_encoder"][0]["placeholders"] == "<felix>"
    pd.merge(pd.MergeConfig([str(renamed), str(dog)], output=tmp_path / "both.safetensors", base=str(tiny_base)))
    both = words_of(tmp_path / "both.safetensors", tiny_base)
    assert list(both) == ["<felix>", "<dog>"]
    assert torch.equal(both["<felix>"], before["<cat>"]) and torch.equal(both["<dog>"], words_of(dog, tiny_base)["<dog>"])
    with pytest.raises(UserError, match=r"both have '<cat>' at text_encoder\..*rename-trigger"):
        twin = word_file(tmp_path / "twin.safetensors", "<cat>", tiny_base)
        pd.merge(pd.MergeConfig([str(cat), str(twin)], output=tmp_path / "no.safetensors", base=str(tiny_base)))


@pytest.mark.slow
def test_a_trigger_of_a_lora_changes_in_what_the_file_says_alone(lora: Path, tiny_base: Path, tmp_path: Path) -> None:
    named = lora_file(tmp_path / "named.safetensors", 4, RANKS, **{"modelspec.trigger_phrase": "ohwx, man"})
    events: list[Event] = []
    config: Any = {"output": tmp_path / "renamed.safetensors", "base": str(tiny_base)}
    pd.rename_trigger(pd.RenameTriggerConfig(named, "ohwx", "sks", **config), observers=[events.append])
    assert pd.metadata(tmp_path / "renamed.safetensors")["modelspec.trigger_phrase"] == "sks, man"
    assert any(isinstance(one, Noted) and "still answers" in one.message for one in events)
    one, found = load_file(named), load_file(tmp_path / "renamed.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in one.items())
    with pytest.raises(UserError, match="has no word 'ohwy'; it has: ohwx, man; did you mean 'ohwx'"):
        pd.rename_trigger(pd.RenameTriggerConfig(named, "ohwy", "sks", **config))


def data_of(path: Path) -> str:
    whole = path.read_bytes()
    return hashlib.sha256(whole[8 + struct.unpack("<Q", whole[:8])[0] :]).hexdigest()


@pytest.mark.slow
def test_metadata_change_and_no_byte_of_the_tensors(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(lora.read_bytes())
    before, tensors = data_of(file), load_file(file)
    assert main(["metadata", "set", str(file), "modelspec.author=me=myself", 'title=ä"']) == 0
    assert main(["metadata", "get", str(file), "modelspec.author"]) == 0
    assert capsys.readouterr().out == f"{file}\nme=myself\n"
    assert (
        main(["metadata", "remove", str(file), "ss_network*", "title", "--output", str(tmp_path / "less.safetensors")]) == 0
    )
    assert pd.metadata(tmp_path / "less.safetensors") == {
        "ss_seed": "7", "ss_training_comment": "mine", "modelspec.author": "me=myself",
    }  # fmt: skip
    for path in (file, tmp_path / "less.safetensors"):
        assert data_of(path) == before
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert main(["metadata", "remove", str(file), "titel"]) == 1
    assert "has no entry 'titel'; did you mean 'title'?" in capsys.readouterr().err
    assert main(["metadata", "set", str(file), "peft_diffusion={"]) == 1
    assert "metadata is damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", [["get"], ["set", "a=b"], ["remove", "a"]])
def test_metadata_of_a_pickle_lead_to_a_file_that_has_some(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word = tmp_path / "my word.pt"
    torch.save({"string_to_param": {"*": noise(1, 1, 768)}, "name": "word"}, word)
    command, *values = verb
    assert main(["metadata", command, str(word), *values]) == 1
    said = capsys.readouterr().err
    assert "my word.pt is a file of torch, of tensors by name, and has no metadata" in said
    *_, inspected, converted = (shlex.split(part.partition(";")[0]) for part in said.split("peft-diffusion "))
    assert main(inspected) == 0
    assert main(converted) == 0
    assert main(["metadata", "set", str(word.with_suffix(".safetensors")), "a=b"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["convert", "verify", "merge", "into", "resize", "strength", "split", "join", "rename"])
def test_each_tool_tells_how_far_it_is_and_how_much_memory_it_held(tool: str, tiny_base: Path, tmp_path: Path) -> None:
    one = lora_file(
        tmp_path / "one.safetensors", 1, {ATTENTION: (4, 2.0), CROSS: (4, None)}, **{"modelspec.trigger_phrase": "ink"}
    )
    two = lora_file(tmp_path / "two.safetensors", 2, {TEXT: (4, 2.0)})
    base, output = str(tiny_base), tmp_path / "out.safetensors"
    events: list[Event] = []
    told: dict[str, Any] = {"observers": [events.append]}
    tools: dict[str, Callable[[], Any]] = {
        "convert": lambda: pd.convert(pd.ConvertConfig(one, output, to="omi", base=base), **told).made,
        "verify": lambda: verify(one, base=base, **told),
        "merge": lambda: pd.merge(pd.MergeConfig([str(one), str(two)], output=output, base=base), **told),
        "into": lambda: pd.merge(pd.MergeConfig([str(one)], into=base, output=tmp_path / "out"), **told),
        "resize": lambda: pd.resize(pd.ResizeConfig(one, output=output, rank=2, base=base), **told),
        "strength": lambda: pd.strength(pd.StrengthConfig(one, 0.5, output=output, base=base), **told),
        "split": lambda: pd.split(pd.SplitConfig(one, output=tmp_path / "parts", base=base), **told)[0],
        "join": lambda: pd.join(pd.JoinConfig([str(one), str(two)], output=output, base=base), **told),
        "rename": lambda: pd.rename_trigger(pd.RenameTriggerConfig(one, "ink", "sumi", output=output, base=base), **told),
    }
    found = tools[tool]()
    steps = [event for event in events if isinstance(event, Progress)]
    assert steps
    for what in {event.what for event in steps}:
        own = [(event.done, event.total) for event in steps if event.what == what]
        assert own == sorted(own)
        assert own[-1] == (own[0][1], own[0][1]) and own[-1][0] > 0
    assert tool == "verify" or found.peak_memory > 0
