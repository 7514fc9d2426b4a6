"""The safetensors container: reading a header without trusting it, reading and writing tensors."""

import hashlib
import itertools
import json
import math
import mmap
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..core import files
from ..core.checksums import bytes_of
from ..core.errors import UserError
from ..core.files import if_address, written_aside
from ..core.parsing import json_value, number, refuse_halves, refusing
from ..core.recent import Recent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_LONGEST_NAME = 1000  # letters
_MOST_SIDES = 8  # of a tensor
# The only names under which peft and diffusers look for an adapter in a folder.
_IN_FOLDERS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
_MUCH = 4 << 20  # bytes
_SHOWN = 5  # folders that an error names
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# What torch calls them, in the order in which the safetensors library writes tensors: from the widest on.
_IN_TORCH = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "F32": "float32", "U32": "uint32", "I32": "int32",
    "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
CHECKPOINT = "peft_diffusion_checkpoint_2"
"""The metadata entry of a checkpoint of a run, which is no adapter file. The number is of the order in
which parameters lie in its flat tensors."""
COMPOSITION = "peft_diffusion_composition"
"""The metadata entry of a learned composition, which is no adapter file either: see `composition`."""
_LEGACY_START, _LEGACY_END = 0x100000, 0x110000  # the bytes of a file that kohya's older hash is of


class Entry(NamedTuple):
    """A tensor as the header describes it; ``start`` and ``end`` are bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Run(NamedTuple):
    """Tensors of one dtype that follow one another in a file, from and to so many bytes from the end of its header."""

    dtype: str
    start: int
    end: int
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Listing:
    """What a header says of tensors. Files of one shape share it, and so it stands for what is found out of that.

    Attributes:
        tensors: By name.
        size: Bytes of all.
    """

    tensors: Mapping[str, Entry]
    size: int

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All tensors, in the order in which they lie."""
        ordered = sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].end))
        runs = [list(run) for _, run in itertools.groupby(ordered, lambda item: item[1].dtype)]
        return tuple(Run(run[0][1].dtype, run[0][1].start, run[-1][1].end, tuple(name for name, _ in run)) for run in runs)

    @cached_property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """The run of each tensor, and how many numbers are before it there, by name."""
        return {
            name: (number, (self.tensors[name].start - run.start) // _BYTES[run.dtype])
            for number, run in enumerate(self.runs)
            for name in run.names
        }


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, or what of it a pickle tells.

    Attributes:
        path: The file.
        metadata: By key; nothing in a pickle.
        tensors: By name.
        size: Of the whole file, in bytes.
        stamp: Size, time of the last change (ns) and inode of the file that was read: see `stamp_of`.
        begin: Where the first tensor begins, in bytes; 0 for a pickle.
        listing: What it says of the tensors, as the file calls them; None for a pickle.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Entry]
    size: int
    stamp: tuple[int, int, int] = (0, 0, 0)
    begin: int = 0
    listing: Listing | None = field(default=None, repr=False, compare=False)


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Tell one state of a file from others without reading it.

    Args:
        path: The file.

    Returns:
        Its size, the time of its last change in nanoseconds, and its inode.

    Raises:
        UserError: There is no such file.
    """
    return files.stamp_of(existing(path))


def refuse_changed(header: Header) -> None:
    """Refuse a file that is another one than when its header was read.

    Args:
        header: Of the file.

    Raises:
        UserError: It is another one, or gone.
    """
    if stamp_of(header.path) != header.stamp:
        raise UserError(f"{header.path} was changed while it was being used; run this again")


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check it against the file: lengths, types, offsets. Reads nothing else.

    Args:
        path: The file.

    Returns:
        The header.

    Raises:
        UserError: There is no such file, it is no safetensors file, or it is damaged.
    """
    stamp = stamp_of(path)
    size = stamp[0]
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise UserError(f"{path} is no safetensors file")
        if 8 + length > size:
            raise UserError(f"{path} is truncated: its header has {length} bytes, the file {size}")
        text = file.read(length)
    with refusing(f"{path} is no safetensors file: its header cannot be read"):
        metadata, rest = _parted(text.decode("utf-8"))
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata holds other things than strings")
        known = _listings.get(rest)
        tensors = {name: _entry(value) for name, value in json_value(rest).items()} if known is None else known.tensors
    if known is None or known.size != size - 8 - length:
        _check_names(path, tensors)
        _check_offsets(path, tensors, 8 + length, size)
        known = Listing(tensors, size - 8 - length)
        if len(rest) <= _KEPT_HEADER:
            _listings.put(rest, known)
    return Header(path, metadata, known.tensors, size, stamp, 8 + length, known)


