"""Whole files to and from LyCORIS' own networks and loaders, and what the files of all methods tell in words."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from laws import randomize
from safetensors.torch import load_file, save_file
from test_methods_lycoris import close, noise, perturb, write
from torch import nn

from peft_diffusion import formats
from peft_diffusion.bases import describe
from peft_diffusion.cli.app import main
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.method import Method, Network
from peft_diffusion.generation import Adapters
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.bottleneck import Bottleneck
from peft_diffusion.methods.dora import Dora
from peft_diffusion.methods.ia3 import Ia3
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lokr import Lokr
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.oft import Oft
from peft_diffusion.methods.prefix import Prefix

lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
kohya = pytest.importorskip("lycoris.kohya", reason="lycoris-lora is not installed")
torch.set_num_threads(1)

SITE = "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

# Arguments of kohya's trainer, and what inspect tells of the file that they make.
NETWORKS: dict[str, tuple[dict[str, str], str, dict[str, set[float]]]] = {
    "locon": ({"algo": "locon"}, "lora", {"rank": {4}, "alpha": {2}}),
    "dora": ({"algo": "lora", "dora_wd": "True"}, "dora", {"rank": {4}, "alpha": {2}}),
    "dora per input": ({"algo": "lora", "dora_wd": "True", "wd_on_output": "False"}, "dora", {"rank": {4}, "alpha": {2}}),
    "rslora": ({"algo": "lora", "rs_lora": "True"}, "lora", {"rank": {4}, "alpha": {4}}),  # 2 * sqrt(4)
    "loha": ({"algo": "loha"}, "loha", {"rank": {4}, "alpha": {2}}),
    "loha, decomposed": (
        {"algo": "loha", "dora_wd": "True"},
        "loha",
        {"rank": {4}, "alpha": {2}, "weight_decompose": {True}},
    ),
    "lokr": ({"algo": "lokr", "factor": "4"}, "lokr", {"factor": {4}, "rank": {4}, "alpha": {2}}),
    "lokr, decomposed": (
        # Not with rs_lora: LyCORIS then scales sites that need no rank while it trains, but not when it loads their file.
        {"algo": "lokr", "factor": "4", "dora_wd": "True"},
        "lokr",
        {"factor": {4}, "rank": {4}, "alpha": {2}, "weight_decompose": {True}},
    ),
    "lokr, full": ({"algo": "lokr", "factor": "4", "full_matrix": "True"}, "lokr", {"factor": {4}, "full": {True}}),
    "oft": ({"algo": "diag-oft", "constraint": "0.03"}, "oft", {"block_size": {4}, "constraint": {0.03}}),
    "ia3": ({"algo": "ia3"}, "ia3", {"on_input": {False}}),
}


@pytest.fixture(autouse=True)
def layers_of_a_transformer() -> None:
    """LyCORIS keeps which modules it looks at on its class, as the last network that was made left it; begin alike."""
    kohya.create_network(1.0, 4, 2.0, None, None, make_pipe().unet, preset="attn-mlp", algo="lora")


def trained_there(unet: nn.Module, args: dict[str, str]) -> Any:
    """A network of LyCORIS as kohya's trainer makes it, with parameters that matter."""
    network = kohya.create_network(1.0, 4, 2.0, None, None, unet, preset="attn-mlp", **args)
    assert network.unet_loras
    for module in network.unet_loras:
        perturb(module, 0.1)
    return network


