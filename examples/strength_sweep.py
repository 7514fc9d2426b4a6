"""A sheet of one adapter at several strengths, from Python. Trains one first where there is none."""

import argparse
from pathlib import Path

import torch

import peft_diffusion as pd
from peft_diffusion.generation.sheet import grid


def teach(path: Path, folder: Path, steps: int) -> None:
    """Train a LoRA on a folder of pictures, one picture a step, and draw no previews."""
    pd.train(pd.TrainConfig((folder,), output=path, steps=steps, batch_size=1, held_out=0, preview_steps=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=Path("openmoji.safetensors"), help="is trained if it is not there")
    parser.add_argument("--folder", type=Path, default=Path("samples/styles/openmoji"), help="to train on, then")
    parser.add_argument("--train-steps", type=int, default=30, help="of that training; 300 teach the style well")
    parser.add_argument("--prompts", nargs="+", default=["openmoji emoji of a red apple", "openmoji emoji of a cat"])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--steps", type=int, default=6, help="denoising steps")
    parser.add_argument("--output", type=Path, default=Path("strengths.png"))
    given = parser.parse_args()
    if not given.adapter.exists():
        teach(given.adapter, given.folder, given.train_steps)

    pipe = pd.load_base("icons")
    pipe.set_progress_bar_config(disable=True)
    adapters = pd.Adapters(pipe)
    adapters.load(given.adapter, name="style")
    # One strength an image: a row is one batch, and all of its images start from the same noise.
    count = len(given.strengths)
    adapters.set(style=given.strengths)
    rows = []
    for prompt in given.prompts:
        seeds = [torch.Generator().manual_seed(0) for _ in range(count)]
        rows.append(pipe(prompt, num_images_per_prompt=count, generator=seeds, num_inference_steps=given.steps).images)
    # A strength that changes over the steps: the base decides on the composition, the adapter on the detail.
    adapters.set(style=pd.Schedule([0.0, 1.0]))
    for prompt, row in zip(given.prompts, rows, strict=True):
        seed = torch.Generator().manual_seed(0)
        row.extend(pipe(prompt, generator=seed, num_inference_steps=given.steps).images)
    labels = [*(f"strength {strength:g}" for strength in given.strengths), "from 0 to 1 over the steps"]
    grid(rows, given.prompts, labels).save(given.output)
    print(f"{given.output}: {len(rows)} prompts at {count} strengths and a schedule")


if __name__ == "__main__":
    main()
