"""Files that are written and read tensor by tensor, against the safetensors library."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from peft_diffusion.core.errors import UserError
from peft_diffusion.formats import container

TENSORS = {
    "b.weight": torch.randn(700, 700, generator=torch.Generator().manual_seed(0)),  # beyond the part of the older hash
    "a.weight": torch.ones(3, 4, dtype=torch.float16),
    "é": torch.ones(5, dtype=torch.bfloat16),
    "turned": torch.arange(24.0).view(4, 6).T,
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "long": torch.arange(5),
    "bool": torch.ones(3, dtype=torch.bool),
    "double": torch.ones(2, dtype=torch.float64),
    "byte": torch.ones(3, dtype=torch.uint8),
}


def test_a_file_has_the_bytes_and_hashes_that_the_library_gives_it(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    container.write(file, TENSORS, {"ss_seed": "1", "title": 'ä"'})
    theirs, ours = save({name: tensor.contiguous() for name, tensor in TENSORS.items()}), file.read_bytes()
    begin, own = 8 + struct.unpack("<Q", theirs[:8])[0], 8 + struct.unpack("<Q", ours[:8])[0]
    assert own % 8 == 0
    assert ours[own:] == theirs[begin:]
    told = json.loads(ours[8:own])["__metadata__"]
    assert told.pop("sshs_model_hash") == hashlib.sha256(theirs[begin:]).hexdigest()
    assert told.pop("sshs_legacy_hash") == hashlib.sha256(theirs[0x100000:0x110000]).hexdigest()[:8]
    assert told == {"format": "pt", "ss_seed": "1", "title": 'ä"'}
    read = load_file(file)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_tensors_are_read_one_by_one_as_all_at_once(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    container.write(file, TENSORS, {})
    header = container.read_header(file)
    stored, whole = container.Stored(header), container.read_tensors(header)
    assert list(stored) == list(header.tensors)
    assert all(torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in whole.items())


def test_a_damaged_number_is_told_when_its_tensor_is_read(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    container.write(file, {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}, {})
    stored = container.Stored(container.read_header(file))
    assert stored["good"].tolist() == [1, 1]
    with pytest.raises(UserError, match="tensor bad holds NaN"):
        stored["bad"]


def test_what_fails_on_the_way_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    container.write(file, {"old": torch.ones(2)}, {})
    before = file.read_bytes()
    forms = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    with pytest.raises(ValueError, match="b is torch"):
        container.write_each(file, forms, {"a": torch.ones(2), "b": torch.ones(2)}.__getitem__, {})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


ENTRY = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADERS = {
    "as everybody": f'{{"__metadata__":{{"x":"1"}},{ENTRY}}}    ',
    "with spaces": f'{{ "__metadata__" : {{"x":"1"}} , {ENTRY} }}',
    "metadata behind": f'{{{ENTRY},"__metadata__":{{"x":"1"}}}}',
    "metadata twice": f'{{"__metadata__":{{"x":"2"}},{ENTRY},"__metadata__":{{"x":"1"}}}}',
    "metadata twice, once in escapes": f'{{"__metadata__":{{"x":"2"}},{ENTRY},"\\u005f_metadata__":{{"x":"1"}}}}',
}


def written(file: Path, header: str, data: bytes = struct.pack("<2f", 1, 2)) -> Path:
    head = header.encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return file


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_says_the_same_before_and_after_one_of_its_shape(case: str, tmp_path: Path) -> None:
    for number in range(2):
        read = container.read_header(written(tmp_path / f"{number}.safetensors", HEADERS[case]))
        assert dict(read.metadata) == {"x": "1"} and list(read.tensors) == ["a"]
        assert container.read_tensors(read)["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "header",
    [f'{{"__metadata__":{{"x":"1"}},{ENTRY},}}', '{"__metadata__":{"x":"1"},}', f'{{"__metadata__":{{"x":1}},{ENTRY}}}'],
)
def test_a_damaged_header_is_refused_also_after_a_whole_one_of_its_shape(header: str, tmp_path: Path) -> None:
    container.read_header(written(tmp_path / "whole.safetensors", HEADERS["as everybody"]))
    with pytest.raises(UserError, match="is no safetensors file"):
        container.read_header(written(tmp_path / "one.safetensors", header))


def test_what_a_header_does_not_tell_is_looked_at_in_each_file_of_its_shape(tmp_path: Path) -> None:
    whole = HEADERS["as everybody"]
    container.read_header(written(tmp_path / "whole.safetensors", whole))
    with pytest.raises(UserError, match="is truncated"):
        container.read_header(written(tmp_path / "short.safetensors", whole, b"1234"))
    with pytest.raises(UserError, match="4 bytes belong to no tensor"):
        container.read_header(written(tmp_path / "long.safetensors", whole, b"123456781234"))
    damaged = container.read_header(written(tmp_path / "nan.safetensors", whole, struct.pack("<2f", 1, float("nan"))))
    with pytest.raises(UserError, match="tensor a holds NaN"):
        container.read_tensors(damaged)
