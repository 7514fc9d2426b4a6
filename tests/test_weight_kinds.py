"""Kinds of weights that other programs write beside pairs: what they make of them is what happens here."""

from pathlib import Path

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from test_dotted_files import text_output, unet_output
from torch import Tensor, nn
from torch.nn import functional as F

from peft_diffusion import formats
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.formats.layouts.original import original_names
from peft_diffusion.generation import Adapters
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.full import Full

torch.set_num_threads(1)
SITE = "down_blocks.0.attentions.0.transformer_blocks.0"


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# Whole changes


def tuned() -> tuple[DiffusionPipeline, dict[str, dict[str, Tensor]]]:
    """A pipeline in which every weight and bias was changed, and by how much, by component and name."""
    pipe, generator = make_pipe(), torch.Generator().manual_seed(5)
    changes: dict[str, dict[str, Tensor]] = {}
    for component in ("unet", "text_encoder"):
        own = changes.setdefault(component, {})
        for name, parameter in getattr(pipe, component).named_parameters():
            own[name] = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data += own[name]
    return pipe, changes


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"lora_unet_{SITE.replace('.', '_')}_attn1_to_q", "lora_unet_conv_out"])
def test_comfyuis_set_weight_takes_the_place_of_the_weight(name: str, tmp_path: Path) -> None:
    """``weight.copy_(v[0])`` of ``comfy/lora.py``."""
    pipe, theirs = make_pipe(), make_pipe()
    path = "conv_out" if name.endswith("conv_out") else f"{SITE}.attn1.to_q"
    layer = theirs.unet.get_submodule(path)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    weight = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(6))
    save_file({f"{name}.set_weight": weight}, tmp_path / "a.safetensors")
    layer.weight.data.copy_(weight)
    before = unet_output(pipe)
    Adapters(pipe).load(tmp_path / "a.safetensors")
    close(unet_output(pipe), unet_output(theirs))
    assert not torch.allclose(before, unet_output(theirs), atol=1e-3)
    found = formats.inspect(tmp_path / "a.safetensors")
    assert (found.methods, dict(found.leftovers)) == (("full",), {})


