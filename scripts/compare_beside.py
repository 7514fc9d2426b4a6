"""What training an adapter beside another one does to both: their interference, and how well each draws its own style.

    python -m scripts.blends.make_data --output drawings
    python scripts/compare_beside.py --data drawings --output beside --device cuda

For each seed trains the three sample styles alone, with the defaults of ``peft-diffusion train``. Then, for each two of
them in both orders and each variant below, trains the second anew beside the first, and measures on drawings that no
training saw

- the interference, as ``evaluate`` has it: by how much the loss of each one's drawings rises when the other is on too, both
  at strength 1, as a share of its loss alone;
- how often a judge tells its own style of what it draws, alone and with the other on;
- all of it again with the second at other strengths: lower ones where both were trained alone, else higher ones;

and prints how much less each rise is than of two that were trained alone, with intervals of 95% over drawings (each the mean
over seeds), and whether what was trained beside does worse alone. Where it does, it is weaker, and a weaker one interferes
less however it was trained. So two tables compare at strengths of equal style, by the loss and by the judge: see
`AtEqualStyle`. A run with the same ``--output`` goes on.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.api import train
from peft_diffusion.bases import load_base
from peft_diffusion.core.errors import UserError
from peft_diffusion.evaluation.bench import Bench
from peft_diffusion.evaluation.drawings import pixels_of
from peft_diffusion.evaluation.gallery import encoded, read_gallery
from peft_diffusion.evaluation.intervals import Estimate, estimate
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.settings import Sampling
from peft_diffusion.training.tasks.diffusion import Examples
from scripts.blends import judges
from scripts.blends.make_data import SAMPLES
from scripts.blends.trained import BESIDE, DROPOUT, KEEP, caption_held, config_of, drawings, emptied, prompts_of
from scripts.build_base.captions import with_article
from scripts.build_base.make_samples import HELD_OUT
from scripts.build_base.sources import icon_set
from scripts.measuring import circumstances, in_processes, markdown_table, run, write_results

ASKED = 1 / 3  # of the rise that has to go
_ROUNDING = 1e-9  # of what lies between two strengths, as a share
Style = Literal["loss", "told"]  # how well drawings that nobody trained on are fitted, or pictures told by a judge
STYLES: tuple[Style, ...] = ("loss", "told")


@dataclass(frozen=True)
class Variant:
    """How the second is trained beside the first: settings, and which pictures and prompts of the first's it is told.

    ``beside`` is off where it is trained alone, ``prompts`` gives the captions of the first as ``--beside-prompt``, and
    ``pictures`` the first's pictures as ``--regularisation``. ``basis`` trains the first anew too, both on parts of their
    own of one orthogonal basis. ``onto`` trains the first anew beside the second of another variant.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    beside: bool = True
    prompts: bool = False
    pictures: bool = False
    basis: bool = False
    onto: str | None = None


PLAIN, BOTH = "alone", "keep, dropout"
VARIANTS: Mapping[str, Variant] = {
    PLAIN: Variant(beside=False),
    BOTH: Variant(BESIDE, prompts=True),
    "keep": Variant(KEEP, prompts=True),
    "dropout": Variant(DROPOUT),
    "keep 3, dropout": Variant({"beside_keep": 3.0, **DROPOUT}, prompts=True),
    "keep 3, dropout, 600 steps": Variant({"beside_keep": 3.0, **DROPOUT, "steps": 600}, prompts=True),
    "its pictures, dropout": Variant(DROPOUT, pictures=True),
    "its pictures 3, dropout": Variant({"prior_weight": 3.0, **DROPOUT}, pictures=True),
    "keep, dropout, orthogonal": Variant({**BESIDE, "orthogonal": 1.0}, prompts=True),
    "parts of a basis": Variant(beside=False, basis=True),
    "keep, dropout, then the first": Variant(BESIDE, prompts=True, onto=BOTH),
}
"""By name; each after what it takes files of."""


