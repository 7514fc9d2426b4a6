"""Numbers as products of two."""

import math


def split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of ``size``, the smaller first: ``factor`` and the rest where it divides, else the most equal ones
    whose smaller is at most ``factor`` (-1: without a limit), found as LyCORIS' ``factorization`` finds them.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= limit)
    return small, size // small
