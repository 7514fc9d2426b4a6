"""What other programs make of a file is what they do make of it: their own loaders, and facts of their sources."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from safetensors.torch import load_file, save_file
from test_convert import CLIP, KOHYA, foreign, made, run
from torch import Tensor

from peft_diffusion.bases.skeleton import skeleton
from peft_diffusion.cli.app import main
from peft_diffusion.tools.key_maps import PROGRAMS
from peft_diffusion.tools.verify import Verified, verify

ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn1"
STEMS = {program.name: program.stems for program in PROGRAMS}


def verified(path: Path, base: str | None = None) -> dict[str, Verified]:
    return {one.program: one for one in verify(path, base=base)}


def with_alphas(path: Path, alphas: dict[str, float]) -> Path:
    """LoRAs of rank 4 of the tiny base, by their names behind the prefix."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, alpha in alphas.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 32, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(32, 4, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@pytest.mark.slow
def test_the_error_of_diffusers_is_that_of_its_own_pipeline(tiny_base: Path, tmp_path: Path) -> None:
    """It gives all modules the alpha that most have."""
    alphas = {f"lora_unet_{ATTENTION}_to_{one}": alpha for one, alpha in (("q", 4.0), ("k", 4.0), ("v", 1.0))}
    path = with_alphas(tmp_path / "a.safetensors", alphas)
    found = verified(path, str(tiny_base))["diffusers"]
    pipe: Any = make_pipe()
    pipe.load_lora_weights(str(path))
    layer = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v")
    tensors = load_file(path)
    up, down = (tensors[f"lora_unet_{ATTENTION}_to_v.lora_{half}.weight"] for half in ("up", "down"))
    meant = up @ down * 0.25
    theirs = layer.get_delta_weight(next(iter(layer.lora_A)))
    assert found.error is not None
    assert found.error > 0.1
    assert found.error == pytest.approx(float((theirs - meant).norm() / meant.norm()), rel=1e-4)
    assert found.worst == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    assert "off by up to" in found.line()


@pytest.mark.slow
def test_what_the_pipeline_of_diffusers_refuses_is_told_with_its_words(tiny_base: Path, tmp_path: Path) -> None:
    path = with_alphas(tmp_path / "a.safetensors", {f"lora_unet_{ATTENTION}_to_q": 4.0, f"lora_te_{CLIP}": 4.0})
    pipe: Any = make_pipe()
    with pytest.raises(ValueError, match="infer state dict type"):
        pipe.load_lora_weights(str(path))
    assert "infer state dict type" in verified(path, str(tiny_base))["diffusers"].line()


@pytest.mark.slow
def test_diffusers_drops_the_added_embedding_of_kohyas_names(tmp_path: Path) -> None:
    pipe: Any = make_xl_pipe()
    pipe.save_pretrained(tmp_path / "base")
    outputs, inputs = pipe.unet.add_embedding.linear_1.weight.shape
    name = "lora_unet_add_embedding_linear_1"
    path, site = tmp_path / "a.safetensors", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{site}.lora_down.weight": torch.randn(4, 64), f"{site}.lora_up.weight": torch.randn(64, 4)}
    added = {f"{name}.lora_down.weight": torch.ones(2, inputs), f"{name}.lora_up.weight": torch.ones(outputs, 2)}
    save_file(tensors | added, path)
    found = verified(path, str(tmp_path / "base"))
    assert set(found["diffusers"].dropped) == set(added)
    assert found["ComfyUI"].coverage == 1
    assert found["ComfyUI"].error == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora-scaled", "locon", "loha", "loha-conv", "lokr"])
def test_formulas_of_the_maps_agree_with_the_loader_of_lycoris(method: str, tiny_base: Path, tmp_path: Path) -> None:
    found = verified(made(tmp_path / "a.safetensors", method), str(tiny_base))
    for program in ("LyCORIS", "ComfyUI", "Forge", "InvokeAI"):
        one = found[program]
        assert one.coverage == 1
        assert one.error == pytest.approx(0, abs=1e-5)


