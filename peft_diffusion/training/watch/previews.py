"""Previews: the same prompts from the same noise, again and again while a run learns."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from PIL import Image

from ...bases import components
from ...core import site
from ...core.events import Observer, Warned
from ...core.files import explained, write_bytes
from ...core.parsing import json_value
from ...data.borders import Colour, missed, written
from ...data.prompts import in_words
from ..drawing import Drawing, PreviewPrompt
from ..events import Preview
from ..loop.seeds import seed_of
from ..machine.low_memory import small_vae
from ..record.run_record import PREVIEW
from ..tasks.diffusion import DiffusionTask

_GUIDANCE = 5.0
_SEED = 0
_PROMPTS = "prompts.json"


class Previews:
    """Draws previews into a folder, and a sheet of all: the base's pictures first, then a row for each step drawn at.

    Of several processes, all that share the base draw, and only the one that leads writes and tells.

    Args:
        folder: Where the pictures go.
        task: What is learned, by the pipeline that draws.
        prompts: What the pictures show. Instructions of other programs are taken out and told, as `generate` does.
        drawing: Draws them.
        weights: Puts the weights that the run gives into the model.
        tell: Is told of each `Preview`, with how near its pictures are to those that are trained on: the mean distance from
            each to the nearest in latent space, over the median of that distance among training pictures themselves. Well
            below 1 they repeat what was seen.
        steps: Denoising steps of a picture.
        every: Steps of the run between previews; 0 draws only when it is told to.
        size: Pixels a side.
        paper: The colour that the borders of all pictures have that are learned from; None where they have none.
    """

    def __init__(
        self,
        folder: Path,
        task: DiffusionTask,
        prompts: Sequence[PreviewPrompt],
        drawing: Drawing,
        weights: Callable[[], AbstractContextManager[None]],
        tell: Observer,
        *,
        steps: int,
        every: int,
        size: int,
        paper: Colour | None = None,
    ) -> None:
        self.folder = folder
        self.task = task
        words = in_words([text for one in prompts for text in (one.prompt, one.negative)], tell)
        self.asked = [
            replace(one, prompt=prompt, negative=negative)
            for one, prompt, negative in zip(prompts, words[::2], words[1::2], strict=True)
        ]
        self.prompts = [one.written or one.prompt for one in self.asked]
        self.drawing = drawing
        self.steps = steps
        self.every = every
        self.size = size  # pixels a side
        self.weights = weights
        self.tell = tell
        self.drawn = -1
        self.paper = paper
        self.last: list[Image.Image] = []  # that were drawn with the adapter

    def peak(self) -> int:
        """The most bytes that drawing is predicted to hold at once, beside the pipeline."""
        with small_vae(self.task.denoiser.vae, self._largest):
            return self.task.peak_of_drawing(self._at_once, self._largest)

    def draw_base(self) -> None:
        """The base's own pictures, at strength 0."""
        self._strength(0.0)
        try:
            self._show(0, "base")
        finally:
            self._strength(1.0)

    def after_step(self, step: int) -> None:
        """Draw, if it is time.

        Args:
            step: The steps done.
        """
        if self.every and step % self.every == 0:
            self.draw(step)

    def draw(self, step: int) -> None:
        """Draw with the weights that the run would give now.

        Args:
            step: The steps done.
        """
        if self.drawn == step:
            return
        with self.weights():
            self.last = self._show(step, f"step_{step:06}")
        self.drawn = step

    def look_at_paper(self) -> None:
        """Tell where most of the last pictures lie on another paper than those that are learned from."""
        if self.paper is None:
            return
        wrong = missed(self.last, self.paper)
        if 2 * len(wrong) <= len(self.last):
            return
        plain = [written(colour) for colour in wrong if colour is not None]
        instead = f"have {', '.join(dict.fromkeys(plain))}" if plain else "have borders of several colours"
        told = f"the border of all pictures is {written(self.paper)}"
        told = f"{told}, and {len(wrong)} of {len(self.last)} previews {instead}"
        self.tell(Warned(f"{told}: name it in --trigger, or try --noise-offset 0.05 or more --steps"))

    def go_on_from(self, step: int) -> bool:
        """Delete what a run drew after a step, and set aside what it drew for other prompts.

        Args:
            step: The steps done.

        Returns:
            Whether the base's pictures are there; never at step 0.
        """
        processes = self.task.settings.processes
        with explained(self.folder):
            return processes.agreed(self._tidy(step) if processes.leads else False)

    def _tidy(self, step: int) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        drawn = [path for path in self.folder.glob("*.png") if PREVIEW.fullmatch(path.name)]
        for path in drawn:
            damaged = _read(path) is None
            if _step_of(path) > step or damaged:
                path.unlink()
            if damaged:
                self.tell(Warned(f"{path} is damaged, and deleted"))
        if self._prompts_of_before() not in (None, self.prompts):
            aside = self.folder / f"until_step_{step:06}"
            aside.mkdir(exist_ok=True)
            self.tell(Warned(f"the previews so far were drawn for other prompts, and are in {aside} now"))
            for path in (*drawn, self.folder / "sheet.png", self.folder / _PROMPTS):
                if path.exists():
                    path.replace(aside / path.name)
        write_bytes(self.folder / _PROMPTS, json.dumps(self.prompts, ensure_ascii=False).encode())
        return step > 0 and all((self.folder / f"base_{number}.png").exists() for number in range(len(self.prompts)))

    def _prompts_of_before(self) -> list[str] | None:
        """The prompts of the pictures in the folder, where that was written down."""
        try:
            found: list[str] = json_value((self.folder / _PROMPTS).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def _show(self, step: int, row: str) -> list[Image.Image]:
        """Draw, write and tell; returns the pictures."""
        pictures = self.pictures()
        if not self.task.settings.processes.leads:
            return pictures
        files = self._keep(row, pictures)
        of_size = [picture for picture in pictures if picture.size == (self.size, self.size)]
        near = self.task.nearness(of_size) if of_size else None
        self.tell(Preview(step, tuple(self.prompts), pictures, files, near))
        return pictures

    def pictures(self) -> list[Image.Image]:
        """Draw a picture for each prompt, with what the pipeline carries now; nothing is written."""
        pipe = self.task.pipe
        self.task.restore()
        pictures: list[Image.Image] = []
        with self.task.evaluating(), small_vae(self.task.denoiser.vae, self._largest):
            for start, batch in self._batches():
                first = batch[0]
                pictures += self.drawing.previews(
                    pipe,
                    [one.prompt for one in batch],
                    [
                        seed_of(_SEED, "preview", start + row) if one.seed is None else one.seed
                        for row, one in enumerate(batch)
                    ],
                    against=[one.negative for one in batch],
                    size=(first.width or self.size, first.height or self.size),
                    steps=first.steps or self.steps,
                    guidance=_GUIDANCE if first.guidance is None else first.guidance,
                    from_pure_noise=self.task.settings.zero_terminal_snr,
                    clip_skip=self.task.settings.reading.clip_skip,
                )
        self.task.offload()
        return pictures

    def _batches(self) -> Iterator[tuple[int, list[PreviewPrompt]]]:
        """Prompts that are drawn together, and the place of the first of them."""
        place = 0
        for _, alike in groupby(self.asked, key=lambda one: (one.width, one.height, one.steps, one.guidance)):
            group = list(alike)
            for start in range(0, len(group), self._at_once):
                batch = group[start : start + self._at_once]
                yield place, batch
                place += len(batch)

    @property
    def _largest(self) -> int:
        """The longest side of a picture, in pixels."""
        return max(side or self.size for one in self.asked for side in (one.width, one.height))

    @property
    def _at_once(self) -> int:
        """Pictures drawn together, no more than are trained on together."""
        return min(len(self.prompts), self.task.settings.batch_size)

    def _keep(self, row: str, pictures: Sequence[Image.Image]) -> tuple[Path, ...]:
        """Save the pictures of a row, and the sheet of all rows so far; returns the files of the row."""
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        files = tuple(self.folder / f"{row}_{number}.png" for number in range(len(pictures)))
        for file, picture in zip(files, pictures, strict=True):
            write_bytes(file, _png(picture))
        rows: dict[int, dict[int, Image.Image]] = {}
        for path in self.folder.glob("*.png"):
            if match := PREVIEW.fullmatch(path.name):
                image = _read(path)
                if image is not None:
                    rows.setdefault(int(match[1] or 0), {})[int(match[2])] = image
        labels = [f"step {step}" if step else "base" for step in sorted(rows)]
        columns = [rows[step] for step in sorted(rows)]
        cells = [[row.get(number) for number in range(len(self.prompts))] for row in columns]
        write_bytes(self.folder / "sheet.png", _png(self.drawing.sheet(cells, labels, self.prompts)))
        return files

    def _strength(self, value: float) -> None:
        for part in components(self.task.pipe).values():
            if (strengths := site.strengths(part)) is not None and self.task.name in strengths.names:
                strengths.write({self.task.name: value})


def _step_of(path: Path) -> int:
    """The step of a picture; 0 for the base's."""
    match = PREVIEW.fullmatch(path.name)
    return int(match[1] or 0) if match else 0


def _read(path: Path) -> Image.Image | None:
    """A picture; None where it is damaged, which the checksums in it tell."""
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:  # which cannot be used after it was verified
            image.load()
            return image.copy()
    except Exception:  # as decoders meet damage
        return None


def _png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return data.getvalue()
