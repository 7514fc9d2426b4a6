"""The methods that LyCORIS and peft have too: the same tensors give the same outputs there, and files mean the same."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline
from laws import randomize, same, state
from safetensors.torch import load_file, save_file
from test_formats import picture
from torch import Tensor, nn
from torch.nn import functional as F

from peft_diffusion import formats
from peft_diffusion.bases import components, describe
from peft_diffusion.core import merge, site
from peft_diffusion.core.adapter import Adapter
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.method import METHODS, Method
from peft_diffusion.generation import Adapters
from peft_diffusion.methods.dora import Dora
from peft_diffusion.methods.full import Full
from peft_diffusion.methods.glora import Glora
from peft_diffusion.methods.ia3 import Ia3
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lokr import Lokr
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.oft import Oft
from peft_diffusion.methods.shared.divisors import split

KINDS = ("linear", "conv", "pointwise")
UNET_LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UNET_CONV = "down_blocks.0.resnets.0.conv1"


def module(kind: str, bias: bool = True) -> nn.Module:
    """One layer with fixed random weights."""
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Linear(24, 32, bias=bias).requires_grad_(False)
    if kind == "conv":
        return nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=bias).requires_grad_(False)
    return nn.Conv2d(16, 24, 1, bias=bias).requires_grad_(False)


def inputs(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((2, 5, 24) if kind == "linear" else (2, 16, 6, 6), generator=generator)


def run(layer: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    """A copy of the layer with the adapter at strength 1."""
    component = nn.Sequential(copy.deepcopy(layer))
    site.attach_built(component, "a", {"0": adapter})
    with torch.no_grad():
        output: Tensor = component(x)
        merge.merge(component)
        assert torch.allclose(component(x), output, atol=1e-5)
    return output


def close(ours: Tensor, theirs: Tensor, limit: float = 1e-5) -> bool:
    return bool((ours - theirs).abs().max() <= limit * theirs.abs().max())


def perturb(model: nn.Module, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


# --- LyCORIS ---------------------------------------------------------------------------------------------------------

LYCORIS: dict[str, tuple[str, type[Method], dict[str, Any]]] = {
    "lora": ("locon.LoConModule", Lora, {"lora_dim": 4, "alpha": 2}),
    "lora, tucker": ("locon.LoConModule", Lora, {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "rslora": ("locon.LoConModule", Lora, {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    "dora": ("locon.LoConModule", Dora, {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "dora per input": ("locon.LoConModule", Dora, {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    "loha": ("loha.LohaModule", Loha, {"lora_dim": 3, "alpha": 1}),
    "loha of a large rank": ("loha.LohaModule", Loha, {"lora_dim": 8, "alpha": 2}),
    "loha, tucker": ("loha.LohaModule", Loha, {"lora_dim": 3, "alpha": 1, "use_tucker": True}),
    "loha, decomposed": ("loha.LohaModule", Loha, {"lora_dim": 3, "alpha": 1, "weight_decompose": True}),
    "loha, decomposed per input": ("loha.LohaModule", Loha, {"lora_dim": 3, "weight_decompose": True, "wd_on_out": False}),
    "loha, rank-stabilized": ("loha.LohaModule", Loha, {"lora_dim": 3, "alpha": 1, "rs_lora": True}),
    "lokr": ("lokr.LokrModule", Lokr, {"lora_dim": 2, "alpha": 1, "factor": 4}),
    "lokr, decomposed": ("lokr.LokrModule", Lokr, {"lora_dim": 2, "alpha": 1, "factor": 4, "weight_decompose": True}),
    "lokr, full, decomposed": ("lokr.LokrModule", Lokr, {"lora_dim": 2, "full_matrix": True, "weight_decompose": True}),
    "lokr, decomposed per input": ("lokr.LokrModule", Lokr,
                                   {"lora_dim": 2, "factor": 4, "weight_decompose": True, "wd_on_out": False}),
    "lokr, unbalanced": ("lokr.LokrModule", Lokr, {"lora_dim": 2, "factor": 2, "unbalanced_factorization": True}),
    "lokr, full": ("lokr.LokrModule", Lokr, {"lora_dim": 2, "alpha": 1, "full_matrix": True}),
    "lokr, both decomposed": ("lokr.LokrModule", Lokr, {"lora_dim": 1, "alpha": 3, "factor": 4, "decompose_both": True}),
    "lokr, tucker": ("lokr.LokrModule", Lokr, {"lora_dim": 2, "alpha": 1, "factor": 4, "use_tucker": True}),
    "oft": ("diag_oft.DiagOFTModule", Oft, {"lora_dim": 4, "constraint": 0}),
    "oft, rescaled": ("diag_oft.DiagOFTModule", Oft, {"lora_dim": 4, "constraint": 0, "rescaled": True}),
    "oft, constrained": ("diag_oft.DiagOFTModule", Oft, {"lora_dim": 4, "constraint": 0.03}),
    "glora": ("glora.GLoRAModule", Glora, {"lora_dim": 3, "alpha": 2}),
    "boft": ("boft.ButterflyOFTModule", Oft, {"lora_dim": 8, "constraint": 0}),
    "boft, rescaled and constrained": ("boft.ButterflyOFTModule", Oft,
                                       {"lora_dim": 8, "constraint": 0.03, "rescaled": True}),
    "ia3": ("ia3.IA3Module", Ia3, {}),
    "ia3 on input": ("ia3.IA3Module", Ia3, {"train_on_input": True}),
}  # fmt: skip


def lycoris_class(where: str) -> Any:
    modules = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    file, name = where.split(".")
    return getattr(getattr(modules, file), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LYCORIS)
def test_tensors_of_lycoris_give_its_outputs(name: str, kind: str) -> None:
    where, method, options = LYCORIS[name]
    layer, x = module(kind), inputs(kind)
    theirs = lycoris_class(where)("layer", copy.deepcopy(layer), **options)
    perturb(theirs)
    tensors = {key: value.detach() for key, value in theirs.state_dict().items()}
    assert [m for m in METHODS.values() if m.recognizes(tensors.keys())] == [method]
    assert tensors.keys() <= method.suffixes
    with torch.no_grad():
        expected = theirs(x)
    assert not close(layer(x), expected, 0.01)
    assert close(run(layer, method.read(layer, tensors), x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_whole_changes_of_lycoris_give_its_outputs(bias: bool, kind: str) -> None:
    layer, x = module(kind, bias), inputs(kind)
    theirs = lycoris_class("full.FullModule")("layer", copy.deepcopy(layer))
    theirs.apply_to()  # what it trains from then on is the weight itself, and what it saves the difference
    perturb(theirs)
    tensors = {key: value.detach() for key, value in theirs.state_dict().items()}
    assert [m for m in METHODS.values() if m.recognizes(tensors.keys())] == [Full] and ("diff_b" in tensors) is bias
    with torch.no_grad():
        expected = theirs(x)
    assert not close(layer(x), expected, 0.01)
    assert close(run(layer, Full.read(layer, tensors), x), expected)


BUILT: dict[str, tuple[Method, str]] = {
    "lora": (Lora(rank=4, alpha=2.0), "locon.LoConModule"),
    "rslora": (Lora(rank=4, alpha=2.0, rank_stabilized=True), "locon.LoConModule"),
    "dora": (Dora(rank=4), "locon.LoConModule"),
    "loha": (Loha(rank=3, alpha=1.0), "loha.LohaModule"),
    "lokr": (Lokr(rank=2, factor=4, alpha=1.0), "lokr.LokrModule"),
    "lokr, full": (Lokr(factor=4, full=True), "lokr.LokrModule"),
    "loha, decomposed": (Loha(rank=3, weight_decompose=True), "loha.LohaModule"),
    "lokr, decomposed": (Lokr(rank=2, factor=4, weight_decompose=True), "lokr.LokrModule"),
    "oft": (Oft(block_size=4, constraint=0.02, rescale=True), "diag_oft.DiagOFTModule"),
    "boft": (Oft(block_size=6, butterfly=True, constraint=0.02, rescale=True), "boft.ButterflyOFTModule"),
    "glora": (Glora(rank=3, alpha=2.0), "glora.GLoRAModule"),
    "full": (Full(), "full.FullModule"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILT)
def test_lycoris_reads_our_tensors(name: str, kind: str) -> None:
    method, where = BUILT[name]
    cls, layer, x = lycoris_class(where), module(kind), inputs(kind)
    adapter = method.build(layer)
    perturb(adapter)
    written = {f"layer.{suffix}": tensor.detach() for suffix, tensor in adapter.state().items()}
    assert cls.algo_check(written, "layer")
    with torch.no_grad():
        theirs = cls.make_module_from_state_dict("layer", copy.deepcopy(layer), *cls.extract_state_dict(written, "layer"))
        assert close(run(layer, adapter, x), theirs(x))


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 6, 8, 16, 100])
def test_sizes_are_split_as_lycoris_splits_them(factor: int) -> None:
    factorization = pytest.importorskip("lycoris.functional", reason="lycoris-lora is not installed").factorization
    sizes = (1, 2, 4, 7, 12, 127, 128, 250, 320, 360, 512, 640, 768, 1024, 1280, 2048, 3072, 10240)
    assert {size: split(size, factor) for size in sizes} == {size: factorization(size, factor) for size in sizes}


# --- peft ------------------------------------------------------------------------------------------------------------


def in_peft(layer: nn.Module, config: object) -> tuple[nn.Module, Any]:
    """A copy of the layer in peft with random weights: the model, and its layer."""
    from peft import get_peft_model

    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).eval()
    return model, model.base_model.model[0]


@torch.no_grad()
def agrees(layer: nn.Module, adapter: Adapter, model: nn.Module, x: Tensor) -> bool:
    """The layer with our adapter gives what the model of peft does, which is not what the layer gives."""
    return not close(layer(x), model(x), 0.01) and close(run(layer, adapter, x), model(x))


def own(theirs: nn.Module, *names: str) -> dict[str, Tensor]:
    """Parameters of a peft layer by name, as the suffixes are called there too; those that it has."""
    held = {name: getattr(theirs, name) for name in names}
    return {name: tensors["default"].detach() for name, tensors in held.items() if "default" in tensors}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lora", "rslora", "dora"])
def test_lora_and_dora_agree_with_peft(form: str, kind: str) -> None:
    from peft import LoraConfig

    layer, x = module(kind), inputs(kind)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    config.use_rslora, config.use_dora = form == "rslora", form == "dora"
    model, theirs = in_peft(layer, config)
    if form == "dora":
        perturb(theirs.lora_magnitude_vector)
    tensors = {
        "lora_down.weight": theirs.lora_A["default"].weight.detach(),
        "lora_up.weight": theirs.lora_B["default"].weight.detach(),
        "alpha": torch.tensor(4 * theirs.scaling["default"]),
    }
    if form == "dora":
        magnitude = theirs.lora_magnitude_vector["default"].weight.detach()
        tensors["dora_scale"] = magnitude.reshape(-1, *[1] * (layer.get_parameter("weight").ndim - 1))
    if form == "rslora":  # what our own hyper-parameters store is what peft computes from its own
        assert Lora(rank=4, alpha=2.0, rank_stabilized=True).build(layer).scale == theirs.scaling["default"]
    assert agrees(layer, (Dora if form == "dora" else Lora).read(layer, tensors), model, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 8])
def test_loha_agrees_with_peft(rank: int, kind: str) -> None:
    from peft import LoHaConfig

    layer, x = module(kind), inputs(kind)
    model, theirs = in_peft(layer, LoHaConfig(r=rank, alpha=6, target_modules=["0"], init_weights=False))
    tensors = own(theirs, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b") | {"alpha": torch.tensor(6.0)}
    assert agrees(layer, Loha.read(layer, tensors), model, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "both"), [(2, False), (1, True)])
def test_lokr_agrees_with_peft(rank: int, both: bool, kind: str) -> None:
    from peft import LoKrConfig

    layer, x = module(kind), inputs(kind)
    config = LoKrConfig(r=rank, alpha=1, decompose_factor=4, decompose_both=both, target_modules=["0"], init_weights=False)
    model, theirs = in_peft(layer, config)
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    tensors = own(theirs, *names) | {"alpha": torch.tensor(1.0)}
    assert ("lokr_w1_a" in tensors) == both and "lokr_w2_a" in tensors
    assert agrees(layer, Lokr.read(layer, tensors), model, x)


def test_oft_agrees_with_peft_for_the_transposed_weight() -> None:
    # peft turns the inputs of a layer, LyCORIS and we its outputs: the same of the transposed weight.
    from peft import OFTConfig

    layer = module("linear", bias=False)
    config = OFTConfig(r=0, oft_block_size=4, target_modules=["0"], use_cayley_neumann=False, init_weights=True)
    model, theirs = in_peft(layer, config)
    perturb(theirs.oft_R)
    packed = theirs.oft_R["default"].weight.detach()
    blocks = torch.zeros(6, 4, 4)
    rows, columns = torch.triu_indices(4, 4, 1)
    blocks[:, rows, columns] = packed
    transposed = nn.Linear(32, 24, bias=False).requires_grad_(False)
    wanted = layer.get_parameter("weight")
    transposed.weight.copy_(wanted.t())
    x = inputs("linear")
    with torch.no_grad():
        weight = run(transposed, Oft.read(transposed, {"oft_blocks": blocks}), torch.eye(32))  # its rows: the inputs' images
        assert not torch.allclose(weight, wanted, atol=0.01)
        assert close(F.linear(x, weight), model(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_agrees_with_peft(on_input: bool, kind: str) -> None:
    from peft import IA3Config

    layer, x = module(kind, bias=on_input), inputs(kind)  # peft scales a bias with the outputs, LyCORIS and we do not
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if on_input else [], init_ia3_weights=False)
    model, theirs = in_peft(layer, config)
    perturb(theirs.ia3_l)
    scale = theirs.ia3_l["default"].detach().flatten() - 1
    adapter = Ia3.read(layer, {"weight": scale, "on_input": torch.tensor(int(on_input))})
    assert agrees(layer, adapter, model, x)


@pytest.mark.parametrize("alpha", [2.0, 12.0])
def test_pissa_agrees_with_peft_and_leaves_the_base_as_it_is(alpha: float) -> None:
    from peft import LoraConfig

    layer, x = module("linear"), inputs("linear")
    before = state(layer)
    model, theirs = in_peft(layer, LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa"))
    adapter = Lora(rank=3, alpha=alpha, init="pissa").build(layer)
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    own_down, own_up = adapter.get_parameter("down"), adapter.get_parameter("up")
    assert close(own_up @ own_down, up @ down)
    assert torch.equal(run(layer, copy.deepcopy(adapter), x), layer(x))
    generator = torch.Generator().manual_seed(5)
    for ours, other in ((own_down, down), (own_up, up)):
        change = 0.2 * torch.randn(ours.shape, generator=generator)
        signs = torch.sign((ours * other).sum(1 if ours is own_down else 0, keepdim=True))
        other.data.add_(change)
        ours.data.add_(change * signs)  # singular vectors are known up to their sign
    assert agrees(layer, adapter, model, x)
    assert same(state(layer), before)


# --- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, pipe: DiffusionPipeline, methods: Sequence[tuple[Method, str]], name: str = "made") -> Path:
    """A file with one adapter of the UNet, of several methods with targets, with parameters that matter."""
    torch.manual_seed(3)
    site.attach_all(pipe.unet, name, methods)
    randomize(pipe.unet, name)
    spec = formats.Spec(
        methods={"unet": tuple({**method.spec(), "target": target} for method, target in methods)},
        base=asdict(describe(pipe)),
    )
    formats.save(path, {"unet": pipe.unet}, name, spec)
    return path


def noise(pipe: DiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    with torch.no_grad():
        found: Tensor = pipe.unet(x, torch.tensor(500), encoder_hidden_states=text).sample
    return found


def in_names_of_diffusers(tensors: dict[str, Tensor], paths: list[str]) -> dict[str, Tensor]:
    """A DoRA of the UNet as diffusers' own training script names it, with alpha the rank; a Linear's magnitude is flat."""
    named: dict[str, Tensor] = {}
    for path in paths:
        key = "lora_unet_" + path.replace(".", "_")
        magnitude = tensors[f"{key}.dora_scale"]
        named |= {
            f"unet.{path}.lora_A.weight": tensors[f"{key}.lora_down.weight"],
            f"unet.{path}.lora_B.weight": tensors[f"{key}.lora_up.weight"],
            f"unet.{path}.lora_magnitude_vector": magnitude.flatten() if magnitude.ndim == 2 else magnitude.transpose(0, 1),
        }
    return named


@pytest.mark.slow
@pytest.mark.parametrize("target", ["attention+ff", "conv"])
def test_diffusers_draws_the_same_picture_with_dora(tmp_path: Path, target: str) -> None:
    # Of files in the kohya / LyCORIS layout diffusers 0.42 leaves dora_scale out, with a warning, so it gets its own names.
    pipe = make_pipe()
    path = write(tmp_path / "a.safetensors", pipe, [(Dora(rank=4), target)])
    ours, theirs = make_pipe(), make_pipe()
    base = picture(ours)
    Adapters(ours).load(path)
    theirs.load_lora_weights(in_names_of_diffusers(load_file(path), list(site.sites(pipe.unet))))
    assert any("lora_magnitude_vector" in key for key in theirs.unet.state_dict())
    assert abs(picture(ours) - base).max() > 8
    assert abs(picture(ours) - picture(theirs)).max() <= 1


MIXTURES = {
    "lora, ia3": [(Lora(rank=4), "attention+ff"), (Ia3(), "attention")],
    "ia3, lora": [(Ia3(on_input=True), "all"), (Lora(rank=2), "attention+ff")],
    "lora, loha of one alpha": [(Lora(rank=4), "attention"), (Loha(rank=4), "attention")],
    "dora, oft elsewhere": [(Dora(rank=4), "attention"), (Oft(block_size=4), "conv")],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_several_methods_under_one_name_save_and_load(tmp_path: Path, name: str) -> None:
    pipe = make_pipe()
    path = write(tmp_path / "a.safetensors", pipe, MIXTURES[name])
    before, running = noise(make_pipe()), noise(pipe)
    loaded = formats.load(path, pipe, strict=True)
    site.detach(pipe.unet, "made")
    assert torch.equal(noise(pipe), before)
    site.attach_built(pipe.unet, "back", loaded.components["unet"])
    assert torch.equal(noise(pipe), running) and not torch.equal(running, before)
    merge.merge(pipe.unet)
    assert close(noise(pipe), running, 1e-4)


def test_changes_of_the_weight_do_not_depend_on_the_order() -> None:
    # Each is a change of the base's own weight, so one adapter after the other is their sum.
    layer, x = module("linear"), inputs("linear")
    built = {"lora": Lora(rank=2), "dora": Dora(rank=2), "oft": Oft(block_size=4, rescale=True), "ia3": Ia3()}
    adapters = {name: method.build(layer) for name, method in built.items()}
    for adapter in adapters.values():
        perturb(adapter)
    outputs = []
    for order in (list(adapters), list(reversed(adapters))):
        component = nn.Sequential(copy.deepcopy(layer))
        for name in order:
            site.attach_built(component, name, {"0": copy.deepcopy(adapters[name])})
        with torch.no_grad():
            outputs.append(component(x))
            merge.merge(component)
            assert close(component(x), outputs[-1])
    assert close(*outputs)


@pytest.mark.slow
def test_parts_that_would_overwrite_one_another_in_a_file_are_refused(tiny_pipe: DiffusionPipeline) -> None:
    keys = list(tiny_pipe.unet.state_dict())
    wholly = Loha(rank=4, weight_decompose=True)
    pairs = [Lora(rank=4), Loha(rank=2)], [Lora(rank=4), Lora(rank=4)], [Lora(rank=4), Dora(rank=4)], [Lora(rank=4), wholly]
    for pair in (*pairs, [Dora(rank=4), Loha(rank=4)], [Dora(rank=4), wholly]):
        with pytest.raises(UserError, match="cannot share a site under one name"):
            site.attach_all(tiny_pipe.unet, "a", [(method, "attention") for method in pair])
    assert not site.sites(tiny_pipe.unet) and list(tiny_pipe.unet.state_dict()) == keys


def rand(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def rotation(blocks: Tensor) -> Tensor:
    q = torch.block_diag(*(blocks - blocks.transpose(1, 2)))
    identity = torch.eye(len(q))
    turned: Tensor = (identity + q) @ torch.linalg.inv(identity - q)
    return turned


def _loha(w: Tensor, t: dict[str, Tensor]) -> Tensor:
    first, second = ((t[f"hada_w{n}_a"] @ t[f"hada_w{n}_b"]).view_as(w) for n in (1, 2))
    return w + t["alpha"] / len(t["hada_w1_b"]) * first * second


def _lokr(w: Tensor, t: dict[str, Tensor]) -> Tensor:
    w2 = (t["lokr_w2_a"] @ t["lokr_w2_b"]).view(len(w) // 4, w.shape[1] // 4, -1)
    kron = torch.einsum("ac,bdk->abcdk", t["lokr_w1"], w2)
    return w + t["alpha"] / 2 * kron.reshape(w.shape)


def _dora(w: Tensor, t: dict[str, Tensor]) -> Tensor:
    changed = w + t["alpha"] / 2 * (t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)).view_as(w)
    others = [d for d in range(w.ndim) if t["dora_scale"].shape[d] == 1]
    return changed / changed.square().sum(others, keepdim=True).sqrt() * t["dora_scale"]


def by_hand(shape: tuple[int, ...], name: str) -> dict[str, Tensor]:
    """Tensors with LyCORIS' names for a weight of that shape."""
    out, into, *kernel = shape
    area, ones, alpha = math.prod(kernel), [1] * len(kernel), torch.tensor(1.0)
    pair = {"lora_up.weight": rand(out, 2, *ones), "lora_down.weight": rand(2, into, *kernel), "alpha": alpha}
    loha = {"hada_w1_a": rand(out, 3), "hada_w1_b": rand(3, into * area), "hada_w2_a": -rand(out, 3)}
    return {
        "dora": {**pair, "dora_scale": 1 + rand(out, 1, *ones)},
        "dora per input": {**pair, "dora_scale": 1 + rand(1, into, *ones)},
        "loha": {**loha, "hada_w2_b": 0.5 - rand(3, into * area), "alpha": alpha},
        "lokr": {
            "lokr_w1": rand(4, 4), "lokr_w2_a": rand(out // 4, 2), "lokr_w2_b": rand(2, into // 4 * area), "alpha": alpha,
        },
        "oft": {"oft_blocks": rand(out // 4, 4, 4), "alpha": torch.tensor(0.0)},
        "ia3": {"weight": rand(out) if not kernel else rand(1, out, 1, 1), "on_input": torch.tensor(0)},
        "ia3 on input": {"weight": rand(into) if not kernel else rand(1, into, 1, 1), "on_input": torch.tensor(1)},
    }[name]  # fmt: skip


CHANGED: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "dora": _dora,
    "dora per input": _dora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": lambda w, t: torch.einsum("nm,n...->m...", rotation(t["oft_blocks"]), w),
    "ia3": lambda w, t: w * (1 + t["weight"]).view(-1, *[1] * (w.ndim - 1)),
    "ia3 on input": lambda w, t: w * (1 + t["weight"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", [UNET_LINEAR, UNET_CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("name", CHANGED)
def test_files_of_lycoris_mean_what_its_formulas_say(
    tmp_path: Path, tiny_pipe: DiffusionPipeline, name: str, path: str
) -> None:
    layer = tiny_pipe.unet.get_submodule(path)
    tensors = by_hand(tuple(layer.weight.shape), name)
    key = "lora_unet_" + path.replace(".", "_")
    save_file({f"{key}.{suffix}": tensor for suffix, tensor in tensors.items()}, tmp_path / "a.safetensors")
    expected = make_pipe()
    weight = expected.unet.get_submodule(path).weight
    weight.data.copy_(CHANGED[name](weight, tensors))
    before = noise(tiny_pipe)
    Adapters(tiny_pipe).load(tmp_path / "a.safetensors")
    assert not close(noise(tiny_pipe), before, 1e-3)
    assert close(noise(tiny_pipe), noise(expected))


@pytest.mark.slow
def test_files_of_ours_hold_the_names_of_lycoris(tmp_path: Path) -> None:
    key = "lora_unet_" + UNET_LINEAR.replace(".", "_")
    names: dict[Method, set[str]] = {
        Dora(rank=4): {"lora_up.weight", "lora_down.weight", "alpha", "dora_scale"},
        Loha(rank=4): {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
        Lokr(rank=2, factor=2): {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"},
        Oft(): {"oft_blocks", "alpha"},
        Ia3(): {"weight", "on_input"},
    }
    for method, suffixes in names.items():
        tensors = load_file(write(tmp_path / "a.safetensors", make_pipe(), [(method, "attention")]))
        assert {name.removeprefix(f"{key}.") for name in tensors if name.startswith(f"{key}.")} == suffixes
    assert tensors[f"{key}.weight"].shape == (32,)


BROKEN: dict[str, dict[str, tuple[int, ...]]] = {
    r"dora_scale \(31, 1\) fits neither": {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2),
                                           "hada_w2_b": (2, 32), "dora_scale": (31, 1)},
    "hada_w2_b is missing": {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2)},
    r"hada_w1_a \(31, 2\) does not fit": {"hada_w1_a": (31, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2),
                                          "hada_w2_b": (2, 32)},
    r"lokr.*do not fit a": {"lokr_w1": (4, 4), "lokr_w2": (8, 9)},
    "factors do not fit one another": {"lokr_w1_a": (4, 3), "lokr_w1_b": (2, 4), "lokr_w2": (8, 8)},
    "lokr_w2_a is missing": {"lokr_w1": (4, 4), "lokr_w2_b": (2, 8)},
    r"\(5, 8, 4, 4\) do not fit the 32 outputs": {"oft_blocks": (5, 8, 4, 4), "alpha": ()},  # of more rotations than mix
    r"oft_R.weight \(8, 5\) does not fit the 32 inputs": {"oft_R.weight": (8, 5)},
    r"oft_R.weight \(4, 6\) does not fit the 32 inputs": {"oft_R.weight": (4, 6)},
    r"boft_R \(4, 16, 2, 2\) and boft_s \(31,\) do not fit": {"boft_R": (4, 16, 2, 2), "boft_s": (31,)},
    r"boft_R \(6, 16, 2, 2\) .* do not fit": {"boft_R": (6, 16, 2, 2), "boft_s": (32,)},
    "a1.weight .* do not fit a Linear": {"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (32, 2),
                                         "b2.weight": (3, 32)},
    "b2.weight is missing": {"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (32, 2)},
    "boft_s is missing": {"boft_R": (1, 16, 2, 2)},
    "do not fit the 32 outputs": {"oft_blocks": (8, 5, 5), "alpha": ()},
    "fits neither": {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "dora_scale": (7, 1)},
    "lora_mid.weight .* does not fit": {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "lora_mid.weight": (3, 2)},
    "does not fit the 32 outputs": {"weight": (31,), "on_input": ()},
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_tensors_that_do_not_fit_are_refused_in_words(tmp_path: Path, tiny_pipe: DiffusionPipeline, message: str) -> None:
    key = "lora_unet_" + UNET_LINEAR.replace(".", "_")
    save_file({f"{key}.{name}": torch.zeros(shape) for name, shape in BROKEN[message].items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        formats.load(tmp_path / "a.safetensors", tiny_pipe)


class BlockDiagonal:
    """What peft's kernel for BOFT gives, without which it takes a single rotation."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*one) for one in blocks])]


OFTS: dict[str, dict[str, Any]] = {
    "series": {},
    "series of 3 terms": {"num_cayley_neumann_terms": 3},
    "series of 2 terms": {"num_cayley_neumann_terms": 2},
    "a long series": {"num_cayley_neumann_terms": 8},
    "exact": {"use_cayley_neumann": False},
    "limited": {"use_cayley_neumann": False, "coft": True, "eps": 0.3},
    "shared": {"block_share": True},
    "one block": {"r": 1, "oft_block_size": 0},
}


@pytest.mark.parametrize("kind", ["linear", "pointwise"])
@pytest.mark.parametrize("form", OFTS)
def test_oft_agrees_with_peft(form: str, kind: str) -> None:
    from peft import OFTConfig

    layer, x = module(kind), inputs(kind)
    options = {"r": 0, "oft_block_size": 4, **OFTS[form]}
    model, theirs = in_peft(layer, OFTConfig(target_modules=["0"], init_weights=False, **options))
    tensors = {"oft_R.weight": theirs.oft_R["default"].weight.detach().clone()}
    told = Oft.from_peft(OFTS[form], "0", {name: tuple(one.shape) for name, one in tensors.items()})
    tensors |= {name: torch.tensor(value) for name, value in told.items()}
    adapter = Oft.read(layer, tensors)
    assert Oft.recognizes(tensors.keys()) and tensors.keys() <= Oft.suffixes
    usual = form in ("series", "shared", "one block")  # which OneTrainer has too
    assert adapter.state().keys() == ({"oft_R.weight"} if usual else tensors.keys())
    assert agrees(layer, adapter, model, x)


def test_oft_of_peft_is_refused_where_it_is_no_rotation() -> None:
    layer = module("conv")
    with pytest.raises(UserError, match=r"oft_R\.weight stands at a convolution with a kernel"):
        Oft.read(layer, {"oft_R.weight": torch.zeros(36, 6), "oft_terms": torch.tensor(5.0)})


def of_onetrainer(layer: Any, packed: Tensor, scaled: Tensor | None, x: Tensor) -> Tensor:
    """The output of ``OFTModule`` of OneTrainer's LoRAModule.py, and in its oft_utils.py of ``OFTRotationModule``."""
    weight = layer.weight.flatten(1)
    size = next(one for one in range(2, 100) if one * (one - 1) == 2 * packed.shape[1])
    if scaled is not None:  # the first version's mark was the number 1
        packed = packed / (2 * math.sqrt(size - 1) if scaled.dtype == torch.bool else packed.shape[1] ** 0.5)
    q = torch.zeros(len(packed), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = packed
    q = q - q.transpose(1, 2)
    rotation = torch.eye(size) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    rotation = rotation.repeat(weight.shape[1] // size // len(packed), 1, 1)
    if isinstance(layer, nn.Linear):
        turned = torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (-1, size)), rotation).flatten(-2)
        return F.linear(turned, layer.weight, layer.bias)
    turned = torch.einsum("ork,rkc->orc", weight.unflatten(1, (-1, size)), rotation).reshape(layer.weight.shape)
    return F.conv2d(x, turned, layer.bias, layer.stride, layer.padding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [None, torch.tensor(True), torch.tensor(1)], ids=["plain", "scaled", "scaled at first"])
@pytest.mark.parametrize("shared", [False, True])
def test_oft_agrees_with_onetrainer(shared: bool, scaled: Tensor | None, kind: str) -> None:
    from peft import OFTConfig

    layer, x = module(kind), inputs(kind)
    features = layer.get_parameter("weight").flatten(1).shape[1]
    generator = torch.Generator().manual_seed(5)
    packed = torch.randn(1 if shared else features // 4, 6, generator=generator) * 0.2
    tensors = {"oft_R.weight": packed, **({} if scaled is None else {"oft_R.scaled_oft": scaled})}
    adapter = Oft.read(layer, tensors)
    state = adapter.state()
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], one) for name, one in tensors.items())
    expected = of_onetrainer(layer, packed, scaled, x)
    assert not close(layer(x), expected, 0.01) and close(run(layer, adapter, x), expected)
    adapter.bind(layer)
    if kind == "conv":
        with pytest.raises(UserError, match="no rotation at a convolution with a kernel"):
            Oft.in_peft({"0": adapter})
        return
    form = Oft.in_peft({"0": adapter})
    assert form is not None
    model, theirs = in_peft(layer, OFTConfig(target_modules=["0"], **form.options))
    theirs.oft_R["default"].weight.data.copy_(form.sites["0"].tensors["oft_R.weight"])
    with torch.no_grad():
        assert close(model(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotations", [1, 3])
def test_boft_agrees_with_peft(rotations: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import BOFTConfig

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonal if rotations > 1 else None)
    layer, x = module(kind), inputs(kind)
    size = {"linear": 6, "conv": 4, "pointwise": 2}[kind]  # of 24, 144 and 16 inputs
    config = BOFTConfig(target_modules=["0"], boft_block_size=size, boft_n_butterfly_factor=rotations, init_weights=False)
    model, theirs = in_peft(layer, config)
    tensors = own(theirs, "boft_R", "boft_s")
    assert len(tensors["boft_R"]) == rotations
    tensors["boft_s"] = Oft.from_alias("boft_s", tensors["boft_s"])
    assert Oft.recognizes(tensors.keys()) and tensors.keys() <= Oft.suffixes
    assert agrees(layer, Oft.read(layer, tensors), model, x)


# --- hyper-parameters ------------------------------------------------------------------------------------------------

# Weights are (32, 24) and (24, 16, 3, 3).
COUNTS = {
    "lora": (Lora(rank=4), 4 * (24 + 32), 4 * (16 * 9 + 24)),
    "pissa": (Lora(rank=4, init="pissa"), 4 * (24 + 32), 4 * (16 * 9 + 24)),
    "dora": (Dora(rank=4), 4 * (24 + 32) + 32, 4 * (16 * 9 + 24) + 24),
    "loha": (Loha(rank=4), 2 * 4 * (24 + 32), 2 * 4 * (16 * 9 + 24)),
    "lokr": (Lokr(rank=2, factor=4), 4 * 4 + 2 * (8 + 6), 4 * 4 + 2 * (6 + 4 * 9)),
    "lokr, full": (Lokr(factor=4, full=True), 4 * 4 + 8 * 6, 4 * 4 + 6 * 4 * 9),
    "lokr, smallest": (Lokr(factor=-1, full=True), 4 * 4 + 8 * 6, 4 * 4 + 6 * 4 * 9),
    "lokr, both": (Lokr(rank=1, factor=4, decompose_both=True), 4 + 4 + (8 + 6), 4 + 4 + (6 + 4 * 9)),
    "oft": (Oft(block_size=4), 32 * 4, 24 * 4),
    "oft, rescaled": (Oft(block_size=4, rescale=True), 32 * 4 + 32, 24 * 4 + 24),
    "ia3": (Ia3(), 32, 24),
    "ia3 on input": (Ia3(on_input=True), 24, 16),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_the_formula_says(name: str) -> None:
    method, linear, conv = COUNTS[name]
    for kind, expected in (("linear", linear), ("conv", conv)):
        assert sum(p.numel() for p in method.build(module(kind)).parameters()) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"init": "random"}, "init must be one of standard, gaussian, pissa, orthogonal"),
        ("dora", {"rank": 0}, "rank must be at least 1"),
        ("dora", {"dropout": 1.0}, "dropout must be from 0"),
        ("loha", {"alpha": 0.0}, "alpha must be above 0"),
        ("lokr", {"factor": 0}, "factor must be at least 1"),
        ("lokr", {"full": True, "decompose_both": True}, "choose one of them"),
        ("oft", {"block_size": 1}, "block_size must be at least 2"),
        ("oft", {"constraint": -1.0}, "constraint must be 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        METHODS[name](**options)


def test_sites_that_have_nothing_to_offer_are_refused() -> None:
    with pytest.raises(UserError, match="no blocks of 2 to 8 in 7 outputs"):
        Oft().build(nn.Linear(4, 7))
    with pytest.raises(UserError, match="has no rank 9"):
        Lora(rank=9, init="pissa").build(nn.Linear(8, 16))
    assert not any(m().serves(nn.Conv2d(8, 8, 3, groups=2)) for m in (Lora, Dora, Loha, Lokr, Oft, Ia3))


def test_gaussian_starts_with_its_deviation_and_changes_nothing() -> None:
    torch.manual_seed(0)
    adapter = Lora(rank=8, init="gaussian").build(nn.Linear(4096, 8))
    assert abs(adapter.down.std().item() * 8 - 1) < 0.02 and not adapter.up.any()


@pytest.mark.slow
def test_pissa_is_the_principal_part_and_its_file_an_ordinary_lora(tmp_path: Path) -> None:
    pipe = make_pipe()
    parts = {"unet": pipe.unet}
    clean, before = state(pipe.unet), noise(pipe)
    method = Lora(rank=3, alpha=5.0, init="pissa")
    for target in ("attention", "conv"):
        assert site.attach(pipe.unet, target, method, target)
    assert torch.equal(noise(pipe), before)
    adapter = site.adapters(pipe.unet, "conv")[UNET_CONV]
    down, up = adapter.get_parameter("down"), adapter.get_parameter("up")
    weight = clean[f"{UNET_CONV}.weight"].flatten(1)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    principal = left[:, :3] * values[:3] @ right[:3]
    assert torch.allclose(5 / 3 * up @ down.flatten(1), principal, atol=1e-5)
    randomize(pipe.unet, "conv")
    randomize(pipe.unet, "attention")
    site.detach(pipe.unet, "attention")
    running = noise(pipe)
    formats.save(tmp_path / "a.safetensors", parts, "conv", formats.Spec())
    site.detach(pipe.unet, "conv")
    assert same(state(pipe.unet), clean) and torch.equal(noise(pipe), before)
    key = "lora_unet_" + UNET_CONV.replace(".", "_")
    assert load_file(tmp_path / "a.safetensors")[f"{key}.lora_down.weight"].shape[0] == 6
    Adapters(pipe).load(tmp_path / "a.safetensors")
    assert torch.equal(noise(pipe), running) and not torch.equal(running, before)


@pytest.mark.slow
def test_alpha_that_float32_cannot_hold_means_the_same_after_loading(tmp_path: Path) -> None:
    pipe = make_pipe()
    path = write(tmp_path / "a.safetensors", pipe, [(Lora(rank=3, alpha=0.1, rank_stabilized=True), "attention")])
    running = noise(pipe)
    loaded = make_pipe()
    Adapters(loaded).load(path)
    both = site.adapters(pipe.unet, "made"), site.adapters(loaded.unet, "a")
    scales = [[one.scale for one in each.values()] for each in both]
    assert scales[0] and scales[0] == scales[1]
    torch.testing.assert_close(noise(loaded), running, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_finite_in_dora() -> None:
    layer, x = module("linear"), inputs("linear")
    layer.get_parameter("weight")[3] = 0
    adapter = Dora(rank=2).build(layer)
    assert torch.equal(run(layer, copy.deepcopy(adapter), x), layer(x))
    component = nn.Sequential(layer)
    site.attach_built(component, "a", {"0": adapter})
    component(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapter.parameters())


def test_text_encoders_take_them_too(tiny_pipe: DiffusionPipeline) -> None:
    ids = torch.arange(12)[None] + 2
    encoder = components(tiny_pipe)["text_encoder"]
    before = encoder(ids).last_hidden_state
    for name, method in (("dora", Dora(rank=2)), ("oft", Oft()), ("ia3", Ia3(on_input=True))):
        assert len(site.attach(encoder, name, method)) == 12
    assert torch.equal(encoder(ids).last_hidden_state, before)
