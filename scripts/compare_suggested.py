"""What the strengths that a report suggests do to the interference of two adapters, against strengths of 1 and 1.

    python -m scripts.blends.make_data --output drawings
    python scripts/compare_suggested.py --data drawings --output suggested --device cuda

For each pair of scripts/compare_blends.py takes adapters trained with the defaults of ``peft-diffusion train`` (or those of
``--adapters``), and asks ``adapters.report`` for strengths: by prompts that the adapters were trained on, once for each of
``--seeds``, and by the pictures that they were trained on. Measures on pictures that no training saw, with both adapters
on, at 1 and 1 and at what was suggested

- by how much the loss of each one's pictures is above that of the adapter alone at strength 1, as a share of it;
- how many pictures of each one's prompts are told its own by the judge of ``evaluate``, among its own, the other's and the
  base's, and how many the other's.

Prints all, and how much less the losses of both together rise at the suggested strengths, with an interval of 95% over
pictures. What prompts suggest is measured for each seed, and figures are means over these.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.bases import load_base
from peft_diffusion.evaluation.bench import Bench
from peft_diffusion.evaluation.gallery import Gallery, at_most, decoded, encoded, read_gallery
from peft_diffusion.evaluation.intervals import Estimate, estimate
from peft_diffusion.evaluation.judges import judge_of
from peft_diffusion.evaluation.judging import BASE, Taught, Verdicts
from peft_diffusion.evaluation.picture_losses import PictureLosses
from peft_diffusion.evaluation.styles import Styles
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.settings import Sampling
from peft_diffusion.training.tasks.diffusion import Examples
from scripts.blends.trained import caption_held, drawings, emptied, prompts_of
from scripts.blends.ways import Pair
from scripts.compare_blends import PAIRS, train_one
from scripts.measuring import circumstances, in_processes, late, markdown_table, run, say, write_results

WHOLE, BY_PROMPTS, BY_PICTURES = "1 + 1", "by prompts", "by pictures"
SUGGESTED = (BY_PROMPTS, BY_PICTURES)
ASKED = 4  # prompts of each adapter, as many as a report draws


@dataclass(frozen=True)
class Side:
    """What one adapter is measured by.

    Attributes:
        gallery: Pictures that no training saw, with the captions that call the adapter.
        examples: The same, encoded.
        places: Those whose captions are drawn.
    """

    gallery: Gallery
    examples: Examples
    places: Sequence[int]

    @property
    def prompts(self) -> list[str]:
        """What is drawn."""
        return [self.gallery.captions[place] for place in self.places]


def main() -> None:
    """Train, ask, measure, print."""
    options, began = _options(), time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    pairs = [pair for pair in PAIRS if not options.pairs or pair.name in options.pairs]
    folder: Path = options.adapters or options.output / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    jobs = [(name, None, file, options) for name in names if not (file := folder / f"{name}.safetensors").exists()]
    in_processes(train_one, jobs, options.trainings, began, options.minutes)
    adapters = Adapters(load_base("icons", device=options.device))
    found: dict[str, Any] = {}
    for pair in pairs:
        if late(began, options.minutes):
            say(f"{pair.name} is left out: the time is over", began)
            continue
        found[pair.name] = _measured(adapters, pair, folder, options)
        for kind in SUGGESTED:
            say(f"{pair.name}: {', '.join(_words(found[pair.name], kind))}", began)
    _report(found, options)


def side_of(adapters: Adapters, name: str, options: argparse.Namespace) -> Side:
    """Read and encode the pictures that nobody trained on, with captions that call the adapter."""
    made = options.output / "held" / name
    caption_held(options.data, name, made)
    gallery = at_most(read_gallery(made, name, adapters.pipe), options.pictures)
    return Side(gallery, encoded(gallery, adapters.pipe), gallery.some(options.prompts))


def suggestions(adapters: Adapters, pair: Pair, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Ask for strengths: by prompts once for each seed, and once by pictures that were trained on."""
    folders = {name: drawings(options.data, name) for name in (pair.first, pair.second)}
    own = {name: prompts_of(folder)[:ASKED] for name, folder in folders.items()}
    by_prompts = [dict(adapters.report(own, seed=seed).suggested) for seed in range(options.seeds)]
    sampling = Sampling(batch_size=options.batch, device=options.device)
    by_pictures = adapters.report(own, losses=PictureLosses.read(adapters, folders, sampling=sampling)).suggested
    return {BY_PROMPTS: by_prompts, BY_PICTURES: [dict(by_pictures)]}


