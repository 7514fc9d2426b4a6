"""Adapters that share the memory of a slab: what moves, what stays, and what is drawn, against pipelines of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline
from making import make_adapter
from safetensors.torch import load_file, save_file
from test_methods_own import save_mixture

from peft_diffusion import UserError
from peft_diffusion.core import site, slab
from peft_diffusion.core.adapter import Adapter, LowRank, Pair, PairForm, Piece, StoredPair
from peft_diffusion.core.slab import LivePair, Wanted
from peft_diffusion.core.slot import state_of
from peft_diffusion.generation import Adapters, Schedule


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs of rank 4, one of rank 8, one of half the sites, one in halves with another alpha, and another method."""
    folder = tmp_path_factory.mktemp("slab")
    found = {name: make_adapter(folder / f"{name}.safetensors", tiny_base, seed) for seed, name in enumerate("abc")}
    tensors = load_file(found["c"])
    twice = {
        name: torch.cat([one, 0.5 * one], int(name.endswith("lora_up.weight"))) if one.ndim else 2 * one
        for name, one in tensors.items()
    }
    halves = {name: (one.half() if one.ndim else one / 3) for name, one in tensors.items()}
    some = {name: one for name, one in tensors.items() if "attn1" in name}
    for name, own in (("wide", twice), ("halves", halves), ("some", some)):
        found[name] = folder / f"{name}.safetensors"
        save_file(own, found[name])
    found["mixed"] = folder / "mixed.safetensors"
    save_mixture(found["mixed"], make_pipe())
    return found


