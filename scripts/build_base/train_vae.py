"""Train the autoencoder on the base sets and `fluent-emoji-flat`; report how well it draws every set again."""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from .models import make_vae, whiten
from .packed import Drawing, load_packed
from .sources import CACHE
from .training import (
    Arena,
    Plan,
    Progress,
    affine,
    balanced_sampler,
    captured,
    load_checkpoint,
    save_checkpoint,
    sheet,
    train,
)

WEIGHTS = {"tabler": 0.35, "ph-fill": 0.35, "ph-duotone": 0.5}
LINE_STYLES = ("tabler", "ph-duotone")
OVERLAY_SHARE = 0.3
KL_WEIGHT = 1e-4


@dataclass(frozen=True)
class Batches:
    """Draws augmented images; on some of them lies a second drawing in thin lines, as outlines over colour."""

    pixels: Tensor
    draw: Callable[[], Tensor]
    draw_lines: Callable[[], Tensor]

    @classmethod
    def of(cls, drawings: list[Drawing], pixels: Tensor, batch: int) -> "Batches":
        """Batches over the drawings that may train an autoencoder."""
        allowed = torch.tensor([float(row.role != "unseen") * WEIGHTS.get(row.style, 1.0) for row in drawings])
        lines = torch.tensor([float(row.style in LINE_STYLES) for row in drawings])
        device = pixels.device
        return cls(pixels, balanced_sampler(allowed.to(device), batch), balanced_sampler(lines.to(device), 4 * batch))

    def __call__(self) -> Tensor:
        """A batch in [-1, 1]."""
        images = affine(self.pixels[self.draw()].float() / 127.5 - 1, (0.8, 1.3), 0.12)
        halves = F.avg_pool2d(self.pixels[self.draw_lines()].float() / 127.5 - 1, 2)
        quarters = halves.view(-1, 2, 2, *halves.shape[1:]).permute(0, 3, 1, 4, 2, 5)
        lines = affine(quarters.reshape(images.shape), (0.6, 1.6), 0.3)
        chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < OVERLAY_SHARE
        return torch.where(chosen, torch.minimum(images, lines), images).clamp(-1, 1)


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def reconstruction_loss(drawn: Tensor, real: Tensor) -> Tensor:
    """L1, squared error, and L1 of values and edges down a pyramid of averages."""
    loss: Tensor = (drawn - real).abs().mean() + 2 * (drawn - real).square().mean()
    for level in range(4):
        for mine, theirs in zip(_edges(drawn), _edges(real), strict=True):
            loss = loss + 0.5 * (mine - theirs).abs().mean()
        if level < 3:
            drawn, real = F.avg_pool2d(drawn, 2), F.avg_pool2d(real, 2)
            loss = loss + (drawn - real).abs().mean()
    return loss


def make_step(vae: AutoencoderKL, arena: Arena, batches: Batches) -> Callable[[], Tensor]:
    """The whole training step: batch, forward, loss, backward, update."""
    dtype = arena.work.dtype

    def step() -> Tensor:
        images = batches()
        mean, logvar = vae._encode(images.to(dtype)).float().chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        drawn: Tensor = vae._decode(latents.to(dtype)).sample.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(drawn, images) + KL_WEIGHT * divergence
        arena.update(loss)
        detached: Tensor = loss.detach()
        return detached

    return step


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latent means of images in [-1, 1]."""
    return torch.cat([vae.encode(piece).latent_dist.mean for piece in torch.split(pixels, 128)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean peak signal to noise ratio, in decibels, of images in [-1, 1] drawn again."""
    errors = []
    for piece in torch.split(images, 64):
        drawn = vae.decode(vae.encode(piece).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((drawn - piece).square().mean((1, 2, 3)))
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())


def _normalized(vae: AutoencoderKL, drawings: list[Drawing], pixels: Tensor) -> None:
    base = [number for number, row in enumerate(drawings) if row.role == "base"]
    latents = encode(vae, pixels[base[:: max(1, len(base) // 4000)]].float() / 127.5 - 1)
    whiten(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))


def _report(vae: AutoencoderKL, drawings: list[Drawing], pixels: Tensor, output: Path) -> dict[str, float]:
    figures, shown = {}, []
    for style in {row.style: 0 for row in drawings}:
        chosen = [number for number, row in enumerate(drawings) if row.style == style]
        chosen = chosen[:: max(1, len(chosen) // 256)][:256]
        figures[style] = round(psnr(vae, pixels[chosen].float() / 127.5 - 1), 2)
        shown.append(pixels[chosen[3:12:3]])
    print("PSNR of real drawings, dB:", figures, flush=True)
    real = torch.cat(shown).float() / 127.5 - 1
    with torch.no_grad():
        drawn = vae.decode(vae.encode(real).latent_dist.mean).sample
    sheet(torch.stack([real, drawn], 1).flatten(0, 1), 12, output / "vae.png")
    (output / "vae.json").write_text(json.dumps(figures))
    return figures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings")
    parser.add_argument("--output", type=Path, default=CACHE / "vae", help="folder to write")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial")
    parser.add_argument("--seconds", type=float, default=390, help="time of training")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.2e-3, help="the highest learning rate")
    parser.add_argument("--each", type=int, help="use so many drawings of each set only")
    parser.add_argument("--channels-last", action="store_true", help="the other memory layout")
    return parser.parse_args()


def main() -> None:
    """Train, normalize the latents, save, and report."""
    options = _options()
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    drawings, pixels = load_packed(options.data, each=options.each)
    pixels = pixels.to(device)
    print(f"{len(drawings)} drawings", flush=True)
    vae = make_vae().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    arena = Arena([vae], next(vae.parameters()).dtype, options.channels_last)
    progress, checkpoint = Progress(), load_checkpoint(options.output / "checkpoint.pt", device)
    if checkpoint:
        arena.load(checkpoint["arena"])
        progress = Progress(checkpoint["step"], checkpoint["spent"])
    plan = Plan(options.rate, options.seconds, progress.spent + options.seconds, options.steps, averaging=0.999)
    step = captured(make_step(vae, arena, Batches.of(drawings, pixels, options.batch)), device)
    save = functools.partial(save_checkpoint, options.output / "checkpoint.pt", arena, progress)
    train(step, arena, plan, progress, save, report_every=1000 if device.type == "cuda" else 5)
    final = make_vae().to(device)
    for mine, view in zip(final.parameters(), arena._views(arena.average, options.channels_last), strict=True):
        mine.data.copy_(view)
    final.eval()
    _normalized(final, drawings, pixels)
    halves = {name: tensor.half().contiguous() for name, tensor in final.state_dict().items()}
    save_file(halves, options.output / "vae.safetensors")
    final.load_state_dict(halves)
    _report(final, drawings, pixels, options.output)


if __name__ == "__main__":
    main()
