"""Read an image folder before any computation: its images, their captions, and every problem in it."""

import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from peft_diffusion.core.errors import UserError

from ..core.wording import first_of, number_of
from . import picture_names
from .caption_files import SIDECARS, Captions, Source, is_metadata, is_sidecar, name_captions, plain_name, read_captions
from .companions import cache_problem, find_companions
from .drawn_from import NOTHING, Told
from .folder_names import repeats_and_words
from .images import MAX_PIXELS, SUFFIXES, Checked, Checks, open_mask, open_picture
from .problems import PictureError, Problem

__all__ = ["ImageFolder", "Missing", "Problem", "TrainingImage", "open_picture", "scan"]

Missing = Literal["stop", "name", "recipe", "empty", "skip"]
"""What becomes of pictures without a caption: stop, use the file name or the prompt that the picture was drawn from, use no
words, or leave them out."""
MISSING_CAPTION = "missing caption"
"""The kind of problem that a picture without a caption is."""


@dataclass(frozen=True)
class CaptionSource:
    """Where the captions of a folder come from.

    Attributes:
        source: Text files, or else prompts that pictures carry and names (auto); files alone; names of pictures alone; or
            ``caption`` for all (caption).
        caption: That of pictures that have none; each line is an alternative.
        extensions: What the names of caption files end in, in small letters.
    """

    source: Literal["auto", "files", "names", "caption"] = "auto"
    caption: str = ""
    extensions: tuple[str, ...] = SIDECARS


_SOURCE_WORDS: dict[Source, str] = {
    "sidecar": "text files beside the pictures",
    "metadata": "metadata files",
    "recipe": "the prompts that pictures carry, which they were drawn from",
    "name": "file names",
    "folder": "names of folders, as kohya's 10_WORDS",
    "dataset": "what is said of the folder",
    "none": "nowhere (empty captions)",
}
_COMPANIONS = re.compile(
    r"(?i)(licen[cs]e|readme|attribution|notice|copying|credits|authors)([\W_].*)?|.*\.(md|safetensors)"
)
_FOLDERS_SHOWN = 8
_NO_CAPTION: tuple[str, Source] = "", "none"
_LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"))
_CONVERTIBLE = (picture_names.SUFFIXES | picture_names.CONVERTIBLE) - SUFFIXES


@dataclass(frozen=True)
class TrainingImage:
    """A usable image of a folder.

    Attributes:
        path: The file.
        name: Its POSIX path below the folder that was read.
        caption: The caption as written, before the trigger is added; each line of it is an alternative.
        source: Where the caption came from.
        width: Pixels, after EXIF rotation.
        height: Pixels, after EXIF rotation.
        digest: SHA-256 of the file's bytes, in hex.
        mask: An image of the same size that is white where this one is learned; None to learn all of it.
        mask_digest: SHA-256 of the mask's bytes; "" without a mask.
        repeats: How often an epoch draws it, 1 or more.
        weight: Its factor in the loss, 0 or more.
        dataset: Which of the data sets of a run it is of, from 0.
        caption_file: The file beside it that its caption came from, or is left blank; None where there is none.
    """

    path: Path
    name: str
    caption: str
    source: Source
    width: int
    height: int
    digest: str
    mask: Path | None = None
    mask_digest: str = ""
    repeats: int = 1
    weight: float = 1.0
    dataset: int = 0
    caption_file: Path | None = None

    @property
    def subfolder(self) -> str:
        """The folder part of `name`; "" at the top."""
        return posixpath.dirname(self.name)

    @property
    def places(self) -> list[str]:
        """The subfolders that it is in, the innermost first, and the name of the folder that was read last."""
        parts = self.subfolder.split("/") if self.subfolder else []
        root = self.path.parents[len(parts)].resolve().name
        return [*("/".join(parts[:end]) for end in range(len(parts), 0, -1)), root]


