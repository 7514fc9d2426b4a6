"""What is measured with: an adapted base that draws the same prompts from the same noise at any strengths, and its loss."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

from ..core.events import Never, Observer, Stop, untold
from ..core.strength_schedule import ByPart
from ..generation.sampler import Cell, paint
from ..training.tasks.diffusion import DiffusionSettings, DiffusionTask, Examples

if TYPE_CHECKING:
    from ..generation.adapters import Adapters
    from ..generation.settings import Sampling

Amounts = Mapping[str, float | ByPart]
"""Strengths by the names of adapters; those that are not named are off."""


@dataclass(frozen=True)
class Bench:
    """An adapted base, and how it draws.

    Attributes:
        adapters: Those on the base.
        sampling: How pictures are drawn.
        seeds: The noises that each prompt is drawn from.
        tell: Is told how far it is.
        stop: Where it is set, nothing is drawn after the present batch.
    """

    adapters: "Adapters"
    sampling: "Sampling"
    seeds: tuple[int, ...]
    tell: Observer = untold
    stop: Stop = field(default_factory=Never)

    def draw(self, prompts: Sequence[str], several: Sequence[Amounts]) -> Iterator[list[list[Image.Image]]]:
        """Draw prompts at several strengths, from the same noise at each.

        Args:
            prompts: What is drawn.
            several: The strengths.

        Yields:
            For each of them a list of pictures a seed, in the order of the prompts.
        """
        off = dict.fromkeys(self.adapters.names, 0.0)
        cells = [Cell(prompt, seed, {**off, **amounts}) for amounts in several for seed in self.seeds for prompt in prompts]
        images = paint(self.adapters, cells, self.sampling, tell=self.tell, stop=self.stop)
        for _ in several:
            yield [[next(images) for _ in prompts] for _ in self.seeds]

    def losses(self, examples: Examples, amounts: Amounts) -> list[float]:
        """Measure the loss of denoising pictures, which is the plain one that training measures on what is held out.

        Args:
            examples: The pictures.
            amounts: The strengths.

        Returns:
            The mean squared error for each picture, over eight noises and timesteps that its place alone decides.
        """
        self.adapters.set({**dict.fromkeys(self.adapters.names, 0.0), **amounts})
        name = next(iter(amounts), next(iter(self.adapters.names), ""))
        settings = DiffusionSettings(batch_size=self.sampling.batch_size)
        return DiffusionTask(self.adapters.pipe, name, settings, examples).losses(examples)
