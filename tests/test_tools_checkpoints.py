"""``merge --into`` and ``extract``: checkpoints as folders and single files, against pictures and formulas."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from original import checkpoint
from safetensors.torch import load_file, save_file
from test_single_file import build, small  # noqa: F401 -- a fixture
from test_tools import ATTENTION, CROSS, KERNEL, NORM, POINTWISE, TEXT, change, close, lora_file, noise, pair
from test_tools_rewriting import word_file
from torch import Tensor

import peft_diffusion as pd
from peft_diffusion import bases
from peft_diffusion.bases.architectures import Architecture
from peft_diffusion.cli.app import main
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Noted, Warned
from peft_diffusion.formats.container import Stored
from peft_diffusion.tools.original_names import bare, laid, rows, taken

RANKS: dict[str, tuple[int, float | None]] = {
    ATTENTION: (4, 2.0), CROSS: (4, None), POINTWISE: (3, 3.0), KERNEL: (2, 1.0), TEXT: (5, 10.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoCon, and a DoRA beside a norm: what depends on the weight, and what is no matrix."""
    folder = tmp_path_factory.mktemp("adapters")
    dora = {**pair(CROSS, 30, 3, 3.0), f"lora_{CROSS}.dora_scale": noise(31, 32, 1).abs() + 0.5}
    norm = {f"lora_{NORM}.w_norm": 0.1 * noise(32, 32), f"lora_{NORM}.b_norm": 0.1 * noise(33, 32)}
    save_file({**dora, **norm}, folder / "dora.safetensors")
    return lora_file(folder / "locon.safetensors", 20, RANKS), folder / "dora.safetensors"


