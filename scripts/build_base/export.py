"""Write the trained networks as an ordinary diffusers folder, with its model card and licence."""

import argparse
from pathlib import Path

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from .models import SCHEDULE, make_text_encoder, make_unet, make_vae
from .sources import CACHE


def make_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler that draws best at 25 steps."""
    return DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing", steps_offset=1
    )


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The networks as an ordinary pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_trained(vae: Path, unet: Path, tokenizer: Path) -> StableDiffusionPipeline:
    """The pipeline of the folders that the trainings wrote."""
    networks = make_vae(), make_text_encoder(), make_unet()
    files = vae / "vae.safetensors", unet / "text_encoder.safetensors", unet / "unet.safetensors"
    for network, file in zip(networks, files, strict=True):
        if not file.exists():
            raise FileNotFoundError(f"there is no {file}: run the trainings first")
        network.load_state_dict(load_file(file))
    return assemble(networks[0], networks[1], CLIPTokenizer.from_pretrained(tokenizer), networks[2])