_KEPT_HEADER = 2_000_000  # letters
_listings: Recent[str, Listing] = Recent(32)  # most files of a base are of a few shapes
_METADATA = "__metadata__"


def _parted(text: str) -> tuple[dict[str, Any], str]:
    """A header as metadata, and as JSON of the rest, which files of one shape have in common. Raises ValueError."""
    metadata, rest = _metadata_first(text)
    if f'"{_METADATA}"' not in rest and "\\u" not in rest:  # by whatever spelling
        return metadata, rest
    header = json_value(text)
    metadata = header.pop(_METADATA, {})
    return metadata, json.dumps(header)


def _metadata_first(text: str) -> tuple[dict[str, Any], str]:
    """The metadata that stand before tensors, as everybody writes them, and the header without; none of another header."""
    start = f'{{"{_METADATA}":'
    if text.startswith(start):
        try:
            metadata, end = json.JSONDecoder().raw_decode(text, len(start))
        except (ValueError, RecursionError):
            return {}, text
        refuse_halves(text[:end], metadata)
        rest = text[end:].strip()
        if rest == "}" or rest.startswith(',"'):
            return metadata, "{" + rest.removeprefix(",")
    return {}, text.strip()


def read_tensors(header: Header) -> dict[str, "Tensor"]:
    """Read all tensors of a safetensors file, which it takes one read for.

    Args:
        header: Of the file.

    Returns:
        The tensors by name; those of 8-bit floats, in which torch computes nothing, as float32. The others share one piece
        of memory.

    Raises:
        UserError: The file changed since its header was read, cannot be read, or holds NaN or infinity.
    """
    return read_data(header).tensors()


def read_data(header: Header, *, pinned: bool = False) -> "Data":
    """Read all that a safetensors file holds behind its header, with one read.

    Args:
        header: Of the file.
        pinned: Whether into memory that stays in its place, from which a GPU copies faster.

    Returns:
        Its bytes.

    Raises:
        UserError: The file changed since its header was read, or cannot be read.
    """
    refuse_changed(header)
    with refusing(f"{header.path} cannot be read"), header.path.open("rb", buffering=0) as file:
        start = struct.unpack("<Q", file.read(8))[0]
        head = struct.pack("<Q", start) + file.read(start)
        numbers = _memory(max(0, header.size - len(head)), pinned)
        room = bytes_of(numbers)
        while len(room):
            count = file.readinto(room)
            if not count:
                raise UserError(f"{header.path} ends within its tensors")
            room = room[count:]
    refuse_changed(header)
    return Data(header, head, numbers)


def _memory(size: int, pinned: bool) -> "Tensor":
    """Bytes to read into. Many are asked for in large pages, where the system has them: thousands of small ones take as long
    to be given as to be read into."""
    import torch

    if pinned or size < _MUCH or sys.platform != "linux":
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)


