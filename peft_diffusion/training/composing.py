"""The course of a training that weighs frozen adapters: `ComposeTrainConfig` in, a small file that names them out.

It has the base, pictures, captions, latents, loss and trainer of every training on pictures. It is over in about a minute,
so it keeps no run folder and no checkpoints.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .. import formats
from ..bases import components, denoiser_of
from ..bases.base import Base, frozen
from ..bases.pipelines import Pipeline
from ..core import site
from ..core.arena import Arena
from ..core.errors import Interrupted, UserError
from ..core.events import Ended, Observer, Stop, observed, stop_on_signal
from ..core.files import at_home, claimed, refuse_overlaps
from ..core.settings import pick, portable
from ..formats import Plan
from ..formats.composition import CompositionSpec, Member, write
from .drawing import Drawing
from .events import HeldOut, Saved
from .loop.trainer import Trainer, TrainerSettings
from .machine.processes import Processes
from .run import base_kept
from .settings.composing import ComposeTrainConfig
from .settings.datasets import Dataset
from .settings.pictures import TrainConfig
from .tasks.composing import ComposingTask
from .tasks.diffusion import DiffusionSettings
from .tasks.preparation import Prepared, prepare, reading_of

_CAPTIONS = ("trigger", "caption_prefix", "caption_suffix")  # what of a training says how captions become prompts
_MEASURED = 8  # pictures of each folder that the loss is told of, at most


class Carry(Protocol):
    """Puts adapters of files on a base and takes them off again; `generation.while_training.carried` does."""

    def __call__(self, base: Base, files: Sequence[Path], tell: Observer) -> AbstractContextManager[tuple[str, ...]]:
        """Attach adapters at strength 1 for as long as the context is open.

        Args:
            base: A pipeline.
            files: Adapter files.
            tell: Is told what should be known of them.

        Returns:
            The context, which gives the name of each.
        """
        ...


@dataclass(frozen=True)
class ComposeResult:
    """What a training of a composition gave.

    Attributes:
        output: The file.
        composition: What it says of itself.
        before: The loss on pictures of each adapter, on fixed noise, where all have equal parts that sum to 1.
        after: The same with what was learned.
        numbers: How many numbers were learned.
        seconds: Seconds taken.
    """

    output: Path
    composition: CompositionSpec
    before: tuple[float, ...]
    after: tuple[float, ...]
    numbers: int
    seconds: float

    def lines(self) -> tuple[str, ...]:
        """Tell the loss on the pictures of each adapter, what was made, and what to type next, in lines."""
        means = self.composition.training["mean_strengths"]
        told = zip(self.composition.adapters, self.before, self.after, means, strict=True)
        losses = [
            f"{one.file}: loss on its pictures {before:.4f} at equal parts, {after:.4f} now ({after / before - 1:+.1%});"
            f" mean strength {mean:.2f}"
            for one, before, after, mean in told
        ]
        wrote = f"wrote {self.output} ({self.numbers:,} numbers, {self.seconds:.0f} s)"
        prompt = ", ".join(one.triggers[0] for one in self.composition.adapters if one.triggers) or "a picture"
        return (*losses, wrote, f'next: peft-diffusion generate "{prompt}" --compose-file {self.output}')


def compose(
    config: ComposeTrainConfig,
    carry: Carry,
    drawing: Drawing,
    pipe: Pipeline | None = None,
    observers: Sequence[Observer] = (),
    stop: Stop | None = None,
) -> ComposeResult:
    """Learn how to weigh frozen adapters, and write that as a file that names them.

    Args:
        config: The settings.
        carry: Puts the adapters on the base.
        drawing: Draws for trainings on pictures.
        pipe: A base that is loaded already, used in place of ``config.base`` and left as it was.
        observers: Are told what happens.
        stop: Where it is set, the training ends after the present step, and nothing is written. Without one, SIGINT,
            SIGTERM and SIGHUP do the same, where this is the main thread.

    Returns:
        What it gave.

    Raises:
        UserError: For what the user can mend.
        Interrupted: It was stopped. It is a KeyboardInterrupt.
    """
    began, output = time.monotonic(), at_home(config.target)
    with observed(observers) as tell, frozen(pipe):
        config.check()
        plans = [formats.plan(path) for path in config.adapters]
        _refuse_twice(plans)
        refuse_overlaps([("--output", output)], [("an adapter", one.path) for one in plans])
        with claimed(output, f"another run makes {output} now; wait for it, or choose another --output"):
            prepared = prepare(_as_training(config, plans), pipe, _without_held_out(tell), drawing)
            with (
                carry(prepared.pipe, [one.path for one in plans], tell) as names,
                base_kept(prepared.pipe, prepared.info.fingerprint, tell),
                nullcontext(stop) if stop is not None else stop_on_signal(tell) as wish,
            ):
                result = _learn(config, prepared, plans, names, tell, wish, began)
        tell(Saved("adapter", config.steps, result.output))
        tell(Ended("finished", result))
    return result


def _learn(
    config: ComposeTrainConfig,
    prepared: Prepared,
    plans: Sequence[Plan],
    names: Sequence[str],
    tell: Observer,
    stop: Stop,
    began: float,
) -> ComposeResult:
    _freeze(prepared.pipe, plans, names)
    task = _task(config, prepared, names)
    with _at_work(task):
        arena = Arena({config.kind: list(task.learned.parameters())})
        settings = TrainerSettings(
            steps=config.steps,
            rates={config.kind: config.rate},
            scheduler="cosine",
            weight_decay=0.0,
            log_every=config.log_every,
            save_every=config.steps,
            cuda_graph=False,  # recording takes about as long as these few steps
        )
        before = _measured(task, prepared)
        if not Trainer(task, arena, settings, [tell]).run(stop=stop):
            raise Interrupted("stopped before the last step; nothing was written")
        after = _measured(task, prepared)
    training = portable(config) | task.summary() | {"loss_before": list(before), "loss": list(after)}
    members = tuple(_member(one) for one in plans)
    made = CompositionSpec(config.kind, members, task.blocks, asdict(prepared.info), training, at_home(config.target))
    write(made.path, made, task.learned)
    return ComposeResult(made.path, made, before, after, arena.count, time.monotonic() - began)


def _as_training(config: ComposeTrainConfig, plans: Sequence[Plan]) -> TrainConfig:
    """The settings of a training on the pictures, each folder with the captions of its adapter's training."""
    folders = []
    for folder, one in zip(config.data, plans, strict=True):
        told = {} if one.spec is None else one.spec.training
        own: dict[str, str] = {name: str(told[name]) for name in _CAPTIONS if told.get(name)}
        folders.append(Dataset(folder, **own))  # type: ignore[arg-type]
    shared: Mapping[str, Any] = {name: getattr(config, name) for name in (
        "base", "steps", "batch_size", "seed", "missing_captions", "resolution", "device", "precision",
    )}  # fmt: skip
    return TrainConfig(
        dataset=tuple(folders), output=config.target, preview_steps=0, held_out=0.0, caption_dropout=0.0, **shared
    )


