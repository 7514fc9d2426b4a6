"""``evaluate``: what adapters do on pictures that they never saw, alone over strengths and with each other on."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..bases.embedded import embedded
from ..bases.pipelines import Pipeline
from ..core.errors import UserError
from ..core.events import Ended, Never, Noted, Observer, Stop, Warned, check_stop, observed
from ..core.files import explained, write_bytes
from ..core.settings import of_kind
from ..core.strength_schedule import ByPart
from ..data.folder import scan
from ..formats import inspect
from ..generation import sheet
from ..generation.adapted import adapted, contains
from ..generation.adapters import Adapters
from ..generation.distilled import for_few_steps
from ..generation.learned import tell_base
from ..generation.memory import loaded
from ..generation.on_pictures import suggested_on_pictures
from ..generation.settings import Choice
from ..training.tasks.diffusion import Examples
from . import report
from .bench import Bench
from .events import Evaluated
from .gallery import Gallery, at_most, decoded, encoded, in_pieces, read_gallery
from .intervals import Estimate, estimate, estimate_share
from .judge import Judge
from .judges import JUDGES, judge_of
from .judging import BASE, Copies, Shown, Taught, Verdicts
from .measured import Alone, Evaluation, GoTogether, Interference, Values
from .picture_losses import PictureLosses
from .settings import EvaluateConfig
from .styles import Styles

_WEAK = 0.8  # share of real pictures that are told right, below which a judge is warned of
_SHOWN = 8  # prompts on a sheet
_PIECE = 64  # training pictures that are held at a time


@dataclass(frozen=True)
class Case:
    """An adapter that is evaluated, and what it is judged by.

    Attributes:
        choice: Its file, and the strength that counts as 1.
        gallery: Real pictures that it never saw.
        examples: The same as latents.
        images: The same as the base's autoencoder gives them back.
        places: Which of them are drawn.
        leak_prompts: Prompts without a word that calls it.
        copies: Finds copies of training pictures; None where these are not known.
    """

    choice: Choice
    gallery: Gallery
    examples: Examples
    images: Sequence[Image.Image]
    places: Sequence[int]
    leak_prompts: Sequence[str]
    copies: Copies | None

    @property
    def name(self) -> str:
        """What the adapter is called."""
        return self.gallery.name

    @property
    def prompts(self) -> list[str]:
        """What is drawn."""
        return [self.gallery.captions[place] for place in self.places]

    def at(self, strength: float) -> dict[str, float | ByPart]:
        """Give the adapter's strength as `Bench` takes it.

        Args:
            strength: A multiple of the one that counts as 1.

        Returns:
            By name; nothing for 0.
        """
        return {self.name: self.choice.scaled(strength).amount} if strength else {}


@dataclass(frozen=True)
class Drawn:
    """What is drawn at one strength: the prompts of a case and those without its words, a row a seed."""

    rows: list[list[Image.Image]]
    plain: list[list[Image.Image]]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Image.Image]], prompts: int) -> "Drawn":
        """Part what was drawn in one go.

        Args:
            rows: A row a seed, the prompts first.
            prompts: How many these are.

        Returns:
            Both parts.
        """
        return cls([list(row[:prompts]) for row in rows], [list(row[prompts:]) for row in rows])


def evaluate(
    config: EvaluateConfig, *, pipe: Pipeline | None = None, observers: Sequence[Observer] = (), stop: Stop | None = None
) -> Evaluation:
    """Measure adapters, and write ``report.html``, ``figures.json`` and a sheet for each.

    Args:
        config: Which adapters, and by what.
        pipe: A base that is loaded already, used in place of ``config.base`` and left as it was.
        observers: Are told what happens, `events.Evaluated` last.
        stop: Where it is set, nothing is drawn after the present batch, and nothing is written.

    Returns:
        What was found.

    Raises:
        UserError: Before anything is drawn, for adapters, folders and judges that cannot be used.
        Interrupted: It was stopped. It is a KeyboardInterrupt.
    """
    with observed(observers) as tell:
        of_kind(config, EvaluateConfig)
        config.check()
        choices = config.choices()
        judge = judge_of(config.judge, config.judge_model, config.device)
        sampling = for_few_steps(config.sampling(), choices, tell)
        base = loaded(sampling, pipe)
        with adapted(base, choices, [()] * len(choices), tell, lent=pipe is not None, strict=False) as (adapters, names):
            tell_base(adapters, config.compose_file, tell)
            bench = Bench(
                adapters, replace(sampling, compose="add", compose_file=None), config.all_seeds(), tell, stop or Never()
            )
            cases = [_case(config, choice, name, adapters, judge, tell) for choice, name in zip(choices, names, strict=True)]
            found, sheets = _measured(config, cases, bench, replace(bench, sampling=sampling), judge)
        _write(config.output, found, sheets, config)
        tell(Evaluated(found))
        tell(Ended("finished"))
    return found


def _case(config: EvaluateConfig, choice: Choice, name: str, adapters: Adapters, judge: Judge, tell: Observer) -> Case:
    """Read and encode what an adapter is judged by."""
    pipe = adapters.pipe
    trained = config.folders("trained").get(choice.name)
    seen = frozenset() if trained is None else frozenset(one.digest for one in scan(trained, missing="empty").pictures)
    folder = config.folders("data")[choice.name]
    gallery = read_gallery(folder, name, pipe, spec=adapters[name].spec, without=seen, tell=tell)
    gallery = at_most(gallery, config.pictures)
    examples = encoded(gallery, pipe, tell)
    images = decoded(examples.latents, pipe)
    places = gallery.some(config.prompts)
    copies = None
    if trained is not None:
        # All of them, however many --pictures count: a picture that is left out may be the one that was copied.
        pieces = in_pieces(read_gallery(trained, name, pipe, missing="empty"), _PIECE)
        learned = [judge.marks(decoded(encoded(one, pipe, tell).latents, pipe)) for one in pieces]
        copies = Copies.of(judge, torch.cat(learned), images)
    else:
        tell(Noted(f"{name}: what it was trained on is not known (--trained FOLDER), so copies are not looked for"))
    plain = list(config.leak_prompts) or [gallery.subjects[place] for place in places]
    if not config.leak_prompts and (not all(plain) or plain == [gallery.captions[place] for place in places]):
        tell(Noted(f"{name}: its captions share no words and no trigger, so leakage is not measured; give --leak-prompts"))
        plain = []
    for prompt in config.leak_prompts:
        if called := [one for one in adapters[name].spec.triggers if contains(prompt, one)]:
            tell(Warned(f'--leak-prompts "{prompt}" calls {name} by "{called[0]}", so what it does there is no leakage'))
    return Case(choice, gallery, examples, images, places, plain, copies)


def _measured(
    config: EvaluateConfig, cases: Sequence[Case], bench: Bench, together: Bench, judge: Judge
) -> tuple[Evaluation, dict[str, Image.Image]]:
    """Everything, and the sheets by name. Adapters are drawn alone by one bench, and together by the other."""
    _tell_work(config, cases, bench.tell)
    drawn = {case.name: _of_base(case, bench) for case in cases}
    shown: dict[str, Shown] = {case.name: (case.gallery, case.images) for case in cases}
    others, beside = _others(config, judge, shown, bench)
    taught = Taught.of(judge, {**shown, **others}, beside)
    of_base = judge.style([image for one in drawn.values() for row in one.rows for image in row])
    styles = Styles({**taught.features, BASE: of_base})
    trust = taught.trust(styles)
    for name, (right, count) in trust.styles.items():
        if right < _WEAK:
            bench.tell(
                Warned(f"the judge tells {right:.0%} of {count} pictures of {name} right: its word on styles is weak")
            )
    told = iter(styles.left_out(BASE) if len(of_base) > 1 else styles.told(of_base))
    alone, sheets = [], {}
    for case in cases:
        verdicts = _verdicts(case, taught, styles)
        own = [[next(told) for _ in row] for row in drawn[case.name].rows]
        values, pictures = _curves(config, case, bench, verdicts, drawn[case.name], own)
        sheets[case.name] = _sheet(case, pictures)
        file = case.choice.path
        alone.append(
            Alone(
                case.name, file, inspect(file).parameters, file.stat().st_size, case.prompts, list(case.leak_prompts),
                len(case.images), values, config.output / f"{case.name}.png",
            )
        )  # fmt: skip
    interference = () if config.alone else _interference(cases, together, taught, styles)
    strengths = () if config.alone else _together(cases, together)
    return Evaluation(trust, tuple(alone), interference, config.output / report.NAME, strengths), sheets


def _tell_work(config: EvaluateConfig, cases: Sequence[Case], tell: Observer) -> None:
    each = len(config.all_strengths()) * config.seeds
    pictures = sum(each * (len(case.places) + len(case.leak_prompts)) for case in cases)
    if not config.alone:
        pictures += sum((len(cases) - 1) * config.seeds * len(case.places) for case in cases)
    tell(Noted(f"{pictures} pictures are drawn; fewer --seeds, --prompts and --strengths take less time"))


def _of_base(case: Case, bench: Bench) -> Drawn:
    (rows,) = bench.draw([*case.prompts, *case.leak_prompts], [{}])
    return Drawn.of(rows, len(case.places))


def _others(
    config: EvaluateConfig, judge: Judge, shown: Mapping[str, Shown], bench: Bench
) -> tuple[dict[str, Shown], dict[str, Shown]]:
    """Other styles that pictures may be taken for, and pictures that show nothing but subjects."""
    usual = () if config.against else JUDGES[config.judge].against
    known = {_most(judge.names(images)) for _, images in shown.values()} if usual else set()
    folders = [embedded(f"styles/{name}") for name in usual] if usual else config.against
    pipe, styles, subjects = bench.adapters.pipe, dict[str, Shown](), dict[str, Shown]()
    for folder in folders:
        # A style is told by pictures alone; those that have captions tell subjects too.
        gallery = read_gallery(folder, _free(folder.name, {*shown, *styles, *subjects, BASE}), pipe, missing="empty")
        gallery = at_most(gallery, config.pictures)
        images = decoded(encoded(gallery, pipe, bench.tell).latents, pipe)
        same = bool(usual) and _most(judge.names(images)) in known
        (subjects if same else styles)[gallery.name] = gallery, images
    return styles, subjects


def _most(names: Sequence[str] | None) -> str:
    """The name that most pictures have."""
    return max(sorted(set(names)), key=names.count) if names else ""


def _free(name: str, taken: set[str]) -> str:
    """A name that no other style has."""
    number = 2
    while name in taken:
        name, number = f"{name.removesuffix(f' {number - 1}')} {number}", number + 1
    return name


def _verdicts(case: Case, taught: Taught, styles: Styles) -> Verdicts:
    words = [case.gallery.subjects[place] for place in case.places]
    return Verdicts(taught, styles, case.name, words, case.gallery.subjects)


def _curves(
    config: EvaluateConfig,
    case: Case,
    bench: Bench,
    verdicts: Verdicts,
    of_base: Drawn,
    told: Sequence[Sequence[str]],
) -> tuple[Values, dict[float, list[Image.Image]]]:
    """Estimates by measure and strength, and the pictures of the first seed by strength."""
    strengths, values = config.all_strengths(), Values()
    counted = {**verdicts.counted, "leak": len(case.leak_prompts)}
    losses: dict[float, list[float]] = {}
    for strength in dict.fromkeys((0.0, *strengths)):
        check_stop(bench.stop, f"stopped at the losses of {case.name}")
        losses[strength] = bench.losses(case.examples, case.at(strength))
    others = [strength for strength in strengths if strength]
    several = bench.draw([*case.prompts, *case.leak_prompts], [case.at(strength) for strength in others])
    drawn = itertools.chain([(0.0, of_base)], ((one, Drawn.of(next(several), len(case.places))) for one in others))
    pictures: dict[float, list[Image.Image]] = {}
    for strength, one in drawn:
        found = [
            verdicts.of(row, told[seed] if strength == 0 else None) | (case.copies(row) if case.copies else {})
            for seed, row in enumerate(one.rows)
        ]
        if case.leak_prompts:
            pairs = zip(found, one.plain, of_base.plain, strict=True)
            found = [own | verdicts.leak(row, before) for own, row, before in pairs]
        pictures[strength] = one.rows[0]
        noted = {"loss": losses[strength], "fall": _falls(losses[strength], losses[0.0])}
        noted |= {name: [own[name] for own in found] for name in found[0]}
        for name, single in noted.items():
            of = counted.get(name)
            values.setdefault(name, {})[strength] = estimate(single) if of is None else estimate_share(single, of)
    return {name: dict(sorted(own.items())) for name, own in values.items()}, dict(sorted(pictures.items()))


def _falls(losses: Sequence[float], base: Sequence[float]) -> list[float]:
    """By how much each loss fell, as a share of the base's."""
    return [1 - after / before for after, before in zip(losses, base, strict=True)]


