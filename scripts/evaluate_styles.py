"""What an adapter learned of a style, measured on drawings that it never saw.

    python scripts/evaluate_styles.py --output evaluation

For each sample style: trains an adapter with the defaults of ``peft-diffusion train`` (or takes the one in ``--adapters``),
then, over subjects that are not in the sample folder, prints

- the denoising loss on the real drawings of those subjects, with fixed noise and timesteps, without and with the adapter;
- how often a judge (``scripts/build_base/judge.py``) tells the style of what it generates right;
- how often the right subject is among the five nearest real drawings of that style, beside the base's own figure.

The real drawings come from npm (``pip install 'peft_diffusion[base]'``, and Node.js for npm). Writes ``figures.json`` and a
sheet for each style: without the adapter, with it, and the real drawing.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts.build_base is no part of the package

from diffusers import DDPMScheduler

from peft_diffusion.bases import embedded, load_base
from peft_diffusion.core.errors import UserError
from peft_diffusion.generation import Adapters, sheet
from peft_diffusion.generation.config import GenerateConfig
from peft_diffusion.generation.painting import Cell, paint
from peft_diffusion.training import TrainConfig, objective, train
from scripts.build_base.captions import with_article
from scripts.build_base.judge import NEAREST, Gallery, Judge, packed_galleries
from scripts.build_base.make_samples import HELD_OUT, SUBJECTS
from scripts.build_base.render import pack
from scripts.build_base.sources import CACHE, STYLES

BASE_STYLE = "noto"  # what the base's own figure is measured in
DRAWS = 4  # noises and timesteps for each drawing


@dataclass(frozen=True)
class Style:
    """A sample folder: its adapter's name, the icon set of its drawings, and how its prompts begin."""

    name: str
    drawings: str
    words: str


SAMPLES = (
    Style("openmoji", "openmoji", "openmoji emoji of"),
    Style("twemoji", "twemoji", "twemoji emoji of"),
    Style("fluent-flat", "fluent-emoji-flat", "fluent flat emoji of"),
)


@dataclass(frozen=True)
class Figures:
    """What one style came to. Shares are from 0 to 1; losses are means over drawings, noises and timesteps."""

    loss_base: float
    loss_adapter: float
    style_right: float
    subject_kept: float
    seconds: float | None

    @property
    def fall(self) -> float:
        """By how much the loss fell, as a share."""
        return 1 - self.loss_adapter / self.loss_base


def main() -> None:
    """Train, measure, draw, print."""
    options = _options()
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.data.exists():
        console.print("fetching and rendering the icon sets ...")
        pack(options.data, tuple(STYLES))
    galleries = packed_galleries(options.data)
    chosen = subjects(galleries, options.subjects)
    console.print(f"{len(chosen)} subjects that no sample folder shows, such as {', '.join(chosen[:12])}")
    judge = Judge.fit(galleries)
    samples = [style for style in SAMPLES if style.name in options.styles]
    pipe = load_base("icons", device=options.device)
    seconds = {style.name: _adapter(style, pipe, options, console) for style in samples}
    adapters = Adapters(pipe)
    for style in samples:
        adapters.load(_file(style, options), name=style.name, strength=0.0)
    prompts = [f"noto emoji of {with_article(subject)}" for subject in chosen]
    drawn = _draw(adapters, prompts, None, options)
    own = _kept(judge, drawn, BASE_STYLE, chosen)
    told = _told(judge, drawn, BASE_STYLE)
    console.print(f"base: subject among the five nearest {own:.0%}, style told right {told:.0%}")
    found = {
        style.name: _measure(style, adapters, galleries[style.drawings], judge, chosen, seconds[style.name], options)
        for style in samples
    }
    _report(found, own, told, options, console)


def subjects(galleries: dict[str, Gallery], count: int) -> list[str]:
    """Subjects that are drawn in every set and in no sample folder: the twelve that are looked at, and others at random."""
    wanted = [BASE_STYLE, *(style.drawings for style in SAMPLES)]
    shared = set.intersection(*(set(galleries[name].subjects) for name in wanted))
    shared -= {name.replace("-", " ") for name in SUBJECTS}
    first = [name.replace("-", " ") for name in HELD_OUT if name.replace("-", " ") in shared]
    others = sorted(shared - set(first))
    return [*first, *random.Random(0).sample(others, min(len(others), count - len(first)))][:count]


@torch.no_grad()
def denoising_loss(pipe: Any, images: Tensor, prompts: Sequence[str], batch: int = 16) -> float:
    """The mean loss on drawings (count, 3, height, width) in bytes; noise and timesteps depend on their place alone."""
    powers = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.to(pipe.device)
    kind = objective.prediction_type(pipe.scheduler.config.get("prediction_type", "epsilon"))
    losses = []
    for start in range(0, len(images), batch):
        pixels = images[start : start + batch].to(pipe.device, pipe.vae.dtype) / 127.5 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        hidden = pipe.encode_prompt(list(prompts[start : start + batch]), pipe.device, 1, False)[0]
        for draw in range(DRAWS):
            chance = torch.Generator().manual_seed(start * DRAWS + draw)
            noise = torch.randn(latents.shape, generator=chance).to(latents)
            within = torch.rand(len(latents), generator=chance)
            timesteps = ((draw + within) / DRAWS * len(powers)).long().clamp(max=len(powers) - 1).to(pipe.device)
            power = powers[timesteps]
            answer = pipe.unet(objective.noisy(latents, noise, power).to(latents.dtype), timesteps, hidden).sample
            wanted = objective.target(kind, latents, noise, power)
            losses += (answer.float() - wanted.float()).square().flatten(1).mean(1).tolist()
    return sum(losses) / len(losses)