@dataclass(frozen=True)
class Job:
    """What is trained and measured in one go."""

    seed: int
    first: str
    second: str
    variant: str

    @property
    def stem(self) -> str:
        """Part of the names of files."""
        return f"{self.seed}_{self.first}_{self.second}_{self.variant.replace(', ', '-').replace(' ', '-')}"


@dataclass(frozen=True)
class Workbench:
    """What a process measures with: a base, a judge, and the drawings of each style that nobody trained on."""

    adapters: Adapters
    judge: judges.StyleJudge
    unseen: Mapping[str, Examples]


def main() -> None:
    """Train, measure, print."""
    options, began = _options(), time.monotonic()
    results: Path = options.output / "results"
    results.mkdir(parents=True, exist_ok=True)
    if not options.only_report:
        for style in options.styles:
            caption_held(options.data, style, options.output / "held" / style, options.pictures)
        alone = [(seed, style, options) for seed in options.seeds for style in options.styles]
        in_processes(train_alone, alone, options.processes, began, options.minutes, threads=1)
        ordered = [
            Job(seed, first, second, name)
            for seed in options.seeds
            for name in options.variants
            for first, second in permutations(options.styles, 2)
        ]
        ordered.sort(key=lambda job: job.variant not in (PLAIN, BOTH))  # what matters most, of all seeds, before the rest
        for last in (False, True):  # what trains onto another variant needs its files
            jobs = [(job, options) for job in ordered if (VARIANTS[job.variant].onto is not None) == last]
            in_processes(measure_one, jobs, options.processes, began, options.minutes, threads=1)
    report(options)


def train_alone(job: tuple[int, str, argparse.Namespace]) -> str:
    """Train a style alone, where there is no file yet."""
    seed, style, options = job
    file = file_of(seed, style, options)
    if file.exists():
        return ""
    seconds = _train(seed, style, file, options, {})
    return f"{file.stem}: trained in {seconds:.0f} s"


def file_of(seed: int, style: str, options: argparse.Namespace) -> Path:
    """The file of a style that was trained alone."""
    path: Path = options.output / "adapters" / f"{seed}_{style}.safetensors"
    return path


def _train(seed: int, style: str, file: Path, options: argparse.Namespace, given: Mapping[str, Any]) -> float:
    """Train with the package's defaults, but for what is given; how long it took."""
    began = time.monotonic()
    train(config_of(style, file, options, {"seed": seed, **given}), pipe=_base(options.device))
    return time.monotonic() - began


@cache
def _base(device: str) -> Any:
    """The base that a process trains on."""
    return load_base("icons", device=device)


def _files(job: Job, options: argparse.Namespace) -> tuple[Path, Path]:
    """The files of both adapters; those that are not there yet are trained."""
    variant, folder = VARIANTS[job.variant], options.output / "adapters"
    first, second = file_of(job.seed, job.first, options), file_of(job.seed, job.second, options)
    if variant.basis:
        files = []
        for part, style in enumerate((job.first, job.second)):
            file = folder / f"{job.stem}_{part}.safetensors"
            option = ("init=orthogonal", f"basis_part={part}")
            if not file.exists():
                _train(job.seed, style, file, options, {"option": option})
            files.append(file)
        return files[0], files[1]
    if not variant.beside:
        return first, second
    made = folder / f"{job.stem}.safetensors"
    if variant.onto is not None:
        second = folder / f"{Job(job.seed, job.first, job.second, variant.onto).stem}.safetensors"
        _train_beside(job, job.first, job.second, second, made, options)
        return made, second
    _train_beside(job, job.second, job.first, first, made, options)
    return first, made