def _interference(cases: Sequence[Case], bench: Bench, taught: Taught, styles: Styles) -> tuple[Interference, ...]:
    """Each adapter with each other one on, both at their strengths."""
    found = []
    for case in cases:
        others = [one for one in cases if one is not case]
        verdicts, alone = _verdicts(case, taught, styles), bench.losses(case.examples, case.at(1.0))
        both = [{**case.at(1.0), **one.at(1.0)} for one in others]
        harms: list[Estimate | None] = [None] * len(others)
        if bench.sampling.composition == "add":
            harms = [estimate([-fall for fall in _falls(bench.losses(case.examples, one), alone)]) for one in both]
        for other, harm, rows in zip(others, harms, bench.draw(case.prompts, both) if both else (), strict=True):
            found.append(_interference_of(case.name, other.name, harm, rows, verdicts))
    return tuple(found)


def _together(cases: Sequence[Case], bench: Bench) -> tuple[GoTogether, ...]:
    """The strengths of each two adapters at which the losses of both rise least, by some of their pictures."""
    if bench.sampling.composition != "add" or len(cases) < 2:
        return ()
    losses = PictureLosses.of(bench, {case.name: case.gallery for case in cases})
    found = []
    for first, second in itertools.combinations(cases, 2):
        pair = f"strengths at which {first.name} and {second.name} go together"
        bench.tell(Noted(f"looking for {pair}"))  # which takes minutes on a CPU
        try:
            best = suggested_on_pictures(losses, {**first.at(1.0), **second.at(1.0)}, bench.stop)
        except UserError as problem:  # which is no reason to lose all that was measured
            bench.tell(Warned(f"there are no {pair}: {problem}"))
        else:
            found.append(GoTogether(best.strengths, best.excess, best.excess_whole))
    return tuple(found)