SITE = f"lora_unet_{ATTENTION}_to_q"


def weight_of_the_tiny_base() -> Tensor:
    pipe: Any = make_pipe()
    weight: Tensor = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q").weight.detach()
    return weight


@pytest.mark.slow
@pytest.mark.parametrize("side", [0, 1])
def test_of_a_dora_each_program_is_told_by_its_own_formula(side: int, tiny_base: Path, tmp_path: Path) -> None:
    """A1111 and InvokeAI divide by the norms of inputs always; ComfyUI, for outputs, by those of the base's own weight."""
    path, weight = with_alphas(tmp_path / "a.safetensors", {SITE: 2.0}), weight_of_the_tiny_base()
    tensors, shape = load_file(path), (32, 1) if side == 0 else (1, 32)
    magnitudes = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(1))
    save_file({**tensors, f"{SITE}.dora_scale": magnitudes}, path)
    merged = weight + 0.5 * tensors[f"{SITE}.lora_up.weight"] @ tensors[f"{SITE}.lora_down.weight"]
    of_inputs, of_outputs = merged.norm(dim=0, keepdim=True), merged.norm(dim=1, keepdim=True)
    meant = merged * magnitudes / (of_outputs if side == 0 else of_inputs) - weight
    comfy = merged * magnitudes / (weight.norm(dim=1, keepdim=True) if side == 0 else of_inputs) - weight
    a1111 = merged * magnitudes / of_inputs - weight
    found = verified(path, str(tiny_base))
    for program, theirs in (("ComfyUI", comfy), ("Forge", comfy), ("A1111", a1111), ("InvokeAI", a1111)):
        error = float((theirs - meant).norm() / meant.norm())
        assert found[program].error == pytest.approx(error, rel=1e-3, abs=1e-5), program
        assert (error < 1e-5) is (side == 1)
    if side == 0:
        assert found["LyCORIS"].error == pytest.approx(0, abs=1e-5)
    else:  # its loader takes magnitudes of outputs alone
        assert found["LyCORIS"].coverage == 0