def _train_beside(job: Job, style: str, other: str, there: Path, file: Path, options: argparse.Namespace) -> None:
    """Train a style beside the file of another one, unless that was done."""
    if file.exists():
        return
    variant, pictures = VARIANTS[job.variant], drawings(options.data, other)
    given: dict[str, Any] = {**variant.given, "beside": (str(there),)}
    if variant.prompts:
        given["beside_prompt"] = tuple(prompts_of(pictures))
    if variant.pictures:
        given["regularisation"] = (pictures,)
    _train(job.seed, style, file, options, given)


@cache
def _workbench(device: str, data: Path, held: Path, styles: tuple[str, ...]) -> Workbench:
    pipe: Any = load_base("icons", device=device)
    unseen = {style: encoded(read_gallery(held / style, style, pipe), pipe) for style in styles}
    return Workbench(Adapters(pipe), judges.StyleJudge(data, torch.device(pipe.device)), unseen)


def measure_one(job: tuple[Job, argparse.Namespace]) -> str:
    """Train what a job needs, measure both adapters, and write what was found."""
    one, options = job
    path = options.output / "results" / f"{one.stem}.json"
    if path.exists():
        return ""
    began = time.monotonic()
    try:
        files = _files(one, options)
    except (UserError, RuntimeError) as error:  # such as too little memory: the others are not lost
        return f"{one.stem} cannot: {error}"
    trained = time.monotonic() - began
    bench = _workbench(options.device, options.data, options.output / "held", tuple(options.styles))
    found: dict[str, Any] = {"job": vars(one), "seconds": trained}
    with emptied(bench.adapters):
        for name, file in zip((one.first, one.second), files, strict=True):
            bench.adapters.load(file, name=name)
        for side, own in (("first", one.first), ("second", one.second)):
            for kind, amounts in (("alone", {own: 1.0}), ("both", {one.first: 1.0, one.second: 1.0})):
                found[f"{side} {kind}"] = _measured(bench, own, amounts, options)
        others = options.weaker if one.variant == PLAIN else options.stronger
        found["others"] = [_at(bench, one, strength, options) for strength in others]
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return f"{one.stem}: trained in {trained:.0f} s, measured in {time.monotonic() - began - trained:.0f} s"


