"""How much memory this process has held. Imports no torch."""

import sys


def peak_memory() -> int:
    """Tell the most memory that this process has held.

    Returns:
        Bytes that were in use at once, since it began; 0 where the system does not tell.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
