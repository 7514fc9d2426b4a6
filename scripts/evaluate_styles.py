"""What an adapter learned of a style, measured on drawings that it never saw.

    python scripts/evaluate_styles.py --output evaluation
    python scripts/evaluate_styles.py --output methods --styles openmoji --methods lora dora loha lokr oft ia3 bitfit

For each sample style and method: trains an adapter with the defaults of ``peft-diffusion train`` (or takes the one in
``--adapters``), then, over subjects that are not in the sample folder, prints

- the denoising loss on the real drawings of those subjects, with fixed noise and timesteps, without and with the adapter;
- how often a judge of styles (``peft_diffusion/evaluation/style_net.py``) tells what it generates to be of that style;
- how often a judge of subjects (``peft_diffusion/evaluation/subject_net.py``) has the right one among the five nearest of
  all, beside what it says of the base's own drawings in a style of its own, and of the real ones;
- trained parameters, the size of the file, processor time and the peak of the process's memory in training.

Training and measuring may be done apart, on two machines: ``--only-train`` first, then ``--adapters`` on what it wrote. The
real drawings come from npm (``pip install 'peft_diffusion[base]'``, and Node.js for npm). Writes ``figures.json``,
``table.md`` and a sheet for each style: without an adapter, with each method, and the real drawing.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from diffusers import DDPMScheduler

from peft_diffusion import methods
from peft_diffusion.api import train
from peft_diffusion.bases import embedded, load_base
from peft_diffusion.bases import noise as noise_process
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.evaluation.subject_net import Subjects, load_subject_net, points_of
from peft_diffusion.formats import inspect
from peft_diffusion.generation import Adapters, sheet
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import GenerateConfig
from peft_diffusion.training import TrainConfig
from scripts.build_base.captions import with_article
from scripts.build_base.judge import NEAREST, Gallery, Judge, galleries_of
from scripts.build_base.make_samples import HELD_OUT, SUBJECTS
from scripts.build_base.packed import load_packed
from scripts.build_base.render import pack
from scripts.build_base.sources import CACHE, STYLES
from scripts.build_base.subject_net import subjects_of
from scripts.measuring import markdown_table, memory_words, peak_memory, run, size_words

BASE_STYLE = "noto"  # what the base's own figure is measured in
DRAWS = 4  # noises and timesteps for each drawing


@dataclass(frozen=True)
class Style:
    """A sample folder: its adapter's name, the icon set of its drawings, how its prompts begin, and its own word there."""

    name: str
    drawings: str
    words: str
    word: str


SAMPLES = (
    Style("openmoji", "openmoji", "openmoji emoji of", "openmoji"),
    Style("twemoji", "twemoji", "twemoji emoji of", "twemoji"),
    Style("fluent-flat", "fluent-emoji-flat", "fluent flat emoji of", "fluent"),
)


@dataclass(frozen=True)
class Figures:
    """What one method made of one style. Shares are from 0 to 1; losses are means over drawings, noises and timesteps."""

    style: str
    method: str
    loss_base: float
    loss_adapter: float
    style_right: float
    subject_kept: float
    subject_real: float
    parameters: int
    size: int
    seconds: float | None = None
    memory: int | None = None

    @property
    def fall(self) -> float:
        """By how much the loss fell, as a share."""
        return 1 - self.loss_adapter / self.loss_base


@dataclass(frozen=True)
class Setting:
    """What all measurements have in common; ``own`` and ``told`` are the base's shares of subjects and styles."""

    options: argparse.Namespace
    console: Console
    judge: Judge
    subjects: Subjects
    chosen: list[str]
    own: float = 0.0
    told: float = 0.0


