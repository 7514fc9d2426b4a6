"""The losses of real pictures of several adapters, by which a report finds strengths for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ..core.errors import UserError
from ..core.events import Observer, untold
from ..core.strength_schedule import ByPart
from ..data.folder import check_folders
from ..generation.settings import Sampling
from ..training.tasks.diffusion import Examples
from .bench import Bench
from .gallery import Gallery, at_most, encoded, read_gallery

if TYPE_CHECKING:
    from ..generation.adapters import Adapters

PICTURES = 32  # of each adapter: with half as many, strengths come out up to a third off


@dataclass(frozen=True)
class PictureLosses:
    """What adapters lose on real pictures of each: see `on_pictures.Losses`.

    Attributes:
        bench: The adapted base.
        examples: By the name of each adapter, its pictures.
        prompts: Their captions, with the words that call the adapter.
    """

    bench: Bench
    examples: Mapping[str, Examples]
    prompts: Mapping[str, Sequence[str]]

    @classmethod
    def read(
        cls,
        adapters: "Adapters",
        folders: Mapping[str, str | Path],
        *,
        pictures: int = PICTURES,
        sampling: Sampling | None = None,
        tell: Observer = untold,
    ) -> "PictureLosses":
        """Read and encode pictures.

        Args:
            adapters: Those on the base.
            folders: By the name of each adapter, a folder of pictures of what it was taught, with captions. Best are such as
                it was not trained on; where there are none, those that it was.
            pictures: How many of each count, spread over all, 1 or more.
            sampling: Says how many pictures are computed at once; by default as for ``generate``.
            tell: Is told how far it is.

        Returns:
            What measures.

        Raises:
            UserError: A name is no adapter's, a folder cannot be read, or a picture has no caption.
        """
        if pictures < 1:
            raise UserError(f"pictures must be 1 or more, not {pictures}")
        check_folders([Path(folder) for folder in folders.values()])
        galleries = {
            name: read_gallery(Path(folder), name, adapters.pipe, spec=adapters[name].spec, tell=tell)
            for name, folder in folders.items()
        }
        return cls.of(Bench(adapters, Sampling() if sampling is None else sampling, (), tell), galleries, pictures)

    @classmethod
    def of(cls, bench: Bench, galleries: Mapping[str, Gallery], pictures: int = PICTURES) -> "PictureLosses":
        """Encode some pictures of galleries.

        Args:
            bench: The adapted base.
            galleries: By the name of each adapter, its pictures.
            pictures: How many of each count, spread over all.

        Returns:
            What measures.
        """
        some = {name: at_most(gallery, pictures) for name, gallery in galleries.items()}
        examples = {name: encoded(gallery, bench.adapters.pipe, bench.tell) for name, gallery in some.items()}
        return cls(bench, examples, {name: gallery.captions for name, gallery in some.items()})

    def loss(self, name: str, amounts: Mapping[str, float | ByPart]) -> float:
        """Measure how well an adapter's own pictures are denoised: the mean of `Bench.losses`.

        Args:
            name: The adapter whose pictures they are.
            amounts: The strengths of all that are on; others are off.

        Returns:
            The mean loss.

        Raises:
            UserError: There are no pictures of it.
        """
        if name not in self.examples:
            raise UserError(f"there are no pictures of {name}; name a folder for each adapter")
        return fmean(self.bench.losses(self.examples[name], amounts))
