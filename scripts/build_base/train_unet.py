"""Train the UNet and the text encoder together, from scratch, on the latents of the base sets.

    python -m scripts.build_base.train_unet --seconds 900
    python -m scripts.build_base.train_unet --weights samples/base --only-unet --rate 4e-4 --seconds 900
    torchrun --nproc-per-node 2 -m scripts.build_base.train_unet --seconds 900 --compute bfloat16 --compile

The second goes on with a trained base's UNet alone. With several GPUs each one draws its own ``--batch``. The same command
goes on with a training that was stopped.
"""

import argparse
import copy
import functools
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .augment import moved, strange
from .captions import caption, varied_caption
from .export import assemble
from .models import make_text_encoder, make_unet, make_vae, signal_powers, trained_file, vae_file
from .packed import Drawing, load_packed
from .sources import BASE_STYLES, CACHE
from .tokens import encode
from .training import (
    Arena,
    Plan,
    Progress,
    Team,
    affine,
    balanced_sampler,
    load_checkpoint,
    save_checkpoint,
    sheet,
    stepping,
    train,
)

WEIGHTS = {"tabler": 0.6, "ph-fill": 0.6, "ph-duotone": 0.7, "flat-color-icons": 2.0}
MIN_SNR_GAMMA = 5.0
LITTLE_NOISE = 400  # timesteps in which strange drawings are shown
SHARES = {"little noise": (0.35, 0.2, 0.45), "much noise": (0.75, 0.25, 0.0)}  # of drawings as they are, moved, and strange
OTHER_CAPTION = 0.25  # share of the strange drawings that another one's caption is told of
SHEET_STYLES = ("noto", "noto-v1", "fluent-emoji", "fxemoji", "tabler", "ph-duotone")
SHEET_SUBJECTS = (
    "red apple", "cat face", "automobile", "house", "grinning face", "fire",
    "pizza", "rocket", "umbrella", "fish", "key", "dog face",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingSet:
    """Latents in several augmentations, token numbers of several captions, and how often each drawing is drawn.

    A third of the augmentations are drawings as they are, a third are moved, and a third are strange.
    """

    latents: Tensor
    tokens: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "TrainingSet":
        """The same on a device."""
        return TrainingSet(self.latents.to(device), self.tokens.to(device), self.weights.to(device))


def as_they_are(images: Tensor) -> Tensor:
    """Drawings slightly resized and moved."""
    return affine(images, (0.94, 1.1), 0.05).clamp(-1, 1)


@torch.no_grad()
def _latents(vae: AutoencoderKL, pixels: Tensor, variants: int) -> Tensor:
    """Latents of each drawing in so many variants of each kind: as it is, moved, and strange."""
    pieces: list[Tensor] = []
    for piece in torch.split(pixels, 256):
        images = piece.to(vae.device).float() / 127.5 - 1
        versions = [images, *(as_they_are(images) for _ in range(variants - 1))]
        versions += [change(images) for change in (moved, strange) for _ in range(variants)]
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=vae.device.type == "cuda"):
            pieces.append(torch.stack([vae.encode(version).latent_dist.mean.half() for version in versions], 1))
    return torch.cat(pieces)


def prepare(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, drawings: list[Drawing], pixels: Tensor, variants: int, captions: int
) -> TrainingSet:
    """Encode drawings and captions once, before the first step."""
    rng = random.Random(0)
    texts = [varied_caption(row, rng) for row in drawings for _ in range(captions)]
    tokens = encode(tokenizer, texts)
    weights = torch.tensor([WEIGHTS.get(row.style, 1.0) for row in drawings])
    return TrainingSet(_latents(vae, pixels, variants), tokens.view(len(drawings), captions, -1), weights)


def shared_subjects(drawings: list[Drawing], count: int) -> set[str]:
    """The subjects that most of the sets draw, and those of the sheet."""
    styles: dict[str, set[str]] = {}
    for row in drawings:
        styles.setdefault(row.subject, set()).add(row.style)
    ranked = sorted(styles, key=lambda subject: (subject not in SHEET_SUBJECTS, -len(styles[subject]), subject))
    return set(ranked[:count])