def main() -> None:
    """Train, measure, draw, print."""
    options, console = _options(), Console()
    options.output.mkdir(parents=True, exist_ok=True)
    adapters = Adapters(load_base("icons", device=options.device))
    styles = [style for style in SAMPLES if style.name in options.styles]
    if options.adapters is None:
        for style in styles:
            for method in options.methods:
                _train(style, method, adapters.pipe, options, console)
    if options.only_train:
        return
    if not options.data.exists():
        console.print("fetching and rendering the icon sets ...")
        pack(options.data, tuple(STYLES))
    rows, pixels = load_packed(options.data)
    galleries = galleries_of(rows, pixels)
    chosen = subjects(galleries, options.subjects)
    console.print(f"{len(chosen)} subjects that no sample folder shows, such as {', '.join(chosen[:12])}")
    known = subjects_of(rows, pixels, load_subject_net())
    setting = _of_base(adapters, Setting(options, console, Judge.of(galleries), known, chosen))
    found = []
    for style in styles:
        real = galleries[style.drawings].pixels[[galleries[style.drawings].subjects.index(name) for name in chosen]]
        found += _of_style(style, adapters, real, setting)
        _report(found, setting)  # after each, so that a run that is stopped has told something


def _of_base(adapters: Adapters, setting: Setting) -> Setting:
    """The base's own shares, measured in one of its own styles."""
    drawn = _draw(
        adapters, [f"{BASE_STYLE} emoji of {with_article(subject)}" for subject in setting.chosen], setting.options
    )
    own, told = _kept(setting, _pixels(drawn)), _told(setting.judge, drawn, BASE_STYLE)
    setting.console.print(f"base: subject told right {own:.0%}, style told right {told:.0%}")
    return replace(setting, own=own, told=told)


def _of_style(style: Style, adapters: Adapters, real: Tensor, setting: Setting) -> list[Figures]:
    """The figures of one style with every method, and its sheet."""
    prompts = [f"{style.words} {with_article(subject)}" for subject in setting.chosen]
    before = denoising_loss(adapters.pipe, real, prompts)
    rows, found = {f"without\n“{style.words} …”": _draw(adapters, prompts[:12], setting.options)}, []
    for method in setting.options.methods:
        file = _file(style, method, setting.options)
        adapters.load(file, name=style.name)
        after = denoising_loss(adapters.pipe, real, prompts)
        drawn = _draw(adapters, prompts, setting.options)
        adapters.remove(style.name)
        right = _told(setting.judge, drawn, style.drawings)
        kept, of_real = _kept(setting, _pixels(drawn)), _kept(setting, real)
        parameters, size = inspect(file).parameters, file.stat().st_size
        found.append(Figures(style.name, method, before, after, right, kept, of_real, parameters, size, **_cost(file)))
        setting.console.print(
            f"{style.name}, {method}: loss falls by {found[-1].fall:.1%}, style {right:.0%}, subject {kept:.0%}"
        )
        rows[method if len(setting.options.methods) > 1 else f"with {style.name}"] = drawn[:12]
    rows["the real drawing, never shown in training"] = [
        Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in real[:12]
    ]
    path = setting.options.output / f"{style.name}.png"
    sheet.grid(list(rows.values()), list(rows), setting.chosen[:12]).save(path)
    return found


def _train(style: Style, method: str, pipe: Any, options: argparse.Namespace, console: Console) -> None:
    """Train an adapter; what it took is written beside it."""
    learned = methods.method(method)
    words: dict[str, Any] = {"components": ("text_encoder",)} if learned.initial_words() else {}
    if learned.new_words():
        words["option"] = (f"placeholders={style.word}", "initial=emoji", "vectors=8")
    elif words:
        words["steps"] = 600  # of a soft prompt: half of them leave half of the drawings in other styles
    file = _file(style, method, options)
    run = TrainConfig(
        (embedded(f"styles/{style.name}"),),
        output=file,
        run_dir=options.output / "runs" / f"{style.name}-{method}",
        method=method,
        device=options.device,
        preview_steps=0,
        overwrite=True,
        **words,
    )
    began = time.process_time()
    with peak_memory() as memory:
        train(run, pipe=pipe, observers=[TrainingConsole(console)])
    cost = {"seconds": time.process_time() - began, "memory": memory.get("peak")}
    file.with_suffix(".json").write_text(json.dumps(cost))


