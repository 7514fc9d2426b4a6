"""What happens in a training, as data. Imports no torch.

The order of a run: `BaseLoaded`, `DataRead` and what else is found, `Fingerprinted`, `Prepared`, what memory it takes,
`Started`, then `Step`, `Losses`, `Measured`, `Preview` and `Saved` over and over, `Trained`, `StrengthSuggested`, `Saved`
with the adapter file, and `Ended`, which comes last however it ends. This and `Progress`, `Noted`, `Warned` and
`ObserverFailed` are in `core.events`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..core.events import Event, Warned
from ..core.shortening import shortened
from ..core.wording import number_of, shares
from .need import Need, mib
from .results import FoundRates, Suggestion, Trial

if TYPE_CHECKING:
    from PIL import Image

Data: TypeAlias = Literal["pictures", "text"]
"""What is learned from."""
IMPATIENT = Warned("--patience ends nothing where nothing is kept apart to measure on; --held-out 0.1 keeps a tenth")
"""Nothing can be told of a run that asks for patience."""
COLD = Warned("--warmup is as long as the run, so the learning rate does not come to what was asked for; lower it")
"""Nothing can be told of a run that ends in its warm-up."""
_SHOWN = 3  # prompts
_PROMPT = 400  # characters of a prompt


@dataclass(frozen=True)
class BaseSharded(Event):
    """The base was sharded over several processes.

    Attributes:
        components: The components that were.
        processes: How many processes there are.
        own: Bytes of them that each process holds.
        whole: Bytes of them in all.
        on_cuda: Whether that keeps steps from being recorded as CUDA graphs.
    """

    components: tuple[str, ...]
    processes: int
    own: int
    whole: int
    on_cuda: bool

    def lines(self) -> tuple[str, ...]:
        """Tell who holds how much."""
        told = f"{', '.join(self.components)} sharded over {self.processes} processes: each holds {mib(self.own)}"
        eager = "; steps run one operation after the other, as no CUDA graph holds weights that come and go"
        return (f"{told} of {mib(self.whole)}{eager if self.on_cuda else ''}",)


@dataclass(frozen=True)
class BaseLoaded(Event):
    """A pipeline was loaded.

    Attributes:
        name: What the base is called.
        family: The row of `bases.family` that it is of.
        prediction_type: What its network predicts.
        resolution: Pixels a side of the pictures that it was trained on.
        quantize: How its linear layers are held; None for whole ones.
    """

    name: str
    family: str
    prediction_type: str
    resolution: int
    quantize: str | None = None

    def lines(self) -> tuple[str, ...]:
        """Tell what it is."""
        held = f", linear layers in {self.quantize}" if self.quantize else ""
        return (f"base {self.name}: {self.family}, {self.prediction_type}, {self.resolution} pixels{held}",)


@dataclass(frozen=True)
class LanguageModelLoaded(Event):
    """A language model was loaded; ``vocabulary`` and ``context`` are in tokens."""

    name: str
    architecture: str
    vocabulary: int
    context: int

    def lines(self) -> tuple[str, ...]:
        """Tell what it is."""
        return (f"base {self.name}: {self.architecture}, {self.vocabulary:,} tokens, context {self.context}",)


@dataclass(frozen=True)
class DataRead(Event):
    """Pictures or text were read.

    Attributes:
        data: What was read.
        description: What there is and what is wrong with it, in lines.
        problems: What is wrong, each by itself.
        of_class: Whether these are pictures of the class that a subject belongs to.
    """

    data: Data
    description: tuple[str, ...]
    problems: tuple[str, ...] = ()
    of_class: bool = False

    def lines(self) -> tuple[str, ...]:
        """Tell the description."""
        return tuple(f"class: {line}" if self.of_class else line for line in self.description)


@dataclass(frozen=True)
class Arranged(Event):
    """Pictures were put into buckets of one size each; ``description`` has a line for each, and for unusual subfolders.

    ``of_class`` says that they are pictures of the class that a subject belongs to.
    """

    description: tuple[str, ...]
    of_class: bool = False

    def lines(self) -> tuple[str, ...]:
        """Tell the description."""
        return tuple(f"  class: {line}" if self.of_class else f"  {line}" for line in self.description)


@dataclass(frozen=True)
class HeldOut(Event):
    """It was decided how many pictures are kept apart to measure on.

    Attributes:
        count: How many.
        of: How many there are.
        wanted: Whether some should have been.
        least: How many pictures it takes for some to be kept apart unless it is said; 0 where it was said.
        of_each: How many of each data set, with its name, where a share of each is kept apart.
    """

    count: int
    of: int
    wanted: bool
    least: int
    of_each: tuple[tuple[str, int], ...] = ()

    def lines(self) -> tuple[str, ...]:
        """Tell how many, or why none."""
        if self.count:
            hint = " (--held-out 0 trains on all)" if self.least else ""  # nobody asked for it
            whose = f", {shares(self.of_each)}" if self.of_each else ""
            return (f"{number_of(self.count, 'picture')} kept apart{whose}: the loss there shows when to stop{hint}",)
        told = "no pictures are kept apart to measure on"
        if self.of == 1 or self.wanted:  # no share is any
            return (f"{told}: {'there is' if self.of == 1 else 'each data set has'} but one picture",)
        few = f"fewer than {self.least} pictures; " if self.of < self.least else ""
        return (f"{told} ({few}--held-out 0.1 keeps a tenth, at least one)",)


@dataclass(frozen=True)
class PromptsMade(Event):
    """Captions became prompts, with the trigger."""

    prompts: tuple[str, ...]

    def lines(self) -> tuple[str, ...]:
        """Tell the first ones that differ, and how many have no words."""
        shown = [shortened(prompt, _PROMPT) for prompt in dict.fromkeys(self.prompts) if prompt][:_SHOWN]
        lines = [f"prompts of {number_of(len(self.prompts), 'picture')}, the first:"] if shown else []
        lines += [f"  {prompt}" for prompt in shown]
        empty = self.prompts.count("")
        if empty:
            why = 'no word will call what is learned there; write captions, or add --trigger "WORDS"'
            lines.append(f"{empty} of {len(self.prompts)} prompts are empty: {why}")
        return tuple(lines)


@dataclass(frozen=True)
class PreviewsChosen(Event):
    """It was chosen what previews show.

    Attributes:
        shown: Captions of pictures.
        others: Prompts of what no picture shows.
    """

    shown: tuple[str, ...]
    others: tuple[str, ...]

    def lines(self) -> tuple[str, ...]:
        """Tell which of them are not among the pictures, and what that tells."""
        if not self.others:
            return ()
        told = "; ".join(shortened(prompt, _PROMPT) for prompt in self.others)
        return (f"previews of what no picture shows, which tell what was learned from what is copied: {told}",)


@dataclass(frozen=True)
class ClassNotKept(Event):
    """A subject is learned without pictures of its class."""

    def lines(self) -> tuple[str, ...]:
        """Tell what to do."""
        return ('the class is not kept: say what the subject is one of, as in --class-prompt "a portrait of a woman"',)


@dataclass(frozen=True)
class ClassPictures(Event):
    """So many pictures of the class, drawn by the base, are kept in a folder."""

    count: int
    folder: Path

    def lines(self) -> tuple[str, ...]:
        """Tell how many, and where."""
        return (f"kept {number_of(self.count, 'picture')} of the class, drawn by the base, in {self.folder}",)


@dataclass(frozen=True)
class LatentsCached(Event):
    """A cache folder was used.

    Attributes:
        folder: Where it is.
        reused: Latents that were there.
        computed: Latents that were not.
        strange: Latents that it held before, none of which was of use.
    """

    folder: Path
    reused: int
    computed: int
    strange: int

    def lines(self) -> tuple[str, ...]:
        """Tell what came of it."""
        line = f"{self.folder}: {self.reused} of {self.reused + self.computed} latents were there"
        if self.strange:
            why = "are of other pictures, sizes or settings, or of another VAE, and stay"
            line += f"; the {self.strange} that it held {why}"
        return (line,)


@dataclass(frozen=True)
class TokensMade(Event):
    """Text became tokens.

    Attributes:
        tokens: Tokens to learn from.
        windows: Windows that a pass has.
        context: The most tokens of a window.
        held_out: Tokens that are kept apart; None where none are.
    """

    tokens: int
    windows: int
    context: int
    held_out: int | None

    def lines(self) -> tuple[str, ...]:
        """Tell how much there is."""
        apart = "none are kept apart to measure on (--held-out 0.1 keeps a tenth)"
        if self.held_out is not None:
            apart = f"{self.held_out:,} are kept apart: the perplexity on them shows when to stop"
        return (f"{self.tokens:,} tokens to learn from, in {self.windows} windows of up to {self.context}; {apart}",)


@dataclass(frozen=True)
class Fingerprinted(Event):
    """The base's weights were looked at, before or after training: both must be the same.

    Args:
        when: Which of both.
        fingerprint: Which base it is, as in files, recipes and the report: the same in every dtype.
        checksum: Of every byte of its weights.
    """

    when: Literal["before", "after"]
    fingerprint: str
    checksum: str

    def lines(self) -> tuple[str, ...]:
        """Tell which base it is, and that its weights stay as they are."""
        checksum = f"checksum of its weights {self.when} training:{'  ' if self.when == 'after' else ' '}{self.checksum}"
        return (f"base fingerprint {self.fingerprint}", checksum) if self.when == "before" else (checksum,)


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        data: What is learned from.
        steps: How many steps.
        batch: Pictures or windows of a step, in one process.
        processes: How many processes learn together.
        rates: The learning rate of each group of parameters.
        scheduler: The course of the learning rates.
        seed: What all chance comes from.
        precision: What the base computes in.
    """

    data: Data
    steps: int
    batch: int
    processes: int
    rates: Mapping[str, float]
    scheduler: str
    seed: int
    precision: str

    def __str__(self) -> str:
        """Tell the plan in a line."""
        if self.data == "text":
            size = number_of(self.batch * self.processes, "window")
        elif self.processes > 1:
            size = f"{self.batch * self.processes} pictures ({self.batch} in each of {self.processes} processes)"
        else:
            size = number_of(self.batch, "picture")
        sole = self.data == "text" and len(self.rates) == 1  # of its only component
        rates = ", ".join(f"{rate:g}" if sole else f"{name} {rate:g}" for name, rate in self.rates.items())
        steps = number_of(self.steps, "step")
        return f"{steps} of {size}, learning rate {rates} ({self.scheduler}), seed {self.seed}, {self.precision}"


