"""Training that goes on from an adapter, and training beside adapters that are there."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from safetensors.torch import load_file
from test_export import spec_of
from test_training import draw_pictures, last_state, small

import peft_diffusion as pd
from peft_diffusion.api import train
from peft_diffusion.core import site
from peft_diffusion.core.adapter import Adapter
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event
from peft_diffusion.core.weight_change import change_of
from peft_diffusion.generation.settings import separated
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training.events import Begun

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots", "read_bases_once")


def filled(adapter: Adapter) -> Adapter:
    """Random numbers in all that it trains."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return adapter


def built(module: torch.nn.Module, method: Lora | Loha) -> Adapter:
    adapter = method.build(module)
    adapter.bind(module)
    return adapter


@pytest.mark.parametrize("module", [torch.nn.Linear(12, 20), torch.nn.Conv2d(6, 10, 3, padding=1)], ids=["linear", "conv"])
@pytest.mark.parametrize("given", [Lora(rank=6, alpha=3.0), Loha(rank=3)], ids=["lora", "loha"])
@pytest.mark.parametrize("rank", [2, 6, 9])
def test_a_lora_begins_as_the_nearest_change_of_its_rank(module: torch.nn.Module, given: Lora | Loha, rank: int) -> None:
    other, fresh = filled(built(module, given)), built(module, Lora(rank=rank, alpha=5.0))
    before = next(parameter for name, parameter in fresh.named_parameters() if name == "down").detach().clone()
    whole = change_of(other, module, "").matrix()
    assert whole is not None
    error = fresh.begin_as(other)
    now = change_of(fresh, module, "").matrix()
    assert now is not None and error is not None
    values = torch.linalg.svdvals(whole)  # Eckart and Young: the nearest of a rank leaves out the smaller ones
    left = values[rank:].square().sum().sqrt() / values.square().sum().sqrt()
    assert abs(error - float(left)) < 1e-5
    assert abs(float((now - whole).norm() / whole.norm()) - float(left)) < 1e-5
    if isinstance(given, Lora) and rank == 9:  # what is beyond can learn: rows as they were made, columns of 0
        down, up = (dict(fresh.named_parameters())[name] for name in ("down", "up"))
        assert torch.equal(down[6:], before[6:]) and not bool(up[:, 6:].any()) and bool(down[6:].any())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Path]:
    """Pictures, and an adapter of rank 4 of a run on them."""
    where = tmp_path_factory.mktemp("first")
    pictures = draw_pictures(where / "pictures")
    config = small(pictures, where, base=str(tiny_base), rank=4, unet_lr=0.01, steps=3, save_every=9)
    return pictures, train(config).output


def changes(file: Path) -> dict[str, torch.Tensor]:
    """The change of every layer of the UNet at strength 1."""
    pipe: Any = make_pipe()
    name = pd.Adapters(pipe).load(file)
    found = {
        path: change_of(one, pipe.unet.get_submodule(path), path) for path, one in site.adapters(pipe.unet, name).items()
    }
    matrices = {path: change.matrix() for path, change in found.items()}
    return {path: matrix for path, matrix in matrices.items() if matrix is not None}


@pytest.mark.slow
def test_a_run_goes_on_from_a_file_of_another_layout_at_its_rank(
    first: tuple[Path, Path], tmp_path: Path, tiny_base: Path
) -> None:
    pictures, file = first
    other = tmp_path / "peft" / "adapter_model.safetensors"
    pd.convert(pd.ConvertConfig(file, other.parent, to="peft", base=str(tiny_base)))
    told: list[Event] = []
    common: dict[str, Any] = {"base": str(tiny_base), "init_from": other, "unet_lr": 1e-12, "save_every": 1, "held_out": 0.4}
    done = train(small(pictures, tmp_path, rank=None, steps=1, scheduler="constant", **common), observers=[told.append])
    (begun,) = (event for event in told if isinstance(event, Begun))
    before, after = changes(file), changes(done.output)
    assert done.config.rank == 4 and begun.layers == len(before) and begun.error < 1e-6 and not begun.fresh + begun.untrained
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[path], after[path], atol=1e-7) for path in before)
    assert done.outcome is not None and done.outcome.suggestion is not None
    plain = train(small(pictures, tmp_path / "plain", steps=1, held_out=0.4, base=str(tiny_base))).held_out_before
    losses = done.outcome.suggestion.losses  # at 0 as without the file
    assert losses[0] == pytest.approx(plain, rel=1e-6) and losses[1] == pytest.approx(done.held_out_before, rel=1e-6)
    assert abs(losses[1] / losses[0] - 1) > 1e-4
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    assert spec_of(done.output).training["init_from"] == {"file": other.name, "sha256": digest}
    other.unlink()  # what goes on needs the file no more
    longer = train(small(pictures, tmp_path, rank=4, steps=2, scheduler="constant", resume=True, **common))
    assert spec_of(longer.output).training["init_from"] == spec_of(done.output).training["init_from"]


