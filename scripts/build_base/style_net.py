"""Train the judge of styles, `peft_diffusion.evaluation.style_net`, on the real drawings.

    python -m scripts.build_base.style_net

Subjects that `held_out` names are never shown to it, in any style: `judge.calibrate` says on
them how far it is to be trusted.  It learns from drawings that were resized, moved, mirrored, softened and made noisy, and
from some that went through the base's autoencoder, so that a picture's softness is no sign of a style.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_diffusion.evaluation.style_net import WEIGHTS, StyleNet, held_out

from . import judge_files
from .packed import Drawing, load_packed
from .sources import CACHE, STYLES
from .training import affine

REPORT_EVERY = 100  # steps


def softened(images: Tensor) -> Tensor:
    """A light blur of images (count, 3, height, width)."""
    for axis in (2, 3):
        size = images.shape[axis]
        edged = torch.cat([images.narrow(axis, 0, 1), images, images.narrow(axis, size - 1, 1)], axis)
        images = 0.52 * images + 0.24 * (edged.narrow(axis, 0, size) + edged.narrow(axis, 2, size))
    return images


def changed(images: Tensor) -> Tensor:
    """Images in [0, 1] as other renderings and a generator's softness may show them; random."""
    values = affine(images * 2 - 1, (0.87, 1.15), 0.08).clamp(-1, 1) / 2 + 0.5
    each = torch.rand(3, len(values), 1, 1, 1, device=images.device)
    values = torch.where(each[0] < 0.5, values, values.flip(3))
    soft = softened(values)
    values = torch.where(each[1] < 0.35, values, torch.where(each[1] < 0.75, soft, softened(soft)))
    return (values + each[2] * 0.02 * torch.randn_like(values)).clamp(0, 1)


@torch.no_grad()
def _decoded(vae_folder: Path, pixels: Tensor) -> Tensor:
    """The drawings as the autoencoder gives them back, latents disturbed a little; bytes in, bytes out."""
    from .train_unet import load_vae

    vae = load_vae(vae_folder, pixels.device)
    pieces = []
    for piece in pixels.split(32):
        latents = vae.encode(piece.float() / 127.5 - 1).latent_dist.mean
        amounts = 0.15 * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        latents = latents + amounts * torch.randn_like(latents)
        pieces.append(((vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(pieces)


def _seen(rows: list[Drawing], pixels: Tensor, vae: Path, decoded: int, styles: tuple[str, ...]) -> list[Tensor]:
    """Drawings of each style that may be learned from, some of them decoded."""
    pools = []
    for style in styles:
        numbers = [number for number, row in enumerate(rows) if row.style == style and not held_out(row.subject)]
        chosen = torch.tensor(numbers)[torch.randperm(len(numbers))[:decoded]].to(pixels.device)
        pools.append(torch.cat([pixels[numbers], _decoded(vae, pixels[chosen])]))
    return pools


def minimize(net: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    """Train a network by AdamW, its rate rising and falling once, on a loss that draws its own batch each time."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    start = time.monotonic()
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        plan.step()
        if step % REPORT_EVERY == 0:
            print(f"step {step} of {steps}  loss {value.item():.4f}  {time.monotonic() - start:.0f} s", flush=True)


def fit(pools: list[Tensor], styles: tuple[str, ...], steps: int, batch: int, rate: float) -> StyleNet:
    """Train on as many of each style in every batch, on the device that the drawings are on."""
    device = pools[0].device
    net = StyleNet(styles)
    net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # which torch does not declare
    each = -(-batch // len(styles))
    labels = torch.arange(len(styles), device=device).repeat_interleave(each)

    def loss() -> Tensor:
        drawn = torch.cat([pool[torch.randint(len(pool), (each,), device=device)] for pool in pools])
        images = changed(drawn.float() / 255).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(net(images), labels, label_smoothing=0.05)

    minimize(net, loss, steps, rate)
    return net.eval().cpu()


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings")
    parser.add_argument("--vae", type=Path, default=Path("samples/base/vae"), help="folder of the trained autoencoder")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="file to write")
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=132)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decoded", type=int, default=1000, help="drawings of each style seen through the autoencoder too")
    options = parser.parse_args()
    torch.manual_seed(0)
    styles = tuple(STYLES)
    rows, pixels = load_packed(options.data, styles)
    pools = _seen(rows, pixels.to(options.device), options.vae, options.decoded, styles)
    net = fit(pools, styles, options.steps, options.batch, options.rate)
    halves = {name: tensor.half().contiguous() for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    judge_files.write(options.output, halves, {"styles": " ".join(styles)})
    print(f"{sum(tensor.numel() for tensor in halves.values())} parameters: {options.output}")


if __name__ == "__main__":
    main()
