"""What an adapter learned of a subject, and what it left of the rest, on the sample subject.

    python scripts/evaluate_subject.py --output evaluation

Trains, with the defaults of ``--preset subject``, a LoRA without pictures of the class and one with them, and learned tokens
beside a LoRA without and with them, which weigh ten times there (or takes what is in ``--adapters``), and prints for each

- how far what it draws is from pictures of the character that training did not show, in faces and settings of their own,
  beside how far the base's pictures are for the same prompts and noise;
- how far 100 prompts without the trigger have moved from what the base draws from the same noise;
- trained parameters and seconds.

*Distance* is that of colours and edges (``drawings.maps_of``) and that of what a small network sees (``style_net``),
inside the character's outline, as settings differ; each in units of how far another character of the same hand is, and their
mean; a picture's is to the three nearest. It is calibrated on real pictures: the character's own among themselves, and how
often one of them is nearer than one of another character. *Moved* is the mean difference of pixels, from 0 to 1.

The pictures that training did not show come from npm (Node.js is needed). Writes ``figures.json``, ``table.md`` and a sheet.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.api import train
from peft_diffusion.bases import embedded, load_base
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.evaluation.drawings import SIZE, distances, maps_of
from peft_diffusion.evaluation.style_net import StyleNet, load_style_net
from peft_diffusion.formats import inspect
from peft_diffusion.generation import Adapters, sheet
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import GenerateConfig
from peft_diffusion.training import TrainConfig
from scripts.build_base.make_samples import CHARACTER, HELD_BACK, SCENES, SUBJECTS, install, portraits
from scripts.build_base.sources import CACHE
from scripts.measuring import markdown_table, run

NEAREST = 3
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


@dataclass(frozen=True)
class Ruler:
    """Measures how far pictures, (count, 3, height, width) in bytes, are from the character; other characters are at 1."""

    own: Tensor
    others: Tensor
    outline: Tensor
    net: StyleNet

    @classmethod
    def of(cls, packages: Path, own: Tensor) -> "Ruler":
        """A ruler by these pictures of the character, those of others in the same settings, and the character's outline."""
        scenes = [scene for scene in HELD_BACK for _ in OTHERS]
        others = _pixels(portraits(packages, scenes, OTHERS * len(HELD_BACK)))
        grounds = [replace(SCENES[0], behind=f'<rect width="704" height="704" fill="{fill}"/>') for fill in ("#fff", "#000")]
        white, black = _pixels(portraits(packages, grounds, [CHARACTER] * 2)).int()
        outline = ((white - black).abs().amax(0, keepdim=True) < 8).byte()  # where nothing shines through
        return cls(_inside(own, outline), _inside(others, outline), outline, load_style_net())

    def __call__(self, images: Tensor) -> list[float]:
        """The distance of each picture."""
        images = _inside(images, self.outline)
        return sum(_nearest(of(images), unit) for of, unit in self._measures()).div(2).tolist()  # type: ignore[union-attr]

    def calibrated(self) -> dict[str, float]:
        """The character's own pictures from one another, others', and how often one of its own is nearer than another's."""
        own, others = torch.zeros(len(self.own)), torch.zeros(len(self.others))
        for of, unit in self._measures():
            among = of(self.own)
            among.fill_diagonal_(torch.inf)
            own, others = own + _nearest(among, unit) / 2, others + _nearest(of(self.others), unit) / 2
        nearer = (own[:, None] < others[None]).float().mean().item()
        return {"own": own.mean().item(), "others": others.mean().item(), "own_nearer": nearer}

    def _measures(self) -> list[tuple[Callable[[Tensor], Tensor], float]]:
        """Distances to the character's pictures, (images, own), and the mean of other characters'."""
        maps, seen = maps_of(self.own), self._seen(self.own)
        spread = torch.cat([seen, self._seen(self.others)]).std(0).clamp(min=1e-3)
        found: list[Callable[[Tensor], Tensor]] = [
            lambda images: distances(maps_of(images), maps),
            lambda images: torch.cdist(self._seen(images) / spread, seen / spread),
        ]
        return [(of, _nearest(of(self.others), 1.0).mean().item()) for of in found]

    @torch.no_grad()
    def _seen(self, images: Tensor) -> Tensor:
        """What the network tells styles by: means and maxima of its layers."""
        values = torch.nn.functional.interpolate(images.float() / 255, SIZE, mode="area")
        return self.net.features(values)


