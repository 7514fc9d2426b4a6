"""Ways of composing two adapters, each as a curve over strengths against plain strengths, on styles and characters.

    python -m scripts.blends.make_data --output drawings
    python scripts/compare_blends.py --data drawings --output blends --device cuda

Trains an adapter for each of six styles and three characters with the defaults of ``peft-diffusion train`` (or takes what is
in ``--adapters``), and the second of each pair beside the first. Then, for each pair and each way of composing in the
tables of ``--compose`` and of ``merge --how``, draws pictures at five shares and three sums of strengths, for several
prompts and seeds, each way from the same noise, and prints

- the volume under the curve: how much of the one, of the other and of the prompt there is at once
  (`scripts/blends/curves.py`), with intervals over seeds, and by how much that is above the one of plain strengths;
- rows from all of one style to all of the other: how often the middle is told the first, plain and calibrated.

How far the judges can be trusted is printed first (`scripts/blends/judges.py`). Three of the styles were seen by no training
of the base or of a judge. Writes ``figures.json``, ``table.md``, ``scores.safetensors``, plots and sheets.

The scores are written after each pair and way. A run with the same ``--output`` goes on from them, and ``--from FOLDER``
takes those of other runs too, so that pairs and ways may be measured side by side and told together (``--only-report``).
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.api import train, train_composition
from peft_diffusion.bases import load_base
from peft_diffusion.core.errors import UserError
from peft_diffusion.evaluation.drawings import pixels_of
from peft_diffusion.generation import Adapters, sheet
from peft_diffusion.generation.blend import shares as row_of
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Sampling
from peft_diffusion.training import ComposeTrainConfig
from scripts.blends import curves, judges
from scripts.blends.trained import BESIDE, config_of, drawings, emptied, prompts_of
from scripts.blends.ways import ENDS, SHARES, Merged, Pair, Point, Way, beside_name, every, merge_one, merges
from scripts.build_base.captions import with_article
from scripts.measuring import circumstances, in_processes, late, markdown_table, run, say, write_results

SUBJECTS = ("red apple", "cat face", "house", "grinning face", "rocket", "guitar")  # which no adapter was shown
SCENES = (
    ("smiling", "yellow"), ("angry", "blue"), ("happy", "green"), ("serious", "pink"), ("with glasses", "grey"),
    ("sad", "orange"),
)  # fmt: skip
WORDS = {"openmoji": "openmoji emoji of", "fluent-flat": "fluent flat emoji of", "streamline-emojis": "streamline emoji of"}
SCORES = "scores.safetensors"
COLUMNS = 7  # of a row from all of one to all of the other


def _styles(first: str, second: str) -> Pair:
    return Pair(first, second, tuple(f"emoji of {with_article(one)}" for one in SUBJECTS), SUBJECTS)


def _character(style: str, name: str) -> Pair:
    prompts = tuple(f"{WORDS[style]} a portrait of {name}, {words}, {colour} background" for words, colour in SCENES)
    return Pair(style, name, prompts, tuple(colour for _, colour in SCENES), character=True)


PAIRS = (
    _styles("openmoji", "twemoji"),
    _styles("openmoji", "fluent-flat"),
    _styles("twemoji", "fluent-flat"),
    _styles("icon-park-twotone", "emojione"),
    _styles("icon-park-twotone", "streamline-emojis"),
    _styles("streamline-emojis", "emojione"),
    _character("openmoji", "mira"),
    _character("fluent-flat", "zog"),
    _character("streamline-emojis", "dario"),
)


@dataclass(kw_only=True)
class Found:
    """What was found so far: scores by pair and way, rows by pair."""

    options: argparse.Namespace
    began: float
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    points: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    strips: dict[str, dict[str, list[Image.Image]]] = field(default_factory=dict)

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return late(self.began, self.options.minutes)

    def say(self, text: str) -> None:
        """Tell a line, with the seconds since the start."""
        say(text, self.began)

    def take(self, folder: Path) -> None:
        """Take the scores that a run wrote."""
        file = folder / SCORES
        for name, scores in load_file(file).items() if file.exists() else ():
            pair, way = name.split(" / ")
            self.scores.setdefault(pair, {})[way] = scores
            self.points.setdefault(pair, {})[way] = points_of(every()[way], self.options)

    def keep(self) -> None:
        """Write the scores."""
        flat = {f"{pair} / {way}": one.contiguous() for pair, ways in self.scores.items() for way, one in ways.items()}
        save_file(flat, self.options.output / SCORES)

    def measured(self, pair: Pair, way: Way) -> bool:
        """Whether the scores of a pair in a way are known."""
        return way.name in self.scores.get(pair.name, {})


@dataclass(kw_only=True)
class Measure(Found):
    """What all measurements have in common besides."""

    adapters: Adapters
    folder: Path
    styles: judges.StyleJudge
    things: judges.ThingJudge


def main() -> None:
    """Train, draw, judge, print."""
    options, began = _options(), time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    pairs = [pair for pair in PAIRS if not options.pairs or pair.name in options.pairs]
    known = every()
    ways = {name: known[name] for name in ("plain", *(options.methods or known)) if name not in options.without}
    if options.only_report:
        told = Found(options=options, began=began)
        _take(told)
        report(told, pairs)
        return
    folder = options.adapters or options.output / "adapters"
    _train_all(pairs, ways, folder, options, began)
    if options.only_train:
        return
    adapters = Adapters(load_base("icons", device=options.device))
    device = torch.device(adapters.pipe.device)
    with _merging(list(ways.values()), pairs, folder, options) as merged:
        found = Measure(
            options=options, began=began, adapters=adapters, folder=folder, styles=judges.StyleJudge(options.data, device),
            things=judges.ThingJudge(options.data, device),
        )  # fmt: skip
        _take(found)
        _tell_trust(found, pairs)
        adapters.fast()
        for pair in pairs if options.rows else ():
            if not pair.character and not found.late:
                _rows(found, pair)
        for way in ways.values():
            _measure_all(found, pairs, way, merged)
        report(found, pairs)
    found.say("done" if not found.late else "the time was over before all was measured")


def _take(found: Found) -> None:
    """Take what earlier runs measured."""
    for folder in (*found.options.others, found.options.output):
        found.take(folder)


def _measure_all(found: Measure, pairs: Sequence[Pair], way: Way, merged: Callable[[], object]) -> None:
    """Measure all pairs in a way, but for those that are known."""
    asked = [pair for pair in pairs if not found.measured(pair, way)]
    if isinstance(way, Merged) and asked and not found.late:
        merged()
    if way.kind is not None:
        _learn(found, asked, way)
    for pair in asked:
        if not found.late:
            _measure(found, pair, way)
            found.keep()


Training = tuple[str, str | None]
"""What an adapter is trained on, and beside which."""


def _train_all(
    pairs: Sequence[Pair], ways: Mapping[str, Way], folder: Path, options: argparse.Namespace, began: float
) -> None:
    """Train what is not in the folder yet, several at once: first what stands alone, then what is trained beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    alone: dict[str, Training] = {name: (name, None) for pair in pairs for name in (pair.first, pair.second)}
    both = {beside_name(pair): (pair.second, pair.first) for pair in pairs} if "beside" in ways else dict[str, Training]()
    for wanted in (alone, both):
        jobs = [
            (what, beside, file, options)
            for name, (what, beside) in wanted.items()
            if not (file := folder / f"{name}.safetensors").exists()
        ]
        in_processes(train_one, jobs, options.trainings, began, options.minutes)


