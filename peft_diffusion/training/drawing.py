"""What draws pictures while a run learns. It is given to a run from above: training knows nothing of generation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from ..bases.pipelines import Pipeline
from ..data.prompt_lines import parse_line
from ..data.wildcards import Wildcards


@dataclass(frozen=True)
class PreviewPrompt:
    """A picture of the previews.

    Attributes:
        prompt: What it shows.
        negative: What it should not show.
        seed: That of its noise; None for one by its place.
        width: Pixels; None for the run's resolution.
        height: Pixels; None for the run's resolution.
        guidance: Of classifier-free guidance; None for the usual.
        steps: Denoising steps; None for the setting's.
        written: What it is called; by default the prompt.
    """

    prompt: str
    negative: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    guidance: float | None = None
    steps: int | None = None
    written: str = ""

    @classmethod
    def of_line(cls, line: str, number: int) -> "PreviewPrompt":
        """Read a prompt with what is said of it: see `data.prompt_lines`.

        Args:
            line: The line.
            number: Its place among the prompts, by which alternatives are drawn where it has no seed.

        Returns:
            The prompt.

        Raises:
            UserError: It cannot be read.
        """
        read = parse_line(line)
        chance = read.told.get("seed", number)
        prompt, negative = (Wildcards().draw(text, chance) for text in (read.prompt, read.told.get("negative", "")))
        return cls(**{**read.told, "prompt": prompt, "negative": negative, "written": line})


class Drawing(Protocol):
    """Draws pictures with a pipeline as it stands; `generation.while_training` does."""

    def previews(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        against: Sequence[str],
        size: tuple[int, int],
        steps: int,
        guidance: float,
        from_pure_noise: bool,
        clip_skip: int | None,
    ) -> list[Image.Image]:
        """Draw prompts together, with whatever the pipeline carries.

        Args:
            pipe: The pipeline; its scheduler is afterwards what it was.
            prompts: What the pictures show.
            seeds: A seed for each prompt, from which the pipeline draws its noise.
            against: What each picture should not show.
            size: Width and height in pixels.
            steps: Denoising steps.
            guidance: Of classifier-free guidance.
            from_pure_noise: Whether the schedule shall begin with pure noise (zero terminal SNR).
            clip_skip: Which layer of the text encoder is taken, counted from the last, which is 1; None for the usual.

        Returns:
            A picture for each prompt.
        """
        ...

    def class_pictures(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        size: int,
        steps: int,
        guidance: float,
        clip_skip: int | None,
    ) -> Iterable[Image.Image]:
        """Draw prompts together, each picture from the noise of its own seed alone, whatever else is drawn with it.

        Args:
            pipe: The pipeline, which carries no adapter.
            prompts: What the pictures show.
            seeds: A seed for each prompt.
            size: Pixels a side.
            steps: Denoising steps.
            guidance: Of classifier-free guidance.
            clip_skip: As of `previews`.

        Returns:
            A picture for each prompt, in order.
        """
        ...

    def sheet(
        self, rows: Sequence[Sequence[Image.Image | None]], row_labels: Sequence[str], column_labels: Sequence[str]
    ) -> Image.Image:
        """Lay pictures out in rows.

        Args:
            rows: The pictures; None leaves a cell empty.
            row_labels: A label for each row.
            column_labels: A label for each column.

        Returns:
            The sheet.
        """
        ...
