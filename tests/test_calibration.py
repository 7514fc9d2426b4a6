"""Calibrated strengths: what is measured, against the network asked directly, and what sheets and pictures make of it."""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from making import make_adapter
from PIL import Image

from peft_diffusion import Adapters, BlendConfig, ByPart, GenerateConfig, UserError, blend, generate
from peft_diffusion.core.errors import Interrupted
from peft_diffusion.core.events import Event, Noted
from peft_diffusion.generation import overlap_drawing
from peft_diffusion.generation.calibration import Calibration, Row, _least
from peft_diffusion.generation.on_pictures import suggested_on_pictures
from peft_diffusion.generation.overlap_files import write
from peft_diffusion.generation.settings import Sampling


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("calibration")
    return {
        name: make_adapter(folder / f"{name}.safetensors", tiny_base, seed) for seed, name in enumerate(("ink", "flat"), 1)
    }


@pytest.fixture
def adapters(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> Adapters:
    made = Adapters(tiny_pipe)
    for name, file in files.items():
        made.load(file, name=name, strength=0.25)
    return made


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_effects_are_what_the_network_answers_of_the_same_latents(adapters: Adapters, guidance: float) -> None:
    amounts: dict[str, float | ByPart] = {"ink": 0.7, "flat": ByPart(0.5, components={"text_encoder": 0.0})}
    found = adapters.calibrate(["a cat"], amounts, seed=3, sampling=Sampling(steps=1, guidance=guidance, scheduler="ddim"))
    pipe = adapters.pipe
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(1)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def predicted(name: str) -> torch.Tensor:
        adapters.set({one: amounts[one] if one == name else 0.0 for one in amounts})
        told, empty = (pipe.encode_prompt(text, pipe.device, 1, False)[0] for text in ("a cat", ""))
        with_prompt, without = (pipe.unet(noise, 1, hidden).sample for hidden in (told, empty))
        answer: torch.Tensor = without + guidance * (with_prompt - without)
        return answer

    for name, effect in found.effects.items():
        assert effect == pytest.approx(float((predicted(name) - predicted("")).square().mean().sqrt()), rel=1e-4)


def test_factors_and_shares_make_the_same_of_every_adapter() -> None:
    found = Calibration({"ink": 0.8, "flat": 0.2, "oil": 0.1})
    done = [found.factors[name] * effect for name, effect in found.effects.items()]
    assert done == pytest.approx([0.016 ** (1 / 3)] * 3)
    mix = found.evenly({"ink": 0.5, "flat": 0.3, "oil": 0.2})
    assert sum(mix.values()) == pytest.approx(1)
    parts = [mix[name] * effect for name, effect in found.effects.items()]
    assert [part / sum(parts) for part in parts] == pytest.approx([0.5, 0.3, 0.2])
    assert found.evenly({"ink": 1.0, "flat": 0.0, "oil": 0.0}) == {"ink": 1.0, "flat": 0.0, "oil": 0.0}
    none = Calibration({"ink": 0.8, "flat": 0.0})
    assert none.silent == ("flat",) and none.factors == pytest.approx({"ink": 1.0, "flat": 1.0})
    assert none.evenly({"ink": 0.5, "flat": 0.5}) == {"ink": 0.5, "flat": 0.5}


@pytest.mark.slow
def test_calibrating_leaves_strengths_and_network_as_they_were(adapters: Adapters) -> None:
    network = adapters.pipe.unet
    before = adapters._registry.states()["unet"].strengths.values.clone(), len(network._forward_hooks)
    once, again = (adapters.calibrate(["a cat", "a cat"], sampling=Sampling(steps=2)) for _ in range(2))
    assert once == again == adapters.calibrate(["a cat"], sampling=Sampling(steps=2)) and all(once.effects.values())
    after = adapters._registry.states()["unet"].strengths.values, len(network._forward_hooks)
    assert torch.equal(after[0], before[0]) and after[1] == before[1]
    with pytest.raises(UserError, match="needs a prompt"):
        adapters.calibrate([])
    with pytest.raises(UserError, match="no adapter 'nobody'"):
        adapters.calibrate(["a cat"], {"nobody": 1.0})
    adapters.merge()
    with pytest.raises(UserError, match="unmerge them before you calibrate"):
        adapters.calibrate(["a cat"])


@pytest.mark.slow
def test_columns_are_placed_by_how_far_pictures_are_from_both_ends(adapters: Adapters) -> None:
    prompts, sampling, amounts = (
        ["a cat", "a house"],
        Sampling(steps=2, guidance=1.0, batch_size=3),
        {"ink": 1.0, "flat": 0.5},
    )
    found = adapters.calibrate(prompts, amounts, seed=2, sampling=sampling, rows=True)
    row = found.rows["ink", "flat"]
    even = [found.effects["flat"] * n / (found.effects["flat"] * n + found.effects["ink"] * (8 - n)) for n in range(9)]
    assert row.parts == pytest.approx(even) and row.places[0] == 0 and row.places[-1] == 1

    def drawn(part: float) -> torch.Tensor:
        adapters.set(ink=part, flat=0.5 * (1 - part))
        made = []
        for prompt in prompts:
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
            made.append(
                adapters.pipe(prompt, latents=noise, num_inference_steps=2, guidance_scale=1, output_type="latent")[0]
            )
        return torch.cat(made).flatten(1)

    ends = drawn(0.0), drawn(1.0)
    between = [[(drawn(part) - end).norm(dim=1) for end in ends] for part in row.parts]
    expected = [float((one / (one + other)).mean()) for one, other in between]
    assert row.places == pytest.approx(list(accumulate(expected, max)), abs=1e-4)
    part = found.evenly({"ink": 0.5, "flat": 0.5})["ink"]
    from_flat, from_ink = ((drawn(part) - end).norm(dim=1) for end in ends)
    assert float((from_flat / (from_flat + from_ink)).mean()) == pytest.approx(0.5, abs=0.02)
    assert found.evenly({"flat": 0.5, "ink": 0.5}) == pytest.approx({"flat": 1 - part, "ink": part})


@pytest.mark.parametrize(("place", "part"), [(0, 0), (0.1, 0.25), (0.2, 0.5), (0.6, 0.75), (1, 1)])
def test_a_row_is_read_by_straight_lines(place: float, part: float) -> None:
    found = Calibration({"ink": 0.3, "flat": 0.1, "oil": 0.1}, {("ink", "flat"): Row((0, 0.5, 0.5, 1), (0, 0.2, 0.2, 1))})
    assert found.evenly({"ink": place, "flat": 1 - place, "oil": 0}) == pytest.approx(
        {"ink": part, "flat": 1 - part, "oil": 0}
    )


@pytest.mark.slow
def test_a_row_between_equal_ends_is_none(adapters: Adapters) -> None:
    found = adapters.calibrate(["a cat"], {"ink": 0.0, "flat": 0.0}, sampling=Sampling(steps=1), rows=True)
    assert not found.rows and found.evenly({"ink": 0.5, "flat": 0.5}) == {"ink": 0.5, "flat": 0.5}


@pytest.mark.slow
def test_a_sheet_is_placed_as_a_calibration_says(files: dict[str, Path], adapters: Adapters, tmp_path: Path) -> None:
    sampling = Sampling(steps=2, guidance=1.0)
    known = adapters.calibrate(["a cat"], {"ink": 1.0, "flat": 0.5}, sampling=sampling, rows=True)
    for name in adapters.names:
        adapters.remove(name)
    told: list[Event] = []
    chosen = (str(files["ink"]), f"{files['flat']}=0.5")
    config = BlendConfig(
        "a cat", adapter=chosen, columns=3, steps=2, guidance=1.0, output=tmp_path / "b.png", device="cpu",
        report=tmp_path / "meet.json",
    )  # fmt: skip
    drawn = blend(config, pipe=adapters.pipe, observers=[told.append])
    report = json.loads((tmp_path / "meet.json").read_text())
    assert report["effects"] == pytest.approx(known.effects) and {one["adapter"] for one in report["sizes"]} == {
        "ink",
        "flat",
    }
    assert report["excess"] <= report["excess_whole"] and {one["adapter"] for one in report["acting"]} == {"ink", "flat"}
    assert any(isinstance(event, Noted) and "they cost each other" in event.message for event in told)
    ends, middle = drawn.recipes[0][::2], {Path(one.path or "").stem: one.strength for one in drawn.recipes[0][1].adapters}
    assert [[one.strength for one in end.adapters if one.strength] for end in ends] == [[1.0], [0.5]]
    even = known.evenly({"ink": 0.5, "flat": 0.5})
    assert middle == pytest.approx({"ink": even["ink"], "flat": 0.5 * even["flat"]}) and even["ink"] != pytest.approx(
        0.5, abs=1e-3
    )
    assert any(isinstance(event, Noted) and "how far pictures are from both ends" in event.message for event in told)


@pytest.mark.slow
def test_pictures_are_drawn_with_scaled_strengths_which_their_recipes_hold(
    files: dict[str, Path], adapters: Adapters, tmp_path: Path
) -> None:
    halved = ByPart(components=dict.fromkeys(("text_encoder", "text_encoder_2"), 0.5))
    alone: dict[str, float | ByPart] = {"ink": 1.0, "flat": halved}  # as they act
    factors = adapters.calibrate(["a cat"], alone, sampling=Sampling(steps=1, guidance=1.0)).factors
    for name in adapters.names:
        adapters.remove(name)
    chosen = (f"{files['ink']}=0.5", f"{files['flat']}=0.25,te:0.5")
    common: dict[str, Any] = {"steps": 1, "guidance": 1.0, "device": "cpu"}
    config = GenerateConfig("a cat", adapter=chosen, calibrate=True, output=tmp_path / "a.png", **common)
    first = generate(config, pipe=adapters.pipe)[0]
    assert [one.strength for one in first.recipe.adapters] == pytest.approx([0.5 * factors["ink"], 0.25 * factors["flat"]])
    again = generate(GenerateConfig(recipe=first.path, output=tmp_path / "b.png", device="cpu"), pipe=adapters.pipe)[0]
    assert again.recipe == first.recipe and list(again.image.getdata()) == list(first.image.getdata())
    with pytest.raises(UserError, match="--calibrate compares adapters, and there is 1;"):
        generate(GenerateConfig("a cat", adapter=chosen[0], calibrate=True, output=tmp_path / "b.png", **common))
    with pytest.raises(UserError, match="--compose-file weighs them as was learned; leave one away"):
        GenerateConfig("a cat", adapter=chosen, calibrate=True, compose_file=tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="leave --calibrate away"):
        GenerateConfig(recipe=first.path, calibrate=True)


@pytest.mark.slow
def test_a_report_says_what_the_changed_weights_say(files: dict[str, Path], adapters: Adapters) -> None:
    found = adapters.report()
    pipe, path = adapters.pipe, next(iter(found.sizes)).site
    component = found.sizes[0].component
    part = getattr(pipe, component)
    changes = {}
    before = part.get_submodule(path).weight.detach().clone()
    for name in adapters.names:
        adapters.set({one: float(one == name) for one in adapters.names})
        adapters.merge()
        changes[name] = part.get_submodule(path).weight.detach().clone() - before
        adapters.unmerge()
    for size in (one for one in found.sizes if (one.component, one.site) == (component, path)):
        assert size.change == pytest.approx(float(changes[size.adapter].norm()), rel=1e-3)
        assert size.relative == pytest.approx(size.change / float(before.norm()))
    met = next(one for one in found.overlaps if (one.component, one.site) == (component, path))
    ink, flat = (changes[name].flatten(1).double() for name in ("ink", "flat"))
    assert met.cosine == pytest.approx(float(torch.cosine_similarity(ink.flatten(), flat.flatten(), 0)), abs=1e-3)
    for told, one, other in ((met.writes, ink, flat), (met.reads, ink.T, flat.T)):
        a, b = (torch.linalg.svd(matrix)[0][:, :4] for matrix in (one, other))  # both are of rank 4
        assert told == pytest.approx(float((a @ a.T @ b @ b.T).trace()) / 4, abs=1e-3)
    norms = {name: sum(one.change**2 for one in found.sizes if one.adapter == name) ** 0.5 for name in adapters.names}
    assert found.suggested == found.even and found.excess is None and not found.acting and not found.conflicts
    assert found.even["ink"] * norms["ink"] == pytest.approx(found.suggested["flat"] * norms["flat"])
    assert sum(found.suggested.values()) == pytest.approx(1) and not found.others and not found.effects
    blocks = found.by_block()
    assert {one.of for one in blocks} == {"ink", "flat", "ink x flat"}
    assert sum(one.change**2 for one in blocks if one.of == "ink" and one.change) == pytest.approx(norms["ink"] ** 2)


@pytest.mark.slow
def test_a_report_is_drawn_as_heat_maps(adapters: Adapters, tmp_path: Path) -> None:
    write(tmp_path / "meet.png", adapters.report())
    with Image.open(tmp_path / "meet.png") as drawn:
        drawn.load()
        assert drawn.width >= 800 and len(drawn.convert("RGB").getcolors(1 << 24) or ()) > 100
    with pytest.raises(UserError, match=r"ends in \.json, \.png"):
        BlendConfig("a", adapter=("a", "b"), report="meet.txt")


@pytest.mark.slow
def test_an_adapter_meets_itself_and_prompts_say_what_to_suggest(files: dict[str, Path], adapters: Adapters) -> None:
    adapters.load(files["ink"], name="again")
    adapters.remove("flat")
    sampling = Sampling(steps=1, guidance=1.0)
    found = adapters.report(["a cat"], sampling=sampling)
    for one in found.overlaps:
        assert (one.cosine, one.reads, one.writes) == pytest.approx((1, 1, 1), abs=1e-4)
    assert found.effects == adapters.calibrate(["a cat"], sampling=sampling).effects
    assert found.even == pytest.approx({"ink": 0.5, "again": 0.5})
    assert found.suggested == pytest.approx({"ink": 0.5, "again": 0.5}, abs=1e-3)
    assert found.excess == pytest.approx(0, abs=1e-8) and found.excess_whole is not None and found.excess_whole > 1e-6
    assert all(one.cosine == pytest.approx(1, abs=1e-4) for one in found.conflicts)
    assert json.loads(json.dumps(found.as_json()))["overlaps"][0]["first"] == "ink"


def test_the_first_prompts_that_are_drawn_have_some_of_each_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a measurement takes the first few alone."""
    taken: list[str] = []

    def acting(_: Any, names: Any, cells: Any, *__: Any) -> tuple[Any, Any]:
        taken.extend(cell.prompt for cell in cells)
        return (), ()

    monkeypatch.setattr(overlap_drawing, "acting", acting)
    monkeypatch.setattr(overlap_drawing, "suggested", lambda *_: None)
    prompts = {"ink": ["ink 1", "ink 2", "ink 3"], "flat": ["flat 1"]}
    nobody: Any = None  # as nothing is drawn
    overlap_drawing.drawn(nobody, prompts, 0, Sampling(), effects={})
    assert taken == ["ink 1", "flat 1", "ink 2", "ink 3"]


@pytest.mark.slow
@torch.no_grad()
def test_what_adapters_add_to_outputs_is_what_layers_give_with_and_without_them(adapters: Adapters) -> None:
    sampling = Sampling(steps=1, guidance=1.0, scheduler="ddim")
    found = adapters.report(["a cat"], seed=3, sampling=sampling)
    pipe = adapters.pipe
    hidden = pipe.encode_prompt("a cat", pipe.device, 1, False)[0]
    adapters.set(dict.fromkeys(adapters.names, 0.0))
    hidden = pipe.encode_prompt("a cat", pipe.device, 1, False)[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    path = next(one.site for one in found.acting if one.component == "unet")
    layer, seen = pipe.unet.get_submodule(path), list[torch.Tensor]()
    handle = layer.register_forward_hook(lambda _, given, output: seen.append(given[0]))
    pipe.unet(noise, 1, hidden)
    handle.remove()
    (given,) = seen
    outputs = {}
    for name in ("", *adapters.names):
        adapters.set({one: float(one == name) for one in adapters.names})
        outputs[name] = layer(given)
    changes = {name: (outputs[name] - outputs[""]).flatten() for name in adapters.names}
    told = {one.adapter: one.relative for one in found.acting if (one.component, one.site) == ("unet", path)}
    assert told == pytest.approx({n: float(change.norm() / outputs[""].norm()) for n, change in changes.items()}, rel=1e-3)
    (conflict,) = (one for one in found.conflicts if (one.component, one.site) == ("unet", path))
    expected = torch.cosine_similarity(changes["ink"], changes["flat"], 0)
    assert conflict.cosine == pytest.approx(float(expected), abs=1e-3)
    blocks = [one for one in found.by_block() if one.of == "ink x flat"]
    assert [one for one in blocks if one.conflict is None] == []


@pytest.mark.slow
def test_suggested_strengths_leave_each_adapter_nearest_to_what_it_does_alone(adapters: Adapters) -> None:
    sampling = Sampling(steps=1, guidance=1.0, scheduler="ddim")
    prompts = {"ink": ["a cat"], "flat": ["a red house by a lake"]}
    found = adapters.report(prompts, seed=3, sampling=sampling)
    pipe = adapters.pipe
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def lost(strengths: dict[str, float]) -> float:
        """What the adapters cost each other, of the network asked directly."""
        total = 0.0
        for name, (prompt,) in prompts.items():
            answers = []
            for one in ({other: float(other == name) for other in prompts}, strengths):
                adapters.set(one)
                answers.append(pipe.unet(noise, 1, pipe.encode_prompt(prompt, pipe.device, 1, False)[0]).sample)
            total += float((answers[1] - answers[0]).square().mean())
        return total

    assert found.excess_whole == pytest.approx(lost({"ink": 1.0, "flat": 1.0}), rel=1e-3)
    assert found.excess == pytest.approx(lost(dict(found.suggested)), rel=1e-3)
    near = [lost({name: times * share for name, share in found.suggested.items()}) for times in (0.5, 1.5)]
    assert found.excess is not None and found.excess_whole is not None
    assert found.excess < min(lost({"ink": 0.5, "flat": 0.5}), found.excess_whole, *near)
    with pytest.raises(UserError, match="there is no prompt that calls flat"):
        adapters.report({"ink": ["a cat"]})


class _Bowl:
    """Losses that are quadratic in strengths: 1 for each adapter alone, and least together at known shares."""

    def __init__(self, least: Mapping[str, float], bends: Sequence[Sequence[float]], floor: float = 0.0) -> None:
        self.least, self.bends, self.floor = least, bends, floor
        self.prompts = {name: ["a cat"] for name in least}
        self.asked = list[Mapping[str, float | ByPart]]()

    def loss(self, name: str, amounts: Mapping[str, float | ByPart]) -> float:
        if list(amounts) in ([], [name]):
            return 1.0 if amounts else 2.0  # the base loses twice as much
        self.asked.append(amounts)
        apart = [float(amounts[one]) / 0.5 - least for one, least in self.least.items()]  # type: ignore[arg-type]
        far = sum(bend * a * b for a, row in zip(apart, self.bends, strict=True) for b, bend in zip(apart, row, strict=True))
        return 1.0 + (self.floor + far) / len(self.least)


@pytest.mark.parametrize(
    "least, bends, wanted",
    [
        ((0.6, 0.9), ((1.0, 0.4), (0.4, 0.5)), (0.6, 0.9)),
        ((1.5, 0.7), ((1.0, 0.0), (0.0, 1.0)), (1.0, 0.7)),  # no share is above 1
        ((-1.0, 0.8), ((1.0, 0.0), (0.0, 1.0)), (0.0, 0.8)),  # nor below 0
        ((0.3, 0.9, 0.62), ((2.0, 0.3, 0.1), (0.3, 1.0, 0.2), (0.1, 0.2, 1.0)), (0.3, 0.9, 0.62)),
    ],
)
def test_strengths_by_pictures_are_where_their_losses_rise_least(
    least: tuple[float, ...], bends: tuple[tuple[float, ...], ...], wanted: tuple[float, ...]
) -> None:
    names = "abc"[: len(least)]
    losses = _Bowl(dict(zip(names, least, strict=True)), bends, floor=-0.2)  # they help each other where they are best
    found = suggested_on_pictures(losses, dict.fromkeys(names, 0.5))
    assert tuple(found.strengths.values()) == pytest.approx(wanted, abs=0.006)
    several = (found.strengths.values(), [1.0] * len(names))
    mixes = [{name: 0.5 * share for name, share in zip(names, shares, strict=True)} for shares in several]
    best, whole = (sum((losses.loss(name, mix) - 1) / 2 for name in names) for mix in mixes)
    assert found.excess == pytest.approx(best) and found.excess_whole == pytest.approx(whole)
    assert losses.asked[0] == dict.fromkeys(names, 0.5) and len(losses.asked) <= 14 * len(names)


def test_strengths_by_pictures_are_looked_for_again_where_the_loss_is_no_quadratic() -> None:
    """The first mixes tell the least wrongly, and less wrongly with what was measured there."""

    class Steep(_Bowl):
        def loss(self, name: str, amounts: Mapping[str, float | ByPart]) -> float:
            steep = math.fsum((float(one) / 0.5) ** 4 for one in amounts.values())  # type: ignore[arg-type]
            return super().loss(name, amounts) + (steep if len(amounts) == 2 else 0.0)

    losses = Steep({"a": 0.2, "b": 0.2}, ((2.0, 0.0), (0.0, 2.0)))
    found = suggested_on_pictures(losses, {"a": 0.5, "b": 0.5})
    mixes = losses.asked[::2]  # both are asked of each
    costs = [sum(losses.loss(name, mix) for name in "ab") for mix in mixes]
    assert min(costs) == min(costs[7:]) < costs[6] < min(costs[:6])
    assert {name: 0.5 * share for name, share in found.strengths.items()} == mixes[costs.index(min(costs))]


def test_strengths_by_pictures_are_whole_where_nothing_else_is_better_and_stop() -> None:
    """A loss that is no quadratic: it falls at whole strengths alone."""

    class Cliff(_Bowl):
        def loss(self, name: str, amounts: Mapping[str, float | ByPart]) -> float:
            return 1.0 if set(amounts.values()) == {0.5} else 2.0

    losses = Cliff({"a": 1.0, "b": 1.0}, ())
    found = suggested_on_pictures(losses, {"a": 0.5, "b": 0.5})
    assert found.strengths == {"a": 1.0, "b": 1.0} and found.excess == found.excess_whole == 0.0
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="stopped while strengths were looked for"):
        suggested_on_pictures(losses, {"a": 0.5, "b": 0.5}, stop)


@pytest.mark.parametrize(
    "on, value, said",
    [
        ({}, 0.0, "pictures of a is 0 on the base"),
        ({"b"}, math.nan, "pictures of b is nan with b on"),
        ({"a", "b"}, math.inf, "pictures of a is inf with a and b on"),
    ],
)
def test_strengths_by_pictures_need_finite_losses(on: set[str], value: float, said: str) -> None:
    class Broken(_Bowl):
        def loss(self, name: str, amounts: Mapping[str, float | ByPart]) -> float:
            return value if set(amounts) == set(on) else super().loss(name, amounts)

    with pytest.raises(UserError, match=said):
        suggested_on_pictures(Broken({"a": 1.0, "b": 1.0}, ((1.0, 0.0), (0.0, 1.0))), {"a": 0.5, "b": 0.5})


def test_shares_are_least_inside_their_bounds() -> None:
    products = torch.tensor([[2.0, 1.5], [1.5, 2.0]]).double()
    inside, outside = (_least(products, torch.tensor(wanted).double()) for wanted in ([2.0, 1.8], [4.0, 0.5]))
    assert torch.allclose(products @ inside, torch.tensor([2.0, 1.8]).double())
    grid = [(a / 100, b / 100) for a in range(101) for b in range(101)]
    best = min(grid, key=lambda s: 2 * s[0] ** 2 + 3 * s[0] * s[1] + 2 * s[1] ** 2 - 2 * (4 * s[0] + 0.5 * s[1]))
    assert outside.tolist() == pytest.approx(best, abs=0.01)
