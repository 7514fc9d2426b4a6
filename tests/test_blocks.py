"""Methods and blocks of a run: what is trained where, and that one file holds it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from making import spec_of
from rich.console import Console
from test_training import draw_pictures, last_state, small
from torch import nn

from peft_diffusion import formats
from peft_diffusion.api import train
from peft_diffusion.bases import BaseInfo
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core.adapter import Adapter, Chain, parts_of
from peft_diffusion.core.errors import UserError
from peft_diffusion.training.settings.pictures import ResolvedConfig

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("blocks") / "pictures")


def rank(module: nn.Module) -> int:
    """The rank of an adapter that is a product of two matrices."""
    assert isinstance(module, Adapter)
    pair = module.low_rank()
    assert pair is not None
    return len(pair.down)


@pytest.mark.slow
def test_blocks_train_together_into_one_adapter_and_one_file(pictures: Path, tmp_path: Path) -> None:
    block = (
        "unet attention lora rank=3 alpha=1.5",
        r"unet .*\.to_q ia3 lr=0.01",
        "text_encoder attention lora",
    )
    asked = small(pictures, tmp_path, components=("unet", "text_encoder"), block=block)
    result = train(asked, pipe=make_pipe())
    spec = spec_of(result.output)
    assert [one["method"] for one in spec.methods["unet"]] == ["lora", "ia3"]
    assert spec.methods["unet"][0]["rank"] == 3 and spec.methods["text_encoder"][0]["rank"] == 2
    loaded = formats.load(result.output, make_pipe(), strict=True)
    for path, adapter in loaded.components["unet"].items():
        assert isinstance(adapter, Chain) == path.endswith("to_q")
        assert parts_of(adapter)[0].scale == 0.5
        assert all(bool(p.abs().sum() > 0) for part in parts_of(adapter) for p in part.parameters())
    trained = [p for part in loaded.components.values() for a in part.values() for p in a.parameters()]
    assert sum(int(p.count_nonzero()) for p in trained) == int(last_state(result).tensors["parameters"].count_nonzero())


@pytest.mark.slow
def test_a_block_has_its_own_learning_rate(pictures: Path, tmp_path: Path) -> None:
    block = ("unet attention lora", r"unet .*\.ff\.net\.2 lora lr=1e-12")
    result = train(small(pictures, tmp_path, block=block), pipe=make_pipe())
    loaded = formats.load(result.output, make_pipe()).components["unet"]
    sizes = {path: float(adapter.get_parameter("up").detach().abs().max()) for path, adapter in loaded.items()}
    assert all(size < 1e-9 for path, size in sizes.items() if path.endswith("ff.net.2"))
    assert all(size > 1e-5 for path, size in sizes.items() if not path.endswith("ff.net.2"))


@pytest.mark.slow
def test_the_plan_tells_the_rates_of_blocks(pictures: Path, tmp_path: Path) -> None:
    block = ("unet attention lora", r"unet .*\.ff\.net\.2 lora lr=1e-12 b_rate_ratio=4")
    console = Console(record=True, width=300, file=(tmp_path / "log").open("w"))
    config = small(pictures, tmp_path, block=block, steps=1, unet_lr=2e-3)
    train(config, pipe=make_pipe(), observers=[TrainingConsole(console)])
    assert "learning rate unet.0 0.002, unet.1 1e-12, unet.1 x4 4e-12 (" in console.export_text()


@pytest.mark.slow
def test_targets_of_a_component_have_ranks_and_methods_of_their_own(pictures: Path, tmp_path: Path) -> None:
    block = (
        r"unet .*\.to_[qk] lora rank=1",
        r"unet .*\.ff\.net\.2 lora rank=5",
        "unet conv dora rank=3",
        "text_encoder attention lora",
    )
    asked = small(pictures, tmp_path, components=("unet", "text_encoder"), block=block, steps=1)
    result = train(asked, pipe=make_pipe())
    loaded = formats.load(result.output, make_pipe(), strict=True).components
    ranks = {path: rank(adapter) for path, adapter in loaded["unet"].items() if adapter.low_rank()}
    assert {path.rpartition(".")[2]: own for path, own in ranks.items()} == {"to_q": 1, "to_k": 1, "2": 5}
    assert {rank(adapter.get_submodule("inner")) for path, adapter in loaded["unet"].items() if path not in ranks} == {3}
    assert {rank(adapter) for adapter in loaded["text_encoder"].values()} == {2}


def after_a_step(pictures: Path, where: Path, *option: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All of ``up`` and of ``down`` after the first step of a run with options of its method."""
    asked = small(pictures, where, option=option, steps=1, unet_lr=1e-3, clip=0.0)
    built = formats.load(train(asked, pipe=make_pipe()).output, make_pipe()).components["unet"].values()
    up, down = ([one.get_parameter(name).detach().flatten() for one in built] for name in ("up", "down"))
    return torch.cat(up), torch.cat(down)


