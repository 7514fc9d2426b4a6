"""Tools for adapter files, against formulas on the files' own tensors, and against peft."""

import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_diffusion as pd
from peft_diffusion.cli.app import main
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Noted, Warned

ATTENTION = "unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CROSS = "unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
POINTWISE = "unet_down_blocks_0_attentions_0_proj_in"  # a convolution of kernel 1
KERNEL = "unet_down_blocks_0_resnets_0_conv1"
TEXT = "te_text_model_encoder_layers_0_self_attn_q_proj"
NORM = "unet_conv_norm_out"
SHAPES = {ATTENTION: (32, 32), CROSS: (32, 32), POINTWISE: (32, 32, 1, 1), KERNEL: (32, 32, 3, 3), TEXT: (32, 32)}
"""Sites of the tiny base."""


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(site: str, seed: int, rank: int, alpha: float | None) -> dict[str, Tensor]:
    """A pair as kohya's trainer writes it."""
    outputs, *inputs = SHAPES[site]
    ones = [1] * (len(inputs) - 1)
    own = {"lora_down.weight": noise(seed, rank, *inputs), "lora_up.weight": noise(seed + 99, outputs, rank, *ones)}
    own |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
    return {f"lora_{site}.{name}": tensor for name, tensor in own.items()}


def lora_file(path: Path, seed: int, ranks: Mapping[str, tuple[int, float | None]], **metadata: str) -> Path:
    tensors: dict[str, Tensor] = {}
    for number, (site, (rank, alpha)) in enumerate(ranks.items()):
        tensors |= pair(site, seed + 10 * number, rank, alpha)
    save_file(tensors, path, metadata)
    return path


def change(tensors: Mapping[str, Tensor], site: str) -> Tensor:
    """What kohya's trainer computes of a pair: alpha / rank * up @ down."""
    down, up = tensors[f"lora_{site}.lora_down.weight"].float(), tensors[f"lora_{site}.lora_up.weight"].float()
    alpha = float(tensors.get(f"lora_{site}.alpha", torch.tensor(float(len(down)))))
    return alpha / len(down) * (up.flatten(1) @ down.flatten(1))


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoCons of other ranks, alphas and sites."""
    folder = tmp_path_factory.mktemp("tools")
    first = {ATTENTION: (4, 2.0), CROSS: (4, None), POINTWISE: (3, 3.0), KERNEL: (2, 1.0), TEXT: (5, 10.0)}
    second = {ATTENTION: (6, 1.5), POINTWISE: (2, 4.0), KERNEL: (5, 5.0)}
    one = lora_file(folder / "one.safetensors", 1, first, ss_steps="10", ss_network_dim="4", ss_seed="1")
    two = lora_file(folder / "two.safetensors", 2, second, ss_steps="10", ss_network_dim="6", ss_seed="2")
    return one, two


def told(events: list[Event]) -> str:
    return "\n".join(one.message for one in events if isinstance(one, (Noted, Warned)))


# Merging files.


def test_a_merge_is_exact_whatever_ranks_alphas_and_layers(
    files: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "both.safetensors"
    assert main(["merge", f"{files[0]}=0.7", f"{files[1]}=-0.3", "--output", str(output), "--base", str(tiny_base)]) == 0
    one, two, both = map(load_file, (*files, output))
    for site in SHAPES:
        expected = 0.7 * change(one, site)
        if f"lora_{site}.lora_down.weight" in two:
            expected = expected - 0.3 * change(two, site)
        assert close(change(both, site), expected), site
    down = both[f"lora_{KERNEL}.lora_down.weight"]
    assert down.shape == (7, 32, 3, 3) and both[f"lora_{KERNEL}.lora_up.weight"].shape == (32, 7, 1, 1)
    assert float(both[f"lora_{KERNEL}.alpha"]) == 7  # diffusers takes alpha for the rank


def test_a_merge_of_a_rank_leaves_out_what_the_best_of_that_rank_does(
    files: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "both.safetensors"
    made = pd.merge(pd.MergeConfig([str(files[0]), str(files[1])], output=output, rank=3, base=str(tiny_base)))
    one, two, both = map(load_file, (*files, output))
    errors = {one.site: one for one in made.errors}
    for site, path in ((ATTENTION, "transformer_blocks.0.attn1.to_q"), (POINTWISE, "proj_in")):
        whole = change(one, site) + change(two, site)
        values = torch.linalg.svdvals(whole.double())
        best = float(values[3:].norm() / values.norm())
        told_error = errors[f"unet.down_blocks.0.attentions.0.{path}"]
        assert float((change(both, site) - whole).norm() / whole.norm()) == pytest.approx(best, rel=1e-3)
        assert told_error.rank == 3 and told_error.error == pytest.approx(best, rel=1e-3)
    assert made.peak_memory > 0 and "left out" in made.lines()[1]


class Layers(nn.Module):
    """The layers of two sites, so that peft can merge the same pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32, bias=False)
        self.conv = nn.Conv2d(32, 32, 3, bias=False)


