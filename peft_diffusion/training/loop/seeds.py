"""Chance as a function of where one is: nothing depends on what was drawn before, so a resumed run draws the same."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*key: int | str) -> int:
    """Make a seed for a place in a run.

    Args:
        key: What names the place, such as (seed, "noise", step, micro-batch).

    Returns:
        A number of 63 bits: the same for the same key, on every machine.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Make a generator for a place in a run. It is on the CPU, whatever the device: the same numbers everywhere.

    Args:
        key: What names the place: see `seed_of`.

    Returns:
        The generator.
    """
    return torch.Generator().manual_seed(seed_of(*key))


@contextmanager
def global_seed(device: torch.device, *key: int | str) -> Iterator[None]:
    """Put torch's global generators at the seed of a place, for code that takes none.

    Args:
        device: Whose generator, besides the CPU's.
        key: The place.

    Yields:
        Once; afterwards the generators are as they were.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*key))
        yield
