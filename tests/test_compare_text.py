"""The comparison of methods on a language model: every kind of run, and what is told of them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from language import make_lm
from rich.console import Console

from peft_diffusion.core import site
from peft_diffusion.core.method import METHODS
from peft_diffusion.methods import method
from peft_diffusion.training.settings.text import TextTrainConfig
from scripts import compare_text
from scripts.compare_text import FULL, IN_PEFT, Comparison, Figures

torch.set_num_threads(1)
LINES = "The ox of the field is slow, and so is its house.\nThe hen is bold, and so is its house.\n" * 12


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, few_measurements: None, no_signals: pytest.MonkeyPatch, no_plots: None
) -> tuple[Comparison, Path]:
    """A comparison of seconds on a small random base."""
    place = tmp_path_factory.mktemp("compared")
    for name in ("train", "held-out"):
        (place / f"{name}.txt").write_text(LINES[:900] if name == "train" else LINES[:200], "utf-8")
    asked = TextTrainConfig(
        (place / "train.txt",), held_out_text=(place / "held-out.txt",), steps=12, batch_size=2, lr=1e-2, device="cpu",
        precision="float32",
    )  # fmt: skip
    setting = compare_text.prepare(asked, make_lm, place)
    return compare_text.compare(setting, asked, ["lora", "prompt"], [1e-3, 1e-2], Console(quiet=True)), place


def best(comparison: Comparison, name: str) -> Figures:
    """The run of that name, which must be there."""
    run = comparison.of(name)
    assert run is not None
    return run


@pytest.mark.slow
def test_every_run_learns_and_is_counted(found: tuple[Comparison, Path]) -> None:
    comparison, place = found
    assert [(run.name, run.rate) for run in comparison.runs] == [
        ("lora", 1e-2), ("lora in peft", 1e-2), ("prompt", 1e-2), ("prompt in peft", 1e-2), (FULL, 1e-3), (FULL, 1e-2),
    ]  # fmt: skip
    assert all(
        run.perplexity < comparison.base_perplexity and run.seconds > 0
        for run in comparison.runs
        if "prompt" not in run.name
    )
    weights = sum(parameter.numel() for parameter in make_lm().lm.parameters())
    lora, full, theirs = (best(comparison, name) for name in ("lora", FULL, "lora in peft"))
    assert comparison.base_parameters == full.parameters == weights and full.size == 4 * weights
    assert lora.parameters == theirs.parameters == 2 * 16 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64))
    assert best(comparison, "prompt").parameters == best(comparison, "prompt in peft").parameters == 8 * 32
    assert full.perplexity == min(run.perplexity for run in comparison.runs if run.name == FULL)
    assert lora.size == (place / "lora.safetensors").stat().st_size
    assert theirs.size == (place / "peft" / "lora" / "adapter_model.safetensors").stat().st_size
    assert abs(lora.perplexity / theirs.perplexity - 1) < 0.05  # in a run of seconds, begun elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in compare_text.METHODS if name not in compare_text.OURS_ALONE])
def test_what_peft_trains_is_what_ours_is(name: str, found: tuple[Comparison, Path]) -> None:
    import peft

    base = make_lm()
    site.attach(base.lm, "a", method(name, **({"ids": range(3, 11)} if name == "prompt" else {})), METHODS[name].target)
    own = sum(one.numel() for part in site.adapters(base.lm, "a").values() for one in part.parameters())
    theirs = peft.get_peft_model(make_lm().lm, compare_text._peft_config(name))
    trained = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    gates = 2 if name == "prefix" else 0  # ours has one a layer, so that a fresh prefix changes nothing
    if name == "oft":  # peft turns the inputs, and holds of a block of 8 what is above the diagonal
        assert trained == 28 * 2 * (6 * 32 + 64) // 8
    else:
        assert own - gates == trained


@pytest.mark.slow
def test_a_run_trains_what_the_command_trains(found: tuple[Comparison, Path]) -> None:
    comparison, place = found
    metrics = [json.loads(line) for line in (place / "runs" / "lora" / "metrics.jsonl").read_text().splitlines()]
    measured = [line["held_out_loss"] for line in metrics if "held_out_loss" in line]
    assert math.exp(measured[0]) == pytest.approx(comparison.base_perplexity)
    assert math.exp(measured[-1]) == pytest.approx(best(comparison, "lora").perplexity)


def test_the_table_tells_who_comes_near_full_fine_tuning() -> None:
    def run(name: str, parameters: int, perplexity: float, rate: float = 1e-3) -> Figures:
        return Figures(name, rate, parameters, 5_000, 12.3, 3 * 2**20, perplexity)

    own = (run("lora", 40, 43.0), run("ia3", 2, 50.0), run("oft", 60, 41.0), run("prompt", 1, 44.1))
    runs = (*own, run(FULL, 1000, 60.0, 1e-2), run(FULL, 1000, 40.0), run("lora" + IN_PEFT, 40, 42.9))
    comparison = Comparison(1000, 132.2, 300, runs)
    assert best(comparison, FULL).perplexity == 40.0
    assert [one.name for one in comparison.near_full()] == ["lora"]
    text = compare_text.markdown(comparison)
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:8]] == [
        "base", "oft", "lora", "prompt", "ia3", FULL,
    ]  # fmt: skip
    assert "| lora | 0.001 | 40 | 4.00% | 5 KiB | 12 s | 3 MiB | 43.00 | 42.90 |" in text
    assert "| ia3 | 0.001 | 2 | 0.20% | 5 KiB | 12 s | 3 MiB | 50.00 | - |" in text
    assert "with under 5% of the parameters: lora (+7.5%)" in text
    assert "perplexity against the same method in peft: lora +0.2%" in text
    without = replace(comparison, runs=own)
    assert without.near_full() == [] and compare_text.verdict(without) == []
