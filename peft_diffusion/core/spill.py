"""Tensors that wait in a file instead of in memory."""

import mmap
import tempfile
import weakref
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .checksums import bytes_of
from .files import explained

_LEAST = 1 << 15  # bytes; a smaller tensor stays in memory, where it takes less than the pages around it would
_SEGMENT = 1 << 26  # bytes of the file that are mapped at once: each mapping keeps a file open, and systems allow few


class Spill:
    """A file without a name, in which tensors lie until they are needed again.

    What is put aside is mapped: it looks like any tensor, and takes memory only from when it is read until it is released.
    It is never written through the mapping, in which a full disk would end the process.
    The file is gone with the last of the tensors, also when the process is killed.

    Args:
        beside: The file that the tensors will be written to, which need not exist yet. Theirs lies on the same disk.
    """

    def __init__(self, beside: Path) -> None:
        self._beside = beside
        self._file: IO[bytes] | None = None
        self._end = self._room = 0  # of what is written, and of the last segment
        self._segment: mmap.mmap | None = None
        self._places: dict[int, tuple[mmap.mmap, int, int]] = {}  # by address: segment, start there, and bytes

    def put(self, tensor: Tensor) -> Tensor:
        """Put a tensor aside.

        Args:
            tensor: On the CPU; all its numbers are written, not more of a storage that it is a view of.

        Returns:
            The same numbers, contiguous, which must not be changed in place. A small tensor stays in memory: it is given
            back itself, or a copy of it where its storage holds more.

        Raises:
            UserError: The disk is full, or the folder cannot be written to.
        """
        size = tensor.numel() * tensor.itemsize
        if size < _LEAST:
            return tensor if tensor.untyped_storage().nbytes() <= size else tensor.clone()
        data = bytes_of(tensor)
        with explained(self._beside):
            segment, start = self._placed(len(data))
            found = torch.frombuffer(segment, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
            rest = data
            while rest:
                rest = rest[self._opened().write(rest) :]
        self._places[found.data_ptr()] = segment, start, len(data)
        return found

    def release(self, tensor: Tensor) -> None:
        """Let the memory go that a tensor was read into. Its numbers stay in the file, and can be read again.

        Args:
            tensor: What `put` gave, or a view of that; nothing happens with any other tensor.
        """
        place = self._places.get(tensor.untyped_storage().data_ptr())
        if place is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            segment, start, size = place
            segment.madvise(mmap.MADV_DONTNEED, start, size)

    def _placed(self, size: int) -> tuple[mmap.mmap, int]:
        """The segment of the file for so many bytes, and where they begin there; the file stands at that place."""
        file, pages = self._opened(), -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._segment is None or self._end + pages > self._room:
            self._end, self._room = self._room, self._room + max(pages, _SEGMENT)
            file.truncate(self._room)  # takes no disk before something is written there
            length = self._room - self._end
            self._segment = mmap.mmap(file.fileno(), length, offset=self._end, access=mmap.ACCESS_WRITE)
        start = self._end - (self._room - len(self._segment))
        file.seek(self._end)
        self._end += pages
        return self._segment, start

    def _opened(self) -> IO[bytes]:
        """The file, without a buffer: what is left in one when the disk is full would be written again when it is closed."""
        if self._file is None:
            folder = next(one for one in self._beside.absolute().parents if one.is_dir())
            try:
                self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
            except OSError as error:  # which names a file that nobody has heard of
                raise OSError(error.errno, error.strerror, str(self._beside)) from None
            weakref.finalize(self, self._file.close)
        return self._file
