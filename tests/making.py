"""Adapters with a visible effect, and the real command, for the tests of the command line and of generation."""

import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import forked
import torch
from copies import Copies

from peft_diffusion import bases, formats
from peft_diffusion.bases.pipelines import Pipeline
from peft_diffusion.core import site
from peft_diffusion.generation.adapters import StepWatch
from peft_diffusion.methods.lora import Lora

TARGET = "attention+ff"


def make_adapter(path: Path, base: Path, seed: int, triggers: tuple[str, ...] = (), size: float = 2.0) -> Path:
    """A random LoRA of rank 4 on the UNet and the text encoder of a base folder, large enough to change pictures."""
    pipe = _read(str(base)).copy()
    parts = {name: part for name, part in bases.components(pipe).items() if name in ("unet", "text_encoder")}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    for part in parts.values():
        site.attach(part, "made", Lora(rank=4), TARGET)
        for adapter in site.adapters(part, "made").values():
            torch.nn.init.normal_(adapter.get_parameter("up"), std=size)
    torch.set_rng_state(state)
    methods = {name: ({**Lora(rank=4).spec(), "target": TARGET},) for name in parts}
    training = {"images": 48, "steps_done": 300, "held_out_loss": 0.125}
    formats.save(path, parts, "made", formats.Spec(methods, asdict(bases.describe(pipe)), triggers, training))
    return path


@cache
def _read(base: str) -> Copies[Pipeline]:
    return Copies(partial(bases.load_base, base, device="cpu"))


def step_watches(network: torch.nn.Module) -> list[StepWatch]:
    """The hooks of a network that follow its steps."""
    return [hook for hook in network._forward_pre_hooks.values() if isinstance(hook, StepWatch)]


def spec_of(path: Path) -> formats.Spec:
    """What an adapter's file says of itself."""
    spec = formats.inspect(path).spec
    assert spec is not None
    return spec


def modes(*modules: torch.nn.Module) -> list[tuple[str, bool]]:
    """Whether each module trains, and each parameter takes gradients."""
    trains = [(path, one.training) for whole in modules for path, one in whole.named_modules()]
    return trains + [(path, own.requires_grad) for whole in modules for path, own in whole.named_parameters()]


def command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``peft-diffusion`` in a process of its own, and take what it prints; its libraries are imported, see `forked`."""
    return forked.python(["-m", "peft_diffusion", *map(str, arguments)], cwd, environment())


def typed(*arguments: object, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run ``peft-diffusion`` by a new interpreter, as a person would, and take what it prints."""
    return subprocess.run(
        [sys.executable, "-m", "peft_diffusion", *map(str, arguments)],
        cwd=cwd, env=environment(), text=True, capture_output=True, timeout=300, **more,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """Offline, one thread: two runs side by side must not slow each other down."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
