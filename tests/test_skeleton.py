"""Bases without weights: true names and shapes, chosen from a file alone, and files load on them as on the base itself."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from diffusers import AutoencoderKL
from laws import LACKING, METHODS, randomize
from safetensors.torch import save_file
from torch import Tensor

from peft_diffusion import formats
from peft_diffusion.bases import components, describe, load_base
from peft_diffusion.bases.skeleton import published, skeleton
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.formats.file import load
from peft_diffusion.formats.fitting import fitting
from peft_diffusion.formats.planning import plan

# As the published weights have them.
PARAMETERS = {
    "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


def pair(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    """A LoRA of rank 1 in kohya's layout."""
    return {
        f"{name}.lora_down.weight": torch.ones(1, inputs),
        f"{name}.lora_up.weight": torch.ones(outputs, 1),
        f"{name}.alpha": torch.tensor(1.0),
    }


DIFFUSERS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
CLIP = "text_model_encoder_layers_0_self_attn_q_proj"
FILES = {
    "sd1": (pair(DIFFUSERS, 640, 768), "sd1"),
    "sd2": (pair(DIFFUSERS, 640, 1024), "sd2"),
    "sdxl": (pair(DIFFUSERS, 640, 2048), "sdxl"),
    "sdxl-sgm": (pair(SGM, 640, 2048), "sdxl"),
    "refiner": (pair(SGM, 768, 1280), "sdxl-refiner"),
    "icons": (pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 160, 256), "icons"),
    "clip of sd1": (pair(f"lora_te_{CLIP}", 768, 768), "sd1"),
    "clip of sdxl": (pair(f"lora_te1_{CLIP}", 768, 768), "sdxl"),
    "open clip of sd2": (pair(f"lora_te_{CLIP}", 1024, 1024), "sd2"),
    "open clip of sdxl": (pair(f"lora_te2_{CLIP}", 1280, 1280), "sdxl"),
    "word of sd1": ({"emb_params": torch.ones(2, 768)}, "sd1"),
    "word of sd2": ({"emb_params": torch.ones(2, 1024)}, "sd2"),
    "word of sdxl": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "sdxl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARAMETERS)
def test_published_architectures_have_the_parameters_of_their_weights(kind: str) -> None:
    parts = skeleton(kind).parts
    assert {name: sum(one.numel() for one in part.parameters()) for name, part in parts.items()} == PARAMETERS[kind]
    assert all(tensor.is_meta for part in parts.values() for tensor in part.state_dict().values())


@pytest.mark.slow
def test_the_embedded_base_has_the_names_and_shapes_of_its_weights() -> None:
    base = load_base("icons")
    for name, part in components(base).items():
        own = getattr(skeleton("icons"), name)
        assert {key: one.shape for key, one in own.state_dict().items()} == {
            key: one.shape for key, one in part.state_dict().items()
        }
    assert asdict(describe(skeleton("icons"))) | {"fingerprint": ""} == asdict(describe(base)) | {"fingerprint": ""}


@pytest.mark.slow
def test_a_folder_tells_the_sizes_of_its_own_autoencoder(tmp_path: Path) -> None:
    pipe: Any = make_pipe()
    pipe.vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "base")
    found = describe(skeleton(tmp_path / "base"))
    assert found == replace(describe(load_base(tmp_path / "base", device="cpu")), fingerprint="")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_file_chooses_its_architecture(file: str, tmp_path: Path) -> None:
    tensors, kind = FILES[file]
    save_file(tensors, tmp_path / "a.safetensors")
    found = plan(tmp_path / "a.safetensors")
    base = fitting(found)
    assert base is skeleton(kind)
    assert load(found, base, strict=True).report.found == len(tensors)


@pytest.mark.slow
def test_an_inpainting_base_is_known_by_its_first_convolution(tmp_path: Path) -> None:
    tensors = {"lora_unet_conv_in.lora_down.weight": torch.ones(1, 9, 3, 3), **pair(DIFFUSERS, 640, 768)}
    tensors["lora_unet_conv_in.lora_up.weight"] = torch.ones(320, 1, 1, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    found = plan(tmp_path / "a.safetensors")
    assert fitting(found) is published("sd1", True)
    load(found, fitting(found), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (pair("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072), r"is for Flux\.1, .* this package runs none of that"),
        (pair(DIFFUSERS, 64, 32), "no base that is known without its files.*--base"),
    ],
    ids=["flux", "of a tiny model"],
)
def test_a_file_that_fits_none_is_refused_in_words(tensors: dict[str, Tensor], told: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=told):
        fitting(plan(tmp_path / "a.safetensors"))


def test_a_base_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"there is no base 'sdlx'.*sdxl"):
        skeleton("sdlx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "component"),
    [(method, part) for part in ("unet", "text_encoder") for method in METHODS if METHODS[method][1] not in LACKING[part]],
)
def test_files_of_every_method_are_built_without_the_weights(
    method: str, component: str, tiny_base: Path, tmp_path: Path
) -> None:
    chosen, target = METHODS[method]
    pipe = make_pipe()
    part = components(pipe)[component]
    site.attach(part, "a", chosen, target)
    randomize(part, "a")
    told = {name: list(value) if isinstance(value, range) else value for name, value in chosen.spec().items()}
    spec = formats.Spec({component: ({**told, "target": target},)}, asdict(describe(pipe)))
    formats.save(tmp_path / "a.safetensors", {component: part}, "a", spec)
    base = skeleton(tiny_base)
    loaded = load(plan(tmp_path / "a.safetensors"), base, strict=True)
    assert not loaded.warnings
    wanted = site.adapters(part, "a")
    assert loaded.components[component].keys() == wanted.keys()
    for path, adapter in loaded.components[component].items():
        own = wanted[path].state()
        assert adapter.state().keys() == own.keys()
        assert all(torch.equal(tensor, own[suffix]) for suffix, tensor in adapter.state().items())
