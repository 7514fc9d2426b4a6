"""Learning rates of components, of each text encoder and of blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from safetensors.torch import load_file
from test_training import draw_pictures, small

from peft_diffusion.api import train
from peft_diffusion.bases import components, describe
from peft_diffusion.core.errors import UserError
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.attachment import attach
from peft_diffusion.training.settings.derive import resolve
from peft_diffusion.training.settings.placements import Placement

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")

ALL = ("unet", "text_encoder", "text_encoder_2")


def resolved(**more: Any) -> Any:
    return resolve(TrainConfig("p", components=ALL, **more), describe(make_xl_pipe()), 6, "cpu")


@pytest.mark.slow
def test_each_text_encoder_has_its_rate_and_0_freezes_it() -> None:
    assert resolved(text_encoder_lr=2e-5).text_encoder_2_lr == 2e-5
    assert resolved(text_encoder_lr=2e-5, text_encoder_2_lr=3e-6).text_encoder_2_lr == 3e-6
    assert resolved(text_encoder_2_lr=0).components == ("unet", "text_encoder")
    assert resolved(text_encoder_lr=0, text_encoder_2_lr=1e-5).components == ("unet", "text_encoder_2")
    assert resolved(text_encoder_lr=0).components == ("unet",)
    assert resolved(unet_lr=0).components == ALL[1:]
    with pytest.raises(UserError, match="--text-encoder-lr and --unet-lr 0 leaves nothing to train"):
        resolve(TrainConfig("p", unet_lr=0, text_encoder_lr=0, preset="subject"), describe(make_pipe()), 6, "cpu")


@pytest.mark.slow
def test_blocks_have_rates_of_their_own_by_all_their_names() -> None:
    pipe = make_pipe()
    parts = {name: part for name, part in components(pipe).items() if name == "unet"}
    block = Placement("unet", "attention", Lora(rank=2, b_rate_ratio=4.0))
    found = attach(parts, [block], 0, lambda _: 1e-3, {"mid": 1e-5, "down_blocks.0": 0.0})
    assert found.rates == {
        "unet": 1e-3, "unet x4": 4e-3, "unet mid": 1e-5, "unet mid x4": 4e-5, "unet down_blocks.0": 0.0,
        "unet down_blocks.0 x4": 0.0,
    }  # fmt: skip
    assert set(found.owners.values()) == {"unet"} and found.owners.keys() == found.rates.keys()
    with pytest.raises(UserError, match=r"--block-lr middle: there is no such block; there are .*mid_block"):
        attach({"unet": components(make_pipe())["unet"]}, [block], 0, lambda _: 1e-3, {"middle": 1e-5})


@pytest.mark.parametrize("text", ["mid", "mid=", "=1e-3", "mid=much", "mid=inf", "mid=-1"])
def test_a_rate_that_is_none_is_told(text: str) -> None:
    with pytest.raises(UserError, match=r"--block-lr .* give a block and its rate"):
        TrainConfig("p", block_lr=text)


@pytest.mark.slow
def test_a_run_leaves_a_frozen_block_and_text_encoders_that_end_as_they_are(tmp_path: Path) -> None:
    """Of a LoRA that never learned, one half is 0; and what ended after a step is what it was then."""
    config = small(
        draw_pictures(tmp_path / "p"), tmp_path, components=("unet", "text_encoder"), block_lr=("mid=0", "up=1e-4"), steps=4,
        save_every=1, text_encoder_until=0.25, keep="last",
    )  # fmt: skip
    done = train(config, pipe=make_pipe())
    first, last = (load_file(path) for path in (done.run_dir / "adapters" / "a-000001.safetensors", done.output))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert (
        moved and all(name.startswith("lora_unet_") for name in moved) and any(name.startswith("lora_te") for name in first)
    )
    ups = {name: bool(tensor.any()) for name, tensor in last.items() if name.endswith("lora_up.weight")}
    assert {name for name, learned in ups.items() if not learned} == {name for name in ups if "mid_block" in name} != set()