@dataclass(frozen=True)
class ImageFolder:
    """The images that can be trained on, in a fixed order, and the problems found while reading.

    Attributes:
        folders: The folders as they were given.
        pictures: The usable images: folders in the order given, then by relative path.
        problems: Everything that was wrong, with its fix.
    """

    folders: tuple[Path, ...]
    pictures: tuple[TrainingImage, ...]
    problems: tuple[Problem, ...]

    @property
    def sources(self) -> dict[Source, int]:
        """The number of captions by where they came from."""
        return dict(Counter(picture.source for picture in self.pictures))

    @property
    def by_kind(self) -> dict[str, list[Problem]]:
        """The problems by their kinds."""
        found: dict[str, list[Problem]] = {}
        for problem in self.problems:
            found.setdefault(problem.kind, []).append(problem)
        return found

    def check(self) -> None:
        """Stop if a problem makes training impossible. Call it after showing `describe()`.

        Raises:
            UserError: The first problem that stops, and how many more there are.
        """
        stopping = [problem for problem in self.problems if problem.stops]
        if stopping:
            raise UserError(first_of(stopping))

    def describe(self, shown: int = 5) -> list[str]:
        """Describe the folder in lines of plain text.

        Args:
            shown: The most problems of one kind that are listed.

        Returns:
            What there is, where captions come from, and the problems by kind.
        """
        words = ", ".join(str(folder) for folder in self.folders)
        lines = [f"{words}: {number_of(len(self.pictures), 'picture')}{_size_range(self.pictures)}"]
        masked = sum(picture.mask is not None for picture in self.pictures)
        lines += [f"{number_of(masked, 'mask')}: only what is white there is learned"] if masked else []
        lines += [f"{number_of(count, 'caption')} from {_SOURCE_WORDS[source]}" for source, count in self.sources.items()]
        several = sum("\n" in picture.caption for picture in self.pictures)
        if several:
            how = "each an alternative: --wildcards draws one at each step, without it the first is taken"
            lines.append(f"{number_of(several, 'caption')} with several lines, {how}")
        for kind, problems in self.by_kind.items():
            lines.append(f"{kind}: {len(problems)}{' (training stops)' if problems[0].stops else ''}")
            lines += [f"  {problem}" for problem in problems[:shown]]
            lines += [f"  and {len(problems) - shown} more"] if len(problems) > shown else []
        return lines


@dataclass(frozen=True)
class _Listing:
    """The files of a folder: those that can be read, by their relative paths, and those that are no ordinary files."""

    root: Path
    names: list[str]
    strange: list[str]


@dataclass(frozen=True)
class _Limits:
    resolution: int | None
    missing: Missing
    max_pixels: int
    masks: bool
    captions: CaptionSource
    checks: Checks


def scan(
    folders: Path | str | Sequence[Path | str],
    *,
    resolution: int | None = None,
    missing: Missing = "stop",
    masks: bool = True,
    subfolders: bool = True,
    captions: CaptionSource = CaptionSource(),
    max_pixels: int = MAX_PIXELS,
    on_progress: Callable[[int, int], None] | None = None,
    checks: Checks | None = None,
) -> ImageFolder:
    """Read image folders with their subfolders; every image is decoded, to be sure of it.

    Captions come from files beside the images, from `metadata.jsonl` or `metadata.csv`; in a folder that has neither from
    its words where it is called as `10_mychar woman`, from the recipes that drawn images carry, or from file names.
    `NAME-mask.png` beside an image NAME is not an image but its mask; see `companions` for what else is not learned.

    Args:
        folders: One folder or several, which are read as one.
        resolution: Pixels; images whose smaller side is under half of it are left out. None keeps all sizes.
        missing: What happens to an image without a caption.
        masks: Whether masks are used.
        subfolders: Whether folders in them are read.
        captions: Where captions come from.
        max_pixels: Images above this many pixels are never decoded.
        on_progress: Called with the number of images read so far and their total.
        checks: Images that were decoded for this before, and are not again; those of this reading come to them.

    Returns:
        The images in the order of the folders given, then of relative paths, and the problems.

    Raises:
        UserError: There is nothing to train on, or a folder does not exist.
    """
    if missing not in get_args(Missing):
        raise UserError(f'unknown choice "{missing}" for missing captions: {", ".join(get_args(Missing))} are known')
    given = [folders] if isinstance(folders, (str, Path)) else folders
    roots = list(dict.fromkeys(Path(folder) for folder in given))
    if not roots:
        raise UserError("no image folder was given: name at least one")
    listings = [_list(_folder(root), subfolders) for root in roots]
    total = sum(_is_picture(name) for one in listings for name in one.names)
    ticks = iter(range(1, total + 1))

    def tick() -> None:
        if on_progress is not None:
            on_progress(next(ticks), total)

    limits = _Limits(resolution, missing, max_pixels, masks, captions, Checks() if checks is None else checks)
    pictures: list[TrainingImage] = []
    problems: list[Problem] = []
    for listing in listings:
        found, wrong = _scan_root(listing, limits, tick)
        pictures += found
        problems += wrong
    kept, repeated = _drop_duplicates(pictures)
    result = ImageFolder(tuple(roots), kept, (*problems, *repeated))
    _check_not_empty(result, listings)
    return result


