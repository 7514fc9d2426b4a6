"""What merging writes: the base's weight and every adapter's change, as the files hold them, rounded once."""

from pathlib import Path

import pytest
import torch
from conftest import make_pipe
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_diffusion.generation import Adapters

LAYERS = ("to_q", "to_v", "to_out.0", "ff.net.2")
STRENGTHS = (0.7, 1.3, -0.4)


def written(unet: nn.Module, file: Path, seed: int, rank: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA of kohya's layout with a scale that no float of 16 bits holds; returns its downs and scaled ups, in float64."""
    chance = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    meant: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in unet.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(LAYERS):
            stem = f"lora_unet_{path.replace('.', '_')}"
            down = (torch.randn(rank, module.in_features, generator=chance) / module.in_features**0.5).to(dtype)
            up = (torch.randn(module.out_features, rank, generator=chance) / 5).to(dtype)
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
            meant[path] = down.double(), up.double() * 3 / rank
    save_file(tensors, file)
    return meant


@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float16, torch.bfloat16])
def test_files_of_any_precision_are_merged_as_they_are(computed: torch.dtype, held: torch.dtype, tmp_path: Path) -> None:
    pipe = make_pipe().to(computed)
    layers = {path: module for path, module in pipe.unet.named_modules() if isinstance(module, nn.Linear)}
    before = {path: layer.weight.double() for path, layer in layers.items()}
    adapters, meant = Adapters(pipe), []
    for number, strength in enumerate(STRENGTHS):
        file = tmp_path / f"{number}.safetensors"
        meant.append(written(pipe.unet, file, number, 3 + number, held))
        adapters.load(file, f"a{number}", strength)
    adapters.merge()
    differing, count = 0, 0
    for path in meant[0]:
        pairs = zip(STRENGTHS, (one[path] for one in meant), strict=True)
        changes = [strength * up @ down for strength, (down, up) in pairs]
        wanted = sum(changes, before[path]).to(computed)
        now = layers[path].weight
        differing, count = differing + int((now != wanted).sum()), count + now.numel()
        torch.testing.assert_close(now, wanted)
    assert differing < count / 500  # numbers that lie in the middle between two of that precision


def test_what_is_merged_is_what_files_hold_and_not_what_a_base_of_fewer_digits_computes_with(tmp_path: Path) -> None:
    pipe = make_pipe().to(torch.bfloat16)
    path, (down, up) = next(iter(written(pipe.unet, tmp_path / "a.safetensors", 0, 3, torch.float32).items()))
    layer = pipe.unet.get_submodule(path)
    before = layer.weight.double()
    adapters = Adapters(pipe)
    adapters.load(tmp_path / "a.safetensors")
    adapters.merge()
    held, computed = (before + up @ down).bfloat16(), (before + up.bfloat16().double() @ down.bfloat16().double()).bfloat16()
    assert (layer.weight != held).sum() < (layer.weight != computed).sum() / 10