def applied(network: Any, unet: nn.Module) -> dict[str, torch.Tensor]:
    """Put a network of LyCORIS to work in a UNet; its tensors as it saves them."""
    network.apply_to(None, unet, False, True)
    return {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_files_of_lycoris_load_and_tell_what_they_are(tmp_path: Path, name: str) -> None:
    args, method, values = NETWORKS[name]
    theirs, ours = make_pipe(), make_pipe()
    tensors = applied(trained_there(theirs.unet, args), theirs.unet)
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "4", "ss_network_alpha": "2.0",
                "ss_network_args": json.dumps(args)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    before = noise(ours)
    Adapters(ours).load(tmp_path / "a.safetensors")
    assert close(noise(ours), noise(theirs), 1e-4) and not close(noise(ours), before, 1e-2)
    found = formats.inspect(tmp_path / "a.safetensors")
    assert found.methods == (method,) and found.unknown == () and found.spec is None
    told = {key: {round(value, 6) for value in counts} for key, counts in found.hyper_parameters[method].items()}
    assert {key: told.get(key) for key in values} == values
    assert found.network is not None
    assert (found.network.module, found.network.dim, found.network.alpha) == ("lycoris.kohya", 4, 2.0)
    assert found.network.args == args


WRITTEN: dict[str, tuple[Method, str, dict[str, str]]] = {
    "lora": (Lora(rank=4, alpha=2.0), "networks.lora", {}),
    "rslora": (Lora(rank=4, rank_stabilized=True), "lycoris.kohya", {"algo": "lora", "rs_lora": "True"}),
    "dora": (Dora(rank=4, alpha=2.0), "lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
    "loha": (Loha(rank=4), "lycoris.kohya", {"algo": "loha"}),
    "loha, decomposed": (Loha(rank=4, weight_decompose=True), "lycoris.kohya", {"algo": "loha", "dora_wd": "True"}),
    "lokr": (Lokr(rank=2, factor=4), "lycoris.kohya", {"algo": "lokr", "factor": "4"}),
    "lokr, decomposed": (
        Lokr(rank=2, factor=2, weight_decompose=True, rank_stabilized=True),
        "lycoris.kohya",
        {"algo": "lokr", "factor": "2", "dora_wd": "True", "rs_lora": "True"},
    ),
    "lokr, full": (Lokr(factor=8, full=True), "lycoris.kohya", {"algo": "lokr", "factor": "8", "full_matrix": "True"}),
    "oft": (
        Oft(block_size=4, constraint=0.02, rescale=True),
        "lycoris.kohya",
        {"algo": "diag-oft", "constraint": "0.02", "rescaled": "True"},
    ),
    "ia3": (Ia3(), "lycoris.kohya", {"algo": "ia3"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_ours_are_read_by_lycoris_and_say_what_makes_such_a_network(tmp_path: Path, name: str) -> None:
    method, module, args = WRITTEN[name]
    ours, theirs = make_pipe(), make_pipe()
    path = write(tmp_path / "a.safetensors", ours, [(method, "attention+ff")])
    if name != "ia3":  # which LyCORIS 4.1.3 writes, but its loader stumbles over
        network, _ = kohya.create_network_from_weights(1.0, str(path), None, None, theirs.unet)
        assert len(network.unet_loras) == len(site.sites(ours.unet))
        applied(network, theirs.unet)
        assert close(noise(theirs), noise(ours), 1e-4)
    found = formats.inspect(path).network
    assert found is not None
    assert (found.module, found.args) == (module, args)
    # What the metadata say, given to LyCORIS, makes modules of the very shapes that the file holds.
    unet = make_pipe().unet
    fresh = kohya.create_network(1.0, found.dim, found.alpha or 1.0, None, None, unet, preset="attn-mlp", **found.args)
    theirs, written = applied(fresh, unet), load_file(path)
    shared = [key for key in written if key in theirs]
    assert len(shared) > 0.9 * len(written)
    for key in shared:
        assert written[key].shape == theirs[key].shape, key
        if key.endswith(".alpha") and "full_matrix" not in args:
            assert written[key].item() == pytest.approx(theirs[key].item()), key


class Encoder4(nn.Module):
    """A CLIP text model as transformers had it before 5, which LyCORIS and kohya's files name it after."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "oft"])
def test_both_text_encoders_of_sdxl_are_read_by_lycoris(tmp_path: Path, name: str) -> None:
    method, ours, theirs = WRITTEN[name][0], make_xl_pipe(), make_xl_pipe()
    parts = {component: getattr(ours, component) for component in ("text_encoder", "text_encoder_2")}
    ids = torch.arange(2, 14)[None]

    def told(pipe: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [pipe.text_encoder(ids).last_hidden_state, pipe.text_encoder_2(ids).text_embeds]

    before = told(ours)
    for part in parts.values():
        site.attach(part, "made", method, "attention+ff")
        randomize(part, "made")
    formats.save(tmp_path / "a.safetensors", parts, "made", formats.Spec(base=asdict(describe(ours))))
    encoders = [Encoder4(theirs.text_encoder), theirs.text_encoder_2]
    network, _ = kohya.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, encoders, theirs.unet)
    assert len(network.text_encoder_loras) == sum(len(site.sites(part)) for part in parts.values())
    network.apply_to(encoders, theirs.unet, True, False)
    for plain, expected, found in zip(before, told(ours), told(theirs), strict=True):
        assert not close(expected, plain, 1e-2) and close(found, expected, 1e-4)


@pytest.mark.slow
def test_pissa_and_convolutions_with_kernels_are_told_as_the_file_holds_them(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors", make_pipe(), [(Lora(rank=3, alpha=1.0, init="pissa", b_rate_ratio=4.0), "conv")]
    )
    found = formats.inspect(path)
    assert found.network == Network(
        "networks.lora", 6, 2.0, {"conv_dim": "6", "conv_alpha": "2.0", "loraplus_lr_ratio": "4.0"}
    )
    assert set(found.ranks) == {6} and set(found.alphas) == {2.0}


@pytest.mark.slow
def test_a_method_that_those_programs_lack_is_not_called_a_lora(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", make_pipe(), [(Bottleneck(hidden=4), "outputs")])
    assert not [key for key in formats.inspect(path).metadata if key.startswith("ss_network")]


@pytest.mark.slow
def test_metadata_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path / "a.safetensors", make_pipe(), [(Lora(rank=3), "attention")]))
    odd = {"ss_network_module": "x", "ss_network_dim": "None", "ss_network_alpha": "nan", "ss_network_args": "[1]"}
    save_file(tensors, tmp_path / "b.safetensors", odd)
    assert formats.inspect(tmp_path / "b.safetensors").network == Network("x")


@pytest.mark.slow
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_names_of_the_wrapper_of_lycoris_are_read(tmp_path: Path, component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What it replaces belongs to the class, and stays what anyone in this process made it.
    monkeypatch.setattr(lycoris.LycorisNetwork, "TARGET_REPLACE_MODULE", ["Linear"])
    monkeypatch.setattr(lycoris.LycorisNetwork, "TARGET_REPLACE_NAME", [])
    theirs, ours = make_pipe(), make_pipe()
    module = getattr(theirs, component)
    wrapped = lycoris.create_lycoris(module, 1.0, linear_dim=3, linear_alpha=1.0, algo="lokr", factor=4, preset="attn-mlp")
    wrapped.apply_to()
    perturb(wrapped, 0.1)
    tensors = {key: value.detach().clone().contiguous() for key, value in wrapped.state_dict().items()}
    assert tensors and all(key.startswith("lycoris_") for key in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = formats.load(tmp_path / "a.safetensors", ours, strict=True)
    assert set(loaded.components) == {component}
    assert formats.inspect(tmp_path / "a.safetensors").components == {component: len(loaded.components[component])}
    ids = torch.arange(12)[None] + 2
    output = (lambda pipe: noise(pipe)) if component == "unet" else (lambda pipe: pipe.text_encoder(ids).last_hidden_state)
    before = output(ours)
    Adapters(ours).load(tmp_path / "a.safetensors")
    assert close(output(ours), output(theirs), 1e-4) and not close(output(ours), before, 1e-3)


@pytest.mark.slow
def test_of_two_text_encoders_the_wrapper_names_neither(tmp_path: Path) -> None:
    pipe = make_pipe()
    second = copy.deepcopy(pipe.text_encoder)
    base = SimpleNamespace(**pipe.components, text_encoder_2=second, tokenizer_2=pipe.tokenizer, config={})
    text = "lycoris_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{SITE}.lora_down.weight": torch.ones(2, 32), f"{SITE}.lora_up.weight": torch.ones(32, 2)}
    tensors |= {f"{text}.lora_down.weight": torch.ones(2, 32), f"{text}.lora_up.weight": torch.ones(64, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = formats.load(tmp_path / "a.safetensors", base)
    assert set(loaded.components) == {"unet"}
    assert set(loaded.report.unmatched) == {name for name in tensors if name.startswith(text)}


TOLD: dict[str, tuple[list[tuple[Method, str]], list[str]]] = {
    "lora": ([(Lora(rank=4, alpha=2.0, b_rate_ratio=16.0), "attention")], ["lora: rank 4, alpha 2", "b rate ratio 16"]),
    "two ranks": (
        [(Lora(rank=2), r".*\.to_q"), (Lora(rank=5), r".*\.to_k")],
        ["lora: rank 2 (8 sites), 5 (8 sites), alpha 2 (8 sites), 5 (8 sites)"],
    ),
    "dora": ([(Dora(rank=3), "attention")], ["dora: rank 3, alpha 3"]),
    "loha": ([(Loha(rank=3), "attention")], ["loha: rank 3, alpha 3"]),
    "loha, decomposed": (
        [(Loha(rank=3, weight_decompose=True), "attention")],
        ["loha: rank 3, alpha 3, weight decompose true"],
    ),
    "lokr": ([(Lokr(rank=2, factor=4), "attention")], ["lokr: factor 4, rank 2, alpha 2"]),
    "lokr, full": ([(Lokr(factor=4, full=True), "attention")], ["lokr: factor 4, full true"]),
    "oft": ([(Oft(block_size=4, constraint=0.5), "attention")], ["oft: block size 4, constraint 0.5"]),
    "ia3": ([(Ia3(on_input=True), "attention")], ["ia3: on input true"]),
    "bitfit": ([(BitFit(), "biases")], ["bitfit"]),
    "bottleneck": ([(Bottleneck(hidden=6, activation="gelu"), "outputs")], ["bottleneck: hidden 6", "activation gelu"]),
    "prefix": ([(Prefix(length=5), "attentions")], ["prefix: length 5"]),
    "mixture": ([(Lora(rank=4), "attention"), (Ia3(), "attention+ff")], ["lora: rank 4, alpha 4", "ia3: on input false"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOLD)
def test_inspect_tells_the_hyper_parameters_of_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    methods, lines = TOLD[name]
    monkeypatch.setenv("COLUMNS", "200")
    path = write(tmp_path / "a.safetensors", make_pipe(), methods)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    for line in lines:
        assert line in shown, shown


@pytest.mark.slow
def test_an_alpha_of_nothing_means_the_rank_to_inspect_too(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path / "a.safetensors", make_pipe(), [(Lora(rank=3), "attention")]))
    save_file({key: value for key, value in tensors.items() if not key.endswith("alpha")}, tmp_path / "b.safetensors")
    assert set(formats.inspect(tmp_path / "b.safetensors").alphas) == {3}
    with pytest.raises(UserError):
        formats.inspect(tmp_path / "none.safetensors")