def make_gradient(
    unet: Callable[..., Any], text_encoder: CLIPTextModel, arena: Arena, data: TrainingSet, options: argparse.Namespace
) -> Callable[[], Tensor]:
    """A training step without its update: drawing, noise, timesteps, forward, loss weighted by min-SNR, backward."""
    device, batch = data.latents.device, options.batch
    powers = signal_powers(device)
    snr = powers / (1 - powers)
    importance = snr.clamp(max=MIN_SNR_GAMMA) / snr
    draw = balanced_sampler(data.weights, batch)

    variants = data.latents.shape[1] // 3
    bounds = torch.tensor([SHARES["little noise"], SHARES["much noise"]], device=device).cumsum(1)[:, :2]

    def pick(count: int) -> Tensor:
        return (torch.rand(batch, device=device) * count).long().clamp(max=count - 1)

    def pick_kind(timesteps: Tensor) -> Tensor:
        much = (timesteps >= LITTLE_NOISE).long()
        return (torch.rand(batch, 1, device=device) >= bounds[much]).sum(1)

    def predict(noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.compute == "autocast"):
            hidden = text_encoder(input_ids=tokens)[0]
            predicted: Tensor = unet(noisy.to(arena.work.dtype), timesteps, hidden, return_dict=False)[0]
        return predicted.float()

    def gradient() -> Tensor:
        chosen = draw()
        strata = torch.arange(batch, device=device) + torch.rand(batch, device=device)
        timesteps = (strata * (len(powers) / batch)).long().clamp(max=len(powers) - 1)
        kind = pick_kind(timesteps)
        latents = data.latents[chosen, kind * variants + pick(variants)].float()
        other = (kind == 2) & (torch.rand(batch, device=device) < OTHER_CAPTION)
        tokens = data.tokens[torch.where(other, chosen.roll(1), chosen), pick(data.tokens.shape[1])].long()
        noise, power = torch.randn_like(latents), powers[timesteps].view(-1, 1, 1, 1)
        noisy = power.sqrt() * latents + (1 - power).sqrt() * noise
        errors = (predict(noisy, timesteps, tokens) - noise).square().mean((1, 2, 3))
        loss = (errors * importance[timesteps]).mean()
        arena.take(loss)
        return loss.detach()

    return gradient


def load_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """The autoencoder that `train_vae` saved."""
    vae = make_vae()
    vae.load_state_dict(load_file(vae_file(folder)))
    return vae.to(device).eval().requires_grad_(False)


def _save(arena: Arena, progress: Progress, modules: dict[str, torch.nn.Module], folder: Path) -> None:
    """Write the checkpoint to go on from, and the averaged weights in half precision."""
    save_checkpoint(folder / "checkpoint.pt", arena, progress)
    arena.use_average()
    for name, module in modules.items():
        halves = {key: tensor.half().contiguous() for key, tensor in module.state_dict().items()}
        save_file(halves, folder / f"{name}.safetensors")
    arena.work.copy_(arena.master.detach())
    (folder / "losses.json").write_text(json.dumps(progress.losses))


def _read(modules: dict[str, torch.nn.Module], folder: Path) -> None:
    """The averaged weights of a training, or those of a diffusers folder such as ``samples/base``."""
    for name, module in modules.items():
        module.load_state_dict(load_file(trained_file(folder, name)))


