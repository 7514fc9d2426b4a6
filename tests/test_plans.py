"""A file is parsed once and hashed once, and what ``inspect`` tells is what ``load`` does."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from language import make_lm
from making import make_adapter
from safetensors.torch import load_file, save_file
from test_methods_own import save_mixture

from peft_diffusion import BlendConfig, GenerateConfig, UserError, blend, formats, generate
from peft_diffusion.formats import container, planning
from peft_diffusion.formats.layout import Layout, reader_of
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.text import generate_text
from peft_diffusion.generation.text_settings import TextGenerateConfig
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.dora import Dora
from peft_diffusion.methods.ia3 import Ia3
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lokr import Lokr
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.oft import Oft


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each file's header was read, and how often it was hashed."""
    found: Counter[tuple[str, str]] = Counter()

    def counted(name: str) -> Callable[[Path], Any]:
        function = getattr(container, name)

        def run(path: Path) -> Any:
            found[name, path.name] += 1
            return function(path)

        return run

    for name in ("read_header", "sha256"):
        monkeypatch.setattr(container, name, counted(name))
    digests = container.Data.digests

    def of_data(self: container.Data) -> tuple[str, str]:
        found["sha256", self._header.path.name] += 1
        return digests(self)

    monkeypatch.setattr(container.Data, "digests", of_data)
    return found


def once(*names: str) -> dict[tuple[str, str], int]:
    return {(what, name): 1 for name in names for what in ("read_header", "sha256")}


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [make_adapter(folder / f"{name}.safetensors", tiny_base, seed) for seed, name in enumerate(("ink", "flat"))]


@pytest.mark.slow
def test_generate_parses_and_hashes_each_file_once(
    counts: Counter[tuple[str, str]], files: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    asked = GenerateConfig(
        ("a cat",), adapter=tuple(map(str, files)), base=str(tiny_base), steps=1, device="cpu", output=tmp_path / "a.png"
    )
    asked.check()  # as the command does before it imports torch
    generate(asked)
    assert counts == once("ink.safetensors", "flat.safetensors")
    counts.clear()
    again = GenerateConfig(recipe=tmp_path / "a.png", base=str(tiny_base), device="cpu", output=tmp_path / "b.png")
    generate(again)
    assert counts == once("ink.safetensors", "flat.safetensors")
    counts.clear()
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(files[0].read_bytes())
    named = (str(moved), str(files[1]))
    asked = GenerateConfig(recipe=tmp_path / "a.png", adapter=named, base=str(tiny_base), device="cpu")
    generate(replace(asked, output=tmp_path / "c.png"))
    assert counts == once("moved.safetensors", "flat.safetensors")


@pytest.mark.slow
def test_blend_inspect_and_adapters_do_too(
    counts: Counter[tuple[str, str]], files: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    names = tuple(map(str, files))
    asked = BlendConfig(
        ("a cat",), adapter=names, base=str(tiny_base), steps=1, device="cpu", columns=2, output=tmp_path / "a.png"
    )
    asked.check()
    blend(asked)
    assert counts == once("ink.safetensors", "flat.safetensors")
    counts.clear()
    plan = formats.plan(files[0])
    assert formats.inspect(plan).sha256 == plan.sha256
    adapters = Adapters(make_pipe())
    adapters.load(plan)
    assert adapters["ink"].sha256 == plan.sha256
    assert counts == once("ink.safetensors")


@pytest.mark.slow
def test_a_file_that_changed_is_parsed_again_and_never_taken_for_what_it_was(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(files[0].read_bytes())
    asked = GenerateConfig(("a cat",), adapter=(str(path),))
    (first,) = asked.choices()
    assert asked.choices()[0].plan is first.plan and first.plan is not None
    save_file(load_file(files[1]), path)
    for use in (lambda plan: formats.load(plan, make_pipe()), lambda plan: plan.sha256):
        with pytest.raises(UserError, match="was changed while it was being used"):
            use(first.plan)
    (second,) = asked.choices()
    assert second.plan is not None and second.plan.sha256 == container.sha256(path)


SITE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
PAIR = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2)}
SAMPLES: dict[str, dict[str, torch.Tensor]] = {
    "kohya": {f"{SITE}.{end}": one for end, one in PAIR.items()},
    "of ComfyUI's saver": {
        **{f"{SITE}.{end}": one for end, one in PAIR.items()},
        **{f"{SITE.replace('to_q', 'to_v')}.{end}": one for end, one in {**PAIR, "diff": torch.ones(32, 32)}.items()},
        "lora_unet_conv_out.diff": torch.ones(4, 32, 3, 3),
    },
    "of a method that is not known": {
        **{f"{SITE}.{end}": one for end, one in PAIR.items()},
        **{f"{SITE.replace('to_q', 'to_v')}.{end}.weight": torch.ones(2, 2) for end in ("c1", "c2", "d1", "d2")},
    },
    "half a pair beside a whole one": {
        **{f"{SITE}.{end}": one for end, one in PAIR.items()},
        f"{SITE.replace('to_q', 'to_v')}.lora_up.weight": torch.ones(32, 2),
    },
    "two layouts": {
        **{f"{SITE}.{end}": one for end, one in PAIR.items()},
        **{f"{DOTTED}.{end}": one.clone() for end, one in PAIR.items()},
        "bundle_emb.cat.clip_l": torch.ones(2, 32), "unet.conv_in.weight": torch.ones(3),
    },
    "words": {"bundle_emb.cat.clip_l": torch.ones(2, 32), "bundle_emb.dog.clip_l": torch.ones(32)},
    "words that are none": {
        "bundle_emb.cat.clip_l": torch.ones(2, 32), "<toy>": torch.ones(2, 32), "bundle_emb.dog.t5": torch.ones(2, 32),
        "emb_params": torch.ones(2, 3, 4),
    },
    "a name without its suffix beside a pair": {
        **{f"{DOTTED}.{end}": one for end, one in PAIR.items()},
        **{f"{DOTTED.replace('to_k', 'to_v')}.{end}": one for end, one in PAIR.items()},
        f"{DOTTED}.lora_what": torch.ones(2),
    },
}  # fmt: skip


def assert_tells_what_it_does(path: Path, base: Any) -> None:
    told, done = formats.inspect(path), formats.load(path, base)
    assert sum(told.components.values()) == len(told.sites) == done.report.sites
    assert set(told.unknown) == set(done.report.unmatched)
    assert done.report.found + len(told.unknown) == sum(told.dtypes.values())
    assert {component: len(built) for component, built in done.components.items()} == dict(told.components)


@pytest.mark.parametrize("case", SAMPLES)
def test_inspect_tells_what_load_does(case: str, tmp_path: Path) -> None:
    save_file({name: one.clone() for name, one in SAMPLES[case].items()}, tmp_path / "a.safetensors")
    assert_tells_what_it_does(tmp_path / "a.safetensors", make_pipe())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["kohya", "original", "diffusers"])
