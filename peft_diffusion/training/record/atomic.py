"""Files of a run, written aside and then renamed: what has a name is whole. Imports no torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...core.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file aside, to the disk, and give it its name. Raises UserError, leaving nothing, where that fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(path):
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """The system's errors in writing as a UserError that names the place."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise UserError(f"{where} cannot be written: {why}; free space or choose another place") from None