def _measured(adapters: Adapters, pair: Pair, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Losses and verdicts of both adapters of a pair, alone, both at 1, and both at each of the suggestions."""
    names = (pair.first, pair.second)
    sides = {name: side_of(adapters, name, options) for name in names}
    sampling = Sampling(steps=options.steps, batch_size=options.batch, device=options.device)
    bench = Bench(adapters, sampling, tuple(range(options.noises)))
    of_base = [image for side in sides.values() for rows in bench.draw(side.prompts, [{}]) for row in rows for image in row]
    with emptied(adapters):
        for name in names:
            adapters.load(folder / f"{name}.safetensors", name=name)
        asked = suggestions(adapters, pair, options)
        mixes = {WHOLE: [dict.fromkeys(names, 1.0)], **asked}
        judge = judge_of("icons", None, options.device)
        shown = {name: (side.gallery, decoded(side.examples.latents, adapters.pipe)) for name, side in sides.items()}
        taught = Taught.of(judge, shown, {})
        styles = Styles({**taught.features, BASE: judge.style(of_base)})
        found: dict[str, Any] = {"suggested": asked}
        for name, side in sides.items():
            words = [side.gallery.subjects[place] for place in side.places]
            verdicts = Verdicts(taught, styles, name, words, side.gallery.subjects)
            other = next(one for one in names if one != name)
            found[name] = {"alone": bench.losses(side.examples, {name: 1.0})}
            for kind, several in mixes.items():
                losses = [bench.losses(side.examples, mix) for mix in several]
                met = [verdicts.met(row, other) for rows in bench.draw(side.prompts, several) for row in rows]
                found[name][kind] = {
                    "losses": [mean(each) for each in zip(*losses, strict=True)],
                    "told": mean(one[0] for one in met),
                    "told the other's": mean(one[1] for one in met),
                }
    return found


def rises(of_side: Mapping[str, Any], kind: str) -> list[float]:
    """By how much each picture's loss is above that of the adapter alone, as a share of all pictures' mean."""
    alone = of_side["alone"]
    return [(both - one) / mean(alone) for both, one in zip(of_side[kind]["losses"], alone, strict=True)]


def less(one: Mapping[str, Any], kind: str) -> Estimate:
    """By how much less both adapters' losses rise at what is suggested; above 0 where that is better than 1 and 1.

    The interval is that of the sum of two means of pictures of different folders.
    """
    both = [
        estimate([whole - less for whole, less in zip(rises(one[name], WHOLE), rises(one[name], kind), strict=True)])
        for name in _names(one)
    ]
    half = sum((each.half or 0.0) ** 2 for each in both) ** 0.5
    return Estimate(sum(each.mean for each in both), half, min(each.count for each in both))


def _names(one: Mapping[str, Any]) -> list[str]:
    return [name for name in one if name != "suggested"]


def _words(one: Mapping[str, Any], kind: str) -> list[str]:
    """The cells of a pair's row."""
    names, asked = _names(one), one["suggested"].get(kind) or [dict.fromkeys(_names(one), 1.0)]
    cells = [kind, " + ".join(f"{mean(each[name] for each in asked):.2f}" for name in names)]
    cells.append(" and ".join(f"{mean(rises(one[name], kind)):+.1%}" for name in names))
    gain = less(one, kind)
    cells.append("" if kind == WHOLE else f"{gain.mean:+.1%} ±{100 * (gain.half or 0):.1f}")
    cells += [" and ".join(f"{one[name][kind][what]:.0%}" for name in names) for what in ("told", "told the other's")]
    return cells


def _report(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    headings = (
        "pair", "strengths", "", "the losses rise by", "less than at 1 + 1", "told its own", "told the other's",
    )  # fmt: skip
    kinds = (WHOLE, *SUGGESTED)
    table = markdown_table(headings, [(name, *_words(one, kind)) for name, one in found.items() for kind in kinds])
    write_results(options.output, circumstances(options) | {"pairs": found}, table)
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of scripts/blends/make_data.py")
    parser.add_argument("--adapters", type=Path, help="folder of NAME.safetensors; those that lack are trained into it")
    parser.add_argument("--output", type=Path, default=Path("suggested"), help="folder for adapters and the table")
    parser.add_argument("--pairs", nargs="+", choices=[pair.name for pair in PAIRS], help="by default all")
    parser.add_argument("--seeds", type=int, default=3, help="that the report is asked with")
    parser.add_argument("--pictures", type=int, default=48, help="of each adapter that losses are measured on")
    parser.add_argument("--prompts", type=int, default=12, help="of each adapter that are drawn")
    parser.add_argument("--noises", type=int, default=4, help="that each prompt is drawn from")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a picture")
    parser.add_argument("--batch", type=int, default=48, help="pictures at once")
    parser.add_argument("--train-steps", type=int, help="steps of training; by default what suits")
    parser.add_argument("--trainings", type=int, default=1, help="at once")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing more after so long")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