@pytest.mark.parametrize(
    "method", [Lora(rank=3), Dora(rank=3), Loha(rank=2), Lokr(rank=2, factor=4), Oft(block_size=4), Ia3(), BitFit()],
    ids=lambda one: one.name,
)  # fmt: skip
def test_inspect_tells_what_load_does_with_files_of_ours(method: Any, layout: str, tmp_path: Path) -> None:
    from peft_diffusion.core import site

    pipe = make_pipe()
    site.attach(pipe.unet, "a", method, "biases" if method.name == "bitfit" else "attention")
    try:
        formats.save(tmp_path / "a.safetensors", {"unet": pipe.unet}, "a", formats.Spec(), layout=layout)
    except UserError:
        assert layout == "diffusers" and method.name not in ("lora", "dora")
        return
    assert_tells_what_it_does(tmp_path / "a.safetensors", make_pipe())


@pytest.mark.slow
def test_inspect_tells_what_load_does_with_a_mixture(tmp_path: Path) -> None:
    assert_tells_what_it_does(save_mixture(tmp_path / "a.safetensors", make_pipe()), make_pipe())


def test_a_pickle_is_planned_from_its_tensors(tmp_path: Path) -> None:
    torch.save(SAMPLES["kohya"], tmp_path / "a.pt")
    found = formats.inspect(tmp_path / "a.pt")
    assert found.methods == ("lora",) and dict(found.ranks) == {2: 1}
    assert_tells_what_it_does(tmp_path / "a.pt", make_pipe())


