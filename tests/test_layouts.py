"""Adapters in the layouts of other programs: their own loaders read them, and here they come back to the bit."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from language import make_lm
from laws import randomize
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_diffusion import formats
from peft_diffusion.bases import components, describe
from peft_diffusion.bases.words import with_initial_tokens
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.method import Method
from peft_diffusion.generation import Adapters
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.bottleneck import Bottleneck
from peft_diffusion.methods.dora import Dora
from peft_diffusion.methods.ia3 import Ia3
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lokr import Lokr
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.tokens import Tokens

torch.set_num_threads(1)
Targets = Sequence[tuple[Method, str]]


def saved(path: Path, base: Any, layout: str, methods: Mapping[str, Targets]) -> Path:
    """A file of an adapter with parameters that matter, which the base carries no more."""
    parts = {name: components(base)[name] for name in methods}
    torch.manual_seed(3)
    for name, chosen in methods.items():
        site.attach_all(parts[name], "made", [(with_initial_tokens(base, name, one), target) for one, target in chosen])
        randomize(parts[name], "made")
    told = {name: tuple({**one.spec(), "target": target} for one, target in chosen) for name, chosen in methods.items()}
    try:
        formats.save(path, parts, "made", formats.Spec(told, asdict(describe(base))), layout=layout)
    finally:
        for part in parts.values():
            site.detach(part, "made")
    return path


def states(path: Path, base: Any) -> dict[str, Tensor]:
    """All tensors of a file's adapters, by component, path and suffix."""
    loaded = formats.load(path, base, strict=True)
    assert loaded.warnings == () and not loaded.plan.leftovers
    return {
        f"{component}.{where}.{suffix}": tensor
        for component, built in loaded.components.items()
        for where, adapter in built.items()
        for suffix, tensor in adapter.state().items()
    }


def assert_equal_files(one: Path, other: Path, base: Any) -> None:
    """Both files hold the same adapter, to the bit."""
    first, second = states(one, base), states(other, base)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def unet_output(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    width = pipe.unet.config.cross_attention_dim
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, width, generator=generator)
    more = {"text_embeds": torch.zeros(2, 16), "time_ids": torch.zeros(2, 6)} if hasattr(pipe, "text_encoder_2") else None
    with torch.no_grad():
        answer: Tensor = pipe.unet(x, torch.tensor(500), encoder_hidden_states=text, added_cond_kwargs=more).sample
    return answer


def outputs(pipe: Any) -> list[Tensor]:
    """What the UNet and the text encoders answer."""
    ids = torch.arange(2, 20)[None]
    encoders = [part for name, part in components(pipe).items() if name != "unet"]
    with torch.no_grad():
        return [unet_output(pipe), *(encoder(ids).last_hidden_state for encoder in encoders)]


def assert_draws_the_same(path: Path, ours: Any, theirs: Any, changed: int) -> None:
    """diffusers and we make the same of a file, which changes as many components."""
    plain = outputs(ours)
    Adapters(ours).load(path, strict=True)
    theirs.load_lora_weights(str(path))
    pairs = list(zip(outputs(ours), outputs(theirs), plain, strict=True))
    assert sum(bool((one - base).abs().max() > 1e-2) for one, _, base in pairs) == changed
    for one, other, _ in pairs:
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


ALPHA = Lora(rank=4, alpha=6.0)
FOR_DIFFUSERS: dict[str, Mapping[str, Targets]] = {
    "lora": {"unet": [(ALPHA, "attention+ff")]},
    "lora, convolutions": {"unet": [(ALPHA, "all")]},
    "lora, both": {"unet": [(ALPHA, "attention+ff")], "text_encoder": [(Lora(rank=2, alpha=3.0), "attention+ff")]},
    "lora, two ranks": {
        "unet": [(Lora(rank=4), r".*\.to_q"), (Lora(rank=2, alpha=5.0), r".*\.to_[kv]"), (Lora(rank=4, alpha=1.0), "conv")],
        "text_encoder": [(Lora(rank=4), r".*\.q_proj"), (Lora(rank=2, alpha=5.0), r".*\.fc1")],
    },
    "rslora": {"unet": [(Lora(rank=4, alpha=2.0, rank_stabilized=True), "attention")]},
    "pissa": {"unet": [(Lora(rank=2, init="pissa"), "attention")]},
    "dora": {"unet": [(Dora(rank=4, alpha=6.0), "attention+ff")]},
    "dora, convolutions": {"unet": [(Dora(rank=4, alpha=6.0), r".*(conv[12]|to_q)")]},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FOR_DIFFUSERS)
