"""Adapter files written anew: every layout that can hold a content gives back its very bits, and others say why not."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline
from laws import LACKING, METHODS, randomize, shortest
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import peft_diffusion as pd
from peft_diffusion import formats
from peft_diffusion.bases import components, describe
from peft_diffusion.bases.skeleton import skeleton
from peft_diffusion.cli.app import main
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.merge import merge, unmerge
from peft_diffusion.formats import fitting
from peft_diffusion.methods.bottleneck import Bottleneck
from peft_diffusion.methods.lora import DOWN, UP, Lora
from peft_diffusion.tools.activations import _Observed
from peft_diffusion.training.events import Step

FLAT, PEFT, OWN = {"kohya", "kohya-sgm", "lycoris", "omi"}, {"peft"}, {"kohya", "kohya-sgm"}
ALL = FLAT | PEFT | {"diffusers"}
# What other layouts than kohya can hold each method of the laws, on a UNet.
HELD = {
    **dict.fromkeys(("lora", "lora-scaled", "locon", "dora", "dora-conv"), ALL),
    **dict.fromkeys(("loha", "loha-conv", "lokr", "lokr-conv", "oft-input"), FLAT | PEFT),
    **dict.fromkeys(("loha-decomposed", "lokr-decomposed", "oft", "oft-conv", "oft-butterfly", "glora"), FLAT),
    **dict.fromkeys(("ia3", "ia3-conv", "bitfit", "full"), FLAT),
    **dict.fromkeys(("bottleneck", "bottleneck-parallel", "bottleneck-conv", "prefix"), OWN),
}
TARGETS = [*sorted(ALL), "embedding", "embedding-a1111", "embedding-diffusers"]


def made(
    path: Path,
    method: str,
    component: str = "unet",
    dtype: torch.dtype | None = None,
    base: Callable[[], DiffusionPipeline] = make_pipe,
) -> Path:
    """A file of a method on the tiny base or another, as if it had been trained."""
    chosen, target = METHODS[method]
    pipe = base()
    part = components(pipe)[component]
    site.attach(part, "a", chosen, target)
    randomize(part, "a")
    told = {name: list(value) if isinstance(value, range) else value for name, value in chosen.spec().items()}
    spec = formats.Spec(
        {component: ({**told, "target": target},)}, asdict(describe(pipe)), triggers=("ink",), training={"steps_done": 7}
    )
    formats.save(path, {component: part}, "a", spec, dtype=dtype)
    return path


def metadata(path: Path) -> dict[str, str]:
    """Without the hashes of the tensors."""
    with safe_open(path, "pt") as file:
        return {key: value for key, value in file.metadata().items() if not key.startswith("sshs_")}


def same(first: Path, second: Path) -> bool:
    """The same names, dtypes and bits, but for the alpha of a LoKr without a rank, which scales nothing and peft has not."""
    a, b = load_file(first), load_file(second)
    for name in [name for name in a if name.endswith(".lokr_w1") and name.replace("w1", "w2") in a]:
        del a[name.replace("lokr_w1", "alpha")], b[name.replace("lokr_w1", "alpha")]
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def run(source: Path, output: Path, **settings: object) -> Path:
    return pd.convert(pd.ConvertConfig(source, output, **settings)).path  # type: ignore[arg-type]


@pytest.fixture
def one_skeleton(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The skeleton of the tiny base made once, as that of a published one is: else that takes most of a conversion."""
    monkeypatch.setattr(fitting, "skeleton", _SKELETONS)


_SKELETONS = cache(skeleton)


def _shortest() -> DiffusionPipeline:
    """Of one layer of every kind, as each is written and read in eight layouts."""
    pipe: Any = make_pipe()
    pipe.unet = shortest("unet", pipe.unet)
    found: DiffusionPipeline = pipe
    return found


@pytest.fixture(scope="module")
def shortest_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "shortest"
    _shortest().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_skeleton")
@pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method][1] not in LACKING["unet"]])
def test_layouts_that_hold_a_method_give_back_its_bits(
    method: str, tiny_base: Path, shortest_base: Path, tmp_path: Path
) -> None:
    every_name = method in ("lora", "locon")  # those of linear layers, and of convolutions
    source = made(tmp_path / "a.safetensors", method, dtype=torch.float16, base=make_pipe if every_name else _shortest)
    base, held = str(tiny_base if every_name else shortest_base), set()
    for layout in TARGETS:
        folder = tmp_path / layout
        try:
            there = run(source, folder / "adapter_model.safetensors", to=layout, base=base)
        except UserError as error:
            assert "layout" in str(error)  # and what to take instead
            assert not (folder / "adapter_model.safetensors").exists()
            continue
        held.add(layout)
        back = run(there, folder / "back.safetensors", base=base)
        assert same(source, back), layout
        told = metadata(source)
        assert {key: value for key, value in metadata(back).items() if key in told} == told
        one, other = pd.inspect(source), pd.inspect(back)
        assert (one.methods, one.sites, one.hyper_parameters) == (other.methods, other.sites, other.hyper_parameters)
    assert held == HELD[method]


KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
CLIP = "text_model_encoder_layers_0_self_attn_q_proj"


def foreign(path: Path, width: int = 768, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A file as kohya's trainer writes it, of Stable Diffusion 1, with alphas that differ from site to site."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, outputs, inputs, alpha in ((KOHYA, 640, width, 2.0), (f"lora_te_{CLIP}", 768, 768, 0.7)):
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, inputs, generator=generator).to(dtype)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator).to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(alpha).to(dtype)
    told = {"ss_tag_frequency": '{"1_ink": {"ink style": 7}}', "modelspec.trigger_phrase": "ink style", "ot_branch": "x"}
    save_file(tensors, path, {**told, "modelspec.hash_sha256": "0x0"})
    return path


