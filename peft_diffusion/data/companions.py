"""Images that other programs leave beside those that are learned: masks, and what is no drawing of anybody."""

import posixpath
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from .caption_files import Captions, plain_name
from .images import SUFFIXES
from .problems import Problem

_FILES = rf"\.({'|'.join(suffix[1:] for suffix in sorted(SUFFIXES))})"
_ONE_TRAINER = "-masklabel"
_MASK = re.compile(rf"(?i)(.*[^/])(-mask|{_ONE_TRAINER}){_FILES}")
_MASK_FOLDERS = frozenset(("mask", "masks"))
# What each program writes into folders of pictures, by the name of a file or of a folder above it.
_OTHERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(rf"(?i)(.*/)?[^/]+-condlabel{_FILES}"), "a conditioning picture of OneTrainer's"),
    (re.compile(r"(?i)(.*/)?_controls/[^/]+"), "a control picture of ai-toolkit's"),
    (
        re.compile(r"(?i)(.*/)?(clipspace/[^/]+|clipspace-(mask|paint|painted|painted-masked)-[^/]+)"),
        "of ComfyUI's mask editor",
    ),
)
_CACHES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?i).*\.npz"), "latents or embeddings of kohya's scripts"),
    (re.compile(r"(?i)(.*/)?meta_(cap|clean|lat)\w*\.json"), "a list of kohya's scripts"),
    (re.compile(r"(?i)(.*/)?(aspect_ratio_bucket_(indices|metadata)|all_image_files)_.*\.json"), "a list of SimpleTuner's"),
    (re.compile(r"(?i).*\.latent"), "a latent of ComfyUI's"),
)


@dataclass(frozen=True)
class Companions:
    """The images of a folder that are not learned themselves.

    Attributes:
        masks: The mask of each image that has one, by the images' relative paths.
        problems: What was left out, and masks that belong to no image.
        aside: All images that are not learned.
    """

    masks: Mapping[str, str]
    problems: tuple[Problem, ...]
    aside: frozenset[str]


def find_companions(root: Path, image_names: Collection[str], captions: Captions) -> Companions:
    """Tell masks and what other programs left from the images that are learned.

    The mask of `NAME.png` is `NAME-mask.png`, OneTrainer's `NAME-masklabel.png`, or a `NAME` in a folder `masks` beside it.
    An image of its own caption is no mask, nor is a lone `gas-mask.png` in a folder without masks.

    Args:
        root: The folder.
        image_names: The relative paths of all images in it.
        captions: What its caption files say.

    Returns:
        What is not to be learned.
    """
    left_out = {name: what for name in image_names for pattern, what in _OTHERS if pattern.fullmatch(name)}
    rest = [name for name in image_names if name not in left_out]
    stems = {posixpath.splitext(plain_name(name))[0]: name for name in rest}
    named = {name: stem for name in rest if (stem := _stem_of_owner(plain_name(name))) and not captions.of(name)[0]}
    owners = {name: stems.get(stem) for name, stem in named.items()}
    masks = {owner: name for name, owner in owners.items() if owner is not None and owner not in named}
    folders = {posixpath.dirname(name) for name in masks.values()}
    unmatched = [name for name in named if name not in masks.values() and _is_mask(name, bool(masks), folders)]
    problems = [_other(root / name, what) for name, what in left_out.items()]
    problems += [_mask_without_picture(root / name) for name in unmatched]
    return Companions(masks, tuple(problems), frozenset((*left_out, *masks.values(), *unmatched)))


def cache_problem(path: Path) -> Problem | None:
    """Recognise what other programs keep beside images that is no image.

    Args:
        path: A file.

    Returns:
        What is said of it; None for a file that no program is known to leave.
    """
    what = next((what for pattern, what in _CACHES if pattern.fullmatch(path.name)), None)
    return None if what is None else _other(path, what)


def _stem_of_owner(name: str) -> str:
    """The path, without its ending, of the image that one with this name may be the mask of; "" where none."""
    match = _MASK.fullmatch(name)
    if match:
        return match[1]
    folder, file = posixpath.split(name)
    above, own = posixpath.split(folder)
    return posixpath.join(above, posixpath.splitext(file)[0]) if own.lower() in _MASK_FOLDERS else ""


def _is_mask(name: str, others: bool, folders: Collection[str]) -> bool:
    """Whether an image that is named as a mask, and belongs to no other, is one: it may as well show a mask.

    ``others`` says that there are masks, and ``folders`` where.
    """
    match = _MASK.fullmatch(name)
    if match is None:
        return posixpath.dirname(name) in folders
    return others or match[2].lower() == _ONE_TRAINER


def _other(path: Path, what: str) -> Problem:
    return Problem(
        str(path), "file of another program", f"{what}, which is not learned", "Keep it, or move it out of the folder"
    )


def _mask_without_picture(path: Path) -> Problem:
    return Problem(str(path), "mask without a picture", "no picture has this name", "Rename it or delete it")