def as_comfyui_saves(changes: dict[str, dict[str, Tensor]], pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """Whole differences with biases, by the rules of ``comfy_extras/nodes_lora_extract.py``."""
    names = original_names(pipe.unet)
    found = {}
    for component, own in changes.items():
        for name, change in own.items():
            path, _, kind = name.rpartition(".")
            end = {"weight": "diff", "bias": "diff_b"}[kind]
            if component == "unet":
                found[f"diffusion_model.{names[path]}.{end}"] = change
            else:
                path = path if path.startswith("text_model.") else f"text_model.{path}"
                found[f"text_encoders.clip_l.transformer.{path}.{end}"] = change
    return found


@pytest.mark.slow
def test_the_whole_difference_of_two_checkpoints_makes_one_of_the_other(tmp_path: Path) -> None:
    theirs, changes = tuned()
    ours = make_pipe()
    tensors = as_comfyui_saves(changes, ours)
    save_file(tensors, tmp_path / "a.safetensors")
    plain = unet_output(ours), text_output(ours)
    adapters = Adapters(ours)
    adapters.load(tmp_path / "a.safetensors", name="a", strict=True)
    found = formats.inspect(tmp_path / "a.safetensors")
    assert found.methods == ("full",) and found.unknown == ()
    for before, now, expected in zip(
        plain, (unet_output(ours), text_output(ours)), (unet_output(theirs), text_output(theirs)), strict=True
    ):
        assert (before - expected).abs().max() > 1e-2
        close(now, expected)
    adapters.merge()
    close(unet_output(ours), unet_output(theirs))
    adapters.unmerge()
    formats.save(tmp_path / "b.safetensors", {"unet": ours.unet, "text_encoder": ours.text_encoder}, "a", formats.Spec())
    again = formats.load(tmp_path / "b.safetensors", make_pipe(), strict=True)
    kept = [one for built in again.components.values() for adapter in built.values() for one in adapter.state().values()]
    assert sorted(one.sum().item() for one in kept) == sorted(one.sum().item() for one in tensors.values())


@pytest.mark.slow
def test_the_extraction_of_lycoris_in_its_full_mode_is_read(tmp_path: Path) -> None:
    extract_diff = pytest.importorskip("lycoris.utils", reason="lycoris-lora is not installed").extract_diff
    (theirs, _), base = tuned(), make_pipe()
    made = extract_diff([base.text_encoder], [theirs.text_encoder], base.unet, theirs.unet, "full", 0, 0, "cpu")
    assert any(name.endswith(".diff") for name in made)
    save_file({name: one.contiguous() for name, one in made.items()}, tmp_path / "a.safetensors")
    ours = make_pipe()
    loaded = formats.load(tmp_path / "a.safetensors", ours, strict=True)
    for component, built in loaded.components.items():
        for path, adapter in built.items():
            wanted = (
                getattr(theirs, component).get_submodule(path).weight - getattr(base, component).get_submodule(path).weight
            )
            state = adapter.state()
            kept = state["diff"] if "diff" in state else state["w_norm"]
            torch.testing.assert_close(kept, wanted, atol=1e-4, rtol=0, check_device=False)  # it keeps halves


NORM, LAYER, QUERY = f"{SITE}.norm1", f"{SITE}.ff.net.2", f"{SITE}.attn1.to_q"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "ends", "method"),
    [
        (NORM, {"weight": "w_norm", "bias": "b_norm"}, "bitfit"),  # of LyCORIS
        (NORM, {"weight": "w_norm"}, "full"),
        (NORM, {"weight": "diff", "bias": "diff_b"}, "full"),  # of ComfyUI
        (NORM, {"weight": "diff"}, "full"),
        (NORM, {"bias": "diff_b"}, "bitfit"),
        (LAYER, {"weight": "diff"}, "full"),
        (LAYER, {"bias": "diff_b"}, "bitfit"),
        (QUERY, {"weight": "diff", "bias": "diff_b"}, "full"),  # which has no bias of its own
        (QUERY, {"bias": "diff_b"}, "bitfit"),
    ],
)
def test_changes_of_a_weight_or_a_bias_alone(path: str, ends: dict[str, str], method: str, tmp_path: Path) -> None:
    theirs, ours = make_pipe(), make_pipe()
    module = theirs.unet.get_submodule(path)
    assert (module.bias is None) is (path == QUERY)
    if "bias" in ends and module.bias is None:
        module.bias = nn.Parameter(torch.zeros(len(module.weight)))
    generator = torch.Generator().manual_seed(5)
    flat, tensors = f"lora_unet_{path.replace('.', '_')}", {}
    for kind, end in ends.items():
        parameter = getattr(module, kind)
        tensors[f"{flat}.{end}"] = torch.randn(parameter.shape, generator=generator)
        parameter.data += tensors[f"{flat}.{end}"]
    save_file(tensors, tmp_path / "a.safetensors")
    plain, expected = unet_output(ours), unet_output(theirs)
    assert formats.inspect(tmp_path / "a.safetensors").methods == (method,)
    Adapters(ours).load(tmp_path / "a.safetensors", name="a", strict=True)
    assert (plain - expected).abs().max() > 1e-3
    close(unet_output(ours), expected)
    formats.save(tmp_path / "b.safetensors", {"unet": ours.unet}, "a", formats.Spec())
    again = make_pipe()
    Adapters(again).load(tmp_path / "b.safetensors", strict=True)
    assert torch.equal(unet_output(again), unet_output(ours))


def test_a_whole_change_that_does_not_fit_is_refused() -> None:
    linear, norm, table = nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 3)
    one_by_one = Full.read(linear, {"diff": torch.ones(4, 3, 1, 1)})
    assert one_by_one.weight.shape == (4, 3)
    for module, tensors in (
        (linear, {"diff": torch.ones(3, 4)}),
        (linear, {"diff": torch.ones(4, 3), "diff_b": torch.ones(3)}),
        (norm, {"diff": torch.ones(3)}),
        (table, {"diff": torch.ones(5, 3), "diff_b": torch.ones(3)}),
    ):
        with pytest.raises(UserError, match="does not fit a"):
            Full.read(module, tensors)
    with pytest.raises(UserError, match="does not fit a Linear with 4 channels"):
        BitFit.read(linear, {"diff_b": torch.ones(3)})


def test_words_beyond_an_embedding_have_no_whole_change() -> None:
    table = nn.Embedding(5, 3)
    model, ids = nn.Sequential(table), torch.tensor([[1, 4]])
    adapter = Full.read(table, {"diff": torch.randn(5, 3)})
    site.attach_built(model, "a", {"0": adapter})
    expected = F.embedding(ids, table.weight + adapter.weight)
    close(model(ids), expected)
    assert torch.equal(adapter.residual(torch.tensor([[9]]), torch.ones(1, 1, 3), torch.ones(1, 1, 3)), torch.zeros(1, 1, 3))


# Rotations


