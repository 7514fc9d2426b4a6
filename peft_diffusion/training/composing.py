"""What weighs frozen adapters, as what a run trains: `ComposeTrainConfig` in, a small file that names the adapters out.

It has the base, pictures, captions, latents, loss, trainer and course of every training on pictures: see `run`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from .. import formats, methods
from ..bases import components, denoiser_of
from ..bases import family as families
from ..bases.pipelines import Pipeline
from ..core import site
from ..core.arena import Arena
from ..core.errors import UserError
from ..core.events import Observer
from ..core.files import at_home, refuse_overlaps
from ..core.learned_kinds import LEARNED_KINDS
from ..core.others import Other
from ..core.settings import pick, portable, to_json
from ..core.wording import shares
from ..formats import Plan
from ..formats.composition import CompositionSpec, Member, write
from .drawing import Drawing
from .events import Data
from .loop.trainer import PlainPasses, Trainer
from .machine.memory_plan import Load
from .machine.processes import Processes
from .record.facts import thumbnails
from .record.run_folder import RunFolder, check_run
from .results import RunResult
from .run import Facts, next_command
from .settings.composing import ComposeTrainConfig, ResolvedComposeConfig
from .settings.datasets import Dataset
from .settings.derive import Derivation
from .settings.pictures import TrainConfig
from .settings.resumption import WEIGHED
from .tasks.composing import ComposingTask
from .tasks.diffusion import DiffusionSettings
from .tasks.preparation import Prepared, apart_of, check_apart, items, prepare, reading_of
from .watch.previews import Previews

COMMAND = "compose train"
"""The command that makes such a run, as its record names it."""

_CAPTIONS = ("trigger", "caption_prefix", "caption_suffix")  # what of a training says how captions become prompts
_MEASURED = 8  # pictures of each folder that the loss is told of, at most


@dataclass(frozen=True, kw_only=True)
class ComposeResult(RunResult):
    """What a training of a composition gave.

    Attributes:
        config: The settings.
        composition: What the file says of itself.
        before: The loss on pictures of each adapter, on fixed noise, where all have equal parts that sum to 1.
        after: The same with what was learned.
        numbers: How many numbers were learned.
        apart: The adapters' names, each with how many of its pictures are kept apart.
    """

    config: ResolvedComposeConfig
    composition: CompositionSpec
    before: tuple[float, ...]
    after: tuple[float, ...]
    numbers: int
    apart: tuple[tuple[str, int], ...]

    def lines(self) -> tuple[str, ...]:
        """Tell the loss on the pictures of each adapter, what was made, and what to type next, in lines."""
        means = self.composition.training["mean_strengths"]
        told = zip(self.composition.adapters, self.before, self.after, means, strict=True)
        losses = [
            f"{one.file}: loss on its pictures {before:.4f} at equal parts, {after:.4f} now ({after / before - 1:+.1%});"
            f" mean strength {mean:.2f}"
            for one, before, after, mean in told
        ]
        wrote = (
            f"wrote {self.output} ({self.numbers:,} numbers, {self.seconds:.0f} s); settings, metrics and report.html are in"
            f" {self.run_dir}"
        )
        loss_apart = []
        if self.held_out_before is not None and self.held_out_after is not None:
            share = self.held_out_after / self.held_out_before - 1
            loss_apart = [
                f"pictures kept apart, {shares(self.apart)}: loss {self.held_out_before:.4f} before,"
                f" {self.held_out_after:.4f} now ({share:+.1%})"
            ]
        return (*losses, *loss_apart, wrote, f"next: {self.next_command}")


@dataclass(frozen=True)
class ComposeSource:
    """Adapters, a folder of pictures for each, and the pipeline that carries them: a `run.Source`.

    Attributes:
        asked: The settings as they were given.
        plans: What is known of the adapters' files, in order.
        pipe: A base that is loaded already, used in place of ``asked.base`` and left as it was; or None.
        drawing: Draws for trainings on pictures.
    """

    asked: ComposeTrainConfig
    plans: tuple[Plan, ...]
    pipe: Pipeline | None
    drawing: Drawing

    @classmethod
    def of(cls, config: ComposeTrainConfig, pipe: Pipeline | None, drawing: Drawing) -> Self:
        """Make one of settings, after looking at the adapters' files.

        Args:
            config: The settings.
            pipe: See above.
            drawing: See above.

        Returns:
            The source.

        Raises:
            UserError: A file is none of an adapter, one is given twice, or one has no pictures.
        """
        config.check()
        plans = tuple(formats.plan(path) for path in config.adapters)
        _refuse_twice(plans)
        return cls(config, plans, pipe, drawing)

    @property
    def others(self) -> Sequence[str]:
        """The adapters that are weighed."""
        return [str(one.path) for one in self.plans]

    @property
    def lent(self) -> Pipeline | None:
        """The pipeline of the caller."""
        return self.pipe

    @property
    def output(self) -> Path:
        """The file that is to be made."""
        return at_home(self.asked.target)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.asked.folder

    def check(self) -> None:
        """Nothing is left to be seen: `of` has looked."""

    def on(self, device: str) -> Self:
        """The same on another device."""
        return replace(self, asked=replace(self.asked, device=device))

    def processes(self, processes: Processes) -> Processes:
        """The only process. Raises UserError where there are several."""
        if processes.size > 1:
            raise UserError(f"{COMMAND} runs in one process; start it without the launcher")
        return processes

    def folder(self) -> RunFolder:
        """The run folder, after seeing that everything can be written."""
        folder = RunFolder(self.run_dir, COMMAND, "pictures, captions or adapters")
        written = [("--run-dir", self.run_dir), ("--output", self.output)]
        refuse_overlaps(written, [("an adapter", one.path) for one in self.plans])
        check_apart(_as_training(self.asked, self.plans), (("--output", self.output),))
        check_run(folder, self.output, resume=self.asked.resume, overwrite=self.asked.overwrite)
        return folder

    def open(self, folder: RunFolder, processes: Processes, tell: Observer) -> "ComposeMaterial":
        """Load the base, read the folders and encode the pictures."""
        training = _as_training(self.asked, self.plans)
        each = [one.path.stem for one in self.plans]
        prepared = prepare(training, self.pipe, tell, self.drawing, processes, folder, each)
        return ComposeMaterial(_resolved(self.asked, prepared), prepared, self.plans)


class ComposeMaterial:
    """A pipeline that carries adapters, and pictures for each; see `run.Material` for what each method is for."""

    data: Data = "pictures"

    def __init__(self, config: ResolvedComposeConfig, prepared: Prepared, plans: Sequence[Plan]) -> None:
        self.config = config
        self.prepared = prepared
        self.plans = plans
        self.base = prepared.pipe
        self.info = prepared.info
        self.names: tuple[str, ...] = ()  # what the adapters are called on the base

    def learner(self, folder: RunFolder, others: Sequence[Other], tell: Observer) -> "CompositionLearner":
        """What weighs the adapters that the base carries."""
        self.names = tuple(other.name for other in others)
        _freeze(self.base, self.plans, self.names)
        return CompositionLearner(self, others)

    @cached_property
    def task(self) -> ComposingTask:
        """What is learned, of folders that are drawn alike often."""
        prepared = self.prepared
        own = {"dropout": 0.0, "reading": reading_of(prepared.config), "processes": Processes(), "others": ()}
        settings = pick(DiffusionSettings, prepared.config, prepared, own)
        kept = prepared.of_run.kept
        counts = Counter(picture.dataset for picture in kept)
        repeats = [round(max(counts.values()) / counts[picture.dataset]) for picture in kept]
        train = replace(prepared.train, repeats=repeats if set(repeats) != {1} else ())
        return ComposingTask(
            self.base, self.names, self.config.kind, self.config.balance_weight, settings, train, prepared.held_out
        )

    @property
    def items(self) -> list[dict[str, str]]:
        """The pictures, each with the adapter that it is of."""
        told, pictures = self.plans, self.prepared.of_run.all
        return [
            item | {"adapter": told[picture.dataset].sha256}
            for item, picture in zip(items(pictures, ()), pictures, strict=True)
        ]

    @property
    def plugins(self) -> list[str]:
        """The modules of plug-ins of the adapters' methods, and of the family."""
        specs = [one.spec for one in self.plans if one.spec is not None]
        names = [str(told["method"]) for spec in specs for rows in spec.methods.values() for told in rows]
        found = [*(methods.find(name).plugin() for name in names), families.plugin_of(self.info.family)]
        return list(dict.fromkeys(module for module in found if module))

    def faster(self) -> AbstractContextManager[None]:
        """Nothing is fused: what is fused reads strengths that are not learned."""
        return nullcontext()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The VAE and text encoders off the device; afterwards the adapters have the strengths that they are carried at."""
        self.task.offload()
        try:
            yield
        finally:
            self.task.release()
            self.task.restore()

    def previews(self, trainer: Trainer, folder: RunFolder) -> Previews | None:
        """None are drawn."""
        return None

    def load(self, previews: Previews | None) -> Load:
        """What of the run takes memory."""
        config, parts = self.config, tuple(components(self.base).values())
        savings = ["--batch-size 1"] if config.batch_size > 1 else []
        return Load(
            parts=parts,
            loaded=(*parts, self.task.denoiser.vae),
            largest=self.task.largest,
            dropout=False,
            savings=[*savings, f"--resolution below {config.resolution}"],
        )

    def facts(self, folder: RunFolder, previews: Previews | None) -> Facts:
        """What the report tells of the run; writes the thumbnails that it shows."""
        config, pictures = self.config, self.prepared.of_run.all
        thumbnails(folder.thumbnails, pictures, self.prepared.config.background)
        plain = ComposeTrainConfig(
            config.adapters, data=config.data, kind=config.kind, base=config.base, output=config.output,
            run_dir=config.run_dir, device=config.device, precision=config.precision,
        )  # fmt: skip
        apart = len(self.prepared.of_run.apart)
        held_out = f"{apart} of them are kept apart to measure on, {shares(self.apart)}" if apart else ""
        return Facts(defaults=to_json(_resolved(plain, self.prepared)), held_out=held_out)

    @property
    def apart(self) -> tuple[tuple[str, int], ...]:
        """How many pictures of each adapter are kept apart."""
        return apart_of([one.path.stem for one in self.plans], self.prepared.of_run.apart)

    def next_command(self, strength: float | None) -> str:
        """What to type to draw with what was learned, which has no strength of its own.

        Adapters are found beside its file, and named where they are not.
        """
        config = self.config
        beside = config.output.absolute().parent
        named = [str(one.path) for one in self.plans if one.path.absolute().parent != beside]
        base = None if config.base == ComposeTrainConfig.base else config.base
        triggers = [one.triggers[0] for one in map(_member, self.plans) if one.triggers]
        flags = {"compose-file": str(config.output), "base": base}
        return next_command("generate", self.prepared.proposed(triggers), flags, self.plugins, named)

    @cached_property
    def before(self) -> tuple[float, ...]:
        """The loss on pictures of each adapter before anything is learned. Asked for first then."""
        return self._measured()

    def _measured(self) -> tuple[float, ...]:
        """The loss on some pictures of each folder, with what is learned so far."""
        task = self.task
        owners = [self.prepared.of_run.kept[entry.picture].dataset for entry in task.train.latents.entries]
        found = []
        for number in range(len(set(owners))):
            own = [entry for entry, owner in enumerate(owners) if owner == number]
            found.append(task.measured(own[:: -(-len(own) // _MEASURED)]))
        return tuple(found)

    def result(self, found: RunResult) -> ComposeResult:
        """What the run gave."""
        config, before, after = self.config, self.before, self._measured()
        training = portable(config) | self.task.summary() | {"loss_before": list(before), "loss": list(after)}
        if found.held_out_after is not None:
            training |= {"held_out_loss_before": found.held_out_before, "held_out_loss": found.held_out_after}
        members = tuple(_member(one) for one in self.plans)
        made = CompositionSpec(config.kind, members, self.task.blocks, asdict(self.info), training, found.output)
        numbers = sum(one.numel() for one in self.task.learned.parameters())
        return ComposeResult(
            **vars(found), config=config, composition=made, before=before, after=after, numbers=numbers, apart=self.apart
        )

    def training(self) -> dict[str, Any]:
        """The loss before anything is learned."""
        return {"loss_before": list(self.before)}


class CompositionLearner:
    """What weighs adapters: a `run.Learner`, which says what each method is for."""

    penalty = None
    at_strength = None
    begins_as_base = False

    def __init__(self, material: ComposeMaterial, others: Sequence[Other]) -> None:
        kind, self.learned = material.config.kind, material.task.learned
        self.task = material.task
        self.arena = Arena({kind: list(self.learned.parameters())})
        self.rates: Mapping[str, float] = {kind: material.config.lr}
        self.undecayed: frozenset[str] = frozenset()
        self.ends: Mapping[str, float] = {}
        self.files = {WEIGHED: [dict(other.told) for other in others]}

    def passes(self) -> PlainPasses:
        """Passes with nothing around them."""
        return PlainPasses()

    def described(self) -> str:
        """What is learned, of how many adapters and blocks."""
        adapters, blocks = self.learned.shape
        return f"{self.learned.kind} of {adapters} adapters in {blocks} blocks, {self.arena.count:,} numbers"

    def save(self, path: Path, result: ComposeResult, known: Mapping[str, Any]) -> None:
        """Write the file of the composition: what it says stands in the result."""
        write(path, replace(result.composition, path=path), self.learned)


def _resolved(config: ComposeTrainConfig, prepared: Prepared) -> ResolvedComposeConfig:
    """The settings with what was left out, as the kind, the base and the device have it."""
    found, of_pictures = Derivation(config), prepared.config
    found.put_precision(of_pictures.precision, prepared.pipe.device.type)
    found.fill({"resolution": of_pictures.resolution}, f"from base {prepared.info.name}")
    found.fill({"lr": config.rate, "balance": LEARNED_KINDS[config.kind].balance}, f"from kind {config.kind}")
    found.put_places(at_home(config.target), config.folder)
    return ResolvedComposeConfig(**found.values, asked=found.asked, derived=found.derived)


def _as_training(config: ComposeTrainConfig, plans: Sequence[Plan]) -> TrainConfig:
    """The settings of a training on the pictures, each folder with the captions of its adapter's training."""
    folders = []
    for folder, one in zip(config.data, plans, strict=True):
        told = {} if one.spec is None else one.spec.training
        own: dict[str, str] = {name: str(told[name]) for name in _CAPTIONS if told.get(name)}
        folders.append(Dataset(folder, **own))  # type: ignore[arg-type]
    shared: Mapping[str, Any] = {name: getattr(config, name) for name in (
        "base", "steps", "batch_size", "seed", "missing_captions", "resolution", "device", "precision", "held_out",
    )}  # fmt: skip
    return TrainConfig(
        dataset=tuple(folders), output=config.target, run_dir=config.folder, preview_steps=0, caption_dropout=0.0,
        **shared,
    )  # fmt: skip


def _refuse_twice(plans: Sequence[Plan]) -> None:
    """Raise UserError for an adapter that is given twice."""
    twice = next((one for one, count in Counter(plan.sha256 for plan in plans).items() if count > 1), None)
    if twice is not None:
        same = [str(one.path) for one in plans if one.sha256 == twice]
        raise UserError(f"{' and '.join(same)} are the same adapter; give each once")


def _freeze(pipe: Pipeline, plans: Sequence[Plan], names: Sequence[str]) -> None:
    """Build the adapters without gradients. Raises UserError for one that is not in the network that denoises."""
    for name, one in zip(names, plans, strict=True):
        if not site.adapters(denoiser_of(pipe).network, name):
            raise UserError(f"{one.path} changes nothing in the network that denoises, so there is nothing to weigh")
        for part in components(pipe).values():
            for adapter in site.adapters(part, name).values():
                adapter.requires_grad_(False).eval()


def _member(one: Plan) -> Member:
    triggers = one.spec.triggers if one.spec else ()
    return Member(one.path.name, one.sha256, one.path.stat().st_size, tuple(triggers))
