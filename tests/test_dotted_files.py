"""Files of diffusers, peft and ComfyUI, and SDXL files of kohya's, mean here what they mean there."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from language import make_lm
from original import _unet
from safetensors.torch import load_file, save_file
from test_formats import write_adapter

from peft_diffusion import formats
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.formats.container import Entry, Header
from peft_diffusion.formats.layout import known, reader_of
from peft_diffusion.formats.layouts.original import original_names
from peft_diffusion.formats.names import site_name
from peft_diffusion.generation import Adapters

LAYERS = r".*\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
torch.set_num_threads(1)


def unet_output(pipe: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = pipe.unet(x, torch.tensor(500), encoder_hidden_states=text).sample
    return found


def text_output(pipe: DiffusionPipeline) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = pipe.text_encoder(torch.arange(2, 20)[None]).last_hidden_state
    return found


def learned(module: torch.nn.Module) -> None:
    """Give peft's adapter values that matter."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if any(kind in name for kind in ("lora_", "hada_", "lokr_", "ia3_")):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def with_peft(pipe: DiffusionPipeline, text: bool = False, **changes: Any) -> None:
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=LAYERS, **changes))
    learned(pipe.unet)
    if text:
        pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], **changes))
        learned(pipe.text_encoder)


def saved_by_diffusers(pipe: DiffusionPipeline, folder: Path, text: bool = False, metadata: bool = True) -> Path:
    """As the newer training scripts save."""
    from peft.utils import get_peft_model_state_dict

    parts = {"unet": pipe.unet, **({"text_encoder": pipe.text_encoder} if text else {})}
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
    extra = {f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() for name, part in parts.items()}
    pipe.save_lora_weights(folder, **layers, **(extra if metadata else {}))
    return folder / "pytorch_lora_weights.safetensors"


CASES: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 12, "ff.net.2": 1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet+text"])
@pytest.mark.parametrize("case", CASES)
def test_files_of_diffusers_mean_the_same(case: str, text: bool, tmp_path: Path) -> None:
    theirs, ours = make_pipe(), make_pipe()
    plain = unet_output(ours)
    with_peft(theirs, text, **CASES[case])
    path = saved_by_diffusers(theirs, tmp_path, text)
    loaded = formats.load(path, ours, strict=True)
    assert loaded.warnings == ()
    Adapters(ours).load(path)
    expected = unet_output(theirs)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(unet_output(ours), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text_output(ours), text_output(theirs), atol=1e-5, rtol=1e-4)
    found = formats.inspect(path)
    assert found.methods == ("lora",) and found.unknown == () and set(found.components) >= {"unet"}


