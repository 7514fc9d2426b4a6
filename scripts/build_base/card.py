"""Write the base's model card from its figures, and its licence beside it."""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sources import BASE_STYLES, ICON_SETS

TEXT = """# icons

A small Stable Diffusion of icons and emoji, drawn at 128 x 128 pixels, to teach and to try adapters on without a GPU and
without a hub. It is the default base of every `peft-diffusion` command for pictures, and an ordinary diffusers folder:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("samples/base")
pipe("noto emoji of a red apple", guidance_scale={guidance}).images[0]
```

![Twelve subjects in six styles]({sheet})

*{steps} steps, guidance {guidance}, seeds from 0; a style a row: {sheet_styles}.*

## Prompts

"{{style}} of {{subject}}", in English, with or without an article, and more words behind commas if you like.

| style | drawings | licence | by |
|---|---|---|---|
{sets}

`openmoji` (CC BY-SA 4.0) and `twemoji` (CC BY 4.0) trained nothing, `fluent-emoji-flat` (MIT) the autoencoder alone. The
drawings come from npm's `@iconify-json` packages, words near them from `emojibase-data` (MIT).

## Networks

| | parameters | |
|---|---|---|
| UNet | 15.8M | channels 128, 160, 192, a layer a block, cross-attention at all three sizes |
| text encoder | 4.2M | CLIP: 4 layers, width 256; 4,096 byte pairs learned from the captions, 77 tokens |
| autoencoder | 3.9M | 4 latent channels at an eighth of the size |

Weights are float16, 48 MB in all. Epsilon prediction, the linear schedule of Stable Diffusion, DPM-Solver++ by default.

## Training

The autoencoder trained for 400 s on one H200. The UNet and the text encoder trained together, from scratch,
{training}. Then the text encoder learned to read past style words that it does not know,
so that a new style may have any name. By then the UNet knew its drawings by heart, and took a mirrored one for noise. So it
went on alone, {further}, on drawings turned, mirrored and moved, and, where little noise is
added, in other colours and lines. Its weights are {before:.0%} those from before and {after:.0%} those from after, which
keeps both what it knew and what it learned (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903). Made by
`scripts/build_base/`, where every step is a script.

## Figures

Printed by `scripts/build_base/check_base.py`: {images} random subjects of the sets above, {steps} steps, guidance
{guidance}.

| | drawn by the base | real drawings, softened, that the judge never saw |
|---|---|---|
| told to be of the style asked for, among {count} | {style:.1%} | {judge_style:.1%} |
| the subject's own drawing among the five nearest of all of that style | {five:.1%} | {judge_five:.1%} |
| the subject's own drawing the nearest | {first:.1%} | {judge_first:.1%} |

| style | style told right | subject among five | autoencoder, PSNR of real drawings |
|---|---|---|---|
{rows}
| not trained on | | | {unseen} |

One picture takes {seconds} s on two CPU cores. The judge is `scripts/build_base/judge.py`.

## Limits

It draws what its sets draw, and little else: no photographs, no scenes, no letters, few things beside each other. Rare
subjects come out as something near them. Faces and skin tones are those of emoji.
"""


def _style_rows(figures: dict[str, Any]) -> str:
    return "\n".join(
        f"| {style} | {row['style_told_right']:.0%} | {row['subject_in_five']:.0%} | {figures['psnr'][style]:.1f} dB |"
        for style, row in figures["styles"].items()
    )


@dataclass(frozen=True)
class Story:
    """How the UNet came about: both trainings in words, and the share of the second one's weights."""

    training: str
    further: str
    share: float


def card(figures: dict[str, Any], story: Story, sheet: str, sheet_styles: tuple[str, ...]) -> str:
    """The model card as Markdown."""
    mean, judge = figures["mean"], figures["judge_mean"]
    sets = [
        f"| {one.template.format('...')} | {figures['drawings'][one.style]:,} | {one.licence} | [{one.author}]({one.url}) |"
        for one in ICON_SETS
        if one.role == "base"
    ]
    unseen = ", ".join(f"{one.style} {figures['psnr'][one.style]:.1f} dB" for one in ICON_SETS if one.role == "unseen")
    return TEXT.format(
        guidance=f"{figures['guidance']:g}",
        steps=figures["steps"],
        images=figures["images"],
        sheet=sheet,
        sheet_styles=", ".join(sheet_styles),
        sets="\n".join(sets),
        training=story.training,
        further=story.further,
        before=1 - story.share,
        after=story.share,
        count=len(BASE_STYLES),
        style=mean["style_told_right"],
        judge_style=judge["style_told_right_softened"],
        five=mean["subject_in_five"],
        judge_five=judge["found_in_five"],
        first=mean["subject_first"],
        judge_first=judge["found_first"],
        rows=_style_rows(figures),
        unseen=unseen,
        seconds=figures["seconds_for_one_image"],
    )


def main() -> None:
    """Write README.md and LICENSE into the base's folder."""
    from .train_unet import SHEET_STYLES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("samples/base"), help="the diffusers folder, with figures.json")
    parser.add_argument("--training", required=True, help="how long the UNet was trained, in words")
    parser.add_argument("--further", required=True, help="how long it went on alone, in words")
    parser.add_argument("--share", type=float, required=True, help="of the weights after that, as told to `export`")
    options = parser.parse_args()
    figures = json.loads((options.base / "figures.json").read_text())
    story = Story(options.training, options.further, options.share)
    (options.base / "README.md").write_text(card(figures, story, "sheet.webp", SHEET_STYLES))
    shutil.copyfile(Path("LICENSE"), options.base / "LICENSE")


if __name__ == "__main__":
    main()