def check_folders(folders: Sequence[Path], subfolders: bool = True) -> None:
    """See that there are folders, and a picture in one of them by its name; nothing is read.

    Args:
        folders: The folders.
        subfolders: Whether folders in them count.

    Raises:
        UserError: There is nothing to train on, or a folder does not exist.
    """
    listings = [_list(_folder(root), subfolders) for root in folders]
    if not any(_is_picture(name) for one in listings for name in (*one.names, *one.strange)):
        _check_not_empty(ImageFolder(tuple(folders), (), ()), listings)


def _check_not_empty(folder: ImageFolder, listings: Iterable[_Listing]) -> None:
    """Stop only where nothing could be used whatever the user waives: missing captions have their own message."""
    if folder.pictures or any(problem.stops for problem in folder.problems):
        return
    words = ", ".join(str(path) for path in folder.folders)
    names = [name for one in listings for name in (*one.names, *one.strange)]
    if folder.problems:
        raise UserError(f"no usable picture in {words}; {number_of(len(names), 'file')}, the first: {folder.problems[0]}")
    there = f"only {', '.join(map(_shown, names[:3]))}" if names else "it is empty"
    raise UserError(f"no picture in {words} ({there}): put PNG, JPEG, WebP, GIF, BMP or TIFF files there")


def _folder(root: Path) -> Path:
    if not _is_text(str(root)):
        raise UserError(f"the name of the folder {_shown(str(root))} is not UTF-8; rename it")
    if root.is_file():
        raise UserError(f"{root} is a file: name the folder that holds the pictures")
    if not root.is_dir() and Path(str(root).rpartition("=")[0]).is_file():
        raise UserError(
            f"{root} is an adapter and no folder of pictures; a flag takes several with commas between: A=0.7,B=0.5"
        )
    if not root.is_dir():
        near = next((parent for parent in root.absolute().parents if parent.is_dir()), Path("/"))
        names = sorted(path.name for path in near.iterdir() if path.is_dir() and not _hidden(path.name))
        more = f" and {len(names) - _FOLDERS_SHOWN} more" if len(names) > _FOLDERS_SHOWN else ""
        there = ", ".join(names[:_FOLDERS_SHOWN]) + more
        raise UserError(f"there is no folder {root}; {near} has the folders: {there or 'none'}")
    return root


