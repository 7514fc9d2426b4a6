"""Single-file checkpoints in the original layout, read without a network."""

import hashlib
import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from original import checkpoint
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from peft_diffusion.bases import architectures, components, describe, load_base, single_file
from peft_diffusion.bases.architectures import Architecture, write_tokenizer
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.meta import shapes_alone
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.generate import cell_recipes
from peft_diffusion.generation.recipe import Recipe
from peft_diffusion.generation.sampler import Cell
from peft_diffusion.generation.settings import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")]

torch.set_num_threads(1)
KINDS = {
    "sd1": Architecture("sd1"),
    "sd1-inpainting": Architecture("sd1", inpainting=True),
    "sd2": Architecture("sd2"),
    "sd2-v": Architecture("sd2-v"),
    "sd2-inpainting": Architecture("sd2", inpainting=True),
    "sdxl": Architecture("sdxl"),
    "sdxl-v": Architecture("sdxl", v_prediction=True, zero_snr=True),
    "sdxl-inpainting": Architecture("sdxl", inpainting=True),
}


# Bases that predict the velocity are told by it: it is far from what a layer begins with.
_V_NORM = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture with its blocks and the text widths that tell it, but narrow and shallow."""
    for config in architectures._UNETS.values():
        wide = config["block_out_channels"]
        layers = config.get("transformer_layers_per_block", 1)
        monkeypatch.setitem(config, "block_out_channels", [32, 64, 64, 64][: len(wide)])
        monkeypatch.setitem(config, "attention_head_dim", 4)
        monkeypatch.setitem(config, "transformer_layers_per_block", layers if layers == 1 else [1, 1, 2])
    monkeypatch.setitem(architectures._UNETS["sdxl"], "cross_attention_dim", 96)
    monkeypatch.setitem(architectures._UNETS["sdxl"], "projection_class_embeddings_input_dim", 6 * 256 + 64)
    for config in architectures._VAES.values():
        monkeypatch.setitem(config, "block_out_channels", [32] * 4)
    sizes = {"clip-l": (768, 2), "openclip-h": (1024, 2), "openclip-g": (64, 10)}
    for name, (width, layers) in sizes.items():
        of_one = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": layers}
        for key, value in {**of_one, "vocab_size": 1000}.items():  # no text is encoded, and most of a file would be words
            monkeypatch.setitem(architectures._ENCODERS[name], key, value)
    monkeypatch.setitem(architectures._ENCODERS["openclip-g"], "projection_dim", 64)


def build(found: Architecture) -> Any:
    """A pipeline with random weights, from the configurations themselves."""
    torch.manual_seed(0)
    parts, noise = _without_numbers(found), torch.randn(1 << 20)
    for part in parts.values():
        part.to_empty(device="cpu").requires_grad_(False)
        for number, (name, tensor) in enumerate(part.state_dict().items()):
            tensor.zero_() if name == _V_NORM else _fill(tensor, noise[1009 * number % 500_000 :])
    return type("Pipe", (), parts)


def _without_numbers(found: Architecture) -> dict[str, Any]:
    """The networks of a pipeline; what layers begin as takes longer than all else here."""
    configs = found.configs()
    with shapes_alone():
        parts = {"unet": diffusers.UNet2DConditionModel(**_plain(configs["unet"]))}
        parts["vae"] = diffusers.AutoencoderKL(**_plain(configs["vae"]))
        for name in ("text_encoder", "text_encoder_2"):
            if name in configs:
                cls = {"CLIPTextModel": CLIPTextModel}.get(configs[name]["architectures"][0], CLIPTextModelWithProjection)
                parts[name] = cls(cls.config_class(**configs[name]))
    return parts


def _fill(tensor: torch.Tensor, noise: torch.Tensor) -> None:
    """Random numbers in little time: the same again and again where a tensor has more of them."""
    for place in range(0, tensor.numel(), len(noise)):
        piece = tensor.flatten()[place : place + len(noise)]
        piece.copy_(noise[: len(piece)])


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def state(found: Architecture, pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    told = checkpoint(pipe)
    if found.kind == "sd2-v":
        told[single_file._NORM] = torch.randn(told[single_file._NORM].shape)
    marks = {single_file._V_PREDICTION: found.v_prediction, single_file._ZERO_SNR: found.zero_snr}
    return told | {name: torch.tensor([]) for name, there in marks.items() if there}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_whole(kind: str, small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = KINDS[kind]
    if found.kind == "sdxl":  # whose text is as wide as its two encoders together
        monkeypatch.setitem(architectures._ENCODERS["clip-l"], "hidden_size", 32)
    original = build(found)
    tensors = state(found, original)
    save_file(tensors, tmp_path / "a.safetensors")
    assert single_file.architecture(tmp_path / "a.safetensors") == found
    pipe = load_base(tmp_path / "a.safetensors", device="cpu")
    assert type(pipe).__name__ == found.pipeline
    if found.kind == "sd2-v":
        original.unet.load_state_dict({**original.unet.state_dict(), _V_NORM: tensors[single_file._NORM]})
    for name in ("unet", "vae", *(name for name in ("text_encoder", "text_encoder_2") if hasattr(original, name))):
        before, after = getattr(original, name).state_dict(), getattr(pipe, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    info = describe(pipe)
    assert info.name == "a.safetensors"
    v = found.kind == "sd2-v" or found.v_prediction
    assert info.prediction_type == ("v_prediction" if v else "epsilon")
    assert info.resolution == {"sd1": 512, "sd2": 512, "sd2-v": 768, "sdxl": 1024}[found.kind]
    assert bool(pipe.scheduler.config.get("rescale_betas_zero_snr")) == found.zero_snr
    told = cell_recipes(Adapters(pipe), [Cell("a cat", 0, {})], Sampling())[0]
    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()  # as A1111's hashes.py: of the whole file
    assert f", Model hash: {digest[:10]}, Model: a," in told.parameters()
    assert Recipe.from_json(json.loads(json.dumps(told.to_json()))) == told
    ids = pipe.tokenizer("a red apple, 2 cats").input_ids
    assert ids == [49406, 320, 736, 3055, 267, 273, 3989, 49407]
    assert all(not p.requires_grad for part in components(pipe).values() for p in part.parameters())


def test_what_a_checkpoint_lacks_is_named(small: None, tmp_path: Path) -> None:
    tensors = checkpoint(build(KINDS["sd1"]))
    name = "model.diffusion_model.out.2.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors lacks tensors .* not whole"):
        load_base(tmp_path / "a.safetensors", device="cpu")
    alone = {key: value for key, value in tensors.items() if key.startswith("model.diffusion_model.")}
    save_file(alone, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors.* cannot be read"):
        load_base(tmp_path / "a.safetensors", device="cpu")


def test_a_ckpt_is_read_without_running_code(small: None, tmp_path: Path) -> None:
    original = build(KINDS["sd1"])
    torch.save({"state_dict": checkpoint(original), "global_step": 840000}, tmp_path / "a.ckpt")
    pipe = load_base(tmp_path / "a.ckpt", device="cpu")
    assert torch.equal(pipe.unet.conv_in.weight, original.unet.conv_in.weight)
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
            return Path.touch, (ran,)

    torch.save({"state_dict": {"a": Hostile()}}, tmp_path / "bad.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Hostile()))
    for name in ("bad.ckpt", "old.ckpt"):
        with pytest.raises(UserError, match=r"without running code .*take the .safetensors"):
            load_base(tmp_path / name, device="cpu")
    assert not ran.exists()


def test_what_is_no_known_checkpoint_is_said(tmp_path: Path) -> None:
    def told(tensors: dict[str, torch.Tensor], match: str) -> None:
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=match) as error:
            load_base(tmp_path / "a.safetensors", device="cpu")
        assert "\n" not in str(error.value)

    first, cross = torch.zeros(320, 4, 3, 3), torch.zeros(320, 768)
    told({"a": torch.zeros(1)}, "no checkpoint of a Stable Diffusion that is known here")
    told({single_file._IN: first, single_file._CROSS: torch.zeros(320, 512)}, "no checkpoint of a Stable Diffusion")
    told({single_file._IN: torch.zeros(320, 8, 3, 3), single_file._CROSS: cross}, "takes 8 channels")
    told({single_file._IN: first, single_file._REFINER: torch.zeros(1)}, "refiner")
    told({single_file._IN: first, single_file._CROSS: cross}, "cannot be read")
    (tmp_path / "a.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0{broken")
    with pytest.raises(UserError, match=r"no whole \.safetensors file"):
        load_base(tmp_path / "a.safetensors", device="cpu")
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"ends in \.safetensors or \.ckpt"):
        load_base(tmp_path / "a.bin", device="cpu")


def test_the_tokenizer_is_clips(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, pad="!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77 and tokenizer.pad_token_id == 0
    # From the tests of transformers and of open_clip.
    assert tokenizer("A photo of a CAT").input_ids == tokenizer("a photo  of a cat").input_ids
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.decode(tokenizer("naïve café, 東京?").input_ids, skip_special_tokens=True) == "naïve café , 東京 ?"


_HEADER = 1 << 20  # bytes of a file before its numbers


def in_a_file(found: Architecture, path: Path) -> Any:
    """Write a checkpoint in half precision, and give the pipeline whose numbers lie in that file.

    They are zeros, which are holes of the file, but for 2048 random ones at the beginning of every tensor and of every
    quarter of a MiB of it: gigabytes that are made and written take seconds each.
    """
    torch.manual_seed(0)
    parts, noise = _without_numbers(found), torch.randn(1 << 20).half().numpy()
    tensors = [tensor for part in parts.values() for tensor in part.state_dict().values()]
    end = _HEADER
    with path.open("wb") as file:
        for number, tensor in enumerate(tensors):
            start, end = end, end + 2 * tensor.numel()
            for place in range(start, end, 1 << 18):
                file.seek(place)
                file.write(noise[(1009 * number + place) % 1_000_000 :][: min(2048, (end - place) // 2)].tobytes())
        file.truncate(end)
    numbers = torch.from_file(str(path), shared=True, size=end // 2, dtype=torch.float16)
    pieces = iter(numbers[_HEADER // 2 :].split([tensor.numel() for tensor in tensors]))
    for part in parts.values():
        own = {name: next(pieces).view(tensor.shape) for name, tensor in part.state_dict().items()}
        part.requires_grad_(False).load_state_dict(own, assign=True)
    pipe = type("Pipe", (), parts)
    header = {}
    for name, tensor in checkpoint(pipe).items():
        start = tensor.data_ptr() - numbers.data_ptr() - _HEADER
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}
    with path.open("r+b") as file:
        file.write((_HEADER - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(_HEADER - 8))
    return pipe


def test_stable_diffusion_1_5_in_its_true_size(tmp_path: Path) -> None:
    original = in_a_file(KINDS["sd1"], tmp_path / "a.safetensors")
    assert sum(p.numel() for p in original.unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in original.text_encoder.parameters()) == 123_060_480
    assert sum(p.numel() for p in original.vae.parameters()) == 83_653_863
    pipe = load_base(tmp_path / "a.safetensors", device="cpu", dtype="float16")
    assert describe(pipe).family == "sd1" and pipe.unet.dtype == torch.float16
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(original, name).state_dict(), getattr(pipe, name).state_dict()
        assert before.keys() == after.keys()
        assert all(np.array_equal(_bits(before[key]), _bits(after[key])) for key in before)  # a tenth of torch's time


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint16)