@dataclass(frozen=True)
class Prepared(Event):
    """All is ready to train: base and data are read, and the adapter is on the base.

    Attributes:
        adapter: Methods and layers of the adapter, in words.
        parameters: How many parameters it has.
        plan: What the run will do.
    """

    adapter: str
    parameters: int
    plan: Plan

    def lines(self) -> tuple[str, ...]:
        """Tell what is trained, and how."""
        return (f"{self.adapter}; {self.plan}",)


@dataclass(frozen=True)
class MemoryUnknown(Event):
    """It cannot be told what the run takes.

    Attributes:
        why: The reason; None where the base is sharded.
        low: Whether blocks of the base are computed twice to hold less.
    """

    why: str | None
    low: bool

    def lines(self) -> tuple[str, ...]:
        """Tell why."""
        if self.why is not None:
            return (f"memory: what the run takes cannot be told before it ({self.why})",)
        hint = "" if self.low else "; should it not fit, --memory low takes less"
        return (f"memory: what the run takes is not predicted for a base that is sharded{hint}",)


@dataclass(frozen=True)
class MemorySaved(Event):
    """A run would not fit, so that blocks of the base are computed twice; ``plain`` is what it would take otherwise."""

    plain: Need

    def lines(self) -> tuple[str, ...]:
        """Tell what is done."""
        return (f"memory: {mib(self.plain.total)} do not fit; as with --memory low, blocks of the base are computed twice",)