def _list(root: Path, subfolders: bool) -> _Listing:
    """All files below `root`, or in it, sorted, without hidden ones and system litter; links are followed.

    A pipe, socket or device may never end, whatever it is called, and is not read.
    """
    names: list[str] = []
    seen: set[Path] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        real = Path(place).resolve()
        folders[:] = [] if real in seen or not subfolders else [name for name in folders if not _hidden(name)]
        if real not in seen:
            seen.add(real)
            names += [(Path(place) / name).relative_to(root).as_posix() for name in files if not _hidden(name)]
    strange = {name for name in names if (root / name).exists() and not (root / name).is_file()}
    return _Listing(root, sorted(name for name in names if name not in strange), sorted(strange))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _is_text(name: str) -> bool:
    """Whether a name can be written down: the system's bytes need not be UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    """A name with question marks for what is no text in it."""
    return name.encode("utf-8", "replace").decode()


def _unreadable_name(root: Path, name: str) -> Problem:
    return Problem(_shown(str(root / name)), "name that is no text", "the name is not UTF-8, so it is left out", "Rename it")


def _is_picture(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def _scan_root(listing: _Listing, limits: _Limits, tick: Callable[[], None]) -> tuple[list[TrainingImage], list[Problem]]:
    root = listing.root
    unreadable = [name for name in listing.names if not _is_text(name)]
    names = [name for name in listing.names if _is_text(name)]
    image_names = [name for name in names if _is_picture(name)]
    names = _without_companions(names, image_names)
    extensions = limits.captions.extensions
    captions = read_captions(root, names, image_names, extensions)
    companions = find_companions(root, image_names, captions)
    others = [name for name in names if not (_is_picture(name) or is_sidecar(name, extensions) or is_metadata(name))]
    problems = [*(_unreadable_name(root, name) for name in unreadable), *(_other_file(root, name) for name in others)]
    problems += [_strange_file(root / _shown(name)) for name in listing.strange]
    problems += (*captions.problems, *companions.problems)
    image_names = [name for name in image_names if name not in companions.aside]
    for _ in (*companions.aside, *filter(_is_picture, unreadable)):
        tick()
    pictures: list[TrainingImage] = []
    drawn: dict[str, Told] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checks = pool.map(lambda name: _check(root / name, limits), image_names)
        for name, checked in zip(image_names, checks, strict=True):
            tick()
            if isinstance(checked, Problem):
                problems.append(checked)
            else:
                pictures.append(TrainingImage(root / name, name, "", "none", checked.width, checked.height, checked.digest))
                drawn[name] = checked.told
    captioned, missing = _caption(pictures, captions, drawn, limits)
    files = {name: root / file for name, file in captions.files.items()}
    captioned = [replace(one, caption_file=files.get(plain_name(one.name))) for one in captioned]
    problems += missing
    if limits.masks:
        found = [_with_mask(picture, root, companions.masks.get(picture.name), limits) for picture in captioned]
        problems += [one for one in found if isinstance(one, Problem)]
        captioned = [one for one in found if isinstance(one, TrainingImage)]
    return captioned, problems


def _with_mask(picture: TrainingImage, root: Path, name: str | None, limits: _Limits) -> TrainingImage | Problem:
    """The picture with its mask, or what is wrong with that."""
    if name is None:
        return picture
    try:
        checked = limits.checks.check(root / name, limits.max_pixels)
        empty = open_mask(root / name, limits.max_pixels, checked.digest).getbbox() is None
    except PictureError as error:
        return replace(error.problem, stops=True)
    size, wanted = f"{checked.width}x{checked.height}", f"{picture.width}x{picture.height}"
    if size != wanted:
        message = f"the mask is {size}, its picture {wanted}"
        return Problem(str(root / name), "mask of another size", message, "Draw it over the picture itself", stops=True)
    if empty:
        message = "the mask is all black, so nothing of the picture would be learned"
        return Problem(str(root / name), "empty mask", message, "Make white what shall be learned", stops=True)
    return replace(picture, mask=root / name, mask_digest=checked.digest)


def _without_companions(names: list[str], image_names: list[str]) -> list[str]:
    """The files but for licences and the like; `license_plate.txt` beside `license_plate.png` is a caption."""
    stems = {posixpath.splitext(plain_name(name))[0] for name in image_names}
    return [
        name
        for name in names
        if posixpath.splitext(plain_name(name))[0] in stems or not _COMPANIONS.fullmatch(posixpath.basename(name))
    ]


def _check(path: Path, limits: _Limits) -> Checked | Problem:
    try:
        checked = limits.checks.check(path, limits.max_pixels)
    except PictureError as error:
        return error.problem
    resolution = limits.resolution
    if resolution is not None and 2 * min(checked.width, checked.height) < resolution:
        message = f"{checked.width}x{checked.height} is too small for a resolution of {resolution}"
        return Problem(str(path), "picture too small", message, "Find a larger copy or train at a lower resolution")
    return checked


def _other_file(root: Path, name: str) -> Problem:
    suffix = posixpath.splitext(name)[1].lower()
    fix = "Convert it to PNG or JPEG" if suffix in _CONVERTIBLE else "Move it out of the folder"
    return cache_problem(root / name) or Problem(
        str(root / name), "not a picture", f"{suffix or 'a file without an extension'} is not read", fix
    )


def _strange_file(path: Path) -> Problem:
    return Problem(str(path), "no ordinary file", "a pipe, socket or device, which is not read", "Put a file in its place")


def _caption(
    pictures: list[TrainingImage], captions: Captions, drawn: Mapping[str, Told], limits: _Limits
) -> tuple[list[TrainingImage], list[Problem]]:
    """Pictures with their captions. Prompts that pictures carry and file names count only where the folder has no caption
    files, or as the fallback.

    Pictures whose caption cannot be read are left to that problem, which stops.
    """
    missing, wanted = limits.missing, limits.captions
    if wanted.source == "caption":
        source: Source = "dataset" if wanted.caption else "none"
        return [replace(picture, caption=wanted.caption, source=source) for picture in pictures], []
    pictures = [picture for picture in pictures if plain_name(picture.name) not in captions.broken]
    names = name_captions({_stem(picture) for picture in pictures})
    captioned = {place for picture in pictures if captions.of(picture.name)[0] for place, _ in _kohya_folders(picture)}
    found: list[TrainingImage] = []
    problems: list[Problem] = []
    for picture in pictures:
        folder = next((words for place, words in _kohya_folders(picture) if place not in captioned), "")
        name = names[_stem(picture)] if missing == "name" or not captions.any_files else ""
        told = drawn[picture.name] if missing == "recipe" or not captions.any_files else NOTHING
        ways: list[tuple[str, Source]] = [(folder, "folder"), (told.prompt, "recipe"), (name, "name")]
        # What --missing-captions says is asked for in words, names of folders by their form alone.
        ways = [captions.of(picture.name), *sorted(ways, key=lambda way: way[1] != missing)]
        if wanted.source != "auto":
            ways = ways[:1] if wanted.source == "files" else [(names[_stem(picture)], "name")]
        ways.insert(1, (wanted.caption, "dataset"))  # what a person says of a folder is nearer than names
        caption, source = next((way for way in ways if way[0]), _NO_CAPTION)
        if not caption:
            problems.append(_missing(picture, captions, missing))
        if told.wrong and source in ("name", "none") and wanted.source == "auto" and missing != "name":
            fix = f"Write its caption into {picture.path.with_suffix('.txt').name} beside it"
            problems.append(Problem(str(picture.path), "damaged recipe", told.wrong, fix))
        if caption or missing in ("name", "empty"):
            found.append(replace(picture, caption=caption, source=source))
    return found, problems


def _stem(picture: TrainingImage) -> str:
    return posixpath.splitext(posixpath.basename(picture.name))[0]


def _kohya_folders(picture: TrainingImage) -> list[tuple[str, str]]:
    """The folders above a picture that are named as kohya's, the innermost first, each with its words."""
    named = [(place, repeats_and_words(posixpath.basename(place))[1]) for place in picture.places]
    return [(place, words) for place, words in named if words]