def merged_by_peft(files: tuple[Path, Path], kind: str, **options: Any) -> dict[str, Tensor]:
    """What peft makes of both files at strengths 0.6 and 0.5, as the change of each weight."""
    model: Any = None
    for name, path in zip(("one", "two"), files, strict=True):
        tensors, places = load_file(path), {"linear": ATTENTION, "conv": KERNEL}
        ranks = {own: len(tensors[f"lora_{site}.lora_down.weight"]) for own, site in places.items()}
        alphas = {own: float(tensors[f"lora_{site}.alpha"]) for own, site in places.items()}
        config = LoraConfig(r=8, target_modules=["linear", "conv"], rank_pattern=ranks, alpha_pattern=alphas)
        if model is None:
            model = get_peft_model(Layers(), config, name)
        else:
            model.add_adapter(name, config)
        for own, site in places.items():
            layer = getattr(model.base_model.model, own)
            layer.lora_A[name].weight.data = tensors[f"lora_{site}.lora_down.weight"]
            layer.lora_B[name].weight.data = tensors[f"lora_{site}.lora_up.weight"]
    model.add_weighted_adapter(["one", "two"], [0.6, 0.5], "merged", combination_type=kind, **options)
    layers = model.base_model.model
    return {site: getattr(layers, own).get_delta_weight("merged").flatten(1) for own, site in
            (("linear", ATTENTION), ("conv", KERNEL))}  # fmt: skip


WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("cat", {}, {}),
    "svd": ("svd", {"svd_rank": 5}, {"rank": 5}),
    "ties": ("ties_svd", {"svd_rank": 32, "density": 0.4}, {"rank": 32, "density": 0.4}),
    "magnitude": ("magnitude_prune_svd", {"svd_rank": 32, "density": 0.4}, {"rank": 32, "density": 0.4}),
    "dare-linear": ("dare_linear_svd", {"svd_rank": 32, "density": 1.0}, {"rank": 32, "density": 1.0}),
}
"""Ways of merging: peft's name of each, what it is given, and what ours is given. Of DARE, chance is left out."""