def test_diffusers_reads_its_layout(case: str, tmp_path: Path) -> None:
    methods = FOR_DIFFUSERS[case]
    path = saved(tmp_path / "a.safetensors", make_pipe(), "diffusers", methods)
    assert_draws_the_same(path, make_pipe(), make_pipe(), len(methods))
    assert_equal_files(path, saved(tmp_path / "b.safetensors", make_pipe(), "kohya", methods), make_pipe())
    assert formats.inspect(path).layouts == ("diffusers",)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_diffusers_reads_xl(layout: str, tmp_path: Path) -> None:
    methods: dict[str, Targets] = {"unet": [(ALPHA, "all")]}
    if layout == "diffusers":  # kohya's layout says it of text encoders as ever
        second = Lora(rank=3, alpha=9.0)
        methods |= {"text_encoder": [(Lora(rank=2), "attention")], "text_encoder_2": [(second, "attention")]}
    path = saved(tmp_path / "a.safetensors", make_xl_pipe(), layout, methods)
    assert_draws_the_same(path, make_xl_pipe(), make_xl_pipe(), len(methods))
    assert_equal_files(path, saved(tmp_path / "b.safetensors", make_xl_pipe(), "kohya", methods), make_xl_pipe())


@pytest.mark.slow
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "xl"])
def test_the_original_has_a_name_for_all_that_other_methods_change_too(xl: bool, tmp_path: Path) -> None:
    make = make_xl_pipe if xl else make_pipe
    methods: dict[str, Targets] = {
        "unet": [(ALPHA, "all"), (BitFit(), "norms"), (Bottleneck(hidden=2), "outputs")],
        "text_encoder": [(Loha(rank=2), "attention"), (Tokens("<cat>", 2, "cat"), "tokens")],
    }
    path = saved(tmp_path / "a.safetensors", make(), "original", methods)
    names = list(load_file(path))
    assert "lora_unet_input_blocks_0_0.lora_down.weight" in names and "lora_unet_out_0.b_norm" in names
    assert not any(block in name for name in names for block in ("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_"))
    assert_equal_files(path, saved(tmp_path / "b.safetensors", make(), "kohya", methods), make())
    assert formats.inspect(path).layouts[0] == "original"


LAYERS = r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
FOR_PEFT: dict[str, Targets] = {
    "lora": [(ALPHA, LAYERS)],
    "lora, two ranks": [(Lora(rank=4), r".*\.q_proj"), (Lora(rank=2, alpha=5.0), r".*\.mlp\..*")],
    "dora": [(Dora(rank=4, alpha=6.0), LAYERS)],
    "loha": [(Loha(rank=3, alpha=5.0), LAYERS)],
    "lokr": [(Lokr(rank=2, alpha=6.0, factor=4), LAYERS)],
    "lokr, full": [(Lokr(factor=4, full=True), LAYERS)],
    "lokr, both": [(Lokr(rank=1, alpha=4.0, factor=4, decompose_both=True), LAYERS)],
    "lokr, two factors that one gives": [(Lokr(rank=2, factor=4), r".*\.q_proj"), (Lokr(rank=2, factor=4), r".*\.up_proj")],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FOR_PEFT)
def test_peft_reads_its_layout(case: str, tmp_path: Path) -> None:
    methods, ids = {"lm": FOR_PEFT[case]}, torch.arange(2, 30)[None]
    path = saved(tmp_path / "adapter_model.safetensors", make_lm(), "peft", methods)
    theirs, ours = peft.PeftModel.from_pretrained(make_lm().lm, tmp_path).eval(), make_lm()
    with torch.no_grad():
        plain = ours.lm(ids).logits
        site.attach_built(ours.lm, "a", formats.load(path, ours, strict=True).components["lm"])
        one, other = ours.lm(ids).logits, theirs(input_ids=ids).logits
    assert (plain - other).abs().max() > 1e-2
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    kohya, again = states(saved(tmp_path / "b.safetensors", make_lm(), "kohya", methods), make_lm()), states(path, make_lm())
    assert kohya.keys() == again.keys()
    whole = {name.rpartition(".")[0] for name in kohya if name.endswith("lokr_w2")}  # where alpha has no effect
    for name, tensor in kohya.items():
        where, _, suffix = name.rpartition(".")
        assert torch.equal(tensor, again[name]) or (suffix == "alpha" and where in whole), name
    assert formats.inspect(path).layouts == ("peft",)


@pytest.mark.slow
@pytest.mark.parametrize("method", [ALPHA, Dora(rank=3), Loha(rank=2), Lokr(rank=2, factor=4)], ids=lambda one: one.name)
def test_peft_reads_its_layout_on_a_unet_with_convolutions(method: Method, tmp_path: Path) -> None:
    methods: dict[str, Targets] = {"unet": [(method, r".*(attn1\.to_q|resnets\.0\.conv[12])")]}
    path = saved(tmp_path / "adapter_model.safetensors", make_pipe(), "peft", methods)
    theirs, ours = make_pipe(), make_pipe()
    theirs.unet = peft.PeftModel.from_pretrained(theirs.unet, tmp_path).eval().base_model.model
    plain = unet_output(ours)
    Adapters(ours).load(path, strict=True)
    expected = unet_output(theirs)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(unet_output(ours), expected, atol=2e-5, rtol=1e-4)
    assert_equal_files(path, saved(tmp_path / "b.safetensors", make_pipe(), "kohya", methods), make_pipe())