def _missing(picture: TrainingImage, captions: Captions, missing: Missing) -> Problem:
    blank = plain_name(picture.name) in captions.sidecars  # it is there, and says nothing
    why = "other pictures have captions, this one has none" if captions.any_files else "the file name says nothing"
    why = "its caption file is empty" if blank else why
    why += ", nor the prompt that it was drawn from" if missing == "recipe" else ""
    then = {"name": ": used without words", "empty": ": used without words", "skip": ": left out"}.get(missing, "")
    fix = f"Write {'it' if blank else 'one'} into {picture.path.with_suffix('.txt').name} beside it"
    others = {"stop": "name, recipe, empty or skip", "recipe": "name, empty or skip"}.get(missing)
    waive = f", or take --missing-captions {others}" if others else ""
    return Problem(str(picture.path), MISSING_CAPTION, why + then, fix + waive, stops=others is not None)


def _drop_duplicates(pictures: Iterable[TrainingImage]) -> tuple[tuple[TrainingImage, ...], list[Problem]]:
    first: dict[str, TrainingImage] = {}
    problems: list[Problem] = []
    for picture in pictures:
        kept = first.setdefault(picture.digest, picture)
        if kept is not picture:
            other = "" if kept.caption == picture.caption else ", though with another caption"
            message = f"the same content as {kept.path}{other}; left out"
            problems.append(Problem(str(picture.path), "duplicate", message, "Delete one of the two"))
    return tuple(first.values()), problems


def _size_range(pictures: Sequence[TrainingImage]) -> str:
    sizes = sorted({(picture.width, picture.height) for picture in pictures}, key=lambda size: (math.prod(size), size))
    if not sizes:
        return ""
    (width, height), (wide, high) = sizes[0], sizes[-1]
    return f", {width}x{height}" if len(sizes) == 1 else f", {width}x{height} to {wide}x{high}"