class Data:
    """The bytes of a safetensors file.

    Args:
        header: Of the file.
        head: The bytes of the header, with its length.
        numbers: The bytes behind it.
    """

    def __init__(self, header: Header, head: bytes, numbers: "Tensor") -> None:
        self._header = header
        self._head = head
        self._numbers = numbers

    def tensors(self) -> dict[str, "Tensor"]:
        """Give the tensors, as `read_tensors` does.

        Returns:
            The tensors by name, in the order of the header; they share the memory of the bytes.

        Raises:
            UserError: One holds NaN or infinity.
        """
        from ..core.adapter import cut

        runs, places = self._numbers_of, self._listing.places
        tensors = {}
        for name, one in self._listing.tensors.items():
            run, start = places[name]
            tensors[name] = cut(runs[run], start, one.shape)
        return tensors if self._is_whole else _usable(self._header.path, tensors)

    def flats(self) -> list["Tensor"]:
        """Give the numbers of each run of the header's listing.

        Returns:
            Flat tensors, as the file holds them; they share the memory of the bytes.

        Raises:
            UserError: As `tensors`.
        """
        if not self._is_whole:
            self.tensors()
        return self._numbers_of

    def digests(self) -> tuple[str, str]:
        """Digest the file.

        Returns:
            The SHA-256 of all of it and that of its tensors, as hex digits.
        """
        data, whole = bytes_of(self._numbers), hashlib.sha256(self._head)
        whole.update(data)
        return whole.hexdigest(), hashlib.sha256(data).hexdigest()

    @property
    def _listing(self) -> Listing:
        found = self._header.listing
        if found is None:
            raise TypeError(f"{self._header.path} is no safetensors file")
        return found

    @cached_property
    def _numbers_of(self) -> list["Tensor"]:
        """The numbers of each run."""
        return [self._run(run) for run in self._listing.runs]

    def _run(self, run: Run) -> "Tensor":
        kind = torch_dtype(run)
        data = self._numbers[run.start : run.end]
        if run.start % kind.itemsize:  # written after tensors of narrower numbers
            data = data.clone()
        return data.view(kind)

    @cached_property
    def _is_whole(self) -> bool:
        """Whether nothing has to be refused or converted."""
        return all(
            not numbers.is_floating_point() or (numbers.itemsize > 1 and is_finite(numbers)) for numbers in self._numbers_of
        )


