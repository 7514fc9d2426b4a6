"""What ``inspect`` tells beyond sites: the model of a file, words and tags, hashes, norms."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import make_pipe
from making import command
from PIL import Image
from safetensors.torch import load_file, save_file
from test_formats import write_adapter
from torch import Tensor

import peft_diffusion as pd
from peft_diffusion import formats
from peft_diffusion.bases.skeleton import skeleton
from peft_diffusion.core.errors import UserError
from peft_diffusion.formats.file import load
from peft_diffusion.formats.layout import ReadOnly, find, known
from peft_diffusion.formats.planning import plan
from peft_diffusion.tools.norms import norms
from peft_diffusion.tools.settings import ConvertConfig

torch.set_num_threads(1)


def pair(name: str, inputs: int = 16, end: str = "lora_down.weight", other: str = "lora_up.weight") -> dict[str, Tensor]:
    return {f"{name}.{end}": torch.ones(2, inputs), f"{name}.{other}": torch.ones(8, 2)}


def peft_pair(name: str, inputs: int = 16) -> dict[str, Tensor]:
    return pair(name, inputs, "lora_A.weight", "lora_B.weight")


BLOCK = "transformer_blocks_0_attn2_to_k"
# What a file for each model holds, as its writers name it.
MODELS: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "kohya, SD 1": (pair(f"lora_unet_mid_block_attentions_0_{BLOCK}", 768), {}, "Stable Diffusion 1"),
    "kohya, SD 2": (pair(f"lora_unet_mid_block_attentions_0_{BLOCK}", 1024), {}, "Stable Diffusion 2"),
    "kohya, SDXL": (pair(f"lora_unet_input_blocks_4_1_{BLOCK}", 2048), {}, "Stable Diffusion XL"),
    "SDXL by its depth": (
        pair("lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q"), {}, "Stable Diffusion XL"
    ),
    "SDXL by its second text encoder": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), {}, "Stable Diffusion XL"),
    "diffusers, SD 1": (
        peft_pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", 768), {}, "Stable Diffusion 1"
    ),
    "a text encoder": (pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 1024), {}, "Stable Diffusion 2"),
    "words": ({"emb_params": torch.ones(2, 768)}, {}, "Stable Diffusion 1"),
    "words of SDXL": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, {}, "Stable Diffusion XL"),
    "kohya, Flux": (pair("lora_unet_double_blocks_0_img_attn_qkv", 3072), {}, "Flux.1"),
    "diffusers, Flux": (peft_pair("transformer.single_transformer_blocks.7.attn.to_q", 3072), {}, "Flux.1"),
    "OneTrainer, Flux": (pair("lora_transformer_single_transformer_blocks_7_attn_to_q", 3072), {}, "Flux.1"),
    "Flux, double blocks alone": (peft_pair("transformer.transformer_blocks.7.attn.add_q_proj", 3072), {}, "Flux.1"),
    "kohya, SD 3": (pair("lora_unet_joint_blocks_3_x_block_attn_qkv", 1536), {}, "Stable Diffusion 3"),
    "diffusers, SD 3": (peft_pair("transformer.transformer_blocks.3.attn.add_q_proj", 1536), {}, "Stable Diffusion 3"),
    "Wan": (peft_pair("diffusion_model.blocks.3.cross_attn.k_img", 5120), {}, "Wan"),
    "diffusers, Wan": (peft_pair("transformer.blocks.3.attn1.to_q", 5120), {}, "Wan"),
    "Z-Image": (peft_pair("diffusion_model.layers.3.attention.to_q", 3840), {}, "Z-Image"),
    "Z-Image, fused": (peft_pair("diffusion_model.layers.3.attention.qkv", 3840), {}, "Z-Image"),
    "Lumina 2": (peft_pair("diffusion_model.layers.3.attention.qkv", 2304), {}, "Lumina 2"),
    "Qwen-Image": (peft_pair("transformer.transformer_blocks.59.attn.add_q_proj", 3072), {}, "Qwen-Image"),
    "HunyuanVideo": (pair("lora_unet_double_blocks_0_img_mod_linear", 3072), {}, "HunyuanVideo"),
    "Chroma": (pair("lora_unet_distilled_guidance_layer_in_proj", 64), {}, "Chroma"),
    "metadata": (pair("lora_unet_x", 64), {"modelspec.architecture": "flux-1-dev/lora"}, "Flux.1"),
    "kohya's metadata": (pair("lora_unet_x", 64), {"ss_base_model_version": "sd3m"}, "Stable Diffusion 3"),
    "a language model": (peft_pair("base_model.model.model.layers.0.self_attn.q_proj"), {}, "a language model"),
    "nothing": (pair("lora_unet_x", 64), {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_the_model_of_a_file_is_named(case: str, tmp_path: Path) -> None:
    tensors, metadata, name = MODELS[case]
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    found = formats.inspect(tmp_path / "a.safetensors")
    assert found.origin.name == name and found.leftovers == {}


@pytest.mark.slow
def test_a_file_for_another_model_says_so_where_it_is_loaded(tmp_path: Path) -> None:
    for name, case in (("a", "kohya, Flux"), ("b", "OneTrainer, Flux"), ("c", "diffusers, Wan")):
        save_file(MODELS[case][0], tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=rf"is for {MODELS[case][2]}, which this package does not run"):
            formats.load(tmp_path / f"{name}.safetensors", make_pipe())


def test_a_contradiction_of_names_and_metadata_is_told(tmp_path: Path) -> None:
    save_file(MODELS["kohya, SDXL"][0], tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"})
    told = formats.inspect(tmp_path / "a.safetensors").origin
    assert (told.name, told.other) == ("Stable Diffusion 1", "Stable Diffusion XL")


def test_names_that_several_models_have_contradict_none_of_them(tmp_path: Path) -> None:
    path, outer = tmp_path / "a.safetensors", pair("lora_unet_down_blocks_3_resnets_0_conv1", 1280)
    inner = pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 640)
    inner |= pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 768)  # an encoder that Stable Diffusion 1 and XL share
    for tensors, version in ((outer, "sd_v1"), (outer, "sd_v2"), (inner, "sdxl_base_v1-0")):
        save_file(tensors, path, {"ss_base_model_version": version})
        assert formats.inspect(path).origin.other == ""


def test_a_base_is_named_whatever_its_version(tmp_path: Path) -> None:
    save_file(pair("lora_unet_x", 64), tmp_path / "a.safetensors", {"ss_sd_model_name": "v1-5.ckpt"})
    assert formats.inspect(tmp_path / "a.safetensors").base == {"name": "v1-5.ckpt"}


@pytest.mark.slow
def test_words_tags_hashes_and_methods_are_told_by_the_command(tmp_path: Path) -> None:
    tensors = pair("lora_unet_mid_block_attentions_0_proj_in", 64) | {"bundle_emb.sumi.clip_l": torch.ones(2, 32)}
    tags = {"3_ink": {"ink": 5, "1girl": 7, " red": 2}, "1_more": {"ink": 4}}
    metadata = {
        "ss_tag_frequency": json.dumps(tags),
        "modelspec.trigger_phrase": "ink style",
        "sshs_model_hash": "0" * 64,
        "sshs_legacy_hash": "12345678",
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata)
    (told,) = json.loads(command("inspect", path, "--json").stdout)["files"]
    assert told["triggers"] == ["ink style", "sumi"] and list(told["tags"].items()) == [("ink", 9), ("1girl", 7), ("red", 2)]
    assert told["methods_by_component"] == {"unet": {"lora": 1}, "text_encoder": {"tokens": 1}}
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert told["hashes"] == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "autov2": hashlib.sha256(data).hexdigest()[:10],
        "data": hashlib.sha256(data[8 + length :]).hexdigest(),
        "told": "0" * 64,
        "legacy": "12345678",
    }
    alone = tmp_path / "b.safetensors"
    save_file({name: one for name, one in tensors.items() if name.startswith("lora_")}, alone, metadata)
    shown = " ".join(command("inspect", alone, "--norms", "--plot", tmp_path / "norms.png").stdout.split())
    assert "so the tensors were changed since" in shown.replace("│ │ ", "") and "ink 9" in shown and "45.25" in shown
    assert Image.open(tmp_path / "norms.png").width > 500


FILES = ("a.safetensors", "a.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_norms_are_those_of_the_changes(name: str, tmp_path: Path) -> None:
    """Against the products written out, with alpha, for layers, convolutions, whole changes, norms and LoKr."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    down, up, mid = random(3, 8), random(6, 3), "lora_unet_mid_block"
    kernel, flat = random(3, 8, 3, 3), random(6, 3, 1, 1)
    one, two, whole, bias = random(2, 2), random(3, 4), random(6, 8), random(6)
    tensors = {
        f"{mid}_a.lora_down.weight": down, f"{mid}_a.lora_up.weight": up, f"{mid}_a.alpha": torch.tensor(6.0),
        f"{mid}_b.lora_down.weight": kernel, f"{mid}_b.lora_up.weight": flat,
        f"{mid}_c.lokr_w1": one, f"{mid}_c.lokr_w2": two,
        f"{mid}_d.diff": whole, f"{mid}_d.diff_b": bias,
        f"{mid}_e.diff": bias.clone(),
        f"{mid}_f.lora_down.weight": down.clone(), f"{mid}_f.lora_up.weight": up.clone(),
        f"{mid}_f.dora_scale": random(6, 1),
    }  # fmt: skip
    if name.endswith(".pt"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    expected = {
        "a": 2 * float((up @ down).norm()),
        "b": float((flat.flatten(1) @ kernel.flatten(1)).norm()),
        "c": float(torch.kron(one, two).norm()),
        "d": float(whole.norm()),
        "e": float(bias.norm()),
    }
    found = {one.site.rpartition("_")[2]: one for one in norms(plan(tmp_path / name))}
    decomposed = found.pop("f")
    assert decomposed.weight is None and "depends on the weight" in decomposed.note
    assert {key: one.weight for key, one in found.items()} == pytest.approx(expected, rel=1e-5)
    assert found["d"].bias == pytest.approx(float(bias.norm()))


@pytest.mark.slow
def test_the_norm_of_a_dora_is_known_with_its_base(tiny_base: Path, tmp_path: Path) -> None:
    generator, site = torch.Generator().manual_seed(4), "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator)
    magnitudes, name = torch.rand(32, 1, generator=generator), f"lora_unet_{site.replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(4.0), "dora_scale": magnitudes}
    save_file({f"{name}.{suffix}": one for suffix, one in tensors.items()}, tmp_path / "a.safetensors")
    weight = make_pipe().unet.get_submodule(site).weight.detach()
    merged = weight + up @ down
    change = merged * magnitudes / merged.norm(dim=1, keepdim=True) - weight
    shown = command("inspect", tmp_path / "a.safetensors", "--norms", "--base", tiny_base)
    assert f"{float(change.norm()):.4g}" in shown.stdout, shown.stderr


@pytest.mark.slow
def test_the_norm_of_a_weight_that_takes_the_place_of_the_bases_is_that_of_their_difference(
    tiny_base: Path, tmp_path: Path
) -> None:
    """ComfyUI's ``set_weight``: only the base tells what it changes."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    own, weight = (
        torch.randn(32, 32, generator=torch.Generator().manual_seed(4)),
        make_pipe().unet.get_submodule(path).weight,
    )
    save_file({f"lora_unet_{path.replace('.', '_')}.set_weight": own}, tmp_path / "a.safetensors")
    (unknown,) = norms(plan(tmp_path / "a.safetensors"))
    assert unknown.weight is None and "name it with --base" in unknown.note
    (found,) = norms(plan(tmp_path / "a.safetensors"), str(tiny_base))
    assert found.weight == pytest.approx(float((own - weight).norm()), rel=1e-5)


STRANGERS = {
    "checkpoint": (
        {"model.diffusion_model.input_blocks.0.0.weight": (4, 4)},
        "is a checkpoint, of a whole model, .*extract",
    ),
    "flux": (
        {
            f"lora_unet_double_blocks_0_img_attn_qkv.lora_{end}.weight": shape
            for end, shape in (("down", (4, 8)), ("up", (24, 4)))
        },
        r"is for Flux\.1, told by the names .*; this package runs none of that",
    ),
    "unknown": (
        {"lora_unet_mid_block_resnets_0_conv1.nobodys": (4, 4)},
        r"tensors are of no method that is known here \(1\): lora_unet",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRANGERS)
def test_what_a_folder_holds_beside_adapters_is_named(kind: str, tmp_path: Path) -> None:
    shapes, said = STRANGERS[kind]
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=said):
        pd.convert(pd.ConvertConfig(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))


@pytest.mark.slow
def test_a_plot_is_of_one_file_and_no_adapter_is_drawn_over(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.safetensors", make_pipe(), parts=("text_encoder",))
    before = load_file(path)
    refused = command("inspect", path, "--plot", path)
    assert refused.returncode and "--plot" in refused.stderr and load_file(path).keys() == before.keys()


_TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
_PAIR = {"lora_down.weight": (2, 320), "lora_up.weight": (320, 2)}
# The tensors of a site, and those of them without which the rest is still of the method, and no use.
_NEEDED: dict[str, tuple[Mapping[str, tuple[int, ...]], tuple[str, ...]]] = {
    "lora": (_PAIR, ("lora_up.weight",)),
    "dora": ({**_PAIR, "dora_scale": (320, 1)}, ("lora_up.weight",)),
    "loha": (
        {"hada_w1_a": (320, 2), "hada_w1_b": (2, 320), "hada_w2_a": (320, 2), "hada_w2_b": (2, 320)},
        ("hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ),
    "lokr": ({"lokr_w1": (4, 4), "lokr_w2_a": (80, 2), "lokr_w2_b": (2, 80)}, ("lokr_w2_a", "lokr_w2_b")),
    "glora": (
        {"a1.weight": (2, 320), "a2.weight": (320, 2), "b1.weight": (2, 320), "b2.weight": (320, 2)},
        ("a2.weight", "b1.weight", "b2.weight"),
    ),
    "boft": ({"boft_R": (1, 40, 8, 8), "boft_s": (320, 1)}, ("boft_s",)),
    "ia3": ({"on_input": (1,), "weight": (320,)}, ("weight",)),
}


@pytest.mark.parametrize(("method", "lost"), [(name, lost) for name, (_, needed) in _NEEDED.items() for lost in needed])
def test_what_loading_calls_damaged_is_told_as_that(method: str, lost: str, tmp_path: Path) -> None:
    """A site that lacks a tensor was shown as a sound one."""
    path, base = tmp_path / "style.safetensors", skeleton("sd1")
    whole = {f"{_TO_Q}.{name}": torch.ones(shape) for name, shape in _NEEDED[method][0].items()}
    save_file(whole, path)
    assert not [one for one in formats.inspect(path).warnings if "damaged" in one]
    load(path, base)
    save_file({name: tensor for name, tensor in whole.items() if name != f"{_TO_Q}.{lost}"}, path)
    assert [one for one in formats.inspect(path).warnings if one.endswith(f": {lost} is missing; the file is damaged")]
    with pytest.raises(UserError, match=f"{lost} is missing; the file is damaged"):
        load(path, base)


def test_layouts_that_nothing_writes_are_not_offered(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        find("nothing")
    offered = str(refused.value).partition("there are: ")[2].split(", ")
    for layout in known().values():
        writes = layout.name in offered
        assert writes != isinstance(layout, ReadOnly)
        if not writes:
            with pytest.raises(UserError, match=f"nothing writes files of the layout '{layout.name}'; take one of"):
                find(layout.name)


def test_convert_tells_a_wrong_layout_without_torch(tmp_path: Path) -> None:
    save_file(pair(_TO_Q, 320), tmp_path / "style.safetensors")
    config = ConvertConfig(tmp_path / "style.safetensors", tmp_path / "out.safetensors", to="open_clip")
    with pytest.raises(UserError, match="nothing writes files of the layout 'open_clip'"):
        config.check()
    with pytest.raises(UserError, match="is no safetensors file"):
        (tmp_path / "bad.safetensors").write_bytes(b"nothing")
        ConvertConfig(tmp_path / "bad.safetensors", tmp_path / "out.safetensors").check()
