"""The disk of the tests, which nobody waits for."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike


def without_waiting() -> None:
    """Let ``os.fsync`` return at once in this process and in those that it forks.

    A file that was renamed is there for other processes in any case, and a run of six steps asks two dozen times. That it is
    asked for, and what a refusal does, tests of their own see.
    """
    os.fsync = _at_once


def _at_once(fd: "FileDescriptorLike") -> None:
    """Stands for ``os.fsync``."""