def draw_sheet(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: torch.device, steps: int) -> None:
    """Twelve subjects in six styles, a style a row."""
    unet, text_encoder = make_unet(), make_text_encoder()
    _read({"unet": unet, "text_encoder": text_encoder}, folder)
    pipe = assemble(vae, text_encoder, tokenizer, unet).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts = [caption(style, subject) for style in SHEET_STYLES for subject in SHEET_SUBJECTS]
    generator = torch.Generator("cpu").manual_seed(0)
    images = pipe(prompts, num_inference_steps=steps, guidance_scale=4.0, generator=generator, output_type="pt").images
    sheet(images * 2 - 1, len(SHEET_SUBJECTS), folder / "sheet.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings")
    parser.add_argument("--vae", type=Path, default=CACHE / "vae", help="folder of the trained autoencoder")
    parser.add_argument("--tokenizer", type=Path, default=CACHE / "tokenizer", help="folder of the tokenizer")
    parser.add_argument("--output", type=Path, default=CACHE / "unet", help="folder to write, or to go on from")
    parser.add_argument("--weights", type=Path, help="folder of a training, or diffusers' of a base, to start from")
    parser.add_argument("--only-unet", action="store_true", help="leave the text encoder as it is")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial")
    parser.add_argument("--seconds", type=float, default=960, help="time of training now")
    parser.add_argument("--total-seconds", type=float, help="time of training in all, where it is done in parts")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--batch", type=int, default=256, help="drawings of a step, on each GPU")
    parser.add_argument("--rate", type=float, default=5e-4, help="the highest learning rate")
    parser.add_argument("--warm-up", type=int, default=1000, help="steps until the learning rate is at its highest")
    parser.add_argument("--each", type=int, help="use so many drawings of each set only")
    parser.add_argument("--variants", type=int, default=6, help="augmentations of each drawing, of each of three kinds")
    parser.add_argument("--captions", type=int, default=48, help="captions of each drawing")
    parser.add_argument("--channels-last", action="store_true", help="the other memory layout")
    parser.add_argument(
        "--compute",
        choices=("float32", "autocast", "bfloat16"),
        default="float32",
        help="float32 (TF32 on a GPU), autocast to bfloat16, or all in bfloat16 over float32 masters, which is fastest",
    )
    parser.add_argument("--compile", action="store_true", help="fuse the UNet's operations, which takes a minute or two")
    parser.add_argument("--subjects", type=int, help="use only the so many subjects that most sets draw")
    parser.add_argument("--report-every", type=int, default=500, help="steps between two lines of progress")
    parser.add_argument("--sheet-steps", type=int, default=25, help="denoising steps of the sheet; 0 draws none")
    return parser.parse_args()


def _training_set(options: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer, rank: int) -> TrainingSet:
    """The drawings as one of the team prepares them, from the cache beside the checkpoint where it is there already."""
    path: Path = options.output / f"prepared-{rank}.pt"
    if path.exists():
        return TrainingSet(**torch.load(path, weights_only=True))
    drawings, pixels = load_packed(options.data, BASE_STYLES, options.each)
    if options.subjects:
        kept = shared_subjects(drawings, options.subjects)
        numbers = [number for number, row in enumerate(drawings) if row.subject in kept]
        drawings, pixels = [drawings[number] for number in numbers], pixels[numbers]
    data = prepare(vae, tokenizer, drawings, pixels, options.variants, options.captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"latents": data.latents.cpu(), "tokens": data.tokens.cpu(), "weights": data.weights.cpu()}, path)
    return data


def main() -> None:
    """Prepare, train, save, and draw a sheet."""
    options, start, team = _options(), time.perf_counter(), Team.join()
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer)
    vae = load_vae(options.vae, device)
    torch.manual_seed(1 + team.rank)
    data = _training_set(options, vae, tokenizer, team.rank).to(device)
    print(f"{time.perf_counter() - start:.0f} s of preparation: latents {tuple(data.latents.shape)}", flush=True)
    torch.manual_seed(1)
    dtype = torch.bfloat16 if options.compute == "bfloat16" else torch.float32
    unet, text_encoder = make_unet(), make_text_encoder()
    modules: dict[str, torch.nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    if options.weights:
        _read(modules, options.weights)
    for module in modules.values():
        module.to(device)
    learned = [unet] if options.only_unet else [unet, text_encoder]
    arena = Arena(learned, dtype, options.channels_last, weight_decay=0.01)
    reader = copy.deepcopy(text_encoder).to(dtype).requires_grad_(False) if options.only_unet else text_encoder
    progress, checkpoint = Progress(), load_checkpoint(options.output / "checkpoint.pt", device)
    if checkpoint:
        arena.load(checkpoint["arena"])
        progress = Progress(checkpoint["step"], checkpoint["spent"])
    total = options.total_seconds or progress.spent + options.seconds
    plan = Plan(options.rate, options.seconds, total, options.steps, options.warm_up)
    torch.manual_seed(2 + team.rank + team.size * progress.step)
    network: Callable[..., Any] = torch.compile(unet, dynamic=False) if options.compile else unet
    step = stepping(make_gradient(network, reader, arena, data, options), arena, team, device)
    print(f"{time.perf_counter() - start:.0f} s until the first step", flush=True)
    save = functools.partial(_save, arena, progress, modules, options.output)
    train(step, arena, plan, progress, save, options.report_every, team)
    if options.sheet_steps and team.rank == 0:
        draw_sheet(options.output, vae, tokenizer, device, options.sheet_steps)


if __name__ == "__main__":
    main()