def _inside(images: Tensor, outline: Tensor) -> Tensor:
    """Pictures on white outside an outline."""
    return images * outline + 255 * (1 - outline)


def _nearest(found: Tensor, unit: float) -> Tensor:
    return found.topk(NEAREST, largest=False).values.mean(1) / unit


def main() -> None:
    """Train, measure, draw, print."""
    options, console = _options(), Console()
    options.output.mkdir(parents=True, exist_ok=True)
    packages = install(CACHE)
    real = [_small(picture) for picture in portraits(packages, HELD_BACK, [CHARACTER] * len(HELD_BACK))]
    ruler = Ruler.of(packages, _pixels(real))
    calibration = ruler.calibrated()
    console.print(
        f"real pictures: the character's own at {calibration['own']:.2f} of one another, another character's at"
        f" {calibration['others']:.2f}; its own nearer {calibration['own_nearer']:.0%} of the time"
    )
    shown = ruler(_pixels([Image.open(embedded("subjects/mira") / f"{scene.name}.webp").convert("RGB") for scene in SCENES]))
    console.print(f"the pictures that training shows: {_mean(shown):.2f}")
    adapters = Adapters(load_base("icons", device=options.device))
    prompts, rest = [scene.caption for scene in HELD_BACK], untriggered()[:: 100 // options.prompts]
    drawn = {"base": _draw(adapters, prompts, options)}
    before = _pixels(_draw(adapters, rest, options))
    base = _mean(ruler(_pixels(drawn["base"])))
    found = []
    for name in options.variants:
        file = options.adapters / f"{_file_name(name)}.safetensors" if options.adapters else None
        seconds = 0.0
        if file is None:
            file, seconds = _train(name, adapters.pipe, options, console)
        adapters.load(file, name="mira")
        drawn[name] = _draw(adapters, prompts, options)
        moved = (_pixels(_draw(adapters, rest, options)).float() - before.float()).abs().mean().item() / 255
        adapters.remove("mira")
        distance = _mean(ruler(_pixels(drawn[name])))
        row = {"name": name, "distance": distance, "of_base": distance / base, "moved": moved, "seconds": seconds}
        found.append(row | {"parameters": inspect(file).parameters})
        console.print(f"{name}: distance {distance:.2f}, {distance / base:.0%} of the base's; the rest moved by {moved:.4f}")
        _report(found, {"base": base, **calibration, "shown": _mean(shown)}, options.output)
        rows = [*drawn.values(), real]
        labels = [*drawn, "the real pictures, never shown in training"]
        sheet.grid(rows, labels, [scene.name for scene in HELD_BACK]).save(options.output / "mira.png")


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


def _draw(adapters: Adapters, prompts: Sequence[str], options: argparse.Namespace) -> list[Image.Image]:
    sampling = GenerateConfig(tuple(prompts), steps=options.steps, batch_size=8, device=options.device)
    strengths = dict.fromkeys(adapters.names, 1.0)
    return list(paint(adapters, [Cell(prompt, seed, strengths) for seed, prompt in enumerate(prompts)], sampling))


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(_small(image)) for image in images])).permute(0, 3, 1, 2)


def _small(image: Image.Image) -> Image.Image:
    """A picture at the size that all are measured at."""
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _file_name(variant: str) -> str:
    return variant.replace(",", "").replace(" ", "_")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _report(found: Sequence[dict[str, Any]], known: dict[str, float], output: Path) -> None:
    headings = ("", "distance", "of the base's", "the rest moved by", "parameters", "training")
    rows = [
        (
            row["name"],
            f"{row['distance']:.2f}",
            f"{row['of_base']:.0%}",
            f"{row['moved']:.4f}",
            f"{row['parameters']:,}",
            f"{row['seconds']:.0f} s",
        )
        for row in found
    ]
    (output / "table.md").write_text(markdown_table(headings, rows))
    (output / "figures.json").write_text(json.dumps({"known": known, "runs": list(found)}, indent=1) + "\n")


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
