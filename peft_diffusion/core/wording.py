"""How numbers and choices are written for a person. Imports no torch."""

from collections.abc import Sequence


def number_of(number: int, noun: str) -> str:
    """Write a number of things.

    Args:
        number: How many.
        noun: What, in the singular; its plural has an s.

    Returns:
        "1 picture" or "2 pictures".
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shares(counts: Sequence[tuple[str, int]]) -> str:
    """Write how many there are of each.

    Args:
        counts: Names, each with its number.

    Returns:
        "2 of ink, none of flat".
    """
    return ", ".join(f"{number or 'none'} of {name}" for name, number in counts)


def any_of(several: Sequence[str]) -> str:
    """Write what there is to choose from.

    Args:
        several: Two or more.

    Returns:
        "one, another, or a third".
    """
    return f"{', '.join(several[:-1])}, or {several[-1]}"


def first_of(several: Sequence[object]) -> str:
    """Write the first of what is alike, and how much more there is.

    Args:
        several: One or more.

    Returns:
        "one", or "one (and 2 more like it)".
    """
    return f"{several[0]}" + (f" (and {len(several) - 1} more like it)" if len(several) > 1 else "")
