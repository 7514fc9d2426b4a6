"""Describe the pictures of a folder, change captions that are there, and count what they hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.events import Ended, Observer, Warned, observed, progress
from ..core.files import write_bytes
from ..core.wording import number_of
from .caption_edits import Statistics, edit, statistics
from .caption_settings import CaptionConfig
from .folder import ImageFolder, TrainingImage, scan
from .images import Checks, open_picture


@dataclass(frozen=True)
class Captioned:
    """What became of the captions of folders.

    Attributes:
        written: The files with new captions.
        kept: How many captions were there already, and stayed.
        empty: Pictures for which a model found no words.
        edited: The files in which words were replaced.
        statistics: What the captions hold now, where that was asked for.
    """

    written: tuple[Path, ...] = ()
    kept: int = 0
    empty: tuple[Path, ...] = ()
    edited: tuple[Path, ...] = ()
    statistics: Statistics | None = None

    def lines(self) -> tuple[str, ...]:
        """Tell how many captions were written, kept and changed."""
        lines = [f"wrote {number_of(len(self.written), 'caption')}"] if self.written else []
        if self.kept:
            lines.append(f"kept {number_of(self.kept, 'caption')} (--overwrite replaces them)")
        if self.empty:
            lines.append(f"no words for {number_of(len(self.empty), 'picture')}, as {self.empty[0]}; lower --threshold")
        lines += [f"changed {number_of(len(self.edited), 'caption')}"] if self.edited else []
        return tuple(lines)


def caption(config: CaptionConfig, *, observers: Sequence[Observer] = ()) -> Captioned:
    """Write captions beside pictures, replace words in them and count what they hold, as far as each is asked for.

    Each caption is written aside and renamed as soon as it is made, so that what was done stays where it is stopped.

    Args:
        config: What is to be done.
        observers: Are told how far it is, and last of all what was done.

    Returns:
        What was done.

    Raises:
        UserError: A folder or model cannot be read, or a file not be written.
    """
    with observed(observers) as tell:
        checks = Checks()
        folder = _read(config, tell, checks)
        written, kept, empty = _describe(config, folder.pictures, tell) if config.model else ([], 0, [])
        edited: list[Path] = []
        if config.edit:
            folder = _read(config, tell, checks) if written else folder
            pairs = [text.partition("=") for text in config.edit]
            edited, elsewhere = edit(folder.pictures, [(find.strip(), to.strip()) for find, _, to in pairs])
            if elsewhere:
                told = f"{number_of(elsewhere, 'caption')} in metadata files stayed"
                tell(Warned(f"{told}: --edit changes the files beside pictures"))
            if not edited:
                tell(Warned("no caption holds what --edit replaces; it takes whole words, in the same case of letters"))
        counted = None
        if config.stats or config.json:
            folder = _read(config, tell, checks) if written or edited else folder
            counted = statistics(folder.pictures)
        done = Captioned(tuple(written), kept, tuple(empty), tuple(edited), counted)
        tell(Ended("finished", done))
        return done


def _read(config: CaptionConfig, tell: Observer, checks: Checks) -> ImageFolder:
    """The pictures and their captions. What cannot be read is told."""
    tick = progress(tell, "reading pictures")
    folder = scan(config.folder, missing="empty", masks=False, on_progress=tick, checks=checks)
    for problem in folder.problems:
        if problem.stops:
            tell(Warned(f"{problem}; what belongs to it is left as it is"))
    return folder


def _describe(
    config: CaptionConfig, pictures: Sequence[TrainingImage], tell: Observer
) -> tuple[list[Path], int, list[Path]]:
    """Write captions; returns the files, how many were there already, and the pictures without words."""
    targets: dict[Path, TrainingImage] = {}
    kept = 0
    for picture in pictures:
        file = picture.caption_file or picture.path.with_suffix(".txt")
        if not config.overwrite and (picture.source in ("sidecar", "metadata") or file.exists()):
            kept += 1
        else:
            targets.setdefault(file, picture)  # of two pictures with one name the first is described
    if not targets:
        return [], kept, []
    from .caption_models import load_captioner  # imports torch

    captioner, tick = load_captioner(config), progress(tell, "describing pictures")
    written: list[Path] = []
    empty: list[Path] = []
    items = list(targets.items())
    for start in range(0, len(items), config.batch_size):
        tick(start, len(items))
        batch = items[start : start + config.batch_size]
        texts = captioner.describe([open_picture(picture.path, digest=picture.digest) for _, picture in batch])
        for (file, picture), text in zip(batch, texts, strict=True):
            if text:
                write_bytes(file, f"{text}\n".encode())
                written.append(file)
            else:
                empty.append(picture.path)
    tick(len(items), len(items))
    return written, kept, empty