@pytest.mark.slow
def test_a_file_without_metadata_has_the_rank_as_alpha(tmp_path: Path) -> None:
    theirs, ours = make_pipe(), make_pipe()
    with_peft(theirs, r=4, lora_alpha=4)
    Adapters(ours).load(saved_by_diffusers(theirs, tmp_path, metadata=False))
    torch.testing.assert_close(unet_output(ours), unet_output(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_what_save_lora_adapter_writes_has_no_prefix(tmp_path: Path) -> None:
    theirs, ours = make_pipe(), make_pipe()
    with_peft(theirs, r=4, lora_alpha=8)
    theirs.unet.save_lora_adapter(tmp_path)
    Adapters(ours).load(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(unet_output(ours), unet_output(theirs), atol=1e-5, rtol=1e-4)


# What each name means: the layout, the component, the site and the method's suffix.
NAMES = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight":
        ("diffusers", "unet", "mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "lora_down.weight"),
    "unet.a.attn1.processor.to_out_lora.up.weight": ("diffusers", "unet", "a_attn1_to_out_0", "lora_up.weight"),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.lora_up.weight":
        ("diffusers", "text_encoder", "encoder_layers_1_mlp_fc1", "lora_up.weight"),
    "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1.lora_A.weight":
        ("diffusers", "text_encoder_2", "encoder_layers_1_mlp_fc1", "lora_down.weight"),
    "diffusion_model.out.2.diff_b": ("original", "unet", "out_2", "diff_b"),
    "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.up.weight":
        ("diffusers", "text_encoder", "encoder_layers_1_mlp_fc1", "lora_up.weight"),
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_B.weight":
        ("diffusers", "text_encoder_2", "encoder_layers_1_mlp_fc1", "lora_up.weight"),
    "diffusion_model.input_blocks.4.1.proj_in.lora_down.weight":
        ("original", "unet", "input_blocks_4_1_proj_in", "lora_down.weight"),
    "diffusion_model.input_blocks.4.1.proj_in.alpha": ("original", "unet", "input_blocks_4_1_proj_in", "alpha"),
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight":
        ("peft", "lm", "model_layers_0_mlp_up_proj", "lora_down.weight"),
    "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector":
        ("peft", "lm", "model_layers_0_mlp_up_proj", "dora_scale"),
    "base_model.model.model.layers.0.mlp.up_proj.hada_w1_a": ("peft", "lm", "model_layers_0_mlp_up_proj", "hada_w1_a"),
    # What is in another layout, or no adapter's.
    "lora_unet_mid_block.lora_down.weight": ("kohya", "unet", "mid_block", "lora_down.weight"),
    "lora_unet_input_blocks_4_1_proj_in.lora_A.weight": ("original", "unet", "input_blocks_4_1_proj_in", "lora_down.weight"),
    "lycoris_model_layers_0_mlp_up_proj.alpha": ("kohya", "lm", "model_layers_0_mlp_up_proj", "alpha"),
    "lora_A.weight": None,
    "clip_l": ("embedding", "text_encoder", "embeddings_token_embedding", "tokens_vectors"),
    "model.layers.0.mlp.up_proj.weight": None,
    "peft_diffusion.unet.mid.bottleneck_down": ("kohya", "unet", "mid", "bottleneck_down"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_of_one_layout_and_means_one_tensor(name: str) -> None:
    found = reader_of(name, known().values())
    if found is None:
        assert NAMES[name] is None
    else:
        header = Header(Path("a"), {}, {name: Entry("F32", (2, 2), 0, 16)}, 16)
        place = found.read(header, [name]).places[name]
        assert (found.name, place.component, site_name(place.site), place.suffix) == NAMES[name]


LM_LAYERS = r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
OF_PEFT = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LM_LAYERS),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=LM_LAYERS),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=LM_LAYERS),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=LM_LAYERS),
    "lokr": peft.LoKrConfig(r=2, alpha=6, decompose_factor=4, target_modules=LM_LAYERS),
}


def assert_means_the_same(config: peft.PeftConfig, folder: Path, atol: float) -> Path:
    """Save what peft makes of a language model with this configuration, load it, and compare the logits."""
    base, ids = make_lm(), torch.arange(2, 30)[None]
    theirs = peft.get_peft_model(make_lm().lm, config).eval()
    learned(theirs)
    theirs.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    loaded = formats.load(path, base, strict=True)
    assert loaded.warnings == ()
    with torch.no_grad():
        plain = base.lm(ids).logits
        site.attach_built(base.lm, "a", loaded.components["lm"])
        ours, expected = base.lm(ids).logits, theirs(input_ids=ids).logits
    assert (plain - expected).abs().max() > 1e-2
    torch.testing.assert_close(ours, expected, atol=atol, rtol=1e-4)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_PEFT)
def test_files_of_peft_mean_the_same(kind: str, tmp_path: Path) -> None:
    path = assert_means_the_same(OF_PEFT[kind], tmp_path, atol=2e-5)
    found = formats.inspect(path)
    assert found.unknown == ()
    if isinstance(OF_PEFT[kind], peft.LoraConfig):  # the alpha that is told has the scale that peft takes
        model = peft.PeftModel.from_pretrained(make_lm().lm, str(tmp_path))
        scales = {one.scaling["default"] for one in model.modules() if isinstance(one, peft.tuners.lora.LoraLayer)}
        assert {alpha / 4 for alpha in found.alphas} == scales


