"""Trains and generates on the true architectures of Stable Diffusion, with random weights.

    python scripts/check_families.py --kinds sd1 sd2-v sdxl --output families

For each kind: builds the pipeline from its configuration, trains a LoRA on UNet and text encoders for a few steps on a
folder of drawn pictures, loads the file and generates. Prints seconds and the peak of memory. Random weights learn nothing
of worth: what is checked is that all of it runs, that nothing but the adapter changed, and what it takes. SDXL takes about
12 GiB of memory in bfloat16.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.api import train
from peft_diffusion.bases import checksum, components
from peft_diffusion.bases.architectures import Architecture
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core.errors import UserError
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import GenerateConfig
from peft_diffusion.training import TrainConfig
from scripts.measuring import memory_words, peak_memory, run

KINDS = {
    "sd1": Architecture("sd1"),
    "sd1-inpainting": Architecture("sd1", inpainting=True),
    "sd2": Architecture("sd2"),
    "sd2-v": Architecture("sd2-v"),
    "sdxl": Architecture("sdxl"),
    "sdxl-inpainting": Architecture("sdxl", inpainting=True),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Build, train, generate, print."""
    options = _options()
    console, table = Console(), Table("kind", "UNet", "training", "peak memory", "generating", "loss before", "after")
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = options.output / "pictures"
    draw(pictures, options.size)
    for kind in options.kinds:
        table.add_row(kind, *check(kind, pictures, options, console))
        console.print(table)


def check(kind: str, pictures: Path, options: argparse.Namespace, console: Console) -> tuple[str, ...]:
    """Train and generate on one kind; what is told of it."""
    pipe = build(KINDS[kind], DTYPES[options.precision], torch.device(options.device))
    parameters = sum(parameter.numel() for parameter in pipe.unet.parameters())
    before = checksum(components(pipe))
    text = ("text_encoder", "text_encoder_2") if kind.startswith("sdxl") else ("text_encoder",)
    run = TrainConfig(
        (pictures,), output=options.output / f"{kind}.safetensors", run_dir=options.output / "runs" / kind, overwrite=True,
        components=("unet", *text), rank=8, steps=options.steps, batch_size=1, resolution=options.size, preview_steps=0,
        save_every=options.steps, held_out=0.25, device=options.device, precision=options.precision,
    )  # fmt: skip
    began = time.monotonic()
    with peak_memory() as memory:
        result = train(run, pipe=pipe, observers=[TrainingConsole(console)])
    trained = time.monotonic() - began
    if checksum(components(pipe)) != before:
        raise UserError(f"{kind}: the base was changed")
    adapters, began = Adapters(pipe), time.monotonic()
    name = adapters.load(result.output)
    sampling = GenerateConfig(("red ball",), steps=2, width=options.size, height=options.size, device=options.device)
    with_it, without = (next(paint(adapters, [Cell("red ball", 0, {name: s})], sampling)) for s in (1.0, 0.0))
    if with_it.tobytes() == without.tobytes():
        raise UserError(f"{kind}: the adapter changes nothing")
    with_it.save(options.output / f"{kind}.png")
    losses = (f"{loss:.4f}" for loss in (result.held_out_before, result.held_out_after) if loss is not None)
    seconds = f"{time.monotonic() - began:.0f} s"
    return f"{parameters:,}", f"{trained:.0f} s", memory_words(memory.get("peak")), seconds, *losses


def build(found: Architecture, dtype: torch.dtype, device: torch.device) -> Any:
    """A pipeline of that architecture with random weights, made where and as it shall be."""
    configs = found.configs()
    parts: dict[str, Any] = {}
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, tempfile.TemporaryDirectory() as folder:
            found.write(Path(folder))
            for name in ("unet", "vae"):
                cls = getattr(diffusers, configs[name]["_class_name"])
                parts[name] = cls.from_config(configs[name])
            for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
                if name in configs:
                    cls = getattr(transformers, configs[name]["architectures"][0])
                    parts[name] = cls(cls.config_class(**configs[name]))
                    parts[tokenizer] = transformers.CLIPTokenizer.from_pretrained(Path(folder) / tokenizer)
            schedule = getattr(diffusers, configs["scheduler"]["_class_name"])
            parts["scheduler"] = schedule.from_config(configs["scheduler"])
    finally:
        torch.set_default_dtype(default)
    if found.kind != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return getattr(diffusers, found.pipeline)(**parts)


def draw(folder: Path, size: int, count: int = 8) -> None:
    """Pictures of coloured balls, at most 64, named after them."""
    folder.mkdir(exist_ok=True)
    colours = ("red", "green", "blue", "orange", "purple", "black", "pink", "brown")
    for number in range(count):
        colour, row = colours[number % 8], number // 8
        picture = Image.new("RGB", (size, size), "white")
        ImageDraw.Draw(picture).ellipse([size * (number % 8) // 32, size * (row + 3) // 12, size * 3 // 4, size], colour)
        name = f"{colour} ball" if row == 0 else f"{colour} ball {row}"
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{colour} ball")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("families"), help="folder for adapters, runs and pictures")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["sd1", "sd2-v", "sdxl"])
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument("--precision", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
