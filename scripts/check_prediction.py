"""Checks the test of what a base predicts, on the embedded base and on one of it that is fine-tuned to predict v.

    python scripts/check_prediction.py --device cuda

Fine-tunes the whole UNet of the embedded base to v-prediction on the sample styles (minutes on a GPU), and asks each of
both what it predicts, in 20 trials of other pictures and other noise. Prints the count of right answers, and how far the v
variant came: its loss beside that of answering with zeros. ``--save FOLDER`` keeps the variant as a diffusers folder.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.bases.denoiser import Conditioning
from peft_diffusion.bases.noise import Prediction
from peft_diffusion.core import site
from peft_diffusion.core.events import untold
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.attachment import NAME
from peft_diffusion.training.machine.processes import Processes
from peft_diffusion.training.pictures import diffusion_task
from peft_diffusion.training.settings.placements import blocks
from peft_diffusion.training.tasks.diffusion import DiffusionTask
from peft_diffusion.training.tasks.preparation import prepare
from scripts.measuring import run

STYLES = Path(__file__).resolve().parent.parent / "samples" / "styles"


def task_of(arguments: argparse.Namespace, where: Path) -> DiffusionTask:
    """The sample styles as what the base is asked about, and fine-tuned on."""
    config = TrainConfig(
        folder=tuple(sorted(path for path in STYLES.iterdir() if path.is_dir())), output=where / "a.safetensors",
        run_dir=where / "run", device=arguments.device, precision="float32", batch_size=arguments.batch_size,
        preview_steps=0, missing_captions="name", held_out=0.0,
    )  # fmt: skip
    prepared = prepare(config, None, untold, TrainingPictures())
    task = diffusion_task(prepared, blocks(replace(prepared.config, components=("unet",))), Processes())
    assert task.embeddings is not None  # of all captions, before the text encoder is idle
    return task


def says(task: DiffusionTask, prediction: Prediction) -> None:
    """Let the base say that it predicts something."""
    pipe: Any = task.pipe
    scheduler = pipe.scheduler
    pipe.register_modules(scheduler=type(scheduler).from_config({**scheduler.config, "prediction_type": prediction}))
    task.prediction = prediction


def fine_tune(task: DiffusionTask, steps: int, rate: float) -> tuple[float, float]:
    """Teach the whole UNet to predict v; gives the loss of the last tenth, and that of answering with zeros."""
    unet: Any = task.denoiser.network
    says(task, "v_prediction")
    unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=0.0)
    losses: list[tuple[float, float]] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50, 10 * (steps - step) / steps)
        inputs = {name: tensor.to(task.device) for name, tensor in task.inputs(step, 0).items()}
        answer, wanted = task.answer(inputs)
        loss = F.mse_loss(answer.float(), wanted.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps * 9 // 10:
            losses.append((loss.item(), wanted.square().mean().item()))
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}", flush=True)
    unet.requires_grad_(False)
    return sum(one for one, _ in losses) / len(losses), sum(zero for _, zero in losses) / len(losses)


def converted(task: DiffusionTask) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
    """The network as one that predicts v: what follows from its prediction of the noise."""
    plain = task.denoiser.predict

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        noise, power = plain(noisy, timesteps, conditioning), task.powers[timesteps].view(-1, 1, 1, 1)
        latents = (noisy - (1 - power).sqrt() * noise) / power.sqrt()
        return power.sqrt() * noise - (1 - power).sqrt() * latents

    return predict


def trials(task: DiffusionTask, count: int, truth: Prediction) -> int:
    """Ask in trials of other pictures and noise; gives how often the answer was right."""
    right = 0
    for trial in range(count):
        entries = random.Random(trial).sample(range(len(task.train.latents.entries)), 4)
        found = task.fitting_prediction(entries, seed=trial)
        right += found == truth
        if found != truth:
            print(f"trial {trial}: {found} in place of {truth}")
    return right


def main() -> None:
    """Fine-tune and ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=2000, help="of the fine-tuning")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of the fine-tuning")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--save", type=Path, help="folder to keep the variant in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = task_of(arguments, Path(folder))
        assert not site.adapters(task.denoiser.network, NAME)
        right = trials(task, arguments.trials, "epsilon")
        print(f"epsilon: {right} of {arguments.trials} right", flush=True)
        with patch.object(task.denoiser, "predict", converted(task)):
            right = trials(task, arguments.trials, "v_prediction")
        print(f"v, by the formula from the noise that it predicts: {right} of {arguments.trials} right", flush=True)
        came, zeros = fine_tune(task, arguments.steps, arguments.rate)
        print(f"fine-tuned to v: loss {came:.4f}, of zeros {zeros:.4f}")
        for said in ("v_prediction", "epsilon"):  # whatever the base says of itself
            says(task, said)
            right = trials(task, arguments.trials, "v_prediction")
            print(f"v, said to be {said}: {right} of {arguments.trials} right", flush=True)
        if arguments.save is not None:
            says(task, "v_prediction")
            task.restore()
            pipe: Any = task.pipe
            pipe.save_pretrained(arguments.save)
            print(f"wrote {arguments.save}")


if __name__ == "__main__":
    run(main)
