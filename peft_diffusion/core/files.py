"""Files that are written aside and then renamed, so that a file that has its name is whole. Imports no torch."""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have none
_ADDRESS = re.compile(r"(?i)https?:/")
_ASIDE = re.compile(r"\.(.+)\.\d+")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to. It is renamed onto ``path`` when all went well, and removed when not.

    Args:
        path: The file to make or replace. Folders above it are made where they are missing.

    Yields:
        The path of an empty file in the same folder, named as ``file_of`` recognizes.

    Raises:
        UserError: Where the path is no ordinary file, the folder cannot be written to, or the disk is full.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is there already and is no ordinary file; choose another name")
    aside: Path | None = None
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = _fresh(path)
            yield aside
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file aside and rename it.

    Args:
        path: The file to make or replace.
        data: What it is to hold.

    Raises:
        UserError: As ``written_aside`` does. What was at ``path`` then stays.
    """
    with written_aside(path) as aside:
        aside.write_bytes(data)


@contextmanager
def claimed(path: Path, complaint: str) -> Iterator[None]:
    """Keep others, on this machine and where the file system has locks on others too, from making the same file meanwhile.

    The lock is a file ``.NAME.lock`` beside it, which is gone afterwards. A process that is killed leaves the file, but no
    lock. Where the file system has no locks, there is no protection.

    Args:
        path: The file that is to be made. Its folder is made where it is missing, and removed again if nothing came of it.
        complaint: What the error says of a file that another has claimed.

    Yields:
        Nothing.

    Raises:
        UserError: Another has claimed it, or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    place = Path(os.path.realpath(path))
    missing = not place.parent.exists()
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    with explained(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(complaint) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    try:
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked:
                Path(lock.lock_file).unlink(missing_ok=True)  # before it is given back: afterwards it may be another's
        lock.release()
        if missing:
            with suppress(OSError):  # something is in it
                place.parent.rmdir()


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Tell one state of a file from others without reading it.

    Args:
        path: The file.

    Returns:
        Its size, the time of its last change in nanoseconds, and its inode.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def weights_sha256(path: Path) -> str:
    """Digest a file of gigabytes, which is read once, and again only where its stamp has changed.

    Args:
        path: The file.

    Returns:
        The SHA-256 of all bytes, as hex digits.
    """
    return _digest(path, stamp_of(path))


@cache
def _digest(path: Path, stamp: tuple[int, int, int]) -> str:
    """The SHA-256 of a file in the state that its stamp tells."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def regular(path: Path) -> Path:
    """See that what is read is no pipe, device or folder: a pipe is waited for, and may never end.

    Args:
        path: The file, which need not be there: whoever reads it tells so.

    Returns:
        The same path.

    Raises:
        UserError: It is there, and no regular file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file, but a pipe or a device; write its content to a file, and name that")
    return path


def refuse_larger(path: Path, most: int, kind: str, so: str = "it is not read") -> None:
    """See that a file of a stranger is a regular one of a sane size, before it is read.

    Args:
        path: The file.
        most: Bytes that it may have.
        kind: What such files are called, in the plural.
        so: What comes of a larger one, in words.

    Raises:
        UserError: It is larger, or no regular file.
        OSError: It is not there.
    """
    size = regular(path).stat().st_size
    if size > most:
        raise UserError(f"{path} has {size:,} bytes, and {kind} have at most {most:,}: {so}")


def file_of(name: str) -> str | None:
    """The name of the file that one with this name was written aside for.

    Args:
        name: The name of a file, without its folder.

    Returns:
        The final name, or None for a name that ``written_aside`` does not give.
    """
    match = _ASIDE.fullmatch(name)
    return match[1] if match else None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of the operating system in writing into a ``UserError``.

    Args:
        path: The file or folder that is written; the message names it where the system names no file.

    Raises:
        UserError: In place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        where, why = Path(error.filename) if isinstance(error.filename, str) else path, error.strerror or error
        where = where.with_name(file_of(where.name) or where.name)
        raise UserError(f"{where} cannot be written: {why}; free space or choose another place") from None


def lies_in(path: Path, folder: Path) -> bool:
    """Tell whether a path is another one or lies below it, whatever links lead to either.

    Args:
        path: The path, which need not exist yet.
        folder: The other, which need not exist either.

    Returns:
        Whether it does.
    """
    real, outer = (Path(os.path.realpath(one)) for one in (path, folder))
    above = (real, *real.parents)
    # By what the system says is the same, too: names may differ in case alone, and a folder may be mounted twice.
    return outer in above or (outer.exists() and any(one.exists() and one.samefile(outer) for one in above))


def refuse_overlaps(written: Iterable[tuple[str, Path]], read: Iterable[tuple[str, Path]]) -> None:
    """See that nothing is written among what is read: it would be read the next time, or replace it.

    Args:
        written: Files and folders that will be written, each with what errors call it, such as its flag.
        read: Files and folders that are read, likewise.

    Raises:
        UserError: A place to write lies in one that is read, or the other way round.
    """
    sources = [(name, source) for name, source in read if source.exists()]
    for flag, place in written:
        for name, source in sources:
            if lies_in(place, source):
                where = "is" if lies_in(source, place) else "lies in"
                raise UserError(
                    f"{flag} {place} {where} {source}, which is read as {name}: what is written there would be read the next"
                    f" time, or replace it; name another place with {flag}"
                )
            if lies_in(source, place):
                raise UserError(
                    f"{source}, which is read as {name}, lies in {flag} {place}, where the run writes its own; name another"
                    f" place with {flag}"
                )


def _fresh(path: Path) -> Path:
    """An empty file beside ``path``, made with the rights that the umask gives to any new file."""
    while True:
        aside = path.with_name(f".{path.name}.{secrets.randbelow(10**8)}")
        try:
            aside.touch(exist_ok=False)
        except FileExistsError:
            continue
        return aside


def if_address(place: str | Path) -> str:
    """What an error adds where an address of the web was given as a file.

    Args:
        place: What was given; a path has lost one of its slashes.

    Returns:
        What to do, after a semicolon; "" for anything else.
    """
    found = _ADDRESS.match(str(place))
    return "; nothing is fetched from an address: download the file, and name that" if found else ""


_LONGEST_NAME = 255  # bytes, of Linux, macOS and Windows alike


def at_home(path: Path) -> Path:
    """Put the home folder in place of a ``~`` at the start of a path, which no shell has done in files and in Python.

    Args:
        path: The path.

    Returns:
        The path; as it is where there is no such user.

    Raises:
        UserError: A name in it is longer than any system takes, or holds half a character, which the system would tell at
            the first look.
    """
    for part in path.parts:
        try:
            length = len(os.fsencode(part))
        except UnicodeEncodeError:
            raise UserError(f"{part!r} holds half a character, which no path has") from None
        if length > _LONGEST_NAME:
            raise UserError(f"{part[:40]}... has {length} bytes, and names of files have at most {_LONGEST_NAME}")
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def files_below(folder: Path) -> list[Path]:
    """List what lies in a folder and in those below it. Links are followed, to each folder once.

    A folder that is there itself is listed by its own path, whatever links lead to it: files are named by paths.

    Hidden files and folders are left out, as every program lists folders: those are waste baskets, thumbnails, checkpoints
    of notebooks, and the ``._NAME`` that macOS writes beside each NAME on foreign disks.

    Args:
        folder: The folder.

    Returns:
        Everything that is no folder, sorted; also links that lead nowhere, pipes and devices.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    waiting = [folder]
    for start in waiting:  # which grows by the links that are met
        for place, folders, files in os.walk(start):
            real = Path(place).resolve()
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            waiting += [Path(place) / name for name in folders if (Path(place) / name).is_symlink()]
            if real not in seen:
                seen.add(real)
                found += [Path(place) / name for name in files if not name.startswith(".")]
    return sorted(found)