@pytest.mark.slow
def test_a_file_of_peft_without_its_configuration_says_what_is_assumed(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make_lm().lm, OF_PEFT["lora"])
    theirs.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "kept")
    path = tmp_path / "adapter_model.safetensors"
    assert "no adapter_config.json" in formats.load(path, make_lm()).warnings[0]
    for text in ("{", "[1]"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=r"adapter_config\.json"):
            formats.load(path, make_lm())


@pytest.mark.slow
def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.zeros(2, 64), torch.zeros(64, 2)
    pair = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    save_file({**pair, f"{layer}.lora.down.weight": down.clone()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"lora\.down\.weight and .*lora_A\.weight are one tensor under two names"):
        formats.load(tmp_path / "a.safetensors", make_pipe())
    told = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_(": 3}}
    save_file(pair, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(UserError, match="is no regular expression"):
        formats.load(tmp_path / "a.safetensors", make_pipe())
    for broken in ("{", "[1]", json.dumps({"unet.lora_alpha": "four", "unet.alpha_pattern": 3})):
        save_file(pair, tmp_path / "a.safetensors", {"lora_adapter_metadata": broken})
        assert formats.load(tmp_path / "a.safetensors", make_pipe()).report.found == 2


@pytest.mark.parametrize("pipe", [make_pipe(), make_xl_pipe()], ids=["sd", "sdxl"])
def test_original_names_are_those_that_diffusers_converts(pipe: DiffusionPipeline) -> None:
    found = original_names(pipe.unet)
    expected = {name.rpartition(".")[0]: _unet(name, pipe.unet).rpartition(".")[0] for name in pipe.unet.state_dict()}
    assert {path: found[path] for path in expected} == expected
    assert len(set(found.values())) == len(found)
    assert original_names(pipe.text_encoder) == {}


@pytest.mark.slow
@pytest.mark.parametrize("dotted", [False, True], ids=["kohya", "comfy"])
def test_sdxl_files_with_names_of_the_original_load(dotted: bool, tmp_path: Path) -> None:
    own = write_adapter(tmp_path / "own.safetensors", make_xl_pipe(), target="all-linear", parts=("unet",))
    names = {path.replace(".", "_"): name for path, name in original_names(make_xl_pipe().unet).items()}
    renamed = {}
    for name, tensor in load_file(own).items():
        where, _, suffix = name.removeprefix("lora_unet_").partition(".")
        place = f"diffusion_model.{names[where]}" if dotted else f"lora_unet_{names[where].replace('.', '_')}"
        renamed[f"{place}.{suffix}"] = tensor
    save_file(renamed, tmp_path / "theirs.safetensors")
    first, second = (formats.load(path, make_xl_pipe(), strict=True) for path in (own, tmp_path / "theirs.safetensors"))
    assert first.components["unet"].keys() == second.components["unet"].keys()
    for path, adapter in first.components["unet"].items():
        for name, tensor in adapter.state().items():
            assert torch.equal(tensor, second.components["unet"][path].state()[name])
    told = formats.inspect(tmp_path / "theirs.safetensors")
    assert told.components == {"unet": len(first.components["unet"])} and dict(told.ranks) == {4: told.components["unet"]}


def test_what_is_no_adapter_is_still_none(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    for look in (formats.inspect, lambda path: formats.load(path, make_pipe())):
        with pytest.raises(UserError, match="is a checkpoint, of a whole model, and no adapter"):
            look(tmp_path / "a.safetensors")


# Where peft means something else than the kohya layout.


@pytest.mark.slow
@pytest.mark.parametrize("layers", [r".*\.proj_in", r".*down_blocks\.1\.resnets\.0\.conv[12]", r".*\.to_q"])
def test_magnitudes_of_peft_are_per_output(layers: str, tmp_path: Path) -> None:
    theirs, ours = make_pipe(), make_pipe()
    plain = unet_output(ours)
    theirs.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=layers))
    learned(theirs.unet)
    path = saved_by_diffusers(theirs, tmp_path)
    assert formats.load(path, ours, strict=True).warnings == ()
    Adapters(ours).load(path)
    expected = unet_output(theirs)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(unet_output(ours), expected, atol=1e-5, rtol=1e-4)


SCALES = {
    "whole factors": peft.LoKrConfig(r=32, alpha=8, decompose_factor=4, target_modules=LM_LAYERS),
    "whole factors of other ranks": peft.LoKrConfig(
        r=4, alpha=8, decompose_factor=4, target_modules=LM_LAYERS, rank_pattern={"q_proj": 64}, alpha_pattern={"q_proj": 16}
    ),
    "first factors": peft.LoKrConfig(r=1, alpha=4, decompose_both=True, target_modules=LM_LAYERS),
    "a pattern that means no layer": peft.LoraConfig(r=4, lora_alpha=4, alpha_pattern={"mlp": 16}, target_modules=LM_LAYERS),
    "a pattern that means one": peft.LoraConfig(
        r=4, lora_alpha=4, alpha_pattern={"layers.0.mlp.up_proj": 16}, target_modules=LM_LAYERS
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("case", SCALES)
def test_scales_of_peft_mean_the_same(case: str, tmp_path: Path) -> None:
    assert_means_the_same(SCALES[case], tmp_path, atol=1e-5)


@pytest.mark.slow
def test_a_beginning_that_changed_the_base_is_told(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=LM_LAYERS)
    peft.get_peft_model(make_lm().lm, config).save_pretrained(tmp_path)
    (warning,) = formats.load(tmp_path / "adapter_model.safetensors", make_lm()).warnings
    assert "began with pissa, which changed the weights of its base" in warning


@pytest.mark.slow
def test_short_names_with_the_ends_of_peft_load(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.safetensors", make_pipe(), parts=("unet",))
    ends = {"lora_down": "lora_A", "lora_up": "lora_B"}
    tensors = {".".join(ends.get(part, part) for part in name.split(".")): one for name, one in load_file(path).items()}
    save_file(tensors, tmp_path / "b.safetensors")
    one, two = (formats.load(file, make_pipe(), strict=True) for file in (path, tmp_path / "b.safetensors"))
    assert one.report == two.report and one.components["unet"].keys() == two.components["unet"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_brought_to_our_form_without_rounding_again(dtype: torch.dtype, tmp_path: Path) -> None:
    """peft widens the factors of an (IA)3 and of whole LoKrs before it computes with them."""
    kinds = (
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoKrConfig(r=32, alpha=7, target_modules=["q_proj"]),
    )
    for kind in kinds:
        model = peft.get_peft_model(make_pipe().text_encoder, kind)
        learned(model)
        model.save_pretrained(tmp_path / str(kind.peft_type))
        path = tmp_path / str(kind.peft_type) / "adapter_model.safetensors"
        save_file({name: (tensor * 0.3).to(dtype) for name, tensor in load_file(path).items()}, path)
        theirs, ours = make_pipe().text_encoder, make_pipe()
        before = {name: one.clone() for name, one in theirs.state_dict().items()}
        expected = peft.PeftModel.from_pretrained(theirs, path.parent).merge_and_unload().state_dict()
        adapters = Adapters(ours)
        adapters.load(path, strict=True)
        adapters.merge()
        for name, found in ours.text_encoder.state_dict().items():
            change = (expected[name] - before[name]).norm()
            assert (found - expected[name]).norm() <= 1e-5 * change
            assert bool(change > 0) is name.endswith("q_proj.weight")