@torch.no_grad()
def drawn(pipe: DiffusionPipeline) -> torch.Tensor:
    """What the text encoder and the UNet answer."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 100, (1, 77), generator=generator)
    text = pipe.text_encoder(ids)[0]
    x = torch.randn(1, 4, 8, 8, generator=generator)
    answer: torch.Tensor = pipe.unet(x, 500, text).sample
    return answer


def alone(path: Path, strength: float) -> torch.Tensor:
    """What a pipeline of its own draws with the adapters of a file, built one by one and each run by itself."""
    pipe = make_pipe()
    adapters = Adapters(pipe)
    adapters.load(path, "own", strength)
    for part in (pipe.unet, pipe.text_encoder):
        for slot in site.slots(part).values():
            assert all(isinstance(adapter, Adapter) for _, adapter in slot.adapters.items())
        site.unpack(part)
    return drawn(pipe)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b", "wide", "halves", "some", "mixed"])
def test_a_swapped_adapter_draws_as_its_file_does(files: dict[str, Path], name: str) -> None:
    pipe = make_pipe()
    before = drawn(pipe)
    adapters = Adapters(pipe)
    adapters.load(files["a"], "own", 0.7)
    adapters.swap("own", files[name])
    assert close(drawn(pipe), alone(files[name], 0.7)) and adapters["own"].path == files[name]
    adapters.swap("own", files["a"])
    assert close(drawn(pipe), alone(files["a"], 0.7))
    adapters.remove("own")
    assert torch.equal(drawn(pipe), before)


@pytest.mark.slow
def test_what_comes_into_free_ranks_moves_nothing(files: dict[str, Path]) -> None:
    pipe = make_pipe()
    adapters = Adapters(pipe)
    adapters.load(files["a"], "first", 0.7)
    adapters.load(files["b"], "second", 0.0)
    states = [state for part in (pipe.unet, pipe.text_encoder) if (state := state_of(part)) is not None]

    def places() -> list[int]:
        found = [state.strengths.values.data_ptr() for state in states] + [state.slab.moves for state in states]
        slots = [slot for part in (pipe.unet, pipe.text_encoder) for slot in site.slots(part).values()]
        return found + [slot.packed.down.data_ptr() for slot in slots if slot.packed is not None]

    at_first = places()
    assert len(states) == 2 and len(at_first) > 20
    adapters.swap("first", files["c"])
    assert close(drawn(pipe), alone(files["c"], 0.7)) and places() == at_first
    adapters.remove("second")
    adapters.load(files["some"], "third", 0.5)
    adapters.set(first=0.0)
    assert close(drawn(pipe), alone(files["some"], 0.5)) and places() == at_first
    adapters.load(files["b"], "fourth")
    assert places() != at_first  # there was no rank left
    adapters.set(third=0.0, fourth=0.3)
    assert close(drawn(pipe), alone(files["b"], 0.3))


@pytest.mark.slow
def test_a_swap_keeps_schedules_and_strengths_by_block(files: dict[str, Path]) -> None:
    pipe = make_pipe()
    adapters = Adapters(pipe)
    fading = Schedule((1.0, 0.0))
    adapters.load(files["a"], "own", fading)
    adapters.load(files["a"], "other", {"mid": 0.5})

    def strengths() -> list[object]:
        return [found.kept("other") for part in (pipe.unet, pipe.text_encoder) if (found := site.strengths(part))]

    kept = strengths()
    for name in ("some", "mixed"):
        adapters.swap("own", files[name])
        adapters.swap("other", files["b"])
    assert adapters.schedules == {"own": fading}
    assert len(kept) == 2 and strengths() == kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b", "mixed"])
def test_a_swap_that_fails_leaves_the_adapter(
    files: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make_pipe()
    adapters = Adapters(pipe)
    adapters.load(files["a"], "own", 0.7)
    before, told = drawn(pipe), adapters["own"]
    with pytest.raises(UserError, match="no adapter 'other'"):
        adapters.swap("other", files["b"])
    save_file({"lora_unet_nowhere.lora_down.weight": torch.ones(4, 4)}, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError):
        adapters.swap("own", tmp_path / "damaged.safetensors")
    copy, calls = torch._foreach_copy_, iter([True])

    def full(to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
        if next(calls, False):
            raise torch.OutOfMemoryError
        copy(to, of)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_copy_", full)
        with pytest.raises(torch.OutOfMemoryError):
            adapters.swap("own", files[name])
    assert close(drawn(pipe), before) and adapters["own"] == told
    adapters.swap("own", files[name])
    assert close(drawn(pipe), alone(files[name], 0.7))


@pytest.mark.slow
def test_an_adapter_is_built_when_it_is_asked_for_and_follows_training(files: dict[str, Path]) -> None:
    pipe = make_pipe()
    adapters = Adapters(pipe)
    adapters.load(files["halves"], "own")
    assert not [name for name, _ in pipe.unet.named_parameters() if "_peft_diffusion" in name]
    before = drawn(pipe)
    built = site.adapters(pipe.unet, "own")
    assert built and all(
        own.dtype == torch.float32 and own.requires_grad for one in built.values() for own in one.parameters()
    )
    site.pack(pipe.unet)
    assert close(drawn(pipe), before)
    with torch.no_grad():
        for one in built.values():
            one.get_parameter("up").zero_()
    assert close(drawn(pipe), before)
    site.pack(pipe.unet)
    assert not close(drawn(pipe), before)


@pytest.mark.slow
def test_a_slab_follows_its_component_to_another_dtype_and_back(files: dict[str, Path]) -> None:
    pipe = make_pipe()
    adapters = Adapters(pipe)
    adapters.load(files["a"], "own")
    adapters.load(files["b"], "other", -0.5)
    before = drawn(pipe)
    pipe.unet.to(torch.bfloat16)
    slots = site.slots(pipe.unet)
    assert all(slot.packed is not None and slot.packed.down.dtype == torch.bfloat16 for slot in slots.values())
    pipe.unet.to(torch.float32)
    pipe.unet.load_state_dict(make_pipe().unet.state_dict())
    assert torch.equal(drawn(pipe), before)


class Live(Adapter):
    """An adapter that was built."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.down, self.up = down, up

    def low_rank(self) -> LowRank:
        return LowRank(self.down, self.up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_a_file_go_to_a_device_with_one_copy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    file = torch.cat([torch.zeros(3, dtype=torch.int16), torch.arange(797).to(torch.int16)]).to(dtype)[1:]

    def build(module: torch.nn.Module, down: torch.Tensor, up: torch.Tensor, number: float) -> Adapter:
        raise NotImplementedError

    form = PairForm("down", "up", None, 2.0, (4, 8), (5, 4), lambda number, rank: number / rank, build)
    starts = (3, 700, 103, 203, 303, 203)  # the last four at equal distances, and one that a view would have to go back to
    pairs: list[Pair] = [StoredPair(form, Piece(file, at), Piece(file, at + 32), 2.0, 0.5) for at in starts]
    down, up = torch.randn(2, 8), torch.randn(5, 2)
    pairs.append(LivePair(Live(down, up), 2))  # of an adapter, elsewhere
    wanted = [Wanted(f"blocks.{n}.q", (5, 8), dtype, {"own"}, {"own": (n // 6, pair)}) for n, pair in enumerate(pairs)]
    copies: list[int] = []
    to = torch.Tensor.to

    def counted(self: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        copies.append(self.numel())
        return to(self, "cpu", copy=True)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    monkeypatch.setattr(slab, "_is_there", lambda flat, device: False)
    held = slab.Slab(torch.device("cpu"))
    places = held.hold({}, wanted)
    monkeypatch.undo()
    assert len(copies) == 3 and max(copies) == 752 - 3
    for number, (place, pair) in enumerate(zip(places, pairs, strict=True)):
        one, other, view = pair.rank, pair.matrices(), held.views[place]
        assert view is not None and view.rows[:one].tolist() == [number // 6] * one and not view.down[one:].any()
        assert torch.equal(view.down[:one], other.down.to(dtype)) and not view.up[one:].any()
        assert torch.equal(view.up[:one].t(), (other.up.float() * other.scale).to(dtype))


@pytest.mark.parametrize("layout", ["kohya", "pickle"])
def test_a_second_file_of_a_shape_is_looked_at_as_the_first(files: dict[str, Path], layout: str, tmp_path: Path) -> None:
    pipe = make_pipe()
    adapters = Adapters(pipe)
    adapters.load(files["a"], "own")
    tensors = load_file(files["b"])
    down = next(name for name in tensors if name.endswith("lora_down.weight"))
    alpha = down.replace("lora_down.weight", "alpha")
    end = "pt" if layout == "pickle" else "safetensors"

    def saved(changed: dict[str, torch.Tensor]) -> Path:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.{end}"
        (torch.save if layout == "pickle" else save_file)({**tensors, **changed}, file)
        return file

    bad = torch.full_like(tensors[down], float("nan"))
    with pytest.raises(UserError, match="holds NaN"):
        adapters.swap("own", saved({down: bad}))
    with pytest.raises(UserError, match=r"alpha of .* is NaN or infinite"):
        adapters.swap("own", saved({alpha: torch.full_like(tensors[alpha], float("inf"))}))
    adapters.swap("own", saved({name: 0 * one for name, one in tensors.items() if name.endswith("alpha")}))
    assert close(drawn(pipe), alone(saved({n: 4 + 0 * one for n, one in tensors.items() if n.endswith("alpha")}), 1.0))
    assert all(slot.adapters.stored("own") is not None for slot in site.slots(pipe.unet).values())


def test_a_module_that_took_the_place_of_another_is_looked_at(files: dict[str, Path]) -> None:
    pipe = make_pipe()
    adapters = Adapters(pipe)
    adapters.load(files["a"], "own")
    adapters.remove("own")
    path = next(path for path, one in pipe.unet.named_modules() if path.endswith("attn1.to_q"))
    layer = pipe.unet.get_submodule(path)
    pipe.unet.set_submodule(path, torch.nn.Linear(layer.in_features + 1, layer.out_features, bias=False))
    with pytest.raises(UserError, match="do not fit a Linear"):
        adapters.load(files["b"], "own")
    pipe.unet.set_submodule(path, torch.nn.Linear(layer.in_features, layer.out_features, bias=False))
    adapters.load(files["b"], "own")
    assert site.slots(pipe.unet)[path].adapters.stored("own") is not None
