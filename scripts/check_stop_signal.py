"""Whether the weights that a run chooses are the best ones, by pictures that it never had.

    python scripts/check_stop_signal.py --output stop-signal
    python scripts/check_stop_signal.py --output stop-signal --styles openmoji --steps 60 --pictures 18

For each sample style: a third of the folder is left out; a run learns from the rest, or from ``--pictures`` of it, at a rate
that over-trains it, and all its checkpoints are kept. Every one of them is then measured on what was left out, with fixed
noise and timesteps. Prints the loss that the run saw and the one that it did not see for each checkpoint, and by how much
the chosen one is above the best (2% is allowed, or the script ends with exit code 1). Writes ``figures.json``, ``table.md``.
"""

import argparse
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.api import train
from peft_diffusion.bases import embedded
from peft_diffusion.core.arena import Arena
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.training import TrainConfig, TrainResult
from peft_diffusion.training.attachment import NAME, attach, selected_components
from peft_diffusion.training.record.run_folder import RunFolder
from peft_diffusion.training.settings.placements import blocks
from peft_diffusion.training.tasks.diffusion import DiffusionSettings, DiffusionTask
from peft_diffusion.training.tasks.preparation import prepare
from scripts.measuring import markdown_table, run, write_results

STYLES = ("openmoji", "twemoji", "fluent-flat")
ALLOWED = 0.02


@dataclass(frozen=True)
class Check:
    """Losses by step: ``seen_by_run`` on what the run kept apart, ``exam`` on what it never had."""

    style: str
    chosen: int
    seen_by_run: dict[int, float]
    exam: dict[int, float]
    warning: str | None

    @property
    def best(self) -> int:
        return min(self.exam, key=lambda step: self.exam[step])

    @property
    def above(self) -> float:
        """By which share the chosen checkpoint's loss is above the best one's."""
        return self.exam[self.chosen] / self.exam[self.best] - 1


def split(style: str, where: Path, count: int | None) -> tuple[Path, Path]:
    """Two folders of a style's pictures: for the run, at most ``count``, and for the exam."""
    source = embedded(f"styles/{style}")
    pictures = sorted(source.glob("*.webp"))
    exam = pictures[::3]
    learned = [picture for picture in pictures if picture not in exam][:count]
    for name, part in (("learned", learned), ("exam", exam)):
        shutil.rmtree(where / name, ignore_errors=True)
        (where / name).mkdir(parents=True)
        for picture in part:
            for file in (picture, picture.with_suffix(".txt")):
                if file.exists():
                    shutil.copy(file, where / name)
    return where / "learned", where / "exam"


def examine(result: TrainResult, folder: Path) -> dict[int, float]:
    """The loss on a folder's pictures with each checkpoint of a run."""
    config = TrainConfig(folder=(folder,), base=result.config.base, missing_captions="name", held_out=0.0, device="cpu")
    prepared = prepare(config, None, lambda event: None, TrainingPictures())
    parts = selected_components(prepared.pipe, result.config.components)
    attached = attach(parts, blocks(result.config), result.config.seed, lambda _: 1.0)
    arena = Arena(attached.groups)
    settings = DiffusionSettings(batch_size=result.config.batch_size)
    task = DiffusionTask(prepared.pipe, NAME, settings, prepared.train, prepared.train)
    found = {}
    runs = RunFolder(result.run_dir)
    for step in runs.steps():
        found_there = runs.at(step)
        if found_there is None:
            raise SystemExit(f"the checkpoint of step {step} in {result.run_dir} is damaged")
        arena.load(found_there.state.tensors["parameters"])
        loss = task.held_out()
        if loss is not None:
            found[step] = loss
    return found


def check(style: str, arguments: argparse.Namespace) -> Check:
    """Train on a style, and measure every checkpoint."""
    where = arguments.output / style
    learned, exam = split(style, where, arguments.pictures)
    every = max(1, arguments.steps // arguments.checkpoints)
    config = TrainConfig(
        folder=(learned,),
        output=where / f"{style}.safetensors",
        run_dir=where / "run",
        steps=arguments.steps,
        unet_lr=arguments.rate,
        batch_size=arguments.batch_size,
        scheduler="constant",
        held_out=arguments.held_out,
        missing_captions="name",
        save_every=every,
        keep="best",
        keep_checkpoints=arguments.steps // every + 1,
        preview_steps=0,
        overwrite=True,
        device="cpu",
    )
    result = train(config)
    if result.outcome is None:
        raise RuntimeError("this process does not lead its run")
    metrics = RunFolder(result.run_dir).metrics()
    told = {line["step"]: line["held_out_loss"] for line in metrics if "held_out_loss" in line and line["step"]}
    return Check(style, result.outcome.kept, told, examine(result, exam), result.outcome.warning)


def main() -> None:
    """Check every style that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--styles", nargs="+", default=STYLES, choices=STYLES)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--held-out", type=float, default=0.25)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    checks = [check(style, arguments) for style in arguments.styles]
    for one in checks:
        print(f"\n{one.style}: chosen step {one.chosen}, best {one.best}, {one.above:+.2%}; {one.warning or 'no warning'}")
        rows = [[str(step), f"{one.seen_by_run[step]:.4f}", f"{one.exam[step]:.4f}"] for step in sorted(one.exam)]
        print(markdown_table(("step", "kept apart", "exam"), rows))
    rows = [[one.style, str(one.chosen), str(one.best), f"{one.above:+.2%}"] for one in checks]
    table = markdown_table(("style", "chosen step", "best step", "above the best"), rows)
    write_results(arguments.output, [asdict(one) for one in checks], table)
    if any(one.above > ALLOWED for one in checks):
        sys.exit(f"a chosen checkpoint is more than {ALLOWED:.0%} above the best")


if __name__ == "__main__":
    run(main)
