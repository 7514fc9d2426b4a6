"""Write the trained networks as an ordinary diffusers folder; `card.py` puts the model card and the licence beside them."""

import argparse
import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .models import SCHEDULE, make_text_encoder, make_unet, make_vae, trained_file, vae_file
from .sources import CACHE
from .tokens import save_tokenizer

MOST_BYTES = 48_000_000
# Read by the samplers that a user may put in the place of this one: DDIM and PNDM of Stable Diffusion say the same.
FOR_OTHER_SAMPLERS: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False}


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
    files = vae_file(vae), unet / "text_encoder.safetensors", unet / "unet.safetensors"
    for network, file in zip(networks, files, strict=True):
        if not file.exists():
            raise FileNotFoundError(f"there is no {file}: run the trainings first")
        network.load_state_dict(load_file(file))
    return assemble(networks[0], networks[1], CLIPTokenizer.from_pretrained(tokenizer), networks[2])


def mix(unet: UNet2DConditionModel, before: dict[str, Tensor], share: float) -> None:
    """Give a UNet that went on training the mean of its weights, by so much, and those from before.

    What it knew and what it learned since are both in there (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).
    """
    unet.load_state_dict({name: before[name].float().lerp(now.float(), share) for name, now in unet.state_dict().items()})


def write_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> int:
    """Save in half precision, said to compute in single; returns the bytes of all weights."""
    for component in (pipe.vae, pipe.text_encoder, pipe.unet):
        component.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    write_text_encoder(pipe.text_encoder, folder)
    _amend(folder / "scheduler" / "scheduler_config.json", FOR_OTHER_SAMPLERS)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def write_text_encoder(text_encoder: CLIPTextModel, folder: Path) -> None:
    """Write the text encoder of a pipeline's folder in half precision, said to compute in single."""
    text_encoder.half().save_pretrained(folder / "text_encoder")
    _amend(folder / "text_encoder" / "config.json", {"dtype": "float32"})


def _amend(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Export the trained networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=CACHE / "vae", help="folder of the trained autoencoder")
    parser.add_argument("--unet", type=Path, default=CACHE / "unet", help="folder of the trained UNet")
    parser.add_argument("--before", type=Path, help="folder that this training went on from, or diffusers' of that base")
    parser.add_argument("--share", type=float, default=0.75, help="of the UNet's weights now, the rest being those before")
    parser.add_argument("--tokenizer", type=Path, default=CACHE / "tokenizer", help="folder of the tokenizer")
    parser.add_argument("--output", type=Path, default=Path("samples/base"), help="folder to write")
    options = parser.parse_args()
    pipe = load_trained(options.vae, options.unet, options.tokenizer)
    if options.before:
        mix(pipe.unet, load_file(trained_file(options.before, "unet")), options.share)
    size = write_pipeline(pipe, options.output)
    if size > MOST_BYTES:
        raise RuntimeError(f"the weights take {size} bytes, more than the {MOST_BYTES} that the package has room for")
    print(f"{size} bytes of weights: {options.output}")


if __name__ == "__main__":
    main()
