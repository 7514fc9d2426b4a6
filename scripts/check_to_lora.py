"""How much of what each method learned is kept when its file becomes a LoRA, measured on pictures that none was trained on.

    python scripts/check_to_lora.py --output check-to-lora
    python scripts/check_to_lora.py --output check-to-lora --device cuda --steps 300

Each method that is no new word learns a sample style on the embedded base, with its defaults; ``convert --to-lora`` makes
a LoRA of its file. The plain loss of the base, of the method and of the LoRA is taken on drawings kept apart, with noise and
timesteps that are the same for all. What is kept is the LoRA's fall below the base's loss over the method's. Prints the
table of the documents and writes ``figures.json``.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TypeAlias

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion import formats, methods
from peft_diffusion.api import train
from peft_diffusion.bases import components, embedded, load_base
from peft_diffusion.bases.pipelines import Pipeline
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.data.folder import scan
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.tools.convert import convert
from peft_diffusion.tools.settings import ConvertConfig
from peft_diffusion.training.settings.pictures import TrainConfig
from peft_diffusion.training.tasks.diffusion import DiffusionSettings, DiffusionTask
from peft_diffusion.training.tasks.preparation import prepare
from scripts.measuring import markdown_table, run

APART = 6  # one drawing of so many is kept apart
NOISES = 8  # times that each drawing kept apart is looked at
Row: TypeAlias = dict[str, float | str]


def main() -> None:
    """Train, convert and measure each method."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    learn, apart = split(embedded(f"styles/{options.style}"), options.output)
    pipe = load_base("icons", device=options.device, dtype="float32")
    task = task_on(apart, pipe, options.device)
    base = loss(task)
    rows: list[Row] = []
    for name in options.methods or names():
        rows.append(measured(name, learn, base, task, options))
        print(json.dumps(rows[-1]), flush=True)
    print(markdown_table(
        ["method", "fall of the unseen loss", "of the LoRA", "kept"],
        [[str(row["method"]), f"{row['fall']:.4f}", f"{row['lora_fall']:.4f}", f"{row['kept']:.0%}"] for row in rows],
    ))  # fmt: skip
    told = {"base": base, "rank": options.rank, "steps": options.steps, "device": options.device, "rows": rows}
    (options.output / "figures.json").write_text(json.dumps(told, indent=1) + "\n")


def names() -> list[str]:
    """The methods that change what layers compute, by name."""
    return [name for name, method in methods.known().items() if not method.reads_words]


def split(source: Path, output: Path) -> tuple[Path, Path]:
    """Copy a style's drawings into a folder to learn from and one to measure on, there once for each noise."""
    folders = output / "learn", output / "apart"
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for number, picture in enumerate(scan([source]).pictures):
        apart = number % APART == 0
        for copy in range(NOISES if apart else 1):
            place = folders[apart] / f"{picture.path.stem}-{copy}{picture.path.suffix}"
            shutil.copy(picture.path, place)
            place.with_suffix(".txt").write_text(picture.caption, "utf-8")
    return folders


def task_on(folder: Path, pipe: Pipeline, device: str) -> DiffusionTask:
    """The plain loss on the drawings of a folder."""
    config = TrainConfig((folder,), held_out=0.0, caption_dropout=0.0, batch_size=8, device=device)
    prepared = prepare(config, pipe, lambda event: None, TrainingPictures())
    task = DiffusionTask(prepared.pipe, "a", DiffusionSettings(batch_size=8), prepared.train)
    task.unseen = task.train
    return task


def loss(task: DiffusionTask) -> float:
    """The plain loss, with what is attached now."""
    found = task.held_out()
    if found is None:
        raise UserError("no drawings were kept apart")
    return found


def loss_with(file: Path, task: DiffusionTask) -> float:
    """The plain loss with an adapter file attached."""
    loaded, parts = formats.load(file, task.pipe, strict=True), components(task.pipe)
    for name, adapters in loaded.components.items():
        site.attach_built(parts[name], "a", adapters)
        parts[name].to(next(parts[name].parameters()).device)
    found = loss(task)
    for name in loaded.components:
        site.detach(parts[name], "a")
    return found


def measured(name: str, learn: Path, base: float, task: DiffusionTask, options: argparse.Namespace) -> Row:
    """Train with one method, make a LoRA of it, and compare both on the drawings kept apart."""
    file = options.output / f"{name}.safetensors"
    lora = options.output / f"{name}-lora.safetensors"
    train(TrainConfig(
        (learn,), output=file, run_dir=options.output / name, method=name, steps=options.steps, device=options.device,
        held_out=0.0, preview_steps=0, overwrite=True, precision="float32", components=("unet",),
    ))  # fmt: skip
    lora.unlink(missing_ok=True)
    convert(ConvertConfig(file, lora, to_lora=options.rank, base="icons"))
    own, other = loss_with(file, task), loss_with(lora, task)
    return {"method": name, "loss": own, "lora_loss": other, "fall": base - own, "lora_fall": base - other,
            "kept": (base - other) / (base - own)}  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("check-to-lora"), help="folder for adapters and figures")
    parser.add_argument("--style", default="openmoji", help="a folder of samples/styles")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRAs that are made")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each method")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="*", help="these alone, by name")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
