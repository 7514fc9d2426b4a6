"""Tensors that wait in a file: their numbers, and the memory that they take."""

import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from peft_diffusion.core import spill
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.spill import Spill

MIB = 2**20


def resident() -> int:
    """Bytes of memory that this process holds, mapped files with them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_numbers_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    put_aside, given = Spill(tmp_path / "none" / "out.safetensors"), torch.arange(200 * 301).view(200, 301).to(dtype)
    one, turned = put_aside.put(given), put_aside.put(given.mT)
    assert list(tmp_path.iterdir()) == []  # a file without a name
    for _ in range(2):
        assert one.dtype == dtype and torch.equal(one, given) and torch.equal(turned, given.mT) and turned.is_contiguous()
        put_aside.release(one)
        put_aside.release(turned.view(-1)[7:])
    small = torch.ones(3)
    assert put_aside.put(small) is small
    put_aside.release(small)  # in memory, where it stays
    assert small.sum() == 3
    assert put_aside.put(given[:2, :3]).untyped_storage().nbytes() == 6 * dtype.itemsize  # and not that of all numbers


def test_a_folder_that_takes_no_file_is_told_by_the_name_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**given: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "tmpxk3j2h1f"))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match=r"^\S+/out\.safetensors cannot be written: Permission denied;"):
        Spill(tmp_path / "out.safetensors").put(torch.zeros(100_000))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds so")
def test_what_waits_takes_no_memory(tmp_path: Path) -> None:
    put_aside, given = Spill(tmp_path / "out.safetensors"), torch.zeros(8 * MIB, dtype=torch.uint8)
    before = resident()
    kept = [put_aside.put(given.fill_(number)) for number in range(8)]
    assert resident() - before < 24 * MIB
    for number, one in enumerate(kept):
        assert int(one.max()) == number
        put_aside.release(one)
    assert resident() - before < 24 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds open so")
def test_many_tensors_keep_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have 1024 open files on most systems, and a file of SDXL has some thousand tensors."""
    monkeypatch.setattr(spill, "_SEGMENT", 4 * MIB)
    put_aside, before = Spill(tmp_path / "out.safetensors"), len(list(Path("/proc/self/fd").iterdir()))
    given = [torch.full((16_384 + number,), float(number)) for number in range(100)] + [torch.ones(2 * MIB)]
    kept = [put_aside.put(one) for one in given]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 5  # the file, and a mapping for each 4 MiB of the 15
    for one, other in zip(kept, given, strict=True):
        put_aside.release(one)
        assert torch.equal(one, other)