def _measure(
    style: Style,
    adapters: Adapters,
    gallery: Gallery,
    judge: Judge,
    chosen: Sequence[str],
    seconds: float | None,
    options: argparse.Namespace,
) -> Figures:
    real = gallery.pixels[[gallery.subjects.index(subject) for subject in chosen]]
    prompts = [f"{style.words} {with_article(subject)}" for subject in chosen]
    losses = []
    for strength in (0.0, 1.0):
        adapters.set({name: strength * (name == style.name) for name in adapters.names})
        losses.append(denoising_loss(adapters.pipe, real, prompts))
    drawn = _draw(adapters, prompts, style.name, options)
    _sheet(style, adapters, prompts, drawn, real, chosen, options)
    right, kept = _told(judge, drawn, style.drawings), _kept(judge, drawn, style.drawings, chosen)
    return Figures(losses[0], losses[1], right, kept, seconds)


def _adapter(style: Style, pipe: Any, options: argparse.Namespace, console: Console) -> float | None:
    """Train the style's adapter unless it is given; returns the seconds that it took."""
    if options.adapters is not None:
        return None
    began = time.monotonic()
    file = _file(style, options)
    run = TrainConfig(
        (embedded(f"styles/{style.name}"),),
        output=file,
        run_dir=options.output / "runs" / style.name,
        device=options.device,
        overwrite=True,
    )
    train(run, pipe=pipe, console=console)
    return time.monotonic() - began


def _file(style: Style, options: argparse.Namespace) -> Path:
    folder: Path = options.adapters or options.output
    return folder / f"{style.name}.safetensors"


def _draw(adapters: Adapters, prompts: Sequence[str], name: str | None, options: argparse.Namespace) -> list[Image.Image]:
    """A picture for each prompt, with one adapter or none."""
    sampling = GenerateConfig(tuple(prompts), steps=options.steps, batch_size=8, device=options.device)
    strengths = {other: float(other == name) for other in adapters.names}
    return list(paint(adapters, [Cell(prompt, seed, strengths) for seed, prompt in enumerate(prompts)], sampling))


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def _told(judge: Judge, images: Sequence[Image.Image], style: str) -> float:
    told = judge.style(_pixels(images))
    return sum(name == style for name in told) / len(told)


def _kept(judge: Judge, images: Sequence[Image.Image], style: str, chosen: Sequence[str]) -> float:
    ranks = judge.subject_rank(_pixels(images), style, list(chosen))
    return sum(rank <= NEAREST for rank in ranks) / len(ranks)


def _sheet(
    style: Style,
    adapters: Adapters,
    prompts: Sequence[str],
    drawn: Sequence[Image.Image],
    real: Tensor,
    chosen: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """The first twelve subjects: what the base makes of the prompt, what the adapter makes of it, and the drawing."""
    before = _draw(adapters, prompts[:12], None, options)
    originals = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in real[:12]]
    rows = [before, list(drawn[:12]), originals]
    labels = [f"without\n“{style.words} …”", f"with {style.name}", "the real drawing, never shown in training"]
    sheet.grid(rows, labels, list(chosen[:12])).save(options.output / f"{style.name}.png")


def _report(found: dict[str, Figures], own: float, told: float, options: argparse.Namespace, console: Console) -> None:
    table = Table("style", "loss, base", "loss, adapter", "falls by", "style told right", "subject kept", "training")
    for name, figures in found.items():
        table.add_row(
            name,
            f"{figures.loss_base:.4f}",
            f"{figures.loss_adapter:.4f}",
            f"{figures.fall:.0%}",
            f"{figures.style_right:.0%}",
            f"{figures.subject_kept:.0%} (base {own:.0%})",
            f"{figures.seconds:.0f} s" if figures.seconds is not None else "-",
        )
    console.print(table)
    values = {name: {**vars(figures), "fall": figures.fall} for name, figures in found.items()}
    values["base"] = {"subject_kept": own, "style_right": told}
    (options.output / "figures.json").write_text(json.dumps(values, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder for figures, sheets and adapters")
    parser.add_argument("--adapters", type=Path, help="folder with NAME.safetensors for each style, instead of training")
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings; made if missing")
    parser.add_argument("--styles", nargs="+", choices=[s.name for s in SAMPLES], default=[s.name for s in SAMPLES])
    parser.add_argument("--subjects", type=int, default=100, help="how many subjects")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of a picture")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
