"""Families as rows, and the network that denoises behind one protocol: nothing outside of bases and formats names one."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from torch import Tensor

import peft_diffusion
from peft_diffusion.bases import denoiser, denoiser_of, family
from peft_diffusion.bases.noise import flow_powers, noisy, target
from peft_diffusion.core import target_tables
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.target_tables import TargetTable
from peft_diffusion.training.settings.pictures import TrainConfig
from peft_diffusion.training.tasks.objective import debiased_weights, min_snr_weights

PACKAGE = Path(peft_diffusion.__file__).parent
SETTINGS = {one.name for one in fields(TrainConfig)}
WORDS_OF_OTHERS = {"core/other_names.py", "tools/key_maps.py", "tools/original_names.py", "tools/reopened.py",
                   "training/settings/others/kohya.py", "training/settings/others/kohya_data.py",
                   "training/settings/others/onetrainer.py", "training/settings/others/onetrainer_data.py"}  # fmt: skip
OUTSIDE = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("bases", "formats"))
# A word of English too: what lies in no block.
# The last two are words of A1111, in prompts and among its settings.
OTHER_MEANINGS = {
    ("core/targets.py", "other"), ("evaluation/measured.py", "other"), ("generation/tags.py", "unet"),
    ("serve/names.py", "sd_unet"),
}  # fmt: skip
# What other programs call settings and tensors, written from their sources.
OUTSIDE = [path for path in OUTSIDE if path.relative_to(PACKAGE).as_posix() not in WORDS_OF_OTHERS]


def constants(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The strings of a module but for its docstrings, with their lines."""
    nodes = list(ast.walk(tree))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


@cache
def names_of_bases() -> tuple[set[str], re.Pattern[str]]:
    """The names of this package's families, components and tokenizers, and what finds those of parts within a string."""
    families = [row for row in family.every() if row.kind is None or row.kind.startswith("peft_diffusion.")]
    rows = [one for row in families for one in row.components]
    parts = {one.name for one in rows} | {one.tokenizer for one in rows if one.tokenizer}
    inside = re.compile("|".join(re.escape(part) for part in parts if len(part) > 2))
    return parts | {row.name for row in families}, inside


def names_a_base(text: str) -> bool:
    """Whether a string is the name of a family, component or tokenizer, or a key, prefix or pattern with such a name."""
    names, inside = names_of_bases()
    return text in names or (" " not in text and text not in SETTINGS and inside.search(text) is not None)


@pytest.mark.slow
def test_no_other_file_names_a_family_or_a_component() -> None:
    found: list[tuple[str, int, str]] = []
    for path in OUTSIDE:
        where, tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))
        texts = [one for one in constants(tree) if names_a_base(one[1]) and (where, one[1]) not in OTHER_MEANINGS]
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "unet"]
        found += [(where, line, text) for line, text in (*texts, *((one.lineno, one.attr) for one in attributes))]
    assert len(OUTSIDE) > 50 and not found


def test_the_search_finds_what_it_looks_for() -> None:
    plain = ['"""unet"""', 'help = "the unet learns"', 'rate = "unet_lr"']
    wrong = ['found = parts["unet"]', 'prefix = "lora_unet_"', 'kind = "sdxl"']
    module = ast.parse("\n".join([*plain, *wrong]))
    found = sorted((line, text) for line, text in constants(module) if names_a_base(text))
    assert found == [(4, "unet"), (5, "lora_unet_"), (6, "sdxl")]


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(UserError, match="'sd1' already"):
        family.register(family.Family("sd1", ()))
    with pytest.raises(UserError, match="targets of CLIPTextModel are known already"):
        target_tables.register("CLIPTextModel", TargetTable({"attention": ".*"}))
    family.register(family.find("sd1"))
    assert [row.name for row in family.every()].count("sd1") == 1


def test_rows_are_found_by_what_files_say() -> None:
    found = {name: family.of_version(name) for name in ("sd_v1", "sd_v1_v", "sd_v2_v", "sdxl_base_v1-0", "flux", "")}
    told = {name: None if one is None else (one[0].name, one[1]) for name, one in found.items()}
    assert told == {
        "sd_v1": ("sd1", ""), "sd_v1_v": ("sd1", "v_prediction"), "sd_v2_v": ("sd2", "v_prediction"),
        "sdxl_base_v1-0": ("sdxl", ""), "flux": None, "": None,
    }  # fmt: skip
    assert family.find("of a newer version") is family.SMALL_DIFFUSION
    with pytest.raises(UserError, match="has no component 'vae'; it has: unet, text_encoder"):
        family.find("sd1").component("vae")
    with pytest.raises(UserError, match="no family of bases has a component 'vae'"):
        family.rate_setting("vae")


def test_a_kind_of_network_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = family.Family("broken", (), kind="nowhere_at_all:Denoiser")
    monkeypatch.setattr(family, "_FAMILIES", {})
    family.register(broken)
    with pytest.raises(UserError, match=r"the kind of network 'nowhere_at_all:Denoiser' .* cannot be imported"):
        denoiser.kinds()


@pytest.mark.parametrize("make", [make_pipe, make_xl_pipe])
@pytest.mark.parametrize("inpaints", [False, True])
def test_a_unet_is_reached_through_the_protocol(make: Any, inpaints: bool) -> None:
    pipe = make(in_channels=9 if inpaints else 4)
    found = denoiser_of(pipe)
    assert found.network is pipe.unet and found.vae is pipe.vae
    assert (found.channels, found.factor, found.resolution, found.inpaints) == (4, 8, 64, inpaints)
    assert found.size_conditioned == (make is make_xl_pipe)
    assert found.step == 8 * 2 ** (len(pipe.components["unet"].config.block_out_channels) - 1)
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(found.scaled(latents), latents * pipe.vae.config.scaling_factor)
    for args, named in (((latents, 7), {}), ((), {"sample": latents, "timestep": 7}), ((latents,), {"timestep": 7})):
        call = found.read_call(args, named)
        assert (call.rows, call.timestep) == (2, 7)


def test_a_flow_is_the_straight_line_from_latents_to_noise() -> None:
    latents, noise = torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    powers = flow_powers(1000)
    times = torch.tensor([0.001, 0.25, 0.5, 1.0])
    power = powers[(times * 1000).long() - 1]
    line = times.view(-1, 1, 1, 1)
    mixed = noisy(latents, noise, power, "flow_prediction")
    torch.testing.assert_close(mixed, (1 - line) * latents + line * noise, atol=1e-4, rtol=0)
    assert torch.equal(target("flow_prediction", latents, noise, power), noise - latents)
    assert powers.diff().lt(0).all() and powers[-1] == 0


@pytest.mark.parametrize("weigh", [lambda kind, power: min_snr_weights(kind, power, 5.0), debiased_weights])
def test_weights_of_a_flow_and_of_v_count_the_same_error_of_the_image(weigh: Any) -> None:
    """What both predict tells the image, from which the same error follows another one of the prediction."""
    power = torch.tensor([0.99, 0.8, 0.5, 0.1, 0.001], dtype=torch.float64)
    signal, spread = power.sqrt(), (1 - power).sqrt()
    # image = signal * noisy - spread * v, and image = noisy - time * flow with time = spread / (signal + spread)
    of_v, of_flow = spread.square(), (spread / (signal + spread)).square()
    weights: dict[str, Tensor] = {kind: weigh(kind, power) for kind in ("v_prediction", "flow_prediction")}
    torch.testing.assert_close(weights["v_prediction"] / of_v, weights["flow_prediction"] / of_flow)
