"""What a pipeline is told of prompts: the words, or where these hold more than words, embeddings."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..bases import denoiser_of
from ..bases.denoiser import Denoiser
from ..bases.pipelines import Pipeline, computes_on
from ..bases.prompt_syntax import is_plain
from ..bases.prompts import Encoding, Reading, TextSide, alike
from ..core.errors import UserError
from ..core.events import Noted, Observer
from ..formats import Plan
from .settings import Sampling

if TYPE_CHECKING:
    from .adapters import Adapters
    from .sampler import Cell


class Telling:
    """The prompts of pictures, as a pipeline takes them.

    Args:
        pipe: The pipeline.
        asked: How prompts are read.
        letters: Words that are read as they stand, as triggers with brackets.
    """

    def __init__(self, pipe: Pipeline, asked: Sampling, letters: Sequence[str] = ()) -> None:
        self.pipe = pipe
        self.asked = asked
        self.denoiser: Denoiser = denoiser_of(pipe)
        usual = self.denoiser.text.usual_clip_skip
        skip = None if asked.clip_skip == usual else asked.clip_skip
        self.text: TextSide = self.denoiser.text.read_as(Reading(asked.prompt_weights, None, skip, tuple(letters)))

    @property
    def zeroes(self) -> bool:
        """Whether an empty negative prompt is told by zeros."""
        asked = self.asked.zero_negative
        return self.denoiser.zeroes_negative if asked is None else asked

    def check(self, prompts: Sequence[str]) -> None:
        """See that prompts can be read.

        Args:
            prompts: Those of a batch, in order: learned words take room too, and which ones do depends on the strengths.

        Raises:
            UserError: They cannot.
        """
        self.text.check()
        if self.asked.prompt_2 is not None and len(self.text.sides) == 1:
            raise UserError(f"a {type(self.pipe).__name__} has one text encoder, so there is none to read a second prompt")
        self.text.chunks(prompts)

    def arguments(
        self, prompts: Sequence[str], against: Sequence[str], *, guided: bool = True, embedded: bool = False
    ) -> Mapping[str, Any]:
        """Say what the pipeline is called with.

        Args:
            prompts: Those of a batch.
            against: What its pictures should not show, one for each.
            guided: Whether the negative prompt has any effect.
            embedded: Whether to give embeddings in any case.

        Returns:
            The prompts themselves, where the pipeline reads them as they are meant; else their embeddings.

        Raises:
            UserError: The pipeline takes no embeddings.
        """
        zeroed = [not negative and self.zeroes for negative in against]
        if not embedded and self._reads_itself(prompts, against, zeroed):
            return {"prompt": list(prompts), "negative_prompt": None if any(zeroed) else list(against)}
        if "prompt_embeds" not in inspect.signature(type(self.pipe).__call__).parameters:
            raise UserError(
                f"a {type(self.pipe).__name__} takes prompts as words alone, of at most {self.text.limit} tokens with start"
                " and end: leave weights, BREAK, clip skip, regions and a second prompt away, and shorten them"
            )
        told = self._encode(prompts, self.asked.prompt_2)
        if not guided:
            return self.denoiser.prompt_arguments(told, None)
        if all(zeroed):
            return self.denoiser.prompt_arguments(told, tuple(torch.zeros_like(one) for one in told))
        others = self._encode(against, None)
        for row in (row for row, zero in enumerate(zeroed) if zero):
            for one in others:
                one[row] = 0
        pairs = [alike(pair) for pair in zip(told, others, strict=True)]
        return self.denoiser.prompt_arguments(tuple(one for one, _ in pairs), tuple(other for _, other in pairs))

    @torch.no_grad()
    def as_learned(self, prompt: str) -> Encoding:
        """Read a prompt as captions are read in training, by the layer of the text encoder that the base was trained with.

        Args:
            prompt: The prompt.

        Returns:
            Its embeddings, of a batch of one.
        """
        reading = replace(self.text.reading, clip_skip=None)
        return self.denoiser.text.read_as(reading).encode([prompt], None, computes_on(self.pipe))

    def _reads_itself(self, prompts: Sequence[str], against: Sequence[str], zeroed: Sequence[bool]) -> bool:
        """Whether the pipeline makes the same of the prompts by itself."""
        reading = self.text.reading
        if reading.clip_skip is not None or self.asked.prompt_2 is not None:
            return False
        if any(zeroed) and not (all(zeroed) and self.denoiser.zeroes_negative):
            return False
        plain = all(is_plain(text, reading.weights) for text in (*prompts, *against))
        return plain and all(count == 1 for texts in (prompts, against) for count in self.text.chunks(texts))

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], second: str | None) -> Encoding:
        others = None if second is None else [second] * len(prompts)
        return self.text.encode(prompts, others, computes_on(self.pipe))


def tell_clip_skip(pipe: Pipeline, plans: Sequence[Plan], asked: Sampling, tell: Observer) -> None:
    """Tell of adapters that were trained with another layer of the text encoder than draws.

    Args:
        pipe: The pipeline.
        plans: What the adapters' files hold.
        asked: How prompts are read.
        tell: Is told.
    """
    usual = denoiser_of(pipe).text.usual_clip_skip
    used = asked.clip_skip or usual
    for plan in plans:
        told = plan.spec.training.get("clip_skip") if plan.spec else None
        if not told and usual == 1:  # sd-scripts writes it for Stable Diffusion XL too, where it has no effect there
            told = plan.header.metadata.get("ss_clip_skip")
        if str(told).isdecimal() and int(str(told)) != used:
            tell(
                Noted(f"{plan.path} was trained with clip skip {told}, and {used} draws; --clip-skip {told} draws as it was")
            )


def triggers(adapters: "Adapters", cells: "Sequence[Cell]") -> list[str]:
    """List the words that call adapters.

    Args:
        adapters: Those on the base.
        cells: Pictures that are drawn: adapters that none of them names count for nothing.

    Returns:
        The words.
    """
    named = {name for cell in cells for name in (adapters.names if cell.strengths is None else cell.amounts)}
    return [word for name in (*adapters.names, *adapters.waiting) if name in named for word in adapters[name].spec.triggers]