@pytest.mark.slow
def test_a_dora_is_merged_by_peft_itself_as_it_is_meant(tiny_base: Path, tmp_path: Path) -> None:
    there = run(made(tmp_path / "a.safetensors", "dora"), tmp_path / "b.safetensors", to="diffusers", base=str(tiny_base))
    found = verified(there, str(tiny_base))["diffusers"]
    assert found.coverage == 1
    assert found.measured > 0
    assert found.error == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_of_rotations_and_factors_it_is_told_how_far_off_they_are(tiny_base: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks, factors = 0.2 * torch.randn(8, 4, 4, generator=generator), torch.randn(32, generator=generator)
    turned = {f"{SITE}.oft_blocks": blocks, f"{SITE}.alpha": torch.tensor(0.0)}
    save_file(turned, tmp_path / "oft.safetensors")
    found = verified(tmp_path / "oft.safetensors", str(tiny_base))
    assert found["ComfyUI"].error == pytest.approx(0, abs=1e-5)
    assert found["A1111"].error == pytest.approx(0, abs=1e-5)
    save_file({f"{SITE}.weight": factors, f"{SITE}.on_input": torch.tensor(False)}, tmp_path / "ia3.safetensors")
    found = verified(tmp_path / "ia3.safetensors", str(tiny_base))
    for program in ("A1111", "InvokeAI"):
        assert found[program].error == pytest.approx(0, abs=1e-5)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def errors(tensors: dict[str, Tensor], path: Path, base: Path) -> dict[str, Verified]:
    save_file({f"{SITE}.{name}": one for name, one in tensors.items()}, path)
    return verified(path, str(base))


def off(theirs: Tensor, meant: Tensor) -> Any:
    return pytest.approx(float((theirs - meant).norm() / meant.norm()), rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_of_a_glora_each_program_is_told_by_its_own_formula(first: bool, tiny_base: Path, tmp_path: Path) -> None:
    """A1111's ``network_glora.py`` has LyCORIS' first version without alpha; ComfyUI's ``glora.py`` both."""
    a1, a2, b1, b2 = noise(32, 4), noise(4, 32), noise(32, 4) + 1, noise(4, 32) + 1
    sides = (a2, a1, b2, b1) if first else (a1, a2, b1, b2)
    tensors = {f"{name}.weight": one.contiguous() for name, one in zip(("a1", "a2", "b1", "b2"), sides, strict=True)}
    found = errors({**tensors, "alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors", tiny_base)
    change = weight_of_the_tiny_base() @ a1 @ a2 + b1 @ b2
    for program in ("ComfyUI", "Forge"):
        assert (found[program].coverage, found[program].error) == (1, off(change, change))
    # It fails at shapes of the second, and then draws without.
    assert found["A1111"].error == off(change if first else torch.zeros(32, 32), 0.5 * change)
    assert found["InvokeAI"].refused
    if not first:
        assert found["LyCORIS"].error == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("constraint", [0.0, 0.01])
def test_of_a_boft_each_program_is_told_by_its_own_formula(constraint: float, tiny_base: Path, tmp_path: Path) -> None:
    """To ComfyUI alpha is the most that the norm of all skew matrices may be, to LyCORIS and A1111 alpha times the outputs
    (https://github.com/Comfy-Org/ComfyUI/issues/15066)."""
    from lycoris.modules.boft import ButterflyOFTModule

    blocks, rescale, weight = 0.2 * noise(4, 8, 4, 4), 1 + 0.1 * noise(32, 1), weight_of_the_tiny_base()
    tensors = {"oft_blocks": blocks, "rescale": rescale, "alpha": torch.tensor(constraint)}
    found = errors(tensors, tmp_path / "a.safetensors", tiny_base)
    layer = torch.nn.Linear(32, 32, bias=False)
    layer.weight.data = weight.clone()
    changes = {}
    for outputs in (1, 32):  # what LyCORIS multiplies by itself is taken out for ComfyUI
        with torch.no_grad():
            alpha = torch.tensor(constraint * outputs / 32)
            made: Any = ButterflyOFTModule.make_module_from_state_dict("a", layer, blocks, rescale, alpha)
            changes[outputs] = made.get_diff_weight(1.0)[0]
    assert found["A1111"].error == off(changes[32], changes[32])
    assert found["LyCORIS"].error == pytest.approx(0, abs=1e-5)
    assert found["ComfyUI"].error == off(changes[1], changes[32])
    assert (found["ComfyUI"].error > 0.1) is (constraint > 0)  # type: ignore[operator]
    assert found["Forge"].coverage == 0
    assert found["InvokeAI"].refused


@pytest.mark.slow
@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("side", [0, 1])
def test_of_magnitudes_on_other_methods_each_program_is_told_by_its_own_formula(
    method: str, side: int, tiny_base: Path, tmp_path: Path
) -> None:
    weight, shape = weight_of_the_tiny_base(), (32, 1) if side == 0 else (1, 32)
    if method == "loha":
        parts = {
            f"hada_w{number}_{half}": noise(*size) for number in (1, 2) for half, size in (("a", (32, 4)), ("b", (4, 32)))
        }
        change = 0.5 * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    else:
        parts = {"lokr_w1": noise(4, 4), "lokr_w2_a": noise(8, 2), "lokr_w2_b": noise(2, 8)}
        change = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    magnitudes, merged = 1 + noise(*shape).abs(), weight + change
    tensors = {**parts, "alpha": torch.tensor(2.0), "dora_scale": magnitudes}
    found = errors(tensors, tmp_path / "a.safetensors", tiny_base)
    of_inputs, of_outputs = merged.norm(dim=0, keepdim=True), merged.norm(dim=1, keepdim=True)
    meant = merged * magnitudes / (of_outputs if side == 0 else of_inputs) - weight
    comfy = merged * magnitudes / (weight.norm(dim=1, keepdim=True) if side == 0 else of_inputs) - weight
    a1111 = merged * magnitudes / of_inputs - weight
    for program, theirs in (("ComfyUI", comfy), ("Forge", comfy), ("A1111", a1111)):
        assert found[program].error == off(theirs, meant), program
    if side == 0:
        assert found["LyCORIS"].error == pytest.approx(0, abs=1e-5)
    assert "dora_scale" in found["InvokeAI"].refused  # it takes all that has magnitudes for a LoRA, and fails


@pytest.mark.slow
def test_lycoris_finds_modules_of_xl_by_the_names_of_the_network_that_it_is_given(tmp_path: Path) -> None:
    from lycoris import kohya

    sgm, ours = (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    )
    text = f"lora_te2_{CLIP}"
    for path, of_diffusers in ((sgm, False), (ours, True)):
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors: dict[str, Tensor] = {}
        for stem, width in ((name, 640), (text, 1280)):
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = (
                torch.ones(2, width),
                torch.ones(width, 2),
            )
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
        file = tmp_path / f"{of_diffusers}.safetensors"
        save_file(tensors, file)
        found = verified(file)
        for program, network, reads in (
            ("LyCORIS", ours, of_diffusers),
            ("LyCORIS in kohya's scripts", sgm, not of_diffusers),
        ):
            unet = torch.nn.Module()
            *around, last = network.split(".")
            inside = unet
            for word in around:
                inside.add_module(word, torch.nn.Module())
                inside = inside.get_submodule(word)
            inside.add_module(last, torch.nn.Linear(640, 640, bias=False))
            theirs, _ = kohya.create_network_from_weights(1.0, str(file), None, None, unet)
            assert (len(theirs.unet_loras) == 1) is reads
            assert found[program].coverage == (1 if reads else 0.5)


@pytest.mark.slow
def test_peft_opens_its_own_layout(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.safetensors", dtype=torch.float32)
    found = verified(run(source, tmp_path / "peft", to="peft", component=("unet",)), "sd1")["peft"]
    assert (found.coverage, found.measured) == (1, 1)
    assert found.error == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_an_alpha_in_the_metadata_is_seen_by_diffusers_and_lost_on_comfyui(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.safetensors", dtype=torch.float32)
    found = verified(run(source, tmp_path / "b.safetensors", to="diffusers"))
    assert found["diffusers"].error == pytest.approx(0, abs=1e-5)
    comfy = found["ComfyUI"]
    assert comfy.error == pytest.approx(4 / 0.7 - 1, rel=1e-3)  # alpha 0.7, rank 4
    assert comfy.coverage == 0.5  # today's names of attention in the UNet are unknown to it


@pytest.mark.slow
def test_maps_are_those_of_the_sources() -> None:
    """Names from the sources of the programs, and what each is known for not to read."""
    xl, sd1 = skeleton("sdxl"), skeleton("sd1")
    sgm, flat = "input_blocks.4.1.transformer_blocks.0.attn1.to_q", KOHYA.removeprefix("lora_unet_")
    comfy = STEMS["ComfyUI"](xl)
    assert comfy[f"diffusion_model.{sgm}"] == comfy[f"lora_unet_{sgm.replace('.', '_')}"]
    assert comfy[f"lycoris_{flat}"] == comfy[f"lora_unet_{flat}"]
    dotted = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert comfy[f"unet.{dotted}.processor.to_out"] == ("unet", f"{dotted}.to_out.0")
    assert f"unet.{dotted}.to_q" not in comfy
    assert "lora_unet_add_embedding_linear_1" in comfy
    assert f"lora_te2_{CLIP}" in comfy
    assert f"lycoris_{flat}" not in STEMS["Forge"](xl)
    a1111 = STEMS["A1111"](xl)
    assert "lora_unet_up_blocks_0_upsamplers_0_conv" not in a1111  # its rule gives 2_1, which is an attention there
    assert "lora_unet_up_blocks_0_upsamplers_0_conv" in STEMS["A1111"](sd1)
    assert "lora_unet_add_embedding_linear_1" not in a1111
    assert "lora_unet_label_emb_0_0" in a1111
    assert a1111[f"lora_unet_{flat}"] == comfy[f"lora_unet_{flat}"]
    assert f"oft_unet_{sgm.replace('.', '_')}" in a1111
    assert f"lora_te1_{CLIP}" in STEMS["A1111"](sd1)  # "some SD1 Loras also have correct compvis keys"
    assert f"lora_te1_{CLIP}" not in STEMS["A1111"](skeleton("sd2"))
    kohya = STEMS["kohya"](sd1)
    assert "lora_unet_conv_in" not in kohya
    assert KOHYA in kohya
    # As `create_network` of sd-scripts counts them: 192 layers of transformers, and 66 convolutions and embeddings of time.
    assert sum("attentions" in path for name, path in kohya.values() if name == "unet") == 192
    assert sum(name == "text_encoder" for name, _ in kohya.values()) == 72
    assert f"lora_te_{CLIP}" in STEMS["InvokeAI"](sd1)
    assert f"lora_te1_{CLIP}" in STEMS["InvokeAI"](xl)


@pytest.mark.slow
def test_an_alpha_of_0_and_norms_mean_what_each_program_makes_of_them(tiny_base: Path, tmp_path: Path) -> None:
    site = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = {f"{site}.lora_{half}.weight": torch.ones(shape) for half, shape in (("down", (2, 32)), ("up", (32, 2)))}
    norm = {f"lora_unet_conv_norm_out.{end}": torch.ones(32) for end in ("w_norm", "b_norm")}
    save_file({**pair, f"{site}.alpha": torch.tensor(0.0), **norm}, tmp_path / "a.safetensors")
    found = verified(tmp_path / "a.safetensors", str(tiny_base))
    for program, sites, error in (("kohya", 1, 0), ("A1111", 1, 1), ("ComfyUI", 2, 1)):  # to kohya's it is none
        assert (found[program].measured, found[program].error) == (sites, error)
    if "LyCORIS" in found:
        assert found["LyCORIS"].measured == 2
        assert found["LyCORIS"].error == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_invoke_refuses_a_file_with_one_site_of_an_unknown_kind(tiny_base: Path, tmp_path: Path) -> None:
    found = verified(made(tmp_path / "a.safetensors", "oft"), str(tiny_base))["InvokeAI"]
    assert found.coverage == 0
    assert "refuses the file: it knows no tensors such as lora_unet_" in found.line()


@pytest.mark.parametrize(
    ("names", "readers"),
    [
        (["emb_params"], {"diffusers", "ComfyUI", "Forge", "A1111", "InvokeAI"}),
        (["clip_l", "clip_g"], {"ComfyUI", "Forge", "A1111", "InvokeAI"}),
        (["<s0>", "<s1>"], set()),
    ],
)
def test_words_are_read_as_words(names: list[str], readers: set[str], tmp_path: Path) -> None:
    save_file({name: torch.randn(1, 1280 if name == "clip_g" else 768) for name in names}, tmp_path / "word.safetensors")
    found = verified(tmp_path / "word.safetensors")
    assert {name for name, one in found.items() if one.coverage == 1} == readers
    assert {"LyCORIS", "kohya"}.isdisjoint(found)
    pipe: Any = make_pipe()
    with nullcontext() if "diffusers" in readers else pytest.raises(ValueError, match="state dictionary is incorrect"):
        pipe.load_textual_inversion({name: torch.ones(1, 32) for name in names}, token="zxc")


@pytest.mark.slow
def test_the_commands_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = foreign(tmp_path / "a.safetensors")
    assert main(["convert", str(source), str(tmp_path / "b.safetensors"), "--to", "omi", "--verify"]) == 0
    assert "ComfyUI: reads 0% (0 of 6 tensors); drops 6: it knows no module of that name" in capsys.readouterr().out
    assert main(["inspect", str(source), "--verify", "--json"]) == 0
    told = {one["program"]: one for one in json.loads(capsys.readouterr().out)["files"][0]["verified"]}
    assert told["ComfyUI"]["read"] == 6
    assert told["ComfyUI"]["error"] < 1e-6