def pair_at(name: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": down.clone(), f"{name}.lora_up.weight": up.clone()}


FC1 = "text_model_encoder_layers_0_mlp_fc1"
SIDES = {"unet": (torch.ones(2, 32), torch.ones(32, 2)), "text": (torch.ones(2, 32), torch.ones(64, 2))}
# Two names of one layer, of which a loader that goes by names keeps one.
TWICE = {
    "prefixes of two families": (f"lora_te_{FC1}", f"lora_te1_{FC1}", "text"),
    "flat and dotted": (SITE, DOTTED.replace("to_k", "to_q"), "unet"),
    "with and without text_model": (f"lora_te_{FC1}", f"lora_te_{FC1.removeprefix('text_model_')}", "text"),
    "compiled and not": (SITE, SITE.replace("lora_unet_", "lora_unet__orig_mod_"), "unet"),
    "kohya's and LyCORIS' prefix": (SITE, SITE.replace("lora_unet_", "lycoris_"), "unet"),
    "original and diffusers": (SITE, "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", "unet"),
    "original and diffusers, dotted": (
        DOTTED.replace("to_k", "to_q"), "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", "unet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TWICE)
def test_two_names_of_one_layer_are_refused_wherever_they_meet(case: str, tmp_path: Path) -> None:
    first, second, kind = TWICE[case]
    save_file({**pair_at(first, *SIDES[kind]), **pair_at(second, *SIDES[kind])}, tmp_path / "a.safetensors")
    for strict in (False, True):
        with pytest.raises(UserError, match="are one tensor under two names") as raised:
            formats.load(tmp_path / "a.safetensors", make_pipe(), strict=strict)
        assert f"{first}.lora_down.weight" in str(raised.value) and f"{second}.lora_down.weight" in str(raised.value)
    if "original" not in case:  # those are told apart by the base alone
        with pytest.raises(UserError, match="are one tensor under two names"):
            formats.inspect(tmp_path / "a.safetensors")


def test_an_embedding_of_one_word_under_two_names_is_refused(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 32), "clip_l": torch.ones(2, 32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="clip_l and emb_params are one tensor under two names"):
        formats.load(tmp_path / "a.safetensors", make_pipe())


def test_different_methods_of_one_layer_may_have_names_of_their_own(tmp_path: Path) -> None:
    original = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0"
    tensors = pair_at(SITE.replace("to_q", "to_out_0"), *SIDES["unet"]) | {f"{original}.diff_b": torch.ones(32)}
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = formats.load(tmp_path / "a.safetensors", make_pipe(), strict=True)
    (adapter,) = loaded.components["unet"].values()
    assert adapter.state().keys() == {"lora_down.weight", "lora_up.weight", "alpha", "diff_b"}


NOT_WHOLE = {
    "an unknown suffix": f"{SITE}.lora_what",
    "an unknown suffix, dotted": f"{SITE.removesuffix('_to_q')}.to_q.lora_what",
    "a tensor that no layout reads": f"{DOTTED.replace('to_k', 'to_q')}.bias",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NOT_WHOLE)
def test_a_site_with_a_tensor_that_is_not_understood_is_left_out_whole(case: str, tmp_path: Path) -> None:
    stranger = NOT_WHOLE[case]
    site = DOTTED.replace("to_k", "to_q") if stranger.startswith("unet.") else SITE
    tensors = pair_at(site, *SIDES["unet"]) | pair_at(DOTTED, *SIDES["unet"]) | {stranger: torch.ones(32)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert_tells_what_it_does(tmp_path / "a.safetensors", make_pipe())
    loaded = formats.load(tmp_path / "a.safetensors", make_pipe())
    assert list(loaded.components["unet"]) == [DOTTED.removeprefix("unet.")]
    assert set(loaded.report.unmatched) == {stranger, f"{site}.lora_down.weight", f"{site}.lora_up.weight"}
    assert any("2 of 5 tensors are of sites that other tensors" in warning for warning in loaded.warnings)
    with pytest.raises(UserError, match="would not be used whole") as raised:
        formats.load(tmp_path / "a.safetensors", make_pipe(), strict=True)
    assert stranger in str(raised.value)


def test_a_suffix_that_is_not_known_is_not_called_a_site_that_is_not_there(tmp_path: Path) -> None:
    elsewhere = "lora_unet_down_blocks_9_attentions_0_proj_in"
    tensors = {**pair_at(SITE, *SIDES["unet"]), f"{elsewhere}.lora_what": torch.ones(2)}
    tensors |= pair_at(elsewhere.replace("proj_in", "proj_out"), *SIDES["unet"])
    save_file(tensors, tmp_path / "a.safetensors")
    unknown, nowhere = formats.load(tmp_path / "a.safetensors", make_pipe()).warnings
    assert "1 of 5 tensors are of no method that is known here" in unknown and f"{elsewhere}.lora_what" in unknown
    assert "2 of 5 tensors have no site in this base" in nowhere


def test_another_base_is_named_only_where_the_file_names_one(tmp_path: Path) -> None:
    wide = pair_at(SITE, torch.ones(2, 48), torch.ones(48, 2))
    save_file(wide, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"a\.safetensors does not fit the base '\w+' \(other\): unet\.down_blocks"
    ) as raised:
        formats.load(tmp_path / "a.safetensors", make_pipe())
    assert "made for" not in str(raised.value)
    told = {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "juggernaut"}
    save_file(wide, tmp_path / "a.safetensors", told)
    with pytest.raises(UserError, match=r"was made for base 'juggernaut' \(sdxl\); this base is"):
        formats.load(tmp_path / "a.safetensors", make_pipe())


WRAPPED = {
    "compiled, dotted": DOTTED.replace("unet.", "unet._orig_mod."),
    "compiled, flat": SITE.replace("lora_unet_", "lora_unet__orig_mod_"),
    "compiled, a path alone": DOTTED.replace("unet.", "_orig_mod."),
    "in parallel": DOTTED.replace("unet.", "unet.module."),
    "in parallel, a path alone": DOTTED.replace("unet.", "module."),
    "the pipeline in peft": f"base_model.model.{DOTTED}",
    "compiled in peft": f"base_model.model._orig_mod.{DOTTED.removeprefix('unet.')}",
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_wrappers_put_before_names_is_seen_through(case: str, tmp_path: Path) -> None:
    save_file(pair_at(WRAPPED[case], *SIDES["unet"]), tmp_path / "a.safetensors")
    loaded = formats.load(tmp_path / "a.safetensors", make_pipe(), strict=True)
    (path,) = loaded.components["unet"]
    assert path.startswith("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_")
    assert_tells_what_it_does(tmp_path / "a.safetensors", make_pipe())


@pytest.mark.slow
def test_every_command_that_loads_can_be_strict(files: list[Path], tmp_path: Path) -> None:
    save_file({**load_file(files[0]), "lora_unet_nowhere.alpha": torch.ones(())}, tmp_path / "part.safetensors")
    base = make_pipe()
    drawn: dict[str, Any] = {"steps": 1, "device": "cpu", "strict": True, "output": tmp_path / "a.png"}
    part, whole = str(tmp_path / "part.safetensors"), str(files[1])
    runs: tuple[Callable[[], object], ...] = (
        lambda: generate(GenerateConfig(("a",), adapter=(part,), **drawn), pipe=base),
        lambda: blend(BlendConfig(("a",), adapter=(whole, part), **drawn), pipe=base),
        lambda: list(generate_text(TextGenerateConfig(("a",), adapter=(part,), strict=True), base=make_lm())),
    )
    for run in runs[:2]:
        with pytest.raises(UserError, match=r"part\.safetensors would not be used whole: .*lora_unet_nowhere\.alpha"):
            run()
        assert Adapters(base).names == ()  # a lent base is given back as it was
    save_file(lm_pair() | {"lora_lm_nowhere.alpha": torch.ones(())}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"would not be used whole: .*lora_lm_nowhere\.alpha"):
        runs[2]()


def lm_pair() -> dict[str, torch.Tensor]:
    layer = make_lm().lm.get_submodule("model.layers.0.mlp.up_proj")
    down, up = torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2)
    return pair_at("lora_lm_model_layers_0_mlp_up_proj", down, up)


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "original"])
def test_a_second_file_of_a_shape_is_planned_without_reading_its_names(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = {"kohya": "lora_unet_mid_block_attentions_0_", "diffusers": "unet.mid_block.attentions.0."}
    start = starts.get(layout, "lora_unet_middle_block_1_")
    down, up = ("lora_A", "lora_B") if layout == "diffusers" else ("lora_down", "lora_up")
    for name, rank in (("first", 4), ("second", 4), ("third", 8)):
        pair = {f"{start}proj_in.{down}.weight": torch.ones(rank, 32), f"{start}proj_in.{up}.weight": torch.ones(32, rank)}
        save_file(pair, tmp_path / f"{name}.safetensors", {"told": name})
    alpha = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.r": 4})}
    save_file(load_file(tmp_path / "first.safetensors"), tmp_path / "alpha.safetensors", alpha)
    planning.forget()
    fresh = {}
    for name in ("second", "third", "alpha"):
        fresh[name] = formats.plan(tmp_path / f"{name}.safetensors").sites
        planning.forget()
    formats.plan(tmp_path / "first.safetensors")
    read: list[str] = []

    def counted(name: str, layouts: Iterable[Layout]) -> Layout | None:
        read.append(name)
        return reader_of(name, layouts)

    monkeypatch.setattr(planning, "reader_of", counted)
    assert formats.plan(tmp_path / "second.safetensors").sites == fresh["second"] and read == []
    assert formats.plan(tmp_path / "third.safetensors").sites == fresh["third"] and len(read) == 2
    assert formats.plan(tmp_path / "alpha.safetensors").sites == fresh["alpha"]
    assert (fresh["alpha"] != fresh["second"]) == (layout == "diffusers")
