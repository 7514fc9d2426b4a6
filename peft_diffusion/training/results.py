"""What runs give, as data. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.wording import number_of
from .settings.pictures import ResolvedConfig
from .settings.text import ResolvedTextConfig


@dataclass(frozen=True)
class Suggestion:
    """The strength with the lowest loss on what is kept apart, and the loss at each strength that was tried."""

    strength: float
    losses: Mapping[float, float]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        kept: The step whose weights are written.
        best: The step of the lowest loss on what is kept apart; None where nothing is.
        warning: What went wrong with the run as a whole, such as over-training; None where nothing did.
        suggestion: The strength that serves best; None where nothing is kept apart to measure on.
    """

    kept: int
    best: int | None
    warning: str | None
    suggestion: Suggestion | None

    def training(self) -> dict[str, Any]:
        """Tell the entries of an adapter file's training summary."""
        found: dict[str, Any] = {"kept_step": self.kept, "best_step": self.best, "warning": self.warning}
        if self.suggestion is not None:
            found |= {
                "suggested_strength": self.suggestion.strength,
                "loss_by_strength": {f"{strength:g}": loss for strength, loss in self.suggestion.losses.items()},
            }
        return found


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What every run gives.

    Attributes:
        output: The adapter file.
        run_dir: The run folder.
        steps: Steps done, all stretches of the run together.
        seconds: Seconds taken, all stretches together.
        held_out_before: The loss on what is kept apart before the first step; None where nothing is kept apart.
        held_out_after: That loss of the weights that were written.
        base_fingerprint: Which base it is, as in files, recipes and the report.
        base_checksum: Of every byte of the base's weights, before and after.
        next_command: What to type to use what was learned.
        outcome: None in a process that does not measure.
    """

    output: Path
    run_dir: Path
    steps: int
    seconds: float
    held_out_before: float | None
    held_out_after: float | None
    base_fingerprint: str
    base_checksum: str
    next_command: str
    outcome: Outcome | None = None

    @property
    def size(self) -> float:
        """MiB of the adapter file."""
        return self.output.stat().st_size / 2**20

    def lines(self) -> tuple[str, ...]:
        """Tell what was made, and what to type next, in lines."""
        return (f"wrote {self.output} ({self.size:.1f} MiB)", f"next: {self.next_command}")


@dataclass(frozen=True, kw_only=True)
class TrainResult(RunResult):
    """What a run on pictures gave; ``images`` is the number of pictures that were trained on."""

    config: ResolvedConfig
    images: int

    def lines(self) -> tuple[str, ...]:
        """Tell what the loss came to, what was made, and what to type next, in lines."""
        loss = []
        if self.held_out_before is not None and self.held_out_after is not None:
            losses = f"{self.held_out_before:.4f} before, {self.held_out_after:.4f} after"
            loss = [f"loss on pictures kept apart: {losses} ({self.held_out_after / self.held_out_before - 1:+.0%})"]
        previews = ", previews" if self.config.preview_steps else ""
        return (
            *loss,
            f"wrote {self.output} ({self.size:.1f} MiB) after {number_of(self.steps, 'step')} on"
            f" {number_of(self.images, 'picture')},"
            f" {self.seconds:.0f} s; settings, metrics{previews} and report.html are in {self.run_dir}",
            f"next: {self.next_command}",
        )


@dataclass(frozen=True, kw_only=True)
class TextTrainResult(RunResult):
    """What a run on text gave; ``tokens`` is the number of tokens that were trained on. Losses are nats per token."""

    config: ResolvedTextConfig
    tokens: int

    @property
    def perplexities(self) -> tuple[float, float] | None:
        """Of the text kept apart, before and after; None where there was none."""
        if self.held_out_before is None or self.held_out_after is None:
            return None
        return math.exp(self.held_out_before), math.exp(self.held_out_after)

    def lines(self) -> tuple[str, ...]:
        """Tell what the perplexity came to, what was made, and what to type next, in lines."""
        told = []
        if self.perplexities is not None:
            before, after = self.perplexities
            told = [f"perplexity on text kept apart: {before:.2f} before, {after:.2f} after ({after / before - 1:+.0%})"]
        return (
            *told,
            f"wrote {self.output} ({self.size:.1f} MiB) after {self.steps} steps on {self.tokens:,} tokens,"
            f" {self.seconds:.0f} s; settings, metrics and report.html are in {self.run_dir}",
            f"next: {self.next_command}",
        )


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried.

    Attributes:
        steps: Steps of the trial.
        factor: How many times the rates of the settings it had.
        rates: The rate of each group of parameters.
        loss: What it came to; infinite where it ran away.
    """

    steps: int
    factor: float
    rates: Mapping[str, float]
    loss: float


@dataclass(frozen=True)
class FoundRates:
    """What a search for learning rates found.

    Attributes:
        factor: How many times those of the settings the best rates are.
        rates: The best rate of each group of parameters.
        trials: All that were made.
        before: The loss without any training.
        judged: What the loss was measured on, in words.
        steps: Steps of the trials that decided, as many as the run has.
        file: Where all of this is written.
    """

    factor: float
    rates: Mapping[str, float]
    trials: tuple[Trial, ...]
    before: float
    judged: str
    steps: int
    file: Path
