"""One truth about the adapters of a base, whoever asks: another registry, one of a copy, one of another pipeline."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe, tiny_tokenizer
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusionPipeline
from language import make_lm
from laws import randomize, same, state, strengths_of
from making import modes, step_watches
from test_formats import picture, write_adapter

from peft_diffusion import formats
from peft_diffusion.bases import checksum, components, describe, fingerprint
from peft_diffusion.bases.digest import quantize
from peft_diffusion.bases.taught import learned
from peft_diffusion.bases.words import teach, with_initial_tokens
from peft_diffusion.core import merge, site
from peft_diffusion.core.component import Link
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.slot import SLOT, state_of
from peft_diffusion.generation import Adapters, LoadedAdapter, Schedule
from peft_diffusion.generation.generate import cell_recipes
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Sampling
from peft_diffusion.methods.bottleneck import Bottleneck
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.prompt import SoftPrompt
from peft_diffusion.methods.tokens import Tokens
from peft_diffusion.training.attachment import NAME, attach, evaluating
from peft_diffusion.training.settings.placements import Placement

FADING = Schedule([0.0, 1.0])


def write_words(path: Path, *methods: Tokens | SoftPrompt) -> Path:
    """A file of an adapter that teaches words."""
    pipe = make_pipe()
    chosen = [(with_initial_tokens(pipe, "text_encoder", method), "tokens") for method in methods]
    site.attach_all(pipe.text_encoder, "made", chosen)
    randomize(pipe.text_encoder, "made")
    formats.save(path, {"text_encoder": pipe.text_encoder}, "made", formats.Spec(base=asdict(describe(pipe))))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "ink": write_adapter(folder / "ink.safetensors", make_pipe(), seed=3),
        "flat": write_adapter(folder / "flat.safetensors", make_pipe(), target="all-linear", seed=4, parts=("unet",)),
        "cat": write_words(folder / "cat.safetensors", Tokens("<cat>", 2, "cat")),
        "dog": write_words(folder / "dog.safetensors", Tokens("<dog>", 3, "dog"), SoftPrompt(2, "red")),
    }


def same_parts(pipe: Any) -> StableDiffusionPipeline:
    """Another pipeline of the same components."""
    made = StableDiffusionPipeline(**{**pipe.components, "requires_safety_checker": False})
    made.set_progress_bar_config(disable=True)
    return made


OTHERS: dict[str, Callable[[Adapters], Adapters]] = {
    "second": lambda adapters: Adapters(adapters.pipe),
    "from_pipe": lambda adapters: Adapters(AutoPipelineForImage2Image.from_pipe(adapters.pipe)),
    "same parts": lambda adapters: Adapters(same_parts(adapters.pipe)),
}
COPIES: dict[str, Callable[[Adapters], Adapters]] = {
    "deepcopy of the pipeline": lambda adapters: Adapters(copy.deepcopy(adapters.pipe)),
    "deepcopy of the registry": copy.deepcopy,
    "pickle of the pipeline": lambda adapters: Adapters(pickle.loads(pickle.dumps(adapters.pipe))),
    "pickle of the registry": lambda adapters: pickle.loads(pickle.dumps(adapters)),
    "deepcopy of the components": lambda adapters: Adapters(
        type(adapters.pipe)(**copy.deepcopy(dict(adapters.pipe.components)), requires_safety_checker=False)
    ),
}


def loaded(adapters: Adapters) -> tuple[str, ...]:
    """The names of what is loaded; a call, because mypy takes an attribute to stay what it was compared to."""
    return adapters.names


def told(adapters: Adapters) -> list[object]:
    """All that a registry says."""
    infos = [adapters[name] for name in adapters.names]
    # Not the name of the base, which is that of its class where a pipeline came from no file.
    return [adapters.names, infos, adapters.schedules, adapters.merged, adapters.base.fingerprint, strengths(adapters)]


def strengths(adapters: Adapters) -> dict[str, list[Any]]:
    """The strengths on each component."""
    found = {name: site.strengths(part) for name, part in components(adapters.pipe).items()}
    return {name: one.values.tolist() for name, one in found.items() if one is not None}


def refusals(adapters: Adapters, files: dict[str, Path]) -> list[str | None]:
    """What a registry says to everything that may be refused; None where it does it after all."""
    wishes: list[Callable[[], object]] = [
        adapters.merge,
        lambda: adapters.load(files["ink"], name="ink"),
        lambda: adapters.set(nobody=1.0),
        lambda: adapters["nobody"],
        lambda: adapters.remove("nobody"),
        lambda: adapters.set(ink=float("nan")),
    ]
    if adapters.merged:
        wishes += [lambda: adapters.set(ink=0.5), lambda: adapters.remove("ink"), lambda: adapters.load(files["flat"])]
    else:
        wishes += [adapters.unmerge]
    said: list[str | None] = []
    for wish in wishes:
        try:
            wish()
            said.append(None)
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHERS)
def test_another_registry_of_the_same_components_says_and_refuses_the_same(
    way: str, files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    first = Adapters(tiny_pipe)
    early = OTHERS[way](first)
    first.load(files["ink"], strength=0.5)
    first.load(files["flat"], name="look", strength=FADING)
    late = OTHERS[way](first)
    for other in (early, late):
        assert loaded(other) == ("ink", "look") and other.schedules == {"look": FADING}
        assert other["ink"] is first["ink"] and other["ink"].path == files["ink"]
        assert told(other) == told(first)
        assert refusals(other, files) == refusals(first, files)
        assert "look: a strength that changes over the steps cannot be merged" in refusals(other, files)
    assert None not in refusals(first, files)
    first.set(look=0.25)
    first.merge()
    latest = OTHERS[way](first)
    for other in (early, late, latest):
        assert other.merged == ("unet", "text_encoder") and other.schedules == {}
        assert told(other) == told(first) and refusals(other, files) == refusals(first, files)
        assert "the adapters are merged already" in str(refusals(other, files)[0])
    assert None not in refusals(first, files)


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHERS)
def test_what_one_registry_does_the_others_see_at_once(
    way: str, files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    before, digest = picture(tiny_pipe), checksum(components(tiny_pipe))
    first = Adapters(tiny_pipe)
    other = OTHERS[way](first)
    assert other.load(files["ink"]) == "ink" and loaded(first) == ("ink",)
    assert first.load(files["ink"]) == "ink_2" and loaded(other) == ("ink", "ink_2")
    first.remove("ink")
    assert loaded(other) == ("ink_2",) and other.load(files["flat"], name="ink") == "ink"
    assert loaded(first) == ("ink_2", "ink") and first["ink"].path == files["flat"]
    first.set(ink=FADING)
    assert step_watches(tiny_pipe.unet)
    other.set(ink=[0.0, 1.0])
    assert first.schedules == {} and strengths(first) == strengths(other)
    other.set(ink=1.0)
    assert not step_watches(tiny_pipe.unet)
    other.merge()
    first.unmerge()
    assert first.merged == other.merged == ()
    for name in first.names:
        other.remove(name)
    assert loaded(first) == () and np.array_equal(picture(tiny_pipe), before)
    assert checksum(components(tiny_pipe)) == digest


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_says_the_same_and_goes_its_own_way(
    way: str, merged: bool, files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    plain = state(tiny_pipe.unet)
    first = Adapters(tiny_pipe)
    first.load(files["ink"], strength=0.5)
    first.load(files["flat"], strength=1.0 if merged else FADING)
    if merged:
        first.merge()
    running, before = picture(tiny_pipe), told(first)
    other = COPIES[way](first)
    assert other.pipe is not tiny_pipe and other.pipe.unet is not tiny_pipe.unet
    assert told(other) == before and other["ink"] is not first["ink"]
    other.pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(picture(other.pipe), running)
    if merged:
        other.unmerge()
        assert same(state(other.pipe.unet), plain)
    other.set(flat=0.0)
    other.remove("ink")
    assert told(first) == before and np.array_equal(picture(tiny_pipe), running)
    assert not step_watches(other.pipe.unet) and bool(step_watches(tiny_pipe.unet)) != merged
    other.remove("flat")
    assert same(state(other.pipe.unet), plain) and not site.sites(other.pipe.unet)
    assert told(first) == before and np.array_equal(picture(tiny_pipe), running)


@pytest.mark.slow
def test_a_copy_follows_its_own_steps(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    first = Adapters(tiny_pipe)
    first.load(files["flat"], strength=FADING)
    twin = copy.deepcopy(tiny_pipe)
    twin.set_progress_bar_config(disable=True)
    faded = picture(tiny_pipe, steps=4)
    first.set(flat=1.0)  # nobody watches the original now
    assert np.array_equal(picture(twin, steps=4), faded) and not np.array_equal(picture(tiny_pipe, steps=4), faded)
    twin.scheduler.set_timesteps(2)
    x, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 32)
    twin.unet(x, twin.scheduler.timesteps[1], text)
    found = site.strengths(twin.unet)
    assert found is not None and found.values[found.index("flat")].unique().tolist() == [1.0]
    lone = copy.deepcopy(twin.unet)
    with pytest.raises(UserError, match="called by no pipeline"):
        lone(x, 1.0, text)
    with pytest.raises(UserError, match=r"timestep 123\.4, which is none of the scheduler's 2"):
        twin.unet(x, 123.4, text)
    assert not any(found is one for one in gc.get_referrers(lone))


@pytest.mark.slow
def test_a_unet_keeps_no_pipeline_alive_and_a_pipeline_is_freed(files: dict[str, Path]) -> None:
    pipe = make_pipe()
    unet, gone = pipe.unet, weakref.ref(pipe)
    adapters = Adapters(pipe)
    adapters.load(files["flat"], strength=FADING)
    del pipe, adapters
    assert gone() is None  # at once: there is no cycle
    other = Adapters(StableDiffusionPipeline(**{**make_pipe().components, "unet": unet, "requires_safety_checker": False}))
    assert loaded(other) == ("flat",) and other.schedules == {"flat": FADING}
    other.pipe.set_progress_bar_config(disable=True)
    picture(other.pipe)
    other.pipe.scheduler.set_timesteps(2)
    with pytest.raises(UserError, match="none of the scheduler's 2"):  # it is this pipeline's steps that are asked now
        unet(torch.zeros(1, 4, 8, 8), 123.4, torch.zeros(1, 77, 32))
    other.remove("flat")
    assert not unet._forward_pre_hooks and SLOT not in unet._modules


@pytest.mark.slow
def test_adapters_without_a_file_are_listed_for_what_they_are(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    assert adapters.load(files["flat"]) == "flat"
    sites = site.attach(tiny_pipe.unet, "mine", Lora(rank=2), "attention")
    site.attach(tiny_pipe.text_encoder, "mine", Lora(rank=2), "attention")
    assert loaded(adapters) == ("flat", "mine")
    mine = adapters["mine"]
    assert isinstance(mine, LoadedAdapter) and mine.path is None and mine.sha256 is None and mine.warnings == ()
    both = len(sites) + len(site.sites(tiny_pipe.text_encoder, "mine"))
    assert mine.report.sites == both and mine.report.found == 3 * both and mine.spec.methods == {}
    with pytest.raises(UserError, match="'mine' is loaded already"):
        adapters.load(files["ink"], name="mine")
    with pytest.raises(UserError, match="'mine' was attached without a file, so no recipe can name it"):
        cell_recipes(adapters, [Cell("a cat", 0, {"mine": 1.0})], Sampling())
    adapters.set(mine=0.5)
    adapters.merge()
    adapters.unmerge()
    adapters.remove("mine")
    assert loaded(adapters) == ("flat",) and not site.sites(tiny_pipe.text_encoder)
    site.detach(tiny_pipe.unet, "flat")
    assert loaded(adapters) == () and adapters.load(files["ink"]) == "ink"
    with pytest.raises(UserError, match="no adapter 'flat' is loaded; there are: ink"):
        adapters["flat"]


def test_a_registry_disturbs_no_training(tiny_pipe: DiffusionPipeline) -> None:
    tiny_pipe.unet.train()
    block = Placement("unet", "attention", Lora(rank=2, dropout=0.5), None)
    attach({"unet": tiny_pipe.unet}, [block], 0, lambda _: 1e-3)
    before = modes(tiny_pipe.unet)
    adapters = Adapters(tiny_pipe)
    assert loaded(adapters) == (NAME,) and adapters[NAME].path is None
    own = list(site.adapters(tiny_pipe.unet, NAME).values())
    assert all(adapter.training and all(one.requires_grad for one in adapter.parameters()) for adapter in own)
    base = [one for name, one in tiny_pipe.unet.named_parameters() if SLOT not in name]
    assert base and not any(one.requires_grad for one in base) and modes(tiny_pipe.unet) == before
    with evaluating([tiny_pipe.unet]):
        Adapters(tiny_pipe)
        assert not any(adapter.training for adapter in own)


@pytest.mark.slow
def test_pictures_leave_adapters_that_no_cell_speaks_of_as_they_are(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files["ink"], strength=FADING)
    sampling = Sampling(steps=2, batch_size=1)
    (faded,) = paint(adapters, [Cell("a cat", 0, None)], sampling)
    assert adapters.schedules == {"ink": FADING}
    (plain,) = paint(adapters, [Cell("a cat", 0, {})], sampling)
    assert adapters.schedules == {} and set(np.ravel(strengths(adapters)["unet"])) == {0.0}
    assert not np.array_equal(np.asarray(faded), np.asarray(plain))


@pytest.mark.slow
def test_the_base_is_described_as_it_is_without_adapters_merged_or_not(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    first = Adapters(tiny_pipe)
    before = first.base
    first.load(files["ink"])
    first.merge()
    assert Adapters(tiny_pipe).base == before == describe(tiny_pipe)
    assert Adapters(copy.deepcopy(tiny_pipe)).base == before
    first.unmerge()
    tiny_pipe.unet = make_pipe(seed=5).unet
    assert first.base == describe(tiny_pipe) != before  # told of the component that is there now
    tiny_pipe.unet = make_pipe().unet
    assert first.base == before


@pytest.mark.slow
def test_the_identity_of_a_quantized_base_is_that_before_a_merge(tiny_pipe: DiffusionPipeline) -> None:
    quantize({"unet": tiny_pipe.unet}, "int8")
    parts = {"unet": tiny_pipe.unet}
    del tiny_pipe.unet.fingerprint_before_quantization  # so that the weights are read
    before, held = fingerprint(parts), state(tiny_pipe.unet)
    site.attach(tiny_pipe.unet, "a", Lora(rank=2), "all")
    randomize(tiny_pipe.unet, "a")
    merge.merge(tiny_pipe.unet)
    assert not same(state(tiny_pipe.unet), held) and fingerprint(parts) == before
    assert same(merge.unmerged_state(tiny_pipe.unet), held)


@pytest.mark.slow
def test_a_component_refuses_to_merge_past_a_schedule_whoever_asks(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    Adapters(tiny_pipe).load(files["flat"], strength=FADING)
    with pytest.raises(UserError, match="flat: a strength that changes over the steps cannot be merged"):
        merge.merge(tiny_pipe.unet)
    found = site.strengths(tiny_pipe.unet)
    assert found is not None
    found.write({"flat": 0.5})  # a plain strength ends the schedule, whoever writes it
    assert Adapters(tiny_pipe).schedules == {}
    merge.merge(tiny_pipe.unet)


@pytest.mark.slow
def test_strengths_that_one_component_refuses_are_set_on_none(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files["ink"])
    site.attach(tiny_pipe.text_encoder, "words", Lora(rank=2), "attention")
    adapters.set(words=[0.0, 1.0])
    before = told(adapters)
    none: list[Any] = [[0.0, 0.5, 1.0], {"mid_block": 1.0, "layers.0": [1.0, 2.0, 3.0]}, {"mid_block": 1.0, "layers.0": "x"}]
    for wrong in none:
        with pytest.raises(UserError):
            adapters.set(ink=wrong)
        assert told(adapters) == before


@pytest.mark.slow
def test_a_component_in_anothers_place_brings_what_it_carries(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    adapters = Adapters(tiny_pipe)
    adapters.load(files["ink"], strength=0.5)
    adapters.load(files["flat"], strength=FADING)
    own, fresh = tiny_pipe.unet, make_pipe().unet
    tiny_pipe.unet = fresh
    assert loaded(adapters) == ("ink",) and adapters.schedules == {}  # the text encoder still has its part of it
    assert list(strengths(adapters)) == ["text_encoder"]
    with pytest.raises(UserError, match="'ink' is loaded already"):
        adapters.load(files["ink"], name="ink")
    adapters.set(ink=0.25)
    assert strengths_of(own).values[0].unique().tolist() == [0.5]
    adapters.remove("ink")
    assert loaded(adapters) == () and site.names(own) == ["ink", "flat"]
    tiny_pipe.unet = own
    assert loaded(adapters) == ("ink", "flat") and adapters.schedules == {"flat": FADING}
    assert picture(tiny_pipe).shape == (64, 64, 3)
    for name in adapters.names:
        adapters.remove(name)
    assert not own._forward_pre_hooks and not site.sites(own)


@pytest.mark.slow
def test_components_of_different_origin_may_carry_different_adapters_under_one_name(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    first, second = Adapters(tiny_pipe), Adapters(make_pipe())
    first.load(files["ink"], name="look")
    second.load(files["flat"], name="look")
    tiny_pipe.unet = second.pipe.unet
    assert loaded(first) == ("look",)
    with pytest.raises(UserError, match="unet and text_encoder carry different adapters under the name 'look'"):
        first["look"]
    first.remove("look")
    assert loaded(first) == loaded(second) == ()
    # One file under one name is one adapter, wherever its parts were loaded.
    third, fourth = Adapters(make_pipe()), Adapters(make_pipe())
    for one in (third, fourth):
        one.load(files["ink"])
    third.pipe.unet = fourth.pipe.unet
    assert third["ink"] == fourth["ink"]


@pytest.mark.slow
def test_a_component_that_is_shared_in_part_tells_each_pipeline_of_its_own_parts(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    other = make_pipe()
    other.unet = tiny_pipe.unet
    first, second = Adapters(tiny_pipe), Adapters(other)
    first.load(files["ink"])
    assert loaded(second) == ("ink",) and list(strengths(second)) == ["unet"]
    second.set(ink=0.5)
    assert strengths(first)["unet"] == strengths(second)["unet"] != strengths(first)["text_encoder"]
    second.remove("ink")
    assert loaded(second) == () and loaded(first) == ("ink",)
    first.remove("ink")
    assert loaded(first) == ()


def test_a_part_of_a_component_is_not_given_adapters_by_itself_as_well(tiny_pipe: DiffusionPipeline) -> None:
    unet = tiny_pipe.unet
    site.attach(unet.mid_block, "part", Lora(rank=2), "all-linear")
    with pytest.raises(UserError, match="carries adapters that were attached to another module"):
        site.attach(unet, "whole", Lora(rank=2), "attention")
    site.detach(unet.mid_block, "part")
    site.attach(unet, "whole", Lora(rank=2), "attention")
    with pytest.raises(UserError, match="carries adapters that were attached to another module"):
        site.attach(unet.mid_block, "part", Lora(rank=2), "all-linear")
    assert site.names(unet) == ["whole"]


@pytest.mark.slow
def test_a_load_that_fails_late_leaves_no_trace_in_any_registry(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    first = Adapters(tiny_pipe)
    other = OTHERS["from_pipe"](first)
    first.load(files["flat"])
    before = told(other)
    none: tuple[Any, ...] = (float("nan"), {"nowhere": 1.0}, "x")
    for wrong in none:
        with pytest.raises(UserError):
            other.load(files["ink"], strength=wrong)
        assert told(first) == told(other) == before
    assert first.load(files["ink"]) == "ink" and loaded(other) == ("flat", "ink")


def test_a_language_model_has_one_registry_too(tmp_path: Path) -> None:
    base = make_lm()
    site.attach(base.lm, "made", Bottleneck(hidden=2), "outputs")
    randomize(base.lm, "made")
    formats.save(tmp_path / "a.safetensors", {"lm": base.lm}, "made", formats.Spec(base=asdict(base.describe())))
    first = Adapters(base)
    assert loaded(first) == ("made",)
    first.load(tmp_path / "a.safetensors")
    assert loaded(Adapters(base)) == ("made", "a") and Adapters(base)["a"] is first["a"]
    twin = copy.deepcopy(first)
    twin.remove("made")
    assert loaded(twin) == ("a",) and loaded(first) == ("made", "a") and twin["a"] == first["a"]
    assert loaded(pickle.loads(pickle.dumps(first))) == ("made", "a")


# Words


def ids(pipe: Any, text: str) -> list[int]:
    return list(pipe.tokenizer(text).input_ids)


@torch.no_grad()
def told_by_words(pipe: Any, text: str) -> torch.Tensor:
    """What the text encoder makes of a text."""
    rows = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    found: torch.Tensor = pipe.text_encoder(rows).last_hidden_state
    return found


@pytest.fixture
def taught(files: dict[str, Path]) -> Iterator[Adapters]:
    adapters = Adapters(make_pipe())
    adapters.load(files["cat"])
    adapters.load(files["dog"])
    yield adapters


@pytest.mark.slow
def test_words_are_the_same_to_every_pipeline_of_a_text_encoder(taught: Adapters, files: dict[str, Path]) -> None:
    pipe, plain = taught.pipe, make_pipe().tokenizer
    other = OTHERS["from_pipe"](taught)
    apart = same_parts(pipe)
    apart.tokenizer = tiny_tokenizer()  # one that was loaded for itself
    assert learned(apart.tokenizer) == {}
    own = Adapters(apart)
    everyone = (pipe, other.pipe, apart)
    words = ids(pipe, "a <cat> <dog>")
    assert [ids(one, "a <cat> <dog>") for one in everyone] == [words] * 3 and words != list(plain("a <cat> <dog>").input_ids)
    own.set(dog=0.0)  # its soft prompt is then left away, for all
    assert [ids(one, "a <cat> <dog>") for one in everyone] == [[words[0], *words[3:]]] * 3
    other.remove("cat")
    shorter = ids(pipe, "a <dog>")
    assert [ids(one, "a <dog>") for one in everyone] == [shorter] * 3
    assert all(learned(one.tokenizer) == learned(pipe.tokenizer) for one in everyone)
    assert "<cat>" not in learned(pipe.tokenizer) and "<dog>" in learned(pipe.tokenizer)
    assert torch.equal(told_by_words(apart, "a <dog>"), told_by_words(pipe, "a <dog>"))
    own.load(files["cat"])
    assert [ids(one, "a <cat>") for one in everyone] == [ids(own.pipe, "a <cat>")] * 3 != list(plain("a <cat>").input_ids)
    for name in own.names:
        own.remove(name)
    assert [ids(one, "a <cat> <dog>") for one in everyone] == [list(plain("a <cat> <dog>").input_ids)] * 3
    assert type(apart.tokenizer) is type(plain) and SLOT not in vars(apart.tokenizer)
    Adapters(pipe)
    assert type(pipe.tokenizer) is type(plain) and SLOT not in vars(pipe.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [lambda pipe: pipe, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_words_go_with_an_adapter_that_is_detached_from_the_component_itself(
    copied: Callable[[Any], Any], taught: Adapters
) -> None:
    kept = told_by_words(taught.pipe, "a <dog>")
    site.detach(taught.pipe.text_encoder, "cat")
    pipe = copied(taught.pipe)
    with_dog, plain = ids(pipe, "a <cat> <dog>"), make_pipe().tokenizer
    cat = list(plain("a <cat>").input_ids)[1:-1]
    assert [one for one in with_dog if one < len(plain)] == [0, *cat, 1]
    assert len(with_dog) > len(cat) + 2 and "<cat>" not in learned(pipe.tokenizer)
    assert told_by_words(pipe, "a <cat> <dog>").isfinite().all()
    torch.testing.assert_close(told_by_words(pipe, "a <dog>"), kept)
    adapters = Adapters(pipe)  # numbers words anew
    torch.testing.assert_close(told_by_words(pipe, "a <dog>"), kept)
    adapters.remove("dog")
    assert ids(pipe, "a <cat> <dog>") == list(plain("a <cat> <dog>").input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_pipeline_has_its_own_words(way: str, taught: Adapters) -> None:
    pipe, text = taught.pipe, "a <cat> <dog>"
    before, meaning = ids(pipe, text), told_by_words(pipe, text)
    other = COPIES[way](taught)
    twin = other.pipe
    assert ids(twin, text) == before and torch.equal(told_by_words(twin, text), meaning)
    other.set(dog=0.0)
    assert ids(twin, text) != before == ids(pipe, text)
    other.remove("dog")
    assert "<dog>" not in learned(twin.tokenizer) and ids(pipe, text) == before
    taught.remove("cat")
    assert "<cat>" in learned(twin.tokenizer) and "<cat>" not in learned(pipe.tokenizer)
    other.remove("cat")
    assert type(twin.tokenizer) is type(make_pipe().tokenizer)
    assert torch.equal(told_by_words(twin, text), told_by_words(make_pipe(), text))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["tokenizer", "text_encoder"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"])
def test_what_is_copied_with_its_teacher_learns_from_the_copy(
    copied: Callable[[Any], Any], first: str, taught: Adapters
) -> None:
    pipe, text = taught.pipe, "a <cat>"
    names = sorted(("tokenizer", "text_encoder"), key=lambda name: name != first)
    twins = copied({name: getattr(pipe, name) for name in names})
    gc.collect()
    twin = make_pipe()
    twin.text_encoder, twin.tokenizer = twins["text_encoder"], twins["tokenizer"]
    assert ids(twin, text) == ids(pipe, text)
    taught.set(dog=0.0)
    assert ids(twin, text) != ids(pipe, text)  # the soft prompt is still there
    strengths_of(twin.text_encoder).write({"dog": 0.0})
    assert ids(twin, text) == ids(pipe, text)


@pytest.mark.slow
def test_a_tokenizer_that_is_copied_alone_goes_on_learning_where_it_did(taught: Adapters) -> None:
    pipe, text = taught.pipe, "a <cat>"
    before = ids(pipe, text)
    twin = copy.deepcopy(pipe.tokenizer)
    assert twin is not pipe.tokenizer and list(twin(text).input_ids) == before
    taught.set(dog=0.0)
    assert list(twin(text).input_ids) == ids(pipe, text) != before
    taught.remove("dog")
    assert learned(twin) == learned(pipe.tokenizer)
    # One that went to another process has no teacher there, and reads as if it had learned nothing.
    away = pickle.loads(pickle.dumps(pipe.tokenizer))
    plain = make_pipe().tokenizer
    assert learned(away) == {} and away(text).input_ids == plain(text).input_ids
    assert not any(isinstance(one, torch.nn.Module) for one in vars(twin).values())


@pytest.mark.slow
def test_a_tokenizer_that_another_text_encoder_teaches_is_left_alone_and_refused(
    taught: Adapters, files: dict[str, Path]
) -> None:
    pipe, text = taught.pipe, "a <cat>"
    other = same_parts(pipe)
    other.text_encoder = make_pipe().text_encoder
    before = ids(pipe, text)
    second = Adapters(other)
    second.load(files["ink"])
    assert loaded(second) == ("ink",) and ids(pipe, text) == before
    with pytest.raises(UserError, match=r"has learned those of another pipeline's text encoder; give it one of its own"):
        second.load(files["cat"])
    assert loaded(second) == ("ink",) and ids(pipe, text) == before
    twin = same_parts(pipe)
    twin.text_encoder = copy.deepcopy(pipe.text_encoder)
    with pytest.raises(UserError, match=r"pipe\.tokenizer = copy\.deepcopy\(pipe\.tokenizer\)"):
        Adapters(twin)
    twin.tokenizer = tiny_tokenizer()
    assert loaded(Adapters(twin)) == ("cat", "dog", "ink") and ids(twin, text) == before
    second.remove("ink")
    assert ids(pipe, text) == before


@pytest.mark.slow
def test_a_text_encoder_in_anothers_place_frees_its_tokenizer(taught: Adapters) -> None:
    pipe, plain = taught.pipe, make_pipe()
    pipe.text_encoder = plain.text_encoder
    assert loaded(Adapters(pipe)) == loaded(taught) == ()
    assert ids(pipe, "a <cat>") == ids(plain, "a <cat>") and type(pipe.tokenizer) is type(plain.tokenizer)


def test_two_text_encoders_do_not_teach_one_tokenizer(tmp_path: Path) -> None:
    pipe = make_xl_pipe()
    pipe.tokenizer_2 = pipe.tokenizer
    for name in ("text_encoder", "text_encoder_2"):
        site.attach(getattr(pipe, name), "w", with_initial_tokens(pipe, name, Tokens("<cat>", 2, "cat")), "tokens")
    with pytest.raises(UserError, match="of two text encoders teach words to one tokenizer"):
        teach(pipe)
    assert learned(pipe.tokenizer) == {} and "<cat>" not in pipe.tokenizer.get_vocab()
    pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer)
    teach(pipe)
    assert len(learned(pipe.tokenizer)) == len(learned(pipe.tokenizer_2)) == 2


def test_tokenizers_of_different_vocabularies_learn_from_one_text_encoder(taught: Adapters) -> None:
    pipe = taught.pipe
    other, meaning = same_parts(pipe), told_by_words(pipe, "a <cat>")
    other.tokenizer = tiny_tokenizer()
    other.tokenizer.add_tokens(["elsewhere"])
    Adapters(other)
    assert torch.equal(told_by_words(other, "a <cat>"), meaning) and torch.equal(told_by_words(pipe, "a <cat>"), meaning)


@pytest.mark.slow
def test_the_end_of_text_is_corrected_for_as_long_as_there_are_words_and_given_back(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    encoder = tiny_pipe.text_encoder
    owner = next(module for module in encoder.modules() if "eos_token_id" in vars(module))
    owner.eos_token_id = 2  # as early configurations have it
    adapters = Adapters(tiny_pipe)
    adapters.load(files["ink"])
    adapters.load(files["cat"])
    assert owner.eos_token_id == tiny_pipe.tokenizer.eos_token_id
    twin = copy.deepcopy(adapters)
    adapters.remove("cat")
    assert owner.eos_token_id == 2 and loaded(adapters) == ("ink",)
    adapters.load(files["dog"])
    adapters.remove("ink")
    site.detach(encoder, "dog")  # the last one, and nobody calls teach
    assert owner.eos_token_id == 2 and ids(tiny_pipe, "a <dog>") == ids(make_pipe(), "a <dog>")
    twins = [module for module in twin.pipe.text_encoder.modules() if "eos_token_id" in vars(module)]
    assert twins[0].eos_token_id != 2
    twin.remove("cat")
    assert twins[0].eos_token_id == 2
    adapters.load(files["cat"])
    owner.eos_token_id = 7  # somebody else's business
    adapters.remove("cat")
    assert owner.eos_token_id == 7


def test_tokenizers_get_one_private_attribute_and_give_it_back(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    tokenizer = tiny_pipe.tokenizer
    tokenizer.lessons, tokenizer._each = "mine", "mine too"
    before = dict(vars(tokenizer))
    adapters = Adapters(tiny_pipe)
    adapters.load(files["dog"])
    assert vars(tokenizer).keys() - before.keys() == {SLOT} and tokenizer.lessons == "mine"
    adapters.set(dog=[0.0, 1.0])
    assert len({len(row) for row in tokenizer(["a", "a"]).input_ids}) == 2
    adapters.remove("dog")
    assert list(vars(tokenizer)) == list(before) and all(vars(tokenizer)[name] is one for name, one in before.items())


def test_a_link_follows_what_is_copied_with_it_and_else_stays() -> None:
    class Target:
        pass

    target = Target()
    link = Link(target)
    pair: list[Any] = copy.deepcopy([link, target])
    assert pair[0]() is pair[1] is not target
    pair = copy.deepcopy([target, link])
    assert pair[1]() is pair[0] is not target
    assert copy.deepcopy(link)() is target
    again = copy.deepcopy(copy.deepcopy(link))
    assert again() is target
    del target
    assert link() is None and again() is None and copy.deepcopy(link)() is None


@pytest.mark.slow
def test_nothing_of_a_registry_is_in_a_saved_base(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    keys = list(tiny_pipe.unet.state_dict())
    adapters = Adapters(tiny_pipe)
    adapters.load(files["ink"], strength=FADING)
    assert list(tiny_pipe.unet.state_dict()) == keys
    tiny_pipe.unet.save_pretrained(tmp_path / "unet")
    saved = type(make_pipe().unet).from_pretrained(tmp_path / "unet")
    assert same(state(saved), state(make_pipe().unet))
    assert state_of(saved) is None
