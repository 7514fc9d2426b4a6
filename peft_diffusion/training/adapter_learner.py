"""An adapter as what a run trains: attached to the components of a base, and written as an adapter file."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from .. import formats
from ..bases.words import teach
from ..core import plugins, site, targets
from ..core.adapter import parts_of
from ..core.arena import Arena
from ..core.errors import UnknownMethodError, UserError
from ..core.events import Noted, Observer, Warned
from ..core.others import Other
from ..core.settings import portable
from ..fast.low_rank import Working
from ..formats.file import DTYPES, check
from ..formats.layout import DEFAULT
from .attachment import NAME, at_strength, attach, described, spec_of, trained
from .beginning import begin_from
from .loop.optimizers import check_optimizer
from .loop.overlap import Overlap
from .record.run_folder import RunFolder
from .results import RunResult
from .run import RatedMaterial, Result
from .settings.export import layout_of_step
from .settings.placements import Placement, check_methods, targets_of
from .settings.resumption import BESIDE, FILES, INIT
from .settings.shared import AdapterSettings, AskedAdapter


class AdapterMaterial(RatedMaterial[Result], Protocol[Result]):
    """A base and data that an adapter is trained on.

    Attributes:
        beside: The adapters that the base carries meanwhile. Set before `task` is asked for.
    """

    beside: Sequence[Other]

    @property
    def config(self) -> AdapterSettings:
        """The settings. Asked for once the adapter is attached and its words are taught."""
        ...

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The components that are trained, by name."""
        ...

    @property
    def blocks(self) -> Sequence[Placement]:
        """Which method is trained at which sites."""
        ...

    @property
    def seed(self) -> int:
        """What all chance of the run comes from."""
        ...

    def rate(self, component: str) -> float:
        """Choose the learning rate of a component.

        Args:
            component: Its name.

        Returns:
            The rate.
        """
        ...

    def block_rates(self) -> Mapping[str, float]:
        """Choose the learning rates of blocks of the network.

        Returns:
            By the name of the block, those that have one of their own.
        """
        ...

    def until(self, component: str) -> float:
        """Tell for how long a component learns.

        Args:
            component: Its name.

        Returns:
            The share of the run, above 0; 1 for all of it.
        """
        ...

    def triggers(self) -> Sequence[str]:
        """List the words that call what was learned.

        Returns:
            The words.
        """
        ...


class AdapterLearner:
    """A fresh adapter on the components of a base: a `run.Learner`, which says what each method is for.

    Args:
        material: What it is trained on.
        folder: The run folder, which says how a run that goes on began.
        others: The adapters that it is trained beside.
        tell: Is told how it begins, and what its penalty leaves out.

    Raises:
        UserError: A target matches nothing, the file that it begins from does not fit, or its own file cannot say it.
    """

    def __init__(self, material: AdapterMaterial[Any], folder: RunFolder, others: Sequence[Other], tell: Observer) -> None:
        self.material = material
        # What the adapter depends on beside settings and data.
        self.files: dict[str, Any] = {BESIDE: [dict(other.told) for other in others]} if others else {}
        attached = attach(material.parts, material.blocks, material.seed, material.rate, material.block_rates())
        teach(material.base)  # before texts become tokens
        self._begin(folder, tell)
        config = material.config
        if config.save_as != DEFAULT:  # which can say everything
            spec = formats.Spec(base=asdict(material.info))
            check(config.output, material.parts, NAME, spec, layout=config.save_as)
        self.arena = Arena(attached.groups)
        self.rates, self.undecayed = attached.rates, attached.undecayed
        shares = {group: material.until(owner) for group, owner in attached.owners.items()}
        self.ends = {group: share for group, share in shares.items() if share < 1}
        material.beside = tuple(others)
        self.penalty = self._overlap(config.orthogonal, others, tell)
        if others and self.arena.flat.is_cuda:
            tell(Noted("layers that others change too are computed one adapter after the other, not in one fused product"))

    def _begin(self, folder: RunFolder, tell: Observer) -> None:
        """Let the adapter begin as that of a file, where one is named; a run that goes on has begun already."""
        material = self.material
        path, before = material.config.init_from, folder.newest() if material.config.resume else None
        if before is not None:
            begun = before.origin.config.get(FILES, {}).get(INIT)
        else:
            begun = None if path is None else begin_from(path, material.base, material.parts, tell)
        self.files |= {} if begun is None else {INIT: begun}

    def _overlap(self, weight: float, others: Sequence[Other], tell: Observer) -> Callable[[], Tensor] | None:
        """The penalty on reading what others read; None where there is none. Raises UserError where none can be."""
        if not weight:
            return None
        overlap = Overlap(self.material.parts, NAME, [other.name for other in others])
        if overlap.left_out:
            told = f"{overlap.left_out} layers that others change too, as they are no pairs of low rank there"
            tell(Warned(f"--orthogonal compares {overlap.layers} layers, and not {told}"))
        return lambda: weight * overlap()

    def passes(self) -> Working:
        """Passes with packed pairs of low rank."""
        return Working(self.arena.flat, self.arena.grad)

    def described(self) -> str:
        """Methods, layers and parameters."""
        return described(self.material.parts, self.material.blocks, self.arena.count)

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """The adapter at a strength."""
        return at_strength(self.material.parts.values(), NAME, strength)

    @property
    def begins_as_base(self) -> bool:
        """Whether it was nothing before the first step: neither a file's adapter nor a soft prompt, whose words are read."""
        adapters = (one for part in self.material.parts.values() for one in site.adapters(part, NAME).values())
        return INIT not in self.files and not any(part.precedes for adapter in adapters for part in parts_of(adapter))

    def save(self, path: Path, result: RunResult, known: Mapping[str, Any]) -> None:
        """Write an adapter file: the run's own, or one of the way."""
        config = self.material.config
        layout = config.save_as if path == config.output else layout_of_step(config.output, config.save_as)
        spec = self._spec(path, result, known)
        formats.save(path, self.material.parts, NAME, spec, layout=layout, dtype=DTYPES[config.save_dtype])

    def _spec(self, path: Path, result: RunResult, known: Mapping[str, Any]) -> formats.Spec:
        material = self.material
        training = {
            **known,
            **trained(result.steps, result.seconds, result.held_out_before, result.held_out_after),
            **(result.outcome.training() if result.outcome else {}),
        }
        about = portable(material.config) | training
        return spec_of(material.parts, material.blocks, asdict(material.info), material.triggers(), about, path.stem)


def check_asked(asked: AskedAdapter, folder: Callable[[], RunFolder]) -> None:
    """Check the methods that a run asks for, their targets and the optimizer: all that needs neither base nor data.

    Args:
        asked: The settings as they were given.
        folder: Gives the run folder.

    Raises:
        UserError: As `check_methods`, `targets.check` and `check_optimizer` do; where the run that shall go on was trained
            with a plug-in that was not loaded, the error names it.
    """
    try:
        check_methods(asked)
        for target in targets_of(asked):
            targets.check(target)
        check_optimizer(asked.optimizer)
    except UnknownMethodError as error:
        there = folder() if asked.resume else None
        missing = [module for module in there.plugins if module not in plugins.loaded()] if there else []
        if there is None or not missing:
            raise
        flags = " ".join(f"--plugin {module}" for module in missing)
        raise UserError(
            f"method {error.name!r} is not known; the run in {there.path} was trained with {flags}: give that too"
        ) from None