def _without_held_out(tell: Observer) -> Observer:
    """The same observer, which is not told that nothing is kept apart: there is no setting for it."""
    return lambda event: None if isinstance(event, HeldOut) else tell(event)


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


def _task(config: ComposeTrainConfig, prepared: Prepared, names: Sequence[str]) -> ComposingTask:
    """What is learned, of folders that are drawn alike often."""
    own = {"dropout": 0.0, "reading": reading_of(prepared.config), "processes": Processes(), "others": ()}
    settings = pick(DiffusionSettings, prepared.config, prepared, own)
    kept = prepared.of_run.kept
    counts = Counter(picture.dataset for picture in kept)
    repeats = [round(max(counts.values()) / counts[picture.dataset]) for picture in kept]
    train = replace(prepared.train, repeats=repeats if set(repeats) != {1} else ())
    return ComposingTask(prepared.pipe, names, config.kind, config.balance_weight, settings, train)


@contextmanager
def _at_work(task: ComposingTask) -> Iterator[None]:
    """The VAE and text encoders off the device; afterwards the adapters have the strengths that they are carried at."""
    task.offload()
    try:
        yield
    finally:
        task.release()
        task.restore()


def _measured(task: ComposingTask, prepared: Prepared) -> tuple[float, ...]:
    """The loss on some pictures of each folder."""
    owners = [prepared.of_run.kept[entry.picture].dataset for entry in task.train.latents.entries]
    found = []
    for number in range(len(set(owners))):
        own = [entry for entry, owner in enumerate(owners) if owner == number]
        found.append(task.measured(own[:: -(-len(own) // _MEASURED)]))
    return tuple(found)


def _member(one: Plan) -> Member:
    triggers = one.spec.triggers if one.spec else ()
    return Member(one.path.name, one.sha256, one.path.stat().st_size, tuple(triggers))