@pytest.mark.slow
def test_what_cannot_be_gone_on_from_is_told(first: tuple[Path, Path], tmp_path: Path, tiny_base: Path) -> None:
    pictures, file = first
    common: dict[str, Any] = {"base": str(tiny_base), "init_from": file, "steps": 1}
    with pytest.raises(UserError, match=r"is a lora .* cannot begin as; give the same --method"):
        train(small(pictures, tmp_path / "a", method="loha", **common))
    with pytest.raises(UserError, match="holds nothing at the layers that are trained now"):
        train(small(pictures, tmp_path / "b", target="conv", **common))


@pytest.mark.slow
def test_an_adapter_learns_beside_a_frozen_one_which_stays_and_is_named(
    first: tuple[Path, Path], tmp_path: Path, tiny_base: Path
) -> None:
    pictures, file = first
    pipe: Any = pd.load_base(str(tiny_base), device="cpu")
    config = small(pictures, tmp_path / "with", steps=1, save_every=1, beside=(f"{file}=0.5",))
    beside = train(config, pipe=pipe)
    alone = train(small(pictures, tmp_path / "alone", steps=1, save_every=1), pipe=pipe)
    assert pd.Adapters(pipe).names == ()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert spec_of(beside.output).training["beside"] == [{"file": file.name, "sha256": digest, "strength": 0.5}]
    assert load_file(beside.output).keys() == load_file(alone.output).keys()
    # The loss is that of the base with the frozen one on it, as Python has long given it.
    adapters = pd.Adapters(pipe)
    adapters.load(file, "other", 0.5)
    lent = train(small(pictures, tmp_path / "lent", steps=1, save_every=1), pipe=pipe)
    states = [last_state(result).tensors["parameters"] for result in (beside, lent, alone)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_adapters_to_train_beside_are_parted_by_commas_where_a_file_follows(tmp_path: Path) -> None:
    names = ["a.safetensors", "b,c.safetensors", "d"]
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_bytes(b"")
    a, b, d = map(str, paths)
    assert separated([f"{a}=0.7,{d}=0.5"]) == [f"{a}=0.7", f"{d}=0.5"]
    assert separated([f"{a}=0.7,te:0.2,mid:1,{d}", b]) == [f"{a}=0.7,te:0.2,mid:1", d, b]  # strengths have commas too
    assert separated([f"{a},gone.safetensors=1"]) == [a, "gone.safetensors=1"]  # which is told as a missing file


@pytest.mark.slow
def test_a_run_beside_another_adapter_does_not_go_on(first: tuple[Path, Path], tmp_path: Path, tiny_base: Path) -> None:
    pictures, file = first
    common: dict[str, Any] = {"base": str(tiny_base), "scheduler": "constant"}
    train(small(pictures, tmp_path, steps=1, beside=(f"{file}=0.5",), **common))
    with pytest.raises(UserError, match=r"first.*=0\.5 then, none now|a\.safetensors=0\.5 then, none now"):
        train(small(pictures, tmp_path, steps=2, resume=True, **common))
    with pytest.raises(UserError, match="there is no adapter file"):
        train(small(pictures, tmp_path / "new", beside=("gone.safetensors",), **common))