@pytest.mark.slow
def test_words_alone_are_a_file_that_diffusers_reads(tmp_path: Path) -> None:
    methods: dict[str, Targets] = {"text_encoder": [(Tokens("<cat>", 3, "cat"), "tokens")]}
    path = saved(tmp_path / "cat.safetensors", make_pipe(), "embedding", methods)
    assert list(load_file(path)) == ["emb_params"]
    theirs = make_pipe()
    theirs.load_textual_inversion(path, token="<theirs>")
    assert "<theirs>" in theirs.tokenizer.get_vocab()
    assert_equal_files(path, saved(tmp_path / "b.safetensors", make_pipe(), "kohya", methods), make_pipe())
    with safe_open(path, "pt") as file:
        assert "ss_network_module" not in file.metadata() and "modelspec.title" not in file.metadata()


REFUSED: dict[str, tuple[str, Mapping[str, Targets], str]] = {
    "no such layout": ("comfy", {"unet": [(ALPHA, "attention")]}, "there is no layout 'comfy'; there are: diffusers, "),
    "a method that peft lacks": (
        "diffusers", {"unet": [(Bottleneck(hidden=2), "outputs")]}, "unet carries bottleneck, peft does not have it so",
    ),
    "of another mathematics": ("peft", {"unet": [(Ia3(), "attention")]}, "unet carries ia3, peft does not have it so"),
    "of which diffusers has no files": (
        "diffusers", {"unet": [(Loha(rank=2), "attention")]}, "diffusers reads no tensor such as unet.*hada_w1_a",
    ),
    "two methods": (
        "diffusers", {"unet": [(ALPHA, "conv"), (Dora(rank=2), "attention")]}, "unet carries dora, lora, peft has one",
    ),
    "two methods at a site": (
        "diffusers", {"unet": [(ALPHA, r".*\.to_q"), (Ia3(), r".*\.to_q")]}, "carries several methods in one adapter",
    ),
    "magnitudes of a LoHa": (
        "peft", {"unet": [(Loha(rank=2, weight_decompose=True), "attention")]}, "has dora_scale, and files of peft",
    ),
    "factors that no one factor gives": (
        "peft", {"unet": [(Lokr(rank=2, factor=4), r".*\.to_q"), (Lokr(rank=2, factor=2), r".*\.to_k")]},
        "peft has one factor for all sites",
    ),
    "two models": (
        "peft", {"unet": [(ALPHA, "attention")], "text_encoder": [(ALPHA, "attention")]}, "peft keeps one model in a file",
    ),
    "a name that peft does not look for": ("peft", {"unet": [(ALPHA, "attention")]}, "only under the name adapter_model"),
    "no words": ("embedding", {"unet": [(ALPHA, "attention")]}, "lora at unet.* is none: take the layout 'kohya'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_say_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    layout, methods, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        saved(tmp_path / "a.safetensors", make_pipe(), layout, methods)
    assert not list(tmp_path.iterdir())


def test_a_language_model_is_none_of_diffusers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffusers knows no component lm; take the layout 'peft'"):
        saved(tmp_path / "a.safetensors", make_lm(), "diffusers", {"lm": [(ALPHA, "attention")]})
    with pytest.raises(UserError, match="lm had no other names in the original; take the layout 'kohya'"):
        saved(tmp_path / "a.safetensors", make_lm(), "original", {"lm": [(ALPHA, "attention")]})


def test_the_configuration_of_peft_says_what_most_sites_have(tmp_path: Path) -> None:
    saved(tmp_path / "adapter_model.safetensors", make_lm(), "peft", {"lm": FOR_PEFT["lora, two ranks"]})
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (told["peft_type"], told["r"], told["lora_alpha"]) == ("LORA", 2, 5)
    patterns = {rf"^model\.layers\.{layer}\.self_attn\.q_proj": 4 for layer in (0, 1)}
    assert told["rank_pattern"] == told["alpha_pattern"] == patterns
    assert len(told["target_modules"]) == 8 and "model.layers.1.mlp.up_proj" in told["target_modules"]


def per_input(adapter: nn.Module) -> None:
    adapter.magnitude = nn.Parameter(torch.ones(1, adapter.get_parameter("inner.down").shape[1]))


def test_magnitudes_per_input_are_refused(tmp_path: Path) -> None:
    pipe = make_pipe()
    site.attach(pipe.unet, "made", Dora(rank=2), r".*\.to_q")
    for adapter in site.adapters(pipe.unet, "made").values():
        per_input(adapter)
    with pytest.raises(UserError, match="has a magnitude per input, and peft knows only those per output"):
        formats.save(tmp_path / "a.safetensors", {"unet": pipe.unet}, "made", formats.Spec(), layout="diffusers")
