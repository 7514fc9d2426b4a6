"""The architectures of Stable Diffusion as data: what a single-file checkpoint does not say of itself.

With these, such a checkpoint is read without a network. The values are those of the configurations published with Stable
Diffusion 1.5, 2 (base), 2.1, XL 1.0, its refiner, and their inpainting versions; the tokenizer is CLIP's (``clip/``).
"""

import bz2
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["sd1", "sd2", "sd2-v", "sdxl", "sdxl-refiner"]

_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Architecture:
    """A pipeline without its weights: kind, whether its UNet is told a masked picture, and what else its file says.

    ``v_prediction`` and ``zero_snr`` are marks that fine-tuned checkpoints carry.
    """

    kind: Kind
    inpainting: bool = False
    v_prediction: bool = False
    zero_snr: bool = False

    @property
    def xl(self) -> bool:
        """Whether it is Stable Diffusion XL or its refiner."""
        return self.kind in ("sdxl", "sdxl-refiner")

    @property
    def pipeline(self) -> str:
        """The class in diffusers that generates with it."""
        if self.kind == "sdxl-refiner":
            return "StableDiffusionXLImg2ImgPipeline"
        return f"StableDiffusion{'XL' if self.xl else ''}{'Inpaint' if self.inpainting else ''}Pipeline"

    def configs(self) -> dict[str, dict[str, Any]]:
        """The configuration of each component by its name."""
        unet = {**_UNETS[self.kind], "in_channels": 9 if self.inpainting else 4}
        schedule = dict(_SCHEDULERS[self.kind])
        if self.v_prediction:
            schedule["prediction_type"] = "v_prediction"
        if self.zero_snr:
            schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {
            "unet": unet,
            "vae": _VAES["sdxl" if self.xl else "sd"],
            "scheduler": schedule,
            **{name: _ENCODERS[encoder] for name, encoder in _TEXT[self.kind].items()},
        }

    def write(self, folder: Path) -> None:
        """Write a diffusers folder without weights: what ``from_single_file`` takes as ``config``.

        Args:
            folder: Where.
        """
        parts: dict[str, Any] = {"_class_name": self.pipeline}
        for name, config in self.configs().items():
            library = "transformers" if name.startswith("text_encoder") else "diffusers"
            class_name = config["architectures"][0] if library == "transformers" else config["_class_name"]
            parts[name] = [library, class_name]
            file = {"scheduler": "scheduler_config.json"}.get(name, "config.json")
            _write_json(folder / name / file, config)
        for name, encoder in _TEXT[self.kind].items():
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = ["transformers", "CLIPTokenizer"]
            write_tokenizer(folder / tokenizer, pad=_PADS[encoder])
        if self.kind == "sdxl-refiner":
            parts |= {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]}
        if self.xl:
            parts |= {"force_zeros_for_empty_prompt": True, "image_encoder": [None, None], "feature_extractor": [None, None]}
        else:
            absent = ("safety_checker", "feature_extractor", "image_encoder")
            parts |= {"requires_safety_checker": False, **{name: [None, None] for name in absent}}
        _write_json(folder / "model_index.json", parts)


def write_tokenizer(folder: Path, pad: str = _END) -> None:
    """Write CLIP's tokenizer as transformers reads it.

    Args:
        folder: Where.
        pad: The token that fills up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _words().items():
        (folder / name).write_text(text, "utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": pad}
    _write_json(folder / "special_tokens_map.json", special)
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    _write_json(folder / "tokenizer_config.json", {**told, **special, "add_prefix_space": False})


@cache
def _merges() -> tuple[str, ...]:
    packed = (Path(__file__).parent / "clip" / "merges.txt.bz2").read_bytes()
    return tuple(bz2.decompress(packed).decode().splitlines())


@cache
def _words() -> dict[str, str]:
    """The files of a tokenizer that are alike for all; kept, because each of two tokenizers of SDXL needs them."""
    merges = _merges()
    vocabulary = json.dumps(_vocabulary(merges), ensure_ascii=False)
    return {"vocab.json": vocabulary, "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n"}


def _vocabulary(merges: tuple[str, ...]) -> dict[str, int]:
    """Tokens by number: a letter for each byte, the same at the end of a word, the merges, start and end."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]  # bytes without a letter of their own get one after 255
    letters = [chr(byte) for byte in shown] + [chr(256 + number) for number in range(len(hidden))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: number for number, token in enumerate([*tokens, _START, _END])}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
_UNET_2 = {**_UNET, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
_UNET_XL: dict[str, Any] = {
    **_UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "use_linear_projection": True,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": _UNET,
    "sd2": _UNET_2,
    "sd2-v": {**_UNET_2, "sample_size": 96},
    "sdxl": _UNET_XL,
    "sdxl-refiner": {
        **_UNET_XL,
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    },
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_VAES: dict[str, dict[str, Any]] = {
    "sd": _VAE,
    "sdxl": {**_VAE, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
}
_ENCODER: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_ENCODERS: dict[str, dict[str, Any]] = {
    "clip-l": _ENCODER,
    "openclip-h": {
        **_ENCODER,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,  # of 24: the last but one is what the UNet was trained with
        "projection_dim": 512,
    },
    "openclip-g": {
        **_ENCODER,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}
_PADS = {"clip-l": _END, "openclip-h": "!", "openclip-g": "!"}
_TEXT: dict[str, dict[str, str]] = {
    "sd1": {"text_encoder": "clip-l"},
    "sd2": {"text_encoder": "openclip-h"},
    "sd2-v": {"text_encoder": "openclip-h"},
    "sdxl": {"text_encoder": "clip-l", "text_encoder_2": "openclip-g"},
    "sdxl-refiner": {"text_encoder_2": "openclip-g"},
}
_SCHEDULE: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_PNDM = {**_SCHEDULE, "_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
_EULER = {**_SCHEDULE, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": False}
_DDIM = {**_SCHEDULE, "_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd1": _PNDM,
    "sd2": _PNDM,
    "sd2-v": {**_DDIM, "prediction_type": "v_prediction"},
    "sdxl": _EULER,
    "sdxl-refiner": _EULER,
}
