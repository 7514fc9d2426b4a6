"""What peft, diffusers and LyCORIS add to a pair changes the weights here by the formula of those programs."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_pipe
from language import make_lm
from safetensors.torch import load_file, save_file
from test_dotted_files import LM_LAYERS, learned, unet_output, with_peft
from torch import Tensor, nn

from peft_diffusion import formats
from peft_diffusion.core import merge, site
from peft_diffusion.core.errors import UserError
from peft_diffusion.generation import Adapters

torch.set_num_threads(1)
# peft says of merging and of its own save what is no matter here.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def changes(component: nn.Module, built: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """By path, what an adapter adds to weight and bias of each site."""
    site.attach_built(component, "a", built)
    found = {}
    for path, adapter in site.adapters(component, "a").items():
        weight, bias = adapter.fold(merge.dense_weight(component.get_submodule(path)), None)
        assert weight is not None
        found[path] = weight, bias
    site.detach(component, "a")
    return found


def of_peft(config: peft.PeftConfig, folder: Path) -> tuple[Any, Path]:
    """A language model with an adapter of peft that was saved."""
    theirs = peft.get_peft_model(make_lm().lm, config).eval()
    learned(theirs)
    theirs.save_pretrained(folder)
    return theirs, folder / "adapter_model.safetensors"


def layers_of(model: Any) -> dict[str, Any]:
    """The layers of peft, by the path in the base."""
    return {name.removeprefix("base_model.model."): one for name, one in model.named_modules() if hasattr(one, "base_layer")}


def assert_equal_changes(theirs: dict[str, Tensor], ours: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    assert theirs.keys() == ours.keys() and theirs
    for path, expected in theirs.items():
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(ours[path][0].detach(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [8, -1])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_singular_values_of_adalora_are_part_of_the_change(pruned: bool, alpha: int, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=alpha, total_step=10, tinit=1, tfinal=1, use_rslora=True, target_modules=LM_LAYERS
    )
    theirs = peft.get_peft_model(make_lm().lm, config)
    learned(theirs)
    for number, layer in enumerate(layers_of(theirs).values()):
        layer.lora_E["default"].data.add_(0.5)
        if pruned:  # as training leaves it: the values of what was taken away are 0
            layer.lora_E["default"].data[: number % 5] = 0.0
    if pruned:
        kept = {
            f"{path}.lora_E.default": (layer.lora_E["default"].flatten() != 0).tolist()
            for path, layer in layers_of(theirs).items()
        }
        theirs.base_model.resize_modules_by_rank_pattern(kept, "default")
    theirs.eval().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    expected = {name: layer.get_delta_weight("default").detach() for name, layer in layers_of(theirs).items()}
    ours = make_lm()
    loaded = formats.load(path, ours, strict=True)
    assert loaded.warnings == () and formats.inspect(path).unknown == ()
    found = changes(ours.lm, loaded.components["lm"])
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name][0].detach(), one, atol=1e-6, rtol=1e-5)
    assert any(one.abs().max() > 1e-2 for one in expected.values())


@pytest.mark.slow
def test_adalora_on_a_convolution(tmp_path: Path) -> None:
    theirs, ours = make_pipe(), make_pipe()
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=8, total_step=10, target_modules=r".*resnets\.0\.conv1")
    model = peft.get_peft_model(theirs.unet, config)
    learned(model)
    model.save_pretrained(tmp_path)
    expected = {name: layer.get_delta_weight("default").detach() for name, layer in layers_of(model).items()}
    loaded = formats.load(tmp_path / "adapter_model.safetensors", ours, strict=True)
    assert_equal_changes(expected, changes(ours.unet, loaded.components["unet"]))


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_the_bias_of_the_second_half_is_scaled_as_the_pair_is(rslora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, lora_bias=True, target_modules=LM_LAYERS)
    theirs, path = of_peft(config, tmp_path)
    ours, ids = make_lm(), torch.arange(2, 30)[None]
    loaded = formats.load(path, ours, strict=True)
    assert loaded.warnings == () and formats.inspect(path).unknown == ()
    for where, (_, bias) in changes(ours.lm, loaded.components["lm"]).items():
        layer = layers_of(theirs)[where]
        assert bias is not None
        torch.testing.assert_close(bias.detach(), layer.lora_B["default"].bias.detach() * layer.scaling["default"])
    with torch.no_grad():
        plain = ours.lm(ids).logits
        Adapters(ours).load(path)
        expected, found = theirs(input_ids=ids).logits, ours.lm(ids).logits
    assert (plain - expected).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_what_the_extras_of_a_pair_are_comes_back_from_a_file_of_ours(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=LM_LAYERS)
    _, path = of_peft(config, tmp_path)
    ours = make_lm()
    Adapters(ours).load(path, name="a")
    formats.save(tmp_path / "own.safetensors", {"lm": ours.lm}, "a", formats.Spec())
    again = formats.load(tmp_path / "own.safetensors", make_lm(), strict=True)
    for where, adapter in site.adapters(ours.lm, "a").items():
        state = again.components["lm"][where].state()
        assert state.keys() == adapter.state().keys() and "lora_up.bias" in state
        assert all(torch.equal(state[name], tensor) for name, tensor in adapter.state().items())
    written = tmp_path / "p" / "adapter_model.safetensors"
    formats.save(written, {"lm": ours.lm}, "a", formats.Spec(), layout="peft")
    theirs, ids = peft.PeftModel.from_pretrained(make_lm().lm, written.parent).eval(), torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours.lm(ids).logits, atol=2e-5, rtol=1e-4)
    first: Any = next(iter(site.adapters(ours.lm, "a").values()))
    first.bias = None  # of one site alone, as a merge of files may leave it
    with pytest.raises(UserError, match=r"has lora_up\.bias beside its pair, which peft has at all sites or at none; take"):
        formats.save(written, {"lm": ours.lm}, "a", formats.Spec(), layout="peft")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lm", "text_encoder"])
def test_pairs_at_embeddings_mean_what_they_do_in_peft(kind: str, tmp_path: Path) -> None:
    def base() -> tuple[Any, nn.Module]:
        pipe: Any = make_lm() if kind == "lm" else make_pipe()
        return pipe, getattr(pipe, kind)

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found = model(input_ids=torch.arange(2, 30)[None])
        result: Tensor = found.logits if kind == "lm" else found.last_hidden_state
        return result

    targets = ["embed_tokens", "q_proj"] if kind == "lm" else ["token_embedding", "position_embedding", "q_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, rank_pattern={"position_embedding": 2}, target_modules=targets)
    theirs: Any = peft.get_peft_model(base()[1], config).eval()
    learned(theirs)
    theirs.save_pretrained(tmp_path)
    path, (pipe, model) = tmp_path / "adapter_model.safetensors", base()
    plain, expected = output(model), output(theirs)
    assert formats.inspect(path).methods == ("lora",) and set(formats.inspect(path).ranks) <= {2, 4}
    assert formats.load(path, pipe, strict=True).warnings == ()
    Adapters(pipe).load(path, name="a")
    assert (plain - expected).abs().max() > 1e-2
    torch.testing.assert_close(output(model), expected, atol=2e-5, rtol=1e-4)
    written = tmp_path / "p" / "adapter_model.safetensors"
    formats.save(written, {kind: model}, "a", formats.Spec(), layout="peft")
    held, made = load_file(path), load_file(written)
    assert all(torch.equal(held[name], one) for name, one in made.items())
    assert held.keys() - made.keys() <= {"base_model.model.model.embed_tokens.base_layer.weight"}
    again = peft.PeftModel.from_pretrained(base()[1], written.parent).eval()
    torch.testing.assert_close(output(again), expected)


def test_a_pair_at_an_embedding_is_told_by_its_shapes(tmp_path: Path) -> None:
    pipe, generator = make_pipe(), torch.Generator().manual_seed(5)
    table = pipe.text_encoder.get_submodule("embeddings.token_embedding")
    rows, width = table.weight.shape
    up, down = torch.randn(rows, 3, generator=generator), torch.randn(3, width, generator=generator)
    name = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"  # as ComfyUI's extraction writes it
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a.safetensors")
    loaded = formats.load(tmp_path / "a.safetensors", pipe, strict=True)
    (found,) = changes(pipe.text_encoder, loaded.components["text_encoder"]).values()
    torch.testing.assert_close(found[0].detach(), up @ down)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down[:2]}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="do not fit an embedding of"):
        formats.load(tmp_path / "b.safetensors", pipe)


@pytest.mark.slow
def test_an_embedding_that_peft_saved_beside_its_pair_has_to_be_that_of_the_base(tmp_path: Path) -> None:
    _, path = of_peft(peft.LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path)
    ours = make_lm()
    ours.lm.get_input_embeddings().weight.data[3] += 1.0
    with pytest.raises(UserError, match=r"base_layer\.weight \(257, 32\) is another weight than this Embedding's"):
        formats.load(path, ours)


@pytest.mark.slow
@pytest.mark.parametrize("convolutions", [False, True])
def test_diffusers_export_for_kohya_keeps_the_magnitudes_of_a_dora(convolutions: bool, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from peft.utils import get_peft_model_state_dict

    theirs, ours = make_pipe(), make_pipe()
    plain = unet_output(ours)
    target = {"target_modules": r".*down_blocks\.0\.resnets\.0\.conv[12]"} if convolutions else {}
    if convolutions:
        theirs.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, **target))
        learned(theirs.unet)
    else:
        with_peft(theirs, r=4, lora_alpha=4, use_dora=True)
    state = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(theirs.unet).items()}
    exported = {name: tensor.contiguous() for name, tensor in convert_state_dict_to_kohya(state).items()}
    assert any(name.rpartition(".")[0].count(".") for name in exported if name.endswith("magnitude_vector"))
    save_file(exported, tmp_path / "a.safetensors")
    assert formats.inspect(tmp_path / "a.safetensors").methods == ("dora",)
    Adapters(ours).load(tmp_path / "a.safetensors", strict=True)
    expected = unet_output(theirs)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(unet_output(ours), expected, atol=1e-5, rtol=1e-4)


def extracted() -> tuple[dict[str, Tensor], Any]:
    """What LyCORIS extracts of the difference of two pipelines, and the first of them."""
    from lycoris.utils import extract_diff

    base, tuned = make_pipe(), make_pipe()
    generator = torch.Generator().manual_seed(5)
    for part in (tuned.unet, tuned.text_encoder):
        for parameter in part.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    parts = ([base.text_encoder], [tuned.text_encoder], base.unet, tuned.unet)
    made: dict[str, Tensor] = extract_diff(*copy.deepcopy(parts), "fixed", 2, 2, "cpu", True, 0.9, False)
    return made, base


@pytest.mark.slow
def test_the_sparse_rest_of_an_extraction_is_part_of_the_change(tmp_path: Path) -> None:
    made, base = extracted()
    assert any(name.endswith("bias_indices") for name in made)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, tmp_path / "a.safetensors")
    loaded = formats.load(tmp_path / "a.safetensors", base)
    found = changes(base.unet, loaded.components["unet"])
    checked = 0
    for path, (change, _) in found.items():
        stem = f"lora_unet_{path.replace('.', '_')}"
        if f"{stem}.bias_indices" not in made:
            continue
        down, up, alpha = (made[f"{stem}.{end}"].float() for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        indices, values, size = (made[f"{stem}.{end}"] for end in ("bias_indices", "bias_values", "bias_size"))
        rest = torch.sparse_coo_tensor(indices.long(), values.float(), size.tolist()).to_dense()
        expected = alpha.item() / len(down) * up.flatten(1) @ down.flatten(1) + rest
        torch.testing.assert_close(change.detach().flatten(1), expected, atol=1e-6, rtol=1e-5)
        assert rest.abs().max() > 1e-3
        checked += 1
    assert checked > 10
    path = next(iter(found))
    without = dict(load_file(tmp_path / "a.safetensors"))
    stem = f"lora_unet_{path.replace('.', '_')}"
    without[f"{stem}.bias_size"] = torch.tensor([3, 3], dtype=torch.int16)
    save_file(without, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="are no sparse matrix of"):
        formats.load(tmp_path / "b.safetensors", base)


@pytest.mark.slow
def test_a_configuration_of_peft_that_is_not_computed_is_told(tmp_path: Path) -> None:
    _, path = of_peft(peft.LoraConfig(r=4, lora_alpha=6, target_modules=LM_LAYERS), tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**told, "layer_replication": [[0, 2], [1, 2]]}))
    (warning,) = formats.load(path, make_lm()).warnings
    assert "layer_replication, which is not computed here" in warning