@pytest.mark.slow
def test_a_file_of_another_program_keeps_bits_and_metadata_and_becomes_no_file_of_ours(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.safetensors")
    told = {key: value for key, value in metadata(source).items() if key != "modelspec.hash_sha256"}
    for layout in ("kohya", "kohya-sgm", "diffusers", "lycoris", "omi"):
        there = run(source, tmp_path / layout / "b.safetensors", to=layout)
        assert {key: metadata(there).get(key) for key in told} == told
        assert "peft_diffusion" not in metadata(there)
        back = run(there, tmp_path / layout / "c.safetensors")
        assert same(source, back), layout
        assert pd.inspect(back).spec is None


@pytest.mark.slow
def test_names_of_each_layout_are_those_of_its_program(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.safetensors")
    sgm = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    dotted = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    wanted = {
        "kohya-sgm": (f"lora_unet_{sgm.replace('.', '_')}.lora_down.weight", f"lora_te_{CLIP}.alpha"),
        "diffusers": (f"unet.{dotted}.lora_A.weight", f"text_encoder.{clip}.lora_B.weight"),
        "lycoris": (f"lycoris_{dotted.replace('.', '_')}.lora_up.weight", f"lycoris_{CLIP}.alpha"),
        "omi": (f"unet.{sgm}.lora_down.weight", f"clip_l.{clip}.alpha"),
    }
    for layout, names in wanted.items():
        assert set(names) <= load_file(run(source, tmp_path / f"{layout}.safetensors", to=layout)).keys()


@pytest.mark.slow
def test_numbers_of_a_file_stay_as_small_as_they_are_beside_alphas_of_float32(tmp_path: Path) -> None:
    blocks = torch.ones(160, 4, 4, dtype=torch.bfloat16)
    save_file({f"{KOHYA}.oft_blocks": blocks, f"{KOHYA}.alpha": torch.tensor(0.001)}, tmp_path / "a.safetensors")
    after = load_file(run(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert {name.rpartition(".")[2]: one.dtype for name, one in after.items()} == {
        "oft_blocks": torch.bfloat16, "alpha": torch.float32,
    }  # fmt: skip


def test_rounding_is_as_told_and_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.safetensors", dtype=torch.float32)
    before = load_file(source)
    after = load_file(run(source, tmp_path / "b.safetensors", dtype="fp16"))
    for name, tensor in before.items():
        rounded = tensor.to(torch.float16) if tensor.ndim else tensor
        assert torch.equal(after[name].float(), rounded.float())  # 0.7, an alpha, is none of the numbers of half precision
    assert after[f"{KOHYA}.lora_up.weight"].dtype == torch.float16
    before[f"{KOHYA}.lora_up.weight"][0, 0] = 1e6
    save_file(before, source)
    with pytest.raises(UserError, match=r"lora_up.weight holds 1e\+06, which is beyond float16; take bf16 or float32"):
        run(source, tmp_path / "c.safetensors", dtype="fp16")
    assert not (tmp_path / "c.safetensors").exists()


def test_a_component_can_be_taken_alone_and_peft_gets_a_folder(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="peft keeps one model in a file"):
        run(source, tmp_path / "peft", to="peft")
    file = run(source, tmp_path / "style-v1.5", to="peft", component=("text_encoder",))
    assert file == tmp_path / "style-v1.5" / "adapter_model.safetensors"
    assert {name.rpartition("lora_")[2] for name in load_file(file)} == {"A.weight", "B.weight"}
    with pytest.raises(UserError, match=r"holds nothing for 'unett'.*did you mean 'unet'"):
        run(source, tmp_path / "b.safetensors", component=("unett",))


@pytest.mark.slow
def test_tensors_that_are_not_understood_are_refused_or_left_out_as_asked(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.safetensors")
    save_file(load_file(source) | {"lora_unet_nowhere.lora_down.weight": torch.ones(1, 1)}, source)
    with pytest.raises(UserError, match=r"would not be used whole: .*lora_unet_nowhere.*; --partial leaves them out"):
        run(source, tmp_path / "b.safetensors")
    assert len(load_file(run(source, tmp_path / "b.safetensors", partial=True))) == 6


@pytest.mark.slow
def test_a_module_that_peft_saved_whole_becomes_its_change(tiny_base: Path, tmp_path: Path) -> None:
    pipe: Any = make_pipe()
    wrapped: Any = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"]))
    before = pipe.unet.conv_in.original_module.weight.detach().clone()
    with torch.no_grad():
        wrapped.base_model.model.conv_in.modules_to_save["default"].weight.add_(0.5)
    wrapped.save_pretrained(str(tmp_path / "peft"))
    source = tmp_path / "peft" / "adapter_model.safetensors"
    there = load_file(run(source, tmp_path / "a.safetensors", base=str(tiny_base)))
    assert torch.allclose(there["lora_unet_conv_in.diff"], torch.full_like(before, 0.5), atol=1e-6)


def word_file(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


@pytest.mark.slow
def test_words_become_files_that_diffusers_and_a1111_read(tmp_path: Path) -> None:
    vectors = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
    source = word_file(tmp_path / "a.safetensors", {"bundle_emb.<ink>.clip_l": vectors})
    for layout, name in (
        ("embedding-diffusers", "b.safetensors"),
        ("embedding-a1111", "<ink>.pt"),
        ("embedding", "c.safetensors"),
    ):
        there = run(source, tmp_path / layout / name, to=layout)
        assert same(source, run(there, tmp_path / layout / "back.safetensors", to="omi"))
    own = load_file(tmp_path / "embedding-diffusers" / "b.safetensors")
    assert list(own) == ["<ink>"] and torch.equal(own["<ink>"], vectors)
    pickled = torch.load(tmp_path / "embedding-a1111" / "<ink>.pt", weights_only=True)
    assert pickled["string_to_token"] == {"*": 265} and pickled["name"] == "<ink>"
    assert torch.equal(pickled["string_to_param"]["*"], vectors)


def test_diffusers_learns_the_word_of_a_file(tiny_base: Path, tmp_path: Path) -> None:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    source = word_file(tmp_path / "ink.safetensors", {"emb_params": vectors})
    file = run(source, tmp_path / "b.safetensors", to="embedding-diffusers", base=str(tiny_base))
    pipe = make_pipe()
    pipe.load_textual_inversion(str(file))
    ids = pipe.tokenizer.convert_tokens_to_ids(["ink", "ink_1"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], vectors)


@pytest.mark.slow
def test_words_that_a_layout_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = word_file(tmp_path / "ink.safetensors", {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)})
    with pytest.raises(UserError, match="for one text encoder from a file, and 'ink' is for 2"):
        run(source, tmp_path / "b.safetensors", to="embedding-diffusers")
    file = run(source, tmp_path / "b.safetensors", to="embedding-diffusers", component=("text_encoder_2",))
    assert {name: tensor.shape for name, tensor in load_file(file).items()} == {"ink": (1, 1280)}
    assert load_file(run(source, tmp_path / "omi.safetensors", to="omi")).keys() == {
        "bundle_emb.ink.clip_l",
        "bundle_emb.ink.clip_g",
    }
    with pytest.raises(UserError, match="has no name for new words"):
        run(source, tmp_path / "c.safetensors", to="lycoris")
    with pytest.raises(UserError, match=r"end in \.safetensors; choose"):
        run(foreign(tmp_path / "a.safetensors"), tmp_path / "c.pt")
    words = {f"bundle_emb.{word}.clip_l": torch.ones(1, 768) for word in ("ink", "oil")}
    with pytest.raises(UserError, match="holds one word in a file, and there are ink, oil"):
        run(word_file(tmp_path / "two.safetensors", words), tmp_path / "c.safetensors", to="embedding-a1111")


@pytest.mark.slow
def test_the_second_text_encoder_has_no_name_in_lycoris(tmp_path: Path) -> None:
    tensors = {
        f"lora_te2_{CLIP}.lora_down.weight": torch.ones(1, 1280),
        f"lora_te2_{CLIP}.lora_up.weight": torch.ones(1280, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="say no component"):
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lycoris")
    names = load_file(run(tmp_path / "a.safetensors", tmp_path / "c.safetensors", to="omi")).keys()
    assert "clip_g.text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight" in names


@pytest.mark.slow
def test_the_command_converts_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = foreign(tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    assert main(["convert", str(source), str(output), "--to", "diffusers", "--dtype", "float32"]) == 0
    assert str(output) in capsys.readouterr().out
    assert {str(tensor.dtype) for tensor in load_file(output).values()} == {"torch.float32"}
    for arguments, words in (
        ([str(source), str(source)], "is the file that is converted; choose another one"),
        ([str(source), str(output), "--to", "kohia"], "there is no layout 'kohia'"),
        ([str(foreign(tmp_path / "c.safetensors", 33)), str(output)], "does not fit the base 'sd1'"),
    ):
        assert main(["convert", *arguments]) == 1
        assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def one_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red apple", "red"), ("blue cat", "blue"), ("ink dog", "black")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    return folder


def training(folder: Path, output: Path, **changes: Any) -> pd.TrainConfig:
    settings: dict[str, Any] = {"steps": 1, "rank": 2, "batch_size": 1, "preview_steps": 0, "device": "cpu", "warmup": 0}
    return pd.TrainConfig(folder=(folder,), output=output, run_dir=output.parent / "run", **settings | changes)


@pytest.mark.slow
@pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")
def test_a_run_writes_the_layout_and_dtype_that_were_asked_for(one_picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter_model.safetensors"
    pd.train(training(one_picture, output, save_as="peft", save_dtype="bf16"), pipe=make_pipe())
    assert {name.rpartition("lora_")[2] for name in load_file(output)} == {"A.weight", "B.weight"}
    assert {tensor.dtype for tensor in load_file(output).values()} == {torch.bfloat16}
    assert (tmp_path / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_layout_that_cannot_say_what_is_trained_is_told_before_the_first_step(one_picture: Path, tmp_path: Path) -> None:
    steps: list[object] = []
    for changes, words in (
        ({"save_as": "diffusers", "method": "ia3", "rank": None}, "the layout 'diffusers' cannot say it"),
        ({"save_as": "peft"}, r"found only under the name adapter_model\.safetensors"),
    ):
        config = training(one_picture, tmp_path / "a.safetensors", **changes)
        with pytest.raises(UserError, match=words):
            pd.train(config, pipe=make_pipe(), observers=[steps.append])
    assert not any(isinstance(event, Step) for event in steps)
    with pytest.raises(UserError, match="there is no layout 'kohia'"):
        training(one_picture, tmp_path / "a.safetensors", save_as="kohia")


def change(module: torch.nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter adds to the weights of a component, by merging it into a copy."""
    sites = site.sites(module)
    before = {path: sites[path].get_parameter("weight").detach().clone() for path in sites}
    merge(module)
    after = {path: sites[path].get_parameter("weight").detach() - before[path] for path in sites}
    unmerge(module)
    return after


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "locon", "dora", "loha", "lokr", "oft", "ia3", "lokr-decomposed", "loha-conv"])
def test_a_lora_is_the_best_pair_of_its_rank_and_tells_what_it_leaves_out(
    method: str, tiny_base: Path, tmp_path: Path
) -> None:
    source = made(tmp_path / "a.safetensors", method)
    done = pd.convert(pd.ConvertConfig(source, tmp_path / "b.safetensors", to_lora=5, base=str(tiny_base)))
    pipe, reduced = make_pipe(), make_pipe()
    pd.Adapters(pipe).load(source)
    pd.Adapters(reduced).load(done.path)
    assert set(pd.inspect(done.path).methods) == {"lora"}
    whole, left = change(components(pipe)["unet"], "a"), change(components(reduced)["unet"], "b")
    told = {one.site: one for one in done.made.errors}
    assert whole.keys() == left.keys()
    for path, wanted in whole.items():
        u, values, v = torch.linalg.svd(wanted.flatten(1), full_matrices=False)  # Eckart and Young
        best = (u[:, :5] * values[:5]) @ v[:5]
        scale = wanted.norm()
        # Of equal singular values either may be taken: what is left out is the same.
        assert (left[path].flatten(1) - wanted.flatten(1)).norm() <= (wanted.flatten(1) - best).norm() + 1e-4 * scale
        assert torch.linalg.matrix_rank(left[path].flatten(1), rtol=1e-4) <= 5
        if f"unet.{path}" in told:
            assert abs(told[f"unet.{path}"].error - float((wanted.flatten(1) - best).norm() / scale)) < 1e-4


def test_a_loha_that_is_a_pair_of_few_ranks_becomes_a_lora_too(tmp_path: Path) -> None:
    shapes = {"hada_w1_a": (640, 2), "hada_w1_b": (2, 768), "hada_w2_a": (640, 2), "hada_w2_b": (2, 768)}
    own = {f"{KOHYA}.{name}": torch.rand(shape) for name, shape in shapes.items()}
    save_file(own, tmp_path / "a.safetensors")
    found = load_file(run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to_lora=6))
    first, second, third, fourth = own.values()  # alpha is the rank
    down, up = found[f"{KOHYA}.lora_down.weight"], found[f"{KOHYA}.lora_up.weight"]
    torch.testing.assert_close(up @ down, (first @ second) * (third @ fourth))
    assert float(found[f"{KOHYA}.alpha"]) == len(down) == 4


def test_what_depends_on_the_base_asks_for_it_and_what_changes_no_weight_says_so(tmp_path: Path) -> None:
    tensors = {
        f"{KOHYA}.lora_down.weight": torch.ones(2, 768),
        f"{KOHYA}.lora_up.weight": torch.ones(640, 2),
        f"{KOHYA}.dora_scale": torch.ones(640, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"dora changes depends on the weight of the base; name the base with --base"):
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to_lora=4)


@pytest.mark.slow
def test_words_and_biases_stay_as_they_are_beside_a_lora(tiny_base: Path, tmp_path: Path) -> None:
    for method, component in (("bitfit", "unet"), ("tokens", "text_encoder")):
        source = made(tmp_path / f"{method}.safetensors", method, component)
        there = run(source, tmp_path / "b.safetensors", to_lora=4, base=str(tiny_base))
        assert same(source, there)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "component"), [("bottleneck", "unet"), ("bottleneck-conv", "unet"), ("prefix", "unet")])
def test_what_changes_no_weight_becomes_a_lora_that_is_fitted_on_the_base(
    method: str, component: str, tiny_base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)  # of what an adapter begins as
    source = made(tmp_path / "a.safetensors", method, component)
    done = pd.convert(pd.ConvertConfig(source, tmp_path / "b.safetensors", to_lora=8, base=str(tiny_base)))
    assert set(pd.inspect(done.path).methods) == {"lora"}
    whole, reduced = make_pipe(), make_pipe()
    pd.Adapters(whole).load(source)
    pd.Adapters(reduced).load(done.path)
    sums = {"wanted": 0.0, "missed": 0.0}

    def compare(module: torch.nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """At the same inputs: what the adapter adds to a layer's output, and what the LoRA makes of it otherwise."""
        plain = site.base_class(module).forward(module, *args, **kwargs)
        sums["wanted"] += float((output - plain).square().sum())
        sums["missed"] += float((stand_ins[module](*args, **kwargs) - output).square().sum())

    stand_ins: dict[torch.nn.Module, torch.nn.Module] = {
        module: components(reduced)[component].get_submodule(path)
        for path, module in site.sites(components(whole)[component]).items()
    }
    for module in stand_ins:
        module.register_forward_hook(compare, with_kwargs=True)
    pipe: Any = whole
    with torch.no_grad():
        pipe("a blue house", num_inference_steps=4, height=64, width=64, generator=torch.Generator().manual_seed(3))
    assert (sums["missed"] / sums["wanted"]) ** 0.5 < 0.6
    assert 0 < done.made.error < 0.6


@pytest.mark.slow
@pytest.mark.usefixtures("one_skeleton")
@pytest.mark.parametrize("rank", [2, 16])
def test_a_pair_is_not_fitted_over_a_lora_of_the_file(rank: int, tiny_base: Path, tmp_path: Path) -> None:
    source, place = made(tmp_path / "a.safetensors", "prefix"), "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    tensors = load_file(source)
    assert f"peft_diffusion.unet.{place.removesuffix('.to_out.0')}.prefix_keys" in tensors  # its pair goes to that layer
    pair = {f"unet.{place}.lora_A.weight": torch.ones(rank, 64), f"unet.{place}.lora_B.weight": torch.ones(64, rank)}
    save_file({**tensors, **pair}, source)
    with pytest.raises(UserError, match=f"unet.{place} would carry two LoRAs"):
        run(source, tmp_path / "b.safetensors", to_lora=8, base=str(tiny_base))
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.slow
def test_what_changes_no_weight_asks_for_the_base_to_fit_on(tmp_path: Path) -> None:
    base = pd.load_base("icons")
    part = components(base)["unet"]
    site.attach(part, "a", Bottleneck(hidden=2), "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0")
    formats.save(tmp_path / "a.safetensors", {"unet": part}, "a", formats.Spec(base=asdict(describe(base))))
    with pytest.raises(UserError, match=r"carries bottleneck, which changes no weight; a LoRA near it is fitted.*--base"):
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to_lora=8)


def test_a_fit_finds_the_pair_of_a_change_that_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(12, 3, generator=generator), torch.randn(3, 20, generator=generator)
    layer = torch.nn.Linear(20, 12)
    site.attach_built(layer, "a", {"": Lora.read(layer, {DOWN: down, UP: up})})
    observed = _Observed(layer, ("unet", "layer"))
    with observed:
        for apart in (False, True):
            observed.kept_apart = apart
            layer(torch.randn(200, 20, generator=generator))
    found = observed.solved(3)
    assert found.error < 1e-3
    assert torch.allclose(found.pair.up @ found.pair.down, up @ down, atol=1e-2)
    assert observed.solved(2).error > 0.05