def train_one(job: tuple[str, str | None, Path, argparse.Namespace]) -> str:
    """Train an adapter by the defaults of its kind, and beside another one as the guide has it."""
    what, beside, file, options = job
    given: dict[str, Any] = {}
    if (options.data / "subjects" / what).exists():
        given |= {"preset": "subject", "trigger": what}
    if beside is not None:
        given |= BESIDE
        given["beside"] = (f"{file.parent / beside}.safetensors",)
        given["beside_prompt"] = tuple(prompts_of(drawings(options.data, beside)))
    train(config_of(what, file, options, given), pipe=load_base("icons", device=options.device))
    return f"trained {file.stem}"


def _learn(found: Measure, pairs: Sequence[Pair], way: Way) -> None:
    """Learn how much of each adapter acts, from the pictures that it was trained on."""
    for pair in pairs:
        file, both = way.file(found.folder, pair), (pair.first, pair.second)
        if file is None or file.exists() or found.late:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        config = ComposeTrainConfig(
            tuple(found.folder / f"{name}.safetensors" for name in both),
            data=tuple(drawings(found.options.data, name) for name in both),
            output=file,
            run_dir=file.with_suffix(""),
            overwrite=True,  # a run that another go of this script left
            kind=way.kind,  # type: ignore[arg-type]
            steps=found.options.train_steps or 100,
            device=found.options.device,
        )
        made = train_composition(config, pipe=found.adapters.pipe)
        told = ", ".join(f"{before:.4f} to {after:.4f}" for before, after in zip(made.before, made.after, strict=True))
        found.say(f"{pair.name}: {way.name}: losses of both {told}, {made.seconds:.0f} s")


