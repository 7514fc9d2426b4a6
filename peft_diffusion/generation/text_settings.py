"""What ``text generate`` can be told: flags, TOML keys and Python arguments in one place. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Annotated

from cyclopts import Parameter

from ..core.errors import UserError
from .settings import MAX_SEED, Choice, Precision, Quantize, check_quantize, check_text, parse_choices


@dataclass(frozen=True, kw_only=True)
class TextGenerateConfig:
    """Which texts are written: every prompt goes on ``count`` times. Raises UserError for a value that cannot be used."""

    prompts: Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)] = field(default=(), kw_only=False)
    """How the texts begin, each prompt in quotes."""
    adapter: Annotated[tuple[str, ...], Parameter(alias="-a", negative=(), show_default=False)] = ()
    """An adapter FILE, or FILE=STRENGTH (1 is as trained); give it again for more."""
    max_tokens: int = 120
    """The most tokens that are written after the prompt."""
    temperature: float = 0.8
    """How freely the next token is chosen: 0 takes the likeliest always, 1 follows the model."""
    top_p: float = 0.95
    """Choose only among the likeliest tokens that together have this probability; 1 is among all."""
    seed: int = 0
    """The first seed: it decides what is chosen."""
    count: int = 1
    """Texts of each prompt, with the seeds that follow."""
    base: str = "tiny-lm"
    """The embedded base "tiny-lm", a folder in the format of transformers, or a hub id."""
    device: str = "auto"
    """Such as cpu, cuda or mps; by default the fastest there is."""
    precision: Precision = "auto"
    """Of the base; by default float32 on a CPU and a half precision elsewhere."""
    quantize: Quantize | None = None
    """Hold the base's linear layers in fewer bits, which saves memory: int8, or nf4 for the least (slightly off)."""

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        if not self.prompts:
            raise UserError('there is no prompt; say how the text begins, as in "In the beginning"')
        check_text(*self.prompts)
        for name in ("max_tokens", "count"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be a finite number from 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed <= MAX_SEED - self.count:
            raise UserError(f"a seed is a whole number from 0 to {MAX_SEED - self.count}, not {self.seed}")

    def choices(self) -> tuple[Choice, ...]:
        """The adapters, parsed and their headers read. Raises UserError as ``parse_choices`` does."""
        return parse_choices(self.adapter)
