"""The adapter file: other programs read it, and nothing hostile gets through it."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline
from laws import randomize
from safetensors.torch import load_file, save_file

from peft_diffusion import formats
from peft_diffusion.bases import components, describe
from peft_diffusion.bases.taught import learned
from peft_diffusion.bases.words import teach, with_initial_tokens
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.meta import shapes_alone
from peft_diffusion.formats.container import Header
from peft_diffusion.formats.file import paths_by_name
from peft_diffusion.formats.layouts.kohya import Kohya
from peft_diffusion.formats.names import site_name
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.compatibility import compare
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.prompt import SoftPrompt
from peft_diffusion.methods.tokens import Tokens

PROMPT = "a red apple"


def picture(pipe: DiffusionPipeline, seed: int = 0, steps: int = 2) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    image = pipe(PROMPT, num_inference_steps=steps, height=64, width=64, generator=generator).images[0]
    return np.asarray(image).astype(int)


def write_adapter(
    path: Path,
    pipe: DiffusionPipeline,
    target: str = "attention+ff",
    alpha: float | None = None,
    rank: int = 4,
    seed: int = 3,
    parts: tuple[str, ...] = ("unet", "text_encoder"),
) -> Path:
    """A file with an adapter that changes the picture."""
    chosen = {name: part for name, part in components(pipe).items() if name in parts}
    for part in chosen.values():
        torch.manual_seed(seed)
        site.attach(part, "made", Lora(rank, alpha), target)
        randomize(part, "made", seed)
    spec = formats.Spec(
        methods={name: ({**Lora(rank, alpha).spec(), "target": target},) for name in chosen},
        base=asdict(describe(pipe)),
        triggers=("ink style",),
        training={"steps_done": 10, "unet_lr": 1e-3, "images": 7},
        title="ink",
    )
    formats.save(path, chosen, "made", spec)
    for part in chosen.values():
        site.detach(part, "made")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("target", ["attention+ff", "all-linear", "all"])
@pytest.mark.parametrize("parts", [("unet",), ("unet", "text_encoder")], ids=["unet", "unet+text"])
def test_diffusers_draws_the_same_picture(tmp_path: Path, target: str, parts: tuple[str, ...]) -> None:
    if target == "all" and len(parts) == 2:
        parts = ("unet",)  # CLIP has no convolution, so "all" says nothing new
    path = write_adapter(tmp_path / "ink.safetensors", make_pipe(), target, parts=parts)
    ours, theirs = make_pipe(), make_pipe()
    base = picture(ours)
    Adapters(ours).load(path)
    theirs.load_lora_weights(str(path))
    assert np.abs(picture(ours) - base).max() > 8
    assert np.abs(picture(ours) - picture(theirs)).max() <= 1


@pytest.mark.slow
def test_alpha_that_is_not_the_rank_means_the_same_to_diffusers_on_the_unet(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "ink.safetensors", make_pipe(), alpha=2.0, parts=("unet",))
    ours, theirs = make_pipe(), make_pipe()
    Adapters(ours).load(path)
    theirs.load_lora_weights(str(path))
    assert np.abs(picture(ours) - picture(theirs)).max() <= 1


def test_keys_and_metadata_are_those_that_kohya_writes(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "ink.safetensors", make_pipe())
    tensors = load_file(path)
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    for key in (unet, text):
        assert {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"} <= set(tensors)
        assert tensors[f"{key}.alpha"].item() == 4
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in tensors)
    found = formats.inspect(path)
    assert found.metadata["ss_network_dim"] == "4" and found.metadata["ss_network_module"] == "networks.lora"
    assert found.metadata["modelspec.sai_model_spec"] == "1.0.1" and found.metadata["ss_steps"] == "10"
    assert found.metadata["modelspec.trigger_phrase"] == "ink style"
    assert found.ranks == {4: len(found.sites)} and found.methods == ("lora",) and found.unknown == ()
    assert found.spec is not None and found.spec.triggers == ("ink style",)


def test_sdxl_files_name_both_encoders() -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                            eos_token_id=1, bos_token_id=0, pad_token_id=1)  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    parts = {
        "unet": unet, "text_encoder": CLIPTextModel(config), "text_encoder_2": CLIPTextModelWithProjection(config),
    }  # fmt: skip
    for prefix, component in (("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")):
        name = f"{prefix}text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
        place = Kohya().read(Header(Path("a"), {}, {}, 0), [name]).places[name]
        assert (place.component, place.suffix, place.component_named) == (component, "lora_up.weight", True)
        module = parts[component].get_submodule(paths_by_name(component, parts[component])[site_name(place.site)])
        assert isinstance(module, torch.nn.Linear)


@pytest.mark.slow
def test_no_two_modules_of_the_true_architectures_share_a_name() -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with shapes_alone():
        sd15 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        sdxl = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        clip_l = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        big_g = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        )
    assert len(paths_by_name("unet", sd15)) + len(paths_by_name("text_encoder", clip_l)) > 600
    parts = {"unet": sdxl, "text_encoder": clip_l, "text_encoder_2": big_g}
    assert sum(len(paths_by_name(component, module)) for component, module in parts.items()) > 1500


@pytest.mark.slow
def test_half_precision_files_of_other_programs_load(tmp_path: Path, tiny_pipe: DiffusionPipeline) -> None:
    path = write_adapter(tmp_path / "ink.safetensors", make_pipe(), parts=("unet",))
    tensors = {key: value.half() for key, value in load_file(path).items()}
    save_file({key: value for key, value in tensors.items() if not key.endswith("alpha")}, tmp_path / "other.safetensors")
    loaded = formats.load(tmp_path / "other.safetensors", tiny_pipe)
    parameters = [p for a in loaded.components["unet"].values() for p in a.parameters()]
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {a.scale for a in loaded.components["unet"].values()} == {1.0}


@pytest.mark.slow
def test_a_tensor_without_a_site_is_reported_and_the_rest_loads(tmp_path: Path, tiny_pipe: DiffusionPipeline) -> None:
    path = write_adapter(tmp_path / "ink.safetensors", make_pipe())
    tensors = load_file(path)
    tensors["lora_unet_no_such_place.lora_down.weight"] = torch.zeros(4, 8)
    save_file(tensors, tmp_path / "more.safetensors")
    loaded = formats.load(tmp_path / "more.safetensors", tiny_pipe)
    assert loaded.report.unmatched == ("lora_unet_no_such_place.lora_down.weight",)
    assert loaded.report.found == len(tensors) - 1 and "no_such_place" in loaded.warnings[0]
    with pytest.raises(UserError, match="no_such_place"):
        formats.load(tmp_path / "more.safetensors", tiny_pipe, strict=True)


@pytest.mark.slow
def test_a_base_that_the_adapter_was_not_made_for_is_named(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "ink.safetensors", make_pipe())
    other = make_pipe(seed=1, width=48)
    with pytest.raises(UserError, match=r"was made for base 'StableDiffusionPipeline'.*this base is"):
        formats.load(path, other)
    retrained = make_pipe(seed=5)
    assert any("weights differ" in warning for warning in formats.load(path, retrained).warnings)


def header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": (b"", "no safetensors"),
    "short": (b"\x01\x02", "no safetensors"),
    "huge header": (struct.pack("<Q", 2**60) + b"{}", "no safetensors"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "no safetensors"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_bytes_that_are_no_safetensors_are_refused(tmp_path: Path, tiny_pipe: DiffusionPipeline, kind: str) -> None:
    content, message = HOSTILE[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (formats.inspect, lambda p: formats.load(p, tiny_pipe)):
        with pytest.raises(UserError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "header cannot be read"),
        (b"[1, 2]", b"", "header cannot be read"),
        (b"[" * 50000 + b"]" * 50000, b"", "header cannot be read"),
        ({"a.alpha": {**TENSOR, "data_offsets": [0, 4]}}, b"\0" * 8, "does not lie"),
        ({"a.alpha": {**TENSOR, "shape": [-2]}}, b"\0" * 8, "header cannot be read"),
        ({"a.alpha": {**TENSOR, "shape": [2**40, 2**40]}}, b"\0" * 8, "does not lie"),
        ({"a.alpha": {**TENSOR, "dtype": "X9"}}, b"\0" * 8, "does not lie"),
        ({"a.alpha": TENSOR, "b.alpha": TENSOR}, b"\0" * 8, "does not lie"),
        ({"a.alpha": TENSOR}, b"\0" * 4, "truncated"),
        ({"a.alpha": TENSOR}, b"\0" * 12, "belong to no tensor"),
        ({"a.alpha": TENSOR, "__metadata__": {"x": 1}}, b"\0" * 8, "header cannot be read"),
        ({"weight": TENSOR}, b"\0" * 8, "no adapter"),
        ({"lora_unet_conv_in.alpha": TENSOR, "__metadata__": {"peft_diffusion": "{"}}, b"\0" * 8, "metadata is damaged"),
        ({"lora_unet_conv_in.alpha": TENSOR, "__metadata__": {"peft_diffusion": '{"version": 9}'}}, b"\0" * 8, "newer"),
    ],
)
def test_headers_that_lie_are_refused(
    tmp_path: Path, tiny_pipe: DiffusionPipeline, header: object, data: bytes, message: str
) -> None:
    path = header_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(UserError, match=message):
        formats.inspect(path)
    with pytest.raises(UserError):
        formats.load(path, tiny_pipe)


@pytest.mark.slow
def test_nan_is_refused_by_name(tmp_path: Path, tiny_pipe: DiffusionPipeline) -> None:
    tensors = load_file(write_adapter(tmp_path / "ink.safetensors", make_pipe()))
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=key):
        formats.load(tmp_path / "nan.safetensors", tiny_pipe)


@pytest.mark.slow
def test_a_pickle_is_read_as_weights_only(tmp_path: Path, tiny_pipe: DiffusionPipeline) -> None:
    tensors = load_file(write_adapter(tmp_path / "ink.safetensors", make_pipe()))
    torch.save({"state_dict": tensors}, tmp_path / "ink.pt")
    assert formats.load(tmp_path / "ink.pt", tiny_pipe).report.found == len(tensors)

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'boom')!r}, 'w')",))

    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="plain weights") as refused:
        formats.load(tmp_path / "bomb.pt", tiny_pipe)
    assert "weights_only" not in str(refused.value)  # torch advises to turn it off
    assert not (tmp_path / "boom").exists()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    pipe = make_pipe()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_adapter(tmp_path / "file" / "ink.safetensors", pipe)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


SITE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(rank: int = 4) -> dict[str, torch.Tensor]:
    return {f"{SITE}.lora_down.weight": torch.randn(rank, 32), f"{SITE}.lora_up.weight": torch.randn(32, rank)}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_of_eight_bits_load_and_are_told(tmp_path: Path, tiny_pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in pair().items()}
    path = tmp_path / "eight.safetensors"
    save_file(tensors | {f"{SITE}.alpha": torch.tensor(3.0).to(dtype)}, path)
    (adapter,) = formats.load(path, tiny_pipe, strict=True).components["unet"].values()
    state = adapter.state()
    assert torch.equal(state["lora_down.weight"], tensors[f"{SITE}.lora_down.weight"].float())
    assert float(state["alpha"]) == 3 and dict(formats.inspect(path).alphas) == {3.0: 1}


def test_every_number_of_eight_bits_is_read(tmp_path: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
        save_file({str(place): numbers[place].clone() for place in range(256)}, tmp_path / "all.safetensors")
        header = formats.container.read_header(tmp_path / "all.safetensors")
        read = formats.container.read_scalars(header, header.tensors)
        for place, want in enumerate(numbers.float().tolist()):
            if math.isfinite(want):
                assert read[str(place)] == want


def test_nan_in_a_pickle_is_refused_by_name(tmp_path: Path, tiny_pipe: DiffusionPipeline) -> None:
    torch.save({name: tensor * math.nan for name, tensor in pair().items()}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=f"tensor {SITE}.lora_down.weight holds NaN"):
        formats.load(tmp_path / "nan.pt", tiny_pipe)


A = torch.ones(4, 32)
DAMAGED = {
    "no rank": ({f"{SITE}.lora_down.weight": A[:0], f"{SITE}.lora_up.weight": A.T[:, :0]}, "make no adapter"),
    "many alphas": ({**pair(), f"{SITE}.alpha": torch.ones(4)}, "make no adapter"),
    "flat": ({**pair(), f"{SITE}.lora_up.weight": torch.ones(4)}, "make no adapter"),
    "a scalar": ({f"{SITE}.hada_w{n}": torch.ones(()) for n in ("1_a", "1_b", "2_a", "2_b")}, "make no adapter"),
    "half a pair": ({f"{SITE}.lora_down.weight": A}, "lora_up.weight is missing; the file is damaged"),
    "other methods": ({f"{SITE}.lora_what": torch.ones(32, 32)}, "holds tensors of no method that is known here: lora_what"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_tensors_that_make_no_adapter_are_refused_in_words(tmp_path: Path, tiny_pipe: DiffusionPipeline, kind: str) -> None:
    tensors, message = DAMAGED[kind]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        formats.load(tmp_path / "a.safetensors", tiny_pipe)


@pytest.mark.parametrize("content", [b"", b"\x80"])
def test_a_broken_pickle_is_refused_in_words(tmp_path: Path, tiny_pipe: DiffusionPipeline, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as plain weights: \w"):
        formats.load(tmp_path / "a.pt", tiny_pipe)
    torch.save({"state_dict": [1]}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        formats.load(tmp_path / "a.pt", tiny_pipe)


METADATA = {"deep": "[" * 100_000, "type": '{"version": 1, "title": 5}', "half": '{"version": 1, "title": "\\ud800"}'}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_that_is_damaged_is_said_to_be(tmp_path: Path, tiny_pipe: DiffusionPipeline, kind: str) -> None:
    value = METADATA[kind]
    save_file(pair(), tmp_path / "a.safetensors", metadata={"peft_diffusion": value})
    for read in (formats.inspect, lambda path: formats.load(path, tiny_pipe)):
        with pytest.raises(UserError, match="metadata is damaged"):
            read(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_the_ending_may_be_written_large(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.safetensors", make_pipe()).rename(tmp_path / "A.SAFETENSORS")
    assert formats.load(path, make_pipe()).spec.triggers == ("ink style",)
    torch.save(pair(), tmp_path / "B.PT")
    assert formats.load(tmp_path / "B.PT", make_pipe()).report.found == 2


def test_what_does_not_concern_both_is_not_compared(tmp_path: Path) -> None:
    core = {f"{SITE}.lora_down.weight": torch.ones(4, 32, 1, 1), f"{SITE}.lora_mid.weight": torch.ones(4, 4, 3, 3)}
    kinds = {
        "plain": {f"{SITE}.lora_down.weight": torch.ones(2, 32, 3, 3), f"{SITE}.lora_up.weight": torch.ones(64, 2, 1, 1)},
        "tucker": {**core, f"{SITE}.lora_up.weight": torch.ones(64, 4, 1, 1)},
        "original": {f"lora_unet_input_blocks_1_1_proj_in.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")},
    }
    found = {}
    for name, tensors in kinds.items():
        version = {"ss_base_model_version": "sd_v2_v" if name == "plain" else "sd_v2"}
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=version)
        found[name] = formats.inspect(tmp_path / f"{name}.safetensors")
    assert "of equal shapes" in compare(found["plain"], found["tucker"]).reasons[1]
    assert "not compared" in compare(found["plain"], found["original"]).reasons[1]
    assert found["plain"].base == {"family": "sd2", "prediction_type": "v_prediction"}


# Embeddings of other programs.


@pytest.mark.slow
def test_an_embedding_loads_beside_a_soft_prompt_and_may_be_flat(tmp_path: Path) -> None:
    pipe = make_pipe()
    site.attach(pipe.text_encoder, "w", with_initial_tokens(pipe, "text_encoder", SoftPrompt(2, "cat")), "tokens")
    formats.save(tmp_path / "soft.safetensors", {"text_encoder": pipe.text_encoder}, "w", formats.Spec())
    save_file({"emb_params": torch.randn(32)}, tmp_path / "easy.safetensors")
    torch.save({"<cat-toy>": torch.randn(32)}, tmp_path / "learned_embeds.bin")
    save_file({"<cat-toy>": torch.randn(2, 32)}, tmp_path / "toy.safetensors")
    assert formats.inspect(tmp_path / "toy.safetensors").methods == ("tokens",)
    adapters = Adapters(make_pipe())
    for name in ("soft.safetensors", "easy.safetensors", "learned_embeds.bin"):
        adapters.load(tmp_path / name)
    assert adapters.names == ("soft", "easy", "learned_embeds")
    ids = adapters.pipe.tokenizer("a <cat-toy> easy", add_special_tokens=False).input_ids
    assert len(set(ids) & set(learned(adapters.pipe.tokenizer).values())) == 4


def test_letters_without_a_small_form_of_one_letter_are_found_in_prompts() -> None:
    pipe = make_pipe()
    method = with_initial_tokens(pipe, "text_encoder", Tokens("<straße>", 4, "cat"))
    site.attach(pipe.text_encoder, "w", method, "tokens")
    teach(pipe)
    own = set(learned(pipe.tokenizer).values())
    assert sum(one in own for one in pipe.tokenizer("a <STRAßE> cat").input_ids) == 4
