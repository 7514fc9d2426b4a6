"""Repeats and loss weights of images by the subfolder that they are in."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from peft_diffusion.core.errors import UserError

from ..core.wording import number_of
from .folder import TrainingImage
from .folder_names import repeats_and_words

_Number = TypeVar("_Number", int, float)


def apply(
    pictures: Sequence[TrainingImage],
    repeats: Sequence[str] = (),
    weights: Sequence[str] = (),
    usual: Sequence[tuple[int | None, float | None]] = (),
) -> list[TrainingImage]:
    """Give images the repeats and weights of their subfolders.

    A subfolder is named by its path below the image folder ("a/b"), an image folder by its own name. A value for a folder
    also holds for the folders below it that have none of their own. Without a value, `10_name` is drawn 10 times (kohya's
    convention).

    Args:
        pictures: The images.
        repeats: `SUBFOLDER=N` texts, N 1 or more.
        weights: `SUBFOLDER=WEIGHT` texts, the weight 0 or more.
        usual: For each data set of the images, the repeats and the weight of those for which no text says it; None where
            it says none either.

    Returns:
        The images with `repeats` and `weight` set.

    Raises:
        UserError: A text is malformed, a number is out of range, or no image is in such a subfolder.
    """
    given = _parse(repeats, "--repeats", int, 1)
    counts = _parse(weights, "--folder-weight", float, 0)
    inside = [picture.places for picture in pictures]  # which asks the disk
    places = {place for names in inside for place in names}
    for flag, names in (("--repeats", given), ("--folder-weight", counts)):
        unknown = [name for name in names if name not in places]
        if unknown:
            there = ", ".join(sorted(places)[:8])
            raise UserError(f"{flag} {unknown[0]}: no picture is in a subfolder of this name; there are: {there}")
    found = []
    for picture, around in zip(pictures, inside, strict=True):
        times, counted = usual[picture.dataset] if usual else (None, None)
        usual_weight = 1.0 if counted is None else counted
        said = (given[place] for place in around if place in given)
        named = (given.get(place) or repeats_and_words(place.rpartition("/")[2])[0] for place in around)
        found.append(
            replace(
                picture,
                # The name of an inner folder is nearer than what is said of an outer one, not than its data set's own.
                repeats=next((one for one in named if one), 1) if times is None else next(said, times),
                weight=next((counts[place] for place in around if place in counts), usual_weight),
            )
        )
    return found


def check(repeats: Sequence[str], weights: Sequence[str]) -> None:
    """See that texts are what `apply` takes, before there are images.

    Args:
        repeats: See `apply`.
        weights: See `apply`.

    Raises:
        UserError: A text is malformed, or a number is out of range.
    """
    _parse(repeats, "--repeats", int, 1)
    _parse(weights, "--folder-weight", float, 0)


def describe(pictures: Sequence[TrainingImage]) -> list[str]:
    """List the subfolders whose images are drawn more than once an epoch or have a weight other than 1.

    Args:
        pictures: The images after `apply`.

    Returns:
        Lines of plain text.
    """
    found: dict[str, tuple[int, float, int]] = {}
    for picture in pictures:
        if picture.repeats != 1 or picture.weight != 1:
            place = picture.places[0]
            found[place] = picture.repeats, picture.weight, found.get(place, (0, 0, 0))[2] + 1
    return [
        f"{place}: {number_of(count, 'picture')}, each drawn {number_of(repeats, 'time')} an epoch, weight {weight:g}"
        for place, (repeats, weight, count) in sorted(found.items())
    ]


def _parse(texts: Sequence[str], flag: str, kind: Callable[[str], _Number], least: int) -> dict[str, _Number]:
    found = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            found[name.strip("/")] = value = kind(number)
        except ValueError:
            value = kind("-1")
        if not equals or not name or not least <= value < 1e6:
            raise UserError(f"{flag} {text!r}: write SUBFOLDER=NUMBER, the number {least} or more")
    return found
