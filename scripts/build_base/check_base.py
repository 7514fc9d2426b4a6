"""Measure the base: its autoencoder, the styles and subjects it draws, and its pace; write the figures as JSON."""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from .captions import caption
from .judge import NEAREST, Gallery, Judge, calibrate, packed_galleries
from .sources import BASE_STYLES, CACHE
from .train_unet import SHEET_STYLES, SHEET_SUBJECTS
from .train_vae import psnr
from .training import sheet

PSNR_STYLES = (*BASE_STYLES, "fluent-emoji-flat", "openmoji", "twemoji")


def load_pipeline(folder: Path, device: str) -> StableDiffusionPipeline:
    """The base as any user loads it."""
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"there is no pipeline in {folder}: run `python -m scripts.build_base.export` first")
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int = 0, batch: int = 20
) -> Tensor:
    """One image a prompt, in [0, 1], each from its own seed whatever the batch."""
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(seed + start + number) for number in range(len(part))]
        options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        images.append(pipe(part, generator=generators, **options).images.float().cpu())
    return torch.cat(images)


def pick_subjects(galleries: dict[str, Gallery], count: int) -> list[tuple[str, str]]:
    """Random subjects, as many of each style of the base."""
    rng = random.Random(0)
    each = -(-count // len(BASE_STYLES))
    chosen = [(style, subject) for style in BASE_STYLES for subject in rng.sample(galleries[style].subjects, each)]
    return chosen[:count]


def judged(judge: Judge, images: Tensor, asked: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """For each style: the share of images told to be of it, and those whose subject is among the nearest."""
    told = judge.style(images)
    figures = {}
    for style in dict.fromkeys(style for style, _ in asked):
        places = [number for number, (name, _) in enumerate(asked) if name == style]
        ranks = judge.subject_rank(images[places], style, [asked[number][1] for number in places])
        figures[style] = {
            "style_told_right": sum(told[number] == style for number in places) / len(places),
            "subject_in_five": sum(rank <= NEAREST for rank in ranks) / len(places),
            "subject_first": sum(rank == 1 for rank in ranks) / len(places),
        }
    return figures


def seconds_for_one(folder: Path, steps: int, guidance: float) -> float:
    """The time of one image on the CPU, the second of two."""
    pipe, spent = load_pipeline(folder, "cpu"), 0.0
    for _ in range(2):
        start = time.perf_counter()
        draw(pipe, ["noto emoji of a red apple"], steps, guidance)
        spent = time.perf_counter() - start
    return spent


def mean_of(figures: dict[str, dict[str, float]], key: str) -> float:
    """The mean of one figure over the styles."""
    return round(sum(row[key] for row in figures.values()) / len(figures), 3)


def measure(pipe: StableDiffusionPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """All figures but the time of one image."""
    galleries = packed_galleries(options.data, PSNR_STYLES)
    quality = {}
    for style, gallery in galleries.items():
        pixels = gallery.pixels[:: max(1, len(gallery.subjects) // options.psnr_each)][: options.psnr_each]
        quality[style] = round(psnr(pipe.vae, pixels.to(pipe.device).float() / 127.5 - 1), 2)
    print("PSNR of real drawings, dB:", quality, flush=True)
    base = {style: galleries[style] for style in BASE_STYLES}
    calibration = calibrate(base)
    print("judge on real drawings held out:", calibration, flush=True)
    asked = pick_subjects(base, options.count)
    images = draw(pipe, [caption(*row) for row in asked], options.steps, options.guidance, batch=options.batch)
    sheet(images * 2 - 1, 25, options.sheets / "drawn.png")
    figures = judged(Judge.of(base), images, asked)
    keys = ("style_told_right", "subject_in_five", "subject_first")
    return {
        "images": len(asked),
        "steps": options.steps,
        "guidance": options.guidance,
        "drawings": {style: len(gallery.subjects) for style, gallery in base.items()},
        "psnr": quality,
        "mean": {key: mean_of(figures, key) for key in keys},
        "styles": figures,
        "judge_mean": {key: mean_of(calibration, key) for key in next(iter(calibration.values()))},
        "judge": calibration,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("samples/base"), help="the diffusers folder")
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings")
    parser.add_argument("--output", type=Path, default=Path("samples/base/figures.json"), help="file to write")
    parser.add_argument("--sheets", type=Path, default=CACHE / "sheets", help="folder for the sheets")
    parser.add_argument("--device", default="cpu", help="where to draw")
    parser.add_argument("--count", type=int, default=200, help="how many subjects")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--psnr-each", type=int, default=100, help="real drawings of each set for the PSNR")
    parser.add_argument("--only-time", action="store_true", help="measure the time of one image on this CPU, keep the rest")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = _options()
    options.sheets.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    if options.only_time:
        figures = json.loads(options.output.read_text())
    else:
        pipe = load_pipeline(options.base, options.device)
        figures = measure(pipe, options)
        prompts = [caption(style, subject) for style in SHEET_STYLES for subject in SHEET_SUBJECTS]
        images = draw(pipe, prompts, options.steps, options.guidance, batch=options.batch)
        small = torch.nn.functional.avg_pool2d(images, 2)
        sheet(small * 2 - 1, len(SHEET_SUBJECTS), options.output.with_name("sheet.webp"))
    if options.device == "cpu":
        figures["seconds_for_one_image"] = round(seconds_for_one(options.base, options.steps, options.guidance), 2)
        figures["threads"] = torch.get_num_threads()
    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key not in ("judge", "styles")}, indent=1))


if __name__ == "__main__":
    main()
