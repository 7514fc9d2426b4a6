"""The names that other programs read for one and the same tensor mean it here too."""

import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from test_dotted_files import LAYERS, learned, text_output, unet_output
from test_formats import write_adapter

from peft_diffusion import formats
from peft_diffusion.core.errors import UserError
from peft_diffusion.formats.layouts.original import original_names
from peft_diffusion.generation import Adapters

torch.set_num_threads(1)
OF_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
ENDS_OF_PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
Rename = Callable[[str, str, str], str]
"""From component, path as it is in files, and suffix, to a name."""


def dotted(start: str, component: str = "unet", end: Callable[[str], str] = lambda end: end) -> Rename:
    return lambda part, path, suffix: f"{start if part == component else part + '.'}{path}.{end(suffix)}"


def flat(start: str, component: str) -> Rename:
    return lambda part, path, suffix: f"{start if part == component else OF_KOHYA[part]}{path.replace('.', '_')}.{suffix}"


def of_peft(end: str) -> str:
    return ENDS_OF_PEFT.get(end, end)


def open_clip(path: str) -> str:
    path = path.removeprefix("text_model.").replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
    return path.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")


def processor(part: str, path: str, suffix: str) -> str:
    """As ComfyUI has it today, and diffusers converts it."""
    match = re.fullmatch(r"(.*attn\d)\.(to_\w+)(\.0)?", path)
    return f"{part}.{path if match is None else f'{match[1]}.processor.{match[2]}'}.{suffix}"


SD: dict[str, Rename] = {
    "compiled": dotted("unet._orig_mod."),
    "compiled and parallel": lambda part, path, suffix: f"module._orig_mod.{part}.{path}.{suffix}",
    "compiled, flat": flat("lora_unet__orig_mod_", "unet"),
    "parallel, flat": lambda part, path, suffix: f"module.{OF_KOHYA[part]}{path.replace('.', '_')}.{suffix}",
    "in peft, in a pipeline": dotted("base_model.model.unet.", end=of_peft),
    "in peft, compiled": dotted("base_model.model._orig_mod.", end=of_peft),
    "OneTrainer inside": dotted("lora_unet."),
    "processor": processor,
    "prior": flat("lora_prior_unet_", "unet"),
    "A1111's own, text": flat("transformer_", "text_encoder"),
    "first text encoder": flat("lora_te1_", "text_encoder"),
    "OMI, text": dotted("clip_l.", "text_encoder"),
    "lora_te.": dotted("lora_te.", "text_encoder"),
    "open_clip": lambda part, path, suffix: f"{OF_KOHYA[part]}{open_clip(path).replace('.', '_')}.{suffix}",
    "open_clip in A1111": lambda part, path, suffix: (
        f"{'lora_unet_' if part == 'unet' else 'model_'}{open_clip(path).replace('.', '_')}.{suffix}"
    ),
}
XL: dict[str, Rename] = {
    "OMI": dotted("clip_g.", "text_encoder_2"),
    "first, A1111's own": flat("0_transformer_", "text_encoder"),
    "prior": flat("lora_prior_te_", "text_encoder_2"),
    "open_clip": lambda part, path, suffix: f"{part}.{open_clip(path) if part == 'text_encoder_2' else path}.{suffix}",
    "open_clip, ComfyUI": lambda part, path, suffix: (
        f"text_encoders.clip_g.transformer.{open_clip(path)}.{suffix}"
        if part == "text_encoder_2"
        else f"{part}.{path}.{suffix}"
    ),
    "open_clip in A1111": lambda part, path, suffix: (
        f"1_model_{open_clip(path).replace('.', '_')}.{suffix}" if part == "text_encoder_2" else f"{part}.{path}.{suffix}"
    ),
}


def renamed(pipe: DiffusionPipeline, path: Path, rename: Rename, parts: tuple[str, ...]) -> tuple[Path, Path]:
    """An adapter in two files: as we write it, and with other names."""
    own = write_adapter(path / "own.safetensors", pipe, parts=parts)
    loaded = formats.load(own, pipe).components
    tensors: dict[str, torch.Tensor] = {}
    for part, built in loaded.items():
        for where, adapter in built.items():
            told = formats.names.with_text_model(part, where)
            tensors |= {rename(part, told, suffix): one.detach().clone() for suffix, one in adapter.state().items()}
    save_file(tensors, path / "theirs.safetensors")
    return own, path / "theirs.safetensors"


def assert_same(own: Path, theirs: Path, pipe: DiffusionPipeline) -> None:
    first, second = (formats.load(path, pipe, strict=True).components for path in (own, theirs))
    assert {part: built.keys() for part, built in first.items()} == {part: built.keys() for part, built in second.items()}
    for part, built in first.items():
        for path, adapter in built.items():
            for suffix, tensor in adapter.state().items():
                assert torch.equal(tensor, second[part][path].state()[suffix])


@pytest.mark.slow
@pytest.mark.parametrize("case", SD)
def test_names_of_others_mean_the_same_on_stable_diffusion(case: str, tmp_path: Path) -> None:
    pipe = make_pipe()
    assert_same(*renamed(pipe, tmp_path, SD[case], ("unet", "text_encoder")), pipe)


@pytest.mark.slow
@pytest.mark.parametrize("case", XL)
def test_names_of_others_mean_the_same_on_sdxl(case: str, tmp_path: Path) -> None:
    pipe = make_xl_pipe()
    assert_same(*renamed(pipe, tmp_path, XL[case], ("text_encoder", "text_encoder_2")), pipe)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["unet.", "diffusion_model_", "lora_prior_unet_"])