@pytest.fixture(scope="module")
def plain_step(
    pictures: Path, tmp_path_factory: pytest.TempPathFactory, few_measurements: None, no_signals: None, no_plots: None
) -> tuple[torch.Tensor, torch.Tensor]:
    return after_a_step(pictures, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [16.0, 0.25])
def test_lora_plus_moves_b_so_many_times_as_far_in_its_first_step(
    pictures: Path, tmp_path: Path, plain_step: tuple[torch.Tensor, torch.Tensor], ratio: float
) -> None:
    up, down = after_a_step(pictures, tmp_path, f"b_rate_ratio={ratio}")
    assert torch.equal(up, ratio * plain_step[0]) and plain_step[0].abs().median() > 5e-4
    assert torch.equal(down, plain_step[1])


@pytest.mark.slow
def test_lora_plus_has_a_group_of_its_own_and_goes_on_to_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    changes = {"option": ("b_rate_ratio=4", "init=pissa"), "unet_lr": 1e-4, "scheduler": "constant", "log_every": 1}
    whole = train(small(pictures, tmp_path / "whole", steps=2, **changes), pipe=make_pipe())
    logged = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in logged if "lr" in line][-1]["lr"] == {"unet": 1e-4, "unet x4": 4e-4}
    train(small(pictures, tmp_path / "part", steps=1, **changes), pipe=make_pipe())
    resumed = train(small(pictures, tmp_path / "part", steps=2, resume=True, **changes), pipe=make_pipe())
    ours, theirs = last_state(resumed).tensors, last_state(whole).tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_another_method_trains_with_its_own_options(pictures: Path, tmp_path: Path) -> None:
    result = train(small(pictures, tmp_path, method="lokr", option=("factor=4",), steps=1), pipe=make_pipe())
    assert spec_of(result.output).methods["unet"][0]["factor"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lara"}, "there is no method 'lara'; there are: .*lora"),
        ({"option": ("depth=3",)}, "method lora has no depth; it has: "),
        ({"option": ("depth",)}, "'depth' is no NAME=VALUE"),
        ({"option": ("b_rate_ratio=0",)}, "b_rate_ratio must be above 0"),
        ({"option": ("rank=2.5",)}, "rank must be a whole number, not '2.5'"),
        ({"method": "ia3"}, "--rank says nothing to ia3"),
        ({"block": ("unet attention",)}, "a block is COMPONENT TARGET METHOD"),
        ({"block": ("text_encoder attention lora",)}, "text_encoder is not among the --components unet"),
        ({"block": ("unet attention lora lr=0",)}, "lora lr=0': lr must be above 0, not 0; leave it away"),
        ({"block": ("unet attention lora lr=-1",)}, "lr must be above 0, not -1"),
        ({"block": ("unet attention lora lr=nan",)}, "lr must be above 0, not nan"),
        ({"block": ("unet nowhere lora",)}, "matches the target 'nowhere'"),
        ({"block": ("unet attention lora",), "target": "conv"}, "--block names methods and targets itself"),
        ({"block": ("unet attention lora",), "components": ("unet", "text_encoder")}, "no --block trains text_encoder"),
    ],
)
def test_what_makes_no_sense_is_said(pictures: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(small(pictures, tmp_path, **changes), pipe=make_pipe())
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_a_file_of_settings_holds_blocks_as_tables(
    pictures: Path, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft_diffusion.cli.app import main

    asked = small(pictures, tmp_path)
    settings = [
        f"folder = ['{pictures}']", f"output = '{asked.output}'", f"run_dir = '{asked.run_dir}'", f"base = '{tiny_base}'",
        "steps = 2", "preview_steps = 0", "batch_size = 2", "device = 'cpu'",
        "[[block]]", "component = 'unet'", "target = 'attention'", "method = 'lora'", "rank = 3",
        "[[block]]", "component = 'unet'", "target = 'all-linear'", "method = 'ia3'", "on_input = true", "lr = 0.01",
    ]  # fmt: skip
    (tmp_path / "run.toml").write_text("\n".join(settings))
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 0, capsys.readouterr()
    found = spec_of(tmp_path / "a.safetensors").methods["unet"]
    assert [(one["method"], one["target"]) for one in found] == [("lora", "attention"), ("ia3", "all-linear")]
    (tmp_path / "bad.toml").write_text(f"folder = ['{pictures}']\n[[block]]\ncomponent = 'unet'\n")
    assert main(["train", "--config", str(tmp_path / "bad.toml")]) == 1
    assert "lacks target, method" in capsys.readouterr().err


@pytest.mark.slow
def test_learned_words_train_beside_lora_into_one_file_and_are_read_in_prompts(
    pictures: Path, tmp_path: Path, tiny_base: Path
) -> None:
    from peft_diffusion import Adapters, load_base

    block = (
        "unet attention lora rank=2",
        "text_encoder tokens tokens placeholders=<fruit> vectors=2 initial=apple",
    )
    asked = small(pictures, tmp_path, components=("unet", "text_encoder"), block=block, trigger="<fruit>", steps=3)
    pipe = load_base(tiny_base, device="cpu")
    before = pipe.tokenizer("a <fruit>").input_ids
    result = train(asked, pipe=pipe)
    assert pipe.tokenizer("a <fruit>").input_ids == before
    spec = spec_of(result.output)
    assert "<fruit>" in spec.triggers
    adapters = Adapters(pipe)
    name = adapters.load(result.output)
    assert len(pipe.tokenizer("a <fruit>").input_ids) == 5  # begin, a, two vectors, end
    began, learned = (pipe.encode_prompt("a <fruit>", "cpu", 1, False)[0] for _ in range(2))
    assert torch.equal(began, learned)
    adapters.set({name: 0.0})
    assert not torch.allclose(pipe.encode_prompt("a <fruit>", "cpu", 1, False)[0], learned)
    adapters.remove(name)
    assert pipe.tokenizer("a <fruit>").input_ids == before


def test_words_are_not_pulled_towards_nothing() -> None:
    from peft_diffusion.methods.lora import Lora
    from peft_diffusion.methods.tokens import Tokens
    from peft_diffusion.training.attachment import attach, with_words
    from peft_diffusion.training.settings.placements import Placement

    pipe = make_pipe()
    words = Placement("text_encoder", "tokens", Tokens(initial="cat"), rate=2e-3)
    asked = [Placement("text_encoder", "attention", Lora(2)), words]
    found = attach({"text_encoder": pipe.text_encoder}, with_words(pipe, asked), 0, lambda _: 1e-4)
    assert found.rates == {"text_encoder": 1e-4, "text_encoder.1": 2e-3}
    assert found.undecayed == {"text_encoder.1"}


def test_every_method_has_a_learning_rate_of_its_own() -> None:
    """A rate that is given goes before it, and one in a block before both."""
    from peft_diffusion.bases import describe
    from peft_diffusion.training.settings.derive import resolve
    from peft_diffusion.training.settings.pictures import TrainConfig

    base = describe(make_pipe())
    large = replace(base, family="sd1")

    def resolved(**asked: Any) -> ResolvedConfig:
        return resolve(TrainConfig((Path("a"),), **asked), base, 30, "cpu")

    assert resolved().unet_lr == 1e-3
    assert resolved(method="ia3").unet_lr > 1e-3
    assert resolved(method="prompt", components=("text_encoder",)).text_encoder_lr == 5e-3
    words = TrainConfig((Path("a"),), method="tokens", components=("text_encoder",))
    assert resolve(words, base, 30, "cpu").text_encoder_lr == 2 * resolve(words, large, 30, "cpu").text_encoder_lr == 1e-2
    assert resolved(method="tokens", components=("text_encoder",), text_encoder_lr=0.01).text_encoder_lr == 0.01
    several = ("unet attention lora rank=4", "text_encoder tokens tokens lr=0.5", "unet attentions ia3")
    both = {"components": ("unet", "text_encoder"), "block": several}
    ia3 = resolved(method="ia3").unet_lr
    assert resolved(**both).block == (f"{several[0]} lr=0.001", several[1], f"{several[2]} lr={ia3}")
    assert resolved(**both, unet_lr=0.02).block == (f"{several[0]} lr=0.02", several[1], f"{several[2]} lr=0.02")
    assert resolve(resolved(**both), base, 30, "cpu") == resolved(**both)


def test_timesteps_are_weighed_where_a_small_base_learns_words_alone() -> None:
    from peft_diffusion.bases import describe
    from peft_diffusion.training.settings.derive import resolve
    from peft_diffusion.training.settings.pictures import TrainConfig

    base = describe(make_pipe())

    def debiased(base: BaseInfo = base, **asked: Any) -> bool:
        return resolve(TrainConfig((Path("a"),), **asked), base, 30, "cpu").debiased

    words: dict[str, Any] = {"method": "tokens", "components": ("text_encoder",)}
    assert debiased(**words) is debiased(**words | {"method": "prompt"}) is debiased(debiased=True) is True
    beside: dict[str, Any] = {
        "components": ("unet", "text_encoder"),
        "block": ("unet attention lora", "text_encoder tokens tokens"),
    }
    assert debiased() is debiased(**beside) is debiased(replace(base, family="sd1"), **words) is False
    assert debiased(**words, debiased=False) is debiased(**words, min_snr_gamma=5.0) is False


@pytest.mark.slow
def test_a_short_run_is_not_spent_on_its_warm_up() -> None:
    from peft_diffusion.bases import describe
    from peft_diffusion.training.settings.derive import resolve
    from peft_diffusion.training.settings.pictures import TrainConfig

    def warmup(**asked: Any) -> int:
        return resolve(TrainConfig((Path("a"),), **asked), replace(describe(make_pipe()), family="sd1"), 30, "cpu").warmup

    assert (warmup(), warmup(steps=40), warmup(steps=4), warmup(steps=40, warmup=50)) == (50, 8, 0, 50)
