"""How numbers are written for a person. Imports no torch."""


def number_of(number: int, noun: str) -> str:
    """Write a number of things.

    Args:
        number: How many.
        noun: What, in the singular; its plural has an s.

    Returns:
        "1 picture" or "2 pictures".
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