@pytest.mark.parametrize("how", WAYS)
def test_ways_of_merging_are_those_of_peft(how: str, files: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    kind, theirs, ours = WAYS[how]
    config: Any = {"how": how, "output": tmp_path / "merged.safetensors", "base": str(tiny_base), **ours}
    pd.merge(pd.MergeConfig([f"{files[0]}=0.6", f"{files[1]}=0.5"], **config))
    found = load_file(tmp_path / "merged.safetensors")
    for site, expected in merged_by_peft(files, kind, **theirs).items():
        assert close(change(found, site), expected, 1e-4), site


@pytest.mark.parametrize("how", ["knots", "core-space"])
def test_ways_with_a_common_basis_lose_nothing_where_nothing_is_dropped(
    how: Any, files: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "both.safetensors"
    config = pd.MergeConfig(
        [f"{files[0]}=0.6", f"{files[1]}=0.5"], output=output, how=how, within="magnitude", density=1, base=str(tiny_base)
    )
    pd.merge(config)
    one, two, both = map(load_file, (*files, output))
    assert close(change(both, KERNEL), 0.6 * change(one, KERNEL) + 0.5 * change(two, KERNEL), 1e-4)
    assert len(both[f"lora_{KERNEL}.lora_down.weight"]) == 7


def loha(site: str, rank: int, alpha: float) -> dict[str, Tensor]:
    outputs, inputs = SHAPES[site]
    parts = {
        "hada_w1_a": (outputs, rank),
        "hada_w1_b": (rank, inputs),
        "hada_w2_a": (outputs, rank),
        "hada_w2_b": (rank, inputs),
    }
    tensors = {f"lora_{site}.{name}": noise(number, *shape) for number, (name, shape) in enumerate(parts.items())}
    return {**tensors, f"lora_{site}.alpha": torch.tensor(alpha)}


def change_of_loha(tensors: Mapping[str, Tensor], site: str) -> Tensor:
    """LyCORIS: alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)."""
    one = tensors[f"lora_{site}.hada_w1_a"] @ tensors[f"lora_{site}.hada_w1_b"]
    two = tensors[f"lora_{site}.hada_w2_a"] @ tensors[f"lora_{site}.hada_w2_b"]
    return float(tensors[f"lora_{site}.alpha"]) / tensors[f"lora_{site}.hada_w1_a"].shape[1] * one * two


def seen_by_hand(base: Path, file: Path, prompts: list[str], layers: Mapping[str, str]) -> list[dict[str, Tensor]]:
    """What goes into layers while pictures are drawn with an adapter: for each picture the inputs by site, as called."""
    pipe: Any = pd.load_base(str(base), dtype="float32")
    pd.Adapters(pipe).load(file)
    pipe.set_progress_bar_config(disable=True)
    pictures: list[dict[str, Tensor]] = []
    for site, path in layers.items():
        part = pipe.text_encoder if site == TEXT else pipe.unet

        def see(_: nn.Module, args: Any, site: str = site) -> None:
            before = pictures[-1].get(site)
            pictures[-1][site] = args[0].detach() if before is None else torch.cat([before, args[0].detach()])

        layer = next(module for name, module in part.named_modules() if name.endswith(path))
        layer.register_forward_pre_hook(see)
    for seed, prompt in enumerate(prompts):
        pictures.append({})
        start = torch.Generator().manual_seed(seed)
        pipe(prompt, num_inference_steps=6, guidance_scale=5.0, generator=start, output_type="latent", height=64, width=64)
    return pictures


def test_regmean_matches_what_layers_make_of_the_prompts_of_each(
    files: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    """Against least squares on the inputs themselves, in float64, and on the outputs of a picture that was kept apart."""
    output, prompts = (
        tmp_path / "both.safetensors",
        {"one": ["a cat", "a red house"], "two": ["a dog", "two boats", "a tree"]},
    )
    told = [f"{name}={prompt}" for name, own in prompts.items() for prompt in own]
    config = pd.MergeConfig(
        [*map(str, files)], output=output, how="regmean", base=str(tiny_base), prompts=told, off_diagonal=0.8, rank=32
    )
    made = pd.merge(config)
    both, changes = load_file(output), [load_file(file) for file in files]
    block = "down_blocks.0.attentions.0"
    layers = {ATTENTION: f"{block}.transformer_blocks.0.attn1.to_q", CROSS: f"{block}.transformer_blocks.0.attn2.to_k",
              POINTWISE: f"{block}.proj_in", TEXT: "encoder.layers.0.self_attn.q_proj"}  # fmt: skip
    layers[KERNEL] = "down_blocks.0.resnets.0.conv1"
    seen = [seen_by_hand(tiny_base, file, prompts[file.stem], layers) for file in files]

    def rows(site: str, x: Tensor) -> Tensor:
        if x.ndim == 4:
            size = SHAPES[site][2]
            x = nn.functional.unfold(x, size, padding=size // 2).transpose(1, 2)
        return x.reshape(-1, x.shape[-1]).double()

    for site in layers:
        inputs, targets = [], []
        for own, pictures in zip(changes, seen, strict=True):
            fit = torch.cat([rows(site, picture[site]) for picture in pictures[:-1]])
            fit = fit / len(fit) ** 0.5  # each adapter counts as much, however many pictures it drew
            # Products of different inputs scaled by 0.8: rows of single inputs beside those that are there.
            fit = torch.cat([fit * 0.8**0.5, torch.diag(fit.norm(dim=0)) * 0.2**0.5])
            wanted = change(own, site).double() if f"lora_{site}.lora_down.weight" in own else torch.zeros(32, fit.shape[1])
            inputs.append(fit)
            targets.append(fit @ wanted.double().T)
        x, y = torch.cat(inputs), torch.cat(targets)
        least = (x @ torch.linalg.lstsq(x, y, driver="gelsd").solution - y).norm()
        assert (x @ change(both, site).double().T - y).norm() <= 1.001 * least + 1e-4 * y.norm(), site
    found = {(one.site, one.adapter): one for one in made.outputs}
    kernel = seen[1][-1][KERNEL]
    alone, merged_there = (
        nn.functional.conv2d(kernel, change(one, KERNEL).view(32, 32, 3, 3), padding=1) for one in (changes[1], both)
    )
    for name, outputs in (("norm", alone), ("missed", alone - merged_there)):
        size = float(outputs.square().sum(1).mean().sqrt())
        assert getattr(found["unet.down_blocks.0.resnets.0.conv1", "two"], name) == pytest.approx(size, rel=1e-3)
    merged, added = made.output_error("two")
    told_of_two = f"two: {merged:.1%} of what it adds to outputs of its own prompts is missed, {added:.1%} by adding"
    assert told_of_two in made.lines()


def test_ziplora_weighs_the_columns_of_each_change(files: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    """Where all ranks are kept a merged change is a sum of both with a factor for each input."""
    output, told = tmp_path / "both.safetensors", ["one=a cat", "two=a dog"]
    pd.merge(pd.MergeConfig([*map(str, files)], output=output, how="ziplora", base=str(tiny_base), prompts=told, rank=32))
    one, two, both = (change(load_file(file), ATTENTION) for file in (*files, output))
    for place in range(32):
        columns = torch.stack([one[:, place], two[:, place]], 1).double()
        left = both[:, place].double() - columns @ torch.linalg.lstsq(columns, both[:, place, None].double()).solution[:, 0]
        assert left.norm() < 1e-3 * both[:, place].norm()


def test_regmean_says_what_it_lacks(files: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"output": tmp_path / "both.safetensors"}
    with pytest.raises(UserError, match="name the base, with its weights: --base"):
        pd.MergeConfig([str(files[0])], how="regmean", **told)
    with pytest.raises(UserError, match="--prompts does nothing without --how regmean"):
        pd.MergeConfig([str(files[0])], prompts=["one=a cat"], **told)
    with pytest.raises(UserError, match="'three=a cat': no adapter is called 'three'; there are: one, two"):
        pd.merge(pd.MergeConfig([*map(str, files)], how="regmean", base=str(tiny_base), prompts=["three=a cat"], **told))


def test_methods_mix(files: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    save_file(loha(ATTENTION, 3, 1.5), tmp_path / "loha.safetensors")
    words = [f"{files[0]}=0.7", f"{tmp_path / 'loha.safetensors'}=0.2"]
    pd.merge(pd.MergeConfig(words, output=tmp_path / "both.safetensors", base=str(tiny_base)))
    both, one = load_file(tmp_path / "both.safetensors"), load_file(files[0])
    expected = 0.7 * change(one, ATTENTION) + 0.2 * change_of_loha(load_file(tmp_path / "loha.safetensors"), ATTENTION)
    assert close(change(both, ATTENTION), expected)
    assert (
        len(both[f"lora_{ATTENTION}.lora_down.weight"]) <= 4 + 9
    )  # the product of two pairs has the product of their ranks


def test_whole_changes_and_biases_are_added_too(files: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    norms = {f"lora_{NORM}.w_norm": noise(1, 32), f"lora_{NORM}.b_norm": noise(2, 32)}
    bias = {f"lora_{KERNEL}.diff_b": noise(3, 32), f"lora_{KERNEL}.diff": noise(4, 32, 32, 3, 3)}
    save_file({**norms, **bias}, tmp_path / "whole.safetensors")
    pd.merge(
        pd.MergeConfig(
            [f"{files[0]}=0.5", f"{tmp_path / 'whole.safetensors'}=2"],
            output=tmp_path / "both.safetensors",
            base=str(tiny_base),
        )
    )
    both = load_file(tmp_path / "both.safetensors")
    expected = 0.5 * change(load_file(files[0]), KERNEL) + 2 * bias[f"lora_{KERNEL}.diff"].flatten(1)
    assert close(change(both, KERNEL), expected)
    assert close(both[f"lora_{KERNEL}.diff_b"], 2 * bias[f"lora_{KERNEL}.diff_b"])
    assert close(both[f"lora_{NORM}.diff"], 2 * norms[f"lora_{NORM}.w_norm"])
    assert close(both[f"lora_{NORM}.diff_b"], 2 * norms[f"lora_{NORM}.b_norm"])


def test_what_depends_on_the_weight_needs_the_base(tiny_base: Path, tmp_path: Path) -> None:
    magnitude = noise(7, 32, 1).abs() + 1
    dora = {**pair(ATTENTION, 5, 4, 4.0), f"lora_{ATTENTION}.dora_scale": magnitude}
    save_file(dora, tmp_path / "dora.safetensors")
    config: Any = {"files": [f"{tmp_path / 'dora.safetensors'}=0.5"], "output": tmp_path / "out.safetensors"}
    weight = make_pipe().unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q").weight
    direction = weight + change(dora, ATTENTION)
    expected = 0.5 * (magnitude * direction / direction.norm(dim=1, keepdim=True) - weight)
    pd.merge(pd.MergeConfig(**config, base=str(tiny_base)))
    assert close(change(load_file(tmp_path / "out.safetensors"), ATTENTION), expected.detach(), 1e-4)
    tensors = {"lora_down.weight": noise(1, 2, 320), "lora_up.weight": noise(2, 320, 2), "dora_scale": noise(3, 320, 1)}
    save_file({f"lora_{ATTENTION}.{name}": one for name, one in tensors.items()}, tmp_path / "sd1.safetensors")
    with pytest.raises(UserError, match="what dora changes depends on the weight of the base; name the base with --base"):
        pd.merge(pd.MergeConfig([str(tmp_path / "sd1.safetensors")], output=tmp_path / "no.safetensors"))


def test_a_file_that_is_named_for_two_components_has_a_strength_in_each(tmp_path: Path) -> None:
    make_xl_pipe().save_pretrained(tmp_path / "xl")
    stem, end = "lycoris_text_model_encoder_layers_0_self_attn_q_proj", "encoder.layers.0.self_attn.q_proj.weight"
    own = pair(TEXT, 7, 3, 3.0)
    save_file({f"{stem}.{name.partition('.')[2]}": tensor for name, tensor in own.items()}, tmp_path / "a.safetensors")
    files = [f"{tmp_path / 'a.safetensors'}@{name}" for name in ("text_encoder=0.5", "text_encoder_2=0.3")]
    pd.merge(pd.MergeConfig(files, output=tmp_path / "b.safetensors", base=str(tmp_path / "xl")))
    found = load_file(tmp_path / "b.safetensors")
    pd.merge(pd.MergeConfig(files, output=tmp_path / "merged", into=str(tmp_path / "xl")))
    for name, short, strength in (("text_encoder", "te1", 0.5), ("text_encoder_2", "te2", 0.3)):
        site = TEXT.replace("te_", f"{short}_")
        assert close(change(found, site), strength * change(own, TEXT))
        before, after = (load_file(tmp_path / one / name / "model.safetensors") for one in ("xl", "merged"))
        (key,) = (one for one in before if one.endswith(end))
        assert close(after[key] - before[key], strength * change(own, TEXT))


def test_metadata_and_triggers_of_all_are_kept(files: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    tags = {"one": '{"10_cat": {"cat": 3}}', "two": '{"10_cat": {"cat": 2, "dog": 1}}'}
    for name, counts in tags.items():
        more = {"ss_tag_frequency": counts, "modelspec.trigger_phrase": f"{name}word", "ss_v2": "False"}
        lora_file(tmp_path / f"{name}.safetensors", 3, {ATTENTION: (2, 2.0)}, ss_output_name=name, **more)
    names = [str(tmp_path / f"{name}.safetensors") for name in tags]
    pd.merge(pd.MergeConfig(names, output=tmp_path / "both.safetensors", base=str(tiny_base)))
    found = pd.metadata(tmp_path / "both.safetensors")
    assert found["ss_tag_frequency"] == '{"10_cat": {"cat": 5, "dog": 1}}'
    assert found["modelspec.trigger_phrase"] == "oneword, twoword"
    assert found["modelspec.merged_from"] == "one, two"
    assert found["ss_v2"] == "False" and found["ss_network_dim"] == "4" and "ss_output_name" not in found
    assert pd.inspect(tmp_path / "both.safetensors").ranks == {4: 1}


def test_precision_is_that_of_the_files_and_may_be_chosen(tiny_base: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in pair(ATTENTION, 5, 4, 4.0).items()}
    save_file(half, tmp_path / "half.safetensors")
    config: Any = {"files": [f"{tmp_path / 'half.safetensors'}=0.5"], "base": str(tiny_base)}
    pd.merge(pd.MergeConfig(**config, output=tmp_path / "a.safetensors"))
    pd.merge(pd.MergeConfig(**config, output=tmp_path / "b.safetensors", dtype="bf16"))
    for name, dtype in (("a", torch.float16), ("b", torch.bfloat16)):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found[f"lora_{ATTENTION}.lora_up.weight"].dtype == dtype
        assert float(found[f"lora_{ATTENTION}.alpha"]) == 4
        assert close(change(found, ATTENTION), 0.5 * change(half, ATTENTION), 1e-2)
    # kohya's alpha of 1 with a barely trained up: together below what fp16 has all digits for
    small = {name: (tensor * (1e-4 if "up" in name else 1)).half() for name, tensor in pair(ATTENTION, 5, 32, 1.0).items()}
    save_file(small, tmp_path / "half.safetensors")
    pd.merge(pd.MergeConfig(**config, output=tmp_path / "a.safetensors"))
    assert close(change(load_file(tmp_path / "a.safetensors"), ATTENTION), 0.5 * change(small, ATTENTION), 5e-4)
    save_file({name: 1e5 * tensor for name, tensor in pair(ATTENTION, 5, 4, 4.0).items()}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="float16 cannot hold; take --dtype float32"):
        pd.merge(pd.MergeConfig(**config, output=tmp_path / "c.safetensors", dtype="fp16"))
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("tool", ["merge", "convert"])
def test_only_one_site_of_a_file_is_in_memory(
    tool: str, files: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from peft_diffusion.formats.container import Stored

    read = Stored.__getitem__
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]

    def watched(self: Stored, name: str) -> Tensor:
        tensor = read(self, name)
        alive.add(tensor.untyped_storage())
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(Stored, "__getitem__", watched)
    output, base = tmp_path / "both.safetensors", str(tiny_base)
    if tool == "merge":
        pd.merge(pd.MergeConfig([str(one) for one in files], output=output, base=base))
    else:
        pd.convert(pd.ConvertConfig(files[0], output=output, to="diffusers", base=base))
    assert 0 < most[0] <= 2 * 3  # down, up and alpha of both
    assert math.isfinite(most[0])


def test_what_is_made_waits_on_the_disk(
    files: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from peft_diffusion.core import spill

    config: Any = {"files": [str(one) for one in files], "base": str(tiny_base)}
    pd.merge(pd.MergeConfig(**config, output=tmp_path / "small" / "both.safetensors"))
    monkeypatch.setattr(spill, "_LEAST", 1)
    put, release, alive = spill.Spill.put, spill.Spill.release, weakref.WeakSet[Any]()
    most, released = [0], set[int]()

    def watched(self: spill.Spill, tensor: Tensor) -> Tensor:
        alive.add(tensor.untyped_storage())
        most[0] = max(most[0], len(alive))
        return put(self, tensor)

    def let_go(self: spill.Spill, tensor: Tensor) -> None:
        released.add(tensor.untyped_storage().data_ptr())
        release(self, tensor)

    monkeypatch.setattr(spill.Spill, "put", watched)
    monkeypatch.setattr(spill.Spill, "release", let_go)
    pd.merge(pd.MergeConfig(**config, output=tmp_path / "both.safetensors"))
    assert most[0] <= 3  # what is put aside, and those of the site before it that nobody has collected yet
    assert len(released) >= 2 * len(SHAPES)
    assert (tmp_path / "both.safetensors").read_bytes() == (tmp_path / "small" / "both.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no limit on a file's size to stand for a full disk")
def test_a_disk_that_fills_up_while_results_wait_is_told_and_left_as_it_was(
    files: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    from peft_diffusion.core import spill

    monkeypatch.setattr(spill, "_LEAST", 1)
    config = pd.MergeConfig([str(one) for one in files], output=tmp_path / "both.safetensors", base=str(tiny_base))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"both\.safetensors cannot be written: File too large"):
            pd.merge(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


_STOPPED = """
import os, signal, sys
from peft_diffusion.cli.app import run_process
from peft_diffusion.formats import container

def stopped(tensor):
    os.kill(os.getpid(), signal.SIGTERM)

container.bytes_of = stopped  # which is asked for the first tensor of the file
sys.exit(run_process(sys.argv[1:]))
"""


@pytest.mark.skipif(not forked.POSSIBLE, reason="processes of POSIX")
def test_a_signal_leaves_nothing_half_written(files: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    told = ["merge", *map(str, files), "--base", str(tiny_base), "--output", str(tmp_path / "both.safetensors")]
    done = forked.Started(["-c", _STOPPED, *told], None, dict(os.environ)).wait(60)
    assert done.returncode == -signal.SIGTERM, done.stderr  # as whoever sent it expects
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_one_of_a_kind_is_told_in_the_singular(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_file(tmp_path / "one.safetensors", 3, {ATTENTION: (2, 2.0)})
    output = tmp_path / "two.safetensors"
    assert (
        main(["resize", str(tmp_path / "one.safetensors"), "--rank", "1", "-o", str(output), "--base", str(tiny_base)]) == 0
    )
    assert "two.safetensors: 1 site in " in " ".join(capsys.readouterr().out.split())
