"""Compares the memory that a run is predicted to take with what it takes.

    python scripts/check_preflight.py --cases sd1 sd1-low sdxl sdxl-nf4-low --device cuda --output preflight

For each case: builds the true architecture with random weights in bfloat16, trains a LoRA on its UNet for a few steps of one
picture, and prints the prediction beside the peak from then on: of torch's allocator on CUDA, and of the process on a CPU,
where what was in use before is taken off. Random weights learn nothing; the memory is the same. With ``--preview-steps``
pictures are drawn too, and what CUDA's allocator reserves is compared: recorded steps keep their part of it meanwhile.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.api import train
from peft_diffusion.bases import components
from peft_diffusion.bases.digest import quantize
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.machine import memory_plan
from peft_diffusion.training.need import Need
from scripts.check_families import KINDS, build, draw
from scripts.measuring import MIB, run

# Kind of base, pixels a side, and what is asked of the run.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "sd1": ("sd1", 512, {"memory": "off"}),
    "sd1-low": ("sd1", 512, {"memory": "low"}),
    "sd1-nf4-low": ("sd1", 512, {"memory": "low", "quantize": "nf4"}),
    "sdxl": ("sdxl", 1024, {"memory": "off"}),
    "sdxl-low": ("sdxl", 1024, {"memory": "low"}),
    "sdxl-nf4": ("sdxl", 1024, {"memory": "off", "quantize": "nf4"}),
    "sdxl-nf4-low": ("sdxl", 1024, {"memory": "low", "quantize": "nf4"}),
}


class Watch:
    """Sees the predictions of a run, and what is taken from the last one on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.need: Need | None = None
        self.before = 0  # bytes of the process that are no tensors of the run

    def __call__(self, need: Callable[[memory_plan.MemoryPlan, bool], Need], of: memory_plan.MemoryPlan, low: bool) -> Need:
        """Predict, and begin to measure."""
        self.need = need(of, low)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _process("VmRSS") - self.need.weights - self.need.adapter
        return self.need

    def measured(self, reserved: bool) -> int:
        """The peak, in bytes."""
        if self.device.type == "cuda":
            return int((torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated)(self.device))
        return _process("VmHWM") - self.before


def main() -> None:
    """Predict, run, print."""
    options = _options()
    console, table = Console(), Table("case", "predicted MiB", "measured MiB", "difference", "base", "adapter", "step")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.cases:
        need, measured = check(name, options, console)
        parts = (f"{size / MIB:.0f}" for size in (need.weights, need.adapter, need.step))
        off = f"{need.total / measured - 1:+.1%}"
        table.add_row(name, f"{need.total / MIB:.0f}", f"{measured / MIB:.0f}", off, *parts)
        console.print(table)


def check(name: str, options: argparse.Namespace, console: Console) -> tuple[Need, int]:
    """What one case is predicted to take, and what it takes."""
    kind, size, asked = CASES[name]
    size = options.size or size
    device = torch.device(options.device)
    pictures = options.output / f"pictures-{size}"
    draw(pictures, size)
    pipe = build(KINDS[kind], torch.bfloat16, device)
    if "quantize" in asked:
        quantize(components(pipe), asked["quantize"], device)
    config = TrainConfig(
        (pictures,), output=options.output / f"{name}.safetensors", run_dir=options.output / "runs" / name, overwrite=True,
        rank=options.rank, steps=options.steps, batch_size=options.batch_size, resolution=size, held_out=0.0,
        preview_steps=options.preview_steps, save_every=options.steps, device=options.device, precision="bfloat16",
        cuda_graph=options.cuda_graph, **asked,
    )  # fmt: skip
    watch, need = Watch(device), memory_plan.MemoryPlan.need
    watched = patch.object(memory_plan.MemoryPlan, "need", lambda of, low: watch(need, of, low))
    with watched, patch.object(memory_plan, "SMALL", 0):
        train(config, pipe=pipe, observers=[TrainingConsole(console)])
    if watch.need is None:
        raise RuntimeError("nothing was predicted")
    measured = watch.measured(options.preview_steps > 0)
    del pipe
    gc.collect()
    return watch.need, measured


def _process(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("preflight"), help="folder for adapters, runs and pictures")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["sd1", "sd1-low", "sdxl", "sdxl-nf4-low"])
    parser.add_argument("--size", type=int, help="pixels a side, in place of the case's")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="training steps")
    parser.add_argument("--preview-steps", type=int, default=0, help="steps of the pictures drawn before and after")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, default=True, help="record the steps, which takes memory too"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
