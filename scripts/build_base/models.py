"""The three networks of the base, and the noise schedule they are trained for."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .tokens import LENGTH, VOCABULARY

WIDTH = 256
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def make_vae() -> AutoencoderKL:
    """An autoencoder with four latent channels at an eighth of the size."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=128,
        norm_num_groups=16,
        scaling_factor=1.0,
    )


def make_text_encoder() -> CLIPTextModel:
    """A CLIP text encoder of four layers; it learns with the UNet."""
    start, end = VOCABULARY - 2, VOCABULARY - 1
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """A UNet with cross-attention at every one of its three levels; heads of 32."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(128, 160, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=(4, 5, 6),
    )


def trained_file(folder: Path, name: str) -> Path:
    """The weights of the ``unet`` or the ``text_encoder``: a training's, or those in a diffusers folder."""
    exported = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors"}
    own = folder / f"{name}.safetensors"
    return own if own.exists() else folder / exported[name]


def vae_file(folder: Path) -> Path:
    """The trained autoencoder's weights: of ``train_vae``, or of a diffusers folder such as ``samples/base/vae``."""
    files = (folder / "vae.safetensors", folder / "diffusion_pytorch_model.safetensors")
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise FileNotFoundError(f"there is no {files[0]}: run `python -m scripts.build_base.train_vae` first")
    return found


def signal_powers(device: torch.device) -> Tensor:
    """The cumulative products of the schedule: the share of signal power at each timestep."""
    first, last = SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5
    betas = torch.linspace(first, last, SCHEDULE["num_train_timesteps"], dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def whiten(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Give the latents mean 0 and deviation 1 a channel, by changing the 1x1 convolutions around them: exact."""
    inside, outside = vae.quant_conv, vae.post_quant_conv
    if not isinstance(inside, nn.Conv2d) or not isinstance(outside, nn.Conv2d) or inside.bias is None:
        raise TypeError("whitening needs an autoencoder with both quantization convolutions")
    channels = len(mean)
    with torch.no_grad():
        inside.weight[:channels].div_(deviation.view(-1, 1, 1, 1))
        inside.bias[:channels].sub_(mean).div_(deviation)
        inside.bias[channels:].sub_(2 * deviation.log())
        if outside.bias is None:
            raise TypeError("whitening needs a bias in the second quantization convolution")
        outside.bias.add_(outside.weight[:, :, 0, 0] @ mean)
        outside.weight.mul_(deviation.view(1, -1, 1, 1))
