"""Pictures as what a run learns from: a style, or a subject."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ..bases import components, denoiser_of
from ..bases import family as families
from ..bases.asked import PREDICTIONS
from ..bases.pipelines import Pipeline
from ..core.errors import UserError
from ..core.events import Event, Observer, Warned, untold
from ..core.others import Other
from ..core.settings import flag, pick, to_json
from ..data.borders import Colour, paper
from ..data.buckets import place
from ..data.captions import tag_frequency
from ..data.images import open_picture
from ..fast.unet import fused
from .adapter_learner import AdapterLearner, check_asked
from .attachment import NAME, selected_components, triggers, with_words
from .drawing import Drawing
from .events import Data, LookGains, PreviewsChosen
from .loop.trainer import Trainer
from .machine.memory_plan import Load
from .machine.processes import Processes
from .machine.sharding import sharing
from .record.facts import thumbnails
from .record.run_folder import RunFolder, check_writable
from .results import FoundRates, RunResult, TrainResult
from .run import Facts, at_strength, next_command
from .settings.derive import resolve
from .settings.others.reading import with_datasets
from .settings.pictures import ResolvedConfig, TrainConfig, block_rates, output_path, run_path
from .settings.placements import Placement, blocks, plugins_of
from .tasks.datasets import parts_of
from .tasks.diffusion import DiffusionSettings, DiffusionTask
from .tasks.keeping import kept
from .tasks.preparation import Prepared, check_apart, check_places, items, prepare, reading_of
from .watch.previews import Previews

_LOOKED_AT = 12  # pictures of which the border is measured, at most


@dataclass(frozen=True)
class PictureSource:
    """Folders of pictures, and the pipeline that is to learn from them: a `run.RatedSource`.

    Attributes:
        asked: The settings as they were given.
        pipe: A base that is loaded already, used in place of ``asked.base`` and left as it was; or None.
        drawing: Draws previews and pictures of the class.
        absent: What of a dataset file of another program has no counterpart.
    """

    asked: TrainConfig
    pipe: Pipeline | None
    drawing: Drawing
    absent: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig, pipe: Pipeline | None, drawing: Drawing) -> Self:
        """Make one of settings, after reading a dataset file of another program that they name.

        Args:
            config: The settings.
            pipe: See above.
            drawing: See above.

        Returns:
            The source.

        Raises:
            UserError: The file cannot be read.
        """
        config, absent = with_datasets(config)
        return cls(config, pipe, drawing, absent)

    @property
    def others(self) -> Sequence[str]:
        """The adapters that the new one is trained beside."""
        return self.asked.beside

    @property
    def lent(self) -> Pipeline | None:
        """The pipeline of the caller."""
        return self.pipe

    @property
    def output(self) -> Path:
        """The adapter file that is to be made."""
        return output_path(self.asked)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return run_path(self.asked)

    def check(self) -> None:
        """See that there are such methods, targets and an optimizer."""
        check_asked(self.asked, self.folder)

    def on(self, device: str) -> Self:
        """The same on another device."""
        return replace(self, asked=replace(self.asked, device=device))

    def processes(self, processes: Processes) -> Processes:
        """The processes as the settings have them: sharing the base or not."""
        return sharing(processes, self.asked, self.pipe)

    def folder(self) -> RunFolder:
        """The run folder, after seeing that everything can be written."""
        return check_places(self.asked)

    def search_folder(self) -> RunFolder:
        """Where a search for learning rates writes."""
        folder = RunFolder(run_path(self.asked))
        check_apart(self.asked)
        check_writable(folder.path)
        return folder

    def open(self, folder: RunFolder, processes: Processes, tell: Observer) -> "PictureMaterial":
        """Load the base, read the folders and encode the pictures."""
        if self.absent:
            tell(Warned("of the dataset file, these have no counterpart here:", self.absent))
        prepared = prepare(self.asked, self.pipe, tell, self.drawing, processes, folder)
        return PictureMaterial(prepared, self.drawing, processes, tell)

    def remark(self, found: FoundRates) -> Event | None:
        """A style is judged by its look, which the loss does not tell."""
        return LookGains() if self.asked.preset == "style" and found.factor < 1 else None


class PictureMaterial:
    """A loaded pipeline, and encoded pictures; `adapter_learner.AdapterMaterial` says what each method is for."""

    data: Data = "pictures"

    def __init__(self, prepared: Prepared, drawing: Drawing, processes: Processes, tell: Observer) -> None:
        self.prepared = prepared
        self.tell = tell
        self.drawing = drawing
        self.processes = processes
        self.beside: Sequence[Other] = ()
        self.base = prepared.pipe
        self.info = prepared.info
        self.config = prepared.config
        self.seed = self.config.seed
        self.parts = selected_components(self.base, self.config.components)
        self.blocks = with_words(self.base, blocks(self.config))

    def learner(self, folder: RunFolder, others: Sequence[Other], tell: Observer) -> AdapterLearner:
        """A fresh adapter."""
        return AdapterLearner(self, folder, others, tell)

    @property
    def plugins(self) -> list[str]:
        """The modules of plug-ins of methods and of the family."""
        return plugins_of(self.config, self.info.family)

    def rate(self, component: str) -> float:
        """The learning rate of a component."""
        found: float = getattr(self.config, families.rate_setting(component))
        return found

    def block_rates(self) -> dict[str, float]:
        """The learning rates of blocks of the network."""
        return block_rates(self.config.block_lr)

    def until(self, component: str) -> float:
        """The share of the run in which a component learns."""
        of_text = families.role_of(component) == "text encoder"
        return self.config.text_encoder_until if of_text else 1.0

    def rate_flags(self) -> dict[str, str]:
        """The flag that sets the learning rate of each component."""
        settings = {} if self.config.block else {name: families.rate_setting(name) for name in self.parts}
        return {name: flag(setting) for name, setting in settings.items()}

    @cached_property
    def task(self) -> DiffusionTask:
        """What is learned."""
        return diffusion_task(self.prepared, self.blocks, self.processes, self.tell, self.beside)

    @property
    def items(self) -> list[dict[str, str]]:
        """The pictures, and those of the class."""
        return items(self.prepared.of_run.all, self.prepared.of_run.of_class)

    def faster(self) -> AbstractContextManager[None]:
        """The UNet fused, on CUDA, where steps may be recorded."""
        if not self.config.cuda_graph or self.processes.shares_base:
            return nullcontext()
        return fused(denoiser_of(self.base).network)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The VAE and idle text encoders off the device, after a test of what the base predicts."""
        self.task.offload()
        try:
            self._test_prediction()
            yield
        finally:
            self.task.restore()

    def _test_prediction(self) -> None:
        """Warn of a base that answers as one would that predicts something else than it says."""
        found = self.task.fitting_prediction()
        if found is not None and found != self.info.prediction_type:
            asked = next(name for name, said in PREDICTIONS.items() if said == found)
            self.tell(
                Warned(
                    f"the base says that it predicts {self.info.prediction_type}, and answers to noisy pictures as one that"
                    f" predicts {found}; stop, and give --prediction {asked}, or nothing will be learned"
                )
            )

    def previews(self, trainer: Trainer, folder: RunFolder) -> Previews | None:
        """What draws previews; None where none are drawn."""
        prepared, config = self.prepared, self.config
        if not config.preview_steps:
            return None
        if not prepared.asked:
            shown = [one.prompt for one in prepared.prompts[: -len(prepared.others) or None]]
            self.tell(PreviewsChosen(tuple(shown), tuple(prepared.others)))
        return Previews(
            folder.previews,
            self.task,
            prepared.prompts,
            self.drawing,
            trainer.final_weights,
            trainer.tell,
            steps=config.preview_steps,
            every=config.preview_every,
            size=config.resolution // prepared.info.step * prepared.info.step,
            paper=self._paper() if config.preset == "style" and self.processes.leads else None,
        )

    def _paper(self) -> Colour | None:
        """The colour that the borders of the pictures have in common, as they are trained on; of some of them."""
        config, pictures = self.config, self.prepared.of_run.all
        some = pictures[:: -(-len(pictures) // _LOOKED_AT)]
        arranged = parts_of(config, config.resolution).arrange(some, self.info.step, learned=False)
        opened = (open_picture(one.path, config.background, digest=one.digest) for one in arranged.pictures)
        return paper(place(image, fit, False) for image, fit in zip(opened, arranged.fits, strict=True))

    def load(self, previews: Previews | None) -> Load:
        """What of the run takes memory."""
        config = self.config
        savings = ["--batch-size 1 with --accumulation"] if config.batch_size > 1 else []
        savings += [] if config.quantize == "nf4" else ["--quantize nf4"]
        parts = tuple(components(self.base).values())
        return Load(
            parts=parts,
            loaded=(*parts, self.task.denoiser.vae),
            largest=self.task.largest,
            dropout=self.task.settings.dropout > 0,
            savings=[*savings, f"--resolution below {config.resolution}"],
            drawing=previews.peak if previews else None,
        )

    def facts(self, folder: RunFolder, previews: Previews | None) -> Facts:
        """What the report tells of the run; writes the thumbnails that it shows."""
        prepared = self.prepared
        thumbnails(folder.thumbnails, prepared.of_run.all, self.config.background)
        apart = len(prepared.of_run.apart)
        return Facts(
            defaults=to_json(self._defaults()) | {"method": TrainConfig.method},
            held_out=f"{apart} of them are kept apart to measure on" if apart else "",
            prompts=previews.prompts if previews else [],
        )

    def _defaults(self) -> ResolvedConfig:
        config = self.config
        plain = TrainConfig(
            folder=config.folder, dataset=config.dataset, preset=config.preset, method=config.method,
            output=config.output, run_dir=config.run_dir, device=config.device, precision=config.precision,
        )  # fmt: skip
        return resolve(plain, self.info, len(self.prepared.of_run.all), self.task.device.type)

    def next_command(self, strength: float | None) -> str:
        """What to type to draw with what was learned, at a strength that is suggested."""
        config = self.config
        base = None if config.base == TrainConfig.base else config.base
        flags = {"adapter": at_strength(config.output, strength), "base": base, "quantize": config.quantize}
        return next_command("generate", self.prepared.proposed([config.trigger]), flags, self.plugins)

    def result(self, found: RunResult) -> TrainResult:
        """What the run gave."""
        return TrainResult(**vars(found), config=self.config, images=len(self.prepared.of_run.kept))

    def training(self) -> dict[str, Any]:
        """Entries of the adapter file's training summary."""
        own = self.prepared.of_run
        return {
            "class_pictures": len(own.of_class),
            "images": len(own.kept),
            "tag_frequency": tag_frequency(one.caption for one in own.kept),
        }

    def triggers(self) -> list[str]:
        """The words of the trigger, and those that were taught."""
        return triggers(self.config.trigger, self.blocks)


def diffusion_task(
    prepared: Prepared,
    blocks: Sequence[Placement],
    processes: Processes,
    tell: Observer = untold,
    others: Sequence[Other] = (),
) -> DiffusionTask:
    """Make what is learned from prepared pictures.

    Args:
        prepared: The base and the encoded pictures.
        blocks: Which methods the adapter has that its pipeline carries.
        processes: Those that train together.
        tell: Is told how far the captions are encoded.
        others: The adapters that its pipeline carries too.

    Returns:
        The task.

    Raises:
        UserError: The others shall be kept, and nothing tells which prompts call them.
    """
    reading = reading_of(prepared.config)
    dropout = max(block.method.dropped() for block in blocks)
    own = {"dropout": dropout, "processes": processes, "reading": reading, "others": tuple(one.name for one in others)}
    settings, prior = pick(DiffusionSettings, prepared.config, prepared, own), prepared.prior
    if prepared.config.beside_keep:
        triggers = [other.trigger for other in others]
        prior = kept(prepared.train, prepared.rules, triggers, prepared.config.beside_prompt)
        settings = replace(settings, prior_weight=prepared.config.beside_keep, prior_target="base")
    return DiffusionTask(prepared.pipe, NAME, settings, prepared.train, prepared.held_out, prior, tell)


def searched(config: TrainConfig) -> TrainConfig:
    """Change settings for a search of learning rates.

    Args:
        config: The settings.

    Returns:
        The same without previews.

    Raises:
        UserError: The base is to be sharded.
    """
    if config.shard_base:
        raise UserError("--find-lr runs in one process, which cannot shard a base; leave --shard-base away")
    every = TrainConfig.preview_every
    return replace(config, preview_steps=0, preview_prompts=(), preview_prompts_file=None, preview_every=every)
