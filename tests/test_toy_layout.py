"""A new layout is one file: this one, registered, and nothing else knows of it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import make_pipe
from laws import randomize
from safetensors.torch import load_file

from peft_diffusion import formats
from peft_diffusion.bases import components, describe
from peft_diffusion.core import site
from peft_diffusion.core.adapter import parts_of
from peft_diffusion.core.errors import UserError
from peft_diffusion.formats import layout, metadata
from peft_diffusion.formats.container import Header
from peft_diffusion.formats.layout import Content, Layout, Place, Reading, Written
from peft_diffusion.generation import Adapters
from peft_diffusion.methods.lora import Lora


class Slashed(Layout):
    """``toy/<component>/<path with / for .>/<suffix>``, and every tensor negated."""

    name: ClassVar[str] = "slashed"

    def claims(self, name: str) -> int | None:
        return len("toy/") if name.startswith("toy/") else None

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        found = {}
        for name in names:
            _, component, *path, suffix = name.split("/")
            found[name] = Place(component, ".".join(path), suffix, change=torch.neg)
        return Reading(found)

    def write(self, content: Content) -> Written:
        tensors: dict[str, torch.Tensor] = {}
        for component, built in content.adapters.items():
            for path, adapter in built.items():
                if len(parts_of(adapter)) > 1:
                    raise UserError("the layout 'slashed' holds one method at a site")
                place = f"toy/{component}/{path.replace('.', '/')}"
                tensors |= {f"{place}/{suffix}": -tensor for suffix, tensor in adapter.state().items()}
        return Written(tensors, metadata.of_any(content.spec))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    layout.register(Slashed())
    yield
    layout.LAYOUTS.pop("slashed")


def write(path: Path, name: str) -> Path:
    pipe = make_pipe()
    parts = {one: components(pipe)[one] for one in ("unet", "text_encoder")}
    for part in parts.values():
        torch.manual_seed(3)
        site.attach(part, "made", Lora(rank=4, alpha=6.0), "attention+ff")
        randomize(part, "made")
    formats.save(path, parts, "made", formats.Spec(base=asdict(describe(pipe))), layout=name)
    return path


@pytest.mark.slow
def test_it_writes_reads_and_is_named(tmp_path: Path) -> None:
    file, kohya = write(tmp_path / "a.safetensors", "slashed"), write(tmp_path / "b.safetensors", "kohya")
    assert all(name.startswith(("toy/unet/", "toy/text_encoder/")) for name in load_file(file))
    found = formats.inspect(file)
    assert found.layouts == ("slashed",) and found.unknown == () and set(found.alphas) == {-6.0}
    assert found.components == formats.inspect(kohya).components
    first, second = (formats.load(path, make_pipe(), strict=True).components for path in (file, kohya))
    for component, built in second.items():
        assert built.keys() == first[component].keys()
        for path, adapter in built.items():
            for suffix, tensor in adapter.state().items():
                assert torch.equal(tensor, first[component][path].state()[suffix])
    assert Adapters(make_pipe()).load(file) == "a"


def test_two_layouts_that_claim_a_name_alike_are_told(tmp_path: Path) -> None:
    class Twin(Slashed):
        name = "twin"

    file = write(tmp_path / "a.safetensors", "slashed")
    layout.register(Twin())
    try:
        with pytest.raises(UserError, match="the layouts slashed and twin both claim the tensor toy/"):
            formats.inspect(file)
    finally:
        layout.LAYOUTS.pop("twin")


def test_a_name_that_is_taken_is_refused() -> None:
    class Kohya2(Slashed):
        name = "kohya"

    layout.known()
    with pytest.raises(UserError, match="there is a layout 'kohya' already"):
        layout.register(Kohya2())
