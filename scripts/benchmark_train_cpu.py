"""Ours against peft in the loop of diffusers' training script, end to end: from an image folder to an adapter file.

    python scripts/benchmark_train_cpu.py --output benchmark
    python scripts/benchmark_train_cpu.py --output benchmark --base sd1 --device cuda --steps 200 --batch-size 4 --repeats 1

Both learn the same pictures of a sample style on the embedded base, with the same LoRA, batch, steps and learning rate, in
processes of their own, in the order A B B A and so on. Theirs is what ``train_text_to_image_lora.py`` does in a step: encode
the batch's pictures and captions, draw noise, run the UNet with peft's LoRA, clip, AdamW, read the loss. Before that, the
gradients of both for one and the same LoRA are compared, and afterwards the loss of both adapters on pictures that neither
was trained on. Prints seconds, peak memory and ratios, and writes ``figures.json``.

With ``--base sd1`` the base is the true architecture with random weights, read from a folder by both, and the pictures are
64 drawn ones of 512 pixels. Such a base learns nothing, so no losses are compared; gradients are by ``benchmark_train.py``.
On a GPU, memory is the GPU's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion import formats
from peft_diffusion.api import train
from peft_diffusion.bases import components, embedded, load_base
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.data.folder import scan
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.tasks.diffusion import DiffusionSettings, DiffusionTask
from peft_diffusion.training.tasks.preparation import prepare
from scripts.check_families import KINDS, build, draw
from scripts.measuring import memory_words, peak_memory, run

LAYERS = r".*\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
RANK, RATE, BATCH = 16, 1e-3, 8
DRAWN = 64  # pictures for a base with random weights
APART = 8  # pictures that neither side learns from
OURS, THEIRS = "peft_diffusion", "peft, diffusers' loop"


Figures: TypeAlias = dict[str, Any]  # seconds, memory in bytes, loss


def main() -> None:
    """Compare gradients, time both sides, compare what they learned."""
    options = _options()
    if options.side is not None:
        _timed(options)
        return
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    cosine = None
    if options.base == "icons":
        _split(embedded(f"styles/{options.style}"), options.output)
        cosine = gradients(options.output / "learn")
        console.print(f"cosine of the gradients of one LoRA, ours and peft's: {cosine:.6f}")
        if cosine < 0.9999:
            raise UserError("the gradients differ; timing them would compare nothing")
    else:
        _make_up(options)
    runs: dict[str, list[Figures]] = {OURS: [], THEIRS: []}
    for turn in range(options.repeats):
        for side in (OURS, THEIRS) if turn % 2 == 0 else (THEIRS, OURS):
            runs[side].append(_run(side, options))
            console.print(f"{side}: {runs[side][-1]['seconds']:.1f} s")
    _report(runs, cosine, options, console)


def _split(source: Path, output: Path) -> None:
    """Copy the sample's pictures into one folder to learn from and one to measure on."""
    for name in ("learn", "apart"):
        shutil.rmtree(output / name, ignore_errors=True)
        (output / name).mkdir()
    for number, picture in enumerate(scan([source]).pictures):
        folder = output / ("apart" if number % (48 // APART) == 0 else "learn")
        shutil.copy(picture.path, folder)
        (folder / f"{picture.path.stem}.txt").write_text(picture.caption, "utf-8")


def _make_up(options: argparse.Namespace) -> None:
    """A base with random weights, and pictures for it."""
    build(KINDS[options.base], torch.bfloat16, torch.device("cpu")).save_pretrained(options.output / "base")
    shutil.rmtree(options.output / "learn", ignore_errors=True)
    draw(options.output / "learn", options.size, DRAWN)


def _base(options: argparse.Namespace) -> str:
    """Where both sides read the base."""
    return "icons" if options.base == "icons" else str(options.output / "base")


def _run(side: str, options: argparse.Namespace) -> Figures:
    """One side in a process of its own; the seconds from start to end are its own, without Python's imports."""
    script = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--side", side]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise UserError(f"{side} failed: {done.stderr.strip().splitlines()[-1]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def _timed(options: argparse.Namespace) -> None:
    """Train one side, and print its figures as JSON."""
    folder, file = options.output / "learn", options.output / f"{'ours' if options.side == OURS else 'theirs'}.safetensors"
    with peak_memory() as memory:
        began = time.perf_counter()
        (ours if options.side == OURS else theirs)(folder, file, options)
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else memory.get("peak", 0)
    loss = loss_on(options.output / "apart", file) if options.base == "icons" else None
    print(json.dumps({"seconds": seconds, "memory": peak, "loss": loss}))


def ours(folder: Path, file: Path, options: argparse.Namespace) -> None:
    """Train as the command does."""
    steps: int = options.steps
    train(
        TrainConfig(
            (folder,), output=file, run_dir=file.with_suffix(""), rank=RANK, unet_lr=RATE, batch_size=options.batch_size,
            scheduler="constant", warmup=0, min_snr_gamma=0.0, timestep_bias="none", caption_dropout=0.0, preview_steps=0,
            held_out=0.0, steps=steps, save_every=steps, base=_base(options), resolution=options.size,
            device=options.device, overwrite=True,
        )
    )  # fmt: skip


def theirs(folder: Path, file: Path, options: argparse.Namespace) -> None:
    """Train as diffusers' script does, with peft's LoRA."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    device, dtype, steps = torch.device(options.device), torch.float32, options.steps
    if device.type == "cuda":
        dtype = torch.bfloat16
    base = str(embedded("base")) if options.base == "icons" else _base(options)
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=dtype).to(device)
    around = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    _add_lora(pipe.unet)
    own = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer, schedule = torch.optim.AdamW(own, lr=RATE), DDPMScheduler.from_config(pipe.scheduler.config)
    data = _Pictures(folder, pipe.tokenizer, options.size)
    loader = torch.utils.data.DataLoader(data, batch_size=options.batch_size, shuffle=True, drop_last=True)
    pipe.unet.train()
    done, running = 0, 0.0
    while done < steps:
        for pixels, ids in loader:
            latents = pipe.vae.encode(pixels.to(device, dtype)).latent_dist.sample() * pipe.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=device).long()
            noisy = schedule.add_noise(latents, noise, timesteps)
            with around:
                told = pipe.text_encoder(ids.to(device), return_dict=False)[0]
                answer = pipe.unet(noisy, timesteps, told, return_dict=False)[0]
            loss = F.mse_loss(answer.float(), noise.float(), reduction="mean")
            running += loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    StableDiffusionPipeline.save_lora_weights(file.parent, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    (file.parent / "pytorch_lora_weights.safetensors").replace(file)


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Pictures as the script's transforms make them, with the tokens of their captions."""

    def __init__(self, folder: Path, tokenizer: Any, size: int) -> None:
        self.size = size  # pixels a side
        self.pictures = scan([folder]).pictures
        self.ids = tokenizer(
            [one.caption for one in self.pictures], max_length=tokenizer.model_max_length, padding="max_length",
            truncation=True, return_tensors="pt",
        ).input_ids  # fmt: skip

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import numpy as np
        from PIL import Image

        with Image.open(self.pictures[index].path) as image:
            small = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1, self.ids[index]


def _add_lora(unet: Any) -> None:
    import peft

    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LAYERS))


def gradients(folder: Path) -> float:
    """The cosine between the gradients that both sides give one LoRA for the same inputs."""
    task, pipe = _task(folder), load_base("icons", device="cpu", dtype="float32")
    unet, adapters = pipe.components["unet"], site.adapters(components(task.pipe)["unet"], "a")
    for number, adapter in enumerate(adapters.values()):
        nn.init.normal_(adapter.get_parameter("up"), std=0.02, generator=torch.Generator().manual_seed(number))
    inputs = task.inputs(0, 0)
    task.loss(inputs).backward()
    _add_lora(unet)
    for path, adapter in adapters.items():
        layer = unet.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(adapter.down)
        layer.lora_B["default"].weight.data.copy_(adapter.up)
    power = task.powers[inputs["timesteps"]][:, None, None, None]
    noisy = power.sqrt() * inputs["latents"] + (1 - power).sqrt() * inputs["noise"]
    answer = unet(noisy, inputs["timesteps"], inputs["hidden"]).sample
    F.mse_loss(answer, inputs["noise"]).backward()
    own, other = [], []
    for path, adapter in adapters.items():
        layer = unet.get_submodule(path)
        for parameter in (adapter.get_parameter("down"), adapter.get_parameter("up")):
            assert parameter.grad is not None
            own.append(parameter.grad.flatten())
        other += [layer.lora_A["default"].weight.grad.flatten(), layer.lora_B["default"].weight.grad.flatten()]
    return float(F.cosine_similarity(torch.cat(own).double(), torch.cat(other).double(), dim=0))


def loss_on(folder: Path, file: Path) -> float:
    """The loss of an adapter file on pictures, with fixed noise and timesteps."""
    task = _task(folder)
    site.detach(components(task.pipe)["unet"], "a")
    loaded = formats.load(file, task.pipe, strict=True)
    site.attach_built(components(task.pipe)["unet"], "a", loaded.components["unet"])
    task.unseen = task.train
    found = task.held_out()
    if found is None:
        raise UserError(f"{folder} holds no pictures")
    return found


def _task(folder: Path) -> DiffusionTask:
    """The loss on a folder, of the embedded base with a fresh LoRA."""
    config = TrainConfig((folder,), held_out=0.0, caption_dropout=0.0, batch_size=BATCH, device="cpu")
    pipe = load_base("icons", device="cpu", dtype="float32")
    prepared = prepare(config, pipe, lambda event: None, TrainingPictures())
    site.attach(components(prepared.pipe)["unet"], "a", Lora(RANK), "attention+ff")
    return DiffusionTask(prepared.pipe, "a", DiffusionSettings(batch_size=BATCH), prepared.train)


def _report(runs: dict[str, list[Figures]], cosine: float | None, options: argparse.Namespace, console: Console) -> None:
    table = Table("", "seconds, median", "least", "most", "peak memory", "loss on unseen pictures")
    middle = {}
    for side, figures in runs.items():
        seconds = [one["seconds"] for one in figures]
        middle[side] = statistics.median(seconds)
        memory = memory_words(int(max(one["memory"] for one in figures)))
        known = [one["loss"] for one in figures if one["loss"] is not None]
        loss = f"{statistics.median(known):.4f}" if known else "-"
        table.add_row(side, f"{middle[side]:.1f}", f"{min(seconds):.1f}", f"{max(seconds):.1f}", memory, loss)
    console.print(table)
    threads = torch.get_num_threads()
    console.print(f"ours is {middle[THEIRS] / middle[OURS]:.2f} times as fast ({options.steps} steps, {threads} threads)")
    told = {"cosine": cosine, "steps": options.steps, "threads": threads, "runs": runs}
    (options.output / "figures.json").write_text(json.dumps(told, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="folder for pictures, adapters and figures")
    parser.add_argument("--style", default="openmoji", help="a folder of samples/styles")
    parser.add_argument("--base", choices=("icons", "sd1"), default="icons", help="the embedded one, or random weights")
    parser.add_argument("--size", type=int, help="pixels a side (128; sd1: 512)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--side", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = options.size or (128 if options.base == "icons" else 512)
    return options


if __name__ == "__main__":
    run(main)