def _cost(file: Path) -> dict[str, Any]:
    """The processor time and the peak of memory that an adapter's training took, where they are known."""
    path = file.with_suffix(".json")
    return json.loads(path.read_text()) if path.exists() else {}


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
    kind = noise_process.prediction_type(pipe.scheduler.config.get("prediction_type", "epsilon"))
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
            answer = pipe.unet(noise_process.noisy(latents, noise, power).to(latents.dtype), timesteps, hidden).sample
            wanted = noise_process.target(kind, latents, noise, power)
            losses += (answer.float() - wanted.float()).square().flatten(1).mean(1).tolist()
    return sum(losses) / len(losses)


def _file(style: Style, method: str, options: argparse.Namespace) -> Path:
    folder: Path = options.adapters or options.output
    return folder / (f"{style.name}.safetensors" if method == TrainConfig.method else f"{style.name}-{method}.safetensors")


def _draw(adapters: Adapters, prompts: Sequence[str], options: argparse.Namespace) -> list[Image.Image]:
    """A picture for each prompt, with the adapters that are on."""
    sampling = GenerateConfig(tuple(prompts), steps=options.steps, batch_size=8, device=options.device)
    strengths = dict.fromkeys(adapters.names, 1.0)
    return list(paint(adapters, [Cell(prompt, seed, strengths) for seed, prompt in enumerate(prompts)], sampling))


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def _told(judge: Judge, images: Sequence[Image.Image], style: str) -> float:
    told = judge.style(_pixels(images))
    return sum(name == style for name in told) / len(told)


def _kept(setting: Setting, images: Tensor) -> float:
    ranks = setting.subjects.ranks(points_of(load_subject_net(), images), setting.chosen)
    return sum(rank <= NEAREST for rank in ranks) / len(ranks)


HEADINGS = (
    "style", "method", "loss, base", "loss, adapter", "falls by", "style told right", "subject kept", "trained", "file",
    "processor time", "peak memory",
)  # fmt: skip


def _report(found: Sequence[Figures], setting: Setting) -> None:
    rows = [_row(figures, setting.own) for figures in found]
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row)
    setting.console.print(table)
    output: Path = setting.options.output
    (output / "table.md").write_text(markdown_table(HEADINGS, rows))
    values = {
        "base": {"subject_kept": setting.own, "style_right": setting.told, "subjects": len(setting.chosen)},
        "runs": [{**vars(figures), "fall": figures.fall} for figures in found],
    }
    (output / "figures.json").write_text(json.dumps(values, indent=1) + "\n")


def _row(figures: Figures, own: float) -> tuple[str, ...]:
    return (
        figures.style,
        figures.method,
        f"{figures.loss_base:.4f}",
        f"{figures.loss_adapter:.4f}",
        f"{figures.fall:.0%}",
        f"{figures.style_right:.0%}",
        f"{figures.subject_kept:.0%} (base {own:.0%}, real {figures.subject_real:.0%})",
        f"{figures.parameters:,}",
        size_words(figures.size),
        "-" if figures.seconds is None else f"{figures.seconds:.0f} s",
        memory_words(figures.memory),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder for figures, sheets and adapters")
    parser.add_argument("--only-train", action="store_true", help="measure nothing: another run does, with --adapters")
    parser.add_argument("--adapters", type=Path, help="folder of what an earlier run trained, instead of training")
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings; made if missing")
    parser.add_argument("--styles", nargs="+", choices=[s.name for s in SAMPLES], default=[s.name for s in SAMPLES])
    parser.add_argument(
        "--methods", nargs="+", choices=list(methods.known()), default=[methods.DEFAULT], help="what to train with"
    )
    parser.add_argument("--subjects", type=int, default=100, help="how many subjects")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of a picture")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
