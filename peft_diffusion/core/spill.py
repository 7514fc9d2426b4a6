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


class Spill:
    """A file without a name, in which tensors lie until they are needed again.

    What is put aside is mapped: it looks like any tensor, and takes memory only from when it is read until it is released.
    The file is gone with the last of the tensors, also when the process is killed.

    Args:
        beside: The file that the tensors will be written to, which need not exist yet. Theirs lies on the same disk.
    """

    def __init__(self, beside: Path) -> None:
        self._beside = beside
        self._file: IO[bytes] | None = None
        self._end = 0
        self._maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()

    def put(self, tensor: Tensor) -> Tensor:
        """Put a tensor aside.

        Args:
            tensor: On the CPU; all its numbers are written, not more of a storage that it is a view of.

        Returns:
            The same numbers, contiguous, which must not be changed in place; a small tensor itself.

        Raises:
            UserError: The disk is full, or the folder cannot be written to.
        """
        if tensor.numel() * tensor.itemsize < _LEAST:
            return tensor
        data = bytes_of(tensor)
        with explained(self._beside):
            file = self._opened()
            start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            file.seek(start)
            self._end, rest = start + len(data), data
            while rest:
                rest = rest[file.write(rest) :]
            mapped = mmap.mmap(file.fileno(), len(data), offset=start, access=mmap.ACCESS_COPY)
        found = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
        self._maps[found.data_ptr()] = mapped
        return found

    def release(self, tensor: Tensor) -> None:
        """Let the memory go that a tensor was read into. Its numbers stay in the file, and can be read again.

        Args:
            tensor: What `put` gave, or a view of that; nothing happens with any other tensor.
        """
        mapped = self._maps.get(tensor.untyped_storage().data_ptr())
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            mapped.madvise(mmap.MADV_DONTNEED)

    def _opened(self) -> IO[bytes]:
        """The file, without a buffer: what is left in one when the disk is full would be written again when it is closed."""
        if self._file is None:
            folder = next(one for one in self._beside.absolute().parents if one.is_dir())
            self._file = tempfile.TemporaryFile(buffering=0, dir=folder, prefix=f".{self._beside.name}.")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        return self._file
