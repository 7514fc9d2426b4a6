"""The benchmark of training steps, on a tiny UNet: its gate, its sides, and what it tells."""

import argparse
import json
from pathlib import Path

import forked
import pytest
import torch
from making import environment

from peft_diffusion.core.errors import UserError
from scripts import benchmark_train, training_sides
from scripts.training_sides import SIDES, Cell

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "scripts" / "benchmark_train.py"
CPU = torch.device("cpu")


def test_the_script_compares_and_tells_all_it_found(tmp_path: Path) -> None:
    flags = ["--tiny", "--device", "cpu", "--precision", "float32", "--gate-steps", "3", "--warm-ups", "1"]
    flags += ["--sides", "ours", "floor", "peft", "--turns", "2", "--output", str(tmp_path)]
    done = forked.python([str(SCRIPT), *flags], None, environment(), forks=True)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not any("error" in line for line in told)
    gate = {key: value for line in told if "gate" in line for key, value in line.items()}
    assert gate["passed"] and gate["cosine_float32"] > 0.9999 and abs(gate["ratio"] - 1) < 0.01
    timed = {line["side"] for line in told if "median_ms" in line}
    assert timed == {"ours", "floor", "peft"}
    operations = {line["side"]: line["gflop"] for line in told if "gflop" in line}
    assert operations["floor"] < operations["ours"] < 1.5 * operations["floor"]
    assert "times ours" in done.stdout


def test_a_gate_that_fails_is_told_and_not_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(cells=["tiny-b1"], quick=False, precision="float32", gate_steps=0, output=tmp_path)
    assert not benchmark_train._gate(options, CPU)
    told = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert told[0]["cosine_float32"] > 0.9999
    assert "mean requires" in told[1]["error"]  # of no losses
    assert told[2] == {"gate": "tiny", "passed": False}
    assert "Traceback" in capsys.readouterr().out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", sorted({*SIDES} - {"peft-compiled"}))
def test_every_side_steps(name: str, checkpointing: bool) -> None:
    theirs = {"lycoris": "lycoris", "kohya": "networks.lora"}  # whose modules stand beside the UNet
    if name in theirs:
        pytest.importorskip(theirs[name])
    cell = Cell("tiny", 2, checkpointing)
    side = SIDES[name](cell, CPU, torch.float32)
    with side.close:
        side.run(2)
        first = side.loss()
        side.alone()
    assert 0 < first < 10
    trained = [p for p in side.unet.parameters() if p.requires_grad]
    assert bool(trained) == (not name.startswith("floor") and name not in theirs)


def test_sides_have_the_same_weights_in_every_precision() -> None:
    exact, half = (training_sides.build(Cell("tiny", 1), CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(exact.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("name", ["sd3-b1", "sd1", "sd1-4", "sd1-b4-x"])
def test_a_cell_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="a cell is"):
        Cell.parse(name)
    assert Cell.parse("sdxl-b4-ck") == Cell("sdxl", 4, True)