def _interference_of(
    own: str, other: str, loss: Estimate | None, rows: Sequence[Sequence[Image.Image]], verdicts: Verdicts
) -> Interference:
    found = [verdicts.met(row, other) for row in rows]
    told, of_other, likeness = (list(several) for several in zip(*found, strict=True))
    style, of_its = (estimate_share(one, len(verdicts.words)) for one in (told, of_other))
    return Interference(own, other, loss, style, of_its, estimate(likeness))


def _sheet(case: Case, pictures: Mapping[float, Sequence[Image.Image]]) -> Image.Image:
    """Strengths by prompts, and the real pictures below."""
    labels = [f"{case.name} at {strength:g}" if strength else BASE for strength in pictures]
    rows = [list(row[:_SHOWN]) for row in pictures.values()]
    real = [case.gallery.images[place] for place in case.places[:_SHOWN]]
    size = rows[0][0].size
    rows.append([one if one.size == size else one.resize(size, Image.Resampling.LANCZOS) for one in real])
    return sheet.grid(rows, [*labels, "real, never seen"], case.prompts[:_SHOWN])


def _write(folder: Path, found: Evaluation, sheets: Mapping[str, Image.Image], config: EvaluateConfig) -> None:
    """Write pictures, figures and the page."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for one in found.alone:
            sheets[one.name].save(one.sheet)
    write_bytes(folder / "figures.json", (json.dumps(found.plain(), indent=1, ensure_ascii=False) + "\n").encode())
    write_bytes(found.report, report.page(found, sheets, config).encode())
