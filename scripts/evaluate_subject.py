"""What an adapter learned of a subject, and what it left of the rest, by ``peft-diffusion evaluate`` on the sample subject.

    python scripts/evaluate_subject.py --output evaluation

Trains, with the defaults of ``--preset subject``, a LoRA without pictures of the class and one with them, and learned tokens
beside a LoRA without and with them, which weigh ten times there (or takes what is in ``--adapters``). Evaluates them on
pictures of the character that training did not show, in faces and settings of their own, against other characters of the
same hand, and prints for each

- how far what it draws went from the base's to those pictures, in what the judge sees (likeness), and how many are nearer to
  the character than to the others and the base;
- by how much the loss on them fell;
- how far 100 prompts without the trigger have moved from what the base draws from the same noise, in pixels from 0 to 1;
- trained parameters and seconds.

The pictures that training did not show come from npm (Node.js is needed). Writes ``figures.json``, ``table.md``, and what
``evaluate`` writes.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.api import train
from peft_diffusion.bases import embedded, load_base
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.cli.progress import GenerationConsole
from peft_diffusion.evaluation.evaluate import evaluate
from peft_diffusion.evaluation.measured import Alone, Evaluation
from peft_diffusion.evaluation.settings import EvaluateConfig
from peft_diffusion.training import TrainConfig
from scripts.build_base.make_samples import CHARACTER, HELD_BACK, SUBJECTS, Scene, install, portraits
from scripts.build_base.sources import CACHE
from scripts.measuring import markdown_table, run, write_results

HEADINGS = ("", "likeness", "told the character", "loss falls by", "the rest moved by", "parameters", "training")
STYLES = ("noto emoji of", "3d emoji of", "android blob emoji of", "firefox emoji of")
CLASS_PROMPTS = (
    *(f"{style} {subject}" for style in STYLES for subject in ("a woman", "a person", "a house", "an animal")),
    "a portrait of a woman",
    "a portrait of a person, smiling, white background",
    "a portrait of a man with glasses, at the beach",
    "line icon of a user",
)
OTHERS: tuple[dict[str, Any], ...] = tuple(
    {**CHARACTER, "seed": head, "head": [head], "headContrastColor": [hair], "skinColor": [skin], "clothingColor": [cloth]}
    for head, hair, skin, cloth in (
        ("afro", "2c1b18", "694d3d", "e78276"),
        ("long", "e8e1e1", "ffdbb4", "fdea6b"),
        ("bun", "724133", "edb98a", "9ddadb"),
        ("shaved1", "2c1b18", "ae5d29", "8fa7df"),
        ("mohawk", "a55728", "ffdbb4", "ffcf77"),
        ("medium1", "b58143", "d08b5b", "e279c7"),
    )
)
TOKENS = (
    "unet attention+ff lora",
    "text_encoder tokens tokens placeholders=mira initial=woman",
)
# A LoRA has to tell the trigger from the class by words that the base reads as letters; with more weight on the class it
# learns neither. Beside tokens, which mean the subject alone, the class may count for much.
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, class kept": {"class_prompt": CLASS_PROMPTS},
    "LoRA and tokens": {"block": TOKENS},
    "LoRA and tokens, class kept": {"class_prompt": CLASS_PROMPTS, "block": TOKENS, "prior_weight": 10.0},
}


def main() -> None:
    """Train, evaluate, print."""
    options, console = _options(), Console()
    options.output.mkdir(parents=True, exist_ok=True)
    packages = install(CACHE)
    held_back = _folder(options.output / "held-back", packages, HELD_BACK, [CHARACTER] * len(HELD_BACK))
    scenes = [scene for scene in HELD_BACK for _ in OTHERS]
    others = _folder(options.output / "others", packages, scenes, OTHERS * len(HELD_BACK))
    pipe = load_base("icons", device=options.device)
    files: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for name in options.variants:
        if options.adapters is not None:
            files[name] = options.adapters / f"{_file_name(name)}.safetensors"
        else:
            files[name], seconds[name] = _train(name, pipe, options, console)
    rows, figures = [], {}
    for name, file in files.items():  # one by one, as some teach the base a word that others have too
        found = _evaluated(file, held_back, others, pipe, options)
        console.print("\n".join([name, *found.trust.lines()]))
        rows.append(_row(name, found.alone[0], seconds))
        figures[name] = found.plain() | {"seconds": seconds.get(name)}
    table = markdown_table(HEADINGS, rows)
    console.print(table)
    write_results(options.output, figures, table)


def _evaluated(file: Path, held_back: Path, others: Path, pipe: Any, options: argparse.Namespace) -> Evaluation:
    """What an adapter does on pictures that it never saw."""
    config = EvaluateConfig(
        str(file),
        data=str(held_back),
        trained=str(embedded("subjects/mira")),
        against=others,
        leak_prompts=untriggered()[:: 100 // options.prompts],
        strengths="0,1",
        seeds=1,
        prompts=len(HELD_BACK),
        steps=options.steps,
        device=options.device,
        output=options.output / "evaluated" / file.stem,
    )
    with GenerationConsole("evaluating") as bar:
        return evaluate(config, pipe=pipe, observers=[bar])


def _folder(folder: Path, packages: Path, scenes: Sequence[Scene], characters: Sequence[Mapping[str, Any]]) -> Path:
    """Write pictures of characters, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (scene, picture) in enumerate(zip(scenes, portraits(packages, scenes, characters), strict=True)):
        picture.save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(scene.caption + "\n", encoding="utf-8")
    return folder


def _row(name: str, one: Alone, seconds: Mapping[str, float]) -> tuple[str, ...]:
    at = {measure: values[1.0].mean for measure, values in one.values.items()}
    return (
        name,
        f"{at['likeness']:.0%}",
        f"{at['style']:.0%}",
        f"{at['fall']:.0%}",
        f"{at['moved']:.4f}",
        f"{one.parameters:,}",
        f"{seconds[name]:.0f} s" if name in seconds else "-",
    )


def untriggered() -> list[str]:
    """100 prompts without the trigger, none of which is a class prompt."""
    words = list(SUBJECTS.values())
    pairs = [f"{STYLES[number % len(STYLES)]} {words[number % len(words)]}" for number in range(80)]
    people = ("a boy", "a girl", "an old man", "an old woman", "a child")
    places = (", laughing, yellow background", ", angry, in the rain", " with sunglasses", ", at night")
    return [*pairs, *(f"a portrait of {person}{place}" for person in people for place in places)]


def _train(name: str, pipe: Any, options: argparse.Namespace, console: Console) -> tuple[Path, float]:
    file: Path = options.output / f"{_file_name(name)}.safetensors"
    given = {"steps": options.train_steps} if options.train_steps else {}
    config = TrainConfig(
        (embedded("subjects/mira"),),
        output=file,
        run_dir=options.output / "runs" / file.stem,
        preset="subject",
        trigger="mira",
        device=options.device,
        overwrite=True,
        **given,
        **VARIANTS[name],
    )
    began = time.monotonic()
    train(config, pipe=pipe, observers=[TrainingConsole(console)])
    return file, time.monotonic() - began


def _file_name(variant: str) -> str:
    return variant.replace(",", "").replace(" ", "_")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder for figures, sheet and adapters")
    parser.add_argument("--adapters", type=Path, help="folder of what an earlier run trained, instead of training")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="what to train")
    parser.add_argument("--train-steps", type=int, help="steps of training; by default the preset's")
    parser.add_argument("--prompts", type=int, default=100, choices=(10, 20, 50, 100), help="prompts without the trigger")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of a picture")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
