"""The folders of a run, each read and arranged by settings of its own."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.events import Observer, progress
from ...core.settings import pick
from ...data import subfolders
from ...data.buckets import ResizeCrop, arrange, cut_outs
from ...data.caption_files import SIDECARS
from ...data.captions import CaptionRules
from ...data.folder import CaptionSource, ImageFolder, TrainingImage, check_folders, scan
from ...data.images import Checks
from ..events import DataRead
from ..settings.captions import CaptionSettings
from ..settings.choices import MissingCaptions
from ..settings.datasets import Dataset, FolderSettings
from ..settings.pictures import TrainConfig

DRAWN = -1
"""The ``dataset`` of pictures that no folder has, as the base draws them."""


@dataclass(frozen=True)
class Part:
    """Folders that are read as one.

    Attributes:
        folders: The folders.
        own: The settings of a folder that has its own; None for those of the run.
        captions: How captions become prompts.
        pictures: What becomes of the pictures.
        resolutions: Pixels a side of a square picture, each of those that it is learned at.
    """

    folders: tuple[Path, ...]
    own: Dataset | None
    captions: CaptionSettings
    pictures: FolderSettings
    resolutions: tuple[int, ...]

    @property
    def subfolders(self) -> bool:
        """Whether folders in them are read."""
        return self.own is None or self.own.subfolders

    @property
    def drawn(self) -> tuple[int | None, float | None]:
        """How often an epoch draws a picture, and what it counts; None where that is not said."""
        return (None, None) if self.own is None else (self.own.repeats, self.own.weight)

    @property
    def source(self) -> CaptionSource:
        """Where captions come from."""
        if self.own is None:
            return CaptionSource()
        ending = self.own.caption_extension.lower()
        extensions = (f".{ending.lstrip('.')}",) if ending else SIDECARS
        return CaptionSource(self.own.captions, self.own.caption, extensions)

    def read(
        self, missing: MissingCaptions | None, upscale: bool, progress: Callable[[int, int], None], checks: Checks
    ) -> ImageFolder:
        """Read the folders.

        Args:
            missing: What becomes of pictures without caption; None for what the settings say.
            upscale: Whether pictures of any size are read.
            progress: Is told how many pictures are read, and of how many.
            checks: Pictures that were decoded for other parts.

        Returns:
            What is in them.

        Raises:
            UserError: There is nothing to train on.
        """
        return scan(
            self.folders,
            resolution=None if upscale or self.pictures.upscale else min(self.resolutions),
            missing=missing or self.pictures.missing_captions,
            masks=self.pictures.masks != "off",
            subfolders=self.subfolders,
            captions=self.source,
            on_progress=progress,
            checks=checks,
        )


@dataclass(frozen=True)
class Arrangement:
    """Pictures in the sizes and cut-outs that they are learned in: one picture may be here several times.

    Attributes:
        pictures: The pictures.
        fits: How each becomes its bucket.
        flip: Whether each is learned mirrored too.
    """

    pictures: tuple[TrainingImage, ...]
    fits: tuple[ResizeCrop, ...]
    flip: tuple[bool, ...]

    @property
    def drawn(self) -> tuple[tuple[ResizeCrop, ...], tuple[int, ...]]:
        """What an epoch draws from, mirrored ones too, and how often it draws each."""
        mirrored = [index for index, flip in enumerate(self.flip) if flip]
        order = [*range(len(self.fits)), *mirrored]
        return tuple(self.fits[index] for index in order), tuple(self.pictures[index].repeats for index in order)

    @property
    def least(self) -> int:
        """How often an epoch draws the picture that it draws the fewest times, in whatever size."""
        times: Counter[str] = Counter()
        for picture, flip in zip(self.pictures, self.flip, strict=True):
            times[picture.digest] += picture.repeats * (2 if flip else 1)
        return min(times.values())


@dataclass(frozen=True)
class Parts:
    """The folders of a run: `Part` by the number that a picture's ``dataset`` is."""

    parts: tuple[Part, ...]

    def check(self) -> None:
        """See that there are folders, and a picture in each part by its name.

        Raises:
            UserError: There is none.
        """
        for part in self.parts:
            part.captions.caption_rules()
            check_folders(part.folders, part.subfolders)

    def read(
        self, tell: Observer, what: str, *, missing: MissingCaptions | None = None, of_class: bool = False
    ) -> list[TrainingImage]:
        """Read the folders, and tell what is in them and what is wrong there.

        Args:
            tell: Is told.
            what: What the reading is called while it goes on.
            missing: What becomes of pictures without caption; None for what the settings say.
            of_class: The pictures are of the class, and may have any size.

        Returns:
            The pictures of all parts, each with the number of its own.

        Raises:
            UserError: There is nothing to train on, or captions are missing.
        """
        checks = Checks()
        folders = [part.read(missing, of_class, progress(tell, what), checks) for part in self.parts]
        described = [line for folder in folders for line in folder.describe()]
        problems = [str(one) for folder in folders for one in folder.problems]
        tell(DataRead("pictures", tuple(described), tuple(problems), of_class=of_class))
        for folder in folders:
            folder.check()
        return [replace(one, dataset=number) for number, folder in enumerate(folders) for one in folder.pictures]

    def rules(self, pictures: Sequence[TrainingImage], usual: CaptionRules | None = None) -> list[CaptionRules]:
        """Give the rules of captions.

        Args:
            pictures: The pictures.
            usual: Those of pictures that none of these folders has.

        Returns:
            The rules of each.
        """
        known = [part.captions.caption_rules() for part in self.parts]
        return [usual if usual is not None and one.dataset == DRAWN else known[one.dataset] for one in pictures]

    def counted(
        self, pictures: Sequence[TrainingImage], repeats: Sequence[str] = (), weights: Sequence[str] = ()
    ) -> list[TrainingImage]:
        """Say how often an epoch draws pictures, and what they count.

        Args:
            pictures: The pictures.
            repeats: ``SUBFOLDER=N``, before what the parts say.
            weights: ``SUBFOLDER=WEIGHT``, before what the parts say.

        Returns:
            The pictures with both.

        Raises:
            UserError: No picture is in such a subfolder.
        """
        return subfolders.apply(pictures, repeats, weights, [part.drawn for part in self.parts])

    def alpha(self, pictures: Sequence[TrainingImage]) -> list[bool]:
        """Tell of which pictures only what is not transparent is learned.

        Args:
            pictures: The pictures.

        Returns:
            One each.
        """
        return [one.dataset != DRAWN and self.parts[one.dataset].pictures.masks == "alpha" for one in pictures]

    def arrange(self, pictures: Sequence[TrainingImage], step: int, *, learned: bool = True) -> Arrangement:
        """Choose buckets.

        Args:
            pictures: The pictures.
            step: See `data.buckets.make_buckets`.
            learned: They are trained on, several cut-outs and mirrored ones too; else measured on.

        Returns:
            Every different size and cut-out of each.

        Raises:
            UserError: The sizes allow no bucket.
        """
        found: list[tuple[TrainingImage, ResizeCrop]] = []
        for picture in pictures:
            part = self.parts[picture.dataset]
            kind = part.pictures
            fits = [
                fit
                for resolution in part.resolutions
                for one in arrange([picture], resolution, step, kind.max_aspect, no_upscale=not kind.upscale)
                for fit in cut_outs(one, kind.crops if learned else 1)
            ]
            found += [(picture, fit) for fit in dict.fromkeys(fits)]
        flip = tuple(learned and self.parts[picture.dataset].pictures.flip for picture, _ in found)
        return Arrangement(tuple(picture for picture, _ in found), tuple(fit for _, fit in found), flip)


def parts_of(config: TrainConfig, resolution: int) -> Parts:
    """List the folders that a run learns from.

    Args:
        config: Its settings.
        resolution: That of the run, in pixels.

    Returns:
        The folders.
    """
    return _parts(config, config.folder, resolution, regularisation=False)


def class_parts(config: TrainConfig, resolution: int) -> Parts:
    """List the folders with pictures of the class.

    Args:
        config: The settings of the run.
        resolution: That of the run, in pixels.

    Returns:
        The folders.
    """
    return _parts(config, config.regularisation, resolution, regularisation=True)


def _parts(config: TrainConfig, folders: tuple[Path, ...], resolution: int, *, regularisation: bool) -> Parts:
    of_run = (resolution,)
    captions, pictures = pick(CaptionSettings, config), pick(FolderSettings, config)
    found = [Part(folders, None, captions, pictures, of_run)] if folders else []
    for one in config.dataset:
        if one.regularisation == regularisation:
            own = one.overrides()
            captions, pictures = pick(CaptionSettings, config, own), pick(FolderSettings, config, own)
            found.append(Part((one.folder,), one, captions, pictures, one.resolution or of_run))
    return Parts(tuple(found))
