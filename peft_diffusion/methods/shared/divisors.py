"""Numbers as products of two."""

import math


def split(size: int, factor: int) -> tuple[int, int]:
    """Split a size into two factors, as LyCORIS' ``factorization`` does.

    Args:
        size: The size.
        factor: The first, where it divides; else a limit of the smaller one, -1 for none.

    Returns:
        The factors, the smaller first, as equal as they can be.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= limit)
    return small, size // small