def of_kohya(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """The weight that ``get_weight`` and ``merge_to`` of kohya's networks/oft.py make."""
    generator = blocks - blocks.transpose(1, 2)
    norm = generator.norm()
    generator = generator * ((norm.clamp(max=alpha * len(weight)) + 1e-8) / (norm + 1e-8))
    identity = torch.eye(blocks.shape[1])
    rotation = (identity + generator) @ (identity - generator).inverse()
    turned = torch.einsum("knm,kn...->km...", rotation, weight.unflatten(0, blocks.shape[:2]))
    return turned.flatten(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1e-3, 1.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_rotations_of_kohya_change_the_weights_as_there(kind: str, alpha: float, tmp_path: Path) -> None:
    pipe, generator = make_pipe() if kind == "sd" else make_xl_pipe(), torch.Generator().manual_seed(5)
    names = original_names(pipe.unet) if kind == "sdxl" else {path: path for path, _ in pipe.unet.named_modules()}
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for path, module in pipe.unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and (".attn" in path or ".conv1" in path):
            blocks = torch.randn(4, len(module.weight) // 4, len(module.weight) // 4, generator=generator) * 0.1
            name = f"oft_unet_{names[path].replace('.', '_')}"
            tensors |= {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(alpha)}
            expected[path] = of_kohya(module.weight.detach(), blocks, alpha)
    save_file(tensors, tmp_path / "a.safetensors")
    found = formats.inspect(tmp_path / "a.safetensors")
    assert found.methods == ("oft",) and found.unknown == ()
    adapters = Adapters(pipe)
    adapters.load(tmp_path / "a.safetensors", strict=True)
    adapters.merge()
    for path, weight in expected.items():
        close(pipe.unet.get_submodule(path).weight.detach(), weight)
    adapters.unmerge()
    largest = max((pipe.unet.get_submodule(path).weight - weight).abs().max() for path, weight in expected.items())
    assert largest > 1e-3


# GLoRA


def of_comfyui(weight: Tensor, own: dict[str, Tensor]) -> Tensor:
    """The change of ``calculate_weight`` of ComfyUI's glora.py, whose first generation has each pair the other way round."""
    a1, a2, b1, b2 = (own[name].flatten(1) for name in ("a1.weight", "a2.weight", "b1.weight", "b2.weight"))
    first = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]:  # as at every layer with as many outputs as inputs
        first = first and a2.shape[0] == weight.shape[0] == weight.shape[1]
    if first:
        change = b2 @ b1 + weight.flatten(1) @ a2 @ a1
        return (change * own["alpha"] / len(a1)).view(weight.shape)
    mixed = torch.einsum("oi...,ij->oj...", torch.einsum("oi...,ij->oj...", weight, a1), a2)
    return (mixed + (b1 @ b2).view(weight.shape)) * own["alpha"] / len(a2)


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("path", [LAYER, QUERY, "conv_in", "down_blocks.0.attentions.0.proj_in"])
def test_both_generations_of_glora_change_the_weights_as_in_comfyui(
    path: str, generation: int, decomposed: bool, tmp_path: Path
) -> None:
    pipe, generator = make_pipe(), torch.Generator().manual_seed(5)
    weight = pipe.unet.get_submodule(path).weight.detach().clone()
    (outputs, inputs, *kernel), rank = weight.shape, 3
    if generation == 1 and kernel[:1] == [3]:
        pytest.skip("the first generation had no convolutions with a kernel")
    shapes = {"a1.weight": (inputs, rank), "a2.weight": (rank, inputs), "b1.weight": (outputs, rank)}
    shapes["b2.weight"] = (rank, inputs, *kernel)
    if generation == 1:
        shapes = {
            "a1.weight": (rank, inputs), "a2.weight": (inputs, rank),
            "b1.weight": (rank, inputs), "b2.weight": (outputs, rank),
        }  # fmt: skip
    own = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    own["alpha"] = torch.tensor(1.5)
    expected = of_comfyui(weight, own)
    if decomposed:
        own["dora_scale"] = torch.rand(outputs, *[1] * (weight.ndim - 1), generator=generator) + 0.5
        merged = weight + expected
        norms = merged.flatten(1).norm(dim=1).view(own["dora_scale"].shape)
        expected = merged * own["dora_scale"] / norms - weight
    flat = f"lora_unet_{path.replace('.', '_')}"
    save_file({f"{flat}.{name}": one for name, one in own.items()}, tmp_path / "a.safetensors")
    found = formats.inspect(tmp_path / "a.safetensors")
    assert found.methods == ("glora",) and dict(found.ranks) == {3: 1} and dict(found.alphas) == {1.5: 1}
    adapters = Adapters(pipe)
    adapters.load(tmp_path / "a.safetensors", name="a", strict=True)
    running = unet_output(pipe)
    adapters.merge()
    close(pipe.unet.get_submodule(path).weight.detach() - weight, expected)
    close(unet_output(pipe), running)
    adapters.unmerge()
    formats.save(tmp_path / "b.safetensors", {"unet": pipe.unet}, "a", formats.Spec())
    again = make_pipe()
    Adapters(again).load(tmp_path / "b.safetensors", strict=True)
    assert torch.equal(unet_output(again), running)