def drawn(base: Path | DiffusionPipeline) -> np.ndarray[Any, Any]:
    pipe: Any = bases.load_base(base, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    noises = noise(5, 1, pipe.unet.config.in_channels, 8, 8)
    picture: np.ndarray[Any, Any] = pipe("a red cat", num_inference_steps=3, latents=noises, output_type="np").images
    return picture


def merged_state(base: Path, adapters: tuple[Path, Path]) -> DiffusionPipeline:
    """The base with both merged in memory, at the strengths of these tests."""
    pipe = bases.load_base(base, device="cpu", dtype="float32")
    both = pd.Adapters(pipe)
    for name, path in zip(("locon", "dora"), adapters, strict=True):
        both.load(path, name=name)
    both.set(locon=0.3, dora=-0.5)
    both.merge()
    return pipe


@pytest.mark.slow
def test_a_checkpoint_draws_what_base_and_adapters_draw(
    adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    words = ["merge", f"{adapters[0]}=0.3", f"{adapters[1]}=-0.5", "--into", str(tiny_base), "--output", str(output)]
    assert main(words) == 0
    pipe = bases.load_base(tiny_base, device="cpu", dtype="float32")
    both = pd.Adapters(pipe)
    for name, path in zip(("locon", "dora"), adapters, strict=True):
        both.load(path, name=name)
    both.set(locon=0.3, dora=-0.5)
    expected = drawn(pipe)
    assert np.abs(drawn(output) - expected).max() <= 1 / 255
    assert np.abs(drawn(tiny_base) - expected).max() > 1 / 255  # they do change the picture


@pytest.mark.slow
def test_a_folder_becomes_a_single_file_with_the_names_of_the_original(
    adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged.safetensors"
    config = pd.MergeConfig([f"{adapters[0]}=0.3", f"{adapters[1]}=-0.5"], output=output, into=str(tiny_base))
    reads: Counter[tuple[str, str]] = Counter()
    plain = Stored.__getitem__

    def counted(self: Stored, name: str) -> Tensor:
        reads[self._header.path.parent.name, name] += 1
        return plain(self, name)

    monkeypatch.setattr(Stored, "__getitem__", counted)
    pd.merge(config)
    assert {count for (folder, _), count in reads.items() if folder == "vae"} == {1}
    expected, found = checkpoint(merged_state(tiny_base, adapters)), load_file(output)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in expected.items())
    assert pd.metadata(output)["modelspec.merged_from"] == "tiny, locon, dora"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_has_the_precision_that_is_asked_for(
    dtype: torch.dtype, adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output, name = tmp_path / "merged.safetensors", {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    pd.merge(pd.MergeConfig([str(adapters[0])], output=output, into=str(tiny_base), dtype=name))  # type: ignore[arg-type]
    found = load_file(output)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    key = f"model.diffusion_model.{'input_blocks.1.1.transformer_blocks.0.attn1.to_q'}.weight"
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = make_pipe().unet.get_submodule(path).weight.detach() + change(load_file(adapters[0]), ATTENTION)
    assert torch.equal(found[key], weight.to(dtype)) or close(found[key].float(), weight, 1e-2)


@pytest.mark.slow
def test_what_no_checkpoint_holds_is_refused_or_left_out(
    adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    word = word_file(tmp_path / "cat.safetensors", "<cat>", tiny_base)
    config: Any = {"files": [str(word), str(adapters[0])], "into": str(tiny_base)}
    with pytest.raises(UserError, match=r"new tokens \(<cat>\) have no row .* --skip leaves out 1 such site,"):
        pd.merge(pd.MergeConfig(**config, output=tmp_path / "no.safetensors"))
    assert not (tmp_path / "no.safetensors").exists()
    events: list[Event] = []
    made = pd.merge(pd.MergeConfig(**config, output=tmp_path / "yes", skip=True), observers=[events.append])
    assert made.sites == len(RANKS)
    assert any(isinstance(one, Warned) and "left out text_encoder" in one.message for one in events)
    with pytest.raises(UserError, match="is there already"):
        pd.merge(pd.MergeConfig(**config, output=tmp_path / "yes", skip=True))
    with pytest.raises(UserError, match="lies in"):
        pd.merge(pd.MergeConfig(**config, output=tiny_base / "own", skip=True))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("make", [make_pipe, make_xl_pipe])
def test_names_of_single_files_are_those_of_the_original(make: Any) -> None:
    pipe = make()
    parts = {name: part for name in ("unet", "text_encoder", "text_encoder_2", "vae") if (part := getattr(pipe, name, None))}
    states = {name: {bare(key): tensor for key, tensor in part.state_dict().items()} for name, part in parts.items()}
    expected, table = checkpoint(pipe), rows(parts)
    found = {row.name: laid(row, [states[row.component][key] for key in row.keys]) for row in table}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    again = [
        torch.equal(taken(row, key, found[row.name], tuple(states[row.component][key].shape)), states[row.component][key])
        for row in table
        for key in row.keys
    ]
    assert all(again) and len(again) == sum(map(len, states.values()))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_single_file_keeps_all_else_that_it_holds_and_gives_back_what_went_in(tmp_path: Path) -> None:
    """Of Stable Diffusion XL, whose second text encoder keeps query, key and value as one tensor."""
    pipe = build(Architecture("sdxl"))
    tensors = {name: tensor.half() for name, tensor in checkpoint(pipe).items()}
    more = {"v_pred": torch.zeros(0), "denoiser.sigmas": torch.arange(5.0), "model_ema.decay": torch.ones(3)}
    save_file(
        {**tensors, **more}, tmp_path / "base.safetensors", {"modelspec.title": "mine", "modelspec.hash_sha256": "0x1"}
    )
    site, text = (
        "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k",
        "te2_text_model_encoder_layers_3_self_attn_k_proj",
    )
    size = pipe.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k").weight.shape
    parts = {f"lora_{site}.lora_down.weight": noise(1, 2, size[1]), f"lora_{site}.lora_up.weight": noise(2, size[0], 2)}
    parts |= {f"lora_{text}.lora_down.weight": noise(3, 2, 64), f"lora_{text}.lora_up.weight": noise(4, 64, 2)}
    save_file(parts, tmp_path / "lora.safetensors")
    events: list[Event] = []
    config = pd.MergeConfig(
        [f"{tmp_path / 'lora.safetensors'}=0.5"],
        output=tmp_path / "out.safetensors",
        into=str(tmp_path / "base.safetensors"),
    )
    pd.merge(config, observers=[events.append])
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {*tensors, "v_pred", "denoiser.sigmas"}
    assert any(isinstance(one, Noted) and "left out 1 tensor model_ema" in one.message for one in events)
    sgm = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight"
    fused = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
    key = tensors[fused].float()
    key[64:128] += 0.5 * change(parts, text)
    expected = {**tensors, sgm: (tensors[sgm].float() + 0.5 * change(parts, site)).half(), fused: key.half(), **more}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    told = pd.metadata(tmp_path / "out.safetensors")
    assert told["modelspec.title"] == "mine" and "modelspec.hash_sha256" not in told
    _extracts_again(tmp_path, parts, (site, text))


def _extracts_again(folder: Path, parts: dict[str, Tensor], sites: tuple[str, str]) -> None:
    """Extraction between both files gives back what was merged."""
    base, tuned = folder / "base.safetensors", folder / "out.safetensors"
    pd.extract(pd.ExtractConfig(str(tuned), str(base), output=folder / "again.safetensors", rank=2, dtype="float32"))
    again = load_file(folder / "again.safetensors")
    assert {name.partition(".")[0] for name in again} == {f"lora_{site}" for site in sites}
    assert all(close(change(again, site), 0.5 * change(parts, site), 1e-2) for site in sites)  # of half precision


# Extracting.


@pytest.fixture(scope="module")
def tuned(adapters: tuple[Path, Path], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, trained to changes of known ranks, and with a norm that a LoRA does not hold."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    pd.merge(pd.MergeConfig([str(adapters[0])], output=folder, into=str(tiny_base)))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_norm_out.weight"] = tensors["conv_norm_out.weight"] + 0.01
    save_file(tensors, file)
    return folder


@pytest.mark.slow
def test_an_extraction_finds_the_ranks_that_were_trained(
    adapters: tuple[Path, Path], tuned: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "found.safetensors"
    config = pd.ExtractConfig(
        str(tuned), str(tiny_base), output=output, frobenius=0.99999, rank=16, conv_rank=16, dtype="float32"
    )
    events: list[Event] = []
    made = pd.extract(config, observers=[events.append])
    trained, found = load_file(adapters[0]), load_file(output)
    assert {name.partition(".")[0] for name in found} == {f"lora_{site}" for site in RANKS}
    for site, (rank, _) in RANKS.items():
        assert len(found[f"lora_{site}.lora_down.weight"]) == rank, site
        assert close(change(found, site), change(trained, site), 1e-3), site
    assert made.error < 1e-3
    assert any(
        isinstance(one, Noted) and "differs in 1 tensor (" in one.message and "GroupNorm" in one.message for one in events
    )


@pytest.mark.slow
def test_an_extraction_leaves_out_what_it_is_told_to(tuned: Path, tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.safetensors"
    words = ["extract", str(tuned), str(tiny_base), "--rank", "2", "--no-text-encoders", "--output", str(output)]
    assert main(words) == 0
    found = load_file(output)
    assert {name.partition(".")[0] for name in found} == {f"lora_{site}" for site in (ATTENTION, CROSS, POINTWISE)}
    assert {tensor.dtype for name, tensor in found.items() if not name.endswith("alpha")} == {torch.float16}
    assert pd.metadata(output)["ss_network_dim"] == "2"


@pytest.mark.slow
def test_checkpoints_that_do_not_differ_or_do_not_match_are_refused(
    tiny_base: Path, tmp_path: Path, xl_folder: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "same")
    with pytest.raises(UserError, match="by more than --smallest"):
        pd.extract(pd.ExtractConfig(str(tmp_path / "same"), str(tiny_base), output=tmp_path / "no.safetensors", rank=2))
    with pytest.raises(UserError, match="are of different architectures"):
        pd.extract(pd.ExtractConfig(str(xl_folder), str(tiny_base), output=tmp_path / "no.safetensors", rank=2))


@pytest.fixture
def xl_folder(tmp_path: Path) -> Path:
    make_xl_pipe().save_pretrained(tmp_path / "xl")
    return tmp_path / "xl"