class Stored(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file, each read into memory when it is asked for, and kept by nobody.

    Nothing is mapped: what was read and let go takes no memory.
    """

    def __init__(self, header: Header) -> None:
        """Refuse a file that changed.

        Args:
            header: Of the file.

        Raises:
            UserError: The file changed since its header was read.
        """
        refuse_changed(header)
        self._header = header

    def __getitem__(self, name: str) -> "Tensor":
        """Read a tensor, as `read_tensors` gives it. Raises UserError where it holds NaN or infinity, or cannot be read."""
        entry = self._header.tensors[name]
        with refusing(f"{self._header.path} cannot be read"), self._header.path.open("rb") as file:
            file.seek(self._header.begin + entry.start)
            data = bytearray(entry.end - entry.start)
            if file.readinto(data) != len(data):
                raise UserError(f"{self._header.path} ends within tensor {name}")
        return _usable(self._header.path, {name: _tensor(data, entry)})[name]

    def dtype(self, name: str) -> "torch.dtype":
        """Tell the dtype that a tensor is read in, without reading it.

        Args:
            name: Its name.

        Returns:
            The dtype; float32 for 8-bit floats, as `read_tensors` gives them.
        """
        import torch

        found = torch_dtype(self._header.tensors[name])
        return torch.float32 if found.is_floating_point and found.itemsize == 1 else found

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._header.tensors)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._header.tensors)


def _tensor(data: bytearray, entry: Entry) -> "Tensor":
    import torch

    dtype = torch_dtype(entry)
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(entry.shape)


def torch_dtype(entry: Entry | Run) -> "torch.dtype":
    """Tell the dtype that a tensor of a file has in torch.

    Args:
        entry: The tensor, or several of one dtype.

    Returns:
        The dtype.
    """
    import torch

    found: torch.dtype = getattr(torch, _IN_TORCH[entry.dtype])
    return found


def read_pickle(path: Path) -> tuple[Header, dict[str, "Tensor"]]:
    """Read all tensors of a pickle (.pt, .ckpt, .bin) with ``weights_only``, which runs nothing.

    Args:
        path: The file.

    Returns:
        What a header would tell, and the tensors by name, as ``read_tensors`` gives them.

    Raises:
        UserError: There is no such file, it cannot be read so, or it holds NaN or infinity.
    """
    stamp = stamp_of(path)
    loaded = _read_pickle(path)
    entries = {name: Entry(str(one.dtype).removeprefix("torch."), tuple(one.shape), 0, 0) for name, one in loaded.items()}
    _check_names(path, entries)
    return Header(path, {}, entries, stamp[0], stamp), _usable(path, loaded)


def _usable(path: Path, tensors: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            tensors[name] = tensor = tensor.float()
        # A single number may be one that its method has no use for, which knows that: see `file._refuse_not_finite`.
        if tensor.is_floating_point() and tensor.numel() != 1 and not is_finite(tensor):
            raise UserError(f"{path}: tensor {name} holds NaN or infinity; the file is damaged or its training diverged")
    return tensors


def is_finite(tensor: "Tensor") -> bool:
    """Tell whether a tensor holds neither NaN nor infinity, in no memory of its size.

    Args:
        tensor: Of floating-point numbers.

    Returns:
        Whether all are finite.
    """
    return not tensor.numel() or all(
        math.isfinite(float(end)) for end in tensor.detach().aminmax()
    )  # either is NaN where one is


def is_pickle(path: Path) -> bool:
    """Tell by a file's name whether it is read as a pickle; all others are taken for safetensors.

    Args:
        path: The file.

    Returns:
        Whether it is.
    """
    return path.suffix.lower() in (".pt", ".ckpt", ".bin", ".pth")


def write(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, aside and then renamed, with kohya's ``sshs_`` hashes of the data in the metadata.

    Args:
        path: The file, which is replaced.
        tensors: By name, on any device.
        metadata: Of the header, beside those hashes.
    """
    forms = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_each(path, forms, tensors.__getitem__, metadata)


def write_each(
    path: Path,
    forms: "Mapping[str, tuple[torch.dtype, tuple[int, ...]]]",
    tensor_of: "Callable[[str], Tensor]",
    metadata: Mapping[str, str],
    written: Callable[[str], None] | None = None,
) -> None:
    """Write a safetensors file as `write` does, with one tensor in memory at a time.

    Args:
        path: The file, which is replaced.
        forms: Dtype and shape of each tensor, by name.
        tensor_of: Makes a tensor by its name; called once for each, in the order of the file.
        metadata: Of the header, beside the hashes.
        written: Is called with the name of each tensor that was written.

    Raises:
        UserError: It cannot be written.
        ValueError: A tensor is of another dtype or shape than was said.
    """
    names = {f"torch.{torch_name}": name for name, torch_name in _IN_TORCH.items()}
    told = {name: (names[str(dtype)], shape) for name, (dtype, shape) in forms.items()}
    places = list(_IN_TORCH)
    order = sorted(told, key=lambda name: (places.index(told[name][0]), name))
    entries = _placed({name: told[name] for name in order})
    hashes = _Hashes(_header_bytes(entries, None))
    head = {"format": "pt", **metadata, **hashes.told()}
    with written_aside(path) as aside, aside.open("wb") as file:
        file.write(_header_bytes(entries, head))
        for name in order:
            tensor = tensor_of(name)
            if (tensor.dtype, tuple(tensor.shape)) != forms[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and was to be {forms[name]}")
            data = bytes_of(tensor) if tensor.numel() else memoryview(b"")
            hashes.update(data)
            file.write(data)
            del tensor, data  # one at a time is in memory
            if written is not None:
                written(name)
        file.seek(0)
        file.write(_header_bytes(entries, head | hashes.told()))  # as long as before: hashes are


def rewrite(header: Header, metadata: Mapping[str, str], path: Path) -> None:
    """Write a safetensors file with other metadata, aside and then renamed. No byte of its tensors changes.

    Args:
        header: Of the file.
        metadata: All that the new header holds.
        path: The file to make or replace; it may be the same.

    Raises:
        UserError: The file changed since its header was read, or cannot be written.
    """
    refuse_changed(header)
    entries = {
        name: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [one.start, one.end]}
        for name, one in header.tensors.items()
    }
    with written_aside(path) as aside, aside.open("wb") as file, header.path.open("rb") as source:
        file.write(_header_bytes(entries, metadata))
        source.seek(header.begin)
        shutil.copyfileobj(source, file, 1 << 20)


def _placed(told: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """The entries of a header, by name."""
    entries, start = {}, 0
    for name, (dtype, shape) in told.items():
        end = start + _BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    return entries


def _header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str] | None) -> bytes:
    """A header with its length, filled up with spaces to a multiple of 8 bytes."""
    whole = dict(entries) if metadata is None else {"__metadata__": dict(metadata), **entries}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def sha256(path: Path) -> str:
    """Digest a file.

    Args:
        path: The file.

    Returns:
        The SHA-256 of all bytes, as hex digits.

    Raises:
        UserError: There is no such file.
    """
    with existing(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_sha256(path: Path) -> str:
    """Digest what a safetensors file holds behind its header.

    Args:
        path: The file.

    Returns:
        The SHA-256 of the tensors' bytes, as hex digits.

    Raises:
        UserError: There is no such file.
    """
    with existing(path).open("rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        return hashlib.file_digest(file, "sha256").hexdigest()


def legacy_hash(path: Path) -> str:
    """Digest the part of a file by which A1111's additional networks first knew it.

    Args:
        path: The file.

    Returns:
        Eight hex digits; "" of a file that ends before that part.
    """
    with existing(path).open("rb") as file:
        file.seek(_LEGACY_START)
        part = file.read(_LEGACY_END - _LEGACY_START)
    return hashlib.sha256(part).hexdigest()[:8] if part else ""


def existing(path: Path) -> Path:
    """See that a file is there.

    Args:
        path: The file.

    Returns:
        The same path.

    Raises:
        UserError: There is none, or it is a folder.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not an adapter file")
    if not path.is_file():
        raise UserError(f"there is no file {path}{if_address(path)}")
    return path


def adapter_file(path: Path) -> Path:
    """Find the adapter file that a path means.

    Args:
        path: A file, or a folder as peft and diffusers save it.

    Returns:
        The file: the path itself where it is no folder, whether it is there or not.

    Raises:
        UserError: There is no such file in the folder.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
    if found is not None:
        return found
    below = sorted(one.name for one in path.iterdir() if any((one / name).is_file() for name in _IN_FOLDERS))
    if below:
        more = " and others" if len(below) > _SHOWN else ""
        raise UserError(f"{path} holds several adapters, in the folders {', '.join(below[:_SHOWN])}{more}; name one of them")
    raise UserError(f"{path} is a folder without an adapter: there is none of {', '.join(_IN_FOLDERS)}; name a file")


def embedding_beside(path: Path) -> Path | None:
    """Find the file of words that diffusers' scripts write beside a LoRA.

    Args:
        path: The LoRA.

    Returns:
        That file; None where there is none.
    """
    own = path.with_name(f"{path.stem}_emb.safetensors")
    if own.is_file() or path.name not in _IN_FOLDERS:
        return own if own.is_file() else None
    return next(iter(sorted(path.parent.glob("*_emb.safetensors"))), None)


def title(path: Path) -> str:
    """Name an adapter by where it lies.

    Args:
        path: Its file.

    Returns:
        The file's name without the ending; of a file that is always called so, the folder's.
    """
    return path.resolve().parent.name if path.name in _IN_FOLDERS else path.stem


def read_scalars(header: Header, names: Iterable[str]) -> dict[str, float | None]:
    """Read tensors of one element, such as alphas, opening the file once.

    Args:
        header: Of the file.
        names: Of the tensors.

    Returns:
        The value of each; None for a tensor of more than one element, or of a type that is not known.
    """
    with header.path.open("rb") as file:
        return {name: _scalar(file, header.begin, header.tensors[name]) for name in names}


def _scalar(file: BinaryIO, begin: int, entry: Entry) -> float | None:
    formats = {
        "F32": "<f", "F64": "<d", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b",
        "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B", "BOOL": "<?",
    }  # fmt: skip
    if math.prod(entry.shape) != 1 or entry.dtype not in _BYTES:
        return None
    file.seek(begin + entry.start)
    data = file.read(entry.end - entry.start)
    if entry.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if entry.dtype == "F8_E5M2":
        return float(struct.unpack("<e", b"\0" + data)[0])
    if entry.dtype == "F8_E4M3":  # exponents are 8 less than in a half, and there is no infinity
        return 256 * float(struct.unpack("<e", struct.pack("<H", (data[0] & 0x80) << 8 | (data[0] & 0x7F) << 7))[0])
    return float(struct.unpack(formats[entry.dtype], data)[0])


def _entry(value: Any) -> Entry:
    start, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(size) is int and size >= 0 for size in (*shape, start, end)):
        raise TypeError("a size that is no number")
    return Entry(str(value["dtype"]), shape, start, end)


def _check_offsets(path: Path, tensors: Mapping[str, Entry], begin: int, size: int) -> None:
    """Tensors must follow one another without gap or overlap to the end of the file."""
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if begin + entry.end > size:
            raise UserError(f"{path} is truncated: tensor {name} ends at byte {begin + entry.end}, the file has {size}")
        expected = math.prod(entry.shape) * _BYTES.get(entry.dtype, 0)
        if entry.dtype not in _BYTES or entry.start != position or entry.end - entry.start != expected:
            raise UserError(f"{path}: tensor {name} does not lie where the header says; the file is damaged")
        position = entry.end
    if begin + position != size:
        raise UserError(f"{path}: {size - begin - position} bytes belong to no tensor; the file is damaged")


def _check_names(path: Path, tensors: Mapping[str, Entry]) -> None:
    """Refuse what no program writes and torch cannot hold."""
    for name, entry in tensors.items():
        if len(name) > _LONGEST_NAME:
            raise UserError(f"{path}: a tensor has a name of {len(name):,} letters, {name[:40]}...; the file is damaged")
        if len(entry.shape) > _MOST_SIDES:
            raise UserError(f"{path}: tensor {name} has {len(entry.shape)} dimensions; the file is damaged")


def _read_pickle(path: Path) -> dict[str, "Tensor"]:
    import torch

    _refuse_compressed(path)
    kept = torch.serialization.safe_globals([torch.nn.ParameterDict])  # a dict, in which the first scripts kept words
    with refusing(f"{path} cannot be read as plain weights"), kept:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch advises to run what the pickle asks for
            raise UserError(
                f"{path} cannot be read as plain weights: it is no file of torch, or asks for code to be run, which is never"
                " done; take the file as .safetensors"
            ) from None
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    loaded = loaded if isinstance(loaded, dict) else {}
    words = _plain_dict(loaded.get("string_to_param"))
    if words is not None:  # one word of A1111, which calls it by the file's name, or several of other programs
        loaded = {"emb_params": next(iter(words.values()))} if len(words) == 1 else words
    tensors = {name: one for name, value in loaded.items() if (one := _named(path, name, value)) is not None}
    if not tensors:
        raise UserError(f"{path} holds no named tensors")
    return tensors


def _plain_dict(value: object) -> dict[str, Any] | None:
    """A dict, also where it was kept in a module, as that is without running it; None for all else."""
    import torch

    if isinstance(value, torch.nn.ParameterDict):
        kept = vars(value)
        own = kept.get("_parameters") or {name: kept.get(name) for name in kept.get("_keys") or ()}
        return dict(own) if isinstance(own, dict) else None
    return value if isinstance(value, dict) else None


def _refuse_compressed(path: Path) -> None:
    """Refuse an archive that torch does not write, of which a small one can fill all memory."""
    with refusing(f"{path} cannot be read as plain weights"):
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            if sum(one.file_size for one in archive.infolist()) > path.stat().st_size:
                raise UserError(f"{path} is compressed, as torch writes no file; unpack it, and save the tensors again")


def _named(path: Path, name: object, value: object) -> "Tensor | None":
    """A tensor of a pickle, plain and in memory; None for all else but numbers, which some programs have for alpha."""
    import torch

    if isinstance(name, str) and "." in name and not isinstance(value, torch.Tensor):
        scalar = number(value)
        return None if scalar is None else torch.tensor(scalar)
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return None
    with refusing(f"{path} has a tensor whose name is no text"):
        name.encode()
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_nested and not value.is_quantized
    if not plain or value.is_complex():
        raise UserError(f"{path}: {name} is no plain tensor of real numbers; save it as one")
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        raise UserError(f"{path}: {name} is an expanded view of fewer numbers; save it with .contiguous()")
    return value.detach()


class _Hashes:
    """The hashes by which A1111's additional networks and kohya know a file, taken while it is written: of its data alone,
    and of a part of the file as it would be without metadata."""

    def __init__(self, header: bytes) -> None:
        self._data, self._legacy = hashlib.sha256(), hashlib.sha256()
        self._position = 0
        self._see(memoryview(header))

    def update(self, data: memoryview) -> None:
        """See the data that follow."""
        self._data.update(data)
        self._see(data)

    def told(self) -> dict[str, str]:
        """The entries of the metadata, of what was seen so far; always of the same length."""
        return {"sshs_model_hash": self._data.hexdigest(), "sshs_legacy_hash": self._legacy.hexdigest()[:8]}

    def _see(self, data: memoryview) -> None:
        first, end = self._position, self._position + len(data)
        self._legacy.update(data[max(0, _LEGACY_START - first) : max(0, _LEGACY_END - first)])
        self._position = end