@dataclass(frozen=True)
class MemoryPredicted(Event):
    """What a run is predicted to take; ``there`` are the bytes that its device has for it, None where that is unknown."""

    need: Need
    there: int | None

    def lines(self) -> tuple[str, ...]:
        """Tell what it takes, and what is there."""
        return (f"memory: {self.need}" + ("" if self.there is None else f"; {mib(self.there)} are there"),)


@dataclass(frozen=True)
class Started(Event):
    """The run begins, or goes on.

    Attributes:
        run_dir: The run folder.
        step: Steps done before: 0 for a new run.
        steps: Steps that the run shall have.
        resumed: Whether an earlier run is gone on with.
        planned: Steps that this had.
        scheduler: The course of the learning rate.
    """

    run_dir: Path
    step: int
    steps: int
    resumed: bool = False
    planned: int = 0
    scheduler: str = "constant"

    def lines(self) -> tuple[str, ...]:
        """Tell where it goes on, and what another length means; nothing for a new run."""
        if not self.resumed:
            return ()
        if self.step == 0:
            return ("no checkpoint was made yet: the run starts from the beginning",)
        line = f"going on from step {self.step} of {self.steps}"
        if self.planned == self.steps or self.scheduler == "constant":
            return (line,)
        return (
            line,
            f"the run was planned for {self.planned} steps: from here its {self.scheduler} learning rate is that of"
            f" {self.steps}, so the result is not quite that of one run of this length",
        )