def _measured(bench: Workbench, own: str, amounts: Mapping[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """The losses of a style's drawings, and for each seed the share of pictures that are told to be of the style."""
    sampling = Sampling(steps=options.steps, batch_size=options.batch, device=options.device)
    used = Bench(bench.adapters, sampling, tuple(range(options.noises)))
    losses = used.losses(bench.unseen[own], amounts)
    words = [with_article(name.replace("-", " ")) for name in HELD_OUT[: options.prompts]]
    prompts = [icon_set(SAMPLES[own]).template.format(one) for one in words]
    (rows,) = used.draw(prompts, [amounts])
    told = bench.judge.nearest(bench.judge.points(pixels_of([image for row in rows for image in row])))
    right = torch.tensor([name == own for name in told]).float().unflatten(0, (len(rows), len(prompts)))
    return {"losses": losses, "told": right.mean(1).tolist()}


def _at(bench: Workbench, job: Job, strength: float, options: argparse.Namespace) -> dict[str, Any]:
    """What is measured with the second at another strength, and the first at 1."""
    both = {job.first: 1.0, job.second: strength}
    used = Bench(bench.adapters, Sampling(batch_size=options.batch, device=options.device), seeds=())
    return {
        "strength": strength,
        "second alone": _measured(bench, job.second, {job.second: strength}, options),
        "second both": {"losses": used.losses(bench.unseen[job.second], both)},
        "first both": {"losses": used.losses(bench.unseen[job.first], both)},
    }


def report(options: argparse.Namespace) -> None:
    """Write and print the table of all that was measured."""
    found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted((options.output / "results").glob("*.json")):
        one = json.loads(path.read_text("utf-8"))
        job = Job(**one["job"])
        found.setdefault((job.variant, job.first, job.second), {})[job.seed] = one
    rows, figures = [], []
    equal: dict[Style, list[tuple[str, ...]]] = {kind: [] for kind in STYLES}
    for name in VARIANTS:
        for first, second in permutations(options.styles, 2):
            plain, own = found.get((PLAIN, first, second), {}), found.get((name, first, second), {})
            seeds = sorted(set(plain) & set(own))
            if not seeds:
                continue
            which = f"{second} beside {first}"
            compared = Compared([plain[seed] for seed in seeds], [own[seed] for seed in seeds])
            figures.append({"variant": name, "first": first, "second": second, "seeds": seeds, **compared.figures()})
            rows.append((name, which, *compared.words()))
            if name != PLAIN and all("others" in one for one in (*compared.plain, *compared.own)):
                for kind in STYLES:
                    at_equal = AtEqualStyle(Course.of(compared.plain), Course.of(compared.own), kind)
                    figures[-1][f"at equal style by {kind}"] = at_equal.figures()
                    equal[kind].append((name, which, *at_equal.words()))
    headings = (
        "how", "which", "the first rises by", "less", "the second rises by", "less", "the second's loss alone",
        "told right alone, first", "second", "with the other, first", "second",
    )  # fmt: skip
    tables = [markdown_table(headings, rows)]
    for kind in STYLES:
        of_equals = (
            f"how, at equal style by {kind}", "which", "strength of the second, alone and beside", "told right",
            "the loss of the one trained beside", "the first rises by", "less", "the second rises by", "less",
        )  # fmt: skip
        tables += [markdown_table(of_equals, equal[kind])] if equal[kind] else []
    text = "\n".join(tables)
    write_results(options.output, circumstances(options) | {"rows": figures}, text)
    print(text)


@dataclass(frozen=True)
class Compared:
    """Two that go together, against the same two trained alone, of the same seeds."""

    plain: Sequence[Mapping[str, Any]]
    own: Sequence[Mapping[str, Any]]

    def rises(self, several: Sequence[Mapping[str, Any]], side: str) -> list[float]:
        """By how much the loss of each drawing rises with the other on, as a share of its loss alone."""
        alone, both = losses_of(several, f"{side} alone"), losses_of(several, f"{side} both")
        return [after / before - 1 for before, after in zip(alone, both, strict=True)]

    def less(self, side: str) -> Estimate:
        """By how much less it rises than of two that were trained alone, beyond what is asked: above 0 where it is met."""
        pairs = zip(self.rises(self.plain, side), self.rises(self.own, side), strict=True)
        return estimate([(1 - ASKED) * before - after for before, after in pairs])

    def alone(self) -> Estimate:
        """By how much the second's loss alone is higher than where it was trained alone, as a share."""
        before, after = (losses_of(several, "second alone") for several in (self.plain, self.own))
        return estimate([late / early - 1 for early, late in zip(before, after, strict=True)])

    def told(self, side: str, kind: str) -> Estimate:
        """By how much more of its pictures are told its own style than where it was trained alone, over noises and seeds."""
        pairs = [
            (before, after)
            for plain, own in zip(self.plain, self.own, strict=True)
            for before, after in zip(plain[f"{side} {kind}"]["told"], own[f"{side} {kind}"]["told"], strict=True)
        ]
        return estimate([after - before for before, after in pairs])

    def share(self, several: Sequence[Mapping[str, Any]], side: str, kind: str) -> float:
        """The share of its pictures that are told its own style."""
        shares: list[float] = [share for one in several for share in one[f"{side} {kind}"]["told"]]
        return sum(shares) / len(shares)

    def words(self) -> list[str]:
        """The cells of a row."""
        cells = []
        for side in ("first", "second"):
            before, after = (estimate(self.rises(several, side)) for several in (self.plain, self.own))
            cells += [f"{before.mean:+.1%} to {after.mean:+.1%}", verdict(before, after, self.less(side))]
        alone = self.alone()
        cells.append(f"{alone.mean:+.1%} ±{100 * (alone.half or 0):.1f}")
        for kind in ("alone", "both"):
            for side in ("first", "second"):
                shares = [self.share(several, side, kind) for several in (self.plain, self.own)]
                cells.append(f"{shares[0]:.0%} to {shares[1]:.0%}")
        return cells

    def figures(self) -> dict[str, Any]:
        """All of it as data."""
        found: dict[str, Any] = {"second alone": self.alone().plain()}
        for side in ("first", "second"):
            found[f"{side} rises"] = [estimate(self.rises(several, side)).plain() for several in (self.plain, self.own)]
            found[f"{side} less than asked"] = self.less(side).plain()
            for kind in ("alone", "both"):
                found[f"{side} told {kind}"] = [self.share(several, side, kind) for several in (self.plain, self.own)]
                found[f"{side} told {kind} more"] = self.told(side, kind).plain()
        return found


@dataclass(frozen=True)
class Course:
    """What was measured at several strengths of the second, each of all seeds, in order of the strengths."""

    strengths: Sequence[float]
    measured: Sequence[Sequence[Mapping[str, Any]]]

    @classmethod
    def of(cls, several: Sequence[Mapping[str, Any]]) -> "Course":
        """Read those of one variant, at the strengths that all seeds were measured at: runs may differ in them."""
        found = [{one["strength"]: one for one in each["others"]} | {1.0: each} for each in several]
        strengths = sorted(set(found[0]).intersection(*found[1:]))
        return cls(strengths, [[each[strength] for each in found] for strength in strengths])

    def losses(self, place: float, kind: str) -> list[float]:
        """The loss of each drawing, as the mean over seeds, which between two strengths is taken to change evenly."""
        return self._between(place, [losses_of(measured, kind) for measured in self.measured])

    def told(self, place: float) -> float:
        """The share of the second's pictures, drawn with it alone, that are told its style."""
        return self._between(place, [[self._told(measured)] for measured in self.measured])[0]

    def strength(self, place: float) -> float:
        """The strength at a place."""
        return self._between(place, [[strength] for strength in self.strengths])[0]

    def best(self) -> float:
        """The greatest share that is told right at any of the strengths."""
        return max(self._told(measured) for measured in self.measured)

    def least(self, kind: Style, aim: float) -> float:
        """The place of the least strength at which the second's style is as much as asked; the last where it never is."""
        found = [self._told(one) if kind == "told" else -sum(losses_of(one, "second alone")) for one in self.measured]
        enough = aim - _ROUNDING * abs(aim)
        place = next((number for number, one in enumerate(found) if one >= enough), None)
        if place is None:
            return float(len(found) - 1)
        if place == 0:
            return 0.0
        return place - max(0.0, found[place] - aim) / (found[place] - found[place - 1])

    @staticmethod
    def _told(measured: Sequence[Mapping[str, Any]]) -> float:
        shares: list[float] = [share for one in measured for share in one["second alone"]["told"]]
        return mean(shares)

    @staticmethod
    def _between(place: float, columns: Sequence[Sequence[float]]) -> list[float]:
        low, part = int(place), place - int(place)
        pairs = zip(columns[low], columns[min(low + 1, len(columns) - 1)], strict=True)
        return [(1 - part) * before + part * after for before, after in pairs]


@dataclass(frozen=True)
class AtEqualStyle:
    """Two that go together against the same two trained alone, the second of either at a strength at which styles are equal.

    By ``loss``, what was trained beside is at strength 1, and what was trained alone at the least strength at which it fits
    drawings of its own style as well. By ``told``, what was trained beside is at the least strength at which as many of its
    pictures are told its style as of what was trained alone, or as many as ever are, and that then at the least strength
    at which as many are.
    """

    plain: Course
    own: Course
    kind: Style

    @cached_property
    def places(self) -> tuple[float, float]:
        """The places of both in their courses."""
        if self.kind == "loss":
            own = float(self.own.strengths.index(1.0))
            return self.plain.least(self.kind, -sum(self.own.losses(own, "second alone"))), own
        own = self.own.least(self.kind, min(self.own.best(), self.plain.told(self.plain.strengths.index(1.0))))
        return self.plain.least(self.kind, self.own.told(own)), own

    def rises(self, side: str) -> tuple[list[float], list[float]]:
        """By how much the loss of each drawing rises with the other on, of what was trained alone and beside."""
        found = []
        for course, place in zip((self.plain, self.own), self.places, strict=True):
            # The first alone is the same whatever the second's strength, and was measured once.
            at_one = course.measured[course.strengths.index(1.0)]
            before = losses_of(at_one, "first alone") if side == "first" else course.losses(place, "second alone")
            found.append(
                [late / early - 1 for early, late in zip(before, course.losses(place, f"{side} both"), strict=True)]
            )
        return found[0], found[1]

    def less(self, side: str) -> Estimate:
        """As of `Compared`."""
        return estimate([(1 - ASKED) * before - after for before, after in zip(*self.rises(side), strict=True)])

    def words(self) -> list[str]:
        """The cells of a row."""
        plain, own = self.places
        losses = [
            sum(course.losses(place, "second alone"))
            for course, place in zip((self.plain, self.own), self.places, strict=True)
        ]
        cells = [
            f"{self.plain.strength(plain):.2f}, {self.own.strength(own):.2f}",
            f"{self.plain.told(plain):.0%}, {self.own.told(own):.0%}",
            f"{losses[1] / losses[0] - 1:+.1%}",
        ]
        for side in ("first", "second"):
            before, after = (estimate(rises) for rises in self.rises(side))
            cells += [f"{before.mean:+.1%} to {after.mean:+.1%}", verdict(before, after, self.less(side))]
        return cells

    def figures(self) -> dict[str, Any]:
        """All of it as data."""
        plain, own = self.places
        found: dict[str, Any] = {"strengths": [self.plain.strength(plain), self.own.strength(own)]}
        found["told"] = [self.plain.told(plain), self.own.told(own)]
        for side in ("first", "second"):
            found[f"{side} rises"] = [estimate(rises).plain() for rises in self.rises(side)]
            found[f"{side} less than asked"] = self.less(side).plain()
        return found


def losses_of(several: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """The loss of each drawing, as the mean over seeds."""
    return [sum(column) / len(several) for column in zip(*(one[kind]["losses"] for one in several), strict=True)]


def verdict(before: Estimate, after: Estimate, met: Estimate) -> str:
    """How much of a rise is gone, and whether that is as much as asked."""
    gone = f"{1 - after.mean / before.mean:.0%}" if before.low > 0 else "had none"
    mark = "yes" if met.low > 0 else "no" if met.high < 0 else "open"
    return f"{gone}, {mark}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of scripts/blends/make_data.py")
    parser.add_argument("--output", type=Path, default=Path("beside"), help="folder for adapters, results and the table")
    parser.add_argument("--only-report", action="store_true", help="train and measure nothing: tell what is known")
    parser.add_argument("--styles", nargs="+", choices=list(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--pictures", type=int, default=48, help="drawings of each style that losses are measured on")
    parser.add_argument("--prompts", type=int, default=len(HELD_OUT), help="that each style is asked for")
    parser.add_argument("--noises", type=int, default=4, help="that each prompt is drawn from")
    parser.add_argument(
        "--weaker", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.85], help="strengths of one trained alone"
    )
    parser.add_argument(
        "--stronger", type=float, nargs="+", default=[1.25, 1.5, 1.75], help="strengths of one trained beside"
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a picture")
    parser.add_argument("--batch", type=int, default=48, help="pictures at once")
    parser.add_argument("--train-steps", type=int, help="steps of training; by default what suits")
    parser.add_argument("--processes", type=int, default=1, help="trainings and measurements at once")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing more after so long")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