@contextmanager
def _merging(ways: Sequence[Way], pairs: Sequence[Pair], folder: Path, options: argparse.Namespace) -> Iterator[Any]:
    """Merge files in other processes meanwhile; yields what waits for them."""
    jobs = merges(ways, pairs, folder)
    if not jobs:
        yield lambda: None
        return
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        waiting = pool.map_async(merge_one, jobs, chunksize=1)
        yield waiting.get


def _tell_trust(found: Measure, pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        if not pair.character:
            found.say(f"judge: {pair.name}: {found.styles.trust(pair.first, pair.second):.0%} of real drawings told right")
    for name, trust in found.things.trust.items():
        found.say(f"judge: {name}: nearer than another of the same hand {trust:.0%} of the time")


def _draw(found: Measure, cells: Sequence[Cell], compose: str = "add", file: Path | None = None) -> Tensor:
    """Pictures of cells as pixels in bytes; batches are all of one size, so that one recording serves all."""
    size = max(1, found.options.batch // 2 if compose == "composite" else found.options.batch)
    size = min(size, len(cells))
    filled = [*cells, *[cells[-1]] * (-len(cells) % size)]
    options = found.options
    sampling = Sampling(steps=options.steps, batch_size=size, device=options.device, compose=compose, compose_file=file)
    return pixels_of(list(paint(found.adapters, filled, sampling)))[: len(cells)]


def points_of(way: Way, options: argparse.Namespace) -> list[Point]:
    """The points of a way: of both ends, and between."""
    return [*ENDS, *way.points[: options.points]]


def _measure(found: Measure, pair: Pair, way: Way) -> None:
    """Draw and judge a pair in a way."""
    points = points_of(way, found.options)
    if not way.draws_ends:
        points = points[len(ENDS) :]
    seeds, prompts = range(found.options.seeds), pair.prompts[: found.options.prompts]
    with emptied(found.adapters):
        strengths = way.load(found.adapters, pair, found.folder)
        if strengths is None:
            found.say(f"{pair.name}: there is no file for {way.name}")
            return
        cells = [Cell(prompt, seed, dict(strengths(*point))) for point in points for seed in seeds for prompt in prompts]
        try:
            pixels = _draw(found, cells, way.compose, way.file(found.folder, pair))
        except (UserError, RuntimeError) as error:  # such as too little memory: what was measured is not lost
            found.say(f"{pair.name}: {way.name} cannot: {error}")
            return
    shape = (len(points), len(seeds), len(prompts))
    scores = judge(found, pair, pixels, shape)
    if not way.draws_ends:  # at the ends one acts alone, in any way
        plain = found.scores[pair.name]["plain"][: len(ENDS)]
        scores, points = torch.cat([plain, scores]), [*ENDS, *points]
    found.scores.setdefault(pair.name, {})[way.name] = scores
    found.points.setdefault(pair.name, {})[way.name] = points
    _keep_strips(found, pair, way, pixels.unflatten(0, shape), points)
    volume = curves.volumes(_counted(found, pair, way.name))
    found.say(f"{pair.name}: {way.name}: volume {volume}")


def judge(found: Measure, pair: Pair, pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The scores of pictures (points, seeds, prompts, 3): of the first, of the second, and of the prompt."""
    wanted = list(pair.wanted[: shape[2]]) * (shape[0] * shape[1])
    seen = found.styles.points(judges.plain(pixels) if pair.character else pixels)
    things = found.things.points(judges.plain(pixels) if pair.character else pixels)
    first = found.styles.likeness(seen, pair.first)
    second = found.things.likeness(things, pair.second) if pair.character else found.styles.likeness(seen, pair.second)
    followed = judges.before(pixels, wanted) if pair.character else found.things.shows(things, wanted)
    scores: Tensor = torch.stack([first, second, followed.float()], 1).unflatten(0, shape)
    return scores


def _keep_strips(found: Measure, pair: Pair, way: Way, pixels: Tensor, points: Sequence[Point]) -> None:
    """Keep the pictures of the first seed at each share, at a sum of 1 and at the largest sum, for two prompts."""
    drawn = points[-len(pixels) :]
    for scale in (1.0, max(scale for _, scale in drawn)):
        wanted = [min(range(len(drawn)), key=lambda n: (drawn[n][1] != scale, abs(drawn[n][0] - share))) for share in SHARES]
        for prompt in range(min(2, pixels.shape[2])):
            row = [Image.fromarray(pixels[n, 0, prompt].permute(1, 2, 0).numpy()) for n in reversed(wanted)]
            label = f"{way.name}, sum {scale:g}\n{pair.wanted[prompt]}"
            found.strips.setdefault(pair.name, {})[label] = row


def _rows(found: Measure, pair: Pair) -> None:
    """How often each column of a row from all of the first to all of the second is told the first, plain and calibrated."""
    seeds, prompts = range(found.options.seeds), pair.prompts[: found.options.prompts]
    mixes = row_of(2, COLUMNS)
    for kind in ("plain", "calibrated"):
        with emptied(found.adapters):
            Way("plain").load(found.adapters, pair, found.folder)
            cells = []
            for seed in seeds:  # a sheet has one seed, for which it is calibrated
                parts = mixes
                if kind == "calibrated":
                    sampling = Sampling(steps=found.options.steps, device=found.options.device)
                    known = found.adapters.calibrate(prompts, seed=seed, sampling=sampling, rows=True)
                    parts = [
                        tuple(known.evenly(dict(zip((pair.first, pair.second), mix, strict=True))).values()) for mix in mixes
                    ]
                cells += [Cell(prompt, seed, {pair.first: a, pair.second: b}) for a, b in parts for prompt in prompts]
            pixels = _draw(found, cells)
        first = found.styles.first(found.styles.points(pixels), pair.first, pair.second).float()
        told = first.unflatten(0, (len(seeds), COLUMNS, len(prompts))).mean((0, 2)).tolist()
        found.rows.setdefault(pair.name, {})[kind] = told
        found.say(f"{pair.name}: {kind} row: told {pair.first} {' '.join(f'{one:.0%}' for one in told)}")
        row = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels.unflatten(0, (-1, len(prompts)))[:COLUMNS, 0]]
        found.strips.setdefault(f"rows {pair.name}", {})[kind] = row


def report(found: Found, pairs: Sequence[Pair]) -> None:
    """Write all that is known by now."""
    output: Path = found.options.output
    known = [pair for pair in pairs if pair.name in found.scores]
    figures = {pair.name: _figures(found, pair) for pair in known}
    names = [name for name in every() if any(name in found.scores[pair.name] for pair in known)]
    kinds = {"pairs of styles": False, "with a character": True}
    of_kinds = {kind: [pair for pair in known if pair.character == character] for kind, character in kinds.items()}
    totals = {
        kind: {name: told for name in names if name != "plain" and (told := _total(found, several, name)) is not None}
        for kind, several in of_kinds.items()
        if several
    }
    text = [_volumes_table(figures, names, totals), _balance_table(figures, names), _rows_table(found)]
    told = circumstances(found.options) | {"pairs": figures, "together": totals, "rows": found.rows}
    write_results(output, told, "\n".join(text))
    found.keep()
    for pair in known:
        _plot(found, pair)
    for title, strips in found.strips.items():
        path = output / f"{title.replace(' x ', '+').replace(' ', '-')}.webp"
        columns = [f"{share:.0%}" for share in (reversed(SHARES) if title in found.scores else np.linspace(1, 0, COLUMNS))]
        sheet.grid(list(strips.values()), list(strips), columns, title).convert("RGB").save(path, quality=80)


def _figures(found: Found, pair: Pair) -> dict[str, Any]:
    """The figures of a pair by way."""
    plain, rows = _counted(found, pair, "plain"), {}
    for name, tensor in found.scores[pair.name].items():
        scores = _counted(found, pair, name)
        place, most = curves.balanced(scores)
        rows[name] = {
            "volume": vars(curves.volumes(scores)),
            "above": vars(curves.above(scores, plain)),
            "balanced": vars(most),
            "balanced_at": found.points[pair.name][name][place],
            "at_balance": tensor[place].mean((0, 1)).tolist(),
            "points": [
                [*point, *one]
                for point, one in zip(found.points[pair.name][name], tensor.mean((1, 2)).tolist(), strict=True)
            ],
        }
    return rows


def _counted(found: Found, pair: Pair, name: str) -> curves.Scores:
    """The scores of a way as they count."""
    scores = found.scores[pair.name]
    return curves.scaled(scores[name].double().numpy(), scores["plain"].double().numpy())


def _total(found: Found, pairs: Sequence[Pair], name: str) -> dict[str, Any] | None:
    """A way against plain strengths over all pairs of a kind that it was measured on; None where there is none."""
    both = [(_counted(found, pair, name), _counted(found, pair, "plain"))
            for pair in pairs if name in found.scores[pair.name]]  # fmt: skip
    return {"pairs": len(both), **vars(curves.together(both))} if both else None


def _mark(row: Mapping[str, float]) -> str:
    """Whether an interval lies above 0, below it, or around it."""
    if row["low"] == row["high"]:
        return ""  # of one seed there is no interval
    return "above" if row["low"] > 0 else "below" if row["high"] < 0 else "even"


def _volumes_table(figures: Mapping[str, Any], names: Sequence[str], totals: Mapping[str, Mapping[str, Any]]) -> str:
    headings = ("more volume than plain strengths", *figures, *totals)
    rows = [
        ("plain (its volume)", *(f"{one['plain']['volume']['value']:.3f}" for one in figures.values()), *[""] * len(totals))
    ]
    for name in names:
        if name == "plain":
            continue
        cells = [_signed(one[name]["above"]) if name in one else "-" for one in figures.values()]
        rows.append((name, *cells, *(_total_words(own[name]) if name in own else "-" for own in totals.values())))
    return markdown_table(headings, rows)


def _total_words(row: Mapping[str, Any]) -> str:
    interval = curves.Interval(*(row[name] for name in ("value", "low", "high")))
    return f"{interval.signed()} {_mark(row)}, {row['pairs']} pairs"


def _signed(row: Mapping[str, float]) -> str:
    return f"{row['value']:+.3f} {_mark(row)}"


def _balance_table(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    headings = ("the best balance: the least share of a likeness (likeness to the first, the second, prompt)", *figures)
    rows = []
    for name in names:
        cells = []
        for one in figures.values():
            if name in one:
                told = ", ".join(f"{value:.2f}" for value in one[name]["at_balance"])
                cells.append(f"{one[name]['balanced']['value']:.2f} ({told})")
            else:
                cells.append("-")
        rows.append((name, *cells))
    return markdown_table(headings, rows)


def _rows_table(found: Found) -> str:
    headings = ("told the first, from all of it to none", *(f"{share:.0%}" for share in np.linspace(1, 0, COLUMNS)))
    rows = [
        (f"{pair}, {kind}", *(f"{one:.0%}" for one in told))
        for pair, kinds in found.rows.items()
        for kind, told in kinds.items()
    ]
    return markdown_table(headings, rows)


def _plot(found: Found, pair: Pair) -> None:
    """The points of each way: how much of the one and of the other; fainter where the prompt is not followed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6))
    for number, (name, scores) in enumerate(found.scores[pair.name].items()):
        means = scores.mean((1, 2))
        colour = pyplot.get_cmap("tab20")(number % 20)
        axes.scatter(means[:, 0], means[:, 1], s=18, color=colour, alpha=means[:, 2].clamp(0.15, 1).numpy(), label=name)
        best = [n for n in range(len(means)) if not ((means[:, :2] > means[n, :2]).all(1)).any()]
        best.sort(key=lambda n: means[n, 0].item())
        axes.plot(means[best, 0], means[best, 1], color=colour, linewidth=2 if name == "plain" else 0.8)
    axes.set_xlabel(f"likeness to {pair.first}")
    axes.set_ylabel(f"likeness to {pair.second}")
    axes.legend(fontsize=7)
    axes.set_title(f"{pair.name}: fainter where the prompt is not followed")
    figure.savefig(found.options.output / f"{pair.stem}.png", dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of scripts/blends/make_data.py")
    parser.add_argument("--output", type=Path, default=Path("blends"), help="folder for figures, plots, sheets and adapters")
    parser.add_argument("--adapters", type=Path, help="folder of adapters; what is not there is trained into it")
    parser.add_argument("--only-train", action="store_true", help="measure nothing")
    parser.add_argument("--only-report", action="store_true", help="train and draw nothing: tell what is known")
    parser.add_argument("--from", dest="others", type=Path, nargs="+", default=[], help="take the scores of other outputs")
    parser.add_argument("--no-rows", dest="rows", action="store_false", help="draw no rows from one style to the other")
    parser.add_argument("--trainings", type=int, default=1, help="trainings at once")
    parser.add_argument("--methods", nargs="+", choices=list(every()), help="the ways to compare with plain, in this order")
    parser.add_argument("--without", nargs="+", choices=[*every()][1:], default=[], help="ways to leave out")
    parser.add_argument("--pairs", nargs="+", choices=[pair.name for pair in PAIRS], help="which; by default all")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=len(SUBJECTS))
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a picture")
    parser.add_argument("--points", type=int, help="the first so many points of each way; by default all")
    parser.add_argument("--batch", type=int, default=300, help="pictures at once")
    parser.add_argument("--train-steps", type=int, help="steps of training; by default what suits")
    parser.add_argument("--processes", type=int, default=2, help="in which files are merged")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing more after so long")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="the smallest setting that runs through everything")
    options = parser.parse_args()
    if options.only_report and not options.others and not (options.output / SCORES).exists():
        parser.error(
            f"--only-report tells what was measured: there is no {SCORES} in {options.output}; name folders by --from"
        )
    if options.quick:
        given = {"seeds": 1, "prompts": 1, "steps": 4, "points": 3, "batch": 8, "train_steps": 12}
        vars(options).update(given)
        options.pairs = options.pairs or [PAIRS[3].name, PAIRS[7].name]
    return options


if __name__ == "__main__":
    run(main)
