"""Two subjects in one picture: how often each is seen in its region, and the other one there.

    python scripts/check_regions.py --subject mira.safetensors samples/subjects/mira "a portrait of mira" \
        --subject fox.safetensors FOLDER "a portrait of fox" --output regions.png

Draws each subject alone, both by adding their adapters, both by ``--region`` (left and right halves of a picture twice as
wide) with several ``--region-isolation``, and both by ``--regions auto``; then asks a judge of each half which subject it
shows. The judge is the network of subjects that the package has. It knows each subject by the mean of its real pictures,
and other drawings, and says the nearest. How far it can be trusted is told first: how often it is right about real
pictures, each compared with the others of its subject. Writes a sheet, a way a row, and a file of figures beside it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from peft_diffusion import GenerateConfig, Region, generate
from peft_diffusion.bases import denoiser_of, load_base
from peft_diffusion.data.picture_names import SUFFIXES
from peft_diffusion.evaluation.icons import IconJudge
from peft_diffusion.evaluation.intervals import estimate
from peft_diffusion.generation import sheet

HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))


@dataclass(frozen=True)
class Subject:
    """An adapter, the pictures of what it learned, and the prompt that draws it."""

    adapter: Path
    folder: Path
    prompt: str

    @property
    def name(self) -> str:
        """As tables call it."""
        return self.adapter.stem


@dataclass
class Telling:
    """Tells which of two subjects, or neither, pictures show."""

    subjects: Sequence[Subject]
    others: Path
    judge: IconJudge = field(default_factory=IconJudge)

    def __post_init__(self) -> None:
        self.real = [self.judge.subject(pictures(one.folder)) for one in self.subjects]
        self.strange = self.judge.subject(pictures(self.others))

    def told(self, points: Tensor, known: Sequence[Tensor] | None = None) -> list[int]:
        """The number of the subject that each shows; that behind the last for neither."""
        means = torch.stack([rows.mean(0) for rows in known or self.real])
        means = means / means.norm(dim=1, keepdim=True)
        nearest = (points @ torch.cat([means, self.strange]).t()).argmax(1)
        return nearest.clamp(max=len(self.subjects)).tolist()

    def trust(self) -> list[float]:
        """How often real pictures are told right, each compared with the others of its subject."""
        found = []
        for number, rows in enumerate(self.real):
            right = 0
            for place in range(len(rows)):
                known = list(self.real)
                known[number] = torch.cat([rows[:place], rows[place + 1 :]])
                right += self.told(rows[place : place + 1], known) == [number]
            found.append(right / len(rows))
        return found


def pictures(folder: Path) -> list[Image.Image]:
    """The pictures of a folder."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return [Image.open(path).convert("RGB") for path in paths]


def halves(image: Image.Image) -> list[Image.Image]:
    """The left and the right one."""
    middle = image.width // 2
    return [image.crop((0, 0, middle, image.height)), image.crop((middle, 0, image.width, image.height))]


def ways(subjects: Sequence[Subject], isolations: Sequence[float]) -> Mapping[str, dict[str, Any]]:
    """What is drawn in which way."""
    prompts, adapters = [one.prompt for one in subjects], tuple(str(one.adapter) for one in subjects)
    divided = [
        Region(box=box, adapter=str(one.adapter), prompt=one.prompt) for box, one in zip(HALVES, subjects, strict=True)
    ]
    given = {"prompts": " and ".join(prompts), "region": divided}
    automatic = {"prompts": " BREAK ".join(prompts), "adapter": adapters, "regions": "auto"}
    found: dict[str, dict[str, Any]] = {"added": {"prompts": " and ".join(prompts), "adapter": adapters}}
    for isolation in isolations:
        found[f"regions, isolation {isolation:g}"] = {**given, "region_isolation": isolation}
        found[f"auto, isolation {isolation:g}"] = {**automatic, "region_isolation": isolation}
    return found


def seen(told: Sequence[Sequence[int]]) -> dict[str, dict[str, float | int | None]]:
    """How often the left half shows the first subject and the right one the second, and how often each the other."""
    own = [sum(one == number for number, one in enumerate(pair)) / 2 for pair in told]
    other = [sum(one == 1 - number for number, one in enumerate(pair)) / 2 for pair in told]
    return {"own": estimate(own).plain(), "other": estimate(other).plain()}


def main() -> None:
    """Draw, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", nargs=3, action="append", required=True, metavar=("ADAPTER", "FOLDER", "PROMPT"))
    parser.add_argument("--others", type=Path, default=Path("samples/styles/openmoji"), help="drawings of other things")
    parser.add_argument("--base", default="icons")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--isolations", type=float, nargs="+", default=(0.0, 0.3, 1.0))
    parser.add_argument("--output", type=Path, default=Path("regions.png"))
    options = parser.parse_args()
    subjects = [Subject(Path(adapter), Path(folder), prompt) for adapter, folder, prompt in options.subject]
    if len(subjects) != 2:
        parser.error("give --subject twice")
    telling = Telling(subjects, options.others)
    pipe = load_base(options.base, device=options.device)
    side = denoiser_of(pipe).resolution
    common: dict[str, Any] = {"steps": options.steps, "count": options.seeds, "device": options.device, "height": side}

    def draw(name: str, width: int, more: Mapping[str, Any]) -> list[Image.Image]:
        folder = options.output.parent / options.output.stem / name.replace(", ", "-").replace(" ", "-")
        drawn = generate(GenerateConfig(output=folder, width=width, **common, **more), pipe=pipe)
        return [one.image for one in drawn]

    figures: dict[str, Any] = {"trust": dict(zip((one.name for one in subjects), telling.trust(), strict=True))}
    print("told right of real pictures", figures["trust"])
    rows, alone = [], []
    for number, one in enumerate(subjects):
        drawn = draw(f"alone {one.name}", side, {"prompts": one.prompt, "adapter": str(one.adapter)})
        alone.append([float(told == number) for told in telling.told(telling.judge.subject(drawn))])
        figures[f"alone {one.name}"] = estimate(alone[-1]).plain()
        print(f"alone {one.name}", figures[f"alone {one.name}"], flush=True)
        rows.append((f"alone {one.name}", drawn))
    for name, more in ways(subjects, options.isolations).items():
        drawn = draw(name, 2 * side, more)
        told = telling.told(telling.judge.subject([half for image in drawn for half in halves(image)]))
        figures[name] = seen([told[place : place + 2] for place in range(0, len(told), 2)])
        print(name, figures[name], flush=True)
        rows.append((name, drawn))
    labels = [f"seed {seed}" for seed in range(options.seeds)]
    sheet.grid([drawn for _, drawn in rows], [name for name, _ in rows], labels).save(options.output)
    options.output.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