def test_names_of_the_original_have_those_prefixes_too(start: str, tmp_path: Path) -> None:
    pipe = make_xl_pipe()
    names = original_names(pipe.unet)

    def rename(part: str, path: str, suffix: str) -> str:
        return f"{start}{names[path] if start.endswith('.') else names[path].replace('.', '_')}.{suffix}"

    own, theirs = renamed(pipe, tmp_path, rename, ("unet",))
    assert_same(own, theirs, pipe)
    assert formats.inspect(theirs).layouts == ("original",)


def test_queries_keys_and_values_in_one_are_three(tmp_path: Path) -> None:
    pipe, generator = make_xl_pipe(), torch.Generator().manual_seed(5)
    down, up = torch.randn(4, 32, generator=generator), torch.randn(96, 4, generator=generator)
    place = "lora_te2_transformer_resblocks_1_attn_in_proj"
    tensors = {f"{place}.lora_down.weight": down, f"{place}.lora_up.weight": up, f"{place}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = formats.load(tmp_path / "a.safetensors", pipe, strict=True)
    assert loaded.report.found == 3 and loaded.report.sites == 3
    whole = 2.0 / 4 * up @ down  # the change of all rows, in the order of torch.nn.MultiheadAttention
    for letter, rows in zip("qkv", whole.chunk(3), strict=True):
        (path,) = [one for one in loaded.components["text_encoder_2"] if one.endswith(f"1.self_attn.{letter}_proj")]
        site = pipe.text_encoder_2.get_submodule(path)
        change, _ = loaded.components["text_encoder_2"][path].fold(site.weight, site.bias)
        torch.testing.assert_close(change, rows, atol=1e-5, rtol=1e-5)
    lokr = {f"{place}.lokr_w1": torch.ones(4, 4), f"{place}.lokr_w2": torch.ones(24, 8)}
    save_file({**lokr, **renamed_pair()}, tmp_path / "b.safetensors")
    assert set(formats.load(tmp_path / "b.safetensors", pipe).report.unmatched) == set(lokr)


def renamed_pair() -> dict[str, torch.Tensor]:
    place = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    return {f"{place}.lora_down.weight": torch.ones(2, 32), f"{place}.lora_up.weight": torch.ones(64, 2)}


@pytest.mark.slow
def test_the_oldest_names_of_diffusers_mean_what_they_mean_there(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    unet, text = "unet.mid_block.attentions.0.transformer_blocks.0", "text_encoder.text_model.encoder.layers.1"
    sizes = {f"{unet}.attn1.processor.{one}_lora": (64, 64) for one in ("to_q", "to_k", "to_v", "to_out")}
    sizes |= {f"{text}.self_attn.{one}_lora": (32, 32) for one in ("to_q", "to_k", "to_v", "to_out")}
    sizes |= {f"{text}.mlp.fc1.lora_linear_layer": (64, 32)}
    tensors = {}
    for name, (outputs, inputs) in sizes.items():
        tensors[f"{name}.down.weight"] = torch.randn(4, inputs, generator=generator)
        tensors[f"{name}.up.weight"] = torch.randn(outputs, 4, generator=generator) * 0.1
    save_file(tensors, tmp_path / "a.safetensors")
    theirs, ours = make_pipe(), make_pipe()
    plain = unet_output(ours), text_output(ours)
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert formats.load(tmp_path / "a.safetensors", ours, strict=True).report.sites == 9
    Adapters(ours).load(tmp_path / "a.safetensors")
    for output, before in ((unet_output, plain[0]), (text_output, plain[1])):
        assert (output(theirs) - before).abs().max() > 1e-2
        torch.testing.assert_close(output(ours), output(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # of a class of peft, which xdist would import to tell it
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_names_of_adapters_of_peft_are_no_part_of_the_tensors(bias: bool, tmp_path: Path) -> None:
    theirs, ours = make_pipe(), make_pipe()
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS, lora_bias=bias)
    theirs.unet.add_adapter(config, adapter_name="my_style")
    learned(theirs.unet)
    tensors = {f"unet.{name}": one for name, one in theirs.unet.state_dict().items() if "lora_" in name}
    assert all(".my_style." in name for name in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    plain = unet_output(ours)
    assert formats.load(tmp_path / "a.safetensors", ours, strict=True).report.unmatched == ()
    Adapters(ours).load(tmp_path / "a.safetensors")
    expected = unet_output(theirs)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(unet_output(ours), expected, atol=1e-5, rtol=1e-4)
    two = {name.replace("my_style", "other"): one.clone() for name, one in tensors.items()}
    save_file({**tensors, **two}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds 2 adapters of peft, my_style, other"):
        formats.load(tmp_path / "b.safetensors", ours)


def test_what_is_not_known_is_listed_as_the_file_has_it(tmp_path: Path) -> None:
    strange = ["module.elsewhere.x.lora_up.strange", "module.lora_unet_conv_in.strange", "lora_te9_conv.alpha"]
    save_file({**renamed_pair(), **{name: torch.ones(2) for name in strange}}, tmp_path / "a.safetensors")
    loaded = formats.load(tmp_path / "a.safetensors", make_xl_pipe())
    assert set(loaded.report.unmatched) == set(strange)
    twice = {"module.lora_unet_conv_in.alpha": torch.ones(()), "lora_unet_conv_in.alpha": torch.ones(())}
    save_file(twice, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"module\.lora_unet_conv_in\.alpha.* one tensor under two names"):
        formats.inspect(tmp_path / "b.safetensors")