@dataclass(frozen=True)
class Step(Event):
    """A step was done, without waiting for the device; ``step`` counts those done, of ``steps``."""

    step: int
    steps: int


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, and the learning rates that it was made with."""

    step: int
    loss: float
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Losses(Event):
    """The losses of the steps since the last of these, in order: they are read from the device now and then."""

    losses: tuple[StepLoss, ...]


@dataclass(frozen=True)
class Unrecorded(Event):
    """Steps cannot be recorded as CUDA graphs, and run one operation after the other."""

    why: str

    def lines(self) -> tuple[str, ...]:
        """Tell why steps are slower than they could be."""
        return (f"steps run one operation after the other, which is slower: no CUDA graph of them can be made ({self.why})",)


@dataclass(frozen=True)
class TimePredicted(Event):
    """How long the run will take, from its first steps: ``each`` is the seconds of one, ``left`` the steps to come."""

    each: float
    left: int

    def lines(self) -> tuple[str, ...]:
        """Tell the time of a step, and of all that are left."""
        return (f"time: {self.each:.3g} s a step, {duration(self.each * self.left)} for the {self.left} steps left",)


@dataclass(frozen=True)
class Pace(Event):
    """How fast a run goes, whenever losses are read.

    Attributes:
        step: Steps done.
        steps: Steps of the whole run.
        rate: Pictures or windows that were learned from in a second, since the last of these.
        left: Seconds that are left, by all steps of this stretch of the run and what came between.
        memory: Bytes that are held on the device; None on a CPU.
        data: What is learned from.
    """

    step: int
    steps: int
    rate: float
    left: float
    memory: int | None
    data: Data = "pictures"

    def __str__(self) -> str:
        """Tell it in words."""
        held = "" if self.memory is None else f", {mib(self.memory)}"
        rate = f"{self.rate:.3g}" if self.rate < 100 else f"{self.rate:.0f}"
        return f"{rate} {'pictures' if self.data == 'pictures' else 'windows'}/s{held}"


@dataclass(frozen=True)
class Signals:
    """What tells when to stop beside the loss on what is kept apart. None is what cannot be measured.

    Attributes:
        seen: The same loss on a few of those that are trained on.
        leakage: How far the base's answers moved that the adapter should leave alone (0 is not at all): for pictures the
            rms of the difference over that of the base's, for text the Kullback-Leibler divergence in nats per token.
        changes: How far each layer moved, see `layer_changes`.
    """

    seen: float | None = None
    leakage: float | None = None
    changes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured(Event):
    """The run was measured, before the first step and with every checkpoint.

    Attributes:
        step: Steps done.
        held_out: The loss on what is kept apart; None where nothing is.
        signals: What was measured besides.
        data: What is learned from: of text the loss is nats per token.
    """

    step: int
    held_out: float | None
    signals: Signals
    data: Data = "pictures"

    def lines(self) -> tuple[str, ...]:
        """Tell the loss on what is kept apart, if anything is."""
        if self.held_out is None:
            return ()
        if self.data == "text":
            perplexity = math.exp(self.held_out)
            return (f"step {self.step}: text kept apart: loss {self.held_out:.4f}, perplexity {perplexity:.2f}",)
        return (f"step {self.step}: loss on pictures kept apart {self.held_out:.4f}",)


@dataclass(frozen=True)
class Preview(Event):
    """Previews were drawn with the weights after so many steps, at 0 with the base alone.

    Attributes:
        step: Steps done.
        prompts: What they show.
        pictures: A picture for each prompt.
        files: Where each picture was written.
        nearest: How near they are to pictures that are trained on, as many times as these are to one another; None where
            that cannot be told. Near 0 they are copies.
    """

    step: int
    prompts: tuple[str, ...]
    pictures: "Sequence[Image.Image]" = field(repr=False)
    files: tuple[Path, ...]
    nearest: float | None


@dataclass(frozen=True)
class StepLeftOut(Event):
    """Gradients in float16 overflowed, and a step changed nothing.

    Attributes:
        step: The step.
        count: Steps that were left out so far.
        scale: What the loss is multiplied by from now on.
    """

    step: int
    count: int
    scale: float

    def lines(self) -> tuple[str, ...]:
        """Tell it, and how often it was so."""
        times = f"{self.count} so far" if self.count > 1 else "the first"
        return (f"step {self.step} is left out ({times}): its gradients are beyond float16; loss scale {self.scale:g} now",)


@dataclass(frozen=True)
class Begun(Event):
    """The adapter begins as that of a file.

    Attributes:
        path: The file.
        layers: How many layers are what the file has there.
        fresh: How many the file holds nothing for.
        untrained: How many of the file are not trained now, and are no part of the new one.
        error: The norm of what another rank leaves out over that of the whole.
    """

    path: Path
    layers: int
    fresh: int
    untrained: int
    error: float

    def lines(self) -> tuple[str, ...]:
        """Tell what was taken over, and what was not."""
        told = [f"{number_of(self.layers, 'layer')} begun as {self.path}"]
        told += [f"{self.fresh} begun fresh"] if self.fresh else []
        told += [f"{self.untrained} of the file left out, not trained now"] if self.untrained else []
        told += [f"the rank leaves out {self.error:.1%} of its change"] if self.error > 1e-4 else []
        return ("; ".join(told),)


@dataclass(frozen=True)
class Saved(Event):
    """A file was written, whole and on the disk: a checkpoint, an adapter file of the way, or that of the run."""

    what: Literal["checkpoint", "on the way", "adapter"]
    step: int
    path: Path


@dataclass(frozen=True)
class Trained(Event):
    """There are no more steps, and the weights are chosen next.

    Attributes:
        step: Steps done.
        steps: Steps that were planned.
        patience: How many measurements without a new lowest loss ended it early; None where they did not.
    """

    step: int
    steps: int
    patience: int | None = None

    def lines(self) -> tuple[str, ...]:
        """Tell why it ended early, if it did."""
        if self.patience is None:
            return ()
        return (f"ended after step {self.step} of {self.steps}: {self.patience} measurements without a new lowest one",)


@dataclass(frozen=True)
class WeightsChosen(Event):
    """The weights of an earlier step than the ``last`` are written: its loss on what is kept apart is the lowest."""

    step: int
    last: int

    def lines(self) -> tuple[str, ...]:
        """Tell which weights, and how to have the last ones."""
        why = f"which has the lowest loss on what is kept apart (--keep last: step {self.last})"
        return (f"written are the weights of step {self.step}, {why}",)


@dataclass(frozen=True)
class StrengthSuggested(Event):
    """It was measured at which strength the adapter serves best."""

    suggestion: Suggestion

    def lines(self) -> tuple[str, ...]:
        """Tell the strength, and the losses."""
        tried = ", ".join(f"{loss:.4f} at {strength:g}" for strength, loss in self.suggestion.losses.items())
        return (f"suggested strength: {self.suggestion.strength:g} (loss on what is kept apart: {tried})",)


@dataclass(frozen=True)
class SearchStarted(Event):
    """A search for learning rates begins.

    Attributes:
        short: Steps of the first trials.
        steps: Steps of those that decide.
        judged: What the loss is measured on, in words.
        before: The loss without any training.
    """

    short: int
    steps: int
    judged: str
    before: float

    def lines(self) -> tuple[str, ...]:
        """Tell what is tried."""
        judged = f"judged by the loss on {self.judged}: {self.before:.4f} before"
        return (f"trials of {self.short}, then of {self.steps} steps, {judged}",)


@dataclass(frozen=True)
class TrialEnded(Event):
    """A learning rate was tried."""

    trial: Trial

    def lines(self) -> tuple[str, ...]:
        """Tell what came of it."""
        outcome = f"{self.trial.loss:.4f}" if math.isfinite(self.trial.loss) else "runs away"
        return (f"  {self.trial.steps} steps, {described(self.trial.rates)}: {outcome}",)


@dataclass(frozen=True)
class RatesFound(Event):
    """A search has found learning rates; ``flags`` are those that set the rates of components."""

    found: FoundRates
    flags: Mapping[str, str]

    def lines(self) -> tuple[str, ...]:
        """Tell what to type, and where all of it is."""
        rates = self.found.rates
        # A group of words is numbered below its component, whose rate is theirs; one of a LoRA+ moves so many times as fast.
        parts = {name: name.partition(".")[0] for name in rates if " x" not in name}
        typed = [f"{self.flags[part]} {rates[name]:g}" for name, part in parts.items() if part in self.flags]
        return (f"suggested: {' '.join(dict.fromkeys(typed)) or described(rates)} (all of it is in {self.found.file})",)


@dataclass(frozen=True)
class LookGains(Event):
    """The rates found for a style are lower than those of the settings, where its look still gains."""

    def lines(self) -> tuple[str, ...]:
        """Tell what to do."""
        return (
            "a style's look still gains above the rate of the lowest loss: compare with a run at the rate of the settings",
        )


def described(rates: Mapping[str, float]) -> str:
    """Describe learning rates.

    Args:
        rates: By group.

    Returns:
        To two digits, in words.
    """
    return ", ".join(f"{name} {value:.2g}" for name, value in rates.items())


def duration(seconds: float) -> str:
    """Describe a time.

    Args:
        seconds: How long.

    Returns:
        In words.
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
